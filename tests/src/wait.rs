use std::{
    thread::sleep,
    time::{Duration, Instant},
};

/// Asks `state` again and again until it gives something, and fails with `what` if it has not within `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut state: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = state() {
            return value;
        }
        assert!(started.elapsed() < limit, "waited {limit:?} in vain for: {what}");
        sleep(Duration::from_millis(20));
    }
}
