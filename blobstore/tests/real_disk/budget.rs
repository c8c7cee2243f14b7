//! The cache keeps to its budget, and evicts what was used longest ago, and nothing that is in use.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use blobstore::{Presence, RealDisk, Sink, SmallBlob, Store, StoreError, Verdict};
use tree::{BlobId, Query, RangeSet};

use crate::{
    common::{GROUP, all, check_read, feed, groups, pieces, random, range},
    home::Home,
    refusing::{Refuse, Refusing},
};

const MIB: u64 = 1 << 20;

fn limited(limit: u64) -> Home {
    Home::new().reopen_limited(Arc::new(RealDisk), limit)
}

/// What the cache's files really take on the disk.
fn on_disk(home: &Home) -> u64 {
    home.own_files("cache").iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum()
}

fn is_here(store: &Store, bytes: &[u8]) -> bool {
    store.presence(BlobId::of(bytes)).unwrap() == Presence::Cached
}

/// Everything that the cache claims proves.
fn check_claims(store: &Store) {
    for blob in store.cached().unwrap() {
        assert!(matches!(store.verify_cached(blob, &|_| {}).unwrap(), Some(Verdict::Sound)), "{blob}");
    }
}

#[test]
fn what_was_used_longest_ago_goes_first() {
    let home = limited(16 * MIB);
    let blobs: Vec<_> = (0..40).map(|seed| random(seed, MIB as usize)).collect();
    for bytes in &blobs {
        home.cache_all(bytes);
        // The first one is used all the time.
        check_read(&home.store, &blobs[0], range(5, 6), &RangeSet::new());
        assert!(on_disk(&home) <= 16 * MIB, "{} bytes on the disk", on_disk(&home));
        assert!(home.store.cache_usage().unwrap().bytes <= 16 * MIB);
    }
    assert!(is_here(&home.store, &blobs[0]) && is_here(&home.store, &blobs[39]) && is_here(&home.store, &blobs[30]));
    assert!((1..20).all(|old| !is_here(&home.store, &blobs[old])));
    check_claims(&home.store);
    // The next start knows in which order they were used.
    home.store.note_uses().unwrap();
    let home = home.reopen_limited(Arc::new(RealDisk), 3 * MIB);
    home.store.trim(3 * MIB).unwrap();
    let left: Vec<usize> = (0..40).filter(|n| is_here(&home.store, &blobs[*n])).collect();
    assert_eq!(left, [0, 39]);
    assert_eq!(home.own_files("cache").len(), 4, "files of what is gone are gone");
}

/// Parts of a blob are evicted before others of the same: it may be larger than the cache.
#[test]
fn a_blob_larger_than_the_cache_is_read_through_it() {
    let home = limited(8 * MIB);
    let bytes = random(1, 40 * MIB as usize + 777);
    let (blob, size) = (BlobId::of(&bytes), bytes.len() as u64);
    for start in (0..size).step_by(MIB as usize) {
        let part = range(start, (start + MIB).min(size));
        let _lease = home.store.lease(blob, part.into());
        let missing = home.store.missing_from_cache(blob, size, &part.into()).unwrap();
        let mut partial = home.store.partial(blob, size).unwrap();
        feed(&mut partial, &bytes, &missing);
        partial.commit().unwrap();
        drop(partial);
        check_read(&home.store, &bytes, part, &RangeSet::new());
        assert!(on_disk(&home) <= 9 * MIB, "{} bytes on the disk", on_disk(&home));
    }
    let Presence::Partial(left) = home.store.presence(blob).unwrap() else { panic!("some of it is left") };
    assert!(left.contains(range(size - MIB, size)), "{left:?}");
    check_claims(&home.store);
}

