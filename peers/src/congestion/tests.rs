use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::Path;

/// A path: a queue of so many bytes before a line, and random loss behind it.
struct Line {
    bytes_per_s: f64,
    round_trip: Duration,
    queue: f64,
    loss: f64,
    /// The receiver acknowledges at multiples of this time only, unless it is zero.
    coalesced: Duration,
}

/// What came of a simulation: the bytes that were delivered, those that were sent, and the longest wait in the queue.
struct Outcome {
    delivered: u64,
    sent: u64,
    wait: Duration,
}

/// Sends as much as the path's window allows, and at least CUBIC's least, for so long after a start that does not count.
fn simulate(mut path: Path, start: Instant, line: &Line, seed: u64, lasting: Duration) -> (Path, Outcome) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut now, mut line_free) = (start, start);
    let mut events: BTreeMap<(Instant, u64), (Instant, bool)> = BTreeMap::new();
    let (mut in_flight, mut number) = (0, 0);
    let mut outcome = Outcome { delivered: 0, sent: 0, wait: Duration::ZERO };
    while now < start + lasting {
        // Paced, as quinn does it: five quarters of a window each round trip.
        let window = path.window().max(14_720);
        let mut next = now;
        while in_flight + PACKET <= window && next < now + Duration::from_millis(1) {
            path.sent(next);
            (in_flight, number) = (in_flight + PACKET, number + 1);
            outcome.sent += PACKET;
            let waits = line_free.saturating_duration_since(next);
            let is_dropped = waits.as_secs_f64() * line.bytes_per_s > line.queue;
            if !is_dropped {
                outcome.wait = outcome.wait.max(waits);
                line_free = line_free.max(next) + Duration::from_secs_f64(PACKET as f64 / line.bytes_per_s);
            }
            let arrives = !is_dropped && random.f64() >= line.loss;
            let mut acknowledged_at =
                if arrives { line_free + line.round_trip } else { next + waits + line.round_trip.mul_f64(1.5) };
            if !line.coalesced.is_zero() {
                let periods = (acknowledged_at - start).as_nanos().div_ceil(line.coalesced.as_nanos()) as u32;
                acknowledged_at = start + line.coalesced * periods;
            }
            events.insert((acknowledged_at, number), (next, arrives));
            next += Duration::from_secs_f64(PACKET as f64 / (1.25 * window as f64) * line.round_trip.as_secs_f64());
        }
        now = events.first_key_value().map_or(next, |((at, _), _)| (*at).min(next.max(now + Duration::from_micros(1))));
        let mut is_acknowledged = false;
        while let Some(event) = events.first_entry().filter(|event| event.key().0 <= now) {
            let (sent_at, arrives) = event.remove();
            in_flight -= PACKET;
            if arrives {
                outcome.delivered += PACKET;
                path.acknowledged(sent_at, PACKET, line.round_trip);
                is_acknowledged = true;
                if line.coalesced.is_zero() {
                    path.end_acknowledged(now, in_flight, false);
                }
            } else {
                path.lost(PACKET);
            }
        }
        if is_acknowledged && !line.coalesced.is_zero() {
            path.end_acknowledged(now, in_flight, false);
        }
    }
    (path, outcome)
}

const PACKET: u64 = 1200;

#[test]
fn a_path_that_loses_at_random_is_filled_and_not_overfilled() {
    for seed in 0..24 {
        let mut random = fastrand::Rng::with_seed(seed);
        let line = Line {
            bytes_per_s: [500e3, 2.5e6, 12.5e6][seed as usize % 3],
            round_trip: Duration::from_millis(random.u64(10..300)),
            queue: f64::INFINITY,
            loss: random.f64() * 0.1,
            coalesced: Duration::ZERO,
        };
        let start = Instant::now();
        let (path, _) = simulate(Path::new(start), start, &line, seed, line.round_trip * 40);
        let lasting = line.round_trip * 40;
        let (_, outcome) = simulate(path, start + lasting, &line, seed, lasting);
        let share = outcome.delivered as f64 / (line.bytes_per_s * (1.0 - line.loss) * lasting.as_secs_f64());
        assert!(share > 0.85, "seed {seed}: {share}");
        assert!(outcome.wait < line.round_trip, "seed {seed}: {:?} of {:?}", outcome.wait, line.round_trip);
    }
}

#[test]
fn a_line_that_becomes_slower_is_not_flooded() {
    for seed in 0..8 {
        let mut line = Line {
            bytes_per_s: 5e6,
            round_trip: Duration::from_millis(50),
            queue: 50e3,
            loss: 0.01,
            coalesced: Duration::ZERO,
        };
        let start = Instant::now();
        let (path, _) = simulate(Path::new(start), start, &line, seed, Duration::from_secs(3));
        line.bytes_per_s /= 8.0;
        let (path, first) = simulate(path, start + Duration::from_secs(3), &line, seed, Duration::from_secs(2));
        // Were the rates before it remembered for ten rounds, more than twice as much would be sent.
        assert!(first.sent * 2 < first.delivered * 3, "seed {seed}: {} of {}", first.delivered, first.sent);
        let (_, outcome) = simulate(path, start + Duration::from_secs(5), &line, seed, Duration::from_secs(5));
        let lost = 1.0 - outcome.delivered as f64 / outcome.sent as f64;
        assert!(lost < 0.1, "seed {seed}: {lost}");
        let share = outcome.delivered as f64 / (line.bytes_per_s * 5.0);
        assert!(share > 0.8, "seed {seed}: {share}");
    }
}

#[test]
fn acknowledgements_in_bursts_do_not_leave_a_short_path_empty() {
    for seed in 0..8 {
        let line = Line {
            bytes_per_s: 12.5e6,
            round_trip: Duration::from_micros(300),
            queue: f64::INFINITY,
            loss: 0.05,
            coalesced: Duration::from_millis(4),
        };
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let (path, _) = simulate(Path::new(start), start, &line, seed, second);
        let (_, outcome) = simulate(path, start + second, &line, seed, second);
        let share = outcome.delivered as f64 / (line.bytes_per_s * (1.0 - line.loss));
        assert!(share > 0.85, "seed {seed}: {share}");
        assert!(outcome.wait < Duration::from_millis(8), "seed {seed}: {:?}", outcome.wait);
    }
}
