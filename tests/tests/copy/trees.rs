//! Trees arrive whole, whoever directs it, and go from where they were.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tests::{Machine, Scratch, indexed, wait_for};

use crate::{failures, hard_tree, leaves, open, same, two};

#[test]
fn a_tree_is_pushed_and_pulled_and_copied_within_a_machine() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    hard_tree(&docs);
    for (dir, mode) in [("d", 0o700), ("d/e", 0o775), ("d-before", 0o711), ("hollow/inner", 0o770)] {
        fs::set_permissions(docs.join(dir), PermissionsExt::from_mode(mode)).unwrap();
    }
    let original = indexed(&docs);
    // What was written this moment goes along.
    let output = a.ok(["cp", "--json", "docs", "b:inbox/pushed"]);
    same(&original, &inbox.join("pushed"));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for dir in ["d", "d/e", "d-before", "hollow/inner"] {
        assert_eq!(mode(&inbox.join("pushed").join(dir)), mode(&docs.join(dir)), "{dir}");
    }
    let summary = output.summary();
    assert_eq!((&summary["files"], &summary["failed_files"]), (&leaves(&original).into(), &0.into()), "{summary}");
    let large = output.of_type("copied").into_iter().find(|line| line["source"] == "docs/large").unwrap();
    assert_eq!((&large["destination"], &large["bytes"]), (&"b:inbox/pushed/large".into(), &2_900_000.into()));
    assert_eq!(large["blob"], blake3::hash(&fs::read(docs.join("large")).unwrap()).to_string());
    assert!(large["bytes_sent"].as_u64().unwrap() > 2_900_000, "{large}");
    // It is said at once, and nothing of it is read again.
    assert_eq!(b.listed("inbox").len(), original.len() + 1);
    b.rests();
    assert_eq!(b.kept_up(0).0, 0, "{}", b.log());
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
    // Once more: there is nothing to do.
    let summary = a.ok(["cp", "--json", "docs", "b:inbox/pushed"]).summary();
    let expected = (0.into(), leaves(&original).into(), 0.into());
    assert_eq!(
        (&summary["files"], &summary["skipped_files"], &summary["bytes_sent"]),
        (&expected.0, &expected.1, &expected.2)
    );

    b.ok(["cp", "a:docs", "inbox/pulled"]);
    same(&original, &inbox.join("pulled"));
    let within = b.ok(["cp", "--json", "inbox/pushed", "b:inbox/again"]).summary();
    same(&original, &inbox.join("again"));
    assert_eq!(within["bytes_sent"], 0, "{within}");
    same(&original, &docs);
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
    nothing_is_left(&b, &inbox);
}

#[test]
fn a_third_machine_directs() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    hard_tree(&docs);
    let original = indexed(&docs);
    let c = open(&scratch, "c", &scratch.dir("other"));
    c.join(&a);
    c.join(&b);
    c.sees("docs", &docs);
    c.ok(["cp", "a:docs/d", "b:inbox"]);
    same(&indexed(&docs.join("d")), &inbox.join("d"));
    fs::remove_dir_all(inbox.join("d")).unwrap();
    let output = c.ok(["mv", "--json", "a:docs", "b:inbox/moved"]);
    assert_eq!(output.of_type("moved").len() as u64, leaves(&original));
    same(&original, &inbox.join("moved"));
    assert_eq!(fs::read_dir(&docs).unwrap().count(), 0);
    assert!(a.listed("docs").is_empty(), "it is said at once");
    // Not a byte of it came by way of the one who directs.
    assert_eq!(c.status()["cache"]["bytes"], 0);
}

