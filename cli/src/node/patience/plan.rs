//! When a command tries again, and when it gives up. Pure: times and states of connections are passed in.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use namespace::PeerId;
use peers::Presence;

/// The machines that have been connected since the start of the program.
pub(super) type Presences = BTreeMap<PeerId, Presence>;

/// What a command knows of the machines that it needs.
#[derive(Debug)]
pub(super) struct Plan {
    /// The longest time without progress.
    limit: Duration,
    /// A machine for which the limit is [`SILENT_LIMIT`] if it stopped answering.
    less_for: Option<PeerId>,
    /// The machines that were seen connected since the command began. Nobody waits for others.
    expected: BTreeSet<PeerId>,
    /// When something last came.
    came_at: Option<Instant>,
    /// When the first failure since then was, and whether the user has been notified of it.
    waiting_since: Option<Instant>,
    is_notified: bool,
    notified_at: Option<Instant>,
}

/// A pause before the next attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pause {
    /// The longest wait for a machine to connect or disconnect; then [`PAUSE`] follows.
    pub(super) for_a_change: Duration,
    /// The limit and the machines to notify the user of, if a notice is due.
    pub(super) notice: Option<(Duration, BTreeSet<PeerId>)>,
}

impl Plan {
    pub(super) fn new(limit: Duration, less_for: Option<PeerId>) -> Self {
        let (expected, waiting_since, is_notified) = (BTreeSet::new(), None, false);
        Self { limit, less_for, expected, came_at: None, waiting_since, is_notified, notified_at: None }
    }

    /// Adds the machines that are connected to the expected ones.
    pub(super) fn look(&mut self, presences: &Presences) {
        let connected = presences.iter().filter(|(_, presence)| presence.is_connected);
        self.expected.extend(connected.map(|(peer, _)| *peer));
    }

    /// Notes that bytes came, or that an attempt succeeded.
    pub(super) fn came(&mut self, now: Instant) {
        self.came_at = Some(now);
        (self.waiting_since, self.is_notified) = (None, false);
    }

    /// Returns for how long nothing has come during an attempt.
    pub(super) fn silence(&self, began: Instant, now: Instant) -> Duration {
        now.saturating_duration_since(self.came_at.map_or(began, |came| came.max(began)))
    }

    /// Returns those of `peers` that the command may wait for.
    pub(super) fn expected(&self, peers: impl IntoIterator<Item = PeerId>) -> BTreeSet<PeerId> {
        peers.into_iter().filter(|peer| !self.limit.is_zero() && self.expected.contains(peer)).collect()
    }

    /// Decides what follows an attempt that failed because of `peers`, all expected, after a silence. `before` are the connections
    /// when it began. `None`: nothing.
    pub(super) fn failed(
        &mut self,
        now: Instant,
        silence: Duration,
        peers: &BTreeSet<PeerId>,
        before: &Presences,
        presences: &Presences,
    ) -> Option<Pause> {
        let may_have_stalled = silence >= STALL_LIMIT && !peers.is_empty();
        if !may_have_stalled && !has_moved(peers, before, presences) {
            return None;
        }
        let fell_silent = |peer| presences.get(&peer).is_some_and(|seen| !seen.is_connected && seen.fell_silent);
        let is_silent = self.less_for.is_some_and(|peer| peers.contains(&peer) && fell_silent(peer));
        let limit = if is_silent { self.limit.min(SILENT_LIMIT) } else { self.limit };
        let since = *self.waiting_since.get_or_insert(now);
        if since < now && now - since >= limit {
            return None;
        }
        let away: BTreeSet<_> = peers.iter().copied().filter(|peer| is_away(presences, peer)).collect();
        let for_a_change = if away.len() == peers.len() { AWAY_PAUSE } else { Duration::ZERO };
        let is_time = !self.is_notified && self.notified_at.is_none_or(|at| now - at >= NOTIFY_INTERVAL);
        if is_time {
            (self.is_notified, self.notified_at) = (true, Some(now));
        }
        let waited_for = if away.is_empty() { peers.clone() } else { away };
        Some(Pause { for_a_change, notice: is_time.then_some((limit, waited_for)) })
    }
}

/// Whether one of `peers` is away, or has connected or disconnected since `before`.
pub(super) fn has_moved(peers: &BTreeSet<PeerId>, before: &Presences, presences: &Presences) -> bool {
    let changes = |seen: &Presences, peer| seen.get(peer).map_or(0, |presence| presence.changes);
    peers.iter().any(|peer| is_away(presences, peer) || changes(presences, peer) != changes(before, peer))
}

fn is_away(presences: &Presences, peer: &PeerId) -> bool {
    presences.get(peer).is_none_or(|presence| !presence.is_connected)
}

/// The time without a byte after which an answer fails. Its connection survives a pause of the network that is slightly longer.
const STALL_LIMIT: Duration = Duration::from_secs(15);
/// The least time between two notices.
const NOTIFY_INTERVAL: Duration = Duration::from_secs(10);
/// The limit for a destination that stopped answering without closing its connection.
pub(super) const SILENT_LIMIT: Duration = Duration::from_secs(20);
/// The longest pause between two attempts while all machines are away.
pub(super) const AWAY_PAUSE: Duration = Duration::from_secs(5);
/// The least pause between two attempts.
pub(super) const PAUSE: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests;
