//! What is under way, how far it is, and how fast: for `blob status`.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;

/// The commands that are under way. Cheap to clone; the clones are one.
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

/// A command that is under way as long as this lives.
pub(crate) struct Entry {
    under_way: UnderWay,
    number: u64,
}

/// A command as `blob status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct CommandStatus {
    /// As it was typed, about.
    pub(crate) command: String,
    /// For how long it has been under way.
    pub(crate) seconds: u64,
    /// Files that are done.
    pub(crate) files: u64,
    /// Bytes that are done.
    pub(crate) bytes: u64,
    /// Of how many, if that is known.
    pub(crate) total_bytes: Option<u64>,
    /// As of the last ten seconds.
    pub(crate) bytes_per_s: u64,
    /// How long it still takes if it goes on so.
    pub(crate) seconds_left: Option<u64>,
}

impl UnderWay {
    fn commands(&self) -> MutexGuard<'_, BTreeMap<u64, Command>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a command begins.
    pub(crate) fn begin(&self, text: String) -> Entry {
        let mut commands = self.commands();
        let number = commands.last_key_value().map_or(0, |(last, _)| last + 1);
        let now = Instant::now();
        let course = Course::new(now);
        commands.insert(number, Command { text, began: now, files: 0, total: None, course });
        Entry { under_way: self.clone(), number }
    }

    /// Those that are, in the order in which they began.
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
    /// Notes how far it is.
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

/// How far something has come, and how fast it went lately. Pure: time is passed in.
#[derive(Debug)]
pub(super) struct Course {
    /// Oldest first, a second apart at least, and the latest.
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

    /// Takes note that it has come to `done`.
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

    /// Bytes a second, as of the last ten seconds or so.
    pub(super) fn rate(&self, now: Instant) -> u64 {
        let Some((since, from)) = self.samples.front() else { return 0 };
        let seconds = now.saturating_duration_since(*since).as_secs_f64();
        if seconds > 0.0 { (self.done().saturating_sub(*from) as f64 / seconds) as u64 } else { 0 }
    }

    /// How long the rest of `total` takes at that rate; `None` if nothing moves.
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
        // A minute at a megabyte a second, told of ten times a second; then half of that.
        (1..=600).for_each(|tenth| course.note(tenth * 100_000, at(tenth * 100)));
        assert_eq!(course.done(), 60_000_000);
        let rate = course.rate(at(60_000));
        assert!((990_000..=1_010_000).contains(&rate), "{rate}");
        assert!((59..=61).contains(&course.left(120_000_000, at(60_000)).unwrap().as_secs()));
        (1..=200).for_each(|tenth| course.note(60_000_000 + tenth * 50_000, at(60_000 + tenth * 100)));
        let rate = course.rate(at(80_000));
        assert!((490_000..=510_000).contains(&rate), "{rate}");
        // When nothing moves any more, it falls.
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
