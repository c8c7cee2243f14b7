//! What is never evicted, what the rest may take, and who hears when something is lost all the same.

use std::sync::{PoisonError, atomic::Ordering};

use tree::{BlobId, Geometry};

use crate::{
    Store, StoreError,
    rows::{PINS, SET},
};

impl Store {
    /// Never evicts anything of a blob from now on, or again if need be. Durable on return.
    pub fn set_pinned(&self, blob: BlobId, pinned: bool) -> Result<(), StoreError> {
        if pinned { self.change_pinned(&[blob], &[]) } else { self.change_pinned(&[], &[blob]) }
    }

    /// Never evicts anything of the blobs `pin` from now on, and of `unpin` again if need be. Durable on return. What is here
    /// of a blob then, and when it was pinned before, stays.
    pub fn change_pinned(&self, pin: &[BlobId], unpin: &[BlobId]) -> Result<(), StoreError> {
        // An eviction that has planned to take something must be through with it.
        let _evicting = self.inner.cache_files.read().unwrap_or_else(PoisonError::into_inner);
        self.write("pin blobs", |txn| {
            let mut pins = txn.open_table(PINS)?;
            for blob in unpin {
                pins.remove(blob.as_bytes())?;
            }
            for blob in pin {
                pins.insert(blob.as_bytes(), ())?;
            }
            Ok(())
        })?;
        let mut ledger = self.ledger();
        unpin.iter().for_each(|&blob| ledger.set_pinned(blob, false));
        pin.iter().for_each(|&blob| ledger.set_pinned(blob, true));
        Ok(())
    }

    /// Whether nothing of a blob is ever evicted.
    pub fn is_pinned(&self, blob: BlobId) -> bool {
        self.ledger().is_pinned(blob)
    }

    /// All blobs of which nothing is ever evicted.
    pub fn pinned(&self) -> Vec<BlobId> {
        self.ledger().pinned().collect()
    }

    /// Counts what is cached of a blob as used now.
    pub fn touch(&self, blob: BlobId, size: u64) {
        self.ledger().touch(blob, &Geometry::new(size).all().into());
    }

    /// Changes what the cache may take on the disk, from now on and for later starts, until the setting with which the store
    /// is opened is another one. Evicts at once what is beyond it. Durable on return.
    pub fn set_cache_limit(&self, bytes: u64) -> Result<(), StoreError> {
        let opened_with = self.inner.settings.cache_limit;
        self.write("set the cache's limit", |txn| {
            let mut set = txn.open_table(SET)?;
            if bytes == opened_with {
                set.remove(LIMIT)?;
                set.remove(LIMIT_INSTEAD_OF)?;
            } else {
                set.insert(LIMIT, bytes)?;
                set.insert(LIMIT_INSTEAD_OF, opened_with)?;
            }
            Ok(())
        })?;
        self.inner.cache_limit.store(bytes, Ordering::Relaxed);
        self.trim(bytes).map(drop)
    }

    /// What the cache may take: what was set last, of the setting that it is opened with and [`Self::set_cache_limit`].
    pub(crate) fn load_cache_limit(&self) -> Result<(), StoreError> {
        let set = self.read_rows("read the cache's limit", |txn| {
            let set = txn.open_table(SET)?;
            let value = |name| Ok::<_, redb::Error>(set.get(name)?.map(|value| value.value()));
            Ok(value(LIMIT)?
                .filter(|_| value(LIMIT_INSTEAD_OF).ok().flatten() == Some(self.inner.settings.cache_limit)))
        })?;
        self.inner.cache_limit.store(set.unwrap_or(self.inner.settings.cache_limit), Ordering::Relaxed);
        Ok(())
    }

    /// What the cache may take, as the store was opened.
    pub fn configured_cache_limit(&self) -> u64 {
        self.inner.settings.cache_limit
    }

    /// Has `hear` called, from now on, after whatever happens by which bytes that were here may not be here any more, but for
    /// evictions. It must not block, nor call the store. The first one stays.
    pub fn on_loss(&self, hear: impl Fn() + Send + Sync + 'static) {
        let _ = self.inner.on_loss.set(Box::new(hear));
    }

    /// Tells of that.
    pub(crate) fn lost(&self) {
        if let Some(hear) = self.inner.on_loss.get() {
            hear();
        }
    }
}

/// In [`SET`]: what the cache may take, and instead of which setting.
const LIMIT: &str = "cache_limit";
const LIMIT_INSTEAD_OF: &str = "cache_limit_instead_of";
