//! What the programs tell of themselves, on standard error. Levels, fields and formats: spec/logging.md.

mod filter;
mod limit;
mod line;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    env,
    io::{self, IsTerminal, Write},
    panic,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Instant,
};

use clap::ValueEnum;
use jiff::Timestamp;
use tracing::{
    Event, Level, Metadata, Subscriber,
    callsite::Identifier,
    error,
    level_filters::LevelFilter,
    span::{Attributes, Id},
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry::{self, LookupSpan},
};

use crate::failure::{Code, Failure, WhileDoing};

use limit::{LeftOut, Limiter, MOST, PERIOD};
use line::{Said, Style};

/// How the log is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For systemd's journal if standard error leads there, else for people.
    #[default]
    Auto,
    /// For people.
    Human,
    /// JSON Lines.
    Json,
    /// For systemd's journal: priorities, and no times.
    Systemd,
}

/// The log of this process, once it is open. Cheap to clone; the clones are one.
#[derive(Clone)]
pub(crate) struct Log {
    style: Style,
    start: Instant,
    limiter: Arc<Mutex<Limiter<Identifier, Note>>>,
}

/// What is said of events that are left out.
type Note = (&'static Metadata<'static>, String);

/// Opens the log for the whole process: `default` is the level without `BLOBD_LOG`. To be called once.
pub(crate) fn open(format: Format, default: LevelFilter) -> Result<Log, Failure> {
    let filter = filter::filter(&variable("BLOBD_LOG")?.unwrap_or_default(), default)?;
    let most = match variable("BLOBD_LOG_LIMIT")? {
        Some(text) => text.parse().map_err(|_| {
            Failure::new(Code::Usage, format!("BLOBD_LOG_LIMIT is {text:?}")).hint("such as 60; 0 is no bound")
        })?,
        None => MOST,
    };
    let log = Log { style: style(format), start: Instant::now(), limiter: Arc::new(Mutex::new(Limiter::new(most))) };
    tracing::subscriber::set_global_default(registry::Registry::default().with(filter).with(log.clone()))
        .while_doing("open the log")?;
    tell_panics();
    let telling = log.clone();
    let told = thread::Builder::new().name("log".into()).spawn(move || {
        loop {
            thread::sleep(PERIOD);
            let due = telling.limited(|limiter, now| limiter.due(now));
            telling.tell(due);
        }
    });
    told.while_doing("start threads").map(|_| log)
}

impl Log {
    /// Whether it is a program that reads it.
    pub(crate) fn is_for_programs(&self) -> bool {
        !matches!(self.style, Style::Human { .. })
    }

    /// Tells what was left out so far, for the process ends.
    pub(crate) fn close(&self) {
        let rest = self.limited(|limiter, _| limiter.rest());
        self.tell(rest);
    }

    /// Nothing that might panic or log is to be done in `decide`.
    fn limited<T>(&self, decide: impl FnOnce(&mut Limiter<Identifier, Note>, std::time::Duration) -> T) -> T {
        decide(&mut self.limiter.lock().unwrap_or_else(PoisonError::into_inner), self.start.elapsed())
    }

    fn tell(&self, due: Vec<LeftOut<Note>>) {
        for LeftOut { note: (metadata, what), count } in due {
            let fields = vec![("what", what.into()), ("left_out", count.into()), ("period_s", PERIOD.as_secs().into())];
            self.write(&Said::new("more like this were left out", fields), metadata);
        }
    }

    fn write(&self, said: &Said, metadata: &Metadata<'_>) {
        let line = said.line(self.style, Timestamp::now(), *metadata.level(), metadata.target());
        // There is nobody to tell that it failed.
        let _ = io::stderr().write_all(line.as_bytes());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut said = Said::default();
        attributes.record(&mut said);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(said);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let metadata = event.metadata();
        let mut said = Said::of(event);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(around) = span.extensions().get() {
                said.add_missing(around);
            }
        }
        if *metadata.level() <= Level::INFO {
            let (kind, message) = (metadata.callsite(), said.message().to_owned());
            let (due, is_told) =
                self.limited(|limiter, now| (limiter.due(now), limiter.admits(kind, now, || (metadata, message))));
            self.tell(due);
            if !is_told {
                return;
            }
        }
        self.write(&said, metadata);
    }
}

/// Has bugs told as events, with the stack if `RUST_BACKTRACE` asks for it.
fn tell_panics() {
    let otherwise = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !tracing::enabled!(Level::ERROR) {
            return otherwise(info);
        }
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let reason = info.payload_as_str().unwrap_or("unknown");
        if crate::node::explains_panic(&place, reason) {
            return;
        }
        let stack = Backtrace::capture();
        match stack.status() {
            BacktraceStatus::Captured => error!(reason, place, %stack, "panicked"),
            _ => error!(reason, place, "panicked"),
        }
    }));
}

fn style(format: Format) -> Style {
    let human = || Style::Human { colours: io::stderr().is_terminal() };
    match format {
        Format::Human => human(),
        Format::Json => Style::Json,
        Format::Systemd => Style::Systemd,
        Format::Auto => {
            let stat = rustix::fs::fstat(io::stderr()).ok();
            let stream = env::var("JOURNAL_STREAM").unwrap_or_default();
            let is_journal = stat.is_some_and(|stat| names(&stream, stat.st_dev, stat.st_ino));
            if is_journal { Style::Systemd } else { human() }
        }
    }
}

/// Whether `stream` names this device and inode, as `JOURNAL_STREAM` does (systemd.exec(5)).
fn names(stream: &str, device: u64, inode: u64) -> bool {
    let named =
        stream.split_once(':').and_then(|(dev, ino)| Some((dev.parse::<u64>().ok()?, ino.parse::<u64>().ok()?)));
    named == Some((device, inode))
}

fn variable(name: &str) -> Result<Option<String>, Failure> {
    match env::var(name) {
        Ok(text) => Ok(Some(text)),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(error) => Err(Failure::from(error).while_doing(format!("understand {name}")).code(Code::Usage)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_known_by_device_and_inode() {
        assert!(names("8:1234", 8, 1234));
        for stream in ["", "8", "8:", ":1234", "8:1235", "9:1234", "8:1234:5", "x:y"] {
            assert!(!names(stream, 8, 1234), "{stream:?}");
        }
    }
}
