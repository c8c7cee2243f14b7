//! One pass over parts of an arena: what is there beside what was said and what is linked. Rules and order of commits:
//! spec/namespace.md, "Scan".

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use blobstore::{FileRef, FileRow, FileState, RootId};
use namespace::{
    Arena, ArenaName, Change, Content, Decision, Known, LastRead, ReadState, RelPath, Seen, SeenKind, Walk, Witness,
    decide, look,
};
use rayon::prelude::*;
use tracing::warn;
use tree::{BlobId, Fingerprint, UnixTime};

use super::{
    super::{Node, verify::now},
    Reconciled, ScanTotals, Skipped,
    hash::{Outcome, hash_at_rest},
    pages,
    root::{Standing, root_of},
    witness,
};
use crate::{
    event::Reporter,
    failure::{Code, Failure},
};

pub(super) struct Reconcile<'a> {
    pub(super) node: &'a Node,
    pub(super) arena: Arena,
    pub(super) root: RootId,
    pub(super) dir: PathBuf,
    /// The arena root that this pass is about.
    standing: Standing,
    pub(super) reporter: &'a Reporter,
    /// What the watcher saw of the paths of this pass.
    pub(super) seen: witness::Seen,
    /// Whether damaged and suspect files are published as they are: the user says that they were edited.
    pub(super) accept: bool,
    pub(super) totals: ScanTotals,
    /// Directories that could not be read: what was known below them stands.
    pub(super) unreadable: Vec<RelPath>,
    /// What is to be looked at again, for it changed meanwhile.
    pub(super) again: Vec<RelPath>,
    pub(super) skipped: Vec<Skipped>,
    /// Files that have to be hashed, unless they were moved here.
    pub(super) fresh: Vec<Fresh>,
    /// What is no longer there.
    pub(super) gone: Vec<Gone>,
    /// What is to be said, once what is fresh is linked.
    said: Vec<Said>,
    /// What is linked and no longer so.
    unlinked: Vec<RelPath>,
    /// Whether files were left out because the disk of the home is full.
    lacks_room: bool,
    /// Files hashed by this pass.
    read: Arc<AtomicU64>,
}

pub(super) struct Fresh {
    pub(super) path: RelPath,
    pub(super) fingerprint: Fingerprint,
    pub(super) mode: u16,
    /// What was known of it, or of what was at its path.
    pub(super) last: Option<FileRow>,
    /// The blob that it must still be: with other bytes it is suspect.
    pub(super) recheck: Option<BlobId>,
    /// The blob of a file with the same identity that is gone from another path: with these bytes, it came from there.
    pub(super) came_as: Option<BlobId>,
    /// What was published of it.
    pub(super) published: Option<BlobId>,
    /// Whether it came back to its path, where `last` is what was there before.
    pub(super) was_gone: bool,
}

pub(super) struct Gone {
    pub(super) path: RelPath,
    pub(super) linked: Option<FileRow>,
}

/// A change, and what the file was like when it was found.
struct Said {
    change: Change,
    fingerprint: Option<Fingerprint>,
}

impl<'a> Reconcile<'a> {
    pub(super) fn new(
        node: &'a Node,
        arena: &ArenaName,
        accept: bool,
        reporter: &'a Reporter,
    ) -> Result<Self, Failure> {
        let held = node.inner.namespace.arenas()?.into_iter().find(|held| held.name == *arena);
        let (Some(arena), Some(root)) = (held, node.root(arena)) else {
            return Err(super::not_held(arena));
        };
        Ok(Self {
            node,
            root,
            dir: arena.dir.clone().unwrap_or_default(),
            arena,
            standing: Standing::default(),
            reporter,
            seen: witness::Seen::default(),
            accept,
            totals: ScanTotals::default(),
            unreadable: Vec::new(),
            again: Vec::new(),
            skipped: Vec::new(),
            fresh: Vec::new(),
            gone: Vec::new(),
            said: Vec::new(),
            unlinked: Vec::new(),
            lacks_room: false,
            read: Arc::default(),
        })
    }

