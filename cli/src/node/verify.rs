use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime},
};

use blobstore::{FileRef, Item, Task, Verdict, Verified, scrub};
use namespace::ArenaName;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tree::{BlobId, RangeSet};

use super::{Node, blocking};
use crate::{
    event::{Event, FileName, NobodyListens, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

/// What is to be verified, and how much of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Scope {
    /// Arenas, directories and files; none for everything here.
    #[serde(default)]
    pub targets: Vec<Target>,
    /// Only so large a part of the bytes, above 0 and up to 1: what was verified longest ago.
    #[serde(default)]
    pub sample: Option<f64>,
    /// Only for so many seconds, beginning with what was verified longest ago.
    #[serde(default)]
    pub budget_s: Option<u64>,
}

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
    /// Bytes that there was no time for.
    left_bytes: u64,
}

/// Something to verify.
pub(super) struct Subject {
    pub(super) task: Task,
    /// `None` if it is in the cache.
    arena: Option<ArenaName>,
    blob: BlobId,
}

impl Node {
    /// Reads everything in scope, and reports all damage. Records it as quarantined.
    pub(crate) async fn verify(&self, scope: Scope, reporter: &Reporter) -> Result<Code, Failure> {
        let _turn = self.turn().await;
        let started = Instant::now();
        let report = reporter.clone();
        let node = self.clone();
        let totals =
            blocking(move || node.find_damage(&scope, &report, &mut |damaged| report_damage(&damaged, &report)));
        let totals = totals.await.while_doing("verify")?;
        reporter
            .send(summary(json!({
                "files": totals.files,
                "bytes": totals.bytes,
                "damaged_files": totals.damaged_files,
                "damaged_bytes": totals.damaged_bytes,
                "modified_files": totals.modified_files,
                "unreadable_files": totals.unreadable_files,
                "left_bytes": totals.left_bytes,
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
        scope: &Scope,
        reporter: &Reporter,
        found: &mut dyn FnMut(Damaged) -> Result<(), NobodyListens>,
    ) -> Result<VerifyTotals, Failure> {
        let subjects = self.in_scope(scope)?;
        let deadline = scope.budget_s.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let is_over = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let total = subjects.iter().map(|subject| subject.task.bytes).sum();
        let done = AtomicU64::new(0);
        let mut totals = VerifyTotals::default();
        for batch in batches(&subjects) {
            let batch = &subjects[batch];
            if is_over() {
                totals.left_bytes += batch.iter().map(|subject| subject.task.bytes).sum::<u64>();
                continue;
            }
            let judge = |subject: &Subject| {
                let progress = |bytes| {
                    let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
                    reporter.progress("verifying", done, Some(total), totals.files);
                };
                // A budget must not end in the middle of a disk image with nothing to show for it.
                let part_bytes = if deadline.is_some() { PART_BYTES } else { u64::MAX };
                self.judge(subject, part_bytes, &is_over, &progress)
            };
            let judged: Vec<_> = batch.par_iter().map(judge).collect();
            let mut verified = Vec::new();
            for (subject, judged) in batch.iter().zip(judged) {
                let Some((verdict, until)) = judged? else { continue };
                verified.push((subject.task.item.clone(), until));
                totals.files += 1;
                let left = if until.next == 0 { 0 } else { subject.task.bytes - until.next };
                totals.left_bytes += left;
                totals.bytes += subject.task.bytes - left;
                totals.take(subject, verdict, reporter, found)?;
            }
            self.inner.store.note_verified(&verified)?;
            if reporter.is_closed() {
                return Err(NobodyListens.into());
            }
        }
        Ok(totals)
    }

    /// Verifies a subject in parts of at most `part_bytes`, until it is done or `is_over`. Tells what was found, and how
    /// far it came; `None` if it is no longer here.
    pub(super) fn judge(
        &self,
        subject: &Subject,
        part_bytes: u64,
        is_over: &dyn Fn() -> bool,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<(Verdict, Verified)>, Failure> {
        let store = &self.inner.store;
        let mut task = subject.task.clone();
        if part_bytes == u64::MAX {
            task.verified.next = 0;
        }
        let mut all = Verdict::Sound;
        loop {
            let part = task.part(part_bytes);
            let verdict = match &task.item {
                Item::File(file) => store.verify_part(file, part, progress)?,
                Item::Cached(blob) => store.verify_cached(*blob, progress)?,
            };
            let Some(verdict) = verdict else { return Ok(None) };
            all = all.and(verdict);
            task.verified = task.after(part, now());
            if !matches!(all, Verdict::Sound | Verdict::Damaged { .. }) {
                task.verified = Verified { at: now(), next: 0 };
            }
            if task.verified.next == 0 || is_over() {
                return Ok(Some((all, task.verified)));
            }
        }
    }

    /// What is in scope, in the order in which it is to be verified.
    fn in_scope(&self, scope: &Scope) -> Result<Vec<Subject>, Failure> {
        let mut subjects = self.subjects(&scope.targets)?;
        if scope.sample.is_none() && scope.budget_s.is_none() {
            return Ok(subjects);
        }
        self.put_in_order(&mut subjects)?;
        if let Some(sample) = scope.sample {
            let tasks: Vec<Task> = subjects.iter().map(|subject| subject.task.clone()).collect();
            let total: u64 = tasks.iter().map(|task| task.bytes).sum();
            subjects.truncate(scrub::sample(&tasks, (total as f64 * sample).ceil() as u64));
        }
        Ok(subjects)
    }

    /// Puts first what was verified longest ago.
    pub(super) fn put_in_order(&self, subjects: &mut Vec<Subject>) -> Result<(), Failure> {
        for subject in &mut *subjects {
            subject.task.verified = self.inner.store.verified(&subject.task.item)?;
        }
        subjects.sort_by(|a, b| scrub::compare(&a.task, &b.task));
        Ok(())
    }

    /// What `targets` name; without any, all arenas held here and the cache.
    pub(super) fn subjects(&self, targets: &[Target]) -> Result<Vec<Subject>, Failure> {
        let arenas = self.inner.namespace.arenas()?.into_iter().filter(|arena| arena.dir.is_some());
        let arenas: Vec<ArenaName> = arenas.map(|arena| arena.name).collect();
        let whole = |arena: &ArenaName| Target { arena: arena.clone(), path: None };
        let everything: Vec<Target> = arenas.iter().map(whole).collect();
        let mut subjects = Vec::new();
        let task = |item, bytes| Task { item, bytes, verified: Verified::default() };
        for target in if targets.is_empty() { &everything[..] } else { targets } {
            let Some(root) = self.root(&target.arena).filter(|_| arenas.contains(&target.arena)) else {
                return Err(Failure::new(
                    Code::NotFound,
                    format!("this machine does not hold an arena {}", target.arena),
                ));
            };
            let before = subjects.len();
            for (path, row) in self.inner.store.files(root)? {
                let within = |dir: &namespace::RelPath| {
                    path.strip_prefix(dir.as_bytes()).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
                };
                if target.path.as_ref().is_none_or(within) {
                    let item = Item::File(FileRef { root, path });
                    let (arena, blob) = (Some(target.arena.clone()), row.blob);
                    subjects.push(Subject { task: task(item, row.fingerprint.size), arena, blob });
                }
            }
            if subjects.len() == before && target.path.is_some() {
                return Err(Failure::new(Code::NotFound, format!("no file is indexed at {target}")));
            }
        }
        if targets.is_empty() {
            for blob in self.inner.store.cached()? {
                let bytes = self.inner.store.cached_ranges(blob)?.total_bytes();
                subjects.push(Subject { task: task(Item::Cached(blob), bytes), arena: None, blob });
            }
        }
        Ok(subjects)
    }
}

impl Subject {
    fn name(&self) -> FileName {
        match (&self.arena, &self.task.item) {
            (Some(arena), Item::File(file)) => FileName::new(arena, &file.path),
            _ => FileName::default(),
        }
    }

    /// The subject, damaged.
    pub(super) fn damaged(&self, verdict: Verdict) -> Damaged {
        let place = match &self.task.item {
            Item::File(file) => self.arena.clone().map(|arena| (arena, file.clone())),
            Item::Cached(_) => None,
        };
        Damaged { name: self.name(), place, blob: self.blob, verdict }
    }
}

impl VerifyTotals {
    /// Counts and reports what was found of a subject.
    fn take(
        &mut self,
        subject: &Subject,
        verdict: Verdict,
        reporter: &Reporter,
        found: &mut dyn FnMut(Damaged) -> Result<(), NobodyListens>,
    ) -> Result<(), NobodyListens> {
        match verdict {
            Verdict::Sound => Ok(()),
            Verdict::Modified => {
                self.modified_files += 1;
                reporter.send_blocking(Event::Modified { file: subject.name() })
            }
            Verdict::Unreadable(error) => {
                self.unreadable_files += 1;
                reporter.send_blocking(Event::Failed { file: subject.name(), reason: error.to_string() })
            }
            verdict => {
                self.damaged_files += 1;
                self.damaged_bytes += damaged_bytes(&verdict, subject.task.bytes);
                found(subject.damaged(verdict))
            }
        }
    }
}

/// Subjects that are verified side by side: many small ones, or few large ones.
fn batches(subjects: &[Subject]) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (index, subject) in subjects.iter().enumerate() {
        match batches.last_mut().filter(|batch| batch.len() < BATCH_FILES && bytes < BATCH_BYTES) {
            Some(batch) => batch.end = index + 1,
            None => {
                batches.push(index..index + 1);
                bytes = 0;
            }
        }
        bytes += subject.task.bytes;
    }
    batches
}

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
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
        Verdict::Missing => size,
        _ => 0,
    }
}

const BATCH_FILES: usize = 1024;
const BATCH_BYTES: u64 = 1 << 30;
/// How much of a file is verified before looking at the clock.
const PART_BYTES: u64 = 256 << 20;
