//! Trees of which only a part is here.

mod common;

use common::{
    range,
    stored::{SIZES, Stored, a_blob, flips},
};
use proptest::prelude::*;
use tree::{BlobId, CompareError, Comparison, Geometry, Grain, NodeError, PartialTree, RangeSet, hash, node_pair};

fn pair_at(outboard: &[u8], node: u64) -> [u8; 64] {
    outboard[node as usize * 64..][..64].try_into().unwrap()
}

proptest! {
    #![proptest_config(common::cases(300))]

    #[test]
    fn two_trees_are_compared(blob in a_blob(), groups in flips(30), at_a_time in 1..200usize) {
        let mut stored = Stored::sound(blob);
        stored.flip(&groups);
        let theirs = hash(&stored.data[..], stored.size() as u64).unwrap();
        let mut comparison = Comparison::new(stored.size() as u64, stored.hashed.id, theirs.id);
        let mut asked = 0;
        loop {
            let nodes = comparison.wanted(at_a_time);
            if nodes.is_empty() {
                break;
            }
            prop_assert!(nodes.len() <= at_a_time);
            asked += nodes.len();
            let pairs: Vec<_> =
                nodes.iter().map(|&n| (pair_at(&stored.hashed.outboard, n), pair_at(&theirs.outboard, n))).collect();
            let undecided = comparison.undecided().union(comparison.differing());
            prop_assert!(stored.damaged_groups().difference(&undecided).is_empty());
            let mut wrong = pairs.clone();
            wrong[0].1[5] ^= 1;
            assert!(matches!(comparison.descend(&wrong), Err(CompareError::Theirs { .. })));
            wrong[0].0[5] ^= 1;
            assert!(matches!(comparison.descend(&wrong), Err(CompareError::Ours { .. })));
            comparison.descend(&pairs).unwrap();
        }
        prop_assert_eq!(comparison.differing(), &stored.damaged_groups());
        let differing = comparison.differing().total_bytes().div_ceil(common::GROUP as u64) as usize;
        prop_assert!(asked <= differing * 10, "{asked} nodes for {differing} groups");
    }

    /// With any part of the tree, what is provable proves, and what is asked for leads to every group by itself.
    #[test]
    fn a_tree_grows(blob in a_blob(), groups in flips(10), grain in prop::sample::select(&Grain::ALL[..]), at_a_time in 1..50usize) {
        let mut stored = Stored::sound(blob);
        stored.flip(&groups);
        let (id, size) = (stored.hashed.id, stored.size() as u64);
        let damaged = stored.damaged_groups();
        let mut tree = PartialTree::new(id, size);
        prop_assert_eq!(tree.provable(0), Geometry::new(size).all());
        loop {
            let found = tree.find_damage(&stored, &damaged);
            prop_assert!(damaged.difference(&found).is_empty(), "damage is never missed");
            let nodes = tree.missing(&damaged, at_a_time);
            if nodes.is_empty() {
                break;
            }
            for node in nodes {
                // A peer computes what its coarse outboard leaves out.
                let coarse = std::sync::Mutex::new(vec![0; Geometry::new(size).outboard_bytes_at(grain) as usize]);
                tree::hash_into(stored.sound, size, grain, &coarse).unwrap();
                let pair = node_pair(size, stored.sound, &coarse.into_inner().unwrap()[..], grain, node).unwrap();
                prop_assert_eq!(pair, pair_at(&stored.hashed.outboard, node));
                let mut wrong = pair;
                wrong[63] ^= 0x80;
                assert!(matches!(tree.insert(node, wrong), Err(NodeError::WrongHash { .. })));
                tree.insert(node, pair).unwrap();
                tree.insert(node, pair).unwrap();
            }
        }
        prop_assert_eq!(tree.find_damage(&stored, &damaged), damaged);
    }

    #[test]
    fn an_outboard_is_taken_as_far_as_it_proves(blob in a_blob(), pairs in flips(3)) {
        let mut stored = Stored::sound(blob);
        stored.flip_pairs(&pairs);
        let all = RangeSet::from(range(0, stored.size()));
        let mut tree = PartialTree::new(stored.hashed.id, stored.size() as u64);
        let proved = tree.take_outboard(&stored.stored_outboard(), Grain::GROUP, &all);
        prop_assert_eq!(proved, stored.outboard == stored.hashed.outboard);
        prop_assert_eq!(proved, tree.missing(&all, 1).is_empty());
        for node in tree.missing(&all, usize::MAX) {
            prop_assert!(!stored.pair_is_right(node as usize));
        }
    }
}

#[test]
fn nodes_that_are_not_there_or_come_too_soon() {
    let stored = Stored::sound(SIZES.len() - 1);
    let (size, pairs) = (stored.size() as u64, (stored.groups() - 1) as u64);
    let mut tree = PartialTree::new(stored.hashed.id, size);
    assert_eq!(tree.insert(1, pair_at(&stored.outboard, 1)), Err(NodeError::TooSoon { node: 1 }));
    for node in [pairs, pairs + 1, u64::MAX] {
        assert_eq!(tree.insert(node, [0; 64]), Err(NodeError::None { node }));
        assert!(node_pair(size, &stored, &stored.stored_outboard(), Grain::GROUP, node).is_err());
    }
    for (size, node) in [(0, 0), (16384, 0), (16385, 1)] {
        assert_eq!(PartialTree::new(BlobId::EMPTY, size).insert(node, [0; 64]), Err(NodeError::None { node }));
    }
}

/// One changed group among 2^26, in two trees of which every node is computed when it is asked for.
#[test]
fn a_changed_group_in_a_tebibyte_costs_kilobytes() {
    const LEVELS: u32 = 26;
    let changed: u64 = 0x2AB_CDEF;
    // Chunk groups may be anything to the nodes above them, so that equal ones make all nodes of a level equal.
    let node = |left: [u8; 32], right: [u8; 32]| {
        blake3::hazmat::merge_subtrees_non_root(&left, &right, blake3::hazmat::Mode::Hash)
    };
    let mut level = vec![[7; 32]];
    let mut path = vec![[8; 32]];
    for bit in 0..LEVELS {
        let (same, other) = (level[bit as usize], path[bit as usize]);
        level.push(node(same, same));
        path.push(if changed >> bit & 1 == 0 { node(other, same) } else { node(same, other) });
    }
    let root = |left, right| {
        BlobId::from_bytes(*blake3::hazmat::merge_subtrees_root(&left, &right, blake3::hazmat::Mode::Hash).as_bytes())
    };
    let top = LEVELS as usize - 1;
    let ours = root(level[top], level[top]);
    let theirs = if changed >> top & 1 == 0 { root(path[top], level[top]) } else { root(level[top], path[top]) };
    let mut comparison = Comparison::new(1 << 40, ours, theirs);
    let mut bytes = 0;
    for below in (0..LEVELS as usize).rev() {
        let nodes = comparison.wanted(1000);
        assert_eq!(nodes.len(), 1);
        bytes += 8 + 64;
        let right = changed >> below & 1 == 1;
        let join = |left: [u8; 32], right: [u8; 32]| [left, right].concat().try_into().unwrap();
        let their_pair = if right { join(level[below], path[below]) } else { join(path[below], level[below]) };
        comparison.descend(&[(join(level[below], level[below]), their_pair)]).unwrap();
    }
    let start = changed as usize * common::GROUP;
    assert_eq!((comparison.wanted(1).len(), comparison.differing()), (0, &range(start, start + common::GROUP).into()));
    assert!(bytes < 2000, "{bytes} bytes");
}
