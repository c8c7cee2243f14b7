//! A real NFS client: the Linux kernel, as a program (User Mode Linux), in a network of the test's own.
//!
//! The guest's root is the host's, read-only: the host's tools run in it, and the test's files are where they are, with
//! times in whole seconds.
//! `/mnt` is its own, with `/mnt/tmp` (`TMPDIR`) to write to. The kernel comes from Debian's packages: see
//! `.ci/fetch-uml`.

use std::{
    collections::HashMap,
    env,
    ffi::OsString,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use rustix::{
    fs::statvfs,
    process::{Pid, Signal, kill_process_group},
};

use crate::{Network, Output, Scratch, skipped};

/// The host's address in the guest's network: where a server is to listen.
pub const SERVER: &str = "10.77.0.1";
/// The port that [`Guest::mount`] asks for files and for mounts. The network is the test's own, so it is free.
pub const NFS_PORT: u16 = 2049;
/// Where [`Guest::mount`] mounts.
pub const MOUNT: &str = "/mnt/nfs";

/// A running Linux, killed on drop. One a network.
pub struct Guest {
    kernel: Child,
    orders: Mutex<ChildStdin>,
    /// Scripts, and what they write.
    shared: PathBuf,
    console: PathBuf,
    numbers: AtomicU64,
    waiting: Waiting,
}

/// What a guest is made of.
#[derive(Debug, Clone, Copy)]
pub struct Hardware {
    /// The only processor of the host that it may use. Timings of an unpinned guest differ by up to five times.
    pub cpu: Option<usize>,
    /// Its memory in MiB, which the host gives as it is used.
    pub memory_mib: u64,
}

impl Default for Hardware {
    fn default() -> Self {
        Self { cpu: None, memory_mib: 256 }
    }
}

/// Why there cannot be a guest on this machine.
#[derive(Debug)]
pub struct Unavailable(pub String);

/// A script that runs in a guest.
#[must_use = "it is to be waited for"]
pub struct Running<'a> {
    guest: &'a Guest,
    number: u64,
    script: String,
    ended: Receiver<i32>,
}

/// A shell in a guest that stays from script to script, with its variables and open files.
pub struct Shell<'a> {
    guest: &'a Guest,
    name: u64,
}

/// Who is told of which script's end; and in which shell it runs, whose end is the script's.
type Waiting = Arc<Mutex<HashMap<u64, (Option<u64>, Sender<i32>)>>>;

impl Guest {
    /// Boots a guest in `network`, which gets the address [`SERVER`] for the host's side. Takes two seconds.
    ///
    /// `None` where that cannot be, which is told as [`skipped()`]; a kernel that is there and does not boot is a panic.
    pub fn boot(network: &Network, scratch: &Scratch) -> Option<Self> {
        Self::boot_with(network, scratch, Hardware::default()).map_err(|Unavailable(why)| skipped(&why)).ok()
    }

