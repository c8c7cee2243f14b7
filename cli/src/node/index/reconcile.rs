use std::{
    collections::HashSet,
    fs, io,
    iter::Peekable,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use blobstore::{Access, Disk, FileRef, NewFile, RealDisk, RootId, Store};
use namespace::{
    ArenaName, Change, Content, Decision, Known, Namespace, NamespaceError, RelPath, Seen, SeenKind, Walk, WalkError,
    decide,
};
use rayon::prelude::*;
use serde::Serialize;
use tracing::{info, warn};
use tree::{BlobId, Fingerprint, UnixTime};

use super::{Node, blocking, verify::now};
use crate::{
    event::{Event, FileName, Reporter},
    failure::{Code, Failure, WhileDoing},
};

/// What a scan of an arena found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ScanTotals {
    /// Files and links that are there and indexed.
    pub files: u64,
    /// The bytes of these files.
    pub bytes: u64,
    /// Files that were read.
    pub hashed_files: u64,
    /// Bytes that were read.
    pub hashed_bytes: u64,
    /// Paths that are no longer there.
    pub deleted: u64,
    /// Sockets, FIFOs and devices, which are not indexed.
    pub special: u64,
    /// Entries that could not be read, or changed too fast.
    pub unreadable: u64,
    /// Files whose bytes changed although nobody edited them; not published.
    pub suspected: u64,
}

impl Node {
    /// Brings what is said of an arena in line with its directory. Reads only files that may have changed.
    pub async fn scan(&self, arena: &ArenaName, reporter: &Reporter) -> Result<ScanTotals, Failure> {
        let _turn = self.turn().await;
        let (node, name, reporter) = (self.clone(), arena.clone(), reporter.clone());
        let totals = blocking(move || Scan::new(&node, &name, &reporter)?.run()).await;
        let totals = totals.while_doing(format!("scan the arena {arena}"))?;
        info!(%arena, files = totals.files, hashed = totals.hashed_files, deleted = totals.deleted, "scanned");
        Ok(totals)
    }
}

/// One pass over an arena: what is there beside what was said, both in the order of paths.
struct Scan<'a> {
    node: &'a Node,
    arena: &'a ArenaName,
    root: RootId,
    dir: PathBuf,
    reporter: &'a Reporter,
    totals: ScanTotals,
    /// Directories that could not be read: what was known below them stands.
    unreadable: Vec<RelPath>,
    /// Files whose bytes are no longer what was said.
    suspected: HashSet<RelPath>,
    jobs: Vec<Job>,
    job_bytes: u64,
    changes: Vec<Change>,
    gone: Vec<RelPath>,
}

/// A file to be hashed.
struct Job {
    path: RelPath,
    size: u64,
    /// What it must still be, if nobody edited it.
    recheck: Option<Known>,
}

/// What hashing a file came to.
enum Outcome {
    Hashed { file: NewFile, mode: u16 },
    Vanished,
    Failed(io::Error),
}

impl<'a> Scan<'a> {
    fn new(node: &'a Node, arena: &'a ArenaName, reporter: &'a Reporter) -> Result<Self, Failure> {
        let held = node.inner.namespace.arenas()?.into_iter().find(|held| held.name == *arena);
        let dir = held.and_then(|arena| arena.dir);
        let (Some(dir), Some(root)) = (dir, node.root(arena)) else {
            return Err(Failure::new(Code::NotFound, format!("this machine does not hold an arena {arena}")));
        };
        Ok(Self {
            node,
            arena,
            root,
            dir,
            reporter,
            totals: ScanTotals::default(),
            unreadable: Vec::new(),
            suspected: HashSet::new(),
            jobs: Vec::new(),
            job_bytes: 0,
            changes: Vec::new(),
            gone: Vec::new(),
        })
    }

