use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::ReadableTable;
use tracing::{debug, info, warn};
use tree::{BlobId, ByteRange, Geometry, PAIR_BYTES, RangeSet, Verified, VerifiedData};

use super::{Lease, is_inline};
use crate::{
    Access, DiskFile, Sink, Store, StoreError,
    error::is_full,
    rows::{CACHED, CachedRow, INLINE, decode_or_none, encode},
};

/// A blob that is coming into the cache.
///
/// Pieces are written where they belong in a sparse file; [`commit`](Sink::commit) syncs them and only then
/// records them as proven. What was not committed when the power went counts as not there. A small blob waits in
/// memory for its row. What was written is not evicted as long as this lives. If somebody takes the blob's file
/// ([`Store::take_cached`]), what comes from then on is dropped: nothing is written to a file that is another's.
pub struct Partial {
    store: Store,
    blob: BlobId,
    geometry: Geometry,
    place: Place,
    /// Chunk groups written whole, and not yet recorded.
    written: RangeSet,
    /// The last of it, which the disk was not asked to begin with.
    unsynced: ByteRange,
    /// Whether the cache has a row of it.
    recorded: bool,
    lease: Lease,
    /// How much more may be written into the room that was made.
    room: u64,
    /// How much of that room counts as taken, until the disk is looked at.
    reserved: u64,
    /// Whether its files were taken from the cache.
    is_taken: Arc<AtomicBool>,
    /// Whether it is not read soon.
    for_later: bool,
}

enum Place {
    Row(Vec<u8>),
    Files {
        data: Box<dyn DiskFile>,
        outboard: Box<dyn DiskFile>,
        /// Whether the files' names are durable.
        named: bool,
    },
}

impl Store {
    /// Opens a place in the cache for `blob`, said to have `size` bytes; what is there already stays.
    ///
    /// If what is there was begun with another claimed size that has not been proven, it is begun anew.
    pub fn partial(&self, blob: BlobId, size: u64) -> Result<Partial, StoreError> {
        let alone = self.inner.cache_files.write().unwrap_or_else(PoisonError::into_inner);
        let geometry = Geometry::new(size);
        let mut row = self.cached_row(blob)?;
        if let Some(other) = row.take_if(|row| row.size != size) {
            if other.size > 0 && other.proven.contains(Geometry::new(other.size).last_group()) {
                return Err(StoreError::ForeignPiece { blob });
            }
            warn!(%blob, was_bytes = other.size, is_bytes = size, "begun anew: peers disagree on the size");
            self.discard_cached(blob)?;
        }
        if row.is_some() && !self.has_cached_bytes(blob, geometry)? {
            warn!(%blob, "begun anew: what the cache had of it is gone");
            self.discard_cached(blob)?;
            row = None;
        }
        let place = if is_inline(size) {
            Place::Row(vec![0; size as usize])
        } else {
            let open = |path: &Path, len: u64| {
                let disk = &self.inner.disk;
                path.parent().map_or(Ok(()), |dir| disk.create_dirs(dir))?;
                let file = disk.open(path, Access::Create)?;
                file.set_len(len)?;
                Ok(file)
            };
            let create = || {
                let (data, outboard) = (self.cache_file(blob), self.cache_outboard_file(blob));
                Ok(Place::Files {
                    data: open(&data, size).map_err(StoreError::file("create", data))?,
                    outboard: open(&outboard, geometry.outboard_bytes())
                        .map_err(StoreError::file("create", outboard))?,
                    named: false,
                })
            };
            match create() {
                Err(error) if row.is_none() => {
                    self.discard_cached(blob)?;
                    return Err(error);
                }
                place => place?,
            }
        };
        let lease = self.lease_now(blob, RangeSet::new());
        let is_taken = self.taken_flag(blob);
        drop(alone);
        let store = self.clone();
        let (written, unsynced, recorded) = (RangeSet::new(), ByteRange::default(), row.is_some());
        let (room, reserved) = (0, 0);
        Ok(Partial {
            store,
            blob,
            geometry,
            place,
            written,
            unsynced,
            recorded,
            lease,
            room,
            reserved,
            is_taken,
            for_later: false,
        })
    }

