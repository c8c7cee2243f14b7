//! Keeps what is said of the arenas in line with their directories while they change: hears of changes, waits until they
//! rest, and has the paths reconciled, each arena on its own. Rules: spec/namespace.md, "Watching" and "Keeping up".

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use namespace::{ArenaName, Heard, Inotify, News, Pending, RelPath, SharedSigns, Watch, WatchError};
use tokio::{sync::watch, task::JoinSet, time::sleep};
use tracing::{debug, error, info, warn};

use super::{
    Node,
    index::{MountEvents, Reconciled},
};
use crate::{event::Reporter, failure::Failure};

/// How changes are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WatchSettings {
    /// So long a path must rest before it is looked at.
    pub settle: Duration,
    /// After so long it is looked at even if it never rests.
    pub settle_max: Duration,
    /// So often everything is looked at, in case something was not heard.
    pub rescan: Duration,
    /// The same where changes that other machines make are not reported.
    pub poll: Duration,
}

/// What watches directories while they are walked through.
pub(super) struct Watching {
    watch: Mutex<Box<dyn Watch>>,
    unwatched: Mutex<Unwatched>,
}

/// The directories that could not be watched when that was last tried.
#[derive(Default)]
struct Unwatched {
    /// At most [`UNWATCHED_MAX`].
    dirs: BTreeSet<PathBuf>,
    /// Whether there were more.
    more: bool,
}

/// An arena that is kept up with.
struct Kept {
    dir: PathBuf,
    /// The same without symbolic links, as news name it.
    true_dir: PathBuf,
    pending: Pending,
    /// What is mounted around it.
    mounts: Vec<(u64, PathBuf)>,
    /// Whether changes that other machines make there are not reported.
    is_silent: bool,
    /// How long the last look at all of it took, and when the one began that is under way.
    took: Duration,
    began: Duration,
    /// When all of it is looked at next.
    rescan_at: Duration,
    /// Whether a whole pass is due once the disk of the home has free space.
    lacks_room: bool,
    /// Whether the running pass covers changes that the watcher reported.
    takes_in: bool,
}

/// The passes that are under way, one an arena at most.
type Jobs = JoinSet<(ArenaName, Result<Reconciled, Failure>)>;

impl Kept {
    /// How long after a look at all of it the next one is due. Looking takes no more than a small part of the time.
    fn period(&self, settings: &WatchSettings) -> Duration {
        if self.is_silent { settings.poll.max(self.took * LOOKED_PART).min(settings.rescan) } else { settings.rescan }
    }

    /// When it is to be looked at next, in part at least.
    fn due(&self) -> Duration {
        self.pending.next_due().map_or(self.rescan_at, |due| due.min(self.rescan_at))
    }
}

impl Watching {
    /// What was seen so far and not yet looked at.
    pub(super) fn signs(&self) -> SharedSigns {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner).signs()
    }

    /// Whether some directory could not be watched.
    pub(super) fn is_incomplete(&self) -> bool {
        let unwatched = self.unwatched.lock().unwrap_or_else(PoisonError::into_inner);
        unwatched.more || !unwatched.dirs.is_empty()
    }

    /// How many directories at and below `dir` could not be watched, as far as they were counted.
    pub(super) fn unwatched_below(&self, dir: &Path) -> usize {
        let unwatched = self.unwatched.lock().unwrap_or_else(PoisonError::into_inner);
        unwatched.dirs.iter().filter(|unwatched| unwatched.starts_with(dir)).count()
    }

    /// Watches a directory, if that is possible; if not, rescans have to do.
    pub(super) fn watch(&self, dir: &Path) {
        let watched = self.watch.lock().unwrap_or_else(PoisonError::into_inner).watch(dir);
        let mut unwatched = self.unwatched.lock().unwrap_or_else(PoisonError::into_inner);
        match watched {
            Ok(()) | Err(WatchError::Gone { .. }) => _ = unwatched.dirs.remove(dir),
            // What must not be read, cannot be rescanned either; its directory tells when that changes.
            Err(WatchError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => {
                if unwatched.dirs.is_empty() {
                    warn!(
                        reason = tree::reason(&error),
                        "not all directories can be watched; changes there are found by rescans"
                    );
                }
                if unwatched.dirs.len() < UNWATCHED_MAX {
                    unwatched.dirs.insert(dir.to_owned());
                } else {
                    unwatched.more = true;
                }
            }
        }
    }
}

