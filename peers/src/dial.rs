use std::{
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use namespace::PeerId;
use tokio::{
    sync::Notify,
    time::{sleep_until, timeout},
};
use tracing::{debug, info};

use crate::{
    Peer, Peers,
    backoff::{Redial, Wanted},
    connection::{self, Live, answers, live, say_hello, take_into_use},
    endpoint::{Close, Inner},
    race::{Flaw, Limits},
    racing,
    tls::ALPN,
};

/// The task that keeps a peer connected, and what it goes by.
#[derive(Default)]
pub(crate) struct Dialler {
    pub(crate) last_error: Option<String>,
    pub(crate) redial: Redial,
    /// How often dialling has failed.
    failures: u64,
    /// How often there was reason to begin anew.
    news: u64,
    runs: bool,
    /// Wakes the task up.
    hurry: Arc<Notify>,
}

impl Dialler {
    pub(crate) fn wake(&self) {
        self.hurry.notify_one();
    }
}

impl Peers {
    /// Dials a peer now, or sees whether the connection that there is still works. Returns the address it is connected
    /// at, or what came of each of its addresses. Takes at most 20 s.
    pub async fn dial(&self, peer: PeerId) -> Result<SocketAddr, String> {
        let inner = &self.inner;
        if let Some(connection) = live(inner, peer) {
            if answers(&connection, PROBE_LIMIT).await {
                return Ok(connection::plain(connection.remote_address()));
            }
            connection.close(Close::Done.code(), b"no answer");
        }
        closed_is_gone(inner, peer).await;
        let Some(known) = inner.roster.get(peer) else { return Err("it is not on the roster".to_owned()) };
        if known.addresses.is_empty() && known.told.is_empty() {
            return Err(NO_ADDRESS.to_owned());
        }
        let before = failures(inner, peer);
        urge(inner, peer);
        let connection = wait_for(inner, peer, before, DIAL.all + Duration::from_secs(3)).await?;
        Ok(connection::plain(connection.remote_address()))
    }
}

/// Has a task look after `peer`, and look whether there is something to do.
pub(crate) fn start(inner: &Arc<Inner>, peer: PeerId) {
    if *inner.closing.borrow() || inner.roster.get(peer).is_none() {
        return;
    }
    let mut contacts = inner.contacts();
    let dialler = &mut contacts.entry(peer).or_default().dialler;
    if dialler.runs {
        dialler.wake();
    } else {
        dialler.runs = true;
        tokio::spawn(keep_connected(inner.clone(), peer, dialler.hurry.clone()));
    }
}

/// Has `peer` dialled at once, unless it is connected. A dial that is under way begins anew.
pub(crate) fn urge(inner: &Arc<Inner>, peer: PeerId) {
    {
        let mut contacts = inner.contacts();
        let dialler = &mut contacts.entry(peer).or_default().dialler;
        dialler.redial.urge();
        dialler.news += 1;
    }
    start(inner, peer);
}

/// The network is another one: all that are not connected are dialled, and all that are, tried.
pub(crate) fn start_anew(inner: &Arc<Inner>) {
    for peer in inner.roster.peers() {
        let Some(connection) = live(inner, peer.id) else {
            urge(inner, peer.id);
            continue;
        };
        let name = peer.name;
        tokio::spawn(async move {
            if !answers(&connection, CHANGED_LIMIT).await {
                info!(peer = name, "no answer since the network changed");
                connection.close(Close::Done.code(), b"no answer");
            }
        });
    }
}

/// The connection with `peer`. If there is none, it is dialled, and waited for until that fails or `limit` is over;
/// where it has failed a moment ago, it is not waited for.
pub(crate) async fn reach(inner: &Arc<Inner>, peer: PeerId, limit: Duration) -> Result<quinn::Connection, String> {
    closed_is_gone(inner, peer).await;
    if let Some(connection) = live(inner, peer) {
        return Ok(connection);
    }
    let Some(known) = inner.roster.get(peer) else { return Err("it is not on the roster".to_owned()) };
    let can_dial = !known.addresses.is_empty() || !known.told.is_empty();
    let (before, wanted) = {
        let mut contacts = inner.contacts();
        let dialler = &mut contacts.entry(peer).or_default().dialler;
        (dialler.failures, dialler.redial.handle_wanted(Instant::now(), can_dial))
    };
    start(inner, peer);
    match wanted {
        Wanted::Soon => wait_for(inner, peer, before, limit).await,
        Wanted::NotNow => Err(why_not(inner, peer)),
    }
}

/// Waits out the moment until a connection with `peer` that is closed has been let go of: what its end says of the next
/// dial must not come behind what somebody who wants the peer says of it.
async fn closed_is_gone(inner: &Inner, peer: PeerId) {
    let mut moved = inner.moved.subscribe();
    let is_closed = |live: &Live| live.connection.close_reason().is_some();
    let is_there = || inner.contacts().get(&peer).and_then(|contact| contact.live.as_ref()).is_some_and(is_closed);
    while is_there() && moved.changed().await.is_ok() {}
}

/// Waits until `peer` is connected, for as long as no dial fails beyond the `before` that have failed.
async fn wait_for(inner: &Arc<Inner>, peer: PeerId, before: u64, limit: Duration) -> Result<quinn::Connection, String> {
    let mut moved = inner.moved.subscribe();
    let wait = async {
        loop {
            if let Some(connection) = live(inner, peer) {
                return Some(connection);
            }
            if failures(inner, peer) > before || moved.changed().await.is_err() {
                return None;
            }
        }
    };
    timeout(limit, wait).await.ok().flatten().ok_or_else(|| why_not(inner, peer))
}

fn failures(inner: &Inner, peer: PeerId) -> u64 {
    inner.contacts().get(&peer).map_or(0, |contact| contact.dialler.failures)
}

/// Why there is no connection with `peer`.
fn why_not(inner: &Inner, peer: PeerId) -> String {
    let last = inner.contacts().get(&peer).and_then(|contact| contact.dialler.last_error.clone());
    last.unwrap_or_else(|| match inner.roster.get(peer) {
        Some(peer) if peer.addresses.is_empty() && peer.told.is_empty() => NO_ADDRESS.to_owned(),
        _ => "it is not connected".to_owned(),
    })
}

/// Dials `peer` whenever it is not connected, until it is taken off the roster or we shut down.
async fn keep_connected(inner: Arc<Inner>, peer: PeerId, hurry: Arc<Notify>) {
    let mut closing = inner.closing.subscribe();
    loop {
        let Some(target) = inner.roster.get(peer).filter(|_| !*closing.borrow()) else {
            let mut contacts = inner.contacts();
            contacts.entry(peer).or_default().dialler = Dialler { hurry, ..Dialler::default() };
            // It may have been put on it again since this task looked.
            drop(contacts);
            return if inner.roster.get(peer).is_some() {
                start(&inner, peer)
            };
        };
        let (due, news) = {
            let contacts = inner.contacts();
            let contact = contacts.get(&peer);
            let is_idle = contact.is_some_and(|contact| contact.live.is_some())
                || (target.addresses.is_empty() && target.told.is_empty());
            let dialler = contact.map(|contact| &contact.dialler);
            let due = dialler.and_then(|dialler| dialler.redial.due()).unwrap_or_else(Instant::now);
            ((!is_idle).then_some(due), dialler.map_or(0, |dialler| dialler.news))
        };
        match due {
            Some(due) if due <= Instant::now() => {
                let mut dialling = pin!(dial(&inner, &target));
                let outcome = loop {
                    tokio::select! {
                        outcome = &mut dialling => break Some(outcome),
                        () = hurry.notified() => {
                            let has_news = inner.contacts().get(&peer).is_some_and(|c| c.dialler.news != news);
                            if has_news || inner.roster.get(peer).is_none() {
                                break None;
                            }
                        }
                        _ = closing.changed() => break None,
                    }
                };
                if let Some(Err(flaw)) = outcome {
                    failed(&inner, &target, &flaw);
                }
            }
            due => tokio::select! {
                () = hurry.notified() => {}
                _ = closing.changed() => {}
                () = sleep_until(due.unwrap_or_else(|| Instant::now() + IDLE).into()) => {}
            },
        }
    }
}

/// Races for a connection between all addresses of the peer, and takes it into use.
async fn dial(inner: &Arc<Inner>, peer: &Peer) -> Result<(), Flaw> {
    let names = peer.addresses.iter().chain(&peer.told).cloned().collect();
    let greet = |connection| say_hello(inner.clone(), peer.id, connection);
    let (connection, hello) = racing::first(inner, peer.id, ALPN, names, DIAL, greet).await?;
    take_into_use(inner, connection, peer.id, true, hello).await;
    Ok(())
}

fn failed(inner: &Inner, peer: &Peer, flaw: &Flaw) {
    {
        let mut contacts = inner.contacts();
        let Some(contact) = contacts.get_mut(&peer.id).filter(|contact| contact.live.is_none()) else {
            // It dialled us meanwhile, and one connection is enough.
            return;
        };
        let (dialler, now) = (&mut contact.dialler, Instant::now());
        dialler.redial.handle_failed(now, flaw.kind, fastrand::f64());
        let wait_ms = dialler.redial.due().map_or(0, |due| due.saturating_duration_since(now).as_millis() as u64);
        if dialler.last_error.as_ref() == Some(&flaw.why) {
            debug!(peer = peer.name, reason = flaw.why, wait_ms, "cannot be reached");
        } else {
            info!(peer = peer.name, reason = flaw.why, wait_ms, "cannot be reached");
        }
        dialler.last_error = Some(flaw.why.clone());
        dialler.failures += 1;
    }
    inner.moved.send_modify(|count| *count += 1);
}

const NO_ADDRESS: &str = "no address of it is known: it must dial this machine";
const DIAL: Limits =
    Limits { resolve: Duration::from_secs(5), attempt: Duration::from_secs(5), all: Duration::from_secs(15) };
/// How long a connection is given to show that it works when a user asks.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
/// The same when the network has changed.
const CHANGED_LIMIT: Duration = Duration::from_secs(3);
/// How long to rest when there is nothing to do; whatever changes that wakes us up.
const IDLE: Duration = Duration::from_secs(3600);
