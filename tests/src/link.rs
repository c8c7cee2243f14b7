use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

/// A network in front of a UDP socket: whoever sends to its address reaches that socket, and hears from it, late, at a
/// limited rate, and not all of it, as the link is set.
///
/// One other side at a time: what comes back goes to whoever sent last.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// How a link treats datagrams, each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quality {
    /// How long each is on its way.
    pub delay: Duration,
    /// How many bytes are carried a second, headers left out; all if `None`. What waits longer than 200 ms for its turn is
    /// dropped, as routers do.
    pub bytes_per_s: Option<u64>,
}

/// What happens to a datagram.
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

/// Decides what happens to the datagram of that number from 0 on, those towards the socket and back counted apart.
pub type Fates = Box<dyn FnMut(Way, u64) -> Fate + Send>;

/// Which way a datagram goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Towards the socket that the link is in front of.
    There,
    /// From it.
    Back,
}

struct Shared {
    quality: Mutex<Quality>,
    fates: Mutex<Fates>,
    carried: [AtomicU64; 2],
    is_over: AtomicBool,
}

/// A datagram under way.
struct Parcel {
    bytes: Vec<u8>,
    due: Instant,
}

impl Link {
    /// Puts a link in front of `target`, on a free port of the loopback device.
    pub fn start(target: SocketAddr, quality: Quality) -> io::Result<Self> {
        let front = UdpSocket::bind(("127.0.0.1", 0))?;
        let back = UdpSocket::bind(if target.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" })?;
        back.connect(target)?;
        for socket in [&front, &back] {
            socket.set_read_timeout(Some(LOOK_EVERY))?;
            // A burst is to wait, not to be lost. The system may allow less than this, and more to root.
            if rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, BUFFER_BYTES).is_err() {
                rustix::net::sockopt::set_socket_recv_buffer_size(socket, BUFFER_BYTES)?;
            }
        }
        let shared = Arc::new(Shared {
            quality: Mutex::new(quality),
            fates: Mutex::new(Box::new(|_, _| Fate::Carried)),
            carried: Default::default(),
            is_over: AtomicBool::new(false),
        });
        let link = Self { address: front.local_addr()?, shared: shared.clone() };
        let client = Arc::new(Mutex::new(None));
        let (to_target, from_target) = (back.try_clone()?, back);
        let (from_client, to_client) = (front.try_clone()?, front);
        let known = client.clone();
        carry(
            Way::There,
            shared.clone(),
            from_client,
            move |from| *lock(&known) = Some(from),
            move |bytes| to_target.send(bytes).map(drop),
        );
        carry(
            Way::Back,
            shared,
            from_target,
            |_| {},
            move |bytes| {
                let to = *lock(&client);
                to.map_or(Ok(()), |to| to_client.send_to(bytes, to).map(drop))
            },
        );
        Ok(link)
    }

    /// Where the link is to be dialled.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Treats what is sent from now on so.
    pub fn set(&self, quality: Quality) {
        *lock(&self.shared.quality) = quality;
    }

    /// Has `fates` decide on each datagram from now on, beside the quality.
    pub fn interfere(&self, fates: impl FnMut(Way, u64) -> Fate + Send + 'static) {
        *lock(&self.shared.fates) = Box::new(fates);
    }

    /// How many bytes of datagrams arrived so far: there and back.
    pub fn carried(&self) -> [u64; 2] {
        [0, 1].map(|way| self.shared.carried[way].load(Ordering::Relaxed))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
    }
}

