//! Small files that are to be placed in arenas: those that wait are made ready many at a time, so that what each would
//! cost by itself, in threads, look-ups and round trips, is shared by all. Rules: spec/copy.md, "Small files".

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use blobstore::Fetched;
use bytes::Bytes;
use namespace::{ArenaName, Content, PeerId};
use peers::{Class, Done, MoveId, Place, SMALL_BYTES_MAX};
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, oneshot};
use tree::{BlobId, Fingerprint, Geometry};

use super::{
    super::{Node, blocking},
    arrive::{Arrived, stage},
    held::HeldArena,
    obey::Found,
    settle::{Last, Room, Step, lost},
};
use crate::failure::Failure;

/// Small changes, of which many are under way.
pub(in super::super) struct Gathering {
    /// For those that wait, are made ready, or wait for their last steps.
    turns: Semaphore,
    /// Files that wait to be made ready together.
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// How many bundles are being made ready.
    bundles: usize,
}

/// A file, and who waits for what becomes of it.
struct Waiting {
    small: Small,
    telling: oneshot::Sender<Became>,
}

/// A small file that is to be placed.
struct Small {
    arena: ArenaName,
    order: Place,
    blob: BlobId,
    size: u64,
    mode: u16,
    /// Who has it, whatever catalogs say.
    holder: Option<PeerId>,
    /// The move that it is part of.
    part_of: Option<MoveId>,
    /// Counts the bytes that came.
    bytes: Arc<AtomicU64>,
}

/// What became of a file in its bundle.
enum Became {
    /// That was all.
    Ended(Result<Done, Failure>),
    /// It waits for its last steps.
    Ready(HeldArena, oneshot::Receiver<Result<Done, Failure>>),
    /// It did not come with the others.
    Left,
}

/// A file for which there is room.
struct Wanted {
    waiting: Waiting,
    arena: HeldArena,
    /// What it takes the place of.
    replaces: Option<Fingerprint>,
    /// Its bytes, and how they came.
    pieces: Option<(Vec<Bytes>, Fetched)>,
}

impl Gathering {
    /// For a process that may have so many files open.
    pub(in super::super) fn new(open_files_max: u64) -> Self {
        let turns = usize::try_from(open_files_max / 4).unwrap_or(usize::MAX).clamp(1, SMALL_AT_ONCE);
        Self { turns: Semaphore::new(turns), queue: Mutex::default() }
    }

    /// A place for a small change, which has up to two files open.
    pub(super) async fn turn(&self) -> Result<SemaphorePermit<'_>, AcquireError> {
        self.turns.acquire().await
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn is_given_up(&self) -> bool {
        self.telling.is_closed()
    }

    /// How much it counts in flight.
    fn weight(&self) -> u64 {
        self.small.size.max(FILE_BYTES_LEAST)
    }

    fn ends(self, ended: Result<Done, Failure>) {
        let _ = self.telling.send(Became::Ended(ended));
    }

    /// What is left to do, once whoever waits has heard of it. `None` if nobody waits any more.
    fn ready(self, arena: HeldArena, step: Step) -> Option<super::settle::Waiting> {
        let (telling, told) = oneshot::channel();
        let last = Last { arena: arena.clone(), path: self.small.order.path, step };
        self.telling.send(Became::Ready(arena, told)).ok().map(|()| (last, telling))
    }
}

impl Node {
    /// Places a small file together with others. `None` if it is to be placed by itself: it is not small, it is to be
    /// another name of a file that is there, or it did not come with the others.
    pub(super) async fn place_with_others(
        &self,
        asker: Option<PeerId>,
        arena: &ArenaName,
        order: &Place,
        bytes: &Arc<AtomicU64>,
    ) -> Option<Result<Done, Failure>> {
        let Content::File { blob, size, mode } = order.content else { return None };
        // Another name of a file needs no bytes.
        if size > SMALL_BYTES_MAX || order.link.is_some() {
            return None;
        }
        let _turn = self.inner.gathering.turn().await.ok()?;
        let (telling, told) = oneshot::channel();
        let holder = order.from.or(asker).filter(|&holder| holder != self.inner.peers.me());
        let part_of = order.part_of.map(|number| self.inner.moving.id(asker, number));
        let (arena, order, bytes) = (arena.clone(), order.clone(), bytes.clone());
        let path = order.path.clone();
        self.gather(Waiting { small: Small { arena, order, blob, size, mode, holder, part_of, bytes }, telling });
        match told.await.unwrap_or_else(|_| Became::Ended(Err(lost()))) {
            Became::Ended(ended) => Some(ended),
            Became::Ready(arena, settled) => {
                let settled = settled.await.unwrap_or_else(|_| Err(lost()));
                Some(self.settled_at(arena, path, settled).await)
            }
            Became::Left => None,
        }
    }

