//! What is mounted where, as /proc/self/mountinfo tells it. Looking it up touches no mount, so that one whose server is gone
//! holds nobody up.

use std::{
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use blobstore::fs_type;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};
use tokio::sync::watch;
use tracing::warn;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// The mount's number, never used twice at a time.
    pub(super) id: u64,
    /// The number of the mount that it is on.
    parent: u64,
    /// Major and minor number of the file system's device.
    pub(super) device: (u32, u32),
    /// The path within the file system that is mounted.
    pub(super) within: Vec<u8>,
    /// Where it is mounted.
    pub(super) point: PathBuf,
    /// The file system's type, such as `ext4` or `fuse.sshfs`.
    pub(super) kind: Vec<u8>,
    /// What is mounted: a device, `host:/directory`, or a name without meaning.
    pub(super) source: Vec<u8>,
}

/// All mounts of this process's mount namespace, as of one moment.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mounts(Vec<Mount>);

impl Mounts {
    /// Understands the text of /proc/self/mountinfo. Lines that are none are left out.
    fn parse(text: &[u8]) -> Self {
        Self(text.split(|&byte| byte == b'\n').filter_map(parse_line).collect())
    }

    /// Returns the mount that shows what is at `path`, which is absolute and without symbolic links.
    pub(super) fn covering(&self, path: &Path) -> Option<&Mount> {
        let is_root = |mount: &&Mount| self.0.iter().all(|other| other.id != mount.parent || other.id == mount.id);
        let mut at = self.0.iter().filter(is_root).find(|mount| path.starts_with(&mount.point))?;
        // Each step goes to another mount: as many as there are will do.
        for _ in 0..self.0.len() {
            let on = self.on(at).filter(|mount| path.starts_with(&mount.point));
            match on.min_by_key(|mount| mount.point.as_os_str().len()) {
                Some(next) => at = next,
                None => break,
            }
        }
        Some(at)
    }

    /// Returns what is mounted below `dir`, which is absolute and without symbolic links, and can be seen: each mount point
    /// once, with the mount that is on top there.
    pub(super) fn below(&self, dir: &Path) -> Vec<&Mount> {
        let mut found = Vec::new();
        let mut around: Vec<&Mount> = self.covering(dir).into_iter().collect();
        // A mount is on one other: none is met twice.
        while let Some(outer) = around.pop() {
            let on: Vec<&Mount> =
                self.on(outer).filter(|mount| mount.point.starts_with(dir) && mount.point != dir).collect();
            let is_hidden = |mount: &Mount| {
                on.iter().any(|other| mount.point != other.point && mount.point.starts_with(&other.point))
            };
            for &mount in on.iter().filter(|mount| !is_hidden(mount)) {
                around.push(mount);
                if !self.on(mount).any(|top| top.point == mount.point) {
                    found.push(mount);
                }
            }
            if found.len() + around.len() > self.0.len() {
                break;
            }
        }
        found.sort_by(|a, b| a.point.cmp(&b.point));
        found
    }

    /// The mounts that are directly on another.
    fn on<'a>(&'a self, outer: &'a Mount) -> impl Iterator<Item = &'a Mount> {
        self.0.iter().filter(|mount| mount.parent == outer.id && mount.id != outer.id)
    }

    /// Returns what of the mounts concerns the arena root `dir`. While it is the same, no mount moved there.
    pub(super) fn around(&self, dir: &Path) -> Vec<(u64, PathBuf)> {
        let mounts = self.covering(dir).into_iter().chain(self.below(dir));
        mounts.map(|mount| (mount.id, mount.point.clone())).collect()
    }
}

impl Mount {
    /// Whether this only stands for a file system that will be mounted when somebody looks at it.
    pub(super) fn is_automatic(&self) -> bool {
        self.kind == b"autofs"
    }

    /// Returns the path within the file system that is shown at `path`, which is at or below the mount point.
    pub(super) fn path_within(&self, path: &Path) -> Vec<u8> {
        let below = path.strip_prefix(&self.point).unwrap_or(Path::new(""));
        let root = Path::new(std::ffi::OsStr::new("/"));
        let within = PathBuf::from(std::ffi::OsString::from_vec(self.within.clone()));
        // Without a slash at the end.
        root.join(within).join(below).components().collect::<PathBuf>().into_os_string().into_vec()
    }
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`: id, parent, device, path within, mount point, options,
/// any number of other fields, `-`, type, source, options.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut next = || fields.next();
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
    let (id, parent) = (number(next()?)?, number(next()?)?);
    let (major, minor) = std::str::from_utf8(next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let within = unescaped(next()?);
    let point = PathBuf::from(std::ffi::OsString::from_vec(unescaped(next()?)));
    while next()? != b"-" {}
    let (kind, source) = (unescaped(next()?), unescaped(next().unwrap_or_default()));
    point.is_absolute().then_some(Mount { id, parent, device, within, point, kind, source })
}

/// Space, tab, line break, backslash and `#` stand there as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let (mut plain, mut rest) = (Vec::with_capacity(field.len()), field);
    while let Some((&byte, behind)) = rest.split_first() {
        let octal = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        plain.push(octal.unwrap_or(byte));
        rest = if octal.is_some() { &rest[4..] } else { behind };
    }
    plain
}

