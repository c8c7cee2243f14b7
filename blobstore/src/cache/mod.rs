//! The cache: blobs of other machines, whole or in part, within a budget.

mod keep;
mod ledger;
mod lost;
mod partial;
mod small;

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
};

use redb::ReadableTable;
use tracing::{debug, info, warn};
use tree::{BlobId, ByteRange, GROUP_BYTES, Geometry, RangeSet};

use crate::{
    Access, Store, StoreError,
    place::own_file,
    rows::{CACHED, CachedRow, INLINE, PINS, USED, VERIFIED, decode_or_none, encode},
    store::Inner,
};

pub(crate) use ledger::Ledger;
pub use lost::CacheDirs;
pub use partial::Partial;
pub use small::SmallBlob;

/// Keeps ranges of a cached blob from being evicted, as long as it lives.
pub struct Lease {
    inner: Arc<Inner>,
    blob: BlobId,
    number: u64,
}

/// Keeps all of a blob in the cache and out of its budget: it only passes through.
pub struct Passage {
    inner: Arc<Inner>,
    blob: BlobId,
}

/// How full the cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheUsage {
    /// Bytes that it takes on the disk, or will when the fetches under way are done, without what is pinned.
    pub bytes: u64,
    /// Bytes that pinned blobs take there beside these.
    pub pinned: u64,
    /// Bytes that it may take, without what is pinned.
    pub limit: u64,
    /// Bytes that are free on its file system.
    pub free: u64,
    /// Bytes that it leaves free there: the configured ones, or 8 MiB if these are fewer.
    pub keep_free: u64,
}

