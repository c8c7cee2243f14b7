//! Bringing a blob of which something alike is here: what is here already is not sent.
//!
//! What may be some of the blob is put together, and its tree compared with the blob's, of which only the nodes above
//! differences are asked for. What is equal is copied, each piece proven as it is when it comes from a peer. First the
//! bytes that would be in the same place are tried, then those that a list of the blob's chunks finds elsewhere.
//! Whatever fails, the rest is fetched. Order and bounds: spec/wire.md, "What is here already".

use std::sync::{Arc, Mutex, PoisonError};

use blobstore::{Candidate, FetchError, Fetched, Source, Store, StoreError, in_the_same_place};
use namespace::PeerId;
use tokio::task::spawn_blocking;
use tracing::{debug, warn};
use tree::{Assembly, BlobId, Chunk, ChunkSizes, Chunker, GROUP_BYTES, Query, RangeSet, Span, Verified, clip_spans};

use crate::{
    Peers,
    bring::Counting,
    chunks::{self, ChunksRequest},
    connection::live,
    dial::reach,
    fetch::REACH_LIMIT,
    incoming::Terms,
    nodes::{self, NODES_MAX, NodesRequest},
    pace::Class,
};

impl Peers {
    /// The same as [`bring`](Self::bring), where `like` are blobs that are here, whole or in part, and may have much in
    /// common with `blob`: other versions of the same file, the likeliest first. The bytes that they share with it are
    /// copied from them, proven, and only the others are fetched. At most 4 are looked at.
    pub async fn bring_like(
        &self,
        class: Class,
        blob: BlobId,
        size: u64,
        ranges: RangeSet,
        like: &[BlobId],
        on_bytes: impl Fn(u64) + Send + 'static,
    ) -> Result<Fetched, FetchError> {
        let on_bytes = Arc::new(Mutex::new(on_bytes));
        let on_bytes = move |bytes| on_bytes.lock().unwrap_or_else(PoisonError::into_inner)(bytes);
        let received = self.reuse(blob, size, ranges.clone(), like, on_bytes.clone()).await;
        let mut fetched = self.bring(class, blob, size, ranges, on_bytes).await?;
        fetched.bytes_received += received;
        Ok(fetched)
    }

    /// The first half of that alone: copies what the blobs `like` share with `blob`, and fetches nothing but what tells that.
    /// Returns how many bytes came.
    pub async fn reuse(
        &self,
        blob: BlobId,
        size: u64,
        ranges: RangeSet,
        like: &[BlobId],
        on_bytes: impl Fn(u64) + Clone + Send + 'static,
    ) -> u64 {
        let mut reuse = Reuse { peers: self, blob, size, ranges, received: 0, on_bytes };
        if let Err(error) = reuse.run(like).await {
            debug!(%blob, reason = tree::reason(&error), "what is here already cannot be used");
        }
        reuse.received
    }
}

/// A blob for which bytes are sought here.
struct Reuse<'a, F> {
    peers: &'a Peers,
    blob: BlobId,
    size: u64,
    ranges: RangeSet,
    /// Bytes of nodes and lists that came for it.
    received: u64,
    on_bytes: F,
}

impl<F: Fn(u64) + Clone + Send + 'static> Reuse<'_, F> {
    async fn run(&mut self, like: &[BlobId]) -> Result<(), StoreError> {
        let like: Vec<_> = like.iter().copied().filter(|&like| like != self.blob).take(LIKE_MAX).collect();
        if like.is_empty() || self.size < MISSING_BYTES_LEAST {
            return Ok(());
        }
        let (ranges, on_bytes) = (self.ranges.clone(), self.on_bytes.clone());
        self.blocking(move |store, blob, size| {
            let missing = store.missing_from_cache(blob, size, &ranges)?;
            let mut sink = Counting { sink: store.partial(blob, size)?.for_later(true), on_bytes };
            store.copy_from_places(blob, size, &missing, &mut sink)
        })
        .await?;
        for &old in &like {
            let Some(missing) = self.missing(MISSING_BYTES_LEAST).await? else { return Ok(()) };
            let candidate = self.blocking(move |store, blob, size| in_place(store, blob, size, old, &missing)).await?;
            if let Some(candidate) = candidate {
                self.take(candidate).await?;
            }
        }
        let Some(missing) = self.missing(MISSING_BYTES_LEAST.max(self.size / 512)).await? else { return Ok(()) };
        let size = self.size;
        let sources = self.blocking(move |store, _, _| sources(store, &like, size)).await?;
        if sources.is_empty() {
            return Ok(());
        }
        // Both machines read their file at the same time; this one no longer than there is somebody who waits for it.
        let wanted = Arc::new(());
        let is_wanted = Arc::downgrade(&wanted);
        let list = async {
            let (assembly, received) = self.list().await;
            (assembly.map(|assembly| (assembly, wanted)), received)
        };
        let scan = self.blocking(move |store, _, size| {
            let chunks = chunks_in(store, size, &sources, &|| is_wanted.strong_count() == 0)?;
            Ok((sources, chunks))
        });
        let ((listed, received), scanned) = tokio::join!(list, scan);
        self.received += received;
        let (Some((mut assembly, _)), (sources, chunks)) = (listed, scanned?) else { return Ok(()) };
        let moved = move |store: &Store, blob, size| {
            chunks.into_iter().for_each(|Found { source, at, chunk }| assembly.offer(source, at, chunk));
            some_candidate(store, blob, size, clip_spans(&assembly.into_spans(), &missing), sources)
        };
        if let Some(candidate) = self.blocking(moved).await? {
            self.take(candidate).await?;
        }
        Ok(())
    }

