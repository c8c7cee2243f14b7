//! The database's file, and whether it can be relied on: spec/store.md, "The database". All of it is read and compared with its
//! checksums when it is opened. After a failed system call its state on the disk is unknown, and after
//! a panic in redb it is damaged: the daemon ends then.

use std::{
    cell::Cell,
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File},
    io,
    ops::{Bound, Range},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use redb::{
    BackendError, Database, DatabaseError, ReadOnlyDatabase, StorageBackend, StorageError, backends::FileBackend,
};
use tokio::sync::watch;
use tracing::error;

/// Tells why the database failed, once it has.
pub(super) type DatabaseHealth = watch::Receiver<Option<String>>;

/// Why a database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// Somebody else has it open.
    #[error("another process has this home open")]
    Busy,
    /// It is not as it was written.
    #[error("the database is damaged: {0}")]
    Damaged(String),
    /// Something else failed.
    #[error(transparent)]
    Failed(DatabaseError),
}

/// Whether anything is in the database at `path`.
pub(super) fn is_there(path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(meta) => Ok(meta.len() > 0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Opens the database at `path`, and makes it if there is none. Before anything is written to it, all of it is read and compared
/// with its checksums.
pub(super) fn open(path: &Path) -> Result<(Database, DatabaseHealth), OpenError> {
    if is_there(path).map_err(|error| OpenError::Failed(error.into()))? {
        open_with(Unwritten::new(file_backend(path)?), true)?;
    }
    let (failed, health) = watch::channel(None);
    let database = open_with(Watched { file: file_backend(path)?, failed }, false)?;
    Ok((database, health))
}

/// Opens a damaged database for whatever can still be read in it, as of its last commit. Its file stays as it is. Reading may
/// panic.
pub(super) fn open_damaged(path: &Path) -> Result<ReadOnlyDatabase, OpenError> {
    let backend = Unwritten::new(file_backend(path)?);
    let mut flags = [0];
    let mut settle = || {
        backend.read(FLAGS_AT, &mut flags)?;
        backend.write(FLAGS_AT, &[flags[0] & !IS_OPEN])
    };
    settle().map_err(|error| OpenError::Failed(error.into()))?;
    judged(|| Database::builder().open_read_only_with_backend(backend))
}

fn file_backend(path: &Path) -> Result<FileBackend, OpenError> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    FileBackend::new(file.map_err(|error| OpenError::Failed(error.into()))?).map_err(OpenError::Failed)
}

fn open_with(backend: impl StorageBackend, check: bool) -> Result<Database, OpenError> {
    judged(|| {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(check).create_with_backend(backend)
    })
}

/// Sorts out why a database cannot be opened.
fn judged<T>(open: impl FnOnce() -> Result<T, DatabaseError>) -> Result<T, OpenError> {
    match expecting_panics(|| catch_unwind(AssertUnwindSafe(open))) {
        Ok(Ok(database)) => Ok(database),
        Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(OpenError::Busy),
        Ok(Err(DatabaseError::Storage(StorageError::Corrupted(reason)))) => Err(OpenError::Damaged(reason)),
        // No system call failed: it is no database, or reaches beyond its end.
        Ok(Err(DatabaseError::Storage(StorageError::Io(error)))) if error.raw_os_error().is_none() => {
            Err(OpenError::Damaged(error.to_string()))
        }
        Ok(Err(error)) => Err(OpenError::Failed(error)),
        Err(panic) => {
            let reason = panic.downcast_ref::<String>().map(String::as_str);
            let reason = reason.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it cannot be understood");
            Err(OpenError::Damaged(reason.to_owned()))
        }
    }
}

/// Runs `work`, which catches panics that damage may cause: they are not reported.
pub(super) fn expecting_panics<T>(work: impl FnOnce() -> T) -> T {
    /// Whatever becomes of the work, later panics are reported.
    struct Expecting;
    impl Drop for Expecting {
        fn drop(&mut self) {
            ARE_EXPECTED.set(false);
        }
    }
    ARE_EXPECTED.set(true);
    let _expecting = Expecting;
    work()
}

thread_local! {
    static ARE_EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Says of a panic at `place` whether there is nothing more to report: it was expected, or redb found that the database is
/// damaged, on which it panics; that ends the daemon.
pub(crate) fn explains_panic(place: &str, reason: &str) -> bool {
    if ARE_EXPECTED.get() {
        return true;
    }
    let is_damage = place.contains("/redb");
    if is_damage && DAMAGE.send_replace(Some(reason.to_owned())).is_none() {
        error!(reason, place, "the database is damaged");
    }
    is_damage
}

/// Why the database is damaged, once that has been found while it was in use.
pub(super) fn damage() -> DatabaseHealth {
    DAMAGE.subscribe()
}

/// Panics know no home: it is that of the process.
static DAMAGE: LazyLock<watch::Sender<Option<String>>> = LazyLock::new(|| watch::Sender::new(None));

/// What of a backend is the same for every one that has a `file`.
macro_rules! file_is_closed_and_locked {
    () => {
        fn close(&self) -> io::Result<()> {
            self.file.close()
        }

        fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.file.try_lock_range(start, end)
        }

        fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.file.try_lock_shared_range(start, end)
        }

        fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.file.lock_range(start, end)
        }

        fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.file.lock_shared_range(start, end)
        }

        fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
            self.file.unlock_range(start, end)
        }

        fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
            self.file.query_lock_range(start, end)
        }
    };
}

