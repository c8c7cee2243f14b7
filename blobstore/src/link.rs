//! Which files the store knows, in place: they are linked, renamed and unlinked. Write order: spec/store.md.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::PoisonError,
};

use redb::{ReadableTable, Table, WriteTransaction};
use tree::{BlobId, Fingerprint, RangeSet};

use crate::{
    FileRef, FileState, HashedFile, RootId, Store, StoreError, Verified,
    dirs::{Dirs, split},
    outboard::{forget_unheld, has_outboard_file, put_outboard_row},
    rows::{FILES, FileKey, FileRow, HOLDERS, decode_or_none, encode, holder_prefix},
    vanished::{forget, remember},
};

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
    /// Whether a later write may leave no trace in the fingerprint.
    pub racy: bool,
}

/// A file that was found under another path than it is linked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// Where it is linked: the path below the root, `/`-separated.
    pub from: Vec<u8>,
    /// Where it is to be linked.
    pub to: Vec<u8>,
    /// Its fingerprint there.
    pub fingerprint: Fingerprint,
    /// Whether `from` stays linked as well: a file that has got a second name.
    pub keep: bool,
}

impl Store {
    /// Links `files` below `root` in place. When this returns, their bytes, outboards and rows are durable.
    ///
    /// A path that was linked before is linked anew.
    pub fn link(&self, root: RootId, files: &[NewFile]) -> Result<(), StoreError> {
        let _linking = self.inner.linking.lock().unwrap_or_else(PoisonError::into_inner);
        self.place_outboard_files(files.iter().map(|file| &file.hashed))?;
        self.sync_file_systems(root, files.iter().map(|file| (file.fingerprint.device, &file.path[..])))?;
        let dir = self.root_dir(root);
        let unused = self.write("link files", |txn| {
            let mut rows = BTreeMap::new();
            let mut unused = BTreeSet::new();
            for file in files {
                let NewFile { fingerprint, hashed_at, hashed, racy, .. } = file;
                let (blob, damaged) = (hashed.id(), RangeSet::new());
                let verified = Verified { at: *hashed_at, next: 0 };
                let state = if *racy { FileState::Racy } else { FileState::Settled };
                let row = FileRow { blob, fingerprint: *fingerprint, damaged, verified, state };
                // The same path twice in one call: the last word counts.
                if let Some(row) = rows.insert(&file.path[..], row) {
                    unused.insert((row.blob, row.fingerprint.size));
                }
                put_outboard_row(txn, hashed)?;
            }
            forget(txn, &dir, rows.keys().copied())?;
            put_rows(txn, &mut Dirs::open(txn, root)?, root, rows, &mut unused)?;
            forget_unheld(txn, unused)
        })?;
        // An outboard of another grain may be left from when the store was set so.
        let mut long = files.iter().filter(|file| has_outboard_file(file.fingerprint.size));
        long.try_for_each(|file| self.remove_outboard_files([file.hashed.id()], Some(&file.hashed)))?;
        self.remove_outboard_files(unused, None)
    }

    /// Links files of `root` under other paths: with the same blob, outboard, quarantine and time of verifying, and a
    /// new fingerprint. What was linked there before is unlinked. Tells of each move whether it was done. When this
    /// returns, the renames on the disk and the rows are durable.
    ///
    /// The moves are made as one: each takes what was at its `from` before any of them, so that files can change
    /// places. Of several to one path the last counts. Passed over are files that are not linked, are being mended,
    /// or have another size than the fingerprint says.
    pub fn relink(&self, root: RootId, moves: &[Move]) -> Result<Vec<bool>, StoreError> {
        let _linking = self.inner.linking.lock().unwrap_or_else(PoisonError::into_inner);
        // The bytes are where they were. But were the rename undone by a power cut, no row would know the old path.
        self.sync_file_systems(root, moves.iter().map(|moved| (moved.fingerprint.device, &moved.to[..])))?;
        let mending = self.inner.mending.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let dir = self.root_dir(root);
        let (done, unused) = self.write("relink files", |txn| {
            let (mut done, mut left, mut rows) = (Vec::new(), Vec::new(), BTreeMap::new());
            let files = txn.open_table(FILES)?;
            for Move { from, to, fingerprint, keep } in moves {
                let row = files.get((root.0, &from[..]))?.and_then(|row| decode_or_none::<FileRow>(row.value()));
                let is_mended = mending.contains_key(&FileRef { root, path: from.clone() });
                let size = |row: &FileRow| match row.state {
                    FileState::Suspect { read, .. } => read.size,
                    _ => row.fingerprint.size,
                };
                let row = row.filter(|row| size(row) == fingerprint.size && !is_mended);
                done.push(row.is_some());
                let Some(row) = row else { continue };
                if !keep {
                    left.push(&from[..]);
                }
                // A suspect file still awaits the decision between what it was and what it is.
                let (fingerprint, state) = match row.state {
                    FileState::Suspect { .. } => {
                        (row.fingerprint, FileState::Suspect { read: *fingerprint, was_settled: false })
                    }
                    state => (*fingerprint, state),
                };
                rows.insert(&to[..], FileRow { fingerprint, state, ..row });
            }
            drop(files);
            let mut unused = BTreeSet::new();
            let mut dirs = Dirs::open(txn, root)?;
            remove_rows(txn, &mut dirs, root, &left, &mut unused)?;
            forget(txn, &dir, rows.keys().copied())?;
            put_rows(txn, &mut dirs, root, rows, &mut unused)?;
            dirs.forget_empty(&txn.open_table(FILES)?, &left)?;
            drop(dirs);
            Ok((done, forget_unheld(txn, unused)?))
        })?;
        self.remove_outboard_files(unused, None)?;
        Ok(done)
    }

