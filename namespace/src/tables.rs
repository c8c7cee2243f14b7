//! The tables that change together whenever something is said or heard.

use std::{collections::BTreeMap, ops::Bound};

use redb::{ReadableTable, Table, WriteTransaction};
use tree::BlobId;

use crate::{
    Key, Mark, Statement, Version,
    departed::Departing,
    namespace::{arena_name, rel_path, session_of},
    recent::Recent,
    rows::{BLOBS, HEADS, HeadRow, LOG, LogRow, ME, SESSIONS, VERSIONS, VersionKey, decode, encode},
};

/// The tables, within one transaction.
pub(crate) struct Tables<'txn> {
    versions: Table<'txn, VersionKey, &'static [u8]>,
    blobs: Table<'txn, (u64, u32), u64>,
    log: Table<'txn, (u32, u64), &'static [u8]>,
    heads: Table<'txn, u32, &'static [u8]>,
    /// Rows that are new and not yet in their table.
    new: BTreeMap<(String, Vec<u8>, u32), Version>,
    sessions: Table<'txn, (u32, u64), u64>,
    recent: &'txn Recent,
    departing: Departing<'txn>,
}

impl<'txn> Tables<'txn> {
    /// `recent` hears which rows change.
    pub(crate) fn open(txn: &'txn WriteTransaction, recent: &'txn Recent) -> Result<Self, redb::Error> {
        Ok(Self {
            recent,
            departing: Departing::new(txn),
            versions: txn.open_table(VERSIONS)?,
            blobs: txn.open_table(BLOBS)?,
            log: txn.open_table(LOG)?,
            heads: txn.open_table(HEADS)?,
            new: BTreeMap::new(),
            sessions: txn.open_table(SESSIONS)?,
        })
    }

    pub(crate) fn head(&self, origin: u32) -> Result<HeadRow, redb::Error> {
        Ok(self.heads.get(origin)?.map(|row| decode(row.value())).transpose()?.unwrap_or_default())
    }

    pub(crate) fn set_head(&mut self, origin: u32, head: &HeadRow) -> Result<(), redb::Error> {
        self.heads.insert(origin, &encode(head)?[..])?;
        Ok(())
    }

    /// What each origin has at a path, by its number.
    pub(crate) fn at(&self, arena: &str, path: &[u8]) -> Result<Vec<(u32, Version)>, redb::Error> {
        let new = self.new.range((arena.to_owned(), path.to_owned(), ME)..);
        let new = new.take_while(|((of, at, _), _)| (&of[..], &at[..]) == (arena, path));
        let mut found: Vec<_> = new.map(|((.., origin), version)| (*origin, version.clone())).collect();
        for row in self.versions.range((arena, path, ME)..=(arena, path, u32::MAX))? {
            let (key, row) = row?;
            found.push((key.value().2, decode(row.value())?));
        }
        Ok(found)
    }

    /// Up to `max` of the paths of this machine in `arena` where something is present, by path, behind `after`.
    pub(crate) fn present_here(
        &self,
        arena: &str,
        after: &[u8],
        max: usize,
    ) -> Result<Vec<(Vec<u8>, Version)>, redb::Error> {
        let mut found = Vec::new();
        for row in self.versions.range((Bound::Excluded((arena, after, u32::MAX)), Bound::Unbounded))? {
            let (key, row) = row?;
            let (of, path, origin) = key.value();
            if of != arena || found.len() == max {
                break;
            }
            let version: Version = if origin == ME { decode(row.value())? } else { continue };
            if version.content.is_present() {
                found.push((path.to_owned(), version));
            }
        }
        Ok(found)
    }

