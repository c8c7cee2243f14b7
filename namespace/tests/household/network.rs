//! How the machines hear of each other: the exchange of peers/src/catalog.rs, one step at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use namespace::{Applied, Batch, Cursor, Mark, PeerId, Told};

use crate::{common::peer, machine::Machine};

/// Who is paired and connected with whom, and what is on its way between them.
#[derive(Default)]
pub(crate) struct Network {
    /// Whom each machine trusts: two that trust each other can connect.
    pub(crate) trust: BTreeSet<(u8, u8)>,
    connected: BTreeSet<(u8, u8)>,
    /// By listener and teller.
    streams: BTreeMap<(u8, u8), Stream>,
    /// The latest marks of a peer that others showed a machine: by machine and peer.
    rumours: BTreeMap<(u8, PeerId), Mark>,
    /// What comes late, or a second time: its listener and teller.
    late: Vec<(u8, u8, Batch)>,
}

/// One catalog stream, from the moment at which the listener asks.
struct Stream {
    /// On its way to the teller.
    ask: Option<Told>,
    /// What the teller believes that the listener has heard.
    told: Option<Told>,
    batches: VecDeque<Batch>,
    /// Whom the listener said it hears directly.
    direct: BTreeSet<PeerId>,
    /// How far the listener had heard whom when it asked, and what came on this stream since.
    heard: BTreeMap<PeerId, Mark>,
    /// The latest mark of the teller that others showed the listener.
    rumour: Mark,
}

impl Network {
    /// The pairs that can be connected.
    pub(crate) fn paired(&self) -> Vec<(u8, u8)> {
        let both = |(a, b): &&(u8, u8)| a < b && self.trust.contains(&(*b, *a));
        self.trust.iter().filter(both).copied().collect()
    }

    pub(crate) fn connect(&mut self, (a, b): (u8, u8)) {
        self.connected.extend([(a, b), (b, a)]);
    }

    pub(crate) fn disconnect(&mut self, (a, b): (u8, u8)) {
        for pair in [(a, b), (b, a)] {
            self.connected.remove(&pair);
            self.streams.remove(&pair);
        }
    }

    /// Ends all connections of a machine that stops.
    pub(crate) fn stop(&mut self, at: u8) {
        for (a, b) in self.connected.clone() {
            if at == a {
                self.disconnect((a, b));
            }
        }
        self.rumours.retain(|(of, _), _| *of != at);
    }

    /// The pairs of listener and teller that are connected.
    pub(crate) fn pairs(&self) -> Vec<(u8, u8)> {
        self.connected.iter().copied().collect()
    }

    fn direct(&self, at: u8) -> BTreeSet<PeerId> {
        self.connected.iter().filter(|(a, _)| *a == at).map(|(_, b)| peer(*b)).collect()
    }

    /// The stream ends, with what is on its way; it will be opened again.
    pub(crate) fn cut(&mut self, pair: (u8, u8)) {
        self.streams.remove(&pair);
    }

    /// Does the listener's next thing: asks, asks anew if it must, or takes in what came. Tells whether there was any.
    pub(crate) fn listen(&mut self, machines: &[Machine], (listener, teller): (u8, u8), take: Take) -> bool {
        let namespace = machines[listener as usize].namespace();
        if self.must_ask_anew(machines, (listener, teller)) {
            self.streams.remove(&(listener, teller));
        }
        let direct = self.direct(listener);
        let Some(stream) = self.streams.get_mut(&(listener, teller)) else {
            let cursors = namespace.cursors().unwrap();
            let heard = cursors.iter().map(|(peer, cursor)| (*peer, cursor.mark)).collect();
            let rumour = self.rumours.get(&(listener, peer(teller))).copied().unwrap_or_default();
            let ask = Some(Told { listener: peer(listener), cursors, direct: direct.clone() });
            let stream = Stream { ask, told: None, batches: VecDeque::new(), direct, heard, rumour };
            self.streams.insert((listener, teller), stream);
            return true;
        };
        let Some(batch) = stream.batches.pop_front() else { return false };
        if take == Take::Twice {
            self.late.push((listener, teller, batch.clone()));
        }
        let missed = match self.take_in(machines, (listener, teller), &batch) {
            Some(Applied::Taken) => {
                let stream = self.streams.get_mut(&(listener, teller)).expect("as above");
                stream.heard.insert(batch.origin, batch.mark);
                false
            }
            Some(Applied::PassedOver) => batch.mark > namespace.cursor(batch.origin).unwrap().mark,
            None => false,
        };
        if missed && batch.origin != peer(listener) {
            self.streams.remove(&(listener, teller));
        }
        true
    }

