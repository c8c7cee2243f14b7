//! The view over all peers, against an oracle that knows no skipping: it makes every line there is, and sorts.
//!
//! The danger is in the order. `-`, `.` and most control characters sort before `/`, so that what is in "a" stands
//! behind a file "a-b", and a path may be a file at one peer and a directory at another, of which anybody or nobody says
//! that it is there.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
};

use namespace::{
    Arena, Change, Content, Entry, EntryKind, FileBelow, Namespace, PeerId, Pins, Place, RelPath, Shown, Statement,
    Version, shown,
};
use proptest::{prelude::*, sample};
use tree::{BlobId, UnixTime};

use crate::common::{Disk, a_path, arena, cases, change, changes, file, listing, path, peer, says, seconds, symlink};

/// Names that are each other's beginnings or close to them: an open range would run into the next arena.
const ARENAS: [&str; 4] = ["a", "a b", "aa", "b"];

/// This machine is 0.
const PEERS: u8 = 4;

/// Who, arena, path → what, since when, and what it was made from.
type Rows = BTreeMap<(u8, &'static str, RelPath), (Content, UnixTime, Vec<BlobId>)>;

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

    /// Just what a listing has, of several places one behind the other; and what is pinned is what was said last.
    #[test]
    fn files_below_places(
        rows in some_rows(),
        asked in prop::collection::vec((0..ARENAS.len(), prop::option::of(a_path())), 0..6),
        stop in any::<usize>(),
    ) {
        let namespace = namespace_of(&rows);
        let mentioned = rows.keys().map(|(_, name, path)| Place { arena: arena(name), path: Some(path.clone()) });
        let mut places: Vec<_> =
            asked.into_iter().map(|(name, path)| Place { arena: arena(ARENAS[name]), path }).chain(mentioned).collect();
        places.truncate(8);
        let mut expected = Vec::new();
        for (number, Place { arena, path }) in places.iter().enumerate() {
            for line in list(&namespace, arena.as_str(), path.as_ref(), true, usize::MAX) {
                if let Some(Content::File { blob, size, .. }) = line.content {
                    let path = RelPath::try_from(line.at).unwrap();
                    expected.push((number, FileBelow { path, blob, size, peers: line.peers }));
                }
            }
        }
        let stop = stop % (expected.len() + 1);
        for stop in [stop, usize::MAX] {
            let mut got = Vec::new();
            let mut visit = |number, mut file: FileBelow| {
                file.peers.sort();
                got.push((number, file));
                if got.len() > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            namespace.files_below(&places, &mut visit).unwrap();
            expected.iter_mut().for_each(|(_, file)| file.peers.sort());
            prop_assert_eq!(&got[..], &expected[..expected.len().min(stop.saturating_add(1))]);
        }

        let (first, rest) = places.split_at(places.len() / 2);
        let pins = |places: &[Place]| places.iter().cloned().collect::<Pins>();
        prop_assert_eq!(namespace.change_pins(first, &[], 100).unwrap(), pins(first).iter().len() as u64);
        prop_assert_eq!(namespace.pins().unwrap(), pins(first));
        let both = namespace.change_pins(rest, first, 100).unwrap();
        prop_assert_eq!((both, namespace.pins().unwrap()), (pins(rest).iter().len() as u64, pins(rest)));
        // One too many changes nothing.
        let more = Place { arena: arena("more"), path: None };
        prop_assert_eq!(namespace.change_pins(&[more], &[], both).unwrap(), both + 1);
        prop_assert_eq!(namespace.pins().unwrap(), pins(rest));
    }

    #[test]
    fn versions_and_arenas(rows in some_rows(), asked in a_path()) {
        let namespace = namespace_of(&rows);
        for (name, at) in rows.keys().map(|(_, name, at)| (name, at)).chain(ARENAS.iter().map(|name| (name, &asked))) {
            let got = namespace.versions(&arena(name), at).unwrap();
            let mut got: Vec<_> = got.into_iter().map(|(who, version)| (who, version.content, version.mtime)).collect();
            let of = rows.iter().filter(|((_, arena, path), _)| arena == name && path == at);
            let mut expected: Vec<_> = of.map(|((who, ..), (content, mtime, _))| (id(*who), content.clone(), *mtime)).collect();
            got.sort_by_key(|(who, ..)| *who);
            expected.sort_by_key(|(who, ..)| *who);
            prop_assert_eq!(got, expected, "{} {:?}", name, at);
        }

        let followed = Arena { name: arena("Z followed"), dir: None, public: false, root: None };
        namespace.set_arena(&followed).unwrap();
        let got: Vec<String> = namespace.all_arenas().unwrap().into_iter().map(String::from).collect();
        let mut sorted = got.clone();
        sorted.sort();
        sorted.dedup();
        prop_assert_eq!(&got, &sorted);
        let present = rows.iter().filter(|(_, (content, ..))| content.is_present()).map(|((_, name, _), _)| *name);
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
        let of = |shown: Option<Shown<'_, u8>>| shown.map(|Shown { version: (_, version), in_conflict }| {
            (version.content.clone(), version.mtime, in_conflict)
        });
        let before = of(shown(&versions));
        if !versions.is_empty() {
            let turn = turn % versions.len();
            versions.rotate_left(turn);
        }
        prop_assert_eq!(before, of(shown(&versions)));
    }
}

