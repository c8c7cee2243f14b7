//! A file that reserves space on the home's disk, and is truncated when the disk is full: spec/store.md, "Full disks".

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blobstore::is_full;
use rustix::{
    fs::{FallocateFlags, OFlags, fallocate},
    io::Errno,
};
use tracing::{info, warn};

/// The reserve file.
#[derive(Debug)]
pub(in super::super) struct Reserve {
    /// `None` if it could not be created.
    file: Option<File>,
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes reserved.
    held: u64,
    /// Whether commits wait for free space.
    waits: bool,
    /// Commits that wait now.
    waiting: usize,
}

impl Reserve {
    /// Opens or creates the reserve, and fills it.
    pub(super) fn open(path: PathBuf) -> Self {
        // The file is truncated later, so a symbolic link at its path must not lead to another one.
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let file = options.open(&path);
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

    /// Runs `work`. If the disk is full, releases the reserve and runs it once more.
    pub(in super::super) fn spend<T>(&self, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match work() {
            Err(error) if is_full(&error) && self.release() => work(),
            outcome => outcome,
        }
    }

    /// Releases the reserved space. Returns whether there was any.
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

    /// Reserves the rest of [`RESERVE_BYTES`], as far as there is free space.
    pub(in super::super) fn refill(&self) {
        let mut state = self.state();
        let Some(file) = self.file.as_ref().filter(|_| state.held < RESERVE_BYTES) else { return };
        while state.held < RESERVE_BYTES {
            let taken = match fallocate(file, FallocateFlags::empty(), state.held, STEP_BYTES) {
                // Zeros might be stored as a hole, or compressed.
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

    /// Sets whether commits wait for free space; wakes those that do.
    pub(in super::super) fn set_waits(&self, waits: bool) {
        self.state().waits = waits;
        self.moved.notify_all();
    }

    /// Whether a commit waits for free space.
    pub(in super::super) fn is_waited_for(&self) -> bool {
        self.state().waiting > 0
    }

    /// Waits before another attempt to write. Returns `false` if commits must not wait.
    pub(super) fn wait(&self) -> bool {
        let mut state = self.state();
        state.waiting += 1;
        let waited = self.moved.wait_timeout_while(state, PAUSE, |state| state.waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state.waits
    }
}

/// Bytes reserved if the disk has them.
const RESERVE_BYTES: u64 = 4 << 20;
/// Bytes reserved with one system call.
const STEP_BYTES: u64 = 256 << 10;
/// Pause between two attempts to write.
const PAUSE: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn full() -> io::Error {
        io::ErrorKind::StorageFull.into()
    }

    #[test]
    fn it_is_given_up_once_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reserve");
        let reserve = Reserve::open(path.clone());
        let bytes = || fs::metadata(&path).unwrap().len();
        assert_eq!(bytes(), RESERVE_BYTES);
        // Work that succeeds, or fails for another reason, costs nothing.
        reserve.spend(|| Ok(())).unwrap();
        reserve.spend(|| Err::<(), _>(io::ErrorKind::NotFound.into())).unwrap_err();
        assert_eq!(bytes(), RESERVE_BYTES);
        reserve.spend(|| if bytes() > 0 { Err(full()) } else { Ok(()) }).unwrap();
        assert!(is_full(&reserve.spend(|| Err::<(), _>(full())).unwrap_err()), "there is no more to give up");
        reserve.refill();
        assert_eq!(bytes(), RESERVE_BYTES);
        assert_eq!(Reserve::open(path.clone()).state().held, RESERVE_BYTES, "it is found again");
    }

    #[test]
    fn what_a_link_leads_to_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("reserve"), dir.path().join("other"));
        fs::write(&other, "precious").unwrap();
        symlink(&other, &path).unwrap();
        let reserve = Reserve::open(path);
        reserve.spend(|| Err::<(), _>(full())).unwrap_err();
        assert_eq!(fs::read_to_string(&other).unwrap(), "precious");
    }

    #[test]
    fn nobody_waits_unless_told_to() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::open(dir.path().join("reserve"));
        assert!(!reserve.wait());
        reserve.set_waits(true);
        assert!(reserve.wait());
        reserve.set_waits(false);
        assert!(!reserve.wait() && !reserve.is_waited_for());
    }
}
