use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::{Network, SERVER, Scratch};

/// An NFS server that others wrote, nfs-ganesha with its VFS: to hold ours against, and to test [`crate::Guest`] with.
pub struct Ganesha {
    server: Child,
}

impl Ganesha {
    /// Its port for files.
    pub const PORT: u16 = 2049;
    /// Its port for mounts.
    pub const MOUNT_PORT: u16 = 20048;

    /// Serves the directory `tree`, under its path, at [`SERVER`]; it does so soon. `None` if it is not installed.
    pub fn start(network: &Network, scratch: &Scratch, tree: &Path) -> Option<Self> {
        let (config, log) = (scratch.path("ganesha.conf"), scratch.path("ganesha.log"));
        let (port, mount_port, tree) = (Self::PORT, Self::MOUNT_PORT, tree.display());
        let text = format!(
            "NFS_CORE_PARAM {{ Protocols = 3; NFS_Port = {port}; MNT_Port = {mount_port}; Bind_addr = {SERVER};\n\
             Enable_NLM = false; Enable_RQUOTA = false; }}\n\
             EXPORT {{ Export_Id = 1; Path = \"{tree}\"; Pseudo = /tree; Access_Type = RO; Squash = No_Root_Squash;\n\
             Protocols = 3; Transports = TCP; SecType = sys; FSAL {{ Name = VFS; }} }}\n"
        );
        let installed = Command::new("ganesha.nfsd").arg("-v").stdout(Stdio::null()).status().is_ok();
        fs::write(&config, text).expect("write the configuration");
        // It does not start without a portmapper, which has its socket in /run.
        let mut command = network.command("unshare");
        command.args(["--mount", "--", "sh", "-c"]);
        command.arg(
            "mount -t tmpfs tmpfs /run; rpcbind -f & timeout 20 sh -c 'until [ -S /run/rpcbind.sock ]; do sleep 0.05; done'
            exec ganesha.nfsd -F -L \"$1\" -f \"$2\" -p /run/pid",
        );
        command.arg("sh").args([&log, &config]).process_group(0).stdin(Stdio::null());
        let said = File::create(scratch.path("ganesha.out")).expect("make a file");
        command.stdout(said.try_clone().expect("two of it")).stderr(said);
        installed.then(|| Self { server: command.spawn().expect("start it") })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.server.id()
    }
}

impl Drop for Ganesha {
    fn drop(&mut self) {
        // With it, the portmapper.
        let _ = kill_process_group(Pid::from_child(&self.server), Signal::KILL);
        let _ = self.server.wait();
    }
}
