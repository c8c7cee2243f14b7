use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSlice, IoSliceMut},
    num::NonZeroU64,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rustix::{
    fs::{Advice, CWD, FallocateFlags, Mode, OFlags, ResolveFlags, SeekFrom, Timespec, Timestamps, UTIME_OMIT},
    io::{Errno, ReadWriteFlags},
};
use tree::{ByteRange, Fingerprint, ReadAt, UnixTime, WriteAt};

use super::{Access, Disk, DiskFile, direct::Direct, fs_type::has_own_ctime, is_open_for_writing};

/// The machine's file systems.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(access != Access::Read)
            .create(access == Access::Create)
            .truncate(false)
            .open(path)?;
        Ok(Box::new(RealFile::new(file)))
    }

    fn open_beneath(&self, root: &Path, relative: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        let root = rustix::fs::openat(CWD, root, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let mode = if access == Access::Read { OFlags::RDONLY } else { OFlags::RDWR };
        // Without NONBLOCK, opening a FIFO that took the file's place would hang.
        let flags = mode | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let below = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let file = File::from(rustix::fs::openat2(root, relative, flags, Mode::empty(), below)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Box::new(RealFile::new(file)))
    }

    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn files_below(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        let mut dirs = vec![dir.to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                let into = if entry.file_type()?.is_dir() { &mut dirs } else { &mut files };
                into.push(entry.path());
            }
        }
        Ok(files)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn sync_file_system(&self, dir: &Path) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(dir)?)?)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        // File systems that count no blocks report zero for both.
        Ok(if stat.f_blocks == 0 { u64::MAX } else { stat.f_bavail.saturating_mul(stat.f_frsize) })
    }
}

struct RealFile {
    file: File,
    direct: Mutex<Direct>,
}

impl RealFile {
    fn new(file: File) -> Self {
        Self { file, direct: Mutex::new(Direct::Untried) }
    }
}

impl ReadAt for RealFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buf, offset)
    }
}

impl WriteAt for RealFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(&self.file, bytes, offset)
    }

    fn write_all_vectored_at(&self, mut parts: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        // Parts of no bytes would look as if nothing could be written.
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let some = &parts[..parts.len().min(PARTS_MAX)];
            match rustix::io::pwritev(&self.file, some, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    IoSlice::advance_slices(&mut parts, written);
                    offset += written as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl DiskFile for RealFile {
    fn read_ready_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (len, mut parts) = (buf.len(), [IoSliceMut::new(buf)]);
        match rustix::io::preadv2(&self.file, &mut parts, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) if read == len => Ok(()),
            // Some file systems do not know how; what is short may be the end of the file.
            _ => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn write_past_cache_at(&self, mut parts: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut direct = self.direct.lock().unwrap_or_else(PoisonError::into_inner);
        let written = direct.write_blocks_at(&self.file, parts, offset)?;
        drop(direct);
        IoSlice::advance_slices(&mut parts, written);
        self.write_all_vectored_at(parts, offset + written as u64)
    }

    fn begin_sync(&self, range: ByteRange) {
        // What is still to be written is not dropped: writing it begins.
        let _ = rustix::fs::fadvise(&self.file, range.start(), NonZeroU64::new(range.len()), Advice::DontNeed);
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn punch(&self, range: ByteRange) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, range.start(), range.len())?)
    }

    fn is_hole(&self, range: ByteRange) -> bool {
        // Nobody reads or writes where the file stands, which this moves.
        match rustix::fs::seek(&self.file, SeekFrom::Data(range.start())) {
            Ok(data) => data >= range.end(),
            // No data up to the end of the file.
            Err(error) => error == Errno::NXIO,
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn is_open_for_writing(&self) -> Option<bool> {
        is_open_for_writing(&self.file)
    }

    fn has_own_ctime(&self) -> bool {
        has_own_ctime(&self.file).unwrap_or(false)
    }

    fn fingerprint(&self) -> io::Result<Fingerprint> {
        Ok(Fingerprint::from(&self.file.metadata()?))
    }

    fn set_mtime(&self, mtime: UnixTime) -> io::Result<()> {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanos.into() },
        };
        Ok(rustix::fs::futimens(&self.file, &times)?)
    }
}

/// So many parts Linux takes at a time (`IOV_MAX`).
const PARTS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_the_root_or_special_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("sub/file"), b"in").unwrap();
        fs::write(dir.path().join("outside"), b"out").unwrap();
        std::os::unix::fs::symlink("..", root.join("up")).unwrap();
        std::os::unix::fs::symlink("sub/file", root.join("link")).unwrap();
        rustix::fs::mknodat(CWD, root.join("fifo"), rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let open = |path: &str| RealDisk.open_beneath(&root, Path::new(path), Access::Read);
        assert!(open("sub/file").is_ok());
        for path in ["../outside", "up/outside", "up/root/sub/file", "link", "fifo", "sub", "/etc/passwd", ""] {
            assert!(open(path).is_err(), "{path:?} was opened");
        }
    }

    #[test]
    fn holes_are_told_from_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = RealDisk.open(&path, Access::Create).unwrap();
        let range = |start: u64, end: u64| ByteRange::new(start << 16, end << 16).unwrap();
        file.set_len(5 << 16).unwrap();
        file.write_all_at(&[0; 1 << 16], 1 << 16).unwrap();
        assert!(!file.is_hole(range(1, 2)), "zeros that were written take room");
        assert!(!file.is_hole(range(0, 5)));
        // Not every file system has holes.
        if file.allocated().unwrap() < 2 << 16 {
            assert!(file.is_hole(range(0, 1)) && file.is_hole(range(2, 5)));
        }
    }

    #[test]
    fn parts_are_written_one_behind_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let file = RealDisk.open(&dir.path().join("file"), Access::Create).unwrap();
        for count in [0, 1, PARTS_MAX - 1, 3 * PARTS_MAX + 5] {
            let parts: Vec<Vec<u8>> = (0..count).map(|part| vec![part as u8; part % 7]).collect();
            let mut slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
            file.set_len(0).unwrap();
            file.write_all_vectored_at(&mut slices, 3).unwrap();
            let expected = [&[0; 3][..], &parts.concat()].concat();
            let written = fs::read(dir.path().join("file")).unwrap();
            assert_eq!(written, if parts.concat().is_empty() { vec![] } else { expected });
        }
    }

    #[test]
    fn what_was_just_written_is_ready() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"0123456789").unwrap();
        let mut buf = [0; 4];
        let plain = rustix::io::preadv2(
            File::open(&path).unwrap(),
            &mut [IoSliceMut::new(&mut buf)],
            0,
            ReadWriteFlags::NOWAIT,
        );
        let file = RealDisk.open(&path, Access::Read).unwrap();
        // Not every file system can tell what is in memory.
        if plain != Err(Errno::OPNOTSUPP) {
            file.read_ready_at(&mut buf, 3).unwrap();
            assert_eq!(&buf, b"3456");
        }
        assert_eq!(file.read_ready_at(&mut buf, 8).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn mtime_is_set_to_the_nanosecond_also_before_1970() {
        let dir = tempfile::tempdir().unwrap();
        let file = RealDisk.open(&dir.path().join("file"), Access::Create).unwrap();
        for mtime in [UnixTime { seconds: -5, nanos: 123_456_789 }, UnixTime { seconds: 4_000_000_000, nanos: 1 }] {
            file.set_mtime(mtime).unwrap();
            assert_eq!(file.fingerprint().unwrap().mtime, mtime);
        }
    }
}
