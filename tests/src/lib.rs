//! What the end-to-end tests share: machines that run the real programs, real trees, an exact comparison of trees,
//! faults of networks and disks, a peer that lies, and a Linux that mounts.
//!
//! The tests run `blob` and `blobd` as users do, and look at nothing but what users see: output, exit codes, logs,
//! and files. They wait for states, each wait with an end, and never for time to pass.

mod caller;
mod damage;
mod disk;
mod faults;
mod file_system;
mod ganesha;
mod household;
mod liar;
mod link;
mod machine;
mod mirrored;
mod mounted;
mod network;
mod nfs;
mod real_tree;
mod skipped;
mod snapshot;
mod uml;
mod wait;

pub use caller::{connect, introduced};
pub use damage::{GROUP_BYTES, groups_of, path_of, ranges_of, target};
pub use disk::Disk;
pub use faults::{Fault, Struck, can_attach};
pub use file_system::{FileSystem, FileSystemKind};
pub use ganesha::Ganesha;
pub use household::{QUICK, listable, write_files, write_tree};
pub use liar::{Answer, Batches, Liar, Statement, file_statement};
pub use link::{Fate, Fates, IpLink, Link, Quality, Way};
pub use machine::{Machine, Output, Scratch, blob, blobd};
pub use mirrored::Mirrored;
pub use mounted::{Mounted, Volume, may_mount};
pub use network::Network;
pub use nfs::{Attributes, Listed, Nfs, Results, Xdr, status};
pub use real_tree::{BIG, BIG_BYTES, SMALL_ENOUGH, TreeSpec, build_tree, random_bytes, set_mtime, write_random};
pub use skipped::skipped;
pub use snapshot::{Item, Mtime, Tree, differences, indexed, snapshot, without_link_times};
pub use uml::{Guest, Hardware, MOUNT, NFS_PORT, Running, SCRIPT_LIMIT, SERVER, Shell, Unavailable};
pub use wait::wait_for;