impl Node {
    /// What watches directories, once something does.
    pub(super) fn watching(&self) -> Option<Arc<Watching>> {
        self.inner.watching.get().cloned()
    }

    /// Has paths of an arena looked at again once they rest.
    pub(super) fn look_again(&self, arena: &ArenaName, paths: Vec<RelPath>) {
        let Some(dir) = self.arena_dir(arena) else { return };
        for path in paths {
            self.inner.hints.changed(dir.join(path.as_path()));
        }
    }

    /// What is mounted around an arena root, which has no symbolic links.
    fn mounts_around(&self, true_dir: &Path) -> Option<Vec<(u64, PathBuf)>> {
        self.inner.mounts.around(true_dir)
    }

    fn is_silent(&self, true_dir: &Path) -> bool {
        self.inner.mounts.silent(true_dir).is_some()
    }

    pub(super) fn arena_dir(&self, arena: &ArenaName) -> Option<PathBuf> {
        let arenas = self.inner.namespace.arenas().ok()?;
        arenas.into_iter().find(|held| held.name == *arena)?.dir
    }

    /// Looks at all arenas, and then at what changes in them, for as long as `stopped` says nothing.
    pub(crate) async fn keep_up(self, settings: WatchSettings, mut stopped: watch::Receiver<bool>) {
        let Some(mut hints) = self.inner.hinted.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let mut news = match Inotify::new(NEWS_MAX) {
            Ok((watch, news)) => {
                let watching = Watching { watch: Mutex::new(Box::new(watch)), unwatched: Mutex::default() };
                let _ = self.inner.watching.set(Arc::new(watching));
                Some(news)
            }
            Err(error) => {
                error!(reason = tree::reason(&error), "directories cannot be watched; changes are found by rescans");
                None
            }
        };
        let mut moves = MountEvents::new().map_or_else(
            |error| {
                warn!(reason = tree::reason(&error), "mounts cannot be watched; changes there are found by rescans");
                None
            },
            Some,
        );
        let (arenas, running) = (BTreeMap::new(), BTreeSet::new());
        let mut keeper = Keeper { node: self, settings, start: Instant::now(), arenas, running };
        keeper.refresh(Duration::ZERO);
        let mut jobs = Jobs::new();
        loop {
            keeper.begin(&mut jobs);
            keeper.tell();
            let next = keeper.next_due().unwrap_or(IDLE);
            tokio::select! {
                _ = stopped.wait_for(|&stop| stop) => return,
                heard = hear(&mut news) => keeper.hear(heard, news.as_mut()),
                heard = hints.recv() => keeper.hear(heard, Some(&mut hints)),
                () = next_move(&mut moves) => keeper.mounts_moved(),
                Some(Ok((arena, ended))) = jobs.join_next() => keeper.end(arena, ended),
                () = sleep(next.saturating_sub(keeper.now())) => {}
            }
        }
    }
}

/// The next news; never, if there is nobody (any more) to tell.
async fn hear(news: &mut Option<News>) -> Option<Heard> {
    if let Some(telling) = news {
        let heard = telling.recv().await;
        if heard.is_some() {
            return heard;
        }
        *news = None;
    }
    std::future::pending().await
}

/// Waits until something is mounted or unmounted; for ever, if that cannot be told.
async fn next_move(moves: &mut Option<MountEvents>) {
    match moves {
        Some(moves) => moves.next().await,
        None => std::future::pending().await,
    }
}

struct Keeper {
    node: Node,
    settings: WatchSettings,
    start: Instant,
    arenas: BTreeMap<ArenaName, Kept>,
    /// Those over which a pass is under way.
    running: BTreeSet<ArenaName>,
}

