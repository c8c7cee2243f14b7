//! Against plain lists of all that was noted.

use std::time::Instant;

use proptest::{prelude::*, sample};

use super::*;

const SETTLE: Duration = Duration::from_millis(20);
const SETTLE_MAX: Duration = Duration::from_millis(70);
const NEVER: Duration = Duration::MAX;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn at(path: &str) -> Option<RelPath> {
    (!path.is_empty()).then(|| path.try_into().unwrap())
}

fn pending() -> Pending {
    Pending::new(SETTLE, SETTLE_MAX)
}

fn within(path: &Option<RelPath>, dir: &Option<RelPath>) -> bool {
    match (path, dir) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(path), Some(dir)) => path.is_within(dir),
    }
}

#[track_caller]
fn check(pending: &mut Pending, now: u64, expected: &[&str]) {
    let expected: Vec<_> = expected.iter().map(|path| at(path)).collect();
    assert_eq!(pending.take_due(ms(now)), expected, "at {now}");
    if let Some(next) = pending.next_due() {
        assert!(next > ms(now), "{next:?} is due");
    }
}

#[test]
fn a_path_is_due_when_it_rests() {
    let mut pending = pending();
    assert_eq!(pending.next_due(), None);
    pending.note(at("a/b"), ms(0));
    pending.note(at("c"), ms(5));
    pending.note(at("a/b"), ms(19));
    check(&mut pending, 24, &[]);
    check(&mut pending, 25, &["c"]);
    assert_eq!(pending.next_due(), Some(ms(39)));
    check(&mut pending, 38, &[]);
    check(&mut pending, 39, &["a/b"]);
    assert_eq!(pending.next_due(), None);
    check(&mut pending, 1000, &[]);
}

#[test]
fn a_path_that_never_rests_is_due_all_the_same_and_begins_anew() {
    let mut pending = pending();
    let mut taken = Vec::new();
    for now in 0..=150 {
        pending.note(at("log"), ms(now));
        if !pending.take_due(ms(now)).is_empty() {
            taken.push(now);
        }
    }
    assert_eq!(taken, [70, 141]);
}

#[test]
fn what_is_inside_what_is_due_goes_with_it_if_it_is_due_too() {
    let mut pending = pending();
    for path in ["a", "a-b", "a/b", "a/b/c", "b/c"] {
        pending.note(at(path), ms(0));
    }
    pending.note(at("a/d"), ms(1));
    check(&mut pending, 20, &["a", "a-b", "b/c"]);
    check(&mut pending, 21, &["a/d"]);
    pending.note(None, ms(30));
    pending.note(at("a"), ms(30));
    pending.note(at("b"), ms(31));
    check(&mut pending, 50, &[""]);
    check(&mut pending, 51, &["b"]);
}

#[test]
fn room_is_made_in_the_fullest_directory() {
    let mut pending = Pending::with_paths_max(SETTLE, SETTLE_MAX, 8);
    for (now, path) in ["x/1", "x/2", "y/1", "y/2", "y/3", "y/z/1", "r", "s"].into_iter().enumerate() {
        pending.note(at(path), ms(now as u64));
    }
    assert_eq!(pending.noted.len(), 8);
    pending.note(at("t"), ms(8));
    // With y for three and x for two, five would be left of eight. So all are cut to depth 1: r, s, x, y; then t.
    assert_eq!(pending.noted.len(), 5);
    // y's children were noted at 2 to 5, x's at 0 and 1.
    check(&mut pending, 21, &["x"]);
    pending.note(at("y/deep/below"), ms(22));
    pending.note(at("x/1"), ms(22));
    check(&mut pending, 28, &["r", "s", "t"]);
    check(&mut pending, 42, &["x/1", "y"]);
    assert_eq!(pending.standing, 0);
    let mut pending = Pending::with_paths_max(SETTLE, SETTLE_MAX, 8);
    for path in ["x/1", "x/2", "x/3", "x/4", "x/5", "x/a/6", "y/a/1", "z", "z/a"] {
        pending.note(at(path), ms(0));
    }
    check(&mut pending, 20, &["x", "y/a/1", "z"]);
}

#[test]
fn what_stands_for_others_is_due_for_the_first_of_them() {
    let mut pending = Pending::with_paths_max(SETTLE, SETTLE_MAX, 4);
    for now in 0..=70 {
        pending.note(at(&format!("{now}")), ms(now));
    }
    assert_eq!(pending.next_due(), Some(ms(70)));
    check(&mut pending, 70, &[""]);
    assert_eq!(pending.next_due(), None);
}

/// What no more than a list of notes says of when each path is due.
#[derive(Debug, Default)]
struct Oracle(Vec<(Option<RelPath>, Duration, Duration)>);

impl Oracle {
    fn note(&mut self, path: Option<RelPath>, now: Duration) {
        match self.0.iter_mut().find(|(known, ..)| *known == path) {
            Some((.., last)) => *last = now,
            None => self.0.push((path, now, now)),
        }
    }

    fn due(first: Duration, last: Duration) -> Duration {
        (last + SETTLE).min(first + SETTLE_MAX)
    }

