//! What a machine keeps for itself may be damaged or lost: the database, outboards, the cache. Nothing is made up, what can be
//! proven is kept, and no decision of the user is lost: spec/store.md, "The database".

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use fastrand::Rng;
use tests::{Machine, QUICK, Scratch, random_bytes, wait_for, write_files};

const LIMIT: Duration = Duration::from_secs(60);

type Files = BTreeMap<String, Vec<u8>>;

/// Files of all kinds of outboards: none, a row, a file.
fn files(rng: &mut Rng) -> Files {
    let mut files = Files::new();
    for number in 0..40 {
        files.insert(format!("dir {}/small {number}", number % 7), random_bytes(rng.u64(..9000), rng));
    }
    for number in 0..4 {
        files.insert(format!("middle {number}"), random_bytes(rng.u64(200_000..400_000), rng));
    }
    files.insert("large".into(), random_bytes(5_000_000, rng));
    files
}

fn is_untouched(root: &Path, files: &Files) {
    for (path, bytes) in files {
        assert!(fs::read(root.join(path)).unwrap() == *bytes, "{path}");
    }
}

/// Files below a directory of a home whose names end so.
fn own_files(dir: &Path, ends: &[&str]) -> Vec<PathBuf> {
    let (mut found, mut dirs) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if ends.iter().any(|end| path.to_str().unwrap().ends_with(end)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Damages a file as disks and careless hands do. Says how.
fn damage(path: &Path, rng: &mut Rng) -> String {
    let mut bytes = fs::read(path).unwrap();
    let page = |rng: &mut Rng, len: usize| rng.usize(..len.div_ceil(4096)) * 4096;
    let at = rng.usize(..bytes.len());
    let how = match rng.u8(..5) {
        0 => {
            bytes[at] ^= 1 << rng.u8(..8);
            "one bit"
        }
        1 => {
            let end = bytes.len().min(at + 512);
            rng.fill(&mut bytes[at..end]);
            "512 bytes"
        }
        2 => {
            let at = page(rng, bytes.len());
            let end = bytes.len().min(at + 4096);
            bytes[at..end].fill(0);
            "a page of zeros"
        }
        3 => {
            bytes.truncate(at);
            "the end is missing from there"
        }
        _ => {
            let (one, other) = (page(rng, bytes.len()), page(rng, bytes.len()));
            let len = 4096.min(bytes.len() - one).min(bytes.len() - other);
            if one.abs_diff(other) >= len {
                let (low, high) = (one.min(other), one.max(other));
                let (left, right) = bytes.split_at_mut(high);
                left[low..low + len].swap_with_slice(&mut right[..len]);
            }
            "two pages swapped"
        }
    };
    fs::write(path, bytes).unwrap();
    format!("{how} at {at} of {path:?}")
}

/// Waits until a machine lists all files; meanwhile, what it gives is right, or an error.
fn comes_back(machine: &Machine, files: &Files, what: &str) {
    let (path, bytes) = files.iter().nth(fastrand::usize(..files.len())).unwrap();
    wait_for(&format!("all is listed after {what}"), LIMIT, || {
        let cat = machine.run(["cat", &format!("docs/{path}")]);
        assert!(cat.code != 0 || cat.stdout == *bytes, "wrong bytes of {path} after {what}");
        let listed = machine.run(["ls", "-R", "--json", "docs"]);
        assert!(listed.code == 0 || !listed.stderr.is_empty(), "{what}");
        let count = listed.of_type("entry").iter().filter(|entry| entry["kind"] == "file").count();
        let status = machine.run(["status"]).text();
        // All of it was there when the arena was said to be up to date.
        let is_whole = || machine.run(["ls", "-R", "--json", "docs"]).of_type("entry").len() >= files.len();
        assert!(
            count == files.len() || !status.contains("up to date") || is_whole(),
            "{count} files after {what}: {status}"
        );
        (count == files.len()).then_some(())
    });
}

/// `DAMAGES=500 SEED=1 cargo nextest run -p tests --test own_state` for more of them.
#[test]
fn damage_to_its_own_state() {
    let number = |name: &str, otherwise: u64| env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise);
    let (rounds, seed) = (number("DAMAGES", 8), number("SEED", fastrand::u64(..1 << 32)));
    println!("SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let scratch = Scratch::new();
    let (root, files) = (scratch.dir("docs"), files(&mut rng));
    write_files(&root, &files);
    let a = Machine::quick(&scratch, "a", &[&root]);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.ok(["pin", "docs"]);
    let (id_a, id_b) = (a.id(), b.id());
    for round in 0..rounds {
        let machine = if rng.bool() { &a } else { &b };
        let mut targets = vec![machine.home().join("state/blobd.redb")];
        let ends: &[&str] = if rng.bool() { &[".redb"] } else { &[".data", ".obao4", ".redb"] };
        targets.extend(
            own_files(machine.home(), ends).into_iter().filter(|path| !path.to_str().unwrap().contains("damaged")),
        );
        let target = targets[rng.usize(..targets.len())].clone();
        let is_running = rng.u8(..3) == 0;
        if !is_running {
            if rng.bool() { _ = machine.stop() } else { machine.kill9() }
        }
        let what = format!("round {round} (SEED={seed}), {}: {}", machine.name(), damage(&target, &mut rng));
        let what = format!("{what}{}", if is_running { ", running" } else { "" });
        println!("{what}");
        if is_running {
            // Whatever it says, it makes nothing up.
            let (path, bytes) = files.iter().nth(rng.usize(..files.len())).unwrap();
            let cat = machine.run(["cat", &format!("docs/{path}")]);
            assert!(cat.code != 0 || cat.stdout == *bytes, "wrong bytes of {path} after {what}");
            let verified = machine.run(["verify"]);
            assert!(!verified.stderr.contains("a bug"), "{what}: {}", verified.stderr);
            if machine.is_running() {
                machine.stop();
            }
        }
        machine.restart_in_place();
        comes_back(machine, &files, &what);
        assert!(!machine.log().contains("panicked"), "{what}: {}", machine.log());
        // The other one sees all of it, and what is pinned is whole.
        for machine in [&a, &b] {
            comes_back(machine, &files, &what);
        }
        wait_for(&format!("what is pinned is here after {what}"), LIMIT, || {
            b.ok(["pin"]).text().contains("all here").then_some(())
        });
        for machine in [&a, &b] {
            machine.ok(["repair"]);
            machine.ok(["verify"]);
        }
        is_untouched(&root, &files);
        assert_eq!((a.id(), b.id()), (id_a.clone(), id_b.clone()));
    }
}

#[test]
fn a_lost_database_takes_no_decision_along() {
    let scratch = Scratch::new();
    let mut rng = Rng::with_seed(7);
    let (root, files) = (scratch.dir("docs"), files(&mut rng));
    write_files(&root, &files);
    let a = Machine::quick(&scratch, "a", &[&root]);
    let own = scratch.dir("own");
    fs::write(own.join("note"), "mine").unwrap();
    let b = Machine::quick(&scratch, "b", &[&own]);
    b.join(&a);
    b.ok(["pin", "docs"]);
    b.ok(["cache", "limit", "3GiB"]);
    let state = |machine: &Machine| {
        let text = |args: &[&str]| machine.ok(args.iter().copied()).text();
        let limit = text(&["cache", "limit"]);
        (machine.id(), text(&["arena", "ls"]), text(&["pin"]), text(&["peer", "ls", "--json"]).contains("\"a\""), limit)
    };
    let before = state(&b);
    for is_empty in [false, true] {
        b.stop();
        let database = b.home().join("state/blobd.redb");
        if is_empty {
            fs::write(&database, "").unwrap()
        } else {
            fs::remove_file(&database).unwrap()
        }
        let cached = own_files(&b.home().join("cache"), &[".data", ".obao4"]);
        assert!(cached.len() >= 10, "five large ones and their outboards");
        // It does not begin as if new, nor does a command, and both say what to do.
        for args in [vec!["up", "--listen", "none"], vec!["verify"], vec!["doctor"]] {
            let refused = b.run(&args);
            assert!(
                refused.code == 1 && refused.stderr.contains("blob doctor --rebuild"),
                "{args:?}: {}",
                refused.stderr
            );
        }
        assert_eq!(own_files(&b.home().join("cache"), &[".data", ".obao4"]), cached);
        a.stop();
        b.ok(["doctor", "--rebuild"]);
        b.ok(["doctor"]);
        b.restart_in_place();
        wait_for("its arena is read again", LIMIT, || b.run(["cat", "own/note"]).text().eq("mine").then_some(()));
        // Proven anew, without the machine that they came from.
        let blob = blake3::hash(&files["large"]).to_string();
        assert!(b.ok(["cat", &format!("blob:{blob}")]).stdout == files["large"]);
        a.restart_in_place();
        // First what is heard of them is all here, and then all.
        wait_for("all that is pinned is here", LIMIT, || (b.ok(["pin"]).text() == before.2).then_some(()));
        assert_eq!(state(&b), before);
    }
    // On request it begins anew, as the same machine, which nobody knows.
    b.stop();
    fs::remove_file(b.home().join("state/blobd.redb")).unwrap();
    b.ok(["doctor", "--new"]);
    b.restart_in_place();
    assert_eq!(b.id(), before.0);
    assert_eq!((b.ok(["pin"]).text(), b.ok(["peer", "ls"]).text()), (String::new(), String::new()));
    assert_eq!(own_files(&b.home().join("cache"), &[".data", ".obao4"]), Vec::<PathBuf>::new());
}

/// What was suspect stays so when the database is made anew of what can still be read of it.
#[test]
fn what_was_known_of_files_outlives_a_damaged_database() {
    let scratch = Scratch::new();
    let (root, mut rng) = (scratch.dir("docs"), Rng::with_seed(8));
    let files = files(&mut rng);
    write_files(&root, &files);
    let config = format!("{QUICK}[scrub]\nrepair = false\n");
    let a = Machine::up_with_config(&scratch, "a", &[&root], &config);
    a.stop();
    // Changed while nobody looked, with its mtime kept.
    let path = root.join("middle 2");
    let mtime = fs::metadata(&path).unwrap().modified().unwrap();
    let mut bytes = files["middle 2"].clone();
    bytes[100_000] ^= 4;
    fs::write(&path, &bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
    // And the database is damaged: in the last of its pages that is in use, where rows of files are seldom.
    let database = a.home().join("state/blobd.redb");
    let whole = fs::read(&database).unwrap();
    let is_damaged = |page: &usize| {
        let mut pages = whole.clone();
        pages[page * 4096 + 100] ^= 1;
        fs::write(&database, pages).unwrap();
        let report = a.run(["doctor"]);
        assert_eq!(report.code == 4, report.text().contains("blob doctor --rebuild"), "{}", report.text());
        report.code == 4
    };
    (1..whole.len() / 4096).rev().find(is_damaged).expect("a page is in use");
    a.restart_in_place();
    wait_for("it is read again", LIMIT, || a.run(["status"]).text().contains("up to date").then_some(()));
    let suspect = a.exits(4, ["verify", "--json"]).of_type("suspect");
    assert!(suspect.len() == 1 && suspect[0]["path"] == "middle 2", "{suspect:?}");
    assert!(fs::read(&path).unwrap() == bytes, "the user decides");
}
