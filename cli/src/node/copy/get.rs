use std::{
    collections::BTreeSet,
    ffi::OsStr,
    ops::ControlFlow,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blobstore::Fetched;
use futures_util::{StreamExt, TryStreamExt, stream};
use namespace::{Content, EntryKind, PeerId, RelPath};
use peers::{Attributes, FileId, Lost};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::info;
use tree::{BlobId, Fingerprint, UnixTime};

use super::{
    super::{Node, blocking, list::not_found, patience::Patience, verify::now},
    attributes::KeepAttributes,
    describe::{Described, Linked, not_kept},
    place::{Destination, Existing, Traits},
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
    /// Bytes of all files of the targets, once they are listed; and of those that were skipped, linked or failed.
    all_bytes: OnceLock<u64>,
    spared_bytes: AtomicU64,
    totals: Mutex<Totals>,
    /// What became of files with several names.
    linked: Linked<(Option<PeerId>, FileId, BlobId), Placed>,
    patience: Patience,
}

/// A file that was placed by this command, or found.
struct Placed {
    to: RelPath,
    fingerprint: Fingerprint,
}

#[derive(Clone, Default)]
struct Totals {
    files: u64,
    bytes: u64,
    skipped_files: u64,
    failed_files: u64,
    hard_links: u64,
    special_files: u64,
    files_without_attributes: u64,
    files_without_permissions: u64,
    /// The machines that had something of it.
    holders: BTreeSet<Option<PeerId>>,
    /// Set if something failed for want of a reachable peer.
    unreachable: bool,
}

/// A file or link to be put at `to`.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) source: Target,
    pub(super) to: RelPath,
    pub(super) content: Content,
    pub(super) mtime: UnixTime,
    /// The machines that have it so; `None` is this one.
    pub(super) holders: Vec<Option<PeerId>>,
    /// What one of them says of it.
    pub(super) described: Described,
}

/// How a file came to where it is.
pub(super) enum Got {
    Copied(Fetched, Lost),
    /// It was there already.
    Skipped,
}

impl Node {
    /// Puts what `targets` name into or at `to`, an absolute path, as `cp -r` would: proven, with mtimes and
    /// permissions. What is there already with the same bytes stays; what differs is left alone and reported.
    pub(crate) async fn get(
        &self,
        targets: Vec<Target>,
        to: PathBuf,
        retry: Duration,
        reporter: &Reporter,
    ) -> Result<Code, Failure> {
        let started = Instant::now();
        let into = self.goes_into(&to, &targets).await?;
        if !into && targets.len() > 1 {
            return Err(Failure::new(Code::Usage, format!("{to:?} is not a directory, and there are several sources")));
        }
        let (dir, name) = if into { (to.clone(), None) } else { split(&to)? };
        let destination = Arc::new(Destination::open(&dir).while_doing(format!("open {dir:?}"))?);
        if !into {
            let (node, at, targets) = (self.clone(), to.clone(), targets.clone());
            blocking(move || node.inner.unfinished.begin(&at, &targets, now() / 1000)).await?;
        }
        let getting = Arc::new(Getting {
            node: self.clone(),
            reporter: reporter.clone(),
            destination,
            dir,
            done: Arc::default(),
            all_bytes: OnceLock::new(),
            spared_bytes: AtomicU64::new(0),
            totals: Mutex::default(),
            linked: Linked::default(),
            patience: Patience::new(self, reporter, retry, None),
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
        let (summing, all) = (getting.clone(), targets.clone());
        tokio::task::spawn_blocking(move || summing.sum(&all));
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
            "bytes_received": reporter.counts().received(),
            "bytes_wasted": reporter.counts().wasted(),
            "skipped_files": totals.skipped_files,
            "failed_files": totals.failed_files,
            "hard_links": totals.hard_links,
            "special_files": totals.special_files,
            "files_without_attributes": totals.files_without_attributes,
            "files_without_permissions": totals.files_without_permissions,
            "seconds": started.elapsed().as_secs_f64(),
        }));
        let code = match totals {
            Totals { failed_files: 0, .. } => Code::Ok,
            Totals { unreachable: true, files: 0, .. } => Code::Unreachable,
            _ => Code::Some,
        };
        if !into && code == Code::Ok {
            let (node, at) = (self.clone(), to.clone());
            blocking(move || node.inner.unfinished.end(&at)).await?;
        }
        let Totals { files, bytes, failed_files: failed, .. } = totals;
        info!(path = %to.display(), files, bytes, failed, duration_ms = started.elapsed().as_millis() as u64, "brought");
        reporter.send(end).await?;
        Ok(code)
    }

    /// Whether `targets` are put into the directory `to`, and do not become it: it is there, and not because the same was
    /// begun before and did not come to its end.
    async fn goes_into(&self, to: &Path, targets: &[Target]) -> Result<bool, Failure> {
        let (node, to, targets) = (self.clone(), to.to_owned(), targets.to_vec());
        blocking(move || Ok(to.is_dir() && !node.inner.unfinished.has(&to, &targets)?)).await
    }
}

