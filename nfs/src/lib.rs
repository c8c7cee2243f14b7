//! The mount: every peer's files as one tree, over NFS version 3.
//!
//! Names and attributes come from the [`Namespace`], bytes from the [`Store`], and what is not there from whoever has it, by
//! [`Fetch`]. What of it is NFS is in `procedures`, `mountd`, `rpc` and `record` only.
//!
//! What this crate must never know: peers, arena roots, configuration files.
//!
//! Invariants:
//!
//! - No byte is sent that was not proven against the blob id of the version that the client's handle names.
//! - Handles, file ids and cookies depend on names and the machine's secret alone: they stay over restarts.
//! - What a client can have us remember is bounded, and no length is believed before the bytes are there.
//!
//! Attributes, handles, rules of reading and bounds: spec/nfs.md.

mod allow;
mod connection;
mod directory;
mod export;
mod flight;
mod handle;
mod mountd;
mod owner;
mod procedures;
mod reader;
mod record;
mod rpc;
mod server;
mod siblings;
mod view;
mod window;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use blobstore::{Fetch, Store};
use namespace::Namespace;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tree::{BlobId, UnixTime};

pub use allow::{Network, ParseNetworkError};

/// How the mount is to be.
pub struct Options {
    /// A secret of this machine that stays the same: file ids come from it.
    pub key: [u8; 32],
    /// How far ahead of those who read in order is fetched, in bytes.
    pub read_ahead: u64,
    /// How long a read waits for bytes that are not here.
    pub fetch_timeout: Duration,
    /// Whether modes are without write permission.
    pub read_only: bool,
    /// The home: its file system is the one that `df` shows, and its age the mtime of what has none.
    pub home: PathBuf,
    /// What is where.
    pub namespace: Namespace,
    /// The bytes that are here.
    pub store: Store,
    /// Fetches missing bytes that a READ waits for.
    pub fetch: Arc<dyn Fetch>,
    /// Fetches read-ahead and siblings.
    pub fetch_ahead: Arc<dyn Fetch>,
    /// Hears of blobs that are damaged in place, and of which the damaged bytes have been fetched.
    pub mend: mpsc::Sender<BlobId>,
}

/// A mount that is being served, until it is [stopped](Self::stop).
pub struct Mount(server::Server);

impl Options {
    fn export(self) -> io::Result<export::Export> {
        let home = std::fs::metadata(&self.home)?;
        let born = home.created().or_else(|_| home.modified())?;
        let born = born.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs().cast_signed();
        let view = view::View::new(self.namespace, self.key, UnixTime { seconds: born, nanos: 0 });
        let fetch = [self.fetch, self.fetch_ahead];
        let reader = reader::Reader::new(self.store, fetch, self.read_ahead, self.fetch_timeout, self.mend);
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let look = export::Look { uid, gid, read_only: self.read_only };
        Ok(export::Export { view, reader, siblings: Arc::default(), home: self.home, look })
    }
}

/// Serves one client, whatever stream it comes on, until it goes: as [`Mount`] does with each that it lets in. Fails if the
/// client does what it must not, or if the home cannot be looked at.
pub async fn serve(
    options: Options,
    reader: impl AsyncRead + Unpin,
    writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    connection::serve(&options.export()?, reader, writer).await.map_err(io::Error::other)
}

impl Mount {
    /// Listens at `listen`, where port 0 is any that is free, and serves those whom `allow` has; of programs on this machine
    /// only those that root and the user of this one run. Needs a tokio runtime. Fails if it cannot listen, or if the home cannot be looked at.
    pub async fn start(listen: SocketAddr, allow: Vec<Network>, options: Options) -> io::Result<Self> {
        Ok(Self(server::Server::start(listen, allow, Arc::new(options.export()?)).await?))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.0.address
    }

    /// Lets nobody in any more, and ends all connections.
    pub async fn stop(self) {
        self.0.stop().await;
    }
}
