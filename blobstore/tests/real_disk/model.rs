//! Which files are linked, and which vanished, against a map in memory: links, renames, second names, unlinks, quarantine
//! and verifying, in any order; and after each of them every page of files, every holder, every directory's number and
//! every outboard's row.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use blobstore::{FileRef, FileRow, FileState, Item, Move, NewFile, RealDisk, RootId, Settings, Store, Verified};
use proptest::prelude::*;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, backends::InMemoryBackend};
use tree::{BlobId, Fingerprint, RangeSet, UnixTime};

use crate::common::{FILES, HOLDERS, dir_numbers, fingerprint, groups, random, settings, split};

/// Neighbours in the order of bytes that are and are not below each other.
const PATHS: [&[u8]; 12] = [
    b"a",
    b"a-b",
    b"a.txt",
    b"a/b",
    b"a/b/c",
    b"a/b/d/e/f",
    b"a/b-c",
    b"a/\xff\xff",
    b"a0",
    b"/a",
    b"\xff",
    b"\xff/\xff",
];
/// So few that some are forgotten.
const VANISHED_MAX: usize = 3;
/// Without an outboard, and with one in a row.
const SIZES: [usize; 4] = [0, 10, 20_000, 40_000];

type Model = BTreeMap<(usize, Vec<u8>), FileRow>;

#[derive(Debug, Clone)]
enum Step {
    Link(Vec<(usize, usize)>),
    Unlink(Vec<usize>),
    /// From, to, whether it is kept, whether the size is right.
    Relink(Vec<(usize, usize, bool, bool)>),
    /// Whether it is suspect, too.
    Damage(usize, bool),
    Verify(usize, u64),
}

fn a_step() -> impl Strategy<Value = Step> {
    let path = || 0..PATHS.len();
    prop_oneof![
        3 => prop::collection::vec((path(), 0..SIZES.len()), 1..8).prop_map(Step::Link),
        1 => prop::collection::vec(path(), 1..4).prop_map(Step::Unlink),
        4 => prop::collection::vec((path(), path(), prop::bool::weighted(0.3), prop::bool::weighted(0.9)), 1..6)
            .prop_map(Step::Relink),
        1 => (path(), any::<bool>()).prop_map(|(path, suspect)| Step::Damage(path, suspect)),
        1 => (path(), 1..9u64).prop_map(|(path, at)| Step::Verify(path, at)),
    ]
}

struct Lab {
    store: Store,
    db: Arc<Database>,
    roots: [RootId; 2],
    blobs: Vec<Vec<u8>>,
    clock: i64,
    /// What is remembered of files that are gone, in the order in which they went.
    vanished: Vec<((usize, Vec<u8>), FileRow)>,
    /// The numbers of directories, and those that there were before.
    numbers: BTreeSet<u32>,
    gone: BTreeSet<u32>,
}

impl Lab {
    fn fingerprint(&mut self, size: u64) -> Fingerprint {
        self.clock += 1;
        let time = UnixTime { seconds: self.clock, nanos: 5 };
        fingerprint(1, 2, size, time, time)
    }