    /// Sets a row, and keeps count of where its blob is. Returns whether the row is new. Rows that are must be
    /// [flushed](Self::flush) before anything but [`at`](Self::at) sees them.
    pub(crate) fn put(
        &mut self,
        arena: &str,
        path: &[u8],
        origin: u32,
        version: &Version,
    ) -> Result<bool, redb::Error> {
        let key = (arena, path, origin);
        let old = self.versions.get(key)?.map(|old| decode::<Version>(old.value())).transpose()?;
        let old = match old {
            None => self.new.insert((arena.to_owned(), path.to_owned(), origin), version.clone()),
            Some(old) => {
                if old != *version {
                    self.versions.insert(key, &encode(version)?[..])?;
                }
                Some(old)
            }
        };
        if let Some(old) = old.as_ref().filter(|_| version.content.blob().is_none()) {
            self.departing.note(arena, path, origin, &old.content, version.seq)?;
        }
        let is_new = old.is_none();
        if old.as_ref() != Some(version) {
            self.touch(arena, path)?;
        }
        self.recount(old.and_then(|old| old.content.blob()), version.content.blob(), origin)?;
        Ok(is_new)
    }

    /// Inserts the rows that are new. Wherever several come between two that are there, they fill their pages: one by one,
    /// they would leave every page half empty.
    pub(crate) fn flush(&mut self) -> Result<(), redb::Error> {
        let mut rows = std::mem::take(&mut self.new).into_iter().peekable();
        while let Some(((arena, path, origin), _)) = rows.peek() {
            let mut cursor = self.versions.lower_bound_mut(Bound::Included((&arena[..], &path[..], *origin)))?;
            let next = cursor.peek_next()?.map(|(key, _)| {
                let (arena, path, origin) = key.value();
                (arena.to_owned(), path.to_owned(), origin)
            });
            while let Some(((arena, path, origin), version)) =
                rows.next_if(|(key, _)| next.as_ref().is_none_or(|next| key < next))
            {
                cursor.insert_before((&arena[..], &path[..], origin), &encode(&version)?[..])?;
            }
            cursor.close()?;
        }
        Ok(())
    }

    fn remove(&mut self, arena: &str, path: &[u8], origin: u32) -> Result<(), redb::Error> {
        self.touch(arena, path)?;
        let old = self.versions.remove((arena, path, origin))?;
        let old = old.map(|old| decode::<Version>(old.value())).transpose()?;
        if let Some(old) = &old {
            self.departing.note(arena, path, origin, &old.content, 0)?;
        }
        self.recount(old.and_then(|old| old.content.blob()), None, origin)
    }

    fn touch(&self, arena: &str, path: &[u8]) -> Result<(), redb::Error> {
        self.recent.touch((arena_name(arena)?, rel_path(path)?));
        Ok(())
    }

    fn recount(&mut self, before: Option<BlobId>, after: Option<BlobId>, origin: u32) -> Result<(), redb::Error> {
        if origin == ME || before == after {
            return Ok(());
        }
        for (blob, change) in [(before, -1), (after, 1)] {
            let Some(blob) = blob else { continue };
            let key = (prefix(blob), origin);
            let count = self.blobs.get(key)?.map_or(0, |count| count.value()).saturating_add_signed(change);
            if count == 0 {
                self.blobs.remove(key)?;
            } else {
                self.blobs.insert(key, count)?;
            }
        }
        Ok(())
    }

    /// Adds a change to an origin's log.
    pub(crate) fn note(&mut self, origin: u32, row: &LogRow) -> Result<(), redb::Error> {
        self.log.insert((origin, row.version.seq), &encode(row)?[..])?;
        Ok(())
    }

    /// Forgets an origin's log.
    pub(crate) fn forget_log(&mut self, origin: u32) -> Result<(), redb::Error> {
        Ok(self.log.retain_in((origin, 0)..=(origin, u64::MAX), |_, _| false)?)
    }

    /// The session in which an origin said `seq`, which is not below its floor.
    pub(crate) fn session_of(&self, origin: u32, seq: u64) -> Result<u64, redb::Error> {
        session_of(&self.sessions, origin, seq)
    }

