//! Carrying out orders in this machine's arenas, whoever gives them. Rules: spec/copy.md.

use std::{
    fs::File,
    future::Future,
    io,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use blobstore::{FileRef, FileRow, FileState};
use namespace::{ArenaName, Content, PeerId, RelPath, SeenKind, look};
use peers::{Attributes, Done, Link, Lost, MoveId, Order, Orders, Place, Roles, Task, Why};
use rustix::fs::{Mode, OFlags};
use tree::{BlobId, Drift, Fingerprint, UnixTime};

use super::{
    super::{
        Inner, Node, blocking,
        index::{Outcome, hash_at_rest, root_of},
    },
    attributes::has_all,
    held::HeldArena,
    names::Exact,
    place::{Destination, Traits, file_name, fingerprint_at, parent_beneath},
    settle::{Last, Room, Step, own_place},
};
use crate::failure::{Code, Failure};
use crate::target::Target;

impl Orders for Inner {
    fn roles(&self) -> Result<Roles, String> {
        let config = crate::config::Config::load(&self.home.config).map_err(|failure| failure.reason())?;
        Ok(config.roles())
    }

    fn carry_out(
        self: Arc<Self>,
        asker: PeerId,
        order: Order,
        bytes: Arc<AtomicU64>,
    ) -> Pin<Box<dyn Future<Output = Done> + Send>> {
        let node = Node { inner: self };
        Box::pin(async move { node.carry_out(Some(asker), order, bytes).await })
    }
}

/// What stands where something is to be placed.
pub(super) enum Found {
    /// Nothing, or this, which may be replaced.
    Room(Option<Fingerprint>),
    /// Just that; the step takes note of it.
    Same(Box<Step>),
    /// That is the end of it.
    Done(Done),
}

impl Node {
    /// Carries out an order; `asker` is `None` for this machine itself. `bytes` counts those of the file that have come.
    pub(super) async fn carry_out(&self, asker: Option<PeerId>, order: Order, bytes: Arc<AtomicU64>) -> Done {
        let Order { arena, task } = order;
        let done = async {
            match task {
                Task::Check => Ok(self.hold(&arena).await?.map_or_else(|done| done, |_| Done::Ready)),
                Task::Place(place) => {
                    let at = place.path.clone();
                    let part_of = place.part_of.map(|number| self.inner.moving.id(asker, number));
                    if let Err(done) = self.may_place(&(arena.clone(), at.clone()), false, part_of).await {
                        return Ok(done);
                    }
                    let placed = match self.place_with_others(asker, &arena, &place, &bytes).await {
                        Some(placed) => placed,
                        // Apart, for most orders do not come here and need no room for it.
                        None => Box::pin(self.place(asker, &arena, place, bytes)).await,
                    };
                    placed.map_err(|failure| failure.while_doing(format!("place {arena}/{at} at {}", self.name())))
                }
                Task::Leave(leave) => self.leave(asker, &arena, leave).await,
                Task::Pledge(pledge) => self.keep(asker, &arena, pledge).await,
                Task::Prepare(prepare) => {
                    let at = prepare.path.clone();
                    let prepared = Box::pin(self.prepare(asker, &arena, prepare)).await;
                    prepared.map_err(|failure| failure.while_doing(format!("remove {arena}/{at} at {}", self.name())))
                }
                Task::Confirm(confirm) => {
                    let at = confirm.path.clone();
                    let confirmed = self.confirm(asker, &arena, confirm).await;
                    confirmed.map_err(|failure| failure.while_doing(format!("look at {arena}/{at} at {}", self.name())))
                }
                Task::Finish(finish) => {
                    let at = finish.path.clone();
                    let finished = Box::pin(self.finish(asker, &arena, finish)).await;
                    finished.map_err(|failure| failure.while_doing(format!("remove {arena}/{at} at {}", self.name())))
                }
                Task::End(number) => self.end_move(asker, number).await,
                Task::IsOver(id) => self.is_over(id).await,
            }
        };
        done.await.unwrap_or_else(|failure: Failure| {
            let why = match failure.code {
                Code::Unreachable => Why::Unreachable,
                Code::Limit => Why::Full,
                _ => Why::Failed,
            };
            Done::failed(why, &failure.reason())
        })
    }

    pub(super) async fn hold(&self, arena: &ArenaName) -> Result<Result<HeldArena, Done>, Failure> {
        let (node, arena) = (self.clone(), arena.clone());
        blocking(move || node.held_arena(&arena)).await
    }

    /// An arena into which something may be put now. Blocks.
    pub(super) fn held_arena(&self, name: &ArenaName) -> Result<Result<HeldArena, Done>, Failure> {
        if let Some(held) = self.inner.held.recent(name).filter(|held| self.root(name) == Some(held.root)) {
            return Ok(Ok(held));
        }
        let held = self.inner.namespace.arenas()?.into_iter().find(|held| held.name == *name);
        let found = held.and_then(|held| Some((held.dir.clone()?, held))).zip(self.root(name));
        let Some(((dir, arena), root)) = found else {
            let reason = format!("{} does not hold an arena {name}", self.name());
            return Ok(Err(Done::failed(Why::NotFound, &reason)));
        };
        let standing = match root_of(self, &arena, false)? {
            Ok(standing) => standing,
            Err(why) => {
                let reason = format!("the root {dir:?} of the arena {name} is offline at {}: {why}", self.name());
                return Ok(Err(Done::failed(Why::Failed, &reason)));
            }
        };
        self.put_back_left(name, &dir)?;
        let destination = Arc::new(Destination::open(&dir)?.noting(root, self.inner.implied.clone()));
        let true_dir = dir.canonicalize().unwrap_or_else(|_| dir.clone());
        let own_dirs = self.inner.home.own_dirs().into();
        let exact = Exact::default();
        let held = HeldArena { name: name.clone(), root, dir, destination, true_dir, own_dirs, exact, standing };
        self.inner.held.note(held.clone());
        Ok(Ok(held))
    }

    async fn place(
        &self,
        asker: Option<PeerId>,
        arena: &ArenaName,
        order: Place,
        bytes: Arc<AtomicU64>,
    ) -> Result<Done, Failure> {
        let _turn = self.inner.placing.acquire().await?;
        let arena = match self.hold(arena).await? {
            Ok(arena) => arena,
            Err(done) => return Ok(done),
        };
        let (node, near, wanted) = (self.clone(), arena.clone(), order.clone());
        let found = blocking(move || node.seek(&near, &wanted)).await?;
        let Place { path, content, mtime, from, attributes, link, part_of, .. } = order;
        let part_of: Option<MoveId> = part_of.map(|number| self.inner.moving.id(asker, number));
        let traits = |mode| self.traits(mode, mtime, attributes.clone());
        let room = match found {
            Found::Room(replaces) => Room { replaces, part_of },
            Found::Same(step) => return self.settle_at(arena, path, *step).await,
            Found::Done(done) => return Ok(done),
        };
        if let Err(done) = self.may_place(&(arena.name.clone(), path.clone()), room.replaces.is_some(), part_of).await {
            return Ok(done);
        }
        if let (Some(link), &Content::File { blob, .. }) = (link, &content) {
            let (node, near) = (self.clone(), arena.clone());
            if let Some(step) = blocking(move || node.link_step(&near, link, blob, room)).await? {
                return self.settle_at(arena, path, step).await;
            }
        }
        let step = match content {
            Content::Directory { mode } => Step::Directory { traits: traits(mode) },
            Content::Symlink { target } => Step::Symlink { target, mtime, room },
            Content::File { blob, size, mode } => {
                let _pass = self.inner.gate.pass(size).await;
                let holder = from.or(asker).filter(|&holder| holder != self.inner.peers.me());
                let _hint = holder.map(|holder| self.inner.peers.hint(blob, holder));
                let on_bytes = move |more| {
                    bytes.fetch_add(more, Ordering::Relaxed);
                };
                let near = vec![Target { arena: arena.name.clone(), path: Some(path.clone()) }];
                let (arrived, fetched) = self.arrive(blob, size, &arena.destination, &path, near, on_bytes).await?;
                let store = self.inner.store.clone();
                let hash = move || Ok((arrived.hash(&store, blob, size)?, arrived));
                let (hashed, arrived) = blocking(hash).await?;
                let received = fetched.bytes_received;
                let step = Step::File { arrived, hashed, traits: traits(mode), room, received };
                return self.settle_at(arena, path, step).await;
            }
            _ => return Ok(Done::failed(Why::Refused, "nothing to be placed")),
        };
        self.settle_at(arena, path, step).await
    }

    /// What a file or directory is to be like here.
    pub(super) fn traits(&self, mode: u16, mtime: UnixTime, attributes: Attributes) -> Traits {
        Traits { mode, mtime, attributes, keep: self.inner.keep_attributes }
    }

    /// How to make another name of a file that was placed before: `None` if it is not just as it was, or not known to be
    /// the blob. Blocks.
    fn link_step(&self, arena: &HeldArena, link: Link, blob: BlobId, room: Room) -> Result<Option<Step>, Failure> {
        let file = FileRef { root: arena.root, path: link.path.as_bytes().to_owned() };
        let is_sound = |row: &FileRow| row.damaged.is_empty() && row.state == FileState::Settled;
        let row = self.inner.store.file(&file)?.filter(|row| row.blob == blob && is_sound(row));
        let Some(row) = row.filter(|row| row.fingerprint.inode == link.inode) else { return Ok(None) };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = parent_beneath(&arena.dir, &link.path).and_then(|parent| {
            Ok(File::from(rustix::fs::openat(parent, file_name(&link.path), flags, Mode::empty())?))
        });
        let Ok(open) = open else { return Ok(None) };
        let is_same = Fingerprint::from(&open.metadata()?) == row.fingerprint;
        let step = Step::Link { first: link.path, open, blob, fingerprint: row.fingerprint, room };
        Ok(is_same.then_some(step))
    }

    async fn settle_at(&self, arena: HeldArena, path: RelPath, step: Step) -> Result<Done, Failure> {
        let is_directory = matches!(step, Step::Directory { .. });
        let settled = self.settle(Last { arena: arena.clone(), path: path.clone(), step }).await;
        if is_directory { settled } else { self.settled_at(arena, path, settled).await }
    }

    /// What came of the last steps; and if something got in the way only then, that.
    pub(super) async fn settled_at(
        &self,
        arena: HeldArena,
        path: RelPath,
        settled: Result<Done, Failure>,
    ) -> Result<Done, Failure> {
        match settled {
            Err(failure) => match blocking(move || Ok(look(&arena.dir, &path)?)).await {
                Ok(Some(SeenKind::Directory { .. })) => Ok(a_directory()),
                _ => Err(failure),
            },
            done => done,
        }
    }

    /// Looks at what is where something is to be placed. Blocks.
    pub(super) fn seek(&self, arena: &HeldArena, order: &Place) -> Result<Found, Failure> {
        let Place { path, content, overwrite, attributes, .. } = order;
        let overwrite = *overwrite;
        if let Some(offline) = arena.offline(path) {
            return Ok(Found::Done(offline));
        }
        if let Some(full) = self.home_full() {
            return Ok(Found::Done(Done::failed(Why::Full, &full.reason())));
        }
        let is_leaving = path.as_bytes().split(|&b| b == b'/').any(namespace::is_leaving_name);
        if namespace::is_staging_name(file_name(path)) || is_leaving || arena.is_own(path) {
            return Ok(Found::Done(own_place(path)));
        }
        if namespace::is_deleted_name(file_name(path)) {
            let reason = format!("{path} is a name for files that were deleted and are still open, and is not indexed");
            return Ok(Found::Done(Done::failed(Why::Refused, &reason)));
        }
        if let Some(other) = arena.exact.first_other_name(&arena.dir, path)? {
            let reason = format!("the file system takes {other} for another name that is there already");
            return Ok(Found::Done(Done::failed(Why::InTheWay, &reason)));
        }
        let seen = look(&arena.dir, path)?;
        if seen.is_none() {
            return Ok(match obstacle(&arena.dir, path)? {
                Some(above) => {
                    let reason = format!("{above} is in the way: it is no directory");
                    Found::Done(Done::failed(Why::InTheWay, &reason))
                }
                None => Found::Room(None),
            });
        }
        match (&seen, content) {
            (Some(SeenKind::Directory { .. }), Content::Directory { mode }) => {
                let traits = self.traits(*mode, order.mtime, attributes.clone());
                return Ok(Found::Same(Box::new(Step::Directory { traits })));
            }
            (Some(SeenKind::Directory { .. }), _) => return Ok(Found::Done(a_directory())),
            (Some(SeenKind::Symlink { target, .. }), Content::Symlink { target: wanted }) if target == wanted => {
                return Ok(Found::Same(Box::new(Step::KnownSymlink)));
            }
            (Some(SeenKind::File { fingerprint, .. }), Content::File { blob, size, .. })
                if fingerprint.size == *size =>
            {
                if let Some(found) = self.find_file(arena, order, *blob, fingerprint)? {
                    return Ok(found);
                }
            }
            _ => {}
        }
        let may_replace = matches!(seen, Some(SeenKind::File { .. } | SeenKind::Symlink { .. }));
        if overwrite && may_replace && !matches!(content, Content::Directory { .. }) {
            let replaces = match seen {
                Some(SeenKind::File { fingerprint, .. }) => fingerprint,
                _ => fingerprint_at(&parent_beneath(&arena.dir, path)?, path)?,
            };
            return Ok(Found::Room(Some(replaces)));
        }
        let hint = if may_replace { "; --overwrite replaces it" } else { "" };
        let reason = format!("something else is there already{hint}");
        Ok(Found::Done(Done::failed(Why::InTheWay, &reason)))
    }

    /// The same for a file that has the right size: `None` if it has other bytes.
    fn find_file(
        &self,
        arena: &HeldArena,
        order: &Place,
        blob: BlobId,
        seen: &Fingerprint,
    ) -> Result<Option<Found>, Failure> {
        let Place { path, overwrite, prove, attributes, .. } = order;
        let (store, file) = (&self.inner.store, FileRef { root: arena.root, path: path.as_bytes().to_owned() });
        let row = store.file(&file)?;
        let linked = row.as_ref().map(|row| (row, row.fingerprint.drift(seen)));
        let is_known = matches!(&linked, Some((row, Drift::None)) if row.blob == blob && row.damaged.is_empty());
        if is_known && !prove {
            let lost = Lost::default();
            return Ok(Some(Found::Done(Done::There { inode: seen.inode, lost })));
        }
        match hash_at_rest(store, &arena.dir, path, None) {
            Outcome::Hashed { file, mode, .. } if file.hashed.id() == blob => {
                let lost = Lost { attributes: !has_attributes(&arena.dir, path, attributes), mode: false };
                // It is replaced by one that has them.
                let is_replaced = lost.attributes && *overwrite;
                Ok((!is_replaced).then_some(Found::Same(Box::new(Step::Known { file: *file, mode, lost }))))
            }
            Outcome::Hashed { .. } => {
                let Some((row, Drift::None | Drift::Touched)) = linked else { return Ok(None) };
                if row.blob != blob || *overwrite {
                    return Ok(None);
                }
                store.verify_file(&file, &|_| {})?;
                let reason = "it is there, and damaged: mend it with blob repair, or replace it with --overwrite";
                Ok(Some(Found::Done(Done::failed(Why::InTheWay, reason))))
            }
            Outcome::Vanished | Outcome::Changed => {
                Ok(Some(Found::Done(Done::failed(Why::InTheWay, "what is there changes while it is read"))))
            }
            Outcome::Failed(error) => Err(error.into()),
        }
    }
}

/// Whether the file at `path` has these extended attributes.
fn has_attributes(root: &Path, path: &RelPath, attributes: &Attributes) -> bool {
    if attributes.is_empty() {
        return true;
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let open = parent_beneath(root, path)
        .and_then(|parent| Ok(rustix::fs::openat(parent, file_name(path), flags, Mode::empty())?));
    open.is_ok_and(|open| has_all(open, attributes))
}

/// What above `path` is no directory, if anything is.
fn obstacle(root: &Path, path: &RelPath) -> io::Result<Option<RelPath>> {
    let above = std::iter::successors(path.parent(), RelPath::parent);
    for dir in above {
        match look(root, &dir)? {
            None => {}
            Some(SeenKind::Directory { .. }) => return Ok(None),
            Some(_) => return Ok(Some(dir)),
        }
    }
    Ok(None)
}

fn a_directory() -> Done {
    Done::failed(Why::InTheWay, "a directory is in the way; a / behind its name copies into it")
}