    fn run(mut self) -> Result<ScanTotals, Failure> {
        self.node.inner.store.finish_mending()?;
        let mut walk = Walk::new(&self.dir, self.node.inner.home.own_dirs()).peekable();
        let mut known = KnownPages::new(&self.node.inner.namespace, self.arena).peekable();
        self.check_root(&mut walk, &mut known)?;
        loop {
            match walk.next() {
                Some(Ok(seen)) => {
                    while let Some(old) = take_if(&mut known, |old| old.path < seen.path)? {
                        self.forget(old);
                    }
                    let old = take_if(&mut known, |old| old.path == seen.path)?;
                    self.compare(seen, old)?;
                }
                Some(Err(error)) => self.skip(error)?,
                None => break,
            }
            if self.jobs.len() >= BATCH_FILES || self.job_bytes >= BATCH_BYTES || self.changes.len() >= BATCH_FILES {
                self.flush()?;
            }
        }
        while let Some(old) = take_if(&mut known, |_| true)? {
            self.forget(old);
        }
        self.flush()?;
        self.compare_links()?;
        self.flush()?;
        Ok(self.totals)
    }

    /// Unlinks what is linked and not said: what a crash between the two left behind. Hashes again what is said and not
    /// linked, for its row was lost.
    fn compare_links(&mut self) -> Result<(), Failure> {
        let node = self.node;
        let store = &node.inner.store;
        let mut said = KnownPages::new(&node.inner.namespace, self.arena).peekable();
        let mut unsaid = Vec::new();
        for file in store.files(self.root) {
            let (path, row) = file?;
            while let Some(unlinked) = take_if(&mut said, |said| said.path.as_bytes() < &path[..])? {
                self.hash_unlinked(unlinked);
            }
            let same = take_if(&mut said, |said| said.path.as_bytes() == path)?;
            if same.is_none_or(|same| same.version.content.blob() != Some(row.blob)) {
                unsaid.push(path);
            }
        }
        while let Some(unlinked) = take_if(&mut said, |_| true)? {
            self.hash_unlinked(unlinked);
        }
        Ok(store.unlink(self.root, &unsaid.iter().map(|path| &path[..]).collect::<Vec<_>>())?)
    }

    /// Has a file hashed, and linked if it is still what was said.
    fn hash_unlinked(&mut self, said: Known) {
        let Content::File { size, .. } = said.version.content else { return };
        if self.suspected.contains(&said.path) || self.unreadable.iter().any(|dir| said.path.is_within(dir)) {
            return;
        }
        warn!(arena = %self.arena, path = %said.path, "said and not linked; hashed again");
        self.totals.files = self.totals.files.saturating_sub(1);
        self.totals.bytes = self.totals.bytes.saturating_sub(size);
        self.hash_later(Job { path: said.path.clone(), size, recheck: Some(said) });
    }

    /// Refuses to take an arena root that is missing or suddenly empty for one from which all was deleted.
    fn check_root(&self, walk: &mut Peekable<Walk>, known: &mut Peekable<KnownPages<'_>>) -> Result<(), Failure> {
        match walk.peek() {
            Some(Err(WalkError::Root { .. })) => {
                let error =
                    walk.next().and_then(Result::err).map_or_else(|| unreachable_root(&self.dir), Failure::from);
                Err(error.hint("nothing was changed; is its disk mounted?"))
            }
            None if known.peek().is_some() => Err(unreachable_root(&self.dir)),
            _ => Ok(()),
        }
    }

    fn compare(&mut self, seen: Seen, old: Option<Known>) -> Result<(), Failure> {
        let Seen { path, kind } = seen;
        let decision = decide(old.as_ref(), &kind);
        let size = match &kind {
            SeenKind::File { fingerprint, .. } => fingerprint.size,
            _ => 0,
        };
        match decision {
            Decision::Unchanged => self.count(size),
            Decision::Publish(content, mtime) => {
                self.count(0);
                if old.is_some_and(|old| old.fingerprint.is_some()) {
                    self.gone.push(path.clone());
                }
                self.changes.push(Change { path, content, mtime, fingerprint: None });
            }
            Decision::Hash => self.hash_later(Job { path, size, recheck: None }),
            Decision::Recheck => self.hash_later(Job { path, size, recheck: old }),
            Decision::Skip => {
                self.totals.special += 1;
                self.unindexed(&path, "a socket, FIFO or device".into())?;
                if let Some(old) = old {
                    self.forget(old);
                }
            }
        }
        Ok(())
    }

    fn hash_later(&mut self, job: Job) {
        self.job_bytes += job.size;
        self.jobs.push(job);
    }

    fn count(&mut self, size: u64) {
        self.totals.files += 1;
        self.totals.bytes += size;
    }

