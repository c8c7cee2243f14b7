//! `tree::Prover` and `tree::find_damage` over a disk that is not what it was: nothing wrong is yielded or called sound,
//! and sound data is not blamed for its outboard.

#![no_main]

use arbitrary::Arbitrary;
use fuzz::{Blob, Harm, Ranges};
use libfuzzer_sys::fuzz_target;
use tree::{Prover, RangeSet, Verified, find_damage};

#[derive(Debug, Arbitrary)]
struct Input {
    blob: Blob,
    ranges: Ranges,
    /// What was stored as its outboard, if not its own.
    foreign: Option<Vec<u8>>,
    outboard_harms: Vec<Harm>,
    data_harms: Vec<Harm>,
}

fuzz_target!(|input: Input| {
    let Input { blob, ranges, foreign, outboard_harms, data_harms } = input;
    let mut outboard = foreign.unwrap_or_else(|| blob.hashed.outboard.clone());
    let mut data = blob.data.clone();
    outboard_harms.iter().for_each(|harm| harm.befall(&mut outboard));
    data_harms.iter().for_each(|harm| harm.befall(&mut data));
    let damaged = blob.damaged(&data);
    let outboard_is_sound = outboard.starts_with(&blob.hashed.outboard);

    let query = ranges.query();
    let wanted = query.resolve_bytes(blob.size());
    let (mut proven, mut unproven) = (RangeSet::new(), RangeSet::new());
    for piece in Prover::new(blob.id(), blob.size(), &data[..], &outboard[..], &query) {
        match piece {
            Ok(piece) => {
                blob.check(&piece, blob.size());
                if let Verified::Data(data) = piece {
                    proven.insert(data.range());
                }
            }
            Err(error) => unproven.insert(error.range()),
        }
    }
    assert!(wanted.difference(&proven).difference(&unproven).is_empty(), "some bytes were passed over");
    assert!(proven.difference(&wanted).is_empty(), "some bytes were not asked for");
    if damaged.is_empty() && outboard_is_sound {
        assert_eq!((proven, unproven), (wanted, RangeSet::new()));
    }

    let damage = find_damage(blob.id(), blob.size(), &data[..], &outboard[..], &|_| {});
    assert!(damaged.difference(&damage.data).is_empty(), "damage was overlooked");
    assert_eq!(damage.outboard.is_empty(), outboard_is_sound);
    if outboard_is_sound || damaged.is_empty() {
        assert_eq!(damage.data, damaged, "sound data is blamed");
    }
});
