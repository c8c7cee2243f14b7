//! Who serves: nfs-ganesha with its VFS, nfsserve, and blobd; all in one network, at ports of their own.

use std::{
    fs::File,
    io,
    net::SocketAddr,
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use tests::{Ganesha, Network, SERVER, Scratch};

use super::{
    mirror,
    raw::{self, Calls, What},
};
use crate::machine::{LISTEN, Machine, cpu_of, new_home, succeed};

/// A server that runs.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    process: Process,
    port: u16,
    mount_port: u16,
    pub(crate) export: String,
}

enum Process {
    Ganesha(Ganesha),
    Mirror(Mirror),
    Ours(Machine),
}

struct Mirror(Child);

impl Server {
    /// Those that are installed, each serving `tree`.
    pub(crate) fn start_all(network: &Network, scratch: &Scratch, work: &Path, tree: &Path) -> io::Result<Vec<Self>> {
        let mut servers = Vec::new();
        servers.extend(Self::ganesha(network, scratch, tree)?);
        servers.push(Self::nfsserve(network, work, tree)?);
        match Self::blobd(network, work, tree) {
            Ok(ours) => servers.push(ours),
            Err(error) => println!("blobd does not serve: {error}"),
        }
        Ok(servers)
    }

    fn ganesha(network: &Network, scratch: &Scratch, tree: &Path) -> io::Result<Option<Self>> {
        let Some(server) = Ganesha::start(network, scratch, tree) else {
            println!("nfs-ganesha: not installed");
            return Ok(None);
        };
        let (port, mount_port, export) = (Ganesha::PORT, Ganesha::MOUNT_PORT, tree.to_string_lossy().into_owned());
        let process = Process::Ganesha(server);
        Self { name: "nfs-ganesha, VFS", process, port, mount_port, export }.wait(network).map(Some)
    }

    fn nfsserve(network: &Network, work: &Path, tree: &Path) -> io::Result<Self> {
        let mut command = network.command(std::env::current_exe()?);
        command.arg(mirror::SERVE).arg(tree).arg(format!("{SERVER}:2051"));
        let log = File::create(work.join("nfsserve.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = Process::Mirror(Mirror(command.spawn()?));
        Self { name: "nfsserve", process, port: 2051, mount_port: 2051, export: "/".to_owned() }.wait(network)
    }

    fn blobd(network: &Network, work: &Path, tree: &Path) -> io::Result<Self> {
        let config = format!("[nfs]\nlisten = \"{SERVER}:2052\"\nallow = [\"0.0.0.0/0\"]\n");
        let process = Process::Ours(Machine::start_in_network(network, new_home(work, &config)?, Some(tree), LISTEN)?);
        Self { name: "blobd", process, port: 2052, mount_port: 2052, export: "/tree".to_owned() }.wait(network)
    }

    /// Waits until it tells what a mount has in it.
    fn wait(self, network: &Network) -> io::Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match self.calls(network, LARGE, What::Attributes, 1, 0, 1) {
                Ok(_) => return Ok(self),
                Err(error) if Instant::now() > deadline => {
                    return Err(io::Error::other(format!("{} does not answer: {error}", self.name)));
                }
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Options for a mount of it.
    pub(crate) fn options(&self) -> String {
        format!("ro,port={},mountport={}", self.port, self.mount_port)
    }

    /// How long processors have worked for it so far.
    pub(crate) fn cpu(&self) -> io::Result<Duration> {
        match &self.process {
            Process::Ganesha(server) => cpu_of(server.pid()),
            Process::Mirror(server) => cpu_of(server.0.id()),
            Process::Ours(machine) => machine.cpu(),
        }
    }

    /// Has a client of our own call it. Returns how long that took, and how many bytes came.
    pub(crate) fn calls(
        &self,
        network: &Network,
        file: &str,
        what: What,
        count: u64,
        size: u32,
        window: u64,
    ) -> io::Result<(Duration, u64)> {
        let server = SocketAddr::new(SERVER.parse().expect("it is an address"), self.port);
        let (mount_port, export, file) = (self.mount_port, self.export.clone(), file.to_owned());
        let calls = Calls { server, mount_port, export, file, what, count, size, window };
        let mut command = network.command(std::env::current_exe()?);
        command.arg(raw::CALL).args(calls.to_args());
        let said = succeed(&mut command)?;
        let numbers: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match numbers[..] {
            [nanos, bytes] => Ok((Duration::from_nanos(nanos), bytes)),
            _ => Err(io::Error::other(format!("it says {said:?}"))),
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The large file in the tree.
pub(crate) const LARGE: &str = "large/large";
