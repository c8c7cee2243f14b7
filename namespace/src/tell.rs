use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use redb::{ReadTransaction, ReadableTable};

use crate::{
    Batch, Cursor, Key, Mark, Namespace, NamespaceError, Part, PeerId, Statement, Version,
    namespace::{arena_name, rel_path, session_of},
    rows::{HEADS, HeadRow, LOG, LogRow, ME, PEERS, SESSIONS, VERSIONS, decode},
};

/// What a listener has been told, and what it need not be.
#[derive(Debug, Clone)]
pub struct Told {
    /// Who listens.
    pub listener: PeerId,
    /// How far it has heard whom.
    pub cursors: BTreeMap<PeerId, Cursor>,
    /// Whom it hears directly; that one who is asked may be among them.
    pub direct: BTreeSet<PeerId>,
}

impl Told {
    /// Takes note that `batch` was told.
    pub fn note(&mut self, batch: &Batch) {
        let after = match &batch.part {
            Part::Changes { .. } => None,
            Part::Listing { end, .. } => end.clone(),
        };
        self.cursors.insert(batch.origin, Cursor { mark: batch.mark, after });
    }
}

impl Namespace {
    /// What is to be told next: about `bytes_max` bytes of it and at least one row, or `None` if there is nothing new.
    /// This machine's own catalog comes last: who has heard all of it has heard what is passed on, too.
    pub fn tell(&self, told: &Told, bytes_max: usize) -> Result<Option<Batch>, NamespaceError> {
        self.read("read the catalogs", |txn| {
            for row in txn.open_table(PEERS)?.iter()? {
                let (peer, number) = row?;
                let origin = PeerId::from_bytes(*peer.value());
                if origin == told.listener || told.direct.contains(&origin) {
                    continue;
                }
                if let Some(batch) = self.tell_of(txn, origin, number.value(), told, bytes_max)? {
                    return Ok(Some(batch));
                }
            }
            self.tell_of(txn, self.me(), ME, told, bytes_max)
        })
    }

    fn tell_of(
        &self,
        txn: &ReadTransaction,
        origin: PeerId,
        number: u32,
        told: &Told,
        bytes_max: usize,
    ) -> Result<Option<Batch>, redb::Error> {
        let head = txn.open_table(HEADS)?.get(number)?.map(|row| decode::<HeadRow>(row.value())).transpose()?;
        let Some(head) = head.filter(|head| head.heard && head.after.is_none()) else { return Ok(None) };
        if head.mark.seq == u64::MAX && head.rows > 0 {
            // A contested farewell: its origin will say what is so.
            return Ok(None);
        }
        let cursor = told.cursors.get(&origin).cloned().unwrap_or_default();
        let sessions = txn.open_table(SESSIONS)?;
        let in_log = (head.floor..=head.mark.seq).contains(&cursor.mark.seq)
            && cursor.mark.session == session_of(&sessions, number, cursor.mark.seq)?;
        let batch = match cursor {
            Cursor { mark, .. } if mark.epoch > head.mark.epoch => return Ok(None),
            Cursor { mark, .. } if mark.epoch < head.mark.epoch => {
                self.list_from(txn, number, head.mark, None, bytes_max)
            }
            Cursor { mark, after: Some(after) } if in_log => self.list_from(txn, number, mark, Some(after), bytes_max),
            Cursor { mark, after: Some(_) } if mark > head.mark => return Ok(None),
            Cursor { after: Some(_), .. } => self.list_from(txn, number, head.mark, None, bytes_max),
            Cursor { mark, after: None } if mark >= head.mark => return Ok(None),
            Cursor { mark, after: None } if in_log => changes_after(txn, number, &head, mark, bytes_max),
            Cursor { after: None, .. } => self.list_from(txn, number, head.mark, None, bytes_max),
        };
        let (mark, part, statements) = batch?;
        Ok(Some(Batch { origin, mark, part, statements }))
    }

    fn list_from(
        &self,
        txn: &ReadTransaction,
        number: u32,
        mark: Mark,
        after: Option<Key>,
        bytes_max: usize,
    ) -> Result<(Mark, Part, Vec<Statement>), redb::Error> {
        let table = txn.open_table(VERSIONS)?;
        let from = after.as_ref().map(|(arena, path)| (arena.as_str(), path.as_bytes(), u32::MAX));
        let (mut statements, mut bytes) = (Vec::<Statement>::new(), 0);
        for row in table.range((from.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded))? {
            let (key, row) = row?;
            let (arena, path, of) = key.value();
            if of != number {
                continue;
            }
            if let Some(last) = statements.last().filter(|_| bytes >= bytes_max) {
                let end = Some((last.arena.clone(), last.path.clone()));
                return Ok((mark, Part::Listing { after, end }, statements));
            }
            let version: Version = decode(row.value())?;
            if version.content.is_present() {
                bytes += arena.len() + path.len() + row.value().len();
                statements.push(Statement { arena: arena_name(arena)?, path: rel_path(path)?, version, at: 0 });
            }
        }
        Ok((mark, Part::Listing { after, end: None }, statements))
    }
}

fn changes_after(
    txn: &ReadTransaction,
    number: u32,
    head: &HeadRow,
    after: Mark,
    bytes_max: usize,
) -> Result<(Mark, Part, Vec<Statement>), redb::Error> {
    let (log, versions) = (txn.open_table(LOG)?, txn.open_table(VERSIONS)?);
    let (mut statements, mut bytes, mut mark) = (Vec::<Statement>::new(), 0, head.mark);
    let begun = txn.open_table(SESSIONS)?;
    let mut last = after.seq;
    for (looked_at, row) in log.range((number, after.seq + 1)..=(number, head.mark.seq))?.enumerate() {
        if bytes >= bytes_max && !statements.is_empty() || looked_at == LOOKED_AT_MAX {
            mark = Mark { seq: last, session: session_of(&begun, number, last)?, ..mark };
            break;
        }
        let (key, row) = row?;
        last = key.value().1;
        let LogRow { key: (arena, path), version, at } = decode(row.value())?;
        // A later change of the path says all there is to say.
        let now = versions.get((arena.as_str(), path.as_bytes(), number))?;
        let now = now.map(|now| decode::<Version>(now.value())).transpose()?;
        if now.is_some_and(|now| now.seq == key.value().1) {
            bytes += row.value().len();
            statements.push(Statement { arena, path, version, at });
        }
    }
    let begun = begun.range((number, after.seq + 1)..=(number, mark.seq))?;
    let sessions = begun.map(|row| row.map(|(key, session)| (key.value().1, session.value())));
    Ok((mark, Part::Changes { after, sessions: sessions.collect::<Result<_, _>>()? }, statements))
}

/// How many rows of the log one batch goes through: as many sessions may have begun in them.
const LOOKED_AT_MAX: usize = 16384;
