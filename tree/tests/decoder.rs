//! The decoder against senders that lie: whatever arrives, in whatever pieces, all that it yields is true, and a
//! lie ends the answer at the first piece that holds it.

mod common;

use common::{Case, a_size_and_chunks};
use proptest::{prelude::*, sample::Index};
use tree::{DecodeError, Decoder, Prover, Query, Verified};

fn decoder(case: &Case) -> Decoder {
    Decoder::new(case.hashed.id, case.query.clone())
}

/// The true answer behind a `claimed` size.
fn wire(case: &Case, claimed: u64) -> Vec<u8> {
    let pieces = case.pieces.iter().flat_map(|piece| piece.wire_bytes());
    claimed.to_le_bytes().iter().chain(pieces).copied().collect()
}

/// Whether a decoder is finished when it has got all that there is.
type End = Result<bool, DecodeError>;

/// Feeds `wire` to `decoder` in steps of `steps` bytes, over and over. All bytes that it yields must be true; so
/// must all pairs and their places, unless the size is a lie.
fn check(case: &Case, mut decoder: Decoder, mut wire: &[u8], steps: &[usize]) -> (Vec<Verified>, End) {
    let honest_size = wire.starts_with(&case.size().to_le_bytes());
    let mut pieces = Vec::new();
    let mut end = Ok(false);
    for &step in steps.iter().cycle() {
        let (now, later) = wire.split_at(wire.len().min(step));
        decoder.push(now);
        let error = loop {
            match decoder.next() {
                Ok(Some(piece)) => pieces.push(piece),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        end = error.map_or(Ok(decoder.is_finished()), Err);
        wire = later;
        if wire.is_empty() || end.is_err() {
            break;
        }
    }
    if let Err(error) = &end {
        assert_eq!(decoder.next().as_ref(), Err(error), "an error stays");
        assert!(!decoder.is_finished());
    }
    case.check_bytes(&pieces);
    if honest_size {
        case.check_pairs(&pieces);
    }
    (pieces, end)
}

fn some_steps() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        Just(vec![1]),
        Just(vec![usize::MAX]),
        prop::collection::vec(1..100usize, 1..5),
        prop::collection::vec(1..40_000usize, 1..5),
    ]
}

#[derive(Debug, Clone)]
enum Harm {
    Flip(Index, u8),
    Cut(Index),
    Extend(Vec<u8>),
    Swap(Index, Index),
}

fn some_harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        4 => (any::<Index>(), 0..8u8).prop_map(|(byte, bit)| Harm::Flip(byte, bit)),
        2 => any::<Index>().prop_map(Harm::Cut),
        1 => prop::collection::vec(any::<u8>(), 1..100).prop_map(Harm::Extend),
        2 => any::<(Index, Index)>().prop_map(|(a, b)| Harm::Swap(a, b)),
    ]
}

/// Harms the answer behind the size, feeds it in `steps`, and checks that the decoder stops right at the harm.
fn check_harm(case: &Case, harm: &Harm, steps: &[usize]) {
    let mut parts: Vec<Vec<u8>> = case.pieces.iter().map(|piece| piece.wire_bytes().to_vec()).collect();
    let ends: Vec<usize> = parts
        .iter()
        .scan(0, |end, part| {
            *end += part.len();
            Some(*end)
        })
        .collect();
    let whole_before = |byte: usize| ends.iter().take_while(|&&end| end <= byte).count();
    let len = ends.last().copied().unwrap_or(0);
    // How many pieces come before the harm, and what the decoder must say then.
    let mut wire: Vec<u8>;
    let (intact, says): (usize, fn(&End) -> bool) = match harm {
        Harm::Flip(byte, bit) if len > 0 => {
            let byte = byte.index(len);
            wire = parts.concat();
            wire[byte] ^= 1 << bit;
            (whole_before(byte), |end| matches!(end, Err(DecodeError::WrongHash { .. })))
        }
        Harm::Cut(at) if len > 0 => {
            let at = at.index(len);
            wire = parts.concat();
            wire.truncate(at);
            (whole_before(at), |end| *end == Ok(false))
        }
        Harm::Swap(a, b) if parts.len() > 1 => {
            let leaves: Vec<usize> =
                (0..parts.len()).filter(|&i| matches!(case.pieces[i], Verified::Data(_))).collect();
            let (a, b) = (a.get(&leaves), b.get(&leaves));
            parts.swap(*a, *b);
            wire = parts.concat();
            match a == b {
                true => (parts.len(), |end| *end == Ok(true)),
                false => (*a.min(b), |end| matches!(end, Err(DecodeError::WrongHash { .. }))),
            }
        }
        Harm::Extend(bytes) => {
            wire = [parts.concat(), bytes.clone()].concat();
            (parts.len(), |end| *end == Err(DecodeError::TrailingBytes))
        }
        _ => return,
    };
    wire.splice(0..0, case.size().to_le_bytes());
    let (pieces, end) = check(case, decoder(case), &wire, steps);
    assert!(says(&end), "{harm:?} ends in {end:?}");
    assert!(pieces == case.pieces[..intact], "{harm:?}: {} pieces instead of {intact}", pieces.len());
}

