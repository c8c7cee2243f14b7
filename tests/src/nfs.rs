use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::{Item, Machine, Mtime, Tree};

/// A client of a machine's mount that speaks NFS version 3 by itself, so that it can do what no client does.
pub struct Nfs {
    stream: TcpStream,
    xid: u32,
}

/// What NFS says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// 1 for a file, 2 for a directory, 5 for a link.
    pub kind: u32,
    /// Permission bits.
    pub mode: u32,
    /// How many links it has.
    pub links: u32,
    /// Bytes.
    pub size: u64,
    /// The file id.
    pub id: u64,
    /// When it was changed.
    pub mtime: Mtime,
}

/// A line of a listing.
#[derive(Debug, Clone)]
pub struct Listed {
    /// The file id.
    pub id: u64,
    /// The name.
    pub name: Vec<u8>,
    /// Where to go on.
    pub cookie: u64,
    /// What it looks like, if that is said.
    pub attributes: Option<Attributes>,
    /// Its handle, if that is given.
    pub handle: Option<Vec<u8>>,
}

/// NFS's errors that tests meet.
#[allow(missing_docs, reason = "the names are those of RFC 1813")]
pub mod status {
    pub const NOENT: u32 = 2;
    pub const IO: u32 = 5;
    pub const NOTDIR: u32 = 20;
    pub const ISDIR: u32 = 21;
    pub const INVAL: u32 = 22;
    pub const ROFS: u32 = 30;
    pub const NAMETOOLONG: u32 = 63;
    pub const STALE: u32 = 70;
    pub const BADHANDLE: u32 = 10_001;
}

/// Arguments in XDR.
#[derive(Debug, Clone, Default)]
pub struct Xdr(pub Vec<u8>);

/// Results in XDR; the test fails where they end early.
#[derive(Debug)]
pub struct Results(Vec<u8>, usize);

impl Xdr {
    /// Appends a number.
    pub fn u32(mut self, number: u32) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    /// Appends a number of eight bytes.
    pub fn u64(mut self, number: u64) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    /// Appends bytes, with how many they are before and zeros behind.
    pub fn opaque(self, bytes: &[u8]) -> Self {
        let mut this = self.u32(bytes.len() as u32);
        this.0.extend(bytes);
        this.0.resize(this.0.len().next_multiple_of(4), 0);
        this
    }
}

impl Results {
    /// The next number.
    pub fn u32(&mut self) -> u32 {
        self.1 += 4;
        u32::from_be_bytes(self.0[self.1 - 4..self.1].try_into().unwrap())
    }

    /// The next number of eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) << 32 | u64::from(self.u32())
    }

    /// The next bytes of variable length.
    pub fn opaque(&mut self) -> Vec<u8> {
        let len = self.u32() as usize;
        let bytes = self.0[self.1..self.1 + len].to_vec();
        self.1 += len.next_multiple_of(4);
        bytes
    }

    fn attributes(&mut self) -> Attributes {
        let (kind, mode, links, _uid, _gid, size) =
            (self.u32(), self.u32(), self.u32(), self.u32(), self.u32(), self.u64());
        let (_used, _device, _fsid, id, _atime) = (self.u64(), self.u64(), self.u64(), self.u64(), self.u64());
        let mtime = Mtime(self.u32().into(), self.u32().into());
        let _ctime = self.u64();
        Attributes { kind, mode, links, size, id, mtime }
    }

    fn maybe_attributes(&mut self) -> Option<Attributes> {
        (self.u32() == 1).then(|| self.attributes())
    }

    /// What the status says.
    fn status(mut self) -> Result<Self, u32> {
        match self.u32() {
            0 => Ok(self),
            status => Err(status),
        }
    }
}

impl Nfs {
    /// The program's number.
    pub const PROGRAM: u32 = 100_003;
    /// That of the MOUNT program.
    pub const MOUNT: u32 = 100_005;

    /// Where a machine's mount listens.
    pub fn address(machine: &Machine) -> SocketAddr {
        machine.status()["nfs"].as_str().expect("it offers a mount").parse().unwrap()
    }

    /// Connects to a machine's mount.
    pub fn connect(machine: &Machine) -> Self {
        let stream = TcpStream::connect(Self::address(machine)).expect("connect to the mount");
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { stream, xid: 1 }
    }

