//! The seam between the store and other machines.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
};

use tree::{BlobId, RangeSet, Verified, VerifiedData};

use crate::StoreError;

/// Where proven pieces go.
pub trait Sink: Send {
    /// Takes pieces: of one blob only, in any order, some perhaps more than once. The more that follow one another are
    /// handed in together, the larger are the writes.
    fn write(&mut self, pieces: &[Verified]) -> Result<(), StoreError>;

    /// Makes what was taken durable, and says so where that is said. May be called at any time and often.
    fn commit(&mut self) -> Result<(), StoreError>;
}

/// A sink, as a fetch holds it: pieces are proven and written on another thread than they arrive on.
pub type SharedSink = Arc<Mutex<dyn Sink>>;

/// What is to be fetched: whole chunk groups of one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// The blob.
    pub blob: BlobId,
    /// Its size, as known here or claimed by the catalog. An answer that says otherwise is refused.
    pub size: u64,
    /// The bytes wanted, whole chunk groups.
    pub ranges: RangeSet,
}

/// What a fetch brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes received in answers: data, proofs and sizes, the useless ones included.
    pub bytes_received: u64,
    /// The names of the peers that sent something that proved, in the order they were asked.
    pub peers: Vec<String>,
}

/// Why something could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No peer is known to have the blob.
    #[error("fetch blob {blob}: no peer is known to have it")]
    NoPeerHasIt {
        /// The blob.
        blob: BlobId,
    },
    /// Every peer that has the blob failed; what came before is in the sink.
    #[error("fetch blob {blob}: {}", .tried.join("; "))]
    AllFailed {
        /// The blob.
        blob: BlobId,
        /// One line for each peer: its name, and why.
        tried: Vec<String>,
        /// What came all the same.
        fetched: Fetched,
    },
    /// The sink failed.
    #[error("fetch blob {blob}: keep what was received")]
    Sink {
        /// The blob.
        blob: BlobId,
        /// Why.
        source: StoreError,
    },
}

/// Brings what is not here.
pub trait Fetch: Send + Sync {
    /// Brings all of `want` from whichever peers have it, into `sink`, which is committed at the end, also after
    /// a failure. Ends in bounded time even if no peer answers.
    fn fetch(
        &self,
        want: Want,
        sink: SharedSink,
    ) -> Pin<Box<dyn Future<Output = Result<Fetched, FetchError>> + Send + '_>>;

    /// Returns how many bytes of answers all fetches have received, proven or not. The number grows while any peer sends.
    fn received_bytes(&self) -> u64;
}

/// A sink that keeps the data pieces in memory, for blobs known to be small.
#[derive(Debug, Default)]
pub struct Collected {
    /// The pieces, in the order they came.
    pub pieces: Vec<VerifiedData>,
}

impl Sink for Collected {
    fn write(&mut self, pieces: &[Verified]) -> Result<(), StoreError> {
        self.pieces.extend(pieces.iter().filter_map(Verified::data).cloned());
        Ok(())
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}
