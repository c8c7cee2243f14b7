//! What was linked or cached comes back as it was, any range of it.

use blobstore::Presence;
use tree::{BlobId, RangeSet};

use crate::{
    common::{GROUP, LARGE, all, check_read, groups, random, range},
    home::Home,
};

/// Sizes at the borders of chunks, groups and of the outboards' two places, in place and cached: reads of the
/// whole, of odd ranges, and of what lies across or behind the end.
#[test]
fn every_range_reads_as_it_was_written() {
    let group = GROUP as usize;
    let sizes = [1, 1023, 1025, group - 1, group, group + 1, 3 * group + 5, 256 * group, 257 * group + 1, LARGE];
    let blobs: Vec<Vec<u8>> = sizes.iter().map(|&size| random(size as u64, size)).collect();
    let in_place = Home::new();
    let names: Vec<String> = sizes.iter().map(|size| format!("of {size} bytes")).collect();
    for (name, bytes) in names.iter().zip(&blobs) {
        in_place.write(name, bytes);
    }
    in_place.link(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let cached = Home::new();
    for bytes in &blobs {
        cached.cache_all(bytes);
        assert_eq!(in_place.store.presence(BlobId::of(bytes)).unwrap(), Presence::InPlace);
        assert_eq!(cached.store.presence(BlobId::of(bytes)).unwrap(), Presence::Cached);
    }
    for (seed, bytes) in blobs.iter().enumerate() {
        println!("seed {seed}, {} bytes", bytes.len());
        let (mut rng, size) = (fastrand::Rng::with_seed(seed as u64), bytes.len() as u64);
        for home in [&in_place, &cached] {
            let check = |start, end| check_read(&home.store, bytes, range(start, end), &RangeSet::new());
            check(0, size);
            check(0, 0);
            check(size - 1, size + 1);
            check(size, size + GROUP);
            check(size + 9 * GROUP, u64::MAX);
            for _ in 0..20 {
                let start = rng.u64(..size);
                check(start, start + rng.u64(..3 * GROUP));
            }
        }
    }
}

/// The empty blob is everywhere, and needs no file.
#[test]
fn the_empty_blob_is_always_here() {
    let home = Home::new();
    check_read(&home.store, b"", range(0, 100), &RangeSet::new());
    assert_eq!(home.store.presence(BlobId::EMPTY).unwrap(), Presence::Cached);
    let sources = home.store.sources(BlobId::EMPTY).unwrap();
    let proof: Vec<_> = sources[0].prover(&tree::Query::all()).collect();
    assert!(matches!(&proof[..], [Ok(tree::Verified::Data(piece))] if piece.bytes().is_empty()), "{proof:?}");
    assert!(home.store.missing_from_cache(BlobId::EMPTY, 0, &all(0)).unwrap().is_empty());

    home.put("empty", b"");
    assert!(matches!(home.verify("empty"), blobstore::Verdict::Sound));
    assert_eq!(home.store.presence(BlobId::EMPTY).unwrap(), Presence::InPlace);
    home.store.unlink(home.root, &[b"empty"]).unwrap();
    check_read(&home.store, b"", range(0, 100), &RangeSet::new());
}

/// A size is a peer's claim: with a wrong one nothing comes, and nothing is held against our copy.
#[test]
fn a_wrong_size_reads_nothing() {
    let (home, bytes) = (Home::new(), random(1, 50_000));
    home.put("file", &bytes);
    for size in [49_999, 50_001, 1, 1 << 40] {
        let outcome = home.store.read(BlobId::of(&bytes), size, range(0, 1)).unwrap();
        assert!(outcome.pieces.is_empty());
        assert_eq!(outcome.missing, groups(size as usize, [0]));
    }
    assert!(home.damaged("file").is_empty());
}

/// A cached blob reads as far as it is there.
#[test]
fn what_is_cached_in_part_reads_in_part() {
    let (home, bytes) = (Home::new(), random(2, 10 * GROUP as usize + 77));
    let here = groups(bytes.len(), [0, 3, 4, 10]);
    home.cache(&bytes, &here);
    assert_eq!(home.store.presence(BlobId::of(&bytes)).unwrap(), Presence::Partial(here.clone()));
    check_read(&home.store, &bytes, range(0, bytes.len() as u64), &all(bytes.len()).difference(&here));
    check_read(&home.store, &bytes, range(3 * GROUP + 1, 5 * GROUP - 1), &RangeSet::new());
    check_read(&home.store, &bytes, range(4 * GROUP, 5 * GROUP + 1), &groups(bytes.len(), [5]));
}
