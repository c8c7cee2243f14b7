//! The last steps of changes in arenas, many at a time: synced, named, linked, said; removed, said, unlinked. Order and
//! what a crash leaves: spec/copy.md.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque, btree_map::Entry},
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::PathBuf,
    sync::PoisonError,
};

use blobstore::{HashedFile, Move, NewFile};
use namespace::{ArenaName, Change, Content, RelPath, SeenKind, look};
use peers::{Done, Lost, MoveId, Why};
use tokio::sync::oneshot;
use tracing::error;
use tree::{BlobId, Fingerprint, UnixTime};

use super::{
    super::{Node, blocking, verify::now},
    arrive::{Arrived, Leftover},
    held::HeldArena,
    moving::SetAside,
    place::{Staged, Traits, fingerprint_at, is_gone, parent_beneath},
};
use crate::failure::{Code, Failure};

/// A change that is ready but for its last steps.
pub(super) struct Last {
    pub(super) arena: HeldArena,
    pub(super) path: RelPath,
    pub(super) step: Step,
}

pub(super) enum Step {
    /// A file gets its name.
    File { arrived: Arrived, hashed: HashedFile, traits: Traits, room: Room, received: u64 },
    /// A file is there, and is hashed anew.
    Known { file: NewFile, mode: u16, lost: Lost },
    /// A file that was placed as `first` gets another name, if it is still this one.
    Link { first: RelPath, open: File, blob: BlobId, fingerprint: Fingerprint, room: Room },
    /// A link is made.
    Symlink { target: Vec<u8>, mtime: UnixTime, room: Room },
    /// A link is there.
    KnownSymlink,
    /// A directory is made.
    Directory { traits: Traits },
    /// An entry that is set aside goes, or is put back.
    Finish { set_aside: SetAside, remove: bool },
}

/// What a file or link may be given the name of.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Room {
    /// What it may take the place of, which must still be just that; `None` is nothing.
    pub(super) replaces: Option<Fingerprint>,
    /// The move that it is part of.
    pub(super) part_of: Option<MoveId>,
}

/// Changes that wait for their last steps.
#[derive(Default)]
pub(in super::super) struct Queue {
    waiting: VecDeque<Waiting>,
    /// Whether somebody sees to it that they are taken.
    is_seen_to: bool,
}

/// A change that waits for its last steps, and who waits for that.
pub(super) type Waiting = (Last, oneshot::Sender<Result<Done, Failure>>);

/// A change of which all but the name is on the disk.
enum Begun {
    File { staged: Staged, leftover: Leftover, hashed: HashedFile, room: Room, received: u64, lost: Lost },
    Other(Step),
}

/// What was done on the disk, and is to be written down.
pub(super) enum Made {
    File {
        file: NewFile,
        mode: u16,
        done: Done,
    },
    /// Another name of the file at `first`, whose ctime moved by that.
    Linked {
        first: RelPath,
        blob: BlobId,
        mode: u16,
        before: Fingerprint,
        after: Fingerprint,
        done: Done,
    },
    /// A link or a directory.
    Entry(Done),
    Removed,
    /// A file that has other names, whose ctime moved by that.
    RemovedName {
        blob: BlobId,
        before: Fingerprint,
        after: Fingerprint,
    },
    /// Nothing was changed.
    Nothing(Done),
}

impl Node {
    /// Takes the last steps of a change, together with those of others that wait. They are taken to their end even if nobody
    /// waits any more, or not at all.
    pub(super) async fn settle(&self, last: Last) -> Result<Done, Failure> {
        let (telling, told) = oneshot::channel();
        self.settle_soon([(last, telling)]);
        told.await.unwrap_or_else(|_| Err(lost()))
    }

    /// The same for several; each is told when its steps are taken.
    pub(super) fn settle_soon(&self, more: impl IntoIterator<Item = Waiting>) {
        let mut queue = self.inner.settling.lock().unwrap_or_else(PoisonError::into_inner);
        queue.waiting.extend(more);
        if !std::mem::replace(&mut queue.is_seen_to, true) {
            tokio::spawn(self.clone().settle_queue());
        }
    }

