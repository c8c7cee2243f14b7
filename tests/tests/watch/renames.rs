//! What is renamed is known already: it is not read again, and it is shown under its new name before the old one goes.

use std::{collections::BTreeMap, fs};

use fastrand::Rng;
use tests::{path_of, write_random};

use crate::{Watched, history, seq, shows, write};

#[test]
fn into_within_out_of_and_onto() {
    let w = Watched::new(|root| {
        for name in ["file", "onto", "target", "dir/sub/deep", "dir/file", "leaves", "full/x", "out/y/z"] {
            write(root.join(name), name);
        }
        fs::create_dir_all(root.join("empty")).unwrap();
    });
    let b = w.other();
    let outside = w.scratch.dir("outside");
    let from = w.a.log().len();
    let moves = [("file", "renamed"), ("onto", "target"), ("dir", "there"), ("there/sub", "sub"), ("full", "empty")];
    for (old, new) in moves {
        fs::rename(w.path(old), w.path(new)).unwrap();
        w.shows_all();
    }
    w.a.rests();
    // Neither what was moved nor what was moved onto was read.
    assert_eq!(w.a.kept_up(from).0, 0, "files were hashed");
    fs::rename(w.path("leaves"), outside.join("left")).unwrap();
    fs::rename(w.path("out"), outside.join("out")).unwrap();
    w.shows_all();
    // What moved out is watched no longer, and changes there are not taken for changes at the old path.
    write(outside.join("out/y/new"), "new");
    fs::rename(outside.join("left"), w.path("back")).unwrap();
    fs::rename(outside.join("out"), w.path("sub/out")).unwrap();
    w.shows_all();
    write(w.path("sub/out/y/watched"), "watched again");
    w.shows_all();
    // Both at once, and a swap by a third name.
    for (old, new) in [("renamed", "third"), ("target", "renamed"), ("third", "target")] {
        fs::rename(w.path(old), w.path(new)).unwrap();
    }
    for (old, new) in [("there", "third"), ("sub", "there"), ("third", "sub")] {
        fs::rename(w.path(old), w.path(new)).unwrap();
    }
    w.shows_all();
    write(w.path("sub/after"), "after the swap");
    write(w.path("there/after"), "after the swap too");
    w.shows_all();
    shows(&b, &w.root);
    assert_eq!(w.a.ok(["arena", "scan", "--json"]).summary()["hashed_files"], 0);
}

/// A directory of 2,000 files: nothing is read, and nothing is ever missing.
#[test]
fn a_large_directory() {
    let w = Watched::new(|root| {
        for number in 0..2000 {
            write(root.join(format!("dir/{}/{number}", number % 20)), format!("file {number}"));
        }
    });
    let b = w.other();
    let (from, before) = (w.a.log().len(), seq(&w.a));
    fs::rename(w.path("dir"), w.path("renamed")).unwrap();
    w.shows_all();
    shows(&b, &w.root);
    w.a.rests();
    assert_eq!(w.a.kept_up(from), (0, 2000, 2000 + 21), "hashed, moved, deleted");
    let mut new = BTreeMap::new();
    for change in history(&w.a, before) {
        let (path, at) = (path_of(&change), change["seq"].as_u64().unwrap());
        match change["change"].as_str() {
            Some("deleted") => {
                let path = path.strip_prefix(b"dir").expect("only what was there is deleted");
                if let Some(name) = path.strip_prefix(b"/").filter(|name| name.contains(&b'/')) {
                    assert!(new.remove(name).is_some_and(|new| new < at), "deleted before it was elsewhere: {change}");
                }
            }
            _ => drop(new.insert(path.strip_prefix(b"renamed/").expect("only what is there is new").to_vec(), at)),
        }
    }
    assert!(new.is_empty(), "{new:?} are not deleted");
    assert_eq!(w.a.ok(["arena", "scan", "--json"]).summary()["hashed_files"], 0);
}

/// As downloads end: under another name, and with another mtime a moment later.
#[test]
fn a_large_file_is_not_read() {
    const SIZE: u64 = 64 << 20;
    let w = Watched::new(|root| {
        // Into a directory that is not yet watched, nobody sees it come.
        fs::create_dir(root.join("dir")).unwrap();
        write_random(&root.join("big"), SIZE, &mut Rng::with_seed(1));
    });
    let read = || {
        let io = fs::read_to_string(format!("/proc/{}/io", w.a.pid())).expect("the daemon runs");
        let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("it has read");
        line.parse::<u64>().expect("a number")
    };
    let (from, before) = (w.a.log().len(), read());
    for (old, new) in [("big", "renamed"), ("renamed", "dir/renamed"), ("dir/renamed", "big")] {
        fs::rename(w.path(old), w.path(new)).unwrap();
        w.shows_all();
    }
    w.a.rests();
    assert_eq!(w.a.kept_up(from).0, 0, "files were hashed");
    let read = read() - before;
    assert!(read < SIZE / 2, "{read} bytes were read");
}
