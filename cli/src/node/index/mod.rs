//! What this machine says of its arenas, brought in line with their directories: by a scan of everything, or where the
//! watcher has heard of something.

mod hash;
mod mounts;
mod moved;
mod offline;
mod pages;
mod reconcile;
mod root;
mod skipped;
mod volume;
mod witness;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use namespace::{ArenaName, RelPath};
use serde::Serialize;
use tracing::{info, warn};

pub(super) use self::{
    hash::{Outcome, hash_at_rest},
    mounts::{MountEvents, MountTable},
    root::{Standing, root_of},
};
use self::{offline::Offline, reconcile::Reconcile};
use super::{Node, blocking, watch::Watching};
use crate::{
    event::Reporter,
    failure::{Code, Failure, WhileDoing},
    target::JsonPath,
};

/// What a pass over an arena, or parts of it, found.
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
    /// Files that were found under another path, and not read.
    pub moved: u64,
    /// Paths that are no longer there, directories included.
    pub deleted: u64,
    /// Sockets, FIFOs and devices, which are not indexed.
    pub special: u64,
    /// Entries that could not be read, or changed too fast.
    pub unreadable: u64,
    /// Files that are suspect and not published: rot and an edit are both possible.
    pub suspected: u64,
}

/// What came of a pass.
pub(super) struct Reconciled {
    pub(super) totals: ScanTotals,
    /// What changed meanwhile, and is to be looked at again.
    pub(super) again: Vec<RelPath>,
    /// Whether it was over all of the arena.
    pub(super) is_whole: bool,
    /// Whether files were left out because the disk of the home is full.
    pub(super) lacks_room: bool,
}

/// Something in an arena that is not indexed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Skipped {
    /// Below the arena root; it may be longer than a path can be.
    pub(super) path: Vec<u8>,
    pub(super) reason: String,
}

/// How the last pass over an arena ended, and what was seen since.
#[derive(Debug, Clone, Default)]
pub(super) struct ArenaState {
    /// Why the arena root cannot be read, if it cannot: nothing is said of what was in it.
    offline: Option<String>,
    /// Whether its file system does not respond.
    pub(super) stalled: bool,
    /// Whether a pass over all of it has come to its end since the start.
    scanned: bool,
    /// Whether files wait to be indexed because the disk of the home is full.
    lacks_room: bool,
    /// Whether changes that the watcher reported are not indexed yet.
    pub(super) is_behind: bool,
    /// Why the last pass failed, if it did.
    pub(super) failed: Option<String>,
    /// How many files the pass has looked at that is under way, or was the last.
    so_far: u64,
    /// Files hashed by that pass, and files that it has found to hash so far.
    read: Arc<AtomicU64>,
    to_read: u64,
    /// How much the watcher had missed when the last such pass began, if the arena was watched without a gap since.
    watched_since: Option<u64>,
    /// Whether something may have changed unseen since the last pass began.
    gap: bool,
    /// What is not indexed, and why.
    skipped: BTreeMap<Vec<u8>, String>,
    /// The parts of the arena that are out of reach, while its root is not.
    parts: Arc<Offline>,
    /// What was out of reach a moment ago, and when that was: all of it, or some parts.
    reach: Option<(Instant, Result<Arc<Offline>, String>)>,
}

impl ArenaState {
    /// How many sockets, FIFOs and devices are at and below a path.
    pub(super) fn special(&self, within: Option<&RelPath>) -> u64 {
        let is_within = |path: &[u8]| {
            within.is_none_or(|dir| {
                path.strip_prefix(dir.as_bytes()).is_some_and(|below| below.is_empty() || below[0] == b'/')
            })
        };
        self.skipped.iter().filter(|(path, reason)| *reason == SPECIAL && is_within(path)).count() as u64
    }
}

/// Why a socket, FIFO or device is not indexed.
const SPECIAL: &str = "a socket, FIFO or device";

/// What `blob status` tells of an arena that is held here.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ArenaStatus {
    /// `indexing` until a first scan has come to its end, `not responding`, `offline`, `waiting for room`, `failing`,
    /// `partly offline`, `partly watched`, `catching up` with changes, or `up to date`.
    pub(crate) state: &'static str,
    /// Reason of that state, except for `indexing`, `catching up` and `up to date`.
    pub(crate) reason: Option<String>,
    /// How many files were looked at so far, while it is `indexing`.
    pub(crate) files_so_far: Option<u64>,
    /// Files hashed, and files found to hash so far, while it is `indexing`.
    pub(crate) files_read: Option<u64>,
    pub(crate) files_to_read: Option<u64>,
    /// How many entries are not indexed, so far as they were counted: up to some ten thousand in one pass.
    pub(crate) skipped: usize,
    /// The parts below the root that are offline.
    pub(crate) offline_parts: Vec<OfflinePart>,
}

/// A part of an arena whose file system is not where it was.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct OfflinePart {
    /// Below the arena root.
    #[serde(flatten)]
    pub(crate) path: JsonPath,
    /// Why.
    pub(crate) reason: String,
}