impl Keeper {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Takes note of arenas that came and went. New ones are looked at as a whole at `rescan_at`.
    fn refresh(&mut self, rescan_at: Duration) {
        let held = match self.node.inner.namespace.arenas() {
            Ok(arenas) => arenas,
            Err(error) => return error!(reason = tree::reason(&error), "the arenas cannot be listed"),
        };
        let held: BTreeMap<_, _> = held.into_iter().filter_map(|arena| Some((arena.name, arena.dir?))).collect();
        self.arenas.retain(|name, kept| held.get(name) == Some(&kept.dir));
        let WatchSettings { settle, settle_max, .. } = self.settings;
        for (name, dir) in held {
            self.arenas.entry(name).or_insert_with(|| {
                let true_dir = dir.canonicalize().unwrap_or_else(|_| dir.clone());
                let mounts = self.node.mounts_around(&true_dir).unwrap_or_default();
                let (pending, is_silent) = (Pending::new(settle, settle_max), self.node.is_silent(&true_dir));
                let (took, began) = (Duration::ZERO, Duration::ZERO);
                Kept {
                    dir,
                    true_dir,
                    pending,
                    mounts,
                    is_silent,
                    took,
                    began,
                    rescan_at,
                    lacks_room: false,
                    takes_in: false,
                }
            });
        }
    }

    /// Takes in news, and whatever else waits.
    fn hear(&mut self, mut heard: Option<Heard>, mut news: Option<&mut News>) {
        let now = self.now();
        self.refresh(now + self.settings.rescan);
        while let Some(some) = heard {
            match some {
                Heard::Changed(path) => self.note(&path, now),
                Heard::Lost => {
                    info!("some changes were not heard; everything is looked at");
                    self.arenas.values_mut().for_each(|kept| kept.pending.note(None, now));
                }
            }
            heard = news.as_mut().and_then(|news| news.try_recv());
        }
    }

    /// Has those arenas looked at as a whole, at once, around which something was mounted or unmounted: of a mount over a
    /// directory that is watched, no news come.
    fn mounts_moved(&mut self) {
        let now = self.now();
        // One that is not kept up with yet is looked at in any case.
        self.refresh(now);
        for (arena, kept) in &mut self.arenas {
            let Some(mounts) = self.node.mounts_around(&kept.true_dir).filter(|mounts| *mounts != kept.mounts) else {
                continue;
            };
            info!(%arena, "what is mounted there changed; the arena is looked at");
            self.node.note_gap(arena);
            kept.mounts = mounts;
            kept.is_silent = self.node.is_silent(&kept.true_dir);
            kept.rescan_at = now;
        }
    }

    fn note(&mut self, path: &Path, now: Duration) {
        for kept in self.arenas.values_mut() {
            let Ok(below) = path.strip_prefix(&kept.true_dir).or_else(|_| path.strip_prefix(&kept.dir)) else {
                continue;
            };
            let fits = |path: &Path| RelPath::try_from(path.as_os_str().as_encoded_bytes().to_owned()).ok();
            // A path that is too long to have is looked at with the directory that it is in.
            let path = below.ancestors().filter(|path| !path.as_os_str().is_empty()).find_map(fits);
            return kept.pending.note(path, now);
        }
    }

    /// Begins a pass over what is due of each arena, unless one is under way.
    fn begin(&mut self, jobs: &mut Jobs) {
        let now = self.now();
        if self.lacks_room() && self.node.home_full().is_none() {
            info!("the disk of the home has free space: indexing resumes");
            self.node.look_at_pins();
            for kept in self.arenas.values_mut().filter(|kept| kept.lacks_room) {
                (kept.lacks_room, kept.rescan_at) = (false, now);
            }
        }
        for (arena, kept) in &mut self.arenas {
            if kept.due() > now || self.running.contains(arena) {
                continue;
            }
            if self.node.is_stalled(arena) {
                // It is looked at as a whole then.
                kept.pending.take_due(Duration::MAX);
                kept.rescan_at = now + OFFLINE_RETRY;
                continue;
            }
            // With what is due in a moment: of a rename, both names are heard of at nearly the same time.
            let mut paths = kept.pending.take_due(now + (self.settings.settle / 10).min(AT_ONCE_MAX));
            kept.takes_in = !paths.is_empty();
            if kept.rescan_at <= now || paths.contains(&None) {
                paths = vec![None];
                kept.rescan_at = now + kept.period(&self.settings);
                kept.began = now;
            } else if self.node.is_offline(arena) {
                continue;
            }
            debug!(%arena, paths = paths.len(), "looking at what changed");
            self.running.insert(arena.clone());
            let (node, arena) = (self.node.clone(), arena.clone());
            jobs.spawn(async move {
                let (reporter, mut events) = Reporter::new();
                tokio::spawn(async move { while events.recv().await.is_some() {} });
                let name = arena.clone();
                let pass = tokio::spawn(async move { node.reconcile(&name, paths, false, &reporter).await });
                (arena, pass.await.unwrap_or_else(|panic| Err(Failure::from(panic))))
            });
        }
    }