/// What was moved is gone, with the directories that it leaves empty, and no others.
#[test]
fn a_move_leaves_what_it_did_not_take() {
    let scratch = Scratch::new();
    let (a, docs, _b, inbox) = two(&scratch);
    hard_tree(&docs);
    let mut original = indexed(&docs);
    mknodat(CWD, docs.join("d/e/fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let output = a.ok(["mv", "--json", "docs", "b:inbox"]);
    assert_eq!(output.summary()["files"], leaves(&original));
    same(&original, &inbox);
    original.retain(|path, _| [&b"d"[..], b"d/e"].contains(&&path[..]));
    same(&original, &docs);
    assert!(docs.join("d/e/fifo").exists());
    // Back again, into a directory, under its own name.
    fs::remove_file(docs.join("d/e/fifo")).unwrap();
    a.ok(["mv", "b:inbox/d", "docs/deeper/"]);
    assert!(!inbox.join("d").exists() && docs.join("deeper/d/e/just behind").exists());
    // A single file, under another name.
    a.ok(["mv", "docs/deeper/d/group", "b:inbox/renamed"]);
    assert!(!docs.join("deeper/d/group").exists());
    assert_eq!(fs::metadata(inbox.join("renamed")).unwrap().len(), 16384);
}

/// Where the destination is on another file system than the cache, large files are copied there, and nothing can be renamed
/// from elsewhere.
#[test]
fn a_destination_on_another_file_system() {
    let scratch = Scratch::new();
    let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else { return };
    let docs = scratch.dir("docs");
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    if device(elsewhere.path()) == device(&docs) {
        return;
    }
    let inbox = elsewhere.path().join("inbox");
    fs::create_dir(&inbox).unwrap();
    hard_tree(&docs);
    let original = indexed(&docs);
    let (a, b) = (open(&scratch, "a", &docs), open(&scratch, "b", &inbox));
    a.join(&b);
    a.ok(["cp", "docs", "b:inbox"]);
    same(&original, &inbox);
    nothing_is_left(&b, &inbox);
    for name in ["large", "small", "empty"] {
        fs::write(inbox.join(name), b"to be replaced").unwrap();
    }
    fs::remove_file(inbox.join("d/link")).unwrap();
    std::os::unix::fs::symlink("to be replaced", inbox.join("d/link")).unwrap();
    a.ok(["mv", "--overwrite", "docs", "b:inbox"]);
    same(&original, &inbox);
    nothing_is_left(&b, &inbox);
    assert_eq!(fs::read_dir(&docs).unwrap().count(), 0);
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
}

/// Names of one file are moved like files, and those that are not moved stay as sound as they were.
#[test]
fn hard_links_are_moved_one_by_one() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    fs::create_dir(docs.join("d")).unwrap();
    fs::write(docs.join("stays"), b"one file").unwrap();
    for number in 0..20 {
        fs::hard_link(docs.join("stays"), docs.join(format!("d/{number}"))).unwrap();
    }
    // The first names may have been taken note of before the last ones came, which touched them all.
    a.ok(["arena", "scan", "docs"]);
    a.ok(["mv", "docs/d", "b:inbox"]);
    assert_eq!((fs::read_dir(inbox.join("d")).unwrap().count(), docs.join("d").exists()), (20, false));
    a.ok(["mv", "docs/stays", "b:inbox"]);
    assert_eq!(fs::read(inbox.join("stays")).unwrap(), b"one file");
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
}

/// What is there already with the same bytes is no reason to keep the source, nor to send anything.
#[test]
fn a_move_of_what_is_there_only_removes() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    hard_tree(&docs);
    let original = indexed(&docs);
    a.ok(["cp", "docs", "b:inbox"]);
    let output = a.ok(["mv", "--json", "docs", "b:inbox"]);
    let summary = output.summary();
    assert_eq!((&summary["files"], &summary["bytes_sent"]), (&leaves(&original).into(), &0.into()), "{summary}");
    same(&original, &inbox);
    assert_eq!(tests::differences(&Default::default(), &indexed(&docs)), [""; 0]);
    // Nor is what was put there by other means, and not even looked at yet.
    fs::write(docs.join("new"), b"both have it").unwrap();
    fs::write(inbox.join("new"), b"both have it").unwrap();
    let output = a.ok(["mv", "--json", "docs/new", "b:inbox"]);
    assert_eq!(output.of_type("moved")[0]["bytes_sent"], 0);
    assert!(!docs.join("new").exists());
    b.rests();
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
}

