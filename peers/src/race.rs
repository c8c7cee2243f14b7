//! In which order and when the addresses of a peer are tried (RFC 8305, "Happy Eyeballs"). Order and bounds: spec/wire.md,
//! "Dialling".

use std::{
    collections::{BTreeSet, VecDeque},
    mem,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// A race between all addresses of a peer. Opens no socket and knows no clock.
///
/// Calling order: [`poll`](Self::poll), and what it says, until it says `Wait`; then whatever comes first of the time it
/// names and of what was begun, which is told to [`handle_resolved`](Self::handle_resolved),
/// [`handle_met`](Self::handle_met), [`handle_failed`](Self::handle_failed) or [`handle_won`](Self::handle_won); then
/// `poll` again. What is told of attempts that were dropped is ignored.
#[derive(Debug)]
pub(crate) struct Race {
    limits: Limits,
    ends: Instant,
    own: Vec<SocketAddr>,
    /// The names that are being looked up, each with when to go on without it.
    resolving: Vec<Option<Instant>>,
    to_resolve: VecDeque<usize>,
    names: Vec<String>,
    /// What is known and was not tried yet: the number of the name, and the address.
    candidates: Vec<(usize, SocketAddr)>,
    known: BTreeSet<SocketAddr>,
    attempts: Vec<Attempt>,
    to_drop: VecDeque<usize>,
    /// Attempts whose turn to greet has not come yet, in the order in which they met.
    met: VecDeque<usize>,
    /// The attempt that greets, and since when.
    greeting: Option<(usize, Instant)>,
    ended: bool,
    failures: Vec<(String, Flaw)>,
}

/// How long what may take, each from its own start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Finding the addresses of a name.
    pub(crate) resolve: Duration,
    /// An attempt, greeting included.
    pub(crate) attempt: Duration,
    /// Everything.
    pub(crate) all: Duration,
}

#[derive(Debug)]
struct Attempt {
    name: usize,
    address: SocketAddr,
    since: Instant,
    is_over: bool,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Find out which addresses this name has, by its number.
    Resolve(usize, String),
    /// Start this attempt: a handshake at this address.
    Connect(usize, SocketAddr),
    /// The attempt may greet.
    Greet(usize),
    /// Give the attempt up.
    Drop(usize),
    /// Nothing, until then.
    Wait(Instant),
    /// It is over, and nobody won.
    Failed,
}

/// Why an attempt came to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flaw {
    pub(crate) kind: FlawKind,
    /// In words that go behind "ADDRESS: ".
    pub(crate) why: String,
}

/// What a failure says of the next dial. The greater says more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FlawKind {
    /// Another machine is there, or what does not speak our protocol.
    Elsewhere,
    /// Nothing answered: the next time may be different.
    Network,
    /// The peer itself does not want us.
    Refused,
}

impl Flaw {
    pub(crate) fn new(kind: FlawKind, why: impl Into<String>) -> Self {
        Self { kind, why: why.into() }
    }

    fn no_answer(limit: Duration) -> Self {
        Self::new(FlawKind::Network, format!("no answer within {} s", limit.as_secs()))
    }
}

impl Race {
    /// A race that starts now, between the addresses of `names`, each `HOST:PORT`; the first of them are preferred, and
    /// this machine's own addresses left out.
    pub(crate) fn new(names: Vec<String>, own: &[SocketAddr], limits: Limits, now: Instant) -> Self {
        let mut race = Self {
            limits,
            ends: now + limits.all,
            own: own.to_vec(),
            resolving: vec![None; names.len()],
            to_resolve: VecDeque::new(),
            names,
            candidates: Vec::new(),
            known: BTreeSet::new(),
            attempts: Vec::new(),
            to_drop: VecDeque::new(),
            met: VecDeque::new(),
            greeting: None,
            ended: false,
            failures: Vec::new(),
        };
        for number in 0..race.names.len() {
            match race.names[number].parse() {
                Ok(address) => race.add(number, [address]),
                Err(_) => {
                    race.resolving[number] = Some(now + limits.resolve);
                    race.to_resolve.push_back(number);
                }
            }
        }
        race
    }

