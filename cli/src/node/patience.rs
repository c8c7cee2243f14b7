//! Waiting for machines that went away while a command needs them: a restart, or a pause of the network, is no error. Rules:
//! spec/copy.md, "Pauses".

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use namespace::PeerId;
use tokio::time::{sleep, timeout};

use self::plan::{PAUSE, Pause, Plan, Presences, has_moved};
use super::Node;
use crate::{
    event::{Event, Reporter},
    failure::{Code, Failure},
};

mod plan;

/// The machines that a command waits for, and how long.
pub(super) struct Patience {
    node: Node,
    reporter: Reporter,
    plan: Mutex<Plan>,
}

/// The start of an attempt, and the state of all connections at that time.
pub(super) struct Attempt {
    began: Instant,
    presences: Presences,
}

impl Patience {
    /// Creates the one of a command that begins now and waits up to `limit` without progress. A machine `less_for` that stopped
    /// answering is waited for at most 20 s: it may be frozen, or off.
    pub(super) fn new(node: &Node, reporter: &Reporter, limit: Duration, less_for: Option<PeerId>) -> Self {
        let plan = Mutex::new(Plan::new(limit, less_for));
        let patience = Self { node: node.clone(), reporter: reporter.clone(), plan };
        patience.look();
        patience
    }

    /// Begins an attempt that fails if a machine disconnects.
    pub(super) fn begin(&self) -> Attempt {
        Attempt { began: Instant::now(), presences: self.look() }
    }

    /// Returns the state of all connections. Machines that are connected are waited for from now on.
    fn look(&self) -> Presences {
        let presences = self.node.peers().presences();
        lock(&self.plan).look(&presences);
        presences
    }

    /// Whether a machine has connected or disconnected since the attempt began.
    pub(super) fn has_changed(&self, attempt: &Attempt) -> bool {
        self.look() != attempt.presences
    }

    /// Notes that bytes came, or that an attempt succeeded.
    pub(super) fn came(&self) {
        lock(&self.plan).came(Instant::now());
    }

    /// Whether an attempt that failed because of one of `peers` is to be made again, now: one of them went away since the
    /// command began, or went and came meanwhile. Waits a while first. Notifies the user that it waits.
    pub(super) async fn again(
        &self,
        attempt: Attempt,
        peers: impl IntoIterator<Item = PeerId>,
        failure: &Failure,
    ) -> bool {
        if failure.code != Code::Unreachable || self.reporter.is_closed() {
            return false;
        }
        let mut changed = self.node.peers().moves();
        let mut presences = self.look();
        let peers = lock(&self.plan).expected(peers);
        // A machine that has been silent for long is about to be disconnected.
        let silence = lock(&self.plan).silence(attempt.began, Instant::now());
        if !peers.is_empty() && silence >= STALLED {
            let disconnected = async {
                while !has_moved(&peers, &attempt.presences, &presences) && changed.changed().await.is_ok() {
                    presences = self.look();
                }
            };
            let _ = timeout(DISCONNECT_LIMIT, disconnected).await;
        }
        let pause = lock(&self.plan).failed(Instant::now(), silence, &peers, &attempt.presences, &presences);
        let Some(Pause { for_a_change, notice }) = pause else { return false };
        if let Some((limit, peers)) = notice {
            let peers = peers.into_iter().map(|peer| self.node.peer_name(Some(peer))).collect();
            let (reason, for_s) = (failure.reason(), limit.as_secs());
            let _ = self.reporter.send(Event::Waiting { peers, reason, for_s }).await;
        }
        let _ = timeout(for_a_change, changed.changed()).await;
        sleep(PAUSE).await;
        true
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Duration from which on an attempt may have failed because a machine stopped answering.
const STALLED: Duration = Duration::from_secs(5);
/// The longest wait for the disconnection of such a machine. An answer counts as stalled after 15 s, and a connection is idle 15 s after
/// the first keep-alive that nobody acknowledged, which is sent within 5 s.
const DISCONNECT_LIMIT: Duration = Duration::from_secs(8);