#[test]
fn nothing_pinned_leased_or_passing_is_evicted() {
    let home = limited(2 * MIB);
    let blobs: Vec<_> = (0..4).map(|seed| random(seed, MIB as usize / 2)).collect();
    home.store.set_pinned(BlobId::of(&blobs[0]), true).unwrap();
    let passage = home.store.passage(BlobId::of(&blobs[1]));
    let lease = home.store.lease(BlobId::of(&blobs[2]), range(9, 10).into());
    blobs.iter().for_each(|bytes| home.cache_all(bytes));
    let used = home.store.cache_usage().unwrap().bytes;
    assert!((MIB..3 * MIB / 2).contains(&used), "what is pinned or passes through does not count: {used}");
    let pinned = home.store.cache_usage().unwrap().pinned;
    assert!((MIB / 2..MIB).contains(&pinned), "{pinned}");
    home.store.trim(0).unwrap();
    assert_eq!([0, 1, 2, 3].map(|n| is_here(&home.store, &blobs[n])), [true, true, true, false]);
    drop((passage, lease));
    home.store.trim(0).unwrap();
    assert_eq!([0, 1, 2, 3].map(|n| is_here(&home.store, &blobs[n])), [true, false, false, false]);
    // The pin outlives the program.
    let home = home.reopen();
    home.store.trim(0).unwrap();
    assert!(is_here(&home.store, &blobs[0]));
    home.store.set_pinned(BlobId::of(&blobs[0]), false).unwrap();
    assert_eq!(home.store.trim(0).unwrap(), 0);
    assert!(home.own_files("cache").is_empty());
}

/// However much is pinned, the others have the whole budget.
#[test]
fn pins_take_no_room_from_others() {
    let home = limited(4 * MIB);
    let blobs: Vec<_> = (0..10).map(|seed| random(seed, MIB as usize)).collect();
    let ids: Vec<_> = blobs.iter().map(|bytes| BlobId::of(bytes)).collect();
    home.store.change_pinned(&ids[..6], &[]).unwrap();
    blobs.iter().for_each(|bytes| home.cache_all(bytes));
    let here = |store: &Store| (0..10).filter(|&n| is_here(store, &blobs[n])).collect::<Vec<_>>();
    assert_eq!(here(&home.store), [0, 1, 2, 3, 4, 5, 7, 8, 9], "of four others three fit");
    let mut pinned = home.store.pinned();
    pinned.sort();
    let mut expected = ids[..6].to_vec();
    expected.sort();
    assert_eq!(pinned, expected);
    assert!(home.store.is_pinned(ids[5]) && !home.store.is_pinned(ids[6]));
    // What is no longer pinned counts, and what was read goes later.
    home.store.change_pinned(&[ids[9]], &ids[..6]).unwrap();
    assert!(home.store.cache_usage().unwrap().bytes > 8 * MIB);
    home.store.touch(ids[2], MIB);
    home.store.trim(3 * MIB / 2).unwrap();
    assert_eq!(here(&home.store), [2, 9]);
}

/// Of the setting and what was set while the program ran, the later one counts.
#[test]
fn a_limit_that_was_set() {
    let home = limited(8 * MIB);
    let blobs: Vec<_> = (0..5).map(|seed| random(seed, MIB as usize)).collect();
    blobs.iter().for_each(|bytes| home.cache_all(bytes));
    home.store.set_cache_limit(2 * MIB + MIB / 2).unwrap();
    let here = |store: &Store| blobs.iter().filter(|bytes| is_here(store, bytes)).count();
    assert_eq!((here(&home.store), home.store.cache_usage().unwrap().limit), (2, 2 * MIB + MIB / 2));
    home.cache_all(&blobs[0]);
    assert!(home.store.cache_usage().unwrap().bytes <= 2 * MIB + MIB / 2);
    let limit = |home: &Home| home.store.cache_usage().unwrap().limit;
    let home = home.reopen_limited(Arc::new(RealDisk), 8 * MIB);
    assert_eq!((limit(&home), home.store.configured_cache_limit()), (2 * MIB + MIB / 2, 8 * MIB));
    let home = home.reopen_limited(Arc::new(RealDisk), 9 * MIB);
    assert_eq!(limit(&home), 9 * MIB, "somebody changed the setting since");
    home.store.set_cache_limit(MIB).unwrap();
    home.store.set_cache_limit(9 * MIB).unwrap();
    let home = home.reopen_limited(Arc::new(RealDisk), 9 * MIB);
    assert_eq!(limit(&home), 9 * MIB);
    let home = home.reopen_limited(Arc::new(RealDisk), 8 * MIB);
    assert_eq!(limit(&home), 8 * MIB, "what was set to be the setting again, is not set");
}

