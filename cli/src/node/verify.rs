use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::ControlFlow,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime},
};

use blobstore::{
    FileRef, FileRow, FileState, Item, Task, Verdict, Verified,
    scrub::{self, Agenda},
};
use namespace::{ArenaName, Place, RelPath};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tree::{BlobId, RangeSet};

use super::{Node, blocking, scrub::SUBJECTS_MAX};
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
    suspect_files: u64,
    modified_files: u64,
    pub(super) unreadable_files: u64,
    pub(super) offline_arenas: u64,
    /// Bytes that there was no time for.
    left_bytes: u64,
}

/// Something to verify.
pub(super) struct Subject {
    pub(super) task: Task,
    /// `None` if it is in the cache.
    arena: Option<ArenaName>,
    pub(super) blob: BlobId,
    /// Whether some of it is under quarantine.
    pub(super) is_quarantined: bool,
    /// Whether it awaits the user's decision.
    pub(super) is_suspect: bool,
}

impl Node {
    /// Reads everything in scope, and reports all damage. Records it as quarantined.
    pub(crate) async fn verify(&self, scope: Scope, reporter: &Reporter) -> Result<Code, Failure> {
        let _turn = self.turn().await;
        let started = Instant::now();
        let report = reporter.clone();
        let node = self.clone();
        let what = in_words("verify", &scope.targets);
        let done = blocking(move || {
            let mut suspects = Vec::new();
            let totals = node.find_damage(&scope, &report, &mut |damaged| match damaged.verdict {
                Verdict::Suspect { .. } => {
                    suspects.push(damaged);
                    Ok(())
                }
                _ => report_damage(&damaged, &report),
            })?;
            Ok((totals, suspects))
        });
        let (totals, suspects) = done.await.while_doing(what)?;
        for (number, suspect) in (0..).zip(&suspects) {
            reporter.send(self.suspect_event(suspect, number < EXPLAINED_MAX).await?).await?;
        }
        self.update_status().await?;
        reporter
            .send(summary(json!({
                "files": totals.files,
                "bytes": totals.bytes,
                "damaged_files": totals.damaged_files,
                "damaged_bytes": totals.damaged_bytes,
                "suspect_files": totals.suspect_files,
                "modified_files": totals.modified_files,
                "unreadable_files": totals.unreadable_files,
                "offline_arenas": totals.offline_arenas,
                "left_bytes": totals.left_bytes,
                "seconds": started.elapsed().as_secs_f64(),
            })))
            .await?;
        Ok(match totals {
            VerifyTotals { damaged_files: 1.., .. } | VerifyTotals { suspect_files: 1.., .. } => Code::Damage,
            VerifyTotals { unreadable_files: 1.., .. } | VerifyTotals { offline_arenas: 1.., .. } => Code::Some,
            _ => Code::Ok,
        })
    }

    /// Has the status tell how things stand after what was verified or mended.
    pub(super) async fn update_status(&self) -> Result<(), Failure> {
        let node = self.clone();
        blocking(move || node.look_what_is_due().map(drop)).await
    }

