//! With libnfs, a client that others wrote and many programs use.

use std::{fs, path::PathBuf, process::Command};

use tests::{Item, Machine, Nfs, Output, Scratch, TreeSpec, build_tree, indexed};

#[test]
fn libnfs_lists_and_reads_a_tree() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    build_tree(&docs, TreeSpec { files: 100, bytes: 1 << 20, big_bytes: 3_000_001 });
    let machine = Machine::up(&scratch, "a", &[&docs]);
    machine.rests();
    let port = Nfs::address(&machine).port();
    let run = |program: &str, args: &[&str], path: &str| {
        let mut command = Command::new(program);
        command.args(args).arg(format!("nfs://127.0.0.1/{path}?nfsport={port}&mountport={port}&version=3"));
        let output = Output::of(command);
        assert_eq!(output.code, 0, "{program} {path}: {}", output.stderr);
        output
    };
    let mut expected = Vec::new();
    for (path, item) in &indexed(&docs) {
        // What is no text, or means something in a URL, cannot be named there.
        let Ok(path) = String::from_utf8(path.clone()) else { continue };
        if path.starts_with("odd/") {
            continue;
        }
        if let Item::File { size, .. } = item {
            expected.push(format!("{size} {path}"));
            let bytes = fs::read(docs.join(&path)).unwrap();
            assert!(run("nfs-cat", &[], &format!("docs/{path}")).stdout == bytes, "{path}");
        }
    }
    let listed = String::from_utf8_lossy(&run("nfs-ls", &["-R"], "docs").stdout).into_owned();
    let mut found: Vec<String> = listed.lines().filter(|line| line.starts_with('-')).filter_map(line_of).collect();
    found.retain(|line| !line.contains(" odd/"));
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

/// The size and the path of a line such as `-rw-rw-r--  1     0     0            2 sub/name`.
fn line_of(line: &str) -> Option<String> {
    let mut words = line.split_ascii_whitespace();
    let size = words.nth(4)?;
    let path = line.split_once(&format!(" {size} "))?.1;
    Some(format!("{size} {}", PathBuf::from(path).display()))
}
