use std::{
    collections::BTreeMap,
    future::pending,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use namespace::PeerId;
use quinn::ConnectionError;
use tokio::{sync::Semaphore, time::sleep};
use tracing::{Instrument, debug, error, error_span, info, warn};

use crate::{
    Peer, Peers, batch, catalog, chunks, details, dial,
    endpoint::{Close, Contact, GREETING_LIMIT, Inner, unix_now},
    frame::{FrameError, GREETING_BYTES_MAX, StreamKind, read_frame, within, write_frame},
    hello::Hello,
    nodes, obey,
    outgoing::{Manner, Outgoing},
    pace::Class,
    race::Flaw,
    racing::behind_the_key,
    serve, through,
};

/// A connection with a peer that has said hello.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) connection: quinn::Connection,
    dialled_by_us: bool,
    since: Instant,
    /// Whether it knows packed answers.
    packs: bool,
    /// The run of the program at the other end.
    run: u64,
}

/// How things stand with one peer.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// The peer.
    pub peer: Peer,
    /// The address it is connected from, if it is.
    pub connected: Option<SocketAddr>,
    /// State of that connection.
    pub connection: Option<ConnectionStatus>,
    /// When its last connection ended, in seconds since 1970, if it had one since this program started.
    pub last_connected: Option<i64>,
    /// Why that connection ended.
    pub last_ended: Option<String>,
    /// Why the last dial failed, if it did and there is no connection.
    pub last_error: Option<String>,
    /// Whether the peer did not let us in the last time, or another machine was in its place.
    pub refused: bool,
    /// Whether two machines were seen to run with its key.
    pub twins: bool,
    /// In what time it is dialled next, if it is not connected and has an address.
    pub next_dial: Option<Duration>,
}

/// Whether a peer is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    /// Whether it is connected.
    pub is_connected: bool,
    /// Whether its last connection ended without the peer closing it: the peer may be frozen, off, or out of reach.
    pub fell_silent: bool,
    /// How often it has been connected and disconnected since this program started.
    pub changes: u64,
}

impl Peers {
    /// Returns for each peer that has been connected since the start whether it is, and how often that has changed.
    pub fn presences(&self) -> BTreeMap<PeerId, Presence> {
        let contacts = self.inner.contacts();
        let presence = |contact: &Contact| Presence {
            is_connected: contact.live.as_ref().is_some_and(Live::is_open),
            fell_silent: contact.fell_silent,
            changes: contact.changes,
        };
        let met = contacts.iter().filter(|(_, contact)| contact.changes > 0);
        met.map(|(peer, contact)| (*peer, presence(contact))).collect()
    }
}

/// State of a connection with a peer.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionStatus {
    /// Time since the connection was established.
    pub age: Duration,
    /// Estimated round-trip time.
    pub round_trip: Duration,
    /// UDP payload bytes received over it.
    pub received_bytes: u64,
    /// UDP payload bytes sent over it.
    pub sent_bytes: u64,
    /// Packets sent over it, and how many of them were lost.
    pub sent_packets: u64,
    /// See `sent_packets`.
    pub lost_packets: u64,
    /// Bytes per second that congestion control lets through: its window, once a round trip.
    pub send_rate: u64,
}

impl Live {
    /// Whether the connection has not ended.
    pub(crate) fn is_open(&self) -> bool {
        self.connection.close_reason().is_none()
    }
}

