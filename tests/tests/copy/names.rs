//! Which machine and which path is meant, and what cannot be meant.

use std::{fs, time::Duration};

use tests::{Machine, Scratch, wait_for};

use crate::{failures, open, same, two};

#[test]
fn what_makes_no_sense_is_refused() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    fs::create_dir(docs.join("d")).unwrap();
    fs::write(docs.join("d/file"), b"file").unwrap();
    let (id, before) = (a.id(), tests::indexed(&docs));
    let check = |code, args: &[&str], expected: &str| {
        let output = a.exits(code, args);
        assert!(output.stderr.contains(expected), "{args:?}: {}", output.stderr);
        same(&before, &docs);
        assert_eq!(fs::read_dir(&inbox).unwrap().count(), 0);
    };
    // Both ends at the same machine, by whichever name.
    for to in ["docs/other", "a:docs/other", &format!("{id}:docs/other")] {
        check(2, &["mv", "docs/d", to], "plain mv");
        check(2, &["mv", "b:inbox/d", "b:inbox/e"], "plain mv");
    }
    check(2, &["cp", "docs", "docs/d/all"], "into itself");
    check(2, &["cp", "docs/d", "a:docs/d/again"], "into itself");
    check(2, &["cp", "docs/d", "docs", "b:inbox/x"], "several sources");
    check(2, &["cp", "docs/d"], "");
    check(2, &["cp", ":docs/d", "b:inbox"], "");
    check(7, &["cp", "docs/no such", "b:inbox"], "there is no docs/no such");
    check(7, &["cp", "inbox/file", "b:inbox"], "does not hold an arena inbox");
    check(7, &["cp", "b:inbox/no such", "docs"], "there is no b:inbox/no such");
    check(7, &["cp", "docs/d", "nobody:inbox"], "no peer is called nobody");
    check(7, &["cp", "docs/d", "b:docs"], "b does not hold an arena docs");
    check(1, &["cp", "docs/d/file", "b:inbox/.blobd-0123456789abcdef.part"], "the daemon's own");
    let _ = b;
}

/// Two daemons that hold the same directory: what one has, the other has because it is the same file.
#[test]
fn a_shared_directory_loses_nothing() {
    let scratch = Scratch::new();
    let (shared, other) = (scratch.dir("shared"), scratch.dir("x"));
    fs::write(shared.join("file"), b"the only copy").unwrap();
    fs::create_dir(shared.join("d")).unwrap();
    std::os::unix::fs::symlink("file", shared.join("link")).unwrap();
    let before = tests::indexed(&shared);
    let (a, b) = (open(&scratch, "a", &shared), open(&scratch, "b", &other));
    b.ok(["arena", "add", "mirror", shared.to_str().unwrap()]);
    a.join(&b);
    let output = a.exits(3, ["mv", "--json", "shared/file", "shared/link", "b:mirror"]);
    for (_, reason) in failures(&output) {
        assert!(reason.contains("the very file"), "{reason}");
    }
    assert_eq!(failures(&output).len(), 2);
    same(&before, &shared);
    // Under another name it is another file, and the move is one.
    a.ok(["mv", "shared/file", "b:mirror/d/moved"]);
    assert_eq!(fs::read(shared.join("d/moved")).unwrap(), b"the only copy");
    assert!(!shared.join("file").exists());
}

/// Behind the address of the one that is meant is another one, which would take orders too.
#[test]
fn the_wrong_machine_is_told_nothing() {
    let scratch = Scratch::new();
    let (a, docs, b, _) = two(&scratch);
    fs::write(docs.join("file"), b"file").unwrap();
    let imposters = scratch.dir("elsewhere/inbox");
    let c = open(&scratch, "c", &imposters);
    c.join(&a);
    let address = c.address();
    b.kill9();
    // The address of b is now said to be c's.
    a.ok(["peer", "add", "b", &b_id(&a), "--address", &address]);
    wait_for("the refusal shows in status", Duration::from_secs(60), || {
        a.peer("b")?["last_error"].as_str()?.contains(&address).then_some(())
    });
    let output = a.exits(6, ["mv", "docs/file", "b:inbox"]);
    assert!(output.stderr.contains("have b do its part"), "{}", output.stderr);
    assert_eq!(fs::read(docs.join("file")).unwrap(), b"file");
    assert_eq!(fs::read_dir(&imposters).unwrap().count(), 0);
}

fn b_id(a: &Machine) -> String {
    a.peer("b").unwrap()["id"].as_str().unwrap().to_owned()
}
