//! Carrying out the orders of other machines: who may, how many at once, and telling them what became of it. Whoever
//! knows what an arena looks like on disk does the work.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use namespace::{ArenaName, PeerId};
use tokio::{
    sync::{Semaphore, mpsc},
    task::{JoinSet, spawn_blocking},
    time::{interval, timeout},
};
use tracing::warn;

use crate::{
    Peers, Roles,
    endpoint::Inner,
    frame::{FrameError, read_frame, within, write_frame},
    order::{Done, News, ORDER_BYTES_MAX, Order, Outcome, Why},
    ordering::UNDER_WAY_MAX,
    serve::UNSUPPORTED,
};

/// Carries out orders in this machine's arenas.
pub trait Orders: Send + Sync {
    /// Who may give orders now; else why nobody may. It may block.
    fn roles(&self) -> Result<Roles, String>;

    /// Carries out an order of `asker`, which may give it. `bytes` counts those of a file that have come. Ends in bounded
    /// time after the last of them. Dropped before its end, it leaves nothing half done.
    fn carry_out(
        self: Arc<Self>,
        asker: PeerId,
        order: Order,
        bytes: Arc<AtomicU64>,
    ) -> Pin<Box<dyn Future<Output = Done> + Send>>;
}

/// Who carries out orders, and for whom some are carried out now.
#[derive(Default)]
pub(crate) struct Obeying {
    orders: Mutex<Option<Weak<dyn Orders>>>,
    /// Permits for streams, by peer.
    streams: Mutex<HashMap<PeerId, Arc<Semaphore>>>,
}

impl Peers {
    /// Takes orders of others from now on, as long as `orders` lives. Before, every order is refused.
    pub fn obey(&self, orders: Weak<dyn Orders>) {
        *self.inner.obeying.orders.lock().unwrap_or_else(PoisonError::into_inner) = Some(orders);
    }
}

/// Carries out the orders on one stream, until the asker ends it; what is under way then is given up.
pub(crate) async fn serve_orders(
    inner: &Arc<Inner>,
    peer: PeerId,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) -> Result<(), FrameError> {
    let streams = {
        let mut streams = inner.obeying.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.entry(peer).or_insert_with(|| Arc::new(Semaphore::new(STREAMS_MAX))).clone()
    };
    let orders = inner.obeying.orders.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(Weak::upgrade);
    let (Some(orders), Ok(_permit)) = (orders, streams.try_acquire_owned()) else {
        warn!(%peer, "refused: orders, now");
        let _ = send.reset(UNSUPPORTED.into());
        return Ok(());
    };
    let asked = orders.clone();
    let roles = spawn_blocking(move || asked.roles()).await.unwrap_or_else(|panic| Err(panic.to_string()));
    let (telling, mut told) = mpsc::channel::<Outcome>(OUTCOMES_AHEAD);
    let writing = async {
        while let Some(outcome) = told.recv().await {
            within(STALL_LIMIT, write_frame(&mut send, &outcome)).await?;
        }
        Ok::<(), FrameError>(())
    };
    let reading = async {
        let places = Arc::new(Semaphore::new(UNDER_WAY_MAX));
        let mut under_way = JoinSet::new();
        for number in 0.. {
            let Ok(place) = places.clone().acquire_owned().await else { break };
            let mut next = std::pin::pin!(read_frame::<Order>(&mut recv, ORDER_BYTES_MAX));
            let order = loop {
                match timeout(IDLE_LIMIT, &mut next).await {
                    Ok(order) => break order?,
                    // Nothing is asked, and nothing is being done.
                    Err(_) if places.available_permits() == UNDER_WAY_MAX - 1 => return Ok(()),
                    Err(_) => {}
                }
            };
            while under_way.try_join_next().is_some() {}
            if let Some(refusal) = refusal(inner, peer, &roles, &order) {
                let _ = telling.send(Outcome { number, news: News::Done(refusal) }).await;
                continue;
            }
            let (orders, telling) = (orders.clone(), telling.clone());
            under_way.spawn(async move {
                carry_out(orders, peer, order, number, &telling).await;
                drop(place);
            });
        }
        Ok(())
    };
    let outcome = tokio::select! {
        outcome = reading => outcome,
        outcome = writing => outcome,
    };
    let _ = send.finish();
    match outcome {
        Err(FrameError::Ended) => Ok(()),
        outcome => outcome,
    }
}

/// Carries out one order, and tells every second that it is being done.
async fn carry_out(orders: Arc<dyn Orders>, peer: PeerId, order: Order, number: u64, telling: &mpsc::Sender<Outcome>) {
    let bytes = Arc::new(AtomicU64::new(0));
    let mut doing = orders.carry_out(peer, order, bytes.clone());
    let mut ticks = interval(TELL_EVERY);
    ticks.tick().await;
    loop {
        let news = tokio::select! {
            biased;
            done = &mut doing => News::Done(done),
            _ = ticks.tick() => News::Progress { bytes: bytes.load(Ordering::Relaxed) },
        };
        let is_done = matches!(news, News::Done(_));
        if telling.send(Outcome { number, news }).await.is_err() || is_done {
            return;
        }
    }
}

/// Why an order of `peer` is not carried out, if it must not be.
fn refusal(inner: &Inner, peer: PeerId, roles: &Result<Roles, String>, order: &Order) -> Option<Done> {
    if !order.is_valid() {
        return Some(Done::failed(Why::Refused, "an order that nobody may give"));
    }
    if !order.is_for_writers() {
        return None;
    }
    let roles = match roles {
        Ok(roles) => roles,
        Err(why) => {
            let reason = format!("nobody may write at {}, for its configuration cannot be read: {why}", inner.name);
            return Some(Done::failed(Why::Refused, &reason));
        }
    };
    let row = inner.roster.get(peer);
    if row.as_ref().is_some_and(|row| roles.may_write(row, &order.arena)) {
        return None;
    }
    let name = row.map_or_else(|| peer.to_string(), |row| row.name);
    warn!(peer = name, arena = %order.arena, "refused: it may not write there");
    Some(Done::failed(Why::Refused, &how_to_allow(&inner.name, &name, &order.arena)))
}

/// Says what to write where, so that `peer` may write to `arena` at `here`.
fn how_to_allow(here: &str, peer: &str, arena: &ArenaName) -> String {
    let (key, value) = (toml(peer), toml(arena.as_str()));
    format!(
        "{peer} may not write to the arena {arena} at {here}; to allow it, add to config.toml at {here}, below a line \
         [roles]: {key} = {{ writer = [{value}] }}"
    )
}

/// A string as TOML has it. Names have no control characters.
fn toml(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// How often the asker hears of an order that takes long.
const TELL_EVERY: Duration = Duration::from_secs(1);
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long a stream may stay open for nothing.
const IDLE_LIMIT: Duration = Duration::from_secs(600);
const OUTCOMES_AHEAD: usize = 64;
/// How many streams of one peer are served at once; further ones are reset.
const STREAMS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_to_allow_is_to_be_pasted() {
        let text = how_to_allow("nas", "my \"old\" laptop", &"in\\box".parse().unwrap());
        let line = text.rsplit("[roles]: ").next().unwrap();
        assert_eq!(line, r#""my \"old\" laptop" = { writer = ["in\\box"] }"#);
        assert!(text.starts_with("my \"old\" laptop may not write to the arena in\\box at nas;"), "{text}");
    }
}
