//! Counts what is received, and what of that was of no use: for this machine, and for each command.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Bytes of answers.
#[derive(Debug, Default)]
pub struct Counts {
    received: AtomicU64,
    wasted: AtomicU64,
}

impl Counts {
    /// Bytes received: data, proofs, sizes, and what was asked besides. Packed answers count as they came.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Received bytes that were discarded: the ends of answers that broke off, to about 100 kB of each, what did not prove, and what
    /// another peer had sent by then. The last two count unpacked.
    pub fn wasted(&self) -> u64 {
        self.wasted.load(Ordering::Relaxed)
    }

    pub(crate) fn receive(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn waste(&self, bytes: u64) {
        self.wasted.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Does `work`, and counts in `counts` what is received for it: by this task, not by others that it starts.
pub async fn counted<W: Future>(counts: Arc<Counts>, work: W) -> W::Output {
    OF_THE_COMMAND.scope(counts, work).await
}

/// Returns the counts of the command that this task works for.
pub(crate) fn of_the_command() -> Option<Arc<Counts>> {
    OF_THE_COMMAND.try_with(Arc::clone).ok()
}

tokio::task_local! {
    static OF_THE_COMMAND: Arc<Counts>;
}
