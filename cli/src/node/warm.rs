//! Fetching ahead: what is missing of some files into the cache, once.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use blobstore::Fetched;
use bytesize::ByteSize;
use namespace::Place;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::info;
use tree::BlobId;

use super::{
    Node, blocking,
    patience::Patience,
    pins::{Bringing, Job, Manner, Why, cost, place_of},
};
use crate::{
    event::{Event, FileName, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

/// `POST /v1/warm`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WarmScope {
    /// What to fetch.
    pub targets: Vec<Target>,
    /// Whether only to say what is missing.
    #[serde(default)]
    pub dry_run: bool,
    /// How long to wait for machines that disconnect meanwhile.
    #[serde(default)]
    pub retry_s: u64,
}

/// What is being fetched.
struct Warming {
    reporter: Reporter,
    failed: mpsc::UnboundedSender<Event>,
    patience: Patience,
    is_over: AtomicBool,
    /// What is missing in all, in bytes.
    total: u64,
    sums: Mutex<Sums>,
}

#[derive(Default)]
struct Sums {
    files: u64,
    bytes: u64,
    /// What came, of files too that are not here yet.
    came: u64,
    failed_files: u64,
    /// Set if something failed for want of a reachable peer.
    is_unreachable: bool,
    /// The blobs that have arrived or failed, and are not tried again.
    tried: HashSet<BlobId>,
    /// What failed for want of a reachable peer in this attempt.
    lost: Vec<(Job, Failure)>,
}

/// What there is to fetch.
#[derive(Default)]
struct Need {
    jobs: Vec<Job>,
    missing_bytes: u64,
    /// What it will take on the disk, and what of it is there already takes.
    cost: u64,
    cached: u64,
    /// What cannot be fetched from anybody now.
    unreachable: HashSet<BlobId>,
    unreachable_files: u64,
}

impl Warming {
    fn sums(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, job: &Job, failure: &Failure) {
        let mut sums = self.sums();
        sums.tried.insert(job.blob);
        sums.failed_files += 1;
        sums.is_unreachable |= failure.code == Code::Unreachable;
        // Nothing will fit any more.
        if failure.code == Code::Limit {
            self.is_over.store(true, Ordering::Relaxed);
        }
        let _ = self.failed.send(Event::Failed { file: name_of(job), reason: failure.reason(), copy: None });
    }
}

impl Bringing for Warming {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed) || self.reporter.is_closed()
    }

    fn came(&self, bytes: u64) {
        let (came, files) = {
            let mut sums = self.sums();
            sums.came += bytes;
            (sums.came, sums.files)
        };
        self.patience.came();
        self.reporter.progress("warming", came.min(self.total), Some(self.total), files);
    }

    fn ended(&self, job: &Job, outcome: Result<Fetched, Failure>) {
        match outcome {
            Ok(_) => {
                let mut sums = self.sums();
                sums.tried.insert(job.blob);
                sums.files += 1;
                sums.bytes += job.size;
            }
            Err(failure) if failure.code == Code::Unreachable => self.sums().lost.push((job.clone(), failure)),
            Err(failure) => self.failed(job, &failure),
        }
    }
}

impl Node {
    /// Brings what is missing of the files at and below `targets` into the cache, if all of it fits there.
    pub(crate) async fn warm(&self, scope: WarmScope, reporter: &Reporter) -> Result<Code, Failure> {
        let began = Instant::now();
        let WarmScope { targets, dry_run, retry_s } = scope;
        let patience = Patience::new(self, reporter, Duration::from_secs(retry_s), None);
        self.wait_for_somebody().await;
        let coming = self.inner.peers.wait_for_catalogs(CATALOG_LIMIT).await;
        let places: Vec<Place> = targets.iter().map(place_of).collect();
        let what = targets.iter().map(Target::to_string).collect::<Vec<_>>().join(", ");
        let (node, near, reporting) = (self.clone(), places.clone(), reporter.clone());
        let looking = blocking(move || {
            targets.iter().try_for_each(|target| node.expect(target))?;
            node.needed(&near, dry_run, &HashSet::new(), Some(&reporting))
        });
        let mut need = looking.await.while_doing(format!("warm {what}"))?;
        self.check_fit(&need).while_doing(format!("warm {what}"))?;
        let mut failed_files = need.unreachable_files;
        for peer in coming {
            failed_files += 1;
            let reason = format!("what {peer} has is still coming in, so this may not be all; try again later");
            for Place { arena, path } in &places {
                let file = FileName::new(arena, path.as_ref().map_or(&[][..], |path| path.as_bytes()));
                reporter.send(Event::Failed { file, reason: reason.clone(), copy: None }).await?;
            }
        }
        let (failed, mut failures) = mpsc::unbounded_channel();
        let sums = Mutex::new(Sums {
            failed_files,
            is_unreachable: need.unreachable_files > 0,
            tried: std::mem::take(&mut need.unreachable),
            ..Sums::default()
        });
        let warming = Arc::new(Warming {
            reporter: reporter.clone(),
            failed,
            patience,
            is_over: AtomicBool::new(dry_run),
            total: need.missing_bytes,
            sums,
        });
        while !warming.is_over() && !need.jobs.is_empty() {
            let attempt = warming.patience.begin();
            let mut bringing = std::pin::pin!(self.bring_ahead(std::mem::take(&mut need.jobs), warming.clone()));
            loop {
                tokio::select! {
                    () = &mut bringing => break,
                    Some(event) = failures.recv() => reporter.send(event).await?,
                }
            }
            let lost = std::mem::take(&mut warming.sums().lost);
            if let Some((_, failure)) = lost.first() {
                let (namespace, blobs) = (self.inner.namespace.clone(), lost.iter().map(|(job, _)| job.blob));
                let blobs: Vec<_> = blobs.collect();
                let holders = blocking(move || {
                    let holders = blobs.into_iter().map(|blob| namespace.peers_with(blob));
                    Ok(holders.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect::<BTreeSet<_>>())
                });
                if !warming.is_over() && warming.patience.again(attempt, holders.await?, failure).await {
                    need.jobs = lost.into_iter().map(|(job, _)| job).collect();
                    continue;
                }
                lost.iter().for_each(|(job, failure)| warming.failed(job, failure));
            }
            while let Ok(event) = failures.try_recv() {
                reporter.send(event).await?;
            }
            let (node, near, warming) = (self.clone(), places.clone(), warming.clone());
            need = blocking(move || node.needed(&near, false, &warming.sums().tried, None)).await?;
        }
        if reporter.is_closed() {
            return Err(Failure::new(Code::Interrupted, "interrupted"));
        }
        let (totals, code) = {
            let sums = warming.sums();
            let Sums { files, bytes, failed_files, is_unreachable, .. } = *sums;
            let code = match (failed_files, files) {
                (0, _) => Code::Ok,
                (_, 0) if is_unreachable => Code::Unreachable,
                _ => Code::Some,
            };
            let seconds = began.elapsed().as_secs_f64();
            let mut totals = json!({
                "files": files, "bytes": bytes, "bytes_received": reporter.counts().received(), "bytes_wasted": reporter.counts().wasted(),
                "failed_files": failed_files, "seconds": seconds,
            });
            if dry_run {
                totals["dry_run"] = true.into();
                totals["missing_bytes"] = warming.total.into();
            }
            info!(files, bytes, failed = failed_files, duration_ms = began.elapsed().as_millis() as u64, "warmed");
            (totals, code)
        };
        reporter.send(summary(totals)).await?;
        Ok(code)
    }

