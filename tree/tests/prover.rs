//! Reading what is here: what is sound is read, proven, around all that is damaged; and cheaply.

mod common;

use std::{io, sync::Mutex};

use common::{
    Chunks, GROUP, a_size_and_chunks, asked_bytes, range, some_chunks,
    stored::{SIZES, Stored, a_blob, flips},
};
use proptest::{prelude::*, sample::Index};
use tree::{ByteRange, Geometry, ProveError, Prover, Query, RangeSet, ReadAt, Verified};

/// The prover blames the damaged groups and what is below wrong pairs, and yields all that is left.
fn check(stored: &Stored, chunks: &Chunks) {
    let query = Query::chunks(chunks.iter().copied());
    let asked = asked_bytes(stored.size(), chunks);
    let prover = Prover::new(stored.hashed.id, stored.size() as u64, stored, stored.stored_outboard(), &query);
    let (mut got, mut blamed, mut end) = (RangeSet::new(), RangeSet::new(), 0);
    for piece in prover {
        let at = match &piece {
            Ok(Verified::Node(_)) => continue,
            Ok(Verified::Data(piece)) => {
                let at = piece.range();
                assert!(stored.sound[at.start() as usize..at.end() as usize] == piece.bytes()[..], "wrong at {at}");
                got.insert(at);
                at
            }
            Err(error) => {
                let at = error.range();
                let unreadable = stored.unreadable_groups.contains(&(at.start() as usize / GROUP));
                match error {
                    ProveError::Outboard { .. } => assert!(stored.below_wrong_pairs().contains(at)),
                    ProveError::Data { .. } => assert!(stored.damaged_groups().contains(at) && !unreadable),
                    ProveError::Read { .. } => assert!(unreadable),
                }
                blamed.insert(at);
                at
            }
        };
        assert!(end <= at.start(), "{at} comes after {end}");
        end = at.end();
    }
    let missing = stored.damaged_groups().union(&stored.below_wrong_pairs()).intersection(&asked);
    assert_eq!(blamed.intersection(&asked), missing, "blamed");
    assert_eq!(got, asked.difference(&missing), "read");
}

proptest! {
    #![proptest_config(common::cases(500))]

    #[test]
    fn reading_around_damage(
        (blob, chunks) in a_blob().prop_flat_map(|blob| (Just(blob), some_chunks(SIZES[blob]))),
        whole: bool,
        flips in flips(50),
        bad in prop::collection::vec(any::<Index>(), 0..4),
        pairs in prop::option::of(flips(4)),
    ) {
        let mut stored = Stored::sound(blob);
        stored.flip(&flips);
        stored.make_groups_unreadable(&bad);
        stored.flip_pairs(pairs.as_deref().unwrap_or_default());
        check(&stored, &if whole { vec![(0, u64::MAX)] } else { chunks });
    }

    #[test]
    fn only_groups_that_are_asked_for_are_read((size, chunks) in a_size_and_chunks()) {
        let groups = Geometry::new(size as u64).round_out_all(&asked_bytes(size, &chunks));
        let reads = reads(size, &chunks);
        prop_assert!(reads.iter().all(|&read| groups.contains(read)), "{reads:?} where {groups:?} is asked for");
    }
}

/// Remembers what was read of it.
struct Recorder {
    data: Vec<u8>,
    reads: Mutex<Vec<ByteRange>>,
}

impl ReadAt for Recorder {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.lock().unwrap().push(range(offset as usize, offset as usize + buf.len()));
        self.data.read_exact_at(buf, offset)
    }
}

/// What is read to prove `chunks` of a sound blob.
fn reads(size: usize, chunks: &Chunks) -> Vec<ByteRange> {
    let recorder = Recorder { data: common::data(size as u64, size), reads: Mutex::default() };
    let hashed = tree::hash(&recorder.data[..], size as u64).unwrap();
    let query = Query::chunks(chunks.iter().copied());
    assert!(Prover::new(hashed.id, size as u64, &recorder, &hashed.outboard[..], &query).all(|piece| piece.is_ok()));
    recorder.reads.into_inner().unwrap()
}

#[test]
fn a_whole_blob_is_read_once_and_in_large_pieces() {
    for size in SIZES {
        let reads = reads(size, &vec![(0, u64::MAX)]);
        assert_eq!(reads.iter().map(|read| read.len()).sum::<u64>(), size as u64);
        assert!(reads.len() <= size.div_ceil(1 << 20), "{size} bytes: {reads:?}");
    }
}

/// The pairs before the cut are there, and prove the bytes whose pairs are all before it.
#[test]
fn reading_below_a_cut_outboard() {
    let mut stored = Stored::sound(7);
    stored.outboard.truncate(stored.outboard.len() - 1);
    check(&stored, &vec![(0, u64::MAX)]);
}

/// One bad sector of an outboard must not hide its neighbours.
#[test]
fn reading_below_an_unreadable_pair() {
    let mut stored = Stored::sound(7);
    stored.unreadable_pairs = vec![10];
    check(&stored, &vec![(0, u64::MAX)]);
}
