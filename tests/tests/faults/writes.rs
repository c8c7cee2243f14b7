//! What a destination cannot write, sync, name or open: told with what, where and at which side; the next attempt mends it,
//! with what had come before; and the daemon answers all along.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use tests::{Fault, Machine, Output, Scratch, can_attach, wait_for};

use crate::{failed, is_indexed, nothing_is_left, received, two, write};

/// Goes through the cache in several writes, each of a chunk group at least.
const LARGE: u64 = 4_000_000;
const GROUP: u64 = 16_384;
const IO_ERROR: &str = "Input/output error";
const NO_SPACE: &str = "No space left on device";
const TOO_MANY: &str = "Too many open files";

/// Which of the paths of a blob that comes through the cache.
#[derive(Debug, Clone, Copy)]
enum Part {
    Data,
    Outboard,
    Directory,
}

/// What strikes a large file on its way: the `nth` of the calls about a part of it, or all from there on; what is said of
/// it; and how much of it need not come again.
#[derive(Debug, Clone, Copy)]
struct Case {
    call: &'static str,
    part: Part,
    error: &'static str,
    nth: usize,
    says: &'static [&'static str],
    reused: u64,
}

const fn case(call: &'static str, part: Part, error: &'static str, says: &'static [&'static str]) -> Case {
    Case { call, part, error, nth: 1, says, reused: 0 }
}

const CASES: &[Case] = &[
    case("pwritev", Part::Data, "EIO", &["write", ".data\": ", IO_ERROR]),
    Case { nth: 3, reused: 2 * GROUP, ..case("pwritev", Part::Data, "EIO", &["write", ".data\": ", IO_ERROR]) },
    case("pwrite64", Part::Outboard, "EIO", &["write", ".obao4\": ", IO_ERROR]),
    case("ftruncate", Part::Data, "EIO", &["create", ".data\": ", IO_ERROR]),
    case("ftruncate", Part::Outboard, "EIO", &["create", ".obao4\": ", IO_ERROR]),
    case("fsync", Part::Data, "EIO", &["sync", ".data\": ", IO_ERROR]),
    case("fsync", Part::Outboard, "EIO", &["sync", ".obao4\": ", IO_ERROR]),
    case("fsync", Part::Directory, "EIO", &["sync", IO_ERROR]),
    case("openat", Part::Data, "EMFILE", &["create", ".data\": ", TOO_MANY]),
    case("utimensat", Part::Data, "EIO", &[IO_ERROR]),
    case("renameat2", Part::Data, "EIO", &[IO_ERROR]),
];

#[test]
fn a_large_file_into_an_arena() {
    large(CASES, |name, _| {
        let args = vec!["cp".to_owned(), "--json".to_owned(), format!("a:docs/{name}"), format!("inbox/{name}")];
        (args, format!("place inbox/{name} at b: "), format!("inbox/{name}"))
    });
}

#[test]
fn a_large_file_into_a_directory() {
    large(CASES, |name, inbox| {
        let to = inbox.with_file_name("copies");
        fs::create_dir_all(&to).unwrap();
        let to = to.join(name);
        let args = ["get", "--json", &format!("docs/{name}"), to.to_str().unwrap()].map(str::to_owned).to_vec();
        (args, String::new(), format!("copies/{name}"))
    });
}

