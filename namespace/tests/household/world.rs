//! A household: what befalls its machines, and what must be true of them all along.

use std::collections::{BTreeMap, BTreeSet};

use namespace::{Content, Version};

use crate::{
    common::{arena, peer},
    files::{ARENAS, Files, Key, any_key, keys},
    machine::{Machine, is_copied},
    network::{Network, Take},
};

pub(crate) struct World {
    pub(crate) rng: fastrand::Rng,
    pub(crate) machines: Vec<Machine>,
    pub(crate) network: Network,
    /// Whom each was ever paired with.
    pub(crate) ever_paired: BTreeSet<(u8, u8)>,
    /// Whether rows were lost, and with them what was known of who left.
    pub(crate) lost: bool,
    /// Origins that lost rows, or left: what they had may go from view, and come again.
    broken: BTreeSet<u8>,
    /// Of each listener and origin: what was in view, and has been there at the origin all the time since.
    steady: BTreeMap<(u8, u8), BTreeSet<Key>>,
    /// Of each listener and origin: what was in view there so far, one after the other.
    seen: BTreeMap<(u8, u8), Seen>,
    tick: i64,
}

/// By path what was in view, one after the other; nothing is one, too.
type Seen = BTreeMap<Key, Vec<Option<Version>>>;

impl World {
    pub(crate) fn new(mut rng: fastrand::Rng) -> Self {
        let count = rng.u8(3..=5);
        let machines: Vec<_> = (0..count).map(|number| Machine::new(number, &mut rng)).collect();
        let mut network = Network::default();
        let is_mesh = rng.u8(..3) == 0;
        for b in 1..count {
            // A chain, a star, or anything between.
            let a = if rng.bool() { b - 1 } else { rng.u8(..b) };
            network.trust.extend([(a, b), (b, a)]);
            for a in (0..b).filter(|_| is_mesh) {
                network.trust.extend([(a, b), (b, a)]);
            }
        }
        let ever_paired = network.trust.clone();
        let (broken, steady, seen) = Default::default();
        Self { rng, machines, network, ever_paired, lost: false, broken, steady, seen, tick: 0 }
    }

    /// Lets one thing happen.
    pub(crate) fn step(&mut self) {
        self.tick += 1;
        let at = self.rng.usize(..self.machines.len());
        match self.rng.u16(..1000) {
            ..260 => self.work(at),
            260..390 => self.reconcile(at),
            390..450 => self.connect(),
            450..885 => self.exchange(),
            885..900 => self.cut(),
            900..915 => self.take_in_late(),
            915..935 => self.disconnect(),
            935..955 => self.restart(at),
            955..965 => self.machines[at].back_up(),
            965..975 => self.restore(at),
            975..981 => self.lose_rows(at),
            981..990 => self.give_up_an_arena(at),
            _ => self.remove_or_pair(),
        }
    }

    fn work(&mut self, at: usize) {
        let others = self.machines.iter().filter(|other| other.number != at as u8);
        let there =
            others.flat_map(|other| other.files.iter().map(|(key, (content, _))| (key.clone(), content.clone())));
        let seen = |(key, content): &(Key, Content)| {
            let versions = self.machines[at].namespace().versions(&key.0, &key.1).unwrap();
            is_copied(content) && versions.iter().any(|(_, version)| version.content == *content)
        };
        // Looked up only now and then, since it takes time.
        let is_copying = self.rng.u8(..8) == 0;
        let others: Vec<_> = there.filter(|node| is_copying && seen(node)).collect();
        self.machines[at].work(&mut self.rng, self.tick, &others);
    }

    fn reconcile(&mut self, at: usize) {
        let (name, path) = any_key(&mut self.rng);
        let within = Some(&path).filter(|_| self.rng.u8(..3) == 0);
        self.machines[at].reconcile(&name, within, &mut self.rng);
        self.forget_what_is_gone(at as u8);
    }

    fn give_up_an_arena(&mut self, at: usize) {
        let name = arena(ARENAS[1]);
        let machine = &mut self.machines[at];
        machine.namespace().remove_arena(&name, 1).unwrap();
        machine.said.standing.retain(|(arena, _), _| *arena != name);
        let kept = machine.files.iter().filter(|((arena, _), _)| *arena != name);
        let mut files = Files::default();
        kept.for_each(|(key, (content, mtime))| files.put(key.clone(), content.clone(), *mtime));
        machine.files = files;
        self.forget_what_is_gone(at as u8);
    }

    fn connect(&mut self) {
        if let Some(pair) = self.rng.choice(self.network.paired()) {
            self.network.connect(pair);
        }
    }

    fn disconnect(&mut self) {
        if let Some(pair) = self.rng.choice(self.network.pairs()) {
            self.network.disconnect(pair);
        }
    }

    fn cut(&mut self) {
        if let Some(pair) = self.rng.choice(self.network.pairs()) {
            self.network.cut(pair);
        }
    }

    fn exchange(&mut self) {
        let Some(pair) = self.rng.choice(self.network.pairs()) else { return };
        if self.rng.bool() {
            let bytes_max = *self.rng.choice(&[1, 100, 400, 1 << 18]).unwrap();
            self.network.tell(&self.machines, pair, bytes_max);
        } else {
            let take = if self.rng.u8(..12) == 0 { Take::Twice } else { Take::Once };
            self.listen(pair, take);
        }
    }

