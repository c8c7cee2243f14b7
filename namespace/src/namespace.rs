use std::{
    collections::HashMap,
    ops::Bound,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, WriteTransaction};
use tokio::sync::watch;
use tree::{BlobId, UnixTime};

use crate::{
    ArenaName, Content, Key, Mark, PeerId, RelPath, Version, anchors,
    recent::Recent,
    rows::{
        ANCHORS, ARENAS, ArenaRow, BLOBS, DEPARTED, FORMAT, HEADS, HeadRow, LOG, LogRow, MASS_DELETIONS, ME, META,
        NAMES, PEERS, PINS, VERSIONS, decode, encode,
    },
    tables::{Tables, prefix},
    version::made_from,
};

/// What every peer has at every path. Cheap to clone; the clones are one namespace.
#[derive(Clone)]
pub struct Namespace {
    db: Arc<Database>,
    changed: Arc<watch::Sender<u64>>,
    names: Arc<RwLock<HashMap<PeerId, String>>>,
    pub(crate) recent: Arc<Recent>,
    origin: Origin,
}

/// Who opens a namespace, and how.
#[derive(Debug, Clone, Copy)]
pub struct Origin {
    /// This machine.
    pub me: PeerId,
    /// Seconds since 1970: later ones make later epochs, and no more depends on it.
    pub now: u64,
    /// A random number, another one at each opening.
    pub random: u64,
    /// How many changes each peer's log keeps; at least 1.
    pub history_limit: u64,
}

/// An arena of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arena {
    /// Its name.
    pub name: ArenaName,
    /// The arena root; `None` if this machine only follows the arena.
    pub dir: Option<PathBuf>,
    /// Whether strangers may read its blobs, where serving strangers is on at all.
    pub public: bool,
    /// Device and inode of the arena root when it was last scanned: an empty directory that is another one is a missing
    /// disk, and no deletion of everything.
    pub root: Option<(u64, u64)>,
}

/// What is now at a path of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The path.
    pub path: RelPath,
    /// What is there.
    pub content: Content,
    /// Its mtime; for a deletion, as spec/namespace.md, "Deletions", says.
    pub mtime: UnixTime,
}

/// What this machine said last of a path of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The path.
    pub path: RelPath,
    /// What was said.
    pub version: Version,
}

/// A change in a peer's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happened {
    /// The arena.
    pub arena: ArenaName,
    /// The path.
    pub path: RelPath,
    /// What has been there since; its `seq` is the change's number.
    pub version: Version,
    /// When the peer noticed, in milliseconds since 1970 by its clock.
    pub at: u64,
}

/// Why the namespace could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The database failed.
    #[error("{action} in the namespace's database")]
    Database {
        /// What was being done.
        action: &'static str,
        /// What redb said.
        #[source]
        source: Box<redb::Error>,
    },
    /// Another version of this program made the database.
    #[error("the namespace has format {found}, and this program knows {known}")]
    Format {
        /// The format that it has.
        found: u64,
        /// The one that is known here.
        known: u64,
    },
}

