//! What is kept of files that a pin covered when their owners deleted them. Rules: spec/pins.md, "After a deletion".

use std::{
    collections::{BTreeMap, HashSet},
    ops::ControlFlow,
    time::{Duration, Instant},
};

use blobstore::Presence;
use namespace::{Departed, MassDeletion, Place};
use tree::UnixTime;

use super::{
    super::{Node, blocking, list::rfc3339, verify::now},
    CHANGED_AT_ONCE,
    tally::{Tally, mark, place_of},
};
use crate::{
    event::{DeletedFile, DeletedMany, Event, FileName, Kept, Reporter, summary},
    failure::{Code, Failure},
    target::Target,
};

/// What is kept after deletions, as of one look.
#[derive(Debug, Default)]
pub(super) struct Keeps {
    /// What stands for the blobs that are kept for nothing else.
    blobs: HashSet<u64>,
    /// By the pin that covers them.
    pub(super) places: BTreeMap<Place, KeepTally>,
    /// Deletions of most of an arena that nobody has accepted.
    pub(super) masses: Vec<MassDeletion>,
}

/// What is kept below one pin.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct KeepTally {
    pub(super) files: u64,
    /// The bytes of these files that are here.
    pub(super) bytes: u64,
    /// When the first of them is kept no longer, in milliseconds since 1970.
    pub(super) until: u64,
}

/// What becomes of a departed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is kept.
    Kept,
    /// It is kept for another reason, or none of its bytes have to be.
    Idle,
    /// There is no reason to keep it any more.
    Released,
}

/// Whether the clock can be relied on: it has run as evenly as the monotonic one for a while.
#[derive(Debug, Default)]
pub(super) struct EvenClock(Option<(Instant, u64)>);

impl EvenClock {
    /// Compares the clock, in milliseconds since 1970, with the monotonic one. Returns whether they agree for `wait` by now.
    fn is_even(&mut self, at: Instant, now: u64, wait: Duration) -> bool {
        let since = self.0.filter(|&(began, then)| {
            let expected = then.saturating_add(millis(at.saturating_duration_since(began)));
            now.abs_diff(expected) <= UNEVEN_MS
        });
        let (began, _) = *self.0.insert(since.unwrap_or((at, now)));
        at.saturating_duration_since(began) >= wait
    }
}

impl Keeps {
    pub(super) fn wants(&self, blob: tree::BlobId) -> bool {
        self.blobs.contains(&mark(blob))
    }
}

