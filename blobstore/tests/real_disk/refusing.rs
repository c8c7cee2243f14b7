//! Disks that refuse: no room, bad sectors, files of other owners. What failed is claimed by nobody, not even later,
//! and a file that could not be mended is what it was: damaged, not edited.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use blobstore::{Access, Consent, Disk, DiskFile, RealDisk, Sink, Verdict};
use tree::{BlobId, ByteRange, Fingerprint, RangeSet, ReadAt, UnixTime, WriteAt};

use crate::{
    common::{GROUP, NOW, all, check_read, feed, groups, pieces, random, range},
    home::{Home, assert_damaged},
};

/// What a disk refuses from now on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Refuse {
    Nothing,
    /// To set times, as for a file that others own and we may write.
    Times,
    /// The second half of each write.
    HalfOfWrites,
    /// The next sync of a file. As on Linux, the one after it succeeds, and what was to be synced is lost.
    OneSync,
    /// Writes, until something is deleted or punched.
    RoomUntilFreed,
    /// All writes.
    Room,
    /// All writes to outboards.
    Outboards,
    /// Writes to a part of a block, until it is punched: its sector is bad.
    PartsOfBlocks,
}

/// The machine's file systems, but for what it is told to refuse.
#[derive(Clone)]
pub(crate) struct Refusing(Arc<Mutex<Refuse>>);

impl Refusing {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Refuse::Nothing)))
    }

    pub(crate) fn set(&self, refuse: Refuse) {
        *self.0.lock().unwrap() = refuse;
    }

    fn refuses(&self, what: Refuse) -> io::Result<()> {
        if *self.0.lock().unwrap() == what { Err(io::Error::other("refused")) } else { Ok(()) }
    }

    fn freed(&self) {
        if self.refuses(Refuse::RoomUntilFreed).is_err() {
            self.set(Refuse::Nothing);
        }
    }

    fn wrap(&self, file: Box<dyn DiskFile>, path: &Path) -> Box<dyn DiskFile> {
        let is_outboard = path.extension().is_some_and(|extension| extension.as_encoded_bytes().starts_with(b"obao"));
        Box::new(RefusingFile { disk: self.clone(), file, is_outboard })
    }
}

impl Disk for Refusing {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.wrap(RealDisk.open(path, access)?, path))
    }

    fn open_beneath(&self, root: &Path, relative: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.wrap(RealDisk.open_beneath(root, relative, access)?, relative))
    }

    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        RealDisk.create_dirs(dir)
    }

    fn files_below(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        RealDisk.files_below(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.freed();
        RealDisk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        RealDisk.sync_dir(dir)
    }

    fn sync_file_system(&self, dir: &Path) -> io::Result<()> {
        RealDisk.sync_file_system(dir)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(dir)
    }
}

struct RefusingFile {
    disk: Refusing,
    file: Box<dyn DiskFile>,
    is_outboard: bool,
}

impl ReadAt for RefusingFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

impl WriteAt for RefusingFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.disk.refuses(Refuse::Room).and(self.disk.refuses(Refuse::RoomUntilFreed)).is_err() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if self.is_outboard {
            self.disk.refuses(Refuse::Outboards)?;
        }
        if self.disk.refuses(Refuse::PartsOfBlocks).is_err() && !(offset + bytes.len() as u64).is_multiple_of(4096) {
            return Err(io::Error::from_raw_os_error(5));
        }
        if let Err(error) = self.disk.refuses(Refuse::HalfOfWrites) {
            self.file.write_all_at(&bytes[..bytes.len() / 2], offset)?;
            return Err(error);
        }
        self.file.write_all_at(bytes, offset)
    }
}

impl DiskFile for RefusingFile {
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn punch(&self, range: ByteRange) -> io::Result<()> {
        self.disk.freed();
        if self.disk.refuses(Refuse::PartsOfBlocks).is_err() && range.end() >= self.file.fingerprint()?.size {
            self.disk.set(Refuse::Nothing);
        }
        self.file.punch(range)
    }

    fn is_hole(&self, range: ByteRange) -> bool {
        self.file.is_hole(range)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.refuses(Refuse::OneSync).inspect_err(|_| self.disk.set(Refuse::Nothing))?;
        self.file.sync()
    }

