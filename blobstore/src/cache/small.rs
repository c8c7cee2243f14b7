//! Many small blobs at a time: one transaction for all that are rows.

use redb::ReadableTable;
use tree::{BlobId, Geometry, Verified};

use super::is_inline;
use crate::{
    Sink, Store, StoreError,
    rows::{CACHED, CachedRow, INLINE, decode_or_none, encode},
};

/// A small blob that has arrived whole.
pub struct SmallBlob {
    /// The blob.
    pub blob: BlobId,
    /// How many bytes it has.
    pub size: u64,
    /// All of it: its bytes, in order, and the nodes above them.
    pub pieces: Vec<Verified>,
}

impl Store {
    /// Puts whole small blobs into the cache, and tells of each whether that was done. Durable on return. Those of at most one
    /// chunk group share a transaction. The caller is alone with all of them.
    pub fn keep_small(&self, blobs: Vec<SmallBlob>) -> Vec<Result<(), StoreError>> {
        let together = self.keep_rows(&blobs);
        let mut kept = Vec::with_capacity(blobs.len());
        for SmallBlob { blob, size, pieces } in blobs {
            // What cannot be a row, or not together with others, is told why by itself.
            kept.push(match together.as_ref().is_ok_and(|rows| rows.contains(&blob)) {
                true => Ok(()),
                false => self.partial(blob, size).and_then(|mut sink| {
                    sink.write(&pieces)?;
                    sink.commit()
                }),
            });
        }
        kept
    }

    /// Makes rows of the blobs that can be and are not there yet. Returns which.
    fn keep_rows(&self, blobs: &[SmallBlob]) -> Result<Vec<BlobId>, StoreError> {
        let rows: Vec<_> = blobs.iter().filter_map(|small| Some((small.blob, whole(small)?))).collect();
        let counting = |(blob, _): &&(BlobId, Vec<u8>)| self.ledger().counts(*blob);
        let (counted, others): (Vec<_>, Vec<_>) = rows.iter().partition(counting);
        for (rows, counts) in [(counted, true), (others, false)] {
            self.make_room(rows.iter().map(|(_, bytes)| bytes.len() as u64).sum(), counts)?;
        }
        let new = self.write("keep small blobs", |txn| {
            let (mut cached, mut inline) = (txn.open_table(CACHED)?, txn.open_table(INLINE)?);
            let mut new = Vec::new();
            for (blob, bytes) in &rows {
                let size = bytes.len() as u64;
                let known = cached.get(blob.as_bytes())?.and_then(|row| decode_or_none::<CachedRow>(row.value()));
                // What is there in part, or with another size, is an exception.
                if known.is_some() {
                    continue;
                }
                let row = CachedRow { size, proven: Geometry::new(size).all().into() };
                cached.insert(blob.as_bytes(), &encode(&row)?[..])?;
                inline.insert(blob.as_bytes(), &bytes[..])?;
                new.push((*blob, size));
            }
            Ok(new)
        })?;
        let mut ledger = self.ledger();
        for &(blob, size) in &new {
            ledger.add(blob, &Geometry::new(size).all().into());
            ledger.set_allocated(blob, size);
        }
        Ok(new.into_iter().map(|(blob, _)| blob).collect())
    }
}

/// The bytes of a blob that can be a row; `None` if some are missing.
fn whole(small: &SmallBlob) -> Option<Vec<u8>> {
    if !is_inline(small.size) {
        return None;
    }
    let mut bytes = Vec::with_capacity(small.size as usize);
    for piece in &small.pieces {
        let Verified::Data(data) = piece else { continue };
        if data.blob() != small.blob || data.offset() != bytes.len() as u64 {
            return None;
        }
        bytes.extend_from_slice(data.bytes());
    }
    (bytes.len() as u64 == small.size && small.size > 0).then_some(bytes)
}
