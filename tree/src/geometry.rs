use crate::range::{ByteRange, RangeSet};

/// Bytes in a chunk, BLAKE3's leaf.
pub const CHUNK_BYTES: u64 = 1024;

/// Bytes in a chunk group: the unit of proof, of fetching and of damage.
pub const GROUP_BYTES: u64 = 16 * CHUNK_BYTES;

/// Chunks in a chunk group.
pub(crate) const GROUP_CHUNKS: u64 = GROUP_BYTES / CHUNK_BYTES;

/// Bytes in a hash pair, the unit of an outboard.
pub(crate) const PAIR_BYTES: u64 = 64;

/// The shape of the tree over a blob of a given size. The size alone decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
}

impl Geometry {
    /// The shape for a blob of `size` bytes.
    pub const fn new(size: u64) -> Self {
        Self { size }
    }

    /// The blob's size in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// How many chunks there are: at least 1, for the empty blob is one empty chunk.
    pub const fn chunks(&self) -> u64 {
        if self.size == 0 { 1 } else { self.size.div_ceil(CHUNK_BYTES) }
    }

    /// How many chunk groups there are: at least 1.
    pub const fn groups(&self) -> u64 {
        self.chunks().div_ceil(GROUP_CHUNKS)
    }

    /// How many bytes the blob's outboard has: 64 for each inner node, 0 up to one chunk group.
    pub const fn outboard_bytes(&self) -> u64 {
        (self.groups() - 1) * PAIR_BYTES
    }

    /// All bytes of the blob.
    pub fn all(&self) -> ByteRange {
        ByteRange { start: 0, end: self.size }
    }

    /// The last chunk group: the one whose proof is also a proof of the blob's size.
    pub fn last_group(&self) -> ByteRange {
        ByteRange { start: (self.groups() - 1) * GROUP_BYTES, end: self.size }
    }

    /// `range` widened to whole chunk groups and cut to the blob.
    pub fn round_out(&self, range: ByteRange) -> ByteRange {
        if range.is_empty() {
            return ByteRange::default();
        }
        let start = range.start / GROUP_BYTES * GROUP_BYTES;
        let end = range.end.checked_next_multiple_of(GROUP_BYTES).unwrap_or(u64::MAX).min(self.size);
        ByteRange { start: start.min(end), end }
    }

    /// Every range of `ranges`, widened to whole chunk groups and cut to the blob.
    pub fn round_out_all(&self, ranges: &RangeSet) -> RangeSet {
        ranges.iter().map(|range| self.round_out(range)).collect()
    }
}

/// A subtree, in chunks, and where the pair of its top node is in the outboard.
///
/// `index` counts pairs in pre-order: the left child's pair follows its parent's, and the right child's
/// follows those of the whole left side, of which there is one less than it has chunk groups. Below chunk
/// groups there are no pairs in the outboard, and `index` means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subtree {
    pub(crate) start: u64,
    pub(crate) end: u64,
    index: u64,
    size: u64,
}

impl Subtree {
    pub(crate) fn root(geometry: Geometry) -> Self {
        Self { start: 0, end: geometry.chunks(), index: 0, size: geometry.size }
    }

    pub(crate) fn chunks(&self) -> u64 {
        self.end - self.start
    }

    pub(crate) fn groups(&self) -> u64 {
        self.chunks().div_ceil(GROUP_CHUNKS)
    }

    pub(crate) fn is_root(&self) -> bool {
        self.start == 0 && self.end == Geometry::new(self.size).chunks()
    }

    /// Which pair of the outboard belongs to the top node; `None` for a chunk group and what is below one.
    pub(crate) fn pair_index(&self) -> Option<u64> {
        (self.chunks() > GROUP_CHUNKS).then_some(self.index)
    }

    pub(crate) fn bytes(&self) -> ByteRange {
        ByteRange { start: self.start * CHUNK_BYTES, end: self.end.saturating_mul(CHUNK_BYTES).min(self.size) }
    }

    /// The two sides; the left one is the largest whole tree that leaves something for the right.
    ///
    /// There must be more than one chunk.
    pub(crate) fn split(&self) -> (Self, Self) {
        debug_assert!(self.chunks() > 1, "a chunk has no children");
        let left_chunks = self.chunks().next_power_of_two() / 2;
        let mid = self.start + left_chunks;
        let left = Self { end: mid, index: self.index + 1, ..*self };
        let right = Self { start: mid, index: self.index + left.groups(), ..*self };
        (left, right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_at_the_edges() {
        for (size, chunks, groups, outboard) in [
            (0, 1, 1, 0),
            (1, 1, 1, 0),
            (1024, 1, 1, 0),
            (1025, 2, 1, 0),
            (16384, 16, 1, 0),
            (16385, 17, 2, 64),
            (1 << 40, 1 << 30, 1 << 26, ((1 << 26) - 1) * 64),
        ] {
            let geometry = Geometry::new(size);
            assert_eq!((geometry.chunks(), geometry.groups(), geometry.outboard_bytes()), (chunks, groups, outboard));
        }
        let geometry = Geometry::new(40_000);
        assert_eq!(geometry.last_group(), ByteRange { start: 32768, end: 40_000 });
        assert_eq!(geometry.round_out(ByteRange { start: 16383, end: 16385 }), ByteRange { start: 0, end: 32768 });
        assert_eq!(geometry.round_out(ByteRange { start: 39_999, end: u64::MAX }), geometry.last_group());
        assert!(geometry.round_out(ByteRange { start: 50_000, end: 60_000 }).is_empty());
        assert_eq!(Geometry::new(u64::MAX).last_group().end, u64::MAX);
    }
}
