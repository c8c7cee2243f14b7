//! What the scanner makes of what it sees: the one place that tells an edit, which is news, from rot, which is not.

use namespace::{Content, Decision, Known, SeenKind, Version, decide};
use tree::{BlobId, Fingerprint, UnixTime};

const T: UnixTime = UnixTime { seconds: 100, nanos: 7 };
const PRINT: Fingerprint = Fingerprint { device: 1, inode: 2, size: 1, mtime: T, ctime: T };

fn later(time: UnixTime) -> UnixTime {
    UnixTime { nanos: time.nanos + 1, ..time }
}

fn known(content: Content, fingerprint: Option<Fingerprint>) -> Option<Known> {
    let version = Version { content, mtime: T, seq: 9 };
    Some(Known { path: "x".try_into().unwrap(), version, fingerprint })
}

fn a_file() -> Option<Known> {
    known(Content::File { blob: BlobId::of(b"x"), size: 1, mode: 0o644 }, Some(PRINT))
}

fn link(target: &str) -> Content {
    Content::Symlink { target: target.into() }
}

fn check(known: &Option<Known>, seen: SeenKind, expected: Decision) {
    assert_eq!(decide(known.as_ref(), &seen), expected, "{known:?} {seen:?}");
}

#[test]
fn a_file_that_was_a_file() {
    let seen = |fingerprint| SeenKind::File { fingerprint, mode: 0o644 };
    check(&a_file(), seen(PRINT), Decision::Unchanged);
    // chmod, a hard link, a file system mounted elsewhere: nobody edited it.
    check(&a_file(), seen(Fingerprint { ctime: later(T), ..PRINT }), Decision::Recheck);
    check(&a_file(), seen(Fingerprint { device: 9, ..PRINT }), Decision::Recheck);
    // touch, a rewrite of the same size, "save" by replacing, growth, and all of it.
    check(&a_file(), seen(Fingerprint { mtime: later(T), ..PRINT }), Decision::Hash);
    check(&a_file(), seen(Fingerprint { mtime: later(T), ctime: later(T), ..PRINT }), Decision::Hash);
    check(&a_file(), seen(Fingerprint { inode: 3, ..PRINT }), Decision::Hash);
    check(&a_file(), seen(Fingerprint { size: 2, ..PRINT }), Decision::Hash);
    // An mtime that runs backwards is an edit like any other.
    let before = UnixTime { seconds: -5, nanos: 0 };
    check(&a_file(), seen(Fingerprint { mtime: before, ..PRINT }), Decision::Hash);
}

#[test]
fn a_file_that_was_none() {
    let seen = || SeenKind::File { fingerprint: PRINT, mode: 0o644 };
    check(&None, seen(), Decision::Hash);
    check(&known(link("y"), None), seen(), Decision::Hash);
    // Its fingerprint was never written down: then nothing can be said for it.
    let file = a_file().unwrap().version.content;
    check(&known(file, None), seen(), Decision::Hash);
}

#[test]
fn a_link() {
    let seen = |target: &str, mtime| SeenKind::Symlink { target: target.into(), mtime };
    let was_link = known(link("y"), None);
    check(&was_link, seen("y", T), Decision::Unchanged);
    check(&was_link, seen("y", later(T)), Decision::Publish(link("y"), later(T)));
    check(&was_link, seen("z", T), Decision::Publish(link("z"), T));
    check(&a_file(), seen("y", T), Decision::Publish(link("y"), T));
    check(&None, seen("y", T), Decision::Publish(link("y"), T));
}

#[test]
fn neither() {
    for known in [None, a_file(), known(link("y"), None)] {
        check(&known, SeenKind::Special, Decision::Skip);
    }
}
