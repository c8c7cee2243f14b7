//! A machine that goes away while a command needs it, and comes back, costs a pause and a line, and no error.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use fastrand::Rng;
use tests::{Machine, QUICK, Scratch, random_bytes, wait_for};

const LIMIT: Duration = Duration::from_secs(60);

/// A machine with files small and large in an arena, and one that has none.
fn pair(scratch: &Scratch) -> (Machine, Machine) {
    let (docs, inbox) = (scratch.dir("docs"), scratch.dir("inbox"));
    let mut rng = Rng::with_seed(5);
    fs::create_dir(docs.join("tree")).unwrap();
    for number in 0..30 {
        fs::write(docs.join(format!("tree/small {number}")), random_bytes(3000, &mut rng)).unwrap();
    }
    for number in 0..3 {
        fs::write(docs.join(format!("tree/large {number}")), random_bytes(4 << 20, &mut rng)).unwrap();
    }
    let a = Machine::quick(scratch, "a", &[&docs]);
    let b = Machine::quick(scratch, "b", &[&inbox]);
    let ticket = b.ok(["invite", "--role", "writer", "--json"]).json()[0]["ticket"].as_str().unwrap().to_owned();
    a.ok(["join", &ticket]);
    b.hears(&a);
    a.hears(&b);
    a.ok(["limit", "--up", "4MiB"]);
    (a, b)
}

fn begin(machine: &Machine, args: &[&str]) -> Child {
    machine.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Stops a machine, starts it again once the command says that it waits, and sees it end well.
fn ends_well_although_it_restarts(mut child: Child, machine: &Machine) {
    machine.stop();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.next().expect("it says that it waits");
    assert!(line.starts_with("waiting for up to 60 s: "), "{line}");
    machine.restart_in_place();
    let said: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{said:?}");
    assert!(!said.iter().any(|line| line.starts_with("failed")), "{said:?}");
}

fn are_alike(one: &Path, other: &Path, expected: usize) {
    let mut files = 0;
    for entry in fs::read_dir(one).unwrap() {
        let path = entry.unwrap().path();
        assert!(fs::read(&path).unwrap() == fs::read(other.join(path.file_name().unwrap())).unwrap(), "{path:?}");
        files += 1;
    }
    assert_eq!((files, fs::read_dir(other).unwrap().count()), (expected, expected));
}

#[test]
fn who_gives_restarts_during_a_get() {
    let scratch = Scratch::new();
    let (a, b) = pair(&scratch);
    let (from, to) = (scratch.path("docs/tree"), scratch.path("to"));
    let child = begin(&b, &["get", "docs/tree", to.to_str().unwrap(), "--retry", "60s"]);
    wait_for("something came", LIMIT, || fs::read_dir(&to).is_ok_and(|mut dir| dir.next().is_some()).then_some(()));
    ends_well_although_it_restarts(child, &a);
    are_alike(&from, &to, 33);
}

#[test]
fn who_gives_restarts_during_a_pin() {
    let scratch = Scratch::new();
    let (a, b) = pair(&scratch);
    let child = begin(&b, &["pin", "docs/tree", "--retry", "60s"]);
    let comes = || b.status()["cache"]["pinned"].as_u64().filter(|bytes| *bytes > 0);
    wait_for("something came", LIMIT, comes);
    ends_well_although_it_restarts(child, &a);
    assert_eq!(b.ok(["pin", "--json"]).of_type("pin")[0]["missing_files"], 0);
}

#[test]
fn who_gives_restarts_during_a_warm() {
    let scratch = Scratch::new();
    let (a, b) = pair(&scratch);
    let child = begin(&b, &["warm", "docs/tree", "--retry", "60s"]);
    wait_for("something came", LIMIT, || b.status()["cache"]["bytes"].as_u64().filter(|bytes| *bytes > 0));
    ends_well_although_it_restarts(child, &a);
    assert_eq!(b.ok(["warm", "--dry-run", "docs/tree", "--json"]).summary()["missing_bytes"], 0);
}

#[test]
fn who_gives_restarts_during_a_repair() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let (a, b) = pair(&scratch);
    b.ok(["cp", "a:docs/tree", "inbox/"]);
    let (sound, rotten) = (scratch.path("docs/tree/large 0"), scratch.path("inbox/tree/large 0"));
    let offsets: Vec<u64> = (0..256).map(|group| group * 16_384 + 5).collect();
    scratch.rot(&rotten, &offsets);
    a.ok(["limit", "--up", "512KiB"]);
    let bad = || {
        let (sound, rotten) = (fs::read(&sound).unwrap(), fs::read(&rotten).unwrap());
        offsets.iter().filter(|&&at| sound[at as usize] != rotten[at as usize]).count()
    };
    assert_eq!(bad(), 256);
    let child = begin(&b, &["repair", "inbox", "--retry", "60s"]);
    wait_for("something is mended", LIMIT, || (bad() < 256).then_some(()));
    ends_well_although_it_restarts(child, &a);
    assert_eq!(bad(), 0);
    b.ok(["verify"]);
}

#[test]
fn who_takes_restarts_during_a_move() {
    let scratch = Scratch::new();
    let (a, b) = pair(&scratch);
    let (from, to) = (scratch.path("docs/tree"), scratch.path("inbox/tree"));
    let copy = scratch.path("copy");
    assert!(std::process::Command::new("cp").arg("-r").args([&from, &copy]).status().unwrap().success());
    let child = begin(&a, &["mv", "docs/tree", "b:inbox/", "--retry", "60s"]);
    wait_for("something came", LIMIT, || fs::read_dir(&to).is_ok_and(|mut dir| dir.next().is_some()).then_some(()));
    ends_well_although_it_restarts(child, &b);
    are_alike(&copy, &to, 33);
    assert!(!from.exists());
}

/// Who was away from the beginning is not waited for, nor is anybody if the user does not want to.
#[test]
fn nobody_waits_for_who_was_not_there() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    fs::write(docs.join("file"), random_bytes(100_000, &mut Rng::with_seed(1))).unwrap();
    let a = Machine::up_with_config(&scratch, "a", &[&docs], QUICK);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    a.stop();
    wait_for("it is gone", LIMIT, || b.peer("a").unwrap()["connected"].is_null().then_some(()));
    let began = Instant::now();
    let refused = b.exits(6, ["get", "docs/file", scratch.path("to").to_str().unwrap(), "--retry", "60s"]);
    assert!(!refused.stderr.contains("waiting") && began.elapsed() < Duration::from_secs(30), "{}", refused.stderr);
}

/// A destination that answers is no progress, when what it says is that it cannot reach the source.
#[test]
fn who_gives_to_another_is_gone_for_good() {
    let scratch = Scratch::new();
    let (a, b) = pair(&scratch);
    let c = Machine::quick::<&Path>(&scratch, "c", &[]);
    for machine in [&a, &b] {
        let ticket =
            machine.ok(["invite", "--role", "writer", "--json"]).json()[0]["ticket"].as_str().unwrap().to_owned();
        c.ok(["join", &ticket]);
        c.hears(machine);
    }
    let mut child = begin(&c, &["cp", "--retry", "3s", "a:docs", "b:inbox"]);
    let inbox = scratch.path("inbox");
    wait_for("something has come", LIMIT, || fs::read_dir(inbox.join("tree")).ok()?.next().map(drop));
    a.stop();
    let ended = wait_for("it gives up", LIMIT, || child.try_wait().unwrap());
    assert_ne!(ended.code(), Some(0));
}
