//! The bytes that repairs replaced in users' files, so that a repair can be undone. Format and order: spec/store.md,
//! "Saved bytes".

use std::{
    collections::HashSet,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{PoisonError, atomic::Ordering},
};

use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use tree::{BlobId, ByteRange, Drift, Fingerprint, Geometry, RangeSet};

use crate::{
    Access, DiskFile, FileRef, FileRow, FileState, Store, StoreError,
    mend::{last_read, put_mending},
    rows::{FILES, MENDING, REPAIRS, Row, decode_or_none, encode},
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
    /// The bytes that were to be replaced, and are saved so far as the file had them.
    pub ranges: RangeSet,
    /// Whether the repair put back what an earlier one had replaced.
    pub is_undo: bool,
    /// The file's size before, in bytes.
    size: u64,
    /// The hash of the saved bytes.
    hash: BlobId,
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
    size: u64,
    hash: BlobId,
    after: Option<Fingerprint>,
}

impl Row for RepairRow {}

impl Store {
    /// Returns the repairs whose replaced bytes are still saved, the oldest first.
    pub fn repairs(&self) -> Result<Vec<Repair>, StoreError> {
        self.read_rows("list repairs", |txn| {
            let rows = txn.open_table(REPAIRS)?;
            let repair = |row: Result<(redb::AccessGuard<'_, u64>, redb::AccessGuard<'_, &[u8]>), _>| {
                let (number, row) = row?;
                let Some(row) = decode_or_none::<RepairRow>(row.value()) else { return Ok(None) };
                let RepairRow { path, blob, at, ranges, is_undo, size, hash, after } = row;
                let path = PathBuf::from(OsStr::from_bytes(&path));
                Ok(Some(Repair { number: number.value(), path, blob, at, ranges, is_undo, size, hash, after }))
            };
            rows.iter()?.filter_map(|row| repair(row).transpose()).collect()
        })
    }

