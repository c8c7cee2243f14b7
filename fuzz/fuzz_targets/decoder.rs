//! `tree::Decoder` against senders that lie: whatever comes, in whatever pieces, what it yields is true.

#![no_main]

use arbitrary::Arbitrary;
use blake3::hazmat::{Mode, merge_subtrees_non_root, merge_subtrees_root};
use fuzz::{Blob, Harm, Ranges};
use libfuzzer_sys::fuzz_target;
use tree::{BlobId, DecodeError, Decoder, Prover, Query, RangeSet, Verified};

#[derive(Debug, Arbitrary)]
enum Input {
    /// Any bytes, as an answer about any blob.
    Anything { blob: Option<[u8; 32]>, ranges: Ranges, expecting: Option<u64>, wire: Vec<u8>, steps: Vec<u16> },
    /// The true answer about a blob, and what becomes of it on the way.
    Harmed { blob: Blob, ranges: Ranges, expecting: bool, harms: Vec<Harm>, steps: Vec<u16> },
    /// A blob made by the sender, of a size that nothing can have, both halves of each pair the same: down to the first
    /// leaf, every pair proves.
    Mirrors { ranges: Ranges, size: u64, pairs: u8, leaf: [u8; 32], steps: Vec<u16> },
}

fuzz_target!(|input: Input| {
    match input {
        Input::Anything { blob, ranges, expecting, wire, steps } => {
            let blob = blob.map_or(BlobId::of(wire.get(8..).unwrap_or_default()), BlobId::from_bytes);
            let _ = decode(decoder(blob, ranges.query(), expecting), &wire, &steps);
        }
        Input::Harmed { blob, ranges, expecting, harms, steps } => {
            harmed(&blob, &ranges.query(), expecting, &harms, &steps)
        }
        Input::Mirrors { ranges, size, pairs, leaf, steps } => {
            let pairs = usize::from(pairs % 64);
            let mut cvs = vec![leaf];
            for _ in 0..pairs {
                let below = cvs[cvs.len() - 1];
                cvs.push(merge_subtrees_non_root(&below, &below, Mode::Hash));
            }
            let top = cvs[cvs.len() - 1];
            let blob = BlobId::from_bytes(*merge_subtrees_root(&top, &top, Mode::Hash).as_bytes());
            let mut wire = size.to_le_bytes().to_vec();
            cvs.iter().rev().for_each(|cv| wire.extend([*cv, *cv].as_flattened()));
            let (pieces, _) = decode(decoder(blob, ranges.query(), None), &wire, &steps);
            assert!(!pieces.iter().any(|piece| matches!(piece, Verified::Data(_))));
        }
    }
});

fn harmed(blob: &Blob, query: &Query, expecting: bool, harms: &[Harm], steps: &[u16]) {
    let mut truth = blob.size().to_le_bytes().to_vec();
    for piece in Prover::new(blob.id(), blob.size(), &blob.data[..], &blob.hashed.outboard[..], query) {
        truth.extend_from_slice(piece.expect("what is sound proves").wire_bytes());
    }
    let mut wire = truth.clone();
    harms.iter().for_each(|harm| harm.befall(&mut wire));

    let (pieces, end) = decode(decoder(blob.id(), query.clone(), expecting.then_some(blob.size())), &wire, steps);
    let claimed = wire.first_chunk().map_or(0, |size| u64::from_le_bytes(*size));
    pieces.iter().for_each(|piece| blob.check(piece, claimed));
    let is_finished = end == Ok(true);
    let proves_size = expecting || !query.is_empty() && query.resolve_bytes(claimed).end() == claimed;
    if is_finished && proves_size {
        assert_eq!(claimed, blob.size(), "a wrong size counts as proven");
    }
    if claimed == blob.size() {
        assert_eq!(is_finished, wire == truth);
    }
    if wire == truth {
        let data = pieces.iter().filter_map(|piece| match piece {
            Verified::Data(data) => Some(data.range()),
            Verified::Node(_) => None,
        });
        assert_eq!(data.collect::<RangeSet>(), query.resolve_bytes(blob.size()));
    }
}

fn decoder(blob: BlobId, query: Query, expecting: Option<u64>) -> Decoder {
    let decoder = Decoder::new(blob, query);
    match expecting {
        Some(size) => decoder.expecting(size),
        None => decoder,
    }
}

/// Pushes `wire` in steps of `steps` bytes, the rest at once. Returns what was yielded, and whether the decoder is
/// finished, or why it failed.
fn decode(mut decoder: Decoder, mut wire: &[u8], steps: &[u16]) -> (Vec<Verified>, Result<bool, DecodeError>) {
    let mut pieces = Vec::new();
    for step in steps.iter().map(|&step| usize::from(step)).chain([usize::MAX]) {
        let (now, later) = wire.split_at(wire.len().min(step));
        decoder.push(now);
        wire = later;
        loop {
            match decoder.next() {
                Ok(Some(piece)) => pieces.push(piece),
                Ok(None) => break,
                Err(error) => {
                    decoder.push(later);
                    assert_eq!(decoder.next().as_ref().err(), Some(&error), "an error stays");
                    assert!(!decoder.is_finished());
                    return (pieces, Err(error));
                }
            }
        }
    }
    (pieces, Ok(decoder.is_finished()))
}
