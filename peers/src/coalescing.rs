//! A UDP socket that reads packets which come one by one in groups, as network cards coalesce interrupts.
//!
//! At 100 Mbit/s a packet comes every 0.12 ms. To be woken for each one costs far more than to handle it. While packets keep coming
//! so, the socket is read once in 3 to 4 ms, and nothing wakes the program in between. When that is so: spec/wire.md, "Reading".

use std::{
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit, UdpSocketState},
};
use tokio::{
    io::Interest,
    time::{Sleep, sleep},
};
use tracing::debug;

/// The socket of an endpoint.
#[derive(Debug)]
pub(crate) struct CoalescingSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    /// Whether the send buffer had no room for the last packet.
    is_send_full: AtomicBool,
    reading: Mutex<Reading>,
}

#[derive(Debug)]
struct Reading {
    /// The socket while packets that come are to wake the program: not during a wait.
    watched: Option<tokio::net::UdpSocket>,
    wait: Pin<Box<Sleep>>,
    is_waiting: bool,
    flow: Flow,
}

impl CoalescingSocket {
    /// Takes over a bound socket that does not block. Needs a tokio runtime.
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        let wait = Box::pin(sleep(Duration::ZERO));
        let reading = Mutex::new(Reading { watched: None, wait, is_waiting: false, flow: Flow::default() });
        Ok(Self { socket, state, is_send_full: AtomicBool::new(false), reading })
    }
}

impl AsyncUdpSocket for CoalescingSocket {
    fn poll_recv(
        &self,
        context: &mut Context,
        buffers: &mut [IoSliceMut<'_>],
        received: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let Reading { watched, wait, is_waiting, flow } = &mut *reading;
        loop {
            if !*is_waiting && flow.wants_to_wait() {
                *watched = None;
                wait.as_mut().reset(tokio::time::Instant::now() + WAIT);
                *is_waiting = true;
            }
            if *is_waiting {
                ready!(wait.as_mut().poll(context));
                *is_waiting = false;
                flow.waited();
            }
            let result = match watched {
                Some(socket) => {
                    ready!(socket.poll_recv_ready(context))?;
                    socket.try_io(Interest::READABLE, || self.state.recv((&*socket).into(), buffers, received))
                }
                None => self.state.recv((&self.socket).into(), buffers, received),
            };
            match result {
                Ok(count) => {
                    let packets = received[..count].iter().map(|meta| meta.len.div_ceil(meta.stride.max(1))).sum();
                    flow.read(Instant::now(), packets, count == buffers.len());
                    return Poll::Ready(Ok(count));
                }
                // An error would end the endpoint and all its connections.
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    debug!(%error, "cannot read packets now");
                    flow.state = COALESCING;
                }
                Err(_) if watched.is_some() => {}
                // Where the system has no room to watch it, it is read again after a wait.
                Err(_) => match watch(&self.socket) {
                    Ok(socket) => *watched = Some(socket),
                    Err(_) => flow.state = COALESCING,
                },
            }
        }
    }

    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(SendPoller { socket: self, writable: None })
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        let sent = self.state.send((&self.socket).into(), transmit);
        let is_send_full = sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        self.is_send_full.store(is_send_full, Ordering::Relaxed);
        sent
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }
}

/// Registers a duplicate of a socket for wake-ups. Dropping the result deregisters it.
fn watch(socket: &UdpSocket) -> io::Result<tokio::net::UdpSocket> {
    tokio::net::UdpSocket::from_std(socket.try_clone()?)
}

/// Waits, for one connection, until a socket can send.
struct SendPoller {
    socket: Arc<CoalescingSocket>,
    writable: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl UdpPoller for SendPoller {
    fn poll_writable(self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        let Self { socket, writable } = self.get_mut();
        // quinn calls this before each packet, and a registration costs four system calls.
        if writable.is_none() && !socket.is_send_full.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let until_writable = writable.get_or_insert_with(|| {
            let socket = socket.clone();
            Box::pin(async move {
                match watch(&socket.socket) {
                    Ok(socket) => _ = socket.writable().await,
                    Err(_) => sleep(WAIT).await,
                }
            })
        });
        ready!(until_writable.as_mut().poll(context));
        *writable = None;
        Poll::Ready(Ok(()))
    }
}

impl std::fmt::Debug for SendPoller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.socket.fmt(f)
    }
}

/// How packets come, by what the last reads brought.
#[derive(Debug)]
struct Flow {
    state: State,
    /// Number of reads of few packets, close to each other, after which coalescing starts.
    needed: u32,
}

#[derive(Debug)]
enum State {
    /// Reads of few packets in a row, and when the first was.
    Watching { reads: u32, since: Option<Instant> },
    /// Reads are preceded by a wait.
    Coalescing {
        /// Whether the next read's wait is over.
        has_waited: bool,
        /// Packets read since.
        packets: usize,
    },
}

impl Default for Flow {
    fn default() -> Self {
        Self { state: WATCHING, needed: NEEDED_MIN }
    }
}

impl Flow {
    /// Whether the next read is to be preceded by a wait.
    fn wants_to_wait(&self) -> bool {
        matches!(self.state, State::Coalescing { has_waited: false, .. })
    }

    /// A wait is over.
    fn waited(&mut self) {
        self.state = State::Coalescing { has_waited: true, packets: 0 };
    }

