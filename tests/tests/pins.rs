//! What is pinned is here, and stays here, whatever becomes of the machines that have it; what is warmed is here for now.

use std::{collections::BTreeMap, fs, path::Path, process::Stdio, time::Duration};

use fastrand::Rng;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::{Machine, QUICK, Scratch, random_bytes, wait_for, write_files};

/// Path below `docs` → bytes.
type Files = BTreeMap<&'static str, Vec<u8>>;

/// Small ones and large ones, below `keep` and beside it; two are the same.
fn files() -> Files {
    let mut rng = Rng::with_seed(51);
    let sizes = [
        ("keep/tiny", 100),
        ("keep/sub/small", 20_000),
        ("keep/sub/deep/middle", 300_000),
        ("keep/large", 9_000_001),
        ("keep/empty", 0),
        ("keep-not", 5000),
        ("other/file", 70_000),
    ];
    let mut files: Files = sizes.into_iter().map(|(path, size)| (path, random_bytes(size, &mut rng))).collect();
    files.insert("keep/again", files["keep/tiny"].clone());
    files
}

/// A machine that has the files as `docs`.
fn holder(scratch: &Scratch, name: &str, files: &Files) -> Machine {
    let root = scratch.dir(&format!("{name}/docs"));
    write_files(&root, files);
    Machine::quick(scratch, name, &[root])
}

/// How much of each file of `docs` is at a machine, and whether it is pinned.
fn local(machine: &Machine) -> BTreeMap<String, (String, bool)> {
    let entries = machine.ok(["ls", "-R", "--json", "docs"]).of_type("entry");
    let files = entries.into_iter().filter(|entry| entry["kind"] == "file");
    files
        .map(|entry| {
            let text = |field: &str| entry[field].as_str().unwrap().to_owned();
            (text("path"), (text("local"), entry["pinned"] == true))
        })
        .collect()
}

/// The pin of that name, as `blob pin` lists it.
fn pin(machine: &Machine, name: &str) -> Option<Value> {
    let (arena, path) = name.split_once('/').unwrap_or((name, ""));
    let pins = machine.ok(["pin", "--json"]).of_type("pin");
    pins.into_iter().find(|pin| pin["arena"] == arena && pin["path"] == path)
}

fn completes(machine: &Machine, name: &str) {
    wait_for(&format!("all of {name} is here"), LIMIT, || (pin(machine, name)?["missing_files"] == 0).then_some(()));
}

fn stat(machine: &Machine) -> Value {
    machine.ok(["cache", "stat", "--json"]).of_type("cache").remove(0)
}

fn reads(machine: &Machine, path: &str, bytes: &[u8]) {
    assert!(machine.ok(["cat", &format!("docs/{path}")]).stdout == bytes, "{path}");
}

