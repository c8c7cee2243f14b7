use std::{
    ffi::OsStr,
    io::{self, Write},
    ops::ControlFlow,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blobstore::{Fetched, Presence};
use futures_util::{StreamExt, stream};
use namespace::{Content, EntryKind, RelPath};
use serde_json::json;
use tokio::sync::mpsc;
use tree::{BlobId, ByteRange, UnixTime};

use super::{
    Node, blocking,
    list::not_found,
    place::{Destination, Existing},
    read::READ_BYTES_MAX,
};
use crate::{
    event::{Copied, Event, FileName, NobodyListens, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

/// Trees on their way to a directory of the user's.
struct Getting {
    node: Node,
    reporter: Reporter,
    destination: Destination,
    /// The directory, for messages.
    dir: PathBuf,
    done: Arc<AtomicU64>,
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
struct Job {
    source: Target,
    to: RelPath,
    content: Content,
    mtime: UnixTime,
}

/// How a file came to where it is.
enum Arrived {
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
        let destination = Destination::open(&dir).while_doing(format!("open {dir:?}"))?;
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
                reporter.send(Event::Failed { file, reason }).await?;
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
        let working = jobs.for_each_concurrent(FILES_AT_ONCE, move |job| {
            let getting = getting.clone();
            async move {
                if !getting.reporter.is_closed() {
                    let _ = getting.run(job).await;
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
                            let reason = format!("create {:?}: {error}", self.absolute(&to));
                            self.reporter.send_blocking(Event::Failed { file, reason })?;
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

    async fn run(self: &Arc<Self>, job: Job) -> Result<(), NobodyListens> {
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
        };
        let event = match self.place(&job).await {
            Ok(Arrived::Copied(fetched)) => {
                let mut totals = self.totals();
                totals.files += 1;
                totals.bytes += bytes;
                totals.bytes_received += fetched.bytes_received;
                Event::Copied(line(fetched.bytes_received))
            }
            Ok(Arrived::Skipped) => {
                self.totals().skipped_files += 1;
                Event::Skipped(line(0))
            }
            Err(failure) => {
                let mut totals = self.totals();
                totals.failed_files += 1;
                totals.unreachable |= failure.code == Code::Unreachable;
                let reason = std::iter::once(&failure.error).chain(&failure.causes);
                let reason = reason.map(String::as_str).collect::<Vec<_>>().join(": ");
                let path = job.source.path.as_ref().map_or(&[][..], RelPath::as_bytes);
                Event::Failed { file: FileName::new(&job.source.arena, path), reason }
            }
        };
        self.reporter.send(event).await?;
        let files = self.totals().files;
        self.reporter.progress("getting", self.done.load(Ordering::Relaxed), None, files);
        Ok(())
    }

    async fn place(self: &Arc<Self>, job: &Job) -> Result<Arrived, Failure> {
        let (getting, to, content) = (self.clone(), job.to.clone(), job.content.clone());
        if blocking(move || getting.is_there(&to, &content)).await? {
            return Ok(Arrived::Skipped);
        }
        match &job.content {
            Content::Symlink { target } => {
                let (getting, to, target) = (self.clone(), job.to.clone(), target.clone());
                let mtime = job.mtime;
                blocking(move || Ok(getting.destination.symlink(&to, &target, mtime)?)).await?;
                Ok(Arrived::Copied(Fetched::default()))
            }
            Content::File { blob, size, mode } => {
                let to = (job.to.clone(), *mode, job.mtime);
                let _pass = self.node.inner.gate.pass(*size).await;
                let fetched = if *size <= SMALL_BYTES_MAX {
                    self.place_small(*blob, *size, to).await?
                } else {
                    self.place_large(&job.source, *blob, *size, to).await?
                };
                Ok(Arrived::Copied(fetched))
            }
            _ => Err(not_found(&job.source)),
        }
    }

    /// Whether `content` is at `to` already. Fails if something else is.
    fn is_there(&self, to: &RelPath, content: &Content) -> Result<bool, Failure> {
        let same = match (self.destination.existing(to)?, content) {
            (None, _) => return Ok(false),
            (Some(Existing::File(file, found)), Content::File { blob, size, .. }) => {
                found == *size && tree::blob_id(&file, found)? == *blob
            }
            (Some(Existing::Symlink(found)), Content::Symlink { target }) => found == *target,
            _ => false,
        };
        if same {
            return Ok(true);
        }
        Err(Failure::new(Code::Error, format!("something else is at {:?} already", self.absolute(to))))
    }

    async fn place_small(self: &Arc<Self>, blob: BlobId, size: u64, to: To) -> Result<Fetched, Failure> {
        let (pieces, fetched) = self.node.read_small(blob, size).await?;
        let getting = self.clone();
        blocking(move || {
            let (path, mode, mtime) = to;
            let staged = getting.destination.stage(&path)?;
            let mut written = 0;
            for piece in &pieces {
                staged.file().write_all(piece)?;
                written += piece.len() as u64;
            }
            complete(written, size)?;
            Ok(staged.publish(&path, mode, mtime)?)
        })
        .await?;
        self.done.fetch_add(size, Ordering::Relaxed);
        Ok(fetched)
    }

    /// By way of the cache, where it goes on after an interruption, unless all of it is here in place.
    /// What is here already of other versions of the file is not fetched.
    async fn place_large(
        self: &Arc<Self>,
        source: &Target,
        blob: BlobId,
        size: u64,
        to: To,
    ) -> Result<Fetched, Failure> {
        // From here on nobody else fetches this blob, or takes it from the cache.
        let _alone = self.node.inner.peers.alone_with(blob).await;
        let store = self.node.inner.store.clone();
        let _passage = store.passage(blob);
        let presence = blocking(move || {
            // What was fetched earlier may have lain there for long. What does not prove is forgotten, and fetched anew.
            store.verify_cached(blob, &|_| {})?;
            Ok(store.presence(blob)?)
        });
        if presence.await? == Presence::InPlace {
            return self.copy_from_here(blob, size, to).await;
        }
        let (done, reporter) = (self.done.clone(), self.reporter.clone());
        let files = self.totals().files;
        let like = self.node.like(blob, source, &self.absolute(&to.0)).await?;
        let bring = self.node.bring(blob, size, &like, move |bytes| {
            let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            reporter.progress("getting", done, None, files);
        });
        let fetched = bring.await?;
        let getting = self.clone();
        blocking(move || {
            let (path, mode, mtime) = to;
            match getting.node.inner.store.take_cached(blob)? {
                Some(cached) => Ok(getting.destination.adopt(&cached, &path, mode, mtime)?),
                None => Err(Failure::new(Code::Error, format!("blob {blob} is not whole in the cache"))),
            }
        })
        .await?;
        Ok(fetched)
    }

    async fn copy_from_here(
        self: &Arc<Self>,
        blob: BlobId,
        size: u64,
        (path, mode, mtime): To,
    ) -> Result<Fetched, Failure> {
        let staged = Arc::new(self.destination.stage(&path)?);
        let mut written = 0;
        while written < size {
            let range = ByteRange::new(written, size.min(written + READ_BYTES_MAX)).unwrap_or_default();
            let pieces = self.node.read(blob, size, range).await?;
            written += pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
            let staged = staged.clone();
            blocking(move || {
                let mut file = staged.file();
                Ok(pieces.iter().try_for_each(|piece| file.write_all(piece))?)
            })
            .await?;
            complete(written, range.end())?;
            self.done.fetch_add(range.len(), Ordering::Relaxed);
        }
        let staged = Arc::into_inner(staged).ok_or_else(|| io::Error::other("the file is still being written"))?;
        staged.publish(&path, mode, mtime)?;
        Ok(Fetched::default())
    }

    fn absolute(&self, path: &RelPath) -> PathBuf {
        self.dir.join(path.as_path())
    }
}

/// Where a file goes, with which permissions and mtime.
type To = (RelPath, u16, UnixTime);

fn complete(written: u64, size: u64) -> io::Result<()> {
    if written == size { Ok(()) } else { Err(io::Error::other(format!("{written} of {size} bytes"))) }
}

/// The directory that `to` is in, and its name there.
fn split(to: &Path) -> Result<(PathBuf, Option<RelPath>), Failure> {
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

/// Files at most this long are fetched into memory and written at once.
const SMALL_BYTES_MAX: u64 = 1 << 20;
/// How long to wait for catalogs that are still coming in.
const CATALOG_LIMIT: Duration = Duration::from_secs(10);
const FILES_AT_ONCE: usize = 16;
const JOBS_AHEAD: usize = 256;
