//! A store in a directory of its own, with an arena beside it.

use std::{
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt},
    },
    path::PathBuf,
    sync::Arc,
};

use blobstore::{Disk, FileRef, FileRow, NewFile, RealDisk, Rebuilt, RootId, Settings, Store, StoreError, Verdict};
use redb::{Database, ReadOnlyDatabase};
use tempfile::TempDir;
use tree::{BlobId, Drift, Fingerprint, RangeSet};

use crate::common::{GROUP, all, feed, rotting::Rotting, settings};

pub(crate) struct Home {
    pub(crate) store: Store,
    pub(crate) root: RootId,
    disk: Rotting,
    dir: TempDir,
    /// How often the program was killed, and so the name of the database.
    kills: u32,
}

impl Home {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("arena")).unwrap();
        Self::open(dir, 0, Rotting::new(Arc::new(RealDisk)))
    }

    fn open(dir: TempDir, kills: u32, disk: Rotting) -> Self {
        let store = Self::try_open(&dir, kills, Arc::new(disk.clone())).unwrap();
        Self::with(dir, kills, disk, store)
    }

    /// The next start, with a cache that may take `limit` bytes.
    pub(crate) fn reopen_limited(self, disk: Arc<dyn Disk>, limit: u64) -> Self {
        self.reopen_set(disk, |settings| settings.cache_limit = limit)
    }

    /// The next start, with other settings.
    pub(crate) fn reopen_set(self, disk: Arc<dyn Disk>, set: impl FnOnce(&mut Settings)) -> Self {
        let (kills, disk) = (self.kills, self.disk.over(disk));
        let dir = self.close();
        let db = Arc::new(Database::create(database(&dir, kills)).unwrap());
        let mut settings = settings(dir.path());
        set(&mut settings);
        let store = Store::open(Arc::new(disk.clone()), db, settings).unwrap();
        Self::with(dir, kills, disk, store)
    }

    fn with(dir: TempDir, kills: u32, disk: Rotting, store: Store) -> Self {
        let root = store.add_root(&dir.path().join("arena")).unwrap();
        Self { store, root, disk, dir, kills }
    }

    pub(crate) fn try_open(dir: &TempDir, kills: u32, disk: Arc<dyn Disk>) -> Result<Store, StoreError> {
        let db = Arc::new(Database::create(database(dir, kills)).unwrap());
        Store::open(disk, db, settings(dir.path()))
    }

    /// Closes the store; only the files are left.
    pub(crate) fn close(self) -> TempDir {
        self.dir
    }

    /// What the next start of the program finds.
    pub(crate) fn reopen(self) -> Self {
        self.reopen_on(Arc::new(RealDisk))
    }

    /// The same, with something between the store and the file system.
    pub(crate) fn reopen_on(self, disk: Arc<dyn Disk>) -> Self {
        let (kills, disk) = (self.kills, self.disk.over(disk));
        Self::open(self.close(), kills, disk)
    }

    /// What the next start finds if the program is killed here: nothing of it runs any more, not even a drop.
    pub(crate) fn kill_and_reopen(self) -> Self {
        let Self { store, disk, dir, kills, .. } = self;
        // The database is locked as long as this process lives; a copy of it is not.
        fs::copy(database(&dir, kills), database(&dir, kills + 1)).unwrap();
        std::mem::forget(store);
        Self::open(dir, kills + 1, disk)
    }

    /// The next start with a database made anew, from the old one too if it `is_there`.
    pub(crate) fn rebuild(self, is_there: bool) -> (Self, Rebuilt) {
        self.rebuild_after(is_there, |_| {})
    }

    /// The same; if the old one is there, it is changed first.
    pub(crate) fn rebuild_after(self, is_there: bool, change: impl FnOnce(&Database)) -> (Self, Rebuilt) {
        let (kills, disk) = (self.kills, self.disk.clone());
        let dir = self.close();
        change(&Database::create(database(&dir, kills)).unwrap());
        let old = is_there.then(|| ReadOnlyDatabase::open(database(&dir, kills)).unwrap());
        let db = Arc::new(Database::create(database(&dir, kills + 1)).unwrap());
        let rebuilt = Store::rebuild(Arc::new(RealDisk), db, settings(dir.path()), old.as_ref()).unwrap();
        (Self::open(dir, kills + 1, disk), rebuilt)
    }

    pub(crate) fn file(&self, name: &str) -> FileRef {
        FileRef { root: self.root, path: name.into() }
    }

    /// Where the file `name` of the arena is.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("arena").join(name)
    }

    /// The store's own file of a blob, if it were there.
    pub(crate) fn own_file(&self, dir: &str, blob: BlobId, extension: &str) -> PathBuf {
        let hex = blob.to_string();
        self.dir.path().join(dir).join(&hex[..2]).join(format!("{hex}.{extension}"))
    }

    /// All files in the directory `dir` of the store, at any depth.
    pub(crate) fn own_files(&self, dir: &str) -> Vec<PathBuf> {
        RealDisk.files_below(&self.dir.path().join(dir)).unwrap()
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Hashes and links files of the arena.
    pub(crate) fn link(&self, names: &[&str]) {
        let new = names.iter().map(|name| {
            let path = self.path(name);
            let bytes = fs::read(&path).unwrap();
            let fingerprint = self.fingerprint(name);
            let below = path.strip_prefix(self.path("")).unwrap();
            NewFile {
                path: below.as_os_str().as_bytes().into(),
                fingerprint,
                hashed_at: 1,
                racy: false,
                hashed: self.store.hash(&bytes[..], bytes.len() as u64).unwrap(),
            }
        });
        self.store.link(self.root, &new.collect::<Vec<_>>()).unwrap();
    }

    /// Writes and links a file.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        self.write(name, bytes);
        self.link(&[name]);
    }

    /// Puts `ranges` of the blob that is `bytes` into the cache.
    pub(crate) fn cache(&self, bytes: &[u8], ranges: &RangeSet) {
        let mut partial = self.store.partial(BlobId::of(bytes), bytes.len() as u64).unwrap();
        feed(&mut partial, bytes, ranges);
        blobstore::Sink::commit(&mut partial).unwrap();
    }

    /// Puts a whole blob into the cache.
    pub(crate) fn cache_all(&self, bytes: &[u8]) {
        self.cache(bytes, &all(bytes.len()));
    }

    /// Rot: one bit in the first byte of each of these groups of an arena's file flips.
    pub(crate) fn rot(&self, name: &str, groups: &RangeSet) {
        let starts = groups.iter().flat_map(|range| (range.start()..range.end()).step_by(GROUP as usize));
        self.rot_with(name, |file| starts.for_each(|start| flip(file, start)));
    }

    /// Rot: `change` changes bytes of an arena's file, and nothing else of it moves.
    pub(crate) fn rot_with(&self, name: &str, change: impl FnOnce(&File)) {
        self.disk.rot(&self.path(name), change);
    }

    /// What the file system reports of an arena's file.
    pub(crate) fn fingerprint(&self, name: &str) -> Fingerprint {
        self.disk.fingerprint(&self.path(name))
    }

    pub(crate) fn row(&self, name: &str) -> FileRow {
        self.store.file(&self.file(name)).unwrap().expect("the file is linked")
    }

    pub(crate) fn damaged(&self, name: &str) -> RangeSet {
        self.row(name).damaged
    }

    pub(crate) fn verify(&self, name: &str) -> Verdict {
        self.store.verify_file(&self.file(name), &|_| {}).unwrap().expect("the file is linked")
    }

    /// What happened to the file since the row was written.
    pub(crate) fn drift(&self, name: &str) -> Drift {
        self.row(name).fingerprint.drift(&self.fingerprint(name))
    }

    /// The file's mtime in seconds and nanoseconds.
    pub(crate) fn mtime(&self, name: &str) -> (i64, i64) {
        let meta = fs::metadata(self.path(name)).unwrap();
        (meta.mtime(), meta.mtime_nsec())
    }
}

