use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Bound,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, WriteTransaction};
use tracing::warn;
use tree::{BlobId, Fingerprint, Geometry, Grain, RangeSet};

use crate::{
    Disk, FileRef, Presence, RootId, StoreError,
    cache::Ledger,
    dirs::{self, Dirs},
    outboard::STAGED_DIR,
    pages::PAGE_ROWS,
    rows::{
        CACHED, DIR_NUMBERS, DIRS, FILES, FORMAT, FileKey, FileRow, HOLDER_BYTES, HOLDERS, HolderKey, INLINE, MENDING,
        META, OUTBOARDS, PINS, REPAIRS, ROOTS, SET, USED, VANISHED, VANISHED_ORDER, VERIFIED, decode_or_none, encode,
        holder_prefix,
    },
};

/// All bytes on this machine that the daemon knows.
///
/// Cheap to clone; the clones are one store. Safe to use from several threads.
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) disk: Arc<dyn Disk>,
    db: Arc<Database>,
    pub(crate) settings: Settings,
    /// How many outboards were staged so far.
    pub(crate) staged: AtomicU64,
    /// The last number under which bytes that a repair replaces were saved.
    pub(crate) saved: AtomicU64,
    roots: RwLock<BTreeMap<u32, PathBuf>>,
    /// The roots whose files are not to be touched now.
    passed_over: RwLock<BTreeSet<RootId>>,
    /// Held while outboard files come and go with their rows.
    pub(crate) linking: Mutex<()>,
    /// What the cache has, and what of it is in use.
    pub(crate) ledger: Mutex<Ledger>,
    /// Held shared by those who write to files of the cache, and alone by those who make, punch or delete them.
    pub(crate) cache_files: RwLock<()>,
    /// For each blob that is coming into the cache: set once its files were taken from there.
    pub(crate) taken: Mutex<HashMap<BlobId, Weak<AtomicBool>>>,
    /// What the cache may take now, beside what is pinned.
    pub(crate) cache_limit: AtomicU64,
    /// Who hears of losses.
    pub(crate) on_loss: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// The files that are being mended now, each with its device and inode.
    pub(crate) mending: Mutex<HashMap<FileRef, (u64, u64)>>,
    /// Held while bytes are saved before a repair replaces them, so that all repairs together keep to the limit.
    pub(crate) saving: Mutex<()>,
}

/// Where a store keeps its own files, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The directory of the outboards of blobs in place.
    pub outboards: PathBuf,
    /// The directory of the cache.
    pub cache: PathBuf,
    /// How far down outboards are kept that are made from now on. Those that are there stay as they are.
    pub grain: Grain,
    /// How many bytes the cache may take on the disk.
    pub cache_limit: u64,
    /// How many bytes the cache leaves free on its file system.
    pub cache_keep_free: u64,
    /// The directory of the bytes that repairs replaced.
    pub saved: PathBuf,
    /// How long these are kept.
    pub saved_keep: Duration,
    /// How many bytes of them are kept; the oldest go first.
    pub saved_bytes_max: u64,
    /// How many files are remembered that vanished; those that vanished longest ago are forgotten first.
    pub vanished_max: u64,
}

impl Store {
    /// Opens the store whose rows are in `db`, and makes it if it is not there. Finishes or undoes what a crash left
    /// half done.
    pub fn open(disk: Arc<dyn Disk>, db: Arc<Database>, settings: Settings) -> Result<Self, StoreError> {
        let store = Self::new(disk, db, settings)?;
        let roots = store.make_tables()?;
        *store.inner.roots.write().unwrap_or_else(PoisonError::into_inner) = roots;
        store.remove_orphan_outboards()?;
        store.remove_orphans_of_cache()?;
        store.remove_orphans_of_repairs()?;
        store.load_cache_limit()?;
        store.take_stock()?;
        store.finish_mending()?;
        Ok(store)
    }

