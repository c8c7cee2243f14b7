//! A file over plain quinn, with the keys and the settings that peers have: no proofs, no index, nothing but QUIC.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    net::{SocketAddr, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
};

use bytes::{Bytes, BytesMut};
use peers::{
    Congestion, Identity,
    wire::{ALPN, UDP_PAYLOAD_BYTES_MAX, client_config, server_config, transport_config},
};
use quinn::{Connection, Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
use tokio::{
    runtime::{self, Runtime},
    sync::mpsc,
};

/// The hidden subcommand that serves a file, in a process of its own.
pub(crate) const SERVE: &str = "quic-serve";

/// A process that serves one file, and a connection to it.
pub(crate) struct Quic {
    server: Child,
    connection: Connection,
    runtime: Runtime,
}

impl Quic {
    /// Has a process serve `file`, and connects.
    pub(crate) fn start(file: &Path) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(SERVE).arg(file).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut server = command.spawn()?;
        let stdout = server.stdout.take().ok_or_else(|| io::Error::other("no output"))?;
        let runtime = Runtime::new()?;
        let connected = (|| {
            let mut ready = String::new();
            BufReader::new(stdout).read_line(&mut ready)?;
            let (address, peer) = ready.trim().split_once(' ').ok_or_else(|| io::Error::other("it did not start"))?;
            let address = address.parse::<SocketAddr>().map_err(io::Error::other)?;
            let identity = Identity::ephemeral().map_err(io::Error::other)?;
            let tls = client_config(&identity, peer.parse().map_err(io::Error::other)?, ALPN);
            let mut config = quinn::ClientConfig::new(Arc::new(tls.map_err(io::Error::other)?));
            config.transport_config(Arc::new(transport_config(Congestion::Auto)));
            runtime.block_on(async {
                let connecting = endpoint(None)?.connect_with(config, address, "bench.invalid");
                connecting.map_err(io::Error::other)?.await.map_err(io::Error::other)
            })
        })();
        match connected {
            Ok(connection) => Ok(Self { server, connection, runtime }),
            Err(error) => {
                let _ = server.kill();
                let _ = server.wait();
                Err(error)
            }
        }
    }

    /// Receives the file, and writes it to a new file `to` if that is said. Returns how many bytes it was.
    pub(crate) fn fetch(&self, to: Option<&Path>) -> io::Result<u64> {
        let (taken, mut written) = mpsc::channel::<Bytes>(CHUNKS_AHEAD);
        let file = to.map(File::create).transpose()?;
        let writer = thread::spawn(move || {
            let mut file = file.map(|file| BufWriter::with_capacity(BLOCK_BYTES, file));
            let mut bytes = 0;
            while let Some(chunk) = written.blocking_recv() {
                bytes += chunk.len() as u64;
                file.as_mut().map_or(Ok(()), |file| file.write_all(&chunk))?;
            }
            file.map_or(Ok(()), |mut file| file.flush()).map(|()| bytes)
        });
        let discards = to.is_none();
        let discarded = self.runtime.block_on(async {
            let (mut send, mut recv) = self.connection.open_bi().await?;
            send.write_all(b"?").await?;
            send.finish()?;
            let mut chunks: [Bytes; 32] = Default::default();
            let mut discarded = 0;
            while let Some(count) = recv.read_chunks(&mut chunks).await.map_err(io::Error::from)? {
                for chunk in &mut chunks[..count] {
                    if discards {
                        discarded += chunk.len() as u64;
                    } else if taken.send(std::mem::take(chunk)).await.is_err() {
                        return Err(io::Error::other("nobody writes any more"));
                    }
                }
            }
            Ok(discarded)
        });
        drop(taken);
        let written = writer.join().map_err(|_| io::Error::other("the writer panicked"))??;
        Ok(discarded? + written)
    }
}

impl Drop for Quic {
    fn drop(&mut self) {
        self.connection.close(0_u32.into(), b"");
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Serves `file` to everybody who asks, until standard input ends. Prints where, and with which key.
pub(crate) fn serve(file: &Path) -> io::Result<()> {
    let identity = Identity::ephemeral().map_err(io::Error::other)?;
    let runtime = runtime::Builder::new_multi_thread().enable_all().build()?;
    let tls = server_config(&identity, &[ALPN], Arc::new(|_| true)).map_err(io::Error::other)?;
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(transport_config(Congestion::Auto)));
    let endpoint = {
        let _entered = runtime.enter();
        endpoint(Some(config))?
    };
    println!("{} {}", endpoint.local_addr()?, identity.peer());
    io::stdout().flush()?;
    let file = file.to_owned();
    runtime.spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let Ok(connection) = incoming.await else { continue };
            while let Ok((send, mut recv)) = connection.accept_bi().await {
                if recv.read_to_end(1).await.is_ok() && send_file(send, &file).await.is_err() {
                    return;
                }
            }
        }
    });
    io::copy(&mut io::stdin(), &mut io::sink()).map(drop)
}

/// Sends a file, reading ahead in a thread.
async fn send_file(mut send: quinn::SendStream, file: &Path) -> io::Result<()> {
    let mut file = File::open(file)?;
    let (read, mut blocks) = mpsc::channel::<io::Result<Bytes>>(BLOCKS_AHEAD);
    thread::spawn(move || {
        loop {
            let mut block = BytesMut::zeroed(BLOCK_BYTES);
            let block = file.read(&mut block).map(|len| block.split_to(len).freeze());
            let is_over = block.as_ref().is_ok_and(Bytes::is_empty);
            if is_over || read.blocking_send(block).is_err() {
                return;
            }
        }
    });
    while let Some(block) = blocks.recv().await {
        send.write_chunk(block?).await?;
    }
    send.finish().map_err(io::Error::other)
}

fn endpoint(server: Option<ServerConfig>) -> io::Result<Endpoint> {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX).map_err(io::Error::other)?;
    Endpoint::new(config, server, UdpSocket::bind("127.0.0.1:0")?, Arc::new(TokioRuntime))
}

const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS_AHEAD: usize = 4;
const CHUNKS_AHEAD: usize = 1024;
