use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use namespace::PeerId;

use super::{Class, Pace};

/// The limits of one direction: one for all peers together, and one for each that has its own. A handle.
#[derive(Debug, Clone)]
pub struct Limits {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Whether there is any limit at all.
    limited: AtomicBool,
    all: Pace,
    by_peer: RwLock<HashMap<PeerId, Pace>>,
}

impl Limits {
    /// None yet.
    pub fn none() -> Self {
        let shared =
            Shared { limited: AtomicBool::new(false), all: Pace::new(None), by_peer: RwLock::new(HashMap::new()) };
        Self { shared: Arc::new(shared) }
    }

    /// Changes the limit of all peers together, in bytes a second; also for those who wait.
    pub fn set(&self, rate: Option<u64>) {
        let by_peer = self.write();
        self.shared.all.set(rate);
        self.note(&by_peer);
    }

    /// Changes the limit of one peer, in bytes a second, also for those who wait. It holds beside that of all.
    pub fn set_peer(&self, peer: PeerId, rate: Option<u64>) {
        let mut by_peer = self.write();
        if rate.is_some() {
            by_peer.entry(peer).or_insert_with(|| Pace::new(rate)).set(rate);
        } else if let Some(pace) = by_peer.remove(&peer) {
            pace.set(None);
        }
        self.note(&by_peer);
    }

    /// The limit of all peers together, in bytes a second.
    pub fn rate(&self) -> Option<u64> {
        self.shared.all.rate()
    }

    /// The limit of one peer, in bytes a second.
    pub fn rate_of(&self, peer: PeerId) -> Option<u64> {
        self.pace_of(peer)?.rate()
    }

    /// Waits until `bytes` of payload may go to or come from `peer`, by its own limit and by that of all; what the
    /// packets take beside is added here. Takes nothing if it is dropped before.
    pub async fn take(&self, peer: PeerId, class: Class, bytes: u64) {
        if !self.shared.limited.load(Ordering::Relaxed) {
            return;
        }
        let bytes = on_the_wire(bytes);
        // Its own first: who waits for that keeps nothing from the others.
        let own = match self.pace_of(peer) {
            Some(pace) => Some(pace.reserve(class, bytes).await),
            None => None,
        };
        self.shared.all.take(class, bytes).await;
        if let Some(own) = own {
            own.keep();
        }
    }

    /// Whether there is any limit.
    pub(crate) fn is_limited(&self) -> bool {
        self.shared.limited.load(Ordering::Relaxed)
    }

    fn pace_of(&self, peer: PeerId) -> Option<Pace> {
        self.shared.by_peer.read().unwrap_or_else(PoisonError::into_inner).get(&peer).cloned()
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<PeerId, Pace>> {
        self.shared.by_peer.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, by_peer: &HashMap<PeerId, Pace>) {
        let limited = self.shared.all.rate().is_some() || !by_peer.is_empty();
        self.shared.limited.store(limited, Ordering::Relaxed);
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::none()
    }
}

/// What a payload takes with the headers of its packets, by an estimate of 4 %.
fn on_the_wire(payload_bytes: u64) -> u64 {
    payload_bytes.saturating_add(payload_bytes / 25)
}
