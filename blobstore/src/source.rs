use std::io;

use tracing::{debug, warn};
use tree::{
    BlobId, ByteRange, Drift, Geometry, Grain, ProveError, Prover, Query, RangeSet, ReadAt, Verified, VerifiedData,
};

use crate::{
    Access, DiskFile, FileRef, Store, StoreError,
    outboard::{Outboard, Pairs},
    rows::FileRow,
    store::MAX_PLACES,
};

/// One place on this machine that has bytes of a blob, open for reading.
pub struct Source {
    blob: BlobId,
    size: u64,
    available: RangeSet,
    data: Data,
    outboard: Outboard,
}

/// Where the bytes are.
enum Data {
    /// Nowhere: the empty blob needs none.
    Nothing,
    InPlace(FileRef, FileRow, Box<dyn DiskFile>),
    Cached(Box<dyn DiskFile>),
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

    pub(crate) fn is_cached(&self) -> bool {
        matches!(self.data, Data::Cached(_))
    }

    /// Reads, with proofs, what `query` asks for. Errors are for [`Store::report`].
    pub fn prover(&self, query: &Query) -> Prover<impl ReadAt + '_, impl ReadAt + '_> {
        let Outboard { pairs, grain } = &self.outboard;
        Prover::new(self.blob, self.size, &self.data, pairs, query).with_grain(*grain)
    }
}

impl Store {
    /// The places that have bytes of `blob`, in place before cached; none if there are none.
    ///
    /// Files that are gone, or edited since they were indexed, are passed over.
    pub fn sources(&self, blob: BlobId) -> Result<Vec<Source>, StoreError> {
        if blob == BlobId::EMPTY {
            let outboard = Outboard { pairs: Pairs::Memory(Vec::new()), grain: Grain::GROUP };
            return Ok(vec![Source { blob, size: 0, available: RangeSet::new(), data: Data::Nothing, outboard }]);
        }
        let mut sources = Vec::new();
        for file in self.holders(blob, MAX_PLACES)? {
            let Some(row) = self.file(&file)?.filter(|row| row.blob == blob) else { continue };
            match self.open_in_place(&file, &row) {
                Ok(data) => sources.push(self.in_place_source(file, row, data)?),
                Err(error) => debug!(path = ?self.absolute(&file), %error, "passed over"),
            }
        }
        if let Some(row) = self.cached_row(blob)? {
            let open = |path| self.inner.disk.open(path, Access::Read);
            let (data, outboard) = (self.cache_file(blob), self.cache_outboard_file(blob));
            match open(&data).and_then(|data| Ok((data, open(&outboard)?))) {
                Ok((data, outboard)) => sources.push(Source {
                    blob,
                    size: row.size,
                    available: row.proven,
                    data: Data::Cached(data),
                    outboard: Outboard { pairs: Pairs::File(outboard), grain: Grain::GROUP },
                }),
                Err(error) => warn!(%blob, %error, "a cached blob cannot be opened"),
            }
        }
        Ok(sources)
    }

    /// Reads `range` of `blob`, whose size is `size`, from wherever it is sound. What does not prove in one
    /// place is put under quarantine there and looked for in the next.
    ///
    /// Holds all of the range in memory.
    pub fn read(&self, blob: BlobId, size: u64, range: ByteRange) -> Result<ReadOutcome, StoreError> {
        let mut missing = RangeSet::from(Geometry::new(size).round_out(range));
        let mut pieces = Vec::new();
        if missing.is_empty() {
            return Ok(ReadOutcome { pieces, missing });
        }
        for source in self.sources(blob)?.iter().filter(|source| source.size == size) {
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
            if missing.is_empty() {
                break;
            }
        }
        pieces.retain(|piece| !piece.bytes().is_empty());
        pieces.sort_by_key(VerifiedData::offset);
        Ok(ReadOutcome { pieces, missing })
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
                if row.fingerprint.drift(&now) == Drift::Edited {
                    return Ok(());
                }
                warn!(path = ?self.absolute(file), blob = %source.blob, %error, "damage found");
                match error {
                    // The bytes may be sound; verify tells, and makes the outboard anew.
                    ProveError::Outboard { .. } => Ok(()),
                    _ => self.quarantine(file, source.blob, range),
                }
            }
            Data::Cached(_) => {
                warn!(blob = %source.blob, %error, "damage found in the cache");
                self.forget_cached(source.blob, &RangeSet::from(Geometry::new(source.size).round_out(range)))
            }
        }
    }

    /// Opens a file in place, if it is still what `row` says.
    pub(crate) fn open_in_place(&self, file: &FileRef, row: &FileRow) -> io::Result<Box<dyn DiskFile>> {
        let data = self.inner.disk.open_beneath(&self.root_dir(file.root), file.relative(), Access::Read)?;
        match row.fingerprint.drift(&data.fingerprint()?) {
            Drift::Edited => Err(io::Error::other("changed since it was indexed")),
            Drift::None | Drift::Touched => Ok(data),
        }
    }

    fn in_place_source(&self, file: FileRef, row: FileRow, data: Box<dyn DiskFile>) -> Result<Source, StoreError> {
        let size = row.fingerprint.size;
        Ok(Source {
            blob: row.blob,
            size,
            available: RangeSet::from(Geometry::new(size).all()).difference(&row.damaged),
            outboard: self.outboard(row.blob, size)?,
            data: Data::InPlace(file, row, data),
        })
    }
}

impl ReadAt for Data {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Nothing => [].read_exact_at(buf, offset),
            Self::InPlace(_, _, data) | Self::Cached(data) => data.read_exact_at(buf, offset),
        }
    }
}