    /// Takes note that an origin began a session with `seq`.
    pub(crate) fn begin_session(&mut self, origin: u32, seq: u64, session: u64) -> Result<(), redb::Error> {
        self.sessions.insert((origin, seq), session)?;
        Ok(())
    }

    /// Forgets what is known of an origin's sessions but for that of its mark, from which it is listed.
    pub(crate) fn forget_sessions(&mut self, origin: u32, mark: Mark) -> Result<(), redb::Error> {
        self.sessions.retain_in((origin, 0)..=(origin, u64::MAX), |_, _| false)?;
        self.begin_session(origin, mark.seq, mark.session)
    }

    /// Forgets the changes before the last `limit` ones, and with them the rows of deletions that they made.
    pub(crate) fn trim(&mut self, origin: u32, head: &mut HeadRow, limit: u64) -> Result<(), redb::Error> {
        let floor = head.mark.seq.saturating_sub(limit);
        let mut forgotten = Vec::new();
        for row in self.log.range((origin, 0)..=(origin, floor))? {
            forgotten.push(decode::<LogRow>(row?.1.value())?);
        }
        // Of the sessions before the floor, the last one said it.
        if let Some(session) = Some(self.session_of(origin, floor)?).filter(|_| !forgotten.is_empty()) {
            self.sessions.retain_in((origin, 0)..=(origin, floor), |_, _| false)?;
            self.begin_session(origin, floor, session)?;
        }
        for LogRow { key: (arena, path), version, .. } in forgotten {
            self.log.remove((origin, version.seq))?;
            if version.content.is_present() {
                continue;
            }
            let now = self.versions.get((arena.as_str(), path.as_bytes(), origin))?;
            let now = now.map(|now| decode::<Version>(now.value())).transpose()?;
            // A seq may have been said twice, before and after an older copy of the origin's rows was restored.
            if now.is_some_and(|now| now == version) {
                self.remove(arena.as_str(), path.as_bytes(), origin)?;
                head.rows = head.rows.saturating_sub(1);
            }
        }
        head.floor = head.floor.max(floor);
        Ok(())
    }

    /// Removes the rows of an origin with keys behind `after` up to `end` that are not among `told`, which are in order.
    /// Returns how many.
    pub(crate) fn sweep(
        &mut self,
        origin: u32,
        after: Option<&Key>,
        end: Option<&Key>,
        told: &[Statement],
    ) -> Result<u64, redb::Error> {
        let mut swept = 0;
        let mut after = after.map(|(arena, path)| (arena.as_str().to_owned(), path.as_bytes().to_owned()));
        loop {
            let (mut stale, mut last) = (Vec::new(), None);
            let from = after.as_ref().map(|(arena, path)| (&arena[..], &path[..], u32::MAX));
            let to = end.map(|(arena, path)| (arena.as_str(), path.as_bytes(), u32::MAX));
            let bounds = (from.map_or(Bound::Unbounded, Bound::Excluded), to.map_or(Bound::Unbounded, Bound::Included));
            for row in self.versions.range::<(&str, &[u8], u32)>(bounds)? {
                let key = row?.0;
                let (arena, path, of) = key.value();
                let is_told = |at: &Statement| (at.arena.as_str(), at.path.as_bytes()).cmp(&(arena, path));
                if of == origin && told.binary_search_by(is_told).is_err() {
                    stale.push((arena.to_owned(), path.to_owned()));
                    if stale.len() == SWEPT_AT_ONCE {
                        last = stale.last().cloned();
                        break;
                    }
                }
            }
            for (arena, path) in &stale {
                self.remove(arena, path, origin)?;
            }
            swept += stale.len() as u64;
            match last {
                Some(last) => after = Some(last),
                None => return Ok(swept),
            }
        }
    }
}

/// What stands for a blob in the rows that tell who has it.
pub(crate) fn prefix(blob: BlobId) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *blob.as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// How many rows are held in memory while a listing replaces them.
const SWEPT_AT_ONCE: usize = 4096;
