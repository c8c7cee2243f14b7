//! Bringing a blob's bytes to where they are to stand: proven, and without a name there yet. Into a directory of the
//! user's and into an arena alike.

use std::{io, sync::Arc};

use blobstore::{FetchError, Fetched, HashedFile, Passage, Presence, Store};
use bytes::Bytes;
use namespace::RelPath;
use peers::Class;
use tokio::sync::OwnedMutexGuard;
use tracing::info;
use tree::{BlobId, ByteRange, Geometry};

use super::{
    super::{
        Node, blocking,
        read::{READ_BYTES_MAX, fetch_failure},
    },
    place::{Destination, Staged},
    sparse,
};
use crate::{
    failure::{Code, Failure},
    target::Target,
};

/// A file whose bytes have all arrived, proven. Dropped, it leaves nothing at its destination; what came stays in the
/// cache, so far as it went there.
pub(super) enum Arrived {
    /// It is at its destination, without a name.
    Staged(Staged),
    /// It is whole in the cache, and goes from there at the last moment: until then it need not be fetched again.
    Cached(Arc<Passing>),
    /// It is at its destination, copied from elsewhere here; what the cache has of it is to be forgotten.
    Copied(Staged, Arc<Passing>),
}

/// A blob that passes through the cache, of which nobody else there takes anything.
pub(super) struct Passing {
    blob: BlobId,
    _alone: OwnedMutexGuard<()>,
    _passage: Passage,
}

