//! The seam between the store and the file system.

mod direct;
pub mod fs_type;
mod lease;
mod real;

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
};

use tree::{ByteRange, Fingerprint, ReadAt, UnixTime, WriteAt};

pub use lease::is_open_for_writing;
pub use real::RealDisk;

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading; the file must be there.
    Read,
    /// Reading and writing; the file must be there.
    Write,
    /// Reading and writing; the file is made if it is not there. Never truncates.
    Create,
}

/// A file system, real or simulated. Paths are absolute.
pub trait Disk: Send + Sync {
    /// Opens one of the store's own files.
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>>;

    /// Opens the regular file at `relative` below `root`, following no symbolic link on the way down.
    fn open_beneath(&self, root: &Path, relative: &Path, access: Access) -> io::Result<Box<dyn DiskFile>>;

    /// Makes a directory and those above it. It is no error if it is there.
    fn create_dirs(&self, dir: &Path) -> io::Result<()>;

    /// The paths of all files, at any depth, below `dir`.
    fn files_below(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;

    /// Renames a file, replacing what is at `to`. Durable after [`sync_dir`](Self::sync_dir) of both directories.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Deletes a file. It is no error if it is not there.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the entries of `dir` durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Makes everything durable that was written so far to the file system that `dir` is on.
    fn sync_file_system(&self, dir: &Path) -> io::Result<()>;

    /// How many bytes whoever is not root can still write to the file system that `dir` is on.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;
}

/// An open file.
pub trait DiskFile: ReadAt + WriteAt + Send + Sync {
    /// Fills `buf` with the bytes from `offset` on if the system has them in memory. [`io::ErrorKind::WouldBlock`] if the
    /// disk would have to be waited for, which nobody can tell who does not know better.
    fn read_ready_at(&self, _buf: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// The same as [`write_all_vectored_at`](WriteAt::write_all_vectored_at), for what is not read soon: past the system's
    /// page cache, so far as it can.
    fn write_past_cache_at(&self, parts: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.write_all_vectored_at(parts, offset)
    }

    /// Makes the file `bytes` long, with zeros, which take no room, where it grows.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Makes `range` zeros that take no room; the length stays. Where the file ends inside its last block, the range
    /// may go beyond the end. [`io::ErrorKind::Unsupported`] if the file system cannot do that.
    fn punch(&self, range: ByteRange) -> io::Result<()>;

    /// Whether all of `range`, below the file's end, is a hole: zeros that take no room. `false` where that is not known.
    fn is_hole(&self, _range: ByteRange) -> bool {
        false
    }

    /// How many bytes the file takes on the disk.
    fn allocated(&self) -> io::Result<u64>;

    /// Has the disk begin with what was written in `range`, so that the next sync has less to wait for. A hint.
    fn begin_sync(&self, _range: ByteRange) {}

    /// Makes the file's bytes, length and times durable.
    fn sync(&self) -> io::Result<()>;

    /// Whether a program has the file open for writing; `None` if nobody can tell. Only of a file opened to be read.
    fn is_open_for_writing(&self) -> Option<bool> {
        None
    }

    /// Whether a write moves a time of the file that no program can set back: only then is what moved none not written to.
    fn has_own_ctime(&self) -> bool {
        true
    }

    /// What the file is like now.
    fn fingerprint(&self) -> io::Result<Fingerprint>;

    /// Sets the modification time.
    fn set_mtime(&self, mtime: UnixTime) -> io::Result<()>;
}
