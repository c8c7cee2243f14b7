//! What others delete from the cache's directory: whoever cleans up takes a cache for something to be cleaned.

use std::{collections::BTreeMap, io, os::unix::fs::MetadataExt};

use redb::ReadableTable;
use tracing::warn;
use tree::{BlobId, Geometry};

use super::is_inline;
use crate::{
    Access, Store, StoreError,
    rows::{CACHED, CachedRow, decode_or_none, encode},
};

/// How the directories of the cache were when it was last looked whether something is lost.
#[derive(Debug, Clone, Default)]
pub struct CacheDirs {
    dirs: BTreeMap<u8, Option<DirStamp>>,
    /// The file system on which files of the cache were seen, or on which there were none yet: on another one, they are not
    /// gone, but out of reach.
    device: Option<u64>,
}

/// Its inode number, and its mtime in seconds and nanoseconds: it moves when something in it is deleted.
type DirStamp = (u64, i64, i64);

impl Store {
    /// Looks whether files of the cache are gone, in those of its 256 directories that changed since `seen` was noted, which
    /// is noted anew. What was cached in them is forgotten, durably. Returns how many blobs that were. Blocks.
    pub fn forget_lost(&self, seen: &mut CacheDirs) -> Result<usize, StoreError> {
        let device = self.cache_device();
        if seen.device.is_none() && !self.are_all_lost()? {
            seen.device = device;
        }
        // Perhaps a disk that is not mounted: what is on it must not count as gone.
        if device.is_none() || device != seen.device {
            return Ok(0);
        }
        let mut lost = 0;
        for first in 0..=u8::MAX {
            let stamp = std::fs::metadata(self.inner.settings.cache.join(format!("{first:02x}")));
            let stamp = stamp.ok().map(|meta| (meta.ino(), meta.mtime(), meta.mtime_nsec()));
            // One that is not there may have come and gone since.
            if stamp.is_some() && seen.dirs.get(&first) == Some(&stamp) {
                continue;
            }
            lost += self.forget_lost_of(first)?;
            // Noted last: what is deleted meanwhile moves it again.
            seen.dirs.insert(first, stamp);
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
        let rows = self.rows_of_files(first)?;
        let lost: Vec<BlobId> =
            rows.into_iter().filter(|(blob, row)| self.is_lost(*blob, row.size)).map(|(blob, _)| blob).collect();
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

    /// The rows of blobs whose ids begin with the byte `first`, and of which files have something.
    fn rows_of_files(&self, first: u8) -> Result<Vec<(BlobId, CachedRow)>, StoreError> {
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
        let has_files = |(_, row): &(BlobId, CachedRow)| !is_inline(row.size) && !row.proven.is_empty();
        Ok(rows.into_iter().filter(has_files).collect())
    }

    /// Whether a file of a cached blob is not there, or of another length. One that cannot be looked at is not lost.
    fn is_lost(&self, blob: BlobId, size: u64) -> bool {
        let files =
            [(self.cache_file(blob), size), (self.cache_outboard_file(blob), Geometry::new(size).outboard_bytes())];
        files.iter().any(|(path, bytes)| {
            match self.inner.disk.open(path, Access::Read).and_then(|file| file.fingerprint()) {
                Ok(fingerprint) => fingerprint.size != *bytes,
                Err(error) => error.kind() == io::ErrorKind::NotFound,
            }
        })
    }

    /// Whether there are cached blobs that have files, and the files of none of them are there.
    fn are_all_lost(&self) -> Result<bool, StoreError> {
        let mut are_any = false;
        for first in 0..=u8::MAX {
            let rows = self.rows_of_files(first)?;
            if rows.iter().any(|(blob, row)| !self.is_lost(*blob, row.size)) {
                return Ok(false);
            }
            are_any |= !rows.is_empty();
        }
        Ok(are_any)
    }

    /// The file system that the cache's directory is on, or would be.
    fn cache_device(&self) -> Option<u64> {
        let dirs = self.inner.settings.cache.ancestors();
        dirs.map(std::fs::metadata).find_map(Result::ok).map(|meta| meta.dev())
    }
}
