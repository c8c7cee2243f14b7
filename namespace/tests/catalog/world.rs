//! A few machines that hear of each other, what befalls them, and what each must know of itself.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::ControlFlow,
};

use namespace::{Arena, ArenaName, Batch, Change, Content, Cursor, EntryKind, Namespace, PeerId, RelPath, Version};
use tree::{BlobId, UnixTime};

use crate::common::{Disk, arena, file, path, peer, symlink};

/// What is known of the listeners when the backup of a machine is restored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restores {
    /// All had heard everything before, and hear from it again before it changes anything.
    HeardAtOnce,
    /// Nothing is known.
    AtAnyTime,
}

pub(crate) struct World {
    rng: fastrand::Rng,
    restores: Restores,
    machines: Vec<Machine>,
    /// The connections of now, by listener and speaker.
    links: BTreeMap<(usize, usize), Link>,
    /// Of each listener and speaker: what was in view, and has been there at the speaker all the time since.
    steady: BTreeMap<(usize, usize), BTreeSet<Key>>,
    /// What the first machine had when its backup was taken.
    backup: Option<(Disk, Own)>,
}

struct Machine {
    disk: Disk,
    /// There but for the moment in which it is opened again.
    namespace: Option<Namespace>,
    own: Own,
}

/// What a machine must have said of itself.
#[derive(Clone, Default)]
struct Own {
    rows: BTreeMap<Key, Version>,
    head: u64,
}

#[derive(Default)]
struct Link {
    /// Up to where the speaker has spoken.
    told: Cursor,
    /// What the listener has yet to hear.
    batches: VecDeque<Batch>,
}

type Key = (ArenaName, RelPath);

impl World {
    pub(crate) fn new(mut rng: fastrand::Rng, restores: Restores) -> Self {
        let machines = (0..MACHINES).map(|_| Machine::new(&mut rng)).collect();
        let (links, steady) = (BTreeMap::new(), BTreeMap::new());
        Self { rng, restores, machines, links, steady, backup: None }
    }

    /// Lets one thing happen.
    pub(crate) fn step(&mut self) {
        let at = self.rng.usize(..MACHINES);
        let other = (at + self.rng.usize(1..MACHINES)) % MACHINES;
        match self.rng.u8(..100) {
            ..36 => self.commit(at),
            36..39 => self.give_up_an_arena(at),
            39..61 => {
                let bytes_max = *self.rng.choice(&[1, 50, 200, 1000, usize::MAX]).unwrap();
                self.tell((at, other), bytes_max);
            }
            61..87 => self.hear((at, other)),
            87..91 => drop(self.links.remove(&(at, other))),
            91..94 => self.restart(at),
            94..96 => self.reinstall(at),
            96..98 => {
                let first = &self.machines[0];
                self.backup = Some((first.disk.copy(), first.own.clone()));
            }
            _ => self.restore(),
        }
    }

    /// Lets everyone hear everything.
    pub(crate) fn settle(&mut self) {
        self.links.clear();
        for pair in pairs() {
            self.settle_pair(pair);
        }
    }

    /// Checks that every machine has of every other just what that one has of itself, and that all show the same.
    pub(crate) fn check_all_agree(&self) {
        let views: Vec<_> = (0..MACHINES).map(|at| self.view(at)).collect();
        for key in keys() {
            let mut expected: Vec<_> =
                (0..MACHINES).filter_map(|at| Some((id(at), self.machines[at].own.get(&key)?))).collect();
            expected.sort_by_key(|(peer, _)| *peer);
            for (at, view) in views.iter().enumerate() {
                assert_eq!(view.versions[&key], expected, "{key:?} at machine {at}");
            }
        }
        for view in &views {
            assert_eq!(view.listed, views[0].listed);
        }
        for at in 0..MACHINES {
            self.check_blobs(at);
            self.machines[at].check_known(&self.rng);
        }
    }

