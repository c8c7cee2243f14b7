use std::{
    ffi::OsStr,
    ops::ControlFlow,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blobstore::Fetched;
use futures_util::{StreamExt, TryStreamExt, stream};
use namespace::{Content, EntryKind, RelPath};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::info;
use tree::UnixTime;

use super::{
    super::{Node, blocking, list::not_found},
    place::{Destination, Existing},
};
use crate::{
    event::{Copied, Event, FileName, NobodyListens, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

/// Trees on their way to a directory of the user's.
pub(super) struct Getting {
    pub(super) node: Node,
    reporter: Reporter,
    pub(super) destination: Arc<Destination>,
    /// The directory, for messages.
    dir: PathBuf,
    pub(super) done: Arc<AtomicU64>,
    totals: Mutex<Totals>,
}

#[derive(Clone, Default)]
struct Totals {
    files: u64,
    bytes: u64,
    bytes_received: u64,
    skipped_files: u64,
    failed_files: u64,
    /// Set if something failed for want of a reachable peer.
    unreachable: bool,
}

/// A file or link to be put at `to`.
pub(super) struct Job {
    pub(super) source: Target,
    pub(super) to: RelPath,
    pub(super) content: Content,
    pub(super) mtime: UnixTime,
}

/// How a file came to where it is.
pub(super) enum Got {
    Copied(Fetched),
    /// It was there already.
    Skipped,
}

impl Node {
    /// Puts what `targets` name into or at `to`, an absolute path, as `cp -r` would: proven, with mtimes and
    /// permissions. What is there already with the same bytes stays; what differs is left alone and reported.
    pub async fn get(&self, targets: Vec<Target>, to: PathBuf, reporter: &Reporter) -> Result<Code, Failure> {
        let started = Instant::now();
        let into = to.is_dir();
        if !into && targets.len() > 1 {
            return Err(Failure::new(Code::Usage, format!("{to:?} is not a directory, and there are several sources")));
        }
        let (dir, name) = if into { (to.clone(), None) } else { split(&to)? };
        let destination = Arc::new(Destination::open(&dir).while_doing(format!("open {dir:?}"))?);
        let getting = Arc::new(Getting {
            node: self.clone(),
            reporter: reporter.clone(),
            destination,
            dir,
            done: Arc::default(),
            totals: Mutex::default(),
        });
        // Half a catalog makes half a tree. A peer that never tells the rest must not keep the others' files from us.
        for peer in self.inner.peers.wait_for_catalogs(CATALOG_LIMIT).await {
            getting.totals().failed_files += 1;
            let reason = format!("what {peer} has is still coming in, so this may not be all; try again later");
            for target in &targets {
                let path = target.path.as_ref().map_or(&[][..], RelPath::as_bytes);
                let (file, reason) = (FileName::new(&target.arena, path), reason.clone());
                reporter.send(Event::Failed { file, reason, copy: None }).await?;
            }
        }
        for target in &targets {
            let top = name.clone().map_or_else(|| last_component(target), Ok)?;
            getting.get(target, &top).await.while_doing(format!("get {target}"))?;
        }
        let syncing = getting.clone();
        blocking(move || syncing.destination.sync().while_doing(format!("sync {:?}", syncing.dir))).await?;
        let totals = getting.totals().clone();
        let end = summary(json!({
            "files": totals.files,
            "bytes": totals.bytes,
            "bytes_received": totals.bytes_received,
            "skipped_files": totals.skipped_files,
            "failed_files": totals.failed_files,
            "seconds": started.elapsed().as_secs_f64(),
        }));
        let code = match totals {
            Totals { failed_files: 0, .. } => Code::Ok,
            Totals { unreachable: true, files: 0, .. } => Code::Unreachable,
            _ => Code::Some,
        };
        let Totals { files, bytes, failed_files: failed, .. } = totals;
        info!(path = %to.display(), files, bytes, failed, duration_ms = started.elapsed().as_millis() as u64, "brought");
        reporter.send(end).await?;
        Ok(code)
    }
}

impl Getting {
    fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets one target, with `top` as its name here.
    async fn get(self: &Arc<Self>, target: &Target, top: &RelPath) -> Result<(), Failure> {
        let (jobs, mut listed) = mpsc::channel(JOBS_AHEAD);
        let (getting, source, top) = (self.clone(), target.clone(), top.clone());
        let listing = blocking(move || getting.list(&source, &top, &jobs));
        let jobs = stream::poll_fn(move |context| listed.poll_recv(context));
        let getting = self.clone();
        let working = jobs.ready_chunks(BUNDLE_FILES_MAX).for_each_concurrent(BUNDLES_AT_ONCE, move |jobs| {
            let getting = getting.clone();
            async move {
                if !getting.reporter.is_closed() {
                    let _ = getting.run(jobs).await;
                }
            }
        });
        let (listing, ()) = tokio::join!(listing, working);
        listing?;
        if self.reporter.is_closed() { Err(NobodyListens.into()) } else { Ok(()) }
    }

    /// Makes the directories, and passes on what is to be put into them.
    fn list(&self, target: &Target, top: &RelPath, jobs: &mpsc::Sender<Job>) -> Result<(), Failure> {
        let mut outcome = Ok(());
        let mut empty = true;
        let prefix = target.path.as_ref().map_or(0, |path| path.as_bytes().len() + 1);
        self.node.inner.namespace.list(&target.arena, target.path.as_ref(), true, &mut |entry| {
            empty = false;
            let take = || -> Result<(), Failure> {
                let below = entry.path.as_bytes().get(prefix..).unwrap_or_default();
                let to = if below.is_empty() { top.clone() } else { [top.as_bytes(), below].join(&b'/').try_into()? };
                match (entry.kind.clone(), entry.mtime) {
                    (EntryKind::Leaf(content), Some(mtime)) => {
                        let source = Target { arena: target.arena.clone(), path: Some(entry.path.clone()) };
                        jobs.blocking_send(Job { source, to, content, mtime }).map_err(|_| NobodyListens)?;
                    }
                    _ => {
                        if let Err(error) = self.destination.make_dir(&to) {
                            self.totals().failed_files += 1;
                            let file = FileName::new(&target.arena, entry.path.as_bytes());
                            let reason = format!("create {:?}: {}", self.absolute(&to), tree::reason(&error));
                            self.reporter.send_blocking(Event::Failed { file, reason, copy: None })?;
                        }
                    }
                }
                Ok(())
            };
            match take() {
                Ok(()) => ControlFlow::Continue(()),
                Err(failure) => {
                    outcome = Err(failure);
                    ControlFlow::Break(())
                }
            }
        })?;
        outcome?;
        if empty {
            // An empty directory, or nothing.
            if target.path.is_some() {
                self.node.shown(target)?;
            } else if !self.node.inner.namespace.all_arenas()?.contains(&target.arena) {
                return Err(not_found(target));
            }
            self.destination.make_dir(top)?;
        }
        Ok(())
    }

    /// Puts files and links where they are to be, small files together.
    async fn run(self: &Arc<Self>, jobs: Vec<Job>) -> Result<(), NobodyListens> {
        let (small, others): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| job.small().is_some());
        let small: Arc<[Job]> = small.into();
        let bundle = async {
            for (job, got) in small.iter().zip(self.place_bundle(&small).await) {
                self.report(job, got).await?;
            }
            Ok(())
        };
        let getting = self.clone();
        let others = stream::iter(others.into_iter().map(Ok)).try_for_each_concurrent(OTHERS_AT_ONCE, move |job| {
            let getting = getting.clone();
            async move {
                let got = getting.place(&job).await;
                getting.report(&job, got).await
            }
        });
        tokio::try_join!(bundle, others).map(drop)
    }

    async fn report(&self, job: &Job, got: Result<Got, Failure>) -> Result<(), NobodyListens> {
        let (bytes, blob) = match job.content {
            Content::File { size, blob, .. } => (size, Some(blob)),
            _ => (0, None),
        };
        let line = |bytes_received| Copied {
            source: job.source.to_string(),
            destination: self.absolute(&job.to).to_string_lossy().into_owned(),
            blob,
            bytes,
            bytes_received,
            bytes_sent: None,
        };
        let event = match got {
            Ok(Got::Copied(fetched)) => {
                let mut totals = self.totals();
                totals.files += 1;
                totals.bytes += bytes;
                totals.bytes_received += fetched.bytes_received;
                Event::Copied(line(fetched.bytes_received))
            }
            Ok(Got::Skipped) => {
                self.totals().skipped_files += 1;
                Event::Skipped(line(0))
            }
            Err(failure) => {
                let mut totals = self.totals();
                totals.failed_files += 1;
                totals.unreachable |= failure.code == Code::Unreachable;
                let path = job.source.path.as_ref().map_or(&[][..], RelPath::as_bytes);
                Event::Failed { file: FileName::new(&job.source.arena, path), reason: failure.reason(), copy: None }
            }
        };
        self.reporter.send(event).await?;
        let files = self.totals().files;
        self.reporter.progress("getting", self.done.load(Ordering::Relaxed), None, files);
        Ok(())
    }

    async fn place(self: &Arc<Self>, job: &Job) -> Result<Got, Failure> {
        let (getting, to, content) = (self.clone(), job.to.clone(), job.content.clone());
        if blocking(move || getting.is_there(&to, &content)).await? {
            return Ok(Got::Skipped);
        }
        match &job.content {
            Content::Symlink { target } => {
                let (getting, to, target) = (self.clone(), job.to.clone(), target.clone());
                let mtime = job.mtime;
                blocking(move || getting.destination.symlink(&to, &target, mtime).while_doing(getting.creating(&to)))
                    .await?;
                Ok(Got::Copied(Fetched::default()))
            }
            Content::File { blob, size, mode } => {
                let _pass = self.node.inner.gate.pass(*size).await;
                let (done, reporter, files) = (self.done.clone(), self.reporter.clone(), self.totals().files);
                let on_bytes = move |bytes| {
                    let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
                    reporter.progress("getting", done, None, files);
                };
                let (getting, to) = (self.clone(), self.absolute(&job.to));
                let there = blocking(move || getting.node.target_of(&to)).await?;
                let near = there.into_iter().chain([job.source.clone()]).collect();
                let arriving = self.node.arrive(*blob, *size, &self.destination, &job.to, near, on_bytes);
                // What has come stays in the cache for the next time.
                let (arrived, fetched) = tokio::select! {
                    arrived = arriving => arrived?,
                    () = self.reporter.closed() => return Err(NobodyListens.into()),
                };
                let (getting, to, mode, mtime) = (self.clone(), job.to.clone(), *mode, job.mtime);
                blocking(move || {
                    let store = &getting.node.inner.store;
                    let publish = || {
                        let (mut staged, leftover) = arrived.take(store, &getting.destination, &to)?;
                        staged.set_attributes(mode, mtime)?;
                        staged.publish(&to)?;
                        leftover.forget(store)
                    };
                    publish().while_doing(getting.creating(&to))
                })
                .await?;
                Ok(Got::Copied(fetched))
            }
            _ => Err(not_found(&job.source)),
        }
    }

    /// Whether `content` is at `to` already. Fails if something else is.
    pub(super) fn is_there(&self, to: &RelPath, content: &Content) -> Result<bool, Failure> {
        let same = match (self.destination.existing(to).while_doing(self.creating(to))?, content) {
            (None, _) => return Ok(false),
            (Some(Existing::File(file, found)), Content::File { blob, size, .. }) => {
                found == *size
                    && tree::blob_id(&file, found).while_doing(format!("read {:?}", self.absolute(to)))? == *blob
            }
            (Some(Existing::Symlink(found)), Content::Symlink { target }) => found == *target,
            _ => false,
        };
        if same {
            return Ok(true);
        }
        Err(Failure::new(Code::Error, format!("something else is at {:?} already", self.absolute(to))))
    }

    /// What is being done, for errors.
    pub(super) fn creating(&self, path: &RelPath) -> String {
        format!("create {:?}", self.absolute(path))
    }

    fn absolute(&self, path: &RelPath) -> PathBuf {
        self.dir.join(path.as_path())
    }
}

/// The directory that `to` is in, and its name there.
pub(super) fn split(to: &Path) -> Result<(PathBuf, Option<RelPath>), Failure> {
    let name = to.file_name().unwrap_or(OsStr::new("")).as_bytes().to_owned();
    let name = RelPath::try_from(name).while_doing(format!("create {to:?}"))?;
    Ok((to.parent().unwrap_or(Path::new("/")).to_owned(), Some(name)))
}

/// What a target is called where it is put into a directory.
fn last_component(target: &Target) -> Result<RelPath, Failure> {
    let name = match &target.path {
        Some(path) => path.as_path().file_name().unwrap_or_default().as_bytes().to_owned(),
        None => target.arena.as_str().as_bytes().to_owned(),
    };
    Ok(name.try_into()?)
}

/// How long to wait for catalogs that are still coming in.
const CATALOG_LIMIT: Duration = Duration::from_secs(10);
/// So many small files are looked for, asked for and written together; so many bundles of them at a time.
const BUNDLE_FILES_MAX: usize = 128;
const BUNDLES_AT_ONCE: usize = 4;
/// So many others beside a bundle; their bytes are bounded by themselves.
const OTHERS_AT_ONCE: usize = 16;
const JOBS_AHEAD: usize = 256;
