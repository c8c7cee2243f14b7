//! Running commands with their progress and rate, for `blob status`.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;

/// The running commands. Cheap to clone; clones share the list.
#[derive(Clone, Default)]
pub(crate) struct UnderWay {
    commands: Arc<Mutex<BTreeMap<u64, Command>>>,
}

struct Command {
    text: String,
    began: Instant,
    files: u64,
    total: Option<u64>,
    course: Course,
}

/// Registration of a running command; removed on drop.
pub(crate) struct Entry {
    under_way: UnderWay,
    number: u64,
}

/// A running command, as `blob status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct CommandStatus {
    /// The command line, shortened.
    pub(crate) command: String,
    /// Seconds since it began.
    pub(crate) seconds: u64,
    /// Files completed.
    pub(crate) files: u64,
    /// Bytes completed.
    pub(crate) bytes: u64,
    /// Bytes of the whole command, if known.
    pub(crate) total_bytes: Option<u64>,
    /// Mean rate of the last ten seconds.
    pub(crate) bytes_per_s: u64,
    /// Seconds left at that rate, if the total is known and bytes move.
    pub(crate) seconds_left: Option<u64>,
}

impl UnderWay {
    fn commands(&self) -> MutexGuard<'_, BTreeMap<u64, Command>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a command.
    pub(crate) fn begin(&self, text: String) -> Entry {
        let mut commands = self.commands();
        let number = commands.last_key_value().map_or(0, |(last, _)| last + 1);
        let now = Instant::now();
        let course = Course::new(now);
        commands.insert(number, Command { text, began: now, files: 0, total: None, course });
        Entry { under_way: self.clone(), number }
    }

    /// Returns the running commands, oldest first.
    pub(crate) fn status(&self) -> Vec<CommandStatus> {
        let now = Instant::now();
        let shown = |Command { text, began, files, total, course }: &Command| CommandStatus {
            command: text.clone(),
            seconds: began.elapsed().as_secs(),
            files: *files,
            bytes: course.done(),
            total_bytes: *total,
            bytes_per_s: course.rate(now),
            seconds_left: total.and_then(|total| course.left(total, now)).map(|left| left.as_secs()),
        };
        self.commands().values().map(shown).collect()
    }
}

impl Entry {
    /// Records progress.
    pub(crate) fn note(&self, done: u64, total: Option<u64>, files: u64) {
        if let Some(command) = self.under_way.commands().get_mut(&self.number) {
            command.course.note(done, Instant::now());
            (command.files, command.total) = (files, total);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.under_way.commands().remove(&self.number);
    }
}

/// Progress in bytes with its recent rate. Pure: time is passed in.
#[derive(Debug)]
pub(super) struct Course {
    /// Times with the bytes completed by then, oldest first; at least a second apart, but for the latest.
    samples: VecDeque<(Instant, u64)>,
}

impl Default for Course {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Course {
    fn new(now: Instant) -> Self {
        Self { samples: VecDeque::from([(now, 0)]) }
    }

    /// Records that `done` bytes are completed.
    pub(super) fn note(&mut self, done: u64, now: Instant) {
        let newest = self.samples.len() - 1;
        let is_close = newest > 0 && now < self.samples[newest - 1].0 + SAMPLES_APART;
        if is_close {
            self.samples[newest].1 = done;
            return;
        }
        self.samples.push_back((now, done));
        while self.samples.len() > SAMPLES_MAX {
            self.samples.pop_front();
        }
    }

    fn done(&self) -> u64 {
        self.samples.back().map_or(0, |(_, done)| *done)
    }

    /// Returns the mean rate of the last ten seconds or so, in bytes a second.
    pub(super) fn rate(&self, now: Instant) -> u64 {
        let Some((since, from)) = self.samples.front() else { return 0 };
        let seconds = now.saturating_duration_since(*since).as_secs_f64();
        if seconds > 0.0 { (self.done().saturating_sub(*from) as f64 / seconds) as u64 } else { 0 }
    }

    /// Returns the time that the rest of `total` takes at that rate; `None` at rate 0.
    fn left(&self, total: u64, now: Instant) -> Option<Duration> {
        let rate = self.rate(now);
        (rate > 0).then(|| Duration::from_secs(total.saturating_sub(self.done()).div_ceil(rate)))
    }
}

const SAMPLES_MAX: usize = 11;
const SAMPLES_APART: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut course = Course::new(start);
        assert_eq!((course.rate(start), course.rate(at(1000)), course.left(10, at(1000))), (0, 0, None));
        // A minute at 1 MB/s, sampled ten times a second; then 20 s at half the rate.
        (1..=600).for_each(|tenth| course.note(tenth * 100_000, at(tenth * 100)));
        assert_eq!(course.done(), 60_000_000);
        let rate = course.rate(at(60_000));
        assert!((990_000..=1_010_000).contains(&rate), "{rate}");
        assert!((59..=61).contains(&course.left(120_000_000, at(60_000)).unwrap().as_secs()));
        (1..=200).for_each(|tenth| course.note(60_000_000 + tenth * 50_000, at(60_000 + tenth * 100)));
        let rate = course.rate(at(80_000));
        assert!((490_000..=510_000).contains(&rate), "{rate}");
        // Without progress, the rate falls.
        assert!(course.rate(at(180_000)) < 50_000);
        assert_eq!(course.left(1, at(180_000)).unwrap(), Duration::ZERO);
        assert!(course.samples.len() <= SAMPLES_MAX);
    }

    #[test]
    fn commands_come_and_go() {
        let under_way = UnderWay::default();
        let (one, two) = (under_way.begin("get a".into()), under_way.begin("get b".into()));
        two.note(5, Some(10), 3);
        let names = || under_way.status().into_iter().map(|command| command.command).collect::<Vec<_>>();
        assert_eq!(names(), ["get a", "get b"]);
        let CommandStatus { files, bytes, total_bytes, .. } = under_way.status().pop().unwrap();
        assert_eq!((files, bytes, total_bytes), (3, 5, Some(10)));
        drop(one);
        let _three = under_way.begin("get c".into());
        assert_eq!(names(), ["get b", "get c"]);
        drop(two);
        assert_eq!(names(), ["get c"]);
    }
}
