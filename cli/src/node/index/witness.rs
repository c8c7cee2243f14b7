//! What is known of the time since files were read: what the watcher saw of them, and whether it can have missed something.
//! Rules: spec/namespace.md, "Rot or edit".

use std::path::{Path, PathBuf};

use blobstore::{Access, Disk, RealDisk};
use namespace::{ArenaName, RelPath, SharedSigns, Signs, SignsSeen, Witness};

use super::super::Node;

/// What was seen of the paths of one pass.
#[derive(Default)]
pub(super) struct Seen {
    /// The arena root as the watcher names it.
    dir: PathBuf,
    signs: SignsSeen,
    /// Whether the arena was watched since its files were read.
    continuous: bool,
    /// Whether nothing was missed since.
    complete: bool,
    /// The watcher's, for what is not looked at in the end.
    shared: Option<SharedSigns>,
}

impl Seen {
    /// Takes what was seen at and below `paths` of an arena; `None` is the whole arena.
    pub(super) fn take(node: &Node, arena: &ArenaName, dir: &Path, paths: &[Option<RelPath>]) -> Self {
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let Some(shared) = node.watching().map(|watching| watching.signs()) else {
            return Self { dir, ..Self::default() };
        };
        let mut all = shared.lock();
        let (losses, mut signs) = (all.losses(), SignsSeen::default());
        for path in paths {
            let path = absolute(&dir, path.as_ref());
            // With what happened to the directories above, which others may have to look at too.
            let here = all.of(&path);
            signs.extend(&all.take(&path));
            signs.note(&path, here);
        }
        drop(all);
        let since = node.arena_state(arena, |state| state.watched_since);
        let (continuous, complete) = (since.is_some(), since == Some(losses));
        Self { dir, signs, continuous, complete, shared: Some(shared) }
    }

    /// What is known of the time since the file at `path` was read.
    pub(super) fn witness(&self, path: &RelPath) -> Witness {
        Witness { signs: self.of(path), continuous: self.continuous }
    }

    pub(super) fn of(&self, path: &RelPath) -> Signs {
        self.signs.of(&absolute(&self.dir, Some(path)))
    }

    /// Whether the ctime of the file at `path` moved for a reason that was seen, and no program can have written to it.
    pub(super) fn explains_ctime(&self, path: &RelPath) -> bool {
        let own = self.signs.own(&absolute(&self.dir, Some(path)));
        own.stayed() && self.complete && explains_ctime(&self.dir, path, &self.signs)
    }

    /// Whether the file that was read at `from`, and nothing else, came to `to`, and no program can have written to it.
    pub(super) fn explains_rename(&self, from: &RelPath, to: &RelPath) -> bool {
        let [from, there] = [from, to].map(|path| absolute(&self.dir, Some(path)));
        let (own, above) = (self.signs.own(&from), self.signs.above(&from));
        self.signs.own(&there).moved_here
            && !own.may_have_written()
            && !(above.left || above.moved_here)
            && self.complete
            && explains_ctime(&self.dir, to, &self.signs)
    }

    /// Gives back what was seen at `path`, for the next look.
    pub(super) fn give_back(&self, path: &RelPath) {
        if let Some(shared) = &self.shared {
            shared.lock().note(&absolute(&self.dir, Some(path)), self.of(path));
        }
    }

    /// Gives back all of it.
    pub(super) fn give_back_all(&self) {
        if let Some(shared) = &self.shared {
            shared.lock().extend(&self.signs);
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
        let shared = watching.signs();
        let seen = shared.lock();
        let complete = self.arena_state(arena, |state| state.watched_since == Some(seen.losses()));
        let here = absolute(&dir, Some(path));
        let is_explained = complete && seen.own(&here).stayed() && explains_ctime(&dir, path, &seen);
        (seen.of(&here), is_explained)
    }
}

/// Whether `signs` tell why a file's ctime moved, of which nothing else moved, and that no program wrote to it: none that
/// closed it since, none that has it open now, and none while its directory was elsewhere.
fn explains_ctime(dir: &Path, path: &RelPath, signs: &SignsSeen) -> bool {
    let here = absolute(dir, Some(path));
    let (own, above) = (signs.own(&here), signs.above(&here));
    let is_closed = || {
        let open = RealDisk.open_beneath(dir, path.as_path(), Access::Read);
        open.is_ok_and(|file| file.is_open_for_writing() == Some(false))
    };
    // What came from a watched path into a directory that is new was seen to come.
    let was_watched = !(above.left || above.moved_here) && (own.moved_here || !above.may_have_written());
    (own.attributes || own.moved_here) && !own.may_have_written() && was_watched && is_closed()
}

fn absolute(dir: &Path, path: Option<&RelPath>) -> Vec<u8> {
    let dir = dir.as_os_str().as_encoded_bytes();
    match path {
        Some(path) => [dir, b"/", path.as_bytes()].concat(),
        None => dir.to_owned(),
    }
}
