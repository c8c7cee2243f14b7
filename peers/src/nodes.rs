//! Single nodes of a blob's tree, for whoever wants to know where two trees differ without moving bytes.
//! Order and bounds: spec/wire.md, "Node streams".

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tracing::{debug, warn};
use tree::{BlobId, PartialTree, RangeSet};

use crate::{
    Peers,
    dial::reach,
    endpoint::{GREETING_LIMIT, Inner},
    fetch::REACH_LIMIT,
    frame::{FrameError, GREETING_BYTES_MAX, NODES_BYTES_MAX, StreamKind, open_with_frame, read_frame, within},
    incoming::{Incoming, Terms},
    outgoing::Outgoing,
    pace::Class,
    transfer::STALL_LIMIT,
};

/// Asks for the pairs at some nodes of a blob's tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesRequest {
    /// The blob.
    pub blob: BlobId,
    /// Its size in bytes, which decides what the nodes are.
    pub size: u64,
    /// The nodes, by their numbers in pre-order: at most [`NODES_MAX`].
    pub nodes: Vec<u64>,
}

/// The pairs at the first of the nodes that were asked for, 64 bytes each, up to the first that is not here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nodes {
    /// One pair behind the other.
    pub pairs: Vec<u8>,
}

impl Peers {
    /// Asks the peers that have the blob, one after the other, for what is missing of its tree above `ranges`, level
    /// by level, until every chunk group there can be proven by itself, or nobody has more. Every pair is proven.
    /// Returns what is known then, and how many bytes came.
    pub async fn complete_tree(&self, blob: BlobId, mut tree: PartialTree, ranges: &RangeSet) -> (PartialTree, u64) {
        let mut bytes = 0;
        for peer in self.holders(blob).await {
            let Ok(connection) = reach(&self.inner, peer, REACH_LIMIT).await else { continue };
            loop {
                let nodes = tree.missing(ranges, NODES_MAX);
                if nodes.is_empty() {
                    return (tree, bytes);
                }
                let request = NodesRequest { blob, size: tree.size(), nodes };
                let answer = match ask(&connection, Terms::plain(&self.inner, peer, Class::Copy), &request).await {
                    Ok(answer) => answer,
                    Err(reason) => {
                        debug!(%peer, %blob, reason, "it does not tell its tree");
                        break;
                    }
                };
                bytes += answer.pairs.len() as u64;
                let (pairs, _) = answer.pairs.as_chunks();
                let taken = request.nodes.iter().zip(pairs).try_for_each(|(&node, pair)| tree.insert(node, *pair));
                if let Err(error) = taken {
                    warn!(%peer, %blob, reason = tree::reason(&error), "it sent a wrong tree; the next peer is asked");
                    break;
                }
                if pairs.len() < request.nodes.len() {
                    break;
                }
            }
        }
        (tree, bytes)
    }
}

pub(crate) async fn ask(connection: &quinn::Connection, terms: Terms, request: &NodesRequest) -> Result<Nodes, String> {
    let open = open_with_frame(connection, &[StreamKind::Nodes as u8], request);
    let recv = within(STALL_LIMIT, open).await.map_err(|error| tree::reason(&error))?;
    Incoming::new(terms, recv, STALL_LIMIT).read_frame(NODES_BYTES_MAX).await
}

/// Answers one question for nodes with those that are here and prove.
pub(crate) async fn serve_nodes(
    inner: &Inner,
    mut to: Outgoing,
    mut recv: quinn::RecvStream,
) -> Result<(), FrameError> {
    let request: NodesRequest = within(GREETING_LIMIT, read_frame(&mut recv, GREETING_BYTES_MAX)).await?;
    let store = inner.store.clone();
    let nodes = spawn_blocking(move || {
        let asked = &request.nodes[..request.nodes.len().min(NODES_MAX)];
        store.nodes(request.blob, request.size, asked)
    });
    let pairs = match nodes.await {
        Ok(Ok(pairs)) => pairs.concat(),
        Ok(Err(error)) => {
            warn!(blob = %request.blob, reason = tree::reason(&error), "cannot be looked up");
            Vec::new()
        }
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    };
    to.send_frame(&Nodes { pairs }).await?;
    let _ = to.stream.finish();
    Ok(())
}

/// The most nodes that are asked for at a time.
pub const NODES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    #[test]
    fn on_the_wire() {
        let request = NodesRequest { blob: BlobId::EMPTY, size: 70_000, nodes: vec![0, 3, 300] };
        let hex = format!("{}f0a204030003ac02", BlobId::EMPTY);
        assert_eq!(HEXLOWER.encode(&postcard::to_stdvec(&request).unwrap()), hex);
        let most = NodesRequest { nodes: vec![u64::MAX; NODES_MAX], size: u64::MAX, ..request };
        assert!(postcard::to_stdvec(&most).unwrap().len() <= GREETING_BYTES_MAX);
        let nodes = Nodes { pairs: vec![7; 64 * NODES_MAX] };
        assert!(postcard::to_stdvec(&nodes).unwrap().len() <= NODES_BYTES_MAX);
        assert_eq!(postcard::to_stdvec(&Nodes::default()).unwrap(), [0]);
    }
}
