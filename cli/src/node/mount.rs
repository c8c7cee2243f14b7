//! Everything as a folder: what `nfs` needs of the rest.

use std::{future::Future, io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use blobstore::{Consent, Fetch, FetchError, Fetched, SharedSink, Verdict, Want};
use nfs::{Mount, Network, Options};
use peers::{Class, Identity, Peers};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};
use tree::{BlobId, RangeSet};

use super::{Node, blocking, verify::Damaged};
use crate::{
    config::Config,
    event::FileName,
    failure::{Code, Failure, WhileDoing},
};

/// How everything is offered as a folder.
pub(crate) struct MountSettings {
    pub listen: MountListen,
    /// Whose clients are let in.
    pub allow: Vec<Network>,
    /// How far ahead of readers is fetched, in bytes.
    pub read_ahead: u64,
    /// How long a read waits for bytes that are not here.
    pub fetch_timeout: Duration,
    /// Whether modes are without write permission.
    pub read_only: bool,
}

/// Where to listen for clients.
pub(crate) enum MountListen {
    /// At the usual port, or at another one if that is taken.
    Default,
    At(SocketAddr),
    Nowhere,
}

/// Fetches for the mount, in one class.
struct ForReaders(Peers, Class);

impl Fetch for ForReaders {
    fn fetch(
        &self,
        want: Want,
        sink: SharedSink,
    ) -> Pin<Box<dyn Future<Output = Result<Fetched, FetchError>> + Send + '_>> {
        Box::pin(self.0.fetch_as(self.1, want, sink))
    }

    fn received_bytes(&self) -> u64 {
        self.0.received_bytes()
    }
}

impl Node {
    /// Offers everything as a folder, unless the configuration says otherwise, and mends what its readers find damaged until
    /// `stopped`.
    pub(crate) async fn serve_mount(&self, stopped: watch::Receiver<bool>) -> Result<Option<Mount>, Failure> {
        let home = &self.inner.home;
        let named = || format!("understand {:?}", home.config);
        let listen = match Config::load(&home.config)?.mount_settings().while_doing(named())?.listen {
            MountListen::Nowhere => return Ok(None),
            MountListen::At(address) => vec![address],
            MountListen::Default => DEFAULT_LISTEN.to_vec(),
        };
        let (mend, damaged) = mpsc::channel(DAMAGED_MAX);
        let mut last = Ok(None);
        for (at, &address) in listen.iter().enumerate() {
            match self.mount_at(address, mend.clone()).await {
                Ok(mount) => {
                    let address = mount.address();
                    info!(%address, "offers everything as a folder");
                    let _ = self.inner.mount.set(address);
                    tokio::spawn(self.clone().mend_what_is_read(damaged, stopped));
                    return Ok(Some(mount));
                }
                Err(failure) if at + 1 < listen.len() => {
                    warn!(%address, reason = failure.reason(), "mounted from another port than this one");
                }
                Err(failure) => last = Err(failure.while_doing(format!("listen for the mount at {address}"))),
            }
        }
        last
    }

    async fn mount_at(&self, listen: SocketAddr, mend: mpsc::Sender<BlobId>) -> Result<Mount, Failure> {
        let home = &self.inner.home;
        let settings = Config::load(&home.config)?.mount_settings()?;
        let options = Options {
            key: Identity::load_or_create(&home.key())?.derive(KEY_CONTEXT),
            read_ahead: settings.read_ahead,
            fetch_timeout: settings.fetch_timeout,
            read_only: settings.read_only,
            home: home.state.clone(),
            namespace: self.inner.namespace.clone(),
            store: self.inner.store.clone(),
            fetch: Arc::new(ForReaders(self.inner.peers.clone(), Class::Foreground)),
            fetch_ahead: Arc::new(ForReaders(self.inner.peers.clone(), Class::Copy)),
            mend,
        };
        let started: Result<Mount, io::Error> = Mount::start(listen, settings.allow, options).await;
        started.map_err(|error| Failure::from(error).code(Code::Error))
    }

    /// Where everything is offered as a folder, if it is.
    pub(crate) fn mount_address(&self) -> Option<SocketAddr> {
        self.inner.mount.get().copied()
    }

    /// Mends files in place of which readers found something damaged. What is needed for it is in the cache by then.
    async fn mend_what_is_read(self, mut damaged: mpsc::Receiver<BlobId>, mut stopped: watch::Receiver<bool>) {
        loop {
            let blob = tokio::select! {
                blob = damaged.recv() => blob,
                _ = stopped.wait_for(|&stop| stop) => return,
            };
            let Some(blob) = blob else { return };
            if let Err(failure) = self.mend_blob(blob).await {
                warn!(%blob, reason = failure.reason(), "cannot be mended now");
            }
        }
    }

    async fn mend_blob(&self, blob: BlobId) -> Result<(), Failure> {
        let _turn = self.turn().await;
        let node = self.clone();
        for damaged in blocking(move || node.damaged_copies(blob)).await? {
            self.mend(Class::Background, Consent::Damage, &damaged).await?;
        }
        Ok(())
    }

    /// The files in place that have a blob, and something of it under quarantine.
    fn damaged_copies(&self, blob: BlobId) -> Result<Vec<Damaged>, Failure> {
        let store = &self.inner.store;
        let mut found = Vec::new();
        for file in store.holders(blob, COPIES_MAX)? {
            let row = store.file(&file)?.filter(|row| row.blob == blob && !row.damaged.is_empty() && !row.is_suspect());
            if let Some((row, arena)) = row.zip(self.arena_of(file.root)) {
                let verdict = Verdict::Damaged { data: row.damaged, outboard: RangeSet::new(), unreadable: None };
                let name = FileName::new(&arena, &file.path);
                found.push(Damaged { name, place: Some((arena, file)), blob, verdict });
            }
        }
        Ok(found)
    }
}

/// The usual port, and any other.
const DEFAULT_LISTEN: [SocketAddr; 2] = {
    let loopback = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    [SocketAddr::new(loopback, 7701), SocketAddr::new(loopback, 0)]
};
const KEY_CONTEXT: &[u8] = b"blobd 1 nfs handles";
/// So many damaged blobs wait to be mended; scrubbing finds the others.
const DAMAGED_MAX: usize = 64;
/// So many copies of one blob are looked at.
const COPIES_MAX: usize = 64;
