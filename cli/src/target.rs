use std::{ffi::OsStr, fmt, os::unix::ffi::OsStrExt};

use data_encoding::{BASE64, HEXLOWER};
use namespace::{ArenaName, RelPath};
use serde::{Deserialize, Serialize};

use crate::failure::{Code, Failure};

/// An arena, or a path in one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "JsonTarget", into = "JsonTarget")]
pub struct Target {
    /// The arena.
    pub arena: ArenaName,
    /// The path in it; `None` for the whole arena.
    pub path: Option<RelPath>,
}

/// The beginning of a blob's id, as it is typed: `blob:` and 8 to 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BlobPrefix(String);

/// A path as JSON carries it: readable, and, if it is not UTF-8, exact as well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonPath {
    /// The path; what is not UTF-8 in it is replaced.
    pub path: String,
    /// The path's bytes in base 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_bytes: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonTarget {
    arena: ArenaName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path_bytes: Option<String>,
}

impl Target {
    /// Reads `ARENA` or `ARENA/PATH`.
    pub fn parse(text: &OsStr) -> Result<Self, Failure> {
        let usage = |error: String| Failure::new(Code::Usage, error).hint("name what you mean as ARENA or ARENA/PATH");
        let bytes = text.as_bytes();
        let (arena, path) = match bytes.iter().position(|&b| b == b'/') {
            Some(slash) => (&bytes[..slash], bytes[slash + 1..].strip_suffix(b"/").unwrap_or(&bytes[slash + 1..])),
            None => (bytes, &[][..]),
        };
        if arena.is_empty() || [&b"."[..], b".."].contains(&arena) {
            return Err(usage(format!("{text:?} does not start with an arena")));
        }
        let arena = std::str::from_utf8(arena).map_err(|_| usage(format!("{text:?} does not start with an arena")))?;
        let arena = arena.parse().map_err(|error| usage(format!("{error}")))?;
        let path = if path.is_empty() {
            None
        } else {
            Some(path.to_owned().try_into().map_err(|error| usage(format!("{error}")))?)
        };
        Ok(Self { arena, path })
    }
}

impl BlobPrefix {
    /// Reads `blob:HEX`; `None` if the text does not begin so.
    pub fn parse(text: &OsStr) -> Option<Result<Self, Failure>> {
        let digits = text.as_bytes().strip_prefix(b"blob:")?;
        let parsed = String::from_utf8(digits.to_vec()).ok().and_then(|digits| Self::try_from(digits).ok());
        Some(parsed.ok_or_else(|| {
            Failure::new(Code::Usage, format!("{text:?} is no blob id"))
                .hint("blob: and at least the first 8 of its 64 hexadecimal digits")
        }))
    }

    /// The first and the last id that begin so.
    pub fn bounds(&self) -> ([u8; 32], [u8; 32]) {
        let bound = |fill: char| {
            let digits = format!("{}{}", self.0, fill.to_string().repeat(64 - self.0.len()));
            let bytes = HEXLOWER.decode(digits.as_bytes()).ok();
            bytes.and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; 32])
        };
        (bound('0'), bound('f'))
    }
}

impl TryFrom<String> for BlobPrefix {
    type Error = &'static str;

    fn try_from(digits: String) -> Result<Self, Self::Error> {
        let is_prefix = (8..=64).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_prefix.then(|| Self(digits.to_ascii_lowercase())).ok_or("that is no beginning of a blob id")
    }
}

impl From<BlobPrefix> for String {
    fn from(prefix: BlobPrefix) -> Self {
        prefix.0
    }
}

impl fmt::Display for BlobPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blob:{}", self.0)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}/{path}", self.arena),
            None => write!(f, "{}", self.arena),
        }
    }
}

impl From<&[u8]> for JsonPath {
    fn from(path: &[u8]) -> Self {
        match std::str::from_utf8(path) {
            Ok(path) => Self { path: path.to_owned(), path_bytes: None },
            Err(_) => Self { path: String::from_utf8_lossy(path).into_owned(), path_bytes: Some(BASE64.encode(path)) },
        }
    }
}