    /// A store that knows nothing yet, with its directories.
    pub(crate) fn new(disk: Arc<dyn Disk>, db: Arc<Database>, settings: Settings) -> Result<Self, StoreError> {
        for dir in [&settings.outboards.join(STAGED_DIR), &settings.cache, &settings.saved] {
            disk.create_dirs(dir).map_err(StoreError::file("create", dir))?;
            // The directories may be new, and so may those that they are in.
            for above in dir.ancestors().skip(1).take(2).filter(|above| !above.as_os_str().is_empty()) {
                disk.sync_dir(above).map_err(StoreError::file("sync", above))?;
            }
        }
        let inner = Inner {
            disk,
            db,
            cache_limit: AtomicU64::new(settings.cache_limit),
            on_loss: OnceLock::new(),
            settings,
            staged: AtomicU64::new(0),
            saved: AtomicU64::new(0),
            roots: RwLock::default(),
            passed_over: RwLock::default(),
            linking: Mutex::default(),
            ledger: Mutex::default(),
            cache_files: RwLock::default(),
            taken: Mutex::default(),
            mending: Mutex::default(),
            saving: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes the tables that are not there; returns the roots.
    pub(crate) fn make_tables(&self) -> Result<BTreeMap<u32, PathBuf>, StoreError> {
        let roots = self.write("open the store", |txn| {
            let mut meta = txn.open_table(META)?;
            let format = meta.get("format")?.map_or(FORMAT, |format| format.value());
            if format != FORMAT {
                return Ok(Err(format));
            }
            meta.insert("format", FORMAT)?;
            for table in [FILES, MENDING] {
                txn.open_table(table)?;
            }
            for table in [OUTBOARDS, CACHED, INLINE, VERIFIED] {
                txn.open_table(table)?;
            }
            txn.open_table(USED)?;
            txn.open_table(VANISHED)?;
            txn.open_table(VANISHED_ORDER)?;
            txn.open_table(REPAIRS)?;
            txn.open_table(PINS)?;
            txn.open_table(SET)?;
            txn.open_table(HOLDERS)?;
            txn.open_table(DIRS)?;
            txn.open_table(DIR_NUMBERS)?;
            let mut roots = BTreeMap::new();
            for row in txn.open_table(ROOTS)?.iter()? {
                let (root, dir) = row?;
                roots.insert(root.value(), PathBuf::from(std::ffi::OsStr::from_bytes(dir.value())));
            }
            Ok(Ok(roots))
        })?;
        roots.map_err(|found| StoreError::Format { found, known: FORMAT })
    }

    /// The root that stands for the directory `dir`, an absolute path; a new one if there is none.
    pub fn add_root(&self, dir: &Path) -> Result<RootId, StoreError> {
        let mut roots = self.inner.roots.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&root, _)) = roots.iter().find(|(_, known)| *known == dir) {
            return Ok(RootId(root));
        }
        let root = roots.last_key_value().map_or(0, |(last, _)| last + 1);
        self.write("add a root", |txn| {
            txn.open_table(ROOTS)?.insert(root, dir.as_os_str().as_bytes())?;
            Ok(())
        })?;
        roots.insert(root, dir.to_owned());
        Ok(RootId(root))
    }

    /// Forgets everything below `root`. The files stay as they are.
    pub fn remove_root(&self, root: RootId) -> Result<(), StoreError> {
        loop {
            // By their keys alone, for rows that do not decode go too.
            let page = self.page(root, b"", None, PAGE_ROWS, |_| Some(()))?;
            self.unlink(root, &page.iter().map(|(path, ())| &path[..]).collect::<Vec<_>>())?;
            if page.len() < PAGE_ROWS {
                break;
            }
        }
        let mut roots = self.inner.roots.write().unwrap_or_else(PoisonError::into_inner);
        self.write("remove a root", |txn| {
            txn.open_table(ROOTS)?.remove(root.0)?;
            Ok(())
        })?;
        roots.remove(&root.0);
        Ok(())
    }

    /// All roots and their directories.
    pub fn roots(&self) -> Vec<(RootId, PathBuf)> {
        let roots = self.inner.roots.read().unwrap_or_else(PoisonError::into_inner);
        roots.iter().map(|(&root, dir)| (RootId(root), dir.clone())).collect()
    }

    /// The directory of `root`.
    pub(crate) fn root_dir(&self, root: RootId) -> PathBuf {
        let roots = self.inner.roots.read().unwrap_or_else(PoisonError::into_inner);
        roots.get(&root.0).cloned().unwrap_or_default()
    }

