//! What the test files share: data, sizes, queries, and what a query asks for.
#![allow(dead_code, reason = "every test file uses a part of it")]

pub(crate) mod stored;

use proptest::prelude::*;
use tree::{ByteRange, Hashed, Prover, Query, RangeSet, Verified};

pub(crate) const CHUNK: usize = 1024;
pub(crate) const GROUP: usize = 16 * 1024;

/// Ranges of chunk numbers, as [`tree::Query::chunks`] takes them: `u64::MAX` is the end.
pub(crate) type Chunks = Vec<(u64, u64)>;

/// `size` bytes that look random, so that no two chunks are alike; another `seed` gives other bytes.
pub(crate) fn data(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// `cases` random cases. A failure prints the smallest input found; its fix keeps that as a named test.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Sizes of blobs: the borders of chunks, groups, whole trees and tasks; and what is between them.
pub(crate) fn a_size() -> impl Strategy<Value = usize> {
    let edges: Vec<usize> =
        [0, CHUNK, GROUP, 2 * GROUP, 3 * GROUP, 4 * GROUP, 1 << 20].iter().flat_map(|&n: &usize| near(n)).collect();
    prop_oneof![3 => prop::sample::select(edges), 4 => 0..5 * GROUP, 2 => 0..400_000usize]
}

/// `n`, the size before it, if there is one, and the size behind it.
pub(crate) fn near(n: usize) -> impl Iterator<Item = usize> {
    n.saturating_sub(1)..=n + 1
}

/// A size, and chunks to ask for of a blob that large: inside it, at its end, across it, behind it.
pub(crate) fn a_size_and_chunks() -> impl Strategy<Value = (usize, Chunks)> {
    a_size().prop_flat_map(|size| (Just(size), some_chunks(size)))
}

pub(crate) fn some_chunks(size: usize) -> impl Strategy<Value = Chunks> {
    let last = last_chunk(size) as u64;
    let start = || prop_oneof![4 => 0..=last, 2 => last.saturating_sub(3)..last + 5, 1 => Just(u64::MAX - 1)];
    let end = prop_oneof![4 => 0..50u64, 1 => 0..2 * last + 2, 1 => Just(u64::MAX)];
    prop::collection::vec((start(), end).prop_map(|(start, len)| (start, start.saturating_add(len))), 0..7)
}

fn last_chunk(size: usize) -> usize {
    size.saturating_sub(1) / CHUNK
}

/// Whether each chunk is asked for. What is at or behind the last chunk means the last chunk.
pub(crate) fn asked(size: usize, chunks: &Chunks) -> Vec<bool> {
    let last = last_chunk(size) as u64;
    let meant = |chunk: u64, start, end| start <= chunk && chunk < end || chunk == last && start < end && end > last;
    (0..=last).map(|chunk| chunks.iter().any(|&(start, end)| meant(chunk, start, end))).collect()
}

/// The bytes of the chunks that are asked for.
pub(crate) fn asked_bytes(size: usize, chunks: &Chunks) -> RangeSet {
    let chunks = asked(size, chunks).into_iter().enumerate().filter(|&(_, asked)| asked);
    chunks.map(|(chunk, _)| range(chunk * CHUNK, ((chunk + 1) * CHUNK).min(size))).collect()
}

pub(crate) fn range(start: usize, end: usize) -> ByteRange {
    ByteRange::new(start as u64, end as u64).expect("a range in order")
}

/// A blob, a query about it, and the true answer.
pub(crate) struct Case {
    pub(crate) data: Vec<u8>,
    pub(crate) hashed: Hashed,
    pub(crate) query: Query,
    pub(crate) pieces: Vec<Verified>,
}

impl Case {
    pub(crate) fn new(size: usize, chunks: &Chunks) -> Self {
        let data = data(size as u64, size);
        let hashed = tree::hash(&data[..], size as u64).unwrap();
        let query = Query::chunks(chunks.iter().copied());
        let prover = Prover::new(hashed.id, size as u64, &data[..], &hashed.outboard[..], &query);
        let pieces = prover.map(|piece| piece.unwrap()).collect();
        Self { data, hashed, query, pieces }
    }

    pub(crate) fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// Every pair among `pieces` is the one that the outboard has at its place.
    pub(crate) fn check_pairs(&self, pieces: &[Verified]) {
        for piece in pieces {
            let Verified::Node(node) = piece else { continue };
            assert_eq!(node.blob(), self.hashed.id);
            let Some(offset) = node.outboard_offset() else { continue };
            let stored = usize::try_from(offset).ok().and_then(|offset| self.hashed.outboard.get(offset..)?.get(..64));
            assert_eq!(stored, Some(&node.pair()[..]), "pair at byte {offset} of the outboard");
        }
    }

    /// All bytes among `pieces` are true. Returns where they are; they ascend, and none comes twice.
    pub(crate) fn check_bytes(&self, pieces: &[Verified]) -> RangeSet {
        let mut seen = RangeSet::new();
        for piece in pieces {
            let Verified::Data(piece) = piece else { continue };
            let at = piece.range();
            assert_eq!((piece.blob(), piece.offset()), (self.hashed.id, at.start()));
            assert!(seen.end() <= at.start() && at.end() <= self.size(), "{at} after {seen:?}");
            assert!(self.data[at.start() as usize..at.end() as usize] == piece.bytes()[..], "wrong bytes at {at}");
            seen.insert(at);
        }
        seen
    }
}
