use std::io;

use crate::{
    bulk::hash_block,
    cv::{Cv, Pair, join, parent_cv, split},
    geometry::{Geometry, Grain, PAIR_BYTES, Subtree},
    hash::{TASK_BYTES, hash_subtree, with_bytes},
    id::BlobId,
    range::{ByteRange, RangeSet},
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
/// itself, the pair below each side and the data of each side say. Only where none of these fits, and therefore
/// the pair and something below it on the same side are damaged, all bytes below count as damaged.
///
/// Reads sound data with a sound outboard once, and with a wrong one twice for each 16 GiB and its halves above.
pub fn find_damage<D, O>(blob: BlobId, size: u64, data: &D, outboard: &O, progress: &(dyn Fn(u64) + Sync)) -> Damage
where
    D: ReadAt + ?Sized,
    O: ReadAt + ?Sized,
{
    DamageSearch::new(blob, size, data, outboard).run(progress)
}

/// A search for damage as [`find_damage`] makes it, of a part of a blob, or by a coarser outboard.
pub struct DamageSearch<'a, D: ?Sized, O: ?Sized> {
    blob: BlobId,
    geometry: Geometry,
    data: &'a D,
    outboard: &'a O,
    grain: Grain,
    within: ByteRange,
}

impl<'a, D: ReadAt + ?Sized, O: ReadAt + ?Sized> DamageSearch<'a, D, O> {
    /// A search of all of `blob`, whose size is `size`, by an outboard down to chunk groups.
    pub fn new(blob: BlobId, size: u64, data: &'a D, outboard: &'a O) -> Self {
        let geometry = Geometry::new(size);
        Self { blob, geometry, data, outboard, grain: Grain::GROUP, within: geometry.all() }
    }

    /// By an outboard that is kept down to `grain` only: damaged data is found in units of that.
    pub fn with_grain(self, grain: Grain) -> Self {
        Self { grain, ..self }
    }

    /// Only of `range`, widened to whole units of 1 MiB. Pairs that have none of it below them are not looked at.
    pub fn within(self, range: ByteRange) -> Self {
        Self { within: range, ..self }
    }

    /// The bytes that the search judges.
    pub fn judged(&self) -> ByteRange {
        let within = self.within.intersection(self.geometry.all());
        if within.is_empty() {
            return ByteRange::default();
        }
        let end = within.end.checked_next_multiple_of(TASK_BYTES).unwrap_or(u64::MAX).min(self.geometry.size());
        ByteRange { start: within.start / TASK_BYTES * TASK_BYTES, end }
    }

    /// Searches. `progress` hears how many more bytes have been judged.
    pub fn run(&self, progress: &(dyn Fn(u64) + Sync)) -> Damage {
        if self.within.is_empty() && self.geometry.size() > 0 {
            return Damage::default();
        }
        let &DamageSearch { blob, geometry, data, outboard, grain, within } = self;
        let search = Search { data, outboard, grain, within, progress };
        search.descend(Subtree::root(geometry), *blob.as_bytes())
    }
}

struct Search<'a, D: ?Sized, O: ?Sized> {
    data: &'a D,
    outboard: &'a O,
    grain: Grain,
    within: ByteRange,
    progress: &'a (dyn Fn(u64) + Sync),
}

