//! Files that have another path than before, or came back to it, and those of which nobody can tell whether they rotted.
//! Rules: spec/namespace.md, "Rot or edit" and "Moved".

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::MetadataExt,
};

use blobstore::{FileRow, FileState, Verified};
use namespace::{Decision, LastRead, ReadState, RelPath, SeenKind, decide};
use tracing::warn;
use tree::{Drift, Fingerprint, RangeSet};

use super::{
    pages,
    reconcile::{BATCH_FILES, Fresh, Reconcile},
};
use crate::failure::Failure;

/// A file that is linked under another path.
struct Elsewhere {
    path: RelPath,
    row: FileRow,
}

impl Reconcile<'_> {
    /// Asks the store what it remembers of the paths at which nothing is linked, and decides again.
    pub(super) fn recall_vanished(&mut self) -> Result<(), Failure> {
        let mut unknown: Vec<&mut Fresh> = self.fresh.iter_mut().filter(|file| file.last.is_none()).collect();
        for files in unknown.chunks_mut(BATCH_FILES) {
            let paths: Vec<&[u8]> = files.iter().map(|file| file.path.as_bytes()).collect();
            let remembered = self.node.inner.store.vanished(self.root, &paths)?;
            for (file, row) in files.iter_mut().zip(remembered) {
                let Some(row) = row.filter(|_| !self.accept) else { continue };
                let damaged = row.is_suspect() || !row.damaged.is_empty();
                let state = ReadState::Vanished { damaged };
                let last = LastRead { blob: row.blob, fingerprint: row.fingerprint, state };
                let seen = SeenKind::File { fingerprint: file.fingerprint, mode: file.mode };
                let witness = self.seen.witness(&file.path, file.fingerprint.device);
                if let Decision::Recheck(blob) = decide(None, Some(last), &seen, witness) {
                    file.recheck = Some(blob);
                    file.last = Some(row);
                    file.was_gone = true;
                }
            }
        }
        Ok(())
    }

    /// A file that is gone from one path and is fresh at another, with the same identity, was moved: it keeps its blob, and
    /// whatever is known of its damage. If its ctime moved and the watcher did not see why, it is read first.
    pub(super) fn relink_moved(&mut self) -> Result<(), Failure> {
        let linked = self.gone.iter().filter_map(|gone| Some((&gone.path, gone.linked.as_ref()?)));
        let known = linked.map(|(path, row)| (inode(as_read(row)), Elsewhere { path: path.clone(), row: row.clone() }));
        self.relink(known.collect(), false)
    }

    /// Takes out the files that may be further names (hard links) of linked ones.
    pub(super) fn take_further_names(&mut self) -> Vec<Fresh> {
        let may_be = |file: &Fresh| {
            let meta = || fs::symlink_metadata(self.dir.join(file.path.as_path()));
            file.last.is_none() && file.recheck.is_none() && meta().is_ok_and(|meta| meta.nlink() > 1)
        };
        let (names, fresh) = std::mem::take(&mut self.fresh).into_iter().partition(may_be);
        self.fresh = fresh;
        names
    }

    /// Like [`relink_moved`](Self::relink_moved) for files that have got a further name. Hashed, such a file would count as
    /// new, though it may have rotted.
    pub(super) fn relink_further_names(&mut self) -> Result<(), Failure> {
        let inodes: HashSet<_> = self.fresh.iter().map(|file| inode(&file.fingerprint)).collect();
        let mut known = HashMap::new();
        if !inodes.is_empty() {
            let mut linked = pages::linked(&self.node.inner.store, self.root, None);
            while let Some(path) = linked.peek()?.cloned() {
                let row = linked.take(&path)?.filter(|row| inodes.contains(&inode(as_read(row))));
                known.extend(row.map(|row| (inode(as_read(&row)), Elsewhere { path, row })));
            }
        }
        self.relink(known, true)
    }

    /// Links and publishes what is fresh, if it is one of the `known` files, which then lose their own names unless they
    /// `keep` them. Where only their ctimes differ, for a reason that nobody saw, it is to be read.
    fn relink(&mut self, mut known: HashMap<(u64, u64), Elsewhere>, keep: bool) -> Result<(), Failure> {
        if known.is_empty() {
            return Ok(());
        }
        let (mut moves, mut moved, mut fresh) = (Vec::new(), Vec::new(), Vec::new());
        for mut file in std::mem::take(&mut self.fresh) {
            let inode = inode(&file.fingerprint);
            let Some(other) = known.get(&inode) else {
                fresh.push(file);
                continue;
            };
            match as_read(&other.row).drift(&file.fingerprint) {
                Drift::None => {}
                Drift::Touched if file.recheck.is_none() && self.seen.explains_rename(&other.path, &file.path) => {}
                Drift::Touched if file.recheck.is_none() => {
                    file.recheck = Some(other.row.blob);
                    file.last = Some(other.row.clone());
                    fresh.push(file);
                    continue;
                }
                Drift::Touched => {
                    file.came_as = Some(other.row.blob);
                    fresh.push(file);
                    continue;
                }
                _ => {
                    fresh.push(file);
                    continue;
                }
            }
            moves.push(blobstore::Move {
                from: other.path.as_bytes().to_owned(),
                to: file.path.as_bytes().to_owned(),
                fingerprint: file.fingerprint,
                keep,
            });
            moved.push((other.row.blob, other.row.fingerprint.size, file));
            if !keep {
                known.remove(&inode);
            }
        }
        self.fresh = fresh;
        for (moves, moved) in moves.chunks(BATCH_FILES).zip(moved.chunks(BATCH_FILES)) {
            let done = self.node.inner.store.relink(self.root, moves)?;
            for (is_done, (blob, size, file)) in done.into_iter().zip(moved) {
                if is_done {
                    self.totals.moved += 1;
                    self.said(file.path.clone(), *blob, *size, file.fingerprint, file.mode);
                } else {
                    self.again.push(file.path.clone());
                }
            }
        }
        Ok(())
    }

    /// Records that a file has other bytes than it had, and that rot and an edit are both possible. Its last good version
    /// stands, or is published again if the path came back.
    pub(super) fn suspect(&mut self, file: Fresh, seen: Fingerprint, mode: u16) -> Result<(), Failure> {
        let Fresh { path, last, recheck, published, was_gone, .. } = file;
        let Some(blob) = recheck else { return Ok(()) };
        // Without a row, what was published had this very size and mtime.
        let last = last.filter(|row| row.blob == blob).unwrap_or(FileRow {
            blob,
            fingerprint: seen,
            damaged: RangeSet::new(),
            verified: Verified::default(),
            state: FileState::Settled,
        });
        let file = self.file(&path);
        let unwritten = !was_gone && self.seen.explains_ctime(&path);
        let Some(row) = self.node.inner.store.suspect(&file, &last, seen, unwritten)? else {
            self.again.push(path);
            return Ok(());
        };
        let (bytes, arena) = (row.damaged.total_bytes(), &self.arena.name);
        if row.is_suspect() {
            self.totals.suspected += 1;
            warn!(%arena, %path, %blob, bytes, "suspect file, not published: rot and an edit are both possible");
        } else {
            warn!(%arena, %path, %blob, bytes, "damage found; only the file's attributes were changed");
        }
        if published == Some(blob) {
            self.count(&SeenKind::File { fingerprint: seen, mode });
        } else {
            self.said(path, blob, last.fingerprint.size, seen, mode);
        }
        Ok(())
    }
}

/// The metadata that the file of `row` had when it was last read.
fn as_read(row: &FileRow) -> &Fingerprint {
    match &row.state {
        FileState::Suspect { read, .. } => read,
        _ => &row.fingerprint,
    }
}

fn inode(fingerprint: &Fingerprint) -> (u64, u64) {
    (fingerprint.device, fingerprint.inode)
}
