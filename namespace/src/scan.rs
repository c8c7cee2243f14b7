use std::{
    cmp::Reverse,
    ffi::{CStr, OsStr},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::PathBuf,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};
use tree::{Drift, Fingerprint, UnixTime};

use crate::{Content, Known, RelPath};

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
    /// A socket, FIFO or device: not indexed.
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

/// Goes through an arena root, depth first, and yields everything in it but directories, ordered by path.
///
/// Follows no symbolic link, also where a directory becomes one meanwhile. Needs memory for the entries of the
/// directories between the root and where it is.
#[derive(Debug)]
pub struct Walk {
    root: PathBuf,
    left_out: Vec<PathBuf>,
    /// What is still to come, the next one last; deeper directories' entries behind shallower ones'.
    stack: Vec<Pending>,
    started: bool,
}

/// A directory entry whose turn has not come.
#[derive(Debug)]
enum Pending {
    Directory(RelPath),
    Entry(Seen),
    Failed(WalkError),
}

impl Walk {
    /// Walks through `root`, but not into `left_out`, which are absolute paths without symbolic links.
    pub fn new(root: impl Into<PathBuf>, left_out: Vec<PathBuf>) -> Self {
        Self { root: root.into(), left_out, stack: Vec::new(), started: false }
    }

    /// Puts the entries of a directory on the stack.
    fn enter(&mut self, dir: Option<&RelPath>) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &self.root, flags, Mode::empty())?;
        let below = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let (absolute, fd) = match dir {
            Some(dir) => {
                let fd = rustix::fs::openat2(root, dir.as_path(), flags | OFlags::NOFOLLOW, Mode::empty(), below)?;
                (self.root.join(dir.as_path()), fd)
            }
            None => (self.root.clone(), root),
        };
        let mut entries = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let absolute = absolute.join(OsStr::from_bytes(name));
            if matches!(name, b"." | b"..") || self.left_out.contains(&absolute) {
                continue;
            }
            let path = dir.map_or_else(|| name.to_owned().try_into(), |dir| dir.join(name));
            match path {
                // Gone since it was listed: as if it had never been there.
                Ok(path) => entries.extend(look(&fd, entry.file_name(), path)),
                Err(_) => self.stack.push(Pending::Failed(WalkError::Name { path: absolute })),
            }
        }
        // What is in a directory "a" stands behind a file "a-b", since '-' is less than '/'.
        entries.sort_by_cached_key(|(rank, _)| Reverse(rank.clone()));
        self.stack.extend(entries.into_iter().map(|(_, pending)| pending));
        Ok(())
    }
}

/// What an entry of the open directory `dir` is, with its place in the order; `None` if it is gone.
fn look(dir: &OwnedFd, name: &CStr, path: RelPath) -> Option<(Vec<u8>, Pending)> {
    let kind = || -> Result<Option<SeenKind>, Errno> {
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let fingerprint = fingerprint(&stat);
        Ok(Some(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return Ok(None),
            FileType::RegularFile => SeenKind::File { fingerprint, mode: (stat.st_mode & 0o777) as u16 },
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes();
                SeenKind::Symlink { target, mtime: fingerprint.mtime }
            }
            _ => SeenKind::Special,
        }))
    };
    let rank = path.as_bytes().to_owned();
    match kind() {
        Ok(Some(kind)) => Some((rank, Pending::Entry(Seen { path, kind }))),
        Ok(None) => Some(([&rank[..], b"/"].concat(), Pending::Directory(path))),
        Err(Errno::NOENT) => None,
        Err(error) => Some((rank, Pending::Failed(WalkError::Unreadable { path, source: error.into() }))),
    }
}

fn fingerprint(stat: &Stat) -> Fingerprint {
    // A file system cannot give more than 999,999,999 ns; a broken one must not make us panic.
    let time = |seconds, nanos: u64| UnixTime { seconds, nanos: nanos.min(999_999_999) as u32 };
    Fingerprint {
        device: stat.st_dev,
        inode: stat.st_ino,
        size: stat.st_size.unsigned_abs(),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
    }
}

impl Iterator for Walk {
    type Item = Result<Seen, WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.started {
            self.started = true;
            if let Err(source) = self.enter(None) {
                return Some(Err(WalkError::Root { path: self.root.clone(), source }));
            }
        }
        loop {
            match self.stack.pop()? {
                Pending::Entry(seen) => return Some(Ok(seen)),
                Pending::Failed(error) => return Some(Err(error)),
                Pending::Directory(path) => match self.enter(Some(&path)) {
                    Ok(()) => {}
                    // Gone, or something else by now: the next scan will see what.
                    Err(error) if is_gone(&error) => {}
                    Err(source) => return Some(Err(WalkError::Unreadable { path, source })),
                },
            }
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP];
    gone.iter().any(|gone| error.raw_os_error() == Some(gone.raw_os_error()))
}

/// What is to be done about a path of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing: it is as it was said to be.
    Unchanged,
    /// Hash the file and say what it is.
    Hash,
    /// Hash the file: nobody edited it, so if its bytes are not what they were, that is suspected damage, to be
    /// reported and never published.
    Recheck,
    /// Say this; there is nothing to hash.
    Publish(Content, UnixTime),
    /// Say nothing: it is not a thing that is indexed. If something was there before, that is gone.
    Skip,
}

/// What is to be done about a path at which `seen` is now, and of which `known` was said last.
pub fn decide(known: Option<&Known>, seen: &SeenKind) -> Decision {
    let known_fingerprint = known.and_then(|known| known.fingerprint);
    match seen {
        SeenKind::File { fingerprint, .. } => match known_fingerprint.map(|known| known.drift(fingerprint)) {
            Some(Drift::None) => Decision::Unchanged,
            Some(Drift::Touched) => Decision::Recheck,
            Some(Drift::Edited) | None => Decision::Hash,
        },
        SeenKind::Symlink { target, mtime } => {
            let content = Content::Symlink { target: target.clone() };
            match known {
                Some(known) if known.version.content == content && known.version.mtime == *mtime => Decision::Unchanged,
                _ => Decision::Publish(content, *mtime),
            }
        }
        SeenKind::Special => Decision::Skip,
    }
}
