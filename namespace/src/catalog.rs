use redb::ReadableTable;
use serde::{Deserialize, Serialize};

use crate::{
    ArenaName, Namespace, NamespaceError, PeerId, RelPath, Version,
    namespace::{Tables, arena_name, peer_number, rel_path},
    rows::{HEADS, HeadRow, LOG, ME, META, PEERS, VERSIONS, VersionRow, decode, encode},
};

/// How far a catalog has been heard: all changes of `epoch` up to `seq`. The default is nothing at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// The log's epoch; 0 stands for none.
    pub epoch: u64,
    /// The number of the last change heard.
    pub seq: u64,
}

/// One row of a catalog as its peer says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// The arena.
    pub arena: ArenaName,
    /// The path.
    pub path: RelPath,
    /// What is there, since which change.
    pub version: Version,
}

/// A part of a catalog: what was last said of each path whose last change is behind the cursor asked from, in
/// the order of these changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Whether this begins a listing of everything, because the cursor asked from is not of this log.
    pub restart: bool,
    /// The rows, by ascending seq.
    pub statements: Vec<Statement>,
    /// Where this batch ends: everything up to here has been said.
    pub upto: Cursor,
    /// The log's last change when the batch was made; a listing is complete when `upto` has reached it.
    pub head: u64,
}

