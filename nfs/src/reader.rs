//! Reading blobs: what is here at once, what is not from whoever has it, and ahead of those who read in order.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blobstore::{Fetch, FetchError, Fetched, Source, Store, StoreError, Want};
use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};
use tree::{BlobId, ByteRange, Geometry, RangeSet, VerifiedData};

use crate::{
    flight::{AllFlights, Flight, Landing, Lost, assemble, assemble_beginning},
    window::Windows,
};

/// Reads blobs. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Reader {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    /// For READs that wait, and for read-ahead.
    fetch: [Arc<dyn Fetch>; 2],
    read_ahead: u64,
    limit: Duration,
    blobs: Mutex<HashMap<BlobId, Blob>>,
    flights: Arc<AllFlights>,
    /// Permits for what is read before it is asked for.
    begun: Arc<Semaphore>,
    /// Hears of blobs of which something in place was found damaged, and is here anew.
    mend: mpsc::Sender<BlobId>,
}

/// A blob that is being read.
struct Blob {
    windows: Windows,
    flights: Vec<Arc<Flight>>,
    open: Option<Open>,
    used: Instant,
}

/// Where a blob is here, open since somebody read it lately.
struct Open {
    sources: Arc<Vec<Source>>,
    /// The end of what was read last.
    end: u64,
    next: Option<Next>,
}

/// What is read and proven before it is asked for, while what is before it is on its way to the client.
struct Next {
    range: ByteRange,
    /// All of it, with a permit that is given back once that is dropped; or nothing.
    reading: JoinHandle<Option<(Vec<VerifiedData>, OwnedSemaphorePermit)>>,
}

/// Bytes that were read, and the room that they take until they are dropped.
pub(crate) struct Read {
    pub(crate) pieces: Vec<Bytes>,
    pub(crate) room: OwnedSemaphorePermit,
}

/// Why bytes could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("nobody has it")]
    Nowhere,
    #[error("{0}")]
    Unreachable(String),
    #[error("nobody gave it within {0:?}")]
    TimedOut(Duration),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<Lost> for ReadError {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Nowhere => Self::Nowhere,
            Lost::Unreachable(reason) => Self::Unreachable(reason),
        }
    }
}

impl Reader {
    pub(crate) fn new(
        store: Store,
        fetch: [Arc<dyn Fetch>; 2],
        read_ahead: u64,
        limit: Duration,
        mend: mpsc::Sender<BlobId>,
    ) -> Self {
        let (blobs, flights, begun) = (Mutex::default(), Arc::default(), Arc::new(Semaphore::new(BEGUN_MAX)));
        Self { inner: Arc::new(Inner { store, fetch, read_ahead, limit, blobs, flights, begun, mend }) }
    }

    /// How far ahead of those who read in order is fetched, in bytes.
    pub(crate) fn read_ahead(&self) -> u64 {
        self.inner.read_ahead
    }

    /// Reads `range`, which is not empty and lies within the `size` bytes of `blob`; only the beginning of it, which is not
    /// empty either, if more takes long. Of `room` it takes as much as it reads, and none while it waits for others. `missed`
    /// hears if not all of it is here. Fails if nothing at all came for as long as the limit says.
    pub(crate) async fn read(
        &self,
        blob: BlobId,
        size: u64,
        range: ByteRange,
        room: &Arc<Semaphore>,
        missed: impl FnOnce(),
    ) -> Result<Read, ReadError> {
        let ahead = self.inner.with(blob, |state| state.windows.note(range, self.inner.read_ahead));
        if let Some(ahead) = ahead {
            self.fetch_ahead(blob, size, ahead);
        }
        let (mut brought, mut missed) = (Vec::new(), Some(missed));
        // What is here may be found damaged, or be evicted, while the rest is on its way.
        let (mut attempts, mut is_slow) = (0, false);
        while attempts < ATTEMPTS {
            let permit = self.room_for(range, room).await;
            if let Some(pieces) = assemble(range, brought.clone()) {
                return Ok(Read { pieces, room: permit });
            }
            let (here, missing) = self.read_here(blob, size, range).await?;
            let (pieces, end) = assemble_beginning(range, here.into_iter().chain(brought.iter().cloned()).collect());
            if end == range.end() || is_slow && end > range.start() {
                return Ok(Read { pieces, room: permit });
            }
            drop(permit);
            missed.take().into_iter().for_each(|missed| missed());
            let (came, is_all) = self.wait_for(blob, size, range, &missing).await?;
            brought.extend(came);
            is_slow = !is_all;
            attempts += usize::from(is_all);
        }
        Err(ReadError::Unreachable("it came, and was lost again".to_owned()))
    }

