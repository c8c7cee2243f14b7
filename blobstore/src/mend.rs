use std::{io, path::Path, sync::PoisonError};

use redb::{ReadableTable, WriteTransaction};
use tracing::{info, warn};
use tree::{
    BlobId, ByteRange, DamageSearch, Drift, Fingerprint, GROUP_BYTES, Geometry, RangeSet, Verified, VerifiedData,
};

use crate::{
    Access, DiskFile, FileRef, FileState, RootId, Sink, Store, StoreError,
    rows::{FILES, FileRow, MENDING, decode_or_none, encode},
    saved::{RepairRow, end_repair, forget_repair, put_repair},
};

/// A user's file whose damaged chunk groups are being written over with proven ones.
///
/// Before the first write the bytes that are to be replaced are saved, and the file's fingerprint is put aside, durably: a
/// write moves the file's mtime, and though that is put back at once, a crash between the two must not make the file count
/// as edited. After a crash the next [`Store::open`] puts it back. Dropping it ends the mending and lifts no quarantine.
pub struct Mending {
    store: Store,
    file: FileRef,
    row: FileRow,
    data: Box<dyn DiskFile>,
    /// The number under which the replaced bytes are saved; `None` if nothing is to be replaced.
    saved: Option<u64>,
    /// The file's fingerprint before anything was written.
    before: Fingerprint,
    /// The file's fingerprint just after our own last write.
    last: Fingerprint,
    /// Whether somebody else wrote to the file since.
    lost: bool,
    /// Whether the rows name the mending.
    recorded: bool,
    /// Whether bytes of the file may be other ones than before.
    wrote: bool,
    mended: RangeSet,
    _mark: Mark,
}

/// What the user lets a repair overwrite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// Bytes that no program can have written.
    Damage,
    /// Those, and suspect ones: the user has decided that they are damage.
    Suspect,
}

/// Marks a file as being mended until it is dropped.
pub(crate) struct Mark {
    store: Store,
    file: FileRef,
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.store.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.file);
    }
}

/// How a file came out of a mending.
struct Outcome<'a> {
    blob: BlobId,
    before: &'a Fingerprint,
    now: Fingerprint,
    mended: &'a RangeSet,
    /// Whether somebody else may have written to it.
    is_doubtful: bool,
}