impl Node {
    /// Goes through the departed files: dates those that are new, forgets those that are to be kept no longer, and counts the
    /// others. `tally` is of the same look. Blocks; the caller has the turn.
    pub(super) fn keep_departed(&self, tally: &Tally) -> Result<Keeps, Failure> {
        let (now, keep) = (now(), self.inner.pin_keep);
        let is_even = self.inner.keeping.clock().is_even(Instant::now(), now, (keep / 24).min(EVEN_FOR));
        let pins = self.inner.namespace.pins()?;
        let (mut keeps, mut released) = (Keeps::default(), Vec::new());
        let (mut is_undated, mut outcome) = (false, Ok(()));
        self.inner.namespace.departed(&mut |file| {
            is_undated |= file.since == 0 || file.since > now;
            let since = if file.since == 0 { now } else { file.since.min(now) };
            let until = since.saturating_add(millis(keep));
            let mut look = || {
                let Some(pin) = pins.covering(&file.arena, Some(&file.path)) else { return Ok(Fate::Released) };
                let bytes = match self.inner.store.presence(file.blob)? {
                    Presence::None => return Ok(Fate::Released),
                    Presence::InPlace => None,
                    Presence::Cached => Some(file.size),
                    Presence::Partial(ranges) => Some(ranges.total_bytes()),
                };
                let fate = fate(until, now, is_even, bytes.is_none() || tally.wants(file.blob));
                if let (Fate::Kept, Some(bytes)) = (fate, bytes) {
                    keeps.blobs.insert(mark(file.blob));
                    let tally = keeps.places.entry(pin.clone()).or_insert(KeepTally { until, ..KeepTally::default() });
                    (tally.files, tally.bytes) = (tally.files + 1, tally.bytes + bytes);
                    tally.until = tally.until.min(until);
                }
                Ok::<_, Failure>(fate)
            };
            match look() {
                Ok(Fate::Released) => released.push(file),
                Ok(_) => {}
                Err(failure) => outcome = Err(failure),
            }
            if outcome.is_ok() && released.len() < RELEASED_MAX {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        outcome?;
        if is_undated {
            self.inner.namespace.date_departed(now)?;
        }
        // Those behind have the next look, which must not find the store's pins gone.
        let is_all = released.len() < RELEASED_MAX;
        for released in released.chunks(CHANGED_AT_ONCE) {
            self.inner.namespace.forget_departed(released)?;
        }
        keeps.masses = self.inner.namespace.mass_deletions()?;
        let over = |mass: &MassDeletion| mass.since.saturating_add(millis(keep)) <= now;
        if is_even && keeps.masses.iter().any(over) {
            self.inner.namespace.forget_mass_deletions(now.saturating_sub(millis(keep)).saturating_add(1))?;
            keeps.masses.retain(|mass| !over(mass));
        }
        if is_all { Ok(keeps) } else { self.keep_departed(tally) }
    }

    /// Lets go of what is kept at and below `targets` after deletions.
    pub(crate) async fn accept_deletions(&self, targets: Vec<Target>, reporter: &Reporter) -> Result<Code, Failure> {
        let (files, bytes) = {
            let _turn = self.inner.keeping.turn.lock().await;
            let (node, targets) = (self.clone(), targets);
            blocking(move || {
                let places: Vec<Place> = targets.iter().map(place_of).collect();
                let accepted = node.inner.namespace.accept_departed(&places)?;
                node.follow_pins_now()?;
                Ok(accepted)
            })
            .await?
        };
        self.inner.keeping.nudge();
        reporter.send(summary(serde_json::json!({ "accepted_files": files, "accepted_bytes": bytes }))).await?;
        Ok(Code::Ok)
    }

    /// Reports the files at and below `targets`, or all, that are kept after they were deleted.
    pub(crate) async fn list_deleted(&self, targets: Vec<Target>, reporter: &Reporter) -> Result<Code, Failure> {
        self.follow_pins().await?;
        let (node, reporter) = (self.clone(), reporter.clone());
        blocking(move || {
            let asked: namespace::Pins = targets.iter().map(place_of).collect();
            let mut outcome = Ok(());
            node.inner.namespace.departed(&mut |file| {
                let is_asked = targets.is_empty() || asked.covering(&file.arena, Some(&file.path)).is_some();
                if is_asked {
                    outcome = node.deleted_file(&file).and_then(|line| match line {
                        Some(line) => Ok(reporter.send_blocking(Event::Deleted(line))?),
                        None => Ok(()),
                    });
                }
                if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
            outcome.map(|()| Code::Ok)
        })
        .await
    }

    fn deleted_file(&self, file: &Departed) -> Result<Option<DeletedFile>, Failure> {
        let bytes_here = match self.inner.store.presence(file.blob)? {
            Presence::None => return Ok(None),
            Presence::InPlace | Presence::Cached => file.size,
            Presence::Partial(ranges) => ranges.total_bytes(),
        };
        Ok(Some(DeletedFile {
            file: FileName::new(&file.arena, file.path.as_bytes()),
            blob: file.blob,
            size: file.size,
            bytes_here,
            peer: self.peer_name(Some(file.origin)),
            since: time(file.since),
            until: time(file.since.saturating_add(millis(self.inner.pin_keep))),
        }))
    }

    /// What is kept below a pin after deletions, as people are told.
    pub(super) fn kept(&self, keeps: &Keeps, place: &Place) -> Option<Kept> {
        let KeepTally { files, bytes, until } = *keeps.places.get(place)?;
        Some(Kept { files, bytes, until: time(until) })
    }

    /// The mass deletions below a place, or everywhere.
    pub(super) fn deleted_many(&self, keeps: &Keeps, place: Option<&Place>) -> Vec<DeletedMany> {
        let here = keeps.masses.iter().filter(|mass| place.is_none_or(|place| place.arena == mass.arena));
        let told = here.map(|mass| DeletedMany {
            arena: mass.arena.to_string(),
            peer: self.peer_name(Some(mass.origin)),
            files: mass.files,
            of: mass.of,
            since: time(mass.since),
            until: time(mass.since.saturating_add(millis(self.inner.pin_keep))),
        });
        told.take(MASSES_TOLD).collect()
    }
}

/// Decides what becomes of a departed file that is kept `until` then.
fn fate(until: u64, now: u64, is_even: bool, is_idle: bool) -> Fate {
    match () {
        () if until <= now && is_even => Fate::Released,
        () if is_idle => Fate::Idle,
        () => Fate::Kept,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn time(millis: u64) -> String {
    let seconds = i64::try_from(millis / 1000).unwrap_or(i64::MAX);
    rfc3339(UnixTime { seconds, nanos: (millis % 1000) as u32 * 1_000_000 })
}

/// So long the clock must have run evenly before anything is released because of it.
const EVEN_FOR: Duration = Duration::from_secs(3600);
/// So much the clock may be set without being uneven.
const UNEVEN_MS: u64 = 60_000;
/// So many departed files are forgotten before those behind them are looked at.
const RELEASED_MAX: usize = 65_536;
/// Mass deletions that are told.
const MASSES_TOLD: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_of_a_deleted_file() {
        for (until, now, is_even, is_idle, expected) in [
            (10, 9, true, false, Fate::Kept),
            (10, 10, true, false, Fate::Released),
            // A clock that was set says nothing.
            (10, 10, false, false, Fate::Kept),
            (10, 9, true, true, Fate::Idle),
            (10, 10, true, true, Fate::Released),
        ] {
            assert_eq!(fate(until, now, is_even, is_idle), expected, "{until} {now} {is_even} {is_idle}");
        }
    }

    #[test]
    fn a_clock_that_is_set_is_waited_for() {
        let (mut clock, began, hour) = (EvenClock::default(), Instant::now(), Duration::from_secs(3600));
        let mut look = |seconds: u64, wall: u64| clock.is_even(began + Duration::from_secs(seconds), wall * 1000, hour);
        assert!(!look(0, 1_000_000));
        assert!(!look(3599, 1_003_599));
        assert!(look(3600, 1_003_610));
        // Far ahead, and back.
        assert!(!look(3700, 9_000_000));
        assert!(!look(7200, 9_003_500));
        assert!(look(7400, 9_003_700));
        assert!(!look(7500, 1_007_500));
        assert!(look(11_100, 1_011_100));
    }
}
