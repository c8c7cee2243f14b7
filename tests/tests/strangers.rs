//! Strangers get nothing: neither machines whose key nobody knows, nor those with a ticket that is no good, nor those
//! that answer in the place of another. And whatever someone sends, known or not, the daemon goes on serving.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use peers::{
    Identity, Ticket, encode_request,
    wire::{ALPN, JOIN_ALPN, StreamKind, client_config},
};
use quinn::{Connection, RecvStream, SendStream};
use tests::{Machine, Scratch, connect, introduced, random_bytes, wait_for};
use tokio::{runtime::Runtime, time::timeout};
use tree::{BlobId, Query};

#[test]
fn an_unknown_machine_gets_nothing_and_is_logged() {
    let scratch = Scratch::new();
    let (root, _) = a_file(&scratch);
    let a = Machine::up(&scratch, "a", &[&root]);
    let c = Machine::up::<&Path>(&scratch, "c", &[]);
    refuses(&a, &c);
}

/// The same where no ticket is out, so that strangers do not even get through the handshake.
#[test]
fn without_tickets_an_unknown_machine_is_logged_too() {
    let scratch = Scratch::new();
    let a = Machine::cold(&scratch, "a");
    a.restart();
    let c = Machine::up::<&Path>(&scratch, "c", &[]);
    refuses(&a, &c);
}

#[track_caller]
fn refuses(a: &Machine, c: &Machine) {
    c.ok(["peer", "add", "a", &a.id(), "--address", &a.address()]);
    let error = wait_for("the refusal shows in status", Duration::from_secs(30), || {
        Some(c.peer("a")?["last_error"].as_str()?.to_owned())
    });
    assert!(error.contains(&a.address()), "{error}");
    let peer = c.peer("a").unwrap();
    assert!(peer["connected"].is_null() && peer["heard_seq"] == 0, "{peer}");
    assert!(c.ok(["ls", "-R", "--json"]).json().is_empty());
    c.exits(7, ["cat", "docs/file"]);
    assert_eq!(a.status()["peers"], serde_json::json!([]));
    let log = a.log();
    assert!(log.lines().any(|line| line.contains("refused")), "a stranger's attempt is in the log:\n{log}");
}

#[test]
fn tickets_that_are_no_good() {
    let scratch = Scratch::new();
    let a = Machine::up::<&Path>(&scratch, "a", &[]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    let d = Machine::up::<&Path>(&scratch, "d", &[]);
    let check = |machine: &Machine, code, ticket: &str, expected: &str| {
        let output = machine.exits(code, ["join", ticket]);
        assert!(output.stderr.starts_with("error: "), "{}", output.stderr);
        assert!(output.stderr.contains(expected), "{:?} is not in {}", expected, output.stderr);
        assert_eq!(machine.status()["peers"], serde_json::json!([]));
    };
    let ticket = a.ticket();
    check(&a, 1, &ticket, "this machine made the ticket");
    let mut mistyped = ticket.clone().into_bytes();
    mistyped[20] = if mistyped[20] == b'a' { b'b' } else { b'a' };
    check(&b, 2, &String::from_utf8(mistyped).unwrap(), "the ticket is damaged");
    check(&b, 2, &ticket[..ticket.len() - 3], "the ticket is damaged");
    check(&b, 2, "hello", "this is no ticket");
    check(&b, 2, "", "this is no ticket");

    let short = a.ok(["invite", "--expires", "1s", "--json"]).json().remove(0);
    let expires = short["expires"].as_i64().unwrap();
    wait_for("the ticket expires", Duration::from_secs(10), || {
        (SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 >= expires).then_some(())
    });
    check(&b, 1, short["ticket"].as_str().unwrap(), "the ticket has expired");
    // The maker does not take the bearer's word for when it expires, nor a secret that it never made.
    let mut forged: Ticket = short["ticket"].as_str().unwrap().parse().unwrap();
    forged.expires += 3600;
    check(&b, 1, &forged.to_string(), "refused the ticket: it has expired, at ");
    let mut forged: Ticket = ticket.parse().unwrap();
    forged.secret[0] ^= 1;
    check(&b, 1, &forged.to_string(), "refused the ticket: it was used before, has expired, or was never made");
    // The right secret, but another machine where it leads.
    let mut elsewhere: Ticket = ticket.parse().unwrap();
    elsewhere.addresses = vec![d.address()];
    let expected = format!("reach a\n  because: {}: another machine answers there\n", d.address());
    check(&b, 1, &elsewhere.to_string(), &expected);

    b.ok(["join", &ticket]);
    check(&d, 1, &ticket, "refused the ticket: it was used before");
    assert_eq!(a.status()["peers"].as_array().unwrap().len(), 1);
    // Whose answer was lost may ask again.
    b.ok(["join", &ticket]);
}

/// Behind an address that is known is another machine than the one that is meant.
#[test]
fn the_key_dialled_must_be_the_key_met() {
    let scratch = Scratch::new();
    let (root, data) = a_file(&scratch);
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    let imposter = Machine::up::<&Path>(&scratch, "imposter", &[]);
    // All know each other: only the address is wrong.
    b.join(&a);
    b.join(&imposter);
    let c = Machine::up::<&Path>(&scratch, "c", &[]);
    c.join(&imposter);
    c.ok(["peer", "add", "a", &a.id(), "--address", &imposter.address()]);
    let error = wait_for("the refusal shows in status", Duration::from_secs(30), || {
        Some(c.peer("a")?["last_error"].as_str()?.to_owned())
    });
    assert!(error.contains(&imposter.address()), "{error}");
    assert!(c.peer("a").unwrap()["connected"].is_null());
    assert!(b.ok(["cat", "docs/file"]).stdout == data);
}

/// A key that nobody knows: it may open streams, and hears nothing on them.
#[test]
fn streams_of_a_stranger_get_nothing() {
    let scratch = Scratch::new();
    let (root, data) = a_file(&scratch);
    let a = Machine::up(&scratch, "a", &[&root]);
    let address = a.address();
    let me = Identity::ephemeral().unwrap();
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let get = [&[StreamKind::Get as u8, 0][..], &encode_request(BlobId::of(&data), &Query::all())].concat();
        let catalog = [&[StreamKind::Catalog as u8][..], &2_u32.to_le_bytes(), &[0, 0]].concat();
        let hello = hello_bytes();
        for alpn in [ALPN, JOIN_ALPN] {
            for sent in [&get, &catalog, &hello] {
                let Ok(connection) = connect(&me, &a, &address, alpn).await else { continue };
                let Ok((mut send, mut recv)) = connection.open_bi().await else { continue };
                let _ = send.write_all(sent).await;
                let _ = send.finish();
                let heard = timeout(Duration::from_secs(20), recv.read_to_end(1 << 20)).await;
                let heard = heard.expect("it is refused in time").unwrap_or_default();
                assert_eq!(heard, b"", "{} {:?}", String::from_utf8_lossy(alpn), &sent[..1]);
            }
        }
        assert!(connect(&me, &a, &address, peers::IROH_ALPN).await.is_err(), "iroh is not served by default");
        assert!(connect(&me, &a, &address, b"h3").await.is_err());
    });
    assert!(a.is_running());
    assert_eq!(a.status()["peers"], serde_json::json!([]));
}

