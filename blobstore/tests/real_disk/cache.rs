//! Blobs coming into the cache: pieces in any order, over several starts, and from peers who lie.

use std::{collections::BTreeSet, fs};

use blobstore::{CacheDirs, Partial, Presence, Sink, StoreError, Verdict};
use tree::{BlobId, RangeSet, Verified};

use crate::{
    common::{GROUP, LARGE, all, check_read, feed, group_count, groups, pieces, pieces_claiming, random, range},
    home::Home,
};

fn write_all(partial: &mut Partial, pieces: Vec<Verified>) {
    pieces.chunks(1).for_each(|piece| partial.write(piece).unwrap());
}

/// Groups in any order, several commits, a restart between: what was committed is here, and nothing else; in the
/// end it is the blob, in a file that is given away.
#[test]
fn a_blob_arrives_in_any_order_and_over_restarts() {
    for (seed, size) in [1, GROUP as usize + 1, 1_000_000, LARGE].into_iter().enumerate() {
        println!("seed {seed}, {size} bytes");
        let mut rng = fastrand::Rng::with_seed(seed as u64);
        let bytes = random(seed as u64, size);
        let (blob, whole) = (BlobId::of(&bytes), range(0, size as u64));
        let mut numbers: Vec<u64> = (0..group_count(size)).collect();
        rng.shuffle(&mut numbers);
        let (mut home, mut here) = (Home::new(), RangeSet::new());
        for part in numbers.chunks(numbers.len().div_ceil(6)) {
            assert!(home.store.take_cached(blob).unwrap().is_none(), "it is not complete");
            let mut partial = home.store.partial(blob, size as u64).unwrap();
            let part = groups(size, part.iter().copied());
            feed(&mut partial, &bytes, &part);
            assert_eq!(
                home.store.missing_from_cache(blob, size as u64, &all(size)).unwrap(),
                all(size).difference(&here)
            );
            partial.commit().unwrap();
            here = here.union(&part);
            assert_eq!(
                home.store.missing_from_cache(blob, size as u64, &all(size)).unwrap(),
                all(size).difference(&here)
            );
            feed(&mut partial, &bytes, &all(size));
            drop(partial);
            home = home.reopen();
            check_read(&home.store, &bytes, whole, &all(size).difference(&here));
            assert!(matches!(home.store.verify_cached(blob, &|_| {}).unwrap(), Some(Verdict::Sound)));
        }
        let taken = home.store.take_cached(blob).unwrap().expect("it is complete");
        assert!(fs::read(&taken).unwrap() == bytes, "the file is not the blob");
        assert_eq!(home.own_files("cache"), std::slice::from_ref(&taken));
        assert!(home.store.cached().unwrap().is_empty() && home.store.take_cached(blob).unwrap().is_none());
        check_read(&home.store, &bytes, whole, &all(size));
        let home = home.reopen();
        assert!(home.own_files("cache").is_empty(), "nobody took {taken:?}, and it is still there");
    }
}

/// What is for later may be written past the page cache, beside what is not, and what was read meanwhile is in memory.
#[test]
fn a_long_blob_for_later_is_the_same_blob() {
    let size = (64 << 20) + 5000;
    let (home, bytes) = (Home::new(), random(9, size));
    let (blob, whole) = (BlobId::of(&bytes), range(0, size as u64));
    let mut partial = home.store.partial(blob, size as u64).unwrap().for_later(true);
    let mut rng = fastrand::Rng::with_seed(9);
    let mut parts: Vec<Vec<u64>> = Vec::new();
    let mut left: Vec<u64> = (0..group_count(size)).collect();
    while !left.is_empty() {
        parts.push(left.drain(..rng.usize(1..100).min(left.len())).collect());
    }
    rng.shuffle(&mut parts);
    let mut missing = all(size);
    for (number, part) in parts.into_iter().enumerate() {
        let part = groups(size, part);
        partial.write(&pieces(&bytes, &part)).unwrap();
        missing = missing.difference(&part);
        if number % 20 == 0 {
            partial.commit().unwrap();
            check_read(&home.store, &bytes, whole, &missing);
        }
    }
    partial.commit().unwrap();
    drop(partial);
    check_read(&home.store, &bytes, whole, &RangeSet::new());
    let home = home.reopen();
    let taken = home.store.take_cached(blob).unwrap().expect("it is complete");
    assert!(fs::read(taken).unwrap() == bytes, "the file is not the blob");
}

