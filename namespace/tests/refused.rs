//! What a peer may not say, and what comes too late or too early. Whatever breaks the rules is refused as a whole, and
//! what something else came before is passed over: nothing of either is taken in, what was known stays, and the peer may
//! go on as if it had not said it. The tables are those of spec/namespace.md, "Applying".

mod common;

use std::ops::ControlFlow;

use namespace::{Applied, ApplyError, Batch, Content, Key, Mark, Namespace, PREVIOUS_MAX, Part, Statement, Version};
use proptest::prelude::*;
use tree::{BlobId, UnixTime};

use crate::common::{Disk, arena, cases, changes, file, listing, path, peer, says, seconds, symlink};

#[test]
fn epochs_out_of_bounds() {
    for epoch in [0, 1 << 63, u64::MAX] {
        let with = |mut batch: Batch| {
            batch.mark.epoch = epoch;
            if let Part::Changes { after, .. } = &mut batch.part {
                after.epoch = epoch;
            }
            batch
        };
        refuse("its epoch is out of bounds", with(next()));
        refuse("its epoch is out of bounds", with(again()));
    }
}

#[test]
fn changes_out_of_order() {
    let refuse = |why, wrong: &dyn Fn(&mut Batch)| {
        let mut batch = next();
        wrong(&mut batch);
        refuse(why, batch);
    };
    refuse("it runs backwards", &|batch| *batch = changes(peer(1), 7, 10, 9, vec![]));
    refuse("it runs backwards", &|batch| after(batch).epoch = 6);
    let order = "its changes are out of order";
    refuse(order, &|batch| batch.statements[1].version.seq = 11);
    refuse(order, &|batch| batch.statements.swap(0, 1));
    refuse(order, &|batch| batch.statements[2].version.seq = 15);
    refuse(order, &|batch| batch.statements[2].version.seq = u64::MAX);
    refuse(order, &|batch| batch.statements[0].version.seq = 0);
    refuse(order, &|batch| batch.statements[0].version.seq = 10);
    let order = "its sessions are out of order";
    for begun in [vec![(10, 1)], vec![(15, 1)], vec![(12, 2), (12, 1)], vec![(13, 2), (12, 1)], vec![(12, 2)]] {
        refuse(order, &|batch| *sessions(batch) = begun.clone());
    }
    refuse(order, &|batch| batch.mark.session = 2);
}

#[test]
fn listings_out_of_order() {
    let key = |at| Some((arena("photos"), path(at)));
    let order = "its listing is out of order";
    let refuse = |after: Option<Key>, end: Option<Key>, at: &[&str]| {
        let statements = at.iter().map(|at| says(1, at, file("x"))).collect();
        refuse(order, Batch { part: Part::Listing { after, end }, statements, ..again() });
    };
    refuse(None, None, &["b", "a"]);
    refuse(None, None, &["a", "a"]);
    refuse(key("a"), None, &["a", "b"]);
    refuse(None, key("b"), &["a", "c"]);
    refuse(key("c"), key("b"), &[]);
    refuse(None, key("b"), &[]);
    let farewell = Batch { mark: Mark { seq: u64::MAX, ..again().mark }, ..again() };
    self::refuse("its farewell says more", farewell);
}

#[test]
fn versions_out_of_bounds() {
    let refuse = |wrong: &dyn Fn(&mut Version)| {
        for mut batch in [next(), again()] {
            wrong(&mut batch.statements[1].version);
            refuse("a version is out of bounds", batch);
        }
    };
    refuse(&|version| version.mtime.nanos = 1_000_000_000);
    refuse(&|version| version.mtime.nanos = u32::MAX);
    refuse(&|version| version.previous = vec![BlobId::EMPTY; PREVIOUS_MAX + 1]);
    let some = BlobId::of(b"x");
    let file = |blob, size, mode| Content::File { blob, size, mode };
    for content in [
        file(some, 1, 0o4755),
        file(some, 1, 0o1000),
        file(some, 0, 0o644),
        file(BlobId::EMPTY, 1, 0o644),
        Content::Directory { mode: 0o1755 },
        Content::Symlink { target: vec![] },
        Content::Symlink { target: b"a\0b".to_vec() },
        Content::Symlink { target: vec![b'x'; 4097] },
    ] {
        refuse(&|version| version.content = content.clone());
    }
    for absent in [Content::Deleted, Content::Withdrawn] {
        let mut batch = again();
        batch.statements[1].version.content = absent;
        self::refuse("a version is out of bounds", batch);
    }
}

