use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes from `start` up to, but without, `end`; never `start > end`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u64, u64)", into = "(u64, u64)")]
pub struct ByteRange {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl ByteRange {
    /// The range from `start` up to `end`; `None` if `start > end`.
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start <= end { Some(Self { start, end }) } else { None }
    }

    /// The first byte's offset.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// The offset behind the last byte.
    pub const fn end(&self) -> u64 {
        self.end
    }

    /// How many bytes there are.
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// What this range and `other` share; empty if they do not meet.
    pub fn intersection(&self, other: ByteRange) -> ByteRange {
        let start = self.start.max(other.start);
        ByteRange { start, end: self.end.min(other.end).max(start) }
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<ByteRange> for (u64, u64) {
    fn from(range: ByteRange) -> Self {
        (range.start, range.end)
    }
}

impl TryFrom<(u64, u64)> for ByteRange {
    type Error = &'static str;

    fn try_from((start, end): (u64, u64)) -> Result<Self, Self::Error> {
        Self::new(start, end).ok_or("a range ends before it starts")
    }
}

/// A set of offsets, kept as ascending, disjoint, non-empty ranges that do not touch.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<ByteRange>")]
pub struct RangeSet(Vec<ByteRange>);

impl RangeSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = ByteRange> + ExactSizeIterator + '_ {
        self.0.iter().copied()
    }

    /// How many bytes are in the set.
    pub fn total_bytes(&self) -> u64 {
        self.iter().map(|range| range.len()).sum()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The offset behind the last byte of the set; 0 if it is empty.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |range| range.end)
    }

    /// Whether all of `range` is in the set. The empty range is in every set.
    pub fn contains(&self, range: ByteRange) -> bool {
        range.is_empty()
            || self.first_ending_after(range.start).is_some_and(|r| r.start <= range.start && range.end <= r.end)
    }

    /// Whether any of `range` is in the set.
    pub fn overlaps(&self, range: ByteRange) -> bool {
        !range.is_empty() && self.first_ending_after(range.start).is_some_and(|r| r.start < range.end)
    }

    /// Adds `range`.
    pub fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        // Everything that overlaps or touches the new range is swallowed by it.
        let from = self.0.partition_point(|r| r.end < range.start);
        let to = self.0.partition_point(|r| r.start <= range.end);
        let swallowed = &self.0[from..to];
        let start = swallowed.first().map_or(range.start, |r| r.start.min(range.start));
        let end = swallowed.last().map_or(range.end, |r| r.end.max(range.end));
        self.0.splice(from..to, [ByteRange { start, end }]);
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let from = self.0.partition_point(|r| r.end <= range.start);
        let to = self.0.partition_point(|r| r.start < range.end);
        let Some((first, last)) = self.0[from..to].first().copied().zip(self.0[from..to].last().copied()) else {
            return;
        };
        let before = ByteRange { start: first.start, end: range.start.max(first.start) };
        let after = ByteRange { start: range.end.min(last.end), end: last.end };
        self.0.splice(from..to, [before, after].into_iter().filter(|r| !r.is_empty()));
    }

    /// What is in this set or in `other`.
    pub fn union(&self, other: &RangeSet) -> RangeSet {
        self.iter().chain(other.iter()).collect()
    }

    /// What is in this set and not in `other`.
    pub fn difference(&self, other: &RangeSet) -> RangeSet {
        let mut rest = self.clone();
        for range in other.iter() {
            rest.remove(range);
        }
        rest
    }

    /// What is in this set and in `other`.
    pub fn intersection(&self, other: &RangeSet) -> RangeSet {
        self.difference(&self.difference(other))
    }

    /// The only range that can hold `offset`, or else the first one behind it.
    pub(crate) fn first_ending_after(&self, offset: u64) -> Option<ByteRange> {
        self.0.get(self.0.partition_point(|r| r.end <= offset)).copied()
    }
}

impl fmt::Debug for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(&self.0).finish()
    }
}

impl From<ByteRange> for RangeSet {
    fn from(range: ByteRange) -> Self {
        Self::from_iter([range])
    }
}

impl From<Vec<ByteRange>> for RangeSet {
    fn from(ranges: Vec<ByteRange>) -> Self {
        ranges.into_iter().collect()
    }
}

impl FromIterator<ByteRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = ByteRange>>(ranges: I) -> Self {
        let mut set = Self::new();
        set.extend(ranges);
        set
    }
}

impl Extend<ByteRange> for RangeSet {
    fn extend<I: IntoIterator<Item = ByteRange>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const END: u64 = 40;

    fn a_range() -> impl Strategy<Value = ByteRange> {
        (0..END, 0..END).prop_map(|(a, b)| ByteRange { start: a.min(b), end: a.max(b) })
    }

    fn bits(set: &RangeSet) -> Vec<bool> {
        (0..END).map(|i| set.0.iter().any(|r| r.start <= i && i < r.end)).collect()
    }

    proptest! {
        /// Every operation against a set of single offsets.
        #[test]
        fn agrees_with_a_bit_set(steps in prop::collection::vec((any::<bool>(), a_range()), 0..30), probe in a_range()) {
            let mut set = RangeSet::new();
            let mut oracle = vec![false; END as usize];
            for (insert, range) in steps {
                if insert { set.insert(range) } else { set.remove(range) }
                oracle[range.start as usize..range.end as usize].fill(insert);
                prop_assert_eq!(&bits(&set), &oracle);
                prop_assert!(set.0.iter().all(|r| !r.is_empty()) && set.0.windows(2).all(|w| w[0].end < w[1].start));
            }
            let probed = &oracle[probe.start as usize..probe.end as usize];
            prop_assert_eq!(set.contains(probe), probed.iter().all(|&b| b));
            prop_assert_eq!(set.overlaps(probe), probed.iter().any(|&b| b));
            prop_assert_eq!(set.total_bytes(), oracle.iter().filter(|&&b| b).count() as u64);
        }

        #[test]
        fn algebra(a in prop::collection::vec(a_range(), 0..8), b in prop::collection::vec(a_range(), 0..8)) {
            let (a, b): (RangeSet, RangeSet) = (a.into(), b.into());
            let pairs = || bits(&a).into_iter().zip(bits(&b)).collect::<Vec<_>>();
            prop_assert_eq!(bits(&a.union(&b)), pairs().iter().map(|(a, b)| a | b).collect::<Vec<_>>());
            prop_assert_eq!(bits(&a.intersection(&b)), pairs().iter().map(|(a, b)| a & b).collect::<Vec<_>>());
            prop_assert_eq!(bits(&a.difference(&b)), pairs().iter().map(|(a, b)| a & !b).collect::<Vec<_>>());
        }
    }
}