    /// The absolute path of a file in place.
    pub(crate) fn absolute(&self, file: &FileRef) -> PathBuf {
        self.root_dir(file.root).join(file.relative())
    }

    /// What is known of the file in place `file`. A row that does not decode counts as none, here and everywhere.
    pub fn file(&self, file: &FileRef) -> Result<Option<FileRow>, StoreError> {
        self.read_rows("look up a file", |txn| {
            let row = txn.open_table(FILES)?.get((file.root.0, &file.path[..]))?;
            Ok(row.and_then(|row| decode_or_none(row.value())))
        })
    }

    /// Up to `max` files that have `blob` in place, by root and path.
    pub fn holders(&self, blob: BlobId, max: usize) -> Result<Vec<FileRef>, StoreError> {
        self.read_rows("look up a blob", |txn| {
            holders(&txn.open_table(HOLDERS)?, &txn.open_table(DIRS)?, &txn.open_table(FILES)?, blob, max)
        })
    }

    /// Whether the rows say from both sides that `file` has `blob`.
    pub(crate) fn is_holder(&self, file: &FileRef, blob: BlobId) -> Result<bool, StoreError> {
        self.read_rows("look up a holder", |txn| {
            let (dir, name) = dirs::split(&file.path);
            let dir = dirs::number(&txn.open_table(DIRS)?, &txn.open_table(DIR_NUMBERS)?, file.root, dir)?;
            let Some(dir) = dir else { return Ok(false) };
            Ok(txn.open_table(HOLDERS)?.get((holder_prefix(&blob), dir, name))?.is_some())
        })
    }

    /// Says anew that `file` has `blob`, where the row for that, or one of its directory, was lost.
    pub(crate) fn restore_holder(&self, file: &FileRef, blob: BlobId) -> Result<(), StoreError> {
        warn!(path = %self.absolute(file).display(), %blob, "its row among the holders was lost, and is made anew");
        self.write("restore a holder", |txn| {
            let row = txn.open_table(FILES)?.get((file.root.0, &file.path[..]))?.map(|row| decode_or_none(row.value()));
            if row.flatten().is_none_or(|row: FileRow| row.blob != blob) {
                // It was unlinked meanwhile, and its directory must not keep a number for it.
                return Ok(());
            }
            let (dir, name) = dirs::split(&file.path);
            let dir = Dirs::open(txn, file.root)?.number_or_new(dir)?;
            txn.open_table(HOLDERS)?.insert((holder_prefix(&blob), dir, name), ())?;
            Ok(())
        })
    }

    /// Sets whether the files below `root` are passed over when bytes are looked for: their file system does not respond.
    pub fn pass_over(&self, root: RootId, is_stalled: bool) {
        let mut roots = self.inner.passed_over.write().unwrap_or_else(PoisonError::into_inner);
        match is_stalled {
            true => _ = roots.insert(root),
            false => _ = roots.remove(&root),
        }
    }

    /// Whether they are.
    pub(crate) fn is_passed_over(&self, root: RootId) -> bool {
        self.inner.passed_over.read().unwrap_or_else(PoisonError::into_inner).contains(&root)
    }

    /// How much of `blob` is here and, so far as is known, sound.
    pub fn presence(&self, blob: BlobId) -> Result<Presence, StoreError> {
        let in_place = self.holders(blob, MAX_PLACES)?;
        if in_place.is_empty() && blob == BlobId::EMPTY {
            return Ok(Presence::Cached);
        }
        let mut here = RangeSet::new();
        for file in &in_place {
            let Some(row) = self.file(file)?.filter(|row| row.blob == blob) else { continue };
            if row.damaged.is_empty() {
                return Ok(Presence::InPlace);
            }
            here = here.union(&RangeSet::from(Geometry::new(row.fingerprint.size).all()).difference(&row.damaged));
        }
        let Some(cached) = self.cached_row(blob)? else {
            return Ok(if here.is_empty() { Presence::None } else { Presence::Partial(here) });
        };
        if cached.proven.contains(Geometry::new(cached.size).all()) {
            return Ok(Presence::Cached);
        }
        here.extend(cached.proven.iter());
        Ok(if here.is_empty() { Presence::None } else { Presence::Partial(here) })
    }

