//! Whether an arena root is the directory that it was: a disk that is not mounted is no deletion of everything, and no
//! place to put files.

use std::{fs, io, path::Path};

use namespace::{Arena, Known, look};
use tree::Fingerprint;

use super::super::Node;
use crate::failure::Failure;

/// Device and inode of an arena root, or why it must not be taken for the one that it was: it cannot be read, or is
/// another directory without anything of what was in that one.
pub(in super::super) fn root_of(node: &Node, arena: &Arena) -> Result<Result<(u64, u64), String>, Failure> {
    let dir = arena.dir.clone().unwrap_or_default();
    let root = match identity(&dir) {
        Ok(root) => root,
        Err(error) => return Ok(Err(tree::reason(&error))),
    };
    if arena.root != Some(root) {
        let known = node.inner.namespace.known(&arena.name, None, None, KNOWN_LOOKED_FOR)?;
        let is_there = |known: &Known| look(&dir, &known.path).is_ok_and(|seen| seen.is_some());
        if !known.is_empty() && !known.iter().any(is_there) {
            return Ok(Err("it is another directory than before, and has nothing of what was in that one".into()));
        }
    }
    Ok(Ok(root))
}

fn identity(dir: &Path) -> io::Result<(u64, u64)> {
    let now = Fingerprint::from(&fs::metadata(dir)?);
    fs::read_dir(dir)?;
    Ok((now.device, now.inode))
}

/// How much of what was known is looked for in an arena root that is another directory than before.
const KNOWN_LOOKED_FOR: usize = 1000;
