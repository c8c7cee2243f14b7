use tree::{BlobId, Drift, Fingerprint, UnixTime};

use crate::{Content, SeenKind, Signs, Version};

/// What is to be done about a path of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing: the path is as it was published.
    Unchanged,
    /// Hash the file and publish it: a program wrote it.
    Hash,
    /// Hash the file. Publish it if it is still this blob; if not, it is *suspect*: rot and an edit are both possible.
    Recheck(BlobId),
    /// Publish this; there is nothing to hash.
    Publish(Content, UnixTime),
    /// Publish the file as this blob: a crash came between linking and publishing.
    PublishLinked(BlobId),
    /// Publish nothing: sockets, FIFOs and devices are not indexed. What was there before is gone.
    Skip,
}

/// What the file at a path was when its bytes were last read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastRead {
    /// Its bytes.
    pub blob: BlobId,
    /// Its metadata then.
    pub fingerprint: Fingerprint,
    /// What is known beyond that.
    pub state: ReadState,
}

/// How far what was read last may be relied upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadState {
    /// Any later write moves the ctime.
    Settled,
    /// It was hashed so soon after its last change, or while a program had it open, that a later write may have left no
    /// trace.
    Racy,
    /// Some of its bytes are known not to be the blob's.
    Damaged,
    /// The file with this fingerprint was read, has other bytes, and awaits the user's decision.
    Suspect(Fingerprint),
    /// The path vanished since; what is there now came back, or is new.
    Vanished {
        /// Whether some of its bytes were known not to be the blob's.
        damaged: bool,
    },
}

/// What is known of the time since a path was last read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Witness {
    /// What the watcher saw happen at the path, or at a directory above it.
    pub signs: Signs,
    /// Whether the daemon has run and watched since then, on the same mounted file system: nobody can have replaced the
    /// file by restoring or copying a disk meanwhile.
    pub continuous: bool,
    /// Whether a write moves a time that no program can set back: the file system has a ctime of its own.
    pub times_tell: bool,
}

/// Returns what is to be done about a path at which `seen` is now, of which `said` was published last, and whose bytes were
/// read `last`. The rules are the table in spec/namespace.md, "Rot or edit".
pub fn decide(said: Option<&Version>, last: Option<LastRead>, seen: &SeenKind, witness: Witness) -> Decision {
    match seen {
        SeenKind::File { fingerprint, .. } => decide_file(said, last, fingerprint, witness),
        SeenKind::Symlink { target, mtime } => said_or(said, Content::Symlink { target: target.clone() }, *mtime),
        SeenKind::Directory { mode, mtime } => said_or(said, Content::Directory { mode: *mode }, *mtime),
        SeenKind::Special => Decision::Skip,
    }
}

fn decide_file(said: Option<&Version>, last: Option<LastRead>, seen: &Fingerprint, witness: Witness) -> Decision {
    let said_file = said.and_then(|version| match version.content {
        Content::File { blob, size, .. } => Some((blob, size, version.mtime)),
        _ => None,
    });
    let Some(LastRead { blob, fingerprint, state }) = last else {
        // The store's row was lost: what was published is all there is to tell an edit by.
        return match said_file {
            Some((blob, size, mtime)) if (size, mtime) == (seen.size, seen.mtime) => Decision::Recheck(blob),
            _ => Decision::Hash,
        };
    };
    let unchanged = || match said_file {
        Some((said, _, mtime)) if said == blob && mtime == seen.mtime => Decision::Unchanged,
        Some((said, ..)) if said != blob => Decision::Hash,
        // A crash came between linking and publishing, of the file or of its new mtime.
        _ => Decision::PublishLinked(blob),
    };
    let drift = fingerprint.drift(seen);
    match state {
        _ if drift == Drift::Edited || witness.signs.wrote && drift != Drift::None => Decision::Hash,
        _ if witness.signs.may_have_written() && !witness.times_tell => Decision::Hash,
        ReadState::Suspect(read) if read.drift(seen) == Drift::None => unchanged(),
        ReadState::Settled if drift == Drift::None => unchanged(),
        ReadState::Damaged if drift == Drift::None => unchanged(),
        ReadState::Racy if drift == Drift::None => Decision::Hash,
        ReadState::Damaged | ReadState::Suspect(_) | ReadState::Vanished { damaged: true } => Decision::Recheck(blob),
        _ if witness.signs.moved_here || witness.signs.closed => Decision::Hash,
        _ if witness.continuous && drift == Drift::Replaced => Decision::Hash,
        _ => Decision::Recheck(blob),
    }
}

fn said_or(said: Option<&Version>, content: Content, mtime: UnixTime) -> Decision {
    match said {
        Some(said) if (&said.content, said.mtime) == (&content, mtime) => Decision::Unchanged,
        _ => Decision::Publish(content, mtime),
    }
}