/// A key that is known, and a peer that follows no rule.
#[test]
fn garbage_of_a_known_peer_does_no_harm() {
    let scratch = Scratch::new();
    let (root, data) = a_file(&scratch);
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let me = Identity::ephemeral().unwrap();
    a.ok(["peer", "add", "mallory", &me.peer().to_string()]);
    let address = a.address();
    let before = a.resident_bytes();
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        // In place of a hello.
        for first in
            [&b""[..], b"\x01", b"\x01\xff\xff\xff\xff", b"\x01\x05\0\0\0abcde", b"\xee", b"\x02", b"\x03", &[7; 9000]]
        {
            let connection = connect(&me, &a, &address, ALPN).await.expect("it is known");
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            let _ = send.write_all(first).await;
            let _ = send.finish();
            let heard = timeout(Duration::from_secs(20), recv.read_to_end(1 << 20)).await.expect("it ends in time");
            assert_eq!(heard.unwrap_or_default(), b"", "{:?}", &first[..first.len().min(9)]);
        }
        // Behind a proper hello.
        let huge = [StreamKind::Catalog as u8, 0xff, 0xff, 0xff, 0xff];
        let catalog = [StreamKind::Catalog as u8];
        let get = [StreamKind::Get as u8, 0];
        let nodes = [StreamKind::Nodes as u8];
        let chunks = [StreamKind::Chunks as u8];
        let streams: [Vec<u8>; 13] = [
            [&chunks[..], &[0xff; 4]].concat(),
            [&chunks[..], &[42, 0, 0, 0], &[7; 32], &[0xff; 9], &[1]].concat(),
            huge.to_vec(),
            [&catalog[..], &[3, 0, 0, 0, 0xff, 0xff, 0xff]].concat(),
            [&catalog[..], &[2, 0, 0, 0]].concat(),
            [&get[..], &[0xff; 60_000]].concat(),
            [&get[..], &vec![0; 1 << 20]].concat(),
            [&get[..], &[0; 33], &[0xff; 9]].concat(),
            [&nodes[..], &[0xff; 4]].concat(),
            [
                &nodes[..],
                &[47, 0, 0, 0],
                &[7; 32],
                &[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0],
            ]
            .concat(),
            vec![StreamKind::Hello as u8; 100],
            vec![0xee; 1000],
            vec![],
        ];
        let connection = introduced(&me, &a, &address).await;
        for sent in &streams {
            // What is refused may well end the connection; then a new one is made.
            let opened = connection.open_bi().await;
            let connection = &match opened {
                Ok((mut send, recv)) => {
                    let _ = send.write_all(sent).await;
                    let _ = send.finish();
                    ends(recv).await;
                    continue;
                }
                Err(_) => introduced(&me, &a, &address).await,
            };
            let (mut send, recv) = connection.open_bi().await.unwrap();
            let _ = send.write_all(sent).await;
            let _ = send.finish();
            ends(recv).await;
        }
        // As many streams as are allowed, that say nothing and never end.
        let connection = introduced(&me, &a, &address).await;
        let silent = open_all(&connection).await;
        assert!(silent.len() > 10 && silent.len() <= 1024, "{} streams at once", silent.len());
        assert!(b.ok(["cat", "docs/file", "--range", "0..100"]).stdout == data[..100]);
        // Requests for all of it, whose answers nobody reads.
        let connection = introduced(&me, &a, &address).await;
        // Its manner comes first: plainly, as somebody reads it.
        let request = [&[0][..], &encode_request(BlobId::of(&data), &Query::all())].concat();
        let mut unread = Vec::new();
        for (mut send, recv) in open_all(&connection).await {
            let _ = send.write_all(&request).await;
            let _ = send.finish();
            unread.push(recv);
        }
        // As many as are answered at a time have filled what a stream may bring that is not read.
        wait_for("the answers are stuck", Duration::from_secs(30), || {
            (connection.stats().udp_rx.bytes > ANSWERS_AT_ONCE * STREAM_WINDOW_BYTES).then_some(())
        });
        let grown = a.resident_bytes().saturating_sub(before);
        assert!(grown < 500 << 20, "{grown} bytes more");
        assert!(b.ok(["cat", "docs/file", "--range", "200000..300000"]).stdout == data[200_000..300_000]);
        drop(silent);
    });
    assert!(a.is_running());
    assert!(b.ok(["cat", "docs/file"]).stdout == data);
    assert!(!a.log().contains("panicked"), "{}", a.log());
}

