//! One blob on its way from several peers: does what the [`Plan`] says.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blobstore::{FetchError, Fetched, SharedSink, Want};
use futures_util::{StreamExt, stream::FuturesUnordered};
use namespace::PeerId;
use quinn::ConnectionError;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tracing::{debug, warn};
use tree::{BlobId, Query, RangeSet};

use crate::{
    Peers,
    dial::reach,
    endpoint::Close,
    fetch::REACH_LIMIT,
    incoming::Terms,
    iroh_wire::REQUEST_RANGES_MAX,
    pace::Class,
    plan::{Plan, Step},
    transfer::{Request, TransferError, Way, have},
};

/// A fetch under way: what is wanted, and what came of it so far.
pub(crate) struct Sharing<'a> {
    peers: &'a Peers,
    pub(crate) blob: BlobId,
    size: u64,
    class: Class,
    sink: SharedSink,
    /// What has not come yet.
    pub(crate) left: RangeSet,
    pub(crate) fetched: Fetched,
    /// What each peer that was asked failed at.
    pub(crate) tried: Vec<String>,
    /// Those whose answer failed, who are not asked again.
    pub(crate) failed: BTreeSet<PeerId>,
}

/// A peer that is to be asked.
pub(crate) struct Asked {
    pub(crate) peer: PeerId,
    pub(crate) way: Way,
    /// What it is called in errors.
    pub(crate) label: String,
}

/// What came from one peer, and how it ended.
struct Answered {
    bytes: u64,
    outcome: Result<(), TransferError>,
}

/// What those that ask share.
struct Table {
    plan: Mutex<Plan>,
    began: Instant,
    /// Told whenever the plan may say something new.
    changed: Notify,
}

impl<'a> Sharing<'a> {
    /// Nobody has been asked yet.
    pub(crate) fn new(peers: &'a Peers, class: Class, want: Want, sink: SharedSink) -> Self {
        let Want { blob, size, ranges: left } = want;
        let (fetched, tried, failed) = (Fetched::default(), Vec::new(), BTreeSet::new());
        Self { peers, blob, size, class, sink, left, fetched, tried, failed }
    }

    /// Asks some peers at the same time for what is left, until it is here or none has more of it. Returns those that
    /// could not be talked to. What came is proven and in the sink, also if the rest did not come.
    pub(crate) async fn ask(&mut self, peers: Vec<Asked>) -> Result<Vec<PeerId>, FetchError> {
        let plan = Mutex::new(Plan::new(self.left.clone(), peers.len()));
        let table = Arc::new(Table { plan, began: Instant::now(), changed: Notify::new() });
        let mut answers: FuturesUnordered<_> =
            peers.iter().enumerate().map(|(at, asked)| self.work(&table, at, asked)).collect();
        let mut ended: Vec<(usize, Answered)> = Vec::new();
        while let Some((at, answered)) = answers.next().await {
            if let Err(TransferError::Sink(source)) = answered.outcome {
                return Err(FetchError::Sink { blob: self.blob, source });
            }
            ended.push((at, answered));
        }
        drop(answers);
        self.left = table.plan().left().clone();
        ended.sort_by_key(|&(at, _)| at);
        let mut unheard = Vec::new();
        for (at, Answered { bytes, outcome }) in ended {
            let Asked { peer, way, label } = &peers[at];
            self.fetched.bytes_received += bytes;
            if table.plan().has_sent(at) {
                self.fetched.peers.push(self.peers.name(*peer));
            }
            let error = match outcome {
                Ok(()) if self.left.is_empty() => continue,
                Ok(()) if *way == Way::Direct => TransferError::PeerLacksIt,
                Ok(()) => TransferError::PeerCannotGetIt,
                Err(error) => {
                    self.failed.insert(*peer);
                    if !error.is_fault() {
                        unheard.push(*peer);
                    }
                    error
                }
            };
            self.tried.push(format!("{label}: {}", tree::reason(&error)));
        }
        Ok(unheard)
    }

    /// Asks one peer for what the plan says, until that is nothing more.
    async fn work(&self, table: &Arc<Table>, at: usize, asked: &Asked) -> (usize, Answered) {
        let mut answered = Answered { bytes: 0, outcome: Ok(()) };
        answered.outcome = self.work_until_over(table, at, asked, &mut answered.bytes).await;
        if let Err(error) = &answered.outcome {
            let (peer, blob) = (&asked.label, self.blob);
            match error {
                error if error.is_fault() => warn!(peer, %blob, reason = tree::reason(error), "another peer is asked"),
                _ => debug!(peer, %blob, reason = tree::reason(error), "another peer is asked"),
            }
            table.plan().handle_failure(at);
        }
        table.changed.notify_waiters();
        (at, answered)
    }

