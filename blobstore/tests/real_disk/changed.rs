//! Files that their owner changed after they were linked: nothing of them is read, and nothing is held to be
//! damage, for they are new versions that the indexer has not seen yet.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, symlink},
    path::Path,
};

use blobstore::{Consent, Verdict};
use tree::{BlobId, ByteRange, Query, RangeSet};

use crate::{
    common::{GROUP, NOW, all, check_read, random, range},
    home::{Home, let_the_clock_tick},
};

const SIZE: usize = 5 * GROUP as usize + 99;

/// What can be done to a file, and what verify calls it then.
type Change = (&'static str, fn(&Path), Expect);

#[derive(Clone, Copy, PartialEq)]
enum Expect {
    Modified,
    Missing,
}

const CHANGES: [Change; 11] = [
    ("edited", |path| edit(path, 3 * GROUP, b"edit"), Expect::Modified),
    ("appended to", |path| edit(path, SIZE as u64, b"more"), Expect::Modified),
    ("truncated", |path| set_len(path, 2 * GROUP), Expect::Modified),
    ("emptied", |path| set_len(path, 0), Expect::Modified),
    ("touched", |path| open(path).set_modified(std::time::UNIX_EPOCH).unwrap(), Expect::Modified),
    ("replaced, size and mtime kept", replace_alike, Expect::Modified),
    ("replaced by another", |path| replace(path, |path| fs::write(path, b"short").unwrap()), Expect::Modified),
    ("deleted", |path| fs::remove_file(path).unwrap(), Expect::Missing),
    ("replaced by a directory", |path| replace(path, |path| fs::create_dir(path).unwrap()), Expect::Missing),
    ("replaced by a link to itself", replace_by_link, Expect::Missing),
    ("below a link that took its directory's place", move_away_and_link_the_directory, Expect::Missing),
];

fn open(path: &Path) -> File {
    File::options().write(true).open(path).unwrap()
}

fn edit(path: &Path, offset: u64, bytes: &[u8]) {
    open(path).write_all_at(bytes, offset).unwrap();
}

fn set_len(path: &Path, len: u64) {
    open(path).set_len(len).unwrap();
}

fn replace(path: &Path, make: fn(&Path)) {
    fs::remove_file(path).unwrap();
    make(path);
}

fn replace_alike(path: &Path) {
    let staged = path.with_extension("staged");
    fs::write(&staged, random(99, SIZE)).unwrap();
    File::options().write(true).open(&staged).unwrap().set_modified(modified(path)).unwrap();
    fs::rename(&staged, path).unwrap();
}

fn modified(path: &Path) -> std::time::SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

fn replace_by_link(path: &Path) {
    let aside = path.with_extension("aside");
    fs::rename(path, &aside).unwrap();
    symlink(&aside, path).unwrap();
}

fn move_away_and_link_the_directory(path: &Path) {
    let dir = path.parent().unwrap();
    let aside = dir.with_extension("aside");
    fs::rename(dir, &aside).unwrap();
    symlink(&aside, dir).unwrap();
}

#[test]
fn changed_files_are_passed_over_and_blamed_for_nothing() {
    for (what, change, expect) in CHANGES {
        println!("{what}");
        let (home, bytes) = (Home::new(), random(1, SIZE));
        home.put("dir/file", &bytes);
        let row = home.row("dir/file");
        let_the_clock_tick();
        change(&home.path("dir/file"));

        assert!(home.store.sources(BlobId::of(&bytes)).unwrap().is_empty());
        check_read(&home.store, &bytes, range(1, SIZE as u64), &all(SIZE));
        assert_eq!(home.row("dir/file"), row, "a read changed the row");
        match (home.verify("dir/file"), expect) {
            (Verdict::Modified, Expect::Modified) | (Verdict::Missing, Expect::Missing) => {}
            (verdict, _) => panic!("{verdict:?}"),
        }
        assert_eq!(home.row("dir/file"), row, "verify changed the row");
        assert!(home.store.mend(&home.file("dir/file"), Consent::Damage, NOW).is_err());
        assert_eq!(home.reopen().row("dir/file"), row);
    }
}

/// The change comes after the file was opened and before its bytes are read.
#[test]
fn a_change_under_an_open_source_is_no_damage() {
    for (what, change, _) in CHANGES {
        println!("{what}");
        let (home, bytes) = (Home::new(), random(1, SIZE));
        home.put("dir/file", &bytes);
        let_the_clock_tick();
        let sources = home.store.sources(BlobId::of(&bytes)).unwrap();
        change(&home.path("dir/file"));
        for item in sources[0].prover(&Query::all()) {
            match item {
                Ok(tree::Verified::Data(piece)) => assert!(bytes[piece_range(piece.range())] == piece.bytes()[..]),
                Ok(tree::Verified::Node(_)) => {}
                Err(error) => home.store.report(&sources[0], &error).unwrap(),
            }
        }
        assert_eq!(home.damaged("dir/file"), RangeSet::new());
    }
}

fn piece_range(range: ByteRange) -> std::ops::Range<usize> {
    range.start() as usize..range.end() as usize
}

/// What moves the change time alone, such as chmod or a new name, leaves a file what it was.
#[test]
fn chmod_and_hard_links_are_no_change() {
    let (home, bytes) = (Home::new(), random(1, SIZE));
    home.put("file", &bytes);
    let_the_clock_tick();
    fs::hard_link(home.path("file"), home.path("also")).unwrap();
    fs::set_permissions(home.path("file"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(home.drift("file"), tree::Drift::Touched);
    check_read(&home.store, &bytes, range(0, SIZE as u64), &RangeSet::new());
    assert!(matches!(home.verify("file"), Verdict::Sound));
    assert_eq!(home.drift("file"), tree::Drift::None, "verify takes note of the new change time");
}
