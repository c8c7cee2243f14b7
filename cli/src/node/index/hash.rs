//! Hashing files that others may be writing to.

use std::{
    io,
    path::Path,
    thread,
    time::{Duration, SystemTime},
};

use blobstore::{Access, Disk, DiskFile, NewFile, RealDisk, Store};
use namespace::{RelPath, SeenKind, look};
use rustix::io::Errno;
use tree::UnixTime;

use super::super::verify::now;

/// What hashing a file came to.
pub(in super::super) enum Outcome {
    Hashed {
        file: Box<NewFile>,
        mode: u16,
        /// Whether the file is to be hashed again by itself: a later write within a tick may leave no trace.
        again: bool,
    },
    Vanished,
    /// Each time that it was read.
    Changed,
    Failed(io::Error),
}

/// Hashes a file, and makes sure that it was the same before and after. `synced` is when the file system was synced last;
/// `None` if that is not known. Rules: spec/namespace.md, "Hashing".
pub(in super::super) fn hash_at_rest(store: &Store, dir: &Path, path: &RelPath, synced: Option<SystemTime>) -> Outcome {
    for _ in 0..TRIES {
        match hash_once(store, dir, path, synced) {
            Ok(Some(hashed)) => return hashed,
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
fn hash_once(store: &Store, dir: &Path, path: &RelPath, synced: Option<SystemTime>) -> io::Result<Option<Outcome>> {
    let file = RealDisk.open_beneath(dir, path.as_path(), Access::Read)?;
    let changed = file.fingerprint()?.ctime;
    if synced.is_none_or(|synced| age(changed, synced).is_none_or(|age| age <= granule(changed))) {
        // Pages that a program writes through a mapping are clean now: the next store to one moves the ctime.
        sync(&*file)?;
    }
    wait_for_next_tick(changed);
    let (before, began) = (file.fingerprint()?, SystemTime::now());
    let hashed = match store.hash(&file, before.size) {
        Ok(hashed) => hashed,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mode = match look(dir, path)? {
        Some(SeenKind::File { fingerprint, mode }) if fingerprint == before => mode,
        _ => return Ok(None),
    };
    let again = is_racy(before.ctime, began);
    let racy = again || file.is_open_for_writing() == Some(true);
    if file.fingerprint()? != before {
        return Ok(None);
    }
    let path = path.as_bytes().to_owned();
    let file = Box::new(NewFile { path, fingerprint: before, hashed, hashed_at: now(), racy });
    Ok(Some(Outcome::Hashed { file, mode, again }))
}

/// Writes a file's pages to the disk, where its file system can.
fn sync(file: &dyn DiskFile) -> io::Result<()> {
    let cannot = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP].map(Errno::raw_os_error);
    match file.sync() {
        Err(error) if error.raw_os_error().is_some_and(|errno| cannot.contains(&errno)) => Ok(()),
        synced => synced,
    }
}

/// Whether a change right after `now` may get the ctime that a file has already.
fn is_racy(changed: UnixTime, now: SystemTime) -> bool {
    let ahead = || -age_ns(changed, now);
    let granule = granule(changed).as_nanos() as i128;
    // One in the future was set by a clock that was wrong: a change now would get another.
    age(changed, now).map_or_else(|| ahead() <= granule, |age| age.as_nanos() as i128 <= granule)
}

/// How far apart two changes of a file must be to get different times for certain, by one of its times: some file systems
/// have whole seconds, even ones, or hundredths.
fn granule(changed: UnixTime) -> Duration {
    if changed.nanos.is_multiple_of(10_000_000) { COARSE } else { TICK }
}

/// How long before `now` a file was changed; `None` if that is in the future.
fn age(changed: UnixTime, now: SystemTime) -> Option<Duration> {
    u64::try_from(age_ns(changed, now)).ok().map(Duration::from_nanos)
}

fn age_ns(changed: UnixTime, now: SystemTime) -> i128 {
    let ns = |time: UnixTime| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    ns(now.into()) - ns(changed)
}

/// Waits until a change now would get another time than `changed`, where that is a matter of milliseconds.
fn wait_for_next_tick(changed: UnixTime) {
    if granule(changed) == TICK
        && let Some(age) = age(changed, SystemTime::now())
    {
        thread::sleep(TICK.saturating_sub(age));
    }
}

/// The coarsest clock of a kernel: 100 ticks a second, twice over.
const TICK: Duration = Duration::from_millis(20);
/// The coarsest clock of a file system: FAT has even seconds.
const COARSE: Duration = Duration::from_secs(2);
const TRIES: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_within_the_granule_is_racy() {
        let at = |ms: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let check = |changed_ms: u64, nanos, now_ms, expected| {
            let mut changed = UnixTime::from(at(changed_ms));
            changed.nanos += nanos;
            assert_eq!(is_racy(changed, at(now_ms)), expected, "{changed:?} at {now_ms}");
        };
        // A clock of nanoseconds.
        check(5_004, 17, 5_005, true);
        check(5_004, 17, 5_024, true);
        check(5_004, 17, 5_025, false);
        // Whole seconds, and hundredths.
        check(5_000, 0, 6_999, true);
        check(5_000, 0, 7_001, false);
        check(5_010, 0, 6_000, true);
        // A wrong clock.
        check(5_004, 17, 5_000, true);
        check(9_004, 17, 5_000, false);
        check(9_000, 0, 5_000, false);
    }
}
