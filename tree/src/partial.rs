use std::{collections::BTreeMap, io};

use crate::{
    bulk::hash_block,
    cv::{Cv, Pair, parent_cv, split},
    geometry::{Geometry, Grain, PAIR_BYTES, Subtree},
    id::BlobId,
    range::{ByteRange, RangeSet},
    read_at::ReadAt,
};

/// Why a pair was not taken into a [`PartialTree`], which is as before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// The tree has no node of that number.
    #[error("the tree has no node {node}")]
    None {
        /// The number.
        node: u64,
    },
    /// Nothing is known of the node itself: those above it come first.
    #[error("node {node} came before the nodes above it")]
    TooSoon {
        /// The number.
        node: u64,
    },
    /// The pair does not have the hash that the tree above says.
    #[error("wrong pair above bytes {range}")]
    WrongHash {
        /// The bytes below the node.
        range: ByteRange,
    },
}

/// What is known of a blob's tree: its root at first, then every pair that was put in and proved.
///
/// Nodes have the numbers of their pairs in an outboard down to chunk groups.
#[derive(Debug, Clone)]
pub struct PartialTree {
    blob: BlobId,
    geometry: Geometry,
    pairs: BTreeMap<u64, Pair>,
}

impl PartialTree {
    /// Of `blob`, which has `size` bytes, just the root. A wrong size makes no pair prove.
    pub fn new(blob: BlobId, size: u64) -> Self {
        Self { blob, geometry: Geometry::new(size), pairs: BTreeMap::new() }
    }

    /// The blob's size in bytes.
    pub fn size(&self) -> u64 {
        self.geometry.size()
    }

    /// The pair at `node`, if it is known, or else if it and all unknown ones above it are in `data` and an `outboard` of
    /// that `grain`, and prove. They are known from then on.
    pub fn prove_node<D, O>(&mut self, node: u64, data: &D, outboard: &O, grain: Grain) -> Option<[u8; 64]>
    where
        D: ReadAt + ?Sized,
        O: ReadAt + ?Sized,
    {
        let wanted = Subtree::at(self.geometry, node)?;
        loop {
            let (lowest, expected) = self.lowest_known(wanted.start);
            if lowest.depth > wanted.depth {
                return self.pairs.get(&node).copied();
            }
            let pair = node_pair(self.size(), data, outboard, grain, number(lowest)).ok()?;
            if parent_cv(&pair, lowest.is_root()) != expected {
                return None;
            }
            self.pairs.insert(number(lowest), pair);
        }
    }

    /// Takes the nodes above `ranges` as far down as `outboard`, which is kept down to `grain`, has them and they
    /// prove. Tells whether all did.
    pub fn take_outboard<O: ReadAt + ?Sized>(&mut self, outboard: &O, grain: Grain, ranges: &RangeSet) -> bool {
        let mut all = true;
        self.each_above(ranges, &mut |tree, subtree, expected| {
            let Some(offset) = subtree.pair_index(grain).map(|index| index * PAIR_BYTES) else { return false };
            let mut pair = [0; 64];
            let proves =
                outboard.read_exact_at(&mut pair, offset).is_ok() && parent_cv(&pair, subtree.is_root()) == expected;
            all &= proves;
            if proves {
                tree.pairs.insert(number(subtree), pair);
            }
            proves
        });
        all
    }

    /// Takes the pair at `node`, whose own hash must be known by now.
    pub fn insert(&mut self, node: u64, pair: [u8; 64]) -> Result<(), NodeError> {
        let subtree = Subtree::at(self.geometry, node).ok_or(NodeError::None { node })?;
        let (lowest, expected) = self.lowest_known(subtree.start);
        // If more is known than this node, it was taken before.
        if lowest.depth < subtree.depth {
            return Err(NodeError::TooSoon { node });
        }
        let known = self.pairs.get(&node).map_or(expected, |known| parent_cv(known, subtree.is_root()));
        if parent_cv(&pair, subtree.is_root()) != known {
            return Err(NodeError::WrongHash { range: subtree.bytes() });
        }
        self.pairs.insert(node, pair);
        Ok(())
    }

    /// The nodes to ask for next, so that in the end every chunk group of `ranges` can be proven by itself: at most
    /// `max`, the leftmost of the highest that are not known. None are missing at the end.
    pub fn missing(&self, ranges: &RangeSet, max: usize) -> Vec<u64> {
        let mut missing = Vec::new();
        let mut pending = vec![Subtree::root(self.geometry)];
        while let Some(subtree) = pending.pop().filter(|_| missing.len() < max) {
            if subtree.groups() == 1 || !ranges.overlaps(subtree.bytes()) {
                continue;
            }
            if !self.pairs.contains_key(&number(subtree)) {
                missing.push(number(subtree));
                continue;
            }
            let (l, r) = subtree.split();
            pending.extend([r, l]);
        }
        missing
    }

