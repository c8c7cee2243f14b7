use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime},
};

use blobstore::Store;
use namespace::{Mark, Namespace, PeerId};
use quinn::{
    ConnectionError, ConnectionId, ConnectionIdGenerator, EndpointConfig, MtuDiscoveryConfig, ServerConfig,
    TokioRuntime, TransportConfig, VarInt,
};
use ring::{
    hmac,
    rand::{SecureRandom, SystemRandom},
};
use tokio::sync::{Semaphore, watch};
use tracing::{debug, error, warn};
use tree::BlobId;

use crate::{
    Identity, Roster,
    chunks::Listing,
    coalescing::CoalescingSocket,
    congestion::Congestion,
    connection::{self, Live, PeerStatus, plain},
    counting::Counts,
    details::Describing,
    dial::{self, Dialler},
    hello::{Hello, is_address, is_listen_address, is_name},
    hints::Hints,
    iroh_wire, join,
    listen::{self, Bound, SOCKETS_MAX},
    network,
    obey::Obeying,
    pace::Limits,
    packing::Compress,
    race::{Flaw, FlawKind},
    racing::plain_io,
    serve,
    through::Turns,
    tls::{self, ALPN, JOIN_ALPN},
    twins::{REMEMBERED, Runs},
};

/// All other machines. Cheap to clone; the clones are one.
///
/// From [`start`](Self::start) to [`shutdown`](Self::shutdown) it listens, dials every peer that has an address
/// and dials again when a connection is lost.
#[derive(Clone)]
pub struct Peers {
    pub(crate) inner: Arc<Inner>,
}

/// With what [`Peers`] start.
pub struct Options {
    /// This machine's key.
    pub identity: Identity,
    /// What this machine calls itself: 1 to 64 bytes.
    pub name: String,
    /// Where to listen, each `HOST:PORT`, at most 16; none makes a deaf peer.
    pub listen: Vec<String>,
    /// Addresses to tell others besides those listened on.
    pub advertise: Vec<String>,
    /// If strangers may read blobs in iroh-blobs' protocol: which.
    pub public: Option<PublicBlobs>,
    /// When answers are compressed.
    pub compress: Compress,
    /// The congestion controller of what is sent.
    pub congestion: Congestion,
    /// The trusted peers.
    pub roster: Roster,
    /// The bytes here.
    pub store: Store,
    /// What is where.
    pub namespace: Namespace,
}

/// Tells which blobs strangers may read.
pub(crate) type PublicBlobs = Arc<dyn Fn(BlobId) -> bool + Send + Sync>;

/// Why [`Peers`] could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Nowhere can be listened: each place, and why.
    #[error("listen on {}", .0.join("; "))]
    Listen(Vec<String>),
    /// There is no socket to dial from.
    #[error("open a UDP socket: {0}")]
    Socket(String),
    /// Not an address to listen on, or too many of them.
    #[error("{0:?} is not an address to listen on: HOST:PORT, IPv6 in brackets, at most 16 of them")]
    ListenAddress(String),
    /// Not a name that a machine can have.
    #[error("{0:?} cannot be the name of a machine: 1 to 64 bytes without '/', ':' or control characters")]
    Name(String),
    /// Not an address to tell others.
    #[error("{0:?} is not an address: HOST:PORT")]
    Address(String),
    /// TLS could not be set up.
    #[error("set up TLS")]
    Tls(#[source] rustls::Error),
}

