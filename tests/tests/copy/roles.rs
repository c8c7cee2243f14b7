//! Nobody changes anything here unless somebody here has said so.

use std::fs;

use serde_json::json;
use tests::{Machine, QUICK, Scratch, indexed};

use crate::same;

#[test]
fn a_reader_writes_nothing_and_is_told_how_to() {
    let scratch = Scratch::new();
    let (docs, inbox, private) = (scratch.dir("docs"), scratch.dir("inbox"), scratch.dir("private"));
    fs::write(docs.join("file"), b"file").unwrap();
    fs::write(inbox.join("theirs"), b"theirs").unwrap();
    fs::write(private.join("theirs"), b"private").unwrap();
    let a = Machine::up_with_config(&scratch, "a", &[&docs], QUICK);
    let b = Machine::up_with_config(&scratch, "b", &[&inbox, &private], QUICK);
    a.join(&b);
    let before = (indexed(&docs), indexed(&inbox), indexed(&private));
    let unchanged = || {
        same(&before.0, &docs);
        same(&before.1, &inbox);
        same(&before.2, &private);
    };
    let refused = |args: &[&str], arena: &str| {
        let output = a.exits(1, args);
        let expected = format!(
            "a may not write to the arena {arena} at b; to allow it, add to config.toml at b, below a line [roles]: \
             \"a\" = {{ writer = [\"{arena}\"] }}"
        );
        assert!(output.stderr.contains(&expected), "{}", output.stderr);
        unchanged();
    };
    refused(&["cp", "docs/file", "b:inbox"], "inbox");
    refused(&["mv", "docs/file", "b:inbox"], "inbox");
    refused(&["mv", "b:inbox/theirs", "docs"], "inbox");
    assert_eq!(b.ok(["peer", "ls", "--json"]).json()[0]["writer"], json!([]));
    assert!(b.ok(["peer", "ls"]).text().contains("  reader  "));
    // Reading is not restricted.
    a.ok(["cp", "b:inbox/theirs", "docs/copied"]);
    fs::remove_file(docs.join("copied")).unwrap();

    // Just as it was told, without a restart; and for this arena alone.
    fs::write(b.home().join("config.toml"), format!("{QUICK}[roles]\n\"a\" = {{ writer = [\"inbox\"] }}\n")).unwrap();
    refused(&["mv", "docs/file", "b:private"], "private");
    refused(&["mv", "b:private/theirs", "docs"], "private");
    assert_eq!(b.ok(["peer", "ls", "--json"]).json()[0]["writer"], json!(["inbox"]));
    a.ok(["mv", "docs/file", "b:inbox"]);
    assert_eq!(fs::read(inbox.join("file")).unwrap(), b"file");
    a.ok(["mv", "b:inbox/file", "docs"]);
    unchanged();
    // A file that cannot be understood lets nobody write.
    fs::write(b.home().join("config.toml"), "roles = 7").unwrap();
    assert!(a.exits(1, ["cp", "docs/file", "b:inbox"]).stderr.contains("cannot be read"));
    unchanged();
}

#[test]
fn a_ticket_makes_a_writer() {
    let scratch = Scratch::new();
    let (docs, inbox) = (scratch.dir("docs"), scratch.dir("inbox"));
    fs::write(docs.join("file"), b"file").unwrap();
    let a = Machine::up_with_config(&scratch, "a", &[&docs], QUICK);
    let b = Machine::up_with_config(&scratch, "b", &[&inbox], QUICK);
    let ticket = b.ok(["invite", "--role", "writer", "--json"]).json().remove(0);
    assert_eq!(ticket["role"], "writer");
    a.ok(["join", ticket["ticket"].as_str().unwrap()]);
    a.hears(&b);
    a.ok(["cp", "docs/file", "b:inbox"]);
    assert_eq!(fs::read(inbox.join("file")).unwrap(), b"file");
    assert_eq!(b.ok(["peer", "ls", "--json"]).json()[0]["writer"], json!(["*"]));
    assert_eq!(a.ok(["peer", "ls", "--json"]).json()[0]["writer"], json!([]), "who joins gives nothing");
    b.stop();
    b.restart_in_place();
    a.hears(&b);
    a.ok(["cp", "docs/file", "b:inbox/again"]);
    // Another ticket, another role.
    let ticket = b.ok(["invite", "--json"]).json().remove(0);
    a.ok(["join", ticket["ticket"].as_str().unwrap()]);
    assert!(a.exits(1, ["cp", "docs/file", "b:inbox/more"]).stderr.contains("may not write"));
    b.exits(2, ["invite", "--role", "owner"]);
}
