//! How many events of a kind are told, so that no flood of them becomes one of the log. Rules: spec/logging.md, "Floods".

use std::{collections::HashMap, hash::Hash, mem, time::Duration};

/// Counts events by kind. Time is passed in, as the time since any fixed moment; it must not go back.
///
/// Of each kind, `most` events are told within a period, which begins with the first of them. The others are counted, and
/// [`due`](Self::due) gives the counts when their periods are over.
#[derive(Debug)]
pub(crate) struct Limiter<K, T> {
    most: u32,
    /// By kind; `None` for all kinds that there was no room for.
    kinds: HashMap<Option<K>, Kind<T>>,
    /// When the first period ends in which something was left out.
    due_at: Option<Duration>,
}

/// What happened to one kind within its period.
#[derive(Debug)]
struct Kind<T> {
    began: Duration,
    told: u32,
    left_out: u64,
    /// Of the first event that was left out.
    note: Option<T>,
}

/// So many events of a kind were left out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LeftOut<T> {
    /// What was noted of the first of them.
    pub(crate) note: T,
    /// How many.
    pub(crate) count: u64,
}

impl<K: Eq + Hash, T> Limiter<K, T> {
    /// Tells `most` events of each kind within a period; all of them if that is 0.
    pub(crate) fn new(most: u32) -> Self {
        Self { most, kinds: HashMap::new(), due_at: None }
    }

    /// Whether this event is to be told. What is due must have been taken before. `note` is asked once for each period, for
    /// the first event that is not told.
    pub(crate) fn admits(&mut self, kind: K, now: Duration, note: impl FnOnce() -> T) -> bool {
        if self.most == 0 {
            return true;
        }
        let mut kind = Some(kind);
        if !self.kinds.contains_key(&kind) && self.kinds.len() >= KINDS_MAX {
            // Those whose period is over are as if they had never been.
            self.kinds.retain(|_, known| !known.is_over(now));
            if self.kinds.len() >= KINDS_MAX {
                kind = None;
            }
        }
        let fresh = || Kind { began: now, told: 0, left_out: 0, note: None };
        let known = self.kinds.entry(kind).or_insert_with(fresh);
        if known.is_over(now) && known.left_out == 0 {
            *known = fresh();
        }
        if known.told < self.most {
            known.told += 1;
            return true;
        }
        if known.left_out == 0 {
            known.note = Some(note());
            let ends = known.began + PERIOD;
            self.due_at = Some(self.due_at.map_or(ends, |at| at.min(ends)));
        }
        known.left_out += 1;
        false
    }

    /// What was left out in periods that are over; each is given once.
    pub(crate) fn due(&mut self, now: Duration) -> Vec<LeftOut<T>> {
        match self.due_at {
            Some(at) if at <= now => self.take(|kind| kind.is_over(now)),
            _ => Vec::new(),
        }
    }

    /// What was left out so far in all periods, for there will be no more.
    pub(crate) fn rest(&mut self) -> Vec<LeftOut<T>> {
        self.take(|_| true)
    }

    fn take(&mut self, ends: impl Fn(&Kind<T>) -> bool) -> Vec<LeftOut<T>> {
        let mut taken = Vec::new();
        for kind in self.kinds.values_mut().filter(|kind| kind.left_out > 0 && ends(kind)) {
            let count = mem::take(&mut kind.left_out);
            taken.extend(kind.note.take().map(|note| LeftOut { note, count }));
        }
        let left = self.kinds.values().filter(|kind| kind.left_out > 0);
        self.due_at = left.map(|kind| kind.began + PERIOD).min();
        taken
    }
}

impl<T> Kind<T> {
    fn is_over(&self, now: Duration) -> bool {
        now >= self.began + PERIOD
    }
}

pub(crate) const PERIOD: Duration = Duration::from_secs(60);
pub(crate) const MOST: u32 = 60;
/// More kinds than there are call sites in the program and its libraries.
const KINDS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn so_many_are_told_and_the_rest_is_counted_once() {
        let mut limiter = Limiter::new(3);
        let told = (0..10).map(|at| limiter.admits("a", s(at), || at)).collect::<Vec<_>>();
        assert_eq!(told, [true, true, true, false, false, false, false, false, false, false]);
        assert!(limiter.admits("b", s(10), || 10), "each kind has its own bound");
        assert_eq!(limiter.due(s(59)), []);
        assert_eq!(limiter.due(s(60)), [LeftOut { note: 3, count: 7 }]);
        assert_eq!(limiter.due(s(60)), []);
        assert_eq!(limiter.rest(), []);
        // The next period begins with the next event.
        let told = (70..75).map(|at| limiter.admits("a", s(at), || at)).collect::<Vec<_>>();
        assert_eq!(told, [true, true, true, false, false]);
        assert_eq!(limiter.due(s(129)), []);
        assert_eq!(limiter.due(s(200)), [LeftOut { note: 73, count: 2 }]);
    }

    #[test]
    fn periods_of_kinds_are_apart_and_the_end_takes_all() {
        let mut limiter = Limiter::new(1);
        for (kind, at) in [("a", 0), ("a", 1), ("b", 30), ("b", 31), ("b", 32)] {
            limiter.admits(kind, s(at), || kind);
        }
        assert_eq!(limiter.due(s(60)), [LeftOut { note: "a", count: 1 }]);
        assert_eq!(limiter.due(s(89)), []);
        assert_eq!(limiter.due(s(90)), [LeftOut { note: "b", count: 2 }]);
        for at in [100, 101] {
            limiter.admits("a", s(at), || "a");
        }
        assert_eq!(limiter.rest(), [LeftOut { note: "a", count: 1 }]);
        assert_eq!(limiter.due(s(1000)), []);
    }

    /// Over any time, no more lines come than the bound and one for what was left out, for each period begun.
    #[test]
    fn a_flood_that_does_not_end() {
        let (mut limiter, mut lines, mut told, mut counted) = (Limiter::new(5), 0, 0, 0);
        for at in 0..600_000 {
            let now = Duration::from_millis(at);
            let due = limiter.due(now);
            lines += due.len() as u64;
            counted += due.iter().map(|left_out| left_out.count).sum::<u64>();
            told += u64::from(limiter.admits((), now, || ()));
        }
        counted += limiter.rest().iter().map(|left_out| left_out.count).sum::<u64>();
        assert_eq!((told, lines, told + counted), (50, 9, 600_000));
    }

    #[test]
    fn without_a_bound_all_are_told() {
        let mut limiter = Limiter::new(0);
        assert!((0..1000).all(|_| limiter.admits((), s(0), || ())));
        assert!(limiter.kinds.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_what_has_no_room_shares_one_bound() {
        let mut limiter = Limiter::new(2);
        let told = (0..10 * KINDS_MAX).filter(|&kind| limiter.admits(kind, s(0), || kind)).count();
        assert_eq!(told, KINDS_MAX + 2);
        assert_eq!(limiter.kinds.len(), KINDS_MAX + 1);
        assert_eq!(limiter.due(s(60)), [LeftOut { note: KINDS_MAX + 2, count: 9 * KINDS_MAX as u64 - 2 }]);
        // Those that have been quiet make room.
        assert!(limiter.admits(5 * KINDS_MAX, s(61), || 0));
        assert_eq!(limiter.kinds.len(), 1);
    }
}
