//! A fetch under way, whose pieces go to those who wait as soon as they are proven, and into the cache.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use blobstore::{Partial, Sink, Store, StoreError};
use tokio::{sync::Notify, time::Instant};
use tracing::warn;
use tree::{BlobId, ByteRange, RangeSet, Verified, VerifiedData};

/// Chunk groups of one blob on their way here.
pub(crate) struct Flight {
    /// What is to come.
    pub(crate) ranges: RangeSet,
    /// Whether it is read-ahead: no READ waited for it when it began.
    pub(crate) is_ahead: bool,
    state: Mutex<State>,
    changed: Notify,
    all: Arc<AllFlights>,
}

/// What all flights have in common.
#[derive(Default)]
pub(crate) struct AllFlights {
    /// The bytes of pieces that they hold.
    held: AtomicU64,
}

struct State {
    pieces: Vec<VerifiedData>,
    /// When the latest piece arrived, or the flight began.
    last: Instant,
    came: RangeSet,
    /// How it ended, if it has.
    ended: Option<Result<(), Lost>>,
}

/// Why something could not be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Nobody is known to have it.
    Nowhere,
    /// Those who have it could not be reached or did not give it.
    Unreachable(String),
}

impl Flight {
    pub(crate) fn new(ranges: RangeSet, is_ahead: bool, all: Arc<AllFlights>) -> Self {
        let state = State { pieces: Vec::new(), last: Instant::now(), came: RangeSet::new(), ended: None };
        Self { ranges, is_ahead, all, state: Mutex::new(state), changed: Notify::new() }
    }

    /// The pieces that came so far of `wanted`.
    pub(crate) fn so_far(&self, wanted: &RangeSet) -> Vec<VerifiedData> {
        self.state().pieces.iter().filter(|piece| wanted.overlaps(piece.range())).cloned().collect()
    }

    /// Whether no piece has arrived for `time`.
    pub(crate) fn rests_since(&self, time: Duration) -> bool {
        self.state().last.elapsed() >= time
    }

    /// Returns the part of `wanted` that this flight fetches and has not received yet.
    pub(crate) fn lacks(&self, wanted: &RangeSet) -> RangeSet {
        self.ranges.intersection(wanted).difference(&self.state().came)
    }

    /// Waits until those of `wanted` that this flight brings are here, or it has ended. Gives the pieces that came of them;
    /// they may be fewer if memory is short, but then they are in the cache.
    pub(crate) async fn wait(&self, wanted: &RangeSet) -> Result<Vec<VerifiedData>, Lost> {
        let wanted = self.ranges.intersection(wanted);
        loop {
            let changed = self.changed.notified();
            {
                let state = self.state();
                let is_here = wanted.difference(&state.came).is_empty();
                match &state.ended {
                    Some(Err(lost)) if !is_here => return Err(lost.clone()),
                    None if !is_here => {}
                    _ => {
                        let pieces = state.pieces.iter().filter(|piece| wanted.overlaps(piece.range()));
                        return Ok(pieces.cloned().collect());
                    }
                }
            }
            changed.await;
        }
    }

    fn take(&self, piece: &VerifiedData) {
        let (bytes, held) = (piece.range().len(), &self.all.held);
        self.state().last = Instant::now();
        // What finds no room here waits until the cache has it.
        if held.fetch_add(bytes, Ordering::Relaxed) + bytes > HELD_BYTES_MAX {
            held.fetch_sub(bytes, Ordering::Relaxed);
            return;
        }
        let mut state = self.state();
        state.came.insert(piece.range());
        state.pieces.push(piece.clone());
        drop(state);
        self.changed.notify_waiters();
    }

    /// Tells all that wait. From here on nobody new comes.
    pub(crate) fn end(&self, outcome: Result<(), Lost>) {
        self.state().ended = Some(outcome);
        self.changed.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let held = state.pieces.iter().map(|piece| piece.range().len()).sum();
        self.all.held.fetch_sub(held, Ordering::Relaxed);
    }
}

/// Where a flight's pieces go.
pub(crate) struct Landing {
    pub(crate) flight: Arc<Flight>,
    pub(crate) store: Store,
    pub(crate) blob: BlobId,
    pub(crate) size: u64,
    /// The place in the cache: opened with the first piece, and given up if it fails.
    pub(crate) cache: Option<Result<Partial, ()>>,
}

impl Landing {
    /// Does something with the place in the cache. A cache that is full or fails does not keep the bytes from who waits.
    fn with_cache(&mut self, act: impl FnOnce(&mut Partial) -> Result<(), StoreError>) {
        let (store, blob, size) = (&self.store, self.blob, self.size);
        let give_up = |error: StoreError| {
            warn!(%blob, reason = tree::reason(&error), "read without the cache");
        };
        let cache = self.cache.get_or_insert_with(|| store.partial(blob, size).map_err(give_up));
        if let Ok(partial) = cache
            && let Err(error) = act(partial)
        {
            give_up(error);
            *cache = Err(());
        }
    }
}

impl Sink for Landing {
    fn write(&mut self, pieces: &[Verified]) -> Result<(), StoreError> {
        pieces.iter().filter_map(Verified::data).for_each(|data| self.flight.take(data));
        self.with_cache(|partial| partial.write(pieces));
        Ok(())
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        if self.cache.is_some() {
            self.with_cache(|partial| partial.commit());
        }
        Ok(())
    }
}

/// Puts what of `range` the pieces have in order. `None` if they do not have all of it.
pub(crate) fn assemble(range: ByteRange, pieces: Vec<VerifiedData>) -> Option<Vec<bytes::Bytes>> {
    let (found, end) = assemble_beginning(range, pieces);
    (end == range.end()).then_some(found)
}

/// Puts what the pieces have from the beginning of `range` on in order. Also returns where that ends.
pub(crate) fn assemble_beginning(range: ByteRange, mut pieces: Vec<VerifiedData>) -> (Vec<bytes::Bytes>, u64) {
    pieces.sort_by_key(VerifiedData::offset);
    let (mut at, mut found) = (range.start(), Vec::new());
    for piece in pieces {
        let Some(rest) = ByteRange::new(at, range.end()) else { break };
        let part = piece.slice(rest);
        if part.bytes().is_empty() {
            continue;
        }
        if part.offset() != at {
            break;
        }
        at = part.range().end();
        found.push(part.bytes().clone());
    }
    (found, at)
}

/// So many bytes of pieces are held in memory by all flights together.
const HELD_BYTES_MAX: u64 = 256 << 20;
