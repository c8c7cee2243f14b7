use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

/// Everything below a directory, by path.
pub type Tree = BTreeMap<Vec<u8>, Item>;

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// What its bytes are, said by the blake3 crate.
        blob: blake3::Hash,
        /// The permission bits.
        mode: u32,
        /// When it was changed.
        mtime: Mtime,
    },
    /// A symbolic link.
    Symlink {
        /// What it says.
        target: Vec<u8>,
        /// When it was made.
        mtime: Mtime,
    },
    /// A directory.
    Directory,
    /// Anything else.
    Special,
}

/// Seconds since 1970, rounded down, and nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mtime(pub i64, pub i64);

impl std::fmt::Debug for Mtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}+{:09}ns", self.0, self.1)
    }
}

impl Mtime {
    /// Reads what `--json` output says, which must have all nine digits of the nanoseconds.
    #[track_caller]
    pub fn from_json(text: &str) -> Self {
        assert!(text.ends_with('Z') && text.rsplit('.').next().map(str::len) == Some(10), "{text:?}");
        let nanos = text.parse::<jiff::Timestamp>().expect("RFC 3339").as_nanosecond();
        let (seconds, nanos) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000));
        Self(i64::try_from(seconds).expect("within the years that there are"), nanos as i64)
    }
}

/// Reads all that is below `root`; the directory itself is left out, and so is what goes meanwhile.
pub fn snapshot(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && dir != root => continue,
            entries => entries.expect("read a directory"),
        };
        for entry in entries {
            let path = entry.expect("read a directory").path();
            let item = match look(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                item => item.expect("look at a file"),
            };
            if item == Item::Directory {
                dirs.push(path.clone());
            }
            let below = path.strip_prefix(root).expect("it is below the root");
            tree.insert(below.as_os_str().as_bytes().to_owned(), item);
        }
    }
    tree
}

fn look(path: &Path) -> io::Result<Item> {
    let meta = fs::symlink_metadata(path)?;
    let mtime = Mtime(meta.mtime(), meta.mtime_nsec());
    Ok(if meta.is_dir() {
        Item::Directory
    } else if meta.is_symlink() {
        Item::Symlink { target: fs::read_link(path)?.as_os_str().as_bytes().to_owned(), mtime }
    } else if meta.is_file() {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        Item::File { size: meta.len(), blob: hasher.finalize(), mode: meta.mode() & 0o7777, mtime }
    } else {
        Item::Special
    })
}

/// In what two trees differ, a line each, at most 20; none if they are the same.
pub fn differences(left: &Tree, right: &Tree) -> Vec<String> {
    let paths: std::collections::BTreeSet<_> = left.keys().chain(right.keys()).collect();
    let differing = paths.into_iter().filter(|path| left.get(*path) != right.get(*path));
    let line =
        |path: &Vec<u8>| format!("{:?}: {:?} / {:?}", String::from_utf8_lossy(path), left.get(path), right.get(path));
    differing.take(20).map(line).collect()
}

/// Reads what of a tree is indexed: all but special files.
pub fn indexed(root: &Path) -> Tree {
    let mut tree = snapshot(root);
    tree.retain(|_, item| *item != Item::Special);
    tree
}

/// A tree in which all symbolic links are of one time.
pub fn without_link_times(mut tree: Tree) -> Tree {
    for item in tree.values_mut() {
        if let Item::Symlink { mtime, .. } = item {
            *mtime = Mtime(0, 0);
        }
    }
    tree
}
