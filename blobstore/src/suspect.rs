//! Files of which nobody can tell whether they rotted or were edited. Rules: spec/store.md, "Suspect files".

use std::collections::{BTreeMap, BTreeSet};

use redb::ReadableTable;
use tree::{ByteRange, DamageSearch, Drift, Fingerprint, Geometry};

use crate::{
    Access, FileRef, FileRow, FileState, Store, StoreError,
    dirs::Dirs,
    link::put_rows,
    mend::last_read,
    outboard::forget_unheld,
    rows::{FILES, decode_or_none},
    vanished::forget,
};

impl FileRow {
    /// Whether the file with the metadata `now` may still have the bytes of the row's blob, but for its quarantine.
    pub fn may_have_blob(&self, now: &Fingerprint) -> bool {
        match self.state {
            FileState::Suspect { read, .. } => read.drift(now) == Drift::None && now.size == self.fingerprint.size,
            _ => !self.fingerprint.drift(now).is_other_file(),
        }
    }

    /// Whether the file awaits the user's decision.
    pub fn is_suspect(&self) -> bool {
        matches!(self.state, FileState::Suspect { .. })
    }
}

impl FileState {
    /// The state of a file in this one that was read with the metadata `read` and has other bytes than the blob.
    pub(crate) fn made_suspect(self, read: Fingerprint) -> Self {
        match self {
            Self::Suspect { read: before, .. } if before == read => self,
            _ => Self::Suspect { read, was_settled: self == Self::Settled },
        }
    }
}

impl Store {
    /// Records that the file at `file`, with the fingerprint `seen`, was read and has other bytes than `last`, what was known of
    /// it; that rot and an edit are both possible; and which chunk groups of the blob it lacks. With `unwritten`, no program can
    /// have written to it since it was known: then it is damaged, if it was settled. Returns the new row; `None` if the file
    /// has changed since.
    pub fn suspect(
        &self,
        file: &FileRef,
        last: &FileRow,
        seen: Fingerprint,
        unwritten: bool,
    ) -> Result<Option<FileRow>, StoreError> {
        let path = self.absolute(file);
        let open = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Read);
        let data = open.map_err(StoreError::file("open", &path))?;
        let size = last.fingerprint.size;
        let damaged = if seen.size == size {
            let outboard = self.outboard(last.blob, size)?;
            let search = DamageSearch::new(last.blob, size, &data, &outboard.pairs).with_grain(outboard.grain);
            let found = search.run(&|_| {});
            // What no outboard proves is as suspect: of a file that vanished, the outboard may be gone.
            found.data.union(&found.outboard)
        } else {
            Geometry::new(size).all().into()
        };
        // Bytes that are the blob's after all make nothing suspect: whoever read others looks again.
        if damaged.is_empty() || data.fingerprint().map_err(StoreError::file("stat", &path))? != seen {
            return Ok(None);
        }
        let is_rot = unwritten && last.state == FileState::Settled && last.fingerprint.drift(&seen) == Drift::Touched;
        let (fingerprint, state) = match is_rot {
            true => (seen, FileState::Settled),
            false => (last.fingerprint, FileState::Suspect { read: seen, was_settled: false }),
        };
        let row = FileRow { fingerprint, damaged, state, ..last.clone() };
        let _linking = self.inner.linking.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let dir = self.root_dir(file.root);
        let key = (file.root.0, &file.path[..]);
        let unused = self.write("record a suspect file", |txn| {
            let now = txn.open_table(FILES)?.get(key)?.and_then(|row| decode_or_none::<FileRow>(row.value()));
            // Somebody linked these very bytes meanwhile: the user accepted them.
            let is_linked = |now: FileRow| now.blob != last.blob && last_read(&now).drift(&seen) == Drift::None;
            if now.is_some_and(is_linked) || self.is_mended_now(file, &seen) {
                return Ok(None);
            }
            let mut unused = BTreeSet::new();
            forget(txn, &dir, [&file.path[..]].into_iter())?;
            let rows = BTreeMap::from([(&file.path[..], row.clone())]);
            put_rows(txn, &mut Dirs::open(txn, file.root)?, file.root, rows, &mut unused)?;
            forget_unheld(txn, unused).map(Some)
        })?;
        let Some(unused) = unused else { return Ok(None) };
        self.remove_outboard_files(unused, None)?;
        self.lost();
        Ok(Some(row))
    }

    /// Records that a suspect file, last read with the metadata `read`, has only been touched since its bytes were known, and
    /// that no program wrote to it meanwhile: so what differs is damage. Returns whether that is so: of a file that was
    /// suspect before, or that a crash left suspect, nobody can know it.
    pub fn explain(&self, file: &FileRef, read: Fingerprint) -> Result<bool, StoreError> {
        let Some(known) = self.file(file)? else { return Ok(false) };
        let is_touched = known.fingerprint.drift(&read) == Drift::Touched;
        if known.state != (FileState::Suspect { read, was_settled: true }) || !is_touched {
            return Ok(false);
        }
        self.update_file(file, known.blob, |row| {
            if row.state == known.state {
                (row.fingerprint, row.state) = (read, FileState::Settled);
            }
        })?;
        Ok(true)
    }

    /// Records that nobody will know whether a suspect file, last read with the metadata `read`, rotted or was edited.
    pub fn leave_suspect(&self, file: &FileRef, read: Fingerprint) -> Result<(), StoreError> {
        let was_settled = FileState::Suspect { read, was_settled: true };
        let Some(known) = self.file(file)?.filter(|known| known.state == was_settled) else { return Ok(()) };
        self.update_file(file, known.blob, |row| {
            if row.state == was_settled {
                row.state = FileState::Suspect { read, was_settled: false };
            }
        })
    }

    /// Reads `range` of a suspect or damaged file as it is, up to the file's end, unproven, to be shown beside the right bytes.
    /// Holds all of it in memory. `None` if it cannot be read.
    pub fn read_unproven(&self, file: &FileRef, range: ByteRange) -> Option<Vec<u8>> {
        let data = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Read).ok()?;
        let end = range.end().min(data.fingerprint().ok()?.size);
        let range = ByteRange::new(range.start(), end)?;
        let mut bytes = vec![0; usize::try_from(range.len()).ok()?];
        data.read_exact_at(&mut bytes, range.start()).ok()?;
        Some(bytes)
    }

    /// Notes that `range` of a file in place, of which `known` was known, and which now has the metadata `now`, does not prove.
    /// `times_tell` says whether a write would have moved something of that. Durable on return.
    pub(crate) fn quarantine(
        &self,
        file: &FileRef,
        known: &FileRow,
        now: Fingerprint,
        times_tell: bool,
        range: ByteRange,
    ) -> Result<(), StoreError> {
        let state = match (known.state, known.fingerprint.drift(&now)) {
            // A write that left no trace is as likely as rot. The file is hashed again when it next comes up.
            (FileState::Racy, Drift::None) => return Ok(()),
            (FileState::Settled, Drift::None) if times_tell => FileState::Settled,
            (state, _) => state.made_suspect(now),
        };
        // Mending moves the ctime, and that tells nothing of whoever else may have written.
        let state = if self.is_mended_now(file, &now) { known.state } else { state };
        self.update_file(file, known.blob, |row| {
            if row.fingerprint == known.fingerprint && [known.state, state].contains(&row.state) {
                row.damaged.insert(Geometry::new(row.fingerprint.size).round_out(range));
                row.state = state;
            }
        })?;
        self.lost();
        Ok(())
    }
}