    fn fingerprint(&self) -> io::Result<Fingerprint> {
        self.file.fingerprint()
    }

    fn set_mtime(&self, mtime: UnixTime) -> io::Result<()> {
        self.disk.refuses(Refuse::Times)?;
        self.file.set_mtime(mtime)
    }
}

const SIZE: usize = 20 * GROUP as usize + 3;

/// A file cannot be mended, because the disk refuses `refuse`: it stays damaged, or becomes sound, but is not taken
/// for edited, neither now nor after the next start.
fn check_mending_refused(refuse: Refuse) {
    check_refused_from(refuse, false);
    check_refused_from(refuse, true);
}

/// The same from the beginning, or once the replaced bytes are saved.
fn check_refused_from(refuse: Refuse, is_begun: bool) {
    let (disk, bytes, rot) = (Refusing::new(), random(1, SIZE), groups(SIZE, [3, 9]));
    let home = Home::new().reopen_on(Arc::new(disk.clone()));
    home.put("file", &bytes);
    home.rot("file", &rot);
    home.verify("file");
    let mtime = home.mtime("file");
    let before = std::fs::read(home.path("file")).unwrap();
    if !is_begun {
        disk.set(refuse);
    }
    let begun = home.store.mend(&home.file("file"), Consent::Damage, NOW);
    disk.set(refuse);
    if begun.is_err() {
        assert!(std::fs::read(home.path("file")).unwrap() == before, "written, and not saved");
        assert!(home.store.repairs().unwrap().is_empty() && home.own_files("saved").is_empty());
    }
    if let Ok(mut mending) = begun {
        let _refused_or_not = mending.write(&pieces(&bytes, &rot));
        let _refused_or_not = mending.commit();
        let _refused_or_not = mending.finish();
    }
    disk.set(Refuse::Nothing);
    // As before the next scan.
    home.store.finish_mending().unwrap();
    let check = |home: &Home| {
        assert_eq!(home.mtime("file"), mtime, "the mtime moved");
        let verdict = home.verify("file");
        let is_undecided = refuse == Refuse::Times && is_begun;
        let is_right = match verdict {
            Verdict::Sound | Verdict::Damaged { .. } => true,
            // Its mtime had moved, and nobody knows by whom.
            Verdict::Suspect { .. } => is_undecided,
            _ => false,
        };
        assert!(is_right, "{verdict:?}");
    };
    check(&home);
    let home = home.reopen();
    check(&home);
    let damaged = home.damaged("file");
    assert!(damaged.difference(&rot).is_empty(), "more is damaged than was: {damaged:?}");
    if !damaged.is_empty() {
        let consent = if home.row("file").is_suspect() { Consent::Suspect } else { Consent::Damage };
        let mut mending = home.store.mend(&home.file("file"), consent, NOW).unwrap();
        feed(&mut mending, &bytes, &damaged);
        mending.finish().unwrap();
        assert_damaged(&home.verify("file"), &RangeSet::new(), &RangeSet::new());
    }
}

#[test]
fn a_file_whose_times_cannot_be_set_is_not_mended() {
    check_mending_refused(Refuse::Times);
}

#[test]
fn a_write_that_fails_halfway_makes_no_edit() {
    check_mending_refused(Refuse::HalfOfWrites);
}

/// A bad sector below the last, partial block of a file: the block is punched, and written anew.
#[test]
fn the_last_block_is_mended_although_it_cannot_be_read() {
    let (disk, bytes, rot) = (Refusing::new(), random(1, SIZE), groups(SIZE, [3, 20]));
    let home = Home::new().reopen_on(Arc::new(disk.clone()));
    home.put("file", &bytes);
    home.rot("file", &rot);
    home.verify("file");
    let mut mending = home.store.mend(&home.file("file"), Consent::Damage, NOW).unwrap();
    disk.set(Refuse::PartsOfBlocks);
    feed(&mut mending, &bytes, &rot);
    mending.finish().unwrap();
    assert!(*disk.0.lock().unwrap() == Refuse::Nothing, "it was punched");
    assert_damaged(&home.verify("file"), &RangeSet::new(), &RangeSet::new());
    assert!(std::fs::read(home.path("file")).unwrap() == bytes);
}

