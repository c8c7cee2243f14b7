//! Files that were pinned here and that their owners have deleted. What follows from them: spec/pins.md, "After a deletion";
//! rows: spec/namespace.md.

use std::{
    collections::{BTreeMap, HashMap},
    ops::ControlFlow,
};

use redb::{ReadableTable, ReadableTableMetadata, Table, WriteTransaction};
use tree::BlobId;

use crate::{
    ArenaName, Content, Namespace, NamespaceError, PeerId, Pins, Place, RelPath, Version,
    namespace::{arena_name, rel_path},
    pins::read_pins,
    rows::{
        DEPARTED, DepartedKey, DepartedRow, LOG, LogRow, MASS_DELETIONS, ME, MassRow, PEERS, PINS, VERSIONS,
        VersionKey, decode, encode,
    },
};

/// A file that a pin covered when its owner deleted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departed {
    /// The file's arena.
    pub arena: ArenaName,
    /// The file's path.
    pub path: RelPath,
    /// The bytes that the owner had there.
    pub blob: BlobId,
    /// The file's size in bytes.
    pub size: u64,
    /// The owner.
    pub origin: PeerId,
    /// The number of the deletion in the owner's log; 0 if a listing no longer had the file.
    pub seq: u64,
    /// When the deletion was noticed here, in milliseconds since 1970; 0 until [`Namespace::date_departed`].
    pub since: u64,
}

/// A deletion of more than half, and more than a hundred, of the files of an arena that were pinned here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MassDeletion {
    /// The arena.
    pub arena: ArenaName,
    /// Whose files were deleted.
    pub origin: PeerId,
    /// When the deletion was noticed here, in milliseconds since 1970.
    pub since: u64,
    /// Files that were deleted.
    pub files: u64,
    /// Files that there were before.
    pub of: u64,
}

