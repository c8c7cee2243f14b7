use std::{
    collections::{BTreeMap, btree_map},
    time::{Duration, Instant},
};

/// What bytes are for: lower ones go first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// Somebody waits for them.
    Foreground = 0,
    /// They are copied or moved.
    Copy = 1,
    /// They are fetched ahead, or to mend what a scrub has found.
    Background = 2,
}

impl Class {
    /// The class that a byte on the wire says. Those that are not known are the last.
    pub fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Foreground,
            1 => Self::Copy,
            _ => Self::Background,
        }
    }

    /// The byte that says it on the wire.
    pub fn byte(self) -> u8 {
        self as u8
    }
}

/// Decides who may take bytes, and when. Time is passed in, and never goes back.
///
/// [`enqueue`](Self::enqueue) a taker, [`grant`](Self::grant) until nobody is let go, and again at
/// [`next_at`](Self::next_at) and after each other call.
///
/// In any time there go no more bytes than the rate allows and one burst, but for what a single take is larger than a
/// burst, for which those behind wait.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: Option<u64>,
    /// What may be taken now, in billionths of a byte; below 0 while a large take is paid off.
    saved: i128,
    /// As of then.
    updated: Instant,
    /// By class, and first come first in each.
    takers: BTreeMap<Turn, u64>,
    /// What each class may take before its turn, for it waited while others took; in billionths of a byte.
    owed: [u128; CLASSES],
    turns: u64,
}

/// A taker's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn(Class, u64);

impl Bucket {
    /// An empty one of `rate` bytes a second.
    pub(super) fn new(rate: Option<u64>, now: Instant) -> Self {
        let rate = rate.map(|rate| rate.max(RATE_LEAST));
        Self { rate, saved: 0, updated: now, takers: BTreeMap::new(), owed: [0; CLASSES], turns: 0 }
    }

    pub(super) fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// Changes the rate. What was saved or is owed for is worth as much time as before, and not more bytes.
    pub(super) fn set(&mut self, rate: Option<u64>, now: Instant) {
        self.refill(now);
        let rate = rate.map(|rate| rate.max(RATE_LEAST));
        self.saved = match (self.rate, rate) {
            (Some(old), Some(new)) if new < old => (self.saved as f64 * (new as f64 / old as f64)) as i128,
            (Some(_), Some(_)) => self.saved,
            _ => 0,
        };
        self.rate = rate;
    }

    /// Adds a taker of `bytes` bytes.
    pub(super) fn enqueue(&mut self, class: Class, bytes: u64) -> Turn {
        self.turns += 1;
        let turn = Turn(class, self.turns);
        self.takers.insert(turn, bytes);
        turn
    }

    /// Lets the next taker go if it is time, and says which.
    pub(super) fn grant(&mut self, now: Instant) -> Option<Turn> {
        self.refill(now);
        let turn = self.next()?;
        let bytes = self.takers[&turn];
        if self.missing(bytes) > 0 {
            return None;
        }
        self.takers.remove(&turn);
        let taken = u128::from(bytes) * BILLION;
        if self.rate.is_some() {
            self.saved -= taken as i128;
        }
        for class in CLASS_LIST {
            let owed = &mut self.owed[class as usize];
            if class == turn.0 {
                *owed = owed.saturating_sub(taken);
            } else if heads(&self.takers, class).next().is_some() {
                *owed += taken / OTHERS_SHARE;
            }
        }
        self.forget_debts();
        Some(turn)
    }

    /// Who is let go next, unless others come.
    pub(super) fn next(&self) -> Option<Turn> {
        let heads = || CLASS_LIST.into_iter().filter_map(|class| heads(&self.takers, class).next());
        let due = heads().find(|&(turn, &bytes)| self.owed[turn.0 as usize] >= u128::from(bytes) * BILLION);
        due.or_else(|| heads().next()).map(|(&turn, _)| turn)
    }

