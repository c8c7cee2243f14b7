use crate::range::{ByteRange, RangeSet};

/// Bytes in a chunk, BLAKE3's leaf.
pub const CHUNK_BYTES: u64 = 1024;

/// Bytes in a chunk group: the unit of proof, of fetching and of damage.
pub const GROUP_BYTES: u64 = 16 * CHUNK_BYTES;

/// Chunks in a chunk group.
pub(crate) const GROUP_CHUNKS: u64 = GROUP_BYTES / CHUNK_BYTES;

/// Bytes in a hash pair, the unit of an outboard.
pub const PAIR_BYTES: u64 = 64;

/// How far down an outboard keeps the tree: how many bytes there are below the lowest nodes whose hashes it has.
///
/// The coarser, the smaller the outboard; what is below is computed from the bytes when it is needed. Proofs that
/// are sent go down to chunk groups whatever the grain of the outboard they were made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Grain {
    log_chunks: u8,
}

impl Grain {
    /// Chunk groups of 16 KiB: the tree as proofs need it.
    pub const GROUP: Self = Self { log_chunks: 4 };
    /// 64 KiB.
    pub const KIB_64: Self = Self { log_chunks: 6 };
    /// 256 KiB.
    pub const KIB_256: Self = Self { log_chunks: 8 };
    /// 1 MiB.
    pub const MIB_1: Self = Self { log_chunks: 10 };
    /// All that a store may keep its outboards at, from the finest to the coarsest.
    pub const ALL: [Self; 4] = [Self::GROUP, Self::KIB_64, Self::KIB_256, Self::MIB_1];
    /// No pair is kept at all.
    pub(crate) const NOTHING: Self = Self { log_chunks: 63 };

    /// The grain of `bytes`; `None` if it is none of [`ALL`](Self::ALL).
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|grain| grain.bytes() == bytes)
    }

    /// How many bytes are below one hash.
    pub const fn bytes(&self) -> u64 {
        self.chunks() * CHUNK_BYTES
    }

    /// The number in bao-tree's name for an outboard of this grain: 4 for `obao4`, and so on.
    pub const fn log_chunks(&self) -> u8 {
        self.log_chunks
    }

    pub(crate) const fn chunks(&self) -> u64 {
        1 << self.log_chunks
    }
}

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
        self.outboard_bytes_at(Grain::GROUP)
    }

    /// The same for an outboard that is kept down to `grain`.
    pub const fn outboard_bytes_at(&self, grain: Grain) -> u64 {
        (self.chunks().div_ceil(grain.chunks()) - 1) * PAIR_BYTES
    }

    /// The chunk that holds the byte at `offset`; the last one if there is no such byte.
    pub(crate) fn chunk_at(&self, offset: u64) -> u64 {
        (offset / CHUNK_BYTES).min(self.chunks() - 1)
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

/// A subtree, in chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subtree {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// How many nodes there are above it.
    pub(crate) depth: u64,
    size: u64,
}

impl Subtree {
    pub(crate) fn root(geometry: Geometry) -> Self {
        Self { start: 0, end: geometry.chunks(), depth: 0, size: geometry.size }
    }

    pub(crate) fn chunks(&self) -> u64 {
        self.end - self.start
    }

    pub(crate) fn groups(&self) -> u64 {
        self.chunks().div_ceil(GROUP_CHUNKS)
    }

    pub(crate) fn is_root(&self) -> bool {
        self.depth == 0
    }

    /// The subtree whose top pair is number `node` of an outboard down to chunk groups; `None` behind the last.
    pub(crate) fn at(geometry: Geometry, node: u64) -> Option<Self> {
        let mut subtree = Self::root(geometry);
        loop {
            let number = subtree.pair_index(Grain::GROUP)?;
            if number == node {
                return Some(subtree);
            }
            let (l, r) = subtree.split();
            // What is on the left comes first, and has a number less than it has groups.
            subtree = if node - number < l.groups() { l } else { r };
        }
    }

    /// How many pairs an outboard of this grain has for the nodes of this subtree.
    pub(crate) fn pairs(&self, grain: Grain) -> u64 {
        self.chunks().div_ceil(grain.chunks()) - 1
    }

    /// Which pair of an outboard of this grain belongs to the top node; `None` if it keeps none for it.
    ///
    /// In pre-order, what comes before a node is every node above it, and every node that lies wholly to its left.
    /// To the left of leaf `s` of a tree whose leaves are `grain` long stand `s` leaves in whole trees, one for each
    /// bit of `s`, and a whole tree has one node less than it has leaves.
    pub(crate) fn pair_index(&self, grain: Grain) -> Option<u64> {
        let leaf = self.start / grain.chunks();
        (self.chunks() > grain.chunks()).then(|| leaf - u64::from(leaf.count_ones()) + self.depth)
    }

    pub(crate) fn bytes(&self) -> ByteRange {
        ByteRange { start: self.start * CHUNK_BYTES, end: self.end.saturating_mul(CHUNK_BYTES).min(self.size) }
    }

    /// The two sides; the left one is the largest whole tree that leaves something for the right.
    ///
    /// There must be more than one chunk.
    pub(crate) fn split(&self) -> (Self, Self) {
        debug_assert!(self.chunks() > 1, "a chunk has no children");
        let mid = self.start + self.chunks().next_power_of_two() / 2;
        let depth = self.depth + 1;
        (Self { end: mid, depth, ..*self }, Self { start: mid, depth, ..*self })
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
