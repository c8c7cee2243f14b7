use std::{collections::HashMap, ops::ControlFlow};

use redb::{ReadOnlyTable, ReadTransaction, ReadableTable};
use tree::UnixTime;

use crate::{
    ArenaName, Content, Namespace, NamespaceError, PeerId, RelPath, Version,
    namespace::{arena_name, rel_path},
    rows::{ARENAS, ME, PEERS, VERSIONS, VersionKey, decode},
    shown,
};

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where.
    pub path: RelPath,
    /// What.
    pub kind: EntryKind,
    /// When it was last changed; not known of a directory of which no peer says anything.
    pub mtime: Option<UnixTime>,
    /// The peers that have just this there: `None` stands for this machine.
    pub peers: Vec<Option<PeerId>>,
    /// Whether a peer has something else there, and neither comes from the other.
    pub in_conflict: bool,
}

/// What stands at a path in the view over all peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A file or a symbolic link: the version that is shown.
    Leaf(Content),
    /// A directory: a peer says so, or something is in it.
    Directory,
}

impl Namespace {
    /// The names of all arenas that this machine or any peer has, in order.
    pub fn all_arenas(&self) -> Result<Vec<ArenaName>, NamespaceError> {
        self.read("list arenas", |txn| {
            let mut names = Vec::new();
            for row in txn.open_table(ARENAS)?.iter()? {
                names.push(arena_name(row?.0.value())?);
            }
            let versions = txn.open_table(VERSIONS)?;
            let mut from = String::new();
            while let Some(row) = versions.range((&from[..], &[][..], 0)..)?.next() {
                let name = arena_name(row?.0.value().0)?;
                from = format!("{name}\0");
                // Where all is deleted is still an arena; where all is withdrawn, nobody has one.
                for row in versions.range((name.as_str(), &[][..], 0)..(&from[..], &[][..], 0))? {
                    if decode::<Version>(row?.1.value())?.content != Content::Withdrawn {
                        names.push(name);
                        break;
                    }
                }
            }
            names.sort();
            names.dedup();
            Ok(names)
        })
    }

    /// What each peer says of a path, `None` standing for this machine; deletions included.
    pub fn versions(
        &self,
        arena: &ArenaName,
        path: &RelPath,
    ) -> Result<Vec<(Option<PeerId>, Version)>, NamespaceError> {
        self.read("look up a path", |txn| {
            let names = PeerNames::load(txn)?;
            let table = txn.open_table(VERSIONS)?;
            let (arena, path) = (arena.as_str(), path.as_bytes());
            let mut found = Vec::new();
            for row in table.range((arena, path, 0)..=(arena, path, u32::MAX))? {
                let (key, row) = row?;
                found.push((names.get(key.value().2)?, decode::<Version>(row.value())?));
            }
            Ok(found)
        })
    }

    /// What is shown at a path; a directory too of which no peer says anything, but something is in it.
    pub fn entry(&self, arena: &ArenaName, path: &RelPath) -> Result<Option<Entry>, NamespaceError> {
        self.read("look up a path", |txn| {
            let paths = Paths::of(txn, arena.as_str())?;
            let said = paths.next_from(path.as_bytes())?.filter(|entry| entry.path == *path);
            if said.is_some() {
                return Ok(said);
            }
            let below = [path.as_bytes(), b"/"].concat();
            let inner = paths.next_from(&below)?.filter(|entry| entry.path.as_bytes().starts_with(&below));
            Ok(inner.map(|_| Entry::implied(path.clone())))
        })
    }

