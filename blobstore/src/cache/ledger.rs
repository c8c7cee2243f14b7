//! What the cache has, in which order it was used, and what of it must stay. Pure: no files, no rows, no clock.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
};

use tree::{BlobId, ByteRange, RangeSet};

/// The cache's books. Decides what is to be evicted; others do it.
///
/// What is evicted, and what "used" is told of, are *extents*: aligned megabytes of blobs, or what is cached of them.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Rises with every use.
    clock: u64,
    extents: BTreeMap<(BlobId, u64), Extent>,
    by_age: BTreeMap<u64, (BlobId, u64)>,
    /// What each cached blob takes on the disk, and what all of them do.
    allocated: HashMap<BlobId, u64>,
    total: u64,
    /// Promised to fetches that have not written it yet.
    reserved: u64,
    leases: HashMap<BlobId, HashMap<u64, RangeSet>>,
    next_lease: u64,
    /// Blobs that pass through on their way elsewhere: they do not count, and stay.
    staged: HashMap<BlobId, u32>,
    /// Blobs that stay for good. They do not count either.
    pinned: HashSet<BlobId>,
    /// What those take on the disk.
    pinned_bytes: u64,
    /// When something of a blob was last evicted.
    evicted: HashMap<BlobId, u64>,
}

#[derive(Debug)]
struct Extent {
    used: u64,
    bytes: u64,
}

impl Ledger {
    /// Says that `ranges` of a blob, which were not there before, are there now, and just used.
    pub(crate) fn add(&mut self, blob: BlobId, ranges: &RangeSet) {
        for range in ranges.iter() {
            for extent in extents(range) {
                let known = self.extents.entry((blob, extent)).or_insert(Extent { used: 0, bytes: 0 });
                known.bytes += range_of(extent).intersection(range).len();
                self.renew((blob, extent));
            }
        }
    }

    /// Says that `ranges` of a blob, which were there, are no longer.
    pub(crate) fn remove(&mut self, blob: BlobId, ranges: &RangeSet) {
        for range in ranges.iter() {
            for key in self.known(blob, range) {
                let Some(extent) = self.extents.get_mut(&key) else { continue };
                extent.bytes = extent.bytes.saturating_sub(range_of(key.1).intersection(range).len());
                if extent.bytes == 0 {
                    self.by_age.remove(&extent.used);
                    self.extents.remove(&key);
                }
            }
        }
    }

    /// Says that `ranges` of a blob were used now, as far as they are there.
    pub(crate) fn touch(&mut self, blob: BlobId, ranges: &RangeSet) {
        for range in ranges.iter() {
            self.known(blob, range).into_iter().for_each(|key| self.renew(key));
        }
    }

    /// Says what a blob takes on the disk; 0 when it is gone.
    pub(crate) fn set_allocated(&mut self, blob: BlobId, bytes: u64) {
        let old = if bytes == 0 {
            self.evicted.remove(&blob);
            self.allocated.remove(&blob)
        } else {
            self.allocated.insert(blob, bytes)
        };
        self.total = self.total + bytes - old.unwrap_or(0);
        if self.pinned.contains(&blob) {
            self.pinned_bytes = self.pinned_bytes + bytes - old.unwrap_or(0);
        }
    }

    /// What the cache takes on the disk, or soon will, so far as it counts: without what is pinned or only passes through.
    pub(crate) fn used_bytes(&self) -> u64 {
        let passing = self.staged.keys().filter(|blob| !self.pinned.contains(blob));
        let passing: u64 = passing.filter_map(|blob| self.allocated.get(blob)).sum();
        self.total - passing - self.pinned_bytes + self.reserved
    }

    /// What pinned blobs take on the disk.
    pub(crate) fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    pub(crate) fn reserve(&mut self, bytes: u64) {
        self.reserved += bytes;
    }

    pub(crate) fn release_reserved(&mut self, bytes: u64) {
        self.reserved -= bytes;
    }

    /// Keeps `ranges` of a blob from being evicted until [`end_lease`](Self::end_lease).
    pub(crate) fn lease(&mut self, blob: BlobId, ranges: RangeSet) -> u64 {
        self.next_lease += 1;
        self.leases.entry(blob).or_default().insert(self.next_lease, ranges);
        self.next_lease
    }

    /// The same for one more range.
    pub(crate) fn extend_lease(&mut self, blob: BlobId, lease: u64, range: ByteRange) {
        self.leases.entry(blob).or_default().entry(lease).or_default().insert(range);
    }

    pub(crate) fn end_lease(&mut self, blob: BlobId, lease: u64) {
        if let Some(leases) = self.leases.get_mut(&blob) {
            leases.remove(&lease);
            if leases.is_empty() {
                self.leases.remove(&blob);
            }
        }
    }

    pub(crate) fn stage(&mut self, blob: BlobId) {
        *self.staged.entry(blob).or_default() += 1;
    }

