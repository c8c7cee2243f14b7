//! The database's file, and whether it can be relied on. Once a system call on it has failed, nobody knows what of it is on
//! the disk, and redb refuses everything until it is opened anew: the daemon is to end then, not to go on without.

use std::{fs::File, ops::Bound, path::Path};

use redb::{BackendError, Database, DatabaseError, StorageBackend, backends::FileBackend};
use tokio::sync::watch;

/// Tells why the database failed, once it has.
pub(super) type DatabaseHealth = watch::Receiver<Option<String>>;

/// Opens the database at `path`; makes it if there is none.
pub(super) fn open(path: &Path) -> Result<(Database, DatabaseHealth), DatabaseError> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    let (failed, health) = watch::channel(None);
    let backend = Watched { file: FileBackend::new(file)?, failed };
    Ok((Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend)?, health))
}

/// A file that tells when it fails for the first time.
#[derive(Debug)]
struct Watched {
    file: FileBackend,
    failed: watch::Sender<Option<String>>,
}

impl Watched {
    fn note<T>(&self, outcome: std::io::Result<T>) -> std::io::Result<T> {
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
    fn len(&self) -> std::io::Result<u64> {
        self.note(self.file.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.note(self.file.read(offset, out))
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.note(self.file.set_len(len))
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.note(self.file.sync_data())
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.note(self.file.write(offset, data))
    }

    fn close(&self) -> std::io::Result<()> {
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
}

/// What redb keeps of the database in memory: up to a half of it pages that are not written yet, and the rest, or all of
/// it while nobody writes, pages that were read. By itself it would take a gigabyte, which a scan of millions of files
/// fills. With this the upper pages of every table stay in memory, and a scan is no slower.
const CACHE_BYTES: usize = 64 << 20;