    /// The connection, to do with as one likes.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// A call as it stands on the wire.
    pub fn record(xid: u32, [program, version, procedure]: [u32; 3], args: &Xdr) -> Vec<u8> {
        let head = Xdr::default().u32(xid).u32(0).u32(2).u32(program).u32(version).u32(procedure);
        let auth = Xdr::default().u32(1).u32(0).u64(0).u64(0);
        let head = head.u32(1).opaque(&auth.0[4..]).u64(0);
        let len = (head.0.len() + args.0.len()) as u32;
        [&(len | 1 << 31).to_be_bytes()[..], &head.0, &args.0].concat()
    }

    /// Sends a call of the NFS program. Returns its number.
    pub fn send(&mut self, procedure: u32, args: &Xdr) -> u32 {
        self.xid += 1;
        let record = Self::record(self.xid, [Self::PROGRAM, 3, procedure], args);
        self.stream.write_all(&record).expect("send a call");
        self.xid
    }

    /// The next answer to any call: the call's number, and what follows the reply's kind.
    pub fn receive(&mut self) -> io::Result<(u32, Results)> {
        let mut header = [0; 4];
        self.stream.read_exact(&mut header)?;
        let mut record = vec![0; (u32::from_be_bytes(header) & !(1 << 31)) as usize];
        self.stream.read_exact(&mut record)?;
        let mut results = Results(record, 0);
        let xid = results.u32();
        assert_eq!(results.u32(), 1, "an answer");
        Ok((xid, results))
    }

    /// Calls, and waits for the results. `Err` has how the call was refused: the kinds of refusal one after the other.
    pub fn call(&mut self, program: [u32; 3], args: &Xdr) -> Result<Results, Vec<u32>> {
        self.xid += 1;
        self.stream.write_all(&Self::record(self.xid, program, args)).expect("send a call");
        let (xid, mut results) = self.receive().expect("an answer");
        assert_eq!(xid, self.xid);
        match results.u32() {
            0 => {
                let _verifier = (results.u32(), results.opaque());
                match results.u32() {
                    0 => Ok(results),
                    refused => Err(vec![0, refused]),
                }
            }
            denied => Err(vec![denied, results.u32()]),
        }
    }

    fn nfs(&mut self, procedure: u32, args: &Xdr) -> Result<Results, u32> {
        self.call([Self::PROGRAM, 3, procedure], args).expect("the call is accepted").status()
    }

    /// MNT: the handle of a directory by its path.
    pub fn mount(&mut self, path: &[u8]) -> Result<Vec<u8>, u32> {
        let results = self.call([Self::MOUNT, 3, 1], &Xdr::default().opaque(path)).expect("the call is accepted");
        results.status().map(|mut results| results.opaque())
    }

    /// GETATTR.
    pub fn attributes(&mut self, handle: &[u8]) -> Result<Attributes, u32> {
        self.nfs(1, &Xdr::default().opaque(handle)).map(|mut results| results.attributes())
    }

    /// LOOKUP.
    pub fn lookup(&mut self, dir: &[u8], name: &[u8]) -> Result<(Vec<u8>, Attributes), u32> {
        let mut results = self.nfs(3, &Xdr::default().opaque(dir).opaque(name))?;
        let handle = results.opaque();
        Ok((handle, results.maybe_attributes().expect("attributes of what was looked up")))
    }

    /// The handle of `arena/path`, looked up name by name.
    pub fn find(&mut self, path: &str) -> Result<Vec<u8>, u32> {
        let root = self.mount(b"/")?;
        path.split('/').try_fold(root, |dir, name| Ok(self.lookup(&dir, name.as_bytes())?.0))
    }

    /// READLINK.
    pub fn target(&mut self, handle: &[u8]) -> Result<Vec<u8>, u32> {
        let mut results = self.nfs(5, &Xdr::default().opaque(handle))?;
        let _attributes = results.maybe_attributes();
        Ok(results.opaque())
    }

    /// The arguments of a READ.
    pub fn read_args(handle: &[u8], offset: u64, count: u32) -> Xdr {
        Xdr::default().opaque(handle).u64(offset).u32(count)
    }

