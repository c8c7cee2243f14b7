//! Bytes and files to where they are wanted: into a directory of the user's (`get`), and into and out of arenas, here and
//! at other machines (`cp`, `mv`).

mod arrive;
mod bundle;
mod gather;
mod get;
mod get_blob;
mod hands;
mod obey;
mod place;
mod plan;
mod run;
mod settle;

pub(super) use gather::Gathering;
pub(super) use place::{Implied, sweep};
pub(crate) use plan::{CopyScope, Place};
pub(super) use settle::Queue;
