//! Suspect files: rot and an edit are both possible, so that their sound bytes are served, and nobody overwrites the others
//! unless the user says so.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use blobstore::{Consent, FileRow, FileState, Mending, Move, NewFile, StoreError, Verdict};
use tree::{Drift, RangeSet};

use crate::{
    common::{GROUP, LARGE, NOW, all, check_read, feed, groups, random, range},
    home::{Home, flip, let_the_clock_tick},
};

const SIZE: usize = 20 * GROUP as usize + 3;

/// A program changes a file and sets its mtime back: only the ctime tells.
pub(crate) fn change(home: &Home, name: &str, change: impl FnOnce(&File)) {
    let_the_clock_tick();
    let path = home.path(name);
    let mtime = fs::metadata(&path).unwrap().modified().unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    change(&file);
    file.set_modified(mtime).unwrap();
}

/// Overwrites a byte in each of these groups.
fn overwrite(file: &File, groups: &RangeSet) {
    groups.iter().for_each(|range| flip(file, range.start()));
}

fn assert_suspect(verdict: &Verdict, expected: &RangeSet) {
    assert!(matches!(verdict, Verdict::Suspect { data } if data == expected), "{verdict:?}, not {expected:?}");
}

fn mend(home: &Home, name: &str, consent: Consent) -> Result<Mending, StoreError> {
    home.store.mend(&home.file(name), consent, NOW)
}

fn bytes(home: &Home, name: &str) -> Vec<u8> {
    fs::read(home.path(name)).unwrap()
}

/// Has what a scan that has hashed it says of it.
fn suspect(home: &Home, name: &str, last: &FileRow) -> Option<RangeSet> {
    let row = home.store.suspect(&home.file(name), last, home.fingerprint(name), false).unwrap()?;
    assert!(row.is_suspect() && home.row(name) == row);
    Some(row.damaged)
}

