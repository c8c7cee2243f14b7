//! Hashing files that others may be writing to.

use std::{
    io,
    path::Path,
    thread,
    time::{Duration, SystemTime},
};

use blobstore::{Access, Disk, NewFile, RealDisk, Store};
use namespace::{RelPath, SeenKind, look};
use rustix::io::Errno;
use tree::UnixTime;

use super::super::verify::now;

/// What hashing a file came to.
pub(in super::super) enum Outcome {
    Hashed {
        file: NewFile,
        mode: u16,
    },
    Vanished,
    /// Each time that it was read.
    Changed,
    Failed(io::Error),
}

/// Hashes a file, and makes sure that it was the same before and after.
pub(in super::super) fn hash_at_rest(store: &Store, dir: &Path, path: &RelPath) -> Outcome {
    for _ in 0..TRIES {
        match hash_once(store, dir, path) {
            Ok(Some((file, mode))) => return Outcome::Hashed { file, mode },
            Ok(None) => {}
            Err(error) if is_gone(&error) => return Outcome::Vanished,
            Err(error) => return Outcome::Failed(error),
        }
    }
    Outcome::Changed
}

/// Whether no file is there: nothing, or a link, or a link is on the way.
fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|errno| gone.contains(&errno))
}

/// `None` if the file changed meanwhile.
fn hash_once(store: &Store, dir: &Path, path: &RelPath) -> io::Result<Option<(NewFile, u16)>> {
    let file = RealDisk.open_beneath(dir, path.as_path(), Access::Read)?;
    wait_for_next_tick(file.fingerprint()?.ctime);
    let before = file.fingerprint()?;
    let hashed = match store.hash(&file, before.size) {
        Ok(hashed) => hashed,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mode = match look(dir, path)? {
        Some(SeenKind::File { fingerprint, mode }) if fingerprint == before => mode,
        _ => return Ok(None),
    };
    let same = file.fingerprint()? == before;
    Ok(same
        .then(|| (NewFile { path: path.as_bytes().to_owned(), fingerprint: before, hashed, hashed_at: now() }, mode)))
}

/// Waits until a change now would get another time than `changed`: within one tick of the file system's clock two
/// changes look like one, and the second would never be seen.
fn wait_for_next_tick(changed: UnixTime) {
    let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) else { return };
    let Ok(seconds) = u64::try_from(changed.seconds) else { return };
    if let Some(age) = now.checked_sub(Duration::new(seconds, changed.nanos)) {
        thread::sleep(TICK.saturating_sub(age));
    }
}

/// The coarsest clock of a file system here: a kernel that counts 100 ticks a second, twice over.
const TICK: Duration = Duration::from_millis(20);
const TRIES: usize = 3;
