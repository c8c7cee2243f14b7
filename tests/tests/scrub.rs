//! Verifying a part at a time, and by itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Duration,
};

use tests::{Machine, Scratch, path_of, ranges_of, wait_for};

/// Samples take what was verified longest ago: ten tenths are everything, once.
#[test]
fn samples_go_round() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let root = scratch.dir("docs");
    let mut names = BTreeSet::new();
    for n in 0..50 {
        let name = format!("dir/{n}");
        fs::create_dir_all(root.join("dir")).unwrap();
        fs::write(root.join(&name), vec![n as u8; 40_000]).unwrap();
        names.insert(name.into_bytes());
    }
    let a = Machine::up(&scratch, "a", &[&root]);
    a.ok(["verify"]);
    names.iter().for_each(|name| scratch.rot(&root.join(std::str::from_utf8(name).unwrap()), &[20_000]));
    for round in 0..2 {
        let mut seen = BTreeMap::<Vec<u8>, usize>::new();
        for _ in 0..10 {
            let sampled = a.exits(4, ["verify", "--sample", "10%", "--json"]);
            let summary = sampled.summary();
            assert_eq!((&summary["files"], &summary["damaged_files"]), (&5.into(), &5.into()), "{summary}");
            for damage in sampled.of_type("damage") {
                assert_eq!(ranges_of(&damage), [(16384, 32768)]);
                *seen.entry(path_of(&damage)).or_default() += 1;
            }
            // A restart does not begin anew.
            if seen.len() == 25 {
                a.stop();
                a.restart();
            }
        }
        assert!(seen.values().all(|times| *times == 1), "in round {round}: {seen:?}");
        assert_eq!(seen.into_keys().collect::<BTreeSet<_>>(), names);
    }
    let budgeted = a.exits(4, ["verify", "--budget", "1m", "--json"]).summary();
    assert_eq!((&budgeted["damaged_files"], &budgeted["left_bytes"]), (&50.into(), &0.into()), "{budgeted}");
    a.exits(2, ["verify", "--sample", "0%"]);
    a.exits(2, ["verify", "--sample", "half"]);
    a.exits(2, ["verify", "--budget", "soon"]);
}

const SCRUB: &str = "[scrub]\nperiod = \"1s\"\nrate = \"200 MiB\"\n";

/// Nobody gives a command: what rots is found, shown, and mended if that is allowed.
#[test]
fn the_daemon_finds_and_mends_by_itself() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let (root, copy) = (scratch.dir("docs"), scratch.path("copy"));
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(root.join("file"), &bytes).unwrap();
    let a = Machine::up_with_config(&scratch, "a", &[&root], &format!("{SCRUB}repair = false\n"));
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.ok([Path::new("get"), "docs".as_ref(), &copy]);
    b.ok([Path::new("arena"), "add".as_ref(), "mirror".as_ref(), &copy]);
    a.hears(&b);

    scratch.rot(&root.join("file"), &[5, 1_000_000, 2_999_999]);
    let scrub = |a: &Machine, name: &str| a.status()["scrub"][name].as_u64().unwrap_or_default();
    wait_for("the damage is found and shown", Duration::from_secs(60), || {
        (scrub(&a, "damaged_files") == 1).then_some(())
    });
    assert!(scrub(&a, "found_files") >= 1 && scrub(&a, "repaired_files") == 0);
    assert!(a.ok(["status"]).text().contains("damaged now: 1 files"), "{}", a.ok(["status"]).text());
    assert!(fs::read(root.join("file")).unwrap() != bytes, "it was not to be mended");

    a.stop();
    fs::write(a.home().join("config.toml"), format!("{SCRUB}repair = true\n")).unwrap();
    let mtime = fs::metadata(root.join("file")).unwrap().modified().unwrap();
    a.restart();
    wait_for("the damage is mended", Duration::from_secs(60), || {
        (scrub(&a, "repaired_files") == 1 && scrub(&a, "damaged_files") == 0).then_some(())
    });
    assert!(fs::read(root.join("file")).unwrap() == bytes);
    assert_eq!(fs::metadata(root.join("file")).unwrap().modified().unwrap(), mtime);
    a.ok(["verify"]);
}