#[test]
fn at_the_bounds() {
    for content in [
        Content::File { blob: BlobId::of(b"x"), size: u64::MAX, mode: 0o777 },
        Content::File { blob: BlobId::EMPTY, size: 0, mode: 0 },
        Content::Symlink { target: vec![b'x'; 4096] },
        Content::Symlink { target: b"/\xff\n".to_vec() },
        Content::Directory { mode: 0o777 },
    ] {
        for (seconds, nanos) in [(i64::MIN, 999_999_999), (i64::MAX, 0)] {
            let namespace = Disk::default().open();
            let mut batch = listing(peer(1), (1 << 63) - 1, vec![says(u64::MAX - 1, "a", content.clone())]);
            batch.statements[0].version.mtime = UnixTime { seconds, nanos };
            batch.statements[0].version.previous = vec![BlobId::EMPTY; PREVIOUS_MAX];
            assert_eq!(namespace.apply(peer(1), &batch).unwrap(), Applied::Taken);
            let versions = namespace.versions(&arena("photos"), &path("a")).unwrap();
            assert_eq!(versions, [(Some(peer(1)), batch.statements[0].version.clone())]);
        }
    }
}

#[test]
fn too_many_peers() {
    let namespace = Disk::default().open();
    let id = |number: u16| {
        let mut bytes = [1; 32];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        namespace::PeerId::from_bytes(bytes)
    };
    for number in 1..=1000 {
        assert_eq!(namespace.apply(id(number), &listing(id(number), 7, vec![])).unwrap(), Applied::Taken);
    }
    let refused = namespace.apply(id(1), &listing(id(1001), 7, vec![]));
    assert!(matches!(refused, Err(ApplyError::PeerMisbehaved("there are too many peers"))), "{refused:?}");
    assert_eq!(namespace.cursors().unwrap().len(), 1000);
}

