//! Files that are no longer at their paths: what was known of them, for when they come back. Format: spec/store.md, "Rows".

use std::{os::unix::ffi::OsStrExt, path::Path};

use redb::{ReadableTable, ReadableTableMetadata, WriteTransaction};

use crate::{
    FileRow, RootId, Store, StoreError,
    rows::{VANISHED, VANISHED_ORDER, VanishedRow, decode_or_none, encode},
};

impl Store {
    /// Returns what was known of the files that vanished from `paths` below `root`, in the order of `paths`; `None` where
    /// nothing is remembered, or something is linked again.
    pub fn vanished(&self, root: RootId, paths: &[&[u8]]) -> Result<Vec<Option<FileRow>>, StoreError> {
        let dir = self.root_dir(root);
        self.read_rows("look up files that vanished", |txn| {
            let table = txn.open_table(VANISHED)?;
            if table.is_empty()? {
                return Ok(vec![None; paths.len()]);
            }
            let look = |path: &&[u8]| {
                let row = table.get(&absolute(&dir, path)[..])?;
                Ok(row.and_then(|row| decode_or_none::<VanishedRow>(row.value())).map(|vanished| vanished.row))
            };
            paths.iter().map(look).collect()
        })
    }
}

/// Remembers `rows` of files that were at paths below `dir`, and forgets those that vanished longest ago, so that `max` are
/// left.
pub(crate) fn remember(
    txn: &WriteTransaction,
    dir: &Path,
    rows: Vec<(Vec<u8>, FileRow)>,
    max: u64,
) -> Result<(), redb::Error> {
    let (mut table, mut order) = (txn.open_table(VANISHED)?, txn.open_table(VANISHED_ORDER)?);
    let mut number = order.last()?.map_or(0, |(number, _)| number.value());
    for (path, row) in rows {
        number = number.wrapping_add(1);
        // One that rotted may be the last there is.
        while order.get(number)?.is_some() {
            number = number.wrapping_add(1);
        }
        let path = absolute(dir, &path);
        let older = table.insert(&path[..], &encode(&VanishedRow { number, row })?[..])?;
        let older = older.and_then(|row| decode_or_none::<VanishedRow>(row.value()));
        if let Some(older) = older {
            order.remove(older.number)?;
        }
        order.insert(number, &path[..])?;
    }
    while order.len()? > max {
        let Some((_, path)) = order.pop_first()? else { break };
        table.remove(path.value())?;
    }
    Ok(())
}

/// Forgets what vanished from `paths` below `dir`: something is linked there again.
pub(crate) fn forget<'a>(
    txn: &WriteTransaction,
    dir: &Path,
    paths: impl Iterator<Item = &'a [u8]>,
) -> Result<(), redb::Error> {
    let mut table = txn.open_table(VANISHED)?;
    if table.is_empty()? {
        return Ok(());
    }
    let mut order = txn.open_table(VANISHED_ORDER)?;
    for path in paths {
        let row = table.remove(&absolute(dir, path)[..])?;
        if let Some(vanished) = row.and_then(|row| decode_or_none::<VanishedRow>(row.value())) {
            order.remove(vanished.number)?;
        }
    }
    Ok(())
}

fn absolute(dir: &Path, path: &[u8]) -> Vec<u8> {
    [dir.as_os_str().as_bytes(), b"/", path].concat()
}
