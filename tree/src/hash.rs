use std::{cell::RefCell, io};

use crate::{
    cv::{Cv, join, parent_cv, subtree_cv},
    geometry::{GROUP_BYTES, Geometry, PAIR_BYTES, Subtree},
    id::BlobId,
    range::ByteRange,
    read_at::ReadAt,
};

/// A blob's name, and its tree down to chunk groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashed {
    /// The root hash.
    pub id: BlobId,
    /// The inner nodes' pairs in pre-order: [`Geometry::outboard_bytes`] bytes. Format: spec/tree.md, "Outboard".
    pub outboard: Vec<u8>,
}

/// How many chunk groups one task reads and hashes at a time: 1 MiB.
pub(crate) const TASK_GROUPS: u64 = 64;

/// Hashes the first `size` bytes of `data` into id and outboard, in one pass, on rayon's threads.
///
/// Needs 1 MiB for each thread besides the outboard. Fails with what `data` fails with; if `data` has fewer
/// than `size` bytes, that is [`io::ErrorKind::UnexpectedEof`]. Whether `data` changed meanwhile is for the
/// caller to find out: see [`Fingerprint`](crate::Fingerprint).
pub fn hash<R: ReadAt + ?Sized>(data: &R, size: u64) -> io::Result<Hashed> {
    let geometry = Geometry::new(size);
    let too_large = |_| io::Error::new(io::ErrorKind::OutOfMemory, "the outboard does not fit into memory");
    let mut outboard = Vec::new();
    let bytes = usize::try_from(geometry.outboard_bytes()).map_err(too_large)?;
    outboard.try_reserve_exact(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
    outboard.resize(bytes, 0);
    let root = hash_subtree(data, Subtree::root(geometry), &mut outboard)?;
    Ok(Hashed { id: BlobId::from_bytes(root), outboard })
}

/// Hashes `subtree` of `data` and fills `pairs`, which has just room for its pairs.
pub(crate) fn hash_subtree<R: ReadAt + ?Sized>(data: &R, subtree: Subtree, pairs: &mut [u8]) -> io::Result<Cv> {
    if subtree.groups() <= TASK_GROUPS {
        return with_bytes(data, subtree.bytes(), |bytes| hash_in_memory(bytes, subtree, pairs));
    }
    let (l, r) = subtree.split();
    let (top, left_pairs, right_pairs) = split_pairs(pairs, l);
    let (left, right) = rayon::join(|| hash_subtree(data, l, left_pairs), || hash_subtree(data, r, right_pairs));
    top.copy_from_slice(&join(left?, right?));
    Ok(parent_cv(top, subtree.is_root()))
}

fn hash_in_memory(bytes: &[u8], subtree: Subtree, pairs: &mut [u8]) -> Cv {
    if subtree.groups() == 1 {
        return subtree_cv(bytes, subtree.start, subtree.is_root());
    }
    let (l, r) = subtree.split();
    let (top, left_pairs, right_pairs) = split_pairs(pairs, l);
    let (left_bytes, right_bytes) = bytes.split_at((l.groups() * GROUP_BYTES) as usize);
    *top = join(hash_in_memory(left_bytes, l, left_pairs), hash_in_memory(right_bytes, r, right_pairs));
    parent_cv(top, subtree.is_root())
}

/// The top pair, the pairs of the left side, and those of the right side.
fn split_pairs(pairs: &mut [u8], left: Subtree) -> (&mut [u8; 64], &mut [u8], &mut [u8]) {
    let (top, rest) = pairs.split_first_chunk_mut().expect("a subtree of several groups has a pair");
    let (left, right) = rest.split_at_mut(((left.groups() - 1) * PAIR_BYTES) as usize);
    (top, left, right)
}

/// Reads `range` of `data`, at most one task's bytes, into this thread's buffer and hands it to `use_bytes`.
pub(crate) fn with_bytes<R: ReadAt + ?Sized, T>(
    data: &R,
    range: ByteRange,
    use_bytes: impl FnOnce(&[u8]) -> T,
) -> io::Result<T> {
    thread_local!(static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    BUFFER.with_borrow_mut(|buffer| {
        let len = range.len() as usize;
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        data.read_exact_at(&mut buffer[..len], range.start())?;
        Ok(use_bytes(&buffer[..len]))
    })
}
