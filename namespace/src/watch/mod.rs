//! Waiting until what was heard of rests.

mod pending;

pub use pending::Pending;
