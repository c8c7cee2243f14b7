//! A peer that is no machine: a key and a connection, to say what a test wants to say.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use peers::{
    Identity,
    wire::{ALPN, Hello, StreamKind, client_config, write_frame},
};
use quinn::Connection;
use tokio::time::timeout;

use crate::Machine;

/// Dials a machine at `address` as `me`.
pub async fn connect(me: &Identity, to: &Machine, address: &str, alpn: &[u8]) -> Result<Connection, String> {
    let tls = client_config(me, to.id().parse().unwrap(), alpn).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(tls));
    let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let connecting = endpoint.connect_with(config, address.parse().unwrap(), "blobd.invalid").unwrap();
    connecting.await.map_err(|error| error.to_string())
}

/// A connection on which hello has been said. The machine must know the key.
pub async fn introduced(me: &Identity, to: &Machine, address: &str) -> Connection {
    let connection = connect(me, to, address, ALPN).await.expect("it is known");
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&[StreamKind::Hello as u8]).await.unwrap();
    write_frame(&mut send, &Hello { name: "mallory".into(), addresses: vec![], packs: false, run: 1, twins: false })
        .await
        .unwrap();
    send.finish().unwrap();
    let answer = timeout(Duration::from_secs(20), recv.read_to_end(1 << 16)).await.expect("it answers in time");
    assert!(answer.expect("it answers").len() > 4);
    connection
}
