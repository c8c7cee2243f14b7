//! Carrying packets from one place to another, late, at a limited rate, and not all of them.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

/// How a link treats packets, each way.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Quality {
    /// How long each is on its way.
    pub delay: Duration,
    /// How many bytes are carried a second, headers of lower layers left out; all if `None`. What waits longer than 200 ms for
    /// its turn is dropped, as routers do.
    pub bytes_per_s: Option<u64>,
    /// The share that is lost at random, from 0 to 1.
    pub loss: f64,
    /// The share that comes late, from 0 to 1, and by how much.
    pub late: (f64, Duration),
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It arrives.
    Carried,
    /// It is lost.
    Dropped,
    /// A bit of it is flipped.
    Corrupted,
    /// Half of it arrives.
    Truncated,
    /// It arrives twice.
    Doubled,
    /// It arrives so much later.
    Late(Duration),
}

/// Decides what happens to the packet of that number from 0 on, those towards the target and back counted apart.
pub type Fates = Box<dyn FnMut(Way, u64) -> Fate + Send>;

/// Which way a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Towards the socket that the link is in front of, or the second of two networks.
    There,
    /// From it.
    Back,
}

/// What the two ways of a link have in common.
pub(super) struct Shared {
    pub(super) quality: Mutex<Quality>,
    pub(super) fates: Mutex<Fates>,
    carried: [AtomicU64; 2],
    pub(super) is_over: AtomicBool,
}

impl Shared {
    pub(super) fn new(quality: Quality) -> Self {
        Self {
            quality: Mutex::new(quality),
            fates: Mutex::new(Box::new(|_, _| Fate::Carried)),
            carried: Default::default(),
            is_over: AtomicBool::new(false),
        }
    }

    pub(super) fn carried(&self) -> [u64; 2] {
        [0, 1].map(|way| self.carried[way].load(Ordering::Relaxed))
    }
}

/// Starts the threads of one way: one that takes packets in, and one that hands them out when they are due. They end once the
/// link is over and `receive` returns.
pub(super) fn carry(
    way: Way,
    shared: Arc<Shared>,
    mut receive: impl FnMut(&mut [u8]) -> io::Result<usize> + Send + 'static,
    deliver: impl Fn(&[u8]) -> io::Result<()> + Send + 'static,
) {
    let (sent, taken) = mpsc::channel::<(Instant, Vec<u8>)>();
    let counted = shared.clone();
    thread::spawn(move || {
        // By the time at which they are due, then in order of arrival.
        let mut waiting: BTreeMap<(Instant, u64), Vec<u8>> = BTreeMap::new();
        for number in 0.. {
            let next = match waiting.first_key_value() {
                Some(((due, _), _)) => taken.recv_timeout(due.saturating_duration_since(Instant::now())),
                None => taken.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            };
            match next {
                Ok((due, packet)) => drop(waiting.insert((due, number), packet)),
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            while let Some(first) = waiting.first_entry().filter(|first| first.key().0 <= Instant::now()) {
                let packet = first.remove();
                // As on any network, what nobody takes is lost.
                if deliver(&packet).is_ok() {
                    counted.carried[way as usize].fetch_add(packet.len() as u64, Ordering::Relaxed);
                }
            }
        }
    });
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        let mut free_at = Instant::now();
        let mut random = fastrand::Rng::with_seed(way as u64);
        let mut number = 0;
        while !shared.is_over.load(Ordering::Relaxed) {
            let Ok(len) = receive(&mut buffer) else { continue };
            let mut fate = (lock(&shared.fates))(way, number);
            number += 1;
            let now = Instant::now();
            let Quality { delay, bytes_per_s, loss, late } = *lock(&shared.quality);
            free_at = free_at.max(now);
            if fate == Fate::Carried && random.f64() < late.0 {
                fate = Fate::Late(late.1);
            }
            if free_at > now + QUEUE || fate == Fate::Dropped || random.f64() < loss {
                continue;
            }
            free_at += bytes_per_s.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(len as f64 / rate as f64));
            let (mut packet, mut due) = (buffer[..len].to_vec(), free_at + delay);
            match fate {
                Fate::Corrupted => packet[len / 2] ^= 1,
                Fate::Truncated => packet.truncate(len / 2),
                Fate::Doubled => drop(sent.send((due, packet.clone()))),
                Fate::Late(more) => due += more,
                Fate::Carried | Fate::Dropped => {}
            }
            if sent.send((due, packet)).is_err() {
                return;
            }
        }
    });
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long packets wait at most for their turn.
const QUEUE: Duration = Duration::from_millis(200);
