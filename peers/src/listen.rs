//! The sockets that are listened on. Which there are, and what fails: spec/wire.md, "Listening".

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket},
};

use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    race::label,
    racing::{plain_io, why_unknown},
};

/// What came of the names to listen on.
#[derive(Default)]
pub(crate) struct Bound {
    pub(crate) sockets: Vec<UdpSocket>,
    /// What cannot be listened on, and why.
    pub(crate) problems: Vec<String>,
}

/// Binds every address that `names`, each `HOST:PORT`, mean. Blocks while they are looked up.
pub(crate) fn bind_all(names: &[String]) -> Bound {
    let mut bound = Bound::default();
    let mut addresses: Vec<(&String, SocketAddr)> = Vec::new();
    for name in names {
        match name.to_socket_addrs() {
            Ok(found) => {
                for address in found {
                    if addresses.iter().all(|(_, known)| *known != address || address.port() == 0) {
                        addresses.push((name, address));
                    }
                }
            }
            Err(error) => bound.problems.push(format!("{name}: {}", why_unknown(&error))),
        }
    }
    // The one takes in the other.
    let all = addresses.clone();
    let covers = |port| all.iter().any(|(_, other)| *other == SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    addresses.retain(|(_, address)| {
        *address != SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())) || !covers(address.port())
    });
    for (name, address) in addresses {
        if bound.sockets.len() == SOCKETS_MAX {
            bound.problems.push(format!("{}: {SOCKETS_MAX} addresses are listened on already", label(name, address)));
            continue;
        }
        match bind(address) {
            Ok(socket) => bound.sockets.push(socket),
            Err(error) => bound.problems.push(format!("{}: {}", label(name, address), why_not(&error))),
        }
    }
    bound
}

/// A socket at `address`. `[::]` takes in IPv4 too, and is `0.0.0.0` on a machine without IPv6.
pub(crate) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let open = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            // The system's setting may say otherwise.
            socket.set_only_v6(!address.ip().is_unspecified())?;
        }
        socket.bind(&address.into())?;
        make_room(&socket);
        Ok(UdpSocket::from(socket))
    };
    open(address).or_else(|error: io::Error| {
        let lacks_v6 = matches!(Errno::from_io_error(&error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL));
        if lacks_v6 && address.ip() == Ipv6Addr::UNSPECIFIED {
            open((Ipv4Addr::UNSPECIFIED, address.port()).into())
        } else {
            Err(error)
        }
    })
}

/// Makes room for a burst of packets, which are lost otherwise; as much as the system lets this user have.
fn make_room(socket: &Socket) {
    if sockopt::set_socket_recv_buffer_size_force(socket, BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, BUFFER_BYTES);
    }
    if sockopt::set_socket_send_buffer_size_force(socket, BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, BUFFER_BYTES);
    }
}

/// Why an address cannot be listened on.
pub(crate) fn why_not(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "address in use".to_owned(),
        io::ErrorKind::AddrNotAvailable => "no interface of this machine has that address".to_owned(),
        io::ErrorKind::PermissionDenied => "not permitted; ports below 1024 are root's".to_owned(),
        _ => plain_io(&error.to_string()),
    }
}

/// So many names and so many sockets there may be.
pub(crate) const SOCKETS_MAX: usize = 16;
/// What a socket may hold of what has come and is not read, and the other way: some milliseconds of the fastest networks.
const BUFFER_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(names: &[&str]) -> Bound {
        bind_all(&names.iter().map(|name| name.to_string()).collect::<Vec<_>>())
    }

    fn at(bound: &Bound) -> Vec<SocketAddr> {
        bound.sockets.iter().map(|socket| socket.local_addr().unwrap()).collect()
    }

    #[test]
    fn every_address_and_both_families() {
        let both = bound(&["127.0.0.1:0", "127.0.0.1:0", "[::1]:0"]);
        assert_eq!(
            (both.sockets.len(), both.problems.len()),
            (3, 0),
            "each with a port of its own: {:?}",
            both.problems
        );
        let all = bound(&["[::]:0"]);
        let port = at(&all)[0].port();
        all.sockets[0].set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        for to in [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))] {
            bind((if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" }).parse().unwrap())
                .unwrap()
                .send_to(b"x", to)
                .unwrap();
            assert_eq!(all.sockets[0].recv_from(&mut [0; 9]).unwrap().1.ip().to_canonical(), to.ip());
        }
        let covered = bound(&[&format!("0.0.0.0:{port}")]);
        assert_eq!(covered.problems, [format!("0.0.0.0:{port}: address in use")]);
        drop(all);
        let one = bound(&[&format!("0.0.0.0:{port}"), &format!("[::]:{port}")]);
        assert_eq!((one.sockets.len(), one.problems.len()), (1, 0), "{:?}", one.problems);
    }

    #[test]
    fn problems_name_what_the_user_wrote() {
        let first = bound(&["127.0.0.1:0"]);
        let taken = at(&first)[0];
        let some = bound(&[&format!("{taken}"), "192.0.2.1:7700", "no such name.invalid:7700", "127.0.0.1:0"]);
        assert_eq!(some.sockets.len(), 1);
        assert_eq!(some.problems[0], "no such name.invalid:7700: the name is not known");
        assert_eq!(some.problems[1], format!("{taken}: address in use"));
        assert_eq!(some.problems[2], "192.0.2.1:7700: no interface of this machine has that address");
        let named = bound(&[&format!("localhost:{}", taken.port())]);
        let said = format!("localhost:{} ({taken}): address in use", taken.port());
        assert!(named.problems.contains(&said), "{:?}", named.problems);
    }

    #[test]
    fn there_is_a_most() {
        let many = bound(&["127.0.0.1:0"; 18]);
        assert_eq!((many.sockets.len(), many.problems.len()), (16, 2));
    }
}
