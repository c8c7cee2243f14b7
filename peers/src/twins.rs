//! Machines that run with one key, for a home was cloned. Rules: spec/wire.md, "Twins".

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// The runs of the program that have said Hello with one key.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    /// The one that did last.
    current: Option<u64>,
    /// Those before it, the latest last; at most [`EARLIER_MAX`].
    earlier: VecDeque<u64>,
    /// How often one of them came back, since twins were last ruled out.
    came_back: u32,
    /// When one last did.
    came_back_at: Option<Instant>,
}

impl Runs {
    /// Takes note of a Hello at `now`. Returns whether it is the one by which twins are known.
    pub(crate) fn note(&mut self, run: u64, now: Instant) -> bool {
        let Some(before) = self.current.replace(run).filter(|before| *before != run) else { return false };
        let had_twins = self.has_twins(now);
        if self.came_back_at.is_some_and(|at| now.saturating_duration_since(at) > REMEMBERED) {
            self.came_back = 0;
        }
        if let Some(at) = self.earlier.iter().position(|earlier| *earlier == run) {
            self.earlier.remove(at);
            self.came_back += 1;
            self.came_back_at = Some(now);
        }
        self.earlier.push_back(before);
        if self.earlier.len() > EARLIER_MAX {
            self.earlier.pop_front();
        }
        !had_twins && self.has_twins(now)
    }

    /// Whether two of them run side by side: what was started anew does not come back.
    pub(crate) fn has_twins(&self, now: Instant) -> bool {
        let is_recent = self.came_back_at.is_some_and(|at| now.saturating_duration_since(at) <= REMEMBERED);
        is_recent && self.came_back >= CAME_BACK_MIN
    }
}

const EARLIER_MAX: usize = 8;
/// A Hello of a run that ended may be read after one of the next, if it was on its way; not twice.
const CAME_BACK_MIN: u32 = 2;
/// How long twins count as such after they were last seen to take turns.
pub(crate) const REMEMBERED: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_take_turns_are_twins() {
        let (mut runs, now) = (Runs::default(), Instant::now());
        let mut after = |seconds: u64, run| {
            let now = now + Duration::from_secs(seconds);
            (runs.note(run, now), runs.has_twins(now))
        };
        // Starts, one after the other, and further connections of each.
        for (seconds, run) in [(0, 1), (1, 1), (5, 2), (9, 3), (9, 3), (10, 4)] {
            assert_eq!(after(seconds, run), (false, false), "{run}");
        }
        // One that was late.
        assert_eq!(after(11, 3), (false, false));
        assert_eq!(after(12, 4), (true, true));
        assert_eq!(after(13, 3), (false, true));
        // One of them was ended, and the other one started now and then.
        assert_eq!(after(3000, 5), (false, true));
        assert_eq!(after(3700, 6), (false, false));
        assert_eq!(after(3701, 5), (false, false));
        assert_eq!(after(3702, 6), (true, true));
    }
}
