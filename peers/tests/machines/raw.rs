//! Both ends of the protocol, spoken by hand.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use namespace::PeerId;
use peers::{
    Identity, decode_request, encode_request,
    wire::{
        ALPN, Ask, BatchRequest, Chunks, ChunksRequest, DetailsRequest, Have, Hello, Nodes, NodesRequest, StreamKind,
        client_config, read_frame, server_config, write_frame,
    },
};
use tokio::sync::Semaphore;
use tree::{BlobId, Chunk, ChunkSizes, Chunker, Prover, Query};

use crate::machine::{DEADLINE, Machine};

/// A connection with `machine` on which hello has been said, as whoever has this key.
pub(crate) async fn introduced(me: &Identity, machine: &Machine) -> quinn::Connection {
    let tls = client_config(me, machine.id(), ALPN).unwrap();
    let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(tls));
    let address = machine.peers.listens_on().unwrap();
    let connection = endpoint.connect_with(config, address, "blobd.invalid").unwrap().await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&[StreamKind::Hello as u8]).await.unwrap();
    write_frame(&mut send, &Hello { name: "raw".into(), addresses: Vec::new(), packs: false, run: 1, twins: false })
        .await
        .unwrap();
    let _: Hello = read_frame(&mut recv, 16 << 10).await.unwrap();
    connection
}

/// What comes to a request that `asker` makes of `machine`, byte by byte, with `head` in front of it.
pub(crate) async fn ask(asker: &Identity, machine: &Machine, head: &[u8], blob: BlobId, query: &Query) -> Vec<u8> {
    let asking = async {
        let connection = introduced(asker, machine).await;
        request(&connection, &[head, &encode_request(blob, query)].concat()).await
    };
    tokio::time::timeout(DEADLINE, asking).await.expect("it takes too long until an answer")
}

/// What comes on a stream of its own to these bytes.
pub(crate) async fn request(connection: &quinn::Connection, bytes: &[u8]) -> Vec<u8> {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    send.finish().unwrap();
    recv.read_to_end(64 << 20).await.unwrap()
}

/// What stands in front of a request for what others have.
pub(crate) fn through(hops: u8, size: usize) -> Vec<u8> {
    [&[StreamKind::Through as u8, 0, hops][..], &(size as u64).to_le_bytes()].concat()
}

/// The right answer.
pub(crate) fn answer(bytes: &[u8], query: &Query) -> Vec<u8> {
    let size = bytes.len() as u64;
    let hashed = tree::hash(bytes, size).unwrap();
    let mut wire = size.to_le_bytes().to_vec();
    for piece in Prover::new(hashed.id, size, bytes, &hashed.outboard[..], query) {
        wire.extend_from_slice(piece.unwrap().wire_bytes());
    }
    wire
}

/// A peer that listens, says nothing of what it has, and answers all requests for `blobs`.
pub(crate) struct Puppet {
    pub(crate) identity: Identity,
    pub(crate) address: SocketAddr,
    counts: Arc<Counts>,
}

/// How a puppet answers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Manner {
    /// With a bit of the last byte flipped.
    Lying,
    /// As it should, a moment after so many requests have come.
    Late(usize),
    /// As it should up to so many bytes, and then never anything more.
    Stalling(usize),
    /// As it should, where bytes are asked for, and otherwise with what becomes of the truth.
    Telling(Tale),
}

/// What becomes of the truth: of pairs of nodes, one behind the other, and of a list of chunks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tale {
    pub(crate) nodes: fn(&mut Vec<u8>),
    pub(crate) chunks: fn(&mut Vec<Chunk>),
}

#[derive(Default)]
struct Counts {
    kinds: [AtomicUsize; 16],
    open: AtomicUsize,
    most_open: AtomicUsize,
}

impl Puppet {
    pub(crate) fn start(manner: Manner, blobs: &[&[u8]]) -> Self {
        let identity = Identity::ephemeral().unwrap();
        let tls = server_config(&identity, &[ALPN], Arc::new(|_| true)).unwrap();
        let config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        let endpoint = quinn::Endpoint::server(config, SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = endpoint.local_addr().unwrap();
        let counts = Arc::new(Counts::default());
        let gate = Arc::new(Semaphore::new(0));
        let blobs: HashMap<BlobId, Vec<u8>> = blobs.iter().map(|bytes| (BlobId::of(bytes), bytes.to_vec())).collect();
        let (blobs, shared) = (Arc::new(blobs), counts.clone());
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let (blobs, counts, gate) = (blobs.clone(), shared.clone(), gate.clone());
                tokio::spawn(async move {
                    let Ok(connection) = incoming.await else { return };
                    while let Ok((send, recv)) = connection.accept_bi().await {
                        tokio::spawn(serve(manner, blobs.clone(), counts.clone(), gate.clone(), send, recv));
                    }
                });
            }
        });
        Self { identity, address, counts }
    }

    pub(crate) fn id(&self) -> PeerId {
        self.identity.peer()
    }

    /// How many streams of a kind were opened.
    pub(crate) fn times_asked(&self, kind: StreamKind) -> usize {
        self.counts.kinds[kind as usize].load(Ordering::Relaxed)
    }

    /// How many requests waited for an answer at one time, at most.
    pub(crate) fn most_open(&self) -> usize {
        self.counts.most_open.load(Ordering::Relaxed)
    }
}

