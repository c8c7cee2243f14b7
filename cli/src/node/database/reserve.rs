//! Room on the home's disk that is given up when it is full: spec/store.md, "Full disks".

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};
use tracing::{info, warn};

/// A file that holds blocks of the home's disk.
#[derive(Debug)]
pub(in super::super) struct Reserve {
    /// None where it could not be made.
    file: Option<File>,
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How many bytes it holds.
    held: u64,
    /// Whether who finds no room waits for some.
    waits: bool,
    /// How many do now.
    waiting: usize,
}

impl Reserve {
    /// Opens it, and takes what it lacks.
    pub(super) fn open(path: PathBuf) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.inspect_err(|error| {
            warn!(?path, reason = tree::reason(error), "cannot be made; on a full disk, nothing can be deleted");
        });
        let reserve = Self { file: file.ok(), state: Mutex::default(), moved: Condvar::new() };
        reserve.refill();
        reserve
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work`, and if there is no room for it, gives up the reserve and does it once more.
    pub(in super::super) fn spend<T>(&self, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match work() {
            Err(error) if is_full(&error) && self.release() => work(),
            outcome => outcome,
        }
    }

    /// Gives up what it holds. Tells whether that was anything.
    fn release(&self) -> bool {
        let mut state = self.state();
        let Some(file) = self.file.as_ref().filter(|_| state.held > 0) else { return false };
        match file.set_len(0) {
            Ok(()) if state.held == RESERVE_BYTES => info!("the disk of the home is full: its reserve is given up"),
            Ok(()) => {}
            Err(error) => warn!(reason = tree::reason(&error), "the reserve cannot be given up"),
        }
        state.held = 0;
        true
    }

    /// Takes what it lacks, as far as there is any.
    pub(in super::super) fn refill(&self) {
        let mut state = self.state();
        let Some(file) = self.file.as_ref().filter(|_| state.held < RESERVE_BYTES) else { return };
        while state.held < RESERVE_BYTES {
            let taken = match fallocate(file, FallocateFlags::empty(), state.held, STEP_BYTES) {
                // Whatever the file system makes of zeros, it has to keep these.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    let mut noise = vec![0; STEP_BYTES as usize];
                    fastrand::fill(&mut noise);
                    file.write_all_at(&noise, state.held)
                }
                taken => taken.map_err(io::Error::from),
            };
            if taken.is_err() {
                break;
            }
            state.held += STEP_BYTES;
        }
    }

    /// Sets whether who finds no room waits for some.
    pub(in super::super) fn set_waits(&self, waits: bool) {
        self.state().waits = waits;
        self.moved.notify_all();
    }

    /// Whether somebody waits for room now.
    pub(in super::super) fn is_waited_for(&self) -> bool {
        self.state().waiting > 0
    }

    /// Waits a moment until there may be room. `false` if nobody is to wait.
    pub(super) fn wait(&self) -> bool {
        let mut state = self.state();
        state.waiting += 1;
        let waited = self.moved.wait_timeout_while(state, PAUSE, |state| state.waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state.waits
    }
}

/// Whether a write failed for want of room.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// How much it holds where there is enough.
const RESERVE_BYTES: u64 = 4 << 20;
/// How much it takes at a time.
const STEP_BYTES: u64 = 256 << 10;
/// How long to wait until another attempt.
const PAUSE: Duration = Duration::from_millis(200);
