//! What happens in an arena's directory is what the other machine sees after a scan: no more, no less, and nothing is
//! taken for deleted that is only out of reach.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::Path,
    time::Duration,
};

use serde_json::Value;
use tests::{Item, Machine, Mtime, Scratch, indexed, path_of, set_mtime, wait_for};

#[test]
fn changes_of_every_kind_are_published() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    for name in ["edited", "same size", "deleted", "renamed", "chmodded", "touched", "becomes dir", "becomes link"] {
        fs::write(root.join(name), name).unwrap();
    }
    for name in ["dir/one", "dir/two", "replaced dir/file", "moved dir/deep/file"] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), name).unwrap();
    }
    for (name, target) in [("link", "edited"), ("link becomes file", "x"), ("unchanged link", "x")] {
        symlink(target, root.join(name)).unwrap();
    }
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    same(&b, &root);

    fs::write(root.join("edited"), "edited to be longer").unwrap();
    fs::write(root.join("same size"), "SAME SIZE").unwrap();
    fs::remove_file(root.join("deleted")).unwrap();
    fs::rename(root.join("renamed"), root.join("new name")).unwrap();
    fs::set_permissions(root.join("chmodded"), fs::Permissions::from_mode(0o700)).unwrap();
    set_mtime(&root.join("touched"), Mtime(1_000_000_000, 5));
    fs::remove_file(root.join("becomes dir")).unwrap();
    fs::create_dir(root.join("becomes dir")).unwrap();
    fs::write(root.join("becomes dir/file"), "inside").unwrap();
    fs::remove_file(root.join("becomes link")).unwrap();
    symlink("edited", root.join("becomes link")).unwrap();
    fs::remove_dir_all(root.join("dir")).unwrap();
    fs::remove_dir_all(root.join("replaced dir")).unwrap();
    fs::write(root.join("replaced dir"), "a file now").unwrap();
    fs::rename(root.join("moved dir"), root.join("there now")).unwrap();
    fs::remove_file(root.join("link")).unwrap();
    symlink("elsewhere", root.join("link")).unwrap();
    fs::remove_file(root.join("link becomes file")).unwrap();
    fs::write(root.join("link becomes file"), "a file now").unwrap();
    fs::write(root.join("new"), "").unwrap();
    let scanned = a.ok(["arena", "scan", "--json"]).summary();
    assert_eq!(scanned["suspected"], 0, "{scanned}");
    b.hears(&a);
    same(&b, &root);
    for gone in ["deleted", "renamed", "dir/one", "dir/two", "replaced dir/file", "moved dir/deep/file"] {
        b.exits(7, ["stat", &format!("docs/{gone}")]);
        b.exits(7, ["cat", &format!("docs/{gone}")]);
    }
    b.ok([Path::new("get"), "docs".as_ref(), &scratch.path("copy")]);
    assert_eq!(
        tests::differences(
            &tests::without_link_times(indexed(&root)),
            &tests::without_link_times(indexed(&scratch.path("copy")))
        ),
        [""; 0]
    );

    // A scan that finds nothing says nothing.
    let seq = a.status()["seq"].clone();
    let scanned = a.ok(["arena", "scan", "--json"]).summary();
    assert_eq!((&scanned["hashed_files"], &scanned["deleted"]), (&0.into(), &0.into()), "{scanned}");
    assert_eq!(a.status()["seq"], seq);
    // What comes back comes back, and a scan at the start of the daemon finds it too.
    a.stop();
    fs::write(root.join("deleted"), "again").unwrap();
    fs::remove_file(root.join("new")).unwrap();
    a.restart();
    wait_for("what changed meanwhile is known", Duration::from_secs(30), || {
        (a.run(["stat", "docs/deleted"]).code == 0 && a.run(["stat", "docs/new"]).code == 7).then_some(())
    });
    b.hears(&a);
    same(&b, &root);
}

