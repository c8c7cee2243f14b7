//! What to verify next. The deciding part is pure; times are milliseconds since 1970 and passed in.

use std::{collections::BinaryHeap, time::Duration};

use redb::ReadableTable;
use serde::{Deserialize, Serialize};
use tree::{BlobId, ByteRange};

use crate::{
    FileRef, Store, StoreError,
    rows::{CACHED, FILES, FileRow, VERIFIED, decode_or_none, encode},
};

/// What is verified as one: a file in place, or a cached blob.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Item {
    /// A file in place.
    File(FileRef),
    /// What the cache has of a blob.
    Cached(BlobId),
}

/// How far an item has been verified.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// When it had last been verified whole, in milliseconds since 1970; 0 for never.
    pub at: u64,
    /// Where verifying it goes on; 0 at the beginning.
    pub next: u64,
}

impl Verified {
    /// The same as it counts at `now`, in milliseconds since 1970: who was verified in the future, by a clock that was wrong, was
    /// never verified.
    pub fn as_of(self, now: u64) -> Self {
        Self { at: if self.at > now { 0 } else { self.at }, ..self }
    }
}

/// An item to be verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Which.
    pub item: Item,
    /// How many bytes it has.
    pub bytes: u64,
    /// How far it has been verified.
    pub verified: Verified,
}

impl Task {
    /// The bytes that are to be verified next: at most `max`, or all of what cannot be split.
    pub fn part(&self, max: u64) -> ByteRange {
        let start = if self.verified.next < self.bytes { self.verified.next } else { 0 };
        let units = max.max(1).checked_next_multiple_of(PART_UNIT).unwrap_or(u64::MAX);
        let end = match self.item {
            Item::File(_) => self.bytes.min(start.saturating_add(units)),
            Item::Cached(_) => self.bytes,
        };
        ByteRange::new(start, end).unwrap_or_default()
    }

    /// How many bytes are still to be verified until all were: none behind the end, whatever a row that rotted says.
    pub fn left(&self) -> u64 {
        self.bytes.saturating_sub(self.verified.next)
    }

    /// Whether it has been verified whole, at `when` or later.
    pub fn is_done_since(&self, when: u64) -> bool {
        self.verified.next == 0 && self.verified.at >= when
    }

    /// How far it has been verified once `part` has been, at `now`.
    pub fn after(&self, part: ByteRange, now: u64) -> Verified {
        match part.end() {
            end if end < self.bytes => Verified { next: end, ..self.verified },
            _ => Verified { at: now, next: 0 },
        }
    }
}

/// The order in which tasks are to be done: first what was begun, then what was verified longest ago.
pub fn compare(a: &Task, b: &Task) -> std::cmp::Ordering {
    let key = |task: &Task| (task.verified.next == 0, task.verified.at);
    key(a).cmp(&key(b)).then_with(|| a.item.cmp(&b.item))
}

/// The first of many tasks: chosen in one pass over them, which come in any order, with few of them in memory.
pub struct Agenda<T> {
    max: usize,
    /// The last of the first on top.
    first: BinaryHeap<Entry<T>>,
    is_complete: bool,
}

struct Entry<T>(T);

impl<T: AsRef<Task>> Agenda<T> {
    /// One that keeps the first `max` of what is offered.
    pub fn new(max: usize) -> Self {
        Self { max, first: BinaryHeap::new(), is_complete: true }
    }

    /// Keeps `task` if it is among the first.
    pub fn offer(&mut self, task: T) {
        self.first.push(Entry(task));
        if self.first.len() > self.max {
            self.first.pop();
            self.is_complete = false;
        }
    }

    /// Whether all that was offered was kept.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// What was kept, in the order in which it is to be done.
    pub fn into_first(self) -> Vec<T> {
        self.first.into_sorted_vec().into_iter().map(|Entry(task)| task).collect()
    }
}

impl<T: AsRef<Task>> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        compare(self.0.as_ref(), other.0.as_ref())
    }
}

impl<T: AsRef<Task>> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T: AsRef<Task>> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T: AsRef<Task>> Eq for Entry<T> {}

impl AsRef<Task> for Task {
    fn as_ref(&self) -> &Task {
        self
    }
}

/// What all tasks together come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Bytes that are due.
    pub due_bytes: u64,
    /// Time of the latest verification of any task, in milliseconds since 1970; 0 for never.
    pub last: u64,
    oldest: Option<u64>,
    next: Option<u64>,
}

