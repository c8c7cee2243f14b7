//! Files of which nobody can tell whether they rotted or were edited are left alone until the user decides: spec/namespace.md,
//! "Rot or edit".

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, SystemTime},
};

use serde_json::Value;
use tests::{Machine, Scratch, wait_for};
use tree::BlobId;

const SIZE: usize = 100_000;

/// Machine a, which holds `docs`, and machine b, which has a copy of it in an arena of its own.
fn with_a_copy(scratch: &Scratch, names: &[&str]) -> (Machine, Machine) {
    let root = scratch.dir("docs");
    for name in names {
        fs::write(root.join(name), name.repeat(SIZE / name.len())).unwrap();
    }
    let a = Machine::watching(scratch, "a", &[&root]);
    let b = Machine::watching::<&Path>(scratch, "b", &[]);
    b.join(&a);
    b.ok(["get".as_ref(), "docs".as_ref(), scratch.path("copy").as_os_str()]);
    b.ok(["arena".as_ref(), "add".as_ref(), "copy".as_ref(), scratch.path("copy").as_os_str()]);
    a.hears(&b);
    (a, b)
}

/// Writes `bytes` at `offset`, and puts the mtime back.
fn write_with_kept_mtime(path: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    let mtime = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.set_modified(mtime).unwrap();
}

/// What `machine` itself has at `docs/NAME`, by its catalog.
fn published(machine: &Machine, name: &str) -> String {
    let stat = machine.run(["stat", "--json", &format!("docs/{name}")]);
    let stat: Value = serde_json::from_slice(&stat.stdout).unwrap_or_default();
    let mut versions = stat["versions"].as_array().into_iter().flatten();
    let mine = versions.find(|version| version["peer"] == machine.name());
    mine.and_then(|version| version["blob"].as_str()).unwrap_or_default().to_owned()
}

fn blob_of(path: &Path) -> String {
    BlobId::of(&fs::read(path).unwrap()).to_string()
}

/// The only suspect file that `verify` lists.
#[track_caller]
fn the_suspect(machine: &Machine) -> Value {
    let found = machine.exits(4, ["verify", "--json"]);
    assert_eq!(found.summary()["damaged_files"], 0, "{}", found.text());
    let suspects = found.of_type("suspect");
    assert_eq!(suspects.len(), 1, "{}", found.text());
    suspects[0].clone()
}

/// A write while no daemon watched, whose mtime was put back: nothing is published or overwritten, reads get good bytes from
/// elsewhere, and the user says what it is.
#[test]
fn an_edit_that_nobody_saw_waits_for_the_user() {
    let scratch = Scratch::new();
    let (a, b) = with_a_copy(&scratch, &["file", "other"]);
    let file = scratch.path("docs/file");
    let (good, old) = (fs::read(&file).unwrap(), blob_of(&file));
    a.stop();
    write_with_kept_mtime(&file, 50_000, b"THE USER'S WORK");
    let edited = fs::read(&file).unwrap();
    a.restart();
    assert_eq!(a.exits(4, ["arena", "scan", "--json"]).summary()["suspected"], 1);
    b.join(&a);
    let suspect = the_suspect(&a);
    assert_eq!(suspect["ranges"], serde_json::json!([[49152, 65536]]));
    assert_eq!(suspect["difference"], "15 B in 1 place");
    assert_eq!(published(&a, "file"), old);
    // Good bytes come from b, and what is here stays.
    assert_eq!(a.ok(["cat", "docs/file"]).stdout, good);
    a.exits(4, ["repair"]);
    assert_eq!(fs::read(&file).unwrap(), edited);
    assert_eq!(a.status()["scrub"]["suspect_files"], 1);

    let accepted = a.ok(["accept", "--json", "docs"]).of_type("accepted");
    assert_eq!(accepted[0]["blob"], blob_of(&file));
    assert_eq!((published(&a, "file"), fs::read(&file).unwrap()), (blob_of(&file), edited.clone()));
    b.hears(&a);
    assert_eq!(b.ok(["cat", "docs/file"]).stdout, edited);
    a.ok(["verify"]);
}

/// The same file, which the user knows to be rotten: it is repaired, what was replaced is kept, and can be put back.
#[test]
fn a_suspect_is_repaired_if_the_user_says_so_and_that_can_be_undone() {
    let scratch = Scratch::new();
    let (a, b) = with_a_copy(&scratch, &["file", "other"]);
    let file = scratch.path("docs/file");
    let (good, mtime) = (fs::read(&file).unwrap(), fs::metadata(&file).unwrap().modified().unwrap());
    a.stop();
    write_with_kept_mtime(&file, 50_000, &[good[50_000] ^ 4]);
    let bad = fs::read(&file).unwrap();
    a.restart();
    b.join(&a);
    assert_eq!(the_suspect(&a)["difference"], "1 bit");
    a.ok(["repair", "--suspect", "docs/file"]);
    assert_eq!(fs::read(&file).unwrap(), good);
    assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), mtime);
    a.ok(["verify"]);

    let history = a.ok(["history", "--json", "docs"]).of_type("change");
    assert!(history.iter().any(|change| change["change"] == "repaired" && change["path"] == "file"), "{history:?}");
    a.ok(["repair", "--undo", "docs/file"]);
    assert_eq!(fs::read(&file).unwrap(), bad);
    // The user's decision is an edit.
    wait_for("what was put back is published", Duration::from_secs(20), || {
        (published(&a, "file") == blob_of(&file)).then_some(())
    });
    a.exits(7, ["repair", "--undo", "docs/other"]);
}

