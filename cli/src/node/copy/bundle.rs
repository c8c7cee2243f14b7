//! Many small files at a time: what each costs by itself, in threads and round trips, is shared by all of them.

use std::sync::{Arc, atomic::Ordering};

use blobstore::Fetched;
use bytes::Bytes;
use namespace::Content;
use peers::{Class, Lost, SMALL_BYTES_MAX};
use tree::{BlobId, Geometry};

use super::{
    super::{blocking, read::fetch_failure},
    arrive::stage,
    get::{Getting, Got, Job},
};
use crate::failure::{Code, Failure, WhileDoing};

/// Where the bytes of one file of a bundle are.
enum Found {
    /// The file is there already.
    There,
    /// They are on this machine.
    Here(Vec<Bytes>),
    Absent,
}

impl Job {
    /// The blob and size of a file that may go in a bundle.
    pub(super) fn small(&self) -> Option<(BlobId, u64)> {
        match self.content {
            Content::File { blob, size, .. } if size <= SMALL_BYTES_MAX => Some((blob, size)),
            _ => None,
        }
    }
}

impl Getting {
    /// Puts files that are [small](Job::small) where they are to be. Returns what came of each.
    pub(super) async fn place_bundle(self: &Arc<Self>, jobs: &Arc<[Job]>) -> Vec<Result<Got, Failure>> {
        let bytes = jobs.iter().filter_map(Job::small).map(|(_, size)| size.max(FILE_BYTES_LEAST)).sum();
        let _pass = self.node.inner.gate.pass(bytes).await;
        let found = self.for_each(jobs, vec![(); jobs.len()], |getting, job, ()| getting.find(job)).await;
        let absent = |(job, found): (&Job, &Result<Found, Failure>)| match found {
            Ok(Found::Absent) => job.small(),
            _ => None,
        };
        let wanted: Vec<_> = jobs.iter().zip(&found).filter_map(absent).collect();
        let mut fetched = self.node.inner.peers.fetch_small(Class::Copy, &wanted).await.into_iter();
        let came = found.into_iter().map(|found| match found? {
            Found::There => Ok(None),
            Found::Here(pieces) => Ok(Some((pieces, Fetched::default()))),
            Found::Absent => {
                let lost = || Failure::new(Code::Error, "nothing came of it");
                let (pieces, fetched) = fetched.next().ok_or_else(lost)?.map_err(fetch_failure)?;
                Ok(Some((pieces.into_iter().map(|piece| piece.bytes().clone()).collect(), fetched)))
            }
        });
        let came: Vec<Result<_, Failure>> = came.collect();
        self.for_each(jobs, came, |getting, job, came| match came? {
            None => Ok(Got::Skipped),
            Some((pieces, fetched)) => getting.write(job, &pieces).map(|lost| Got::Copied(fetched, lost)),
        })
        .await
    }

    /// Does something with each job and what stands for it in `inputs`, on one thread that may block. Returns what came of
    /// each; if the thread fails, that is what came of all.
    async fn for_each<I: Send + 'static, T: Send + 'static>(
        self: &Arc<Self>,
        jobs: &Arc<[Job]>,
        inputs: Vec<I>,
        work: impl Fn(&Self, &Job, I) -> Result<T, Failure> + Send + 'static,
    ) -> Vec<Result<T, Failure>> {
        let (getting, near) = (self.clone(), jobs.clone());
        let each = move || Ok(near.iter().zip(inputs).map(|(job, input)| work(&getting, job, input)).collect());
        blocking(each).await.unwrap_or_else(|failure| jobs.iter().map(|_| Err(failure.clone())).collect())
    }

    fn find(&self, job: &Job) -> Result<Found, Failure> {
        if self.is_there(&job.to, &job.content)? {
            return Ok(Found::There);
        }
        let Some((blob, size)) = job.small() else { return Ok(Found::Absent) };
        let outcome = self.node.inner.store.read(blob, size, Geometry::new(size).all())?;
        Ok(match outcome.missing.is_empty() {
            true => Found::Here(outcome.pieces.iter().map(|piece| piece.bytes().clone()).collect()),
            false => Found::Absent,
        })
    }

    fn write(&self, job: &Job, pieces: &[Bytes]) -> Result<Lost, Failure> {
        let Content::File { size, mode, .. } = job.content else { return Ok(Lost::default()) };
        let create = || {
            let mut staged = stage(&self.destination, &job.to, pieces, size)?;
            let lost = staged.set_traits(job.traits(mode, &self.node))?;
            staged.publish(&job.to).map(|()| lost)
        };
        let lost = create().while_doing(self.creating(&job.to))?;
        self.done.fetch_add(size, Ordering::Relaxed);
        Ok(lost)
    }
}

/// What a file counts in flight, however short it is.
const FILE_BYTES_LEAST: u64 = 4096;