pub(crate) struct Inner {
    pub(crate) identity: Identity,
    pub(crate) name: String,
    pub(crate) roster: Roster,
    pub(crate) store: Store,
    pub(crate) namespace: Namespace,
    pub(crate) public: Option<PublicBlobs>,
    pub(crate) compress: Compress,
    /// Limits on what is sent, and on what is received.
    pub(crate) up: Limits,
    pub(crate) down: Limits,
    /// Of all answers.
    pub(crate) counts: Arc<Counts>,
    advertise: Vec<String>,
    /// What tells this run of the program from others.
    run: u64,
    /// When a peer last said that another machine runs with this one's key.
    twin_told: Mutex<Option<Instant>>,
    /// Where others can dial this machine, as things are now.
    addresses: RwLock<Vec<String>>,
    listeners: Vec<quinn::Endpoint>,
    /// What cannot be listened on, and why.
    problems: Vec<String>,
    dialling: quinn::Endpoint,
    transport: Arc<TransportConfig>,
    peers: Mutex<HashMap<PeerId, Contact>>,
    /// The latest marks of peers that others showed, which are later than what was heard: for those peers to see.
    pub(crate) rumours: Mutex<BTreeMap<PeerId, Mark>>,
    /// Moves when a peer asks for catalogs anew.
    pub(crate) telling: Mutex<HashMap<PeerId, watch::Sender<u64>>>,
    /// Moves whenever a contact does.
    pub(crate) moved: watch::Sender<u64>,
    pub(crate) closing: watch::Sender<bool>,
    pub(crate) hints: Hints,
    pub(crate) obeying: Obeying,
    pub(crate) describing: Describing,
    /// The blobs that are being brought into the cache, or taken from it.
    pub(crate) bringing: Mutex<HashMap<BlobId, Arc<tokio::sync::Mutex<()>>>>,
    /// Permits for handshakes, at all listeners together.
    handshakes: Arc<Semaphore>,
    /// Who may make and send lists of chunks.
    pub(crate) listing: Listing,
    /// Permits for connections of strangers.
    strangers: Arc<Semaphore>,
    /// Permits for names that are being looked up.
    pub(crate) lookups: Arc<Semaphore>,
}

/// How things stand with one peer.
#[derive(Default)]
pub(crate) struct Contact {
    pub(crate) live: Option<Live>,
    pub(crate) runs: Runs,
    /// When the last connection ended, in seconds since 1970.
    pub(crate) last_connected: Option<i64>,
    /// Whether that connection ended without the peer closing it.
    pub(crate) fell_silent: bool,
    /// How often the peer has been connected and disconnected.
    pub(crate) changes: u64,
    /// Why it ended.
    pub(crate) last_ended: Option<String>,
    pub(crate) dialler: Dialler,
    /// Permits for what is fetched on its behalf.
    pub(crate) turns: Turns,
}

