//! Having another machine carry out orders: the side that asks.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use namespace::PeerId;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    Peers,
    dial::reach,
    fetch::REACH_LIMIT,
    frame::{FrameError, StreamKind, read_frame, within, write_frame},
    order::{Done, News, ORDER_BYTES_MAX, Order, Outcome},
};

/// A stream on which another machine is asked to carry out orders. Dropped, it gives up those that are under way.
pub struct Ordering {
    orders: mpsc::Sender<(Order, Waiter)>,
    /// Places for orders that are under way.
    places: Semaphore,
    waiting: Arc<Waiting>,
    reading: JoinHandle<()>,
}

/// Why it is not known what became of an order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// The peer could not be reached.
    #[error("reach {peer}: {reason}")]
    Unreachable {
        /// What it is called.
        peer: String,
        /// Why.
        reason: String,
    },
    /// The stream broke off.
    #[error("{0}")]
    Broken(String),
}

/// Who waits for what becomes of an order.
struct Waiter {
    progress: watch::Sender<u64>,
    done: oneshot::Sender<Done>,
}

#[derive(Default)]
struct Waiting {
    by_number: Mutex<HashMap<u64, Waiter>>,
    /// Why the stream is no more.
    broken: Mutex<Option<String>>,
}

impl Peers {
    /// Opens a stream for orders to `peer`.
    pub async fn orders(&self, peer: PeerId) -> Result<Ordering, OrderError> {
        let name = self.inner.name_of(peer).unwrap_or_else(|| peer.to_string());
        let unreachable = |reason: String| OrderError::Unreachable { peer: name.clone(), reason };
        let connection = reach(&self.inner, peer, REACH_LIMIT).await.map_err(unreachable)?;
        let open = async {
            let failed = |error: quinn::ConnectionError| FrameError::Stream(error.into());
            let (mut send, recv) = connection.open_bi().await.map_err(failed)?;
            let kind = send.write_all(&[StreamKind::Orders as u8]).await;
            kind.map_err(|error| FrameError::Stream(error.into()))?;
            Ok((send, recv))
        };
        let (send, recv) = within(REACH_LIMIT, open).await.map_err(|error| unreachable(tree::reason(&error)))?;
        let (orders, given) = mpsc::channel(UNDER_WAY_MAX);
        let waiting = Arc::new(Waiting::default());
        tokio::spawn(write(send, given, waiting.clone()));
        let reading = tokio::spawn(read(recv, waiting.clone()));
        Ok(Ordering { orders, places: Semaphore::new(UNDER_WAY_MAX), waiting, reading })
    }
}

impl Ordering {
    /// Has an order carried out; orders are told in the order in which this is first polled. `progress` hears how many
    /// bytes have come. Fails if nothing is heard of it for 60 s, from when there is room for it on the stream.
    pub async fn ask(&self, order: Order, progress: impl Fn(u64)) -> Result<Done, OrderError> {
        let broken = || OrderError::Broken(self.waiting.why());
        let _place = self.places.acquire().await.map_err(|_| broken())?;
        let (telling, mut heard) = watch::channel(0);
        let (done, mut ended) = oneshot::channel();
        let waiter = Waiter { progress: telling, done };
        self.orders.send((order, waiter)).await.map_err(|_| broken())?;
        loop {
            let next = async {
                tokio::select! {
                    biased;
                    done = &mut ended => Some(done.map_err(|_| broken())),
                    Ok(()) = heard.changed() => None,
                }
            };
            match timeout(SILENCE_LIMIT, next).await {
                Ok(Some(done)) => return done,
                Ok(None) => progress(*heard.borrow_and_update()),
                Err(_) => {
                    return Err(OrderError::Broken(format!(
                        "nothing was heard of it for {} s",
                        SILENCE_LIMIT.as_secs()
                    )));
                }
            }
        }
    }

    /// Whether the stream is no more.
    pub fn is_broken(&self) -> bool {
        self.reading.is_finished() || self.orders.is_closed()
    }
}

impl Drop for Ordering {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

impl Waiting {
    fn why(&self) -> String {
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        broken.clone().unwrap_or_else(|| "the connection was lost".to_owned())
    }

    fn break_off(&self, why: String) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.by_number.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Numbers orders and sends them, until no more can come.
async fn write(mut send: quinn::SendStream, mut given: mpsc::Receiver<(Order, Waiter)>, waiting: Arc<Waiting>) {
    let mut number = 0;
    while let Some((order, waiter)) = given.recv().await {
        waiting.by_number.lock().unwrap_or_else(PoisonError::into_inner).insert(number, waiter);
        if let Err(error) = within(SILENCE_LIMIT, write_frame(&mut send, &order)).await {
            return waiting.break_off(tree::reason(&error));
        }
        number += 1;
    }
    let _ = send.finish();
}

/// Hears what becomes of orders, until the stream ends.
async fn read(mut recv: quinn::RecvStream, waiting: Arc<Waiting>) {
    let error = loop {
        let Outcome { number, news } = match read_frame(&mut recv, ORDER_BYTES_MAX).await {
            Ok(outcome) => outcome,
            Err(error) => break error,
        };
        let mut by_number = waiting.by_number.lock().unwrap_or_else(PoisonError::into_inner);
        match news {
            News::Progress { bytes } => {
                if let Some(waiter) = by_number.get(&number) {
                    waiter.progress.send_replace(bytes);
                }
            }
            News::Done(done) => {
                if let Some(waiter) = by_number.remove(&number) {
                    let _ = waiter.done.send(done);
                }
            }
        }
    };
    waiting.break_off(tree::reason(&error));
}

/// How many orders are under way on one stream, at most.
pub(crate) const UNDER_WAY_MAX: usize = 1024;
/// How long an order may be without news.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
