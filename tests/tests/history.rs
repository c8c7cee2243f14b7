//! What changed when and where (`blob history`), and who has a file's bytes (`blob whereis`).

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    os::unix::ffi::OsStrExt,
    path::Path,
    process::Stdio,
    sync::mpsc,
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::{Machine, Scratch, path_of, target, wait_for, write_tree};

#[test]
fn changes_are_told_in_order() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let other = scratch.dir("other");
    write_tree(&other, &["file"]);
    let a = Machine::quick(&scratch, "a", &[&root, &other]);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let odd: &[u8] = b"a\xffb\n";
    let step = |what: &dyn Fn()| {
        what();
        b.sees("docs", &root);
    };
    step(&|| fs::write(root.join("file"), "one").unwrap());
    step(&|| fs::write(root.join("file"), "two").unwrap());
    step(&|| fs::write(root.join(OsStr::from_bytes(odd)), "").unwrap());
    step(&|| fs::remove_file(root.join("file")).unwrap());
    step(&|| fs::write(root.join("file"), "three").unwrap());

    let hashes = ["one", "two", "three"].map(|text| blake3::hash(text.as_bytes()).to_string());
    let changes = b.ok(["history", "--json", "docs"]).of_type("change");
    let told: Vec<_> = changes.iter().map(|line| (line["change"].as_str().unwrap(), path_of(line))).collect();
    let file = b"file".to_vec();
    let expected = [
        ("new", file.clone()),
        ("changed", file.clone()),
        ("new", odd.to_vec()),
        ("deleted", file.clone()),
        ("changed", file),
    ];
    assert_eq!(told, expected);
    let seqs: Vec<_> = changes.iter().map(|line| line["seq"].as_u64().unwrap()).collect();
    assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:?}");
    let times: Vec<_> = changes.iter().map(|line| line["time"].as_str().unwrap()).collect();
    assert!(times.is_sorted(), "{times:?}");
    for (change, (blob, size, previous)) in [&changes[0], &changes[1], &changes[4]].into_iter().zip([
        (&hashes[0], 3, vec![]),
        (&hashes[1], 3, vec![&hashes[0]]),
        (&hashes[2], 5, vec![&hashes[1], &hashes[0]]),
    ]) {
        assert_eq!(
            [&change["blob"], &change["size"], &change["previous"], &change["peer"], &change["state"]],
            [&json!(blob), &json!(size), &json!(previous), &json!("a"), &json!("file")],
            "{change}"
        );
        assert!(change["mtime"].is_string() && change["arena"] == "docs", "{change}");
    }
    let deleted = &changes[3];
    assert_eq!(
        [&deleted["state"], &deleted["blob"], &deleted["size"]],
        [&json!("deleted"), &json!(null), &json!(null)]
    );

    // The same is told by A of itself; and what B says is another log.
    let own = a.ok(["history", "--json", "docs"]).of_type("change");
    assert_eq!(own, changes);
    assert_eq!(b.ok(["history", "--json", "docs", "--peer", "a"]).of_type("change"), changes);
    assert_eq!(b.ok(["history", "--json", "docs", "--peer", &a.id()]).of_type("change"), changes);
    assert!(b.ok(["history", "--json", "--peer", "b"]).json().is_empty());
    assert!(b.ok(["history", "--json", "--since", "0"]).json().is_empty(), "of B itself");
    let since = seqs[1].to_string();
    let later = b.ok(["history", "--json", "--peer", "a", "--since", &since]).of_type("change");
    assert_eq!(later, changes[2..]);
    assert_eq!(a.ok(["history", "--json", "--since", &since]).of_type("change"), changes[2..]);
    assert_eq!(a.ok(["history", "--json", "other"]).of_type("change").len(), 1);
    let lines = b.ok(["history", "docs"]).text();
    let last = lines.lines().last().unwrap();
    assert!(last.ends_with("changed   docs/file") && last.contains("  a  "), "{last}");
    assert!(lines.contains("docs/a\\xffb\\n\n"), "{lines}");

    for (code, args, expected) in [
        (7, "nowhere", "error: there is no arena nowhere\n"),
        (7, "nowhere --follow", "error: there is no arena nowhere\n"),
        (7, "--peer nobody", "error: no machine is called nobody\n"),
        (2, "docs/file", "error: \"docs/file\" cannot be the name of an arena"),
    ] {
        let refused = b.exits(code, ["history"].into_iter().chain(args.split(' ')));
        assert!(refused.stderr.starts_with(expected), "{args}: {}", refused.stderr);
    }
}

