use std::{fs::Metadata, os::unix::fs::MetadataExt, time::SystemTime};

use serde::{Deserialize, Serialize};

/// A moment: seconds since 1970-01-01 UTC, negative before, and nanoseconds from there on, below 10⁹.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UnixTime {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// The rest, 0 to 999,999,999.
    pub nanos: u32,
}

/// The metadata of a file by which one can tell without reading whether it is still the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The file system's number for now; it is another one after a remount, and says nothing about identity.
    pub device: u64,
    /// The file's number on its file system. File systems use a number again once it is free.
    pub inode: u64,
    /// When the inode was made; `None` if the file system does not record it. Programs cannot set it.
    pub birth: Option<UnixTime>,
    /// Bytes.
    pub size: u64,
    /// When the content was last changed. Programs can set it to any time.
    pub mtime: UnixTime,
    /// When the content or the metadata was last changed. Programs cannot set it.
    pub ctime: UnixTime,
}

/// Which metadata moved between two fingerprints of one path. Ordered by how much is known: the later, the more.
///
/// What follows from it, beside what the watcher saw: spec/namespace.md, "Rot or edit".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drift {
    /// Nothing moved: no system call changed the file.
    None,
    /// Only the ctime moved: chmod and link do that, and so does a program that writes and sets the mtime back.
    Touched,
    /// Inode, birth time or size moved, and the mtime did not: another file with the mtime of the first one, as archives
    /// with fixed times, `cp -p` and restored backups leave it.
    Replaced,
    /// The mtime moved: a program wrote.
    Edited,
}

impl Drift {
    /// Whether the path leads to another file, or to a file that is known to have been written.
    pub fn is_other_file(self) -> bool {
        self >= Self::Replaced
    }
}

impl Fingerprint {
    /// What moved since `self` was taken, if the file now has the fingerprint `now`.
    ///
    /// A birth time that only one of both has is left out: the row may be older than the record of birth times.
    pub fn drift(&self, now: &Fingerprint) -> Drift {
        let is_born_again = self.birth.zip(now.birth).is_some_and(|(was, is)| was != is);
        if self.mtime != now.mtime {
            Drift::Edited
        } else if is_born_again || (self.inode, self.size) != (now.inode, now.size) {
            Drift::Replaced
        } else if self.ctime != now.ctime {
            Drift::Touched
        } else {
            Drift::None
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
            birth: meta.created().ok().map(UnixTime::from),
            size: meta.size(),
            mtime: time(meta.mtime(), meta.mtime_nsec()),
            ctime: time(meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl From<SystemTime> for UnixTime {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => Self { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() },
            Err(before) => {
                let before = before.duration();
                let borrow = i64::from(before.subsec_nanos() > 0);
                let nanos = if borrow == 1 { 1_000_000_000 - before.subsec_nanos() } else { 0 };
                Self { seconds: -(before.as_secs() as i64) - borrow, nanos }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn drift_by_field() {
        let time = |seconds| UnixTime { seconds, nanos: 5 };
        let old = Fingerprint { device: 1, inode: 2, birth: Some(time(3)), size: 3, mtime: time(4), ctime: time(5) };
        for (now, drift) in [
            (old, Drift::None),
            (Fingerprint { device: 9, ..old }, Drift::None),
            (Fingerprint { birth: None, ..old }, Drift::None),
            (Fingerprint { ctime: time(9), ..old }, Drift::Touched),
            (Fingerprint { inode: 9, ..old }, Drift::Replaced),
            (Fingerprint { birth: Some(time(4)), ..old }, Drift::Replaced),
            (Fingerprint { size: 9, ..old }, Drift::Replaced),
            (Fingerprint { mtime: UnixTime { nanos: 6, ..old.mtime }, ..old }, Drift::Edited),
            (Fingerprint { inode: 9, mtime: time(9), ..old }, Drift::Edited),
        ] {
            assert_eq!(old.drift(&now), drift, "{now:?}");
            assert_eq!(now.drift(&old), drift, "{now:?}");
        }
    }

    #[test]
    fn times_before_1970() {
        let time = |ms: i64| {
            let by = Duration::from_millis(ms.unsigned_abs());
            if ms < 0 { SystemTime::UNIX_EPOCH - by } else { SystemTime::UNIX_EPOCH + by }
        };
        for (ms, seconds, nanos) in [(1_500, 1, 500_000_000), (0, 0, 0), (-1, -1, 999_000_000), (-2_000, -2, 0)] {
            assert_eq!(UnixTime::from(time(ms)), UnixTime { seconds, nanos });
        }
    }
}
