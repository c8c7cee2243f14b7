//! The bytes that repairs replaced: saved before the first write, put back when the user wants them, dropped when they are
//! old or too many.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use blobstore::{Consent, FileState, Mending, RealDisk, StoreError, Verdict};
use tree::{Drift, RangeSet};

use crate::{
    common::{GROUP, NOW, feed, groups, random},
    home::{Home, flip_own, let_the_clock_tick},
};

const SIZE: usize = 20 * GROUP as usize + 3;

/// Links a file, and has groups of it rot. Returns its bytes before and since.
fn rot(home: &Home, name: &str, groups: &RangeSet) -> (Vec<u8>, Vec<u8>) {
    let right = random(1, SIZE);
    home.put(name, &right);
    home.rot(name, groups);
    home.verify(name);
    (right, bytes(home, name))
}

fn bytes(home: &Home, name: &str) -> Vec<u8> {
    fs::read(home.path(name)).unwrap()
}

fn begin(home: &Home, name: &str, now: u64) -> Result<Mending, StoreError> {
    home.store.mend(&home.file(name), Consent::Damage, now)
}

fn mend(home: &Home, name: &str, now: u64) {
    let mut mending = begin(home, name, now).unwrap();
    let damaged = mending.damaged();
    feed(&mut mending, &random(1, SIZE), &damaged);
    mending.finish().unwrap();
}

fn undo(home: &Home, name: &str) -> bool {
    home.store.undo_repair(&home.file(name), NOW).unwrap().is_some()
}

