//! A machine's file system, in memory.

use std::collections::BTreeMap;

use namespace::{ArenaName, Content, RelPath};
use tree::UnixTime;

use crate::common::{arena, path};

/// Arena and path.
pub(crate) type Key = (ArenaName, RelPath);

/// Files, links and directories. What is above a file is always a directory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Files(BTreeMap<Key, (Content, UnixTime)>);

impl Files {
    pub(crate) fn get(&self, key: &Key) -> Option<&(Content, UnixTime)> {
        self.0.get(key)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Key, &(Content, UnixTime))> {
        self.0.iter()
    }

    /// What is at or below `dir`, or anywhere in the arena.
    pub(crate) fn within(&self, name: &ArenaName, dir: Option<&RelPath>) -> BTreeMap<RelPath, (Content, UnixTime)> {
        let is_within = |(arena, path): &Key| arena == name && dir.is_none_or(|dir| path.is_within(dir));
        let found = self.0.iter().filter(|(key, _)| is_within(key));
        found.map(|((_, path), node)| (path.clone(), node.clone())).collect()
    }

    /// Puts something there, with the directories above it, in place of whatever was in the way.
    pub(crate) fn put(&mut self, (name, at): Key, content: Content, mtime: UnixTime) {
        let mut above = at.parent();
        while let Some(dir) = above {
            let node = self.0.entry((name.clone(), dir.clone())).or_insert((DIRECTORY, mtime));
            if !is_directory(&node.0) {
                *node = (DIRECTORY, mtime);
            }
            above = dir.parent();
        }
        if !is_directory(&content) {
            self.remove(&(name.clone(), at.clone()));
        }
        self.0.insert((name, at), (content, mtime));
    }

    /// Removes what is there, with all below it.
    pub(crate) fn remove(&mut self, (name, at): &Key) {
        self.0.retain(|(arena, path), _| arena != name || !path.is_within(at));
    }

    /// Moves what is at `from` to `to`, which is not below it.
    pub(crate) fn rename(&mut self, from: &Key, to: &Key, mtime: UnixTime) {
        let moved = self.within(&from.0, Some(&from.1));
        self.remove(from);
        self.remove(to);
        for (path, (content, was)) in moved {
            let below = &path.as_bytes()[from.1.as_bytes().len()..];
            let at = common_path([to.1.as_bytes(), below].concat());
            let when = if at == to.1 { mtime } else { was };
            self.put((to.0.clone(), at), content, when);
        }
    }
}

pub(crate) fn is_directory(content: &Content) -> bool {
    matches!(content, Content::Directory { .. })
}

/// Any of the paths there are.
pub(crate) fn any_key(rng: &mut fastrand::Rng) -> Key {
    let name = if rng.u8(..4) == 0 { ARENAS[1] } else { ARENAS[0] };
    (arena(name), path(PATHS[rng.usize(..PATHS.len())]))
}

pub(crate) fn keys() -> impl Iterator<Item = Key> {
    ARENAS.into_iter().flat_map(|name| PATHS.map(|at| (arena(name), path(at))))
}

fn common_path(bytes: Vec<u8>) -> RelPath {
    // A tree moved down may become deeper than all paths that are looked at: what would be is not moved along.
    path(if PATHS.iter().any(|path| path.as_bytes() == bytes) { &bytes[..] } else { PATHS[0].as_bytes() })
}

pub(crate) const DIRECTORY: Content = Content::Directory { mode: 0o755 };
pub(crate) const ARENAS: [&str; 2] = ["photos", "photos 2"];
/// What is in "a" stands behind "a-b".
const PATHS: [&str; 9] = ["a", "a/b", "a/b/c", "a-b", "b", "b/b", "b/b/c", "c", "c/d"];