pub(crate) fn status(inner: &Inner) -> Vec<PeerStatus> {
    let now = Instant::now();
    let contacts = inner.contacts();
    let peers = inner.roster.peers().into_iter();
    peers
        .map(|peer| {
            let contact = contacts.get(&peer.id);
            let twins = contact.is_some_and(|contact| contact.runs.has_twins(now));
            let connected = contact.and_then(|contact| contact.live.as_ref());
            let connection = connected.map(|live| {
                let (stats, round_trip) = (live.connection.stats(), live.connection.rtt());
                ConnectionStatus {
                    age: live.since.elapsed(),
                    round_trip,
                    received_bytes: stats.udp_rx.bytes,
                    sent_bytes: stats.udp_tx.bytes,
                    sent_packets: stats.path.sent_packets,
                    lost_packets: stats.path.lost_packets,
                    send_rate: (stats.path.cwnd as f64 / round_trip.as_secs_f64()) as u64,
                }
            });
            let connected = connected.map(|live| plain(live.connection.remote_address()));
            let last_ended = contact.and_then(|contact| contact.last_ended.clone());
            let contact = contact.filter(|_| connected.is_none());
            let dialler = contact.map(|contact| &contact.dialler);
            let can_dial = !peer.addresses.is_empty() || !peer.told.is_empty();
            let due = dialler.filter(|_| can_dial).map(|dialler| dialler.redial.due().unwrap_or(now));
            PeerStatus {
                peer,
                connected,
                connection,
                last_connected: contact.and_then(|contact| contact.last_connected),
                last_ended,
                last_error: dialler.and_then(|dialler| dialler.last_error.clone()),
                twins,
                refused: dialler.is_some_and(|dialler| dialler.redial.is_refused()),
                next_dial: due.map(|due| due.saturating_duration_since(now)),
            }
        })
        .collect()
}

/// The connection with `peer`, if there is one now.
pub(crate) fn live(inner: &Inner, peer: PeerId) -> Option<quinn::Connection> {
    let contacts = inner.contacts();
    let live = contacts.get(&peer)?.live.as_ref()?;
    live.is_open().then(|| live.connection.clone())
}

/// Whether a connected peer knows packed answers.
pub(crate) fn packs(inner: &Inner, peer: PeerId) -> bool {
    inner.contacts().get(&peer).and_then(|contact| contact.live.as_ref()).is_some_and(|live| live.packs)
}

pub(crate) fn disconnect(inner: &Inner, peer: PeerId) {
    if let Some(contact) = inner.contacts().get_mut(&peer) {
        if let Some(live) = contact.live.take() {
            live.connection.close(Close::UnknownPeer.code(), b"no longer trusted");
            contact.changes += 1;
        }
        contact.dialler.wake();
    }
    inner.moved.send_modify(|count| *count += 1);
}

/// Says hello on a connection that we dialled, and hears the answer.
pub(crate) async fn say_hello(
    inner: Arc<Inner>,
    peer: PeerId,
    connection: quinn::Connection,
) -> Result<(quinn::Connection, Hello), Flaw> {
    let exchange = async {
        let (mut send, mut recv) = connection.open_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        send.write_all(&[StreamKind::Hello as u8]).await.map_err(|error| FrameError::Stream(error.into()))?;
        write_frame(&mut send, &inner.hello(peer)).await?;
        let _ = send.finish();
        read_frame::<Hello>(&mut recv, GREETING_BYTES_MAX).await
    };
    match within(GREETING_LIMIT, exchange).await {
        Ok(hello) => Ok((connection, hello)),
        Err(error) => Err(behind_the_key(&connection, &error)),
    }
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
        note_run(inner, peer, hello.run);
        write_frame(&mut send, &inner.hello(peer)).await?;
        let _ = send.finish();
        Ok(hello)
    };
    let hello = within(GREETING_LIMIT, exchange).await.inspect_err(|_| {
        connection.close(Close::Misbehaved.code(), b"no hello");
    })?;
    take_into_use(inner, connection, peer, false, hello).await;
    Ok(())
}

/// Makes this the connection with the peer, on which hello has been said; or closes it, if there is one that stays.
/// Takes a moment only if that has to be found out.
pub(crate) async fn take_into_use(
    inner: &Arc<Inner>,
    connection: quinn::Connection,
    peer: PeerId,
    dialled_by_us: bool,
    hello: Hello,
) {
    let live = |connection: &quinn::Connection| Live {
        connection: connection.clone(),
        dialled_by_us,
        since: Instant::now(),
        packs: hello.packs,
        run: hello.run,
    };
    note_run(inner, peer, hello.run);
    if hello.twins {
        inner.note_twin(peer);
    }
    let mut dead = None;
    while let Some(old) = replace(inner, live(&connection), peer, dead) {
        if answers(&old, DUPLICATE_LIMIT).await {
            return connection.close(Close::Duplicate.code(), b"there is a connection already");
        }
        // It ends by itself within 15 s, and is worth nothing until then.
        debug!(%peer, "the connection that there was does not answer");
        dead = Some(old.stable_id());
    }
    learn_addresses(inner, peer, hello);
    inner.moved.send_modify(|count| *count += 1);
    let name = inner.roster.get(peer).map_or_else(|| peer.to_string(), |peer| peer.name);
    info!(peer = name, id = %peer, address = %plain(connection.remote_address()), "connected");
    tokio::spawn(catalog::listen(inner.clone(), connection.clone(), peer));
    tokio::spawn(run(inner.clone(), connection, peer, name));
}

