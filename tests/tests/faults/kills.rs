//! `kill -9` of a copy's destination behind each single call with which it takes a step (spec/copy.md), and of a move's
//! source behind each with which it removes.

use std::{fs, path::Path};

use tests::{Fault, Scratch, Tree, can_attach, differences, indexed, listable, without_link_times};

use crate::{is_indexed, nothing_is_left, open, write};

/// More kills than one test takes.
const KILLS_MAX: usize = 60;

/// What is copied: files by name and size.
type Files = &'static [(&'static str, u64)];

const SMALL: Files = &[("small", 5000)];
/// By way of the cache.
const LARGE: Files = &[("large", 1_100_000)];
/// So many that they are synced together.
const MANY: Files = &[("1", 10), ("2", 20_000), ("3", 0), ("4", 17), ("5", 1_200_000)];

#[test]
fn a_small_file() {
    let calls = ["fchmod", "utimensat", "fsync", "linkat", "syncfs", "fdatasync"];
    killed_behind_each(&calls, Victim::Destination, SMALL, &["cp"]);
}

#[test]
fn a_large_file() {
    let calls = ["fsync", "unlinkat,?unlink", "fchmod", "utimensat", "renameat2"];
    killed_behind_each(&calls, Victim::Destination, LARGE, &["cp"]);
}

#[test]
fn many_files() {
    killed_behind_each(&["syncfs", "linkat", "renameat2"], Victim::Destination, MANY, &["mv"]);
}

#[test]
fn a_file_that_replaces_another() {
    let calls = ["fsync", "linkat", "renameat", "syncfs"];
    killed_behind_each(&calls, Victim::Destination, SMALL, &["cp", "--overwrite"]);
}

#[test]
fn a_source_that_removes() {
    killed_behind_each(&["unlinkat", "fdatasync"], Victim::Source, SMALL, &["mv"]);
}

/// Who directs and is killed.
#[derive(Clone, Copy, PartialEq)]
enum Victim {
    Source,
    Destination,
}

/// The victim directs, and is killed behind its first, second, … of each of `calls`, each time with files of their own,
/// until it makes no more of them. There must be one of each at least.
fn killed_behind_each(calls: &[&str], victim: Victim, files: Files, command: &[&str]) {
    if !can_attach() {
        return;
    }
    let (moves, overwrites) = (command[0] == "mv", command.contains(&"--overwrite"));
    let scratch = Scratch::new();
    let (docs, inbox) = (scratch.dir("docs"), scratch.dir("inbox"));
    for nth in 1..=KILLS_MAX {
        for (at, (name, bytes)) in files.iter().enumerate() {
            let seed = (nth * 100 + at) as u64;
            write(&docs.join(nth.to_string()).join(name), *bytes, seed);
            if overwrites {
                write(&inbox.join(nth.to_string()).join(name), 1000, seed + 50);
            }
        }
    }
    let (a, b) = (open(&scratch, "a", &docs), open(&scratch, "b", &inbox));
    let (killed, other, sides) = match victim {
        Victim::Source => (&a, &b, ["", "b:"]),
        Victim::Destination => (&b, &a, ["a:", ""]),
    };
    killed.join(other);
    let mut calls = calls.iter().peekable();
    let mut kills_of_call = 0;
    for nth in 1.. {
        let Some(calls_now) = calls.peek() else { break };
        assert!(nth <= KILLS_MAX, "there are too many of {calls_now}");
        let (from, to) = (docs.join(nth.to_string()), inbox.join(nth.to_string()));
        let original = without_link_times(indexed(&from));
        let replaced = if overwrites { Some(without_link_times(indexed(&to))) } else { None };
        let ends = [format!("{}docs/{nth}", sides[0]), format!("{}inbox/{nth}", sides[1])];
        let args = || command.iter().copied().chain(ends.iter().map(String::as_str));
        let (output, kill) = Fault::kill(calls_now).nth(kills_of_call + 1).during(killed, || killed.run(args()));
        let call = kill.calls.into_iter().next();
        if let Some(call) = &call {
            println!("{nth}: {call}");
            killed.kill9();
            is_whole_somewhere(&original, replaced.as_ref(), &from, &to, call);
            killed.restart();
            killed.hears(other);
            // Of a whole move that was over, nothing is left to be done.
            if from.exists() {
                killed.ok(args());
            }
            kills_of_call += 1;
        } else {
            assert_eq!(output.code, 0, "{}", output.stderr);
            assert!(kills_of_call > 0, "never killed behind {calls_now}");
            (kills_of_call, _) = (0, calls.next());
        }
        assert_eq!(differences(&original, &without_link_times(indexed(&to))), [""; 0], "{call:?}");
        assert_eq!(from.exists(), !moves, "{call:?}");
        is_indexed(&b, &format!("inbox/{nth}"), &to);
        nothing_is_left(&b, &inbox);
        b.ok(["verify", &format!("inbox/{nth}")]);
    }
    if moves {
        // What was removed is said so, also by what the scan found after the last kill.
        a.ok(["arena", "scan", "docs"]);
        a.lists("docs", &listable(&docs));
    }
    a.ok(["verify"]);
    b.ok(["verify"]);
}

/// Right behind a kill, each file is whole here or there, and nothing is half there.
fn is_whole_somewhere(original: &Tree, replaced: Option<&Tree>, from: &Path, to: &Path, when: &str) {
    let look = |dir: &Path| if fs::exists(dir).unwrap() { without_link_times(indexed(dir)) } else { Tree::new() };
    let (here, there) = (look(from), look(to));
    for (path, item) in original {
        let name = String::from_utf8_lossy(path);
        let (here, there) = (here.get(path), there.get(path));
        let before = replaced.and_then(|replaced| replaced.get(path));
        assert!(here == Some(item) || there == Some(item), "{when}: {name} is lost: {here:?} / {there:?}");
        assert!(there == Some(item) || there == before, "{when}: {name} is half there: {there:?}");
    }
    assert!(there.keys().all(|path| original.contains_key(path)), "{when}: {there:?}");
}
