//! Whoever changes what is in arenas: this machine, or another one by orders.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use namespace::PeerId;
use peers::{Done, Order, OrderError, Ordering as Orders, Why};
use tokio::{sync::Mutex, time::interval};

use super::super::{Node, patience::Patience};
use crate::failure::{Code, Failure};

/// A machine that carries out orders.
pub(super) enum Hands {
    /// This one.
    Here(Node),
    /// Another one.
    There(There),
}

pub(super) struct There {
    node: Node,
    peer: PeerId,
    stream: Mutex<Option<Arc<Orders>>>,
    /// Why it cannot be reached any more: it is not tried again for each file.
    lost: OnceLock<Failure>,
    patience: Arc<Patience>,
}

impl Hands {
    pub(super) fn new(node: &Node, peer: Option<PeerId>, patience: &Arc<Patience>) -> Self {
        let (node, patience) = (node.clone(), patience.clone());
        match peer {
            None => Self::Here(node),
            Some(peer) => Self::There(There { node, peer, stream: Mutex::default(), lost: OnceLock::new(), patience }),
        }
    }

    /// The machine; `None` is this one.
    pub(super) fn peer(&self) -> Option<PeerId> {
        match self {
            Self::Here(_) => None,
            Self::There(there) => Some(there.peer),
        }
    }

    /// Has an order carried out. `on_bytes` hears how many bytes have come so far.
    pub(super) async fn ask(&self, order: Order, on_bytes: impl Fn(u64)) -> Result<Done, Failure> {
        match self {
            Self::There(there) => there.ask(order, &on_bytes).await,
            Self::Here(node) => {
                let bytes = Arc::new(AtomicU64::new(0));
                let mut doing = std::pin::pin!(node.carry_out(None, order, bytes.clone()));
                let mut ticks = interval(TICK);
                loop {
                    tokio::select! {
                        biased;
                        done = &mut doing => return Ok(done),
                        _ = ticks.tick() => on_bytes(bytes.load(Ordering::Relaxed)),
                    }
                }
            }
        }
    }
}

impl There {
    /// Whatever may have been lost on the way is asked again: doing an order twice comes to the same as once.
    async fn ask(&self, order: Order, on_bytes: &impl Fn(u64)) -> Result<Done, Failure> {
        let mut tries = 0;
        loop {
            if let Some(lost) = self.lost.get() {
                return Err(lost.clone());
            }
            tries += 1;
            let attempt = self.patience.begin();
            let asked = match self.stream().await {
                Ok(stream) => stream.ask(order.clone(), on_bytes).await,
                Err(error) => Err(error),
            };
            match asked {
                Ok(done) => {
                    // That a destination cannot reach the source is no progress.
                    if !matches!(done, Done::Failed { why: Why::Unreachable, .. }) {
                        self.patience.came();
                    }
                    return Ok(done);
                }
                Err(OrderError::Broken(_)) if tries < TRIES_MAX => {}
                Err(error) => {
                    let name = self.node.peer_name(Some(self.peer));
                    let lost = Failure::from(error).while_doing(format!("have {name} do its part"));
                    let lost = lost.code(Code::Unreachable);
                    if !self.patience.again(attempt, [self.peer], &lost).await {
                        return Err(self.lost.get_or_init(|| lost).clone());
                    }
                    tries = 0;
                }
            }
        }
    }

    async fn stream(&self) -> Result<Arc<Orders>, OrderError> {
        let mut stream = self.stream.lock().await;
        if let Some(open) = stream.as_ref().filter(|open| !open.is_broken()) {
            return Ok(open.clone());
        }
        let open = Arc::new(self.node.inner.peers.orders(self.peer).await?);
        *stream = Some(open.clone());
        Ok(open)
    }
}

/// How often a stream may break off under an order.
const TRIES_MAX: u32 = 3;
const TICK: Duration = Duration::from_millis(200);
