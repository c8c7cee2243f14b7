//! Which peer is asked for which ranges of a blob, when several have it.

use std::time::Duration;

use tree::{ByteRange, GROUP_BYTES, RangeSet};

/// Shares what is wanted of one blob among those that have it: each is asked for the next share when it is done with
/// the last one, so that the faster ones do more; a share is what its source brings in about two seconds. When all is
/// being sent by somebody, those that have nothing to do take over the end of what would take longest, so that a slow or dead
/// source costs no more than its share.
///
/// An answer ends at the first chunk group that the source does not have, and says nothing of those behind. So after an
/// answer that ended early, the source is asked which of them it has, and then for just these; one that gives nothing
/// however often it is asked is given up.
///
/// Calling order, for each source: [`poll`](Self::poll), then what it says. During a `Get`,
/// [`handle_piece`](Self::handle_piece) for what comes; it may be broken off once it [is needless](Self::is_needless);
/// then [`handle_answer`](Self::handle_answer). After a `Have`, [`handle_have`](Self::handle_have). In either case
/// [`handle_failure`](Self::handle_failure) instead if it failed, or [`handle_cut`](Self::handle_cut) if only its
/// connection did. When `poll` says nothing, it may say something later, unless the plan [is over](Self::is_over). `now`
/// is the time since some moment, and never goes back.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What is wanted and has not come yet.
    left: RangeSet,
    sources: Vec<Source>,
}

/// One peer to ask.
#[derive(Debug)]
struct Source {
    /// What of the wanted it is known or taken not to have.
    lacks: RangeSet,
    /// Up to here, it is taken to have the rest.
    trusted_to: u64,
    /// Questions since something came.
    idle: u32,
    /// Bytes a second, as measured with the last share.
    rate: Option<f64>,
    /// Whether anything came from it.
    has_sent: bool,
    task: Task,
}

#[derive(Debug)]
enum Task {
    /// It can be asked.
    None,
    /// It is being asked which of these it has.
    Having(RangeSet),
    /// It is sending.
    Getting(Share),
    /// It failed.
    Over,
}

/// What a source is sending.
#[derive(Debug)]
struct Share {
    asked: RangeSet,
    /// What has come of it from this source.
    sent: RangeSet,
    /// What has come of it from nobody, and nobody else has taken over.
    left: RangeSet,
    since: Duration,
    /// When something came last.
    heard: Duration,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask for these bytes: whole chunk groups.
    Get(RangeSet),
    /// Ask which of these bytes there are.
    Have(RangeSet),
}

impl Plan {
    /// Nothing has been asked yet. `wanted` is whole chunk groups; the sources are known by their numbers from 0 on.
    pub(crate) fn new(wanted: RangeSet, sources: usize) -> Self {
        let fresh = || Source {
            lacks: RangeSet::new(),
            trusted_to: u64::MAX,
            idle: 0,
            rate: None,
            has_sent: false,
            task: Task::None,
        };
        Self { left: wanted, sources: (0..sources).map(|_| fresh()).collect() }
    }

    /// What is wanted and has not come.
    pub(crate) fn left(&self) -> &RangeSet {
        &self.left
    }

    /// Whether anything came from a source.
    pub(crate) fn has_sent(&self, source: usize) -> bool {
        self.sources[source].has_sent
    }

    /// Whether no source is or will be asked for anything more.
    pub(crate) fn is_over(&self, now: Duration) -> bool {
        let rests = |source: &Source| matches!(source.task, Task::None | Task::Over);
        self.left.is_empty()
            || self.sources.iter().all(rests) && (0..self.sources.len()).all(|at| self.next(at, now, 1).is_none())
    }