fn database(dir: &TempDir, kills: u32) -> PathBuf {
    dir.path().join(format!("db{kills}"))
}

/// Waits until the file system's clock gives another time than the files have: it ticks some hundred times a second.
pub(crate) fn let_the_clock_tick() {
    std::thread::sleep(std::time::Duration::from_millis(20));
}

/// Flips a bit of the byte at `offset`.
pub(crate) fn flip(file: &File, offset: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
}

/// Flips a bit in a file of the store's own.
pub(crate) fn flip_own(path: PathBuf, offset: u64) {
    flip(&File::options().read(true).write(true).open(path).unwrap(), offset);
}

/// `verdict` says that exactly `data` and `outboard` are damaged; that the file is sound, if both are empty.
pub(crate) fn assert_damaged(verdict: &Verdict, data: &RangeSet, outboard: &RangeSet) {
    let found = match verdict {
        Verdict::Sound => (RangeSet::new(), RangeSet::new()),
        Verdict::Damaged { data, outboard, unreadable: None } if !(data.is_empty() && outboard.is_empty()) => {
            (data.clone(), outboard.clone())
        }
        other => panic!("{other:?}, where {data:?} of the data and {outboard:?} of the outboard are damaged"),
    };
    assert_eq!(found, (data.clone(), outboard.clone()));
}
