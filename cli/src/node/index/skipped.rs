//! Entries that a pass does not index, with their reasons.

use std::os::unix::ffi::OsStrExt;

use namespace::{RelPath, WalkError, is_deleted_name};
use tracing::warn;

use super::{SPECIAL, Skipped, reconcile::Reconcile};
use crate::{
    event::{Event, FileName},
    failure::Failure,
};

impl Reconcile<'_> {
    pub(super) fn skip(&mut self, error: WalkError) -> Result<(), Failure> {
        self.totals.unreadable += 1;
        match error {
            WalkError::Unreadable { path, source } => {
                let reason = tree::reason(&source);
                warn!(arena = %self.arena.name, %path, reason, "not indexed");
                self.skipped(&path, reason)?;
                self.unreadable.push(path);
                Ok(())
            }
            WalkError::Name { path } => {
                let below = path.strip_prefix(&self.dir).unwrap_or(&path);
                let reason = "its path is too long";
                warn!(arena = %self.arena.name, path = %below.display(), reason, "not indexed");
                self.skipped_bytes(below.as_os_str().as_encoded_bytes(), reason.into())
            }
            WalkError::Root { source, .. } => Err(self.offline(tree::reason(&source))),
        }
    }

    pub(super) fn special(&mut self, path: &RelPath) -> Result<(), Failure> {
        self.totals.special += 1;
        let name = path.as_path().file_name().unwrap_or_default().as_bytes();
        let reason = if is_deleted_name(name) { "deleted, and still open in a program" } else { SPECIAL };
        self.skipped(path, reason.into())
    }

    pub(super) fn not_indexed(&mut self, path: &RelPath, reason: String) -> Result<(), Failure> {
        self.totals.unreadable += 1;
        warn!(arena = %self.arena.name, %path, reason, "not indexed");
        self.skipped(path, reason)
    }

    fn skipped(&mut self, path: &RelPath, reason: String) -> Result<(), Failure> {
        self.skipped_bytes(path.as_bytes(), reason)
    }

    fn skipped_bytes(&mut self, path: &[u8], reason: String) -> Result<(), Failure> {
        if self.skipped.len() < SKIPPED_MAX {
            self.skipped.push(Skipped { path: path.to_owned(), reason: reason.clone() });
        }
        let file = FileName::new(&self.arena.name, path);
        Ok(self.reporter.send_blocking(Event::Unindexed { file, reason })?)
    }
}

/// Skipped entries remembered of one pass.
const SKIPPED_MAX: usize = 10_000;
