//! One question to one peer, and its answer, proven and kept while it arrives.

use std::{sync::PoisonError, time::Duration};

use blobstore::{SharedSink, StoreError};
use bytes::Bytes;
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};
use tree::{BlobId, DecodeError, Decoder, Query, RangeSet, Verified};

use crate::{
    frame::{FrameError, HAVE_BYTES_MAX, Have, StreamKind, read_frame, within},
    iroh_wire::encode_request,
    through,
};

/// In which way a peer is asked for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// For what it has.
    Direct,
    /// For what it can get, too. So many hops may be made behind it.
    Through(u8),
}

impl Way {
    /// What stands in front of the request.
    fn head(self, size: u64) -> Vec<u8> {
        match self {
            Self::Direct => vec![StreamKind::Get as u8],
            Self::Through(hops) => [&[StreamKind::Through as u8, hops][..], &size.to_le_bytes()].concat(),
        }
    }

    /// How long to wait for the next of an answer.
    pub(crate) fn stall_limit(self) -> Duration {
        match self {
            Self::Direct | Self::Through(0) => STALL_LIMIT,
            Self::Through(hops) => through::limit(hops) + THROUGH_SPARE,
        }
    }
}

/// Why a peer did not send all that was asked of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    /// The peer sent bytes that do not match the blob. Nothing unproven was kept.
    #[error("it sent wrong bytes: {0}")]
    PeerSentWrongBytes(DecodeError),
    #[error("it no longer has all of it")]
    PeerLacksIt,
    #[error("it cannot get all of it")]
    PeerCannotGetIt,
    #[error("it stalled: nothing came for {} s", .0.as_secs())]
    Stalled(Duration),
    #[error("the connection failed: {0}")]
    Connection(String),
    #[error("keep what was received")]
    Sink(#[source] StoreError),
}

/// What came from one peer.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) ranges: RangeSet,
    pub(crate) bytes: u64,
}

/// Asks which of `ranges` there are.
pub(crate) async fn have(
    connection: &quinn::Connection,
    blob: BlobId,
    ranges: &RangeSet,
) -> Result<Have, TransferError> {
    let mut recv = ask(connection, &[StreamKind::Have as u8], blob, &Query::groups(ranges)).await?;
    let answer = within(STALL_LIMIT, read_frame(&mut recv, HAVE_BYTES_MAX)).await;
    answer.map_err(|error| TransferError::Connection(tree::reason(&error)))
}

/// Sends one request, and proves and keeps the answer on a thread of its own while it arrives.
pub(crate) async fn request(
    connection: &quinn::Connection,
    way: Way,
    blob: BlobId,
    size: u64,
    query: Query,
    sink: SharedSink,
) -> (Received, Result<(), TransferError>) {
    let mut recv = match ask(connection, &way.head(size), blob, &query).await {
        Ok(recv) => recv,
        Err(error) => return (Received::default(), Err(error)),
    };
    let (arrived, arriving) = mpsc::channel(BATCHES_AHEAD);
    let keeping = spawn_blocking(move || keep(Decoder::new(blob, query).expecting(size), arriving, &sink));
    let received = receive(&mut recv, &arrived, way.stall_limit()).await;
    drop(arrived);
    let (mut kept, proven) = keeping.await.unwrap_or_else(|panic| {
        (Received::default(), Err(TransferError::Connection(format!("proving failed: {panic}"))))
    });
    if proven.is_err() {
        let _ = recv.stop(REFUSED.into());
    }
    let outcome = proven.and(received.as_ref().map(|_| ()).map_err(|error| match error {
        FrameError::Stalled(limit) => TransferError::Stalled(*limit),
        other => TransferError::Connection(other.to_string()),
    }));
    kept.bytes = kept.bytes.max(received.unwrap_or(0));
    (kept, outcome)
}

/// Opens a stream and sends what stands in front of a request, and the request.
async fn ask(
    connection: &quinn::Connection,
    head: &[u8],
    blob: BlobId,
    query: &Query,
) -> Result<quinn::RecvStream, TransferError> {
    let open = async {
        let (mut send, recv) = connection.open_bi().await.map_err(|error| tree::reason(&error))?;
        send.write_all(head).await.map_err(|error| tree::reason(&error))?;
        send.write_all(&encode_request(blob, query)).await.map_err(|error| tree::reason(&error))?;
        send.finish().map_err(|error| tree::reason(&error))?;
        Ok(recv)
    };
    timeout(STALL_LIMIT, open)
        .await
        .map_err(|_| TransferError::Stalled(STALL_LIMIT))?
        .map_err(TransferError::Connection)
}

/// Passes on what arrives until the stream ends, or nobody wants more. Returns the number of bytes. A sender that
/// trickles is given up like one that is silent.
async fn receive(
    recv: &mut quinn::RecvStream,
    arrived: &mpsc::Sender<Vec<Bytes>>,
    limit: Duration,
) -> Result<u64, FrameError> {
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
        let ended = timeout(limit, gather).await.map_err(|_| FrameError::Stalled(limit))??;
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

pub(crate) const STALL_LIMIT: Duration = Duration::from_secs(15);
/// So many bytes must come within the stall limit, unless the answer ends.
const TRICKLE_BYTES: usize = 4096;
const CHUNKS_AT_ONCE: usize = 64;
const BATCHES_AHEAD: usize = 16;
/// How much may have to be fetched again after a power cut.
const COMMIT_BYTES: u64 = 64 << 20;
/// Code of a stopped stream: what came did not prove, or could not be kept.
const REFUSED: u32 = 1;
/// So much longer than the one asked may take to get something, so that it can say that it failed.
const THROUGH_SPARE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    #[test]
    fn heads_on_the_wire() {
        assert_eq!(HEXLOWER.encode(&Way::Through(4).head(70_000)), "06047011010000000000");
        assert_eq!(HEXLOWER.encode(&Way::Direct.head(70_000)), "03");
    }
}