/// Each case strikes a file of its own. `command` gives the command for a file, what an error begins with, and where the
/// file will be.
fn large(cases: &[Case], command: impl Fn(&str, &Path) -> (Vec<String>, String, String)) {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let mut contents = Vec::new();
    let (_a, b, inbox) = two(&scratch, |docs| {
        contents = (0..cases.len()).map(|at| write(&docs.join(format!("{at}")), LARGE, at as u64)).collect();
    });
    for (at, (case, bytes)) in cases.iter().zip(&contents).enumerate() {
        let name = at.to_string();
        let (args, begins, to) = command(&name, &inbox);
        let [data, outboard] = cached(&b, bytes);
        let destination = scratch.path(&to);
        let path = match case.part {
            Part::Data => &*data,
            Part::Outboard => &*outboard,
            Part::Directory => data.parent().unwrap(),
        };
        let output = struck(&b, Fault::error(case.call, case.error).at(path).nth(case.nth), &args);
        assert_eq!(output.code, 3, "{case:?}: {}", output.text());
        let reason = failed(&output);
        assert!(reason.starts_with(&begins), "{case:?}: {reason}");
        assert!(case.says.iter().all(|part| reason.contains(part)), "{case:?}: {reason}");
        // The path that failed, or that which was to be made.
        let paths = [path.to_str().unwrap(), destination.to_str().unwrap(), &to, "the cache"];
        assert!(paths.iter().any(|path| reason.contains(path)), "{case:?} names no path: {reason}");
        assert!(!destination.exists(), "{case:?}");

        let again = b.ok(&args);
        let came = received(&again);
        assert!(came <= LARGE + LARGE / 100 - case.reused, "{case:?}: {came} came again");
        // After a sync that failed, nothing counts as being there.
        assert!(came >= LARGE || case.call != "fsync", "{case:?}: only {came} came again");
        assert!(fs::read(&destination).unwrap() == *bytes, "{case:?}");
        if begins.is_empty() {
            assert_eq!(b.ok(["verify", "--json"]).summary()["files"], 0, "{case:?}: nothing stays in the cache");
        }
    }
    nothing_is_left(&b, &inbox);
    is_indexed(&b, "inbox", &inbox);
    b.ok(["verify"]);
}

/// What stays in the cache is told with the exit codes of a read, and mended by the next one.
#[test]
fn a_large_file_into_the_cache() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let mut contents = Vec::new();
    let (_a, b, _) = two(&scratch, |docs| {
        contents = (0..2).map(|at| write(&docs.join(format!("{at}")), LARGE, at)).collect();
    });
    let cases = [("pwritev", "EIO"), ("fsync", "EIO")];
    for (at, ((call, error), bytes)) in cases.into_iter().zip(&contents).enumerate() {
        let source = format!("docs/{at}");
        let args = ["cat", &source, "--peer", "a"].map(str::to_owned);
        let [data, _] = cached(&b, bytes);
        let output = struck(&b, Fault::error(call, error).at(&data), &args);
        assert_eq!((output.code, output.stdout.len()), (1, 0), "{call}: {}", output.stderr);
        assert!(output.stderr.starts_with(&format!("error: read {source}\n")), "{}", output.stderr);
        assert!(output.stderr.contains(IO_ERROR), "{}", output.stderr);
        assert!(output.stderr.contains(data.to_str().unwrap()), "{}", output.stderr);
        assert!(b.ok(&args).stdout == *bytes, "{call}");
        b.ok(["verify"]);
    }
    let verified = b.ok(["verify", "--json"]).summary();
    assert_eq!(verified["files"], 2, "{verified}");
}

/// What the cache has no room for, goes through memory: to standard output, into a directory, and into an arena.
#[test]
fn a_cache_without_room() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let mut contents = Vec::new();
    let (_a, b, inbox) = two(&scratch, |docs| {
        contents = (0..6).map(|at| write(&docs.join(format!("{at}")), LARGE, at)).collect();
    });
    let copies = scratch.dir("copies");
    for (at, bytes) in contents.iter().enumerate() {
        let [data, outboard] = cached(&b, bytes);
        let (source, name) = (format!("docs/{at}"), at.to_string());
        let (args, to) = match at % 3 {
            0 => (vec!["cat".to_owned(), source], None),
            1 => (vec!["get".to_owned(), source, copies.to_str().unwrap().to_owned()], Some(copies.join(&name))),
            _ => (vec!["cp".to_owned(), format!("a:{source}"), format!("inbox/{name}")], Some(inbox.join(&name))),
        };
        // At once, or after a part of it.
        let fault = match at < 3 {
            true => Fault::errors("ftruncate", "ENOSPC").at(&outboard),
            false => Fault::errors("pwritev", "ENOSPC").at(&data).nth(3),
        };
        let output = struck(&b, fault, &args);
        assert_eq!(output.code, 0, "{args:?}: {}", output.text());
        match to {
            None => assert!(output.stdout == *bytes),
            Some(to) => assert!(fs::read(to).unwrap() == *bytes && !data.exists() && !outboard.exists(), "{args:?}"),
        }
    }
    b.ok(["verify"]);
}