impl<D: ReadAt + ?Sized, O: ReadAt + ?Sized> Search<'_, D, O> {
    /// Judges a subtree that must have the hash `expected`, by its stored pairs down to what one task reads.
    fn descend(&self, subtree: Subtree, expected: Cv) -> Damage {
        if subtree.bytes().intersection(self.within).is_empty() && !subtree.is_root() {
            return Damage::default();
        }
        if subtree.bytes().len() <= TASK_BYTES {
            let damage = self.judge(subtree, expected);
            (self.progress)(subtree.bytes().len());
            return damage;
        }
        match self.stored_pair(subtree).filter(|pair| parent_cv(pair, subtree.is_root()) == expected) {
            Some(pair) => self.both(subtree, &pair, &|subtree, expected| self.descend(subtree, expected)),
            None => self.below_wrong_pair(subtree, expected, &|subtree, expected| self.descend(subtree, expected)),
        }
    }

    /// Judges a subtree that one task can read: by its data first.
    fn judge(&self, subtree: Subtree, expected: Cv) -> Damage {
        let judge = |subtree, expected| self.judge(subtree, expected);
        match self.data_cv(subtree) {
            Ok(cv) if cv == expected && self.pairs_prove(subtree, expected) => Damage::default(),
            outcome if self.is_leaf(subtree) => {
                Damage { data: subtree.bytes().into(), unreadable: outcome.err(), ..Damage::default() }
            }
            _ => match self.stored_pair(subtree).filter(|pair| parent_cv(pair, subtree.is_root()) == expected) {
                Some(pair) => self.both(subtree, &pair, &judge),
                None => self.below_wrong_pair(subtree, expected, &judge),
            },
        }
    }

    /// Whether the stored pairs of a subtree prove, all the way down.
    fn pairs_prove(&self, subtree: Subtree, expected: Cv) -> bool {
        if self.is_leaf(subtree) {
            return true;
        }
        let Some(pair) = self.stored_pair(subtree).filter(|pair| parent_cv(pair, subtree.is_root()) == expected) else {
            return false;
        };
        let ((l, r), (left, right)) = (subtree.split(), split(&pair));
        self.pairs_prove(l, left) && self.pairs_prove(r, right)
    }

    fn both(&self, subtree: Subtree, pair: &Pair, judge: &Judge<'_>) -> Damage {
        let ((l, r), (left, right)) = (subtree.split(), split(pair));
        let (left, right) = rayon::join(|| judge(l, left), || judge(r, right));
        left.merge(right)
    }

    /// Judges a subtree whose stored top pair is wrong.
    fn below_wrong_pair(&self, subtree: Subtree, expected: Cv, judge: &Judge<'_>) -> Damage {
        if let Some(damage) = self.compare_with_data(subtree, expected) {
            return damage;
        }
        let wrong_here = Damage { outboard: subtree.bytes().into(), ..Damage::default() };
        match self.seek_pair(subtree, expected) {
            Ok(pair) => wrong_here.merge(self.both(subtree, &pair, judge)),
            Err(unreadable) => {
                if subtree.bytes().len() > TASK_BYTES {
                    (self.progress)(subtree.bytes().len());
                }
                wrong_here.merge(Damage { data: subtree.bytes().into(), unreadable, ..Damage::default() })
            }
        }
    }

    /// If the data of a subtree is sound, which of its stored pairs are not what the data says. `None` if it is not
    /// sound, or so large that its pairs would take too much memory.
    fn compare_with_data(&self, subtree: Subtree, expected: Cv) -> Option<Damage> {
        if subtree.groups() > COMPARED_GROUPS_MAX {
            return None;
        }
        let mut right = vec![0; (subtree.pairs(self.grain) * PAIR_BYTES) as usize];
        if hash_subtree(self.data, subtree, self.grain, &mut right).ok()? != expected {
            return None;
        }
        let mut outboard = RangeSet::new();
        let mut pending = vec![(subtree, &right[..])];
        while let Some((subtree, pairs)) = pending.pop() {
            let Some((pair, below)) = pairs.split_first_chunk::<{ PAIR_BYTES as usize }>() else { continue };
            if self.stored_pair(subtree) != Some(*pair) {
                outboard.insert(subtree.bytes());
            }
            let (l, r) = subtree.split();
            let (left, right) = below.split_at((l.pairs(self.grain) * PAIR_BYTES) as usize);
            pending.extend([(l, left), (r, right)]);
        }
        if subtree.bytes().len() > TASK_BYTES {
            (self.progress)(subtree.bytes().len());
        }
        Some(Damage { outboard, ..Damage::default() })
    }

    /// The pair that has the hash `expected`, from whatever source has it; the dearest source is asked last. If none
    /// has it, the error of reading the data, if there was one.
    fn seek_pair(&self, subtree: Subtree, expected: Cv) -> Result<Pair, Option<io::Error>> {
        let (l, r) = subtree.split();
        let (mut lefts, mut rights): (Vec<Cv>, Vec<Cv>) = self.stored_pair(subtree).iter().map(split).unzip();
        let fitting = |lefts: &[Cv], rights: &[Cv]| {
            let mut pairs = lefts.iter().flat_map(|&left| rights.iter().map(move |&right| join(left, right)));
            pairs.find(|pair| parent_cv(pair, subtree.is_root()) == expected)
        };
        let below = |side| self.stored_pair(side).map(|pair| parent_cv(&pair, false));
        lefts.extend(below(l));
        rights.extend(below(r));
        if let Some(pair) = fitting(&lefts, &rights) {
            return Ok(pair);
        }
        let (left, right) = rayon::join(|| self.data_cv(l), || self.data_cv(r));
        lefts.extend(left.as_ref().ok());
        rights.extend(right.as_ref().ok());
        fitting(&lefts, &rights).ok_or(left.err().or(right.err()))
    }

    /// Whether the outboard keeps nothing below this subtree's hash.
    fn is_leaf(&self, subtree: Subtree) -> bool {
        subtree.pairs(self.grain) == 0
    }

    fn stored_pair(&self, subtree: Subtree) -> Option<Pair> {
        let mut pair = [0; 64];
        let index = subtree.pair_index(self.grain)?;
        self.outboard.read_exact_at(&mut pair, index * PAIR_BYTES).ok()?;
        Some(pair)
    }

    fn data_cv(&self, subtree: Subtree) -> io::Result<Cv> {
        if subtree.bytes().len() <= TASK_BYTES {
            return with_bytes(self.data, subtree.bytes(), |bytes| hash_block(bytes, subtree, Grain::NOTHING, &mut []));
        }
        let (l, r) = subtree.split();
        let (left, right) = rayon::join(|| self.data_cv(l), || self.data_cv(r));
        Ok(parent_cv(&join(left?, right?), subtree.is_root()))
    }
}

/// Judges a subtree that must have a certain hash.
type Judge<'a> = dyn Fn(Subtree, Cv) -> Damage + Sync + 'a;

/// The pairs of 16 GiB of data take 64 MiB.
const COMPARED_GROUPS_MAX: u64 = 1 << 20;
