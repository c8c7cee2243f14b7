use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::AsFd,
    time::Duration,
};

use fastrand::Rng;
use rustix::net::sockopt::set_socket_linger;
use tests::{Machine, Nfs, Scratch, Xdr, random_bytes, wait_for};

/// A machine with a file of 4 MiB.
fn machine(scratch: &Scratch) -> Machine {
    let docs = scratch.dir("docs");
    fs::write(docs.join("file"), random_bytes(4 << 20, &mut Rng::with_seed(1))).unwrap();
    let machine = Machine::up(scratch, "a", &[&docs]);
    machine.rests();
    machine
}

/// Whether the daemon hangs up.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// What is no call ends the connection that it came on, and nothing else; what is a bad call is answered so.
#[test]
fn what_is_malformed_is_refused() {
    let scratch = Scratch::new();
    let machine = machine(&scratch);
    let before = machine.resident_bytes();
    let mut nfs = Nfs::connect(&machine);
    let file = nfs.find("docs/file").unwrap();
    let connect = || TcpStream::connect(Nfs::address(&machine)).unwrap();
    // Records of 2 GiB, of fragments without end, of credentials of 4 GiB, no record at all.
    let hostile: [&[u8]; 6] = [
        &[0xff; 8],
        &[0x7f, 0xff, 0xff, 0xff, 0],
        &[0; 4 * 100],
        b"GET / HTTP/1.1\r\n\r\n",
        &[
            [0x80, 0, 0, 40],
            [0, 0, 0, 1],
            [0; 4],
            [0, 0, 0, 2],
            [0, 1, 0x86, 0xa3],
            [0, 0, 0, 3],
            [0; 4],
            [0, 0, 0, 1],
            [0xff; 4],
            [0; 4],
            [0; 4],
        ]
        .concat(),
        &[[0x80, 0, 0, 4], [0, 0, 0, 1]].concat(),
    ];
    for bytes in hostile {
        for _ in 0..20 {
            let mut stream = connect();
            let _ = stream.write_all(bytes);
            assert!(is_closed(&mut stream), "{bytes:?}");
        }
    }
    // Cut off anywhere.
    let whole = Nfs::record(7, [Nfs::PROGRAM, 3, 6], &Nfs::read_args(&file, 0, 1 << 20));
    for len in 0..whole.len() {
        let mut stream = connect();
        stream.write_all(&whole[..len]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert!(is_closed(&mut stream));
    }
    // Arguments that say that they are longer than they are.
    let args = [
        Xdr::default(),
        Xdr::default().u32(u32::MAX),
        Xdr::default().u32(65).u64(0),
        Xdr::default().opaque(&file).u32(u32::MAX - 3),
        Xdr::default().opaque(&file).u64(0).u64(0).u64(0).u64(0),
    ];
    for args in args {
        for procedure in [1, 3, 4, 5, 6, 16, 17, 18, 19, 20] {
            if procedure == 4 && args.0.len() == file.len().next_multiple_of(4) + 8 {
                continue;
            }
            let answer = nfs.call([Nfs::PROGRAM, 3, procedure], &args);
            assert!(
                answer.as_ref().is_err_and(|refused| *refused == [0, 4])
                    || answer.is_ok_and(|mut results| results.u32() != 0)
            );
        }
        assert!(nfs.call([Nfs::MOUNT, 3, 1], &args).is_err_and(|refused| refused == [0, 4]));
    }
    assert_eq!(nfs.call([Nfs::PROGRAM, 4, 0], &Xdr::default()).unwrap_err(), [0, 2]);
    assert_eq!(nfs.call([100_227, 3, 0], &Xdr::default()).unwrap_err(), [0, 1]);
    assert_eq!(nfs.call([Nfs::PROGRAM, 3, 99], &Xdr::default()).unwrap_err(), [0, 3]);
    assert!(nfs.attributes(&file).is_ok());
    let grown = machine.resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more");
    assert!(!machine.log().contains("panicked"), "{}", machine.log());
}

/// Connections that are reset at once, and more of them than there may be.
#[test]
fn bursts_of_connections_are_borne() {
    let scratch = Scratch::new();
    let machine = machine(&scratch);
    let address = Nfs::address(&machine);
    for _ in 0..2000 {
        let stream = TcpStream::connect(address).unwrap();
        set_socket_linger(stream.as_fd(), Some(Duration::ZERO)).unwrap();
    }
    let answers = |machine: &Machine| {
        let mut stream = TcpStream::connect(Nfs::address(machine)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        stream.write_all(&Nfs::record(1, [Nfs::PROGRAM, 3, 0], &Xdr::default())).ok()?;
        stream.read_exact(&mut [0; 28]).ok()
    };
    wait_for("it to answer after the burst", Duration::from_secs(20), || answers(&machine));
    // Idle ones, as many as there may be of one address: the next is closed, and those that are there are served.
    let mut first = Nfs::connect(&machine);
    let root = first.mount(b"/").unwrap();
    let mut idle: Vec<TcpStream> = Vec::new();
    let mut refused = wait_for("a connection to be refused", Duration::from_secs(20), || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        match stream.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                idle.push(stream);
                None
            }
            _ => Some(stream),
        }
    });
    assert!(is_closed(&mut refused));
    assert_eq!(idle.len(), 47);
    assert!(first.attributes(&root).is_ok());
    drop(idle);
    wait_for("it to answer again", Duration::from_secs(20), || answers(&machine));
    assert!(machine.is_running());
}

