//! What each peer has at a path, what became of it, and who has a blob.

use std::{
    collections::{BTreeSet, VecDeque},
    ops::ControlFlow,
    os::unix::ffi::OsStrExt,
};

use blobstore::{FileRef, Presence, Repair};
use namespace::{ArenaName, Content, EntryKind, Happened, PeerId, Version};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tree::UnixTime;

use super::{Node, blocking, list::rfc3339, pins::text_of};
use crate::{
    event::{self, Event, FileName, Reporter, summary},
    failure::{Code, Failure},
    target::Target,
};

/// Which changes are asked for: `POST /v1/history`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct HistoryScope {
    /// Of this arena only.
    #[serde(default)]
    pub(crate) arena: Option<ArenaName>,
    /// Of this peer only, by name.
    #[serde(default)]
    pub(crate) peer: Option<String>,
    /// Behind this number of that peer's log, or of this machine's if none is named.
    #[serde(default)]
    pub(crate) since: Option<u64>,
    /// Whether to wait for more.
    #[serde(default)]
    pub(crate) follow: bool,
}

impl Node {
    /// All that is known of one path: what is shown, and what each peer has.
    pub async fn stat(&self, target: Target) -> Result<Value, Failure> {
        let node = self.clone();
        blocking(move || {
            let shown = node.shown(&target)?;
            let versions = node.inner.namespace.versions(&target.arena, &shown.path)?;
            let versions: Vec<_> = versions.into_iter().map(|(peer, version)| node.version(peer, &version)).collect();
            let pins = node.inner.namespace.pins()?;
            let entry = node.entry(&target, shown, &pins)?;
            let ranges = match entry.blob.map(|blob| node.inner.store.presence(blob)).transpose()? {
                Some(Presence::Partial(ranges)) => Some(ranges),
                _ => None,
            };
            let mut value = serde_json::to_value(Event::Entry(entry))?;
            if let Some(ranges) = ranges {
                value["ranges_here"] = serde_json::to_value(ranges)?;
            }
            let pin = pins.covering(&target.arena, target.path.as_ref()).map(text_of);
            value["pin"] = pin.into();
            value["versions"] = serde_json::to_value(versions)?;
            Ok(value)
        })
        .await
    }

    /// Who has the file that is shown at a path, under whichever name, and how much of it is here.
    pub(crate) async fn whereis(&self, target: Target) -> Result<Value, Failure> {
        let node = self.clone();
        blocking(move || {
            let shown = node.shown(&target)?;
            let EntryKind::Leaf(Content::File { blob, size, .. }) = shown.kind else {
                return Err(Failure::new(Code::Usage, format!("{target} is not a file")));
            };
            let here = match node.inner.store.presence(blob)? {
                Presence::InPlace | Presence::Cached => size,
                Presence::Partial(ranges) => ranges.iter().map(|range| range.len()).sum(),
                Presence::None => 0,
            };
            let at_path: BTreeSet<PeerId> = shown.peers.iter().copied().flatten().collect();
            let mut peers: BTreeSet<PeerId> = node.inner.namespace.peers_with(blob)?.into_iter().collect();
            peers.extend(&at_path);
            let status = node.inner.peers.status();
            let peers: Vec<_> = peers
                .into_iter()
                .map(|id| {
                    let status = status.iter().find(|status| status.peer.id == id);
                    let last_connected = status.and_then(|status| status.last_connected);
                    let through = match status {
                        Some(_) => None,
                        None => node.inner.namespace.told_by(id)?,
                    };
                    Ok(json!({
                        "name": node.peer_name(Some(id)),
                        "id": id.to_string(),
                        "connected": status.is_some_and(|status| status.connected.is_some()),
                        "last_connected": last_connected.map(|seconds| rfc3339(UnixTime { seconds, nanos: 0 })),
                        "through": through.map(|peer| node.peer_name(Some(peer))),
                        "same_path": at_path.contains(&id),
                    }))
                })
                .collect::<Result<_, Failure>>()?;
            let files = node.inner.store.holders(blob, HOLDERS_TOLD)?;
            let files: Vec<_> = files
                .into_iter()
                .filter_map(|file| Some(FileName::new(&node.arena_of(file.root)?, &file.path)))
                .collect();
            let pins = node.inner.namespace.pins()?;
            let mut value = serde_json::to_value(Event::Entry(node.entry(&target, shown, &pins)?))?;
            value["bytes_here"] = here.into();
            value["files_here"] = serde_json::to_value(files)?;
            value["holders"] = Value::Array(peers);
            Ok(value)
        })
        .await
    }

