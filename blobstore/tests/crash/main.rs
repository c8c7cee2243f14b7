//! Power cuts: a day in the life of a store, cut off behind every single operation on its disks, and opened again
//! on what is left. Whatever it then claims must be there, and whatever it had promised must be claimed.
//!
//! Every cut is tried with nothing of the unsynced surviving, with everything, and with what luck leaves. Some cuts
//! are followed by a second one while the store recovers from the first. `CRASH_POINTS` says how many cuts are made
//! in each test; more find more. A failure prints its cut, which the same number of points comes to again.

#[path = "../common/mod.rs"]
mod common;
mod image;
mod sim_disk;
mod workload;

use std::{collections::BTreeSet, path::Path, sync::Arc};

use blobstore::{Access, Consent, Disk, FileRef, Presence, Sink, Store, Verdict};
use redb::{Database, ReadableDatabase, ReadableTable};
use tree::{BlobId, RangeSet};

use crate::{
    common::{GROUP, HOLDERS, NOW, all, check_read, dir_numbers, feed, range, settings, split},
    image::Luck,
    sim_disk::SimDisk,
    workload::{
        Blobs, FILES, LARGE, MEDIUM, MOVED, Mark, RENAMED, ROTTEN_BYTE, Recorded, Start, UNLINKED, rotten,
        rotten_when_moved,
    },
};

#[test]
fn files_that_were_durable_before() {
    check(&Start { synced: true, own_dirs: true }, 4300);
}

/// Linking is what makes them durable.
#[test]
fn files_that_nobody_synced() {
    check(&Start { synced: false, own_dirs: true }, 4300);
}

/// The store makes the directories that its outboards and its cache are in.
#[test]
fn a_first_start() {
    check(&Start { synced: true, own_dirs: false }, 1400);
}

/// Opens the store on `disk`, as a start of the program does.
pub(crate) fn open(disk: &SimDisk) -> (Store, Arc<Database>) {
    let db = Database::builder().create_with_backend(disk.database(Path::new("/home/db")));
    let db = Arc::new(db.expect("the database opens"));
    let disk = Arc::new(disk.clone());
    (Store::open(disk, db.clone(), settings(Path::new("/home"))).expect("the store opens"), db)
}

/// Records the workload and cuts it off in about `points` ways.
fn check(start: &Start, points: usize) {
    let points = std::env::var("CRASH_POINTS").map_or(points, |points| points.parse().expect("a number"));
    let recorded = workload::record(start);
    let ops = recorded.disk.recorded() + 1;
    let ways = (points / ops).max(3);
    let cuts = ops.min(points.div_ceil(ways));
    for cut in 0..cuts {
        for way in 0..ways {
            let mut rng = fastrand::Rng::with_seed((cut * ways + way) as u64);
            // Evenly spread, and anywhere in its share.
            let at = (cut * ops + rng.usize(..ops)) / cuts;
            Cut { ops: at.min(ops - 1), way, rng }.check(&recorded);
        }
    }
    println!("{} power cuts: {cuts} of {ops} places, {ways} ways each", cuts * ways);
}

/// One power cut.
#[derive(Debug)]
struct Cut {
    ops: usize,
    way: usize,
    rng: fastrand::Rng,
}

impl Cut {
    fn check(mut self, recorded: &Recorded) {
        let _context = Context(format!("{self:?}, behind {}", recorded.disk.last_before(self.ops)));
        let mut disk = recorded.disk.power_cut(self.ops, self.luck());
        let seen = recorded.marks_before(self.ops);
        let mending = seen.last().is_some_and(|(_, mark)| *mark == Mark::Mends);
        // Ending a mending is the one recovery that writes to users' files.
        if mending || self.rng.u8(..3) == 0 {
            drop(open(&disk));
            let ops = self.rng.usize(..=disk.recorded());
            disk = disk.power_cut(ops, self.luck());
        }
        let (store, db) = open(&disk);
        Survivor { store, db, disk, recorded, seen }.check();
    }

