use std::io;

use tree::{BlobId, ByteRange, DamageSearch, Drift, Geometry, Grain, PartialTree, ProveError, Query, RangeSet};

use crate::{FileRef, FileState, Store, StoreError};

/// What verifying a blob in one place found. Ranges are in bytes, whole chunk groups.
#[derive(Debug)]
pub enum Verdict {
    /// Every byte proves, and so does the outboard.
    Sound,
    /// Some bytes, or some pairs of the outboard, do not prove.
    Damaged {
        /// The bytes that do not prove.
        data: RangeSet,
        /// The bytes above which the outboard is wrong; empty where it is sound. All of them if it is too long.
        outboard: RangeSet,
        /// The first error of reading, if some bytes could not be read at all.
        unreadable: Option<io::Error>,
    },
    /// Some bytes of a file in place are not the blob's, and rot and an edit are both possible: its ctime moved, or nobody
    /// watched, while its mtime stayed.
    Suspect {
        /// The chunk groups of the blob that the file lacks.
        data: RangeSet,
    },
    /// The file was edited or replaced since it was indexed; nothing is said of its bytes.
    Modified,
    /// The file is not there.
    Missing,
    /// The file cannot be opened or looked at.
    Unreadable(io::Error),
}

impl Verdict {
    /// What was found of one part, and then of another.
    pub fn and(self, other: Verdict) -> Verdict {
        match (self, other) {
            (
                Self::Damaged { mut data, mut outboard, unreadable },
                Self::Damaged { data: more_data, outboard: more_outboard, unreadable: more },
            ) => {
                data.extend(more_data.iter());
                outboard.extend(more_outboard.iter());
                Self::Damaged { data, outboard, unreadable: unreadable.or(more) }
            }
            (Self::Suspect { mut data }, Self::Suspect { data: more } | Self::Damaged { data: more, .. })
            | (Self::Damaged { data: more, .. }, Self::Suspect { mut data }) => {
                data.extend(more.iter());
                Self::Suspect { data }
            }
            (found @ (Self::Damaged { .. } | Self::Suspect { .. }), Self::Sound) => found,
            (_, other) => other,
        }
    }
}

impl Store {
    /// Reads all of a file in place and judges it. Records exactly what is damaged now as its quarantine.
    ///
    /// `progress` hears how many more bytes have been judged. `None` if the file is not linked.
    pub fn verify_file(&self, file: &FileRef, progress: &(dyn Fn(u64) + Sync)) -> Result<Option<Verdict>, StoreError> {
        self.verify_part(file, ByteRange::new(0, u64::MAX).unwrap_or_default(), progress)
    }