    async fn room_for(&self, range: ByteRange, room: &Arc<Semaphore>) -> OwnedSemaphorePermit {
        let bytes = u32::try_from(range.len()).unwrap_or(u32::MAX);
        match room.clone().acquire_many_owned(bytes).await {
            Ok(permit) => permit,
            Err(_) => unreachable!("the room is never closed"),
        }
    }

    async fn read_here(
        &self,
        blob: BlobId,
        size: u64,
        range: ByteRange,
    ) -> Result<(Vec<VerifiedData>, RangeSet), ReadError> {
        let reading = self.inner.with(blob, |state| state.open.as_mut().map(|open| self.step(open, size, range)));
        let (reader, (open, next)) = (self.clone(), reading.unzip());
        if let Some(next) = next.flatten()
            && let Some((pieces, _permit)) = join(next.reading).await
        {
            return Ok((pieces, RangeSet::new()));
        }
        // A switch to another thread and back takes longer than to prove a little. If the first place fails, there it is told why.
        let first =
            open.iter().flat_map(|sources| sources.iter()).find(|source| source.size() == size && source.has(range));
        if let Some(source) = first.filter(|_| range.len() <= AT_ONCE_BYTES)
            && let Some(pieces) = source.read_ready(range)
        {
            return Ok((pieces, RangeSet::new()));
        }
        let outcome = join(spawn_blocking(move || {
            let store = &reader.inner.store;
            if let Some(sources) = &open {
                let outcome = store.read_from(sources, size, range)?;
                if outcome.missing.is_empty() {
                    return Ok(outcome);
                }
            }
            // More may be here by now than when they were opened.
            let sources = Arc::new(store.sources(blob)?);
            let outcome = store.read_from(&sources, size, range);
            // Who reads all of it at once does not come back.
            if range.len() < size && sources.len() <= SOURCES_MAX {
                reader.keep_open(blob, Open { sources, end: range.end(), next: None });
            }
            outcome
        }));
        let outcome = outcome.await?;
        Ok((outcome.pieces, outcome.missing))
    }

    /// Takes note that `range` is read of what is open; begins to read what is likely to be asked for next. Returns what is
    /// open, and `range`, if that was begun with before.
    fn step(&self, open: &mut Open, size: u64, range: ByteRange) -> (Arc<Vec<Source>>, Option<Next>) {
        let begun = open.next.take().filter(|next| next.range == range);
        let is_in_order = open.end == range.start() && range.len() > AT_ONCE_BYTES;
        open.end = range.end();
        let next = ByteRange::new(range.end(), range.end().saturating_add(range.len()).min(size));
        if let Some(range) = next.filter(|next| is_in_order && !next.is_empty())
            && let Ok(permit) = self.inner.begun.clone().try_acquire_owned()
        {
            let (store, sources) = (self.inner.store.clone(), open.sources.clone());
            let read = move || {
                let outcome = store.read_from(&sources, size, range).ok()?;
                outcome.missing.is_empty().then_some((outcome.pieces, permit))
            };
            open.next = Some(Next { range, reading: spawn_blocking(read) });
        }
        (open.sources.clone(), begun)
    }

