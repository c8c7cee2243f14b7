use std::{
    cell::RefCell,
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    process::{Pid, Signal, geteuid, kill_process},
    thread::{CapabilitySet, remove_capability_from_bounding_set},
};
use serde_json::Value;

use crate::{Disk, Network, wait_for};

/// A temporary directory for all that a test makes.
pub struct Scratch {
    dir: tempfile::TempDir,
    // Dropped behind the directory, which may be on it.
    disk: Option<Disk>,
}

/// A machine of the household: a home of its own, and a daemon that runs until this is dropped.
pub struct Machine {
    name: String,
    home: PathBuf,
    log: PathBuf,
    daemon: RefCell<Option<Child>>,
    ready: Value,
    /// Whether the daemon obeys the modes of files, also as root.
    obeys_modes: bool,
    /// Where the daemon is told to listen; not at all if its configuration says that.
    listen: Option<String>,
    /// A process in whose network the daemon runs.
    network: Option<u32>,
}

/// How a command ended, and what it said.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; 128 and the signal's number if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

/// The program `blob`.
pub fn blob() -> PathBuf {
    program("blob")
}

/// The program `blobd`.
pub fn blobd() -> PathBuf {
    program("blobd")
}

fn program(name: &str) -> PathBuf {
    let this = env::current_exe().expect("this test is a file");
    let profile = this.parent().and_then(Path::parent).expect("tests are in target/PROFILE/deps");
    let program = profile.join(name);
    assert!(program.is_file(), "{program:?} is missing; make it with: cargo build -p cli --bins");
    program
}

impl Scratch {
    /// An empty directory, deleted on drop.
    pub fn new() -> Self {
        Self { dir: Self::builder().tempdir().expect("make a temporary directory"), disk: None }
    }

    /// An empty directory on a [`Disk`] of its own, whose files can [`rot`](Self::rot). `None`, with the test noted as
    /// skipped, where there can be none.
    pub fn that_rots() -> Option<Self> {
        let disk = Disk::new()?;
        let dir = Self::builder().tempdir_in(disk.mount_point()).expect("make a directory on the disk");
        Some(Self { dir, disk: Some(disk) })
    }

