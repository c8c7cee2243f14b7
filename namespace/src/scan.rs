use std::{
    cmp::Reverse,
    ffi::OsStr,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, StatxTimestamp},
    io::Errno,
};
use tree::{Fingerprint, UnixTime};

use crate::{RelPath, is_deleted_name, is_leaving_name, is_staging_name};

/// An entry that a walk through an arena root met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Where.
    pub path: RelPath,
    /// What.
    pub kind: SeenKind,
}

/// What a walk met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeenKind {
    /// A regular file.
    File {
        /// What it is like.
        fingerprint: Fingerprint,
        /// Its permission bits, at most 0o777.
        mode: u16,
    },
    /// A symbolic link, not followed.
    Symlink {
        /// What it says.
        target: Vec<u8>,
        /// Its own mtime.
        mtime: UnixTime,
    },
    /// A directory. What is in it comes behind.
    Directory {
        /// Its permission bits, at most 0o777.
        mode: u16,
        /// Its own mtime.
        mtime: UnixTime,
    },
    /// Not indexed: a socket, FIFO or device, or a file that [was deleted and is still open](crate::is_deleted_name).
    Special,
}

/// What a walk could not take.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// An entry could not be looked at, or a directory not read. What was known at and below it is still so.
    #[error("read {path:?}")]
    Unreadable {
        /// Where.
        path: RelPath,
        /// Why.
        source: io::Error,
    },
    /// A name that no path in an arena can have.
    #[error("{path:?} is too long a name")]
    Name {
        /// The absolute path.
        path: PathBuf,
    },
    /// The arena root itself could not be read: nothing is known of the arena now.
    #[error("read the arena root {path:?}")]
    Root {
        /// The arena root.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Goes through an arena root or what is at a path in it, depth first, and yields everything there, ordered by path.
///
/// Follows no symbolic link, also where a directory becomes one meanwhile. Needs memory for the entries of the
/// directories between the root and where it is.
pub struct Walk {
    root: PathBuf,
    left_out: Vec<PathBuf>,
    /// What is still to come, the next one last; deeper directories' entries behind shallower ones'.
    stack: Vec<Pending>,
    /// The directory that was looked into last; the root has no path.
    open: Option<(Option<RelPath>, OwnedFd)>,
    /// Called with each directory before it is read.
    entering: Box<dyn FnMut(&Path) + Send>,
    /// Called with what has the name of a moment, and is left out.
    passing: Box<dyn FnMut(RelPath) + Send>,
}

/// What has yet to be looked at.
enum Pending {
    Root,
    Directory(RelPath),
    Entry(RelPath),
    /// The path at which the walk starts: a directory is gone into.
    Start(RelPath),
    Failed(WalkError),
}

impl Walk {
    /// Walks through `root`, but not into `left_out`, which are absolute paths.
    pub fn new(root: impl Into<PathBuf>, left_out: Vec<PathBuf>) -> Self {
        let real = |path: PathBuf| path.canonicalize().unwrap_or(path);
        let left_out = left_out.into_iter().map(real).collect();
        let root = real(root.into());
        Self {
            root,
            left_out,
            stack: vec![Pending::Root],
            open: None,
            entering: Box::new(|_| {}),
            passing: Box::new(|_| {}),
        }
    }

    /// Walks only through what is at and below `path`, which may be nothing.
    pub fn within(mut self, path: RelPath) -> Self {
        let absolute = self.root.join(path.as_path());
        let is_left_out = self.left_out.iter().any(|left_out| absolute.starts_with(left_out))
            || is_staging_name(path.as_path().file_name().unwrap_or_default().as_bytes())
            || path.as_bytes().split(|&b| b == b'/').any(is_leaving_name);
        self.stack = if is_left_out { Vec::new() } else { vec![Pending::Start(path)] };
        self
    }

    /// Calls `entering` with the absolute path of each directory before it is read, so that it can be watched first.
    pub fn entering(mut self, entering: impl FnMut(&Path) + Send + 'static) -> Self {
        self.entering = Box::new(entering);
        self
    }

    /// Calls `passing` with the path of each file that is left out because it has a
    /// [name for a moment](crate::staging_name), and of each directory of [files about to be removed](crate::leaving_name).
    pub fn passing(mut self, passing: impl FnMut(RelPath) + Send + 'static) -> Self {
        self.passing = Box::new(passing);
        self
    }

    /// The open directory `dir`, the root if there is none given.
    fn directory(&mut self, dir: Option<&RelPath>) -> io::Result<&OwnedFd> {
        if self.open.as_ref().is_none_or(|(open, _)| open.as_ref() != dir) {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let mut fd = rustix::fs::openat(CWD, &self.root, flags, Mode::empty())?;
            if let Some(dir) = dir {
                let below = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
                fd = rustix::fs::openat2(fd, dir.as_path(), flags | OFlags::NOFOLLOW, Mode::empty(), below)?;
            }
            self.open = Some((dir.cloned(), fd));
        }
        self.open.as_ref().map(|(_, fd)| fd).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Puts the entries of a directory on the stack.
    fn enter(&mut self, dir: Option<&RelPath>) -> io::Result<()> {
        let absolute = dir.map_or(self.root.clone(), |dir| self.root.join(dir.as_path()));
        (self.entering)(&absolute);
        let fd = self.directory(dir)?;
        let (mut entries, mut failed, mut passed) = (Vec::new(), Vec::new(), Vec::new());
        for entry in Dir::read_from(fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let is_dir = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW);
                    stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
                }
                known => known == FileType::Directory,
            };
            match dir.map_or_else(|| name.to_owned().try_into(), |dir| dir.join(name)) {
                Ok(path) if (is_staging_name(name) && !is_dir) || (is_leaving_name(name) && is_dir) => {
                    passed.push(path)
                }
                Ok(path) => entries.push((path, is_dir)),
                Err(_) => {
                    let path = absolute.join(OsStr::from_bytes(name));
                    failed.push(Pending::Failed(WalkError::Name { path }));
                }
            }
        }
        passed.into_iter().for_each(&mut self.passing);
        entries.retain(|(path, _)| !self.left_out.contains(&self.root.join(path.as_path())));
        // What is in a directory "a" stands behind a file "a-b", since '-' is less than '/'.
        let directories =
            entries.iter().filter(|(_, is_dir)| *is_dir).map(|(path, _)| Pending::Directory(path.clone()));
        let mut pending: Vec<_> = directories.collect();
        pending.extend(entries.into_iter().map(|(path, _)| Pending::Entry(path)));
        pending.sort_by_cached_key(|pending| match pending {
            Pending::Directory(path) => Reverse([path.as_bytes(), b"/"].concat()),
            Pending::Entry(path) | Pending::Start(path) => Reverse(path.as_bytes().to_owned()),
            Pending::Root | Pending::Failed(_) => Reverse(Vec::new()),
        });
        self.stack.extend(pending.into_iter().chain(failed));
        Ok(())
    }

    fn look(&mut self, path: &RelPath) -> io::Result<SeenKind> {
        let bytes = path.as_bytes();
        let slash = bytes.iter().rposition(|&b| b == b'/');
        let parent =
            slash.map(|slash| RelPath::try_from(bytes[..slash].to_owned())).transpose().map_err(io::Error::other)?;
        let name = &bytes[slash.map_or(0, |slash| slash + 1)..];
        let dir = self.directory(parent.as_ref())?;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, wanted)?;
        let fingerprint = fingerprint(&stat);
        let mode = stat.stx_mode & 0o777;
        Ok(match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::RegularFile if is_deleted_name(name) => SeenKind::Special,
            FileType::RegularFile => SeenKind::File { fingerprint, mode },
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes();
                SeenKind::Symlink { target, mtime: fingerprint.mtime }
            }
            FileType::Directory => SeenKind::Directory { mode, mtime: fingerprint.mtime },
            _ => SeenKind::Special,
        })
    }
}