    fn commit(&mut self, at: usize) {
        let name = ARENAS[self.rng.usize(..ARENAS.len())];
        let changes = (0..self.rng.usize(0..8)).map(|_| {
            let path = path(PATHS[self.rng.usize(..PATHS.len())]);
            let old = self.machines[at].own.rows.get(&(arena(name), path.clone()));
            let content = match (self.rng.u8(..10), old) {
                (0..2, Some(old)) => old.content.clone(),
                (2..5, _) => Content::Deleted,
                (5, _) => symlink(["x", "y"][self.rng.usize(..2)]),
                _ => file(DATA[self.rng.usize(..DATA.len())]),
            };
            let mtime = match old {
                Some(old) if self.rng.bool() => old.mtime,
                _ => UnixTime { seconds: self.rng.i64(-2..3), nanos: self.rng.u32(..2) },
            };
            Change { path, content, mtime, fingerprint: None }
        });
        let changes: Vec<_> = changes.collect();
        let machine = &mut self.machines[at];
        for Change { path, content, mtime, .. } in &changes {
            machine.own.say((arena(name), path.clone()), content, *mtime);
        }
        let said = machine.namespace().commit(&arena(name), &changes).unwrap();
        assert_eq!(said, machine.own.head, "what says nothing new gets no number");
        assert_eq!(*machine.namespace().head().borrow(), said);
        self.forget_what_is_gone(at);
    }

    fn give_up_an_arena(&mut self, at: usize) {
        let name = arena(ARENAS[self.rng.usize(..ARENAS.len())]);
        let machine = &mut self.machines[at];
        for (key, mtime) in machine.own.present().map(|(key, version)| (key.clone(), version.mtime)).collect::<Vec<_>>()
        {
            if key.0 == name {
                machine.own.say(key, &Content::Withdrawn, mtime);
            }
        }
        let held = Arena { name: name.clone(), dir: Some("/somewhere".into()), public: true };
        machine.namespace().set_arena(&held).unwrap();
        assert!(machine.namespace().arenas().unwrap().contains(&held));
        machine.namespace().remove_arena(&name).unwrap();
        assert!(!machine.namespace().arenas().unwrap().contains(&held));
        self.forget_what_is_gone(at);
    }

    /// The speaker says what comes next on the link, or on a new one.
    fn tell(&mut self, pair: (usize, usize), bytes_max: usize) {
        let (listener, speaker) = pair;
        let heard = || self.machines[listener].namespace().cursor(id(speaker)).unwrap();
        let link = self.links.entry(pair).or_insert_with(|| Link { told: heard(), batches: VecDeque::new() });
        let Machine { own, namespace, .. } = &self.machines[speaker];
        let speaker = namespace.as_ref().unwrap();
        let batch = speaker.batch(link.told, bytes_max).unwrap();

        let epoch = speaker.epoch();
        assert_eq!(batch.restart, link.told.epoch != epoch || link.told.seq > own.head);
        assert_eq!((batch.head, batch.upto.epoch), (own.head, epoch));
        let from = if batch.restart { 0 } else { link.told.seq };
        let mut log: Vec<_> = own.rows.iter().filter(|(_, version)| version.seq > from).collect();
        log.sort_by_key(|(_, version)| version.seq);
        let (said, unsaid) = log.split_at(batch.statements.len());
        for (statement, (key, version)) in batch.statements.iter().zip(said) {
            assert_eq!((&statement.arena, &statement.path, &statement.version), (&key.0, &key.1, *version));
        }
        assert!(unsaid.is_empty() || !said.is_empty(), "nothing said of {} changes", unsaid.len());
        let last = said.last().map_or(from, |(_, version)| version.seq);
        assert_eq!(batch.upto.seq, if unsaid.is_empty() { own.head } else { last });
        let size = postcard::to_stdvec(&batch).unwrap().len();
        assert!(size < bytes_max.saturating_add(200 + 3 * batch.statements.len()), "{size} bytes, {bytes_max} asked");

        link.told = batch.upto;
        link.batches.push_back(batch);
    }

    /// The listener takes in the batch that comes next on the link, if one does.
    fn hear(&mut self, pair: (usize, usize)) {
        let (listener, speaker) = pair;
        let Some(link) = self.links.get_mut(&pair) else { return };
        let Some(batch) = link.batches.pop_front() else { return };
        let namespace = self.machines[listener].namespace();
        namespace.apply(id(speaker), &batch).unwrap();
        assert_eq!(namespace.cursor(id(speaker)).unwrap(), batch.upto);

        let nothing_is_under_way = link.batches.is_empty();
        let in_view = self.in_view(pair);
        let steady = self.steady.entry(pair).or_default();
        if let Some(vanished) = steady.difference(&in_view).next() {
            panic!("{vanished:?} of machine {speaker} vanished from the view of machine {listener}");
        }
        if nothing_is_under_way {
            *steady = in_view;
            self.forget_what_is_gone(speaker);
        }
        self.check_blobs(listener);
    }

