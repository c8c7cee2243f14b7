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
    /// The ids ([`Content::id`]) of what this was made from, latest first; at most [`PREVIOUS_MAX`].
    pub previous: Vec<BlobId>,
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
    /// Nothing more: it was deleted.
    Deleted,
    /// Nothing more: the peer gave up the arena, which says nothing of the file.
    Withdrawn,
    /// A directory, empty or not.
    Directory {
        /// Its permission bits, at most 0o777.
        mode: u16,
    },
}

/// What a path shows: see [`shown`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown<'a, T> {
    /// The version that is shown, and whose it is.
    pub version: &'a (T, Version),
    /// Whether another one, of other content, was not made from it nor it from that one.
    pub in_conflict: bool,
}

impl Content {
    /// Whether something is there.
    pub fn is_present(&self) -> bool {
        !matches!(self, Self::Deleted | Self::Withdrawn)
    }

    /// The blob that is there, if it is a file.
    pub fn blob(&self) -> Option<BlobId> {
        match self {
            Self::File { blob, .. } => Some(*blob),
            _ => None,
        }
    }

    /// What names this content among the versions of a path: a file's blob, a link's hash. Directories, and what is
    /// not there, have none.
    pub fn id(&self) -> Option<BlobId> {
        match self {
            Self::File { blob, .. } => Some(*blob),
            Self::Symlink { target } => Some(BlobId::of(&[&b"symlink\0"[..], target].concat())),
            _ => None,
        }
    }

    /// Whether this is the same file or link as `other`, or a directory too, permissions left aside.
    pub fn is_same(&self, other: &Content) -> bool {
        match (self, other) {
            (Self::File { blob, .. }, Self::File { blob: other, .. }) => blob == other,
            (Self::Directory { .. }, Self::Directory { .. }) => true,
            _ => self == other,
        }
    }

    /// Whether a peer may say so: spec/namespace.md, "Versions".
    pub fn is_valid(&self) -> bool {
        match self {
            Self::File { blob, size, mode } => *mode <= 0o777 && (*size == 0) == (*blob == BlobId::EMPTY),
            Self::Symlink { target } => !target.is_empty() && target.len() <= 4096 && !target.contains(&0),
            Self::Directory { mode } => *mode <= 0o777,
            Self::Deleted | Self::Withdrawn => true,
        }
    }

    fn is_directory(&self) -> bool {
        matches!(self, Self::Directory { .. })
    }
}

impl Version {
    /// Whether a peer may say so: spec/namespace.md, "Versions".
    pub(crate) fn is_valid(&self) -> bool {
        self.content.is_valid() && self.mtime.nanos < 1_000_000_000 && self.previous.len() <= PREVIOUS_MAX
    }
}

/// What a new `content` at a path of this machine was made from, latest first: spec/namespace.md, "Made from".
///
/// `old` is what this machine had there, and `others` what the other peers have there.
pub(crate) fn made_from(content: &Content, old: Option<&Version>, others: &[Version]) -> Vec<BlobId> {
    let (new_id, old_id) = (content.id(), old.and_then(|old| old.content.id()));
    if let Some(old) = old.filter(|_| new_id.is_some() && new_id == old_id) {
        return old.previous.clone();
    }
    let kin = others.iter().filter(|other| {
        let id = other.content.id();
        id.is_some() && (id == old_id || id == new_id)
    });
    let mut previous: Vec<BlobId> = Vec::new();
    for id in old_id.into_iter().chain(old.into_iter().chain(kin).flat_map(|version| version.previous.iter().copied()))
    {
        if Some(id) != new_id && !previous.contains(&id) {
            previous.push(id);
        }
    }
    while previous.len() > PREVIOUS_MAX {
        let is_held = |id: &BlobId| others.iter().any(|other| other.content.id() == Some(*id));
        // The latest is kept in any case: it is what this was made from.
        let unheld = previous.iter().skip(1).rposition(|id| !is_held(id)).map(|at| at + 1);
        previous.remove(unheld.unwrap_or(previous.len() - 1));
    }
    previous
}

/// Which of the versions that peers have at one path is shown, the same at every peer: `None` if none is present.
///
/// What was made from another supersedes it, whatever the clocks say. Of what is left, a directory comes first; then
/// the newest mtime decides, then the greatest blob id, target, mode and size. Rules: spec/namespace.md, "Versions".
pub fn shown<T>(versions: &[(T, Version)]) -> Option<Shown<'_, T>> {
    let present: Vec<_> = versions.iter().filter(|(_, version)| version.content.is_present()).collect();
    let ids: Vec<_> = present.iter().map(|(_, version)| version.content.id()).collect();
    let comes_from = |new: usize, old: usize| ids[old].is_some_and(|id| present[new].1.previous.contains(&id));
    let is_superseded = |at: usize| {
        (0..present.len()).any(|other| ids[other] != ids[at] && comes_from(other, at) && !comes_from(at, other))
    };
    let mut last: Vec<_> = (0..present.len()).filter(|&at| !is_superseded(at)).map(|at| present[at]).collect();
    if last.is_empty() {
        last = present;
    }
    let version = last.iter().copied().max_by(|(_, a), (_, b)| rank(a).cmp(&rank(b)))?;
    let in_conflict = last.iter().any(|(_, other)| !other.content.is_same(&version.1.content));
    Some(Shown { version, in_conflict })
}

