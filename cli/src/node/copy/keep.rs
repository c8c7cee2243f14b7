//! The destination's part in a move: trees are kept until the move has ended, and what is there is looked at once more when the
//! source has set its own aside. Rules: spec/copy.md, "Moves".

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    time::Duration,
};

use blobstore::{FileRef, fs_type::is_remote};
use namespace::{ArenaName, Content, PeerId};
use peers::{Confirm, Done, MoveId, Order, Pledge, Task, Why};
use rustix::{
    fs::{AtFlags, Mode, OFlags, StatxAttributes, StatxFlags},
    io::Errno,
};
use tokio::time::timeout;
use tracing::info;
use tree::Fingerprint;

use super::{
    super::{Node, blocking},
    aside,
    held::HeldArena,
    moves::{Kept, Refusal, Spot, Tree},
    place::{file_name, is_gone, parent_beneath},
};
use crate::failure::Failure;

impl Node {
    /// Keeps a tree for a move, durably.
    pub(super) async fn keep(&self, asker: Option<PeerId>, arena: &ArenaName, order: Pledge) -> Result<Done, Failure> {
        let arena = match self.hold(arena).await? {
            Ok(arena) => arena,
            Err(done) => return Ok(done),
        };
        let moving = &self.inner.moving;
        let Pledge { number, path, source, source_arena } = order;
        let me = self.inner.peers.me();
        let source = source.or(asker).unwrap_or(me);
        if source == me {
            return Ok(Done::failed(Why::Refused, "both ends of the move are this machine"));
        }
        let kept = Kept { id: moving.id(asker, number), tree: Tree { arena: arena.name, path }, source, source_arena };
        let is_new = moving.moves().keep(&kept);
        match is_new {
            Ok(false) => return Ok(Done::Ready),
            Err(refusal) => return Ok(self.refused(&refusal, "")),
            Ok(true) => {}
        }
        let (node, row) = (self.clone(), kept.clone());
        if let Err(failure) = blocking(move || node.inner.moving.write_kept(&row)).await {
            moving.moves().release(&kept);
            return Err(failure);
        }
        // What was about to replace something in the tree has done so before the move is answered for.
        drop(self.inner.settling_turn.lock().await);
        Ok(Done::Ready)
    }

    /// Whether something may be put at a path now, in place of something else if it `replaces` that. If a move that has not
    /// ended is in the way, its source is asked about it.
    pub(super) async fn may_place(&self, spot: &Spot, replaces: bool, part_of: Option<MoveId>) -> Result<(), Done> {
        loop {
            let may = self.inner.moving.moves().may_place(spot, replaces, part_of);
            match may {
                Ok(()) => return Ok(()),
                Err(Refusal::Kept(kept)) => {
                    if let Err(why) = self.lift(&kept).await {
                        return Err(self.refused(&Refusal::Kept(kept), &why));
                    }
                }
                Err(refusal) => return Err(self.refused(&refusal, "")),
            }
        }
    }

    /// Keeps a tree no more, if the move's source says that the move is over, or is no peer any more. Otherwise, says why not.
    pub(super) async fn lift(&self, kept: &Kept) -> Result<(), String> {
        if self.inner.peers.roster().get(kept.source).is_some() {
            let order = Order { arena: kept.source_arena.clone(), task: Task::IsOver(kept.id) };
            let asking = async {
                let stream = self.inner.peers.orders(kept.source).await?;
                stream.ask(order, |_| {}).await
            };
            match timeout(ASK_LIMIT, asking).await {
                Ok(Ok(Done::Ready)) => {}
                Ok(Ok(Done::Failed { reason, .. })) => return Err(reason),
                Ok(Ok(_)) => return Err("it answers something else than it was asked".into()),
                Ok(Err(error)) => return Err(tree::reason(&error)),
                Err(_) => return Err(format!("it does not answer within {} s", ASK_LIMIT.as_secs())),
            }
        }
        let peer = self.peer_name(Some(kept.source));
        info!(arena = %kept.tree.arena, peer, "a move that came in is over, as its source says");
        let (node, kept) = (self.clone(), kept.clone());
        blocking(move || node.inner.moving.release(&[kept])).await.map_err(|failure| failure.reason())
    }

    /// Says that what was placed is still there, and another one than what the source has set aside.
    pub(super) async fn confirm(
        &self,
        asker: Option<PeerId>,
        arena: &ArenaName,
        order: Confirm,
    ) -> Result<Done, Failure> {
        let id = self.inner.moving.id(asker, order.number);
        let spot = (arena.clone(), order.path.clone());
        if let Err(refusal) = self.inner.moving.moves().confirm(id, &spot) {
            return Ok(self.refused(&refusal, ""));
        }
        let (node, arena) = (self.clone(), arena.clone());
        blocking(move || {
            let arena = match node.held_arena(&arena)? {
                Ok(arena) => arena,
                Err(done) => return Ok(done),
            };
            if let Some(offline) = arena.offline(&order.path) {
                return Ok(offline);
            }
            Ok(match node.is_still_there(&arena, &order)? {
                Ok(()) => Done::Confirmed,
                Err(reason) => Done::failed(Why::Changed, reason),
            })
        })
        .await
    }