/// Puts the connection in the place of the one that there was; or returns that one, if it may be the one that stays. The
/// one known as `dead` does not.
fn replace(inner: &Inner, new: Live, peer: PeerId, dead: Option<usize>) -> Option<quinn::Connection> {
    let mut contacts = inner.contacts();
    let contact = contacts.entry(peer).or_default();
    let we_are_less = inner.identity.peer() < peer;
    let has_twins = contact.runs.has_twins(Instant::now());
    if let Some(old) = &contact.live
        && old.connection.close_reason().is_none()
        && dead != Some(old.connection.stable_id())
        && (has_twins && old.run != new.run
            || !replaces(old.dialled_by_us, new.dialled_by_us, we_are_less, old.since.elapsed()))
    {
        return Some(old.connection.clone());
    }
    if let Some(old) = contact.live.replace(new) {
        old.connection.close(Close::Duplicate.code(), b"there is a newer connection");
    }
    contact.dialler.last_error = None;
    contact.fell_silent = false;
    contact.changes += 1;
    None
}

/// Takes note of which run of the program a Hello came from. When twins become known, the one that is connected is let go, once:
/// it comes back, and is told by the Hello.
fn note_run(inner: &Inner, peer: PeerId, run: u64) {
    let is_news = {
        let mut contacts = inner.contacts();
        let contact = contacts.entry(peer).or_default();
        let is_news = contact.runs.note(run, Instant::now());
        if let Some(live) = contact.live.as_ref().filter(|_| is_news) {
            live.connection.close(Close::Duplicate.code(), b"there is a newer connection");
        }
        is_news
    };
    if is_news {
        let peer = inner.name_of(peer).unwrap_or_else(|| peer.to_string());
        error!(
            peer,
            "two machines run with one key: a home was cloned; what the one that is not connected has is not seen"
        );
    }
}

/// Whether anything comes from the other side within `limit`, when it has been given something to acknowledge.
pub(crate) async fn answers(connection: &quinn::Connection, limit: Duration) -> bool {
    let came = || connection.stats().udp_rx.datagrams;
    let before = came();
    // Both ends of a stream that is opened and let go: on the wire, frames that any QUIC acknowledges.
    let prod = async {
        if let Ok((mut send, _)) = connection.open_bi().await {
            let _ = send.reset(0_u32.into());
        }
        pending::<()>().await
    };
    let hear = async {
        while came() == before && connection.close_reason().is_none() {
            sleep(LOOK_AGAIN).await;
        }
    };
    tokio::select! {
        () = prod => {}
        () = hear => {}
        () = sleep(limit) => {}
    }
    came() > before && connection.close_reason().is_none()
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
                let stream = Stream { connection: connection.clone(), peer, name: name.clone(), send, recv };
                let served = stream.serve(inner.clone(), answers.clone());
                // Whatever is told of it, tells of whom.
                tokio::spawn(served.instrument(error_span!("stream", peer = name)));
            }
            Err(error) => break error,
        }
    };
    {
        let mut contacts = inner.contacts();
        if let Some(contact) = contacts.get_mut(&peer) {
            let lost = contact.live.take_if(|live| live.connection.stable_id() == connection.stable_id());
            if let Some(lost) = lost {
                let redial = &mut contact.dialler.redial;
                redial.handle_lost(Instant::now(), lost.since.elapsed(), fastrand::f64());
                let is_closed_there = matches!(error, ConnectionError::ApplicationClosed(_) | ConnectionError::Reset);
                contact.fell_silent = !is_closed_there;
                contact.changes += 1;
                contact.last_ended = Some(tree::reason(&error));
                if Close::Duplicate.is(&error) {
                    redial.handle_replaced(Instant::now());
                }
            }
            contact.last_connected = Some(unix_now());
        }
    }
    inner.moved.send_modify(|count| *count += 1);
    info!(peer = name, id = %peer, reason = tree::reason(&error), "disconnected");
    dial::start(&inner, peer);
}

