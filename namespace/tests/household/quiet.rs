//! What must be true once everything that is on its way has come.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
};

use namespace::{Content, EntryKind, PeerId, Version};
use tree::{BlobId, UnixTime};

use crate::{
    common::{arena, peer},
    files::{ARENAS, Key, keys},
    network::Take,
    world::World,
};

/// What a machine shows of a path: what, since when, who has it, and whether it is in conflict.
type Line = (Key, EntryKind, Option<UnixTime>, Vec<PeerId>, bool);

impl World {
    /// Every machine says what it has, everyone who is paired is connected, and nothing is lost on the way any more, until
    /// nobody has anything to say.
    pub(crate) fn quiet(&mut self) {
        for at in 0..self.machines.len() {
            self.machines[at].reconcile_all(&mut self.rng);
        }
        for pair in self.network.paired() {
            self.network.connect(pair);
        }
        self.network.nothing_is_late();
        let bytes_max = *self.rng.choice(&[200, 1 << 18]).unwrap();
        for _ in 0..ROUNDS {
            let mut pairs = self.network.pairs();
            self.rng.shuffle(&mut pairs);
            let mut is_quiet = true;
            for pair in pairs {
                // A bound, lest two that never agree go on for good.
                for _ in 0..AT_ONCE {
                    let told = self.network.tell(&self.machines, pair, bytes_max);
                    let listened = self.network.listen(&self.machines, pair, Take::Once);
                    if !told && !listened {
                        break;
                    }
                    is_quiet = false;
                }
            }
            if is_quiet {
                return;
            }
        }
        panic!("there was still something to say after {ROUNDS} rounds");
    }

    /// Checks that whoever can reach each other, over whomever, have the same in view, and that it is so.
    pub(crate) fn check_quiet(&mut self) {
        for at in 0..self.machines.len() {
            self.machines[at].check_own(&mut self.rng.clone());
            self.machines[at].check_tables();
        }
        for component in self.components() {
            let views: Vec<_> = component.iter().map(|at| self.view(*at)).collect();
            for (at, view) in component.iter().zip(&views) {
                for (key, versions) in view {
                    self.check_path(&component, *at, key, versions);
                }
                self.check_blobs(*at, view);
            }
            // What is left of those out of reach need not be the same everywhere.
            let ids: BTreeSet<PeerId> = component.iter().map(|at| peer(*at)).collect();
            if views.iter().flat_map(BTreeMap::values).all(|versions| versions.keys().all(|who| ids.contains(who))) {
                let shown: Vec<_> = component.iter().map(|at| self.shown(*at)).collect();
                for (at, lines) in component.iter().zip(&shown) {
                    assert_eq!(lines, &shown[0], "shown at {at} and at {}", component[0]);
                }
                self.check_edits(&views[0], &shown[0]);
            }
        }
    }

    /// The machines in groups of those who can reach each other.
    fn components(&self) -> Vec<Vec<u8>> {
        let mut group: Vec<u8> = (0..self.machines.len() as u8).collect();
        for (a, b) in self.network.paired() {
            let (a, b) = (group[a as usize], group[b as usize]);
            group.iter_mut().filter(|of| **of == b).for_each(|of| *of = a);
        }
        let members = |of: u8| (0..group.len() as u8).filter(|at| group[*at as usize] == of).collect::<Vec<_>>();
        (0..group.len() as u8).map(members).filter(|members| !members.is_empty()).collect()
    }

    /// What is present at each path by what a machine knows, by peer.
    fn view(&self, at: u8) -> BTreeMap<Key, BTreeMap<PeerId, Version>> {
        let namespace = self.machines[at as usize].namespace();
        let versions = |key: &Key| {
            let versions = namespace.versions(&key.0, &key.1).unwrap().into_iter();
            let present = versions.filter(|(_, version)| version.content.is_present());
            present.map(|(who, version)| (who.unwrap_or(peer(at)), version)).collect()
        };
        keys().map(|key| (key.clone(), versions(&key))).collect()
    }

