use std::{
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, Table, WriteTransaction};
use tokio::sync::watch;
use tree::{BlobId, Fingerprint, UnixTime};

use crate::{
    ArenaName, Content, PeerId, RelPath, Version,
    rows::{
        ARENAS, ArenaRow, BLOBS, FORMAT, HEADS, LOCAL, LOG, ME, META, PEERS, VERSIONS, VersionKey, VersionRow, decode,
        encode,
    },
};

/// What every peer has at every path. Cheap to clone; the clones are one namespace.
#[derive(Clone)]
pub struct Namespace {
    db: Arc<Database>,
    heads: Arc<watch::Sender<u64>>,
    epoch: u64,
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
}

/// What is now at a path of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The path.
    pub path: RelPath,
    /// What is there.
    pub content: Content,
    /// Its mtime; for a deletion, when it was noticed or happened.
    pub mtime: UnixTime,
    /// The fingerprint of the file, if one is there.
    pub fingerprint: Option<Fingerprint>,
}

/// What this machine said last of a path of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The path.
    pub path: RelPath,
    /// What was said.
    pub version: Version,
    /// The file's fingerprint at that time, if it is a file.
    pub fingerprint: Option<Fingerprint>,
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
}

impl Namespace {
    /// Opens the namespace whose rows are in `db`, and makes it if it is not there: then its log begins with the
    /// epoch `new_epoch`, which must be random.
    pub fn open(db: Arc<Database>, new_epoch: u64) -> Result<Self, NamespaceError> {
        let mut namespace = Self { db, heads: Arc::new(watch::Sender::new(0)), epoch: 0 };
        let (epoch, head) = namespace.write("open the namespace", |txn| {
            let mut meta = txn.open_table(META)?;
            let mut get = |key, default| -> Result<u64, redb::Error> {
                let value = meta.get(key)?.map_or(default, |value| value.value());
                meta.insert(key, value)?;
                Ok(value)
            };
            let format = get("format", FORMAT)?;
            if format != FORMAT {
                return Err(redb::Error::Corrupted(format!("namespace format {format}, this program knows {FORMAT}")));
            }
            txn.open_table(ARENAS)?;
            txn.open_table(PEERS)?;
            txn.open_table(HEADS)?;
            txn.open_table(VERSIONS)?;
            txn.open_table(LOG)?;
            txn.open_table(LOCAL)?;
            txn.open_table(BLOBS)?;
            Ok((get("epoch", new_epoch)?, get("head", 0)?))
        })?;
        namespace.epoch = epoch;
        namespace.heads.send_replace(head);
        Ok(namespace)
    }

    /// The epoch of this machine's log.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number of the last change in this machine's log, 0 if there is none; and a notice of each further one.
    pub fn head(&self) -> watch::Receiver<u64> {
        self.heads.subscribe()
    }

    /// The arenas that this machine holds or follows, by name.
    pub fn arenas(&self) -> Result<Vec<Arena>, NamespaceError> {
        self.read("list arenas", |txn| {
            let table = txn.open_table(ARENAS)?;
            let rows = table.iter()?;
            rows.map(|row| {
                let (name, row) = row?;
                let row: ArenaRow = decode(row.value())?;
                let dir = row.dir.map(|dir| PathBuf::from(std::ffi::OsString::from_vec(dir)));
                Ok(Arena { name: arena_name(name.value())?, dir, public: row.public })
            })
            .collect()
        })
    }

    /// Holds or follows an arena from now on, or changes how.
    pub fn set_arena(&self, arena: &Arena) -> Result<(), NamespaceError> {
        let dir = arena.dir.as_deref().map(|dir: &Path| dir.as_os_str().as_bytes().to_owned());
        let row = ArenaRow { dir, public: arena.public };
        self.write("add an arena", |txn| {
            txn.open_table(ARENAS)?.insert(arena.name.as_str(), &encode(&row)?[..])?;
            Ok(())
        })
    }

    /// Gives up an arena: says of everything here in it that it is withdrawn. No file is touched.
    pub fn remove_arena(&self, arena: &ArenaName) -> Result<(), NamespaceError> {
        let known = self.known(arena, None, usize::MAX)?;
        let withdrawn = known.into_iter().map(|known| Change {
            path: known.path,
            content: Content::Withdrawn,
            mtime: known.version.mtime,
            fingerprint: None,
        });
        self.commit(arena, &withdrawn.collect::<Vec<_>>())?;
        self.write("remove an arena", |txn| {
            txn.open_table(ARENAS)?.remove(arena.as_str())?;
            Ok(())
        })
    }

    /// What this machine has in `arena`: up to `max` paths behind `after`, in order.
    pub fn known(&self, arena: &ArenaName, after: Option<&RelPath>, max: usize) -> Result<Vec<Known>, NamespaceError> {
        self.read("list an arena", |txn| {
            let (versions, local) = (txn.open_table(VERSIONS)?, txn.open_table(LOCAL)?);
            let from = after.map_or(&[][..], RelPath::as_bytes);
            let mut known = Vec::new();
            for row in versions.range((arena.as_str(), from, 0)..)? {
                let (key, row) = row?;
                let (of, path, peer) = key.value();
                if of != arena.as_str() || known.len() == max {
                    break;
                }
                if peer != ME || after.is_some_and(|after| after.as_bytes() == path) {
                    continue;
                }
                let VersionRow { version, .. } = decode(row.value())?;
                if version.content.is_present() {
                    let fingerprint = local.get((of, path))?.map(|row| decode(row.value())).transpose()?;
                    known.push(Known { path: rel_path(path)?, version, fingerprint });
                }
            }
            Ok(known)
        })
    }

