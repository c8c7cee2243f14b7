use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, geteuid, kill_process};

use crate::Machine;

/// A fault of the disk that is to strike a daemon: which system call, and how.
///
/// Calls are counted over all threads, from the moment on at which strace has attached: the daemon is stopped behind each
/// of them until that is seen. So what else it does goes slowly meanwhile, but not differently.
#[derive(Debug, Clone)]
pub struct Fault<'a> {
    /// The calls meant, with commas between; `?` in front of one that not every machine knows.
    calls: &'a str,
    on: On<'a>,
    skip: usize,
    blow: Blow<'a>,
}

/// Says that something is over, however it ends.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a call must be about.
#[derive(Debug, Clone, Copy)]
enum On<'a> {
    Anything,
    /// A path, or what was opened there.
    Path(&'a Path),
    /// The next file without a name that is made in a directory.
    Staged,
}

#[derive(Debug, Clone, Copy)]
enum Blow<'a> {
    /// None: calls are only noted.
    None,
    Error {
        name: &'a str,
        lasts: bool,
    },
    Kill,
}

/// What came of a fault.
#[derive(Debug)]
pub struct Struck {
    /// The calls that it struck, as strace shows them; for a mere trace, all there were.
    pub calls: Vec<String>,
}

impl<'a> Fault<'a> {
    /// The next of `calls` fails with an error of this name, such as `EIO`; those after it do not.
    pub fn error(calls: &'a str, name: &'a str) -> Self {
        Self { calls, on: On::Anything, skip: 0, blow: Blow::Error { name, lasts: false } }
    }

    /// All of `calls` fail from now on.
    pub fn errors(calls: &'a str, name: &'a str) -> Self {
        Self { blow: Blow::Error { name, lasts: true }, ..Self::error(calls, name) }
    }

    /// The daemon is killed right behind the next of `calls`.
    pub fn kill(calls: &'a str) -> Self {
        Self { calls, on: On::Anything, skip: 0, blow: Blow::Kill }
    }

    /// Nothing fails: tells what happens.
    pub fn none(calls: &'a str) -> Self {
        Self { calls, on: On::Anything, skip: 0, blow: Blow::None }
    }

    /// Only calls about this path, or what was opened there, are meant.
    pub fn at(self, path: &'a Path) -> Self {
        Self { on: On::Path(path), ..self }
    }

    /// Only calls about the first file are meant that is made without a name.
    pub fn at_staged(self) -> Self {
        Self { on: On::Staged, ..self }
    }

    /// It is the `nth` call, from 1 on, that is meant.
    pub fn nth(self, nth: usize) -> Self {
        Self { skip: nth.saturating_sub(1), ..self }
    }

    /// Does `work` while the fault may strike the daemon of `machine`, and tells whether it did. The daemon goes on
    /// undisturbed then, unless it was killed: [`Machine::kill9`] is to follow then.
    #[track_caller]
    pub fn during<T>(self, machine: &Machine, work: impl FnOnce() -> T) -> (T, Struck) {
        let mut watch = self.watch(machine.pid());
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let watching = scope.spawn(|| watch.run(&|| over.load(Ordering::Relaxed)));
            let worked = {
                // Also if it panics.
                let _over = SetOnDrop(&over);
                work()
            };
            let struck = watching.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (worked, struck)
        })
    }

    /// The same where the fault must strike.
    #[track_caller]
    pub fn strikes<T>(self, machine: &Machine, work: impl FnOnce() -> T) -> T {
        let what = format!("{self:?}");
        let (worked, struck) = self.during(machine, work);
        assert!(!struck.calls.is_empty(), "it did not strike: {what}");
        worked
    }

    fn watch(self, pid: u32) -> Watch<'a> {
        // A thread that began while strace attaches to the others would not be seen.
        stop(pid);
        let tracer = match self.on {
            On::Staged => Tracer::attach(pid, "openat", None, Some(STOP)),
            _ if self.skip > 0 || matches!(self.blow, Blow::Kill) => {
                Tracer::attach(pid, self.calls, self.path(), Some(STOP))
            }
            _ => self.striking(pid, self.path()),
        };
        Watch { fault: self, pid, tracer }
    }

    fn path(&self) -> Option<&'a Path> {
        if let On::Path(path) = self.on { Some(path) } else { None }
    }

    fn striking(&self, pid: u32, path: Option<&Path>) -> Tracer {
        let injected = match self.blow {
            Blow::None => None,
            Blow::Error { name, lasts: true } => Some(format!("error={name}")),
            Blow::Error { name, lasts: false } => Some(format!("error={name}:{STOP}:when=1")),
            Blow::Kill => Some(STOP.to_owned()),
        };
        Tracer::attach(pid, self.calls, path, injected.as_deref())
    }
}

