//! Outboards of blobs in place: in a row if short, in a file of the store's own if not. Format: spec/store.md.

use std::{
    collections::{BTreeSet, HashSet},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use redb::WriteTransaction;
use tracing::warn;
use tree::{BlobId, Geometry, Grain, ReadAt, hash_into};

use crate::{
    Access, Disk, DiskFile, Store, StoreError,
    place::own_file,
    rows::{DIRS, FILES, HOLDERS, INLINE_OUTBOARD_BYTES, OUTBOARDS},
    store::holders,
};

/// A file's bytes, hashed: their blob id, and their outboard, as long as it is not linked, in memory or in a file
/// of the store's own that goes away with this.
#[derive(Debug)]
pub struct HashedFile {
    id: BlobId,
    size: u64,
    pairs: NewPairs,
}

#[derive(Debug)]
enum NewPairs {
    Row(Vec<u8>),
    File(Staged),
}

/// A file that is deleted when this is dropped, unless it was renamed by then.
pub(crate) struct Staged {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) path: PathBuf,
    pub(crate) grain: Grain,
}

/// An outboard as it is kept, perhaps damaged.
pub(crate) struct Outboard {
    pub(crate) pairs: Pairs,
    pub(crate) grain: Grain,
}

pub(crate) enum Pairs {
    Memory(Vec<u8>),
    File(Box<dyn DiskFile>),
}

impl Outboard {
    /// Whether there is something behind the last pair of a blob of `size` bytes.
    pub(crate) fn has_surplus(&self, size: u64) -> bool {
        let len = match &self.pairs {
            Pairs::Memory(bytes) => Ok(bytes.len() as u64),
            Pairs::File(file) => file.fingerprint().map(|fingerprint| fingerprint.size),
        };
        len.is_ok_and(|len| len > Geometry::new(size).outboard_bytes_at(self.grain))
    }
}

impl HashedFile {
    /// What the bytes are.
    pub fn id(&self) -> BlobId {
        self.id
    }

    /// How many bytes there are.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What is to be in the outboard's row, if there is to be one. The blobs of one group have neither row nor file.
    fn row(&self) -> Option<&[u8]> {
        match &self.pairs {
            NewPairs::Row(bytes) if Geometry::new(self.size).outboard_bytes() > 0 => Some(bytes),
            _ => None,
        }
    }
}

impl Store {
    /// Hashes the first `size` bytes of `data`, in parallel. The outboard, of the grain that the store is set to,
    /// goes to the disk while it is made if it is long. Errors are as for [`tree::hash`].
    pub fn hash<R: ReadAt + ?Sized>(&self, data: &R, size: u64) -> io::Result<HashedFile> {
        let (grain, inner) = (self.inner.settings.grain, &self.inner);
        let bytes = Geometry::new(size).outboard_bytes_at(grain);
        if bytes <= INLINE_OUTBOARD_BYTES {
            let pairs = Mutex::new(vec![0; bytes as usize]);
            let id = hash_into(data, size, grain, &pairs)?;
            let pairs = NewPairs::Row(pairs.into_inner().unwrap_or_else(PoisonError::into_inner));
            return Ok(HashedFile { id, size, pairs });
        }
        let staged = self.stage(grain);
        let file = inner.disk.open(&staged.path, Access::Create)?;
        let id = hash_into(data, size, grain, &file)?;
        Ok(HashedFile { id, size, pairs: NewPairs::File(staged) })
    }

