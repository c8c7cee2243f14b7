//! What long commands report while they run: JSON Lines, one object a line. Format: spec/cli.md, "Events".

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use peers::Counts;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tree::{BlobId, RangeSet};

use crate::{
    failure::{Code, Failure},
    target::JsonPath,
};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// How far it has come. Shown as a bar, and left out of `--json` output.
    Progress {
        /// What is being done.
        action: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all, if that is known.
        total: Option<u64>,
        /// Files done.
        files: u64,
    },
    /// A line of a listing.
    Entry(Entry),
    /// A damaged file.
    Damage {
        /// Which.
        #[serde(flatten)]
        file: FileName,
        /// Its blob.
        blob: BlobId,
        /// `data`, `outboard` or `missing`.
        what: String,
        /// The damaged bytes: half-open, whole chunk groups.
        ranges: RangeSet,
    },
    /// A file with other bytes than its last good version, of which nobody knows whether it rotted or was edited.
    Suspect {
        /// Which.
        #[serde(flatten)]
        file: FileName,
        /// Its last good version.
        blob: BlobId,
        /// The bytes of that which the file lacks: half-open, whole chunk groups.
        ranges: RangeSet,
        /// How the bytes differ, if good ones could be had.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        difference: Option<String>,
    },
    /// A suspect or damaged file that was published as it is.
    Accepted {
        /// Which.
        #[serde(flatten)]
        file: FileName,
        /// Its blob now.
        blob: BlobId,
    },
    /// A file into which the bytes were put back that a repair had replaced.
    Undone {
        /// Which.
        #[serde(flatten)]
        file: FileName,
        /// The bytes that were put back.
        ranges: RangeSet,
    },
    /// A file that is kept after its owner has deleted it.
    Deleted(DeletedFile),
    /// An arena of which nothing can be read: its disk is off, or its directory is another one.
    Offline {
        /// Which.
        arena: String,
        /// Why.
        reason: String,
    },
    /// A file that was changed since it was indexed; nothing is said of its bytes.
    Modified {
        /// Which.
        #[serde(flatten)]
        file: FileName,
    },
    /// A damaged file that is sound again.
    Repaired {
        /// Which.
        #[serde(flatten)]
        file: FileName,
        /// Its blob.
        blob: BlobId,
        /// The bytes that were written.
        ranges: RangeSet,
        /// The peers that sent them; none if they were found here.
        peers: Vec<String>,
        /// Bytes received for it: data, proofs and sizes.
        bytes_received: u64,
    },
    /// A damaged file that is not sound again.
    Unrepaired {
        /// Which.
        #[serde(flatten)]
        file: FileName,
        /// Its blob.
        blob: BlobId,
        /// The bytes that are still damaged.
        ranges: RangeSet,
        /// The peers that sent some of it.
        peers: Vec<String>,
        /// Bytes received for it.
        bytes_received: u64,
        /// Why.
        reason: String,
    },
    /// A file, directory or link that was brought to its destination.
    Copied(Copied),
    /// One that was brought to its destination, and is no longer at its source.
    Moved(Copied),
    /// One that was there already.
    Skipped(Copied),
    /// One that could not be brought, or not be removed where it came from.
    Failed {
        /// From where.
        #[serde(flatten)]
        file: FileName,
        /// Why.
        reason: String,
        /// Of `cp` and `mv`: what was to go where.
        #[serde(flatten)]
        copy: Option<Copied>,
    },
    /// A machine that is needed went away, and is waited for.
    Waiting {
        /// The machines that are waited for.
        #[serde(default)]
        peers: Vec<String>,
        /// What failed.
        reason: String,
        /// For how many seconds it is waited at most.
        for_s: u64,
    },
    /// A file of which something is missing here.
    Missing {
        /// Which.
        #[serde(flatten)]
        file: FileName,
        /// Its blob.
        blob: BlobId,
        /// How many bytes of it are missing.
        bytes: u64,
    },
    /// How things stand with something that is pinned.
    Pin(Pin),
    /// Something in an arena that is not indexed.
    Unindexed {
        /// Which.
        #[serde(flatten)]
        file: FileName,
        /// Why.
        reason: String,
    },
    /// A path at which peers have different things, of which none comes from the other.
    Conflict {
        /// Where.
        #[serde(flatten)]
        file: FileName,
        /// What each has, the one that is shown first.
        versions: Vec<Version>,
    },
    /// A change of a catalog.
    Change {
        /// When its peer noticed: RFC 3339, UTC.
        time: String,
        /// `new`, `changed`, `deleted` or `withdrawn`.
        change: String,
        /// Where.
        #[serde(flatten)]
        file: FileName,
        /// What has been there since, and at which peer.
        #[serde(flatten)]
        version: Version,
    },
    /// The end, with totals that depend on the command.
    Summary(Map<String, Value>),
    /// The end, before its time.
    Error(Failure),
    /// Behind the end: how the command is to exit. Left out of `--json` output.
    Exit {
        /// The exit code.
        code: Code,
    },
}

