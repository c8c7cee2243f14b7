//! What a machine of the model does about an order: a decision, and then what is done about it, with anything in between.

use super::*;

impl World {
    /// One step of an order. Returns what is to follow.
    pub(super) fn step(&mut self, order: &Order) -> Task {
        let (at, now) = (order.at, self.now);
        let (id, is_move) = (self.commands[order.by].id, self.commands[order.by].is_move);
        let part_of = is_move.then_some(id);
        let sees = self.machines[at].sees;
        let refused = |refusal: Refusal| Task::Answer(Done::failed(refusal.why(), "refused"));
        let changed = || Task::Answer(Done::failed(Why::Changed, "changed"));
        match order.task.clone() {
            Task::Leave(tree) => match self.machines[at].moves.leave(id, &tree, now) {
                Ok(()) => Task::Answer(Done::Ready),
                Err(Refusal::Kept(kept)) => {
                    let is_over = self.ask_whether_over(&kept);
                    Task::LeaveHeard(tree, *kept, is_over)
                }
                Err(refusal) => refused(refusal),
            },
            Task::LeaveHeard(tree, kept, is_over) => {
                if !is_over {
                    return refused(Refusal::Kept(Box::new(kept)));
                }
                self.release(at, &kept);
                Task::Leave(tree)
            }
            Task::Keep(kept) => match self.machines[at].moves.keep(&kept) {
                Ok(is_new) => {
                    self.machines[at].durable.extend(is_new.then_some(kept));
                    Task::Answer(Done::Ready)
                }
                Err(refusal) => refused(refusal),
            },
            Task::Place { path, bytes, overwrite } => {
                let there = self.directories[sees].named.get(&path).copied();
                let replaces = there.filter(|&(there, _)| there != bytes).map(|(_, inode)| inode);
                match self.machines[at].moves.may_place(&spot(&path), replaces.is_some(), part_of) {
                    Ok(()) if there.is_some() && replaces.is_none() => {
                        Task::Answer(Done::There { inode: 0, lost: Lost::default() })
                    }
                    Ok(()) if replaces.is_some() && !overwrite => Task::Answer(Done::failed(Why::InTheWay, "")),
                    Ok(()) if !self.can_be_fetched(bytes) => Task::Answer(Done::failed(Why::Unreachable, "")),
                    Ok(()) => Task::Publish { path, bytes, replaces },
                    Err(Refusal::Kept(kept)) => {
                        let is_over = self.ask_whether_over(&kept);
                        Task::PlaceHeard { path, bytes, overwrite, kept: *kept, is_over }
                    }
                    Err(refusal) => refused(refusal),
                }
            }
            Task::PlaceHeard { path, bytes, overwrite, kept, is_over } => {
                if !is_over {
                    return refused(Refusal::Kept(Box::new(kept)));
                }
                self.release(at, &kept);
                Task::Place { path, bytes, overwrite }
            }
            Task::Publish { path, bytes, replaces } => {
                if let Err(refusal) = self.machines[at].moves.may_place(&spot(&path), replaces.is_some(), part_of) {
                    return refused(refusal);
                }
                let there = self.directories[sees].named.get(&path).copied();
                if there.map(|(_, inode)| inode) != replaces {
                    return changed();
                }
                self.inodes += 1;
                self.directories[sees].named.insert(path, (bytes, self.inodes));
                // It was the user's wish, and no move was about it.
                self.given_up.extend(there.map(|(bytes, _)| bytes).filter(|&bytes| self.copies(bytes) == 0));
                Task::Answer(Done::Placed { received: 0, inode: 0, lost: Lost::default() })
            }
            Task::Prepare { path, bytes } => match self.machines[at].moves.prepare(id, &spot(&path), now) {
                Ok(None) => Task::Rename { path, bytes },
                Ok(Some(aside)) => Task::Answer(Done::Prepared { aside }),
                Err(refusal) => refused(refusal),
            },
            Task::Rename { path, bytes } => {
                let Some(file) = self.directories[sees].named.get(&path).copied().filter(|&(there, _)| there == bytes)
                else {
                    self.machines[at].moves.ended(&spot(&path));
                    let is_gone = !self.directories[sees].named.contains_key(&path);
                    return if is_gone { Task::Answer(Done::Removed) } else { changed() };
                };
                let number = self.rng.u64(..);
                self.directories[sees].named.remove(&path);
                self.directories[sees].aside.insert(number, (at, path.clone(), file));
                match self.machines[at].moves.prepared(&spot(&path), number) {
                    Prepared::Standing => Task::Answer(Done::Prepared { aside: number }),
                    Prepared::Unwanted => {
                        self.put_back(sees, number);
                        self.machines[at].moves.ended(&spot(&path));
                        refused(Refusal::NotLeaving)
                    }
                }
            }
            Task::Confirm { path, bytes, aside } => match self.machines[at].moves.confirm(id, &spot(&path)) {
                Ok(()) => Task::Look { path, bytes, aside },
                Err(refusal) => refused(refusal),
            },
            Task::Look { path, bytes, aside } => {
                let directory = &self.directories[sees];
                let is_there = directory.named.get(&path).is_some_and(|&(there, _)| there == bytes);
                if is_there && !directory.aside.contains_key(&aside) {
                    Task::Answer(Done::Confirmed)
                } else {
                    changed()
                }
            }
            Task::Finish { path, aside, remove } => {
                match self.machines[at].moves.finish(id, &spot(&path), aside, now) {
                    Ok(()) => Task::Unlink { path, aside, remove },
                    Err(refusal) => {
                        let is_gone = !self.directories[sees].named.contains_key(&path)
                            && !self.machines[at].moves.is_aside(&spot(&path));
                        if is_gone { Task::Answer(Done::Removed) } else { refused(refusal) }
                    }
                }
            }
            Task::Unlink { path, aside, remove } => {
                let done = if remove {
                    let gone = self.directories[sees].aside.remove(&aside);
                    let is_last = gone.is_some_and(|(.., (bytes, _))| {
                        bytes < OF_COPIES && !self.given_up.contains(&bytes) && self.copies(bytes) == 0
                    });
                    assert!(!is_last, "the last copy of {path} was removed at {at}");
                    Done::Removed
                } else {
                    self.put_back(sees, aside);
                    Done::PutBack
                };
                self.machines[at].moves.ended(&spot(&path));
                Task::Answer(done)
            }
            Task::End => {
                let (standing, kept) = (self.machines[at].moves.end(id), self.machines[at].moves.kept_for(id));
                self.put_all_back(at, standing);
                kept.iter().for_each(|kept| self.release(at, kept));
                match self.machines[at].moves.is_moving(id) {
                    true => Task::Answer(Done::failed(Why::Busy, "moving")),
                    false => Task::Answer(Done::Ready),
                }
            }
            Task::Answer(done) => Task::Answer(done),
        }
    }

