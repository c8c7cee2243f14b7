//! Whose a connection from this machine is: any program here can reach a port on loopback, whoever runs it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// The user whose program has the other end of the connection from `peer`, an address of this machine, to `here`. `None` if
/// there is none any more.
pub(crate) fn owner(peer: SocketAddr, here: SocketAddr) -> Option<u32> {
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|table| find(&fs::read_to_string(table).ok()?, peer, here))
}

/// Looks in a table of proc_pid_net(5), in which the socket's own address comes first.
fn find(table: &str, peer: SocketAddr, here: SocketAddr) -> Option<u32> {
    table.lines().skip(1).find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (own, other) = (address(words.next()?)?, address(words.next()?)?);
        // Its state, queues, timer and retransmissions.
        let owner = words.nth(4)?.parse().ok()?;
        (plain(own) == plain(peer) && plain(other) == plain(here)).then_some(owner)
    })
}

/// The two ends of one connection may write an IPv4 address in two ways.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// `0100007F:1E15` is 127.0.0.1:7701 where bytes are stored the little end first.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for at in 0..4 {
                bytes[4 * at..4 * at + 4].copy_from_slice(&word(8 * at)?);
            }
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_kernel_knows_whose_a_connection_is() {
        for (listen, host) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")] {
            let listener = TcpListener::bind(listen).unwrap();
            let client = TcpStream::connect((host, listener.local_addr().unwrap().port())).unwrap();
            let (accepted, peer) = listener.accept().unwrap();
            let here = accepted.local_addr().unwrap();
            assert_eq!(owner(peer, here), Some(rustix::process::getuid().as_raw()), "{listen}: {client:?}");
            assert_eq!(owner(SocketAddr::new(peer.ip(), 1), here), None);
        }
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn tables_are_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             junk\n\
             0: 0100007F:1E15 00000000:0000 0A 00000000:00000000 00:00000000 00000000   999        0 1\n\
             1: 0100007F:C350 0100007F:1E15 01 00000000:00000000 00:00000000 00000000  1000        0 2\n";
        let find = |peer: &str| find(table, peer.parse().unwrap(), "127.0.0.1:7701".parse().unwrap());
        assert_eq!(
            (find("127.0.0.1:50000"), find("127.0.0.1:50001"), find("127.0.0.2:50000")),
            (Some(1000), None, None)
        );
    }
}
