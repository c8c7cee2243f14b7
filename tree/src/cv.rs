//! BLAKE3 chaining values: the hashes of subtrees (BLAKE3 paper, §2.1 and §2.4).

use blake3::{
    Hasher,
    hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root},
};

use crate::geometry::CHUNK_BYTES;

/// The hash of a subtree: of the whole tree, if it is the root's.
pub(crate) type Cv = [u8; 32];

/// The two chaining values below a node, left then right, as outboards and proofs hold them.
pub(crate) type Pair = [u8; 64];

/// The hash of the subtree over `data`, whose first byte is the first of chunk `first_chunk`.
///
/// `data` must be a whole subtree: one that starts at a multiple of its own length in chunks, rounded up to a
/// power of two.
pub(crate) fn subtree_cv(data: &[u8], first_chunk: u64, is_root: bool) -> Cv {
    if is_root {
        *blake3::hash(data).as_bytes()
    } else {
        Hasher::new().set_input_offset(first_chunk * CHUNK_BYTES).update(data).finalize_non_root()
    }
}

/// The hash of the node above `pair`.
pub(crate) fn parent_cv(pair: &Pair, is_root: bool) -> Cv {
    let (left, right) = split(pair);
    if is_root {
        *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()
    } else {
        merge_subtrees_non_root(&left, &right, Mode::Hash)
    }
}

/// The left and the right hash of `pair`.
pub(crate) fn split(pair: &Pair) -> (Cv, Cv) {
    let (mut left, mut right) = ([0; 32], [0; 32]);
    left.copy_from_slice(&pair[..32]);
    right.copy_from_slice(&pair[32..]);
    (left, right)
}

/// The pair of `left` and `right`.
pub(crate) fn join(left: Cv, right: Cv) -> Pair {
    let mut pair = [0; 64];
    pair[..32].copy_from_slice(&left);
    pair[32..].copy_from_slice(&right);
    pair
}
