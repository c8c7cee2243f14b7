//! How machines find each other.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use blobstore::{Collected, Fetch, FetchError, Fetched, Want};

use crate::machine::{DEADLINE, Machine, random_bytes, until};
use crate::net::{Cable, Counter, Silent};
use crate::raw::introduced;
use peers::{Identity, Peer, PeerStatus, Role};
use tokio::time::timeout;
use tree::{BlobId, GROUP_BYTES, Geometry};

/// A machine that listens there.
fn listening(name: &str, listen: &[&str]) -> Machine {
    Machine::with(Identity::ephemeral().unwrap(), name, listen, 1 << 30).unwrap()
}

impl Machine {
    /// Puts a peer on the roster, with these addresses.
    fn knows(&self, other: &Machine, addresses: &[String]) {
        let (id, name) = (other.id(), other.name.clone());
        self.peers
            .roster()
            .set(Peer { id, name, addresses: addresses.to_vec(), told: Vec::new(), role: Role::default() })
            .unwrap();
        self.peers.dial_now(id);
    }

    fn status_of(&self, other: &Machine) -> PeerStatus {
        self.peers.status().into_iter().find(|status| status.peer.id == other.id()).unwrap()
    }

    /// Waits until this one is connected with `other`, and returns how long that took.
    async fn connects(&self, other: &Machine) -> Duration {
        let began = Instant::now();
        until("they are connected", || self.is_connected(other.id()) && other.is_connected(self.id())).await;
        began.elapsed()
    }

    /// Fetches what should be `bytes` into memory; once some of it has come, `this` happens.
    async fn fetch_while(&self, bytes: &[u8], this: impl Future<Output = ()>) -> Result<Fetched, FetchError> {
        let (blob, size) = (BlobId::of(bytes), bytes.len() as u64);
        let collected = Arc::new(Mutex::new(Collected::default()));
        let so_far = || collected.lock().unwrap().pieces.len();
        let want = Want { blob, size, ranges: Geometry::new(size).all().into() };
        let happen = async {
            until("some has come", || so_far() > 0).await;
            assert!(so_far() < bytes.len() / GROUP_BYTES as usize, "it is still on its way");
            this.await;
        };
        let (fetched, ()) = tokio::join!(timeout(DEADLINE, self.peers.fetch(want, collected.clone())), happen);
        let pieces = &collected.lock().unwrap().pieces;
        assert!(
            pieces.iter().all(|piece| piece.bytes()[..] == bytes[piece.offset() as usize..][..piece.bytes().len()])
        );
        fetched.expect("in time")
    }

    fn address(&self) -> SocketAddr {
        self.peers.listens_on().unwrap()
    }
}

/// `a` with the lesser id.
fn two_identities() -> [Identity; 2] {
    let mut both = [Identity::ephemeral().unwrap(), Identity::ephemeral().unwrap()];
    both.sort_by_key(Identity::peer);
    both
}

