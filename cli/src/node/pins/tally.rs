//! What is to be kept here, what of it is missing, and why: counted file by file. Pure.

use std::collections::{BTreeMap, HashSet};

use namespace::Place;
use tree::{BlobId, GROUP_BYTES, Geometry};

use crate::target::Target;

/// A blob that is to be brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::node) struct Job {
    pub(in crate::node) blob: BlobId,
    pub(in crate::node) size: u64,
    /// A file that has it.
    pub(in crate::node) file: Target,
}

/// How much of a file is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::node) enum Here {
    /// All of it, as a file of the user's: the cache needs none.
    InPlace,
    /// So many bytes.
    Bytes(u64),
}

/// Why something is not here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::node) enum Why {
    /// It is about to come.
    Coming,
    /// The disk has no room for it.
    NoRoom,
    /// Those that have it are not connected; of some it is not known who they are.
    Away(Vec<String>),
    /// Nobody else ever had it.
    Nobody,
    /// It was tried a moment ago.
    Failed(String),
}

/// What stands below one place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::node) struct PlaceTally {
    pub(in crate::node) files: u64,
    pub(in crate::node) bytes: u64,
    pub(in crate::node) bytes_here: u64,
    pub(in crate::node) missing_files: u64,
    pub(in crate::node) missing_bytes: u64,
    /// Files and bytes that are missing, by the reason.
    pub(in crate::node) missing: BTreeMap<Why, (u64, u64)>,
}

/// What stands below several places.
#[derive(Debug)]
pub(in crate::node) struct Tally {
    pub(in crate::node) places: Vec<PlaceTally>,
    /// What is to be brought, each blob once: the first of it.
    pub(in crate::node) jobs: Vec<Job>,
    /// What all of it will take on the disk beyond what it takes now, whether there is room for it or not.
    pub(in crate::node) cost: u64,
    jobs_max: usize,
    /// What may be taken on the disk by what was not noted yet.
    room: u64,
    /// What the cache should have, by the beginnings of the ids: a few bytes for each file.
    wanted: HashSet<u64>,
    /// What is coming.
    queued: HashSet<u64>,
}

impl Tally {
    /// For so many places; at most `jobs_max` jobs are kept, and they take at most `room` bytes on the disk.
    pub(in crate::node) fn new(places: usize, jobs_max: usize, room: u64) -> Self {
        Self {
            places: vec![PlaceTally::default(); places],
            jobs: Vec::new(),
            cost: 0,
            jobs_max,
            room,
            wanted: HashSet::new(),
            queued: HashSet::new(),
        }
    }

    /// Notes a file that is shown below the place of that number. `source` is asked what keeps the bytes that are missing from
    /// being fetched, `None` for nothing. Returns how many are missing, and why.
    pub(in crate::node) fn note(
        &mut self,
        place: usize,
        file: Job,
        here: Here,
        source: impl FnOnce() -> Option<Why>,
    ) -> Option<(u64, Why)> {
        let Job { blob, size, .. } = file;
        let (files, bytes_here) = match here {
            Here::InPlace => (0, size),
            Here::Bytes(bytes) => (1, bytes.min(size)),
        };
        let missing = size - bytes_here;
        let why = (files > 0).then(|| {
            self.wanted.insert(mark(blob));
            (missing > 0).then(|| self.judge(file, missing, source))
        });
        let tally = &mut self.places[place];
        tally.files += 1;
        tally.bytes += size;
        tally.bytes_here += bytes_here;
        let why = why.flatten()?;
        tally.missing_files += 1;
        tally.missing_bytes += missing;
        let is_one_too_many = tally.missing.len() >= REASONS_MAX && !tally.missing.contains_key(&why);
        let reason = if is_one_too_many { Why::Away(Vec::new()) } else { why.clone() };
        let (files, bytes) = tally.missing.entry(reason).or_default();
        (*files, *bytes) = (*files + 1, *bytes + missing);
        Some((missing, why))
    }

    fn judge(&mut self, file: Job, missing: u64, source: impl FnOnce() -> Option<Why>) -> Why {
        if self.queued.contains(&mark(file.blob)) {
            return Why::Coming;
        }
        let cost = cost(file.size, missing);
        if let Some(why) = source() {
            return why;
        }
        self.cost += cost;
        if cost > self.room {
            return Why::NoRoom;
        }
        self.room -= cost;
        self.queued.insert(mark(file.blob));
        if self.jobs.len() < self.jobs_max {
            self.jobs.push(file);
        }
        Why::Coming
    }

    /// Whether the cache should have a blob; also of one whose id begins as that of one that it should.
    pub(in crate::node) fn wants(&self, blob: BlobId) -> bool {
        self.wanted.contains(&mark(blob))
    }
}

