//! The whole session that the product is for, on a tree like people have: hold it, join, list, read, bring it over,
//! let it rot, find the damage to the chunk group, and mend it with just these groups from the other machine.
//!
//! What is found is compared with what an oracle says that shares no code with the product: the blake3 crate for
//! blob ids, and an own walk for everything else.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::Command,
};

use tests::{
    BIG, BIG_BYTES, GROUP_BYTES, Item, Machine, Mtime, Output, Scratch, Tree, TreeSpec, blob, build_tree, differences,
    groups_of, indexed, path_of, ranges_of, set_mtime, snapshot, target, without_link_times, write_random,
};

/// Damage to be done: where in which files.
const DAMAGE: [(&[u8], &[u64]); 6] = [
    // First, middle, last, and two that touch.
    (BIG.as_bytes(), &[5, 100 * GROUP_BYTES, 101 * GROUP_BYTES + 77, BIG_BYTES / 2, BIG_BYTES - 1]),
    (b"odd/size-4194305", &[0, 4 << 20]),
    (b"odd/size-1048577", &[10 * GROUP_BYTES + 1, 11 * GROUP_BYTES, 11 * GROUP_BYTES + 9]),
    (b"odd/size-16385", &[16384]),
    (b"odd/size-1023", &[512]),
    (b"odd/a\xffb", &[1]),
];
const EDITED: &str = "odd/size-1024";
const TOUCHED: &str = "odd/other twin";

#[test]
fn a_tree_is_shared_brought_over_damaged_and_mended() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let root = scratch.path("tree");
    build_tree(&root, TreeSpec { files: 5000, bytes: 200_000_000, big_bytes: BIG_BYTES });
    let original = indexed(&root);
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.ok(["join", &a.ticket()]);
    b.hears(&a);
    a.hears(&b);

    the_listing_is_exact(&b, &original, "none");
    blob_hash_agrees(&root, &original);
    ranges_are_exact(&b, &root);

    let copies = scratch.dir("copies");
    let mirror = copies.join("tree");
    let get = ["get", "--json", "tree"].map(Path::new).into_iter().chain([&*copies]);
    let got = b.ok(get.clone());
    let leaves = original.values().filter(|item| **item != Item::Directory).count();
    assert_eq!(got.summary()["files"], leaves);
    assert_eq!(got.summary()["failed_files"], 0);
    assert_eq!(differences(&without_link_times(original.clone()), &without_link_times(snapshot(&mirror))), [""; 0]);

    let again = b.ok(get).summary();
    // Attributes are asked for anew.
    assert!(again["files"] == 0 && again["bytes_received"].as_u64() < Some(100_000), "{again}");
    assert_eq!(again["skipped_files"], leaves);

    let added = b.ok([Path::new("arena"), "add".as_ref(), "mirror".as_ref(), &mirror, "--json".as_ref()]).summary();
    assert_eq!(added["files"], leaves, "{added}");
    the_listing_is_exact(&b, &original, "in_place");
    a.hears(&b);

    let damage = do_damage(&scratch, &root);
    verify_finds(&a, &damage, &[EDITED, TOUCHED]);
    // A scan reads only what moved.
    let scanned = a.ok(["arena", "scan", "--json"]).summary();
    assert_eq!(scanned["suspected"], 0, "{scanned}");
    b.hears(&a);
    rot_is_never_published(&b, &original, &root);

    // Only the peer has what is needed, and it is off.
    b.stop();
    let few = [target("tree", DAMAGE[4].0), target("tree", DAMAGE[5].0)];
    let alone = a.exits(5, [&"repair".into(), &"--json".into()].into_iter().chain(&few));
    let unrepaired = alone.of_type("unrepaired");
    assert_eq!(unrepaired.len(), 2, "{}", alone.text());
    for line in unrepaired {
        assert!(line["reason"].as_str().is_some_and(|reason| reason.contains("b: ")), "{line}");
        assert_eq!(ranges_of(&line), damage[&path_of(&line)]);
    }
    b.restart();
    b.hears(&a);
    a.hears(&b);
    repair_brings_just_the_damage(&a.ok(["repair", "--json"]), &damage);

    let mut expected = original;
    for path in [EDITED, TOUCHED] {
        expected.insert(path.into(), indexed(&root)[path.as_bytes()].clone());
    }
    assert_eq!(differences(&expected, &indexed(&root)), [""; 0]);
    assert_eq!(a.ok(["verify", "--json"]).json().len(), 1, "nothing but the summary");
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
    let scanned = a.ok(["arena", "scan", "--json"]).summary();
    assert_eq!(scanned["hashed_files"], 0, "mending edits nothing: {scanned}");
}

