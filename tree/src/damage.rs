use std::io;

use crate::{
    cv::{Cv, Pair, join, parent_cv, split, subtree_cv},
    geometry::{Geometry, PAIR_BYTES, Subtree},
    hash::{TASK_GROUPS, with_bytes},
    id::BlobId,
    range::RangeSet,
    read_at::ReadAt,
};

/// What is wrong with a blob that is here.
#[derive(Debug, Default)]
pub struct Damage {
    /// The chunk groups whose bytes do not prove, or cannot be read.
    pub data: RangeSet,
    /// The bytes below those pairs of the outboard that are wrong. The bytes themselves may be sound: then
    /// the outboard can be made anew from them.
    pub outboard: RangeSet,
    /// The first error of reading the data, if there was one.
    pub unreadable: Option<io::Error>,
}

impl Damage {
    /// Whether nothing is wrong.
    pub fn is_none(&self) -> bool {
        self.data.is_empty() && self.outboard.is_empty()
    }

    fn merge(mut self, other: Damage) -> Damage {
        self.data.extend(other.data.iter());
        self.outboard.extend(other.outboard.iter());
        self.unreadable = self.unreadable.or(other.unreadable);
        self
    }
}

/// Reads all of `blob`, whose size is `size`, and tells exactly which chunk groups and which pairs of its
/// outboard are damaged. Runs on rayon's threads; `progress` hears how many more bytes have been judged.
///
/// Data is not blamed for its tree. Where a stored pair is wrong, the right one is sought among what the pair
/// itself, the pairs below it and the data say; only where none of these fits, and therefore both the pair
/// and something below it on the same side are damaged, all bytes below count as damaged, since nothing here
/// can prove them.
pub fn find_damage<D, O>(blob: BlobId, size: u64, data: &D, outboard: &O, progress: &(dyn Fn(u64) + Sync)) -> Damage
where
    D: ReadAt + ?Sized,
    O: ReadAt + ?Sized,
{
    let search = Search { data, outboard, progress };
    search.descend(Subtree::root(Geometry::new(size)), *blob.as_bytes())
}

struct Search<'a, D: ?Sized, O: ?Sized> {
    data: &'a D,
    outboard: &'a O,
    progress: &'a (dyn Fn(u64) + Sync),
}

impl<D: ReadAt + ?Sized, O: ReadAt + ?Sized> Search<'_, D, O> {
    /// Judges a subtree that must have the hash `expected`, by its stored pairs down to what one task reads.
    fn descend(&self, subtree: Subtree, expected: Cv) -> Damage {
        if subtree.groups() > TASK_GROUPS {
            return self.split(subtree, expected, &|subtree, expected| self.descend(subtree, expected));
        }
        let damage = self.judge(subtree, expected);
        (self.progress)(subtree.bytes().len());
        damage
    }

    /// Judges a subtree that one task can read: by its data first.
    fn judge(&self, subtree: Subtree, expected: Cv) -> Damage {
        match self.data_cv(subtree) {
            Ok(cv) if cv == expected => self.judge_pairs(subtree, expected),
            outcome if subtree.groups() == 1 => {
                Damage { data: subtree.bytes().into(), unreadable: outcome.err(), ..Damage::default() }
            }
            _ => self.split(subtree, expected, &|subtree, expected| self.judge(subtree, expected)),
        }
    }

    /// Judges the stored pairs of a subtree whose data is sound.
    fn judge_pairs(&self, subtree: Subtree, expected: Cv) -> Damage {
        if subtree.groups() == 1 {
            return Damage::default();
        }
        self.split(subtree, expected, &|subtree, expected| self.judge_pairs(subtree, expected))
    }

    /// Judges both sides, and the pair above them.
    fn split(&self, subtree: Subtree, expected: Cv, judge: &(dyn Fn(Subtree, Cv) -> Damage + Sync)) -> Damage {
        let stored = self.stored_pair(subtree);
        let (outboard, below) = match self.right_pair(subtree, expected, stored) {
            Some(pair) => {
                let ((l, r), (left, right)) = (subtree.split(), split(&pair));
                let (left, right) = rayon::join(|| judge(l, left), || judge(r, right));
                (stored != Some(pair), left.merge(right))
            }
            None => (true, Damage { data: subtree.bytes().into(), ..Damage::default() }),
        };
        let outboard = if outboard { subtree.bytes().into() } else { RangeSet::new() };
        Damage { outboard, ..Damage::default() }.merge(below)
    }

    /// The pair that has the hash `expected`, from whatever source has it; the dearest source is asked last.
    fn right_pair(&self, subtree: Subtree, expected: Cv, stored: Option<Pair>) -> Option<Pair> {
        let (l, r) = subtree.split();
        let (mut lefts, mut rights): (Vec<Cv>, Vec<Cv>) = stored.iter().map(split).unzip();
        let sources: [&dyn Fn(Subtree) -> Option<Cv>; 3] =
            [&|_| None, &|side| self.cv_from_pair_below(side), &|side| self.data_cv(side).ok()];
        for source in sources {
            lefts.extend(source(l));
            rights.extend(source(r));
            let pairs = lefts.iter().flat_map(|&left| rights.iter().map(move |&right| join(left, right)));
            if let Some(pair) = pairs.into_iter().find(|pair| parent_cv(pair, subtree.is_root()) == expected) {
                return Some(pair);
            }
        }
        None
    }

    fn stored_pair(&self, subtree: Subtree) -> Option<Pair> {
        let mut pair = [0; 64];
        let index = subtree.pair_index()?;
        self.outboard.read_exact_at(&mut pair, index * PAIR_BYTES).ok()?;
        Some(pair)
    }

    fn cv_from_pair_below(&self, subtree: Subtree) -> Option<Cv> {
        Some(parent_cv(&self.stored_pair(subtree)?, subtree.is_root()))
    }

    fn data_cv(&self, subtree: Subtree) -> io::Result<Cv> {
        if subtree.groups() <= TASK_GROUPS {
            return with_bytes(self.data, subtree.bytes(), |bytes| subtree_cv(bytes, subtree.start, subtree.is_root()));
        }
        let (l, r) = subtree.split();
        let (left, right) = rayon::join(|| self.data_cv(l), || self.data_cv(r));
        Ok(parent_cv(&join(left?, right?), subtree.is_root()))
    }
}
