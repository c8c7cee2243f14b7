//! A client of NFS that is none of the kernel's: calls over one connection, so many on their way at a time.

use std::{
    io::{self, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use clap::ValueEnum;

/// The hidden subcommand that does it, in a process of its own: in a network of its own, that is.
pub(crate) const CALL: &str = "raw-nfs";

/// What is asked for, again and again.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Calls {
    pub(crate) server: SocketAddr,
    pub(crate) mount_port: u16,
    pub(crate) export: String,
    /// A path below the export.
    pub(crate) file: String,
    pub(crate) what: What,
    pub(crate) count: u64,
    /// Bytes of a read.
    pub(crate) size: u32,
    /// How many are on their way at a time.
    pub(crate) window: u64,
}

impl Calls {
    /// The command line of these.
    pub(crate) fn to_args(&self) -> [String; 8] {
        let Self { server, mount_port, export, file, what, count, size, window } = self;
        let what = what.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        let (server, mount_port) = (server.to_string(), mount_port.to_string());
        let [count, size, window] = [*count, u64::from(*size), *window].map(|number| number.to_string());
        [server, mount_port, export.clone(), file.clone(), what, count, size, window]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// READ, one part behind the other.
    Sequential,
    /// READ anywhere.
    Random,
    /// GETATTR.
    Attributes,
}

/// Does it, and prints how long it took in ns, and how many bytes came.
pub(crate) fn call(calls: &Calls) -> io::Result<()> {
    let (time, bytes) = run(calls)?;
    println!("{} {bytes}", time.as_nanos());
    Ok(())
}

/// Does it. Returns how long the calls took, without the look-ups before, and how many bytes came.
pub(crate) fn run(calls: &Calls) -> io::Result<(Duration, u64)> {
    let Calls { server, mount_port, what, count, size, window, .. } = *calls;
    let mut mountd = Client::connect(SocketAddr::new(server.ip(), mount_port))?;
    let mut file = mountd.one(MOUNT, MNT, opaque(calls.export.as_bytes()))?.opaque()?;
    let mut client = Client::connect(server)?;
    for name in calls.file.split('/') {
        file = client.one(NFS, LOOKUP, [opaque(&file), opaque(name.as_bytes())].concat())?.opaque()?;
    }
    let file = opaque(&file);
    let mut attributes = client.one(NFS, GETATTR, file.clone())?;
    attributes.skip(20)?;
    let blocks = attributes.u64()? / u64::from(size.max(1));
    let mut rng = fastrand::Rng::with_seed(1);
    let start = Instant::now();
    let (mut sent, mut bytes) = (0, 0);
    for answered in 0..count {
        while sent < count.min(answered + window) {
            let block = match what {
                What::Sequential => sent % blocks,
                What::Random => rng.u64(..blocks),
                What::Attributes => 0,
            };
            let (procedure, args) = match what {
                What::Attributes => (GETATTR, file.clone()),
                _ => {
                    let offset = (block * u64::from(size)).to_be_bytes();
                    (READ, [&file[..], &offset, &size.to_be_bytes()].concat())
                }
            };
            client.send(NFS, procedure, &args)?;
            sent += 1;
        }
        let mut reply = client.receive()?;
        if what != What::Attributes {
            reply.post_op_attributes()?;
            let read = reply.u32()?;
            if read != size {
                return Err(io::Error::other(format!("{read} bytes, and not {size}")));
            }
            bytes += u64::from(read);
        }
    }
    Ok((start.elapsed(), bytes))
}

struct Client {
    socket: BufReader<TcpStream>,
    xid: u32,
}

impl Client {
    fn connect(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self { socket: BufReader::with_capacity(1 << 20, socket), xid: 0 })
    }

    fn one(&mut self, program: u32, procedure: u32, args: Vec<u8>) -> io::Result<Reply> {
        self.send(program, procedure, &args)?;
        self.receive()
    }

    fn send(&mut self, program: u32, procedure: u32, args: &[u8]) -> io::Result<()> {
        self.xid += 1;
        // A call of RPC 2, program version 3, by root of a machine without a name, who has nothing to verify.
        let words = [self.xid, 0, 2, program, 3, procedure, 1, 20, 0, 0, 0, 0, 0, 0, 0];
        let call: Vec<u8> = words.into_iter().flat_map(u32::to_be_bytes).chain(args.iter().copied()).collect();
        let last = LAST_FRAGMENT | call.len() as u32;
        self.socket.get_mut().write_all(&[&last.to_be_bytes()[..], &call].concat())
    }

    /// What a reply says behind its status, which must be that all is well.
    fn receive(&mut self) -> io::Result<Reply> {
        let mut bytes = Vec::new();
        loop {
            let mut header = [0; 4];
            self.socket.read_exact(&mut header)?;
            let header = u32::from_be_bytes(header);
            let len = u64::from(header & !LAST_FRAGMENT);
            if (&mut self.socket).take(len).read_to_end(&mut bytes)? as u64 != len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if header & LAST_FRAGMENT != 0 {
                break;
            }
        }
        let mut reply = Reply { bytes, at: 0 };
        let _xid = reply.u32()?;
        let (is_reply, is_denied, _flavor) = (reply.u32()?, reply.u32()?, reply.u32()?);
        let _verifier = reply.opaque()?;
        let (accepted, status) = (reply.u32()?, reply.u32()?);
        match (is_reply, is_denied, accepted, status) {
            (1, 0, 0, 0) => Ok(reply),
            other => Err(io::Error::other(format!("the server answers {other:?}"))),
        }
    }
}

struct Reply {
    bytes: Vec<u8>,
    at: usize,
}

impl Reply {
    fn skip(&mut self, bytes: usize) -> io::Result<&[u8]> {
        let from = self.at;
        self.at += bytes;
        self.bytes.get(from..self.at).ok_or_else(|| io::Error::other("a reply that ends early"))
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.skip(4)?.try_into().expect("it has 4 bytes")))
    }

    fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_be_bytes(self.skip(8)?.try_into().expect("it has 8 bytes")))
    }

    fn opaque(&mut self) -> io::Result<Vec<u8>> {
        let len = self.u32()? as usize;
        let bytes = self.skip(len)?.to_vec();
        self.skip(len.next_multiple_of(4) - len)?;
        Ok(bytes)
    }

    fn post_op_attributes(&mut self) -> io::Result<()> {
        if self.u32()? == 1 {
            self.skip(84)?;
        }
        Ok(())
    }
}

fn opaque(bytes: &[u8]) -> Vec<u8> {
    let mut encoded = [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat();
    encoded.resize(encoded.len().next_multiple_of(4), 0);
    encoded
}

const LAST_FRAGMENT: u32 = 1 << 31;
const MOUNT: u32 = 100_005;
const MNT: u32 = 1;
const NFS: u32 = 100_003;
const GETATTR: u32 = 1;
const LOOKUP: u32 = 3;
const READ: u32 = 6;