    /// When it is time for the next one; `None` if nobody waits.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let bytes = self.takers[&self.next()?];
        let Some(rate) = self.rate else { return Some(self.updated) };
        let nanoseconds = self.missing(bytes).div_ceil(u128::from(rate));
        Some(self.updated + Duration::from_nanos(nanoseconds.try_into().unwrap_or(u64::MAX).min(FAR_NANOSECONDS)))
    }

    /// Removes a taker that was not let go.
    pub(super) fn cancel(&mut self, turn: Turn) {
        self.takers.remove(&turn);
        self.forget_debts();
    }

    /// Puts back what was let go and not used.
    pub(super) fn give_back(&mut self, bytes: u64, now: Instant) {
        self.refill(now);
        if let Some(rate) = self.rate {
            self.saved = (self.saved + i128::from(bytes) * BILLION as i128).min(burst(rate));
        }
    }

    /// What must be saved beyond what is for a take of `bytes` bytes, in billionths of a byte.
    fn missing(&self, bytes: u64) -> u128 {
        let Some(rate) = self.rate else { return 0 };
        let enough = (i128::from(bytes) * BILLION as i128).min(burst(rate));
        (enough - self.saved).max(0) as u128
    }

    fn refill(&mut self, now: Instant) {
        let Some(elapsed) = now.checked_duration_since(self.updated) else { return };
        if let Some(rate) = self.rate {
            let earned = elapsed.as_nanos().min(u128::from(u64::MAX)) * u128::from(rate);
            let earned = i128::try_from(earned).unwrap_or(i128::MAX);
            self.saved = self.saved.saturating_add(earned).min(burst(rate));
        }
        self.updated = now;
    }

    /// A class of which nobody waits is owed nothing.
    fn forget_debts(&mut self) {
        for class in CLASS_LIST {
            if heads(&self.takers, class).next().is_none() {
                self.owed[class as usize] = 0;
            }
        }
    }
}

/// The takers of a class, first come first.
fn heads(takers: &BTreeMap<Turn, u64>, class: Class) -> btree_map::Range<'_, Turn, u64> {
    takers.range(Turn(class, 0)..=Turn(class, u64::MAX))
}

/// What may be saved, in billionths of a byte.
fn burst(rate: u64) -> i128 {
    i128::from((rate / BURSTS_A_SECOND).max(BURST_BYTES_LEAST)) * BILLION as i128
}

