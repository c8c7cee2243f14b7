use std::ops::ControlFlow;

use blobstore::Presence;
use jiff::Timestamp;
use namespace::{Content, EntryKind, Pins};
use tree::UnixTime;

use super::{Node, blocking};
use crate::{
    event::{Entry, Event, Reporter},
    failure::{Code, Failure, WhileDoing},
    target::{JsonPath, Target},
};

impl Node {
    /// Reports the arenas, or what is in an arena or a directory of one; `recursive` goes all the way down, `brief` leaves
    /// out how much of each file is here.
    pub async fn list(
        &self,
        target: Option<Target>,
        recursive: bool,
        brief: bool,
        reporter: &Reporter,
    ) -> Result<(), Failure> {
        let (node, reporter) = (self.clone(), reporter.clone());
        blocking(move || match target {
            None => node.list_arenas(recursive, brief, &reporter),
            Some(target) => {
                node.list_target(&target, recursive, brief, &reporter).while_doing(format!("list {target}"))
            }
        })
        .await
    }

    fn list_arenas(&self, recursive: bool, brief: bool, reporter: &Reporter) -> Result<(), Failure> {
        let pins = self.inner.namespace.pins()?;
        for arena in self.inner.namespace.all_arenas()? {
            reporter.send_blocking(Event::Entry(Entry {
                arena: arena.to_string(),
                path: b""[..].into(),
                kind: "arena".into(),
                size: None,
                mtime: None,
                blob: None,
                target: None,
                peers: Vec::new(),
                local: None,
                bytes_here: None,
                pinned: pins.covering(&arena, None).is_some(),
                conflict: false,
            }))?;
            if recursive {
                self.list_target(&Target { arena, path: None }, true, brief, reporter)?;
            }
        }
        Ok(())
    }

    fn list_target(&self, target: &Target, recursive: bool, brief: bool, reporter: &Reporter) -> Result<(), Failure> {
        let mut outcome = Ok(());
        let mut is_empty = true;
        let pins = self.inner.namespace.pins()?;
        self.inner.namespace.list(&target.arena, target.path.as_ref(), recursive, &mut |entry| {
            is_empty = false;
            let shown = if brief { self.brief_entry(target, entry) } else { self.entry(target, entry, &pins) };
            let sent = shown.and_then(|entry| Ok(reporter.send_blocking(Event::Entry(entry))?));
            match sent {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    outcome = Err(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        outcome?;
        if is_empty { self.expect(target) } else { Ok(()) }
    }

    /// Fails if there is no such arena or path.
    pub(super) fn expect(&self, target: &Target) -> Result<(), Failure> {
        match &target.path {
            Some(_) => self.shown(target).map(drop),
            None if self.inner.namespace.all_arenas()?.contains(&target.arena) => Ok(()),
            None => Err(not_found(target)),
        }
    }

    /// What is shown at a path.
    pub(super) fn shown(&self, target: &Target) -> Result<namespace::Entry, Failure> {
        let Some(path) = &target.path else {
            self.expect(target)?;
            return Err(
                Failure::new(Code::Usage, format!("{target} is an arena")).hint("name a path in it: ARENA/PATH")
            );
        };
        self.inner.namespace.entry(&target.arena, path)?.ok_or_else(|| not_found(target))
    }

    pub(super) fn entry(&self, target: &Target, entry: namespace::Entry, pins: &Pins) -> Result<Entry, Failure> {
        let pinned = pins.covering(&target.arena, Some(&entry.path)).is_some();
        let entry = self.brief_entry(target, entry)?;
        let size = entry.size.unwrap_or(0);
        let here = match entry.blob.map(|blob| self.inner.store.presence(blob)).transpose()? {
            Some(Presence::InPlace) => Some(("in_place", size)),
            Some(Presence::Cached) => Some(("cached", size)),
            Some(Presence::Partial(ranges)) => Some(("partial", ranges.total_bytes())),
            Some(Presence::None) => Some(("none", 0)),
            None => None,
        };
        let (local, bytes_here) = (here.map(|(local, _)| local.to_owned()), here.map(|(_, bytes)| bytes));
        Ok(Entry { local, bytes_here, pinned, ..entry })
    }

    /// An entry without how much of it is here.
    fn brief_entry(&self, target: &Target, entry: namespace::Entry) -> Result<Entry, Failure> {
        let (kind, size, blob, link) = match entry.kind {
            EntryKind::Directory => ("dir", None, None, None),
            EntryKind::Leaf(Content::File { blob, size, .. }) => ("file", Some(size), Some(blob), None),
            EntryKind::Leaf(Content::Symlink { target }) => ("symlink", None, None, Some(target)),
            EntryKind::Leaf(_) => return Err(not_found(target)),
        };
        Ok(Entry {
            arena: target.arena.to_string(),
            path: JsonPath::from(&entry.path),
            kind: kind.into(),
            size,
            mtime: entry.mtime.map(rfc3339),
            blob,
            target: link.map(|target| target[..].into()),
            peers: entry.peers.into_iter().map(|peer| self.peer_name(peer)).collect(),
            local: None,
            bytes_here: None,
            pinned: false,
            conflict: entry.in_conflict,
        })
    }
}

pub(super) fn not_found(target: &Target) -> Failure {
    Failure::new(Code::NotFound, format!("there is no {target}")).hint("see what there is with: blob ls -R")
}

/// RFC 3339 with nanoseconds, UTC; a moment outside the years -9999 to 9999 as the nearest within.
pub(crate) fn rfc3339(time: UnixTime) -> String {
    let nearest = if time.seconds < 0 { Timestamp::MIN } else { Timestamp::MAX };
    // jiff takes nanoseconds that point away from the second, so a moment before 1970 may need another second.
    let nanos = i32::try_from(time.nanos).unwrap_or(0);
    let timestamp = if time.seconds < 0 && nanos > 0 {
        Timestamp::new(time.seconds + 1, nanos - 1_000_000_000)
    } else {
        Timestamp::new(time.seconds, nanos)
    };
    format!("{:.9}", timestamp.unwrap_or(nearest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_text() {
        for (seconds, nanos, text) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (1_700_000_000, 5, "2023-11-14T22:13:20.000000005Z"),
            (-1, 999_999_999, "1969-12-31T23:59:59.999999999Z"),
            (-5, 250_000_000, "1969-12-31T23:59:55.250000000Z"),
        ] {
            assert_eq!(rfc3339(UnixTime { seconds, nanos }), text);
        }
        assert!(rfc3339(UnixTime { seconds: i64::MAX, nanos: 1 }).starts_with("9999-"));
        assert!(rfc3339(UnixTime { seconds: i64::MIN, nanos: 1 }).starts_with("-009999-"));
    }
}
