//! Many small files, which are placed many at a time: each comes, or fails, as if it were alone.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Child, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tests::{
    Answer, Batches, Liar, Machine, QUICK, Scratch, file_statement, indexed, random_bytes, wait_for, without_link_times,
};
use tree::BlobId;

use crate::{failures, same, trees::nothing_is_left, two};

type Files = BTreeMap<String, Vec<u8>>;

/// So many that they do not all go together.
fn files(count: usize) -> Files {
    let mut rng = fastrand::Rng::with_seed(11);
    let sizes = (0..count).map(|_| rng.u64(1..9000)).collect::<Vec<_>>();
    sizes.into_iter().enumerate().map(|(number, size)| (name(number), random_bytes(size, &mut rng))).collect()
}

fn name(number: usize) -> String {
    format!("{}/file {number:04}", number % 7)
}

/// A peer called liar with an arena `docs` of these files, and a machine that knows it and holds `inbox`.
fn beside_a_liar(scratch: &Scratch, files: &Files) -> (Liar, Machine) {
    let statements = files.iter().map(|(name, data)| file_statement("docs", name.as_bytes(), data)).collect();
    let liar = Liar::start(statements, &files.values().map(Vec::as_slice).collect::<Vec<_>>(), None);
    let b = Machine::up_with_config(scratch, "b", &[&scratch.dir("inbox")], QUICK);
    b.ok(["peer", "add", "liar", &liar.id().to_string(), "--address", &liar.address()]);
    wait_for("the liar's catalog is heard", Duration::from_secs(30), || {
        (b.peer("liar")?["heard_seq"].as_u64() == Some(liar.head())).then_some(())
    });
    (liar, b)
}

#[track_caller]
fn is_there(files: &Files, root: &Path) {
    for (name, data) in files {
        assert!(fs::read(root.join(name)).is_ok_and(|there| there == *data), "{name}");
    }
}

#[test]
fn small_files_come_many_at_a_time() {
    let scratch = Scratch::new();
    let files = files(600);
    let (liar, b) = beside_a_liar(&scratch, &files);
    liar.answer_batches(Batches::Honest);
    let output = b.ok(["cp", "--json", "liar:docs", "inbox"]);
    is_there(&files, &scratch.path("inbox"));
    let bytes: usize = files.values().map(Vec::len).sum();
    let summary = output.summary();
    assert_eq!((&summary["files"], &summary["bytes"]), (&600.into(), &bytes.into()), "{summary}");
    assert!(summary["bytes_sent"].as_u64() > Some(bytes as u64), "{summary}");
    assert_eq!(liar.times_asked(), 0, "none is asked for alone");
    assert!(liar.batches_asked() < 100, "{} batches", liar.batches_asked());
    // All is said and linked, with the seven directories.
    assert_eq!(b.listed("inbox").len(), 607);
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
}

#[test]
fn a_bad_one_fails_alone() {
    let scratch = Scratch::new();
    let mut files = files(300);
    let (liar, b) = beside_a_liar(&scratch, &files);
    let (bad, in_the_way) = (name(77), name(140));
    liar.answer_batches(Batches::Flipped(BlobId::of(&files[&bad])));
    liar.answer(Answer::FlippedData);
    let inbox = scratch.path("inbox");
    fs::create_dir_all(inbox.join(&in_the_way).parent().unwrap()).unwrap();
    fs::write(inbox.join(&in_the_way), b"mine").unwrap();
    let output = b.exits(3, ["cp", "--json", "liar:docs", "inbox"]);
    let failed: BTreeMap<_, _> = failures(&output).into_iter().collect();
    let of = |name: &str| failed.get(&format!("liar:docs/{name}")).unwrap_or_else(|| panic!("{failed:?}"));
    assert!(of(&bad).contains("it sent wrong bytes"), "{failed:?}");
    assert!(of(&in_the_way).contains("--overwrite"), "{failed:?}");
    assert_eq!((failed.len(), output.summary()["files"].as_u64()), (2, Some(298)), "{failed:?}");
    assert_eq!(liar.times_asked(), 1, "only the bad one is asked for alone");
    assert!(b.log().contains("it sent wrong bytes"), "{}", b.log());
    let there = files.remove(&in_the_way).zip(files.remove(&bad)).unwrap();
    assert!(!inbox.join(&bad).exists() && fs::read(inbox.join(&in_the_way)).unwrap() == b"mine");
    is_there(&files, &inbox);
    nothing_is_left(&b, &inbox);
    // Once it tells the truth, the rest comes.
    liar.answer_batches(Batches::Honest);
    let summary = b.ok(["cp", "--json", "--overwrite", "liar:docs", "inbox"]).summary();
    assert_eq!((&summary["files"], &summary["skipped_files"]), (&2.into(), &298.into()), "{summary}");
    is_there(&[(in_the_way, there.0), (bad, there.1)].into(), &inbox);
}

#[test]
fn what_a_batch_that_ends_early_lacks_comes_alone() {
    let scratch = Scratch::new();
    let files = files(40);
    let (liar, b) = beside_a_liar(&scratch, &files);
    for (batches, to) in [(Batches::EndedAfter(3), "inbox/some"), (Batches::Nothing, "inbox/none")] {
        liar.answer_batches(batches);
        let before = liar.times_asked();
        b.ok(["cp", "liar:docs", to]);
        is_there(&files, &scratch.path(to));
        assert!(batches == Batches::Nothing || liar.times_asked() > before, "the rest is asked for alone");
        b.ok(["arena", "scan", "inbox"]);
        fs::remove_dir_all(scratch.path(to)).unwrap();
        b.ok(["arena", "scan", "inbox"]);
    }
    nothing_is_left(&b, &scratch.path("inbox"));
}

/// The destination dies while many are on their way, or the command does: the next run does the rest.
#[test]
fn what_broke_off_goes_on() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    for (name, data) in files(3000) {
        fs::create_dir_all(docs.join(&name).parent().unwrap()).unwrap();
        fs::write(docs.join(name), data).unwrap();
    }
    let original = without_link_times(indexed(&docs));
    for is_killed in [true, false] {
        let mut copying = a.command(["cp", "docs", "b:inbox"]);
        let mut copying = copying.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        has_begun(&inbox, &mut copying);
        if is_killed {
            b.kill9();
            b.restart_in_place();
        } else {
            let _ = kill_process(Pid::from_child(&copying), Signal::INT);
        }
        wait_for("it ends", Duration::from_secs(90), || copying.try_wait().unwrap());
        for (path, item) in without_link_times(indexed(&inbox)) {
            assert_eq!(Some(&item), original.get(&path), "{:?}", String::from_utf8_lossy(&path));
        }
        b.hears(&a);
        let summary = a.ok(["cp", "--json", "docs", "b:inbox"]).summary();
        assert_eq!(summary["failed_files"], 0, "{summary}");
        same(&indexed(&docs), &inbox);
        assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
        nothing_is_left(&b, &inbox);
        for dir in fs::read_dir(&inbox).unwrap() {
            fs::remove_dir_all(dir.unwrap().path()).unwrap();
        }
        b.ok(["arena", "scan", "inbox"]);
    }
}

/// Waits until a file has come, or the command is over.
fn has_begun(inbox: &Path, command: &mut Child) {
    let has_files = || fs::read_dir(inbox.join("0")).is_ok_and(|mut files| files.next().is_some());
    wait_for("a file comes", Duration::from_secs(60), || {
        (has_files() || command.try_wait().unwrap().is_some()).then_some(())
    });
}