    /// Gives `visit` the entries below `dir`, or below the arena root, in the order of their paths: with
    /// `recursive` all of them, otherwise those directly there. A `dir` that is a leaf is itself the only entry.
    /// Stops when `visit` breaks. All is seen as of one moment; `visit` may be slow.
    ///
    /// Costs what it gives, not what the arena holds.
    pub fn list(
        &self,
        arena: &ArenaName,
        dir: Option<&RelPath>,
        recursive: bool,
        visit: &mut dyn FnMut(Entry) -> ControlFlow<()>,
    ) -> Result<(), NamespaceError> {
        self.read("list a directory", |txn| {
            let paths = Paths::of(txn, arena.as_str())?;
            let mut prefix = Vec::new();
            if let Some(dir) = dir {
                let is_leaf = |entry: &Entry| entry.path == *dir && entry.kind != EntryKind::Directory;
                if let Some(entry) = paths.next_from(dir.as_bytes())?.filter(is_leaf)
                    && visit(entry).is_break()
                {
                    return Ok(());
                }
                prefix = [dir.as_bytes(), b"/"].concat();
            }
            let (mut from, mut last_dir) = (prefix.clone(), prefix.clone());
            while let Some(entry) = paths.next_from(&from)?.filter(|entry| entry.path.as_bytes().starts_with(&prefix)) {
                let path = entry.path.as_bytes();
                // The directories between the last entry and this one, or the one that hides it.
                let shared = path.iter().zip(&last_dir).take_while(|(a, b)| a == b).count();
                let known = last_dir[..shared].iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
                let known = known.max(prefix.len());
                let slashes = path.iter().enumerate().skip(known).filter(|(_, b)| **b == b'/').map(|(at, _)| at);
                for slash in slashes.take(if recursive { usize::MAX } else { 1 }) {
                    let path = rel_path(&path[..slash])?;
                    if paths.is_said(&path)? {
                        continue;
                    }
                    if visit(Entry::implied(path)).is_break() {
                        return Ok(());
                    }
                }
                last_dir = path[..path.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1)].to_owned();
                let inner = path.iter().skip(prefix.len()).position(|&b| b == b'/');
                match inner {
                    // Go on behind everything that starts with the directory's name and '/'.
                    Some(slash) if !recursive => {
                        from = [&path[..prefix.len() + slash], &[b'/' + 1]].concat();
                    }
                    _ => {
                        from = [path, &[0]].concat();
                        if visit(entry).is_break() {
                            return Ok(());
                        }
                    }
                }
            }
            Ok(())
        })
    }
}

impl Entry {
    /// A directory of which no peer says anything.
    fn implied(path: RelPath) -> Self {
        Self { path, kind: EntryKind::Directory, mtime: None, peers: Vec::new(), in_conflict: false }
    }
}

/// The paths of an arena that are present at some peer.
pub(crate) struct Paths<'a> {
    table: ReadOnlyTable<VersionKey, &'static [u8]>,
    pub(crate) arena: &'a str,
    names: PeerNames,
}

impl<'a> Paths<'a> {
    pub(crate) fn of(txn: &ReadTransaction, arena: &'a str) -> Result<Self, redb::Error> {
        Ok(Self { table: txn.open_table(VERSIONS)?, arena, names: PeerNames::load(txn)? })
    }

    /// The first present path at or behind `from`, with its shown version.
    pub(crate) fn next_from(&self, from: &[u8]) -> Result<Option<Entry>, redb::Error> {
        let mut at: Option<RelPath> = None;
        let mut versions: Vec<(u32, Version)> = Vec::new();
        for row in self.table.range((self.arena, from, 0)..)? {
            let (key, row) = row?;
            let (arena, path, peer) = key.value();
            if arena != self.arena {
                break;
            }
            if at.as_ref().is_none_or(|at| at.as_bytes() != path) {
                if let Some(entry) = self.entry(at.take(), &versions)? {
                    return Ok(Some(entry));
                }
                at = Some(rel_path(path)?);
                versions.clear();
            }
            versions.push((peer, decode::<Version>(row.value())?));
        }
        self.entry(at, &versions)
    }

    /// Whether a peer says that `dir` is a directory, so that it is an entry of its own.
    fn is_said(&self, dir: &RelPath) -> Result<bool, redb::Error> {
        let entry = self.next_from(dir.as_bytes())?.filter(|entry| entry.path == *dir);
        Ok(entry.is_some_and(|entry| entry.kind == EntryKind::Directory))
    }

    fn entry(&self, path: Option<RelPath>, versions: &[(u32, Version)]) -> Result<Option<Entry>, redb::Error> {
        let Some((path, shown)) = path.zip(shown(versions)) else { return Ok(None) };
        let version = &shown.version.1;
        let same = versions.iter().filter(|(_, other)| other.content.is_same(&version.content));
        let peers = same.map(|(peer, _)| self.names.get(*peer)).collect::<Result<_, _>>()?;
        let kind = match &version.content {
            Content::Directory { .. } => EntryKind::Directory,
            leaf => EntryKind::Leaf(leaf.clone()),
        };
        Ok(Some(Entry { path, kind, mtime: Some(version.mtime), peers, in_conflict: shown.in_conflict }))
    }
}

/// Which peer a number in the rows stands for.
struct PeerNames(HashMap<u32, PeerId>);

impl PeerNames {
    fn load(txn: &ReadTransaction) -> Result<Self, redb::Error> {
        let peers = txn.open_table(PEERS)?;
        let rows = peers.iter()?;
        let names = rows.map(|row| row.map(|(peer, number)| (number.value(), PeerId::from_bytes(*peer.value()))));
        Ok(Self(names.collect::<Result<_, _>>()?))
    }

    fn get(&self, number: u32) -> Result<Option<PeerId>, redb::Error> {
        match self.0.get(&number) {
            Some(peer) => Ok(Some(*peer)),
            None if number == ME => Ok(None),
            None => Err(redb::Error::Corrupted(format!("no peer has the number {number}"))),
        }
    }
}
