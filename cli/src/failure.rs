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
        Self { code, error: error.into(), causes: Vec::new(), hint: None, silent: false }
    }

    /// The same failure with another exit code.
    pub fn code(self, code: Code) -> Self {
        Self { code, ..self }
    }

    /// The same failure with advice.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// What failed and why, without the hint.
    pub(crate) fn in_one_line(&self) -> String {
        let parts: Vec<_> = std::iter::once(&self.error).chain(&self.causes).map(String::as_str).collect();
        parts.join(": ")
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
        let mut causes: Vec<String> = Vec::new();
        let mut next = error.source();
        while let Some(cause) = next {
            // Some libraries repeat a cause in the message of what it causes.
            let text = cause.to_string();
            if causes.last().is_none_or(|last| !last.ends_with(&text)) {
                causes.push(text);
            }
            next = cause.source();
        }
        let io = (&error as &(dyn Error + 'static)).downcast_ref::<io::Error>();
        let silent = io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
        Self { code: Code::Error, error: error.to_string(), causes, hint: None, silent }
    }
}

impl fmt::Display for Failure {
    /// One line for each cause, and one for the hint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.error)?;
        for cause in &self.causes {
            write!(f, "\n  because: {cause}")?;
        }
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
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
