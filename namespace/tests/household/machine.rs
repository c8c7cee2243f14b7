//! One machine: its files, its namespace, and what it must know of itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use namespace::{ArenaName, Change, Content, Namespace, Origin, PeerId, RelPath, Version};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tree::{BlobId, UnixTime};

use crate::{
    common::{Disk, arena, file, peer, seconds, symlink},
    files::{ARENAS, DIRECTORY, Files, Key, any_key, is_directory},
};

pub(crate) struct Machine {
    pub(crate) number: u8,
    pub(crate) files: Files,
    pub(crate) said: Said,
    /// What its rows and its oracle were once.
    pub(crate) backup: Option<(Disk, Said)>,
    disk: Disk,
    /// There but for the moment in which it is opened again.
    open: Option<(Namespace, Arc<Database>)>,
    /// How many seconds its clock is off.
    clock: i64,
    pub(crate) history_limit: u64,
}

/// What a machine has said, so far as its rows were not lost.
#[derive(Clone, Default)]
pub(crate) struct Said {
    /// Where something is: all that was said there since something is there.
    pub(crate) standing: BTreeMap<Key, Vec<Version>>,
    /// The contents that it ever said there, in order.
    pub(crate) contents: BTreeMap<Key, Vec<BlobId>>,
}

impl Machine {
    pub(crate) fn new(number: u8, rng: &mut fastrand::Rng) -> Self {
        let history_limit = *rng.choice(&[1, 3, 10, 100_000]).unwrap();
        let mut machine = Self {
            number,
            files: Files::default(),
            said: Said::default(),
            backup: None,
            disk: Disk::default(),
            open: None,
            clock: rng.i64(-YEAR..=YEAR),
            history_limit,
        };
        machine.open(rng);
        machine
    }

    pub(crate) fn id(&self) -> PeerId {
        peer(self.number)
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.open.as_ref().expect("it is open").0
    }

    /// Stops in good order, or by a power cut, and starts again.
    pub(crate) fn restart(&mut self, rng: &mut fastrand::Rng) {
        let left = self.disk.copy();
        self.open = None;
        if rng.bool() {
            self.disk = left;
        }
        let before = self.namespace_mark(rng);
        assert_eq!(before, self.namespace().mark().unwrap());
    }

    fn namespace_mark(&mut self, rng: &mut fastrand::Rng) -> namespace::Mark {
        self.open(rng);
        self.namespace().mark().unwrap()
    }

    /// All rows are lost; the key and the files are not.
    pub(crate) fn lose_rows(&mut self, rng: &mut fastrand::Rng) {
        self.open = None;
        (self.disk, self.said) = (Disk::default(), Said::default());
        self.open(rng);
    }

    pub(crate) fn back_up(&mut self) {
        self.backup = Some((self.disk.copy(), self.said.clone()));
    }

    /// Its rows are what they were when the backup was taken; its files are not.
    pub(crate) fn restore(&mut self, rng: &mut fastrand::Rng) {
        let (disk, said) = self.backup.as_ref().expect("there is a backup");
        self.open = None;
        // On a copy, so that the backup stays as it is.
        (self.disk, self.said) = (disk.copy(), said.clone());
        self.open(rng);
    }

    fn open(&mut self, rng: &mut fastrand::Rng) {
        let (me, db) = (self.id(), self.disk.database());
        let now = (NOW + self.clock).unsigned_abs();
        let origin = Origin { me, now, random: rng.u64(..), history_limit: self.history_limit };
        self.open = Some((Namespace::open(db.clone(), origin).expect("the namespace opens"), db));
    }

