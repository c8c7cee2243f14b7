//! Catalogs over streams: the one who wants to hear sends its cursor, the other sends batches for as long as the
//! connection lasts. Order and bounds: spec/wire.md, "Catalog streams".

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use namespace::{ApplyError, Batch, Cursor, Namespace, PeerId};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tracing::{debug, error, warn};

use crate::{
    Peers,
    endpoint::{Close, GREETING_LIMIT, Inner},
    frame::{FRAME_BYTES_MAX, FrameError, GREETING_BYTES_MAX, StreamKind, read_frame, within, write_frame},
};

impl Peers {
    /// Waits until all of `peer`'s catalog has been heard once, for `limit` at most. Tells whether it has.
    pub async fn wait_for_catalog(&self, peer: PeerId, limit: Duration) -> bool {
        let mut moved = self.inner.moved.subscribe();
        let wait = async {
            loop {
                let complete = blocking(&self.inner.namespace, move |namespace| Ok(namespace.is_complete(peer)?)).await;
                match complete {
                    Ok(false) if moved.changed().await.is_ok() => {}
                    complete => return complete.unwrap_or(false),
                }
            }
        };
        timeout(limit, wait).await.unwrap_or(false)
    }

    /// Waits until the catalogs of all peers that are connected have been heard once, for `limit` at most. Returns the
    /// names of those whose catalogs are still coming.
    pub async fn wait_for_catalogs(&self, limit: Duration) -> Vec<String> {
        let until = Instant::now() + limit;
        let mut coming = Vec::new();
        for status in self.status().into_iter().filter(|status| status.connected.is_some()) {
            if !self.wait_for_catalog(status.peer.id, until.saturating_duration_since(Instant::now())).await {
                coming.push(status.peer.name);
            }
        }
        coming
    }
}

/// Hears the peer's catalog until the connection ends.
pub(crate) async fn listen(inner: Arc<Inner>, connection: quinn::Connection, peer: PeerId) {
    while connection.close_reason().is_none() {
        match hear(&inner, &connection, peer).await {
            Ok(()) => {}
            Err(HearError::Apply(ApplyError::Namespace(error))) => {
                error!(%peer, %error, "its catalog cannot be kept");
            }
            Err(HearError::Apply(error)) => {
                warn!(%peer, %error, "disconnected");
                return connection.close(Close::Misbehaved.code(), b"invalid catalog");
            }
            Err(HearError::Frame(error)) => debug!(%peer, %error, "its catalog stream ended"),
        }
        tokio::select! {
            _ = connection.closed() => return,
            () = sleep(RETRY) => {}
        }
    }
}

enum HearError {
    Frame(FrameError),
    Apply(ApplyError),
}

async fn hear(inner: &Arc<Inner>, connection: &quinn::Connection, peer: PeerId) -> Result<(), HearError> {
    let namespace = &inner.namespace;
    let cursor = blocking(namespace, move |namespace| namespace.cursor(peer).map_err(ApplyError::from)).await?;
    let open = async {
        let (mut send, recv) = connection.open_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        send.write_all(&[StreamKind::Catalog as u8]).await.map_err(|error| FrameError::Stream(error.into()))?;
        write_frame(&mut send, &cursor).await?;
        // The stream stays open for as long as somebody listens.
        Ok((send, recv))
    };
    let (_send, mut recv) = within(GREETING_LIMIT, open).await.map_err(HearError::Frame)?;
    loop {
        let batch: Batch = read_frame(&mut recv, FRAME_BYTES_MAX).await.map_err(HearError::Frame)?;
        debug!(%peer, rows = batch.statements.len(), restart = batch.restart, seq = batch.upto.seq, head = batch.head, "heard");
        blocking(namespace, move |namespace| namespace.apply(peer, &batch)).await?;
        inner.moved.send_modify(|count| *count += 1);
        if inner.roster.get(peer).is_none() {
            // It was taken off the roster meanwhile, and forgotten, perhaps before this was taken in.
            return blocking(namespace, move |namespace| Ok(namespace.forget_peer(peer)?)).await;
        }
    }
}

/// Tells our catalog, from the cursor that comes first, until the stream or the connection ends.
pub(crate) async fn tell(
    inner: &Arc<Inner>,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) -> Result<(), FrameError> {
    let mut cursor: Cursor = within(GREETING_LIMIT, read_frame(&mut recv, GREETING_BYTES_MAX)).await?;
    let mut head = inner.namespace.head();
    let mut first = true;
    loop {
        let seen = *head.borrow_and_update();
        let batch =
            blocking(&inner.namespace, move |namespace| namespace.batch(cursor, BATCH_BYTES).map_err(ApplyError::from));
        let batch = match batch.await {
            Ok(batch) => batch,
            Err(HearError::Frame(error)) => return Err(error),
            Err(HearError::Apply(error)) => {
                error!(%error, "our catalog cannot be read");
                return Ok(());
            }
        };
        // The first batch is sent even if it says nothing: it tells as of when that is so.
        if std::mem::take(&mut first) || batch.upto != cursor {
            write_frame(&mut send, &batch).await?;
        }
        cursor = batch.upto;
        if cursor.seq >= seen {
            tokio::select! {
                changed = head.changed() => if changed.is_err() { return Ok(()) },
                _ = send.stopped() => return Ok(()),
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    namespace: &Namespace,
    work: impl FnOnce(&Namespace) -> Result<T, ApplyError> + Send + 'static,
) -> Result<T, HearError> {
    let namespace = namespace.clone();
    match spawn_blocking(move || work(&namespace)).await {
        Ok(done) => done.map_err(HearError::Apply),
        // A bug of ours is nobody else's fault.
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// A row has at most 9 KB, so that a batch stays well within a frame.
const BATCH_BYTES: usize = 256 << 10;
const RETRY: Duration = Duration::from_secs(5);