/// Without a daemon, `verify` and `repair` open the home; what holds it otherwise is told.
#[test]
fn verify_and_repair_work_without_a_daemon() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let root = scratch.dir("docs");
    write_random(&root.join("file"), 1_000_000, &mut fastrand::Rng::with_seed(2));
    fs::copy(root.join("file"), scratch.path("copy")).unwrap();
    let before = indexed(&root);
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up(&scratch, "b", &[scratch.dir("empty")]);
    b.join(&a);
    b.ok([Path::new("get"), "docs".as_ref(), &scratch.path("empty/copies")]);
    b.ok(["arena", "scan"]);
    a.hears(&b);
    a.stop();

    assert_eq!(a.ok(["verify", "--json"]).summary()["files"], 1);
    scratch.rot(&root.join("file"), &[70_000, 999_999]);
    let damage = BTreeMap::from([(b"file".to_vec(), groups_of(1_000_000, &[70_000, 999_999]))]);
    verify_finds(&a, &damage, &[]);
    repair_brings_just_the_damage(&a.ok(["repair", "--json"]), &damage);
    assert_eq!(differences(&before, &indexed(&root)), [""; 0]);
    a.ok(["verify"]);

    a.restart();
    a.ok(["verify"]);
    fs::remove_file(a.home().join("blobd.sock")).unwrap();
    let refused = a.exits(1, ["verify"]);
    assert!(refused.stderr.contains("another process has this home open"), "{}", refused.stderr);
}

/// Damage is served to nobody, whether it was found before or is met on the way, and the sound rest is.
#[test]
fn damage_is_not_served() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let root = scratch.dir("docs");
    for name in ["known", "unknown", "repaired by hand"] {
        write_random(&root.join(name), 300_000, &mut fastrand::Rng::new());
    }
    let read = |name: &str| fs::read(root.join(name)).unwrap();
    let (known, unknown, by_hand) = (read("known"), read("unknown"), read("repaired by hand"));
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    for name in ["known", "unknown", "repaired by hand"] {
        scratch.rot(&root.join(name), &[100_000]);
    }
    a.exits(4, ["verify", "docs/known", "docs/repaired by hand"]);
    for (name, sound) in [("known", &known), ("unknown", &unknown)] {
        let path = format!("docs/{name}");
        for range in ["100000..100001", "98304..98305", "0..300000", ""] {
            let range = if range.is_empty() { vec![] } else { vec!["--range", range] };
            let refused = b.exits(6, [&["cat", &path], &range[..]].concat());
            assert!(sound.starts_with(&refused.stdout), "only sound bytes come before the damage");
            assert!(refused.stderr.contains("a: "), "{}", refused.stderr);
        }
        for (start, end) in [(0, 98304), (114688, 300_000)] {
            let range = format!("{start}..{end}");
            assert!(b.ok(["cat", &path, "--range", &range]).stdout == sound[start..end], "{name} {range}");
        }
        let own = a.exits(6, ["cat", &path]);
        assert!(sound.starts_with(&own.stdout), "its own user gets no damage either");
        let got = b.exits(6, [Path::new("get"), path.as_ref(), &scratch.path(name)]);
        assert!(!scratch.path(name).exists(), "{}", got.stderr);
    }
    // What was met while serving is known to the next verify, and published as nothing new.
    a.ok(["arena", "scan"]);
    a.exits(4, ["verify", "docs/unknown"]);
    b.hears(&a);
    let listed = b.ok(["ls", "-R", "--json", "docs"]).of_type("entry");
    let blobs: BTreeSet<_> = listed.iter().map(|line| line["blob"].as_str().unwrap().to_owned()).collect();
    let expected = [&known, &unknown, &by_hand].map(|data| blake3::hash(data).to_string());
    assert_eq!(blobs, BTreeSet::from(expected));
    // Bytes that are right again are sound again once they have been verified.
    scratch.rot(&root.join("repaired by hand"), &[100_000]);
    a.exits(4, ["verify"]);
    assert!(b.ok(["cat", "docs/repaired by hand"]).stdout == by_hand);
}