    /// What is still missing, if that has so many bytes.
    async fn missing(&self, least: u64) -> Result<Option<RangeSet>, StoreError> {
        let ranges = self.ranges.clone();
        let missing = self.blocking(move |store, blob, size| store.missing_from_cache(blob, size, &ranges)).await?;
        Ok(Some(missing).filter(|missing| missing.total_bytes() >= least))
    }

    /// Compares a candidate with the blob, and copies what is equal into the cache.
    async fn take(&mut self, candidate: Candidate) -> Result<(), StoreError> {
        let (candidate, on_bytes) = (self.compare(candidate).await?, self.on_bytes.clone());
        let copied = self.blocking(move |store, blob, size| {
            if candidate.equal().is_empty() {
                return Ok(RangeSet::new());
            }
            candidate.copy(&mut Counting { sink: store.partial(blob, size)?.for_later(true), on_bytes })
        });
        let copied = copied.await?.total_bytes();
        debug!(blob = %self.blob, copied, received = self.received, "bytes that were here already");
        Ok(())
    }

    /// Asks the peers that have the blob, one after the other, for the nodes of its tree above what differs, as long as
    /// it pays.
    async fn compare(&mut self, mut candidate: Candidate) -> Result<Candidate, StoreError> {
        let groups = candidate.groups().total_bytes() / GROUP_BYTES;
        let mut asked = 0;
        for peer in self.holders().await {
            let Ok(connection) = reach(&self.peers.inner, peer, REACH_LIMIT).await else { continue };
            loop {
                let nodes = candidate.wanted(NODES_MAX);
                let equal = candidate.equal().total_bytes() / GROUP_BYTES;
                asked += nodes.len() as u64;
                if nodes.is_empty() || asked > nodes_max(groups, equal) {
                    return Ok(candidate);
                }
                let count = nodes.len();
                let request = NodesRequest { blob: self.blob, size: self.size, nodes };
                let answer = match nodes::ask(&connection, self.terms(peer), &request).await {
                    Ok(answer) => answer,
                    Err(reason) => {
                        debug!(%peer, blob = %self.blob, reason, "it does not tell its tree");
                        break;
                    }
                };
                self.received += answer.pairs.len() as u64;
                let compared = self.blocking(move |_, _, _| {
                    let (pairs, _) = answer.pairs.as_chunks();
                    let taken = candidate.descend(pairs)?;
                    Ok((candidate, taken.map(|()| pairs.len())))
                });
                let taken;
                (candidate, taken) = compared.await?;
                match taken {
                    Ok(taken) if taken >= count => {}
                    Ok(_) => break,
                    Err(error) => {
                        warn!(%peer, blob = %self.blob, reason = tree::reason(&error), "it sent a wrong tree; the next peer is asked");
                        break;
                    }
                }
            }
        }
        Ok(candidate)
    }

    /// The list of the blob's chunks, from the first peer that has one; and how many bytes came for it.
    async fn list(&self) -> (Option<Assembly>, u64) {
        let (request, mut received) = (ChunksRequest { blob: self.blob, size: self.size }, 0);
        for peer in self.holders().await {
            let Ok(connection) = reach(&self.peers.inner, peer, REACH_LIMIT).await else { continue };
            match chunks::ask(&connection, &self.terms(peer), request, &mut received).await {
                Ok(assembly) => return (Some(assembly), received),
                Err(error) => {
                    debug!(%peer, blob = %self.blob, reason = tree::reason(&error), "it has no list of its chunks")
                }
            }
        }
        (None, received)
    }

