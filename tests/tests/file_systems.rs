//! What the daemon makes of renames, replaced and edited files, and disks that come and go, on every kind of file system: each
//! one tells something else of its files.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use tests::{
    FileSystem,
    FileSystemKind::{self, Bindfs, Btrfs, Exfat, Ext4, Overlay, Sshfs, Tmpfs, Xfs},
    Machine, Mtime, Scratch, set_mtime, skipped, wait_for,
};
use tree::BlobId;

/// One test for each file system, with its cases.
macro_rules! file_systems {
    ($($name:ident: $kind:expr, $($cases:expr),*;)*) => {
        $(#[test]
        fn $name() {
            run($kind, &[$(cases!($cases)),*]);
        })*
    };
}

macro_rules! cases {
    ($case:expr) => {
        (stringify!($case), $case as fn(&mut OnDisk))
    };
}

file_systems! {
    ext4:    Ext4,    renamed, replaced, remounted, written_twice, edited, edited_unseen, both_cases_arrive;
    btrfs:   Btrfs,   renamed, replaced, remounted, written_twice, edited, edited_unseen, both_cases_arrive;
    xfs:     Xfs,     renamed, replaced, remounted, written_twice, edited, edited_unseen, both_cases_arrive;
    tmpfs:   Tmpfs,   renamed, replaced, remounted, written_twice, edited, edited_unseen, both_cases_arrive;
    overlay: Overlay, renamed, replaced, remounted, written_twice, edited, edited_unseen, both_cases_arrive;
    bindfs:  Bindfs,  renamed, replaced, remounted, written_twice, edited, edited_unseen, both_cases_arrive;
    sshfs:   Sshfs,   renamed, replaced, remounted, written_twice, edited, edited_unseen, both_cases_arrive;
    exfat:   Exfat,   renamed, replaced, remounted, written_twice, edited, edited_unseen, one_case_arrives;
}