impl Namespace {
    /// Opens the namespace whose rows are in `db`, and makes it if it is not there.
    pub fn open(db: Arc<Database>, origin: Origin) -> Result<Self, NamespaceError> {
        let namespace = Self { db, changed: Arc::default(), names: Arc::default(), recent: Arc::default(), origin };
        let names = namespace.write("open the namespace", |txn| {
            let mut meta = txn.open_table(META)?;
            let format = meta.get("format")?.map_or(FORMAT, |format| format.value());
            if format != FORMAT {
                return Ok(Err(format));
            }
            meta.insert("format", FORMAT)?;
            txn.open_table(ARENAS)?;
            txn.open_table(PEERS)?;
            txn.open_table(PINS)?;
            txn.open_table(ANCHORS)?;
            txn.open_table(DEPARTED)?;
            txn.open_table(MASS_DELETIONS)?;
            let mut tables = Tables::open(txn, &namespace.recent)?;
            let mut head = tables.head(ME)?;
            if head.mark.epoch == 0 {
                let epoch = origin.now.clamp(1, (1 << 30) - 1) << 32 | origin.random & 0xffff_ffff;
                head = HeadRow { mark: Mark { epoch, ..Mark::default() }, heard: true, ..head };
                tables.set_head(ME, &head)?;
            }
            tables.begin_session(ME, head.mark.seq + 1, namespace.session())?;
            let (names, peers) = (txn.open_table(NAMES)?, txn.open_table(PEERS)?);
            let mut known = HashMap::new();
            for row in peers.iter()? {
                let (peer, number) = row?;
                if let Some(name) = names.get(number.value())? {
                    known.insert(PeerId::from_bytes(*peer.value()), name.value().to_owned());
                }
            }
            Ok(Ok(known))
        })?;
        let names = names.map_err(|found| NamespaceError::Format { found, known: FORMAT })?;
        *namespace.names.write().unwrap_or_else(PoisonError::into_inner) = names;
        Ok(namespace)
    }

    /// This machine.
    pub fn me(&self) -> PeerId {
        self.origin.me
    }

    pub(crate) fn history_limit(&self) -> u64 {
        self.origin.history_limit.max(1)
    }

    /// The number of this opening; never 0, which stands for none.
    pub(crate) fn session(&self) -> u64 {
        self.origin.random | 1
    }

    /// What this machine has said so far.
    pub fn mark(&self) -> Result<Mark, NamespaceError> {
        self.read("look up the head", |txn| {
            let head = txn.open_table(HEADS)?.get(ME)?.map(|row| decode::<HeadRow>(row.value())).transpose()?;
            Ok(head.unwrap_or_default().mark)
        })
    }

    /// Tells whenever something was said or heard. The number is of no meaning.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// How many transactions were committed; to be asked before what is to be compared is read.
    pub fn generation(&self) -> u64 {
        self.recent.generation()
    }

    /// The paths of which something was said, heard or forgotten behind [`generation`](Self::generation) `since`, in order,
    /// some perhaps more than once. `None` if they are more than are remembered: then it may be any. Arenas that come and
    /// go by themselves are not among them.
    pub fn changed_since(&self, since: u64) -> Option<Vec<Key>> {
        self.recent.since(since)
    }

