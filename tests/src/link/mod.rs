//! Networks as they are outside of data centres.

mod carry;
mod ip;

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use self::carry::{Shared, carry, lock};
pub use self::{
    carry::{Fate, Fates, Quality, Way},
    ip::IpLink,
};

/// A network in front of a UDP socket: whoever sends to its address reaches that socket, and hears from it, late, at a
/// limited rate, and not all of it, as the link is set.
///
/// One other side at a time: what comes back goes to whoever sent last.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
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
        let shared = Arc::new(Shared::new(quality));
        let link = Self { address: front.local_addr()?, shared: shared.clone() };
        let client = Arc::new(Mutex::new(None));
        let (to_target, from_target) = (back.try_clone()?, back);
        let (from_client, to_client) = (front.try_clone()?, front);
        let known = client.clone();
        let receive = move |buffer: &mut [u8]| {
            let (len, sender) = from_client.recv_from(buffer)?;
            *lock(&known) = Some(sender);
            Ok(len)
        };
        carry(Way::There, shared.clone(), receive, move |bytes| to_target.send(bytes).map(drop));
        let deliver = move |bytes: &[u8]| {
            let to = *lock(&client);
            to.map_or(Ok(()), |to| to_client.send_to(bytes, to).map(drop))
        };
        carry(Way::Back, shared, move |buffer| from_target.recv(buffer), deliver);
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
        self.shared.carried()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
    }
}

const BUFFER_BYTES: usize = 8 << 20;
/// How often the threads look whether the link is over.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::time::Instant;

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
        let quality = Quality { delay: Duration::from_millis(50), bytes_per_s: Some(400_000), ..Quality::default() };
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
