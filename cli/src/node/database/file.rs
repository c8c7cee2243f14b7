//! Storage backends of redb over the database's file. Writes that must not reach the file, or find no free space, stay in memory.

use std::{
    collections::BTreeMap,
    io,
    ops::{Bound, Range},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use blobstore::is_full;
use redb::{BackendError, StorageBackend};
use tokio::sync::watch;

use super::{Failed, Reserve};

/// A backend that waits for free space instead of failing without it, and publishes its first error: spec/store.md, "Full disks".
#[derive(Debug)]
pub(super) struct Roomy<F> {
    file: Overlaid<F>,
    reserve: Arc<Reserve>,
    failed: watch::Sender<Option<String>>,
}

impl<F: StorageBackend> Roomy<F> {
    pub(super) fn new(file: F, reserve: Arc<Reserve>) -> (Self, Failed) {
        let (failed, health) = watch::channel(None);
        (Self { file: Overlaid::new(file), reserve, failed }, health)
    }

    /// Runs `write` on the file. Runs `keep` instead if earlier writes are in memory, or if there is no free space even after
    /// the reserve was released.
    fn write_or_keep(
        &self,
        write: impl Fn(&F) -> io::Result<()>,
        keep: impl FnOnce(&mut Kept, &F) -> io::Result<()>,
    ) -> io::Result<()> {
        if !self.file.is_keeping() {
            match self.reserve.spend(|| write(&self.file.file)) {
                Err(error) if is_full(&error) => {}
                outcome => return outcome,
            }
        }
        self.file.keep(keep)
    }

    /// Flushes the writes in memory to the file. Waits for free space.
    fn write_kept(&self) -> io::Result<()> {
        while self.file.is_keeping() {
            match self.reserve.spend(|| self.file.write_kept()) {
                Err(error) if is_full(&error) && self.reserve.wait() => {}
                outcome => return outcome,
            }
        }
        Ok(())
    }

    fn note<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        outcome.inspect_err(|error| {
            self.failed.send_if_modified(|failed| {
                let is_first = failed.is_none();
                failed.get_or_insert_with(|| tree::reason(error));
                is_first
            });
        })
    }
}

impl<F: StorageBackend> StorageBackend for Roomy<F> {
    fn len(&self) -> io::Result<u64> {
        self.note(self.file.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.note(self.file.read(offset, out))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(self.write_or_keep(|file| file.set_len(len), |kept, _| kept.set_len(len)))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.note(self.write_kept().and_then(|()| self.file.file.sync_data()))?;
        self.reserve.refill();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(self.write_or_keep(|file| file.write(offset, data), |kept, file| kept.write(file, offset, data)))
    }

    closing_and_locks!();
}

/// A backend that never changes its file: all writes stay in memory.
#[derive(Debug)]
pub(super) struct Unwritten<F> {
    file: Overlaid<F>,
}

impl<F: StorageBackend> Unwritten<F> {
    pub(super) fn new(file: F) -> Self {
        Self { file: Overlaid::new(file) }
    }
}

impl<F: StorageBackend> StorageBackend for Unwritten<F> {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.keep(|kept, _| kept.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.keep(|kept, file| kept.write(file, offset, data))
    }

    closing_and_locks!();
}

/// Forwards closing and locking to the file.
macro_rules! closing_and_locks {
    () => {
        fn close(&self) -> io::Result<()> {
            self.file.file.close()
        }

        fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.file.file.try_lock_range(start, end)
        }

        fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.file.file.try_lock_shared_range(start, end)
        }

        fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.file.file.lock_range(start, end)
        }

        fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.file.file.lock_shared_range(start, end)
        }

        fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.file.file.unlock_range(start, end)
        }

        fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.file.file.query_lock_range(start, end)
        }
    };
}
use closing_and_locks;

/// A file with writes in memory over it.
#[derive(Debug)]
struct Overlaid<F> {
    file: F,
    kept: Mutex<Kept>,
    /// Whether there are writes in memory. Set and cleared under the lock.
    is_keeping: AtomicBool,
}

