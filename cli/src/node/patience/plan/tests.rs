//! Simulated commands whose machines restart and fall silent. Replay one seed with `SEED=n`, run more with `SEEDS=n`.

use std::env;

use super::*;

/// A machine: when it is up, and what the other side knows of that.
struct Machine {
    id: PeerId,
    /// Half-open, ascending, in ms.
    outages: Vec<(u64, u64)>,
    /// From when on its connection is as given, ascending.
    seen: Vec<(u64, Presence)>,
}

impl Machine {
    fn new(number: u8, is_known: bool, outages: Vec<(u64, u64, bool)>, random: &mut fastrand::Rng) -> Self {
        let mut presence = Presence { is_connected: is_known, fell_silent: false, changes: u64::from(is_known) };
        let mut seen = vec![(0, presence)];
        for &(start, end, is_silent) in &outages {
            // A connection survives until nothing has come for a while.
            let noticed = if is_silent { start + random.u64(10_000..20_000) } else { start };
            if noticed < end {
                presence = Presence { is_connected: false, fell_silent: is_silent, changes: presence.changes + 1 };
                seen.push((noticed, presence));
                presence = Presence { is_connected: true, fell_silent: false, changes: presence.changes + 1 };
                seen.push((end.saturating_add(random.u64(100..8_000)), presence));
            }
        }
        let outages = outages.into_iter().map(|(start, end, _)| (start, end)).collect();
        Self { id: PeerId::from_bytes([number; 32]), outages, seen }
    }

    fn presence(&self, at: u64) -> Presence {
        self.seen.iter().rev().find(|(since, _)| *since <= at).unwrap().1
    }

    /// The start of its next outage, `at` if it has one then.
    fn next_outage(&self, at: u64) -> u64 {
        self.outages.iter().find(|(_, end)| *end > at).map_or(u64::MAX, |(start, _)| at.max(*start))
    }
}

struct Outcome {
    /// Whether all files came.
    is_complete: bool,
    ended: u64,
    /// The starts of attempts.
    attempts: Vec<u64>,
    /// When the first failure was that nothing followed but failures.
    first_failure: u64,
    notices: usize,
}

/// Gets files one by one, each from any of its machines, as [`super::super::Patience`] does it.
fn run(machines: &[Machine], files: &[Vec<usize>], limit: Duration, random: &mut fastrand::Rng) -> Outcome {
    let start = Instant::now();
    let at = |ms: u64| start + Duration::from_millis(ms);
    let presences = |ms: u64| machines.iter().map(|machine| (machine.id, machine.presence(ms))).collect::<Presences>();
    let next_change = |ms: u64| {
        let all = machines.iter().flat_map(|machine| &machine.seen).map(|(since, _)| *since);
        all.filter(|since| *since > ms).min().unwrap_or(u64::MAX)
    };
    let mut plan = Plan::new(limit, None);
    let mut now = 0;
    let mut outcome = Outcome { is_complete: true, ended: 0, attempts: Vec::new(), first_failure: 0, notices: 0 };
    let mut has_failed = false;
    for holders in files {
        loop {
            let (began, before) = (now, presences(now));
            plan.look(&before);
            outcome.attempts.push(now);
            let connected = holders.iter().map(|&holder| &machines[holder]).find(|m| m.presence(now).is_connected);
            let needs = random.u64(100..3_000);
            let came = match connected {
                // Dialled in vain.
                None => {
                    now += random.u64(10..6_000);
                    false
                }
                Some(machine) if machine.next_outage(now) > now + needs => {
                    now += needs;
                    true
                }
                Some(machine) => {
                    // It ends with the connection, or when nothing has come for 15 s.
                    let stalled = machine.next_outage(now) + 15_000;
                    let gone = machine.seen.iter().map(|(since, _)| *since).find(|since| *since > now);
                    now = stalled.min(gone.unwrap_or(u64::MAX));
                    false
                }
            };
            if came {
                plan.came(at(now));
                has_failed = false;
                break;
            }
            let peers = plan.expected(holders.iter().map(|&holder| machines[holder].id));
            if !has_failed {
                (has_failed, outcome.first_failure) = (true, now);
            }
            let silence = plan.silence(at(began), at(now));
            if !peers.is_empty() && silence >= Duration::from_secs(5) {
                let until = now + 8_000;
                while !has_moved(&peers, &before, &presences(now)) && now < until {
                    now = next_change(now).min(until);
                }
            }
            plan.look(&presences(now));
            let Some(pause) = plan.failed(at(now), silence, &peers, &before, &presences(now)) else {
                return Outcome { is_complete: false, ended: now, ..outcome };
            };
            outcome.notices += usize::from(pause.notice.is_some());
            now = next_change(now).min(now + pause.for_a_change.as_millis() as u64) + PAUSE.as_millis() as u64;
        }
    }
    Outcome { ended: now, ..outcome }
}