impl Peers {
    /// Whether a peer is connected now.
    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.inner.contacts().get(&peer).is_some_and(|contact| contact.live.is_some())
    }

    /// Whether another machine runs with this one's key, by what a peer has said within the hour.
    pub fn has_twin(&self) -> bool {
        let told = self.inner.twin_told.lock().unwrap_or_else(PoisonError::into_inner);
        told.is_some_and(|at| at.elapsed() <= REMEMBERED)
    }

    /// Starts listening and dialling. Needs a tokio runtime, and blocks while it looks names up.
    pub fn start(options: Options) -> Result<Self, StartError> {
        if !is_name(&options.name) {
            return Err(StartError::Name(options.name));
        }
        if let Some(address) = options.advertise.iter().find(|address| !is_address(address)) {
            return Err(StartError::Address(address.clone()));
        }
        let not_an_address = options.listen.iter().find(|address| !is_listen_address(address));
        if let Some(address) = not_an_address.or(options.listen.get(SOCKETS_MAX)) {
            return Err(StartError::ListenAddress(address.clone()));
        }
        let transport = Arc::new(transport_config(options.congestion));
        let admits = {
            let (roster, open) = (options.roster.clone(), options.public.is_some());
            Arc::new(move |peer| {
                let admitted = open || roster.get(peer).is_some() || roster.has_invites(unix_now());
                if !admitted {
                    warn!(%peer, "refused: an unknown peer");
                }
                admitted
            })
        };
        let mut alpns = vec![ALPN, JOIN_ALPN];
        alpns.extend(options.public.is_some().then_some(iroh_wire::ALPN));
        let Bound { sockets, mut problems } = listen::bind_all(&options.listen);
        let mut listeners = Vec::new();
        for socket in &sockets {
            let tls = tls::server_config(&options.identity, &alpns, admits.clone()).map_err(StartError::Tls)?;
            let mut config = ServerConfig::with_crypto(Arc::new(tls));
            config.transport_config(transport.clone());
            config.max_incoming(INCOMING_MAX / sockets.len());
            match socket.try_clone().and_then(|socket| endpoint(socket, &options.identity, Some(config))) {
                Ok(listener) => listeners.push(listener),
                Err(error) => problems.push(plain_io(&error.to_string())),
            }
        }
        if listeners.is_empty() && !options.listen.is_empty() {
            return Err(StartError::Listen(problems));
        }
        for problem in &problems {
            warn!("cannot listen on {problem}");
        }
        let dialling = listen::bind((Ipv6Addr::UNSPECIFIED, 0).into())
            .and_then(|socket| endpoint(socket, &options.identity, None));
        let dialling = dialling.map_err(|error| StartError::Socket(plain_io(&error.to_string())))?;
        let inner = Arc::new(Inner {
            identity: options.identity,
            name: options.name,
            roster: options.roster,
            store: options.store,
            namespace: options.namespace,
            public: options.public,
            compress: options.compress,
            up: Limits::none(),
            down: Limits::none(),
            counts: Arc::default(),
            advertise: options.advertise,
            run: fastrand::u64(..),
            twin_told: Mutex::default(),
            addresses: RwLock::default(),
            listeners,
            problems,
            dialling,
            transport,
            peers: Mutex::default(),
            rumours: Mutex::default(),
            telling: Mutex::default(),
            moved: watch::Sender::new(0),
            closing: watch::Sender::new(false),
            hints: Hints::default(),
            obeying: Obeying::default(),
            describing: Describing::default(),
            bringing: Mutex::default(),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            listing: Listing::default(),
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
        });
        inner.find_addresses();
        for listener in &inner.listeners {
            tokio::spawn(accept(inner.clone(), listener.clone()));
        }
        tokio::spawn(network::watch(inner.clone()));
        for peer in inner.roster.peers() {
            dial::start(&inner, peer.id);
        }
        Ok(Self { inner })
    }

    /// This machine's id.
    pub fn me(&self) -> PeerId {
        self.inner.identity.peer()
    }

    /// The trusted peers.
    pub fn roster(&self) -> &Roster {
        &self.inner.roster
    }

    /// Where this machine can be dialled now, each `HOST:PORT`; none if it is deaf.
    pub fn addresses(&self) -> Vec<String> {
        self.inner.addresses()
    }

    /// The first of the addresses listened on.
    pub fn listens_on(&self) -> Option<SocketAddr> {
        self.listeners().first().copied()
    }

    /// The addresses listened on, with the ports that the system chose where none was asked for.
    pub fn listeners(&self) -> Vec<SocketAddr> {
        self.inner.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// What was to be listened on and is not, each with the reason.
    pub fn not_listening(&self) -> &[String] {
        &self.inner.problems
    }

    /// How things stand with each trusted peer, by id.
    pub fn status(&self) -> Vec<PeerStatus> {
        connection::status(&self.inner)
    }

    /// Tells whenever [`status`](Self::status) may say something else. The number is of no meaning.
    pub fn moves(&self) -> watch::Receiver<u64> {
        self.inner.moved.subscribe()
    }

    /// The limits on what is sent.
    pub fn up(&self) -> &Limits {
        &self.inner.up
    }

    /// The limits on what is received.
    pub fn down(&self) -> &Limits {
        &self.inner.down
    }

    /// Dials a peer that was added to the roster, or whose addresses changed, at once.
    pub fn dial_now(&self, peer: PeerId) {
        dial::urge(&self.inner, peer);
    }

    /// Ends the connection with a peer that was taken off the roster.
    pub fn disconnect(&self, peer: PeerId) {
        connection::disconnect(&self.inner, peer);
    }

    /// Ends all connections, telling the others so. Takes at most 2 s.
    pub async fn shutdown(&self) {
        self.inner.closing.send_replace(true);
        let endpoints = || self.inner.listeners.iter().chain([&self.inner.dialling]);
        endpoints().for_each(|endpoint| endpoint.close(Close::Leaving.code(), b"leaving"));
        let idle = async {
            for endpoint in endpoints() {
                endpoint.wait_idle().await;
            }
        };
        let _ = tokio::time::timeout(SHUTDOWN_LIMIT, idle).await;
    }
}

impl Inner {
    pub(crate) fn contacts(&self) -> MutexGuard<'_, HashMap<PeerId, Contact>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a peer is called, so far as is known.
    pub(crate) fn name_of(&self, peer: PeerId) -> Option<String> {
        match self.roster.get(peer) {
            _ if peer == self.identity.peer() => Some(self.name.clone()),
            Some(peer) => Some(peer.name),
            None => self.namespace.name_of(peer),
        }
    }

    /// The peers that are connected now.
    pub(crate) fn connected(&self) -> BTreeSet<PeerId> {
        let contacts = self.contacts();
        contacts.iter().filter(|(_, contact)| contact.live.is_some()).map(|(peer, _)| *peer).collect()
    }

