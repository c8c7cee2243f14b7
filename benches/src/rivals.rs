use std::{
    fs, io,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::machine::succeed;

/// Whether b3sum is installed and `paths` fit on one command line.
pub(crate) fn b3sum(paths: &[PathBuf]) -> bool {
    !paths.is_empty() && Command::new("b3sum").arg("--version").stdout(Stdio::null()).status().is_ok()
}

pub(crate) fn run_b3sum(paths: &[PathBuf]) -> io::Result<String> {
    succeed(Command::new("b3sum").args(paths))
}

/// An rsync daemon that serves one directory.
pub(crate) struct RsyncDaemon {
    daemon: Child,
    port: u16,
}

impl RsyncDaemon {
    /// Starts one on a free port of the loopback device; `None` if rsync is not installed.
    pub(crate) fn start(work: &Path, dir: &Path) -> io::Result<Option<Self>> {
        if Command::new("rsync").arg("--version").stdout(Stdio::null()).status().is_err() {
            return Ok(None);
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = work.join("rsyncd.conf");
        fs::write(
            &config,
            format!("use chroot = no\naddress = 127.0.0.1\n[tree]\npath = {}\nread only = yes\n", dir.display()),
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

    pub(crate) fn get(&self, to: &Path) -> io::Result<String> {
        let from = format!("rsync://127.0.0.1:{}/tree/", self.port);
        succeed(Command::new("rsync").args(["-aW", &from]).arg(to))
    }
}

impl Drop for RsyncDaemon {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
