//! `peers::Unpacker` against senders that lie: whatever comes, in whatever pieces, it ends in bounds and says the same.

#![no_main]

use arbitrary::Arbitrary;
use bytes::Bytes;
use fuzz::Harm;
use libfuzzer_sys::fuzz_target;
use peers::{Compress, Level, Packer, UnpackError, Unpacker};

#[derive(Debug, Arbitrary)]
enum Input {
    /// Any bytes, as a packed answer.
    Anything { wire: Vec<u8>, steps: Vec<u16> },
    /// What was packed, and what becomes of it on the way.
    Harmed { batches: Vec<Vec<Run>>, level: Option<u8>, harms: Vec<Harm>, steps: Vec<u16> },
}

/// The same bytes again and again, which shrink, or random ones, which do not.
#[derive(Debug, Arbitrary)]
struct Run {
    bytes: Vec<u8>,
    times: u8,
    random: u16,
}

impl Run {
    fn bytes(&self) -> Bytes {
        let mut bytes = self.bytes.repeat(self.times.into());
        let mut random = vec![0; usize::from(self.random % 2048)];
        fastrand::Rng::with_seed(self.random.into()).fill(&mut random);
        bytes.extend(random);
        bytes.into()
    }
}

fuzz_target!(|input: Input| {
    match input {
        Input::Anything { wire, steps } => drop(unpack_both_ways(&wire, &steps)),
        Input::Harmed { batches, level, harms, steps } => {
            let compress = level.and_then(|level| Level::new(level % 20)).map_or(Compress::Auto, Compress::Level);
            let mut packer = Packer::new(compress);
            let (mut plain, mut wire) = (Vec::new(), Vec::new());
            for batch in &batches {
                let batch: Vec<_> = batch.iter().map(Run::bytes).collect();
                batch.iter().for_each(|run| plain.extend_from_slice(run));
                packer.pack(batch, true).iter().for_each(|part| wire.extend_from_slice(part));
            }
            let truth = wire.clone();
            harms.iter().for_each(|harm| harm.befall(&mut wire));
            let unpacked = unpack_both_ways(&wire, &steps);
            if wire == truth {
                assert!(unpacked == (plain, Ok(true)), "what was packed is not what comes out");
            }
        }
    }
});

/// What comes of `wire`, which is the same at once and in steps.
fn unpack_both_ways(wire: &[u8], steps: &[u16]) -> (Vec<u8>, Result<bool, UnpackError>) {
    let at_once = unpack(wire, &[]);
    assert!(unpack(wire, steps) == at_once, "it depends on how it comes");
    at_once
}

/// Pushes `wire` in steps of `steps` bytes, the rest at once. Returns the plain bytes, and whether the answer may end there,
/// or why it failed.
fn unpack(mut wire: &[u8], steps: &[u16]) -> (Vec<u8>, Result<bool, UnpackError>) {
    let (mut unpacker, mut plain) = (Unpacker::new(), Vec::new());
    for step in steps.iter().map(|&step| usize::from(step)).chain([usize::MAX]) {
        let (now, later) = wire.split_at(wire.len().min(step));
        unpacker.push(Bytes::copy_from_slice(now));
        wire = later;
        loop {
            match unpacker.next() {
                Ok(Some(bytes)) => {
                    assert!((1..=1 << 20).contains(&bytes.len()), "{} bytes at once", bytes.len());
                    plain.extend_from_slice(&bytes);
                }
                Ok(None) => break,
                Err(error) => {
                    unpacker.push(Bytes::copy_from_slice(later));
                    assert_eq!(unpacker.next(), Err(error), "an error stays");
                    assert!(!unpacker.is_between_frames());
                    return (plain, Err(error));
                }
            }
        }
    }
    (plain, Ok(unpacker.is_between_frames()))
}
