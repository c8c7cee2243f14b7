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
mod view;
mod window;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use blobstore::{Fetch, Store};
use namespace::Namespace;
use tokio::sync::mpsc;
use tree::{BlobId, UnixTime};

pub use allow::{Network, ParseNetworkError};

/// How the mount is to be.
pub struct Options {
    /// Where to listen; port 0 is any that is free.
    pub listen: SocketAddr,
    /// Whose clients are let in; of programs on this machine only those that root and the user of this one run.
    pub allow: Vec<Network>,
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
    /// Where the others come from.
    pub fetch: Arc<dyn Fetch>,
    /// Hears of blobs that are damaged in place, and of which the damaged bytes have been fetched.
    pub mend: mpsc::Sender<BlobId>,
}

/// A mount that is being served, until it is [stopped](Self::stop).
pub struct Mount(server::Server);

impl Mount {
    /// Listens, and serves. Needs a tokio runtime. Fails if it cannot listen, or if the home cannot be looked at.
    pub async fn start(options: Options) -> io::Result<Self> {
        let home = std::fs::metadata(&options.home)?;
        let born =
            home.created().or_else(|_| home.modified())?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let born = UnixTime { seconds: born.as_secs().cast_signed(), nanos: 0 };
        let view = view::View::new(options.namespace, options.key, born);
        let Options { store, fetch, read_ahead, fetch_timeout, mend, .. } = options;
        let reader = reader::Reader::new(store, fetch, read_ahead, fetch_timeout, mend);
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let look = export::Look { uid, gid, read_only: options.read_only };
        let export = Arc::new(export::Export { view, reader, home: options.home, look });
        Ok(Self(server::Server::start(options.listen, options.allow, export).await?))
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
