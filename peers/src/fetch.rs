use std::{collections::BTreeSet, pin::Pin, sync::Arc, time::Duration};

use blobstore::{Fetch, FetchError, Fetched, SharedSink, Want};
use namespace::PeerId;
use tokio::task::spawn_blocking;
use tree::BlobId;

use crate::{
    Peers,
    connection::live,
    counting::Counts,
    pace::Class,
    sharing::{Asked, Sharing},
    through::HOPS_MAX,
    transfer::Way,
};

/// On whose behalf something is fetched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Behalf {
    /// The peer that asked for it, which is not asked in turn.
    pub(crate) asker: Option<PeerId>,
    /// How many hops a peer that is asked may make.
    pub(crate) hops: u8,
    /// What it is for.
    pub(crate) class: Class,
}

impl Behalf {
    /// On behalf of nobody else.
    pub(crate) fn own(class: Class) -> Self {
        Self { asker: None, hops: HOPS_MAX, class }
    }
}

impl Fetch for Peers {
    fn fetch(
        &self,
        want: Want,
        sink: SharedSink,
    ) -> Pin<Box<dyn Future<Output = Result<Fetched, FetchError>> + Send + '_>> {
        Box::pin(self.fetch_for(Behalf::own(Class::Copy), want, sink))
    }

    fn received_bytes(&self) -> u64 {
        self.inner.counts.received()
    }
}

impl Peers {
    /// Returns the counts of all answers since the start.
    pub fn counts(&self) -> Arc<Counts> {
        self.inner.counts.clone()
    }

    /// The same as [`Fetch::fetch`], which is of the class of copies, for something else.
    pub async fn fetch_as(&self, class: Class, want: Want, sink: SharedSink) -> Result<Fetched, FetchError> {
        self.fetch_for(Behalf::own(class), want, sink).await
    }

    /// Asks all connected peers that have the blob, sharing it among them; then those that are not connected, or at the same
    /// time if it is large; and then, through those that told of them, the ones that are not on the roster or could not
    /// be reached.
    pub(crate) async fn fetch_for(&self, behalf: Behalf, want: Want, sink: SharedSink) -> Result<Fetched, FetchError> {
        let mut sharing = Sharing::new(self, behalf.class, want, sink);
        if sharing.left.is_empty() {
            return Ok(sharing.fetched);
        }
        let (holders, mut afar) = self.origins(sharing.blob, behalf).await;
        let connected = holders.iter().filter(|&&peer| live(&self.inner, peer).is_some()).count();
        let (near, far) = match sharing.left.total_bytes() {
            bytes if bytes >= LARGE_BYTES => (&holders[..], &[][..]),
            _ => holders.split_at(connected),
        };
        for group in [near, far] {
            let sources = group.iter().map(|&peer| Asked { peer, way: Way::Direct, label: self.name(peer) });
            let unheard = sharing.ask(sources.collect()).await?;
            if sharing.left.is_empty() {
                return Ok(sharing.fetched);
            }
            afar.extend(unheard);
        }
        let relays = self.relays(afar, &sharing.failed, behalf).await;
        for &(relay, origin) in &relays {
            let label = format!("{}, through {}", self.name(origin), self.name(relay));
            sharing.ask(vec![Asked { peer: relay, way: Way::Through(behalf.hops), label }]).await?;
            if sharing.left.is_empty() {
                return Ok(sharing.fetched);
            }
        }
        if holders.is_empty() && relays.is_empty() {
            return Err(FetchError::NoPeerHasIt { blob: sharing.blob });
        }
        let Sharing { blob, tried, fetched, .. } = sharing;
        Err(FetchError::AllFailed { blob, tried, fetched })
    }

    /// The peers on the roster that have a blob by their catalogs, connected ones first.
    pub(crate) async fn holders(&self, blob: BlobId) -> Vec<PeerId> {
        self.origins(blob, Behalf::own(Class::Background)).await.0
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

    pub(crate) fn name(&self, peer: PeerId) -> String {
        self.inner.roster.get(peer).map_or_else(|| peer.to_string(), |peer| peer.name)
    }
}

pub(crate) const REACH_LIMIT: Duration = Duration::from_secs(6);
/// Of so much it pays to wake peers that are not connected.
const LARGE_BYTES: u64 = 16 << 20;
/// So many peers are asked for what others have, for one fetch.
const RELAYS_MAX: usize = 4;
/// Of so many origins it is looked up who told of them.
const ORIGINS_LOOKED_UP: usize = 64;
