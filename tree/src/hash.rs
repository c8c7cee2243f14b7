use std::{cell::RefCell, io, sync::Mutex};

use crate::{
    bulk::hash_block,
    cv::{Cv, join, parent_cv},
    geometry::{Geometry, Grain, PAIR_BYTES, Subtree},
    id::BlobId,
    range::ByteRange,
    read_at::{ReadAt, WriteAt},
};

/// A blob's name, and its tree down to chunk groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashed {
    /// The root hash.
    pub id: BlobId,
    /// The inner nodes' pairs in pre-order: [`Geometry::outboard_bytes`] bytes. Format: spec/tree.md, "Outboard".
    pub outboard: Vec<u8>,
}

/// Hashes the first `size` bytes of `data` into id and outboard, in one pass, on rayon's threads.
///
/// Needs a megabyte or so for each thread besides the outboard. Fails with what `data` fails with; if `data` has
/// fewer than `size` bytes, that is [`io::ErrorKind::UnexpectedEof`]. Whether `data` changed meanwhile is for the
/// caller to find out: see [`Fingerprint`](crate::Fingerprint).
pub fn hash<R: ReadAt + ?Sized>(data: &R, size: u64) -> io::Result<Hashed> {
    let too_large = |_| io::Error::new(io::ErrorKind::OutOfMemory, "the outboard does not fit into memory");
    let mut outboard = Vec::new();
    let bytes = usize::try_from(Geometry::new(size).outboard_bytes()).map_err(too_large)?;
    outboard.try_reserve_exact(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
    outboard.resize(bytes, 0);
    let outboard = Mutex::new(outboard);
    let id = hash_into(data, size, Grain::GROUP, &outboard)?;
    Ok(Hashed { id, outboard: outboard.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) })
}

/// The same, with an outboard of any grain that goes into `outboard` while it is made, in pieces and in no order.
///
/// Memory is bounded, whatever the size: a few buffers of up to 1 MiB for each thread.
pub fn hash_into<R, W>(data: &R, size: u64, grain: Grain, outboard: &W) -> io::Result<BlobId>
where
    R: ReadAt + ?Sized,
    W: WriteAt + ?Sized,
{
    Ok(BlobId::from_bytes(hash_spans(data, Subtree::root(Geometry::new(size)), grain, outboard)?))
}

/// The blob id of the first `size` bytes of `data` alone. Errors and memory are as for [`hash_into`].
pub fn blob_id<R: ReadAt + ?Sized>(data: &R, size: u64) -> io::Result<BlobId> {
    hash_into(data, size, Grain::NOTHING, &Mutex::new(Vec::new()))
}

/// Hashes `subtree` of `data` span by span; the pairs of a span go out at once, those above one by one.
fn hash_spans<R, W>(data: &R, subtree: Subtree, grain: Grain, outboard: &W) -> io::Result<Cv>
where
    R: ReadAt + ?Sized,
    W: WriteAt + ?Sized,
{
    let offset = subtree.pair_index(grain).map(|index| index * PAIR_BYTES);
    if subtree.bytes().len() <= SPAN_BYTES {
        let mut pairs = vec![0; (subtree.pairs(grain) * PAIR_BYTES) as usize];
        let cv = hash_subtree(data, subtree, grain, &mut pairs)?;
        offset.map_or(Ok(()), |offset| outboard.write_all_at(&pairs, offset))?;
        return Ok(cv);
    }
    let (l, r) = subtree.split();
    let (left, right) = rayon::join(|| hash_spans(data, l, grain, outboard), || hash_spans(data, r, grain, outboard));
    let pair = join(left?, right?);
    offset.map_or(Ok(()), |offset| outboard.write_all_at(&pair, offset))?;
    Ok(parent_cv(&pair, subtree.is_root()))
}

/// Hashes `subtree` of `data` and fills `pairs`, which has just room for its pairs at `grain`.
pub(crate) fn hash_subtree<R: ReadAt + ?Sized>(
    data: &R,
    subtree: Subtree,
    grain: Grain,
    pairs: &mut [u8],
) -> io::Result<Cv> {
    if subtree.bytes().len() <= TASK_BYTES {
        return with_bytes(data, subtree.bytes(), |bytes| hash_block(bytes, subtree, grain, pairs));
    }
    let (l, r) = subtree.split();
    // Tasks are no smaller than the coarsest grain, so that a subtree of several has a pair, or none below has.
    let (top, below) = pairs.split_at_mut(pairs.len().min(PAIR_BYTES as usize));
    let (left_pairs, right_pairs) = below.split_at_mut(below.len().min((l.pairs(grain) * PAIR_BYTES) as usize));
    let (left, right) =
        rayon::join(|| hash_subtree(data, l, grain, left_pairs), || hash_subtree(data, r, grain, right_pairs));
    let pair = join(left?, right?);
    top.copy_from_slice(&pair[..top.len()]);
    Ok(parent_cv(&pair, subtree.is_root()))
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

/// How many bytes one task reads and hashes at a time.
pub(crate) const TASK_BYTES: u64 = 1 << 20;
/// How many bytes have their pairs in one buffer while they are hashed.
const SPAN_BYTES: u64 = 64 << 20;