/// Small blobs that came together are as if each had come alone.
#[test]
fn many_small_blobs_at_a_time() {
    let home = Home::new();
    let sizes = [0, 1, 5000, GROUP as usize, GROUP as usize + 1, 100_000, 9, 77];
    let blobs: Vec<_> = sizes.iter().zip(0..).map(|(&size, seed)| random(seed, size)).collect();
    // Of one something is there already, and one is incomplete.
    home.cache_all(&blobs[6]);
    let small = |bytes: &Vec<u8>| {
        let (blob, size) = (BlobId::of(bytes), bytes.len() as u64);
        SmallBlob { blob, size, pieces: pieces(bytes, &all(bytes.len())) }
    };
    let mut small: Vec<_> = blobs.iter().map(small).collect();
    small[7].pieces.clear();
    let kept = home.store.keep_small(small);
    assert!(kept.iter().all(Result::is_ok), "{kept:?}");
    let here = |home: &Home| blobs.iter().map(|bytes| is_here(&home.store, bytes)).collect::<Vec<_>>();
    let expected = [true, true, true, true, true, true, true, false];
    assert_eq!(here(&home), expected);
    assert_eq!(home.store.cached_count().unwrap(), (6, 0));
    for bytes in &blobs[..7] {
        check_read(&home.store, bytes, range(0, bytes.len() as u64), &RangeSet::new());
    }
    let used = home.store.cache_usage().unwrap().bytes;
    let home = home.reopen();
    assert_eq!((here(&home), home.store.cache_usage().unwrap().bytes), (expected.to_vec(), used));
    check_claims(&home.store);
    assert_eq!(home.store.trim(0).unwrap(), 0);
    assert_eq!(home.store.cached_count().unwrap(), (0, 0));
}

/// Whatever takes bytes away is told, but for evicting.
#[test]
fn losses_are_told() {
    let home = Home::new();
    let told = Arc::new(AtomicU64::new(0));
    let hearing = told.clone();
    home.store.on_loss(move || {
        hearing.fetch_add(1, Ordering::Relaxed);
    });
    let is_told = |what: &str, is_told: bool| assert_eq!(told.swap(0, Ordering::Relaxed) > 0, is_told, "{what}");
    let bytes = random(1, 100_000);
    let blob = BlobId::of(&bytes);
    home.cache_all(&bytes);
    home.store.trim(0).unwrap();
    home.cache_all(&bytes);
    is_told("cached, evicted, cached", false);
    home.store.take_cached(blob).unwrap().unwrap();
    is_told("taken", true);
    home.write("file", &bytes);
    home.link(&["file"]);
    is_told("linked", false);
    home.rot("file", &groups(bytes.len(), [0]));
    home.store.read(blob, 100_000, range(5, 6)).unwrap();
    is_told("damaged", true);
    home.store.unlink(home.root, &[b"file"]).unwrap();
    is_told("unlinked", true);
}

/// A read that has begun gets everything; one that was opened and has not begun finds less, and blames nobody.
#[test]
fn evicting_under_readers() {
    let home = Home::new();
    let bytes = random(1, 3 * MIB as usize);
    let blob = BlobId::of(&bytes);
    home.cache_all(&bytes);
    let sources = home.store.sources(blob).unwrap();
    let reading = sources[0].prover(&Query::all());
    home.store.trim(0).unwrap();
    assert!(reading.into_iter().all(|piece| piece.is_ok()));
    home.store.trim(0).unwrap();
    assert_eq!(home.store.presence(blob).unwrap(), Presence::None);
    let keep = home.store.lease(blob, range(0, 1).into());
    home.cache_all(&bytes);
    let sources = home.store.sources(blob).unwrap();
    home.store.trim(0).unwrap();
    let mut errors = 0;
    for piece in sources[0].prover(&Query::all()) {
        if let Err(error) = piece {
            errors += 1;
            home.store.report(&sources[0], &error).unwrap();
        }
    }
    assert!(errors > 0);
    drop(keep);
    assert_eq!(home.store.presence(blob).unwrap(), Presence::Partial(range(0, MIB).into()));
    check_claims(&home.store);
}

