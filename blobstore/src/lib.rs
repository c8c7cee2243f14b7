//! The bytes on this machine: where they are, whether they are sound, how they are mended.
//!
//! A blob's bytes are *in place*, as a user's file below some root directory, or *cached*, whole or in part, in
//! a sparse file of the store's own. The store knows blobs and files; which arena and path a blob stands for at
//! which peer is no concern of it.
//!
//! Invariants, which hold at every moment and after a power cut at any moment:
//!
//! - Every byte that [`Store::read`] returns or [`Source::prover`] yields was hashed and compared on the way.
//! - A row that claims bytes is committed only after these bytes, and the outboard that proves them, are synced.
//! - What was found damaged is in the row of its file or gone from the row of the cache, and served to nobody.
//! - Bytes from elsewhere come in only as [`tree::Verified`] pieces, through a [`Sink`].
//! - Below the roots nothing is made, renamed or deleted; [`Mending`] alone writes there, and only what proves.
//!
//! The store blocks: async callers run it on threads for that. Bytes on disk, write order and crash analysis:
//! spec/store.md.

mod cache;
mod candidate;
mod dirs;
mod disk;
mod error;
mod fetch;
mod find;
mod link;
mod lists;
mod mend;
mod outboard;
mod pages;
mod place;
mod rebuild;
mod rows;
mod saved;
pub mod scrub;
mod source;
mod store;
mod suspect;
mod vanished;
mod verify;

pub use cache::{CacheDirs, CacheUsage, Lease, Partial, Passage, SmallBlob};
pub use candidate::{Candidate, in_the_same_place};
pub use disk::{Access, Disk, DiskFile, RealDisk, fs_type, is_open_for_writing};
pub use error::{StoreError, is_full};
pub use fetch::{Collected, Fetch, FetchError, Fetched, SharedSink, Sink, Want};
pub use link::{Move, NewFile};
pub use mend::{Consent, Mending};
pub use outboard::HashedFile;
pub use pages::Files;
pub use place::{FileRef, Presence, RootId};
pub use rebuild::{Rebuilt, strange_format};
pub use rows::{FileRow, FileState, count_rows};
pub use saved::Repair;
pub use scrub::{Item, Task, Verified};
pub use source::{Proving, ReadOutcome, Source};
pub use store::{Settings, Store};
pub use verify::Verdict;
