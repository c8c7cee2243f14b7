//! What is to be kept on this machine, and which files that is now. Rows: spec/namespace.md; what follows from them:
//! spec/pins.md.

use std::{collections::BTreeSet, ops::ControlFlow};

use redb::ReadableTable;
use tree::BlobId;

use crate::{
    ArenaName, Content, Entry, EntryKind, Namespace, NamespaceError, PeerId, RelPath,
    list::Paths,
    namespace::{arena_name, rel_path},
    rows::PINS,
};

/// A whole arena, or what is at and below a path of one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The arena.
    pub arena: ArenaName,
    /// The path in it; `None` for all of it.
    pub path: Option<RelPath>,
}

/// A file that is shown at or below a [`Place`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileBelow {
    /// Where.
    pub path: RelPath,
    /// Its bytes.
    pub blob: BlobId,
    /// How many they are.
    pub size: u64,
    /// The peers that have it there; `None` stands for this machine.
    pub peers: Vec<Option<PeerId>>,
}

/// The places that are pinned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pins(BTreeSet<Place>);

impl Pins {
    /// In order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Place> + '_ {
        self.0.iter()
    }

    /// Whether just this place is pinned, and not only one above it.
    pub fn contains(&self, place: &Place) -> bool {
        self.0.contains(place)
    }

    /// The pinned place that a path is at or below; of several the one the furthest down.
    pub fn covering(&self, arena: &ArenaName, path: Option<&RelPath>) -> Option<&Place> {
        let path = path.map_or(&[][..], RelPath::as_bytes);
        let slashes = path.iter().enumerate().rev().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at]);
        let above = std::iter::once(path).chain(slashes).map(|path| path.to_owned().try_into().ok());
        let mut above = above.chain([None]).map(|path| Place { arena: arena.clone(), path });
        above.find_map(|place| self.0.get(&place))
    }
}

impl FromIterator<Place> for Pins {
    fn from_iter<I: IntoIterator<Item = Place>>(places: I) -> Self {
        Self(places.into_iter().collect())
    }
}

impl Namespace {
    /// What is pinned on this machine.
    pub fn pins(&self) -> Result<Pins, NamespaceError> {
        self.read("list the pins", |txn| read_pins(&txn.open_table(PINS)?))
    }

    /// Pins `places` from now on, and `unpin` no more, in one commit, durable on return. Tells how many are pinned then; more
    /// than `max` are too many, and nothing changes.
    pub fn change_pins(&self, pin: &[Place], unpin: &[Place], max: u64) -> Result<u64, NamespaceError> {
        let mut count = 0;
        self.write_if("change the pins", |txn| {
            let mut pins = txn.open_table(PINS)?;
            let key = |place: &Place| {
                let path = place.path.as_ref().map_or(Vec::new(), |path| path.as_bytes().to_owned());
                (place.arena.as_str().to_owned(), path)
            };
            for (arena, path) in unpin.iter().map(key) {
                pins.remove((&arena[..], &path[..]))?;
            }
            for (arena, path) in pin.iter().map(key) {
                pins.insert((&arena[..], &path[..]), ())?;
            }
            count = redb::ReadableTableMetadata::len(&pins)?;
            Ok((count <= max).then_some(()))
        })?;
        Ok(count)
    }

    /// Gives `visit` the files that are shown at and below each of `places`, by their number, in the order of their paths. A
    /// file that is below several comes once for each. Stops when `visit` breaks. All is seen as of one moment.
    pub fn files_below(
        &self,
        places: &[Place],
        visit: &mut dyn FnMut(usize, FileBelow) -> ControlFlow<()>,
    ) -> Result<(), NamespaceError> {
        self.read("list what is below some places", |txn| {
            let mut paths = Paths::of(txn, "")?;
            for (number, place) in places.iter().enumerate() {
                paths.arena = place.arena.as_str();
                let mut below = Vec::new();
                if let Some(path) = &place.path {
                    let at = paths.next_from(path.as_bytes())?.filter(|entry| entry.path == *path);
                    if at.and_then(file_of).is_some_and(|file| visit(number, file).is_break()) {
                        return Ok(());
                    }
                    below = [path.as_bytes(), b"/"].concat();
                }
                let mut from = below.clone();
                while let Some(entry) =
                    paths.next_from(&from)?.filter(|entry| entry.path.as_bytes().starts_with(&below))
                {
                    from = [entry.path.as_bytes(), &[0]].concat();
                    if file_of(entry).is_some_and(|file| visit(number, file).is_break()) {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }
}

pub(crate) fn read_pins(table: &impl ReadableTable<(&'static str, &'static [u8]), ()>) -> Result<Pins, redb::Error> {
    let places = table.iter()?.map(|row| {
        let (key, _) = row?;
        let (arena, path) = key.value();
        let path = if path.is_empty() { None } else { Some(rel_path(path)?) };
        Ok(Place { arena: arena_name(arena)?, path })
    });
    places.collect()
}

fn file_of(entry: Entry) -> Option<FileBelow> {
    match entry.kind {
        EntryKind::Leaf(Content::File { blob, size, .. }) => {
            Some(FileBelow { path: entry.path, blob, size, peers: entry.peers })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> Place {
        let (arena, path) = text.split_once('/').map_or((text, None), |(arena, path)| (arena, Some(path)));
        Place { arena: arena.parse().unwrap(), path: path.map(|path| path.as_bytes().to_owned().try_into().unwrap()) }
    }

    #[test]
    fn what_covers_a_path() {
        let pins: Pins = ["a", "a/b/c", "d/e", "d/e/f/g"].into_iter().map(place).collect();
        for (at, covering) in [
            ("a", Some("a")),
            ("a/b", Some("a")),
            ("a/b/c", Some("a/b/c")),
            ("a/b/c/d", Some("a/b/c")),
            ("a/b/cd", Some("a")),
            ("d", None),
            ("d/ef", None),
            ("d/e/f", Some("d/e")),
            ("d/e/f/g/h/i", Some("d/e/f/g")),
            ("e", None),
        ] {
            let Place { arena, path } = place(at);
            assert_eq!(pins.covering(&arena, path.as_ref()), covering.map(place).as_ref(), "{at}");
            assert_eq!(pins.contains(&place(at)), covering == Some(at), "{at}");
        }
    }
}
