//! Small cases: what the households found, and what must be so at each step rather than in the end.

use namespace::{Applied, Batch, Change, Content, Cursor, Mark, Namespace, Origin, Part, PeerId, Told};
use tree::BlobId;

use crate::common::{self, Disk, arena, change, changes, file, listing, path, peer, says, seconds, symlink};

/// The log's numbers have been used twice, and the listener heard the first use.
#[test]
fn a_restored_backup_whose_log_has_overtaken_the_listener() {
    let (disk, listener) = (Disk::default(), Disk::default().open_as(2, 1));
    let speaker = disk.open_as(1, 10);
    let backup = disk.copy();
    commit(&speaker, "lost", file("x"));
    hear(&listener, &speaker);
    drop(speaker);

    let speaker = backup.open_as(1, 20);
    commit(&speaker, "new", file("y"));
    hear(&listener, &speaker);
    check_same(&listener, &speaker, ["lost", "new"]);
}

/// As above, but the listener had heard only a part: "a" had moved behind it in the log, and is back before it.
#[test]
fn a_backup_restored_while_a_listing_is_under_way() {
    let (disk, listener) = (Disk::default(), Disk::default().open_as(2, 1));
    let speaker = disk.open_as(1, 10);
    commit(&speaker, "a", file("x"));
    commit(&speaker, "b", file("x"));
    let backup = disk.copy();
    commit(&speaker, "a", file("y"));
    let part = speaker.tell(&asks(&listener), 1).unwrap().unwrap();
    assert_eq!((part.statements.len(), part.mark.seq), (1, 3));
    listener.apply(peer(1), &part).unwrap();
    drop(speaker);

    let speaker = backup.open_as(1, 20);
    hear(&listener, &speaker);
    check_same(&listener, &speaker, ["a", "b"]);
}

/// What the older copy no longer knows of goes.
#[test]
fn a_restored_backup_behind_the_listener() {
    let (disk, listener) = (Disk::default(), Disk::default().open_as(2, 1));
    let speaker = disk.open_as(1, 10);
    commit(&speaker, "kept", file("x"));
    let backup = disk.copy();
    commit(&speaker, "lost", file("x"));
    commit(&speaker, "kept", file("y"));
    hear(&listener, &speaker);
    let before = speaker.mark().unwrap();
    drop(speaker);

    let speaker = backup.open_as(1, 20);
    hear(&listener, &speaker);
    assert!(speaker.mark().unwrap().epoch > before.epoch, "an epoch for each history");
    check_same(&listener, &speaker, ["kept", "lost"]);
    assert_eq!(listener.versions(&arena("photos"), &path("lost")).unwrap(), []);
    assert_eq!(listener.peers_with(BlobId::of(b"y")).unwrap(), []);
}

/// A relay that heard what came behind the backup must not go on from what the listener heard before it was restored.
#[test]
fn a_restored_backup_of_which_a_relay_tells() {
    let (disk, relay) = (Disk::default(), Disk::default().open_as(2, 1));
    let listener = Disk::default().open_as(3, 1);
    let speaker = disk.open_as(1, 10);
    commit(&speaker, "kept", file("x"));
    let backup = disk.copy();
    hear(&relay, &speaker);
    commit(&speaker, "lost", file("x"));
    hear(&listener, &speaker);
    drop(speaker);

    let speaker = backup.open_as(1, 20);
    for at in ["new", "newer"] {
        commit(&speaker, at, file("y"));
        hear(&relay, &speaker);
    }
    hear(&listener, &relay);
    check_same(&listener, &speaker, ["kept", "lost", "new", "newer"]);
}

