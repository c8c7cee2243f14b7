use std::{fs::Metadata, os::unix::fs::MetadataExt};

use serde::{Deserialize, Serialize};

/// A moment: seconds since 1970-01-01 UTC, negative before, and nanoseconds from there on, below 10⁹.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UnixTime {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// The rest, 0 to 999,999,999.
    pub nanos: u32,
}

/// What a file system says of a file, by which one can tell without reading whether it is still the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The file system's number.
    pub device: u64,
    /// The file's number there.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// When the content was last changed, so far as programs leave it alone.
    pub mtime: UnixTime,
    /// When anything of the file was last changed; programs cannot set it.
    pub ctime: UnixTime,
}

/// What two fingerprints of one path, an older and a newer, say about the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    /// Nothing moved: the bytes are the same, or else they rotted.
    None,
    /// Only the change time or the device number moved, as after chmod, link, or a mount elsewhere. Nobody
    /// who edits a file leaves it so: if the bytes differ, that is suspected damage, and no new version.
    Touched,
    /// Size, mtime or inode moved: the file was edited or replaced.
    Edited,
}

impl Fingerprint {
    /// What happened to the file since `self` was taken, if it now has the fingerprint `now`.
    pub fn drift(&self, now: &Fingerprint) -> Drift {
        if self == now {
            Drift::None
        } else if (self.size, self.mtime, self.inode) == (now.size, now.mtime, now.inode) {
            Drift::Touched
        } else {
            Drift::Edited
        }
    }
}

impl From<&Metadata> for Fingerprint {
    fn from(meta: &Metadata) -> Self {
        // A file system cannot give more than 999,999,999 ns; a broken one must not make us panic.
        let time = |seconds, nanos: i64| UnixTime { seconds, nanos: nanos.clamp(0, 999_999_999) as u32 };
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            mtime: time(meta.mtime(), meta.mtime_nsec()),
            ctime: time(meta.ctime(), meta.ctime_nsec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_by_field() {
        let time = |seconds| UnixTime { seconds, nanos: 5 };
        let old = Fingerprint { device: 1, inode: 2, size: 3, mtime: time(4), ctime: time(5) };
        for (now, drift) in [
            (old, Drift::None),
            (Fingerprint { ctime: time(9), ..old }, Drift::Touched),
            (Fingerprint { device: 9, ..old }, Drift::Touched),
            (Fingerprint { inode: 9, ..old }, Drift::Edited),
            (Fingerprint { size: 9, ..old }, Drift::Edited),
            (Fingerprint { mtime: UnixTime { nanos: 6, ..old.mtime }, ..old }, Drift::Edited),
        ] {
            assert_eq!(old.drift(&now), drift, "{now:?}");
        }
    }
}