    async fn settle_queue(self) {
        loop {
            let turn = self.inner.settling_turn.clone().lock_owned().await;
            let group: Vec<_> = {
                let mut queue = self.inner.settling.lock().unwrap_or_else(PoisonError::into_inner);
                let count = queue.waiting.len().min(TOGETHER_MAX);
                queue.is_seen_to = count > 0;
                queue.waiting.drain(..count).collect()
            };
            if group.is_empty() {
                return;
            }
            let node = self.clone();
            let settling = blocking(move || {
                let _turn = turn;
                let (lasts, tellings): (Vec<_>, Vec<_>) =
                    group.into_iter().filter(|(_, telling)| !telling.is_closed()).unzip();
                for (settled, telling) in node.settle_all(lasts).into_iter().zip(tellings) {
                    let _ = telling.send(settled);
                }
                Ok(())
            });
            if let Err(failure) = settling.await {
                error!(reason = failure.reason(), "the last steps of a copy failed");
            }
        }
    }

    fn settle_all(&self, lasts: Vec<Last>) -> Vec<Result<Done, Failure>> {
        let begun: Vec<_> = lasts.into_iter().map(|last| self.begin(last)).collect();
        let staged = begun.iter().filter_map(|(.., begun)| match begun {
            Ok(Begun::File { staged, .. }) => Some(staged),
            _ => None,
        });
        let synced = sync_staged(&staged.collect::<Vec<_>>());
        let mut devices = Devices::default();
        let mut made = Vec::new();
        for (arena, path, begun) in begun {
            let name = |begun| {
                // What is set aside does not stay so for the sake of others.
                if !matches!(begun, Begun::Other(Step::Finish { .. })) {
                    synced.as_ref().map_err(again)?;
                }
                self.give_name(&arena, &path, begun, &mut devices)
            };
            let named = begun.and_then(name);
            made.push((arena, path, named));
        }
        let synced = devices.sync();
        let mut settled: Vec<Option<Result<Done, Failure>>> = Vec::new();
        let mut by_arena: HashMap<ArenaName, (HeldArena, Vec<ToSay>)> = HashMap::new();
        for (at, (arena, path, made)) in made.into_iter().enumerate() {
            settled.push(match (made, &synced) {
                (Err(failure), _) => Some(Err(failure)),
                (Ok(Made::Nothing(done)), _) => Some(Ok(done)),
                (Ok(_), Err(error)) => Some(Err(again(error))),
                (Ok(made), Ok(())) => {
                    by_arena.entry(arena.name.clone()).or_insert_with(|| (arena, Vec::new())).1.push((at, path, made));
                    None
                }
            });
        }
        for (arena, made) in by_arena.into_values() {
            let at: Vec<usize> = made.iter().map(|&(at, ..)| at).collect();
            match self.write_down(&arena, made) {
                Ok(done) => done.into_iter().for_each(|(at, done)| settled[at] = Some(Ok(done))),
                Err(failure) => at.into_iter().for_each(|at| settled[at] = Some(Err(failure.clone()))),
            }
        }
        settled.into_iter().map(|settled| settled.unwrap_or_else(|| Err(lost()))).collect()
    }

    fn begin(&self, Last { arena, path, step }: Last) -> (HeldArena, RelPath, Result<Begun, Failure>) {
        let begin = |step| match step {
            Step::File { arrived, hashed, traits, room, received } => {
                let (mut staged, leftover) = arrived.take(&self.inner.store, &arena.destination, &path)?;
                let lost = staged.set_traits(traits)?;
                Ok(Begun::File { staged, leftover, hashed, room, received, lost })
            }
            step => Ok(Begun::Other(step)),
        };
        let is_held = self.root(&arena.name) == Some(arena.root);
        let given_up = || Failure::new(Code::NotFound, format!("the arena {} was given up", arena.name));
        let moved = || {
            let what = "its root went offline, or something was mounted or unmounted in it, meanwhile";
            Failure::new(Code::Error, format!("the arena {}: {what}", arena.name))
        };
        let stays = is_held && arena.standing.stays(self);
        let begun = match step {
            // Nothing is removed where it is not known what is there, and nothing stays set aside.
            Step::Finish { set_aside, .. } if !stays => Ok(Begun::Other(Step::Finish { set_aside, remove: false })),
            step if stays => begin(step),
            _ if is_held => Err(moved()),
            _ => Err(given_up()),
        };
        (arena, path, begun)
    }