    fn gather(&self, waiting: Waiting) {
        let mut queue = self.inner.gathering.queue();
        queue.waiting.push_back(waiting);
        if queue.bundles < BUNDLES_AT_ONCE {
            queue.bundles += 1;
            tokio::spawn(self.clone().make_bundles());
        }
    }

    async fn make_bundles(self) {
        // Others may be just about to be gathered.
        tokio::task::yield_now().await;
        while let Some(bundle) = self.next_bundle() {
            let node = self.clone();
            // By itself: if it fails, those in it hear of that, and the others are made ready all the same.
            let _ = tokio::spawn(async move { node.make_ready(bundle).await }).await;
        }
    }

    /// Those that have waited longest. `None` if nobody waits: then there is a bundle less from now on.
    fn next_bundle(&self) -> Option<Vec<Waiting>> {
        let mut queue = self.inner.gathering.queue();
        queue.waiting.retain(|waiting| !waiting.is_given_up());
        let sizes = queue.waiting.iter().map(Waiting::weight);
        let count = bundle_len(sizes, BUNDLE_BYTES_MAX.min(self.inner.gate.bytes_max()));
        if count == 0 {
            queue.bundles -= 1;
            return None;
        }
        Some(queue.waiting.drain(..count).collect())
    }

    /// Makes files ready but for their last steps, and has these taken.
    async fn make_ready(&self, bundle: Vec<Waiting>) {
        let _pass = self.inner.gate.pass(bundle.iter().map(Waiting::weight).sum()).await;
        let node = self.clone();
        let Ok(mut wanted) = blocking(move || Ok(node.sort_out(bundle))).await else { return };
        wanted.retain(|wanted| !wanted.waiting.is_given_up());
        let absent: Vec<_> = wanted.iter_mut().filter(|wanted| wanted.pieces.is_none()).collect();
        let blobs: Vec<_> =
            absent.iter().map(|wanted| (wanted.waiting.small.blob, wanted.waiting.small.size)).collect();
        let hint = |wanted: &&mut Wanted| {
            let small = &wanted.waiting.small;
            Some(self.inner.peers.hint(small.blob, small.holder?))
        };
        let hints: Vec<_> = absent.iter().filter_map(hint).collect();
        if !blobs.is_empty() {
            let came = self.inner.peers.fetch_together(Class::Copy, &blobs).await;
            for (wanted, came) in absent.into_iter().zip(came) {
                let bytes = |(pieces, fetched): peers::Small| {
                    (pieces.into_iter().map(|piece| piece.bytes().clone()).collect(), fetched)
                };
                wanted.pieces = came.map(bytes);
            }
        }
        drop(hints);
        let node = self.clone();
        let _ = blocking(move || {
            node.stage_all(wanted);
            Ok(())
        })
        .await;
    }

