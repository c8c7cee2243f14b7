//! A simulated file system that records every operation, and can become what a power cut behind any of them left.
//!
//! What redb does to its file goes through the same record: the database is a file like any other.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use blobstore::{Access, Disk, DiskFile};
use tree::{ByteRange, Fingerprint, ReadAt, UnixTime, WriteAt};

use crate::common::fingerprint;
use crate::image::{Bytes, File, Image, Inode, Luck, Op, file_system};

/// One state of the simulated machine's disks, and all that was done to them since. The clones are one.
#[derive(Clone)]
pub(crate) struct SimDisk(Arc<Mutex<World>>);

struct World {
    /// What was durable when the record began.
    base: Image,
    now: Image,
    record: Vec<Op>,
}

impl SimDisk {
    /// Disks with these directories and nothing else, all durable.
    pub(crate) fn new(dirs: &[&str]) -> Self {
        Self::of(Image { dirs: dirs.iter().map(PathBuf::from).collect(), ..Image::default() })
    }

    fn of(image: Image) -> Self {
        Self(Arc::new(Mutex::new(World { base: image.clone(), now: image, record: Vec::new() })))
    }

    /// Makes all there is durable, and begins the record here.
    pub(crate) fn settle(&self) {
        let mut world = self.lock();
        world.base = world.now.clone();
        world.record.clear();
    }

    /// How many operations are recorded.
    pub(crate) fn recorded(&self) -> usize {
        self.lock().record.len()
    }

    /// The last operations before a power cut behind the first `ops`.
    pub(crate) fn last_before(&self, ops: usize) -> String {
        format!("{:#?}", &self.lock().record[ops.saturating_sub(6)..ops])
    }

    /// The disks after a power cut behind the first `ops` recorded operations.
    pub(crate) fn power_cut(&self, ops: usize, luck: Luck) -> SimDisk {
        let world = self.lock();
        Self::of(world.base.power_cut(&world.record[..ops], luck))
    }

    /// Flips a bit on the disk, where no system call sees it.
    pub(crate) fn rot(&self, path: &Path, offset: u64) {
        let mut world = self.lock();
        let inode = world.now.names[path];
        world.apply(Op::Rot(inode, offset));
    }

    /// The file at `path` as redb's storage; made if it is not there.
    pub(crate) fn database(&self, path: &Path) -> SimDatabase {
        SimDatabase(self.open_file(path, Access::Create).expect("its directory is there"))
    }

    fn open_file(&self, path: &Path, access: Access) -> io::Result<SimFile> {
        let mut world = self.lock();
        let inode = match world.now.names.get(path) {
            Some(&inode) => inode,
            None if access == Access::Create && path.parent().is_some_and(|dir| world.now.dirs.contains(dir)) => {
                let inode = file_system(path) << 32 | (world.now.ticks + 1);
                world.apply(Op::Create(path.to_owned(), inode));
                inode
            }
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(SimFile { disk: self.clone(), inode })
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().expect("nothing panics while it holds the disk")
    }

    fn apply(&self, op: Op) -> io::Result<()> {
        self.lock().apply(op);
        Ok(())
    }
}

impl World {
    fn apply(&mut self, op: Op) {
        self.now.apply(&op);
        self.record.push(op);
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(self.open_file(path, access)?))
    }

    fn open_beneath(&self, root: &Path, relative: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        self.open(&root.join(relative), access)
    }

    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        let missing: Vec<&Path> = dir.ancestors().take_while(|dir| !self.lock().now.dirs.contains(*dir)).collect();
        missing.into_iter().rev().try_for_each(|dir| self.apply(Op::MakeDir(dir.to_owned())))
    }

    fn files_below(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let world = self.lock();
        if !world.now.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(world.now.names.keys().filter(|path| path.starts_with(dir)).cloned().collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if from.parent() == to.parent() {
            return self.apply(Op::Rename(from.to_owned(), to.to_owned()));
        }
        // Between directories, either name may survive without the other.
        let inode = self.lock().now.names.get(from).copied().ok_or(io::ErrorKind::NotFound)?;
        self.apply(Op::Create(to.to_owned(), inode))?;
        self.apply(Op::Remove(from.to_owned()))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if self.lock().now.names.contains_key(path) { self.apply(Op::Remove(path.to_owned())) } else { Ok(()) }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.apply(Op::SyncDir(dir.to_owned()))
    }

    fn sync_file_system(&self, dir: &Path) -> io::Result<()> {
        self.apply(Op::SyncFileSystem(file_system(dir)))
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

struct SimFile {
    disk: SimDisk,
    inode: Inode,
}

impl SimFile {
    fn look<T>(&self, at: impl FnOnce(&File) -> T) -> T {
        at(&self.disk.lock().now.files[&self.inode])
    }
}

impl ReadAt for SimFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.look(|file| file.bytes[..].read_exact_at(buf, offset))
    }
}

impl WriteAt for SimFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.apply(Op::Write(self.inode, offset, Bytes(Arc::new(bytes.to_owned()))))
    }
}

impl DiskFile for SimFile {
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        if self.look(|file| file.bytes.len() as u64) == bytes {
            return Ok(());
        }
        self.disk.apply(Op::SetLen(self.inode, bytes))
    }

    fn punch(&self, range: ByteRange) -> io::Result<()> {
        self.disk.apply(Op::Punch(self.inode, range))
    }

    fn is_hole(&self, range: ByteRange) -> bool {
        let range = range.start() as usize..range.end() as usize;
        self.look(|file| file.bytes.get(range).is_some_and(tree::is_zero))
    }

    fn allocated(&self) -> io::Result<u64> {
        let taken = |block: &&[u8]| block.iter().any(|byte| *byte != 0);
        Ok(self.look(|file| file.bytes.chunks(4096).filter(taken).count() as u64 * 4096))
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.apply(Op::Sync(self.inode))
    }

    fn fingerprint(&self) -> io::Result<Fingerprint> {
        let (device, inode) = (self.inode >> 32, self.inode);
        Ok(self.look(|file| {
            let size = file.bytes.len() as u64;
            fingerprint(device, inode, size, file.mtime, file.ctime)
        }))
    }

    fn set_mtime(&self, mtime: UnixTime) -> io::Result<()> {
        self.disk.apply(Op::SetMtime(self.inode, mtime))
    }
}

/// redb's storage, in the same record.
pub(crate) struct SimDatabase(SimFile);

impl fmt::Debug for SimDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file {}", self.0.inode)
    }
}

impl redb::StorageBackend for SimDatabase {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.look(|file| file.bytes.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        DiskFile::set_len(&self.0, len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}
