//! What `cp` and `mv` keep of entries beside their content: the source describes them, and the destination places them
//! accordingly, names of one file as such.

use namespace::Known;
use peers::{Done, Link, Lost, Order, Place, Task, Why};

use super::{
    describe::{Described, Slot},
    run::{Copying, Source},
};
use crate::failure::Failure;

impl Copying {
    /// Asks the source what there is to know of entries beside their content.
    pub(super) async fn describe(&self, source: &Source, entries: Vec<Known>) -> Vec<(Known, Described)> {
        let paths = entries.iter().map(|known| known.path.clone()).collect();
        let described: Vec<Described> = match self.scope.dry_run {
            true => entries.iter().map(|_| Ok(None)).collect(),
            false => match self.node.details(source.peer, &source.place.target.arena, paths).await {
                Ok(all) => all.into_iter().map(Ok).collect(),
                Err(reason) => entries.iter().map(|_| Err(reason.clone())).collect(),
            },
        };
        entries.into_iter().zip(described).collect()
    }

    /// Has the destination place something: as another name of the file in `slot`, if one is there and still is that file.
    /// `lost` hears what was not kept.
    pub(super) async fn place(
        &self,
        mut place: Place,
        slot: Option<Slot<Link>>,
        lost: &mut Lost,
        on_bytes: impl Fn(u64),
    ) -> Result<Done, Failure> {
        let mut first = match &slot {
            Some(slot) => Some(slot.lock().await),
            None => None,
        };
        place.link = first.as_deref().cloned().flatten();
        let order = |place| Order { arena: self.scope.to.target.arena.clone(), task: Task::Place(place) };
        let mut done = self.there.ask(order(place.clone()), &on_bytes).await?;
        let is_failed = matches!(&done, Done::Failed { why, .. } if *why != Why::Refused);
        if is_failed && place.link.is_some() {
            // Not every file system knows second names, and none knows any number of them.
            let alone = Place { link: None, ..place.clone() };
            done = self.there.ask(order(alone), &on_bytes).await?;
        }
        if let Done::Placed { inode, lost: is_lost, .. } | Done::There { inode, lost: is_lost, .. } = &done {
            *lost = *is_lost;
            let is_link = place.link.is_some_and(|link| link.inode == *inode);
            self.totals().hard_links += u64::from(is_link);
            if let Some(first) = first.as_deref_mut().filter(|_| !is_link) {
                *first = Some(Link { path: place.path, inode: *inode });
            }
        }
        Ok(done)
    }
}
