//! Bytes as Merkle trees: blob ids, outboards, proofs.
//!
//! A blob is named by the BLAKE3 root hash of its bytes. Its tree is kept down to chunk groups of 16 KiB in
//! an *outboard*; with it, any range of the blob can be proven against the id, sent with its proof, or found
//! damaged to the chunk group.
//!
//! This crate is pure: bytes in, values out. It opens no file, knows no database, no socket and no clock; what
//! it reads, it reads through [`ReadAt`]. Everything it calls proven was hashed and compared by it: the
//! [`Verified`] values have no public constructor, so that code which accepts only them cannot be handed
//! unproven bytes.
//!
//! | to do this | use |
//! | --- | --- |
//! | name bytes, and make their outboard | [`hash()`], [`hash_into`], [`blob_id`] |
//! | read or send ranges of what is here, proven | [`Prover`] |
//! | prove ranges that arrive from elsewhere | [`Decoder`] |
//! | find what is damaged | [`find_damage`], [`DamageSearch`] |
//! | find where two trees differ, wherever they are | [`Comparison`] |
//! | find bytes of a blob in others, wherever they moved | [`Chunker`], [`Assembly`], [`Patchwork`] |
//! | prove with a part of a tree, and ask for the rest | [`PartialTree`] |
//! | tell an edited file from a rotten one | [`Fingerprint::drift`] |
//! | leave holes where bytes are zeros | [`data_spans`], [`is_zero`] |
//!
//! ```
//! use tree::{ByteRange, Decoder, Prover, Query, Verified};
//!
//! let data = vec![7u8; 100_000];
//! let hashed = tree::hash(&data[..], 100_000).unwrap();
//! let query = Query::bytes(ByteRange::new(50_000, 50_001).unwrap());
//!
//! // The sender proves what it reads, and the receiver proves what it gets.
//! let mut wire = 100_000u64.to_le_bytes().to_vec();
//! for item in Prover::new(hashed.id, 100_000, &data[..], &hashed.outboard[..], &query) {
//!     wire.extend_from_slice(item.unwrap().wire_bytes());
//! }
//! let mut decoder = Decoder::new(hashed.id, query);
//! decoder.push(&wire);
//! while let Some(item) = decoder.next().unwrap() {
//!     if let Verified::Data(piece) = item {
//!         assert_eq!(&data[piece.offset() as usize..][..piece.bytes().len()], &piece.bytes()[..]);
//!     }
//! }
//! assert!(decoder.is_finished());
//! ```
//!
//! Formats: spec/tree.md.

mod bulk;
mod causes;
mod chunks;
mod compare;
mod cv;
mod damage;
mod decode;
mod fingerprint;
mod geometry;
mod hash;
mod id;
mod partial;
mod patchwork;
mod prove;
mod query;
mod range;
mod read_at;
mod verified;
mod walk;
mod zeros;

pub use causes::{causes, reason};
pub use chunks::{Assembly, Chunk, ChunkListError, ChunkSizes, Chunker};
pub use compare::{CompareError, Comparison};
pub use damage::{Damage, DamageSearch, find_damage};
pub use decode::{DecodeError, Decoder};
pub use fingerprint::{Drift, Fingerprint, UnixTime};
pub use geometry::{CHUNK_BYTES, GROUP_BYTES, Geometry, Grain, PAIR_BYTES};
pub use hash::{Hashed, blob_id, hash, hash_into};
pub use id::{BlobId, ParseBlobIdError};
pub use partial::{NodeError, PartialTree, node_pair};
pub use patchwork::{Patchwork, Span, clip_spans};
pub use prove::{ProveError, Prover};
pub use query::Query;
pub use range::{ByteRange, RangeSet};
pub use read_at::{ReadAt, WriteAt};
pub use verified::{Verified, VerifiedData, VerifiedNode};
pub use zeros::{BLOCK_BYTES, data_spans, is_zero};