/// The names of the files whose replaced bytes are saved, the oldest first.
fn saved(home: &Home) -> Vec<String> {
    let repairs = home.store.repairs().unwrap();
    assert_eq!(home.own_files("saved").len(), repairs.len());
    repairs.iter().map(|repair| repair.path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn a_repair_is_undone_and_that_too() {
    let (mut home, damage) = (Home::new(), groups(SIZE, [0, 7, 8, 20]));
    let (right, rotten) = rot(&home, "file", &damage);
    let mtime = home.mtime("file");
    assert!(!undo(&home, "file"), "there was no repair");
    mend(&home, "file", NOW);
    for (times, expected) in [&rotten, &right, &rotten].into_iter().enumerate() {
        home = home.reopen();
        assert!(undo(&home, "file"));
        assert!(bytes(&home, "file") == *expected && home.mtime("file") == mtime);
        let repairs = home.store.repairs().unwrap();
        assert_eq!((repairs.len(), repairs.iter().filter(|repair| repair.is_undo).count()), (times + 2, times + 1));
        // Whatever it is now, nobody overwrites it by himself.
        let row = home.row("file");
        assert_eq!(
            (row.state, &row.damaged),
            (FileState::Suspect { read: home.fingerprint("file"), was_settled: false }, &damage)
        );
        assert!(matches!(begin(&home, "file", NOW), Err(StoreError::Suspect { .. })));
    }
    assert!(matches!(home.verify("file"), Verdict::Suspect { data } if data == damage));
    assert!(undo(&home, "file"));
    assert!(matches!(home.verify("file"), Verdict::Sound));
    assert_eq!(home.drift("file"), Drift::None);
}

#[test]
fn a_file_that_changed_since_is_left_alone() {
    let home = Home::new();
    rot(&home, "file", &groups(SIZE, [3]));
    mend(&home, "file", NOW);
    let_the_clock_tick();
    File::options().write(true).open(home.path("file")).unwrap().write_all_at(b"edit", 0).unwrap();
    let edited = bytes(&home, "file");
    let undone = home.store.undo_repair(&home.file("file"), NOW);
    assert!(matches!(undone, Err(StoreError::Modified { .. })), "{undone:?}");
    assert!(bytes(&home, "file") == edited);
    assert_eq!(saved(&home), ["file"]);
}

/// Bytes that rotted where they were saved are not put back.
#[test]
fn saved_bytes_that_rotted_are_refused() {
    let home = Home::new();
    let (right, _) = rot(&home, "file", &groups(SIZE, [3]));
    mend(&home, "file", NOW);
    let path = home.own_files("saved").remove(0);
    let cut = |path: &Path| File::options().write(true).open(path).unwrap().set_len(100).unwrap();
    let harms: [&dyn Fn(); 3] = [&|| flip_own(path.clone(), 9), &|| cut(&path), &|| fs::remove_file(&path).unwrap()];
    for harm in harms {
        harm();
        assert!(home.store.undo_repair(&home.file("file"), NOW).is_err());
        assert!(bytes(&home, "file") == right);
    }
}

#[test]
fn a_mending_that_was_cut_off_can_be_undone() {
    let home = Home::new();
    let (right, rotten) = rot(&home, "file", &groups(SIZE, [3, 9]));
    let mut mending = begin(&home, "file", NOW).unwrap();
    feed(&mut mending, &right, &groups(SIZE, [9]));
    std::mem::forget(mending);
    let home = home.kill_and_reopen();
    assert_eq!(saved(&home), ["file"]);
    assert!(bytes(&home, "file") != rotten);
    assert!(undo(&home, "file"));
    assert!(bytes(&home, "file") == rotten);
}

#[test]
fn a_mending_that_wrote_nothing_saves_nothing() {
    let home = Home::new();
    rot(&home, "file", &groups(SIZE, [3, 9]));
    drop(begin(&home, "file", NOW).unwrap());
    begin(&home, "file", NOW).unwrap().finish().unwrap();
    assert!(saved(&home).is_empty());
    assert!(matches!(home.verify("file"), Verdict::Damaged { .. }));
}

#[test]
fn the_oldest_make_room_and_too_much_is_refused() {
    let limit = |settings: &mut blobstore::Settings| settings.saved_bytes_max = 3 * GROUP;
    let home = Home::new().reopen_set(Arc::new(RealDisk), limit);
    for (name, rotten) in
        [("a", vec![0, 1]), ("b", vec![2]), ("c", vec![3]), ("d", vec![4, 5, 6]), ("e", vec![1, 2, 3, 4])]
    {
        rot(&home, name, &groups(SIZE, rotten));
    }
    for (name, expected) in [("a", vec!["a"]), ("b", vec!["a", "b"]), ("c", vec!["b", "c"]), ("d", vec!["d"])] {
        mend(&home, name, NOW);
        assert_eq!(saved(&home), expected);
    }
    let before = bytes(&home, "e");
    assert!(matches!(begin(&home, "e", NOW), Err(StoreError::TooMuchToSave { .. })));
    assert!(bytes(&home, "e") == before);
    // Undoing must save as much again, and what it puts back must not go for that.
    assert!(matches!(home.store.undo_repair(&home.file("d"), NOW), Err(StoreError::TooMuchToSave { .. })));
    assert_eq!(saved(&home), ["d"]);
}

#[test]
fn the_old_go_when_the_next_are_saved() {
    let home = Home::new();
    for (name, at, expected) in
        [("a", NOW, vec!["a"]), ("b", NOW + 100_000, vec!["a", "b"]), ("c", NOW + 100_001, vec!["b", "c"])]
    {
        rot(&home, name, &groups(SIZE, [3]));
        mend(&home, name, at);
        assert_eq!(saved(&home), expected);
    }
}

#[test]
fn what_no_row_names_goes_at_the_start() {
    let home = Home::new();
    rot(&home, "file", &groups(SIZE, [3]));
    mend(&home, "file", NOW);
    let path = home.own_files("saved").remove(0).with_file_name("7");
    fs::write(&path, b"left behind by a crash").unwrap();
    let home = home.reopen();
    assert!(!path.exists());
    assert_eq!(saved(&home), ["file"]);
    assert!(undo(&home, "file"));
}