/// Who tells is of no account; where the listener is, is.
#[test]
fn passed_over() {
    let part = |after: Option<&str>, end: Option<&str>, mark: Mark| {
        let key = |at: &str| (arena("photos"), path(at));
        let part = Part::Listing { after: after.map(key), end: end.map(key) };
        let statements = end.map(|at| says(1, at, file("x"))).into_iter().collect();
        Batch { part, mark, statements, ..again() }
    };
    let mark = |epoch, seq| Mark { epoch, seq, session: 1 };
    let check = |what: &str, namespace: &Namespace, batch: Batch, expected: Applied| {
        let before = seen(namespace);
        assert_eq!(namespace.apply(peer(3), &batch).unwrap(), expected, "{what}");
        assert_eq!(seen(namespace) == before, expected == Applied::PassedOver, "{what}");
    };
    use Applied::{PassedOver, Taken};

    let mine = Batch { origin: peer(0), ..again() };
    check("of this machine itself", &with_a_catalog(), mine, PassedOver);
    for (what, batch, expected) in [
        ("changes that follow", next(), Taken),
        ("changes that begin before", changes(peer(1), 7, 4, 11, vec![says(11, "new", file("yy"))]), Taken),
        ("changes up to here", changes(peer(1), 7, 4, 10, vec![says(9, "new", file("yy"))]), PassedOver),
        ("changes that begin later", changes(peer(1), 7, 11, 12, vec![says(12, "new", file("yy"))]), PassedOver),
        ("changes of an earlier epoch", changes(peer(1), 6, 10, 12, vec![]), PassedOver),
        ("changes of a later epoch", changes(peer(1), 8, 10, 12, vec![]), PassedOver),
        ("a listing of a later epoch", part(None, None, mark(8, 0)), Taken),
        ("a listing of an earlier epoch", part(None, None, mark(6, 99)), PassedOver),
        ("a later listing", part(None, None, mark(7, 11)), Taken),
        ("a listing as of here", part(None, None, mark(7, 10)), PassedOver),
        ("a listing as of here, of a later session", part(None, None, Mark { session: 2, ..mark(7, 10) }), Taken),
        ("an earlier listing", part(None, None, mark(7, 9)), PassedOver),
        ("the rest of a listing", part(Some("a"), None, mark(7, 11)), PassedOver),
        ("a farewell", listing(peer(1), 7, vec![]).also(|batch| batch.mark.seq = u64::MAX), Taken),
    ] {
        check(what, &with_a_catalog(), batch, expected);
    }
    let mut other = changes(peer(1), 7, 10, 12, vec![]);
    (after(&mut other).session, other.mark.session) = (2, 2);
    check("changes behind a number of another session", &with_a_catalog(), other, PassedOver);

    for (what, batch, expected) in [
        ("its next part", part(Some("m"), Some("n"), mark(8, 5)), Taken),
        ("its last part", part(Some("m"), None, mark(8, 5)), Taken),
        ("the part after the next", part(Some("n"), Some("o"), mark(8, 5)), PassedOver),
        ("the part that came", part(Some("a"), Some("m"), mark(8, 5)), PassedOver),
        ("a part of another listing", part(Some("m"), Some("n"), mark(8, 6)), PassedOver),
        ("the same one from the start", part(None, Some("b"), mark(8, 5)), Taken),
        ("a later one", part(None, Some("b"), mark(8, 6)), Taken),
        ("an earlier one", part(None, Some("b"), mark(8, 4)), PassedOver),
        ("changes", changes(peer(1), 8, 5, 6, vec![says(6, "new", file("yy"))]), PassedOver),
    ] {
        let namespace = with_a_catalog();
        assert_eq!(namespace.apply(peer(1), &part(None, Some("m"), mark(8, 5))).unwrap(), Taken);
        check(what, &namespace, batch, expected);
    }
}

/// Nothing of the batch is taken in, and what is sound is, then.
fn refuse(why: &str, batch: Batch) {
    let namespace = with_a_catalog();
    let before = seen(&namespace);
    let said = namespace.apply(peer(1), &batch);
    assert!(matches!(said, Err(ApplyError::PeerMisbehaved(got)) if got == why), "{why}: {said:?} {batch:?}");
    assert!(seen(&namespace) == before, "{why}");
    assert_eq!(namespace.apply(peer(1), &next()).unwrap(), Applied::Taken, "after {why}");
    assert_eq!(namespace.versions(&arena("photos"), &path("new")).unwrap().len(), 1);
}

/// A namespace that has heard the peer 1 up to change 10 of the epoch 7, and forgot the peer 2.
fn with_a_catalog() -> Namespace {
    let namespace = Disk::default().open();
    let statements = vec![says(4, "a", file("x")), says(9, "old", file("old")), says(10, "z", symlink("a"))];
    for who in [1, 2] {
        namespace.apply(peer(who), &listing(peer(who), 7, statements.clone())).unwrap();
    }
    namespace.forget_peer(peer(2)).unwrap();
    namespace
}

/// What the peer 1 says next: changes up to 14.
fn next() -> Batch {
    let statements = vec![says(11, "a", Content::Deleted), says(12, "new", file("yy")), says(13, "z", file("x"))];
    changes(peer(1), 7, 10, 14, statements)
}

/// The same of all that is then there.
fn again() -> Batch {
    let listed = listing(peer(1), 7, vec![says(12, "new", file("yy")), says(9, "old", file("old"))]);
    listed.also(|batch| batch.mark.seq = 14)
}

