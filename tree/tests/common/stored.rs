//! A blob on a disk that is not what it was: flipped bits, cut files, sectors that cannot be read.

use std::{io, ops::Range, sync::LazyLock};

use proptest::{prelude::*, sample::Index};
use tree::{ByteRange, Hashed, RangeSet, ReadAt};

use super::{CHUNK, GROUP, data, range};

/// From no byte over the borders of one task, which reads 1 MiB, to several tasks.
pub(crate) const SIZES: [usize; 13] = [
    0,
    1,
    GROUP,
    GROUP + 1,
    3 * GROUP - 7,
    4 * GROUP,
    7 * GROUP + CHUNK,
    13 * GROUP + 3,
    (1 << 20) - 1,
    1 << 20,
    (1 << 20) + 1,
    (3 << 20) + 5,
    5 << 20,
];

pub(crate) fn a_blob() -> impl Strategy<Value = usize> {
    0..SIZES.len()
}

static BLOBS: LazyLock<Vec<(Vec<u8>, Hashed)>> = LazyLock::new(|| {
    let blob = |size: usize| {
        let data = data(size as u64, size);
        let hashed = tree::hash(&data[..], size as u64).unwrap();
        (data, hashed)
    };
    SIZES.map(blob).into()
});

/// What is on a disk where a blob should be. Reading it fails as a whole if it touches what is unreadable.
pub(crate) struct Stored {
    pub(crate) sound: &'static [u8],
    pub(crate) hashed: &'static Hashed,
    pub(crate) data: Vec<u8>,
    pub(crate) outboard: Vec<u8>,
    pub(crate) unreadable_groups: Vec<usize>,
    pub(crate) unreadable_pairs: Vec<usize>,
}

impl Stored {
    /// The blob that has [`SIZES`]`[blob]` bytes, sound.
    pub(crate) fn sound(blob: usize) -> Self {
        let (sound, hashed) = &BLOBS[blob];
        let (data, outboard) = (sound.clone(), hashed.outboard.clone());
        Self { sound, hashed, data, outboard, unreadable_groups: Vec::new(), unreadable_pairs: Vec::new() }
    }

    pub(crate) fn size(&self) -> usize {
        self.sound.len()
    }

    pub(crate) fn groups(&self) -> usize {
        self.size().div_ceil(GROUP).max(1)
    }

    pub(crate) fn bytes(&self, groups: &Range<usize>) -> ByteRange {
        range(groups.start * GROUP, (groups.end * GROUP).min(self.size()))
    }

    pub(crate) fn group_is_sound(&self, group: usize) -> bool {
        let at = self.bytes(&(group..group + 1));
        let at = at.start() as usize..at.end() as usize;
        at.is_empty() || self.data.get(at.clone()) == Some(&self.sound[at]) && !self.unreadable_groups.contains(&group)
    }

    pub(crate) fn damaged_groups(&self) -> RangeSet {
        let damaged = (0..self.groups()).filter(|&group| !self.group_is_sound(group));
        damaged.map(|group| self.bytes(&(group..group + 1))).collect()
    }

    /// Whether the left half, 0, or the right one, 1, of a pair of the outboard is there and right.
    pub(crate) fn half_is_right(&self, index: usize, half: usize) -> bool {
        let is_here = self.outboard.len() >= index * 64 + 64 && !self.unreadable_pairs.contains(&index);
        let at = index * 64 + half * 32..index * 64 + half * 32 + 32;
        is_here && self.outboard[at.clone()] == self.hashed.outboard[at]
    }

    pub(crate) fn pair_is_right(&self, index: usize) -> bool {
        self.half_is_right(index, 0) && self.half_is_right(index, 1)
    }

    /// Hears the groups below every pair, and where it is in the outboard.
    pub(crate) fn each_pair(&self, visit: &mut impl FnMut(&Range<usize>, usize)) {
        fn each(groups: Range<usize>, index: usize, visit: &mut impl FnMut(&Range<usize>, usize)) {
            if groups.len() > 1 {
                visit(&groups, index);
                for (side, top) in sides(&groups, index) {
                    each(side, top, visit);
                }
            }
        }
        each(0..self.groups(), 0, visit);
    }

    /// The bytes below the pairs that are not what they should be.
    pub(crate) fn below_wrong_pairs(&self) -> RangeSet {
        let mut below = RangeSet::new();
        self.each_pair(&mut |groups, index| {
            if !self.pair_is_right(index) {
                below.insert(self.bytes(groups));
            }
        });
        below
    }

    pub(crate) fn flip(&mut self, flips: &[Flip]) {
        for (group, byte, bits) in flips {
            let group = group.index(self.groups());
            let at = self.bytes(&(group..group + 1));
            if !at.is_empty() {
                self.data[at.start() as usize + byte.index(at.len() as usize)] ^= bits;
            }
        }
    }

    pub(crate) fn flip_pairs(&mut self, flips: &[Flip]) {
        let pairs = self.groups() - 1;
        for (pair, byte, bits) in flips.iter().filter(|_| pairs > 0) {
            self.outboard[pair.index(pairs) * 64 + byte.index(64)] ^= bits;
        }
    }

    pub(crate) fn make_groups_unreadable(&mut self, groups: &[Index]) {
        let groups = groups.iter().map(|group| group.index(self.groups()));
        self.unreadable_groups = groups.filter(|_| self.size() > 0).collect();
    }

    pub(crate) fn make_pairs_unreadable(&mut self, pairs: &[Index]) {
        let pairs = pairs.iter().filter(|_| self.groups() > 1).map(|pair| pair.index(self.groups() - 1));
        self.unreadable_pairs = pairs.collect();
    }

    pub(crate) fn stored_outboard(&self) -> StoredOutboard<'_> {
        StoredOutboard(self)
    }
}

impl ReadAt for Stored {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        read_disk("group", &self.data, GROUP, &self.unreadable_groups, buf, offset)
    }
}

pub(crate) struct StoredOutboard<'a>(&'a Stored);

impl ReadAt for StoredOutboard<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        read_disk("pair", &self.0.outboard, 64, &self.0.unreadable_pairs, buf, offset)
    }
}

fn read_disk(name: &str, file: &[u8], unit: usize, bad: &[usize], buf: &mut [u8], offset: u64) -> io::Result<()> {
    let touched = offset as usize / unit..(offset as usize + buf.len()).div_ceil(unit);
    match bad.iter().filter(|unit| touched.contains(unit)).min() {
        Some(unit) => Err(io::Error::other(format!("EIO in {name} {unit}"))),
        None => file.read_exact_at(buf, offset),
    }
}

/// Both sides of a node above `groups`, and where the pair at the top of each is in the outboard, if it has one.
pub(crate) fn sides(groups: &Range<usize>, index: usize) -> [(Range<usize>, usize); 2] {
    let left = groups.len().next_power_of_two() / 2;
    [(groups.start..groups.start + left, index + 1), (groups.start + left..groups.end, index + left)]
}

/// Where bits flip: in which group or pair, at which of its bytes, and which bits.
pub(crate) type Flip = (Index, Index, u8);

/// From one flip up to `max` - 1.
pub(crate) fn flips(max: usize) -> impl Strategy<Value = Vec<Flip>> {
    let flip = || (any::<Index>(), any::<Index>(), 1..=u8::MAX);
    prop_oneof![prop::collection::vec(flip(), 1..6.min(max)), prop::collection::vec(flip(), 1..max)]
}
