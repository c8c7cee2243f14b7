//! Small blobs travel many on one stream: a round trip for each would cost more than their bytes.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use blobstore::{Collected, FetchError, Fetched, SmallBlob, Store, StoreError, Want};
use bytes::Bytes;
use futures_util::{StreamExt, future::join_all, stream};
use namespace::PeerId;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tracing::{debug, warn};
use tree::{BlobId, DecodeError, Decoder, GROUP_BYTES, Geometry, Query, Verified, VerifiedData};

use crate::{
    Peers,
    answer::Places,
    connection::live,
    endpoint::{GREETING_LIMIT, Inner},
    fetch::Behalf,
    frame::{FrameError, GREETING_BYTES_MAX, StreamKind, open_with_frame, read_frame, within},
    incoming::{Incoming, Terms},
    outgoing::Outgoing,
    pace::Class,
    transfer::STALL_LIMIT,
};

/// Asks for whole small blobs, on a [`StreamKind::Batch`] stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchRequest {
    /// Each with its size in bytes; at most [`BLOBS_MAX`], of at most [`BLOB_BYTES_MAX`] bytes each.
    pub blobs: Vec<(BlobId, u64)>,
}

/// A whole small blob, in pieces, in order; and how it came.
pub type Small = (Vec<VerifiedData>, Fetched);

impl Peers {
    /// Fetches whole blobs into memory, each named with its size; those of at most [`BLOB_BYTES_MAX`] bytes travel many at a
    /// time. Returns what came of each, in order. How much that is together, is the caller's to bound.
    pub async fn fetch_small(&self, class: Class, blobs: &[(BlobId, u64)]) -> Vec<Result<Small, FetchError>> {
        let came = self.fetch_together(class, blobs).await;
        // What the first who was asked did not have, others may.
        let rest = came.into_iter().zip(blobs.iter().copied()).map(|(came, (blob, size))| async move {
            match came {
                Some(small) => Ok(small),
                None => self.fetch_alone(class, blob, size).await,
            }
        });
        stream::iter(rest).buffered(ALONE_AT_ONCE).collect().await
    }

    /// The same for what connected peers send many at a time. Returns what came, in order: `None` for what is longer than
    /// that, what nobody who is connected is known to have, and what did not come or prove. A peer that takes no request
    /// for 15 s, or of which nothing comes for 5 s, is given up.
    pub async fn fetch_together(&self, class: Class, blobs: &[(BlobId, u64)]) -> Vec<Option<Small>> {
        let small = |(pieces, fetched): (Vec<Verified>, Fetched)| {
            let data = pieces.into_iter().filter_map(|piece| match piece {
                Verified::Data(data) => Some(data),
                Verified::Node(_) => None,
            });
            (data.collect(), fetched)
        };
        let came = self.fetch_batches(class, blobs).await;
        came.into_iter().map(|came| came.map(small)).collect()
    }

