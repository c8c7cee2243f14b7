use std::time::{Duration, Instant};

use crate::race::FlawKind;

/// When to dial a peer again. Knows no clock. Which wait when: spec/wire.md, "When".
#[derive(Debug, Default)]
pub(crate) struct Redial {
    /// Time of the first failed dial since the peer was connected, or since [`urge`](Self::urge).
    failing_since: Option<Instant>,
    /// Connections in a row that did not last.
    short_lived: usize,
    /// When the last dial failed, and of what.
    failed: Option<(Instant, FlawKind)>,
    /// When to dial next; at once if not said.
    due: Option<Instant>,
    /// When the last connection ended.
    lost_at: Option<Instant>,
    /// When the peer said last that there is another connection.
    replaced_at: Option<Instant>,
}

/// What there is for someone who wants the peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// It is being dialled, or may come by itself: wait for it.
    Soon,
    /// Do without it.
    NotNow,
}

impl Redial {
    /// When to dial; at once if there is nothing.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether the peer itself, or whoever is at its addresses, said no the last time.
    pub(crate) fn is_refused(&self) -> bool {
        self.failed.is_some_and(|(_, kind)| kind != FlawKind::Network)
    }

    /// A dial failed at `now`. `random` is between 0 and 1.
    pub(crate) fn handle_failed(&mut self, now: Instant, kind: FlawKind, random: f64) {
        self.failed = Some((now, kind));
        let since = *self.failing_since.get_or_insert(now);
        let wait = match kind {
            FlawKind::Network if now < since + OUTAGE_MAX => OUTAGE_WAIT,
            FlawKind::Network => AWAY_WAIT,
            FlawKind::Refused | FlawKind::Elsewhere => REFUSED_WAIT,
        };
        self.due = Some(now + less(wait, random));
    }

    /// A connection that had lasted for so long is gone.
    pub(crate) fn handle_lost(&mut self, now: Instant, lasted: Duration, random: f64) {
        self.lost_at = Some(now);
        if lasted >= STEADY {
            self.urge();
        } else {
            // It let go of us at once: dialling at once again would go round and round. Once, a fetch may have it tried.
            self.failed = (self.short_lived > 0).then_some((now, FlawKind::Network));
            let wait = SHORT_LIVED_WAITS_S[self.short_lived.min(SHORT_LIVED_WAITS_S.len() - 1)];
            self.short_lived += 1;
            self.due = Some(now + less(Duration::from_secs(wait), random));
        }
    }

    /// The connection that is gone was closed by the peer in favour of another one, which is about to be in use here too.
    pub(crate) fn handle_replaced(&mut self, now: Instant) {
        self.replaced_at = Some(now);
    }

    /// There is reason to think that it will work now, or somebody asks for it: dial at once, and let waits start anew.
    pub(crate) fn urge(&mut self) {
        (self.failing_since, self.short_lived, self.failed, self.due) = (None, 0, None, None);
    }

    /// Somebody wants to fetch from the peer, which is not connected; `can_dial` if there is an address.
    pub(crate) fn handle_wanted(&mut self, now: Instant, can_dial: bool) -> Wanted {
        match self.failed {
            _ if self.replaced_at.is_some_and(|at| now < at + FRESH) => Wanted::Soon,
            _ if !can_dial && self.lost_at.is_none_or(|at| now >= at + COMES_BACK) => Wanted::NotNow,
            _ if !can_dial => Wanted::Soon,
            Some((_, FlawKind::Refused | FlawKind::Elsewhere)) => Wanted::NotNow,
            Some((at, FlawKind::Network)) if now < at + FRESH => {
                self.due = self.due.map(|due| due.min(at + FRESH));
                Wanted::NotNow
            }
            _ => {
                self.due = self.due.map(|due| due.min(now));
                Wanted::Soon
            }
        }
    }
}

/// Less a random part of up to a quarter.
fn less(wait: Duration, random: f64) -> Duration {
    wait.mul_f64(1.0 - random.clamp(0.0, 1.0) / 4.0)
}