    /// Looks at what is at and below each of `paths`; `None` is the whole arena.
    pub(super) fn run(mut self, paths: &[Option<RelPath>]) -> Result<Reconciled, Failure> {
        self.node.inner.store.finish_mending()?;
        self.standing = self.check_root()?;
        self.node.put_back_left(&self.arena.name, &self.dir)?;
        let (node, arena) = (self.node, self.arena.name.clone());
        let watched_since = paths.contains(&None).then(|| node.watch_losses());
        node.arena_state(&arena, |state| (state.read, state.to_read) = (self.read.clone(), 0));
        self.seen = witness::Seen::take(node, &arena, &self.dir, paths);
        let done = self.look_at(paths);
        match &done {
            // The signs of a file that was left out are needed when it is indexed.
            Ok(Reconciled { lacks_room: true, .. }) | Err(_) => self.seen.give_back_all(),
            Ok(done) => done.again.iter().for_each(|path| self.seen.give_back(path)),
        }
        if let Some(since) = watched_since
            && done.is_ok()
        {
            // Not what was out of reach, nor what was mounted or unmounted meanwhile.
            let is_all = |state: &super::ArenaState| !state.gap && state.parts.parts().next().is_none();
            node.arena_state(&arena, |state| state.watched_since = since.filter(|_| is_all(state)));
        }
        done
    }

    fn look_at(&mut self, paths: &[Option<RelPath>]) -> Result<Reconciled, Failure> {
        for path in paths {
            self.merge(path.as_ref())?;
        }
        self.settle()?;
        for path in paths.iter().flatten() {
            self.look_at_parent(path)?;
        }
        self.settle()?;
        let root = Some(self.standing.identity);
        if self.arena.root != root && paths.contains(&None) {
            self.node.inner.namespace.set_arena(&Arena { root, ..self.arena.clone() })?;
        }
        self.node.note_skipped(&self.arena.name, paths, std::mem::take(&mut self.skipped));
        let (totals, again) = (std::mem::take(&mut self.totals), std::mem::take(&mut self.again));
        Ok(Reconciled { totals, again, is_whole: paths.contains(&None), lacks_room: self.lacks_room })
    }

    /// Refuses to take an arena root that is missing, or another directory without anything of what was in it, for one from
    /// which all was deleted.
    fn check_root(&self) -> Result<Standing, Failure> {
        match root_of(self.node, &self.arena, false)? {
            Ok(standing) => {
                self.node.note_offline(&self.arena.name, None);
                self.node.note_parts(&self.arena.name, &standing.offline);
                Ok(standing)
            }
            Err(why) => Err(self.offline(why)),
        }
    }

    /// Fails if something was mounted or unmounted in the arena since this pass began: what was read may be of what was hidden.
    fn expect_mounts(&self) -> Result<(), Failure> {
        match self.standing.mounts_stay(self.node) {
            true => Ok(()),
            false => Err(Failure::new(Code::Error, "a file system was mounted or unmounted there meanwhile")),
        }
    }

    pub(super) fn offline(&self, why: String) -> Failure {
        self.node.note_offline(&self.arena.name, Some(why.clone()));
        let failure = Failure::new(Code::Error, why).hint(format!(
            "nothing was changed; is its disk mounted? If all was replaced on purpose: blob arena scan --accept {}",
            self.arena.name
        ));
        failure.while_doing(format!("read the arena root {:?}", self.dir))
    }

