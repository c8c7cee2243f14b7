//! One event as one line, in each of the formats. Bytes: spec/logging.md, "Formats".

use std::{error::Error, fmt};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value};
use tracing::{Level, field::Field};

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// For people; in colours or not.
    Human { colours: bool },
    /// JSON Lines.
    Json,
    /// For systemd's journal.
    Systemd,
}

/// What an event says.
#[derive(Debug, Default)]
pub(crate) struct Said {
    message: String,
    fields: Vec<(&'static str, Value)>,
}

impl Said {
    /// A message with fields.
    pub(crate) fn new(message: impl Into<String>, fields: Vec<(&'static str, Value)>) -> Self {
        Self { message: message.into(), fields }
    }

    /// What `event` says.
    pub(crate) fn of(event: &tracing::Event<'_>) -> Self {
        let mut said = Self::default();
        event.record(&mut said);
        said
    }

    /// Takes over the fields of what is around it that it has not itself.
    pub(crate) fn add_missing(&mut self, around: &Self) {
        for (name, value) in &around.fields {
            if self.fields.iter().all(|(known, _)| known != name) {
                self.fields.push((name, value.clone()));
            }
        }
    }

    /// The message alone.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// The line, with its end.
    pub(crate) fn line(&self, style: Style, at: Timestamp, level: Level, target: &str) -> String {
        match style {
            Style::Human { colours } => {
                let (on, off) = if colours { (colour(level), "\x1b[0m") } else { ("", "") };
                format!("{at:.6} {on}{level:>5}{off} {}\n", self.text())
            }
            Style::Systemd => format!("<{}>{}\n", priority(level), self.text()),
            Style::Json => {
                let fields = self.fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
                let (time, level) = (format!("{at:.6}"), level.as_str().to_ascii_lowercase());
                let line = Json { time: &time, level: &level, target, message: &self.message, fields };
                serde_json::to_string(&line).unwrap_or_default() + "\n"
            }
        }
    }

    /// Message and fields.
    fn text(&self) -> String {
        let mut text = String::new();
        escape(&self.message, false, &mut text);
        for (name, value) in &self.fields {
            text.extend([" ", name, "="]);
            match value {
                Value::String(value) => {
                    let plain =
                        !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || c == '"' || c == '=');
                    if plain {
                        escape(value, false, &mut text);
                    } else {
                        text.push('"');
                        escape(value, true, &mut text);
                        text.push('"');
                    }
                }
                value => text += &value.to_string(),
            }
        }
        text
    }

    fn add(&mut self, field: &Field, value: impl Into<Value>) {
        let value = match value.into() {
            Value::String(text) => Value::String(bounded(text)),
            value => value,
        };
        match (field.name(), value) {
            ("message", Value::String(message)) => self.message = message,
            (name, value) => self.fields.push((name, value)),
        }
    }
}

impl tracing::field::Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.add(field, tree::reason(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value);
    }
}

#[derive(Serialize)]
struct Json<'a> {
    time: &'a str,
    level: &'a str,
    target: &'a str,
    message: &'a str,
    fields: Map<String, Value>,
}

/// Adds `text` without control characters.
fn escape(text: &str, quoted: bool, to: &mut String) {
    for c in text.chars() {
        if c.is_control() || quoted && c == '"' { to.extend(c.escape_default()) } else { to.push(c) }
    }
}

fn bounded(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(VALUE_CHARS_MAX) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// As syslog(3) numbers them.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        _ => "\x1b[34m",
    }
}

const VALUE_CHARS_MAX: usize = 8192;

#[cfg(test)]
mod tests {
    use super::*;

    fn line(style: Style, level: Level, said: &Said) -> String {
        said.line(style, "2026-01-02T03:04:05.000006Z".parse().unwrap(), level, "peers::connection")
    }

    fn connected() -> Said {
        Said::new("connected", vec![("peer", "nas".into()), ("address", "192.0.2.1:7700".into())])
    }