/// Readers, writers and eviction at the same time: every byte is right, and every claim proves.
#[test]
fn everybody_at_once() {
    let home = limited(3 * MIB);
    let blobs: Vec<_> = (0..6).map(|seed| random(seed, MIB as usize + 5 * GROUP as usize)).collect();
    thread::scope(|scope| {
        for (n, bytes) in blobs.iter().enumerate() {
            let store = &home.store;
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(n as u64);
                let (blob, size) = (BlobId::of(bytes), bytes.len() as u64);
                for _ in 0..60 {
                    let start = rng.u64(0..size);
                    let part = range(start, rng.u64(start..=size.min(start + MIB / 2)));
                    let _lease = store.lease(blob, part.into());
                    let missing = store.missing_from_cache(blob, size, &part.into()).unwrap();
                    let mut partial = store.partial(blob, size).unwrap();
                    feed(&mut partial, bytes, &missing);
                    partial.commit().unwrap();
                    check_read(store, bytes, part, &RangeSet::new());
                }
            });
        }
    });
    check_claims(&home.store);
    assert!(home.store.trim(3 * MIB).unwrap() <= 3 * MIB);
    assert!(on_disk(&home) <= 3 * MIB);
}

#[test]
fn a_full_disk_evicts_once_and_then_fails() {
    let disk = Refusing::new();
    let home = Home::new().reopen_on(Arc::new(disk.clone()));
    let (old, new) = (random(1, 2 * MIB as usize), random(2, MIB as usize));
    home.cache_all(&old);
    disk.set(Refuse::RoomUntilFreed);
    home.cache_all(&new);
    assert!(is_here(&home.store, &new) && !is_here(&home.store, &old));
    check_claims(&home.store);
    disk.set(Refuse::Room);
    let more = random(3, MIB as usize);
    let mut partial = home.store.partial(BlobId::of(&more), more.len() as u64).unwrap();
    let piece = crate::common::pieces(&more, &groups(more.len(), [0])).pop().unwrap();
    assert!(matches!(partial.write(&[piece]), Err(StoreError::CacheFull { .. })));
    partial.commit().unwrap();
    drop(partial);
    disk.set(Refuse::Nothing);
    check_claims(&home.store);
    assert_eq!(home.store.presence(BlobId::of(&more)).unwrap(), Presence::None);
    home.cache_all(&more);
    check_read(&home.store, &more, range(0, MIB), &RangeSet::new());
}

/// Small blobs are rows: no files, and counted and evicted all the same.
#[test]
fn small_blobs_are_rows() {
    for size in [1, 1000, GROUP as usize] {
        let home = Home::new();
        let (bytes, other) = (random(1, size), random(2, size));
        home.cache_all(&bytes);
        home.cache_all(&other);
        assert!(home.own_files("cache").is_empty());
        assert_eq!(home.store.cache_usage().unwrap().bytes, 2 * size as u64);
        let home = home.reopen();
        check_read(&home.store, &bytes, range(0, size as u64), &RangeSet::new());
        check_claims(&home.store);
        assert_eq!(home.store.trim(size as u64).unwrap(), size as u64);
        assert!(is_here(&home.store, &bytes) && !is_here(&home.store, &other));
        let mut partial = home.store.partial(BlobId::of(&other), size as u64).unwrap();
        feed(&mut partial, &other, &all(size));
        drop(partial);
        assert_eq!(home.store.presence(BlobId::of(&other)).unwrap(), Presence::None, "not committed");
    }
}