    /// The hash of a blob that is whole in the cache, whose outboard was proven there. `None` if it is not whole. Where
    /// outboards are kept as they are in the cache, the bytes are not read.
    pub fn hash_cached(&self, blob: BlobId) -> Result<Option<HashedFile>, StoreError> {
        // What is whole in the cache is neither evicted nor taken meanwhile.
        let _files = self.inner.cache_files.read().unwrap_or_else(PoisonError::into_inner);
        let Some(row) = self.cached_row(blob)?.filter(|row| row.proven.contains(Geometry::new(row.size).all())) else {
            return Ok(None);
        };
        let (size, disk) = (row.size, &self.inner.disk);
        let (data, outboard) = (self.cache_file(blob), self.cache_outboard_file(blob));
        let bytes = Geometry::new(size).outboard_bytes();
        if self.inner.settings.grain != Grain::GROUP || bytes == 0 {
            let hash = || match self.inline_bytes(blob) {
                Ok(Some(bytes)) => self.hash(&bytes[..], size),
                _ => self.hash(&*disk.open(&data, Access::Read)?, size),
            };
            let hashed = hash().map_err(StoreError::file("hash", &data))?;
            return Ok(Some(hashed).filter(|hashed| hashed.id == blob));
        }
        let copy = || {
            let from = disk.open(&outboard, Access::Read)?;
            let mut part = vec![0; bytes.min(INLINE_OUTBOARD_BYTES) as usize];
            if bytes <= INLINE_OUTBOARD_BYTES {
                from.read_exact_at(&mut part, 0)?;
                return Ok(NewPairs::Row(part));
            }
            let staged = self.stage(Grain::GROUP);
            let to = disk.open(&staged.path, Access::Create)?;
            let mut at = 0;
            while at < bytes {
                part.truncate((bytes - at).min(INLINE_OUTBOARD_BYTES) as usize);
                from.read_exact_at(&mut part, at)?;
                to.write_all_at(&part, at)?;
                at += part.len() as u64;
            }
            Ok(NewPairs::File(staged))
        };
        let pairs = copy().map_err(StoreError::file("copy", &outboard))?;
        Ok(Some(HashedFile { id: blob, size, pairs }))
    }

    /// A place for an outboard, as long as its blob is not linked.
    fn stage(&self, grain: Grain) -> Staged {
        let number = self.inner.staged.fetch_add(1, Ordering::Relaxed);
        let path = self.inner.settings.outboards.join(STAGED_DIR).join(format!("{number}"));
        Staged { disk: self.inner.disk.clone(), path, grain }
    }

    /// The outboard of a blob in place. If it is gone, an empty one, with which nothing proves.
    pub(crate) fn outboard(&self, blob: BlobId, size: u64) -> Result<Outboard, StoreError> {
        let (geometry, grain) = (Geometry::new(size), self.inner.settings.grain);
        if geometry.outboard_bytes() == 0 {
            return Ok(Outboard { pairs: Pairs::Memory(Vec::new()), grain });
        }
        if let Some(row) = self.inline_outboard(blob)? {
            // The length tells the grain: two have the same only if both keep nothing.
            let kept = Grain::ALL.into_iter().find(|&grain| geometry.outboard_bytes_at(grain) == row.len() as u64);
            return Ok(Outboard { pairs: Pairs::Memory(row), grain: kept.unwrap_or(grain) });
        }
        for grain in [grain].into_iter().chain(Grain::ALL) {
            match self.inner.disk.open(&self.outboard_file(blob, grain), Access::Read) {
                Ok(file) => return Ok(Outboard { pairs: Pairs::File(file), grain }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => warn!(%blob, reason = tree::reason(&error), "its outboard cannot be opened"),
            }
        }
        warn!(%blob, "its outboard is lost");
        Ok(Outboard { pairs: Pairs::Memory(Vec::new()), grain })
    }

    fn inline_outboard(&self, blob: BlobId) -> Result<Option<Vec<u8>>, StoreError> {
        self.read_rows("look up an outboard", |txn| {
            Ok(txn.open_table(OUTBOARDS)?.get(blob.as_bytes())?.map(|row| row.value().to_owned()))
        })
    }

    pub(crate) fn outboard_file(&self, blob: BlobId, grain: Grain) -> PathBuf {
        own_file(&self.inner.settings.outboards, blob, &extension(grain))
    }

    /// Makes the outboard of `file` that of its blob, which is in place, instead of any that there is.
    pub(crate) fn replace_outboard(&self, file: &HashedFile) -> Result<(), StoreError> {
        let _linking = self.inner.linking.lock().unwrap_or_else(PoisonError::into_inner);
        self.place_outboard_files([file])?;
        self.write("replace an outboard", |txn| put_outboard_row(txn, file))?;
        self.remove_outboard_files([file.id], Some(file))
    }

    /// Puts the outboards that are files where they belong, durably.
    pub(crate) fn place_outboard_files<'a>(
        &self,
        files: impl IntoIterator<Item = &'a HashedFile>,
    ) -> Result<(), StoreError> {
        let disk = &self.inner.disk;
        let mut dirs = HashSet::new();
        for file in files {
            let NewPairs::File(staged) = &file.pairs else { continue };
            let path = self.outboard_file(file.id, staged.grain);
            let dir = path.parent().unwrap_or(&self.inner.settings.outboards).to_owned();
            let placed = disk.create_dirs(&dir).and_then(|()| {
                disk.open(&staged.path, Access::Write)?.sync()?;
                disk.rename(&staged.path, &path)
            });
            placed.map_err(StoreError::file("write", &path))?;
            dirs.insert(dir);
        }
        if dirs.is_empty() {
            return Ok(());
        }
        dirs.insert(self.inner.settings.outboards.clone());
        dirs.iter().try_for_each(|dir| disk.sync_dir(dir).map_err(StoreError::file("sync", dir)))
    }

