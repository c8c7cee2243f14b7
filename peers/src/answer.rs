//! What this machine has of a blob, all places together, and answers made of it.

use std::ops::ControlFlow;

use blobstore::{Source, Store, StoreError};
use tree::{BlobId, ByteRange, CHUNK_BYTES, Geometry, ProveError, Query, RangeSet, Verified};

/// The places on this machine that have bytes of one blob.
pub(crate) struct Places {
    size: u64,
    /// Each with what it has, so far as is known by now.
    places: Vec<(Source, RangeSet)>,
}

impl Places {
    /// Opens them; `None` if there are none. One that claims another size than the first is left out.
    pub(crate) fn open(store: &Store, blob: BlobId) -> Result<Option<Self>, StoreError> {
        let sources = store.sources(blob)?;
        let Some(size) = sources.first().map(Source::size) else { return Ok(None) };
        let alike = sources.into_iter().filter(|source| source.size() == size);
        let places = alike.map(|source| {
            let has = source.available().clone();
            (source, has)
        });
        Ok(Some(Self { size, places: places.collect() }))
    }

    /// The blob's size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// What is here of what `query` asks for, in bytes.
    pub(crate) fn has(&self, query: &Query) -> RangeSet {
        let wanted = query.resolve_bytes(self.size);
        self.places.iter().fold(RangeSet::new(), |all, (_, has)| all.union(&wanted.intersection(has)))
    }

    /// Hands the pieces of the answer to `query` to `take`, in order and proven, until it is complete, `take` breaks, or
    /// something is whole in no place. What does not prove is reported to `store`.
    ///
    /// Where one place fails, another goes on: all prove the same tree, so that their answers are alike.
    ///
    /// The first `above` pieces are left out: they are the pairs above the first bytes that an answer to what stands in
    /// front of `query` had already, see [`pairs_said`]. Returns what is left, and how many pairs above that were had by
    /// then, if something is whole in no place.
    pub(crate) fn answer(
        &mut self,
        store: &Store,
        query: &Query,
        mut above: usize,
        take: &mut dyn FnMut(Verified) -> ControlFlow<()>,
    ) -> Result<Option<(Query, usize)>, StoreError> {
        let size = self.size;
        let mut rest = query.clone();
        while let Some((source, has)) = self.best_for(&rest) {
            let mut prover = source.prover(&rest);
            let mut at = 0;
            let error = loop {
                match prover.next() {
                    None => return Ok(None),
                    Some(Err(error)) => break error,
                    Some(Ok(_)) if at < above => {}
                    Some(Ok(piece)) => {
                        if take(piece).is_break() {
                            return Ok(None);
                        }
                    }
                }
                at += 1;
            };
            if at >= above {
                rest = from(&rest, error.range().start());
                above = depth(size, error.range());
            }
            for error in with_those_behind(error, prover) {
                has.remove(Geometry::new(size).round_out(error.range()));
                store.report(source, &error)?;
            }
        }
        Ok(Some((rest, above)))
    }

    /// The place that has the first chunk group of what `query` asks for, and the most of it.
    fn best_for(&mut self, query: &Query) -> Option<(&Source, &mut RangeSet)> {
        let wanted = query.resolve_bytes(self.size);
        let first = wanted
            .iter()
            .next()
            .map_or(ByteRange::default(), |first| ByteRange::new(first.start(), first.start() + 1).unwrap_or_default());
        let able = self.places.iter_mut().rev().filter(|(_, has)| has.contains(first));
        let best = able.max_by_key(|(_, has)| has.intersection(&wanted).total_bytes());
        best.map(|(source, has)| (&*source, has))
    }
}

/// `error`, and what else cannot be proven up to the next bytes that can: damage comes in runs, and whoever asks for more
/// should hear of all of a run at once. Touching ranges are one.
fn with_those_behind(error: ProveError, prover: impl Iterator<Item = Result<Verified, ProveError>>) -> Vec<ProveError> {
    let mut run_bytes = error.range().len();
    let mut errors = vec![error];
    for item in prover {
        match item {
            Ok(Verified::Data(_)) => break,
            Ok(Verified::Node(_)) => {}
            Err(error) => {
                run_bytes += error.range().len();
                match (errors.last_mut(), error) {
                    (Some(ProveError::Data { range: last }), ProveError::Data { range })
                        if last.end() == range.start() =>
                    {
                        *last = ByteRange::new(last.start(), range.end()).unwrap_or(*last);
                    }
                    (_, error) => errors.push(error),
                }
            }
        }
        if run_bytes >= RUN_BYTES_MAX {
            break;
        }
    }
    errors
}

