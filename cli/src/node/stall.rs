//! File systems that do not answer: a dead server, a program behind FUSE that hangs, a disk that is failing. Rules:
//! spec/namespace.md, "File systems that hang".

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use namespace::ArenaName;
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{info, warn};

use super::Node;

impl Node {
    /// Asks the file system of every arena root whether it answers, again and again, for as long as `stopped` says nothing. An
    /// arena on one that does not is left alone until it does: it is not read, not looked at, and counts as *not responding*.
    pub(crate) async fn watch_for_stalls(self, mut stopped: watch::Receiver<bool>) {
        let mut asked = BTreeMap::new();
        let mut ticks = interval(ASKED_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = stopped.wait_for(|&stop| stop) => return,
                _ = ticks.tick() => {}
            }
            self.ask_all(&mut asked).await;
        }
    }

    /// Asks each file system once. A question stays open until it is answered, so that a dead one holds one thread.
    async fn ask_all(&self, asked: &mut BTreeMap<ArenaName, JoinHandle<()>>) {
        let held = self.inner.namespace.arenas().unwrap_or_default();
        let held: BTreeMap<ArenaName, PathBuf> =
            held.into_iter().filter_map(|held| Some((held.name, held.dir?))).collect();
        asked.retain(|arena, _| held.contains_key(arena));
        for (arena, dir) in held {
            // Whatever it answers: that it is not there is for others to find.
            asked.entry(arena).or_insert_with(|| spawn_blocking(move || _ = rustix::fs::statfs(&dir)));
        }
        let all = async {
            for question in asked.values_mut().filter(|question| !question.is_finished()) {
                let _ = question.await;
            }
        };
        let _ = timeout(ANSWER_LIMIT, all).await;
        let open: Vec<ArenaName> =
            asked.iter().filter(|(_, question)| !question.is_finished()).map(|(arena, _)| arena.clone()).collect();
        for arena in asked.keys() {
            self.note_stalled(arena, open.contains(arena));
        }
        asked.retain(|_, question| !question.is_finished());
    }

    fn note_stalled(&self, arena: &ArenaName, is_stalled: bool) {
        if self.arena_state(arena, |state| std::mem::replace(&mut state.stalled, is_stalled)) == is_stalled {
            return;
        }
        match is_stalled {
            true => warn!(%arena, "its file system does not respond; the arena is left alone until it does"),
            false => info!(%arena, "its file system responds again"),
        }
        if let Some(root) = self.root(arena) {
            self.inner.store.pass_over(root, is_stalled);
        }
    }

    /// Whether the file system of an arena root did not answer when it was asked last.
    pub(super) fn is_stalled(&self, arena: &ArenaName) -> bool {
        self.arena_state(arena, |state| state.stalled)
    }
}

const ASKED_EVERY: Duration = Duration::from_secs(2);
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
