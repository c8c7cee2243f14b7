use serde::{Deserialize, Serialize};
use tree::{BlobId, UnixTime};

/// What a peer has at a path, and where in that peer's log it was said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// What is there.
    pub content: Content,
    /// When it was last changed, as the peer's file system says: shown, but never used to order changes.
    pub mtime: UnixTime,
    /// The number of the change in the peer's log; the first is 1.
    pub seq: u64,
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// A regular file.
    File {
        /// Its bytes.
        blob: BlobId,
        /// How many they are.
        size: u64,
        /// Its permission bits, at most 0o777.
        mode: u16,
    },
    /// A symbolic link; it is never followed.
    Symlink {
        /// What it says, at most 4,096 bytes, of no further meaning here.
        target: Vec<u8>,
    },
    /// Nothing more: the file was deleted.
    Deleted,
    /// Nothing more: the peer gave up the arena, which says nothing of the file.
    Withdrawn,
}

impl Content {
    /// Whether something is there.
    pub fn is_present(&self) -> bool {
        matches!(self, Self::File { .. } | Self::Symlink { .. })
    }

    /// The blob that is there, if it is a file.
    pub fn blob(&self) -> Option<BlobId> {
        match self {
            Self::File { blob, .. } => Some(*blob),
            _ => None,
        }
    }

    /// Whether this is the same file or link as `other`, permissions left aside.
    pub(crate) fn is_same(&self, other: &Content) -> bool {
        match (self, other) {
            (Self::File { blob, .. }, Self::File { blob: other, .. }) => blob == other,
            _ => self == other,
        }
    }

    /// Whether a peer may say so: within the bounds above.
    pub(crate) fn is_valid(&self) -> bool {
        match self {
            Self::File { blob, size, mode } => *mode <= 0o777 && (*size == 0) == (*blob == BlobId::EMPTY),
            Self::Symlink { target } => !target.is_empty() && target.len() <= 4096 && !target.contains(&0),
            Self::Deleted | Self::Withdrawn => true,
        }
    }
}

/// Which of the versions that peers have at one path is shown: of those that are present, the one with the newest
/// mtime; among equals, the one with the greatest blob id, target, mode and size, so that all peers show the same.
pub fn shown<'a, T>(versions: &'a [(T, Version)]) -> Option<&'a (T, Version)> {
    let rank = |version: &'a Version| {
        let (size, mode) = match version.content {
            Content::File { size, mode, .. } => (size, mode),
            _ => (0, 0),
        };
        (version.mtime, version.content.blob(), target(&version.content), mode, size)
    };
    versions.iter().filter(|(_, version)| version.content.is_present()).max_by(|(_, a), (_, b)| rank(a).cmp(&rank(b)))
}

fn target(content: &Content) -> &[u8] {
    match content {
        Content::Symlink { target } => target,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_present_version_is_shown() {
        let file = |data: &[u8], seconds| Version {
            content: Content::File { blob: BlobId::of(data), size: 1, mode: 0o644 },
            mtime: UnixTime { seconds, nanos: 0 },
            seq: 1,
        };
        let deleted = |seconds| Version { content: Content::Deleted, ..file(b"", seconds) };
        let (a, b) = (file(b"a", 5), file(b"b", 5));
        let greater = if BlobId::of(b"a") > BlobId::of(b"b") { &a } else { &b };
        for (versions, expected) in [
            (vec![(1, file(b"a", 5)), (2, file(b"b", 6))], Some(&file(b"b", 6))),
            (vec![(1, file(b"a", 5)), (2, deleted(9))], Some(&a)),
            (vec![(1, a.clone()), (2, b.clone())], Some(greater)),
            (vec![(1, b.clone()), (2, a.clone())], Some(greater)),
            (vec![(1, file(b"a", -7)), (2, file(b"b", -8))], Some(&file(b"a", -7))),
            (vec![(1, deleted(1))], None),
        ] {
            assert_eq!(shown(&versions).map(|(_, version)| version), expected, "{versions:?}");
        }
    }
}