#[test]
fn a_pinned_directory_outlives_its_machine_and_follows_it_before() {
    let (scratch, mut files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let pinned = b.ok(["pin", "--json", "docs/keep"]);
    let line = &pinned.of_type("pin")[0];
    let bytes: usize = files.iter().filter(|(path, _)| path.starts_with("keep/")).map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(
        (&line["files"], &line["bytes"], &line["missing_files"]),
        (&6.into(), &bytes.into(), &0.into()),
        "{line}"
    );
    assert_eq!(line["bytes_here"], bytes);
    for (path, (local, is_pinned)) in local(&b) {
        let expected = if path.starts_with("keep/") { ("cached", true) } else { ("none", false) };
        assert_eq!((&local[..], is_pinned), expected, "{path}");
    }
    assert_eq!(stat(&b)["whole"], 4, "the two that are the same are one, and the empty one takes nothing");
    assert_eq!(stat(&b)["bytes"], 0, "nothing counts: {}", stat(&b));

    // A new version comes by itself, and the older one may go.
    let newer = random_bytes(8_000_000, &mut Rng::with_seed(52));
    fs::write(scratch.path("a/docs/keep/large"), &newer).unwrap();
    fs::write(scratch.path("a/docs/keep/new"), b"new").unwrap();
    wait_for("b hears of it", LIMIT, || {
        let size = b.ok(["stat", "--json", "docs/keep/large"]).json().remove(0)["size"].as_u64()?;
        (size == 8_000_000 && local(&b).contains_key("keep/new")).then_some(())
    });
    completes(&b, "docs/keep");
    wait_for("the older version is no longer pinned", LIMIT, || {
        (stat(&b)["bytes"].as_u64()? >= 9_000_001).then_some(())
    });
    let trimmed = b.ok(["cache", "trim", "--json"]).of_type("trimmed").remove(0);
    assert!(trimmed["freed"].as_u64() >= Some(9_000_001) && trimmed["bytes"] == 0, "{trimmed}");
    assert_eq!(stat(&b)["whole"], 5);
    a.kill9();
    files.insert("keep/large", newer);
    files.insert("keep/new", b"new".to_vec());
    for (path, bytes) in files.iter().filter(|(path, _)| path.starts_with("keep/")) {
        reads(&b, path, bytes);
    }
    b.exits(6, ["cat", "docs/keep-not"]);
    b.ok(["verify"]);
}

/// A cleaner of caches, or a user in need of room, empties the directory while the daemon runs.
#[test]
fn what_is_pinned_comes_again_when_the_cache_was_emptied() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.ok(["pin", "docs/keep"]);
    let cache = b.home().join("cache");
    let dirs = || fs::read_dir(&cache).unwrap().map(|dir| dir.unwrap().path()).filter(|dir| dir.is_dir());
    let count = || dirs().filter_map(|dir| Some(fs::read_dir(dir).ok()?.count())).sum::<usize>();
    let all = count();
    assert!(all >= 6, "three large ones and their outboards");
    // Once by itself, once met by a reader first.
    for is_read in [false, true] {
        dirs().for_each(|dir| fs::remove_dir_all(dir).unwrap());
        if is_read {
            reads(&b, "keep/large", &files["keep/large"]);
        }
        wait_for("all of it came again", LIMIT, || (count() == all).then_some(()));
        completes(&b, "docs/keep");
    }
    drop(a);
    for (path, bytes) in files.iter().filter(|(path, _)| path.starts_with("keep/")) {
        reads(&b, path, bytes);
    }
}

#[test]
fn one_file_below_two_pins_and_what_trimming_leaves() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.exits(7, ["pin", "docs/nothing"]);
    b.exits(7, ["verify", "docs/keep"]);
    b.exits(7, ["unpin", "docs/keep"]);
    b.ok(["pin", "docs/keep", "docs/keep/large"]);
    reads(&b, "other/file", &files["other/file"]);
    assert_eq!(local(&b)["other/file"].0, "cached");
    b.ok(["cache", "trim"]);
    let cached = |machine: &Machine| -> Vec<String> {
        let here = local(machine).into_iter().filter(|(path, (local, _))| path != "keep/empty" && local != "none");
        here.map(|(path, _)| path).collect()
    };
    let below = ["keep/again", "keep/large", "keep/sub/deep/middle", "keep/sub/small", "keep/tiny"];
    assert_eq!(cached(&b), below);
    assert_eq!(b.ok(["verify", "docs/keep", "--json"]).summary()["files"], below.len() - 1, "two of them are one blob");
    let hint = b.exits(7, ["unpin", "docs/keep/tiny"]).stderr;
    assert!(hint.contains("docs/keep, which is"), "{hint}");
    // Once, and it is below the other pin still.
    b.ok(["unpin", "docs/keep"]);
    assert_eq!(cached(&b), below, "what is unpinned stays until the room is needed");
    b.ok(["cache", "trim"]);
    assert_eq!(cached(&b), ["keep/large"]);
    // Of the same bytes at two paths, one is pinned.
    b.ok(["pin", "docs/keep/again"]);
    b.ok(["unpin", "docs/keep/large"]);
    b.ok(["cache", "trim"]);
    assert_eq!(cached(&b), ["keep/again", "keep/tiny"]);
    // To bring it elsewhere does not take it from the cache.
    b.ok(["pin", "docs/keep/large"]);
    b.ok([Path::new("get"), "docs/keep/large".as_ref(), &scratch.path("copy")]);
    assert!(fs::read(scratch.path("copy")).unwrap() == files["keep/large"]);
    a.kill9();
    reads(&b, "keep/large", &files["keep/large"]);
    b.ok(["unpin", "docs/keep/again", "docs/keep/large"]);
    b.ok(["cache", "trim"]);
    assert!(cached(&b).is_empty() && b.ok(["pin", "--json"]).json().is_empty());
    assert_eq!((stat(&b)["whole"].clone(), stat(&b)["pinned"].clone()), (0.into(), 0.into()));
}