    /// Reports the paths at and below `targets`, or anywhere, that are in conflict.
    pub(crate) async fn conflicts(&self, targets: Vec<Target>, reporter: &Reporter) -> Result<Code, Failure> {
        let (node, reporting) = (self.clone(), reporter.clone());
        let count = blocking(move || {
            let all = || Ok::<_, Failure>(node.inner.namespace.all_arenas()?.into_iter());
            let targets = match targets.is_empty() {
                true => all()?.map(|arena| Target { arena, path: None }).collect(),
                false => targets,
            };
            let mut count = 0_u64;
            for target in targets {
                node.expect(&target)?;
                let mut paths = Vec::new();
                node.inner.namespace.list(&target.arena, target.path.as_ref(), true, &mut |entry| {
                    if entry.in_conflict {
                        paths.push(entry.path);
                    }
                    ControlFlow::Continue(())
                })?;
                count += paths.len() as u64;
                for path in paths {
                    let mut versions = node.inner.namespace.versions(&target.arena, &path)?;
                    versions.retain(|(_, version)| version.content.is_present());
                    let first = namespace::shown(&versions).map(|shown| shown.version.0);
                    versions.sort_by_key(|(peer, _)| Some(*peer) != first);
                    let versions = versions.iter().map(|(peer, version)| node.version(*peer, version)).collect();
                    let file = FileName::new(&target.arena, path.as_bytes());
                    reporting.send_blocking(Event::Conflict { file, versions })?;
                }
            }
            Ok(count)
        });
        let count = count.await?;
        reporter.send(summary(json!({ "conflicts": count }))).await?;
        Ok(Code::Ok)
    }

