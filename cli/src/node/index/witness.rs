//! What is known of the time since files were read: what the watcher saw of them, and whether it can have missed something.
//! Rules: spec/namespace.md, "Rot or edit".

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use blobstore::{
    fs_type::{has_own_ctime, is_remote, is_stacked},
    is_open_for_writing,
};
use namespace::{ArenaName, RelPath, Signs, SignsSeen, Witness};
use rustix::fs::{CWD, Mode, OFlags};

use super::super::{Node, watch::Watching};

/// What was seen of the paths of one pass.
#[derive(Default)]
pub(super) struct Seen {
    /// The arena root as the watcher names it.
    dir: PathBuf,
    signs: SignsSeen,
    /// How much had been missed when the arena was last read whole; `None` if it was not watched since.
    watched_since: Option<u64>,
    watching: Option<Arc<Watching>>,
    /// For each device that was met, whether its file system has a ctime of its own.
    times_tell: Mutex<HashMap<u64, bool>>,
}

impl Seen {
    /// Takes what was seen at and below `paths` of an arena; `None` is the whole arena.
    pub(super) fn take(node: &Node, arena: &ArenaName, dir: &Path, paths: &[Option<RelPath>]) -> Self {
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let Some(watching) = node.watching() else {
            return Self { dir, ..Self::default() };
        };
        let (shared, mut signs) = (watching.signs(), SignsSeen::default());
        let mut all = shared.lock();
        for path in paths {
            let path = absolute(&dir, path.as_ref());
            // With what happened to the directories above, which others may have to look at too.
            let here = all.of(&path);
            signs.extend(&all.take(&path));
            signs.note(&path, here);
        }
        drop(all);
        let watched_since = node.arena_state(arena, |state| state.watched_since);
        Self { dir, signs, watched_since, watching: Some(watching), times_tell: Mutex::default() }
    }

    /// What is known of the time since the file at `path`, on this device, was read.
    pub(super) fn witness(&self, path: &RelPath, device: u64) -> Witness {
        let times_tell = self.times_tell(path, device);
        Witness { signs: self.of(path), continuous: self.watched_since.is_some(), times_tell }
    }

    fn times_tell(&self, path: &RelPath, device: u64) -> bool {
        let ask = || {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(CWD, self.dir.join(path.as_path()), flags, Mode::empty());
            file.is_ok_and(|file| has_own_ctime(file).unwrap_or(false))
        };
        let mut known = self.times_tell.lock().unwrap_or_else(PoisonError::into_inner);
        *known.entry(device).or_insert_with(ask)
    }

    pub(super) fn of(&self, path: &RelPath) -> Signs {
        self.signs.of(&absolute(&self.dir, Some(path)))
    }

    /// Whether no program can have written to the file at `path` since it was last read, so that its ctime moved for another
    /// reason, and it stayed there.
    pub(super) fn explains_ctime(&self, path: &RelPath) -> bool {
        self.all_signs(path).is_some_and(|(own, above)| own.stayed() && is_unwritten(own, above))
    }

    /// Whether the file that was read at `from`, and nothing else, came to `to`, and no program can have written to it.
    pub(super) fn explains_rename(&self, from: &RelPath, to: &RelPath) -> bool {
        let from = absolute(&self.dir, Some(from));
        let (own, above) = (self.signs.own(&from), self.signs.above(&from));
        let stayed = !(own.may_have_written() || above.left || above.moved_here);
        stayed && self.all_signs(to).is_some_and(|(own, above)| own.moved_here && is_unwritten(own, above))
    }

    /// What was seen by now at `path` itself, and above it; `None` if something may have been missed.
    fn all_signs(&self, path: &RelPath) -> Option<(Signs, Signs)> {
        all_signs(self.watching.as_deref()?, self.watched_since?, &self.dir, path, &self.signs)
    }

    /// Gives back what was seen at `path`, for the next look.
    pub(super) fn give_back(&self, path: &RelPath) {
        if let Some(watching) = &self.watching {
            watching.signs().lock().note(&absolute(&self.dir, Some(path)), self.of(path));
        }
    }

    /// Gives back all of it.
    pub(super) fn give_back_all(&self) {
        if let Some(watching) = &self.watching {
            watching.signs().lock().extend(&self.signs);
        }
    }
}

impl Node {
    /// How much the watcher has missed by now, if there is one. From here on it tells what happens to files that are read.
    pub(super) fn watch_losses(&self) -> Option<u64> {
        self.watching().map(|watching| watching.signs().lock().losses())
    }

    /// What the watcher saw at a path of an arena and no pass has looked at yet, and whether that explains that its ctime moved
    /// although no program can have written to it.
    pub(in super::super) fn seen_at(&self, arena: &ArenaName, path: &RelPath) -> (Signs, bool) {
        let (Some(watching), Some(dir)) = (self.watching(), self.arena_dir(arena)) else {
            return (Signs::default(), false);
        };
        let dir = dir.canonicalize().unwrap_or(dir);
        let since = self.arena_state(arena, |state| state.watched_since);
        let all = since.and_then(|since| all_signs(&watching, since, &dir, path, &SignsSeen::default()));
        let is_explained = all.is_some_and(|(own, above)| own.stayed() && is_unwritten(own, above));
        (watching.signs().lock().of(&absolute(&dir, Some(path))), is_explained)
    }
}

/// What was `taken`, and was seen by now, at `path` itself, and above it; `None` if a program may have written to the file and
/// was not, or not yet, seen to.
fn all_signs(watching: &Watching, since: u64, dir: &Path, path: &RelPath, taken: &SignsSeen) -> Option<(Signs, Signs)> {
    // First who writes unseen. Whoever wrote before that is among the signs of after that.
    if !can_be_watched(&dir.join(path.as_path())).unwrap_or(false) {
        return None;
    }
    let shared = watching.signs();
    let seen = shared.lock();
    let here = absolute(dir, Some(path));
    let complete = seen.losses() == since && !watching.is_incomplete();
    complete.then(|| (taken.own(&here).or(seen.own(&here)), taken.above(&here).or(seen.above(&here))))
}

/// Whether the watcher sees all who write to a file: nobody has it open for writing (a mapping is written to without a word until it
/// is closed), it has no further name in a directory that may not be watched, and no other machine or file system has it.
fn can_be_watched(path: &Path) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(CWD, path, flags, Mode::empty())?);
    let is_alone = file.metadata()?.nlink() == 1 && !is_remote(&file)? && !is_stacked(&file)?;
    Ok(is_alone && is_open_for_writing(&file) == Some(false))
}

/// Whether no program wrote to a file of which all that was seen is this, at it and above it.
fn is_unwritten(own: Signs, above: Signs) -> bool {
    // What came from a watched path into a directory that is new was seen to come.
    let was_watched = !(above.left || above.moved_here) && (own.moved_here || !above.may_have_written());
    !own.may_have_written() && was_watched
}

fn absolute(dir: &Path, path: Option<&RelPath>) -> Vec<u8> {
    let dir = dir.as_os_str().as_encoded_bytes();
    match path {
        Some(path) => [dir, b"/", path.as_bytes()].concat(),
        None => dir.to_owned(),
    }
}
