//! The bytes of a batch: what they are for good, that they come back whole, and that no others do harm.

mod common;

use namespace::{Applied, ApplyError, Batch, Content, Cursor, Mark, Part, PeerId, Statement, Version};
use proptest::prelude::*;
use tree::{BlobId, UnixTime};

use crate::common::{Disk, a_path, arena, cases, file, listing, path, peer, says, seconds};

/// A file, a symbolic link and a deletion that were said behind change 4, as postcard 1 writes them.
const CHANGES: [&str; 15] = [
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", // origin
    "ef9bafcdf8acd19101ac028001",                                       // mark: epoch, seq, session
    "00ef9bafcdf8acd191010403",                                         // changes, behind this mark
    "01068001",                                                         // one session began: with this seq, which
    "03",                                                               // three statements
    "0670686f746f730c323031392f6120622e6a7067",                         // arena, path
    "00202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3ff0a204a403", // file: blob, size, mode
    "01ff93ebdc0305",                                                   // mtime, seq
    "01404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f", // previous
    "01",                                                               // at
    "0670686f746f73026cff",                                             // arena, path
    "01042e2e2f7880c49fd50c00060002",                                   // symlink: target; mtime, seq, previous, at
    "0670686f746f7304676f6e65",                                         // arena, path
    "020001ac0200",                                                     // deleted; mtime, seq, previous
    "8094ebdc03",                                                       // at
];

/// The end of a listing that came up to "a": a directory.
const LISTING: [&str; 6] = [
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", // origin
    "ef9bafcdf8acd19101ac028001",                                       // mark: epoch, seq, session
    "01010670686f746f73016100",                                         // listing: after; no end
    "01",                                                               // one statement
    "0670686f746f730162",                                               // arena, path
    "04ed030000070000",                                                 // directory: mode; mtime, seq, previous, at
];

/// Nothing any more.
const FAREWELL: [&str; 4] = [
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", // origin
    "ef9bafcdf8acd19101ffffffffffffffffff018001",                       // mark: epoch, the last seq, session
    "010000",                                                           // listing: from the start to the end
    "00",                                                               // no statements
];

const ORIGIN: [u8; 32] = {
    let mut bytes = [0; 32];
    let mut at = 0;
    while at < 32 {
        bytes[at] = at as u8;
        at += 1;
    }
    bytes
};
const MARK: Mark = Mark { epoch: 0x0123_4567_89ab_cdef, seq: 300, session: 128 };

#[test]
fn golden_changes() {
    let blob = |from: u8| BlobId::from_bytes(std::array::from_fn(|at| from + at as u8));
    let says = |at: &[u8], content, (seconds, nanos), seq| Statement {
        arena: arena("photos"),
        path: path(at),
        version: Version { content, mtime: UnixTime { seconds, nanos }, seq, previous: Vec::new() },
        at: seq - 4,
    };
    let mut file = says(b"2019/a b.jpg", file(""), (-1, 999_999_999), 5);
    file.version.content = Content::File { blob: blob(0x20), size: 70_000, mode: 0o644 };
    file.version.previous = vec![blob(0x40)];
    let gone = Statement { at: 1_000_000_000, ..says(b"gone", Content::Deleted, (0, 1), 300) };
    let link = says(b"l\xff", Content::Symlink { target: b"../x".to_vec() }, (1_700_000_000, 0), 6);
    let part = Part::Changes { after: Mark { seq: 4, session: 3, ..MARK }, sessions: vec![(6, 128)] };
    let statements = vec![file, link, gone];
    check(&CHANGES, &Batch { origin: PeerId::from_bytes(ORIGIN), mark: MARK, part, statements });
}

#[test]
fn golden_listings() {
    let key = |at| (arena("photos"), path(at));
    let origin = PeerId::from_bytes(ORIGIN);
    let part = Part::Listing { after: Some(key("a")), end: None };
    let statements = vec![says(7, "b", Content::Directory { mode: 0o755 })];
    check(&LISTING, &Batch { origin, mark: MARK, part, statements });
    let part = Part::Listing { after: None, end: None };
    let farewell = Batch { origin, mark: Mark { seq: u64::MAX, ..MARK }, part, statements: Vec::new() };
    assert!(farewell.is_farewell());
    check(&FAREWELL, &farewell);

    check(&["ef9bafcdf8acd19101ac028001", "00"], &Cursor { mark: MARK, after: None });
    check(
        &["ef9bafcdf8acd19101ac028001", "01", "0670686f746f73", "0161"],
        &Cursor { mark: MARK, after: Some(key("a")) },
    );
    check(&["03"], &Content::Withdrawn);
}

fn check<T>(golden: &[&str], value: &T)
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let hex = golden.concat();
    assert_eq!(data_encoding::HEXLOWER.encode(&encode(value)), hex);
    let bytes = data_encoding::HEXLOWER.decode(hex.as_bytes()).unwrap();
    assert_eq!(&postcard::from_bytes::<T>(&bytes).unwrap(), value);
}

/// A batch that ends early is no batch.
#[test]
fn every_cut_is_noticed() {
    let batch = listing(peer(1), 7, vec![says(1, "a", file("x")), says(2, "b", Content::Deleted)]);
    let bytes = encode(&batch);
    for len in 0..bytes.len() {
        assert!(postcard::from_bytes::<Batch>(&bytes[..len]).is_err(), "cut to {len}");
    }
}

