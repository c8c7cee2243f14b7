//! What others delete from the cache's directory: whoever cleans up takes a cache for something to be cleaned.

use std::{collections::BTreeMap, os::unix::fs::MetadataExt};

use redb::ReadableTable;
use tracing::warn;
use tree::{BlobId, Geometry};

use super::is_inline;
use crate::{
    Store, StoreError,
    rows::{CACHED, CachedRow, decode_or_none, encode},
};

/// How the directories of the cache were when it was last looked whether something is lost.
#[derive(Debug, Clone, Default)]
pub struct CacheDirs(BTreeMap<u8, Option<DirStamp>>);

/// Its inode number, and its mtime in seconds and nanoseconds: it moves when something in it is deleted.
type DirStamp = (u64, i64, i64);

impl Store {
    /// Looks whether files of the cache are gone, in those of its 256 directories that changed since `seen` was noted, which
    /// is noted anew. What was cached in them is forgotten, durably. Returns how many blobs that were. Blocks.
    pub fn forget_lost(&self, seen: &mut CacheDirs) -> Result<usize, StoreError> {
        let mut lost = 0;
        for first in 0..=u8::MAX {
            let stamp = std::fs::metadata(self.inner.settings.cache.join(format!("{first:02x}")));
            let stamp = stamp.ok().map(|meta| (meta.ino(), meta.mtime(), meta.mtime_nsec()));
            // One that is not there may have come and gone since.
            if stamp.is_some() && seen.0.get(&first) == Some(&stamp) {
                continue;
            }
            lost += self.forget_lost_of(first)?;
            // Noted last: what is deleted meanwhile moves it again.
            seen.0.insert(first, stamp);
        }
        if lost > 0 {
            warn!(
                blobs = lost,
                "files of the cache were deleted by others; what was in them is fetched again when it is wanted"
            );
            self.lost();
        }
        Ok(lost)
    }

    /// The same for the blobs whose ids begin with the byte `first`.
    fn forget_lost_of(&self, first: u8) -> Result<usize, StoreError> {
        let (mut low, mut high) = ([0; 32], [u8::MAX; 32]);
        (low[0], high[0]) = (first, first);
        let rows: Vec<(BlobId, CachedRow)> = self.read_rows("look for what the cache lost", |txn| {
            let cached = txn.open_table(CACHED)?;
            let rows = cached.range::<&[u8; 32]>(&low..=&high)?.map(|row| {
                let (blob, row) = row?;
                Ok(decode_or_none(row.value()).map(|row| (BlobId::from_bytes(*blob.value()), row)))
            });
            rows.filter_map(Result::transpose).collect()
        })?;
        let mut lost = Vec::new();
        for (blob, row) in rows.into_iter().filter(|(_, row)| !is_inline(row.size) && !row.proven.is_empty()) {
            if !self.has_cached_bytes(blob, Geometry::new(row.size))? {
                lost.push(blob);
            }
        }
        if lost.is_empty() {
            return Ok(0);
        }
        let gone = self.write("forget what the cache lost", |txn| {
            let mut cached = txn.open_table(CACHED)?;
            let mut gone = Vec::new();
            for blob in &lost {
                let row = cached.get(blob.as_bytes())?.and_then(|row| decode_or_none::<CachedRow>(row.value()));
                let Some(mut row) = row else { continue };
                gone.push((*blob, std::mem::take(&mut row.proven)));
                cached.insert(blob.as_bytes(), &encode(&row)?[..])?;
            }
            Ok(gone)
        })?;
        let mut ledger = self.ledger();
        for (blob, proven) in &gone {
            ledger.remove(*blob, proven);
            ledger.set_allocated(*blob, 0);
        }
        Ok(gone.len())
    }
}