#[test]
fn history_follows_until_it_is_interrupted() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    write_tree(&root, &["file"]);
    let a = Machine::quick(&scratch, "a", &[&root]);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let follow = |args: &[&str]| {
        let mut child = b.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let (said, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = said.send(line);
            }
        });
        (child, lines)
    };
    // A command follows once it has told of a change; those made before it listened are not told.
    let heard = |lines: &mpsc::Receiver<String>| {
        let mut number = 0;
        wait_for("it follows", Duration::from_secs(20), || {
            number += 1;
            fs::write(root.join("file"), format!("before {number}")).unwrap();
            lines.recv_timeout(Duration::from_millis(500)).ok()
        });
    };
    // What comes after change 1000 is not yet there.
    let (mut later, no_lines) = follow(&["history", "-f", "--since", "1000", "--peer", "a"]);
    let (mut child, lines) = follow(&["history", "--json", "-f"]);
    heard(&lines);
    for number in 0..3 {
        let bytes = format!("change {number}");
        fs::write(root.join("file"), &bytes).unwrap();
        wait_for("the change is told", Duration::from_secs(20), || {
            let line = lines.recv_timeout(Duration::from_secs(20)).expect("it is told at once");
            let line: Value = serde_json::from_str(&line).unwrap();
            (line["blob"] == blake3::hash(bytes.as_bytes()).to_string().as_str()).then_some(())
        });
    }
    fs::write(root.join("file"), "unheard of").unwrap();
    lines.recv_timeout(Duration::from_secs(20)).expect("it is told at once");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    kill_process(Pid::from_child(&later), Signal::INT).unwrap();
    assert_eq!(later.wait().unwrap().code(), Some(130));
    assert!(no_lines.recv().is_err());
    // The daemon ends although somebody follows.
    let (mut child, lines) = follow(&["history", "-f"]);
    heard(&lines);
    let (status, took) = b.stop();
    assert!(status.success() && took < Duration::from_secs(9), "{took:?}");
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn whereis_tells_who_has_a_file() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let copy = scratch.dir("copies");
    let data = tests::random_bytes(200_000, &mut fastrand::Rng::with_seed(3));
    fs::write(root.join("file"), &data).unwrap();
    fs::write(copy.join("its copy"), &data).unwrap();
    let odd: &[u8] = b"dir/a\xffb";
    fs::create_dir(root.join("dir")).unwrap();
    fs::write(root.join(OsStr::from_bytes(odd)), "odd").unwrap();
    let a = Machine::quick(&scratch, "a", &[&root]);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    let c = Machine::quick(&scratch, "c", &[&copy]);
    b.join(&a);
    b.join(&c);
    let ask = |machine: &Machine, path: &[u8]| {
        let args = [OsStr::new("whereis"), "--json".as_ref(), &target("docs", path)];
        machine.ok(args).json().remove(0)
    };
    // Of a directory, each file.
    let all = a.ok(["whereis", "--json", "docs"]).of_type("whereis");
    let paths: Vec<_> = all.iter().map(|found| found["path"].as_str().unwrap().to_owned()).collect();
    assert_eq!(paths, ["dir/a\u{fffd}b", "file"]);
    assert!(a.ok(["whereis", "docs/dir"]).text().ends_with("  here\n"), "{}", a.ok(["whereis", "docs/dir"]).text());
    let holder = |found: &Value, id: &str| {
        let holders = found["holders"].as_array().unwrap();
        holders.iter().find(|holder| holder["id"] == id).cloned().unwrap_or_default()
    };
    let (ida, idc) = (a.id(), c.id());

    let here = ask(&a, b"file");
    assert_eq!([&here["bytes_here"], &here["local"]], [&json!(200_000), &json!("in_place")]);
    assert_eq!(here["files_here"], json!([{ "arena": "docs", "path": "file" }]));
    assert!(a.ok(["whereis", "docs/file"]).text().contains("\nbytes  200000 of 200000 here\nfile   docs/file\n"));

    let found = ask(&b, b"file");
    assert_eq!([&found["bytes_here"], &found["local"], &found["files_here"]], [&json!(0), &json!("none"), &json!([])]);
    let (at_a, at_c) = (holder(&found, &ida), holder(&found, &idc));
    assert_eq!([&at_a["name"], &at_a["connected"], &at_a["same_path"]], [&json!("a"), &json!(true), &json!(true)]);
    assert_eq!([&at_c["name"], &at_c["connected"], &at_c["same_path"]], [&json!("c"), &json!(true), &json!(false)]);
    let text = b.ok(["whereis", "docs/file"]).text();
    assert!(
        text.contains("at     a: connected\n") && text.contains("at     c: connected, at another path\n"),
        "{text}"
    );

    // C, which holds a copy under another name, knows A through B.
    c.shows("docs/file", &data);
    let found = ask(&c, b"file");
    assert_eq!([&found["bytes_here"], &found["local"]], [&json!(200_000), &json!("in_place")]);
    assert_eq!(found["files_here"], json!([{ "arena": "copies", "path": "its copy" }]));
    let at_a = holder(&found, &ida);
    assert_eq!([&at_a["through"], &at_a["connected"], &at_a["name"]], [&json!("b"), &json!(false), &json!("a")]);

    b.ok(["cat", "docs/file", "--range", "0..10"]);
    let found = ask(&b, b"file");
    assert_eq!(found["local"], "partial");
    let partly = found["bytes_here"].as_u64().unwrap();
    assert!((16384..200_000).contains(&partly) && partly % 64 == 0, "{partly}");

    assert_eq!(path_of(&ask(&b, odd)), odd);
    a.stop();
    wait_for("A is missed", Duration::from_secs(60), || {
        let at_a = holder(&ask(&b, b"file"), &ida);
        (at_a["connected"] == false && at_a["last_connected"].is_string()).then_some(())
    });
    assert!(b.ok(["whereis", "docs/file"]).text().contains("at     a: not connected since 20"));
    b.exits(7, ["whereis", "docs/nothing"]);
    assert!(b.ok(["whereis", "docs/dir"]).text().ends_with("  not here; at a (not connected)\n"));
}
