//! Hearing of changes in directories while they happen, and waiting until they rest.
//!
//! News are hints: of what really is there, only a look tells. They may come twice, for nothing, or for a path that
//! something else is at by now; but whatever changes in a watched directory after [`Watch::watch`] returned is told, as
//! what it is, as a directory above it, or as [`Heard::Lost`].
//!
//! So whoever wants to know all: watches a directory and then reads it; when told of a path, watches and reads whatever
//! directory is there now, and all below it, again.
//!
//! Rules, bounds, failures: spec/namespace.md, "Watching".

mod dirs;
mod inotify;
mod news;
mod pending;
mod signs;

use std::{
    io,
    path::{Path, PathBuf},
};

pub use inotify::Inotify;
pub use news::{Heard, News, Teller, news};
pub use pending::Pending;
pub use signs::{SharedSigns, Signs, SignsSeen};

/// What can watch directories; it tells of them through its [`News`].
pub trait Watch: Send {
    /// Watches the directory `dir`, an absolute path, but not what is below its subdirectories.
    ///
    /// Its last component is not followed if it is a symbolic link. To be called again whenever `dir` may have become
    /// another directory; if it is the same, that is cheap and changes nothing. A directory is watched under the path
    /// by which it was watched last, until it, or one above it that is watched, is moved or deleted: this is told,
    /// and whoever still wants to hear of it watches it where it is now.
    fn watch(&mut self, dir: &Path) -> Result<(), WatchError>;

    /// What was seen of the watched directories and not yet taken, all that has happened by now included.
    fn signs(&mut self) -> SharedSigns;
}

/// Why a directory is not watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The system lets us have no more watches. Those that there are stay.
    #[error("watch {dir:?}: no more watches are allowed (fs.inotify.max_user_watches)")]
    Full {
        /// The directory.
        dir: PathBuf,
    },
    /// There is no such directory (any more).
    #[error("watch {dir:?}: no such directory")]
    Gone {
        /// The directory.
        dir: PathBuf,
    },
    /// Anything else.
    #[error("watch {dir:?}")]
    Io {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}
