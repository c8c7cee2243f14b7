//! Which paths changed last, for those who keep what they made of them.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::Key;

/// The paths of which a row was written or removed in the last commits.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    turn: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many transactions were committed.
    generation: u64,
    /// Each with the generation that it made; the oldest first.
    keys: VecDeque<(u64, Key)>,
    /// All that changed behind this generation is in `keys`.
    floor: u64,
    /// Of the transaction that is open.
    open: Vec<Key>,
    /// Whether there were more.
    overflowed: bool,
}

impl Recent {
    /// Keeps other transactions from beginning.
    pub(crate) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a row that the open transaction writes or removes.
    pub(crate) fn touch(&self, key: Key) {
        let mut state = self.state();
        if state.open.len() < KEYS_MAX {
            state.open.push(key);
        } else {
            state.overflowed = true;
        }
    }

    /// The open transaction is committed, or it never was.
    pub(crate) fn end(&self, is_committed: bool) {
        let mut state = self.state();
        let (open, overflowed) = (std::mem::take(&mut state.open), std::mem::take(&mut state.overflowed));
        if !is_committed {
            return;
        }
        state.generation += 1;
        let generation = state.generation;
        state.keys.extend(open.into_iter().map(|key| (generation, key)));
        if overflowed {
            state.floor = generation;
        }
        while state.keys.len() > KEYS_MAX {
            let forgotten = state.keys.pop_front();
            state.floor = state.floor.max(forgotten.map_or(0, |(generation, _)| generation));
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.state().generation
    }

    /// What changed behind `generation`, or `None` if that is too much.
    pub(crate) fn since(&self, generation: u64) -> Option<Vec<Key>> {
        let state = self.state();
        if generation < state.floor {
            return None;
        }
        let from = state.keys.partition_point(|&(at, _)| at <= generation);
        Some(state.keys.range(from..).map(|(_, key)| key.clone()).collect())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// So many changes are remembered.
const KEYS_MAX: usize = 16_384;

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> Key {
        ("arena".parse().unwrap(), format!("{number}").into_bytes().try_into().unwrap())
    }

    #[test]
    fn what_was_committed_is_told_until_it_is_too_much() {
        let recent = Recent::default();
        assert_eq!(recent.since(0), Some(vec![]));
        recent.touch(key(1));
        assert_eq!(recent.since(0), Some(vec![]));
        recent.end(true);
        recent.touch(key(2));
        recent.end(false);
        recent.touch(key(3));
        recent.end(true);
        assert_eq!(recent.generation(), 2);
        assert_eq!(recent.since(0), Some(vec![key(1), key(3)]));
        assert_eq!(recent.since(1), Some(vec![key(3)]));
        assert_eq!(recent.since(2), Some(vec![]));
        // One transaction that is too large by itself.
        (0..=KEYS_MAX).for_each(|number| recent.touch(key(number)));
        recent.end(true);
        assert_eq!((recent.since(2), recent.since(3)), (None, Some(vec![])));
        // Many small ones push out what came before.
        for number in 0..=KEYS_MAX {
            recent.touch(key(number));
            recent.end(true);
        }
        assert_eq!((recent.since(3), recent.since(4).map(|keys| keys.len())), (None, Some(KEYS_MAX)));
    }
}