trait Also: Sized {
    fn also(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

impl Also for Batch {}

fn after(batch: &mut Batch) -> &mut Mark {
    let Part::Changes { after, .. } = &mut batch.part else { panic!("no changes") };
    after
}

fn sessions(batch: &mut Batch) -> &mut Vec<(u64, u64)> {
    let Part::Changes { sessions, .. } = &mut batch.part else { panic!("no changes") };
    sessions
}

/// All that can be seen of what the peers 1 to 3 said.
fn seen(namespace: &Namespace) -> impl PartialEq + std::fmt::Debug + use<> {
    let cursors = [1, 2, 3].map(|who| namespace.cursor(peer(who)).unwrap());
    let told_by = [1, 2, 3].map(|who| namespace.told_by(peer(who)).unwrap());
    let versions = ["a", "old", "z", "new", "m", "p", "q"];
    let versions = versions.map(|at| namespace.versions(&arena("photos"), &path(at)).unwrap());
    let blobs = ["x", "old", "yy", ""].map(|data| namespace.peers_with(BlobId::of(data.as_bytes())).unwrap());
    let mut listed = Vec::new();
    let mut visit = |entry| {
        listed.push(entry);
        ControlFlow::Continue(())
    };
    namespace.list(&arena("photos"), None, true, &mut visit).unwrap();
    (cursors, told_by, versions, blobs, listed)
}

proptest! {
    #![proptest_config(cases(200))]

    /// One batch behind another: what is not taken in changes nothing, and what is moves on to a later mark.
    #[test]
    fn marks_only_rise(batches in prop::collection::vec(a_batch(), 1..8)) {
        let namespace = Disk::default().open();
        for batch in batches {
            let (before, cursor) = (seen(&namespace), namespace.cursor(peer(1)).unwrap());
            match namespace.apply(peer(1), &batch) {
                Ok(Applied::Taken) => {
                    prop_assert!(batch.mark > cursor.mark || cursor.after.is_some() && batch.mark == cursor.mark);
                    prop_assert_eq!(namespace.cursor(peer(1)).unwrap().mark, batch.mark);
                }
                Ok(Applied::PassedOver) | Err(ApplyError::PeerMisbehaved(_)) => {
                    prop_assert!(seen(&namespace) == before);
                }
                Err(error) => panic!("{error:?}"),
            }
        }
    }
}

/// A batch that is sound but for a few of its numbers, which are small.
fn a_batch() -> impl Strategy<Value = Batch> {
    let content = prop_oneof![
        9 => prop::sample::select(vec![file("x"), file(""), file("yy"), symlink("x"), Content::Deleted]),
        1 => Just(Content::File { blob: BlobId::EMPTY, size: 1, mode: 0 }),
    ];
    let key = || prop::option::of(prop::sample::select(vec!["p", "q"]).prop_map(|at| (arena("photos"), path(at))));
    let statement = (prop::sample::select(vec!["p", "q"]), content, 0..3u64);
    let part = prop_oneof![
        (0..4u64).prop_map(|seq| Part::Changes { after: Mark { epoch: 1, seq, session: 1 }, sessions: Vec::new() }),
        (key(), key()).prop_map(|(after, end)| Part::Listing { after, end }),
    ];
    let epoch = prop_oneof![9 => Just(1), 1 => 0..3u64];
    (epoch, 0..8u64, part, prop::collection::vec(statement, 0..3)).prop_map(|(epoch, upto, part, said)| {
        let mut seq = if let Part::Changes { after, .. } = &part { after.seq } else { 0 };
        let said = said.into_iter().map(|(at, content, step)| {
            seq += step;
            let version = Version { content, mtime: seconds(0), seq, previous: Vec::new() };
            Statement { version, ..says(1, at, Content::Deleted) }
        });
        let statements = said.collect();
        Batch { origin: peer(1), mark: Mark { epoch, seq: upto, session: 1 }, part, statements }
    })
}
