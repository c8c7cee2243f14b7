//! What to ask of one peer, and in which order.

use tree::{ByteRange, GROUP_BYTES, RangeSet};

/// Asks one peer for all that it has of what is wanted, in few questions.
///
/// An answer ends at the first chunk group that the peer does not have, and says nothing of those behind. So after an
/// answer that ended early, the peer is asked which of them it has, and then for just these.
///
/// Calling order: [`poll`](Self::poll), then what it says, until it says nothing: [`handle_answer`](Self::handle_answer)
/// after a `Get`, [`handle_have`](Self::handle_have) after a `Have`. Both take what they hear of off what is left to ask
/// for; a peer that gives nothing however often it is asked is given up.
#[derive(Debug)]
pub(crate) struct Asking {
    /// What has not come yet, and may still.
    left: RangeSet,
    /// Up to here, the peer is taken to have what is left.
    trusted_to: u64,
    /// Questions since something came.
    idle: u32,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask for these bytes: whole chunk groups.
    Get(RangeSet),
    /// Ask which of these bytes there are.
    Have(RangeSet),
}

impl Asking {
    /// Nothing has been asked yet. `wanted` is whole chunk groups.
    pub(crate) fn new(wanted: RangeSet) -> Self {
        Self { left: wanted, trusted_to: u64::MAX, idle: 0 }
    }

    /// The next question, of at most `ranges_max` ranges; `None` if there is nothing more to be had.
    pub(crate) fn poll(&self, ranges_max: usize) -> Option<Step> {
        if self.left.is_empty() || self.idle >= IDLE_MAX {
            return None;
        }
        let trusted = before(&self.left, self.trusted_to);
        Some(if trusted.is_empty() {
            Step::Have(self.left.iter().take(ranges_max).collect())
        } else {
            Step::Get(trusted.iter().take(ranges_max).collect())
        })
    }

    /// What came of `asked`. The peer said no more, and all that it said was proven.
    pub(crate) fn handle_answer(&mut self, asked: &RangeSet, came: &RangeSet) {
        self.left = self.left.difference(came);
        self.idle = if came.is_empty() { self.idle + 1 } else { 0 };
        if let Some(gap) = asked.difference(came).iter().next() {
            self.left = self.left.difference(&before(&self.left, gap.start() + GROUP_BYTES));
            self.trusted_to = 0;
        }
    }

    /// The peer says that of `asked` it has `has`, so far as it goes: up to `upto`.
    pub(crate) fn handle_have(&mut self, asked: &RangeSet, has: &RangeSet, upto: u64) {
        self.trusted_to = (upto / GROUP_BYTES * GROUP_BYTES).min(asked.end());
        let lacking = before(&asked.difference(has), self.trusted_to);
        self.left = self.left.difference(&lacking);
        self.idle += 1;
    }
}

/// What of `ranges` is in front of `end`.
fn before(ranges: &RangeSet, end: u64) -> RangeSet {
    ranges.intersection(&ByteRange::new(0, end).unwrap_or_default().into())
}

