//! Bringing many whole blobs into the cache, several at once: small ones together, large ones in steps, between which
//! whoever waits for bytes of the same blob gets its turn.

use std::sync::Arc;

use blobstore::Fetched;
use futures_util::{StreamExt, stream};
use peers::{Class, SMALL_BYTES_MAX};
use tree::{ByteRange, Geometry, RangeSet};

use super::{
    super::{Node, blocking, read::fetch_failure},
    tally::Job,
};
use crate::failure::Failure;

/// Who has blobs brought.
pub(in crate::node) trait Bringing: Send + Sync + 'static {
    /// Whether to begin nothing more.
    fn is_over(&self) -> bool;
    /// So many more bytes of files have come.
    fn came(&self, bytes: u64);
    /// A blob is here, or not to be had. One that was begun when all was over has no end.
    fn ended(&self, job: &Job, outcome: Result<Fetched, Failure>);
}

/// What is brought together.
#[derive(Debug, PartialEq, Eq)]
enum Unit {
    /// Small blobs, on few streams and in few transactions.
    Batch(Vec<Job>),
    /// One that is not.
    Large(Job),
}

impl Node {
    /// Brings blobs into the cache, about in order, within `transfer.in_flight`. They are different ones. Ends when all have,
    /// or soon after it is over.
    pub(in crate::node) async fn bring_ahead(&self, jobs: Vec<Job>, to: Arc<dyn Bringing>) {
        stream::iter(units(jobs))
            .for_each_concurrent(UNITS_AT_ONCE, |unit| {
                let to = to.clone();
                async move {
                    match unit {
                        _ if to.is_over() => {}
                        Unit::Batch(jobs) => self.bring_batch(jobs, &to).await,
                        Unit::Large(job) => match self.bring_steps(&job, &to).await {
                            Ok(None) => {}
                            Ok(Some(fetched)) => to.ended(&job, Ok(fetched)),
                            Err(failure) => to.ended(&job, Err(failure)),
                        },
                    }
                }
            })
            .await;
    }

    async fn bring_batch(&self, mut jobs: Vec<Job>, to: &Arc<dyn Bringing>) {
        let bytes = jobs.iter().map(|job| job.size.max(FILE_BYTES_LEAST)).sum();
        let _pass = self.inner.gate.pass(bytes).await;
        if to.is_over() {
            return;
        }
        // Whoever is alone with several blobs comes to be so in this order, and so nobody waits for each other.
        jobs.sort_by_key(|job| job.blob);
        let mut alone = Vec::with_capacity(jobs.len());
        for job in &jobs {
            alone.push(self.inner.peers.alone_with(job.blob).await);
        }
        let (store, asked) = (self.inner.store.clone(), jobs.clone());
        let missing = blocking(move || {
            let missing = asked.iter().map(|job| {
                let all = RangeSet::from(Geometry::new(job.size).all());
                let lease = store.lease(job.blob, all.clone());
                Ok((lease, !store.missing_from_cache(job.blob, job.size, &all)?.is_empty()))
            });
            missing.collect::<Result<Vec<_>, Failure>>()
        });
        let missing = match missing.await {
            Ok(missing) => missing,
            Err(failure) => return jobs.iter().for_each(|job| to.ended(job, Err(failure.clone()))),
        };
        let (wanted, here): (Vec<_>, Vec<_>) = jobs.iter().zip(&missing).partition(|(_, (_, is_missing))| *is_missing);
        here.into_iter().for_each(|(job, _)| to.ended(job, Ok(Fetched::default())));
        let blobs: Vec<_> = wanted.iter().map(|(job, _)| (job.blob, job.size)).collect();
        let outcomes = self.inner.peers.bring_small(Class::Background, &blobs).await;
        for ((job, _), outcome) in wanted.into_iter().zip(outcomes) {
            if outcome.is_ok() {
                to.came(job.size);
            }
            to.ended(job, outcome.map_err(fetch_failure));
        }
    }

    /// `None` if it was over before all was here.
    async fn bring_steps(&self, job: &Job, to: &Arc<dyn Bringing>) -> Result<Option<Fetched>, Failure> {
        let &Job { blob, size, .. } = job;
        let all = RangeSet::from(Geometry::new(size).all());
        let store = self.inner.store.clone();
        let leased = all.clone();
        let _lease = blocking(move || Ok(store.lease(blob, leased))).await?;
        let mut fetched = Fetched::default();
        let mut missing = self.missing_of(job).await?;
        if missing.contains(Geometry::new(size).all()) {
            let like = self.like(blob, vec![job.file.clone()]).await?;
            if !like.is_empty() {
                let _pass = self.inner.gate.pass(STEP_BYTES).await;
                let _alone = self.inner.peers.alone_with(blob).await;
                let came = to.clone();
                let on_bytes = move |bytes| came.came(bytes);
                fetched.bytes_received += self.inner.peers.reuse(blob, size, all, &like, on_bytes).await;
                missing = self.missing_of(job).await?;
            }
        }
        for step in steps(&missing, STEP_BYTES) {
            let _pass = self.inner.gate.pass(step.total_bytes()).await;
            if to.is_over() {
                return Ok(None);
            }
            let _alone = self.inner.peers.alone_with(blob).await;
            let came = to.clone();
            let brought = self.inner.peers.bring(Class::Background, blob, size, step, move |bytes| came.came(bytes));
            let brought = brought.await.map_err(fetch_failure)?;
            fetched.bytes_received += brought.bytes_received;
        }
        Ok(Some(fetched))
    }