/// The mounts as they are now, read again only when they moved.
#[derive(Debug, Default)]
pub(in super::super) struct MountTable(Mutex<Option<(OwnedFd, Arc<Mounts>)>>);

impl MountTable {
    /// Returns what of the mounts concerns the arena root `dir`, as [`Mounts::around`]; `None` if the system does not tell.
    pub(in super::super) fn around(&self, dir: &Path) -> Option<Vec<(u64, PathBuf)>> {
        Some(self.now().ok()?.around(dir))
    }

    /// The type of a file system at or below `dir` that does not report changes by other machines; `None` if there is none.
    /// `dir` has no symbolic links.
    pub(in super::super) fn silent(&self, dir: &Path) -> Option<String> {
        let mounts = self.now().ok()?;
        let below = mounts.below(dir);
        let mut all = mounts.covering(dir).into_iter().chain(below);
        let silent = all.find(|mount| fs_type::hides_remote_changes(&mount.kind))?;
        Some(String::from_utf8_lossy(&silent.kind).into_owned())
    }

    /// Returns the mounts as they are now.
    pub(super) fn now(&self) -> io::Result<Arc<Mounts>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((fd, mounts)) = &*state
            && !moved(fd)?
        {
            return Ok(mounts.clone());
        }
        // Opened before it is read: what moves meanwhile is noticed the next time.
        let file = File::open(MOUNTINFO)?;
        let mut text = Vec::new();
        (&file).take(MOUNTINFO_BYTES_MAX).read_to_end(&mut text)?;
        let mounts = Arc::new(Mounts::parse(&text));
        *state = Some((file.into(), mounts.clone()));
        Ok(mounts)
    }
}

/// Whether a mount moved since the file was opened, or asked last.
fn moved(mountinfo: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(mountinfo, PollFlags::PRI)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(fds[0].revents().intersects(PollFlags::PRI | PollFlags::ERR))
}

/// Tells whenever a mount moved, by a thread that waits for that. Dropping it ends the thread.
#[derive(Debug)]
pub(in super::super) struct MountEvents {
    moves: watch::Receiver<()>,
    wake: Arc<OwnedFd>,
}

