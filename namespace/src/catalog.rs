use std::{collections::BTreeMap, mem, ops::RangeInclusive};

use redb::ReadableTable;
use serde::{Deserialize, Serialize};

use crate::{
    ArenaName, Namespace, NamespaceError, PeerId, RelPath, Version,
    namespace::{find_head, peer_number},
    rows::{HEADS, HeadRow, LogRow, ME, PEERS, decode},
    tables::Tables,
};

/// Where a row is: its arena and path, ordered in this order.
pub type Key = (ArenaName, RelPath);

/// Everything of a log up to `seq` was heard. The default is nothing at all. Later marks of one origin are greater.
///
/// Where an older copy of an origin's rows was restored, two marks of one seq stand for different logs. Ordering them by
/// session, too, lets one of them win everywhere, whose word the origin then hears and mends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mark {
    /// The log's epoch; 0 stands for none. A later one is greater.
    pub epoch: u64,
    /// The number of the last change heard.
    pub seq: u64,
    /// The session of the origin in which that was said.
    pub session: u64,
}

/// How far an origin's catalog was heard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// What was heard; if a listing is coming, as of when that is.
    pub mark: Mark,
    /// If a listing is coming, the key up to which it came.
    pub after: Option<Key>,
}

/// One row of a catalog as its origin says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// The arena.
    pub arena: ArenaName,
    /// The path.
    pub path: RelPath,
    /// What is there, since which change.
    pub version: Version,
    /// When the origin noticed, in milliseconds since 1970 by its clock; 0 in listings.
    pub at: u64,
}

/// A part of an origin's catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Whose statements these are.
    pub origin: PeerId,
    /// What has been heard behind this batch; of a listing, as of when it is.
    pub mark: Mark,
    /// Which part of the catalog this is.
    pub part: Part,
    /// The rows.
    pub statements: Vec<Statement>,
}

/// Which part of a catalog a batch is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// What was said behind the mark `after`, up to the batch's, by ascending seq; each path at its last change only.
    Changes {
        /// From where they go on; of the same epoch.
        after: Mark,
        /// The sessions that began behind it: the first seq of each, and its number.
        sessions: Vec<(u64, u64)>,
    },
    /// All that is present, by ascending key.
    Listing {
        /// Behind which key; `None` is the start.
        after: Option<Key>,
        /// Up to which key, inclusive; `None` is the end of everything.
        end: Option<Key>,
    },
}

/// Why a batch was refused.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The batch breaks the rules of spec/namespace.md.
    #[error("the catalog is invalid: {0}")]
    PeerMisbehaved(&'static str),
    /// Our database failed.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It was taken in.
    Taken,
    /// Something else came first: nothing was changed.
    PassedOver,
}

impl Batch {
    /// Whether this says that its origin left for good.
    pub fn is_farewell(&self) -> bool {
        self.mark.seq == u64::MAX
    }

    /// Checks what must hold of any batch: spec/namespace.md, "Applying".
    fn check(&self) -> Result<(), &'static str> {
        if self.mark.epoch == 0 || self.mark.epoch >= EPOCH_MAX {
            return Err("its epoch is out of bounds");
        }
        if self.statements.iter().any(|statement| !statement.version.is_valid()) {
            return Err("a version is out of bounds");
        }
        if self.is_farewell()
            && (!self.statements.is_empty() || self.part != (Part::Listing { after: None, end: None }))
        {
            return Err("its farewell says more");
        }
        match &self.part {
            Part::Changes { after, sessions } => {
                if after.epoch != self.mark.epoch || after.seq > self.mark.seq {
                    return Err("it runs backwards");
                }
                let told = after.seq..=self.mark.seq;
                if !ascend(&told, self.statements.iter().map(|statement| statement.version.seq)) {
                    return Err("its changes are out of order");
                }
                if !ascend(&told, sessions.iter().map(|(first, _)| *first))
                    || self.session_of(self.mark.seq) != Some(self.mark.session)
                {
                    return Err("its sessions are out of order");
                }
            }
            Part::Listing { after, end } => {
                if self.statements.iter().any(|statement| !statement.version.content.is_present()) {
                    return Err("a version is out of bounds");
                }
                let mut last = after.as_ref().map(|(arena, path)| (arena, path));
                for Statement { arena, path, .. } in &self.statements {
                    if last.replace((arena, path)).is_some_and(|last| last >= (arena, path)) {
                        return Err("its listing is out of order");
                    }
                }
                if end.as_ref().is_some_and(|(arena, path)| last.is_none_or(|last| last > (arena, path))) {
                    return Err("its listing is out of order");
                }
            }
        }
        Ok(())
    }

    /// The session in which `seq` was said, if this is changes and they tell.
    fn session_of(&self, seq: u64) -> Option<u64> {
        let Part::Changes { after, sessions } = &self.part else { return None };
        let begun = sessions.iter().take_while(|(first, _)| *first <= seq).last();
        (after.seq <= seq).then_some(begun.map_or(after.session, |(_, session)| *session))
    }

    /// The head behind this batch, if it is to be taken in at `head`.
    fn follow(&self, head: &HeadRow) -> Option<HeadRow> {
        let (ours, theirs) = (head.mark, self.mark);
        match &self.part {
            Part::Changes { .. } => {
                let follows = head.after.is_none()
                    && ours.epoch == theirs.epoch
                    && ours.seq < theirs.seq
                    && self.session_of(ours.seq) == Some(ours.session);
                follows.then(|| HeadRow { mark: self.mark, ..head.clone() })
            }
            Part::Listing { after, end } => {
                let follows = match after {
                    // A farewell that was contested is heeded once its origin is trusted no more.
                    None => theirs > ours || theirs == ours && (head.after.is_some() || self.is_farewell()),
                    Some(_) => *after == head.after && theirs == ours,
                };
                let mut head = HeadRow { mark: self.mark, after: end.clone(), ..head.clone() };
                if end.is_none() {
                    (head.floor, head.heard) = (self.mark.seq, true);
                }
                follows.then_some(head)
            }
        }
    }
}

