use std::io;

use bytes::Bytes;

use crate::{
    bulk::hash_block,
    cv::{Cv, Pair, join, parent_cv, split, subtree_cv},
    geometry::{Geometry, Grain, PAIR_BYTES, Subtree},
    id::BlobId,
    query::Query,
    range::ByteRange,
    read_at::ReadAt,
    verified::{Verified, VerifiedData, VerifiedNode},
    walk::{Step, Walk},
};

/// Why a range of a blob that is here could not be proven. What could, is still yielded.
#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    /// The bytes do not have the hash that the tree says.
    #[error("bytes {range} do not match the blob's tree")]
    Data {
        /// The bytes that cannot be proven.
        range: ByteRange,
    },
    /// The outboard's pair above these bytes is not the one that the tree above says, or cannot be read.
    #[error("the outboard above bytes {range} does not match the blob's tree")]
    Outboard {
        /// The bytes that cannot be proven.
        range: ByteRange,
    },
    /// The bytes cannot be read.
    #[error("read bytes {range}")]
    Read {
        /// The bytes that cannot be proven.
        range: ByteRange,
        /// What reading said.
        source: io::Error,
    },
}

impl ProveError {
    /// The bytes that could not be proven.
    pub fn range(&self) -> ByteRange {
        match self {
            Self::Data { range } | Self::Outboard { range } | Self::Read { range, .. } => *range,
        }
    }
}

/// Reads what a query asks of a blob that is here, with its proof, proving every piece before it is yielded.
///
/// The pieces come in the order of bao encoding, so that their [`wire_bytes`](Verified::wire_bytes), one after
/// the other behind the size as 8 little-endian bytes, are the answer to the query; and the data pieces alone,
/// in order, are the bytes asked for. After an error the iterator goes on behind the range that failed.
/// A reader of bytes skips the errors and knows what is missing; a sender goes on from another copy, or stops.
#[derive(Debug)]
pub struct Prover<D, O> {
    blob: BlobId,
    geometry: Geometry,
    data: ReadAhead<D>,
    outboard: PairReader<O>,
    walk: Walk,
    /// The hashes that the next subtrees must have, the next one on top.
    expected: Vec<Cv>,
    grain: Grain,
    /// The pairs down to chunk groups of the lowest subtree that the outboard knows, computed from the data.
    below_grain: Option<(Subtree, Vec<u8>)>,
}

impl<D: ReadAt, O: ReadAt> Prover<D, O> {
    /// Proves what `query` asks of `blob`, whose size is `size`, from its `data` and `outboard`.
    pub fn new(blob: BlobId, size: u64, data: D, outboard: O, query: &Query) -> Self {
        let geometry = Geometry::new(size);
        Self {
            blob,
            geometry,
            data: ReadAhead { data, start: 0, bytes: Bytes::new() },
            outboard: PairReader { outboard, outboard_bytes: geometry.outboard_bytes(), start: 0, bytes: Vec::new() },
            walk: Walk::new(geometry, query),
            expected: vec![*blob.as_bytes()],
            grain: Grain::GROUP,
            below_grain: None,
        }
    }

    /// The same, where the outboard is kept down to `grain` only. What is below is computed from the data; if that
    /// does not prove, [`ProveError::Data`] names all of the data below the lowest node that the outboard has.
    pub fn with_grain(mut self, grain: Grain) -> Self {
        self.grain = grain;
        self.outboard.outboard_bytes = self.geometry.outboard_bytes_at(grain);
        self
    }

    /// Reads `subtree`'s bytes; as far as more are asked for behind them, those are read in the same go.
    fn read(&mut self, subtree: Subtree) -> Result<Bytes, ProveError> {
        let range = subtree.bytes();
        let run_end = self.walk.run_end(range.start, self.geometry.size());
        self.data.read(range, run_end).map_err(|source| ProveError::Read { range, source })
    }

    /// The pair at the top of `subtree`: from the outboard, or, where that has none, from the data.
    fn pair(&mut self, subtree: Subtree) -> Result<Pair, ProveError> {
        let range = subtree.bytes();
        if let Some(index) = subtree.pair_index(self.grain) {
            return self.outboard.pair(index).map_err(|_| ProveError::Outboard { range });
        }
        if subtree.groups() > 1 {
            return self.pair_below_grain(subtree);
        }
        let bytes = self.read(subtree)?;
        let (l, r) = subtree.split();
        let (left, right) = bytes.split_at(l.bytes().len() as usize);
        Ok(join(subtree_cv(left, l.start, false), subtree_cv(right, r.start, false)))
    }

