use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use fastrand::Rng;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, mknodat, utimensat};

use crate::Mtime;

/// How large a tree is to be.
#[derive(Debug, Clone, Copy)]
pub struct TreeSpec {
    /// Files, at least.
    pub files: u64,
    /// Bytes in all, at least.
    pub bytes: u64,
    /// Bytes of the file [`BIG`]; 0 for none.
    pub big_bytes: u64,
}

/// The path of the big file.
pub const BIG: &str = "big file.bin";

/// More than 100 MB, and no multiple of anything.
pub const BIG_BYTES: u64 = 104_861_697;

/// The largest file that is brought without the cache.
pub const SMALL_ENOUGH: u64 = 1 << 20;

/// Makes a tree like those that people have, below `root`: sources of crates that this machine has unpacked, a big
/// file, and in `odd/` everything that file systems allow and programs trip over. Without crates, `/usr/lib`.
pub fn build_tree(root: &Path, spec: TreeSpec) {
    let mut rng = Rng::with_seed(1);
    fs::create_dir_all(root).expect("make the tree");
    let mut made = Made::default();
    if spec.big_bytes > 0 {
        write_random(&root.join(BIG), spec.big_bytes, &mut rng);
        made = Made { files: 1, bytes: spec.big_bytes };
    }
    build_odd(&root.join("odd"), &mut rng);
    for source in sources() {
        if made.files >= spec.files && made.bytes >= spec.bytes {
            return;
        }
        let name = source.file_name().expect("it has a name").to_owned();
        made.copy(&source, &root.join("sources").join(name)).expect("copy sources");
    }
    panic!("there are no {spec:?} below the cargo registry and /usr/lib, but {made:?}");
}

#[derive(Debug, Default)]
struct Made {
    files: u64,
    bytes: u64,
}

impl Made {
    fn copy(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
            if kind.is_dir() {
                self.copy(&entry.path(), &target)?;
            } else if kind.is_symlink() {
                // Directories are made only for what is in them: there are no empty ones in an arena.
                fs::create_dir_all(to)?;
                symlink(fs::read_link(entry.path())?, target)?;
            } else if kind.is_file() {
                fs::create_dir_all(to)?;
                self.bytes += fs::copy(entry.path(), &target)?;
                self.files += 1;
                let modified = entry.metadata()?.modified()?;
                File::open(&target)?.set_modified(modified)?;
            }
        }
        Ok(())
    }
}

/// Directories full of real files, in order.
fn sources() -> Vec<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let registry = home.map(|home| home.join("registry/src")).unwrap_or_default();
    let mut crates: Vec<_> = below(&registry).iter().flat_map(|index| below(index)).collect();
    crates.extend(below(Path::new("/usr/lib")));
    crates
}

fn below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut dirs: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    dirs.sort();
    dirs
}

fn build_odd(odd: &Path, rng: &mut Rng) {
    fs::create_dir_all(odd.join("dir")).expect("make a directory");
    let write = |name: &[u8], data: &[u8]| {
        let path = odd.join(OsStr::from_bytes(name));
        fs::write(&path, data).expect("write a file");
        path
    };
    for size in [1, 1023, 1024, 1025, 16383, 16384, 16385, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (4 << 20) + 1] {
        write_random(&odd.join(format!("size-{size}")), size, rng);
    }
    for name in [&b"empty"[..], b"empty too", b"dir/empty"] {
        write(name, b"");
    }
    for name in [&b"twin"[..], b"other twin", b"dir/twin"] {
        write(name, b"the same in three places");
    }
    let long = [b'n'; 255];
    for name in [&b"a:b"[..], b"a\nb", b"a b", b" ", b"-x", b"\xff\xfe", b"a\xffb", b"back\\slash", b"\x1b[31m", &long]
    {
        write(name, name);
    }
    // What is in a directory stands behind a file whose name goes on with less than a slash.
    fs::create_dir_all(odd.join("order")).expect("make a directory");
    for name in [&b"order/in"[..], b"order-file", b"order0"] {
        write(name, name);
    }
    for (name, mode) in [(&b"executable"[..], 0o755), (b"read only", 0o444), (b"private", 0o600)] {
        fs::set_permissions(write(name, name), fs::Permissions::from_mode(mode)).expect("set permissions");
    }
    set_mtime(&write(b"before 1970", b"old"), Mtime(-12_345_678, 123_456_789));
    set_mtime(&write(b"just before 1970", b"old"), Mtime(-1, 999_999_999));
    set_mtime(&write(b"in 1970", b"old"), Mtime(0, 0));
    set_mtime(&write(b"by the nanosecond", b"exact"), Mtime(1_600_000_000, 1));
    set_mtime(&write(b"in 2040", b"new"), Mtime(2_209_000_000, 999_999_999));
    fs::hard_link(write(b"hard link", b"two names"), odd.join("other hard link")).expect("make a hard link");
    for (name, target) in [
        ("link to a file", "twin"),
        ("link to a directory", "dir"),
        ("dangling", "nowhere/at all"),
        ("absolute", "/etc/passwd"),
        ("parent", ".."),
        ("dir/up", "../twin"),
        ("itself", "itself"),
    ] {
        symlink(target, odd.join(name)).expect("make a link");
    }
    mknodat(CWD, odd.join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("make a FIFO");
}

/// A file of random bytes.
pub fn write_random(path: &Path, size: u64, rng: &mut Rng) {
    let mut file = File::create(path).expect("create a file");
    let mut left = size;
    while left > 0 {
        let part = random_bytes(left.min(1 << 20), rng);
        file.write_all(&part).expect("write a file");
        left -= part.len() as u64;
    }
}

/// Random bytes.
pub fn random_bytes(size: u64, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(size).expect("it fits into memory")];
    rng.fill(&mut bytes);
    bytes
}

/// Sets when a file, or a link itself, was changed.
pub fn set_mtime(path: &Path, mtime: Mtime) {
    let time = Timespec { tv_sec: mtime.0, tv_nsec: mtime.1 as _ };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("set an mtime");
}
