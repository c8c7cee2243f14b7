//! Names of every kind, and what cannot be indexed.

use std::{
    ffi::OsStr,
    fs,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, fs::symlink, net::UnixListener},
    },
};

use rustix::fs::{CWD, FileType, Mode, OFlags, mkdirat, mknodat, openat};
use tests::{path_of, wait_for};

use crate::{LIMIT, Watched, listed, shows, write};

impl Watched {
    /// Waits until these, and nothing else, are listed as skipped.
    #[track_caller]
    fn skips(&self, expected: &[&[u8]]) {
        wait_for(&format!("{} are skipped", expected.len()), LIMIT, || {
            let skipped = self.a.ok(["status", "--skipped", "--json"]).json();
            let paths: Vec<_> = skipped.iter().map(path_of).collect();
            (paths == expected).then_some(())
        });
        assert_eq!(self.a.status()["arenas"][0]["status"]["skipped"].as_u64(), Some(expected.len() as u64));
    }
}

#[test]
fn odd_names() {
    let w = Watched::new(|_| {});
    let b = w.other();
    let long = [b'n'; 255];
    let names: [&[u8]; 13] = [
        b"a:b",
        b"a\nb",
        b" ",
        b"-x",
        b"\xff\xfe",
        b"a\xffb",
        b"back\\slash",
        b"\x1b[31m",
        b"...",
        b"~",
        b"a",
        b"a-b",
        &long,
    ];
    for name in names {
        write(w.path("files").join(OsStr::from_bytes(name)), name);
        write(w.path("dirs").join(OsStr::from_bytes(name)).join("file"), name);
        fs::create_dir_all(w.path("empty").join(OsStr::from_bytes(name))).unwrap();
        fs::create_dir_all(w.path("links")).unwrap();
        symlink(OsStr::from_bytes(name), w.path("links").join(OsStr::from_bytes(name))).unwrap();
    }
    w.shows_all();
    for name in names {
        let name = OsStr::from_bytes(name);
        fs::rename(w.path("files").join(name), w.path("dirs").join(name).join("file")).unwrap();
        fs::remove_dir(w.path("empty").join(name)).unwrap();
        fs::rename(w.path("dirs").join(name), w.path("empty").join(name)).unwrap();
    }
    w.shows_all();
    shows(&b, &w.root);
    w.skips(&[]);
}

#[test]
fn special_files() {
    let w = Watched::new(|root| {
        write(root.join("becomes a fifo"), "file");
        write(root.join("dir/file"), "file");
    });
    let fifo = |name: &str| mknodat(CWD, w.path(name), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    fifo("fifo");
    fifo("dir/fifo");
    let socket = UnixListener::bind(w.path("socket")).unwrap();
    w.skips(&[b"dir/fifo", b"fifo", b"socket"]);
    w.shows_all();
    fs::remove_file(w.path("becomes a fifo")).unwrap();
    fifo("becomes a fifo");
    w.skips(&[b"becomes a fifo", b"dir/fifo", b"fifo", b"socket"]);
    w.shows_all();
    w.a.rests();
    fs::remove_file(w.path("becomes a fifo")).unwrap();
    write(w.path("becomes a fifo"), "file again");
    fs::rename(w.path("dir"), w.path("moved")).unwrap();
    drop(socket);
    fs::remove_file(w.path("socket")).unwrap();
    w.skips(&[b"fifo", b"moved/fifo"]);
    w.shows_all();
    fs::remove_dir_all(w.path("moved")).unwrap();
    fs::remove_file(w.path("fifo")).unwrap();
    w.skips(&[]);
    w.shows_all();
}

/// A tree that goes on deeper than a path can be: that is left out and said, and what is above it is not.
#[test]
fn paths_that_are_too_long() {
    let w = Watched::new(|root| write(root.join("file"), "file"));
    let name = "d".repeat(250);
    let open =
        |dir: &OwnedFd, name: &str| openat(dir, name, OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).unwrap();
    let root = openat(CWD, &w.root, OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).unwrap();
    let mut dirs = vec![root];
    let put = |dir: &OwnedFd| {
        let fd = openat(dir, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR | Mode::WUSR).unwrap();
        rustix::io::write(&fd, b"file").unwrap();
    };
    for _ in 0..18 {
        let last = dirs.last().unwrap();
        mkdirat(last, &*name, Mode::RWXU).unwrap();
        dirs.push(open(last, &name));
        put(dirs.last().unwrap());
    }
    // Sixteen of them are 4,015 bytes.
    let shown = |depth: usize| [vec![&*name; depth], vec!["f"]].concat().join("/").into_bytes();
    wait_for("what a path can name is shown", LIMIT, || {
        let listed = listed(&w.a);
        (1..16).all(|depth| listed.contains_key(&shown(depth))).then_some(())
    });
    w.a.rests();
    let skipped = w.a.ok(["status", "--skipped", "--json"]).json();
    assert!(!skipped.is_empty() && skipped.len() < 5, "{} are skipped", skipped.len());
    assert!(skipped.iter().any(|line| path_of(line).len() > 4096));
    write(w.path("file"), "other bytes");
    wait_for("it goes on", LIMIT, || {
        listed(&w.a)[&b"file"[..]].contains(&blake3::hash(b"other bytes").to_string()).then_some(())
    });
    fs::rename(w.path(&name), w.scratch.path("away")).unwrap();
    w.shows_all();
    w.skips(&[]);
}
