use std::{io, path::PathBuf};

use tracing::{debug, warn};
use tree::{
    BlobId, ByteRange, Geometry, Grain, PartialTree, ProveError, Prover, Query, RangeSet, ReadAt, Verified,
    VerifiedData,
};

use crate::{
    Access, DiskFile, FileRef, Lease, Store, StoreError,
    cache::is_inline,
    outboard::{Outboard, Pairs},
    rows::FileRow,
    store::MAX_PLACES,
};

/// One place on this machine that has bytes of a blob, open for reading.
pub struct Source {
    store: Store,
    blob: BlobId,
    size: u64,
    available: RangeSet,
    data: Data,
    outboard: Outboard,
}

/// Where the bytes are.
pub(crate) enum Data {
    /// Nowhere: the empty blob needs none.
    Nothing,
    InPlace(FileRef, Box<FileRow>, Box<dyn DiskFile>),
    /// And when something of it was last evicted.
    Cached(Cached, Option<u64>),
}

pub(crate) enum Cached {
    Row(Vec<u8>),
    File(Box<dyn DiskFile>),
}

/// Proven pieces of a query, and errors where there are none: see [`Source::prover`].
pub struct Proving<'a> {
    prover: Prover<&'a Data, &'a Pairs>,
    _lease: Option<Lease>,
}

impl Iterator for Proving<'_> {
    type Item = Result<Verified, ProveError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.prover.next()
    }
}

/// What a read found.
#[derive(Debug)]
pub struct ReadOutcome {
    /// Proven bytes, ascending, cut to what was asked for.
    pub pieces: Vec<VerifiedData>,
    /// What is not here, or is damaged here: whole chunk groups.
    pub missing: RangeSet,
}

impl Source {
    /// The blob's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bytes that this place has, known damage left out.
    pub fn available(&self) -> &RangeSet {
        &self.available
    }

    /// The blob whose bytes these are.
    pub fn blob(&self) -> BlobId {
        self.blob
    }

    /// The bytes as they are, unproven.
    pub(crate) fn into_data(self) -> Data {
        self.data
    }

    pub(crate) fn is_cached(&self) -> bool {
        matches!(self.data, Data::Cached(..))
    }

    /// Reads, with proofs, what `query` asks for. Errors are for [`Store::report`]. What is cached is not evicted
    /// meanwhile.
    pub fn prover(&self, query: &Query) -> Proving<'_> {
        let lease = self.is_cached().then(|| {
            let ranges = query.resolve_bytes(self.size);
            self.store.ledger().touch(self.blob, &ranges);
            self.store.lease(self.blob, ranges)
        });
        Proving { prover: self.prove(query), _lease: lease }
    }

    /// The same, where that is no use of the blob, and who calls sees to it that nothing is evicted.
    pub(crate) fn prove(&self, query: &Query) -> Prover<&Data, &Pairs> {
        let Outboard { pairs, grain } = &self.outboard;
        Prover::new(self.blob, self.size, &self.data, pairs, query).with_grain(*grain)
    }

    /// Whether all of `range` is here, so far as is known.
    pub fn has(&self, range: ByteRange) -> bool {
        self.available.contains(Geometry::new(self.size).round_out(range))
    }

    /// Reads `range` if all of it, and its proof down to chunk groups, are here and in memory: without waiting for the disk, or
    /// for anybody. `None` says nothing about why not.
    pub fn read_ready(&self, range: ByteRange) -> Option<Vec<VerifiedData>> {
        let Outboard { pairs, grain: Grain::GROUP } = &self.outboard else { return None };
        if !self.has(range) {
            return None;
        }
        let groups = Geometry::new(self.size).round_out(range);
        let query = Query::groups(&RangeSet::from(groups));
        // A lease would wait for an eviction. What is evicted meanwhile does not prove.
        if self.is_cached() {
            self.store.ledger().touch(self.blob, &query.resolve_bytes(self.size));
        }
        let mut pieces = Vec::new();
        let prover = Prover::new(self.blob, self.size, Ready(&self.data), Ready(pairs), &query);
        for item in prover {
            if let Verified::Data(piece) = item.ok()? {
                pieces.push(piece.slice(range));
            }
        }
        Some(pieces)
    }
}

