//! The verdicts: sound, damaged and exactly where, modified, missing; and outboards made anew.

use std::fs;

use blobstore::{StoreError, Verdict};
use tree::{BlobId, RangeSet};

use crate::{
    common::{GROUP, LARGE, all, check_read, group_count, groups, random, range},
    home::{Home, assert_damaged, flip_own, let_the_clock_tick},
};

/// Any set of damaged groups is found, exactly, and is the row's quarantine then; the progress heard is the size.
#[test]
fn damage_is_found_to_the_group() {
    for (seed, size) in [1, GROUP as usize, 40_000, 2_000_000, LARGE, LARGE].into_iter().enumerate() {
        println!("seed {seed}, {size} bytes");
        let mut rng = fastrand::Rng::with_seed(seed as u64);
        let (home, bytes) = (Home::new(), random(seed as u64, size));
        home.put("file", &bytes);
        let mut rot = RangeSet::new();
        for one_in in [u64::MAX, 50, 3, 1] {
            let new = groups(size, (0..group_count(size)).filter(|_| rng.u64(..one_in) == 0).collect::<Vec<_>>());
            let new = new.difference(&rot);
            home.rot("file", &new);
            rot = rot.union(&new);
            let judged = std::sync::atomic::AtomicU64::new(0);
            let progress = |bytes| _ = judged.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
            let verdict = home.store.verify_file(&home.file("file"), &progress).unwrap().unwrap();
            assert_eq!(judged.into_inner(), size as u64);
            assert_damaged(&verdict, &rot, &RangeSet::new());
            assert_eq!(home.damaged("file"), rot);
        }
        assert_eq!(rot, all(size));
        check_read(&home.store, &bytes, range(0, size as u64), &rot);
    }
}

/// What a read quarantined and what verify finds are one set; what was mended by other hands is lifted.
#[test]
fn verify_says_what_is_damaged_now() {
    let (home, bytes) = (Home::new(), random(1, 400_000));
    home.put("file", &bytes);
    let (first, second) = (groups(bytes.len(), [1, 2]), groups(bytes.len(), [2, 24]));
    home.rot("file", &first);
    check_read(&home.store, &bytes, range(0, 400_000), &first);
    home.rot("file", &first);
    home.rot("file", &second);
    assert_damaged(&home.verify("file"), &second, &RangeSet::new());
    assert_eq!(home.damaged("file"), second);
}

/// The owner edits the file while it is being read: that is an edit, and what was read of it is no damage.
#[test]
fn an_edit_during_verify_is_an_edit() {
    let (home, bytes) = (Home::new(), random(7, LARGE));
    home.put("file", &bytes);
    let row = home.row("file");
    let edit = std::sync::Once::new();
    let progress = |_| {
        edit.call_once(|| {
            let_the_clock_tick();
            fs::write(home.path("file"), random(8, LARGE)).unwrap();
        });
    };
    let verdict = home.store.verify_file(&home.file("file"), &progress).unwrap();
    assert!(matches!(verdict, Some(Verdict::Modified)), "{verdict:?}");
    assert_eq!(home.row("file"), row);
}

#[test]
fn a_file_that_is_not_linked_has_no_verdict() {
    let home = Home::new();
    home.write("file", b"bytes");
    assert!(home.store.verify_file(&home.file("file"), &|_| {}).unwrap().is_none());
    assert!(home.store.verify_cached(BlobId::of(b"bytes"), &|_| {}).unwrap().is_none());
    assert!(matches!(home.store.rebuild_outboard(&home.file("file")), Err(StoreError::Modified { .. })));
}

/// Each way to damage an outboard that is a file: the data is not blamed, and the outboard is made anew.
#[test]
fn a_damaged_outboard_is_no_damaged_data() {
    type Harm = (&'static str, fn(&Home, std::path::PathBuf));
    let harms: [Harm; 5] = [
        ("root pair", |_, path| flip_own(path, 0)),
        ("last pair", |_, path| flip_own(path.clone(), fs::metadata(path).unwrap().len() - 1)),
        ("every pair", |_, path| fs::write(&path, random(9, fs::metadata(&path).unwrap().len() as usize)).unwrap()),
        ("cut", |_, path| fs::File::options().write(true).open(path).unwrap().set_len(1000).unwrap()),
        ("deleted", |_, path| fs::remove_file(path).unwrap()),
    ];
    for (what, harm) in harms {
        println!("{what}");
        let (home, bytes) = (Home::new(), random(5, LARGE));
        home.put("file", &bytes);
        harm(&home, home.own_file("outboards", BlobId::of(&bytes), "obao4"));
        match home.verify("file") {
            Verdict::Damaged { data, outboard, unreadable: None } => {
                assert_eq!(data, RangeSet::new());
                assert!(!outboard.is_empty());
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(home.damaged("file"), RangeSet::new());
        let outcome = home.store.read(BlobId::of(&bytes), LARGE as u64, range(0, LARGE as u64)).unwrap();
        assert!(!outcome.missing.is_empty(), "without an outboard nothing proves");
        assert_eq!(home.damaged("file"), RangeSet::new(), "a read blames the data for its outboard");

        home.store.rebuild_outboard(&home.file("file")).unwrap();
        assert!(matches!(home.verify("file"), Verdict::Sound));
        let home = home.reopen();
        check_read(&home.store, &bytes, range(0, LARGE as u64), &RangeSet::new());
    }
}

/// Data and outboard damaged in different places: both are named, each for itself.
#[test]
fn damage_of_both_kinds_is_told_apart() {
    let (home, bytes) = (Home::new(), random(6, LARGE));
    home.put("file", &bytes);
    let rot = groups(LARGE, [3, 200]);
    home.rot("file", &rot);
    flip_own(home.own_file("outboards", BlobId::of(&bytes), "obao4"), 0);
    assert_damaged(&home.verify("file"), &rot, &all(LARGE));
    assert_eq!(home.damaged("file"), rot);
    let error = home.store.rebuild_outboard(&home.file("file")).unwrap_err();
    assert!(matches!(error, StoreError::NotTheBlob { .. }), "{error}");
}
