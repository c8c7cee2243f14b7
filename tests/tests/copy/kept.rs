//! What copies keep of files beside their bytes: holes, extended attributes, ACLs, names of one file; and what is told of
//! what they cannot keep.

use std::{
    fs::{self, File},
    os::unix::{
        fs::{FileExt, MetadataExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, XattrFlags, getxattr, mknodat, setxattr};
use tests::{Machine, QUICK, Scratch, indexed, skipped};

use crate::{WRITERS, failures, open, same, trees::nothing_is_left, two};

/// A file of `bytes` bytes with holes, and a word at each of `at`.
fn sparse(path: &Path, bytes: u64, at: &[u64]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    at.iter().for_each(|&at| file.write_all_at(b"data", at).unwrap());
}

fn kib_on_disk(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() / 2
}

fn set(path: &Path, name: &str, value: &[u8]) -> bool {
    setxattr(path, name, value, XattrFlags::empty()).is_ok()
}

fn value(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut room = vec![0; 64 << 10];
    let bytes = getxattr(path, name, &mut room).ok()?;
    room.truncate(bytes);
    Some(room)
}

/// The file of a blob that is cached.
fn data_file(dir: &Path) -> Option<PathBuf> {
    fs::read_dir(dir).ok()?.find_map(|entry| {
        let path = entry.ok()?.path();
        if path.is_dir() { data_file(&path) } else { path.extension().is_some_and(|ext| ext == "data").then_some(path) }
    })
}

#[test]
fn holes_stay_holes_on_every_way() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    sparse(&docs.join("image"), 64 << 20, &[20 << 20]);
    sparse(&docs.join("with an end"), (8 << 20) + 5, &[0, (8 << 20) + 1]);
    sparse(&docs.join("empty"), 3 << 20, &[]);
    sparse(&docs.join("small"), 900_000, &[400_000]);
    sparse(&docs.join("bundled"), 100_000, &[]);
    // Zeros that take room at the source take none behind it.
    fs::write(docs.join("zeros"), vec![0; 2 << 20]).unwrap();
    if kib_on_disk(&docs.join("image")) > 1024 {
        return skipped("a file system without holes");
    }
    let original = indexed(&docs);
    let is_sparse = |root: &Path| {
        same(&original, root);
        for name in original.keys() {
            let path = root.join(String::from_utf8_lossy(name).as_ref());
            assert!(kib_on_disk(&path) <= 64, "{path:?} takes {} KiB", kib_on_disk(&path));
        }
    };
    // Through the cache, and by way of memory; hardly anything of it travels.
    let summary = a.ok(["cp", "--json", "docs", "b:inbox/pushed"]).summary();
    is_sparse(&inbox.join("pushed"));
    assert!(summary["bytes_sent"].as_u64().unwrap() < 1 << 20, "{summary}");
    // From what is here.
    b.ok(["cp", "inbox/pushed", "inbox/again"]);
    is_sparse(&inbox.join("again"));
    let got = scratch.path("got");
    b.ok(["get", "docs", got.to_str().unwrap()]);
    is_sparse(&got);
    // Onto another file system.
    if let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") {
        let got = elsewhere.path().join("got");
        a.ok(["get", "docs", got.to_str().unwrap()]);
        is_sparse(&got);
    }
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
    nothing_is_left(&b, &inbox);
}

/// What the cache has that rotted is overwritten with zeros, and not left because a hole would do.
#[test]
fn zeros_replace_what_rotted_in_the_cache() {
    let scratch = Scratch::new();
    let (_a, docs, b, _inbox) = two(&scratch);
    sparse(&docs.join("image"), 4 << 20, &[0]);
    b.sees("docs", &docs);
    b.ok(["pin", "docs/image"]);
    let file = File::options().write(true).open(data_file(&b.home().join("cache")).unwrap()).unwrap();
    file.write_all_at(&[7; 50_000], 1 << 20).unwrap();
    drop(file);
    b.exits(4, ["verify"]);
    assert!(b.run(["cat", "docs/image"]).stdout == fs::read(docs.join("image")).unwrap());
}

