//! Who reads the small files of a directory one after the other, for whom the others are to be fetched ahead. Rules:
//! spec/nfs.md, "Reading".

use std::time::{Duration, Instant};

/// The directories of which small files were read that were not here.
#[derive(Debug, Default)]
pub(crate) struct Siblings {
    /// The one in which something was missed last is the last.
    directories: Vec<Missed>,
}

#[derive(Debug)]
struct Missed {
    directory: u64,
    /// What was missed last, and when.
    file: u64,
    last: Instant,
    is_fetching: bool,
}

impl Siblings {
    /// Takes note that the small `file` in `directory` is read, and not here. Returns whether others are to be fetched, which
    /// [ends](Self::end) then: so it is when another one in there was missed a short while before.
    pub(crate) fn miss(&mut self, directory: u64, file: u64, now: Instant) -> bool {
        let before = self.directories.iter().position(|missed| missed.directory == directory);
        let before = before.map(|at| self.directories.remove(at));
        let was_fetching = before.as_ref().is_some_and(|missed| missed.is_fetching);
        let is_next = |missed: Missed| missed.file != file && now.duration_since(missed.last) < TOGETHER;
        let begins = !was_fetching && before.is_some_and(is_next);
        if self.directories.len() == DIRECTORIES_MAX {
            self.directories.remove(0);
        }
        self.directories.push(Missed { directory, file, last: now, is_fetching: begins || was_fetching });
        begins
    }

    /// What was to be fetched of `directory` has been, or cannot be.
    pub(crate) fn end(&mut self, directory: u64) {
        if let Some(missed) = self.directories.iter_mut().find(|missed| missed.directory == directory) {
            missed.is_fetching = false;
        }
    }
}

/// What is missed within this time is missed by one who reads them all.
const TOGETHER: Duration = Duration::from_secs(10);
/// So many directories are remembered.
const DIRECTORIES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_miss_in_a_while_begins_it_once() {
        let (mut siblings, start) = (Siblings::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let misses = [
            (1, 100, 0, false),
            (1, 100, 1, false),
            (2, 200, 1, false),
            (1, 101, 10, true),
            (1, 102, 11, false),
            (2, 201, 11, false),
            (2, 202, 12, true),
        ];
        for (directory, file, seconds, begins) in misses {
            assert_eq!(siblings.miss(directory, file, at(seconds)), begins, "{file} at {seconds} s");
        }
        siblings.end(1);
        assert!(siblings.miss(1, 103, at(13)));
        siblings.end(1);
        assert!(!siblings.miss(1, 104, at(23)), "too long ago");
    }

    #[test]
    fn few_directories_are_remembered() {
        let (mut siblings, now) = (Siblings::default(), Instant::now());
        for directory in 0..=DIRECTORIES_MAX as u64 {
            assert!(!siblings.miss(directory, 100, now));
        }
        assert_eq!(siblings.directories.len(), DIRECTORIES_MAX);
        assert!(!siblings.miss(0, 101, now), "the one that was missed longest ago is forgotten");
        assert!(siblings.miss(DIRECTORIES_MAX as u64, 101, now));
        siblings.end(u64::MAX);
    }
}