/// A file by name. Without an arena it is a blob in the cache.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileName {
    /// The arena.
    pub arena: Option<String>,
    /// The path in it.
    pub path: Option<String>,
    /// The path's bytes in base 64, if it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_bytes: Option<String>,
}

/// A line of a listing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The arena.
    pub arena: String,
    /// The path in it; empty for the arena itself.
    #[serde(flatten)]
    pub path: JsonPath,
    /// `file`, `dir`, `symlink` or `arena`.
    pub kind: String,
    /// In bytes, for a file.
    pub size: Option<u64>,
    /// RFC 3339 with nanoseconds, UTC; of a directory not known.
    pub mtime: Option<String>,
    /// Of a file.
    pub blob: Option<BlobId>,
    /// Of a link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<JsonPath>,
    /// The names of the peers that have just this, this machine's own among them.
    pub peers: Vec<String>,
    /// `in_place`, `cached`, `partial` or `none`, for a file.
    pub local: Option<String>,
    /// How many of a file's bytes are here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_here: Option<u64>,
    /// Whether it is to be kept here: it, or a directory that it is in, is pinned.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// Whether a peer has something else there, and neither comes from the other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub conflict: bool,
}

/// What is pinned, and how much of it is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// A file, a directory, or with an empty path an arena.
    #[serde(flatten)]
    pub place: FileName,
    /// The files that are shown there.
    pub files: u64,
    /// Their bytes, and how many of these are here.
    pub bytes: u64,
    /// So many are here.
    pub bytes_here: u64,
    /// Files of which not all is here.
    pub missing_files: u64,
    /// What is missing of them.
    pub missing_bytes: u64,
    /// The same, told apart by why.
    pub missing: Vec<Reason>,
    /// What is kept of files that their owners have deleted there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// Deletions of most of the arena that were not accepted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mass_deletions: Vec<DeletedMany>,
}

/// What is kept of files that were deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Files.
    pub files: u64,
    /// Their bytes that are here.
    pub bytes: u64,
    /// When the first of them is kept no longer, in RFC 3339.
    pub until: String,
}

/// A deletion of most of what was pinned of an arena.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedMany {
    /// The arena.
    pub arena: String,
    /// Who deleted its files.
    pub peer: String,
    /// Files that were deleted.
    pub files: u64,
    /// Files that there were before.
    pub of: u64,
    /// When it was noticed here, in RFC 3339.
    pub since: String,
    /// Until when their bytes are kept, in RFC 3339.
    pub until: String,
}

/// A file that is kept after its owner has deleted it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedFile {
    /// Where it was.
    #[serde(flatten)]
    pub file: FileName,
    /// Its bytes.
    pub blob: BlobId,
    /// How many they are.
    pub size: u64,
    /// How many of them are here.
    pub bytes_here: u64,
    /// The machine that deleted it.
    pub peer: String,
    /// When that was noticed here, in RFC 3339.
    pub since: String,
    /// Until when it is kept, in RFC 3339.
    pub until: String,
}

/// Why something is not here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// In words.
    pub reason: String,
    /// So many files.
    pub files: u64,
    /// What is missing of them, in bytes.
    pub bytes: u64,
}