impl Node {
    /// Brings a blob's bytes for a file that is to stand at `to` in `destination`. What other versions of the file that is at
    /// one of `near` have of a large one is not fetched. `on_bytes` hears how many more have come.
    pub(super) async fn arrive(
        &self,
        blob: BlobId,
        size: u64,
        destination: &Arc<Destination>,
        to: &RelPath,
        near: Vec<Target>,
        on_bytes: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<(Arrived, Fetched), Failure> {
        if size > SMALL_BYTES_MAX {
            return self.arrive_by_cache(blob, size, destination, to, near, on_bytes).await;
        }
        let (pieces, fetched) = self.read_through_memory(Class::Copy, blob, size, Geometry::new(size).all()).await?;
        let (destination, to) = (destination.clone(), to.clone());
        let staged = blocking(move || Ok(stage(&destination, &to, &pieces, size)?)).await?;
        on_bytes(size);
        Ok((Arrived::Staged(staged), fetched))
    }

    /// By way of the cache, where it goes on after an interruption, unless all of it is here in place.
    async fn arrive_by_cache(
        &self,
        blob: BlobId,
        size: u64,
        destination: &Arc<Destination>,
        to: &RelPath,
        near: Vec<Target>,
        on_bytes: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<(Arrived, Fetched), Failure> {
        // From here on nobody else fetches this blob, or takes it from the cache.
        let _alone = self.inner.peers.alone_with(blob).await;
        let store = self.inner.store.clone();
        let _passage = store.passage(blob);
        let presence = blocking(move || {
            // What was fetched earlier may have lain there for long. What does not prove is forgotten, and fetched anew.
            store.verify_cached(blob, &|_| {})?;
            Ok(store.presence(blob)?)
        });
        let passing = Arc::new(Passing { blob, _alone, _passage });
        if presence.await? == Presence::InPlace {
            // What turns out not to be there comes by way of the cache after all.
            let (staged, fetched) = self.copy_from_here(blob, size, destination, to, on_bytes).await?;
            return Ok((Arrived::Copied(staged, passing), fetched));
        }
        let like = self.like(blob, near).await?;
        // If this is given up, what has come is still being written: until it is, nobody else is to look what there is.
        let (writing, on_bytes) = (passing.clone(), Arc::new(on_bytes));
        let on_brought = {
            let on_bytes = on_bytes.clone();
            move |bytes| {
                let _writing = &writing;
                on_bytes(bytes);
            }
        };
        let fetched = match self.bring(blob, size, &like, on_brought).await {
            // The destination may be on another disk. Ranges that the cache has are read from it.
            Err(FetchError::Sink { source, .. }) if source.is_full() => {
                info!(%blob, size, reason = tree::reason(&source), "fetched straight to where it is to be");
                let copied = self.copy_from_here(blob, size, destination, to, |bytes| on_bytes(bytes)).await?;
                return Ok((Arrived::Copied(copied.0, passing), copied.1));
            }
            brought => brought.map_err(fetch_failure)?,
        };
        let (near, path, cache) = (destination.clone(), to.clone(), self.inner.home.cache.clone());
        // What is pinned stays in the cache.
        let may_take = !self.inner.store.is_pinned(blob);
        if may_take && blocking(move || Ok(near.shares_file_system(&path, &cache)?)).await? {
            return Ok((Arrived::Cached(passing), fetched));
        }
        let (staged, _) = self.copy_from_here(blob, size, destination, to, |_| {}).await?;
        Ok((Arrived::Copied(staged, passing), fetched))
    }

    /// Copies a blob to a staged file, proven: from this machine, and missing ranges from peers.
    async fn copy_from_here(
        &self,
        blob: BlobId,
        size: u64,
        destination: &Arc<Destination>,
        to: &RelPath,
        on_bytes: impl Fn(u64),
    ) -> Result<(Staged, Fetched), Failure> {
        let (near, path) = (destination.clone(), to.clone());
        let staged = Arc::new(blocking(move || Ok(near.stage(&path)?)).await?);
        let (mut written, mut fetched) = (0, Fetched::default());
        while written < size {
            let range = ByteRange::new(written, size.min(written + READ_BYTES_MAX)).unwrap_or_default();
            let (pieces, more) = self.read_alone(blob, size, range).await?;
            fetched.bytes_received += more.bytes_received;
            written += pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
            let staged = staged.clone();
            blocking(move || {
                let mut at = range.start();
                for piece in pieces {
                    sparse::append(staged.file(), &piece, at)?;
                    at += piece.len() as u64;
                }
                Ok(())
            })
            .await?;
            complete(written, range.end())?;
            on_bytes(range.len());
        }
        let staged = Arc::into_inner(staged).ok_or_else(|| io::Error::other("the file is still being written"))?;
        Ok((staged, fetched))
    }
}

impl Arrived {
    /// The hash of the bytes, of which `blob` is known to be the id. Blocks.
    pub(super) fn hash(&self, store: &Store, blob: BlobId, size: u64) -> Result<HashedFile, Failure> {
        let hashed = match self {
            Self::Staged(staged) => store.hash(staged.file(), size)?,
            Self::Cached(passing) => store.hash_cached(passing.blob)?.ok_or_else(gone)?,
            Self::Copied(staged, passing) => match store.hash_cached(passing.blob)? {
                Some(hashed) => hashed,
                None => store.hash(staged.file(), size)?,
            },
        };
        if hashed.id() == blob {
            return Ok(hashed);
        }
        Err(Failure::new(Code::Error, format!("what was written does not read as blob {blob}: is the disk sound?")))
    }

    /// Takes it from the cache, if it is there, so that it can be given its name. Blocks.
    pub(super) fn take(
        self,
        store: &Store,
        destination: &Destination,
        to: &RelPath,
    ) -> Result<(Staged, Leftover), Failure> {
        match self {
            Self::Staged(staged) => Ok((staged, Leftover(None))),
            Self::Cached(passing) => {
                let cached = store.take_cached(passing.blob)?.ok_or_else(gone)?;
                Ok((destination.stage_moved(&cached, to)?, Leftover(None)))
            }
            Self::Copied(staged, passing) => Ok((staged, Leftover(Some(passing)))),
        }
    }
}

/// What is left in the cache of something that has arrived.
pub(super) struct Leftover(Option<Arc<Passing>>);

impl Leftover {
    /// Forgets it. Blocks.
    pub(super) fn forget(self, store: &Store) -> Result<(), Failure> {
        let Some(passing) = self.0.filter(|passing| !store.is_pinned(passing.blob)) else { return Ok(()) };
        Ok(store.discard(passing.blob)?)
    }
}

/// Writes a file of `size` bytes that is to stand at `to`, without a name.
pub(super) fn stage(destination: &Destination, to: &RelPath, pieces: &[Bytes], size: u64) -> io::Result<Staged> {
    let staged = destination.stage(to)?;
    let mut written = 0;
    for piece in pieces {
        sparse::append(staged.file(), piece, written)?;
        written += piece.len() as u64;
    }
    complete(written, size)?;
    Ok(staged)
}

fn gone() -> Failure {
    Failure::new(Code::Error, "it is no longer whole in the cache")
}

fn complete(written: u64, size: u64) -> io::Result<()> {
    if written == size { Ok(()) } else { Err(io::Error::other(format!("{written} of {size} bytes"))) }
}

/// Files at most this long are fetched into memory and written at once.
const SMALL_BYTES_MAX: u64 = 1 << 20;