    /// The smallest range around `offset` that can be proven, and only as a whole: what is below the lowest node
    /// whose hash is known. All of the blob if only the root is.
    pub fn provable(&self, offset: u64) -> ByteRange {
        self.lowest_known(self.geometry.chunk_at(offset)).0.bytes()
    }

    /// Those of the provable units in `ranges`, widened to whole ones, whose bytes in `data` do not prove or cannot
    /// be read. A unit above 1 MiB counts as one that does not: more of the tree must be known for it.
    pub fn find_damage<D: ReadAt + ?Sized>(&self, data: &D, ranges: &RangeSet) -> RangeSet {
        let mut damage = RangeSet::new();
        for range in ranges.iter() {
            let mut offset = range.start();
            while offset < range.end().min(self.geometry.size()) {
                let (unit, expected) = self.lowest_known(self.geometry.chunk_at(offset));
                let proves = unit.bytes().len() <= Grain::MIB_1.bytes() && {
                    let mut bytes = vec![0; unit.bytes().len() as usize];
                    data.read_exact_at(&mut bytes, unit.bytes().start()).is_ok()
                        && hash_block(&bytes, unit, Grain::NOTHING, &mut []) == expected
                };
                if !proves {
                    damage.insert(unit.bytes());
                }
                offset = unit.bytes().end();
            }
        }
        damage
    }

    /// The lowest subtree around a chunk whose hash is known, and that hash. No lower than a chunk group.
    fn lowest_known(&self, chunk: u64) -> (Subtree, Cv) {
        let (mut subtree, mut cv) = (Subtree::root(self.geometry), *self.blob.as_bytes());
        while let Some(pair) = (subtree.groups() > 1).then(|| self.pairs.get(&number(subtree))).flatten() {
            let ((l, r), (left, right)) = (subtree.split(), split(pair));
            (subtree, cv) = if chunk < l.end { (l, left) } else { (r, right) };
        }
        (subtree, cv)
    }

    /// Visits the nodes above `ranges` from the root down, with the hashes they must have, as long as `visit` says
    /// that it knows the pair.
    fn each_above(&mut self, ranges: &RangeSet, visit: &mut dyn FnMut(&mut Self, Subtree, Cv) -> bool) {
        let mut pending = vec![(Subtree::root(self.geometry), *self.blob.as_bytes())];
        while let Some((subtree, expected)) = pending.pop() {
            if subtree.groups() == 1 || !ranges.overlaps(subtree.bytes()) || !visit(self, subtree, expected) {
                continue;
            }
            let Some(pair) = self.pairs.get(&number(subtree)) else { continue };
            let ((l, r), (left, right)) = (subtree.split(), split(pair));
            pending.extend([(r, right), (l, left)]);
        }
    }
}

/// The pair at `node` of the tree over `size` bytes, from an outboard that is kept down to `grain`, or, below that,
/// from the data. It is not proven: whoever asked proves it. [`io::ErrorKind::InvalidInput`] if there is no such node.
pub fn node_pair<D, O>(size: u64, data: &D, outboard: &O, grain: Grain, node: u64) -> io::Result<[u8; 64]>
where
    D: ReadAt + ?Sized,
    O: ReadAt + ?Sized,
{
    let subtree = Subtree::at(Geometry::new(size), node).ok_or(io::ErrorKind::InvalidInput)?;
    let mut pair = [0; 64];
    match subtree.pair_index(grain) {
        Some(index) => outboard.read_exact_at(&mut pair, index * PAIR_BYTES)?,
        None => {
            let mut bytes = vec![0; subtree.bytes().len() as usize];
            data.read_exact_at(&mut bytes, subtree.bytes().start())?;
            let (l, r) = subtree.split();
            let (left, right) = bytes.split_at(l.bytes().len() as usize);
            pair[..32].copy_from_slice(&hash_block(left, l, Grain::NOTHING, &mut []));
            pair[32..].copy_from_slice(&hash_block(right, r, Grain::NOTHING, &mut []));
        }
    }
    Ok(pair)
}

fn number(subtree: Subtree) -> u64 {
    subtree.pair_index(Grain::GROUP).expect("a subtree of several groups has a pair")
}