async fn serve(
    manner: Manner,
    blobs: Arc<HashMap<BlobId, Vec<u8>>>,
    counts: Arc<Counts>,
    gate: Arc<Semaphore>,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) {
    let mut kind = [0];
    recv.read_exact(&mut kind).await.unwrap();
    let Some(kind) = StreamKind::from_byte(kind[0]) else { return };
    counts.kinds[kind as usize].fetch_add(1, Ordering::Relaxed);
    match kind {
        StreamKind::Hello => {
            let _: Hello = read_frame(&mut recv, 16 << 10).await.unwrap();
            write_frame(
                &mut send,
                &Hello { name: "puppet".into(), addresses: Vec::new(), packs: false, run: 1, twins: false },
            )
            .await
            .unwrap();
        }
        StreamKind::Catalog => {
            let _: Ask = read_frame(&mut recv, 1 << 20).await.unwrap();
            let _ = send.stopped().await;
        }
        StreamKind::Have => {
            let request = recv.read_to_end(64 << 10).await.unwrap();
            let (blob, query) = decode_request(&request).unwrap();
            let size = blobs[&blob].len() as u64;
            write_frame(&mut send, &Have { size, ranges: query.resolve_bytes(size), upto: u64::MAX }).await.unwrap();
        }
        StreamKind::Get | StreamKind::Through => {
            // The manner, and for the one kind hops and size.
            let mut head = [0; 10];
            let bytes = if kind == StreamKind::Through { 10 } else { 1 };
            recv.read_exact(&mut head[..bytes]).await.unwrap();
            assert_eq!(head[0] & 0x80, 0, "it said that it knows no packed answers");
            let request = recv.read_to_end(64 << 10).await.unwrap();
            let (blob, query) = decode_request(&request).unwrap();
            let mut wire = answer(&blobs[&blob], &query);
            match manner {
                Manner::Stalling(bytes) => {
                    let _ = send.write_all(&wire[..bytes.min(wire.len())]).await;
                    let _ = send.stopped().await;
                    return;
                }
                Manner::Telling(_) => {}
                Manner::Lying => *wire.last_mut().unwrap() ^= 1,
                Manner::Late(count) => {
                    let open = counts.open.fetch_add(1, Ordering::Relaxed) + 1;
                    counts.most_open.fetch_max(open, Ordering::Relaxed);
                    if open == count {
                        // Whoever may come in besides has time for it.
                        tokio::time::sleep(Duration::from_millis(300)).await;
                        gate.add_permits(1000);
                    }
                    gate.acquire().await.unwrap().forget();
                    counts.open.fetch_sub(1, Ordering::Relaxed);
                }
            }
            let _ = send.write_all(&wire).await;
        }
        StreamKind::Batch => {
            recv.read_exact(&mut [0]).await.unwrap();
            let request: BatchRequest = read_frame(&mut recv, 16 << 10).await.unwrap();
            for (blob, _) in &request.blobs {
                let Some(bytes) = blobs.get(blob) else {
                    let _ = send.write_all(&[0]).await;
                    continue;
                };
                let mut wire = answer(bytes, &Query::all());
                match manner {
                    Manner::Lying => *wire.last_mut().unwrap() ^= 1,
                    Manner::Late(_) | Manner::Telling(_) => {}
                    Manner::Stalling(bytes) => {
                        let _ = send.write_all(&wire[..bytes.min(wire.len())]).await;
                        let _ = send.stopped().await;
                        return;
                    }
                }
                let _ = send.write_all(&[&[1], &wire[..]].concat()).await;
            }
        }
        StreamKind::Orders => return,
        StreamKind::Nodes => {
            let Manner::Telling(tale) = manner else { return };
            let request: NodesRequest = read_frame(&mut recv, 16 << 10).await.unwrap();
            let bytes = &blobs[&request.blob];
            let outboard = tree::hash(&bytes[..], bytes.len() as u64).unwrap().outboard;
            let pairs = request.nodes.iter().flat_map(|&node| &outboard[node as usize * 64..][..64]);
            let mut pairs = pairs.copied().collect();
            (tale.nodes)(&mut pairs);
            write_frame(&mut send, &Nodes { pairs }).await.unwrap();
        }
        StreamKind::Details => {
            let _: DetailsRequest = read_frame(&mut recv, 1 << 20).await.unwrap();
            let _ = send.finish();
        }
        StreamKind::Chunks => {
            let Manner::Telling(tale) = manner else { return };
            let request: ChunksRequest = read_frame(&mut recv, 16 << 10).await.unwrap();
            let (mut chunker, mut chunks) = (Chunker::new(ChunkSizes::of(request.size)), Vec::new());
            chunker.push(0, &blobs[&request.blob], &mut |_, chunk| chunks.push(chunk));
            chunker.finish(&mut |_, chunk| chunks.push(chunk));
            (tale.chunks)(&mut chunks);
            // Who is told too much stops listening.
            for part in chunks.chunks(30_000) {
                let part = Chunks { chunks: part.to_vec(), is_last: false };
                let _ = write_frame(&mut send, &part).await;
            }
            let _ = write_frame(&mut send, &Chunks { chunks: Vec::new(), is_last: true }).await;
        }
    }
    let _ = send.finish();
    let _ = send.stopped().await;
}
