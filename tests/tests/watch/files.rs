//! What becomes of single files, links and directories.

use std::{
    fs::{self, File, Permissions},
    io::Write,
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, sleep},
    time::Duration,
};

use tests::{Item, Machine, Mtime, Scratch, indexed, set_mtime, snapshot, wait_for};

use crate::{LIMIT, Watched, history, listed, seq, shows, write};

#[test]
fn one_kind_replaces_another() {
    let w = Watched::new(|root| {
        for name in ["file", "dir/file", "dir/sub/file", "into/place"] {
            write(root.join(name), name);
        }
    });
    let b = w.other();
    let steps: [(&str, &dyn Fn()); 13] = [
        ("an empty file", &|| write(w.path("empty"), "")),
        ("an empty directory", &|| fs::create_dir_all(w.path("no/thing")).unwrap()),
        ("a file becomes a directory", &|| {
            fs::remove_file(w.path("file")).unwrap();
            write(w.path("file/inside/it"), "inside");
        }),
        ("and a file again", &|| {
            fs::remove_dir_all(w.path("file")).unwrap();
            write(w.path("file"), "again");
        }),
        ("a file becomes a link", &|| {
            fs::remove_file(w.path("file")).unwrap();
            symlink("dir/file", w.path("file")).unwrap();
        }),
        ("another link", &|| {
            symlink("nowhere at all", w.path("new")).unwrap();
            fs::rename(w.path("new"), w.path("file")).unwrap();
        }),
        ("a link to a directory", &|| {
            fs::remove_file(w.path("file")).unwrap();
            symlink("dir", w.path("file")).unwrap();
        }),
        ("and a file again", &|| {
            fs::remove_file(w.path("file")).unwrap();
            write(w.path("file"), "once more");
        }),
        ("saved under another name first", &|| {
            write(w.path(".file.swp"), "saved");
            fs::rename(w.path(".file.swp"), w.path("file")).unwrap();
        }),
        ("a directory becomes a link to where it is now", &|| {
            fs::rename(w.path("dir"), w.path("into/dir")).unwrap();
            symlink("into/dir", w.path("dir")).unwrap();
        }),
        ("a change through that link", &|| write(w.path("dir/sub/file"), "written through the link")),
        ("a directory becomes a link to outside", &|| {
            fs::rename(w.path("into"), w.scratch.path("outside")).unwrap();
            symlink(w.scratch.path("outside"), w.path("into")).unwrap();
        }),
        ("and a directory again", &|| {
            fs::remove_file(w.path("into")).unwrap();
            fs::rename(w.scratch.path("outside"), w.path("into")).unwrap();
        }),
    ];
    for (what, step) in steps {
        eprintln!("{what}");
        step();
        w.shows_all();
    }
    shows(&b, &w.root);
    w.a.rests();
    assert_eq!(w.a.ok(["arena", "scan", "--json"]).summary()["hashed_files"], 0);
}

/// The same size, in place, again and again within one tick of the file system's clock.
#[test]
fn rewritten_at_once() {
    let w = Watched::new(|root| write(root.join("file"), "0000"));
    let file = File::options().write(true).open(w.path("file")).unwrap();
    for round in 0..300 {
        file.write_all_at(format!("{round:04}").as_bytes(), 0).unwrap();
        // Now and then in the middle of the daemon's look.
        sleep(Duration::from_millis(u64::from(round % 50 == 0) * 215));
    }
    w.shows_all();
    for round in 0..20 {
        for last in 0..20 {
            write(w.path("file"), format!("{:04}", round * 20 + last));
        }
        w.shows_all();
    }
}

/// What changes all the time is shown now and then, and as it is when it rests.
#[test]
fn what_never_rests() {
    let w = Watched::new(|root| write(root.join("log"), "log\n"));
    let (stop, path) = (AtomicBool::new(false), w.path("log"));
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let mut file = File::options().append(true).open(&path).unwrap();
            while !stop.load(Ordering::Relaxed) {
                file.write_all(b"one more line\n").unwrap();
                sleep(Duration::from_millis(70));
            }
        });
        let mut shown = 4;
        for _ in 0..2 {
            let size = || w.a.ok(["stat", "--json", "docs/log"]).json()[0]["size"].as_u64();
            shown = wait_for("it grows", LIMIT, || size().filter(|&size| size > shown));
        }
        stop.store(true, Ordering::Relaxed);
        writing.join().unwrap();
    });
    w.shows_all();
}

