//! What the scanner makes of what it sees: the one place that tells an edit, which is news, from rot, which is not.

use namespace::{Content, Decision, SeenKind, Version, decide};
use tree::{BlobId, Fingerprint, UnixTime};

const T: UnixTime = UnixTime { seconds: 100, nanos: 7 };
const PRINT: Fingerprint = Fingerprint { device: 1, inode: 2, size: 1, mtime: T, ctime: T };

fn later(time: UnixTime) -> UnixTime {
    UnixTime { nanos: time.nanos + 1, ..time }
}

fn known(content: Content) -> Option<Version> {
    Some(Version { content, mtime: T, seq: 9, previous: Vec::new() })
}

fn a_file() -> Option<Version> {
    known(Content::File { blob: BlobId::of(b"x"), size: 1, mode: 0o644 })
}

fn linked(data: &[u8]) -> Option<(BlobId, Fingerprint)> {
    Some((BlobId::of(data), PRINT))
}

fn link(target: &str) -> Content {
    Content::Symlink { target: target.into() }
}

fn seen(fingerprint: Fingerprint) -> SeenKind {
    SeenKind::File { fingerprint, mode: 0o644 }
}

fn check(known: &Option<Version>, linked: Option<(BlobId, Fingerprint)>, seen: SeenKind, expected: Decision) {
    assert_eq!(decide(known.as_ref(), linked, &seen), expected, "{known:?} {linked:?} {seen:?}");
}

#[test]
fn a_file_that_was_a_file() {
    let check = |now, expected| check(&a_file(), linked(b"x"), seen(now), expected);
    check(PRINT, Decision::Unchanged);
    // chmod, a hard link, a file system mounted elsewhere: nobody edited it.
    check(Fingerprint { ctime: later(T), ..PRINT }, Decision::Recheck);
    check(Fingerprint { device: 9, ..PRINT }, Decision::Recheck);
    // touch, a rewrite of the same size, "save" by replacing, growth, and all of it.
    check(Fingerprint { mtime: later(T), ..PRINT }, Decision::Hash);
    check(Fingerprint { mtime: later(T), ctime: later(T), ..PRINT }, Decision::Hash);
    check(Fingerprint { inode: 3, ..PRINT }, Decision::Hash);
    check(Fingerprint { size: 2, ..PRINT }, Decision::Hash);
    // An mtime that runs backwards is an edit like any other.
    let before = UnixTime { seconds: -5, nanos: 0 };
    check(Fingerprint { mtime: before, ..PRINT }, Decision::Hash);
}

#[test]
fn a_file_that_was_none() {
    for known in [None, known(link("y")), known(Content::Deleted), known(Content::Directory { mode: 0o755 })] {
        check(&known, None, seen(PRINT), Decision::Hash);
        // It was hashed and linked, and a crash came before that was said.
        check(&known, linked(b"x"), seen(PRINT), Decision::PublishLinked(BlobId::of(b"x")));
        check(&known, linked(b"x"), seen(Fingerprint { ctime: later(T), ..PRINT }), Decision::Hash);
    }
}

/// What is linked and what was said are written by two commits, and a crash may part them.
#[test]
fn a_file_of_which_only_one_thing_is_known() {
    // The store's row was lost: what was said is all there is to tell an edit by.
    check(&a_file(), None, seen(PRINT), Decision::Recheck);
    check(&a_file(), None, seen(Fingerprint { inode: 7, ..PRINT }), Decision::Recheck);
    check(&a_file(), None, seen(Fingerprint { mtime: later(T), ..PRINT }), Decision::Hash);
    check(&a_file(), None, seen(Fingerprint { size: 2, ..PRINT }), Decision::Hash);
    // An edit was linked, and not yet said.
    check(&a_file(), linked(b"y"), seen(PRINT), Decision::Hash);
}

#[test]
fn a_link() {
    let seen = |target: &str, mtime| SeenKind::Symlink { target: target.into(), mtime };
    let was_link = known(link("y"));
    check(&was_link, None, seen("y", T), Decision::Unchanged);
    check(&was_link, None, seen("y", later(T)), Decision::Publish(link("y"), later(T)));
    check(&was_link, None, seen("z", T), Decision::Publish(link("z"), T));
    check(&a_file(), linked(b"x"), seen("y", T), Decision::Publish(link("y"), T));
    check(&None, None, seen("y", T), Decision::Publish(link("y"), T));
}

#[test]
fn a_directory() {
    let content = |mode| Content::Directory { mode };
    let seen = |mode, mtime| SeenKind::Directory { mode, mtime };
    let was_directory = known(content(0o755));
    check(&was_directory, None, seen(0o755, T), Decision::Unchanged);
    check(&was_directory, None, seen(0o700, T), Decision::Publish(content(0o700), T));
    check(&was_directory, None, seen(0o755, later(T)), Decision::Publish(content(0o755), later(T)));
    check(&a_file(), linked(b"x"), seen(0o755, T), Decision::Publish(content(0o755), T));
    check(&None, None, seen(0o755, T), Decision::Publish(content(0o755), T));
}

#[test]
fn neither() {
    for known in [None, a_file(), known(link("y"))] {
        check(&known, None, SeenKind::Special, Decision::Skip);
    }
}