impl Namespace {
    /// How far `origin`'s catalog has been heard.
    pub fn cursor(&self, origin: PeerId) -> Result<Cursor, NamespaceError> {
        let head = self.read("look up a peer", |txn| find_head(txn, origin))?.unwrap_or_default();
        Ok(Cursor { mark: head.mark, after: head.after })
    }

    /// How far the catalogs of all others that are known have been heard, by peer.
    pub fn cursors(&self) -> Result<BTreeMap<PeerId, Cursor>, NamespaceError> {
        self.read("look up all peers", |txn| {
            let (peers, heads) = (txn.open_table(PEERS)?, txn.open_table(HEADS)?);
            let mut cursors = BTreeMap::new();
            for row in peers.iter()? {
                let (peer, number) = row?;
                if let Some(head) = heads.get(number.value())? {
                    let head: HeadRow = decode(head.value())?;
                    let cursor = Cursor { mark: head.mark, after: head.after };
                    cursors.insert(PeerId::from_bytes(*peer.value()), cursor);
                }
            }
            Ok(cursors)
        })
    }

    /// Whether all of `peer`'s catalog has been heard once: not if nothing has, or if its first listing is still coming.
    pub fn is_complete(&self, peer: PeerId) -> Result<bool, NamespaceError> {
        let head = self.read("look up a peer", |txn| find_head(txn, peer))?;
        Ok(head.is_some_and(|head| head.heard && head.mark.seq != u64::MAX))
    }

    /// Who told last of `origin`: itself, or a peer that passed it on.
    pub fn told_by(&self, origin: PeerId) -> Result<Option<PeerId>, NamespaceError> {
        self.read("look up a peer", |txn| {
            let Some(head) = find_head(txn, origin)? else { return Ok(None) };
            for row in txn.open_table(PEERS)?.iter()? {
                let (peer, number) = row?;
                if number.value() == head.via {
                    return Ok(Some(PeerId::from_bytes(*peer.value())));
                }
            }
            Ok(None)
        })
    }