    /// Says `changes` in this machine's catalog, in order, in one commit, durable on return. What says nothing
    /// new gets no number. Returns the number of the last change of the log.
    ///
    /// The blobs named must be durable here already.
    pub fn commit(&self, arena: &ArenaName, changes: &[Change]) -> Result<u64, NamespaceError> {
        let head = self.write("commit changes", |txn| {
            let mut meta = txn.open_table(META)?;
            let mut head = meta.get("head")?.map_or(0, |head| head.value());
            let mut tables = Tables::open(txn)?;
            let (mut log, mut local) = (txn.open_table(LOG)?, txn.open_table(LOCAL)?);
            for change in changes {
                let path = change.path.as_bytes();
                match &change.fingerprint {
                    Some(fingerprint) => drop(local.insert((arena.as_str(), path), &encode(fingerprint)?[..])?),
                    None => drop(local.remove((arena.as_str(), path))?),
                }
                let old = tables.get(arena.as_str(), path, ME)?.map(|row| row.version);
                let says_nothing_new = match &old {
                    Some(old) if change.content.is_present() => {
                        (&old.content, old.mtime) == (&change.content, change.mtime)
                    }
                    Some(old) => !old.content.is_present(),
                    None => !change.content.is_present(),
                };
                if says_nothing_new {
                    continue;
                }
                if let Some(old) = old {
                    log.remove(old.seq)?;
                }
                head += 1;
                log.insert(head, (arena.as_str(), path))?;
                let version = Version { content: change.content.clone(), mtime: change.mtime, seq: head };
                tables.put(arena.as_str(), path, ME, VersionRow { version, generation: 0 })?;
            }
            meta.insert("head", head)?;
            Ok(head)
        })?;
        self.heads.send_if_modified(|known| std::mem::replace(known, head.max(*known)) < head);
        Ok(head)
    }

    /// The peers, this machine left out, that have `blob` at some path, so far as is known.
    pub fn peers_with(&self, blob: BlobId) -> Result<Vec<PeerId>, NamespaceError> {
        self.read("look up a blob", |txn| {
            let table = txn.open_table(BLOBS)?;
            let numbers = table
                .range((blob.as_bytes(), ME + 1)..=(blob.as_bytes(), u32::MAX))?
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

    /// Runs `body` in a write transaction and commits it, durable on return.
    pub(crate) fn write<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, NamespaceError> {
        let run = || -> Result<T, redb::Error> {
            let mut txn = self.db.begin_write()?;
            txn.set_quick_repair(true);
            let result = body(&txn)?;
            txn.commit()?;
            Ok(result)
        };
        run().map_err(|source| NamespaceError::Database { action, source: Box::new(source) })
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

/// The two tables that a change of a version moves together.
pub(crate) struct Tables<'txn> {
    pub(crate) versions: Table<'txn, VersionKey, &'static [u8]>,
    blobs: Table<'txn, (&'static [u8; 32], u32), u64>,
}

impl<'txn> Tables<'txn> {
    pub(crate) fn open(txn: &'txn WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self { versions: txn.open_table(VERSIONS)?, blobs: txn.open_table(BLOBS)? })
    }

    pub(crate) fn get(&self, arena: &str, path: &[u8], peer: u32) -> Result<Option<VersionRow>, redb::Error> {
        self.versions.get((arena, path, peer))?.map(|row| decode(row.value())).transpose()
    }

    /// Sets a row, and keeps count of where its blob is. Returns whether the row is new.
    pub(crate) fn put(&mut self, arena: &str, path: &[u8], peer: u32, row: VersionRow) -> Result<bool, redb::Error> {
        let old = self.versions.insert((arena, path, peer), &encode(&row)?[..])?;
        let old = old.map(|old| decode::<VersionRow>(old.value())).transpose()?;
        let is_new = old.is_none();
        let (before, after) = (old.and_then(|old| old.version.content.blob()), row.version.content.blob());
        if before != after {
            self.count(before, peer, -1)?;
            self.count(after, peer, 1)?;
        }
        Ok(is_new)
    }

    pub(crate) fn remove(&mut self, arena: &str, path: &[u8], peer: u32) -> Result<(), redb::Error> {
        let old = self.versions.remove((arena, path, peer))?;
        let old = old.map(|old| decode::<VersionRow>(old.value())).transpose()?;
        self.count(old.and_then(|old| old.version.content.blob()), peer, -1)
    }

    fn count(&mut self, blob: Option<BlobId>, peer: u32, change: i64) -> Result<(), redb::Error> {
        let Some(blob) = blob else { return Ok(()) };
        let key = (blob.as_bytes(), peer);
        let count = self.blobs.get(key)?.map_or(0, |count| count.value()).saturating_add_signed(change);
        if count == 0 {
            self.blobs.remove(key)?;
        } else {
            self.blobs.insert(key, count)?;
        }
        Ok(())
    }
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

pub(crate) fn arena_name(name: &str) -> Result<ArenaName, redb::Error> {
    name.parse().map_err(|error| redb::Error::Corrupted(format!("{error}")))
}

pub(crate) fn rel_path(path: &[u8]) -> Result<RelPath, redb::Error> {
    path.to_owned().try_into().map_err(|error| redb::Error::Corrupted(format!("{error}")))
}
