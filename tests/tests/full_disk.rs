//! The disk of a home fills up, while the daemon runs and before it starts: it goes on with what it has, makes room when it is
//! told to, and goes on by itself when there is room: spec/store.md, "Full disks".

use std::{
    env,
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use fastrand::Rng;
use rustix::fs::{FallocateFlags, fallocate};
use tests::{Machine, Scratch, Volume, may_mount, random_bytes, skipped, wait_for};

const LIMIT: Duration = Duration::from_secs(60);
/// Goes by way of the cache where that has room.
const LARGE: u64 = 20_000_000;
const DISK_BYTES: u64 = 96 << 20;
const CONFIG: &str = "[cache]\nkeep_free = \"0 B\"\n[watch]\nsettle = \"200ms\"\nsettle_max = \"1s\"\n";

/// Fills the disk that `dir` is on, to the last block.
fn fill(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    let mut file = File::create(&path).unwrap();
    let (mut held, mut step) = (0, 1 << 20);
    while step >= 4096 {
        match fallocate(&file, FallocateFlags::empty(), held, step) {
            Ok(()) => held += step,
            Err(_) => step /= 2,
        }
    }
    let _ = file.write_all(&[1; 4096]);
    path
}

/// A machine on a small disk of its own, with an arena elsewhere, and another one that has files.
struct Small {
    // Dropped before the disk.
    b: Machine,
    a: Machine,
    _mounted: tests::Mounted,
    _volume: Volume,
    home: PathBuf,
    docs: PathBuf,
    own: PathBuf,
    scratch: Scratch,
}

impl Small {
    /// `None`, with the test noted as skipped, where nothing can be mounted.
    fn new() -> Option<Self> {
        if !may_mount() {
            return None;
        }
        let scratch = Scratch::new();
        let volume = match Volume::formatted(&scratch.path("image"), DISK_BYTES, &["mkfs.ext4", "-qF", "-m", "0"]) {
            Ok(volume) => volume,
            Err(why) => {
                skipped(&why);
                return None;
            }
        };
        let home = scratch.dir("b.home");
        let mounted = volume.mount(&home);
        let (docs, own) = (scratch.dir("docs"), scratch.dir("own"));
        for number in 0..20 {
            fs::write(docs.join(format!("{number}")), bytes(number)).unwrap();
        }
        fs::write(docs.join("large"), random_bytes(LARGE, &mut Rng::with_seed(99))).unwrap();
        let a = Machine::watching(&scratch, "a", &[&docs]);
        let b = Machine::up_with_config(&scratch, "b", &[&own], CONFIG);
        b.join(&a);
        Some(Self { b, a, _mounted: mounted, _volume: volume, home, docs, own, scratch })
    }

    fn names(&self, arena: &str) -> Vec<String> {
        let listed = self.b.run(["ls", "--json", arena]);
        listed.of_type("entry").iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
    }

    fn state(&self) -> (String, bool) {
        let status = self.b.status();
        (status["arenas"][0]["status"]["state"].as_str().unwrap().to_owned(), !status["home_full"].is_null())
    }
}

fn bytes(number: u64) -> Vec<u8> {
    random_bytes(200_000, &mut Rng::with_seed(number))
}

fn name(round: u64, file: u64) -> String {
    format!("{round}-{file}")
}

#[test]
fn the_disk_of_the_home_is_full() {
    let Some(small) = Small::new() else { return };
    let number = |name: &str| env::var(name).ok().map(|text| text.parse().expect("a number"));
    let (rounds, seed) = (number("FULL_ROUNDS").unwrap_or(3), number("SEED").unwrap_or(1));
    println!("SEED={seed} FULL_ROUNDS={rounds}");
    let mut rng = Rng::with_seed(seed);
    let Small { b, a, home, docs, own, scratch, .. } = &small;
    let cat = |number: u64| assert!(b.ok(["cat", &format!("docs/{number}")]).stdout == bytes(number), "{number}");
    let mut pid = b.pid();
    for round in 0..rounds {
        (0..5).for_each(cat);
        let edited = own.join("edited");
        fs::write(&edited, format!("{round:9} before")).unwrap();
        wait_for("it is published", LIMIT, || {
            (b.run(["cat", "own/edited"]).stdout == fs::read(&edited).unwrap()).then_some(())
        });

        // The disk fills up while rows are written, or before.
        let writes = |from: u64, to: u64| {
            (from..to).for_each(|file| fs::write(own.join(name(round, file)), format!("{round} {file}")).unwrap());
            fs::write(docs.join("news"), format!("{round} {from}")).unwrap();
        };
        writes(0, 300);
        let filler = fill(home, "filler");
        writes(300, 600);
        wait_for("waiting for room", LIMIT, || (small.state() == ("waiting for room".to_owned(), true)).then_some(()));
        assert_eq!(b.exits(3, ["status", "--check"]).code, 3);
        // Edited by a program that puts the mtime back: what the watcher saw of that is not forgotten until it is published.
        // A restart would forget it, and then only the user knows.
        let restarts = rng.bool();
        if !restarts {
            let mtime = fs::metadata(&edited).unwrap().modified().unwrap();
            let file = File::options().write(true).open(&edited).unwrap();
            file.write_all_at(format!("{round:9} during").as_bytes(), 0).unwrap();
            file.set_modified(mtime).unwrap();
        }
        // What is cached, and what is not and cannot be.
        (0..8).for_each(cat);
        let copy = scratch.path("copy");
        let got = b.ok(["get", "--json", "docs/large", copy.to_str().unwrap()]).summary();
        assert!(fs::read(&copy).unwrap() == fs::read(docs.join("large")).unwrap());
        assert!(got["bytes_received"].as_u64().unwrap() >= LARGE, "{got}");
        fs::remove_file(&copy).unwrap();
        let refused = b.exits(8, ["arena", "add", "more", scratch.dir("more").to_str().unwrap()]);
        assert!(refused.stderr.contains("the disk of the home is full"), "{}", refused.stderr);
        // Those of the last round go.
        let is_old = |name: &String| round > 0 && name.starts_with(&format!("{}-", round - 1));
        for name in small.names("own").iter().filter(|name| is_old(name)) {
            fs::remove_file(own.join(name)).unwrap();
        }
        wait_for("the deletions", LIMIT, || (!small.names("own").iter().any(is_old)).then_some(()));
        if restarts {
            match rng.bool() {
                true => b.kill9(),
                false => _ = b.stop(),
            }
            let more = fill(home, "more filler");
            b.restart_in_place();
            pid = b.pid();
            (0..3).for_each(cat);
            assert!(small.state().1, "it is still full");
            fs::remove_file(more).unwrap();
        }
        b.ok(["cache", "trim"]);
        assert!(b.is_running() && b.pid() == pid);

        fs::remove_file(filler).unwrap();
        let mut all: Vec<_> = (0..600).map(|file| name(round, file)).chain(["edited".to_owned()]).collect();
        all.sort();
        wait_for("all to be indexed", LIMIT, || (small.names("own") == all).then_some(()));
        wait_for("no more to wait for", LIMIT, || (small.state() == ("up to date".to_owned(), false)).then_some(()));
        assert!(b.ok(["cat", "own/edited"]).stdout == fs::read(&edited).unwrap());
        b.ok(["verify", "own"]);
        let news = format!("{round} 300").into_bytes();
        wait_for("what the other says", LIMIT, || (b.run(["cat", "docs/news"]).stdout == news).then_some(()));
        assert!(b.is_running() && b.pid() == pid, "it never ended: {}", b.log());
    }
    b.ok(["verify"]);
    a.ok(["verify"]);
    println!("the reserve was needed {} times", b.log().matches("its reserve is given up").count());
}
