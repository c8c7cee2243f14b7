//! The formats are bao-tree's, with chunk groups of 16 chunks: outboards and answers are equal byte for byte, and
//! each side decodes the other's. iroh-blobs speaks this format, so a difference would be a broken wire.

mod common;

use bao_tree::{
    BaoTree, BlockSize, ChunkNum, ChunkRanges,
    io::{
        BaoContentItem,
        outboard::PreOrderMemOutboard,
        sync::{DecodeResponseIter, encode_ranges_validated},
    },
};
use common::{Case, Chunks, asked_bytes};
use proptest::prelude::*;
use tree::{Decoder, RangeSet};

const BLOCK: BlockSize = BlockSize::from_chunk_log(4);

/// Both sides agree on a blob of `size` bytes, and on every one of `queries` about it.
fn check(size: usize, queries: &[Chunks]) {
    for chunks in queries {
        let ours = Case::new(size, chunks);
        let theirs = PreOrderMemOutboard::create(&ours.data, BLOCK);
        assert_eq!(ours.hashed.id.as_bytes(), theirs.root.as_bytes(), "root over {size} bytes");
        assert!(ours.hashed.outboard == theirs.data, "outboard over {size} bytes");
        check_answer(&ours, &theirs, chunks);
    }
}

fn check_answer(ours: &Case, outboard: &PreOrderMemOutboard, chunks: &Chunks) {
    let context = format!("chunks {chunks:?} of {} bytes", ours.size());
    let ranges = their_ranges(chunks);
    let mut theirs = Vec::new();
    encode_ranges_validated(&ours.data[..], outboard, &ranges, &mut theirs).unwrap();
    let answer: Vec<u8> = ours.pieces.iter().flat_map(|piece| piece.wire_bytes()).copied().collect();
    assert!(answer == theirs, "{context}: answers differ");

    let asked = asked_bytes(ours.data.len(), chunks);
    assert_eq!(we_decode(ours, &theirs), asked, "{context}");
    assert_eq!(they_decode(ours, &ranges, &answer), asked, "{context}");
}

fn we_decode(case: &Case, answer: &[u8]) -> RangeSet {
    let mut decoder = Decoder::new(case.hashed.id, case.query.clone());
    decoder.push(&case.size().to_le_bytes());
    decoder.push(answer);
    let pieces: Vec<_> = std::iter::from_fn(|| decoder.next().unwrap()).collect();
    assert!(decoder.is_finished());
    case.check_pairs(&pieces);
    case.check_bytes(&pieces)
}

fn they_decode(case: &Case, ranges: &ChunkRanges, mut answer: &[u8]) -> RangeSet {
    let tree = BaoTree::new(case.size(), BLOCK);
    let mut seen = RangeSet::new();
    for item in DecodeResponseIter::new((*case.hashed.id.as_bytes()).into(), tree, &mut answer, ranges) {
        if let BaoContentItem::Leaf(leaf) = item.unwrap() {
            let at = leaf.offset as usize..leaf.offset as usize + leaf.data.len();
            assert!(case.data[at.clone()] == leaf.data[..], "wrong bytes at {at:?}");
            seen.insert(common::range(at.start, at.end));
        }
    }
    assert!(answer.is_empty(), "they left {} bytes", answer.len());
    seen
}

fn their_ranges(chunks: &Chunks) -> ChunkRanges {
    chunks.iter().filter(|(start, end)| start < end).fold(ChunkRanges::empty(), |ranges, &(start, end)| {
        ranges
            | match end {
                u64::MAX => ChunkRanges::from(ChunkNum(start)..),
                _ => ChunkRanges::from(ChunkNum(start)..ChunkNum(end)),
            }
    })
}

/// The queries that are special for a blob of `size` bytes.
fn special_queries(size: usize) -> Vec<Chunks> {
    let (n, end) = (size.div_ceil(1024).max(1) as u64, u64::MAX);
    vec![
        vec![],
        vec![(0, end)],
        vec![(0, n)],
        vec![(0, n - 1)],
        vec![(0, 1)],
        vec![(n / 2, n / 2 + 1)],
        vec![(n - 1, n)],
        vec![(n - 1, end)],
        vec![(n, n + 1)],
        vec![(n + 5, n + 9)],
        vec![(end - 1, end)],
        vec![(0, 1), (n + 5, n + 9)],
        vec![(0, n - 1), (n + 1, n + 2), (n + 3, end)],
        vec![(n / 3, n + 3), (n + 7, n + 8), (n + 20, end)],
        vec![(3, 5), (7, 8), (15, 17), (n.saturating_sub(2), n - 1), (n, n + 1), (n + 2, n + 3)],
        vec![(0, 16), (32, 48)],
        vec![(1, 16), (16, 31), (40, 41)],
    ]
}

#[test]
fn sizes_at_the_borders_of_groups() {
    for size in
        [0, 1024, 3 * 1024, 16 * 1024, 17 * 1024, 3 * 16 * 1024, 5 * 16 * 1024].into_iter().flat_map(common::near)
    {
        check(size, &special_queries(size));
    }
}

#[test]
fn sizes_around_powers_of_two() {
    for size in (0..=21).flat_map(|k| common::near(1 << k)) {
        check(size, &special_queries(size));
    }
}

proptest! {
    #![proptest_config(common::cases(1000))]

    #[test]
    fn any_size_and_chunks((size, chunks) in common::a_size_and_chunks()) {
        check(size, &[chunks]);
    }
}