    /// What to do next.
    pub(crate) fn poll(&mut self, now: Instant) -> Step {
        self.expire(now);
        if let Some(attempt) = self.to_drop.pop_front() {
            return Step::Drop(attempt);
        }
        if self.ended {
            return Step::Failed;
        }
        if let Some(number) = self.to_resolve.pop_front() {
            return Step::Resolve(number, self.names[number].clone());
        }
        if self.greeting.is_none()
            && let Some(attempt) = self.met.pop_front()
        {
            self.greeting = Some((attempt, now));
            return Step::Greet(attempt);
        }
        if self.next_start().is_some_and(|at| at <= now) {
            let (name, address) = self.next_candidate();
            self.attempts.push(Attempt { name, address, since: now, is_over: false });
            return Step::Connect(self.attempts.len() - 1, address);
        }
        let may_go_on = !self.candidates.is_empty()
            || self.resolving.iter().any(Option::is_some)
            || self.attempts.iter().any(|attempt| !attempt.is_over);
        if may_go_on { Step::Wait(self.next_event()) } else { Step::Failed }
    }

    /// What a name was found to mean.
    pub(crate) fn handle_resolved(&mut self, number: usize, found: Result<Vec<SocketAddr>, Flaw>) {
        if self.resolving[number].take().is_none() {
            return;
        }
        match found {
            Ok(addresses) => self.add(number, addresses),
            Err(flaw) => self.failures.push((self.names[number].clone(), flaw)),
        }
    }

    /// The attempt's handshake is done: it waits to be told to greet.
    pub(crate) fn handle_met(&mut self, attempt: usize) {
        if !self.attempts[attempt].is_over {
            self.met.push_back(attempt);
        }
    }

    /// The attempt came to nothing.
    pub(crate) fn handle_failed(&mut self, attempt: usize, flaw: Flaw) {
        if !self.attempts[attempt].is_over {
            let is_the_end = flaw.kind == FlawKind::Refused;
            self.fail(attempt, flaw);
            if is_the_end {
                self.end();
            }
        }
    }

    /// The attempt's greeting was answered. Tells whether that ends the race: not if it was dropped before.
    pub(crate) fn handle_won(&mut self, attempt: usize) -> bool {
        !mem::replace(&mut self.attempts[attempt].is_over, true)
    }

    /// Why nobody won: what came of each address, in that order, with what it says of the next dial.
    pub(crate) fn into_failure(self) -> Flaw {
        let kind = self.failures.iter().map(|(_, flaw)| flaw.kind).max().unwrap_or(FlawKind::Network);
        let mut said: Vec<String> = Vec::new();
        // What counts most is said first.
        let (first, rest): (Vec<_>, Vec<_>) = self.failures.iter().partition(|(_, flaw)| flaw.kind == kind);
        let count = first.len() + rest.len();
        said.extend(first.into_iter().chain(rest).take(TOLD_MAX).map(|(at, flaw)| format!("{at}: {}", flaw.why)));
        match count {
            0 => Flaw::new(kind, "no address to dial"),
            _ if count > TOLD_MAX => Flaw::new(kind, format!("{}; and {} more", said.join("; "), count - TOLD_MAX)),
            _ => Flaw::new(kind, said.join("; ")),
        }
    }

    fn add(&mut self, number: usize, addresses: impl IntoIterator<Item = SocketAddr>) {
        for address in addresses {
            if self.own.contains(&address) {
                let flaw = Flaw::new(FlawKind::Elsewhere, "this machine itself listens there");
                self.failures.push((label(&self.names[number], address), flaw));
            } else if self.known.len() < ADDRESSES_MAX && self.known.insert(address) {
                self.candidates.push((number, address));
            }
        }
        self.candidates.sort_by_key(|&(number, _)| number);
    }