    /// Deletes the outboard files of `blobs`, but for the one that `kept` has just become.
    pub(crate) fn remove_outboard_files(
        &self,
        blobs: impl IntoIterator<Item = BlobId>,
        kept: Option<&HashedFile>,
    ) -> Result<(), StoreError> {
        let kept = kept.and_then(|kept| match &kept.pairs {
            NewPairs::File(staged) => Some(self.outboard_file(kept.id, staged.grain)),
            NewPairs::Row(_) => None,
        });
        for blob in blobs {
            for path in Grain::ALL.map(|grain| self.outboard_file(blob, grain)) {
                if kept.as_ref() != Some(&path) {
                    self.inner.disk.remove(&path).map_err(StoreError::file("remove", path))?;
                }
            }
        }
        Ok(())
    }

    /// Deletes outboard files that no row names: what a crash between a file and its row left behind.
    pub(crate) fn remove_orphan_outboards(&self) -> Result<(), StoreError> {
        let dir = &self.inner.settings.outboards;
        for path in self.inner.disk.files_below(dir).map_err(StoreError::file("list", dir))? {
            let blob = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            let is_orphan = if path.parent() == Some(&dir.join(STAGED_DIR)) {
                true
            } else if let Some(blob) = blob {
                Grain::ALL.iter().any(|&grain| path == self.outboard_file(blob, grain))
                    && self.holders(blob, 1)?.is_empty()
            } else {
                false
            };
            if is_orphan {
                self.inner.disk.remove(&path).map_err(StoreError::file("remove", path))?;
            }
        }
        Ok(())
    }
}

/// Puts the outboard of a file into its row, or takes a row away that an outboard of another grain had.
pub(crate) fn put_outboard_row(txn: &WriteTransaction, file: &HashedFile) -> Result<(), redb::Error> {
    let mut table = txn.open_table(OUTBOARDS)?;
    match file.row() {
        Some(row) => table.insert(file.id.as_bytes(), row)?,
        None => table.remove(file.id.as_bytes())?,
    };
    Ok(())
}

/// Drops the outboard rows of those blobs that no file holds any more; returns the ids of those that may have an
/// outboard file, which the caller deletes once this is committed.
pub(crate) fn forget_unheld(
    txn: &WriteTransaction,
    blobs: BTreeSet<(BlobId, u64)>,
) -> Result<Vec<BlobId>, redb::Error> {
    let (table, dirs, rows) = (txn.open_table(HOLDERS)?, txn.open_table(DIRS)?, txn.open_table(FILES)?);
    let mut files = Vec::new();
    for (blob, size) in blobs {
        if Geometry::new(size).outboard_bytes() == 0 || !holders(&table, &dirs, &rows, blob, 1)?.is_empty() {
            continue;
        }
        txn.open_table(OUTBOARDS)?.remove(blob.as_bytes())?;
        if has_outboard_file(size) {
            files.push(blob);
        }
    }
    Ok(files)
}

/// Whether the outboard of a blob of `size` bytes may be a file: at the finest grain it is.
pub(crate) fn has_outboard_file(size: u64) -> bool {
    Geometry::new(size).outboard_bytes() > INLINE_OUTBOARD_BYTES
}

/// What bao-tree calls outboards of this grain.
fn extension(grain: Grain) -> String {
    format!("obao{}", grain.log_chunks())
}

impl std::fmt::Debug for Staged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.path.fmt(f)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Whatever cannot be deleted now is at the next start.
        let _ = self.disk.remove(&self.path);
    }
}

impl ReadAt for Pairs {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Memory(bytes) => bytes[..].read_exact_at(buf, offset),
            Self::File(file) => file.read_exact_at(buf, offset),
        }
    }
}

/// Below the outboards' directory: outboards of blobs whose id is not known yet.
pub(crate) const STAGED_DIR: &str = "staged";