/// The directory is gone, or suddenly empty: its disk is not mounted, and nothing was deleted.
#[test]
fn a_root_that_is_away_deletes_nothing() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    for name in ["one", "two", "dir/three"] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), name).unwrap();
    }
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let before = listing(&b);
    fs::rename(&root, scratch.path("away")).unwrap();
    let refused = a.exits(1, ["arena", "scan"]);
    assert!(refused.stderr.contains("is its disk mounted?"), "{}", refused.stderr);
    b.hears(&a);
    assert_eq!(listing(&b), before);
    // What cannot be read is not served, and says so.
    b.exits(6, ["cat", "docs/one"]);

    fs::create_dir(&root).unwrap();
    let refused = a.exits(1, ["arena", "scan"]);
    assert!(refused.stderr.contains("is its disk mounted?"), "{}", refused.stderr);
    b.hears(&a);
    assert_eq!(listing(&b), before);
    a.stop();
    a.restart();
    b.hears(&a);
    assert_eq!(listing(&b), before, "nor at the start of the daemon");

    fs::remove_dir(&root).unwrap();
    fs::rename(scratch.path("away"), &root).unwrap();
    let scanned = a.ok(["arena", "scan", "--json"]).summary();
    assert_eq!((&scanned["files"], &scanned["deleted"]), (&3.into(), &0.into()), "{scanned}");
    assert_eq!(b.ok(["cat", "docs/one"]).stdout, b"one");
}

/// A file that rots, and of which then attributes change before the watcher's eyes, was edited by nobody, also if the kernel
/// tells nothing of it (inode flags). By another name elsewhere it can be written to unseen.
#[test]
fn rot_is_told_from_edits() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let root = scratch.dir("docs");
    let names = ["rots", "rots and is chmodded", "rots and has a flag", "rots and is linked", "rots and is both"];
    for name in names {
        fs::write(root.join(name), name.repeat(3000)).unwrap();
    }
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let before = listing(&b);
    for name in names {
        scratch.rot(&root.join(name), &[20]);
    }
    let flagged = fs::File::open(root.join("rots and has a flag")).unwrap();
    let flags = rustix::fs::ioctl_getflags(&flagged).unwrap() | rustix::fs::IFlags::NODUMP;
    rustix::fs::ioctl_setflags(&flagged, flags).unwrap();
    drop(flagged);
    for name in ["rots and is linked", "rots and is both"] {
        fs::hard_link(root.join(name), scratch.path(name)).unwrap();
    }
    for name in ["rots and is chmodded", "rots and is both"] {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    // A scan reads what moved; the rest is for verify.
    for _ in 0..2 {
        let scanned = a.exits(4, ["arena", "scan", "--json"]).summary();
        assert_eq!(scanned["suspected"], 2, "{scanned}");
    }
    assert_eq!(unsound_files(&a), (3, 2));
    b.hears(&a);
    let after = listing(&b);
    for (path, entry) in &before {
        assert_eq!(after[path]["blob"], entry["blob"], "{}", String::from_utf8_lossy(path));
    }
    // What is replaced by a sound file is an edit, and the damage is over.
    fs::write(scratch.path("new"), "new").unwrap();
    fs::rename(scratch.path("new"), root.join("rots and is linked")).unwrap();
    a.exits(4, ["arena", "scan"]);
    b.hears(&a);
    assert_eq!(b.ok(["cat", "docs/rots and is linked"]).stdout, b"new");
    assert_eq!(unsound_files(&a), (3, 1));
}

/// How many files `verify` finds damaged, and how many suspect.
#[track_caller]
fn unsound_files(machine: &Machine) -> (u64, u64) {
    let found = machine.exits(4, ["verify", "--json"]).summary();
    let count = |field: &str| found[field].as_u64().unwrap();
    (count("damaged_files"), count("suspect_files"))
}

/// A program that writes and puts the mtime back was seen to write.
#[test]
fn an_edit_that_keeps_the_mtime_is_published() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    fs::write(root.join("file"), "x".repeat(50_000)).unwrap();
    let a = Machine::up(&scratch, "a", &[&root]);
    let mtime = fs::metadata(root.join("file")).unwrap().modified().unwrap();
    let file = fs::File::options().write(true).open(root.join("file")).unwrap();
    file.write_all_at(b"edited", 20).unwrap();
    file.set_modified(mtime).unwrap();
    // Before any scan, too: verify knows what the watcher saw.
    let found = a.ok(["verify", "--json"]).summary();
    assert_eq!((&found["suspect_files"], &found["modified_files"]), (&0.into(), &1.into()), "{found}");
    a.ok(["arena", "scan"]);
    let edited = tree::BlobId::of(&fs::read(root.join("file")).unwrap()).to_string();
    assert_eq!(listing(&a)[&b"file"[..]]["blob"], edited);
    a.ok(["verify"]);
}

