//! What the test files share: data, ranges, proven pieces, and what a read must give.
#![allow(dead_code, reason = "every test file uses a part of it")]

pub(crate) mod rotting;

use std::{collections::BTreeMap, path::Path, time::Duration};

use blobstore::{Settings, Sink, Store};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tree::{
    BlobId, ByteRange, Decoder, Fingerprint, Geometry, Grain, Hashed, Prover, Query, RangeSet, UnixTime, Verified,
};

pub(crate) const GROUP: u64 = tree::GROUP_BYTES;

pub(crate) const FILES: TableDefinition<(u32, &[u8]), &[u8]> = TableDefinition::new("store.files");
pub(crate) const HOLDERS: TableDefinition<(&[u8; 6], u32, &[u8]), ()> = TableDefinition::new("store.holders");
pub(crate) const DIRS: TableDefinition<u32, &[u8]> = TableDefinition::new("store.dirs");
pub(crate) const DIR_NUMBERS: TableDefinition<(u32, &[u8]), u32> = TableDefinition::new("store.dir_numbers");

/// A size whose outboard is a file of its own, and no row.
pub(crate) const LARGE: usize = (5 << 20) + 321;

/// When files are mended, in milliseconds since 1970.
pub(crate) const NOW: u64 = 1_700_000_000_000;

/// `size` bytes that look random, so that no two chunks are alike; another `seed` gives other bytes.
pub(crate) fn random(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

pub(crate) fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).expect("a range in order")
}

/// All bytes of a blob of `size` bytes.
pub(crate) fn all(size: usize) -> RangeSet {
    Geometry::new(size as u64).all().into()
}

/// The chunk groups of these numbers, of a blob of `size` bytes.
pub(crate) fn groups(size: usize, numbers: impl IntoIterator<Item = u64>) -> RangeSet {
    let size = size as u64;
    numbers.into_iter().map(|n| range((n * GROUP).min(size), ((n + 1) * GROUP).min(size))).collect()
}

/// How many chunk groups a blob of `size` bytes has.
pub(crate) fn group_count(size: usize) -> u64 {
    Geometry::new(size as u64).groups()
}

/// A store's own directories below `dir`, and everything else as by default.
pub(crate) fn settings(dir: &Path) -> Settings {
    Settings {
        outboards: dir.join("outboards"),
        cache: dir.join("cache"),
        grain: Grain::GROUP,
        cache_limit: u64::MAX,
        cache_keep_free: 0,
        saved: dir.join("saved"),
        saved_keep: Duration::from_secs(100),
        saved_bytes_max: 1 << 30,
        vanished_max: 100,
    }
}

/// What some file system could report of a file.
pub(crate) fn fingerprint(device: u64, inode: u64, size: u64, mtime: UnixTime, ctime: UnixTime) -> Fingerprint {
    Fingerprint { device, inode, birth: None, size, mtime, ctime }
}

pub(crate) fn hashed(bytes: &[u8]) -> Hashed {
    tree::hash(bytes, bytes.len() as u64).expect("memory can be read")
}

/// The pieces, proofs included, that a peer who has `bytes` sends for `ranges`.
pub(crate) fn pieces(bytes: &[u8], ranges: &RangeSet) -> Vec<Verified> {
    pieces_of(&hashed(bytes), bytes, ranges)
}

/// The same where `bytes` were hashed before.
pub(crate) fn pieces_of(hashed: &Hashed, bytes: &[u8], ranges: &RangeSet) -> Vec<Verified> {
    let prover = Prover::new(hashed.id, bytes.len() as u64, bytes, &hashed.outboard[..], &Query::groups(ranges));
    prover.map(|piece| piece.expect("sound bytes prove")).collect()
}

/// The numbers of directories by root and path; both tables of them must say the same.
pub(crate) fn dir_numbers(db: &Database) -> BTreeMap<(u32, Vec<u8>), u32> {
    let txn = db.begin_read().unwrap();
    let numbers = txn.open_table(DIR_NUMBERS).unwrap();
    let numbers = numbers.iter().unwrap().map(|row| {
        let (dir, number) = row.unwrap();
        (number.value(), (dir.value().0, dir.value().1.to_owned()))
    });
    let numbers: Vec<(u32, (u32, Vec<u8>))> = numbers.collect();
    let dirs = txn.open_table(DIRS).unwrap();
    let dirs = dirs.iter().unwrap().map(|row| {
        let (number, dir) = row.unwrap();
        (number.value(), postcard::from_bytes(dir.value()).unwrap())
    });
    let dirs: BTreeMap<u32, (u32, Vec<u8>)> = dirs.collect();
    assert_eq!(numbers.len(), dirs.len(), "{numbers:?} and {dirs:?} are not inverse");
    assert_eq!(numbers.iter().cloned().collect::<BTreeMap<_, _>>(), dirs, "the tables of directories are not inverse");
    numbers.into_iter().map(|(number, dir)| (dir, number)).collect()
}

/// The directory of a path, with its last slash, and the name in it.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    path.split_at(path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1))
}

/// The pieces that come from a peer who has `bytes` and says that they are `claimed`.
pub(crate) fn pieces_claiming(bytes: &[u8], claimed: u64, ranges: &RangeSet) -> Vec<Verified> {
    let mut decoder = Decoder::new(BlobId::of(bytes), Query::groups(ranges)).expecting(claimed);
    decoder.push(&claimed.to_le_bytes());
    pieces(bytes, ranges).iter().for_each(|piece| decoder.push(piece.wire_bytes()));
    std::iter::from_fn(|| decoder.next().expect("only the size is wrong")).collect()
}

/// Writes what a peer who has `bytes` sends for `ranges`.
pub(crate) fn feed(sink: &mut impl Sink, bytes: &[u8], ranges: &RangeSet) {
    sink.write(&pieces(bytes, ranges)).expect("pieces of this blob are taken");
}

/// Reads `asked` of the blob that is `bytes`: exactly `missing` may be missing, and everything else must come,
/// once, in order, cut to what was asked, and right.
pub(crate) fn check_read(store: &Store, bytes: &[u8], asked: ByteRange, missing: &RangeSet) {
    check_read_of(store, BlobId::of(bytes), bytes, asked, missing);
}

/// The same where the id of `bytes` is known.
pub(crate) fn check_read_of(store: &Store, blob: BlobId, bytes: &[u8], asked: ByteRange, missing: &RangeSet) {
    let size = bytes.len() as u64;
    let outcome = store.read(blob, size, asked).expect("the store can be read");
    assert_eq!(outcome.missing, *missing, "missing when {asked} of {size} was asked");
    let mut seen = RangeSet::new();
    for piece in &outcome.pieces {
        let at = piece.range();
        assert!(seen.end() <= at.start() && !at.is_empty(), "{at} comes after {seen:?}");
        assert!(bytes[at.start() as usize..at.end() as usize] == piece.bytes()[..], "wrong bytes at {at}");
        seen.insert(at);
    }
    let inside = asked.intersection(range(0, size));
    assert_eq!(seen, RangeSet::from(inside).difference(missing), "read when {asked} of {size} was asked");
}