    /// Verifies file after file, and hands the damaged ones to `found` in order.
    pub(super) fn find_damage(
        &self,
        scope: &Scope,
        reporter: &Reporter,
        found: &mut dyn FnMut(Damaged) -> Result<(), NobodyListens>,
    ) -> Result<VerifyTotals, Failure> {
        let deadline = scope.budget_s.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let offline = self.offline_arenas(&scope.targets)?;
        for (arena, reason) in &offline {
            reporter.send_blocking(Event::Offline { arena: arena.to_string(), reason: reason.clone() })?;
        }
        let offline: Vec<ArenaName> = offline.into_keys().collect();
        let (mut bytes, mut left_subjects) = (0u64, 0usize);
        self.for_each_subject(&scope.targets, &offline, &mut |subject| {
            bytes = bytes.saturating_add(subject.task.bytes);
            left_subjects += 1;
            Ok(())
        })?;
        let wanted = scope.sample.map(|sample| (bytes as f64 * sample).ceil() as u64);
        let total = wanted.unwrap_or(bytes);
        let totals = VerifyTotals { offline_arenas: offline.len() as u64, ..VerifyTotals::default() };
        let (done, batch) = (AtomicU64::new(0), Vec::new());
        let mut run = Run { node: self, reporter, found, deadline, total, done, batch, batch_bytes: 0, totals };
        if scope.sample.is_none() && scope.budget_s.is_none() {
            self.for_each_subject(&scope.targets, &offline, &mut |subject| run.take(subject))?;
            run.judge_batch()?;
            return Ok(run.totals);
        }
        // The oldest first, as many at a time as there is room for. What has been verified is as old as this run, and
        // so it is not taken again; should the clock be set back meanwhile, the number of them all ends it.
        let (started, mut taken) = (now(), 0u64);
        while left_subjects > 0 {
            let mut agenda = Agenda::new(SUBJECTS_MAX);
            self.for_each_subject(&scope.targets, &offline, &mut |subject| {
                if !subject.task.is_done_since(started) {
                    agenda.offer(subject);
                }
                Ok(())
            })?;
            let mut first = agenda.into_first();
            if let Some(wanted) = wanted {
                first.truncate(scrub::sample(&first, wanted.saturating_sub(taken)));
            }
            if first.is_empty() {
                break;
            }
            left_subjects = left_subjects.saturating_sub(first.len());
            for subject in first {
                taken = taken.saturating_add(subject.task.bytes);
                run.take(subject)?;
            }
            run.judge_batch()?;
            if run.is_over() {
                run.totals.left_bytes += total.saturating_sub(taken);
                break;
            }
        }
        Ok(run.totals)
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
            let Some(mut verdict) = verdict else { return Ok(None) };
            if let Verdict::Suspect { data } = verdict {
                verdict = self.weigh(subject, data)?;
            }
            // A file whose disk is off is neither gone nor edited.
            if let (Some(arena), Item::File(file)) = (&subject.arena, &task.item)
                && !matches!(verdict, Verdict::Sound)
                && let Some(why) = self.out_of_reach(arena, &file.path)?
            {
                verdict = Verdict::Unreadable(io::Error::other(why));
            }
            if matches!(verdict, Verdict::Missing) && self.is_being_moved(subject)? {
                return Ok(None);
            }
            all = all.and(verdict);
            task.verified = task.after(part, now());
            if !matches!(all, Verdict::Sound | Verdict::Damaged { .. } | Verdict::Suspect { .. }) {
                task.verified = Verified { at: now(), next: 0 };
            }
            if task.verified.next == 0 || is_over() {
                return Ok(Some((all, task.verified)));
            }
        }
    }

    /// Whether a move is removing the file, or has removed it.
    fn is_being_moved(&self, subject: &Subject) -> Result<bool, Failure> {
        let (Some(arena), Item::File(file)) = (&subject.arena, &subject.task.item) else { return Ok(false) };
        let is_aside = |path| self.inner.moving.is_aside(&(arena.clone(), path));
        Ok(RelPath::try_from(file.path.clone()).is_ok_and(is_aside) || self.inner.store.file(file)?.is_none())
    }

    /// What a file is that lacks `data` and was found suspect, by what the watcher saw: edited, if a program wrote it and no pass
    /// has looked at it since; damaged, if only its attributes were changed.
    fn weigh(&self, subject: &Subject, data: RangeSet) -> Result<Verdict, Failure> {
        let (Some(arena), Item::File(file)) = (&subject.arena, &subject.task.item) else {
            return Ok(Verdict::Suspect { data });
        };
        let Ok(path) = RelPath::try_from(file.path.clone()) else { return Ok(Verdict::Suspect { data }) };
        let (signs, is_explained) = self.seen_at(arena, &path);
        if signs.may_have_written() || signs.moved_here {
            return Ok(Verdict::Modified);
        }
        if is_explained
            && let Some(FileRow { state: FileState::Suspect { read, .. }, .. }) = self.inner.store.file(file)?
            && self.inner.store.explain(file, read)?
        {
            return Ok(Verdict::Damaged { data, outboard: RangeSet::new(), unreadable: None });
        }
        Ok(Verdict::Suspect { data })
    }

    /// The arenas held here among `targets`, or among all without any, of which nothing can be read, and why.
    fn offline_arenas(&self, targets: &[Target]) -> Result<BTreeMap<ArenaName, String>, Failure> {
        let arenas = self.inner.namespace.arenas()?.into_iter().filter(|arena| arena.dir.is_some());
        let named = |arena: &ArenaName| targets.is_empty() || targets.iter().any(|target| target.arena == *arena);
        let mut offline = BTreeMap::new();
        for arena in arenas.map(|arena| arena.name).filter(named) {
            if let Err(why) = self.reach(&arena)? {
                offline.insert(arena, why);
            }
        }
        Ok(offline)
    }

    /// Hands over what `targets` name, in the order of paths; without any, all arenas held here and the cache. Of arenas that
    /// are not held here, it is what the cache has. Passes over the arenas `offline`. Only a page of it is in memory at a time.
    pub(super) fn for_each_subject(
        &self,
        targets: &[Target],
        offline: &[ArenaName],
        take: &mut dyn FnMut(Subject) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let store = &self.inner.store;
        let arenas = self.inner.namespace.arenas()?.into_iter().filter(|arena| arena.dir.is_some());
        let arenas: Vec<ArenaName> = arenas.map(|arena| arena.name).collect();
        let whole = |arena: &ArenaName| Target { arena: arena.clone(), path: None };
        let everything: Vec<Target> = arenas.iter().map(whole).collect();
        let named = if targets.is_empty() { &everything[..] } else { targets };
        for target in named.iter().filter(|target| !offline.contains(&target.arena)) {
            let Some(root) = self.root(&target.arena).filter(|_| arenas.contains(&target.arena)) else {
                let blobs = self.cached_below(target)?;
                if blobs.is_empty() {
                    let nothing =
                        format!("this machine does not hold an arena {}, and has nothing cached there", target.arena);
                    return Err(Failure::new(Code::NotFound, nothing));
                }
                blobs.into_iter().try_for_each(|blob| take(self.cached_subject(blob)?))?;
                continue;
            };
            let mut files =
                store.files_within(root, target.path.as_ref().map_or(b"", |path| path.as_bytes())).peekable();
            if files.peek().is_none() && target.path.is_some() {
                return Err(Failure::new(Code::NotFound, format!("no file is indexed at {target}")));
            }
            for file in files {
                let (path, row) = file?;
                let item = Item::File(FileRef { root, path });
                let task = Task { item, bytes: row.fingerprint.size, verified: row.verified.as_of(now()) };
                let (is_suspect, is_quarantined) = (row.is_suspect(), !row.damaged.is_empty());
                let arena = Some(target.arena.clone());
                take(Subject { task, arena, blob: row.blob, is_quarantined, is_suspect })?;
            }
        }
        if targets.is_empty() {
            for blob in store.cached()? {
                take(self.cached_subject(blob)?)?;
            }
        }
        Ok(())
    }

    /// The blobs of which the cache has something, of the files at and below a target.
    fn cached_below(&self, target: &Target) -> Result<BTreeSet<BlobId>, Failure> {
        let place = Place { arena: target.arena.clone(), path: target.path.clone() };
        let (store, mut blobs, mut failed) = (&self.inner.store, BTreeSet::new(), Ok(()));
        self.inner.namespace.files_below(&[place], &mut |_, file| {
            match store.cached_ranges(file.blob) {
                Ok(ranges) if !ranges.is_empty() => _ = blobs.insert(file.blob),
                Ok(_) => {}
                Err(error) => failed = Err(error),
            }
            if failed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(failed.map(|()| blobs)?)
    }

    fn cached_subject(&self, blob: BlobId) -> Result<Subject, Failure> {
        let (store, item) = (&self.inner.store, Item::Cached(blob));
        let (bytes, verified) = (store.cached_ranges(blob)?.total_bytes(), store.verified(&item)?.as_of(now()));
        let task = Task { item, bytes, verified };
        Ok(Subject { task, arena: None, blob, is_quarantined: false, is_suspect: false })
    }
}

/// Verifies subject after subject, a batch side by side: many small ones, or few large ones.
struct Run<'a> {
    node: &'a Node,
    reporter: &'a Reporter,
    found: &'a mut dyn FnMut(Damaged) -> Result<(), NobodyListens>,
    /// When there is no time left.
    deadline: Option<Instant>,
    /// Bytes that there are to verify, and that have been.
    total: u64,
    done: AtomicU64,
    batch: Vec<Subject>,
    batch_bytes: u64,
    totals: VerifyTotals,
}

