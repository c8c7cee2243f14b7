//! Carrying out orders in this machine's arenas, whoever gives them. Rules: spec/copy.md.

use std::{
    fs::File,
    future::Future,
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use blobstore::{FileRef, FileRow, FileState};
use namespace::{ArenaName, Content, PeerId, RelPath, SeenKind, look};
use peers::{Attributes, Done, Held, Link, Lost, Order, Orders, Place, Remove, Roles, Task, Why};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use tree::{BlobId, Drift, Fingerprint, UnixTime};

use super::{
    super::{
        Inner, Node, blocking,
        index::{Outcome, hash_at_rest, root_of},
    },
    attributes::has_all,
    place::{Destination, Traits, file_name, fingerprint_at, parent_beneath},
    settle::{HeldArena, Last, Step, changed},
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
    /// Nothing, or what may be replaced.
    Room,
    /// Just that; the step takes note of it.
    Same(Step),
    /// That is the end of it.
    Done(Done),
}

/// What is to be done where something is to be removed.
enum Removal {
    /// The last steps.
    Ready(Box<Last>),
    /// Nothing; that is the end of it.
    Done(Done),
    /// First to be alone with the blob, of which there are several names.
    Alone(BlobId),
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
                    let placed = match self.place_with_others(asker, &arena, &place, &bytes).await {
                        Some(placed) => placed,
                        // Apart, for most orders do not come here and need no room for it.
                        None => Box::pin(self.place(asker, &arena, place, bytes)).await,
                    };
                    placed.map_err(|failure| failure.while_doing(format!("place {arena}/{at} at {}", self.name())))
                }
                Task::Remove(remove) => {
                    let at = remove.path.clone();
                    let removed = self.remove(&arena, remove).await;
                    removed.map_err(|failure| failure.while_doing(format!("remove {arena}/{at} at {}", self.name())))
                }
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

    async fn hold(&self, arena: &ArenaName) -> Result<Result<HeldArena, Done>, Failure> {
        let (node, arena) = (self.clone(), arena.clone());
        blocking(move || node.held_arena(&arena)).await
    }

    /// An arena into which something may be put now. Blocks.
    pub(super) fn held_arena(&self, name: &ArenaName) -> Result<Result<HeldArena, Done>, Failure> {
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
        let destination = Arc::new(Destination::open(&dir)?.noting(root, self.inner.implied.clone()));
        let true_dir = dir.canonicalize().unwrap_or_else(|_| dir.clone());
        let own_dirs = self.inner.home.own_dirs().into();
        Ok(Ok(HeldArena { name: name.clone(), root, dir, destination, true_dir, own_dirs, standing }))
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
        let Place { path, content, mtime, overwrite, from, attributes, link, .. } = order;
        let traits = |mode| self.traits(mode, mtime, attributes.clone());
        let found = match (found, link, &content) {
            (Found::Room, Some(link), &Content::File { blob, .. }) => {
                let (node, near) = (self.clone(), arena.clone());
                let step = blocking(move || node.link_step(&near, link, blob, overwrite)).await?;
                step.map_or(Found::Room, Found::Same)
            }
            (found, ..) => found,
        };
        let step = match (found, content) {
            (Found::Done(done), _) => return Ok(done),
            (Found::Same(step), _) => step,
            (Found::Room, Content::Directory { mode }) => Step::Directory { traits: traits(mode) },
            (Found::Room, Content::Symlink { target }) => Step::Symlink { target, mtime, overwrite },
            (Found::Room, Content::File { blob, size, mode }) => {
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
                let step = Step::File { arrived, hashed, traits: traits(mode), overwrite, received };
                return self.settle_at(arena, path, step).await;
            }
            (Found::Room, _) => return Ok(Done::failed(Why::Refused, "nothing to be placed")),
        };
        self.settle_at(arena, path, step).await
    }

    /// What a file or directory is to be like here.
    pub(super) fn traits(&self, mode: u16, mtime: UnixTime, attributes: Attributes) -> Traits {
        Traits { mode, mtime, attributes, keep: self.inner.keep_attributes }
    }

    /// How to make another name of a file that was placed before: `None` if it is not just as it was, or not known to be
    /// the blob. Blocks.
    fn link_step(&self, arena: &HeldArena, link: Link, blob: BlobId, overwrite: bool) -> Result<Option<Step>, Failure> {
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
        let step = Step::Link { first: link.path, open, blob, fingerprint: row.fingerprint, overwrite };
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
        if namespace::is_staging_name(file_name(path)) || arena.is_own(path) {
            return Ok(Found::Done(own_place(path)));
        }
        let seen = look(&arena.dir, path)?;
        if seen.is_none() {
            return Ok(match obstacle(&arena.dir, path)? {
                Some(above) => {
                    let reason = format!("{above} is in the way: it is no directory");
                    Found::Done(Done::failed(Why::InTheWay, &reason))
                }
                None => Found::Room,
            });
        }
        match (&seen, content) {
            (Some(SeenKind::Directory { .. }), Content::Directory { mode }) => {
                return Ok(Found::Same(Step::Directory {
                    traits: self.traits(*mode, order.mtime, attributes.clone()),
                }));
            }
            (Some(SeenKind::Directory { .. }), _) => return Ok(Found::Done(a_directory())),
            (Some(SeenKind::Symlink { target, .. }), Content::Symlink { target: wanted }) if target == wanted => {
                return Ok(Found::Same(Step::KnownSymlink));
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
            return Ok(Found::Room);
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
            return Ok(Some(Found::Done(Done::There { held: Some((*seen).into()), inode: seen.inode, lost })));
        }
        match hash_at_rest(store, &arena.dir, path, None) {
            Outcome::Hashed { file, mode, .. } if file.hashed.id() == blob => {
                let lost = Lost { attributes: !has_attributes(&arena.dir, path, attributes), mode: false };
                // It is replaced by one that has them.
                let is_replaced = lost.attributes && *overwrite;
                Ok((!is_replaced).then_some(Found::Same(Step::Known { file, mode, lost })))
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

    async fn remove(&self, arena: &ArenaName, order: Remove) -> Result<Done, Failure> {
        let _turn = self.inner.gathering.turn().await?;
        let making_ready = self.inner.placing.acquire().await?;
        // One name of a file after the other: each moves the ctime of those that are left.
        let mut alone = None;
        let last = loop {
            let (node, arena, order, is_alone) = (self.clone(), arena.clone(), order.clone(), alone.is_some());
            match blocking(move || node.begin_removal(&arena, order, is_alone)).await? {
                Removal::Ready(last) => break last,
                Removal::Done(done) => return Ok(done),
                Removal::Alone(blob) => alone = Some(self.inner.peers.alone_with(blob).await),
            }
        };
        drop(making_ready);
        self.settle(*last).await
    }

    fn begin_removal(&self, arena: &ArenaName, order: Remove, is_alone: bool) -> Result<Removal, Failure> {
        let arena = match self.held_arena(arena)? {
            Ok(arena) => arena,
            Err(done) => return Ok(Removal::Done(done)),
        };
        if let Some(offline) = arena.offline(&order.path) {
            return Ok(Removal::Done(offline));
        }
        if arena.is_own(&order.path) {
            return Ok(Removal::Done(own_place(&order.path)));
        }
        if let Some(blob) = order.content.blob().filter(|_| !is_alone) {
            let there = std::fs::symlink_metadata(arena.dir.join(order.path.as_path()));
            if there.is_ok_and(|meta| meta.nlink() > 1) {
                return Ok(Removal::Alone(blob));
            }
        }
        Ok(match self.check_removal(&arena, &order)? {
            Ok(step) => Removal::Ready(Box::new(Last { arena, path: order.path, step })),
            Err(done) => Removal::Done(done),
        })
    }

    /// Opens and checks what is to go: it must be what was hashed, still read so, and not the very file that the other
    /// machine has. What is found then must not have moved when it goes.
    fn check_removal(&self, arena: &HeldArena, order: &Remove) -> Result<Result<Step, Done>, Failure> {
        let Remove { path, content, held, .. } = order;
        let parent = match parent_beneath(&arena.dir, path) {
            Ok(parent) => parent,
            Err(error) if is_gone(&error) => return Ok(Err(Done::Removed)),
            Err(error) => return Err(error.into()),
        };
        let stays = |reason: &str| Ok(Err(Done::failed(Why::Changed, reason)));
        match content {
            Content::Directory { .. } => Ok(Ok(Step::RemoveDirectory { parent })),
            Content::Symlink { target } => {
                let fingerprint = match fingerprint_at(&parent, path) {
                    Ok(fingerprint) => fingerprint,
                    Err(error) if is_gone(&error) => return Ok(Err(Done::Removed)),
                    Err(error) => return Err(error.into()),
                };
                match rustix::fs::readlinkat(&parent, file_name(path), Vec::new()) {
                    Ok(found) if found.as_bytes() == &target[..] => {}
                    _ => return Ok(Err(changed(path))),
                }
                if *held == Some(Held::from(fingerprint)) {
                    return stays(SAME_FILE);
                }
                Ok(Ok(Step::RemoveSymlink { parent, fingerprint }))
            }
            Content::File { blob, mode, .. } => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let open = match rustix::fs::openat(&parent, file_name(path), flags, Mode::empty()) {
                    Ok(open) => File::from(open),
                    Err(Errno::NOENT) => return Ok(Err(Done::Removed)),
                    Err(Errno::LOOP) => return Ok(Err(changed(path))),
                    Err(error) => return Err(io::Error::from(error).into()),
                };
                let meta = open.metadata()?;
                let file = FileRef { root: arena.root, path: path.as_bytes().to_owned() };
                let row = self.inner.store.file(&file)?;
                let fingerprint = Fingerprint::from(&meta);
                if let Err(reason) = may_remove(row.as_ref(), *blob, meta.is_file().then_some(&fingerprint), *held) {
                    return stays(reason);
                }
                if (meta.mode() & 0o777) as u16 != *mode {
                    return stays("its mode changed since it was copied");
                }
                let read = tree::blob_id(&open, fingerprint.size);
                if Fingerprint::from(&open.metadata()?) != fingerprint {
                    return Ok(Err(changed(path)));
                }
                if order.attributes.is_some_and(|digest| digest != self.inner.keep_attributes.read(&open).digest()) {
                    return stays("its extended attributes changed since it was copied");
                }
                if read? != *blob {
                    self.inner.store.verify_file(&file, &|_| {})?;
                    return stays("its bytes are no longer what they were, though nobody edited it: it is damaged");
                }
                Ok(Ok(Step::RemoveFile { parent, open, blob: *blob, fingerprint }))
            }
            _ => stays("nothing that can be removed"),
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

/// Whether a file may be removed because another machine has its blob, if its bytes are still read so: `row` is what is known
/// of it, `now` what it is like (`None` if it is no regular file), and `held` what the other machine has. If not, why not.
fn may_remove(
    row: Option<&FileRow>,
    blob: BlobId,
    now: Option<&Fingerprint>,
    held: Option<Held>,
) -> Result<(), &'static str> {
    let row = row.ok_or("it is not known what it is: it has not been hashed yet")?;
    let now = now.ok_or("it is no file any more")?;
    if row.blob != blob {
        return Err("it is another version than the one that was copied");
    }
    if row.is_suspect() {
        return Err("it is suspect: it may have rotted or been edited");
    }
    if !row.damaged.is_empty() {
        return Err("it is damaged");
    }
    // The ctime alone moves when the file gets or loses another name, and the device when it is mounted elsewhere.
    if row.fingerprint.drift(now).is_other_file() {
        return Err("it changed since it was hashed");
    }
    match held {
        None => Err("it is not said what the other machine has"),
        Some(held) if held == Held::from(*now) => Err(SAME_FILE),
        Some(_) => Ok(()),
    }
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

fn own_place(path: &RelPath) -> Done {
    Done::failed(Why::Refused, &format!("{path} is a place of the daemon's own"))
}

fn a_directory() -> Done {
    Done::failed(Why::InTheWay, "a directory is in the way; a / behind its name copies into it")
}

/// Whether nothing is there.
fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|errno| gone.contains(&errno))
}

const SAME_FILE: &str = "it is the very file that the destination has: both machines see the same directory";

#[cfg(test)]
mod tests {
    use blobstore::Verified;
    use tree::{ByteRange, RangeSet};

    use super::*;

    #[test]
    fn only_what_is_just_as_it_was_hashed_may_go() {
        let time = |seconds| UnixTime { seconds, nanos: 5 };
        let now = Fingerprint { device: 1, inode: 2, birth: None, size: 3, mtime: time(4), ctime: time(5) };
        let blob = BlobId::of(b"abc");
        let row = FileRow {
            blob,
            fingerprint: now,
            damaged: RangeSet::new(),
            verified: Verified { at: 1, next: 0 },
            state: FileState::Settled,
        };
        let suspect = FileRow { state: FileState::Suspect(now), ..row.clone() };
        let elsewhere = Some(Held { inode: 9, ..now.into() });
        assert_eq!(may_remove(Some(&row), blob, Some(&now), elsewhere), Ok(()));
        let stays = |row: Option<&FileRow>, blob, now: Option<&Fingerprint>, held| {
            assert!(may_remove(row, blob, now, held).is_err(), "{now:?}");
        };
        stays(None, blob, Some(&now), elsewhere);
        stays(Some(&suspect), blob, Some(&now), elsewhere);
        stays(Some(&row), BlobId::of(b"abd"), Some(&now), elsewhere);
        stays(Some(&row), blob, None, elsewhere);
        stays(Some(&row), blob, Some(&now), None);
        stays(Some(&row), blob, Some(&now), Some(now.into()));
        // The same file on a shared disk has another device number there.
        stays(Some(&row), blob, Some(&now), Some(Fingerprint { device: 77, ..now }.into()));
        let damaged = RangeSet::from(ByteRange::new(0, 3).unwrap());
        stays(Some(&FileRow { damaged, ..row.clone() }), blob, Some(&now), elsewhere);
        for changed in
            [Fingerprint { inode: 9, ..now }, Fingerprint { size: 9, ..now }, Fingerprint { mtime: time(9), ..now }]
        {
            stays(Some(&row), blob, Some(&changed), elsewhere);
        }
        for touched in [Fingerprint { device: 9, ..now }, Fingerprint { ctime: time(9), ..now }] {
            assert_eq!(may_remove(Some(&row), blob, Some(&touched), elsewhere), Ok(()));
        }
    }
}
