//! What could not be fetched is not tried again at once. Pure: time is passed in.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use tree::BlobId;

/// The blobs that failed, each with when it may be tried again.
#[derive(Debug, Default)]
pub(super) struct Failures(HashMap<BlobId, Failed>);

#[derive(Debug)]
struct Failed {
    times: u32,
    until: Instant,
    reason: String,
}

impl Failures {
    /// Notes that a blob failed once more.
    pub(super) fn add(&mut self, blob: BlobId, reason: String, now: Instant) {
        if self.0.len() >= FAILED_MAX && !self.0.contains_key(&blob) {
            // Whoever goes on with the rest pauses after a round that came to nothing.
            return;
        }
        let times = self.0.get(&blob).map_or(0, |failed| failed.times).saturating_add(1);
        let wait = FIRST_WAIT * 2_u32.saturating_pow((times - 1).min(DOUBLINGS_MAX));
        self.0.insert(blob, Failed { times, until: now + wait.min(LAST_WAIT), reason });
    }

    /// Notes that a blob came.
    pub(super) fn remove(&mut self, blob: BlobId) {
        self.0.remove(&blob);
    }

    /// Why a blob is not to be tried yet; `None` if it may be.
    pub(super) fn why_not(&self, blob: BlobId, now: Instant) -> Option<&str> {
        self.0.get(&blob).filter(|failed| failed.until > now).map(|failed| &failed.reason[..])
    }

    /// When the next may be tried that may not be now.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        self.0.values().map(|failed| failed.until).filter(|&until| until > now).min()
    }

    /// Lets all be tried at once: somebody came who may have them.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

const FIRST_WAIT: Duration = Duration::from_secs(5);
const LAST_WAIT: Duration = Duration::from_secs(600);
const DOUBLINGS_MAX: u32 = 10;
const FAILED_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_each_time() {
        let (mut failures, blob, start) = (Failures::default(), BlobId::EMPTY, Instant::now());
        let mut waits = Vec::new();
        let mut now = start;
        for _ in 0..12 {
            failures.add(blob, "why".to_owned(), now);
            assert_eq!(failures.why_not(blob, now), Some("why"));
            let due = failures.next_due(now).unwrap();
            waits.push((due - now).as_secs());
            now = due;
            assert_eq!((failures.why_not(blob, now), failures.next_due(now)), (None, None));
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 600, 600, 600, 600, 600]);
        failures.add(blob, "why".to_owned(), now);
        failures.remove(blob);
        assert_eq!(failures.why_not(blob, now), None);
        for number in 0..10_000_u32 {
            let id = [&number.to_be_bytes()[..], &[0; 28]].concat().try_into().unwrap();
            failures.add(BlobId::from_bytes(id), String::new(), now);
        }
        assert_eq!(failures.0.len(), FAILED_MAX);
        failures.clear();
        assert_eq!(failures.next_due(now), None);
    }
}