#[test]
fn a_restart_goes_on_and_what_cannot_be_had_is_told() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::up_with_config::<&Path>(&scratch, "b", &[], &format!("{QUICK}[limits]\ndown = \"2 MiB\"\n"));
    b.join(&a);
    b.ok(["pin", "--no-wait", "docs"]);
    wait_for("some of it is here", LIMIT, || (pin(&b, "docs")?["bytes_here"].as_u64()? > 90_000).then_some(()));
    b.kill9();
    a.kill9();
    b.restart();
    let line = pin(&b, "docs").unwrap();
    let (missing, here) = (line["missing_bytes"].as_u64().unwrap(), line["bytes_here"].as_u64().unwrap());
    assert!(missing > 0 && here > 0, "it was in the middle: {line}");
    assert_eq!(line["missing"][0]["reason"], "a is not connected");
    assert_eq!(line["missing"][0]["bytes"], missing);
    let status = b.status()["pins"].clone();
    assert_eq!((&status["count"], &status["missing_bytes"]), (&1.into(), &missing.into()), "{status}");
    assert!(b.ok(["status"]).text().contains("not here yet: a is not connected"));
    // What is waited for in vain is told after a while, and stays pinned.
    let waited = b.exits(3, ["pin", "--json", "docs/keep"]);
    assert_eq!(waited.summary()["missing_files"], waited.of_type("pin")[0]["missing_files"]);
    assert_eq!(waited.of_type("pin")[0]["missing"][0]["reason"], "a is not connected");
    // Whoever does not want to wait leaves the pin behind.
    let mut waiting = b.command(["pin", "docs/keep/large"]);
    let waiting = waiting.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("it waits, and minds SIGINT", LIMIT, || {
        let status = fs::read_to_string(format!("/proc/{}/status", waiting.id())).ok()?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        (u64::from_str_radix(caught.trim(), 16).ok()? & 2 > 0 && pin(&b, "docs/keep/large").is_some()).then_some(())
    });
    kill_process(Pid::from_child(&waiting), Signal::INT).unwrap();
    let ended = waiting.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("the pin stays"), "{ended:?}");
    assert!(pin(&b, "docs/keep/large").is_some());
    a.restart_in_place();
    for name in ["docs", "docs/keep", "docs/keep/large"] {
        completes(&b, name);
    }
    a.kill9();
    for (path, bytes) in &files {
        reads(&b, path, bytes);
    }
}

#[test]
fn with_another_machine_that_has_it_and_files_in_place() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let c = holder(&scratch, "c", &files);
    let root = scratch.dir("b/docs");
    let mine: Files =
        files.iter().filter(|(path, _)| path.starts_with("keep/sub")).map(|(p, b)| (*p, b.clone())).collect();
    write_files(&root, &mine);
    let b = Machine::quick(&scratch, "b", std::slice::from_ref(&root));
    b.join(&a);
    b.join(&c);
    a.kill9();
    b.ok(["pin", "docs"]);
    c.kill9();
    let places = local(&b);
    for path in files.keys() {
        let expected = if mine.contains_key(path) { "in_place" } else { "cached" };
        assert_eq!(places[*path], (expected.to_owned(), true), "{path}");
        reads(&b, path, &files[path]);
    }
    assert_eq!(stat(&b)["whole"], 4, "what is in place need not be in the cache");
    // A file of this machine's goes, while others still show it.
    fs::remove_file(root.join("keep/sub/small")).unwrap();
    wait_for("its absence is told", LIMIT, || {
        let line = pin(&b, "docs")?;
        (line["missing_files"] == 1 && line["missing"][0]["reason"] == "a and c are not connected").then_some(())
    });
    c.restart_in_place();
    completes(&b, "docs");
    assert_eq!(local(&b)["keep/sub/small"].0, "cached");
    c.kill9();
    reads(&b, "keep/sub/small", &files["keep/sub/small"]);
}

