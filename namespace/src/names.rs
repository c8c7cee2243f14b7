use std::{
    borrow::Borrow,
    ffi::OsStr,
    fmt,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// The name of an arena: 1 to 255 bytes of UTF-8 without `/`, `:` and control characters, not `.` or `..`, and
/// not starting with `-`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ArenaName(String);

/// A path inside an arena: bytes, `/`-separated, relative. 1 to 4,096 bytes in all and 1 to 255 a component, none
/// of them `.` or `..`, no NUL. Every other byte is allowed. Ordered by bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct RelPath(Vec<u8>);

/// Why a name is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not an arena's name.
    #[error(
        "{0:?} cannot be the name of an arena: 1 to 255 bytes without '/', ':' or control characters, not starting with '-'"
    )]
    Arena(String),
    /// Not a path inside an arena.
    #[error("{0:?} cannot be a path in an arena: {1}")]
    Path(String, &'static str),
}

impl ArenaName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ArenaName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        let bad = |c: char| c == '/' || c == ':' || c.is_control();
        if name.is_empty()
            || name.len() > 255
            || name == "."
            || name == ".."
            || name.starts_with('-')
            || name.contains(bad)
        {
            return Err(NameError::Arena(name.chars().take(80).collect()));
        }
        Ok(Self(name))
    }
}

impl FromStr for ArenaName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        name.to_owned().try_into()
    }
}

impl From<ArenaName> for String {
    fn from(name: ArenaName) -> Self {
        name.0
    }
}

impl fmt::Display for ArenaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ArenaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl RelPath {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path as the system takes it.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// This path with `name`, one component, behind it.
    pub fn join(&self, name: &[u8]) -> Result<Self, NameError> {
        [&self.0, name].join(&b'/').try_into()
    }

    /// The directory that this path is in; `None` is the arena root.
    pub fn parent(&self) -> Option<Self> {
        let slash = self.0.iter().rposition(|&b| b == b'/')?;
        Some(Self(self.0[..slash].to_owned()))
    }

    /// Whether this path is `dir` or below it.
    pub fn is_within(&self, dir: &RelPath) -> bool {
        self.0.strip_prefix(&dir.0[..]).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
    }
}

impl TryFrom<Vec<u8>> for RelPath {
    type Error = NameError;

    fn try_from(path: Vec<u8>) -> Result<Self, NameError> {
        let bad = |component: &[u8]| matches!(component, b"" | b"." | b"..");
        let error = if path.is_empty() || path.split(|&b| b == b'/').any(bad) {
            "it has an empty, '.' or '..' component"
        } else if path.len() > 4096 || path.split(|&b| b == b'/').any(|component| component.len() > 255) {
            "it is too long"
        } else if path.contains(&0) {
            "it has a NUL"
        } else {
            return Ok(Self(path));
        };
        Err(NameError::Path(String::from_utf8_lossy(&path).chars().take(80).collect(), error))
    }
}

/// What a file is called, for the moment before it gets its name, on file systems that know no other way; it is never
/// indexed. `number` tells it from others.
pub fn staging_name(number: u64) -> String {
    format!("{STAGING_PREFIX}{number:016x}{STAGING_SUFFIX}")
}

/// Whether a file may be called so only for a moment.
pub fn is_staging_name(name: &[u8]) -> bool {
    is_numbered(name, STAGING_SUFFIX)
}

/// The name of the directory, beside files that are moved to another machine, into which each is renamed for the moment
/// before it is removed. Neither the directory nor anything in it is indexed. `number` tells it from others.
pub fn leaving_name(number: u64) -> String {
    format!("{STAGING_PREFIX}{number:016x}{LEAVING_SUFFIX}")
}

/// Whether a directory of this name is one for files that are about to be removed.
pub fn is_leaving_name(name: &[u8]) -> bool {
    is_numbered(name, LEAVING_SUFFIX)
}

/// Whether a file of this name is one that was deleted while a program had it open: libfuse calls it `.fuse_hidden` and 16
/// hex digits, Linux's NFS client `.nfs` and 24. It is removed when the program closes it, without an event for watchers.
pub fn is_deleted_name(name: &[u8]) -> bool {
    let is_hex = |digits: &[u8], count| digits.len() == count && digits.iter().all(u8::is_ascii_hexdigit);
    name.strip_prefix(b".fuse_hidden").is_some_and(|digits| is_hex(digits, 16))
        || name.strip_prefix(b".nfs").is_some_and(|digits| is_hex(digits, 24))
}

fn is_numbered(name: &[u8], suffix: &str) -> bool {
    let number = name.strip_prefix(STAGING_PREFIX.as_bytes()).and_then(|rest| rest.strip_suffix(suffix.as_bytes()));
    number.is_some_and(|digits| digits.len() == 16 && digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

const STAGING_PREFIX: &str = ".blobd-";
const STAGING_SUFFIX: &str = ".part";
const LEAVING_SUFFIX: &str = ".leaving";

impl TryFrom<&str> for RelPath {
    type Error = NameError;

    fn try_from(path: &str) -> Result<Self, NameError> {
        path.as_bytes().to_owned().try_into()
    }
}

impl From<RelPath> for Vec<u8> {
    fn from(path: RelPath) -> Self {
        path.0
    }
}

impl From<&RelPath> for PathBuf {
    fn from(path: &RelPath) -> Self {
        path.as_path().to_owned()
    }
}

impl Borrow<[u8]> for RelPath {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_path(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let long = "x".repeat(255);
        for good in ["a", "a/b", "a:b", ".a", "...", "a\nb", "\u{fffd}", &long, &format!("{long}/{long}")] {
            assert!(RelPath::try_from(good).is_ok(), "{good:?}");
        }
        assert!(RelPath::try_from(b"\xff/\x80".to_vec()).is_ok());
        for bad in
            ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\0", &"x".repeat(256), &"x/".repeat(3000)]
        {
            assert!(RelPath::try_from(bad).is_err(), "{bad:?}");
        }
        let dir = RelPath::try_from("a/b").unwrap();
        let within = |path| RelPath::try_from(path).unwrap().is_within(&dir);
        assert_eq!(dir.parent(), Some(RelPath::try_from("a").unwrap()));
        assert_eq!(dir.parent().unwrap().parent(), None);
        assert!(within("a/b") && within("a/b/c") && !within("a/bc") && !within("a"));
    }

    #[test]
    fn deleted_and_open() {
        for name in [".fuse_hidden0000000c00000004", ".nfs00000000a1b2c3d40000001f"] {
            assert!(is_deleted_name(name.as_bytes()), "{name}");
        }
        for name in [".fuse_hidden", ".fuse_hidden0000000c0000000", ".nfs", ".nfs0", ".nfsx0000000a1b2c3d40000001f"] {
            assert!(!is_deleted_name(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn arenas() {
        for good in ["photos", "a b", "ä", "a.b"] {
            assert!(good.parse::<ArenaName>().is_ok(), "{good:?}");
        }
        for bad in ["", ".", "..", "a/b", "a:b", "-a", "a\n", &"x".repeat(256)] {
            assert!(bad.parse::<ArenaName>().is_err(), "{bad:?}");
        }
    }
}