impl MountEvents {
    /// Hears from now on.
    pub(in super::super) fn new() -> io::Result<Self> {
        let mountinfo = OwnedFd::from(File::open(MOUNTINFO)?);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (telling, moves) = watch::channel(());
        let waking = wake.clone();
        let hear = move || {
            loop {
                let mut fds = [PollFd::new(&mountinfo, PollFlags::PRI), PollFd::new(&*waking, PollFlags::IN)];
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => {
                        let reason = tree::reason(&io::Error::from(error));
                        return warn!(reason, "mounts are watched no longer; changes there are found by rescans");
                    }
                }
                let [moved, woken] = fds.map(|fd| !fd.revents().is_empty());
                if woken {
                    return;
                }
                if moved {
                    telling.send_replace(());
                    // Mounts often move together.
                    thread::sleep(TOGETHER);
                }
            }
        };
        thread::Builder::new().name("mounts".to_owned()).spawn(hear)?;
        Ok(Self { moves, wake })
    }

    /// Waits until a mount moved; of many moves in a moment, for one.
    pub(in super::super) async fn next(&mut self) {
        if self.moves.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

impl Drop for MountEvents {
    fn drop(&mut self) {
        // It fails only if it was woken 2^64 - 2 times, and is awake then.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

const MOUNTINFO: &str = "/proc/self/mountinfo";
/// Some hundred thousand mounts; what is behind is not seen.
const MOUNTINFO_BYTES_MAX: u64 = 64 << 20;
/// Between one piece of news and the next.
const TOGETHER: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(lines: &[&str]) -> Mounts {
        Mounts::parse(lines.join("\n").as_bytes())
    }

    #[test]
    fn lines_as_the_kernel_writes_them() {
        let [plain, escaped, odd] = &mounts(&[
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue",
            r"37 36 0:52 / /a\040b\011\134\012c rw - fuse.sshfs me@host:/d\040e rw",
            "38 36 0:53 / /n rw -  none rw",
            "no mount",
            "39 x 0:53 / /n rw - tmpfs none rw",
            "40 36 0:53 / relative rw - tmpfs none rw",
            "41 36 0:53 / /n rw",
            "",
        ])
        .0[..] else {
            panic!("three lines are mounts")
        };
        let (within, point) = (b"/mnt1".to_vec(), "/mnt2".into());
        let expected = Mount {
            id: 36,
            parent: 35,
            device: (98, 0),
            within,
            point,
            kind: b"ext3".to_vec(),
            source: b"/dev/root".to_vec(),
        };
        assert_eq!(*plain, expected);
        assert_eq!((&escaped.point, &escaped.source[..]), (&"/a b\t\\\nc".into(), &b"me@host:/d e"[..]));
        assert_eq!((&odd.kind[..], &odd.source[..]), (&b""[..], &b"none"[..]));
        assert_eq!(plain.path_within(Path::new("/mnt2")), b"/mnt1");
        assert_eq!(plain.path_within(Path::new("/mnt2/a/b")), b"/mnt1/a/b");
        assert_eq!(escaped.path_within(Path::new("/a b\t\\\nc")), b"/");
        assert_eq!(unescaped(br"\04\400\1"), br"\04\400\1");
    }

    #[test]
    fn which_mount_shows_a_path() {
        let mounts = mounts(&[
            "1 0 8:1 / / rw - ext4 /dev/a rw",
            "2 1 8:2 / /home rw - ext4 /dev/b rw",
            "3 2 8:3 / /home/u/d/usb rw - vfat /dev/c rw",
            // On top of the one before, at the same point.
            "4 3 8:4 / /home/u/d/usb rw - vfat /dev/e rw",
            "5 4 8:5 / /home/u/d/usb/in rw - tmpfs t rw",
            // Hidden by what was mounted above it later.
            "6 2 8:6 / /home/u/d/x/y rw - tmpfs t rw",
            "7 2 8:7 / /home/u/d/x rw - tmpfs t rw",
            "8 2 8:8 / /home/u/d-2 rw - tmpfs t rw",
            // Hidden as a whole.
            "9 1 8:9 / /home/u/d/z rw - tmpfs t rw",
        ]);
        for (path, id) in [
            ("/etc", 1),
            ("/home", 2),
            ("/home/u/d", 2),
            ("/home/u/d/usb", 4),
            ("/home/u/d/usb/file", 4),
            ("/home/u/d/usb/in/x", 5),
            ("/home/u/d/x/y/z", 7),
            ("/home/u/d-2", 8),
            ("/home/u/d-22", 2),
            ("/home/u/d/z", 2),
        ] {
            assert_eq!(mounts.covering(Path::new(path)).map(|mount| mount.id), Some(id), "{path}");
        }
        let below = |dir: &str| mounts.below(Path::new(dir)).iter().map(|mount| mount.id).collect::<Vec<_>>();
        assert_eq!(below("/home/u/d"), [4, 5, 7]);
        assert_eq!(below("/home/u/d/usb"), [5]);
        assert_eq!(below("/home/u/d/x"), [0; 0]);
        assert_eq!(below("/home"), [4, 5, 7, 8]);
        assert_eq!(below("/etc"), [0; 0]);
        let around = |dir: &str| mounts.around(Path::new(dir)).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert_eq!(around("/home/u/d"), [2, 4, 5, 7]);
    }

    /// Whatever the kernel, or a file in its place, says: it ends.
    #[test]
    fn mounts_in_a_circle() {
        let circle = mounts(&[
            "1 0 8:1 / / rw - ext4 a rw",
            "2 1 8:1 / /d rw - ext4 a rw",
            "3 4 8:1 / /d/x rw - ext4 a rw",
            "4 3 8:1 / /d/x rw - ext4 a rw",
            "5 5 8:1 / /d/x rw - ext4 a rw",
        ]);
        assert_eq!(circle.covering(Path::new("/d/x")).map(|mount| mount.id), Some(2));
        assert!(circle.below(Path::new("/d")).is_empty());
        assert!(mounts(&[]).covering(Path::new("/")).is_none());
    }

    #[test]
    fn the_table_is_this_machine_s() {
        let table = MountTable::default();
        let mounts = table.now().unwrap();
        assert!(mounts.covering(Path::new("/proc/self")).is_some_and(|mount| mount.kind == b"proc"));
        assert_eq!(table.now().unwrap(), mounts);
        MountEvents::new().unwrap();
    }
}
