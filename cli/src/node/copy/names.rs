//! What the names of a file system mean: some take two for one, in upper and lower case or in another form of the same letters.

use std::{
    collections::HashSet,
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use blobstore::fs_type::has_names_of_bytes;
use namespace::RelPath;
use rustix::{
    fs::{AtFlags, CWD, Dir, Mode, OFlags},
    io::Errno,
};

/// Directories of which the entries above them are known to be called just so.
#[derive(Clone, Default)]
pub(super) struct Exact(Arc<Mutex<HashSet<RelPath>>>);

impl Exact {
    /// Looks whether every entry on the way to `path` that is there is called just as `path` says. Returns the first that is
    /// not. Blocks.
    pub(super) fn first_other_name(&self, root: &Path, path: &RelPath) -> io::Result<Option<RelPath>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut way: Vec<RelPath> = std::iter::successors(Some(path.clone()), RelPath::parent).collect();
        way.reverse();
        let begin = way.iter().rposition(|path| known.contains(path));
        let mut dir = rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        if let Some(begin) = begin {
            dir = rustix::fs::openat(&dir, way[begin].as_path(), flags, Mode::empty())?;
        }
        for step in way.drain(begin.map_or(0, |begin| begin + 1)..) {
            let name = super::place::file_name(&step);
            if !is_exact(&dir, name)? {
                return Ok(Some(step));
            }
            if step == *path {
                break;
            }
            dir = match rustix::fs::openat(&dir, name, flags, Mode::empty()) {
                Ok(next) => next,
                // Nothing is there, or nothing to go into: others say so.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => break,
                Err(error) => return Err(error.into()),
            };
            if known.len() < KNOWN_MAX {
                known.insert(step);
            }
        }
        Ok(None)
    }
}

/// Whether what is found in `dir` by a name, if anything is, is called just so there.
fn is_exact(dir: &OwnedFd, name: &[u8]) -> io::Result<bool> {
    let look = |name: &[u8]| match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some((stat.st_dev, stat.st_ino))),
        Err(Errno::NOENT | Errno::NAMETOOLONG | Errno::ILSEQ | Errno::INVAL) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    let Some(found) = look(name)? else { return Ok(true) };
    let swapped: Vec<u8> = name.iter().map(|&b| if b.is_ascii_alphabetic() { b ^ 0x20 } else { b }).collect();
    // Where upper and lower case differ, as nearly everywhere, that is one look-up more.
    let knows_bytes = knows_bytes(dir)?;
    // Inodes may be invented for each name, but not where names are bytes.
    let is_like = |swapped| swapped == found || !knows_bytes;
    let is_suspicious = (swapped != name && look(&swapped)?.is_some_and(is_like)) || (!name.is_ascii() && !knows_bytes);
    if !is_suspicious {
        return Ok(true);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    for entry in Dir::read_from(rustix::fs::openat(dir, ".", flags, Mode::empty())?)? {
        if entry?.file_name().to_bytes() == name {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether to the file system of a directory names are bytes, as far as that is known.
fn knows_bytes(dir: &OwnedFd) -> io::Result<bool> {
    if !has_names_of_bytes(dir)? {
        return Ok(false);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(dir, ".", flags, Mode::empty())?;
    Ok(rustix::fs::ioctl_getflags(&dir).is_ok_and(|flags| flags.bits() & CASEFOLD == 0))
}

/// `FS_CASEFOLD_FL`
const CASEFOLD: u32 = 0x4000_0000;
/// How many directories are remembered.
const KNOWN_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn names_are_bytes_here() {
        let temp = tempfile::tempdir().unwrap();
        let path = |path: &str| RelPath::try_from(path).unwrap();
        fs::create_dir_all(temp.path().join("Dir/b")).unwrap();
        fs::write(temp.path().join("Dir/b/\u{e4}"), b"").unwrap();
        // Another name of the same file, which is no other form of this one.
        fs::write(temp.path().join("File"), b"").unwrap();
        fs::hard_link(temp.path().join("File"), temp.path().join("fILE")).unwrap();
        let exact = Exact::default();
        for there in ["Dir", "Dir/b/\u{e4}", "Dir/b/missing", "dir/b", "missing/x", "File", "fILE", "File/x", "7"] {
            assert_eq!(exact.first_other_name(temp.path(), &path(there)).unwrap(), None, "{there}");
        }
    }
}
