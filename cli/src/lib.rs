//! `blobd`, the daemon, and `blob`, everything else: the one place where all parts meet.
//!
//! [`node`](Node) is a home that is open: database, store, namespace and peers, and what is done with them. The
//! control API puts HTTP and JSON in front of it, on the daemon's Unix socket. The commands speak to that API and
//! to nothing else; those that need no daemon open the home themselves and call the same API in their own process.
//!
//! Command line and JSON: `blob --help` and spec/cli.md.

mod args;
mod client;
mod commands;
mod config;
mod control;
mod daemon;
mod event;
mod failure;
mod fsverity;
mod home;
mod log;
mod node;
mod output;
mod target;

pub use args::{main_blob, main_blobd};
pub use node::Node;