    pub(crate) fn listen(&mut self, pair: (u8, u8), take: Take) -> bool {
        let done = self.network.listen(&self.machines, pair, take);
        self.check_view(pair.0);
        done
    }

    fn take_in_late(&mut self) {
        if let Some(listener) = self.network.take_in_late(&self.machines, &mut self.rng) {
            self.check_view(listener);
        }
    }

    fn restart(&mut self, at: usize) {
        self.network.stop(at as u8);
        self.machines[at].restart(&mut self.rng);
    }

    fn lose_rows(&mut self, at: usize) {
        self.network.stop(at as u8);
        self.machines[at].lose_rows(&mut self.rng);
        self.rows_changed(at as u8);
    }

    fn restore(&mut self, at: usize) {
        if self.machines[at].backup.is_some() {
            self.network.stop(at as u8);
            self.machines[at].restore(&mut self.rng);
            self.rows_changed(at as u8);
        }
    }

    /// The rows of a machine are others: what was in view of it or by it need not stay so.
    fn rows_changed(&mut self, at: u8) {
        self.lost = true;
        self.broken.insert(at);
        self.steady.retain(|(listener, origin), _| *listener != at && *origin != at);
        self.seen.retain(|(listener, _), _| *listener != at);
    }

    /// A machine takes a peer off its roster, and perhaps the peer does the same; or they are paired again.
    fn remove_or_pair(&mut self) {
        let pairs: Vec<_> = self.ever_paired.iter().copied().collect();
        let Some(&(a, b)) = self.rng.choice(&pairs) else { return };
        if !self.network.trust.contains(&(a, b)) || !self.network.trust.contains(&(b, a)) {
            self.network.trust.extend([(a, b), (b, a)]);
            return;
        }
        self.network.disconnect((a, b));
        for (at, whom) in [(a, b), (b, a)].into_iter().take(self.rng.usize(1..=2)) {
            self.network.trust.remove(&(at, whom));
            let namespace = self.machines[at as usize].namespace();
            // Of whom nothing was ever heard, nothing can be said.
            self.lost |= namespace.cursor(peer(whom)).unwrap().mark.epoch == 0;
            namespace.forget_peer(peer(whom)).unwrap();
            self.broken.insert(whom);
            self.steady.retain(|(_, origin), _| *origin != whom);
        }
    }

    /// Checks what a machine has in view of the others against what it had.
    fn check_view(&mut self, listener: u8) {
        let namespace = self.machines[listener as usize].namespace();
        let mut views: BTreeMap<_, BTreeMap<Key, Version>> = BTreeMap::new();
        for key in keys() {
            for (who, version) in namespace.versions(&key.0, &key.1).unwrap() {
                if let Some(who) = who.filter(|_| version.content.is_present()) {
                    views.entry(who).or_default().insert(key.clone(), version);
                }
            }
        }
        for origin in (0..self.machines.len() as u8).filter(|origin| *origin != listener) {
            if self.broken.contains(&origin) {
                continue;
            }
            let view = views.remove(&peer(origin)).unwrap_or_default();
            let said = &self.machines[origin as usize].said.standing;
            let steady = self.steady.entry((listener, origin)).or_default();
            if let Some(vanished) = steady.iter().find(|key| !view.contains_key(*key)) {
                panic!("{vanished:?} of {origin} vanished from the view of {listener}");
            }
            // Rows of a listing may be later than its mark, and another teller of an earlier one need not know them.
            let cursor = namespace.cursor(peer(origin)).unwrap();
            let is_settled = |version: &Version| version.seq <= cursor.mark.seq;
            let stands = |(key, version): &(&Key, &Version)| {
                is_settled(version) && said.get(*key).is_some_and(|said| said.contains(version))
            };
            *steady = view.iter().filter(stands).map(|(key, _)| key.clone()).collect();

            let is_up_to_date =
                cursor.after.is_none() && cursor.mark == self.machines[origin as usize].namespace().mark().unwrap();
            let seen = self.seen.entry((listener, origin)).or_default();
            for key in keys() {
                let now = view.get(&key);
                if now.is_none_or(is_settled) && (now.is_some() || is_up_to_date) {
                    let seen = seen.entry(key.clone()).or_default();
                    let (now, before) = (now.cloned(), seen.split_last());
                    if before.is_some_and(|(last, _)| *last == now) {
                        continue;
                    }
                    let came_back = now.is_some() && seen.contains(&now);
                    assert!(!came_back, "{key:?} of {origin} came back at {listener}: {now:?} after {seen:?}");
                    seen.push(now);
                }
            }
        }
    }

    /// What an origin no longer has may go from view.
    fn forget_what_is_gone(&mut self, origin: u8) {
        let said = &self.machines[origin as usize].said.standing;
        for (_, steady) in self.steady.iter_mut().filter(|((_, of), _)| *of == origin) {
            steady.retain(|key| said.contains_key(key));
        }
    }
}