    /// What tells those who write to a blob's files in the cache that these were taken from it.
    fn taken_flag(&self, blob: BlobId) -> Arc<AtomicBool> {
        let mut flags = self.inner.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flag) = flags.get(&blob).and_then(Weak::upgrade) {
            return flag;
        }
        flags.retain(|_, flag| flag.strong_count() > 0);
        let flag = Arc::default();
        flags.insert(blob, Arc::downgrade(&flag));
        flag
    }

    /// Whether the row's bytes, or both files, of a cached blob are there, and as long as they must be.
    pub(crate) fn has_cached_bytes(&self, blob: BlobId, geometry: Geometry) -> Result<bool, StoreError> {
        if is_inline(geometry.size()) {
            return Ok(self.inline_bytes(blob)?.is_some_and(|bytes| bytes.len() as u64 == geometry.size()));
        }
        let files =
            [(self.cache_file(blob), geometry.size()), (self.cache_outboard_file(blob), geometry.outboard_bytes())];
        Ok(files.iter().all(|(path, bytes)| {
            let file = self.inner.disk.open(path, Access::Read);
            file.and_then(|file| file.fingerprint()).is_ok_and(|fingerprint| fingerprint.size == *bytes)
        }))
    }
}

impl Partial {
    /// Says whether what comes is for later, and not read as soon as it is here. Much of that goes past the page cache.
    pub fn for_later(mut self, is_so: bool) -> Self {
        self.for_later = is_so && self.geometry.size() >= PAST_CACHE_BLOB_BYTES;
        self
    }

    /// Sees to it that `bytes` more may be written.
    fn reserve(&mut self, bytes: u64) -> Result<(), StoreError> {
        if self.room < bytes {
            let more = bytes.max(RESERVE_BYTES.min(self.geometry.size()));
            let counts = self.store.ledger().counts(self.blob);
            self.store.make_room(more, counts)?;
            if counts {
                self.store.ledger().reserve(more);
                self.reserved += more;
            }
            self.room += more;
        }
        self.room -= bytes;
        Ok(())
    }

    /// Writes to the file at `path`, and if the disk is full, evicts and tries once more.
    fn write_or_evict(
        &self,
        bytes: u64,
        path: impl FnOnce() -> PathBuf,
        write: impl Fn(&Place) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        let attempt = || {
            let _writing = self.store.inner.cache_files.read().unwrap_or_else(PoisonError::into_inner);
            if self.is_taken.load(Ordering::Acquire) { Ok(()) } else { write(&self.place) }
        };
        let outcome = match attempt() {
            Err(error) if is_full(&error) => {
                info!(bytes, reason = tree::reason(&error), "evicting: the disk is full");
                self.store.evict(bytes)?;
                attempt()
            }
            outcome => outcome,
        };
        match outcome {
            Err(error) if is_full(&error) => {
                let usage = self.store.cache_usage()?;
                Err(StoreError::CacheFull { free: usage.free, keep_free: usage.keep_free })
            }
            outcome => outcome.map_err(|error| StoreError::file("write", path())(error)),
        }
    }

    /// Writes pieces, at least one, that follow one another.
    fn write_data(&mut self, run: &[&VerifiedData]) -> Result<(), StoreError> {
        let (start, end) = (run[0].offset(), run[run.len() - 1].range().end());
        let past_cache = self.for_later && end - start >= PAST_CACHE_BYTES;
        if let Place::Row(bytes) = &mut self.place {
            for piece in run {
                bytes[piece.offset() as usize..][..piece.bytes().len()].copy_from_slice(piece.bytes());
            }
        }
        let parts = self.parts_to_write(run);
        self.write_or_evict(
            end - start,
            || self.store.cache_file(self.blob),
            |place| match place {
                Place::Row(_) => Ok(()),
                Place::Files { data, .. } => parts.iter().try_for_each(|(offset, parts)| {
                    let mut parts: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
                    if past_cache {
                        data.write_past_cache_at(&mut parts, *offset)
                    } else {
                        data.write_all_vectored_at(&mut parts, *offset)
                    }
                }),
            },
        )?;
        let whole = run.iter().map(|piece| piece.range()).filter(|&range| self.geometry.round_out(range) == range);
        whole.for_each(|range| self.written.insert(range));
        self.begin_sync(start, end);
        Ok(())
    }

