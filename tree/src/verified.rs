use bytes::Bytes;

use crate::{cv::Pair, geometry::PAIR_BYTES, id::BlobId, range::ByteRange};

/// A piece of a blob or of its tree that has been proven against the blob's id.
///
/// Only this crate makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verified {
    /// A pair of hashes of the tree.
    Node(VerifiedNode),
    /// Bytes of the blob.
    Data(VerifiedData),
}

impl Verified {
    /// The piece as it stands in bao encoding: a pair's 64 bytes, or the blob's bytes.
    pub fn wire_bytes(&self) -> &[u8] {
        match self {
            Self::Node(node) => &node.pair,
            Self::Data(data) => &data.bytes,
        }
    }

    /// The same; the blob's bytes are not copied.
    pub fn into_wire_bytes(self) -> Bytes {
        match self {
            Self::Node(node) => Bytes::copy_from_slice(&node.pair),
            Self::Data(data) => data.bytes,
        }
    }

    /// The bytes of the blob that it has, if it has any.
    pub fn data(&self) -> Option<&VerifiedData> {
        match self {
            Self::Data(data) => Some(data),
            Self::Node(_) => None,
        }
    }
}

/// A proven pair of hashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedNode {
    pub(crate) blob: BlobId,
    pub(crate) index: Option<u64>,
    pub(crate) pair: Pair,
}

impl VerifiedNode {
    /// The blob of whose tree this is.
    pub fn blob(&self) -> BlobId {
        self.blob
    }

    /// Where the pair is in the outboard of a blob of the size that the proof was made for, in bytes; `None` below
    /// chunk groups, which it leaves out. While that size is only claimed, so is this: the hashes are proven, and
    /// their place is as good as the claim.
    pub fn outboard_offset(&self) -> Option<u64> {
        self.index.map(|index| index * PAIR_BYTES)
    }

    /// The left and the right hash.
    pub fn pair(&self) -> &[u8; 64] {
        &self.pair
    }
}

/// Proven bytes of a blob: at most a chunk group, and never across the border of two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedData {
    pub(crate) blob: BlobId,
    pub(crate) offset: u64,
    pub(crate) bytes: Bytes,
}

impl VerifiedData {
    /// The blob whose bytes these are.
    pub fn blob(&self) -> BlobId {
        self.blob
    }

    /// Where in the blob they start.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Where in the blob they are.
    pub fn range(&self) -> ByteRange {
        ByteRange { start: self.offset, end: self.offset + self.bytes.len() as u64 }
    }

    /// The part of these bytes that is in `range`; without bytes if none is.
    pub fn slice(&self, range: ByteRange) -> VerifiedData {
        let part = self.range().intersection(range);
        let (start, end) = (part.start - self.offset, part.end - self.offset);
        let bytes = if part.is_empty() { Bytes::new() } else { self.bytes.slice(start as usize..end as usize) };
        VerifiedData { blob: self.blob, offset: part.start, bytes }
    }
}