#[test]
fn warming_fetches_once_what_the_cache_has_room_for() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::up_with_config::<&Path>(&scratch, "b", &[], &format!("{QUICK}[cache]\nlimit = \"8 MiB\"\n"));
    b.join(&a);
    let refused = b.exits(8, ["warm", "docs"]).stderr;
    assert!(refused.contains("whose limit is 8.0 MiB") && refused.contains("blob cache limit"), "{refused}");
    assert_eq!(stat(&b)["whole"], 0);
    b.ok(["cache", "limit", "20MiB"]);
    let dry = b.ok(["warm", "--dry-run", "--json", "docs"]);
    let missing: Vec<_> = dry.of_type("missing").iter().map(|line| line["path"].as_str().unwrap().to_owned()).collect();
    let expected: Vec<_> = files.keys().filter(|path| **path != "keep/empty").copied().collect();
    assert_eq!(missing, expected);
    let bytes: usize = files.iter().filter(|(path, _)| **path != "keep/again").map(|(_, bytes)| bytes.len()).sum();
    assert_eq!((&dry.summary()["missing_bytes"], &dry.summary()["files"]), (&bytes.into(), &0.into()));
    assert_eq!(stat(&b)["whole"], 0);
    let warmed = b.ok(["warm", "--json", "docs"]).summary();
    assert_eq!((&warmed["files"], &warmed["bytes"], &warmed["failed_files"]), (&6.into(), &bytes.into(), &0.into()));
    assert!(warmed["bytes_received"].as_u64() >= Some(bytes as u64), "{warmed}");
    assert_eq!(b.ok(["warm", "--json", "docs"]).summary()["files"], 0, "all is here");
    assert_eq!(stat(&b)["pinned"], 0);
    a.kill9();
    for (path, bytes) in &files {
        reads(&b, path, bytes);
    }
    // What is not here fails by itself.
    wait_for("b knows that a is gone", LIMIT, || b.peer("a")?["connected"].is_null().then_some(()));
    b.ok(["cache", "trim", "1MiB"]);
    let failed = b.exits(6, ["warm", "--json", "docs"]);
    assert!(failed.of_type("failed").iter().all(|line| line["reason"] == "a is not connected"), "{}", failed.text());
    assert_eq!(failed.summary()["failed_files"], failed.of_type("failed").len());

    // The limit that was set holds after a restart, and until the file says another one.
    b.stop();
    b.restart();
    assert_eq!((stat(&b)["limit"].as_u64(), stat(&b)["configured_limit"].as_u64()), (Some(20 << 20), Some(8 << 20)));
    b.ok(["cache", "limit", "20KiB"]);
    assert!(stat(&b)["bytes"].as_u64() <= Some(20 << 10), "{}", stat(&b));
    b.stop();
    fs::write(b.home().join("config.toml"), "[cache]\nlimit = \"9 MiB\"\n").unwrap();
    assert_eq!(stat(&b)["limit"], 9 << 20, "without a daemon, too");
}

#[test]
fn pins_without_a_daemon_and_without_room() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.stop();
    b.ok(["pin", "--no-wait", "docs/keep/large"]);
    assert_eq!(pin(&b, "docs/keep/large").unwrap()["missing_files"], 1);
    b.ok(["pin", "docs/keep/sub"]);
    assert_eq!(pin(&b, "docs/keep/sub").unwrap()["missing_files"], 0);
    b.ok(["unpin", "docs/keep/large"]);
    b.ok(["cache", "trim"]);
    assert_eq!(stat(&b)["whole"], 2);
    let config = b.home().join("config.toml");
    fs::write(&config, "[cache]\nkeep_free = \"1000 PiB\"\n").unwrap();
    // Whether its holder is there or not.
    a.stop();
    b.restart();
    let refused = b.exits(8, ["pin", "docs/keep"]).stderr;
    assert!(refused.contains("pin docs/keep") && refused.contains("the disk has room for 0 B"), "{refused}");
    assert!(pin(&b, "docs/keep").is_none());
    // What comes new below a pin, and finds no room, is told.
    a.restart_in_place();
    b.hears(&a);
    fs::write(scratch.path("a/docs/keep/sub/more"), b"more").unwrap();
    let told = wait_for("the pin is told not to be all here", LIMIT, || {
        b.status()["pins"]["reasons"][0].as_str().map(str::to_owned)
    });
    assert!(told.starts_with("no room"), "{told}");
}