impl Store {
    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.inner.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All cached blobs, whole or in part.
    pub fn cached(&self) -> Result<Vec<BlobId>, StoreError> {
        self.read_rows("list the cache", |txn| {
            txn.open_table(CACHED)?.iter()?.map(|row| Ok(BlobId::from_bytes(*row?.0.value()))).collect()
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

    /// Keeps `ranges` of a blob from being evicted as long as the lease lives: what is there, and what comes. To be
    /// taken before asking what is there.
    pub fn lease(&self, blob: BlobId, ranges: RangeSet) -> Lease {
        // An eviction that has planned to take them must be through with it.
        let _evicting = self.inner.cache_files.read().unwrap_or_else(PoisonError::into_inner);
        self.lease_now(blob, ranges)
    }

    /// The same for who holds the cache's files.
    fn lease_now(&self, blob: BlobId, ranges: RangeSet) -> Lease {
        let number = self.ledger().lease(blob, ranges);
        Lease { inner: self.inner.clone(), blob, number }
    }

    /// Lets all of a blob pass through the cache on its way elsewhere: it is not evicted, and does not count.
    pub fn passage(&self, blob: BlobId) -> Passage {
        self.ledger().stage(blob);
        Passage { inner: self.inner.clone(), blob }
    }

    /// How full the cache is.
    pub fn cache_usage(&self) -> Result<CacheUsage, StoreError> {
        let settings = &self.inner.settings;
        let free = self.inner.disk.free_bytes(&settings.cache);
        let free = free.map_err(StoreError::file("ask how much is free at", &settings.cache))?;
        let (limit, keep_free) =
            (self.inner.cache_limit.load(Ordering::Relaxed), settings.cache_keep_free.max(ROOM_BYTES));
        let ledger = self.ledger();
        Ok(CacheUsage { bytes: ledger.used_bytes(), pinned: ledger.pinned_bytes(), limit, free, keep_free })
    }

    /// How many blobs are cached whole, and how many in part.
    pub fn cached_count(&self) -> Result<(u64, u64), StoreError> {
        self.read_rows("count what is cached", |txn| {
            let (mut whole, mut partial) = (0, 0);
            for row in txn.open_table(CACHED)?.iter()? {
                let Some(row) = decode_or_none::<CachedRow>(row?.1.value()) else { continue };
                let is_whole = row.proven.contains(Geometry::new(row.size).all());
                whole += u64::from(is_whole);
                partial += u64::from(!is_whole && !row.proven.is_empty());
            }
            Ok((whole, partial))
        })
    }

    /// Gives away the file of a cached blob that is complete: the cache forgets it, and the caller moves or
    /// deletes the file. `None` if the blob is not cached whole. A file left there is deleted at the next start.
    pub fn take_cached(&self, blob: BlobId) -> Result<Option<PathBuf>, StoreError> {
        let _alone = self.inner.cache_files.write().unwrap_or_else(PoisonError::into_inner);
        let Some(row) = self.cached_row(blob)?.filter(|row| row.proven.contains(Geometry::new(row.size).all())) else {
            return Ok(None);
        };
        // Bytes behind the end would go along, and nothing proves them.
        if !self.has_cached_bytes(blob, Geometry::new(row.size))? {
            return Ok(None);
        }
        let path = self.cache_file(blob);
        if is_inline(row.size) {
            let Some(bytes) = self.inline_bytes(blob)? else { return Ok(None) };
            let write = || {
                path.parent().map_or(Ok(()), |dir| self.inner.disk.create_dirs(dir))?;
                self.inner.disk.open(&path, Access::Create)?.write_all_at(&bytes, 0)
            };
            write().map_err(StoreError::file("write", &path))?;
        }
        self.forget_row(blob)?;
        let flag = self.inner.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&blob);
        if let Some(flag) = flag.and_then(|flag| flag.upgrade()) {
            flag.store(true, Ordering::Release);
        }
        let outboard = self.cache_outboard_file(blob);
        self.inner.disk.remove(&outboard).map_err(StoreError::file("remove", outboard))?;
        Ok(Some(path))
    }

    /// Forgets `ranges` of a cached blob, so that they are fetched anew when they are wanted. Durable on return.
    pub(crate) fn forget_cached(&self, blob: BlobId, ranges: &RangeSet) -> Result<(), StoreError> {
        let gone = self.write("forget a part of a cached blob", |txn| {
            let mut cached = txn.open_table(CACHED)?;
            let row = cached.get(blob.as_bytes())?.and_then(|row| decode_or_none::<CachedRow>(row.value()));
            let Some(mut row) = row else { return Ok(RangeSet::new()) };
            let gone = row.proven.intersection(ranges);
            row.proven = row.proven.difference(ranges);
            cached.insert(blob.as_bytes(), &encode(&row)?[..])?;
            Ok(gone)
        })?;
        self.ledger().remove(blob, &gone);
        self.lost();
        Ok(())
    }

    pub(crate) fn cached_row(&self, blob: BlobId) -> Result<Option<CachedRow>, StoreError> {
        self.read_rows("look up a cached blob", |txn| {
            Ok(txn.open_table(CACHED)?.get(blob.as_bytes())?.and_then(|row| decode_or_none(row.value())))
        })
    }

    pub(crate) fn inline_bytes(&self, blob: BlobId) -> Result<Option<Vec<u8>>, StoreError> {
        self.read_rows("look up a small blob", |txn| {
            Ok(txn.open_table(INLINE)?.get(blob.as_bytes())?.map(|row| row.value().to_owned()))
        })
    }

    pub(crate) fn cache_file(&self, blob: BlobId) -> PathBuf {
        own_file(&self.inner.settings.cache, blob, "data")
    }

    pub(crate) fn cache_outboard_file(&self, blob: BlobId) -> PathBuf {
        own_file(&self.inner.settings.cache, blob, "obao4")
    }

    /// Deletes the cached bytes of a blob, whole or partial. Nobody else may be fetching the blob: see `Peers::alone_with`.
    pub fn discard(&self, blob: BlobId) -> Result<(), StoreError> {
        let _alone = self.inner.cache_files.write().unwrap_or_else(PoisonError::into_inner);
        if self.cached_row(blob)?.is_some() { self.discard_cached(blob) } else { Ok(()) }
    }

    /// Forgets a cached blob, and then deletes its files. The caller holds the cache's files.
    fn discard_cached(&self, blob: BlobId) -> Result<(), StoreError> {
        self.forget_row(blob)?;
        for path in [self.cache_file(blob), self.cache_outboard_file(blob)] {
            self.inner.disk.remove(&path).map_err(StoreError::file("remove", path))?;
        }
        Ok(())
    }

    fn forget_row(&self, blob: BlobId) -> Result<(), StoreError> {
        let row = self.write("forget a cached blob", |txn| {
            txn.open_table(INLINE)?.remove(blob.as_bytes())?;
            txn.open_table(USED)?.remove(blob.as_bytes())?;
            txn.open_table(VERIFIED)?.remove(blob.as_bytes())?;
            let mut cached = txn.open_table(CACHED)?;
            let row = cached.remove(blob.as_bytes())?;
            Ok(row.and_then(|row| decode_or_none::<CachedRow>(row.value())))
        })?;
        let mut ledger = self.ledger();
        row.iter().for_each(|row| ledger.remove(blob, &row.proven));
        ledger.set_allocated(blob, 0);
        drop(ledger);
        self.lost();
        Ok(())
    }

    /// Takes stock of the cache: at the start, before anything is fetched.
    pub(crate) fn take_stock(&self) -> Result<(), StoreError> {
        let (mut uses, pins) = self.read_rows("read when the cache was used", |txn| {
            let uses = txn.open_table(USED)?;
            let uses =
                uses.iter()?.map(|row| row.map(|(blob, used)| (used.value(), BlobId::from_bytes(*blob.value()))));
            let pins = txn.open_table(PINS)?;
            let pins = pins.iter()?.map(|row| Ok(BlobId::from_bytes(*row?.0.value())));
            Ok((uses.collect::<Result<Vec<_>, _>>()?, pins.collect::<Result<Vec<_>, redb::Error>>()?))
        })?;
        uses.sort_unstable();
        let used: HashMap<BlobId, u64> = uses.iter().map(|&(used, blob)| (blob, used)).collect();
        // What was never said to be used is the first to go.
        let mut blobs = self.cached()?;
        blobs.sort_by_key(|blob| used.get(blob).copied().unwrap_or(0));
        for blob in blobs {
            let Some(row) = self.cached_row(blob)?.filter(|row| !row.proven.is_empty()) else {
                self.discard_cached(blob)?;
                continue;
            };
            // A row that rotted may claim more than can be counted in a lifetime. Verify takes the claim back.
            if row.proven.end() > row.size || !self.has_cached_bytes(blob, Geometry::new(row.size))? {
                warn!(%blob, "the cache's row claims what is not there");
                continue;
            }
            self.ledger().add(blob, &row.proven);
            self.look_at(blob, row.size);
        }
        let mut ledger = self.ledger();
        ledger.count_from(uses.last().map_or(0, |(used, _)| *used));
        pins.into_iter().for_each(|blob| ledger.set_pinned(blob, true));
        Ok(())
    }

    /// Notes what a cached blob takes on the disk now.
    fn look_at(&self, blob: BlobId, size: u64) {
        let allocated = self.allocated(blob, size);
        self.ledger().set_allocated(blob, allocated);
    }

    fn allocated(&self, blob: BlobId, size: u64) -> u64 {
        if is_inline(size) {
            return if self.ledger().has_start(blob) { size } else { 0 };
        }
        let of = |path: &Path| self.inner.disk.open(path, Access::Read).and_then(|file| file.allocated()).unwrap_or(0);
        of(&self.cache_file(blob)) + of(&self.cache_outboard_file(blob))
    }

    /// Makes room for `incoming` more bytes: evicts until they fit into the cache's budget and leave enough free on
    /// its file system, or until nothing is left that may be evicted. What is in use is not; so the limit may be
    /// exceeded by that. Fails with [`StoreError::CacheFull`] if they would not leave enough free.
    ///
    /// Pinned and pass-through blobs do not `count` toward the budget.
    pub(crate) fn make_room(&self, incoming: u64, count: bool) -> Result<(), StoreError> {
        for _ in 0..EVICTION_ROUNDS {
            let CacheUsage { bytes, limit, free, keep_free, .. } = self.cache_usage()?;
            let over = if count { (bytes + incoming).saturating_sub(limit) } else { 0 };
            let short = keep_free.saturating_add(incoming).saturating_sub(free);
            let needed = over.max(short);
            if needed == 0 || !self.evict(needed.max(EVICT_BYTES_MIN.min(limit / 16)))? {
                if short > 0 {
                    return Err(StoreError::CacheFull { free, keep_free });
                }
                break;
            }
        }
        self.check_room()
    }

    /// Fails with [`StoreError::HomeFull`] if the disk of the database has too little free space to add rows: spec/store.md,
    /// "Full disks".
    pub fn check_room(&self) -> Result<(), StoreError> {
        match self.inner.disk.free_bytes(&self.inner.settings.outboards) {
            Ok(free) if free < ROOM_BYTES => Err(StoreError::HomeFull { free, keep_free: ROOM_BYTES }),
            // A disk that does not tell shows at the first write.
            _ => Ok(()),
        }
    }

    /// Evicts until the cache takes at most `bytes` on the disk beside what is pinned, or until only what is in use is left.
    /// Returns what it takes then.
    pub fn trim(&self, bytes: u64) -> Result<u64, StoreError> {
        loop {
            let used = self.ledger().used_bytes();
            if used <= bytes || !self.evict(used - bytes)? {
                return Ok(used);
            }
        }
    }

    /// Evicts `bytes`, or what there is. First the rows, then the bytes: spec/store.md, "Evict". Tells whether
    /// anything was evicted.
    pub(crate) fn evict(&self, bytes: u64) -> Result<bool, StoreError> {
        // Nobody writes pieces meanwhile: they might go where a hole is about to be.
        let _alone = self.inner.cache_files.write().unwrap_or_else(PoisonError::into_inner);
        let (plan, uses, in_use) = {
            let mut ledger = self.ledger();
            let mut plan: HashMap<BlobId, RangeSet> = HashMap::new();
            for (blob, range) in ledger.plan(bytes) {
                plan.entry(blob).or_default().insert(range);
            }
            plan.keys().for_each(|&blob| ledger.note_eviction(blob));
            let in_use: HashSet<BlobId> = plan.keys().copied().filter(|&blob| ledger.is_leased(blob)).collect();
            (plan, ledger.last_uses(), in_use)
        };
        if plan.is_empty() {
            return Ok(false);
        }
        let rows = self.write("evict", |txn| {
            let (mut cached, mut inline) = (txn.open_table(CACHED)?, txn.open_table(INLINE)?);
            let (mut used, mut verified) = (txn.open_table(USED)?, txn.open_table(VERIFIED)?);
            let mut rows = Vec::new();
            for (blob, ranges) in &plan {
                let row = cached.get(blob.as_bytes())?.and_then(|row| decode_or_none::<CachedRow>(row.value()));
                let Some(mut row) = row else { continue };
                let gone = row.proven.intersection(ranges);
                row.proven = row.proven.difference(&gone);
                // Its files stay while somebody is writing to them.
                let all = row.proven.is_empty() && !in_use.contains(blob);
                if all {
                    cached.remove(blob.as_bytes())?;
                    inline.remove(blob.as_bytes())?;
                    verified.remove(blob.as_bytes())?;
                } else {
                    cached.insert(blob.as_bytes(), &encode(&row)?[..])?;
                }
                rows.push((*blob, row.size, gone, all));
            }
            // In passing: what was used since the last time.
            for (blob, at) in &uses {
                if cached.get(blob.as_bytes())?.is_some() {
                    used.insert(blob.as_bytes(), at)?;
                } else {
                    used.remove(blob.as_bytes())?;
                }
            }
            Ok(rows)
        })?;
        for (blob, size, gone, all) in rows {
            debug!(%blob, bytes = gone.total_bytes(), "evicted");
            self.free(blob, size, &gone, all)?;
            self.ledger().remove(blob, &gone);
            self.look_at(blob, size);
        }
        Ok(true)
    }

    /// Gives the blocks back to the file system of what no row claims any more.
    fn free(&self, blob: BlobId, size: u64, gone: &RangeSet, all: bool) -> Result<(), StoreError> {
        if is_inline(size) {
            return Ok(());
        }
        let (data, outboard) = (self.cache_file(blob), self.cache_outboard_file(blob));
        if all {
            for path in [data, outboard] {
                self.inner.disk.remove(&path).map_err(StoreError::file("remove", path))?;
            }
            return Ok(());
        }
        let punched = self.inner.disk.open(&data, Access::Write).and_then(|file| {
            // Beyond the end to the end of the block, so that the last block goes too.
            let whole = |range: ByteRange| ByteRange::new(range.start(), range.end().next_multiple_of(GROUP_BYTES));
            gone.iter().filter_map(whole).try_for_each(|range| file.punch(range))
        });
        match punched {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                info!(path = %data.display(), "its file system knows no holes; it is freed when all of it is evicted");
            }
            Err(error) => warn!(path = %data.display(), reason = tree::reason(&error), "cannot be freed"),
            Ok(()) => {}
        }
        Ok(())
    }

    /// Notes durably when what is cached was last used, for the next start.
    pub fn note_uses(&self) -> Result<(), StoreError> {
        let uses = self.ledger().last_uses();
        self.write("note when the cache was used", |txn| {
            let (cached, mut used) = (txn.open_table(CACHED)?, txn.open_table(USED)?);
            for (blob, at) in uses {
                if cached.get(blob.as_bytes())?.is_some() {
                    used.insert(blob.as_bytes(), at)?;
                }
            }
            Ok(())
        })
    }
}

/// Whether a cached blob of `size` bytes is a row of the database and not a file.
pub(crate) fn is_inline(size: u64) -> bool {
    size <= GROUP_BYTES
}

impl Lease {
    /// Keeps one more range.
    pub(crate) fn extend(&self, range: ByteRange) {
        let mut ledger = self.inner.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.extend_lease(self.blob, self.number, range);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.inner.ledger.lock().unwrap_or_else(PoisonError::into_inner).end_lease(self.blob, self.number);
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.inner.ledger.lock().unwrap_or_else(PoisonError::into_inner).unstage(self.blob);
    }
}

/// Free bytes that the cache and the database leave on their disks.
const ROOM_BYTES: u64 = 8 << 20;

/// Evicting less at a time would cost more transactions than it saves fetches. Small caches evict less.
const EVICT_BYTES_MIN: u64 = 8 << 20;
/// How often to look again whether enough was evicted, for a file system may give back less than was hoped.
const EVICTION_ROUNDS: usize = 16;
