use std::{
    cmp::Reverse,
    ffi::OsStr,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::PathBuf,
};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
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
    /// The directory that was looked into last; the root has no path.
    open: Option<(Option<RelPath>, OwnedFd)>,
    started: bool,
}

/// A directory entry whose turn has not come.
#[derive(Debug)]
enum Pending {
    Directory(RelPath),
    Entry(RelPath),
    Failed(WalkError),
}

impl Walk {
    /// Walks through `root`, but not into `left_out`, which are absolute paths.
    pub fn new(root: impl Into<PathBuf>, left_out: Vec<PathBuf>) -> Self {
        let real = |path: PathBuf| path.canonicalize().unwrap_or(path);
        let left_out = left_out.into_iter().map(real).collect();
        Self { root: real(root.into()), left_out, stack: Vec::new(), open: None, started: false }
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
        let fd = self.directory(dir)?;
        let (mut entries, mut failed) = (Vec::new(), Vec::new());
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
                Ok(path) => entries.push((path, is_dir)),
                Err(_) => {
                    let path = absolute.join(OsStr::from_bytes(name));
                    failed.push(Pending::Failed(WalkError::Name { path }));
                }
            }
        }
        entries.retain(|(path, _)| !self.left_out.contains(&self.root.join(path.as_path())));
        // What is in a directory "a" stands behind a file "a-b", since '-' is less than '/'.
        let rank = |(path, is_dir): &(RelPath, bool)| [path.as_bytes(), if *is_dir { b"/" } else { b"" }].concat();
        entries.sort_by_cached_key(|entry| Reverse(rank(entry)));
        let pending = |(path, is_dir)| if is_dir { Pending::Directory(path) } else { Pending::Entry(path) };
        self.stack.extend(entries.into_iter().map(pending).chain(failed));
        Ok(())
    }

    fn look(&mut self, path: &RelPath) -> io::Result<SeenKind> {
        let bytes = path.as_bytes();
        let slash = bytes.iter().rposition(|&b| b == b'/');
        let parent =
            slash.map(|slash| RelPath::try_from(bytes[..slash].to_owned())).transpose().map_err(io::Error::other)?;
        let name = &bytes[slash.map_or(0, |slash| slash + 1)..];
        let dir = self.directory(parent.as_ref())?;
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let fingerprint = fingerprint(&stat);
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => SeenKind::File { fingerprint, mode: (stat.st_mode & 0o777) as u16 },
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes();
                SeenKind::Symlink { target, mtime: fingerprint.mtime }
            }
            FileType::Directory => return Err(io::Error::other("it became a directory meanwhile")),
            _ => SeenKind::Special,
        })
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
            let (path, outcome) = match self.stack.pop()? {
                Pending::Failed(error) => return Some(Err(error)),
                Pending::Directory(path) => {
                    let entered = self.enter(Some(&path));
                    (path, entered.map(|()| None))
                }
                Pending::Entry(path) => {
                    let kind = self.look(&path);
                    (path, kind.map(Some))
                }
            };
            match outcome {
                Ok(Some(kind)) => return Some(Ok(Seen { path, kind })),
                Ok(None) => {}
                // Gone since it was listed: as if it had never been there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Some(Err(WalkError::Unreadable { path, source })),
            }
        }
    }
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