/// A name, and what is to be shown.
type Case = (&'static str, fn(&mut OnDisk));

/// Runs each case on a new file system, and fails if one of them has failed.
fn run(kind: FileSystemKind, cases: &[Case]) {
    let mut failed = Vec::new();
    for (name, case) in cases {
        let scratch = Scratch::new();
        let disk = match FileSystem::new(kind, &scratch) {
            Ok(disk) => disk,
            Err(why) => return skipped(&format!("{kind:?} cannot be mounted: {why}")),
        };
        if catch_unwind(AssertUnwindSafe(|| case(&mut OnDisk::new(disk, scratch)))).is_err() {
            failed.push(*name);
        }
    }
    assert!(failed.is_empty(), "on {kind:?}: {failed:?}");
}

/// A machine whose arena `docs` is a file system.
struct OnDisk {
    // Dropped first, for its directories are on the disk.
    a: Machine,
    disk: FileSystem,
    scratch: Scratch,
}

impl OnDisk {
    /// Starts the machine, with four files that are known.
    fn new(disk: FileSystem, scratch: Scratch) -> Self {
        for (name, seed) in [("one", 1), ("dir/two", 2), ("dir/deep/three", 3), ("four", 4)] {
            let path = disk.root().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes(seed)).unwrap();
            set_mtime(&path, THEN);
        }
        let a = Machine::up_with_config(&scratch, "a", &[disk.root()], CONFIG);
        let this = Self { a, disk, scratch };
        this.shows_all();
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.disk.root().join(name)
    }

    /// The blob that is published at a path; empty if there is none.
    fn published(&self, name: &str) -> String {
        let stat = self.a.run(["stat", "--json", &format!("docs/{name}")]);
        let stat: Value = serde_json::from_slice(&stat.stdout).unwrap_or_default();
        stat["blob"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits until exactly what is on the disk is listed.
    #[track_caller]
    fn shows_all(&self) {
        self.a.sees("docs", self.disk.root());
    }

    /// Waits until the arena is in this state.
    #[track_caller]
    fn becomes(&self, state: &str) {
        wait_for(&format!("the arena is {state}"), LIMIT, || {
            (self.a.status()["arenas"][0]["status"]["state"] == state).then_some(())
        });
    }

    /// All files are read, and have the bytes that are published.
    #[track_caller]
    fn all_is_sound(&self) {
        let found = self.a.ok(["verify", "--json"]);
        let summary = found.summary();
        let counts = ["damaged_files", "suspect_files"].map(|field| summary[field].as_u64());
        assert_eq!(counts, [Some(0), Some(0)], "{}", found.text());
    }

    /// A machine that can write to this one, and holds `root`.
    fn other(&self, root: &Path) -> Machine {
        let b = Machine::up_with_config(&self.scratch, "b", &[root], CONFIG);
        b.join(&self.a);
        b
    }
}

/// Files and a directory that are renamed have the blobs that they had.
fn renamed(on: &mut OnDisk) {
    for (from, to) in [("one", "first"), ("dir", "moved"), ("four", "moved/deep/four")] {
        fs::rename(on.path(from), on.path(to)).unwrap();
    }
    on.shows_all();
    for (name, seed) in [("first", 1), ("moved/two", 2), ("moved/deep/three", 3), ("moved/deep/four", 4)] {
        assert_eq!(on.published(name), BlobId::of(&bytes(seed)).to_string(), "{name}");
        assert!(on.a.ok(["cat", &format!("docs/{name}")]).stdout == bytes(seed), "{name}");
    }
    for gone in ["one", "dir", "dir/two", "dir/deep/three", "four"] {
        on.a.exits(7, ["stat", &format!("docs/{gone}")]);
    }
    on.all_is_sound();
}

/// Files of the same size and mtime take the place of others, known to the daemon before or not.
fn replaced(on: &mut OnDisk) {
    for (round, name) in ["one", "dir/two", "one"].into_iter().enumerate() {
        let (new, seed) = (on.path("new"), 10 + round as u64);
        fs::write(&new, bytes(seed)).unwrap();
        set_mtime(&new, THEN);
        if round == 1 {
            on.shows_all();
        }
        fs::rename(&new, on.path(name)).unwrap();
        on.a.ok(["arena", "scan", "docs"]);
        on.shows_all();
        assert_eq!(on.published(name), BlobId::of(&bytes(seed)).to_string(), "{name}");
        on.all_is_sound();
        on.a.ok(["repair"]);
        assert!(fs::read(on.path(name)).unwrap() == bytes(seed), "{name}");
    }
}

/// What is not mounted is not deleted, and is what it was when it comes back.
fn remounted(on: &mut OnDisk) {
    let seq = on.a.status()["seq"].to_string();
    let before = on.a.listed("docs");
    on.a.rests();
    on.disk.unmount();
    on.becomes("offline");
    on.a.exits(1, ["arena", "scan", "docs"]);
    assert_eq!(on.a.listed("docs"), before);
    on.a.exits(6, ["cat", "docs/one"]);
    on.disk.mount();
    on.becomes("up to date");
    on.a.rests();
    on.a.ok(["arena", "scan", "docs"]);
    assert_eq!(on.a.listed("docs"), before);
    let history = on.a.ok(["history", "--json", "--since", &seq]).of_type("change");
    assert!(history.is_empty(), "{history:?}");
    on.all_is_sound();
    // And it is watched.
    fs::write(on.path("new"), "new").unwrap();
    on.shows_all();
}

/// A program writes and puts the mtime back before the watcher's eyes.
fn edited(on: &mut OnDisk) {
    let path = on.path("dir/two");
    write_with_kept_mtime(&path);
    let edited = fs::read(&path).unwrap();
    on.shows_all();
    assert_eq!(on.published("dir/two"), BlobId::of(&edited).to_string());
    on.all_is_sound();
    on.a.ok(["repair"]);
    assert!(fs::read(&path).unwrap() == edited);
}

/// The same while no daemon runs: nobody can tell it from rot, and nobody overwrites it.
fn edited_unseen(on: &mut OnDisk) {
    let copy = on.scratch.path("copy");
    let b = on.other(&on.scratch.dir("unused"));
    b.ok(["get".as_ref(), "docs".as_ref(), copy.as_os_str()]);
    b.ok(["arena".as_ref(), "add".as_ref(), "copy".as_ref(), copy.as_os_str()]);
    on.a.stop();
    let path = on.path("dir/two");
    write_with_kept_mtime(&path);
    let edited = fs::read(&path).unwrap();
    on.a.restart();
    b.join(&on.a);
    on.a.run(["arena", "scan", "docs"]);
    // It reads everything, and so finds it in any case.
    let found = on.a.run(["verify", "--json"]);
    let is_published = on.published("dir/two") == BlobId::of(&edited).to_string();
    assert_eq!(found.code, if is_published { 0 } else { 4 }, "{}{}", found.text(), found.stderr);
    let (damaged, suspect) = (&found.summary()["damaged_files"], &found.summary()["suspect_files"]);
    assert_eq!((damaged, suspect), (&0.into(), &u64::from(!is_published).into()), "{}", found.text());
    let read = on.a.ok(["cat", "docs/dir/two"]).stdout;
    assert!(read == if is_published { edited.clone() } else { bytes(2) });
    on.a.run(["repair"]);
    on.a.run(["verify"]);
    assert!(fs::read(&path).unwrap() == edited, "the edit was overwritten");
}

/// Writes of one size follow each other at once, with an mtime that is one and the same: the last one counts.
fn written_twice(on: &mut OnDisk) {
    let path = on.path("one");
    for seed in [20, 30, 40] {
        for seed in [seed, seed + 1] {
            fs::write(&path, bytes(seed)).unwrap();
            set_mtime(&path, THEN);
            if seed % 2 == 0 {
                on.a.ok(["arena", "scan", "docs"]);
            }
        }
        on.shows_all();
        assert_eq!(on.published("one"), BlobId::of(&bytes(seed + 1)).to_string());
    }
    on.a.rests();
    on.all_is_sound();
    assert!(on.a.ok(["cat", "docs/one"]).stdout == bytes(41));
}

/// Two names that differ in case alone are two files.
fn both_cases_arrive(on: &mut OnDisk) {
    let (b, source) = with_two_cases(on);
    b.ok(["cp", "source", "a:docs/copied"]);
    b.ok(["get".as_ref(), "source".as_ref(), on.path("got").as_os_str()]);
    for name in ["Photo", "photo"] {
        for dir in ["copied", "got"] {
            let arrived = fs::read(on.path(dir).join(name)).unwrap();
            assert!(arrived == fs::read(source.join(name)).unwrap(), "{dir}/{name}");
        }
    }
    on.shows_all();
    on.all_is_sound();
}

/// Two names that differ in case alone are one: the file that came first stays, and the other is refused.
fn one_case_arrives(on: &mut OnDisk) {
    let (b, source) = with_two_cases(on);
    b.exits(3, ["cp", "source", "a:docs/copied"]);
    b.exits(3, ["get".as_ref(), "source".as_ref(), on.path("got").as_os_str()]);
    for dir in ["copied", "got"] {
        let entries = fs::read_dir(on.path(dir)).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        assert_eq!(entries.len(), 1, "{entries:?}");
        let original = source.join(entries[0].file_name().unwrap());
        assert!(fs::read(&entries[0]).unwrap() == fs::read(original).unwrap(), "{entries:?}");
    }
    on.shows_all();
    on.all_is_sound();
}

/// A machine that holds `source`, with two such names.
fn with_two_cases(on: &OnDisk) -> (Machine, PathBuf) {
    let source = on.scratch.dir("source");
    fs::write(source.join("Photo"), "upper case").unwrap();
    fs::write(source.join("photo"), "lower case, and longer").unwrap();
    (on.other(&source), source)
}

/// Writes into the middle of a file, and puts its mtime back.
fn write_with_kept_mtime(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(b"THE USER'S WORK", 50_000).unwrap();
    drop(file);
    set_mtime(path, THEN);
}

/// 100,000 bytes, others for each seed.
fn bytes(seed: u64) -> Vec<u8> {
    tests::random_bytes(100_000, &mut fastrand::Rng::with_seed(seed))
}

const CONFIG: &str =
    "[watch]\nsettle = \"100ms\"\nsettle_max = \"1s\"\n[roles]\na = { writer = [\"*\"] }\nb = { writer = [\"*\"] }\n";
/// A time that all of them can record.
const THEN: Mtime = Mtime(1_600_000_000, 0);
const LIMIT: Duration = Duration::from_secs(30);
