use std::{
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

/// A home with its daemon.
pub(crate) struct Machine {
    home: tempfile::TempDir,
    daemon: Child,
    ticket: String,
}

impl Machine {
    /// Starts a daemon with a new home below `work`, which holds `arena` if one is given.
    pub(crate) fn start(work: &Path, arena: Option<&Path>) -> io::Result<Self> {
        let home = tempfile::Builder::new().prefix("home-").tempdir_in(work)?;
        let mut command = Command::new(program("blob"));
        command.args(["--json", "--home"]).arg(home.path()).arg("up").args(arena);
        command.args(["--listen", "127.0.0.1:0"]).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut daemon = command.spawn()?;
        let lines = BufReader::new(daemon.stdout.take().ok_or_else(|| io::Error::other("no output"))?).lines();
        for line in lines {
            let line: Value = serde_json::from_str(&line?)?;
            if line["type"] == "ready" {
                let ticket = line["ticket"].as_str().unwrap_or_default().to_owned();
                return Ok(Self { home, daemon, ticket });
            }
        }
        Err(io::Error::other("the daemon ended before it was ready"))
    }

    /// Runs `blob` with `args`; its exit code must be 0. Returns what it prints.
    pub(crate) fn run(&self, args: &[&str]) -> io::Result<String> {
        succeed(Command::new(program("blob")).arg("--home").arg(self.home.path()).args(args))
    }

    pub(crate) fn join(&self, other: &Machine) -> io::Result<()> {
        self.run(&["join", &other.ticket])?;
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

/// Runs `blob hash`.
pub(crate) fn hash(paths: &[PathBuf]) -> io::Result<String> {
    succeed(Command::new(program("blob")).arg("hash").args(paths))
}

/// Runs a command that must succeed; returns what it prints.
pub(crate) fn succeed(command: &mut Command) -> io::Result<String> {
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("{command:?}: {}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// One of our programs, built beside this one.
fn program(name: &str) -> PathBuf {
    std::env::current_exe().map(|exe| exe.with_file_name(name)).unwrap_or_else(|_| name.into())
}