    /// Something happens to a file or directory. `others` is what there is to copy: by whom, where, what.
    pub(crate) fn work(&mut self, rng: &mut fastrand::Rng, tick: i64, others: &[(Key, Content)]) {
        let mtime = match rng.u8(..8) {
            0 => seconds(rng.i64(0..NOW)),
            _ => UnixTime { seconds: NOW + self.clock + tick, nanos: rng.u32(..1_000_000_000) },
        };
        let mut key = any_key(rng);
        let present: Vec<Key> = self.files.iter().map(|(key, _)| key.clone()).collect();
        if let Some(there) = rng.choice(&present)
            && rng.u8(..3) > 0
        {
            key = there.clone();
        }
        match rng.u8(..20) {
            0..8 => self.files.put(key, file(&format!("{} {tick}", self.number)), mtime),
            8..10 => self.files.put(key, DIRECTORY, mtime),
            10 => self.files.put(key, symlink(&format!("to {tick}")), mtime),
            11 => self.files.put(key, file(""), mtime),
            12..15 => self.files.remove(&key),
            15 => {
                if let Some((content, _)) = self.files.get(&key).cloned() {
                    self.files.put(key, content, mtime);
                }
            }
            16 => {
                let to = any_key(rng);
                let is_apart = !to.1.is_within(&key.1) && !key.1.is_within(&to.1);
                if is_apart && self.files.get(&key).is_some() {
                    self.files.rename(&key, &to, mtime);
                }
            }
            17 => {
                // Back to what was there before.
                let before = self.said.contents.get(&key).and_then(|contents| rng.choice(contents)).copied();
                if let Some((blob, content)) = before.zip(self.files.get(&key).map(|(content, _)| content.clone()))
                    && let Content::File { size, mode, .. } = content
                    && (size > 0) == (blob != BlobId::EMPTY)
                {
                    self.files.put(key, Content::File { blob, size, mode }, mtime);
                }
            }
            _ => {
                if let Some((key, content)) = rng.choice(others) {
                    self.files.put(key.clone(), content.clone(), mtime);
                }
            }
        }
    }

    /// Says what is at and below `within`, or anywhere in the arena: what is new before what is gone.
    pub(crate) fn reconcile(&mut self, name: &ArenaName, within: Option<&RelPath>, rng: &mut fastrand::Rng) {
        let known = self.known(name, within, rng);
        let seen = self.files.within(name, within);
        let is_known = |path: &RelPath, (content, mtime): &(Content, UnixTime)| {
            known.get(path).is_some_and(|known| (&known.content, known.mtime) == (content, *mtime))
        };
        let new = seen.iter().filter(|(path, node)| !is_known(path, node) || rng.u8(..30) == 0);
        let new = new.map(|(path, (content, mtime))| (path.clone(), content.clone(), *mtime));
        let gone = known.iter().filter(|(path, _)| !seen.contains_key(*path));
        let gone = gone.map(|(path, _)| (path.clone(), Content::Deleted, seconds(NOW)));
        let changes = new.chain(gone).map(|(path, content, mtime)| Change { path, content, mtime });
        let changes: Vec<Change> = changes.collect();
        let at_once = rng.usize(1..=changes.len().max(1));
        for part in changes.chunks(at_once) {
            self.commit(name, part);
        }
    }

    fn commit(&mut self, name: &ArenaName, changes: &[Change]) {
        self.namespace().commit(name, changes, 1, &mut |_| true).unwrap();
        for Change { path, .. } in changes {
            let key = (name.clone(), path.clone());
            match self.own(&key) {
                Some(version) if version.content.is_present() => {
                    self.said.contents.entry(key.clone()).or_default().extend(version.content.id());
                    self.said.standing.entry(key).or_default().push(version);
                }
                _ => drop(self.said.standing.remove(&key)),
            }
        }
    }

    /// What this machine says of a path of its own.
    pub(crate) fn own(&self, (name, path): &Key) -> Option<Version> {
        let versions = self.namespace().versions(name, path).unwrap();
        versions.into_iter().find(|(who, _)| who.is_none()).map(|(_, version)| version)
    }

    /// What it knows of its own files, taken in parts.
    fn known(&self, name: &ArenaName, within: Option<&RelPath>, rng: &mut fastrand::Rng) -> BTreeMap<RelPath, Version> {
        let mut known: Vec<(RelPath, Version)> = Vec::new();
        let max = rng.usize(1..9);
        loop {
            let after = known.last().map(|(path, _)| path);
            let part = self.namespace().known(name, within, after, max).unwrap();
            let is_last = part.len() < max;
            known.extend(part.into_iter().map(|known| (known.path, known.version)));
            if is_last {
                assert!(known.is_sorted_by(|(a, _), (b, _)| a < b), "{known:?}");
                return known.into_iter().collect();
            }
        }
    }

    pub(crate) fn reconcile_all(&mut self, rng: &mut fastrand::Rng) {
        for name in ARENAS {
            self.reconcile(&arena(name), None, rng);
        }
    }

