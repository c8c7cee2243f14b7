//! Follows the pins for as long as the daemon runs: fetches what is missing below them, and what comes new.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use blobstore::Fetched;
use namespace::PeerId;
use tokio::{
    sync::watch,
    time::{sleep, sleep_until},
};
use tracing::{debug, info, warn};

use super::{
    super::Node,
    ahead::Bringing,
    tally::{Job, Why},
};
use crate::failure::Failure;

/// One round of bringing what is missing.
struct Round {
    node: Node,
    is_over: AtomicBool,
    /// Whether anything came of it.
    came: AtomicBool,
}

impl Bringing for Round {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    fn came(&self, bytes: u64) {
        self.came.store(true, Ordering::Relaxed);
        self.node.inner.keeping.came(bytes);
    }

    fn ended(&self, job: &Job, outcome: Result<Fetched, Failure>) {
        let mut failures = self.node.inner.keeping.failures();
        match outcome {
            Ok(_) => {
                self.came.store(true, Ordering::Relaxed);
                failures.remove(job.blob);
            }
            Err(failure) => {
                debug!(blob = %job.blob, reason = failure.reason(), "cannot be kept here yet");
                failures.add(job.blob, failure.reason(), Instant::now());
            }
        }
    }
}

/// What a keeper listens to.
struct Ears {
    /// Something was said or heard.
    changes: watch::Receiver<u64>,
    /// Something happened to a peer.
    moves: watch::Receiver<u64>,
    /// Bytes that were here may be lost.
    losses: watch::Receiver<u64>,
    /// Somebody changed the pins, or what the cache may take.
    nudges: watch::Receiver<u64>,
}

impl Node {
    /// Keeps what is pinned for as long as `stopped` says nothing.
    pub(crate) async fn keep_pins(self, mut stopped: watch::Receiver<bool>) {
        let mut ears = Ears {
            changes: self.inner.namespace.changes(),
            moves: self.inner.peers.moves(),
            losses: self.inner.keeping.losses.subscribe(),
            nudges: self.inner.keeping.nudges.subscribe(),
        };
        let run = async {
            let mut known = BTreeSet::new();
            loop {
                self.keep_once(&mut ears, &mut known).await;
            }
        };
        tokio::select! {
            () = run => {}
            _ = stopped.wait_for(|&stop| stop) => {}
        }
    }

    /// Looks once, brings what is missing, and if that is nothing, waits until there is a reason to look again.
    async fn keep_once(&self, ears: &mut Ears, known: &mut BTreeSet<PeerId>) {
        for ear in [&mut ears.changes, &mut ears.moves, &mut ears.losses, &mut ears.nudges] {
            ear.borrow_and_update();
        }
        let connected = self.connected();
        if !connected.is_subset(known) {
            self.inner.keeping.failures().clear();
        }
        known.clone_from(&connected);
        let began = Instant::now();
        let jobs = match self.follow_pins().await {
            Ok(jobs) => jobs,
            Err(failure) => {
                let wait_ms = FAILED_PAUSE.as_millis() as u64;
                warn!(reason = failure.reason(), wait_ms, "what is pinned cannot be followed");
                return sleep(FAILED_PAUSE).await;
            }
        };
        // Looking takes no more than a small part of the time, however often something changes.
        let next = Instant::now() + PAUSE_LEAST.max(began.elapsed() * LOOKED_PART);
        if !jobs.is_empty() {
            return self.bring_round(jobs, ears, next).await;
        }
        let now = Instant::now();
        let due = self.inner.keeping.failures().next_due(now).map(|due| due.saturating_duration_since(now));
        let no_room =
            self.inner.keeping.status().places.iter().any(|(_, tally)| tally.missing.contains_key(&Why::NoRoom));
        let wait = due.unwrap_or(LOOK_ANYWAY).min(if no_room { NO_ROOM_PAUSE } else { LOOK_ANYWAY });
        tokio::select! {
            _ = ears.nudges.changed() => {}
            () = self.changed(&mut ears.changes, &mut ears.losses, next) => {}
            () = self.contacts_changed(&mut ears.moves, &connected) => {}
            () = sleep(wait) => {}
        }
    }

    async fn bring_round(&self, jobs: Vec<Job>, ears: &mut Ears, until: Instant) {
        let (files, began) = (jobs.len(), Instant::now());
        let round =
            Arc::new(Round { node: self.clone(), is_over: AtomicBool::new(false), came: AtomicBool::new(false) });
        let mut bringing = std::pin::pin!(self.bring_ahead(jobs, round.clone()));
        tokio::select! {
            () = &mut bringing => {}
            () = async {
                tokio::select! {
                    _ = ears.nudges.changed() => {}
                    () = self.changed(&mut ears.changes, &mut ears.losses, until) => {}
                }
            } => {
                round.is_over.store(true, Ordering::Relaxed);
                bringing.await;
            }
        }
        let duration_ms = began.elapsed().as_millis() as u64;
        if round.came.load(Ordering::Relaxed) || round.is_over() {
            info!(files, duration_ms, "brought what is pinned");
            return sleep(PAUSE_LEAST).await;
        }
        tokio::select! {
            () = sleep(FAILED_PAUSE) => {}
            _ = ears.nudges.changed() => {}
        }
    }

    /// Waits for a change, but until `next` at least.
    async fn changed(&self, changes: &mut watch::Receiver<u64>, losses: &mut watch::Receiver<u64>, next: Instant) {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { std::future::pending().await },
            lost = losses.changed() => if lost.is_err() { std::future::pending().await },
        }
        sleep_until(next.into()).await;
    }

    async fn contacts_changed(&self, moves: &mut watch::Receiver<u64>, known: &BTreeSet<PeerId>) {
        while moves.changed().await.is_ok() {
            if self.connected() != *known {
                return;
            }
        }
        std::future::pending().await
    }
}

/// Between one look and the next.
const PAUSE_LEAST: Duration = Duration::from_millis(100);
/// And so many times what the look took.
const LOOKED_PART: u32 = 10;
const FAILED_PAUSE: Duration = Duration::from_secs(5);
const NO_ROOM_PAUSE: Duration = Duration::from_secs(60);
/// Whatever was not heard of.
const LOOK_ANYWAY: Duration = Duration::from_secs(3600);