/// What a peer has at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The peer's name.
    pub peer: String,
    /// `file`, `symlink`, `dir`, `deleted` or `withdrawn`.
    pub state: String,
    /// Of a file.
    pub blob: Option<BlobId>,
    /// Of a file, in bytes.
    pub size: Option<u64>,
    /// RFC 3339 with nanoseconds, UTC.
    pub mtime: String,
    /// The number of the change in the peer's log.
    pub seq: u64,
    /// What it was made from, if that is known: blob ids, or links' hashes, latest first.
    pub previous: Vec<BlobId>,
}

/// What was brought where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// `ARENA/PATH`, behind the machine's name and `:` if it is another one.
    pub source: String,
    /// The same; for `get`, the absolute path.
    pub destination: String,
    /// Of a file.
    pub blob: Option<BlobId>,
    /// In bytes.
    pub bytes: u64,
    /// Bytes that the destination received for it: data, proofs and sizes.
    pub bytes_received: u64,
    /// Of `cp` and `mv`: the same, as the source sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_sent: Option<u64>,
    /// What of it was not kept: `extended attributes`, `permissions`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_kept: Vec<String>,
}

impl FileName {
    /// A path in an arena.
    pub fn new(arena: &namespace::ArenaName, path: &[u8]) -> Self {
        let JsonPath { path, path_bytes } = path.into();
        Self { arena: Some(arena.to_string()), path: Some(path), path_bytes }
    }
}

impl std::fmt::Display for FileName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.arena, &self.path) {
            (Some(arena), Some(path)) => {
                let path = JsonPath { path: path.clone(), path_bytes: self.path_bytes.clone() };
                write!(f, "{arena}/{}", crate::output::printable(&path.bytes().unwrap_or_default()))
            }
            _ => write!(f, "(in the cache)"),
        }
    }
}

/// Where a command reports to. Reporting waits while the reader is slow.
#[derive(Clone)]
pub struct Reporter {
    events: mpsc::Sender<Event>,
    since: Instant,
    /// When progress was last reported: milliseconds since `since`, and one more.
    progressed: Arc<AtomicU64>,
    /// What is received for the work that reports.
    counts: Arc<Counts>,
}

/// The reader of a report is gone: whoever asked for the work has been interrupted.
#[derive(Debug)]
pub struct NobodyListens;

impl Reporter {
    /// A reporter, and what reads from it.
    pub fn new() -> (Self, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(EVENTS_AHEAD);
        (Self { events, since: Instant::now(), progressed: Arc::default(), counts: Arc::default() }, receiver)
    }

    /// Reports from async code.
    pub async fn send(&self, event: Event) -> Result<(), NobodyListens> {
        self.events.send(event).await.map_err(|_| NobodyListens)
    }

    /// Reports from a thread that may block.
    pub fn send_blocking(&self, event: Event) -> Result<(), NobodyListens> {
        self.events.blocking_send(event).map_err(|_| NobodyListens)
    }

    /// Reports progress, unless that was done a moment ago, or the reader has not yet read what was reported before.
    pub fn progress(&self, action: &str, done: u64, total: Option<u64>, files: u64) {
        let (now, last) = (self.since.elapsed().as_millis() as u64 + 1, self.progressed.load(Ordering::Relaxed));
        if last > 0 && now < last + PROGRESS_MS {
            return;
        }
        self.progressed.store(now, Ordering::Relaxed);
        if self.events.capacity() > EVENTS_AHEAD / 2 {
            let _ = self.events.try_send(Event::Progress { action: action.to_owned(), done, total, files });
        }
    }

    /// Does the work that reports here, and counts what is received for it.
    pub async fn counted<W: Future>(&self, work: W) -> W::Output {
        peers::counted(self.counts.clone(), work).await
    }

    /// The counts of what has been received for the work.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Waits until nobody reads any more.
    pub async fn closed(&self) {
        self.events.closed().await;
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.events.is_closed()
    }
}

impl From<NobodyListens> for Failure {
    fn from(_: NobodyListens) -> Self {
        Failure::new(Code::Interrupted, "interrupted")
    }
}

/// A summary of `fields`, an object.
pub(crate) fn summary(fields: Value) -> Event {
    match fields {
        Value::Object(fields) => Event::Summary(fields),
        other => Event::Summary(Map::from_iter([("value".to_owned(), other)])),
    }
}

/// Progress is for people, who see no more than this.
const PROGRESS_MS: u64 = 50;
const EVENTS_AHEAD: usize = 256;