    /// Makes files below `root`, given by device and path, and their names durable: syncs each file system that they
    /// are on.
    pub fn sync_file_systems<'a>(
        &self,
        root: RootId,
        files: impl Iterator<Item = (u64, &'a [u8])>,
    ) -> Result<(), StoreError> {
        let dir = self.root_dir(root);
        let by_device: BTreeMap<u64, &[u8]> = files.collect();
        for &path in by_device.values() {
            let path = FileRef { root, path: path.to_owned() };
            let holder = dir.join(path.relative());
            let holder = holder.parent().unwrap_or(&dir);
            // A directory that is gone by now took the file with it; the others may be anywhere below the root.
            let synced = self.inner.disk.sync_file_system(holder).or_else(|_| self.inner.disk.sync_file_system(&dir));
            synced.map_err(StoreError::file("sync the file system of", holder))?;
        }
        Ok(())
    }

    /// Unlinks the files at `paths` below `root`, and remembers them as [`vanished`](Self::vanished); paths that are not linked
    /// are passed over.
    pub fn unlink(&self, root: RootId, paths: &[&[u8]]) -> Result<(), StoreError> {
        let _linking = self.inner.linking.lock().unwrap_or_else(PoisonError::into_inner);
        let (dir, max) = (self.root_dir(root), self.inner.settings.vanished_max);
        let unused = self.write("unlink files", |txn| {
            let mut unused = BTreeSet::new();
            let mut dirs = Dirs::open(txn, root)?;
            let gone = remove_rows(txn, &mut dirs, root, paths, &mut unused)?;
            remember(txn, &dir, gone, max)?;
            dirs.forget_empty(&txn.open_table(FILES)?, paths)?;
            drop(dirs);
            forget_unheld(txn, unused)
        })?;
        self.lost();
        self.remove_outboard_files(unused, None)
    }
}

/// Removes the rows of files below `root` that are there, and their holders, and returns them. Their blobs are added to `unused`.
fn remove_rows(
    txn: &WriteTransaction,
    dirs: &mut Dirs<'_>,
    root: RootId,
    paths: &[&[u8]],
    unused: &mut BTreeSet<(BlobId, u64)>,
) -> Result<Vec<(Vec<u8>, FileRow)>, redb::Error> {
    let (mut files, mut holders) = (txn.open_table(FILES)?, txn.open_table(HOLDERS)?);
    let mut gone = Vec::new();
    for &path in paths {
        let old = files.remove((root.0, path))?.and_then(|old| decode_or_none::<FileRow>(old.value()));
        if let Some(old) = old {
            let (dir, name) = split(path);
            if let Some(dir) = dirs.number(dir)? {
                holders.remove((holder_prefix(&old.blob), dir, name))?;
            }
            unused.insert((old.blob, old.fingerprint.size));
            gone.push((path.to_owned(), old));
        }
    }
    Ok(gone)
}

/// Puts the rows of files below `root` in place of those that are there, and their holders. The blobs that are replaced are
/// added to `unused`.
pub(crate) fn put_rows(
    txn: &WriteTransaction,
    dirs: &mut Dirs<'_>,
    root: RootId,
    rows: BTreeMap<&[u8], FileRow>,
    unused: &mut BTreeSet<(BlobId, u64)>,
) -> Result<(), redb::Error> {
    let (mut files, mut holders) = (txn.open_table(FILES)?, txn.open_table(HOLDERS)?);
    let (mut new, mut new_holders) = (Vec::new(), BTreeSet::new());
    for (path, row) in rows {
        let (dir, name) = split(path);
        let dir = dirs.number_or_new(dir)?;
        new_holders.insert((row.blob, dir, name));
        let encoded = encode(&row)?;
        let old = match files.get((root.0, path))? {
            Some(old) => decode_or_none::<FileRow>(old.value()),
            None => {
                new.push((path, encoded));
                continue;
            }
        };
        files.insert((root.0, path), &encoded[..])?;
        if let Some(old) = old.filter(|old| old.blob != row.blob) {
            holders.remove((holder_prefix(&old.blob), dir, name))?;
            unused.insert((old.blob, old.fingerprint.size));
        }
    }
    insert_runs(&mut files, root, &new)?;
    // In the order of their keys, for what is near is in the same page.
    for (blob, dir, name) in new_holders {
        holders.insert((holder_prefix(&blob), dir, name), ())?;
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
