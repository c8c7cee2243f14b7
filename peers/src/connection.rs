use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use namespace::PeerId;
use tokio::sync::Semaphore;
use tracing::{debug, info, warn};

use crate::{
    Peer, catalog, chunks, dial,
    endpoint::{Close, GREETING_LIMIT, Inner, unix_now},
    frame::{FrameError, GREETING_BYTES_MAX, StreamKind, read_frame, within, write_frame},
    hello::Hello,
    nodes, serve, through,
};

/// A connection with a peer that has said hello.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) connection: quinn::Connection,
    dialled_by_us: bool,
    since: Instant,
}

/// How things stand with one peer.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// The peer.
    pub peer: Peer,
    /// The address it is connected from, if it is.
    pub connected: Option<SocketAddr>,
    /// When its last connection ended, in seconds since 1970, if it had one since this program started.
    pub last_connected: Option<i64>,
    /// Why the last dial failed, if it did and there is no connection.
    pub last_error: Option<String>,
}

pub(crate) fn status(inner: &Inner) -> Vec<PeerStatus> {
    let contacts = inner.contacts();
    let peers = inner.roster.peers().into_iter();
    peers
        .map(|peer| {
            let contact = contacts.get(&peer.id);
            let connected = contact.and_then(|contact| contact.live.as_ref());
            let connected = connected.map(|live| plain(live.connection.remote_address()));
            let dialler = contact.and_then(|contact| contact.dialler.as_ref());
            let last_error = dialler.and_then(|dialler| dialler.last_error.clone()).filter(|_| connected.is_none());
            let last_connected = contact.and_then(|contact| contact.last_connected).filter(|_| connected.is_none());
            PeerStatus { peer, connected, last_connected, last_error }
        })
        .collect()
}

/// The connection with `peer`, if there is one now.
pub(crate) fn live(inner: &Inner, peer: PeerId) -> Option<quinn::Connection> {
    inner.contacts().get(&peer)?.live.as_ref().map(|live| live.connection.clone())
}

pub(crate) fn disconnect(inner: &Inner, peer: PeerId) {
    if let Some(contact) = inner.contacts().get_mut(&peer) {
        if let Some(live) = contact.live.take() {
            live.connection.close(Close::UnknownPeer.code(), b"no longer trusted");
        }
        if let Some(dialler) = &contact.dialler {
            dialler.wake();
        }
    }
    inner.moved.send_modify(|count| *count += 1);
}

/// Says hello on a connection that we dialled, and takes it into use.
pub(crate) async fn say_hello(inner: &Arc<Inner>, connection: quinn::Connection, peer: PeerId) -> io::Result<()> {
    let exchange = async {
        let (mut send, mut recv) = connection.open_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        send.write_all(&[StreamKind::Hello as u8]).await.map_err(|error| FrameError::Stream(error.into()))?;
        write_frame(&mut send, &inner.hello()).await?;
        let _ = send.finish();
        read_frame::<Hello>(&mut recv, GREETING_BYTES_MAX).await
    };
    let hello = within(GREETING_LIMIT, exchange).await.map_err(|error| why_closed(&connection, error))?;
    take_into_use(inner, connection, peer, true, hello);
    Ok(())
}

/// Answers the hello of a peer that dialled us, and takes the connection into use.
pub(crate) async fn answer_hello(
    inner: &Arc<Inner>,
    connection: quinn::Connection,
    peer: PeerId,
) -> Result<(), FrameError> {
    let exchange = async {
        let (mut send, mut recv) = connection.accept_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        let mut kind = [0];
        recv.read_exact(&mut kind).await.map_err(|_| FrameError::Ended)?;
        if kind != [StreamKind::Hello as u8] {
            return Err(FrameError::Invalid(postcard::Error::DeserializeBadEnum));
        }
        let hello = read_frame::<Hello>(&mut recv, GREETING_BYTES_MAX).await?;
        write_frame(&mut send, &inner.hello()).await?;
        let _ = send.finish();
        Ok(hello)
    };
    let hello = within(GREETING_LIMIT, exchange).await.inspect_err(|_| {
        connection.close(Close::Misbehaved.code(), b"no hello");
    })?;
    take_into_use(inner, connection, peer, false, hello);
    Ok(())
}

fn take_into_use(inner: &Arc<Inner>, connection: quinn::Connection, peer: PeerId, dialled_by_us: bool, hello: Hello) {
    learn_addresses(inner, peer, hello);
    let new = Live { connection: connection.clone(), dialled_by_us, since: Instant::now() };
    {
        let mut contacts = inner.contacts();
        let contact = contacts.entry(peer).or_default();
        let we_are_less = inner.identity.peer() < peer;
        let old = contact.live.take();
        let keeps_old = old.as_ref().is_some_and(|old| {
            old.connection.close_reason().is_none()
                && !replaces(old.dialled_by_us, dialled_by_us, we_are_less, old.since.elapsed())
        });
        if keeps_old {
            contact.live = old;
            connection.close(Close::Duplicate.code(), b"there is a connection already");
            return;
        }
        if let Some(old) = old {
            old.connection.close(Close::Duplicate.code(), b"there is a newer connection");
        }
        contact.live = Some(new);
        if let Some(dialler) = &mut contact.dialler {
            dialler.last_error = None;
        }
    }
    inner.moved.send_modify(|count| *count += 1);
    let name = inner.roster.get(peer).map_or_else(|| peer.to_string(), |peer| peer.name);
    info!(peer = name, address = %plain(connection.remote_address()), "connected");
    tokio::spawn(catalog::listen(inner.clone(), connection.clone(), peer));
    tokio::spawn(run(inner.clone(), connection, peer, name));
}

