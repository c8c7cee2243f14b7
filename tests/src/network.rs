use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use crate::{Output, skipped};

/// A network of a test's own, with a loopback interface that is up, and nothing else until [`crate::Guest`] is in it.
pub struct Network {
    /// The process that keeps it.
    keeper: Child,
}

impl Network {
    /// A new one; `None`, and a word on standard error, where such a thing cannot be made.
    pub fn new() -> Option<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--", "sh", "-c", "ip link set lo up && echo ready && exec cat"]);
        let keeper = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut keeper = keeper.map_err(|error| skipped(&format!("cannot run unshare: {error}"))).ok()?;
        let mut line = String::new();
        let stdout = keeper.stdout.as_mut().expect("it is a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("read what it says");
        let network = Self { keeper };
        if line.trim() != "ready" {
            skipped("no network of its own can be made here; it takes root, unshare and ip");
            return None;
        }
        Some(network)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.keeper.id()
    }

    /// A command line that runs in the network of a process.
    pub(crate) fn command_in(pid: u32, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{pid}/ns/net")).arg("--").arg(program);
        command
    }

    /// Runs a script in it, which must succeed.
    #[track_caller]
    pub fn run(&self, script: &str) {
        let output = self.try_run(script);
        assert_eq!(output.code, 0, "{script}: {}", output.stderr);
    }

    /// Runs a script in it.
    #[track_caller]
    pub fn try_run(&self, script: &str) -> Output {
        let mut command = self.command("sh");
        command.args(["-c", script]);
        Output::of(command)
    }

    /// A command line that runs in it: a server for [`crate::Guest`], say.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Self::command_in(self.pid(), program)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