    /// Merges what is there with what was said and what is linked, all in the order of paths.
    fn merge(&mut self, within: Option<&RelPath>) -> Result<(), Failure> {
        let node = self.node;
        let name = self.arena.name.clone();
        let left_out = node.inner.home.own_dirs().into_iter().chain(self.standing.offline_dirs());
        let mut walk = Walk::new(&self.dir, left_out.collect());
        if let Some(within) = within {
            walk = walk.within(within.clone());
        }
        let (near, passed) = (node.clone(), (name.clone(), self.dir.clone()));
        walk = walk.passing(move |path| near.pass(&passed.0, &passed.1, &path));
        if let Some(watch) = node.watching() {
            walk = walk.entering(move |dir| watch.watch(dir));
        }
        let mut said = pages::said(&node.inner.namespace, &name, within);
        let mut linked = pages::linked(&node.inner.store, self.root, within);
        let mut walk = walk.peekable();
        loop {
            let seen = match walk.peek() {
                Some(Err(_)) => {
                    let Some(Err(error)) = walk.next() else { continue };
                    self.skip(error)?;
                    continue;
                }
                Some(Ok(seen)) => Some(&seen.path),
                None => None,
            };
            let (said_next, linked_next) = (said.peek()?, linked.peek()?);
            let Some(path) = [seen, said_next, linked_next].into_iter().flatten().min().cloned() else { break };
            let seen = walk.next_if(|seen| seen.as_ref().is_ok_and(|seen| seen.path == path)).and_then(Result::ok);
            let (said, linked) = (said.take(&path)?, linked.take(&path)?);
            match seen {
                Some(seen) => self.compare(seen, said, linked)?,
                None => self.vanished(path, said, linked),
            }
            if self.fresh.len() + self.gone.len() + self.said.len() >= HELD_MAX {
                self.settle()?;
            }
            if self.totals.files.is_multiple_of(4096) {
                self.report()?;
            }
        }
        Ok(())
    }

    fn report(&self) -> Result<(), Failure> {
        if self.reporter.is_closed() {
            return Err(crate::event::NobodyListens.into());
        }
        let files = self.totals.files;
        self.reporter.progress("indexing", self.totals.bytes, None, files);
        self.node.arena_state(&self.arena.name, |state| state.so_far = files);
        Ok(())
    }

    fn compare(&mut self, seen: Seen, said: Option<Known>, linked: Option<FileRow>) -> Result<(), Failure> {
        let Seen { path, kind } = seen;
        if self.standing.offline.covers(&path).is_some() {
            return Ok(());
        }
        let version = said.as_ref().map(|said| &said.version);
        let witness = match &kind {
            SeenKind::File { fingerprint, .. } => self.seen.witness(&path, fingerprint.device),
            _ => Witness::default(),
        };
        let decision = match &linked {
            Some(row) if self.accept && (row.is_suspect() || !row.damaged.is_empty()) => Decision::Hash,
            row => decide(version, row.as_ref().map(last_read), &kind, witness),
        };
        let published = version.and_then(|version| version.content.blob());
        match (decision, kind) {
            (Decision::Unchanged, kind) => {
                self.count(&kind);
                // A reader met its bytes before the watcher's reason was known.
                if let Some(FileRow { state: FileState::Suspect { read, .. }, .. }) = linked {
                    let (store, file) = (&self.node.inner.store, self.file(&path));
                    if !(self.seen.explains_ctime(&path) && store.explain(&file, read)?) {
                        store.leave_suspect(&file, read)?;
                        self.totals.suspected += 1;
                    }
                }
            }
            (Decision::Publish(content, mtime), kind) => {
                self.count(&kind);
                self.unlinked.extend(linked.map(|_| path.clone()));
                self.said.push(Said { change: Change { path, content, mtime }, fingerprint: None });
            }
            (Decision::PublishLinked(blob), SeenKind::File { fingerprint, mode }) => {
                let size = linked.map_or(fingerprint.size, |row| row.fingerprint.size);
                self.said(path, blob, size, fingerprint, mode);
            }
            (Decision::Hash, SeenKind::File { fingerprint, mode }) => {
                self.fresh.push(Fresh {
                    path,
                    fingerprint,
                    mode,
                    last: linked,
                    recheck: None,
                    came_as: None,
                    published,
                    was_gone: false,
                });
            }
            (Decision::Recheck(blob), SeenKind::File { fingerprint, mode }) => {
                if linked.is_none() {
                    warn!(arena = %self.arena.name, %path, "published but missing from the store; rehashing");
                }
                self.fresh.push(Fresh {
                    path,
                    fingerprint,
                    mode,
                    last: linked,
                    recheck: Some(blob),
                    came_as: None,
                    published,
                    was_gone: false,
                });
            }
            _ => {
                self.special(&path)?;
                self.vanished(path, said, linked);
            }
        }
        Ok(())
    }