    pub(super) fn ask_whether_over(&mut self, kept: &Kept) -> bool {
        let source = (0..self.machines.len()).find(|&machine| peer(machine) == kept.source).unwrap();
        let is_heard = !self.has_faults || self.rng.u32(0..4) > 0;
        if !self.machines[source].is_up || !is_heard {
            return false;
        }
        match self.machines[source].moves.is_over(kept.id, self.now) {
            Over::Yes(standing) => {
                self.put_all_back(source, standing);
                true
            }
            Over::No => false,
        }
    }

    fn release(&mut self, at: usize, kept: &Kept) {
        self.machines[at].moves.release(kept);
        self.machines[at].durable.retain(|other| other != kept);
    }

    fn can_be_fetched(&self, bytes: Bytes) -> bool {
        let has = |machine: &Machine| {
            machine.is_up && self.directories[machine.sees].named.values().any(|&(there, _)| there == bytes)
        };
        bytes >= OF_COPIES || self.machines.iter().any(has)
    }

    pub(super) fn put_all_back(&mut self, at: usize, standing: Vec<(Spot, u64)>) {
        let sees = self.machines[at].sees;
        for (spot, number) in standing {
            self.put_back(sees, number);
            self.machines[at].moves.ended(&spot);
        }
    }

    /// Puts something back, under another name if its own is taken.
    pub(super) fn put_back(&mut self, directory: usize, number: u64) {
        let is_shared = self.machines.iter().filter(|machine| machine.sees == directory).count() > 1;
        let directory = &mut self.directories[directory];
        let Some((_, mut path, file)) = directory.aside.remove(&number) else { return };
        while directory.named.contains_key(&path) {
            // A place in a tree that leaves is nobody's but who does not know of that.
            assert!(is_shared, "{path} was taken while it was set aside");
            path = format!("{path}'")[..].try_into().unwrap();
        }
        directory.named.insert(path, file);
    }

    fn copies(&self, bytes: Bytes) -> usize {
        let in_one = |directory: &Directory| {
            let files = directory.named.values().chain(directory.aside.values().map(|(.., file)| file));
            files.filter(|&&(there, _)| there == bytes).count()
        };
        self.directories.iter().map(in_one).sum()
    }
}