    /// What this machine says of itself to `peer`.
    pub(crate) fn hello(&self, peer: PeerId) -> Hello {
        let twins = self.contacts().get(&peer).is_some_and(|contact| contact.runs.has_twins(Instant::now()));
        Hello { name: self.name.clone(), addresses: self.addresses(), packs: true, run: self.run, twins }
    }

    /// Takes note that a peer has said that another machine runs with this one's key.
    pub(crate) fn note_twin(&self, peer: PeerId) {
        let mut told = self.twin_told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.replace(Instant::now()).is_none_or(|at| at.elapsed() > REMEMBERED) {
            let peer = self.name_of(peer).unwrap_or_else(|| peer.to_string());
            error!(peer, "another machine runs with this one's key: a home was cloned; make one of them anew");
        }
    }

    fn addresses(&self) -> Vec<String> {
        self.addresses.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks where others can dial this machine now: at most 16 addresses.
    pub(crate) fn find_addresses(&self) {
        let mut addresses = self.advertise.clone();
        for listener in self.listeners.iter().filter_map(|listener| listener.local_addr().ok()) {
            for address in reachable_at(listener) {
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
        }
        // Of several listeners, too, those on loopback come last.
        let is_loopback =
            |address: &String| address.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback());
        addresses.sort_by_key(is_loopback);
        addresses.truncate(16);
        *self.addresses.write().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// The addresses at which this machine meets itself.
    pub(crate) fn own_addresses(&self) -> Vec<SocketAddr> {
        let bound = self.listeners.iter().filter_map(|listener| listener.local_addr().ok());
        bound.flat_map(reachable_at).filter_map(|address| address.parse().ok()).collect()
    }

    /// Dials `address`, where `peer` and nobody else must be met.
    pub(crate) fn connecting(&self, peer: PeerId, address: SocketAddr, alpn: &[u8]) -> Result<quinn::Connecting, Flaw> {
        let network = |why: String| Flaw::new(FlawKind::Network, why);
        let tls = tls::client_config(&self.identity, peer, alpn).map_err(|error| network(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(self.transport.clone());
        self.dialling.connect_with(config, address, SERVER_NAME).map_err(|error| network(error.to_string()))
    }
}

/// Takes connections in until the endpoint closes. Handshakes run beside this loop.
async fn accept(inner: Arc<Inner>, listener: quinn::Endpoint) {
    let handshakes = &inner.handshakes;
    while let Some(incoming) = listener.accept().await {
        let from = plain(incoming.remote_address());
        if handshakes.available_permits() < HANDSHAKES_MAX / 2 && incoming.may_retry() {
            // Under load, whoever connects must first show that packets reach it at the address it claims.
            let _ = incoming.retry();
            continue;
        }
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let inner = inner.clone();
        tokio::spawn(async move {
            let greeted = tokio::time::timeout(GREETING_LIMIT, greet(&inner, incoming)).await;
            if greeted.is_err() {
                debug!(address = %from, "refused: it took too long to say who it is");
            }
            drop(permit);
        });
    }
    if !*inner.closing.borrow() {
        error!(address = ?listener.local_addr().ok(), "nobody is listened to there any more");
    }
}

/// Finishes a handshake and hands the connection to whom it is for.
async fn greet(inner: &Arc<Inner>, incoming: quinn::Incoming) {
    let from = plain(incoming.remote_address());
    let connection = match incoming.accept() {
        Ok(connecting) => match connecting.await {
            Ok(connection) => connection,
            Err(error) => {
                return debug!(address = %from, reason = tree::reason(&error), "refused: the handshake failed");
            }
        },
        Err(error) => return debug!(address = %from, reason = tree::reason(&error), "refused"),
    };
    let data =
        connection.handshake_data().and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok());
    let alpn = data.and_then(|data| data.protocol).unwrap_or_default();
    let Some(peer) = tls::peer_of(&connection) else {
        return connection.close(Close::UnknownPeer.code(), b"no key");
    };
    if alpn == JOIN_ALPN {
        join::serve(inner, &connection, peer).await;
    } else if alpn == iroh_wire::ALPN && inner.public.is_some() {
        match inner.strangers.clone().try_acquire_owned() {
            Ok(permit) => drop(tokio::spawn(serve::serve_strangers(inner.clone(), connection, permit))),
            Err(_) => connection.close(Close::Busy.code(), b"too many strangers"),
        }
    } else if inner.roster.get(peer).is_none() {
        warn!(%peer, address = %from, "refused: an unknown peer");
        connection.close(Close::UnknownPeer.code(), b"unknown peer");
    } else if let Err(error) = connection::answer_hello(inner, connection, peer).await {
        debug!(%peer, address = %from, reason = tree::reason(&error), "refused");
    }
}

/// Why a connection is closed. Codes: spec/wire.md, "Close codes".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Close {
    Done = 0,
    UnknownPeer = 1,
    Duplicate = 2,
    Leaving = 3,
    Misbehaved = 4,
    Busy = 5,
}

impl Close {
    pub(crate) fn code(self) -> VarInt {
        VarInt::from_u32(self as u32)
    }

    /// Whether the other side closed a connection so.
    pub(crate) fn is(self, error: &ConnectionError) -> bool {
        matches!(error, ConnectionError::ApplicationClosed(close) if close.error_code == self.code())
    }
}

/// Connection ids that say nothing: of any, it may be that this machine had it before it was started again. (Those that
/// quinn makes by itself are known again only by the program that made them.)
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = fastrand::u64(..).to_le_bytes();
        let _ = SystemRandom::new().fill(&mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

fn endpoint(socket: UdpSocket, identity: &Identity, server: Option<ServerConfig>) -> io::Result<quinn::Endpoint> {
    // The same after a restart: so whoever goes on with a connection from before is told that it is gone.
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &identity.reset_key())));
    config.cid_generator(|| Box::new(RandomIds));
    config.max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX).map_err(io::Error::other)?;
    let socket = Arc::new(CoalescingSocket::new(socket)?);
    quinn::Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
}

