//! What there is to know of entries beside their content, here and at other machines: extended attributes, names of one
//! file, and what cannot be copied.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use namespace::{ArenaName, Content, PeerId, RelPath};
use peers::{Attributes, Describe, Details, FileId, Lost};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{
    super::{Inner, Node, blocking},
    attributes::KeepAttributes,
    get::{Getting, Job},
};

impl Describe for Inner {
    fn describe(&self, arena: &ArenaName, paths: &[RelPath]) -> Vec<Option<Details>> {
        let held = self.namespace.arenas().unwrap_or_default().into_iter().find(|held| held.name == *arena);
        let Some(root) = held.and_then(|held| open_root(&held.dir?).ok()) else { return vec![None; paths.len()] };
        paths.iter().map(|path| details_at(&root, path, self.keep_attributes)).collect()
    }

    fn special(&self, arena: &ArenaName, within: Option<&RelPath>) -> u64 {
        let states = self.arenas.lock().unwrap_or_else(PoisonError::into_inner);
        states.get(arena).map_or(0, |state| state.special(within))
    }
}

impl Node {
    /// Details of at most [`peers::DETAILS_MAX`] entries of an arena at a machine, in order, or why they are not known.
    /// `None` is this machine.
    pub(super) async fn details(
        &self,
        machine: Option<PeerId>,
        arena: &ArenaName,
        paths: Vec<RelPath>,
    ) -> Result<Vec<Option<Details>>, String> {
        match machine {
            Some(peer) => self.inner.peers.details(peer, arena, paths).await,
            None => {
                let (node, arena) = (self.clone(), arena.clone());
                let described = blocking(move || Ok(node.inner.describe(&arena, &paths))).await;
                described.map_err(|failure| failure.reason())
            }
        }
    }

    /// The same of a machine that can be asked now, which may take long of one that is not connected.
    pub(super) async fn details_now(
        &self,
        machine: Option<PeerId>,
        arena: &ArenaName,
        paths: Vec<RelPath>,
    ) -> Result<Vec<Option<Details>>, String> {
        match machine.filter(|&peer| !self.inner.peers.is_connected(peer)) {
            Some(peer) => Err(format!("{} is not connected", self.peer_name(Some(peer)))),
            None => self.details(machine, arena, paths).await,
        }
    }

    /// How many sockets, FIFOs and devices are at and below a path at a machine; 0 if that is not known.
    pub(super) async fn special(&self, machine: Option<PeerId>, arena: &ArenaName, within: Option<&RelPath>) -> u64 {
        match machine {
            Some(peer) => self.inner.peers.special(peer, arena, within).await.unwrap_or(0),
            None => self.inner.special(arena, within),
        }
    }
}

impl Getting {
    /// Asks machines that have entries, and are connected, what there is to know of them beside their content. What nobody
    /// says stays unknown: nothing is removed anywhere.
    pub(super) async fn describe(&self, jobs: &mut [Job]) {
        let mut by_holders: BTreeMap<Vec<Option<PeerId>>, Vec<usize>> = BTreeMap::new();
        for (at, job) in jobs.iter().enumerate().filter(|(_, job)| matches!(job.content, Content::File { .. })) {
            by_holders.entry(job.holders.clone()).or_default().push(at);
        }
        for (holders, at) in by_holders {
            let arena = &jobs[at[0]].source.arena;
            let paths: Vec<_> = at.iter().filter_map(|&at| jobs[at].source.path.clone()).collect();
            for &holder in &holders {
                let Ok(described) = self.node.details_now(holder, arena, paths.clone()).await else { continue };
                for (&at, described) in at.iter().zip(described) {
                    jobs[at].described = Ok(described);
                    // Numbers of files mean something at this machine.
                    jobs[at].holders = vec![holder];
                }
                break;
            }
        }
    }
}

/// What a source says of an entry beside its content; else why that is not known.
pub(super) type Described = Result<Option<Details>, String>;

/// What was not kept of an entry, in words.
pub(super) fn not_kept(lost: Lost) -> Vec<String> {
    let words = [(lost.attributes, "extended attributes"), (lost.mode, "permissions")];
    words.into_iter().filter(|(is_lost, _)| *is_lost).map(|(_, word)| word.to_owned()).collect()
}

fn open_root(dir: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, dir, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Details of a file or directory below `root`. What is there is not opened for reading: it may be a device.
fn details_at(root: &OwnedFd, path: &RelPath, keep: KeepAttributes) -> Option<Details> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let below = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let opened = rustix::fs::openat2(root, path.as_path(), flags, Mode::empty(), below);
    let stated = opened.and_then(|entry| Ok((rustix::fs::fstat(&entry)?, entry)));
    let (stat, entry) = match stated {
        Ok(stated) => stated,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return None,
        Err(_) => return Some(Details { file: None, attributes: Attributes::new(Vec::new(), true) }),
    };
    let kind = FileType::from_raw_mode(stat.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::Directory) {
        return None;
    }
    let has_names = kind == FileType::RegularFile && stat.st_nlink > 1;
    let file = has_names.then_some(FileId { device: stat.st_dev, inode: stat.st_ino });
    Some(Details { file, attributes: keep.read(&entry) })
}

/// Files with several names that one command has met, and what it made of each.
pub(super) struct Linked<K, T>(Mutex<HashMap<K, Slot<T>>>);

/// What was made of a file, once something is. Whoever is about to make something of it waits here.
pub(super) type Slot<T> = Arc<tokio::sync::Mutex<Option<T>>>;

impl<K, T> Default for Linked<K, T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq, T> Linked<K, T> {
    /// What was made of a file. `None` for one more than are remembered: its names become files of their own.
    pub(super) fn slot(&self, file: K) -> Option<Slot<T>> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if files.len() >= FILES_MAX && !files.contains_key(&file) {
            return None;
        }
        Some(files.entry(file).or_default().clone())
    }
}

/// How many files with several names one command remembers.
const FILES_MAX: usize = 65_536;

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::fs::mknodat;

    use super::*;

    #[test]
    fn names_of_one_file_are_known_as_such_and_nothing_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("dir/one"), b"x").unwrap();
        fs::hard_link(at("dir/one"), at("two")).unwrap();
        fs::write(at("alone"), b"x").unwrap();
        std::os::unix::fs::symlink("dir", at("link")).unwrap();
        mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let dir = open_root(root.path()).unwrap();
        let details = |path: &str| details_at(&dir, &path.try_into().unwrap(), KeepAttributes::Users);
        let file = details("dir/one").unwrap().file;
        assert!(file.is_some());
        assert_eq!(details("two").unwrap().file, file);
        assert_eq!(details("alone"), Some(Details::default()));
        assert_eq!(details("dir"), Some(Details::default()));
        for path in ["link", "link/one", "fifo", "missing", "two/below"] {
            assert_eq!(details(path), None, "{path}");
        }
    }

    #[test]
    fn a_command_remembers_so_many_files() {
        let linked = Linked::<usize, ()>::default();
        assert!((0..FILES_MAX).all(|file| linked.slot(file).is_some()));
        assert!(linked.slot(FILES_MAX).is_none() && linked.slot(0).is_some());
    }
}
