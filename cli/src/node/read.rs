use std::sync::{Arc, Mutex, PoisonError};

use blobstore::{Collected, FetchError, Fetched, StoreError, Want};
use bytes::Bytes;
use peers::Class;
use tree::{BlobId, ByteRange, Geometry, RangeSet, VerifiedData};

use super::{Node, blocking};
use crate::failure::{Code, Failure, WhileDoing};

/// The most bytes that one read gives.
pub(crate) const READ_BYTES_MAX: u64 = 8 << 20;

impl Node {
    /// Reads `range` of `blob`, which has `size` bytes: from this machine, or else through the cache from whoever has
    /// it. Gives the proven pieces, in order; all of them, or fails. `range` has at most 8 MiB.
    pub async fn read(&self, blob: BlobId, size: u64, range: ByteRange) -> Result<Vec<Bytes>, Failure> {
        let what = || format!("read bytes {range} of blob {blob}");
        if range.len() > READ_BYTES_MAX {
            return Err(
                Failure::new(Code::Limit, format!("at most {READ_BYTES_MAX} bytes at once")).while_doing(what())
            );
        }
        // What is brought for this read is there until it has been read.
        let store = self.inner.store.clone();
        let _lease = blocking(move || Ok(store.lease(blob, range.into()))).await?;
        let (pieces, missing) = self.read_here(blob, size, range).await.while_doing(what())?;
        if missing.is_empty() {
            return Ok(bytes_of(pieces));
        }
        let _alone = self.inner.peers.alone_with(blob).await;
        Ok(self.bring_and_read(blob, size, range, missing).await.while_doing(what())?.0)
    }

    /// The same for who is alone with the blob, and sees to it that nothing of it is evicted.
    pub(super) async fn read_alone(
        &self,
        blob: BlobId,
        size: u64,
        range: ByteRange,
    ) -> Result<(Vec<Bytes>, Fetched), Failure> {
        let (pieces, missing) = self.read_here(blob, size, range).await?;
        match missing.is_empty() {
            true => Ok((bytes_of(pieces), Fetched::default())),
            false => self.bring_and_read(blob, size, range, missing).await,
        }
    }

    async fn bring_and_read(
        &self,
        blob: BlobId,
        size: u64,
        range: ByteRange,
        missing: RangeSet,
    ) -> Result<(Vec<Bytes>, Fetched), Failure> {
        let brought = self.inner.peers.bring(Class::Foreground, blob, size, missing, |_| {}).await;
        let fetched = match brought {
            Err(FetchError::Sink { source, .. }) if source.is_full() => {
                return self.read_through_memory(Class::Foreground, blob, size, range).await;
            }
            brought => brought.map_err(fetch_failure)?,
        };
        let (pieces, missing) = self.read_here(blob, size, range).await?;
        match missing.iter().next() {
            None => Ok((bytes_of(pieces), fetched)),
            Some(lost) => Err(Failure::new(Code::Error, format!("bytes {lost} were fetched, and do not prove"))),
        }
    }

    /// Reads `range` without the cache. The range must be small enough for memory.
    pub(super) async fn read_through_memory(
        &self,
        class: Class,
        blob: BlobId,
        size: u64,
        range: ByteRange,
    ) -> Result<(Vec<Bytes>, Fetched), Failure> {
        let (mut pieces, missing) = self.read_here(blob, size, range).await?;
        if missing.is_empty() {
            return Ok((bytes_of(pieces), Fetched::default()));
        }
        // With the last chunk group, the size is proven too.
        let geometry = Geometry::new(size);
        let ranges = geometry.round_out_all(&missing).union(&geometry.last_group().into());
        let collected = Arc::new(Mutex::new(Collected::default()));
        let want = Want { blob, size, ranges };
        let fetched = self.inner.peers.fetch_as(class, want, collected.clone()).await.map_err(fetch_failure)?;
        let fetched_pieces = std::mem::take(&mut collected.lock().unwrap_or_else(PoisonError::into_inner).pieces);
        let is_missing = |piece: VerifiedData| missing.iter().map(move |range| piece.slice(range));
        pieces.extend(fetched_pieces.into_iter().flat_map(is_missing));
        pieces.sort_by_key(VerifiedData::offset);
        // Peers may have sent some pieces twice.
        let (mut bytes, mut end) = (Vec::new(), range.start());
        for piece in pieces {
            let piece = piece.slice(ByteRange::new(end, range.end()).unwrap_or_default());
            if piece.offset() == end && !piece.bytes().is_empty() {
                end = piece.range().end();
                bytes.push(piece.bytes().clone());
            }
        }
        if end != range.end() {
            return Err(Failure::new(Code::Error, format!("no peer sent the byte at {end}")));
        }
        Ok((bytes, fetched))
    }

    /// Brings all of a blob into the cache: what blobs that are [`like`](Self::like) it have of it here, and the rest from
    /// whoever has it. `on_bytes` hears how many more bytes came. The caller is alone with the blob.
    pub(super) async fn bring(
        &self,
        blob: BlobId,
        size: u64,
        like: &[BlobId],
        on_bytes: impl Fn(u64) + Send + 'static,
    ) -> Result<Fetched, FetchError> {
        let all = RangeSet::from(Geometry::new(size).all());
        self.inner.peers.bring_like(Class::Copy, blob, size, all, like, on_bytes).await
    }

    async fn read_here(
        &self,
        blob: BlobId,
        size: u64,
        range: ByteRange,
    ) -> Result<(Vec<VerifiedData>, RangeSet), Failure> {
        let store = self.inner.store.clone();
        blocking(move || {
            let outcome = store.read(blob, size, range)?;
            Ok((outcome.pieces, outcome.missing))
        })
        .await
    }
}

/// A failed fetch: unreachable, unless it was this machine that failed. Each peer that was asked is a cause,
/// by name.
pub(super) fn fetch_failure(error: FetchError) -> Failure {
    let code = match error {
        FetchError::AllFailed { blob, mut tried, .. } => {
            tried.sort();
            let failure = Failure::new(Code::Unreachable, format!("fetch blob {blob}: no peer gave all of it"));
            return Failure { abreast: tried.len(), causes: tried, ..failure };
        }
        FetchError::Sink { source: StoreError::CacheFull { .. }, .. } => {
            return Failure::from(error).code(Code::Limit).hint("see [cache] in config.toml, and blob status");
        }
        FetchError::Sink { source: StoreError::HomeFull { .. }, .. } => Code::Limit,
        FetchError::NoPeerHasIt { .. } => Code::Unreachable,
        FetchError::Sink { .. } => Code::Error,
    };
    Failure::from(error).code(code)
}

fn bytes_of(pieces: Vec<VerifiedData>) -> Vec<Bytes> {
    pieces.into_iter().map(|piece| piece.bytes().clone()).collect()
}