impl Getting {
    fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sums the sizes of all files of the targets, for progress. Blocks.
    fn sum(&self, targets: &[Target]) {
        let mut bytes = 0;
        for target in targets {
            let listed = self.node.inner.namespace.list(&target.arena, target.path.as_ref(), true, &mut |entry| {
                if let EntryKind::Leaf(Content::File { size, .. }) = &entry.kind {
                    bytes += size;
                }
                if self.reporter.is_closed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            if listed.is_err() {
                return;
            }
        }
        let _ = self.all_bytes.set(bytes);
    }

    fn progress(&self) {
        let (done, spared) = (self.done.load(Ordering::Relaxed), self.spared_bytes.load(Ordering::Relaxed));
        let total = self.all_bytes.get().map(|all| all.saturating_sub(spared).max(done));
        let files = self.totals().files;
        self.reporter.progress("getting", done, total, files);
    }

    /// Returns how many files of a target cannot be got, as the machine says that has most of it.
    async fn special_files(&self, target: &Target) -> u64 {
        let (mut most, holders) = (0, self.totals().holders.clone());
        for holder in
            holders.into_iter().filter(|holder| holder.is_none_or(|peer| self.node.peers().is_connected(peer)))
        {
            most = most.max(self.node.special(holder, &target.arena, target.path.as_ref()).await);
        }
        most
    }

    /// Gets one target, with `top` as its name here.
    async fn get(self: &Arc<Self>, target: &Target, top: &RelPath) -> Result<(), Failure> {
        let (jobs, mut listed) = mpsc::channel(JOBS_AHEAD);
        let (getting, source, top) = (self.clone(), target.clone(), top.clone());
        let listing = blocking(move || getting.list(&source, &top, &jobs));
        let jobs = stream::poll_fn(move |context| listed.poll_recv(context));
        let getting = self.clone();
        // Others are asked about what comes next while some are on their way.
        let described = jobs.ready_chunks(BUNDLE_FILES_MAX).map(move |mut jobs| {
            let getting = getting.clone();
            async move {
                getting.describe(&mut jobs).await;
                jobs
            }
        });
        let getting = self.clone();
        let working = described.buffered(DESCRIBED_AHEAD).for_each_concurrent(BUNDLES_AT_ONCE, move |jobs| {
            let getting = getting.clone();
            async move {
                if !getting.reporter.is_closed() {
                    let _ = getting.run(jobs).await;
                }
            }
        });
        // Asked while files are on their way, it takes no round trip of its own.
        let listing = async {
            listing.await?;
            let before = self.patience.begin();
            let special = self.special_files(target).await;
            Ok::<_, Failure>((special, before))
        };
        let (listed, ()) = tokio::join!(listing, working);
        let (mut special, before) = listed?;
        if self.patience.has_changed(&before) {
            // Who was asked may have been away.
            special = special.max(self.special_files(target).await);
        }
        {
            let mut totals = self.totals();
            totals.special_files += special;
            totals.holders.clear();
        }
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
                        let (holders, described) = (entry.peers.clone(), Ok(None));
                        self.totals().holders.extend(&holders);
                        let job = Job { source, to, content, mtime, holders, described };
                        jobs.blocking_send(job).map_err(|_| NobodyListens)?;
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
        let is_small = |job: &Job| job.small().is_some() && job.file().is_none();
        let (small, others): (Vec<_>, Vec<_>) = jobs.into_iter().partition(is_small);
        let small: Arc<[Job]> = small.into();
        let bundle = async {
            let mut left = small;
            while !left.is_empty() {
                let attempt = self.patience.begin();
                let got = self.place_bundle(&left).await;
                let mut lost = None;
                let mut peers = BTreeSet::new();
                for (job, got) in left.iter().zip(&got) {
                    if let Err(failure) = got
                        && failure.code == Code::Unreachable
                    {
                        lost.get_or_insert(failure);
                        peers.extend(job.peers());
                    }
                }
                let is_again = match lost {
                    Some(failure) => self.patience.again(attempt, peers, failure).await,
                    None => false,
                };
                let mut again = Vec::new();
                for (job, got) in left.iter().zip(got) {
                    match got {
                        Err(failure) if is_again && failure.code == Code::Unreachable => again.push(job.clone()),
                        got => self.report(job, got).await?,
                    }
                }
                left = again.into();
            }
            Ok(())
        };
        let getting = self.clone();
        let others = stream::iter(others.into_iter().map(Ok)).try_for_each_concurrent(OTHERS_AT_ONCE, move |job| {
            let getting = getting.clone();
            async move {
                let got = loop {
                    let attempt = getting.patience.begin();
                    let got = getting.place_or_link(&job).await;
                    let Err(failure) = &got else { break got };
                    if !getting.patience.again(attempt, job.peers(), failure).await {
                        break got;
                    }
                };
                getting.report(&job, got).await
            }
        });
        tokio::try_join!(bundle, others).map(drop)
    }

    async fn report(&self, job: &Job, got: Result<Got, Failure>) -> Result<(), NobodyListens> {
        let (bytes, blob) = (job.bytes(), job.content.blob());
        let line = |bytes_received| Copied {
            source: job.source.to_string(),
            destination: self.absolute(&job.to).to_string_lossy().into_owned(),
            blob,
            bytes,
            bytes_received,
            bytes_sent: None,
            not_kept: Vec::new(),
        };
        let event = match got {
            Ok(Got::Copied(fetched, mut lost)) => {
                self.patience.came();
                lost.attributes |= self.node.inner.keep_attributes == KeepAttributes::No && job.has_attributes();
                let mut totals = self.totals();
                totals.files_without_attributes += u64::from(lost.attributes);
                totals.files_without_permissions += u64::from(lost.mode);
                totals.files += 1;
                totals.bytes += bytes;
                Event::Copied(Copied { not_kept: not_kept(lost), ..line(fetched.bytes_received) })
            }
            Ok(Got::Skipped) => {
                self.totals().skipped_files += 1;
                self.spared_bytes.fetch_add(bytes, Ordering::Relaxed);
                Event::Skipped(line(0))
            }
            Err(failure) => {
                self.spared_bytes.fetch_add(bytes, Ordering::Relaxed);
                let mut totals = self.totals();
                totals.failed_files += 1;
                totals.unreachable |= failure.code == Code::Unreachable;
                let path = job.source.path.as_ref().map_or(&[][..], RelPath::as_bytes);
                Event::Failed { file: FileName::new(&job.source.arena, path), reason: failure.reason(), copy: None }
            }
        };
        self.reporter.send(event).await?;
        self.progress();
        Ok(())
    }

    /// Places a file that has several names at its source; the second one, and those behind it, as names of what the first
    /// has become, if that still is what it was.
    async fn place_or_link(self: &Arc<Self>, job: &Job) -> Result<Got, Failure> {
        let holder = job.holders.first().copied().flatten();
        let slot = job.file().zip(job.content.blob());
        let slot = slot.and_then(|(file, blob)| self.linked.slot((holder, file, blob)));
        let Some(slot) = slot else { return self.place(job).await };
        let mut first = slot.lock_owned().await;
        let (getting, to, content) = (self.clone(), job.to.clone(), job.content.clone());
        let linking = blocking(move || {
            let is_linked = match &*first {
                Some(placed) if !getting.is_there(&to, &content)? => getting.link(placed, &to),
                _ => false,
            };
            Ok((is_linked, first))
        });
        let (is_linked, back) = linking.await?;
        first = back;
        if is_linked {
            self.totals().hard_links += 1;
            self.spared_bytes.fetch_add(job.bytes(), Ordering::Relaxed);
            return Ok(Got::Copied(Fetched::default(), Lost::default()));
        }
        let got = self.place(job).await?;
        let (getting, to) = (self.clone(), job.to.clone());
        let fingerprint = blocking(move || Ok(getting.fingerprint(&to))).await?;
        // Another program may have put something there; then it has another time.
        let fingerprint = fingerprint.filter(|now| (now.size, now.mtime) == (job.bytes(), job.mtime));
        if let Some(fingerprint) = fingerprint.filter(|_| first.is_none()) {
            *first = Some(Placed { to: job.to.clone(), fingerprint });
        }
        Ok(got)
    }

    /// Makes `to` another name of a file that was placed. `false` if that is another file by now, or cannot be done. Blocks.
    fn link(&self, placed: &Placed, to: &RelPath) -> bool {
        let Ok(Some(Existing::File(file, _))) = self.destination.existing(&placed.to) else { return false };
        let is_same =
            file.metadata().is_ok_and(|meta| !placed.fingerprint.drift(&Fingerprint::from(&meta)).is_other_file());
        is_same && self.destination.link(to, &file, false).is_ok()
    }

    fn fingerprint(&self, path: &RelPath) -> Option<Fingerprint> {
        match self.destination.existing(path) {
            Ok(Some(Existing::File(file, _))) => file.metadata().ok().map(|meta| Fingerprint::from(&meta)),
            _ => None,
        }
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
                Ok(Got::Copied(Fetched::default(), Lost::default()))
            }
            Content::File { blob, size, mode } => {
                let _pass = self.node.inner.gate.pass(*size).await;
                let getting = self.clone();
                let on_bytes = move |bytes| {
                    getting.done.fetch_add(bytes, Ordering::Relaxed);
                    getting.patience.came();
                    getting.progress();
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
                let (getting, to, traits) = (self.clone(), job.to.clone(), job.traits(*mode, &self.node));
                let lost = blocking(move || {
                    let store = &getting.node.inner.store;
                    let publish = || {
                        let (mut staged, leftover) = arrived.take(store, &getting.destination, &to)?;
                        let lost = staged.set_traits(traits)?;
                        staged.publish(&to)?;
                        leftover.forget(store).map(|()| lost)
                    };
                    publish().while_doing(getting.creating(&to))
                })
                .await?;
                Ok(Got::Copied(fetched, lost))
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

impl Job {
    /// Of a file with several names at its source: which file it is there.
    fn file(&self) -> Option<FileId> {
        self.described.as_ref().ok()?.as_ref()?.file
    }

    /// The other machines that have it.
    fn peers(&self) -> impl Iterator<Item = PeerId> {
        self.holders.iter().copied().flatten()
    }

    fn bytes(&self) -> u64 {
        if let Content::File { size, .. } = self.content { size } else { 0 }
    }

    fn attributes(&self) -> Option<&Attributes> {
        self.described.as_ref().ok()?.as_ref().map(|details| &details.attributes)
    }

    fn has_attributes(&self) -> bool {
        self.attributes().is_some_and(|attributes| !attributes.is_empty())
    }

    /// What the file is to be like.
    pub(super) fn traits(&self, mode: u16, node: &Node) -> Traits {
        let keep = node.inner.keep_attributes;
        let attributes = self.attributes().filter(|_| keep != KeepAttributes::No).cloned().unwrap_or_default();
        Traits { mode, mtime: self.mtime, attributes, keep }
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
const BUNDLES_AT_ONCE: usize = 8;
/// So many questions for details are under way.
const DESCRIBED_AHEAD: usize = 8;
/// So many others beside a bundle; their bytes are bounded by themselves.
const OTHERS_AT_ONCE: usize = 8;
const JOBS_AHEAD: usize = 256;