    /// Cuts the power or stops in good order, and starts again.
    fn restart(&mut self, at: usize) {
        self.disconnect(at);
        let power_cut = self.rng.bool();
        let new_epoch = self.rng.u64(1..);
        self.machines[at].reopen(power_cut, new_epoch);
    }

    /// Everything that the machine knew is lost, its log included; some files are still there.
    fn reinstall(&mut self, at: usize) {
        self.disconnect(at);
        self.machines[at] = Machine::new(&mut self.rng);
        for (_, in_view) in self.steady.iter_mut().filter(|((listener, _), _)| *listener == at) {
            in_view.clear();
        }
        self.commit(at);
        self.forget_what_is_gone(at);
    }

    /// The first machine is what it was when its backup was taken.
    fn restore(&mut self) {
        let Some((disk, own)) = self.backup.clone() else { return };
        if self.restores == Restores::HeardAtOnce {
            (1..MACHINES).for_each(|listener| self.settle_pair((listener, 0)));
        }
        self.disconnect(0);
        self.machines[0].namespace = None;
        let new_epoch = self.rng.u64(1..);
        // On a copy, so that the backup stays as it is.
        let disk = disk.copy();
        self.machines[0] = Machine { namespace: Some(disk.open(new_epoch)), disk, own };
        for pair in pairs().filter(|pair| pair.0 == 0) {
            let in_view = self.in_view(pair);
            self.steady.insert(pair, in_view);
        }
        (0..MACHINES).for_each(|at| self.forget_what_is_gone(at));
        if self.restores == Restores::HeardAtOnce {
            for listener in 1..MACHINES {
                self.tell((listener, 0), 100);
                self.hear((listener, 0));
            }
        }
    }

    fn disconnect(&mut self, at: usize) {
        self.links.retain(|(listener, speaker), _| *listener != at && *speaker != at);
    }

    fn settle_pair(&mut self, pair: (usize, usize)) {
        self.links.remove(&pair);
        let Machine { own, namespace, .. } = &self.machines[pair.1];
        let end = Cursor { epoch: namespace.as_ref().unwrap().epoch(), seq: own.head };
        for _ in 0..1000 {
            self.tell(pair, 100);
            self.hear(pair);
            if self.links[&pair].told == end {
                return;
            }
        }
        panic!("machine {} never heard the end from {}", pair.0, pair.1);
    }

    /// What is no longer at the speaker may go from view.
    fn forget_what_is_gone(&mut self, speaker: usize) {
        let own = &self.machines[speaker].own;
        for (_, in_view) in self.steady.iter_mut().filter(|((_, of), _)| *of == speaker) {
            in_view.retain(|key| own.rows.get(key).is_some_and(|version| version.content.is_present()));
        }
    }

    /// What the listener has in view of the speaker.
    fn in_view(&self, (listener, speaker): (usize, usize)) -> BTreeSet<Key> {
        let namespace = self.machines[listener].namespace();
        let versions = |(arena, path): &Key| namespace.versions(arena, path).unwrap();
        let present =
            |(who, version): &(Option<PeerId>, Version)| *who == Some(id(speaker)) && version.content.is_present();
        keys().filter(|key| versions(key).iter().any(present)).collect()
    }

    fn view(&self, at: usize) -> View {
        let namespace = self.machines[at].namespace();
        let whose = |who: Option<PeerId>| who.unwrap_or(id(at));
        let mut view = View::default();
        for key in keys() {
            let mut versions = namespace.versions(&key.0, &key.1).unwrap();
            versions.sort_by_key(|(who, _)| whose(*who));
            view.versions.insert(key, versions.into_iter().map(|(who, version)| (whose(who), version)).collect());
        }
        for name in ARENAS.map(arena) {
            let list = namespace.list(&name, None, true, &mut |entry| {
                let mut peers: Vec<_> = entry.peers.into_iter().map(whose).collect();
                peers.sort();
                view.listed.push((name.clone(), entry.path, entry.kind, entry.mtime, peers));
                ControlFlow::Continue(())
            });
            list.unwrap();
        }
        view
    }