    /// The same with other hardware.
    pub fn boot_with(network: &Network, scratch: &Scratch, hardware: Hardware) -> Result<Self, Unavailable> {
        let parts = Parts::find().ok_or_else(|| {
            Unavailable("there is no User Mode Linux with busybox; .ci/fetch-uml brings them on Debian".to_owned())
        })?;
        let (dir, shared) = (scratch.dir("guest"), scratch.dir("guest/shared"));
        let tap = network.try_run(&format!(
            "ip tuntap add dev tap0 mode tap && ip addr add {SERVER}/24 dev tap0 && ip link set tap0 mtu {MTU} up"
        ));
        if tap.code != 0 {
            return Err(Unavailable(format!("no tap device can be made here: {}", tap.stderr.trim())));
        }
        // The kernel's command line is split at spaces, which the way to these may have.
        let link = |name: &str, to: &Path| {
            let from = dir.join(name);
            symlink(to, &from).map(|()| from).expect("make a link")
        };
        let (busybox, modules) = (link("busybox", &parts.busybox), link("modules", &parts.modules));
        let agent = dir.join("agent.sh");
        fs::write(&agent, include_str!("uml/agent.sh")).expect("write the agent");

        let console = dir.join("console");
        let mut command = match hardware.cpu {
            Some(_) => network.command("taskset"),
            None => network.command(&parts.kernel),
        };
        if let Some(cpu) = hardware.cpu {
            command.args(["-c", &cpu.to_string()]).arg(&parts.kernel);
        }
        command.arg(format!("mem={}M", hardware.memory_mib));
        command.args(["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "umid=guest"]);
        command.args(["ssl0=fd:0,fd:1", "ssl=null", "con0=null,fd:2", "con=null"]);
        command.arg(format!("vec0:transport=tap,ifname=tap0,depth=128,gro=1,mtu={MTU}"));
        command.arg(option("uml_dir=", &dir)).arg(option("init=", &busybox)).args(["--", "sh"]);
        command.args([&agent, &busybox, &modules, &shared]);
        command.env("TMPDIR", memory_dir(hardware.memory_mib, &dir));
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(&console).expect("make a file for the console"));
        let mut kernel = command.spawn().map_err(|error| Unavailable(format!("cannot run {command:?}: {error}")))?;

        let orders = Mutex::new(kernel.stdin.take().expect("it is a pipe"));
        let said = kernel.stdout.take().expect("it is a pipe");
        let waiting = Waiting::default();
        let guest = Self { kernel, orders, shared, console, numbers: AtomicU64::new(1), waiting };
        let (ready, is_ready) = channel();
        let waiting = guest.waiting.clone();
        waiting.lock().expect("nobody panics").insert(0, (None, ready));
        thread::spawn(move || listen(said, &waiting));
        if let Err(error) = is_ready.recv_timeout(BOOT_LIMIT) {
            // Linux 6.1 has room for the registers of its time: where a processor has larger ones (AMX), no program starts.
            if guest.console_says("ptrace set fp regs failed") {
                return Err(Unavailable("this User Mode Linux is older than this processor".to_owned()));
            }
            panic!("the guest does not boot: {error}\n{}", guest.console());
        }
        Ok(guest)
    }

    /// Mounts `export` of the server at [`SERVER`] at [`MOUNT`], which must succeed. `options` come after the usual
    /// ones, and override them: `port=` and `mountport=`, say.
    #[track_caller]
    pub fn mount(&self, export: &str, options: &str) {
        let output = self.try_mount(export, options);
        assert_eq!(output.code, 0, "mount {export}: {}\n{}", output.stderr, self.console());
    }

    /// The same, which may fail.
    #[track_caller]
    pub fn try_mount(&self, export: &str, options: &str) -> Output {
        let comma = if options.is_empty() { "" } else { "," };
        let ports = format!("port={NFS_PORT},mountport={NFS_PORT}");
        let options = format!("vers=3,proto=tcp,nolock,mountproto=tcp,{ports}{comma}{options}");
        let busybox = self.shared.with_file_name("busybox");
        self.run(&format!("{} mount -t nfs -o '{options}' '{SERVER}:{export}' {MOUNT}", busybox.display()))
    }

    /// Unmounts what [`Guest::mount`] mounted, which must succeed: nobody has anything open there. The guest then knows
    /// nothing any more of what was there.
    #[track_caller]
    pub fn unmount(&self) {
        self.ok(&format!("umount {MOUNT}"));
    }

    /// Runs a script with the host's `/bin/sh`, to its end.
    #[track_caller]
    pub fn run(&self, script: &str) -> Output {
        self.start(script).wait()
    }

    /// The same for a script that must succeed. Returns what it writes, as text.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        self.start(script).ok()
    }

    /// Starts a script, beside what runs already.
    pub fn start(&self, script: &str) -> Running<'_> {
        self.order("run", None, script)
    }

    /// Starts a shell that stays.
    #[track_caller]
    pub fn shell(&self) -> Shell<'_> {
        let started = self.order("shell", None, "the start of a shell");
        let name = started.number;
        started.ends_within(SCRIPT_LIMIT);
        Shell { guest: self, name }
    }

    /// What the kernel has said, the end of it.
    pub fn console(&self) -> String {
        let said = String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Whether the kernel has said that, ever.
    fn console_says(&self, text: &str) -> bool {
        fs::read(&self.console).is_ok_and(|said| String::from_utf8_lossy(&said).contains(text))
    }

    /// Has the agent do something with a script. If the guest has ended, whoever waits for the end is told.
    fn order(&self, verb: &str, shell: Option<u64>, script: &str) -> Running<'_> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        fs::write(self.shared.join(format!("{number}.sh")), script).expect("write the script");
        let (tell, ended) = channel();
        self.waiting.lock().expect("nobody panics").insert(number, (shell, tell));
        let line = match shell {
            Some(name) => format!("{verb} {name} {number}\n"),
            None => format!("{verb} {number}\n"),
        };
        if self.orders.lock().expect("nobody panics").write_all(line.as_bytes()).is_err() {
            self.waiting.lock().expect("nobody panics").remove(&number);
        }
        Running { guest: self, number, script: script.to_owned(), ended }
    }

    /// Ends the kernel and all its processes, which are processes of the host too, and would go on without it. (When
    /// nobody is left to do this, the agent finds its serial line closed, and halts.)
    fn kill(&self) {
        let _ = kill_process_group(Pid::from_child(&self.kernel), Signal::KILL);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
        let _ = self.kernel.wait();
    }
}

