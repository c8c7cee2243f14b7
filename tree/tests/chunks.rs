//! Content-defined chunks, and blobs put together from the bytes of others.

mod common;

use common::{GROUP, data, range};
use proptest::prelude::*;
use tree::{
    Assembly, Chunk, ChunkListError, ChunkSizes, Chunker, Comparison, Geometry, Hashed, Patchwork, Prover, Query,
    RangeSet, ReadAt, Span, Verified, clip_spans, hash,
};

const KIB: usize = 1024;

/// The chunks of `bytes`, which come in pieces of `piece` bytes.
fn chunks(sizes: ChunkSizes, bytes: &[u8], piece: usize) -> Vec<Chunk> {
    let (mut chunker, mut found, mut end) = (Chunker::new(sizes), Vec::new(), 0);
    let mut take = |at, chunk: Chunk| {
        assert_eq!(at, end);
        end += chunk.len;
        found.push(chunk);
    };
    bytes.chunks(piece).zip(0u64..).for_each(|(bytes, n)| chunker.push(n * piece as u64, bytes, &mut take));
    chunker.finish(&mut take);
    found
}

/// The lengths of the chunks of `bytes`, by the words of the spec.
fn oracle(sizes: ChunkSizes, mut bytes: &[u8]) -> Vec<u64> {
    let mut xof = [0; 2048];
    blake3::Hasher::new().update(b"blobd chunks 1").finalize_xof().fill(&mut xof);
    let gear: Vec<_> = xof.as_chunks().0.iter().map(|&eight| u64::from_le_bytes(eight)).collect();
    let log = sizes.average().ilog2();
    let mut lens = Vec::new();
    while !bytes.is_empty() {
        let is_end = |len: u64| {
            if len <= sizes.min() {
                return false;
            }
            let mut window = 0u64;
            for &byte in &bytes[(sizes.min() as usize).max(len.saturating_sub(64) as usize)..len as usize] {
                window = (window << 1).wrapping_add(gear[byte as usize]);
            }
            let bits = if len <= sizes.average() { log + 2 } else { log - 2 };
            window.leading_zeros() >= bits
        };
        let longest = sizes.max().min(bytes.len() as u64);
        let len = (1..longest).find(|&len| is_end(len)).unwrap_or(longest);
        lens.push(len);
        bytes = &bytes[len as usize..];
    }
    lens
}

#[test]
fn chunks_end_where_the_spec_says() {
    let sizes = ChunkSizes::of(1 << 20);
    for (seed, len) in [(1, 3_000_000), (2, 0), (3, 1), (4, 16 * KIB), (5, 300 * KIB)] {
        let bytes = data(seed, len);
        let found = chunks(sizes, &bytes, 16 * KIB);
        assert_eq!(found.iter().map(|chunk| chunk.len).collect::<Vec<_>>(), oracle(sizes, &bytes));
        let mut at = 0;
        for chunk in found {
            let end = at + chunk.len as usize;
            assert_eq!(chunk.hash, blake3::hash(&bytes[at..end]).as_bytes()[..16]);
            at = end;
        }
    }
    // Bytes that never end a chunk.
    assert_eq!(oracle(sizes, &vec![0; 600 * KIB]), [262_144, 262_144, 90_112]);
    assert_eq!(
        chunks(sizes, &vec![0; 600 * KIB], 1000).iter().map(|c| c.len).collect::<Vec<_>>(),
        [262_144, 262_144, 90_112]
    );
}

