//! The tables, and how rows stand in them. Format: spec/namespace.md, "Rows".

use redb::TableDefinition;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::Version;

/// `"format"`, `"epoch"`, `"head"` → a number.
pub(crate) const META: TableDefinition<&str, u64> = TableDefinition::new("namespace.meta");
/// Arena of this machine → [`ArenaRow`].
pub(crate) const ARENAS: TableDefinition<&str, &[u8]> = TableDefinition::new("namespace.arenas");
/// Peer → the short number that stands for it in rows; this machine is [`ME`] and is not in it.
pub(crate) const PEERS: TableDefinition<&[u8; 32], u32> = TableDefinition::new("namespace.peers");
/// Peer's number → [`HeadRow`].
pub(crate) const HEADS: TableDefinition<u32, &[u8]> = TableDefinition::new("namespace.heads");
/// Arena, path, peer's number → [`VersionRow`].
pub(crate) const VERSIONS: TableDefinition<VersionKey, &[u8]> = TableDefinition::new("namespace.versions");
/// Seq of this machine's log → arena and path.
pub(crate) const LOG: TableDefinition<u64, (&str, &[u8])> = TableDefinition::new("namespace.log");
/// Arena and path → this machine's fingerprint of the file there.
pub(crate) const LOCAL: TableDefinition<(&str, &[u8]), &[u8]> = TableDefinition::new("namespace.local");
/// Blob and peer's number → at how many paths the peer has it.
pub(crate) const BLOBS: TableDefinition<(&[u8; 32], u32), u64> = TableDefinition::new("namespace.blobs");

/// Arena, path, peer's number.
pub(crate) type VersionKey = (&'static str, &'static [u8], u32);

/// The number of the format that this code reads and writes.
pub(crate) const FORMAT: u64 = 1;

/// This machine's number.
pub(crate) const ME: u32 = 0;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ArenaRow {
    /// The arena root, if this machine holds the arena and does not just follow it.
    pub(crate) dir: Option<Vec<u8>>,
    /// Whether strangers may read its blobs.
    pub(crate) public: bool,
}

/// How far a peer's catalog has been heard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HeadRow {
    pub(crate) epoch: u64,
    pub(crate) seq: u64,
    /// Counts listings. Rows of an older generation go when the listing that began this one is complete.
    pub(crate) generation: u32,
    /// Whether that listing is still coming.
    pub(crate) listing: bool,
    /// How many rows the peer has.
    pub(crate) rows: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VersionRow {
    pub(crate) version: Version,
    pub(crate) generation: u32,
}

pub(crate) fn encode<T: Serialize>(row: &T) -> Result<Vec<u8>, redb::Error> {
    postcard::to_stdvec(row).map_err(|error| redb::Error::Corrupted(format!("encode a row: {error}")))
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, redb::Error> {
    postcard::from_bytes(bytes).map_err(|error| redb::Error::Corrupted(format!("decode a row: {error}")))
}