/// Modes and mtimes alone, as far from now as they go. Nothing is read but where the kernel cannot tell.
#[test]
fn modes_and_times() {
    let w = Watched::new(|root| {
        for name in ["plain", "secret", "dir/file", "touched"] {
            write(root.join(name), name);
        }
    });
    let b = w.other();
    let before = seq(&w.a);
    let modes = [("plain", 0o755), ("secret", 0o000), ("dir", 0o700), ("dir/file", 0o640)];
    for (name, mode) in modes {
        fs::set_permissions(w.path(name), Permissions::from_mode(mode)).unwrap();
    }
    for (name, mtime) in [("before", -1_000_000_000), ("just before", -1), ("in 1970", 0), ("in 2200", 7_258_118_400)] {
        write(w.path(name), name);
        set_mtime(&w.path(name), Mtime(mtime, 123_456_789));
    }
    set_mtime(&w.path("dir"), Mtime(-86_400, 1));
    w.shows_all();
    w.a.rests();
    shows(&b, &w.root);
    let copy = w.scratch.path("copy");
    b.hears(&w.a);
    b.ok([Path::new("get"), "docs".as_ref(), &copy]);
    let modes = |root: &Path| -> Vec<_> {
        let tree = indexed(root).into_iter();
        tree.filter_map(|(path, item)| match item {
            Item::File { mode, mtime, .. } => Some((String::from_utf8(path).unwrap(), mode, mtime)),
            _ => None,
        })
        .collect()
    };
    assert_eq!(modes(&w.root), modes(&copy));
    // Touched without a change: that is told, and no more.
    let changes = history(&w.a, before).len();
    assert_eq!(changes, 3 + 4, "three modes and four files");
    for (name, mode) in [("secret", 0o644), ("plain", 0o644)] {
        fs::set_permissions(w.path(name), Permissions::from_mode(mode)).unwrap();
    }
    File::open(w.path("touched")).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    File::open(w.path("plain")).unwrap();
    w.shows_all();
    w.a.rests();
    w.shows_all();
    assert_eq!(history(&w.a, before).len(), changes + 3);
}

/// What must not be read is listed as skipped, is not tried again and again, and is there once it may be read.
#[test]
fn what_must_not_be_read() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    for name in ["file", "dir/one", "dir/sub/two", "changed"] {
        write(root.join(name), name);
    }
    let Some(a) = Machine::obeying_modes(&scratch, "a", &[&root]) else {
        eprintln!("not tested: root may read everything, and cannot give that up here");
        return;
    };
    let w = Watched { a, root, scratch };
    w.shows_all();
    let known = listed(&w.a);
    let mode = |name: &str, mode| fs::set_permissions(w.path(name), Permissions::from_mode(mode)).unwrap();
    fs::write(w.path("dir/one"), "changed before nobody could read it").unwrap();
    for (name, set) in [("dir", 0o000), ("file", 0o000)] {
        mode(name, set);
    }
    // Whether we may, is another question: what changed and cannot be read.
    write(w.path("changed"), "changed, and cannot be read");
    mode("changed", 0o000);
    write(w.path("new"), "new");
    mode("new", 0o000);
    let skipped = |expected: &[&str]| {
        wait_for(&format!("{expected:?} are skipped"), LIMIT, || {
            let skipped = w.a.ok(["status", "--skipped", "--json"]).json();
            let paths: Vec<_> = skipped.iter().map(|line| line["path"].as_str().unwrap().to_owned()).collect();
            expected.iter().all(|path| paths.iter().any(|skipped| skipped == path)).then_some(paths)
        })
    };
    skipped(&["changed", "dir", "new"]);
    w.a.rests();
    // What was said of them stands.
    let shown = listed(&w.a);
    for path in ["dir/one", "dir/sub/two", "changed"] {
        assert_eq!(shown[path.as_bytes()], known[path.as_bytes()], "{path}");
    }
    for (name, set) in [("dir", 0o755), ("file", 0o644), ("new", 0o600), ("changed", 0o644)] {
        mode(name, set);
    }
    w.shows_all();
    wait_for("nothing is skipped", LIMIT, || w.a.ok(["status", "--skipped", "--json"]).json().is_empty().then_some(()));
    write(w.path("dir/sub/three"), "watched again");
    w.shows_all();
}

