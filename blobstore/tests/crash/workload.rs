//! A day in the life of a store: all that it ever writes is written here once, and recorded.

use std::{collections::BTreeMap, path::Path};

use blobstore::{Access, Consent, Disk, FileRef, Move, NewFile, Store};
use redb::Database;
use tree::{BlobId, RangeSet, UnixTime};

use crate::{
    commit,
    common::{NOW, all, feed, groups, pieces_claiming, random, range},
    open,
    sim_disk::SimDisk,
};

/// The users' files: with no outboard, with one in a row, with one in a file.
pub(crate) const FILES: [&str; 5] = ["empty", "small", MEDIUM, LARGE, UNLINKED];
const SIZES: [usize; 5] = [0, 1 << 10, 40 << 10, 5 << 20, (5 << 20) + 1];
/// Is replaced, and linked anew.
pub(crate) const MEDIUM: &str = "dir/medium";
/// Rots, and is mended.
pub(crate) const LARGE: &str = "dir/large";
/// Is unlinked, and with it its directory loses its number.
pub(crate) const UNLINKED: &str = "alone/unlinked";

/// Rots, and is renamed to [`RENAMED`] with its quarantine, out of one directory that has a number, and into one that
/// has none.
pub(crate) const MOVED: &str = "left/moved";
pub(crate) const RENAMED: &str = "entered/renamed";

/// What rots in [`MOVED`].
pub(crate) fn rotten_when_moved() -> RangeSet {
    groups(MOVED_BYTES, [2])
}

/// Which byte of each group of [`rotten`] has another bit.
pub(crate) const ROTTEN_BYTE: u64 = 777;

const MOVED_BYTES: usize = 90 << 10;

/// What rots in [`LARGE`].
pub(crate) fn rotten() -> RangeSet {
    groups(5 << 20, [3, 200])
}

/// How the workload begins.
pub(crate) struct Start {
    /// Whether the users' files were synced before they are linked.
    pub(crate) synced: bool,
    /// Whether the store's own directories are there and durable already.
    pub(crate) own_dirs: bool,
}

/// What had happened: a verb in the present before it is begun, in the past when it had returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mark {
    Linked,
    Committed(RangeSet),
    Rots,
    Quarantined,
    Mends,
    Mended,
    LinkedMoved,
    /// The damage of [`MOVED`] is known.
    FoundRotten,
    Moves,
    Moved,
    Replaces,
    LinkedAnew,
    Unlinks,
    Unlinked,
    Takes,
    Taken,
    /// A small blob is pinned, and in the cache.
    Pinned,
    /// All of [`Blobs::evicted`] is in the cache, and stays until it is evicted.
    Brought,
    Evicts,
    BroughtAnew,
    EvictsAll,
    EvictedAll,
}

pub(crate) struct Blobs {
    /// The users' files by path.
    pub(crate) of: BTreeMap<&'static str, Vec<u8>>,
    /// What [`MEDIUM`] is replaced by.
    pub(crate) new_medium: Vec<u8>,
    pub(crate) cached: Vec<u8>,
    /// What [`MOVED`] is.
    pub(crate) moved: Vec<u8>,
    /// Comes into the cache from peers who disagree on its size.
    disputed: Vec<u8>,
    /// Comes into the cache, is evicted in part, comes again, and is evicted whole.
    pub(crate) evicted: Vec<u8>,
    /// So small that it is a row.
    pub(crate) pinned: Vec<u8>,
}

pub(crate) struct Recorded {
    pub(crate) disk: SimDisk,
    pub(crate) blobs: Blobs,
    pub(crate) large_mtime: UnixTime,
    /// What had happened, behind how many operations.
    marks: Vec<(usize, Mark)>,
}

impl Recorded {
    /// What had happened before the operation number `ops`.
    pub(crate) fn marks_before(&self, ops: usize) -> &[(usize, Mark)] {
        &self.marks[..self.marks.partition_point(|(at, _)| *at <= ops)]
    }

    fn mark(&mut self, mark: Mark) {
        self.marks.push((self.disk.recorded(), mark));
    }

    fn write(&self, start: &Start, path: &str, bytes: &[u8]) {
        let path = Path::new("/arena").join(path);
        self.disk.create_dirs(path.parent().unwrap()).unwrap();
        self.disk.open(&path, Access::Create).unwrap().write_all_at(bytes, 0).unwrap();
        self.sync(start);
    }