    /// Keeps sources open for a while. A file that is replaced meanwhile is read to its end as it was.
    fn keep_open(&self, blob: BlobId, open: Open) {
        let is_new = self.inner.with(blob, |state| state.open.replace(open).is_none());
        if !is_new {
            return;
        }
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            let mut wait = OPEN_LIMIT;
            loop {
                sleep(wait).await;
                let Some(inner) = inner.upgrade() else { return };
                let mut blobs = inner.blobs.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(state) = blobs.get_mut(&blob) else { return };
                match OPEN_LIMIT.checked_sub(state.used.elapsed()).filter(|left| !left.is_zero()) {
                    Some(left) => wait = left,
                    None => return state.open = None,
                }
            }
        });
    }

    /// Waits until what is `missing` of `range` is here, having it fetched unless it is on its way; or, if that takes long, until
    /// the beginning of it is. Returns what came, and whether that is all.
    async fn wait_for(
        &self,
        blob: BlobId,
        size: u64,
        range: ByteRange,
        missing: &RangeSet,
    ) -> Result<(Vec<VerifiedData>, bool), ReadError> {
        let ahead = self.inner.with(blob, |state| state.windows.miss(range, self.inner.read_ahead));
        let mut flights = self.start(blob, size, missing, false).await?;
        if let Some(ahead) = ahead {
            self.fetch_ahead(blob, size, ahead);
        }
        let received = || self.inner.fetch[0].received_bytes();
        let (began, mut last) = (Instant::now(), (received(), Instant::now()));
        let first = missing.iter().next().map_or(range.start(), |first| first.start().max(range.start()));
        // Read-ahead flights that stand still, and whose bytes were requested once more.
        let mut late = Vec::new();
        loop {
            let all = async {
                let mut pieces = Vec::new();
                for flight in &flights {
                    pieces.extend(flight.wait(missing).await?);
                }
                Ok::<_, ReadError>(pieces)
            };
            let waited = timeout(LOOK, all).await;
            let so_far = |flights: &[Arc<Flight>]| flights.iter().flat_map(|flight| flight.so_far(missing)).collect();
            let mut pieces: Vec<_> = so_far(&late);
            if let Ok(all) = waited {
                pieces.extend(all?);
                return Ok((pieces, true));
            }
            pieces.extend(so_far(&flights));
            let is_begun = first > range.start()
                || pieces.iter().map(VerifiedData::range).any(|at| at.start() <= first && first < at.end());
            if began.elapsed() >= SLOW && is_begun {
                return Ok((pieces, false));
            }
            if began.elapsed() >= LATE && late.is_empty() {
                // A flight that still receives pieces is only slow: requesting its bytes again would fetch them twice.
                let is_late = |flight: &Arc<Flight>| {
                    flight.is_ahead && flight.rests_since(LATE) && !flight.lacks(missing).is_empty()
                };
                (late, flights) = flights.into_iter().partition(is_late);
                let lacking = late.iter().map(|flight| flight.lacks(missing));
                let lacking = lacking.fold(RangeSet::new(), |all, lacks| all.union(&lacks));
                flights.extend(self.begin(blob, size, &lacking));
            }
            // While any fetch receives bytes, this READ only waits its turn.
            let now = received();
            if now != last.0 {
                last = (now, Instant::now());
            }
            if last.1.elapsed() >= self.inner.limit {
                return Err(ReadError::TimedOut(self.inner.limit));
            }
        }
    }

    /// Fetches what of `range` is not here and not on its way, without anybody waiting for it.
    fn fetch_ahead(&self, blob: BlobId, size: u64, range: ByteRange) {
        let range = range.intersection(Geometry::new(size).all());
        if range.is_empty() {
            return;
        }
        let reader = self.clone();
        tokio::spawn(async move {
            if let Err(error) = reader.start_missing(blob, size, range).await {
                debug!(%blob, %range, reason = tree::reason(&error), "not read ahead");
            }
        });
    }

    /// Fetches all of a blob that somebody is likely to read soon, and waits for it. Fails if it cannot be had.
    pub(crate) async fn fetch_likely(&self, blob: BlobId, size: u64) -> Result<(), ReadError> {
        let all = Geometry::new(size).all();
        let wanted = all.into();
        for flight in self.start_missing(blob, size, all).await? {
            let waiting = timeout(self.inner.limit, flight.wait(&wanted));
            waiting.await.map_err(|_| ReadError::TimedOut(self.inner.limit))??;
        }
        Ok(())
    }

    /// Begins to fetch what of `range` is neither here nor on its way. Returns the flights that bring any of it.
    async fn start_missing(&self, blob: BlobId, size: u64, range: ByteRange) -> Result<Vec<Arc<Flight>>, ReadError> {
        let store = self.inner.store.clone();
        let look = move || {
            let mut missing = RangeSet::from(Geometry::new(size).round_out(range));
            for source in store.sources(blob)?.iter().filter(|source| source.size() == size) {
                missing = missing.difference(source.available());
            }
            Ok::<_, ReadError>(missing)
        };
        let missing = join(spawn_blocking(look)).await?;
        if missing.is_empty() { Ok(Vec::new()) } else { self.start(blob, size, &missing, true).await }
    }

    /// Begins to fetch what of `missing` is not on its way. Returns the flights that bring any of it.
    async fn start(
        &self,
        blob: BlobId,
        size: u64,
        missing: &RangeSet,
        is_ahead: bool,
    ) -> Result<Vec<Arc<Flight>>, ReadError> {
        let (store, wanted) = (self.inner.store.clone(), missing.clone());
        // With the last chunk group, where the size has not been proven yet.
        let wanted = join(spawn_blocking(move || store.missing_from_cache(blob, size, &wanted))).await?;
        let mut bringing = Vec::new();
        let new = self.inner.with(blob, |state| {
            let on_way = state.flights.iter().fold(RangeSet::new(), |all, flight| all.union(&flight.ranges));
            let brings = |flight: &&Arc<Flight>| !flight.ranges.intersection(missing).is_empty();
            bringing.extend(state.flights.iter().filter(brings).cloned());
            let is_all = missing.difference(&on_way).is_empty();
            self.flights(state, &if is_all { RangeSet::new() } else { wanted.difference(&on_way) }, is_ahead)
        });
        bringing.extend(self.launch(blob, size, new));
        Ok(bringing)
    }

    /// Fetches `ranges` for a READ that waits, even if a read-ahead flight fetches them already.
    fn begin(&self, blob: BlobId, size: u64, ranges: &RangeSet) -> Vec<Arc<Flight>> {
        let new = self.inner.with(blob, |state| self.flights(state, ranges, false));
        self.launch(blob, size, new)
    }

    /// Makes flights for `ranges`, and registers them with the blob.
    fn flights(&self, state: &mut Blob, ranges: &RangeSet, is_ahead: bool) -> Vec<Arc<Flight>> {
        let flight = |ranges| Arc::new(Flight::new(ranges, is_ahead, self.inner.flights.clone()));
        let new: Vec<_> = split(ranges).map(flight).collect();
        state.flights.extend(new.iter().cloned());
        new
    }

    fn launch(&self, blob: BlobId, size: u64, flights: Vec<Arc<Flight>>) -> Vec<Arc<Flight>> {
        for flight in &flights {
            tokio::spawn(self.clone().fly(blob, size, flight.clone()));
        }
        flights
    }

    async fn fly(self, blob: BlobId, size: u64, flight: Arc<Flight>) {
        let inner = &self.inner;
        let landing = Landing { flight: flight.clone(), store: inner.store.clone(), blob, size, cache: None };
        let want = Want { blob, size, ranges: flight.ranges.clone() };
        let fetching: Pin<Box<dyn Future<Output = Result<Fetched, FetchError>> + Send + '_>> =
            inner.fetch[usize::from(flight.is_ahead)].fetch(want, Arc::new(Mutex::new(landing)));
        let outcome = fetching.await;
        inner.with(blob, |state| state.flights.retain(|other| !Arc::ptr_eq(other, &flight)));
        flight.end(match outcome {
            Ok(_) => {
                self.have_mended(blob).await;
                Ok(())
            }
            Err(FetchError::NoPeerHasIt { .. }) => Err(Lost::Nowhere),
            Err(error) => Err(Lost::Unreachable(tree::reason(&error))),
        });
    }

    /// Has files in place mended of which something damaged is here anew.
    async fn have_mended(&self, blob: BlobId) {
        let store = self.inner.store.clone();
        let is_damaged = move || {
            let holders = store.holders(blob, HOLDERS_LOOKED_AT)?;
            let mut rows = holders.iter().map(|file| store.file(file));
            rows.try_fold(false, |found, row| Ok(found || row?.is_some_and(|row| !row.damaged.is_empty())))
        };
        match join(spawn_blocking(is_damaged)).await {
            Ok::<_, StoreError>(true) => {
                // Whoever mends is told once more by the next reader.
                let _ = self.inner.mend.try_send(blob);
            }
            Ok(false) => {}
            Err(error) => warn!(%blob, reason = tree::reason(&error), "not looked whether it needs mending"),
        }
    }
}