    /// Gives a name, or takes one away. `devices` hears where names have to be synced, but for those of files, which is done
    /// when they are linked.
    fn give_name(
        &self,
        arena: &HeldArena,
        path: &RelPath,
        begun: Begun,
        devices: &mut Devices,
    ) -> Result<Made, Failure> {
        let (destination, aside) = (&arena.destination, self.aside());
        let step = match begun {
            Begun::File { mut staged, leftover, hashed, room, received, lost } => {
                if let Err(done) = self.is_still_room(arena, path, room)? {
                    return Ok(Made::Nothing(done));
                }
                match room.replaces {
                    Some(_) => staged.replace(path, &aside)?,
                    None => staged.publish(path)?,
                }
                let meta = staged.file().metadata()?;
                let fingerprint = Fingerprint::from(&meta);
                leftover.forget(&self.inner.store)?;
                let path = path.as_bytes().to_owned();
                let file = NewFile { path, fingerprint, hashed, hashed_at: now(), racy: false };
                let done = Done::Placed { received, inode: fingerprint.inode, lost };
                return Ok(Made::File { file, mode: (meta.mode() & 0o777) as u16, done });
            }
            Begun::Other(step) => step,
        };
        Ok(match step {
            Step::File { .. } => return Err(io::Error::other("it was not begun").into()),
            Step::Known { file, mode, lost } => {
                let done = Done::There { inode: file.fingerprint.inode, lost };
                Made::File { file, mode, done }
            }
            Step::Link { first, open, blob, fingerprint: before, room } => {
                if Fingerprint::from(&open.metadata()?) != before {
                    return Ok(Made::Nothing(changed(&first)));
                }
                if let Err(done) = self.is_still_room(arena, path, room)? {
                    return Ok(Made::Nothing(done));
                }
                destination.link(path, &open, room.replaces.is_some())?;
                let meta = open.metadata()?;
                let (mode, after) = ((meta.mode() & 0o777) as u16, Fingerprint::from(&meta));
                let done = Done::Placed { received: 0, inode: after.inode, lost: Lost::default() };
                Made::Linked { first, blob, mode, before, after, done }
            }
            Step::Symlink { target, mtime, room } => {
                if let Err(done) = self.is_still_room(arena, path, room)? {
                    return Ok(Made::Nothing(done));
                }
                match room.replaces {
                    Some(_) => destination.replace_by_symlink(path, &target, mtime, &aside)?,
                    None => destination.symlink(path, &target, mtime)?,
                }
                devices.add(&parent_beneath(&arena.dir, path)?)?;
                Made::Entry(Done::Placed { received: 0, inode: 0, lost: Lost::default() })
            }
            Step::KnownSymlink => {
                devices.add(&parent_beneath(&arena.dir, path)?)?;
                Made::Entry(Done::There { inode: 0, lost: Lost::default() })
            }
            Step::Directory { traits } => {
                if let Err(done) = self.is_still_room(arena, path, Room::default())? {
                    return Ok(Made::Nothing(done));
                }
                let (is_new, lost) = destination.make_dir_with(path, &traits)?;
                devices.add(&parent_beneath(&arena.dir, path)?)?;
                Made::Entry(match is_new {
                    true => Done::Placed { received: 0, inode: 0, lost },
                    false => Done::There { inode: 0, lost },
                })
            }
            Step::Finish { set_aside, remove: true } => self.remove_aside(path, set_aside)?,
            Step::Finish { set_aside, remove: false } => Made::Nothing(self.put_back(path, set_aside)?),
        })
    }