    async fn missing_of(&self, &Job { blob, size, .. }: &Job) -> Result<RangeSet, Failure> {
        let store = self.inner.store.clone();
        blocking(move || Ok(store.missing_from_cache(blob, size, &Geometry::new(size).all().into())?)).await
    }
}

/// What is brought together, about in order.
fn units(jobs: Vec<Job>) -> Vec<Unit> {
    let (mut units, mut batch, mut bytes) = (Vec::new(), Vec::new(), 0);
    for job in jobs {
        if job.size > SMALL_BYTES_MAX {
            units.push(Unit::Large(job));
            continue;
        }
        bytes += job.size;
        batch.push(job);
        if batch.len() >= BATCH_BLOBS || bytes >= BATCH_BYTES {
            units.push(Unit::Batch(std::mem::take(&mut batch)));
            bytes = 0;
        }
    }
    if !batch.is_empty() {
        units.push(Unit::Batch(batch));
    }
    units
}

/// Cuts whole chunk groups into pieces of at most `max` bytes, which is some of them.
fn steps(ranges: &RangeSet, max: u64) -> Vec<RangeSet> {
    let (mut steps, mut step, mut bytes) = (Vec::new(), RangeSet::new(), 0);
    for range in ranges.iter() {
        let mut start = range.start();
        while start < range.end() {
            let end = range.end().min(start + (max - bytes));
            step.extend(ByteRange::new(start, end));
            bytes += end - start;
            start = end;
            if bytes >= max {
                steps.push(std::mem::take(&mut step));
                bytes = 0;
            }
        }
    }
    if !step.is_empty() {
        steps.push(step);
    }
    steps
}

/// So much of a large blob is fetched until others who want bytes of it have their turn.
const STEP_BYTES: u64 = 8 << 20;
const UNITS_AT_ONCE: usize = 8;
const BATCH_BLOBS: usize = 128;
/// The same for small ones, together.
const BATCH_BYTES: u64 = 2 << 20;
/// What a file counts in flight, however short it is.
const FILE_BYTES_LEAST: u64 = 4096;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tree::{BlobId, GROUP_BYTES};

    use super::*;
    use crate::target::Target;

    fn job((number, size): (usize, u64)) -> Job {
        let id = [&number.to_be_bytes()[..], &[0; 24]].concat().try_into().unwrap();
        Job { blob: BlobId::from_bytes(id), size, file: Target { arena: "a".parse().unwrap(), path: None } }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn units_have_all_and_are_bounded(sizes in prop::collection::vec(prop_oneof![0..1000_u64, 100_000..200_000_u64], 0..600)) {
            let jobs: Vec<_> = sizes.into_iter().enumerate().map(job).collect();
            let units = units(jobs.clone());
            let mut all = Vec::new();
            for unit in &units {
                match unit {
                    Unit::Large(job) => {
                        prop_assert!(job.size > SMALL_BYTES_MAX);
                        all.push(job.clone());
                    }
                    Unit::Batch(batch) => {
                        prop_assert!(!batch.is_empty() && batch.len() <= BATCH_BLOBS);
                        prop_assert!(batch.iter().all(|job| job.size <= SMALL_BYTES_MAX));
                        prop_assert!(batch.iter().map(|job| job.size).sum::<u64>() < BATCH_BYTES + SMALL_BYTES_MAX);
                        all.extend(batch.clone());
                    }
                }
            }
            all.sort_by_key(|job| job.blob);
            prop_assert_eq!(all, jobs);
            let short = units.iter().filter(|unit| matches!(unit, Unit::Batch(batch) if batch.len() < 10));
            prop_assert!(short.count() <= 1, "all but the last are full");
        }

        #[test]
        fn steps_have_all_and_are_bounded(
            ranges in prop::collection::vec((0..200_u64, 1..40_u64), 0..12), tail in 1..GROUP_BYTES, groups in 1..20_u64,
        ) {
            // Whole groups, but for the blob's end.
            let ranges = ranges.iter().map(|&(start, len)| (start * GROUP_BYTES, (start + len) * GROUP_BYTES));
            let mut ranges: RangeSet = ranges.filter_map(|(start, end)| ByteRange::new(start, end)).collect();
            let end = ranges.end();
            ranges.extend(ByteRange::new(end, end + tail));
            let steps = steps(&ranges, groups * GROUP_BYTES);
            let mut all = RangeSet::new();
            for step in &steps {
                prop_assert!(!step.is_empty() && step.total_bytes() <= groups * GROUP_BYTES);
                prop_assert!(step.intersection(&all).is_empty());
                prop_assert!(step.iter().all(|range| range.start() % GROUP_BYTES == 0));
                all = all.union(step);
            }
            prop_assert_eq!(&all, &ranges);
            prop_assert_eq!(steps.len() as u64, ranges.total_bytes().div_ceil(groups * GROUP_BYTES));
        }
    }
}
