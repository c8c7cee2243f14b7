//! The moves that this machine takes part in: what is [decided](super::moves) of them, what of that is durable, and what was
//! set aside. Rows and order: spec/copy.md, "Moves".

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use blobstore::RootId;
use namespace::{PeerId, RelPath};
use peers::MoveId;
use redb::{Database, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;
use tree::{BlobId, Fingerprint};

use super::{
    held::HeldArena,
    moves::{Kept, Moves, Spot},
};
use crate::failure::{Failure, WhileDoing};

/// The moves of one machine.
pub(in super::super) struct Moving {
    me: PeerId,
    db: Arc<Database>,
    start: Instant,
    moves: Mutex<Moves>,
    /// What is known of the entries that are set aside.
    aside: Mutex<HashMap<Spot, SetAside>>,
    /// Directories for entries that are set aside, by the directory in which they are.
    dirs: Mutex<HashMap<(RootId, Option<RelPath>), AsideDir>>,
    /// Trees that were leaving when the program stopped: what was set aside in them is to be put back.
    left: Mutex<Vec<Left>>,
    /// Held by who puts that back.
    restoring: Mutex<()>,
    /// Whether a task gives up the moves of which nothing is heard.
    is_watched: AtomicBool,
}

/// An entry that is set aside.
pub(super) struct SetAside {
    pub(super) arena: HeldArena,
    pub(super) number: u64,
    pub(super) what: What,
    /// What the entry is like since it was renamed, if it was looked at.
    pub(super) after: Option<Fingerprint>,
    /// Lets the other names of the file wait until this one is gone or back: either moves the ctime of all.
    pub(super) _alone: Option<OwnedMutexGuard<()>>,
}

/// What an entry is, and what it was like before it was set aside.
#[derive(Debug, Clone, Copy)]
pub(super) enum What {
    File { blob: BlobId, before: Fingerprint },
    Symlink { before: Fingerprint },
    Directory,
}

/// A directory for entries that are set aside, and how many are in it or about to be.
#[derive(Debug, Clone, Copy)]
struct AsideDir {
    number: u64,
    entries: usize,
}

/// A tree that leaves, as its row has it: the arena root and the path below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Left {
    pub(super) id: MoveId,
    dir: Vec<u8>,
    pub(super) path: Option<RelPath>,
}

impl Left {
    pub(super) fn new(id: MoveId, dir: &Path, path: Option<RelPath>) -> Self {
        Self { id, dir: dir.as_os_str().as_encoded_bytes().to_owned(), path }
    }
}

impl Moving {
    pub(in super::super) fn open(db: Arc<Database>, me: PeerId) -> Result<Self, Failure> {
        let read = || {
            let txn = db.begin_write()?;
            let kept = rows::<Kept>(&txn, KEPT)?;
            let left = rows::<Left>(&txn, LEAVING)?;
            txn.commit()?;
            Ok::<_, Failure>((kept, left))
        };
        let (kept, left) = read().while_doing("read which moves had not ended")?;
        Ok(Self {
            me,
            start: Instant::now(),
            moves: Mutex::new(Moves::new(kept)),
            aside: Mutex::default(),
            dirs: Mutex::default(),
            left: Mutex::new(left),
            restoring: Mutex::default(),
            is_watched: AtomicBool::new(false),
            db,
        })
    }

    /// The move of which `asker`, which is `None` for this machine, knows the number.
    pub(super) fn id(&self, asker: Option<PeerId>, number: u64) -> MoveId {
        MoveId { director: asker.unwrap_or(self.me), number }
    }

    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn moves(&self) -> MutexGuard<'_, Moves> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the entry of a path is set aside.
    pub(in super::super) fn is_aside(&self, spot: &Spot) -> bool {
        self.moves().is_aside(spot)
    }

