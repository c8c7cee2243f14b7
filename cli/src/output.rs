//! What people see: reports as lines and bars, sizes and names.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::Value;
use tree::RangeSet;

use crate::{
    client::Events,
    event::{Copied, DeletedFile, DeletedMany, Entry, Event, FileName, Kept, Pin, Reason},
    failure::{Code, Failure, WhileDoing},
};

/// How a report is shown.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Style {
    /// As JSON Lines.
    pub json: bool,
    /// Listings with all they have.
    pub long: bool,
    /// Each line at once, for there is no end.
    pub live: bool,
}

/// Shows a report to its end: results on standard output, progress and what failed on standard error. Returns the
/// exit code that the report ends with. On SIGINT it stops reading, which stops the work where that is safe.
pub(crate) async fn show(mut events: Events, style: Style) -> Result<Code, Failure> {
    let mut bar = Bar::new(style.json);
    let mut out = Output::new(style.live);
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            _ = tokio::signal::ctrl_c() => {
                bar.clear();
                out.flush().while_doing(WRITING)?;
                return Err(Failure::new(Code::Interrupted, "interrupted"));
            }
        };
        match event {
            None => return Err(Failure::new(Code::Error, "the report broke off; did the daemon stop?")),
            Some(Event::Exit { code }) => {
                bar.clear();
                out.flush().while_doing(WRITING)?;
                return Ok(code);
            }
            Some(Event::Progress { action, done, total, files }) => bar.update(&action, done, total, files),
            Some(Event::Error(failure)) => {
                bar.clear();
                out.flush().while_doing(WRITING)?;
                return Err(failure);
            }
            Some(event) if style.json => out.line(&serde_json::to_string(&event)?).while_doing(WRITING)?,
            Some(event) => {
                bar.suspend(|| human(&mut out, &event, style)).while_doing(WRITING)?;
                if let Event::Waiting { peers, .. } = event {
                    bar.wait_for(&peers);
                }
            }
        }
    }
}

fn human(out: &mut Output, event: &Event, style: Style) -> io::Result<()> {
    match event {
        Event::Entry(entry) => out.line(&if style.long { long_line(entry) } else { short_line(entry) }),
        Event::Damage { file, what, ranges, .. } => {
            let ranges = ranges.iter().map(|range| range.to_string()).collect::<Vec<_>>().join(" ");
            out.line(&format!("damaged   {file}  {what} {ranges}"))
        }
        Event::Suspect { file, ranges, difference, .. } => {
            suspect_lines(file, ranges, difference.as_deref()).iter().try_for_each(|line| out.line(line))
        }
        Event::Accepted { file, blob } => out.line(&format!("accepted  {file}  {blob:.12}")),
        Event::Undone { file, ranges } => {
            out.line(&format!("undone    {file}  {} put back", HumanBytes(ranges.total_bytes())))
        }
        Event::Conflict { file, versions } => {
            out.line(&file.to_string())?;
            versions.iter().try_for_each(|version| {
                let blob = version.blob.map_or(String::new(), |blob| format!("  {blob:.12}"));
                let size = version.size.map_or(String::new(), |size| format!("  {size} bytes"));
                out.line(&format!("    {}: {}  {}{blob}{size}", version.peer, version.state, version.mtime))
            })
        }
        Event::Change { time, change, file, version } => {
            let time = time.split('.').next().unwrap_or_default().replace('T', " ");
            out.line(&format!("{time}  {:16} {:>8}  {change:9} {file}", version.peer, version.seq))
        }
        Event::Missing { file, bytes, .. } => out.line(&format!("{file}  {}", HumanBytes(*bytes))),
        Event::Pin(pin) => pin_lines(pin).iter().try_for_each(|line| out.line(line)),
        Event::Deleted(DeletedFile { file, blob, size, bytes_here, until, .. }) => {
            let here = if bytes_here == size { String::new() } else { format!(", {} here", HumanBytes(*bytes_here)) };
            out.line(&format!("blob:{blob}  {}{here}  until {}  {file}", HumanBytes(*size), day(until)))
        }
        Event::Waiting { reason, for_s, .. } => {
            complain(out, &format!("waiting for up to {for_s} s: {}", printable(reason.as_bytes())))
        }
        Event::Offline { arena, reason } => {
            complain(out, &format!("offline   {}: {}", printable(arena.as_bytes()), printable(reason.as_bytes())))
        }
        Event::Modified { file } => out.line(&format!("modified  {file}")),
        Event::Repaired { file, ranges, peers, .. } => {
            let from = if peers.is_empty() { "this machine".to_owned() } else { peers.join(", ") };
            out.line(&format!("repaired  {file}  {} from {from}", HumanBytes(ranges.total_bytes())))
        }
        Event::Unrepaired { file, reason, .. } => out.line(&format!("NOT repaired  {file}: {reason}")),
        Event::Copied(copied) | Event::Moved(copied) => {
            let without = match copied.not_kept.is_empty() {
                true => String::new(),
                false => format!(" (without its {})", copied.not_kept.join(" and ")),
            };
            out.line(&format!("{}{without}", printable(copied.destination.as_bytes())))
        }
        Event::Skipped(Copied { destination, .. }) => {
            out.line(&format!("{} (was there)", printable(destination.as_bytes())))
        }
        Event::Failed { copy: Some(Copied { source, .. }), reason, .. } => {
            complain(out, &format!("failed: {}: {}", printable(source.as_bytes()), printable(reason.as_bytes())))
        }
        Event::Failed { file, reason, copy: None } => complain(out, &format!("failed: {file}: {reason}")),
        Event::Unindexed { file, reason } => complain(out, &format!("not indexed: {file}: {reason}")),
        Event::Summary(fields) => complain(out, &summary_line(fields)),
        Event::Progress { .. } | Event::Error(_) | Event::Exit { .. } => Ok(()),
    }
}

