use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{Mirrored, Mounted, Scratch, Volume};

/// A kind of file system that a test can mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystemKind {
    /// On a loop device.
    Ext4,
    /// On a loop device.
    Btrfs,
    /// On a loop device.
    Xfs,
    /// In memory.
    Tmpfs,
    /// One directory over another one.
    Overlay,
    /// On a loop device, by way of FUSE: no ctime, and one entry for names that differ in case alone.
    Exfat,
    /// A directory shown by its server through pipes: no ctime, and whole seconds.
    Sshfs,
    /// A directory shown by way of FUSE.
    Bindfs,
}

/// An empty file system that can be unmounted and mounted again. Unmounted on drop.
pub struct FileSystem {
    kind: FileSystemKind,
    root: PathBuf,
    beneath: PathBuf,
    shown: Option<Shown>,
    // Dropped behind what is mounted of them.
    memory: Option<Mounted>,
    volume: Option<Volume>,
}

/// What is unmounted on drop.
enum Shown {
    Mounted { _mounted: Mounted },
    Mirrored { _mirrored: Mirrored },
}

impl FileSystem {
    /// Makes a file system and mounts it in `scratch`. If that cannot be done here, returns why.
    ///
    /// A mirrored directory has one file, `first`: without one nothing tells when it is mounted.
    pub fn new(kind: FileSystemKind, scratch: &Scratch) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("mounting needs root".into());
        }
        let (root, beneath) = (scratch.dir("docs"), scratch.dir("beneath"));
        let mut this = Self { kind, root, beneath, shown: None, memory: None, volume: None };
        let image = scratch.path("image");
        match kind {
            FileSystemKind::Ext4 => this.volume = Some(Volume::formatted(&image, 64 << 20, &["mkfs.ext4", "-qF"])?),
            FileSystemKind::Btrfs => this.volume = Some(Volume::formatted(&image, 128 << 20, &["mkfs.btrfs", "-q"])?),
            FileSystemKind::Xfs => this.volume = Some(Volume::formatted(&image, 320 << 20, &["mkfs.xfs", "-q"])?),
            FileSystemKind::Exfat => this.volume = Some(Volume::formatted(&image, 64 << 20, &["mkfs.exfat"])?),
            FileSystemKind::Tmpfs => {
                this.memory = Some(Mounted::by(&["mount", "-t", "tmpfs", "tmpfs"], &this.beneath)?)
            }
            FileSystemKind::Overlay => {
                for name in ["lower", "upper", "work"] {
                    scratch.dir(&format!("beneath/{name}"));
                }
            }
            FileSystemKind::Sshfs | FileSystemKind::Bindfs => {
                fs::write(this.beneath.join("first"), "first").map_err(|error| error.to_string())?;
            }
        }
        this.try_mount()?;
        let _ = fs::remove_dir(this.root.join("lost+found"));
        Ok(this)
    }

    /// The mount point.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes it away, with everything on it; the mount point stays, empty.
    pub fn unmount(&mut self) {
        self.shown = None;
    }

    /// Mounts it again, as it was.
    #[track_caller]
    pub fn mount(&mut self) {
        self.try_mount().expect("it could be mounted before");
    }

    fn try_mount(&mut self) -> Result<(), String> {
        let (root, beneath) = (&self.root, &self.beneath);
        let mounted = |command: &[&str]| Mounted::by(command, root).map(|_mounted| Shown::Mounted { _mounted });
        let mirrored = |kind| Mirrored::mirror(kind, beneath, root).map(|_mirrored| Shown::Mirrored { _mirrored });
        let device = self.volume.as_ref().map_or("", Volume::device);
        let below = beneath.display();
        self.shown = Some(match self.kind {
            FileSystemKind::Ext4 | FileSystemKind::Btrfs | FileSystemKind::Xfs => mounted(&["mount", device])?,
            FileSystemKind::Exfat => mounted(&["mount.exfat-fuse", device])?,
            // Its content ends with the last mount: there is one more.
            FileSystemKind::Tmpfs => mounted(&["mount", "--bind", &below.to_string()])?,
            FileSystemKind::Overlay => {
                let dirs = format!("lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work");
                mounted(&["mount", "-t", "overlay", "overlay", "-o", &dirs])?
            }
            FileSystemKind::Sshfs => mirrored("sshfs")?,
            FileSystemKind::Bindfs => mirrored("bindfs")?,
        });
        Ok(())
    }
}
