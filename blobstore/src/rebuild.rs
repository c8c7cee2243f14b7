//! A store whose database was lost or is damaged, made anew: what can be proven is taken over, and what is known of files
//! is remembered. Order and reasons: spec/store.md, "A database made anew".

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use redb::{Database, ReadOnlyDatabase, ReadableDatabase, ReadableTable, TableDefinition};
use tracing::info;
use tree::{BlobId, Geometry, Grain, hash_into};

use crate::{
    Access, Disk, FileRow, Settings, Store, StoreError, Verdict,
    cache::is_inline,
    rows::{
        CACHED, CachedRow, FILES, FORMAT, INLINE, META, REPAIRS, ROOTS, VANISHED, VanishedRow, decode, decode_or_none,
        encode,
    },
    saved::RepairRow,
    vanished::remember,
};

/// What of a store was taken over into its new database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// Blobs of the cache of which something proved.
    pub blobs: u64,
    /// Bytes of them that proved.
    pub bytes: u64,
    /// Files that are remembered as they were known.
    pub remembered: u64,
    /// Repairs that can still be undone.
    pub repairs: u64,
    /// Files of saved bytes of repairs of which nothing is known: [`Store::open`] would delete them.
    pub unknown_saved: Vec<PathBuf>,
}

impl Store {
    /// Fills the new database `db` with what the files of the cache prove, and with what can still be read in `damaged`, the
    /// database from before: files as files that vanished, small blobs that prove, and repairs. Nothing else of it is
    /// believed, and no file is deleted. To be followed by [`open`](Self::open).
    ///
    /// Whoever calls it sees to it that panics are not reported: reading a damaged database may panic, which is caught.
    pub fn rebuild(
        disk: Arc<dyn Disk>,
        db: Arc<Database>,
        settings: Settings,
        damaged: Option<&ReadOnlyDatabase>,
    ) -> Result<Rebuilt, StoreError> {
        let store = Self::new(disk, db, settings)?;
        store.make_tables()?;
        // Rows of another format would be misread.
        let damaged = damaged.filter(|damaged| strange_format(damaged).is_none());
        let mut rebuilt = Rebuilt::default();
        if let Some(damaged) = damaged {
            rebuilt.remembered = store.remember_files_of(damaged)?;
            store.take_small_blobs_of(damaged, &mut rebuilt)?;
            rebuilt.repairs = store.take_repairs_of(damaged)?;
        }
        rebuilt.unknown_saved = store.unknown_saved()?;
        store.adopt_cache(&mut rebuilt)?;
        Ok(rebuilt)
    }

    /// Remembers the files that `damaged` knows, in place or vanished, as files that vanished: when they are found again with
    /// other bytes and the same mtime, they are suspect.
    fn remember_files_of(&self, damaged: &ReadOnlyDatabase) -> Result<u64, StoreError> {
        let max = self.inner.settings.vanished_max;
        let mut vanished = Vec::new();
        let visit = &mut |path: &[u8], row: &[u8]| {
            let row = decode::<VanishedRow>(row).ok();
            if let (Some(row), Some(path)) = (row, path.strip_prefix(b"/")) {
                vanished.push((row.number, path.to_owned(), row.row));
            }
        };
        read_what_can_be(damaged, VANISHED, max, visit);
        vanished.sort_by_key(|(number, ..)| *number);
        let vanished: Vec<_> = vanished.into_iter().map(|(_, path, row)| (path, row)).collect();
        let mut roots = BTreeMap::new();
        read_what_can_be(damaged, ROOTS, max, &mut |root, dir: &[u8]| {
            if dir.starts_with(b"/") {
                roots.insert(root, dir[1..].to_owned());
            }
        });
        let mut files: Vec<(Vec<u8>, FileRow)> = Vec::new();
        let visit = &mut |(root, path): (u32, &[u8]), row: &[u8]| {
            let row = decode::<FileRow>(row).ok();
            if let (Some(dir), Some(row)) = (roots.get(&root), row) {
                files.push(([&dir[..], b"/", path].concat(), row));
            }
        };
        read_what_can_be(damaged, FILES, max, visit);
        let mut remembered = 0;
        for rows in [vanished, files] {
            for rows in rows.chunks(ROWS_AT_ONCE) {
                remembered += rows.len() as u64;
                self.write("remember files", |txn| remember(txn, Path::new(""), rows.to_vec(), max))?;
            }
        }
        Ok(remembered)
    }

    /// Takes over the small blobs of the cache that are their ids' bytes.
    fn take_small_blobs_of(&self, damaged: &ReadOnlyDatabase, rebuilt: &mut Rebuilt) -> Result<(), StoreError> {
        let mut blobs = Vec::new();
        read_what_can_be(damaged, INLINE, BLOBS_MAX, &mut |id: &[u8; 32], bytes: &[u8]| {
            if is_inline(bytes.len() as u64) && BlobId::of(bytes).as_bytes() == id {
                blobs.push((*id, bytes.to_owned()));
            }
        });
        for blobs in blobs.chunks(ROWS_AT_ONCE) {
            self.write("take over small blobs", |txn| {
                let (mut cached, mut inline) = (txn.open_table(CACHED)?, txn.open_table(INLINE)?);
                for (id, bytes) in blobs {
                    let geometry = Geometry::new(bytes.len() as u64);
                    let row = CachedRow { size: geometry.size(), proven: geometry.all().into() };
                    cached.insert(id, &encode(&row)?[..])?;
                    inline.insert(id, &bytes[..])?;
                }
                Ok(())
            })?;
            rebuilt.blobs += blobs.len() as u64;
            rebuilt.bytes += blobs.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        }
        Ok(())
    }