#[tokio::test(flavor = "multi_thread")]
async fn localhost_is_either_loopback_address() {
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        let (a, b) = (listening("a", &[listen]), listening("b", &[]));
        a.knows(&b, &[]);
        b.knows(&a, &[format!("localhost:{}", a.address().port())]);
        let took = b.connects(&a).await;
        assert!(took < QUICK, "{listen}: {took:?}");
        assert_eq!(b.status_of(&a).connected, Some(a.address()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_swallow_packets_do_not_hold_up_the_one_that_answers() {
    let silent = [Silent::at("[::1]:0"), Silent::at("127.0.0.1:0")].map(|silent| (silent.address(), silent));
    let (a, b) = (listening("a", &["127.0.0.1:0"]), listening("b", &[]));
    a.knows(&b, &[]);
    b.knows(&a, &[silent[0].0.clone(), silent[1].0.clone(), a.address().to_string()]);
    let took = b.connects(&a).await;
    assert!(took < QUICK, "{took:?}");

    let c = listening("c", &[]);
    let mut ticket = a.peers.invite(Duration::from_secs(60), Role::Reader).unwrap();
    ticket.addresses = vec![silent[0].0.clone(), silent[1].0.clone(), a.address().to_string()];
    let began = Instant::now();
    c.peers.join(&ticket).await.unwrap();
    assert!(began.elapsed() < QUICK, "{:?}", began.elapsed());
    c.connects(&a).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_address_is_listened_on_and_what_cannot_be_is_said() {
    let a = listening("a", &["127.0.0.1:0", "[::1]:0", NOT_OURS]);
    assert_eq!(a.peers.listeners().len(), 2);
    assert_eq!(a.peers.not_listening(), [format!("{NOT_OURS}: no interface of this machine has that address")]);
    for address in a.peers.listeners() {
        let b = listening("b", &[]);
        a.knows(&b, &[]);
        b.knows(&a, &[address.to_string()]);
        b.connects(&a).await;
        a.peers.roster().remove(b.id()).unwrap();
    }
    let fails = |listen: &[&str]| {
        Machine::with(Identity::ephemeral().unwrap(), "x", listen, 0).err().expect("it fails").to_string()
    };
    let taken = a.address();
    assert_eq!(fails(&[&taken.to_string()]), format!("listen on {taken}: address in use"));
    let named = fails(&[&format!("localhost:{}", taken.port()), NOT_OURS]);
    assert!(named.contains(&format!("localhost:{} ({taken}): address in use; ", taken.port())), "{named}");
    assert!(named.ends_with("no interface of this machine has that address"), "{named}");
    assert!(fails(&["nonsense"]).starts_with("\"nonsense\" is not an address to listen on"));
}

/// It only dials, and is asked all the same, over the connection that it made.
#[tokio::test(flavor = "multi_thread")]
async fn a_deaf_machine_serves() {
    let (a, deaf) = (listening("a", &["127.0.0.1:0"]), listening("deaf", &[]));
    let bytes = random_bytes(1, 300_000);
    let blob = deaf.hold("file", &bytes);
    a.knows(&deaf, &[]);
    deaf.knows(&a, &[a.address().to_string()]);
    deaf.connects(&a).await;
    a.heard(&deaf, &deaf, blob).await;
    assert!(a.status_of(&deaf).peer.told.is_empty(), "there is no address to dial it at");
    let fetched = timeout(DEADLINE, a.fetch_all(&bytes)).await.unwrap().unwrap();
    assert_eq!(fetched.peers, ["deaf"]);
    let error = a.peers.dial(listening("x", &[]).id()).await.unwrap_err();
    assert_eq!(error, "it is not on the roster");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_dial_each_other_end_with_one_connection() {
    for round in 0..10 {
        let (a, b) = (listening("a", &["127.0.0.1:0"]), listening("b", &["127.0.0.1:0"]));
        a.knows(&b, &[b.address().to_string()]);
        b.knows(&a, &[a.address().to_string()]);
        // Each sees the other where it dialled it, or at the other's port for dialling: so just one of them is dialled.
        until("there is one connection", || {
            let (at_a, at_b) = (a.status_of(&b).connected, b.status_of(&a).connected);
            at_a.is_some() && at_b.is_some() && (at_a == Some(b.address())) != (at_b == Some(a.address()))
        })
        .await;
        let bytes = random_bytes(round, 20_000);
        let blob = a.hold("file", &bytes);
        b.heard(&a, &a, blob).await;
        timeout(DEADLINE, b.fetch_all(&bytes)).await.unwrap().unwrap();
    }
}

/// The connection that would stay is dead, and this machine does not know it yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_connection_does_not_keep_out_the_peer_that_comes_back() {
    let [lesser, greater] = two_identities();
    let a = Machine::with(lesser, "a", &["127.0.0.1:0"], 0).unwrap();
    let b = Machine::with(greater.clone(), "b", &["127.0.0.1:0"], 0).unwrap();
    let cable = Cable::to(b.address()).await;
    b.knows(&a, &[]);
    a.knows(&b, &[cable.address.to_string()]);
    a.connects(&b).await;
    // While it works, it stays, for the lesser one dialled it.
    let second = introduced(&greater, &a).await;
    let closed = timeout(DEADLINE, second.closed()).await.unwrap().to_string();
    assert!(closed.contains("there is a connection already"), "{closed}");

    cable.cut();
    b.peers.shutdown().await;
    let back = Machine::with(greater, "b", &[], 0).unwrap();
    back.knows(&a, &[a.address().to_string()]);
    let began = Instant::now();
    assert_eq!(back.peers.dial(a.id()).await, Ok(a.address()));
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    let is_new = || a.status_of(&back).connected.is_some_and(|address| address != cable.address);
    until("it is in use", is_new).await;
}

/// Whoever dialled it, and has not noticed, is told by the first packet that it sends; not after 15 s of silence.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_was_killed_and_started_again_is_soon_in_use() {
    let identity = Identity::ephemeral().unwrap();
    let a = listening("a", &[]);
    let before = Machine::with(identity.clone(), "b", &["127.0.0.1:0"], 0).unwrap();
    let (address, cable) = (before.address(), Cable::to(before.address()).await);
    before.knows(&a, &[]);
    a.knows(&before, &[cable.address.to_string()]);
    a.connects(&before).await;
    cable.cut();
    before.peers.shutdown().await;
    drop(before);
    // Its sockets close a moment later.
    let listen = [address.to_string()];
    until("its port is free", || std::net::UdpSocket::bind(address).is_ok()).await;
    let b = Machine::with(identity, "b", &listen.each_ref().map(String::as_str), 0).unwrap();
    b.knows(&a, &[]);
    let bytes = random_bytes(4, 1000);
    let blob = b.hold("file", &bytes);
    let _hint = a.peers.hint(blob, b.id());
    assert!(a.is_connected(b.id()) && !b.is_connected(a.id()), "it has not noticed");
    cable.mend();
    let began = Instant::now();
    timeout(IN_USE, a.fetch_all(&bytes)).await.unwrap().expect("it goes on over a connection made anew");
    assert!(began.elapsed() < QUICK, "{:?}", began.elapsed());
    a.heard(&b, &b, blob).await;
}

/// What is on its way goes on over the connection that takes the place of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_on_when_the_peer_replaces_its_connection() {
    let (a, b) = (listening("a", &["127.0.0.1:0"]), listening("b", &[]));
    a.knows(&b, &[]);
    b.knows(&a, &[a.address().to_string()]);
    b.connects(&a).await;
    let bytes = random_bytes(5, 400_000);
    let _hint = b.peers.hint(a.hold("file", &bytes), a.id());
    a.peers.up().set(Some(SLOW));
    let replace = async {
        // For `a` it is the same machine that dials again.
        let _other = introduced(&b.identity, &a).await;
        a.peers.up().set(None);
    };
    assert_eq!(b.fetch_while(&bytes, replace).await.unwrap().peers, ["a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_on_when_its_connection_is_found_dead_and_replaced() {
    let (a, b) = (listening("a", &[]), listening("b", &["127.0.0.1:0"]));
    let cable = Cable::to(b.address()).await;
    b.knows(&a, &[]);
    a.knows(&b, &[cable.address.to_string()]);
    a.connects(&b).await;
    let bytes = random_bytes(6, 400_000);
    let _hint = a.peers.hint(b.hold("file", &bytes), b.id());
    b.peers.up().set(Some(SLOW));
    let replace = async {
        cable.cut();
        let known = a.status_of(&b).peer;
        a.peers.roster().set(Peer { addresses: vec![b.address().to_string()], ..known }).unwrap();
        assert_eq!(a.peers.dial(b.id()).await, Ok(b.address()));
        b.peers.up().set(None);
    };
    assert_eq!(a.fetch_while(&bytes, replace).await.unwrap().peers, ["b"]);
}

/// A user who asks is not told of a connection that does not work.
#[tokio::test(flavor = "multi_thread")]
async fn dialling_by_hand_sees_that_a_connection_is_dead() {
    let (a, b) = (listening("a", &["127.0.0.1:0"]), listening("b", &[]));
    let cable = Cable::to(a.address()).await;
    a.knows(&b, &[]);
    b.knows(&a, &[cable.address.to_string()]);
    b.connects(&a).await;
    assert_eq!(b.peers.dial(a.id()).await, Ok(cable.address));
    cable.cut();
    b.peers.roster().set(Peer { addresses: vec![a.address().to_string()], ..b.status_of(&a).peer }).unwrap();
    let began = Instant::now();
    assert_eq!(b.peers.dial(a.id()).await, Ok(a.address()));
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_machine_behind_an_address_is_not_hammered() {
    let (a, b) = (listening("a", &[]), listening("b", &[]));
    let counter = Counter::start();
    b.knows(&a, &[counter.address.to_string()]);
    until("it is refused", || b.status_of(&a).last_error.is_some()).await;
    let status = b.status_of(&a);
    assert_eq!(status.last_error.unwrap(), format!("{}: another machine answers there", counter.address));
    assert!(status.refused && status.next_dial.unwrap() > Duration::from_secs(200), "{:?}", status.next_dial);
    let bytes = random_bytes(2, 1000);
    b.hear(a.id(), a.id(), &[&bytes]);
    for _ in 0..3 {
        timeout(QUICK, b.fetch_all(&bytes)).await.expect("it fails at once").unwrap_err();
    }
    assert_eq!(counter.count(), 1);
    b.peers.dial(a.id()).await.unwrap_err();
    assert_eq!(counter.count(), 2, "but for a user it is dialled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_know_us_is_dialled_again_when_somebody_asks() {
    let (a, b) = (listening("a", &["127.0.0.1:0"]), listening("b", &[]));
    b.knows(&a, &[a.address().to_string()]);
    until("it is refused", || b.status_of(&a).last_error.is_some()).await;
    let status = b.status_of(&a);
    assert_eq!(status.last_error.unwrap(), format!("{}: refused: this machine is not on its roster", a.address()));
    assert!(status.refused && status.next_dial.unwrap() > Duration::from_secs(200), "{:?}", status.next_dial);
    a.knows(&b, &[]);
    assert_eq!(b.peers.dial(a.id()).await, Ok(a.address()));
    assert_eq!(b.peers.dial(a.id()).await, Ok(a.address()), "and the connection that there is works");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_of_each_address_is_said() {
    let (a, b) = (listening("a", &[]), listening("b", &[]));
    let silent = Silent::at("127.0.0.1:0");
    b.knows(&a, &[]);
    assert_eq!(b.peers.dial(a.id()).await.unwrap_err(), "no address of it is known: it must dial this machine");
    let port = silent.address().rsplit_once(':').unwrap().1.to_owned();
    b.knows(&a, &["a..b:7700".to_owned(), silent.address(), format!("localhost:{port}")]);
    let began = Instant::now();
    let error = b.peers.dial(a.id()).await.unwrap_err();
    let mut said: Vec<_> = error.split("; ").collect();
    said.sort_unstable();
    let mut expected = [
        "a..b:7700: the name is not known".to_owned(),
        format!("{}: no answer within 5 s", silent.address()),
        format!("localhost:{port} ([::1]:{port}): no answer within 5 s"),
    ];
    expected.sort_unstable();
    assert_eq!(said, expected);
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
}

/// As long as fetches want it, a peer that comes back is in use within 6 s.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_wanted_and_comes_back_is_soon_in_use() {
    let [identity, _] = two_identities();
    let reserved = Silent::at("127.0.0.1:0");
    let address = reserved.address();
    let b = listening("b", &[]);
    b.trust(identity.peer(), "a", Some(address.parse().unwrap()));
    let bytes = random_bytes(3, 1000);
    b.hear(identity.peer(), identity.peer(), &[&bytes]);
    until("it could not be reached", || {
        b.peers.status()[0].next_dial.is_some_and(|next| next > Duration::from_secs(1))
    })
    .await;
    drop(reserved);
    let a = Machine::with(identity, "a", &[&address], 0).unwrap();
    a.trust(b.id(), "b", None);
    let began = Instant::now();
    while !b.is_connected(a.id()) {
        let _ = timeout(Duration::from_secs(6), b.fetch_all(&bytes)).await;
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", b.peers.status());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Well under what the failure of one address would take.
const QUICK: Duration = Duration::from_secs(2);
/// A peer that comes back is in use within this time.
const IN_USE: Duration = Duration::from_secs(6);
/// Bytes a second, at which what is fetched takes seconds.
const SLOW: u64 = 100_000;
/// An address for documentation, which no machine has.
const NOT_OURS: &str = "192.0.2.1:7700";
