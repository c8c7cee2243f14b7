//! The bytes of a batch: what they are for good, that they come back whole, and that no others do harm.

mod common;

use namespace::{ApplyError, Batch, Content, Cursor, Statement, Version};
use proptest::prelude::*;
use tree::{BlobId, UnixTime};

use crate::common::{Disk, a_path, arena, cases, file, listing, path, peer, says, seconds};

/// A file, a symbolic link and a deletion, as postcard 1 writes them.
const GOLDEN: [&str; 12] = [
    "0103",                                                               // it restarts, and has three statements
    "0670686f746f730c323031392f6120622e6a7067",                           // arena, path
    "00202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f", // file: blob
    "f0a204a403",                                                         // size, mode
    "01ff93ebdc0305",                                                     // mtime, seq
    "0670686f746f73026cff",                                               // arena, path
    "01042e2e2f78",                                                       // symlink: target
    "80c49fd50c0006",                                                     // mtime, seq
    "0670686f746f7304676f6e65",                                           // arena, path
    "020001ac02",                                                         // deleted; mtime, seq
    "ef9bafcdf8acd19101ac02",                                             // upto
    "ad02",                                                               // head
];

#[test]
fn golden() {
    let blob: Vec<u8> = (0x20..0x40).collect();
    let says = |at: &[u8], content, (seconds, nanos), seq| Statement {
        arena: arena("photos"),
        path: path(at),
        version: Version { content, mtime: UnixTime { seconds, nanos }, seq },
    };
    let file = Content::File { blob: BlobId::from_bytes(blob.try_into().unwrap()), size: 70_000, mode: 0o644 };
    let batch = Batch {
        restart: true,
        statements: vec![
            says(b"2019/a b.jpg", file, (-1, 999_999_999), 5),
            says(b"l\xff", Content::Symlink { target: b"../x".to_vec() }, (1_700_000_000, 0), 6),
            says(b"gone", Content::Deleted, (0, 1), 300),
        ],
        upto: Cursor { epoch: 0x0123_4567_89ab_cdef, seq: 300 },
        head: 301,
    };
    let hex: String = encode(&batch).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, GOLDEN.concat());
    let bytes = data_encoding::HEXLOWER.decode(GOLDEN.concat().as_bytes()).unwrap();
    assert_eq!(postcard::from_bytes::<Batch>(&bytes).unwrap(), batch);
    Disk::default().open(1).apply(peer(1), &batch).unwrap();

    // What is not in the batch above.
    assert_eq!(encode(&Content::Withdrawn), [3]);
    assert_eq!(encode(&Cursor { epoch: 128, seq: 3 }), [0x80, 1, 3]);
}

/// A batch that ends early is no batch.
#[test]
fn every_cut_is_noticed() {
    let batch = listing(7, vec![says(1, "a", file("x")), says(2, "b", Content::Deleted)]);
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
    assert!(postcard::from_bytes::<Batch>(&within(b"\x01")).is_err());
    assert!(postcard::from_bytes::<Statement>(&within(b"")).is_err());
    assert!(postcard::from_bytes::<Statement>(&within(b"\x01a")).is_err());
    assert!(postcard::from_bytes::<Content>(&within(b"\x01")).is_err());
}

/// Names that could lead out of an arena, or mean something else to a shell or to the system, cannot be said at all.
#[test]
fn names_that_are_none() {
    let check = |arena: &str, path: &[u8], good: bool| {
        let version = Version { content: Content::Deleted, mtime: seconds(0), seq: 1 };
        let bytes = postcard::to_stdvec(&(arena, path.to_vec(), version)).unwrap();
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
    assert!(postcard::from_bytes::<Statement>(b"\x02\xff\xfe\x01a\x02\x00\x00\x01").is_err(), "not UTF-8");
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
    let namespace = Disk::default().open(1);
    match namespace.apply(peer(1), &batch) {
        Ok(()) => assert_eq!(namespace.cursor(peer(1)).unwrap(), batch.upto),
        Err(ApplyError::PeerMisbehaved(_)) => assert_eq!(namespace.cursor(peer(1)).unwrap(), Cursor::default()),
        Err(error) => panic!("{error:?}"),
    }
    namespace.apply(peer(1), &listing(5, vec![says(1, "a", file("x"))])).unwrap();
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
    ];
    let version = (content, any::<(i64, u32)>(), any::<u64>()).prop_map(|(content, (seconds, nanos), seq)| Version {
        content,
        mtime: UnixTime { seconds, nanos },
        seq,
    });
    let name = "[^-/:\\pC][^/:\\pC]{0,9}".prop_filter("no name", |name| !matches!(&name[..], "." | ".."));
    let statement =
        (name, a_path(), version).prop_map(|(name, path, version)| Statement { arena: arena(&name), path, version });
    (any::<bool>(), prop::collection::vec(statement, 0..4), any::<[u64; 3]>()).prop_map(
        |(restart, statements, [epoch, seq, head])| Batch { restart, statements, upto: Cursor { epoch, seq }, head },
    )
}