impl Store {
    /// Opens `file` for mending the chunk groups that its row has under quarantine, and saves these as they are. Nothing
    /// else in it will be written. `now` is in milliseconds since 1970.
    ///
    /// Fails if the file is not linked, cannot be written, is no longer the file that was indexed, is being mended already, or
    /// is suspect without the user's consent; and if what would be replaced cannot be saved.
    pub fn mend(&self, file: &FileRef, consent: Consent, now: u64) -> Result<Mending, StoreError> {
        let path = self.absolute(file);
        let open = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Write);
        let data = open.map_err(StoreError::file("open for writing", &path))?;
        let fingerprint = || data.fingerprint().map_err(StoreError::file("stat", &path));
        let mark = self.mark_mending(file, &fingerprint()?)?;
        let Some(mut row) = self.file(file)? else { return Err(StoreError::Modified { path }) };
        // A row that rotted into the name of another blob must not have that written over the user's file.
        if !self.is_holder(file, row.blob)? {
            return Err(StoreError::NotTheBlob { path, blob: row.blob });
        }
        let found = fingerprint()?;
        match (row.state, consent) {
            (FileState::Settled, _) if row.fingerprint.drift(&found) == Drift::None => {}
            (FileState::Suspect { read, .. }, Consent::Suspect) if read.drift(&found) == Drift::None => {}
            (FileState::Suspect { .. }, Consent::Damage) => return Err(StoreError::Suspect { path }),
            _ => return Err(StoreError::Modified { path }),
        }
        let size = row.fingerprint.size;
        if found.size > size {
            return Err(StoreError::Longer { path, size: found.size, blob_size: size });
        }
        if let Some(lacking) = ByteRange::new(found.size, size).filter(|lacking| !lacking.is_empty()) {
            row.damaged.insert(Geometry::new(size).round_out(lacking));
        }
        let (store, before, last) = (self.clone(), found, found);
        let (file, mended, lost, recorded, wrote) = (file.clone(), RangeSet::new(), false, false, false);
        let mut mending =
            Mending { store, file, row, data, saved: None, before, last, lost, recorded, wrote, mended, _mark: mark };
        mending.begin(&path, now)?;
        Ok(mending)
    }

    /// Marks `file`, which has the metadata `now`, as being mended; fails if it is already, by this name or another.
    pub(crate) fn mark_mending(&self, file: &FileRef, now: &Fingerprint) -> Result<Mark, StoreError> {
        let inode = (now.device, now.inode);
        let mut mending = self.inner.mending.lock().unwrap_or_else(PoisonError::into_inner);
        if mending.contains_key(file) || mending.values().any(|other| *other == inode) {
            return Err(StoreError::Mending { path: self.absolute(file) });
        }
        mending.insert(file.clone(), inode);
        Ok(Mark { store: self.clone(), file: file.clone() })
    }

    /// Whether `file`, which has the metadata `now`, is being mended at this moment, by this name or another.
    pub(crate) fn is_mended_now(&self, file: &FileRef, now: &Fingerprint) -> bool {
        let mending = self.inner.mending.lock().unwrap_or_else(PoisonError::into_inner);
        mending.contains_key(file) || mending.values().any(|inode| *inode == (now.device, now.inode))
    }

    /// Whether `file` is being mended at this moment, so that it may be half one thing and half another.
    pub fn is_mending(&self, file: &FileRef) -> bool {
        self.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).contains_key(file)
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
            let Some(before) = before else {
                self.end_mending(&file, None, None)?;
                continue;
            };
            let Ok(_mark) = self.mark_mending(&file, &before) else { continue };
            // One that ended just now took its row away.
            if !self.is_in_mending_table(&file, &before)? {
                continue;
            }
            // A file that was indexed anew meanwhile is none of our business any more.
            let row = self.file(&file)?.filter(|row| last_read(row).drift(&before) == Drift::None);
            let Some(row) = row else {
                self.end_mending(&file, None, None)?;
                continue;
            };
            let path = self.absolute(&file);
            match self.restore_after_crash(&file, &row, before) {
                Ok(Some((now, is_doubtful))) => {
                    info!(path = %path.display(), "interrupted mending: mtime restored, damage as before");
                    let saved = self.interrupted_repair(&path)?.map(|number| (number, true));
                    let (blob, mended) = (row.blob, &RangeSet::new());
                    let outcome = Outcome { blob, before: &before, now, mended, is_doubtful };
                    self.end_mending(&file, saved, Some(outcome))?;
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

    fn is_in_mending_table(&self, file: &FileRef, before: &Fingerprint) -> Result<bool, StoreError> {
        self.read_rows("look for interrupted mending", |txn| {
            let row = txn.open_table(MENDING)?.get((file.root.0, &file.path[..]))?;
            Ok(row.and_then(|row| decode_or_none::<Fingerprint>(row.value())) == Some(*before))
        })
    }

    /// Puts the mtime back if the file is the one that was being mended, and nobody has written to it since:
    /// all of it but what was under quarantine must prove. Also tells whether somebody may have written to what was.
    fn restore_after_crash(
        &self,
        file: &FileRef,
        row: &FileRow,
        before: Fingerprint,
    ) -> io::Result<Option<(Fingerprint, bool)>> {
        let data = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Write)?;
        let now = data.fingerprint()?;
        if before.drift(&now) == Drift::None {
            return Ok(Some((now, false)));
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
        // Our own writes leave the mtime moved for an instant; whoever writes after the crash does for good.
        Ok(Some((data.fingerprint()?, now.mtime != before.mtime)))
    }

    /// Forgets that `file` is being mended. With an `outcome`, records that, for its other names (hard links) too. The repair
    /// that is `saved` under a number ends, or is forgotten if it wrote nothing.
    fn end_mending(
        &self,
        file: &FileRef,
        saved: Option<(u64, bool)>,
        outcome: Option<Outcome<'_>>,
    ) -> Result<(), StoreError> {
        let mut names = match &outcome {
            Some(outcome) => self.holders(outcome.blob, NAMES_MAX)?,
            None => Vec::new(),
        };
        if !names.contains(file) {
            names.push(file.clone());
        }
        self.write("end mending a file", |txn| {
            txn.open_table(MENDING)?.remove((file.root.0, &file.path[..]))?;
            match (saved, &outcome) {
                (Some((number, false)), _) => forget_repair(txn, number)?,
                (Some((number, true)), Some(outcome)) => end_repair(txn, number, outcome.now)?,
                _ => {}
            }
            let Some(Outcome { blob, before, now, mended, is_doubtful }) = outcome else { return Ok(()) };
            let mut files = txn.open_table(FILES)?;
            for name in names {
                let key = (name.root.0, &name.path[..]);
                let row = files.get(key)?.and_then(|row| decode_or_none::<FileRow>(row.value()));
                let Some(mut row) = row.filter(|row| row.blob == blob) else { continue };
                let last = last_read(&row);
                // A file system may have another number by now than when the file was linked.
                if last.drift(before) != Drift::None || (name != *file && last.device != before.device) {
                    continue;
                }
                row.damaged = row.damaged.difference(mended);
                let is_undecided = (row.is_suspect() || is_doubtful) && !row.damaged.is_empty();
                if is_undecided || now.size != row.fingerprint.size {
                    row.state = FileState::Suspect { read: now, was_settled: false };
                } else {
                    (row.fingerprint, row.state) = (now, FileState::Settled);
                }
                files.insert(key, &encode(&row)?[..])?;
            }
            Ok(())
        })?;
        match saved {
            Some((number, false)) => self.remove_saved(number),
            _ => Ok(()),
        }
    }
}

/// Records durably that `file`, which has the fingerprint `before`, is being mended.
pub(crate) fn put_mending(txn: &WriteTransaction, file: &FileRef, before: &Fingerprint) -> Result<(), redb::Error> {
    txn.open_table(MENDING)?.insert((file.root.0, &file.path[..]), &encode(before)?[..])?;
    Ok(())
}

/// The fingerprint with which the file of a row was read last.
pub(crate) fn last_read(row: &FileRow) -> Fingerprint {
    match row.state {
        FileState::Suspect { read, .. } => read,
        FileState::Settled | FileState::Racy => row.fingerprint,
    }
}

impl Mending {
    /// The chunk groups that are still to be mended.
    pub fn damaged(&self) -> RangeSet {
        self.row.damaged.difference(&self.mended)
    }

    /// The blob's size in bytes.
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
            self.end(None)?;
            return Err(error);
        }
        let now = self.settle().map_err(StoreError::file("sync", path))?;
        self.end(Some(now))?;
        Ok((now, std::mem::take(&mut self.mended)))
    }

    /// Ends the mending in the rows; the file has the fingerprint `now` unless somebody else wrote to it.
    fn end(&mut self, now: Option<Fingerprint>) -> Result<(), StoreError> {
        self.recorded = false;
        let (blob, before, mended) = (self.row.blob, &self.before, &self.mended);
        let outcome = now.map(|now| Outcome { blob, before, now, mended, is_doubtful: false });
        self.store.end_mending(&self.file, self.saved.map(|number| (number, self.wrote)), outcome)
    }

    /// Ends a mending that was not finished: no quarantine is lifted, and the file does not count as edited.
    fn give_up(&mut self) -> Result<(), StoreError> {
        self.mended = RangeSet::new();
        match self.check_unchanged() {
            Err(StoreError::Modified { .. }) => return self.end(None),
            unchanged => unchanged?,
        }
        let now = self.settle().map_err(StoreError::file("sync", self.store.absolute(&self.file)))?;
        self.end(Some(now))
    }

    /// Syncs the file, with the mtime that it had.
    fn settle(&mut self) -> io::Result<Fingerprint> {
        if self.last.mtime != self.before.mtime {
            self.data.set_mtime(self.before.mtime)?;
        }
        self.data.sync()?;
        self.last = self.data.fingerprint()?;
        Ok(self.last)
    }

    /// Changes the file, and puts its mtime back, also after a change that failed, for that may have written something.
    fn change(&mut self, change: impl FnOnce(&dyn DiskFile) -> io::Result<()>) -> io::Result<()> {
        self.wrote = true;
        let changed = change(&*self.data);
        let restored = self.data.set_mtime(self.before.mtime);
        // If it could not be put back, that was nobody else.
        self.last = self.data.fingerprint()?;
        changed.and(restored)
    }

    /// Saves what is to be replaced, and records durably that the file is being mended.
    fn begin(&mut self, path: &Path, now: u64) -> Result<(), StoreError> {
        let mut repair = None;
        if !self.row.damaged.is_empty() {
            let row = RepairRow::new(path, self.row.blob, now, &self.row.damaged, self.before.size);
            let (number, row) = self.store.save(row, path, &*self.data, None)?;
            self.saved = Some(number);
            repair = Some(row);
        }
        // Also if that fails: then nobody knows whether it was committed.
        self.recorded = true;
        self.store.write("begin to mend a file", |txn| {
            if let Some((number, repair)) = self.saved.zip(repair) {
                put_repair(txn, number, repair)?;
            }
            put_mending(txn, &self.file, &self.before)
        })?;
        // Whoever wrote while the bytes were saved and synced must not have that overwritten.
        self.check_unchanged()?;
        // Better to learn now than after the first write that the mtime cannot be put back.
        self.data.set_mtime(self.before.mtime).map_err(StoreError::file("set the mtime of", path))?;
        self.last = self.data.fingerprint().map_err(StoreError::file("stat", path))?;
        if self.before.size < self.size() {
            let size = self.size();
            self.change(|data| data.set_len(size)).map_err(StoreError::file("lengthen", path))?;
        }
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
        // Where the file ends inside a block, the system reads that block before it writes a part of it, and cannot if its sector
        // is bad. Without the block it need not. All that is punched is written at once.
        let block = ByteRange::new(range.start(), range.start() + GROUP_BYTES).unwrap_or(range);
        let written = self.change(|file| match file.write_all_at(data.bytes(), data.offset()) {
            Err(error) if is_bad_sector(&error) && range.end() == file.fingerprint()?.size => {
                file.punch(block)?;
                file.write_all_at(data.bytes(), data.offset())
            }
            written => written,
        });
        written.map_err(StoreError::file("write", self.store.absolute(&self.file)))?;
        self.mended.insert(range);
        Ok(())
    }
}

fn is_bad_sector(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

impl Drop for Mending {
    fn drop(&mut self) {
        if self.recorded
            && let Err(error) = self.give_up()
        {
            let path = self.store.absolute(&self.file);
            warn!(path = %path.display(), reason = tree::reason(&error), "mending not ended: the next start ends it");
        }
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
