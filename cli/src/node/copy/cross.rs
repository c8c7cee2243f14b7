//! What the machine that directs a copy or a move asks of the others: for the whole of it, and for each entry in turn. Order:
//! spec/copy.md, "Moves".

use std::{
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use namespace::{Content, Known, RelPath};
use peers::{
    Attributes, Confirm, Details, Done, Finish, Leave, Lost, Order, Place as PlaceOrder, Pledge, Prepare, Task, Why,
};
use tokio::time::timeout;
use tracing::info;
use tree::BlobId;

use super::{
    attributes::KeepAttributes,
    describe::Described,
    hands::Hands,
    moves::Crossing,
    plan::Place,
    run::{Copying, Ended, Source, code_of},
};
use crate::{
    failure::{Code, Failure},
    target::Target,
};

impl Copying {
    /// Marks the source of a move as leaving, and has the destination keep where it goes.
    pub(super) async fn mark(&self, source: &Source) -> Result<(), Failure> {
        let Target { arena, path } = source.place.target.clone();
        let leave = Task::Leave(Leave { number: self.number, path });
        let pledge = Task::Pledge(Pledge {
            number: self.number,
            path: source.top.clone(),
            // Without a source in the order, a machine takes the one that asks for it.
            source: source.peer,
            source_arena: arena.clone(),
        });
        let to = self.scope.to.target.arena.clone();
        for (hands, arena, task) in [(&source.hands, arena, leave), (&self.there, to, pledge)] {
            if let done @ Done::Failed { .. } = hands.ask(Order { arena, task }, |_| {}).await? {
                return Err(self.undone(done));
            }
        }
        Ok(())
    }

    /// Ends a move: at its sources, and then at the destination, if each source has said what became of everything.
    pub(super) async fn end_move(&self, sources: &[Arc<Source>]) {
        if !self.scope.moves || self.scope.dry_run {
            return;
        }
        let mut is_over = self.unknown.load(Ordering::Acquire) == 0;
        for source in sources {
            is_over &= self.end_at(&source.hands, &source.place).await;
        }
        // Otherwise the destination asks them when somebody wants to know.
        if is_over {
            self.end_at(&self.there, &self.scope.to).await;
        }
    }

    async fn end_at(&self, hands: &Hands, place: &Place) -> bool {
        let order = Order { arena: place.target.arena.clone(), task: Task::End(self.number) };
        let has_ended = matches!(timeout(END_LIMIT, hands.ask(order, |_| {})).await, Ok(Ok(Done::Ready)));
        if !has_ended {
            info!(peer = self.node.peer_name(hands.peer()), arena = %place.target.arena, "a move could not be ended there; it ends by itself");
        }
        has_ended
    }

    /// Has the destination place an entry, and for a move the source remove it. What was not kept is added to `lost`.
    pub(super) async fn place_and_remove(
        &self,
        source: &Source,
        known: &Known,
        described: &Described,
        to: &RelPath,
        lost: &mut Lost,
        on_bytes: impl Fn(u64),
    ) -> Result<Ended, Failure> {
        if source.taken.contains(to) {
            return Err(Failure::new(Code::Error, "an earlier source has something there: both would have one name"));
        }
        let version = &known.version;
        let keeps = self.node.inner.keep_attributes != KeepAttributes::No;
        let (wanted, file) = match described {
            Ok(Some(Details { attributes, file })) => (attributes.clone(), *file),
            _ => Default::default(),
        };
        let place = PlaceOrder {
            path: to.clone(),
            content: version.content.clone(),
            mtime: version.mtime,
            overwrite: self.scope.overwrite,
            prove: self.scope.moves,
            // Without a source in the order, a machine takes the one that asks for it.
            from: source.peer,
            attributes: if keeps { wanted.clone() } else { Attributes::default() },
            link: None,
            part_of: self.scope.moves.then_some(self.number),
        };
        let slot = file.and_then(|file| self.linked.slot((source.peer, file)));
        let done = self.place(place, slot, lost, on_bytes).await?;
        if Crossing::Place.answered(Some(&done)) != Crossing::Prepare {
            return Err(self.undone(done));
        }
        let received = match done {
            Done::Placed { received, .. } => Some(received),
            _ => None,
        };
        if received.is_none() && !self.scope.moves {
            // What is there stays as it is, and is nobody's loss.
            *lost = Lost::default();
        } else {
            lost.attributes |= !keeps && !wanted.is_empty();
        }
        self.totals().files_without_attributes += u64::from(lost.attributes);
        self.totals().files_without_permissions += u64::from(lost.mode);
        if self.scope.moves && keeps {
            // A file of which that is not known stays.
            let why = match described {
                Err(reason) => Some(format!("its extended attributes are not known: {reason}")),
                Ok(_) if lost.attributes => Some(NOT_KEPT.to_owned()),
                Ok(_) => None,
            };
            if let Some(why) = why {
                let hint = "to move it without them, set attributes = false in [copy] of config.toml";
                return Err(stays(Failure::new(Code::Error, why).hint(hint)));
            }
        }
        if matches!(version.content, Content::Directory { .. }) {
            if self.scope.moves {
                source.dirs.lock().unwrap_or_else(PoisonError::into_inner).push((known.clone(), to.clone()));
            }
            return Ok(Ended::Directory);
        }
        if !self.scope.moves {
            return Ok(received.map_or(Ended::Skipped, Ended::Copied));
        }
        let is_file = matches!(version.content, Content::File { .. });
        let attributes = (keeps && is_file).then(|| wanted.digest());
        let is_empty = self.remove(source, known, to, attributes).await?;
        debug_assert!(is_empty, "only a directory is not empty");
        Ok(Ended::Moved(received.unwrap_or(0)))
    }

    /// Has the source remove an entry that the destination has, whose extended attributes have this digest if they are
    /// compared. Returns whether it did: a directory may not be empty.
    async fn remove(
        &self,
        source: &Source,
        known: &Known,
        to: &RelPath,
        attributes: Option<BlobId>,
    ) -> Result<bool, Failure> {
        let (mut step, mut failure, mut is_again) = (Crossing::Prepare, None, false);
        loop {
            let (hands, order) = self.order(source, known, to, attributes, step);
            let may_remove = matches!(step, Crossing::Finish { remove: true, .. });
            if may_remove {
                self.unknown.fetch_add(1, Ordering::AcqRel);
            }
            let answer = hands.ask(order, |_| {}).await;
            let next = step.answered(answer.as_ref().ok());
            if may_remove && next != Crossing::Unknown {
                self.unknown.fetch_sub(1, Ordering::AcqRel);
            }
            match answer {
                Ok(Done::NotEmpty) => return Ok(false),
                // While a large file was on its way, the source got no order, and may have given the move up.
                Ok(Done::Failed { why: Why::Over, .. }) if step == Crossing::Prepare && !is_again => {
                    is_again = true;
                    self.mark(source).await.map_err(stays)?;
                    continue;
                }
                Ok(done @ Done::Failed { .. }) if failure.is_none() => failure = Some(self.undone(done)),
                Err(error) if failure.is_none() => failure = Some(error),
                _ => {}
            }
            step = next;
            let strange = || Failure::new(Code::Error, "the other machine answers something else than it was asked");
            match step {
                Crossing::Moved => return Ok(true),
                Crossing::Stays => return Err(stays(failure.unwrap_or_else(strange))),
                Crossing::Unknown => {
                    let doing = "it is at the destination, and perhaps at the source, too";
                    return Err(failure.unwrap_or_else(strange).while_doing(doing));
                }
                _ => {}
            }
        }
    }

    /// The order of a step behind placing, and who gets it.
    fn order<'a>(
        &'a self,
        source: &'a Source,
        known: &Known,
        to: &RelPath,
        attributes: Option<BlobId>,
        step: Crossing,
    ) -> (&'a Hands, Order) {
        let (number, path, content) = (self.number, known.path.clone(), known.version.content.clone());
        let (hands, place, task) = match step {
            Crossing::Confirm { aside } => {
                let confirm = Confirm { number, path: to.clone(), content, aside };
                (&self.there, &self.scope.to, Task::Confirm(confirm))
            }
            Crossing::Finish { aside, remove } => {
                (&source.hands, &source.place, Task::Finish(Finish { number, path, aside, remove }))
            }
            _ => (&source.hands, &source.place, Task::Prepare(Prepare { number, path, content, attributes })),
        };
        (hands, Order { arena: place.target.arena.clone(), task })
    }

    pub(super) async fn remove_directory(&self, source: &Source, known: Known, to: RelPath) -> Result<(), Failure> {
        let Err(failure) = self.remove(source, &known, &to, None).await else { return Ok(()) };
        let target = Target { arena: source.place.target.arena.clone(), path: Some(known.path) };
        self.failed(source, &target, None, None, failure.reason()).await
    }

    /// What an order that was not carried out comes to. After a refusal, nothing more is tried.
    fn undone(&self, done: Done) -> Failure {
        let Done::Failed { why, reason } = done else {
            return Failure::new(Code::Error, "the other machine answers something else than it was asked");
        };
        let failure = Failure::new(code_of(why), reason);
        if why == Why::Refused {
            self.refused.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure.clone());
        }
        failure
    }
}

/// How long a machine may take to end a move.
const END_LIMIT: Duration = Duration::from_secs(10);

fn stays(failure: Failure) -> Failure {
    failure.while_doing("it is at the destination, and stays at the source")
}

const NOT_KEPT: &str = "its extended attributes could not be kept at the destination";
