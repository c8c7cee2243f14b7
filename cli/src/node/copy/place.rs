use std::{
    collections::HashSet,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use blobstore::RootId;
use namespace::{RelPath, staging_name};
use peers::{Attributes, Lost};
use rustix::{
    fs::{
        AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
    },
    io::Errno,
};
use tracing::{debug, info};
use tree::{Fingerprint, UnixTime};

use super::{
    attributes::{KeepAttributes, has_all},
    naming::rename_new,
    sparse,
};

/// A directory into which files of others are put. Whatever their paths and links say, nothing outside it is
/// touched: no symbolic link is followed below it, and nothing that is there is replaced unless that is asked for.
pub(super) struct Destination {
    dir: OwnedFd,
    /// Takes note of directories that are made because something is to be in them.
    implied: Option<(RootId, Implied)>,
}

/// Directories that were made because something was to be in them: whoever then says what they are to be like makes them
/// so. So many at most; a directory that is forgotten keeps its mode.
#[derive(Clone, Default)]
pub(in super::super) struct Implied(Arc<Mutex<HashSet<Directory>>>);

/// A directory by its path below a root.
type Directory = (RootId, Vec<u8>);

impl Implied {
    fn note(&self, root: RootId, dir: &[u8]) {
        let mut dirs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if dirs.len() < IMPLIED_MAX {
            dirs.insert((root, dir.to_owned()));
        }
    }

    fn take(&self, root: RootId, dir: &RelPath) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&(root, dir.as_bytes().to_owned()))
    }
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

/// What a file is to be like beside its bytes.
#[derive(Debug, Clone, Default)]
pub(super) struct Traits {
    pub(super) mode: u16,
    pub(super) mtime: UnixTime,
    pub(super) attributes: Attributes,
    /// Which attributes are accepted here.
    pub(super) keep: KeepAttributes,
}

/// A file that has all its bytes and traits, and not yet its name.
pub(super) struct Staged {
    file: File,
    parent: OwnedFd,
    at: At,
    traits: Traits,
}

/// Where a staged file is.
enum At {
    /// It has no name at all.
    Nowhere,
    /// In the directory that it is for, under a name for a moment: where the file system knows no files without one, or
    /// where it is to take another's place.
    Beside(String),
    /// Elsewhere on the same file system.
    Elsewhere(PathBuf),
}

