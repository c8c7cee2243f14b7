//! Damage is found to the chunk group, and only there: sound bytes are not blamed for a bad outboard, nor for their
//! neighbours.
//!
//! # When the report is exact
//!
//! The pair above two sides is known as long as each of the sides has a witness left, that is one of these three:
//! the stored pair's own half, the whole stored pair at the top of that side, or all bytes of that side. Where one
//! side has none, nothing proves the other either, and all bytes below the pair are reported. Everywhere else
//! exactly the damaged groups are. [`expected`] is that rule, and every test here holds the search to it.

mod common;

use std::{
    io,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use common::{
    GROUP, range,
    stored::{SIZES, Stored, a_blob, flips, sides},
};
use proptest::{prelude::*, sample::Index};
use tree::{Damage, RangeSet, find_damage};

/// Searches the damage, and holds what is found to the rule.
fn check(stored: &Stored) -> Damage {
    let (damage, judged) = search(stored);
    let (expected, exact) = expected(stored);
    assert_eq!(damage.data, expected.data, "damaged data");
    assert_eq!(damage.outboard, expected.outboard, "damaged outboard");
    assert_eq!(damage.is_none(), expected.is_none());
    assert!(stored.damaged_groups().difference(&damage.data).is_empty(), "overlooked damage");
    if exact {
        assert_eq!(damage.data, stored.damaged_groups());
        assert_eq!(judged, stored.size() as u64, "progress");
        let first = stored.unreadable_groups.iter().min().map(|group| format!("EIO in group {group}"));
        assert_eq!(damage.unreadable.as_ref().map(|error| error.to_string()), first);
    }
    damage
}

/// The damage, and how many bytes were told to be judged.
fn search(stored: &Stored) -> (Damage, u64) {
    let judged = AtomicU64::new(0);
    let progress = |bytes| {
        judged.fetch_add(bytes, Ordering::Relaxed);
    };
    let (id, size) = (stored.hashed.id, stored.size() as u64);
    let damage = find_damage(id, size, stored, &stored.stored_outboard(), &progress);
    (damage, judged.into_inner())
}

/// What the rule above expects to be reported, and whether it is exact.
fn expected(stored: &Stored) -> (Damage, bool) {
    let mut damage = Damage::default();
    let exact = judge(stored, 0..stored.groups(), 0, &mut damage);
    (damage, exact)
}

fn judge(stored: &Stored, groups: Range<usize>, index: usize, damage: &mut Damage) -> bool {
    if groups.len() == 1 {
        if !stored.group_is_sound(groups.start) {
            damage.data.insert(stored.bytes(&groups));
        }
        return true;
    }
    if !stored.pair_is_right(index) {
        damage.outboard.insert(stored.bytes(&groups));
    }
    let sides = sides(&groups, index);
    let witnessed = sides.iter().enumerate().all(|(half, (side, top))| {
        stored.half_is_right(index, half)
            || side.len() > 1 && stored.pair_is_right(*top)
            || side.clone().all(|group| stored.group_is_sound(group))
    });
    if !witnessed {
        damage.data.insert(stored.bytes(&groups));
        return false;
    }
    let [left, right] = sides.map(|(side, top)| judge(stored, side, top, damage));
    left && right
}

proptest! {
    #![proptest_config(common::cases(500))]

    #[test]
    fn flipped_bits_in_groups(blob in a_blob(), flips in flips(400)) {
        let mut stored = Stored::sound(blob);
        stored.flip(&flips);
        let damage = check(&stored);
        prop_assert_eq!(damage.data, stored.damaged_groups());
        prop_assert!(damage.outboard.is_empty());
    }

    #[test]
    fn bad_pairs(blob in a_blob(), flips in flips(400), bad: Vec<Index>, cut in prop::option::of(any::<Index>())) {
        let mut stored = Stored::sound(blob);
        stored.flip_pairs(&flips);
        stored.make_pairs_unreadable(&bad);
        if let Some(cut) = cut {
            stored.outboard.truncate(cut.index(stored.outboard.len() + 1));
        }
        let damage = check(&stored);
        prop_assert!(damage.data.is_empty());
        let is_sound = stored.outboard == stored.hashed.outboard && stored.unreadable_pairs.is_empty();
        prop_assert_eq!(damage.outboard.is_empty(), is_sound);
        prop_assert_eq!(damage.outboard, stored.below_wrong_pairs());
    }

    #[test]
    fn flipped_bits_in_groups_and_pairs(blob in a_blob(), groups in flips(50), pairs in flips(50)) {
        let mut stored = Stored::sound(blob);
        stored.flip(&groups);
        stored.flip_pairs(&pairs);
        check(&stored);
    }

    /// One wrong pair hides nothing, unless it is the one just above the damaged group, and wrong on that side.
    #[test]
    fn one_pair_and_one_group(blob in a_blob(), group in flips(2), pair in flips(2)) {
        let mut stored = Stored::sound(blob);
        stored.flip(&group[..1]);
        stored.flip_pairs(&pair[..1]);
        let damaged = stored.damaged_groups();
        let mut hidden = None;
        stored.each_pair(&mut |groups, index| {
            for (half, (side, _)) in sides(groups, index).into_iter().enumerate() {
                if side.len() == 1 && !stored.half_is_right(index, half) && damaged.overlaps(stored.bytes(&side)) {
                    hidden = Some(stored.bytes(groups));
                }
            }
        });
        prop_assert_eq!(check(&stored).data, hidden.map_or(damaged, RangeSet::from));
    }

    #[test]
    fn unreadable_groups(blob in a_blob(), bad: Vec<Index>, flips in flips(5), pairs in flips(5), more: bool) {
        let mut stored = Stored::sound(blob);
        stored.make_groups_unreadable(&bad);
        if more {
            stored.flip(&flips);
            stored.flip_pairs(&pairs);
        }
        check(&stored);
    }

    /// A file that was cut has lost the groups from the cut on, and no others.
    #[test]
    fn a_cut_file(blob in a_blob(), cut: Index) {
        let mut stored = Stored::sound(blob);
        stored.data.truncate(cut.index(stored.size() + 1));
        let lost = range(stored.data.len() / GROUP * GROUP, stored.size());
        let is_cut = stored.data.len() < stored.size();
        let (damage, _) = search(&stored);
        prop_assert_eq!(damage.data, if is_cut { lost.into() } else { RangeSet::new() });
        prop_assert!(damage.outboard.is_empty());
        prop_assert_eq!(damage.unreadable.map(|e| e.kind()), is_cut.then_some(io::ErrorKind::UnexpectedEof));
    }
}

#[test]
fn an_outboard_that_is_lost() {
    for blob in 0..SIZES.len() {
        for outboard in [Vec::new(), vec![0; Stored::sound(blob).outboard.len()], common::data(1, 64)] {
            let mut stored = Stored { outboard, ..Stored::sound(blob) };
            let damage = check(&stored);
            assert!(damage.data.is_empty());
            assert_eq!(
                damage.outboard,
                if stored.groups() > 1 { range(0, stored.size()).into() } else { RangeSet::new() }
            );
            // Then nothing can tell which of the groups is the damaged one.
            stored.data.iter_mut().take(1).for_each(|byte| *byte ^= 1);
            assert_eq!(
                check(&stored).data,
                if stored.size() > 0 { range(0, stored.size()).into() } else { RangeSet::new() }
            );
        }
    }
}

#[test]
fn bytes_that_nothing_proves_count_as_judged() {
    let mut stored = Stored::sound(SIZES.len() - 1);
    stored.outboard.fill(0);
    stored.data[0] ^= 1;
    assert_eq!(search(&stored).1, stored.size() as u64);
}

#[test]
fn an_error_where_nothing_proves_is_told() {
    let mut stored = Stored::sound(3);
    stored.outboard.fill(0);
    stored.unreadable_groups = vec![1];
    assert!(check(&stored).unreadable.is_some());
}
