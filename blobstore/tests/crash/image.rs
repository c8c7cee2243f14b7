//! What is on the simulated disks, what can be done to it, and what a power cut leaves of that.
//!
//! - Bytes, length and mtime of a file are durable once the file, or its file system, was synced after they were
//!   written. Whatever else was written survives in sectors of 512 bytes, each by itself: by luck.
//! - Names are durable once their directory, or the file system, was synced. Of the others in a directory the first
//!   few survive, by luck how many: a journal keeps their order, but not that between directories.
//! - A file whose name, or whose directory's name, did not survive is gone.
//! - Every directory below `/` is a file system of its own, so that syncing the users' syncs nothing of the store's.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use tree::{ByteRange, UnixTime};

#[derive(Clone, Default)]
pub(crate) struct Image {
    pub(crate) dirs: BTreeSet<PathBuf>,
    pub(crate) names: BTreeMap<PathBuf, Inode>,
    pub(crate) files: BTreeMap<Inode, File>,
    /// How many operations there have been, ever; the clock, too.
    pub(crate) ticks: u64,
}

/// The number of a file; the upper half is that of its file system.
pub(crate) type Inode = u64;

#[derive(Clone, Default)]
pub(crate) struct File {
    /// Shared until somebody writes: power cuts by the thousand copy little.
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) mtime: UnixTime,
    pub(crate) ctime: UnixTime,
}

#[derive(Debug)]
pub(crate) enum Op {
    MakeDir(PathBuf),
    Create(PathBuf, Inode),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    Write(Inode, u64, Bytes),
    SetLen(Inode, u64),
    Punch(Inode, ByteRange),
    SetMtime(Inode, UnixTime),
    Rot(Inode, u64),
    Sync(Inode),
    SyncDir(PathBuf),
    SyncFileSystem(u64),
}