impl Inner {
    /// Does something with what is known of the reading of a blob.
    fn with<T>(&self, blob: BlobId, act: impl FnOnce(&mut Blob) -> T) -> T {
        let mut blobs: MutexGuard<'_, HashMap<BlobId, Blob>> =
            self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if blobs.len() > BLOBS_MAX {
            let mut uses: Vec<Instant> = blobs.values().map(|blob| blob.used).collect();
            let (_, &mut median, _) = uses.select_nth_unstable(BLOBS_MAX / 2);
            blobs.retain(|_, blob| blob.used > median || !blob.flights.is_empty());
        }
        let blob = blobs.entry(blob).or_insert_with(|| Blob {
            windows: Windows::default(),
            flights: Vec::new(),
            open: None,
            used: now,
        });
        blob.used = now;
        act(blob)
    }
}

/// Parts of at most a flight's size, in order.
fn split(ranges: &RangeSet) -> impl Iterator<Item = RangeSet> {
    let mut parts: Vec<RangeSet> = Vec::new();
    let mut room = 0;
    for range in ranges.iter() {
        let mut from = range.start();
        while from < range.end() {
            if room == 0 {
                parts.push(RangeSet::new());
                room = FLIGHT_BYTES_MAX;
            }
            let to = range.end().min(from + room);
            if let (Some(part), Some(range)) = (parts.last_mut(), ByteRange::new(from, to)) {
                part.insert(range);
            }
            room -= to - from;
            from = to;
        }
    }
    parts.into_iter()
}

async fn join<T>(handle: JoinHandle<T>) -> T {
    match handle.await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Time without a piece after which a READ requests the bytes of a read-ahead flight once more, with priority.
const LATE: Duration = Duration::from_secs(1);
/// How often a waiting read checks whether its beginning has arrived.
const LOOK: Duration = Duration::from_millis(250);
/// A read that waits longer than this is answered with what has arrived, if that includes its beginning.
const SLOW: Duration = Duration::from_secs(2);
/// A read that finds something lost again and again fails.
const ATTEMPTS: usize = 4;
/// A multiple of chunk groups.
const FLIGHT_BYTES_MAX: u64 = 8 << 20;
/// Of so many blobs it is known who reads them.
const BLOBS_MAX: usize = 256;
const HOLDERS_LOOKED_AT: usize = 64;
/// A blob that is in more places is not kept open.
const SOURCES_MAX: usize = 4;
/// So much is read on the thread that answers, if the system has it in memory.
const AT_ONCE_BYTES: u64 = 64 << 10;
/// So many requests, of a MiB at most each, are read before they are made.
const BEGUN_MAX: usize = 32;
/// So long after it was last read, a blob's files are closed.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