    /// The peers that may be asked about the blob: all that are connected, or else one of the others.
    async fn holders(&self) -> Vec<PeerId> {
        let mut holders = self.peers.holders(self.blob).await;
        let connected = holders.iter().take_while(|&&peer| live(&self.peers.inner, peer).is_some()).count();
        holders.truncate(connected.max(1));
        holders
    }

    /// On what terms nodes and lists come.
    fn terms(&self, peer: PeerId) -> Terms {
        Terms::plain(&self.peers.inner, peer, Class::Copy)
    }

    /// Does something with the store, the blob and its size on a thread that may wait.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store, BlobId, u64) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (store, blob, size) = (self.peers.inner.store.clone(), self.blob, self.size);
        spawn_blocking(move || work(&store, blob, size))
            .await
            .unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
    }
}

/// The place that has the most of a blob.
fn best(store: &Store, blob: BlobId) -> Result<Option<Source>, StoreError> {
    Ok(store.sources(blob)?.into_iter().rev().max_by_key(|source| source.available().total_bytes()))
}

/// What `missing` of the blob would be with the bytes that `old` has in the same places.
fn in_place(
    store: &Store,
    blob: BlobId,
    size: u64,
    old: BlobId,
    missing: &RangeSet,
) -> Result<Option<Candidate>, StoreError> {
    let Some(source) = best(store, old)? else { return Ok(None) };
    let spans: Vec<_> = in_the_same_place(0, source.available()).collect();
    some_candidate(store, blob, size, clip_spans(&spans, missing), vec![source])
}

fn some_candidate(
    store: &Store,
    blob: BlobId,
    size: u64,
    spans: Vec<Span>,
    sources: Vec<Source>,
) -> Result<Option<Candidate>, StoreError> {
    if spans.is_empty() {
        return Ok(None);
    }
    let candidate = store.candidate(blob, size, spans, sources)?;
    Ok(Some(candidate).filter(|candidate| !candidate.groups().is_empty()))
}

/// The places that have blobs in which a blob of `size` bytes is worth looking for.
fn sources(store: &Store, like: &[BlobId], size: u64) -> Result<Vec<Source>, StoreError> {
    let mut found = Vec::new();
    for &old in like {
        found.extend(best(store, old)?.filter(|source| {
            let (bytes, old) = (source.available().total_bytes(), source.size());
            bytes >= MISSING_BYTES_LEAST && old / SIZE_FACTOR_MAX <= size && size / SIZE_FACTOR_MAX <= old
        }));
    }
    Ok(found)
}

/// A chunk that is here: in which of some sources, and at which byte.
struct Found {
    source: usize,
    at: u64,
    chunk: Chunk,
}

/// The chunks that `sources` have, cut as in a blob of `size` bytes: the first so many, or fewer if it `is_over`.
fn chunks_in(
    store: &Store,
    size: u64,
    sources: &[Source],
    is_over: &dyn Fn() -> bool,
) -> Result<Vec<Found>, StoreError> {
    let mut chunks = Vec::new();
    for (number, source) in sources.iter().enumerate() {
        let mut chunker = Chunker::new(ChunkSizes::of(size));
        for item in source.prover(&Query::groups(source.available())) {
            match item {
                _ if is_over() || chunks.len() >= CHUNKS_MAX => return Ok(chunks),
                Ok(Verified::Data(data)) => chunker.push(data.offset(), data.bytes(), &mut |at, chunk| {
                    chunks.push(Found { source: number, at, chunk });
                }),
                Ok(Verified::Node(_)) => {}
                Err(error) => store.report(source, &error)?,
            }
        }
        chunker.finish(&mut |at, chunk| chunks.push(Found { source: number, at, chunk }));
    }
    Ok(chunks)
}

/// How many nodes may be asked for where so many chunk groups may be equal, and so many are known to be.
fn nodes_max(groups: u64, equal: u64) -> u64 {
    (NODES_MAX as u64 + groups / 32 + equal).min(NODES_TOTAL_MAX)
}

/// So many blobs are looked at that may be alike.
const LIKE_MAX: usize = 4;
/// Less is fetched without further ado.
const MISSING_BYTES_LEAST: u64 = 1 << 20;
/// In blobs that are so much longer or shorter no moved bytes are looked for.
const SIZE_FACTOR_MAX: u64 = 8;
/// So many chunks that are here are remembered: 40 MiB of them.
const CHUNKS_MAX: usize = 1 << 20;
/// So many nodes are asked for at most, for each comparison.
const NODES_TOTAL_MAX: u64 = 1 << 16;