    /// What to ask of a source now, in at most `ranges_max` ranges; `None` if there is nothing to ask, or it is asked
    /// already.
    pub(crate) fn poll(&mut self, source: usize, now: Duration, ranges_max: usize) -> Option<Step> {
        let step = self.next(source, now, ranges_max)?;
        self.sources[source].task = match &step {
            Step::Have(asked) => Task::Having(asked.clone()),
            Step::Get(asked) => {
                // What it takes over is its own from now on.
                for source in &mut self.sources {
                    if let Task::Getting(share) = &mut source.task {
                        share.left = share.left.difference(asked);
                    }
                }
                let (sent, left) = (RangeSet::new(), asked.clone());
                Task::Getting(Share { asked: asked.clone(), sent, left, since: now, heard: now })
            }
        };
        Some(step)
    }

    fn next(&self, at: usize, now: Duration, ranges_max: usize) -> Option<Step> {
        let source = &self.sources[at];
        if !matches!(source.task, Task::None) || source.idle >= IDLE_MAX {
            return None;
        }
        let untried = self.left.difference(&source.lacks);
        if untried.is_empty() {
            return None;
        }
        let trusted = before(&untried, source.trusted_to);
        if trusted.is_empty() {
            return Some(Step::Have(untried.iter().take(ranges_max).collect()));
        }
        let mut free = trusted.clone();
        for other in &self.sources {
            if let Task::Getting(share) = &other.task {
                free = free.difference(&share.left);
            }
        }
        let share = if free.is_empty() {
            self.take_over(at, &trusted, now)?
        } else if self.sources.iter().filter(|other| !matches!(other.task, Task::Over)).count() == 1 {
            free
        } else {
            first(&free, share_bytes(source.rate))
        };
        Some(Step::Get(share.iter().take(ranges_max).collect()))
    }

    /// The end of what would take longest, of what is being sent by others and this source has: so much that both are
    /// done at about the same time.
    fn take_over(&self, at: usize, trusted: &RangeSet, now: Duration) -> Option<RangeSet> {
        let shares = self.sources.iter().filter_map(|other| match &other.task {
            Task::Getting(share) => Some((share.left.intersection(trusted), share.pace(now)?)),
            _ => None,
        });
        let (left, theirs) =
            shares.max_by(|(a, a_rate), (b, b_rate)| seconds(a, *a_rate).total_cmp(&seconds(b, *b_rate)))?;
        let ours = self.sources[at].rate.unwrap_or(RATE_UNKNOWN);
        let bytes = left.total_bytes() as f64 * ours / (ours + theirs);
        // Worth it only if it ends sooner by some margin.
        let takes = seconds(&left, theirs);
        (takes > TAKE_OVER_SECONDS && takes > 1.5 * bytes / ours).then(|| last(&left, bytes as u64))
    }

    /// A piece of what a source was asked for came, and proved.
    pub(crate) fn handle_piece(&mut self, source: usize, range: ByteRange, now: Duration) {
        self.sources[source].has_sent = true;
        self.left.remove(range);
        for (at, other) in self.sources.iter_mut().enumerate() {
            if let Task::Getting(share) = &mut other.task {
                share.left.remove(range);
                if at == source {
                    share.sent.insert(range);
                    share.heard = now;
                }
            }
        }
    }

    /// Whether a source still sends, and only what has come from others or is being sent by others.
    pub(crate) fn is_needless(&self, source: usize) -> bool {
        matches!(&self.sources[source].task, Task::Getting(share) if share.left.is_empty() && share.sent != share.asked)
    }

    /// The answer of a source was cut off by what says nothing of what it has: it can be asked again.
    pub(crate) fn handle_cut(&mut self, source: usize) {
        self.sources[source].task = Task::None;
    }

    /// The answer of a source ended, with all that it said proven; or it was broken off as needless.
    pub(crate) fn handle_answer(&mut self, source: usize, now: Duration) {
        let source = &mut self.sources[source];
        let Task::Getting(share) = std::mem::replace(&mut source.task, Task::None) else { return };
        source.idle = if share.sent.is_empty() { source.idle + 1 } else { 0 };
        let (bytes, seconds) = (share.sent.total_bytes() as f64, now.saturating_sub(share.since).as_secs_f64());
        if bytes >= RATED_BYTES && seconds > 0.0 {
            source.rate = Some(bytes / seconds);
        }
        if let Some(gap) = share.asked.difference(&share.sent).iter().next().filter(|_| !share.left.is_empty()) {
            let gap = ByteRange::new(gap.start(), gap.end().min(gap.start() + GROUP_BYTES)).unwrap_or(gap);
            source.lacks.insert(gap);
            source.trusted_to = 0;
        }
    }

