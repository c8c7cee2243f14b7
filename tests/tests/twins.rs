//! A home that was cloned: two machines run with one key.

use std::{fs, path::Path, process::Command, time::Duration};

use tests::{Machine, Scratch, wait_for};

#[test]
fn whoever_meets_two_machines_with_one_key_says_so_and_so_do_they() {
    let scratch = Scratch::new();
    let (docs, other) = (scratch.dir("docs"), scratch.dir("other"));
    fs::write(docs.join("file"), "of the first").unwrap();
    let a = Machine::watching(&scratch, "a", &[&docs]);
    let c = Machine::watching(&scratch, "c", &[&other]);
    a.join(&c);
    a.hears(&c);
    a.stop();
    let clone = scratch.path("clone");
    let copied = Command::new("cp").arg("-a").arg(a.home()).arg(&clone).status().unwrap();
    assert!(copied.success());
    a.restart();
    let twin = Machine::up_again_at::<&Path>(&clone, &scratch, "twin", &[]);
    let limit = Duration::from_secs(60);
    wait_for("c sees it", limit, || (c.status()["peers"][0]["twins"] == true).then_some(()));
    wait_for("both are told", limit, || (a.status()["twin"] == true && twin.status()["twin"] == true).then_some(()));
    assert_eq!(c.status()["twin"], false);
    assert!(c.log().contains("two machines run with one key"), "{}", c.log());
    for told in [&a, &twin] {
        assert!(told.log().contains("another machine runs with this one's key"), "{}", told.log());
        assert!(told.ok(["status"]).text().contains("another machine runs"));
    }
    assert!(c.ok(["status"]).text().contains("two machines run with its key"));
}
