//! The daemon verifies everything it holds, again and again, when nobody else wants the disk. What is next, and how
//! fast, is decided by `blobstore::scrub`. What was found stands in the rows; a restart goes on where it was.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use blobstore::{
    Consent, Verdict,
    scrub::{self, Agenda, Tally},
};
use peers::Class;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id,
};
use tokio::{sync::watch, time::sleep};
use tracing::{debug, error, info, warn};

use super::{
    Node, blocking,
    verify::{Damaged, Subject, now},
};
use crate::failure::Failure;

/// How scrubbing is set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScrubSettings {
    /// Within what time everything is verified.
    pub period: Duration,
    /// Bytes read a second, at most.
    pub rate: u64,
    /// Whether damage is mended at once.
    pub repair: bool,
}

/// What verifying has come to, as of the beginning of the latest round of scrubbing, or the end of the last `verify` or `repair`.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct ScrubStatus {
    /// Everything here was verified since then, in milliseconds since 1970; none if something never was, by anybody.
    pub all_since: Option<u64>,
    /// Bytes that are due now.
    pub due_bytes: u64,
    /// Time of the latest verification, in milliseconds since 1970; `None` for never.
    pub last: Option<u64>,
    /// Time when the first file is due, in milliseconds since 1970; `None` without files.
    pub next: Option<u64>,
    /// Files under quarantine, in all or part; suspect ones are counted apart.
    pub damaged_files: u64,
    /// Files that await the user's decision.
    pub suspect_files: u64,
    /// Files that this daemon found damaged, and mended, since it started.
    pub found_files: u64,
    pub repaired_files: u64,
}

impl Node {
    /// Verifies for as long as `stopped` says nothing.
    pub(crate) async fn scrub(&self, settings: ScrubSettings, mut stopped: watch::Receiver<bool>) {
        let run = async {
            let threads =
                ThreadPoolBuilder::new().num_threads(1).thread_name(|_| "scrub".into()).start_handler(be_idle);
            let threads = match threads.build() {
                Ok(threads) => Arc::new(threads),
                Err(error) => return error!(reason = tree::reason(&error), "nothing is verified by itself"),
            };
            loop {
                let wait = match self.scrub_round(settings, &threads).await {
                    Ok(wait) => wait,
                    Err(failure) => {
                        let wait_ms = ROUND_MAX.as_millis() as u64;
                        warn!(reason = failure.reason(), wait_ms, "scrubbing failed; it will be tried again");
                        ROUND_MAX
                    }
                };
                sleep(wait.clamp(ROUND_MIN, ROUND_MAX)).await;
            }
        };
        tokio::select! {
            () = run => {}
            _ = stopped.wait_for(|&stop| stop) => {}
        }
    }

