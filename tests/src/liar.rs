use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use namespace::{Content, Mark, Part, PeerId, Version};
use peers::{
    Identity, decode_request,
    wire::{
        ALPN, Ask, BatchRequest, Have, Hello, Nodes, NodesRequest, StreamKind, read_frame, server_config, write_frame,
    },
};
use serde::Serialize;
use tokio::runtime::Runtime;
use tree::{BlobId, Hashed, Prover, Query, UnixTime};

/// A peer that speaks the protocol as it must, until it is asked for bytes. It listens, and dials nobody.
pub struct Liar {
    identity: Identity,
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Dropped last: with it, everything stops.
    _runtime: Runtime,
}

struct Shared {
    peer: PeerId,
    batch: Mutex<Vec<Statement>>,
    blobs: Mutex<HashMap<BlobId, (Vec<u8>, Hashed)>>,
    answer: Mutex<Answer>,
    batches: Mutex<Batches>,
    asked: AtomicUsize,
    batches_asked: AtomicUsize,
    catalogs_told: AtomicUsize,
}

/// How a request for a blob is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Answer {
    /// As it should be.
    #[default]
    Honest,
    /// With one bit of the last data piece flipped.
    FlippedData,
    /// With one bit of the first pair of hashes flipped; of the data, if there is no pair.
    FlippedProof,
    /// With a size that is one more.
    WrongSize,
    /// With the last byte missing.
    Truncated,
    /// With one byte more.
    Trailing,
    /// With random bytes, for as long as they are taken.
    Endless,
    /// With the right answer, and behind it random bytes for as long as they are taken.
    EndlessTail,
    /// With the end of the stream.
    Nothing,
    /// By a reset of the stream.
    Reset,
    /// Never.
    Silence,
}

/// How a request for many small blobs is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Batches {
    /// With the end of the stream.
    #[default]
    Nothing,
    /// As it should be.
    Honest,
    /// With one bit of this blob flipped.
    Flipped(BlobId),
    /// With so many blobs, half of the next one, and the end of the stream.
    EndedAfter(usize),
}

/// A row of a catalog, which need not follow any rule.
#[derive(Debug, Clone, Serialize)]
pub struct Statement {
    /// The arena.
    pub arena: String,
    /// The path.
    pub path: Vec<u8>,
    /// What is there.
    pub version: Version,
    /// When that was noticed.
    pub at: u64,
}

/// What [`peers::wire::Telling`] is on the wire.
#[derive(Serialize)]
struct Batch {
    origin: PeerId,
    mark: Mark,
    part: Part,
    statements: Vec<Statement>,
    name: &'static str,
}

/// The statement that `data` is at a path. Statements are numbered when they are said.
pub fn file_statement(arena: &str, path: &[u8], data: &[u8]) -> Statement {
    let content = Content::File { blob: BlobId::of(data), size: data.len() as u64, mode: 0o644 };
    let version =
        Version { content, mtime: UnixTime { seconds: 1_700_000_000, nanos: 5 }, seq: 0, previous: Vec::new() };
    Statement { arena: arena.to_owned(), path: path.to_owned(), version, at: 0 }
}

