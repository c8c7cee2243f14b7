//! Sockets that behave as networks do.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use peers::{Identity, wire};
use tokio::net::UdpSocket;

/// An address that swallows whatever comes.
pub(crate) struct Silent {
    socket: std::net::UdpSocket,
}

impl Silent {
    pub(crate) fn at(address: &str) -> Self {
        Self { socket: std::net::UdpSocket::bind(address).unwrap() }
    }

    pub(crate) fn address(&self) -> String {
        self.socket.local_addr().unwrap().to_string()
    }
}

/// A machine of some key at which connections are counted.
pub(crate) struct Counter {
    pub(crate) address: SocketAddr,
    count: Arc<AtomicUsize>,
}

impl Counter {
    pub(crate) fn start() -> Self {
        let identity = Identity::ephemeral().unwrap();
        let tls = wire::server_config(&identity, &[wire::ALPN], Arc::new(|_| true)).unwrap();
        let config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        let endpoint = quinn::Endpoint::server(config, SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let (address, count) = (endpoint.local_addr().unwrap(), Arc::<AtomicUsize>::default());
        let counted = count.clone();
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move { drop(incoming.await) });
            }
        });
        Self { address, count }
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

/// A way to an address that can be cut.
pub(crate) struct Cable {
    pub(crate) address: SocketAddr,
    is_cut: Arc<AtomicBool>,
}

impl Cable {
    pub(crate) async fn to(far: SocketAddr) -> Self {
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let out = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        out.connect(far).await.unwrap();
        let (address, is_cut) = (near.local_addr().unwrap(), Arc::<AtomicBool>::default());
        let caller = Arc::new(Mutex::new(None));
        let (forth, back) = ((near.clone(), out.clone()), (near, out));
        let (cut, who) = (is_cut.clone(), caller.clone());
        tokio::spawn(async move {
            let mut buffer = [0; 1 << 16];
            while let Ok((len, from)) = forth.0.recv_from(&mut buffer).await {
                *who.lock().unwrap() = Some(from);
                if !cut.load(Ordering::Relaxed) {
                    let _ = forth.1.send(&buffer[..len]).await;
                }
            }
        });
        let cut = is_cut.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 1 << 16];
            loop {
                let Ok(len) = back.1.recv(&mut buffer).await else { continue };
                let to = *caller.lock().unwrap();
                if let Some(to) = to.filter(|_| !cut.load(Ordering::Relaxed)) {
                    let _ = back.0.send_to(&buffer[..len], to).await;
                }
            }
        });
        Self { address, is_cut }
    }

    pub(crate) fn cut(&self) {
        self.is_cut.store(true, Ordering::Relaxed);
    }

    pub(crate) fn mend(&self) {
        self.is_cut.store(false, Ordering::Relaxed);
    }
}
