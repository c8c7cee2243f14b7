//! Answers for which what is not here is fetched, from peers that have it, on behalf of the one who asks.
//!
//! What is asked for is gone through in windows. Each is looked for here; what is not is fetched into the cache; then the
//! window is sent, while the next one is being fetched. Windows are short at first and where bytes come slowly, so that
//! the asker never waits for long. Order and bounds: spec/wire.md, "Through streams".

use std::{sync::Arc, time::Duration};

use blobstore::{Lease, StoreError};
use namespace::PeerId;
use tokio::{
    sync::{Semaphore, watch},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, timeout_at},
};
use tracing::{debug, warn};
use tree::{BlobId, ByteRange, GROUP_BYTES, Geometry, Query, RangeSet};

use crate::{
    Peers,
    answer::{Places, pairs_said},
    endpoint::{GREETING_LIMIT, Inner},
    fetch::Behalf,
    frame::{FrameError, within},
    outgoing::Outgoing,
    pace::Class,
    serve::{Part, UNSUPPORTED, read_request, send_part},
};

/// What one peer may have fetched at a time.
pub(crate) struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(FETCHES_AT_ONCE)))
    }
}

/// Answers one request for ranges of a blob, with what is here and what others have.
///
/// What cannot be had ends the answer early, as in [`serve_get`](crate::serve::serve_get).
pub(crate) async fn serve_through(
    inner: &Arc<Inner>,
    asker: PeerId,
    answers: Arc<Semaphore>,
    mut to: Outgoing,
    mut recv: quinn::RecvStream,
) -> Result<(), FrameError> {
    let mut head = [0; 9];
    within(GREETING_LIMIT, async { recv.read_exact(&mut head).await.map_err(|_| FrameError::Ended) }).await?;
    let [hops, size @ ..] = head;
    let Some((blob, query)) = read_request(&mut recv).await? else {
        warn!("refused: a request that is not for ranges of one blob");
        let _ = to.stream.reset(UNSUPPORTED.into());
        return Ok(());
    };
    let turns = inner.contacts().entry(asker).or_default().turns.0.clone();
    let (_alive, gone) = watch::channel(());
    let passing = Passing {
        peers: Peers { inner: inner.clone() },
        blob,
        size: u64::from_le_bytes(size),
        asker,
        hops: hops.min(HOPS_MAX),
        class: to.manner().class,
        turns,
        gone,
    };
    let stopped = to.stream.stopped();
    tokio::select! {
        served = passing.answer(&mut to, query, &answers) => served?,
        _ = stopped => return Ok(()),
    }
    let _ = to.stream.finish();
    Ok(())
}

/// How long somebody who may make `hops` hops tries to get the next that it is to send.
pub(crate) fn limit(hops: u8) -> Duration {
    HOP_LIMIT * u32::from(hops)
}

/// A request that is being answered.
#[derive(Clone)]
struct Passing {
    peers: Peers,
    blob: BlobId,
    /// The blob's size, as the asker claims.
    size: u64,
    asker: PeerId,
    hops: u8,
    class: Class,
    turns: Arc<Semaphore>,
    /// Closed when nobody waits for the answer any more.
    gone: watch::Receiver<()>,
}

/// A part of what is asked for, on its way here.
struct Window {
    ranges: RangeSet,
    /// When to do without it.
    until: Instant,
    bringing: JoinHandle<Brought>,
}

/// What became of a window.
struct Brought {
    /// Whether all of it should be here now.
    is_here: bool,
    /// How long it was fetched, if it had to be.
    took: Option<Duration>,
    /// Keeps it here until it has been sent.
    _lease: Lease,
}

impl Passing {
    async fn answer(&self, to: &mut Outgoing, query: Query, answers: &Semaphore) -> Result<(), FrameError> {
        let inner = &self.peers.inner;
        let wanted = query.resolve_bytes(self.size);
        if wanted.is_empty() || !self.may_fetch().await {
            let _permit = answers.acquire().await;
            return send_part(inner, to, self.blob, Part::whole(query)).await.map(drop);
        }
        let (mut said, mut bytes, mut with_size) = (0, WINDOW_BYTES_MIN, true);
        let mut next = self.open(&wanted, said, bytes);
        while let Some(window) = next.take() {
            let Window { ranges, until, bringing } = window;
            let first = ranges.iter().next().map_or(0, |range| range.start());
            let above = pairs_said(self.size, said, first);
            let mut part = Part { query: Query::bytes(ranges.clone()), above, with_size };
            let mut brought = arrival(bringing, until).await;
            bytes = window_bytes(bytes, brought.as_ref().and_then(|brought| brought.took));
            (said, with_size) = (ranges.end(), false);
            let was_here = |brought: &Option<Brought>| brought.as_ref().is_some_and(|brought| brought.is_here);
            if was_here(&brought) {
                next = self.open(&wanted, said, bytes);
            }
            let mut tries = 0..WINDOW_TRIES;
            loop {
                let permit = answers.acquire().await;
                let left = send_part(inner, to, self.blob, part).await?;
                drop(permit);
                let Some(left) = left else { break };
                // What was thought to be here did not prove. That is known by now, so that it is fetched.
                if !was_here(&brought) || tries.next().is_none() {
                    return Ok(());
                }
                let again = tokio::spawn(self.clone().bring(left.query.resolve_bytes(self.size), until));
                brought = arrival(again, until).await;
                part = left;
            }
            next = next.or_else(|| self.open(&wanted, said, bytes));
        }
        Ok(())
    }

    fn behalf(&self) -> Behalf {
        Behalf { asker: Some(self.asker), hops: self.hops.saturating_sub(1), class: self.class }
    }

