//! What a directory shows, put together once and asked often.

use std::ops::ControlFlow;

use namespace::{ArenaName, Content, EntryKind, Namespace, NamespaceError, RelPath};
use tree::{BlobId, UnixTime};

use crate::handle::{Handle, Ids, ROOT};

/// Where a directory is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Root,
    /// An arena, or a directory in it.
    In(ArenaName, Option<RelPath>),
}

/// A directory as of one moment.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) place: Place,
    pub(crate) id: u64,
    /// The id of the directory that it is in; of the root its own.
    pub(crate) parent: u64,
    /// The ids of the directories between the root and this one, from the arena down.
    above: Vec<u64>,
    /// By id.
    pub(crate) entries: Vec<Entry>,
    pub(crate) mtime: UnixTime,
    /// How many of the entries are directories.
    pub(crate) directories: u32,
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) id: u64,
    pub(crate) name: Box<[u8]>,
    pub(crate) kind: Kind,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    /// `is_said`: a peer says that it is there. Else it is there only for what is in it.
    Directory {
        is_said: bool,
    },
    File(FileVersion),
    Symlink {
        target: Box<[u8]>,
        mtime: UnixTime,
    },
}

/// A version of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileVersion {
    pub(crate) blob: BlobId,
    pub(crate) size: u64,
    pub(crate) mtime: UnixTime,
    pub(crate) is_executable: bool,
}

impl FileVersion {
    /// `None` if there is no file.
    pub(crate) fn of(content: &Content, mtime: UnixTime) -> Option<Self> {
        let &Content::File { blob, size, mode } = content else { return None };
        Some(Self { blob, size, mtime, is_executable: mode & 0o111 != 0 })
    }

    /// What stands for the version in a handle.
    pub(crate) fn number(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = *self.blob.as_bytes();
        u64::from_be_bytes([a, b, c, d, e, f, g, h]).max(1)
    }
}

impl Entry {
    fn version(&self) -> u64 {
        match &self.kind {
            Kind::File(version) => version.number(),
            _ => 0,
        }
    }
}

impl Place {
    /// Of something in it. `None` if the name cannot be.
    pub(crate) fn join(&self, name: &[u8]) -> Option<Self> {
        match self {
            Self::Root => Some(Self::In(std::str::from_utf8(name).ok()?.parse().ok()?, None)),
            Self::In(arena, None) => Some(Self::In(arena.clone(), Some(name.to_owned().try_into().ok()?))),
            Self::In(arena, Some(path)) => Some(Self::In(arena.clone(), Some(path.join(name).ok()?))),
        }
    }

    /// The directory that it is in; of the root none.
    pub(crate) fn parent(&self) -> Option<Self> {
        match self {
            Self::Root => None,
            Self::In(_, None) => Some(Self::Root),
            Self::In(arena, Some(path)) => Some(Self::In(arena.clone(), path.parent())),
        }
    }

    /// Its id, as that of an entry is.
    pub(crate) fn id(&self, ids: &Ids) -> u64 {
        match self {
            Self::Root => ROOT,
            Self::In(arena, path) => ids.of(arena, path.as_ref().map_or(b"", RelPath::as_bytes)),
        }
    }
}

impl Directory {
    /// Reads what is shown at `place`; `born` is the mtime of what has none. `None` if there is no such directory.
    pub(crate) fn read(
        namespace: &Namespace,
        ids: &Ids,
        place: Place,
        born: UnixTime,
    ) -> Result<Option<Self>, NamespaceError> {
        let (mut entries, mut latest) = (Vec::new(), born);
        match &place {
            Place::Root => {
                for arena in namespace.all_arenas()? {
                    let (id, name) = (ids.of(&arena, b""), arena.as_str().as_bytes().into());
                    entries.push(Entry { id, name, kind: Kind::Directory { is_said: false } });
                }
            }
            Place::In(arena, path) => {
                let skipped = path.as_ref().map_or(0, |path| path.as_bytes().len() + 1);
                if let Some(path) = path {
                    match namespace.entry(arena, path)? {
                        Some(entry) if entry.kind == EntryKind::Directory => latest = entry.mtime.unwrap_or(born),
                        _ => return Ok(None),
                    }
                }
                namespace.list(arena, path.as_ref(), false, &mut |entry| {
                    latest = entry.mtime.map_or(latest, |mtime| latest.max(mtime));
                    let kind = match (entry.kind, entry.mtime.unwrap_or(born)) {
                        (EntryKind::Directory, _) => Kind::Directory { is_said: entry.mtime.is_some() },
                        (EntryKind::Leaf(Content::Symlink { target }), mtime) => {
                            Kind::Symlink { target: target.into(), mtime }
                        }
                        (EntryKind::Leaf(content), mtime) => match FileVersion::of(&content, mtime) {
                            Some(version) => Kind::File(version),
                            None => return ControlFlow::Continue(()),
                        },
                    };
                    let (id, name) = (ids.of(arena, entry.path.as_bytes()), entry.path.as_bytes()[skipped..].into());
                    entries.push(Entry { id, name, kind });
                    ControlFlow::Continue(())
                })?;
                if path.is_none() && entries.is_empty() && !namespace.all_arenas()?.contains(arena) {
                    return Ok(None);
                }
            }
        }
        Ok(Some(Self::new(ids, place, entries, latest)))
    }

