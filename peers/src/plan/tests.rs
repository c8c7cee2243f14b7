use proptest::prelude::*;

use super::*;

/// A peer as this program is one: it notes what it finds damaged, with the damage that is right behind.
#[derive(Debug, Clone)]
struct Peer {
    has: RangeSet,
    /// What it believes to have and does not.
    rotten: RangeSet,
    have_ranges_max: usize,
    bytes_per_s: f64,
    round_trip: Duration,
    /// From then on nothing comes from it any more; it is given up 15 s later.
    dies_at: Duration,
    /// What is on its way then is lost with its connection, and the peer is there on another one at once.
    cut_at: Duration,
    answer: Option<Answer>,
}

/// What is on its way from a peer.
#[derive(Debug, Clone)]
struct Answer {
    step: Vec<ByteRange>,
    is_have: bool,
    asked: RangeSet,
    begins: Duration,
    credit: f64,
    last: Duration,
}

impl Peer {
    fn new(has: RangeSet) -> Self {
        Self {
            has,
            rotten: RangeSet::new(),
            have_ranges_max: 1000,
            bytes_per_s: 50e6,
            round_trip: Duration::from_millis(1),
            dies_at: Duration::MAX,
            cut_at: Duration::MAX,
            answer: None,
        }
    }

    fn get(&mut self, asked: &RangeSet) -> Vec<ByteRange> {
        let mut came = Vec::new();
        let mut asked = groups_of(asked).peekable();
        while let Some(group) = asked.next_if(|&group| self.has.contains(group) && !self.rotten.contains(group)) {
            came.push(group);
        }
        let run: Vec<_> = asked.take_while(|&group| !self.has.contains(group) || self.rotten.contains(group)).collect();
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

fn groups(numbers: std::ops::Range<u64>) -> RangeSet {
    ByteRange::new(numbers.start * GROUP_BYTES, numbers.end * GROUP_BYTES).unwrap().into()
}

fn groups_of(ranges: &RangeSet) -> impl Iterator<Item = ByteRange> {
    ranges.iter().flat_map(|range| range.start() / GROUP_BYTES..range.end().div_ceil(GROUP_BYTES)).map(group)
}

/// Some of so many groups, in runs of every length.
fn some_groups(count: u64) -> impl Strategy<Value = RangeSet> {
    prop::collection::vec((0..count, 1..count / 3), 0..12)
        .prop_map(move |runs| runs.into_iter().flat_map(|(at, len)| at..(at + len).min(count)).map(group).collect())
}

/// What came of a fetch.
#[derive(Debug, Default)]
struct Outcome {
    came: RangeSet,
    /// Bytes that came, those that came twice included, by source.
    bytes: Vec<u64>,
    took: Duration,
    gets: usize,
    haves: usize,
}

/// Fetches `wanted` from simulated peers, by the plan.
fn fetch(peers: &mut [Peer], wanted: &RangeSet, ranges_max: usize) -> Outcome {
    let mut plan = Plan::new(wanted.clone(), peers.len());
    let mut outcome = Outcome { bytes: vec![0; peers.len()], ..Outcome::default() };
    let mut now = Duration::ZERO;
    while !plan.is_over(now) {
        for (at, peer) in peers.iter_mut().enumerate() {
            if peer.answer.is_none()
                && let Some(step) = plan.poll(at, now, ranges_max)
            {
                let is_have = matches!(step, Step::Have(_));
                let (Step::Get(asked) | Step::Have(asked)) = step;
                assert!(asked.iter().len() <= ranges_max && !asked.is_empty());
                assert!(asked.difference(wanted).is_empty() && asked.intersection(&outcome.came).is_empty());
                if is_have {
                    outcome.haves += 1
                } else {
                    outcome.gets += 1
                }
                let step = if is_have { Vec::new() } else { peer.get(&asked) };
                let begins = now + peer.round_trip;
                peer.answer = Some(Answer { step, is_have, asked, begins, credit: 0.0, last: begins });
            }
            let Some(mut answer) = peer.answer.take() else { continue };
            if now >= peer.cut_at {
                peer.cut_at = Duration::MAX;
                plan.handle_cut(at);
                continue;
            }
            if now >= peer.dies_at {
                if now >= peer.dies_at.max(answer.begins) + Duration::from_secs(15) {
                    plan.handle_failure(at);
                } else {
                    peer.answer = Some(answer);
                    if plan.is_needless(at) {
                        peer.answer = None;
                        plan.handle_answer(at, now);
                    }
                }
                continue;
            }
            if now < answer.begins {
                peer.answer = Some(answer);
                continue;
            }
            if answer.is_have {
                let (has, upto) = peer.have(&answer.asked);
                plan.handle_have(at, &has, upto);
                continue;
            }
            answer.credit += peer.bytes_per_s * (now - answer.last).as_secs_f64();
            answer.last = now;
            let sent = answer.step.iter().take((answer.credit / GROUP_BYTES as f64) as usize).count();
            answer.credit -= sent as f64 * GROUP_BYTES as f64;
            for range in answer.step.drain(..sent) {
                plan.handle_piece(at, range, now);
                outcome.bytes[at] += range.len();
                outcome.came.insert(range);
            }
            if answer.step.is_empty() || plan.is_needless(at) {
                plan.handle_answer(at, now);
            } else {
                peer.answer = Some(answer);
            }
        }
        now += Duration::from_millis(5);
        assert!(now < Duration::from_secs(3600), "it never ends: {plan:?}");
    }
    outcome.took = now;
    assert_eq!(&wanted.difference(&outcome.came), plan.left());
    outcome
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn all_that_one_peer_has_comes_in_few_questions(
        wanted in some_groups(200), has in some_groups(200), rotten in some_groups(200),
    ) {
        let sound = wanted.intersection(&has).difference(&rotten);
        // Each run of rot that is met ends one answer, and so may the first gap.
        let runs = wanted.intersection(&has).intersection(&rotten).iter().len();
        let outcome = fetch(&mut [Peer { rotten, ..Peer::new(has) }], &wanted, 1000);
        prop_assert_eq!(outcome.came, sound);
        let Outcome { gets, haves, .. } = outcome;
        prop_assert!(gets <= runs + 2 && haves <= runs + 1, "{} runs: {} and {}", runs, gets, haves);
    }

    /// The same where neither questions nor answers may name many ranges.
    #[test]
    fn small_questions_bring_it_all_too(
        wanted in some_groups(60), has in some_groups(60), ranges_max in 1..4usize, have_ranges_max in 1..4usize,
    ) {
        let sound = wanted.intersection(&has);
        prop_assert_eq!(fetch(&mut [Peer { have_ranges_max, ..Peer::new(has) }], &wanted, ranges_max).came, sound);
    }

    /// Several peers of all kinds bring what any of them has.
    #[test]
    fn all_that_somebody_has_comes(
        wanted in some_groups(2000),
        peers in prop::collection::vec((some_groups(2000), some_groups(2000), 1e5..1e9f64, 1..200u64, 0..3u8), 1..6),
    ) {
        let mut sound = RangeSet::new();
        let mut all: Vec<Peer> = peers.into_iter().map(|(has, rotten, bytes_per_s, ms, fate)| {
            let fate_at = |of| if fate == of { Duration::from_millis(ms * 10) } else { Duration::MAX };
            let (dies_at, cut_at) = (fate_at(1), fate_at(2));
            if dies_at == Duration::MAX {
                sound = sound.union(&has.difference(&rotten));
            }
            Peer { rotten, bytes_per_s, round_trip: Duration::from_millis(ms), dies_at, cut_at, ..Peer::new(has) }
        }).collect();
        let outcome = fetch(&mut all, &wanted, 1000);
        prop_assert!(wanted.intersection(&sound).difference(&outcome.came).is_empty());
    }

    /// Whatever a peer says, it is not asked for ever.
    #[test]
    fn a_peer_that_lies_is_given_up(
        wanted in some_groups(60), says in prop::collection::vec((some_groups(60), any::<u64>()), 1..20),
    ) {
        let mut plan = Plan::new(wanted.clone(), 1);
        let mut says = says.iter().cycle();
        let mut questions = 0;
        while let Some(step) = plan.poll(0, Duration::ZERO, 3) {
            match step {
                Step::Get(_) => plan.handle_answer(0, Duration::ZERO),
                Step::Have(_) => {
                    let (has, upto) = says.next().unwrap();
                    plan.handle_have(0, has, *upto);
                }
            }
            questions += 1;
        }
        prop_assert!(questions <= IDLE_MAX);
        prop_assert!(plan.is_over(Duration::ZERO));
    }

    /// Together they take about as long as one with all their bandwidth, and send little twice.
    #[test]
    fn the_faster_ones_do_more(rates in prop::collection::vec(2e6..200e6f64, 2..6), ms in 1..50u64) {
        let size = groups(0..30_000);
        let peer = |&bytes_per_s| {
            Peer { bytes_per_s, round_trip: Duration::from_millis(ms), ..Peer::new(size.clone()) }
        };
        let mut peers: Vec<Peer> = rates.iter().map(peer).collect();
        let outcome = fetch(&mut peers, &size, 1000);
        prop_assert_eq!(&outcome.came, &size);
        let all: f64 = rates.iter().sum();
        let least = size.total_bytes() as f64 / all;
        prop_assert!(outcome.took.as_secs_f64() <= 1.25 * least + 1.0, "{:?}, {} s at least", outcome.took, least);
        let twice = outcome.bytes.iter().sum::<u64>() - size.total_bytes();
        prop_assert!(twice <= size.total_bytes() / 20, "{} bytes came twice: {:?}", twice, outcome.bytes);
    }
}

#[test]
fn a_peer_that_stalls_costs_its_share_only() {
    let size = groups(0..20_000);
    for dies_ms in [0, 1, 50, 500, 1500, 3000] {
        let dead = Peer { dies_at: Duration::from_millis(dies_ms), ..Peer::new(size.clone()) };
        let outcome = fetch(&mut [dead, Peer::new(size.clone())], &size, 1000);
        assert_eq!(outcome.came, size);
        // 328 MB at 50 MB/s.
        assert!(outcome.took < Duration::from_millis(8500), "dead at {dies_ms} ms: {:?}", outcome.took);
    }
}

#[test]
fn a_small_blob_is_sent_by_one() {
    let size = groups(0..60);
    let outcome = fetch(&mut [Peer::new(size.clone()), Peer::new(size.clone()), Peer::new(size.clone())], &size, 1000);
    assert_eq!((outcome.gets, outcome.bytes), (1, vec![size.total_bytes(), 0, 0]));
}

#[test]
fn one_peer_is_asked_for_everything_at_once() {
    let size = groups(0..1_000_000);
    let mut plan = Plan::new(size.clone(), 1);
    assert_eq!(plan.poll(0, Duration::ZERO, 1000), Some(Step::Get(size)));
}