/// Which of two connections with a peer stays. Two that were dialled at about the same time from both sides are
/// judged alike there: the one dialled by the peer with the lesser id stays. Otherwise the newer one does, for the
/// older one may be dead and not know it.
fn replaces(old_by_us: bool, new_by_us: bool, we_are_less: bool, age: Duration) -> bool {
    old_by_us == new_by_us || age > TOGETHER || new_by_us == we_are_less
}

/// Serves the streams that the peer opens, until the connection ends.
async fn run(inner: Arc<Inner>, connection: quinn::Connection, peer: PeerId, name: String) {
    let answers = Arc::new(Semaphore::new(ANSWERS_AT_ONCE));
    let error = loop {
        match connection.accept_bi().await {
            Ok((send, recv)) => {
                drop(tokio::spawn(stream(inner.clone(), peer, name.clone(), answers.clone(), send, recv)))
            }
            Err(error) => break error,
        }
    };
    {
        let mut contacts = inner.contacts();
        if let Some(contact) = contacts.get_mut(&peer) {
            contact.live.take_if(|live| live.connection.stable_id() == connection.stable_id());
            contact.last_connected = Some(unix_now());
        }
    }
    inner.moved.send_modify(|count| *count += 1);
    info!(peer = name, %error, "disconnected");
    dial::start(&inner, peer);
}

async fn stream(
    inner: Arc<Inner>,
    peer: PeerId,
    name: String,
    answers: Arc<Semaphore>,
    send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) {
    let mut kind = [0];
    let first = within(GREETING_LIMIT, async { recv.read_exact(&mut kind).await.map_err(|_| FrameError::Ended) }).await;
    let served = match (first, StreamKind::from_byte(kind[0])) {
        (Ok(()), Some(StreamKind::Catalog)) => catalog::tell(&inner, peer, send, recv).await,
        (Ok(()), Some(StreamKind::Get)) => {
            // Each answer takes a thread while it is read; a peer that reads slowly must not take them all.
            let _permit = answers.acquire().await;
            serve::serve_get(&inner, send, recv, &|_| true).await
        }
        (Ok(()), Some(StreamKind::Nodes)) => {
            let _permit = answers.acquire().await;
            nodes::serve_nodes(&inner, send, recv).await
        }
        (Ok(()), Some(StreamKind::Have)) => {
            let _permit = answers.acquire().await;
            serve::serve_have(&inner, send, recv).await
        }
        // Its own bounds hold it, so that making a list does not keep answers waiting.
        (Ok(()), Some(StreamKind::Chunks)) => chunks::serve_chunks(&inner, send, recv).await,
        (Ok(()), Some(StreamKind::Through)) => through::serve_through(&inner, peer, answers, send, recv).await,
        (Ok(()), _) => return warn!(peer = name, kind = kind[0], "refused: a stream of an unknown kind"),
        (Err(error), _) => Err(error),
    };
    if let Err(error) = served {
        debug!(peer = name, kind = kind[0], %error, "a stream ended");
    }
}

/// Remembers where the peer says that it listens.
fn learn_addresses(inner: &Inner, peer: PeerId, hello: Hello) {
    if !hello.is_valid() {
        return debug!(%peer, "a hello out of bounds");
    }
    if let Err(error) = inner.roster.learn(peer, hello.addresses) {
        warn!(%peer, %error, "its new addresses are not remembered");
    }
}

/// The reason that the other side gave for closing, if it did; it says more than that a stream failed.
pub(crate) fn why_closed(connection: &quinn::Connection, error: FrameError) -> io::Error {
    match connection.close_reason() {
        Some(quinn::ConnectionError::ApplicationClosed(close)) => io::Error::new(
            io::ErrorKind::ConnectionRefused,
            format!("refused: {}", String::from_utf8_lossy(&close.reason)),
        ),
        Some(reason) => io::Error::other(reason),
        None => io::Error::other(error),
    }
}

/// An IPv4 address as such, where the system gives it inside an IPv6 one.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

const ANSWERS_AT_ONCE: usize = 16;
const TOGETHER: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_keep_the_same_one_of_two() {
        let (now, later) = (Duration::ZERO, Duration::from_secs(60));
        for we_are_less in [false, true] {
            // Each side sees the two connections in either order, and the other's "by us" the other way round.
            for ours_first in [false, true] {
                let kept_is_ours = |we_are_less: bool, ours_first: bool| {
                    let replaced = replaces(ours_first, !ours_first, we_are_less, now);
                    if replaced { !ours_first } else { ours_first }
                };
                for other_sees_its_own_first in [false, true] {
                    let ours = kept_is_ours(we_are_less, ours_first);
                    let theirs = kept_is_ours(!we_are_less, other_sees_its_own_first);
                    assert_ne!(ours, theirs, "one connection, dialled by one side");
                }
            }
            assert!(replaces(true, true, we_are_less, now) && replaces(false, false, we_are_less, now));
            assert!(replaces(true, false, we_are_less, later) && replaces(false, true, we_are_less, later));
        }
    }
}
