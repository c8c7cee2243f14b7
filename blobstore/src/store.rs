use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::Bound,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock, atomic::AtomicU64},
};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, Table, WriteTransaction};
use tracing::warn;
use tree::{BlobId, ByteRange, Fingerprint, Geometry, Grain, RangeSet};

use crate::{
    Disk, FileRef, HashedFile, Presence, RootId, StoreError, Verified,
    cache::Ledger,
    outboard::{STAGED_DIR, forget_unheld, has_outboard_file, put_outboard_row},
    rows::{
        CACHED, FILES, FORMAT, FileKey, FileRow, HOLDER_BYTES, HOLDERS, HolderKey, INLINE, MENDING, META, OUTBOARDS,
        PINS, ROOTS, USED, VERIFIED, decode_or_none, encode, holder_prefix,
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
    roots: RwLock<BTreeMap<u32, PathBuf>>,
    /// Held while outboard files come and go with their rows.
    pub(crate) linking: Mutex<()>,
    /// What the cache has, and what of it is in use.
    pub(crate) ledger: Mutex<Ledger>,
    /// Held shared by those who write to files of the cache, and alone by those who make, punch or delete them.
    pub(crate) cache_files: RwLock<()>,
    /// The files that are being mended now.
    pub(crate) mending: Mutex<HashSet<FileRef>>,
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
}

/// A user's file that was hashed and is to be linked in place.
#[derive(Debug)]
pub struct NewFile {
    /// The path below the root, `/`-separated.
    pub path: Vec<u8>,
    /// The file's fingerprint, the same before and after it was hashed.
    pub fingerprint: Fingerprint,
    /// When it was hashed, in milliseconds since 1970: whoever has just hashed a file need not verify it soon.
    pub hashed_at: u64,
    /// Its id and outboard.
    pub hashed: HashedFile,
}

impl Store {
    /// Opens the store whose rows are in `db`, and makes it if it is not there. Finishes or undoes what a crash left
    /// half done.
    pub fn open(disk: Arc<dyn Disk>, db: Arc<Database>, settings: Settings) -> Result<Self, StoreError> {
        for dir in [&settings.outboards.join(STAGED_DIR), &settings.cache] {
            disk.create_dirs(dir).map_err(StoreError::file("create", dir))?;
            // The directories may be new, and so may those that they are in.
            for above in dir.ancestors().skip(1).take(2).filter(|above| !above.as_os_str().is_empty()) {
                disk.sync_dir(above).map_err(StoreError::file("sync", above))?;
            }
        }
        let inner = Inner {
            disk,
            db,
            settings,
            staged: AtomicU64::new(0),
            roots: RwLock::default(),
            linking: Mutex::default(),
            ledger: Mutex::default(),
            cache_files: RwLock::default(),
            mending: Mutex::default(),
        };
        let store = Self { inner: Arc::new(inner) };
        let roots = store.write("open the store", |txn| {
            let mut meta = txn.open_table(META)?;
            let format = meta.get("format")?.map_or(FORMAT, |format| format.value());
            if format != FORMAT {
                return Err(redb::Error::Corrupted(format!("store format {format}, this program knows {FORMAT}")));
            }
            meta.insert("format", FORMAT)?;
            for table in [FILES, MENDING] {
                txn.open_table(table)?;
            }
            for table in [OUTBOARDS, CACHED, INLINE, VERIFIED] {
                txn.open_table(table)?;
            }
            txn.open_table(USED)?;
            txn.open_table(PINS)?;
            txn.open_table(HOLDERS)?;
            let mut roots = BTreeMap::new();
            for row in txn.open_table(ROOTS)?.iter()? {
                let (root, dir) = row?;
                roots.insert(root.value(), PathBuf::from(std::ffi::OsStr::from_bytes(dir.value())));
            }
            Ok(roots)
        })?;
        *store.inner.roots.write().unwrap_or_else(PoisonError::into_inner) = roots;
        store.remove_orphan_outboards()?;
        store.remove_orphans_of_cache()?;
        store.take_stock()?;
        store.finish_mending()?;
        Ok(store)
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
    ///
    pub fn remove_root(&self, root: RootId) -> Result<(), StoreError> {
        let paths = self.files(root)?;
        self.unlink(root, &paths.iter().map(|(path, _)| &path[..]).collect::<Vec<_>>())?;
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

    /// Links `files` below `root` in place. When this returns, their bytes, outboards and rows are durable.
    ///
    /// A path that was linked before is linked anew.
    pub fn link(&self, root: RootId, files: &[NewFile]) -> Result<(), StoreError> {
        let _linking = self.inner.linking.lock().unwrap_or_else(PoisonError::into_inner);
        self.place_outboard_files(files.iter().map(|file| &file.hashed))?;
        self.sync_file_systems(root, files)?;
        let unused = self.write("link files", |txn| {
            let mut rows = BTreeMap::new();
            let mut unused = BTreeSet::new();
            for file in files {
                let NewFile { fingerprint, hashed_at, hashed, .. } = file;
                let (blob, damaged) = (hashed.id(), RangeSet::new());
                let verified = Verified { at: *hashed_at, next: 0 };
                let row = FileRow { blob, fingerprint: *fingerprint, damaged, verified };
                // The same path twice in one call: the last word counts.
                if let Some(row) = rows.insert(&file.path[..], row) {
                    unused.insert((row.blob, row.fingerprint.size));
                }
                put_outboard_row(txn, hashed)?;
            }
            put_rows(txn, root, rows, &mut unused)?;
            forget_unheld(txn, unused)
        })?;
        // An outboard of another grain may be left from when the store was set so.
        let mut long = files.iter().filter(|file| has_outboard_file(file.fingerprint.size));
        long.try_for_each(|file| self.remove_outboard_files([file.hashed.id()], Some(&file.hashed)))?;
        self.remove_outboard_files(unused, None)
    }

    /// Makes the bytes of `files` durable: syncs each file system that they are on.
    fn sync_file_systems(&self, root: RootId, files: &[NewFile]) -> Result<(), StoreError> {
        let dir = self.root_dir(root);
        let by_device: BTreeMap<u64, &NewFile> = files.iter().map(|file| (file.fingerprint.device, file)).collect();
        for file in by_device.values() {
            let path = FileRef { root, path: file.path.clone() };
            let holder = dir.join(path.relative());
            let holder = holder.parent().unwrap_or(&dir);
            // A directory that is gone by now took the file with it; the others may be anywhere below the root.
            let synced = self.inner.disk.sync_file_system(holder).or_else(|_| self.inner.disk.sync_file_system(&dir));
            synced.map_err(StoreError::file("sync the file system of", holder))?;
        }
        Ok(())
    }

    /// Forgets the files at `paths` below `root`; paths that are not linked are passed over.
    pub fn unlink(&self, root: RootId, paths: &[&[u8]]) -> Result<(), StoreError> {
        let _linking = self.inner.linking.lock().unwrap_or_else(PoisonError::into_inner);
        let unused = self.write("unlink files", |txn| {
            let mut unused = BTreeSet::new();
            for &path in paths {
                let old = txn
                    .open_table(FILES)?
                    .remove((root.0, path))?
                    .and_then(|old| decode_or_none::<FileRow>(old.value()));
                if let Some(old) = old {
                    txn.open_table(HOLDERS)?.remove((holder_prefix(&old.blob), root.0, path))?;
                    unused.insert((old.blob, old.fingerprint.size));
                }
            }
            forget_unheld(txn, unused)
        })?;
        self.remove_outboard_files(unused, None)
    }

    /// What is known of the file in place `file`. A row that does not decode counts as none, here and everywhere.
    pub fn file(&self, file: &FileRef) -> Result<Option<FileRow>, StoreError> {
        self.read_rows("look up a file", |txn| {
            let row = txn.open_table(FILES)?.get((file.root.0, &file.path[..]))?;
            Ok(row.and_then(|row| decode_or_none(row.value())))
        })
    }

    /// All files linked below `root`, by path.
    pub fn files(&self, root: RootId) -> Result<Vec<(Vec<u8>, FileRow)>, StoreError> {
        self.read_rows("list files", |txn| {
            let table = txn.open_table(FILES)?;
            let rows = table.range((root.0, &[][..])..)?;
            rows.take_while(|row| row.as_ref().map_or(true, |(key, _)| key.value().0 == root.0))
                .filter_map(|row| {
                    row.map(|(key, row)| Some((key.value().1.to_owned(), decode_or_none(row.value())?)))
                        .map_err(redb::Error::from)
                        .transpose()
                })
                .collect()
        })
    }

    /// Up to `max` files that have `blob` in place.
    pub fn holders(&self, blob: BlobId, max: usize) -> Result<Vec<FileRef>, StoreError> {
        self.read_rows("look up a blob", |txn| holders(&txn.open_table(HOLDERS)?, &txn.open_table(FILES)?, blob, max))
    }

    /// Whether the rows say from both sides that `file` has `blob`.
    pub(crate) fn is_holder(&self, file: &FileRef, blob: BlobId) -> Result<bool, StoreError> {
        self.read_rows("look up a holder", |txn| {
            Ok(txn.open_table(HOLDERS)?.get((holder_prefix(&blob), file.root.0, &file.path[..]))?.is_some())
        })
    }

    /// Says anew that `file` has `blob`, where the row for that was lost.
    pub(crate) fn restore_holder(&self, file: &FileRef, blob: BlobId) -> Result<(), StoreError> {
        warn!(path = ?self.absolute(file), %blob, "its row among the holders was lost, and is made anew");
        self.write("restore a holder", |txn| {
            txn.open_table(HOLDERS)?.insert((holder_prefix(&blob), file.root.0, &file.path[..]), ())?;
            Ok(())
        })
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

    /// Puts `range` of a file under quarantine. Durable on return.
    pub fn quarantine(&self, file: &FileRef, blob: BlobId, range: ByteRange) -> Result<(), StoreError> {
        self.update_file(file, blob, |row| {
            row.damaged.insert(Geometry::new(row.fingerprint.size).round_out(range));
        })
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

/// Up to `max` files that have `blob` in place, by `table`, and by their own rows in `files`.
pub(crate) fn holders(
    table: &impl ReadableTable<HolderKey, ()>,
    files: &impl ReadableTable<FileKey, &'static [u8]>,
    blob: BlobId,
    max: usize,
) -> Result<Vec<FileRef>, redb::Error> {
    let from = (holder_prefix(&blob), 0, &[][..]);
    let rows = table.range::<(&[u8; HOLDER_BYTES], u32, &[u8])>((Bound::Included(from), Bound::Unbounded))?;
    let mut found = Vec::new();
    for row in rows {
        let (key, ()) = row.map(|(key, value)| (key, value.value()))?;
        let (prefix, root, path) = key.value();
        if prefix != holder_prefix(&blob) || found.len() >= max {
            break;
        }
        let row = files.get((root, path))?.and_then(|row| decode_or_none::<FileRow>(row.value()));
        if row.is_some_and(|row| row.blob == blob) {
            found.push(FileRef { root: RootId(root), path: path.to_owned() });
        }
    }
    Ok(found)
}

/// Puts the rows of files below `root` in place of those that are there, and their holders. Of the blobs that are
/// replaced, `unused` hears.
fn put_rows(
    txn: &WriteTransaction,
    root: RootId,
    rows: BTreeMap<&[u8], FileRow>,
    unused: &mut BTreeSet<(BlobId, u64)>,
) -> Result<(), redb::Error> {
    let (mut files, mut holders) = (txn.open_table(FILES)?, txn.open_table(HOLDERS)?);
    let (mut new, mut new_holders) = (Vec::new(), BTreeSet::new());
    for (path, row) in rows {
        let encoded = encode(&row)?;
        let old = match files.get((root.0, path))? {
            Some(old) => decode_or_none::<FileRow>(old.value()),
            None => {
                new_holders.insert((row.blob, path));
                new.push((path, encoded));
                continue;
            }
        };
        files.insert((root.0, path), &encoded[..])?;
        if let Some(old) = old.filter(|old| old.blob != row.blob) {
            holders.remove((holder_prefix(&old.blob), root.0, path))?;
            unused.insert((old.blob, old.fingerprint.size));
        }
        new_holders.insert((row.blob, path));
    }
    insert_runs(&mut files, root, &new)?;
    // In the order of their keys, for what is near is in the same page.
    for (blob, path) in new_holders {
        holders.insert((holder_prefix(&blob), root.0, path), ())?;
    }
    Ok(())
}

/// Inserts rows, ascending and none of them there yet. Wherever several come between two that are there, they fill
/// their pages: inserted one by one, they would leave every page half empty, but for those at the end of the table.
fn insert_runs(
    table: &mut Table<FileKey, &'static [u8]>,
    root: RootId,
    rows: &[(&[u8], Vec<u8>)],
) -> Result<(), redb::Error> {
    let mut rows = rows.iter().peekable();
    while let Some((first, _)) = rows.peek() {
        let mut cursor = table.lower_bound_mut(Bound::Included((root.0, *first)))?;
        let next = cursor.peek_next()?.map(|(key, _)| (key.value().0, key.value().1.to_owned()));
        let is_before_next = |path: &[u8]| next.as_ref().is_none_or(|next| (root.0, path) < (next.0, &next.1[..]));
        while let Some((path, row)) = rows.next_if(|(path, _)| is_before_next(path)) {
            cursor.insert_before((root.0, *path), &row[..])?;
        }
        cursor.close()?;
    }
    Ok(())
}

/// In how many places a blob is looked for; a licence text may be in thousands.
pub(crate) const MAX_PLACES: usize = 8;
