use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use blobstore::{Consent, FetchError, Fetched, FileRef, Mending, Sink, Verdict, Want};
use peers::{Class, PeerStatus};
use serde_json::json;
use tracing::{info, warn};
use tree::{BlobId, ByteRange, RangeSet, UnixTime, Verified};

use super::{
    Node, blocking,
    list::rfc3339,
    patience::Patience,
    read::{READ_BYTES_MAX, fetch_failure},
    verify::{self, Damaged, EXPLAINED_MAX, Scope, now},
};
use crate::{
    event::{Event, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

/// What mending one file came to.
#[derive(Default)]
pub(super) struct Mended {
    ranges: RangeSet,
    fetched: Fetched,
    left: RangeSet,
    pub(super) reason: Option<String>,
}

impl Node {
    /// Verifies everything here, or what `targets` name, and mends all damage: from other copies here, and what no
    /// copy here has from whichever peer has it. Waits up to `retry` for machines that disconnect. Suspect files are mended only
    /// if the user consents.
    pub async fn repair(
        &self,
        targets: Vec<Target>,
        consent: Consent,
        retry: Duration,
        reporter: &Reporter,
    ) -> Result<Code, Failure> {
        let patience = Patience::new(self, reporter, retry, None);
        let _turn = self.turn().await;
        let started = Instant::now();
        let (node, report) = (self.clone(), reporter.clone());
        let what = verify::in_words("repair", &targets);
        let damaged = blocking(move || {
            let mut all = Vec::new();
            let scope = Scope { targets, ..Scope::default() };
            let totals = node.find_damage(&scope, &report, &mut |damaged| {
                all.push(damaged);
                Ok(())
            })?;
            Ok((all, totals.unreadable_files))
        });
        let (damaged, unreadable_files) = damaged.await.while_doing(what)?;
        let (mut repaired_files, mut unrepaired_files, mut suspect_files) = (0u64, 0u64, 0u64);
        for damaged in damaged {
            if matches!(damaged.verdict, Verdict::Suspect { .. }) && consent == Consent::Damage {
                reporter.send(self.suspect_event(&damaged, suspect_files < EXPLAINED_MAX).await?).await?;
                suspect_files += 1;
                continue;
            }
            let mended = self.mend_patiently(consent, &damaged, &patience).await?;
            let Mended { ranges, fetched: Fetched { bytes_received, peers }, left, reason } = mended;
            let (file, blob) = (damaged.name, damaged.blob);
            let event = match reason {
                None => {
                    repaired_files += 1;
                    Event::Repaired { file, blob, ranges, peers, bytes_received }
                }
                Some(reason) => {
                    unrepaired_files += 1;
                    Event::Unrepaired { file, blob, ranges: left, peers, bytes_received, reason }
                }
            };
            reporter.send(event).await?;
        }
        self.update_status().await?;
        reporter
            .send(summary(json!({
                "repaired_files": repaired_files,
                "unrepaired_files": unrepaired_files,
                "suspect_files": suspect_files,
                "unreadable_files": unreadable_files,
                "bytes_received": reporter.counts().received(),
                "bytes_wasted": reporter.counts().wasted(),
                "seconds": started.elapsed().as_secs_f64(),
            })))
            .await?;
        Ok(match (unrepaired_files, suspect_files, unreadable_files) {
            (0, 0, 0) => Code::Ok,
            (0, 0, _) => Code::Some,
            (0, _, _) => Code::Damage,
            _ => Code::Unrepaired,
        })
    }

    /// Mends one file, and resumes when machines that disconnected are back.
    async fn mend_patiently(
        &self,
        consent: Consent,
        damaged: &Damaged,
        patience: &Patience,
    ) -> Result<Mended, Failure> {
        let mut all = Mended::default();
        loop {
            let attempt = patience.begin();
            let Mended { ranges, fetched, left, reason } = self.mend(Class::Copy, consent, damaged).await?;
            if !ranges.is_empty() {
                patience.came();
            }
            all.ranges = all.ranges.union(&ranges);
            all.fetched.bytes_received += fetched.bytes_received;
            all.fetched.peers.extend(fetched.peers);
            (all.left, all.reason) = (left, reason);
            let Some(reason) = all.reason.clone().filter(|_| !all.left.is_empty()) else { return Ok(all) };
            let holders = self.inner.namespace.peers_with(damaged.blob)?;
            if !patience.again(attempt, holders, &Failure::new(Code::Unreachable, reason)).await {
                return Ok(all);
            }
        }
    }

    /// Mends one file, as far as that can be done now.
    pub(super) async fn mend(&self, class: Class, consent: Consent, damaged: &Damaged) -> Result<Mended, Failure> {
        let mended = self.try_to_mend(class, consent, damaged).await?;
        let (name, blob, bytes) = (&damaged.name, damaged.blob, mended.ranges.total_bytes());
        match &mended.reason {
            None => info!(arena = name.arena, path = name.path, %blob, bytes, "mended"),
            Some(reason) => warn!(arena = name.arena, path = name.path, %blob, bytes, reason, "cannot be mended now"),
        }
        Ok(mended)
    }

    async fn try_to_mend(&self, class: Class, consent: Consent, damaged: &Damaged) -> Result<Mended, Failure> {
        let unrepaired = |left, reason: String| Ok(Mended { left, reason: Some(reason), ..Mended::default() });
        let Some((_, file)) = &damaged.place else {
            // The cache has forgotten what was damaged, which mends it: it is fetched anew when it is wanted.
            return Ok(Mended::default());
        };
        let (data, outboard) = match &damaged.verdict {
            Verdict::Damaged { data, outboard, .. } => (data.clone(), outboard.clone()),
            // The outboard of a file that vanished and came back was dropped. It is made anew from what is mended.
            Verdict::Suspect { data } => (data.clone(), data.clone()),
            _ => {
                let reason = "the file is gone; if that was no accident, the next scan takes note of it; if it was, bring it back with: blob get";
                return unrepaired(RangeSet::new(), reason.into());
            }
        };
        let mut mended = if data.is_empty() {
            Mended::default()
        } else {
            match self.mend_data(class, consent, file, damaged.blob).await {
                Ok(mended) => mended,
                Err(failure) => return unrepaired(data, failure.reason()),
            }
        };
        if !outboard.is_empty() && mended.left.is_empty() {
            let (store, file) = (self.inner.store.clone(), file.clone());
            if let Err(failure) = blocking(move || Ok(store.rebuild_outboard(&file)?)).await {
                mended.left = outboard;
                mended.reason = Some(failure.reason());
            }
        }
        Ok(mended)
    }

    /// Writes proven bytes over those under quarantine. Once the file is open for that, it is closed properly
    /// whatever happens: its mtime must not stay moved.
    async fn mend_data(&self, class: Class, consent: Consent, file: &FileRef, blob: BlobId) -> Result<Mended, Failure> {
        let tree_bytes = self.narrow(file, blob).await?;
        let (node, place) = (self.clone(), file.clone());
        let opened = blocking(move || {
            let mut mending = node.inner.store.mend(&place, consent, now())?;
            let copied = node.mend_from_here(&mut mending, blob);
            Ok((mending, copied))
        });
        let (mending, copied) = opened.await?;
        let (size, ranges) = (mending.size(), mending.damaged());
        let mending = Arc::new(Mutex::new(mending));
        let (mut fetched, failure) = match copied {
            Err(failure) => (Fetched::default(), Some(failure)),
            Ok(()) => match self.inner.peers.fetch_as(class, Want { blob, size, ranges }, mending.clone()).await {
                Ok(fetched) => (fetched, None),
                Err(FetchError::AllFailed { blob, tried, fetched }) => {
                    let rest = Fetched::default();
                    (fetched, Some(fetch_failure(FetchError::AllFailed { blob, tried, fetched: rest })))
                }
                // Said below, with what is missing.
                Err(FetchError::NoPeerHasIt { .. }) => (Fetched::default(), None),
                Err(error) => (Fetched::default(), Some(fetch_failure(error))),
            },
        };
        fetched.bytes_received += tree_bytes;
        let node = self.clone();
        blocking(move || {
            // The fetch is over, and with it the only other hold on this.
            let mending =
                Arc::into_inner(mending).ok_or_else(|| Failure::new(Code::Error, "the file is still being mended"))?;
            let mending = mending.into_inner().unwrap_or_else(PoisonError::into_inner);
            let left = mending.damaged();
            let (_, ranges) = mending.finish()?;
            let mut why: Vec<_> = failure.as_ref().map(Failure::reason).into_iter().collect();
            if !left.is_empty() {
                why.insert(0, format!("no copy here has bytes {}", in_words(&left)));
                why.push(node.who_had(blob)?);
            }
            let reason = (!why.is_empty()).then(|| why.join("; "));
            Ok(Mended { ranges, fetched, left, reason })
        })
        .await
    }

    /// Asks peers for the tree below a coarse outboard, so that only the chunk groups are written that are damaged. What
    /// nobody tells stays damaged. Returns how many bytes came.
    async fn narrow(&self, file: &FileRef, blob: BlobId) -> Result<u64, Failure> {
        let (store, place) = (self.inner.store.clone(), file.clone());
        let Some((tree, damaged)) = blocking(move || Ok(store.tree_of_damage(&place)?)).await? else { return Ok(0) };
        let (tree, bytes) = self.inner.peers.complete_tree(blob, tree, &damaged).await;
        let (store, place) = (self.inner.store.clone(), file.clone());
        blocking(move || Ok(store.narrow(&place, blob, &tree)?)).await?;
        Ok(bytes)
    }

    /// Takes what other copies on this machine have.
    fn mend_from_here(&self, mending: &mut Mending, blob: BlobId) -> Result<(), Failure> {
        for range in mending.damaged().iter() {
            let mut start = range.start();
            while start < range.end() {
                let end = range.end().min(start + READ_BYTES_MAX);
                let part = ByteRange::new(start, end).unwrap_or_default();
                for piece in self.inner.store.read(blob, mending.size(), part)?.pieces {
                    mending.write(&[Verified::Data(piece)])?;
                }
                start = end;
            }
        }
        Ok(())
    }

    /// Which other machines have `blob` by their catalogs, and whether they can be asked: for whoever goes and looks.
    fn who_had(&self, blob: BlobId) -> Result<String, Failure> {
        let holders = self.inner.namespace.peers_with(blob)?;
        let peers = self.inner.peers.status().into_iter().filter(|status| holders.contains(&status.peer.id));
        let named = peers.map(|PeerStatus { peer, connected, last_connected, .. }| match (connected, last_connected) {
            (Some(_), _) => format!("{} (connected)", peer.name),
            (None, Some(seconds)) => {
                format!("{} (offline, last connected {})", peer.name, rfc3339(UnixTime { seconds, nanos: 0 }))
            }
            (None, None) => format!("{} (offline, not connected since the start)", peer.name),
        });
        let named: Vec<_> = named.collect();
        Ok(if named.is_empty() {
            "no other machine ever had it, as far as is known here".to_owned()
        } else {
            format!("had by {}", named.join(", "))
        })
    }
}

/// The first few of `ranges`, and how many more there are.
fn in_words(ranges: &RangeSet) -> String {
    let mut words: Vec<_> = ranges.iter().take(RANGES_NAMED).map(|range| range.to_string()).collect();
    if let Some(more) = ranges.iter().len().checked_sub(RANGES_NAMED).filter(|&more| more > 0) {
        words.push(format!("and {more} more ranges"));
    }
    words.join(", ")
}

/// The event names all of them beside.
const RANGES_NAMED: usize = 16;
