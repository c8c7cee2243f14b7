use std::{
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::PermissionsExt,
    },
    path::PathBuf,
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
/// Follows no symbolic link. Needs memory for the entries of the directories between the root and where it is.
#[derive(Debug)]
pub struct Walk {
    root: PathBuf,
    left_out: Vec<PathBuf>,
    /// Entries still to come, the next one last; deeper directories' entries behind shallower ones'.
    stack: Vec<Pending>,
    started: bool,
}

/// A directory entry whose turn has not come.
#[derive(Debug)]
struct Pending {
    path: RelPath,
    is_dir: bool,
}

impl Walk {
    /// Walks through `root`, but not into `left_out`, which are absolute paths.
    pub fn new(root: impl Into<PathBuf>, left_out: Vec<PathBuf>) -> Self {
        Self { root: root.into(), left_out, stack: Vec::new(), started: false }
    }

    /// Puts the entries of a directory on the stack. Gives the first error of a single entry, if there was one.
    fn enter(&mut self, dir: Option<&RelPath>) -> io::Result<Option<WalkError>> {
        let absolute = dir.map_or(self.root.clone(), |dir| self.root.join(dir.as_path()));
        let mut entries = Vec::new();
        let mut skipped = None;
        for entry in fs::read_dir(&absolute)? {
            let entry = entry?;
            if self.left_out.contains(&entry.path()) {
                continue;
            }
            let name = entry.file_name();
            let path = dir.map_or_else(|| name.as_bytes().to_owned().try_into(), |dir| dir.join(name.as_bytes()));
            match path {
                Ok(path) => entries.push(Pending { path, is_dir: entry.file_type()?.is_dir() }),
                Err(_) => skipped = skipped.or(Some(WalkError::Name { path: entry.path() })),
            }
        }
        // What is in a directory "a" stands behind a file "a-b", since '-' is less than '/'.
        let rank = |entry: &Pending| [entry.path.as_bytes(), if entry.is_dir { b"/" } else { b"" }].concat();
        entries.sort_by_cached_key(|entry| std::cmp::Reverse(rank(entry)));
        self.stack.append(&mut entries);
        Ok(skipped)
    }

    fn look(&self, path: &RelPath) -> io::Result<SeenKind> {
        let absolute = self.root.join(path.as_path());
        let meta = fs::symlink_metadata(&absolute)?;
        let fingerprint = Fingerprint::from(&meta);
        Ok(if meta.is_file() {
            SeenKind::File { fingerprint, mode: (meta.permissions().mode() & 0o777) as u16 }
        } else if meta.is_symlink() {
            let target = fs::read_link(&absolute)?.into_os_string().into_vec();
            SeenKind::Symlink { target, mtime: fingerprint.mtime }
        } else {
            SeenKind::Special
        })
    }
}

impl Iterator for Walk {
    type Item = Result<Seen, WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.started {
            self.started = true;
            match self.enter(None) {
                Ok(Some(error)) => return Some(Err(error)),
                Ok(None) => {}
                Err(source) => return Some(Err(WalkError::Root { path: self.root.clone(), source })),
            }
        }
        while let Some(Pending { path, is_dir }) = self.stack.pop() {
            let outcome = if is_dir { self.enter(Some(&path)).map(Err) } else { self.look(&path).map(Ok) };
            match outcome {
                Ok(Ok(kind)) => return Some(Ok(Seen { path, kind })),
                Ok(Err(None)) => {}
                Ok(Err(Some(error))) => return Some(Err(error)),
                // Gone since it was listed: as if it had never been there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Some(Err(WalkError::Unreadable { path, source })),
            }
        }
        None
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