/// Why a peer's batch was refused.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The batch breaks the rules of spec/namespace.md.
    #[error("the peer's catalog is invalid: {0}")]
    PeerMisbehaved(&'static str),
    /// The peer has more rows than are taken from one peer.
    #[error("the peer's catalog has more than {PEER_ROWS_MAX} rows")]
    TooManyRows,
    /// Our database failed.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

impl Namespace {
    /// What this machine's catalog says behind `after`, about `bytes_max` bytes of it and at least one row. If
    /// there is nothing, a batch without statements.
    pub fn batch(&self, after: Cursor, bytes_max: usize) -> Result<Batch, NamespaceError> {
        let epoch = self.epoch();
        self.read("read the log", |txn| {
            let head = txn.open_table(META)?.get("head")?.map_or(0, |head| head.value());
            let (log, versions) = (txn.open_table(LOG)?, txn.open_table(VERSIONS)?);
            let restart = after.epoch != epoch || after.seq > head;
            let from = if restart { 0 } else { after.seq };
            let (mut statements, mut bytes, mut upto) = (Vec::<Statement>::new(), 0, head);
            for row in log.range(from + 1..)? {
                let (seq, key) = row?;
                if let Some(last) = statements.last().filter(|_| bytes >= bytes_max) {
                    upto = last.version.seq;
                    break;
                }
                let (arena, path) = key.value();
                let Some(row) = versions.get((arena, path, ME))? else {
                    return Err(redb::Error::Corrupted(format!("the log's change {} has no row", seq.value())));
                };
                bytes += arena.len() + path.len() + row.value().len();
                let VersionRow { version, .. } = decode(row.value())?;
                statements.push(Statement { arena: arena_name(arena)?, path: rel_path(path)?, version });
            }
            Ok(Batch { restart, statements, upto: Cursor { epoch, seq: upto }, head })
        })
    }

    /// How far `peer`'s catalog has been heard.
    pub fn cursor(&self, peer: PeerId) -> Result<Cursor, NamespaceError> {
        self.read("look up a peer", |txn| {
            let Some(number) = txn.open_table(PEERS)?.get(peer.as_bytes())? else { return Ok(Cursor::default()) };
            let head = txn.open_table(HEADS)?.get(number.value())?.map(|row| decode::<HeadRow>(row.value()));
            let head = head.transpose()?.unwrap_or_default();
            Ok(Cursor { epoch: head.epoch, seq: head.seq })
        })
    }

    /// Whether all of `peer`'s catalog has been heard once: not if nothing has, or if a listing is still coming.
    pub fn is_complete(&self, peer: PeerId) -> Result<bool, NamespaceError> {
        self.read("look up a peer", |txn| {
            let Some(number) = txn.open_table(PEERS)?.get(peer.as_bytes())? else { return Ok(false) };
            let head = txn.open_table(HEADS)?.get(number.value())?.map(|row| decode::<HeadRow>(row.value()));
            Ok(head.transpose()?.is_some_and(|head| head.epoch != 0 && !head.listing))
        })
    }

    /// Takes in what `peer` says of itself, in one commit, durable on return. Batches must come in order.
    pub fn apply(&self, peer: PeerId, batch: &Batch) -> Result<(), ApplyError> {
        let mut refused = None;
        self.write("take in a catalog", |txn| {
            let number = peer_number(txn, peer)?;
            let mut heads = txn.open_table(HEADS)?;
            let head = heads.get(number)?.map(|row| decode::<HeadRow>(row.value())).transpose()?.unwrap_or_default();
            let mut head = match begin(head, batch) {
                Ok(head) => head,
                Err(error) => {
                    refused = Some(error);
                    return Ok(());
                }
            };
            let mut tables = Tables::open(txn)?;
            for Statement { arena, path, version } in &batch.statements {
                let row = VersionRow { version: version.clone(), generation: head.generation };
                head.rows += u64::from(tables.put(arena.as_str(), path.as_bytes(), number, row)?);
            }
            if head.rows > PEER_ROWS_MAX {
                return Err(redb::Error::Corrupted(TOO_MANY_ROWS.into()));
            }
            if head.listing && batch.upto.seq >= batch.head {
                head.listing = false;
                head.rows -= sweep(&mut tables, number, head.generation)?;
            }
            heads.insert(number, &encode(&head)?[..])?;
            Ok(())
        })
        .map_err(|error| match &error {
            NamespaceError::Database { source, .. } if matches!(&**source, redb::Error::Corrupted(why) if why == TOO_MANY_ROWS) => {
                ApplyError::TooManyRows
            }
            _ => ApplyError::Namespace(error),
        })?;
        refused.map_or(Ok(()), |why| Err(ApplyError::PeerMisbehaved(why)))
    }

    /// Forgets everything that `peer` has said.
    pub fn forget_peer(&self, peer: PeerId) -> Result<(), NamespaceError> {
        self.write("forget a peer", |txn| {
            let Some(number) = txn.open_table(PEERS)?.remove(peer.as_bytes())?.map(|number| number.value()) else {
                return Ok(());
            };
            txn.open_table(HEADS)?.remove(number)?;
            // No listing has this generation, for counting them starts at 1.
            sweep(&mut Tables::open(txn)?, number, 0)?;
            Ok(())
        })
    }
}

/// Checks that `batch` follows on `head`, and gives the head behind it.
fn begin(head: HeadRow, batch: &Batch) -> Result<HeadRow, &'static str> {
    let mut head = if batch.restart {
        HeadRow { epoch: batch.upto.epoch, seq: 0, generation: head.generation + 1, listing: true, rows: head.rows }
    } else {
        head
    };
    if batch.upto.epoch != head.epoch {
        return Err("its epoch changed without a restart");
    }
    if batch.upto.epoch == 0 {
        return Err("its epoch is 0");
    }
    if batch.upto.seq < head.seq || batch.upto.seq > batch.head {
        return Err("it runs backwards");
    }
    let mut last = head.seq;
    for Statement { version, .. } in &batch.statements {
        if version.seq <= last || version.seq > batch.upto.seq {
            return Err("its changes are out of order");
        }
        if !version.content.is_valid() || version.mtime.nanos > 999_999_999 {
            return Err("a version is out of bounds");
        }
        last = version.seq;
    }
    head.seq = batch.upto.seq;
    Ok(head)
}

/// Deletes the rows of a peer that are not of this generation; returns how many.
fn sweep(tables: &mut Tables<'_>, peer: u32, generation: u32) -> Result<u64, redb::Error> {
    let mut stale = Vec::new();
    for row in tables.versions.iter()? {
        let (key, row) = row?;
        let (arena, path, of) = key.value();
        if of == peer && decode::<VersionRow>(row.value())?.generation != generation {
            stale.push((arena.to_owned(), path.to_owned()));
        }
    }
    for (arena, path) in &stale {
        tables.remove(arena, path, peer)?;
    }
    Ok(stale.len() as u64)
}

const PEER_ROWS_MAX: u64 = 20_000_000;
const TOO_MANY_ROWS: &str = "too many rows";
