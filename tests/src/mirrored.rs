use std::{
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::process::geteuid;

use crate::wait_for;

/// A directory that is mounted, for as long as this lives.
pub struct Mirrored {
    dir: PathBuf,
    helpers: Vec<Child>,
    /// A loop device.
    device: Option<String>,
}

impl Mirrored {
    /// Shows the directory `real` at `dir`, which must be there, once more: by `kind`, which is `bind`, `bindfs` or `sshfs`. If that
    /// cannot be done here, says why.
    pub fn mirror(kind: &str, real: &Path, dir: &Path) -> Result<Self, String> {
        let mut mounted = Self { dir: dir.to_owned(), helpers: Vec::new(), device: None };
        match kind {
            "bind" => run(Command::new("mount").arg("--bind").arg(real).arg(dir))?,
            "bindfs" => run(Command::new("bindfs").arg(real).arg(dir))?,
            _ => mounted.sshfs(real, dir)?,
        }
        Ok(mounted)
    }

    /// Mounts a file system at `dir` that takes upper and lower case for one in its directory `c`: ext4, or exFAT over FUSE. `image`
    /// is a file for it.
    pub fn caseless(image: &Path, dir: &Path) -> Result<Self, String> {
        let make = |bytes: u64| {
            let made = std::fs::File::create(image).and_then(|file| file.set_len(bytes));
            made.map_err(|error| format!("{}: {error}", image.display()))
        };
        let inside = dir.join("c");
        let begin = || std::fs::create_dir(&inside).map_err(|error| error.to_string());
        make(64 << 20)?;
        let ext4 = run(Command::new("mkfs.ext4").args(["-q", "-O", "casefold"]).arg(image))
            .and_then(|()| run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(dir)));
        let mut mounted = Self { dir: dir.to_owned(), helpers: Vec::new(), device: None };
        if ext4.is_ok() {
            begin()?;
            run(Command::new("chattr").arg("+F").arg(&inside))?;
            return Ok(mounted);
        }
        make(64 << 20)?;
        run(Command::new("mkfs.exfat").arg(image))?;
        let device =
            Command::new("losetup").args(["-f", "--show"]).arg(image).output().map_err(|error| error.to_string())?;
        let device = String::from_utf8_lossy(&device.stdout).trim().to_owned();
        if device.is_empty() {
            return Err("no loop device".into());
        }
        mounted.device = Some(device.clone());
        run(Command::new("mount.exfat-fuse").arg(device).arg(dir))?;
        begin()?;
        Ok(mounted)
    }

    /// The server that sshd would start, and its client, over pipes.
    fn sshfs(&mut self, real: &Path, dir: &Path) -> Result<(), String> {
        if !geteuid().is_root() {
            return Err("sshfs is mounted by root alone".into());
        }
        let why = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let mut server = Command::new("/usr/lib/openssh/sftp-server");
        let server = server.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut server = server.spawn().map_err(why("sftp-server"))?;
        let (to_server, from_server) = (server.stdin.take(), server.stdout.take());
        self.helpers.push(server);
        let mut client = Command::new("sshfs");
        client.args(["-f", "-o", "passive"]).arg(format!(":{}", real.display())).arg(dir);
        client.stdin(from_server.map_or_else(Stdio::null, Stdio::from)).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut client = client.spawn().map_err(why("sshfs"))?;
        let from_client = client.stdout.take();
        self.helpers.push(client);
        if let (Some(mut from), Some(mut to)) = (from_client, to_server) {
            thread::spawn(move || io::copy(&mut from, &mut to));
        }
        let names = std::fs::read_dir(real).map_err(why("read"))?.count();
        wait_for("sshfs mounts", Duration::from_secs(20), || {
            let is_there = std::fs::read_dir(dir).is_ok_and(|there| there.count() == names && names > 0);
            (is_there || self.helpers.iter_mut().any(|helper| helper.try_wait().is_ok_and(|ended| ended.is_some())))
                .then_some(())
        });
        match std::fs::read_dir(dir).map_err(why("sshfs"))?.count() {
            0 => Err("sshfs does not run here".into()),
            _ => Ok(()),
        }
    }
}

impl Drop for Mirrored {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("-l").arg(&self.dir));
        for helper in &mut self.helpers {
            let _ = helper.kill();
            let _ = helper.wait();
        }
        if let Some(device) = &self.device {
            let _ = run(Command::new("losetup").arg("-d").arg(device));
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}
