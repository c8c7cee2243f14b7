use crate::{
    geometry::{CHUNK_BYTES, GROUP_CHUNKS, Geometry, Subtree},
    query::Query,
    range::{ByteRange, RangeSet},
};

/// One step down a tree: what the answer to a query holds next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The pair of this subtree's top node; then comes what is asked for of its left, then of its right side.
    Node { subtree: Subtree, left: bool, right: bool },
    /// All bytes of this subtree, which is at most a chunk group.
    Leaf { subtree: Subtree },
}

/// The steps of the answer to a query, in the order of the wire: pre-order, left before right.
///
/// Prover and decoder both follow it, and so agree. Subtrees of which nothing is asked are left out; those of
/// at most a chunk group that are asked for whole are one leaf; all others are split, down to chunks.
#[derive(Debug)]
pub(crate) struct Walk {
    chunks: RangeSet,
    stack: Vec<Subtree>,
    /// How many entries of the stack are children of the node that was last yielded.
    children: usize,
}

impl Walk {
    pub(crate) fn new(geometry: Geometry, query: &Query) -> Self {
        let chunks = query.resolve(geometry);
        let stack = if chunks.is_empty() { Vec::new() } else { vec![Subtree::root(geometry)] };
        Self { chunks, stack, children: 0 }
    }

    /// Leaves out everything below the node that was last yielded.
    pub(crate) fn skip_children(&mut self) {
        self.stack.truncate(self.stack.len() - self.children);
        self.children = 0;
    }

    /// How far the bytes asked for go on from `offset` without a gap.
    pub(crate) fn run_end(&self, offset: u64, size: u64) -> u64 {
        let chunk = offset / CHUNK_BYTES;
        let run = self.chunks.first_ending_after(chunk).filter(|range| range.start <= chunk);
        run.map_or(offset, |range| range.end.saturating_mul(CHUNK_BYTES).min(size))
    }
}

impl Iterator for Walk {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let subtree = self.stack.pop()?;
        self.children = 0;
        let chunks = |s: &Subtree| ByteRange { start: s.start, end: s.end };
        let whole = subtree.chunks() <= GROUP_CHUNKS && self.chunks.contains(chunks(&subtree));
        if whole || subtree.chunks() == 1 {
            return Some(Step::Leaf { subtree });
        }
        let (l, r) = subtree.split();
        let (left, right) = (self.chunks.overlaps(chunks(&l)), self.chunks.overlaps(chunks(&r)));
        for (wanted, child) in [(right, r), (left, l)] {
            if wanted {
                self.stack.push(child);
                self.children += 1;
            }
        }
        Some(Step::Node { subtree, left, right })
    }
}
