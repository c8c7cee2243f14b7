//! What a machine decides about moves: which trees leave it, which it keeps for moves that come in, and what is set aside.
//! Values in, values out; the time is passed in. Files, rows and orders are elsewhere. Cases: spec/copy.md, "Moves".
//!
//! [`Moves`] is the part of the source and of the destination, [`Crossing`] that of the machine that directs. A model drives
//! both through any interleaving, crashes and losses (moves/model.rs).

use std::{collections::BTreeMap, time::Duration};

use namespace::{ArenaName, PeerId, RelPath};
use peers::{Done, MoveId, Why};
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

/// A path in an arena.
pub(super) type Spot = (ArenaName, RelPath);

/// An arena, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Tree {
    pub(super) arena: ArenaName,
    /// `None` is the whole arena.
    pub(super) path: Option<RelPath>,
}

/// A tree that is kept here for a move.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) id: MoveId,
    pub(super) tree: Tree,
    /// The machine that the move takes from, which knows whether it is over.
    pub(super) source: PeerId,
    /// The arena there.
    pub(super) source_arena: ArenaName,
}

/// What one machine knows of moves. All but what is kept is lost when the machine restarts: then nothing leaves it, and what
/// was set aside is put back before anything else is done.
#[derive(Debug, Default)]
pub(super) struct Moves {
    leaving: Vec<Leaving>,
    kept: Vec<Kept>,
    aside: BTreeMap<Spot, Aside>,
}

/// A tree that leaves.
#[derive(Debug)]
struct Leaving {
    id: MoveId,
    tree: Tree,
    /// When an order of the move came last.
    heard: Duration,
}

/// An entry that is not at its path for the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Aside {
    id: MoveId,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It is about to be set aside.
    Preparing,
    /// It is in the directory of this number.
    Standing(u64),
    /// It is being removed or put back.
    Ending,
}

/// Why something may not be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The tree leaves this machine.
    Leaving(Tree),
    /// The tree is kept for a move.
    Kept(Box<Kept>),
    /// The entry is set aside, or about to be.
    SetAside,
    /// The move does not take from here, or not any more.
    NotLeaving,
    /// Nothing is kept here for the move, or not any more.
    NotKept,
    /// A bound is reached.
    TooMany,
}

/// What became of an entry's preparation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prepared {
    /// It may be told of.
    Standing,
    /// The move was given up meanwhile: it is to be put back.
    Unwanted,
}

/// Whether a move that left from here is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Over {
    /// Once these are put back: nothing is removed for it any more.
    Yes(Vec<(Spot, u64)>),
    /// Something may still be removed for it.
    No,
}

impl Tree {
    pub(super) fn has(&self, (arena, path): &Spot) -> bool {
        self.arena == *arena && self.path.as_ref().is_none_or(|top| path.is_within(top))
    }

    fn overlaps(&self, other: &Self) -> bool {
        let is_within = |inner: &Option<RelPath>, outer: &Option<RelPath>| match (inner, outer) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(inner), Some(outer)) => inner.is_within(outer),
        };
        self.arena == other.arena && (is_within(&self.path, &other.path) || is_within(&other.path, &self.path))
    }
}

impl Moves {
    /// With what was kept when the machine stopped.
    pub(super) fn new(kept: Vec<Kept>) -> Self {
        Self { kept, ..Self::default() }
    }

    /// Marks a tree as leaving, or notes that it still does. Fails if some of it is kept for another move.
    pub(super) fn leave(&mut self, id: MoveId, tree: &Tree, now: Duration) -> Result<(), Refusal> {
        if let Some(kept) = self.kept.iter().find(|kept| kept.tree.overlaps(tree)) {
            return Err(Refusal::Kept(Box::new(kept.clone())));
        }
        if let Some(known) = self.leaving.iter_mut().find(|known| known.id == id && known.tree == *tree) {
            known.heard = now;
            return Ok(());
        }
        if self.leaving.len() >= TREES_MAX {
            return Err(Refusal::TooMany);
        }
        self.leaving.push(Leaving { id, tree: tree.clone(), heard: now });
        Ok(())
    }

    /// Keeps a tree for a move. Returns whether that is new. Fails if some of it leaves.
    pub(super) fn keep(&mut self, kept: &Kept) -> Result<bool, Refusal> {
        if let Some(leaving) = self.leaving.iter().find(|leaving| leaving.tree.overlaps(&kept.tree)) {
            return Err(Refusal::Leaving(leaving.tree.clone()));
        }
        if self.kept.contains(kept) {
            return Ok(false);
        }
        if self.kept.len() >= TREES_MAX {
            return Err(Refusal::TooMany);
        }
        self.kept.push(kept.clone());
        Ok(true)
    }