    async fn work_until_over(
        &self,
        table: &Arc<Table>,
        at: usize,
        asked: &Asked,
        bytes: &mut u64,
    ) -> Result<(), TransferError> {
        let inner = &self.peers.inner;
        let mut cuts = 0;
        loop {
            let connection = tokio::select! {
                connection = reach(inner, asked.peer, REACH_LIMIT) => connection.map_err(TransferError::Connection)?,
                () = table.until(|plan| plan.left().is_empty()) => return Ok(()),
            };
            let before = table.plan().left().total_bytes();
            match self.work_over(&connection, table, at, asked, bytes).await {
                Err(TransferError::Connection(reason)) if is_replaced(&connection) && cuts < CUTS_MAX => {
                    debug!(peer = asked.label, blob = %self.blob, reason, "it goes on over another connection");
                    cuts = if table.plan().left().total_bytes() < before { 0 } else { cuts + 1 };
                    table.plan().handle_cut(at);
                    table.changed.notify_waiters();
                }
                outcome => return outcome,
            }
        }
    }

    async fn work_over(
        &self,
        connection: &quinn::Connection,
        table: &Arc<Table>,
        at: usize,
        &Asked { peer, way, .. }: &Asked,
        bytes: &mut u64,
    ) -> Result<(), TransferError> {
        let inner = &self.peers.inner;
        let mut came_nothing = false;
        loop {
            let changed = table.changed.notified();
            let step = {
                let (mut plan, now) = (table.plan(), table.now());
                if plan.is_over(now) {
                    return Ok(());
                }
                plan.poll(at, now, REQUEST_RANGES_MAX)
            };
            match step {
                // What others do takes time, and may turn out to be too much for them.
                None => drop(timeout(LOOK_AGAIN, changed).await),
                Some(Step::Get(ranges)) => {
                    let query = Query::groups(&ranges);
                    let terms = Terms::new(inner, peer, self.class);
                    let request = Request { connection, terms, way, blob: self.blob, size: self.size, query };
                    let needless = table.until(|plan| plan.left().is_empty() || plan.is_needless(at));
                    // Safe to break off: what has come by then is proven and kept first.
                    let (shared, counting) = (table.clone(), request.terms.clone());
                    let came = move |ranges: &RangeSet| counting.waste(shared.handle_pieces(at, ranges));
                    let (received, outcome) = request.run(&self.sink, came, needless).await;
                    came_nothing = received.ranges.is_empty();
                    *bytes += received.bytes;
                    outcome?;
                    table.plan().handle_answer(at, table.now());
                }
                // What it can get, nobody knows before it has tried; but it is not to try for nothing again and again.
                Some(Step::Have(_)) if way != Way::Direct && came_nothing => return Ok(()),
                Some(Step::Have(ranges)) if way != Way::Direct => table.plan().handle_have(at, &ranges, u64::MAX),
                Some(Step::Have(ranges)) => {
                    let terms = Terms::plain(inner, peer, Class::Foreground);
                    let have = tokio::select! {
                        have = have(connection, terms, self.blob, &ranges) => have,
                        () = table.until(|plan| plan.left().is_empty()) => return Ok(()),
                    };
                    match have {
                        Ok(have) if have.size == self.size => table.plan().handle_have(at, &have.ranges, have.upto),
                        Ok(have) => {
                            debug!(%peer, blob = %self.blob, was_bytes = self.size, is_bytes = have.size, "it has another size of it");
                            table.plan().handle_failure(at);
                            return Ok(());
                        }
                        Err(error) if is_replaced(connection) => return Err(error),
                        // What came before is good; that it cannot say what else it has is no worse than if it had nothing.
                        Err(error) => {
                            debug!(%peer, blob = %self.blob, reason = tree::reason(&error), "it does not say what it has");
                            table.plan().handle_failure(at);
                            return Ok(());
                        }
                    }
                }
            }
            table.changed.notify_waiters();
        }
    }
}

impl Table {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Returns how many bytes of `ranges` another peer had sent before.
    fn handle_pieces(&self, source: usize, ranges: &RangeSet) -> u64 {
        let now = self.now();
        let mut plan = self.plan();
        let before = plan.left().total_bytes();
        ranges.iter().for_each(|range| plan.handle_piece(source, range, now));
        let new = before - plan.left().total_bytes();
        drop(plan);
        self.changed.notify_waiters();
        ranges.total_bytes().saturating_sub(new)
    }

    /// Waits until the plan is so.
    async fn until(&self, is_so: impl Fn(&Plan) -> bool) {
        loop {
            let changed = self.changed.notified();
            if is_so(&self.plan()) {
                return;
            }
            changed.await;
        }
    }
}

/// Whether a connection ended for what says nothing of the peer: closed here, in favour of another one with the same peer, or
/// unknown to it since it was started again.
fn is_replaced(connection: &quinn::Connection) -> bool {
    connection.close_reason().is_some_and(|reason| {
        Close::Duplicate.is(&reason) || matches!(reason, ConnectionError::LocallyClosed | ConnectionError::Reset)
    })
}

/// So often in a row a peer is asked over another connection without anything that proved having come.
const CUTS_MAX: usize = 3;
/// How often those that have nothing to do look whether somebody needs help.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