/// Hundreds of connections that never say a word do not keep the household out.
#[test]
fn silent_connections_do_not_block_the_listener() {
    let scratch = Scratch::new();
    let (root, data) = a_file(&scratch);
    let a = Machine::up(&scratch, "a", &[&root]);
    let address: SocketAddr = a.address().parse().unwrap();
    let runtime = Runtime::new().unwrap();
    let me = Identity::ephemeral().unwrap();
    let _silent = runtime.block_on(async {
        let mut silent = Vec::new();
        for _ in 0..200 {
            // A handshake is begun, and after it nothing more is said.
            let tls = client_config(&me, a.id().parse().unwrap(), ALPN).unwrap();
            let config = quinn::ClientConfig::new(Arc::new(tls));
            let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
            silent.push((endpoint.connect_with(config, address, "blobd.invalid").unwrap(), endpoint));
        }
        silent
    });
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.ok(["join", &a.ticket()]);
    b.hears(&a);
    assert!(b.ok(["cat", "docs/file"]).stdout == data);
}

/// An arena with one file of 2 MB, and the file's bytes.
fn a_file(scratch: &Scratch) -> (std::path::PathBuf, Vec<u8>) {
    let root = scratch.dir("docs");
    let data = random_bytes(2_000_000, &mut fastrand::Rng::new());
    fs::write(root.join("file"), &data).unwrap();
    (root, data)
}

fn hello_bytes() -> Vec<u8> {
    // Name "mallory", no addresses, no packing.
    [&[StreamKind::Hello as u8][..], &10_u32.to_le_bytes(), &[7], b"mallory", &[0, 0]].concat()
}

/// Opens streams until no more are allowed.
async fn open_all(connection: &Connection) -> Vec<(SendStream, RecvStream)> {
    let mut streams = Vec::new();
    while let Ok(Ok((mut send, recv))) = timeout(Duration::from_secs(1), connection.open_bi()).await {
        // A stream is noticed by its first byte; a Get whose request never ends.
        send.write_all(&[StreamKind::Get as u8]).await.unwrap();
        streams.push((send, recv));
    }
    streams
}

/// The other side ends a stream in time, whatever it says until then.
async fn ends(mut recv: RecvStream) {
    let end = timeout(Duration::from_secs(20), recv.read_to_end(1 << 20)).await;
    assert!(end.is_ok(), "the stream goes on");
}

const ANSWERS_AT_ONCE: u64 = 16;
/// quinn's default: what the caller of this test lets a stream bring.
const STREAM_WINDOW_BYTES: u64 = 1_250_000;
