//! Which file system a mount shows: a number that is the same after a remount, whatever the device number is then. Rules:
//! spec/namespace.md, "Offline".

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

use namespace::Anchor;
use rustix::fs::{major, minor, statvfs};
use tree::BlobId;

use super::mounts::Mount;

/// Returns the anchor of the directory, or file, `at`, which `mount` shows. Waits for the file system.
pub(super) fn anchor(mount: &Mount, at: &Path) -> io::Result<Anchor> {
    let (meta, fsid) = (fs::metadata(at)?, statvfs(at)?.f_fsid);
    let names = Names {
        kind: &mount.kind,
        fsid,
        device: meta.dev(),
        uuid: if tells_device_only(fsid, meta.dev()) { uuid_of(mount) } else { None },
        source: &mount.source,
    };
    Ok(Anchor { file_system: names.id(), within: mount.path_within(at), inode: meta.ino() })
}

/// What is known of a file system.
#[derive(Debug, Clone)]
struct Names<'a> {
    /// The type, such as `ext4`.
    kind: &'a [u8],
    /// `statfs`'s f_fsid.
    fsid: u64,
    /// The device number that its files have.
    device: u64,
    /// The UUID of its block device, if it has one.
    uuid: Option<String>,
    /// What was mounted.
    source: &'a [u8],
}

impl Names<'_> {
    /// Returns the file system's id.
    fn id(&self) -> u64 {
        let kind = match self.kind {
            // One disk, whichever driver it is.
            b"ext2" | b"ext3" => b"ext4",
            kind => kind,
        };
        let (how, name): (&[u8], Vec<u8>) = match &self.uuid {
            // A union of file systems may have the number of one of them.
            _ if !tells_device_only(self.fsid, self.device) => {
                (b"fsid", [kind, b"\0", &self.fsid.to_le_bytes()].concat())
            }
            Some(uuid) => (b"uuid", uuid.as_bytes().to_vec()),
            None => (b"source", [kind, b"\0", self.source].concat()),
        };
        let hash = BlobId::of(&[b"file system\0", how, b"\0", &name].concat());
        let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

/// Whether f_fsid says no more than the device number does, which is another one after the next mount. NFS and FUSE give 0,
/// xfs, vfat and exFAT the device number.
fn tells_device_only(fsid: u64, device: u64) -> bool {
    fsid == 0 || fsid == device
}

/// The UUID of the block device that is mounted, as udev has found it.
fn uuid_of(mount: &Mount) -> Option<String> {
    let device = match mount.device {
        // FUSE has no device, and may have been given one.
        (0, _) => {
            let source = Path::new(OsStr::from_bytes(&mount.source));
            let meta = source.starts_with("/dev").then(|| fs::metadata(source).ok()).flatten()?;
            meta.file_type().is_block_device().then(|| (major(meta.rdev()), minor(meta.rdev())))?
        }
        device => device,
    };
    let (major_number, minor_number) = device;
    let mut text = String::new();
    if let Ok(file) = File::open(format!("/run/udev/data/b{major_number}:{minor_number}"))
        && file.take(UDEV_BYTES_MAX).read_to_string(&mut text).is_ok()
        && let Some(uuid) = uuid_in(&text)
    {
        return Some(uuid.to_owned());
    }
    let links = fs::read_dir("/dev/disk/by-uuid").ok()?.take(LINKS_MAX).flatten();
    let mut same = links
        .filter(|link| fs::metadata(link.path()).is_ok_and(|meta| (major(meta.rdev()), minor(meta.rdev())) == device));
    same.next()?.file_name().into_string().ok()
}

/// The UUID in what udev has written down of a device.
fn uuid_in(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("E:ID_FS_UUID=")).filter(|uuid| !uuid.is_empty())
}

const UDEV_BYTES_MAX: u64 = 64 << 10;
const LINKS_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_file_systems_are_one() {
        let disk = Names { kind: b"ext4", fsid: 0x1234, device: 0x700, uuid: None, source: b"/dev/sda" };
        let stick =
            Names { kind: b"vfat", fsid: 0x801, device: 0x801, uuid: Some("AB-CD".into()), source: b"/dev/sdb" };
        let bare = Names { uuid: None, ..stick.clone() };
        let share = Names { kind: b"nfs4", fsid: 0, device: 0x35, uuid: None, source: b"nas:/export" };
        for (one, other, is_same) in [
            // By the number in its superblock, whatever device it is.
            (&disk, Names { device: 0x701, source: b"/dev/sdc", uuid: Some("x".into()), ..disk.clone() }, true),
            (&disk, Names { kind: b"ext3", ..disk.clone() }, true),
            (&disk, Names { fsid: 0x1235, ..disk.clone() }, false),
            (&disk, Names { kind: b"overlay", ..disk.clone() }, false),
            // By its UUID, where that number is the device's.
            (&stick, Names { fsid: 0x811, device: 0x811, source: b"/dev/sdc", ..stick.clone() }, true),
            (&stick, Names { kind: b"fuseblk", fsid: 0, device: 0x40, ..stick.clone() }, true),
            (&stick, Names { uuid: Some("AB-CE".into()), ..stick.clone() }, false),
            // By what was mounted, where nothing else is known.
            (&bare, Names { fsid: 0x811, device: 0x811, ..bare.clone() }, true),
            (&bare, Names { source: b"/dev/sdc", ..bare.clone() }, false),
            (&share, Names { device: 0x36, ..share.clone() }, true),
            (&share, Names { source: b"nas:/other", ..share.clone() }, false),
            (&share, Names { kind: b"fuse.sshfs", ..share.clone() }, false),
        ] {
            assert_eq!(one.id() == other.id(), is_same, "{one:?} and {other:?}");
        }
        assert_eq!(uuid_in("S:disk\nE:ID_FS_UUID_ENC=a\nE:ID_FS_UUID=AB-CD\n"), Some("AB-CD"));
        assert_eq!(uuid_in("E:ID_FS_UUID=\n"), None);
    }

    #[test]
    fn ids_stay_what_they_are() {
        // They are in the database: another way to make them would take every disk for another one.
        let disk = Names { kind: b"ext4", fsid: 0x1234, device: 0x700, uuid: None, source: b"/dev/sda" };
        let stick = Names { fsid: 0, uuid: Some("AB-CD".into()), ..disk.clone() };
        let share = Names { kind: b"nfs4", fsid: 0, source: b"nas:/export", ..disk.clone() };
        let ids = [disk, stick, share].map(|names| names.id());
        assert_eq!(ids, [0x5394_e69f_ae5d_1cba, 0xb20a_c59a_5aa4_6bae, 0xf657_f08f_a301_5b32]);
    }
}