    fn take(&mut self, at: usize, step: &Step, model: &mut Model) {
        let root = self.roots[at];
        match step {
            Step::Link(files) => {
                let new = files.iter().map(|&(path, blob)| {
                    let (bytes, fingerprint) = (self.blobs[blob].clone(), self.fingerprint(SIZES[blob] as u64));
                    let verified = Verified { at: 7, next: 0 };
                    let (blob, damaged, state) = (BlobId::of(&bytes), RangeSet::new(), FileState::Settled);
                    let row = FileRow { blob, fingerprint, damaged, verified, state };
                    let key = (at, PATHS[path].to_vec());
                    self.vanished.retain(|(gone, _)| *gone != key);
                    model.insert(key, row);
                    let hashed = self.store.hash(&bytes[..], bytes.len() as u64).unwrap();
                    NewFile { path: PATHS[path].to_vec(), fingerprint, hashed_at: 7, racy: false, hashed }
                });
                let new: Vec<_> = new.collect();
                self.store.link(root, &new).unwrap();
            }
            Step::Unlink(paths) => {
                for &path in paths {
                    let key = (at, PATHS[path].to_vec());
                    self.vanished.extend(model.remove(&key).map(|row| (key, row)));
                }
                self.vanished.drain(..self.vanished.len().saturating_sub(VANISHED_MAX));
                self.store.unlink(root, &paths.iter().map(|&path| PATHS[path]).collect::<Vec<_>>()).unwrap();
            }
            Step::Relink(moves) => {
                let before = model.clone();
                let old = |path: usize| before.get(&(at, PATHS[path].to_vec()));
                let moves: Vec<_> = moves
                    .iter()
                    .map(|&(from, to, keep, right)| {
                        let size = old(from).map_or(3, |row| row.fingerprint.size) + u64::from(!right);
                        let (fingerprint, done) = (self.fingerprint(size), right && old(from).is_some());
                        let [source, target] = [from, to].map(|path| PATHS[path].to_vec());
                        (Move { from: source, to: target, fingerprint, keep }, done)
                    })
                    .collect();
                let done = || moves.iter().filter(|(_, done)| *done).map(|(moved, _)| moved);
                done().filter(|moved| !moved.keep).for_each(|moved| _ = model.remove(&(at, moved.from.clone())));
                for Move { from, to, fingerprint, .. } in done() {
                    let row = before[&(at, from.clone())].clone();
                    let (now, state) = match row.state {
                        FileState::Suspect { .. } => {
                            (row.fingerprint, FileState::Suspect { read: *fingerprint, was_settled: false })
                        }
                        state => (*fingerprint, state),
                    };
                    let key = (at, to.clone());
                    self.vanished.retain(|(gone, _)| *gone != key);
                    model.insert(key, FileRow { fingerprint: now, state, ..row });
                }
                let (moves, done): (Vec<_>, Vec<_>) = moves.into_iter().unzip();
                assert_eq!(self.store.relink(root, &moves).unwrap(), done);
            }
            Step::Damage(path, is_suspect) => {
                let Some(row) = model.get_mut(&(at, PATHS[*path].to_vec())) else { return };
                row.damaged = row.damaged.union(&groups(row.fingerprint.size as usize, [0]));
                if *is_suspect {
                    row.state = FileState::Suspect { read: row.fingerprint, was_settled: false };
                }
                let txn = self.db.begin_write().unwrap();
                let row = postcard::to_stdvec(row).unwrap();
                txn.open_table(FILES).unwrap().insert((at as u32, PATHS[*path]), &row[..]).unwrap();
                txn.commit().unwrap();
            }
            Step::Verify(path, at_ms) => {
                let verified = Verified { at: *at_ms, next: 1 };
                let item = Item::File(FileRef { root, path: PATHS[*path].to_vec() });
                self.store.note_verified(&[(item.clone(), verified)]).unwrap();
                let row = model.get_mut(&(at, PATHS[*path].to_vec()));
                let expected = row.map(|row| std::mem::replace(&mut row.verified, verified)).map(|_| verified);
                assert_eq!(self.store.verified(&item).unwrap(), expected.unwrap_or_default());
            }
        }
    }

    /// Everything that is said is what the model says.
    fn check(&mut self, model: &Model) {
        for (at, &root) in self.roots.iter().enumerate() {
            let vanished = |path: &&[u8]| self.vanished.iter().find(|(gone, _)| *gone == (at, path.to_vec()));
            let expected: Vec<_> = PATHS.iter().map(|path| vanished(path).map(|(_, row)| row.clone())).collect();
            assert_eq!(self.store.vanished(root, &PATHS).unwrap(), expected, "vanished from {root:?}");
        }
        let dirs: Vec<&[u8]> = [&b""[..], b"a/\xff", b"c"].into_iter().chain(PATHS).collect();
        for (at, &root) in self.roots.iter().enumerate() {
            let all =
                || model.iter().filter(|((of, _), _)| *of == at).map(|((_, path), row)| (path.clone(), row.clone()));
            for dir in &dirs {
                let is_within = |path: &[u8]| {
                    dir.is_empty() || path.strip_prefix(*dir).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
                };
                let within: Vec<_> = all().filter(|(path, _)| is_within(path)).collect();
                let files: Vec<_> = self.store.files_within(root, dir).map(Result::unwrap).collect();
                assert_eq!(files, within, "within {dir:?}");
                for (after, max) in PATHS.into_iter().chain([&b"a/"[..], b"b"]).zip([0, 1, 2, 9].into_iter().cycle()) {
                    let page = self.store.files_page(root, dir, Some(after), max).unwrap();
                    let behind = within.iter().filter(|(path, _)| &path[..] > after).take(max).cloned();
                    assert_eq!(page, behind.collect::<Vec<_>>(), "{max} within {dir:?} after {after:?}");
                }
            }
        }
        for bytes in &self.blobs {
            let blob = BlobId::of(bytes);
            let having = model.iter().filter(|(_, row)| row.blob == blob);
            let having: Vec<_> =
                having.map(|((at, path), _)| FileRef { root: self.roots[*at], path: path.clone() }).collect();
            assert_eq!(self.store.holders(blob, 99).unwrap(), having);
            let has_row = self.has_outboard_row(blob);
            assert_eq!(
                has_row,
                !having.is_empty() && bytes.len() as u64 > tree::GROUP_BYTES,
                "the outboard of {having:?}"
            );
        }
        self.check_dirs(model);
    }

