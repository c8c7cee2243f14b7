//! The dictionary of directories: holders name the directory of their file by a number. Format: spec/store.md, "Rows".
//!
//! A directory is the bytes of a path up to its last `/`, and with it: none for files at the top, so that directory and
//! name together are the path, whatever it is. At the end of every transaction, as far as no row rots,
//!
//! - the two tables are inverse: each number is of one directory, which has that number;
//! - the directory of every file that is linked has a number;
//! - every directory that has a number has a file that is linked, in it or below it;
//! - a number that was given is not given again before all others were.
//!
//! A row that rotted names no wrong file: a number counts only where both tables agree on it, and a file that is found
//! by one counts only if its own row says so too.

use std::{collections::BTreeSet, ops::Bound};

use redb::{ReadableTable, Table, WriteTransaction};

use crate::{
    FileRef, RootId,
    rows::{DIR_NUMBERS, DIRS, DirRow, FileKey, LAST_DIR, META, decode_or_none, encode},
};

/// The directories of one root, in a transaction that links and unlinks its files.
pub(crate) struct Dirs<'txn> {
    root: RootId,
    dirs: Table<'txn, u32, &'static [u8]>,
    numbers: Table<'txn, FileKey, u32>,
    meta: Table<'txn, &'static str, u32>,
    /// The directory that was asked for last, and its number: files come by path, and so mostly from the same one.
    last: Option<(Vec<u8>, u32)>,
}

impl<'txn> Dirs<'txn> {
    pub(crate) fn open(txn: &'txn WriteTransaction, root: RootId) -> Result<Self, redb::Error> {
        let (dirs, numbers) = (txn.open_table(DIRS)?, txn.open_table(DIR_NUMBERS)?);
        Ok(Self { root, dirs, numbers, meta: txn.open_table(META)?, last: None })
    }

    /// The number of `dir`, if it has one.
    pub(crate) fn number(&mut self, dir: &[u8]) -> Result<Option<u32>, redb::Error> {
        if let Some((_, number)) = self.last.as_ref().filter(|(last, _)| last == dir) {
            return Ok(Some(*number));
        }
        let number = number(&self.dirs, &self.numbers, self.root, dir)?;
        self.last = number.map(|number| (dir.to_owned(), number));
        Ok(number)
    }

    /// The number of `dir`; a new one if it has none. Of rows that rotted, it makes both anew.
    pub(crate) fn number_or_new(&mut self, dir: &[u8]) -> Result<u32, redb::Error> {
        if let Some((_, number)) = self.last.as_ref().filter(|(last, _)| last == dir) {
            return Ok(*number);
        }
        let given = self.numbers.get((self.root.0, dir))?.map(|number| number.value());
        let known = given.map(|given| dir_of(&self.dirs, given)).transpose()?.flatten();
        let row = DirRow { root: self.root.0, dir: dir.to_owned() };
        let is_its = known.as_ref() == Some(&row);
        let number = match given {
            // If its other row was lost, it gets that back, and all holders that have the number are found again.
            Some(number) if is_its || known.is_none() => number,
            _ => self.next_number()?,
        };
        if !is_its {
            self.dirs.insert(number, &encode(&row)?[..])?;
            self.numbers.insert((self.root.0, dir), number)?;
        }
        self.last = Some((row.dir, number));
        Ok(number)
    }

    /// The one behind the last that was given, and never one that is in use, whatever the last is said to be.
    fn next_number(&mut self) -> Result<u32, redb::Error> {
        let last = self.meta.get(LAST_DIR)?.map_or(0, |last| last.value());
        let mut number = last.wrapping_add(1);
        while self.dirs.get(number)?.is_some() {
            number = number.wrapping_add(1);
        }
        self.meta.insert(LAST_DIR, number)?;
        Ok(number)
    }

    /// Takes their numbers from the directories of `paths`, and from those above them, that have no more files in them
    /// or below them, by the rows of `files`.
    pub(crate) fn forget_empty(
        &mut self,
        files: &impl ReadableTable<FileKey, &'static [u8]>,
        paths: &[&[u8]],
    ) -> Result<(), redb::Error> {
        self.last = None;
        let left: BTreeSet<&[u8]> = paths.iter().map(|path| split(path).0).collect();
        let mut empty = BTreeSet::new();
        for mut dir in left {
            while !self.has_files(files, dir)? && empty.insert(dir) {
                if let Some(number) = number(&self.dirs, &self.numbers, self.root, dir)? {
                    self.dirs.remove(number)?;
                }
                // Also one that the other table does not know.
                self.numbers.remove((self.root.0, dir))?;
                let Some((_, above)) = dir.split_last() else { break };
                dir = split(above).0;
            }
        }
        Ok(())
    }

    /// Whether a file is linked in `dir` or below it: one look, where to look for those right in it might take many.
    fn has_files(&self, files: &impl ReadableTable<FileKey, &'static [u8]>, dir: &[u8]) -> Result<bool, redb::Error> {
        let from = (Bound::Included((self.root.0, dir)), Bound::Unbounded);
        let Some(first) = files.range::<(u32, &[u8])>(from)?.next() else { return Ok(false) };
        let key = first?.0;
        let (root, path) = key.value();
        Ok(root == self.root.0 && path.starts_with(dir))
    }
}

/// The directory of a path, and its last component.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    path.split_at(path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1))
}

/// The number of `dir` below `root`, if both tables agree on it.
pub(crate) fn number(
    dirs: &impl ReadableTable<u32, &'static [u8]>,
    numbers: &impl ReadableTable<FileKey, u32>,
    root: RootId,
    dir: &[u8],
) -> Result<Option<u32>, redb::Error> {
    let Some(number) = numbers.get((root.0, dir))?.map(|number| number.value()) else { return Ok(None) };
    let is_its = dir_of(dirs, number)?.is_some_and(|row| (row.root, &row.dir[..]) == (root.0, dir));
    Ok(is_its.then_some(number))
}

/// The file `name` in the directory that has `number`, if there is such a directory.
pub(crate) fn file_in(
    dirs: &impl ReadableTable<u32, &'static [u8]>,
    number: u32,
    name: &[u8],
) -> Result<Option<FileRef>, redb::Error> {
    let row = dir_of(dirs, number)?;
    Ok(row.map(|DirRow { root, dir }| FileRef { root: RootId(root), path: [&dir[..], name].concat() }))
}

/// The directory that has `number`.
fn dir_of(dirs: &impl ReadableTable<u32, &'static [u8]>, number: u32) -> Result<Option<DirRow>, redb::Error> {
    Ok(dirs.get(number)?.and_then(|row| decode_or_none(row.value())))
}