/// What `query` asks for from the byte at `offset` on, which it asks for.
fn from(query: &Query, offset: u64) -> Query {
    let first = offset / CHUNK_BYTES;
    Query::chunks(query.chunk_ranges().map(|(start, end)| (start.max(first), end)))
}

/// How many pairs stand above `subtree`, the bytes of a subtree of a blob of `size` bytes.
fn depth(size: u64, subtree: ByteRange) -> usize {
    path(size, subtree.start()).take_while(|&passed| passed != (subtree.start(), subtree.end())).count()
}

/// How many of the pairs above the byte at `next`, in a blob of `size` bytes, an answer says that ends at the byte at `end`
/// in front of it: those that have both below them. The two are in different chunk groups.
pub(crate) fn pairs_said(size: u64, end: u64, next: u64) -> usize {
    path(size, next).take_while(|&(start, _)| start < end).count()
}

/// The subtrees of a blob of `size` bytes that have the byte at `offset`, from the root down to one chunk.
fn path(size: u64, offset: u64) -> impl Iterator<Item = (u64, u64)> {
    std::iter::successors(Some((0, size)), move |&(start, end)| {
        // A left side is full: the largest power of two of chunks that leaves something to the right.
        let chunks = (end - start).div_ceil(CHUNK_BYTES);
        let middle = start + chunks.next_power_of_two() / 2 * CHUNK_BYTES;
        (chunks > 1).then_some(if offset < middle { (start, middle) } else { (middle, end) })
    })
}

