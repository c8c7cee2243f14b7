//! The bytes that repairs replaced in users' files, so that a repair can be undone. Format and order: spec/store.md,
//! "Saved bytes".

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use tree::{BlobId, ByteRange, Drift, Fingerprint, RangeSet};

use crate::{
    Access, DiskFile, FileRef, Store, StoreError,
    rows::{REPAIRS, decode_or_none, encode},
};

/// A repair of a user's file, of which the replaced bytes are still here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// The number of the repair: later ones have greater numbers.
    pub number: u64,
    /// The file, an absolute path.
    pub path: PathBuf,
    /// The blob whose bytes were written.
    pub blob: BlobId,
    /// When the repair began: milliseconds since 1970.
    pub at: u64,
    /// The bytes that were to be replaced, and are saved.
    pub ranges: RangeSet,
    /// Whether the repair put back what an earlier one had replaced.
    pub is_undo: bool,
    /// The file's fingerprint at the end of the repair; `None` if it did not come to its end.
    after: Option<Fingerprint>,
}

/// [`Repair`] as it is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RepairRow {
    path: Vec<u8>,
    blob: BlobId,
    at: u64,
    ranges: RangeSet,
    is_undo: bool,
    after: Option<Fingerprint>,
}

impl Store {
    /// Returns the repairs whose replaced bytes are still saved, the oldest first.
    pub fn repairs(&self) -> Result<Vec<Repair>, StoreError> {
        self.read_rows("list repairs", |txn| {
            let rows = txn.open_table(REPAIRS)?;
            let repair = |row: Result<(redb::AccessGuard<'_, u64>, redb::AccessGuard<'_, &[u8]>), _>| {
                let (number, row) = row?;
                let Some(row) = decode_or_none::<RepairRow>(row.value()) else { return Ok(None) };
                let RepairRow { path, blob, at, ranges, is_undo, after } = row;
                let path = PathBuf::from(OsStr::from_bytes(&path));
                Ok(Some(Repair { number: number.value(), path, blob, at, ranges, is_undo, after }))
            };
            rows.iter()?.filter_map(|row| repair(row).transpose()).collect()
        })
    }

