//! The source's part in a move: trees are marked as leaving, entries are set aside, and then removed or put back. Rules and
//! order: spec/copy.md, "Removing".

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
    time::{Duration, Instant},
};

use blobstore::{FileRef, is_open_for_writing};
use namespace::{ArenaName, Content, PeerId, RelPath, Walk, WalkError, is_leaving_name};
use peers::{Done, Finish, Leave, MoveId, Prepare, Why};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use tokio::{sync::OwnedMutexGuard, time::sleep};
use tracing::{error, warn};
use tree::{BlobId, Fingerprint};

use super::{
    super::{Node, blocking},
    aside,
    held::HeldArena,
    moves::{Over, Prepared, Refusal, SILENCE_LIMIT, Spot, Tree},
    moving::{Left, SetAside, What},
    place::{SWEPT_AFTER_S, file_name, fingerprint_at, is_gone, parent_beneath, sweep},
    settle::{Last, Made, Step, changed, own_place},
    untouched::{EDITED, WRITTEN, is_unchanged, may_leave, see_aside, unlink},
};
use crate::failure::Failure;

/// What is to be set aside, checked.
struct Ready {
    parent: OwnedFd,
    /// The file, if it is one, as it was read.
    open: Option<File>,
    what: What,
}

/// What is to be done where something is to be set aside.
enum Found {
    Ready(Box<(HeldArena, Ready)>),
    /// Nothing; that is the end of it.
    Done(Done),
    /// First to be alone with the blob, of which there are several names.
    Alone(BlobId),
}

impl Node {
    /// Marks a tree as leaving.
    pub(super) async fn leave(&self, asker: Option<PeerId>, arena: &ArenaName, order: Leave) -> Result<Done, Failure> {
        let arena = match self.hold(arena).await? {
            Ok(arena) => arena,
            Err(done) => return Ok(done),
        };
        let moving = &self.inner.moving;
        let id = moving.id(asker, order.number);
        let tree = Tree { arena: arena.name.clone(), path: order.path };
        loop {
            let marked = moving.moves().leave(id, &tree, moving.now());
            match marked {
                Ok(()) => break,
                Err(Refusal::Kept(kept)) => {
                    if let Err(why) = self.lift(&kept).await {
                        return Ok(self.refused(&Refusal::Kept(kept), &why));
                    }
                }
                Err(refusal) => return Ok(self.refused(&refusal, "")),
            }
        }
        if moving.begin_watching() {
            tokio::spawn(self.clone().give_up_silent_moves());
        }
        let (node, left) = (self.clone(), Left::new(id, &arena.dir, tree.path));
        blocking(move || node.inner.moving.write_leaving(&left)).await?;
        Ok(Done::Ready)
    }

    /// Sets an entry aside. Goes to its end, even if nobody waits any more.
    pub(super) async fn prepare(
        &self,
        asker: Option<PeerId>,
        arena: &ArenaName,
        order: Prepare,
    ) -> Result<Done, Failure> {
        let moving = &self.inner.moving;
        let spot = (arena.clone(), order.path.clone());
        let (id, began) = (moving.id(asker, order.number), Instant::now());
        loop {
            let begun = moving.moves().prepare(id, &spot, moving.now());
            match begun {
                Ok(None) => break,
                Ok(Some(aside)) => return Ok(Done::Prepared { aside }),
                Err(Refusal::SetAside) if began.elapsed() < PUT_BACK_LIMIT => {
                    // An older move of the same machine is over: its command was killed, and is given again.
                    let older = moving.moves().set_aside_by(&spot);
                    match older {
                        Some(older) if older.director != id.director => {
                            return Ok(self.refused(&Refusal::SetAside, ""));
                        }
                        Some(older) if older != id => drop(self.end_move(asker, older.number).await?),
                        _ => {}
                    }
                    sleep(PUT_BACK_POLL).await;
                }
                Err(refusal) => return Ok(self.refused(&refusal, "")),
            }
        }
        // Whoever asked may be gone before it is done, and what is noted of the entry must end all the same.
        let node = self.clone();
        let preparing = tokio::spawn(async move {
            let (near, arena) = (node.clone(), spot.0.clone());
            let prepared = tokio::spawn(async move { near.prepare_noted(arena, order).await }).await;
            let prepared = prepared.unwrap_or_else(|panic| Err(Failure::from(panic)));
            if !matches!(prepared, Ok(Done::Prepared { .. })) {
                node.inner.moving.moves().ended(&spot);
            }
            prepared
        });
        preparing.await.unwrap_or_else(|panic| Err(Failure::from(panic)))
    }

