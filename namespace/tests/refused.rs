//! What a peer may not say. Whatever breaks the rules is refused as a whole: nothing of it is taken in, what was known
//! stays, and the peer may go on as if it had not said it.

mod common;

use std::ops::ControlFlow;

use namespace::{ApplyError, Batch, Content, Cursor, Namespace, PeerId, Statement, Version};
use proptest::prelude::*;
use tree::{BlobId, UnixTime};

use crate::common::{Disk, arena, cases, file, listing, path, peer, says, seconds, symlink};

#[test]
fn changes_out_of_order() {
    check("the same number twice", |batch| batch.statements[1].version.seq = 11);
    check("numbers that fall", |batch| batch.statements.swap(0, 1));
    check("a number beyond the end", |batch| batch.statements[2].version.seq = 15);
    check("a number beyond all ends", |batch| batch.statements[2].version.seq = u64::MAX);
    check("the number 0", |batch| batch.statements[0].version.seq = 0);
}

#[test]
fn ends_out_of_order() {
    check("an end beyond the log's", |batch| batch.upto.seq = 16);
    check("an end before what was said", |batch| batch.upto.seq = 12);
    check("a log's end before the batch's", |batch| batch.head = 13);
    check("an epoch of 0", |batch| batch.upto.epoch = 0);
}

#[test]
fn versions_out_of_bounds() {
    check("a billion nanoseconds", |batch| version(batch).mtime.nanos = 1_000_000_000);
    check("all nanoseconds", |batch| version(batch).mtime.nanos = u32::MAX);
    let some = BlobId::of(b"x");
    let file = |blob, size, mode| Content::File { blob, size, mode };
    for (what, content) in [
        ("a setuid bit", file(some, 1, 0o4755)),
        ("one mode bit too many", file(some, 1, 0o1000)),
        ("nothing, named as something", file(some, 0, 0o644)),
        ("something, named as nothing", file(BlobId::EMPTY, 1, 0o644)),
        ("a link to nothing", Content::Symlink { target: vec![] }),
        ("a link with a NUL", Content::Symlink { target: b"a\0b".to_vec() }),
        ("a link too long", Content::Symlink { target: vec![b'x'; 4097] }),
    ] {
        check(what, |batch| version(batch).content = content.clone());
    }
}

#[test]
fn at_the_bounds() {
    for content in [
        Content::File { blob: BlobId::of(b"x"), size: u64::MAX, mode: 0o777 },
        Content::File { blob: BlobId::EMPTY, size: 0, mode: 0 },
        Content::Symlink { target: vec![b'x'; 4096] },
        Content::Symlink { target: b"/\xff\n".to_vec() },
    ] {
        for (seconds, nanos) in [(i64::MIN, 999_999_999), (i64::MAX, 0)] {
            let namespace = Disk::default().open(1);
            let mut batch = listing(u64::MAX, vec![says(u64::MAX, "a", content.clone())]);
            batch.statements[0].version.mtime = UnixTime { seconds, nanos };
            namespace.apply(peer(1), &batch).unwrap();
            let versions = namespace.versions(&arena("photos"), &path("a")).unwrap();
            assert_eq!(versions, [(Some(peer(1)), batch.statements[0].version.clone())]);
        }
    }
}

/// These are right in a listing, and wrong behind what was heard.
#[test]
fn what_does_not_follow() {
    let namespace = with_a_catalog();
    let before = seen(&namespace);
    let next = next();
    let refused = |what: &str, wrong: &dyn Fn(&mut Batch)| {
        let mut batch = next.clone();
        wrong(&mut batch);
        refuse(what, &namespace, peer(1), &batch);
        assert_eq!(seen(&namespace), before, "{what}");
    };
    refused("another epoch", &|batch| batch.upto.epoch = 8);
    refused("a number heard before", &|batch| batch.statements[0].version.seq = 10);
    refused("an end heard before", &|batch| {
        batch.statements.clear();
        batch.upto.seq = 9;
    });
    refuse("a peer's first words are no listing", &namespace, peer(3), &next);
    refuse("a forgotten peer goes on", &namespace, peer(2), &next);
    assert_eq!(seen(&namespace), before);
    namespace.apply(peer(1), &next).unwrap();
}

/// Breaks what follows on a catalog, and a listing; each is refused, and the sound one is taken in then.
fn check(what: &str, wrong: impl Fn(&mut Batch)) {
    for restart in [false, true] {
        let namespace = with_a_catalog();
        let before = seen(&namespace);
        let sound = Batch { restart, ..next() };
        let mut batch = sound.clone();
        wrong(&mut batch);
        refuse(what, &namespace, peer(1), &batch);
        assert_eq!(seen(&namespace), before, "{what}");
        namespace.apply(peer(1), &sound).unwrap_or_else(|error| panic!("after {what}: {error}"));
        assert_eq!(namespace.versions(&arena("photos"), &path("new")).unwrap().len(), 1);
    }
}

fn refuse(what: &str, namespace: &Namespace, peer: PeerId, batch: &Batch) {
    let said = namespace.apply(peer, batch);
    assert!(matches!(said, Err(ApplyError::PeerMisbehaved(_))), "{what}: {said:?}");
}

fn version(batch: &mut Batch) -> &mut Version {
    &mut batch.statements[2].version
}