    fn is_still_there(&self, arena: &HeldArena, order: &Confirm) -> Result<Result<(), &'static str>, Failure> {
        let Confirm { path, content, aside, .. } = order;
        let parent = match parent_beneath(&arena.dir, path) {
            Ok(parent) => parent,
            Err(error) if is_gone(&error) => return Ok(Err(GONE)),
            Err(error) => return Err(error.into()),
        };
        if aside::is_in(&parent, *aside)? {
            return Ok(Err(SAME_FILE));
        }
        let open = |flags| match rustix::fs::openat(&parent, file_name(path), flags, Mode::empty()) {
            Ok(open) => Ok(Ok(open)),
            // It went when the source set its own aside.
            Err(Errno::NOENT) => Ok(Err(SAME_FILE)),
            Err(Errno::LOOP | Errno::NOTDIR) => Ok(Err(GONE)),
            Err(error) => Err(io::Error::from(error)),
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match content {
            Content::Directory { .. } => Ok(open(flags | OFlags::DIRECTORY)?.map(drop)),
            Content::Symlink { target } => match rustix::fs::readlinkat(&parent, file_name(path), Vec::new()) {
                Ok(found) if found.as_bytes() == &target[..] => Ok(Ok(())),
                Err(Errno::NOENT) => Ok(Err(SAME_FILE)),
                _ => Ok(Err(GONE)),
            },
            Content::File { blob, .. } => {
                // Opened, so that a file system of the network asks its server.
                let file = match open(flags)? {
                    Ok(file) => file,
                    Err(reason) => return Ok(Err(reason)),
                };
                if is_mount_point(&file)? {
                    return Ok(Err("it is a mount point: whether it is the source's own file cannot be told"));
                }
                let is_remote = is_remote(&file)?;
                let meta = File::from(file).metadata()?;
                let now = Fingerprint::from(&meta);
                let row = self.inner.store.file(&FileRef { root: arena.root, path: path.as_bytes().to_owned() })?;
                let is_sound = row.is_some_and(|row| {
                    row.blob == *blob
                        && row.damaged.is_empty()
                        && !row.is_suspect()
                        && is_same(&row.fingerprint, &now, is_remote)
                });
                Ok(if meta.is_file() && meta.nlink() > 0 && is_sound { Ok(()) } else { Err(GONE) })
            }
            _ => Ok(Err(GONE)),
        }
    }

    /// What an order comes to that is refused because of a move; `why` is what its source says of it.
    pub(super) fn refused(&self, refusal: &Refusal, why: &str) -> Done {
        let shown = |tree: &Tree| match &tree.path {
            Some(path) => format!("{}/{path}", tree.arena),
            None => tree.arena.to_string(),
        };
        let here = self.name();
        let reason = match refusal {
            Refusal::Leaving(tree) => {
                format!(
                    "{} is being moved away from {here}: nothing is put there until that move has ended",
                    shown(tree)
                )
            }
            Refusal::Kept(kept) => {
                let source = self.peer_name(Some(kept.source));
                let asked = if why.is_empty() { String::new() } else { format!("; {source} was asked: {why}") };
                format!(
                    "{} at {here} is kept for a move from {source} that has not ended{asked}; it ends once {source} says so, \
                     or is no peer any more (blob peer rm {source})",
                    shown(&kept.tree)
                )
            }
            Refusal::SetAside => "another move is just removing it".to_owned(),
            Refusal::NotLeaving => format!("{here} has given the move up meanwhile, and what was set aside is back"),
            Refusal::NotKept => format!("{here} does not keep it for this move any more"),
            Refusal::TooMany => format!("too many moves are under way at {here}"),
        };
        Done::failed(refusal.why(), &reason)
    }
}

/// Whether a file is the one that was linked. File systems of the network invent inodes, and lose them.
fn is_same(linked: &Fingerprint, now: &Fingerprint, is_remote: bool) -> bool {
    match is_remote {
        true => (linked.size, linked.mtime) == (now.size, now.mtime),
        false => !linked.drift(now).is_other_file(),
    }
}

/// Whether a file is mounted by itself: then it stays although its name elsewhere goes.
fn is_mount_point(file: &OwnedFd) -> io::Result<bool> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

const SAME_FILE: &str = "it is the very file that the destination has: both machines see the same directory";
const GONE: &str = "what the destination has is not there any more, or is not what it was";
/// How long the source of a move is waited for.
const ASK_LIMIT: Duration = Duration::from_secs(10);
