//! The database's file, and whether it can be relied on: spec/store.md, "The database". All of it is read and compared with its
//! checksums when it is opened. After a failed system call its state on the disk is unknown, and after
//! a panic in redb it is damaged: the daemon ends then.

mod file;
mod reserve;

use std::{
    cell::Cell,
    fs::{self, File},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, LazyLock},
};

use redb::{Database, DatabaseError, ReadOnlyDatabase, StorageBackend, StorageError, backends::FileBackend};
use tokio::sync::watch;
use tracing::error;

use self::file::{Roomy, Unwritten};
pub(super) use self::reserve::Reserve;

/// A database that is open.
pub(super) struct Opened {
    pub(super) database: Arc<Database>,
    /// The first error of its file.
    pub(super) failed: Failed,
    /// Its reserve for a full disk.
    pub(super) reserve: Arc<Reserve>,
}

type Failed = watch::Receiver<Option<String>>;

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
pub(super) fn open(path: &Path) -> Result<Opened, OpenError> {
    if is_there(path).map_err(|error| OpenError::Failed(error.into()))? {
        open_with(Unwritten::new(file_backend(path)?), true)?;
    }
    let reserve = Arc::new(Reserve::open(path.with_file_name(RESERVE)));
    let (file, failed) = Roomy::new(file_backend(path)?, reserve.clone());
    let database = Arc::new(open_with(file, false)?);
    Ok(Opened { database, failed, reserve })
}

/// Opens a damaged database for whatever can still be read in it, as of its last commit. Its file stays as it is. Reading may
/// panic.
pub(super) fn open_damaged(path: &Path) -> Result<ReadOnlyDatabase, OpenError> {
    let file = Unwritten::new(file_backend(path)?);
    let mut flags = [0];
    let mut settle = || {
        file.read(FLAGS_AT, &mut flags)?;
        file.write(FLAGS_AT, &[flags[0] & !IS_OPEN])
    };
    settle().map_err(|error| OpenError::Failed(error.into()))?;
    judged(|| Database::builder().open_read_only_with_backend(file))
}

fn file_backend(path: &Path) -> Result<FileBackend, OpenError> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    FileBackend::new(file.map_err(|error| OpenError::Failed(error.into()))?).map_err(OpenError::Failed)
}

fn open_with(file: impl StorageBackend, check: bool) -> Result<Database, OpenError> {
    judged(|| {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(check).create_with_backend(file)
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
pub(super) fn damage() -> Failed {
    DAMAGE.subscribe()
}

/// Panics know no home: it is that of the process.
static DAMAGE: LazyLock<watch::Sender<Option<String>>> = LazyLock::new(|| watch::Sender::new(None));

/// In the header of redb's format 3: where the flags are, and the one that it was not closed. What was committed last is whole
/// nevertheless, for all our commits are in two phases; redb would repair the file first.
const FLAGS_AT: u64 = 9;
const IS_OPEN: u8 = 2;

/// What redb keeps of the database in memory: up to a half of it pages that are not written yet, and the rest, or all of
/// it while nobody writes, pages that were read. By itself it would take a gigabyte, which a scan of millions of files
/// fills. With this the upper pages of every table stay in memory, and a scan is no slower.
const CACHE_BYTES: usize = 64 << 20;

/// Name of the reserve, in the directory of the database.
const RESERVE: &str = "reserve";
