use std::{
    fs,
    io::{self, BufRead, BufReader},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{bytes_below, machine::succeed, timed};

/// Whether a rival is installed.
pub(crate) fn is_installed(program: &str, version: &str) -> bool {
    Command::new(program).arg(version).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Hashes `paths`, below `dir`, on so many threads if that is said. `None` if b3sum is not installed.
pub(crate) fn b3sum(dir: &Path, paths: &[PathBuf], threads: Option<usize>) -> io::Result<Option<Duration>> {
    if !is_installed("b3sum", "--version") {
        return Ok(None);
    }
    let threads = threads.map(|threads| ["--num-threads".to_owned(), threads.to_string()]);
    timed(|| succeed(Command::new("b3sum").current_dir(dir).args(threads.into_iter().flatten()).args(paths))).map(Some)
}

/// Compares two trees by their checksums, and changes nothing. `None` if rsync is not installed.
pub(crate) fn rsync_compare(one: &Path, other: &Path) -> io::Result<Option<Duration>> {
    if !is_installed("rsync", "--version") {
        return Ok(None);
    }
    let from = format!("{}/", one.display());
    timed(|| succeed(Command::new("rsync").args(["-anc", &from]).arg(other))).map(Some)
}

/// A backup of a tree, whose data can be checked.
pub(crate) struct Restic {
    repository: PathBuf,
}

impl Restic {
    /// Makes one below `work`; `None` if restic is not installed.
    pub(crate) fn backup(work: &Path, tree: &Path) -> io::Result<Option<Self>> {
        if !is_installed("restic", "version") {
            return Ok(None);
        }
        let restic = Self { repository: work.join("restic") };
        succeed(restic.command().arg("init"))?;
        succeed(restic.command().arg("backup").arg(tree))?;
        Ok(Some(restic))
    }

    /// Reads and checks all of it.
    pub(crate) fn check(&self) -> io::Result<Duration> {
        timed(|| succeed(self.command().args(["check", "--read-data"])))
    }

    fn command(&self) -> Command {
        let mut command = Command::new("restic");
        command.env("RESTIC_PASSWORD", "bench").args(["--no-cache", "--quiet", "--repo"]).arg(&self.repository);
        command
    }
}

/// An rsync daemon that serves one directory.
pub(crate) struct RsyncDaemon {
    daemon: Child,
    port: u16,
}

impl RsyncDaemon {
    /// Starts one on a free port of the loopback device; `None` if rsync is not installed.
    pub(crate) fn start(work: &Path, dir: &Path) -> io::Result<Option<Self>> {
        if !is_installed("rsync", "--version") {
            return Ok(None);
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = work.join("rsyncd.conf");
        fs::write(
            &config,
            format!(
                "use chroot = no\nuid = 0\ngid = 0\naddress = 127.0.0.1\n[tree]\npath = {}\nread only = yes\n",
                dir.display()
            ),
        )?;
        let daemon = Command::new("rsync")
            .args(["--daemon", "--no-detach", "--port", &port.to_string(), "--config"])
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let daemon = Self { daemon, port };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > deadline {
                return Err(io::Error::other("the rsync daemon does not answer"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(Some(daemon))
    }

    /// Brings all of it to `to`.
    pub(crate) fn get(&self, options: &[&str], to: &Path) -> io::Result<String> {
        let from = format!("rsync://127.0.0.1:{}/tree/", self.port);
        succeed(Command::new("rsync").args(options).arg(&from).arg(to))
    }
}

/// A sendme that sends one directory, without a relay.
pub(crate) struct Sendme {
    sender: Child,
    ticket: String,
}

impl Sendme {
    /// Starts one, in `work`; `None` if sendme is not installed.
    pub(crate) fn start(work: &Path, dir: &Path) -> io::Result<Option<Self>> {
        if !is_installed("sendme", "--version") {
            return Ok(None);
        }
        let mut command = Command::new("sendme");
        command.current_dir(work).args(["send", "--relay", "disabled", "--ticket-type", "addresses"]).arg(dir);
        let mut sender = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let stdout = sender.stdout.take().ok_or_else(|| io::Error::other("no output"))?;
        let mut sendme = Self { sender, ticket: String::new() };
        for line in BufReader::new(stdout).lines() {
            if let Some(ticket) = line?.trim().strip_prefix("sendme receive ") {
                sendme.ticket = ticket.to_owned();
                return Ok(Some(sendme));
            }
        }
        Err(io::Error::other("sendme ended before it had a ticket"))
    }

    /// Brings it into the directory `to`, which there must be, under its name.
    pub(crate) fn receive(&self, to: &Path) -> io::Result<String> {
        succeed(Command::new("sendme").current_dir(to).args(["receive", "--relay", "disabled", &self.ticket]))
    }
}

impl Drop for Sendme {
    fn drop(&mut self) {
        let _ = self.sender.kill();
        let _ = self.sender.wait();
    }
}

/// A casync store on the same file system, with the chunks of one file.
pub(crate) struct Casync {
    store: PathBuf,
    index: PathBuf,
    /// The chunks, compressed, that a file does not have which was put into the store before.
    pub(crate) new_bytes: u64,
}

impl Casync {
    /// Makes one below `work` that has `old` and then `new`; `None` if casync is not installed.
    pub(crate) fn make(work: &Path, old: &Path, new: &Path) -> io::Result<Option<Self>> {
        if !is_installed("casync", "--version") {
            return Ok(None);
        }
        let store = work.join("casync.castr");
        let make = |index: &Path, file: &Path| {
            let mut command = Command::new("casync");
            succeed(command.args(["make", "--store"]).arg(&store).arg(index).arg(file))
        };
        make(&work.join("old.caibx"), old)?;
        let before = bytes_below(&store)?;
        let index = work.join("new.caibx");
        make(&index, new)?;
        Ok(Some(Self { new_bytes: bytes_below(&store)? - before, store, index }))
    }

    /// Makes the file at `to`, from the store and what `seed` has of it.
    pub(crate) fn extract(&self, seed: &Path, to: &Path) -> io::Result<String> {
        let mut command = Command::new("casync");
        command.args(["extract", "--store"]).arg(&self.store).arg("--seed").arg(seed);
        succeed(command.arg(&self.index).arg(to))
    }
}

impl Drop for RsyncDaemon {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
