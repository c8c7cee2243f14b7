//! `blob cp` and `blob mv`: goes through what is to be copied, has the destination place it, and for a move then has the
//! source remove it. Rules: spec/copy.md.

use std::{
    collections::{BTreeMap, HashSet},
    ops::ControlFlow,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use namespace::{Content, Known, PeerId, RelPath};
use peers::{DETAILS_MAX, Done, FileId, Link, Lost, Order, Task, Why};
use serde_json::json;
use tokio::{sync::mpsc, time::timeout};

use super::{
    super::{Node, blocking, patience::Patience},
    describe::{Described, Linked, not_kept},
    hands::Hands,
    plan::{CopyScope, Place, destination, origin},
};
use crate::{
    event::{Copied, Event, FileName, NobodyListens, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

/// A copy or a move under way.
pub(super) struct Copying {
    pub(super) node: Node,
    reporter: Reporter,
    pub(super) scope: CopyScope,
    pub(super) to: Option<PeerId>,
    pub(super) there: Hands,
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    totals: Mutex<Totals>,
    /// What became of files with several names.
    pub(super) linked: Linked<(Option<PeerId>, FileId), Link>,
    /// Why nothing more can be done.
    pub(super) refused: Mutex<Option<Failure>>,
    /// The number of the move.
    pub(super) number: u64,
    /// How many entries there are of which nobody has said yet whether the source has removed them.
    pub(super) unknown: AtomicU64,
    patience: Arc<Patience>,
}

#[derive(Clone, Default)]
pub(super) struct Totals {
    files: u64,
    bytes: u64,
    bytes_sent: u64,
    skipped_files: u64,
    failed_files: u64,
    pub(super) hard_links: u64,
    special_files: u64,
    pub(super) files_without_attributes: u64,
    pub(super) files_without_permissions: u64,
    unreachable: bool,
}

/// One source, and the machine that it is at.
pub(super) struct Source {
    pub(super) place: Place,
    pub(super) peer: Option<PeerId>,
    /// Where it goes; `None` is the arena root.
    pub(super) top: Option<RelPath>,
    pub(super) hands: Hands,
    /// The directories that were placed, with where, and are removed if they are empty in the end.
    pub(super) dirs: Mutex<Vec<(Known, RelPath)>>,
    /// Where an earlier source has something, too.
    pub(super) taken: HashSet<RelPath>,
}

/// How one entry ended.
pub(super) enum Ended {
    Copied(u64),
    Moved(u64),
    Skipped,
    /// A directory that is there.
    Directory,
}

impl Node {
    /// Copies or moves trees between machines, as `scope` says.
    pub(crate) async fn copy(&self, scope: CopyScope, reporter: &Reporter) -> Result<Code, Failure> {
        let started = Instant::now();
        let to = self.machine(&scope.to)?;
        if scope.sources.len() > 1 && !scope.goes_into() {
            return Err(Failure::new(Code::Usage, format!("there are several sources, and {} is one name", scope.to))
                .hint("put a / behind it, to copy into it"));
        }
        let less_for = to.filter(|_| !scope.retry_silent);
        let patience = Arc::new(Patience::new(self, reporter, Duration::from_secs(scope.retry_s), less_for));
        let mut sources = Vec::new();
        for place in &scope.sources {
            let (peer, top) = (self.machine(place)?, scope.top(&place.target)?);
            if peer == to {
                check_same_machine(&scope, place, top.as_ref())?;
            }
            let hands = Hands::new(self, peer, &patience);
            sources.push(Source {
                place: place.clone(),
                peer,
                top,
                hands,
                dirs: Mutex::default(),
                taken: HashSet::new(),
            });
        }
        let copying = Arc::new(Copying {
            node: self.clone(),
            reporter: reporter.clone(),
            to,
            there: Hands::new(self, to, &patience),
            total_bytes: AtomicU64::new(0),
            done_bytes: AtomicU64::new(0),
            totals: Mutex::default(),
            linked: Linked::default(),
            refused: Mutex::default(),
            number: fastrand::u64(..),
            unknown: AtomicU64::new(0),
            patience,
            scope,
        });
        copying.prepare_all(&mut sources).await?;
        let sources: Vec<_> = sources.into_iter().map(Arc::new).collect();
        let ran = tokio::select! {
            ran = copying.run(&sources) => ran,
            () = reporter.closed() => Err(NobodyListens.into()),
        };
        copying.end_move(&sources).await;
        ran?;
        copying.end(started).await
    }

    /// The machine of a place, by its name, or by its id; `None` is this one.
    fn machine(&self, place: &Place) -> Result<Option<PeerId>, Failure> {
        let Some(name) = &place.peer else { return Ok(None) };
        if *name == self.name() {
            return Ok(None);
        }
        if let Some(peer) = self.inner.peers.roster().by_name(name) {
            return Ok(Some(peer.id));
        }
        let unknown = || {
            Failure::new(Code::NotFound, format!("no peer is called {name}"))
                .hint("see whom there is with: blob peer ls")
        };
        match name.parse() {
            Ok(id) if id == self.inner.peers.me() => Ok(None),
            Ok(id) if self.inner.peers.roster().get(id).is_some() => Ok(Some(id)),
            _ => Err(unknown()),
        }
    }
}

/// What must not be done within one machine.
fn check_same_machine(scope: &CopyScope, source: &Place, top: Option<&RelPath>) -> Result<(), Failure> {
    if scope.moves {
        return Err(Failure::new(Code::Usage, format!("{source} and {} are at the same machine", scope.to))
            .hint("there, plain mv does it at once, and blobd takes note: nothing is read or sent"));
    }
    let from = source.target.path.as_ref();
    let is_inside = match (from, top) {
        (None, _) => true,
        (Some(from), Some(top)) => top.is_within(from) && top != from,
        (Some(_), None) => false,
    };
    if scope.to.target.arena == source.target.arena && is_inside {
        return Err(Failure::new(Code::Usage, format!("{source} cannot be copied into itself")));
    }
    Ok(())
}

impl Copying {
    pub(super) fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn action(&self) -> &'static str {
        if self.scope.moves { "moving" } else { "copying" }
    }

    /// Brings what is known of the sources up to date, and finds where several have something.
    async fn prepare_all(&self, sources: &mut [Source]) -> Result<(), Failure> {
        for number in 0..sources.len() {
            let (earlier, this) = sources.split_at_mut(number);
            let this = &mut this[0];
            tokio::select! {
                prepared = self.prepare(this) => prepared?,
                () = self.reporter.closed() => return Err(NobodyListens.into()),
            }
            this.taken = self.taken_by(earlier, this)?;
        }
        Ok(())
    }

    /// Where `this` source would have something, other than a directory, where an `earlier` one has something.
    fn taken_by(&self, earlier: &[Source], this: &Source) -> Result<HashSet<RelPath>, Failure> {
        let is_within = |inner: &Option<RelPath>, outer: &Option<RelPath>| match (inner, outer) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(inner), Some(outer)) => inner.is_within(outer),
        };
        let meet = |other: &&Source| is_within(&other.top, &this.top) || is_within(&this.top, &other.top);
        let earlier: Vec<_> = earlier.iter().filter(meet).collect();
        let (mut taken, mut failed) = (HashSet::new(), None);
        if earlier.is_empty() {
            return Ok(taken);
        }
        self.each(this, &mut |known| {
            let from = this.place.target.path.as_ref();
            let Ok(Some(to)) = destination(from, this.top.as_ref(), &known.path) else {
                return ControlFlow::Continue(());
            };
            let is_directory = |content: &Content| matches!(content, Content::Directory { .. });
            for other in &earlier {
                let Some(path) = origin(other.place.target.path.as_ref(), other.top.as_ref(), &to) else { continue };
                match self.node.inner.namespace.known_of(other.peer, &other.place.target.arena, Some(&path), None, 1) {
                    Ok(there) => {
                        let there =
                            there.into_iter().find(|there| there.path == path).map(|there| there.version.content);
                        if there.is_some_and(|there| !is_directory(&there) || !is_directory(&known.version.content)) {
                            taken.insert(to.clone());
                        }
                    }
                    Err(error) => failed = Some(Failure::from(error)),
                }
            }
            if failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        failed.map_or(Ok(taken), Err)
    }

    async fn run(self: &Arc<Self>, sources: &[Arc<Source>]) -> Result<(), Failure> {
        if !self.scope.dry_run {
            self.check(&self.there, &self.scope.to).await?;
            for source in sources.iter().filter(|_| self.scope.moves) {
                self.check(&source.hands, &source.place).await?;
            }
            for source in sources.iter().filter(|_| self.scope.moves) {
                self.mark(source).await.while_doing(format!("move {}", source.place))?;
            }
        }
        for source in sources {
            let doing = format!("{} {}", if self.scope.moves { "move" } else { "copy" }, source.place);
            self.transfer(source).await.while_doing(doing)?;
        }
        Ok(())
    }

    /// Brings what is known of a source up to date, as far as that is possible, and counts it.
    async fn prepare(&self, source: &Source) -> Result<(), Failure> {
        let Target { arena, path } = source.place.target.clone();
        match source.peer {
            None => {
                if self.node.root(&arena).is_none() {
                    return Err(Failure::new(Code::NotFound, format!("this machine does not hold an arena {arena}"))
                        .hint("name the machine that has it: PEER:ARENA/PATH; see blob whereis"));
                }
                let (node, at) = (self.node.clone(), path.clone());
                let looking = tokio::spawn(async move {
                    let (reporter, mut events) = Reporter::new();
                    tokio::spawn(async move { while events.recv().await.is_some() {} });
                    node.reconcile(&arena, vec![at], false, &reporter).await
                });
                // A scan of everything may be under way. What is known is copied then.
                if let Ok(looked) = timeout(LOOK_LIMIT, looking).await {
                    looked.map_err(Failure::from)??;
                }
            }
            Some(peer) => {
                if !self.node.inner.peers.wait_for_catalog(peer, CATALOG_LIMIT).await {
                    let name = self.node.peer_name(Some(peer));
                    let reason = format!("what {name} has is still coming in, so this may not be all; try again later");
                    self.failed(source, &source.place.target, None, None, reason).await?;
                }
            }
        }
        let (mut bytes, mut count) = (0, 0_u64);
        self.each(source, &mut |known| {
            count += 1;
            if let Content::File { size, .. } = known.version.content {
                bytes += size;
            }
            ControlFlow::Continue(())
        })?;
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
        let special =
            self.node.special(source.peer, &source.place.target.arena, source.place.target.path.as_ref()).await;
        self.totals().special_files += special;
        // An arena may be empty; of anything else something must be known.
        if count == 0 && source.place.target.path.is_some() {
            return Err(Failure::new(Code::NotFound, format!("there is no {}", source.place))
                .hint("see what there is with: blob ls -R"));
        }
        Ok(())
    }

    /// Goes through what is known of a source, in the order of paths.
    fn each(&self, source: &Source, visit: &mut dyn FnMut(Known) -> ControlFlow<()>) -> Result<(), Failure> {
        let Target { arena, path } = &source.place.target;
        let mut after: Option<RelPath> = None;
        loop {
            let page =
                self.node.inner.namespace.known_of(source.peer, arena, path.as_ref(), after.as_ref(), PAGE_ROWS)?;
            let is_last = page.len() < PAGE_ROWS;
            after = page.last().map(|known| known.path.clone());
            for known in page {
                if visit(known).is_break() {
                    return Ok(());
                }
            }
            if is_last {
                return Ok(());
            }
        }
    }

    /// Makes sure that a machine takes orders for an arena before anything is done.
    async fn check(&self, hands: &Hands, place: &Place) -> Result<(), Failure> {
        let order = Order { arena: place.target.arena.clone(), task: Task::Check };
        match hands.ask(order, |_| {}).await? {
            Done::Failed { why, reason } => Err(Failure::new(code_of(why), reason)),
            _ => Ok(()),
        }
    }

    async fn transfer(self: &Arc<Self>, source: &Arc<Source>) -> Result<(), Failure> {
        let (jobs, mut listed) = mpsc::channel(JOBS_AHEAD);
        let (copying, from) = (self.clone(), source.clone());
        let listing = blocking(move || {
            copying.each(&from, &mut |known| match jobs.blocking_send(known) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            })
        });
        let jobs = stream::poll_fn(move |context| listed.poll_recv(context));
        let (copying, from) = (self.clone(), source.clone());
        let described = jobs.ready_chunks(DETAILS_MAX).map(move |entries| {
            let (copying, from) = (copying.clone(), from.clone());
            async move { stream::iter(copying.describe(&from, entries).await) }
        });
        let (copying, from) = (self.clone(), source.clone());
        let described = described.buffered(DESCRIBED_AHEAD).flatten();
        let working = described.for_each_concurrent(FILES_AT_ONCE, move |(known, described)| {
            let (copying, from) = (copying.clone(), from.clone());
            async move {
                if copying.is_refused().is_none() {
                    let _ = copying.one(&from, known, described).await;
                }
            }
        });
        let (listing, ()) = tokio::join!(listing, working);
        listing?;
        let dirs = std::mem::take(&mut *source.dirs.lock().unwrap_or_else(PoisonError::into_inner));
        // Deepest first; those of one depth are in nobody's way.
        let mut by_depth: BTreeMap<usize, Vec<(Known, RelPath)>> = BTreeMap::new();
        for (known, to) in dirs {
            let depth = known.path.as_bytes().iter().filter(|&&b| b == b'/').count();
            by_depth.entry(depth).or_default().push((known, to));
        }
        for dirs in by_depth.into_values().rev() {
            let removing = dirs.into_iter().map(|(known, to)| self.remove_directory(source, known, to));
            stream::iter(removing)
                .buffer_unordered(FILES_AT_ONCE)
                .collect::<Vec<_>>()
                .await
                .into_iter()
                .collect::<Result<(), _>>()?;
        }
        self.is_refused().map_or(Ok(()), Err)
    }

    fn is_refused(&self) -> Option<Failure> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Copies or moves one entry, and reports it.
    async fn one(&self, source: &Source, known: Known, described: Described) -> Result<(), Failure> {
        let target = Target { arena: source.place.target.arena.clone(), path: Some(known.path.clone()) };
        let to = match destination(source.place.target.path.as_ref(), source.top.as_ref(), &known.path) {
            Ok(Some(to)) => to,
            // The arena root itself is there.
            Ok(None) => {
                let reason = "an arena is in the way: name a path in it".to_owned();
                return self.failed(source, &target, None, Some(&known), reason).await;
            }
            Err(error) => return self.failed(source, &target, None, Some(&known), tree::reason(&error)).await,
        };
        let (counted, latest) = (AtomicU64::new(0), AtomicU64::new(0));
        let on_bytes = |so_far: u64| {
            if latest.swap(so_far, Ordering::Relaxed) < so_far {
                self.patience.came();
            }
            let more = so_far.saturating_sub(counted.fetch_max(so_far, Ordering::Relaxed));
            self.progress(more);
        };
        let mut lost = Lost::default();
        let ended = loop {
            if self.scope.dry_run {
                break self.would(&known, &to);
            }
            let attempt = self.patience.begin();
            let ended = self.place_and_remove(source, &known, &described, &to, &mut lost, on_bytes).await;
            let Err(failure) = &ended else {
                self.patience.came();
                break ended;
            };
            // What was done of it stays done when it is done again.
            if !self.patience.again(attempt, self.to.into_iter().chain(source.peer), failure).await {
                break ended;
            }
        };
        let bytes = size_of(&known);
        self.progress(bytes.saturating_sub(counted.load(Ordering::Relaxed)));
        let (event, sent): (fn(Copied) -> Event, u64) = match ended {
            Ok(Ended::Directory) => return Ok(()),
            Ok(Ended::Skipped) => {
                self.totals().skipped_files += 1;
                (Event::Skipped, 0)
            }
            Ok(Ended::Copied(sent)) => (Event::Copied, sent),
            Ok(Ended::Moved(sent)) => (Event::Moved, sent),
            Err(failure) => {
                self.totals().unreachable |= failure.code == Code::Unreachable;
                return self.failed(source, &target, Some(&to), Some(&known), failure.reason()).await;
            }
        };
        let event =
            event(Copied { not_kept: not_kept(lost), ..self.line(source, &target, Some(&to), Some(&known), sent) });
        if !matches!(event, Event::Skipped(_)) {
            let mut totals = self.totals();
            totals.files += 1;
            totals.bytes += bytes;
            totals.bytes_sent += sent;
        }
        Ok(self.reporter.send(event).await?)
    }

    /// What would become of an entry, by the catalogs.
    fn would(&self, known: &Known, to: &RelPath) -> Result<Ended, Failure> {
        let arena = &self.scope.to.target.arena;
        let there = self.node.inner.namespace.known_of(self.to, arena, Some(to), None, 1)?.pop();
        let (content, is_there) = (&known.version.content, there.is_some());
        let there = there.filter(|there| there.path == *to).map(|there| there.version.content);
        let is_directory = |content: &Content| matches!(content, Content::Directory { .. });
        let same = there.as_ref().is_some_and(|there| there.is_same(content));
        match &there {
            _ if is_directory(content) && (same || there.is_none()) => Ok(Ended::Directory),
            Some(_) if same && !self.scope.moves => Ok(Ended::Skipped),
            Some(there) if !same && (!self.scope.overwrite || is_directory(there) || is_directory(content)) => {
                Err(Failure::new(Code::Error, "something else is there already"))
            }
            None if is_there => Err(Failure::new(Code::Error, "a directory is in the way")),
            _ if self.scope.moves => Ok(Ended::Moved(0)),
            _ => Ok(Ended::Copied(0)),
        }
    }

    fn progress(&self, more: u64) {
        let done = self.done_bytes.fetch_add(more, Ordering::Relaxed) + more;
        let (total, files) = (self.total_bytes.load(Ordering::Relaxed), self.totals().files);
        self.reporter.progress(self.action(), done, Some(total), files);
    }

    fn line(&self, source: &Source, target: &Target, to: Option<&RelPath>, known: Option<&Known>, sent: u64) -> Copied {
        let place =
            |peer: &Option<String>, target: &Target| Place { peer: peer.clone(), target: target.clone() }.to_string();
        let to = Target { arena: self.scope.to.target.arena.clone(), path: to.cloned() };
        Copied {
            source: place(&source.place.peer, target),
            destination: place(&self.scope.to.peer, &to),
            blob: known.and_then(|known| known.version.content.blob()),
            bytes: known.map_or(0, size_of),
            bytes_received: sent,
            bytes_sent: Some(sent),
            not_kept: Vec::new(),
        }
    }

    pub(super) async fn failed(
        &self,
        source: &Source,
        target: &Target,
        to: Option<&RelPath>,
        known: Option<&Known>,
        reason: String,
    ) -> Result<(), Failure> {
        self.totals().failed_files += 1;
        let file = FileName::new(&target.arena, target.path.as_ref().map_or(&[][..], RelPath::as_bytes));
        let copy = Some(self.line(source, target, to.or(source.top.as_ref()), known, 0));
        Ok(self.reporter.send(Event::Failed { file, reason, copy }).await?)
    }

    async fn end(&self, started: Instant) -> Result<Code, Failure> {
        let totals = self.totals().clone();
        let mut fields = json!({
            "files": totals.files,
            "bytes": totals.bytes,
            "bytes_sent": totals.bytes_sent,
            "skipped_files": totals.skipped_files,
            "failed_files": totals.failed_files,
            "hard_links": totals.hard_links,
            "special_files": totals.special_files,
            "files_without_attributes": totals.files_without_attributes,
            "files_without_permissions": totals.files_without_permissions,
            "seconds": started.elapsed().as_secs_f64(),
        });
        if self.scope.dry_run {
            fields["dry_run"] = true.into();
        }
        self.reporter.send(summary(fields)).await?;
        Ok(match totals {
            Totals { failed_files: 0, .. } => Code::Ok,
            Totals { unreachable: true, files: 0, skipped_files: 0, .. } => Code::Unreachable,
            _ => Code::Some,
        })
    }
}

fn size_of(known: &Known) -> u64 {
    match known.version.content {
        Content::File { size, .. } => size,
        _ => 0,
    }
}

pub(super) fn code_of(why: Why) -> Code {
    match why {
        Why::NotFound => Code::NotFound,
        Why::Unreachable => Code::Unreachable,
        Why::Full => Code::Limit,
        Why::Failed | Why::Refused | Why::InTheWay | Why::Changed | Why::Busy | Why::Over => Code::Error,
    }
}

/// How long to wait for catalogs that are still coming in.
const CATALOG_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait until it is looked what is there.
const LOOK_LIMIT: Duration = Duration::from_secs(10);
const PAGE_ROWS: usize = 4096;
/// So many questions for details are under way.
const DESCRIBED_AHEAD: usize = 4;
const JOBS_AHEAD: usize = 256;
/// How many orders are under way; the bytes of files are bounded where they arrive.
const FILES_AT_ONCE: usize = 768;