    /// What is missing at and below `places`, without what was tried. With a `reporter`, what cannot be fetched from anybody now is
    /// reported; without one, it is tried like the rest. All that is missing is reported with `tells`.
    fn needed(
        &self,
        places: &[Place],
        tells: bool,
        tried: &HashSet<BlobId>,
        reporter: Option<&Reporter>,
    ) -> Result<Need, Failure> {
        let mut need = Need::default();
        let (store, mut counted, mut queued) = (&self.inner.store, HashSet::new(), HashSet::new());
        let mut each = |job: &Job, cached: u64, missing: Option<(u64, Why)>| {
            if reporter.is_some_and(Reporter::is_closed) {
                return Err(Failure::new(Code::Interrupted, "interrupted"));
            }
            // What is here of it shall not make room for the rest.
            store.touch(job.blob, job.size);
            if cached > 0 && !store.is_pinned(job.blob) && counted.insert(job.blob) {
                need.cached += cost(job.size, cached);
            }
            let Some((missing, why)) = missing.filter(|_| !tried.contains(&job.blob)) else { return Ok(()) };
            if let Some(reporter) = reporter
                && !matches!(why, Why::Coming | Why::NoRoom | Why::Failed(_))
            {
                need.unreachable_files += 1;
                need.unreachable.insert(job.blob);
                let (file, reason) = (name_of(job), why.to_string());
                reporter.send_blocking(Event::Failed { file, reason, copy: None })?;
                return Ok(());
            }
            if queued.insert(job.blob) {
                need.missing_bytes += missing;
                need.cost += cost(job.size, missing);
                if need.jobs.len() < JOBS_MAX {
                    need.jobs.push(job.clone());
                }
            }
            if tells && let Some(reporter) = reporter {
                reporter.send_blocking(Event::Missing { file: name_of(job), blob: job.blob, bytes: missing })?;
            }
            Ok(())
        };
        self.measure(
            places,
            &mut Manner { pins: false, all_reachable: false, jobs_max: 0, room: u64::MAX, each: &mut each },
        )?;
        Ok(need)
    }

    /// Fails if the cache cannot have all of it at a time.
    fn check_fit(&self, need: &Need) -> Result<(), Failure> {
        let usage = self.inner.store.cache_usage()?;
        let shown = |bytes| ByteSize(bytes).display().iec();
        if need.cost > 0 && need.cached.saturating_add(need.cost) > usage.limit {
            let (all, limit) = (shown(need.cached + need.cost), shown(usage.limit));
            return Err(Failure::new(Code::Limit, format!("it takes {all} in the cache, whose limit is {limit}"))
                .hint("raise it with: blob cache limit SIZE; or keep less, beside that limit, with: blob pin"));
        }
        let room = (usage.free + usage.bytes.saturating_sub(need.cached)).saturating_sub(usage.keep_free);
        if need.cost > room {
            let (cost, room) = (shown(need.cost), shown(room));
            return Err(Failure::new(
                Code::Limit,
                format!("{cost} are missing here, and the disk has room for {room}"),
            )
            .hint("blob cache stat shows what is free, and what cache.keep_free keeps so"));
        }
        Ok(())
    }

    /// Waits for a moment until some peer is connected: this machine may have begun just now.
    async fn wait_for_somebody(&self) {
        let mut moves = self.inner.peers.moves();
        let wait = async {
            while self.connected().is_empty() && !self.inner.peers.roster().peers().is_empty() {
                if moves.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(SOMEBODY_LIMIT, wait).await;
    }
}

fn name_of(job: &Job) -> FileName {
    FileName::new(&job.file.arena, job.file.path.as_ref().map_or(&[][..], |path| path.as_bytes()))
}

const CATALOG_LIMIT: Duration = Duration::from_secs(10);
const SOMEBODY_LIMIT: Duration = Duration::from_secs(5);
/// So many blobs are brought before it is looked for more.
const JOBS_MAX: usize = 16_384;