    /// Brings whole blobs into the cache, each named with its size; those of at most [`BLOB_BYTES_MAX`] bytes travel many at a
    /// time, and are made durable many at a time. Returns what came of each, in order. The caller is
    /// [alone with](Self::alone_with) all of them, of which nothing is here yet, and sees to it that they are not evicted.
    pub async fn bring_small(&self, class: Class, blobs: &[(BlobId, u64)]) -> Vec<Result<Fetched, FetchError>> {
        let came = self.fetch_batches(class, blobs).await;
        let (mut small, mut outcomes) = (Vec::new(), Vec::new());
        for (came, &(blob, size)) in came.into_iter().zip(blobs) {
            outcomes.push(came.map(|(pieces, fetched)| {
                small.push(SmallBlob { blob, size, pieces });
                fetched
            }));
        }
        let store = self.inner.store.clone();
        let kept = match spawn_blocking(move || store.keep_small(small)).await {
            Ok(kept) => kept,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let mut kept = kept.into_iter();
        let mut rest = Vec::new();
        for (outcome, &(blob, size)) in outcomes.into_iter().zip(blobs) {
            let outcome = outcome.map(|fetched| {
                let kept = kept.next().unwrap_or(Ok(()));
                kept.map(|()| fetched).map_err(|source| FetchError::Sink { blob, source })
            });
            rest.push(async move {
                match outcome {
                    Some(outcome) => outcome,
                    None => self.bring(class, blob, size, Geometry::new(size).all().into(), |_| {}).await,
                }
            });
        }
        stream::iter(rest).buffered(ALONE_AT_ONCE).collect().await
    }

    /// Asks for the blobs that connected peers have, many at a time. Gives those that came, proven, in order.
    async fn fetch_batches(&self, class: Class, blobs: &[(BlobId, u64)]) -> Vec<Option<(Vec<Verified>, Fetched)>> {
        let mut came: Vec<_> = blobs.iter().map(|_| None).collect();
        let batches = self.assign(blobs).await;
        let exchanges = batches.into_iter().map(|(peer, connection, numbers)| async move {
            let asked: Vec<_> = numbers.iter().map(|&number| blobs[number]).collect();
            let terms = Terms::new(&self.inner, peer, class);
            (peer, exchange(&connection, terms, asked).await, numbers)
        });
        for (peer, (answers, outcome), numbers) in join_all(exchanges).await {
            let name = self.name(peer);
            if let Err(error) = outcome {
                debug!(peer = name, reason = error, "the rest of a batch is asked for one by one");
            }
            for (number, answer) in numbers.into_iter().zip(answers) {
                match answer {
                    Ok(Some((pieces, bytes_received))) => {
                        came[number] = Some((pieces, Fetched { bytes_received, peers: vec![name.clone()] }));
                    }
                    Ok(None) => {}
                    Err(error) => {
                        warn!(peer = name, blob = %blobs[number].0, reason = tree::reason(&error), "it sent wrong bytes; it is asked for alone");
                    }
                }
            }
        }
        came
    }

    async fn fetch_alone(&self, class: Class, blob: BlobId, size: u64) -> Result<Small, FetchError> {
        // With the last chunk group, the size is proven too.
        let geometry = Geometry::new(size);
        let ranges = [geometry.all(), geometry.last_group()].into_iter().collect();
        let collected = Arc::new(Mutex::new(Collected::default()));
        let fetched = self.fetch_for(Behalf::own(class), Want { blob, size, ranges }, collected.clone()).await?;
        let mut pieces = std::mem::take(&mut collected.lock().unwrap_or_else(PoisonError::into_inner).pieces);
        pieces.sort_by_key(VerifiedData::offset);
        Ok((pieces, fetched))
    }

    /// Whom to ask for which of some blobs, by their numbers: connected peers that have them by their catalogs, none much
    /// more than the others; in batches that may be asked for at a time.
    async fn assign(&self, blobs: &[(BlobId, u64)]) -> Vec<(PeerId, quinn::Connection, Vec<usize>)> {
        let (namespace, asked) = (self.inner.namespace.clone(), blobs.to_vec());
        let holders = spawn_blocking(move || {
            let peers_with = |&(blob, _): &(BlobId, u64)| namespace.peers_with(blob).unwrap_or_default();
            asked.iter().map(peers_with).collect::<Vec<_>>()
        });
        let mut load: BTreeMap<PeerId, (u64, quinn::Connection, Vec<usize>)> = BTreeMap::new();
        let mut batches = Vec::new();
        for (number, holders) in holders.await.unwrap_or_default().into_iter().enumerate() {
            let (blob, size) = blobs[number];
            let hinted = self.inner.hints.of(blob);
            let connected = holders.into_iter().chain(hinted).filter_map(|peer| Some((peer, live(&self.inner, peer)?)));
            let least = connected.min_by_key(|(peer, _)| load.get(peer).map_or(0, |(bytes, ..)| *bytes));
            let Some((peer, connection)) = least.filter(|_| size <= BLOB_BYTES_MAX) else { continue };
            let (bytes, connection, numbers) = load.entry(peer).or_insert((0, connection, Vec::new()));
            numbers.push(number);
            *bytes += size;
            if numbers.len() == BLOBS_MAX {
                batches.push((peer, connection.clone(), std::mem::take(numbers)));
            }
        }
        batches.extend(load.into_iter().map(|(peer, (_, connection, numbers))| (peer, connection, numbers)));
        batches.retain(|(.., numbers)| !numbers.is_empty());
        batches
    }
}

/// A proven blob and the bytes that came for it; `None` if it did not come.
type Answer = Result<Option<(Vec<Verified>, u64)>, DecodeError>;

/// Asks a peer for a batch. Returns what came of each, as far as the answer went.
async fn exchange(
    connection: &quinn::Connection,
    terms: Terms,
    asked: Vec<(BlobId, u64)>,
) -> (Vec<Answer>, Result<(), String>) {
    let mut came = Vec::new();
    let outcome = receive(connection, terms.clone(), &asked, &mut came).await;
    let proving = spawn_blocking(move || {
        let prove = |(came, &(blob, size)): (Option<Vec<u8>>, _)| {
            let Some(encoded) = came else { return Ok(None) };
            let proven = prove(blob, size, &encoded);
            if !matches!(proven, Ok(Some(_))) {
                terms.waste(encoded.len() as u64);
            }
            proven
        };
        came.into_iter().zip(&asked).map(prove).collect()
    });
    match proving.await {
        Ok(answers) => (answers, outcome),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Reads the encodings of the blobs that the peer has.
async fn receive(
    connection: &quinn::Connection,
    terms: Terms,
    asked: &[(BlobId, u64)],
    came: &mut Vec<Option<Vec<u8>>>,
) -> Result<(), String> {
    let (head, request) = ([StreamKind::Batch as u8, terms.manner.byte()], BatchRequest { blobs: asked.to_vec() });
    let open = open_with_frame(connection, &head, &request);
    let recv = within(STALL_LIMIT, open).await.map_err(|error| tree::reason(&error))?;
    let mut incoming = Incoming::new(terms, recv, SILENCE_LIMIT);
    for &(_, size) in asked {
        let mut has = [0];
        incoming.read_exact(&mut has).await?;
        let mut encoded = (has != [0]).then(|| vec![0; encoded_bytes(size)]);
        if let Some(encoded) = &mut encoded {
            incoming.read_exact(encoded).await?;
        }
        incoming.used();
        came.push(encoded);
    }
    Ok(())
}

/// The pieces of a blob, of whose encoding all is here.
fn prove(blob: BlobId, size: u64, encoded: &[u8]) -> Answer {
    let mut decoder = Decoder::new(blob, Query::all()).expecting(size);
    decoder.push(encoded);
    let mut pieces = Vec::new();
    while let Some(piece) = decoder.next()? {
        pieces.push(piece);
    }
    Ok(decoder.is_finished().then_some((pieces, encoded.len() as u64)))
}

/// Answers a request for small blobs, in the order in which they were asked for. What is not here whole, or does not
/// prove, is told not to be.
pub(crate) async fn serve_batch(
    inner: &Inner,
    mut to: Outgoing,
    mut recv: quinn::RecvStream,
) -> Result<(), FrameError> {
    let BatchRequest { blobs } = within(GREETING_LIMIT, read_frame(&mut recv, GREETING_BYTES_MAX)).await?;
    let store = inner.store.clone();
    to.fill(move |filler| {
        let mut pieces = blobs.iter().take(BLOBS_MAX).flat_map(|&(blob, size)| {
            let encoded = read_one(&store, blob, size).unwrap_or_else(|error| {
                warn!(%blob, reason = tree::reason(&error), "cannot be read");
                None
            });
            let has = Bytes::from_static(if encoded.is_some() { &[1] } else { &[0] });
            std::iter::once(has).chain(encoded.into_iter().flatten())
        });
        let _ = pieces.try_for_each(|piece| filler.push(piece));
        Ok(())
    })
    .await?;
    let _ = to.stream.finish();
    Ok(())
}

/// The encoding of a small blob, proven to its end; `None` if it is not here whole.
fn read_one(store: &Store, blob: BlobId, size: u64) -> Result<Option<Vec<Bytes>>, StoreError> {
    if size > BLOB_BYTES_MAX {
        return Ok(None);
    }
    let Some(mut places) = Places::open(store, blob)?.filter(|places| places.size() == size) else {
        return Ok(None);
    };
    let mut encoded = vec![Bytes::copy_from_slice(&size.to_le_bytes())];
    let left = places.answer(store, &Query::all(), 0, &mut |piece| {
        encoded.push(piece.into_wire_bytes());
        ControlFlow::Continue(())
    })?;
    Ok(left.is_none().then_some(encoded))
}

/// How long the encoding of a whole blob of `size` bytes is: the size, a pair for each border between chunk groups, and
/// the bytes.
fn encoded_bytes(size: u64) -> usize {
    let pairs = size.div_ceil(GROUP_BYTES).saturating_sub(1);
    (8 + 64 * pairs + size) as usize
}

/// The most blobs that are asked for at a time.
pub const BLOBS_MAX: usize = 256;
/// The longest blob that is asked for in a batch, in bytes.
pub const BLOB_BYTES_MAX: u64 = 128 << 10;
/// Others may have what does not come, and it is asked for again.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// What did not come in a batch is asked for so many at a time.
const ALONE_AT_ONCE: usize = 8;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    #[test]
    fn on_the_wire() {
        let request = BatchRequest { blobs: vec![(BlobId::EMPTY, 0), (BlobId::from_bytes([7; 32]), 70_000)] };
        let hex = format!("02{}00{}f0a204", BlobId::EMPTY, "07".repeat(32));
        assert_eq!(HEXLOWER.encode(&postcard::to_stdvec(&request).unwrap()), hex);
        let most = BatchRequest { blobs: vec![(BlobId::EMPTY, BLOB_BYTES_MAX); BLOBS_MAX] };
        assert!(postcard::to_stdvec(&most).unwrap().len() <= GREETING_BYTES_MAX);
    }

    #[test]
    fn the_length_of_an_encoding_is_known() {
        for size in [0, 1, GROUP_BYTES - 1, GROUP_BYTES, GROUP_BYTES + 1, 5 * GROUP_BYTES, BLOB_BYTES_MAX] {
            let bytes = vec![3; size as usize];
            let hashed = tree::hash(&bytes[..], size).unwrap();
            let prover = tree::Prover::new(hashed.id, size, &bytes[..], &hashed.outboard[..], &Query::all());
            let encoded: usize = prover.map(|piece| piece.unwrap().wire_bytes().len()).sum();
            assert_eq!(encoded_bytes(size), 8 + encoded, "{size}");
        }
    }
}
