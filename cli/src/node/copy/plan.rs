//! What is to go where: names of machines and paths, as `blob cp` and `blob mv` take them, and the paths that come of
//! them. Rules: spec/copy.md, "Names".

use std::{ffi::OsStr, fmt, os::unix::ffi::OsStrExt};

use namespace::{NameError, RelPath};
use serde::{Deserialize, Serialize};

use crate::{
    failure::{Code, Failure},
    target::Target,
};

/// A path at a machine: one side of `cp` and `mv`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The machine, by name or id; `None` for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The arena, and perhaps a path in it.
    #[serde(flatten)]
    pub target: Target,
}

/// `POST /v1/copy`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CopyScope {
    /// What to copy.
    pub sources: Vec<Place>,
    /// Where to.
    pub to: Place,
    /// Whether sources go into `to`, under their own names; else the only one goes there under that name. It is so in any
    /// case where `to` is an arena.
    #[serde(default)]
    pub into: bool,
    /// Whether what has arrived is removed at its source.
    #[serde(default, rename = "move")]
    pub moves: bool,
    /// Whether files and links that differ are replaced.
    #[serde(default)]
    pub overwrite: bool,
    /// Whether to say only what would be done.
    #[serde(default)]
    pub dry_run: bool,
    /// For how many seconds machines are waited for that went away.
    #[serde(default)]
    pub retry_s: u64,
    /// Whether that holds for a destination, too, that stops answering without closing its connection.
    #[serde(default)]
    pub retry_silent: bool,
}

impl Place {
    /// Reads `ARENA[/PATH]` or `PEER:ARENA[/PATH]`. Tells too whether there is a `/` at the end.
    pub(crate) fn parse(text: &OsStr) -> Result<(Self, bool), Failure> {
        let bytes = text.as_bytes();
        let slash = bytes.iter().position(|&b| b == b'/').unwrap_or(bytes.len());
        let colon = bytes[..slash].iter().position(|&b| b == b':');
        let (peer, rest) = match colon {
            None => (None, bytes),
            Some(colon) => {
                let peer = std::str::from_utf8(&bytes[..colon]).ok().filter(|peer| !peer.is_empty());
                let peer = peer.ok_or_else(|| {
                    Failure::new(Code::Usage, format!("{text:?} does not start with the name of a machine"))
                        .hint("name what you mean as ARENA/PATH, or PEER:ARENA/PATH at another machine")
                })?;
                (Some(peer.to_owned()), &bytes[colon + 1..])
            }
        };
        let target = Target::parse(OsStr::from_bytes(rest))?;
        Ok((Self { peer, target }, rest.ends_with(b"/")))
    }
}

impl fmt::Display for CopyScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", if self.moves { "mv" } else { "cp" })?;
        for source in self.sources.iter().take(1) {
            write!(f, " {source}")?;
        }
        if self.sources.len() > 1 {
            write!(f, " and {} more", self.sources.len() - 1)?;
        }
        write!(f, " {}", self.to)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.peer {
            Some(peer) => write!(f, "{peer}:{}", self.target),
            None => write!(f, "{}", self.target),
        }
    }
}

impl CopyScope {
    /// Whether sources keep their own names below the destination.
    pub(super) fn goes_into(&self) -> bool {
        self.into || self.to.target.path.is_none()
    }

    /// The path, in the destination's arena, of what a source is; `None` is the arena root. An arena has no name of its own
    /// there: what is in it goes where it would.
    pub(super) fn top(&self, source: &Target) -> Result<Option<RelPath>, NameError> {
        let to = self.to.target.path.as_ref();
        if !self.goes_into() {
            return Ok(to.cloned());
        }
        let name = source.path.as_ref().map(|path| path.as_path().file_name().unwrap_or_default().as_bytes());
        match (to, name) {
            (to, None) => Ok(to.cloned()),
            (None, Some(name)) => name.to_owned().try_into().map(Some),
            (Some(to), Some(name)) => to.join(name).map(Some),
        }
    }
}

