//! The store over real files, a real database and the real system calls: what a simulated disk cannot tell,
//! which is what the file system does to times, inodes, links and lengths, and whether we notice.

#[path = "../common/mod.rs"]
mod common;
mod home;

mod alike;
mod budget;
mod cache;
mod changed;
mod damaged;
mod kept;
mod links;
mod mend;
mod model;
mod reading;
mod rebuild;
mod refusing;
mod saved;
mod suspect;
mod verify;