pub(crate) struct Bytes(pub(crate) Arc<Vec<u8>>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// What survives a power cut of that which was not synced: each piece with the chance `keep`.
pub(crate) struct Luck {
    pub(crate) keep: f64,
    pub(crate) rng: fastrand::Rng,
}

impl Luck {
    fn keeps(&mut self) -> bool {
        self.rng.f64() < self.keep
    }
}

impl Image {
    /// What a power cut behind `record`, the operations since this image, leaves.
    pub(crate) fn power_cut(&self, record: &[Op], mut luck: Luck) -> Image {
        let (mut image, mut cut_off) = (self.clone(), HashSet::new());
        for (op, durable) in record.iter().zip(durable(record)) {
            if durable {
                image.apply(op);
            } else {
                image.apply_by_luck(op, &mut luck, &mut cut_off);
            }
        }
        image.drop_unreachable();
        image
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        self.ticks += 1;
        let now = UnixTime { seconds: 1_700_000_000, nanos: self.ticks as u32 };
        match op {
            Op::MakeDir(path) => _ = self.dirs.insert(path.clone()),
            Op::Create(path, inode) => {
                self.names.insert(path.clone(), *inode);
                self.files.entry(*inode).or_insert(File { bytes: Arc::default(), mtime: now, ctime: now });
            }
            Op::Rename(from, to) => {
                if let Some(inode) = self.names.remove(from) {
                    self.names.insert(to.clone(), inode);
                }
            }
            Op::Remove(path) => _ = self.names.remove(path),
            Op::Write(inode, offset, bytes) => {
                if *offset == 0 && self.file(*inode).bytes.is_empty() {
                    self.file(*inode).bytes = bytes.0.clone();
                } else {
                    self.write(*inode, *offset, &bytes.0);
                }
                self.set_times(*inode, now, now);
            }
            Op::SetLen(inode, len) => {
                self.bytes(*inode).resize(*len as usize, 0);
                self.set_times(*inode, now, now);
            }
            Op::Punch(inode, range) => {
                self.punch(*inode, range.start() as usize..range.end() as usize);
                self.set_times(*inode, now, now);
            }
            Op::SetMtime(inode, mtime) => self.set_times(*inode, *mtime, now),
            Op::Rot(inode, offset) => {
                if let Some(byte) = self.bytes(*inode).get_mut(*offset as usize) {
                    *byte ^= 4;
                }
            }
            Op::Sync(_) | Op::SyncDir(_) | Op::SyncFileSystem(_) => {}
        }
    }

    /// Applies what luck leaves of an operation. In the directories `cut_off` no name survives any more.
    fn apply_by_luck<'a>(&mut self, op: &'a Op, luck: &mut Luck, cut_off: &mut HashSet<&'a Path>) {
        let survives = match (op.place(), op) {
            (Place::Names(dir), _) => {
                if !luck.keeps() {
                    cut_off.insert(dir);
                }
                !cut_off.contains(dir)
            }
            (_, Op::Write(inode, offset, bytes)) => {
                for sector in sectors(*offset, bytes.0.len()) {
                    if luck.keeps() {
                        self.write(*inode, offset + sector.start as u64, &bytes.0[sector]);
                    }
                }
                // The new length, as zeros, and the new mtime come with the inode, whatever became of the bytes.
                let (len, end) = (self.file(*inode).bytes.len(), *offset as usize + bytes.0.len());
                if luck.keeps() && len < end {
                    self.bytes(*inode).resize(end, 0);
                }
                if luck.keeps() {
                    let now = UnixTime { seconds: 1_700_000_000, nanos: self.ticks as u32 + 1 };
                    self.set_times(*inode, now, now);
                }
                false
            }
            // Some blocks become holes, and others stay.
            (_, Op::Punch(inode, range)) => {
                for start in (range.start() as usize..range.end() as usize).step_by(4096) {
                    if luck.keeps() {
                        self.punch(*inode, start..start + 4096);
                    }
                }
                false
            }
            _ => luck.keeps(),
        };
        if survives {
            self.apply(op);
        } else {
            self.ticks += 1;
        }
    }

    fn drop_unreachable(&mut self) {
        let all = self.dirs.clone();
        let reachable = |path: &Path| path.ancestors().skip(1).all(|dir| dir == Path::new("/") || all.contains(dir));
        self.dirs.retain(|dir| reachable(dir));
        self.names.retain(|path, _| reachable(path));
        let named: HashSet<Inode> = self.names.values().copied().collect();
        self.files.retain(|inode, _| named.contains(inode));
    }

    fn file(&mut self, inode: Inode) -> &mut File {
        self.files.entry(inode).or_default()
    }

    fn bytes(&mut self, inode: Inode) -> &mut Vec<u8> {
        Arc::make_mut(&mut self.file(inode).bytes)
    }

    fn write(&mut self, inode: Inode, offset: u64, bytes: &[u8]) {
        let (old, start) = (self.bytes(inode), offset as usize);
        old.resize(old.len().max(start + bytes.len()), 0);
        old[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn punch(&mut self, inode: Inode, range: Range<usize>) {
        let bytes = self.bytes(inode);
        let end = range.end.min(bytes.len());
        bytes[range.start.min(end)..end].fill(0);
    }

    fn set_times(&mut self, inode: Inode, mtime: UnixTime, ctime: UnixTime) {
        let file = self.file(inode);
        (file.mtime, file.ctime) = (mtime, ctime);
    }
}

/// `len` bytes to be written from `offset` on, split where sectors of the file begin.
fn sectors(offset: u64, len: usize) -> impl Iterator<Item = Range<usize>> {
    let first = 512 - offset as usize % 512;
    let starts = std::iter::once(0).chain((first..len).step_by(512));
    starts.map(move |start| start..if start == 0 { first.min(len) } else { (start + 512).min(len) })
}

/// Which operations of `record` a power cut behind it cannot undo.
fn durable(record: &[Op]) -> Vec<bool> {
    let (mut inodes, mut dirs, mut file_systems) = (HashSet::new(), HashSet::new(), HashSet::new());
    let mut durable: Vec<bool> = record
        .iter()
        .rev()
        .map(|op| match op.place() {
            Place::Content(inode) => inodes.contains(&inode) || file_systems.contains(&(inode >> 32)),
            Place::Names(dir) => dirs.contains(dir) || file_systems.contains(&file_system(dir)),
            Place::Itself => {
                match op {
                    Op::Sync(inode) => _ = inodes.insert(*inode),
                    Op::SyncDir(dir) => _ = dirs.insert(dir.as_path()),
                    Op::SyncFileSystem(number) => _ = file_systems.insert(*number),
                    _ => {}
                }
                true
            }
        })
        .collect();
    durable.reverse();
    durable
}

/// What an operation changes, and therefore what sync makes it durable.
enum Place<'a> {
    Names(&'a Path),
    Content(Inode),
    Itself,
}

impl Op {
    fn place(&self) -> Place<'_> {
        match self {
            Op::MakeDir(path) | Op::Create(path, _) | Op::Rename(_, path) | Op::Remove(path) => {
                Place::Names(path.parent().expect("nobody names the root"))
            }
            Op::Write(inode, ..) | Op::SetLen(inode, _) | Op::Punch(inode, _) | Op::SetMtime(inode, _) => {
                Place::Content(*inode)
            }
            Op::Rot(..) | Op::Sync(_) | Op::SyncDir(_) | Op::SyncFileSystem(_) => Place::Itself,
        }
    }
}

/// The number of the file system that `path` is on: the first letter of its first directory.
pub(crate) fn file_system(path: &Path) -> u64 {
    path.as_os_str().as_encoded_bytes()[1].into()
}