/// Two histories of one length: one of them wins everywhere, so that nobody is stuck with its own.
#[test]
fn two_relays_with_two_histories() {
    let mark = |session| Mark { epoch: 7, seq: 1, session };
    let (one, two) = (Disk::default().open_as(2, 1), Disk::default().open_as(3, 1));
    for (namespace, session, at) in [(&one, 5, "a"), (&two, 9, "b")] {
        let batch = Batch { mark: mark(session), ..listing(peer(1), 7, vec![says(1, at, file("x"))]) };
        namespace.apply(peer(1), &batch).unwrap();
    }
    hear(&two, &one);
    hear(&one, &two);
    for namespace in [&one, &two] {
        assert_eq!(namespace.cursor(peer(1)).unwrap().mark, mark(9));
        assert_eq!(namespace.versions(&arena("photos"), &path("a")).unwrap(), []);
    }
}

/// Of a farewell that was contested, and then said here, too, nothing may be left.
#[test]
fn removed_after_another_had_removed_it() {
    let namespace = Disk::default().open();
    namespace.apply(peer(1), &listing(peer(1), 7, vec![says(1, "a", file("x"))])).unwrap();
    let farewell = Mark { epoch: 7, seq: u64::MAX, session: 1 };
    namespace.contest_farewell(peer(1), farewell).unwrap();
    assert_eq!(namespace.versions(&arena("photos"), &path("a")).unwrap().len(), 1);
    assert_eq!(namespace.cursor(peer(1)).unwrap().mark, farewell);
    assert!(!namespace.is_complete(peer(1)).unwrap());
    namespace.forget_peer(peer(1)).unwrap();
    assert_eq!(namespace.versions(&arena("photos"), &path("a")).unwrap(), []);
    assert_eq!(namespace.peers_with(BlobId::of(b"x")).unwrap(), []);
}

/// Whoever is paired again is seen again, though all were told that it had left.
#[test]
fn removed_and_back() {
    let (speaker, listener) = (Disk::default().open_as(1, 10), Disk::default().open_as(2, 1));
    let third = Disk::default().open_as(3, 1);
    commit(&speaker, "a", file("x"));
    hear(&listener, &speaker);
    hear(&third, &listener);
    check_same(&third, &speaker, ["a"]);
    listener.forget_peer(peer(1)).unwrap();
    hear(&third, &listener);
    assert_eq!(third.versions(&arena("photos"), &path("a")).unwrap(), []);
    hear(&listener, &speaker);
    hear(&third, &listener);
    check_same(&third, &speaker, ["a"]);
}

/// A session that begins is told to relays, so that they know it from those of a restored backup.
#[test]
fn changes_of_two_sessions() {
    let (disk, listener) = (Disk::default(), Disk::default().open_as(2, 1));
    let third = Disk::default().open_as(3, 1);
    let speaker = disk.open_as(1, 11);
    hear(&listener, &speaker);
    commit(&speaker, "a", file("x"));
    drop(speaker);
    let speaker = disk.open_as(1, 21);
    commit(&speaker, "b", file("x"));
    hear(&third, &speaker);
    hear(&third, &listener);
    let batch = speaker.tell(&asks(&listener), 1).unwrap().unwrap();
    let epoch = batch.mark.epoch;
    let mark = |seq, session| Mark { epoch, seq, session };
    assert_eq!(batch.mark, mark(1, 11));
    assert_eq!(batch.part, Part::Changes { after: mark(0, 0), sessions: vec![(1, 11)] });
    listener.apply(peer(1), &batch).unwrap();
    let batch = speaker.tell(&asks(&listener), 1).unwrap().unwrap();
    assert_eq!(batch.part, Part::Changes { after: mark(1, 11), sessions: vec![(2, 21)] });
    listener.apply(peer(1), &batch).unwrap();

    commit(&speaker, "c", file("x"));
    hear(&listener, &speaker);
    let batch = listener.tell(&asks(&third), 1).unwrap().unwrap();
    assert_eq!(batch.part, Part::Changes { after: mark(2, 21), sessions: vec![] });
    assert_eq!((batch.origin, batch.mark, batch.statements.len()), (peer(1), mark(3, 21), 1));
}

