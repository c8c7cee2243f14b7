use std::{collections::BTreeSet, pin::Pin, time::Duration};

use blobstore::{Fetch, FetchError, Fetched, SharedSink, Want};
use namespace::PeerId;
use tokio::task::spawn_blocking;
use tracing::{debug, warn};
use tree::{BlobId, Query, RangeSet};

use crate::{
    Peers,
    asking::{Asking, Step},
    connection::live,
    dial::reach,
    iroh_wire::REQUEST_RANGES_MAX,
    through::HOPS_MAX,
    transfer::{Received, TransferError, Way, have, request},
};

/// On whose behalf something is fetched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Behalf {
    /// The peer that asked for it, which is not asked in turn.
    pub(crate) asker: Option<PeerId>,
    /// How many hops a peer that is asked may make.
    pub(crate) hops: u8,
}

impl Behalf {
    /// On behalf of nobody else.
    pub(crate) const OWN: Self = Self { asker: None, hops: HOPS_MAX };
}

/// A fetch under way: what is wanted, and what came of it so far.
struct Progress<'a> {
    blob: BlobId,
    size: u64,
    left: RangeSet,
    sink: &'a SharedSink,
    fetched: Fetched,
    /// What each peer that was asked failed at.
    tried: Vec<String>,
    /// Those whose answer failed, who are not asked again.
    failed: BTreeSet<PeerId>,
}

impl Fetch for Peers {
    fn fetch(
        &self,
        want: Want,
        sink: SharedSink,
    ) -> Pin<Box<dyn Future<Output = Result<Fetched, FetchError>> + Send + '_>> {
        Box::pin(self.fetch_for(Behalf::OWN, want, sink))
    }
}

impl Peers {
    /// Asks the peers that have the blob one after the other, connected ones first, each for what is still wanted; and
    /// then, through those that told of them, the ones that are not on the roster or could not be reached.
    pub(crate) async fn fetch_for(&self, behalf: Behalf, want: Want, sink: SharedSink) -> Result<Fetched, FetchError> {
        let Want { blob, size, ranges: left } = want;
        let (fetched, tried, failed) = (Fetched::default(), Vec::new(), BTreeSet::new());
        let mut progress = Progress { blob, size, left, sink: &sink, fetched, tried, failed };
        if progress.left.is_empty() {
            return Ok(progress.fetched);
        }
        let (holders, mut afar) = self.origins(blob, behalf).await;
        for &peer in &holders {
            let name = self.name(peer);
            if !self.attempt(&mut progress, peer, Way::Direct, name).await? {
                afar.push(peer);
            }
            if progress.left.is_empty() {
                return Ok(progress.fetched);
            }
        }
        let relays = self.relays(afar, &progress.failed, behalf).await;
        for &(relay, origin) in &relays {
            let label = format!("{}, through {}", self.name(origin), self.name(relay));
            self.attempt(&mut progress, relay, Way::Through(behalf.hops), label).await?;
            if progress.left.is_empty() {
                return Ok(progress.fetched);
            }
        }
        if holders.is_empty() && relays.is_empty() {
            return Err(FetchError::NoPeerHasIt { blob });
        }
        let Progress { tried, fetched, .. } = progress;
        Err(FetchError::AllFailed { blob, tried, fetched })
    }

    /// The peers on the roster that have a blob by their catalogs, connected ones first.
    pub(crate) async fn holders(&self, blob: BlobId) -> Vec<PeerId> {
        self.origins(blob, Behalf::OWN).await.0
    }

    /// Whether there is anybody to ask for a blob.
    pub(crate) async fn may_get(&self, blob: BlobId, behalf: Behalf) -> bool {
        let (holders, afar) = self.origins(blob, behalf).await;
        !holders.is_empty() || !self.relays(afar, &BTreeSet::new(), behalf).await.is_empty()
    }

    /// The peers that have a blob by their catalogs: those on the roster, connected ones first; and the others.
    async fn origins(&self, blob: BlobId, behalf: Behalf) -> (Vec<PeerId>, Vec<PeerId>) {
        let namespace = self.inner.namespace.clone();
        let origins = spawn_blocking(move || namespace.peers_with(blob)).await;
        let mut origins: Vec<_> = origins.ok().and_then(Result::ok).unwrap_or_default();
        for peer in self.inner.hints.of(blob) {
            if !origins.contains(&peer) {
                origins.push(peer);
            }
        }
        origins.retain(|&peer| Some(peer) != behalf.asker);
        let (mut holders, afar): (Vec<_>, _) =
            origins.into_iter().partition(|&peer| self.inner.roster.get(peer).is_some());
        holders.sort_by_key(|&peer| live(&self.inner, peer).is_none());
        (holders, afar)
    }

