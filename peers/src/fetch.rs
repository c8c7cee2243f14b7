use std::{pin::Pin, sync::PoisonError, time::Duration};

use blobstore::{Fetch, FetchError, Fetched, SharedSink, StoreError, Want};
use bytes::Bytes;
use namespace::PeerId;
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};
use tracing::{debug, warn};
use tree::{BlobId, DecodeError, Decoder, Query, RangeSet, Verified};

use crate::{
    Peers,
    asking::{Asking, Step},
    connection::live,
    dial::reach,
    frame::{FrameError, HAVE_BYTES_MAX, Have, StreamKind, read_frame, within},
    iroh_wire::{REQUEST_RANGES_MAX, encode_request},
};

/// Why a peer did not send all that was asked of it.
#[derive(Debug, thiserror::Error)]
enum TransferError {
    /// The peer sent bytes that do not match the blob. Nothing unproven was kept.
    #[error("it sent wrong bytes: {0}")]
    PeerSentWrongBytes(DecodeError),
    #[error("it no longer has all of it")]
    PeerLacksIt,
    #[error("it stalled: nothing came for {} s", STALL_LIMIT.as_secs())]
    Stalled,
    #[error("the connection failed: {0}")]
    Connection(String),
    #[error("keep what was received")]
    Sink(#[source] StoreError),
}

/// What came from one peer.
#[derive(Default)]
struct Received {
    ranges: RangeSet,
    bytes: u64,
}

impl Fetch for Peers {
    fn fetch(
        &self,
        want: Want,
        sink: SharedSink,
    ) -> Pin<Box<dyn Future<Output = Result<Fetched, FetchError>> + Send + '_>> {
        Box::pin(self.fetch_from_any(want, sink))
    }
}

impl Peers {
    /// Asks the peers that have the blob one after the other, connected ones first, each for what is still wanted.
    async fn fetch_from_any(&self, want: Want, sink: SharedSink) -> Result<Fetched, FetchError> {
        let Want { blob, size, mut ranges } = want;
        let mut fetched = Fetched::default();
        if ranges.is_empty() {
            return Ok(fetched);
        }
        let holders = self.holders(blob).await;
        if holders.is_empty() {
            return Err(FetchError::NoPeerHasIt { blob });
        }
        let mut tried = Vec::new();
        for peer in holders {
            let name = self.inner.roster.get(peer).map_or_else(|| peer.to_string(), |peer| peer.name);
            let (received, outcome) = self.fetch_from(peer, blob, size, &ranges, &sink).await;
            fetched.bytes_received += received.bytes;
            if !received.ranges.is_empty() {
                fetched.peers.push(name.clone());
            }
            ranges = ranges.difference(&received.ranges);
            match outcome {
                Ok(()) if ranges.is_empty() => return Ok(fetched),
                Ok(()) => tried.push(format!("{name}: {}", TransferError::PeerLacksIt)),
                Err(TransferError::Sink(source)) => return Err(FetchError::Sink { blob, source }),
                Err(error @ TransferError::PeerSentWrongBytes(_)) => {
                    warn!(peer = name, %blob, %error, "the next peer is asked");
                    tried.push(format!("{name}: {error}"));
                }
                Err(error) => {
                    debug!(peer = name, %blob, %error, "the next peer is asked");
                    tried.push(format!("{name}: {error}"));
                }
            }
        }
        Err(FetchError::AllFailed { blob, tried, fetched })
    }

    /// The peers that have a blob by their catalogs, connected ones first.
    pub(crate) async fn holders(&self, blob: BlobId) -> Vec<PeerId> {
        let namespace = self.inner.namespace.clone();
        let holders = spawn_blocking(move || namespace.peers_with(blob)).await;
        let mut holders: Vec<_> = holders.ok().and_then(Result::ok).unwrap_or_default();
        holders.retain(|&peer| self.inner.roster.get(peer).is_some());
        holders.sort_by_key(|&peer| live(&self.inner, peer).is_none());
        holders
    }

    /// Asks one peer for all that it has of `ranges`. What came is proven and in the sink, also if the rest did not come.
    async fn fetch_from(
        &self,
        peer: PeerId,
        blob: BlobId,
        size: u64,
        ranges: &RangeSet,
        sink: &SharedSink,
    ) -> (Received, Result<(), TransferError>) {
        let mut all = Received::default();
        let connection = match reach(&self.inner, peer, REACH_LIMIT).await {
            Ok(connection) => connection,
            Err(why) => return (all, Err(TransferError::Connection(why))),
        };
        let mut asking = Asking::new(ranges.clone());
        while let Some(step) = asking.poll(REQUEST_RANGES_MAX) {
            match step {
                Step::Get(asked) => {
                    let (received, outcome) =
                        request(&connection, blob, size, Query::groups(&asked), sink.clone()).await;
                    asking.handle_answer(&asked, &received.ranges);
                    all.bytes += received.bytes;
                    all.ranges.extend(received.ranges.iter());
                    if outcome.is_err() {
                        return (all, outcome);
                    }
                }
                Step::Have(asked) => match have(&connection, blob, &asked).await {
                    Ok(have) if have.size == size => asking.handle_have(&asked, &have.ranges, have.upto),
                    Ok(have) => {
                        debug!(%peer, %blob, size = have.size, "it has another size of it");
                        break;
                    }
                    // What came before is good; that it cannot say what else it has is no worse than if it had nothing.
                    Err(error) => {
                        debug!(%peer, %blob, %error, "it does not say what it has");
                        break;
                    }
                },
            }
        }
        (all, Ok(()))
    }
}