    /// Checks who has which blob against the rows.
    fn check_blobs(&self, at: usize) {
        let namespace = self.machines[at].namespace();
        let rows: Vec<_> = keys().flat_map(|(arena, path)| namespace.versions(&arena, &path).unwrap()).collect();
        for blob in DATA.map(|data| BlobId::of(data.as_bytes())) {
            let has = rows.iter().filter(|(_, version)| version.content.blob() == Some(blob));
            let expected: BTreeSet<PeerId> = has.filter_map(|(who, _)| *who).collect();
            let mut got = namespace.peers_with(blob).unwrap();
            got.sort();
            assert_eq!(got, Vec::from_iter(expected), "who has {blob}, at machine {at}");
        }
    }
}

/// What a machine shows.
#[derive(Default)]
struct View {
    versions: BTreeMap<Key, Vec<(PeerId, Version)>>,
    listed: Vec<Line>,
}

type Line = (ArenaName, RelPath, EntryKind, Option<UnixTime>, Vec<PeerId>);

impl Machine {
    fn new(rng: &mut fastrand::Rng) -> Self {
        let disk = Disk::default();
        let namespace = Some(disk.open(rng.u64(1..)));
        Self { disk, namespace, own: Own::default() }
    }

    fn namespace(&self) -> &Namespace {
        self.namespace.as_ref().expect("it is open")
    }

    fn reopen(&mut self, power_cut: bool, new_epoch: u64) {
        let left = self.disk.copy();
        self.namespace = None;
        if power_cut {
            self.disk = left;
        }
        self.namespace = Some(self.disk.open(new_epoch));
        assert_eq!(*self.namespace().head().borrow(), self.own.head);
    }

    /// Checks what it knows of its own files, taken in parts.
    fn check_known(&self, rng: &fastrand::Rng) {
        let mut rng = rng.clone();
        for name in ARENAS.map(arena) {
            let mut known: Vec<(RelPath, Version)> = Vec::new();
            loop {
                let max = rng.usize(1..5);
                let part = self.namespace().known(&name, known.last().map(|(path, _)| path), max).unwrap();
                assert!(part.len() <= max);
                if part.is_empty() {
                    break;
                }
                known.extend(part.into_iter().map(|known| (known.path, known.version)));
            }
            let own = self.own.present().filter(|((arena, _), _)| *arena == name);
            assert_eq!(known, own.map(|((_, path), version)| (path.clone(), version.clone())).collect::<Vec<_>>());
        }
    }
}

impl Own {
    fn say(&mut self, key: Key, content: &Content, mtime: UnixTime) {
        let nothing_new = match self.rows.get(&key) {
            Some(old) if old.content.is_present() => old.content == *content && old.mtime == mtime,
            _ => !content.is_present(),
        };
        if !nothing_new {
            self.head += 1;
            self.rows.insert(key, Version { content: content.clone(), mtime, seq: self.head });
        }
    }

    fn get(&self, key: &Key) -> Option<Version> {
        self.rows.get(key).cloned()
    }

    fn present(&self) -> impl Iterator<Item = (&Key, &Version)> {
        self.rows.iter().filter(|(_, version)| version.content.is_present())
    }
}

fn id(machine: usize) -> PeerId {
    peer(machine as u8)
}

fn pairs() -> impl Iterator<Item = (usize, usize)> {
    (0..MACHINES).flat_map(|listener| (0..MACHINES).map(move |speaker| (listener, speaker))).filter(|(a, b)| a != b)
}

fn keys() -> impl Iterator<Item = Key> {
    ARENAS.into_iter().flat_map(|name| PATHS.map(|at| (arena(name), path(at))))
}

const MACHINES: usize = 3;
const ARENAS: [&str; 2] = ["photos", "photos 2"];
const PATHS: [&str; 8] = ["a", "a/b", "a/c", "a-b", "b", "b/c/d", "c:d", "z"];
const DATA: [&str; 5] = ["", "1", "22", "333", "4444"];
