use std::path::{Path, PathBuf};

use redb::ReadableTable;
use tracing::{info, warn};
use tree::{BlobId, Geometry, RangeSet, Verified};

use crate::{
    Access, DiskFile, Sink, Store, StoreError,
    rows::{CACHED, CachedRow, decode, encode},
};

/// A blob that is coming into the cache.
///
/// Pieces are written where they belong in a sparse file; [`commit`](Sink::commit) syncs them and only then
/// records them as proven. What was not committed when the power went counts as not there. Callers see to it that
/// nobody takes the blob's file ([`Store::take_cached`]) while one of these is open.
pub struct Partial {
    store: Store,
    blob: BlobId,
    geometry: Geometry,
    data: Box<dyn DiskFile>,
    outboard: Box<dyn DiskFile>,
    /// Chunk groups written whole, and not yet recorded.
    written: RangeSet,
    /// Whether the files' names are durable.
    named: bool,
}

impl Store {
    /// Opens a place in the cache for `blob`, said to have `size` bytes; what is there already stays.
    ///
    /// If what is there was begun with another claimed size that has not been proven, it is begun anew.
    pub fn partial(&self, blob: BlobId, size: u64) -> Result<Partial, StoreError> {
        if let Some(row) = self.cached_row(blob)?.filter(|row| row.size != size) {
            if row.proven.contains(Geometry::new(row.size).last_group()) {
                return Err(StoreError::ForeignPiece { blob });
            }
            info!(%blob, was = row.size, now = size, "begun anew: peers disagree on the size");
            self.discard_cached(blob)?;
        }
        let geometry = Geometry::new(size);
        if self.cached_row(blob)?.is_some() && !self.has_cache_files(blob, geometry) {
            warn!(%blob, "begun anew: its files in the cache are gone");
            self.discard_cached(blob)?;
        }
        let open = |path: &Path, len: u64| {
            let disk = &self.inner.disk;
            path.parent().map_or(Ok(()), |dir| disk.create_dirs(dir))?;
            let file = disk.open(path, Access::Create)?;
            file.set_len(len)?;
            Ok(file)
        };
        let (data, outboard) = (self.cache_file(blob), self.cache_outboard_file(blob));
        Ok(Partial {
            data: open(&data, size).map_err(StoreError::file("create", data))?,
            outboard: open(&outboard, geometry.outboard_bytes()).map_err(StoreError::file("create", outboard))?,
            store: self.clone(),
            blob,
            geometry,
            written: RangeSet::new(),
            named: false,
        })
    }

    /// Whether both files of a cached blob are there, and as long as they must be.
    fn has_cache_files(&self, blob: BlobId, geometry: Geometry) -> bool {
        let files =
            [(self.cache_file(blob), geometry.size()), (self.cache_outboard_file(blob), geometry.outboard_bytes())];
        files.iter().all(|(path, bytes)| {
            let file = self.inner.disk.open(path, Access::Read);
            file.and_then(|file| file.fingerprint()).is_ok_and(|fingerprint| fingerprint.size == *bytes)
        })
    }

    /// The bytes that the cache has of a blob.
    pub fn cached_ranges(&self, blob: BlobId) -> Result<RangeSet, StoreError> {
        Ok(self.cached_row(blob)?.map(|row| row.proven).unwrap_or_default())
    }

    /// The chunk groups of `ranges` that a fetch into the cache would have to bring, the last one among them
    /// if the size has not been proven yet: with it, the claimed `size` is.
    pub fn missing_from_cache(&self, blob: BlobId, size: u64, ranges: &RangeSet) -> Result<RangeSet, StoreError> {
        let geometry = Geometry::new(size);
        let row = self.cached_row(blob)?.filter(|row| row.size == size);
        let proven = row.map(|row| row.proven).unwrap_or_default();
        let mut wanted = geometry.round_out_all(ranges);
        if !wanted.is_empty() {
            wanted.insert(geometry.last_group());
        }
        Ok(wanted.difference(&proven))
    }

    /// Gives away the file of a cached blob that is complete: the cache forgets it, and the caller moves or
    /// deletes the file. `None` if the blob is not cached whole. A file left there is deleted at the next start.
    pub fn take_cached(&self, blob: BlobId) -> Result<Option<PathBuf>, StoreError> {
        let complete = |row: &CachedRow| row.proven.contains(Geometry::new(row.size).all());
        if !self.cached_row(blob)?.is_some_and(|row| complete(&row)) {
            return Ok(None);
        }
        self.forget_row(blob)?;
        let outboard = self.cache_outboard_file(blob);
        self.inner.disk.remove(&outboard).map_err(StoreError::file("remove", outboard))?;
        Ok(Some(self.cache_file(blob)))
    }