    /// Sets what `change` makes of a file's row, if the file is still linked as `blob`. Durable on return.
    pub(crate) fn update_file(
        &self,
        file: &FileRef,
        blob: BlobId,
        change: impl Fn(&mut FileRow),
    ) -> Result<(), StoreError> {
        self.write("update a file", |txn| {
            let mut files = txn.open_table(FILES)?;
            let key = (file.root.0, &file.path[..]);
            let row = files.get(key)?.and_then(|row| decode_or_none::<FileRow>(row.value()));
            if let Some(mut row) = row.filter(|row| row.blob == blob) {
                change(&mut row);
                files.insert(key, &encode(&row)?[..])?;
            }
            Ok(())
        })
    }

    /// Takes note that a file whose bytes are the same has a new fingerprint.
    pub fn refresh(&self, file: &FileRef, blob: BlobId, fingerprint: Fingerprint) -> Result<(), StoreError> {
        self.update_file(file, blob, |row| row.fingerprint = fingerprint)
    }

    /// Deletes files of the cache that no row names: what a crash between a file and its row left behind.
    fn remove_orphans_of_cache(&self) -> Result<(), StoreError> {
        let cached =
            self.cached()?.into_iter().flat_map(|blob| [self.cache_file(blob), self.cache_outboard_file(blob)]);
        let cached: HashSet<PathBuf> = cached.collect();
        let dir = &self.inner.settings.cache;
        for path in self.inner.disk.files_below(dir).map_err(StoreError::file("list", dir))? {
            let is_ours = |blob| [self.cache_file(blob), self.cache_outboard_file(blob)].contains(&path);
            let blob = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            if blob.is_some_and(is_ours) && !cached.contains(&path) {
                self.inner.disk.remove(&path).map_err(StoreError::file("remove", path))?;
            }
        }
        Ok(())
    }

    /// Runs `body` in a write transaction and commits it, durable on return.
    pub(crate) fn write<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let run = || -> Result<T, redb::Error> {
            let mut txn = self.inner.db.begin_write()?;
            txn.set_quick_repair(true);
            let result = body(&txn)?;
            txn.commit()?;
            Ok(result)
        };
        run().map_err(|source| StoreError::Database { action, source: Box::new(source) })
    }

    /// Runs `body` on one unchanging view of the rows.
    pub(crate) fn read_rows<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let run = || body(&self.inner.db.begin_read()?);
        run().map_err(|source| StoreError::Database { action, source: Box::new(source) })
    }
}

/// Up to `max` files that have `blob` in place, by `table` and their directories' rows in `dirs`, and by their own
/// rows in `files`.
pub(crate) fn holders(
    table: &impl ReadableTable<HolderKey, ()>,
    dirs: &impl ReadableTable<u32, &'static [u8]>,
    files: &impl ReadableTable<FileKey, &'static [u8]>,
    blob: BlobId,
    max: usize,
) -> Result<Vec<FileRef>, redb::Error> {
    let from = (holder_prefix(&blob), 0, &[][..]);
    let rows = table.range::<(&[u8; HOLDER_BYTES], u32, &[u8])>((Bound::Included(from), Bound::Unbounded))?;
    // A directory whose rows rotted may have got a second number.
    let mut found = BTreeSet::new();
    for row in rows {
        let (key, ()) = row.map(|(key, value)| (key, value.value()))?;
        let (prefix, dir, name) = key.value();
        if prefix != holder_prefix(&blob) || found.len() >= max {
            break;
        }
        let Some(file) = dirs::file_in(dirs, dir, name)? else { continue };
        let row = files.get((file.root.0, &file.path[..]))?.and_then(|row| decode_or_none::<FileRow>(row.value()));
        if row.is_some_and(|row| row.blob == blob) {
            found.insert(file);
        }
    }
    Ok(found.into_iter().collect())
}

/// In how many places a blob is looked for; a licence text may be in thousands.
pub(crate) const MAX_PLACES: usize = 8;