/// The mtime of a symbolic link is in the catalog, so that `get` can give it back.
#[test]
fn links_come_with_their_mtimes() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    std::os::unix::fs::symlink("nowhere", root.join("link")).unwrap();
    set_mtime(&root.join("link"), Mtime(1_234_567_890, 123_456_789));
    let a = Machine::up(&scratch, "a", &[&root]);
    let copy = scratch.path("copy");
    a.ok([Path::new("get"), "docs".as_ref(), &copy]);
    assert_eq!(differences(&snapshot(&root), &snapshot(&copy)), [""; 0]);
}

#[track_caller]
fn the_listing_is_exact(b: &Machine, original: &Tree, local: &str) {
    let lines = b.ok(["ls", "-R", "--json", "tree"]).of_type("entry");
    let mut listed = Tree::new();
    for line in &lines {
        assert_eq!(line["arena"], "tree");
        let mtime = || Mtime::from_json(line["mtime"].as_str().unwrap());
        let path = path_of(line);
        let item = match line["kind"].as_str().unwrap() {
            "file" => {
                let size = line["size"].as_u64().unwrap();
                assert!(size == 0 || line["local"] == local, "{line}");
                let blob = blake3::Hash::from_hex(line["blob"].as_str().unwrap()).unwrap();
                // Permissions are not listed; that they come over is seen after `get`.
                let mode = match original.get(&path) {
                    Some(Item::File { mode, .. }) => *mode,
                    _ => 0,
                };
                Item::File { size, blob, mode, mtime: mtime() }
            }
            "symlink" => Item::Symlink { target: path_of(&line["target"]), mtime: mtime() },
            "dir" => Item::Directory,
            other => panic!("{other}"),
        };
        if item != Item::Directory {
            assert_eq!(line["peers"], serde_json::json!(["a"]), "{line}");
        }
        assert!(listed.insert(path, item).is_none(), "listed twice: {line}");
    }
    assert_eq!(differences(original, &listed), [""; 0]);
}

/// `blob hash` of every file, and the blake3 crate.
#[track_caller]
fn blob_hash_agrees(root: &Path, original: &Tree) {
    let files = original.iter().filter_map(|(path, item)| match item {
        Item::File { blob, .. } => Some((path.clone(), *blob)),
        _ => None,
    });
    let files: Vec<_> = files.collect();
    for some in files.chunks(2000) {
        let mut command = Command::new(blob());
        command.current_dir(root).args(["hash", "--"]);
        command.args(some.iter().map(|(path, _)| std::ffi::OsStr::from_bytes(path)));
        let output = Output::of(command);
        assert_eq!(output.code, 0, "{}", output.stderr);
        let lines: Vec<&[u8]> = output.stdout.split(|&b| b == b'\n').filter(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), some.len());
        for (line, (path, hash)) in lines.iter().zip(some) {
            let hex = line.strip_prefix(b"\\").unwrap_or(line).get(..64);
            assert_eq!(hex, Some(hash.to_hex().as_bytes()), "{:?}", String::from_utf8_lossy(path));
        }
    }
}

#[track_caller]
fn ranges_are_exact(b: &Machine, root: &Path) {
    let all = |path: &[u8]| fs::read(root.join(std::ffi::OsStr::from_bytes(path))).unwrap();
    let whole: [&[u8]; 8] = [
        b"odd/empty",
        b"odd/size-1",
        b"odd/size-16385",
        b"odd/\xff\xfe",
        b"odd/a\nb",
        b"odd/-x",
        b"odd/size-1048577",
        &[&b"odd/"[..], &[b'n'; 255]].concat(),
    ];
    for path in whole {
        let output = b.ok([&"cat".into(), &target("tree", path)]);
        assert!(output.stdout == all(path), "{:?}", String::from_utf8_lossy(path));
    }
    let big = all(BIG.as_bytes());
    let size = big.len();
    for (start, end) in [(0, 1), (16383, 16385), (5_000_000, 5_000_000), (50_000_000, 70_000_001), (size - 3, size)] {
        let range = format!("{start}..{end}");
        let output = b.ok(["cat", &format!("tree/{BIG}"), "--range", &range]);
        assert!(output.stdout == big[start..end], "{range}");
    }
    for (range, expected) in [
        (format!("{}..{}", size - 10, size + 10), &big[size - 10..]),
        (format!("{}..", size - 10), &big[size - 10..]),
        ("..10".into(), &big[..10]),
        (format!("{}..{}", size + 5, size + 9), &[]),
    ] {
        let output = b.ok(["cat", &format!("tree/{BIG}"), "--range", &range]);
        assert!(output.stdout == expected, "{range}");
    }
    assert_eq!(b.ok(["cat", "tree/odd/empty", "--range", "0..10"]).stdout, b"");
}

