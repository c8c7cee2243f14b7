//! A machine whose database was lost, or restored from an older copy, says other things under numbers that it has used
//! before; and one that was away for longer than the logs reach. All others end with what is so.

use std::{fs, path::Path};

use tests::{Machine, QUICK, Scratch, Tree, write_tree};

/// Changes something, a file deleted and one renamed among it; each round other things, and as many.
fn change(root: &Path, round: u32) {
    for number in 0..5 {
        fs::write(root.join(format!("edited {number}")), format!("round {round}")).unwrap();
    }
    fs::write(root.join(format!("new in {round}")), "").unwrap();
    fs::remove_file(root.join(format!("deleted in {round}"))).unwrap();
    fs::rename(root.join(format!("renamed in {round}")), root.join(format!("renamed once more in {round}"))).unwrap();
}

fn household(scratch: &Scratch) -> (std::path::PathBuf, [Machine; 3]) {
    let root = scratch.dir("docs");
    write_tree(&root, &["empty/", "dir/file"]);
    for round in 0..5 {
        write_tree(&root, &[&format!("deleted in {round}"), &format!("renamed in {round}")]);
    }
    let a = Machine::quick(scratch, "a", &[&root]);
    let b = Machine::quick::<&Path>(scratch, "b", &[]);
    let c = Machine::quick::<&Path>(scratch, "c", &[]);
    b.join(&a);
    c.join(&b);
    (root, [a, b, c])
}

#[test]
fn a_database_restored_from_an_older_copy() {
    let scratch = Scratch::new();
    let (root, machines) = household(&scratch);
    let [a, b, c] = &machines;
    let database = a.home().join("state/blobd.redb");
    change(&root, 0);
    c.sees("docs", &root);
    a.stop();
    fs::copy(&database, scratch.path("copy")).unwrap();
    a.restart_in_place();
    change(&root, 1);
    c.sees("docs", &root);
    let said = a.status()["seq"].as_u64();

    // The same numbers are used again, with B away, for other things.
    a.stop();
    b.stop();
    fs::copy(scratch.path("copy"), &database).unwrap();
    a.restart_in_place();
    change(&root, 2);
    a.sees("docs", &root);
    change(&root, 3);
    a.sees("docs", &root);
    assert!(a.status()["seq"].as_u64() >= said, "the numbers overlap");
    b.restart_in_place();
    for machine in &machines {
        machine.sees("docs", &root);
    }

    // And with B there, and fewer numbers than it has heard.
    a.stop();
    fs::copy(scratch.path("copy"), &database).unwrap();
    fs::remove_file(root.join("dir/file")).unwrap();
    a.restart_in_place();
    for machine in &machines {
        machine.sees("docs", &root);
    }
    change(&root, 4);
    for machine in &machines {
        machine.sees("docs", &root);
    }
    // They are told apart from what somebody edited: nothing is in conflict.
    c.is_in_conflict_at(&[]);
}

#[test]
fn a_state_directory_that_is_lost_but_for_the_key() {
    let scratch = Scratch::new();
    let (root, machines) = household(&scratch);
    let [a, b, c] = &machines;
    change(&root, 0);
    c.sees("docs", &root);
    a.stop();
    for entry in fs::read_dir(a.home().join("state")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().is_some_and(|name| name != "key") {
            fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path)).unwrap();
        }
    }
    change(&root, 1);
    a.restart_in_place();
    a.ok(["peer", "add", "b", &b.id(), "--address", &b.address()]);
    b.lists("docs", &Tree::new());
    c.lists("docs", &Tree::new());
    a.ok([Path::new("arena"), "add".as_ref(), "docs".as_ref(), &root]);
    for machine in &machines {
        machine.sees("docs", &root);
    }
    change(&root, 2);
    for machine in &machines {
        machine.sees("docs", &root);
    }
}

#[test]
fn a_machine_that_was_away_for_longer_than_the_logs_reach() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    write_tree(&root, &["first", "dir/file", "empty/"]);
    let config = format!("{QUICK}[history]\nlimit = 10\n");
    let a = Machine::up_with_config(&scratch, "a", &[&root], &config);
    let b = Machine::up_with_config::<&Path>(&scratch, "b", &[], &config);
    let c = Machine::up_with_config::<&Path>(&scratch, "c", &[], &config);
    b.join(&a);
    c.join(&b);
    c.sees("docs", &root);
    c.stop();
    for number in 0..50 {
        write_tree(&root, &[&format!("new {number}")]);
    }
    b.sees("docs", &root);
    for number in 0..49 {
        fs::remove_file(root.join(format!("new {number}"))).unwrap();
    }
    fs::remove_file(root.join("first")).unwrap();
    b.sees("docs", &root);
    c.restart_in_place();
    c.sees("docs", &root);
    fs::write(root.join("new 49"), "goes on").unwrap();
    c.sees("docs", &root);
    for machine in [&a, &b, &c] {
        let changes = machine.ok(["history", "--json"]).of_type("change");
        assert!((1..=10).contains(&changes.len()), "{} changes at {}", changes.len(), machine.name());
        assert!(changes.iter().all(|change| change["path"] != "first" || change["change"] == "deleted"));
    }
}