/// Whoever else is bringing a blob writes nothing more to its file once that was given away.
#[test]
fn a_file_that_was_given_away_is_written_to_by_nobody() {
    let (bytes, home) = (random(7, LARGE), Home::new());
    let (blob, size) = (BlobId::of(&bytes), bytes.len() as u64);
    let (mut one, mut other) = (home.store.partial(blob, size).unwrap(), home.store.partial(blob, size).unwrap());
    feed(&mut one, &bytes, &all(LARGE));
    one.commit().unwrap();
    feed(&mut other, &bytes, &groups(LARGE, [0]));
    let taken = home.store.take_cached(blob).unwrap().expect("it is complete");
    fs::write(&taken, b"somebody's own by now").unwrap();
    let modified = fs::metadata(&taken).unwrap().modified().unwrap();
    feed(&mut other, &bytes, &all(LARGE));
    other.commit().unwrap();
    assert_eq!(fs::read(&taken).unwrap(), b"somebody's own by now");
    assert_eq!(fs::metadata(&taken).unwrap().modified().unwrap(), modified);
    assert!(home.store.cached_ranges(blob).unwrap().is_empty());
    // Who comes later begins anew.
    fs::remove_file(&taken).unwrap();
    drop((one, other));
    let mut partial = home.store.partial(blob, size).unwrap();
    feed(&mut partial, &bytes, &all(LARGE));
    partial.commit().unwrap();
    assert!(fs::read(home.store.take_cached(blob).unwrap().unwrap()).unwrap() == bytes);
}

/// What was never committed is not here, and its files are gone after the next start.
#[test]
fn uncommitted_pieces_leave_nothing() {
    let (home, bytes) = (Home::new(), random(1, 100_000));
    let mut partial = home.store.partial(BlobId::of(&bytes), 100_000).unwrap();
    feed(&mut partial, &bytes, &all(bytes.len()));
    assert_eq!(home.store.presence(BlobId::of(&bytes)).unwrap(), Presence::None);
    check_read(&home.store, &bytes, range(0, 100_000), &all(bytes.len()));
    drop(partial);
    assert!(home.reopen().own_files("cache").is_empty());
}

/// Parts of a chunk group prove nothing about the rest of it.
#[test]
fn parts_of_a_group_do_not_count() {
    let (home, bytes) = (Home::new(), random(1, 3 * GROUP as usize));
    let mut partial = home.store.partial(BlobId::of(&bytes), bytes.len() as u64).unwrap();
    let part = pieces(&bytes, &all(bytes.len())).into_iter().map(|piece| match piece {
        Verified::Data(data) => Verified::Data(data.slice(range(1000, 2 * GROUP + 5))),
        node => node,
    });
    partial.write(&part.collect::<Vec<_>>()).unwrap();
    partial.commit().unwrap();
    let missing = groups(bytes.len(), [0, 2]);
    assert_eq!(
        home.store.missing_from_cache(BlobId::of(&bytes), bytes.len() as u64, &all(bytes.len())).unwrap(),
        missing
    );
    check_read(&home.store, &bytes, range(0, bytes.len() as u64), &missing);
}

#[test]
fn pieces_of_another_blob_are_refused() {
    let (home, bytes, other) = (Home::new(), random(1, 100_000), random(2, 100_000));
    let mut partial = home.store.partial(BlobId::of(&bytes), 100_000).unwrap();
    let mut mixed = pieces(&bytes, &all(bytes.len()));
    for piece in pieces(&other, &all(other.len())) {
        mixed.push(piece);
        assert!(matches!(partial.write(&mixed), Err(StoreError::ForeignPiece { .. })));
        mixed.pop();
    }
    partial.commit().unwrap();
    assert_eq!(home.store.cached_ranges(BlobId::of(&bytes)).unwrap(), RangeSet::new());
    feed(&mut partial, &bytes, &all(bytes.len()));
    partial.commit().unwrap();
    check_read(&home.store, &bytes, range(0, 100_000), &RangeSet::new());
}

