//! What is to be kept here: `blob pin`, `blob unpin`, and the keeper that follows. Rules: spec/pins.md.

mod ahead;
mod departed;
mod failures;
mod keeper;
mod measure;
mod tally;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use namespace::Place;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{sync::watch, time::sleep};
use tree::BlobId;

use super::{Node, blocking, under_way::Course};
use crate::{
    event::{Event, FileName, Pin, Reason, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

use departed::{EvenClock, Keeps};
use failures::Failures;
use tally::PlaceTally;

pub(super) use ahead::Bringing;
pub(super) use measure::Manner;
pub(super) use tally::{Job, Why, cost, place_of};

/// What the keeper and those who ask it for something share.
#[derive(Default)]
pub(super) struct Keeping {
    /// One at a time changes the pins, or looks what is below them.
    turn: tokio::sync::Mutex<()>,
    status: watch::Sender<Arc<Status>>,
    nudges: watch::Sender<u64>,
    losses: watch::Sender<u64>,
    /// Bytes received for pins since the start, and their rate.
    came: AtomicU64,
    course: Mutex<Course>,
    failures: Mutex<Failures>,
    clock: Mutex<EvenClock>,
}

/// How things stood when it was last looked.
#[derive(Debug, Default)]
pub(super) struct Status {
    places: Vec<(Place, PlaceTally)>,
    /// What is kept of what was deleted there.
    keeps: Keeps,
    /// What had come by then.
    came: u64,
}

/// `POST /v1/pins`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PinScope {
    /// What to keep here.
    pub targets: Vec<Target>,
    /// Whether to wait until it is here.
    #[serde(default)]
    pub wait: bool,
    /// Seconds to wait for machines that disconnect meanwhile.
    #[serde(default)]
    pub retry_s: u64,
}

impl Keeping {
    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clock(&self) -> MutexGuard<'_, EvenClock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> Arc<Status> {
        self.status.borrow().clone()
    }

    fn came(&self, bytes: u64) {
        let came = self.came.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.course().note(came, Instant::now());
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        self.course.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nudge(&self) {
        self.nudges.send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl Node {
    /// Hears from now on of what is lost.
    pub(super) fn hear_of_losses(&self) {
        let losses = self.inner.keeping.losses.clone();
        self.inner.store.on_loss(move || losses.send_modify(|count| *count = count.wrapping_add(1)));
    }

    /// Looks what is below the pins, sees to it that just that is never evicted, and says how things stand. Gives what is to
    /// be brought: the first of it.
    async fn follow_pins(&self) -> Result<Vec<Job>, Failure> {
        let _turn = self.inner.keeping.turn.lock().await;
        let node = self.clone();
        blocking(move || node.follow_pins_now()).await
    }

    /// The same for who has the turn.
    fn follow_pins_now(&self) -> Result<Vec<Job>, Failure> {
        let places: Vec<Place> = self.inner.namespace.pins()?.iter().cloned().collect();
        let came = self.inner.keeping.came.load(Ordering::Relaxed);
        let room = self.room()?;
        let mut manner =
            Manner { pins: true, all_reachable: false, jobs_max: JOBS_MAX, room, each: &mut |_, _, _| Ok(()) };
        let tally = self.measure(&places, &mut manner)?;
        let keeps = self.keep_departed(&tally)?;
        let is_stale = |blob: &BlobId| !tally.wants(*blob) && !keeps.wants(*blob);
        let stale: Vec<_> = self.inner.store.pinned().into_iter().filter(is_stale).collect();
        for stale in stale.chunks(CHANGED_AT_ONCE) {
            self.inner.store.change_pinned(&[], stale)?;
        }
        let places = places.into_iter().zip(tally.places).collect();
        self.inner.keeping.status.send_replace(Arc::new(Status { places, keeps, came }));
        Ok(tally.jobs)
    }

    /// What the disk has room for, in bytes: what is free, and what can be evicted.
    pub(super) fn room(&self) -> Result<u64, Failure> {
        let usage = self.inner.store.cache_usage()?;
        Ok(usage.free.saturating_add(usage.bytes).saturating_sub(usage.keep_free))
    }

    /// Keeps what is at and below `targets` here from now on; if asked to, waits until all of it is here, or only what cannot
    /// be had now is missing.
    pub(crate) async fn pin(&self, scope: PinScope, reporter: &Reporter) -> Result<Code, Failure> {
        let began = Instant::now();
        let PinScope { targets, wait, retry_s } = scope;
        {
            let _turn = self.inner.keeping.turn.lock().await;
            let (node, targets) = (self.clone(), targets.clone());
            blocking(move || node.add_pins(&targets)).await?;
        }
        self.follow_pins().await?;
        self.inner.keeping.nudge();
        let places: Vec<Place> = targets.iter().map(place_of).collect();
        if wait {
            self.wait_for_pins(&places, Duration::from_secs(retry_s), reporter).await?;
        }
        let status = self.inner.keeping.status();
        let (mut sum, mut is_any_here) = (PlaceTally::default(), false);
        for (place, tally) in status.places.iter().filter(|(place, _)| places.contains(place)) {
            reporter.send(Event::Pin(self.pinned(place, tally, &status.keeps))).await?;
            sum.files += tally.files;
            sum.bytes += tally.bytes;
            sum.missing_files += tally.missing_files;
            sum.missing_bytes += tally.missing_bytes;
            is_any_here |= tally.missing_files < tally.files;
        }
        let PlaceTally { files, bytes, missing_files, missing_bytes, .. } = sum;
        let seconds = began.elapsed().as_secs_f64();
        let totals = json!({ "files": files, "bytes": bytes, "missing_files": missing_files, "missing_bytes": missing_bytes, "seconds": seconds });
        reporter.send(summary(totals)).await?;
        Ok(match missing_files {
            0 => Code::Ok,
            _ if !wait => Code::Ok,
            _ if is_any_here => Code::Some,
            _ => Code::Unreachable,
        })
    }

    /// Pins `targets`, all or none. The caller has the turn.
    fn add_pins(&self, targets: &[Target]) -> Result<(), Failure> {
        targets.iter().try_for_each(|target| self.expect(target))?;
        // What was pinned before has the first claim to the room that there is.
        let mut places: Vec<Place> = self.inner.namespace.pins()?.iter().cloned().collect();
        let before = places.len();
        places.extend(targets.iter().map(place_of));
        let room = self.room()?;
        let mut manner = Manner { pins: false, all_reachable: true, jobs_max: 0, room, each: &mut |_, _, _| Ok(()) };
        let tally = self.measure(&places, &mut manner)?;
        if let Some(at) = tally.places[before..].iter().position(|tally| tally.missing.contains_key(&Why::NoRoom)) {
            let needed = bytesize::ByteSize(tally.cost).display().iec();
            let room = bytesize::ByteSize(room).display().iec();
            return Err(Failure::new(
                Code::Limit,
                format!("{needed} are missing of what is pinned, and the disk has room for {room}"),
            )
            .hint("pin less, or make room: blob cache stat shows what is free and what cache.keep_free keeps so")
            .while_doing(format!("pin {}", targets[at])));
        }
        let count = self.inner.namespace.change_pins(&places[before..], &[], PINS_MAX)?;
        if count > PINS_MAX {
            return Err(Failure::new(Code::Limit, format!("{PINS_MAX} pins are the most that there can be"))
                .hint("pin a directory or an arena, and not what is in it one by one"));
        }
        self.keep_record();
        Ok(())
    }

    /// Waits until all files below `places` are here, or none of the missing ones has been in transfer for 10 s; for `retry` if
    /// a machine disconnected since the call.
    async fn wait_for_pins(&self, places: &[Place], retry: Duration, reporter: &Reporter) -> Result<(), Failure> {
        let mut looks = self.inner.keeping.status.subscribe();
        let (mut last_coming, mut is_notified, expected) = (Instant::now(), false, self.connected());
        loop {
            let status = looks.borrow_and_update().clone();
            let mut sum = PlaceTally::default();
            let (mut coming, mut found) = (0, 0);
            for (_, tally) in status.places.iter().filter(|(place, _)| places.contains(place)) {
                found += 1;
                coming += tally.coming();
                sum.files += tally.files - tally.missing_files;
                sum.bytes += tally.bytes;
                sum.missing_bytes += tally.missing_bytes;
                sum.missing_files += tally.missing_files;
            }
            // Somebody took the pin away meanwhile.
            if sum.missing_files == 0 || found == 0 {
                return Ok(());
            }
            let connected = self.connected();
            let away = expected.iter().find(|peer| !connected.contains(peer));
            let limit = away.map_or(WAIT_FOR_PEERS, |_| retry.max(WAIT_FOR_PEERS));
            if coming > 0 {
                (last_coming, is_notified) = (Instant::now(), false);
            } else if last_coming.elapsed() > limit {
                return Ok(());
            } else if let Some(&away) = away.filter(|_| !retry.is_zero() && !is_notified) {
                is_notified = true;
                let peer = self.peer_name(Some(away));
                let reason = format!("{peer} disconnected");
                reporter.send(Event::Waiting { peers: vec![peer], reason, for_s: limit.as_secs() }).await?;
            }
            let came = self.inner.keeping.came.load(Ordering::Relaxed).saturating_sub(status.came);
            let done = sum.bytes - sum.missing_bytes.saturating_sub(came);
            reporter.progress("pinning", done, Some(sum.bytes), sum.files);
            tokio::select! {
                _ = looks.changed() => {}
                () = reporter.closed() => return Err(Failure::new(Code::Interrupted, "interrupted")),
                () = sleep(PROGRESS_PAUSE) => {}
            }
        }
    }

    /// Keeps `targets` here no more. What is here of them stays until something else needs the room.
    pub(crate) async fn unpin(&self, targets: Vec<Target>) -> Result<Vec<FileName>, Failure> {
        {
            let _turn = self.inner.keeping.turn.lock().await;
            let (node, targets) = (self.clone(), targets.clone());
            blocking(move || {
                let pins = node.inner.namespace.pins()?;
                for target in &targets {
                    if !pins.contains(&place_of(target)) {
                        let hint = match pins.covering(&target.arena, target.path.as_ref()) {
                            Some(above) => format!("it is below {}, which is", text_of(above)),
                            None => "see what is with: blob pin".to_owned(),
                        };
                        return Err(Failure::new(Code::NotFound, format!("{target} is not pinned")).hint(hint));
                    }
                }
                let places: Vec<Place> = targets.iter().map(place_of).collect();
                node.inner.namespace.change_pins(&[], &places, u64::MAX)?;
                node.keep_record();
                node.follow_pins_now()
            })
            .await?;
        }
        self.inner.keeping.nudge();
        Ok(targets.iter().map(|target| name_of(&place_of(target))).collect())
    }

    /// All that is pinned, as it is now.
    pub(crate) async fn pins(&self) -> Result<Vec<Pin>, Failure> {
        self.follow_pins().await.while_doing("look at what is pinned")?;
        let status = self.inner.keeping.status();
        Ok(status.places.iter().map(|(place, tally)| self.pinned(place, tally, &status.keeps)).collect())
    }

    /// The pins in short, as of the last look.
    pub(crate) fn pins_in_short(&self) -> Value {
        let status = self.inner.keeping.status();
        let (mut sum, mut reasons) = (PlaceTally::default(), std::collections::BTreeSet::new());
        for (_, tally) in &status.places {
            sum.missing_files += tally.missing_files;
            sum.missing_bytes += tally.missing_bytes;
            reasons.extend(tally.missing.keys());
        }
        let reasons: Vec<_> = reasons.into_iter().take(REASONS_TOLD).map(Why::to_string).collect();
        json!({
            "count": status.places.len(),
            "missing_files": sum.missing_files,
            "missing_bytes": sum.missing_bytes,
            "reasons": reasons,
            "bytes_per_s": self.inner.keeping.course().rate(Instant::now()),
            "kept_files": status.keeps.places.values().map(|keep| keep.files).sum::<u64>(),
            "kept_bytes": status.keeps.places.values().map(|keep| keep.bytes).sum::<u64>(),
            "mass_deletions": self.deleted_many(&status.keeps, None),
        })
    }

    fn pinned(&self, place: &Place, tally: &PlaceTally, keeps: &Keeps) -> Pin {
        let reason = |(why, &(files, bytes)): (&Why, &(u64, u64))| Reason { reason: why.to_string(), files, bytes };
        Pin {
            place: name_of(place),
            files: tally.files,
            bytes: tally.bytes,
            bytes_here: tally.bytes_here,
            missing_files: tally.missing_files,
            missing_bytes: tally.missing_bytes,
            missing: tally.missing.iter().map(reason).collect(),
            kept: self.kept(keeps, place),
            mass_deletions: self.deleted_many(keeps, Some(place)),
        }
    }

    /// Wakes the keeper, and lets it retry failed blobs at once, because there may be more free space.
    pub(super) fn look_at_pins(&self) {
        self.inner.keeping.failures().clear();
        self.inner.keeping.nudge();
    }
}

fn name_of(place: &Place) -> FileName {
    FileName::new(&place.arena, place.path.as_ref().map_or(&[][..], |path| path.as_bytes()))
}

/// A place as it is typed.
pub(super) fn text_of(Place { arena, path }: &Place) -> String {
    Target { arena: arena.clone(), path: path.clone() }.to_string()
}

/// How many places can be pinned.
const PINS_MAX: u64 = 1000;
/// So many blobs are brought before it is looked again.
const JOBS_MAX: usize = 16_384;
const CHANGED_AT_ONCE: usize = 4096;
/// How long to wait for machines that have what is missing.
const WAIT_FOR_PEERS: Duration = Duration::from_secs(10);
const PROGRESS_PAUSE: Duration = Duration::from_millis(200);
/// How many reasons `blob status` tells.
const REASONS_TOLD: usize = 4;
