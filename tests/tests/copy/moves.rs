//! Moves that meet, moves of a directory onto itself, and files that change or are written to right before they would go.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    path::Path,
    process::{Child, Stdio},
    time::Duration,
};

use tests::{Machine, Mirrored, Scratch, indexed, skipped, wait_for};

use crate::{failures, open, same, two};

const FILES: usize = 60;

/// The same files for each of these directories.
fn fill(dirs: &[&Path]) -> BTreeSet<OsString> {
    let names = (0..FILES).map(|number| format!("f{number}"));
    let fill = |name: String| {
        let bytes = tests::random_bytes(2000, &mut fastrand::Rng::new());
        for dir in dirs {
            fs::write(dir.join(&name), &bytes).unwrap();
        }
        name.into()
    };
    names.map(fill).collect()
}

fn names(dir: &Path) -> BTreeSet<OsString> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

fn moving(machine: &Machine, from: &str, to: &str) -> Child {
    machine.command(["mv", from, to]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn all_end(mut all: Vec<Child>) {
    for child in &mut all {
        wait_for("the move ends", Duration::from_secs(120), || child.try_wait().unwrap());
    }
}

#[test]
fn opposing_moves_lose_nothing() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    for round in 0..3 {
        let all = fill(&[&docs, &inbox]);
        a.ok(["arena", "scan", "docs"]);
        b.ok(["arena", "scan", "inbox"]);
        a.hears(&b);
        b.hears(&a);
        all_end(vec![moving(&a, "b:inbox", "docs/"), moving(&b, "a:docs", "inbox/")]);
        let left: BTreeSet<_> = names(&docs).union(&names(&inbox)).cloned().collect();
        assert_eq!(left, all, "round {round}");
        // Nothing is in the way of the next.
        a.hears(&b);
        a.ok(["mv", "docs", "b:inbox/"]);
        assert_eq!((names(&docs), names(&inbox)), (BTreeSet::new(), all), "round {round}");
    }
}

#[test]
fn a_circle_of_moves_loses_nothing() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    let third = scratch.dir("third");
    let c = open(&scratch, "c", &third);
    let all = fill(&[&docs, &inbox, &third]);
    a.join(&c);
    b.join(&c);
    a.ok(["arena", "scan", "docs"]);
    b.ok(["arena", "scan", "inbox"]);
    c.ok(["arena", "scan", "third"]);
    for (machine, other) in [(&a, &b), (&b, &a), (&a, &c), (&c, &a), (&b, &c), (&c, &b)] {
        machine.hears(other);
    }
    all_end(vec![moving(&a, "docs", "b:inbox/"), moving(&b, "inbox", "c:third/"), moving(&b, "c:third", "a:docs/")]);
    let left: BTreeSet<_> = [&docs, &inbox, &third].into_iter().flat_map(|dir| names(dir)).collect();
    assert_eq!(left, all);
}