    /// Keeps a tree no more.
    pub(super) fn release(&mut self, kept: &Kept) {
        self.kept.retain(|other| other != kept);
    }

    /// What is kept for a move.
    pub(super) fn kept_for(&self, id: MoveId) -> Vec<Kept> {
        self.kept.iter().filter(|kept| kept.id == id).cloned().collect()
    }

    /// Whether something may be put at a path now, in place of another file or link if it `replaces` one, as a part of a move
    /// if there is an `id`.
    pub(super) fn may_place(&self, spot: &Spot, replaces: bool, id: Option<MoveId>) -> Result<(), Refusal> {
        if let Some(leaving) = self.leaving.iter().find(|leaving| leaving.tree.has(spot)) {
            return Err(Refusal::Leaving(leaving.tree.clone()));
        }
        // The tree may have been given up; what is being put back needs its name all the same.
        if self.is_aside(spot) {
            return Err(Refusal::SetAside);
        }
        let for_others = |kept: &&Kept| replaces && kept.tree.has(spot) && Some(kept.id) != id;
        match self.kept.iter().find(for_others) {
            Some(kept) => Err(Refusal::Kept(Box::new(kept.clone()))),
            None => Ok(()),
        }
    }

    /// Begins to set an entry aside. Returns the number of the directory if that is done already. [`Moves::prepared`] or
    /// [`Moves::ended`] must follow.
    pub(super) fn prepare(&mut self, id: MoveId, spot: &Spot, now: Duration) -> Result<Option<u64>, Refusal> {
        self.leaves_for(id, spot, now)?;
        if let Some(kept) = self.kept.iter().find(|kept| kept.tree.has(spot)) {
            return Err(Refusal::Kept(Box::new(kept.clone())));
        }
        match self.aside.get(spot) {
            Some(Aside { id: of, state: State::Standing(number) }) if *of == id => return Ok(Some(*number)),
            Some(_) => return Err(Refusal::SetAside),
            None if self.aside.len() >= ASIDE_MAX => return Err(Refusal::TooMany),
            None => {}
        }
        self.aside.insert(spot.clone(), Aside { id, state: State::Preparing });
        Ok(None)
    }

    /// An entry is set aside, in the directory of this number.
    pub(super) fn prepared(&mut self, spot: &Spot, number: u64) -> Prepared {
        let Some(aside) = self.aside.get_mut(spot) else { return Prepared::Unwanted };
        let is_wanted = self.leaving.iter().any(|leaving| leaving.id == aside.id && leaving.tree.has(spot));
        aside.state = if is_wanted { State::Standing(number) } else { State::Ending };
        if is_wanted { Prepared::Standing } else { Prepared::Unwanted }
    }

    /// The move that has set aside the entry of a path, if one has.
    pub(super) fn set_aside_by(&self, spot: &Spot) -> Option<MoveId> {
        self.aside.get(spot).map(|aside| aside.id)
    }

    /// Whether the entry of a path is set aside, so that nothing is there and yet nothing is gone.
    pub(super) fn is_aside(&self, spot: &Spot) -> bool {
        self.aside.contains_key(spot)
    }

    /// Whether the destination may answer for an entry: it is kept for the move, and does not leave. What is there must be
    /// looked at after this.
    pub(super) fn confirm(&self, id: MoveId, spot: &Spot) -> Result<(), Refusal> {
        if let Some(leaving) = self.leaving.iter().find(|leaving| leaving.tree.has(spot)) {
            return Err(Refusal::Leaving(leaving.tree.clone()));
        }
        match self.kept.iter().any(|kept| kept.id == id && kept.tree.has(spot)) {
            true => Ok(()),
            false => Err(Refusal::NotKept),
        }
    }

    /// Begins to remove an entry that was set aside, or to put it back. [`Moves::ended`] must follow.
    pub(super) fn finish(&mut self, id: MoveId, spot: &Spot, number: u64, now: Duration) -> Result<(), Refusal> {
        let leaves = self.leaves_for(id, spot, now);
        match self.aside.get_mut(spot) {
            // It was ordered before, and has yet to be done.
            Some(aside) if *aside == (Aside { id, state: State::Ending }) => Err(Refusal::SetAside),
            Some(aside) if *aside == (Aside { id, state: State::Standing(number) }) => {
                leaves?;
                aside.state = State::Ending;
                Ok(())
            }
            _ => Err(Refusal::NotLeaving),
        }
    }

    /// An entry is neither set aside any more, nor about to be.
    pub(super) fn ended(&mut self, spot: &Spot) {
        self.aside.remove(spot);
    }

    /// Whether something is just being set aside, removed or put back for a move.
    pub(super) fn is_moving(&self, id: MoveId) -> bool {
        self.aside.values().any(|aside| aside.id == id && !matches!(aside.state, State::Standing(_)))
    }

