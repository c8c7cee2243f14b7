//! Power cuts, as near as a test without a power switch comes: `kill -9` of either daemon at random moments of a
//! `get`. Whatever the moment, the home opens again, nothing in it is damaged, and what is at the destination under
//! its own name is whole. In the end the `get` completes, and the trees are the same.
//!
//! What a lost page cache does is tested in blobstore, over a disk that forgets.

use std::{
    env, fs,
    path::Path,
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use fastrand::Rng;
use tests::{BIG_BYTES, Machine, Scratch, Tree, TreeSpec, build_tree, indexed, snapshot, wait_for, without_link_times};

/// How often a daemon is killed.
const KILLS: u32 = 20;
/// At most so many more times it is tried to hit one that runs, should a `get` be over before its moment.
const MISSES_MAX: u32 = 40;

#[test]
fn a_get_survives_kills_at_any_moment() {
    let seed = env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let scratch = Scratch::new();
    let root = scratch.path("tree");
    build_tree(&root, TreeSpec { files: 300, bytes: 0, big_bytes: BIG_BYTES });
    let original = without_link_times(indexed(&root));
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);

    // How long it takes undisturbed, in a place and a home of its own.
    let undisturbed = {
        let c = Machine::up::<&Path>(&scratch, "c", &[]);
        c.join(&a);
        let started = Instant::now();
        c.ok([Path::new("get"), "tree".as_ref(), &scratch.dir("undisturbed")]);
        started.elapsed()
    };
    fs::remove_dir_all(scratch.path("undisturbed")).unwrap();
    println!("undisturbed: {undisturbed:?}");

    let (mut kills, mut misses) = (0, 0);
    let mut copies = scratch.dir("copies");
    while kills < KILLS {
        let (victim, other) = if rng.bool() { (&a, &b) } else { (&b, &a) };
        // What has come stays, so that a `get` that goes on is over sooner than the first.
        let share = if copies.join("tree").exists() { 0.6 } else { 0.95 };
        let moment = undisturbed.mul_f64(rng.f64() * share);
        let mut get = b.command([Path::new("get"), "tree".as_ref(), &copies]);
        let mut get = get.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        sleep(moment);
        let hit = get.try_wait().unwrap().is_none();
        victim.kill9();
        let when = format!("kill {kills}, {} after {moment:?}, SEED={seed}", victim.name());
        println!("{when}{}", if hit { "" } else { ": too late" });
        victim.restart_in_place();
        let verified = victim.run(["verify", "--json"]);
        assert_eq!(verified.code, 0, "{when}: {}{}", verified.text(), verified.stderr);
        // Either its own daemon is gone, or the one that it gets from: it ends, and says so.
        wait_for("the get ends", Duration::from_secs(60), || get.try_wait().unwrap());
        whatever_is_there_is_whole(&copies.join("tree"), &original, &when);
        victim.hears(other);
        other.hears(victim);
        if hit {
            kills += 1;
        } else {
            misses += 1;
            assert!(misses <= MISSES_MAX, "a get takes {undisturbed:?} at first, and is over too soon now");
        }
        // Now and then it begins anew, so that all moments of a `get` come up.
        if !hit || kills % 4 == 0 {
            finish(&b, &copies, &original, &when);
            fs::remove_dir_all(&copies).unwrap();
            copies = scratch.dir("copies");
        }
    }
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1, "nothing but the summary");
}

/// Gets what is still missing, and then all is there.
fn finish(b: &Machine, copies: &Path, original: &Tree, when: &str) {
    let output = b.ok([Path::new("get"), "--json".as_ref(), "tree".as_ref(), copies]);
    assert_eq!(output.summary()["failed_files"], 0, "{when}: {}", output.text());
    let differences = tests::differences(original, &without_link_times(snapshot(&copies.join("tree"))));
    assert_eq!(differences, [""; 0], "{when}");
}

/// Everything below `copy` is in `original` too, the same in every way.
fn whatever_is_there_is_whole(copy: &Path, original: &Tree, when: &str) {
    if !copy.exists() {
        return;
    }
    for (path, item) in without_link_times(snapshot(copy)) {
        assert_eq!(Some(&item), original.get(&path), "{when}: {:?}", String::from_utf8_lossy(&path));
    }
}

/// A peer that died without a word is waited for once in a while, and not once for each file.
#[test]
fn a_dead_peer_does_not_cost_seconds_for_each_file() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    for number in 0..240 {
        fs::write(root.join(number.to_string()), format!("file {number}")).unwrap();
    }
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    a.kill9();
    let started = Instant::now();
    let output = b.exits(6, [Path::new("get"), "--json".as_ref(), "docs".as_ref(), &scratch.dir("copies")]);
    assert_eq!(output.summary()["failed_files"], 240);
    assert!(started.elapsed() < Duration::from_secs(45), "240 files took {:?}", started.elapsed());
}
