//! Going through what is shown below some places, and looking how much of it is here.

use std::{
    collections::{BTreeSet, HashMap},
    ops::ControlFlow,
    time::Instant,
};

use blobstore::Presence;
use namespace::{FileBelow, PeerId, Place};
use tree::BlobId;

use super::{
    super::Node,
    tally::{Here, Job, Tally, Why},
};
use crate::{failure::Failure, target::Target};

/// How to go through.
pub(in crate::node) struct Manner<'a> {
    /// Whether the cache is never to evict what it should have from now on.
    pub(in crate::node) pins: bool,
    /// Whether to treat every missing blob as available, even if none of its holders is connected.
    pub(in crate::node) all_reachable: bool,
    /// How many jobs are kept.
    pub(in crate::node) jobs_max: usize,
    /// What may be taken on the disk.
    pub(in crate::node) room: u64,
    /// Hears of each file that is not in place: how much of it is cached, how much is missing, and why.
    #[expect(clippy::type_complexity)]
    pub(in crate::node) each: &'a mut dyn FnMut(&Job, u64, Option<(u64, Why)>) -> Result<(), Failure>,
}

/// Who can be asked for what.
struct Reach<'a> {
    node: &'a Node,
    connected: BTreeSet<PeerId>,
    told_by: HashMap<PeerId, Option<PeerId>>,
}

impl Node {
    /// Counts what is shown at and below `places`, as of one moment. Blocks.
    pub(in crate::node) fn measure(&self, places: &[Place], manner: &mut Manner<'_>) -> Result<Tally, Failure> {
        let mut tally = Tally::new(places.len(), manner.jobs_max, manner.room);
        let mut reach = Reach { node: self, connected: self.connected(), told_by: HashMap::new() };
        let (mut page, mut outcome) = (Vec::new(), Ok(()));
        self.inner.namespace.files_below(places, &mut |place, file| {
            page.push((place, file));
            if page.len() < PAGE_FILES {
                return ControlFlow::Continue(());
            }
            outcome = self.measure_page(places, &mut page, &mut tally, &mut reach, manner);
            if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        outcome?;
        self.measure_page(places, &mut page, &mut tally, &mut reach, manner)?;
        Ok(tally)
    }

    fn measure_page(
        &self,
        places: &[Place],
        page: &mut Vec<(usize, FileBelow)>,
        tally: &mut Tally,
        reach: &mut Reach<'_>,
        manner: &mut Manner<'_>,
    ) -> Result<(), Failure> {
        let store = &self.inner.store;
        if manner.pins {
            let mut new = BTreeSet::new();
            for (_, file) in page.iter().filter(|(_, file)| !store.is_pinned(file.blob)) {
                if store.presence(file.blob)? != Presence::InPlace {
                    new.insert(file.blob);
                }
            }
            if !new.is_empty() {
                store.change_pinned(&new.into_iter().collect::<Vec<_>>(), &[])?;
            }
        }
        // Looked at behind that: what is here now, stays.
        for (number, FileBelow { path, blob, size, peers }) in page.drain(..) {
            let here = match store.presence(blob)? {
                Presence::InPlace => Here::InPlace,
                Presence::Cached => Here::Bytes(size),
                Presence::Partial(ranges) => Here::Bytes(ranges.total_bytes()),
                Presence::None => Here::Bytes(0),
            };
            let job = Job { blob, size, file: Target { arena: places[number].arena.clone(), path: Some(path) } };
            let mut failed = Ok(());
            let missing = tally.note(number, job.clone(), here, || {
                if manner.all_reachable {
                    return None;
                }
                reach.keeps(blob, &peers).unwrap_or_else(|failure| {
                    failed = Err(failure);
                    None
                })
            });
            failed?;
            if let Here::Bytes(cached) = here {
                (manner.each)(&job, cached, missing)?;
            }
        }
        Ok(())
    }

    /// The peers that are connected.
    pub(in crate::node) fn connected(&self) -> BTreeSet<PeerId> {
        let status = self.inner.peers.status().into_iter();
        status.filter(|status| status.connected.is_some()).map(|status| status.peer.id).collect()
    }
}

impl Reach<'_> {
    /// What keeps a blob from being fetched, which `peers` have at some path.
    fn keeps(&mut self, blob: BlobId, peers: &[Option<PeerId>]) -> Result<Option<Why>, Failure> {
        let mut holders: BTreeSet<PeerId> = self.node.inner.namespace.peers_with(blob)?.into_iter().collect();
        holders.extend(peers.iter().flatten());
        for &holder in &holders {
            let mut is_connected = self.connected.contains(&holder);
            if !is_connected {
                is_connected = self.relay(holder)?.is_some_and(|relay| self.connected.contains(&relay));
            }
            if is_connected {
                let failures = self.node.inner.keeping.failures();
                return Ok(failures.why_not(blob, Instant::now()).map(|reason| Why::Failed(reason.to_owned())));
            }
        }
        if holders.is_empty() {
            return Ok(Some(Why::Nobody));
        }
        let mut names: Vec<_> =
            holders.iter().take(NAMES_MAX).map(|&holder| self.node.peer_name(Some(holder))).collect();
        names.sort();
        Ok(Some(Why::Away(names)))
    }

    /// Who told of a peer.
    fn relay(&mut self, peer: PeerId) -> Result<Option<PeerId>, Failure> {
        if let Some(relay) = self.told_by.get(&peer) {
            return Ok(*relay);
        }
        let relay = self.node.inner.namespace.told_by(peer)?;
        self.told_by.insert(peer, relay);
        Ok(relay)
    }
}

/// So many files are looked at together.
const PAGE_FILES: usize = 4096;
/// So many machines are named that have something and are not connected.
const NAMES_MAX: usize = 4;
