//! Where an arena's files are: on which file systems its root and the mount points in it were. Rows: spec/namespace.md;
//! what follows from them: spec/namespace.md, "Offline".

use std::collections::BTreeMap;

use redb::ReadableTable;
use serde::{Deserialize, Serialize};

use crate::{
    ArenaName, Namespace, NamespaceError, RelPath,
    namespace::rel_path,
    rows::{ANCHORS, decode, encode},
};

/// A directory, told apart from all others on all file systems of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// The file system's id: the same after a remount, whatever the device number is then.
    pub file_system: u64,
    /// The absolute path within the file system: `/` for its root.
    pub within: Vec<u8>,
    /// The directory's inode.
    pub inode: u64,
}

/// The anchors of one arena: of its root under `None`, and of the mount points in it under their paths.
pub type Anchors = BTreeMap<Option<RelPath>, Anchor>;

impl Namespace {
    /// Returns the anchors that were recorded last; none if the arena was never scanned.
    pub fn anchors(&self, arena: &ArenaName) -> Result<Anchors, NamespaceError> {
        self.read("list the anchors of an arena", |txn| {
            let table = txn.open_table(ANCHORS)?;
            let mut anchors = Anchors::new();
            for row in table.range((arena.as_str(), &[][..])..)? {
                let (key, row) = row?;
                let (of, path) = key.value();
                if of != arena.as_str() {
                    break;
                }
                let path = if path.is_empty() { None } else { Some(rel_path(path)?) };
                anchors.insert(path, decode(row.value())?);
            }
            Ok(anchors)
        })
    }

    /// Replaces the anchors of an arena, durable on return. No anchors are recorded of an arena that was removed meanwhile.
    pub fn set_anchors(&self, arena: &ArenaName, anchors: &Anchors) -> Result<(), NamespaceError> {
        self.write("record the anchors of an arena", |txn| {
            let is_held = txn.open_table(crate::rows::ARENAS)?.get(arena.as_str())?.is_some();
            let mut table = txn.open_table(ANCHORS)?;
            forget(&mut table, arena.as_str())?;
            for (path, anchor) in anchors.iter().filter(|_| is_held) {
                let path = path.as_ref().map_or(&[][..], RelPath::as_bytes);
                table.insert((arena.as_str(), path), &encode(anchor)?[..])?;
            }
            Ok(())
        })
    }
}

/// Removes the anchors of an arena.
pub(crate) fn forget(
    table: &mut redb::Table<'_, (&'static str, &'static [u8]), &'static [u8]>,
    arena: &str,
) -> Result<(), redb::Error> {
    // No arena's name has a NUL: the next name in order is behind this one.
    let end = format!("{arena}\0");
    Ok(table.retain_in((arena, &[][..])..(&end[..], &[][..]), |_, _| false)?)
}