/// spec/tree.md, "Content-defined chunks": they are the same at every machine.
#[test]
fn the_chunks_of_known_bytes() {
    let bytes: Vec<u8> = (0..400_000u32).flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 8).to_le_bytes()).collect();
    let found = chunks(ChunkSizes::of(bytes.len() as u64), &bytes, bytes.len());
    let hex = |chunk: &Chunk| chunk.hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let first: Vec<_> = found.iter().take(3).map(|chunk| (chunk.len, hex(chunk))).collect();
    let golden = [
        (97_717, "ddc268fc2c9256e118e467c63e9976fc"),
        (75_531, "22a8950955e14ea45ca01972748ce373"),
        (79_262, "34080521aab3c07ac2d2141e7139ccfd"),
    ];
    assert_eq!((found.len(), first), (21, golden.map(|(len, hex)| (len, hex.to_owned())).to_vec()));
}

#[test]
fn a_gap_ends_a_chunk() {
    let bytes = data(1, 200_000);
    let (mut chunker, mut found) = (Chunker::new(ChunkSizes::of(0)), Vec::new());
    let mut take = |at, chunk: Chunk| found.push((at, chunk.len));
    chunker.push(5, &bytes[..10_000], &mut take);
    chunker.push(10_005, &bytes[..4], &mut take);
    chunker.push(50_000, &bytes[..16_384], &mut take);
    chunker.finish(&mut take);
    chunker.finish(&mut take);
    assert_eq!(found, [(5, 10_004), (50_000, 16_384)]);
}

#[test]
fn sizes_of_chunks_keep_their_number_small() {
    for (size, average) in [(0, 1 << 16), (1 << 30, 1 << 16), (32 << 30, 1 << 16), (1 << 40, 1 << 21)] {
        let sizes = ChunkSizes::of(size);
        assert_eq!((sizes.min(), sizes.average(), sizes.max()), (average / 4, average, average * 4), "{size}");
        assert!(sizes.count_max(size) <= 1 << 21);
    }
    assert_eq!(ChunkSizes::of((32 << 30) + (1 << 16)).average(), 1 << 17);
    assert!(ChunkSizes::of(u64::MAX).count_max(u64::MAX) <= 1 << 22);
}

/// What of the blob `new` proves in `patchwork`, in the way that it is found out between machines.
fn provable(new: &Hashed, patchwork: &Patchwork<&[u8]>, size: u64) -> (RangeSet, usize) {
    let mut ours = hash(patchwork, size).unwrap();
    let within = patchwork.whole_groups();
    let mut comparison = Comparison::within(size, ours.id, new.id, within.clone()).highest_first();
    let pair = |outboard: &[u8], node: u64| outboard[node as usize * 64..][..64].try_into().unwrap();
    let mut asked = 0;
    loop {
        let nodes = comparison.wanted(100);
        if nodes.is_empty() {
            break;
        }
        let pairs: Vec<_> = nodes.iter().map(|&n| (pair(&ours.outboard, n), pair(&new.outboard, n))).collect();
        comparison.descend(&pairs).unwrap();
        for (&node, (_, theirs)) in nodes.iter().zip(&pairs) {
            ours.outboard[node as usize * 64..][..64].copy_from_slice(theirs);
        }
        asked += nodes.len();
    }
    let equal = within.difference(comparison.differing());
    let mut proven = RangeSet::new();
    for piece in Prover::new(new.id, size, patchwork, &ours.outboard[..], &Query::groups(&equal)) {
        if let Verified::Data(piece) = piece.expect("what is said to be equal proves") {
            proven.insert(piece.range());
        }
    }
    assert_eq!(proven, equal);
    (proven, asked)
}

#[derive(Debug, Clone)]
enum Edit {
    Insert(usize, usize),
    Delete(usize, usize),
    Overwrite(usize, usize),
    Append(usize),
    Swap(usize, usize, usize),
}