    /// Takes over the rows of repairs whose saved bytes are there. What they say is compared before anything is put back.
    fn take_repairs_of(&self, damaged: &ReadOnlyDatabase) -> Result<u64, StoreError> {
        let mut repairs = BTreeMap::new();
        read_what_can_be(damaged, REPAIRS, REPAIRS_MAX, &mut |number, row: &[u8]| {
            if decode_or_none::<RepairRow>(row).is_some() && self.saved_file(number).exists() {
                repairs.insert(number, row.to_owned());
            }
        });
        self.write("take over repairs", |txn| {
            let mut table = txn.open_table(REPAIRS)?;
            for (number, row) in &repairs {
                table.insert(number, &row[..])?;
            }
            Ok(())
        })?;
        Ok(repairs.len() as u64)
    }

    /// Takes over what the files of the cache prove.
    fn adopt_cache(&self, rebuilt: &mut Rebuilt) -> Result<(), StoreError> {
        let dir = &self.inner.settings.cache;
        let files = self.inner.disk.files_below(dir).map_err(StoreError::file("list", dir))?;
        info!(files = files.len(), "proving what the cache has");
        for path in files {
            let blob = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<BlobId>().ok());
            let Some(blob) = blob.filter(|blob| self.cache_file(*blob) == path) else { continue };
            let bytes = self.adopt(blob, &path)?;
            rebuilt.blobs += u64::from(bytes > 0);
            rebuilt.bytes += bytes;
        }
        Ok(())
    }

    /// Takes over what of a cached blob's file proves by its outboard or, if not all does, because all of it is the blob, whose
    /// outboard is made anew then. Returns how many bytes that are.
    fn adopt(&self, blob: BlobId, path: &Path) -> Result<u64, StoreError> {
        let file = self.inner.disk.open(path, Access::Read).and_then(|file| Ok((file.fingerprint()?.size, file)));
        let (size, file) = file.map_err(StoreError::file("open", path))?;
        if is_inline(size) {
            return Ok(0);
        }
        let claim = || {
            self.write("claim a cached blob", |txn| {
                let row = CachedRow { size, proven: Geometry::new(size).all().into() };
                txn.open_table(CACHED)?.insert(blob.as_bytes(), &encode(&row)?[..])?;
                Ok(())
            })
        };
        claim()?;
        if matches!(self.verify_cached(blob, &|_| {})?, Some(Verdict::Sound)) {
            return Ok(size);
        }
        let outboard = self.cache_outboard_file(blob);
        let staged = outboard.with_extension("new");
        let new = self.inner.disk.open(&staged, Access::Create).map_err(StoreError::file("create", &staged))?;
        // A file with holes is read as well: most are small, and this happens once.
        if hash_into(&*file, size, Grain::GROUP, &new).is_ok_and(|id| id == blob) {
            let placed = new.sync().and_then(|()| self.inner.disk.rename(&staged, &outboard));
            placed.map_err(StoreError::file("write", &outboard))?;
            claim()?;
            return Ok(size);
        }
        self.inner.disk.remove(&staged).map_err(StoreError::file("remove", staged))?;
        Ok(self.cached_ranges(blob)?.total_bytes())
    }
}

/// Returns [`StoreError::Format`] if another version of this program wrote the rows of a damaged database. Panics of redb are
/// caught.
pub fn strange_format(damaged: &ReadOnlyDatabase) -> Option<StoreError> {
    let mut format = None;
    read_what_can_be(damaged, META, META_ROWS_MAX, &mut |name, value| {
        format = format.or((name == "format").then_some(value));
    });
    let found = format.filter(|format| *format != FORMAT && *format <= FORMAT_MAX)?;
    Some(StoreError::Format { found, known: FORMAT })
}

/// Gives `visit` up to `max` rows of a table of a damaged database: from the first on until one cannot be read, and then from
/// the last back until one cannot be read. Some may come twice.
fn read_what_can_be<K: redb::Key + 'static, V: redb::Value + 'static>(
    damaged: &ReadOnlyDatabase,
    table: TableDefinition<K, V>,
    max: u64,
    visit: &mut dyn FnMut(K::SelfType<'_>, V::SelfType<'_>),
) {
    for backward in [false, true] {
        let mut read = || -> Result<(), redb::Error> {
            let table = damaged.begin_read()?.open_table(table)?;
            let mut rows = table.iter()?;
            for _ in 0..max {
                let Some(row) = (if backward { rows.next_back() } else { rows.next() }) else { break };
                let (key, value) = row?;
                visit(key.value(), value.value());
            }
            Ok(())
        };
        if matches!(catch_unwind(AssertUnwindSafe(&mut read)), Ok(Ok(()))) {
            return;
        }
    }
}

const ROWS_AT_ONCE: usize = 4096;
/// Small blobs of up to a chunk group each: some gigabytes at most.
const BLOBS_MAX: u64 = 200_000;
const REPAIRS_MAX: u64 = 1_000_000;
const META_ROWS_MAX: u64 = 100;
/// A higher number is taken for rot, not for a format.
const FORMAT_MAX: u32 = 100;
