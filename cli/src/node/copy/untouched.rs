//! Whether what is to leave is still what was looked at: asked again right before each step that cannot be taken back.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use blobstore::{FileRow, fs_type::is_remote, is_open_for_writing};
use namespace::RelPath;
use rustix::fs::{AtFlags, Mode, OFlags};
use tree::{BlobId, Fingerprint};

use super::{
    aside,
    moving::{SetAside, What},
    place::{file_name, fingerprint_at},
};

/// Looks at an entry that was renamed. Returns what it is like now, or why it is not what was checked.
pub(super) fn see_aside(
    dir: &OwnedFd,
    path: &RelPath,
    open: Option<&File>,
    what: What,
) -> io::Result<Result<Fingerprint, &'static str>> {
    let after = fingerprint_at(dir, path)?;
    Ok(match what {
        What::Directory if !aside::is_empty(dir, file_name(path))? => Err("something was put into it meanwhile"),
        What::Directory => Ok(after),
        What::File { before, .. } | What::Symlink { before } if before.drift(&after).is_other_file() => Err(EDITED),
        What::Symlink { .. } => Ok(after),
        What::File { .. } => match open {
            Some(open) if !is_unchanged(Some(after), &Fingerprint::from(&open.metadata()?), dir)? => Err(EDITED),
            Some(open) if is_open_for_writing(open) == Some(true) => Err(WRITTEN),
            _ => Ok(after),
        },
    })
}

/// Removes what was set aside into `dir`. Returns what a file is like that has other names; `None` if it is not what it was, and
/// so not removed.
pub(super) fn unlink(dir: &OwnedFd, path: &RelPath, set_aside: &SetAside) -> io::Result<Option<Option<Fingerprint>>> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let entry = File::from(rustix::fs::openat(dir, file_name(path), flags, Mode::empty())?);
    let (is_directory, meta) = (matches!(set_aside.what, What::Directory), entry.metadata()?);
    if !is_directory && !is_unchanged(set_aside.after, &Fingerprint::from(&meta), dir)? {
        return Ok(None);
    }
    let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    rustix::fs::unlinkat(dir, file_name(path), flags)?;
    // It is gone, whatever may yet fail: of a file without a name, FUSE knows nothing.
    let other_names = entry.metadata().ok().filter(|now| meta.nlink() > 1 && now.nlink() > 0);
    Ok(Some(other_names.map(|now| Fingerprint::from(&now))))
}

/// Whether an entry, on the file system of `near`, is still what it was before. File systems of the network and FUSE invent inodes
/// and ctimes, or show old ones for a while: there, size and mtime count.
pub(super) fn is_unchanged(before: Option<Fingerprint>, now: &Fingerprint, near: impl AsFd) -> io::Result<bool> {
    let Some(before) = before else { return Ok(false) };
    Ok(before == *now || ((before.size, before.mtime) == (now.size, now.mtime) && is_remote(near)?))
}

/// Whether a file may leave because another machine has its blob, if its bytes are still read so: `row` is what is known of it,
/// `now` what it is like (`None` if it is no regular file). If not, why not.
pub(super) fn may_leave(row: Option<&FileRow>, blob: BlobId, now: Option<&Fingerprint>) -> Result<(), &'static str> {
    let row = row.ok_or("it is not known what it is: it has not been hashed yet")?;
    let now = now.ok_or("it is no file any more")?;
    if row.blob != blob {
        return Err("it is another version than the one that was copied");
    }
    if row.is_suspect() {
        return Err("it is suspect: it may have rotted or been edited");
    }
    if !row.damaged.is_empty() {
        return Err("it is damaged");
    }
    // The ctime alone moves when the file gets or loses another name, and the device when it is mounted elsewhere.
    if row.fingerprint.drift(now).is_other_file() {
        return Err("it changed since it was hashed");
    }
    Ok(())
}

pub(super) const EDITED: &str = "it changed since it was looked at; it stays";
pub(super) const WRITTEN: &str = "a program has it open for writing; it stays";

#[cfg(test)]
mod tests {
    use blobstore::{FileState, Verified};
    use tree::{ByteRange, RangeSet, UnixTime};

    use super::*;

    #[test]
    fn only_what_is_just_as_it_was_hashed_may_go() {
        let time = |seconds| UnixTime { seconds, nanos: 5 };
        let now = Fingerprint { device: 1, inode: 2, birth: None, size: 3, mtime: time(4), ctime: time(5) };
        let blob = BlobId::of(b"abc");
        let row = FileRow {
            blob,
            fingerprint: now,
            damaged: RangeSet::new(),
            verified: Verified { at: 1, next: 0 },
            state: FileState::Settled,
        };
        let suspect = FileRow { state: FileState::Suspect { read: now, was_settled: false }, ..row.clone() };
        assert_eq!(may_leave(Some(&row), blob, Some(&now)), Ok(()));
        let stays = |row: Option<&FileRow>, blob, now: Option<&Fingerprint>| {
            assert!(may_leave(row, blob, now).is_err(), "{now:?}");
        };
        stays(None, blob, Some(&now));
        stays(Some(&suspect), blob, Some(&now));
        stays(Some(&row), BlobId::of(b"abd"), Some(&now));
        stays(Some(&row), blob, None);
        let damaged = RangeSet::from(ByteRange::new(0, 3).unwrap());
        stays(Some(&FileRow { damaged, ..row.clone() }), blob, Some(&now));
        for changed in
            [Fingerprint { inode: 9, ..now }, Fingerprint { size: 9, ..now }, Fingerprint { mtime: time(9), ..now }]
        {
            stays(Some(&row), blob, Some(&changed));
        }
        for touched in [Fingerprint { device: 9, ..now }, Fingerprint { ctime: time(9), ..now }] {
            assert_eq!(may_leave(Some(&row), blob, Some(&touched)), Ok(()));
        }
    }
}