    fn forget(&mut self, old: Known) {
        if self.unreadable.iter().any(|dir| old.path.is_within(dir)) {
            return;
        }
        self.totals.deleted += 1;
        let mtime = mtime_of_deletion(&self.dir, &old.path).unwrap_or(old.version.mtime);
        self.gone.push(old.path.clone());
        self.changes.push(Change { path: old.path, content: Content::Deleted, mtime, fingerprint: None });
    }

    fn skip(&mut self, error: WalkError) -> Result<(), Failure> {
        self.totals.unreadable += 1;
        warn!(arena = %self.arena, %error, "not indexed");
        match error {
            WalkError::Unreadable { path, source } => {
                self.unindexed(&path, source.to_string())?;
                self.unreadable.push(path);
                Ok(())
            }
            WalkError::Name { path } => {
                let file = FileName::new(self.arena, path.as_os_str().as_encoded_bytes());
                Ok(self.reporter.send_blocking(Event::Unindexed { file, reason: "its name is too long".into() })?)
            }
            error @ WalkError::Root { .. } => Err(error.into()),
        }
    }

    fn unindexed(&self, path: &RelPath, reason: String) -> Result<(), Failure> {
        let file = FileName::new(self.arena, path.as_bytes());
        Ok(self.reporter.send_blocking(Event::Unindexed { file, reason })?)
    }

    /// Hashes what has been put off, links it, and says it and the other changes; in this order, each durable.
    fn flush(&mut self) -> Result<(), Failure> {
        let jobs = std::mem::take(&mut self.jobs);
        self.job_bytes = 0;
        let (store, dir) = (&self.node.inner.store, &self.dir);
        let outcomes: Vec<Outcome> = jobs.par_iter().map(|job| hash_at_rest(store, dir, &job.path)).collect();
        let mut files = Vec::new();
        for (job, outcome) in jobs.into_iter().zip(outcomes) {
            match outcome {
                Outcome::Hashed { file, mode } => self.hashed(job, file, mode, &mut files)?,
                // Gone since it was seen: the next scan will say so.
                Outcome::Vanished => {}
                Outcome::Failed(error) => {
                    self.totals.unreadable += 1;
                    warn!(arena = %self.arena, path = %job.path, %error, "not indexed");
                    self.unindexed(&job.path, error.to_string())?;
                }
            }
        }
        if !files.is_empty() {
            store.link(self.root, &files)?;
        }
        if !self.changes.is_empty() {
            self.node.inner.namespace.commit(self.arena, &std::mem::take(&mut self.changes))?;
        }
        if !self.gone.is_empty() {
            // Unlinked last: what is still offered can still be served.
            let gone = std::mem::take(&mut self.gone);
            let gone: Vec<&[u8]> = gone.iter().map(RelPath::as_bytes).collect();
            self.node.inner.store.unlink(self.root, &gone)?;
        }
        if self.reporter.is_closed() {
            return Err(crate::event::NobodyListens.into());
        }
        self.reporter.progress("indexing", self.totals.bytes, None, self.totals.files);
        Ok(())
    }

    fn hashed(&mut self, job: Job, file: NewFile, mode: u16, files: &mut Vec<NewFile>) -> Result<(), Failure> {
        self.count(file.fingerprint.size);
        self.totals.hashed_files += 1;
        self.totals.hashed_bytes += file.fingerprint.size;
        let expected = job.recheck.as_ref().and_then(|known| known.version.content.blob());
        if let Some(blob) = expected.filter(|&blob| blob != file.hashed.id()) {
            return self.suspect(&job.path, blob);
        }
        let content = Content::File { blob: file.hashed.id(), size: file.fingerprint.size, mode };
        self.changes.push(Change {
            path: job.path,
            content,
            mtime: file.fingerprint.mtime,
            fingerprint: Some(file.fingerprint),
        });
        files.push(file);
        Ok(())
    }

    /// A file that nobody edited has other bytes: its exact damage goes under quarantine, and nothing is published.
    fn suspect(&mut self, path: &RelPath, blob: BlobId) -> Result<(), Failure> {
        self.totals.suspected += 1;
        self.suspected.insert(path.clone());
        warn!(arena = %self.arena, %path, %blob, "its bytes changed although nobody edited it: suspected damage, not published");
        let file = FileRef { root: self.root, path: path.as_bytes().to_owned() };
        self.node.inner.store.verify_file(&file, &|_| {})?;
        Ok(())
    }
}