/// Quarantine is not lifted from what failed to be synced, though a later sync succeeds.
#[test]
fn a_failed_sync_lifts_no_quarantine() {
    check_mending_refused(Refuse::OneSync);
    let (disk, bytes, rot) = (Refusing::new(), random(1, SIZE), groups(SIZE, [3, 9]));
    let home = Home::new().reopen_on(Arc::new(disk.clone()));
    home.put("file", &bytes);
    home.rot("file", &rot);
    home.verify("file");
    let mut mending = home.store.mend(&home.file("file"), Consent::Damage, NOW).unwrap();
    feed(&mut mending, &bytes, &rot);
    disk.set(Refuse::OneSync);
    assert!(mending.commit().is_err());
    let _refused_or_not = mending.finish();
    assert_eq!(home.damaged("file"), rot);
}

/// What failed to be synced is not here, though a later sync succeeds: it must be fetched again.
#[test]
fn a_failed_sync_is_not_made_up_for_by_the_next() {
    let (disk, bytes) = (Refusing::new(), random(2, SIZE));
    let home = Home::new().reopen_on(Arc::new(disk.clone()));
    let (first, second) = (groups(SIZE, [0, 3, 20]), groups(SIZE, [5]));
    let mut partial = home.store.partial(BlobId::of(&bytes), SIZE as u64).unwrap();
    feed(&mut partial, &bytes, &first);
    disk.set(Refuse::OneSync);
    assert!(partial.commit().is_err());
    let _refused_or_not = partial.write(&pieces(&bytes, &second));
    let _refused_or_not = partial.commit();
    drop(partial);
    let missing = home.store.missing_from_cache(BlobId::of(&bytes), SIZE as u64, &all(SIZE)).unwrap();
    assert!(first.difference(&missing).is_empty(), "claimed, and lost: {:?}", first.difference(&missing));
}

/// Bytes whose proof could not be written are not here, though they were, and are committed.
#[test]
fn nothing_is_claimed_without_its_proof() {
    let (disk, bytes) = (Refusing::new(), random(4, SIZE));
    let home = Home::new().reopen_on(Arc::new(disk.clone()));
    let mut partial = home.store.partial(BlobId::of(&bytes), SIZE as u64).unwrap();
    disk.set(Refuse::Outboards);
    assert!(partial.write(&pieces(&bytes, &all(SIZE))).is_err());
    disk.set(Refuse::Nothing);
    partial.commit().unwrap();
    assert_eq!(home.store.cached_ranges(BlobId::of(&bytes)).unwrap(), RangeSet::new());
    feed(&mut partial, &bytes, &all(SIZE));
    partial.commit().unwrap();
    check_read(&home.store, &bytes, range(0, SIZE as u64), &RangeSet::new());
}

/// A disk that fills up while a blob arrives: what came before is kept, and the rest can come later.
#[test]
fn a_full_disk_keeps_what_was_committed() {
    let (disk, bytes) = (Refusing::new(), random(3, SIZE));
    let home = Home::new().reopen_on(Arc::new(disk.clone()));
    let first = groups(SIZE, [0, 3, 20]);
    let mut partial = home.store.partial(BlobId::of(&bytes), SIZE as u64).unwrap();
    feed(&mut partial, &bytes, &first);
    partial.commit().unwrap();
    disk.set(Refuse::HalfOfWrites);
    let rest = pieces(&bytes, &all(SIZE).difference(&first));
    assert!(rest.chunks(1).chain([&rest[..]]).all(|pieces| partial.write(pieces).is_err()));
    disk.set(Refuse::Nothing);
    partial.commit().unwrap();
    drop(partial);
    let missing = home.store.missing_from_cache(BlobId::of(&bytes), SIZE as u64, &all(SIZE)).unwrap();
    assert_eq!(missing, all(SIZE).difference(&first));
    assert!(matches!(home.store.verify_cached(BlobId::of(&bytes), &|_| {}).unwrap(), Some(Verdict::Sound)));
    home.cache(&bytes, &missing);
    assert!(home.store.take_cached(BlobId::of(&bytes)).unwrap().is_some());
}