    fn luck(&mut self) -> Luck {
        let keep = match self.way {
            0 => 0.0,
            1 => 1.0,
            _ => self.rng.choice([0.03, 0.5, 0.97]).expect("there are some"),
        };
        Luck { keep, rng: self.rng.fork() }
    }
}

/// Says where we are if a check panics.
struct Context(String);

impl Drop for Context {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("at {}", self.0);
        }
    }
}

/// The store after the power cut, and what had happened before.
struct Survivor<'a> {
    store: Store,
    db: Arc<Database>,
    disk: SimDisk,
    recorded: &'a Recorded,
    seen: &'a [(usize, Mark)],
}

impl Survivor<'_> {
    fn saw(&self, mark: Mark) -> bool {
        self.seen.iter().any(|(_, seen)| *seen == mark)
    }

    fn check(&self) {
        self.check_holders();
        for path in FILES {
            self.check_file(path);
        }
        self.check_moved();
        self.check_cache();
        self.check_own_files();
        self.check_saved();
        self.mend_the_rest();
    }

    /// Files, holders and directories are all as one transaction left them.
    fn check_holders(&self) {
        let root = self.file("").root;
        let files: Vec<_> = self.store.files(root).map(Result::unwrap).collect();
        let numbers = dir_numbers(&self.db);
        let with_number: BTreeSet<&[u8]> = numbers.keys().map(|(_, dir)| &dir[..]).collect();
        let with_files: BTreeSet<&[u8]> = files.iter().map(|(path, _)| split(path).0).collect();
        assert_eq!(with_number, with_files, "directories with a number, and with files");
        let holders = self.db.begin_read().unwrap().open_table(HOLDERS).unwrap();
        assert_eq!(holders.iter().unwrap().count(), files.len(), "holders and files");
        for (path, row) in files {
            let file = FileRef { root, path };
            assert!(self.store.holders(row.blob, 9).unwrap().contains(&file), "{file:?} is no holder");
        }
    }

    fn check_file(&self, path: &str) {
        let Blobs { of, new_medium, .. } = &self.recorded.blobs;
        let file = self.file(path);
        let Some(row) = self.store.file(&file).unwrap() else {
            let unlinked = path == UNLINKED && self.saw(Mark::Unlinks);
            assert!(unlinked || !self.saw(Mark::Linked), "{path} was linked");
            return;
        };
        assert!(path != UNLINKED || !self.saw(Mark::Unlinked), "{path} was unlinked");
        let bytes = if row.blob == BlobId::of(new_medium) { new_medium } else { &of[path] };
        assert_eq!(row.blob, BlobId::of(bytes), "{path}");
        assert!(path != MEDIUM || !self.saw(Mark::LinkedAnew) || bytes == new_medium, "{path} was linked anew");

        let known = row.damaged;
        let verdict = self.store.verify_file(&file, &|_| {}).unwrap().expect("there is a row");
        let damaged = match verdict {
            Verdict::Sound => RangeSet::new(),
            Verdict::Damaged { data, outboard, unreadable: None } if outboard.is_empty() => data,
            // Between a write of mending and the setting of the mtime.
            Verdict::Suspect { data } if path == LARGE && self.saw(Mark::Mends) && !self.saw(Mark::Mended) => data,
            Verdict::Modified if path == MEDIUM && self.saw(Mark::Replaces) && bytes != new_medium => return,
            other => panic!("{path} is {other:?}"),
        };
        if path == LARGE {
            self.check_rotten_file(&known, &damaged);
        } else {
            assert_eq!((known, &damaged), (RangeSet::new(), &RangeSet::new()), "{path}");
        }
        let start = range(0, (bytes.len() as u64).min(1 << 20));
        check_read(&self.store, bytes, start, &damaged.intersection(&start.into()));
    }

    /// The file that was renamed is known under one name, with the damage that was known; and once it is known under the
    /// new one, it is there.
    fn check_moved(&self) {
        let bytes = &self.recorded.blobs.moved;
        let [old, new] = [MOVED, RENAMED].map(|path| self.store.file(&self.file(path)).unwrap());
        assert!(old.is_none() || new.is_none(), "known under both names");
        assert!(!self.saw(Mark::Moved) || new.is_some(), "it was renamed");
        assert!(self.saw(Mark::Moves) || new.is_none(), "it is not renamed yet");
        let is_renamed = new.is_some();
        let Some(row) = old.or(new) else { return assert!(!self.saw(Mark::LinkedMoved), "it was linked") };
        assert_eq!(row.blob, BlobId::of(bytes));
        let known = !row.damaged.is_empty();
        assert!(known || !self.saw(Mark::FoundRotten), "its damage was known");
        assert!(!known || row.damaged == rotten_when_moved());
        let verdict = self.store.verify_file(&self.file(if is_renamed { RENAMED } else { MOVED }), &|_| {}).unwrap();
        match verdict.expect("there is a row") {
            Verdict::Damaged { data, outboard, .. } if outboard.is_empty() => assert_eq!(data, rotten_when_moved()),
            Verdict::Sound => assert!(!known, "known as damaged, and sound"),
            Verdict::Missing => assert!(!is_renamed && self.saw(Mark::Moves), "missing"),
            other => panic!("the file that was renamed is {other:?}"),
        }
        assert!(self.store.presence(row.blob).unwrap() != Presence::None, "nobody finds it by its blob");
    }

    /// What is said of the file that rots and is mended, and what is so.
    fn check_rotten_file(&self, known: &RangeSet, damaged: &RangeSet) {
        let rotten = rotten();
        let bounds = |set: &RangeSet, least: bool, most: bool, what| {
            assert!(!least || *set == rotten, "{what}: {set:?}");
            assert!(if most { set.difference(&rotten).is_empty() } else { set.is_empty() }, "{what}: {set:?}");
        };
        let ended = self.saw(Mark::Mended);
        bounds(
            damaged,
            self.saw(Mark::Quarantined) && !self.saw(Mark::Mends),
            self.saw(Mark::Rots) && !ended,
            "damaged",
        );
        bounds(known, self.saw(Mark::Quarantined) && !self.saw(Mark::Mends), self.saw(Mark::Rots) && !ended, "known");
        let forgotten = damaged.difference(known);
        assert!(!self.saw(Mark::Quarantined) || forgotten.is_empty(), "no longer known as damaged: {forgotten:?}");
        let now = self.disk.open(&Path::new("/arena").join(LARGE), Access::Read).unwrap().fingerprint().unwrap();
        assert_eq!(now.mtime, self.recorded.large_mtime, "the mtime moved");
    }

    fn check_cache(&self) {
        let cached = &self.recorded.blobs.cached;
        let (blob, size) = (BlobId::of(cached), cached.len() as u64);
        assert!(!self.saw(Mark::Taken) || !self.store.cached().unwrap().contains(&blob), "it was taken");
        let missing = self.store.missing_from_cache(blob, size, &all(cached.len())).unwrap();
        for (_, mark) in self.seen {
            let Mark::Committed(committed) = mark else { continue };
            let lost = committed.intersection(&missing);
            assert!(lost.is_empty() || self.saw(Mark::Takes), "committed and lost: {lost:?}");
        }
        for blob in self.store.cached().unwrap() {
            let verdict = self.store.verify_cached(blob, &|_| {}).unwrap();
            assert!(matches!(verdict, Some(Verdict::Sound)), "cached {blob}: {verdict:?}");
        }
        check_read(&self.store, cached, range(0, size), &missing);
        self.check_evicted();
    }

    /// What is evicted is gone or there, and nothing in between; what is pinned is there.
    fn check_evicted(&self) {
        let Blobs { evicted, pinned, .. } = &self.recorded.blobs;
        let missing = |bytes: &[u8]| {
            self.store.missing_from_cache(BlobId::of(bytes), bytes.len() as u64, &all(bytes.len())).unwrap()
        };
        let lacks = missing(evicted);
        let whole = self.saw(Mark::Brought) && !self.saw(Mark::Evicts)
            || self.saw(Mark::BroughtAnew) && !self.saw(Mark::EvictsAll);
        assert!(!whole || lacks.is_empty(), "brought and lost: {lacks:?}");
        assert!(!self.saw(Mark::EvictedAll) || lacks == all(evicted.len()), "evicted and there: {lacks:?}");
        check_read(&self.store, evicted, range(0, evicted.len() as u64), &lacks);
        assert!(!self.saw(Mark::Pinned) || missing(pinned).is_empty(), "pinned and lost");
        check_read(&self.store, pinned, range(0, pinned.len() as u64), &missing(pinned));
    }

    /// There is nothing that no row names.
    fn check_own_files(&self) {
        let cached = self.store.cached().unwrap();
        for path in self.disk.files_below(Path::new("/home")).unwrap() {
            assert!(!path.starts_with("/home/outboards/staged"), "left behind: {path:?}");
            let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("our names are text");
            let Ok(blob) = stem.parse() else { continue };
            let outboard = path.starts_with("/home/outboards");
            let named =
                if outboard { !self.store.holders(blob, 1).unwrap().is_empty() } else { cached.contains(&blob) };
            assert!(named, "left behind: {path:?}");
        }
    }

    /// Of what mending has replaced, if anything, the bytes are saved, and a row names them; and no others.
    fn check_saved(&self) {
        let right = &self.recorded.blobs.of[LARGE];
        let mut rotten_bytes = right.clone();
        rotten().iter().for_each(|range| rotten_bytes[(range.start() + ROTTEN_BYTE) as usize] ^= 4);
        let read = |path: &Path| {
            let file = self.disk.open(path, Access::Read).unwrap();
            let mut bytes = vec![0; file.fingerprint().unwrap().size as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let repairs = self.store.repairs().unwrap();
        let files = self.disk.files_below(Path::new("/home/saved")).unwrap();
        assert_eq!(files.len(), repairs.len(), "{files:?} for {repairs:?}");
        for repair in &repairs {
            assert_eq!(repair.ranges, rotten());
            let saved = rotten_bytes.chunks(GROUP as usize);
            let saved: Vec<u8> =
                [3, 200].into_iter().flat_map(|group| saved.clone().nth(group).unwrap()).copied().collect();
            assert!(read(&Path::new("/home/saved").join(repair.number.to_string())) == saved, "not what was replaced");
        }
        if self.saw(Mark::Quarantined) && read(&Path::new("/arena").join(LARGE)) != rotten_bytes {
            assert_eq!(repairs.len(), 1, "replaced, and not saved");
        }
    }

    /// The store goes on working: what is damaged still can be mended.
    fn mend_the_rest(&self) {
        let file = self.file(LARGE);
        let Some(row) = self.store.file(&file).unwrap() else { return };
        if row.damaged.is_empty() {
            return;
        }
        let mut mending =
            self.store.mend(&file, if row.is_suspect() { Consent::Suspect } else { Consent::Damage }, NOW).unwrap();
        feed(&mut mending, &self.recorded.blobs.of[LARGE], &row.damaged);
        mending.finish().unwrap();
        let verdict = self.store.verify_file(&file, &|_| {}).unwrap();
        assert!(matches!(verdict, Some(Verdict::Sound)), "{verdict:?}");
    }

    fn file(&self, path: &str) -> FileRef {
        FileRef { root: self.store.add_root(Path::new("/arena")).unwrap(), path: path.into() }
    }
}

/// Commits and says so.
pub(crate) fn commit(sink: &mut impl Sink) {
    sink.commit().expect("the simulated disk never fails");
}