#[test]
fn what_differs_stays_unless_it_is_to_be_replaced() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    for (name, here, there) in [("file", "new one", "old"), ("same size", "1234", "5678"), ("large", "", "short")] {
        fs::write(docs.join(name), here).unwrap();
        fs::write(inbox.join(name), there).unwrap();
    }
    fs::write(docs.join("large"), vec![7; 3_000_000]).unwrap();
    fs::write(docs.join("for link"), b"file").unwrap();
    std::os::unix::fs::symlink("elsewhere", inbox.join("for link")).unwrap();
    std::os::unix::fs::symlink("there", docs.join("link")).unwrap();
    std::os::unix::fs::symlink("elsewhere", inbox.join("link")).unwrap();
    fs::write(docs.join("dir"), b"a file").unwrap();
    fs::create_dir(inbox.join("dir")).unwrap();
    fs::create_dir(docs.join("file in the way")).unwrap();
    fs::write(docs.join("file in the way/x"), b"x").unwrap();
    fs::write(inbox.join("file in the way"), b"no directory").unwrap();
    let before = (indexed(&docs), indexed(&inbox));
    for command in ["cp", "mv"] {
        let output = a.exits(3, [command, "--json", "docs", "b:inbox"]);
        let mut failed: Vec<_> = failures(&output).into_iter().map(|(source, _)| source).collect();
        failed.sort();
        let all = ["dir", "file", "file in the way", "file in the way/x", "for link", "large", "link", "same size"];
        assert_eq!(failed, all.map(|name| format!("docs/{name}")), "{}", output.text());
        assert!(output.text().contains("--overwrite"), "{}", output.text());
        same(&before.0, &docs);
        same(&before.1, &inbox);
    }
    let output = a.exits(3, ["mv", "--overwrite", "--json", "docs", "b:inbox"]);
    let mut failed: Vec<_> = failures(&output).into_iter().map(|(source, _)| source).collect();
    failed.sort();
    assert_eq!(failed, ["docs/dir", "docs/file in the way", "docs/file in the way/x"], "{}", output.text());
    let (mut left, mut expected) = before;
    for name in ["file", "same size", "large", "for link", "link"] {
        expected.insert(name.into(), left.remove(name.as_bytes()).unwrap());
    }
    same(&left, &docs);
    same(&expected, &inbox);
    nothing_is_left(&b, &inbox);
    // The new one comes from the old one: nothing is in conflict with what others still have of it.
    a.hears(&b);
    a.is_in_conflict_at(&[]);
}

#[test]
fn a_dry_run_says_what_would_be_done() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    hard_tree(&docs);
    fs::write(inbox.join("small"), b"other").unwrap();
    fs::copy(docs.join("large"), inbox.join("large")).unwrap();
    wait_for("b knows what it has", Duration::from_secs(30), || (b.listed("inbox").len() == 2).then_some(()));
    a.hears(&b);
    let before = indexed(&docs);
    let (there, files) = (indexed(&inbox), leaves(&before));
    let output = a.exits(3, ["cp", "--dry-run", "--json", "docs", "b:inbox"]);
    assert_eq!(output.of_type("copied").len() as u64, files - 2);
    assert_eq!(output.of_type("skipped")[0]["source"], "docs/large");
    assert_eq!(failures(&output)[0].0, "docs/small");
    assert_eq!(output.summary()["dry_run"], true);
    let output = a.ok(["mv", "--dry-run", "--overwrite", "--json", "docs", "b:inbox"]);
    assert_eq!(output.of_type("moved").len() as u64, files);
    same(&before, &docs);
    same(&there, &inbox);
}

/// Neither files with names for a moment, nor anything aside or in the cache that only passed through.
#[track_caller]
pub(crate) fn nothing_is_left(machine: &Machine, root: &Path) {
    let is_temporary = |path: &[u8]| path.windows(7).any(|part| part == b".blobd-");
    let left: Vec<_> = indexed(root).into_keys().filter(|path| is_temporary(path)).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(fs::read_dir(machine.home().join("cache/incoming")).unwrap().count(), 0);
    assert_eq!(machine.status()["cache"]["bytes"], 0);
}