impl Liar {
    /// One that says `statements` to whoever connects, and has `blobs`. Its id is less than `less_than`, so that among
    /// peers that are connected it is asked first.
    pub fn start(statements: Vec<Statement>, blobs: &[&[u8]], less_than: Option<PeerId>) -> Self {
        let runtime = Runtime::new().expect("start a runtime");
        let identity = std::iter::repeat_with(|| Identity::ephemeral().expect("make a key"))
            .find(|identity| less_than.is_none_or(|other| identity.peer() < other))
            .expect("half of all keys will do");
        let shared = Arc::new(Shared {
            peer: identity.peer(),
            batch: Mutex::default(),
            blobs: Mutex::default(),
            answer: Mutex::default(),
            batches: Mutex::default(),
            asked: AtomicUsize::new(0),
            batches_asked: AtomicUsize::new(0),
            catalogs_told: AtomicUsize::new(0),
        });
        let mut numbered = statements;
        if numbered.iter().all(|statement| statement.version.seq == 0) {
            numbered.sort_by(|a, b| (&a.arena, &a.path).cmp(&(&b.arena, &b.path)));
        }
        for (statement, number) in numbered.iter_mut().zip(1..) {
            // A seq that was set stays as it is.
            if statement.version.seq == 0 {
                statement.version.seq = number;
            }
        }
        *shared.batch.lock().expect("nobody panics") = numbered;
        let hashed = blobs.iter().map(|data| tree::hash(*data, data.len() as u64).expect("memory can be read"));
        let hashed = hashed.zip(blobs).map(|(hashed, data)| (hashed.id, (data.to_vec(), hashed)));
        shared.blobs.lock().expect("nobody panics").extend(hashed);

        let tls = server_config(&identity, &[ALPN], Arc::new(|_| true)).expect("set up TLS");
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_secs(2)));
        config.transport_config(Arc::new(transport));
        let endpoint = runtime.block_on(async {
            quinn::Endpoint::server(config, SocketAddr::from(([127, 0, 0, 1], 0))).expect("listen")
        });
        let address = endpoint.local_addr().expect("it has an address");
        let served = shared.clone();
        runtime.spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let shared = served.clone();
                tokio::spawn(async move {
                    if let Ok(connection) = incoming.await {
                        shared.serve(connection).await;
                    }
                });
            }
        });
        Self { identity, address, shared, _runtime: runtime }
    }

    /// Its peer id.
    pub fn id(&self) -> PeerId {
        self.identity.peer()
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Answers in this way from now on.
    pub fn answer(&self, answer: Answer) {
        *self.shared.answer.lock().expect("nobody panics") = answer;
    }

    /// Answers requests for many blobs in this way from now on.
    pub fn answer_batches(&self, batches: Batches) {
        *self.shared.batches.lock().expect("nobody panics") = batches;
    }

    /// How often it was asked for many blobs at a time so far.
    pub fn batches_asked(&self) -> usize {
        self.shared.batches_asked.load(Ordering::Relaxed)
    }

    /// How often it was asked for a blob alone so far.
    pub fn times_asked(&self) -> usize {
        self.shared.asked.load(Ordering::Relaxed)
    }

    /// How often it has told its catalog so far.
    pub fn catalogs_told(&self) -> usize {
        self.shared.catalogs_told.load(Ordering::Relaxed)
    }

    /// The number of its last change.
    pub fn head(&self) -> u64 {
        self.shared.head()
    }
}

impl Shared {
    fn head(&self) -> u64 {
        let batch = self.batch.lock().expect("nobody panics");
        batch.iter().map(|statement| statement.version.seq).max().unwrap_or(0)
    }

    async fn serve(self: Arc<Self>, connection: quinn::Connection) {
        while let Ok((send, recv)) = connection.accept_bi().await {
            tokio::spawn(self.clone().stream(send, recv));
        }
    }

    async fn stream(self: Arc<Self>, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
        let mut kind = [0];
        if recv.read_exact(&mut kind).await.is_err() {
            return;
        }
        match StreamKind::from_byte(kind[0]) {
            Some(StreamKind::Hello) => {
                let _: Result<Hello, _> = read_frame(&mut recv, 16 << 10).await;
                let hello = Hello { name: "liar".into(), addresses: Vec::new(), packs: false, run: 1, twins: false };
                let _ = write_frame(&mut send, &hello).await;
                let _ = send.finish();
            }
            Some(StreamKind::Catalog) => {
                let _: Result<Ask, _> = read_frame(&mut recv, 1 << 20).await;
                let statements = self.batch.lock().expect("nobody panics").clone();
                let head = self.head();
                let mark = Mark { epoch: 7, seq: head, session: 1 };
                let part = Part::Listing { after: None, end: None };
                let _ =
                    write_frame(&mut send, &Batch { origin: self.peer, mark, part, statements, name: "liar" }).await;
                self.catalogs_told.fetch_add(1, Ordering::Relaxed);
                // The catalog is heard for as long as the stream is open.
                let _ = send.stopped().await;
            }
            Some(StreamKind::Get) => self.get(send, recv).await,
            Some(StreamKind::Have) => self.have(send, recv).await,
            Some(StreamKind::Nodes) => self.nodes(send, recv).await,
            Some(StreamKind::Batch) => self.batch(send, recv).await,
            // Not for it: whoever asks, asks in another way.
            Some(_) | None => {}
        }
    }

