use std::collections::VecDeque;

use crate::{
    cv::{Cv, parent_cv, split},
    geometry::{Geometry, Grain, Subtree},
    id::BlobId,
    range::{ByteRange, RangeSet},
};

/// Why a comparison cannot go on with the pairs that it was given. It stands where it was: others may be tried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompareError {
    /// The pair said to be of our tree does not have the hash that our tree says.
    #[error("our tree has another pair above bytes {range}")]
    Ours {
        /// The bytes below the pair.
        range: ByteRange,
    },
    /// The pair said to be of their tree does not have the hash that their tree says.
    #[error("their tree has another pair above bytes {range}")]
    Theirs {
        /// The bytes below the pair.
        range: ByteRange,
    },
}

/// Finds where two trees over equally many bytes differ, by looking only at nodes above a difference.
///
/// Neither tree need be here: what is needed of them is asked for, node by node, and proven when it comes. Calling
/// order: [`wanted`](Self::wanted) names nodes; [`descend`](Self::descend) takes the pairs that both trees have
/// there; and so on until nothing is wanted. With k chunk groups that differ among n, at most k · log n pairs of each
/// tree are asked for. Memory grows with what is asked for at a time, times the depth of the tree; with
/// [`highest_first`](Self::highest_first), with all that was asked for.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Subtrees that differ: their hashes in our tree and in theirs. The next ones are at the end.
    pending: VecDeque<(Subtree, Cv, Cv)>,
    differing: RangeSet,
    within: RangeSet,
    highest_first: bool,
}

impl Comparison {
    /// Of the trees of two blobs that both have `size` bytes.
    pub fn new(size: u64, ours: BlobId, theirs: BlobId) -> Self {
        Self::within(size, ours, theirs, Geometry::new(size).all().into())
    }

    /// The same, where only differences in `within` matter: subtrees without any of it are not looked into, and count
    /// as differing if they do.
    pub fn within(size: u64, ours: BlobId, theirs: BlobId, within: RangeSet) -> Self {
        let (pending, differing) = (VecDeque::new(), RangeSet::new());
        let mut comparison = Self { pending, differing, within, highest_first: false };
        comparison.push(Subtree::root(Geometry::new(size)), *ours.as_bytes(), *theirs.as_bytes());
        comparison
    }

    /// Looks at all nodes of a level before those below, so that much is known wherever one stops.
    pub fn highest_first(mut self) -> Self {
        self.highest_first = true;
        self
    }

    /// The nodes whose pairs are to come next, at most `max`, by their number in pre-order; none at the end.
    pub fn wanted(&self, max: usize) -> Vec<u64> {
        let next = self.pending.iter().rev().take(max);
        next.map(|(subtree, ..)| subtree.pair_index(Grain::GROUP).expect("what has no pair is not pending")).collect()
    }

    /// Takes what our tree and theirs have at the nodes that were wanted, in that order: at all, or at the first few.
    pub fn descend(&mut self, pairs: &[([u8; 64], [u8; 64])]) -> Result<(), CompareError> {
        let pairs = &pairs[..pairs.len().min(self.pending.len())];
        for (&(subtree, ours, theirs), (our_pair, their_pair)) in self.pending.iter().rev().zip(pairs) {
            let range = subtree.bytes();
            if parent_cv(our_pair, subtree.is_root()) != ours {
                return Err(CompareError::Ours { range });
            }
            if parent_cv(their_pair, subtree.is_root()) != theirs {
                return Err(CompareError::Theirs { range });
            }
        }
        let taken = self.pending.split_off(self.pending.len() - pairs.len());
        for ((subtree, ..), (our_pair, their_pair)) in taken.into_iter().zip(pairs.iter().rev()) {
            let ((l, r), ours, theirs) = (subtree.split(), split(our_pair), split(their_pair));
            self.push(r, ours.1, theirs.1);
            self.push(l, ours.0, theirs.0);
        }
        Ok(())
    }

    /// The chunk groups found to differ so far.
    pub fn differing(&self) -> &RangeSet {
        &self.differing
    }

    /// The bytes in which there are more: below every node of these there is a difference.
    pub fn undecided(&self) -> RangeSet {
        self.pending.iter().map(|(subtree, ..)| subtree.bytes()).collect()
    }

    fn push(&mut self, subtree: Subtree, ours: Cv, theirs: Cv) {
        if ours == theirs {
            return;
        }
        match subtree.groups() {
            1 => self.differing.insert(subtree.bytes()),
            _ if !self.within.overlaps(subtree.bytes()) => self.differing.insert(subtree.bytes()),
            _ if self.highest_first => self.pending.push_front((subtree, ours, theirs)),
            _ => self.pending.push_back((subtree, ours, theirs)),
        }
    }
}
