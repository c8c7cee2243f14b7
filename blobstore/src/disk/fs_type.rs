//! What is known of a file system by its type, statfs(2)'s `f_type`.

use std::{io, os::fd::AsFd};

/// Whether a file is on a file system whose inodes and times may be invented, or remembered from an earlier answer: one of the
/// network, or one that a program provides.
pub fn is_remote(file: impl AsFd) -> io::Result<bool> {
    Ok(REMOTE.contains(&type_of(file)?))
}

/// Whether a write moves a time of a file that no program can set back. FAT knows no ctime, and shows the mtime in its place; what
/// a program provides, or another machine, may do the same.
pub fn has_own_ctime(file: impl AsFd) -> io::Result<bool> {
    let kind = type_of(file)?;
    Ok(!REMOTE.contains(&kind) && ![FAT, EXFAT].contains(&kind))
}

/// Whether the files of this file system are those of another one, where they can be written to without this one's knowledge.
pub fn is_stacked(file: impl AsFd) -> io::Result<bool> {
    Ok([OVERLAY, ECRYPTFS].contains(&type_of(file)?))
}

/// Whether its names are bytes, unless a directory says otherwise.
pub fn has_names_of_bytes(file: impl AsFd) -> io::Result<bool> {
    Ok([EXT, BTRFS, XFS, TMPFS].contains(&type_of(file)?))
}

/// Whether changes that other machines make on a file system are not reported to those who watch its directories: one of the
/// network, or one that a program provides. `kind` is its type as mountinfo names it, so that it is not touched.
pub fn hides_remote_changes(kind: &[u8]) -> bool {
    kind.starts_with(b"fuse.") || HIDES_REMOTE_CHANGES.iter().any(|hides| hides.as_bytes() == kind)
}

const HIDES_REMOTE_CHANGES: [&str; 12] =
    ["fuse", "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "afs", "coda", "vboxsf", "virtiofs"];

fn type_of(file: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstatfs(file)?.f_type as u64 & 0xffff_ffff)
}

const EXT: u64 = 0xef53;
const BTRFS: u64 = 0x9123_683e;
const XFS: u64 = 0x5846_5342;
const TMPFS: u64 = 0x0102_1994;
const FAT: u64 = 0x4d44;
const EXFAT: u64 = 0x2011_bab0;
const OVERLAY: u64 = 0x794c_7630;
const ECRYPTFS: u64 = 0xf15f;
/// FUSE, NFS, SMB (three numbers), 9p, Ceph, AFS and Coda.
const REMOTE: [u64; 9] =
    [0x6573_5546, 0x6969, 0xfe53_4d42, 0xff53_4d42, 0x517b, 0x0102_1997, 0x00c3_6400, 0x5346_414f, 0x7375_7245];