impl Node {
    /// Brings what is said of an arena in line with its directory. Reads only files that may have changed.
    pub async fn scan(&self, arena: &ArenaName, reporter: &Reporter) -> Result<ScanTotals, Failure> {
        let began = Instant::now();
        let Reconciled { totals, again, lacks_room, .. } = self.reconcile(arena, vec![None], false, reporter).await?;
        self.look_again(arena, again);
        if lacks_room {
            return Err(self.home_full().unwrap_or_else(|| Failure::new(Code::Limit, "the disk of the home was full")));
        }
        let (files, hashed, moved, deleted) = (totals.files, totals.hashed_files, totals.moved, totals.deleted);
        let duration_ms = began.elapsed().as_millis() as u64;
        info!(%arena, files, hashed, moved, deleted, duration_ms, "scanned");
        Ok(totals)
    }

    /// Takes whatever file systems are there now, at the root of an arena and below it, for the arena's, and then does the
    /// same: what they do not have counts as deleted.
    pub(crate) async fn scan_accepting(&self, arena: &ArenaName, reporter: &Reporter) -> Result<ScanTotals, Failure> {
        let _turn = self.indexing_turn(arena).await;
        let (node, name) = (self.clone(), arena.clone());
        let anchored = blocking(move || {
            let held = node.inner.namespace.arenas()?.into_iter().find(|held| held.name == name && held.dir.is_some());
            match held {
                Some(held) => Ok(root_of(&node, &held, true)?.map_err(|why| Failure::new(Code::Error, why))),
                None => Err(not_held(&name)),
            }
        });
        anchored.await?.while_doing(format!("take what is there for the arena {arena}"))?;
        drop(_turn);
        self.scan(arena, reporter).await
    }

    /// Like [`scan`](Self::scan) for what is at and below `paths`, of which none is in another; `None` is the whole arena.
    /// With `accept`, damaged and suspect files are published as they are.
    pub(super) async fn reconcile(
        &self,
        arena: &ArenaName,
        paths: Vec<Option<RelPath>>,
        accept: bool,
        reporter: &Reporter,
    ) -> Result<Reconciled, Failure> {
        let _turn = self.indexing_turn(arena).await;
        let (node, name, reporter) = (self.clone(), arena.clone(), reporter.clone());
        let is_whole = paths.contains(&None);
        let done = blocking(move || Reconcile::new(&node, &name, accept, &reporter)?.run(&paths)).await;
        if let Ok(Reconciled { lacks_room, .. }) = done {
            self.arena_state(arena, |state| {
                state.lacks_room = lacks_room || state.lacks_room && !is_whole;
                state.scanned |= is_whole && !lacks_room;
            });
        }
        done.while_doing(format!("scan the arena {arena}"))
    }

    pub(super) fn note_offline(&self, arena: &ArenaName, why: Option<String>) {
        self.arena_state(arena, |state| {
            if state.offline.is_none()
                && let Some(why) = &why
            {
                warn!(%arena, reason = why, "the arena is offline; nothing is taken for deleted");
            }
            if why.is_some() {
                state.watched_since = None;
            }
            state.offline = why;
        });
    }

    /// Returns why a file of an arena is out of reach, if it is, as of a second ago at most. Blocks.
    pub(super) fn out_of_reach(&self, arena: &ArenaName, path: &[u8]) -> Result<Option<String>, Failure> {
        Ok(match (self.reach(arena)?, RelPath::try_from(path.to_owned())) {
            (Err(why), _) => Some(format!("the arena is offline: {why}")),
            (Ok(parts), Ok(path)) => parts.covers(&path).map(|away| format!("it is in a part that is offline: {away}")),
            (Ok(_), Err(_)) => None,
        })
    }

    /// The parts of an arena that are out of reach, or why all of it is, as of a second ago at most. Blocks.
    pub(super) fn reach(&self, arena: &ArenaName) -> Result<Result<Arc<Offline>, String>, Failure> {
        let recent = |state: &mut ArenaState| state.reach.clone().filter(|(at, _)| at.elapsed() < REACH_AGE_MAX);
        if let Some((_, reach)) = self.arena_state(arena, recent) {
            return Ok(reach);
        }
        let held = self.inner.namespace.arenas()?.into_iter().find(|held| held.name == *arena);
        let Some(held) = held.filter(|held| held.dir.is_some()) else { return Ok(Ok(Arc::default())) };
        let reach = root_of(self, &held, false)?.map(|standing| standing.offline);
        self.arena_state(arena, |state| state.reach = Some((Instant::now(), reach.clone())));
        Ok(reach)
    }

    /// Takes note of which parts of an arena are out of reach.
    fn note_parts(&self, arena: &ArenaName, parts: &Arc<Offline>) {
        self.arena_state(arena, |state| {
            for (path, away) in parts.parts().filter(|(path, _)| state.parts.covers(path).is_none()) {
                let reason = away.to_string();
                warn!(%arena, %path, reason, "a part of the arena is offline; nothing is taken for deleted");
            }
            // Nobody watched what was out of reach.
            if state.parts != *parts {
                state.watched_since = None;
            }
            (state.parts, state.gap) = (parts.clone(), false);
        });
    }

