//! The tables, and how rows stand in them. Format: spec/store.md, "Rows".

use redb::TableDefinition;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::warn;
use tree::{BlobId, Fingerprint, RangeSet};

/// `"format"` → the number of this format.
pub(crate) const META: TableDefinition<&str, u32> = TableDefinition::new("store.meta");
/// Root → its directory.
pub(crate) const ROOTS: TableDefinition<u32, &[u8]> = TableDefinition::new("store.roots");
/// File in place → [`FileRow`].
pub(crate) const FILES: TableDefinition<FileKey, &[u8]> = TableDefinition::new("store.files");
/// Blob and a file that has it in place. Says the same as [`FILES`], the other way round.
pub(crate) const HOLDERS: TableDefinition<(&[u8; 32], u32, &[u8]), ()> = TableDefinition::new("store.holders");
/// Blob in place → its outboard, where that is at most [`INLINE_OUTBOARD_BYTES`] long and not empty.
pub(crate) const OUTBOARDS: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("store.outboards");
/// Cached blob → [`CachedRow`].
pub(crate) const CACHED: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("store.cached");
/// Cached blob of at most a chunk group → its bytes.
pub(crate) const INLINE: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("store.inline");
/// Cached blob → a number that is the higher, the later it was used last.
pub(crate) const USED: TableDefinition<&[u8; 32], u64> = TableDefinition::new("store.used");
/// Blob of which nothing is evicted.
pub(crate) const PINS: TableDefinition<&[u8; 32], ()> = TableDefinition::new("store.pins");
/// File in place, or cached blob → [`Verified`](crate::Verified).
pub(crate) const VERIFIED: TableDefinition<FileKey, &[u8]> = TableDefinition::new("store.verified");
/// File that is being mended → its fingerprint before.
pub(crate) const MENDING: TableDefinition<FileKey, &[u8]> = TableDefinition::new("store.mending");

/// Root and path below it.
pub(crate) type FileKey = (u32, &'static [u8]);

/// The number of the format that this code reads and writes.
pub(crate) const FORMAT: u32 = 1;

/// Longer outboards, those of blobs above 4 MiB and a chunk group, are files of their own.
pub(crate) const INLINE_OUTBOARD_BYTES: u64 = 16 << 10;

/// What is known of a file in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRow {
    /// What its bytes are.
    pub blob: BlobId,
    /// What it was like when that was found.
    pub fingerprint: Fingerprint,
    /// Quarantine: the chunk groups that do not prove and are served to nobody.
    pub damaged: RangeSet,
}

/// What is known of a cached blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CachedRow {
    /// In bytes: proven if the last chunk group is among `proven`, and otherwise what a peer claims.
    pub(crate) size: u64,
    /// The bytes that are here, proven and durable.
    pub(crate) proven: RangeSet,
}

pub(crate) fn encode<T: Serialize>(row: &T) -> Result<Vec<u8>, redb::Error> {
    postcard::to_stdvec(row).map_err(|error| redb::Error::Corrupted(format!("encode a row: {error}")))
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, redb::Error> {
    postcard::from_bytes(bytes).map_err(|error| redb::Error::Corrupted(format!("decode a row: {error}")))
}

/// The same, where a row that does not decode counts as none: one bad row must not take the others along.
pub(crate) fn decode_or_none<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    decode(bytes).inspect_err(|error| warn!(%error, "passed over")).ok()
}

#[cfg(test)]
mod tests {
    use tree::{ByteRange, UnixTime};

    use super::*;

    /// Golden bytes: stores that were written must stay readable.
    #[test]
    fn rows_on_disk() {
        let file = FileRow {
            blob: BlobId::EMPTY,
            fingerprint: Fingerprint {
                device: 1,
                inode: 300,
                size: 40_000,
                mtime: UnixTime { seconds: -1, nanos: 999_999_999 },
                ctime: UnixTime { seconds: 1, nanos: 0 },
            },
            damaged: ByteRange::new(16384, 32768).unwrap().into(),
        };
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let bytes = encode(&file).unwrap();
        assert_eq!(hex(&bytes), format!("{}01ac02c0b80201ff93ebdc03020001808001808002", BlobId::EMPTY),);
        assert_eq!(decode::<FileRow>(&bytes).unwrap(), file);
        let cached = CachedRow { size: 16384, proven: ByteRange::new(0, 16384).unwrap().into() };
        let bytes = encode(&cached).unwrap();
        assert_eq!(hex(&bytes), "8080010100808001");
        assert_eq!(decode::<CachedRow>(&bytes).unwrap(), cached);
    }
}
