//! Runs a [`Race`]: looks names up, shakes hands and greets, each in a task of its own.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Instant,
};

use namespace::PeerId;
use quinn::ConnectionError;
use rustix::io::Errno;
use tokio::{
    net::lookup_host,
    task::{AbortHandle, JoinSet},
    time::sleep_until,
};

use crate::{
    endpoint::{Close, Inner},
    frame::FrameError,
    race::{Flaw, FlawKind, Limits, Race, Step},
};

/// What came of something that was begun.
enum Happened<T> {
    Resolved(usize, Result<Vec<SocketAddr>, Flaw>),
    Met(usize, Result<quinn::Connection, Flaw>),
    Greeted(usize, Result<T, Flaw>),
}

/// Meets `peer` at the first of the addresses of `names` where it answers what `greet` says, in the protocol `alpn`.
/// All other attempts are dropped. Takes at most `limits.all`.
pub(crate) async fn first<T, G>(
    inner: &Arc<Inner>,
    peer: PeerId,
    alpn: &'static [u8],
    names: Vec<String>,
    limits: Limits,
    greet: impl Fn(quinn::Connection) -> G,
) -> Result<T, Flaw>
where
    T: Send + 'static,
    G: Future<Output = Result<T, Flaw>> + Send + 'static,
{
    let mut race = Race::new(names, &inner.own_addresses(), limits, Instant::now());
    // Whatever is still under way ends when this is dropped, and with it its connection.
    let mut under_way = JoinSet::new();
    let mut tasks: HashMap<usize, AbortHandle> = HashMap::new();
    let mut met: HashMap<usize, quinn::Connection> = HashMap::new();
    loop {
        match race.poll(Instant::now()) {
            Step::Resolve(number, name) => {
                let inner = inner.clone();
                under_way.spawn(async move { Happened::Resolved(number, resolve(&inner, name).await) });
            }
            Step::Connect(attempt, address) => {
                let inner = inner.clone();
                let task = async move { Happened::Met(attempt, shake_hands(&inner, peer, address, alpn).await) };
                tasks.insert(attempt, under_way.spawn(task));
            }
            Step::Greet(attempt) => {
                if let Some(connection) = met.remove(&attempt) {
                    let greeting = greet(connection);
                    let task = async move { Happened::Greeted(attempt, greeting.await) };
                    tasks.insert(attempt, under_way.spawn(task));
                }
            }
            Step::Drop(attempt) => {
                met.remove(&attempt);
                tasks.remove(&attempt).inspect(AbortHandle::abort);
            }
            Step::Wait(until) => tokio::select! {
                Some(Ok(happened)) = under_way.join_next() => match happened {
                    Happened::Resolved(number, found) => race.handle_resolved(number, found),
                    Happened::Met(attempt, Ok(connection)) => {
                        met.insert(attempt, connection);
                        race.handle_met(attempt);
                    }
                    Happened::Greeted(attempt, Ok(answer)) => {
                        if race.handle_won(attempt) {
                            return Ok(answer);
                        }
                    }
                    Happened::Met(attempt, Err(flaw)) | Happened::Greeted(attempt, Err(flaw)) => {
                        race.handle_failed(attempt, flaw);
                    }
                },
                () = sleep_until(until.into()) => {}
            },
            Step::Failed => return Err(race.into_failure()),
        }
    }
}

/// The addresses of `HOST:PORT`.
async fn resolve(inner: &Inner, name: String) -> Result<Vec<SocketAddr>, Flaw> {
    if let Some(port) = name.strip_prefix("localhost:").and_then(|port| port.parse().ok()) {
        // RFC 6761: whatever the system's tables say of it.
        let loopback: [IpAddr; 2] = [Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()];
        return Ok(loopback.map(|ip| SocketAddr::new(ip, port)).to_vec());
    }
    let Ok(permit) = inner.lookups.clone().acquire_owned().await else { return Ok(Vec::new()) };
    // A look-up cannot be broken off: it keeps its permit for as long as it takes, whoever still waits for it.
    let looking = tokio::spawn(async move {
        let found = lookup_host(name).await.map(|found| found.take(NAME_ADDRESSES_MAX).collect::<Vec<_>>());
        drop(permit);
        found
    });
    match looking.await {
        Ok(Ok(found)) if !found.is_empty() => Ok(found),
        Ok(Err(error)) => Err(Flaw::new(FlawKind::Network, why_unknown(&error))),
        _ => Err(Flaw::new(FlawKind::Network, "the name has no address")),
    }
}

