//! A store with blobs of many sizes in every kind of place, kept in memory: what is injured is made whole again, and
//! the same store serves for the next injection.

use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use blobstore::{FileRef, NewFile, RealDisk, RootId, Settings, Sink, Store, Verdict};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, backends::InMemoryBackend};
use tempfile::TempDir;
use tree::{BlobId, ByteRange, Fingerprint, Grain, Hashed, Query, RangeSet, Verified, hash_into};

use crate::common::{
    DIR_NUMBERS, DIRS, FILES, GROUP, HOLDERS, LARGE, all, check_read_of, group_count, groups, hashed, pieces_of,
    random, range, rotting::Rotting, settings, split,
};

pub(crate) const META: TableDefinition<&str, u32> = TableDefinition::new("store.meta");
pub(crate) const OUTBOARDS: BlobTable = TableDefinition::new("store.outboards");
pub(crate) const CACHED: BlobTable = TableDefinition::new("store.cached");
pub(crate) const INLINE: BlobTable = TableDefinition::new("store.inline");
pub(crate) const MENDING: TableDefinition<(u32, &[u8]), &[u8]> = TableDefinition::new("store.mending");
pub(crate) const USED: TableDefinition<&[u8; 32], u64> = TableDefinition::new("store.used");
pub(crate) const VANISHED: TableDefinition<&[u8], &[u8]> = TableDefinition::new("store.vanished");
pub(crate) const VANISHED_ORDER: TableDefinition<u64, &[u8]> = TableDefinition::new("store.vanished_order");
pub(crate) const REPAIRS: TableDefinition<u64, &[u8]> = TableDefinition::new("store.repairs");
pub(crate) type BlobTable = TableDefinition<'static, &'static [u8; 32], &'static [u8]>;

/// The number of the only root.
pub(crate) const ROOT: u32 = 0;

pub(crate) struct Lab {
    pub(crate) store: Store,
    pub(crate) db: Arc<Database>,
    pub(crate) grain: Grain,
    pub(crate) subjects: Vec<Subject>,
    root: RootId,
    disk: Rotting,
    dir: TempDir,
}

/// A blob, and where it is.
pub(crate) struct Subject {
    pub(crate) bytes: Vec<u8>,
    /// With the outboard down to chunk groups.
    pub(crate) hashed: Hashed,
    /// The outboard at the store's grain.
    pub(crate) kept: Vec<u8>,
    /// The files that have it in place.
    pub(crate) files: Vec<String>,
    /// What the cache has of it.
    pub(crate) proven: RangeSet,
}

impl Subject {
    fn new(bytes: Vec<u8>, grain: Grain, places: Places, name: usize, rng: &mut fastrand::Rng) -> Self {
        let size = bytes.len();
        let kept = Mutex::new(vec![0; tree::Geometry::new(size as u64).outboard_bytes_at(grain) as usize]);
        hash_into(&bytes[..], size as u64, grain, &kept).unwrap();
        let (files, cached) = match places {
            Places::InPlace => (1, false),
            Places::Twice => (2, false),
            Places::Both => (1, true),
            Places::Cached | Places::CachedInPart => (0, true),
        };
        let mut proven = if cached { all(size) } else { RangeSet::new() };
        if let Places::CachedInPart = places {
            let part = (0..group_count(size)).filter(|_| rng.bool()).chain([group_count(size) / 2]);
            proven = groups(size, part.collect::<Vec<_>>());
        }
        // Some at the top, the others a few in each directory.
        let dir = if name.is_multiple_of(4) { String::new() } else { format!("{}/{}/", name % 3, name / 8) };
        let files = (0..files).map(|copy| format!("{dir}{name}-{copy}")).collect();
        Self { hashed: hashed(&bytes), kept: kept.into_inner().unwrap(), bytes, files, proven }
    }

    pub(crate) fn id(&self) -> BlobId {
        self.hashed.id
    }