    /// Tells nodes of a tree: right ones if it is honest, or else with one bit flipped in the last.
    async fn nodes(&self, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
        let Ok(NodesRequest { blob, nodes, .. }) = read_frame(&mut recv, 16 << 10).await else { return };
        let Some((_, hashed)) = self.blobs.lock().expect("nobody panics").get(&blob).cloned() else { return };
        let pair = |node: &u64| hashed.outboard.chunks_exact(64).nth(*node as usize).map(<[u8]>::to_vec);
        let mut pairs: Vec<u8> = nodes.iter().filter_map(pair).flatten().collect();
        if *self.answer.lock().expect("nobody panics") != Answer::Honest {
            pairs.last_mut().into_iter().for_each(|byte| *byte ^= 1);
        }
        let _ = write_frame(&mut send, &Nodes { pairs }).await;
        let _ = send.finish();
    }

    /// Says that it has all, however it answers when it is asked for it.
    async fn have(&self, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
        let request = recv.read_to_end(64 << 10).await.unwrap_or_default();
        let Some((blob, query)) = decode_request(&request) else { return };
        let Some((data, _)) = self.blobs.lock().expect("nobody panics").get(&blob).cloned() else { return };
        let size = data.len() as u64;
        let _ = write_frame(&mut send, &Have { size, ranges: query.resolve_bytes(size), upto: u64::MAX }).await;
        let _ = send.finish();
        let _ = send.stopped().await;
    }

    async fn batch(&self, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
        let _ = recv.read_exact(&mut [0]).await;
        let Ok(BatchRequest { blobs }) = read_frame(&mut recv, 16 << 10).await else { return };
        self.batches_asked.fetch_add(1, Ordering::Relaxed);
        let how = *self.batches.lock().expect("nobody panics");
        if how == Batches::Nothing {
            return;
        }
        for (number, (blob, _)) in blobs.into_iter().enumerate() {
            let Some((data, hashed)) = self.blobs.lock().expect("nobody panics").get(&blob).cloned() else { return };
            let mut wire = [&[1], &honest(&data, &hashed, &Query::all())[..]].concat();
            let last = wire.len() - 1;
            match how {
                Batches::Flipped(wrong) if wrong == blob => wire[last] ^= 1,
                Batches::EndedAfter(count) if count == number => {
                    let _ = send.write_all(&wire[..last]).await;
                    break;
                }
                _ => {}
            }
            if send.write_all(&wire).await.is_err() {
                return;
            }
        }
        let _ = send.finish();
        let _ = send.stopped().await;
    }

    async fn get(&self, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
        let _ = recv.read_exact(&mut [0]).await;
        let request = recv.read_to_end(64 << 10).await.unwrap_or_default();
        let Some((blob, query)) = decode_request(&request) else { return };
        self.asked.fetch_add(1, Ordering::Relaxed);
        let answer = *self.answer.lock().expect("nobody panics");
        let Some((data, hashed)) = self.blobs.lock().expect("nobody panics").get(&blob).cloned() else { return };
        let mut wire = honest(&data, &hashed, &query);
        let last = wire.len() - 1;
        match answer {
            Answer::Honest | Answer::EndlessTail => {}
            Answer::FlippedData => wire[last] ^= 1,
            Answer::FlippedProof => wire[8] ^= 1,
            Answer::WrongSize => wire[..8].copy_from_slice(&(data.len() as u64 + 1).to_le_bytes()),
            Answer::Truncated => wire.truncate(last),
            Answer::Trailing => wire.push(0),
            Answer::Endless => wire.truncate(8),
            Answer::Nothing => wire.clear(),
            Answer::Reset => {
                let _ = send.reset(1_u32.into());
                return;
            }
            Answer::Silence => return std::future::pending().await,
        }
        let _ = send.write_all(&wire).await;
        if matches!(answer, Answer::Endless | Answer::EndlessTail) {
            let noise = [0x5a; 4096];
            while send.write_all(&noise).await.is_ok() {}
        }
        let _ = send.finish();
        let _ = send.stopped().await;
    }
}

fn honest(data: &[u8], hashed: &Hashed, query: &Query) -> Vec<u8> {
    let mut wire = (data.len() as u64).to_le_bytes().to_vec();
    for item in Prover::new(hashed.id, data.len() as u64, data, &hashed.outboard[..], query) {
        wire.extend_from_slice(item.expect("it is sound").wire_bytes());
    }
    wire
}
