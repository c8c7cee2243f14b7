use std::sync::Arc;

use blobstore::{Store, StoreError};
use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};
use tracing::{Instrument, debug, error_span, warn};
use tree::{BlobId, Query};

use crate::{
    answer::Places,
    endpoint::{GREETING_LIMIT, Inner},
    frame::{FrameError, Have, within},
    iroh_wire::{self, REQUEST_BYTES_MAX},
    outgoing::{Filler, Manner, Outgoing},
    pace::Class,
    tls,
};

/// Serves a connection in iroh-blobs' own protocol: each stream is one request for a public blob.
pub(crate) async fn serve_strangers(inner: Arc<Inner>, connection: quinn::Connection, _permit: OwnedSemaphorePermit) {
    let at_once = Arc::new(Semaphore::new(STRANGERS_STREAMS_MAX));
    let from = connection.remote_address();
    let Some(peer) = tls::peer_of(&connection) else { return };
    while let Ok((send, recv)) = connection.accept_bi().await {
        let Ok(permit) = at_once.clone().acquire_owned().await else { return };
        let (inner, connection) = (inner.clone(), connection.clone());
        let answered = async move {
            let may_read = |blob| inner.public.as_ref().is_some_and(|public| public(blob));
            let manner = Manner::plain(Class::Background);
            let outgoing = Outgoing::new(&inner, &connection, peer, manner, send);
            if let Err(error) = serve_get(&inner, outgoing, recv, &may_read).await {
                debug!(address = %from, reason = tree::reason(&error), "a stranger's request ended");
            }
            drop(permit);
        };
        tokio::spawn(answered.instrument(error_span!("stream", address = %from)));
    }
}

/// Answers one request for ranges of a blob.
///
/// What is not here, is damaged here, or may not be read ends the answer early, and nothing else is said: the
/// asker knows what it has got, for it proves every piece.
pub(crate) async fn serve_get(
    inner: &Arc<Inner>,
    mut to: Outgoing,
    mut recv: quinn::RecvStream,
    may_read: &(dyn Fn(BlobId) -> bool + Sync),
) -> Result<(), FrameError> {
    let Some((blob, query)) = read_request(&mut recv).await? else {
        warn!("refused: a request that is not for ranges of one blob");
        let _ = to.stream.reset(UNSUPPORTED.into());
        return Ok(());
    };
    if !may_read(blob) {
        debug!(%blob, "refused: not to be read by this peer");
        let _ = to.stream.finish();
        return Ok(());
    }
    send_part(inner, &mut to, blob, Part::whole(query)).await?;
    let _ = to.stream.finish();
    Ok(())
}

/// A part of an answer: all of it, or what another part left.
pub(crate) struct Part {
    /// What is asked for.
    pub(crate) query: Query,
    /// How many of the pairs above the first bytes were sent before.
    pub(crate) above: usize,
    /// Whether the size goes first.
    pub(crate) with_size: bool,
}

impl Part {
    pub(crate) fn whole(query: Query) -> Self {
        Self { query, above: 0, with_size: true }
    }
}

/// Sends what is here of a part of an answer, up to the first of it that is not. Returns what is left then.
pub(crate) async fn send_part(
    inner: &Inner,
    to: &mut Outgoing,
    blob: BlobId,
    part: Part,
) -> Result<Option<Part>, FrameError> {
    let store = inner.store.clone();
    to.fill(move |filler| read(&store, blob, part, filler)).await
}

/// Answers one question for what is here of ranges of a blob.
pub(crate) async fn serve_have(inner: &Inner, mut to: Outgoing, mut recv: quinn::RecvStream) -> Result<(), FrameError> {
    let Some((blob, query)) = read_request(&mut recv).await? else {
        warn!("refused: a request that is not for ranges of one blob");
        let _ = to.stream.reset(UNSUPPORTED.into());
        return Ok(());
    };
    let store = inner.store.clone();
    let have = spawn_blocking(move || {
        let places = Places::open(&store, blob)?;
        Ok::<_, StoreError>(places.map_or_else(Have::default, |places| Have::new(places.size(), &places.has(&query))))
    });
    match have.await {
        Ok(Ok(have)) => to.send_frame(&have).await?,
        Ok(Err(error)) => warn!(%blob, reason = tree::reason(&error), "cannot be looked up"),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
    let _ = to.stream.finish();
    Ok(())
}

/// The blob and the ranges of it that a request names; `None` if it is of another kind.
pub(crate) async fn read_request(recv: &mut quinn::RecvStream) -> Result<Option<(BlobId, Query)>, FrameError> {
    let request = within(GREETING_LIMIT, async {
        recv.read_to_end(REQUEST_BYTES_MAX).await.map_err(|error| FrameError::Stream(std::io::Error::other(error)))
    });
    Ok(iroh_wire::decode_request(&request.await?))
}

/// Reads and proves a part of an answer, until it is complete, something is missing, or nobody takes it any more.
/// Returns what is left.
fn read(store: &Store, blob: BlobId, part: Part, to: &mut Filler) -> Result<Option<Part>, StoreError> {
    let Some(mut places) = Places::open(store, blob)? else {
        debug!(%blob, "not here");
        return Ok(Some(part));
    };
    if part.with_size {
        let _ = to.push(Bytes::copy_from_slice(&places.size().to_le_bytes()));
    }
    let left = places.answer(store, &part.query, part.above, &mut |piece| to.push(piece.into_wire_bytes()))?;
    Ok(left.map(|(query, above)| Part { query, above, with_size: false }))
}

const STRANGERS_STREAMS_MAX: usize = 8;
/// Stream reset code: the request is of a kind that is not served.
pub(crate) const UNSUPPORTED: u32 = 1;
