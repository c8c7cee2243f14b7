use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use crate::RelPath;

/// The paths of one arena about which something was heard, until they rest.
///
/// A path is due when nothing was noted for it for `settle`, or `settle_max` after it was first noted, whichever is
/// earlier. What is taken begins anew when it is noted again. Times are durations since any fixed start; one that
/// is before an earlier one counts as that one.
///
/// Call [`note`](Self::note) for everything heard, wait until [`next_due`](Self::next_due) or more is heard, then
/// [`take_due`](Self::take_due) and look at what it gives and at all that is below.
///
/// **Bound.** At most 65,536 paths are kept. The next one makes room first, by putting directories in place of what
/// is noted below them, until 32,768 are left at most: first the directories with the most noted right in them, but
/// not the arena root; if that is not enough, all paths are cut to the greatest depth at which it is, which is at
/// last depth 0, the whole arena. A directory that stands for others was first noted when the first of them was,
/// and last noted when the last of them was. Until it is taken, everything noted below it counts as noted for it.
///
/// A note costs O(log n), and O(depth) where a directory stands for others. Making room costs O(n log n), at most
/// once in 32,768 notes.
#[derive(Debug)]
pub struct Pending {
    settle: Duration,
    settle_max: Duration,
    paths_max: usize,
    /// By path; the whole arena is the empty one.
    noted: HashMap<Arc<[u8]>, Noted>,
    /// The same paths by when they are due; the number tells apart what is due at once.
    due: BTreeMap<(Duration, u64), Arc<[u8]>>,
    /// How many of them stand for others.
    standing: usize,
    /// The last number given.
    number: u64,
}

#[derive(Debug, Clone, Copy)]
struct Noted {
    first: Duration,
    last: Duration,
    /// Whether it stands for what is below it.
    stands: bool,
    number: u64,
}

impl Pending {
    /// Nothing is noted yet.
    pub fn new(settle: Duration, settle_max: Duration) -> Self {
        Self::with_paths_max(settle, settle_max, PATHS_MAX)
    }

    /// As `new`, with another bound, at least 2.
    fn with_paths_max(settle: Duration, settle_max: Duration, paths_max: usize) -> Self {
        let (noted, due) = (HashMap::new(), BTreeMap::new());
        Self { settle, settle_max, paths_max, noted, due, standing: 0, number: 0 }
    }

    /// Notes at `now` that something happened at `path` or below it; without a path, anywhere in the arena.
    pub fn note(&mut self, path: Option<RelPath>, now: Duration) {
        let path = path.map_or_else(Vec::new, Vec::from);
        let mut place = self.place(&path);
        if self.noted.len() >= self.paths_max && !self.noted.contains_key(place) {
            self.make_room();
            place = self.place(&path);
        }
        if let Some(known) = self.noted.get(place) {
            let last = known.last.max(now);
            self.put(place.into(), Noted { last, ..*known });
        } else {
            self.put(place.into(), Noted { first: now, last: now, stands: false, number: 0 });
        }
    }

    /// When the first of the noted paths is due, if there is any.
    pub fn next_due(&self) -> Option<Duration> {
        self.due.first_key_value().map(|((due, _), _)| *due)
    }

    /// Takes everything that is due at `now`, ascending; nothing if the whole arena is, which is first of all.
    ///
    /// None of the answer is inside another one. What is inside one of them and not due stays noted.
    pub fn take_due(&mut self, now: Duration) -> Vec<Option<RelPath>> {
        let mut taken = Vec::new();
        while let Some(first) = self.due.first_entry()
            && first.key().0 <= now
        {
            let path = first.remove();
            let noted = self.noted.remove(&path);
            self.standing -= usize::from(noted.is_some_and(|noted| noted.stands));
            taken.push(path);
        }
        taken.sort_unstable();
        let alone =
            |path: &&Arc<[u8]>| !above(path).any(|dir| taken.binary_search_by(|path| (**path).cmp(dir)).is_ok());
        // Only the empty path is none: the whole arena.
        taken.iter().filter(alone).map(|path| RelPath::try_from(path.to_vec()).ok()).collect()
    }

