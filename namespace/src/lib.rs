//! Which file is which: what every peer has at every path, and what changed when.
//!
//! Each peer speaks for what it itself has: its *catalog*, rows (arena, path) → [`Version`], whose changes it numbers by
//! an ascending `seq` within an `epoch`: its *log*. It passes on what it has heard of others, as theirs. Whoever listens
//! shows how far it has heard whom, [`Told`]; what it has not heard comes in batches from [`Namespace::tell`], as
//! changes if the log reaches back and else as a listing, and is taken in by [`Namespace::apply`].
//!
//! What this crate must never know: where bytes are, how they travel, what time it is. It names blobs by id and
//! reads no file's content; [`Walk`] looks at directories and their entries only, and a [`Watch`] tells when to.
//!
//! Invariants:
//!
//! - A change of this machine's catalog and its number in the log are one commit, durable before anyone hears it.
//! - The rows of an origin change only from one of its marks to a later one, whoever tells.
//! - While a listing replaces what was known of an origin, each old row stays in view until the new ones around it are
//!   there.
//!
//! Rows, order and bounds: spec/namespace.md.

mod anchors;
mod catalog;
mod decide;
mod departed;
mod list;
mod names;
mod namespace;
mod peer_id;
mod pins;
mod recent;
mod rows;
mod scan;
mod tables;
mod tell;
mod version;
mod watch;

pub use anchors::{Anchor, Anchors};
pub use catalog::{Applied, ApplyError, Batch, Cursor, Key, Mark, Part, Statement};
pub use decide::{Decision, LastRead, ReadState, Witness, decide};
pub use departed::{AT_ONCE_MS, Departed, MassDeletion};
pub use list::{Entry, EntryKind};
pub use names::{
    ArenaName, NameError, RelPath, is_deleted_name, is_leaving_name, is_staging_name, leaving_name, staging_name,
};
pub use namespace::{Arena, Change, Happened, Known, Namespace, NamespaceError, Origin};
pub use peer_id::{ParsePeerIdError, PeerId};
pub use pins::{FileBelow, Pins, Place};
pub use rows::count_rows;
pub use scan::{Seen, SeenKind, Walk, WalkError, look};
pub use tell::Told;
pub use version::{Content, PREVIOUS_MAX, Shown, Version, shown};
pub use watch::{Heard, Inotify, News, Pending, SharedSigns, Signs, SignsSeen, Teller, Watch, WatchError, news};
