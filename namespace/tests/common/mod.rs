//! What the test files share: names, contents, seeds, and a database that outlives its process.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::{
    io,
    sync::{Arc, Mutex},
};

use namespace::{
    ArenaName, Batch, Change, Content, Mark, Namespace, Origin, Part, PeerId, RelPath, Statement, Version,
};
use proptest::{prelude::*, sample};
use redb::Database;
use tree::{BlobId, UnixTime};

/// `cases` random cases. A failure prints the smallest input found; its fix keeps that as a named test.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Runs `test` with `count` seeds. `SEEDS` says otherwise how many, `SEED` which single one; a failure prints its own.
pub(crate) fn for_seeds(count: u64, test: impl Fn(fastrand::Rng)) {
    struct Seed(u64);
    impl Drop for Seed {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failed with SEED={}", self.0);
            }
        }
    }
    let var = |name| std::env::var(name).ok().map(|number| number.parse::<u64>().expect("a number"));
    let seeds = 0..var("SEEDS").unwrap_or(count);
    for seed in var("SEED").map_or(seeds, |seed| seed..seed + 1) {
        let _printed = Seed(seed);
        test(fastrand::Rng::with_seed(seed));
    }
}

pub(crate) fn arena(name: &str) -> ArenaName {
    name.parse().expect("an arena's name")
}

pub(crate) fn path(bytes: impl AsRef<[u8]>) -> RelPath {
    bytes.as_ref().to_owned().try_into().expect("a path")
}

/// The peer with this number. The order of peers is not that of their numbers.
pub(crate) fn peer(number: u8) -> PeerId {
    PeerId::from_bytes([number.wrapping_mul(151); 32])
}

/// A file that holds `data`, with a mode that depends on them alone.
pub(crate) fn file(data: &str) -> Content {
    let mode = if data.len().is_multiple_of(2) { 0o644 } else { 0o755 };
    Content::File { blob: BlobId::of(data.as_bytes()), size: data.len() as u64, mode }
}

pub(crate) fn symlink(target: &str) -> Content {
    Content::Symlink { target: target.into() }
}

pub(crate) fn seconds(seconds: i64) -> UnixTime {
    UnixTime { seconds, nanos: 0 }
}

/// That `content` is now at `at` of this machine, with the mtime 0.
pub(crate) fn change(at: &str, content: Content) -> Change {
    Change { path: path(at), content, mtime: seconds(0) }
}

/// What a peer says of a path in the arena "photos", with the mtime 0.
pub(crate) fn says(seq: u64, at: &str, content: Content) -> Statement {
    let version = Version { content, mtime: seconds(0), seq, previous: Vec::new() };
    Statement { arena: arena("photos"), path: path(at), version, at: 0 }
}

/// The whole catalog of a peer in one batch.
pub(crate) fn listing(origin: PeerId, epoch: u64, mut statements: Vec<Statement>) -> Batch {
    let seq = statements.iter().map(|statement| statement.version.seq).max().unwrap_or(0);
    statements.sort_by_key(|statement| (statement.arena.clone(), statement.path.clone()));
    let part = Part::Listing { after: None, end: None };
    Batch { origin, mark: Mark { epoch, seq, session: 1 }, part, statements }
}

/// What the peer said behind the seq `after`, up to the seq `upto`, all in one session.
pub(crate) fn changes(origin: PeerId, epoch: u64, after: u64, upto: u64, statements: Vec<Statement>) -> Batch {
    let mark = |seq| Mark { epoch, seq, session: 1 };
    let part = Part::Changes { after: mark(after), sessions: Vec::new() };
    Batch { origin, mark: mark(upto), part, statements }
}

/// One to four names, many of them alike.
pub(crate) fn a_path() -> impl Strategy<Value = RelPath> {
    let like_a: [&[u8]; 14] =
        [b"a", b"a", b"a", b"a-", b"a-b", b"a.b", b"a:b", b"a0", b"a\x01", b"a\xff", b"aa", b"-", b".x", b"\xff"];
    let byte = (1..=255u8).prop_filter("it parts names", |b| *b != b'/');
    let any_name = prop::collection::vec(byte, 1..4).prop_filter("no name", |name| !matches!(&name[..], b"." | b".."));
    let name = prop_oneof![5 => sample::select(like_a.to_vec()).prop_map(<[u8]>::to_vec), 1 => any_name];
    prop::collection::vec(name, 1..5).prop_map(|names| path(names.join(&b'/')))
}

/// A database's file, in memory. It outlives the database, and its clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk(Arc<Mutex<Vec<u8>>>);

impl Disk {
    /// Another disk with what is on this one: what a power cut leaves, or a backup.
    pub(crate) fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().unwrap().clone())))
    }

    /// The namespace of the peer 0 on this disk, in its first session; no other may be open on it.
    pub(crate) fn open(&self) -> Namespace {
        self.open_as(0, 1)
    }

    /// The namespace of the peer `me` on this disk. `random` tells its sessions apart.
    pub(crate) fn open_as(&self, me: u8, random: u64) -> Namespace {
        let origin = Origin { me: peer(me), now: 1000, random, history_limit: 100_000 };
        Namespace::open(self.database(), origin).expect("the namespace opens")
    }

    /// The database on this disk; no other may be open on it.
    pub(crate) fn database(&self) -> Arc<Database> {
        let mut builder = Database::builder();
        // Large caches cost time to make.
        builder.set_cache_size(1 << 20);
        Arc::new(builder.create_with_backend(self.clone()).expect("the database opens"))
    }
}

impl redb::StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        out.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}