fn rank(version: &Version) -> impl Ord + '_ {
    let (size, mode) = match version.content {
        Content::File { size, mode, .. } => (size, mode),
        Content::Directory { mode } => (0, mode),
        _ => (0, 0),
    };
    let target = match &version.content {
        Content::Symlink { target } => &target[..],
        _ => &[],
    };
    (version.content.is_directory(), version.mtime, version.content.blob(), target, mode, size)
}

/// How many earlier contents a version names.
pub const PREVIOUS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn file(data: &[u8], seconds: i64, previous: &[&[u8]]) -> Version {
        Version {
            content: Content::File { blob: BlobId::of(data), size: 1, mode: 0o644 },
            mtime: UnixTime { seconds, nanos: 0 },
            seq: 1,
            previous: previous.iter().map(|data| BlobId::of(data)).collect(),
        }
    }

    #[test]
    fn the_newest_present_version_is_shown() {
        let with = |content| Version { content, ..file(b"", 9, &[]) };
        let (a, b) = (file(b"a", 5, &[]), file(b"b", 5, &[]));
        let greater = if BlobId::of(b"a") > BlobId::of(b"b") { &a } else { &b };
        let dir = Version { mtime: UnixTime { seconds: 0, nanos: 0 }, ..with(Content::Directory { mode: 0o755 }) };
        for (versions, expected, in_conflict) in [
            (vec![a.clone(), file(b"b", 6, &[])], Some(&file(b"b", 6, &[])), true),
            (vec![a.clone(), with(Content::Deleted)], Some(&a), false),
            (vec![a.clone(), b.clone()], Some(greater), true),
            (vec![b.clone(), a.clone()], Some(greater), true),
            (vec![file(b"a", -7, &[]), file(b"b", -8, &[])], Some(&file(b"a", -7, &[])), true),
            (vec![file(b"a", 1, &[]), file(b"a", 2, &[])], Some(&file(b"a", 2, &[])), false),
            (vec![with(Content::Deleted), with(Content::Withdrawn)], None, false),
            (vec![a.clone(), dir.clone()], Some(&dir), true),
            (vec![dir.clone(), dir.clone()], Some(&dir), false),
        ] {
            check(versions, expected, in_conflict);
        }
    }

    #[test]
    fn what_was_made_from_another_supersedes_it_whatever_the_clocks_say() {
        let (a, b, c) = (file(b"a", 100, &[]), file(b"b", 50, &[b"a"]), file(b"c", 10, &[b"b", b"a"]));
        check(vec![a.clone(), b.clone(), c.clone()], Some(&c), false);
        check(vec![c.clone(), a.clone()], Some(&c), false);
        // Two that were made from the same.
        let fork = file(b"d", 7, &[b"a"]);
        check(vec![a.clone(), b.clone(), fork.clone()], Some(&b), true);
        // Each from the other, as when somebody went back to what was before: no conflict to a reader, the newer is shown.
        let back = file(b"a", 1, &[b"b"]);
        check(vec![back.clone(), b.clone()], Some(&b), true);
        // Three in a circle.
        let circle = [file(b"x", 1, &[b"y"]), file(b"y", 2, &[b"z"]), file(b"z", 3, &[b"x"])];
        check(circle.to_vec(), Some(&circle[2]), true);
    }

    fn check(versions: Vec<Version>, expected: Option<&Version>, in_conflict: bool) {
        let versions: Vec<_> = versions.into_iter().enumerate().collect();
        let got = shown(&versions);
        assert_eq!(got.map(|got| &got.version.1), expected, "{versions:?}");
        assert_eq!(got.is_some_and(|got| got.in_conflict), in_conflict, "{versions:?}");
    }

    #[test]
    fn a_new_version_names_what_it_was_made_from() {
        let content = |data: &[u8]| file(data, 0, &[]).content;
        let names = |content: &Content, old: Option<&Version>, others: &[Version], expected: &[&[u8]]| {
            let expected: Vec<_> = expected.iter().map(|data| BlobId::of(data)).collect();
            assert_eq!(made_from(content, old, others), expected);
        };
        names(&content(b"a"), None, &[], &[]);
        names(&content(b"c"), Some(&file(b"b", 0, &[b"a"])), &[], &[b"b", b"a"]);
        // Touched, then taken back to what it was.
        names(&content(b"b"), Some(&file(b"b", 0, &[b"a"])), &[], &[b"a"]);
        names(&content(b"a"), Some(&file(b"b", 0, &[b"a"])), &[], &[b"b"]);
        // Deleted and written again.
        let deleted = Version { content: Content::Deleted, ..file(b"", 0, &[b"a"]) };
        names(&content(b"b"), Some(&deleted), &[], &[b"a"]);
        // Copied from a peer, which knows what it comes from, and edited there or here.
        names(&content(b"b"), None, &[file(b"b", 0, &[b"a"]), file(b"x", 0, &[b"y"])], &[b"a"]);
        names(&content(b"c"), Some(&file(b"b", 0, &[])), &[file(b"b", 0, &[b"a"])], &[b"b", b"a"]);
    }

    /// A file that is saved a hundred times while a peer has an old copy still supersedes that copy.
    #[test]
    fn what_peers_have_is_named_longest() {
        let (mut version, held) = (file(&[0], 0, &[]), file(&[3], 0, &[]));
        for data in 1..100 {
            let new = file(&[data], 0, &[]);
            let previous = made_from(&new.content, Some(&version), std::slice::from_ref(&held));
            assert!(previous.len() <= PREVIOUS_MAX && previous[0] == BlobId::of(&[data - 1]));
            assert!(data <= 3 || previous.contains(&BlobId::of(&[3])), "{data}");
            version = Version { previous, ..new };
        }
    }
}