    pub(crate) fn size(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn all(&self) -> RangeSet {
        all(self.size())
    }

    /// What a peer sends who has it.
    pub(crate) fn feed(&self, sink: &mut impl Sink, ranges: &RangeSet) {
        sink.write(&pieces_of(&self.hashed, &self.bytes, ranges)).unwrap();
    }

    pub(crate) fn is_inline(&self) -> bool {
        self.size() as u64 <= GROUP
    }
}

#[derive(Clone, Copy)]
enum Places {
    InPlace,
    Twice,
    Both,
    Cached,
    CachedInPart,
}

impl Lab {
    pub(crate) fn new(grain: Grain, seed: u64) -> Self {
        // Nothing here is about power cuts, and memory syncs fast.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        fs::create_dir(dir.path().join("arena")).unwrap();
        let db = Arc::new(Database::builder().create_with_backend(InMemoryBackend::new()).unwrap());
        let disk = Rotting::new(Arc::new(RealDisk));
        let store = open(&disk, &db, dir.path(), grain);
        let root = store.add_root(&dir.path().join("arena")).unwrap();
        let mut lab = Self { store, db, grain, subjects: Vec::new(), root, disk, dir };
        let mut rng = fastrand::Rng::with_seed(seed);
        let places = [Places::InPlace, Places::Cached, Places::Twice, Places::Both, Places::CachedInPart];
        for (number, size) in SIZES.into_iter().enumerate() {
            for places in if size > MANY_BYTES { &places[..2] } else { &places[..] } {
                lab.add(random(rng.u64(..), size), *places, &mut rng);
            }
            // In these, groups equal each other, and zeros are no damage.
            if size <= MANY_BYTES {
                lab.add(vec![number as u8; size], places[number % places.len()], &mut rng);
                lab.add(vec![0; 3 * size / 2 + 1], places[(number + 2) % places.len()], &mut rng);
            }
        }
        lab
    }

    /// The next start of the program, with the same database and files.
    pub(crate) fn reopen(&mut self) {
        self.store = open(&self.disk, &self.db, self.dir.path(), self.grain);
    }

    fn add(&mut self, bytes: Vec<u8>, places: Places, rng: &mut fastrand::Rng) {
        let subject = Subject::new(bytes, self.grain, places, self.subjects.len(), rng);
        for name in &subject.files {
            fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
            fs::write(self.path(name), &subject.bytes).unwrap();
            self.link(name);
        }
        self.fetch(&subject);
        self.subjects.push(subject);
    }

    /// Hashes and links a file.
    pub(crate) fn link(&self, name: &str) {
        let bytes = fs::read(self.path(name)).unwrap();
        let fingerprint = self.fingerprint(name);
        let hashed = self.store.hash(&bytes[..], bytes.len() as u64).unwrap();
        self.store
            .link(self.root, &[NewFile { path: name.into(), fingerprint, hashed_at: 1, racy: false, hashed }])
            .unwrap();
    }

    /// Brings into the cache from a peer what is missing there of what it is to have.
    pub(crate) fn fetch(&self, subject: &Subject) {
        if subject.proven.is_empty() {
            return;
        }
        let mut partial = self.store.partial(subject.id(), subject.size() as u64).unwrap();
        let here = self.store.cached_ranges(subject.id()).unwrap();
        subject.feed(&mut partial, &subject.proven.difference(&here));
        partial.commit().unwrap();
    }