    /// Puts back the bytes that the latest repair of `file` replaced, and its size, and saves the bytes that it wrote. The
    /// file must not have changed since; its mtime stays. The file is suspect then, if it is linked as the blob that the
    /// repair wrote. `at` is now, in milliseconds since 1970. Returns what was put back; `None` if no repair of the file is
    /// saved. Durable on return.
    pub fn undo_repair(&self, file: &FileRef, at: u64) -> Result<Option<Repair>, StoreError> {
        let path = self.absolute(file);
        let Some(repair) = self.repairs()?.into_iter().rev().find(|repair| repair.path == path) else {
            return Ok(None);
        };
        let open = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Write);
        let data = open.map_err(StoreError::file("open for writing", &path))?;
        let fingerprint = || data.fingerprint().map_err(StoreError::file("stat", &path));
        let _mark = self.mark_mending(file, &fingerprint()?)?;
        let now = fingerprint()?;
        if repair.after.is_none_or(|after| after.drift(&now) != Drift::None) {
            return Err(StoreError::Modified { path });
        }
        let saved = self.saved_file(repair.number);
        let old = self.inner.disk.open(&saved, Access::Read).map_err(StoreError::file("open", &saved))?;
        let old_ranges = within(&repair.ranges, repair.size);
        let hashed = tree::hash(&*old, old_ranges.total_bytes()).map_err(StoreError::file("read", &saved))?;
        if hashed.id != repair.hash {
            return Err(StoreError::NotTheBlob { path: saved, blob: repair.hash });
        }
        let undo = RepairRow { is_undo: true, ..RepairRow::new(&path, repair.blob, at, &repair.ranges, now.size) };
        let (number, undo) = self.save(undo, &path, &*data, Some(repair.number))?;
        // The user decides again: also about what a crash from here on leaves, which may be neither.
        let doubt = |row: &mut FileRow, read| {
            let geometry = Geometry::new(row.fingerprint.size);
            row.damaged.extend(repair.ranges.iter().map(|range| geometry.round_out(range)));
            row.state = FileState::Suspect { read, was_settled: false };
        };
        self.write("begin to undo a repair", |txn| {
            put_repair(txn, number, undo)?;
            put_mending(txn, file, &now)?;
            change_row(txn, file, repair.blob, &now, |row| doubt(row, now))
        })?;
        let end = |after: Option<Fingerprint>| {
            self.write("end undoing a repair", |txn| {
                txn.open_table(MENDING)?.remove((file.root.0, &file.path[..]))?;
                match after {
                    Some(after) => {
                        end_repair(txn, number, after)?;
                        change_row(txn, file, repair.blob, &now, |row| doubt(row, after))
                    }
                    None => forget_repair(txn, number),
                }
            })
        };
        // Whoever wrote while the bytes were saved and synced must not have that overwritten.
        if fingerprint()? != now {
            end(None)?;
            self.remove_saved(number)?;
            return Err(StoreError::Modified { path });
        }
        let write = || -> io::Result<()> {
            let mut offset = 0;
            for part in parts(&old_ranges) {
                let mut bytes = vec![0; part.len() as usize];
                old.read_exact_at(&mut bytes, offset)?;
                data.write_all_at(&bytes, part.start())?;
                offset += part.len();
            }
            if repair.size != now.size {
                // So that a power cut leaves no file of this size and other bytes.
                data.sync()?;
                data.set_len(repair.size)?;
            }
            Ok(())
        };
        let written = write();
        // Also after a write that failed, for it may have written something.
        let after = data.set_mtime(now.mtime).and_then(|()| data.sync()).and_then(|()| data.fingerprint());
        let after = written.and(after).map_err(StoreError::file("put back the bytes of", &path))?;
        end(Some(after))?;
        self.lost();
        info!(path = %path.display(), bytes = repair.ranges.total_bytes(), "repair undone");
        Ok(Some(repair))
    }

    /// Copies the bytes that the repair `row` is to replace in the user's file at `path`, open as `data`, to a file of the
    /// store's own, and syncs it. Bytes that cannot be read are saved as zeros: there is nothing else to save. Returns the
    /// number under which the caller commits the row, and the row. The repair `keep` does not expire for it.
    ///
    /// Fails if they are more than may be saved, or there is no room.
    pub(crate) fn save(
        &self,
        mut row: RepairRow,
        path: &Path,
        data: &dyn DiskFile,
        keep: Option<u64>,
    ) -> Result<(u64, RepairRow), StoreError> {
        let _saving = self.inner.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = within(&row.ranges, row.size);
        let (bytes, limit) = (ranges.total_bytes(), self.inner.settings.saved_bytes_max);
        let repairs = self.repairs()?;
        let kept: u64 = repairs.iter().filter(|repair| keep == Some(repair.number)).map(Repair::saved_bytes).sum();
        if bytes.saturating_add(kept) > limit {
            return Err(StoreError::TooMuchToSave { path: path.to_owned(), bytes, limit });
        }
        let numbers: Vec<u64> = repairs.iter().map(|repair| repair.number).collect();
        self.expire_repairs(repairs, limit - bytes, row.at, keep)?;
        // One that rotted may be the last there is.
        let next = || self.inner.saved.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let is_free = |number: &u64| numbers.binary_search(number).is_err();
        let number = std::iter::repeat_with(next).find(is_free).unwrap_or_default();
        let saved = self.saved_file(number);
        // What a crash left under this number was never committed.
        self.inner.disk.remove(&saved).map_err(StoreError::file("remove", &saved))?;
        let copy = || -> io::Result<BlobId> {
            let file = self.inner.disk.open(&saved, Access::Create)?;
            let mut at = 0;
            for part in parts(&ranges) {
                file.write_all_at(&read_what_can_be(path, data, part), at)?;
                at += part.len();
            }
            file.sync()?;
            self.inner.disk.sync_dir(&self.inner.settings.saved)?;
            Ok(tree::hash(&*file, bytes)?.id)
        };
        let hash = copy().map_err(StoreError::file("save what a repair replaces to", &saved));
        row.hash = hash.inspect_err(|_| _ = self.remove_saved(number))?;
        Ok((number, row))
    }

    /// The latest repair of the file at `path`, if it did not come to its end.
    pub(crate) fn interrupted_repair(&self, path: &Path) -> Result<Option<u64>, StoreError> {
        let last = self.repairs()?.into_iter().rev().find(|repair| repair.path == path);
        Ok(last.filter(|last| last.after.is_none()).map(|last| last.number))
    }

    /// Drops the bytes of repairs that are older than they are kept, and of the oldest until there is room for one more and at
    /// most `bytes_max` are left; not those of the repair `keep`.
    fn expire_repairs(
        &self,
        repairs: Vec<Repair>,
        bytes_max: u64,
        now: u64,
        keep: Option<u64>,
    ) -> Result<(), StoreError> {
        let kept_ms = u64::try_from(self.inner.settings.saved_keep.as_millis()).unwrap_or(u64::MAX);
        let oldest = now.saturating_sub(kept_ms);
        let mut bytes = repairs.iter().map(Repair::saved_bytes).fold(0, u64::saturating_add);
        let mut left = repairs.len();
        let mut expired = Vec::new();
        for repair in repairs.into_iter().filter(|repair| keep != Some(repair.number)) {
            if repair.at < oldest || bytes > bytes_max || left >= REPAIRS_MAX {
                bytes = bytes.saturating_sub(repair.saved_bytes());
                left -= 1;
                expired.push(repair.number);
            }
        }
        if expired.is_empty() {
            return Ok(());
        }
        self.write("forget old repairs", |txn| expired.iter().try_for_each(|&number| forget_repair(txn, number)))?;
        expired.into_iter().try_for_each(|number| self.remove_saved(number))
    }

    /// Deletes the bytes saved under `number`.
    pub(crate) fn remove_saved(&self, number: u64) -> Result<(), StoreError> {
        let file = self.saved_file(number);
        self.inner.disk.remove(&file).map_err(StoreError::file("remove", file))
    }

    /// Deletes saved bytes that no row names: what a crash left behind. Those of a row that does not decode stay.
    pub(crate) fn remove_orphans_of_repairs(&self) -> Result<(), StoreError> {
        let last = self.read_rows("look up the last repair", |txn| {
            Ok(txn.open_table(REPAIRS)?.last()?.map_or(0, |(number, _)| number.value()))
        })?;
        self.inner.saved.store(last, Ordering::Relaxed);
        for file in self.unknown_saved()? {
            self.inner.disk.remove(&file).map_err(StoreError::file("remove", file))?;
        }
        Ok(())
    }

    /// The files of saved bytes that no row names.
    pub(crate) fn unknown_saved(&self) -> Result<Vec<PathBuf>, StoreError> {
        let named: HashSet<PathBuf> = self.read_rows("list repairs", |txn| {
            txn.open_table(REPAIRS)?.iter()?.map(|row| Ok(self.saved_file(row?.0.value()))).collect()
        })?;
        let dir = &self.inner.settings.saved;
        let files = self.inner.disk.files_below(dir).map_err(StoreError::file("list", dir))?;
        Ok(files.into_iter().filter(|file| !named.contains(file)).collect())
    }

    pub(crate) fn saved_file(&self, number: u64) -> PathBuf {
        self.inner.settings.saved.join(number.to_string())
    }
}

