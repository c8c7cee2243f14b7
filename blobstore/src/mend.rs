use std::sync::PoisonError;

use redb::ReadableTable;
use tracing::{info, warn};
use tree::{DamageSearch, Drift, Fingerprint, Geometry, RangeSet, Verified, VerifiedData};

use crate::{
    Access, DiskFile, FileRef, RootId, Sink, Store, StoreError,
    rows::{FILES, FileRow, MENDING, decode_or_none, encode},
};

/// A user's file whose damaged chunk groups are being written over with proven ones.
///
/// Before the first write the file's fingerprint is put aside, durably: a write moves the file's mtime, and though
/// that is put back at once, a crash between the two must not make the file count as edited. After a crash the
/// next [`Store::open`] puts it back.
pub struct Mending {
    store: Store,
    file: FileRef,
    row: FileRow,
    data: Box<dyn DiskFile>,
    /// The file's fingerprint when we last looked: just after our own last write.
    last: Fingerprint,
    /// Whether somebody else wrote to the file since.
    lost: bool,
    mended: RangeSet,
}

impl Store {
    /// Opens `file` for mending the chunk groups that its row has under quarantine. Nothing else in it will be
    /// written. Fails if it is not linked, cannot be written, or is no longer the file that was indexed.
    pub fn mend(&self, file: &FileRef) -> Result<Mending, StoreError> {
        let path = self.absolute(file);
        let Some(row) = self.file(file)? else { return Err(StoreError::Modified { path }) };
        // A row that rotted into the name of another blob must not have that written over the user's file.
        if !self.is_holder(file, row.blob)? {
            return Err(StoreError::NotTheBlob { path, blob: row.blob });
        }
        let open = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Write);
        let data = open.map_err(StoreError::file("open for writing", &path))?;
        let now = data.fingerprint().map_err(StoreError::file("stat", &path))?;
        if row.fingerprint.drift(&now) == Drift::Edited {
            return Err(StoreError::Modified { path });
        }
        // Better to learn now than after the first write that the mtime cannot be put back.
        data.set_mtime(now.mtime).map_err(StoreError::file("set the mtime of", &path))?;
        let now = data.fingerprint().map_err(StoreError::file("stat", &path))?;
        // From here on dropping it takes the mark away, also if the row cannot be written.
        self.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).insert(file.clone());
        let (store, last) = (self.clone(), now);
        let mending = Mending { store, file: file.clone(), row, data, last, lost: false, mended: RangeSet::new() };
        self.write("begin to mend a file", |txn| {
            txn.open_table(MENDING)?.insert((file.root.0, &file.path[..]), &encode(&now)?[..])?;
            Ok(())
        })?;
        Ok(mending)
    }

    /// Whether `file` is being mended at this moment, so that it may be half one thing and half another.
    pub fn is_mending(&self, file: &FileRef) -> bool {
        self.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).contains(file)
    }

    /// Ends every mending that a crash cut off: gives the file its mtime back, and lifts no quarantine. A file that
    /// cannot be reached now, because its disk is not mounted, is left for the next call: before a scan, for instance. One
    /// that is being mended at this moment is left alone.
    pub fn finish_mending(&self) -> Result<(), StoreError> {
        let interrupted: Vec<(FileRef, Option<Fingerprint>)> =
            self.read_rows("look for interrupted mending", |txn| {
                let rows = txn.open_table(MENDING)?;
                rows.iter()?
                    .map(|row| {
                        let (key, before) = row?;
                        let (root, path) = key.value();
                        Ok((FileRef { root: RootId(root), path: path.to_owned() }, decode_or_none(before.value())))
                    })
                    .collect()
            })?;
        for (file, before) in interrupted {
            if self.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).contains(&file) {
                continue;
            }
            // A file that was indexed anew meanwhile is none of our business any more.
            let row = self.file(&file)?.zip(before);
            let row = row.filter(|(row, before)| row.fingerprint.drift(before) != Drift::Edited);
            let Some((row, before)) = row else {
                self.end_mending(&file, None)?;
                continue;
            };
            let path = self.absolute(&file);
            match self.restore_after_crash(&file, &row, before) {
                Ok(Some(now)) => {
                    info!(path = %path.display(), "interrupted mending: mtime restored, damage as before");
                    self.end_mending(&file, Some((now, &RangeSet::new())))?;
                }
                Ok(None) => {
                    warn!(path = %path.display(), "interrupted mending: the file was changed since, and is left alone");
                    self.end_mending(&file, None)?;
                }
                // Perhaps a disk that is not mounted yet: the next start tries again.
                Err(error) => {
                    warn!(path = %path.display(), reason = tree::reason(&error), "interrupted mending: the file cannot be read")
                }
            }
        }
        Ok(())
    }

    /// Puts the mtime back if the file is the one that was being mended, and nobody has written to it since:
    /// all of it but what was under quarantine must prove.
    fn restore_after_crash(
        &self,
        file: &FileRef,
        row: &FileRow,
        before: Fingerprint,
    ) -> std::io::Result<Option<Fingerprint>> {
        let data = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Write)?;
        let now = data.fingerprint()?;
        if (now.inode, now.size) != (before.inode, before.size) {
            return Ok(None);
        }
        if now.mtime == before.mtime {
            return Ok(Some(now));
        }
        let Ok(outboard) = self.outboard(row.blob, before.size) else { return Ok(None) };
        let search = DamageSearch::new(row.blob, before.size, &data, &outboard.pairs).with_grain(outboard.grain);
        let found = search.run(&|_| {});
        if !found.data.difference(&row.damaged).is_empty() {
            return Ok(None);
        }
        data.set_mtime(before.mtime)?;
        data.sync()?;
        Ok(Some(data.fingerprint()?))
    }

    /// Forgets that `file` is being mended; with `outcome`, its new fingerprint and what was mended, records these.
    fn end_mending(&self, file: &FileRef, outcome: Option<(Fingerprint, &RangeSet)>) -> Result<(), StoreError> {
        let key = (file.root.0, &file.path[..]);
        self.write("end mending a file", |txn| {
            txn.open_table(MENDING)?.remove(key)?;
            let mut files = txn.open_table(FILES)?;
            let row = files.get(key)?.and_then(|row| decode_or_none::<FileRow>(row.value()));
            if let Some((mut row, (fingerprint, mended))) = row.zip(outcome) {
                row.fingerprint = fingerprint;
                row.damaged = row.damaged.difference(mended);
                files.insert(key, &encode(&row)?[..])?;
            }
            Ok(())
        })
    }
}