/// Starts the threads of one way: one that takes datagrams in, and one that hands them out when they are due.
fn carry(
    way: Way,
    shared: Arc<Shared>,
    from: UdpSocket,
    mut met: impl FnMut(SocketAddr) + Send + 'static,
    deliver: impl Fn(&[u8]) -> io::Result<()> + Send + 'static,
) {
    let (sent, taken) = mpsc::channel::<Parcel>();
    let counted = shared.clone();
    thread::spawn(move || {
        let mut waiting: VecDeque<Parcel> = VecDeque::new();
        loop {
            let next = match waiting.front() {
                Some(parcel) => taken.recv_timeout(parcel.due.saturating_duration_since(Instant::now())),
                None => taken.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            };
            match next {
                Ok(parcel) => {
                    let at = waiting.partition_point(|other| other.due <= parcel.due);
                    waiting.insert(at, parcel);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            while let Some(parcel) = waiting.pop_front_if(|parcel| parcel.due <= Instant::now()) {
                // As on any network, what nobody takes is lost.
                if deliver(&parcel.bytes).is_ok() {
                    counted.carried[way as usize].fetch_add(parcel.bytes.len() as u64, Ordering::Relaxed);
                }
            }
        }
    });
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        let mut free_at = Instant::now();
        let mut number = 0;
        while !shared.is_over.load(Ordering::Relaxed) {
            let Ok((len, sender)) = from.recv_from(&mut buffer) else { continue };
            met(sender);
            let fate = (lock(&shared.fates))(way, number);
            number += 1;
            let now = Instant::now();
            let Quality { delay, bytes_per_s } = *lock(&shared.quality);
            free_at = free_at.max(now);
            if free_at > now + QUEUE || fate == Fate::Dropped {
                continue;
            }
            free_at += bytes_per_s.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(len as f64 / rate as f64));
            let (mut bytes, mut due) = (buffer[..len].to_vec(), free_at + delay);
            match fate {
                Fate::Corrupted => bytes[len / 2] ^= 1,
                Fate::Truncated => bytes.truncate(len / 2),
                Fate::Doubled => drop(sent.send(Parcel { bytes: bytes.clone(), due })),
                Fate::Late(more) => due += more,
                Fate::Carried | Fate::Dropped => {}
            }
            if sent.send(Parcel { bytes, due }).is_err() {
                return;
            }
        }
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long datagrams wait at most for their turn.
const QUEUE: Duration = Duration::from_millis(200);
const BUFFER_BYTES: usize = 8 << 20;
/// How often the threads look whether the link is over.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    /// Two sockets with a link between them, and what arrives at the second of 100 datagrams of 400 bytes.
    fn arrive(quality: Quality, fates: impl FnMut(Way, u64) -> Fate + Send + 'static) -> (Vec<Vec<u8>>, Duration) {
        let there = UdpSocket::bind("127.0.0.1:0").unwrap();
        there.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let link = Link::start(there.local_addr().unwrap(), quality).unwrap();
        link.interfere(fates);
        let here = UdpSocket::bind("127.0.0.1:0").unwrap();
        let began = Instant::now();
        for number in 0..100 {
            here.send_to(&[number; 400], link.address()).unwrap();
        }
        let mut came = Vec::new();
        let mut buffer = [0; 2000];
        let mut last = began;
        while let Ok(len) = there.recv(&mut buffer) {
            came.push(buffer[..len].to_vec());
            last = Instant::now();
        }
        (came, last - began)
    }

    #[test]
    fn datagrams_take_their_time() {
        let quality = Quality { delay: Duration::from_millis(50), bytes_per_s: Some(400_000) };
        let (came, took) = arrive(quality, |_, _| Fate::Carried);
        let sent: Vec<_> = (0..100).map(|number| vec![number; 400]).collect();
        assert_eq!(came, sent);
        assert!(took >= Duration::from_millis(149), "{took:?}");
    }

    #[test]
    fn fates_befall_the_datagrams_they_are_meant_for() {
        let (came, _) = arrive(Quality::default(), |way, number| match (way, number) {
            (Way::There, 3) => Fate::Dropped,
            (Way::There, 4) => Fate::Doubled,
            (Way::There, 5) => Fate::Corrupted,
            (Way::There, 6) => Fate::Truncated,
            (Way::There, 7) => Fate::Late(Duration::from_millis(300)),
            _ => Fate::Carried,
        });
        let mut expected: Vec<_> = (0..100).map(|number| vec![number; 400]).collect();
        let late = expected.remove(7);
        expected[6].truncate(200);
        expected[5][200] ^= 1;
        expected.insert(4, vec![4; 400]);
        expected.remove(3);
        expected.push(late);
        assert_eq!(came, expected);
    }
}
