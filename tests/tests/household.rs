//! A household of more than two machines: what one has is passed on by those who meet it, whoever is away, and what was
//! deleted stays so.

use std::{fs, os::unix::fs::symlink, path::Path};

use tests::{Machine, Mtime, Scratch, Tree, listable, set_mtime, wait_for, write_tree};

/// A, whose files are in `root`, meets B, and B meets C; A and C never meet.
fn chain(scratch: &Scratch, root: &Path) -> [Machine; 3] {
    let a = Machine::quick(scratch, "a", &[root]);
    let b = Machine::quick::<&Path>(scratch, "b", &[]);
    let c = Machine::quick::<&Path>(scratch, "c", &[]);
    b.join(&a);
    c.join(&b);
    [a, b, c]
}

fn docs(scratch: &Scratch) -> std::path::PathBuf {
    let root = scratch.dir("docs");
    write_tree(
        &root,
        &["edited", "deleted", "renamed", "dir/one", "dir/two", "moved/deep/three", "empty/", "e/m/pty/"],
    );
    symlink("edited", root.join("link")).unwrap();
    root
}

#[test]
fn what_a_has_reaches_c_which_never_meets_it() {
    let scratch = Scratch::new();
    let root = docs(&scratch);
    let [a, b, c] = chain(&scratch, &root);
    c.sees("docs", &root);

    fs::write(root.join("edited"), "edited at A").unwrap();
    fs::remove_file(root.join("deleted")).unwrap();
    fs::rename(root.join("renamed"), root.join("new name")).unwrap();
    fs::rename(root.join("moved"), root.join("there now")).unwrap();
    fs::remove_dir(root.join("empty")).unwrap();
    write_tree(&root, &["another empty/", "dir/three"]);
    c.sees("docs", &root);

    a.stop();
    c.sees("docs", &root);
    b.stop();
    c.sees("docs", &root);
    b.restart_in_place();
    c.hears(&b);
    c.sees("docs", &root);
    a.restart_in_place();
    fs::write(root.join("edited"), "edited again").unwrap();
    c.sees("docs", &root);

    // B misses a deletion.
    b.stop();
    fs::remove_file(root.join("dir/one")).unwrap();
    fs::remove_dir_all(root.join("there now")).unwrap();
    a.sees("docs", &root);
    b.restart_in_place();
    c.sees("docs", &root);

    // Whoever starts in which order, nothing comes back to life.
    for machine in [&a, &b, &c] {
        machine.stop();
    }
    fs::remove_file(root.join("dir/two")).unwrap();
    let before = c_alone(&c);
    assert!(before.contains_key(&b"dir/two"[..]));
    b.restart_in_place();
    c.hears(&b);
    assert_eq!(tests::differences(&before, &c.listed("docs")), [""; 0]);
    a.restart_in_place();
    for machine in [&a, &b, &c] {
        machine.sees("docs", &root);
    }
    a.stop();
    b.stop();
    c.stop();
    c.restart_in_place();
    b.restart_in_place();
    c.hears(&b);
    b.hears(&c);
    b.sees("docs", &root);
    c.sees("docs", &root);
}

/// What C lists while it is the only one that runs.
fn c_alone(c: &Machine) -> Tree {
    c.restart_in_place();
    c.listed("docs")
}

/// Whoever joins one machine sees the files of all when `join` returns, also of those that are off.
#[test]
fn a_new_machine_sees_the_whole_household_at_once() {
    let scratch = Scratch::new();
    let roots = ["ours", "music", "notes"].map(|name| {
        let root = scratch.dir(name);
        write_tree(&root, &["file", "dir/file", "empty/"]);
        fs::write(root.join("who"), name).unwrap();
        root
    });
    let a = Machine::quick(&scratch, "a", &[&roots[0]]);
    let b = Machine::quick(&scratch, "b", &[&roots[1]]);
    let c = Machine::quick(&scratch, "c", &[&roots[2]]);
    b.join(&a);
    c.join(&b);
    b.sees("ours", &roots[0]);
    b.sees("notes", &roots[2]);
    a.sees("notes", &roots[2]);
    a.stop();
    c.stop();
    let d = Machine::quick::<&Path>(&scratch, "d", &[]);
    d.ok(["join", b.ok(["invite"]).text().trim()]);
    for (name, root) in ["ours", "music", "notes"].iter().zip(&roots) {
        assert_eq!(tests::differences(&listable(root), &d.listed(name)), [""; 0], "{name}");
    }
}

/// Clocks that are decades off, in both directions, stop no update.
#[test]
fn wrong_clocks_stop_nothing() {
    let scratch = Scratch::new();
    let root = docs(&scratch);
    let [a, _b, c] = chain(&scratch, &root);
    for (number, seconds) in [4_102_444_800, 1, 4_000_000_000, -1_000_000_000, 0].into_iter().enumerate() {
        // In another directory first, so that no other mtime is ever seen.
        let file = scratch.path("file");
        fs::write(&file, format!("edit {number}")).unwrap();
        set_mtime(&file, Mtime(seconds, 5));
        fs::rename(&file, root.join("edited")).unwrap();
        set_mtime(&root.join("dir"), Mtime(-seconds, 0));
        c.shows("docs/edited", format!("edit {number}").as_bytes());
        c.sees("docs", &root);
    }
    fs::remove_file(root.join("edited")).unwrap();
    c.sees("docs", &root);
    a.sees("docs", &root);
}

#[test]
fn a_machine_that_is_removed_is_seen_no_more() {
    let scratch = Scratch::new();
    let root = docs(&scratch);
    let [a, b, c] = chain(&scratch, &root);
    c.sees("docs", &root);
    b.ok(["peer", "rm", "a"]);
    b.lists("docs", &Tree::new());
    c.lists("docs", &Tree::new());
    assert_eq!(b.ok(["ls"]).text() + &c.ok(["ls"]).text(), "");
    a.ok(["peer", "rm", "b"]);
    b.join(&a);
    b.sees("docs", &root);
    c.sees("docs", &root);
    fs::write(root.join("edited"), "after all this").unwrap();
    c.sees("docs", &root);
}

/// C meets both. B lets go of A: C keeps what A says, and tells B, who sees it through C.
#[test]
fn a_machine_that_one_removes_is_seen_through_the_others() {
    let scratch = Scratch::new();
    let root = docs(&scratch);
    let [a, b, c] = chain(&scratch, &root);
    c.join(&a);
    b.ok(["peer", "rm", "a"]);
    assert_eq!(tests::differences(&listable(&root), &c.listed("docs")), [""; 0]);
    b.sees("docs", &root);
    assert_eq!(tests::differences(&listable(&root), &c.listed("docs")), [""; 0]);
    let target = "docs/edited";
    let found = b.ok(["whereis", "--json", target]).json().remove(0);
    assert_eq!(found["holders"][0]["through"], "c", "{found}");
    fs::write(root.join("edited"), "seen by both").unwrap();
    b.sees("docs", &root);
    c.sees("docs", &root);
    assert!(b.peer("a").is_none());
    wait_for("A stays known at C", std::time::Duration::from_secs(5), || c.peer("a").map(drop));
}
