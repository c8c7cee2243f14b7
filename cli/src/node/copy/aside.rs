//! Entries that are set aside: renamed into a directory beside them, and from there removed or put back. Nothing is ever
//! replaced by that. Names and order: spec/copy.md, "Removing".

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    time::SystemTime,
};

use namespace::{RelPath, is_leaving_name, leaving_name};
use rustix::{
    fs::{AtFlags, Dir, Mode, OFlags},
    io::Errno,
};
use tracing::{info, warn};
use tree::Fingerprint;

use super::{
    naming::rename_new,
    place::{file_name, parent_beneath},
};

/// The number of a directory for entries that are set aside, if it is called so.
pub(super) fn number(name: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(name.get(NUMBER)?).ok()?;
    is_leaving_name(name).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// Makes the directory of this number in `parent`. Returns whether the number was free.
pub(super) fn make(parent: &OwnedFd, number: u64) -> io::Result<bool> {
    match rustix::fs::mkdirat(parent, leaving_name(number), Mode::RWXU) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Removes the directory of this number from `parent`, if nothing is in it.
pub(super) fn unmake(parent: &OwnedFd, number: u64) {
    if let Err(error) = rustix::fs::unlinkat(parent, leaving_name(number), AtFlags::REMOVEDIR) {
        info!(reason = tree::reason(&error), "a directory of what is set aside stays");
    }
}

/// The open directory of this number in `parent`.
pub(super) fn open(parent: &OwnedFd, number: u64) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, leaving_name(number), flags, Mode::empty())?)
}

/// Whether `parent` has a directory of this number. A file system of the network cannot answer that from what it remembers: the
/// name was never asked for before.
pub(super) fn is_in(parent: &OwnedFd, number: u64) -> io::Result<bool> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(parent, leaving_name(number), flags, Mode::empty()) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Sets an entry of `parent` aside, into `dir`.
pub(super) fn set_aside(parent: &OwnedFd, name: &[u8], dir: &OwnedFd) -> io::Result<()> {
    Ok(rustix::fs::renameat(parent, name, dir, name)?)
}