/// When a single write finds the disk full, and the next does not, nobody hears of it.
#[test]
fn a_disk_that_is_full_for_a_moment() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let mut bytes = Vec::new();
    let (_a, b, inbox) = two(&scratch, |docs| bytes = write(&docs.join("large"), LARGE, 1));
    let [data, _] = cached(&b, &bytes);
    let args = ["cp", "a:docs/large", "inbox/large"].map(str::to_owned);
    let output = struck(&b, Fault::error("pwritev", "ENOSPC").at(&data).nth(2), &args);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(fs::read(inbox.join("large")).unwrap() == bytes);
    nothing_is_left(&b, &inbox);
    b.ok(["verify"]);
}

/// One of many small files fails, at whichever step: the others arrive, and it does the next time.
#[test]
fn small_files() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let cases = [
        ("get", "pwrite64", "EIO", IO_ERROR),
        ("get", "pwrite64", "ENOSPC", NO_SPACE),
        ("get", "fchmod", "EIO", IO_ERROR),
        ("get", "linkat", "ENOSPC", NO_SPACE),
        ("cp", "pwrite64", "EIO", IO_ERROR),
        ("cp", "pwrite64", "ENOSPC", NO_SPACE),
        ("cp", "pread64", "EIO", IO_ERROR),
        ("cp", "utimensat", "EIO", IO_ERROR),
        ("cp", "fsync", "EIO", IO_ERROR),
        ("cp", "linkat", "ENOSPC", NO_SPACE),
        ("cp", "openat", "EMFILE", TOO_MANY),
    ];
    let (_a, b, inbox) = two(&scratch, |docs| {
        for at in 0..cases.len() {
            for (file, name) in ["one", "three", "two"].into_iter().enumerate() {
                write(&docs.join(format!("{at}/{name}")), 5000, (10 * at + file) as u64);
            }
        }
    });
    for (at, (verb, call, error, says)) in cases.into_iter().enumerate() {
        let from = scratch.path("docs").join(at.to_string());
        let to = match verb {
            "get" => scratch.dir(&format!("copies/{at}")),
            _ => scratch.dir(&format!("inbox/{at}")),
        };
        let sources =
            ["one", "three", "two"].map(|name| format!("{}docs/{at}/{name}", if verb == "cp" { "a:" } else { "" }));
        let destination = if verb == "get" { to.to_str().unwrap().to_owned() } else { format!("inbox/{at}/") };
        let mut args = vec![verb.to_owned(), "--json".to_owned()];
        args.extend(sources);
        args.push(destination);
        let fault = Fault::error(call, error);
        let fault = if ["linkat", "openat"].contains(&call) { fault.at(&to) } else { fault.at_staged() };
        let output = struck(&b, fault, &args);
        assert_eq!(output.code, 3, "{verb} {call}: {}", output.text());
        for line in output.of_type("failed") {
            let reason = line["reason"].as_str().unwrap();
            let name = line["path"].as_str().unwrap().rsplit('/').next().unwrap();
            let what = match verb {
                "get" => format!("create {:?}: ", to.join(name)),
                _ => format!("place inbox/{at}/{name} at b: "),
            };
            assert!(reason.starts_with(&what) && reason.contains(says), "{verb} {call}: {reason}");
        }
        // A sync is of all that are settled together.
        let failures = output.of_type("failed").len();
        assert!(failures == 1 || call == "fsync", "{verb} {call}: {}", output.text());
        assert_eq!(fs::read_dir(&to).unwrap().count(), 3 - failures, "{verb} {call}");
        let again = b.ok(&args);
        assert_eq!(again.summary()["files"], failures, "{verb} {call}: {}", again.text());
        for name in ["one", "three", "two"] {
            assert!(fs::read(to.join(name)).unwrap() == fs::read(from.join(name)).unwrap(), "{verb} {call}");
        }
        if verb == "cp" {
            is_indexed(&b, &format!("inbox/{at}"), &to);
        }
    }
    nothing_is_left(&b, &inbox);
    b.ok(["verify"]);
}

