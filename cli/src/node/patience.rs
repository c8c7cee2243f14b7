//! Waiting for machines that went away while a command needs them: a restart, or a pause of the network, is no error. Rules:
//! spec/copy.md, "Pauses".

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use namespace::PeerId;
use tokio::time::{sleep, timeout};

use super::Node;
use crate::{
    event::{Event, Reporter},
    failure::{Code, Failure},
};

/// How long a command waits, and for whom.
pub(super) struct Patience {
    node: Node,
    reporter: Reporter,
    /// Since when nothing has come to anything, at most.
    limit: Duration,
    /// The machines that were seen connected since the command began. Nobody waits for others.
    expected: Mutex<BTreeSet<PeerId>>,
    /// Who is waited for only [`SILENT_LIMIT`] if it falls silent.
    less_for: Option<PeerId>,
    /// Since when it waits, and how long at most.
    waiting: Mutex<Option<(Instant, Duration)>>,
    /// When the user was last notified.
    notified: Mutex<Option<Instant>>,
}

/// When something was begun, and what had happened to machines until then.
pub(super) struct Attempt {
    began: Instant,
    moves: u64,
}

impl Patience {
    /// That of a command that begins now.
    pub(super) fn new(node: &Node, reporter: &Reporter, limit: Duration) -> Self {
        let (node, reporter) = (node.clone(), reporter.clone());
        Self {
            node,
            reporter,
            limit,
            expected: Mutex::default(),
            less_for: None,
            waiting: Mutex::default(),
            notified: Mutex::default(),
        }
    }

    /// Waits less for this machine if it falls silent: it may be frozen, or off.
    pub(super) fn less_for(self, peer: Option<PeerId>) -> Self {
        Self { less_for: peer, ..self }
    }

    /// To be called before something is done that machines may fail in.
    pub(super) fn begin(&self) -> Attempt {
        let moves = *self.node.peers().moves().borrow();
        self.look();
        Attempt { began: Instant::now(), moves }
    }

    /// Notes who is connected.
    fn look(&self) -> BTreeSet<PeerId> {
        let connected = self.node.connected();
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).extend(&connected);
        connected
    }

    /// Something came of an attempt.
    pub(super) fn came(&self) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether an attempt that failed because of one of `peers` is to be made again, now: one of them went away since the
    /// command began, or went and came meanwhile. Waits a while first. Notifies the user that it waits.
    pub(super) async fn again(
        &self,
        Attempt { began, moves }: Attempt,
        peers: impl IntoIterator<Item = PeerId>,
        failure: &Failure,
    ) -> bool {
        if failure.code != Code::Unreachable || self.limit.is_zero() || self.reporter.is_closed() {
            return false;
        }
        self.look();
        let peers: Vec<_> = {
            let expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
            peers.into_iter().filter(|peer| expected.contains(peer)).collect()
        };
        let mut moved = self.node.peers().moves();
        if peers.is_empty() {
            return false;
        }
        // A machine that has been silent for long is about to be disconnected.
        if began.elapsed() >= STALLED && *moved.borrow_and_update() == moves {
            let _ = timeout(DISCONNECT_LIMIT, moved.changed()).await;
        }
        let connected = self.look();
        let is_away = |peer: &PeerId| !connected.contains(peer);
        if !(peers.iter().any(is_away) || *moved.borrow_and_update() != moves) {
            return false;
        }
        let is_silent = |peer: &PeerId| {
            let mut all = self.node.peers().status().into_iter();
            all.any(|status| status.fell_silent && status.peer.id == *peer)
        };
        let fell_silent = self.less_for.filter(|peer| peers.contains(peer)).is_some_and(|peer| is_silent(&peer));
        let limit = if fell_silent { self.limit.min(SILENT_LIMIT) } else { self.limit };
        let waiting = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let was = *waiting;
            waiting.get_or_insert_with(|| (Instant::now(), limit));
            was
        };
        match waiting {
            Some((since, limit)) if since.elapsed() >= limit => return false,
            None if self.is_time_to_notify() => {
                let (reason, for_s) = (failure.reason(), limit.as_secs());
                let _ = self.reporter.send(Event::Waiting { reason, for_s }).await;
            }
            _ => {}
        }
        if peers.iter().all(is_away) {
            let _ = timeout(AWAY_PAUSE, moved.changed()).await;
        }
        sleep(PAUSE).await;
        true
    }

    /// Whether it is time to notify the user; if so, the time is noted.
    fn is_time_to_notify(&self) -> bool {
        let mut notified = self.notified.lock().unwrap_or_else(PoisonError::into_inner);
        let is_time = notified.is_none_or(|at| at.elapsed() >= NOTIFY_INTERVAL);
        if is_time {
            *notified = Some(Instant::now());
        }
        is_time
    }
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
