//! Outboards that are kept down to 64 KiB, 256 KiB or 1 MiB only: the same tree, cut off higher up.

mod common;

use std::sync::Mutex;

use bao_tree::{BlockSize, io::outboard::PreOrderMemOutboard};
use common::{
    a_size_and_chunks, range,
    stored::{SIZES, Stored, a_blob, flips},
};
use proptest::prelude::*;
use tree::{ByteRange, DamageSearch, Geometry, Grain, Prover, Query, RangeSet, hash_into};

fn a_grain() -> impl Strategy<Value = Grain> {
    prop::sample::select(&Grain::ALL[..])
}

fn outboard(data: &[u8], grain: Grain) -> (tree::BlobId, Vec<u8>) {
    let size = data.len() as u64;
    let outboard = Mutex::new(vec![0; Geometry::new(size).outboard_bytes_at(grain) as usize]);
    let id = hash_into(data, size, grain, &outboard).unwrap();
    (id, outboard.into_inner().unwrap())
}

/// `ranges` widened to whole units of `unit` bytes, and cut to the blob.
fn widened(ranges: &RangeSet, unit: u64, size: usize) -> RangeSet {
    let widen =
        |r: ByteRange| range((r.start() / unit * unit) as usize, size.min(r.end().next_multiple_of(unit) as usize));
    ranges.iter().map(widen).collect()
}

#[test]
fn outboards_are_those_of_bao_tree() {
    for (blob, size) in SIZES.into_iter().enumerate() {
        let stored = Stored::sound(blob);
        for grain in Grain::ALL {
            let (id, outboard) = outboard(stored.sound, grain);
            let theirs = PreOrderMemOutboard::create(stored.sound, BlockSize::from_chunk_log(grain.log_chunks()));
            assert_eq!((id.as_bytes(), &outboard), (theirs.root.as_bytes(), &theirs.data), "{grain:?} {size}");
        }
    }
}

/// A file whose pairs are made and written span by span: 64 MiB and more.
#[test]
fn outboards_of_several_spans() {
    let data = common::data(9, (130 << 20) + 40_001);
    for grain in [Grain::GROUP, Grain::MIB_1] {
        let (id, outboard) = outboard(&data, grain);
        let theirs = PreOrderMemOutboard::create(&data, BlockSize::from_chunk_log(grain.log_chunks()));
        assert!(id.as_bytes() == theirs.root.as_bytes() && outboard == theirs.data, "{grain:?}");
        assert_eq!(tree::blob_id(&data[..], data.len() as u64).unwrap(), id);
    }
}

proptest! {
    #![proptest_config(common::cases(300))]

    /// An answer does not tell how much of the tree is kept where it was made.
    #[test]
    fn answers_are_the_same((size, chunks) in a_size_and_chunks(), grain in a_grain()) {
        let case = common::Case::new(size, &chunks);
        let (id, outboard) = outboard(&case.data, grain);
        let prover = Prover::new(id, case.size(), &case.data[..], &outboard[..], &case.query).with_grain(grain);
        let pieces: Vec<_> = prover.map(|piece| piece.unwrap()).collect();
        prop_assert_eq!(pieces, case.pieces);
    }

    /// Damage is found in units of the grain: in data exactly there, in the outboard as ever.
    #[test]
    fn damage_to_the_grain(blob in a_blob(), grain in a_grain(), groups in flips(20)) {
        let mut stored = Stored::sound(blob);
        let (id, outboard) = outboard(stored.sound, grain);
        stored.flip(&groups);
        let damaged = widened(&stored.damaged_groups(), grain.bytes(), stored.size());
        let search = DamageSearch::new(id, stored.size() as u64, &stored, &outboard[..]).with_grain(grain);
        let found = search.run(&|_| {});
        prop_assert_eq!(&found.data, &damaged);
        prop_assert!(found.outboard.is_empty());
        // A prover yields all the rest, and nothing of that.
        let (mut proven, mut failed) = (RangeSet::new(), RangeSet::new());
        for piece in Prover::new(id, stored.size() as u64, &stored, &outboard[..], &Query::all()).with_grain(grain) {
            match piece {
                Ok(tree::Verified::Data(piece)) => {
                    let at = piece.range().start() as usize..piece.range().end() as usize;
                    prop_assert!(piece.bytes()[..] == stored.sound[at]);
                    proven.insert(piece.range());
                }
                Ok(tree::Verified::Node(_)) => {}
                Err(error) => failed.insert(error.range()),
            }
        }
        prop_assert_eq!(&failed, &damaged);
        prop_assert_eq!(proven, RangeSet::from(range(0, stored.size())).difference(&damaged));
    }

    #[test]
    fn a_bad_coarse_pair_blames_no_data(blob in a_blob(), grain in a_grain(), byte: prop::sample::Index, bits in 1..=u8::MAX) {
        let stored = Stored::sound(blob);
        let (id, mut outboard) = outboard(stored.sound, grain);
        prop_assume!(!outboard.is_empty());
        let byte = byte.index(outboard.len());
        outboard[byte] ^= bits;
        let search = DamageSearch::new(id, stored.size() as u64, &stored, &outboard[..]).with_grain(grain);
        let found = search.run(&|_| {});
        prop_assert!(found.data.is_empty());
        prop_assert!(!found.outboard.is_empty());
    }

    /// A search of a part finds what a search of all finds there, and judges little more than the part.
    #[test]
    fn searching_a_part(blob in a_blob(), groups in flips(20), from: prop::sample::Index, to: prop::sample::Index) {
        let mut stored = Stored::sound(blob);
        stored.flip(&groups);
        let (from, to) = (from.index(stored.size() + 1), to.index(stored.size() + 1));
        let part = range(from.min(to), from.max(to));
        let judged = std::sync::atomic::AtomicU64::new(0);
        let outboard = stored.stored_outboard();
        let search = DamageSearch::new(stored.hashed.id, stored.size() as u64, &stored, &outboard).within(part);
        let found = search.run(&|bytes| { judged.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed); });
        let units = widened(&part.into(), 1 << 20, stored.size());
        prop_assert_eq!(found.data, stored.damaged_groups().intersection(&units));
        prop_assert_eq!(judged.into_inner(), units.total_bytes());
    }
}