/// The error of a directory is told as it is, also if the directory is there by then; and without a descriptor for the
/// arena, nothing is begun.
#[test]
fn a_directory() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let (_a, b, inbox) = two(&scratch, |docs| drop(write(&docs.join("dir/file"), 5000, 1)));
    let args = ["cp", "--json", "a:docs/dir", "inbox/dir"].map(str::to_owned);
    let output = struck(&b, Fault::error("openat", "ENFILE").at(&inbox), &args);
    assert_eq!(output.code, 1, "{}", output.text());
    let error = output.of_type("error")[0]["error"].as_str().unwrap().to_owned();
    assert!(
        error.contains(inbox.to_str().unwrap()) && error.contains("at b: Too many open files in system"),
        "{error}"
    );
    assert_eq!(fs::read_dir(&inbox).unwrap().count(), 0);

    let output = struck(&b, Fault::error("syncfs", "EIO").at(&inbox), &args);
    assert_eq!(output.code, 3, "{}", output.text());
    let reasons = output.of_type("failed");
    let reason = reasons.iter().find(|line| line["path"] == "dir").unwrap()["reason"].as_str().unwrap();
    assert_eq!(reason, format!("place inbox/dir at b: {IO_ERROR}"));
    b.ok(&args);
    is_indexed(&b, "inbox/dir", &inbox.join("dir"));
    nothing_is_left(&b, &inbox);
}

/// Once the database's file has failed, whichever call it was, the daemon says so and ends; the next one has all that was
/// said to be done, and the same command goes on.
#[test]
fn a_database_that_fails() {
    if !can_attach() {
        return;
    }
    let scratch = Scratch::new();
    let calls = ["pwrite64", "fdatasync"];
    let (a, b, inbox) = two(&scratch, |docs| {
        for (at, call) in calls.into_iter().enumerate() {
            write(&docs.join(call).join("one"), 5000, 2 * at as u64);
            write(&docs.join(call).join("two"), LARGE, 2 * at as u64 + 1);
        }
    });
    let database = b.home().join("state/blobd.redb");
    b.ok(["cp", "a:docs/fdatasync/one", "inbox/first"]);
    for call in calls {
        let (from, to) = (format!("a:docs/{call}"), format!("inbox/{call}"));
        let args = ["mv", "--json", &from, &to];
        // It may end before strace has told of the call; its log says that it struck.
        let (output, _) = Fault::error(call, "EIO").at(&database).during(&b, || b.run(args));
        assert_ne!(output.code, 0, "{call}: {}", output.text());
        wait_for("the daemon ends", Duration::from_secs(20), || (!b.is_running()).then_some(()));
        let log = b.log();
        let said = log.lines().find(|line| line.contains("stopping: the database failed")).expect("it says why");
        assert!(said.contains(database.to_str().unwrap()) && said.contains(IO_ERROR), "{said}");
        for (name, bytes) in [("one", 5000), ("two", LARGE)] {
            let whole =
                |dir: &str| fs::metadata(scratch.path(dir).join(call).join(name)).is_ok_and(|meta| meta.len() == bytes);
            assert!(whole("docs"), "{call}: {name} was not to go yet");
        }
        assert_eq!(b.run(["status"]).code, 10);
        b.kill9();
        b.restart();
        b.hears(&a);
        b.ok(args);
        assert!(!scratch.path("docs").join(call).exists());
        is_indexed(&b, &to, &inbox.join(call));
    }
    is_indexed(&b, "inbox/first", &inbox.join("first"));
    nothing_is_left(&b, &inbox);
    assert_eq!(b.ok(["verify", "--json"]).summary()["files"], 5);
}

/// The files that the cache of a machine has for a blob of these bytes: data and outboard.
fn cached(machine: &Machine, bytes: &[u8]) -> [PathBuf; 2] {
    let hex = blake3::hash(bytes).to_hex();
    let dir = machine.home().join("cache").join(&hex[..2]);
    [dir.join(format!("{hex}.data")), dir.join(format!("{hex}.obao4"))]
}

/// Runs a command at a machine under a fault that must strike, and sees that it answers meanwhile, and still.
#[track_caller]
fn struck(machine: &Machine, fault: Fault<'_>, args: &[String]) -> Output {
    let output = fault.strikes(machine, || {
        let output = machine.run(args);
        machine.status();
        output
    });
    machine.status();
    output
}