/// A namespace that has heard the peer 1 up to change 10 of the epoch 7, and forgot the peer 2.
fn with_a_catalog() -> Namespace {
    let namespace = Disk::default().open(1);
    let statements = vec![says(4, "a", file("x")), says(9, "old", file("old")), says(10, "d", Content::Deleted)];
    for who in [1, 2] {
        namespace.apply(peer(who), &listing(7, statements.clone())).unwrap();
    }
    namespace.forget_peer(peer(2)).unwrap();
    namespace
}

/// What the peer 1 says next: changes up to 14 of 15.
fn next() -> Batch {
    let statements = vec![says(11, "a", Content::Deleted), says(12, "new", file("yy")), says(13, "d", file("x"))];
    Batch { restart: false, statements, upto: Cursor { epoch: 7, seq: 14 }, head: 15 }
}

/// All that can be seen of what the peers 1 to 3 said.
fn seen(namespace: &Namespace) -> impl PartialEq + std::fmt::Debug {
    let cursors = [1, 2, 3].map(|who| namespace.cursor(peer(who)).unwrap());
    let versions =
        ["a", "old", "d", "new", "p", "q"].map(|at| namespace.versions(&arena("photos"), &path(at)).unwrap());
    let blobs = ["x", "old", "yy", ""].map(|data| namespace.peers_with(BlobId::of(data.as_bytes())).unwrap());
    let mut listed = Vec::new();
    let mut visit = |entry| {
        listed.push(entry);
        ControlFlow::Continue(())
    };
    namespace.list(&arena("photos"), None, true, &mut visit).unwrap();
    (cursors, versions, blobs, listed)
}

proptest! {
    #![proptest_config(cases(200))]

    /// One batch behind another, against the rules written down once more.
    #[test]
    fn as_the_rules_say(batches in prop::collection::vec(a_batch(), 1..8)) {
        let namespace = Disk::default().open(1);
        let mut cursor = Cursor::default();
        for batch in batches {
            let before = seen(&namespace);
            match namespace.apply(peer(1), &batch) {
                Ok(()) => {
                    prop_assert!(is_sound(cursor, &batch), "taken in behind {:?}: {:?}", cursor, batch);
                    cursor = batch.upto;
                }
                Err(ApplyError::PeerMisbehaved(why)) => {
                    prop_assert!(!is_sound(cursor, &batch), "refused behind {:?}, {}: {:?}", cursor, why, batch);
                    prop_assert!(seen(&namespace) == before);
                }
                Err(error) => panic!("{error:?}"),
            }
            prop_assert_eq!(namespace.cursor(peer(1)).unwrap(), cursor);
        }
    }
}

fn is_sound(cursor: Cursor, batch: &Batch) -> bool {
    let from = if batch.restart { 0 } else { cursor.seq };
    let numbers: Vec<u64> = batch.statements.iter().map(|statement| statement.version.seq).collect();
    let sound = |Version { content, mtime, .. }: &Version| {
        let bounds = match content {
            Content::File { blob, size, mode } => *mode < 0o1000 && (*size > 0) == (*blob != BlobId::EMPTY),
            Content::Symlink { target } => (1..=4096).contains(&target.len()) && !target.contains(&0),
            Content::Deleted | Content::Withdrawn => true,
        };
        bounds && mtime.nanos < 1_000_000_000
    };
    (batch.restart || batch.upto.epoch == cursor.epoch)
        && batch.upto.epoch != 0
        && from <= batch.upto.seq
        && batch.upto.seq <= batch.head
        && numbers.is_sorted_by(|a, b| a < b)
        && numbers.iter().all(|&seq| from < seq && seq <= batch.upto.seq)
        && batch.statements.iter().all(|statement| sound(&statement.version))
}

/// A batch that is sound but for a few of its numbers, which are small.
fn a_batch() -> impl Strategy<Value = Batch> {
    let content = prop_oneof![
        9 => prop::sample::select(vec![file("x"), file(""), file("yy"), symlink("x"), Content::Deleted]),
        1 => prop::sample::select(vec![
            Content::File { blob: BlobId::EMPTY, size: 1, mode: 0 },
            Content::File { blob: BlobId::of(b"x"), size: 0, mode: 0 },
            Content::File { blob: BlobId::of(b"x"), size: 1, mode: 0o1000 },
            symlink(""),
        ]),
    ];
    let says = (prop::sample::select(vec!["p", "q"]), content, prop_oneof![9 => Just(1), 1 => 0..3u64]);
    let statements = prop::collection::vec(says, 0..4);
    (any::<bool>(), statements, prop_oneof![9 => Just(1), 1 => 0..3u64], 0..4u64, 0..3u64, 0..4u64).prop_map(
        |(restart, said, epoch, from, to, head)| {
            let mut seq = from;
            let said = said.into_iter().map(|(at, content, step)| {
                seq += step;
                Statement {
                    arena: arena("photos"),
                    path: path(at),
                    version: Version { content, mtime: seconds(0), seq },
                }
            });
            let statements = said.collect();
            let upto = Cursor { epoch, seq: (seq + to).saturating_sub(1) };
            Batch { restart, statements, upto, head: (upto.seq + head).saturating_sub(1) }
        },
    )
}