    /// Forgets `ranges` of a cached blob, so that they are fetched anew when they are wanted. Durable on return.
    pub(crate) fn forget_cached(&self, blob: BlobId, ranges: &RangeSet) -> Result<(), StoreError> {
        self.update_cached(blob, None, |row| row.proven = row.proven.difference(ranges))
    }

    /// Forgets a cached blob, and then deletes its files.
    fn discard_cached(&self, blob: BlobId) -> Result<(), StoreError> {
        self.forget_row(blob)?;
        for path in [self.cache_file(blob), self.cache_outboard_file(blob)] {
            self.inner.disk.remove(&path).map_err(StoreError::file("remove", path))?;
        }
        Ok(())
    }

    fn forget_row(&self, blob: BlobId) -> Result<(), StoreError> {
        self.write("forget a cached blob", |txn| {
            txn.open_table(CACHED)?.remove(blob.as_bytes())?;
            Ok(())
        })
    }

    /// Sets what `change` makes of the row of a cached blob; if it has none, of `new`, if that is given.
    fn update_cached(
        &self,
        blob: BlobId,
        new: Option<CachedRow>,
        change: impl Fn(&mut CachedRow),
    ) -> Result<(), StoreError> {
        self.write("update a cached blob", |txn| {
            let mut cached = txn.open_table(CACHED)?;
            let row = cached.get(blob.as_bytes())?.map(|row| decode(row.value())).transpose()?;
            if let Some(mut row) = row.or(new) {
                change(&mut row);
                cached.insert(blob.as_bytes(), &encode(&row)?[..])?;
            }
            Ok(())
        })
    }
}

impl Partial {
    /// Whether our open file is still the one at `path`.
    fn is_named(&self, path: &Path) -> Result<bool, StoreError> {
        let ours = self.data.fingerprint().map_err(StoreError::file("stat", path))?;
        let named = self.store.inner.disk.open(path, Access::Read).and_then(|file| file.fingerprint());
        Ok(named.is_ok_and(|named| (named.device, named.inode) == (ours.device, ours.inode)))
    }
}

impl Sink for Partial {
    fn write(&mut self, piece: Verified) -> Result<(), StoreError> {
        let blob = self.blob;
        match piece {
            Verified::Data(data) => {
                if data.blob() != blob || data.range().end() > self.geometry.size() {
                    return Err(StoreError::ForeignPiece { blob });
                }
                let write = self.data.write_all_at(data.bytes(), data.offset());
                write.map_err(StoreError::file("write", self.store.cache_file(blob)))?;
                if self.geometry.round_out(data.range()) == data.range() {
                    self.written.insert(data.range());
                }
            }
            Verified::Node(node) => {
                let Some(offset) = node.outboard_offset() else { return Ok(()) };
                if node.blob() != blob || offset >= self.geometry.outboard_bytes() {
                    return Err(StoreError::ForeignPiece { blob });
                }
                let write = self.outboard.write_all_at(node.pair(), offset);
                write.map_err(StoreError::file("write", self.store.cache_outboard_file(blob)))?;
            }
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        if self.written.is_empty() {
            return Ok(());
        }
        let (store, blob) = (&self.store, self.blob);
        let path = store.cache_file(blob);
        if !self.is_named(&path)? {
            info!(%blob, "its files were taken from the cache meanwhile");
            self.written = RangeSet::new();
            return Ok(());
        }
        // Once a sync has failed nobody knows what is on the disk, and the next sync does not say.
        let written = std::mem::take(&mut self.written);
        self.data.sync().map_err(StoreError::file("sync", &path))?;
        self.outboard.sync().map_err(StoreError::file("sync", store.cache_outboard_file(blob)))?;
        if !self.named {
            // The file's own directory and the cache's, in which that one may be new.
            for dir in path.ancestors().skip(1).take(2) {
                store.inner.disk.sync_dir(dir).map_err(StoreError::file("sync", dir))?;
            }
            self.named = true;
        }
        let size = self.geometry.size();
        let new = CachedRow { size, proven: RangeSet::new() };
        store.update_cached(blob, Some(new), |row| {
            if row.size == size {
                row.proven.extend(written.iter());
            }
        })
    }
}