    /// Looks once more whether something may get its name: no move is in the way, and what it takes the place of is what was
    /// looked at. If not, that is what becomes of it.
    fn is_still_room(&self, arena: &HeldArena, path: &RelPath, room: Room) -> Result<Result<(), Done>, Failure> {
        let spot = (arena.name.clone(), path.clone());
        let may = self.inner.moving.moves().may_place(&spot, room.replaces.is_some(), room.part_of);
        if let Err(refusal) = may {
            return Ok(Err(self.refused(&refusal, "")));
        }
        let Some(expected) = room.replaces else { return Ok(Ok(())) };
        let now = parent_beneath(&arena.dir, path).and_then(|parent| fingerprint_at(&parent, path));
        Ok(match now {
            Ok(now) if now == expected => Ok(()),
            Ok(_) => Err(Done::failed(Why::InTheWay, "what is there changed since it was looked at")),
            Err(error) if is_gone(&error) => {
                Err(Done::failed(Why::InTheWay, "what was there is gone since it was looked at"))
            }
            Err(error) => return Err(error.into()),
        })
    }

    /// Links and says what was made, says what was removed, and unlinks that; in this order, each durable.
    fn write_down(&self, arena: &HeldArena, made: Vec<ToSay>) -> Result<Vec<(usize, Done)>, Failure> {
        let (mut files, mut expected, mut changes, mut done) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut removed, mut names, mut linked) = (Vec::<RelPath>::new(), Vec::new(), Vec::new());
        for (at, path, made) in made {
            let (content, mtime, fingerprint) = match made {
                Made::File { file, mode, done: is_done } => {
                    let fingerprint = file.fingerprint;
                    let content = Content::File { blob: file.hashed.id(), size: fingerprint.size, mode };
                    files.push(file);
                    done.push((at, is_done));
                    (content, fingerprint.mtime, Some(fingerprint))
                }
                Made::Linked { first, blob, mode, before, after, done: is_done } => {
                    let (from, to) = (first.as_bytes().to_owned(), path.as_bytes().to_owned());
                    linked.push(Move { from, to, fingerprint: after, keep: true });
                    names.push((blob, before, after));
                    done.push((at, is_done));
                    (Content::File { blob, size: after.size, mode }, after.mtime, Some(after))
                }
                Made::Entry(is_done) => {
                    done.push((at, is_done));
                    match look(&arena.dir, &path)? {
                        Some(SeenKind::Symlink { target, mtime }) => (Content::Symlink { target }, mtime, None),
                        Some(SeenKind::Directory { mode, mtime }) => (Content::Directory { mode }, mtime, None),
                        _ => continue,
                    }
                }
                Made::Removed | Made::RemovedName { .. } => {
                    if let Made::RemovedName { blob, before, after } = made {
                        names.push((blob, before, after));
                    }
                    done.push((at, Done::Removed));
                    removed.push(path.clone());
                    (Content::Deleted, mtime_left(arena, &path)?, None)
                }
                Made::Nothing(is_done) => {
                    done.push((at, is_done));
                    continue;
                }
            };
            expected.push(fingerprint);
            changes.push(Change { path, content, mtime });
        }
        if !files.is_empty() {
            self.inner.store.link(arena.root, &files)?;
        }
        // A name whose first one is no longer linked is looked at again, and hashed.
        let relinked = if linked.is_empty() { Vec::new() } else { self.inner.store.relink(arena.root, &linked)? };
        let unknown: HashSet<&[u8]> =
            linked.iter().zip(relinked).filter(|(_, is_done)| !is_done).map(|(name, _)| &name.to[..]).collect();
        let (mut expected, mut again) = (expected.into_iter(), Vec::new());
        self.inner.namespace.commit(&arena.name, &changes, now(), &mut |change| {
            let is_so = match (look(&arena.dir, &change.path), expected.next().flatten()) {
                (Ok(Some(SeenKind::File { fingerprint, .. })), Some(expected)) => {
                    fingerprint == expected && !unknown.contains(change.path.as_bytes())
                }
                (Ok(seen), None) => seen.is_none() != change.content.is_present(),
                _ => false,
            };
            if !is_so {
                again.push(change.path.clone());
            }
            is_so
        })?;
        removed.retain(|path| !again.contains(path));
        if !removed.is_empty() {
            let removed: Vec<&[u8]> = removed.iter().map(RelPath::as_bytes).collect();
            self.inner.store.unlink(arena.root, &removed)?;
        }
        for (blob, before, after) in names {
            self.refresh_names(blob, before, after)?;
        }
        self.look_again(&arena.name, again);
        Ok(done)
    }

    /// A file has got or lost a name, and so has another ctime under the others: nobody edited it.
    pub(super) fn refresh_names(&self, blob: BlobId, before: Fingerprint, after: Fingerprint) -> Result<(), Failure> {
        let store = &self.inner.store;
        for file in store.holders(blob, NAMES_MAX)? {
            if store.file(&file)?.is_some_and(|row| row.fingerprint == before) {
                store.refresh(&file, blob, after)?;
            }
        }
        Ok(())
    }

    /// Where files are that are to take the place of others, at that moment, if it is on the same file system.
    pub(in super::super) fn aside(&self) -> PathBuf {
        self.inner.home.cache.join("incoming")
    }
}