    /// Ends a move that takes from here. Returns what is to be put back. The move is over once that is done and nothing
    /// [is moving](Self::is_moving) for it.
    pub(super) fn end(&mut self, id: MoveId) -> Vec<(Spot, u64)> {
        self.leaving.retain(|leaving| leaving.id != id);
        let standing = self.aside.iter_mut().filter(|(_, aside)| aside.id == id).filter_map(|(spot, aside)| {
            let State::Standing(number) = aside.state else { return None };
            aside.state = State::Ending;
            Some((spot.clone(), number))
        });
        standing.collect()
    }

    /// The moves that take from here and of which nothing was heard for long.
    pub(super) fn silent(&self, now: Duration) -> Vec<MoveId> {
        self.leaving.iter().map(|leaving| leaving.id).filter(|&id| self.is_silent(id, now)).collect()
    }

    /// Gives up the moves of which nothing was heard for long. Returns what is to be put back.
    pub(super) fn expire(&mut self, now: Duration) -> Vec<(Spot, u64)> {
        self.silent(now).into_iter().flat_map(|id| self.end(id)).collect()
    }

    /// Ends all moves that take from here. Returns what is to be put back.
    pub(super) fn end_all(&mut self) -> Vec<(Spot, u64)> {
        let ids: Vec<MoveId> = self.leaving.iter().map(|leaving| leaving.id).collect();
        ids.into_iter().flat_map(|id| self.end(id)).collect()
    }

    /// Whether a move that left from here is over. One of which nothing was heard for long is given up.
    pub(super) fn is_over(&mut self, id: MoveId, now: Duration) -> Over {
        let is_known = self.leaving.iter().any(|leaving| leaving.id == id);
        if self.is_moving(id) || is_known && !self.is_silent(id, now) { Over::No } else { Over::Yes(self.end(id)) }
    }

    /// Whether nothing leaves: there is nothing that could expire.
    pub(super) fn is_quiet(&self) -> bool {
        self.leaving.is_empty()
    }

    fn is_silent(&self, id: MoveId, now: Duration) -> bool {
        let mut heard = self.leaving.iter().filter(|leaving| leaving.id == id).map(|leaving| leaving.heard);
        heard.all(|heard| now.saturating_sub(heard) >= SILENCE_LIMIT)
    }

    /// Makes sure that a move takes from here, and notes that it was heard of.
    fn leaves_for(&mut self, id: MoveId, spot: &Spot, now: Duration) -> Result<(), Refusal> {
        let mut known = self.leaving.iter_mut().filter(|leaving| leaving.id == id && leaving.tree.has(spot));
        known.next().map(|leaving| leaving.heard = now).ok_or(Refusal::NotLeaving)
    }
}

impl Refusal {
    pub(super) fn why(&self) -> Why {
        match self {
            Self::Leaving(_) | Self::Kept(_) | Self::SetAside => Why::Busy,
            Self::NotLeaving | Self::NotKept => Why::Over,
            Self::TooMany => Why::Full,
        }
    }
}

/// One entry of a move, as the machine that directs it sees it: what it asks next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crossing {
    /// Have the destination place it.
    Place,
    /// Have the source set it aside.
    Prepare,
    /// Have the destination confirm that its own is still there.
    Confirm { aside: u64 },
    /// Have the source remove it, or put it back.
    Finish { aside: u64, remove: bool },
    /// It is at the destination alone.
    Moved,
    /// It stays at the source.
    Stays,
    /// Nobody says whether it was removed: what the destination has is not to be released.
    Unknown,
}

impl Crossing {
    /// What follows from an answer; `None` if none came.
    pub(super) fn answered(self, answer: Option<&Done>) -> Self {
        match (self, answer) {
            (Self::Place, Some(Done::Placed { .. } | Done::There { .. })) => Self::Prepare,
            (Self::Prepare, Some(&Done::Prepared { aside })) => Self::Confirm { aside },
            // It is gone: somebody has removed it.
            (Self::Prepare, Some(Done::Removed)) => Self::Moved,
            (Self::Confirm { aside }, Some(Done::Confirmed)) => Self::Finish { aside, remove: true },
            (Self::Confirm { aside }, _) => Self::Finish { aside, remove: false },
            (Self::Finish { remove: true, .. }, Some(Done::Removed)) => Self::Moved,
            (Self::Finish { remove: true, .. }, None | Some(Done::Failed { why: Why::Busy, .. })) => Self::Unknown,
            _ => Self::Stays,
        }
    }
}

/// How many trees leave, and how many are kept, at most.
const TREES_MAX: usize = 1024;
/// How many entries are set aside at most.
const ASIDE_MAX: usize = 4096;
/// How long nothing is heard of a move before it counts as given up.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(60);