/// Rots, edits and touches files of A. Returns what is then damaged.
fn do_damage(scratch: &Scratch, root: &Path) -> BTreeMap<Vec<u8>, Vec<(u64, u64)>> {
    let mut damage = BTreeMap::new();
    for (path, offsets) in DAMAGE {
        let file = root.join(std::ffi::OsStr::from_bytes(path));
        scratch.rot(&file, offsets);
        damage.insert(path.to_owned(), groups_of(fs::metadata(file).unwrap().len(), offsets));
    }
    fs::File::options().append(true).open(root.join(EDITED)).unwrap().write_all(b"edited").unwrap();
    set_mtime(&root.join(TOUCHED), Mtime(1_700_000_000, 77));
    damage
}

#[track_caller]
fn verify_finds(a: &Machine, damage: &BTreeMap<Vec<u8>, Vec<(u64, u64)>>, modified: &[&str]) {
    let output = a.exits(4, ["verify", "--json"]);
    let lines = output.of_type("damage");
    assert!(lines.iter().all(|line| line["what"] == "data"), "{lines:?}");
    let found: BTreeMap<_, _> = lines.iter().map(|line| (path_of(line), ranges_of(line))).collect();
    assert_eq!((&found, found.len()), (damage, lines.len()));
    let found: BTreeSet<_> = output.of_type("modified").iter().map(path_of).collect();
    assert_eq!(found, modified.iter().map(|path| path.as_bytes().to_owned()).collect());
    let summary = output.summary();
    assert_eq!(summary["damaged_files"], damage.len());
    assert_eq!(summary["damaged_bytes"], bytes_of(damage.values().flatten()));
    assert_eq!(summary["modified_files"], modified.len());
}

#[track_caller]
fn rot_is_never_published(b: &Machine, original: &Tree, root: &Path) {
    let lines = b.ok(["ls", "-R", "--json", "tree"]).of_type("entry");
    let listed: BTreeMap<_, _> = lines.iter().map(|line| (path_of(line), line.clone())).collect();
    let blob_of = |tree: &Tree, path: &[u8]| match &tree[path] {
        Item::File { blob, .. } => blob.to_string(),
        other => panic!("{other:?}"),
    };
    for (path, _) in DAMAGE {
        assert_eq!(listed[path]["blob"], blob_of(original, path));
    }
    let now = snapshot(root);
    assert_eq!(listed[EDITED.as_bytes()]["blob"], blob_of(&now, EDITED.as_bytes()));
    assert_eq!(listed[TOUCHED.as_bytes()]["blob"], blob_of(original, TOUCHED.as_bytes()));
    assert_eq!(Mtime::from_json(listed[TOUCHED.as_bytes()]["mtime"].as_str().unwrap()), Mtime(1_700_000_000, 77));
}

/// All is mended by `b`, and what came is little more than the damaged groups and their proofs.
#[track_caller]
fn repair_brings_just_the_damage(output: &Output, damage: &BTreeMap<Vec<u8>, Vec<(u64, u64)>>) {
    let lines = output.of_type("repaired");
    let mended: BTreeMap<_, _> = lines.iter().map(|line| (path_of(line), ranges_of(line))).collect();
    assert_eq!(&mended, damage);
    assert!(lines.iter().all(|line| line["peers"] == serde_json::json!(["b"])), "{lines:?}");
    let received: u64 = lines.iter().map(|line| line["bytes_received"].as_u64().unwrap()).sum();
    assert_eq!(output.summary()["bytes_received"], received);
    assert_eq!(output.summary()["repaired_files"], damage.len());
    let groups: u64 = damage.values().flatten().map(|(start, end)| (end - start).div_ceil(GROUP_BYTES)).sum();
    // No file here has more than 2^13 groups: 13 pairs of hashes prove one.
    let due = bytes_of(damage.values().flatten()) + groups * 13 * 64 + damage.len() as u64 * 8;
    assert!(received <= due + due / 20, "{received} bytes came, where {due} are due");
    assert!(received >= bytes_of(damage.values().flatten()));
}

fn bytes_of<'a>(ranges: impl Iterator<Item = &'a (u64, u64)>) -> u64 {
    ranges.map(|(start, end)| end - start).sum()
}
