//! The tables, and how rows stand in them. Format: spec/namespace.md, "Rows".

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Anchor, Key, Mark, Version};

/// `"format"` → a number.
pub(crate) const META: TableDefinition<&str, u64> = TableDefinition::new("namespace.meta");
/// Arena of this machine → [`ArenaRow`].
pub(crate) const ARENAS: TableDefinition<&str, &[u8]> = TableDefinition::new("namespace.arenas");
/// Peer → the short number that stands for it in rows; this machine is [`ME`] and is not in it.
pub(crate) const PEERS: TableDefinition<&[u8; 32], u32> = TableDefinition::new("namespace.peers");
/// Peer's number → what it is called by whoever told of it.
pub(crate) const NAMES: TableDefinition<u32, &str> = TableDefinition::new("namespace.names");
/// Origin's number → [`HeadRow`].
pub(crate) const HEADS: TableDefinition<u32, &[u8]> = TableDefinition::new("namespace.heads");
/// Origin's number, the first seq that one of its sessions may say → the session. Of others, exact from the floor on.
pub(crate) const SESSIONS: TableDefinition<(u32, u64), u64> = TableDefinition::new("namespace.sessions");
/// Arena, path, origin's number → [`Version`].
pub(crate) const VERSIONS: TableDefinition<VersionKey, &[u8]> = TableDefinition::new("namespace.versions");
/// Origin's number, seq → [`LogRow`].
pub(crate) const LOG: TableDefinition<(u32, u64), &[u8]> = TableDefinition::new("namespace.log");
/// Arena, and a path in it, or nothing for all of it: what is to be kept on this machine.
pub(crate) const PINS: TableDefinition<(&str, &[u8]), ()> = TableDefinition::new("namespace.pins");
/// The first 8 bytes of a blob id, and the number of a peer, not this machine's → at how many paths the peer has it.
pub(crate) const BLOBS: TableDefinition<(u64, u32), u64> = TableDefinition::new("namespace.blobs");

/// Arena, and the path of a mount point in it, or nothing for the arena root → [`Anchor`].
pub(crate) const ANCHORS: TableDefinition<(&str, &[u8]), &[u8]> = TableDefinition::new("namespace.anchors");
/// Arena, path, blob → [`DepartedRow`]: a file that was pinned here and that its owner has deleted.
pub(crate) const DEPARTED: TableDefinition<DepartedKey, &[u8]> = TableDefinition::new("namespace.departed");
/// Arena, origin's number, when it was heard → [`MassRow`]: a deletion of most of what was pinned here of an arena.
pub(crate) const MASS_DELETIONS: TableDefinition<MassKey, &[u8]> = TableDefinition::new("namespace.mass_deletions");

/// Arena, path, blob.
pub(crate) type DepartedKey = (&'static str, &'static [u8], &'static [u8; 32]);
/// Arena, origin's number, milliseconds since 1970.
pub(crate) type MassKey = (&'static str, u32, u64);

/// Arena, path, origin's number.
pub(crate) type VersionKey = (&'static str, &'static [u8], u32);

/// The number of the format that this code reads and writes.
pub(crate) const FORMAT: u64 = 2;

/// This machine's number.
pub(crate) const ME: u32 = 0;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ArenaRow {
    /// The arena root, if this machine holds the arena and does not just follow it.
    pub(crate) dir: Option<Vec<u8>>,
    /// Whether strangers may read its blobs.
    pub(crate) public: bool,
    /// Device and inode of the arena root.
    pub(crate) root: Option<(u64, u64)>,
}

/// How far an origin's catalog has been heard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HeadRow {
    /// What is known is true as of this mark; while a listing is coming, the mark as of which that one is.
    pub(crate) mark: Mark,
    /// While a listing is coming: the key up to which it came.
    pub(crate) after: Option<Key>,
    /// All changes behind this seq are in the log.
    pub(crate) floor: u64,
    /// Whether a listing has ever come to its end.
    pub(crate) heard: bool,
    /// The number of the peer who told last.
    pub(crate) via: u32,
    /// How many rows the origin has.
    pub(crate) rows: u64,
}

/// One change of a catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogRow {
    pub(crate) key: Key,
    pub(crate) version: Version,
    /// When the origin noticed, in milliseconds since 1970.
    pub(crate) at: u64,
}

/// A file that was pinned here, and that its owner has deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DepartedRow {
    /// The file's size in bytes.
    pub(crate) size: u64,
    /// The owner's number.
    pub(crate) origin: u32,
    /// The number of the deletion in the owner's log; 0 if a listing no longer had the file.
    pub(crate) seq: u64,
    /// When the deletion was noticed here, in milliseconds since 1970; 0 until it is.
    pub(crate) since: u64,
}

/// A deletion of most of what was pinned here of an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MassRow {
    /// Files that were deleted.
    pub(crate) files: u64,
    /// Files that there were before.
    pub(crate) of: u64,
}

pub(crate) fn encode<T: Serialize>(row: &T) -> Result<Vec<u8>, redb::Error> {
    postcard::to_stdvec(row).map_err(|error| redb::Error::Corrupted(format!("encode a row: {error}")))
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, redb::Error> {
    postcard::from_bytes(bytes).map_err(|error| redb::Error::Corrupted(format!("decode a row: {error}")))
}

/// How many rows the namespace has in `db`, and how many of these do not decode.
pub fn count_rows(db: &Database) -> Result<(u64, u64), redb::Error> {
    let txn = db.begin_read()?;
    let mut rows = (0, 0);
    count(&txn, ARENAS, &mut rows, |row| decode::<ArenaRow>(row).is_ok())?;
    count(&txn, ANCHORS, &mut rows, |row| decode::<Anchor>(row).is_ok())?;
    count(&txn, HEADS, &mut rows, |row| decode::<HeadRow>(row).is_ok())?;
    count(&txn, VERSIONS, &mut rows, |row| decode::<Version>(row).is_ok())?;
    count(&txn, LOG, &mut rows, |row| decode::<LogRow>(row).is_ok())?;
    count(&txn, DEPARTED, &mut rows, |row| decode::<DepartedRow>(row).is_ok())?;
    count(&txn, MASS_DELETIONS, &mut rows, |row| decode::<MassRow>(row).is_ok())?;
    Ok(rows)
}

fn count<K: redb::Key + 'static>(
    txn: &ReadTransaction,
    table: TableDefinition<K, &[u8]>,
    (all, bad): &mut (u64, u64),
    is_good: impl Fn(&[u8]) -> bool,
) -> Result<(), redb::Error> {
    for row in txn.open_table(table)?.iter()? {
        *all += 1;
        *bad += u64::from(!is_good(row?.1.value()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_what_departed() {
        let row = DepartedRow { size: 300, origin: 2, seq: 0, since: 1_700_000_000_000 };
        assert_eq!(encode(&row).unwrap(), [0xac, 2, 2, 0, 0x80, 0xd0, 0x95, 0xff, 0xbc, 0x31]);
        assert_eq!(decode::<DepartedRow>(&encode(&row).unwrap()).unwrap(), row);
        assert_eq!(encode(&MassRow { files: 120, of: 150 }).unwrap(), [120, 0x96, 1]);
    }
}