/// What another machine sees through a mount is the same file, whatever number and times it has there.
#[test]
fn a_directory_is_not_moved_onto_itself() {
    for kind in ["bind", "bindfs", "sshfs"] {
        let scratch = Scratch::new();
        let (real, net, elsewhere) = (scratch.dir("real"), scratch.dir("net"), scratch.dir("elsewhere"));
        fs::create_dir_all(real.join("d/empty")).unwrap();
        for name in ["one", "two", "d/three"] {
            fs::write(real.join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("one", real.join("link")).unwrap();
        let mounted = match Mirrored::mirror(kind, &real, &net) {
            Ok(mounted) => mounted,
            Err(why) => {
                skipped(&format!("{kind}: {why}"));
                continue;
            }
        };
        let before = indexed(&real);
        let (a, b) = (open(&scratch, "a", &real), open(&scratch, "b", &net));
        a.ok(["arena", "add", "elsewhere", elsewhere.to_str().unwrap()]);
        a.join(&b);
        a.hears(&b);
        for (machine, from, to) in [(&a, "real", "b:net/"), (&b, "net", "a:real/"), (&b, "a:real", "net/")] {
            let output = machine.exits(3, ["mv", "--json", from, to]);
            let reasons = failures(&output);
            // Three files, a link, and the directories; none can be removed.
            assert!(reasons.len() >= 4, "{kind}, {from}: {reasons:?}");
            assert!(reasons.iter().all(|(_, reason)| reason.contains("stays")), "{kind}, {from}: {reasons:?}");
            same(&before, &real);
            a.hears(&b);
            b.hears(&a);
        }
        // What is another directory is moved.
        b.ok(["mv", "net/d", "a:elsewhere/"]);
        assert_eq!(fs::read(elsewhere.join("d/three")).unwrap(), b"d/three");
        assert!(!real.join("d").exists());
        a.stop();
        b.stop();
        drop(mounted);
    }
}

#[test]
fn a_file_that_is_open_for_writing_stays() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    fs::write(docs.join("open"), b"so far").unwrap();
    fs::write(docs.join("closed"), b"all").unwrap();
    a.ok(["arena", "scan", "docs"]);
    let writing = File::options().append(true).open(docs.join("open")).unwrap();
    let output = a.exits(3, ["mv", "--json", "docs", "b:inbox"]);
    let [(_, reason)] = &failures(&output)[..] else { panic!("{}", output.text()) };
    assert!(reason.contains("a program has it open for writing; it stays"), "{reason}");
    assert_eq!(fs::read(docs.join("open")).unwrap(), b"so far");
    assert!(!docs.join("closed").exists());
    drop(writing);
    a.ok(["mv", "docs", "b:inbox"]);
    assert_eq!((names(&docs).len(), fs::read(inbox.join("open")).unwrap()), (0, b"so far".to_vec()));
    drop(b);
}

/// Of two sources with one name, the second stays, also if the first has gone by then.
#[test]
fn two_sources_with_one_name() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    for (path, bytes) in
        [("x/photo", "one"), ("y/photo", "two"), ("x/d/same", "same"), ("y/d/same", "same"), ("y/d/z", "z")]
    {
        fs::create_dir_all(docs.join(path).parent().unwrap()).unwrap();
        fs::write(docs.join(path), bytes).unwrap();
    }
    let output =
        a.exits(3, ["mv", "--json", "--overwrite", "docs/x/photo", "docs/y/photo", "docs/x/d", "docs/y/d", "b:inbox/"]);
    let failed = failures(&output);
    let names: BTreeSet<_> = failed.iter().map(|(source, _)| source.as_str()).collect();
    assert!(names.is_superset(&["docs/y/photo", "docs/y/d/same"].into()), "{failed:?}");
    assert!(failed.iter().any(|(_, reason)| reason.contains("both would have one name")), "{failed:?}");
    let read = |path: &str| {
        fs::read_to_string(path.strip_prefix("inbox/").map_or(docs.join(path), |path| inbox.join(path))).ok()
    };
    let text = |text: &str| Some(text.to_owned());
    assert_eq!((read("inbox/photo"), read("y/photo"), read("x/photo")), (text("one"), text("two"), None));
    assert_eq!((read("inbox/d/same"), read("y/d/same"), read("inbox/d/z")), (text("same"), text("same"), text("z")));
    drop(b);
}

/// Where upper and lower case are one, nothing takes the place of what is there under another name.
#[test]
fn names_that_a_file_system_takes_for_one() {
    let scratch = Scratch::new();
    let (docs, disk) = (scratch.dir("docs"), scratch.dir("disk"));
    let mounted = match Mirrored::caseless(&scratch.path("image"), &disk) {
        Ok(mounted) => mounted,
        Err(why) => return skipped(&why),
    };
    let inbox = disk.join("c");
    let all = [
        (&docs, "Photo.jpg", "one"),
        (&inbox, "photo.JPG", "two, another"),
        (&docs, "Dir/x", "three"),
        (&inbox, "dir/x", "four"),
    ];
    for (dir, path, bytes) in all {
        fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
        fs::write(dir.join(path), bytes).unwrap();
    }
    let (a, b) = (open(&scratch, "a", &docs), open(&scratch, "b", &inbox));
    a.join(&b);
    let output = a.exits(3, ["mv", "--json", "--overwrite", "docs", "b:c/"]);
    let failed = failures(&output);
    assert_eq!(failed.len(), 3, "{failed:?}");
    for (source, reason) in &failed {
        assert!(reason.contains("for another name that is there already"), "{source}: {reason}");
    }
    for (dir, path, bytes) in all {
        assert_eq!(fs::read_to_string(dir.join(path)).unwrap(), bytes, "{path}");
    }
    a.stop();
    b.stop();
    drop(mounted);
}