#[test]
fn listings_tell_what_is_here() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.ok(["cat", "--range", "0..4500000", "docs/keep/large"]);
    b.ok(["pin", "docs/keep/sub"]);
    let lines = b.ok(["ls", "-lR", "docs"]).text();
    let line =
        |path: &str| lines.lines().find(|line| line.ends_with(path)).unwrap_or_else(|| panic!("{path} in\n{lines}"));
    assert!(line("/keep/large").contains(" partial 50% "), "{lines}");
    assert!(line("/keep/sub/small").contains(" cached, pinned "), "{lines}");
    assert!(line("/keep/tiny").contains(" none ") && line("/keep/sub/").contains(" pinned "), "{lines}");
    let large = b.ok(["stat", "--json", "docs/keep/large"]).json().remove(0);
    let ranges = large["ranges_here"].as_array().unwrap();
    assert_eq!((&ranges[0][0], &large["pin"]), (&0.into(), &Value::Null), "{large}");
    let sum: u64 = ranges.iter().map(|range| range[1].as_u64().unwrap() - range[0].as_u64().unwrap()).sum();
    assert!((4_500_000..4_600_000).contains(&sum) && large["bytes_here"] == sum, "{large}");
    let small = b.ok(["stat", "docs/keep/sub/small"]).text();
    assert!(small.contains("pinned docs/keep/sub") && small.contains("here   cached"), "{small}");
    let all = b.ok(["pin"]).text();
    assert!(all.starts_with("docs/keep/sub  2 files, ") && all.contains("all here"), "{all}");
    assert!(b.ok(["status"]).text().contains("pins          1, all here"));
}

/// What is kept of what was deleted below the pin of that name.
fn kept(machine: &Machine, name: &str) -> Option<Value> {
    Some(pin(machine, name)?["kept"].clone()).filter(|kept| !kept.is_null())
}

#[test]
fn what_the_owner_deletes_stays_for_a_while() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.ok(["pin", "docs/keep"]);
    let gone = ["keep/tiny", "keep/large", "keep/sub/small"];
    for path in gone.into_iter().chain(["keep-not"]) {
        fs::remove_file(scratch.path("a/docs").join(path)).unwrap();
    }
    // Another file has the same bytes as "keep/tiny": that one is not kept because it was deleted.
    let told = wait_for("two are kept", LIMIT, || kept(&b, "docs/keep").filter(|kept| kept["files"] == 2));
    assert_eq!(told["bytes"], 9_000_001 + 20_000, "{told}");
    assert!(pin(&b, "docs/keep").unwrap().get("mass_deletions").is_none());
    b.ok(["cache", "limit", "0B"]);
    b.ok(["cache", "trim"]);
    a.kill9();
    b.stop();
    b.restart();
    let listed = b.ok(["pin", "--deleted", "--json", "docs/keep"]).of_type("deleted");
    assert_eq!(listed.len(), gone.len(), "{listed:?}");
    for line in &listed {
        let path = line["path"].as_str().unwrap();
        let (bytes, blob) = (&files[path], line["blob"].as_str().unwrap());
        assert_eq!((&line["bytes_here"], &line["peer"]), (&bytes.len().into(), &"a".into()), "{line}");
        assert!(b.ok(["cat", &format!("blob:{}", &blob[..12])]).stdout == *bytes, "{path}");
        assert!(b.ok(["cat", "--range", "0..50", &format!("blob:{blob}")]).stdout == bytes[..50], "{path}");
        let to = scratch.path("back");
        b.ok([Path::new("get"), format!("blob:{blob}").as_ref(), &to]);
        assert!(fs::read(&to).unwrap() == *bytes, "{path}");
        let refused = b.run([Path::new("get"), format!("blob:{blob}").as_ref(), &to]);
        assert_ne!(refused.code, 0, "something is there: {refused:?}");
        fs::remove_file(to).unwrap();
    }
    b.exits(7, ["cat", "blob:0123456789"]);
    b.exits(2, ["cat", "blob:0123456"]);
    let text = b.ok(["pin"]).text();
    assert!(text.contains("kept after deletion: 2 files, 8.60 MiB, until 20"), "{text}");
    assert!(b.ok(["status"]).text().contains("kept after deletion: 2 files"));

    // Accepted, they are files of the cache as all others.
    b.ok(["pin", "--accept-deletions", "docs/keep/sub"]);
    assert_eq!(kept(&b, "docs/keep").unwrap()["files"], 1);
    b.ok(["pin", "--accept-deletions", "docs"]);
    assert!(kept(&b, "docs/keep").is_none() && b.ok(["pin", "--deleted", "--json"]).of_type("deleted").is_empty());
    b.ok(["cache", "trim"]);
    let large = listed.iter().find(|line| line["path"] == "keep/large").unwrap()["blob"].as_str().unwrap();
    assert_ne!(b.run(["cat", &format!("blob:{large}")]).code, 0);
    reads(&b, "keep/again", &files["keep/again"]);
}