    fn new(ids: &Ids, place: Place, mut entries: Vec<Entry>, latest: UnixTime) -> Self {
        // Of two names with one id, which nobody can bring about, the first is shown.
        entries.sort_by(|a, b| a.id.cmp(&b.id).then_with(|| a.name.cmp(&b.name)));
        entries.dedup_by_key(|entry| entry.id);
        let directories = entries.iter().filter(|entry| matches!(entry.kind, Kind::Directory { .. })).count();
        let up: Vec<Place> = std::iter::successors(place.parent(), Place::parent).collect();
        let parent = up.first().map_or(ROOT, |parent| parent.id(ids));
        let above = up.iter().rev().skip(1).map(|above| above.id(ids)).collect();
        let mtime = UnixTime { seconds: latest.seconds, nanos: nanos_of(&entries) };
        let (id, directories) = (place.id(ids), u32::try_from(directories).unwrap_or(u32::MAX - 2));
        Self { id, parent, above, mtime, directories, entries, place }
    }

    /// Its own handle.
    pub(crate) fn handle(&self) -> Handle {
        match self.above.split_last() {
            _ if self.place == Place::Root => Handle::root(),
            Some((_, above)) => Handle::new(self.id, 0, self.parent, above),
            None => Handle::new(self.id, 0, self.parent, &[]),
        }
    }

    /// The handle of what is in it.
    pub(crate) fn handle_of(&self, entry: &Entry) -> Handle {
        let version = entry.version();
        if self.place == Place::Root {
            return Handle::new(entry.id, version, self.id, &[]);
        }
        Handle::new(entry.id, version, self.id, &self.above)
    }

    pub(crate) fn by_id(&self, id: u64) -> Option<&Entry> {
        self.entries.binary_search_by_key(&id, |entry| entry.id).ok().map(|at| &self.entries[at])
    }

    pub(crate) fn by_name(&self, ids: &Ids, name: &[u8]) -> Option<&Entry> {
        let id = self.place.join(name)?.id(ids);
        self.by_id(id).filter(|entry| *entry.name == *name)
    }

    /// The entries behind a cookie.
    pub(crate) fn behind(&self, cookie: u64) -> &[Entry] {
        &self.entries[self.entries.partition_point(|entry| entry.id <= cookie)..]
    }
}