/// What is to be written down of one change: its number among those that are settled together, and its path.
type ToSay = (usize, RelPath, Made);

/// Makes files without names durable: one by one, or where they are many, all at once.
fn sync_staged(staged: &[&Staged]) -> io::Result<()> {
    if staged.len() < SYNC_ALL_FROM {
        return staged.iter().try_for_each(|staged| staged.file().sync_all());
    }
    let mut devices = Devices::default();
    staged.iter().try_for_each(|staged| devices.add(staged.parent()))?;
    devices.sync()
}

/// File systems that have to be synced, each by a directory on it.
#[derive(Default)]
struct Devices(BTreeMap<u64, OwnedFd>);

impl Devices {
    fn add(&mut self, dir: &OwnedFd) -> io::Result<()> {
        if let Entry::Vacant(new) = self.0.entry(rustix::fs::fstat(dir)?.st_dev) {
            new.insert(dir.try_clone()?);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.values().try_for_each(|dir| Ok(rustix::fs::syncfs(dir)?))
    }
}

/// An entry changed since it was looked at.
pub(super) fn changed(path: &RelPath) -> Done {
    Done::failed(Why::Changed, &format!("{path} changed since it was hashed; it stays"))
}

/// A path is not to be changed by orders.
pub(super) fn own_place(path: &RelPath) -> Done {
    Done::failed(Why::Refused, &format!("{path} is a place of the daemon's own"))
}

/// What a deletion is dated by: the mtime of the nearest directory above that is left.
fn mtime_left(arena: &HeldArena, path: &RelPath) -> Result<UnixTime, Failure> {
    let mut above = std::iter::successors(path.parent(), RelPath::parent);
    let left = above.find_map(|dir| match look(&arena.dir, &dir) {
        Ok(Some(SeenKind::Directory { mtime, .. })) => Some(mtime),
        _ => None,
    });
    let root = || Ok::<_, Failure>(Fingerprint::from(&fs::metadata(&arena.dir)?).mtime);
    left.map_or_else(root, Ok)
}

/// Nobody says what became of it.
pub(super) fn lost() -> Failure {
    io::Error::other("its last steps were not taken").into()
}

/// The same error for another who met it.
fn again(error: &io::Error) -> Failure {
    io::Error::new(error.kind(), error.to_string()).into()
}

/// How many names of one file are known to be the same; the others are found to be touched.
const NAMES_MAX: usize = 256;
/// How many changes are settled together.
const TOGETHER_MAX: usize = 512;
/// From so many files on, one sync of all is cheaper than one of each.
const SYNC_ALL_FROM: usize = 4;
