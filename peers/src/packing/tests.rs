use std::{fs, iter};

use data_encoding::HEXLOWER;
use proptest::prelude::*;
use serde::de::{IntoDeserializer, value::Error as ValueError};

use super::*;

const FRAME_BYTES: usize = 256 << 10;

fn level(n: u8) -> Compress {
    Compress::Level(Level::new(n).unwrap())
}

fn random(bytes: usize, seed: u64) -> Bytes {
    let mut random = vec![0; bytes];
    fastrand::Rng::with_seed(seed).fill(&mut random);
    random.into()
}

fn text(bytes: usize) -> Bytes {
    let lines = (0..).flat_map(|n: u64| format!("{n}: the {}th line of {n}\n", n * 7).into_bytes());
    lines.take(bytes).collect()
}

/// All that `wire` says, pushed as it is cut.
fn unpack(wire: impl IntoIterator<Item = Bytes>) -> Result<Vec<u8>, UnpackError> {
    let mut unpacker = Unpacker::new();
    let mut plain = Vec::new();
    for chunk in wire {
        unpacker.push(chunk);
        while let Some(bytes) = unpacker.next()? {
            assert!(!bytes.is_empty() && bytes.len() <= FRAME_BYTES_MAX);
            plain.extend_from_slice(&bytes);
        }
    }
    assert!(unpacker.is_between_frames());
    Ok(plain)
}

fn packs(wire: &[Bytes]) -> bool {
    wire[0][3] & 0x80 != 0
}

/// A frame whose payload is `hex`.
fn compressed(hex: &str) -> Bytes {
    let payload = HEXLOWER.decode(hex.as_bytes()).unwrap();
    [&header(payload.len(), true), &payload[..]].concat().into()
}

#[test]
fn a_plain_frame_on_the_wire() {
    let wire = Packer::new(Compress::Off).pack(vec!["he".into(), Bytes::new(), "llo".into()], true);
    assert_eq!(HEXLOWER.encode(&wire.concat()), "0500000068656c6c6f");
    assert_eq!(wire.len(), 3, "no copy, and nothing empty");
    assert_eq!(unpack(wire).unwrap(), b"hello");
}

#[test]
fn a_compressed_frame_on_the_wire() {
    // 700 times "a": magic, one segment with its size in two bytes (less 256), one last block of 700 times a byte.
    let golden = compressed("28b52ffd60bc01e3150061");
    assert_eq!(HEXLOWER.encode(&golden[..4]), "0b000080");
    assert_eq!(unpack([golden]).unwrap(), [b'a'; 700]);

    let wire = Packer::new(level(1)).pack(vec![Bytes::from_static(&[b'a'; 700])], false).concat();
    assert_eq!(HEXLOWER.encode(&wire[3..4]), "80");
    assert_eq!(HEXLOWER.encode(&wire[4..11]), "28b52ffd60bc01");
}

/// Frames of a sparse file go compressed whatever the network gives, also behind some that were tried and did not shrink.
#[test]
fn zeros_are_compressed_on_any_network() {
    let zeros = || vec![Bytes::from_static(&[0; 16 << 10]), random(64, 1), Bytes::from_static(&[0; 16 << 10])];
    let mut packer = Packer::new(Compress::Auto);
    assert!(packer.pack(zeros(), false).concat().len() < 200);
    for seed in 0..4 {
        assert!(!packs(&packer.pack(vec![random(FRAME_BYTES, seed)], true)));
    }
    let wire = packer.pack(zeros(), false);
    assert!(wire.concat().len() < 200);
    assert_eq!(unpack(wire).unwrap(), zeros().concat());
    assert!(!packs(&packer.pack(vec![Bytes::from_static(&[0; 4096]), random(4096, 9)], false)));
    assert!(!packs(&Packer::new(Compress::Off).pack(zeros(), true)));
}

