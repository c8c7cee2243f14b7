//! The arena root itself goes and comes: nothing is taken for deleted that is only out of reach.

use std::{fs, path::Path};

use tests::{Machine, Scratch, wait_for};

use crate::{LIMIT, Watched, history, listed, on_disk, seq, shows, write};

fn three_files(root: &Path) {
    for name in ["one", "two", "dir/three"] {
        write(root.join(name), name);
    }
}

impl Watched {
    #[track_caller]
    pub(crate) fn becomes(&self, state: &str) {
        wait_for(&format!("the arena is {state}"), LIMIT, || (self.state() == state).then_some(()));
    }
}

#[test]
fn renamed_away_and_back() {
    let w = Watched::new(three_files);
    let b = w.other();
    let (before, known) = (seq(&w.a), on_disk(&w.root));
    let away = w.scratch.path("away");
    fs::rename(&w.root, &away).unwrap();
    w.becomes("offline");
    // What happens there meanwhile is found when it is back.
    write(away.join("dir/four"), "four");
    b.hears(&w.a);
    assert_eq!((listed(&w.a), listed(&b)), (known.clone(), known));
    fs::rename(&away, &w.root).unwrap();
    w.becomes("up to date");
    w.shows_all();
    write(w.path("dir/sub/five"), "five");
    fs::remove_file(w.path("one")).unwrap();
    w.shows_all();
    shows(&b, &w.root);
    let deleted: Vec<_> = history(&w.a, before).into_iter().filter(|change| change["change"] == "deleted").collect();
    assert_eq!(deleted.len(), 1, "{deleted:?}");
}

/// The directory that it is in, of which nothing is told.
#[test]
fn a_directory_above_renamed_away_and_back() {
    let scratch = Scratch::new();
    let root = scratch.dir("above/docs");
    three_files(&root);
    let a = Machine::watching(&scratch, "a", &[&root]);
    let w = Watched { a, root, scratch };
    w.shows_all();
    let known = on_disk(&w.root);
    fs::rename(w.scratch.path("above"), w.scratch.path("away")).unwrap();
    write(w.scratch.path("away/docs/four"), "four");
    w.becomes("offline");
    assert_eq!(listed(&w.a), known);
    fs::rename(w.scratch.path("away"), w.scratch.path("above")).unwrap();
    w.becomes("up to date");
    w.shows_all();
    write(w.path("dir/five"), "five");
    w.shows_all();
}

/// A mount point whose disk is missing, while the daemon runs and when it starts.
#[test]
fn replaced_by_an_empty_directory() {
    let w = Watched::new(three_files);
    let b = w.other();
    let (before, known, away) = (seq(&w.a), on_disk(&w.root), w.scratch.path("away"));
    fs::rename(&w.root, &away).unwrap();
    fs::create_dir(&w.root).unwrap();
    w.becomes("offline");
    w.a.stop();
    w.a.restart();
    w.becomes("offline");
    b.hears(&w.a);
    assert_eq!((listed(&w.a), listed(&b), seq(&w.a)), (known.clone(), known, before));
    fs::remove_dir(&w.root).unwrap();
    fs::rename(&away, &w.root).unwrap();
    w.becomes("up to date");
    write(w.path("four"), "four");
    w.shows_all();
    shows(&b, &w.root);
}

#[test]
fn missing_when_the_daemon_starts() {
    let w = Watched::new(three_files);
    let b = w.other();
    let (before, known, away) = (seq(&w.a), on_disk(&w.root), w.scratch.path("away"));
    w.a.stop();
    fs::rename(&w.root, &away).unwrap();
    w.a.restart();
    w.becomes("offline");
    b.hears(&w.a);
    assert_eq!((listed(&w.a), listed(&b), seq(&w.a)), (known.clone(), known, before));
    fs::rename(&away, &w.root).unwrap();
    w.becomes("up to date");
    w.shows_all();
    write(w.path("dir/four"), "four");
    w.shows_all();
    shows(&b, &w.root);
}

/// One that is given up is looked at no more, and one that is added is watched.
#[test]
fn given_up_and_added() {
    let w = Watched::new(three_files);
    let other = w.scratch.dir("other");
    w.a.ok(["arena", "rm", "docs"]);
    write(w.path("unseen"), "unseen");
    write(other.join("seen"), "seen");
    w.a.ok([Path::new("arena"), "add".as_ref(), "docs".as_ref(), &other]);
    shows(&w.a, &other);
    write(other.join("dir/new"), "new");
    shows(&w.a, &other);
    w.a.rests();
    let log = w.a.log();
    assert!(!log.contains("ERROR") && !log.contains("cannot be taken in"), "{log}");
}

/// The daemon's own files are in the arena, and change all the time: they are never listed, nor is anything looked at
/// because of them.
#[test]
fn the_home_inside() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    write(root.join("file"), "file");
    let a = Machine::up_at(&root.join("dir/.home"), &scratch, "a", &[&root]);
    let expected = || {
        let mut tree = on_disk(&root);
        tree.retain(|path, _| !path.starts_with(b"dir/.home"));
        tree
    };
    let shows = |what: &str| wait_for(what, LIMIT, || (listed(&a) == expected()).then_some(()));
    shows("the start");
    a.rests();
    for round in 0..5 {
        write(root.join("file"), format!("round {round}"));
        write(root.join(format!("dir/{round}")), "beside the home");
        shows("a change");
    }
    a.rests();
    let (before, from) = (seq(&a), a.log().len());
    a.ok(["verify"]);
    write(root.join("dir/.home/state/mark"), "not listed");
    a.rests();
    assert_eq!(seq(&a), before);
    assert_eq!(a.log()[from..].matches("up to date").count(), 0, "{}", &a.log()[from..]);
    shows("the end");
}
