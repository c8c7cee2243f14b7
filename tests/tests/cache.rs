//! The cache of a machine that reads what others have: within its budget, or not at all.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use fastrand::Rng;
use tests::{Machine, Scratch, random_bytes};

/// What the cache's files take on the disk.
fn on_disk(machine: &Machine) -> u64 {
    let mut bytes = 0;
    let mut dirs = vec![machine.home().join("cache")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => dirs.push(entry.path()),
                false => bytes += entry.metadata().unwrap().blocks() * 512,
            }
        }
    }
    bytes
}

/// A file much larger than the cache is read, and brought, through it; what is left of it stays within the limit.
#[test]
fn a_file_larger_than_the_cache() {
    let scratch = Scratch::new();
    let (root, bytes) = (scratch.dir("docs"), random_bytes(40_000_000, &mut Rng::with_seed(3)));
    fs::write(root.join("large"), &bytes).unwrap();
    fs::write(root.join("small"), &bytes[..9000]).unwrap();
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up_with_config::<&Path>(&scratch, "b", &[], "[cache]\nlimit = \"2 MiB\"\nkeep_free = \"0 B\"\n");
    b.join(&a);
    assert!(b.ok(["cat", "docs/large"]).stdout == bytes);
    assert!(b.ok(["cat", "docs/small"]).stdout == bytes[..9000]);
    // A read of at most 8 MiB was the last fetch in flight.
    let cache = b.status()["cache"].clone();
    assert_eq!(cache["limit"], 2 << 20);
    assert!(cache["bytes"].as_u64().unwrap() <= 11 << 20 && on_disk(&b) <= 11 << 20, "{cache}, {}", on_disk(&b));
    b.ok([Path::new("get"), "docs".as_ref(), &scratch.path("copy")]);
    assert!(fs::read(scratch.path("copy/large")).unwrap() == bytes);
    assert!(on_disk(&b) <= 11 << 20, "{}", on_disk(&b));
    assert_eq!(b.ok(["cat", "docs/large", "--range", "30000000..30000100"]).stdout, bytes[30_000_000..30_000_100]);
    assert!(on_disk(&b) <= 3 << 20, "what is no longer in use makes room: {}", on_disk(&b));
    b.ok(["verify"]);
}

/// Where the disk must be left free, nothing is cached: reads go through memory, and who wants it cached is told why.
#[test]
fn a_disk_that_is_to_stay_free() {
    let scratch = Scratch::new();
    let (root, bytes) = (scratch.dir("docs"), random_bytes(3_000_000, &mut Rng::with_seed(4)));
    fs::write(root.join("large"), &bytes).unwrap();
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up_with_config::<&Path>(&scratch, "b", &[], "[cache]\nkeep_free = \"1000 PiB\"\n");
    b.join(&a);
    assert!(b.ok(["cat", "docs/large"]).stdout == bytes);
    let refused = b.exits(8, ["warm", "docs"]);
    assert!(refused.stderr.contains("the disk has room for"), "{}", refused.stderr);
    assert_eq!(on_disk(&b), 0);
    b.ok(["verify"]);
}
