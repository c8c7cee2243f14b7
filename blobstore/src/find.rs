//! Blobs by the beginning of their ids.

use std::{collections::BTreeMap, ops::Bound};

use tree::BlobId;

use crate::{
    Store, StoreError, dirs,
    rows::{CACHED, CachedRow, DIRS, FILES, FileRow, HOLDER_BYTES, HOLDERS, decode_or_none},
};

impl Store {
    /// Returns up to `max` blobs that are here, in place or cached, whole or in part, whose ids are `low`, `high` or between
    /// them, with their sizes, ascending. The size of a blob that is here in part may be only what a peer claimed.
    pub fn blobs_between(&self, low: &[u8; 32], high: &[u8; 32], max: usize) -> Result<Vec<(BlobId, u64)>, StoreError> {
        self.read_rows("look for a blob", |txn| {
            let mut found = BTreeMap::new();
            for row in txn.open_table(CACHED)?.range::<&[u8; 32]>(low..=high)?.take(max) {
                let (key, row) = row?;
                let row = decode_or_none::<CachedRow>(row.value());
                found.extend(row.map(|row| (BlobId::from_bytes(*key.value()), row.size)));
            }
            let (holders, dirs, files) = (txn.open_table(HOLDERS)?, txn.open_table(DIRS)?, txn.open_table(FILES)?);
            let (Some(first), Some(last)) = (low.first_chunk::<HOLDER_BYTES>(), high.first_chunk::<HOLDER_BYTES>())
            else {
                return Ok(Vec::new());
            };
            let from = Bound::Included((first, 0, &[][..]));
            for row in holders.range::<(&[u8; HOLDER_BYTES], u32, &[u8])>((from, Bound::Unbounded))? {
                let (key, _) = row?;
                let (prefix, dir, name) = key.value();
                if prefix > last || found.len() >= 2 * max {
                    break;
                }
                let Some(file) = dirs::file_in(&dirs, dir, name)? else { continue };
                let row =
                    files.get((file.root.0, &file.path[..]))?.and_then(|row| decode_or_none::<FileRow>(row.value()));
                let row = row.filter(|row| (low..=high).contains(&row.blob.as_bytes()));
                found.extend(row.map(|row| (row.blob, row.fingerprint.size)));
            }
            Ok(found.into_iter().take(max).collect())
        })
    }
}
