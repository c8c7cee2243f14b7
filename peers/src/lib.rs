//! Other machines: who they are, how they are reached, what they have, and how their bytes get here.
//!
//! [`Peers`] holds a QUIC endpoint to dial from, and one for each address listened on. Both sides of a connection prove
//! an Ed25519 key (raw public keys, TLS 1.3); the key dialled must be the key met, and only peers in the [`Roster`] get
//! past the handshake, but for one that brings a [`Ticket`], which may do that and nothing else. Over a connection each
//! side tells the other its catalog, and serves ranges of blobs in iroh-blobs' form, proven before they are sent.
//!
//! What this crate must never know: what an arena looks like on disk, and where bytes are; bytes come from and go
//! to `blobstore`, which takes none that are not proven.
//!
//! Frames, streams, bounds and error codes: spec/wire.md. Who may do what: spec/threats.md.

mod answer;
mod attributes;
mod backoff;
mod batch;
mod bring;
mod catalog;
mod chunks;
mod coalescing;
mod congestion;
mod connection;
mod counting;
mod details;
mod dial;
mod endpoint;
mod fetch;
mod frame;
mod gate;
mod hello;
mod hints;
mod identity;
mod incoming;
mod iroh_wire;
mod join;
mod listen;
mod network;
mod nodes;
mod obey;
mod order;
mod ordering;
mod outgoing;
mod pace;
mod packing;
mod plan;
mod race;
mod racing;
mod reuse;
mod roles;
mod roster;
mod serve;
mod sharing;
mod through;
mod ticket;
mod tls;
mod transfer;
mod twins;

pub use attributes::{Attribute, Attributes};
pub use batch::{BLOB_BYTES_MAX as SMALL_BYTES_MAX, Small};
pub use congestion::Congestion;
pub use connection::{ConnectionStatus, PeerStatus, Presence};
pub use counting::{Counts, counted};
pub use details::{DETAILS_MAX, Describe, Details, FileId};
pub use endpoint::{Options, Peers, StartError};
pub use gate::{Gate, Pass};
pub use hints::Hint;
pub use identity::{Identity, IdentityError};
pub use iroh_wire::{ALPN as IROH_ALPN, decode_request, encode_request};
pub use join::JoinError;
pub use obey::Orders;
pub use order::{
    Confirm, Done, Finish, Leave, Link, Lost, MoveId, News, Order, Outcome, Place, Pledge, Prepare, REASON_CHARS_MAX,
    Task, Why,
};
pub use ordering::{OrderError, Ordering};
pub use pace::{Class, Limits, Pace, RATE_LEAST};
pub use packing::{Compress, CompressError, Level, Packer, UnpackError, Unpacker};
pub use roles::{Role, Roles};
pub use roster::{Peer, Redeemed, Roster, RosterError};
pub use ticket::{Ticket, TicketError};

/// What strangers and peers can see of the wire, for tests and benchmarks that speak it on their own.
pub mod wire {
    pub use crate::{
        batch::{BLOB_BYTES_MAX, BLOBS_MAX, BatchRequest},
        chunks::{Chunks, ChunksRequest},
        details::DetailsRequest,
        endpoint::{UDP_PAYLOAD_BYTES_MAX, transport_config},
        frame::{Ask, FrameError, Have, Telling, read_frame, write_frame},
        hello::Hello,
        nodes::{NODES_MAX, Nodes, NodesRequest},
        outgoing::Manner,
        tls::{ALPN, JOIN_ALPN, client_config, peer_of, server_config},
    };

    /// The first byte of a stream, which says what it is for.
    pub use crate::frame::StreamKind;
}
