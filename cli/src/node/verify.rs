use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use blobstore::{FileRef, FileRow, Verdict};
use namespace::ArenaName;
use rayon::prelude::*;
use serde_json::json;
use tree::{BlobId, Geometry, RangeSet};

use super::{Node, blocking};
use crate::{
    event::{Event, FileName, NobodyListens, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

/// A file whose bytes, or whose outboard, do not prove.
pub(super) struct Damaged {
    pub(super) name: FileName,
    /// Where it is; `None` if it is in the cache, which forgets damage and fetches anew.
    pub(super) place: Option<(ArenaName, FileRef)>,
    pub(super) blob: BlobId,
    pub(super) verdict: Verdict,
}

/// What verifying came to.
#[derive(Default)]
pub(super) struct VerifyTotals {
    files: u64,
    bytes: u64,
    damaged_files: u64,
    damaged_bytes: u64,
    modified_files: u64,
    pub(super) unreadable_files: u64,
}

/// Something to verify.
enum Item {
    File(ArenaName, FileRef, FileRow),
    /// With how many bytes.
    Cached(BlobId, u64),
}

impl Node {
    /// Reads everything here, or what `targets` name, and reports all damage. Records it as quarantined.
    pub async fn verify(&self, targets: Vec<Target>, reporter: &Reporter) -> Result<Code, Failure> {
        let _turn = self.turn().await;
        let started = Instant::now();
        let report = reporter.clone();
        let node = self.clone();
        let totals =
            blocking(move || node.find_damage(&targets, &report, &mut |damaged| report_damage(&damaged, &report)));
        let totals = totals.await.while_doing("verify")?;
        reporter
            .send(summary(json!({
                "files": totals.files,
                "bytes": totals.bytes,
                "damaged_files": totals.damaged_files,
                "damaged_bytes": totals.damaged_bytes,
                "modified_files": totals.modified_files,
                "unreadable_files": totals.unreadable_files,
                "seconds": started.elapsed().as_secs_f64(),
            })))
            .await?;
        Ok(match totals {
            VerifyTotals { damaged_files: 1.., .. } => Code::Damage,
            VerifyTotals { unreadable_files: 1.., .. } => Code::Some,
            _ => Code::Ok,
        })
    }

    /// Verifies file after file, and hands the damaged ones to `found` in order.
    pub(super) fn find_damage(
        &self,
        targets: &[Target],
        reporter: &Reporter,
        found: &mut dyn FnMut(Damaged) -> Result<(), NobodyListens>,
    ) -> Result<VerifyTotals, Failure> {
        let items = self.items(targets)?;
        let total = items.iter().map(bytes_of).sum();
        let done = AtomicU64::new(0);
        let mut totals = VerifyTotals::default();
        for batch in items.chunks(BATCH_FILES) {
            let judged: Vec<_> = batch
                .par_iter()
                .map(|item| {
                    self.judge(item, &|bytes| {
                        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
                        reporter.progress("verifying", done, Some(total), totals.files);
                    })
                })
                .collect();
            for (item, judged) in batch.iter().zip(judged) {
                let Some(verdict) = judged? else { continue };
                totals.files += 1;
                totals.bytes += bytes_of(item);
                let name = match item {
                    Item::File(arena, file, _) => FileName::new(arena, &file.path),
                    Item::Cached(..) => FileName::default(),
                };
                match (verdict, item) {
                    (Verdict::Sound, _) => {}
                    (Verdict::Modified, _) => {
                        totals.modified_files += 1;
                        reporter.send_blocking(Event::Modified { file: name })?;
                    }
                    (Verdict::Unreadable(error), _) => {
                        totals.unreadable_files += 1;
                        reporter.send_blocking(Event::Failed { file: name, reason: error.to_string() })?;
                    }
                    (verdict, item) => {
                        let (place, blob) = match item {
                            Item::File(arena, file, row) => (Some((arena.clone(), file.clone())), row.blob),
                            Item::Cached(blob, _) => (None, *blob),
                        };
                        totals.damaged_files += 1;
                        totals.damaged_bytes += damaged_bytes(&verdict, bytes_of(item));
                        found(Damaged { name, place, blob, verdict })?;
                    }
                }
            }
            if reporter.is_closed() {
                return Err(NobodyListens.into());
            }
        }
        Ok(totals)
    }

    fn judge(&self, item: &Item, progress: &(dyn Fn(u64) + Sync)) -> Result<Option<Verdict>, Failure> {
        Ok(match item {
            Item::File(_, file, _) => self.inner.store.verify_file(file, progress)?,
            Item::Cached(blob, _) => self.inner.store.verify_cached(*blob, progress)?,
        })
    }

    /// What `targets` name; without any, all arenas held here and the cache.
    fn items(&self, targets: &[Target]) -> Result<Vec<Item>, Failure> {
        let arenas = self.inner.namespace.arenas()?.into_iter().filter(|arena| arena.dir.is_some());
        let arenas: Vec<ArenaName> = arenas.map(|arena| arena.name).collect();
        let whole = |arena: &ArenaName| Target { arena: arena.clone(), path: None };
        let everything: Vec<Target> = arenas.iter().map(whole).collect();
        let mut items = Vec::new();
        for target in if targets.is_empty() { &everything[..] } else { targets } {
            let Some(root) = self.root(&target.arena).filter(|_| arenas.contains(&target.arena)) else {
                return Err(Failure::new(
                    Code::NotFound,
                    format!("this machine does not hold an arena {}", target.arena),
                ));
            };
            let before = items.len();
            for (path, row) in self.inner.store.files(root)? {
                let within = |dir: &namespace::RelPath| {
                    path.strip_prefix(dir.as_bytes()).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
                };
                if target.path.as_ref().is_none_or(within) {
                    items.push(Item::File(target.arena.clone(), FileRef { root, path }, row));
                }
            }
            if items.len() == before && target.path.is_some() {
                return Err(Failure::new(Code::NotFound, format!("no file is indexed at {target}")));
            }
        }
        if targets.is_empty() {
            for blob in self.inner.store.cached()? {
                items.push(Item::Cached(blob, self.inner.store.cached_ranges(blob)?.total_bytes()));
            }
        }
        Ok(items)
    }
}

fn bytes_of(item: &Item) -> u64 {
    match item {
        Item::File(_, _, row) => row.fingerprint.size,
        Item::Cached(_, bytes) => *bytes,
    }
}

/// Reports what is wrong with one file: one line for its data and one for its outboard.
fn report_damage(damaged: &Damaged, reporter: &Reporter) -> Result<(), NobodyListens> {
    let Damaged { name, blob, verdict, .. } = damaged;
    let lines: Vec<(&str, RangeSet)> = match verdict {
        Verdict::Damaged { data, outboard, .. } => vec![("data", data.clone()), ("outboard", outboard.clone())],
        _ => vec![("missing", RangeSet::new())],
    };
    for (what, ranges) in lines.into_iter().filter(|(what, ranges)| *what == "missing" || !ranges.is_empty()) {
        let event = Event::Damage { file: name.clone(), blob: *blob, what: what.to_owned(), ranges };
        reporter.send_blocking(event)?;
    }
    Ok(())
}

fn damaged_bytes(verdict: &Verdict, size: u64) -> u64 {
    match verdict {
        Verdict::Damaged { data, .. } => data.total_bytes(),
        Verdict::Missing => Geometry::new(size).all().len(),
        _ => 0,
    }
}

const BATCH_FILES: usize = 256;
