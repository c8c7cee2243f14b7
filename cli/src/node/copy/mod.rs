//! Bytes and files to where they are wanted: into a directory of the user's (`get`), and into and out of arenas, here and
//! at other machines (`cp`, `mv`).

mod arrive;
mod aside;
mod attributes;
mod bundle;
mod cross;
mod describe;
mod gather;
mod get;
mod get_blob;
mod hands;
mod held;
mod keep;
mod kept;
mod leave;
mod moves;
mod moving;
mod names;
mod naming;
mod obey;
mod place;
mod plan;
mod run;
mod settle;
mod sparse;
mod unfinished;
mod untouched;

pub(crate) use attributes::KeepAttributes;
pub(super) use gather::Gathering;
pub(super) use held::HeldArenas;
pub(super) use moving::Moving;
pub(super) use place::Implied;
pub(crate) use plan::{CopyScope, Place};
pub(super) use settle::Queue;
pub(super) use unfinished::Unfinished;
