//! Hash, outboard and answer against what the BLAKE3 paper says, written down once more as plain recursion over
//! single chunks. Slow and short, so that it can be seen to be right.

mod common;

use std::ops::Range;

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use common::{CHUNK, Case, Chunks, GROUP, a_size, a_size_and_chunks, asked, asked_bytes, range};
use proptest::prelude::*;
use tree::{BlobId, Geometry, Query, RangeSet, Verified};

/// The hash of the subtree over `data`, which starts at chunk `first`.
fn oracle_hash(data: &[u8], first: usize, is_root: bool) -> [u8; 32] {
    match (data.len() <= CHUNK, is_root) {
        (true, true) => blake3::hash(data).into(),
        (true, false) => {
            blake3::Hasher::new().set_input_offset((first * CHUNK) as u64).update(data).finalize_non_root()
        }
        (false, _) => {
            let (left, right) = oracle_pair(data, first);
            if is_root {
                merge_subtrees_root(&left, &right, Mode::Hash).into()
            } else {
                merge_subtrees_non_root(&left, &right, Mode::Hash)
            }
        }
    }
}

fn oracle_pair(data: &[u8], first: usize) -> ([u8; 32], [u8; 32]) {
    let (left, right) = data.split_at(left_len(data.len()));
    (oracle_hash(left, first, false), oracle_hash(right, first + left.len() / CHUNK, false))
}

/// The largest power of two of chunks that leaves at least one byte for the right side.
fn left_len(len: usize) -> usize {
    let mut left = CHUNK;
    while 2 * left < len {
        left *= 2;
    }
    left
}

/// The pairs of all nodes above chunk groups: a node before its left side, and that before its right side.
fn oracle_outboard(data: &[u8], first: usize, outboard: &mut Vec<u8>) {
    if data.len() > GROUP {
        let (left, right) = oracle_pair(data, first);
        outboard.extend([left, right].as_flattened());
        let (left, right) = data.split_at(left_len(data.len()));
        oracle_outboard(left, first, outboard);
        oracle_outboard(right, first + left.len() / CHUNK, outboard);
    }
}

#[derive(Debug, PartialEq)]
enum Piece {
    Pair { in_outboard: bool, pair: Vec<u8> },
    Bytes(Range<usize>),
}

/// The answer that holds the chunks which are `asked` for, of the subtree over `data` from chunk `first` on.
fn oracle_answer(data: &[u8], first: usize, asked: &[bool], answer: &mut Vec<Piece>) {
    if !asked.contains(&true) {
        return;
    }
    let all_asked = !asked.contains(&false);
    if data.len() <= CHUNK || data.len() <= GROUP && all_asked {
        return answer.push(Piece::Bytes(first * CHUNK..first * CHUNK + data.len()));
    }
    let (left, right) = oracle_pair(data, first);
    answer.push(Piece::Pair { in_outboard: data.len() > GROUP, pair: [left, right].concat() });
    let (left, right) = data.split_at(left_len(data.len()));
    let (left_asked, right_asked) = asked.split_at(left.len() / CHUNK);
    oracle_answer(left, first, left_asked, answer);
    oracle_answer(right, first + left_asked.len(), right_asked, answer);
}

fn piece(verified: &Verified) -> Piece {
    match verified {
        Verified::Node(node) => {
            Piece::Pair { in_outboard: node.outboard_offset().is_some(), pair: node.pair().to_vec() }
        }
        Verified::Data(data) => Piece::Bytes(data.offset() as usize..data.offset() as usize + data.bytes().len()),
    }
}

proptest! {
    #![proptest_config(common::cases(500))]

    #[test]
    fn hash_and_outboard(size in a_size(), seed: u64) {
        let data = common::data(seed, size);
        let hashed = tree::hash(&data[..], size as u64).unwrap();
        let mut outboard = Vec::new();
        oracle_outboard(&data, 0, &mut outboard);
        prop_assert_eq!(hashed.id, BlobId::from_bytes(oracle_hash(&data, 0, true)));
        prop_assert_eq!(hashed.id, BlobId::of(&data));
        prop_assert!(hashed.outboard == outboard);
        prop_assert_eq!(Geometry::new(size as u64).outboard_bytes(), outboard.len() as u64);
    }

    #[test]
    fn an_answer((size, chunks) in a_size_and_chunks()) {
        let case = Case::new(size, &chunks);
        let mut answer = Vec::new();
        oracle_answer(&case.data, 0, &asked(size, &chunks), &mut answer);
        prop_assert_eq!(case.pieces.iter().map(piece).collect::<Vec<_>>(), answer);
        case.check_pairs(&case.pieces);
        let seen = case.check_bytes(&case.pieces);
        prop_assert_eq!(&seen, &asked_bytes(size, &chunks));
        prop_assert_eq!(seen, case.query.resolve_bytes(size as u64));
    }

    #[test]
    fn a_slice_of_a_piece(size in 1..3 * GROUP, start in 0..4 * GROUP, len in 0..4 * GROUP) {
        let case = Case::new(size, &vec![(0, u64::MAX)]);
        let wanted = range(start, start + len);
        let mut seen = RangeSet::new();
        for piece in &case.pieces {
            let Verified::Data(piece) = piece else { continue };
            let part = piece.slice(wanted);
            prop_assert_eq!(part.range().len(), piece.range().intersection(wanted).len());
            if !part.bytes().is_empty() {
                seen.extend(case.check_bytes(&[Verified::Data(part)]).iter());
            }
        }
        prop_assert_eq!(seen, RangeSet::from(wanted.intersection(range(0, size))));
    }

    /// Queries are often made of bytes: of the chunks, or groups, that hold them, and of no more.
    #[test]
    fn queries_of_bytes(size in a_size(), ranges in prop::collection::vec((0..500_000usize, 0..20_000usize), 0..4)) {
        let ranges: RangeSet = ranges.into_iter().map(|(start, len)| range(start, start + len)).collect();
        let holders = |unit: usize| -> Chunks {
            let per_unit = (unit / CHUNK) as u64;
            let units = 0..520_000usize.div_ceil(unit) as u64;
            let held = |n: &u64| ranges.overlaps(range(*n as usize * unit, (*n as usize + 1) * unit));
            units.filter(held).map(|n| (n * per_unit, (n + 1) * per_unit)).collect()
        };
        let resolved = |query: Query| query.resolve_bytes(size as u64);
        prop_assert_eq!(resolved(Query::bytes(ranges.clone())), asked_bytes(size, &holders(CHUNK)));
        prop_assert_eq!(resolved(Query::groups(&ranges)), asked_bytes(size, &holders(GROUP)));
        let with_last: RangeSet = [Geometry::new(size as u64).last_group()].into_iter().collect();
        let and_size = resolved(Query::bytes(ranges.clone()).and_size(size as u64));
        prop_assert_eq!(and_size, asked_bytes(size, &holders(CHUNK)).union(&with_last));
    }
}