    /// The same for a part of the file only, widened to whole units of 1 MiB. Nothing is said of the rest, and what is
    /// known of its damage stays.
    pub fn verify_part(
        &self,
        file: &FileRef,
        part: ByteRange,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<Verdict>, StoreError> {
        let Some(row) = self.file(file)? else { return Ok(None) };
        let (root, size) = (self.root_dir(file.root), row.fingerprint.size);
        let data = match self.inner.disk.open_beneath(&root, file.relative(), crate::Access::Read) {
            Ok(data) => data,
            Err(error) => return Ok(Some(if is_gone(&error) { Verdict::Missing } else { Verdict::Unreadable(error) })),
        };
        let fingerprint = || data.fingerprint().map_err(StoreError::file("stat", self.absolute(file)));
        let before = fingerprint()?;
        if !row.may_have_blob(&before) {
            let is_suspect = matches!(row.state, FileState::Suspect { read, .. } if read.drift(&before) == Drift::None);
            let all = Geometry::new(size).all().into();
            return Ok(Some(if is_suspect { Verdict::Suspect { data: all } } else { Verdict::Modified }));
        }
        let outboard = self.outboard(row.blob, size)?;
        let search = DamageSearch::new(row.blob, size, &data, &outboard.pairs).with_grain(outboard.grain);
        let search = search.within(part);
        let mut found = search.run(progress);
        if outboard.has_surplus(size) {
            found.outboard.insert(Geometry::new(size).all());
        }
        let now = fingerprint()?;
        let is_touched = row.fingerprint.drift(&now) != Drift::None;
        if before != now || (row.state == FileState::Racy && !is_touched && !found.data.is_empty()) {
            return Ok(Some(Verdict::Modified));
        }
        let judged = search.judged();
        let all = RangeSet::from(Geometry::new(size).all());
        let damaged = row.damaged.intersection(&all).difference(&judged.into()).union(&found.data);
        // What is the same, byte for byte, takes over a fingerprint that was only touched.
        let is_sound = damaged.is_empty() && all == judged.into();
        // Mending moves the ctime, and ends with rows of its own.
        let is_mended = self.is_mended_now(file, &now);
        let may_be_edited = is_touched || row.is_suspect() || !data.has_own_ctime();
        let is_suspect = may_be_edited && !damaged.is_empty() && !is_mended;
        let state = match row.state {
            state if is_suspect => state.made_suspect(now),
            FileState::Suspect { .. } if is_sound => FileState::Settled,
            state => state,
        };
        let is_news = damaged != row.damaged || state != row.state || (is_sound && row.fingerprint != now);
        if is_news && !is_mended {
            let known = (row.fingerprint, row.state);
            self.update_file(file, row.blob, |row| {
                // What was linked anew meanwhile was not looked at.
                if row.fingerprint == known.0 && [known.1, state].contains(&row.state) {
                    row.damaged = damaged.clone();
                    row.state = state;
                    if is_sound {
                        row.fingerprint = now;
                    }
                }
            })?;
            self.lost();
        }
        if is_sound && !self.is_holder(file, row.blob)? {
            self.restore_holder(file, row.blob)?;
        }
        Ok(Some(if found.is_none() {
            Verdict::Sound
        } else if is_suspect && !found.data.is_empty() {
            Verdict::Suspect { data: found.data }
        } else {
            Verdict::Damaged { data: found.data, outboard: found.outboard, unreadable: found.unreadable }
        }))
    }

    /// What is known here of the tree above the damage of a file in place; `None` if that names every damaged chunk
    /// group already, or there is more of it than such a tree has room for. With a coarser outboard, the rest of the
    /// tree can be had from peers: see [`narrow`](Self::narrow).
    pub fn tree_of_damage(&self, file: &FileRef) -> Result<Option<(PartialTree, RangeSet)>, StoreError> {
        let Some(row) = self.file(file)?.filter(|row| (1..=NARROWED_BYTES_MAX).contains(&row.damaged.total_bytes()))
        else {
            return Ok(None);
        };
        let size = row.fingerprint.size;
        let outboard = self.outboard(row.blob, size)?;
        let mut tree = PartialTree::new(row.blob, size);
        tree.take_outboard(&outboard.pairs, outboard.grain, &row.damaged);
        let is_known = outboard.grain == Grain::GROUP || tree.missing(&row.damaged, 1).is_empty();
        Ok((!is_known).then_some((tree, row.damaged)))
    }

    /// Lifts the quarantine from those chunk groups that, by what is known of the blob's tree now, are sound.
    pub fn narrow(&self, file: &FileRef, blob: BlobId, tree: &PartialTree) -> Result<(), StoreError> {
        let Some(row) = self.file(file)?.filter(|row| row.blob == blob) else { return Ok(()) };
        let path = self.absolute(file);
        let data = self.open_in_place(file, &row).map_err(StoreError::file("open", &path))?;
        let damaged = tree.find_damage(&data, &row.damaged).intersection(&row.damaged);
        if !row.may_have_blob(&data.fingerprint().map_err(StoreError::file("stat", &path))?) {
            return Err(StoreError::Modified { path });
        }
        self.update_file(file, blob, |row| row.damaged = row.damaged.intersection(&damaged))
    }

    /// Reads all that the cache claims to have of `blob` and judges it; forgets what is damaged.
    ///
    /// Files or a row of another length than they must have count as missing. `None` if the blob is not cached.
    pub fn verify_cached(&self, blob: BlobId, progress: &(dyn Fn(u64) + Sync)) -> Result<Option<Verdict>, StoreError> {
        let _lease = self.lease(blob, ByteRange::new(0, u64::MAX).unwrap_or_default().into());
        let Some(row) = self.cached_row(blob)? else { return Ok(None) };
        let source = self.sources(blob)?.into_iter().next_back().filter(|source| source.is_cached());
        // The next fetch would begin anew what is of another length, and whoever takes it would take too much.
        let is_whole = self.has_cached_bytes(blob, Geometry::new(row.size))?;
        let Some(source) = source.filter(|_| is_whole) else {
            self.forget_cached(blob, &row.proven)?;
            return Ok(Some(Verdict::Missing));
        };
        let (mut data, mut outboard, mut unreadable) = (RangeSet::new(), RangeSet::new(), None);
        for item in source.prove(&Query::groups(&row.proven)) {
            match item {
                Ok(tree::Verified::Data(piece)) => progress(piece.range().len()),
                Ok(tree::Verified::Node(_)) => {}
                Err(error) => {
                    let damaged =
                        RangeSet::from(Geometry::new(row.size).round_out(error.range())).intersection(&row.proven);
                    progress(damaged.total_bytes());
                    match error {
                        ProveError::Outboard { .. } => outboard.extend(damaged.iter()),
                        ProveError::Data { .. } => data.extend(damaged.iter()),
                        ProveError::Read { source, .. } => {
                            data.extend(damaged.iter());
                            unreadable = unreadable.or(Some(source));
                        }
                    }
                }
            }
        }
        let damaged = data.union(&outboard);
        if damaged.is_empty() {
            return Ok(Some(Verdict::Sound));
        }
        self.forget_cached(blob, &damaged)?;
        Ok(Some(Verdict::Damaged { data, outboard, unreadable }))
    }

    /// Makes the outboard of a file in place anew from its bytes, which must still be the blob. Durable on return.
    pub fn rebuild_outboard(&self, file: &FileRef) -> Result<(), StoreError> {
        let path = self.absolute(file);
        let Some(row) = self.file(file)? else { return Err(StoreError::Modified { path }) };
        let hashed = self
            .open_in_place(file, &row)
            .and_then(|data| self.hash(&data, row.fingerprint.size))
            .map_err(StoreError::file("hash", &path))?;
        if hashed.id() != row.blob {
            return Err(StoreError::NotTheBlob { path, blob: row.blob });
        }
        self.replace_outboard(&hashed)
    }
}

/// Whether the path leads nowhere: nothing there, or a directory or link where the path goes on or ends.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | InvalidInput)
        || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

/// The tree above so many bytes takes some 30 MiB.
const NARROWED_BYTES_MAX: u64 = 4 << 30;
