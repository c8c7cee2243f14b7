//! A file whose every copy is damaged, each in other places: as long as each chunk group is whole somewhere, all
//! copies become whole again, and stay what they were in every other respect.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use fastrand::Rng;
use tests::{
    GROUP_BYTES, Machine, Mtime, Scratch, differences, ranges_of, set_mtime, snapshot, wait_for, write_random,
};

/// Of 129 chunk groups, the last one of 5 bytes.
const SIZE: u64 = (2 << 20) + 5;

/// A machine with one directory, in which `file` is a copy of `original` with a time of its own.
fn holder(scratch: &Scratch, name: &str, file: &str, original: &Path) -> Machine {
    let path = scratch.dir(name).join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::copy(original, &path).unwrap();
    set_mtime(&path, Mtime(1_400_000_000 + i64::from(name.as_bytes()[0]), 123_456_789));
    Machine::up(scratch, &format!("{name}-machine"), &[scratch.path(name)])
}

fn original(scratch: &Scratch) -> std::path::PathBuf {
    let path = scratch.path("original");
    write_random(&path, SIZE, &mut Rng::with_seed(11));
    path
}

/// Flips a bit in each of these chunk groups.
fn rot_groups(scratch: &Scratch, path: &Path, groups: &[u64]) {
    scratch.rot(path, &groups.iter().map(|group| group * GROUP_BYTES + group % 5).collect::<Vec<_>>());
}

/// Whichever machine is asked first, it lacks a group in front of one that only it has.
#[test]
fn three_damaged_copies_make_each_other_whole() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let original = original(&scratch);
    let copies: [(&str, &str, &[u64]); 3] = [
        ("nas", "holiday.raw", &[1, 2, 5, 6, 70, 128]),
        ("laptop", "old/2019 holiday.raw", &[0, 1, 5, 40, 41, 42, 43, 44]),
        ("server", "h", &[2, 3, 6, 39, 45, 60, 127]),
    ];
    let machines = copies.map(|(name, file, _)| holder(&scratch, name, file, &original));
    let [a, b, c] = &machines;
    b.join(a);
    c.join(a);
    c.join(b);
    let before = copies.map(|(name, ..)| snapshot(&scratch.path(name)));
    for (name, file, groups) in copies {
        rot_groups(&scratch, &scratch.path(name).join(file), groups);
    }
    for machine in &machines {
        let repaired = machine.ok(["repair", "--json"]);
        assert_eq!(repaired.summary()["repaired_files"], 1, "{}", repaired.text());
    }
    for ((name, ..), before) in copies.iter().zip(&before) {
        assert_eq!(differences(before, &snapshot(&scratch.path(name))), [""; 0], "{name}");
    }
    for machine in &machines {
        assert_eq!(machine.ok(["verify", "--json"]).json().len(), 1, "nothing but the summary");
    }
}

/// Nobody else is there, and none is needed.
#[test]
fn two_damaged_copies_on_one_machine_make_each_other_whole() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let original = original(&scratch);
    let a = holder(&scratch, "nas", "one", &original);
    let root = scratch.path("nas");
    fs::copy(&original, root.join("two")).unwrap();
    a.ok(["arena", "scan"]);
    let before = snapshot(&root);
    rot_groups(&scratch, &root.join("one"), &[0, 5, 6, 128]);
    rot_groups(&scratch, &root.join("two"), &[1, 4, 7, 127]);
    let repaired = a.ok(["repair", "--json"]);
    assert_eq!((&repaired.summary()["repaired_files"], &repaired.summary()["bytes_received"]), (&2.into(), &0.into()));
    assert_eq!(differences(&before, &snapshot(&root)), [""; 0]);
    a.ok(["verify"]);
}

/// The peer has two copies, and only both together are whole: it answers from both.
#[test]
fn two_damaged_copies_of_a_peer_make_one_answer() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let original = original(&scratch);
    let a = holder(&scratch, "nas", "file", &original);
    let b = holder(&scratch, "laptop", "one", &original);
    fs::copy(&original, scratch.path("laptop/two")).unwrap();
    b.ok(["arena", "scan"]);
    a.join(&b);
    let before = snapshot(&scratch.path("nas"));
    rot_groups(&scratch, &scratch.path("nas/file"), &[1, 5, 6, 100]);
    rot_groups(&scratch, &scratch.path("laptop/one"), &[1, 6]);
    rot_groups(&scratch, &scratch.path("laptop/two"), &[5, 100]);
    a.ok(["repair"]);
    assert_eq!(differences(&before, &snapshot(&scratch.path("nas"))), [""; 0]);
    // What is lost in both copies ends no answer for good, and is all that is left.
    rot_groups(&scratch, &scratch.path("nas/file"), &[5, 6, 7, 50, 101]);
    rot_groups(&scratch, &scratch.path("laptop/one"), &[7]);
    rot_groups(&scratch, &scratch.path("laptop/two"), &[6, 7]);
    let unrepaired = a.exits(5, ["repair", "--json"]).of_type("unrepaired");
    assert_eq!(ranges_of(&unrepaired[0]), [(6 * GROUP_BYTES, 8 * GROUP_BYTES)]);
}