/// A line for standard error, behind all that went to standard output.
fn complain(out: &mut Output, line: &str) -> io::Result<()> {
    out.flush()?;
    writeln!(io::stderr(), "{line}")
}

fn summary_line(fields: &serde_json::Map<String, Value>) -> String {
    let number = |key: &str| fields.get(key).and_then(Value::as_u64);
    let mut parts = Vec::new();
    for (key, value) in fields {
        let name = key.replace('_', " ");
        match value.as_u64() {
            Some(count) if phrase(key, count).is_some() => parts.extend(phrase(key, count).filter(|_| count > 0)),
            Some(0) if !["files", "conflicts", "repaired_files"].contains(&key.as_str()) => {}
            Some(bytes) if key.contains("bytes") => parts.push(format!("{name}: {}", HumanBytes(bytes))),
            Some(count) => parts.push(format!("{name}: {count}")),
            None => {}
        }
    }
    if let Some(seconds) = fields.get("seconds").and_then(Value::as_f64) {
        let rate = number("bytes").filter(|&bytes| bytes > 0 && seconds > 0.0);
        let rate = rate.map_or(String::new(), |bytes| format!(", {}/s", HumanBytes((bytes as f64 / seconds) as u64)));
        parts.push(format!("in {seconds:.1} s{rate}"));
    }
    parts.join(", ")
}

/// What was left out or not kept, in words.
fn phrase(key: &str, count: u64) -> Option<String> {
    let files = if count == 1 { "file" } else { "files" };
    Some(match key {
        "special_files" => format!("left out: {count} special {files}"),
        "files_without_attributes" => format!("{count} {files} without their extended attributes"),
        "files_without_permissions" => format!("{count} {files} without their permissions"),
        "hard_links" if count == 1 => "1 hard link".to_owned(),
        _ => return None,
    })
}

fn short_line(entry: &Entry) -> String {
    let path = entry.path.bytes().unwrap_or_default();
    let line = match entry.kind.as_str() {
        "arena" => entry.arena.clone(),
        "dir" => format!("{}/{}/", entry.arena, printable(&path)),
        _ => format!("{}/{}", entry.arena, printable(&path)),
    };
    if entry.conflict { line + "  (conflict)" } else { line }
}

/// What is known of a suspect file, and what the user can do.
fn suspect_lines(file: &FileName, ranges: &RangeSet, difference: Option<&str>) -> [String; 3] {
    let differs = match difference {
        Some(difference) => format!("it differs from its last good version in {difference}"),
        None => format!("{} differ from its last good version", HumanBytes(ranges.total_bytes())),
    };
    let name = quoted(&file.to_string());
    [
        format!("suspect   {file}  {differs}; rot or an edit"),
        format!("    if you changed it:  blob accept {name}"),
        format!("    if you did not:     blob repair --suspect {name}"),
    ]
}

/// A name as a shell takes it.
fn quoted(name: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if name.chars().all(plain) { name.to_owned() } else { format!("'{}'", name.replace('\'', "'\\''")) }
}

/// How much of what is pinned is here, and a line for each reason why something is not.
pub(crate) fn pin_lines(pin: &Pin) -> Vec<String> {
    let place = pin.place.to_string();
    let place = if pin.place.path.as_deref() == Some("") { place.trim_end_matches('/') } else { &place };
    let here = match pin.missing_files {
        0 => "all here".to_owned(),
        _ => format!("{} here, {} files not yet", HumanBytes(pin.bytes_here), pin.missing_files),
    };
    let mut lines = vec![format!("{place}  {} files, {}, {here}", pin.files, HumanBytes(pin.bytes))];
    lines.extend(pin.missing.iter().map(|Reason { reason, files, bytes }| {
        format!("    missing {files} files, {}: {}", HumanBytes(*bytes), printable(reason.as_bytes()))
    }));
    lines.extend(pin.kept.iter().map(|Kept { files, bytes, until }| {
        format!("    kept after deletion: {files} files, {}, until {}", HumanBytes(*bytes), day(until))
    }));
    lines.extend(pin.mass_deletions.iter().map(|mass| format!("    {}", mass_line(mass))));
    lines
}

