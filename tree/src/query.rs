use crate::{
    geometry::{CHUNK_BYTES, GROUP_BYTES, Geometry},
    range::{ByteRange, RangeSet},
};

/// Which chunks of a blob are asked for.
///
/// Chunks at or behind the last one stand for the last one: the answer then proves the blob's size, which
/// the asker need not know. This is the meaning that bao-tree gives to a request, and with it iroh-blobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    chunks: RangeSet,
}

impl Query {
    /// All chunks.
    pub fn all() -> Self {
        Self::chunks([(0, u64::MAX)])
    }

    /// The chunks from each `start` up to its `end`; pairs that end before they start count as empty.
    pub fn chunks(ranges: impl IntoIterator<Item = (u64, u64)>) -> Self {
        // What starts at the very end stands for the last chunk, and is not empty.
        let start_of = |start: u64, end| if end == u64::MAX { start.min(u64::MAX - 1) } else { start };
        let ranges = ranges.into_iter().filter_map(|(start, end)| ByteRange::new(start_of(start, end), end));
        Self { chunks: ranges.collect() }
    }

    /// The chunks that hold `ranges`.
    pub fn bytes(ranges: impl Into<RangeSet>) -> Self {
        let ranges: RangeSet = ranges.into();
        Self::chunks(ranges.iter().map(|range| (range.start / CHUNK_BYTES, range.end.div_ceil(CHUNK_BYTES))))
    }

    /// The chunk groups that hold `ranges`.
    pub fn groups(ranges: &RangeSet) -> Self {
        let per_group = GROUP_BYTES / CHUNK_BYTES;
        Self::chunks(
            ranges
                .iter()
                .map(|range| (range.start / GROUP_BYTES * per_group, range.end.div_ceil(GROUP_BYTES) * per_group)),
        )
    }

    /// This query, and besides the last chunk group of a blob of `size` bytes, which proves that size.
    pub fn and_size(mut self, size: u64) -> Self {
        let start = Geometry::new(size).last_group().start / CHUNK_BYTES;
        self.chunks.insert(ByteRange { start, end: u64::MAX });
        self
    }

    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The ranges of chunk numbers, ascending, half-open; `u64::MAX` stands for the end.
    pub fn chunk_ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.chunks.iter().map(|range| (range.start, range.end))
    }

    /// The chunks of a tree of this shape that the answer holds.
    pub(crate) fn resolve(&self, geometry: Geometry) -> RangeSet {
        let chunks = geometry.chunks();
        let mut set = self.chunks.clone();
        set.remove(ByteRange { start: chunks, end: u64::MAX });
        if self.chunks.end() >= chunks {
            set.insert(ByteRange { start: chunks - 1, end: chunks });
        }
        set
    }

    /// The bytes of a blob of `size` bytes that the answer holds.
    pub fn resolve_bytes(&self, size: u64) -> RangeSet {
        let end_of = |chunk: u64| chunk.saturating_mul(CHUNK_BYTES).min(size);
        self.resolve(Geometry::new(size))
            .iter()
            .map(|range| ByteRange { start: end_of(range.start), end: end_of(range.end) })
            .collect()
    }
}
