//! Rows and the store's own files: what links and unlinks leave, what a start cleans up, what it refuses, and that
//! one blob in thousands of places costs no more than as many blobs.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use blobstore::{Consent, FileRow, Move, NewFile, Presence, RealDisk, Source, Store, StoreError, Verdict};
use redb::{Database, TableDefinition};
use tree::{BlobId, Drift, Fingerprint, Query, RangeSet};

use crate::{
    common::{LARGE, NOW, all, check_read, feed, groups, hashed, random, range, settings},
    home::Home,
};

/// An outboard stays as long as any file has its blob, and goes with the last.
#[test]
fn outboards_live_as_long_as_their_last_file() {
    for size in [100_000, LARGE] {
        let (home, bytes, other) = (Home::new(), random(1, size), random(2, size));
        let outboards = if size == LARGE { 1 } else { 0 };
        home.put("a", &bytes);
        home.put("b", &bytes);
        home.store.unlink(home.root, &[b"a", b"never linked"]).unwrap();
        assert!(home.store.file(&home.file("a")).unwrap().is_none());
        check_read(&home.store, &bytes, range(0, size as u64), &RangeSet::new());
        assert_eq!(home.own_files("outboards").len(), outboards);

        home.put("b", &other);
        assert_eq!(home.store.presence(BlobId::of(&bytes)).unwrap(), Presence::None);
        assert_eq!(home.own_files("outboards").len(), outboards);
        let home = home.reopen();
        check_read(&home.store, &other, range(0, size as u64), &RangeSet::new());
        assert!(matches!(home.verify("b"), Verdict::Sound));
        home.store.unlink(home.root, &[b"b"]).unwrap();
        assert!(home.own_files("outboards").is_empty());
        assert!(home.path("a").exists() && home.path("b").exists(), "unlinking leaves the user's files alone");
    }
}

/// A file that is renamed, or gets a second name, is served and verified under its new path as it was under the old,
/// with its damage, and its outboard goes with the last name. While it is mended, it is left where it is.
#[test]
fn a_renamed_file_is_what_it_was() {
    for size in [1000, 100_000, LARGE] {
        let (home, bytes) = (Home::new(), random(1, size));
        let blob = BlobId::of(&bytes);
        home.put("a", &bytes);
        home.put("in the way", &random(2, size));
        let outboards = home.own_files("outboards").len() / 2;
        home.rot("a", &groups(size, [0]));
        home.verify("a");
        let relink = |from: &str, to: &str, keep| {
            let fingerprint = home.fingerprint(to);
            let moved = Move { from: from.into(), to: to.into(), fingerprint, keep };
            home.store.relink(home.root, &[moved]).unwrap()
        };
        fs::rename(home.path("a"), home.path("in the way")).unwrap();
        fs::hard_link(home.path("in the way"), home.path("b")).unwrap();
        assert_eq!(relink("a", "in the way", false), [true]);
        assert_eq!(relink("a", "in the way", false), [false], "it is not linked there any more");
        assert_eq!((home.drift("in the way"), home.damaged("in the way")), (Drift::None, groups(size, [0])));
        assert_eq!(home.own_files("outboards").len(), outboards, "that of the file in the way is gone");
        check_read(&home.store, &bytes, range(0, size as u64), &groups(size, [0]));

        let mut mending = home.store.mend(&home.file("in the way"), Consent::Damage, NOW).unwrap();
        assert_eq!(relink("in the way", "b", true), [false], "it is being mended");
        feed(&mut mending, &bytes, &groups(size, [0]));
        mending.finish().unwrap();
        assert_eq!(relink("in the way", "b", true), [true]);
        assert_eq!(home.store.holders(blob, 9).unwrap(), [home.file("b"), home.file("in the way")]);
        let home = home.reopen();
        for name in ["b", "in the way"] {
            assert!(matches!(home.verify(name), Verdict::Sound));
            check_read(&home.store, &bytes, range(0, size as u64), &RangeSet::new());
            home.store.unlink(home.root, &[name.as_bytes()]).unwrap();
        }
        assert_eq!(home.store.presence(blob).unwrap(), Presence::None);
        assert!(home.own_files("outboards").is_empty());
    }
}

/// The same path, twice in one call, and again in the next: the last word counts.
#[test]
fn a_path_linked_twice_has_its_last_row() {
    let (home, bytes) = (Home::new(), random(1, LARGE));
    home.put("file", &bytes);
    home.link(&["file", "file"]);
    home.link(&["file"]);
    assert_eq!(home.store.holders(BlobId::of(&bytes), 9).unwrap(), [home.file("file")]);
    assert!(matches!(home.verify("file"), Verdict::Sound));
    home.rot("file", &groups(LARGE, [2]));
    home.verify("file");
    fs::write(home.path("file"), &bytes).unwrap();
    home.link(&["file"]);
    assert_eq!(home.damaged("file"), RangeSet::new());
    check_read(&home.store, &bytes, range(0, LARGE as u64), &RangeSet::new());
}

