//! What the scanner makes of what it sees: the one place that tells an edit from rot. The rows of the table in
//! spec/namespace.md, "Rot or edit".

use namespace::{Content, Decision, LastRead, ReadState, SeenKind, Signs, Version, Witness, decide};
use tree::{BlobId, Fingerprint, UnixTime};

const T: UnixTime = UnixTime { seconds: 100, nanos: 7 };
const PRINT: Fingerprint = Fingerprint { device: 1, inode: 2, birth: Some(T), size: 1, mtime: T, ctime: T };
const LATER: UnixTime = UnixTime { seconds: 100, nanos: 8 };
const TOUCHED: Fingerprint = Fingerprint { ctime: LATER, ..PRINT };
const NEWBORN: Fingerprint = Fingerprint { birth: Some(LATER), ctime: LATER, ..PRINT };
const EDITED: Fingerprint = Fingerprint { mtime: LATER, ctime: LATER, ..PRINT };

const NOTHING: Witness = Witness { signs: SIGNS, continuous: false, times_tell: true };
const WATCHED: Witness = Witness { signs: SIGNS, continuous: true, times_tell: true };
const SIGNS: Signs = Signs { wrote: false, closed: false, moved_here: false, left: false, attributes: false };
const WROTE: Witness = Witness { signs: Signs { wrote: true, ..SIGNS }, continuous: true, times_tell: true };
const CLOSED: Witness = Witness { signs: Signs { closed: true, ..SIGNS }, continuous: true, times_tell: true };
const MOVED: Witness = Witness { signs: Signs { moved_here: true, ..SIGNS }, continuous: true, times_tell: true };
const WITNESSES: [Witness; 5] = [NOTHING, WATCHED, WROTE, CLOSED, MOVED];

fn known(content: Content) -> Option<Version> {
    Some(Version { content, mtime: T, seq: 9, previous: Vec::new() })
}

fn x() -> BlobId {
    BlobId::of(b"x")
}

fn a_file() -> Option<Version> {
    known(Content::File { blob: x(), size: 1, mode: 0o644 })
}

fn read(state: ReadState) -> Option<LastRead> {
    Some(LastRead { blob: x(), fingerprint: PRINT, state })
}

fn link(target: &str) -> Content {
    Content::Symlink { target: target.into() }
}

fn seen(fingerprint: Fingerprint) -> SeenKind {
    SeenKind::File { fingerprint, mode: 0o644 }
}

fn check(said: &Option<Version>, last: Option<LastRead>, seen: SeenKind, witness: Witness, expected: Decision) {
    assert_eq!(decide(said.as_ref(), last, &seen, witness), expected, "{said:?} {last:?} {seen:?} {witness:?}");
}

/// What a file of `state` is with each fingerprint, as seen by each of [`WITNESSES`].
fn table(state: ReadState, rows: &[(Fingerprint, [Decision; 5])]) {
    for (now, expected) in rows {
        for (witness, expected) in WITNESSES.into_iter().zip(expected) {
            check(&a_file(), read(state), seen(*now), witness, expected.clone());
        }
    }
}

const HASH: Decision = Decision::Hash;
const SAME: Decision = Decision::Unchanged;

fn again() -> Decision {
    Decision::Recheck(x())
}

#[test]
fn settled() {
    table(
        ReadState::Settled,
        &[
            (PRINT, [SAME, SAME, SAME, SAME, SAME]),
            (Fingerprint { device: 9, ..PRINT }, [SAME, SAME, SAME, SAME, SAME]),
            (TOUCHED, [again(), again(), HASH, HASH, HASH]),
            (NEWBORN, [again(), HASH, HASH, HASH, HASH]),
            (Fingerprint { inode: 3, ..PRINT }, [again(), HASH, HASH, HASH, HASH]),
            (Fingerprint { size: 2, ..PRINT }, [again(), HASH, HASH, HASH, HASH]),
            (EDITED, [HASH, HASH, HASH, HASH, HASH]),
            // An mtime that runs backwards is an edit like any other.
            (Fingerprint { mtime: UnixTime { seconds: -5, nanos: 0 }, ..PRINT }, [HASH, HASH, HASH, HASH, HASH]),
        ],
    );
}

#[test]
fn racy() {
    table(ReadState::Racy, &[(PRINT, [HASH, HASH, HASH, HASH, HASH]), (TOUCHED, [again(), again(), HASH, HASH, HASH])]);
}