    /// A source says that of what it was asked for it has `has`, so far as it goes: up to `upto`.
    pub(crate) fn handle_have(&mut self, source: usize, has: &RangeSet, upto: u64) {
        let source = &mut self.sources[source];
        let Task::Having(asked) = std::mem::replace(&mut source.task, Task::None) else { return };
        source.trusted_to = (upto / GROUP_BYTES * GROUP_BYTES).min(asked.end());
        source.lacks.extend(before(&asked.difference(has), source.trusted_to).iter());
        source.idle += 1;
    }

    /// A source failed, and is not asked again.
    pub(crate) fn handle_failure(&mut self, source: usize) {
        self.sources[source].task = Task::Over;
    }
}

impl Share {
    /// How many bytes come a second. `None` as long as it is too early to say.
    fn pace(&self, now: Duration) -> Option<f64> {
        let seconds = now.saturating_sub(self.since).as_secs_f64();
        let is_silent = now.saturating_sub(self.heard).as_secs_f64() >= SILENCE_SECONDS;
        let rate = if is_silent { 0.0 } else { self.sent.total_bytes() as f64 / seconds };
        (seconds >= PATIENCE_SECONDS).then_some(rate)
    }
}

/// How long it takes to send `ranges` at so many bytes a second.
fn seconds(ranges: &RangeSet, rate: f64) -> f64 {
    ranges.total_bytes() as f64 / rate.max(1.0)
}

/// What of `ranges` is in front of `end`.
fn before(ranges: &RangeSet, end: u64) -> RangeSet {
    ranges.intersection(&ByteRange::new(0, end).unwrap_or_default().into())
}

/// The first whole chunk groups of `ranges` that have `bytes` together.
fn first(ranges: &RangeSet, bytes: u64) -> RangeSet {
    let mut left = bytes;
    for range in ranges.iter() {
        if range.len() >= left {
            return before(ranges, (range.start() + left).next_multiple_of(GROUP_BYTES));
        }
        left -= range.len();
    }
    ranges.clone()
}

/// The last whole chunk groups of `ranges` that have `bytes` together, one at least.
fn last(ranges: &RangeSet, bytes: u64) -> RangeSet {
    let front = ranges.total_bytes().saturating_sub(bytes.max(1));
    ranges.difference(&first(ranges, front / GROUP_BYTES * GROUP_BYTES))
}

/// How much a source is asked for that brings so many bytes a second.
fn share_bytes(rate: Option<f64>) -> u64 {
    ((rate.unwrap_or(0.0) * SHARE_SECONDS) as u64).clamp(SHARE_BYTES_MIN, SHARE_BYTES_MAX)
}

/// So many questions after which nothing comes are put to a source in a row.
const IDLE_MAX: u32 = 16;
const SHARE_SECONDS: f64 = 2.0;
const SHARE_BYTES_MIN: u64 = 4 << 20;
const SHARE_BYTES_MAX: u64 = 1 << 30;
/// For so long nobody is taken to be slow.
const PATIENCE_SECONDS: f64 = 0.3;
/// Whoever sends nothing for so long is taken to have stalled.
const SILENCE_SECONDS: f64 = 1.0;
/// What takes no longer is left to whom it was given.
const TAKE_OVER_SECONDS: f64 = 0.3;
/// A source is rated by shares of which so much came.
const RATED_BYTES: f64 = (256 << 10) as f64;
/// What a source is hoped to bring a second of which nothing is known.
const RATE_UNKNOWN: f64 = (1 << 20) as f64;

#[cfg(test)]
mod tests;