#[test]
fn what_is_no_frame_fails_for_good() {
    let said = |bytes: &[u8]| unpack([Bytes::copy_from_slice(bytes)]).unwrap_err();
    assert_eq!(said(&[0; 4]), UnpackError::Empty);
    assert_eq!(said(&[0, 0, 0, 0x80]), UnpackError::Empty);
    assert_eq!(said(&[1, 0, 0x10, 0]), UnpackError::TooLong { bytes: FRAME_BYTES_MAX + 1 });
    assert_eq!(said(&[0xff; 4]), UnpackError::TooLong { bytes: (1 << 31) - 1 });
    for (what, payload) in [
        ("no zstd", "68656c6c6f"),
        ("two frames", "28b52ffd60bc01e315006128b52ffd60bc01e3150061"),
        ("something behind the frame", "28b52ffd60bc01e315006100"),
        ("to be skipped", "502a4d1801000000aa"),
        ("no size", "28b52ffd0058e3150061"),
        ("of nothing", "28b52ffd2000010000"),
        ("cut", "28b52ffd60bc01e31500"),
    ] {
        assert_eq!(unpack([compressed(payload)]).unwrap_err(), UnpackError::NotOneFrame, "{what}");
    }
    for (what, payload) in [
        ("less than its size", "28b52ffd60bd01e3150061"),
        ("more than its size", "28b52ffd60bb01e3150061"),
        ("a dictionary is needed", "28b52ffd6107bc01e3150061"),
    ] {
        assert_eq!(unpack([compressed(payload)]).unwrap_err(), UnpackError::Damaged, "{what}");
    }

    let bad: [(Bytes, _); 2] =
        [(vec![0; 4].into(), UnpackError::Empty), (compressed("28b52ffd60bb01e3150061"), UnpackError::Damaged)];
    for (bad, error) in bad {
        let mut unpacker = Unpacker::new();
        unpacker.push(bad);
        for _ in 0..2 {
            assert_eq!(unpacker.next(), Err(error));
            assert!(!unpacker.is_between_frames());
            unpacker.push("\x05\0\0\0hello".into());
        }
    }
}

/// 1 MiB that unpacks to 32 GiB, whatever it says of itself.
#[test]
fn bombs_fail_in_little_memory() {
    let before = peak_bytes();
    let full = |head: &str| {
        let head = HEXLOWER.decode(head.as_bytes()).unwrap();
        let blocks = (FRAME_BYTES_MAX - head.len()) / 4;
        // Each block 128 KiB of zeros; the last one says so.
        let block = |last: usize| (((128 << 10) << 3) | (1 << 1) | last).to_le_bytes()[..4].to_vec();
        let body = iter::repeat_n(block(0), blocks - 1).chain([block(1)]).map(|mut block| {
            block[3] = 0;
            block
        });
        let payload = [head, body.flatten().collect()].concat();
        let wire = [&header(payload.len(), true), &payload[..]].concat();
        unpack([wire.into()]).unwrap_err()
    };
    assert_eq!(full("28b52ffde00000000008000000"), UnpackError::UnpacksToTooMuch { bytes: 32 << 30 });
    assert_eq!(full("28b52ffda001001000"), UnpackError::UnpacksToTooMuch { bytes: (1 << 20) + 1 });
    assert_eq!(full("28b52ffda000001000"), UnpackError::Damaged);
    // No size, and a window of 2 GiB.
    assert_eq!(full("28b52ffd00a8"), UnpackError::NotOneFrame);
    let grown = peak_bytes() - before;
    assert!(grown < 64 << 20, "{grown} bytes were taken");
}

/// The most memory that this process ever had.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn what_is_plain_comes_as_it_comes() {
    let wire = Packer::new(Compress::Off).pack(vec![random(1000, 1)], false);
    let payload = wire[1].clone();
    let mut unpacker = Unpacker::new();
    assert!(unpacker.is_between_frames());
    unpacker.push(wire[0].clone());
    assert!(!unpacker.is_between_frames());
    assert_eq!(unpacker.next(), Ok(None));
    assert!(!unpacker.is_between_frames());
    unpacker.push(payload.slice(..999));
    let came = unpacker.next().unwrap().unwrap();
    assert_eq!((came.as_ptr(), came.len()), (payload.as_ptr(), 999), "no copy");
    assert!(!unpacker.is_between_frames());
    unpacker.push(payload.slice(999..));
    assert!(!unpacker.is_between_frames());
    assert_eq!(unpacker.next(), Ok(Some(payload.slice(999..))));
    assert!(unpacker.is_between_frames());
}

#[test]
fn a_compressed_frame_that_ends_early_is_no_end() {
    let wire: Bytes = Packer::new(level(1)).pack(vec![text(5000)], false).concat().into();
    for cut in 1..wire.len() {
        let mut unpacker = Unpacker::new();
        unpacker.push(wire.slice(..cut));
        assert_eq!(unpacker.next(), Ok(None));
        assert!(!unpacker.is_between_frames());
    }
}