    /// Checks what a machine knows of a path: of all whom it can reach just what they say themselves. Deletions may differ:
    /// a listing has none, and the logs reach back differently far.
    fn check_path(&self, component: &[u8], at: u8, key: &Key, versions: &BTreeMap<PeerId, Version>) {
        for origin in &self.machines {
            let known = versions.get(&origin.id());
            if component.contains(&origin.number) {
                let own = origin.own(key).filter(|version| version.content.is_present());
                assert_eq!(known, own.as_ref(), "{key:?} of {} at {at}", origin.number);
            } else if !self.lost && self.has_left(component, origin.number) {
                assert_eq!(known, None, "{key:?} of {}, who left, at {at}", origin.number);
            }
        }
    }

    /// Whether all who were ever paired with a machine are in this group, and took it off their rosters.
    fn has_left(&self, component: &[u8], origin: u8) -> bool {
        let pairs = self.ever_paired.iter().filter(|(_, whom)| *whom == origin);
        let of_group =
            pairs.clone().all(|(at, _)| component.contains(at) && !self.network.trust.contains(&(*at, origin)));
        of_group && pairs.count() > 0
    }

    fn check_blobs(&self, at: u8, view: &BTreeMap<Key, BTreeMap<PeerId, Version>>) {
        let mut holders: BTreeMap<BlobId, BTreeSet<PeerId>> = BTreeMap::new();
        for (who, version) in view.values().flatten() {
            if let Some(blob) = version.content.blob() {
                holders.entry(blob).or_default().insert(*who);
            }
        }
        for (blob, mut holders) in holders {
            holders.remove(&peer(at));
            let got = self.machines[at as usize].namespace().peers_with(blob).unwrap();
            assert_eq!(got, Vec::from_iter(holders), "who has {blob}, at {at}");
        }
    }

    fn shown(&self, at: u8) -> Vec<Line> {
        let whose = |who: Option<PeerId>| who.unwrap_or(peer(at));
        let mut lines = Vec::new();
        for name in ARENAS.map(arena) {
            let listed = self.machines[at as usize].namespace().list(&name, None, true, &mut |entry| {
                let mut peers: Vec<_> = entry.peers.into_iter().map(whose).collect();
                peers.sort();
                lines.push(((name.clone(), entry.path), entry.kind, entry.mtime, peers, entry.in_conflict));
                ControlFlow::Continue(())
            });
            listed.unwrap();
        }
        lines
    }

    /// Checks that who edited a file is not in conflict with those who still have what it was made from.
    fn check_edits(&self, view: &BTreeMap<Key, BTreeMap<PeerId, Version>>, shown: &[Line]) {
        for (key, .., in_conflict) in shown {
            let versions = &view[key];
            let ids: BTreeSet<_> = versions.values().map(|version| version.content.id()).collect();
            let contents = |who: &PeerId| {
                let machine = self.machines.iter().find(|machine| machine.id() == *who).expect("a machine");
                machine.said.contents.get(key).map_or(&[][..], |contents| contents)
            };
            for (editor, version) in versions.iter().filter(|(_, version)| version.content.id().is_some()) {
                let id = version.content.id();
                let said = contents(editor);
                let recent = &said[said.len().saturating_sub(RECENT)..];
                let is_made_from = |id: &Option<BlobId>| id.is_some_and(|id| recent.contains(&id));
                let others = || versions.iter().filter(|(_, version)| version.content.id() != id);
                let nobody_went_back = others().all(|(who, other)| {
                    !contents(who).iter().any(|content| Some(*content) == id)
                        && !other.previous.iter().any(|previous| Some(*previous) == id)
                });
                let kinds_differ =
                    versions.values().any(|version| matches!(version.content, Content::Directory { .. }));
                if ids.iter().all(is_made_from) && nobody_went_back && !kinds_differ {
                    assert!(!in_conflict, "{key:?} is in conflict: {versions:?}");
                }
            }
        }
    }
}

/// In how many rounds all must have heard everything.
const ROUNDS: usize = 60;
/// How many steps one pair may take in a row.
const AT_ONCE: usize = 200;
/// So many of the last contents are named by what is made from them.
const RECENT: usize = 16;
