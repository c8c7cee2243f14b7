//! What is exported, and how its objects look to a client. Attributes: spec/nfs.md, "The tree".

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use futures_util::{TryStreamExt, stream};

use nfs3_types::nfs3::{fattr3, ftype3, nfstime3, specdata3};
use tree::UnixTime;

use crate::{
    directory::{Directory, Entry, FileVersion, Kind},
    handle::Handle,
    reader::Reader,
    siblings::Siblings,
    view::{Object, View},
};

/// Everything that a client can ask for.
pub(crate) struct Export {
    pub(crate) view: View,
    pub(crate) reader: Reader,
    pub(crate) siblings: Arc<Mutex<Siblings>>,
    /// Whose file system `df` shows.
    pub(crate) home: PathBuf,
    pub(crate) look: Look,
}

impl Export {
    /// Something of a file is read that is not here. If it is small, and others of its directory were read like that a short
    /// while ago, these are fetched before they are asked for: those behind it in a listing, then those before it.
    pub(crate) fn missed(&self, handle: &Handle, version: &FileVersion) {
        let missed = |siblings: &mut Siblings| siblings.miss(handle.parent, handle.id, Instant::now());
        if version.size > SMALL_BYTES || !missed(&mut lock(&self.siblings)) {
            return;
        }
        let fetching = Fetching { siblings: self.siblings.clone(), directory: handle.parent };
        let Some(directory) = self.view.directory_of(handle) else { return };
        let reader = self.reader.clone();
        let files = small_files(&directory, handle.id, reader.read_ahead());
        tokio::spawn(async move {
            let _fetching = fetching;
            // Where one cannot be had, the others mostly cannot either.
            let files = stream::iter(files.into_iter().map(Ok));
            let _ = files.try_for_each_concurrent(AT_ONCE, |file| reader.fetch_likely(file.blob, file.size)).await;
        });
    }
}

/// Small files of a directory are being fetched ahead, until this is dropped.
struct Fetching {
    siblings: Arc<Mutex<Siblings>>,
    directory: u64,
}

impl Drop for Fetching {
    fn drop(&mut self) {
        lock(&self.siblings).end(self.directory);
    }
}

fn lock(siblings: &Mutex<Siblings>) -> MutexGuard<'_, Siblings> {
    siblings.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The small files of a directory that are listed behind the one with that id, and then those before it: so many as are
/// fetched ahead, and have at most `bytes` bytes together.
fn small_files(directory: &Directory, id: u64, mut bytes: u64) -> Vec<FileVersion> {
    let behind = directory.behind(id);
    let before = &directory.entries[..directory.entries.len() - behind.len()];
    let files = behind.iter().chain(before).filter(|entry| entry.id != id).filter_map(|entry| match &entry.kind {
        Kind::File(version) if (1..=SMALL_BYTES).contains(&version.size) => Some(*version),
        _ => None,
    });
    let fits = |file: &FileVersion| bytes.checked_sub(file.size).map(|left| bytes = left).is_some();
    files.take(AHEAD_MAX).take_while(fits).collect()
}

/// How objects look.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Whether modes are without write permission.
    pub(crate) read_only: bool,
}

impl Look {
    pub(crate) fn object(&self, object: &Object) -> fattr3 {
        match object {
            Object::Directory(directory) => {
                let links = directory.directories.saturating_add(2);
                let (id, mtime) = (directory.id, directory.mtime);
                self.attributes(ftype3::NF3DIR, 0o775, links, DIRECTORY_BYTES, id, mtime)
            }
            Object::File { id, version, .. } => self.file(*id, version),
            Object::Symlink { id, target, mtime } => self.symlink(*id, target, *mtime),
        }
    }

    /// Of an entry that is no directory.
    pub(crate) fn leaf(&self, entry: &Entry) -> Option<fattr3> {
        match &entry.kind {
            Kind::Directory { .. } => None,
            Kind::File(version) => Some(self.file(entry.id, version)),
            Kind::Symlink { target, mtime } => Some(self.symlink(entry.id, target, *mtime)),
        }
    }

    fn file(&self, id: u64, version: &FileVersion) -> fattr3 {
        let mode = if version.is_executable { 0o775 } else { 0o664 };
        self.attributes(ftype3::NF3REG, mode, 1, version.size, id, version.mtime)
    }

    fn symlink(&self, id: u64, target: &[u8], mtime: UnixTime) -> fattr3 {
        let attributes = self.attributes(ftype3::NF3LNK, 0o777, 1, target.len() as u64, id, mtime);
        fattr3 { mode: 0o777, ..attributes }
    }

    fn attributes(&self, type_: ftype3, mode: u32, nlink: u32, size: u64, fileid: u64, mtime: UnixTime) -> fattr3 {
        let mode = if self.read_only { mode & !0o222 } else { mode };
        let time = match u32::try_from(mtime.seconds) {
            Ok(seconds) => nfstime3 { seconds, nseconds: mtime.nanos },
            Err(_) if mtime.seconds < 0 => nfstime3 { seconds: 0, nseconds: 0 },
            Err(_) => nfstime3 { seconds: u32::MAX, nseconds: 0 },
        };
        fattr3 {
            type_,
            mode,
            nlink,
            uid: self.uid,
            gid: self.gid,
            size,
            used: size,
            rdev: specdata3 { specdata1: 0, specdata2: 0 },
            fsid: FSID,
            fileid,
            atime: time,
            mtime: time,
            ctime: time,
        }
    }
}

/// Of files up to this size, others of a directory are fetched ahead.
const SMALL_BYTES: u64 = 64 << 10;
/// So many of them.
const AHEAD_MAX: usize = 256;
/// So many at a time.
const AT_ONCE: usize = 32;
const DIRECTORY_BYTES: u64 = 4096;
const FSID: u64 = 0x626c_6f62;
