//! Limits on what goes over the network: how many bytes a second, and who waits for whom.
//!
//! A limit is a [`Pace`]; [`Limits`] are those of one direction, one for all peers together and one for each that has its
//! own. What counts, and what the limits promise: spec/wire.md, "Limits". Who is next, and when, is decided by
//! `bucket`, without a clock.

mod bucket;
mod limits;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    select,
    sync::Notify,
    time::{Instant, sleep_until},
};

use self::bucket::{Bucket, Turn};

pub use bucket::{Class, RATE_LEAST};
pub use limits::Limits;

/// A limit that may change while it is kept; a handle, of which all clones are the same limit.
///
/// Without a limit, taking costs one atomic load.
#[derive(Clone)]
pub struct Pace {
    shared: Arc<Shared>,
}

struct Shared {
    limited: AtomicBool,
    queue: Mutex<Queue>,
}

/// Who waits, and how each is told.
struct Queue {
    bucket: Bucket,
    waiting: BTreeMap<Turn, Arc<Notify>>,
    /// The one who sleeps until it is time for the next to take.
    watching: Option<Turn>,
}

impl Pace {
    /// `rate` bytes a second, [`RATE_LEAST`] at the least; or as many as there are.
    pub fn new(rate: Option<u64>) -> Self {
        let queue = Queue { bucket: Bucket::new(rate, now()), waiting: BTreeMap::new(), watching: None };
        Self { shared: Arc::new(Shared { limited: AtomicBool::new(rate.is_some()), queue: Mutex::new(queue) }) }
    }

    /// Changes the rate from now on, also for those who wait.
    pub fn set(&self, rate: Option<u64>) {
        let mut queue = self.shared.lock();
        self.shared.limited.store(rate.is_some(), Ordering::Relaxed);
        queue.bucket.set(rate, now());
        // Whoever watches for the next turn does so for another time now.
        queue.watching = None;
        queue.settle();
    }

    /// The rate in bytes a second, if there is a limit.
    pub fn rate(&self) -> Option<u64> {
        self.shared.lock().bucket.rate()
    }

    /// Waits until `bytes` may go. Takes nothing if it is dropped before.
    ///
    /// Others wait for as long as what was taken at once lasts: it should be little.
    pub async fn take(&self, class: Class, bytes: u64) {
        self.reserve(class, bytes).await.keep();
    }

    /// Like [`take`](Self::take), but gives it back unless it is kept.
    async fn reserve(&self, class: Class, bytes: u64) -> Reserved {
        if !self.shared.limited.load(Ordering::Relaxed) {
            return Reserved(None);
        }
        let (taken, told) = self.queue_up(class, bytes);
        // From here on given back, wherever this ends.
        let reserved = Reserved(Some(taken));
        while let Some(wait) = reserved.look() {
            match wait {
                Wait::Until(until) => select! {
                    () = told.notified() => {}
                    () = sleep_until(until) => {}
                },
                Wait::ForOthers => told.notified().await,
            }
        }
        reserved
    }

    fn queue_up(&self, class: Class, bytes: u64) -> (Taken, Arc<Notify>) {
        let told = Arc::new(Notify::new());
        let mut queue = self.shared.lock();
        let turn = queue.bucket.enqueue(class, bytes);
        queue.waiting.insert(turn, told.clone());
        (Taken { shared: self.shared.clone(), turn, bytes }, told)
    }

    /// How many wait.
    #[cfg(test)]
    fn waiting(&self) -> usize {
        self.shared.lock().waiting.len()
    }
}

impl fmt::Debug for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pace").field("rate", &self.rate()).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Lets go whose turn it is, and has whoever is next then watch for its turn.
    fn settle(&mut self) {
        let now = now();
        while let Some(turn) = self.bucket.grant(now) {
            if let Some(told) = self.waiting.remove(&turn) {
                told.notify_one();
            }
        }
        let next = self.bucket.next();
        if self.watching != next {
            self.watching = next;
            if let Some(told) = next.and_then(|next| self.waiting.get(&next)) {
                told.notify_one();
            }
        }
    }
}

/// What was taken, or is waited for; given back when dropped. Empty without a limit.
#[must_use]
struct Reserved(Option<Taken>);

struct Taken {
    shared: Arc<Shared>,
    turn: Turn,
    bytes: u64,
}

/// What a taker waits for, beside being told.
enum Wait {
    Until(Instant),
    ForOthers,
}

impl Reserved {
    /// Lets go whose turn it is. Says what to wait for if this one's it is not.
    fn look(&self) -> Option<Wait> {
        let taken = self.0.as_ref()?;
        let mut queue = taken.shared.lock();
        queue.settle();
        if !queue.waiting.contains_key(&taken.turn) {
            return None;
        }
        let until = queue.bucket.next_at().filter(|_| queue.watching == Some(taken.turn));
        Some(until.map_or(Wait::ForOthers, |until| Wait::Until(until.into())))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let Some(taken) = self.0.take() else { return };
        let mut queue = taken.shared.lock();
        match queue.waiting.remove(&taken.turn) {
            Some(_) => queue.bucket.cancel(taken.turn),
            None => {
                queue.bucket.give_back(taken.bytes, now());
                // It may be time for the next one sooner.
                queue.watching = None;
            }
        }
        queue.settle();
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}
