//! Rot: the bytes changed, and nothing says so but the hashes. The damaged groups, and only those, are put under
//! quarantine and looked for elsewhere.

use std::{fs, os::unix::fs::PermissionsExt};

use blobstore::{Presence, Verdict};
use tree::{BlobId, Drift, Geometry, RangeSet};

use crate::{
    common::{GROUP, LARGE, all, check_read, group_count, groups, random, range},
    home::{Home, assert_damaged, flip_own, let_the_clock_tick},
};

/// Some groups of a blob, at random: `one_in` says how many.
fn some_groups(rng: &mut fastrand::Rng, size: usize, one_in: u32) -> RangeSet {
    groups(size, (0..group_count(size)).filter(|_| rng.u32(..one_in) == 0).collect::<Vec<_>>())
}

/// Random rot, random reads: what was read of the rot is quarantined, no more and no less, and survives a restart.
#[test]
fn reads_quarantine_exactly_the_rot_that_they_meet() {
    for seed in 0..12 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = if seed == 0 { LARGE } else { rng.usize(1..40 * GROUP as usize) };
        let (home, bytes) = (Home::new(), random(seed, size));
        home.put("file", &bytes);
        let rot = some_groups(&mut rng, size, 4);
        home.rot("file", &rot);
        let mut met = RangeSet::new();
        for _ in 0..4 {
            let start = rng.u64(..size as u64);
            let asked = range(start, start + rng.u64(1..8 * GROUP));
            let touched = Geometry::new(size as u64).round_out(asked);
            let missing = rot.intersection(&touched.into());
            check_read(&home.store, &bytes, asked, &missing);
            met = met.union(&missing);
            assert_eq!(home.damaged("file"), met);
        }
        check_read(&home.store, &bytes, range(0, size as u64), &rot);
        let home = home.reopen();
        assert_eq!(home.damaged("file"), rot);
        let expected = if rot.is_empty() { Presence::InPlace } else { Presence::Partial(all(size).difference(&rot)) };
        assert_eq!(home.store.presence(BlobId::of(&bytes)).unwrap(), expected);
    }
}

/// Quarantined groups are not offered, though the bytes may have come back: only verify lifts a quarantine.
#[test]
fn quarantine_stays_until_verify_lifts_it() {
    let (home, bytes) = (Home::new(), random(1, 200_000));
    home.put("file", &bytes);
    let rot = groups(bytes.len(), [2, 12]);
    home.rot("file", &rot);
    check_read(&home.store, &bytes, range(0, 200_000), &rot);
    home.rot("file", &rot);
    check_read(&home.store, &bytes, range(0, 200_000), &rot);
    assert_eq!(*home.store.sources(BlobId::of(&bytes)).unwrap()[0].available(), all(200_000).difference(&rot));
    assert!(matches!(home.verify("file"), Verdict::Sound));
    check_read(&home.store, &bytes, range(0, 200_000), &RangeSet::new());
}

/// Two copies that rotted in different groups give the whole blob: two files, or a file and the cache.
#[test]
fn two_damaged_copies_make_one_sound_blob() {
    for (size, cached) in [(300_000, false), (300_000, true), (LARGE, false), (LARGE, true)] {
        println!("{size} bytes, the other copy cached: {cached}");
        let (home, bytes) = (Home::new(), random(size as u64, size));
        let whole = range(0, size as u64);
        let (first, second, both) = (groups(size, [0, 7]), groups(size, [3, 18]), groups(size, [5]));
        home.put("a", &bytes);
        home.rot("a", &first);
        if cached {
            home.cache_all(&bytes);
            for damaged in second.iter() {
                flip_own(home.own_file("cache", BlobId::of(&bytes), "data"), damaged.start() + 5);
            }
        } else {
            home.put("b", &bytes);
            home.rot("b", &second);
        }
        check_read(&home.store, &bytes, whole, &RangeSet::new());
        assert_eq!(home.damaged("a"), first);

        home.rot("a", &both);
        if cached {
            flip_own(home.own_file("cache", BlobId::of(&bytes), "data"), both.end() - 1);
        } else {
            home.rot("b", &both);
        }
        check_read(&home.store, &bytes, whole, &both);
        assert_eq!(home.damaged("a"), first.union(&both));
        if !cached {
            assert_damaged(&home.verify("b"), &second.union(&both), &RangeSet::new());
        }
        let cache_lacks = home.store.missing_from_cache(BlobId::of(&bytes), size as u64, &all(size)).unwrap();
        // Only what the file could not give was read from the cache, and so only that was found out.
        assert_eq!(cache_lacks, if cached { both } else { all(size) });
    }
}