    /// Takes the place of what was known to be skipped at and below `paths`.
    fn note_skipped(&self, arena: &ArenaName, paths: &[Option<RelPath>], skipped: Vec<Skipped>) {
        self.arena_state(arena, |state| {
            for path in paths {
                match path {
                    None => state.skipped.clear(),
                    Some(dir) => {
                        let below = [dir.as_bytes(), b"/"].concat();
                        state.skipped.retain(|path, _| path != dir.as_bytes() && !path.starts_with(&below));
                    }
                }
            }
            state.skipped.extend(skipped.into_iter().map(|Skipped { path, reason }| (path, reason)));
        });
    }

    /// Notes that something in an arena may have changed unseen.
    pub(super) fn note_gap(&self, arena: &ArenaName) {
        self.arena_state(arena, |state| (state.watched_since, state.gap, state.reach) = (None, true, None));
        self.inner.held.forget(arena);
    }

    /// How an arena is doing.
    pub(crate) fn arena_status(&self, arena: &ArenaName) -> ArenaStatus {
        let below = |watching: Arc<Watching>| Some(watching.unwatched_below(&self.arena_dir(arena)?));
        let unwatched = self.watching().and_then(below).unwrap_or(0);
        let silent = || {
            let dir = self.arena_dir(arena)?;
            let kind = self.inner.mounts.silent(&dir.canonicalize().unwrap_or(dir))?;
            let poll_s = self.inner.watch_settings.poll.as_secs_f64();
            Some(format!(
                "what other machines change there is found every {poll_s} s only, for {kind} reports none of it"
            ))
        };
        let limited = || {
            format!(
                "changes in {unwatched} of its directories are found every 10 minutes only: raise fs.inotify.max_user_watches"
            )
        };
        self.arena_state(arena, |state| ArenaStatus {
            state: match state {
                ArenaState { stalled: true, .. } => "not responding",
                ArenaState { offline: Some(_), .. } => "offline",
                ArenaState { lacks_room: true, .. } => "waiting for room",
                ArenaState { failed: Some(_), .. } => "failing",
                ArenaState { scanned: false, .. } => "indexing",
                ArenaState { parts, .. } if parts.parts().next().is_some() => "partly offline",
                _ if unwatched > 0 => "partly watched",
                ArenaState { is_behind: true, .. } => "catching up",
                _ => "up to date",
            },
            reason: state
                .offline
                .clone()
                .or_else(|| {
                    state
                        .lacks_room
                        .then(|| "new and changed files are not indexed while the disk of the home is full".to_owned())
                })
                .or_else(|| state.failed.clone())
                .or_else(|| (unwatched > 0).then(limited))
                .or_else(silent),
            files_so_far: (!state.scanned).then_some(state.so_far),
            files_read: (!state.scanned).then(|| state.read.load(Ordering::Relaxed)),
            files_to_read: (!state.scanned).then_some(state.to_read),
            skipped: state.skipped.len(),
            offline_parts: state
                .parts
                .parts()
                .take(PARTS_TOLD)
                .map(|(path, away)| OfflinePart { path: path.into(), reason: away.to_string() })
                .collect(),
        })
    }

    /// Returns the failure of an action that adds rows, if the disk of the home has too little free space for them.
    pub(crate) fn home_full(&self) -> Option<Failure> {
        let full = self.inner.store.check_room().err()?;
        let hint = "make room there: blob cache trim, or delete files; the daemon resumes without a restart";
        Some(Failure::from(full).code(Code::Limit).hint(hint))
    }

    /// Whether a commit waits for free space on the disk of the home.
    pub(crate) fn waits_for_room(&self) -> bool {
        self.inner.database.reserve.is_waited_for()
    }

    /// What is not indexed of an arena, and why, by path.
    pub(crate) fn skipped(&self, arena: &ArenaName) -> Vec<(JsonPath, String)> {
        self.arena_state(arena, |state| {
            state.skipped.iter().map(|(path, reason)| (path[..].into(), reason.clone())).collect()
        })
    }

    pub(super) fn is_offline(&self, arena: &ArenaName) -> bool {
        self.arena_state(arena, |state| state.offline.is_some())
    }

    pub(super) fn arena_state<T>(&self, arena: &ArenaName, with: impl FnOnce(&mut ArenaState) -> T) -> T {
        let mut states = self.inner.arenas.lock().unwrap_or_else(PoisonError::into_inner);
        with(states.entry(arena.clone()).or_default())
    }
}

fn not_held(arena: &ArenaName) -> Failure {
    Failure::new(Code::NotFound, format!("this machine does not hold an arena {arena}"))
}

/// How long it is remembered what is out of reach.
const REACH_AGE_MAX: Duration = Duration::from_secs(1);
/// Parts of one arena that `blob status` tells.
const PARTS_TOLD: usize = 100;
