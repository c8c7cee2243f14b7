use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    path::Path,
    sync::Arc,
};

/// Which watch is on which directory: each watch has one path, and each path one watch.
#[derive(Debug, Default)]
pub(super) struct Dirs {
    paths: HashMap<i32, Arc<Path>>,
    /// Ordered by components, so that what is below a directory comes right behind it.
    watches: BTreeMap<Arc<Path>, i32>,
}

impl Dirs {
    /// The directory that `watch` is on.
    pub(super) fn path(&self, watch: i32) -> Option<&Path> {
        self.paths.get(&watch).map(AsRef::as_ref)
    }

    /// Enters that `watch` is on `dir`.
    ///
    /// If another watch was on it, `dir` is another directory now: then all watches there and below are forgotten and
    /// returned. If `watch` was on another path, the directory was moved, and that path is forgotten.
    pub(super) fn insert(&mut self, watch: i32, dir: &Path) -> Vec<i32> {
        if self.path(watch) == Some(dir) {
            return Vec::new();
        }
        self.remove(watch);
        let stale = if self.watches.contains_key(dir) { self.forget(dir) } else { Vec::new() };
        let dir = Arc::from(dir);
        self.paths.insert(watch, Arc::clone(&dir));
        self.watches.insert(dir, watch);
        stale
    }

    /// Forgets `watch`.
    pub(super) fn remove(&mut self, watch: i32) {
        if let Some(path) = self.paths.remove(&watch) {
            self.watches.remove(&path);
        }
    }

    /// Forgets and returns all watches on `dir` and below it.
    pub(super) fn forget(&mut self, dir: &Path) -> Vec<i32> {
        let from = (Bound::Included(dir), Bound::Unbounded);
        let within = self.watches.range::<Path, _>(from).take_while(|(path, _)| path.starts_with(dir));
        let stale: Vec<i32> = within.map(|(_, watch)| *watch).collect();
        stale.iter().for_each(|watch| self.remove(*watch));
        stale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(paths: &[&str]) -> Dirs {
        let mut dirs = Dirs::default();
        for (watch, path) in (1..).zip(paths) {
            assert!(dirs.insert(watch, Path::new(path)).is_empty());
        }
        dirs
    }

    fn check(dirs: &Dirs, expected: &[(i32, &str)]) {
        let watches: Vec<(i32, &str)> =
            dirs.watches.iter().map(|(path, watch)| (*watch, path.to_str().unwrap())).collect();
        assert_eq!(watches, expected);
        assert_eq!(dirs.paths.len(), expected.len());
        assert!(expected.iter().all(|(watch, path)| dirs.path(*watch) == Some(Path::new(path))));
    }

    #[test]
    fn what_is_below_and_nothing_beside() {
        let mut dirs = dirs(&["/r", "/r/a", "/r/a-b", "/r/a/b/c", "/r/a/b", "/r/a0", "/r/aa"]);
        assert_eq!(dirs.forget(Path::new("/r/a")), [2, 5, 4]);
        check(&dirs, &[(1, "/r"), (3, "/r/a-b"), (6, "/r/a0"), (7, "/r/aa")]);
        assert!(dirs.forget(Path::new("/r/a")).is_empty());
        dirs.remove(6);
        dirs.remove(6);
        check(&dirs, &[(1, "/r"), (3, "/r/a-b"), (7, "/r/aa")]);
    }

    #[test]
    fn a_directory_moved_or_replaced() {
        let mut dirs = dirs(&["/r", "/r/a", "/r/a/b", "/r/c"]);
        assert!(dirs.insert(2, Path::new("/r/a")).is_empty());
        assert!(dirs.insert(2, Path::new("/r/x")).is_empty());
        check(&dirs, &[(1, "/r"), (3, "/r/a/b"), (4, "/r/c"), (2, "/r/x")]);
        assert!(dirs.insert(3, Path::new("/r/x/b")).is_empty());
        // Another directory at a path that is watched: what was below the old one is not below this one.
        assert_eq!(dirs.insert(9, Path::new("/r/x")), [2, 3]);
        check(&dirs, &[(1, "/r"), (4, "/r/c"), (9, "/r/x")]);
        // What was below takes the place of what it was in.
        assert!(dirs.insert(10, Path::new("/r/x/y")).is_empty());
        assert_eq!(dirs.insert(10, Path::new("/r/x")), [9]);
        check(&dirs, &[(1, "/r"), (4, "/r/c"), (10, "/r/x")]);
    }
}