/// How far one answer reads on into damage.
const RUN_BYTES_MAX: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt, path::Path, sync::Arc, time::Duration};

    use blobstore::{NewFile, RealDisk, Settings, Sink};
    use proptest::prelude::*;
    use tree::{Decoder, Fingerprint, GROUP_BYTES, Grain, Hashed, Prover};

    use super::*;

    const GROUPS: u64 = 11;
    const SIZE: u64 = 10 * GROUP_BYTES + 3000;

    fn groups(numbers: impl IntoIterator<Item = u64>) -> RangeSet {
        numbers.into_iter().filter_map(|n| ByteRange::new(n * GROUP_BYTES, ((n + 1) * GROUP_BYTES).min(SIZE))).collect()
    }

    fn some_groups() -> impl Strategy<Value = RangeSet> {
        prop::collection::vec(0..GROUPS, 0..6).prop_map(groups)
    }

    /// A store with the blob twice in place, each copy with some groups rotten, and some groups of it in the cache.
    fn store(dir: &Path, bytes: &[u8], hashed: &Hashed, rotten: [&RangeSet; 2], cached: &RangeSet) -> Store {
        let db = Arc::new(redb::Database::create(dir.join("db")).unwrap());
        let settings = Settings {
            outboards: dir.join("outboards"),
            cache: dir.join("cache"),
            grain: Grain::GROUP,
            cache_limit: u64::MAX,
            cache_keep_free: 0,
            saved: dir.join("saved"),
            saved_keep: Duration::MAX,
            saved_bytes_max: u64::MAX,
            vanished_max: 1000,
        };
        let store = Store::open(Arc::new(RealDisk), db, settings).unwrap();
        let arena = dir.join("arena");
        fs::create_dir(&arena).unwrap();
        let root = store.add_root(&arena).unwrap();
        for (name, rotten) in ["a", "b"].into_iter().zip(rotten) {
            let path = arena.join(name);
            fs::write(&path, bytes).unwrap();
            let file = fs::File::options().write(true).open(&path).unwrap();
            for range in rotten.iter() {
                file.write_all_at(&vec![0x55; range.len() as usize], range.start()).unwrap();
            }
            // Linked as if it had been hashed before it rotted, and nothing of it had moved since.
            let fingerprint = Fingerprint::from(&file.metadata().unwrap());
            let hashed = store.hash(bytes, SIZE).unwrap();
            store.link(root, &[NewFile { path: name.into(), fingerprint, hashed_at: 1, racy: false, hashed }]).unwrap();
        }
        let mut partial = store.partial(hashed.id, SIZE).unwrap();
        for piece in Prover::new(hashed.id, SIZE, bytes, &hashed.outboard[..], &Query::groups(cached)) {
            partial.write(&[piece.unwrap()]).unwrap();
        }
        partial.commit().unwrap();
        store
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Two damaged copies in place and a part in the cache answer as one sound copy does, as far as all of it is
        /// somewhere; and what was met is known afterwards.
        #[test]
        fn all_places_make_one_answer(
            a in some_groups(), b in some_groups(), cached in some_groups(),
            asked in prop::collection::vec((0..GROUPS * 16 + 4, 0..40u64), 0..5),
        ) {
            let mut bytes = vec![0; SIZE as usize];
            fastrand::Rng::with_seed(1).fill(&mut bytes);
            let hashed = tree::hash(&bytes[..], SIZE).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let store = store(dir.path(), &bytes, &hashed, [&a, &b], &cached);
            let query = Query::chunks(asked.into_iter().map(|(start, len)| (start, start + len)));
            let wanted = query.resolve_bytes(SIZE);
            let nowhere = a.intersection(&b).difference(&cached);
            let geometry = Geometry::new(SIZE);
            let end = geometry.round_out_all(&wanted).intersection(&nowhere).iter().next().map_or(SIZE, |gap| gap.start());

            let mut places = Places::open(&store, hashed.id).unwrap().unwrap();
            let mut decoder = Decoder::new(hashed.id, query.clone()).expecting(SIZE);
            decoder.push(&SIZE.to_le_bytes());
            let mut came = RangeSet::new();
            let left = places.answer(&store, &query, 0, &mut |piece| {
                decoder.push(piece.wire_bytes());
                ControlFlow::Continue(())
            }).unwrap();
            while let Some(piece) = decoder.next().unwrap() {
                if let Verified::Data(data) = piece {
                    came.insert(data.range());
                }
            }
            prop_assert_eq!((decoder.is_finished(), left.is_none()), (end == SIZE, end == SIZE));
            prop_assert_eq!(&came, &wanted.intersection(&ByteRange::new(0, end).unwrap().into()));
            let has = Places::open(&store, hashed.id).unwrap().unwrap().has(&query);
            prop_assert!(came.difference(&has).is_empty());
            let gap = RangeSet::from(ByteRange::new(end, SIZE.min(end + 1)).unwrap());
            prop_assert!(end == SIZE || has.intersection(&gap).is_empty(), "what ended the answer is not said to be here");
        }

        /// An answer in parts, wherever it is cut between groups, is the answer in one.
        #[test]
        fn parts_make_one_answer(
            asked in prop::collection::vec((0..GROUPS * 16 + 4, 0..40u64), 0..5), cuts in prop::collection::vec(1..GROUPS, 0..5),
        ) {
            let mut bytes = vec![0; SIZE as usize];
            fastrand::Rng::with_seed(1).fill(&mut bytes);
            let hashed = tree::hash(&bytes[..], SIZE).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let none = RangeSet::new();
            let store = store(dir.path(), &bytes, &hashed, [&none, &none], &none);
            let answer = |query: &Query, above| {
                let mut wire = Vec::new();
                let mut places = Places::open(&store, hashed.id).unwrap().unwrap();
                let left = places.answer(&store, query, above, &mut |piece| {
                    wire.extend_from_slice(piece.wire_bytes());
                    ControlFlow::Continue(())
                });
                assert!(left.unwrap().is_none());
                wire
            };
            let query = Query::chunks(asked.into_iter().map(|(start, len)| (start, start + len)));
            let wanted = query.resolve_bytes(SIZE);
            let (mut wire, mut said) = (Vec::new(), 0);
            let cuts: std::collections::BTreeSet<u64> = cuts.into_iter().map(|n| n * GROUP_BYTES).chain([SIZE]).collect();
            let mut from = 0;
            for cut in cuts {
                let part = wanted.intersection(&ByteRange::new(from, cut).unwrap().into());
                if let Some(first) = part.iter().next() {
                    wire.extend(answer(&Query::bytes(part.clone()), pairs_said(SIZE, said, first.start())));
                    said = part.end();
                }
                from = cut;
            }
            prop_assert_eq!(wire, answer(&query, 0));
        }
    }
}