impl Namespace {
    /// Gives `visit` the departed files, by arena, path and blob. Stops when `visit` breaks. All is seen as of one moment.
    pub fn departed(&self, visit: &mut dyn FnMut(Departed) -> ControlFlow<()>) -> Result<(), NamespaceError> {
        self.read("list departed files", |txn| {
            let origins = origins(&txn.open_table(PEERS)?)?;
            for row in txn.open_table(DEPARTED)?.iter()? {
                let (key, row) = row?;
                let (arena, path, blob) = key.value();
                let DepartedRow { size, origin, seq, since } = decode(row.value())?;
                let Some(&origin) = origins.get(&origin) else { continue };
                let (arena, path, blob) = (arena_name(arena)?, rel_path(path)?, BlobId::from_bytes(*blob));
                if visit(Departed { arena, path, blob, size, origin, seq, since }).is_break() {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Sets the time of all departed files that have none to `now`, brings times that are after `now` back to it, and records
    /// the mass deletions that thereby become apparent, in one commit.
    ///
    /// `now` is in milliseconds since 1970. A mass deletion is what an owner deleted of an arena within [`AT_ONCE_MS`].
    pub fn date_departed(&self, now: u64) -> Result<(), NamespaceError> {
        self.write_if("date departed files", |txn| {
            let mut table = txn.open_table(DEPARTED)?;
            let (mut undated, mut runs) = (Vec::new(), HashMap::<(String, u32), Run>::new());
            for row in table.iter()? {
                let (key, row) = row?;
                let (arena, path, blob) = key.value();
                let mut row: DepartedRow = decode(row.value())?;
                let is_new = row.since == 0;
                if is_new || row.since > now {
                    row.since = now;
                    undated.push(((arena.to_owned(), path.to_owned(), *blob), row));
                }
                if now - row.since <= AT_ONCE_MS {
                    runs.entry((arena.to_owned(), row.origin)).or_default().add(&row, is_new);
                }
            }
            if undated.is_empty() {
                return Ok(None);
            }
            for ((arena, path, blob), row) in &undated {
                table.insert((&arena[..], &path[..], blob), &encode(row)?[..])?;
            }
            let pins = read_pins(&txn.open_table(PINS)?)?;
            let (versions, log) = (txn.open_table(VERSIONS)?, txn.open_table(LOG)?);
            let mut masses = txn.open_table(MASS_DELETIONS)?;
            for ((arena, origin), run) in runs {
                if !run.is_news || run.files <= MASS_FILES {
                    continue;
                }
                let of = run.files + run.left(&versions, &log, &pins, &arena, origin)?;
                if run.files * 2 > of {
                    // One that goes on is one.
                    let earlier = (&arena[..], origin, now.saturating_sub(AT_ONCE_MS))..=(&arena[..], origin, now);
                    masses.retain_in(earlier, |_, _| false)?;
                    let row = MassRow { files: run.files, of };
                    masses.insert((&arena[..], origin, run.since), &encode(&row)?[..])?;
                }
            }
            Ok(Some(()))
        })?;
        Ok(())
    }

    /// Forgets departed files, durable on return: those are kept here no more.
    pub fn forget_departed(&self, files: &[Departed]) -> Result<(), NamespaceError> {
        self.write("forget departed files", |txn| {
            let mut table = txn.open_table(DEPARTED)?;
            for Departed { arena, path, blob, .. } in files {
                table.remove((arena.as_str(), path.as_bytes(), blob.as_bytes()))?;
            }
            Ok(())
        })
    }

    /// Forgets all departed files at and below `places`, and the mass deletions in the arenas of which none is left then, in
    /// one commit. Returns how many files, and their bytes.
    pub fn accept_departed(&self, places: &[Place]) -> Result<(u64, u64), NamespaceError> {
        self.write("accept deletions", |txn| {
            let (mut files, mut bytes) = (0, 0);
            let mut table = txn.open_table(DEPARTED)?;
            let accepted: Pins = places.iter().cloned().collect();
            let mut failed = None;
            table.retain(|(arena, path, _), row| {
                let covers = || {
                    let row: DepartedRow = decode(row)?;
                    let is_accepted = accepted.covering(&arena_name(arena)?, Some(&rel_path(path)?)).is_some();
                    Ok(is_accepted.then_some(row.size))
                };
                match covers() {
                    Ok(Some(size)) => {
                        (files, bytes) = (files + 1, bytes + size);
                        false
                    }
                    Ok(None) => true,
                    Err(error) => {
                        failed = Some(error);
                        true
                    }
                }
            })?;
            failed.map_or(Ok(()), Err::<(), redb::Error>)?;
            for place in places {
                let arena = place.arena.as_str();
                let is_left = table.range((arena, &[][..], &[0; 32])..)?.next().transpose()?;
                if is_left.is_none_or(|(key, _)| key.value().0 != arena) {
                    let all = (arena, 0, 0)..=(arena, u32::MAX, u64::MAX);
                    txn.open_table(MASS_DELETIONS)?.retain_in(all, |_, _| false)?;
                }
            }
            Ok((files, bytes))
        })
    }

    /// Returns up to `max` blobs that any machine has at any path, or that departed, whose ids are `low`, `high` or between
    /// them, with their sizes, ascending. Reads all rows until it has them.
    pub fn blobs_between(
        &self,
        low: &[u8; 32],
        high: &[u8; 32],
        max: usize,
    ) -> Result<Vec<(BlobId, u64)>, NamespaceError> {
        let is_between = |blob: &BlobId| (low..=high).contains(&blob.as_bytes());
        self.read("look for a blob", |txn| {
            let mut found = BTreeMap::new();
            for row in txn.open_table(DEPARTED)?.iter()? {
                let (key, row) = row?;
                let blob = BlobId::from_bytes(*key.value().2);
                if is_between(&blob) && found.len() < max {
                    found.insert(blob, decode::<DepartedRow>(row.value())?.size);
                }
            }
            for row in txn.open_table(VERSIONS)?.iter()? {
                if found.len() >= max {
                    break;
                }
                if let Content::File { blob, size, .. } = decode::<Version>(row?.1.value())?.content
                    && is_between(&blob)
                {
                    found.insert(blob, size);
                }
            }
            Ok(found.into_iter().collect())
        })
    }

    /// Returns the mass deletions that were neither accepted nor forgotten, by arena.
    pub fn mass_deletions(&self) -> Result<Vec<MassDeletion>, NamespaceError> {
        self.read("list mass deletions", |txn| {
            let origins = origins(&txn.open_table(PEERS)?)?;
            let mut found = Vec::new();
            for row in txn.open_table(MASS_DELETIONS)?.iter()? {
                let (key, row) = row?;
                let (arena, origin, since) = key.value();
                let MassRow { files, of } = decode(row.value())?;
                let Some(&origin) = origins.get(&origin) else { continue };
                found.push(MassDeletion { arena: arena_name(arena)?, origin, since, files, of });
            }
            Ok(found)
        })
    }

    /// Forgets the mass deletions that were noticed before `time`, in milliseconds since 1970.
    pub fn forget_mass_deletions(&self, time: u64) -> Result<(), NamespaceError> {
        self.write("forget mass deletions", |txn| {
            Ok(txn.open_table(MASS_DELETIONS)?.retain(|(.., since), _| since >= time)?)
        })
    }
}

/// What one owner deleted of one arena within a while.
#[derive(Debug, Default)]
struct Run {
    files: u64,
    /// The first deletion: its number, and when it was noticed.
    seq: u64,
    since: u64,
    /// Whether some of it was not dated before.
    is_news: bool,
}

impl Run {
    fn add(&mut self, row: &DepartedRow, is_new: bool) {
        self.seq = if self.files == 0 { row.seq } else { self.seq.min(row.seq) };
        self.since = if self.files == 0 { row.since } else { self.since.min(row.since) };
        self.files += 1;
        self.is_news |= is_new;
    }

    /// Counts the pinned files that the owner had before and still has. One that was published with the deletion, or not long
    /// before it, makes up for nothing; where the log does not tell when, it counts.
    fn left(
        &self,
        versions: &Table<'_, VersionKey, &'static [u8]>,
        log: &Table<'_, (u32, u64), &'static [u8]>,
        pins: &Pins,
        arena: &str,
        origin: u32,
    ) -> Result<u64, redb::Error> {
        let at = |seq| -> Result<Option<u64>, redb::Error> {
            let row = log.get((origin, seq))?;
            Ok(row.map(|row| decode::<LogRow>(row.value())).transpose()?.map(|row| row.at))
        };
        // By the owner's clock, as far apart as these two may be by ours.
        let began = at(self.seq)?.map(|at| at.saturating_sub(AT_ONCE_MS));
        let (name, mut left) = (arena_name(arena)?, 0);
        for row in versions.range((arena, &[][..], 0)..)? {
            let (key, row) = row?;
            let (of, path, number) = key.value();
            if of != arena {
                break;
            }
            if number != origin {
                continue;
            }
            let version: Version = decode(row.value())?;
            let is_file = matches!(version.content, Content::File { .. });
            if !is_file || pins.covering(&name, Some(&rel_path(path)?)).is_none() {
                continue;
            }
            let is_new = at(version.seq)?.zip(began).is_some_and(|(at, began)| at >= began);
            left += u64::from(!is_new);
        }
        Ok(left)
    }
}

/// Records what departs, within one transaction.
pub(crate) struct Departing<'txn> {
    txn: &'txn WriteTransaction,
    /// Opened when something may depart.
    open: Option<(Pins, Table<'txn, DepartedKey, &'static [u8]>)>,
}

impl<'txn> Departing<'txn> {
    pub(crate) fn new(txn: &'txn WriteTransaction) -> Self {
        Self { txn, open: None }
    }

    /// Takes note that `origin` no longer has the file `old` at a path, by the change `seq` of its log.
    pub(crate) fn note(
        &mut self,
        arena: &str,
        path: &[u8],
        origin: u32,
        old: &Content,
        seq: u64,
    ) -> Result<(), redb::Error> {
        let Content::File { blob, size, .. } = *old else { return Ok(()) };
        if origin == ME || size == 0 {
            return Ok(());
        }
        let (pins, table) = match &mut self.open {
            Some(open) => open,
            None => {
                let pins = read_pins(&self.txn.open_table(PINS)?)?;
                self.open.insert((pins, self.txn.open_table(DEPARTED)?))
            }
        };
        if pins.covering(&arena_name(arena)?, Some(&rel_path(path)?)).is_none() {
            return Ok(());
        }
        if table.len()? >= DEPARTED_MAX {
            tracing::warn!(arena, "too many deleted files are kept; this one is not");
            return Ok(());
        }
        let row = DepartedRow { size, origin, seq, since: 0 };
        table.insert((arena, path, blob.as_bytes()), &encode(&row)?[..])?;
        Ok(())
    }
}

fn origins(peers: &impl ReadableTable<&'static [u8; 32], u32>) -> Result<HashMap<u32, PeerId>, redb::Error> {
    let rows = peers.iter()?;
    rows.map(|row| row.map(|(peer, number)| (number.value(), PeerId::from_bytes(*peer.value()))).map_err(Into::into))
        .collect()
}

/// Milliseconds within which deletions count as one.
pub const AT_ONCE_MS: u64 = 3_600_000;
/// A mass deletion has more files than this.
const MASS_FILES: u64 = 100;
/// Departed files that are recorded: as many as an origin may have rows.
const DEPARTED_MAX: u64 = 20_000_000;
