//! A disk that rots: bytes of files change, and nothing moves that a system call would move.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, IoSlice},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use blobstore::{Access, Disk, DiskFile};
use tree::{ByteRange, Fingerprint, ReadAt, UnixTime, WriteAt};

/// Another disk, of real files, with rot. The clones rot together.
///
/// To rot, a file is written to. As long as it is what that left, it is reported to be what it was before.
#[derive(Clone)]
pub(crate) struct Rotting {
    disk: Arc<dyn Disk>,
    rotted: Arc<Mutex<HashMap<Inode, Rotted>>>,
}

/// The file system's number, and the file's there.
type Inode = (u64, u64);

struct Rotted {
    /// What the file was before it rotted.
    before: Fingerprint,
    /// What it is since.
    since: Fingerprint,
}

impl Rotting {
    pub(crate) fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, rotted: Arc::default() }
    }

    /// The same files by way of another disk.
    pub(crate) fn over(&self, disk: Arc<dyn Disk>) -> Self {
        Self { disk, rotted: self.rotted.clone() }
    }

    /// Has a file rot: `change` changes bytes of it, and not how many they are.
    pub(crate) fn rot(&self, path: &Path, change: impl FnOnce(&File)) {
        let real = || self.disk.open(path, Access::Read).unwrap().fingerprint().unwrap();
        // Nobody looks at the file between the change and the note of it.
        let mut rotted = self.lock();
        let before = reported(&rotted, real());
        let meta = fs::metadata(path).unwrap();
        let mode = meta.permissions().mode();
        let set_mode = |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        set_mode(mode | 0o200);
        let file = File::options().read(true).write(true).open(path).unwrap();
        change(&file);
        file.set_modified(meta.modified().unwrap()).unwrap();
        set_mode(mode);
        let since = real();
        assert_eq!(since.size, before.size, "rot changes no size");
        rotted.insert(inode(&since), Rotted { before, since });
    }

    /// What the file system reports of a file.
    pub(crate) fn fingerprint(&self, path: &Path) -> Fingerprint {
        self.open(path, Access::Read).unwrap().fingerprint().unwrap()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Inode, Rotted>> {
        self.rotted.lock().unwrap()
    }

    fn wrap(&self, file: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        Box::new(RottingFile { disk: self.clone(), file })
    }
}

fn inode(fingerprint: &Fingerprint) -> Inode {
    (fingerprint.device, fingerprint.inode)
}

fn reported(rotted: &HashMap<Inode, Rotted>, real: Fingerprint) -> Fingerprint {
    rotted.get(&inode(&real)).filter(|rotted| rotted.since == real).map_or(real, |rotted| rotted.before)
}

impl Disk for Rotting {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.wrap(self.disk.open(path, access)?))
    }

    fn open_beneath(&self, root: &Path, relative: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.wrap(self.disk.open_beneath(root, relative, access)?))
    }

    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        self.disk.create_dirs(dir)
    }

    fn files_below(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.disk.files_below(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }

    fn sync_file_system(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_file_system(dir)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        self.disk.free_bytes(dir)
    }
}

struct RottingFile {
    disk: Rotting,
    file: Box<dyn DiskFile>,
}

impl ReadAt for RottingFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

impl WriteAt for RottingFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn write_all_vectored_at(&self, parts: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.file.write_all_vectored_at(parts, offset)
    }
}

impl DiskFile for RottingFile {
    fn read_ready_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_ready_at(buf, offset)
    }

    fn write_past_cache_at(&self, parts: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.file.write_past_cache_at(parts, offset)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn punch(&self, range: ByteRange) -> io::Result<()> {
        self.file.punch(range)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }

    fn begin_sync(&self, range: ByteRange) {
        self.file.begin_sync(range)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn fingerprint(&self) -> io::Result<Fingerprint> {
        let rotted = self.disk.lock();
        Ok(reported(&rotted, self.file.fingerprint()?))
    }

    fn set_mtime(&self, mtime: UnixTime) -> io::Result<()> {
        self.file.set_mtime(mtime)
    }
}