/// A fault that may strike at any moment.
struct Watch<'a> {
    fault: Fault<'a>,
    pid: u32,
    tracer: Tracer,
}

impl Watch<'_> {
    /// Until the work is over, and no longer than that.
    fn run(&mut self, is_over: &dyn Fn() -> bool) -> Struck {
        let struck = self.run_until_over(is_over);
        self.tracer.detach();
        resume(self.pid);
        struck
    }

    fn run_until_over(&mut self, is_over: &dyn Fn() -> bool) -> Struck {
        let mut calls = Vec::new();
        let mut staged: Option<PathBuf> = None;
        if matches!(self.fault.on, On::Staged) {
            let Some(path) = self.next_staged(is_over) else { return Struck { calls } };
            self.tracer = Tracer::attach_after(&mut self.tracer, || {
                let stepping = self.fault.skip > 0 || matches!(self.fault.blow, Blow::Kill);
                match stepping {
                    true => Tracer::attach(self.pid, self.fault.calls, Some(&path), Some(STOP)),
                    false => self.fault.striking(self.pid, Some(&path)),
                }
            });
            staged = Some(path);
        }
        if self.fault.skip > 0 {
            for _ in 0..self.fault.skip {
                if self.tracer.next(is_over).is_none() {
                    return Struck { calls };
                }
            }
            if !matches!(self.fault.blow, Blow::Kill) {
                let path = staged.as_deref().or(self.fault.path());
                self.tracer = Tracer::attach_after(&mut self.tracer, || self.fault.striking(self.pid, path));
            }
        }
        while let Some(call) = self.tracer.next(is_over) {
            match self.fault.blow {
                Blow::None => calls.push(call),
                Blow::Kill => {
                    let _ = kill_process(pid_of(self.pid), Signal::KILL);
                    // If it were told to detach now, it might wait for threads that wait for it.
                    self.tracer.end();
                    calls.push(call);
                    break;
                }
                Blow::Error { lasts, .. } => {
                    if call.contains("(INJECTED)") {
                        calls.push(call);
                    }
                    if !lasts && !calls.is_empty() {
                        // Another thread may have met it before all were stopped.
                        self.tracer.detach();
                        calls.extend(self.tracer.rest().filter(|call| call.contains("(INJECTED)")));
                        break;
                    }
                }
            }
        }
        Struck { calls }
    }

    /// The path of the next file without a name; the daemon is stopped then.
    fn next_staged(&mut self, is_over: &dyn Fn() -> bool) -> Option<PathBuf> {
        loop {
            let call = self.tracer.next(is_over)?;
            if call.contains("O_TMPFILE") {
                let path = call.rsplit_once('<').and_then(|(_, path)| path.split_once('>'));
                let path = path.unwrap_or_else(|| panic!("a file without a path: {call}")).0;
                return Some(path.trim_end_matches(" (deleted)").into());
            }
        }
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.tracer.detach();
        resume(self.pid);
    }
}

/// An strace that has attached to a daemon.
struct Tracer {
    pid: u32,
    strace: Child,
    lines: Receiver<String>,
    /// What threads have begun and not ended, by what the thread is called.
    unfinished: HashMap<String, String>,
}