/// A tree that was copied to another disk with its times, where one file went wrong.
#[test]
fn a_copy_that_went_wrong_is_no_edit() {
    let scratch = Scratch::new();
    let (a, b) = with_a_copy(&scratch, &["one", "two", "three"]);
    let root = scratch.path("docs");
    let old = blob_of(&root.join("two"));
    a.stop();
    for name in ["one", "two", "three"] {
        let (from, to) = (root.join(name), root.join("copied"));
        let mtime = fs::metadata(&from).unwrap().modified().unwrap();
        fs::copy(&from, &to).unwrap();
        if name == "two" {
            File::options().write(true).open(&to).unwrap().write_all_at(&[0; 4096], 40_960).unwrap();
        }
        File::options().write(true).open(&to).unwrap().set_modified(mtime).unwrap();
        fs::rename(&to, &from).unwrap();
    }
    a.restart();
    b.join(&a);
    let suspect = the_suspect(&a);
    assert_eq!((&suspect["path"], &suspect["difference"]), (&"two".into(), &"4 KiB of zeros".into()));
    assert_eq!(published(&a, "two"), old);
    a.ok(["repair", "--suspect", "docs"]);
    assert_eq!(blob_of(&root.join("two")), old);
    a.ok(["verify"]);
}

/// Archives with fixed times are unpacked over each other while the daemon watches: all of it is published, and nothing suspect.
#[test]
fn what_is_unpacked_over_older_files_with_the_same_times_is_published() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(499_162_500);
    let unpack = |version: u8, in_place: bool| {
        for number in 0..200 {
            let path = root.join(format!("file{number}"));
            if !in_place {
                let _ = fs::remove_file(&path);
            }
            let file = File::create(&path).unwrap();
            file.write_all_at(&[version; 300], 0).unwrap();
            file.set_modified(then).unwrap();
        }
    };
    unpack(0, false);
    let a = Machine::watching(&scratch, "a", &[&root]);
    for version in 1..5 {
        unpack(version, version % 2 == 0);
        let expected = blob_of(&root.join("file7"));
        wait_for("all of the new version is published", Duration::from_secs(20), || {
            let listed = a.ok(["ls", "-R", "--json", "docs"]).of_type("entry");
            let files: Vec<_> = listed.iter().filter(|entry| entry["kind"] == "file").collect();
            (files.len() == 200 && files.iter().all(|entry| entry["blob"] == *expected)).then_some(())
        });
        a.rests();
        let found = a.ok(["verify", "--json"]).summary();
        assert_eq!((&found["suspect_files"], &found["damaged_files"]), (&0.into(), &0.into()), "{found}");
    }
}

/// Damage that is known stays known when the file is moved out of the arena and back, or the arena is given up and added again.
#[test]
fn known_damage_is_remembered() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let (a, _b) = with_a_copy(&scratch, &["file", "other"]);
    let (root, file) = (scratch.path("docs"), scratch.path("docs/file"));
    let (good, old) = (fs::read(&file).unwrap(), blob_of(&file));
    scratch.rot(&file, &[30_000]);
    a.exits(4, ["verify"]);
    let gone = || wait_for("it is gone", Duration::from_secs(20), || published(&a, "file").is_empty().then_some(()));
    let back = || wait_for("it is back", Duration::from_secs(20), || (published(&a, "file") == old).then_some(()));

    fs::rename(&file, scratch.path("away")).unwrap();
    gone();
    fs::rename(scratch.path("away"), &file).unwrap();
    back();
    assert_eq!(the_suspect(&a)["path"], "file");

    a.ok(["arena", "rm", "docs"]);
    a.ok(["arena".as_ref(), "add".as_ref(), "docs".as_ref(), root.as_os_str()]);
    back();
    assert_eq!(the_suspect(&a)["path"], "file");
    a.ok(["repair", "--suspect", "docs/file"]);
    assert_eq!(fs::read(&file).unwrap(), good);
    a.ok(["verify"]);
}

/// A file that was cut short with its mtime kept, as fsck does.
#[test]
fn a_file_that_was_cut_is_repaired_to_its_length() {
    let scratch = Scratch::new();
    let (a, b) = with_a_copy(&scratch, &["file", "other"]);
    let file = scratch.path("docs/file");
    let good = fs::read(&file).unwrap();
    a.stop();
    let mtime = fs::metadata(&file).unwrap().modified().unwrap();
    let open = File::options().write(true).open(&file).unwrap();
    open.set_len(60_000).unwrap();
    open.set_modified(mtime).unwrap();
    a.restart();
    b.join(&a);
    assert_eq!(a.exits(4, ["arena", "scan", "--json"]).summary()["suspected"], 1);
    the_suspect(&a);
    a.ok(["repair", "--suspect", "docs/file"]);
    assert_eq!(fs::read(&file).unwrap(), good);
    a.ok(["verify"]);
}

/// A file is indexed while a program has it open, and written to again without moving a time: it is read again once it rests.
#[test]
fn a_file_that_is_open_is_read_again() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let path = root.join("file");
    let file = File::create(&path).unwrap();
    file.write_all_at(&[1; 5000], 0).unwrap();
    let a = Machine::watching(&scratch, "a", &[&root]);
    assert_eq!(published(&a, "file"), blob_of(&path));
    let mtime = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[2; 5000], 0).unwrap();
    file.set_modified(mtime).unwrap();
    drop(file);
    wait_for("what was written last is published", Duration::from_secs(20), || {
        (published(&a, "file") == blob_of(&path)).then_some(())
    });
    a.ok(["verify"]);
}