/// Where `path`, which is `source` or below it, goes, if `source` goes to `top`. `None` is the arena root.
pub(super) fn destination(
    source: Option<&RelPath>,
    top: Option<&RelPath>,
    path: &RelPath,
) -> Result<Option<RelPath>, NameError> {
    let below = match source {
        None => path.as_bytes(),
        Some(source) => path.as_bytes().strip_prefix(source.as_bytes()).unwrap_or_default(),
    };
    let below = below.strip_prefix(b"/").unwrap_or(below);
    match top {
        _ if below.is_empty() => Ok(top.cloned()),
        None => below.to_owned().try_into().map(Some),
        Some(top) => top.join(below).map(Some),
    }
}

/// What of `source`, which goes to `top`, goes to the path `to`; `None` if nothing does.
pub(super) fn origin(source: Option<&RelPath>, top: Option<&RelPath>, to: &RelPath) -> Option<RelPath> {
    let below = match top {
        None => to.as_bytes(),
        Some(top) if to.is_within(top) => &to.as_bytes()[top.as_bytes().len()..],
        Some(_) => return None,
    };
    let below = below.strip_prefix(b"/").unwrap_or(below);
    match source {
        source if below.is_empty() => source.cloned(),
        None => below.to_owned().try_into().ok(),
        Some(source) => source.join(below).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> (Place, bool) {
        Place::parse(OsStr::new(text)).unwrap()
    }

    #[test]
    fn sides_as_text_and_json() {
        for (text, json, slash) in [
            ("photos", r#"{"arena":"photos"}"#, false),
            ("photos/", r#"{"arena":"photos"}"#, true),
            ("photos/a:b/c", r#"{"arena":"photos","path":"a:b/c"}"#, false),
            ("nas:photos/a:b/", r#"{"peer":"nas","arena":"photos","path":"a:b"}"#, true),
            ("my nas:photos", r#"{"peer":"my nas","arena":"photos"}"#, false),
        ] {
            let (place, has_slash) = place(text);
            assert_eq!((serde_json::to_string(&place).unwrap().as_str(), has_slash), (json, slash));
            assert_eq!(serde_json::from_str::<Place>(json).unwrap(), place);
            assert_eq!(place.to_string(), text.trim_end_matches('/'));
        }
        for bad in ["", ":photos", "nas:", "nas:/a", "a:b:c", "nas:photos/../x"] {
            assert_eq!(Place::parse(OsStr::new(bad)).unwrap_err().code, Code::Usage, "{bad:?}");
        }
    }

    #[test]
    fn what_goes_where() {
        for (source, to, path, expected) in [
            // Under that name, whatever is there.
            ("docs/a", "nas:inbox/b", "a", Some("b")),
            ("docs/a", "nas:inbox/b", "a/x/y", Some("b/x/y")),
            ("docs", "nas:inbox/b", "x/y", Some("b/x/y")),
            // Into an arena or a directory, under its own name.
            ("docs/a", "nas:inbox", "a/x", Some("a/x")),
            ("docs/d/a", "nas:inbox", "d/a", Some("a")),
            ("docs/d/a", "nas:inbox/b/", "d/a/x", Some("b/a/x")),
            // What is in an arena.
            ("docs", "nas:inbox", "x/y", Some("x/y")),
            ("docs", "nas:inbox/b/", "x/y", Some("b/x/y")),
        ] {
            let ((to, into), (from, _)) = (place(to), place(source));
            let scope = CopyScope {
                sources: vec![],
                to,
                into,
                moves: false,
                overwrite: false,
                dry_run: false,
                retry_s: 0,
                retry_silent: false,
            };
            let top = scope.top(&from.target).unwrap();
            let path = RelPath::try_from(path).unwrap();
            let got = destination(from.target.path.as_ref(), top.as_ref(), &path).unwrap();
            assert_eq!(got, expected.map(|path| path.try_into().unwrap()), "{source} {path}");
            let back = origin(from.target.path.as_ref(), top.as_ref(), &got.unwrap());
            assert_eq!(back, Some(path), "{source}");
            assert_eq!(
                origin(from.target.path.as_ref(), Some(&"else".try_into().unwrap()), &"b".try_into().unwrap()),
                None
            );
        }
        let long = RelPath::try_from(&["x"; 2000].join("/")[..]).unwrap();
        assert!(destination(None, Some(&long), &long).is_err());
    }
}