/// A relay that hears a listing has rows of two moments: it passes on neither.
#[test]
fn a_listing_under_way_is_not_passed_on() {
    let (relay, listener) = (Disk::default().open_as(2, 1), Disk::default().open_as(3, 1));
    relay.apply(peer(1), &listing(peer(1), 7, vec![says(1, "a", file("x")), says(2, "b", file("x"))])).unwrap();
    let mut parts =
        [listing(peer(1), 8, vec![says(5, "a", file("y"))]), listing(peer(1), 8, vec![says(5, "c", file("y"))])];
    let key = Some((arena("photos"), path("a")));
    parts[0].part = Part::Listing { after: None, end: key.clone() };
    parts[1].part = Part::Listing { after: key, end: None };
    relay.apply(peer(1), &parts[0]).unwrap();
    hear(&listener, &relay);
    assert_eq!(listener.cursor(peer(1)).unwrap(), Cursor::default());
    relay.apply(peer(1), &parts[1]).unwrap();
    hear(&listener, &relay);
    let there = ["a", "b", "c"].map(|at| listener.versions(&arena("photos"), &path(at)).unwrap().len());
    assert_eq!(there, [1, 0, 1]);
}

/// What was deleted longer ago than the log reaches back is forgotten, here and by those who heard of it.
#[test]
fn old_deletions_are_forgotten() {
    let limited = |disk: Disk, me: u8| {
        let origin = Origin { me: peer(me), now: 1000, random: 1, history_limit: 2 };
        Namespace::open(disk.database(), origin).unwrap()
    };
    let (speaker, listener) = (limited(Disk::default(), 1), limited(Disk::default(), 2));
    hear(&listener, &speaker);
    let at = |at: &str| [&speaker, &listener].map(|of| of.versions(&arena("photos"), &path(at)).unwrap().len());
    for (name, content) in [("a", file("x")), ("a", Content::Deleted), ("b", file("x"))] {
        commit(&speaker, name, content);
        hear(&listener, &speaker);
    }
    assert_eq!(at("a"), [1, 1]);
    commit(&speaker, "c", file("x"));
    hear(&listener, &speaker);
    assert_eq!((at("a"), at("b")), ([0, 0], [1, 1]));
    assert_eq!(listener.history(Some(peer(1)), 0, 9).unwrap().len(), 2);
}

/// A number that stood for a deletion before a backup was restored stands for another change now, which stays.
#[test]
fn a_deletion_of_another_history_is_forgotten() {
    let origin = Origin { me: peer(2), now: 1000, random: 1, history_limit: 2 };
    let listener = Namespace::open(Disk::default().database(), origin).unwrap();
    let mark = |seq| Mark { epoch: 7, seq, session: 2 };
    let part = Part::Changes { after: mark(3), sessions: Vec::new() };
    for batch in [
        listing(peer(1), 7, vec![says(1, "a", file("x"))]),
        changes(peer(1), 7, 1, 2, vec![says(2, "a", Content::Deleted)]),
        Batch { mark: mark(3), ..listing(peer(1), 7, vec![says(2, "a", file("y"))]) },
        Batch { origin: peer(1), mark: mark(4), part, statements: vec![says(4, "b", file("x"))] },
    ] {
        assert_eq!(listener.apply(peer(1), &batch).unwrap(), Applied::Taken);
    }
    assert_eq!(listener.versions(&arena("photos"), &path("a")).unwrap().len(), 1);
}

#[test]
fn nothing_to_say() {
    let (speaker, listener) = (Disk::default().open_as(1, 10), Disk::default().open_as(2, 1));
    let nothing = speaker.tell(&asks(&listener), 100).unwrap().unwrap();
    assert_eq!((nothing.statements.len(), &nothing.part), (0, &Part::Listing { after: None, end: None }));
    hear(&listener, &speaker);
    assert_eq!(speaker.tell(&asks(&listener), 100).unwrap(), None);
    let mut later = asks(&listener);
    let mark = Mark { epoch: u64::MAX >> 1, ..nothing.mark };
    later.cursors.insert(peer(1), Cursor { mark, after: None });
    assert_eq!(speaker.tell(&later, 100).unwrap(), None, "of a later epoch than its own it knows nothing");
}

