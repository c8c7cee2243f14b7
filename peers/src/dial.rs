use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use namespace::PeerId;
use tokio::{
    net::lookup_host,
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::{debug, info};

use crate::{
    Peer,
    backoff::Backoff,
    connection::{live, say_hello},
    endpoint::Inner,
    tls::ALPN,
};

/// The task that keeps a peer connected.
pub(crate) struct Dialler {
    pub(crate) last_error: Option<String>,
    /// How often dialling has failed, and when last.
    failures: u64,
    failed_at: Option<Instant>,
    /// Wakes the task up to dial at once.
    hurry: Arc<Notify>,
}

impl Dialler {
    pub(crate) fn wake(&self) {
        self.hurry.notify_one();
    }
}

/// Has `peer` dialled at once, by the task that keeps it connected, which is started if there is none.
pub(crate) fn start(inner: &Arc<Inner>, peer: PeerId) {
    if *inner.closing.borrow() || inner.roster.get(peer).is_none() {
        return;
    }
    let mut contacts = inner.contacts();
    let contact = contacts.entry(peer).or_default();
    match &contact.dialler {
        Some(dialler) => dialler.wake(),
        None => {
            let hurry = Arc::new(Notify::new());
            contact.dialler = Some(Dialler { last_error: None, failures: 0, failed_at: None, hurry: hurry.clone() });
            tokio::spawn(keep_connected(inner.clone(), peer, hurry));
        }
    }
}

/// The connection with `peer`. If there is none, it is dialled, and waited for until that fails or `limit` is over;
/// where it has failed a moment ago, it is not tried again for this.
pub(crate) async fn reach(inner: &Arc<Inner>, peer: PeerId, limit: Duration) -> Result<quinn::Connection, String> {
    let failures = |inner: &Inner| {
        let contacts = inner.contacts();
        contacts.get(&peer).and_then(|contact| contact.dialler.as_ref()).map_or(0, |dialler| dialler.failures)
    };
    let failed_just_now = || {
        let contacts = inner.contacts();
        let failed_at = contacts.get(&peer).and_then(|contact| contact.dialler.as_ref()).and_then(|d| d.failed_at);
        failed_at.is_some_and(|at| at.elapsed() < FRESH)
    };
    let mut before = failures(inner);
    let mut moved = inner.moved.subscribe();
    if live(inner, peer).is_none() {
        if failed_just_now() {
            before = 0;
        } else {
            start(inner, peer);
        }
    }
    let wait = async {
        loop {
            if let Some(connection) = live(inner, peer) {
                return Some(connection);
            }
            if failures(inner) > before || moved.changed().await.is_err() {
                return None;
            }
        }
    };
    let connection = timeout(limit, wait).await.ok().flatten();
    connection.ok_or_else(|| {
        let contacts = inner.contacts();
        let dialler = contacts.get(&peer).and_then(|contact| contact.dialler.as_ref());
        let why = dialler.and_then(|dialler| dialler.last_error.clone());
        why.unwrap_or_else(|| "not connected, and no address to dial it at answers".into())
    })
}

/// Dials `peer` whenever it is not connected, until it is taken off the roster or we shut down.
async fn keep_connected(inner: Arc<Inner>, peer: PeerId, hurry: Arc<Notify>) {
    let mut backoff = Backoff::default();
    let mut closing = inner.closing.subscribe();
    let mut connected_at: Option<Instant> = None;
    loop {
        let Some(target) = inner.roster.get(peer).filter(|_| !*closing.borrow()) else {
            if let Some(contact) = inner.contacts().get_mut(&peer) {
                contact.dialler = None;
            }
            return;
        };
        let wait = if live(&inner, peer).is_some() {
            connected_at.get_or_insert_with(Instant::now);
            None
        } else {
            let lasted = connected_at.take().map(|at| at.elapsed());
            if lasted.is_some_and(|lasted| lasted >= STEADY) {
                backoff.reset();
            }
            if target.addresses.is_empty() && target.told.is_empty() {
                None
            } else if lasted.is_some_and(|lasted| lasted < STEADY) {
                // It let go of us at once: dialling at once again would go round and round.
                Some(backoff.after_failure(fastrand::f64()))
            } else {
                match dial(&inner, &target).await {
                    Ok(()) => continue,
                    // The peer dialled us meanwhile, and one connection is enough.
                    Err(_) if live(&inner, peer).is_some() => continue,
                    Err(error) => {
                        let wait = backoff.after_failure(fastrand::f64());
                        failed(&inner, &target, &error, wait);
                        Some(wait)
                    }
                }
            }
        };
        tokio::select! {
            () = hurry.notified() => {}
            _ = closing.changed() => {}
            () = sleep(wait.unwrap_or(IDLE)) => {}
        }
    }
}

/// Tries the peer's addresses in turn.
async fn dial(inner: &Arc<Inner>, peer: &Peer) -> io::Result<()> {
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "no address to dial");
    for address in peer.addresses.iter().chain(&peer.told) {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{address}: {}", tree::reason(&error)));
        let resolved = match timeout(DIAL_LIMIT, lookup_host(address)).await {
            Ok(Ok(resolved)) => resolved,
            Ok(Err(error)) => {
                last = named(error);
                continue;
            }
            Err(_) => {
                last = named(io::ErrorKind::TimedOut.into());
                continue;
            }
        };
        for socket in resolved {
            let attempt = async { say_hello(inner, inner.connect(peer.id, socket, ALPN).await?, peer.id).await };
            match timeout(DIAL_LIMIT, attempt).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => last = named(error),
                Err(_) => last = named(io::Error::new(io::ErrorKind::TimedOut, "no answer")),
            }
        }
    }
    Err(last)
}

fn failed(inner: &Inner, peer: &Peer, error: &io::Error, wait: Duration) {
    let mut contacts = inner.contacts();
    if let Some(dialler) = contacts.get_mut(&peer.id).and_then(|contact| contact.dialler.as_mut()) {
        let text = tree::reason(error);
        if dialler.last_error.as_ref() == Some(&text) {
            debug!(peer = peer.name, reason = text, wait_ms = wait.as_millis() as u64, "cannot be reached");
        } else {
            info!(peer = peer.name, reason = text, wait_ms = wait.as_millis() as u64, "cannot be reached");
        }
        dialler.last_error = Some(text);
        dialler.failures += 1;
        dialler.failed_at = Some(Instant::now());
    }
    drop(contacts);
    inner.moved.send_modify(|count| *count += 1);
}

const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// For how long a failed dial speaks for the next one.
const FRESH: Duration = Duration::from_secs(5);
/// A connection that lasted less has failed.
const STEADY: Duration = Duration::from_secs(5);
/// How long to rest when there is nothing to do; whatever changes that wakes us up.
const IDLE: Duration = Duration::from_secs(3600);