/// What is left, and where to look for it.
#[test]
fn what_cannot_be_mended_is_named_with_who_had_it() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let original = original(&scratch);
    let a = holder(&scratch, "nas", "file", &original);
    let says = |why: &str| {
        let unrepaired = a.exits(5, ["repair", "--json"]).of_type("unrepaired").remove(0);
        assert_eq!(ranges_of(&unrepaired), [(GROUP_BYTES, 2 * GROUP_BYTES), (128 * GROUP_BYTES, SIZE)]);
        let reason = unrepaired["reason"].as_str().unwrap();
        assert!(reason.starts_with("no copy here has bytes 16384..32768, 2097152..2097157; "), "{reason}");
        assert!(reason.contains(why), "{why}: {reason}");
    };
    rot_groups(&scratch, &scratch.path("nas/file"), &[1, 128]);
    says("; no other machine ever had it");

    let b = holder(&scratch, "laptop", "file", &original);
    rot_groups(&scratch, &scratch.path("laptop/file"), &[1, 128]);
    a.join(&b);
    says("laptop-machine: it no longer has all of it; had by laptop-machine (connected)");
    b.stop();
    wait_for("it is noticed", Duration::from_secs(30), || {
        a.peer(b.name())?["last_connected"].is_string().then_some(())
    });
    says("; had by laptop-machine (offline, last connected 2");
    a.stop();
    a.restart();
    says("; had by laptop-machine (offline, not connected since the start)");
}

/// Both names of one file are damaged, and both are mended, with what is beside the bytes left as it was.
#[test]
fn hard_links_stay_hard_links() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let original = original(&scratch);
    let a = holder(&scratch, "nas", "one", &original);
    let root = scratch.path("nas");
    fs::hard_link(root.join("one"), root.join("two")).unwrap();
    fs::set_permissions(root.join("one"), fs::Permissions::from_mode(0o640)).unwrap();
    a.ok(["arena", "scan"]);
    let b = holder(&scratch, "laptop", "file", &original);
    a.join(&b);
    let before = snapshot(&root);
    rot_groups(&scratch, &root.join("two"), &[0, 77]);
    assert_eq!(a.ok(["repair", "--json"]).summary()["repaired_files"], 2);
    assert_eq!(differences(&before, &snapshot(&root)), [""; 0]);
    let inode = |name| fs::metadata(root.join(name)).unwrap().ino();
    assert_eq!(inode("one"), inode("two"));
    a.ok(["verify"]);
    assert_eq!(a.ok(["arena", "scan", "--json"]).summary()["suspected"], 0);
}

/// A store with coarse outboards finds damage in units of 1 MiB, and mends only the chunk groups in them that are damaged.
#[test]
fn a_coarse_outboard_is_made_up_for_by_a_peer() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let (root, copy) = (scratch.dir("docs"), scratch.path("copy"));
    write_random(&root.join("file"), 5_000_123, &mut Rng::with_seed(7));
    let before = snapshot(&root);
    let coarse = "[store]\noutboard_grain = \"1 MiB\"\n";
    let a = Machine::up_with_config(&scratch, "a", &[&root], coarse);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    b.ok([Path::new("get"), "docs".as_ref(), &copy]);
    b.ok([Path::new("arena"), "add".as_ref(), "mirror".as_ref(), &copy]);
    a.hears(&b);
    let offsets = [5, 2_000_000, 2_000_001, 4_999_999];
    scratch.rot(&root.join("file"), &offsets);
    let found = a.exits(4, ["verify", "--json"]).of_type("damage");
    assert_eq!(ranges_of(&found[0]), [(0, 2 << 20), (4 << 20, 5_000_123)], "{found:?}");
    let repaired = a.ok(["repair", "--json"]).of_type("repaired");
    assert_eq!(ranges_of(&repaired[0]), tests::groups_of(5_000_123, &offsets));
    // Three groups, the proofs, and the nodes below two megabytes and the rest.
    let received = repaired[0]["bytes_received"].as_u64().unwrap();
    assert!(received < 3 * 16384 + 16384, "{received}");
    assert_eq!(differences(&before, &snapshot(&root)), [""; 0]);
    a.ok(["verify"]);
}
