use proptest::prelude::*;

use super::*;
use crate::transfer::Way;

fn ranges(of: impl IntoIterator<Item = (u64, u64)>) -> RangeSet {
    of.into_iter().filter_map(|(start, len)| ByteRange::new(start, start + len)).collect()
}

proptest! {
    /// Windows cover what is wanted, once each byte, are cut between chunk groups, and are no longer than they may be.
    #[test]
    fn windows_are_all_that_is_wanted(
        size in 1..5_000_000u64, of in prop::collection::vec((0..5_000_000u64, 0..900_000u64), 0..6), bytes in 0..1_000_000u64,
    ) {
        let wanted = ranges(of).intersection(&ranges([(0, size)]));
        let (mut all, mut from) = (RangeSet::new(), 0);
        loop {
            let window = next_window(size, &wanted, from, bytes);
            let Some(first) = window.iter().next() else { break };
            prop_assert!(first.start() / GROUP_BYTES >= from.div_ceil(GROUP_BYTES) || from == 0, "no group is in two");
            let groups = Geometry::new(size).round_out_all(&window);
            prop_assert!(groups.total_bytes() <= bytes.max(GROUP_BYTES).next_multiple_of(GROUP_BYTES));
            from = window.end();
            all = all.union(&window);
        }
        prop_assert_eq!(all, wanted);
    }
}

#[test]
fn the_end_of_the_longest_blob_is_no_trouble() {
    let last = ranges([(u64::MAX - 10, 9)]);
    assert_eq!(next_window(u64::MAX - 1, &last, 0, WINDOW_BYTES_MAX), last);
}

#[test]
fn windows_follow_the_pace() {
    let (slow, steady, fast) = (Duration::from_secs(9), Duration::from_secs(2), Duration::from_millis(9));
    let after = |bytes, took: &[Option<Duration>]| took.iter().fold(bytes, |bytes, &took| window_bytes(bytes, took));
    assert_eq!(after(WINDOW_BYTES_MIN, &[Some(fast), None, Some(steady)]), 4 * WINDOW_BYTES_MIN);
    assert_eq!(after(WINDOW_BYTES_MIN, &[Some(fast); 20]), WINDOW_BYTES_MAX);
    assert_eq!(after(WINDOW_BYTES_MIN, &[Some(slow); 20]), WINDOW_BYTES_LEAST);
}

#[test]
fn whoever_asks_waits_longer_than_the_one_who_is_asked() {
    for hops in 1..=HOPS_MAX {
        let behind = Way::Through(hops - 1).stall_limit();
        assert!(Way::Through(hops).stall_limit() > limit(hops));
        assert!(hops == 1 || limit(hops) > behind, "{hops}: what those behind say must still come in time");
    }
}