/// Puts an entry back into `parent`, under its name; or under another one if that is taken, which it returns.
pub(super) fn put_back(dir: &OwnedFd, name: &[u8], parent: &OwnedFd) -> io::Result<Option<Vec<u8>>> {
    match rename_back(dir, name, parent, name) {
        Ok(()) => return Ok(None),
        Err(Errno::EXIST | Errno::NOTEMPTY) => {}
        Err(error) => return Err(error.into()),
    }
    for number in 1..OTHER_NAMES_MAX {
        let other = [&name[..name.len().min(OTHER_NAME_BYTES_MAX)], format!(".put-back-{number}").as_bytes()].concat();
        match rename_back(dir, name, parent, &other) {
            Ok(()) => return Ok(Some(other)),
            Err(Errno::EXIST | Errno::NOTEMPTY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EXIST.into())
}

/// Renames an entry to a name that nothing has.
fn rename_back(dir: &OwnedFd, name: &[u8], parent: &OwnedFd, new: &[u8]) -> Result<(), Errno> {
    match rename_new(dir.as_fd(), name, parent.as_fd(), new) {
        // A directory, where names can only be given to files without replacing: it replaces nothing but an empty one.
        Err(Errno::NOTDIR) => rustix::fs::renameat(dir, name, parent, new),
        done => done,
    }
}

/// Whether a directory has no entries.
pub(super) fn is_empty(parent: impl AsFd, name: &[u8]) -> io::Result<bool> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    for entry in Dir::read_from(dir)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Puts back what a program that was stopped has left in the directory `path` below `root`: all of it, or if it is not known
/// whose it is, what has been there for `older_than_s` seconds. Returns the paths.
pub(super) fn restore(root: &Path, path: &RelPath, older_than_s: u64) -> Vec<RelPath> {
    let mut restored = Vec::new();
    let restoring = restore_into(root, path, older_than_s, &mut restored);
    for path in &restored {
        info!(path = ?root.join(path.as_path()), "set aside by a move that broke off; put back");
    }
    if let Err(error) = restoring {
        warn!(path = ?root.join(path.as_path()), reason = tree::reason(&error), "what a move set aside is not put back");
    }
    restored
}

fn restore_into(root: &Path, path: &RelPath, older_than_s: u64, restored: &mut Vec<RelPath>) -> io::Result<()> {
    let parent = parent_beneath(root, path)?;
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(&parent, file_name(path), flags, Mode::empty())?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let there = File::from(rustix::fs::openat(&dir, name, flags, Mode::empty())?);
        let changed = Fingerprint::from(&there.metadata()?).ctime.seconds;
        if older_than_s > 0 && changed.saturating_add_unsigned(older_than_s) >= now.cast_signed() {
            continue;
        }
        let other = put_back(&dir, name, &parent)?;
        let name = other.as_deref().unwrap_or(name);
        let below = path.parent().map_or_else(|| name.to_owned().try_into(), |above| above.join(name));
        restored.extend(below);
    }
    if older_than_s == 0 || !restored.is_empty() {
        let _ = rustix::fs::unlinkat(&parent, file_name(path), AtFlags::REMOVEDIR);
    }
    Ok(())
}

/// The directories of entries that were set aside which are in the directory `dir` of `root` itself.
pub(super) fn found_in(root: &Path, dir: Option<&RelPath>) -> io::Result<Vec<RelPath>> {
    let absolute = dir.map_or_else(|| root.to_owned(), |dir| root.join(dir.as_path()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(absolute)? {
        let name = entry?.file_name();
        if is_leaving_name(name.as_bytes()) {
            let name = name.as_bytes();
            found.extend(dir.map_or_else(|| name.to_owned().try_into(), |dir| dir.join(name)));
        }
    }
    Ok(found)
}

/// Where the digits are in the name of such a directory.
const NUMBER: std::ops::Range<usize> = 7..23;
/// How many other names are tried for what cannot get its own back.
const OTHER_NAMES_MAX: u32 = 1000;
/// How many bytes of a name are kept in a new one that is made of it.
const OTHER_NAME_BYTES_MAX: usize = 230;

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::fs::CWD;

    use super::*;

    fn opened(path: &Path) -> OwnedFd {
        rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).unwrap()
    }

    #[test]
    fn what_is_put_back_replaces_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        let parent = opened(temp.path());
        assert_eq!((number(leaving_name(7).as_bytes()), number(b".blobd-7.leaving")), (Some(7), None));
        assert!(make(&parent, 7).unwrap() && !make(&parent, 7).unwrap());
        assert!(is_in(&parent, 7).unwrap() && !is_in(&parent, 8).unwrap());
        let dir = open(&parent, 7).unwrap();
        fs::write(at("file"), b"one").unwrap();
        set_aside(&parent, b"file", &dir).unwrap();
        assert!(!at("file").exists());
        assert_eq!(put_back(&dir, b"file", &parent).unwrap(), None);
        assert_eq!(fs::read(at("file")).unwrap(), b"one");
        for taken in [b"two", b"six"] {
            set_aside(&parent, b"file", &dir).unwrap();
            fs::write(at("file"), taken).unwrap();
            assert!(put_back(&dir, b"file", &parent).unwrap().is_some());
        }
        let read = |name: &str| String::from_utf8(fs::read(at(name)).unwrap()).unwrap();
        assert_eq!((&*read("file"), &*read("file.put-back-1"), &*read("file.put-back-2")), ("six", "one", "two"));
        unmake(&parent, 7);
        assert!(!is_in(&parent, 7).unwrap());
    }

    #[test]
    fn what_was_left_is_put_back_once_it_is_old_enough() {
        let temp = tempfile::tempdir().unwrap();
        let (at, parent) = (|name: &str| temp.path().join(name), opened(temp.path()));
        make(&parent, 7).unwrap();
        let dir = open(&parent, 7).unwrap();
        fs::write(at("file"), b"one").unwrap();
        fs::create_dir(at("empty")).unwrap();
        for name in [&b"file"[..], b"empty"] {
            set_aside(&parent, name, &dir).unwrap();
        }
        let path = RelPath::try_from(&*leaving_name(7)).unwrap();
        assert_eq!(found_in(temp.path(), None).unwrap(), std::slice::from_ref(&path));
        assert_eq!(restore(temp.path(), &path, 600), []);
        assert!(!at("file").exists());
        assert_eq!(restore(temp.path(), &path, 0).len(), 2);
        assert!(at("file").exists() && at("empty").is_dir() && !is_in(&parent, 7).unwrap());
    }
}