    /// When the next attempt may start, if there is an address for it.
    fn next_start(&self) -> Option<Instant> {
        self.candidates.first()?;
        match self.attempts.last() {
            Some(last) if !last.is_over => Some(last.since + STAGGER),
            Some(last) => Some(last.since),
            None => Some(self.ends - self.limits.all),
        }
    }

    /// Takes the next candidate: of the family whose turn it is, if there is one.
    fn next_candidate(&mut self) -> (usize, SocketAddr) {
        let wants_v6 = self.attempts.last().is_none_or(|last| last.address.is_ipv4());
        let at = self.candidates.iter().position(|(_, address)| address.is_ipv6() == wants_v6);
        self.candidates.remove(at.unwrap_or(0))
    }

    /// Ends what has taken too long.
    fn expire(&mut self, now: Instant) {
        for number in 0..self.names.len() {
            if self.resolving[number].is_some_and(|until| until <= now) {
                self.resolving[number] = None;
                let why = format!("the name was not found within {} s", self.limits.resolve.as_secs());
                self.failures.push((self.names[number].clone(), Flaw::new(FlawKind::Network, why)));
            }
        }
        for attempt in 0..self.attempts.len() {
            if !self.attempts[attempt].is_over && self.attempts[attempt].since + self.limits.attempt <= now {
                self.drop_attempt(attempt, self.limits.attempt);
            }
        }
        if let Some((attempt, since)) = self.greeting
            && !self.met.is_empty()
            && since + GREETING_TURN <= now
        {
            self.drop_attempt(attempt, GREETING_TURN);
        }
        if self.ends <= now && !self.ended {
            let limit = self.limits.all;
            for attempt in (0..self.attempts.len()).filter(|&attempt| !self.attempts[attempt].is_over) {
                let at = self.label(attempt);
                self.failures.push((at, Flaw::no_answer(limit)));
            }
            self.end();
        }
    }

    fn drop_attempt(&mut self, attempt: usize, limit: Duration) {
        self.fail(attempt, Flaw::no_answer(limit));
        self.to_drop.push_back(attempt);
    }

    fn fail(&mut self, attempt: usize, flaw: Flaw) {
        self.attempts[attempt].is_over = true;
        self.met.retain(|&waiting| waiting != attempt);
        self.greeting.take_if(|(greeting, _)| *greeting == attempt);
        let at = self.label(attempt);
        self.failures.push((at, flaw));
    }

    /// Drops all that is under way.
    fn end(&mut self) {
        self.ended = true;
        self.candidates.clear();
        for (number, attempt) in self.attempts.iter_mut().enumerate() {
            if !mem::replace(&mut attempt.is_over, true) {
                self.to_drop.push_back(number);
            }
        }
    }

    fn label(&self, attempt: usize) -> String {
        let Attempt { name, address, .. } = self.attempts[attempt];
        label(&self.names[name], address)
    }

    /// When something happens by itself.
    fn next_event(&self) -> Instant {
        let resolving = self.resolving.iter().flatten().copied();
        let attempts = self.attempts.iter().filter(|attempt| !attempt.is_over);
        let attempts = attempts.map(|attempt| attempt.since + self.limits.attempt);
        let greeting = self.greeting.filter(|_| !self.met.is_empty()).map(|(_, since)| since + GREETING_TURN);
        resolving.chain(attempts).chain(greeting).chain(self.next_start()).fold(self.ends, Instant::min)
    }
}

/// What an address is called in errors: the name that the user wrote, and the address that it means.
pub(crate) fn label(name: &str, address: SocketAddr) -> String {
    let address = address.to_string();
    if name == address { address } else { format!("{name} ({address})") }
}

/// How long an attempt has the field to itself.
const STAGGER: Duration = Duration::from_millis(250);
/// How long a greeting may take while another attempt waits to greet.
const GREETING_TURN: Duration = Duration::from_secs(2);
/// So many addresses are tried in one race: so that the last one has its time.
const ADDRESSES_MAX: usize = 40;
/// Of so many addresses it is said what came of them.
const TOLD_MAX: usize = 4;

#[cfg(test)]
mod tests;
