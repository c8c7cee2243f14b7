//! Two machines hold an arena of the same name. What was made from what decides which version is shown, and no clock.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tests::{Machine, Mtime, Scratch, set_mtime, write_tree};

/// A and B hold an arena `docs` each, with the same in it; B meets A, and C meets B.
fn household(scratch: &Scratch, names: &[&str]) -> ([PathBuf; 2], [Machine; 3]) {
    let roots = ["on a/docs", "on b/docs"].map(|name| scratch.dir(name));
    for root in &roots {
        write_tree(root, names);
    }
    let a = Machine::quick(scratch, "a", &[&roots[0]]);
    let b = Machine::quick(scratch, "b", &[&roots[1]]);
    let c = Machine::quick::<&Path>(scratch, "c", &[]);
    b.join(&a);
    c.join(&b);
    (roots, [a, b, c])
}

#[test]
fn the_edit_of_one_is_shown_whatever_the_clocks_say() {
    let scratch = Scratch::new();
    let (roots, machines) = household(&scratch, &["file", "other", "dir/"]);
    for machine in &machines {
        machine.shows("docs/file", b"file");
        machine.is_in_conflict_at(&[]);
    }
    set_mtime(&roots[1].join("file"), Mtime(4_102_444_800, 0));
    machines[2].ok(["ls"]);
    let edited = scratch.path("edited");
    fs::write(&edited, "edited at A").unwrap();
    set_mtime(&edited, Mtime(915_148_800, 0));
    fs::rename(&edited, roots[0].join("file")).unwrap();
    for machine in &machines {
        machine.shows("docs/file", b"edited at A");
        machine.is_in_conflict_at(&[]);
        let entry = machine.ok(["stat", "--json", "docs/file"]).json().remove(0);
        assert!(entry["mtime"].as_str().unwrap().starts_with("1999-01-01T"), "{entry}");
        assert!(entry.get("conflict").is_none(), "{entry}");
    }
    assert_eq!(machines[1].ok(["cat", "docs/file"]).text(), "edited at A");
    assert_eq!(machines[1].ok(["cat", "--peer", "b", "docs/file"]).text(), "file");

    // B goes on from A's version.
    fs::write(&edited, "edited at B, from A's").unwrap();
    fs::rename(&edited, roots[1].join("file")).unwrap();
    for machine in &machines {
        machine.shows("docs/file", b"edited at B, from A's");
    }
}

#[test]
fn edits_of_both_are_in_conflict_until_one_takes_the_others() {
    let scratch = Scratch::new();
    let (roots, machines) = household(&scratch, &["file", "other"]);
    for machine in &machines {
        machine.shows("docs/file", b"file");
    }
    // While they do not hear of each other.
    let [a, b, c] = &machines;
    b.stop();
    fs::write(roots[0].join("file"), "edited at A").unwrap();
    a.shows("docs/file", b"edited at A");
    fs::write(roots[1].join("file"), "edited at B").unwrap();
    set_mtime(&roots[1].join("file"), Mtime(4_000_000_000, 0));
    b.restart_in_place();
    for machine in &machines {
        machine.is_in_conflict_at(&["file"]);
        machine.shows("docs/file", b"edited at B");
        let listed = machine.ok(["ls", "docs"]).text();
        assert_eq!(listed, "docs/file  (conflict)\ndocs/other\n");
        let stat = machine.ok(["stat", "--json", "docs/file"]).json().remove(0);
        assert_eq!((&stat["conflict"], stat["versions"].as_array().unwrap().len()), (&true.into(), 2), "{stat}");
        let conflict = machine.ok(["conflicts", "--json", "docs/file"]).of_type("conflict").remove(0);
        let blobs = ["edited at B", "edited at A"].map(|text| blake3::hash(text.as_bytes()).to_string());
        let told = [0, 1].map(|number| conflict["versions"][number]["blob"].as_str().unwrap().to_owned());
        assert_eq!(told, blobs, "the one that is shown comes first: {conflict}");
    }
    for machine in [a, b] {
        assert_eq!(machine.ok(["cat", "docs/file"]).text(), "edited at B");
        assert_eq!(machine.ok(["cat", "--peer", "a", "docs/file"]).text(), "edited at A");
        assert_eq!(machine.ok(["cat", "--peer", "b", "docs/file"]).text(), "edited at B");
    }
    let nobody = a.exits(7, ["cat", "--peer", "nobody", "docs/file"]).stderr;
    assert_eq!(nobody, "error: docs/file has no version at nobody\nhint: see which it has with: blob stat docs/file\n");
    c.ok(["conflicts", "docs"]);
    assert_eq!(c.ok(["conflicts", "docs/other"]).stderr, "conflicts: 0\n");
    c.exits(7, ["conflicts", "docs/nothing"]);
    c.exits(7, ["conflicts", "nowhere"]);

    // A takes B's.
    fs::write(roots[0].join("file"), "edited at B").unwrap();
    for machine in &machines {
        machine.is_in_conflict_at(&[]);
        machine.shows("docs/file", b"edited at B");
        assert_eq!(machine.ok(["ls", "docs"]).text(), "docs/file\ndocs/other\n");
    }
    // And goes on from it: no conflict with what it had itself before.
    fs::write(roots[0].join("file"), "edited at A again").unwrap();
    for machine in &machines {
        machine.shows("docs/file", b"edited at A again");
        machine.is_in_conflict_at(&[]);
    }
}

#[test]
fn a_file_and_a_directory_at_one_path() {
    let scratch = Scratch::new();
    let (roots, machines) = household(&scratch, &["other"]);
    write_tree(&roots[0], &["clash"]);
    write_tree(&roots[1], &["clash/inside"]);
    for machine in &machines {
        machine.is_in_conflict_at(&["clash"]);
        let listed = machine.ok(["ls", "-R", "docs"]).text();
        assert_eq!(listed, "docs/clash/  (conflict)\ndocs/clash/inside\ndocs/other\n");
        machine.shows("docs/clash/inside", b"clash/inside");
    }
    assert_eq!(machines[1].ok(["cat", "--peer", "a", "docs/clash"]).text(), "clash");
    assert!(machines[1].exits(2, ["cat", "docs/clash"]).stderr.contains("is not a file"));
    fs::remove_file(roots[0].join("clash")).unwrap();
    for machine in &machines {
        machine.is_in_conflict_at(&[]);
    }
}
