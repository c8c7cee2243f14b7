//! `kill -9` of either daemon at random moments of a move: whatever the moment, every file is whole at one end at least,
//! nothing that has a name is half there, and the next runs do the rest.

use std::{
    env, ffi::OsStr, fs, os::unix::ffi::OsStrExt, path::Path, process::Stdio, thread::sleep, time::Duration,
    time::Instant,
};

use fastrand::Rng;
use tests::{Item, Machine, Scratch, Tree, TreeSpec, build_tree, indexed, snapshot, wait_for, without_link_times};

use crate::{open, trees::nothing_is_left};

const KILLS: u32 = 12;
/// At most so many more times it is tried to hit one that runs.
const MISSES_MAX: u32 = 30;

#[test]
fn a_move_survives_kills_at_any_moment() {
    let seed = env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let scratch = Scratch::new();
    let (master, docs, inbox) = (scratch.path("master"), scratch.dir("docs"), scratch.dir("inbox"));
    build_tree(&master, TreeSpec { files: 200, bytes: 0, big_bytes: 24_000_000 });
    // What is not indexed would stay.
    for (path, _) in snapshot(&master).into_iter().filter(|(_, item)| *item == Item::Special) {
        fs::remove_file(master.join(OsStr::from_bytes(&path))).unwrap();
    }
    let original = without_link_times(indexed(&master));
    fill(&master, &docs);
    let (a, b) = (open(&scratch, "a", &docs), open(&scratch, "b", &inbox));
    a.join(&b);
    let started = Instant::now();
    a.ok(["mv", "docs", "b:inbox"]);
    let undisturbed = started.elapsed();
    println!("undisturbed: {undisturbed:?}");
    assert_eq!(tests::differences(&original, &without_link_times(indexed(&inbox))), [""; 0]);
    begin_anew(&a, &b, &master, &docs, &inbox);

    let (mut kills, mut misses) = (0, 0);
    while kills < KILLS {
        let (victim, other) = if rng.bool() { (&b, &a) } else { (&a, &b) };
        let share = if fs::read_dir(&inbox).unwrap().count() > 0 { 0.5 } else { 0.95 };
        let moment = undisturbed.mul_f64(rng.f64() * share);
        let mut moving = a.command(["mv", "docs", "b:inbox"]);
        let mut moving = moving.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        sleep(moment);
        let hit = moving.try_wait().unwrap().is_none();
        victim.kill9();
        let when = format!("kill {kills}, {} after {moment:?}, SEED={seed}", victim.name());
        println!("{when}{}", if hit { "" } else { ": too late" });
        everything_is_whole_somewhere(&original, &docs, &inbox, &when);
        victim.restart_in_place();
        wait_for("the move ends", Duration::from_secs(90), || moving.try_wait().unwrap());
        everything_is_whole_somewhere(&original, &docs, &inbox, &when);
        // What it removed right before it was killed, it still believes in until it has looked.
        victim.ok(["arena", "scan", if victim.name() == "a" { "docs" } else { "inbox" }]);
        let verified = victim.run(["verify", "--json"]);
        assert_eq!(verified.code, 0, "{when}: {}{}", verified.text(), verified.stderr);
        victim.hears(other);
        other.hears(victim);
        if hit {
            kills += 1;
        } else {
            misses += 1;
            assert!(misses <= MISSES_MAX, "a move takes {undisturbed:?} at first, and is over too soon now");
        }
        if !hit || kills % 3 == 0 {
            finish(&a, &b, &original, &docs, &inbox, &when);
            begin_anew(&a, &b, &master, &docs, &inbox);
        }
    }
}

fn fill(master: &Path, docs: &Path) {
    let status = std::process::Command::new("cp").arg("-a").arg(master.join(".")).arg(docs).status().unwrap();
    assert!(status.success());
}

fn begin_anew(a: &Machine, b: &Machine, master: &Path, docs: &Path, inbox: &Path) {
    for entry in fs::read_dir(inbox).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }
    fill(master, docs);
    b.ok(["arena", "scan", "inbox"]);
    a.ok(["arena", "scan", "docs"]);
}

/// Moves what is still left, and then all is there, and nothing where it was.
fn finish(a: &Machine, b: &Machine, original: &Tree, docs: &Path, inbox: &Path, when: &str) {
    let output = a.ok(["mv", "--json", "docs", "b:inbox"]);
    assert_eq!(output.summary()["failed_files"], 0, "{when}: {}", output.text());
    let differences = tests::differences(original, &without_link_times(indexed(inbox)));
    assert_eq!(differences, [""; 0], "{when}");
    assert_eq!(fs::read_dir(docs).unwrap().count(), 0, "{when}");
    nothing_is_left(b, inbox);
}

fn everything_is_whole_somewhere(original: &Tree, docs: &Path, inbox: &Path, when: &str) {
    let (here, there) = (without_link_times(indexed(docs)), without_link_times(indexed(inbox)));
    for (path, item) in original {
        let name = String::from_utf8_lossy(path);
        let (here, there) = (here.get(path), there.get(path));
        assert!(here == Some(item) || there == Some(item), "{when}: {name} is lost: {here:?} / {there:?}");
        assert!(there.is_none_or(|there| there == item), "{when}: {name} is half there: {there:?}");
    }
    let strange: Vec<_> = there.keys().filter(|path| !original.contains_key(*path)).collect();
    assert!(strange.is_empty(), "{when}: {strange:?}");
}