/// What is at `path` below `root` now, `None` if nothing is. Follows no symbolic link below `root`.
pub fn look(root: &Path, path: &RelPath) -> io::Result<Option<SeenKind>> {
    let (root, left_out, stack) = (root.to_owned(), Vec::new(), Vec::new());
    let mut walk = Walk { root, left_out, stack, open: None, entering: Box::new(|_| {}), passing: Box::new(|_| {}) };
    match walk.look(path) {
        Ok(kind) => Ok(Some(kind)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn fingerprint(stat: &Statx) -> Fingerprint {
    // A file system cannot give more than 999,999,999 ns; a broken one must not make us panic.
    let time = |time: StatxTimestamp| UnixTime { seconds: time.tv_sec, nanos: time.tv_nsec.min(999_999_999) };
    let has_birth = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
    Fingerprint {
        device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
        birth: has_birth.then(|| time(stat.stx_btime)),
        size: stat.stx_size,
        mtime: time(stat.stx_mtime),
        ctime: time(stat.stx_ctime),
    }
}

impl Iterator for Walk {
    type Item = Result<Seen, WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (path, outcome) = match self.stack.pop()? {
                Pending::Failed(error) => return Some(Err(error)),
                Pending::Root => match self.enter(None) {
                    Ok(()) => continue,
                    Err(source) => return Some(Err(WalkError::Root { path: self.root.clone(), source })),
                },
                Pending::Directory(path) => {
                    let entered = self.enter(Some(&path));
                    (path, entered.map(|()| None))
                }
                Pending::Entry(path) => {
                    let kind = self.look(&path);
                    (path, kind.map(Some))
                }
                Pending::Start(path) => {
                    let kind = self.look(&path);
                    if matches!(kind, Ok(SeenKind::Directory { .. })) {
                        self.stack.push(Pending::Directory(path.clone()));
                    }
                    (path, kind.map(Some))
                }
            };
            match outcome {
                Ok(Some(kind)) => return Some(Ok(Seen { path, kind })),
                Ok(None) => {}
                Err(error) if is_gone(&error) => {}
                Err(source) => return Some(Err(WalkError::Unreadable { path, source })),
            }
        }
    }
}

/// Whether the entry is not there, or no longer: as if it had never been. A directory above that became a file or a link
/// took it along.
fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|errno| gone.contains(&errno))
}