    async fn prepare_noted(&self, arena: ArenaName, order: Prepare) -> Result<Done, Failure> {
        let _turn = self.inner.gathering.turn().await?;
        let making_ready = self.inner.placing.acquire().await?;
        // One name of a file after the other: each moves the ctime of those that are left.
        let mut alone = None;
        let (arena, ready) = loop {
            let (node, arena, order, is_alone) = (self.clone(), arena.clone(), order.clone(), alone.is_some());
            match blocking(move || node.find_leaving(&arena, &order, is_alone)).await? {
                Found::Ready(found) => break *found,
                Found::Done(done) => return Ok(done),
                Found::Alone(blob) => alone = Some(self.inner.peers.alone_with(blob).await),
            }
        };
        drop(making_ready);
        let (node, path) = (self.clone(), order.path);
        blocking(move || node.set_aside(arena, &path, ready, alone)).await
    }

    fn find_leaving(&self, arena: &ArenaName, order: &Prepare, is_alone: bool) -> Result<Found, Failure> {
        let arena = match self.held_arena(arena)? {
            Ok(arena) => arena,
            Err(done) => return Ok(Found::Done(done)),
        };
        if let Some(offline) = arena.offline(&order.path) {
            return Ok(Found::Done(offline));
        }
        if arena.is_own(&order.path) {
            return Ok(Found::Done(own_place(&order.path)));
        }
        if let Some(blob) = order.content.blob().filter(|_| !is_alone) {
            let there = std::fs::symlink_metadata(arena.dir.join(order.path.as_path()));
            if there.is_ok_and(|meta| meta.nlink() > 1) {
                return Ok(Found::Alone(blob));
            }
        }
        Ok(match self.check_leaving(&arena, order)? {
            Ok(ready) => Found::Ready(Box::new((arena, ready))),
            Err(done) => Found::Done(done),
        })
    }

