//! Whether an arena root, and what is mounted below it, is what it was: a disk that is not mounted is no deletion of
//! everything, and no place to put files.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use namespace::{Anchors, Arena, Known, RelPath, look};
use tracing::warn;
use tree::Fingerprint;

use super::{
    super::Node,
    mounts::Mounts,
    offline::{Away, Left, Offline, compare, sort_out},
    volume,
};
use crate::failure::Failure;

/// An arena root that is there, as of the moment when it was looked at.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Standing {
    dir: PathBuf,
    /// Device and inode of the root.
    pub(in super::super) identity: (u64, u64),
    /// The root without symbolic links, and what is mounted around it. `None` where the system does not tell.
    mounts: Option<(PathBuf, Arc<Mounts>)>,
    /// The parts of the arena that are out of reach.
    pub(in super::super) offline: Arc<Offline>,
}

impl Standing {
    /// Whether the root is still the same directory, and what is mounted around it is too: a disk may go at any time.
    pub(in super::super) fn stays(&self, node: &Node) -> bool {
        self.root_stays() && self.mounts_stay(node)
    }

    pub(super) fn root_stays(&self) -> bool {
        fs::metadata(&self.dir).is_ok_and(|meta| identity(&meta) == self.identity)
    }

    pub(super) fn mounts_stay(&self, node: &Node) -> bool {
        let Some((true_dir, then)) = &self.mounts else { return true };
        node.inner
            .mounts
            .now()
            .is_ok_and(|now| Arc::ptr_eq(&now, then) || now.around(true_dir) == then.around(true_dir))
    }

    /// The absolute paths of what is out of reach.
    pub(super) fn offline_dirs(&self) -> impl Iterator<Item = PathBuf> {
        let dir = self.mounts.as_ref().map_or(&self.dir, |(true_dir, _)| true_dir);
        self.offline.parts().map(|(path, _)| dir.join(path.as_path()))
    }
}

/// Looks whether an arena root is the directory that it was. If so, returns how it stands, and records the anchors that are new,
/// before anything is published of what is there; else why the arena is offline. With `accepts`, takes whatever is there for
/// the arena's.
pub(in super::super) fn root_of(
    node: &Node,
    arena: &Arena,
    accepts: bool,
) -> Result<Result<Standing, String>, Failure> {
    let dir = arena.dir.clone().unwrap_or_default();
    let read = || {
        let found = identity(&fs::metadata(&dir)?);
        fs::read_dir(&dir)?;
        Ok::<_, io::Error>((found, dir.canonicalize()?))
    };
    let (identity, true_dir) = match read() {
        Ok(found) => found,
        Err(error) => return Ok(Err(tree::reason(&error))),
    };
    let known = if accepts { Anchors::new() } else { node.inner.namespace.anchors(&arena.name)? };
    let unknown = |error: io::Error| format!("what is mounted there cannot be found out: {}", tree::reason(&error));
    let mounts = match node.inner.mounts.now() {
        Ok(mounts) => Some(mounts),
        // A system that tells nothing of mounts.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Ok(Err(unknown(error))),
    };
    let now = match mounts.as_ref().map_or(Ok(Anchors::new()), |mounts| present(mounts, &true_dir)) {
        Ok(now) => now,
        Err(error) => return Ok(Err(unknown(error))),
    };
    let left = |within: Option<&RelPath>| left_of(node, arena, &dir, within);
    let root = match (known.get(&None), now.get(&None)) {
        (Some(was), Some(is)) => compare(was, is, || left(None))?,
        // Scanned last by a version that recorded the device number, or never.
        _ if accepts || arena.root == Some(identity) || left(None)? != Left::None => Ok(()),
        _ => Err(Away::OtherDirectory),
    };
    if let Err(away) = root {
        return Ok(Err(away.to_string()));
    }
    let Some(mounts) = mounts else {
        return Ok(Ok(Standing { dir, identity, ..Standing::default() }));
    };
    // Without anchors, whatever is mounted there is the arena's.
    let takes_over = !known.contains_key(&None);
    let (mut anchors, offline) = sort_out(&known, &now, |path| match takes_over {
        true => Ok(Left::NothingKnown),
        false => left(Some(path)),
    })?;
    anchors.extend(now.get(&None).map(|is| (None, is.clone())));
    if anchors != known {
        node.inner.namespace.set_anchors(&arena.name, &anchors)?;
        node.keep_record_later();
    }
    Ok(Ok(Standing { dir, identity, mounts: Some((true_dir, mounts)), offline: Arc::new(offline) }))
}

/// The anchors of the arena root `dir`, and of all mount points below it that can be seen.
fn present(mounts: &Mounts, dir: &Path) -> io::Result<Anchors> {
    let mut anchors = Anchors::new();
    if let Some(mount) = mounts.covering(dir) {
        anchors.insert(None, volume::anchor(mount, dir)?);
    }
    for mount in mounts.below(dir).into_iter().filter(|mount| !mount.is_automatic()) {
        let below = mount.point.strip_prefix(dir).unwrap_or(Path::new("")).as_os_str().as_encoded_bytes().to_owned();
        // What has no path in an arena is not indexed.
        let Ok(path) = RelPath::try_from(below) else { continue };
        match volume::anchor(mount, &mount.point) {
            Ok(anchor) => drop(anchors.insert(Some(path), anchor)),
            // It is there, and nothing is known of it: not the one that was there.
            Err(error) => {
                warn!(path = %mount.point.display(), reason = tree::reason(&error), "what is mounted there cannot be found out");
            }
        }
    }
    Ok(anchors)
}

/// What is left of what was known below the root, or at and below a mount point.
fn left_of(node: &Node, arena: &Arena, dir: &Path, within: Option<&RelPath>) -> Result<Left, Failure> {
    let known = node.inner.namespace.known(&arena.name, within, None, KNOWN_LOOKED_FOR)?;
    // A mount point that is a directory is there in any case, and says nothing.
    let counts = |known: &&Known| {
        within != Some(&known.path) || !matches!(known.version.content, namespace::Content::Directory { .. })
    };
    let mut known = known.iter().filter(counts).peekable();
    if known.peek().is_none() {
        return Ok(Left::NothingKnown);
    }
    let is_there = |known: &Known| look(dir, &known.path).is_ok_and(|seen| seen.is_some());
    Ok(if known.any(is_there) { Left::Some } else { Left::None })
}

fn identity(meta: &fs::Metadata) -> (u64, u64) {
    let now = Fingerprint::from(meta);
    (now.device, now.inode)
}

/// How much of what was known is looked for in a directory that is another one than before.
const KNOWN_LOOKED_FOR: usize = 1000;
