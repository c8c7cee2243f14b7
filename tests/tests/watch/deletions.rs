//! A deletion is told with the mtime of the nearest directory that is left, and only of what is really gone.

use std::{
    fs,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;
use tests::{Machine, Mtime, path_of, set_mtime, wait_for};

use crate::{Watched, history, mtime_of, seq, shows, write};

#[test]
fn one_file() {
    let w = Watched::new(|root| {
        for name in ["dir/deleted", "dir/left", "dir/sub/deleted", "top"] {
            write(root.join(name), name);
        }
    });
    // The other machine has the same, and so goes on showing what is deleted here.
    let copy = w.scratch.path("copy/docs");
    write(copy.join("dir/deleted"), "dir/deleted");
    let b = Machine::watching(&w.scratch, "b", &[&copy]);
    b.join(&w.a);
    for name in ["dir/deleted", "dir/sub/deleted", "top"] {
        fs::remove_file(w.path(name)).unwrap();
    }
    set_mtime(&w.path("dir"), Mtime(1_500_000_000, 7));
    w.a.rests();
    w.shows_all_but_conflicts();
    b.hears(&w.a);
    let told = deleted(&b.ok(["history", "--json", "--peer", "a"]).of_type("change"));
    let sub = mtime_of(&w.path("dir/sub"));
    let dir = Mtime(1_500_000_000, 7);
    assert_eq!(told, [("dir/deleted".into(), dir), ("dir/sub/deleted".into(), sub), ("top".into(), mtime_of(&w.root))]);
    let stat = b.ok(["stat", "--json", "docs/dir/deleted"]).json().remove(0);
    let versions: Vec<_> = stat["versions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|version| {
            (
                version["peer"].as_str().unwrap(),
                version["state"].as_str().unwrap(),
                version["mtime"].as_str().map(Mtime::from_json),
            )
        })
        .collect();
    assert!(versions.contains(&("a", "deleted", Some(dir))), "{versions:?}");
    assert!(versions.iter().any(|(peer, state, _)| (*peer, *state) == ("b", "file")), "{versions:?}");
}

/// All at once, and the arena is neither offline nor gone.
#[test]
fn the_whole_tree() {
    let w = Watched::new(|root| {
        for number in 0..500 {
            write(root.join(format!("dir{}/sub/{number}", number % 10)), format!("file {number}"));
        }
        write(root.join("top"), "top");
    });
    let b = w.other();
    let before = seq(&w.a);
    for entry in fs::read_dir(&w.root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
    w.shows_all();
    shows(&b, &w.root);
    w.becomes("up to date");
    let told = deleted(&history(&w.a, before));
    assert_eq!(told.len(), 501 + 20, "files and directories");
    w.a.rests();
    // What was told while the rest was still being deleted has an earlier mtime of a directory that was left then.
    let root = mtime_of(&w.root);
    assert!(told.iter().all(|(_, mtime)| *mtime <= root), "{told:?}");
    assert!(told.iter().any(|(_, mtime)| *mtime == root), "{told:?}");
    write(w.path("new"), "it goes on");
    w.shows_all();
    // The same while nobody looks.
    w.a.stop();
    fs::remove_file(w.path("new")).unwrap();
    w.a.restart();
    w.shows_all();
    w.becomes("up to date");
}

/// As editors save: nothing says that the file was away, neither in the log nor in between.
#[test]
fn deleted_and_made_again() {
    let w = Watched::new(|root| {
        for name in ["same", "other", "dir/file"] {
            write(root.join(name), name);
        }
    });
    let before = seq(&w.a);
    let mtime = mtime_of(&w.path("same"));
    let started = Instant::now();
    fs::remove_file(w.path("same")).unwrap();
    // Long enough for a look, were it not waited until all rests.
    sleep(Duration::from_millis(60));
    write(w.path("same"), "same");
    set_mtime(&w.path("same"), mtime);
    fs::remove_file(w.path("other")).unwrap();
    write(w.path("other"), "other bytes");
    fs::remove_dir_all(w.path("dir")).unwrap();
    write(w.path("dir/file"), "dir/file");
    let is_quick = started.elapsed() < Duration::from_millis(180);
    w.shows_all();
    w.a.rests();
    w.shows_all();
    let changes = history(&w.a, before);
    if !is_quick {
        eprintln!("not tested: this machine is too busy to be quicker than the daemon");
        return;
    }
    assert_eq!(deleted(&changes), [], "{changes:?}");
    assert!(!changes.iter().any(|change| path_of(change) == b"same"), "{changes:?}");
}

/// A directory that is deleted while its files are hashed: what is not there is never shown.
#[test]
fn while_it_is_looked_at() {
    let w = Watched::new(|root| write(root.join("left"), "left"));
    for round in 0..5 {
        for number in 0..200 {
            write(w.path(&format!("dir/{number}")), format!("{round} {number}"));
        }
        let from = w.a.log().len();
        wait_for("it is looked at", Duration::from_secs(20), || {
            w.a.log()[from..].contains("looking at what changed").then_some(())
        });
        fs::remove_dir_all(w.path("dir")).unwrap();
        w.shows_all();
    }
    w.a.rests();
    w.shows_all();
}

fn deleted(changes: &[Value]) -> Vec<(String, Mtime)> {
    let deleted = changes.iter().filter(|change| change["change"] == "deleted");
    let mut deleted: Vec<_> = deleted
        .map(|change| {
            let path = String::from_utf8(path_of(change)).expect("names here are text");
            (path, Mtime::from_json(change["mtime"].as_str().expect("a deletion has an mtime")))
        })
        .collect();
    deleted.sort();
    deleted
}

impl Watched {
    /// `a` has nothing that is not there. The other machine has more.
    #[track_caller]
    fn shows_all_but_conflicts(&self) {
        for gone in ["docs/dir/sub/deleted", "docs/top"] {
            wait_for(gone, Duration::from_secs(20), || {
                (self.a.run([Path::new("stat"), gone.as_ref()]).code == 7).then_some(())
            });
        }
    }
}