    /// The pair at the top of a subtree of several groups that the outboard knows nothing of. In pre-order, the first
    /// of these is always the topmost, from whose bytes all others are computed with it.
    fn pair_below_grain(&mut self, subtree: Subtree) -> Result<Pair, ProveError> {
        let range = subtree.bytes();
        let index = |subtree: Subtree| subtree.pair_index(Grain::GROUP).unwrap_or_default();
        let (top, pairs) = match self.below_grain.take() {
            Some(below) if below.0.start <= subtree.start && subtree.end <= below.0.end => below,
            _ => {
                let mut pairs = vec![0; (subtree.pairs(Grain::GROUP) * PAIR_BYTES) as usize];
                let bytes = self.data.read(range, range.end).map_err(|source| ProveError::Read { range, source })?;
                hash_block(&bytes, subtree, Grain::GROUP, &mut pairs);
                (subtree, pairs)
            }
        };
        let from = ((index(subtree) - index(top)) * PAIR_BYTES) as usize;
        let mut pair = [0; 64];
        pair.copy_from_slice(&pairs[from..from + 64]);
        self.below_grain = Some((top, pairs));
        Ok(pair)
    }

    fn node(&mut self, subtree: Subtree, left: bool, right: bool, expected: Cv) -> Result<Verified, ProveError> {
        let range = subtree.bytes();
        let stored = subtree.pair_index(self.grain).is_some();
        let checked = self.pair(subtree).and_then(|pair| match parent_cv(&pair, subtree.is_root()) {
            cv if cv == expected => Ok(pair),
            _ if stored => Err(ProveError::Outboard { range }),
            _ => Err(ProveError::Data { range }),
        });
        match checked {
            Ok(pair) => {
                let (l, r) = split(&pair);
                self.expected.extend(right.then_some(r));
                self.expected.extend(left.then_some(l));
                let index = subtree.pair_index(Grain::GROUP);
                Ok(Verified::Node(VerifiedNode { blob: self.blob, index, pair }))
            }
            Err(error) => {
                self.walk.skip_children();
                Err(error)
            }
        }
    }

    fn leaf(&mut self, subtree: Subtree, expected: Cv) -> Result<Verified, ProveError> {
        let bytes = self.read(subtree)?;
        let range = subtree.bytes();
        if subtree_cv(&bytes, subtree.start, subtree.is_root()) != expected {
            return Err(ProveError::Data { range });
        }
        Ok(Verified::Data(VerifiedData { blob: self.blob, offset: range.start, bytes }))
    }
}

impl<D: ReadAt, O: ReadAt> Iterator for Prover<D, O> {
    type Item = Result<Verified, ProveError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.walk.next()?;
        let expected = self.expected.pop().expect("a hash was kept for every subtree that is wanted");
        Some(match step {
            Step::Node { subtree, left, right } => self.node(subtree, left, right, expected),
            Step::Leaf { subtree } => self.leaf(subtree, expected),
        })
    }
}

/// Reads data in large pieces as long as they are wanted.
#[derive(Debug)]
struct ReadAhead<D> {
    data: D,
    start: u64,
    bytes: Bytes,
}

impl<D: ReadAt> ReadAhead<D> {
    /// The bytes at `range`, which is at most the coarsest grain; bytes up to `run_end` will be asked for next.
    fn read(&mut self, range: ByteRange, run_end: u64) -> io::Result<Bytes> {
        let held = ByteRange { start: self.start, end: self.start + self.bytes.len() as u64 };
        if held.intersection(range) != range {
            let end = run_end.min(range.start.saturating_add(READ_AHEAD_BYTES)).max(range.end);
            self.bytes = match self.fill(ByteRange { start: range.start, end }) {
                Ok(bytes) => bytes,
                // One bad sector must not hide its neighbours.
                Err(_) if end > range.end => self.fill(range)?,
                Err(error) => return Err(error),
            };
            self.start = range.start;
        }
        let from = (range.start - self.start) as usize;
        Ok(self.bytes.slice(from..from + range.len() as usize))
    }

    fn fill(&self, range: ByteRange) -> io::Result<Bytes> {
        let mut bytes = vec![0; range.len() as usize];
        self.data.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes.into())
    }
}

/// Reads pairs of an outboard, a page at a time, for they are wanted in nearly the order that they stand in.
#[derive(Debug)]
struct PairReader<O> {
    outboard: O,
    outboard_bytes: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl<O: ReadAt> PairReader<O> {
    fn pair(&mut self, index: u64) -> io::Result<Pair> {
        let offset = index * PAIR_BYTES;
        let held = self.start..self.start + self.bytes.len() as u64;
        if !held.contains(&offset) {
            let len = PAGE_BYTES.min(self.outboard_bytes - offset);
            // One bad pair must not hide its neighbours.
            self.fill(offset, len).or_else(|_| self.fill(offset, PAIR_BYTES))?;
        }
        let from = (offset - self.start) as usize;
        let mut pair = [0; 64];
        pair.copy_from_slice(&self.bytes[from..from + 64]);
        Ok(pair)
    }

    fn fill(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.start = offset;
        self.bytes.resize(len as usize, 0);
        self.outboard.read_exact_at(&mut self.bytes, offset).inspect_err(|_| self.bytes.clear())
    }
}

const READ_AHEAD_BYTES: u64 = 1 << 20;
const PAGE_BYTES: u64 = 4096;