    pub(crate) fn notify(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// What a peer is called by whoever told of it last, if anybody did.
    pub fn name_of(&self, peer: PeerId) -> Option<String> {
        self.names.read().unwrap_or_else(PoisonError::into_inner).get(&peer).cloned()
    }

    /// Takes note of what a peer is called. Does nothing if that is known, or if nothing was ever heard of it.
    pub fn set_name(&self, peer: PeerId, name: &str) -> Result<(), NamespaceError> {
        if self.name_of(peer).is_some_and(|known| known == name) {
            return Ok(());
        }
        let named = self.write_if("take note of a name", |txn| {
            let Some(number) = txn.open_table(PEERS)?.get(peer.as_bytes())?.map(|number| number.value()) else {
                return Ok(None);
            };
            txn.open_table(NAMES)?.insert(number, name)?;
            Ok(Some(()))
        })?;
        if named.is_some() {
            self.names.write().unwrap_or_else(PoisonError::into_inner).insert(peer, name.to_owned());
        }
        Ok(())
    }

    /// The arenas that this machine holds or follows, by name.
    pub fn arenas(&self) -> Result<Vec<Arena>, NamespaceError> {
        self.read("list arenas", |txn| {
            let table = txn.open_table(ARENAS)?;
            let rows = table.iter()?;
            rows.map(|row| {
                let (name, row) = row?;
                let ArenaRow { dir, public, root } = decode(row.value())?;
                let dir = dir.map(|dir| PathBuf::from(std::ffi::OsString::from_vec(dir)));
                Ok(Arena { name: arena_name(name.value())?, dir, public, root })
            })
            .collect()
        })
    }

    /// Holds or follows an arena from now on, or changes how.
    pub fn set_arena(&self, arena: &Arena) -> Result<(), NamespaceError> {
        let dir = arena.dir.as_deref().map(|dir: &Path| dir.as_os_str().as_bytes().to_owned());
        let row = ArenaRow { dir, public: arena.public, root: arena.root };
        self.write("add an arena", |txn| {
            txn.open_table(ARENAS)?.insert(arena.name.as_str(), &encode(&row)?[..])?;
            Ok(())
        })
    }

    /// Gives up an arena, in one commit: says of everything here in it that it is withdrawn. No file is touched.
    ///
    /// `at` is the time, as in [`commit`](Self::commit).
    pub fn remove_arena(&self, arena: &ArenaName, at: u64) -> Result<(), NamespaceError> {
        self.write("remove an arena", |txn| {
            let mut tables = Tables::open(txn, &self.recent)?;
            let mut head = tables.head(ME)?;
            let mut after = Vec::new();
            loop {
                let page = tables.present_here(arena.as_str(), &after, PAGE_ROWS)?;
                let Some((last, _)) = page.last() else { break };
                after = last.clone();
                for (path, Version { mtime, .. }) in page {
                    let change = Change { path: rel_path(&path)?, content: Content::Withdrawn, mtime };
                    self.say(&mut tables, &mut head, arena, &change, at)?;
                }
            }
            tables.flush()?;
            tables.trim(ME, &mut head, self.history_limit())?;
            tables.set_head(ME, &head)?;
            txn.open_table(ARENAS)?.remove(arena.as_str())?;
            anchors::forget(&mut txn.open_table(ANCHORS)?, arena.as_str())
        })?;
        self.notify();
        Ok(())
    }

    /// What this machine has in `arena`, at or below `within` or anywhere: up to `max` paths behind `after`, in order.
    /// Fewer than `max` are the last ones.
    pub fn known(
        &self,
        arena: &ArenaName,
        within: Option<&RelPath>,
        after: Option<&RelPath>,
        max: usize,
    ) -> Result<Vec<Known>, NamespaceError> {
        self.known_of(None, arena, within, after, max)
    }

    /// The same for what `peer` has, so far as it was heard; `None` is this machine.
    pub fn known_of(
        &self,
        peer: Option<PeerId>,
        arena: &ArenaName,
        within: Option<&RelPath>,
        after: Option<&RelPath>,
        max: usize,
    ) -> Result<Vec<Known>, NamespaceError> {
        self.read("list an arena", |txn| {
            let of_whom = match peer {
                None => Some(ME),
                Some(peer) => txn.open_table(PEERS)?.get(peer.as_bytes())?.map(|number| number.value()),
            };
            let Some(of_whom) = of_whom else { return Ok(Vec::new()) };
            let versions = txn.open_table(VERSIONS)?;
            let arena = arena.as_str();
            let mut known = Vec::new();
            let mut from = after.map_or(Vec::new(), |after| after.as_bytes().to_owned());
            if let Some(within) = within {
                // What is in a directory "a" stands behind "a-b", which is not in it.
                if after.is_none()
                    && let Some(row) = versions.get((arena, within.as_bytes(), of_whom))?
                {
                    known.extend(present(within.as_bytes(), row.value())?);
                }
                from = from.max([within.as_bytes(), b"/"].concat());
            }
            let end = within.map(|within| [within.as_bytes(), &[b'/' + 1]].concat());
            for row in versions.range((Bound::Excluded((arena, &from[..], u32::MAX)), Bound::Unbounded))? {
                let (key, row) = row?;
                let (of, path, origin) = key.value();
                if of != arena || known.len() >= max || end.as_ref().is_some_and(|end| path >= &end[..]) {
                    break;
                }
                if origin == of_whom {
                    known.extend(present(path, row.value())?);
                }
            }
            Ok(known)
        })
    }

    /// Says `changes` in this machine's catalog, in order, in one commit, durable on return. What says nothing
    /// new gets no number. Returns the number of the last change of the log.
    ///
    /// The blobs named must be durable here already. `at` is the time, in milliseconds since 1970; it orders nothing.
    /// `holds` is asked inside the transaction of each change, in order, whether it is still so; what is not is left out.
    pub fn commit(
        &self,
        arena: &ArenaName,
        changes: &[Change],
        at: u64,
        holds: &mut dyn FnMut(&Change) -> bool,
    ) -> Result<u64, NamespaceError> {
        let (before, after) = self.write("commit changes", |txn| {
            let mut tables = Tables::open(txn, &self.recent)?;
            let mut head = tables.head(ME)?;
            let before = head.mark.seq;
            for change in changes {
                if holds(change) {
                    self.say(&mut tables, &mut head, arena, change, at)?;
                }
            }
            tables.flush()?;
            tables.trim(ME, &mut head, self.history_limit())?;
            tables.set_head(ME, &head)?;
            Ok((before, head.mark.seq))
        })?;
        if before != after {
            self.notify();
        }
        Ok(after)
    }

    fn say(
        &self,
        tables: &mut Tables<'_>,
        head: &mut HeadRow,
        arena: &ArenaName,
        change: &Change,
        at: u64,
    ) -> Result<(), redb::Error> {
        let Change { path, content, mtime } = change;
        let mut others = Vec::new();
        let mut old = None;
        for (origin, version) in tables.at(arena.as_str(), path.as_bytes())? {
            if origin == ME { old = Some(version) } else { others.push(version) }
        }
        let says_nothing_new = match &old {
            Some(old) if content.is_present() => (&old.content, old.mtime) == (content, *mtime),
            Some(old) => !old.content.is_present(),
            None => !content.is_present(),
        };
        if says_nothing_new {
            return Ok(());
        }
        head.mark = Mark { seq: head.mark.seq + 1, session: self.session(), ..head.mark };
        let previous = made_from(content, old.as_ref(), &others);
        let version = Version { content: content.clone(), mtime: *mtime, seq: head.mark.seq, previous };
        head.rows += u64::from(tables.put(arena.as_str(), path.as_bytes(), ME, &version)?);
        tables.note(ME, &LogRow { key: (arena.clone(), path.clone()), version, at })
    }

    /// The log of `peer`, or of this machine: up to `max` changes behind the seq `after`, so far as the log reaches back.
    pub fn history(&self, peer: Option<PeerId>, after: u64, max: usize) -> Result<Vec<Happened>, NamespaceError> {
        self.read("read the log", |txn| {
            let number = match peer {
                None => ME,
                Some(peer) => match txn.open_table(PEERS)?.get(peer.as_bytes())? {
                    Some(number) => number.value(),
                    None => return Ok(Vec::new()),
                },
            };
            let log = txn.open_table(LOG)?;
            let rows = log.range((Bound::Excluded((number, after)), Bound::Included((number, u64::MAX))))?;
            rows.take(max)
                .map(|row| {
                    let LogRow { key: (arena, path), version, at } = decode(row?.1.value())?;
                    Ok(Happened { arena, path, version, at })
                })
                .collect()
        })
    }

    /// The peers, this machine left out, that may have `blob` at some path, so far as is known. A hint: the rows tell
    /// blobs apart by their first 8 bytes.
    pub fn peers_with(&self, blob: BlobId) -> Result<Vec<PeerId>, NamespaceError> {
        self.read("look up a blob", |txn| {
            let table = txn.open_table(BLOBS)?;
            let numbers = table
                .range((prefix(blob), ME + 1)..=(prefix(blob), u32::MAX))?
                .map(|row| Ok(row?.0.value().1))
                .collect::<Result<Vec<_>, redb::Error>>()?;
            let peers = txn.open_table(PEERS)?;
            let mut found = Vec::new();
            for row in peers.iter()? {
                let (peer, number) = row?;
                if numbers.contains(&number.value()) {
                    found.push(PeerId::from_bytes(*peer.value()));
                }
            }
            Ok(found)
        })
    }

    /// What any peer has said of a path, as far as the logs reach back. Reads all of them.
    pub fn past(&self, arena: &ArenaName, path: &RelPath) -> Result<Vec<Version>, NamespaceError> {
        self.read("look through the logs", |txn| {
            let mut found = Vec::new();
            for row in txn.open_table(LOG)?.iter()? {
                let LogRow { key, version, .. } = decode(row?.1.value())?;
                if (&key.0, &key.1) == (arena, path) {
                    found.push(version);
                }
            }
            Ok(found)
        })
    }

    /// Runs `body` in a write transaction and commits it, durable on return.
    pub(crate) fn write<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, NamespaceError> {
        self.transact(action, body, |_| true)
    }

    /// The same, where nothing is committed if `body` gives nothing.
    pub(crate) fn write_if<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&WriteTransaction) -> Result<Option<T>, redb::Error>,
    ) -> Result<Option<T>, NamespaceError> {
        self.transact(action, body, Option::is_some)
    }

    fn transact<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
        is_kept: impl FnOnce(&T) -> bool,
    ) -> Result<T, NamespaceError> {
        let run = || -> Result<(T, bool), redb::Error> {
            let mut txn = self.db.begin_write()?;
            txn.set_quick_repair(true);
            let result = body(&txn)?;
            let is_kept = is_kept(&result);
            if is_kept {
                txn.commit()?
            } else {
                txn.abort()?
            }
            Ok((result, is_kept))
        };
        // Until what was touched is told, no other transaction of this namespace touches anything.
        let _turn = self.recent.turn();
        let outcome = run();
        self.recent.end(outcome.as_ref().is_ok_and(|&(_, is_kept)| is_kept));
        outcome
            .map(|(result, _)| result)
            .map_err(|source| NamespaceError::Database { action, source: Box::new(source) })
    }

    /// Runs `body` on one unchanging view of the rows.
    pub(crate) fn read<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, NamespaceError> {
        let run = || body(&self.db.begin_read()?);
        run().map_err(|source| NamespaceError::Database { action, source: Box::new(source) })
    }
}