    pub(crate) fn unstage(&mut self, blob: BlobId) {
        if let Some(times) = self.staged.get_mut(&blob) {
            *times -= 1;
            if *times == 0 {
                self.staged.remove(&blob);
            }
        }
    }

    /// Whether a blob counts towards the limit, and may be evicted.
    pub(crate) fn counts(&self, blob: BlobId) -> bool {
        !self.staged.contains_key(&blob) && !self.pinned.contains(&blob)
    }

    /// Whether anybody holds a lease on a blob.
    pub(crate) fn is_leased(&self, blob: BlobId) -> bool {
        self.leases.contains_key(&blob)
    }

    /// Whether anything of the first megabyte of a blob is in the cache.
    pub(crate) fn has_start(&self, blob: BlobId) -> bool {
        self.extents.contains_key(&(blob, 0))
    }

    pub(crate) fn set_pinned(&mut self, blob: BlobId, pinned: bool) {
        let bytes = self.allocated.get(&blob).copied().unwrap_or(0);
        if pinned && self.pinned.insert(blob) {
            self.pinned_bytes += bytes;
        } else if !pinned && self.pinned.remove(&blob) {
            self.pinned_bytes -= bytes;
        }
    }

    pub(crate) fn is_pinned(&self, blob: BlobId) -> bool {
        self.pinned.contains(&blob)
    }

    /// All blobs that are pinned, whether anything of them is here or not.
    pub(crate) fn pinned(&self) -> impl Iterator<Item = BlobId> + '_ {
        self.pinned.iter().copied()
    }

    /// What to evict so that some `bytes` become free: whole extents, least recently used first, and none that is
    /// pinned, passing through, or under a lease. Less, if there is no more.
    pub(crate) fn plan(&self, bytes: u64) -> Vec<(BlobId, ByteRange)> {
        let mut left = bytes;
        let mut plan = Vec::new();
        for &(blob, extent) in self.by_age.values() {
            if left == 0 {
                break;
            }
            let range = range_of(extent);
            let leased = self.leases.get(&blob).is_some_and(|leases| leases.values().any(|held| held.overlaps(range)));
            if leased || !self.counts(blob) {
                continue;
            }
            left = left.saturating_sub(self.extents[&(blob, extent)].bytes);
            plan.push((blob, range));
        }
        plan
    }

    /// Notes that something of a blob is being evicted.
    pub(crate) fn note_eviction(&mut self, blob: BlobId) {
        self.clock += 1;
        self.evicted.insert(blob, self.clock);
    }

    /// Differs from an earlier value if something of the blob was evicted meanwhile.
    pub(crate) fn evictions(&self, blob: BlobId) -> Option<u64> {
        self.evicted.get(&blob).copied()
    }

    /// When each cached blob was last used, by its most recently used extent.
    pub(crate) fn last_uses(&self) -> HashMap<BlobId, u64> {
        // In the order of age, the last one wins.
        self.by_age.iter().map(|(&used, &(blob, _))| (blob, used)).collect()
    }

    /// Goes on counting uses behind `clock`, which is from an earlier run.
    pub(crate) fn count_from(&mut self, clock: u64) {
        // A row that rotted must not bring the count to its end.
        self.clock = self.clock.max(clock.min(u64::MAX / 2));
    }

    fn renew(&mut self, key: (BlobId, u64)) {
        let Some(extent) = self.extents.get_mut(&key) else { return };
        self.clock += 1;
        self.by_age.remove(&extent.used);
        extent.used = self.clock;
        self.by_age.insert(self.clock, key);
    }

    /// The extents of a range that are there: a range may be said to be longer than any disk.
    fn known(&self, blob: BlobId, range: ByteRange) -> Vec<(BlobId, u64)> {
        let extents = extents(range);
        self.extents.range((blob, extents.start)..(blob, extents.end)).map(|(key, _)| *key).collect()
    }
}

/// The extents that a range touches.
fn extents(range: ByteRange) -> Range<u64> {
    range.start() / EXTENT_BYTES..range.end().div_ceil(EXTENT_BYTES)
}

fn range_of(extent: u64) -> ByteRange {
    ByteRange::new(extent * EXTENT_BYTES, (extent + 1).saturating_mul(EXTENT_BYTES)).unwrap_or_default()
}

