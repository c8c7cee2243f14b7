//! `get`s that make a new directory and have not come to their end. The same command given again goes on in that directory,
//! and does not put a second tree into it. Rows: spec/store.md, "Unfinished gets".

use std::{os::unix::ffi::OsStrExt, path::Path, sync::Arc};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::{failure::Failure, target::Target};

/// What is remembered of unfinished `get`s.
pub(in super::super) struct Unfinished(Arc<Database>);

/// A `get` that began.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    /// When, in seconds since 1970.
    since: u64,
    targets: Vec<Target>,
}

impl Unfinished {
    pub(in super::super) fn new(db: Arc<Database>) -> Self {
        Self(db)
    }

    /// Whether a `get` of `targets` began to make `to`, and has not come to its end.
    pub(super) fn has(&self, to: &Path, targets: &[Target]) -> Result<bool, Failure> {
        let table = match self.0.begin_read().map_err(failed)?.open_table(GETS) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(false),
            table => table.map_err(failed)?,
        };
        let row = table.get(to.as_os_str().as_bytes()).map_err(failed)?;
        Ok(row.and_then(|row| Row::decode(row.value())).is_some_and(|row| row.targets == targets))
    }

    /// Remembers that a `get` of `targets` makes `to`. The oldest of too many is forgotten. Durable on return.
    pub(super) fn begin(&self, to: &Path, targets: &[Target], now: u64) -> Result<(), Failure> {
        let row = serde_json::to_vec(&Row { since: now, targets: targets.to_vec() })?;
        self.write(|table| {
            table.insert(to.as_os_str().as_bytes(), &row[..])?;
            let mut rows = Vec::new();
            for row in table.iter()? {
                let (to, row) = row?;
                rows.push((Row::decode(row.value()).map_or(0, |row| row.since), to.value().to_owned()));
            }
            rows.sort_unstable();
            let surplus = rows.len().saturating_sub(GETS_MAX);
            rows.iter().take(surplus).try_for_each(|(_, to)| table.remove(&to[..]).map(drop))
        })
    }

    /// Forgets it. Durable on return.
    pub(super) fn end(&self, to: &Path) -> Result<(), Failure> {
        self.write(|table| table.remove(to.as_os_str().as_bytes()).map(drop))
    }

    fn write(
        &self,
        change: impl FnOnce(&mut redb::Table<'_, &'static [u8], &'static [u8]>) -> Result<(), redb::StorageError>,
    ) -> Result<(), Failure> {
        let txn = self.0.begin_write().map_err(failed)?;
        change(&mut txn.open_table(GETS).map_err(failed)?).map_err(failed)?;
        txn.commit().map_err(failed)
    }
}

impl Row {
    fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

fn failed(error: impl Into<redb::Error>) -> Failure {
    let error: redb::Error = error.into();
    Failure::from(error).while_doing("look up which gets are unfinished")
}

/// By the absolute path of the destination: JSON.
const GETS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("node.unfinished_gets");
const GETS_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use redb::backends::InMemoryBackend;

    use super::*;

    #[test]
    fn a_get_is_unfinished_until_it_ends() {
        let db = Arc::new(Database::builder().create_with_backend(InMemoryBackend::new()).unwrap());
        let unfinished = Unfinished::new(db.clone());
        let targets = |text: &str| vec![Target::parse(OsStr::new(text)).unwrap()];
        let has = |to: &str, target: &str| unfinished.has(Path::new(to), &targets(target)).unwrap();
        assert!(!has("/a", "docs"));
        unfinished.begin(Path::new("/a"), &targets("docs/x"), 7).unwrap();
        assert!(has("/a", "docs/x") && !has("/a", "docs") && !has("/b", "docs/x"));
        let table = db.begin_read().unwrap().open_table(GETS).unwrap();
        let row = table.get(&b"/a"[..]).unwrap().unwrap().value().to_owned();
        assert_eq!(String::from_utf8_lossy(&row), r#"{"since":7,"targets":[{"arena":"docs","path":"x"}]}"#);
        drop(table);
        unfinished.end(Path::new("/a")).unwrap();
        assert!(!has("/a", "docs/x"));
        for number in 0..=GETS_MAX {
            unfinished.begin(Path::new(&format!("/{number}")), &targets("docs"), 10 + number as u64).unwrap();
        }
        assert!(!has("/0", "docs") && has("/1", "docs") && has("/256", "docs"));
    }
}
