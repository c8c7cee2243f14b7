//! How fast a connection sends. Rules and figures: spec/wire.md, "Congestion control".

use std::{
    any::Any,
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{BbrConfig, Controller, ControllerFactory, Cubic, CubicConfig};
use quinn_proto::RttEstimator;
use serde::Deserialize;

/// Which congestion controller the connections of a machine use for what they send.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// CUBIC, whose window does not fall below what the path has just proven to carry.
    #[default]
    Auto,
    /// CUBIC (RFC 9438).
    Cubic,
    /// BBR, version 1, as quinn has it.
    Bbr,
}

impl Congestion {
    pub(crate) fn factory(self) -> Arc<dyn ControllerFactory + Send + Sync> {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(INITIAL_WINDOW_BYTES);
        match self {
            Self::Auto => Arc::new(TolerantConfig(Arc::new(cubic))),
            Self::Cubic => Arc::new(cubic),
            Self::Bbr => {
                let mut bbr = BbrConfig::default();
                bbr.initial_window(INITIAL_WINDOW_BYTES);
                Arc::new(bbr)
            }
        }
    }
}

struct TolerantConfig(Arc<CubicConfig>);

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Tolerant { cubic: Cubic::new(self.0.clone(), now, mtu), path: Path::new(now) })
    }
}

