//! Requests for ranges of a blob, as peers send them.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use peers::{decode_request, encode_request};
use tree::{BlobId, Query};

#[derive(Debug, Arbitrary)]
enum Input {
    Anything(Vec<u8>),
    /// What our own side asks.
    Ranges {
        blob: [u8; 32],
        ranges: Vec<(u64, u64)>,
        to_the_end: Option<u64>,
    },
}

fuzz_target!(|input: Input| {
    match input {
        Input::Anything(bytes) => {
            let Some((blob, query)) = decode_request(&bytes) else { return };
            // A range is two varints, of a byte each at least; only the last one may lack its end.
            assert!(query.chunk_ranges().count() <= bytes.len() / 2, "{query:?}");
            round_trip(blob, query);
        }
        Input::Ranges { blob, ranges, to_the_end } => {
            let to_the_end = to_the_end.map(|start| (start, u64::MAX));
            round_trip(BlobId::from_bytes(blob), Query::chunks(ranges.into_iter().chain(to_the_end)));
        }
    }
});

fn round_trip(blob: BlobId, query: Query) {
    assert_eq!(decode_request(&encode_request(blob, &query)), Some((blob, query)));
}
