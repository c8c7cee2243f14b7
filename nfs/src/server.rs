//! Listening, and who is let in.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::sleep,
};
use tracing::{debug, info, warn};

use crate::{Network, connection, export::Export, owner::owner};

/// Lets clients in until it is told to stop.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

/// How many connections there are from each address.
type Clients = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// Counts as long as it lives.
struct Counted {
    clients: Clients,
    address: IpAddr,
}

impl Server {
    pub(crate) async fn start(listen: SocketAddr, allow: Vec<Network>, export: Arc<Export>) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let (stop, stopped) = watch::channel(false);
        let accepting = tokio::spawn(accept(listener, allow, export, stopped));
        Ok(Self { address, stop, accepting })
    }

    /// Ends all connections.
    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        let _ = self.accepting.await;
    }
}

async fn accept(listener: TcpListener, allow: Vec<Network>, export: Arc<Export>, mut stopped: watch::Receiver<bool>) {
    let clients = Clients::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.wait_for(|&stop| stop) => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // It is that client which is gone, or we have too many files open: then it is no use to go on at once.
                debug!(reason = tree::reason(&error), "a client was not let in");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let address = peer.ip().to_canonical();
        if !allow.iter().any(|network| network.contains(address)) {
            warn!(%peer, "a client was refused: see nfs.allow");
            continue;
        }
        let Some(counted) = Counted::new(&clients, address) else {
            warn!(%peer, "a client was refused: there are too many");
            continue;
        };
        let (export, mut stopped) = (export.clone(), stopped.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = serve(stream, peer, &export) => {}
                _ = stopped.wait_for(|&stop| stop) => {}
            }
            drop(counted);
        });
    }
}

/// Whether a program of root, or of the user that runs this one, has the other end. The system's NFS client is root's.
async fn is_ours(stream: &TcpStream, peer: SocketAddr) -> bool {
    let Ok(here) = stream.local_addr() else { return false };
    // The table that is read may be long.
    let owner = spawn_blocking(move || owner(peer, here)).await.ok().flatten();
    owner.is_some_and(|owner| owner == 0 || owner == rustix::process::getuid().as_raw())
}

async fn serve(mut stream: TcpStream, peer: SocketAddr, export: &Export) {
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
    let set = stream.set_nodelay(true).and_then(|()| SockRef::from(&stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = set {
        return debug!(%peer, reason = tree::reason(&error), "a client went at once");
    }
    if peer.ip().to_canonical().is_loopback() && !is_ours(&stream, peer).await {
        return warn!(%peer, "a client was refused: it is another user's");
    }
    info!(%peer, "a client came");
    let (reader, writer) = stream.split();
    match connection::serve(export, reader, writer).await {
        Ok(()) => info!(%peer, "a client went"),
        Err(error) => info!(%peer, reason = tree::reason(&error), "a client went"),
    }
}

impl Counted {
    /// `None` if there are too many.
    fn new(clients: &Clients, address: IpAddr) -> Option<Self> {
        let mut counts = clients.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        let count = counts.entry(address).or_default();
        if all >= CONNECTIONS_MAX || *count >= CONNECTIONS_OF_ONE_MAX {
            return None;
        }
        *count += 1;
        Some(Self { clients: clients.clone(), address })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

const CONNECTIONS_MAX: usize = 64;
const CONNECTIONS_OF_ONE_MAX: usize = 48;
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
const KEEPALIVE: Duration = Duration::from_secs(60);