/// A directory's line is where its first entry's is, and so behind a file whose name only begins as its own.
#[test]
fn a_file_and_a_directory_of_one_name() {
    let rows = [(0, "a"), (1, "a/b"), (1, "a-b"), (2, "a/b/c"), (2, "a0")];
    let rows: Rows = rows.map(|(who, at)| ((who, "a", path(at)), (file(at), seconds(0), vec![]))).into();
    let namespace = namespace_of(&rows);
    let listed = |dir: Option<&str>, recursive| {
        let lines = list(&namespace, "a", dir.map(path).as_ref(), recursive, usize::MAX);
        lines.into_iter().map(|line| String::from_utf8(line.at).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(listed(None, true), ["a", "a-b", "a/", "a/b", "a/b/", "a/b/c", "a0"]);
    assert_eq!(listed(None, false), ["a", "a-b", "a/", "a0"]);
    assert_eq!(listed(Some("a"), true), ["a", "a/b", "a/b/", "a/b/c"]);
    assert_eq!(listed(Some("a"), false), ["a", "a/b", "a/b/"]);
    assert_eq!(listed(Some("a/b"), false), ["a/b", "a/b/c"]);
    assert_eq!(listed(Some("a/b/c"), true), ["a/b/c"]);
    assert_eq!(listed(Some("a/b/c/d"), true), [] as [&str; 0]);
}

/// A directory of which somebody says that it is there has its line where its path is, before what is only above a file.
#[test]
fn directories_that_are_said() {
    let row = |who, at, content| ((who, "a", path(at)), (content, seconds(5), vec![]));
    let rows = [row(0, "a", DIRECTORY), row(1, "a", DIRECTORY), row(0, "a-b", file("x")), row(1, "a/b", file("x"))];
    let empty = [row(2, "e", DIRECTORY), row(2, "f/g", DIRECTORY)];
    let namespace = namespace_of(&rows.into_iter().chain(empty).collect());
    let listed = |dir: Option<&str>, recursive| list(&namespace, "a", dir.map(path).as_ref(), recursive, usize::MAX);
    let said = |at, who: &[u8]| line(at, Some(DIRECTORY), Some(seconds(5)), who.iter().map(|who| id(*who)).collect());
    let file = |at, who| line(at, Some(file("x")), Some(seconds(5)), vec![id(who)]);
    let top = [said("a", &[0, 1]), file("a-b", 0), said("e", &[2]), line("f/", None, None, vec![])];
    assert_eq!(listed(None, false), top);
    assert_eq!(listed(Some("a"), false), [file("a/b", 1)]);
    assert_eq!(listed(Some("f"), true), [said("f/g", &[2])]);
    // An empty directory has nothing in it, and is an entry all the same.
    assert_eq!(listed(Some("e"), true), []);
    let entry = |at| namespace.entry(&arena("a"), &path(at)).unwrap().map(|entry| (entry.kind, entry.peers));
    assert_eq!(entry("e"), Some((EntryKind::Directory, vec![id(2)])));
    assert_eq!(entry("f"), Some((EntryKind::Directory, vec![])));
    assert_eq!(entry("a/b").map(|(_, peers)| peers), Some(vec![id(1)]));
    assert_eq!(entry("g"), None);
}

/// Who has other content there is not named, nor is who deleted it.
#[test]
fn only_peers_with_what_is_shown_are_named() {
    let at = |who, content, mtime| ((who, "a", path("x")), (content, seconds(mtime), vec![]));
    let rows = [at(0, file("old"), 1), at(1, file("new"), 5), at(2, file("new"), 3), at(3, Content::Deleted, 9)];
    let lines = list(&namespace_of(&rows.into()), "a", None, true, usize::MAX);
    let shown = line("x", Some(file("new")), Some(seconds(5)), vec![Some(peer(1)), Some(peer(2))]);
    assert_eq!(lines, [Line { in_conflict: true, ..shown }]);
}

/// Permissions are a machine's own affair: whoever has the bytes has the file.
#[test]
fn peers_with_another_mode_are_named() {
    let with = |mode| Content::File { blob: BlobId::of(b"x"), size: 1, mode };
    let at = |who, mode| ((who, "a", path("x")), (with(mode), seconds(0), vec![]));
    let lines = list(&namespace_of(&[at(0, 0o600), at(1, 0o644), at(2, 0o640)].into()), "a", None, true, usize::MAX);
    assert_eq!(lines, [line("x", Some(with(0o644)), Some(seconds(0)), vec![None, Some(peer(1)), Some(peer(2))])]);
}

/// A size is only claimed, so that two may be claimed of one blob. Even then all show the same.
#[test]
fn a_lie_about_a_size() {
    let claims = |size| Content::File { blob: BlobId::of(b"x"), size, mode: 0o644 };
    let version = |size| (size, Version { content: claims(size), mtime: seconds(0), seq: 1, previous: vec![] });
    let shown_of = |versions: [(u64, Version); 2]| shown(&versions).map(|shown| shown.version.0);
    assert_eq!(shown_of([version(1), version(9)]), shown_of([version(9), version(1)]));
}

/// A large directory that is not looked into costs no more than its one line.
#[test]
fn a_directory_is_skipped_as_a_whole() {
    let namespace = Disk::default().open();
    let inside = (0..20_000).map(|n| change(&format!("d/{}/{n:05}", n % 100), file("x")));
    commit(&namespace, "a", inside.chain([change("e", file("x"))]).collect());
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
    let namespace = Disk::default().open();
    commit(&namespace, "photos", vec![change("x", file("x")), change("x", Content::Deleted)]);
    assert_eq!(namespace.all_arenas().unwrap(), [arena("photos")]);
    assert_eq!(list(&namespace, "photos", None, true, usize::MAX), []);
}

/// Giving up is not deleting: then nobody has the arena.
#[test]
fn an_arena_that_everyone_gave_up_is_gone() {
    let namespace = Disk::default().open();
    let mine = Arena { name: arena("mine"), dir: Some("/mine".into()), public: false, root: Some((1, 2)) };
    namespace.set_arena(&mine).unwrap();
    assert_eq!(namespace.arenas().unwrap(), [mine]);
    commit(&namespace, "mine", vec![change("x", file("x"))]);
    namespace.apply(peer(1), &listing(peer(1), 7, vec![])).unwrap();
    let withdrawn = vec![says(1, "x", Content::Withdrawn)];
    namespace.apply(peer(1), &changes(peer(1), 7, 0, 1, withdrawn)).unwrap();
    namespace.remove_arena(&arena("mine"), 1).unwrap();
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

/// A line as both sides make it.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    /// The path; of a directory of which nobody says anything with a `/` behind it, since that is what it is ordered by.
    at: Vec<u8>,
    content: Option<Content>,
    mtime: Option<UnixTime>,
    peers: Vec<Option<PeerId>>,
    in_conflict: bool,
}

fn line(at: &str, content: Option<Content>, mtime: Option<UnixTime>, mut peers: Vec<Option<PeerId>>) -> Line {
    peers.sort();
    Line { at: at.as_bytes().to_owned(), content, mtime, peers, in_conflict: false }
}

/// What is listed until there are `max` lines. Of a directory that is said no entry tells the mode.
fn list(namespace: &Namespace, name: &str, dir: Option<&RelPath>, recursive: bool, max: usize) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut visit = |Entry { path, kind, mtime, mut peers, in_conflict }| {
        peers.sort();
        let is_said = mtime.is_some();
        let at = if is_said { path.as_bytes().to_owned() } else { [path.as_bytes(), b"/"].concat() };
        let content = match kind {
            EntryKind::Leaf(content) => Some(content),
            EntryKind::Directory => is_said.then_some(DIRECTORY),
        };
        lines.push(Line { at, content, mtime, peers, in_conflict });
        if lines.len() >= max { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    namespace.list(&arena(name), dir, recursive, &mut visit).unwrap();
    lines
}

fn oracle(rows: &Rows, name: &'static str, dir: Option<&RelPath>, recursive: bool) -> Vec<Line> {
    let mut lines = BTreeMap::new();
    let present = rows.iter().filter(|((_, arena, _), (content, ..))| *arena == name && content.is_present());
    let mut said = BTreeSet::new();
    for ((_, _, at), _) in present.clone() {
        let here = present.clone().filter(|((_, _, path), _)| path == at);
        let versions: Vec<_> = here.map(|((who, ..), row)| (*who, version(row))).collect();
        let Shown { version: (_, best), in_conflict } = shown(&versions).expect("at least this one");
        let same = versions.iter().filter(|(_, version)| version.content.is_same(&best.content));
        let mut peers: Vec<_> = same.map(|(who, _)| id(*who)).collect();
        peers.sort();
        if best.content == DIRECTORY {
            said.insert(at.clone());
        }
        let (content, mtime) = (Some(best.content.clone()), Some(best.mtime));
        let bytes = at.as_bytes().to_owned();
        lines.insert(bytes.clone(), Line { at: bytes, content, mtime, peers, in_conflict });
    }
    for ((_, _, at), _) in present {
        for above in up(at.clone()).into_iter().skip(1).filter(|above| !said.contains(above)) {
            let at = [above.as_bytes(), b"/"].concat();
            let unsaid = Line { at: at.clone(), content: None, mtime: None, peers: Vec::new(), in_conflict: false };
            lines.insert(at, unsaid);
        }
    }
    let depth = |path: &[u8]| path.strip_suffix(b"/").unwrap_or(path).split(|&b| b == b'/').count();
    let is_said_dir = dir.is_some_and(|dir| said.contains(dir));
    let wanted = |path: &[u8]| match dir {
        None => recursive || depth(path) == 1,
        Some(dir) if path == dir.as_bytes() => !is_said_dir,
        Some(dir) => {
            let below = path.strip_prefix(dir.as_bytes()).and_then(|rest| rest.strip_prefix(b"/"));
            below.is_some_and(|rest| !rest.is_empty() && (recursive || depth(rest) == 1))
        }
    };
    lines.into_values().filter(|line| wanted(&line.at)).collect()
}

/// The path and the directories above it.
fn up(path: RelPath) -> Vec<RelPath> {
    let parts: Vec<&[u8]> = path.as_bytes().split(|&b| b == b'/').collect();
    (1..=parts.len()).rev().map(|count| common::path(parts[..count].join(&b'/'))).collect()
}

fn id(who: u8) -> Option<PeerId> {
    (who > 0).then(|| peer(who))
}

fn version((content, mtime, previous): &(Content, UnixTime, Vec<BlobId>)) -> Version {
    Version { content: content.clone(), mtime: *mtime, seq: 1, previous: previous.clone() }
}

fn commit(namespace: &Namespace, name: &str, changes: Vec<Change>) {
    namespace.commit(&arena(name), &changes, 1, &mut |_| true).unwrap();
}

/// A namespace in which everyone has said its rows. What this machine's come from, it tells by what was there before.
fn namespace_of(rows: &Rows) -> Namespace {
    let namespace = Disk::default().open();
    for ((_, name, at), (content, mtime, _)) in rows.iter().filter(|((who, ..), _)| *who == 0) {
        let before = Change { path: at.clone(), content: file("was deleted"), mtime: seconds(99) };
        let gone = Change { content: Content::Deleted, mtime: *mtime, ..before.clone() };
        let now = Change { path: at.clone(), content: content.clone(), mtime: *mtime };
        commit(&namespace, name, vec![before, gone, now]);
    }
    for who in 1..PEERS {
        let of = rows.iter().filter(|((of, ..), _)| *of == who).zip(1..);
        let statements = of.map(|(((_, name, path), row), seq)| Statement {
            arena: arena(name),
            path: path.clone(),
            version: Version { seq, ..version(row) },
            at: 0,
        });
        namespace.apply(peer(who), &listing(peer(who), 7, Vec::new())).unwrap();
        let statements: Vec<_> = statements.collect();
        let batch = changes(peer(who), 7, 0, statements.len() as u64, statements);
        namespace.apply(peer(who), &batch).unwrap();
    }
    namespace
}

fn some_rows() -> impl Strategy<Value = Rows> {
    let key = (0..PEERS, sample::select(&ARENAS[..]), a_path());
    let row = (a_content(), (0..3i64).prop_map(seconds), some_ids());
    let rows = prop::collection::btree_map(key, row, 0..40);
    // This machine's come from what it had there itself.
    rows.prop_map(|mut rows| {
        for ((who, ..), (content, _, previous)) in &mut rows {
            if *who == 0 {
                *previous = Vec::from_iter(file("was deleted").id());
                if !content.is_present() {
                    *content = Content::Deleted;
                }
            }
        }
        rows
    })
}

fn some_ids() -> impl Strategy<Value = Vec<BlobId>> {
    let ids = ["", "x", "y"].map(|data| BlobId::of(data.as_bytes()));
    prop::collection::vec(sample::select(ids.to_vec()), 0..2)
}

fn a_content() -> impl Strategy<Value = Content> {
    prop_oneof![
        4 => sample::select(vec!["", "x", "y", "zz"]).prop_map(file),
        1 => Just(symlink("to/x")),
        2 => Just(DIRECTORY),
        2 => Just(Content::Deleted),
        1 => Just(Content::Withdrawn),
    ]
}

/// Few blobs, targets, times and modes, so that some are equal.
fn a_version() -> impl Strategy<Value = (u8, Version)> {
    let content = prop_oneof![
        (0..2u16, sample::select(vec!["", "x", "y"])).prop_map(|(mode, data)| match file(data) {
            Content::File { blob, size, .. } => Content::File { blob, size, mode },
            other => other,
        }),
        sample::select(vec!["x", "y"]).prop_map(symlink),
        Just(DIRECTORY),
        Just(Content::Deleted),
    ];
    let row = (content, (0..2i64).prop_map(seconds), some_ids());
    (any::<u8>(), row.prop_map(|row| version(&row)))
}

const DIRECTORY: Content = Content::Directory { mode: 0o755 };