    /// Returns what has to be written of pieces that follow one another: parts that do so too, and where the first of them
    /// belongs. Left out are whole blocks of zeros where the file has a hole; where something else is, as rot may be, zeros
    /// are written.
    fn parts_to_write<'a>(&self, run: &[&'a VerifiedData]) -> Vec<(u64, Vec<&'a [u8]>)> {
        let Place::Files { data, .. } = &self.place else { return Vec::new() };
        let mut runs: Vec<(u64, Vec<&[u8]>)> = Vec::new();
        let mut end = None;
        let mut write = |start: u64, bytes: &'a [u8]| {
            match runs.last_mut().filter(|_| end == Some(start)) {
                Some((_, parts)) => parts.push(bytes),
                None => runs.push((start, vec![bytes])),
            }
            end = Some(start + bytes.len() as u64);
        };
        for piece in run {
            let (offset, bytes) = (piece.offset(), &piece.bytes()[..]);
            let mut done = 0;
            for span in tree::data_spans(bytes, offset).chain(std::iter::once(bytes.len()..bytes.len())) {
                let at = |index: usize| offset + index as u64;
                let zeros = ByteRange::new(at(done), at(span.start)).unwrap_or_default();
                if !zeros.is_empty() && !data.is_hole(zeros) {
                    write(zeros.start(), &bytes[done..span.start]);
                }
                if !span.is_empty() {
                    write(at(span.start), &bytes[span.clone()]);
                }
                done = span.end;
            }
        }
        runs
    }

    /// Has the disk begin with what is written in order, so that the next commit waits for the last of it only.
    fn begin_sync(&mut self, start: u64, end: u64) {
        let start = if self.unsynced.end() == start { self.unsynced.start() } else { start };
        self.unsynced = ByteRange::new(start, end).unwrap_or_default();
        if let Place::Files { data, .. } = &self.place
            && self.unsynced.len() >= BEGIN_SYNC_BYTES
        {
            data.begin_sync(self.unsynced);
            self.unsynced = ByteRange::new(end, end).unwrap_or_default();
        }
    }

    /// Gives back the room that was made, for what was written shows on the disk.
    fn account(&mut self) {
        self.store.look_at(self.blob, self.geometry.size());
        self.store.ledger().release_reserved(self.reserved);
        (self.reserved, self.room) = (0, 0);
    }

    /// Records what was written, which is durable by now.
    fn record(&mut self, written: &RangeSet) -> Result<(), StoreError> {
        let (blob, size) = (self.blob, self.geometry.size());
        let fresh = self.store.write("record a part of a cached blob", |txn| {
            let mut cached = txn.open_table(CACHED)?;
            let row = cached.get(blob.as_bytes())?.and_then(|row| decode_or_none::<CachedRow>(row.value()));
            let mut row = row.unwrap_or(CachedRow { size, proven: RangeSet::new() });
            if row.size != size {
                return Ok(RangeSet::new());
            }
            let fresh = written.difference(&row.proven);
            row.proven.extend(fresh.iter());
            cached.insert(blob.as_bytes(), &encode(&row)?[..])?;
            if let Place::Row(bytes) = &self.place {
                txn.open_table(INLINE)?.insert(blob.as_bytes(), &bytes[..])?;
            }
            Ok(fresh)
        })?;
        self.store.ledger().add(blob, &fresh);
        self.recorded = true;
        Ok(())
    }
}