    /// A read brought `packets`, at least one; and maybe not all that there are, if it was full.
    fn read(&mut self, now: Instant, packets: usize, was_full: bool) {
        match &mut self.state {
            State::Watching { reads, since } if packets <= FEW_PACKETS => {
                let first = *since.get_or_insert(now);
                *reads += 1;
                if *reads >= self.needed {
                    let is_dense = now.duration_since(first) < SPACING_MAX * self.needed;
                    self.state = if is_dense { COALESCING } else { WATCHING };
                }
            }
            State::Watching { .. } => self.state = WATCHING,
            State::Coalescing { packets: sum, .. } => {
                *sum += packets;
                if *sum > MANY_PACKETS {
                    self.state = WATCHING;
                } else if was_full {
                    // The next read brings the rest.
                } else if *sum < LEAST_PACKETS {
                    // The sender may be waiting for an answer.
                    self.state = WATCHING;
                    self.needed = (self.needed * 2).min(NEEDED_MAX);
                } else {
                    self.state = COALESCING;
                    self.needed = (self.needed / 2).max(NEEDED_MIN);
                }
            }
        }
    }
}

const WATCHING: State = State::Watching { reads: 0, since: None };
const COALESCING: State = State::Coalescing { has_waited: false, packets: 0 };
/// The wait before a read; timers may add 1 ms.
const WAIT: Duration = Duration::from_millis(3);
const FEW_PACKETS: usize = 2;
/// Fewer after one wait are no longer close to each other.
const LEAST_PACKETS: usize = (WAIT.as_micros() / SPACING_MAX.as_micros()) as usize;
/// More after one wait might not fit into a socket's buffer: 416 KiB for most users, of which a packet may take 8 KiB.
const MANY_PACKETS: usize = 48;
/// The mean distance below which packets count as close to each other: 24 Mbit/s, at 1,500 bytes.
const SPACING_MAX: Duration = Duration::from_micros(500);
const NEEDED_MIN: u32 = 32;
const NEEDED_MAX: u32 = 4096;

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// Reads packets as they come, each given as the time in µs since the start. Returns the reads and the waits.
    fn run(arrivals: impl Iterator<Item = u64>) -> (usize, usize) {
        let (start, mut flow) = (Instant::now(), Flow::default());
        let (mut reads, mut waits) = (0, 0);
        let mut arrivals = arrivals.peekable();
        while let Some(first) = arrivals.next() {
            let (mut read_at, mut packets) = (first, 1);
            if flow.wants_to_wait() {
                read_at += WAIT.as_micros() as u64;
                waits += 1;
                flow.waited();
            }
            while packets < 32 && arrivals.next_if(|at| *at <= read_at).is_some() {
                packets += 1;
            }
            reads += 1;
            flow.read(start + Duration::from_micros(read_at), packets, packets == 32);
        }
        (reads, waits)
    }

    #[test]
    fn only_a_dense_stream_of_single_packets_is_coalesced() {
        let every = |micros: u64| (0..10_000).map(move |n| n * micros);
        let (reads, waits) = run(every(120));
        assert!(waits > 350 && reads < 450, "100 Mbit/s: {reads} reads, {waits} waits");
        assert_eq!(run(every(1000)), (10_000, 0), "12 Mbit/s");
        let groups = (0..10_000).map(|n| n / 8 * 500);
        assert_eq!(run(groups).1, 0, "packets come in groups");
        let (_, waits) = run(every(10));
        assert!(waits <= 10_000 / (NEEDED_MIN as usize), "1.2 Gbit/s: at most one wait for a burst, {waits}");
        let (_, waits) = run(every(400).chain(every(1000).map(|at| at + 4_000_000)));
        assert!(waits > 900 && waits < 2_000, "it ends when the packets become rare: {waits}");
    }

    #[test]
    fn questions_and_answers_are_hardly_held_up() {
        for packets in 1..=3 {
            let mut flow = Flow::default();
            let (mut now, mut waits) = (Instant::now(), 0);
            for _ in 0..100_000 {
                now += Duration::from_micros(100);
                if flow.wants_to_wait() {
                    flow.waited();
                    waits += 1;
                }
                flow.read(now, packets, false);
            }
            assert!(waits < 50, "{packets} packets each: {waits}");
        }
    }

    #[tokio::test]
    async fn nothing_is_lost_or_left_lying() {
        let receiver = crate::listen::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let to = receiver.local_addr().unwrap();
        let socket = CoalescingSocket::new(receiver).unwrap();
        const PACKETS: usize = 2_000;
        let sender = std::thread::spawn(move || {
            let from = UdpSocket::bind("127.0.0.1:0").unwrap();
            let start = Instant::now();
            for n in 0..PACKETS as u32 {
                while start.elapsed() < Duration::from_micros(100) * n {
                    std::hint::spin_loop();
                }
                from.send_to(&[7; 100], to).unwrap();
            }
        });
        let mut buffers = vec![vec![0; 65_536]; 32];
        let (mut packets, mut reads) = (0, 0);
        while packets < PACKETS {
            let mut received = [RecvMeta::default(); 32];
            let read = poll_fn(|context| {
                let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
                socket.poll_recv(context, &mut slices, &mut received)
            });
            let count = tokio::time::timeout(Duration::from_secs(20), read).await.expect("a packet").unwrap();
            packets += received[..count].iter().map(|meta| meta.len / 100).sum::<usize>();
            reads += 1;
        }
        sender.join().unwrap();
        assert!(reads < PACKETS / 2, "{reads} reads");
    }
}