#[test]
fn what_was_deleted_goes_when_its_time_is_over_or_nothing_pins_it() {
    let (scratch, files) = (Scratch::new(), files());
    let a = holder(&scratch, "a", &files);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.ok(["pin", "docs/keep", "docs/other"]);
    for path in ["keep/large", "other/file"] {
        fs::remove_file(scratch.path("a/docs").join(path)).unwrap();
    }
    wait_for("one is kept of each", LIMIT, || kept(&b, "docs/keep").and(kept(&b, "docs/other")).map(drop));
    b.ok(["unpin", "docs/other"]);
    b.ok(["pin", "docs/other"]);
    assert!(kept(&b, "docs/other").is_none());
    b.stop();
    fs::write(b.home().join("config.toml"), "[pin]\nkeep = \"1s\"\n").unwrap();
    b.restart();
    wait_for("it is kept no longer", LIMIT, || kept(&b, "docs/keep").is_none().then_some(()));
}

/// Everything is replaced, as by a program that asks for a ransom.
#[test]
fn a_mass_deletion_is_told_until_it_is_accepted() {
    let scratch = Scratch::new();
    let root = scratch.dir("a/docs");
    let name = |number: usize, end: &str| root.join(format!("{number}{end}"));
    for number in 0..150 {
        fs::write(name(number, ".txt"), format!("text {number}")).unwrap();
    }
    let a = Machine::quick(&scratch, "a", &[&root]);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.ok(["pin", "docs"]);
    for number in 0..120 {
        fs::write(name(number, ".locked"), format!("locked {number}")).unwrap();
        fs::remove_file(name(number, ".txt")).unwrap();
    }
    let told = wait_for("a mass deletion is told", LIMIT, || {
        let masses = b.status()["pins"]["mass_deletions"].clone();
        Some(masses[0].clone()).filter(|mass| mass["files"] == 120)
    });
    assert_eq!((&told["arena"], &told["peer"], &told["of"]), (&"docs".into(), &"a".into(), &150.into()), "{told}");
    for text in [b.ok(["status"]).text(), b.ok(["pin"]).text()] {
        assert!(text.contains("a deleted 120 of 150 files of docs on 20"), "{text}");
        assert!(text.contains("blob pin --accept-deletions docs"), "{text}");
    }
    b.stop();
    b.restart();
    wait_for("all are kept", LIMIT, || kept(&b, "docs").filter(|kept| kept["files"] == 120));
    b.ok(["pin", "--accept-deletions", "docs"]);
    assert!(!b.ok(["status"]).text().contains("deleted 120"));
    assert!(kept(&b, "docs").is_none());
}

const LIMIT: Duration = Duration::from_secs(90);
