use std::sync::PoisonError;

use redb::ReadableTable;
use tracing::{info, warn};
use tree::{DamageSearch, Drift, Fingerprint, Geometry, RangeSet, Verified, VerifiedData};

use crate::{
    Access, DiskFile, FileRef, FileState, RootId, Sink, Store, StoreError,
    rows::{FILES, FileRow, MENDING, decode_or_none, encode},
    saved::{RepairRow, end_repair, put_repair},
};

/// A user's file whose damaged chunk groups are being written over with proven ones.
///
/// Before the first write the bytes that are to be replaced are saved, and the file's fingerprint is put aside, durably: a
/// write moves the file's mtime, and though that is put back at once, a crash between the two must not make the file count
/// as edited. After a crash the next [`Store::open`] puts it back.
pub struct Mending {
    store: Store,
    file: FileRef,
    row: FileRow,
    data: Box<dyn DiskFile>,
    /// The number under which the replaced bytes are saved.
    saved: u64,
    /// The file's fingerprint before anything was written.
    before: Fingerprint,
    /// The file's fingerprint just after our own last write.
    last: Fingerprint,
    /// Whether somebody else wrote to the file since.
    lost: bool,
    mended: RangeSet,
}

/// What the user lets a repair overwrite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// Bytes that no program can have written.
    Damage,
    /// Those, and suspect ones: the user has decided that they are damage.
    Suspect,
}

impl Store {
    /// Opens `file` for mending the chunk groups that its row has under quarantine, and saves these as they are. Nothing
    /// else in it will be written. `now` is in milliseconds since 1970.
    ///
    /// Fails if the file is not linked, cannot be written, is no longer the file that was indexed, or is suspect without
    /// the user's consent; and if what would be replaced cannot be saved.
    pub fn mend(&self, file: &FileRef, consent: Consent, now: u64) -> Result<Mending, StoreError> {
        let path = self.absolute(file);
        let Some(row) = self.file(file)? else { return Err(StoreError::Modified { path }) };
        // A row that rotted into the name of another blob must not have that written over the user's file.
        if !self.is_holder(file, row.blob)? {
            return Err(StoreError::NotTheBlob { path, blob: row.blob });
        }
        let open = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Write);
        let data = open.map_err(StoreError::file("open for writing", &path))?;
        let found = data.fingerprint().map_err(StoreError::file("stat", &path))?;
        match (row.state, consent) {
            (FileState::Settled, _) if row.fingerprint.drift(&found) == Drift::None => {}
            (FileState::Suspect(read), Consent::Suspect) if read.drift(&found) == Drift::None => {}
            (FileState::Suspect(_), Consent::Damage) => return Err(StoreError::Suspect { path }),
            _ => return Err(StoreError::Modified { path }),
        }
        if found.size > row.fingerprint.size {
            return Err(StoreError::Longer { path, size: found.size, blob_size: row.fingerprint.size });
        }
        // From here on dropping it takes the mark away, also if the row cannot be written.
        self.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).insert(file.clone());
        let (store, before, last) = (self.clone(), found, found);
        let (file, mended) = (file.clone(), RangeSet::new());
        let mut mending = Mending { store, file, row, data, saved: 0, before, last, lost: false, mended };
        mending.begin(&path, now)?;
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
            let row = row.filter(|(row, before)| match row.state {
                FileState::Suspect(read) => read.drift(before) == Drift::None,
                _ => row.fingerprint.drift(before) == Drift::None,
            });
            let Some((row, before)) = row else {
                self.end_mending(&file, None, None)?;
                continue;
            };
            let path = self.absolute(&file);
            match self.restore_after_crash(&file, &row, before) {
                Ok(Some(now)) => {
                    info!(path = %path.display(), "interrupted mending: mtime restored, damage as before");
                    self.end_mending(&file, None, Some((&before, now, &RangeSet::new())))?;
                }
                Ok(None) => {
                    warn!(path = %path.display(), "interrupted mending: the file was changed since, and is left alone");
                    self.end_mending(&file, None, None)?;
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
        if before.drift(&now) == Drift::None {
            return Ok(Some(now));
        }
        let is_same_file = now.inode == before.inode && (now.birth == before.birth || before.birth.is_none());
        // A file that was cut short grows to the blob's size before anything else is written.
        let size = row.fingerprint.size;
        if !is_same_file || ![before.size, size].contains(&now.size) {
            return Ok(None);
        }
        let Ok(outboard) = self.outboard(row.blob, size) else { return Ok(None) };
        let search = DamageSearch::new(row.blob, size, &data, &outboard.pairs).with_grain(outboard.grain);
        let found = search.run(&|_| {});
        if !found.data.difference(&row.damaged).is_empty() {
            return Ok(None);
        }
        data.set_mtime(before.mtime)?;
        data.sync()?;
        Ok(Some(data.fingerprint()?))
    }

    /// Forgets that `file` is being mended. With an `outcome`, which is the file's fingerprint before and now, and what was
    /// mended, records these, for its other names (hard links) too, and ends the repair `saved`.
    fn end_mending(
        &self,
        file: &FileRef,
        saved: Option<u64>,
        outcome: Option<(&Fingerprint, Fingerprint, &RangeSet)>,
    ) -> Result<(), StoreError> {
        let names = match (outcome, self.file(file)?) {
            (Some(_), Some(row)) => self.holders(row.blob, NAMES_MAX)?,
            _ => Vec::new(),
        };
        self.write("end mending a file", |txn| {
            txn.open_table(MENDING)?.remove((file.root.0, &file.path[..]))?;
            let Some((before, now, mended)) = outcome else { return Ok(()) };
            if let Some(saved) = saved {
                end_repair(txn, saved, now)?;
            }
            let mut files = txn.open_table(FILES)?;
            for name in names {
                let key = (name.root.0, &name.path[..]);
                let row = files.get(key)?.and_then(|row| decode_or_none::<FileRow>(row.value()));
                let Some(mut row) = row else { continue };
                let last = match row.state {
                    FileState::Suspect(read) => read,
                    _ => row.fingerprint,
                };
                let is_same_inode = last.device == before.device && last.drift(before) == Drift::None;
                if name != *file && !is_same_inode {
                    continue;
                }
                row.damaged = row.damaged.difference(mended);
                match row.state {
                    FileState::Suspect(_) if !row.damaged.is_empty() => row.state = FileState::Suspect(now),
                    _ => (row.fingerprint, row.state) = (now, FileState::Settled),
                }
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
            (row.blob, row.fingerprint, row.state) != (self.row.blob, self.row.fingerprint, self.row.state)
        });
        if let Err(error) = self.check_unchanged() {
            self.store.end_mending(&self.file, None, None)?;
            return Err(error);
        }
        let restore = || {
            self.data.sync()?;
            self.data.fingerprint()
        };
        let now = restore().map_err(StoreError::file("sync", path))?;
        self.store.end_mending(&self.file, Some(self.saved), Some((&self.before, now, &self.mended)))?;
        Ok((now, std::mem::take(&mut self.mended)))
    }
}

impl Drop for Mending {
    fn drop(&mut self) {
        self.store.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.file);
    }
}

