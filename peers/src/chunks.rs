//! How blobs are cut by their content, for whoever wants to find their bytes in others.
//! Order and bounds: spec/wire.md, "Chunk streams".

use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use blobstore::{Store, StoreError};
use postcard::ser_flavors::Size;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, mpsc},
    task::spawn_blocking,
    time::timeout,
};
use tracing::{debug, warn};
use tree::{Assembly, BlobId, Chunk, ChunkListError, ChunkSizes, Chunker, Query, Verified};

use crate::{
    answer::Places,
    endpoint::{GREETING_LIMIT, Inner},
    frame::{CHUNKS_BYTES_MAX, FrameError, GREETING_BYTES_MAX, StreamKind, open_with_frame, read_frame, within},
    incoming::Terms,
    outgoing::Outgoing,
    transfer::STALL_LIMIT,
};

/// Asks for the content-defined chunks of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunksRequest {
    /// The blob.
    pub blob: BlobId,
    /// Its size in bytes, which decides how long chunks are.
    pub size: u64,
}

/// The next chunks of the blob that was asked for. None, and not the last: they are still being looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunks {
    /// In the order of the blob.
    pub chunks: Vec<Chunk>,
    /// Whether these are the last ones.
    pub is_last: bool,
}

/// Why there is no list of chunks to be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListError {
    /// The peer sent what cannot be a list of that blob.
    #[error("it sent an impossible list: {0}")]
    Invalid(#[from] ChunkListError),
    #[error("it sent the list of a shorter blob")]
    Short,
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// What lists of chunks may take of this machine.
pub(crate) struct Listing {
    answers: Arc<Semaphore>,
    scans: Arc<Semaphore>,
}

impl Default for Listing {
    fn default() -> Self {
        let permits = |count| Arc::new(Semaphore::new(count));
        Self { answers: permits(ANSWERS_AT_ONCE), scans: permits(SCANS_AT_ONCE) }
    }
}

/// Asks a peer for the chunks of a blob. What it says is taken as it is; `bytes` counts what came.
pub(crate) async fn ask(
    connection: &quinn::Connection,
    terms: &Terms,
    request: ChunksRequest,
    bytes: &mut u64,
) -> Result<Assembly, ListError> {
    // What a limit here takes does not count.
    let (limit, mut spent) = (limit(request.size), Duration::ZERO);
    let began = Instant::now();
    let mut recv = within(STALL_LIMIT, open_with_frame(connection, &[StreamKind::Chunks as u8], &request)).await?;
    let mut assembly = Assembly::new(request.size);
    loop {
        let part: Chunks = within(STALL_LIMIT, read_frame(&mut recv, CHUNKS_BYTES_MAX)).await?;
        let came = postcard::serialize_with_flavor(&part, Size::default()).map_or(0, |bytes| bytes + 4);
        *bytes += came as u64;
        let waits = Instant::now();
        terms.count(came);
        terms.pace(came).await;
        spent += waits.elapsed();
        if began.elapsed().saturating_sub(spent) > limit {
            return Err(FrameError::Stalled(limit).into());
        }
        assembly.list(&part.chunks)?;
        if part.is_last {
            return if assembly.is_complete() { Ok(assembly) } else { Err(ListError::Short) };
        }
    }
}

/// Answers one question for the chunks of a blob. Ends without the last of them if there is no list to be had.
pub(crate) async fn serve_chunks(
    inner: &Arc<Inner>,
    mut to: Outgoing,
    mut recv: quinn::RecvStream,
) -> Result<(), FrameError> {
    let request: ChunksRequest = within(GREETING_LIMIT, read_frame(&mut recv, GREETING_BYTES_MAX)).await?;
    let (parts, mut ready) = mpsc::channel(1);
    let producing = tokio::spawn(produce(inner.clone(), request, parts));
    loop {
        let part = match timeout(KEEP_ALIVE, ready.recv()).await {
            Ok(Some(part)) => part,
            Ok(None) => break,
            Err(_) => Chunks::default(),
        };
        to.send_frame(&part).await?;
    }
    let _ = to.stream.finish();
    match producing.await {
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        _ => Ok(()),
    }
}

/// Hands on the list of a blob's chunks in parts: what was kept, or else what its bytes here say. Hands on nothing if
/// not all of it is here and proves.
async fn produce(inner: Arc<Inner>, request: ChunksRequest, parts: mpsc::Sender<Chunks>) {
    let work = async {
        let _answer = inner.listing.answers.acquire().await;
        let (store, ChunksRequest { blob, size }) = (inner.store.clone(), request);
        let kept = spawn_blocking(move || kept(&store, blob, size)).await.ok().flatten();
        let list = match kept {
            Some(list) => list,
            None => {
                let permit = inner.listing.scans.clone().acquire_owned().await;
                let (store, gone) = (inner.store.clone(), parts.clone());
                let scanning = spawn_blocking(move || {
                    let _permit = permit;
                    scan(&store, request, &|| gone.is_closed())
                });
                match scanning.await {
                    Ok(Ok(Some(list))) => list,
                    Ok(Ok(None)) => return debug!(%blob, "no list of its chunks: not all of it is here"),
                    Ok(Err(error)) => return warn!(%blob, reason = tree::reason(&error), "cannot be cut into chunks"),
                    Err(panic) => std::panic::resume_unwind(panic.into_panic()),
                }
            }
        };
        let mut left = &list[..];
        loop {
            let (part, rest) = left.split_at(left.len().min(PART_CHUNKS));
            left = rest;
            let part = Chunks { chunks: part.to_vec(), is_last: rest.is_empty() };
            if parts.send(part).await.is_err() || left.is_empty() {
                return;
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = parts.closed() => {}
    }
}

fn kept(store: &Store, blob: BlobId, size: u64) -> Option<Vec<Chunk>> {
    let list: Vec<Chunk> = postcard::from_bytes(&store.kept_list(blob)?).ok()?;
    // Who asks with a wrong size gets nothing.
    (list.iter().map(|chunk| chunk.len).sum::<u64>() == size).then_some(list)
}

/// Cuts a blob of which all is here, and proves, into chunks, and keeps the list.
fn scan(store: &Store, request: ChunksRequest, is_over: &dyn Fn() -> bool) -> Result<Option<Vec<Chunk>>, StoreError> {
    let ChunksRequest { blob, size } = request;
    let Some(mut places) = Places::open(store, blob)?.filter(|places| places.size() == size) else { return Ok(None) };
    let (mut chunker, mut list, mut seen) = (Chunker::new(ChunkSizes::of(size)), Vec::new(), 0);
    places.answer(store, &Query::all(), 0, &mut |piece| {
        if let Verified::Data(data) = piece {
            chunker.push(data.offset(), data.bytes(), &mut |_, chunk| list.push(chunk));
            seen += data.range().len();
        }
        if is_over() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if seen < size {
        return Ok(None);
    }
    chunker.finish(&mut |_, chunk| list.push(chunk));
    let kept = postcard::to_stdvec(&list).map(|bytes| store.keep_list(blob, &bytes));
    if let Ok(Err(error)) = kept {
        debug!(%blob, reason = tree::reason(&error), "the list of its chunks is not kept");
    }
    Ok(Some(list))
}

/// How long to wait for the list of a blob in all: the other side has to read the blob for it.
fn limit(size: u64) -> Duration {
    LIMIT_LEAST + Duration::from_secs(size / SLOWEST_BYTES_PER_SECOND)
}

/// So many blobs are read for their lists at a time.
const SCANS_AT_ONCE: usize = 2;
/// So many lists are in memory at a time.
const ANSWERS_AT_ONCE: usize = 8;
/// A frame of so many chunks has at most 14 KiB.
const PART_CHUNKS: usize = 512;
/// How often the asker hears that a list is still being made.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const LIMIT_LEAST: Duration = Duration::from_secs(60);
const SLOWEST_BYTES_PER_SECOND: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    #[test]
    fn on_the_wire() {
        let request = ChunksRequest { blob: BlobId::EMPTY, size: 70_000 };
        let hex = format!("{}f0a204", BlobId::EMPTY);
        assert_eq!(HEXLOWER.encode(&postcard::to_stdvec(&request).unwrap()), hex);
        let chunks = Chunks { chunks: vec![Chunk { len: 70_000, hash: *b"0123456789abcdef" }], is_last: true };
        let hex = "01f0a2043031323334353637383961626364656601";
        assert_eq!(HEXLOWER.encode(&postcard::to_stdvec(&chunks).unwrap()), hex);
        assert_eq!(postcard::to_stdvec(&Chunks::default()).unwrap(), [0, 0]);
        let most = Chunks { chunks: vec![Chunk { len: u64::MAX, hash: [0xff; 16] }; PART_CHUNKS], is_last: false };
        assert!(postcard::to_stdvec(&most).unwrap().len() <= 14 << 10);
    }

    #[test]
    fn longer_blobs_may_take_longer() {
        assert_eq!((limit(0).as_secs(), limit(1 << 30).as_secs()), (60, 124));
        assert!(limit(u64::MAX) > limit(1 << 50));
    }
}