/// Who read the file's last version speaks of it after the next was linked, or after none is: nothing comes of it.
#[test]
fn what_is_said_of_another_version_is_passed_over() {
    let (home, old, new) = (Home::new(), random(1, 50_000), random(2, 50_000));
    home.put("file", &old);
    let (old_row, file) = (home.row("file"), home.file("file"));
    let report = |sources: &[Source]| {
        let errors = sources[0].prover(&Query::all()).filter_map(Result::err);
        errors.for_each(|error| home.store.report(&sources[0], &error).unwrap());
    };
    let of_old = home.store.sources(old_row.blob).unwrap();
    home.rot("file", &groups(50_000, [0]));
    home.put("file", &new);
    let row = home.row("file");
    report(&of_old);
    home.store.refresh(&file, old_row.blob, old_row.fingerprint).unwrap();
    assert_eq!(home.row("file"), row);
    let of_new = home.store.sources(row.blob).unwrap();
    home.rot("file", &groups(50_000, [0]));
    report(&of_new);
    assert_eq!(home.row("file"), FileRow { damaged: groups(50_000, [0]), ..row.clone() });
    home.store.refresh(&file, row.blob, old_row.fingerprint).unwrap();
    assert_eq!(home.row("file").fingerprint, old_row.fingerprint);
    home.store.unlink(home.root, &[b"file"]).unwrap();
    report(&of_new);
    home.store.refresh(&file, row.blob, row.fingerprint).unwrap();
    assert!(home.store.file(&file).unwrap().is_none());
}

/// Names are bytes: what is no UTF-8, and what looks like another path, is its own file.
#[test]
fn names_are_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let home = Home::new();
    let names: [&[u8]; 5] = [b"a:b", b"\xff\xfe", b"-", b"a b\n", b"\xff\xfe.d/x"];
    let blobs: Vec<_> = names.iter().enumerate().map(|(n, _)| random(n as u64, 1000)).collect();
    let new: Vec<NewFile> = names
        .iter()
        .zip(&blobs)
        .map(|(name, bytes)| {
            let path = home.path("").join(std::ffi::OsStr::from_bytes(name));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            let fingerprint = Fingerprint::from(&fs::metadata(path).unwrap());
            let hashed = home.store.hash(&bytes[..], 1000).unwrap();
            NewFile { path: name.to_vec(), fingerprint, hashed_at: 1, racy: false, hashed }
        })
        .collect();
    home.store.link(home.root, &new).unwrap();
    let home = home.reopen();
    blobs.iter().for_each(|bytes| check_read(&home.store, bytes, range(0, 1000), &RangeSet::new()));
    let mut listed: Vec<_> = home.store.files(home.root).map(|file| file.unwrap().0).collect();
    let mut expected = names.map(<[u8]>::to_vec);
    listed.sort();
    expected.sort();
    assert_eq!(listed, expected);
}

/// Own files that no row names are deleted at the start; other people's files there, and all that is in use, stay.
#[test]
fn a_start_deletes_orphans_and_nothing_else() {
    let (home, bytes, cached, orphan) = (Home::new(), random(1, LARGE), random(2, 50_000), random(3, 10));
    home.put("file", &bytes);
    home.cache(&cached, &groups(cached.len(), [1, 3]));
    let mut kept: Vec<_> = ["cache", "outboards"].iter().flat_map(|dir| home.own_files(dir)).collect();
    assert_eq!(kept.len(), 3);
    let orphan = BlobId::of(&orphan);
    let new = [
        (home.own_file("outboards", orphan, "obao4"), false),
        (home.own_file("outboards", orphan, "obao10"), false),
        (home.path("../outboards/staged/7"), false),
        (home.own_file("outboards", BlobId::of(&cached), "obao4"), false),
        (home.own_file("cache", orphan, "data"), false),
        (home.own_file("cache", orphan, "obao4"), false),
        (home.own_file("cache", BlobId::of(&bytes), "data"), false),
        (home.own_file("cache", orphan, "txt"), true),
        (home.own_file("cache", orphan, "data").with_file_name("README"), true),
    ];
    for (path, stays) in new {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"left behind").unwrap();
        kept.extend(stays.then_some(path));
    }
    let home = home.reopen();
    let mut files: Vec<_> = ["cache", "outboards"].iter().flat_map(|dir| home.own_files(dir)).collect();
    files.sort();
    kept.sort();
    assert_eq!(files, kept);
    check_read(&home.store, &bytes, range(0, LARGE as u64), &RangeSet::new());
    check_read(&home.store, &cached, range(0, 50_000), &all(50_000).difference(&groups(50_000, [1, 3])));
}

