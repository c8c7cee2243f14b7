//! What tells of bytes counts as the bytes do. How limits share: `peers/src/pace`.

use std::time::{Duration, Instant};

use peers::{
    Identity, RATE_LEAST, encode_request,
    wire::{ChunksRequest, NodesRequest, StreamKind},
};
use tokio::time::timeout;
use tree::{ByteRange, GROUP_BYTES, Geometry, PartialTree, Query, RangeSet};

use crate::machine::{DEADLINE, Machine, random_bytes};
use crate::raw::{introduced, request};

/// A limit that is new has saved nothing: so much takes so long at least.
fn least(bytes: usize) -> Duration {
    Duration::from_secs_f64(bytes as f64 / RATE as f64)
}

/// `kind`, and `message` as a frame.
fn framed(kind: StreamKind, message: &impl serde::Serialize) -> Vec<u8> {
    let message = postcard::to_stdvec(message).unwrap();
    [&[kind as u8][..], &(message.len() as u32).to_le_bytes(), &message].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_and_lists_wait_for_the_limit_on_what_is_sent() {
    let (machine, asker) = (Machine::start("machine"), Identity::ephemeral().unwrap());
    let bytes = random_bytes(7, 16 << 20);
    let (blob, size) = (machine.hold("file", &bytes), bytes.len() as u64);
    machine.trust(asker.peer(), "asker", None);
    let connection = introduced(&asker, &machine).await;
    let groups = size / GROUP_BYTES;
    let nodes = (0..groups - 1).collect();
    let every_other = (0..groups).step_by(2).map(|group| group * GROUP_BYTES);
    let ranges: RangeSet = every_other.filter_map(|at| ByteRange::new(at, at + GROUP_BYTES)).collect();
    let have = [&[StreamKind::Have as u8][..], &encode_request(blob, &Query::groups(&ranges))].concat();
    for asked in [
        framed(StreamKind::Nodes, &NodesRequest { blob, size, nodes }),
        framed(StreamKind::Chunks, &ChunksRequest { blob, size }),
        have,
    ] {
        // What is being made takes time of its own.
        request(&connection, &asked).await;
        machine.peers.up().set(Some(RATE));
        let began = Instant::now();
        let mut came = 0;
        while came < RATE as usize {
            came += timeout(DEADLINE, request(&connection, &asked)).await.unwrap().len();
        }
        assert!(began.elapsed() >= least(came), "kind {}: {came} bytes in {:?}", asked[0], began.elapsed());
        machine.peers.up().set(None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_wait_for_the_limit_on_what_is_received() {
    let (far, near) = (Machine::start("far"), Machine::start("near"));
    let bytes = random_bytes(8, 16 << 20);
    let (blob, size) = (far.hold("file", &bytes), bytes.len() as u64);
    near.meet(&far).await;
    near.heard(&far, &far, blob).await;
    near.peers.down().set(Some(RATE));
    let began = Instant::now();
    let all = RangeSet::from(Geometry::new(size).all());
    let (tree, came) = near.peers.complete_tree(blob, PartialTree::new(blob, size), &all).await;
    assert!(tree.missing(&all, 1).is_empty() && came >= RATE - 64, "{came} bytes came");
    assert!(began.elapsed() >= least(came as usize), "{came} bytes in {:?}", began.elapsed());
}

/// Bytes a second: the least that there may be.
const RATE: u64 = RATE_LEAST;