    /// The peers on the roster that told of some of `origins`, each with the first of these, connected ones first.
    async fn relays(
        &self,
        mut origins: Vec<PeerId>,
        failed: &BTreeSet<PeerId>,
        behalf: Behalf,
    ) -> Vec<(PeerId, PeerId)> {
        origins.truncate(ORIGINS_LOOKED_UP);
        let namespace = self.inner.namespace.clone();
        let told = spawn_blocking(move || {
            let told = origins.into_iter().filter_map(|origin| Some((namespace.told_by(origin).ok()??, origin)));
            told.filter(|(relay, origin)| relay != origin).collect::<Vec<_>>()
        });
        let mut relays = Vec::new();
        for (relay, origin) in told.await.unwrap_or_default() {
            let may_ask = self.inner.roster.get(relay).is_some() && Some(relay) != behalf.asker;
            if may_ask && !failed.contains(&relay) && relays.iter().all(|&(known, _)| known != relay) {
                relays.push((relay, origin));
            }
        }
        relays.sort_by_key(|&(relay, _)| live(&self.inner, relay).is_none());
        relays.truncate(RELAYS_MAX);
        relays
    }

    fn name(&self, peer: PeerId) -> String {
        self.inner.roster.get(peer).map_or_else(|| peer.to_string(), |peer| peer.name)
    }

    /// Asks one peer for what is left, and takes note of what came of it; `label` says in errors who was asked. Tells
    /// whether it could be talked to.
    async fn attempt(
        &self,
        progress: &mut Progress<'_>,
        peer: PeerId,
        way: Way,
        label: String,
    ) -> Result<bool, FetchError> {
        let (received, outcome) = self.fetch_from(peer, way, progress).await;
        let blob = progress.blob;
        progress.fetched.bytes_received += received.bytes;
        if !received.ranges.is_empty() {
            progress.fetched.peers.push(self.name(peer));
        }
        progress.left = progress.left.difference(&received.ranges);
        let error = match outcome {
            Ok(()) if progress.left.is_empty() => return Ok(true),
            Ok(()) => {
                let lacks =
                    if way == Way::Direct { TransferError::PeerLacksIt } else { TransferError::PeerCannotGetIt };
                progress.tried.push(format!("{label}: {lacks}"));
                return Ok(true);
            }
            Err(TransferError::Sink(source)) => return Err(FetchError::Sink { blob, source }),
            Err(error) => error,
        };
        progress.tried.push(format!("{label}: {}", tree::reason(&error)));
        progress.failed.insert(peer);
        let was_heard = matches!(error, TransferError::PeerSentWrongBytes(_));
        if was_heard {
            warn!(peer = label, %blob, reason = tree::reason(&error), "the next peer is asked");
        } else {
            debug!(peer = label, %blob, reason = tree::reason(&error), "the next peer is asked");
        }
        Ok(was_heard)
    }

    /// Asks one peer for all that it has of what is left, or can get. What came is proven and in the sink, also if the
    /// rest did not come.
    async fn fetch_from(
        &self,
        peer: PeerId,
        way: Way,
        progress: &Progress<'_>,
    ) -> (Received, Result<(), TransferError>) {
        let Progress { blob, size, left, sink, .. } = progress;
        let (blob, size) = (*blob, *size);
        let mut all = Received::default();
        let connection = match reach(&self.inner, peer, REACH_LIMIT).await {
            Ok(connection) => connection,
            Err(why) => return (all, Err(TransferError::Connection(why))),
        };
        let mut asking = Asking::new(left.clone());
        let mut came_nothing = false;
        while let Some(step) = asking.poll(REQUEST_RANGES_MAX) {
            match step {
                Step::Get(asked) => {
                    let query = Query::groups(&asked);
                    let (received, outcome) =
                        request(&connection, way, blob, size, query, SharedSink::clone(sink)).await;
                    asking.handle_answer(&asked, &received.ranges);
                    came_nothing = received.ranges.is_empty();
                    all.bytes += received.bytes;
                    all.ranges.extend(received.ranges.iter());
                    if outcome.is_err() {
                        return (all, outcome);
                    }
                }
                // What it can get, nobody knows before it has tried; but it is not to try for nothing again and again.
                Step::Have(_) if way != Way::Direct && came_nothing => break,
                Step::Have(asked) if way != Way::Direct => asking.handle_have(&asked, &asked, u64::MAX),
                Step::Have(asked) => match have(&connection, blob, &asked).await {
                    Ok(have) if have.size == size => asking.handle_have(&asked, &have.ranges, have.upto),
                    Ok(have) => {
                        debug!(%peer, %blob, was_bytes = size, is_bytes = have.size, "it has another size of it");
                        break;
                    }
                    // What came before is good; that it cannot say what else it has is no worse than if it had nothing.
                    Err(error) => {
                        debug!(%peer, %blob, reason = tree::reason(&error), "it does not say what it has");
                        break;
                    }
                },
            }
        }
        (all, Ok(()))
    }
}

pub(crate) const REACH_LIMIT: Duration = Duration::from_secs(6);
/// So many peers are asked for what others have, for one fetch.
const RELAYS_MAX: usize = 4;
/// Of so many origins it is looked up who told of them.
const ORIGINS_LOOKED_UP: usize = 64;