impl Repair {
    /// How many bytes are saved of it.
    fn saved_bytes(&self) -> u64 {
        within(&self.ranges, self.size).total_bytes()
    }
}

impl RepairRow {
    /// A repair of `ranges` of the file at `path`, of `size` bytes, that begins at `at`, in milliseconds since 1970.
    pub(crate) fn new(path: &Path, blob: BlobId, at: u64, ranges: &RangeSet, size: u64) -> Self {
        let path = path.as_os_str().as_bytes().to_owned();
        Self { path, blob, at, ranges: ranges.clone(), is_undo: false, size, hash: BlobId::EMPTY, after: None }
    }
}

/// Sets what `change` makes of a file's row, if the file is linked as `blob` and was read last with the fingerprint `read`.
fn change_row(
    txn: &WriteTransaction,
    file: &FileRef,
    blob: BlobId,
    read: &Fingerprint,
    change: impl FnOnce(&mut FileRow),
) -> Result<(), redb::Error> {
    let mut files = txn.open_table(FILES)?;
    let key = (file.root.0, &file.path[..]);
    let row = files.get(key)?.and_then(|row| decode_or_none::<FileRow>(row.value()));
    if let Some(mut row) = row.filter(|row| row.blob == blob && last_read(row).drift(read) == Drift::None) {
        change(&mut row);
        files.insert(key, &encode(&row)?[..])?;
    }
    Ok(())
}

