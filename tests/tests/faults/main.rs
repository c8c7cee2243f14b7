//! Faults of the disk under the real daemon: system calls that fail, and kills behind just one of them. Each must strike,
//! and each test says exactly what is there afterwards.

mod kills;
mod reads;
mod writes;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tests::{Machine, Output, Scratch, indexed, random_bytes};

/// What lets machines of these names write anywhere.
const WRITERS: &str = "[roles]\na = { writer = [\"*\"] }\nb = { writer = [\"*\"] }\nc = { writer = [\"*\"] }\n";

/// A machine that lets a, b and c write, and holds an arena named as the last component of `root`.
fn open(scratch: &Scratch, name: &str, root: &Path) -> Machine {
    Machine::up_with_config(scratch, name, &[root], WRITERS)
}

/// Two that know each other: a with `docs`, which `fill` fills, and b with `inbox`, which is empty.
fn two(scratch: &Scratch, fill: impl FnOnce(&Path)) -> (Machine, Machine, PathBuf) {
    let (docs, inbox) = (scratch.dir("docs"), scratch.dir("inbox"));
    fill(&docs);
    let (a, b) = (open(scratch, "a", &docs), open(scratch, "b", &inbox));
    b.join(&a);
    (a, b, inbox)
}

/// A file of random bytes, other ones for each seed.
fn write(path: &Path, bytes: u64, seed: u64) -> Vec<u8> {
    let content = random_bytes(bytes, &mut fastrand::Rng::with_seed(seed));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, &content).unwrap();
    content
}

/// All files below a directory.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let (mut files, mut dirs) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() { &mut dirs } else { &mut files }.push(entry.path());
        }
    }
    files
}

/// Nothing of a copy lies about: no name for a moment below `root`, and no file in the cache.
#[track_caller]
fn nothing_is_left(machine: &Machine, root: &Path) {
    let is_temporary = |path: &[u8]| path.windows(7).any(|part| part == b".blobd-");
    let left: Vec<_> = indexed(root).into_keys().filter(|path| is_temporary(path)).collect();
    assert!(left.is_empty(), "{left:?}");
    let cached = files_below(&machine.home().join("cache"));
    assert!(cached.is_empty(), "{cached:?}");
}

/// What is said of the files in a directory is just what is there: each with its bytes, and in place.
#[track_caller]
fn is_indexed(machine: &Machine, target: &str, dir: &Path) {
    let listed = machine.ok(["ls", "-R", "--json", target]);
    let entries = listed.of_type("entry");
    let files: Vec<&Value> = entries.iter().filter(|entry| entry["kind"] == "file").collect();
    let there = if dir.is_file() { vec![dir.to_owned()] } else { files_below(dir) };
    assert_eq!(files.len(), there.len(), "{}", listed.text());
    for entry in files {
        let name = entry["path"].as_str().unwrap().rsplit('/').next().unwrap();
        let path = there.iter().find(|path| path.ends_with(name)).unwrap();
        let blob = blake3::hash(&fs::read(path).unwrap()).to_hex().to_string();
        assert_eq!((&entry["blob"], &entry["local"]), (&blob.into(), &"in_place".into()), "{entry}");
    }
}

/// Why the one thing failed that did.
#[track_caller]
fn failed(output: &Output) -> String {
    let failed = output.of_type("failed");
    assert_eq!(failed.len(), 1, "{}", output.text());
    failed[0]["reason"].as_str().unwrap().to_owned()
}

/// How many bytes came for the one file that was copied.
#[track_caller]
fn received(output: &Output) -> u64 {
    let copied = output.of_type("copied");
    assert_eq!(copied.len(), 1, "{}", output.text());
    copied[0]["bytes_received"].as_u64().unwrap()
}