    /// Whether what is not here may be fetched, and there is somebody to fetch it from.
    async fn may_fetch(&self) -> bool {
        let (store, blob, size) = (self.peers.inner.store.clone(), self.blob, self.size);
        let here = spawn_blocking(move || Ok::<_, StoreError>(Places::open(&store, blob)?.map(|places| places.size())));
        let is_size = matches!(here.await, Ok(Ok(here)) if here.is_none_or(|here| here == size));
        self.hops > 0 && is_size && self.peers.may_get(blob, self.behalf()).await
    }

    /// Begins to bring the next window, of about so many bytes, behind the byte at `from`; `None` if that is the end.
    fn open(&self, wanted: &RangeSet, from: u64, bytes: u64) -> Option<Window> {
        let ranges = next_window(self.size, wanted, from, bytes);
        (!ranges.is_empty()).then(|| {
            let until = Instant::now() + limit(self.hops);
            let bringing = tokio::spawn(self.clone().bring(ranges.clone(), until));
            Window { ranges, until, bringing }
        })
    }

    /// Brings what is not here of `ranges`. Waits for a turn, and to be alone with the blob, until `until` at most, or
    /// until nobody waits for the answer any more. A fetch that was begun is not broken off.
    async fn bring(mut self, ranges: RangeSet, until: Instant) -> Brought {
        let lease = {
            let (store, blob, ranges) = (self.peers.inner.store.clone(), self.blob, ranges.clone());
            let leased = spawn_blocking(move || store.lease(blob, ranges)).await;
            leased.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
        };
        let mut brought = Brought { is_here: true, took: None, _lease: lease };
        if self.missing(&ranges).await.is_empty() {
            return brought;
        }
        let (turns, peers, blob) = (self.turns.clone(), self.peers.clone(), self.blob);
        let turn = async {
            let permit = turns.acquire_owned().await;
            (permit, peers.alone_with(blob).await)
        };
        let turn = tokio::select! {
            turn = timeout_at(until, turn) => turn.ok(),
            _ = self.gone.changed() => None,
        };
        // Somebody else may have brought it meanwhile.
        let missing = self.missing(&ranges).await;
        if missing.is_empty() {
            return brought;
        }
        if turn.is_none() {
            debug!(%blob, peer = %self.asker, "not fetched on its behalf: others are in front");
            brought.is_here = false;
            return brought;
        }
        let began = Instant::now();
        let fetched = self.peers.bring_for(self.behalf(), blob, self.size, missing, |_| {}).await;
        if let Err(error) = &fetched {
            debug!(%blob, peer = %self.asker, reason = tree::reason(error), "cannot be fetched on its behalf");
        }
        brought.is_here = fetched.is_ok();
        brought.took = Some(began.elapsed());
        brought
    }

    /// The chunk groups of `ranges` that are not here, so far as is known.
    async fn missing(&self, ranges: &RangeSet) -> RangeSet {
        let wanted = Geometry::new(self.size).round_out_all(ranges);
        let (store, blob, size, query) = (self.peers.inner.store.clone(), self.blob, self.size, Query::groups(&wanted));
        let here = spawn_blocking(move || {
            let places = Places::open(&store, blob)?.filter(|places| places.size() == size);
            Ok::<_, StoreError>(places.map_or_else(RangeSet::new, |places| places.has(&query)))
        });
        match here.await {
            Ok(Ok(here)) => wanted.difference(&here),
            Ok(Err(error)) => {
                warn!(%blob, reason = tree::reason(&error), "cannot be looked up");
                wanted
            }
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }
}

/// Waits until a window is here, or cannot be had. `None` if that is not decided by `until`.
async fn arrival(bringing: JoinHandle<Brought>, until: Instant) -> Option<Brought> {
    match timeout_at(until, bringing).await {
        Ok(Ok(brought)) => Some(brought),
        Ok(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        _ => None,
    }
}

/// What of `wanted`, which is asked for of a blob of `size` bytes, is behind the byte at `from`, up to some whole chunk
/// groups of `bytes` together, one at least.
fn next_window(size: u64, wanted: &RangeSet, from: u64, bytes: u64) -> RangeSet {
    let cut = |from, to| ByteRange::new(from, to).map_or_else(RangeSet::new, |part| wanted.intersection(&part.into()));
    let mut left = bytes.max(GROUP_BYTES);
    for range in Geometry::new(size).round_out_all(&cut(from, u64::MAX)).iter() {
        if range.len() >= left {
            let end = range.start().saturating_add(left).checked_next_multiple_of(GROUP_BYTES);
            return cut(from, end.unwrap_or(u64::MAX));
        }
        left -= range.len();
    }
    cut(from, u64::MAX)
}

/// How long the next window is, after one of `bytes` that was fetched for so long, or was here.
fn window_bytes(bytes: u64, took: Option<Duration>) -> u64 {
    match took {
        Some(took) if took > SLOW => (bytes / 2).max(WINDOW_BYTES_LEAST),
        Some(took) if took > FAST => bytes,
        _ => (bytes * 2).min(WINDOW_BYTES_MAX),
    }
}

/// The most hops that a request may still make.
pub(crate) const HOPS_MAX: u8 = 4;
/// What each hop may take.
const HOP_LIMIT: Duration = Duration::from_secs(20);
/// Fetches on behalf of one peer at a time; more wait.
const FETCHES_AT_ONCE: usize = 4;
/// How often more a window is brought that was thought to be here.
const WINDOW_TRIES: usize = 1;
const WINDOW_BYTES_LEAST: u64 = 64 << 10;
const WINDOW_BYTES_MIN: u64 = 256 << 10;
const WINDOW_BYTES_MAX: u64 = 8 << 20;
const FAST: Duration = Duration::from_secs(1);
const SLOW: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests;