    /// The two tables of directories are inverse; the directories of all files have a number, and no other that has no
    /// file below it; no number comes back; and the holders are those of the model's files, by these numbers.
    fn check_dirs(&mut self, model: &Model) {
        let numbers = dir_numbers(&self.db);
        let now: BTreeSet<u32> = numbers.values().copied().collect();
        assert!(now.is_disjoint(&self.gone), "{now:?} were given again");
        self.gone.extend(self.numbers.difference(&now));
        self.numbers = now;
        for (root, dir) in numbers.keys() {
            let mut files = model.keys().filter(|(at, _)| *at as u32 == *root);
            assert!(files.any(|(_, path)| path.starts_with(dir)), "nothing is linked below {dir:?}");
        }
        let txn = self.db.begin_read().unwrap();
        let holders = txn.open_table(HOLDERS).unwrap();
        let holders = holders.iter().unwrap().map(|row| {
            let (key, ()) = row.map(|(key, value)| (key, value.value())).unwrap();
            let (blob, dir, name) = key.value();
            (*blob, dir, name.to_owned())
        });
        let expected = model.iter().map(|((at, path), row)| {
            let (dir, name) = split(path);
            let number = numbers.get(&(*at as u32, dir.to_owned()));
            let number = *number.unwrap_or_else(|| panic!("{dir:?} has no number"));
            (*row.blob.as_bytes().first_chunk().unwrap(), number, name.to_owned())
        });
        assert_eq!(holders.collect::<BTreeSet<([u8; 6], _, _)>>(), expected.collect::<BTreeSet<_>>());
    }

    fn has_outboard_row(&self, blob: BlobId) -> bool {
        let table = TableDefinition::<&[u8; 32], &[u8]>::new("store.outboards");
        self.db.begin_read().unwrap().open_table(table).unwrap().get(blob.as_bytes()).unwrap().is_some()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_are_what_was_said_of_them(steps in prop::collection::vec((0..2usize, a_step()), 1..20)) {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let db = Arc::new(Database::builder().create_with_backend(InMemoryBackend::new()).unwrap());
        let settings = Settings { vanished_max: VANISHED_MAX as u64, ..settings(dir.path()) };
        let store = Store::open(Arc::new(RealDisk), db.clone(), settings).unwrap();
        let roots = [dir.path().join("cache"), dir.path().join("outboards")].map(|dir| store.add_root(&dir).unwrap());
        let blobs = SIZES.iter().map(|&size| random(size as u64, size)).collect();
        let (numbers, gone, mut model) = (BTreeSet::new(), BTreeSet::new(), Model::new());
        let mut lab = Lab { store, db, roots, blobs, clock: 0, vanished: Vec::new(), numbers, gone };
        for (at, step) in &steps {
            lab.take(*at, step, &mut model);
            lab.check(&model);
        }
        let first = lab.roots[0];
        lab.store.remove_root(first).unwrap();
        let gone: Vec<_> = model.extract_if(.., |(at, _), _| *at == 0).collect();
        lab.vanished.extend(gone);
        lab.vanished.drain(..lab.vanished.len().saturating_sub(VANISHED_MAX));
        // What it is called by next.
        lab.roots[0] = lab.store.add_root(&dir.path().join("cache")).unwrap();
        lab.check(&model);
    }
}

/// Thousands of files more than a page has rows, with others already there between them.
#[test]
fn more_files_than_a_page() {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let db = Arc::new(Database::builder().create_with_backend(InMemoryBackend::new()).unwrap());
    let store = Store::open(Arc::new(RealDisk), db, settings(dir.path())).unwrap();
    let root = store.add_root(dir.path()).unwrap();
    let name = |n: usize| format!("{n:06}").into_bytes();
    let link = |names: &mut dyn Iterator<Item = usize>| {
        let new = names.map(|n| {
            let bytes = n.to_le_bytes();
            let fingerprint = fingerprint(1, n as u64, 8, TIME, TIME);
            NewFile {
                path: name(n),
                fingerprint,
                hashed_at: 1,
                racy: false,
                hashed: store.hash(&bytes[..], 8).unwrap(),
            }
        });
        store.link(root, &new.collect::<Vec<_>>()).unwrap();
    };
    const FILES: usize = 9000;
    link(&mut (0..FILES).filter(|n| n % 1000 == 1));
    link(&mut (0..FILES).filter(|n| n % 3 != 2));
    link(&mut (0..FILES));
    let files: Vec<_> = store.files(root).map(Result::unwrap).collect();
    let expected = |n: usize| (name(n), BlobId::of(&n.to_le_bytes()), n as u64);
    let seen = files.into_iter().map(|(path, row)| (path, row.blob, row.fingerprint.inode));
    assert!(seen.eq((0..FILES).map(expected)));
    store.remove_root(root).unwrap();
    assert_eq!(store.files(root).count(), 0);
}

const TIME: UnixTime = UnixTime { seconds: 1, nanos: 1 };
