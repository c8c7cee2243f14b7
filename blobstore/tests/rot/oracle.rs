//! What is truly damaged: found by comparing with what was there, without a hash.

use tree::{Geometry, Grain, RangeSet};

use crate::common::range;

/// The units of `unit` bytes, the last one perhaps shorter, in which `now` is not what `right` is.
pub(crate) fn differing(right: &[u8], now: &[u8], unit: u64) -> RangeSet {
    let starts = (0..right.len()).step_by(unit as usize);
    let units = starts.map(|start| start..right.len().min(start + unit as usize));
    let wrong = units.filter(|unit| now.get(unit.clone()) != Some(&right[unit.clone()]));
    wrong.map(|unit| range(unit.start as u64, unit.end as u64)).collect()
}

/// The bytes of a blob of `size` bytes below those pairs of its outboard in which `now` is not what `right` is.
pub(crate) fn below_wrong_pairs(size: usize, grain: Grain, right: &[u8], now: &[u8]) -> RangeSet {
    let (mut wrong, mut index) = (RangeSet::new(), 0);
    let unit = grain.bytes();
    let mut pending = vec![(0, (size as u64).div_ceil(unit))];
    // In pre-order, as the pairs stand.
    while let Some((start, end)) = pending.pop() {
        let units: u64 = end - start;
        if units < 2 {
            continue;
        }
        let pair = index..index + PAIR_BYTES;
        index = pair.end;
        if now.get(pair.clone()) != Some(&right[pair]) {
            wrong.insert(range(start * unit, (end * unit).min(size as u64)));
        }
        let mid = start + units.next_power_of_two() / 2;
        pending.extend([(mid, end), (start, mid)]);
    }
    wrong
}

/// The grain that an outboard of `len` bytes has, if there is one.
pub(crate) fn grain_of(size: usize, len: usize) -> Option<Grain> {
    let geometry = Geometry::new(size as u64);
    Grain::ALL.into_iter().find(|&grain| geometry.outboard_bytes_at(grain) == len as u64)
}

pub(crate) const PAIR_BYTES: usize = 64;