impl Tally {
    /// Counts a task in, at `now`, where everything is to be verified every `period`.
    pub fn add(&mut self, task: &Task, period: Duration, now: u64) {
        if due(task, period) <= now {
            self.due_bytes = self.due_bytes.saturating_add(task.left());
        }
        let (at, due) = (task.verified.at, due(task, period));
        self.last = self.last.max(at);
        self.next = Some(self.next.map_or(due, |next| next.min(due)));
        self.oldest = Some(self.oldest.map_or(at, |oldest| oldest.min(at)));
    }

    /// Since when everything has been verified, in milliseconds since 1970; `None` if something never was, or there is
    /// nothing.
    pub fn all_since(&self) -> Option<u64> {
        self.oldest.filter(|&at| at > 0)
    }

    /// Returns when the first task is due, in milliseconds since 1970, possibly in the past; `None` without tasks.
    pub fn next(&self) -> Option<u64> {
        self.next
    }
}

/// How many of the first of some tasks together have at least `bytes`, or all of them.
pub fn sample<T: AsRef<Task>>(tasks: &[T], bytes: u64) -> usize {
    let mut left = bytes;
    let needed = tasks.iter().take_while(|task| {
        let wanted = left > 0;
        left = left.saturating_sub(task.as_ref().bytes);
        wanted
    });
    needed.count()
}

/// When a task is due, if everything is to be verified every `period`.
pub fn due(task: &Task, period: Duration) -> u64 {
    if task.verified.next > 0 { 0 } else { task.verified.at.saturating_add(period.as_millis() as u64) }
}

/// How long to pause after `bytes` were read in `elapsed`, so that no more than `rate` bytes are read a second.
pub fn pause(bytes: u64, elapsed: Duration, rate: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64).saturating_sub(elapsed)
}

impl Store {
    /// How far an item has been verified.
    pub fn verified(&self, item: &Item) -> Result<Verified, StoreError> {
        match item {
            Item::File(file) => Ok(self.file(file)?.map(|row| row.verified).unwrap_or_default()),
            Item::Cached(blob) => self.read_rows("look up when a blob was verified", |txn| {
                let row = txn.open_table(VERIFIED)?.get(blob.as_bytes())?;
                Ok(row.and_then(|row| decode_or_none(row.value())).unwrap_or_default())
            }),
        }
    }

    /// Notes how far items have been verified. Those that are no longer here are passed over. Durable on return.
    pub fn note_verified(&self, items: &[(Item, Verified)]) -> Result<(), StoreError> {
        self.write("note what was verified", |txn| {
            let (mut files, cached) = (txn.open_table(FILES)?, txn.open_table(CACHED)?);
            let mut table = txn.open_table(VERIFIED)?;
            for (item, verified) in items {
                match item {
                    Item::File(file) => {
                        let key = (file.root.0, &file.path[..]);
                        let row = files.get(key)?.and_then(|row| decode_or_none::<FileRow>(row.value()));
                        if let Some(row) = row {
                            files.insert(key, &encode(&FileRow { verified: *verified, ..row })?[..])?;
                        }
                    }
                    Item::Cached(blob) => {
                        if cached.get(blob.as_bytes())?.is_some() {
                            table.insert(blob.as_bytes(), &encode(verified)?[..])?;
                        }
                    }
                }
            }
            Ok(())
        })
    }
}