    /// What scrubbing has come to.
    pub(crate) fn scrub_status(&self) -> ScrubStatus {
        self.inner.scrub.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Verifies what is due: the first of it, for everything may be more than there is room for in memory. Tells when the
    /// next round is to be.
    async fn scrub_round(&self, settings: ScrubSettings, threads: &Arc<ThreadPool>) -> Result<Duration, Failure> {
        let node = self.clone();
        let agenda = blocking(move || node.look_what_is_due()).await?;
        let (is_all, subjects) = (agenda.is_complete(), agenda.into_first());
        let due_bytes = self.scrub_status().due_bytes;
        if due_bytes > 0 {
            info!(bytes = due_bytes, "scrubbing what was not verified for long");
        }
        // A little at a time, so that whoever wants the disk for something else need not wait.
        let part_bytes = settings.rate.clamp(PART_BYTES_MIN, PART_BYTES_MAX);
        let (mut batch, mut batch_bytes) = (Vec::new(), 0);
        for subject in subjects {
            if scrub::due(&subject.task, settings.period) > now() {
                let wait = scrub::due(&subject.task, settings.period) - now();
                self.scrub_batch(&mut batch, part_bytes, settings, threads).await?;
                return Ok(Duration::from_millis(wait));
            }
            batch_bytes += subject.task.bytes;
            batch.push(subject);
            if batch_bytes >= part_bytes || batch.len() >= BATCH_FILES {
                self.scrub_batch(&mut batch, part_bytes, settings, threads).await?;
                batch_bytes = 0;
            }
        }
        self.scrub_batch(&mut batch, part_bytes, settings, threads).await?;
        // What there was no room for may be due too.
        Ok(if is_all { settings.period } else { Duration::ZERO })
    }

    /// Looks at everything here: what is to be verified next, and for the status, how things stand.
    pub(super) fn look_what_is_due(&self) -> Result<Agenda<Subject>, Failure> {
        let (mut agenda, mut tally) = (Agenda::new(SUBJECTS_MAX), Tally::default());
        let (mut damaged_files, mut suspect_files) = (0, 0);
        let (period, now) = (self.inner.scrub_settings.period, now());
        self.for_each_subject(&[], &[], &mut |subject| {
            tally.add(&subject.task, period, now);
            damaged_files += u64::from(subject.is_quarantined && !subject.is_suspect);
            suspect_files += u64::from(subject.is_suspect);
            agenda.offer(subject);
            Ok(())
        })?;
        self.update_scrub(|status| {
            let (all_since, due_bytes) = (tally.all_since(), tally.due_bytes);
            let (last, next) = (Some(tally.last).filter(|&last| last > 0), tally.next());
            *status = ScrubStatus { all_since, due_bytes, last, next, damaged_files, suspect_files, ..status.clone() };
        });
        Ok(agenda)
    }

    /// Verifies the subjects of `batch`, part by part, and pauses after each part to keep the rate.
    async fn scrub_batch(
        &self,
        batch: &mut Vec<Subject>,
        part_bytes: u64,
        settings: ScrubSettings,
        threads: &Arc<ThreadPool>,
    ) -> Result<(), Failure> {
        let mut left = std::mem::take(batch);
        while !left.is_empty() {
            let started = Instant::now();
            let turn = self.turn().await;
            let (node, threads) = (self.clone(), threads.clone());
            let work = move || threads.install(|| node.scrub_part(left, part_bytes));
            let (damaged, bytes, rest) = blocking(work).await?;
            drop(turn);
            left = rest;
            for damaged in damaged {
                self.scrub_found(damaged, settings.repair).await?;
            }
            sleep(scrub::pause(bytes, started.elapsed(), settings.rate)).await;
        }
        Ok(())
    }

    /// Verifies the first of `subjects`, up to `part_bytes`. Gives what is damaged, how much was read, and what is left.
    fn scrub_part(
        &self,
        subjects: Vec<Subject>,
        part_bytes: u64,
    ) -> Result<(Vec<Damaged>, u64, Vec<Subject>), Failure> {
        let (mut damaged, mut verified, mut bytes, mut left) = (Vec::new(), Vec::new(), 0, Vec::new());
        for mut subject in subjects {
            if bytes >= part_bytes {
                left.push(subject);
                continue;
            }
            let read = subject.task.part(part_bytes).len();
            let Some((verdict, until)) = self.judge(&subject, part_bytes, &|| true, &|_| {})? else { continue };
            bytes += read;
            verified.push((subject.task.item.clone(), until));
            match verdict {
                // An edited file is the scanner's business.
                Verdict::Sound | Verdict::Modified => {}
                Verdict::Unreadable(error) => {
                    let name = subject.name();
                    let reason = tree::reason(&error);
                    warn!(arena = name.arena, path = name.path, blob = %subject.blob, reason, "cannot be verified");
                }
                verdict => damaged.push(subject.damaged(verdict)),
            }
            if until.next > 0 {
                subject.task.verified = until;
                left.push(subject);
            }
        }
        self.inner.store.note_verified(&verified)?;
        debug!(bytes, "scrubbed");
        Ok((damaged, bytes, left))
    }

    async fn scrub_found(&self, damaged: Damaged, repair: bool) -> Result<(), Failure> {
        let (what, bytes) = match &damaged.verdict {
            Verdict::Damaged { data, .. } if !data.is_empty() => ("data", data.total_bytes()),
            Verdict::Damaged { .. } => ("outboard", 0),
            Verdict::Suspect { data } => ("suspect", data.total_bytes()),
            _ => ("missing", 0),
        };
        let (name, blob) = (&damaged.name, damaged.blob);
        warn!(arena = name.arena, path = name.path, %blob, what, bytes, "scrubbing found damage");
        self.update_scrub(|status| status.found_files += 1);
        if !repair || matches!(damaged.verdict, Verdict::Suspect { .. }) {
            return Ok(());
        }
        let _turn = self.turn().await;
        let mended = self.mend(Class::Background, Consent::Damage, &damaged).await?;
        if mended.reason.is_none() {
            self.update_scrub(|status| status.repaired_files += 1);
        }
        Ok(())
    }

    fn update_scrub(&self, update: impl FnOnce(&mut ScrubStatus)) {
        update(&mut self.inner.scrub.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Gives way to everybody: Linux derives idle I/O priority from the idle scheduling class.
fn be_idle(_: usize) {
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    if let Err(error) = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle) {
        warn!(reason = tree::reason(&error), "scrubbing does not run at idle priority");
    }
}

const PART_BYTES_MIN: u64 = 1 << 20;
const PART_BYTES_MAX: u64 = 64 << 20;
const BATCH_FILES: usize = 1000;
/// So many are in memory for a round: some megabytes. Each round reads all rows once.
pub(super) const SUBJECTS_MAX: usize = 10_000;
/// New files become due without anybody saying so.
const ROUND_MAX: Duration = Duration::from_secs(3600);
const ROUND_MIN: Duration = Duration::from_secs(1);