const EXTENT_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Add(u8, ByteRange),
        Remove(u8, ByteRange),
        Touch(u8, ByteRange),
        Lease(u8, ByteRange),
        EndLease(usize),
        Pin(u8, bool),
        Stage(u8),
    }

    fn a_step() -> impl Strategy<Value = Step> {
        let range =
            || (0..12u64, 1..5u64).prop_map(|(start, len)| ByteRange::new(start << 18, (start + len) << 18).unwrap());
        let blob = || 0..4u8;
        prop_oneof![
            4 => (blob(), range()).prop_map(|(b, r)| Step::Add(b, r)),
            2 => (blob(), range()).prop_map(|(b, r)| Step::Remove(b, r)),
            3 => (blob(), range()).prop_map(|(b, r)| Step::Touch(b, r)),
            2 => (blob(), range()).prop_map(|(b, r)| Step::Lease(b, r)),
            1 => any::<usize>().prop_map(Step::EndLease),
            1 => (blob(), any::<bool>()).prop_map(|(b, pin)| Step::Pin(b, pin)),
            1 => blob().prop_map(Step::Stage),
        ]
    }

    fn blob(number: u8) -> BlobId {
        BlobId::from_bytes([number; 32])
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Against a list of extents in the order of their last use.
        #[test]
        fn evicts_what_was_used_longest_ago(steps in prop::collection::vec(a_step(), 0..60), need in 0..8u64 << 20) {
            let mut ledger = Ledger::default();
            let mut here: HashMap<BlobId, RangeSet> = HashMap::new();
            let mut order: Vec<(BlobId, u64)> = Vec::new();
            let mut leases: Vec<(BlobId, u64, ByteRange)> = Vec::new();
            let (mut pinned, mut staged) = (HashSet::new(), HashSet::new());
            let extents = |range: ByteRange| range.start() >> 20..range.end().div_ceil(1 << 20);
            let use_now = |order: &mut Vec<(BlobId, u64)>, b: BlobId, range: ByteRange, new: bool| {
                for extent in extents(range) {
                    let old = order.iter().position(|known| *known == (b, extent));
                    old.map(|at| order.remove(at));
                    if new || old.is_some() {
                        order.push((b, extent));
                    }
                }
            };
            for step in steps {
                match step {
                    Step::Add(b, range) => {
                        let new = RangeSet::from(range).difference(here.entry(blob(b)).or_default());
                        ledger.add(blob(b), &new);
                        here.get_mut(&blob(b)).unwrap().insert(range);
                        new.iter().for_each(|range| use_now(&mut order, blob(b), range, true));
                    }
                    Step::Remove(b, range) => {
                        let gone = RangeSet::from(range).intersection(here.entry(blob(b)).or_default());
                        ledger.remove(blob(b), &gone);
                        here.get_mut(&blob(b)).unwrap().remove(range);
                        order.retain(|(b, extent)| here.get(b).is_some_and(|here| here.overlaps(range_of(*extent))));
                    }
                    Step::Touch(b, range) => {
                        ledger.touch(blob(b), &range.into());
                        use_now(&mut order, blob(b), range, false);
                    }
                    Step::Lease(b, range) => {
                        leases.push((blob(b), ledger.lease(blob(b), range.into()), range));
                    }
                    Step::EndLease(at) if !leases.is_empty() => {
                        let (b, lease, _) = leases.remove(at % leases.len());
                        ledger.end_lease(b, lease);
                    }
                    Step::EndLease(_) => {}
                    Step::Pin(b, pin) => {
                        ledger.set_pinned(blob(b), pin);
                        if pin { pinned.insert(blob(b)) } else { pinned.remove(&blob(b)) };
                    }
                    Step::Stage(b) => {
                        if staged.insert(blob(b)) { ledger.stage(blob(b)) }
                    }
                }
            }
            let mut expected = Vec::new();
            let mut left = need;
            for (b, extent) in order {
                let range = range_of(extent);
                let held = leases.iter().any(|(of, _, held)| *of == b && !held.intersection(range).is_empty());
                if left > 0 && !held && !pinned.contains(&b) && !staged.contains(&b) {
                    left = left.saturating_sub(here[&b].intersection(&range.into()).total_bytes());
                    expected.push((b, range));
                }
            }
            prop_assert_eq!(ledger.plan(need), expected);
        }

        #[test]
        fn bytes_are_counted(
            sizes in prop::collection::vec((0..4u8, 0..1000u64, 0..4u8, any::<bool>()), 0..30),
            staged in 0..4u8,
        ) {
            let mut ledger = Ledger::default();
            let (mut model, mut pinned) = (HashMap::new(), HashSet::new());
            for (b, bytes, pin, is_pinned) in sizes {
                ledger.set_allocated(blob(b), bytes);
                model.insert(b, bytes);
                ledger.set_pinned(blob(pin), is_pinned);
                if is_pinned { pinned.insert(pin) } else { pinned.remove(&pin) };
            }
            let total = |counts: &dyn Fn(u8) -> bool| {
                model.iter().filter(|(b, _)| counts(**b)).map(|(_, bytes)| bytes).sum::<u64>()
            };
            prop_assert_eq!(ledger.used_bytes(), total(&|b| !pinned.contains(&b)));
            prop_assert_eq!(ledger.pinned_bytes(), total(&|b| pinned.contains(&b)));
            ledger.reserve(77);
            ledger.stage(blob(staged));
            prop_assert_eq!(ledger.used_bytes(), total(&|b| !pinned.contains(&b) && b != staged) + 77);
            ledger.release_reserved(77);
            ledger.unstage(blob(staged));
            prop_assert_eq!(ledger.used_bytes(), total(&|b| !pinned.contains(&b)));
        }
    }
}