/// CUBIC with a minimum window that does not depend on losses: the bytes that the path delivers in its shortest round trip, times a
/// gain, and those that acknowledgements in bursts take longer for.
#[derive(Clone)]
struct Tolerant {
    cubic: Cubic,
    path: Path,
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
        self.path.sent(now);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
        self.path.acknowledged(sent, bytes, rtt.min());
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
        self.path.end_acknowledged(now, in_flight, app_limited);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, is_persistent, lost_bytes);
        if is_persistent {
            self.path = Path::new(now);
        } else {
            self.path.lost(lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().max(self.path.window())
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The rate and the round trip of a path, measured as BBR does (draft-ietf-ccwg-bbr, "Delivery Rate Samples").
#[derive(Debug, Clone)]
struct Path {
    /// Bytes acknowledged so far, when that last changed, and when the newest packet of those was sent.
    delivered: u64,
    delivered_at: Instant,
    newest_sent_at: Instant,
    /// The times at which recent packets were sent, oldest first.
    moments: VecDeque<Moment>,
    /// The newest of them in the current batch of acknowledgements.
    acknowledged: Option<Moment>,
    /// Whether nothing was in flight after the last acknowledgement.
    is_idle: bool,
    shortest_round_trip: Duration,
    /// The highest rate of each of the last rounds, in bytes per second; that of the current one first.
    rates: VecDeque<f64>,
    /// The highest rate of the current round.
    round_rate: f64,
    /// Bytes acknowledged by the current batch of acknowledgements.
    batch_bytes: u64,
    /// The start of a burst of acknowledgements that came faster than the rate, and its bytes.
    burst_since: Instant,
    burst_bytes: f64,
    /// The most bytes by which bursts were ahead of the rate in each of the last rounds; that of the current one first.
    bursts: VecDeque<f64>,
    /// The round ends with the acknowledgement of a packet that was sent when at least these bytes were delivered.
    round_ends_at: u64,
    delivered_before_round: u64,
    lost_in_round: u64,
    /// Whether a router marked packets in the current round.
    was_marked: bool,
    /// The rate that the next rounds are compared with, and the number of rounds that did not exceed it by [`GROWTH`].
    plateau: f64,
    flat_rounds: u32,
    /// Whether the last round lost more than [`HEAVY_LOSS`], or had marked packets.
    is_overfull: bool,
}

/// A time at which packets were sent, and the state of the path at that time.
#[derive(Debug, Clone, Copy)]
struct Moment {
    sent_at: Instant,
    delivered: u64,
    delivered_at: Instant,
    newest_sent_at: Instant,
}

impl Path {
    fn new(now: Instant) -> Self {
        Self {
            delivered: 0,
            delivered_at: now,
            newest_sent_at: now,
            moments: VecDeque::new(),
            acknowledged: None,
            is_idle: true,
            shortest_round_trip: Duration::MAX,
            rates: VecDeque::from([0.0]),
            round_rate: 0.0,
            batch_bytes: 0,
            burst_since: now,
            burst_bytes: 0.0,
            bursts: VecDeque::from([0.0]),
            round_ends_at: 0,
            delivered_before_round: 0,
            lost_in_round: 0,
            was_marked: false,
            plateau: 0.0,
            flat_rounds: 0,
            is_overfull: false,
        }
    }

    fn sent(&mut self, now: Instant) {
        // Acknowledgements are sent while nothing is in flight, and are not acknowledged: they do not end an idle time.
        let is_old = |moment: &Moment| self.is_old(now - moment.sent_at);
        if self.is_idle && self.moments.back().is_none_or(is_old) {
            (self.delivered_at, self.newest_sent_at) = (now, now);
        }
        if self.moments.back().is_none_or(|last| last.sent_at < now) {
            let Self { delivered, delivered_at, newest_sent_at, .. } = *self;
            self.moments.push_back(Moment { sent_at: now, delivered, delivered_at, newest_sent_at });
            if self.moments.len() > MOMENTS_MAX {
                self.moments.pop_front();
            }
        }
    }

    fn acknowledged(&mut self, sent_at: Instant, bytes: u64, shortest_round_trip: Duration) {
        self.delivered += bytes;
        self.batch_bytes += bytes;
        self.shortest_round_trip = shortest_round_trip;
        if let Ok(at) = self.moments.binary_search_by_key(&sent_at, |moment| moment.sent_at)
            && self.acknowledged.is_none_or(|newest| newest.sent_at < sent_at)
        {
            self.acknowledged = Some(self.moments[at]);
        }
    }

    /// Ends a batch of acknowledgements, of which the newest packet gives a sample.
    fn end_acknowledged(&mut self, now: Instant, in_flight: u64, app_limited: bool) {
        self.is_idle = in_flight == 0;
        self.delivered_at = now;
        self.note_burst(now);
        let Some(moment) = self.acknowledged.take() else { return };
        self.newest_sent_at = self.newest_sent_at.max(moment.sent_at);
        while self.moments.front().is_some_and(|first| self.is_old(moment.sent_at - first.sent_at)) {
            self.moments.pop_front();
        }
        if moment.delivered >= self.round_ends_at {
            self.end_round(app_limited);
        }
        // The longer of both, so that bursts of acknowledgements or of packets do not raise the rate.
        let interval = (now - moment.delivered_at).max(moment.sent_at - moment.newest_sent_at);
        if interval >= self.shortest_round_trip && !interval.is_zero() {
            let rate = (self.delivered - moment.delivered) as f64 / interval.as_secs_f64();
            self.round_rate = self.round_rate.max(rate);
            if !app_limited || rate > self.rate() {
                self.rates[0] = self.rates[0].max(rate);
            }
        }
    }

    /// Notes by how much the bytes acknowledged since the start of a burst exceed what the rate explains ("extra acked").
    fn note_burst(&mut self, now: Instant) {
        let bytes = std::mem::take(&mut self.batch_bytes) as f64;
        let mut expected = self.rate() * (now - self.burst_since).as_secs_f64();
        if self.burst_bytes <= expected {
            (self.burst_since, self.burst_bytes, expected) = (now, 0.0, 0.0);
        }
        self.burst_bytes += bytes;
        let ahead = (self.burst_bytes - expected).min(self.rate() * BURST_MAX.as_secs_f64());
        self.bursts[0] = self.bursts[0].max(ahead);
    }

    fn end_round(&mut self, app_limited: bool) {
        let delivered = self.delivered - self.delivered_before_round;
        let is_much = self.lost_in_round as f64 > HEAVY_LOSS * (self.lost_in_round + delivered) as f64;
        self.is_overfull = self.was_marked || is_much && self.lost_in_round >= HEAVY_LOSS_BYTES;
        if self.is_overfull {
            self.rates = VecDeque::from([0.0, self.round_rate]);
            self.bursts = VecDeque::from([0.0]);
            (self.burst_since, self.burst_bytes) = (self.delivered_at, 0.0);
            (self.plateau, self.flat_rounds) = (self.round_rate, FLAT_ROUNDS);
        } else if !app_limited {
            if self.rate() >= self.plateau * GROWTH {
                (self.plateau, self.flat_rounds) = (self.rate(), 0);
            } else {
                self.flat_rounds = self.flat_rounds.saturating_add(1);
            }
            for values in [&mut self.rates, &mut self.bursts] {
                values.push_front(0.0);
                values.truncate(ROUNDS);
            }
        }
        (self.round_ends_at, self.delivered_before_round) = (self.delivered, self.delivered);
        (self.lost_in_round, self.was_marked, self.round_rate) = (0, false, 0.0);
    }

    fn is_old(&self, age: Duration) -> bool {
        age > self.shortest_round_trip.saturating_mul(4)
    }

    /// Notes lost packets, or, with 0 bytes, that a router marked packets.
    fn lost(&mut self, bytes: u64) {
        self.lost_in_round += bytes;
        self.was_marked |= bytes == 0;
    }

    /// The highest rate of the last rounds.
    fn rate(&self) -> f64 {
        highest(&self.rates)
    }

    /// The minimum window, in bytes; 0 before the first acknowledgement.
    fn window(&self) -> u64 {
        if self.shortest_round_trip == Duration::MAX {
            return 0;
        }
        let gain = match self.flat_rounds {
            _ if self.is_overfull => GAIN_OVERFULL,
            0..FLAT_ROUNDS => GAIN_GROWING,
            _ => GAIN_STEADY,
        };
        (gain * self.rate() * self.shortest_round_trip.as_secs_f64() + highest(&self.bursts)) as u64
    }
}

fn highest(values: &VecDeque<f64>) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// The window of a new connection. RFC 9002 recommends ten datagrams; these are paced over the first round trip.
const INITIAL_WINDOW_BYTES: u64 = 64 * 1200;
/// Number of rounds whose highest rate counts.
const ROUNDS: usize = 10;
/// A rate that grows by this factor shows that the path is not full.
const GROWTH: f64 = 1.25;
/// Number of rounds without growth after which a path counts as full.
const FLAT_ROUNDS: u32 = 3;
/// The window, in products of rate and shortest round trip.
const GAIN_GROWING: f64 = 2.0;
const GAIN_STEADY: f64 = 1.25;
const GAIN_OVERFULL: f64 = 0.85;
/// A round that loses more than this share of its bytes, and at least these bytes, has overfilled the path.
const HEAVY_LOSS: f64 = 0.15;
const HEAVY_LOSS_BYTES: u64 = 10 * 1200;
/// The longest pause between bursts of acknowledgements that the window allows for.
const BURST_MAX: Duration = Duration::from_millis(10);
/// Bounds the memory of a connection to half a MiB.
const MOMENTS_MAX: usize = 4096;

#[cfg(test)]
mod tests;