/// Reads `part` of a user's file, with zeros for the blocks that cannot be read.
fn read_what_can_be(path: &Path, data: &dyn DiskFile, part: ByteRange) -> Vec<u8> {
    let mut buf = vec![0; part.len() as usize];
    if data.read_exact_at(&mut buf, part.start()).is_err() {
        for (block, start) in buf.chunks_mut(BLOCK_BYTES).zip((part.start()..).step_by(BLOCK_BYTES)) {
            if let Err(error) = data.read_exact_at(block, start) {
                let reason = tree::reason(&error);
                warn!(path = %path.display(), start, reason, "unreadable bytes are replaced unsaved");
                block.fill(0);
            }
        }
    }
    buf
}

/// Records that a repair begins, whose replaced bytes are saved under `number`.
pub(crate) fn put_repair(txn: &WriteTransaction, number: u64, row: RepairRow) -> Result<(), redb::Error> {
    txn.open_table(REPAIRS)?.insert(number, &encode(&row)?[..])?;
    Ok(())
}

/// Forgets a repair. The caller removes its saved bytes.
pub(crate) fn forget_repair(txn: &WriteTransaction, number: u64) -> Result<(), redb::Error> {
    txn.open_table(REPAIRS)?.remove(number)?;
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

/// What of `ranges` a file of `size` bytes has.
fn within(ranges: &RangeSet, size: u64) -> RangeSet {
    ranges.intersection(&ByteRange::new(0, size).unwrap_or_default().into())
}

/// `ranges` in parts that fit into memory, ascending.
fn parts(ranges: &RangeSet) -> impl Iterator<Item = ByteRange> + '_ {
    ranges.iter().flat_map(|range| {
        let starts = (range.start()..range.end()).step_by(PART_BYTES as usize);
        starts.filter_map(move |start| ByteRange::new(start, range.end().min(start + PART_BYTES)))
    })
}

const PART_BYTES: u64 = 1 << 20;
/// What cannot be read of one block does not keep its neighbours from being saved.
const BLOCK_BYTES: usize = 4 << 10;
/// How many repairs are kept, whatever their bytes.
const REPAIRS_MAX: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden bytes: repairs must stay undoable.
    #[test]
    fn rows_on_disk() {
        let ranges = ByteRange::new(16384, 32768).unwrap().into();
        let row = RepairRow::new(Path::new("/a"), BlobId::EMPTY, 1_700_000_000_000, &ranges, 40_000);
        let blob = BlobId::EMPTY;
        let expected = format!("022f61{blob}80d095ffbc310180800180800200c0b802{blob}00");
        let bytes = encode(&row).unwrap();
        assert_eq!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), expected);
        assert_eq!(decode_or_none::<RepairRow>(&bytes).unwrap().size, 40_000);
    }
}