    /// Those of spec/logging.md.
    #[test]
    fn golden_lines() {
        let spec = include_str!("../../../spec/logging.md");
        for style in [Style::Human { colours: false }, Style::Systemd, Style::Json] {
            let line = line(style, Level::INFO, &connected());
            assert!(spec.contains(&format!("\n{line}")), "{line}");
        }
        let coloured = line(Style::Human { colours: true }, Level::WARN, &connected());
        assert!(coloured.contains("Z \x1b[33m WARN\x1b[0m connected"), "{coloured:?}");
    }

    #[test]
    fn each_level() {
        for (level, number, name) in [
            (Level::ERROR, 3, "error"),
            (Level::WARN, 4, "warn"),
            (Level::INFO, 6, "info"),
            (Level::DEBUG, 7, "debug"),
            (Level::TRACE, 7, "trace"),
        ] {
            assert!(line(Style::Systemd, level, &connected()).starts_with(&format!("<{number}>connected ")));
            let json: Value = serde_json::from_str(&line(Style::Json, level, &connected())).unwrap();
            assert_eq!(json["level"], name);
        }
    }

    #[test]
    fn whatever_a_value_is_a_line_is_one_line() {
        let fields = vec![
            ("a", "x y".into()),
            ("b", "".into()),
            ("c", "say \"hi\"\n\x1b[31m".into()),
            ("d", 5.into()),
            ("e", true.into()),
            ("f", "k=v".into()),
            ("g", "ä\u{85}".into()),
        ];
        let said = Said::new("odd\n<3>line", fields);
        let expected = r#"odd\n<3>line a="x y" b="" c="say \"hi\"\n\u{1b}[31m" d=5 e=true f="k=v" g="ä\u{85}""#;
        assert_eq!(line(Style::Systemd, Level::INFO, &said), format!("<6>{expected}\n"));
        let json = line(Style::Json, Level::INFO, &said);
        assert_eq!(json.find('\n'), Some(json.len() - 1));
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&json["fields"]["c"], &json["fields"]["d"]), (&"say \"hi\"\n\x1b[31m".into(), &5.into()));
        assert_eq!((&json["message"], &json["target"]), (&"odd\n<3>line".into(), &"peers::connection".into()));
    }

    /// Takes one event.
    struct Taken(std::sync::mpsc::Sender<Said>);

    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Taken {
        fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
            let _ = self.0.send(Said::of(event));
        }
    }

    #[test]
    fn values_of_events() {
        use tracing_subscriber::layer::SubscriberExt;
        let (sender, taken) = std::sync::mpsc::channel();
        let subscriber = tracing_subscriber::registry::Registry::default().with(Taken(sender));
        let long = "ä".repeat(VALUE_CHARS_MAX);
        let error = std::io::Error::from_raw_os_error(2);
        tracing::subscriber::with_default(subscriber, || {
            let (nothing, path) = (None::<&str>, std::path::Path::new("/a b"));
            tracing::info!(bytes = 5u64, ?path, %error, nothing, is = true, long, longer = format!("{long}b"), "said");
            tracing::info!(reason = &error as &dyn Error, below = -1, "said");
        });
        let first = taken.recv().unwrap();
        assert_eq!(first.message(), "said");
        let expected: Vec<(_, Value)> = vec![
            ("bytes", 5.into()),
            ("path", "\"/a b\"".into()),
            ("error", "No such file or directory (os error 2)".into()),
            ("is", true.into()),
            ("long", long.clone().into()),
            ("longer", format!("{long}…").into()),
        ];
        assert_eq!(first.fields, expected);
        let second = taken.recv().unwrap();
        assert_eq!(second.text(), r#"said reason="No such file or directory" below=-1"#);
        let mut around = Said::new("", vec![("below", 2.into()), ("peer", "nas".into())]);
        around.add_missing(&second);
        assert_eq!(around.text(), r#" below=2 peer=nas reason="No such file or directory""#);
    }
}
