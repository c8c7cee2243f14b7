use std::{io, path::PathBuf};

use tree::BlobId;

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database failed.
    #[error("{action} in the store's database")]
    Database {
        /// What was being done.
        action: &'static str,
        /// What redb said.
        #[source]
        source: Box<redb::Error>,
    },
    /// Another version of this program made the database.
    #[error("the store has format {found}, and this program knows {known}")]
    Format {
        /// The format that it has.
        found: u32,
        /// The one that is known here.
        known: u32,
    },
    /// A file, the store's or a user's, failed.
    #[error("{action} {path:?}")]
    File {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A user's file is no longer the one that was indexed; it is left alone.
    #[error("{path:?} was changed since it was indexed")]
    Modified {
        /// The file.
        path: PathBuf,
    },
    /// A file is suspect: rot and an edit are both possible, and the user has not decided.
    #[error("{path:?} is suspect: a program may have changed it; accept it, or repair it as suspect")]
    Suspect {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else is mending the file, by this name or another.
    #[error("{path:?} is being repaired already")]
    Mending {
        /// The file.
        path: PathBuf,
    },
    /// A suspect file is longer than the blob that it would be repaired to.
    #[error("{path:?} has {size} bytes, and the blob {blob_size}: a repair would cut it")]
    Longer {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The blob's size in bytes.
        blob_size: u64,
    },
    /// What a repair would replace is more than the store may save.
    #[error("a repair would replace {bytes} bytes of {path:?}, and no more than {limit} may be saved for undoing it")]
    TooMuchToSave {
        /// The file.
        path: PathBuf,
        /// Bytes that the repair would replace.
        bytes: u64,
        /// Bytes that all repairs together may save.
        limit: u64,
    },
    /// A piece of another blob, or beyond the blob's end, came where one of this blob was expected.
    #[error("a piece that does not belong to blob {blob}")]
    ForeignPiece {
        /// The blob that was expected.
        blob: BlobId,
    },
    /// There is no room for more in the cache, and nothing more can be evicted.
    #[error("the cache is full: its disk has {free} bytes free, of which it leaves {keep_free}")]
    CacheFull {
        /// Bytes free on the cache's file system.
        free: u64,
        /// Bytes that the cache leaves free there.
        keep_free: u64,
    },
    /// The disk of the database has no room for more rows.
    #[error("the disk of the home is full: it has {free} bytes free, of which {keep_free} are kept free")]
    HomeFull {
        /// Bytes free there.
        free: u64,
        /// Bytes that are kept free.
        keep_free: u64,
    },
    /// The bytes of an outboard made anew name another blob.
    #[error("the bytes of {path:?} are no longer blob {blob}")]
    NotTheBlob {
        /// The file.
        path: PathBuf,
        /// What it was indexed as.
        blob: BlobId,
    },
}

impl StoreError {
    /// Whether more free space would avoid the error.
    pub fn is_full(&self) -> bool {
        match self {
            Self::CacheFull { .. } | Self::HomeFull { .. } => true,
            Self::File { source, .. } => is_full(source),
            _ => false,
        }
    }

    /// Wraps an I/O error with what was being done to which path.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { action, path: path.into(), source }
    }
}

/// Whether a write failed because the disk or the user's quota is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