/// A size that is claimed.
#[derive(Debug, Clone, Copy)]
enum Claim {
    Is(u64),
    /// The true size with other bits.
    Xor(u64),
}

fn a_claim() -> impl Strategy<Value = Claim> {
    prop_oneof![
        2 => (0..64u32).prop_map(|bit| Claim::Xor(1 << bit)),
        2 => (1..40_000u64).prop_map(Claim::Xor),
        1 => any::<u64>().prop_map(Claim::Is),
        1 => (0..1_000_000u64).prop_map(Claim::Is),
        1 => (u64::MAX - 2000..=u64::MAX).prop_map(Claim::Is),
    ]
}

proptest! {
    #![proptest_config(common::cases(1000))]

    #[test]
    fn the_true_answer((size, chunks) in a_size_and_chunks(), steps in some_steps(), known: bool) {
        let case = Case::new(size, &chunks);
        let decoder = if known { decoder(&case).expecting(case.size()) } else { decoder(&case) };
        let (pieces, end) = check(&case, decoder, &wire(&case, case.size()), &steps);
        prop_assert!(pieces == case.pieces);
        prop_assert_eq!(end, Ok(true));
    }

    #[test]
    fn a_harmed_answer((size, chunks) in a_size_and_chunks(), harm in some_harm(), steps in some_steps()) {
        check_harm(&Case::new(size, &chunks), &harm, &steps);
    }

    /// Nothing proves the size before the last chunk: until then bytes come, and they are true ones.
    #[test]
    fn a_wrong_size((size, chunks) in a_size_and_chunks(), claim in a_claim(), steps in some_steps()) {
        let case = Case::new(size, &chunks);
        let claimed = match claim { Claim::Is(claimed) => claimed, Claim::Xor(bits) => case.size() ^ bits };
        prop_assume!(claimed != case.size());
        let (pieces, end) = check(&case, decoder(&case), &wire(&case, claimed), &steps);
        let proves = |piece: &Verified| matches!(piece, Verified::Data(data) if data.range().end() == claimed);
        prop_assert!(!pieces.iter().any(proves), "a proof of {claimed} bytes where there are {size}");
        let asks_for_the_last = chunks.iter().any(|&(start, end)| start < end && end == u64::MAX);
        prop_assert!(!asks_for_the_last || end != Ok(true));

        let (pieces, end) = check(&case, decoder(&case).expecting(case.size()), &wire(&case, claimed), &steps);
        prop_assert!(pieces.is_empty());
        prop_assert_eq!(end, Err(DecodeError::WrongSize { claimed, expected: case.size() }));
    }
}

/// Who claims 16 EiB gets no memory for it, and no panic.
#[test]
fn a_huge_size() {
    for claimed in [u64::MAX, u64::MAX - 1, u64::MAX - 1023, u64::MAX - 1024, 1 << 63, (1 << 63) + 1] {
        for chunks in [vec![(0, u64::MAX)], vec![(u64::MAX - 1, u64::MAX)], vec![(0, 1)], vec![(1 << 53, 1 << 54)]] {
            let case = Case::new(100_000, &chunks);
            let (_, end) = check(&case, decoder(&case), &wire(&case, claimed), &[usize::MAX]);
            assert_ne!(end, Ok(true), "{claimed}");
            let query = Query::chunks(chunks);
            let mut prover = Prover::new(case.hashed.id, claimed, &case.data[..], &case.hashed.outboard[..], &query);
            assert!(prover.any(|piece| piece.is_err()), "{claimed}");
        }
        assert!(tree::hash(&[1, 2, 3][..], claimed).is_err());
    }
}

/// The place of a pair is as good as the size that is claimed: who keeps pairs says which size it expects, and then
/// gets none under another.
#[test]
fn a_wrong_size_misplaces_no_pair() {
    let case = Case::new(4 * 16384, &vec![(u64::MAX - 1, u64::MAX)]);
    let mut decoder = decoder(&case).expecting(4 * 16384);
    decoder.push(&wire(&case, 8 * 16384));
    assert_eq!(decoder.next(), Err(DecodeError::WrongSize { claimed: 8 * 16384, expected: 4 * 16384 }));
}
