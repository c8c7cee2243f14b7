use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What the watcher saw happen at a path. None of it says what is there now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signs {
    /// It was created, or a program wrote to it.
    pub wrote: bool,
    /// A program that could have written to it closed it; what is written through a mapping shows in no other way.
    pub closed: bool,
    /// It came here under another name.
    pub moved_here: bool,
    /// It went from here, or was deleted.
    pub left: bool,
    /// Its attributes changed: mode, owner, times, names.
    pub attributes: bool,
}

impl Signs {
    /// What either saw.
    pub fn or(self, other: Self) -> Self {
        Self {
            wrote: self.wrote || other.wrote,
            closed: self.closed || other.closed,
            moved_here: self.moved_here || other.moved_here,
            left: self.left || other.left,
            attributes: self.attributes || other.attributes,
        }
    }

    /// Whether a program may have written to it or replaced it.
    pub fn may_have_written(self) -> bool {
        self.wrote || self.closed
    }

    /// Whether it was not seen to go or to come.
    pub fn stayed(self) -> bool {
        !(self.left || self.moved_here)
    }

    /// Whether nothing was seen.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

/// What was seen, by absolute path, and not yet looked at.
///
/// **Bound.** At most 65,536 paths. The next one makes it forget all, which counts as a loss.
#[derive(Debug, Clone, Default)]
pub struct SignsSeen {
    by_path: BTreeMap<Vec<u8>, Signs>,
    losses: u64,
}

impl SignsSeen {
    /// Notes what was seen at `path`.
    pub fn note(&mut self, path: &[u8], signs: Signs) {
        if signs.is_none() {
            return;
        }
        if self.by_path.len() >= PATHS_MAX && !self.by_path.contains_key(path) {
            self.lose();
        }
        let known = self.by_path.entry(path.to_owned()).or_default();
        *known = known.or(signs);
    }

    /// Notes that something was not seen: from here on, what is not here may have happened all the same.
    pub fn lose(&mut self) {
        self.by_path.clear();
        self.losses += 1;
    }

    /// How often something was not seen.
    pub fn losses(&self) -> u64 {
        self.losses
    }

    /// What was seen at `path` itself.
    pub fn own(&self, path: &[u8]) -> Signs {
        self.by_path.get(path).copied().unwrap_or_default()
    }

    /// What was seen at the directories above `path`, but for their attributes, which are nothing to their files.
    pub fn above(&self, path: &[u8]) -> Signs {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        let above = ends.filter_map(|end| self.by_path.get(&path[..end]));
        above.fold(Signs::default(), |all, signs| all.or(Signs { attributes: false, ..*signs }))
    }

    /// What was seen at `path` itself, or at a directory above it: what came with its directory came too.
    pub fn of(&self, path: &[u8]) -> Signs {
        self.own(path).or(self.above(path))
    }

    /// Takes what was seen at and below `path`.
    pub fn take(&mut self, path: &[u8]) -> Self {
        let inside = |key: &[u8]| key.len() == path.len() || key[path.len()] == b'/';
        let from = (Bound::Included(path.to_owned()), Bound::Unbounded);
        let below = self.by_path.range(from).map(|(key, _)| key).take_while(|key| key.starts_with(path));
        let keys: Vec<_> = below.filter(|key| inside(key)).cloned().collect();
        let by_path = keys.into_iter().filter_map(|key| self.by_path.remove_entry(&key)).collect();
        Self { by_path, losses: self.losses }
    }

    /// Notes all that `other` has.
    pub fn extend(&mut self, other: &Self) {
        other.by_path.iter().for_each(|(path, signs)| self.note(path, *signs));
    }
}

/// [`SignsSeen`] by one, for another to look at. Clones are one.
#[derive(Debug, Clone, Default)]
pub struct SharedSigns(Arc<Mutex<SignsSeen>>);

impl SharedSigns {
    /// What was seen so far.
    pub fn lock(&self) -> MutexGuard<'_, SignsSeen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const PATHS_MAX: usize = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Signs = Signs { wrote: false, closed: false, moved_here: false, left: false, attributes: false };
    const WROTE: Signs = Signs { wrote: true, ..NONE };
    const MOVED: Signs = Signs { moved_here: true, attributes: true, ..NONE };

    fn seen() -> SignsSeen {
        let mut seen = SignsSeen::default();
        for (path, signs) in [("/r/a", MOVED), ("/r/a/b", WROTE), ("/r/a-b", WROTE), ("/r/c", NONE)] {
            seen.note(path.as_bytes(), signs);
        }
        seen
    }

    #[test]
    fn what_a_directory_did_its_files_did() {
        let seen = seen();
        let moved = Signs { attributes: false, ..MOVED };
        for (path, signs) in [
            ("/r/a", MOVED),
            ("/r/a/b", WROTE.or(moved)),
            ("/r/a/c/d", moved),
            ("/r/a-b", WROTE),
            ("/r/a-", NONE),
            ("/r/c", NONE),
        ] {
            assert_eq!(seen.of(path.as_bytes()), signs, "{path}");
        }
        assert_eq!((seen.own(b"/r/a/b"), seen.above(b"/r/a/b")), (WROTE, moved));
    }

    #[test]
    fn what_is_taken_is_seen_once() {
        let mut seen = seen();
        let taken = seen.take(b"/r/a/b");
        assert_eq!((taken.of(b"/r/a/b"), seen.of(b"/r/a/b").wrote), (WROTE, false));
        let taken = seen.take(b"/r/a");
        assert_eq!((taken.of(b"/r/a"), taken.of(b"/r/a-b"), seen.of(b"/r/a")), (MOVED, NONE, NONE));
        let taken = seen.take(b"/r");
        assert_eq!((taken.of(b"/r/a-b"), seen.of(b"/r/a-b")), (WROTE, NONE));
        seen.extend(&taken);
        assert_eq!(seen.of(b"/r/a-b"), WROTE);
    }

    #[test]
    fn too_much_is_a_loss() {
        let mut seen = SignsSeen::default();
        for n in 0..=PATHS_MAX {
            assert_eq!(seen.losses(), 0);
            seen.note(format!("/{n}").as_bytes(), WROTE);
        }
        assert_eq!((seen.of(b"/0"), seen.losses()), (NONE, 1));
        assert_eq!(seen.of(format!("/{PATHS_MAX}").as_bytes()), WROTE);
    }
}