impl Store {
    /// The places that have bytes of `blob`, in place before cached; none if there are none.
    ///
    /// Files that are gone, or edited since they were indexed, are passed over.
    pub fn sources(&self, blob: BlobId) -> Result<Vec<Source>, StoreError> {
        let store = self.clone();
        if blob == BlobId::EMPTY {
            let outboard = Outboard { pairs: Pairs::Memory(Vec::new()), grain: Grain::GROUP };
            let available = RangeSet::new();
            return Ok(vec![Source { store, blob, size: 0, available, data: Data::Nothing, outboard }]);
        }
        let mut sources = Vec::new();
        for file in self.holders(blob, MAX_PLACES)? {
            let Some(row) = self.file(&file)?.filter(|row| row.blob == blob) else { continue };
            if self.is_passed_over(file.root) {
                continue;
            }
            match self.open_in_place(&file, &row) {
                Ok(data) => sources.push(self.in_place_source(file, row, data)?),
                Err(error) => {
                    debug!(path = %self.absolute(&file).display(), reason = tree::reason(&error), "passed over")
                }
            }
        }
        // Asked before the row, so that no eviction in between is missed.
        let evictions = self.ledger().evictions(blob);
        if let Some(row) = self.cached_row(blob)? {
            match self.open_cached(blob, row.size) {
                Ok((data, pairs)) => sources.push(Source {
                    store,
                    blob,
                    size: row.size,
                    available: row.proven,
                    data: Data::Cached(data, evictions),
                    outboard: Outboard { pairs, grain: Grain::GROUP },
                }),
                Err(error) => warn!(%blob, reason = tree::reason(&error), "a cached blob cannot be opened"),
            }
        }
        Ok(sources)
    }

    fn open_cached(&self, blob: BlobId, size: u64) -> Result<(Cached, Pairs), StoreError> {
        if is_inline(size) {
            let bytes = self.inline_bytes(blob)?.unwrap_or_default();
            return Ok((Cached::Row(bytes), Pairs::Memory(Vec::new())));
        }
        let open = |path: PathBuf| {
            let file = self.inner.disk.open(&path, Access::Read);
            file.map_err(StoreError::file("open", path))
        };
        Ok((Cached::File(open(self.cache_file(blob))?), Pairs::File(open(self.cache_outboard_file(blob))?)))
    }

    /// Reads `range` of `blob`, whose size is `size`, from wherever it is sound. What does not prove in one
    /// place is put under quarantine there and looked for in the next.
    ///
    /// Holds all of the range in memory.
    pub fn read(&self, blob: BlobId, size: u64, range: ByteRange) -> Result<ReadOutcome, StoreError> {
        let is_empty = Geometry::new(size).round_out(range).is_empty();
        let sources = if is_empty { Vec::new() } else { self.sources(blob)? };
        self.read_from(&sources, size, range)
    }

    /// The same from [`sources`](Self::sources) of the blob that were opened earlier. What they give is proven as ever; what
    /// has come here since is not among it, and what has gone may be.
    pub fn read_from(&self, sources: &[Source], size: u64, range: ByteRange) -> Result<ReadOutcome, StoreError> {
        let mut missing = RangeSet::from(Geometry::new(size).round_out(range));
        let mut pieces = Vec::new();
        for source in sources.iter().filter(|source| source.size == size) {
            if missing.is_empty() {
                break;
            }
            let wanted = missing.intersection(&source.available);
            for item in source.prover(&Query::groups(&wanted)) {
                match item {
                    Ok(Verified::Data(piece)) => {
                        missing.remove(piece.range());
                        pieces.push(piece.slice(range));
                    }
                    Ok(Verified::Node(_)) => {}
                    Err(error) => self.report(source, &error)?,
                }
            }
        }
        pieces.retain(|piece| !piece.bytes().is_empty());
        pieces.sort_by_key(VerifiedData::offset);
        Ok(ReadOutcome { pieces, missing })
    }

