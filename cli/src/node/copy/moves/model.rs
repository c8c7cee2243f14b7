//! A model of moves: a few machines, some of which see one directory, several moves and copies at once, any interleaving of
//! their steps, and faults at each: crashes, restarts, answers that are lost, orders that come twice or late, silence. All comes
//! from one seed. Whatever happens, a move never removes the last complete copy of anything; when all is over, nothing is set
//! aside and nothing is kept in vain; and without faults a move ends as a move.
//!
//! The decisions are the real ones ([`Moves`], [`Crossing`]). What they are asked about is simulated: between a decision and what
//! is done about it, anything else may happen, as it may between threads.

use std::{collections::BTreeMap, time::Duration};

use fastrand::Rng;
use namespace::{PeerId, RelPath};
use peers::{Done, Lost, MoveId, Why};

use super::*;

mod steps;

const PATHS: [&str; 3] = ["a", "d/a", "d/b"];
/// How many moves and copies there are at most.
const COMMANDS_MAX: usize = 20;

/// What is in a file: so many contents there are. Those of copies are kept elsewhere, too.
type Bytes = u32;
const OF_COPIES: Bytes = 1000;

/// A file: its content and its inode.
type File = (Bytes, u64);

#[derive(Default)]
struct Directory {
    named: BTreeMap<RelPath, File>,
    /// By the number of the directory that it is in; with the machine that has put it there.
    aside: BTreeMap<u64, (usize, RelPath, File)>,
}

struct Machine {
    moves: Moves,
    /// What of that is on the disk.
    durable: Vec<Kept>,
    /// The directory that it sees.
    sees: usize,
    is_up: bool,
}

/// An order on its way or being carried out.
#[derive(Clone)]
struct Order {
    /// Who gave it: a move or copy, and which of its entries.
    by: usize,
    entry: Option<usize>,
    /// Who carries it out.
    at: usize,
    task: Task,
    /// Whether its next step comes late, so that much else may happen before.
    is_slow: bool,
}

#[derive(Clone, Debug)]
enum Task {
    Leave(Tree),
    /// The source of a move that is in the way has said whether that is over.
    LeaveHeard(Tree, Kept, bool),
    Keep(Kept),
    Place {
        path: RelPath,
        bytes: Bytes,
        overwrite: bool,
    },
    PlaceHeard {
        path: RelPath,
        bytes: Bytes,
        overwrite: bool,
        kept: Kept,
        is_over: bool,
    },
    /// The bytes have come; this is replaced, if it is still there.
    Publish {
        path: RelPath,
        bytes: Bytes,
        replaces: Option<u64>,
    },
    Prepare {
        path: RelPath,
        bytes: Bytes,
    },
    Rename {
        path: RelPath,
        bytes: Bytes,
    },
    Confirm {
        path: RelPath,
        bytes: Bytes,
        aside: u64,
    },
    Look {
        path: RelPath,
        bytes: Bytes,
        aside: u64,
    },
    Finish {
        path: RelPath,
        aside: u64,
        remove: bool,
    },
    Unlink {
        path: RelPath,
        aside: u64,
        remove: bool,
    },
    End,
    Answer(Done),
}

/// A move, or a copy that replaces, and the machine that directs it.
struct Command {
    id: MoveId,
    director: usize,
    from: usize,
    to: usize,
    tree: Tree,
    is_move: bool,
    /// Whether it replaces what is in its way.
    overwrites: bool,
    entries: Vec<(RelPath, Bytes, Crossing)>,
    stage: Stage,
    /// Whether somebody has not said whether the source has removed an entry.
    is_unknown: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Leaving,
    Keeping,
    Crossing,
    EndingThere,
    EndingHere,
    Ended,
    /// The machine that directed it is no more.
    Dead,
}

