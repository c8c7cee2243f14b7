//! The commands: arguments in, calls of the control API, output.

mod arenas;
mod blobs;
mod doctor;
mod keep;
mod machines;
mod mounts;
mod up;
mod versions;

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    args::Common,
    client::Client,
    control,
    event::FileName,
    failure::{Code, Failure, WhileDoing},
    home::{Home, SocketPath},
    node::{Node, NodeOptions},
    output::{Style, WRITING},
};

pub(crate) use arenas::arena;
pub(crate) use blobs::{accept, cat, copy, get, hash, ls, repair, verify};
pub(crate) use doctor::doctor;
pub(crate) use keep::{cache, pin, unpin, warm};
pub(crate) use machines::{id, init, invite, join, limit, peer, status};
pub(crate) use mounts::{in_words, mount, mount_command, umount};
pub(crate) use up::{serve, up};
pub(crate) use versions::{conflicts, history, stat, whereis};

/// The daemon of this home.
fn daemon(home: &Home) -> Result<Client, Failure> {
    match SocketPath::of(&home.socket).and_then(UnixStream::connect) {
        Ok(_) => Ok(Client::Daemon(home.socket.clone())),
        Err(error) => Err(Failure::from(error)
            .while_doing(format!("no daemon answers at {:?}", home.socket))
            .code(Code::NoDaemon)
            .hint("start one with: blob up")),
    }
}

/// The daemon of this home, or, if none runs, the home itself, opened for this command.
fn daemon_or_home(home: &Home) -> Result<(Client, Option<Node>), Failure> {
    if let Ok(client) = daemon(home) {
        return Ok((client, None));
    }
    if !home.exists() {
        return Err(Failure::new(Code::NotFound, format!("there is no home at {:?}", home.state))
            .hint("make one with: blob up DIR"));
    }
    let node = Node::open(home, &NodeOptions { deaf: true, ..NodeOptions::default() })?;
    Ok((Client::Local(control::router(node.clone())), Some(node)))
}

fn style(common: &Common) -> Style {
    Style { json: common.json, ..Style::default() }
}

/// Prints a value: as one JSON object with that `"type"`, or as `human` shows it.
fn print(common: &Common, kind: &str, mut value: Value, human: impl FnOnce(&Value) -> String) -> Result<Code, Failure> {
    let text = if common.json {
        if let Value::Object(fields) = &mut value {
            fields.insert("type".to_owned(), kind.into());
        }
        value.to_string()
    } else {
        human(&value)
    };
    if !text.is_empty() {
        writeln!(io::stdout(), "{text}").while_doing(WRITING)?;
    }
    Ok(Code::Ok)
}

/// A field as text, empty if it is missing.
fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

/// `ARENA/PATH` of a value that has both, as a terminal shows it.
fn full_path(value: &Value) -> String {
    FileName::deserialize(value).map_or_else(|_| String::new(), |file| file.to_string())
}
