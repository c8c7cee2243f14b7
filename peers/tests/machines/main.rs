//! Several machines in one process, on loopback.

mod connect;
mod limits;
mod machine;
mod net;
mod raw;
mod reuse;
mod several;
mod through;
mod wire;