    /// What `path` is noted as: the nearest directory that stands for it, or itself.
    fn place<'a>(&self, path: &'a [u8]) -> &'a [u8] {
        let stands = |dir: &&[u8]| self.noted.get(*dir).is_some_and(|noted| noted.stands);
        if self.standing == 0 { path } else { above(path).find(stands).unwrap_or(path) }
    }

    /// Enters `path`, or changes what is noted for it.
    fn put(&mut self, path: Arc<[u8]>, mut noted: Noted) {
        let due =
            |noted: &Noted| (noted.last.saturating_add(self.settle)).min(noted.first.saturating_add(self.settle_max));
        if let Some(known) = self.noted.get_mut(&path) {
            if due(known) != due(&noted) {
                let path = self.due.remove(&(due(known), known.number)).unwrap_or(path);
                self.due.insert((due(&noted), known.number), path);
            }
            self.standing += usize::from(noted.stands && !known.stands);
            *known = Noted { number: known.number, ..noted };
        } else {
            self.number += 1;
            noted.number = self.number;
            self.due.insert((due(&noted), noted.number), Arc::clone(&path));
            self.standing += usize::from(noted.stands);
            self.noted.insert(path, noted);
        }
    }

    /// Puts directories in place of what is noted below them, until half the bound is left at most.
    fn make_room(&mut self) {
        let left = self.paths_max / 2;
        let mut inside: HashMap<&[u8], usize> = HashMap::new();
        for dir in self.noted.keys().filter_map(|path| parent(path)).filter(|dir| !dir.is_empty()) {
            *inside.entry(dir).or_default() += 1;
        }
        let mut fullest: Vec<(&[u8], usize)> = inside.into_iter().collect();
        fullest.sort_unstable_by_key(|&(dir, count)| (std::cmp::Reverse(count), dir));
        let (mut count, mut standing) = (self.noted.len(), HashSet::new());
        for (dir, inside) in fullest {
            if count <= left || inside == 1 {
                break;
            }
            count -= inside - 1;
            standing.insert(dir);
        }
        let depth = (count > left).then(|| self.depth(left));
        let place = |path: &[u8]| match depth {
            Some(depth) => cut(path, depth).len(),
            None => parent(path).filter(|dir| standing.contains(dir)).map_or(path.len(), <[u8]>::len),
        };
        let places: Vec<usize> = self.noted.keys().map(|path| place(path)).collect();
        let noted = std::mem::take(&mut self.noted);
        self.due.clear();
        self.standing = 0;
        for ((path, noted), len) in noted.into_iter().zip(places) {
            let stands = noted.stands || len < path.len();
            let noted = match self.noted.get(&path[..len]) {
                Some(other) => {
                    let (first, last) = (noted.first.min(other.first), noted.last.max(other.last));
                    Noted { first, last, stands: stands || other.stands, ..noted }
                }
                None => Noted { stands, ..noted },
            };
            let path = if len < path.len() { Arc::from(&path[..len]) } else { path };
            self.put(path, noted);
        }
    }

    /// The greatest depth at which no more than `left` paths are left when all are cut to it. Depth 0 leaves one.
    fn depth(&self, left: usize) -> usize {
        let deepest = self.noted.keys().map(|path| 1 + path.iter().filter(|b| **b == b'/').count()).max();
        let (mut enough, mut too_many) = (0, deepest.unwrap_or(0) + 1);
        while enough + 1 < too_many {
            let depth = enough.midpoint(too_many);
            let cut: HashSet<&[u8]> = self.noted.keys().map(|path| cut(path, depth)).collect();
            *(if cut.len() <= left { &mut enough } else { &mut too_many }) = depth;
        }
        enough
    }
}

/// The directory that `path` is in; the arena root is in none.
fn parent(path: &[u8]) -> Option<&[u8]> {
    let slash = path.iter().rposition(|b| *b == b'/');
    (!path.is_empty()).then(|| &path[..slash.unwrap_or(0)])
}

/// The directories that `path` is below, the nearest first, the arena root last.
fn above(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(parent(path), |dir| parent(dir))
}

/// The first `depth` components of `path`.
fn cut(path: &[u8], depth: usize) -> &[u8] {
    let slashes = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(at, _)| at);
    let end = slashes.chain([path.len()]).take(depth).last();
    &path[..end.unwrap_or(0)]
}

const PATHS_MAX: usize = 65_536;

#[cfg(test)]
mod tests;
