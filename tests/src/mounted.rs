use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::skipped;

/// A file system in a file, on a loop device. Detached when it is dropped.
pub struct Volume {
    image: PathBuf,
    device: String,
}

/// A mount, taken away when it is dropped.
pub struct Mounted(PathBuf);

/// Whether this process may mount; if not, says that the test is left out.
pub fn may_mount() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    let may = is_root && Path::new("/dev/loop-control").exists() && run("mkfs.ext4", &["-V"]).is_ok();
    if !may {
        skipped("it mounts: needs root, loop devices and mkfs.ext4");
    }
    may
}

impl Volume {
    /// An ext4 of 16 MiB with nothing in it but `lost+found`.
    pub fn new(image: &Path) -> Self {
        fs::File::create(image).and_then(|file| file.set_len(16 << 20)).expect("make an image");
        run("mkfs.ext4", &["-q", "-F", "-m", "0", &text(image)]).expect("make a file system");
        let device = attach(image);
        Self { image: image.to_owned(), device }
    }

    /// The loop device that it is on now.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Puts it on another loop device, which has another number.
    pub fn move_to_another_device(&mut self) {
        let old = std::mem::replace(&mut self.device, attach(&self.image));
        run("losetup", &["-d", &old]).expect("detach a loop device");
    }

    /// Mounts it.
    pub fn mount(&self, dir: &Path) -> Mounted {
        mount(&[&self.device], dir)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = run("losetup", &["-d", &self.device]);
    }
}

impl Mounted {
    /// A new and empty file system in memory.
    pub fn memory(dir: &Path) -> Self {
        mount(&["-t", "tmpfs", "tmpfs"], dir)
    }

    /// What is at `source`, once more.
    pub fn bind(source: &Path, dir: &Path) -> Self {
        mount(&["--bind", &text(source)], dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A daemon may have a file open there at this moment.
        let _ = run("umount", &["-l", &text(&self.0)]);
    }
}

fn mount(args: &[&str], dir: &Path) -> Mounted {
    run("mount", &[args, &[&text(dir)[..]]].concat()).expect("mount");
    Mounted(dir.to_owned())
}

fn attach(image: &Path) -> String {
    run("losetup", &["-f", "--show", &text(image)]).expect("attach a loop device").trim().to_owned()
}

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(said(&output.stdout)),
        false => Err(format!("{program} {args:?}: {}", said(&output.stderr))),
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("a path of a test is UTF-8").to_owned()
}