#[test]
fn attributes_and_acls_come_along() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    fs::create_dir(docs.join("dir")).unwrap();
    for (name, bytes) in [("dir/small", 9), ("dir/middle", 500_000), ("large", 2_000_000), ("plain", 5)] {
        fs::write(docs.join(name), vec![7; bytes]).unwrap();
    }
    // Read for uid 12345 beside what the mode says: version 2, then entries of tag, permissions and id.
    let entry =
        |tag: u16, mode: u16, id: u32| [&tag.to_le_bytes()[..], &mode.to_le_bytes(), &id.to_le_bytes()].concat();
    let none = u32::MAX;
    let entries = [(1, 6, none), (2, 4, 12345), (4, 4, none), (16, 4, none), (32, 0, none)];
    let acl = [vec![2, 0, 0, 0], entries.map(|(tag, mode, id)| entry(tag, mode, id)).concat()].concat();
    let (tags, acls) = ("user.tags", "system.posix_acl_access");
    for name in ["dir", "dir/small", "dir/middle", "large"] {
        if !set(&docs.join(name), tags, b"red\0and blue") {
            return skipped("no extended attributes here");
        }
    }
    let has_acls = set(&docs.join("large"), acls, &acl);
    let original = indexed(&docs);
    let has_all = |root: &Path, dirs: bool| {
        for name in ["dir/small", "dir/middle", "large"].into_iter().chain(dirs.then_some("dir")) {
            assert_eq!(value(&root.join(name), tags).as_deref(), Some(&b"red\0and blue"[..]), "{name}");
        }
        assert!(!has_acls || value(&root.join("large"), acls) == Some(acl.clone()));
        assert_eq!(value(&root.join("plain"), tags), None);
        same(&original, root);
    };
    let summary = a.ok(["cp", "--json", "docs", "b:inbox/copied"]).summary();
    assert_eq!(summary["files_without_attributes"], 0, "{summary}");
    has_all(&inbox.join("copied"), true);
    let got = scratch.path("got");
    b.ok(["get", "docs", got.to_str().unwrap()]);
    has_all(&got, false);
    b.ok(["cp", "inbox/copied", "inbox/within"]);
    has_all(&inbox.join("within"), true);
    // What is there with the same bytes and other attributes is no reason to let go of the source.
    fs::create_dir(inbox.join("moved")).unwrap();
    fs::copy(docs.join("large"), inbox.join("moved/large")).unwrap();
    let output = a.exits(3, ["mv", "--json", "docs", "b:inbox/moved"]);
    let failed = failures(&output);
    assert_eq!(failed.len(), 1, "{}", output.text());
    assert!(failed[0].0 == "docs/large" && failed[0].1.contains("extended attributes"), "{failed:?}");
    assert!(docs.join("large").exists() && !docs.join("dir").exists());
    a.ok(["mv", "--overwrite", "docs", "b:inbox/moved"]);
    has_all(&inbox.join("moved"), true);
    assert_eq!(fs::read_dir(&docs).unwrap().count(), 0);
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
}

/// Attributes that the destination cannot take are told of each file, and keep a move from removing it, unless it is told
/// not to care.
#[test]
fn what_is_not_kept_is_told_and_stays() {
    let scratch = Scratch::new();
    let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else { return skipped("no /dev/shm") };
    let docs = elsewhere.path().join("docs");
    fs::create_dir(&docs).unwrap();
    for name in ["long", "too long", "short"] {
        fs::write(docs.join(name), name).unwrap();
    }
    let inbox = scratch.dir("inbox");
    // One that ext4 has no room for, and one that no order has.
    let are_set = set(&docs.join("long"), "user.x", &[7; 20_000])
        && set(&docs.join("too long"), "user.x", &[7; 33_000])
        && set(&docs.join("short"), "user.x", b"7");
    fs::write(inbox.join("try"), b"").unwrap();
    if !are_set || set(&inbox.join("try"), "user.x", &[7; 20_000]) {
        return skipped("no file systems with and without room for extended attributes");
    }
    fs::remove_file(inbox.join("try")).unwrap();
    let (a, b) = (open(&scratch, "a", &docs), open(&scratch, "b", &inbox));
    a.join(&b);
    let output = a.ok(["cp", "--json", "docs", "b:inbox"]);
    assert_eq!(output.summary()["files_without_attributes"], 2);
    for line in output.of_type("copied") {
        let lost = line["not_kept"].as_array().map_or(0, Vec::len);
        assert_eq!(lost, usize::from(line["source"] != "docs/short"), "{line}");
    }
    let got = scratch.path("got");
    let output = a.ok(["get", "docs", got.to_str().unwrap()]);
    assert!(output.stderr.contains("2 files without their extended attributes"), "{}", output.text());
    let output = a.exits(3, ["mv", "--json", "docs", "b:inbox"]);
    let mut stay: Vec<_> = failures(&output).into_iter().map(|(source, _)| source).collect();
    stay.sort();
    assert_eq!(stay, ["docs/long", "docs/too long"], "{}", output.text());
    assert!(docs.join("long").exists() && docs.join("too long").exists() && !docs.join("short").exists());
    // A machine that is told to leave them.
    let config = format!("{QUICK}{WRITERS}[copy]\nattributes = false\n");
    let c = Machine::up_with_config::<&Path>(&scratch, "c", &[], &config);
    c.join(&a);
    c.join(&b);
    c.sees("docs", &docs);
    let output = c.ok(["mv", "a:docs", "b:inbox"]);
    assert!(output.stderr.contains("2 files without their extended attributes"), "{}", output.text());
    assert_eq!(fs::read_dir(&docs).unwrap().count(), 0);
}