impl Running<'_> {
    /// Waits for its end, which must come within [`SCRIPT_LIMIT`].
    #[track_caller]
    pub fn wait(self) -> Output {
        self.wait_within(SCRIPT_LIMIT)
    }

    /// The same for a script that must succeed. Returns what it writes, as text.
    #[track_caller]
    pub fn ok(self) -> String {
        let script = self.script.clone();
        let output = self.wait();
        assert_eq!(output.code, 0, "{script}\nstdout: {:.4000}\nstderr: {:.4000}", output.text(), output.stderr);
        output.text()
    }

    /// Waits for its end, which must come within `limit`; else the guest is killed: it may hang in its kernel.
    #[track_caller]
    pub fn wait_within(self, limit: Duration) -> Output {
        let code = self.ends_within(limit);
        let read = |kind: &str| {
            fs::read(self.guest.shared.join(format!("{}.{kind}", self.number))).expect("read what it says")
        };
        Output { code, stdout: read("out"), stderr: String::from_utf8_lossy(&read("err")).into_owned() }
    }

    #[track_caller]
    fn ends_within(&self, limit: Duration) -> i32 {
        self.ended.recv_timeout(limit).unwrap_or_else(|error| {
            let console = self.guest.console();
            self.guest.kill();
            panic!("waiting for {limit:?} at most, in the guest: {}: {error}\n{console}", self.script);
        })
    }
}

impl Shell<'_> {
    /// Runs a script in it, to its end. `exit`, and an error of syntax, end the shell, which is a panic here.
    #[track_caller]
    pub fn run(&self, script: &str) -> Output {
        self.start(script).wait()
    }

    /// The same for a script that must succeed. Returns what it writes, as text.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        self.start(script).ok()
    }

    /// Starts a script in it, once the one before has ended.
    pub fn start(&self, script: &str) -> Running<'_> {
        self.guest.order("in", Some(self.name), script)
    }
}

/// Takes in what the agent says, until the guest has ended: then nothing is waited for any more.
fn listen(said: ChildStdout, waiting: &Waiting) {
    for line in BufReader::new(said).lines().map_while(Result::ok) {
        let Some((_, event)) = line.split_once("@guest ") else { continue };
        let words: Vec<&str> = event.split_whitespace().collect();
        let mut waiting = waiting.lock().expect("nobody panics");
        let number = words.get(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        match words[..] {
            ["ready"] => tell(&mut waiting, 0, 0),
            ["end", _, code] => tell(&mut waiting, number, code.parse().unwrap_or(-1)),
            ["gone", _] => waiting.retain(|_, (shell, _)| *shell != Some(number)),
            _ => {}
        }
    }
    waiting.lock().expect("nobody panics").clear();
}

fn tell(waiting: &mut HashMap<u64, (Option<u64>, Sender<i32>)>, number: u64, code: i32) {
    if let Some((_, tell)) = waiting.remove(&number) {
        let _ = tell.send(code);
    }
}

/// Files of Debian's packages.
struct Parts {
    kernel: PathBuf,
    modules: PathBuf,
    busybox: PathBuf,
}

impl Parts {
    /// Those that `.ci/fetch-uml` has unpacked beside what cargo builds, or those installed.
    fn find() -> Option<Self> {
        let program = env::current_exe().expect("this test is a file");
        let unpacked = program.ancestors().map(|dir| dir.join("uml"));
        unpacked.chain([PathBuf::from("/")]).find_map(|root| {
            let (kernel, busybox) = (root.join("usr/bin/linux.uml"), root.join("bin/busybox"));
            let mut modules = fs::read_dir(root.join("usr/lib/uml/modules")).ok()?.flatten().map(|entry| entry.path());
            let modules = modules.find(|dir| dir.join("kernel/fs/nfs/nfsv3.ko").is_file())?;
            (kernel.is_file() && busybox.is_file()).then_some(Self { kernel, modules, busybox })
        })
    }
}

/// Where the guest's memory is a file: in memory too, if there is enough of it.
fn memory_dir(memory_mib: u64, otherwise: &Path) -> PathBuf {
    let shm = Path::new("/dev/shm");
    let free_mib = statvfs(shm).map_or(0, |fs| (fs.f_bavail * fs.f_frsize) >> 20);
    if free_mib > 2 * memory_mib { shm.to_owned() } else { otherwise.to_owned() }
}

fn option(name: &str, path: &Path) -> OsString {
    let mut option = OsString::from(name);
    option.push(path);
    option
}

/// The largest that works, so that what is measured is not the device.
const MTU: u32 = 65000;
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// How long a script may take.
pub const SCRIPT_LIMIT: Duration = Duration::from_secs(120);
