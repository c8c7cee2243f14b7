//! The view over all peers, against an oracle that knows no skipping: it makes every line there is, and sorts.
//!
//! The danger is in the order. `-`, `.` and most control characters sort before `/`, so that what is in "a" stands
//! behind a file "a-b", and a path may be a file at one peer and a directory at another.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
};

use namespace::{Arena, Content, Entry, EntryKind, Namespace, PeerId, RelPath, Statement, Version, shown};
use proptest::{prelude::*, sample};
use tree::{BlobId, UnixTime};

use crate::common::{Disk, a_path, arena, cases, change, file, listing, path, peer, says, seconds, symlink};

/// Names that are each other's beginnings or close to them: an open range would run into the next arena.
const ARENAS: [&str; 4] = ["a", "a b", "aa", "b"];

/// This machine is 0.
const PEERS: u8 = 4;

/// Who, arena, path → what.
type Rows = BTreeMap<(u8, &'static str, RelPath), (Content, UnixTime)>;

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn as_the_oracle_lists(rows in some_rows(), asked in prop::collection::vec(a_path(), 3), stop in any::<usize>()) {
        let namespace = namespace_of(&rows);
        for name in ARENAS {
            check(&namespace, &rows, name, None, stop);
            let mentioned = rows.keys().filter(|(_, arena, _)| *arena == name).map(|(_, _, path)| path.clone());
            let with_dirs: BTreeSet<RelPath> = mentioned.chain(asked.clone()).flat_map(up).collect();
            for dir in &with_dirs {
                check(&namespace, &rows, name, Some(dir), stop);
            }
        }
    }

    #[test]
    fn versions_and_arenas(rows in some_rows(), asked in a_path()) {
        let namespace = namespace_of(&rows);
        for (name, at) in rows.keys().map(|(_, name, at)| (name, at)).chain(ARENAS.iter().map(|name| (name, &asked))) {
            let got = namespace.versions(&arena(name), at).unwrap();
            let mut got: Vec<_> = got.into_iter().map(|(who, version)| (who, version.content, version.mtime)).collect();
            let of = rows.iter().filter(|((_, arena, path), _)| arena == name && path == at);
            let mut expected: Vec<_> = of.map(|((who, ..), (content, mtime))| (id(*who), content.clone(), *mtime)).collect();
            got.sort_by_key(|(who, ..)| *who);
            expected.sort_by_key(|(who, ..)| *who);
            prop_assert_eq!(got, expected, "{} {:?}", name, at);
        }

        let followed = Arena { name: arena("Z followed"), dir: None, public: false };
        namespace.set_arena(&followed).unwrap();
        let got: Vec<String> = namespace.all_arenas().unwrap().into_iter().map(String::from).collect();
        let mut sorted = got.clone();
        sorted.sort();
        sorted.dedup();
        prop_assert_eq!(&got, &sorted);
        let present = rows.iter().filter(|(_, (content, _))| content.is_present()).map(|((_, name, _), _)| *name);
        for name in present.chain(["Z followed"]) {
            prop_assert!(got.iter().any(|got| got == name), "{} is missing in {:?}", name, got);
        }
        for name in &got {
            prop_assert!(name == "Z followed" || rows.keys().any(|(_, arena, _)| arena == name), "nobody has {}", name);
        }
    }

    /// Whoever lists must show the same, in whatever order it came to know its peers.
    #[test]
    fn what_is_shown_depends_on_no_order(mut versions in prop::collection::vec(a_version(), 0..5), turn in 0..5usize) {
        let before = shown(&versions).map(|(_, version)| version.clone());
        if !versions.is_empty() {
            let turn = turn % versions.len();
            versions.rotate_left(turn);
        }
        prop_assert_eq!(before, shown(&versions).map(|(_, version)| version.clone()));
    }
}

