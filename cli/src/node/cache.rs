//! What the cache takes on the disk, and what it may take.

use std::time::{Duration, Instant};

use blobstore::CacheDirs;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::sleep};
use tracing::warn;

use super::{Node, blocking};
use crate::failure::{Failure, WhileDoing};

/// How full the cache is.
#[derive(Debug, Serialize)]
pub(crate) struct CacheStat {
    /// What counts towards the limit, in bytes on the disk.
    bytes: u64,
    /// What is pinned, beside that.
    pinned: u64,
    limit: u64,
    /// What the configuration says instead of `limit`.
    configured_limit: u64,
    /// On its disk.
    free: u64,
    keep_free: u64,
    /// How many blobs are there whole, and how many in part.
    whole: u64,
    partial: u64,
}

/// `POST /v1/cache/trim`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Trim {
    /// What may be left, beside what is pinned or in use.
    #[serde(default)]
    pub bytes: u64,
}

/// What trimming came to.
#[derive(Debug, Serialize)]
pub(crate) struct Trimmed {
    freed: u64,
    bytes: u64,
    pinned: u64,
}

/// `POST /v1/cache/limit`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CacheLimit {
    /// What it may take on the disk; none to show that only.
    #[serde(default)]
    pub bytes: Option<u64>,
}

impl Node {
    /// Looks every few seconds whether others have deleted files of the cache, for as long as `stopped` says nothing.
    pub(crate) async fn watch_cache(self, mut stopped: watch::Receiver<bool>) {
        let mut seen = CacheDirs::default();
        loop {
            let (store, began) = (self.inner.store.clone(), Instant::now());
            let looked = blocking(move || {
                store.forget_lost(&mut seen)?;
                Ok(seen)
            });
            seen = looked.await.unwrap_or_else(|failure| {
                warn!(reason = failure.reason(), "it is not known whether the cache lost something");
                CacheDirs::default()
            });
            tokio::select! {
                _ = stopped.wait_for(|&stop| stop) => return,
                () = sleep(CACHE_LOOK.max(began.elapsed() * 20)) => {}
            }
        }
    }

    /// How full the cache is.
    pub(crate) async fn cache_stat(&self) -> Result<CacheStat, Failure> {
        let store = self.inner.store.clone();
        blocking(move || {
            let (usage, (whole, partial)) = (store.cache_usage()?, store.cached_count()?);
            Ok(CacheStat {
                bytes: usage.bytes,
                pinned: usage.pinned,
                limit: usage.limit,
                configured_limit: store.configured_cache_limit(),
                free: usage.free,
                keep_free: usage.keep_free,
                whole,
                partial,
            })
        })
        .await
        .while_doing("look at the cache")
    }

    /// Evicts until `bytes` are left at most, beside what is pinned or in use.
    pub(crate) async fn trim_cache(&self, Trim { bytes }: Trim) -> Result<Trimmed, Failure> {
        let store = self.inner.store.clone();
        let trimmed = blocking(move || {
            let before = store.cache_usage()?.bytes;
            store.trim(bytes)?;
            let after = store.cache_usage()?;
            Ok(Trimmed { freed: before.saturating_sub(after.bytes), bytes: after.bytes, pinned: after.pinned })
        });
        let trimmed = trimmed.await.while_doing("trim the cache")?;
        self.look_at_pins();
        Ok(trimmed)
    }

    /// Changes what the cache may take, durably, and evicts what is beyond it.
    pub(crate) async fn limit_cache(&self, bytes: u64) -> Result<(), Failure> {
        let node = self.clone();
        let set = blocking(move || {
            node.inner.store.set_cache_limit(bytes)?;
            node.keep_record();
            Ok(())
        });
        set.await.while_doing("change the cache's limit")?;
        self.look_at_pins();
        Ok(())
    }
}

/// How often the cache is looked at, unless that takes long: its 256 directories, and the files of those that changed.
const CACHE_LOOK: Duration = Duration::from_secs(5);