/// What to know of a deletion of most of an arena, in one sentence.
pub(crate) fn mass_line(mass: &DeletedMany) -> String {
    let DeletedMany { arena, peer, files, of, since, until } = mass;
    let (arena, peer) = (printable(arena.as_bytes()), printable(peer.as_bytes()));
    format!(
        "{peer} deleted {files} of {of} files of {arena} on {}; their bytes stay here until {}, or until: blob pin --accept-deletions {arena}",
        day(since),
        day(until)
    )
}

/// The day of a time in RFC 3339.
fn day(time: &str) -> &str {
    time.split('T').next().unwrap_or(time)
}

/// Size, mtime to the second, the blob id's first digits, how much is here, which peers have it, path.
fn long_line(entry: &Entry) -> String {
    let size = entry.size.map_or(String::new(), |size| size.to_string());
    let mtime = entry.mtime.as_deref().and_then(|mtime| mtime.split('.').next()).unwrap_or_default().replace('T', " ");
    let blob = entry.blob.map_or(String::new(), |blob| format!("{blob:.12}"));
    let mut local = match (entry.local.as_deref(), entry.bytes_here, entry.size) {
        (Some("partial"), Some(here), Some(size)) if size > 0 => format!("partial {}%", percent(here, size)),
        (local, ..) => local.unwrap_or_default().to_owned(),
    };
    if entry.pinned {
        local += if local.is_empty() { "pinned" } else { ", pinned" };
    }
    let link = entry.target.as_ref().and_then(|target| target.bytes());
    let link = link.map_or(String::new(), |target| format!(" -> {}", printable(&target)));
    let peers = entry.peers.join(",");
    format!("{size:>12} {mtime:19} {blob:12} {local:8} {peers:16} {}{link}", short_line(entry))
}

/// How much of something is here: never all or nothing if it is not.
fn percent(here: u64, size: u64) -> u64 {
    ((u128::from(here) * 100 / u128::from(size.max(1))) as u64).clamp(1, 99)
}

/// A name as one line that a terminal shows as it is: control characters and what is not UTF-8 are escaped.
pub(crate) fn printable(name: &[u8]) -> String {
    let mut text = String::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' { text.extend(c.escape_default()) } else { text.push(c) }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Standard output, written in large pieces.
struct Output {
    out: io::BufWriter<io::Stdout>,
    /// Whether somebody waits for each line.
    live: bool,
}

impl Output {
    fn new(live: bool) -> Self {
        Self { out: io::BufWriter::new(io::stdout()), live: live || io::stdout().is_terminal() }
    }

    fn line(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.out, "{line}")?;
        if self.live { self.out.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Progress on a terminal.
struct Bar {
    bar: ProgressBar,
    /// The machines that the command waits for, and the bytes done when that began.
    waiting: Option<(String, u64)>,
}

impl Bar {
    fn new(json: bool) -> Self {
        if json || !io::stderr().is_terminal() {
            return Self { bar: ProgressBar::hidden(), waiting: None };
        }
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, waiting: None }
    }

    fn update(&mut self, action: &str, done: u64, total: Option<u64>, files: u64) {
        self.waiting.take_if(|(_, before)| done > *before);
        let template = match total {
            Some(_) => "{msg} {bytes}/{total_bytes} {wide_bar} {bytes_per_sec} ETA {eta}",
            None => "{spinner} {msg} {bytes} {bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        if let Some(total) = total {
            self.bar.set_length(total);
        }
        self.bar.set_message(match &self.waiting {
            Some((peers, _)) => format!("waiting for {peers}, {files} files,"),
            None => format!("{action}, {files} files,"),
        });
        self.bar.set_position(done);
    }

    /// Shows for whom it waits, until something comes.
    fn wait_for(&mut self, peers: &[String]) {
        let names: Vec<_> = peers.iter().map(|peer| printable(peer.as_bytes())).collect();
        let names = names.join(", ");
        self.bar.set_message(format!("waiting for {names},"));
        self.waiting = Some((names, self.bar.position()));
    }

    fn suspend<T>(&self, show: impl FnOnce() -> T) -> T {
        self.bar.suspend(show)
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// What is being done, for errors.
pub(crate) const WRITING: &str = "write to standard output";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents() {
        for (here, size, percent) in [(1, 1 << 60, 1), (50, 100, 50), (999, 1000, 99), (u64::MAX - 1, u64::MAX, 99)] {
            assert_eq!(super::percent(here, size), percent);
        }
    }

    #[test]
    fn names_on_a_terminal() {
        assert_eq!(printable("a b/ä:c".as_bytes()), "a b/ä:c");
        assert_eq!(printable(b"a\x1b[31m\n\\\xff"), "a\\u{1b}[31m\\n\\\\\\xff");
    }
}