    /// Checks that it says of itself what its files are.
    pub(crate) fn check_own(&self, rng: &mut fastrand::Rng) {
        for name in ARENAS.map(arena) {
            let known = self.known(&name, None, rng);
            let known: Vec<_> = known.into_iter().map(|(path, known)| (path, (known.content, known.mtime))).collect();
            assert_eq!(known, Vec::from_iter(self.files.within(&name, None)), "own rows of {}", self.number);
        }
    }

    /// Checks the rows that no method gives: their count in each head, the length of each log, who has which blob.
    pub(crate) fn check_tables(&self) {
        let txn = self.open.as_ref().expect("it is open").1.begin_read().unwrap();
        let mut counts: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        let mut blobs: BTreeMap<(u64, u32), u64> = BTreeMap::new();
        let mut deletions: BTreeSet<(u32, u64)> = BTreeSet::new();
        for row in txn.open_table(VERSIONS).unwrap().iter().unwrap() {
            let (key, row) = row.unwrap();
            let number = key.value().2;
            counts.entry(number).or_default().0 += 1;
            let version: Version = postcard::from_bytes(row.value()).unwrap();
            if !version.content.is_present() {
                deletions.insert((number, version.seq));
            }
            if let Some(blob) = version.content.blob().filter(|_| number > 0) {
                let prefix = u64::from_be_bytes(blob.as_bytes()[..8].try_into().unwrap());
                *blobs.entry((prefix, number)).or_default() += 1;
            }
        }
        for row in txn.open_table(LOG).unwrap().iter().unwrap() {
            let (number, seq) = row.unwrap().0.value();
            counts.entry(number).or_default().1 += 1;
            deletions.remove(&(number, seq));
        }
        let mut expected: BTreeSet<u32> = counts.keys().copied().collect();
        for row in txn.open_table(HEADS).unwrap().iter().unwrap() {
            let (number, row) = row.unwrap();
            let head: HeadRow = postcard::from_bytes(row.value()).unwrap();
            let (rows, logged) = counts.get(&number.value()).copied().unwrap_or_default();
            assert_eq!(head.rows, rows, "rows of {} at {}", number.value(), self.number);
            assert!(logged <= self.history_limit, "{logged} changes of {} at {}", number.value(), self.number);
            assert!(head.floor <= head.mark.seq || head.after.is_some(), "{head:?}");
            expected.remove(&number.value());
            // While a listing comes, what it does not have goes when its turn comes.
            let is_whole = head.after.is_none() && head.mark.seq < u64::MAX;
            let forgotten = deletions.iter().find(|(of, _)| is_whole && *of == number.value());
            assert_eq!(forgotten, None, "a deletion that the log of {} does not reach", self.number);
        }
        assert!(expected.is_empty(), "rows of no head: {expected:?}");
        let got = txn.open_table(BLOBS).unwrap();
        let got = got.iter().unwrap().map(|row| row.map(|(key, count)| (key.value(), count.value())).unwrap());
        assert_eq!(got.collect::<BTreeMap<_, _>>(), blobs, "who has what, at {}", self.number);
    }
}

/// What a head's row is, from the format: spec/namespace.md, "Rows".
#[derive(Debug, serde::Deserialize)]
struct HeadRow {
    mark: namespace::Mark,
    after: Option<namespace::Key>,
    floor: u64,
    #[expect(dead_code, reason = "fields behind it are read")]
    heard: bool,
    #[expect(dead_code, reason = "fields behind it are read")]
    via: u32,
    rows: u64,
}

const VERSIONS: TableDefinition<(&str, &[u8], u32), &[u8]> = TableDefinition::new("namespace.versions");
const LOG: TableDefinition<(u32, u64), &[u8]> = TableDefinition::new("namespace.log");
const HEADS: TableDefinition<u32, &[u8]> = TableDefinition::new("namespace.heads");
const BLOBS: TableDefinition<(u64, u32), u64> = TableDefinition::new("namespace.blobs");

/// What time it is, in seconds since 1970, by a right clock.
const NOW: i64 = 800_000_000;
const YEAR: i64 = 366 * 86_400;

/// Whether a file can be copied: a directory is made, not copied.
pub(crate) fn is_copied(content: &Content) -> bool {
    content.is_present() && !is_directory(content)
}