/// Giving an arena up withdraws it, and touches no file.
#[test]
fn an_arena_that_is_given_up_is_withdrawn() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    fs::write(root.join("file"), "here to stay").unwrap();
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    a.ok(["arena", "rm", "docs"]);
    b.hears(&a);
    assert!(listing(&b).is_empty());
    assert_eq!(fs::read(root.join("file")).unwrap(), b"here to stay");
    a.ok([Path::new("arena"), "add".as_ref(), "docs".as_ref(), &root]);
    b.hears(&a);
    same(&b, &root);
    assert_eq!(b.ok(["cat", "docs/file"]).stdout, b"here to stay");
}

/// All leaves that a machine lists, by path.
#[track_caller]
fn listing(machine: &Machine) -> BTreeMap<Vec<u8>, Value> {
    let entries = machine.ok(["ls", "-R", "--json"]).of_type("entry").into_iter();
    let leaves = entries.filter(|entry| entry["kind"] == "file" || entry["kind"] == "symlink");
    leaves.map(|entry| (path_of(&entry), entry)).collect()
}

/// What `machine` lists is what is below `root`.
#[track_caller]
fn same(machine: &Machine, root: &Path) {
    let mut listed = BTreeMap::new();
    for (path, entry) in listing(machine) {
        let mtime = Mtime::from_json(entry["mtime"].as_str().unwrap());
        let what = match entry["kind"].as_str() {
            Some("file") => entry["blob"].as_str().unwrap().to_owned(),
            _ => entry["target"]["path"].as_str().unwrap().to_owned(),
        };
        listed.insert(String::from_utf8(path).unwrap(), (what, mtime));
    }
    let mut expected = BTreeMap::new();
    for (path, item) in indexed(root) {
        let said = match item {
            Item::File { blob, mtime, .. } => (blob.to_string(), mtime),
            Item::Symlink { target, mtime } => (String::from_utf8(target).unwrap(), mtime),
            Item::Directory | Item::Special => continue,
        };
        expected.insert(String::from_utf8(path).unwrap(), said);
    }
    assert_eq!(listed, expected);
}

/// Whoever joins and goes on at once, as people do who paste commands, finds everything there.
#[test]
fn what_the_other_machine_has_is_there_when_join_returns() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    for number in 0..5000 {
        fs::write(root.join(number.to_string()), format!("file {number}")).unwrap();
    }
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    let ticket = a.ok(["invite", "--json"]).json()[0]["ticket"].as_str().expect("a ticket").to_owned();
    assert_eq!(b.ok(["join", "--json", &ticket]).json()[0]["catalog_complete"], true);
    assert_eq!(b.ok(["ls", "-R", "--json", "docs"]).json().len(), 5000);
}

/// What is said and not linked, because its row was lost, is hashed again by the next scan, and served; unless it rotted
/// meanwhile.
#[test]
fn a_lost_row_is_made_anew() {
    const FILES: redb::TableDefinition<(u32, &[u8]), &[u8]> = redb::TableDefinition::new("store.files");
    let Some(scratch) = Scratch::that_rots() else { return };
    let root = scratch.dir("docs");
    for name in ["one", "three", "two", "zero"] {
        fs::write(root.join(name), format!("this is {name}")).unwrap();
    }
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    a.stop();
    let db = redb::Database::open(a.home().join("state/blobd.redb")).unwrap();
    let txn = db.begin_write().unwrap();
    for name in ["two", "zero"] {
        assert!(txn.open_table(FILES).unwrap().remove((0, name.as_bytes())).unwrap().is_some());
    }
    txn.commit().unwrap();
    drop(db);
    scratch.rot(&root.join("zero"), &[3]);
    a.restart();
    wait_for("the file is read at its holder", Duration::from_secs(30), || {
        (b.run(["cat", "docs/two"]).stdout == b"this is two").then_some(())
    });
    b.exits(6, ["cat", "docs/zero"]);
    let scanned = a.exits(4, ["arena", "scan", "--json"]).summary();
    assert_eq!((&scanned["files"], &scanned["suspected"]), (&4.into(), &1.into()), "{scanned}");
}