impl Destination {
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Self { dir: rustix::fs::openat(CWD, dir, flags, Mode::empty())?, implied: None })
    }

    /// Takes note, in `implied`, of directories below `root` that are made for what is in them.
    pub(super) fn noting(self, root: RootId, implied: Implied) -> Self {
        Self { implied: Some((root, implied)), ..self }
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

    /// Makes a symbolic link that takes the place of a file or another link, at once; `aside` is a directory for it until
    /// then, used if it is on the same file system.
    pub(super) fn replace_by_symlink(
        &self,
        path: &RelPath,
        target: &[u8],
        mtime: UnixTime,
        aside: &Path,
    ) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        let temporary = staging_name(fastrand::u64(..));
        let replace = |dir: BorrowedFd<'_>| {
            rustix::fs::symlinkat(target, dir, &*temporary)?;
            let rest = rustix::fs::utimensat(dir, &*temporary, &times(mtime), AtFlags::SYMLINK_NOFOLLOW)
                .and_then(|()| rustix::fs::renameat(dir, &*temporary, &parent, name));
            rest.inspect_err(|_| {
                let _ = rustix::fs::unlinkat(dir, &*temporary, AtFlags::empty());
            })
        };
        let elsewhere = Self::open(aside).map_err(|_| Errno::XDEV);
        match elsewhere.and_then(|elsewhere| replace(elsewhere.dir.as_fd())) {
            Ok(()) => Ok(()),
            Err(_) => Ok(replace(parent.as_fd())?),
        }
    }

    /// Makes a directory, with these permissions; its owner may write to it in any case. One that is there keeps its own,
    /// unless it was made only for what is in it. Tells whether it was made, and what was not kept.
    pub(super) fn make_dir_with(&self, path: &RelPath, traits: &Traits) -> io::Result<(bool, Lost)> {
        let (parent, name) = self.parent(path)?;
        let mode = Mode::from_raw_mode((traits.mode & 0o777 | 0o700).into());
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let is_new = match rustix::fs::mkdirat(&parent, name, mode) {
            Ok(()) => true,
            Err(Errno::EXIST) => self.implied.as_ref().is_some_and(|(root, implied)| implied.take(*root, path)),
            Err(error) => return Err(error.into()),
        };
        let dir = File::from(rustix::fs::openat(&parent, name, flags, Mode::empty())?);
        let lost = if is_new {
            // Whatever the umask says.
            let is_kept = traits.set(&dir, mode)?;
            Lost { attributes: !is_kept, mode: dir.metadata()?.mode() & 0o777 != mode.bits() }
        } else {
            Lost { attributes: !has_all(&dir, &traits.attributes), mode: false }
        };
        Ok((is_new, lost))
    }

    /// Makes `path` another name of an open file; with `replace`, in place of whatever file or link has it, at
    /// once.
    pub(super) fn link(&self, path: &RelPath, file: &File, replace: bool) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        if !replace {
            return Ok(rustix::fs::linkat(CWD, &*open, &parent, name, AtFlags::SYMLINK_FOLLOW)?);
        }
        let temporary = staging_name(fastrand::u64(..));
        rustix::fs::linkat(CWD, &*open, &parent, &*temporary, AtFlags::SYMLINK_FOLLOW)?;
        let renamed = rustix::fs::renameat(&parent, &*temporary, &parent, name);
        // Between two names of one file nothing is renamed.
        let _ = rustix::fs::unlinkat(&parent, &*temporary, AtFlags::empty());
        Ok(renamed?)
    }

    /// Begins a file that is to stand at `path`.
    pub(super) fn stage(&self, path: &RelPath) -> io::Result<Staged> {
        Staged::begin(self.parent(path)?.0)
    }

    /// The same for the finished file `from`, which nobody else uses: if it is on the same file system, it is moved.
    pub(super) fn stage_moved(&self, from: &Path, path: &RelPath) -> io::Result<Staged> {
        let (parent, _) = self.parent(path)?;
        let file = File::open(from)?;
        if file.metadata()?.dev() == rustix::fs::fstat(&parent)?.st_dev {
            return Ok(Staged { file, parent, at: At::Elsewhere(from.to_owned()), traits: Traits::default() });
        }
        let staged = Staged::begin(parent)?;
        sparse::copy(&file, staged.file())?;
        std::fs::remove_file(from)?;
        Ok(staged)
    }

    /// Whether what is to stand at `path` would be on the same file system as `dir`.
    pub(super) fn shares_file_system(&self, path: &RelPath, dir: &Path) -> io::Result<bool> {
        Ok(rustix::fs::fstat(self.parent(path)?.0)?.st_dev == std::fs::metadata(dir)?.dev())
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
        let (mut dir, mut end) = (self.dir.try_clone()?, 0);
        for component in path.split(|&b| b == b'/') {
            end += component.len() + 1;
            let next = match rustix::fs::openat(&dir, component, flags, Mode::empty()) {
                Err(Errno::NOENT) => {
                    match rustix::fs::mkdirat(&dir, component, Mode::RWXU | Mode::RWXG | Mode::RWXO) {
                        Ok(()) => {
                            if let Some((root, implied)) = &self.implied {
                                implied.note(*root, &path[..end - 1]);
                            }
                        }
                        Err(Errno::EXIST) => {}
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
    fn begin(parent: OwnedFd) -> io::Result<Self> {
        let mode = Mode::RUSR | Mode::WUSR;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent, ".", flags | OFlags::TMPFILE, mode) {
            Ok(file) => Ok(Self { file: file.into(), parent, at: At::Nowhere, traits: Traits::default() }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS) => {
                let name = staging_name(fastrand::u64(..));
                let file = rustix::fs::openat(&parent, &*name, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
                lock(&file);
                Ok(Self { file: file.into(), parent, at: At::Beside(name), traits: Traits::default() })
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The directory that it is for.
    pub(super) fn parent(&self) -> &OwnedFd {
        &self.parent
    }

    /// Gives the file its traits. Returns what is not kept of them.
    pub(super) fn set_traits(&mut self, traits: Traits) -> io::Result<Lost> {
        let mode = Mode::from_raw_mode((traits.mode & 0o777).into());
        let is_kept = traits.set(&self.file, mode)?;
        let mut times = times(traits.mtime);
        rustix::fs::futimens(&self.file, &times)?;
        let mut meta = self.file.metadata()?;
        if meta.mtime().abs_diff(traits.mtime.seconds) > MTIME_GRAIN_S {
            // By way of FUSE, some file systems set both times or none.
            times.last_access.tv_nsec = UTIME_NOW;
            rustix::fs::futimens(&self.file, &times)?;
            meta = self.file.metadata()?;
        }
        self.traits = traits;
        Ok(Lost { attributes: !is_kept, mode: meta.mode() & 0o777 != mode.bits() })
    }

    /// Gives the file its name, that of `path`, which nothing must have.
    pub(super) fn publish(&mut self, path: &RelPath) -> io::Result<()> {
        let name = file_name(path);
        let renamed = match &self.at {
            At::Nowhere => {
                let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                return Ok(rustix::fs::linkat(CWD, &*unnamed, &self.parent, name, AtFlags::SYMLINK_FOLLOW)?);
            }
            At::Beside(from) => rename_new(self.parent.as_fd(), from.as_bytes(), self.parent.as_fd(), name),
            At::Elsewhere(from) => rename_new(CWD, from.as_os_str().as_bytes(), self.parent.as_fd(), name),
        };
        match renamed {
            Ok(()) => self.at = At::Nowhere,
            Err(Errno::XDEV) if matches!(self.at, At::Elsewhere(_)) => {
                self.come_beside()?;
                return self.publish(path);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Gives the file its name in place of whatever file or link has it, at once; `aside` is a directory for it until then,
    /// used if it is on the same file system.
    pub(super) fn replace(&mut self, path: &RelPath, aside: &Path) -> io::Result<()> {
        if matches!(self.at, At::Nowhere) {
            let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let name = staging_name(fastrand::u64(..));
            let elsewhere = aside.join(&name);
            match rustix::fs::linkat(CWD, &*unnamed, CWD, &elsewhere, AtFlags::SYMLINK_FOLLOW) {
                Ok(()) => self.at = At::Elsewhere(elsewhere),
                Err(_) => {
                    lock(&self.file);
                    rustix::fs::linkat(CWD, &*unnamed, &self.parent, &*name, AtFlags::SYMLINK_FOLLOW)?;
                    self.at = At::Beside(name);
                }
            }
        }
        let name = file_name(path);
        let renamed = match &self.at {
            At::Nowhere => unreachable!("it has got a name"),
            At::Beside(from) => rustix::fs::renameat(&self.parent, &**from, &self.parent, name),
            At::Elsewhere(from) => rustix::fs::renameat(CWD, from, &self.parent, name),
        };
        match renamed {
            Ok(()) => self.at = At::Nowhere,
            Err(Errno::XDEV) if matches!(self.at, At::Elsewhere(_)) => {
                self.come_beside()?;
                return self.replace(path, aside);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Makes a file that is elsewhere one in the directory that it is for: what looks like one file system is none.
    fn come_beside(&mut self) -> io::Result<()> {
        let mut new = Self::begin(self.parent.try_clone()?)?;
        sparse::copy(&self.file, new.file())?;
        new.set_traits(self.traits.clone())?;
        new.file().sync_all()?;
        // The one before is deleted.
        *self = new;
        Ok(())
    }
}

impl Traits {
    /// Gives a file or directory its attributes, and then this mode, which an ACL changes. Returns whether it has the former.
    fn set(&self, file: &File, mode: Mode) -> io::Result<bool> {
        let is_kept = self.keep.set(file, &self.attributes);
        match rustix::fs::fchmod(file, mode) {
            // A file system that has no modes, or not all.
            Ok(()) | Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(is_kept)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        match &self.at {
            At::Nowhere => {}
            At::Beside(name) => {
                let _ = rustix::fs::unlinkat(&self.parent, &**name, AtFlags::empty());
            }
            At::Elsewhere(path) => {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// The directory below `root` that `path` is in, if it is there, reached through no symbolic link.
pub(super) fn parent_beneath(root: &Path, path: &RelPath) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    let Some(parent) = path.parent() else { return Ok(root) };
    let below = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(root, parent.as_path(), flags | OFlags::NOFOLLOW, Mode::empty(), below)?)
}

/// What the file system says of the entry `path` in its directory `parent`, which is not followed.
pub(super) fn fingerprint_at(parent: &OwnedFd, path: &RelPath) -> io::Result<Fingerprint> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let entry = File::from(rustix::fs::openat(parent, file_name(path), flags, Mode::empty())?);
    Ok(Fingerprint::from(&entry.metadata()?))
}

/// Whether an error says that nothing is there.
pub(super) fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|errno| gone.contains(&errno))
}

/// The last component.
pub(super) fn file_name(path: &RelPath) -> &[u8] {
    path.as_path().file_name().unwrap_or_default().as_bytes()
}

/// Locks a file that has a name for a moment, for as long as it is open, so that nobody sweeps it. Where there are no locks, its
/// ctime alone has to do.
fn lock(file: impl AsFd) {
    let _ = rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive);
}

/// Whether a program of this machine that runs has locked a file so.
fn is_locked(parent: &OwnedFd, path: &RelPath) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(parent, file_name(path), flags, Mode::empty());
    file.is_ok_and(|file| rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK))
}

/// Deletes a file with a name for a moment that a crash left behind: nobody has it locked, nor has written to it for a while. The
/// lock counts where a file system has no ctime but the mtime, which a copy sets back.
pub(super) fn sweep(root: &Path, path: &RelPath) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    sweep_at(root, path, now.cast_signed());
}

/// The same if it is `now`, in seconds since 1970.
fn sweep_at(root: &Path, path: &RelPath, now: i64) {
    let swept = parent_beneath(root, path).and_then(|parent| {
        let changed = fingerprint_at(&parent, path)?.ctime.seconds;
        if changed.saturating_add_unsigned(SWEPT_AFTER_S) < now && !is_locked(&parent, path) {
            info!(path = ?root.join(path.as_path()), "left behind by a copy that broke off; deleted");
            rustix::fs::unlinkat(&parent, file_name(path), AtFlags::empty())?;
        }
        Ok(())
    });
    if let Err(error) = swept {
        debug!(%path, reason = tree::reason(&error), "not swept");
    }
}

/// The coarsest mtimes of a file system: FAT's.
const MTIME_GRAIN_S: u64 = 2;
const IMPLIED_MAX: usize = 65_536;
/// Somebody else who has the same directory may be about to rename it.
pub(super) const SWEPT_AFTER_S: u64 = 600;

fn times(mtime: UnixTime) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanos.into() },
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    fn path(path: &str) -> RelPath {
        path.try_into().unwrap()
    }

    const MTIME: UnixTime = UnixTime { seconds: -77, nanos: 5 };

    #[test]
    fn files_come_whole_with_their_attributes_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let destination = Destination::open(dir.path()).unwrap();
        let traits = |mode| Traits { mode, mtime: MTIME, ..Traits::default() };
        let stage = |bytes: &[u8], mode| {
            let mut staged = destination.stage(&path("a/b/c")).unwrap();
            staged.file().write_all(bytes).unwrap();
            assert_eq!(staged.set_traits(traits(mode)).unwrap(), Lost::default());
            staged
        };
        let mut staged = stage(b"bytes", 0o751);
        assert!(!dir.path().join("a/b/c").exists());
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 0);
        staged.publish(&path("a/b/c")).unwrap();
        let check = |mode, bytes: &[u8]| {
            let meta = fs::metadata(dir.path().join("a/b/c")).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.mtime(), meta.mtime_nsec()), (mode, -77, 5));
            assert_eq!(fs::read(dir.path().join("a/b/c")).unwrap(), bytes);
            assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
        };
        let again = stage(b"others", 0o600).publish(&path("a/b/c"));
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        check(0o751, b"bytes");

        // In its place, by way of a directory on the same file system, and of none.
        let aside = dir.path().join("aside");
        fs::create_dir(&aside).unwrap();
        stage(b"newer", 0o640).replace(&path("a/b/c"), &aside).unwrap();
        check(0o640, b"newer");
        stage(b"newest", 0o600).replace(&path("a/b/c"), &dir.path().join("missing")).unwrap();
        check(0o600, b"newest");

        let from = aside.join("from");
        let moved = || {
            fs::write(&from, b"moved").unwrap();
            let mut staged = destination.stage_moved(&from, &path("a/b/c")).unwrap();
            staged.set_traits(traits(0o644)).unwrap();
            staged
        };
        assert_eq!(moved().publish(&path("a/b/c")).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        check(0o600, b"newest");
        moved().replace(&path("a/b/c"), &aside).unwrap();
        check(0o644, b"moved");
        let mut copied = moved();
        copied.come_beside().unwrap();
        assert!(!from.exists());
        copied.replace(&path("a/b/c"), &aside).unwrap();
        check(0o644, b"moved");
        for aside in [&aside, &dir.path().join("missing")] {
            destination.replace_by_symlink(&path("a/b/c"), b"leads nowhere", MTIME, aside).unwrap();
            assert_eq!(fs::read_link(dir.path().join("a/b/c")).unwrap().as_os_str(), "leads nowhere");
            assert_eq!(fs::symlink_metadata(dir.path().join("a/b/c")).unwrap().mtime(), -77);
        }
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&aside).unwrap().count(), 0);
        // A directory stays, whatever is asked for.
        assert!(destination.stage(&path("a/b")).unwrap().replace(&path("a/b"), &aside).is_err());
        assert!(destination.replace_by_symlink(&path("a/b"), b"x", MTIME, &aside).is_err());
        assert_eq!(destination.make_dir_with(&path("d"), &traits(0o555)).unwrap(), (true, Lost::default()));
        assert_eq!(destination.make_dir_with(&path("d"), &traits(0o777)).unwrap(), (false, Lost::default()));
        assert_eq!(fs::metadata(dir.path().join("d")).unwrap().mode() & 0o7777, 0o755);
        assert!(destination.make_dir_with(&path("a/b/c"), &traits(0o777)).is_err());
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&aside).unwrap().count(), 0);
    }

    #[test]
    fn only_what_was_left_behind_long_ago_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let name = staging_name(7);
        let at = dir.path().join(&name);
        let file = File::create(&at).unwrap();
        sweep(dir.path(), &path(&name));
        assert!(at.exists(), "somebody may still need it");
        let later = file.metadata().unwrap().ctime() + SWEPT_AFTER_S as i64 + 1;
        lock(&file);
        sweep_at(dir.path(), &path(&name), later);
        assert!(at.exists(), "somebody writes it");
        drop(file);
        sweep_at(dir.path(), &path(&name), later);
        assert!(!at.exists());
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
        assert!(destination.make_dir_with(&path("link"), &Traits::default()).is_err());
        assert!(parent_beneath(&inside, &path("link/file")).is_err());
        assert!(destination.make_dir(&path("link/dir")).is_err());
        assert!(destination.symlink(&path("link/l"), b"x", MTIME).is_err());
        assert!(destination.existing(&path("link/file")).is_err());
        assert!(matches!(destination.existing(&path("link")).unwrap(), Some(Existing::Symlink(_))));
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }
}