/// A store that a later program wrote, or one of long ago, is not touched by this one.
#[test]
fn another_format_is_refused() {
    let dir = {
        let home = Home::new();
        home.put("file", &random(1, LARGE));
        home.close()
    };
    let set = |format: u32| {
        let db = Database::open(dir.path().join("db0")).unwrap();
        let txn = db.begin_write().unwrap();
        txn.open_table(TableDefinition::<&str, u32>::new("store.meta")).unwrap().insert("format", format).unwrap();
        txn.commit().unwrap();
    };
    for format in [2, 4] {
        set(format);
        let error = Home::try_open(&dir, 0, Arc::new(RealDisk)).err().expect("another format was opened");
        assert!(matches!(error, StoreError::Format { found, known: 3 } if found == format), "{error:?}");
    }
    set(3);
    let store = Home::try_open(&dir, 0, Arc::new(RealDisk)).unwrap();
    check_read(&store, &random(1, LARGE), range(0, LARGE as u64), &RangeSet::new());
}

#[test]
fn roots_keep_their_numbers_and_their_files_apart() {
    let (home, bytes) = (Home::new(), random(1, 50_000));
    home.put("file", &bytes);
    let other = home.store.add_root(&home.path("sub")).unwrap();
    assert_ne!(other, home.root);
    assert_eq!(home.store.add_root(&home.path("sub")).unwrap(), other);
    home.store.remove_root(other).unwrap();
    assert_eq!(home.store.files(home.root).count(), 1);
    home.store.remove_root(home.root).unwrap();
    assert_eq!(home.store.presence(BlobId::of(&bytes)).unwrap(), Presence::None);
    assert!(home.path("file").exists());
}

/// An arena is given up and taken up again while the daemon runs: its files must still be there after a restart.
#[test]
fn a_root_that_was_removed_can_be_added_again() {
    let (mut home, bytes) = (Home::new(), random(1, 50_000));
    home.put("file", &bytes);
    home.store.remove_root(home.root).unwrap();
    home.root = home.store.add_root(&home.path("")).unwrap();
    home.link(&["file"]);
    check_read(&home.store, &bytes, range(0, 50_000), &RangeSet::new());
    let arena = home.path("");
    let dir = home.close();
    let store = Home::try_open(&dir, 0, Arc::new(RealDisk)).unwrap();
    check_read(&store, &bytes, range(0, 50_000), &RangeSet::new());
    let root = store.add_root(&arena).unwrap();
    assert_eq!(store.files(root).count(), 1);
}

/// Thousands of files that are one blob, empty or not: linked in one call, read, and unlinked.
#[test]
fn thousands_of_equal_files_stay_fast() {
    const FILES: usize = 5000;
    for size in [0, 30_000] {
        let (home, bytes) = (Home::new(), random(1, size));
        let names: Vec<String> = (0..FILES).map(|n| format!("{}/{n}", n % 50)).collect();
        names.iter().for_each(|name| home.write(name, &bytes));
        let hashed = hashed(&bytes);
        let new = names.iter().map(|name| {
            let fingerprint = home.fingerprint(name);
            let hashed = home.store.hash(&bytes[..], size as u64).unwrap();
            NewFile { path: name.clone().into(), fingerprint, hashed_at: 1, racy: false, hashed }
        });
        let new: Vec<NewFile> = new.collect();
        let timed = |what: &str, limit: Duration, act: &dyn Fn()| {
            let start = Instant::now();
            act();
            println!("{what} {FILES} files of {size} bytes: {:?}", start.elapsed());
            assert!(start.elapsed() < limit, "too slow");
        };
        let seconds = Duration::from_secs;
        timed("link", seconds(3), &|| home.store.link(home.root, &new).unwrap());
        assert_eq!(home.store.files(home.root).count(), FILES);
        timed("link again", seconds(3), &|| home.store.link(home.root, &new).unwrap());
        timed("read", seconds(1), &|| {
            for _ in 0..100 {
                check_read(&home.store, &bytes, range(0, size as u64), &RangeSet::new());
                home.store.presence(hashed.id).unwrap();
            }
        });
        let paths: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
        timed("unlink", seconds(3), &|| home.store.unlink(home.root, &paths).unwrap());
        assert_eq!(home.store.files(home.root).count(), 0);
        assert!(home.store.holders(hashed.id, 1).unwrap().is_empty());
    }
}

/// Two stores cannot have one database: that is the lock of a home.
#[test]
fn a_clone_is_the_same_store() {
    let (home, bytes) = (Home::new(), random(1, 1000));
    let clone: Store = home.store.clone();
    home.put("file", &bytes);
    check_read(&clone, &bytes, range(0, 1000), &RangeSet::new());
    assert!(Database::create(home.path("../db0")).is_err(), "a second open of the same database");
    let db = Arc::new(Database::create(home.path("../other db")).unwrap());
    let empty = Store::open(Arc::new(RealDisk), db, settings(&home.path("../other"))).unwrap();
    assert_eq!(empty.presence(BlobId::of(&bytes)).unwrap(), Presence::None);
}
