//! Lists of blobs' chunks, kept so that they need not be made again. Format: spec/store.md, "Chunk lists".

use std::path::PathBuf;

use tracing::debug;
use tree::BlobId;

use crate::{Access, Store, StoreError};

impl Store {
    /// What was [kept](Self::keep_list) for `blob`, unless it was dropped meanwhile or is damaged.
    pub fn kept_list(&self, blob: BlobId) -> Option<Vec<u8>> {
        let path = self.list_file(blob);
        let file = self.inner.disk.open(&path, Access::Read).ok()?;
        let len = file.fingerprint().ok()?.size;
        let mut bytes = vec![0; usize::try_from(len).ok().filter(|&len| len <= LIST_BYTES_MAX)?];
        let read = file.read_exact_at(&mut bytes, 0);
        let list = bytes.split_at_checked(32).filter(|_| read.is_ok());
        let Some((_, list)) = list.filter(|(sum, list)| *sum == checksum(blob, list)) else {
            debug!(?path, "a kept list is damaged, and dropped");
            let _ = self.inner.disk.remove(&path);
            return None;
        };
        // That moves the change time, by which the next one to drop is chosen.
        if let (Ok(file), Ok(now)) = (self.inner.disk.open(&path, Access::Write), file.fingerprint()) {
            let _ = file.set_mtime(now.mtime);
        }
        Some(list.to_owned())
    }

    /// Keeps a list of `blob` for later, and drops others that were used longest ago to make room for it. One that is
    /// too long is not kept. Not durable, and need not be.
    pub fn keep_list(&self, blob: BlobId, list: &[u8]) -> Result<(), StoreError> {
        let path = self.list_file(blob);
        let bytes = [&checksum(blob, list)[..], list].concat();
        if bytes.len() > LIST_BYTES_MAX {
            return Ok(());
        }
        let (disk, dir) = (&self.inner.disk, self.lists_dir());
        disk.create_dirs(&dir).map_err(StoreError::file("create", &dir))?;
        let mut others = Vec::new();
        for other in disk.files_below(&dir).map_err(StoreError::file("list", &dir))? {
            let fingerprint = disk.open(&other, Access::Read).and_then(|file| file.fingerprint());
            if let Some(fingerprint) = fingerprint.ok().filter(|_| other != path) {
                others.push((fingerprint.ctime, fingerprint.size, other));
            }
        }
        others.sort_by_key(|(used, ..)| (used.seconds, used.nanos));
        let mut total = others.iter().map(|(_, size, _)| size).sum::<u64>() + bytes.len() as u64;
        for (_, size, other) in others {
            if total <= LISTS_BYTES_MAX {
                break;
            }
            disk.remove(&other).map_err(StoreError::file("remove", other))?;
            total -= size;
        }
        let write = || {
            let file = disk.open(&path, Access::Create)?;
            file.set_len(bytes.len() as u64)?;
            file.write_all_at(&bytes, 0)
        };
        write().map_err(StoreError::file("write", path))
    }

    fn lists_dir(&self) -> PathBuf {
        self.inner.settings.cache.join("chunks")
    }

    fn list_file(&self, blob: BlobId) -> PathBuf {
        self.lists_dir().join(format!("{blob}.chunks"))
    }
}

fn checksum(blob: BlobId, list: &[u8]) -> [u8; 32] {
    *BlobId::of(&[&blob.as_bytes()[..], list].concat()).as_bytes()
}

/// All lists together.
const LISTS_BYTES_MAX: u64 = 64 << 20;
const LIST_BYTES_MAX: usize = 16 << 20;
