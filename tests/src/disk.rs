//! A disk whose bytes change beneath its file system, as a rotting disk's do: no system call sees it, so that no time of
//! the file moves, and no watcher hears of it.

use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata},
    io::{BufRead, BufReader},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use rustix::fs::{Advice, fadvise};
use tempfile::TempDir;

use crate::{skipped, wait_for};

/// An ext4 file system in a file, mounted through a loop device. Unmounted and deleted on drop; unmounted also when the
/// test is killed.
pub struct Disk {
    /// Mounts the file system, and unmounts it once its standard input ends.
    keeper: Child,
    image: File,
    dir: TempDir,
}

impl Disk {
    /// Makes and mounts a disk. `None`, with the test noted as skipped, where that is not possible: it takes root, a loop
    /// device and e2fsprogs.
    pub fn new() -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("disk-").tempdir().expect("make a temporary directory");
        let path = dir.path().join("image");
        let image = File::options().read(true).write(true).create_new(true).open(&path).expect("make the image");
        image.set_len(DISK_BYTES).expect("make the image large");
        let mount = mount_point(&dir);
        fs::create_dir(&mount).expect("make the mount point");
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "sh"]).args([&path, &mount]);
        let mut keeper = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start a shell");
        let mut line = String::new();
        let stdout = keeper.stdout.as_mut().expect("it is a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("read what the keeper prints");
        let disk = Self { keeper, image, dir };
        if line.trim() != "ready" {
            skipped("no disk of its own can be mounted here; it takes root, a loop device and e2fsprogs");
            return None;
        }
        Some(disk)
    }

    /// The directory that the file system is mounted at.
    pub fn mount_point(&self) -> PathBuf {
        mount_point(&self.dir)
    }

    /// Flips the bits of `mask` in the byte at `offset` of a file on this disk, beneath the file system.
    ///
    /// The file's data is synced first. On return, reads give the new byte.
    #[track_caller]
    pub fn flip(&self, path: &Path, offset: u64, mask: u8) {
        self.change(path, &[offset], |byte| byte ^ mask);
    }

    /// Like [`flip`](Self::flip), but writes `bytes` from `offset` on. The file has blocks there: it ends behind them,
    /// and there is no hole.
    #[track_caller]
    pub fn write_beneath(&self, path: &Path, offset: u64, bytes: &[u8]) {
        let offsets: Vec<_> = (offset..).take(bytes.len()).collect();
        let mut bytes = bytes.iter();
        self.change(path, &offsets, |_| *bytes.next().expect("one for each offset"));
    }

    /// Flips one bit at each of `offsets` of a file, beneath the file system.
    #[track_caller]
    pub fn rot(&self, path: &Path, offsets: &[u64]) {
        let mut bits = (0..8).cycle();
        self.change(path, offsets, |byte| byte ^ 1 << bits.next().expect("they never end"));
    }

    /// Puts what `change` makes of each byte at `offsets` in its place, and checks that nothing else is to be seen of it.
    #[track_caller]
    fn change(&self, path: &Path, offsets: &[u64], mut change: impl FnMut(u8) -> u8) {
        let file = File::open(path).expect("open the file");
        // Dirty pages would be written over the change.
        file.sync_all().expect("sync the file");
        let (before, on_disk) = (seen(&file), Extents::of(path));
        let size = file.metadata().expect("look at the file").len();
        let mut blocks = BTreeMap::new();
        for &offset in offsets {
            assert!(offset < size, "{path:?} ends before {offset}");
            let start = offset / BLOCK_BYTES * BLOCK_BYTES;
            let block = blocks.entry(start).or_insert_with(|| {
                let mut block = vec![0; BLOCK_BYTES.min(size - start) as usize];
                self.image.read_exact_at(&mut block, on_disk.find(start)).expect("read the image");
                block
            });
            let byte = &mut block[(offset - start) as usize];
            *byte = change(*byte);
        }
        for (&start, block) in &blocks {
            self.image.write_all_at(block, on_disk.find(start)).expect("write the image");
        }
        // A page that somebody reads at this moment stays in the page cache: it is dropped again until it is gone.
        wait_for("the changed bytes are read", READ_LIMIT, || {
            fadvise(&file, 0, None, Advice::DontNeed).expect("drop the file's pages");
            let is_read = blocks.iter().all(|(&start, block)| {
                let mut now = vec![0; block.len()];
                file.read_exact_at(&mut now, start).expect("read the file");
                now == *block
            });
            is_read.then_some(())
        });
        assert_eq!(seen(&file), before, "rot moves nothing of {path:?}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The keeper unmounts, and ends. Whoever still has files open there keeps them until they are closed.
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

fn mount_point(dir: &TempDir) -> PathBuf {
    dir.path().join("mount")
}

/// What the file system says of a file, by which a change could be seen.
fn seen(file: &File) -> (u64, u64, u64, [SystemTime; 3], [i64; 2]) {
    let meta: Metadata = file.metadata().expect("look at the file");
    let times = [meta.modified(), meta.accessed(), meta.created()].map(|time| time.expect("ext4 has these times"));
    (meta.ino(), meta.size(), meta.blocks(), times, [meta.ctime(), meta.ctime_nsec()])
}

/// Where the blocks of a file are on its disk.
struct Extents(Vec<Extent>);

/// Block numbers: the first and the last in the file, and the first on the disk.
struct Extent(u64, u64, u64);

impl Extent {
    /// The extent of a line such as `   0:        0..      24:      32833..     32857:     25:             last,eof`.
    /// `None` for other lines, and for blocks that hold no bytes of the file.
    fn of(line: &str) -> Option<Self> {
        let mut fields = line.split(':').map(str::trim);
        let _number: u64 = fields.next()?.parse().ok()?;
        let (first, last) = fields.next()?.split_once("..")?;
        let (on_disk, _) = fields.next()?.split_once("..")?;
        let number = |text: &str| text.trim().parse().ok();
        let is_plain = !["unwritten", "inline", "delalloc", "unknown"].iter().any(|flag| line.contains(flag));
        is_plain.then_some(Self(number(first)?, number(last)?, number(on_disk)?))
    }
}

impl Extents {
    fn of(path: &Path) -> Self {
        let mut command = Command::new("filefrag");
        command.args(["-v", &format!("-b{BLOCK_BYTES}")]).arg(path);
        let output = command.env("PATH", PROGRAMS).output().expect("start filefrag");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        Self(text.lines().filter_map(Extent::of).collect())
    }

    /// Where the block that begins at `offset` of the file begins on the disk.
    fn find(&self, offset: u64) -> u64 {
        let block = offset / BLOCK_BYTES;
        let extent = self.0.iter().find(|extent| (extent.0..=extent.1).contains(&block));
        let Extent(first, _, on_disk) = extent.unwrap_or_else(|| panic!("the file has no block at {offset}"));
        (on_disk + block - first) * BLOCK_BYTES
    }
}

/// Unmounts also when the test is killed, which closes its end of the pipe; and after Ctrl-C, which goes to both of them.
const KEEPER: &str = r#"
trap "" HUP INT TERM
PATH=$PATH:/usr/sbin:/sbin
mkfs.ext4 -q -F -b 4096 -I 256 -J size=4 -E lazy_journal_init=1 "$1" && mount -o loop,noatime "$1" "$2" || exit
echo ready
cat > /dev/null
umount -l "$2"
"#;

/// Users have none of these on their path.
const PROGRAMS: &str = "/usr/sbin:/sbin:/usr/bin:/bin";

const BLOCK_BYTES: u64 = 4096;

/// More than any test writes, with what a cache leaves free by default. The image takes only what is written.
const DISK_BYTES: u64 = 4 << 30;

const READ_LIMIT: Duration = Duration::from_secs(10);