impl Edit {
    fn apply(&self, seed: u64, bytes: &mut Vec<u8>) {
        let len = bytes.len();
        match *self {
            Self::Insert(at, count) => drop(bytes.splice(at % len..at % len, data(seed, count))),
            Self::Delete(at, count) => drop(bytes.drain(at % len..(at % len + count).min(len - 1).max(at % len))),
            Self::Overwrite(at, count) => {
                let end = (at % len + count).min(len);
                bytes[at % len..end].copy_from_slice(&data(seed, end - at % len));
            }
            Self::Append(count) => bytes.extend(data(seed, count)),
            Self::Swap(a, b, count) => {
                let (a, b) = (a % (len / 2), len / 2 + b % (len / 2));
                let count = count.min(len - b).min(b - a);
                let (left, right) = bytes.split_at_mut(b);
                left[a..a + count].swap_with_slice(&mut right[..count]);
            }
        }
    }

    fn bytes(&self) -> usize {
        match *self {
            Self::Insert(_, count) | Self::Delete(_, count) | Self::Overwrite(_, count) | Self::Append(count) => count,
            Self::Swap(_, _, _) => 0,
        }
    }
}

fn an_edit() -> impl Strategy<Value = Edit> {
    let (at, count) = (0..4_000_000usize, 1..100_000usize);
    prop_oneof![
        (at.clone(), count.clone()).prop_map(|(at, count)| Edit::Insert(at, count)),
        (at.clone(), count.clone()).prop_map(|(at, count)| Edit::Delete(at, count)),
        (at.clone(), count.clone()).prop_map(|(at, count)| Edit::Overwrite(at, count)),
        count.clone().prop_map(Edit::Append),
        (at.clone(), at, count).prop_map(|(a, b, count)| Edit::Swap(a, b, count)),
    ]
}

/// Finds what `list` names in `old`, and puts it together.
fn assemble(size: u64, list: &[Chunk], old: &[u8]) -> Vec<Span> {
    let mut assembly = Assembly::new(size);
    list.chunks(7).for_each(|part| assembly.list(part).unwrap());
    assert!(assembly.is_complete());
    let mut from = 0;
    for chunk in chunks(ChunkSizes::of(size), old, 16 * KIB) {
        assembly.offer(0, from, chunk);
        from += chunk.len;
    }
    assembly.into_spans()
}

proptest! {
    #![proptest_config(common::cases(40))]

    #[test]
    fn bytes_that_moved_are_found(edits in prop::collection::vec(an_edit(), 0..5)) {
        let old = data(1, 4 << 20);
        let mut new = old.clone();
        edits.iter().zip(2..).for_each(|(edit, seed)| edit.apply(seed, &mut new));
        let size = new.len() as u64;
        let list = chunks(ChunkSizes::of(size), &new, 16 * KIB);
        let spans = assemble(size, &list, &old);
        let mut end = 0;
        for span in &spans {
            prop_assert!(span.at >= end && span.len > 0);
            end = span.at + span.len;
            let (at, from, len) = (span.at as usize, span.from as usize, span.len as usize);
            prop_assert!(new[at..at + len] == old[from..from + len], "{span:?}");
        }
        let hashed = hash(&new[..], size).unwrap();
        let patchwork = Patchwork::new(size, spans, vec![&old[..]]);
        let groups = patchwork.whole_groups();
        let (proven, asked) = provable(&hashed, &patchwork, size);
        prop_assert_eq!(&proven, &groups, "all that was found proves");
        let missing = RangeSet::from(Geometry::new(size).all()).difference(&proven).total_bytes() as usize;
        let changed: usize = edits.iter().map(Edit::bytes).sum();
        // A chunk at either side of each edit, and until cuts fall together again a few more. A swap has four borders.
        prop_assert!(missing <= changed + edits.len() * 12 * 256 * KIB, "{missing} bytes for {edits:?}");
        prop_assert!(asked <= edits.len() * 4 * 2 * 10);
    }

    /// Whatever a list says, what is then said to prove does, and is what the blob has.
    #[test]
    fn lists_that_lie_give_nothing_wrong(
        swaps in prop::collection::vec((0..60usize, 0..60usize), 0..30), flips in prop::collection::vec(0..60usize, 0..10),
    ) {
        let (old, size) = (data(1, 4 << 20), 4 << 20);
        let mut new = old.clone();
        new[1_000_000..1_000_100].fill(0);
        let mut list = chunks(ChunkSizes::of(size), &new, 16 * KIB);
        let last = list.len() - 1;
        swaps.iter().for_each(|&(a, b)| list.swap(a % last, b % last));
        flips.iter().for_each(|&at| list[at % last].hash[3] ^= 1);
        let spans = assemble(size, &list, &old);
        let patchwork = Patchwork::new(size, spans, vec![&old[..]]);
        let (proven, _) = provable(&hash(&new[..], size).unwrap(), &patchwork, size);
        let mut read = vec![0; size as usize];
        patchwork.read_exact_at(&mut read, 0).unwrap();
        for range in proven.iter() {
            let range = range.start() as usize..range.end() as usize;
            prop_assert!(read[range.clone()] == new[range]);
        }
    }

    #[test]
    fn spans_are_clipped(spans in prop::collection::vec((0..40u64, 1..40u64), 0..8), cut in prop::collection::vec((0..300usize, 0..90usize), 0..8)) {
        let mut at = 0;
        let spans: Vec<_> = spans.into_iter().map(|(gap, len)| {
            at += gap + len;
            Span { at: at - len, len, source: 0, from: 1000 - at }
        }).collect();
        let ranges: RangeSet = cut.into_iter().map(|(start, len)| range(start, start + len)).collect();
        let oracle: Vec<_> = spans.iter().flat_map(|span| (0..span.len).map(move |n| (span.at + n, span.from + n)))
            .filter(|&(at, _)| ranges.contains(range(at as usize, at as usize + 1))).collect();
        let clipped = clip_spans(&spans, &ranges);
        prop_assert!(clipped.iter().all(|span| span.len > 0));
        let found: Vec<_> = clipped.iter().flat_map(|span| (0..span.len).map(move |n| (span.at + n, span.from + n))).collect();
        prop_assert_eq!(found, oracle);
    }
}