    fn sync(&self, start: &Start) {
        if start.synced {
            self.disk.sync_file_system(Path::new("/arena")).unwrap();
        }
    }

    fn new_file(&self, store: &Store, path: &str, bytes: &[u8]) -> NewFile {
        let file = self.disk.open(&Path::new("/arena").join(path), Access::Read).unwrap();
        NewFile {
            path: path.into(),
            fingerprint: file.fingerprint().unwrap(),
            hashed_at: 1,
            racy: false,
            hashed: store.hash(bytes, bytes.len() as u64).unwrap(),
        }
    }
}

pub(crate) fn record(start: &Start) -> Recorded {
    let dirs = ["/arena", "/home", "/home/outboards", "/home/cache", "/home/saved"];
    let disk = SimDisk::new(&dirs[..if start.own_dirs { 5 } else { 2 }]);
    // redb does not promise that a database survives a power cut while it is made, and so whoever makes it must.
    drop(Database::builder().create_with_backend(disk.database(Path::new("/home/db"))).unwrap());
    disk.settle();
    let of = FILES.iter().zip(SIZES).enumerate().map(|(seed, (path, size))| (*path, random(seed as u64, size)));
    let blobs = Blobs {
        of: of.collect(),
        new_medium: random(10, 50 << 10),
        moved: random(15, MOVED_BYTES),
        cached: random(11, (1 << 20) + 5000),
        disputed: random(12, 40 << 10),
        evicted: random(13, (3 << 20) + 20_000),
        pinned: random(14, 9000),
    };
    let mut recorded = Recorded { disk, blobs, large_mtime: UnixTime::default(), marks: Vec::new() };
    let (store, _) = open(&recorded.disk);
    link(start, &store, &mut recorded);
    cache(&store, &mut recorded);
    rot_and_mend(&store, &mut recorded);
    rename(start, &store, &mut recorded);
    replace_and_unlink(start, &store, &mut recorded);
    take(&store, &mut recorded);
    evict(&store, &mut recorded);
    recorded
}

fn link(start: &Start, store: &Store, recorded: &mut Recorded) {
    let root = store.add_root(Path::new("/arena")).unwrap();
    recorded.blobs.of.iter().for_each(|(path, bytes)| recorded.write(start, path, bytes));
    let new: Vec<_> = recorded.blobs.of.iter().map(|(path, bytes)| recorded.new_file(store, path, bytes)).collect();
    recorded.large_mtime = recorded.new_file(store, LARGE, b"").fingerprint.mtime;
    store.link(root, &new).unwrap();
    recorded.mark(Mark::Linked);
    store.rebuild_outboard(&FileRef { root, path: LARGE.into() }).unwrap();
}

fn cache(store: &Store, recorded: &mut Recorded) {
    let Blobs { cached, disputed, .. } = &recorded.blobs;
    let (cached, size) = (cached.clone(), cached.len());
    let parts = [groups(size, [0, 9, 64]), groups(size, 1..9), groups(size, 10..40), groups(size, 40..64)];
    // The second half comes after a restart of the fetch.
    for half in parts.chunks(2) {
        let mut partial = store.partial(BlobId::of(&cached), size as u64).unwrap();
        for part in half {
            feed(&mut partial, &cached, part);
            commit(&mut partial);
            recorded.marks.push((recorded.disk.recorded(), Mark::Committed(part.clone())));
        }
        feed(&mut partial, &cached, &parts[3]);
    }
    let claimed = disputed.len() as u64 + 3;
    let mut lied = store.partial(BlobId::of(disputed), claimed).unwrap();
    let first = pieces_claiming(disputed, claimed, &groups(disputed.len(), [0, 1]));
    blobstore::Sink::write(&mut lied, &first).unwrap();
    commit(&mut lied);
    let mut partial = store.partial(BlobId::of(disputed), disputed.len() as u64).unwrap();
    feed(&mut partial, disputed, &all(disputed.len()));
    commit(&mut partial);
}