/// Known damage that came back, or was copied with its mtime, is no edit; what a program wrote is.
#[test]
fn damaged_or_suspect() {
    let rows = |same: Decision| {
        [
            (PRINT, [same.clone(), same.clone(), same.clone(), same.clone(), same]),
            (TOUCHED, [again(), again(), HASH, again(), again()]),
            (NEWBORN, [again(), again(), HASH, again(), again()]),
            (EDITED, [HASH, HASH, HASH, HASH, HASH]),
        ]
    };
    table(ReadState::Damaged, &rows(SAME));
    let mut suspect = rows(again());
    // It was read as it is now, and awaits the user; unless the watcher tells later that a program wrote it.
    suspect[1].1 = [SAME, SAME, HASH, SAME, SAME];
    table(ReadState::Suspect(TOUCHED), &suspect);
}

#[test]
fn vanished_and_back() {
    table(
        ReadState::Vanished { damaged: true },
        &[
            (PRINT, [again(), again(), again(), again(), again()]),
            (TOUCHED, [again(), again(), HASH, again(), again()]),
            (EDITED, [HASH, HASH, HASH, HASH, HASH]),
        ],
    );
    table(
        ReadState::Vanished { damaged: false },
        &[
            (PRINT, [again(), again(), again(), HASH, HASH]),
            (NEWBORN, [again(), HASH, HASH, HASH, HASH]),
            (EDITED, [HASH, HASH, HASH, HASH, HASH]),
        ],
    );
}

#[test]
fn a_file_that_was_none() {
    for known in [None, known(link("y")), known(Content::Deleted), known(Content::Directory { mode: 0o755 })] {
        check(&known, None, seen(PRINT), NOTHING, Decision::Hash);
        // It was hashed and linked, and a crash came before that was said.
        let settled = read(ReadState::Settled);
        check(&known, settled, seen(PRINT), NOTHING, Decision::PublishLinked(x()));
        check(&known, settled, seen(TOUCHED), NOTHING, again());
    }
}

/// What is linked and what was said are written by two commits, and a crash may part them.
#[test]
fn a_file_of_which_only_one_thing_is_known() {
    // The store's row was lost: what was said is all there is to tell an edit by.
    let check = |now, expected| check(&a_file(), None, seen(now), NOTHING, expected);
    check(PRINT, again());
    check(Fingerprint { inode: 7, ..PRINT }, again());
    check(EDITED, Decision::Hash);
    check(Fingerprint { size: 2, ..PRINT }, Decision::Hash);
}

#[test]
fn an_edit_that_was_linked_and_not_yet_said() {
    let last = Some(LastRead { blob: BlobId::of(b"y"), fingerprint: PRINT, state: ReadState::Settled });
    check(&a_file(), last, seen(PRINT), NOTHING, Decision::Hash);
}

#[test]
fn a_new_mtime_that_was_linked_and_not_yet_said() {
    let settled = |fingerprint| Some(LastRead { blob: x(), fingerprint, state: ReadState::Settled });
    check(&a_file(), settled(EDITED), seen(EDITED), NOTHING, Decision::PublishLinked(x()));
}

#[test]
fn a_link() {
    let seen = |target: &str, mtime| SeenKind::Symlink { target: target.into(), mtime };
    let check = |said, last, seen, expected| check(&said, last, seen, NOTHING, expected);
    check(known(link("y")), None, seen("y", T), Decision::Unchanged);
    check(known(link("y")), None, seen("y", LATER), Decision::Publish(link("y"), LATER));
    check(known(link("y")), None, seen("z", T), Decision::Publish(link("z"), T));
    check(a_file(), read(ReadState::Settled), seen("y", T), Decision::Publish(link("y"), T));
    check(None, None, seen("y", T), Decision::Publish(link("y"), T));
}

#[test]
fn a_directory() {
    let content = |mode| Content::Directory { mode };
    let seen = |mode, mtime| SeenKind::Directory { mode, mtime };
    let check = |said, last, seen, expected| check(&said, last, seen, NOTHING, expected);
    check(known(content(0o755)), None, seen(0o755, T), Decision::Unchanged);
    check(known(content(0o755)), None, seen(0o700, T), Decision::Publish(content(0o700), T));
    check(known(content(0o755)), None, seen(0o755, LATER), Decision::Publish(content(0o755), LATER));
    check(a_file(), read(ReadState::Settled), seen(0o755, T), Decision::Publish(content(0o755), T));
    check(None, None, seen(0o755, T), Decision::Publish(content(0o755), T));
}

#[test]
fn neither() {
    for known in [None, a_file(), known(link("y"))] {
        check(&known, None, SeenKind::Special, NOTHING, Decision::Skip);
    }
}

/// A file system without a ctime of its own: what nobody saw written is as it was, and what somebody did is read.
#[test]
fn where_times_do_not_tell() {
    for state in [ReadState::Settled, ReadState::Damaged, ReadState::Suspect(PRINT)] {
        for (witness, expected) in WITNESSES.into_iter().zip([SAME, SAME, HASH, HASH, SAME]) {
            let witness = Witness { times_tell: false, ..witness };
            check(&a_file(), read(state), seen(PRINT), witness, expected);
        }
    }
}