#[test]
fn text_shrinks_and_random_bytes_do_not() {
    for (compress, behind, shrinks) in [
        (Compress::Auto, true, true),
        (Compress::Auto, false, false),
        (level(1), false, true),
        (level(19), true, true),
        (Compress::Off, true, false),
    ] {
        let wire = Packer::new(compress).pack(vec![text(FRAME_BYTES)], behind);
        assert_eq!(packs(&wire), shrinks, "{compress}, {behind}");
        assert_eq!(wire.concat().len() < FRAME_BYTES / 2, shrinks);
        assert_eq!(unpack(wire).unwrap(), text(FRAME_BYTES));
        let wire = Packer::new(compress).pack(vec![random(FRAME_BYTES, 1)], behind);
        assert!(!packs(&wire));
        assert_eq!(wire.concat().len(), FRAME_BYTES + 4);
    }
}

/// A frame is judged by all of it, not by its first bytes.
#[test]
fn samples_are_from_all_over_the_frame() {
    for at in [0, 60 << 10, 200 << 10] {
        let mut packer = Packer::new(level(1));
        let mixed = vec![text(at), random(40 << 10, 1), text(FRAME_BYTES - (40 << 10) - at)];
        assert!(packs(&packer.pack(mixed, true)), "random from {at} on");
    }
    let mut packer = Packer::new(level(1));
    let mixed = vec![random(5 << 10, 1), text(50 << 10), random(FRAME_BYTES - (55 << 10), 2)];
    assert!(!packs(&packer.pack(mixed, true)));
}

#[test]
fn what_does_not_shrink_is_sampled_ever_less() {
    let mut packer = Packer::new(Compress::Auto);
    let noise = random(FRAME_BYTES, 1);
    let mut sampled = Vec::new();
    for frame in 0..400 {
        let before = packer.samples();
        assert!(!packs(&packer.pack(vec![noise.clone()], true)));
        if packer.samples() > before {
            sampled.push(frame);
        }
    }
    // 1, 2, 4, 8, 16, 32, 64, 64, 64 frames between them are not.
    assert_eq!(sampled, [0, 2, 5, 10, 19, 36, 69, 134, 199, 264, 329, 394]);

    // Text is found at the next sample; from then on each frame of it is compressed, unsampled.
    let first = (400..500).find(|_| packs(&packer.pack(vec![text(FRAME_BYTES)], true))).unwrap();
    assert_eq!(first, 459);
    let samples = packer.samples();
    assert!((0..10).all(|_| packs(&packer.pack(vec![text(FRAME_BYTES)], true))));
    assert_eq!(packer.samples(), samples);
    // And noise again is tried once as a whole, and then sampled with short pauses.
    let sampled = [0, 0, 1, 0, 0, 1].map(|_| {
        let before = packer.samples();
        assert!(!packs(&packer.pack(vec![noise.clone()], true)));
        packer.samples() - before
    });
    assert_eq!(sampled, [0, 0, 1, 0, 0, 1]);
}

/// A frame that shrinks a little is sent compressed, for that is done; but it did not pay.
#[test]
fn a_little_smaller_is_no_reason_to_go_on() {
    let mut packer = Packer::new(level(1));
    let spot = || text(SPOT_BYTES);
    let gap = |seed| random((FRAME_BYTES - SPOT_BYTES) / (SPOTS - 1) - SPOT_BYTES, seed);
    let frame = vec![spot(), gap(1), spot(), gap(2), spot(), gap(3), spot()];
    assert!(packs(&packer.pack(frame.clone(), true)));
    assert!(!packs(&packer.pack(frame.clone(), true)));
    assert!(packs(&packer.pack(frame, true)));
    assert_eq!(packer.samples(), 2);
}

#[test]
fn what_is_too_long_for_a_frame_becomes_several() {
    let plain = vec![random(FRAME_BYTES_MAX - 10, 1), random(2 * FRAME_BYTES_MAX, 2), random(11, 3)];
    let wire = Packer::new(Compress::Off).pack(plain.clone(), false);
    let headers: Vec<&Bytes> = wire.iter().filter(|chunk| chunk.len() == 4).collect();
    assert_eq!(headers, [&[0, 0, 0x10, 0][..], &[0, 0, 0x10, 0], &[0, 0, 0x10, 0], &[1, 0, 0, 0]]);
    assert_eq!(unpack(wire).unwrap(), plain.concat());
    assert_eq!(Packer::new(level(1)).pack(vec![text(FRAME_BYTES_MAX)], false).len(), 1);
    assert_eq!(Packer::new(level(1)).pack(vec![text(FRAME_BYTES_MAX + 1)], false).len(), 3);
    assert!(Packer::new(level(1)).pack(vec![Bytes::new()], true).is_empty());
}