    pub(super) fn count(&mut self, kind: &SeenKind) {
        match kind {
            SeenKind::Directory { .. } | SeenKind::Special => {}
            SeenKind::Symlink { .. } => self.totals.files += 1,
            SeenKind::File { fingerprint, .. } => {
                self.totals.files += 1;
                self.totals.bytes += fingerprint.size;
            }
        }
    }

    fn vanished(&mut self, path: RelPath, said: Option<Known>, linked: Option<FileRow>) {
        if self.standing.offline.covers(&path).is_some() || self.unreadable.iter().any(|dir| path.is_within(dir)) {
            return;
        }
        match said {
            Some(_) => self.gone.push(Gone { path, linked }),
            None => self.unlinked.push(path),
        }
    }

    /// What the directory of `path` is like now: its mtime moved with what is in it.
    fn look_at_parent(&mut self, path: &RelPath) -> Result<(), Failure> {
        let Some(parent) = path.parent() else { return Ok(()) };
        let Ok(Some(kind @ SeenKind::Directory { .. })) = look(&self.dir, &parent) else { return Ok(()) };
        let said = self.node.inner.namespace.known(&self.arena.name, Some(&parent), None, 1)?;
        let said = said.into_iter().find(|known| known.path == parent);
        self.compare(Seen { path: parent, kind }, said, None)
    }

    /// Links and says what was found; in this order, each durable. What is new is said before what is gone, so that nothing
    /// that moved is ever missing.
    fn settle(&mut self) -> Result<(), Failure> {
        self.recall_vanished()?;
        self.relink_moved()?;
        let names = self.take_further_names();
        let (found, name) = (self.fresh.len() as u64, &self.arena.name);
        self.node.arena_state(name, |state| state.to_read = self.read.load(Ordering::Relaxed) + found);
        // Small ones first: what rests for a moment only has changed again once a large one is hashed.
        let fresh = std::mem::take(&mut self.fresh).into_iter();
        let (large, small): (Vec<_>, Vec<_>) = fresh.partition(|file| file.fingerprint.size >= LARGE);
        let mut said = std::mem::take(&mut self.said).into_iter().peekable();
        for files in [small, large] {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            for file in files {
                // Directories are said with what is in them: rows that come in order fill their pages.
                while let Some(said) = said.next_if(|said| said.change.path <= file.path) {
                    self.said.push(said);
                }
                bytes += file.fingerprint.size;
                batch.push(file);
                if batch.len() >= BATCH_FILES || bytes >= BATCH_BYTES {
                    self.hash(std::mem::take(&mut batch))?;
                    bytes = 0;
                }
            }
            self.said.extend(said.by_ref());
            self.hash(batch)?;
        }
        // A further name is that of a file which has been read by now.
        self.fresh = names;
        self.relink_further_names()?;
        let fresh = std::mem::take(&mut self.fresh);
        self.hash(fresh)?;
        self.delete()?;
        let unlinked = std::mem::take(&mut self.unlinked);
        for paths in unlinked.chunks(BATCH_FILES) {
            // Unlinked last: what is still offered can still be served. A file that has come since is linked by who put
            // it there.
            let paths = paths.iter().filter(|path| !self.is_linked_now(path));
            let paths: Vec<&[u8]> = paths.map(RelPath::as_bytes).collect();
            self.node.inner.store.unlink(self.root, &paths)?;
        }
        self.report()
    }

    /// The file at `path`, as the store names it.
    pub(super) fn file(&self, path: &RelPath) -> FileRef {
        FileRef { root: self.root, path: path.as_bytes().to_owned() }
    }

