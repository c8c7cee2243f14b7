//! Many chunks, and many nodes, hashed in one go.
//!
//! BLAKE3's own recursion fills the processor's vectors with the chunks of one chunk group, but not with the nodes
//! above them: these come eight, four, two and one at a time. Here a block is hashed level by level, so that all but
//! the topmost few nodes of a megabyte fill the vectors too. `blake3::platform` is not documented and may change: the
//! version of the crate is pinned, and tests compare what comes out with the documented functions.

use std::cell::RefCell;

use blake3::{
    IncrementCounter,
    platform::{MAX_SIMD_DEGREE, Platform},
};

use crate::{
    cv::{Cv, join, parent_cv, subtree_cv},
    geometry::{CHUNK_BYTES, GROUP_BYTES, Grain, PAIR_BYTES, Subtree},
};

/// The hash of `subtree`, whose bytes are `bytes`. Fills `pairs`, which has just room for its pairs at `grain`.
pub(crate) fn hash_block(bytes: &[u8], subtree: Subtree, grain: Grain, pairs: &mut [u8]) -> Cv {
    if bytes.len() as u64 <= GROUP_BYTES {
        return subtree_cv(bytes, subtree.start, subtree.is_root());
    }
    if bytes.len().is_power_of_two() {
        return hash_whole_tree(bytes, subtree, grain, pairs);
    }
    let (l, r) = subtree.split();
    let (top, below) = pairs.split_at_mut(pairs.len().min(PAIR_BYTES as usize));
    let (left_pairs, right_pairs) = below.split_at_mut(below.len().min((l.pairs(grain) * PAIR_BYTES) as usize));
    let (left_bytes, right_bytes) = bytes.split_at(l.bytes().len() as usize);
    let pair = join(hash_block(left_bytes, l, grain, left_pairs), hash_block(right_bytes, r, grain, right_pairs));
    top.copy_from_slice(&pair[..top.len()]);
    parent_cv(&pair, subtree.is_root())
}

/// The same for a subtree that is a whole tree of more than one chunk.
fn hash_whole_tree(bytes: &[u8], subtree: Subtree, grain: Grain, pairs: &mut [u8]) -> Cv {
    thread_local!(static LEVELS: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) });
    LEVELS.with_borrow_mut(|(cvs, above)| {
        let platform = Platform::detect();
        cvs.resize(subtree.chunks() as usize * CV_BYTES, 0);
        hash_each::<{ CHUNK_BYTES as usize }>(platform, bytes, Some(subtree.start), CHUNK, cvs);
        let mut level_chunks = 2;
        loop {
            // The hashes of a level, two by two, are the pairs of the nodes above.
            if level_chunks > grain.chunks() {
                keep_pairs(cvs, level_chunks, subtree.chunks(), grain, pairs);
            }
            if let Ok(pair) = cvs[..].try_into() {
                return parent_cv(pair, subtree.is_root());
            }
            above.resize(cvs.len() / 2, 0);
            hash_each::<{ PAIR_BYTES as usize }>(platform, cvs, None, NODE, above);
            std::mem::swap(cvs, above);
            level_chunks *= 2;
        }
    })
}

/// Puts the pairs of one level, that of nodes of `level_chunks`, where they stand in pre-order.
fn keep_pairs(level: &[u8], level_chunks: u64, tree_chunks: u64, grain: Grain, pairs: &mut [u8]) {
    let depth = u64::from((tree_chunks / level_chunks).ilog2());
    let leaves = level_chunks / grain.chunks();
    for (node, pair) in (0..).zip(level.chunks_exact(PAIR_BYTES as usize)) {
        let leaf: u64 = node * leaves;
        let offset = ((leaf - u64::from(leaf.count_ones()) + depth) * PAIR_BYTES) as usize;
        pairs[offset..offset + pair.len()].copy_from_slice(pair);
    }
}

/// The flags that BLAKE3 hashes with what is hashed: for all blocks, for the first, for the last (paper, §2.2).
type Flags = (u8, u8, u8);
const CHUNK: Flags = (0, 1 << 0, 1 << 1);
const NODE: Flags = (1 << 2, 0, 0);

/// Hashes each `N` bytes of `bytes`; chunks count from `first_chunk` on, nodes have no number.
fn hash_each<const N: usize>(platform: Platform, bytes: &[u8], first_chunk: Option<u64>, flags: Flags, out: &mut [u8]) {
    let (counter, increment) = first_chunk.map_or((0, IncrementCounter::No), |first| (first, IncrementCounter::Yes));
    let batches = bytes.chunks(N * MAX_SIMD_DEGREE).zip(out.chunks_mut(CV_BYTES * MAX_SIMD_DEGREE));
    for (batch, (bytes, out)) in (0..).zip(batches) {
        let (inputs, _) = bytes.as_chunks::<N>();
        let mut refs = [&inputs[0]; MAX_SIMD_DEGREE];
        for (slot, input) in refs.iter_mut().zip(inputs) {
            *slot = input;
        }
        let counter = if first_chunk.is_some() { counter + batch * MAX_SIMD_DEGREE as u64 } else { 0 };
        platform.hash_many(&refs[..inputs.len()], &IV, counter, increment, flags.0, flags.1, flags.2, out);
    }
}

const CV_BYTES: usize = 32;
/// The key of unkeyed BLAKE3, which is SHA-256's initial state (paper, §2.1).
const IV: [u32; 8] =
    [0x6A09_E667, 0xBB67_AE85, 0x3C6E_F372, 0xA54F_F53A, 0x510E_527F, 0x9B05_688C, 0x1F83_D9AB, 0x5BE0_CD19];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;

    /// What the undocumented functions give is what the documented ones do.
    #[test]
    fn agrees_with_blake3_at_every_shape() {
        let mut data = vec![0; (1 << 20) + 5];
        blake3::Hasher::new().finalize_xof().fill(&mut data);
        for size in [16385, 32767, 32768, 32769, 65536, 100_000, 1 << 18, (1 << 19) + 1024, 1 << 20, data.len() - 1] {
            let root = Subtree::root(Geometry::new(size as u64));
            assert_eq!(
                hash_block(&data[..size], root, Grain::NOTHING, &mut []),
                *blake3::hash(&data[..size]).as_bytes()
            );
        }
        for chunks in [32, 256, 1024] {
            let size = chunks * CHUNK_BYTES;
            let (_, right) = Subtree::root(Geometry::new(2 * size)).split();
            let bytes = &data[..size as usize];
            assert_eq!(hash_block(bytes, right, Grain::NOTHING, &mut []), subtree_cv(bytes, chunks, false));
        }
    }
}