/// What a fetch must bring: the groups asked for that are not here, and the last one as long as it is not.
#[test]
fn the_last_group_is_wanted_until_it_proves_the_size() {
    let (home, bytes) = (Home::new(), random(1, 10 * GROUP as usize + 5));
    let (blob, size) = (BlobId::of(&bytes), bytes.len());
    let check = |asked: &RangeSet, expect: RangeSet| {
        assert_eq!(home.store.missing_from_cache(blob, size as u64, asked).unwrap(), expect, "asked for {asked:?}");
    };
    check(&RangeSet::new(), RangeSet::new());
    check(&range(GROUP + 7, GROUP + 8).into(), groups(size, [1, 10]));
    home.cache(&bytes, &groups(size, [1, 4]));
    check(&range(GROUP + 7, GROUP + 8).into(), groups(size, [10]));
    check(&range(0, 5 * GROUP).into(), groups(size, [0, 2, 3, 10]));
    home.cache(&bytes, &groups(size, [10]));
    check(&range(GROUP + 7, GROUP + 8).into(), RangeSet::new());
    check(&all(size), groups(size, [0, 2, 3, 5, 6, 7, 8, 9]));
    let longer = size as u64 + 1;
    let missing = home.store.missing_from_cache(blob, longer, &range(0, 1).into()).unwrap();
    assert_eq!(missing, groups(longer as usize, [0, 10]), "nothing that is here counts for another size");
}

/// A peer may claim a wrong size, and its pieces may prove up to the last group: the right size begins anew, and
/// once a size is proven no other is taken.
#[test]
fn peers_who_disagree_on_the_size_do_no_harm() {
    let (home, bytes) = (Home::new(), random(1, 2 * GROUP as usize + 500));
    let (blob, size, claimed) = (BlobId::of(&bytes), bytes.len(), bytes.len() as u64 + 9000);
    let first = groups(size, [0, 1]);
    let mut lied = home.store.partial(blob, claimed).unwrap();
    write_all(&mut lied, pieces_claiming(&bytes, claimed, &first));
    lied.commit().unwrap();
    assert!(home.store.take_cached(blob).unwrap().is_none());
    assert_eq!(home.store.missing_from_cache(blob, size as u64, &all(size)).unwrap(), all(size));
    drop(lied);

    home.cache(&bytes, &groups(size, [2]));
    assert_eq!(home.store.missing_from_cache(blob, size as u64, &all(size)).unwrap(), first);
    check_read(&home.store, &bytes, range(0, size as u64), &first);
    for wrong in [claimed, 0, 1, u64::MAX] {
        assert!(matches!(home.store.partial(blob, wrong), Err(StoreError::ForeignPiece { .. })));
    }
    home.cache(&bytes, &first);
    assert!(fs::read(home.store.take_cached(blob).unwrap().unwrap()).unwrap() == bytes);
}

/// Pieces beyond the end that was claimed to be the blob's are refused.
#[test]
fn nothing_is_written_behind_the_end() {
    let (home, bytes) = (Home::new(), random(1, 5 * GROUP as usize));
    let mut partial = home.store.partial(BlobId::of(&bytes), 2 * GROUP).unwrap();
    let refused = pieces(&bytes, &all(bytes.len()))
        .into_iter()
        .filter(|piece| partial.write(std::slice::from_ref(piece)).is_err());
    assert_eq!(refused.count(), 3 + 3, "three groups and three pairs belong to no blob of two groups");
    assert_eq!(fs::metadata(home.own_file("cache", BlobId::of(&bytes), "data")).unwrap().len(), 2 * GROUP);
}

/// Somebody empties the cache behind our back: what was in it is not claimed any more once the blob comes again.
#[test]
fn a_blob_whose_files_are_gone_is_begun_anew() {
    type Harm = fn(std::path::PathBuf);
    let harms: [(&str, Harm); 3] = [
        ("data", |path| fs::remove_file(path).unwrap()),
        ("obao4", |path| fs::remove_file(path).unwrap()),
        ("data", |path| fs::File::options().write(true).open(path).unwrap().set_len(GROUP).unwrap()),
    ];
    for (number, (file, harm)) in harms.iter().enumerate() {
        println!("harm {number}");
        let (home, bytes) = (Home::new(), random(1, 5 * GROUP as usize));
        let (blob, size) = (BlobId::of(&bytes), bytes.len());
        home.cache(&bytes, &groups(size, [0, 1, 4]));
        harm(home.own_file("cache", blob, file));
        home.cache(&bytes, &groups(size, [2]));
        assert_eq!(home.store.missing_from_cache(blob, size as u64, &all(size)).unwrap(), groups(size, [0, 1, 3, 4]));
        assert!(matches!(home.store.verify_cached(blob, &|_| {}).unwrap(), Some(Verdict::Sound)));
    }
}