fn present(path: &[u8], row: &[u8]) -> Result<Option<Known>, redb::Error> {
    let version: Version = decode(row)?;
    let path = rel_path(path)?;
    Ok(version.content.is_present().then_some(Known { path, version }))
}

/// How far `origin` was heard, if it is known at all.
pub(crate) fn find_head(txn: &ReadTransaction, origin: PeerId) -> Result<Option<HeadRow>, redb::Error> {
    let Some(number) = txn.open_table(PEERS)?.get(origin.as_bytes())? else { return Ok(None) };
    txn.open_table(HEADS)?.get(number.value())?.map(|row| decode(row.value())).transpose()
}

/// The number that stands for `peer` in rows, a new one if it has none.
pub(crate) fn peer_number(txn: &WriteTransaction, peer: PeerId) -> Result<u32, redb::Error> {
    let mut peers = txn.open_table(PEERS)?;
    if let Some(number) = peers.get(peer.as_bytes())? {
        return Ok(number.value());
    }
    let mut last = ME;
    for row in peers.iter()? {
        last = last.max(row?.1.value());
    }
    peers.insert(peer.as_bytes(), last + 1)?;
    Ok(last + 1)
}

/// The session of an origin in which `seq` was said; 0 if none is known.
pub(crate) fn session_of(
    sessions: &impl ReadableTable<(u32, u64), u64>,
    origin: u32,
    seq: u64,
) -> Result<u64, redb::Error> {
    let last = sessions.range((origin, 0)..=(origin, seq))?.next_back().transpose()?;
    Ok(last.map_or(0, |(_, session)| session.value()))
}

pub(crate) fn arena_name(name: &str) -> Result<ArenaName, redb::Error> {
    name.parse().map_err(|error| redb::Error::Corrupted(format!("{error}")))
}

pub(crate) fn rel_path(path: &[u8]) -> Result<RelPath, redb::Error> {
    path.to_owned().try_into().map_err(|error| redb::Error::Corrupted(format!("{error}")))
}

const PAGE_ROWS: usize = 4096;