/// Writes in memory, by block, and the length of the file with them.
#[derive(Debug)]
struct Kept {
    blocks: BTreeMap<u64, Vec<u8>>,
    len: Option<u64>,
    /// The shortest length that was set: bytes of the file behind it were cut off.
    cut: u64,
}

impl Default for Kept {
    fn default() -> Self {
        Self { blocks: BTreeMap::new(), len: None, cut: u64::MAX }
    }
}

impl<F: StorageBackend> Overlaid<F> {
    fn new(file: F) -> Self {
        Self { file, kept: Mutex::default(), is_keeping: AtomicBool::new(false) }
    }

    fn is_keeping(&self) -> bool {
        self.is_keeping.load(Ordering::Acquire)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn len(&self) -> io::Result<u64> {
        self.kept().len.map_or_else(|| self.file.len(), Ok)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if !self.is_keeping() {
            return self.file.read(offset, out);
        }
        let kept = self.kept();
        let len = kept.len.map_or_else(|| self.file.len(), Ok)?;
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (number, part, within) in blocks_of(offset, out.len()) {
            match kept.blocks.get(&number) {
                Some(block) => out[part].copy_from_slice(&block[within]),
                None => out[part].copy_from_slice(&kept.block_of(&self.file, number)?[within]),
            }
        }
        Ok(())
    }

    fn keep(&self, keep: impl FnOnce(&mut Kept, &F) -> io::Result<()>) -> io::Result<()> {
        let mut kept = self.kept();
        self.is_keeping.store(true, Ordering::Release);
        keep(&mut kept, &self.file)
    }

    /// Flushes the writes to the file, and drops those that succeeded.
    fn write_kept(&self) -> io::Result<()> {
        let mut kept = self.kept();
        if kept.cut < self.file.len()? {
            self.file.set_len(kept.cut)?;
        }
        let len = kept.len.map_or_else(|| self.file.len(), Ok)?;
        self.file.set_len(len)?;
        while let Some(entry) = kept.blocks.first_entry() {
            let start = entry.key() * BLOCK;
            let end = len.saturating_sub(start).min(BLOCK) as usize;
            self.file.write(start, &entry.get()[..end])?;
            entry.remove();
        }
        *kept = Kept::default();
        self.is_keeping.store(false, Ordering::Release);
        Ok(())
    }
}

impl Kept {
    fn set_len(&mut self, len: u64) -> io::Result<()> {
        (self.len, self.cut) = (Some(len), self.cut.min(len));
        self.blocks.split_off(&len.div_ceil(BLOCK));
        // Bytes that are cut off read as zeros if the file grows again.
        if let Some(last) = self.blocks.get_mut(&(len / BLOCK)) {
            last[(len % BLOCK) as usize..].fill(0);
        }
        Ok(())
    }

    fn write(&mut self, file: &impl StorageBackend, offset: u64, data: &[u8]) -> io::Result<()> {
        let len = self.len.map_or_else(|| file.len(), Ok)?;
        for (number, part, within) in blocks_of(offset, data.len()) {
            let mut block = match self.blocks.remove(&number) {
                Some(block) => block,
                None => self.block_of(file, number)?,
            };
            block[within].copy_from_slice(&data[part]);
            self.blocks.insert(number, block);
        }
        self.len = Some(len.max(offset + data.len() as u64));
        Ok(())
    }