/// A stream that a peer has opened.
struct Stream {
    connection: quinn::Connection,
    peer: PeerId,
    name: String,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
}

impl Stream {
    /// Does what it is for. `answers` are permits: each answer takes a thread while it is read, and a peer that reads
    /// slowly must not take them all.
    async fn serve(self, inner: Arc<Inner>, answers: Arc<Semaphore>) {
        let Self { connection, peer, name, send, mut recv } = self;
        let began = Instant::now();
        let mut kind = [0];
        let served = async {
            read(&mut recv, &mut kind).await?;
            let Some(kind) = StreamKind::from_byte(kind[0]) else { return Err(FrameError::UnknownKind) };
            let to = |manner, send| Outgoing::new(&inner, &connection, peer, manner, send);
            match kind {
                StreamKind::Hello => Err(FrameError::UnknownKind),
                StreamKind::Catalog => catalog::tell(&inner, peer, send, recv).await,
                StreamKind::Nodes => {
                    let _permit = answers.acquire().await;
                    nodes::serve_nodes(&inner, to(Manner::plain(Class::Copy), send), recv).await
                }
                StreamKind::Have => {
                    let _permit = answers.acquire().await;
                    serve::serve_have(&inner, to(Manner::plain(Class::Foreground), send), recv).await
                }
                // Its own bounds hold it, so that making a list does not keep answers waiting.
                StreamKind::Chunks => chunks::serve_chunks(&inner, to(Manner::plain(Class::Copy), send), recv).await,
                StreamKind::Details => {
                    details::serve_details(&inner, &answers, to(Manner::plain(Class::Copy), send), recv).await
                }
                StreamKind::Orders => obey::serve_orders(&inner, peer, send, recv).await,
                StreamKind::Get | StreamKind::Through | StreamKind::Batch => {
                    let mut manner = [0];
                    read(&mut recv, &mut manner).await?;
                    let to = to(Manner::from_byte(manner[0]), send);
                    if kind == StreamKind::Through {
                        return through::serve_through(&inner, peer, answers, to, recv).await;
                    }
                    let _permit = answers.acquire().await;
                    match kind {
                        StreamKind::Batch => batch::serve_batch(&inner, to, recv).await,
                        _ => serve::serve_get(&inner, to, recv, &|_| true).await,
                    }
                }
            }
        };
        let served = served.await;
        let (kind, duration_ms) = (kind[0], began.elapsed().as_millis() as u64);
        match served {
            Ok(()) => debug!(peer = name, kind, duration_ms, "a stream ended"),
            Err(FrameError::UnknownKind) => warn!(peer = name, kind, "refused: a stream of an unknown kind"),
            Err(error) => debug!(peer = name, kind, duration_ms, reason = tree::reason(&error), "a stream failed"),
        }
    }
}

/// Reads the first bytes of a stream.
async fn read(recv: &mut quinn::RecvStream, bytes: &mut [u8]) -> Result<(), FrameError> {
    within(GREETING_LIMIT, async { recv.read_exact(bytes).await.map_err(|_| FrameError::Ended) }).await
}

/// Remembers where the peer says that it listens.
fn learn_addresses(inner: &Inner, peer: PeerId, hello: Hello) {
    if !hello.is_valid() {
        return debug!(%peer, "a hello out of bounds");
    }
    if let Err(error) = inner.roster.learn(peer, hello.addresses) {
        warn!(%peer, reason = tree::reason(&error), "its new addresses are not remembered");
    }
}

/// An IPv4 address as such, where the system gives it inside an IPv6 one.
pub(crate) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

const ANSWERS_AT_ONCE: usize = 16;
const TOGETHER: Duration = Duration::from_secs(5);
/// How long the connection that there is may take to answer, when another one would replace it.
const DUPLICATE_LIMIT: Duration = Duration::from_millis(1500);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

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