/// The settings of every connection between peers.
pub fn transport_config(congestion: Congestion) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(UDP_PAYLOAD_BYTES_MAX);
    transport
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        .max_concurrent_uni_streams(0_u32.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(CONNECTION_WINDOW_BYTES.into())
        .mtu_discovery_config(Some(mtu))
        .packet_threshold(REORDERED_PACKETS)
        .time_threshold(REORDERED_ROUND_TRIPS)
        .congestion_controller_factory(congestion.factory())
        .keep_alive_interval(Some(Duration::from_secs(5)))
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_LIMIT_MS).into()));
    transport
}

/// The addresses under which others may reach a socket that is bound to `bound`.
fn reachable_at(bound: SocketAddr) -> Vec<String> {
    if !bound.ip().is_unspecified() {
        return vec![bound.to_string()];
    }
    let mut found: Vec<_> = if_addrs::get_if_addrs().unwrap_or_default().iter().map(if_addrs::Interface::ip).collect();
    // Link-local addresses mean nothing without an interface, and loopback ones nothing elsewhere.
    found.retain(|ip| match ip {
        std::net::IpAddr::V4(ip) => !ip.is_link_local(),
        std::net::IpAddr::V6(ip) => bound.is_ipv6() && !ip.is_unicast_link_local(),
    });
    found.sort_by_key(|ip| (ip.is_loopback(), ip.is_ipv4()));
    found.into_iter().map(|ip| SocketAddr::new(ip, bound.port()).to_string()).collect()
}

pub(crate) fn unix_now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// Sent by nobody and checked by nobody, but TLS wants a name.
const SERVER_NAME: &str = "blobd.invalid";
pub(crate) const GREETING_LIMIT: Duration = Duration::from_secs(10);
const HANDSHAKES_MAX: usize = 64;
const STRANGERS_MAX: usize = 16;
const INCOMING_MAX: usize = 256;
const LOOKUPS_MAX: usize = 32;
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);
const STREAMS_MAX: u32 = 256;
/// Bounds the gaps that packet loss can leave in a stream below quinn-proto's limit: spec/wire.md, "Transport".
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Packets and round trips by which a packet may be overtaken before it counts as lost: spec/wire.md, "Transport".
const REORDERED_PACKETS: u32 = 128;
const REORDERED_ROUND_TRIPS: f32 = 1.5;
/// The largest datagrams that are sent, and that are taken.
pub const UDP_PAYLOAD_BYTES_MAX: u16 = 6500;
const IDLE_LIMIT_MS: u32 = 15_000;