/// So many questions after which nothing comes are put to a peer in a row.
const IDLE_MAX: u32 = 16;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A peer as this program is one: it notes what it finds damaged, with the damage that is right behind.
    #[derive(Debug)]
    struct Peer {
        has: RangeSet,
        /// What it believes to have and does not.
        rotten: RangeSet,
        have_ranges_max: usize,
    }

    impl Peer {
        fn get(&mut self, asked: &RangeSet) -> RangeSet {
            let mut came = RangeSet::new();
            let mut asked = groups_of(asked).peekable();
            while let Some(group) = asked.next_if(|&group| self.has.contains(group) && !self.rotten.contains(group)) {
                came.insert(group);
            }
            let run: Vec<_> =
                asked.take_while(|&group| !self.has.contains(group) || self.rotten.contains(group)).collect();
            run.into_iter().for_each(|group| self.has.remove(group));
            came
        }

        fn have(&self, asked: &RangeSet) -> (RangeSet, u64) {
            let all = asked.intersection(&self.has);
            let told: RangeSet = all.iter().take(self.have_ranges_max).collect();
            let upto = if told == all { u64::MAX } else { told.end() };
            (told, upto)
        }
    }

    fn group(number: u64) -> ByteRange {
        ByteRange::new(number * GROUP_BYTES, (number + 1) * GROUP_BYTES).unwrap()
    }

    fn groups_of(ranges: &RangeSet) -> impl Iterator<Item = ByteRange> {
        ranges.iter().flat_map(|range| range.start() / GROUP_BYTES..range.end().div_ceil(GROUP_BYTES)).map(group)
    }

    /// Some of so many groups, in runs of every length.
    fn some_groups(count: u64) -> impl Strategy<Value = RangeSet> {
        prop::collection::vec((0..count, 1..count / 3), 0..12)
            .prop_map(move |runs| runs.into_iter().flat_map(|(at, len)| at..(at + len).min(count)).map(group).collect())
    }

    /// Asks until there is nothing more; gives what came, and how often each question was asked.
    fn ask(peer: &mut Peer, wanted: &RangeSet, ranges_max: usize) -> (RangeSet, usize, usize) {
        let mut asking = Asking::new(wanted.clone());
        let (mut all, mut gets, mut haves) = (RangeSet::new(), 0, 0);
        while let Some(step) = asking.poll(ranges_max) {
            match step {
                Step::Get(asked) => {
                    assert!(asked.iter().len() <= ranges_max && !asked.is_empty());
                    assert!(asked.difference(wanted).is_empty() && asked.intersection(&all).is_empty());
                    let came = peer.get(&asked);
                    asking.handle_answer(&asked, &came);
                    all = all.union(&came);
                    gets += 1;
                }
                Step::Have(asked) => {
                    assert!(asked.iter().len() <= ranges_max && !asked.is_empty());
                    let (has, upto) = peer.have(&asked);
                    asking.handle_have(&asked, &has, upto);
                    haves += 1;
                }
            }
        }
        (all, gets, haves)
    }

    proptest! {
        #[test]
        fn all_that_the_peer_has_comes_in_few_questions(
            wanted in some_groups(200), has in some_groups(200), rotten in some_groups(200),
        ) {
            let sound = wanted.intersection(&has).difference(&rotten);
            // Each run of rot that is met ends one answer, and so may the first gap.
            let runs = wanted.intersection(&has).intersection(&rotten).iter().len();
            let mut peer = Peer { has, rotten, have_ranges_max: 1000 };
            let (came, gets, haves) = ask(&mut peer, &wanted, 1000);
            prop_assert_eq!(came, sound);
            prop_assert!(gets <= runs + 2 && haves <= runs + 1, "{} runs: {} and {}", runs, gets, haves);
        }

        /// The same where neither questions nor answers may name many ranges.
        #[test]
        fn small_questions_bring_it_all_too(
            wanted in some_groups(60), has in some_groups(60), ranges_max in 1..4usize, have_ranges_max in 1..4usize,
        ) {
            let sound = wanted.intersection(&has);
            let mut peer = Peer { has, rotten: RangeSet::new(), have_ranges_max };
            prop_assert_eq!(ask(&mut peer, &wanted, ranges_max).0, sound);
        }

        /// Whatever a peer says, it is not asked for ever.
        #[test]
        fn a_peer_that_lies_is_given_up(
            wanted in some_groups(60), says in prop::collection::vec((some_groups(60), any::<u64>()), 1..20),
        ) {
            let mut asking = Asking::new(wanted.clone());
            let mut says = says.iter().cycle();
            let mut questions = 0;
            while let Some(step) = asking.poll(3) {
                let (said, upto) = says.next().unwrap();
                match step {
                    Step::Get(asked) => asking.handle_answer(&asked, &asked.intersection(said)),
                    Step::Have(asked) => asking.handle_have(&asked, said, *upto),
                }
                questions += 1;
            }
            prop_assert!(questions <= IDLE_MAX as usize * (groups_of(&wanted).count() + 1));
        }
    }

    #[test]
    fn a_long_gap_costs_no_more_than_a_short_one() {
        for gap in [1, 10_000] {
            for known in [true, false] {
                let all = RangeSet::from(ByteRange::new(0, 20_000 * GROUP_BYTES).unwrap());
                let lacking = RangeSet::from(ByteRange::new(5 * GROUP_BYTES, (5 + gap) * GROUP_BYTES).unwrap());
                let (has, rotten) =
                    if known { (all.difference(&lacking), RangeSet::new()) } else { (all.clone(), lacking.clone()) };
                let (came, gets, haves) = ask(&mut Peer { has, rotten, have_ranges_max: 9 }, &all, 9);
                assert_eq!((came, gets, haves), (all.difference(&lacking), 2, 1), "{gap} {known}");
            }
        }
    }

    #[test]
    fn a_peer_that_says_that_it_has_all_and_gives_nothing_is_asked_a_few_times() {
        let all = RangeSet::from(ByteRange::new(0, 10_000 * GROUP_BYTES).unwrap());
        let mut asking = Asking::new(all.clone());
        let mut gets = 0;
        while let Some(step) = asking.poll(2000) {
            match step {
                Step::Get(asked) => {
                    gets += 1;
                    asking.handle_answer(&asked, &RangeSet::new());
                }
                Step::Have(asked) => asking.handle_have(&asked, &all, u64::MAX),
            }
        }
        assert_eq!(gets, IDLE_MAX / 2);
    }
}
