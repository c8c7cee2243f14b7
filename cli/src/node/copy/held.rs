use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use blobstore::RootId;
use namespace::{ArenaName, RelPath};
use peers::{Done, Why};

use super::{super::index::Standing, names::Exact, place::Destination};

/// An arena that is held here and whose root is there.
#[derive(Clone)]
pub(super) struct HeldArena {
    pub(super) name: ArenaName,
    pub(super) root: RootId,
    pub(super) dir: PathBuf,
    pub(super) destination: Arc<Destination>,
    /// `dir` without symbolic links.
    pub(super) true_dir: PathBuf,
    /// Where the daemon's own files are.
    pub(super) own_dirs: Arc<[PathBuf]>,
    pub(super) exact: Exact,
    /// What its root was when it was looked at.
    pub(super) standing: Standing,
}

impl HeldArena {
    /// Refuses what is at or below a part of the arena that is out of reach.
    pub(super) fn offline(&self, path: &RelPath) -> Option<Done> {
        let away = self.standing.offline.covers(path)?;
        Some(Done::failed(
            Why::Failed,
            &format!("{path} is in a part of the arena {} that is offline: {away}", self.name),
        ))
    }

    /// Whether a path is the daemon's own: at, below or above its state, cache or configuration.
    pub(super) fn is_own(&self, path: &RelPath) -> bool {
        let path = self.true_dir.join(path.as_path());
        self.own_dirs.iter().any(|own| path.starts_with(own) || own.starts_with(&path))
    }
}

/// Arenas that were looked at a moment ago: of many orders, not each looks whether the root is there.
#[derive(Default)]
pub(in super::super) struct HeldArenas(Mutex<HashMap<ArenaName, (Instant, HeldArena)>>);

impl HeldArenas {
    pub(super) fn recent(&self, name: &ArenaName) -> Option<HeldArena> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(name).filter(|(since, _)| since.elapsed() < RECENT).map(|(_, held)| held.clone())
    }

    /// Has an arena looked at anew: something was mounted or unmounted there.
    pub(in super::super) fn forget(&self, arena: &ArenaName) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(arena);
    }

    pub(super) fn note(&self, arena: HeldArena) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(arena.name.clone(), (Instant::now(), arena));
    }
}

/// How long a root counts as there.
const RECENT: Duration = Duration::from_millis(100);