#[test]
fn names_of_one_file_stay_names_of_one_file() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    fs::create_dir(docs.join("d")).unwrap();
    for (name, bytes) in [("small", 100), ("large", 1_500_000)] {
        fs::write(docs.join(name), vec![7; bytes]).unwrap();
        (0..3).for_each(|number| fs::hard_link(docs.join(name), docs.join(format!("d/{name} {number}"))).unwrap());
    }
    // The same bytes, and another file.
    fs::write(docs.join("d/small too"), vec![7; 100]).unwrap();
    let inode = |root: &Path, name: &str| fs::metadata(root.join(name)).unwrap().ino();
    let are_linked = |root: &Path| {
        for name in ["small", "large"] {
            for number in 0..3 {
                assert_eq!(inode(root, &format!("d/{name} {number}")), inode(root, name), "{root:?} {name} {number}");
            }
        }
        assert_ne!(inode(root, "d/small too"), inode(root, "small"));
    };
    let original = indexed(&docs);
    a.ok(["arena", "scan", "docs"]);
    let summary = a.ok(["cp", "--json", "docs", "b:inbox/copied"]).summary();
    assert_eq!((&summary["files"], &summary["hard_links"]), (&9.into(), &6.into()), "{summary}");
    assert!(summary["bytes_sent"].as_u64().unwrap() < 1_700_000, "{summary}");
    are_linked(&inbox.join("copied"));
    same(&original, &inbox.join("copied"));
    // Nothing of it is read again, and all of it is what was published.
    b.rests();
    assert_eq!(b.kept_up(0).0, 0, "{}", b.log());
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
    let got = scratch.path("got");
    let output = b.ok(["get", "docs", got.to_str().unwrap()]);
    assert!(output.stderr.contains("hard links: 6"), "{}", output.text());
    are_linked(&got);
    same(&original, &got);
    // In place of others.
    fs::create_dir_all(inbox.join("moved/d")).unwrap();
    fs::write(inbox.join("moved/d/small 0"), b"other").unwrap();
    fs::write(inbox.join("moved/d/small 1"), b"other").unwrap();
    let summary = a.ok(["mv", "--overwrite", "--json", "docs", "b:inbox/moved"]).summary();
    assert_eq!(summary["hard_links"], 6, "{summary}");
    are_linked(&inbox.join("moved"));
    same(&original, &inbox.join("moved"));
    assert_eq!(fs::read_dir(&docs).unwrap().count(), 0);
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
    nothing_is_left(&b, &inbox);
}

#[test]
fn special_files_are_counted() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    fs::create_dir(docs.join("d")).unwrap();
    fs::write(docs.join("d/file"), b"x").unwrap();
    mknodat(CWD, docs.join("d/fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let _socket = UnixListener::bind(docs.join("d/socket")).unwrap();
    mknodat(CWD, docs.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    // Here it is looked at what is there; elsewhere the last look counts.
    let output = a.ok(["cp", "docs/d", "b:inbox"]);
    assert!(output.stderr.contains("left out: 2 special files"), "{}", output.text());
    a.ok(["arena", "scan", "docs"]);
    b.hears(&a);
    let output = b.ok(["cp", "a:docs", "inbox/all"]);
    assert!(output.stderr.contains("left out: 3 special files"), "{}", output.text());
    let got = scratch.path("got");
    assert_eq!(b.ok(["get", "--json", "docs", got.to_str().unwrap()]).summary()["special_files"], 3);
    assert_eq!(fs::read_dir(inbox.join("d")).unwrap().count(), 1);
}
