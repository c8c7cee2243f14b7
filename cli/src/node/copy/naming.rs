//! Giving a finished file its name, which nothing must have, on any file system. Rules: spec/copy.md, "File systems".

use std::os::fd::BorrowedFd;

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Stat},
    io::Errno,
};

/// Renames the file `from` in `dir` to `name` in `parent`. Fails with [`Errno::EXIST`] if something has that name, and then
/// changes nothing.
pub(super) fn rename_new(dir: BorrowedFd<'_>, from: &[u8], parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::renameat_with(dir, from, parent, name, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        done => return done,
    }
    match link_new(dir, from, parent, name) {
        Err(Errno::PERM | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::MLINK) => {}
        done => return done,
    }
    replace_placeholder(dir, from, parent, name)
}

/// The same where a file system cannot rename without replacing: by a second name.
fn link_new(dir: BorrowedFd<'_>, from: &[u8], parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    rustix::fs::linkat(dir, from, parent, name, AtFlags::empty())?;
    // If the first name stays, the sweep removes it: the file has its true name.
    let _ = rustix::fs::unlinkat(dir, from, AtFlags::empty());
    Ok(())
}

/// The same where files have one name only: an empty file takes the name, and is replaced if it is still that file, and
/// still empty.
fn replace_placeholder(dir: BorrowedFd<'_>, from: &[u8], parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let placeholder = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?;
    let ours = rustix::fs::fstat(&placeholder)?;
    let is_ours = || {
        let there = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
        there.is_ok_and(|there| is_placeholder(&ours, &there))
    };
    if !is_ours() {
        return Err(Errno::EXIST);
    }
    rustix::fs::renameat(dir, from, parent, name).inspect_err(|_| {
        if is_ours() {
            let _ = rustix::fs::unlinkat(parent, name, AtFlags::empty());
        }
    })
}

/// Whether `there` is the empty file `ours`, to which nobody has written.
fn is_placeholder(ours: &Stat, there: &Stat) -> bool {
    let is_file = FileType::from_raw_mode(there.st_mode) == FileType::RegularFile;
    is_file && (there.st_dev, there.st_ino, there.st_size) == (ours.st_dev, ours.st_ino, 0)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd};

    use rustix::fs::CWD;

    use super::*;

    /// Each way gives a free name and leaves one that is taken alone.
    #[test]
    fn a_name_is_given_once_by_each_way() {
        type Way = fn(BorrowedFd<'_>, &[u8], BorrowedFd<'_>, &[u8]) -> Result<(), Errno>;
        let ways: [Way; 3] = [rename_new, link_new, replace_placeholder];
        for way in ways {
            let root = tempfile::tempdir().unwrap();
            let path = |name: &str| root.path().join(name);
            let dir = rustix::fs::openat(CWD, root.path(), OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).unwrap();
            fs::write(path("staged"), b"new").unwrap();
            way(dir.as_fd(), b"staged", dir.as_fd(), b"free").unwrap();
            assert_eq!(fs::read(path("free")).unwrap(), b"new");
            assert!(!path("staged").exists());
            fs::write(path("empty"), b"").unwrap();
            fs::create_dir(path("directory")).unwrap();
            std::os::unix::fs::symlink("nowhere", path("link")).unwrap();
            for taken in ["free", "empty", "directory", "link"] {
                fs::write(path("staged"), b"other").unwrap();
                assert_eq!(way(dir.as_fd(), b"staged", dir.as_fd(), taken.as_bytes()), Err(Errno::EXIST), "{taken}");
            }
            assert_eq!(fs::read(path("free")).unwrap(), b"new");
            assert_eq!(fs::read(path("empty")).unwrap(), b"");
            // What cannot be renamed leaves nothing.
            assert_eq!(way(dir.as_fd(), b"missing", dir.as_fd(), b"later"), Err(Errno::NOENT));
            assert!(!path("later").exists());
        }
    }

    #[test]
    fn only_an_untouched_placeholder_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let stat = |name: &str| rustix::fs::lstat(path(name)).unwrap();
        fs::write(path("ours"), b"").unwrap();
        let ours = stat("ours");
        assert!(is_placeholder(&ours, &ours));
        fs::write(path("others"), b"").unwrap();
        assert!(!is_placeholder(&ours, &stat("others")), "another file took its name");
        fs::write(path("ours"), b"x").unwrap();
        assert!(!is_placeholder(&ours, &stat("ours")), "somebody wrote to it");
        std::os::unix::fs::symlink("ours", path("link")).unwrap();
        assert!(!is_placeholder(&ours, &stat("link")));
    }
}