    /// Puts back the bytes that the latest repair of `file` replaced, and saves those that it wrote. The file must not have
    /// changed since; its mtime stays. What the file is now, hashing tells. `at` is now, in milliseconds since 1970. Returns what
    /// was put back; `None` if no repair of the file is saved. Durable on return.
    pub fn undo_repair(&self, file: &FileRef, at: u64) -> Result<Option<Repair>, StoreError> {
        let path = self.absolute(file);
        let Some(repair) = self.repairs()?.into_iter().rev().find(|repair| repair.path == path) else {
            return Ok(None);
        };
        let open = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Write);
        let data = open.map_err(StoreError::file("open for writing", &path))?;
        let now = data.fingerprint().map_err(StoreError::file("stat", &path))?;
        if repair.after.is_none_or(|after| after.drift(&now) != Drift::None) {
            return Err(StoreError::Modified { path });
        }
        let saved = self.saved_file(repair.number);
        let old = self.inner.disk.open(&saved, Access::Read).map_err(StoreError::file("open", &saved))?;
        let number = self.save(&path, &*data, &repair.ranges, at)?;
        self.write("begin to undo a repair", |txn| {
            put_repair(txn, number, RepairRow::new(&path, repair.blob, at, &repair.ranges, true))
        })?;
        let mut offset = 0;
        for part in parts(&repair.ranges) {
            let mut bytes = vec![0; part.len() as usize];
            old.read_exact_at(&mut bytes, offset).map_err(StoreError::file("read", &saved))?;
            data.write_all_at(&bytes, part.start()).map_err(StoreError::file("write", &path))?;
            offset += part.len();
        }
        let after = data.set_mtime(now.mtime).and_then(|()| data.sync()).and_then(|()| data.fingerprint());
        let after = after.map_err(StoreError::file("sync", &path))?;
        self.write("end undoing a repair", |txn| end_repair(txn, number, after))?;
        info!(path = %path.display(), bytes = repair.ranges.total_bytes(), "repair undone");
        Ok(Some(repair))
    }

    /// Copies `ranges` of a user's file, open as `data`, to a file of the store's own, and syncs it. Bytes that cannot be read
    /// are saved as zeros: there is nothing else to save. Returns the number under which the caller commits them.
    ///
    /// Fails if they are more than may be saved, or there is no room.
    pub(crate) fn save(
        &self,
        path: &Path,
        data: &dyn DiskFile,
        ranges: &RangeSet,
        now: u64,
    ) -> Result<u64, StoreError> {
        let (bytes, limit) = (ranges.total_bytes(), self.inner.settings.saved_bytes_max);
        if bytes > limit {
            return Err(StoreError::TooMuchToSave { path: path.to_owned(), bytes, limit });
        }
        self.expire_repairs(limit - bytes, now)?;
        let last = self.repairs()?.last().map_or(0, |last| last.number);
        self.inner.saved.fetch_max(last, Ordering::Relaxed);
        let number = self.inner.saved.fetch_add(1, Ordering::Relaxed) + 1;
        let saved = self.saved_file(number);
        // What a crash left under this number was never committed.
        self.inner.disk.remove(&saved).map_err(StoreError::file("remove", &saved))?;
        let copy = || {
            let file = self.inner.disk.open(&saved, Access::Create)?;
            let mut at = 0;
            for part in parts(ranges) {
                let mut buf = vec![0; part.len() as usize];
                if let Err(error) = data.read_exact_at(&mut buf, part.start()) {
                    warn!(path = %path.display(), reason = tree::reason(&error), "unreadable bytes are replaced unsaved");
                    buf.fill(0);
                }
                file.write_all_at(&buf, at)?;
                at += part.len();
            }
            file.sync()?;
            self.inner.disk.sync_dir(&self.inner.settings.saved)
        };
        copy().map_err(StoreError::file("save what a repair replaces to", saved))?;
        Ok(number)
    }

    /// Drops the bytes of repairs that are older than they are kept, and of the oldest until at most `bytes_max` are left.
    fn expire_repairs(&self, bytes_max: u64, now: u64) -> Result<(), StoreError> {
        let oldest = now.saturating_sub(self.inner.settings.saved_keep.as_millis() as u64);
        let repairs = self.repairs()?;
        let mut bytes: u64 = repairs.iter().map(|repair| repair.ranges.total_bytes()).sum();
        let mut expired = Vec::new();
        for repair in repairs {
            if repair.at < oldest || bytes > bytes_max {
                bytes -= repair.ranges.total_bytes();
                expired.push(repair.number);
            }
        }
        if expired.is_empty() {
            return Ok(());
        }
        self.write("forget old repairs", |txn| {
            let mut rows = txn.open_table(REPAIRS)?;
            expired.iter().try_for_each(|number| rows.remove(number).map(drop).map_err(redb::Error::from))
        })?;
        let mut files = expired.iter().map(|&number| self.saved_file(number));
        files.try_for_each(|file| self.inner.disk.remove(&file).map_err(StoreError::file("remove", file)))
    }

    /// Deletes saved bytes that no row names: what a crash left behind.
    pub(crate) fn remove_orphans_of_repairs(&self) -> Result<(), StoreError> {
        let named: Vec<_> = self.repairs()?.into_iter().map(|repair| self.saved_file(repair.number)).collect();
        let dir = &self.inner.settings.saved;
        for file in self.inner.disk.files_below(dir).map_err(StoreError::file("list", dir))? {
            if !named.contains(&file) {
                self.inner.disk.remove(&file).map_err(StoreError::file("remove", file))?;
            }
        }
        Ok(())
    }

    fn saved_file(&self, number: u64) -> PathBuf {
        self.inner.settings.saved.join(number.to_string())
    }
}

impl RepairRow {
    /// A repair of the file at `path` that begins at `at`, in milliseconds since 1970.
    pub(crate) fn new(path: &Path, blob: BlobId, at: u64, ranges: &RangeSet, is_undo: bool) -> Self {
        let path = path.as_os_str().as_bytes().to_owned();
        Self { path, blob, at, ranges: ranges.clone(), is_undo, after: None }
    }
}

/// Records that a repair begins, whose replaced bytes are saved under `number`.
pub(crate) fn put_repair(txn: &WriteTransaction, number: u64, row: RepairRow) -> Result<(), redb::Error> {
    txn.open_table(REPAIRS)?.insert(number, &encode(&row)?[..])?;
    Ok(())
}

/// Records the fingerprint that the file has at the end of a repair.
pub(crate) fn end_repair(txn: &WriteTransaction, number: u64, after: Fingerprint) -> Result<(), redb::Error> {
    let mut rows = txn.open_table(REPAIRS)?;
    let row = rows.get(number)?.and_then(|row| decode_or_none::<RepairRow>(row.value()));
    if let Some(row) = row {
        rows.insert(number, &encode(&RepairRow { after: Some(after), ..row })?[..])?;
    }
    Ok(())
}

/// `ranges` in chunk groups, ascending.
fn parts(ranges: &RangeSet) -> impl Iterator<Item = ByteRange> + '_ {
    ranges.iter().flat_map(|range| {
        let starts = (range.start()..range.end()).step_by(PART_BYTES as usize);
        starts.filter_map(move |start| ByteRange::new(start, range.end().min(start + PART_BYTES)))
    })
}

/// A chunk group: what cannot be read of one does not keep its neighbours from being saved.
const PART_BYTES: u64 = 16 << 10;