/// Parts of a file begin and end at multiples of this, as the search for damage judges it.
const PART_UNIT: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::RootId;

    fn a_task() -> impl Strategy<Value = Task> {
        (0..30u8, 0..9u64 << 20, 0..1000u64, prop_oneof![Just(0), 1..9u64]).prop_map(|(n, bytes, at, next)| Task {
            item: if n % 3 == 0 {
                Item::Cached(BlobId::from_bytes([n; 32]))
            } else {
                Item::File(FileRef { root: RootId(0), path: vec![n] })
            },
            bytes,
            verified: Verified { at, next: next << 20 },
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Doing part after part, in order, verifies every byte of everything once before anything twice.
        #[test]
        fn everything_has_its_turn(
            mut tasks in prop::collection::vec(a_task(), 1..12),
            max in prop_oneof![1..5u64 << 20, Just(u64::MAX)],
        ) {
            tasks.dedup_by(|a, b| a.item == b.item);
            tasks.iter_mut().for_each(|task| task.verified.next = 0);
            let total: u64 = tasks.iter().map(|task| task.bytes).sum();
            let (mut done, mut steps) = (0, 0);
            for now in 2000.. {
                tasks.sort_by(compare);
                if tasks.iter().all(|task| task.verified.at >= 2000 && task.verified.next == 0) {
                    break;
                }
                let task = &mut tasks[0];
                prop_assert!(task.verified.at < 2000, "verified twice before all were once");
                let part = task.part(max);
                prop_assert_eq!(part.start(), task.verified.next);
                done += part.len();
                task.verified = task.after(part, now);
                steps += 1;
                prop_assert!(steps < 1000);
            }
            prop_assert_eq!(done, total);
        }

        #[test]
        fn a_sample_is_just_enough(tasks in prop::collection::vec(a_task(), 0..12), bytes in 0..50u64 << 20) {
            let taken = sample(&tasks, bytes);
            let sum = |tasks: &[Task]| tasks.iter().map(|task| task.bytes).sum::<u64>();
            prop_assert!(taken == tasks.len() || sum(&tasks[..taken]) >= bytes);
            prop_assert!(taken == 0 || sum(&tasks[..taken - 1]) < bytes);
        }

        /// Against all of them, sorted.
        #[test]
        fn an_agenda_has_the_first(tasks in prop::collection::vec(a_task(), 0..30), max in 0..30usize) {
            let mut agenda = Agenda::new(max);
            tasks.iter().for_each(|task| agenda.offer(task.clone()));
            let mut sorted = tasks.clone();
            sorted.sort_by(compare);
            prop_assert_eq!(agenda.is_complete(), tasks.len() <= max);
            // Two may be the same item here, which are equals in the order.
            let keys = |tasks: &[Task]| {
                let key = |task: &Task| (task.verified.next == 0, task.verified.at, task.item.clone());
                tasks.iter().map(key).collect::<Vec<_>>()
            };
            prop_assert_eq!(keys(&agenda.into_first()), keys(&sorted[..max.min(tasks.len())]));
        }

        /// Against the lists.
        #[test]
        fn a_tally_counts_what_is_due(
            tasks in prop::collection::vec(a_task(), 0..12),
            period in 0..1000u64,
            now in 0..2000u64,
        ) {
            let period = Duration::from_millis(period);
            let mut tally = Tally::default();
            tasks.iter().for_each(|task| tally.add(task, period, now));
            let due = tasks.iter().filter(|task| due(task, period) <= now);
            let left = due.map(|task| task.bytes.saturating_sub(task.verified.next));
            prop_assert_eq!(tally.due_bytes, left.sum::<u64>());
            let oldest = tasks.iter().map(|task| task.verified.at).min();
            prop_assert_eq!(tally.all_since(), oldest.filter(|&at| at > 0));
            prop_assert_eq!(tally.last, tasks.iter().map(|task| task.verified.at).max().unwrap_or(0));
            prop_assert_eq!(tally.next(), tasks.iter().map(|task| super::due(task, period)).min());
        }

        #[test]
        fn the_rate_is_kept(bytes in 0..1u64 << 40, millis in 0..100_000u64, rate in 1..1u64 << 32) {
            let elapsed = Duration::from_millis(millis);
            let seconds = (elapsed + pause(bytes, elapsed, rate)).as_secs_f64();
            prop_assert!(bytes as f64 <= seconds * rate as f64 * 1.001 + 1.0);
            prop_assert!(pause(0, elapsed, rate).is_zero());
        }
    }

    #[test]
    fn due_after_the_period_and_at_once_if_begun() {
        let task = |at, next| Task { item: Item::Cached(BlobId::EMPTY), bytes: 5, verified: Verified { at, next } };
        let day = Duration::from_secs(86_400);
        assert_eq!(
            [due(&task(1000, 0), day), due(&task(1000, 3), day), due(&task(0, 0), day)],
            [86_401_000, 0, 86_400_000]
        );
    }

    /// A row that rotted may say that verifying goes on behind the end of the file.
    #[test]
    fn what_is_begun_behind_the_end_has_nothing_left() {
        let task = |bytes, next| Task { item: Item::Cached(BlobId::EMPTY), bytes, verified: Verified { at: 7, next } };
        let left = |bytes, next| task(bytes, next).left();
        assert_eq!([left(5, 0), left(5, 3), left(5, 5), left(5, 6), left(0, u64::MAX)], [5, 2, 0, 0, 0]);
        let mut tally = Tally::default();
        tally.add(&task(5, u64::MAX), Duration::ZERO, 9);
        assert_eq!((tally.due_bytes, tally.all_since()), (0, Some(7)));
        assert_eq!(task(5, u64::MAX).part(1), ByteRange::new(0, 5).unwrap());
        assert!(task(5, 0).is_done_since(7) && !task(5, 0).is_done_since(8) && !task(5, 1).is_done_since(7));
    }
}
