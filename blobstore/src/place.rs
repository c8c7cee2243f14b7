use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use tree::{BlobId, RangeSet};

/// A directory below which users' files are linked into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId(pub(crate) u32);

/// A user's file: a path, as bytes, below a root.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileRef {
    /// The root.
    pub root: RootId,
    /// The path below it, `/`-separated.
    pub path: Vec<u8>,
}

impl FileRef {
    /// The path below the root, as the system takes it.
    pub(crate) fn relative(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.path))
    }
}

/// How much of a blob is on this machine, sound so far as is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// All of it, as a user's file.
    InPlace,
    /// All of it, in the cache.
    Cached,
    /// These bytes.
    Partial(RangeSet),
    /// Nothing.
    None,
}

/// Where the store keeps its own files for a blob: 256 directories, by the id's first byte.
pub(crate) fn own_file(dir: &Path, blob: BlobId, extension: &str) -> PathBuf {
    let hex = blob.to_string();
    dir.join(&hex[..2]).join(format!("{hex}.{extension}"))
}
