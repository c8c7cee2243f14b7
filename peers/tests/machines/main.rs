//! Several machines in one process, on loopback.

mod machine;
mod raw;
mod several;
mod through;