/// A file that tells when it fails for the first time.
#[derive(Debug)]
struct Watched {
    file: FileBackend,
    failed: watch::Sender<Option<String>>,
}

impl Watched {
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

impl StorageBackend for Watched {
    fn len(&self) -> io::Result<u64> {
        self.note(self.file.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.note(self.file.read(offset, out))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(self.file.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.note(self.file.sync_data())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(self.file.write(offset, data))
    }

    file_is_closed_and_locked!();
}

/// A file that stays as it is: what is written to it is kept in memory.
#[derive(Debug)]
struct Unwritten {
    file: FileBackend,
    written: Mutex<Written>,
}

/// What was written, by block, and the length with it.
#[derive(Debug, Default)]
struct Written {
    blocks: BTreeMap<u64, Vec<u8>>,
    len: Option<u64>,
}

impl Unwritten {
    fn new(file: FileBackend) -> Self {
        Self { file, written: Mutex::default() }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block as the file has it; zeros behind its end.
    fn block_of_file(&self, number: u64) -> io::Result<Vec<u8>> {
        let mut block = vec![0; BLOCK as usize];
        let there = self.file.len()?.saturating_sub(number * BLOCK).min(BLOCK) as usize;
        self.file.read(number * BLOCK, &mut block[..there])?;
        Ok(block)
    }
}

impl StorageBackend for Unwritten {
    fn len(&self) -> io::Result<u64> {
        self.written().len.map_or_else(|| self.file.len(), Ok)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(out.len() as u64).is_none_or(|end| self.len().is_ok_and(|len| end > len)) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let written = self.written();
        if written.blocks.is_empty() && written.len.is_none() {
            return self.file.read(offset, out);
        }
        for (number, part, within) in blocks_of(offset, out.len()) {
            match written.blocks.get(&number) {
                Some(block) => out[part].copy_from_slice(&block[within]),
                None => out[part].copy_from_slice(&self.block_of_file(number)?[within]),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.written().len = Some(len);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written();
        for (number, part, within) in blocks_of(offset, data.len()) {
            let block = match written.blocks.entry(number) {
                Entry::Occupied(block) => block.into_mut(),
                Entry::Vacant(place) => place.insert(self.block_of_file(number)?),
            };
            block[within].copy_from_slice(&data[part]);
        }
        Ok(())
    }

    file_is_closed_and_locked!();
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

/// In the header of redb's format 3: where the flags are, and the one that it was not closed. What was committed last is whole
/// nevertheless, for all our commits are in two phases; redb would repair the file first.
const FLAGS_AT: u64 = 9;
const IS_OPEN: u8 = 2;

/// What redb keeps of the database in memory: up to a half of it pages that are not written yet, and the rest, or all of
/// it while nobody writes, pages that were read. By itself it would take a gigabyte, which a scan of millions of files
/// fills. With this the upper pages of every table stay in memory, and a scan is no slower.
const CACHE_BYTES: usize = 64 << 20;
