use std::collections::BTreeMap;

use crate::RelPath;

/// What the watcher saw happen at a path. None of it says what is there now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signs {
    /// It was created, or a program wrote to it.
    pub wrote: bool,
    /// A program that could have written to it closed it; what is written through a mapping shows in no other way.
    pub closed: bool,
    /// It came here under another name.
    pub moved_here: bool,
}

impl Signs {
    /// What either saw.
    pub fn or(self, other: Self) -> Self {
        Self {
            wrote: self.wrote || other.wrote,
            closed: self.closed || other.closed,
            moved_here: self.moved_here || other.moved_here,
        }
    }

    /// Whether nothing was seen.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

/// What was seen in one arena and not yet looked at.
///
/// **Bound.** At most 65,536 paths. The next one makes it forget all: then metadata alone must tell.
#[derive(Debug, Clone, Default)]
pub struct SignsSeen(BTreeMap<Vec<u8>, Signs>);

impl SignsSeen {
    /// Notes what was seen at `path`; the empty path is the arena root.
    pub fn note(&mut self, path: &[u8], signs: Signs) {
        if signs.is_none() {
            return;
        }
        if self.0.len() >= PATHS_MAX && !self.0.contains_key(path) {
            self.0.clear();
        }
        let known = self.0.entry(path.to_owned()).or_default();
        *known = known.or(signs);
    }

    /// Notes all that `other` has.
    pub fn extend(&mut self, other: &Self) {
        other.0.iter().for_each(|(path, signs)| self.note(path, *signs));
    }

    /// What was seen at `path` itself, or at a directory above it: what came with its directory came too.
    pub fn of(&self, path: &RelPath) -> Signs {
        let bytes = path.as_bytes();
        let ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        ends.chain([bytes.len()])
            .filter_map(|end| self.0.get(&bytes[..end]))
            .fold(Signs::default(), |all, signs| all.or(*signs))
    }

    /// Takes what was seen at, above and below each of `paths`; `None` is the whole arena. What was seen above stays here
    /// too.
    pub fn take(&mut self, paths: &[Option<RelPath>]) -> Self {
        if paths.contains(&None) {
            return std::mem::take(self);
        }
        let mut taken = Self::default();
        for path in paths.iter().flatten() {
            let above = std::iter::successors(path.parent(), RelPath::parent);
            taken.0.extend(above.filter_map(|dir| Some((dir.as_bytes().to_owned(), *self.0.get(dir.as_bytes())?))));
            let below = self.0.range(path.as_bytes().to_owned()..);
            let keys: Vec<_> = below
                .map(|(key, _)| key)
                .take_while(|key| key.starts_with(path.as_bytes()))
                .filter(|key| key.len() == path.as_bytes().len() || key[path.as_bytes().len()] == b'/')
                .cloned()
                .collect();
            taken.0.extend(keys.into_iter().filter_map(|key| self.0.remove_entry(&key)));
        }
        taken
    }
}

const PATHS_MAX: usize = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    const WROTE: Signs = Signs { wrote: true, closed: false, moved_here: false };
    const MOVED: Signs = Signs { wrote: false, closed: false, moved_here: true };

    fn path(path: &str) -> RelPath {
        path.as_bytes().to_owned().try_into().unwrap()
    }

    fn seen() -> SignsSeen {
        let mut seen = SignsSeen::default();
        seen.note(b"a", MOVED);
        seen.note(b"a/b", WROTE);
        seen.note(b"a-b", WROTE);
        seen.note(b"c", Signs::default());
        seen
    }

    #[test]
    fn what_a_directory_did_its_files_did() {
        let seen = seen();
        assert_eq!(seen.of(&path("a/b")), WROTE.or(MOVED));
        assert_eq!(seen.of(&path("a/c/d")), MOVED);
        assert_eq!(seen.of(&path("a-b")), WROTE);
        assert_eq!(seen.of(&path("a-")), Signs::default());
        assert_eq!(seen.of(&path("c")), Signs::default());
    }

    #[test]
    fn what_is_taken_is_seen_once() {
        let (mut seen, scope) = (seen(), [Some(path("a/b"))]);
        let taken = seen.take(&scope);
        assert_eq!(taken.of(&path("a/b")), WROTE.or(MOVED));
        assert_eq!(seen.of(&path("a/b")), MOVED);
        let taken = seen.take(&[Some(path("a"))]);
        assert_eq!((taken.of(&path("a")), seen.of(&path("a"))), (MOVED, Signs::default()));
        assert_eq!(seen.take(&[None]).of(&path("a-b")), WROTE);
        assert!(seen.0.is_empty());
    }

    #[test]
    fn too_much_is_forgotten() {
        let mut seen = SignsSeen::default();
        for n in 0..=PATHS_MAX {
            seen.note(n.to_string().as_bytes(), WROTE);
        }
        assert_eq!(seen.of(&path("0")), Signs::default());
        assert_eq!(seen.of(&path(&PATHS_MAX.to_string())), WROTE);
    }
}