/// Whoever cleans up deletes some of the cache's files, or all of them, while it is in use: just what was in them is forgotten.
#[test]
fn what_others_delete_from_the_cache_is_forgotten() {
    let (home, size) = (Home::new(), 100_000);
    let all_bytes: Vec<Vec<u8>> = (0..20).map(|seed| random(seed, if seed == 0 { 500 } else { size })).collect();
    let cache = |bytes: &Vec<u8>| home.cache_all(bytes);
    all_bytes.iter().for_each(cache);
    let mut seen = CacheDirs::default();
    assert_eq!(home.store.forget_lost(&mut seen).unwrap(), 0);
    let is_here = |bytes: &Vec<u8>| home.store.presence(BlobId::of(bytes)).unwrap() == Presence::Cached;
    // One of either kind of file.
    let files = home.own_files("cache");
    let data: Vec<_> = files.iter().filter(|path| path.extension().unwrap() == "data").collect();
    fs::remove_file(data[3]).unwrap();
    fs::remove_file(data[7].with_extension("obao4")).unwrap();
    assert_eq!(home.store.forget_lost(&mut seen).unwrap(), 2);
    assert_eq!(home.store.forget_lost(&mut seen).unwrap(), 0);
    assert_eq!(all_bytes.iter().filter(|bytes| is_here(bytes)).count(), 18);
    let lost: Vec<_> = all_bytes.iter().filter(|bytes| !is_here(bytes)).collect();
    lost.into_iter().for_each(cache);
    assert!(all_bytes.iter().all(is_here));
    // Before any file was seen there, the disk may be off.
    let away = home.own_files("cache")[0].parent().unwrap().parent().unwrap().with_extension("away");
    let cache_dir = away.with_extension("");
    fs::rename(&cache_dir, &away).unwrap();
    assert_eq!(home.store.forget_lost(&mut CacheDirs::default()).unwrap(), 0);
    fs::rename(&away, &cache_dir).unwrap();
    assert!(all_bytes.iter().all(is_here));
    let dirs: BTreeSet<_> = home.own_files("cache").iter().map(|path| path.parent().unwrap().to_owned()).collect();
    dirs.into_iter().for_each(|dir| fs::remove_dir_all(dir).unwrap());
    assert_eq!(home.store.forget_lost(&mut seen).unwrap(), 19);
    assert!(is_here(&all_bytes[0]), "it is a row");
    assert_eq!(all_bytes.iter().filter(|bytes| is_here(bytes)).count(), 1);
    all_bytes.iter().for_each(cache);
    let home = home.reopen();
    for bytes in &all_bytes {
        check_read(&home.store, bytes, range(0, bytes.len() as u64), &RangeSet::new());
    }
}

/// A fetch of `claimed` bytes is still running when the blob's files go away: it must not claim what went with them.
fn check_commit_after(claimed: u64, bytes: &[u8], go_away: impl Fn(&Home)) {
    let (home, blob) = (Home::new(), BlobId::of(bytes));
    let mut slow = home.store.partial(blob, claimed).unwrap();
    write_all(&mut slow, pieces_claiming(bytes, claimed, &groups(bytes.len(), [0])));
    slow.commit().unwrap();
    write_all(&mut slow, pieces_claiming(bytes, claimed, &groups(bytes.len(), [1])));
    go_away(&home);
    let _refused_or_not = slow.commit();
    let verdict = home.store.verify_cached(blob, &|_| {}).unwrap();
    assert!(matches!(verdict, None | Some(Verdict::Sound)), "{verdict:?}");
}

#[test]
fn a_commit_after_the_blob_was_taken_claims_nothing() {
    let bytes = random(1, 2 * GROUP as usize + 500);
    check_commit_after(bytes.len() as u64, &bytes, |home| {
        home.cache_all(&bytes);
        fs::remove_file(home.store.take_cached(BlobId::of(&bytes)).unwrap().unwrap()).unwrap();
    });
}

#[test]
fn a_commit_after_the_blob_was_begun_anew_claims_nothing() {
    let bytes = random(1, 2 * GROUP as usize + 500);
    check_commit_after(bytes.len() as u64 + 9000, &bytes, |home| home.cache(&bytes, &groups(bytes.len(), [2])));
}