struct World {
    rng: Rng,
    machines: Vec<Machine>,
    directories: Vec<Directory>,
    commands: Vec<Command>,
    orders: Vec<Order>,
    now: Duration,
    inodes: u64,
    has_faults: bool,
    /// One step in so many has a fault, and one command in so many is a copy that replaces.
    fault_in: u32,
    replaces_in: u32,
    /// How many commands are still to begin.
    to_come: usize,
    /// What no copy is left of because the user had it replaced, and no move was about it.
    given_up: Vec<Bytes>,
}

fn peer(machine: usize) -> PeerId {
    PeerId::from_bytes([machine as u8; 32])
}

fn arena() -> ArenaName {
    "t".parse().unwrap()
}

fn spot(path: &RelPath) -> Spot {
    (arena(), path.clone())
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let count = rng.usize(2..=4);
        let has_faults = rng.u32(0..4) > 0;
        let is_single = !has_faults && rng.bool();
        let mut directories: Vec<Directory> = (0..count).map(|_| Directory::default()).collect();
        let machines: Vec<Machine> = (0..count)
            .map(|machine| {
                let sees = if !is_single && rng.u32(0..6) == 0 { rng.usize(0..count) } else { machine };
                Machine { moves: Moves::default(), durable: Vec::new(), sees, is_up: true }
            })
            .collect();
        // Few places, so that what happens at once meets: opposing moves of what many have, or of what only one has.
        let paths: Vec<RelPath> = PATHS[..rng.usize(1..=3)].iter().map(|&path| path.try_into().unwrap()).collect();
        let (is_rare, fault_in, replaces_in) = (rng.bool(), rng.u32(8..60), rng.u32(2..5));
        let mut inodes = 0;
        for (at, directory) in directories.iter_mut().enumerate() {
            for (bytes, path) in paths.iter().enumerate() {
                let is_here = if is_rare { at == bytes % count } else { rng.u32(0..3) > 0 };
                if is_here && !(is_single && at > 0) {
                    inodes += 1;
                    directory.named.insert(path.clone(), (bytes as Bytes, inodes));
                }
            }
        }
        let to_come = if is_single { 0 } else { rng.usize(0..COMMANDS_MAX) };
        let mut world = Self {
            rng,
            machines,
            directories,
            commands: Vec::new(),
            orders: Vec::new(),
            now: Duration::from_secs(1000),
            inodes,
            has_faults,
            fault_in,
            replaces_in,
            to_come,
            given_up: Vec::new(),
        };
        world.command(is_single);
        world
    }

    /// A move or a copy begins.
    fn command(&mut self, is_single: bool) {
        let (number, count) = (self.commands.len() as u64, self.machines.len());
        let from = if is_single { 0 } else { self.rng.usize(0..count) };
        let to = (from + self.rng.usize(1..count)) % count;
        let director = self.rng.usize(0..count);
        if !self.machines[director].is_up {
            return;
        }
        let path = [None, Some("d"), Some("a"), Some("a")][self.rng.usize(0..4)].map(|path| path.try_into().unwrap());
        let tree = Tree { arena: arena(), path };
        // What another machine sees, too, it may replace at any time, as any program may.
        let sees = self.machines[to].sees;
        let is_shared = self.machines.iter().filter(|machine| machine.sees == sees).count() > 1;
        let is_move = is_single || is_shared || self.rng.u32(0..self.replaces_in) > 0;
        let named = &self.directories[self.machines[from].sees].named;
        let mut entries: Vec<_> = named
            .iter()
            .filter(|(path, _)| tree.has(&spot(path)))
            .map(|(path, &(bytes, _))| (path.clone(), bytes, Crossing::Place))
            .collect();
        if !is_move {
            let replaced = PATHS.map(|path| RelPath::try_from(path).unwrap());
            entries = replaced
                .into_iter()
                .filter(|path| tree.has(&spot(path)))
                .map(|path| (path, OF_COPIES + number as Bytes, Crossing::Place))
                .collect();
        }
        let id = MoveId { director: peer(director), number };
        let stage = if is_move { Stage::Leaving } else { Stage::Crossing };
        let overwrites = !is_move || !is_shared && self.rng.bool();
        let is_unknown = false;
        self.commands.push(Command { id, director, from, to, tree, is_move, overwrites, entries, stage, is_unknown });
        self.ask_next(self.commands.len() - 1, None);
    }

    /// Has the next order of a command, or of an entry of it, go out.
    fn ask_next(&mut self, by: usize, entry: Option<usize>) {
        let command = &self.commands[by];
        let (from, to) = (command.from, command.to);
        let kept = Kept { id: command.id, tree: command.tree.clone(), source: peer(from), source_arena: arena() };
        let (at, task) = match (command.stage, entry) {
            (Stage::Leaving, _) => (from, Task::Leave(command.tree.clone())),
            (Stage::Keeping, _) => (to, Task::Keep(kept)),
            (Stage::Crossing, None) => {
                for entry in 0..command.entries.len() {
                    self.ask_next(by, Some(entry));
                }
                return self.end_if_crossed(by);
            }
            (Stage::EndingThere, _) => (from, Task::End),
            (Stage::EndingHere, _) => (to, Task::End),
            (Stage::Ended | Stage::Dead, _) => return,
            (Stage::Crossing, Some(entry)) => {
                let (path, bytes, crossing) = command.entries[entry].clone();
                match crossing {
                    Crossing::Place => (to, Task::Place { path, bytes, overwrite: command.overwrites }),
                    Crossing::Prepare => (from, Task::Prepare { path, bytes }),
                    Crossing::Confirm { aside } => (to, Task::Confirm { path, bytes, aside }),
                    Crossing::Finish { aside, remove } => (from, Task::Finish { path, aside, remove }),
                    Crossing::Moved | Crossing::Stays | Crossing::Unknown => return self.end_if_crossed(by),
                }
            }
        };
        let is_slow = self.is_slow();
        self.orders.push(Order { by, entry, at, task, is_slow });
    }

    fn end_if_crossed(&mut self, by: usize) {
        let command = &mut self.commands[by];
        let is_crossed = |crossing| match crossing {
            Crossing::Moved | Crossing::Stays | Crossing::Unknown => true,
            Crossing::Prepare => !command.is_move,
            _ => false,
        };
        if command.stage == Stage::Crossing && command.entries.iter().all(|&(.., crossing)| is_crossed(crossing)) {
            command.stage = if command.is_move { Stage::EndingThere } else { Stage::Ended };
            self.ask_next(by, None);
        }
    }

    /// An answer has come to who directs, or it was waited for in vain.
    fn answered(&mut self, by: usize, entry: Option<usize>, asked: &Task, answer: Option<&Done>) {
        let command = &mut self.commands[by];
        let is_ready = answer == Some(&Done::Ready);
        match (command.stage, entry) {
            (Stage::Leaving, _) if is_ready => command.stage = Stage::Keeping,
            (Stage::Keeping, _) if is_ready => command.stage = Stage::Crossing,
            (Stage::Leaving | Stage::Keeping, _) => command.stage = Stage::EndingThere,
            (Stage::Crossing, Some(entry)) => {
                let crossing = &mut command.entries[entry].2;
                let is_it = match asked {
                    Task::Place { .. } => *crossing == Crossing::Place,
                    Task::Prepare { .. } => *crossing == Crossing::Prepare,
                    Task::Confirm { .. } => matches!(crossing, Crossing::Confirm { .. }),
                    Task::Finish { .. } => matches!(crossing, Crossing::Finish { .. }),
                    _ => false,
                };
                // It was answered before, and given up or given twice.
                if !is_it {
                    return;
                }
                *crossing = crossing.answered(answer);
                command.is_unknown |= *crossing == Crossing::Unknown;
                if !command.is_move && *crossing == Crossing::Prepare {
                    return self.end_if_crossed(by);
                }
            }
            (Stage::EndingThere, _) => {
                command.stage = if command.is_unknown || !is_ready { Stage::Ended } else { Stage::EndingHere };
            }
            (Stage::EndingHere, _) => command.stage = Stage::Ended,
            (Stage::Crossing, None) | (Stage::Ended | Stage::Dead, _) => return,
        }
        self.ask_next(by, entry);
    }

    fn crash(&mut self, at: usize) {
        self.machines[at].is_up = false;
        self.orders.retain(|order| order.at != at);
        for command in
            self.commands.iter_mut().filter(|command| command.director == at && command.stage != Stage::Ended)
        {
            command.stage = Stage::Dead;
        }
        // Who waits for it hears that the stream broke off, sooner or later.
        self.lose_what_nobody_does();
    }

    fn restart(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        (machine.is_up, machine.moves) = (true, Moves::new(machine.durable.clone()));
        let sees = machine.sees;
        let own = self.directories[sees].aside.iter().filter(|(_, (by, ..))| *by == at).map(|(&number, _)| number);
        for number in own.collect::<Vec<_>>() {
            self.put_back(sees, number);
        }
    }

    fn expire(&mut self, at: usize) {
        if self.machines[at].is_up {
            let standing = self.machines[at].moves.expire(self.now);
            self.put_all_back(at, standing);
        }
    }

    fn is_slow(&mut self) -> bool {
        self.has_faults && self.rng.u32(0..10) == 0
    }

    /// What is waited for and was lost is given up.
    fn lose_what_nobody_does(&mut self) {
        for by in 0..self.commands.len() {
            let is_under_way = |entry| self.orders.iter().any(|order| order.by == by && order.entry == entry);
            let (stage, count) = (self.commands[by].stage, self.commands[by].entries.len());
            match stage {
                Stage::Ended | Stage::Dead => {}
                Stage::Crossing => {
                    let lost: Vec<_> = (0..count).filter(|&entry| !is_under_way(Some(entry))).collect();
                    for entry in lost {
                        let (path, bytes, crossing) = self.commands[by].entries[entry].clone();
                        let asked = match crossing {
                            Crossing::Place => Task::Place { path, bytes, overwrite: false },
                            Crossing::Prepare => Task::Prepare { path, bytes },
                            Crossing::Confirm { aside } => Task::Confirm { path, bytes, aside },
                            Crossing::Finish { aside, remove } => Task::Finish { path, aside, remove },
                            _ => continue,
                        };
                        self.answered(by, Some(entry), &asked, None);
                    }
                }
                _ if is_under_way(None) => {}
                _ => self.answered(by, None, &Task::End, None),
            }
        }
    }

    fn is_over(&self) -> bool {
        let is_quiet = self.orders.is_empty() && self.to_come == 0;
        is_quiet && self.commands.iter().all(|command| matches!(command.stage, Stage::Ended | Stage::Dead))
    }

    /// Something happens.
    fn tick(&mut self) {
        if self.has_faults {
            match self.rng.u32(0..self.fault_in) {
                0 => {
                    let at = self.rng.usize(0..self.machines.len());
                    if self.machines[at].is_up { self.crash(at) } else { self.restart(at) }
                }
                1..4 => {
                    self.now += Duration::from_secs(self.rng.u64(1..100));
                    let at = self.rng.usize(0..self.machines.len());
                    self.expire(at);
                }
                4 => self.lose_what_nobody_does(),
                _ => {}
            }
        }
        let quick: Vec<usize> = (0..self.orders.len()).filter(|&order| !self.orders[order].is_slow).collect();
        if self.to_come > 0 && (quick.is_empty() || self.rng.u32(0..10) == 0) {
            self.to_come -= 1;
            return self.command(false);
        }
        if self.orders.is_empty() {
            return self.lose_what_nobody_does();
        }
        let next = match &quick[..] {
            [_, ..] if self.rng.u32(0..50) > 0 => quick[self.rng.usize(0..quick.len())],
            _ => self.rng.usize(0..self.orders.len()),
        };
        let order = self.orders.swap_remove(next);
        if !self.machines[order.at].is_up {
            return;
        }
        if let Task::Answer(done) = &order.task {
            let asked = self.asked(&order);
            let is_lost = self.has_faults && self.rng.u32(0..20) == 0;
            if !is_lost && let Some(asked) = asked {
                self.answered(order.by, order.entry, &asked, Some(done));
            }
            return;
        }
        if self.has_faults && self.rng.u32(0..30) == 0 && is_first_step(&order.task) {
            // It comes again, or late: who gave it has given it up by then.
            self.orders.push(order.clone());
            if self.rng.bool() {
                if self.commands[order.by].stage != Stage::Dead {
                    self.answered(order.by, order.entry, &order.task, None);
                }
                return;
            }
        }
        let next = self.step(&order);
        let is_slow = self.is_slow();
        self.orders.push(Order { task: next, is_slow, ..order });
    }

    /// What was asked that an answer is for, as the director sees it: what it waits for.
    fn asked(&self, order: &Order) -> Option<Task> {
        let command = &self.commands[order.by];
        let Some(entry) = order.entry else { return Some(Task::End) };
        let (path, bytes, crossing) = command.entries[entry].clone();
        let Task::Answer(done) = &order.task else { return None };
        Some(match (crossing, done) {
            (Crossing::Place, Done::Placed { .. } | Done::There { .. } | Done::Failed { .. }) => {
                Task::Place { path, bytes, overwrite: false }
            }
            (Crossing::Prepare, Done::Prepared { .. } | Done::Removed | Done::Failed { .. }) => {
                Task::Prepare { path, bytes }
            }
            (Crossing::Confirm { aside }, Done::Confirmed | Done::Failed { .. }) => {
                Task::Confirm { path, bytes, aside }
            }
            (Crossing::Finish { aside, remove }, Done::Removed | Done::PutBack | Done::Failed { .. }) => {
                Task::Finish { path, aside, remove }
            }
            _ => return None,
        })
    }

    fn run(&mut self) {
        let mut ticks = 0;
        while !self.is_over() {
            self.tick();
            ticks += 1;
            assert!(ticks < 100_000, "it does not end");
        }
        if self.has_faults {
            // Everybody is back, and time goes by.
            for at in 0..self.machines.len() {
                if !self.machines[at].is_up {
                    self.restart(at);
                }
            }
            self.has_faults = false;
            self.now += SILENCE_LIMIT;
            (0..self.machines.len()).for_each(|at| self.expire(at));
        } else if let [command] = &self.commands[..] {
            self.is_moved(command);
        }
        for at in 0..self.machines.len() {
            assert!(self.machines[at].moves.is_quiet() && self.machines[at].moves.aside.is_empty());
            for kept in self.machines[at].moves.kept.clone() {
                assert!(self.ask_whether_over(&kept), "kept in vain: {kept:?}");
            }
        }
        assert!(self.directories.iter().all(|directory| directory.aside.is_empty()), "something stays set aside");
    }

    /// A move that nothing disturbs has moved everything.
    fn is_moved(&self, command: &Command) {
        if !command.is_move || self.machines[command.from].sees == self.machines[command.to].sees {
            return;
        }
        let there = |machine: usize, path| self.directories[self.machines[machine].sees].named.contains_key(path);
        for (path, _, crossing) in &command.entries {
            let is_conflict = *crossing == Crossing::Stays && there(command.to, path);
            assert!(*crossing == Crossing::Moved || is_conflict, "{path}: {crossing:?}");
            assert!(is_conflict || !there(command.from, path) && there(command.to, path), "{path}");
        }
    }
}

fn is_first_step(task: &Task) -> bool {
    matches!(
        task,
        Task::Leave(_)
            | Task::Keep(_)
            | Task::Place { .. }
            | Task::Prepare { .. }
            | Task::Confirm { .. }
            | Task::Finish { .. }
    )
}

#[test]
fn no_interleaving_of_moves_loses_anything() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let (first, count) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("MOVES_SEEDS").unwrap_or(100_000)),
    };
    for seed in first..first + count {
        let ran = std::panic::catch_unwind(|| World::new(seed).run());
        assert!(ran.is_ok(), "SEED={seed} shows it again");
    }
}