    /// Whether the file at `path` is the one that is linked there.
    fn is_linked_now(&self, path: &RelPath) -> bool {
        let Ok(Some(SeenKind::File { fingerprint, .. })) = look(&self.dir, path) else { return false };
        self.node
            .inner
            .store
            .file(&self.file(path))
            .is_ok_and(|row| row.is_some_and(|row| row.fingerprint == fingerprint))
    }

    /// Hashes files and links them.
    fn hash(&mut self, mut fresh: Vec<Fresh>) -> Result<(), Failure> {
        let store = &self.node.inner.store;
        if !fresh.is_empty() && store.check_room().is_err() {
            self.lacks_room = true;
            fresh.clear();
        }
        let is_mending =
            |path: &RelPath| store.is_mending(&FileRef { root: self.root, path: path.as_bytes().to_owned() });
        let (mending, fresh): (Vec<_>, Vec<_>) = fresh.into_iter().partition(|file| is_mending(&file.path));
        self.again.extend(mending.into_iter().map(|file| file.path));
        // What a copy put here is linked and said by it, within its turn.
        drop(self.node.inner.settling_turn.blocking_lock());
        let is_here = |file: &Fresh| {
            file.last.as_ref().is_none_or(|row| row.fingerprint != file.fingerprint) && self.is_linked_now(&file.path)
        };
        let (linked, fresh): (Vec<_>, Vec<_>) = fresh.into_iter().partition(is_here);
        for Fresh { fingerprint, mode, .. } in linked {
            self.count(&SeenKind::File { fingerprint, mode });
        }
        // Whatever a program writes through a mapping from here on moves the ctime.
        let synced = SystemTime::now();
        store.sync_file_systems(self.root, fresh.iter().map(|file| (file.fingerprint.device, file.path.as_bytes())))?;
        let dir = &self.dir;
        let read = &self.read;
        let hash = |file: &Fresh| {
            let outcome = hash_at_rest(store, dir, &file.path, Some(synced));
            read.fetch_add(1, Ordering::Relaxed);
            outcome
        };
        // On threads of its own: those of a pass over a file system that hangs are missed by no other pass.
        let threads = rayon::ThreadPoolBuilder::new().build()?;
        let outcomes: Vec<Outcome> = threads.install(|| fresh.par_iter().map(hash).collect());
        let mut files = Vec::new();
        for (fresh, outcome) in fresh.into_iter().zip(outcomes) {
            match outcome {
                Outcome::Hashed { file, mode, again } => {
                    self.totals.hashed_files += 1;
                    self.totals.hashed_bytes += file.fingerprint.size;
                    let blob = file.hashed.id();
                    if fresh.recheck.is_some_and(|expected| expected != blob) && fresh.came_as != Some(blob) {
                        self.suspect(fresh, file.fingerprint, mode)?;
                        continue;
                    }
                    if again {
                        self.again.push(fresh.path.clone());
                    }
                    self.said(fresh.path, blob, file.fingerprint.size, file.fingerprint, mode);
                    files.push(*file);
                }
                Outcome::Vanished => self.again.push(fresh.path),
                Outcome::Changed => {
                    self.not_indexed(&fresh.path, "it changed while it was read".into())?;
                    self.again.push(fresh.path);
                }
                // Not looked at again before something happens to it: it would fail again.
                Outcome::Failed(error) => self.not_indexed(&fresh.path, tree::reason(&error))?,
            }
        }
        if !files.is_empty() {
            store.link(self.root, &files)?;
        }
        self.say()
    }

    /// Publishes the file at `path`, which now has the metadata `fingerprint`, as `blob`, which has `size` bytes.
    pub(super) fn said(&mut self, path: RelPath, blob: BlobId, size: u64, fingerprint: Fingerprint, mode: u16) {
        self.count(&SeenKind::File { fingerprint, mode });
        let content = Content::File { blob, size, mode };
        let change = Change { path, content, mtime: fingerprint.mtime };
        self.said.push(Said { change, fingerprint: Some(fingerprint) });
    }