impl Run<'_> {
    fn take(&mut self, subject: Subject) -> Result<(), Failure> {
        self.batch_bytes += subject.task.bytes;
        self.batch.push(subject);
        if self.batch.len() >= BATCH_FILES || self.batch_bytes >= BATCH_BYTES {
            self.judge_batch()?;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Verifies the batch, if there is time, and takes note of what was.
    fn judge_batch(&mut self) -> Result<(), Failure> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if self.is_over() {
            self.totals.left_bytes += batch.iter().map(|subject| subject.task.bytes).sum::<u64>();
            return Ok(());
        }
        let (deadline, files, done) = (self.deadline, self.totals.files, &self.done);
        let is_over = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let (node, reporter, total) = (self.node, self.reporter, self.total);
        let judge = |subject: &Subject| {
            let progress = |bytes| {
                let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
                reporter.progress("verifying", done, Some(total), files);
            };
            // A budget must not end in the middle of a disk image with nothing to show for it.
            let part_bytes = if deadline.is_some() { PART_BYTES } else { u64::MAX };
            node.judge(subject, part_bytes, &is_over, &progress)
        };
        let judged: Vec<_> = batch.par_iter().map(judge).collect();
        let mut verified = Vec::new();
        for (subject, judged) in batch.iter().zip(judged) {
            let Some((verdict, until)) = judged? else { continue };
            verified.push((subject.task.item.clone(), until));
            self.totals.files += 1;
            let left = if until.next == 0 { 0 } else { subject.task.bytes.saturating_sub(until.next) };
            self.totals.left_bytes += left;
            self.totals.bytes += subject.task.bytes - left;
            self.totals.take(subject, verdict, self.reporter, self.found)?;
        }
        self.node.inner.store.note_verified(&verified)?;
        if self.reporter.is_closed() {
            return Err(NobodyListens.into());
        }
        Ok(())
    }
}

