use std::{error::Error, fmt, io};

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

/// Why a command failed: what was being done, every cause in turn, and which exit code says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The exit code.
    pub code: Code,
    /// What was being done, to what.
    pub error: String,
    /// Why, and why that, and so on.
    pub causes: Vec<String>,
    /// What may help.
    pub hint: Option<String>,
    /// So many of the last causes stand side by side, such as what each peer said, and not one behind the other.
    #[serde(skip)]
    pub abreast: usize,
    /// Whether nobody needs to be told: whoever reads our output has had enough of it.
    #[serde(skip)]
    pub silent: bool,
}

/// The exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum Code {
    /// All is well.
    Ok = 0,
    /// Something failed.
    Error = 1,
    /// The command line or a file that the user wrote makes no sense.
    Usage = 2,
    /// Some of many items failed.
    Some = 3,
    /// Damage was found.
    Damage = 4,
    /// Damage was left unrepaired.
    Unrepaired = 5,
    /// No reachable peer has it.
    Unreachable = 6,
    /// There is no such thing.
    NotFound = 7,
    /// A limit was hit.
    Limit = 8,
    /// No daemon runs.
    NoDaemon = 10,
    /// The user interrupted.
    Interrupted = 130,
}

impl Code {
    const ALL: [Self; 11] = [
        Self::Ok,
        Self::Error,
        Self::Usage,
        Self::Some,
        Self::Damage,
        Self::Unrepaired,
        Self::Unreachable,
        Self::NotFound,
        Self::Limit,
        Self::NoDaemon,
        Self::Interrupted,
    ];
}

impl From<Code> for u8 {
    fn from(code: Code) -> Self {
        code as u8
    }
}

impl TryFrom<u8> for Code {
    type Error = String;

    fn try_from(code: u8) -> Result<Self, String> {
        Self::ALL.into_iter().find(|&known| known as u8 == code).ok_or_else(|| format!("no exit code {code}"))
    }
}

impl Failure {
    /// A failure without a further cause.
    pub fn new(code: Code, error: impl Into<String>) -> Self {
        Self { code, error: error.into(), causes: Vec::new(), hint: None, abreast: 0, silent: false }
    }

    /// The same failure with another exit code.
    pub fn code(self, code: Code) -> Self {
        Self { code, ..self }
    }

    /// The same failure with advice.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// What failed and why, in one line.
    pub fn reason(&self) -> String {
        let (behind, abreast) = self.causes.split_at(self.causes.len().saturating_sub(self.abreast));
        let abreast = Some(abreast.join("; ")).filter(|abreast| !abreast.is_empty());
        let texts = std::iter::once(&self.error).chain(behind).chain(&abreast).map(String::as_str);
        texts.collect::<Vec<_>>().join(": ")
    }

    /// The same failure as the cause of what was being done.
    pub fn while_doing(mut self, what: impl Into<String>) -> Self {
        self.causes.insert(0, std::mem::replace(&mut self.error, what.into()));
        self
    }
}

/// Adds what was being done to an error.
pub(crate) trait WhileDoing<T> {
    /// Fails as `what`, because of the error.
    fn while_doing(self, what: impl Into<String>) -> Result<T, Failure>;
}

impl<T, E: Into<Failure>> WhileDoing<T> for Result<T, E> {
    fn while_doing(self, what: impl Into<String>) -> Result<T, Failure> {
        self.map_err(|error| error.into().while_doing(what))
    }
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut causes = tree::causes(&error);
        let what = causes.remove(0);
        let io = (&error as &(dyn Error + 'static)).downcast_ref::<io::Error>();
        let silent = io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
        let hint = is_damage(&error)
            .then(|| "the database may be damaged: stop the daemon, and see with: blob doctor".to_owned());
        Self { code: Code::Error, error: what, causes, hint, abreast: 0, silent }
    }
}

/// Whether an error, or what caused it, is that the database has something that cannot have been written.
fn is_damage(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let of_redb = error.downcast_ref().or_else(|| error.downcast_ref::<Box<redb::Error>>().map(|error| &**error));
        if matches!(of_redb, Some(redb::Error::Corrupted(_))) {
            return true;
        }
        next = error.source();
    }
    false
}

impl fmt::Display for Failure {
    /// One line for each cause, and one for the hint, as a terminal shows them: control characters are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", shown(&self.error))?;
        for cause in &self.causes {
            write!(f, "\n  because: {}", shown(cause))?;
        }
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {}", shown(hint)),
            None => Ok(()),
        }
    }
}

/// Some texts have lines, such as what is wrong in a configuration file.
fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.code {
            Code::Usage => StatusCode::BAD_REQUEST,
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::Unreachable => StatusCode::BAD_GATEWAY,
            Code::Limit => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_its_line_and_nothing_reaches_the_terminal_raw() {
        let failure = Failure::from(io::Error::from_raw_os_error(13)).while_doing("open \u{1b}[31mx").hint("a\nb");
        assert_eq!(failure.to_string(), "error: open \\u{1b}[31mx\n  because: Permission denied\nhint: a\nb");
        assert_eq!(failure.reason(), "open \u{1b}[31mx: Permission denied");
        let all = ["b: x", "c: y"].map(str::to_owned);
        let failure = Failure { causes: all.to_vec(), abreast: 2, ..Failure::new(Code::Unreachable, "fetch") };
        assert_eq!(failure.while_doing("get").reason(), "get: fetch: b: x; c: y");
        assert!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).while_doing("write").silent);
        let damage = redb::Error::Corrupted("a row".to_owned());
        let failure = Failure::from(blobstore::StoreError::Database { action: "look", source: Box::new(damage) });
        assert!(failure.hint.is_some_and(|hint| hint.contains("blob doctor")));
    }
}
