//! The one place that knows iroh-blobs: its request for ranges of one blob. The answer is bao encoding behind the
//! size, which `tree` makes and reads.

use iroh_blobs::{
    Hash,
    protocol::{ChunkRanges, ChunkRangesSeq, GetRequest, Request},
};
use tree::{BlobId, Query};

/// The protocol's name in TLS.
pub const ALPN: &[u8] = iroh_blobs::protocol::ALPN;

/// The bytes of a request for what `query` asks of `blob`.
pub fn encode_request(blob: BlobId, query: &Query) -> Vec<u8> {
    let mut ranges = ChunkRanges::empty();
    for (start, end) in query.chunk_ranges() {
        let start = bao_chunk(start);
        ranges |= if end == u64::MAX { ChunkRanges::from(start..) } else { ChunkRanges::from(start..bao_chunk(end)) };
    }
    let request = GetRequest::blob_ranges(Hash::from_bytes(*blob.as_bytes()), ranges);
    postcard::to_stdvec(&Request::from(request)).expect("a vector takes any number of bytes")
}

/// What a request asks for; `None` if it is not one for ranges of a single blob, which is all that is served.
pub fn decode_request(bytes: &[u8]) -> Option<(BlobId, Query)> {
    let Ok(Request::Get(GetRequest { hash, ranges })) = postcard::from_bytes(bytes) else {
        return None;
    };
    let chunks = match ranges.as_single() {
        Some((0, chunks)) => chunks.clone(),
        None if ranges == ChunkRangesSeq::empty() => ChunkRanges::empty(),
        _ => return None,
    };
    let bounds: Vec<u64> = chunks.boundaries().iter().map(|chunk| chunk.0).collect();
    let query = Query::chunks(bounds.chunks(2).map(|pair| (pair[0], pair.get(1).copied().unwrap_or(u64::MAX))));
    Some((BlobId::from_bytes(*hash.as_bytes()), query))
}

fn bao_chunk(number: u64) -> bao_tree::ChunkNum {
    bao_tree::ChunkNum(number)
}

/// The longest request that is read: some thousands of ranges.
pub(crate) const REQUEST_BYTES_MAX: usize = 64 << 10;

/// How many separate ranges one of our own requests has at most, so that it stays within that.
pub(crate) const REQUEST_RANGES_MAX: usize = 2000;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;
    use tree::{ByteRange, RangeSet};

    use super::*;

    #[test]
    fn requests_on_the_wire() {
        let groups: RangeSet =
            [(0, 16384), (65536, 65537)].into_iter().filter_map(|(a, b)| ByteRange::new(a, b)).collect();
        for (query, hex) in [
            (Query::all(), "020001000100"),
            (Query::groups(&groups), "020004001030100100"),
            (Query::chunks([]), "00"),
            (Query::chunks([(3, u64::MAX)]), "020001030100"),
        ] {
            let bytes = encode_request(BlobId::EMPTY, &query);
            let rest = bytes[1..].strip_prefix(BlobId::EMPTY.as_bytes()).unwrap();
            assert_eq!((bytes[0], HEXLOWER.encode(rest)), (0, hex.into()), "{query:?}");
            assert_eq!(decode_request(&bytes), Some((BlobId::EMPTY, query.clone())), "{query:?}");
        }
        for bad in [&[][..], &[1], &[0; 5], &[0xff; 100]] {
            assert_eq!(decode_request(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_request_with_the_most_ranges_is_short_enough() {
        let far = 1u64 << 50;
        let query =
            Query::chunks((0..REQUEST_RANGES_MAX as u64).map(|i| (far + i * (1 << 35), far + i * (1 << 35) + 16)));
        assert!(encode_request(BlobId::EMPTY, &query).len() <= REQUEST_BYTES_MAX);
    }
}