/// Wait after a failed dial during the first [`OUTAGE_MAX`].
const OUTAGE_WAIT: Duration = Duration::from_secs(3);
/// Time since the first failed dial, after which [`AWAY_WAIT`] applies.
const OUTAGE_MAX: Duration = Duration::from_secs(600);
/// Wait after a failed dial of a peer that has been away for longer.
const AWAY_WAIT: Duration = Duration::from_secs(30);
/// Waits after connections in a row that did not last.
const SHORT_LIVED_WAITS_S: [u64; 6] = [5, 15, 30, 60, 120, 300];
const REFUSED_WAIT: Duration = Duration::from_secs(300);
/// For how long a failed dial speaks for the next one.
const FRESH: Duration = Duration::from_secs(3);
/// For how long a peer that has no address is waited for once its connection is lost.
const COMES_BACK: Duration = Duration::from_secs(6);
/// A connection that lasted less has failed.
const STEADY: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    /// The seconds from `now` until a dial is due.
    fn wait_s(redial: &Redial, now: Instant) -> u64 {
        redial.due().map_or(0, |due| due.saturating_duration_since(now).as_secs())
    }

    fn failed(redial: &mut Redial, now: Instant) -> u64 {
        redial.handle_failed(now, FlawKind::Network, 0.0);
        wait_s(redial, now)
    }

    #[test]
    fn an_outage_of_ten_minutes_is_over_within_seconds() {
        let (mut redial, begun) = (Redial::default(), Instant::now());
        assert_eq!(redial.due(), None, "at once at first");
        let at = |s| begun + Duration::from_secs(s);
        for s in [0, 8, 300, 599] {
            assert_eq!(failed(&mut redial, at(s)), 3);
        }
        for s in [600, 3600] {
            assert_eq!(failed(&mut redial, at(s)), 30);
        }
        redial.handle_failed(at(3600), FlawKind::Network, 1.0);
        assert_eq!(redial.due(), Some(at(3600) + Duration::from_millis(22_500)));
        redial.urge();
        assert_eq!((redial.due(), failed(&mut redial, at(3600))), (None, 3));
    }

    #[test]
    fn who_says_no_is_left_alone() {
        for kind in [FlawKind::Refused, FlawKind::Elsewhere] {
            let (mut redial, now) = (Redial::default(), Instant::now());
            redial.handle_failed(now, kind, 0.0);
            assert!(redial.is_refused());
            let later = now + Duration::from_secs(100);
            assert_eq!(redial.handle_wanted(later, true), Wanted::NotNow);
            assert_eq!(wait_s(&redial, now), 300, "also if a fetch wants it");
            redial.urge();
            assert!(redial.due().is_none() && !redial.is_refused());
        }
    }

    #[test]
    fn what_is_lost_is_dialled_at_once_unless_it_never_held() {
        let (mut redial, now) = (Redial::default(), Instant::now());
        let waits = [(); 7].map(|()| {
            redial.handle_lost(now, Duration::from_millis(4999), 0.0);
            wait_s(&redial, now)
        });
        assert_eq!(waits, [5, 15, 30, 60, 120, 300, 300]);
        assert_eq!(redial.handle_wanted(now, true), Wanted::NotNow);
        redial.handle_lost(now, Duration::from_secs(5), 0.0);
        assert_eq!(redial.due(), None);
        redial.handle_lost(now, Duration::ZERO, 0.0);
        assert_eq!((wait_s(&redial, now), redial.handle_wanted(now, true)), (5, Wanted::Soon), "once it may be chance");
        assert_eq!(redial.due(), Some(now));
    }

    #[test]
    fn a_fetch_has_it_dialled_but_not_again_and_again() {
        let (mut redial, now) = (Redial::default(), Instant::now());
        assert_eq!(redial.handle_wanted(now, true), Wanted::Soon);
        let at = |ms| now + Duration::from_millis(ms);
        redial.handle_failed(now - OUTAGE_MAX, FlawKind::Network, 0.0);
        assert_eq!(failed(&mut redial, now), 30);
        assert_eq!(redial.handle_wanted(at(2999), true), Wanted::NotNow);
        assert_eq!(redial.due(), Some(at(3000)), "it is dialled all the same, a moment later");
        assert_eq!(failed(&mut redial, now), 30, "and the waits go on");
        assert_eq!(redial.handle_wanted(at(3000), true), Wanted::Soon);
        assert_eq!(redial.due(), Some(at(3000)));
    }

    #[test]
    fn who_says_that_there_is_another_connection_is_waited_for() {
        let (mut redial, now) = (Redial::default(), Instant::now());
        for _ in 0..2 {
            redial.handle_lost(now, Duration::from_millis(10), 0.0);
        }
        assert_eq!(redial.handle_wanted(now, true), Wanted::NotNow);
        let due = redial.due();
        redial.handle_replaced(now);
        for can_dial in [false, true] {
            assert_eq!(redial.handle_wanted(now + FRESH - Duration::from_millis(1), can_dial), Wanted::Soon);
        }
        assert_eq!(redial.due(), due, "and not dialled for it");
        assert_eq!(redial.handle_wanted(now + FRESH, false), Wanted::Soon, "it was there a moment ago");
        assert_eq!(redial.handle_wanted(now + COMES_BACK, false), Wanted::NotNow);
    }

    #[test]
    fn who_has_no_address_is_waited_for_when_it_has_just_gone() {
        let (mut redial, now) = (Redial::default(), Instant::now());
        assert_eq!(redial.handle_wanted(now, false), Wanted::NotNow);
        redial.handle_lost(now, STEADY, 0.0);
        let at = |ms| now + Duration::from_millis(ms);
        assert_eq!(redial.handle_wanted(at(5999), false), Wanted::Soon);
        assert_eq!(redial.handle_wanted(at(6000), false), Wanted::NotNow);
    }
}
