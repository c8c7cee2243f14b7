//! Catalogs over streams: the one who wants to hear sends its cursor, the other sends batches for as long as the
//! connection lasts. Order and bounds: spec/wire.md, "Catalog streams".

use std::{
    collections::BTreeMap,
    mem,
    pin::pin,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use namespace::{Applied, ApplyError, Cursor, Mark, Namespace, PeerId, Told};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tracing::{debug, error, warn};

use crate::{
    Peers,
    endpoint::{Close, GREETING_LIMIT, Inner},
    frame::{ASK_BYTES_MAX, Ask, FRAME_BYTES_MAX, FrameError, StreamKind, Telling, read_frame, within, write_frame},
    hello::is_name,
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

/// Hears the peer's catalog, and what it passes on of others', until the connection ends.
pub(crate) async fn listen(inner: Arc<Inner>, connection: quinn::Connection, peer: PeerId) {
    while connection.close_reason().is_none() && inner.roster.get(peer).is_some() {
        let retry = match hear(&inner, &connection, peer).await {
            Ok(()) => AGAIN,
            Err(HearError::Apply(ApplyError::Namespace(error))) => {
                error!(%peer, reason = tree::reason(&error), "its catalog cannot be kept");
                RETRY
            }
            Err(HearError::Apply(error)) => {
                warn!(%peer, reason = tree::reason(&error), "disconnected: its catalog breaks the rules");
                return connection.close(Close::Misbehaved.code(), b"invalid catalog");
            }
            Err(HearError::Frame(error)) => {
                debug!(%peer, reason = tree::reason(&error), "its catalog stream ended");
                RETRY
            }
        };
        tokio::select! {
            _ = connection.closed() => return,
            () = sleep(retry) => {}
        }
    }
}

enum HearError {
    Frame(FrameError),
    Apply(ApplyError),
}

/// Asks once, and takes in what comes until something else is to be asked.
async fn hear(inner: &Arc<Inner>, connection: &quinn::Connection, peer: PeerId) -> Result<(), HearError> {
    let namespace = &inner.namespace;
    let mut moved = inner.moved.subscribe();
    let direct = inner.connected();
    let rumour = rumour(inner, peer);
    let cursors = blocking(namespace, move |namespace| Ok(namespace.cursors()?)).await?;
    // How far whom was heard when this was asked, and on this stream since.
    let mut heard: BTreeMap<PeerId, Mark> = cursors.iter().map(|(origin, cursor)| (*origin, cursor.mark)).collect();
    let ask = Ask::new(cursors, direct.clone(), rumour, peer);
    let open = async {
        let (mut send, recv) = connection.open_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        send.write_all(&[StreamKind::Catalog as u8]).await.map_err(|error| FrameError::Stream(error.into()))?;
        write_frame(&mut send, &ask).await?;
        // The stream stays open for as long as somebody listens.
        Ok((send, recv))
    };
    let (_send, mut recv) = within(GREETING_LIMIT, open).await.map_err(HearError::Frame)?;
    loop {
        let mut reading = pin!(read_frame::<Telling>(&mut recv, FRAME_BYTES_MAX));
        let Telling { batch, name } = loop {
            tokio::select! {
                batch = &mut reading => break batch.map_err(HearError::Frame)?,
                _ = moved.changed() => {
                    let cursors = blocking(namespace, move |namespace| Ok(namespace.cursors()?)).await?;
                    let is_news = |(origin, cursor): (&PeerId, &Cursor)| {
                        is_news(*origin == peer, heard.get(origin).copied().unwrap_or_default(), cursor.mark)
                    };
                    if inner.connected() != direct
                        || self::rumour(inner, peer) > rumour
                        || cursors.iter().any(is_news)
                    {
                        debug!(%peer, "asked anew");
                        return Ok(());
                    }
                }
            }
        };
        while inner.store.check_room().is_err() {
            if timeout(FULL_PAUSE, connection.closed()).await.is_ok() {
                return Ok(());
            }
        }
        let (origin, mark) = (batch.origin, batch.mark);
        debug!(%peer, %origin, rows = batch.statements.len(), seq = mark.seq, "heard");
        let is_trusted = origin != peer && inner.roster.get(origin).is_some();
        let applied = blocking(namespace, move |namespace| {
            if batch.is_farewell() && is_trusted {
                namespace.contest_farewell(origin, mark)?;
                return Ok((Applied::Taken, mark));
            }
            let applied = namespace.apply(peer, &batch)?;
            if applied == Applied::Taken && is_name(&name) {
                namespace.set_name(origin, &name)?;
            }
            Ok((applied, namespace.cursor(origin)?.mark))
        });
        match applied.await? {
            (Applied::Taken, _) => drop(heard.insert(origin, mark)),
            (Applied::PassedOver, ours) if mark > ours && origin != namespace.me() => {
                // What is between was told to nobody: others told something else meanwhile.
                debug!(%peer, %origin, "missed something");
                return Ok(());
            }
            (Applied::PassedOver, _) => {}
        }
        inner.moved.send_modify(|count| *count += 1);
        if inner.roster.get(peer).is_none() {
            // It was taken off the roster meanwhile, and forgotten, perhaps before this was taken in.
            return blocking(namespace, move |namespace| namespace.forget_peer(peer)).await;
        }
    }
}

/// Whether what was heard of an origin calls for another question to a peer to which `before` was shown or which told so:
/// somebody else told of another log of the origin, or that it left; or anything of the peer itself, which must see it.
fn is_news(is_of_the_peer: bool, before: Mark, now: Mark) -> bool {
    let log = |mark: Mark| (mark.epoch, mark.session, mark.seq == u64::MAX);
    if is_of_the_peer { before != now } else { log(before) != log(now) }
}

/// The latest mark of `peer` that others showed.
fn rumour(inner: &Inner, peer: PeerId) -> Mark {
    let rumours = inner.rumours.lock().unwrap_or_else(PoisonError::into_inner);
    rumours.get(&peer).copied().unwrap_or_default()
}

/// Keeps what `listener` has heard of others beyond what is known here. It tells nothing of those who are heard directly,
/// so that only they can tell whether it is theirs. Returns whether there was any news.
fn note_rumours(inner: &Inner, heard: &BTreeMap<PeerId, Cursor>, known: &BTreeMap<PeerId, Cursor>) -> bool {
    let mut rumours = inner.rumours.lock().unwrap_or_else(PoisonError::into_inner);
    let known = |origin: &PeerId| known.get(origin).map_or(Mark::default(), |cursor| cursor.mark);
    rumours.retain(|origin, mark| *mark > known(origin));
    let mut is_news = false;
    for (origin, Cursor { mark, .. }) in heard {
        let later = *mark > known(origin) && rumours.get(origin).is_none_or(|rumour| mark > rumour);
        let fits = rumours.len() < RUMOURS_MAX || rumours.contains_key(origin);
        if later && fits && *origin != inner.namespace.me() {
            rumours.insert(*origin, *mark);
            is_news = true;
        }
    }
    is_news
}

/// Tells what `listener` has not heard, by what it asks first, until the stream or the connection ends.
pub(crate) async fn tell(
    inner: &Arc<Inner>,
    listener: PeerId,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) -> Result<(), FrameError> {
    let Ask { cursors, direct, rumour } = within(GREETING_LIMIT, read_frame(&mut recv, ASK_BYTES_MAX)).await?;
    let mut told = Told { listener, cursors: cursors.into_iter().collect(), direct: direct.into_iter().collect() };
    let mut changes = inner.namespace.changes();
    // One at a time: what was asked earlier is over, though it may never have been read.
    let mut later = {
        let mut telling = inner.telling.lock().unwrap_or_else(PoisonError::into_inner);
        let telling = telling.entry(listener).or_default();
        telling.send_modify(|count| *count += 1);
        telling.subscribe()
    };
    if let Ok(known) = blocking(&inner.namespace, |namespace| Ok(namespace.cursors()?)).await
        && note_rumours(inner, &told.cursors, &known)
    {
        inner.moved.send_modify(|count| *count += 1);
    }
    let heard = told.cursors.get(&inner.namespace.me()).map(|cursor| cursor.mark);
    let mut heard = vec![heard.unwrap_or_default(), rumour];
    loop {
        changes.borrow_and_update();
        let (asked, heard) = (told.clone(), mem::take(&mut heard));
        let batch = blocking(&inner.namespace, move |namespace| {
            for heard in heard {
                if namespace.renew_if_lost(heard)? {
                    warn!(peer = %listener, "it has heard what is not known here: the database was lost, or is an older copy");
                }
            }
            Ok(namespace.tell(&asked, BATCH_BYTES)?)
        });
        match batch.await {
            Ok(Some(batch)) => {
                told.note(&batch);
                let name = inner.name_of(batch.origin).unwrap_or_default();
                let telling = Telling { batch, name };
                tokio::select! {
                    written = write_frame(&mut send, &telling) => written?,
                    _ = later.changed() => {
                        // What was not read need not be kept.
                        let _ = send.reset(ASKED_ANEW.into());
                        return Ok(());
                    }
                }
            }
            Ok(None) => tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Ok(()) },
                _ = later.changed() => return Ok(()),
                _ = send.stopped() => return Ok(()),
            },
            Err(HearError::Frame(error)) => return Err(error),
            Err(HearError::Apply(error)) => {
                error!(reason = tree::reason(&error), "our catalog cannot be read");
                return Ok(());
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
/// Code of a stream that was reset: its listener has asked again.
const ASKED_ANEW: u32 = 0;
/// So long passes between two questions, whatever the other side tells.
const AGAIN: Duration = Duration::from_millis(100);
const RETRY: Duration = Duration::from_secs(5);
/// How often to check for room while the disk of the home is full.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// Of so many peers rumours are kept; so many are known at most.
const RUMOURS_MAX: usize = 1000;