    fn next_due(&self) -> Option<Duration> {
        self.0.iter().map(|(_, first, last)| Self::due(*first, *last)).min()
    }

    fn take_due(&mut self, now: Duration) -> Vec<Option<RelPath>> {
        let is_due = |(_, first, last): &(_, Duration, Duration)| Self::due(*first, *last) <= now;
        let mut due: Vec<Option<RelPath>> = self.0.iter().filter(|e| is_due(e)).map(|e| e.0.clone()).collect();
        self.0.retain(|entry| !is_due(entry));
        due.sort();
        let inside = |path: &Option<RelPath>| due.iter().any(|dir| dir != path && within(path, dir));
        due.iter().filter(|path| !inside(path)).cloned().collect()
    }
}

#[derive(Debug, Clone)]
enum Step {
    Note(Option<RelPath>),
    Take,
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = sample::select(vec!["a", "a", "b", "a-", "a.b", "c", "d"]);
    let path = prop::collection::vec(name, 0..5).prop_map(|names| at(&names.join("/")));
    let step = prop_oneof![
        6 => path.prop_map(Step::Note),
        2 => Just(Step::Take),
        3 => (0..30u64).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// As long as there is room, each path is on its own.
    #[test]
    fn each_path_is_due_as_the_oracle_says(steps in steps()) {
        let (mut pending, mut oracle, mut now) = (pending(), Oracle::default(), ms(0));
        for step in steps {
            match step {
                Step::Note(path) => {
                    pending.note(path.clone(), now);
                    oracle.note(path, now);
                }
                Step::Take => prop_assert_eq!(pending.take_due(now), oracle.take_due(now)),
                Step::Wait(more) => now += ms(more),
            }
            prop_assert_eq!(pending.next_due(), oracle.next_due());
            prop_assert_eq!(pending.noted.len(), pending.due.len());
        }
        prop_assert_eq!(pending.take_due(NEVER), oracle.take_due(NEVER));
    }

    /// Without room, nothing is forgotten, or late, or taken for nothing.
    #[test]
    fn without_room(steps in steps(), paths_max in 2..12usize) {
        let mut pending = Pending::with_paths_max(SETTLE, SETTLE_MAX, paths_max);
        let (mut now, mut ever, mut open) = (ms(0), Vec::new(), Vec::new());
        for step in steps.into_iter().chain([Step::Take, Step::Wait(1000), Step::Take]) {
            match step {
                Step::Note(path) => {
                    pending.note(path.clone(), now);
                    ever.push((path.clone(), now));
                    open.push((path, now));
                }
                Step::Wait(more) => now += ms(more),
                Step::Take => {
                    let taken = pending.take_due(now);
                    prop_assert!(taken.is_sorted());
                    for dir in &taken {
                        prop_assert!(!taken.iter().any(|other| other != dir && within(other, dir)), "{taken:?}");
                        let rested = ever.iter().any(|(path, noted)| within(path, dir) && *noted + SETTLE <= now);
                        prop_assert!(rested, "{dir:?} is taken too early");
                    }
                    open.retain(|(path, _)| !taken.iter().any(|dir| within(path, dir)));
                    for (path, noted) in &open {
                        prop_assert!(*noted + SETTLE_MAX > now, "{path:?} of {noted:?} is late");
                    }
                }
            }
            prop_assert!(pending.noted.len() <= paths_max);
            prop_assert_eq!(pending.noted.len(), pending.due.len());
            prop_assert_eq!(pending.noted.values().filter(|noted| noted.stands).count(), pending.standing);
            let due = open.iter().map(|(_, noted)| *noted + SETTLE_MAX).min();
            prop_assert!(due.is_none() || pending.next_due().is_some_and(|next| Some(next) <= due));
        }
        prop_assert!(open.is_empty());
        prop_assert_eq!(pending.next_due(), None);
    }
}

/// A million notes of each kind take about a second; ten on a slow machine that does other things besides.
#[test]
fn a_million_notes() {
    type Kind = (&'static str, fn(u64) -> String);
    let kinds: [Kind; 5] = [
        ("one file", |_| "photos/2024/a file.raw".into()),
        ("as many as there is room for", |n| format!("photos/{}/{}", n % 256, n / 256 % 256)),
        ("one directory", |n| format!("photos/2024/a file {n}.raw")),
        ("the root", |n| format!("a file {n}.raw")),
        ("one in each directory", |n| format!("a/b/{}/d/{n}/f/file", n % 1_000)),
    ];
    for (kind, path) in kinds {
        let paths: Vec<_> = (0..1_000_000).map(|n| at(&path(n))).collect();
        let (mut pending, started) = (Pending::new(ms(500), ms(10_000)), Instant::now());
        for (n, path) in (0..).zip(paths) {
            pending.note(path, Duration::from_micros(n));
        }
        let (took, left) = (started.elapsed(), pending.noted.len());
        println!("{kind}: {took:?}, {left} are left");
        assert!(took < Duration::from_secs(10), "{kind}: {took:?}");
        assert!(left <= PATHS_MAX && !pending.take_due(NEVER).is_empty() && pending.noted.is_empty());
    }
}