    /// Takes in what `teller` says, in one commit, durable on return. Whatever comes early, late or twice is passed over.
    pub fn apply(&self, teller: PeerId, batch: &Batch) -> Result<Applied, ApplyError> {
        batch.check().map_err(ApplyError::PeerMisbehaved)?;
        let origin = batch.origin;
        if origin == self.me() {
            return Ok(Applied::PassedOver);
        }
        let known = self.read("look up a peer", |txn| find_head(txn, origin))?.unwrap_or_default();
        if batch.follow(&known).is_none() {
            return Ok(Applied::PassedOver);
        }
        let mut refused = None;
        let applied = self.write_if("take in a catalog", |txn| {
            let number = peer_number(txn, origin)?;
            let via = if teller == origin { number } else { peer_number(txn, teller)? };
            if number > ORIGINS_MAX || via > ORIGINS_MAX {
                refused = Some("there are too many peers");
                return Ok(None);
            }
            let mut tables = Tables::open(txn, &self.recent)?;
            let known = tables.head(number)?;
            let Some(mut head) = batch.follow(&known) else { return Ok(None) };
            head.via = via;
            match &batch.part {
                Part::Changes { sessions, .. } => {
                    for (first, session) in sessions.iter().filter(|(first, _)| *first > known.mark.seq) {
                        tables.begin_session(number, *first, *session)?;
                    }
                    let news = batch.statements.iter().filter(|statement| statement.version.seq > known.mark.seq);
                    for Statement { arena, path, version, at } in news {
                        head.rows += u64::from(tables.put(arena.as_str(), path.as_bytes(), number, version)?);
                        let key = (arena.clone(), path.clone());
                        tables.note(number, &LogRow { key, version: version.clone(), at: *at })?;
                    }
                    tables.flush()?;
                    tables.trim(number, &mut head, self.history_limit())?;
                }
                Part::Listing { after, end } => {
                    if known.mark.epoch != head.mark.epoch {
                        tables.forget_log(number)?;
                    }
                    tables.forget_sessions(number, head.mark)?;
                    for Statement { arena, path, version, .. } in &batch.statements {
                        head.rows += u64::from(tables.put(arena.as_str(), path.as_bytes(), number, version)?);
                    }
                    tables.flush()?;
                    let swept = tables.sweep(number, after.as_ref(), end.as_ref(), &batch.statements)?;
                    head.rows = head.rows.saturating_sub(swept);
                }
            }
            if head.rows > ORIGIN_ROWS_MAX {
                refused = Some("it has too many rows");
                return Ok(None);
            }
            tables.set_head(number, &head)?;
            Ok(Some(()))
        })?;
        if let Some(why) = refused {
            return Err(ApplyError::PeerMisbehaved(why));
        }
        if applied.is_none() {
            return Ok(Applied::PassedOver);
        }
        self.notify();
        Ok(Applied::Taken)
    }

    /// Forgets everything that `peer` has said, and tells so as its farewell.
    pub fn forget_peer(&self, peer: PeerId) -> Result<(), ApplyError> {
        let known = self.cursor(peer)?;
        if known.mark.epoch != 0 {
            let mark = Mark { seq: u64::MAX, ..known.mark };
            let part = Part::Listing { after: None, end: None };
            self.apply(peer, &Batch { origin: peer, mark, part, statements: Vec::new() })?;
        }
        Ok(())
    }

    /// Takes note that somebody said farewell for `peer`, which is trusted here: what it has stays in view, and it will be
    /// shown that mark when it is asked next, and begin a new epoch.
    pub fn contest_farewell(&self, peer: PeerId, farewell: Mark) -> Result<(), NamespaceError> {
        let contested = self.write_if("contest a farewell", |txn| {
            let number = peer_number(txn, peer)?;
            let mut tables = Tables::open(txn, &self.recent)?;
            let head = tables.head(number)?;
            if head.mark >= farewell || farewell.epoch >= EPOCH_MAX {
                return Ok(None);
            }
            tables.set_head(number, &HeadRow { mark: farewell, after: None, ..head })?;
            Ok(Some(()))
        })?;
        if contested.is_some() {
            self.notify();
        }
        Ok(())
    }

    /// Begins a new epoch if what a peer has heard of this machine was not said by it, so far as its own rows tell: they
    /// were lost, or are an older copy. Tells whether it has.
    pub fn renew_if_lost(&self, heard: Mark) -> Result<bool, NamespaceError> {
        let renewed = self.write_if("compare with what a peer has heard", |txn| {
            let mut tables = Tables::open(txn, &self.recent)?;
            let head = tables.head(ME)?;
            // Whoever heard less than the log reaches back to gets a listing in any case.
            let other_session =
                || Ok::<_, redb::Error>(heard.seq >= head.floor && heard.session != tables.session_of(ME, heard.seq)?);
            let is_lost = heard.epoch > head.mark.epoch
                || heard.epoch == head.mark.epoch && (heard.seq > head.mark.seq || other_session()?);
            if !is_lost {
                return Ok(None);
            }
            let epoch = ((heard.epoch.max(head.mark.epoch) >> 32) + 1) << 32 | self.session() & 0xffff_ffff;
            if epoch >= EPOCH_MAX {
                return Ok(None);
            }
            let mark = Mark { epoch, ..head.mark };
            tables.set_head(ME, &HeadRow { mark, ..head })?;
            Ok(Some(()))
        })?;
        if renewed.is_some() {
            self.notify();
        }
        Ok(renewed.is_some())
    }
}

/// Whether these seqs ascend behind the start of `told` up to its end.
fn ascend(told: &RangeInclusive<u64>, mut seqs: impl Iterator<Item = u64>) -> bool {
    let mut last = *told.start();
    seqs.all(|seq| mem::replace(&mut last, seq) < seq && seq <= *told.end())
}

/// Epochs are below this.
const EPOCH_MAX: u64 = 1 << 63;
/// How many rows are taken of one origin.
const ORIGIN_ROWS_MAX: u64 = 20_000_000;
/// How many other machines are known at most.
const ORIGINS_MAX: u32 = 1000;
