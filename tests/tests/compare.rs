//! Two trees are compared over the wire, level by level: where they differ is found without moving their bytes.

use std::fs;

use fastrand::Rng;
use peers::{
    Identity,
    wire::{Nodes, NodesRequest, StreamKind, read_frame, write_frame},
};
use tests::{Machine, Scratch, groups_of, introduced, random_bytes};
use tokio::runtime::Runtime;
use tree::{ByteRange, Comparison, RangeSet, hash};

#[test]
fn a_changed_byte_is_found_with_kilobytes() {
    const SIZE: u64 = 60_000_003;
    let scratch = Scratch::new();
    let (root, mut ours) = (scratch.dir("docs"), random_bytes(SIZE, &mut Rng::with_seed(9)));
    fs::write(root.join("file"), &ours).unwrap();
    // What is asked for is computed from the bytes where the outboard does not have it.
    for (name, config) in [("fine", ""), ("coarse", "[store]\noutboard_grain = \"1 MiB\"\n")] {
        let a = Machine::up_with_config(&scratch, name, &[&root], config);
        let me = Identity::ephemeral().unwrap();
        a.ok(["peer", "add", "me", &me.peer().to_string()]);
        let theirs = hash(&ours[..], SIZE).unwrap();
        let changed = [7, 33_333_333, SIZE - 1];
        changed.iter().for_each(|&at| ours[at as usize] ^= 1);
        let our_tree = hash(&ours[..], SIZE).unwrap();
        changed.iter().for_each(|&at| ours[at as usize] ^= 1);
        let mut comparison = Comparison::new(SIZE, our_tree.id, theirs.id);
        let (mut received, mut rounds) = (0, 0);
        Runtime::new().unwrap().block_on(async {
            let connection = introduced(&me, &a, &a.address()).await;
            loop {
                let nodes = comparison.wanted(1000);
                if nodes.is_empty() {
                    break;
                }
                let (mut send, mut recv) = connection.open_bi().await.unwrap();
                send.write_all(&[StreamKind::Nodes as u8]).await.unwrap();
                let request = NodesRequest { blob: theirs.id, size: SIZE, nodes };
                write_frame(&mut send, &request).await.unwrap();
                send.finish().unwrap();
                let told: Nodes = read_frame(&mut recv, 1 << 17).await.unwrap();
                received += told.pairs.len();
                rounds += 1;
                let (pairs, _) = told.pairs.as_chunks::<64>();
                assert_eq!(pairs.len(), request.nodes.len());
                let our_pair = |node: u64| our_tree.outboard.as_chunks::<64>().0[node as usize];
                let both: Vec<_> =
                    request.nodes.iter().zip(pairs).map(|(&node, pair)| (our_pair(node), *pair)).collect();
                comparison.descend(&both).unwrap();
            }
        });
        let expected = groups_of(SIZE, &changed).into_iter().filter_map(|(start, end)| ByteRange::new(start, end));
        assert_eq!(comparison.differing(), &expected.collect::<RangeSet>(), "{name}");
        // 3,663 chunk groups are 12 levels.
        assert!(rounds <= 12 && received <= 3 * 12 * 64, "{name}: {rounds} rounds, {received} bytes");
    }
}