impl From<&RelPath> for JsonPath {
    fn from(path: &RelPath) -> Self {
        path.as_bytes().into()
    }
}

impl JsonPath {
    /// The exact bytes; `None` if `path_bytes` is not base 64.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match &self.path_bytes {
            Some(encoded) => BASE64.decode(encoded.as_bytes()).ok(),
            None => Some(self.path.clone().into_bytes()),
        }
    }
}

impl TryFrom<JsonTarget> for Target {
    type Error = String;

    fn try_from(JsonTarget { arena, path, path_bytes }: JsonTarget) -> Result<Self, String> {
        if path.is_none() && path_bytes.is_none() {
            return Ok(Self { arena, path: None });
        }
        let path = JsonPath { path: path.unwrap_or_default(), path_bytes };
        let bytes = path.bytes().ok_or("path_bytes is not base 64")?;
        Ok(Self { arena, path: Some(bytes.try_into().map_err(|error| format!("{error}"))?) })
    }
}

impl From<Target> for JsonTarget {
    fn from(target: Target) -> Self {
        let path = target.path.as_ref().map(JsonPath::from);
        let (path, path_bytes) = path.map_or((None, None), |path| (Some(path.path), path.path_bytes));
        Self { arena: target.arena, path, path_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_of_blob_ids() {
        let parse = |text: &str| BlobPrefix::parse(OsStr::new(text));
        let prefix = parse("blob:ABCDEF012").unwrap().unwrap();
        assert_eq!(prefix.to_string(), "blob:abcdef012");
        let (low, high) = prefix.bounds();
        assert_eq!(
            (low[..5].to_vec(), high[..6].to_vec()),
            (vec![0xab, 0xcd, 0xef, 1, 0x20], vec![0xab, 0xcd, 0xef, 1, 0x2f, 0xff])
        );
        assert_eq!((low[31], high[31]), (0, 0xff));
        let whole = parse(&format!("blob:{}", "7".repeat(64))).unwrap().unwrap();
        assert_eq!(whole.bounds(), ([0x77; 32], [0x77; 32]));
        assert!(parse("photos/a").is_none());
        for bad in ["blob:", "blob:1234567", "blob:12345678x", &format!("blob:{}", "7".repeat(65))] {
            assert_eq!(parse(bad).unwrap().unwrap_err().code, Code::Usage, "{bad}");
        }
        assert!(serde_json::from_str::<BlobPrefix>("\"12\"").is_err());
    }

    #[test]
    fn text_and_json() {
        for (text, json) in [
            ("photos", r#"{"arena":"photos"}"#),
            ("photos/", r#"{"arena":"photos"}"#),
            ("photos/a b/c:d", r#"{"arena":"photos","path":"a b/c:d"}"#),
            ("photos/dir/", r#"{"arena":"photos","path":"dir"}"#),
        ] {
            let target = Target::parse(OsStr::new(text)).unwrap();
            assert_eq!(serde_json::to_string(&target).unwrap(), json);
            assert_eq!(serde_json::from_str::<Target>(json).unwrap(), target);
        }
        let odd = Target::parse(OsStr::from_bytes(b"photos/\xff")).unwrap();
        let json = serde_json::to_string(&odd).unwrap();
        assert_eq!(json, "{\"arena\":\"photos\",\"path\":\"\u{fffd}\",\"path_bytes\":\"/w==\"}");
        assert_eq!(serde_json::from_str::<Target>(&json).unwrap(), odd);
        for bad in ["", "/a", "photos//a", "photos/../a", "a:b/c"] {
            assert_eq!(Target::parse(OsStr::new(bad)).unwrap_err().code, Code::Usage, "{bad:?}");
        }
        for bad in [r#"{"arena":"a","path":"../b"}"#, r#"{"arena":"a","path":5}"#, r#"{"arena":"a","pth":"b"}"#] {
            assert!(serde_json::from_str::<Target>(bad).is_err(), "{bad}");
        }
    }
}