fn for_each_seed(check: impl Fn(u64, &mut fastrand::Rng)) {
    let number = |name| env::var(name).ok().and_then(|value| value.parse().ok());
    let (first, count) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("SEEDS").unwrap_or(10_000)),
    };
    (first..first + count).for_each(|seed| check(seed, &mut fastrand::Rng::with_seed(seed)));
}

/// Outages of at most `longest` ms, 20 s apart at least, so that something comes between them.
fn outages(longest: u64, random: &mut fastrand::Rng) -> Vec<(u64, u64, bool)> {
    let mut at = 0;
    let outages = (0..random.usize(0..4)).map(|_| {
        let start = at + random.u64(20_000..60_000);
        at = start + random.u64(100..longest);
        (start, at, random.bool())
    });
    outages.collect()
}

fn files(machines: usize, random: &mut fastrand::Rng) -> Vec<Vec<usize>> {
    let holders = |random: &mut fastrand::Rng| (0..machines).filter(|_| random.bool()).collect::<Vec<_>>();
    let files = (0..60).map(|_| holders(random)).map(|holders| if holders.is_empty() { vec![0] } else { holders });
    files.collect()
}

const LIMIT: Duration = Duration::from_secs(120);
/// An attempt in vain, the wait for its disconnection, and a pause.
const SLACK: u64 = 15_000 + 8_000 + 5_300;

#[test]
fn outages_shorter_than_the_limit_are_outlived() {
    for_each_seed(|seed, random| {
        let count = random.usize(1..4);
        let machines: Vec<_> = (0..count)
            .map(|number| {
                let outages = outages(LIMIT.as_millis() as u64 - SLACK - 8_000, random);
                Machine::new(number as u8, true, outages, random)
            })
            .collect();
        // What several machines have is not had while all are away, which may take longer.
        let files: Vec<_> = files(count, random).iter().map(|holders| vec![holders[0]]).collect();
        let Outcome { is_complete, ended, attempts, notices, .. } = run(&machines, &files, LIMIT, random);
        assert!(is_complete, "seed {seed}: gave up at {ended}");
        let outages: Vec<_> = machines.iter().flat_map(|machine| &machine.outages).collect();
        let length: u64 = outages.iter().map(|(start, end)| end - start + 8_000).sum();
        // One each 0.3 s while something changes, and one each 5.3 s otherwise.
        let most = files.len() + (length / 5_300) as usize + 8 * outages.len();
        assert!(attempts.len() <= most, "seed {seed}: {} attempts, {most}", attempts.len());
        assert!(notices <= 3 * outages.len(), "seed {seed}: {notices} notices");
    });
}

#[test]
fn who_is_gone_for_good_is_given_up_at_the_limit() {
    for_each_seed(|seed, random| {
        let gone = random.u64(0..60_000);
        let outages = vec![(gone, u64::MAX / 2, random.bool())];
        let machine = Machine::new(1, true, outages, random);
        let limit = Duration::from_secs(random.u64(1..300));
        let outcome = run(&[machine], &vec![vec![0]; 1000], limit, random);
        assert!(!outcome.is_complete, "seed {seed}");
        let (waited, limit) = (outcome.ended - outcome.first_failure, limit.as_millis() as u64);
        assert!((limit..limit + SLACK + 8_000).contains(&waited), "seed {seed}: {waited} of {limit}");
        assert_eq!(outcome.notices, 1, "seed {seed}");
    });
}

#[test]
fn who_was_never_there_is_not_waited_for() {
    for_each_seed(|seed, random| {
        let machines = [Machine::new(1, false, Vec::new(), random), Machine::new(2, true, Vec::new(), random)];
        let outcome = run(&machines, &[vec![1], vec![0]], LIMIT, random);
        assert!(!outcome.is_complete && outcome.attempts.len() == 2, "seed {seed}");
        assert!(outcome.ended < 10_000, "seed {seed}: {}", outcome.ended);
    });
}

#[test]
fn a_destination_that_fell_silent_is_waited_for_less() {
    let (start, peer) = (Instant::now(), PeerId::from_bytes([1; 32]));
    let presence =
        |is_connected, fell_silent, changes| Presences::from([(peer, Presence { is_connected, fell_silent, changes })]);
    let (there, peers) = (presence(true, false, 1), BTreeSet::from([peer]));
    for (away, limit) in [(presence(false, true, 2), SILENT_LIMIT), (presence(false, false, 2), LIMIT)] {
        let mut plan = Plan::new(LIMIT, Some(peer));
        plan.look(&there);
        assert!(plan.failed(start, PAUSE, &peers, &there, &away).is_some());
        assert!(plan.failed(start + limit - PAUSE, PAUSE, &peers, &away, &away).is_some());
        assert_eq!(plan.failed(start + limit, PAUSE, &peers, &away, &away), None);
    }
}