impl PlaceTally {
    /// How many files are missing that nothing keeps from being fetched.
    pub(in crate::node) fn coming(&self) -> u64 {
        self.missing.get(&Why::Coming).map_or(0, |(files, _)| *files)
    }
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Coming => f.write_str("on its way"),
            Self::NoRoom => f.write_str("no room on the disk, beside cache.keep_free"),
            Self::Away(names) => match &names[..] {
                [] => f.write_str("no machine that has it is connected"),
                [one] => write!(f, "{one} is not connected"),
                [some @ .., last] => write!(f, "{} and {last} are not connected", some.join(", ")),
            },
            Self::Nobody => f.write_str("no other machine ever had it, as far as is known here"),
            Self::Failed(reason) => f.write_str(reason),
        }
    }
}

/// What `missing` bytes of a blob of `size` bytes take in the cache.
pub(in crate::node) fn cost(size: u64, missing: u64) -> u64 {
    if size <= GROUP_BYTES {
        return missing;
    }
    missing.next_multiple_of(BLOCK_BYTES) + Geometry::new(size).outboard_bytes().next_multiple_of(BLOCK_BYTES)
}

/// The place that a target is.
pub(in crate::node) fn place_of(target: &Target) -> Place {
    Place { arena: target.arena.clone(), path: target.path.clone() }
}

/// What stands for a blob.
pub(super) fn mark(blob: BlobId) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *blob.as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// So many reasons are told apart below one place.
const REASONS_MAX: usize = 16;
/// What file systems take at least.
const BLOCK_BYTES: u64 = 4096;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Below which place, which blob (its number says its size), how much of it is here, and what keeps it from coming.
    type Row = (usize, u8, Option<u64>, u8);

    fn job(number: u8) -> Job {
        let file = Target { arena: "a".parse().unwrap(), path: None };
        Job { blob: BlobId::from_bytes([number; 32]), size: u64::from(number) * 10_000, file }
    }

    fn why(number: u8) -> Option<Why> {
        [None, None, Some(Why::Away(vec!["nas".to_owned()])), Some(Why::Nobody)][usize::from(number % 4)].clone()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Against sets: what is wanted, what comes, and the sums.
        #[test]
        fn as_sets_say(
            rows in prop::collection::vec((0..3_usize, 1..6_u8, prop::option::of(0..60_000_u64), 0..4_u8), 0..40),
            room in 0..300_000_u64,
            jobs_max in 0..6_usize,
        ) {
            let rows: Vec<Row> = rows;
            let mut tally = Tally::new(3, jobs_max, room);
            let (mut wanted, mut coming, mut left) = (BTreeSet::new(), Vec::new(), room);
            let mut sums = [(0, 0, 0, 0, 0); 3];
            for &(place, number, here, keeps) in &rows {
                let job = job(number);
                let (size, is_here) = (job.size, here.map_or(job.size, |here| here.min(job.size)));
                let state = here.map_or(Here::InPlace, Here::Bytes);
                let told = tally.note(place, job, state, || why(keeps));
                let missing = size - is_here;
                if here.is_some() {
                    wanted.insert(number);
                }
                let expected = if missing == 0 {
                    None
                } else if coming.contains(&number) {
                    Some(Why::Coming)
                } else if let Some(why) = why(keeps) {
                    Some(why)
                } else if cost(size, missing) > left {
                    Some(Why::NoRoom)
                } else {
                    left -= cost(size, missing);
                    coming.push(number);
                    Some(Why::Coming)
                };
                prop_assert_eq!(told, expected.clone().map(|why| (missing, why)));
                let sum = &mut sums[place];
                *sum = (sum.0 + 1, sum.1 + size, sum.2 + is_here, sum.3 + u64::from(missing > 0), sum.4 + missing);
            }
            for number in 1..6 {
                prop_assert_eq!(tally.wants(job(number).blob), wanted.contains(&number));
            }
            coming.truncate(jobs_max);
            prop_assert_eq!(&tally.jobs, &coming.into_iter().map(job).collect::<Vec<_>>());
            for (place, sum) in tally.places.iter().zip(sums) {
                let PlaceTally { files, bytes, bytes_here, missing_files, missing_bytes, missing } = place;
                prop_assert_eq!((*files, *bytes, *bytes_here, *missing_files, *missing_bytes), sum);
                let (files, bytes) = missing.values().fold((0, 0), |(f, b), (files, bytes)| (f + files, b + bytes));
                prop_assert_eq!((files, bytes), (*missing_files, *missing_bytes));
            }
        }
    }

    #[test]
    fn reasons_are_bounded_and_read_well() {
        let mut tally = Tally::new(1, 10, u64::MAX);
        for number in 0..40 {
            tally.note(0, job(5), Here::Bytes(0), || Some(Why::Failed(number.to_string())));
        }
        assert_eq!(tally.places[0].missing.len(), REASONS_MAX + 1);
        assert_eq!(tally.places[0].missing[&Why::Away(Vec::new())].0, 40 - REASONS_MAX as u64);
        let names = |names: &[&str]| Why::Away(names.iter().map(|name| name.to_string()).collect()).to_string();
        assert_eq!(names(&["a"]), "a is not connected");
        assert_eq!(names(&["a", "b", "c"]), "a, b and c are not connected");
    }
}