fn rot_and_mend(store: &Store, recorded: &mut Recorded) {
    let file = FileRef { root: store.add_root(Path::new("/arena")).unwrap(), path: LARGE.into() };
    let (bytes, rotten) = (recorded.blobs.of[LARGE].clone(), rotten());
    recorded.mark(Mark::Rots);
    for range in rotten.iter() {
        recorded.disk.rot(&Path::new("/arena").join(LARGE), range.start() + ROTTEN_BYTE);
    }
    // A read finds the first, verify the rest.
    store.read(BlobId::of(&bytes), bytes.len() as u64, range(0, 1 << 20)).unwrap();
    store.verify_file(&file, &|_| {}).unwrap();
    recorded.mark(Mark::Quarantined);
    let mut mending = store.mend(&file, Consent::Damage, NOW).unwrap();
    recorded.mark(Mark::Mends);
    let [first, last] = [groups(bytes.len(), [3]), groups(bytes.len(), [200])];
    feed(&mut mending, &bytes, &first);
    commit(&mut mending);
    feed(&mut mending, &bytes, &last);
    // Nobody commits what came last: finishing does.
    mending.finish().unwrap();
    recorded.mark(Mark::Mended);
}

/// A file that is damaged, and known to be, gets another name.
fn rename(start: &Start, store: &Store, recorded: &mut Recorded) {
    let root = store.add_root(Path::new("/arena")).unwrap();
    let bytes = recorded.blobs.moved.clone();
    recorded.write(start, MOVED, &bytes);
    store.link(root, &[recorded.new_file(store, MOVED, &bytes)]).unwrap();
    recorded.mark(Mark::LinkedMoved);
    for range in rotten_when_moved().iter() {
        recorded.disk.rot(&Path::new("/arena").join(MOVED), range.start() + 777);
    }
    store.verify_file(&FileRef { root, path: MOVED.into() }, &|_| {}).unwrap();
    recorded.mark(Mark::FoundRotten);
    recorded.mark(Mark::Moves);
    recorded.disk.create_dirs(Path::new("/arena/entered")).unwrap();
    recorded.disk.rename(&Path::new("/arena").join(MOVED), &Path::new("/arena").join(RENAMED)).unwrap();
    let fingerprint = recorded.new_file(store, RENAMED, &bytes).fingerprint;
    let moved = Move { from: MOVED.into(), to: RENAMED.into(), fingerprint, keep: false };
    assert_eq!(store.relink(root, &[moved]).unwrap(), [true]);
    recorded.mark(Mark::Moved);
}

fn replace_and_unlink(start: &Start, store: &Store, recorded: &mut Recorded) {
    let root = store.add_root(Path::new("/arena")).unwrap();
    recorded.mark(Mark::Replaces);
    recorded.write(start, "dir/staged", &recorded.blobs.new_medium);
    recorded.disk.rename(Path::new("/arena/dir/staged"), &Path::new("/arena").join(MEDIUM)).unwrap();
    recorded.sync(start);
    store.link(root, &[recorded.new_file(store, MEDIUM, &recorded.blobs.new_medium)]).unwrap();
    recorded.mark(Mark::LinkedAnew);
    recorded.mark(Mark::Unlinks);
    store.unlink(root, &[UNLINKED.as_bytes()]).unwrap();
    recorded.mark(Mark::Unlinked);
}

fn take(store: &Store, recorded: &mut Recorded) {
    let cached = recorded.blobs.cached.clone();
    recorded.mark(Mark::Takes);
    let path = store.take_cached(BlobId::of(&cached)).unwrap().expect("the blob is complete");
    recorded.mark(Mark::Taken);
    let mut bytes = vec![0; cached.len()];
    recorded.disk.open(&path, Access::Read).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == cached, "the file given away is not the blob");
}

fn evict(store: &Store, recorded: &mut Recorded) {
    let Blobs { evicted, pinned, .. } = &recorded.blobs;
    let (evicted, pinned) = (evicted.clone(), pinned.clone());
    store.set_pinned(BlobId::of(&pinned), true).unwrap();
    bring(store, &pinned);
    recorded.mark(Mark::Pinned);
    bring(store, &evicted);
    recorded.mark(Mark::Brought);
    recorded.mark(Mark::Evicts);
    // What is left of the disputed one goes first; then a megabyte or two.
    store.trim(2 << 20).unwrap();
    bring(store, &evicted);
    recorded.mark(Mark::BroughtAnew);
    recorded.mark(Mark::EvictsAll);
    store.trim(0).unwrap();
    recorded.mark(Mark::EvictedAll);
}

/// Brings what the cache lacks of a blob.
fn bring(store: &Store, bytes: &[u8]) {
    let (blob, size) = (BlobId::of(bytes), bytes.len() as u64);
    let missing = store.missing_from_cache(blob, size, &all(bytes.len())).unwrap();
    let mut partial = store.partial(blob, size).unwrap();
    feed(&mut partial, bytes, &missing);
    commit(&mut partial);
}