impl Mending {
    /// The chunk groups that are still to be mended.
    pub fn damaged(&self) -> RangeSet {
        self.row.damaged.difference(&self.mended)
    }

    /// The file's size in bytes.
    pub fn size(&self) -> u64 {
        self.row.fingerprint.size
    }

    /// Syncs what was written, and lifts the quarantine from what was mended. Returns the
    /// file's new fingerprint and the bytes that were mended. Durable on return.
    ///
    /// Fails with [`StoreError::Modified`] if somebody else wrote to the file meanwhile: then it counts as edited.
    pub fn finish(mut self) -> Result<(Fingerprint, RangeSet), StoreError> {
        let path = self.store.absolute(&self.file);
        let row = self.store.file(&self.file)?;
        self.lost |= row.is_none_or(|row| {
            row.blob != self.row.blob || self.row.fingerprint.drift(&row.fingerprint) == Drift::Edited
        });
        if let Err(error) = self.check_unchanged() {
            self.store.end_mending(&self.file, None)?;
            return Err(error);
        }
        let restore = || {
            self.data.sync()?;
            self.data.fingerprint()
        };
        let now = restore().map_err(StoreError::file("sync", path))?;
        self.store.end_mending(&self.file, Some((now, &self.mended)))?;
        Ok((now, std::mem::take(&mut self.mended)))
    }
}

impl Drop for Mending {
    fn drop(&mut self) {
        self.store.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.file);
    }
}

impl Mending {
    /// Makes sure that nobody but us has written to the file.
    fn check_unchanged(&mut self) -> Result<(), StoreError> {
        let path = self.store.absolute(&self.file);
        let now = self.data.fingerprint().map_err(StoreError::file("stat", &path))?;
        self.lost |= (now.size, now.mtime) != (self.last.size, self.last.mtime);
        if self.lost { Err(StoreError::Modified { path }) } else { Ok(()) }
    }

    fn write_group(&mut self, data: &VerifiedData) -> Result<(), StoreError> {
        let (blob, range) = (self.row.blob, data.range());
        if data.blob() != blob {
            return Err(StoreError::ForeignPiece { blob });
        }
        if !self.row.damaged.contains(range) || Geometry::new(self.size()).round_out(range) != range {
            return Ok(());
        }
        self.check_unchanged()?;
        let write = self.data.write_all_at(data.bytes(), data.offset());
        // Also after a write that failed, for it may have written something.
        let restored = self.data.set_mtime(self.row.fingerprint.mtime).and_then(|()| self.data.fingerprint());
        let written = restored.and_then(|now| {
            self.last = now;
            write
        });
        written.map_err(StoreError::file("write", self.store.absolute(&self.file)))?;
        self.mended.insert(range);
        Ok(())
    }
}

impl Sink for Mending {
    /// Writes the pieces that are whole chunk groups under quarantine, and passes over all else.
    fn write(&mut self, pieces: &[Verified]) -> Result<(), StoreError> {
        pieces.iter().filter_map(Verified::data).try_for_each(|piece| self.write_group(piece))
    }

    /// Syncs what was written.
    fn commit(&mut self) -> Result<(), StoreError> {
        let synced = self.data.sync().map_err(StoreError::file("sync", self.store.absolute(&self.file)));
        if synced.is_err() {
            self.mended = RangeSet::new();
        }
        synced
    }
}