/// Why a name could not be looked up, in a few words.
pub(crate) fn why_unknown(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("failed to lookup address information: ").unwrap_or(&text);
    if ["not known", "No address associated", "nodename nor servname"].iter().any(|known| text.contains(known)) {
        "the name is not known".to_owned()
    } else {
        format!("the name cannot be looked up: {}", plain_io(text))
    }
}

/// What the system said, without its number.
pub(crate) fn plain_io(text: &str) -> String {
    let text = text.rsplit_once(" (os error ").map_or(text, |(text, _)| text);
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

async fn shake_hands(inner: &Inner, peer: PeerId, address: SocketAddr, alpn: &[u8]) -> Result<quinn::Connection, Flaw> {
    if let Err(error) = route_to(address) {
        return Err(Flaw::new(FlawKind::Network, plain_io(&error.to_string())));
    }
    let connecting = inner.connecting(peer, address, alpn)?;
    connecting.await.map_err(|error| before_the_key(&error))
}

/// Whether there is a way to an address, so far as this machine knows. Sends nothing.
fn route_to(address: SocketAddr) -> io::Result<()> {
    let any: IpAddr = if address.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let outcome = UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(address));
    outcome.or_else(|error| match Errno::from_io_error(&error) {
        Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => Err(error),
        // Without descriptors or memory, say, nothing is known of the way.
        _ => Ok(()),
    })
}

/// What a connection failed of before the other side has shown that it is the peer: so it is not the peer's word.
fn before_the_key(error: &ConnectionError) -> Flaw {
    let is_tls = |code: quinn::TransportErrorCode| (0x100..0x200).contains(&u64::from(code));
    let elsewhere = |why| Flaw::new(FlawKind::Elsewhere, why);
    match error {
        ConnectionError::TransportError(error) if error.code == quinn::TransportErrorCode::crypto(ACCESS_DENIED) => {
            elsewhere("another machine answers there")
        }
        ConnectionError::TransportError(error) if is_tls(error.code) => elsewhere("no blobd answers there"),
        ConnectionError::ConnectionClosed(close) if is_tls(close.error_code) => elsewhere("no blobd answers there"),
        ConnectionError::VersionMismatch => elsewhere("no blobd answers there"),
        ConnectionError::ConnectionClosed(close)
            if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED =>
        {
            Flaw::new(FlawKind::Network, "it takes no more connections now")
        }
        ConnectionError::TimedOut => Flaw::new(FlawKind::Network, "no answer"),
        error => Flaw::new(FlawKind::Network, error.to_string()),
    }
}

/// What a greeting failed of, the key having been proven: what closed the connection says more than how a stream ended.
pub(crate) fn behind_the_key(connection: &quinn::Connection, error: &FrameError) -> Flaw {
    let network = |why: String| Flaw::new(FlawKind::Network, why);
    match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(close)) if close.error_code == Close::UnknownPeer.code() => unknown(),
        Some(ConnectionError::ApplicationClosed(close)) => {
            let reason = String::from_utf8_lossy(&close.reason).chars().filter(|c| !c.is_control()).take(200).collect();
            network(if close.reason.is_empty() { "it closed the connection".to_owned() } else { reason })
        }
        Some(ConnectionError::ConnectionClosed(close)) if (0x100..0x200).contains(&u64::from(close.error_code)) => {
            unknown()
        }
        Some(ConnectionError::TimedOut) => network("no answer".to_owned()),
        Some(reason) => network(reason.to_string()),
        None => network(error.to_string()),
    }
}

fn unknown() -> Flaw {
    Flaw::new(FlawKind::Refused, "refused: this machine is not on its roster")
}

/// The TLS alert with which a key is refused.
const ACCESS_DENIED: u8 = 49;
/// So many addresses of a name are looked at.
const NAME_ADDRESSES_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_in_plain_words() {
        let looked_up =
            |text: &str| why_unknown(&io::Error::other(format!("failed to lookup address information: {text}")));
        assert_eq!(looked_up("Name or service not known"), "the name is not known");
        assert_eq!(looked_up("No address associated with hostname"), "the name is not known");
        let later = "the name cannot be looked up: temporary failure in name resolution";
        assert_eq!(looked_up("Temporary failure in name resolution"), later);
        let unreachable = io::Error::from_raw_os_error(101);
        assert_eq!(plain_io(&unreachable.to_string()), "network is unreachable");
        assert_eq!(plain_io(""), "");
    }

    #[test]
    fn loopback_can_be_reached_as_far_as_is_known() {
        route_to(SocketAddr::from(([127, 0, 0, 1], 9))).unwrap();
    }
}