    /// Reports what changed, by the peers' clocks; then, if asked to, whatever changes, for as long as somebody listens.
    ///
    /// Directories are left out but for their deletion: they change with whatever is in them.
    pub(crate) async fn history(&self, scope: HistoryScope, reporter: &Reporter) -> Result<Code, Failure> {
        let one = match (&scope.peer, scope.since) {
            (Some(name), _) => Some(self.peer_called(name)?),
            (None, Some(_)) => Some(None),
            (None, None) => None,
        };
        if let Some(arena) = &scope.arena {
            let (node, arena) = (self.clone(), arena.clone());
            blocking(move || node.expect_arena_or_its_past(&arena)).await?;
        }
        let mut changes = self.inner.namespace.changes();
        let mut logs: Vec<Log> = Vec::new();
        let (with_repairs, mut repairs_told) = (matches!(one, None | Some(None)) && scope.since.is_none(), 0);
        loop {
            changes.borrow_and_update();
            let peers: Vec<Option<PeerId>> = match one {
                Some(peer) => vec![peer],
                None => {
                    let others = self.inner.namespace.cursors()?.into_keys().map(Some);
                    std::iter::once(None).chain(others).collect()
                }
            };
            for peer in peers {
                if logs.iter().all(|log| log.peer != peer) {
                    logs.push(Log { peer, after: scope.since.unwrap_or(0), page: Vec::new().into_iter() });
                }
            }
            let (node, arena, reporting) = (self.clone(), scope.arena.clone(), reporter.clone());
            (logs, repairs_told) = blocking(move || {
                let mut repairs = node.repairs_after(repairs_told, arena.as_ref(), with_repairs)?;
                let told = repairs.back().map_or(repairs_told, |(_, repair)| repair.number);
                Ok((node.report_changes(logs, &mut repairs, arena.as_ref(), &reporting)?, told))
            })
            .await?;
            if !scope.follow {
                return Ok(Code::Ok);
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Ok(Code::Ok) },
                () = reporter.closed() => return Ok(Code::Ok),
            }
        }
    }

    /// Fails if nobody has such an arena, and no log has a change of it.
    fn expect_arena_or_its_past(&self, arena: &ArenaName) -> Result<(), Failure> {
        if self.inner.namespace.all_arenas()?.contains(arena) {
            return Ok(());
        }
        for peer in std::iter::once(None).chain(self.inner.namespace.cursors()?.into_keys().map(Some)) {
            let mut after = 0;
            loop {
                let page = self.inner.namespace.history(peer, after, PAGE_ROWS)?;
                let Some(last) = page.last() else { break };
                after = last.version.seq;
                if page.iter().any(|change| change.arena == *arena) {
                    return Ok(());
                }
            }
        }
        Err(Failure::new(Code::NotFound, format!("there is no arena {arena}")).hint("see what there is with: blob ls"))
    }

    /// Reports what the logs have, merged by time.
    fn report_changes(
        &self,
        mut logs: Vec<Log>,
        repairs: &mut VecDeque<(FileName, Repair)>,
        arena: Option<&ArenaName>,
        reporter: &Reporter,
    ) -> Result<Vec<Log>, Failure> {
        loop {
            for log in logs.iter_mut().filter(|log| log.page.len() == 0) {
                log.page = self.inner.namespace.history(log.peer, log.after, PAGE_ROWS)?.into_iter();
            }
            let next = |log: &&mut Log| log.page.as_slice().first().map(|next| next.at);
            let log = logs.iter_mut().filter(|log| next(log).is_some()).min_by_key(next);
            let at = log.as_ref().and_then(next).unwrap_or(u64::MAX);
            while let Some((file, repair)) = repairs.pop_front_if(|(_, repair)| repair.at <= at) {
                reporter.send_blocking(self.repair_event(file, &repair))?;
            }
            let Some(log) = log else { return Ok(logs) };
            let Some(Happened { arena: of, path, version, at }) = log.page.next() else { continue };
            log.after = version.seq;
            let is_directory = matches!(version.content, Content::Directory { .. });
            if is_directory || arena.is_some_and(|arena| *arena != of) {
                continue;
            }
            let change = match version.content {
                Content::Deleted => "deleted",
                Content::Withdrawn => "withdrawn",
                _ if version.previous.is_empty() => "new",
                _ => "changed",
            };
            let time = UnixTime { seconds: (at / 1000) as i64, nanos: (at % 1000) as u32 * 1_000_000 };
            reporter.send_blocking(Event::Change {
                time: rfc3339(time),
                change: change.into(),
                file: FileName::new(&of, path.as_bytes()),
                version: self.version(log.peer, &version),
            })?;
        }
    }

    /// The repairs of files in arenas here, or in `arena`, behind number `after`.
    fn repairs_after(
        &self,
        after: u64,
        arena: Option<&ArenaName>,
        wanted: bool,
    ) -> Result<VecDeque<(FileName, Repair)>, Failure> {
        if !wanted {
            return Ok(VecDeque::new());
        }
        let arenas = self.inner.namespace.arenas()?;
        let named = |repair: Repair| {
            let held = arenas.iter().filter(|held| arena.is_none_or(|arena| held.name == *arena));
            let mut below = held.filter_map(|held| Some((held, repair.path.strip_prefix(held.dir.as_ref()?).ok()?)));
            let (held, path) = below.next()?;
            Some((FileName::new(&held.name, path.as_os_str().as_bytes()), repair))
        };
        let repairs = self.inner.store.repairs()?.into_iter().filter(|repair| repair.number > after);
        Ok(repairs.filter_map(named).collect())
    }

    /// The files at and below `target` of which a repair is saved.
    pub(super) fn repaired_files(&self, target: &Target) -> Result<Vec<(ArenaName, FileRef)>, Failure> {
        let arena = self.inner.namespace.arenas()?.into_iter().find(|arena| arena.name == target.arena);
        let found = arena.and_then(|arena| arena.dir).zip(self.root(&target.arena));
        let Some((dir, root)) = found else {
            let failure = format!("this machine does not hold an arena {}", target.arena);
            return Err(Failure::new(Code::NotFound, failure));
        };
        let at = target.path.as_ref().map_or(dir.clone(), |path| dir.join(path.as_path()));
        let mut files: Vec<FileRef> = Vec::new();
        for repair in self.inner.store.repairs()?.into_iter().filter(|repair| repair.path.starts_with(&at)) {
            let Ok(path) = repair.path.strip_prefix(&dir) else { continue };
            let file = FileRef { root, path: path.as_os_str().as_bytes().to_owned() };
            if !files.contains(&file) {
                files.push(file);
            }
        }
        Ok(files.into_iter().map(|file| (target.arena.clone(), file)).collect())
    }

    fn repair_event(&self, file: FileName, repair: &Repair) -> Event {
        let time = UnixTime { seconds: (repair.at / 1000) as i64, nanos: (repair.at % 1000) as u32 * 1_000_000 };
        let change = if repair.is_undo { "undone" } else { "repaired" };
        let version = event::Version {
            peer: self.peer_name(None),
            state: "file".into(),
            blob: Some(repair.blob),
            size: None,
            mtime: rfc3339(time),
            seq: repair.number,
            previous: Vec::new(),
        };
        Event::Change { time: rfc3339(time), change: change.into(), file, version }
    }

    fn version(&self, peer: Option<PeerId>, version: &Version) -> event::Version {
        let (state, blob, size) = match &version.content {
            Content::File { blob, size, .. } => ("file", Some(*blob), Some(*size)),
            Content::Symlink { .. } => ("symlink", None, None),
            Content::Directory { .. } => ("dir", None, None),
            Content::Deleted => ("deleted", None, None),
            Content::Withdrawn => ("withdrawn", None, None),
        };
        let (mtime, seq) = (rfc3339(version.mtime), version.seq);
        let previous = version.previous.clone();
        event::Version { peer: self.peer_name(peer), state: state.into(), blob, size, mtime, seq, previous }
    }

    /// The machine that is called `name`, `None` standing for this one.
    fn peer_called(&self, name: &str) -> Result<Option<PeerId>, Failure> {
        if name == self.inner.name {
            return Ok(None);
        }
        let mut others = self.inner.namespace.cursors()?.into_keys();
        let found = others.find(|&id| self.peer_name(Some(id)) == name || id.to_string() == name);
        found.map(Some).ok_or_else(|| Failure::new(Code::NotFound, format!("no machine is called {name}")))
    }
}

/// How far a log was reported.
struct Log {
    peer: Option<PeerId>,
    after: u64,
    page: std::vec::IntoIter<Happened>,
}

const PAGE_ROWS: usize = 1024;
/// How many of the files here that have a blob are named.
const HOLDERS_TOLD: usize = 16;