#[test]
fn texts_of_settings() {
    for (said, meant) in [("auto", Compress::Auto), ("off", Compress::Off), ("1", level(1)), ("19", level(19))] {
        assert_eq!(said.parse(), Ok(meant));
        assert_eq!(meant.to_string(), said);
        assert_eq!(Compress::deserialize(IntoDeserializer::<ValueError>::into_deserializer(said)), Ok(meant));
    }
    for nonsense in ["", "0", "20", "-1", "Auto", "3.5", "on"] {
        assert_eq!(nonsense.parse::<Compress>(), Err(CompressError), "{nonsense}");
    }
    let number = |n: i64| Compress::deserialize(IntoDeserializer::<ValueError>::into_deserializer(n));
    assert_eq!(number(3), Ok(level(3)));
    let error = number(20).unwrap_err().to_string();
    assert_eq!(error, "compression is \"auto\", \"off\", or a level from 1 to 19");
}

/// Bytes as answers have them: some that shrink, some that do not, in chunks of all sizes.
fn some_chunks() -> impl Strategy<Value = Vec<Bytes>> {
    let chunk = (0..40_000usize, any::<u64>(), any::<bool>())
        .prop_map(|(bytes, seed, shrinks)| if shrinks { text(bytes) } else { random(bytes, seed) });
    prop::collection::vec(chunk, 0..8)
}

fn some_compress() -> impl Strategy<Value = Compress> {
    prop_oneof![Just(Compress::Auto), Just(Compress::Off), (1..=9u8).prop_map(level)]
}

/// Feeds garbage, which may fail, but must keep to the bounds and fail for good.
fn survives(wire: &[u8], cut: usize) {
    let mut unpacker = Unpacker::new();
    let mut failed = None;
    for chunk in wire.chunks(cut) {
        unpacker.push(Bytes::copy_from_slice(chunk));
        loop {
            match unpacker.next() {
                Ok(None) => break,
                Ok(Some(plain)) => assert!(failed.is_none() && (1..=FRAME_BYTES_MAX).contains(&plain.len())),
                Err(error) => {
                    assert!(failed.is_none_or(|failed| failed == error));
                    failed = Some(error);
                    break;
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_cut_gives_the_same_bytes(
        frames in prop::collection::vec((some_chunks(), any::<bool>()), 0..5),
        compress in some_compress(), cuts in prop::collection::vec(1..30_000usize, 1..20),
    ) {
        let mut packer = Packer::new(compress);
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        for (frame, wire_is_behind) in frames {
            let bytes = frame.concat();
            plain.extend_from_slice(&bytes);
            let packed = packer.pack(frame, wire_is_behind).concat();
            prop_assert!(packed.len() <= bytes.len() + HEADER_BYTES, "never longer");
            wire.extend_from_slice(&packed);
        }
        let mut rest = Bytes::from(wire);
        let mut chunks = Vec::new();
        for cut in cuts.into_iter().cycle() {
            if rest.is_empty() {
                break;
            }
            chunks.push(rest.split_to(cut.min(rest.len())));
        }
        prop_assert_eq!(unpack(chunks).unwrap(), plain);
    }

    #[test]
    fn garbage_is_survived(wire in prop::collection::vec(any::<u8>(), 0..5000), cut in 1..6000usize) {
        survives(&wire, cut);
        // Behind a header that makes sense.
        survives(&[&header(wire.len().max(1), true), &wire[..]].concat(), cut);
        survives(&[&header(wire.len() + 4, true), &[0x28, 0xb5, 0x2f, 0xfd], &wire[..]].concat(), cut);
    }

    #[test]
    fn damage_is_survived(
        chunks in some_chunks(), hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in 1..100_000usize,
    ) {
        let mut wire = Packer::new(level(1)).pack(chunks, true).concat();
        prop_assume!(!wire.is_empty());
        for (at, byte) in hits {
            let at = at.index(wire.len());
            wire[at] = byte;
        }
        survives(&wire, cut);
    }
}
