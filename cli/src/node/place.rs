use std::{
    fs::{File, Permissions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::PermissionsExt},
    },
    path::Path,
};

use namespace::RelPath;
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT},
    io::Errno,
};
use tree::UnixTime;

/// A directory into which files of others are put. Whatever their paths and links say, nothing outside it is
/// touched: no symbolic link is followed below it, and nothing that is there is replaced.
pub(super) struct Destination {
    dir: OwnedFd,
}

/// What is at a path already.
pub(super) enum Existing {
    /// A regular file of this size, open for reading.
    File(File, u64),
    /// A symbolic link with this target.
    Symlink(Vec<u8>),
    /// Something else.
    Other,
}

/// A file that has bytes but no name yet, or one that only we know.
pub(super) struct Staged {
    file: File,
    parent: OwnedFd,
    /// The name that it has for now, where the file system knows no files without one.
    name: Option<String>,
}

impl Destination {
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Self { dir: rustix::fs::openat(CWD, dir, flags, Mode::empty())? })
    }

    /// Makes a directory and those above it. It is no error if it is there.
    pub(super) fn make_dir(&self, path: &RelPath) -> io::Result<()> {
        self.descend(path.as_bytes()).map(drop)
    }

    /// What is at `path`, if anything is.
    pub(super) fn existing(&self, path: &RelPath) -> io::Result<Option<Existing>> {
        let (parent, name) = self.parent(path)?;
        let stat = match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = File::from(rustix::fs::openat(&parent, name, flags, Mode::empty())?);
                let size = file.metadata()?.len();
                Existing::File(file, size)
            }
            FileType::Symlink => Existing::Symlink(rustix::fs::readlinkat(&parent, name, Vec::new())?.into_bytes()),
            _ => Existing::Other,
        }))
    }

    /// Makes a symbolic link; it is not followed to set its mtime.
    pub(super) fn symlink(&self, path: &RelPath, target: &[u8], mtime: UnixTime) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::symlinkat(target, &parent, name)?;
        Ok(rustix::fs::utimensat(&parent, name, &times(mtime), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Begins a file that is to stand at `path`.
    pub(super) fn stage(&self, path: &RelPath) -> io::Result<Staged> {
        let (parent, _) = self.parent(path)?;
        let mode = Mode::RUSR | Mode::WUSR;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent, ".", flags | OFlags::TMPFILE, mode) {
            Ok(file) => Ok(Staged { file: file.into(), parent, name: None }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let name = format!(".blob-{:016x}", fastrand::u64(..));
                let file = rustix::fs::openat(&parent, &*name, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
                Ok(Staged { file: file.into(), parent, name: Some(name) })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Moves the finished file `from` to `path`.
    pub(super) fn adopt(&self, from: &Path, path: &RelPath, mode: u16, mtime: UnixTime) -> io::Result<()> {
        let mut file = File::open(from)?;
        set_attributes(&file, mode, mtime)?;
        let (parent, name) = self.parent(path)?;
        match rustix::fs::renameat_with(CWD, from, &parent, name, RenameFlags::NOREPLACE) {
            Err(Errno::XDEV | Errno::INVAL) => {
                let staged = self.stage(path)?;
                io::copy(&mut file, &mut staged.file())?;
                staged.publish(path, mode, mtime)?;
                std::fs::remove_file(from)
            }
            moved => Ok(moved?),
        }
    }

    /// Makes everything that was put here durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.dir)?)
    }

    /// The directory that `path` is in, made if it is not there, and the last component of `path`.
    fn parent<'a>(&self, path: &'a RelPath) -> io::Result<(OwnedFd, &'a [u8])> {
        let bytes = path.as_bytes();
        match bytes.iter().rposition(|&b| b == b'/') {
            Some(slash) => Ok((self.descend(&bytes[..slash])?, &bytes[slash + 1..])),
            None => Ok((self.dir.try_clone()?, bytes)),
        }
    }

    fn descend(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut dir = self.dir.try_clone()?;
        for component in path.split(|&b| b == b'/') {
            let next = match rustix::fs::openat(&dir, component, flags, Mode::empty()) {
                Err(Errno::NOENT) => {
                    match rustix::fs::mkdirat(&dir, component, Mode::RWXU | Mode::RWXG | Mode::RWXO) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                    rustix::fs::openat(&dir, component, flags, Mode::empty())
                }
                opened => opened,
            };
            dir = next?;
        }
        Ok(dir)
    }
}

impl Staged {
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its attributes, and then its name, which nothing must have.
    pub(super) fn publish(mut self, path: &RelPath, mode: u16, mtime: UnixTime) -> io::Result<()> {
        set_attributes(&self.file, mode, mtime)?;
        let name = path.as_path().file_name().unwrap_or_default().as_bytes();
        match &self.name {
            Some(staged) => {
                rustix::fs::renameat_with(&self.parent, &**staged, &self.parent, name, RenameFlags::NOREPLACE)?;
                self.name = None;
            }
            None => {
                let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, &*unnamed, &self.parent, name, AtFlags::SYMLINK_FOLLOW)?;
            }
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = rustix::fs::unlinkat(&self.parent, &**name, AtFlags::empty());
        }
    }
}

fn set_attributes(file: &File, mode: u16, mtime: UnixTime) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode((mode & 0o777).into()))?;
    Ok(rustix::fs::futimens(file, &times(mtime))?)
}

fn times(mtime: UnixTime) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanos.into() },
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, os::unix::fs::MetadataExt};

    use super::*;

    fn path(path: &str) -> RelPath {
        path.try_into().unwrap()
    }

    const MTIME: UnixTime = UnixTime { seconds: -77, nanos: 5 };

    #[test]
    fn files_come_whole_with_their_attributes_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let destination = Destination::open(dir.path()).unwrap();
        let staged = destination.stage(&path("a/b/c")).unwrap();
        staged.file().write_all(b"bytes").unwrap();
        assert!(!dir.path().join("a/b/c").exists());
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 0);
        staged.publish(&path("a/b/c"), 0o751, MTIME).unwrap();
        let meta = fs::metadata(dir.path().join("a/b/c")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime(), meta.mtime_nsec()), (0o751, -77, 5));
        let again = destination.stage(&path("a/b/c")).unwrap().publish(&path("a/b/c"), 0o600, MTIME);
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(dir.path().join("a/b/c")).unwrap(), b"bytes");

        fs::write(dir.path().join("from"), b"moved").unwrap();
        destination.adopt(&dir.path().join("from"), &path("to"), 0o600, MTIME).unwrap();
        assert_eq!(fs::read(dir.path().join("to")).unwrap(), b"moved");
        assert!(!dir.path().join("from").exists());
    }

    #[test]
    fn links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir(&inside).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), b"mine").unwrap();
        let destination = Destination::open(&inside).unwrap();
        destination.symlink(&path("link"), outside.as_os_str().as_bytes(), MTIME).unwrap();
        assert!(destination.stage(&path("link/file")).is_err());
        assert!(destination.make_dir(&path("link/dir")).is_err());
        assert!(destination.symlink(&path("link/l"), b"x", MTIME).is_err());
        assert!(destination.existing(&path("link/file")).is_err());
        assert!(matches!(destination.existing(&path("link")).unwrap(), Some(Existing::Symlink(_))));
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }
}