#[test]
fn only_the_user_decides() {
    type Find = (&'static str, fn(&Home, &[u8], &RangeSet));
    let finds: [Find; 3] = [
        ("verify", |home, _, other| assert_suspect(&home.verify("file"), other)),
        ("read", |home, right, other| check_read(&home.store, right, range(0, right.len() as u64), other)),
        ("scan", |home, _, other| assert_eq!(suspect(home, "file", &home.row("file")).as_ref(), Some(other))),
    ];
    for (size, other, (by, find)) in [SIZE, LARGE].into_iter().flat_map(|size| finds.map(|f| (size, [0, 9, 20], f))) {
        println!("{size} bytes, found by {by}");
        let (home, right, other) = (Home::new(), random(1, size), groups(size, other));
        home.put("file", &right);
        change(&home, "file", |file| overwrite(file, &other));
        let changed = bytes(&home, "file");
        find(&home, &right, &other);
        let home = home.reopen();
        let row = home.row("file");
        assert_eq!(
            (row.state, &row.damaged),
            (FileState::Suspect { read: home.fingerprint("file"), was_settled: by != "scan" }, &other)
        );
        assert_suspect(&home.verify("file"), &other);
        check_read(&home.store, &right, range(0, size as u64), &other);
        assert!(matches!(mend(&home, "file", Consent::Damage), Err(StoreError::Suspect { .. })));
        assert!(bytes(&home, "file") == changed && home.store.repairs().unwrap().is_empty());
        assert_eq!(home.row("file"), row);

        let mut mending = mend(&home, "file", Consent::Suspect).unwrap();
        feed(&mut mending, &right, &other);
        assert_eq!(mending.finish().unwrap().1, other);
        assert!(bytes(&home, "file") == right);
        assert_eq!((home.drift("file"), home.row("file").state), (Drift::None, FileState::Settled));
        assert!(matches!(home.verify("file"), Verdict::Sound));
    }
}

/// It becomes the blob again by other hands, or something else.
#[test]
fn a_suspect_file_that_changes_again() {
    let (home, right, other) = (Home::new(), random(2, SIZE), groups(SIZE, [4]));
    home.put("file", &right);
    change(&home, "file", |file| overwrite(file, &other));
    assert_suspect(&home.verify("file"), &other);
    change(&home, "file", |file| file.write_all_at(b"again", 9 * GROUP).unwrap());
    let (changed, row) = (bytes(&home, "file"), home.row("file"));
    assert!(matches!(home.verify("file"), Verdict::Modified));
    check_read(&home.store, &right, range(0, SIZE as u64), &all(SIZE));
    for consent in [Consent::Damage, Consent::Suspect] {
        assert!(mend(&home, "file", consent).is_err());
    }
    assert!(bytes(&home, "file") == changed && home.row("file") == row);
    // The scan that follows reads it again.
    let both = groups(SIZE, [4, 9]);
    assert_eq!(suspect(&home, "file", &row), Some(both.clone()));
    assert_suspect(&home.verify("file"), &both);
    change(&home, "file", |file| file.write_all_at(&right, 0).unwrap());
    assert_eq!(suspect(&home, "file", &home.row("file")), None, "it is the blob");
}

/// Only who saw all that happened to a file since it was settled can tell that it is rot.
#[test]
fn what_a_watcher_saw_later_explains_nothing_from_before() {
    let touch = |home: &Home| change(home, "file", |_| ());
    let explain = |home: &Home| home.store.explain(&home.file("file"), home.fingerprint("file")).unwrap();
    let other = groups(SIZE, [4]);
    type Find = (&'static str, fn(&Home, &[u8], &RangeSet));
    let finds: [Find; 2] = [
        ("verify", |home, _, other| assert_suspect(&home.verify("file"), other)),
        ("read", |home, right, other| check_read(&home.store, right, range(0, right.len() as u64), other)),
    ];
    for (by, find) in finds {
        let (home, right) = (Home::new(), random(6, SIZE));
        home.put("file", &right);
        change(&home, "file", |file| overwrite(file, &other));
        find(&home, &right, &other);
        assert!(explain(&home), "{by}");
        assert_eq!((home.row("file").state, &home.row("file").damaged), (FileState::Settled, &other));

        let home = Home::new();
        home.put("file", &right);
        change(&home, "file", |file| overwrite(file, &other));
        find(&home, &right, &other);
        home.store.leave_suspect(&home.file("file"), home.fingerprint("file")).unwrap();
        assert!(!explain(&home), "{by}: a scan has decided");

        let home = Home::new();
        home.put("file", &right);
        change(&home, "file", |file| overwrite(file, &other));
        find(&home, &right, &other);
        touch(&home);
        assert!(!explain(&home), "{by}: nobody has read it since");
        suspect(&home, "file", &home.row("file"));
        assert!(!explain(&home), "{by}: it was suspect before");
        touch(&home);
        home.verify("file");
        assert!(!explain(&home) && home.row("file").is_suspect(), "{by}");
    }
    let (home, right) = (Home::new(), random(6, SIZE));
    home.put("file", &right);
    change(&home, "file", |file| overwrite(file, &other));
    let by_scan =
        |last: &FileRow| home.store.suspect(&home.file("file"), last, home.fingerprint("file"), true).unwrap().unwrap();
    let rotten = by_scan(&home.row("file"));
    assert_eq!((rotten.state, &rotten.damaged), (FileState::Settled, &other));
    change(&home, "file", |_| ());
    let suspect = suspect(&home, "file", &rotten);
    assert_eq!(suspect.as_ref(), Some(&other));
    assert!(!explain(&home) && by_scan(&home.row("file")).is_suspect());
}

/// A shorter one grows to the blob's size, a longer one is not cut.
#[test]
fn suspect_files_of_another_size() {
    for (len, is_longer) in [(0, false), (7 * GROUP + 5, false), (SIZE as u64 + 1, true)] {
        println!("{len} bytes");
        let (home, right) = (Home::new(), random(3, SIZE));
        home.put("file", &right);
        change(&home, "file", |file| file.set_len(len).unwrap());
        let changed = bytes(&home, "file");
        assert!(matches!(home.verify("file"), Verdict::Modified), "nobody has looked at it");
        assert_eq!(suspect(&home, "file", &home.row("file")), Some(all(SIZE)));
        assert_suspect(&home.verify("file"), &all(SIZE));
        check_read(&home.store, &right, range(0, SIZE as u64), &all(SIZE));
        assert!(matches!(mend(&home, "file", Consent::Damage), Err(StoreError::Suspect { .. })));
        let mending = mend(&home, "file", Consent::Suspect);
        if is_longer {
            assert!(matches!(mending, Err(StoreError::Longer { .. })));
            assert!(bytes(&home, "file") == changed);
            continue;
        }
        let mut mending = mending.unwrap();
        feed(&mut mending, &right, &all(SIZE));
        mending.finish().unwrap();
        assert!(bytes(&home, "file") == right);
        assert!(matches!(home.verify("file"), Verdict::Sound));
        for expected in [&changed, &right] {
            home.store.undo_repair(&home.file("file"), NOW).unwrap().unwrap();
            assert!(bytes(&home, "file") == *expected, "undone");
        }
    }
}

/// Only what no peer has stays undecided.
#[test]
fn a_suspect_file_that_is_mended_in_part_stays_suspect() {
    let (home, right, other) = (Home::new(), random(4, SIZE), groups(SIZE, [4, 9]));
    home.put("file", &right);
    change(&home, "file", |file| overwrite(file, &other));
    home.verify("file");
    let mut mending = mend(&home, "file", Consent::Suspect).unwrap();
    feed(&mut mending, &right, &groups(SIZE, [9]));
    mending.finish().unwrap();
    let home = home.reopen();
    assert_suspect(&home.verify("file"), &groups(SIZE, [4]));
    assert!(matches!(mend(&home, "file", Consent::Damage), Err(StoreError::Suspect { .. })));
    drop(mend(&home, "file", Consent::Suspect).unwrap());
    assert_suspect(&home.verify("file"), &groups(SIZE, [4]));
}

#[test]
fn one_of_two_names_is_mended_for_both() {
    let (home, right, other) = (Home::new(), random(5, SIZE), groups(SIZE, [4, 9]));
    home.write("one", &right);
    fs::hard_link(home.path("one"), home.path("two")).unwrap();
    home.link(&["one", "two"]);
    change(&home, "one", |file| overwrite(file, &other));
    for name in ["one", "two"] {
        assert_suspect(&home.verify(name), &other);
    }
    let mut mending = mend(&home, "one", Consent::Suspect).unwrap();
    assert!(matches!(mend(&home, "two", Consent::Suspect), Err(StoreError::Mending { .. })));
    feed(&mut mending, &right, &other);
    mending.finish().unwrap();
    assert_eq!(home.row("two"), home.row("one"));
    assert!(matches!(home.verify("two"), Verdict::Sound));
}

#[test]
fn a_suspect_file_that_is_renamed_stays_suspect() {
    let (home, right, other) = (Home::new(), random(6, SIZE), groups(SIZE, [4]));
    home.put("old", &right);
    change(&home, "old", |file| overwrite(file, &other));
    home.verify("old");
    fs::rename(home.path("old"), home.path("new")).unwrap();
    let moved = Move { from: b"old".into(), to: b"new".into(), fingerprint: home.fingerprint("new"), keep: false };
    assert_eq!(home.store.relink(home.root, &[moved]).unwrap(), [true]);
    assert_suspect(&home.verify("new"), &other);
    assert!(matches!(mend(&home, "new", Consent::Damage), Err(StoreError::Suspect { .. })));
}

/// A scan says that a file is suspect after the user had it linked as it is: it stays what it is.
#[test]
fn what_was_linked_meanwhile_is_not_suspect() {
    let (home, right) = (Home::new(), random(7, SIZE));
    home.put("file", &right);
    let last = home.row("file");
    change(&home, "file", |file| overwrite(file, &groups(SIZE, [4])));
    home.link(&["file"]);
    let row = home.row("file");
    assert_eq!(suspect(&home, "file", &last), None);
    assert_eq!(home.row("file"), row);
}

/// It came back after it had vanished, with its outboard gone: all of it is undecided until that is here again.
#[test]
fn a_vanished_file_comes_back_suspect() {
    for size in [1000, SIZE, LARGE] {
        let (home, right) = (Home::new(), random(8, size));
        home.put("file", &right);
        let row = home.row("file");
        home.store.unlink(home.root, &[b"file"]).unwrap();
        let home = home.reopen();
        assert_eq!(home.store.vanished(home.root, &[b"file", b"none"]).unwrap(), [Some(row.clone()), None]);
        change(&home, "file", |file| overwrite(file, &groups(size, [0])));
        let damaged = suspect(&home, "file", &row).unwrap();
        assert!(damaged.contains(groups(size, [0]).iter().next().unwrap()));
        assert_eq!(home.store.vanished(home.root, &[b"file"]).unwrap(), [None], "it is linked again");
        assert!(matches!(mend(&home, "file", Consent::Damage), Err(StoreError::Suspect { .. })));
        let mut mending = mend(&home, "file", Consent::Suspect).unwrap();
        feed(&mut mending, &right, &damaged);
        mending.finish().unwrap();
        assert!(bytes(&home, "file") == right);
    }
}

/// What was hashed within a tick of its last change may have been written since without a trace: that is no damage.
#[test]
fn other_bytes_of_a_racy_file_are_no_damage() {
    let (home, right, other) = (Home::new(), random(9, SIZE), groups(SIZE, [4]));
    home.write("file", &right);
    let hashed = home.store.hash(&right[..], SIZE as u64).unwrap();
    let fingerprint = home.fingerprint("file");
    let new = NewFile { path: b"file".into(), fingerprint, hashed_at: 1, racy: true, hashed };
    home.store.link(home.root, &[new]).unwrap();
    let row = home.row("file");
    assert_eq!(row.state, FileState::Racy);
    assert!(matches!(home.verify("file"), Verdict::Sound));
    home.rot("file", &other);
    check_read(&home.store, &right, range(0, SIZE as u64), &other);
    assert!(matches!(home.verify("file"), Verdict::Modified));
    assert_eq!(home.row("file"), row);
    assert!(matches!(mend(&home, "file", Consent::Suspect), Err(StoreError::Modified { .. })));
}

/// A reader meets rot that nobody knew of while other damage is mended: the ctime that mending moved makes nothing suspect.
#[test]
fn rot_that_is_found_during_mending_is_damage() {
    let (home, right, rot) = (Home::new(), random(10, SIZE), groups(SIZE, [4, 9]));
    home.put("file", &right);
    home.rot("file", &rot);
    check_read(&home.store, &right, range(4 * GROUP, 5 * GROUP), &groups(SIZE, [4]));
    let mut mending = mend(&home, "file", Consent::Damage).unwrap();
    feed(&mut mending, &right, &groups(SIZE, [4]));
    check_read(&home.store, &right, range(9 * GROUP, 10 * GROUP), &groups(SIZE, [9]));
    home.verify("file");
    mending.finish().unwrap();
    assert_eq!((home.row("file").state, home.damaged("file")), (FileState::Settled, groups(SIZE, [9])));
}