    /// What came late is taken in.
    pub(crate) fn take_in_late(&mut self, machines: &[Machine], rng: &mut fastrand::Rng) -> Option<u8> {
        if self.late.is_empty() {
            return None;
        }
        let (listener, teller, batch) = self.late.swap_remove(rng.usize(..self.late.len()));
        if self.trust.contains(&(listener, teller)) {
            self.take_in(machines, (listener, teller), &batch);
        }
        Some(listener)
    }

    fn take_in(&self, machines: &[Machine], (listener, teller): (u8, u8), batch: &Batch) -> Option<Applied> {
        let namespace = machines[listener as usize].namespace();
        let is_trusted = |origin| self.trust.iter().any(|(of, whom)| *of == listener && peer(*whom) == origin);
        if batch.is_farewell() && batch.origin != peer(teller) && is_trusted(batch.origin) {
            namespace.contest_farewell(batch.origin, batch.mark).unwrap();
            return None;
        }
        Some(namespace.apply(peer(teller), batch).unwrap())
    }

    fn must_ask_anew(&self, machines: &[Machine], (listener, teller): (u8, u8)) -> bool {
        let Some(stream) = self.streams.get(&(listener, teller)) else { return false };
        let cursors = machines[listener as usize].namespace().cursors().unwrap();
        let moved = |(origin, cursor): (&PeerId, &Cursor)| {
            let (heard, mark) = (stream.heard.get(origin).copied().unwrap_or_default(), cursor.mark);
            let log = |mark: Mark| (mark.epoch, mark.session, mark.seq == u64::MAX);
            if *origin == peer(teller) { mark != heard } else { log(mark) != log(heard) }
        };
        stream.direct != self.direct(listener)
            || self.rumours.get(&(listener, peer(teller))).is_some_and(|rumour| *rumour > stream.rumour)
            || cursors.iter().any(moved)
    }

    /// Does the teller's next thing: reads what is asked, or tells. Tells whether there was any.
    pub(crate) fn tell(&mut self, machines: &[Machine], (listener, teller): (u8, u8), bytes_max: usize) -> bool {
        let Some(stream) = self.streams.get_mut(&(listener, teller)) else { return false };
        let namespace = machines[teller as usize].namespace();
        if let Some(told) = stream.ask.take() {
            if let Some(own) = told.cursors.get(&peer(teller)) {
                namespace.renew_if_lost(own.mark).unwrap();
            }
            namespace.renew_if_lost(stream.rumour).unwrap();
            // Who hears a peer directly is told nothing of it: whatever others have heard of it is the peer's to see.
            for (origin, cursor) in &told.cursors {
                if cursor.mark > namespace.cursor(*origin).unwrap().mark {
                    let rumour = self.rumours.entry((teller, *origin)).or_default();
                    *rumour = cursor.mark.max(*rumour);
                }
            }
            stream.told = Some(told);
            return true;
        }
        let Some(told) = &mut stream.told else { return false };
        let Some(batch) = namespace.tell(told, bytes_max).unwrap() else { return false };
        told.note(&batch);
        stream.batches.push_back(batch);
        true
    }

    /// Forgets what would have come late.
    pub(crate) fn nothing_is_late(&mut self) {
        self.late.clear();
    }
}

/// How often a batch is taken in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Take {
    Once,
    /// Now, and late.
    Twice,
}