    /// READ: the bytes, and whether they are the last.
    pub fn read(&mut self, handle: &[u8], offset: u64, count: u32) -> Result<(Vec<u8>, bool), u32> {
        let mut results = self.nfs(6, &Self::read_args(handle, offset, count))?;
        let _attributes = results.maybe_attributes();
        let (count, is_end) = (results.u32(), results.u32() == 1);
        let bytes = results.opaque();
        assert_eq!(bytes.len(), count as usize);
        Ok((bytes, is_end))
    }

    /// The whole file from `offset` on, by reads of `step` bytes.
    pub fn read_from(&mut self, handle: &[u8], mut offset: u64, step: u32) -> Result<Vec<u8>, u32> {
        let mut all = Vec::new();
        loop {
            let (bytes, is_end) = self.read(handle, offset, step)?;
            offset += bytes.len() as u64;
            all.extend(bytes);
            if is_end {
                return Ok(all);
            }
        }
    }

    /// One READDIRPLUS behind `cookie`: the entries, and whether they are the last.
    pub fn page(&mut self, dir: &[u8], cookie: u64, bytes: u32) -> Result<(Vec<Listed>, bool), u32> {
        let mut results = self.nfs(17, &Xdr::default().opaque(dir).u64(cookie).u64(0).u32(bytes).u32(bytes))?;
        let _attributes = results.maybe_attributes();
        let _verifier = results.u64();
        let mut page = Vec::new();
        while results.u32() == 1 {
            let (id, name, cookie) = (results.u64(), results.opaque(), results.u64());
            let attributes = results.maybe_attributes();
            let handle = (results.u32() == 1).then(|| results.opaque());
            page.push(Listed { id, name, cookie, attributes, handle });
        }
        Ok((page, results.u32() == 1))
    }

    /// A whole directory, without `.` and `..`, by pages of so many bytes.
    pub fn list(&mut self, dir: &[u8], bytes: u32) -> Result<Vec<Listed>, u32> {
        let (mut all, mut cookie) = (Vec::new(), 0);
        loop {
            let (page, is_end) = self.page(dir, cookie, bytes)?;
            cookie = page.last().map_or(cookie, |last| last.cookie);
            all.extend(page.into_iter().filter(|entry| entry.name != b"." && entry.name != b".."));
            if is_end {
                return Ok(all);
            }
        }
    }

    /// Everything below a directory, read to the last byte.
    pub fn snapshot(&mut self, dir: &[u8]) -> Tree {
        let (mut tree, mut dirs) = (BTreeMap::new(), vec![(Vec::new(), dir.to_vec())]);
        while let Some((path, dir)) = dirs.pop() {
            let own = self.attributes(&dir).expect("attributes of a directory");
            let listed = self.list(&dir, 32 << 10).expect("list a directory");
            let mut below = 0;
            for Listed { id, name, attributes, handle, .. } in listed {
                let handle = handle.expect("a handle");
                let looked_up = self.lookup(&dir, &name).expect("what is listed is there");
                assert_eq!(looked_up.0, handle, "{:?}", name.escape_ascii());
                let attributes = attributes.unwrap_or(looked_up.1.clone());
                assert_eq!((attributes.id, &attributes), (id, &looked_up.1));
                let path = if path.is_empty() { name } else { [&path[..], b"/", &name].concat() };
                let item = match attributes.kind {
                    1 => {
                        let bytes = self.read_from(&handle, 0, 1 << 20).expect("read a file");
                        assert_eq!(bytes.len() as u64, attributes.size);
                        let (blob, size) = (blake3::hash(&bytes), attributes.size);
                        Item::File { size, blob, mode: attributes.mode, mtime: attributes.mtime }
                    }
                    2 => {
                        below += 1;
                        dirs.push((path.clone(), handle));
                        Item::Directory
                    }
                    5 => Item::Symlink { target: self.target(&handle).expect("a target"), mtime: attributes.mtime },
                    _ => Item::Special,
                };
                assert!(tree.insert(path, item).is_none(), "it is listed twice");
            }
            assert_eq!(own.links, 2 + below, "links of {}", path.escape_ascii());
        }
        tree
    }
}