impl Tracer {
    #[track_caller]
    fn attach(pid: u32, calls: &str, path: Option<&Path>, injected: Option<&str>) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-y", "-s", "0", "-e", "signal=none", "-p", &pid.to_string()]);
        command.args(["-e", &format!("trace={calls}")]);
        command.args(injected.iter().flat_map(|injected| ["-e".to_owned(), format!("inject={calls}:{injected}")]));
        command.args(path.iter().flat_map(|path| [Path::new("-P"), path]));
        let strace = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut strace = strace.unwrap_or_else(|error| panic!("cannot run strace: {error}; install strace"));
        let stderr = strace.stderr.take().expect("it is a pipe");
        let (said, lines) = mpsc::channel();
        thread::spawn(move || {
            let lines = BufReader::new(stderr).split(b'\n').map_while(Result::ok);
            for line in lines.map(|line| String::from_utf8_lossy(&line).into_owned()) {
                if said.send(line).is_err() {
                    return;
                }
            }
        });
        let tracer = Self { pid, strace, lines, unfinished: HashMap::new() };
        let mut heard = Vec::new();
        let until = Instant::now() + ATTACH_LIMIT;
        let attached = format!("strace: Process {pid} attached");
        loop {
            let line = tracer.lines.recv_timeout(until.saturating_duration_since(Instant::now()));
            let line = line.unwrap_or_else(|_| panic!("strace does not attach to {pid}: {heard:#?}"));
            if line.starts_with(&attached) {
                return tracer;
            }
            heard.push(line);
        }
    }

    /// Detaches this one, and attaches the next: the daemon is stopped meanwhile.
    fn attach_after(before: &mut Self, next: impl FnOnce() -> Self) -> Self {
        stop(before.pid);
        before.detach();
        next()
    }

    /// The next call that has returned; `None` if there was none until the work was over. If it stops the daemon, that stays
    /// stopped until the next is asked for.
    fn next(&mut self, is_over: &dyn Fn() -> bool) -> Option<String> {
        loop {
            // What was done before the work was over has been said by then, but perhaps not been read.
            let was_over = is_over();
            match self.lines.recv_timeout(if was_over { LAST_LIMIT } else { LOOK_EVERY }) {
                Ok(line) => {
                    if let Some(call) = self.understand(&line) {
                        return Some(call);
                    }
                }
                // Not any sooner: a signal that is about to stop it would not be undone.
                Err(RecvTimeoutError::Timeout) if is_stopped(self.pid) => resume(self.pid),
                Err(RecvTimeoutError::Timeout) if !was_over => {}
                Err(_) => return None,
            }
        }
    }

    /// Calls that returned before it detached, and were not heard of yet.
    fn rest(&mut self) -> impl Iterator<Item = String> {
        std::iter::from_fn(|| self.next(&|| true))
    }

    /// The call that this line ends, put together from the lines that tell of it.
    fn understand(&mut self, line: &str) -> Option<String> {
        let (thread, text) = match line.strip_prefix("[pid").and_then(|rest| rest.split_once("] ")) {
            Some((thread, text)) => (thread.trim(), text),
            None => ("", line),
        };
        if let Some(begun) = text.strip_suffix("<unfinished ...>") {
            self.unfinished.insert(thread.to_owned(), begun.trim_end().to_owned());
            return None;
        }
        if let Some(resumed) = text.strip_prefix("<... ") {
            let begun = self.unfinished.remove(thread).unwrap_or_default();
            let (_, rest) = resumed.split_once(" resumed>")?;
            return Some(format!("{begun}{rest}"));
        }
        (text.starts_with(|c: char| c.is_ascii_lowercase()) && text.contains(") ") && text.contains(" = "))
            .then(|| text.to_owned())
    }

    /// Lets the daemon go; if it is stopped, it stays so.
    fn detach(&mut self) {
        if matches!(self.strace.try_wait(), Ok(None)) {
            let _ = kill_process(Pid::from_child(&self.strace), Signal::INT);
        }
        self.end();
    }

    /// Waits until strace has ended: it has been told to, or what it has attached to is dead.
    fn end(&mut self) {
        let until = Instant::now() + END_LIMIT;
        while matches!(self.strace.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(LOOK_EVERY);
        }
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Whether strace may attach to programs here; if not, says so on standard error.
///
/// # Panics
///
/// If there is no strace.
pub fn can_attach() -> bool {
    let version = Command::new("strace").arg("--version").stdout(Stdio::null()).status();
    version.unwrap_or_else(|error| panic!("cannot run strace: {error}; install strace"));
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let can = geteuid().is_root() || ["", "0"].contains(&scope.trim());
    if !can {
        eprintln!("skipped: strace may not attach here; it takes root, or sysctl kernel.yama.ptrace_scope=0");
    }
    can
}

/// Whether all threads of a daemon are stopped.
fn is_stopped(pid: u32) -> bool {
    let Ok(mut threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.all(|thread| {
        let status = thread.and_then(|thread| fs::read_to_string(thread.path().join("status"))).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("State:").is_some_and(|state| state.trim().starts_with(['t', 'T'])))
    })
}

/// Stops a daemon, if it is not stopped yet.
fn stop(pid: u32) {
    let _ = kill_process(pid_of(pid), Signal::STOP);
    let until = Instant::now() + END_LIMIT;
    while !is_stopped(pid) && Instant::now() < until {
        thread::sleep(LOOK_EVERY);
    }
}

/// Lets a daemon go on that is stopped.
fn resume(pid: u32) {
    let _ = kill_process(pid_of(pid), Signal::CONT);
}

fn pid_of(pid: u32) -> Pid {
    Pid::from_raw(pid as i32).expect("processes have numbers above 0")
}

/// What stops the whole daemon behind a call.
const STOP: &str = "signal=SIGSTOP";
const ATTACH_LIMIT: Duration = Duration::from_secs(30);
const END_LIMIT: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(1);
const LAST_LIMIT: Duration = Duration::from_millis(300);