    /// The pairs at `nodes` of the tree of a blob of `size` bytes, proven, up to the first that nothing here proves. Nodes
    /// have the numbers of their pairs in an outboard down to chunk groups.
    pub fn nodes(&self, blob: BlobId, size: u64, nodes: &[u64]) -> Result<Vec<[u8; 64]>, StoreError> {
        let sources = self.sources(blob)?;
        let sources: Vec<_> = sources.iter().filter(|source| source.size == size).collect();
        let mut tree = PartialTree::new(blob, size);
        let mut prove = |node| {
            sources.iter().find_map(|Source { data, outboard: Outboard { pairs, grain }, .. }| {
                tree.prove_node(node, data, pairs, *grain)
            })
        };
        Ok(nodes.iter().map_while(|&node| prove(node)).collect())
    }

    /// Takes note of what `source` could not prove, so that it is served to nobody. Durable on return.
    ///
    /// What a cached blob has not yet got is no damage; nor is what an edited file no longer has.
    pub fn report(&self, source: &Source, error: &ProveError) -> Result<(), StoreError> {
        let range = error.range();
        if !source.available.overlaps(range) {
            return Ok(());
        }
        match &source.data {
            Data::Nothing => Ok(()),
            Data::InPlace(file, row, data) => {
                let now = data.fingerprint().map_err(StoreError::file("stat", self.absolute(file)))?;
                if !row.may_have_blob(&now) {
                    return Ok(());
                }
                warn!(path = %self.absolute(file).display(), blob = %source.blob, reason = tree::reason(error), "damage found");
                match error {
                    // The bytes may be sound; verify tells, and makes the outboard anew.
                    ProveError::Outboard { .. } => Ok(()),
                    _ => self.quarantine(file, row, now, data.has_own_ctime(), range),
                }
            }
            Data::Cached(_, evictions) => {
                // What was evicted after it was opened is no damage.
                if *evictions != self.ledger().evictions(source.blob)
                    || !self.cached_ranges(source.blob)?.overlaps(range)
                {
                    return Ok(());
                }
                warn!(blob = %source.blob, reason = tree::reason(error), "damage found in the cache");
                self.forget_cached(source.blob, &RangeSet::from(Geometry::new(source.size).round_out(range)))
            }
        }
    }

    /// Opens a file in place, if it is still what `row` says.
    pub(crate) fn open_in_place(&self, file: &FileRef, row: &FileRow) -> io::Result<Box<dyn DiskFile>> {
        let data = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Read)?;
        if row.may_have_blob(&data.fingerprint()?) {
            Ok(data)
        } else {
            Err(io::Error::other("changed since it was indexed"))
        }
    }

    fn in_place_source(&self, file: FileRef, row: FileRow, data: Box<dyn DiskFile>) -> Result<Source, StoreError> {
        let size = row.fingerprint.size;
        Ok(Source {
            store: self.clone(),
            blob: row.blob,
            size,
            available: RangeSet::from(Geometry::new(size).all()).difference(&row.damaged),
            outboard: self.outboard(row.blob, size)?,
            data: Data::InPlace(file, Box::new(row), data),
        })
    }
}

/// Reads what is in memory, and fails where the disk would have to be waited for.
struct Ready<'a, T>(&'a T);

impl ReadAt for Ready<'_, Data> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self.0 {
            Data::InPlace(_, _, data) | Data::Cached(Cached::File(data), _) => data.read_ready_at(buf, offset),
            memory => memory.read_exact_at(buf, offset),
        }
    }
}

impl ReadAt for Ready<'_, Pairs> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self.0 {
            Pairs::File(file) => file.read_ready_at(buf, offset),
            memory => memory.read_exact_at(buf, offset),
        }
    }
}

impl ReadAt for Data {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Nothing => [].read_exact_at(buf, offset),
            Self::InPlace(_, _, data) | Self::Cached(Cached::File(data), _) => data.read_exact_at(buf, offset),
            Self::Cached(Cached::Row(bytes), _) => bytes[..].read_exact_at(buf, offset),
        }
    }
}