    /// Takes note of an entry that is set aside.
    pub(super) fn note(&self, spot: Spot, aside: SetAside) {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner).insert(spot, aside);
    }

    pub(super) fn take(&self, spot: &Spot) -> Option<SetAside> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner).remove(spot)
    }

    /// The number of the directory for entries of `dir`, in which there is one more from now on. `make` makes it, and says
    /// whether it did: the number may be taken.
    pub(super) fn enter<E>(
        &self,
        root: RootId,
        dir: Option<RelPath>,
        make: impl Fn(u64) -> Result<bool, E>,
    ) -> Result<u64, E> {
        let mut dirs = self.dirs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = dirs.get_mut(&(root, dir.clone())) {
            known.entries += 1;
            return Ok(known.number);
        }
        loop {
            let number = fastrand::u64(..);
            if make(number)? {
                dirs.insert((root, dir), AsideDir { number, entries: 1 });
                return Ok(number);
            }
        }
    }

    /// There is one entry less in the directory for those of `dir`. `remove` removes it if that was the last.
    pub(super) fn leave(&self, root: RootId, dir: Option<RelPath>, remove: impl FnOnce(u64)) {
        let mut dirs = self.dirs.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (root, dir);
        let Some(known) = dirs.get_mut(&key) else { return };
        known.entries -= 1;
        if known.entries == 0 {
            remove(known.number);
            dirs.remove(&key);
        }
    }

    /// Whether the directory of this number is in use.
    pub(super) fn uses(&self, number: u64) -> bool {
        self.dirs.lock().unwrap_or_else(PoisonError::into_inner).values().any(|dir| dir.number == number)
    }

    /// The trees below `dir` in which something may be left of what was set aside before the program stopped.
    pub(super) fn left_in(&self, dir: &Path) -> Vec<Left> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.iter().filter(|left| left.dir == dir.as_os_str().as_encoded_bytes()).cloned().collect()
    }

    /// Something is left below a tree that could not be put back yet.
    pub(super) fn leave_behind(&self, left: Left) {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(left);
    }

    /// One at a time puts back what is left.
    pub(super) fn restoring(&self) -> MutexGuard<'_, ()> {
        self.restoring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was set aside in these trees is put back.
    pub(super) fn forget_left(&self, gone: &[Left]) -> Result<(), Failure> {
        self.change(|txn| gone.iter().try_for_each(|left| remove(txn, LEAVING, left)))?;
        self.left.lock().unwrap_or_else(PoisonError::into_inner).retain(|left| !gone.contains(left));
        Ok(())
    }

    /// Writes down that a tree leaves, before anything in it is set aside.
    pub(super) fn write_leaving(&self, left: &Left) -> Result<(), Failure> {
        self.change(|txn| insert(txn, LEAVING, left))
    }

    /// Writes down that a tree is kept.
    pub(super) fn write_kept(&self, kept: &Kept) -> Result<(), Failure> {
        self.change(|txn| insert(txn, KEPT, kept))
    }

    /// Nothing is kept for these any more.
    pub(super) fn release(&self, kept: &[Kept]) -> Result<(), Failure> {
        if kept.is_empty() {
            return Ok(());
        }
        self.change(|txn| kept.iter().try_for_each(|kept| remove(txn, KEPT, kept)))?;
        let mut moves = self.moves();
        kept.iter().for_each(|kept| moves.release(kept));
        Ok(())
    }

    /// Nothing is set aside any more for these moves.
    pub(super) fn forget_leaving(&self, ids: &[MoveId]) -> Result<(), Failure> {
        self.change(|txn| {
            let of_these = rows::<Left>(txn, LEAVING)?.into_iter().filter(|left| ids.contains(&left.id));
            of_these.collect::<Vec<_>>().iter().try_for_each(|left| remove(txn, LEAVING, left))
        })
    }

    /// Whether the caller is to give up the moves of which nothing is heard, for nobody does.
    pub(super) fn begin_watching(&self) -> bool {
        !self.is_watched.swap(true, Ordering::AcqRel)
    }

    pub(super) fn end_watching(&self) {
        self.is_watched.store(false, Ordering::Release);
    }

    fn change(&self, work: impl FnOnce(&redb::WriteTransaction) -> Result<(), Failure>) -> Result<(), Failure> {
        let change = || {
            let txn = self.db.begin_write()?;
            work(&txn)?;
            Ok::<_, Failure>(txn.commit()?)
        };
        change().while_doing("write down which moves have not ended")
    }
}

fn rows<T: for<'a> Deserialize<'a>>(txn: &redb::WriteTransaction, table: Table) -> Result<Vec<T>, Failure> {
    let table = txn.open_table(table)?;
    let rows = table.iter()?.map(|row| Ok(postcard::from_bytes(row?.0.value())?));
    rows.collect()
}

fn insert(txn: &redb::WriteTransaction, table: Table, row: &impl Serialize) -> Result<(), Failure> {
    txn.open_table(table)?.insert(&postcard::to_stdvec(row)?[..], ())?;
    Ok(())
}

fn remove(txn: &redb::WriteTransaction, table: Table, row: &impl Serialize) -> Result<(), Failure> {
    txn.open_table(table)?.remove(&postcard::to_stdvec(row)?[..])?;
    Ok(())
}

type Table = TableDefinition<'static, &'static [u8], ()>;

/// [`Kept`]: what is kept for moves that have not ended.
const KEPT: Table = TableDefinition::new("moves.kept");
/// [`Left`]: trees that leave.
const LEAVING: Table = TableDefinition::new("moves.leaving");

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;
    use redb::backends::InMemoryBackend;

    use super::{super::moves::Tree, *};

    #[test]
    fn rows_on_disk_and_after_a_restart() {
        let db = Arc::new(Database::builder().create_with_backend(InMemoryBackend::new()).unwrap());
        let me = PeerId::from_bytes([1; 32]);
        let open = || Moving::open(db.clone(), me).unwrap();
        let moving = open();
        let id = moving.id(None, 300);
        let tree = Tree { arena: "inbox".parse().unwrap(), path: Some("a".try_into().unwrap()) };
        let kept = Kept { id, tree, source: PeerId::from_bytes([2; 32]), source_arena: "docs".parse().unwrap() };
        let left = Left::new(id, Path::new("/d"), None);
        let hex = |row: Vec<u8>| HEXLOWER.encode(&row);
        let peer = |byte: &str| byte.repeat(32);
        let expected = [&peer("01"), "ac02", "05696e626f78", "01", "0161", &peer("02"), "04646f6373"].concat();
        assert_eq!(hex(postcard::to_stdvec(&kept).unwrap()), expected);
        assert_eq!(hex(postcard::to_stdvec(&left).unwrap()), [&peer("01"), "ac02", "022f64", "00"].concat());

        assert!(moving.moves().keep(&kept).unwrap());
        moving.write_kept(&kept).unwrap();
        moving.write_leaving(&left).unwrap();
        let moving = open();
        assert_eq!(moving.moves().kept_for(id), std::slice::from_ref(&kept));
        assert_eq!(moving.left_in(Path::new("/d")), std::slice::from_ref(&left));
        assert_eq!(moving.left_in(Path::new("/e")), []);
        moving.release(&[kept]).unwrap();
        moving.forget_left(std::slice::from_ref(&left)).unwrap();
        assert_eq!((moving.moves().kept_for(id), moving.left_in(Path::new("/d"))), (vec![], vec![]));
        moving.write_leaving(&left).unwrap();
        moving.forget_leaving(&[id]).unwrap();
        let moving = open();
        assert_eq!((moving.moves().kept_for(id), moving.left_in(Path::new("/d"))), (vec![], vec![]));
    }
}