/// A client that takes nothing costs a bounded amount; one that asks for much at once gets all of it.
#[test]
fn unread_answers_and_many_requests_are_bounded() {
    let scratch = Scratch::new();
    let machine = machine(&scratch);
    let mut nfs = Nfs::connect(&machine);
    let file = nfs.find("docs/file").unwrap();
    let before = machine.resident_bytes();
    for at in 0..1500 {
        nfs.send(6, &Nfs::read_args(&file, (at % 4) << 20, 1 << 20));
    }
    // Another client is not behind them.
    let mut other = Nfs::connect(&machine);
    assert_eq!(other.read(&file, 0, 1 << 20).unwrap().0.len(), 1 << 20);
    let grown = machine.resident_bytes().saturating_sub(before);
    assert!(grown < 128 << 20, "{grown} bytes more");
    let mut answered: Vec<u32> = (0..1500).map(|_| nfs.receive().unwrap().0).collect();
    answered.sort();
    answered.dedup();
    assert_eq!(answered.len(), 1500);
    // 5,000 in flight.
    let mut stream = nfs.stream().try_clone().unwrap();
    let root = nfs.mount(b"/").unwrap();
    let sending = std::thread::spawn(move || {
        for xid in 0..5000 {
            stream
                .write_all(&Nfs::record(1_000_000 + xid, [Nfs::PROGRAM, 3, 1], &Xdr::default().opaque(&root)))
                .unwrap();
        }
    });
    let mut answered: Vec<u32> = (0..5000).map(|_| nfs.receive().unwrap().0).collect();
    sending.join().unwrap();
    answered.sort();
    assert!(answered.iter().copied().eq(1_000_000..1_005_000));
}

/// What was asked on a connection that was lost is asked again on another one, with the same number.
#[test]
fn retransmissions_are_answered_again() {
    let scratch = Scratch::new();
    let machine = machine(&scratch);
    let mut nfs = Nfs::connect(&machine);
    let file = nfs.find("docs/file").unwrap();
    let expected = nfs.read(&file, 0, 1 << 20).unwrap();
    for round in 0..20 {
        let mut lost = Nfs::connect(&machine);
        let asked: Vec<u32> = (0..20).map(|_| lost.send(6, &Nfs::read_args(&file, 0, 1 << 20))).collect();
        if round % 2 == 0 {
            lost.receive().unwrap();
        }
        set_socket_linger(lost.stream().as_fd(), Some(Duration::ZERO)).unwrap();
        drop(lost);
        let mut again = Nfs::connect(&machine);
        let resent: Vec<u32> = (0..20).map(|_| again.send(6, &Nfs::read_args(&file, 0, 1 << 20))).collect();
        assert_eq!(resent, asked);
        let mut answered: Vec<u32> = resent.iter().map(|_| again.receive().unwrap().0).collect();
        answered.sort();
        assert_eq!(answered, asked);
        assert_eq!(again.read(&file, 0, 1 << 20).as_ref(), Ok(&expected));
    }
}

/// Only those are let in whom the configuration names; and IPv6 is as good as IPv4.
#[test]
fn only_those_who_are_named_are_let_in() {
    let scratch = Scratch::new();
    let connect = |machine: &Machine| TcpStream::connect(Nfs::address(machine)).unwrap();
    let config = "[nfs]\nlisten = \"127.0.0.1:0\"\nallow = [\"192.0.2.0/24\", \"127.0.0.2\"]\n";
    let refusing = Machine::up_with_config::<&str>(&scratch, "refusing", &[], config);
    assert!(is_closed(&mut connect(&refusing)));
    assert!(refusing.log().contains("nfs.allow"), "{}", refusing.log());
    let six = Machine::up_with_config::<&str>(&scratch, "six", &[], "[nfs]\nlisten = \"[::1]:0\"\n");
    assert!(matches!(Nfs::address(&six), SocketAddr::V6(_)));
    let mut nfs = Nfs::connect(&six);
    assert!(nfs.mount(b"/").is_ok());
    let command = six.ok(["mount", "--dry-run", "/mnt"]).text();
    assert!(command.contains("proto=tcp6") && command.contains("[::1]:/ /mnt"), "{command}");
    let none = Machine::up_with_config::<&str>(&scratch, "none", &[], "[nfs]\nlisten = \"none\"\n");
    assert!(none.status()["nfs"].is_null());
    assert!(none.exits(2, ["mount", "/mnt"]).stderr.contains("nfs.listen"));
}