    /// Opens and checks what is to go: it must be what was hashed, still read so, and nobody must be writing to it.
    fn check_leaving(&self, arena: &HeldArena, order: &Prepare) -> Result<Result<Ready, Done>, Failure> {
        let Prepare { path, content, attributes, .. } = order;
        let parent = match parent_beneath(&arena.dir, path) {
            Ok(parent) => parent,
            Err(error) if is_gone(&error) => return Ok(Err(Done::Removed)),
            Err(error) => return Err(error.into()),
        };
        let stays = |reason: &str| Ok(Err(Done::failed(Why::Changed, reason)));
        let (open, what) = match content {
            Content::Directory { .. } => match aside::is_empty(&parent, file_name(path)) {
                Ok(true) => (None, What::Directory),
                Ok(false) => return Ok(Err(Done::NotEmpty)),
                Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {
                    return Ok(Err(Done::Removed));
                }
                Err(error) if is_gone(&error) || error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
                    return Ok(Err(changed(path)));
                }
                Err(error) => return Err(error.into()),
            },
            Content::Symlink { target } => {
                let before = match fingerprint_at(&parent, path) {
                    Ok(before) => before,
                    Err(error) if is_gone(&error) => return Ok(Err(Done::Removed)),
                    Err(error) => return Err(error.into()),
                };
                match rustix::fs::readlinkat(&parent, file_name(path), Vec::new()) {
                    Ok(found) if found.as_bytes() == &target[..] => (None, What::Symlink { before }),
                    _ => return Ok(Err(changed(path))),
                }
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
                let before = Fingerprint::from(&meta);
                if let Err(reason) = may_leave(row.as_ref(), *blob, meta.is_file().then_some(&before)) {
                    return stays(reason);
                }
                if (meta.mode() & 0o777) as u16 != *mode {
                    return stays("its mode changed since it was copied");
                }
                if is_open_for_writing(&open) == Some(true) {
                    return stays(WRITTEN);
                }
                let read = tree::blob_id(&open, before.size);
                if !is_unchanged(Some(before), &Fingerprint::from(&open.metadata()?), &open)? {
                    return Ok(Err(changed(path)));
                }
                if attributes.is_some_and(|digest| digest != self.inner.keep_attributes.read(&open).digest()) {
                    return stays("its extended attributes changed since it was copied");
                }
                if read? != *blob {
                    self.inner.store.verify_file(&file, &|_| {})?;
                    return stays("its bytes are no longer what they were, though nobody edited it: it is damaged");
                }
                (Some(open), What::File { blob: *blob, before })
            }
            _ => return stays("nothing that can be removed"),
        };
        Ok(Ok(Ready { parent, open, what }))
    }

    /// Renames an entry out of the way, and looks whether it is still what was checked: from now on nobody finds it any more.
    /// Blocks.
    fn set_aside(
        &self,
        arena: HeldArena,
        path: &RelPath,
        ready: Ready,
        alone: Option<OwnedMutexGuard<()>>,
    ) -> Result<Done, Failure> {
        let Ready { parent, open, what } = ready;
        let (moving, name, spot) = (&self.inner.moving, file_name(path), (arena.name.clone(), path.clone()));
        let number = moving.enter(arena.root, path.parent(), |number| aside::make(&parent, number))?;
        let renamed = aside::open(&parent, number).and_then(|dir| {
            aside::set_aside(&parent, name, &dir)?;
            Ok(dir)
        });
        let dir = match renamed {
            Ok(dir) => dir,
            Err(error) => {
                moving.leave(arena.root, path.parent(), |number| aside::unmake(&parent, number));
                return match error.kind() {
                    io::ErrorKind::NotFound => Ok(changed(path)),
                    _ => Err(error.into()),
                };
            }
        };
        let set_aside = |after| SetAside { arena, number, what, after, _alone: alone };
        let after = match see_aside(&dir, path, open.as_ref(), what) {
            Ok(Ok(after)) => after,
            not_so => {
                self.put_back(path, set_aside(None))?;
                return Ok(Done::failed(Why::Changed, not_so?.err().unwrap_or(EDITED)));
            }
        };
        moving.note(spot.clone(), set_aside(Some(after)));
        let prepared = moving.moves().prepared(&spot, number);
        if prepared == Prepared::Unwanted {
            if let Some(set_aside) = moving.take(&spot) {
                self.put_back(path, set_aside)?;
            }
            return Ok(self.refused(&Refusal::NotLeaving, ""));
        }
        Ok(Done::Prepared { aside: number })
    }

    /// Removes an entry that was set aside, or puts it back. Goes to its end, even if nobody waits any more.
    pub(super) async fn finish(
        &self,
        asker: Option<PeerId>,
        arena: &ArenaName,
        order: Finish,
    ) -> Result<Done, Failure> {
        let moving = &self.inner.moving;
        let Finish { number, path, aside, remove } = order;
        let spot = (arena.clone(), path);
        let begun = moving.moves().finish(moving.id(asker, number), &spot, aside, moving.now());
        if let Err(refusal @ Refusal::SetAside) = begun {
            return Ok(self.refused(&refusal, ""));
        }
        if let Err(refusal) = begun {
            // An order that was asked before, of which the answer was lost.
            let (node, near) = (self.clone(), spot.clone());
            let is_gone = blocking(move || node.is_nothing_at(&near)).await?;
            return Ok(if is_gone { Done::Removed } else { self.refused(&refusal, "") });
        }
        let node = self.clone();
        let finished = tokio::spawn(async move { node.end_aside(spot, remove).await }).await;
        finished.unwrap_or_else(|panic| Err(Failure::from(panic)))
    }

    fn is_nothing_at(&self, spot: &Spot) -> Result<bool, Failure> {
        let Ok(arena) = self.held_arena(&spot.0)? else { return Ok(false) };
        Ok(!self.inner.moving.is_aside(spot) && namespace::look(&arena.dir, &spot.1)?.is_none())
    }

    /// Takes the last step of an entry that is set aside, of which that is known.
    async fn end_aside(&self, spot: Spot, remove: bool) -> Result<Done, Failure> {
        let Some(set_aside) = self.inner.moving.take(&spot) else {
            self.inner.moving.moves().ended(&spot);
            return Ok(self.refused(&Refusal::NotLeaving, ""));
        };
        let arena = set_aside.arena.clone();
        let step = Step::Finish { set_aside, remove };
        let ended = self.settle(Last { arena, path: spot.1.clone(), step }).await;
        self.inner.moving.moves().ended(&spot);
        ended
    }

    /// Removes what is set aside, if it is still what it was. Blocks.
    pub(super) fn remove_aside(&self, path: &RelPath, set_aside: SetAside) -> Result<Made, Failure> {
        let (dir, root) = (set_aside.arena.dir.clone(), set_aside.arena.root);
        let parent = parent_beneath(&dir, path)?;
        let removed = aside::open(&parent, set_aside.number).and_then(|dir| unlink(&dir, path, &set_aside));
        let name_left = match removed {
            Ok(Some(name_left)) => name_left,
            Ok(None) => {
                self.put_back(path, set_aside)?;
                return Ok(Made::Nothing(changed(path)));
            }
            Err(error) => {
                self.put_back(path, set_aside)?;
                return match error.kind() {
                    io::ErrorKind::DirectoryNotEmpty => Ok(Made::Nothing(Done::NotEmpty)),
                    _ => Err(error.into()),
                };
            }
        };
        self.inner.moving.leave(root, path.parent(), |number| aside::unmake(&parent, number));
        Ok(match (set_aside.what, name_left) {
            (What::File { blob, before }, Some(after)) => Made::RemovedName { blob, before, after },
            _ => Made::Removed,
        })
    }

    /// Puts back what is set aside; what took its name meanwhile stays. Blocks.
    pub(super) fn put_back(&self, path: &RelPath, set_aside: SetAside) -> Result<Done, Failure> {
        let arena = &set_aside.arena;
        let putting = || {
            let parent = parent_beneath(&arena.dir, path)?;
            let back =
                aside::open(&parent, set_aside.number).and_then(|dir| aside::put_back(&dir, file_name(path), &parent));
            // If it cannot be put back now, the next that looks at the arena does.
            self.inner.moving.leave(arena.root, path.parent(), |number| aside::unmake(&parent, number));
            Ok::<_, io::Error>((parent, back?))
        };
        let (parent, other) = putting().inspect_err(|error| {
            self.inner.moving.leave_behind(Left::new(self.inner.moving.id(None, 0), &arena.dir, Some(path.clone())));
            let path = arena.dir.join(path.as_path());
            error!(?path, reason = tree::reason(error), "it was set aside by a move, and cannot be put back");
        })?;
        if let Some(other) = other {
            let other = path.parent().map_or_else(|| other.clone().try_into(), |above| above.join(&other));
            if let Ok(other) = other {
                warn!(arena = %arena.name, path = %other, "put back under another name, for its own was taken meanwhile");
                let reason = format!("something else took its name meanwhile; it is kept as {other}");
                self.look_again(&arena.name, vec![other]);
                return Ok(Done::failed(Why::Changed, &reason));
            }
        }
        // Its ctime moved, and nobody edited it.
        if let What::File { blob, before } = set_aside.what {
            let after = fingerprint_at(&parent, path)?;
            if !before.drift(&after).is_other_file() {
                self.refresh_names(blob, before, after)?;
            }
        }
        Ok(Done::PutBack)
    }

    /// Puts back what was set aside for moves that are over. Goes to its end, even if nobody waits any more.
    pub(super) async fn put_all_back(&self, standing: Vec<(Spot, u64)>) {
        let node = self.clone();
        let putting = tokio::spawn(async move {
            for (spot, _) in standing {
                let (near, path) = (node.clone(), spot.1.clone());
                let ended = tokio::spawn(async move { near.end_aside(spot, false).await }).await;
                if let Ok(Err(failure)) = ended {
                    error!(%path, reason = failure.reason(), "what a move set aside is not put back");
                }
            }
        });
        if let Err(panic) = putting.await {
            error!(reason = tree::reason(&panic), "what moves set aside is not put back");
        }
    }

    /// Gives up moves of which nothing is heard, until nothing leaves any more.
    async fn give_up_silent_moves(self) {
        loop {
            sleep(SILENCE_LIMIT / 4).await;
            let moving = &self.inner.moving;
            let (standing, ids, is_quiet) = {
                let mut moves = moving.moves();
                let ids = moves.silent(moving.now());
                (moves.expire(moving.now()), ids, moves.is_quiet())
            };
            self.put_all_back(standing).await;
            self.forget_leaving(ids).await;
            if is_quiet {
                moving.end_watching();
                if moving.moves().is_quiet() || !moving.begin_watching() {
                    return;
                }
            }
        }
    }

    async fn forget_leaving(&self, ids: Vec<MoveId>) {
        if ids.is_empty() {
            return;
        }
        let node = self.clone();
        if let Err(failure) = blocking(move || node.inner.moving.forget_leaving(&ids)).await {
            warn!(reason = failure.reason(), "moves that are over are not forgotten");
        }
    }

    /// Ends a move, at its source and at its destination.
    pub(super) async fn end_move(&self, asker: Option<PeerId>, number: u64) -> Result<Done, Failure> {
        let moving = &self.inner.moving;
        let id = moving.id(asker, number);
        let (standing, kept) = {
            let mut moves = moving.moves();
            (moves.end(id), moves.kept_for(id))
        };
        self.put_all_back(standing).await;
        let node = self.clone();
        blocking(move || {
            node.inner.moving.release(&kept)?;
            node.inner.moving.forget_leaving(&[id])
        })
        .await?;
        match moving.moves().is_moving(id) {
            true => Ok(Done::failed(Why::Busy, &format!("at {} something is still removed for it", self.name()))),
            false => Ok(Done::Ready),
        }
    }

    /// Says whether a move that left from here is over, to a machine that keeps something for it.
    pub(super) async fn is_over(&self, id: MoveId) -> Result<Done, Failure> {
        let moving = &self.inner.moving;
        let over = moving.moves().is_over(id, moving.now());
        match over {
            Over::Yes(standing) => {
                self.put_all_back(standing).await;
                self.forget_leaving(vec![id]).await;
                Ok(Done::Ready)
            }
            Over::No => Ok(Done::failed(Why::Busy, &format!("at {} that move is still under way", self.name()))),
        }
    }

    /// Puts back what moves have set aside below an arena root when the program was stopped. Blocks.
    pub(in super::super) fn put_back_left(&self, arena: &ArenaName, dir: &Path) -> Result<(), Failure> {
        if self.inner.moving.left_in(dir).is_empty() {
            return Ok(());
        }
        let _turn = self.inner.moving.restoring();
        let left = self.inner.moving.left_in(dir);
        for tree in &left {
            let mut found = Vec::new();
            if let Some(path) = &tree.path {
                match aside::found_in(dir, path.parent().as_ref()) {
                    Ok(beside) => found.extend(beside),
                    Err(error) if is_gone(&error) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let (passing, passed) = std::sync::mpsc::channel();
            let walk = Walk::new(dir, self.inner.home.own_dirs()).passing(move |path| {
                let _ = passing.send(path);
            });
            let walk = match &tree.path {
                Some(path) => walk.within(path.clone()),
                None => walk,
            };
            if let Some(Err(error @ WalkError::Root { .. })) = walk.last() {
                return Err(error.into());
            }
            found.extend(passed.into_iter().filter(|path| is_leaving_name(file_name(path))));
            for path in found {
                let restored = aside::restore(dir, &path, 0);
                self.look_again(arena, restored);
            }
        }
        if left.is_empty() { Ok(()) } else { self.inner.moving.forget_left(&left) }
    }

    /// Looks after what a walk passes over: files with names for a moment that a crash left behind, and what was set aside by a
    /// move that nobody knows here.
    pub(in super::super) fn pass(&self, arena: &ArenaName, dir: &Path, path: &RelPath) {
        match aside::number(file_name(path)) {
            None => sweep(dir, path),
            Some(number) if self.inner.moving.uses(number) => {}
            Some(_) => self.look_again(arena, aside::restore(dir, path, SWEPT_AFTER_S)),
        }
    }

    /// Puts back everything that is set aside, before the program ends.
    pub(in super::super) async fn stop_moving(&self) {
        let standing = self.inner.moving.moves().end_all();
        self.put_all_back(standing).await;
    }
}

/// How long an entry is waited for that an older move of the same machine puts back.
const PUT_BACK_LIMIT: Duration = Duration::from_secs(5);
const PUT_BACK_POLL: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use std::{fs, future::Future, task::Context};

    use namespace::Arena;
    use tokio::{runtime::Builder, time::timeout};

    use super::*;
    use crate::{home::Home, node::NodeOptions};

    /// Whoever asked for an entry to be set aside goes away before it turns out that it stays: the entry is free again.
    #[test]
    fn an_entry_is_free_after_its_preparation_although_nobody_waits() {
        let temp = tempfile::tempdir().unwrap();
        let docs = temp.path().join("docs");
        fs::create_dir(&docs).unwrap();
        fs::write(docs.join("file"), "edited since").unwrap();
        let home = Home::new(Some(&temp.path().join("home"))).unwrap();
        // On one thread, nothing that was spawned has run when the first poll is over.
        Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let node = Node::open(&home, &NodeOptions { deaf: true, ..NodeOptions::default() }).unwrap();
            let name: ArenaName = "docs".parse().unwrap();
            let arena = Arena { name: name.clone(), dir: Some(docs), public: false, root: None };
            let (reporter, _events) = crate::event::Reporter::new();
            node.add_arena(arena, &reporter).await.unwrap();
            let left = node.leave(None, &name, Leave { number: 1, path: None }).await.unwrap();
            assert!(matches!(left, Done::Ready), "{left:?}");
            let path: RelPath = b"file".to_vec().try_into().unwrap();
            let content = Content::File { blob: BlobId::of(b"as it was"), size: 9, mode: 0o644 };
            let order = Prepare { number: 1, path: path.clone(), content, attributes: None };
            let spot = (name.clone(), path);
            {
                let mut asking = Box::pin(node.prepare(None, &name, order));
                let polled = asking.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop()));
                assert!(polled.is_pending(), "{polled:?}");
                assert!(node.inner.moving.is_aside(&spot));
            }
            let is_free = async {
                while node.inner.moving.is_aside(&spot) {
                    tokio::task::yield_now().await;
                }
            };
            timeout(Duration::from_secs(20), is_free).await.expect("it is free again");
            node.shutdown().await;
        });
    }
}
