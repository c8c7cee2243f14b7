//! One question to one peer, and its answer, proven and kept while it arrives.

use std::{
    pin::pin,
    sync::{
        PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::sync_channel,
    },
    thread,
    time::Duration,
};

use blobstore::{SharedSink, StoreError};
use bytes::Bytes;
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};
use tree::{BlobId, DecodeError, Decoder, Query, RangeSet, Verified, VerifiedData};

use crate::{
    frame::{FrameError, HAVE_BYTES_MAX, Have, StreamKind},
    incoming::{Incoming, Terms},
    iroh_wire::encode_request,
    outgoing::Manner,
    packing::{UnpackError, Unpacker},
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
    fn head(self, manner: Manner, size: u64) -> Vec<u8> {
        match self {
            Self::Direct => vec![StreamKind::Get as u8, manner.byte()],
            Self::Through(hops) => {
                [&[StreamKind::Through as u8, manner.byte(), hops][..], &size.to_le_bytes()].concat()
            }
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
    #[error("it sent what cannot be unpacked: {0}")]
    PeerSentNoFrame(#[from] UnpackError),
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

impl TransferError {
    /// Whether the peer was talked to, and sent what it never should.
    pub(crate) fn is_fault(&self) -> bool {
        matches!(self, Self::PeerSentWrongBytes(_) | Self::PeerSentNoFrame(_))
    }
}

/// What came from one peer.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) ranges: RangeSet,
    /// All that was read.
    pub(crate) bytes: u64,
}

/// Asks which of `ranges` there are.
pub(crate) async fn have(
    connection: &quinn::Connection,
    terms: Terms,
    blob: BlobId,
    ranges: &RangeSet,
) -> Result<Have, TransferError> {
    let recv = ask(connection, &[StreamKind::Have as u8], blob, &Query::groups(ranges)).await?;
    let answer = Incoming::new(terms, recv, STALL_LIMIT).read_frame(HAVE_BYTES_MAX).await;
    answer.map_err(TransferError::Connection)
}

/// One question for bytes to one peer.
pub(crate) struct Request<'a> {
    pub(crate) connection: &'a quinn::Connection,
    pub(crate) terms: Terms,
    pub(crate) way: Way,
    pub(crate) blob: BlobId,
    pub(crate) size: u64,
    pub(crate) query: Query,
}

impl Request<'_> {
    /// Sends it, and proves and keeps the answer on a thread of its own while it arrives. `came` hears what was put into the
    /// sink. The answer is broken off once `needless` is over. Either way, and after a failure too, what was put into the
    /// sink is committed on return.
    pub(crate) async fn run(
        self,
        sink: &SharedSink,
        came: impl Fn(&RangeSet) + Send + 'static,
        needless: impl Future<Output = ()>,
    ) -> (Received, Result<(), TransferError>) {
        let Self { connection, terms, way, blob, size, query } = self;
        let mut needless = pin!(needless);
        let head = way.head(terms.manner, size);
        let asked = tokio::select! {
            asked = ask(connection, &head, blob, &query) => asked,
            () = &mut needless => return (Received::default(), Ok(())),
        };
        let mut recv = match asked {
            Ok(recv) => recv,
            Err(error) => return (Received::default(), Err(error)),
        };
        let much = query.resolve_bytes(size).total_bytes() >= MUCH_BYTES;
        let (arrived, arriving) = mpsc::channel(BATCHES_AHEAD);
        let (decoder, sink, unpacker) = (Decoder::new(blob, query).expecting(size), sink.clone(), terms.unpacker());
        let pieces = Pieces { arriving, unpacker, decoder, bytes: 0, used_bytes: 0 };
        let keeping = spawn_blocking(move || keep(pieces, much, &sink, &came));
        let read_bytes = AtomicU64::new(0);
        let received = tokio::select! {
            received = receive(&mut recv, &terms, &arrived, way.stall_limit(), &read_bytes) => received,
            () = needless => Ok(()),
        };
        drop(arrived);
        let (mut kept, proven) = keeping.await.unwrap_or_else(|panic| {
            (Received::default(), Err(TransferError::Connection(format!("proving failed: {panic}"))))
        });
        if proven.is_err() {
            let _ = recv.stop(REFUSED.into());
        }
        let outcome = proven.and(received.map_err(|error| match error {
            FrameError::Stalled(limit) => TransferError::Stalled(limit),
            other => TransferError::Connection(other.to_string()),
        }));
        // What came and was not proven counts, too.
        let used_bytes = std::mem::replace(&mut kept.bytes, read_bytes.into_inner());
        terms.waste(kept.bytes.saturating_sub(used_bytes));
        (kept, outcome)
    }
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

/// Passes on what arrives until the stream ends, or nobody wants more. Counts the bytes in `read_bytes`. A sender that
/// trickles is given up like one that is silent.
async fn receive(
    recv: &mut quinn::RecvStream,
    terms: &Terms,
    arrived: &mpsc::Sender<Vec<Bytes>>,
    limit: Duration,
    read_bytes: &AtomicU64,
) -> Result<(), FrameError> {
    loop {
        let mut arriving = Vec::new();
        let gather = async {
            let mut bytes = 0;
            while bytes < TRICKLE_BYTES {
                let mut batch = vec![Bytes::new(); CHUNKS_AT_ONCE];
                let read = recv.read_chunks(&mut batch).await.map_err(|error| FrameError::Stream(error.into()))?;
                let Some(count) = read else { return Ok(true) };
                batch.truncate(count);
                let len = batch.iter().map(Bytes::len).sum::<usize>();
                read_bytes.fetch_add(len as u64, Ordering::Relaxed);
                terms.count(len);
                bytes += len;
                arriving.append(&mut batch);
            }
            Ok(false)
        };
        let ended = timeout(limit, gather).await.map_err(|_| FrameError::Stalled(limit))??;
        let bytes = arriving.iter().map(Bytes::len).sum();
        terms.pace(bytes).await;
        if arrived.send(arriving).await.is_err() || ended {
            return Ok(());
        }
    }
}

/// The pieces of an answer, proven one by one.
struct Pieces {
    arriving: mpsc::Receiver<Vec<Bytes>>,
    unpacker: Option<Unpacker>,
    decoder: Decoder,
    /// How many bytes were taken from what arrives; and by the time the last piece was proven.
    bytes: u64,
    used_bytes: u64,
}

impl Pieces {
    /// The next one; `None` if the answer is over, or, unless this `waits`, if it has not come yet. No more than a frame is
    /// unpacked ahead of it.
    fn next(&mut self, waits: bool) -> Result<Option<Verified>, TransferError> {
        loop {
            if let Some(piece) = self.decoder.next().map_err(TransferError::PeerSentWrongBytes)? {
                self.used_bytes = self.bytes;
                return Ok(Some(piece));
            }
            if let Some(plain) = self.unpacker.as_mut().map_or(Ok(None), Unpacker::next)? {
                self.decoder.push(&plain);
                continue;
            }
            let batch = if waits { self.arriving.blocking_recv() } else { self.arriving.try_recv().ok() };
            let Some(batch) = batch else { return Ok(None) };
            for chunk in batch {
                self.bytes += chunk.len() as u64;
                match &mut self.unpacker {
                    Some(unpacker) => unpacker.push(chunk),
                    None => self.decoder.push(&chunk),
                }
            }
        }
    }

    /// What has come by now, but at least one piece, and about 1 MiB at most, unless that is the end.
    fn some(&mut self) -> Proven {
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        let mut end = None;
        while bytes < WRITE_BYTES && end.is_none() {
            match self.next(pieces.is_empty()) {
                Ok(Some(piece)) => {
                    bytes += piece.wire_bytes().len();
                    pieces.push(piece);
                }
                Ok(None) if pieces.is_empty() => end = Some(Ok(())),
                Ok(None) => break,
                Err(error) => end = Some(Err(error)),
            }
        }
        Proven { pieces, end }
    }
}

/// Some of an answer.
struct Proven {
    pieces: Vec<Verified>,
    /// How it ended, if nothing comes behind these.
    end: Option<Result<(), TransferError>>,
}

/// Proves what arrives and puts it into the sink. Of what is `much`, the next is proven while the disk takes the last.
fn keep(
    mut pieces: Pieces,
    much: bool,
    sink: &SharedSink,
    came: &dyn Fn(&RangeSet),
) -> (Received, Result<(), TransferError>) {
    let (ranges, outcome) = if much {
        let (proven, next) = sync_channel(1);
        thread::scope(|scope| {
            let prove = || {
                let proven = proven;
                loop {
                    let some = pieces.some();
                    let is_last = some.end.is_some();
                    if proven.send(some).is_err() || is_last {
                        return;
                    }
                }
            };
            scope.spawn(prove);
            // Where the sink fails, the channel goes with this closure, and whoever proves stops.
            let next = move || next.recv().unwrap_or(Proven { pieces: Vec::new(), end: Some(Ok(())) });
            put(next, sink, came)
        })
    } else {
        put(|| pieces.some(), sink, came)
    };
    let used_bytes = if pieces.decoder.is_finished() { pieces.bytes } else { pieces.used_bytes };
    (Received { ranges, bytes: used_bytes }, outcome)
}

/// Puts what is proven into the sink, some by some until it ends; commits now and then, and at the
/// end in any case. Others may put pieces of the same blob into it meanwhile. Returns what was put there.
fn put(
    mut next: impl FnMut() -> Proven,
    sink: &SharedSink,
    came: &dyn Fn(&RangeSet),
) -> (RangeSet, Result<(), TransferError>) {
    let mut ranges = RangeSet::new();
    let lock = || sink.lock().unwrap_or_else(PoisonError::into_inner);
    let mut run = || -> Result<(), TransferError> {
        let mut uncommitted = 0;
        loop {
            let Proven { pieces, end } = next();
            if !pieces.is_empty() {
                let new: RangeSet = pieces.iter().filter_map(Verified::data).map(VerifiedData::range).collect();
                let mut sink = lock();
                sink.write(&pieces).map_err(TransferError::Sink)?;
                uncommitted += new.total_bytes();
                if uncommitted >= COMMIT_BYTES {
                    uncommitted = 0;
                    sink.commit().map_err(TransferError::Sink)?;
                }
                drop(sink);
                ranges.extend(new.iter());
                came(&new);
            }
            if let Some(end) = end {
                return end;
            }
        }
    };
    let outcome = run();
    let committed = lock().commit().map_err(TransferError::Sink);
    (ranges, outcome.and(committed))
}

pub(crate) const STALL_LIMIT: Duration = Duration::from_secs(15);
/// So many bytes must come within the stall limit, unless the answer ends.
pub(crate) const TRICKLE_BYTES: usize = 4096;
const CHUNKS_AT_ONCE: usize = 64;
const BATCHES_AHEAD: usize = 16;
/// So much is worth a thread that proves it.
const MUCH_BYTES: u64 = 8 << 20;
/// About so much is written at a time, if it comes fast enough.
const WRITE_BYTES: usize = 1 << 20;
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
    use crate::pace::Class;

    #[test]
    fn heads_on_the_wire() {
        let manner = Manner { class: Class::Copy, packed: true };
        assert_eq!(HEXLOWER.encode(&Way::Through(4).head(manner, 70_000)), "0681047011010000000000");
        assert_eq!(HEXLOWER.encode(&Way::Direct.head(manner, 70_000)), "0381");
    }
}
