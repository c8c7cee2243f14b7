//! Waiting for machines that went away while a command needs them: a restart, or a pause of the network, is no error. Rules:
//! spec/copy.md, "Pauses".

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use namespace::PeerId;
use peers::Presence;
use tokio::time::{sleep, timeout};

use super::Node;
use crate::{
    event::{Event, Reporter},
    failure::{Code, Failure},
};

/// The machines that a command waits for, and how long.
pub(super) struct Patience {
    node: Node,
    reporter: Reporter,
    /// The longest time without progress.
    limit: Duration,
    /// The machines that were seen connected since the command began. Nobody waits for others.
    expected: Mutex<BTreeSet<PeerId>>,
    /// A machine for which the limit is [`SILENT_LIMIT`] if it stopped answering.
    less_for: Option<PeerId>,
    /// When the first failure without progress since was.
    waiting: Mutex<Option<Instant>>,
    /// When the user was last notified.
    notified: Mutex<Option<Instant>>,
}

/// The start of an attempt, and the state of all connections at that time.
pub(super) struct Attempt {
    began: Instant,
    presences: BTreeMap<PeerId, Presence>,
}

impl Patience {
    /// Creates the one of a command that begins now.
    pub(super) fn new(node: &Node, reporter: &Reporter, limit: Duration) -> Self {
        let patience = Self {
            node: node.clone(),
            reporter: reporter.clone(),
            limit,
            expected: Mutex::default(),
            less_for: None,
            waiting: Mutex::default(),
            notified: Mutex::default(),
        };
        patience.look();
        patience
    }

    /// Sets the machine for which the limit is [`SILENT_LIMIT`] if it stopped answering: it may be frozen, or off.
    pub(super) fn less_for(self, peer: Option<PeerId>) -> Self {
        Self { less_for: peer, ..self }
    }

    /// Begins an attempt that fails if a machine disconnects.
    pub(super) fn begin(&self) -> Attempt {
        Attempt { began: Instant::now(), presences: self.look() }
    }

    /// Returns the state of all connections, and adds the connected machines to the expected ones.
    fn look(&self) -> BTreeMap<PeerId, Presence> {
        let presences = self.node.peers().presences();
        let connected = presences.iter().filter(|(_, presence)| presence.is_connected);
        lock(&self.expected).extend(connected.map(|(peer, _)| *peer));
        presences
    }

    /// Whether a machine has connected or disconnected since the attempt began.
    pub(super) fn has_changed(&self, attempt: &Attempt) -> bool {
        self.look() != attempt.presences
    }

    /// Notes that an attempt succeeded.
    pub(super) fn came(&self) {
        *lock(&self.waiting) = None;
    }

    /// Whether an attempt that failed because of one of `peers` is to be made again, now: one of them went away since the
    /// command began, or went and came meanwhile. Waits a while first. Notifies the user that it waits.
    pub(super) async fn again(
        &self,
        attempt: Attempt,
        peers: impl IntoIterator<Item = PeerId>,
        failure: &Failure,
    ) -> bool {
        if failure.code != Code::Unreachable || self.limit.is_zero() || self.reporter.is_closed() {
            return false;
        }
        let mut changed = self.node.peers().moves();
        let mut now = self.look();
        let peers: BTreeSet<_> = {
            let expected = lock(&self.expected);
            peers.into_iter().filter(|peer| expected.contains(peer)).collect()
        };
        let is_away = |now: &BTreeMap<_, Presence>, peer| now.get(peer).is_none_or(|presence| !presence.is_connected);
        let changes = |seen: &BTreeMap<_, Presence>, peer| seen.get(peer).map_or(0, |presence| presence.changes);
        let has_moved = |now: &BTreeMap<_, Presence>| {
            peers.iter().any(|peer| is_away(now, peer) || changes(now, peer) != changes(&attempt.presences, peer))
        };
        // A machine that has been silent for long is about to be disconnected.
        if !peers.is_empty() && attempt.began.elapsed() >= STALLED {
            let disconnected = async {
                while !has_moved(&now) && changed.changed().await.is_ok() {
                    now = self.look();
                }
            };
            let _ = timeout(DISCONNECT_LIMIT, disconnected).await;
        }
        if !has_moved(&now) {
            return false;
        }
        let fell_silent = |peer: &PeerId| now.get(peer).is_some_and(|seen| !seen.is_connected && seen.fell_silent);
        let is_silent = self.less_for.is_some_and(|peer| peers.contains(&peer) && fell_silent(&peer));
        let limit = if is_silent { self.limit.min(SILENT_LIMIT) } else { self.limit };
        let waiting = {
            let mut waiting = lock(&self.waiting);
            let was = *waiting;
            waiting.get_or_insert_with(Instant::now);
            was
        };
        match waiting {
            Some(since) if since.elapsed() >= limit => return false,
            None if self.is_time_to_notify() => {
                let (reason, for_s) = (failure.reason(), limit.as_secs());
                let _ = self.reporter.send(Event::Waiting { reason, for_s }).await;
            }
            _ => {}
        }
        if peers.iter().all(|peer| is_away(&now, peer)) {
            let _ = timeout(AWAY_PAUSE, changed.changed()).await;
        }
        sleep(PAUSE).await;
        true
    }

    /// Whether it is time to notify the user; if so, the time is noted.
    fn is_time_to_notify(&self) -> bool {
        let mut notified = lock(&self.notified);
        let is_time = notified.is_none_or(|at| at.elapsed() >= NOTIFY_INTERVAL);
        if is_time {
            *notified = Some(Instant::now());
        }
        is_time
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The least time between two notices.
const NOTIFY_INTERVAL: Duration = Duration::from_secs(10);
/// Duration from which on an attempt may have failed because a machine stopped answering.
const STALLED: Duration = Duration::from_secs(5);
/// The longest wait for the disconnection of such a machine. An answer counts as stalled after 15 s, and a connection is idle 15 s after
/// the first keep-alive that nobody acknowledged, which is sent within 5 s.
const DISCONNECT_LIMIT: Duration = Duration::from_secs(8);
/// The limit for a destination that stopped answering without closing its connection.
const SILENT_LIMIT: Duration = Duration::from_secs(20);
/// The longest pause between two attempts while all machines are away.
const AWAY_PAUSE: Duration = Duration::from_secs(5);
/// The least pause between two attempts.
const PAUSE: Duration = Duration::from_millis(300);