/// A directory's line is where its first entry's is, and so behind a file whose name only begins as its own.
#[test]
fn a_file_and_a_directory_of_one_name() {
    let rows = [(0, "a"), (1, "a/b"), (1, "a-b"), (2, "a/b/c"), (2, "a0")];
    let rows: Rows = rows.map(|(who, at)| ((who, "a", path(at)), (file(at), seconds(0)))).into();
    let namespace = namespace_of(&rows);
    let listed = |dir: Option<&str>, recursive| {
        let lines = list(&namespace, "a", dir.map(path).as_ref(), recursive, usize::MAX);
        lines.into_iter().map(|line| String::from_utf8(line.0).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(listed(None, true), ["a", "a-b", "a/", "a/b", "a/b/", "a/b/c", "a0"]);
    assert_eq!(listed(None, false), ["a", "a-b", "a/", "a0"]);
    assert_eq!(listed(Some("a"), true), ["a", "a/b", "a/b/", "a/b/c"]);
    assert_eq!(listed(Some("a"), false), ["a", "a/b", "a/b/"]);
    assert_eq!(listed(Some("a/b"), false), ["a/b", "a/b/c"]);
    assert_eq!(listed(Some("a/b/c"), true), ["a/b/c"]);
    assert_eq!(listed(Some("a/b/c/d"), true), [] as [&str; 0]);
}

/// Who has other content there is not named, nor is who deleted it.
#[test]
fn only_peers_with_what_is_shown_are_named() {
    let at = |who, content, mtime| ((who, "a", path("x")), (content, seconds(mtime)));
    let rows = [at(0, file("old"), 1), at(1, file("new"), 5), at(2, file("new"), 3), at(3, Content::Deleted, 9)];
    let lines = list(&namespace_of(&rows.into()), "a", None, true, usize::MAX);
    assert_eq!(lines, [line("x", Some(file("new")), Some(seconds(5)), vec![Some(peer(1)), Some(peer(2))])]);
}

/// Permissions are a machine's own affair: whoever has the bytes has the file.
#[test]
fn peers_with_another_mode_are_named() {
    let with = |mode| Content::File { blob: BlobId::of(b"x"), size: 1, mode };
    let at = |who, mode| ((who, "a", path("x")), (with(mode), seconds(0)));
    let lines = list(&namespace_of(&[at(0, 0o600), at(1, 0o644), at(2, 0o640)].into()), "a", None, true, usize::MAX);
    assert_eq!(lines, [line("x", Some(with(0o644)), Some(seconds(0)), vec![None, Some(peer(1)), Some(peer(2))])]);
}

/// A size is only claimed, so that two may be claimed of one blob. Even then all show the same.
#[test]
fn a_lie_about_a_size() {
    let claims = |size| Content::File { blob: BlobId::of(b"x"), size, mode: 0o644 };
    let version = |size| (size, Version { content: claims(size), mtime: seconds(0), seq: 1 });
    let shown_of = |versions: [(u64, Version); 2]| shown(&versions).map(|(size, _)| *size);
    assert_eq!(shown_of([version(1), version(9)]), shown_of([version(9), version(1)]));
}

/// A large directory that is not looked into costs no more than its one line.
#[test]
fn a_directory_is_skipped_as_a_whole() {
    let namespace = Disk::default().open(1);
    let inside = (0..20_000).map(|n| change(&format!("d/{}/{n:05}", n % 100), file("x")));
    namespace.commit(&arena("a"), &inside.chain([change("e", file("x"))]).collect::<Vec<_>>()).unwrap();
    let started = std::time::Instant::now();
    for _ in 0..100 {
        assert_eq!(list(&namespace, "a", None, false, usize::MAX).len(), 2);
    }
    let once = started.elapsed() / 100;
    let started = std::time::Instant::now();
    assert_eq!(list(&namespace, "a", None, true, usize::MAX).len(), 20_102);
    let all = started.elapsed();
    assert!(once < all / 20, "one line takes {once:?}, all of 20,102 take {all:?}");
}

/// An emptied arena is still an arena.
#[test]
fn an_arena_in_which_all_is_deleted_is_still_there() {
    let namespace = Disk::default().open(1);
    namespace.apply(peer(1), &listing(7, vec![says(1, "x", Content::Deleted)])).unwrap();
    assert_eq!(namespace.all_arenas().unwrap(), [arena("photos")]);
    assert_eq!(list(&namespace, "photos", None, true, usize::MAX), []);
}

/// Giving up is not deleting: then nobody has the arena.
#[test]
fn an_arena_that_everyone_gave_up_is_gone() {
    let namespace = Disk::default().open(1);
    namespace.set_arena(&Arena { name: arena("mine"), dir: Some("/mine".into()), public: false }).unwrap();
    namespace.commit(&arena("mine"), &[change("x", file("x"))]).unwrap();
    namespace.apply(peer(1), &listing(7, vec![says(1, "x", Content::Withdrawn)])).unwrap();
    namespace.remove_arena(&arena("mine")).unwrap();
    assert_eq!(namespace.arenas().unwrap(), []);
    assert_eq!(namespace.all_arenas().unwrap(), []);
}

/// Compares both kinds of listing with the oracle's, whole and stopped early.
fn check(namespace: &Namespace, rows: &Rows, name: &'static str, dir: Option<&RelPath>, stop: usize) {
    for recursive in [true, false] {
        let expected = oracle(rows, name, dir, recursive);
        let got = list(namespace, name, dir, recursive, usize::MAX);
        assert_eq!(got, expected, "{name} {dir:?} recursive: {recursive}");
        let stop = stop % (expected.len() + 1);
        let got = list(namespace, name, dir, recursive, stop);
        assert_eq!(got, expected[..stop.max(1).min(expected.len())], "{name} {dir:?} stopped at {stop}");
    }
}

/// A line as both sides make it: the path, of a directory with a `/` behind it, since that is what it is ordered by.
type Line = (Vec<u8>, Option<Content>, Option<UnixTime>, Vec<Option<PeerId>>);

fn line(at: &str, content: Option<Content>, mtime: Option<UnixTime>, peers: Vec<Option<PeerId>>) -> Line {
    let mut line = (at.as_bytes().to_owned(), content, mtime, peers);
    line.3.sort();
    line
}

/// What is listed until there are `max` lines.
fn list(namespace: &Namespace, name: &str, dir: Option<&RelPath>, recursive: bool, max: usize) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut visit = |Entry { path, kind, mtime, mut peers }| {
        peers.sort();
        lines.push(match kind {
            EntryKind::Leaf(content) => (path.as_bytes().to_owned(), Some(content), mtime, peers),
            EntryKind::Directory => ([path.as_bytes(), b"/"].concat(), None, mtime, peers),
        });
        if lines.len() >= max { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    namespace.list(&arena(name), dir, recursive, &mut visit).unwrap();
    lines
}

fn oracle(rows: &Rows, name: &'static str, dir: Option<&RelPath>, recursive: bool) -> Vec<Line> {
    let mut lines = BTreeMap::new();
    let present = rows.iter().filter(|((_, arena, _), (content, _))| *arena == name && content.is_present());
    for ((_, _, at), _) in present.clone() {
        let here = present.clone().filter(|((_, _, path), _)| path == at);
        let rank = |(content, mtime): &(Content, UnixTime)| (*mtime, content.blob());
        let (_, best) = here.clone().max_by_key(|(_, what)| rank(what)).expect("at least this one");
        let mut peers: Vec<_> = here.filter(|(_, what)| what.0 == best.0).map(|((who, ..), _)| id(*who)).collect();
        peers.sort();
        lines.insert(at.as_bytes().to_owned(), (Some(best.0.clone()), Some(best.1), peers));
        for above in up(at.clone()).into_iter().skip(1) {
            lines.insert([above.as_bytes(), b"/"].concat(), (None, None, Vec::new()));
        }
    }
    let depth = |path: &[u8]| path.strip_suffix(b"/").unwrap_or(path).split(|&b| b == b'/').count();
    let wanted = |path: &[u8]| match dir {
        None => recursive || depth(path) == 1,
        Some(dir) if path == dir.as_bytes() => true,
        Some(dir) => {
            let below = path.strip_prefix(dir.as_bytes()).and_then(|rest| rest.strip_prefix(b"/"));
            below.is_some_and(|rest| !rest.is_empty() && (recursive || depth(rest) == 1))
        }
    };
    let lines = lines.into_iter().filter(|(path, _)| wanted(path));
    lines.map(|(path, (content, mtime, peers))| (path, content, mtime, peers)).collect()
}

/// The path and the directories above it.
fn up(path: RelPath) -> Vec<RelPath> {
    let parts: Vec<&[u8]> = path.as_bytes().split(|&b| b == b'/').collect();
    (1..=parts.len()).rev().map(|count| common::path(parts[..count].join(&b'/'))).collect()
}

fn id(who: u8) -> Option<PeerId> {
    (who > 0).then(|| peer(who))
}

/// A namespace in which everyone has said its rows.
fn namespace_of(rows: &Rows) -> Namespace {
    let namespace = Disk::default().open(1);
    for name in ARENAS {
        let mine = rows.iter().filter(|((who, arena, _), _)| *who == 0 && *arena == name);
        let before = mine.clone().map(|((.., at), _)| (at, (file("was deleted"), seconds(99))));
        let now = mine.map(|((.., at), what)| (at, what.clone()));
        let changes = before.chain(now);
        let changes = changes.map(|(at, (content, mtime))| namespace::Change {
            path: at.clone(),
            content,
            mtime,
            fingerprint: None,
        });
        namespace.commit(&arena(name), &changes.collect::<Vec<_>>()).unwrap();
    }
    for who in 1..PEERS {
        let of = rows.iter().filter(|((of, ..), _)| *of == who).zip(1..);
        let statements = of.map(|(((_, name, path), (content, mtime)), seq)| Statement {
            arena: arena(name),
            path: path.clone(),
            version: Version { content: content.clone(), mtime: *mtime, seq },
        });
        namespace.apply(peer(who), &listing(7, statements.collect())).unwrap();
    }
    namespace
}

fn some_rows() -> impl Strategy<Value = Rows> {
    let key = (0..PEERS, sample::select(&ARENAS[..]), a_path());
    prop::collection::btree_map(key, (a_content(), (0..3i64).prop_map(seconds)), 0..40)
}

fn a_content() -> impl Strategy<Value = Content> {
    prop_oneof![
        4 => sample::select(vec!["", "x", "y", "zz"]).prop_map(file),
        1 => Just(symlink("to/x")),
        2 => Just(Content::Deleted),
        1 => Just(Content::Withdrawn),
    ]
}

/// Few blobs, targets, times and modes, so that some are equal.
fn a_version() -> impl Strategy<Value = (u8, Version)> {
    let size = 1;
    let content = prop_oneof![
        (0..2u8, 0..2u16).prop_map(move |(blob, mode)| Content::File { blob: BlobId::of(&[blob]), size, mode }),
        sample::select(vec!["x", "y"]).prop_map(symlink),
        Just(Content::Deleted),
    ];
    (any::<u8>(), content, 0..2i64)
        .prop_map(|(who, content, mtime)| (who, Version { content, mtime: seconds(mtime), seq: 1 }))
}
