//! The daemon watches its arenas: whatever happens in a directory, soon exactly that is shown, here and at the others,
//! with nothing read that is known already, and nothing said that is not so.

mod deletions;
mod files;
mod mounts;
mod names;
mod random;
mod renames;
mod roots;
mod rot;
mod stalls;
mod storms;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;
use tests::{Item, Machine, Mtime, Scratch, indexed, path_of};

/// A machine that watches a directory.
struct Watched {
    // Dropped first, for its directories are in the scratch.
    a: Machine,
    root: PathBuf,
    scratch: Scratch,
}

impl Watched {
    /// Holds the arena `docs`, which `build` has filled.
    fn new(build: impl FnOnce(&Path)) -> Self {
        Self::on(Scratch::new(), build)
    }

    /// Like [`new`](Self::new), but in `scratch`.
    fn on(scratch: Scratch, build: impl FnOnce(&Path)) -> Self {
        let root = scratch.dir("docs");
        build(&root);
        let a = Machine::watching(&scratch, "a", &[&root]);
        let this = Self { a, root, scratch };
        this.shows_all();
        this
    }

    /// A second machine, which has heard all.
    fn other(&self) -> Machine {
        let b = Machine::watching::<&Path>(&self.scratch, "b", &[]);
        b.join(&self.a);
        shows(&b, &self.root);
        b
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    #[track_caller]
    fn shows_all(&self) {
        shows(&self.a, &self.root);
    }

    #[track_caller]
    fn state(&self) -> String {
        self.a.status()["arenas"][0]["status"]["state"].as_str().expect("a state").to_owned()
    }
}

/// Waits until `machine` lists exactly what is below `root`: kinds, sizes, bytes, mtimes, targets, empty directories.
#[track_caller]
fn shows(machine: &Machine, root: &Path) {
    let expected = on_disk(root);
    let started = Instant::now();
    loop {
        let listed = listed(machine);
        if listed == expected {
            return;
        }
        if started.elapsed() > LIMIT {
            let paths: BTreeSet<_> = listed.keys().chain(expected.keys()).collect();
            let lines =
                paths.into_iter().filter(|path| listed.get(*path) != expected.get(*path)).take(20).map(|path| {
                    let name = String::from_utf8_lossy(path);
                    format!("{name:.200?}\n    listed {:?}\n    is     {:?}", listed.get(path), expected.get(path))
                });
            panic!("{} does not list what is there:\n{}", machine.name(), lines.collect::<Vec<_>>().join("\n"));
        }
        sleep(Duration::from_millis(40));
    }
}

fn on_disk(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let described = |(path, item): (Vec<u8>, Item)| {
        let said = match item {
            Item::File { size, blob, mtime, .. } => format!("file of {size} bytes, {blob}, {mtime:?}"),
            Item::Symlink { target, mtime } => format!("link to {:?}, {mtime:?}", String::from_utf8_lossy(&target)),
            Item::Directory => format!("directory, {:?}", mtime_of(&root.join(OsStr::from_bytes(&path)))),
            Item::Special => unreachable!("these are left out"),
        };
        (path, said)
    };
    indexed(root).into_iter().map(described).collect()
}

fn listed(machine: &Machine) -> BTreeMap<Vec<u8>, String> {
    let output = machine.run(["ls", "-R", "--json", "docs"]);
    // An arena that is empty is not known to others.
    assert!(matches!(output.code, 0 | 7), "{output:?}");
    let entries = output.of_type("entry").into_iter();
    let described = |entry: Value| {
        let mtime = entry["mtime"].as_str().map(Mtime::from_json);
        let conflict = if entry["conflict"] == true { ", in conflict" } else { "" };
        let said = match (entry["kind"].as_str(), mtime) {
            (Some("file"), Some(mtime)) => {
                let blob = entry["blob"].as_str().expect("a file has a blob");
                format!("file of {} bytes, {blob}, {mtime:?}{conflict}", entry["size"])
            }
            (Some("symlink"), Some(mtime)) => {
                let target = path_of(&entry["target"]);
                format!("link to {:?}, {mtime:?}{conflict}", String::from_utf8_lossy(&target))
            }
            (Some("dir"), Some(mtime)) => format!("directory, {mtime:?}{conflict}"),
            _ => entry.to_string(),
        };
        (path_of(&entry), said)
    };
    entries.map(described).collect()
}

fn mtime_of(path: &Path) -> Mtime {
    let meta = fs::symlink_metadata(path).expect("look at it");
    Mtime(meta.mtime(), meta.mtime_nsec())
}

/// What became of a path: `new`, `changed` or `deleted`, with the rest of what is said of it, ascending.
fn history(machine: &Machine, since: u64) -> Vec<Value> {
    machine.ok(["history", "--json", "--since", &since.to_string()]).of_type("change")
}

fn seq(machine: &Machine) -> u64 {
    machine.status()["seq"].as_u64().expect("a number")
}

fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
    let path = path.as_ref();
    fs::create_dir_all(path.parent().expect("it is in a directory")).expect("make the directories");
    fs::write(path, bytes).expect("write a file");
}

/// So long it may take until a change is shown.
const LIMIT: Duration = Duration::from_secs(20);
