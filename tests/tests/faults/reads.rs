//! What a source cannot read or open: it comes from whoever else has it; else the error names the file and the side. And
//! what cannot be read while scrubbing is damage, not the end of the daemon.

use std::{fs, path::Path, time::Duration};

use tests::{Fault, Machine, Scratch, can_attach, wait_for};

use crate::{failed, is_indexed, nothing_is_left, open, two, write};

const LARGE: u64 = 2_000_000;

/// Two have it, and one of them cannot read it.
#[test]
fn bytes_that_one_peer_cannot_read_come_from_another() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let mut bytes = Vec::new();
    let (a, b, inbox) = two(&scratch, |docs| bytes = write(&docs.join("large"), LARGE, 1));
    write(&scratch.path("copy/large"), LARGE, 1);
    let c = open(&scratch, "c", &scratch.path("copy"));
    b.join(&c);
    // So that it is not c that gives all of it at once.
    c.ok(["limit", "--up", "1MiB"]);
    let from = scratch.path("docs/large");
    Fault::errors("pread64", "EIO").at(&from).strikes(&a, || b.ok(["cp", "a:docs/large", "inbox/large"]));
    assert!(fs::read(inbox.join("large")).unwrap() == bytes);
    is_indexed(&b, "inbox", &inbox);
    nothing_is_left(&b, &inbox);
    // What could not be read is under quarantine until it is verified.
    let verified = a.ok(["verify", "--json"]).summary();
    assert_eq!(verified["damaged_files"], 0, "{verified}");
    for machine in [&a, &b, &c] {
        machine.ok(["verify"]);
    }
}

/// Nobody else has it.
#[test]
fn bytes_that_nobody_can_read_are_missed_by_name() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let (docs, sizes) = (scratch.path("docs"), [("large", LARGE), ("small", 5000)]);
    let (a, b, inbox) =
        two(&scratch, |docs| sizes.iter().for_each(|(name, size)| drop(write(&docs.join(name), *size, *size))));
    for (name, _) in sizes {
        for (call, error) in [("pread64", "EIO"), ("openat2", "EMFILE")] {
            let (from, to) = (format!("a:docs/{name}"), format!("inbox/{name}"));
            let args = ["mv", "--json", &from, &to];
            let path = if call == "openat2" { docs.clone() } else { docs.join(name) };
            let output = Fault::errors(call, error).at(&path).strikes(&a, || b.run(args));
            assert_eq!(output.code, 6, "{call} {name}: {}", output.text());
            let reason = failed(&output);
            assert!(reason.starts_with(&format!("place inbox/{name} at b: fetch blob ")), "{reason}");
            assert!(reason.contains("no peer gave all of it: a: "), "{reason}");
            assert_eq!(output.of_type("failed")[0]["source"], *from);
            assert!(docs.join(name).exists() && !inbox.join(name).exists());
            // What was not read is no longer offered, until it is found to be sound.
            a.ok(["verify", &format!("docs/{name}")]);
        }
    }
    for (name, size) in sizes {
        b.ok(["mv", &format!("a:docs/{name}"), &format!("inbox/{name}")]);
        assert_eq!(fs::metadata(inbox.join(name)).unwrap().len(), size);
        assert!(!docs.join(name).exists());
    }
    is_indexed(&b, "inbox", &inbox);
    nothing_is_left(&b, &inbox);
    b.ok(["verify"]);
}

/// Just what cannot be read is damaged, as long as it cannot; and the rest is verified all the same.
#[test]
fn a_scrub_that_cannot_read() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    write(&docs.join("file"), LARGE, 1);
    write(&docs.join("other"), LARGE, 2);
    let a = Machine::up_with_config(&scratch, "a", &[&docs], "[scrub]\nperiod = \"1s\"\nrate = \"200 MiB\"\n");
    let damaged = |count: u64| {
        wait_for(&format!("{count} files are damaged"), Duration::from_secs(30), || {
            (a.status()["scrub"]["damaged_files"].as_u64() == Some(count)).then_some(())
        });
    };
    let pid = a.pid();
    Fault::errors("pread64", "EIO").at(&docs.join("file")).strikes(&a, || damaged(1));
    assert!(a.is_running() && a.pid() == pid);
    damaged(0);
    assert!(a.log().contains("scrubbing found damage"));
    a.ok(["verify"]);
    assert_eq!(fs::metadata(docs.join("file")).unwrap().len(), LARGE);
}

/// The control socket outlives a moment without descriptors, and so do connections of peers.
#[test]
fn no_descriptor_for_who_asks() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let a = Machine::up::<&Path>(&scratch, "a", &[]);
    Fault::error("accept4", "EMFILE").strikes(&a, || a.ok(["status"]));
    a.ok(["status"]);
}
