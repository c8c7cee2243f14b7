use std::{io, sync::atomic::Ordering};

use tracing::debug;
use tree::{
    BlobId, CompareError, Comparison, Grain, PAIR_BYTES, Patchwork, Prover, Query, RangeSet, ReadAt, Span, Verified,
    VerifiedData, hash_into,
};

use crate::{
    Access, DiskFile, Lease, Sink, Source, Store, StoreError,
    outboard::{STAGED_DIR, Staged},
    source::Data,
};

/// What a blob may be, put together from bytes of other blobs that are here: a [`Patchwork`], and its tree.
///
/// Nothing of it is trusted. Calling order: [`wanted`](Self::wanted) names nodes; [`descend`](Self::descend) takes the
/// pairs that the blob's tree has there; and so on, for as long as one likes; then [`copy`](Self::copy), which proves
/// every piece by the blob's id.
pub struct Candidate {
    blob: BlobId,
    size: u64,
    patchwork: Patchwork<Data>,
    /// The patchwork's outboard, with the blob's pairs in it wherever both were compared.
    pairs: Box<dyn DiskFile>,
    comparison: Comparison,
    groups: RangeSet,
    _staged: Staged,
    _leases: Vec<Lease>,
}

impl Store {
    /// What `blob`, said to have `size` bytes, would be with these `spans` of `sources`, ascending and disjoint. Reads all
    /// of it once, and keeps its outboard in a file that goes away with it.
    pub fn candidate(
        &self,
        blob: BlobId,
        size: u64,
        spans: impl IntoIterator<Item = Span>,
        sources: Vec<Source>,
    ) -> Result<Candidate, StoreError> {
        let inner = &self.inner;
        let cached = sources.iter().filter(|source| source.is_cached());
        let leases = cached.map(|source| self.lease(source.blob(), source.available().clone())).collect();
        let sources = sources.into_iter().map(Source::into_data).collect();
        let patchwork = Patchwork::new(size, spans, sources);
        let number = inner.staged.fetch_add(1, Ordering::Relaxed);
        let path = inner.settings.outboards.join(STAGED_DIR).join(format!("{number}"));
        let pairs = inner.disk.open(&path, Access::Create).map_err(StoreError::file("create", &path))?;
        let staged = Staged { disk: inner.disk.clone(), path: path.clone(), grain: Grain::GROUP };
        let id = hash_into(&patchwork, size, Grain::GROUP, &pairs).map_err(StoreError::file("write", path))?;
        let groups = patchwork.whole_groups();
        let comparison = Comparison::within(size, id, blob, groups.clone()).highest_first();
        Ok(Candidate { blob, size, patchwork, pairs, comparison, groups, _staged: staged, _leases: leases })
    }

    /// Copies what is in place here of `ranges` of `blob`, and proves, into `sink`, and commits it. Returns what it
    /// copied: whole chunk groups. What does not prove is put under quarantine.
    pub fn copy_from_places(
        &self,
        blob: BlobId,
        size: u64,
        ranges: &RangeSet,
        sink: &mut dyn Sink,
    ) -> Result<RangeSet, StoreError> {
        let mut copied = RangeSet::new();
        let sources = if ranges.is_empty() { Vec::new() } else { self.sources(blob)? };
        for source in sources.iter().filter(|source| !source.is_cached() && source.size() == size) {
            let wanted = ranges.difference(&copied).intersection(source.available());
            if wanted.is_empty() {
                continue;
            }
            let mut failed = Vec::new();
            let proven =
                source.prover(&Query::groups(&wanted)).filter_map(|item| item.map_err(|e| failed.push(e)).ok());
            copied = copied.union(&copy(proven, sink)?);
            failed.iter().try_for_each(|error| self.report(source, error))?;
        }
        Ok(copied)
    }
}

impl Candidate {
    /// The nodes of the blob's tree to ask for next, at most `max`; none if all is decided.
    pub fn wanted(&self, max: usize) -> Vec<u64> {
        self.comparison.wanted(max)
    }

    /// Takes the pairs that the blob's tree has at the nodes that were wanted, in that order: at all, or at the first
    /// few. The inner error says that they are not the blob's; others may then be tried.
    pub fn descend(&mut self, theirs: &[[u8; 64]]) -> Result<Result<(), CompareError>, StoreError> {
        let nodes = self.comparison.wanted(theirs.len());
        let mut both = Vec::with_capacity(nodes.len());
        for (&node, theirs) in nodes.iter().zip(theirs) {
            let mut ours = [0; 64];
            self.pairs.read_exact_at(&mut ours, node * PAIR_BYTES).map_err(self.scratch("read"))?;
            both.push((ours, *theirs));
        }
        if let Err(error) = self.comparison.descend(&both) {
            return Ok(Err(error));
        }
        for (node, (_, theirs)) in nodes.iter().zip(&both) {
            self.pairs.write_all_at(theirs, node * PAIR_BYTES).map_err(self.scratch("write"))?;
        }
        Ok(Ok(()))
    }

    /// The chunk groups of which there is every byte, right or wrong.
    pub fn groups(&self) -> &RangeSet {
        &self.groups
    }

    /// Those of them that are the blob's, so far as is known by now.
    pub fn equal(&self) -> RangeSet {
        self.groups.difference(self.comparison.differing()).difference(&self.comparison.undecided())
    }

    /// Copies what is equal, proven by the blob's id piece by piece, into `sink`, and commits it. Returns what it copied.
    pub fn copy(&self, sink: &mut dyn Sink) -> Result<RangeSet, StoreError> {
        let query = Query::groups(&self.equal());
        if query.is_empty() {
            return Ok(RangeSet::new());
        }
        let prover = Prover::new(self.blob, self.size, &self.patchwork, &self.pairs, &query);
        let proven = prover.filter_map(|item| match item {
            Ok(piece) => Some(piece),
            Err(error) => {
                debug!(blob = %self.blob, reason = tree::reason(&error), "bytes that were alike changed meanwhile");
                None
            }
        });
        copy(proven, sink)
    }

    fn scratch(&self, action: &'static str) -> impl FnOnce(io::Error) -> StoreError + use<> {
        StoreError::file(action, self._staged.path.clone())
    }
}

/// Writes proven pieces, and commits them, also if it fails. Returns where their bytes are.
fn copy(pieces: impl Iterator<Item = Verified>, sink: &mut dyn Sink) -> Result<RangeSet, StoreError> {
    let mut copied = RangeSet::new();
    let run = |sink: &mut dyn Sink| {
        let mut uncommitted = 0;
        let mut pieces = pieces.peekable();
        while pieces.peek().is_some() {
            let some: Vec<_> = pieces.by_ref().take(PIECES_AT_ONCE).collect();
            sink.write(&some)?;
            for range in some.iter().filter_map(Verified::data).map(VerifiedData::range) {
                copied.insert(range);
                uncommitted += range.len();
            }
            if uncommitted >= COMMIT_BYTES {
                uncommitted = 0;
                sink.commit()?;
            }
        }
        Ok(())
    };
    let written = run(sink);
    let committed = sink.commit();
    written.and(committed).map(|()| copied)
}

/// Of a source of `size` bytes, the spans that stay where they are in a blob of any size.
pub fn in_the_same_place(source: usize, available: &RangeSet) -> impl Iterator<Item = Span> + '_ {
    available.iter().map(move |range| Span { at: range.start(), len: range.len(), source, from: range.start() })
}

/// So many pieces are written together: about 1 MiB of data.
const PIECES_AT_ONCE: usize = 128;
/// How much may have to be copied again after a power cut.
const COMMIT_BYTES: u64 = 64 << 20;
