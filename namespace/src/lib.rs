//! Which file is which: what every peer has at every path, and what changed when.
//!
//! Each peer speaks for itself alone. What it has is its *catalog*: rows (arena, path) → [`Version`], numbered
//! by an ascending `seq` within an `epoch`, which is its *log*. A peer that has heard everything up to `seq` asks
//! for what came after; one that has heard nothing, or of another epoch, asks from the start; both are answered
//! in the same way, by [`Namespace::batch`], and taken in by [`Namespace::apply`].
//!
//! What this crate must never know: where bytes are, how they travel, what time it is. It names blobs by id and
//! reads no file's content; [`Walk`] looks at directories and their entries only.
//!
//! Invariants:
//!
//! - A change of this machine's catalog and its number in the log are one commit, durable before anyone hears it.
//! - Every (arena, path) of a peer is in that peer's log once, at the number of its last change.
//! - While a listing replaces what was known of a peer, the old rows stay in view until the new ones are complete.
//!
//! Rows, order and bounds: spec/namespace.md.

mod catalog;
mod list;
mod names;
mod namespace;
mod peer_id;
mod rows;
mod scan;
mod version;

pub use catalog::{ApplyError, Batch, Cursor, Statement};
pub use list::{Entry, EntryKind};
pub use names::{ArenaName, NameError, RelPath};
pub use namespace::{Arena, Change, Known, Namespace, NamespaceError};
pub use peer_id::{ParsePeerIdError, PeerId};
pub use scan::{Decision, Seen, SeenKind, Walk, WalkError, decide};
pub use version::{Content, Version, shown};
