use std::time::Duration;

/// When to dial again after failures: 5 s, 15 s, 30 s, 1 min, 2 min, then every 5 min, each less up to a quarter.
#[derive(Debug, Clone, Default)]
pub(crate) struct Backoff {
    failures: usize,
}

impl Backoff {
    /// How long to wait after one more failure. `random` is between 0 and 1.
    pub(crate) fn after_failure(&mut self, random: f64) -> Duration {
        let wait = WAITS_S[self.failures.min(WAITS_S.len() - 1)];
        self.failures += 1;
        Duration::from_secs(wait).mul_f64(1.0 - random.clamp(0.0, 1.0) / 4.0)
    }

    /// Starts over: it worked, or there is reason to think that it will.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

const WAITS_S: [u64; 6] = [5, 15, 30, 60, 120, 300];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_five_minutes_and_no_further() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..8).map(|_| backoff.after_failure(0.0).as_secs()).collect();
        assert_eq!(waits, [5, 15, 30, 60, 120, 300, 300, 300]);
        assert_eq!(backoff.after_failure(1.0).as_secs(), 225);
        backoff.reset();
        assert_eq!(backoff.after_failure(0.0).as_secs(), 5);
    }
}