/// What a batch leaves out it must not claim to have said.
#[test]
fn a_batch_has_a_row_whatever_the_limit() {
    let (speaker, listener) = (Disk::default().open_as(1, 10), Disk::default().open_as(2, 1));
    hear(&listener, &speaker);
    commit(&speaker, "a", file("x"));
    commit(&speaker, "b", file("x"));
    for bytes_max in [1, 0] {
        let batch = speaker.tell(&asks(&listener), bytes_max).unwrap().unwrap();
        assert_eq!((batch.statements.len(), batch.mark.seq), (1, 1), "bytes_max {bytes_max}");
        let first = speaker.tell(&asks(&Disk::default().open_as(3, 1)), bytes_max).unwrap().unwrap();
        let end = Some((arena("photos"), path("a")));
        assert_eq!((first.statements.len(), first.part), (1, Part::Listing { after: None, end }));
    }
}

/// A path is told as it is last, and once.
#[test]
fn what_was_superseded_is_not_told() {
    let (speaker, listener) = (Disk::default().open_as(1, 10), Disk::default().open_as(2, 1));
    hear(&listener, &speaker);
    for data in ["x", "y", "z"] {
        commit(&speaker, "a", file(data));
    }
    commit(&speaker, "b", file("x"));
    let batch = speaker.tell(&asks(&listener), usize::MAX).unwrap().unwrap();
    let told: Vec<_> = batch.statements.iter().map(|statement| statement.version.seq).collect();
    assert_eq!(told, [3, 4]);
    let first = speaker.tell(&asks(&listener), 1).unwrap().unwrap();
    assert_eq!(first.mark.seq, 3);
}

/// Whoever has heard everything need not hear it again because a machine was off for a while.
#[test]
fn nothing_is_said_twice_for_a_restart() {
    let (disk, listener) = (Disk::default(), Disk::default().open_as(2, 1));
    let speaker = disk.open_as(1, 10);
    commit(&speaker, "a", file("x"));
    hear(&listener, &speaker);
    let before = speaker.mark().unwrap();
    drop(speaker);
    let speaker = disk.open_as(1, 20);
    assert_eq!(hear(&listener, &speaker), None);
    assert_eq!(speaker.mark().unwrap(), before);
}

/// The empty catalog of a machine that was installed anew is news, too, though its clock is behind.
#[test]
fn a_log_lost_and_nothing_left() {
    let listener = Disk::default().open_as(2, 1);
    for who in [1, 3] {
        listener.apply(peer(who), &listing(peer(who), 1 << 50, vec![says(1, "a", file("x"))])).unwrap();
    }
    let reinstalled = Disk::default().open_as(1, 9);
    hear(&listener, &reinstalled);
    check_same(&listener, &reinstalled, ["a"]);
    assert_eq!(listener.peers_with(BlobId::of(b"x")).unwrap(), [peer(3)], "only the one who lost it has lost it");
}

#[test]
fn a_forgotten_peer_leaves_nothing() {
    let namespace = Disk::default().open();
    for who in 1..=3 {
        namespace.apply(peer(who), &listing(peer(who), 7, vec![says(1, "a", file("x"))])).unwrap();
        let news = vec![says(2, "b", symlink("a")), says(3, "c", Content::Deleted)];
        namespace.apply(peer(who), &changes(peer(who), 7, 1, 3, news)).unwrap();
    }
    // A listing under way has rows of two epochs.
    let mut part = listing(peer(2), 8, vec![says(1, "B", file("x"))]);
    part.part = Part::Listing { after: None, end: Some((arena("photos"), path("B"))) };
    assert_eq!(namespace.apply(peer(2), &part).unwrap(), Applied::Taken);
    namespace.forget_peer(peer(2)).unwrap();
    namespace.forget_peer(peer(9)).unwrap();
    let who = |at| namespace.versions(&arena("photos"), &path(at)).unwrap().into_iter().map(|(who, _)| who);
    for at in ["a", "b", "c"] {
        assert_eq!(who(at).collect::<Vec<_>>(), [Some(peer(1)), Some(peer(3))], "{at}");
    }
    assert_eq!(who("B").count(), 0);
    let holders = |data: &str| -> Vec<PeerId> {
        let mut holders = namespace.peers_with(BlobId::of(data.as_bytes())).unwrap();
        holders.sort_by_key(|peer| *peer != common::peer(1));
        holders
    };
    assert_eq!(holders("x"), [peer(1), peer(3)]);

    // Whoever comes next is taken neither for one who stayed nor for one who went, even if that was the last.
    for new in [4, 5] {
        namespace.apply(peer(new), &listing(peer(new), 7, vec![says(1, "d", file("y"))])).unwrap();
        assert_eq!(who("a").collect::<Vec<_>>(), [Some(peer(1)), Some(peer(3))]);
        assert_eq!(who("d").collect::<Vec<_>>(), [Some(peer(new))]);
        namespace.forget_peer(peer(new)).unwrap();
    }
}

