//! Extended attributes and ACLs on the disk: which are kept, and how they are read and set. Rules: spec/copy.md,
//! "Attributes".

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd},
};

use peers::{Attribute, Attributes};
use rustix::{
    fs::{XattrFlags, fgetxattr},
    io::Errno,
    process::geteuid,
};
use serde::{Deserialize, Deserializer, de::Error as _};

/// Which extended attributes are copied, and accepted from others: the setting `copy.attributes`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum KeepAttributes {
    /// None: they are counted only.
    No,
    /// `user.*`, and POSIX ACLs.
    #[default]
    Users,
    /// Also `security.*` and `trusted.*`, if both daemons run as root and are set so.
    All,
}

impl<'de> Deserialize<'de> for KeepAttributes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Bool(bool),
            Text(String),
        }
        match Written::deserialize(deserializer) {
            Ok(Written::Bool(false)) => Ok(Self::No),
            Ok(Written::Bool(true)) => Ok(Self::Users),
            Ok(Written::Text(text)) if text == "all" => Ok(Self::All),
            _ => Err(D::Error::custom("attributes is true, false, or \"all\"")),
        }
    }
}

impl KeepAttributes {
    /// Whether an attribute may be read for others here, and set for others. What is not of the user is passed over without
    /// a word: such attributes are the machine's own.
    fn takes(self, name: &[u8]) -> bool {
        let is_users = name.starts_with(b"user.") || ACLS.contains(&name);
        let is_systems = name.starts_with(b"security.") || name.starts_with(b"trusted.");
        is_users || (is_systems && self == Self::All && geteuid().is_root())
    }

    /// Reads the attributes of a file or directory that may be open as a path only (`O_PATH`).
    pub(super) fn read(self, file: impl AsFd) -> Attributes {
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let names = match all_of(|room| rustix::fs::listxattr(&path, room)) {
            Ok(names) => names,
            // A file system without attributes, and something that cannot have any.
            Err(Errno::OPNOTSUPP | Errno::PERM) => return Attributes::default(),
            Err(_) => return Attributes::new(Vec::new(), true),
        };
        let (mut list, mut is_cut) = (Vec::new(), false);
        for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty() && self.takes(name)) {
            match all_of(|room| rustix::fs::getxattr(&path, name, room)) {
                Ok(value) => list.push(Attribute { name: name.to_owned(), value }),
                // It went meanwhile.
                Err(Errno::NODATA) => {}
                Err(_) => is_cut = true,
            }
        }
        Attributes::new(list, is_cut)
    }

    /// Sets attributes. Returns whether all of them are kept.
    pub(super) fn set(self, file: &File, attributes: &Attributes) -> bool {
        let set = |Attribute { name, value }: &Attribute| {
            self.takes(name) && rustix::fs::fsetxattr(file, &name[..], value, XattrFlags::empty()).is_ok()
        };
        // Each is tried, whatever became of the others.
        let kept = attributes.list.iter().filter(|attribute| set(attribute)).count();
        kept == attributes.list.len() && !attributes.is_cut
    }
}

/// Whether a file or directory has all of these attributes, with these values.
pub(super) fn has_all(file: impl AsFd, attributes: &Attributes) -> bool {
    let has = |Attribute { name, value }: &Attribute| {
        all_of(|room| fgetxattr(&file, &name[..], room)).is_ok_and(|found| found == *value)
    };
    attributes.list.iter().all(has) && !attributes.is_cut
}

/// All that `get` writes into as much room as it needs, up to what Linux gives at the most.
fn all_of(get: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut room = vec![0; ROOM_BYTES];
    match get(&mut room) {
        Err(Errno::RANGE) => {
            room = vec![0; SYSTEM_BYTES_MAX];
            get(&mut room)
        }
        done => done,
    }
    .map(|bytes| {
        room.truncate(bytes);
        room
    })
}

const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
const ROOM_BYTES: usize = 1024;
/// The most that Linux has of names, and of a value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const SYSTEM_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(name: &str, value: &[u8]) -> Attribute {
        Attribute { name: name.into(), value: value.into() }
    }

    #[test]
    fn attributes_are_read_as_they_were_set() {
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
        let keep = KeepAttributes::Users;
        assert_eq!(keep.read(&file), Attributes::default());
        let some = Attributes::new(vec![attribute("user.tags", b"red\0"), attribute("user.empty", b"")], false);
        if !keep.set(&file, &some) {
            return eprintln!("skipped: no extended attributes here");
        }
        assert_eq!(keep.read(&file), some);
        assert!(has_all(&file, &some));
        assert!(!has_all(&file, &Attributes::new(vec![attribute("user.tags", b"blue")], false)));
        assert!(!has_all(&file, &Attributes::new(vec![attribute("user.other", b"")], false)));
        // One that is longer than the first room, and one out of bounds.
        let long = Attributes::new(vec![attribute("user.long", &[7; 30_000])], false);
        if keep.set(&file, &long) {
            let all = keep.read(&file);
            assert_eq!((all.list.len(), all.is_cut), (3, false));
        }
        // What does not belong to users is not taken from others.
        for name in ["security.capability", "trusted.x", "system.other", "nonsense"] {
            assert!(!keep.set(&file, &Attributes::new(vec![attribute(name, b"x")], false)), "{name}");
        }
        assert!(!keep.set(&file, &Attributes::new(vec![], true)), "what was cut is not kept");
        assert!(keep.set(&file, &Attributes::default()));
    }

    #[test]
    fn settings() {
        for (text, expected) in [
            ("a = true", Some(KeepAttributes::Users)),
            ("a = false", Some(KeepAttributes::No)),
            ("a = 'all'", Some(KeepAttributes::All)),
            ("a = 'some'", None),
            ("a = 1", None),
        ] {
            #[derive(Deserialize)]
            struct Setting {
                a: KeepAttributes,
            }
            assert_eq!(toml::from_str::<Setting>(text).ok().map(|setting| setting.a), expected, "{text}");
        }
    }
}