impl Sink for Partial {
    fn write(&mut self, pieces: &[Verified]) -> Result<(), StoreError> {
        let blob = self.blob;
        let is_ours = |piece: &Verified| match piece {
            Verified::Data(data) => data.blob() == blob && data.range().end() <= self.geometry.size(),
            Verified::Node(node) => {
                let end = node.outboard_offset().map_or(0, |offset| offset + PAIR_BYTES);
                node.blob() == blob && end <= self.geometry.outboard_bytes()
            }
        };
        if !pieces.iter().all(is_ours) {
            return Err(StoreError::ForeignPiece { blob });
        }
        let data: Vec<_> = pieces.iter().filter_map(Verified::data).collect();
        let needed = data.iter().flat_map(|piece| tree::data_spans(piece.bytes(), piece.offset()));
        self.reserve(needed.map(|span| span.len() as u64).sum())?;
        // From here on nobody punches a hole there.
        data.iter().for_each(|piece| self.lease.extend(self.geometry.round_out(piece.range())));
        // Pairs first: what is written without them must never be recorded.
        let nodes = pieces.iter().filter_map(|piece| match piece {
            Verified::Node(node) => Some((node.outboard_offset()?, node.pair())),
            Verified::Data(_) => None,
        });
        let nodes: Vec<_> = nodes.collect();
        for run in nodes.chunk_by(|(a, _), (b, _)| a + PAIR_BYTES == *b) {
            let pairs: Vec<u8> = run.iter().flat_map(|(_, pair)| **pair).collect();
            self.write_or_evict(
                pairs.len() as u64,
                || self.store.cache_outboard_file(blob),
                |place| match place {
                    Place::Row(_) => Ok(()),
                    Place::Files { outboard, .. } => outboard.write_all_at(&pairs, run[0].0),
                },
            )?;
        }
        for run in data.chunk_by(|a, b| a.range().end() == b.offset()) {
            self.write_data(run)?;
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        if self.written.is_empty() {
            return Ok(());
        }
        let path = self.store.cache_file(self.blob);
        // Once a sync has failed nobody knows what is on the disk, and the next sync does not say.
        let written = std::mem::take(&mut self.written);
        self.unsynced = ByteRange::default();
        if let Place::Files { data, outboard, named } = &mut self.place {
            if self.is_taken.load(Ordering::Acquire) || !is_named(&self.store, &**data, &path)? {
                debug!(blob = %self.blob, "its files were taken from the cache meanwhile");
                return Ok(());
            }
            data.sync().map_err(StoreError::file("sync", &path))?;
            outboard.sync().map_err(StoreError::file("sync", self.store.cache_outboard_file(self.blob)))?;
            if !*named {
                // The file's own directory and the cache's, in which that one may be new.
                for dir in path.ancestors().skip(1).take(2) {
                    self.store.inner.disk.sync_dir(dir).map_err(StoreError::file("sync", dir))?;
                }
                *named = true;
            }
        }
        self.record(&written)?;
        self.account();
        Ok(())
    }
}

impl Drop for Partial {
    /// What was never recorded, by anybody, is of no use.
    fn drop(&mut self) {
        if !self.recorded {
            let _alone = self.store.inner.cache_files.write().unwrap_or_else(PoisonError::into_inner);
            let discarded = self.store.cached_row(self.blob).and_then(|row| match row {
                None => self.store.discard_cached(self.blob),
                Some(_) => Ok(()),
            });
            if let Err(error) = discarded {
                warn!(blob = %self.blob, reason = tree::reason(&error), "left behind in the cache until the next start");
            }
        }
        self.account();
    }
}

/// Whether the open file `data` is still the one at `path`.
fn is_named(store: &Store, data: &dyn DiskFile, path: &Path) -> Result<bool, StoreError> {
    let ours = data.fingerprint().map_err(StoreError::file("stat", path))?;
    let named = store.inner.disk.open(path, Access::Read).and_then(|file| file.fingerprint());
    Ok(named.is_ok_and(|named| (named.device, named.inode) == (ours.device, ours.inode)))
}

/// So much together is written past the page cache; of blobs of so many bytes.
const PAST_CACHE_BYTES: u64 = 256 << 10;
const PAST_CACHE_BLOB_BYTES: u64 = 64 << 20;
/// So much is written in order before the disk is asked to begin with it.
const BEGIN_SYNC_BYTES: u64 = 8 << 20;
/// How much room is made at a time.
const RESERVE_BYTES: u64 = 4 << 20;
