//! Files that somebody works on while they are moved: what was written last is at one end or the other.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    process::{Child, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tests::{Machine, Scratch, indexed, random_bytes, wait_for};

use crate::{hard_tree, same, trees::nothing_is_left, two};

/// One after the other is appended to, rewritten, replaced and deleted while all of them are moved, again and again.
#[test]
fn nothing_that_is_written_meanwhile_is_lost() {
    let scratch = Scratch::new();
    let (a, docs, _b, inbox) = two(&scratch);
    let mut rng = fastrand::Rng::new();
    let names: Vec<String> = (0..40).map(|number| format!("file {number:02}")).collect();
    let write = |name: &str, text: &str| fs::write(docs.join(name), format!("{name} {text} {}", "x".repeat(30_000)));
    names.iter().for_each(|name| write(name, "first").unwrap());
    let mut moving = a.command(["mv", "docs", "b:inbox"]);
    let mut moving = moving.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // What each file had in the end, of those that somebody wrote to.
    let mut last: Vec<Option<Vec<u8>>> = vec![None; names.len()];
    while moving.try_wait().unwrap().is_none() {
        let number = rng.usize(..names.len());
        let (name, path) = (&names[number], docs.join(&names[number]));
        match rng.u8(..3) {
            0 => {
                // Only if it is still there: through this very file, whose name may be gone by then.
                let Ok(mut file) = OpenOptions::new().append(true).open(&path) else { continue };
                file.write_all(b" appended").unwrap();
                // Without its name nobody reads it any more.
                last[number] = fs::read(&path).ok().filter(|bytes| bytes.ends_with(b" appended"));
            }
            1 => {
                let text = format!("rewritten {}", rng.u64(..));
                write(name, &text).unwrap();
                last[number] = Some(fs::read(&path).unwrap_or_default()).filter(|bytes| !bytes.is_empty());
            }
            _ => {
                let new = scratch.path("new");
                fs::write(&new, format!("{name} replaced {}", rng.u64(..))).unwrap();
                last[number] = Some(fs::read(&new).unwrap());
                fs::rename(&new, &path).unwrap();
            }
        }
    }
    for (name, last) in names.iter().zip(last) {
        let (here, there) = (fs::read(docs.join(name)).ok(), fs::read(inbox.join(name)).ok());
        assert!(here.is_some() || there.is_some(), "{name} is nowhere");
        if let Some(last) = last {
            let kept = [&here, &there].into_iter().flatten().any(|bytes| *bytes == last);
            assert!(kept, "{name}: what was written last is lost");
        }
    }
    a.run(["mv", "--overwrite", "docs", "b:inbox"]);
}

/// A large file that is appended to while it is on its way stays, with what was appended.
#[test]
fn a_file_that_grows_on_its_way_stays() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    // Until it is caught on its way.
    for size in [60_000_000, 200_000_000, 500_000_000] {
        let mut bytes = random_bytes(size, &mut fastrand::Rng::new());
        fs::write(docs.join("large"), &bytes).unwrap();
        a.ok(["arena", "scan", "docs"]);
        let mut moving = a.command(["mv", "--overwrite", "docs/large", "b:inbox"]);
        let mut moving = moving.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        has_begun(&b, &mut moving);
        let caught = OpenOptions::new().append(true).open(docs.join("large"));
        let caught = caught.map(|mut file| file.write_all(b"more").unwrap());
        let status = wait_for("it ends", Duration::from_secs(120), || moving.try_wait().unwrap());
        if caught.is_err() {
            assert!(fs::read(inbox.join("large")).unwrap() == bytes);
            continue;
        }
        bytes.extend(b"more");
        assert_ne!(status.code(), Some(0));
        assert!(fs::read(docs.join("large")).unwrap() == bytes);
        // Once it rests, it goes, and what has come of the first is no obstacle but for its name.
        a.ok(["mv", "--overwrite", "docs/large", "b:inbox"]);
        assert!(fs::read(inbox.join("large")).unwrap() == bytes && !docs.join("large").exists());
        return;
    }
    panic!("half a gigabyte goes too fast to be caught");
}

/// Ctrl-C ends the command at once; the daemons go on, nothing is half there, and the next run does the rest.
#[test]
fn an_interrupted_copy_goes_on() {
    let scratch = Scratch::new();
    let (a, docs, b, inbox) = two(&scratch);
    hard_tree(&docs);
    fs::write(docs.join("huge"), random_bytes(60_000_000, &mut fastrand::Rng::new())).unwrap();
    let original = indexed(&docs);
    let mut copying = a.command(["cp", "docs", "b:inbox"]);
    let mut copying = copying.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    has_begun(&b, &mut copying);
    let _ = kill_process(Pid::from_child(&copying), Signal::INT);
    let status = wait_for("it ends", Duration::from_secs(10), || copying.try_wait().unwrap());
    assert!([Some(130), Some(0)].contains(&status.code()), "{status:?}");
    // What is there by its name is whole.
    for (path, item) in indexed(&inbox) {
        assert_eq!(Some(&item), original.get(&path), "{:?}", String::from_utf8_lossy(&path));
    }
    assert_eq!(a.ok(["cp", "--json", "docs", "b:inbox"]).summary()["failed_files"], 0);
    same(&original, &inbox);
    same(&original, &docs);
    nothing_is_left(&b, &inbox);
    a.ok(["mv", "docs", "b:inbox"]);
    assert_eq!(fs::read_dir(&docs).unwrap().count(), 0);
}

/// Waits until a large file is on its way to a machine, by way of its cache, or the command is over.
fn has_begun(machine: &Machine, command: &mut Child) {
    let cache = machine.home().join("cache");
    wait_for("some of it comes", Duration::from_secs(60), || {
        let dirs = fs::read_dir(&cache).unwrap().flatten().filter(|dir| dir.file_name() != "incoming");
        let is_coming = dirs.filter_map(|dir| fs::read_dir(dir.path()).ok()).any(|mut files| files.next().is_some());
        (is_coming || command.try_wait().unwrap().is_some()).then_some(())
    });
}

/// What the disk lost nobody's word brings back: a source is not removed for a copy that has rotted since.
#[test]
fn a_rotten_copy_is_no_reason_to_remove_the_source() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let (a, docs, b, inbox) = two(&scratch);
    let bytes = random_bytes(200_000, &mut fastrand::Rng::new());
    fs::write(docs.join("file"), &bytes).unwrap();
    a.ok(["cp", "docs/file", "b:inbox"]);
    scratch.rot(&inbox.join("file"), &[100_000]);
    let output = a.exits(3, ["mv", "docs/file", "b:inbox"]);
    assert!(output.stderr.contains("damaged"), "{}", output.stderr);
    assert!(fs::read(docs.join("file")).unwrap() == bytes);
    a.ok(["arena", "scan", "docs"]);
    b.hears(&a);
    b.ok(["repair"]);
    a.ok(["mv", "docs/file", "b:inbox"]);
    assert!(fs::read(inbox.join("file")).unwrap() == bytes && !docs.join("file").exists());
    // Nor is a rotten source taken for what it was.
    fs::write(docs.join("other"), &bytes[..50_000]).unwrap();
    a.ok(["cp", "docs/other", "b:inbox"]);
    scratch.rot(&docs.join("other"), &[7]);
    a.exits(3, ["mv", "docs/other", "b:inbox"]);
    assert!(docs.join("other").exists());
}