/// The lowest rate, in bytes a second: below it, answers would not be taken fast enough to count as alive.
pub const RATE_LEAST: u64 = 64 << 10;
/// A burst lasts 50 ms.
const BURSTS_A_SECOND: u64 = 20;
const BURST_BYTES_LEAST: u64 = 64 << 10;
/// Of what others take, a class that waits is owed one in so many: a sixteenth of all.
const OTHERS_SHARE: u128 = 15;
const CLASS_LIST: [Class; CLASSES] = [Class::Foreground, Class::Copy, Class::Background];
const CLASSES: usize = 3;
const BILLION: u128 = 1_000_000_000;
/// A century. Sooner than that, somebody looks again.
const FAR_NANOSECONDS: u64 = 100 * 365 * 86_400 * 1_000_000_000;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIB: u64 = 1 << 10;

    /// Lets go whoever is to be let go up to `until`; `each` may bring others.
    fn run(bucket: &mut Bucket, start: Instant, until: Duration, mut each: impl FnMut(&mut Bucket, Turn, Duration)) {
        let mut now = start;
        loop {
            while let Some(turn) = bucket.grant(now) {
                each(bucket, turn, now - start);
            }
            match bucket.next_at() {
                Some(at) if at <= start + until => {
                    assert!(at > now, "it is not time, and never will be");
                    now = at;
                }
                _ => break,
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// As much as the rate, within 2 % over 10 s, and in no time more than the rate, one burst, and what a single
        /// take is more than that.
        #[test]
        fn the_rate_is_kept(rate in RATE_LEAST..1 << 30, largest in 1u64..2 << 20, takers in 1..5, seed: u64) {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut some_bytes = || random.u64(rate / 4000..=largest.clamp(rate / 4000, rate / 8));
            let start = Instant::now();
            let mut bucket = Bucket::new(Some(rate), start);
            let mut sizes = BTreeMap::new();
            for _ in 0..takers {
                let bytes = some_bytes();
                sizes.insert(bucket.enqueue(Class::Copy, bytes), bytes);
            }
            let (mut taken, mut grants) = (0, Vec::new());
            run(&mut bucket, start, Duration::from_secs(10), |bucket, turn, at| {
                let bytes = sizes.remove(&turn).unwrap();
                if at.as_millis() < 300 {
                    grants.push((at.as_secs_f64(), bytes));
                }
                taken += bytes;
                let bytes = some_bytes();
                sizes.insert(bucket.enqueue(Class::Copy, bytes), bytes);
            });
            let wanted = (rate * 10) as f64;
            prop_assert!((taken as f64 - wanted).abs() <= wanted * 0.02, "{} for {}", taken, wanted);
            let burst = (burst(rate) / BILLION as i128) as f64;
            grants.truncate(300);
            for (first, &(from, _)) in grants.iter().enumerate() {
                let mut sum = 0;
                for &(at, bytes) in &grants[first..] {
                    sum += bytes;
                    let most = (at - from) * rate as f64 + burst.max(bytes as f64) + 1.0;
                    prop_assert!(sum as f64 <= most, "{} where {} are the most", sum, most);
                }
            }
        }

        /// However takers come and go, someone is next while somebody waits, and each goes once.
        #[test]
        fn everybody_goes_once(
            steps in prop::collection::vec((0..6u8, 0..3u8, 0..500 * KIB, 0..200u64), 1..100),
        ) {
            let mut now = Instant::now();
            let mut bucket = Bucket::new(Some(RATE_LEAST), now);
            let mut waiting = Vec::new();
            for (step, class, bytes, millis) in steps {
                now += Duration::from_millis(millis);
                match step {
                    0 if !waiting.is_empty() => bucket.cancel(waiting.remove(bytes as usize % waiting.len())),
                    1 => bucket.set((bytes > 100 * KIB).then_some(bytes), now),
                    2 => bucket.give_back(bytes, now),
                    _ => waiting.push(bucket.enqueue(Class::from_byte(class), bytes)),
                }
                while let Some(turn) = bucket.grant(now) {
                    let at = waiting.iter().position(|&other| other == turn);
                    prop_assert!(at.is_some());
                    waiting.remove(at.unwrap());
                }
                prop_assert_eq!(bucket.next().is_some(), !waiting.is_empty());
                prop_assert_eq!(bucket.next_at().is_some(), !waiting.is_empty());
                prop_assert!(bucket.next_at().is_none_or(|at| at > now));
            }
            let mut left = waiting.len();
            run(&mut bucket, now, Duration::from_secs(86_400), |_, _, _| left -= 1);
            prop_assert_eq!(left, 0);
        }
    }

    #[test]
    fn rest_saves_no_more_than_a_burst() {
        for (rate, burst) in [(RATE_LEAST, 64 * KIB), (100 << 20, 5 << 20)] {
            let start = Instant::now();
            let mut bucket = Bucket::new(Some(rate), start);
            let later = start + Duration::from_secs(3600);
            for _ in 0..1000 {
                bucket.enqueue(Class::Copy, 16 * KIB);
            }
            let granted = std::iter::from_fn(|| bucket.grant(later)).count() as u64;
            assert_eq!(granted, burst / (16 * KIB), "at {rate}");
        }
    }

    #[test]
    fn a_new_one_is_empty_and_a_large_take_is_paid_off() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(640 * KIB), start);
        let large = bucket.enqueue(Class::Copy, 640 * KIB);
        let small = bucket.enqueue(Class::Copy, 32 * KIB);
        let mut order = Vec::new();
        run(&mut bucket, start, Duration::from_secs(60), |_, turn, at| order.push((turn, at.as_millis())));
        assert_eq!(order, [(large, 100), (small, 1050)]);
    }

    #[test]
    fn higher_classes_first_and_first_come_first_in_each() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(RATE_LEAST), start);
        let classes = [2, 1, 0, 2, 0, 1].map(Class::from_byte);
        let turns = classes.map(|class| bucket.enqueue(class, 64 * KIB));
        let mut order = Vec::new();
        run(&mut bucket, start, Duration::from_secs(60), |_, turn, _| order.push(turn));
        assert_eq!(order, [2, 4, 1, 5, 0, 3].map(|n: usize| turns[n]));
    }

    /// Each class has a sixteenth while others want all, also if its takes are larger.
    #[test]
    fn no_class_starves() {
        for background_bytes in [4 * KIB, 16 * KIB, 200 * KIB] {
            let start = Instant::now();
            let rate = 10 << 20;
            let mut bucket = Bucket::new(Some(rate), start);
            let sizes = [16 * KIB, 16 * KIB, background_bytes];
            for class in CLASS_LIST.into_iter().chain(CLASS_LIST) {
                bucket.enqueue(class, sizes[class as usize]);
            }
            let mut taken = [0; CLASSES];
            run(&mut bucket, start, Duration::from_secs(10), |bucket, Turn(class, _), _| {
                taken[class as usize] += sizes[class as usize];
                bucket.enqueue(class, sizes[class as usize]);
            });
            let parts = taken.map(|bytes| bytes as f64 / (rate * 10) as f64);
            assert!(parts[0] > 0.85, "{parts:?}");
            for part in &parts[1..] {
                assert!((0.06..0.07).contains(part), "{parts:?}");
            }
        }
    }

    /// What a class is owed ends with its waiting: nothing is saved up for later.
    #[test]
    fn who_did_not_wait_is_owed_nothing() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(1 << 20), start);
        let gone = bucket.enqueue(Class::Background, 1 << 40);
        for _ in 0..50 {
            bucket.enqueue(Class::Foreground, 16 * KIB);
        }
        // Long enough for these, and not for the burst that the other needs.
        run(&mut bucket, start, Duration::from_millis(800), |_, _, _| {});
        assert_eq!(bucket.next(), Some(gone));
        bucket.cancel(gone);
        let background = bucket.enqueue(Class::Background, KIB);
        let foreground = bucket.enqueue(Class::Foreground, 16 * KIB);
        assert_eq!(bucket.next(), Some(foreground));
        bucket.cancel(foreground);
        assert_eq!(bucket.next(), Some(background));
    }

    #[test]
    fn a_new_rate_holds_for_who_waits() {
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut bucket = Bucket::new(Some(RATE_LEAST), start);
        let first = bucket.enqueue(Class::Copy, 64 * KIB);
        let second = bucket.enqueue(Class::Copy, 64 * KIB);
        assert_eq!((bucket.grant(start), bucket.next_at()), (None, Some(after(1000))));
        bucket.set(Some(2 * RATE_LEAST), after(500));
        assert_eq!((bucket.grant(after(500)), bucket.next_at()), (None, Some(after(750))));
        assert_eq!(bucket.grant(after(750)), Some(first));
        bucket.set(None, after(800));
        assert_eq!(bucket.next_at(), Some(after(800)));
        assert_eq!(bucket.grant(after(800)), Some(second));
        // What was saved before there was no limit is gone.
        bucket.set(Some(RATE_LEAST), after(900));
        bucket.enqueue(Class::Copy, 64 * KIB);
        assert_eq!((bucket.grant(after(900)), bucket.next_at()), (None, Some(after(1900))));
    }

    #[test]
    fn a_lower_rate_does_not_lengthen_what_was_taken_before() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(100 * RATE_LEAST), start);
        bucket.enqueue(Class::Copy, 100 * RATE_LEAST);
        let granted = start + Duration::from_millis(50);
        assert!(bucket.grant(granted).is_some());
        // 950 ms are owed for, whatever the rate.
        bucket.set(Some(RATE_LEAST), granted);
        bucket.enqueue(Class::Copy, 64 * KIB);
        assert_eq!(bucket.next_at().unwrap() - granted, Duration::from_millis(1950));
    }

    #[test]
    fn the_extremes() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(0), start);
        assert_eq!(bucket.rate(), Some(RATE_LEAST));
        bucket.enqueue(Class::Copy, u64::MAX);
        bucket.enqueue(Class::Copy, u64::MAX);
        assert!(bucket.grant(start + Duration::from_secs(1)).is_some());
        assert!(bucket.next_at().unwrap() > start + Duration::from_secs(3600));
        bucket.set(Some(u64::MAX), start + Duration::from_secs(2));
        assert!(bucket.grant(start + Duration::from_secs(86_400)).is_some());
        // A clock that stands still, or goes back, gives nothing.
        bucket.enqueue(Class::Copy, 1);
        let at = bucket.next_at();
        assert!(bucket.grant(start).is_none());
        assert_eq!(bucket.next_at(), at);
    }
}