    /// Says what was found, so far as it is still so inside the transaction.
    fn say(&mut self) -> Result<(), Failure> {
        let said = std::mem::take(&mut self.said);
        for said in said.chunks(BATCH_FILES) {
            self.expect_mounts()?;
            let mut fingerprints = said.iter().map(|said| said.fingerprint);
            let changes: Vec<Change> = said.iter().map(|said| said.change.clone()).collect();
            let (dir, again) = (&self.dir, &mut self.again);
            self.node.inner.namespace.commit(&self.arena.name, &changes, now(), &mut |change| {
                let Some(Some(expected)) = fingerprints.next() else { return true };
                let now = look(dir, &change.path);
                let is_so = matches!(now, Ok(Some(SeenKind::File { fingerprint, .. })) if fingerprint == expected);
                if !is_so {
                    again.push(change.path.clone());
                }
                is_so
            })?;
        }
        self.report()
    }

    /// Says what is gone, unless it is there again.
    fn delete(&mut self) -> Result<(), Failure> {
        let gone = std::mem::take(&mut self.gone);
        for gone in gone.chunks(BATCH_FILES) {
            // Directories often lose many files at once.
            let mut last: Option<(Option<RelPath>, UnixTime)> = None;
            let mut changes = Vec::new();
            for Gone { path, .. } in gone {
                let parent = path.parent();
                let mtime = match &last {
                    Some((dir, mtime)) if *dir == parent => *mtime,
                    _ => self.mtime_of_deletion(path)?,
                };
                last = Some((parent, mtime));
                changes.push(Change { path: path.clone(), content: Content::Deleted, mtime });
            }
            let (mut unlinked, mut again, mut stays) = (Vec::new(), Vec::new(), true);
            self.node.inner.namespace.commit(&self.arena.name, &changes, now(), &mut |change| {
                // What a move has set aside may yet be put back.
                let is_gone = matches!(look(&self.dir, &change.path), Ok(None | Some(SeenKind::Special)))
                    && !self.node.inner.moving.is_aside(&(self.arena.name.clone(), change.path.clone()));
                // Asked last: what was not there, was not there in the root that is meant.
                stays = stays && self.standing.stays(self.node);
                match is_gone && stays {
                    true => unlinked.push(change.path.clone()),
                    false => again.push(change.path.clone()),
                }
                is_gone && stays
            })?;
            self.totals.deleted += unlinked.len() as u64;
            self.unlinked.append(&mut unlinked);
            self.again.append(&mut again);
            if !stays {
                self.expect_mounts()?;
                return Err(self.offline("it went while it was looked at".into()));
            }
        }
        Ok(())
    }

    /// When a path vanished, as far as can be told: the mtime of the nearest directory above it that is left.
    fn mtime_of_deletion(&self, path: &RelPath) -> Result<UnixTime, Failure> {
        let mut above = std::iter::successors(path.parent(), RelPath::parent);
        let left = above.find_map(|dir| match look(&self.dir, &dir) {
            Ok(Some(SeenKind::Directory { mtime, .. })) => Some(mtime),
            _ => None,
        });
        let root = || fs::metadata(&self.dir).map(|meta| Fingerprint::from(&meta).mtime);
        left.map_or_else(root, Ok).map_err(|error| self.offline(tree::reason(&error)))
    }
}

/// What was known of a file, as [`decide`] takes it.
fn last_read(row: &FileRow) -> LastRead {
    let state = match row.state {
        FileState::Suspect { read, .. } => ReadState::Suspect(read),
        _ if !row.damaged.is_empty() => ReadState::Damaged,
        FileState::Racy => ReadState::Racy,
        FileState::Settled => ReadState::Settled,
    };
    LastRead { blob: row.blob, fingerprint: row.fingerprint, state }
}

/// How many files are held in memory to find out which of them were moved.
const HELD_MAX: usize = 300_000;
pub(super) const BATCH_FILES: usize = 4096;
const BATCH_BYTES: u64 = 1 << 30;
/// From this size on a file takes long to hash.
const LARGE: u64 = 64 << 20;