impl AsRef<Task> for Subject {
    fn as_ref(&self) -> &Task {
        &self.task
    }
}

impl Subject {
    pub(super) fn name(&self) -> FileName {
        match (&self.arena, &self.task.item) {
            (Some(arena), Item::File(file)) => FileName::new(arena, &file.path),
            _ => FileName::default(),
        }
    }

    /// The file, as a command names it; `None` if it is in the cache.
    pub(super) fn target(&self) -> Option<Target> {
        let Item::File(file) = &self.task.item else { return None };
        Some(Target { arena: self.arena.clone()?, path: Some(file.path.clone().try_into().ok()?) })
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
                reporter.send_blocking(Event::Failed { file: subject.name(), reason: tree::reason(&error), copy: None })
            }
            verdict @ Verdict::Suspect { .. } => {
                self.suspect_files += 1;
                found(subject.damaged(verdict))
            }
            verdict => {
                self.damaged_files += 1;
                self.damaged_bytes += damaged_bytes(&verdict, subject.task.bytes);
                found(subject.damaged(verdict))
            }
        }
    }
}

/// What is being done to what, for errors.
pub(crate) fn in_words(verb: &str, targets: &[Target]) -> String {
    match targets {
        [] => format!("{verb} everything here"),
        [target] => format!("{verb} {target}"),
        [first, more @ ..] => format!("{verb} {first} and {} more", more.len()),
    }
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

/// Of so many suspect files it is said how they differ, which may cost a fetch each.
pub(super) const EXPLAINED_MAX: u64 = 100;
const BATCH_FILES: usize = 1024;
const BATCH_BYTES: u64 = 1 << 30;
/// How much of a file is verified before looking at the clock.
const PART_BYTES: u64 = 256 << 20;