    /// Reads a block of the file, with zeros behind its end or where it was cut off.
    fn block_of(&self, file: &impl StorageBackend, number: u64) -> io::Result<Vec<u8>> {
        let mut block = vec![0; BLOCK as usize];
        let there = file.len()?.min(self.cut).saturating_sub(number * BLOCK).min(BLOCK) as usize;
        if there > 0 {
            file.read(number * BLOCK, &mut block[..there])?;
        }
        Ok(block)
    }
}

/// The blocks that `len` bytes from `offset` on are in: number, which of the bytes, and where in the block.
fn blocks_of(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let (first, end) = (offset / BLOCK, offset + len as u64);
    (first..end.div_ceil(BLOCK)).map(move |number| {
        let (from, to) = (offset.max(number * BLOCK), end.min((number + 1) * BLOCK));
        let within = |base: u64| (from - base) as usize..(to - base) as usize;
        (number, within(offset), within(number * BLOCK))
    })
}

const BLOCK: u64 = 4096;

#[cfg(test)]
mod tests {
    use fastrand::Rng;
    use redb::backends::InMemoryBackend;

    use super::*;

    /// A file on a disk that may be full: growing it fails, and a write fails after its first half.
    #[derive(Debug)]
    struct Small {
        file: InMemoryBackend,
        is_full: Arc<AtomicBool>,
    }

    impl StorageBackend for Small {
        fn len(&self) -> io::Result<u64> {
            StorageBackend::len(&self.file)
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            StorageBackend::read(&self.file, offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            match self.is_full.load(Ordering::Relaxed) && len > StorageBackend::len(self)? {
                true => Err(io::ErrorKind::StorageFull.into()),
                false => StorageBackend::set_len(&self.file, len),
            }
        }

        fn sync_data(&self) -> io::Result<()> {
            Ok(())
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            if self.is_full.load(Ordering::Relaxed) {
                StorageBackend::write(&self.file, offset, &data[..data.len() / 2])?;
                return Err(io::ErrorKind::StorageFull.into());
            }
            StorageBackend::write(&self.file, offset, data)
        }
    }

    /// Reads return the latest writes, full disk or not; and after a sync that succeeds, the file has them all.
    #[test]
    fn what_finds_no_room_is_kept_until_there_is() {
        let dir = tempfile::tempdir().unwrap();
        for seed in 0..20_000 {
            let mut rng = Rng::with_seed(seed);
            let is_full = Arc::new(AtomicBool::new(false));
            let small = Small { file: InMemoryBackend::new(), is_full: is_full.clone() };
            let (file, failed) =
                Roomy::new(small, Arc::new(Reserve::open(dir.path().join("no such directory/reserve"))));
            let mut oracle = Vec::new();
            for _ in 0..rng.usize(1..60) {
                match rng.u8(..8) {
                    0 => {
                        let len = rng.u64(..6 * BLOCK);
                        file.set_len(len).unwrap();
                        oracle.resize(len as usize, 0);
                    }
                    1..=3 if !oracle.is_empty() => {
                        let (offset, byte) = (rng.usize(..oracle.len()), rng.u8(..));
                        let len = rng.usize(..=(oracle.len() - offset).min(2 * BLOCK as usize));
                        file.write(offset as u64, &vec![byte; len]).unwrap();
                        oracle[offset..offset + len].fill(byte);
                    }
                    4 => is_full.store(rng.bool(), Ordering::Relaxed),
                    5 => {
                        let synced = file.sync_data();
                        if synced.is_ok() {
                            let mut bytes = vec![0; oracle.len()];
                            assert_eq!(
                                StorageBackend::len(&file.file.file).unwrap(),
                                oracle.len() as u64,
                                "seed {seed}"
                            );
                            StorageBackend::read(&file.file.file, 0, &mut bytes).unwrap();
                            assert!(bytes == oracle, "seed {seed}");
                        } else {
                            assert!(is_full.load(Ordering::Relaxed), "seed {seed}: {synced:?}");
                            assert!(failed.borrow().is_some());
                            break;
                        }
                    }
                    _ => {
                        let offset = rng.usize(..=oracle.len());
                        let mut bytes = vec![0; rng.usize(..=oracle.len() - offset)];
                        file.read(offset as u64, &mut bytes).unwrap();
                        assert!(bytes == oracle[offset..offset + bytes.len()], "seed {seed}");
                    }
                }
                assert_eq!(file.len().unwrap(), oracle.len() as u64, "seed {seed}");
            }
        }
    }
}
