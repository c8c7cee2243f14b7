use std::{
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tests::Network;

/// A home with its daemon.
pub(crate) struct Machine {
    /// There until it is stopped.
    home: Option<tempfile::TempDir>,
    daemon: Child,
    /// What it said when it was ready.
    ready: Value,
}

impl Machine {
    /// Starts a daemon with a new home below `work`, which holds `arena` if one is given.
    pub(crate) fn start(work: &Path, arena: Option<&Path>) -> io::Result<Self> {
        Self::start_with(work, arena, "")
    }

    /// The same with a configuration.
    pub(crate) fn start_with(work: &Path, arena: Option<&Path>, config: &str) -> io::Result<Self> {
        Self::start_in(new_home(work, config)?, arena, LISTEN)
    }

    /// The same without an arena; and nobody can dial it.
    pub(crate) fn start_deaf(work: &Path, config: &str) -> io::Result<Self> {
        Self::start_in(new_home(work, config)?, None, "none")
    }

    /// Starts the daemon of a new or a used home in another network, where it listens on `listen`.
    pub(crate) fn start_in_network(
        network: &Network,
        home: tempfile::TempDir,
        arena: Option<&Path>,
        listen: &str,
    ) -> io::Result<Self> {
        Self::start_by(network.command(program("blob")), home, arena, listen)
    }

    /// Starts the daemon of a home that was stopped.
    pub(crate) fn again(home: tempfile::TempDir) -> io::Result<Self> {
        Self::start_in(home, None, LISTEN)
    }

    fn start_in(home: tempfile::TempDir, arena: Option<&Path>, listen: &str) -> io::Result<Self> {
        Self::start_by(Command::new(program("blob")), home, arena, listen)
    }

    fn start_by(mut command: Command, home: tempfile::TempDir, arena: Option<&Path>, listen: &str) -> io::Result<Self> {
        command.args(["--json", "--home"]).arg(home.path()).arg("up").args(arena);
        command.args(["--listen", listen]).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut daemon = command.spawn()?;
        let lines = BufReader::new(daemon.stdout.take().ok_or_else(|| io::Error::other("no output"))?).lines();
        for line in lines {
            let line: Value = serde_json::from_str(&line?)?;
            if line["type"] == "ready" {
                return Ok(Self { home: Some(home), daemon, ready: line });
            }
        }
        Err(io::Error::other("the daemon ended before it was ready"))
    }

    /// Runs `blob` with `args`; its exit code must be 0. Returns what it prints.
    pub(crate) fn run(&self, args: &[&str]) -> io::Result<String> {
        succeed(Command::new(program("blob")).arg("--home").arg(self.path()).args(args))
    }

    /// The same for a command that ends with a summary, which it returns.
    pub(crate) fn summary(&self, args: &[&str]) -> io::Result<Value> {
        let lines = self.run(&[&["--json"], args].concat())?;
        let summary = lines.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut summary = summary.filter(|line| line["type"] == "summary");
        summary.next().ok_or_else(|| io::Error::other(format!("{args:?} ended without a summary")))
    }

    /// Where it keeps its state.
    pub(crate) fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    fn path(&self) -> &Path {
        self.home.as_ref().map_or(Path::new(""), tempfile::TempDir::path)
    }

    /// Stops it. Its home stays.
    pub(crate) fn stop(mut self) -> tempfile::TempDir {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        self.home.take().expect("it is only taken here")
    }

    fn ticket(&self) -> &str {
        self.ready["ticket"].as_str().unwrap_or_default()
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        let address = self.ready["listens_on"].as_str().unwrap_or_default();
        address.parse().map_err(|error| io::Error::other(format!("it listens on {address:?}: {error}")))
    }

    /// Where it is mounted from.
    pub(crate) fn nfs_address(&self) -> io::Result<SocketAddr> {
        let address = self.ready["nfs"].as_str().unwrap_or_default();
        address.parse().map_err(|error| io::Error::other(format!("it is mounted from {address:?}: {error}")))
    }

    /// Knows `other`, by `name`, at `address` only; and `other` knows this machine, and has no address to dial.
    pub(crate) fn pair_at(&self, name: &str, other: &Machine, address: SocketAddr) -> io::Result<()> {
        let id = |machine: &Machine| machine.run(&["id"]).map(|id| id.trim().to_owned());
        other.run(&["peer", "add", "bench", &id(self)?])?;
        self.run(&["peer", "add", name, &id(other)?, "--address", &address.to_string()])?;
        self.wait_for("a connection", |status| status["peers"][0]["connected"].is_string())?;
        self.is_connected_at(address)
    }

    /// Fails if it is not connected with its only peer at `address`.
    pub(crate) fn is_connected_at(&self, address: SocketAddr) -> io::Result<()> {
        let connected = self.status()?["peers"][0]["connected"].clone();
        if connected == address.to_string() {
            Ok(())
        } else {
            Err(io::Error::other(format!("connected at {connected}, and not at {address}")))
        }
    }

    /// How long processors have worked for the daemon so far.
    pub(crate) fn cpu(&self) -> io::Result<Duration> {
        cpu_of(self.daemon.id())
    }

    /// Pairs with `other`.
    pub(crate) fn pair(&self, other: &Machine) -> io::Result<()> {
        self.run(&["join", other.ticket()]).map(drop)
    }

    /// Waits until all that `other` has said so far is known here.
    pub(crate) fn wait_for_all_of(&self, other: &Machine) -> io::Result<()> {
        let said = other.status()?["seq"].as_u64();
        self.wait_for("the other's catalog", |status| status["peers"][0]["heard_seq"].as_u64() >= said)
    }

    pub(crate) fn wait_for(&self, what: &str, is_there: impl Fn(&Value) -> bool) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(600);
        while Instant::now() < deadline {
            if is_there(&self.status()?) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Err(io::Error::other(format!("{what} did not come")))
    }

    fn status(&self) -> io::Result<Value> {
        Ok(serde_json::from_str(&self.run(&["status", "--json"])?)?)
    }

    /// The most memory that the daemon has had so far.
    pub(crate) fn peak_bytes(&self) -> u64 {
        peak_bytes(self.daemon.id())
    }

    pub(crate) fn join(&self, other: &Machine) -> io::Result<()> {
        self.run(&["join", other.ticket()])?;
        self.wait_for_peer_with("tree")
    }

    /// Waits until some peer's arena is known here.
    pub(crate) fn wait_for_peer_with(&self, arena: &str) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if self.run(&["ls"])?.lines().any(|line| line == arena) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Err(io::Error::other(format!("no peer tells of an arena {arena}")))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

pub(crate) fn new_home(work: &Path, config: &str) -> io::Result<tempfile::TempDir> {
    let home = tempfile::Builder::new().prefix("home-").tempdir_in(work)?;
    std::fs::write(home.path().join("config.toml"), config)?;
    Ok(home)
}

/// Runs `blob hash` in `dir`, on so many threads if that is said.
pub(crate) fn hash(dir: &Path, paths: &[PathBuf], threads: Option<usize>) -> io::Result<String> {
    succeed(hash_command(dir, paths).envs(threads.map(|threads| ("RAYON_NUM_THREADS", threads.to_string()))))
}

/// The most memory that `blob hash` takes, as far as looking often can tell.
pub(crate) fn hash_peak_bytes(dir: &Path, path: &Path) -> io::Result<u64> {
    let mut child = hash_command(dir, &[path.to_owned()]).stdout(Stdio::null()).spawn()?;
    let mut peak = 0;
    while child.try_wait()?.is_none() {
        peak = peak.max(peak_bytes(child.id()));
        thread::sleep(Duration::from_millis(5));
    }
    Ok(peak)
}

fn hash_command(dir: &Path, paths: &[PathBuf]) -> Command {
    let mut command = Command::new(program("blob"));
    command.current_dir(dir).arg("hash").args(paths);
    command
}

/// How long processors have worked for a process so far.
pub(crate) fn cpu_of(process: u32) -> io::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // Behind the name, which may have spaces in it: the 14th and the 15th field of all.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_S))
}

fn peak_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Runs a command that must succeed; returns what it prints, without what it says beside.
pub(crate) fn succeed(command: &mut Command) -> io::Result<String> {
    let output = command.output()?;
    if !output.status.success() {
        let [errors, lines] = [&output.stderr, &output.stdout].map(|text| String::from_utf8_lossy(text));
        return Err(io::Error::other(format!("{command:?}: {}: {}\n{lines}", output.status, errors.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// One of our programs, built beside this one.
fn program(name: &str) -> PathBuf {
    std::env::current_exe().map(|exe| exe.with_file_name(name)).unwrap_or_else(|_| name.into())
}

pub(crate) const LISTEN: &str = "127.0.0.1:0";
/// What Linux counts processor time in for programs, on every architecture that matters here.
const TICKS_PER_S: u64 = 100;
