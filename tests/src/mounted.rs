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
        Self::formatted(image, 16 << 20, &["mkfs.ext4", "-q", "-F", "-m", "0"]).expect("make a file system")
    }

    /// A file system of so many bytes, made by a program that is given the image last. If that cannot be done here, returns why.
    pub fn formatted(image: &Path, bytes: u64, program: &[&str]) -> Result<Self, String> {
        fs::File::create(image).and_then(|file| file.set_len(bytes)).expect("make an image");
        run(program[0], &[&program[1..], &[&text(image)[..]]].concat())?;
        Ok(Self { image: image.to_owned(), device: try_attach(image)? })
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

    /// What a program mounts that is given the directory last. If that cannot be done here, returns why.
    pub fn by(command: &[&str], dir: &Path) -> Result<Self, String> {
        run(command[0], &[&command[1..], &[&text(dir)[..]]].concat())?;
        Ok(Self(dir.to_owned()))
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
    Mounted::by(&[&["mount"], args].concat(), dir).expect("mount")
}

fn attach(image: &Path) -> String {
    try_attach(image).expect("attach a loop device")
}

fn try_attach(image: &Path) -> Result<String, String> {
    Ok(run("losetup", &["-f", "--show", &text(image)])?.trim().to_owned())
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