/// What makes a directory's mtime move with everything that is shown in it.
fn nanos_of(entries: &[Entry]) -> u32 {
    let mut hasher = blake3::Hasher::new();
    for Entry { id, kind, .. } in entries {
        hasher.update(&id.to_le_bytes());
        let time = |hasher: &mut blake3::Hasher, time: &UnixTime| {
            hasher.update(&time.seconds.to_le_bytes()).update(&time.nanos.to_le_bytes());
        };
        match kind {
            Kind::Directory { .. } => {
                hasher.update(b"d");
            }
            Kind::File(version) => {
                hasher.update(if version.is_executable { b"x" } else { b"f" }).update(version.blob.as_bytes());
                time(&mut hasher, &version.mtime);
            }
            Kind::Symlink { target, mtime } => {
                hasher.update(b"l").update(blake3::hash(target).as_bytes());
                time(&mut hasher, mtime);
            }
        }
    }
    let [a, b, c, d, ..] = *hasher.finalize().as_bytes();
    u32::from_le_bytes([a, b, c, d]) % 1_000_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(ids: &Ids, arena: &ArenaName, name: &str, bytes: &[u8]) -> Entry {
        let version =
            FileVersion { blob: BlobId::of(bytes), size: 1, mtime: UnixTime::default(), is_executable: false };
        Entry { id: ids.of(arena, name.as_bytes()), name: name.as_bytes().into(), kind: Kind::File(version) }
    }

    #[test]
    fn mtimes_move_with_what_is_shown_and_cookies_go_on_behind_what_is_gone() {
        let (ids, arena): (_, ArenaName) = (Ids([1; 32]), "a".parse().unwrap());
        let place = Place::In(arena.clone(), None);
        let make = |entries| Directory::new(&ids, place.clone(), entries, UnixTime { seconds: 5, nanos: 6 });
        let all: Vec<Entry> = (0..100).map(|n| file(&ids, &arena, &format!("f{n}"), b"x")).collect();
        let whole = make(all.clone());
        assert_eq!(whole.mtime.seconds, 5);
        assert!(whole.entries.is_sorted_by(|a, b| a.id < b.id));
        let mut others = vec![make(all[1..].to_vec())];
        for changed in [
            file(&ids, &arena, "f0", b"y"),
            file(&ids, &arena, "f0 ", b"x"),
            Entry { kind: Kind::Directory { is_said: true }, ..all[0].clone() },
            Entry { kind: Kind::Symlink { target: (*b"t").into(), mtime: UnixTime::default() }, ..all[0].clone() },
        ] {
            others.push(make([&all[1..], &[changed]].concat()));
        }
        let mut nanos: Vec<u32> = others.iter().map(|other| other.mtime.nanos).chain([whole.mtime.nanos]).collect();
        nanos.sort();
        nanos.dedup();
        assert_eq!(nanos.len(), others.len() + 1);
        // A listing of which a part was given goes on, whatever came and went.
        let cookie = whole.entries[40].id;
        let without: Vec<Entry> = whole.entries.iter().filter(|entry| entry.id != cookie).cloned().collect();
        let (rest, without) = (whole.behind(cookie), make(without));
        assert_eq!(rest.len(), 59);
        assert!(rest.iter().map(|entry| entry.id).eq(without.behind(cookie).iter().map(|entry| entry.id)));
        assert_eq!((whole.behind(0).len(), whole.behind(u64::MAX).len()), (100, 0));
        assert_eq!(whole.by_name(&ids, b"f7").unwrap().name[..], *b"f7");
        assert!(whole.by_name(&ids, b"f700").is_none() && whole.by_name(&ids, b"a/b").is_none());
    }

    #[test]
    fn handles_name_the_way() {
        let (ids, arena): (_, ArenaName) = (Ids([1; 32]), "a".parse().unwrap());
        let place = |path: &str| Place::In(arena.clone(), Some(path.as_bytes().to_owned().try_into().unwrap()));
        let make = |place, entries| Directory::new(&ids, place, entries, UnixTime::default());
        let deep = make(place("b/c"), vec![]);
        let ids_of: Vec<u64> = ["", "b", "b/c"].iter().map(|path| ids.of(&arena, path.as_bytes())).collect();
        assert_eq!((deep.id, deep.parent), (ids_of[2], ids_of[1]));
        assert_eq!(deep.handle(), Handle::new(ids_of[2], 0, ids_of[1], &ids_of[..1]));
        let entry = file(&ids, &arena, "b/c/d", b"x");
        let handle = deep.handle_of(&entry);
        assert_eq!((handle.id, handle.parent, handle.depth()), (entry.id, ids_of[2], 2));
        assert!(handle.may_pass(0, ids_of[0]) && handle.may_pass(1, ids_of[1]) && !handle.may_pass(1, ids_of[0]));
        let root = make(Place::Root, vec![]);
        assert_eq!((root.handle(), root.parent), (Handle::root(), ROOT));
        let top = make(Place::In(arena.clone(), None), vec![]);
        assert_eq!((top.parent, top.handle().depth()), (ROOT, 0));
        assert_eq!(top.handle_of(&entry).depth(), 0);
    }
}