impl Mending {
    /// Saves what is to be replaced, and records durably that the file is being mended.
    fn begin(&mut self, path: &std::path::Path, now: u64) -> Result<(), StoreError> {
        self.saved = self.store.save(path, &*self.data, &self.row.damaged, now)?;
        let repair = RepairRow::new(path, self.row.blob, now, &self.row.damaged, false);
        self.check_unchanged()?;
        self.store.write("begin to mend a file", |txn| {
            put_repair(txn, self.saved, repair)?;
            txn.open_table(MENDING)?.insert((self.file.root.0, &self.file.path[..]), &encode(&self.before)?[..])?;
            Ok(())
        })?;
        // Better to learn now than after the first write that the mtime cannot be put back.
        let mtime = self.row.fingerprint.mtime;
        self.data.set_mtime(mtime).map_err(StoreError::file("set the mtime of", path))?;
        if self.before.size < self.size() {
            let grown = self.data.set_len(self.size()).and_then(|()| self.data.set_mtime(mtime));
            grown.map_err(StoreError::file("lengthen", path))?;
        }
        self.last = self.data.fingerprint().map_err(StoreError::file("stat", path))?;
        Ok(())
    }

    /// Makes sure that nobody but us has written to the file.
    fn check_unchanged(&mut self) -> Result<(), StoreError> {
        let path = self.store.absolute(&self.file);
        let now = self.data.fingerprint().map_err(StoreError::file("stat", &path))?;
        self.lost |= now != self.last;
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

/// In how many names of a file its mending is recorded. The others are read again, for their ctime moved.
const NAMES_MAX: usize = 256;
