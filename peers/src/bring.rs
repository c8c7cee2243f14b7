//! Bringing what is not here into the store's cache.

use std::sync::{Arc, Mutex, PoisonError};

use blobstore::{FetchError, Fetched, Sink, StoreError, Want};
use tokio::{sync::OwnedMutexGuard, task::spawn_blocking};
use tree::{BlobId, RangeSet, Verified};

use crate::{Peers, fetch::Behalf, pace::Class};

impl Peers {
    /// Waits until nobody else changes what the cache has of `blob`, and keeps others from it as long as the guard lives.
    /// Those who wait come in order; for how long, is the caller's to bound.
    pub async fn alone_with(&self, blob: BlobId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.inner.bringing.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(blob).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// Brings what the cache lacks of `ranges` of `blob`, said to have `size` bytes, into the cache: whole chunk groups, and
    /// the last one besides if the size has not been proven yet. What a file here has is copied, and the rest is fetched.
    /// `on_bytes` hears how many more bytes came.
    ///
    /// The caller is [alone with](Self::alone_with) the blob, and holds a lease on `ranges` or has it pass through. What
    /// came before a failure stays. Ends in bounded time even if no peer answers. [`FetchError::Sink`] if the cache
    /// cannot take it.
    pub async fn bring(
        &self,
        class: Class,
        blob: BlobId,
        size: u64,
        ranges: RangeSet,
        on_bytes: impl Fn(u64) + Send + 'static,
    ) -> Result<Fetched, FetchError> {
        self.bring_for(Behalf::own(class), blob, size, ranges, on_bytes).await
    }

    /// The same, on behalf of somebody.
    pub(crate) async fn bring_for(
        &self,
        behalf: Behalf,
        blob: BlobId,
        size: u64,
        ranges: RangeSet,
        on_bytes: impl Fn(u64) + Send + 'static,
    ) -> Result<Fetched, FetchError> {
        let store = self.inner.store.clone();
        // What is for somebody else is read at once, to be passed on.
        let is_for_later = behalf.class == Class::Copy && behalf.asker.is_none();
        let open = move || {
            let mut sink = Counting { sink: store.partial(blob, size)?.for_later(is_for_later), on_bytes };
            let missing = store.missing_from_cache(blob, size, &ranges)?;
            // What a file here has of the same blob, beside what of it may be damaged, is not fetched.
            let copied = store.copy_from_places(blob, size, &missing, &mut sink)?;
            Ok((sink, missing.difference(&copied)))
        };
        let opened = match spawn_blocking(open).await {
            Ok(opened) => opened.map_err(|source: StoreError| FetchError::Sink { blob, source }),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let (sink, ranges) = opened?;
        let sink = Arc::new(Mutex::new(sink));
        self.fetch_for(behalf, Want { blob, size, ranges }, sink).await
    }
}

/// Passes pieces on, and tells how many bytes those of each call have.
pub(crate) struct Counting<S, F> {
    pub(crate) sink: S,
    pub(crate) on_bytes: F,
}

impl<S: Sink, F: Fn(u64) + Send> Sink for Counting<S, F> {
    fn write(&mut self, pieces: &[Verified]) -> Result<(), StoreError> {
        let bytes = pieces.iter().filter_map(Verified::data).map(|data| data.range().len()).sum();
        if bytes > 0 {
            (self.on_bytes)(bytes);
        }
        self.sink.write(pieces)
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        self.sink.commit()
    }
}