    /// Publishes for the status which arenas have reported changes that are not indexed yet.
    fn tell(&self) {
        for (arena, kept) in &self.arenas {
            let is_taking_in = kept.takes_in && self.running.contains(arena);
            let is_behind = is_taking_in || kept.pending.next_due().is_some();
            self.node.arena_state(arena, |state| state.is_behind = is_behind);
        }
    }

    fn end(&mut self, arena: ArenaName, ended: Result<Reconciled, Failure>) {
        let now = self.now();
        self.running.remove(&arena);
        let failed = ended.as_ref().err().filter(|_| !self.node.is_offline(&arena)).map(Failure::reason);
        self.node.arena_state(&arena, |state| state.failed = failed);
        let is_incomplete = self.node.watching().is_none_or(|watching| watching.is_incomplete());
        // It may have been given up meanwhile.
        self.refresh(now + self.settings.rescan);
        let Some(kept) = self.arenas.get_mut(&arena) else { return };
        match ended {
            Ok(Reconciled { totals, again, is_whole, lacks_room }) => {
                if lacks_room && !kept.lacks_room {
                    warn!(%arena, "the disk of the home is full: indexing is paused");
                }
                kept.lacks_room |= lacks_room;
                if is_whole {
                    kept.took = now - kept.began;
                }
                if !lacks_room && is_whole || totals.hashed_files + totals.moved + totals.deleted > 0 {
                    let (hashed, moved, deleted) = (totals.hashed_files, totals.moved, totals.deleted);
                    info!(%arena, hashed, moved, deleted, "up to date");
                }
                again.into_iter().for_each(|path| kept.pending.note(Some(path), now));
                if is_incomplete {
                    kept.rescan_at = kept.rescan_at.min(now + UNWATCHED_RESCAN);
                }
            }
            Err(failure) if self.node.is_offline(&arena) => {
                let wait_ms = OFFLINE_RETRY.as_millis() as u64;
                debug!(%arena, reason = failure.reason(), wait_ms, "still offline");
                kept.rescan_at = now + OFFLINE_RETRY;
            }
            Err(failure) => {
                let wait_ms = FAILED_RETRY.as_millis() as u64;
                warn!(%arena, reason = failure.reason(), wait_ms, "what changed cannot be taken in");
                kept.rescan_at = kept.rescan_at.min(now + FAILED_RETRY);
            }
        }
    }

    /// When something is due next over which no pass is under way.
    fn next_due(&self) -> Option<Duration> {
        let idle = self.arenas.iter().filter(|(arena, _)| !self.running.contains(*arena));
        let look_for_room = self.lacks_room().then(|| self.now() + ROOM_RETRY);
        idle.map(|(_, kept)| kept.due()).chain(look_for_room).min()
    }

    fn lacks_room(&self) -> bool {
        self.arenas.values().any(|kept| kept.lacks_room)
    }
}

/// How many paths are kept that were heard of and not yet noted.
const NEWS_MAX: usize = 65_536;
/// What is due within so long, is looked at together.
const AT_ONCE_MAX: Duration = Duration::from_millis(100);
/// So many times as long as a look at an arena takes passes until the next one, on network file systems.
const LOOKED_PART: u32 = 20;
/// How often an arena root that is not there is looked for.
const OFFLINE_RETRY: Duration = Duration::from_secs(5);
const FAILED_RETRY: Duration = Duration::from_secs(60);
/// Interval of checks for free space on the disk of the home.
const ROOM_RETRY: Duration = Duration::from_secs(1);
/// How often everything is looked at where not everything is watched.
const UNWATCHED_RESCAN: Duration = Duration::from_secs(600);
const UNWATCHED_MAX: usize = 65_536;
const IDLE: Duration = Duration::from_secs(3600);
