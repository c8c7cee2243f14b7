use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use namespace::PeerId;
use tree::BlobId;

use crate::Peers;

/// Who is said to have blobs that no catalog names yet, such as those that a peer offers to copy here. A hint is safe:
/// what comes is proven.
#[derive(Debug, Default)]
pub(crate) struct Hints {
    peers: Mutex<HashMap<BlobId, Vec<PeerId>>>,
}

/// As long as it lives, its peer is asked for its blob.
pub struct Hint {
    peers: Peers,
    blob: BlobId,
    peer: PeerId,
}

impl Peers {
    /// Has `peer` asked for `blob`, too, whatever its catalog says, as long as the hint lives.
    pub fn hint(&self, blob: BlobId, peer: PeerId) -> Hint {
        let mut peers = self.inner.hints.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.entry(blob).or_default().push(peer);
        Hint { peers: self.clone(), blob, peer }
    }
}

impl Hints {
    /// Who is said to have `blob`; some perhaps more than once.
    pub(crate) fn of(&self, blob: BlobId) -> Vec<PeerId> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).get(&blob).cloned().unwrap_or_default()
    }
}

impl Drop for Hint {
    fn drop(&mut self) {
        let mut all = self.peers.inner.hints.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peers) = all.get_mut(&self.blob) {
            if let Some(at) = peers.iter().position(|&peer| peer == self.peer) {
                peers.swap_remove(at);
            }
            if peers.is_empty() {
                all.remove(&self.blob);
            }
        }
    }
}