#[test]
fn lists_out_of_bounds_are_refused() {
    let sizes = ChunkSizes::of(1 << 20);
    let chunk = |len| Chunk { len, hash: [7; 16] };
    let mut assembly = Assembly::new(1 << 20);
    assert_eq!(assembly.list(&[chunk(0)]), Err(ChunkListError::Length { at: 0, len: 0 }));
    assert!(assembly.list(&[chunk(sizes.max() + 1)]).is_err() && assembly.list(&[chunk(sizes.min() - 1)]).is_err());
    assert!(assembly.list(&[chunk(u64::MAX)]).is_err());
    assert!(!assembly.is_complete());
    // As many as there can be, and no more.
    let most = sizes.count_max(1 << 20) as usize;
    assert_eq!(assembly.list(&vec![chunk(sizes.min()); most]), Ok(()));
    assert!(assembly.is_complete());
    let end = ChunkListError::Total { bytes: (1 << 20) + 1 };
    assert_eq!(assembly.list(&[chunk(1)]), Err(end));
    // All equal: found at once, and asked for no more. What is as long as none of them is none of them.
    let mut other = Assembly::new(1 << 20);
    other.list(&vec![chunk(sizes.min()); most]).unwrap();
    other.offer(0, 5, chunk(sizes.max()));
    assert_eq!(other.into_spans(), []);
    assembly.offer(0, 5, chunk(sizes.min()));
    assembly.offer(0, 6, chunk(sizes.min()));
    let spans = assembly.into_spans();
    assert_eq!(spans.len(), most);
    assert!(spans.iter().all(|span| span.from == 5));
}