/// What was said of an arena, a page at a time.
struct KnownPages<'a> {
    namespace: &'a Namespace,
    arena: &'a ArenaName,
    page: std::vec::IntoIter<Known>,
    last: Option<RelPath>,
    ended: bool,
}

impl<'a> KnownPages<'a> {
    fn new(namespace: &'a Namespace, arena: &'a ArenaName) -> Self {
        Self { namespace, arena, page: Vec::new().into_iter(), last: None, ended: false }
    }
}

impl Iterator for KnownPages<'_> {
    type Item = Result<Known, NamespaceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.len() == 0 && !self.ended {
            match self.namespace.known(self.arena, self.last.as_ref(), PAGE_ROWS) {
                Ok(page) => {
                    self.ended = page.len() < PAGE_ROWS;
                    self.page = page.into_iter();
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        let known = self.page.next()?;
        self.last = Some(known.path.clone());
        Some(Ok(known))
    }
}

/// The next of `known` if it is an error or one that `wanted` takes.
fn take_if(
    known: &mut Peekable<KnownPages<'_>>,
    wanted: impl Fn(&Known) -> bool,
) -> Result<Option<Known>, NamespaceError> {
    known.next_if(|next| next.as_ref().map_or(true, &wanted)).transpose()
}

/// Hashes a file, and makes sure that it was the same before and after.
fn hash_at_rest(store: &Store, dir: &Path, path: &RelPath) -> Outcome {
    for _ in 0..TRIES {
        match hash_once(store, dir, path) {
            Ok(Some((file, mode))) => return Outcome::Hashed { file, mode },
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Outcome::Vanished,
            Err(error) => return Outcome::Failed(error),
        }
    }
    Outcome::Failed(io::Error::other("it changed while it was read"))
}

/// `None` if the file changed meanwhile.
fn hash_once(store: &Store, dir: &Path, path: &RelPath) -> io::Result<Option<(NewFile, u16)>> {
    use std::os::unix::fs::PermissionsExt;
    let file = RealDisk.open_beneath(dir, path.as_path(), Access::Read)?;
    wait_for_next_tick(file.fingerprint()?.ctime);
    let before = file.fingerprint()?;
    let hashed = match store.hash(&file, before.size) {
        Ok(hashed) => hashed,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mode = (fs::symlink_metadata(dir.join(path.as_path()))?.permissions().mode() & 0o777) as u16;
    let same = file.fingerprint()? == before;
    Ok(same
        .then(|| (NewFile { path: path.as_bytes().to_owned(), fingerprint: before, hashed_at: now(), hashed }, mode)))
}

/// Waits until a change now would get another time than `changed`: within one tick of the file system's clock two
/// changes look like one, and the second would never be seen.
fn wait_for_next_tick(changed: UnixTime) {
    let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) else { return };
    let Ok(seconds) = u64::try_from(changed.seconds) else { return };
    if let Some(age) = now.checked_sub(Duration::new(seconds, changed.nanos)) {
        thread::sleep(TICK.saturating_sub(age));
    }
}

/// When a path vanished, as far as can be told: the mtime of the nearest directory above it that is left.
fn mtime_of_deletion(root: &Path, path: &RelPath) -> Option<UnixTime> {
    let absolute = root.join(path.as_path());
    let mut above = absolute.ancestors().skip(1).take_while(|dir| dir.starts_with(root));
    above.find_map(|dir| fs::symlink_metadata(dir).ok()).map(|meta| Fingerprint::from(&meta).mtime)
}

fn unreachable_root(dir: &Path) -> Failure {
    Failure::new(Code::Error, format!("{dir:?} is empty, where there were files before; nothing was changed"))
        .hint("is its disk mounted? If all files were deleted on purpose: blob arena rm NAME")
}

/// The coarsest clock of a file system here: a kernel that counts 100 ticks a second, twice over.
const TICK: Duration = Duration::from_millis(20);
const BATCH_FILES: usize = 4096;
const BATCH_BYTES: u64 = 1 << 30;
const PAGE_ROWS: usize = 4096;
const TRIES: usize = 3;