/// Asks which of `ranges` there are.
async fn have(connection: &quinn::Connection, blob: BlobId, ranges: &RangeSet) -> Result<Have, TransferError> {
    let mut recv = ask(connection, StreamKind::Have, blob, &Query::groups(ranges)).await?;
    let answer = within(STALL_LIMIT, read_frame(&mut recv, HAVE_BYTES_MAX)).await;
    answer.map_err(|error| TransferError::Connection(error.to_string()))
}

/// Sends one request, and proves and keeps the answer on a thread of its own while it arrives.
async fn request(
    connection: &quinn::Connection,
    blob: BlobId,
    size: u64,
    query: Query,
    sink: SharedSink,
) -> (Received, Result<(), TransferError>) {
    let mut recv = match ask(connection, StreamKind::Get, blob, &query).await {
        Ok(recv) => recv,
        Err(error) => return (Received::default(), Err(error)),
    };
    let (arrived, arriving) = mpsc::channel(BATCHES_AHEAD);
    let keeping = spawn_blocking(move || keep(Decoder::new(blob, query).expecting(size), arriving, &sink));
    let received = receive(&mut recv, &arrived).await;
    drop(arrived);
    let (mut kept, proven) = keeping.await.unwrap_or_else(|panic| {
        (Received::default(), Err(TransferError::Connection(format!("proving failed: {panic}"))))
    });
    if proven.is_err() {
        let _ = recv.stop(REFUSED.into());
    }
    let outcome = proven.and(received.as_ref().map(|_| ()).map_err(|error| match error {
        FrameError::Stalled(_) => TransferError::Stalled,
        other => TransferError::Connection(other.to_string()),
    }));
    kept.bytes = kept.bytes.max(received.unwrap_or(0));
    (kept, outcome)
}

async fn ask(
    connection: &quinn::Connection,
    kind: StreamKind,
    blob: BlobId,
    query: &Query,
) -> Result<quinn::RecvStream, TransferError> {
    let open = async {
        let (mut send, recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
        send.write_all(&[kind as u8]).await.map_err(|error| error.to_string())?;
        send.write_all(&encode_request(blob, query)).await.map_err(|error| error.to_string())?;
        send.finish().map_err(|error| error.to_string())?;
        Ok(recv)
    };
    timeout(STALL_LIMIT, open).await.map_err(|_| TransferError::Stalled)?.map_err(TransferError::Connection)
}

/// Passes on what arrives until the stream ends, or nobody wants more. Returns the number of bytes. A sender that
/// trickles is given up like one that is silent.
async fn receive(recv: &mut quinn::RecvStream, arrived: &mpsc::Sender<Vec<Bytes>>) -> Result<u64, FrameError> {
    let mut total = 0;
    loop {
        let mut arriving = Vec::new();
        let gather = async {
            let mut bytes = 0;
            while bytes < TRICKLE_BYTES {
                let mut batch = vec![Bytes::new(); CHUNKS_AT_ONCE];
                let read = recv.read_chunks(&mut batch).await.map_err(|error| FrameError::Stream(error.into()))?;
                let Some(count) = read else { return Ok(true) };
                batch.truncate(count);
                bytes += batch.iter().map(Bytes::len).sum::<usize>();
                arriving.append(&mut batch);
            }
            Ok(false)
        };
        let ended = timeout(STALL_LIMIT, gather).await.map_err(|_| FrameError::Stalled(STALL_LIMIT))??;
        total += arriving.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        if arrived.send(arriving).await.is_err() || ended {
            return Ok(total);
        }
    }
}

/// Proves what arrives and puts it into the sink; commits now and then, and at the end in any case.
fn keep(
    mut decoder: Decoder,
    mut arriving: mpsc::Receiver<Vec<Bytes>>,
    sink: &SharedSink,
) -> (Received, Result<(), TransferError>) {
    let mut received = Received::default();
    let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
    let mut run = || -> Result<(), TransferError> {
        let mut uncommitted = 0;
        while let Some(batch) = arriving.blocking_recv() {
            for chunk in batch {
                received.bytes += chunk.len() as u64;
                decoder.push(&chunk);
            }
            while let Some(item) = decoder.next().map_err(TransferError::PeerSentWrongBytes)? {
                let range = match &item {
                    Verified::Data(data) => Some(data.range()),
                    Verified::Node(_) => None,
                };
                sink.write(item).map_err(TransferError::Sink)?;
                if let Some(range) = range {
                    received.ranges.insert(range);
                    uncommitted += range.len();
                }
            }
            if uncommitted >= COMMIT_BYTES {
                uncommitted = 0;
                sink.commit().map_err(TransferError::Sink)?;
            }
        }
        Ok(())
    };
    let outcome = run();
    let committed = sink.commit().map_err(TransferError::Sink);
    (received, outcome.and(committed))
}

pub(crate) const REACH_LIMIT: Duration = Duration::from_secs(6);
pub(crate) const STALL_LIMIT: Duration = Duration::from_secs(15);
/// So many bytes must come within the stall limit, unless the answer ends.
const TRICKLE_BYTES: usize = 4096;
const CHUNKS_AT_ONCE: usize = 64;
const BATCHES_AHEAD: usize = 16;
/// How much may have to be fetched again after a power cut.
const COMMIT_BYTES: u64 = 64 << 20;
/// Code of a stopped stream: what came did not prove, or could not be kept.
const REFUSED: u32 = 1;