/// A large catalog goes in parts that each keep to the limit, and what it replaces goes when its turn comes, not before.
#[test]
fn a_catalog_of_45_000_paths() {
    let (speaker, listener) = (Disk::default().open_as(1, 10), Disk::default().open_as(2, 1));
    let old = [says(1, "10000/old", file("x")), says(1, "old", file("x"))];
    listener.apply(peer(1), &listing(peer(1), 7, old.to_vec())).unwrap();
    let changes: Vec<Change> = (0..45_000).map(|n| change(&format!("{n:05}/{}", "x".repeat(180)), file("x"))).collect();
    speaker.commit(&arena("photos"), &changes, 1, &mut |_| true).unwrap();
    let is_there = |at| !listener.versions(&arena("photos"), &path(at)).unwrap().is_empty();
    let (mut parts, mut said) = (0, 0);
    while let Some(batch) = speaker.tell(&asks(&listener), 1 << 20).unwrap() {
        assert!(is_there("old"), "the old row went too early");
        assert!(postcard::to_stdvec(&batch).unwrap().len() < (1 << 20) + (300 << 10));
        assert_eq!(listener.apply(peer(1), &batch).unwrap(), Applied::Taken);
        let came = listener.cursor(peer(1)).unwrap().after.map(|(_, path)| path);
        assert_eq!(is_there("10000/old"), came.is_some_and(|came| came < path("10000/old")));
        parts += 1;
        said += batch.statements.len();
    }
    assert!(parts > 9, "{parts} parts");
    assert_eq!(said, 45_000);
    assert!(!is_there("old"));
}

fn commit(speaker: &Namespace, at: &str, content: Content) {
    let change = Change { mtime: seconds(7), ..change(at, content) };
    speaker.commit(&arena("photos"), &[change], 1, &mut |_| true).unwrap();
}

/// What `listener` asks, of whoever it may be.
fn asks(listener: &Namespace) -> Told {
    let (listener, cursors) = (listener.me(), listener.cursors().unwrap());
    Told { listener, cursors, direct: Default::default() }
}

/// Lets `listener` hear all that `speaker` has to say; returns the first batch.
fn hear(listener: &Namespace, speaker: &Namespace) -> Option<Batch> {
    let mut told = asks(listener);
    if let Some(own) = told.cursors.get(&speaker.me()) {
        speaker.renew_if_lost(own.mark).unwrap();
    }
    let mut first = None;
    while let Some(batch) = speaker.tell(&told, usize::MAX).unwrap() {
        told.note(&batch);
        listener.apply(speaker.me(), &batch).unwrap();
        first = first.or(Some(batch));
    }
    first
}

/// Checks that `listener` has of the peer 1 what that one, `speaker`, has.
fn check_same<const N: usize>(listener: &Namespace, speaker: &Namespace, paths: [&str; N]) {
    let said = |namespace: &Namespace, who| {
        paths.map(|at| {
            let versions = namespace.versions(&arena("photos"), &path(at)).unwrap();
            (at, versions.into_iter().find(|(of, _)| *of == who).map(|(_, version)| version))
        })
    };
    assert_eq!(said(listener, Some(peer(1))), said(speaker, None));
}
