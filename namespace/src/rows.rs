//! The tables, and how rows stand in them. Format: spec/namespace.md, "Rows".

use redb::TableDefinition;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Key, Mark, Version};

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

pub(crate) fn encode<T: Serialize>(row: &T) -> Result<Vec<u8>, redb::Error> {
    postcard::to_stdvec(row).map_err(|error| redb::Error::Corrupted(format!("encode a row: {error}")))
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, redb::Error> {
    postcard::from_bytes(bytes).map_err(|error| redb::Error::Corrupted(format!("decode a row: {error}")))
}