#[test]
fn hard_links() {
    let w = Watched::new(|root| {
        write(root.join("one"), "the same file");
        write(root.join("dir/other"), "another file");
    });
    let b = w.other();
    fs::hard_link(w.path("one"), w.path("dir/two")).unwrap();
    fs::hard_link(w.path("dir/other"), w.scratch.path("outside")).unwrap();
    w.shows_all();
    w.a.rests();
    // Nobody tells of the other name before everything is looked at.
    let file = File::options().write(true).open(w.path("dir/two")).unwrap();
    file.write_all_at(b"THE", 0).unwrap();
    drop(file);
    fs::write(w.scratch.path("outside"), "another file, written to outside").unwrap();
    wait_for("it is shown where it was written", LIMIT, || {
        let shown = w.a.ok(["stat", "--json", "docs/dir/two"]).json().remove(0);
        (shown["blob"] == blake3::hash(b"THE same file").to_string()).then_some(())
    });
    w.a.ok(["arena", "scan"]);
    w.shows_all();
    fs::remove_file(w.path("one")).unwrap();
    w.shows_all();
    fs::rename(w.path("dir/two"), w.path("three")).unwrap();
    w.shows_all();
    shows(&b, &w.root);
    assert_eq!(b.ok(["cat", "docs/three"]).stdout, b"THE same file");
}

/// `blob get` into an arena's own directory: it is known soon, the same as at the other machine.
#[test]
fn what_is_brought_here_is_known() {
    let w = Watched::new(|root| {
        for name in ["one", "dir/two", "dir/sub/three"] {
            write(root.join(name), name);
        }
        symlink("one", root.join("link")).unwrap();
        write(root.join("large"), vec![7; 3 << 20]);
    });
    let mine = w.scratch.dir("mine/docs");
    let b = Machine::watching(&w.scratch, "b", &[&mine]);
    b.join(&w.a);
    b.ok([Path::new("get"), "docs".as_ref(), mine.parent().unwrap()]);
    wait_for("all of it is known", LIMIT, || {
        let entries = b.ok(["ls", "-R", "--json", "docs"]).of_type("entry");
        let files = entries.iter().filter(|entry| entry["kind"] == "file");
        files.clone().all(|entry| entry["local"] == "in_place").then_some(())
    });
    b.rests();
    // The directories are of the time when they were made here.
    let leaves = |machine: &Machine| {
        let mut all = listed(machine);
        all.retain(|_, said| !said.starts_with("directory"));
        all
    };
    w.a.hears(&b);
    assert_eq!((leaves(&b), listed(&w.a).len()), (leaves(&w.a), 7));
    assert_eq!(b.ok(["conflicts", "--json"]).summary()["conflicts"], 0);
    let (here, there) = (snapshot(&mine), snapshot(&w.root));
    assert_eq!(tests::differences(&here, &there), [""; 0]);
    // And a change here goes on from what was brought.
    write(mine.join("one"), "changed where it was brought");
    w.a.rests();
    wait_for("the change is shown there", LIMIT, || {
        let shown = w.a.ok(["stat", "--json", "docs/one"]).json().remove(0);
        (shown["blob"] == blake3::hash(b"changed where it was brought").to_string()).then_some(())
    });
    assert_eq!(w.a.ok(["conflicts", "--json"]).summary()["conflicts"], 0);
}