    fn builder() -> tempfile::Builder<'static, 'static> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("blobd-");
        builder
    }

    /// Flips one bit at each of `offsets` of a file in it, beneath the file system: see [`Disk`].
    #[track_caller]
    pub fn rot(&self, path: &Path, offsets: &[u64]) {
        self.disk.as_ref().expect("it is on a disk that rots").rot(path, offsets);
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new directory in it.
    pub fn dir(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir_all(&dir).expect("make a directory");
        dir
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// Starts a daemon with `blob up`, in a new home, and waits until it has indexed `dirs` and says that it is ready.
    pub fn up<P: AsRef<Path>>(scratch: &Scratch, name: &str, dirs: &[P]) -> Self {
        Self::up_with_config(scratch, name, dirs, "")
    }

    /// The same, soon looking at what changes: a file rests for 200 ms, and is waited for no longer than a second.
    pub fn watching<P: AsRef<Path>>(scratch: &Scratch, name: &str, dirs: &[P]) -> Self {
        Self::up_with_config(scratch, name, dirs, WATCH)
    }

    /// The same, with a daemon that may read only what the modes of files allow. `None` if there cannot be such a one.
    pub fn obeying_modes<P: AsRef<Path>>(scratch: &Scratch, name: &str, dirs: &[P]) -> Option<Self> {
        let mut machine = Self::new(scratch.dir(&format!("{name}.home")), scratch, name, WATCH);
        machine.obeys_modes = true;
        // Only what comes of this thread can do less from now on.
        let can_drop = thread::spawn(|| !geteuid().is_root() || drop_overrides()).join().expect("it does not panic");
        can_drop.then(|| machine.start(dirs))
    }

    /// The same with a configuration file.
    pub fn up_with_config<P: AsRef<Path>>(scratch: &Scratch, name: &str, dirs: &[P], config: &str) -> Self {
        Self::new(scratch.dir(&format!("{name}.home")), scratch, name, config).start(dirs)
    }

    /// The same in a home that may be anywhere.
    pub fn up_at<P: AsRef<Path>>(home: &Path, scratch: &Scratch, name: &str, dirs: &[P]) -> Self {
        fs::create_dir_all(home).expect("make the home");
        Self::new(home.to_owned(), scratch, name, WATCH).start(dirs)
    }

    /// The same, where the configuration says where to listen.
    pub fn up_where_configured(scratch: &Scratch, name: &str, config: &str) -> Self {
        let mut machine = Self::new(scratch.dir(&format!("{name}.home")), scratch, name, config);
        machine.listen = None;
        machine.start::<&Path>(&[])
    }

    /// The same in another network than the machine's own, listening at all addresses there.
    pub fn up_in(network: &Network, scratch: &Scratch, name: &str) -> Self {
        Self::up_in_with_config::<&Path>(network, scratch, name, &[], "")
    }

    /// The same with a configuration file, and directories to index.
    pub fn up_in_with_config<P: AsRef<Path>>(
        network: &Network,
        scratch: &Scratch,
        name: &str,
        dirs: &[P],
        config: &str,
    ) -> Self {
        let mut machine = Self::new(scratch.dir(&format!("{name}.home")), scratch, name, config);
        machine.listen = Some("[::]:0".to_owned());
        machine.network = Some(network.pid());
        machine.start(dirs)
    }

    /// The same in a home that is there, with its configuration.
    pub fn up_again_at<P: AsRef<Path>>(home: &Path, scratch: &Scratch, name: &str, dirs: &[P]) -> Self {
        Self::new(home.to_owned(), scratch, name, "").start(dirs)
    }

    fn new(home: PathBuf, scratch: &Scratch, name: &str, config: &str) -> Self {
        if !config.is_empty() {
            fs::write(home.join("config.toml"), config).expect("write the configuration");
        }
        let (name, log) = (name.to_owned(), scratch.path(&format!("{name}.log")));
        let listen = Some("127.0.0.1:0".to_owned());
        let daemon = RefCell::default();
        Self { name, home, log, daemon, ready: Value::Null, obeys_modes: false, listen, network: None }
    }

    fn start<P: AsRef<Path>>(self, dirs: &[P]) -> Self {
        let mut machine = self;
        let name = machine.name.clone();
        let mut command = machine.daemon_command(blob());
        command.args(["up", "--json", "--name", &name]);
        command.args(machine.listen.iter().flat_map(|listen| ["--listen", listen]));
        command.args(dirs.iter().map(|dir| dir.as_ref()));
        command.stdout(Stdio::piped());
        let mut child = machine.spawn(command);
        let stdout = child.stdout.take().expect("it is a pipe");
        machine.daemon.replace(Some(child));
        let (said, ready) = mpsc::channel();
        // Reads to the end, so that the daemon never writes into a closed or a full pipe.
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let line: Value = serde_json::from_str(&line).unwrap_or_default();
                if line["type"] == "ready" {
                    let _ = said.send(line);
                }
            }
        });
        machine.ready = ready.recv_timeout(START_LIMIT).unwrap_or_else(|error| {
            panic!("blob up on {name} does not get ready: {error}\n{}", machine.log());
        });
        machine
    }

    /// A home without a daemon: made with `blob init`.
    pub fn cold(scratch: &Scratch, name: &str) -> Self {
        let machine = Self::new(scratch.path(&format!("{name}.home")), scratch, name, "");
        fs::write(&machine.log, "").expect("make the log");
        machine.ok(["init"]);
        machine
    }

    fn daemon_command(&self, program: PathBuf) -> Command {
        let log = File::options().create(true).append(true).open(&self.log).expect("open the log");
        let mut command = match self.network {
            Some(pid) => Network::command_in(pid, program),
            None => Command::new(program),
        };
        command.arg("--home").arg(&self.home).env_remove("BLOBD_HOME").stdin(Stdio::null()).stderr(log);
        command.env("BLOBD_LOG", "info,cli::node::watch=debug").env("BLOBD_LOG_LIMIT", "0");
        command
    }

    fn spawn(&self, mut command: Command) -> Child {
        let obeys_modes = self.obeys_modes && geteuid().is_root();
        let start = move || {
            assert!(!obeys_modes || drop_overrides(), "it was possible before");
            command.spawn()
        };
        // What a process can do, it has from the thread that starts it.
        thread::spawn(start).join().expect("it does not panic").expect("start the daemon")
    }

    /// What its daemons have done to keep up with their directories, behind the first `from` bytes of the log: files
    /// hashed, files moved, and paths deleted.
    pub fn kept_up(&self, from: usize) -> (u64, u64, u64) {
        let log = self.log();
        let lines = log[from..].lines().filter(|line| line.contains("up to date"));
        lines.fold((0, 0, 0), |(hashed, moved, deleted), line| {
            let count = |name: &str| {
                let value = line.split_whitespace().find_map(|word| word.strip_prefix(name));
                value.and_then(|value| value.parse::<u64>().ok()).unwrap_or_else(|| panic!("no {name} in {line:?}"))
            };
            (hashed + count("hashed="), moved + count("moved="), deleted + count("deleted="))
        })
    }

    /// Waits until its daemon has looked at nothing for a second, which it does as long as something changes.
    #[track_caller]
    pub fn rests(&self) {
        let passes = || self.log().lines().filter(|line| line.contains("looking at what changed")).count();
        let (mut seen, mut since) = (passes(), Instant::now());
        wait_for(&format!("{} looks at nothing any more", self.name), REST_LIMIT, || {
            if passes() != seen {
                (seen, since) = (passes(), Instant::now());
            }
            (since.elapsed() > RESTED).then_some(())
        });
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its home.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The ticket that `blob up` printed.
    pub fn ticket(&self) -> String {
        self.ready["ticket"].as_str().expect("it listens").to_owned()
    }

    /// Its peer id.
    pub fn id(&self) -> String {
        self.ok(["id"]).text().trim().to_owned()
    }

    /// The address it listens on now.
    pub fn address(&self) -> String {
        self.status()["listens_on"].as_str().expect("it listens").to_owned()
    }

    /// All that its daemons have logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.daemon.borrow().as_ref().expect("a daemon runs").id()
    }

    /// How much memory the daemon has, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the daemon runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number") * 1024
    }

    /// Whether the daemon still runs.
    pub fn is_running(&self) -> bool {
        self.daemon.borrow_mut().as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// A `blob` command line for this home. It does not wait for machines that go away, unless `--retry` says so.
    pub fn command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(blob());
        command.arg("--home").arg(&self.home).args(args).env_remove("BLOBD_HOME").env_remove("BLOBD_LOG");
        command.env("BLOBD_RETRY", "0s");
        command
    }

    /// Runs a `blob` command to its end.
    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Output {
        Output::of(self.command(args))
    }

    /// Runs a command that must exit with 0.
    #[track_caller]
    pub fn ok<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Output {
        self.exits(0, args)
    }

    /// Runs a command that must exit with `code`.
    #[track_caller]
    pub fn exits<A: AsRef<OsStr>>(&self, code: i32, args: impl IntoIterator<Item = A>) -> Output {
        let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let output = self.run(&args);
        assert_eq!(
            output.code,
            code,
            "blob {args:?} on {}\nstdout: {:.4000}\nstderr: {}",
            self.name,
            output.text(),
            output.stderr
        );
        output
    }

    /// What `blob status` says.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.ok(["status", "--json"]).json().remove(0)
    }

    /// What this machine's status says of its peer `name`.
    pub fn peer(&self, name: &str) -> Option<Value> {
        let status = self.status();
        status["peers"].as_array()?.iter().find(|peer| peer["name"] == name).cloned()
    }

    /// Pairs with `other` by a new ticket, and waits until each has heard all that the other says.
    #[track_caller]
    pub fn join(&self, other: &Machine) {
        let ticket = other.ok(["invite", "--json"]).json()[0]["ticket"].as_str().expect("a ticket").to_owned();
        self.ok(["join", &ticket]);
        self.hears(other);
        other.hears(self);
    }

    /// Waits until this machine is connected with `other` and has heard all that it says now.
    #[track_caller]
    pub fn hears(&self, other: &Machine) {
        let said = other.status()["seq"].as_u64();
        wait_for(&format!("{} hears {} up to {said:?}", self.name, other.name), HEAR_LIMIT, || {
            let peer = self.peer(&other.name)?;
            (peer["connected"].is_string() && peer["heard_seq"].as_u64() >= said).then_some(())
        });
    }

    /// Ends the daemon as a power cut would.
    pub fn kill9(&self) {
        let mut child = self.daemon.borrow_mut().take().expect("a daemon runs");
        child.kill().expect("kill the daemon");
        child.wait().expect("reap the daemon");
    }

    /// Ends the daemon as a user would, and returns how it ended and how long that took.
    pub fn stop(&self) -> (ExitStatus, Duration) {
        let started = Instant::now();
        let child = self.daemon.borrow_mut().take().expect("a daemon runs");
        (terminate(child), started.elapsed())
    }

    /// Starts `blobd` in the same home, and waits until it answers.
    #[track_caller]
    pub fn restart(&self) {
        self.restart_at("127.0.0.1:0");
    }

    /// The same where it listened at first: others that were restarted too find it there.
    #[track_caller]
    pub fn restart_in_place(&self) {
        self.restart_at(self.ready["listens_on"].as_str().expect("it listens"));
    }

    /// The same, listening nowhere.
    #[track_caller]
    pub fn restart_deaf(&self) {
        self.restart_at("none");
    }

    #[track_caller]
    fn restart_at(&self, listen: &str) {
        assert!(self.daemon.borrow().is_none(), "a daemon runs already");
        let mut command = self.daemon_command(blobd());
        command.args(["--listen", listen, "--name", &self.name]);
        command.stdout(Stdio::null());
        self.daemon.replace(Some(self.spawn(command)));
        wait_for(&format!("blobd on {} answers", self.name), START_LIMIT, || {
            assert!(self.is_running(), "blobd on {} ended:\n{}", self.name, self.log());
            (self.run(["status"]).code == 0).then_some(())
        });
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(child) = self.daemon.get_mut().take() {
            terminate(child);
        }
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the log of {}\n{}", self.name, lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

/// Takes from this thread, and what it starts, root's right to read and write whatever the modes say. Whether it could.
fn drop_overrides() -> bool {
    let all = [CapabilitySet::DAC_OVERRIDE, CapabilitySet::DAC_READ_SEARCH];
    all.into_iter().all(|capability| remove_capability_from_bounding_set(capability).is_ok())
}

/// SIGTERM, and if that does not help, SIGKILL.
fn terminate(mut child: Child) -> ExitStatus {
    let pid = Pid::from_child(&child);
    let _ = kill_process(pid, Signal::TERM);
    let started = Instant::now();
    while started.elapsed() < STOP_LIMIT {
        if let Ok(Some(status)) = child.try_wait() {
            return status;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    child.wait().expect("reap the daemon")
}

impl Output {
    /// Runs a command to its end, which must come in time.
    #[track_caller]
    pub fn of(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start it");
        let mut out = child.stdout.take().expect("it is a pipe");
        let mut err = child.stderr.take().expect("it is a pipe");
        let reading = thread::spawn(move || {
            let mut stdout = Vec::new();
            out.read_to_end(&mut stdout).map(|_| stdout)
        });
        let reading_errors = thread::spawn(move || {
            let mut stderr = Vec::new();
            err.read_to_end(&mut stderr).map(|_| stderr)
        });
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().expect("wait for it") {
                break status;
            }
            if started.elapsed() > COMMAND_LIMIT {
                let _ = child.kill();
                panic!("{command:?} did not end within {COMMAND_LIMIT:?}");
            }
            thread::sleep(Duration::from_millis(2));
        };
        let read = |thread: thread::JoinHandle<std::io::Result<Vec<u8>>>| {
            thread.join().expect("reading does not panic").expect("read what it says")
        };
        Self {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: read(reading),
            stderr: String::from_utf8_lossy(&read(reading_errors)).into_owned(),
        }
    }

    /// The same with a command that may read and write only what the modes of files allow.
    #[track_caller]
    pub fn obeying_modes(command: Command) -> Self {
        let run = move || {
            assert!(!geteuid().is_root() || drop_overrides(), "it cannot be made to obey modes");
            Self::of(command)
        };
        thread::spawn(run).join().expect("it ends in time")
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard output as JSON Lines.
    #[track_caller]
    pub fn json(&self) -> Vec<Value> {
        let lines = self.stdout.split(|&b| b == b'\n').filter(|line| !line.is_empty());
        lines
            .map(|line| {
                serde_json::from_slice(line)
                    .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(line)))
            })
            .collect()
    }

    /// The lines of one type.
    #[track_caller]
    pub fn of_type(&self, kind: &str) -> Vec<Value> {
        self.json().into_iter().filter(|line| line["type"] == kind).collect()
    }

    /// The summary, which must be the last line.
    #[track_caller]
    pub fn summary(&self) -> Value {
        let last = self.json().pop().expect("there is output");
        assert_eq!(last["type"], "summary", "the last line: {last}");
        last
    }
}

const WATCH: &str = "[watch]\nsettle = \"200ms\"\nsettle_max = \"1s\"\n";
const REST_LIMIT: Duration = Duration::from_secs(20);
/// Longer than `settle` in [`WATCH`].
const RESTED: Duration = Duration::from_secs(1);
/// Debug builds on a busy machine are slow; nothing waits this long unless it is stuck.
const START_LIMIT: Duration = Duration::from_secs(90);
const HEAR_LIMIT: Duration = Duration::from_secs(60);
const COMMAND_LIMIT: Duration = Duration::from_secs(150);
const STOP_LIMIT: Duration = Duration::from_secs(10);