/// A cached blob forgets what rotted, gets it anew, and is whole again.
#[test]
fn rot_in_the_cache_is_fetched_anew() {
    for (file, offset) in [("data", 5 * GROUP + 9), ("obao4", 64 * 3 + 1), ("obao4", 0)] {
        println!("{file} at {offset}");
        let (home, bytes) = (Home::new(), random(3, 12 * GROUP as usize + 1));
        let (blob, size) = (BlobId::of(&bytes), bytes.len());
        home.cache_all(&bytes);
        assert!(matches!(home.store.verify_cached(blob, &|_| {}).unwrap(), Some(Verdict::Sound)));
        flip_own(home.own_file("cache", blob, file), offset);
        let Some(Verdict::Damaged { data, outboard, unreadable: None }) =
            home.store.verify_cached(blob, &|_| {}).unwrap()
        else {
            panic!("the damage was not found");
        };
        let found = data.union(&outboard);
        assert_eq!(data.is_empty(), file == "obao4");
        assert_eq!(outboard.is_empty(), file == "data");
        assert_eq!(home.store.missing_from_cache(blob, size as u64, &all(size)).unwrap(), found);
        check_read(&home.store, &bytes, range(0, size as u64), &found);
        home.cache(&bytes, &found);
        assert!(matches!(home.store.verify_cached(blob, &|_| {}).unwrap(), Some(Verdict::Sound)));
        assert_eq!(home.store.presence(blob).unwrap(), Presence::Cached);
    }
}

/// A read, too, notices rot in the cache, and what is gone from there altogether.
#[test]
fn reads_notice_rot_in_the_cache() {
    let (home, bytes) = (Home::new(), random(4, 9 * GROUP as usize));
    let blob = BlobId::of(&bytes);
    home.cache_all(&bytes);
    flip_own(home.own_file("cache", blob, "data"), 4 * GROUP);
    let rot = groups(bytes.len(), [4]);
    check_read(&home.store, &bytes, range(0, bytes.len() as u64), &rot);
    assert_eq!(home.store.presence(blob).unwrap(), Presence::Partial(all(bytes.len()).difference(&rot)));
    fs::File::options().write(true).open(home.own_file("cache", blob, "data")).unwrap().set_len(7 * GROUP).unwrap();
    let rot = groups(bytes.len(), [4, 7, 8]);
    check_read(&home.store, &bytes, range(0, bytes.len() as u64), &rot);
    fs::remove_file(home.own_file("cache", blob, "data")).unwrap();
    check_read(&home.store, &bytes, range(0, bytes.len() as u64), &all(bytes.len()));
    assert!(matches!(home.store.verify_cached(blob, &|_| {}).unwrap(), Some(Verdict::Missing)));
    assert_eq!(home.store.presence(blob).unwrap(), Presence::None);
    home.cache_all(&bytes);
    check_read(&home.store, &bytes, range(0, bytes.len() as u64), &RangeSet::new());
}

/// What these tests take for rot: the bytes change, and nothing moves of the file until somebody does something to it.
#[test]
fn rot_moves_nothing() {
    let (home, bytes) = (Home::new(), random(5, 50_000));
    home.put("file", &bytes);
    for _ in 0..2 {
        home.rot("file", &groups(bytes.len(), [1]));
        assert_eq!((home.drift("file"), home.fingerprint("file")), (Drift::None, home.row("file").fingerprint));
        let_the_clock_tick();
    }
    home.rot("file", &groups(bytes.len(), [2]));
    let differ = fs::read(home.path("file")).unwrap().iter().zip(&bytes).filter(|(now, then)| now != then).count();
    assert_eq!(differ, 1);
    fs::set_permissions(home.path("file"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_ne!(home.fingerprint("file"), home.row("file").fingerprint, "chmod moves the ctime");
}