#[test]
fn a_patchwork_reads_zeros_where_there_is_nothing() {
    let (a, b) = (data(1, 1000), data(2, 50));
    let span = |at, len, source, from| Span { at, len, source, from };
    let spans =
        [span(10, 20, 0, 900), span(25, 50, 0, 0), span(40, 30, 1, 40), span(80, 1000, 0, 0), span(90, 1, 7, 0)];
    let patchwork = Patchwork::new(100, spans, vec![&a[..], &b[..]]);
    let mut expected = vec![0; 100];
    expected[10..30].copy_from_slice(&a[900..920]);
    expected[80..100].copy_from_slice(&a[..20]);
    let mut read = vec![1; 100];
    patchwork.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(read, expected, "what overlaps, is not there to be read or in no source is left out");
    let mut part = [1; 15];
    patchwork.read_exact_at(&mut part, 20).unwrap();
    assert_eq!(part, expected[20..35]);
    assert!(patchwork.read_exact_at(&mut part, 86).is_err());
    assert!(patchwork.whole_groups().is_empty());
    struct Bad;
    impl ReadAt for Bad {
        fn read_exact_at(&self, buf: &mut [u8], _: u64) -> std::io::Result<()> {
            buf.fill(7);
            Err(std::io::ErrorKind::InvalidData.into())
        }
    }
    Patchwork::new(100, [span(0, 100, 0, 0)], vec![Bad]).read_exact_at(&mut part, 0).unwrap();
    assert_eq!(part, [0; 15], "what a read that failed left behind is nothing");
    let size = 3 * GROUP as u64 + 5;
    let groups = |spans: &[Span]| Patchwork::new(size, spans.iter().copied(), vec![&a[..]]).whole_groups();
    assert_eq!(groups(&[span(1, 20_000, 0, 0), span(20_001, 29_152, 0, 9)]), range(GROUP, 3 * GROUP).into());
    assert_eq!(groups(&[span(3 * GROUP as u64, 99, 0, 0)]), range(3 * GROUP, size as usize).into());
}

/// With a level at a time, much is known wherever one stops; and what does not matter is not looked into.
#[test]
fn a_comparison_may_stop_early_and_leave_out() {
    let (old, size) = (data(1, 64 * GROUP), 64 * GROUP as u64);
    let mut new = old.clone();
    [3, 40, 41].iter().for_each(|group| new[group * GROUP] ^= 1);
    let (ours, theirs) = (hash(&old[..], size).unwrap(), hash(&new[..], size).unwrap());
    let pair = |hashed: &Hashed, node: u64| hashed.outboard[node as usize * 64..][..64].try_into().unwrap();
    let within = RangeSet::from(range(32 * GROUP, 48 * GROUP));
    let mut comparison = Comparison::within(size, ours.id, theirs.id, within).highest_first();
    let mut levels = Vec::new();
    loop {
        let nodes = comparison.wanted(100);
        let pairs: Vec<_> = nodes.iter().map(|&node| (pair(&ours, node), pair(&theirs, node))).collect();
        if nodes.is_empty() {
            break;
        }
        levels.push((nodes.len(), comparison.undecided().total_bytes() / GROUP as u64));
        comparison.descend(&pairs).unwrap();
    }
    // The left half is left out at once; of the right one there is one node on each level.
    assert_eq!(levels, [(1, 64), (1, 32), (1, 16), (1, 8), (1, 4), (1, 2)]);
    let differing: RangeSet = [range(0, 32 * GROUP), range(40 * GROUP, 42 * GROUP)].into_iter().collect();
    assert_eq!(comparison.differing(), &differing);

    // Three nodes tell of all quarters, and not of the depth of one.
    let mut new = old.clone();
    [0, 63].iter().for_each(|group| new[group * GROUP] ^= 1);
    let theirs = hash(&new[..], size).unwrap();
    let mut comparison = Comparison::new(size, ours.id, theirs.id).highest_first();
    for _ in 0..3 {
        let node = comparison.wanted(1)[0];
        comparison.descend(&[(pair(&ours, node), pair(&theirs, node))]).unwrap();
    }
    assert_eq!(comparison.undecided(), [range(0, 16 * GROUP), range(48 * GROUP, 64 * GROUP)].into_iter().collect());
}