    pub(crate) fn file(&self, name: &str) -> FileRef {
        FileRef { root: self.root, path: name.into() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("arena").join(name)
    }

    pub(crate) fn fingerprint(&self, name: &str) -> Fingerprint {
        self.disk.fingerprint(&self.path(name))
    }

    /// Has the bytes of a file rot into `bytes`, of which there are as many.
    pub(crate) fn rot(&self, name: &str, bytes: &[u8]) {
        self.disk.rot(&self.path(name), |file| overwrite(file, bytes));
    }

    /// A file of the store's own.
    pub(crate) fn own_file(&self, dir: &str, blob: BlobId, extension: &str) -> PathBuf {
        let hex = blob.to_string();
        self.dir.path().join(dir).join(&hex[..2]).join(format!("{hex}.{extension}"))
    }

    pub(crate) fn file_row(&self, name: &str) -> Option<Vec<u8>> {
        let txn = self.db.begin_read().unwrap();
        let row = txn.open_table(FILES).unwrap().get((ROOT, name.as_bytes())).unwrap();
        row.map(|row| row.value().to_owned())
    }

    pub(crate) fn set_file_row(&self, name: &str, row: Option<&[u8]>) {
        let txn = self.db.begin_write().unwrap();
        {
            let mut table = txn.open_table(FILES).unwrap();
            match row {
                Some(row) => table.insert((ROOT, name.as_bytes()), row).unwrap(),
                None => table.remove((ROOT, name.as_bytes())).unwrap(),
            };
        }
        txn.commit().unwrap();
    }

    pub(crate) fn set_holder(&self, blob: BlobId, name: &str, is_holder: bool) {
        let txn = self.db.begin_write().unwrap();
        {
            let (dir, name) = split(name.as_bytes());
            let numbers = txn.open_table(DIR_NUMBERS).unwrap();
            let dir = numbers.get((ROOT, dir)).unwrap().expect("it has a number").value();
            let (mut table, blob) = (txn.open_table(HOLDERS).unwrap(), blob.as_bytes()[..6].try_into().unwrap());
            if is_holder {
                table.insert((&blob, dir, name), ()).unwrap();
            } else {
                // Under whatever number its directory had before that rotted.
                table.retain(|(of, _, named), ()| (of, named) != (&blob, name)).unwrap();
            }
        }
        txn.commit().unwrap();
    }

    /// The directory of a file by its number, and its number by the directory.
    pub(crate) fn dir_rows(&self, name: &str) -> (Option<Vec<u8>>, Option<u32>) {
        let txn = self.db.begin_read().unwrap();
        let number = txn.open_table(DIR_NUMBERS).unwrap().get((ROOT, split(name.as_bytes()).0)).unwrap();
        let number = number.map(|number| number.value());
        let row = number.and_then(|number| txn.open_table(DIRS).unwrap().get(number).unwrap());
        (row.map(|row| row.value().to_owned()), number)
    }

    /// Sets the row of the directory that has `number`, and the number of a file's directory.
    pub(crate) fn set_dir_rows(&self, number: u32, row: Option<&[u8]>, name: &str, is_now: Option<u32>) {
        let txn = self.db.begin_write().unwrap();
        {
            let (mut dirs, mut numbers) = (txn.open_table(DIRS).unwrap(), txn.open_table(DIR_NUMBERS).unwrap());
            match row {
                Some(row) => dirs.insert(number, row).unwrap(),
                None => dirs.remove(number).unwrap(),
            };
            let dir = (ROOT, split(name.as_bytes()).0);
            match is_now {
                Some(number) => numbers.insert(dir, number).unwrap(),
                None => numbers.remove(dir).unwrap(),
            };
        }
        txn.commit().unwrap();
    }

    /// What the store says which number a directory got last.
    pub(crate) fn set_last_dir(&self, number: u32) {
        let txn = self.db.begin_write().unwrap();
        txn.open_table(META).unwrap().insert("last_dir", number).unwrap();
        txn.commit().unwrap();
    }

    pub(crate) fn row(&self, table: BlobTable, blob: BlobId) -> Option<Vec<u8>> {
        let txn = self.db.begin_read().unwrap();
        let row = txn.open_table(table).unwrap().get(blob.as_bytes()).unwrap();
        row.map(|row| row.value().to_owned())
    }

    pub(crate) fn set_row(&self, table: BlobTable, blob: BlobId, row: Option<&[u8]>) {
        let txn = self.db.begin_write().unwrap();
        {
            let mut table = txn.open_table(table).unwrap();
            match row {
                Some(row) => table.insert(blob.as_bytes(), row).unwrap(),
                None => table.remove(blob.as_bytes()).unwrap(),
            };
        }
        txn.commit().unwrap();
    }

    pub(crate) fn verify(&self, name: &str) -> Option<Verdict> {
        self.store.verify_file(&self.file(name), &|_| {}).unwrap()
    }

    pub(crate) fn verify_cached(&self, subject: &Subject) -> Option<Verdict> {
        self.store.verify_cached(subject.id(), &|_| {}).unwrap()
    }

    /// Nothing is wrong with a blob anywhere, and all that should be here is.
    pub(crate) fn check_sound(&self, subject: &Subject) {
        for name in &subject.files {
            let (verdict, row) = (self.verify(name), self.store.file(&self.file(name)).unwrap());
            assert!(matches!(verdict, Some(Verdict::Sound)), "{name}, {} bytes: {verdict:?}", subject.size());
            assert!(row.is_some_and(|row| row.damaged.is_empty()));
        }
        if !subject.proven.is_empty() {
            let verdict = self.verify_cached(subject);
            assert!(matches!(verdict, Some(Verdict::Sound)), "cached, {} bytes: {verdict:?}", subject.size());
            assert_eq!(self.store.cached_ranges(subject.id()).unwrap(), subject.proven);
        }
    }

    /// Whatever any place has to say of a blob, to a reader or to a peer, is right or an error. Returns what is said.
    pub(crate) fn check_sources(&self, subject: &Subject) -> RangeSet {
        let mut said = RangeSet::new();
        for source in self.store.sources(subject.id()).unwrap() {
            for piece in source.prover(&Query::all()).flatten() {
                let Verified::Data(piece) = piece else { continue };
                let at = piece.range();
                let right = subject.bytes.get(at.start() as usize..at.end() as usize);
                assert!(right == Some(&piece.bytes()[..]), "wrong bytes at {at}");
                said.insert(at);
            }
        }
        said
    }

    /// Reads some of a blob, of which `missing` is not to be had, and nothing else.
    pub(crate) fn check_read(&self, subject: &Subject, asked: ByteRange, missing: &RangeSet) {
        let rounded = tree::Geometry::new(subject.size() as u64).round_out(asked);
        let missing = missing.intersection(&rounded.into());
        check_read_of(&self.store, subject.id(), &subject.bytes, asked, &missing);
    }

    /// All of a blob, or some of it.
    pub(crate) fn some_range(&self, subject: &Subject, rng: &mut fastrand::Rng) -> ByteRange {
        let size = subject.size() as u64;
        let start = if rng.bool() { 0 } else { rng.u64(..size) };
        range(start, if rng.bool() { size } else { rng.u64(start..=size) })
    }
}

/// Makes the file's bytes `bytes`, and does not write if they are.
pub(crate) fn overwrite(mut file: &File, bytes: &[u8]) {
    let mut old = Vec::new();
    file.read_to_end(&mut old).unwrap();
    if old != bytes {
        file.rewind().unwrap();
        file.write_all(bytes).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
    }
}

/// The same for the file at `path`, which is made if it is not there.
pub(crate) fn overwrite_at(path: &Path, bytes: &[u8]) {
    overwrite(&File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap(), bytes);
}

fn open(disk: &Rotting, db: &Arc<Database>, dir: &Path, grain: Grain) -> Store {
    Store::open(Arc::new(disk.clone()), db.clone(), Settings { grain, ..settings(dir) }).unwrap()
}

/// At the edges of chunks, groups and the units of every grain.
const SIZES: [usize; 22] = [
    1,
    1000,
    1025,
    5000,
    16_383,
    16_384,
    16_385,
    32_768,
    40_000,
    65_536,
    65_537,
    100_000,
    131_073,
    196_608,
    262_144,
    262_145,
    300_000,
    700_000,
    1 << 20,
    (1 << 20) + 1,
    (3 << 20) - 7,
    LARGE,
];

/// Blobs above this are few.
pub(crate) const MANY_BYTES: usize = 300_000;