/// Lengths are only claims until the bytes are there.
#[test]
fn absurd_lengths() {
    let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
    let within = |before: &[u8]| [before, &huge[..], b"abc"].concat();
    let head = data_encoding::HEXLOWER.decode(LISTING[..3].concat().as_bytes()).unwrap();
    assert!(postcard::from_bytes::<Batch>(&within(&head)).is_err());
    assert!(postcard::from_bytes::<Part>(&within(b"\x00\x01\x00\x00")).is_err());
    assert!(postcard::from_bytes::<Statement>(&within(b"")).is_err());
    assert!(postcard::from_bytes::<Statement>(&within(b"\x01a")).is_err());
    assert!(postcard::from_bytes::<Content>(&within(b"\x01")).is_err());
}

/// Names that could lead out of an arena, or mean something else to a shell or to the system, cannot be said at all.
#[test]
fn names_that_are_none() {
    let check = |arena: &str, path: &[u8], good: bool| {
        let version = Version { content: Content::Deleted, mtime: seconds(0), seq: 1, previous: Vec::new() };
        let bytes = postcard::to_stdvec(&(arena, path.to_vec(), version, 0)).unwrap();
        assert_eq!(postcard::from_bytes::<Statement>(&bytes).is_ok(), good, "{arena:?} {path:?}");
    };
    let long = [b'x'; 256];
    let deep = b"x/".repeat(2048);
    check("photos", b"a/b:\xff", true);
    for path in [&b"a"[..], &long[..255], &deep[..4095]] {
        check("photos", path, true);
    }
    for path in [&b""[..], b"/", b"/etc", b"a/", b"a//b", b".", b"..", b"a/../../b", b"a/./b", b"a\0", &long] {
        check("photos", path, false);
    }
    check("photos", &deep[1..], false);
    check("photos", &[&deep[..], b"x"].concat(), false);
    for arena in ["", ".", "..", "a/b", "/a", "a:b", "-a", "a\nb", "a\0", "\x7f", "a\u{85}", &"ä".repeat(128)] {
        check(arena, b"a", false);
    }
    check(&"ä".repeat(127), b"a", true);
    assert!(postcard::from_bytes::<Statement>(b"\x02\xff\xfe\x01a\x02\x00\x00\x01\x00\x00").is_err(), "not UTF-8");
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn there_and_back(batch in a_batch()) {
        prop_assert_eq!(postcard::from_bytes::<Batch>(&encode(&batch)).unwrap(), batch.clone());
        for statement in batch.statements {
            prop_assert_eq!(postcard::from_bytes::<Statement>(&encode(&statement)).unwrap(), statement);
        }
    }

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        drop(postcard::from_bytes::<Statement>(&bytes));
        drop(postcard::from_bytes::<Cursor>(&bytes));
        take_in(&bytes);
    }

    #[test]
    fn bytes_changed_on_the_way(batch in a_batch(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = encode(&batch);
        let at = at.index(bytes.len());
        bytes[at] = to;
        take_in(&bytes);
        bytes.remove(at);
        take_in(&bytes);
    }
}

/// A peer sends these bytes, and then some sense.
fn take_in(bytes: &[u8]) {
    let Ok(batch) = postcard::from_bytes::<Batch>(bytes) else { return };
    let namespace = Disk::default().open();
    let taken = namespace.apply(peer(1), &batch);
    let cursor = namespace.cursor(batch.origin).unwrap();
    match taken {
        Ok(Applied::Taken) => assert_eq!(cursor.mark, batch.mark),
        Ok(Applied::PassedOver) | Err(ApplyError::PeerMisbehaved(_)) => assert_eq!(cursor, Cursor::default()),
        Err(error) => panic!("{error:?}"),
    }
    let sense = listing(peer(99), 5, vec![says(1, "a", file("x"))]);
    assert_eq!(namespace.apply(peer(1), &sense).unwrap(), Applied::Taken);
}

fn encode<T: serde::Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).unwrap()
}

/// Any batch, most of them senseless.
fn a_batch() -> impl Strategy<Value = Batch> {
    let content = prop_oneof![
        (any::<[u8; 32]>(), any::<u64>(), any::<u16>()).prop_map(|(blob, size, mode)| Content::File {
            blob: BlobId::from_bytes(blob),
            size,
            mode
        }),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|target| Content::Symlink { target }),
        Just(Content::Deleted),
        Just(Content::Withdrawn),
        any::<u16>().prop_map(|mode| Content::Directory { mode }),
    ];
    let previous = prop::collection::vec(any::<[u8; 32]>().prop_map(BlobId::from_bytes), 0..3);
    let version = (content, any::<(i64, u32)>(), any::<u64>(), previous);
    let version = version.prop_map(|(content, (seconds, nanos), seq, previous)| Version {
        content,
        mtime: UnixTime { seconds, nanos },
        seq,
        previous,
    });
    let name = "[^-/:\\pC][^/:\\pC]{0,9}".prop_filter("no name", |name| !matches!(&name[..], "." | ".."));
    let statement = (name.clone(), a_path(), version, any::<u64>());
    let statement =
        statement.prop_map(|(name, path, version, at)| Statement { arena: arena(&name), path, version, at });
    let mark = || any::<[u64; 3]>().prop_map(|[epoch, seq, session]| Mark { epoch, seq, session });
    let key = || prop::option::of((name.clone(), a_path()).prop_map(|(name, path)| (arena(&name), path)));
    let part = prop_oneof![
        (mark(), prop::collection::vec(any::<(u64, u64)>(), 0..3))
            .prop_map(|(after, sessions)| Part::Changes { after, sessions }),
        (key(), key()).prop_map(|(after, end)| Part::Listing { after, end }),
    ];
    let batch = (1..9u8, mark(), part, prop::collection::vec(statement, 0..4));
    batch.prop_map(|(origin, mark, part, statements)| Batch { origin: peer(origin), mark, part, statements })
}