    /// Looks at what is where files are to stand, and whether their bytes are here. Who needs none, hears of it.
    fn sort_out(&self, bundle: Vec<Waiting>) -> Vec<Wanted> {
        let (mut arenas, mut wanted, mut ready) = (HashMap::new(), Vec::new(), Vec::new());
        for waiting in bundle {
            let Small { arena: name, order, blob, size, .. } = &waiting.small;
            let arena = arenas.entry(name.clone()).or_insert_with(|| self.held_arena(name));
            let found = match arena {
                Err(failure) => Err(failure.clone()),
                Ok(Err(done)) => Ok(Found::Done(done.clone())),
                Ok(Ok(arena)) => self.seek(arena, order),
            };
            match (found, arena) {
                // A move may be in the way, which may have to be asked about.
                (Ok(Found::Room(Some(_))), _) if !self.may_replace_now(&waiting.small) => {
                    let _ = waiting.telling.send(Became::Left);
                }
                (Ok(Found::Room(replaces)), Ok(Ok(arena))) => {
                    match self.inner.store.read(*blob, *size, Geometry::new(*size).all()) {
                        Ok(outcome) => {
                            let is_here = outcome.missing.is_empty();
                            let bytes = || outcome.pieces.iter().map(|piece| piece.bytes().clone()).collect();
                            let pieces = is_here.then(|| (bytes(), Fetched::default()));
                            wanted.push(Wanted { waiting, arena: arena.clone(), replaces, pieces });
                        }
                        Err(error) => waiting.ends(Err(error.into())),
                    }
                }
                (Ok(Found::Same(step)), Ok(Ok(arena))) => ready.extend(waiting.ready(arena.clone(), *step)),
                (Ok(Found::Done(done)), _) => waiting.ends(Ok(done)),
                (Err(failure), _) => waiting.ends(Err(failure)),
                (Ok(_), _) => waiting.ends(Err(lost())),
            }
        }
        self.settle_soon(ready);
        wanted
    }

    /// Writes files without names, and has them take their last steps together. Who has no bytes, hears of it.
    fn stage_all(&self, wanted: Vec<Wanted>) {
        let mut ready = Vec::new();
        for Wanted { waiting, arena, replaces, pieces } in wanted {
            let Some((pieces, fetched)) = pieces else {
                let _ = waiting.telling.send(Became::Left);
                continue;
            };
            if waiting.is_given_up() {
                continue;
            }
            match self.stage_one(&waiting.small, &arena, replaces, &pieces, fetched) {
                Ok(step) => ready.extend(waiting.ready(arena, step)),
                Err(failure) => waiting.ends(Err(failure)),
            }
        }
        self.settle_soon(ready);
    }

    /// Whether no move is in the way of a file that takes the place of another.
    fn may_replace_now(&self, small: &Small) -> bool {
        let spot = (small.arena.clone(), small.order.path.clone());
        self.inner.moving.moves().may_place(&spot, true, small.part_of).is_ok()
    }

    fn stage_one(
        &self,
        small: &Small,
        arena: &HeldArena,
        replaces: Option<Fingerprint>,
        pieces: &[Bytes],
        fetched: Fetched,
    ) -> Result<Step, Failure> {
        let Small { order: Place { path, mtime, attributes, .. }, blob, size, mode, bytes, part_of, .. } = small;
        let arrived = Arrived::Staged(stage(&arena.destination, path, pieces, *size)?);
        bytes.fetch_add(*size, Ordering::Relaxed);
        let hashed = arrived.hash(&self.inner.store, *blob, *size)?;
        let received = fetched.bytes_received;
        let traits = self.traits(*mode, *mtime, attributes.clone());
        let room = Room { replaces, part_of: *part_of };
        Ok(Step::File { arrived, hashed, traits, room, received })
    }
}

/// How many of files of these sizes go together: not more than `bytes_max` in all, unless the first is that long by itself.
fn bundle_len(sizes: impl Iterator<Item = u64>, bytes_max: u64) -> usize {
    let mut bytes = 0;
    let fits = |(number, size): &(usize, u64)| {
        bytes += size;
        *number == 0 || bytes <= bytes_max
    };
    sizes.take(BUNDLE_FILES_MAX).enumerate().take_while(fits).count()
}

/// How many small changes wait, are made ready, or wait for their last steps, at most.
const SMALL_AT_ONCE: usize = 768;
/// So many files are made ready together, of so many bytes; so many bundles of them at a time.
const BUNDLE_FILES_MAX: usize = 256;
const BUNDLE_BYTES_MAX: u64 = 8 << 20;
const BUNDLES_AT_ONCE: usize = 2;
/// What a file counts in flight, however short it is.
const FILE_BYTES_LEAST: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_as_long_as_its_bounds() {
        for (sizes, bytes_max, expected) in [
            (vec![], 100, 0),
            (vec![40, 60, 1], 100, 2),
            (vec![40, 61, 1], 100, 1),
            // One alone goes in any case.
            (vec![101, 1], 100, 1),
            (vec![1; 1000], u64::MAX, 256),
        ] {
            assert_eq!(bundle_len(sizes.iter().copied(), bytes_max), expected, "{bytes_max}: {sizes:?}");
        }
    }
}
