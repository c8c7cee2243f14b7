//! Messages on streams: a length, then postcard. Format: spec/wire.md, "Frames".

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::Duration,
};

use namespace::{Batch, Cursor, Mark, PeerId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::time::timeout;
use tree::RangeSet;

use crate::iroh_wire::REQUEST_RANGES_MAX;

/// What a stream between peers is for: its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// Both sides say who they are: the first stream of a connection.
    Hello = 1,
    /// The opener hears the other's catalog, and what the other has heard: an [`Ask`] follows.
    Catalog = 2,
    /// The opener asks for ranges of a blob: iroh-blobs' request follows.
    Get = 3,
    /// The opener asks which ranges of a blob are there: the same request follows.
    Have = 4,
    /// The opener asks for nodes of a blob's tree: a [`NodesRequest`](crate::wire::NodesRequest) follows.
    Nodes = 5,
    /// The opener asks for ranges of a blob, and the other fetches what it lacks from peers that have it: how many hops
    /// that may make, the blob's size, and iroh-blobs' request follow.
    Through = 6,
    /// The opener asks for whole small blobs: a [`BatchRequest`](crate::wire::BatchRequest) follows.
    Batch = 7,
    /// The opener has the other carry out [`Order`](crate::Order)s: they follow.
    Orders = 8,
    /// The opener asks how a blob is cut by its content: a [`ChunksRequest`](crate::wire::ChunksRequest) follows.
    Chunks = 9,
    /// The opener asks for details of entries of an arena: a [`DetailsRequest`](crate::wire::DetailsRequest) follows.
    Details = 10,
}

impl StreamKind {
    /// The kind that the first byte of a stream says.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use StreamKind::{Batch, Catalog, Chunks, Details, Get, Have, Hello, Nodes, Orders, Through};
        let kinds = [Hello, Catalog, Get, Have, Nodes, Through, Batch, Orders, Chunks, Details];
        kinds.into_iter().find(|&kind| kind as u8 == byte)
    }
}

/// How far the opener of a [`StreamKind::Catalog`] stream has heard whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// How far, by peer.
    pub cursors: Vec<(PeerId, Cursor)>,
    /// Whom it hears directly, so that nothing of them need be passed on.
    pub direct: Vec<PeerId>,
    /// The latest mark of the one who is asked that others showed the opener; the default if none did.
    pub rumour: Mark,
}

impl Ask {
    /// Asks `peer`, showing as many cursors as fit, its own first. What does not fit is told from the start.
    pub(crate) fn new(
        mut cursors: BTreeMap<PeerId, Cursor>,
        direct: BTreeSet<PeerId>,
        rumour: Mark,
        peer: PeerId,
    ) -> Self {
        let own = cursors.remove(&peer).map(|cursor| (peer, cursor));
        let mut left = ASK_BYTES_MAX - ASK_BYTES_MAX / 8;
        let fits = |(_, cursor): &(PeerId, Cursor)| {
            let bytes =
                80 + cursor.after.as_ref().map_or(0, |(arena, path)| arena.as_str().len() + path.as_bytes().len());
            left = left.saturating_sub(bytes);
            left > 0
        };
        let cursors = own.into_iter().chain(cursors).take_while(fits).collect();
        Self { cursors, direct: direct.into_iter().collect(), rumour }
    }
}

/// What is told on a [`StreamKind::Catalog`] stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Telling {
    /// A part of somebody's catalog.
    pub batch: Batch,
    /// What the teller calls the batch's origin: a hint, for people.
    pub name: String,
}

/// What there is of the ranges of a blob that were asked about: the answer on a [`StreamKind::Have`] stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Have {
    /// The blob's size in bytes, as known or claimed there.
    pub size: u64,
    /// What is there, in bytes: the first so many ranges of it.
    pub ranges: RangeSet,
    /// Up to here that is all.
    pub upto: u64,
}

impl Have {
    /// Says that of what was asked `ranges` are here, as many of them as a message may name.
    pub(crate) fn new(size: u64, ranges: &RangeSet) -> Self {
        let told: RangeSet = ranges.iter().take(REQUEST_RANGES_MAX).collect();
        let upto = if told == *ranges { u64::MAX } else { told.end() };
        Self { size, ranges: told, upto }
    }
}

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended where a frame was due, or inside one.
    #[error("the stream ended")]
    Ended,
    /// The other side announced a longer frame than is taken here.
    #[error("a frame of {bytes} bytes, where {max} are the most")]
    TooLong {
        /// What was announced.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// The frame does not say anything that is understood here.
    #[error("a frame that cannot be understood")]
    Invalid(#[source] postcard::Error),
    /// The stream is of a kind that nobody opens here.
    #[error("a stream of an unknown kind")]
    UnknownKind,
    /// Nothing came, or could be sent, in time.
    #[error("no answer within {} s", .0.as_secs())]
    Stalled(Duration),
    /// The stream or its connection failed.
    #[error("the stream failed")]
    Stream(#[source] io::Error),
}

/// Writes `message` as one frame.
pub async fn write_frame<T: Serialize>(send: &mut quinn::SendStream, message: &T) -> Result<(), FrameError> {
    send.write_all(&encode_frame(message)?).await.map_err(|error| FrameError::Stream(error.into()))
}

/// Opens a stream that says `head`, then `message` as one frame, and no more; the answer comes on the other half.
pub(crate) async fn open_with_frame<T: Serialize>(
    connection: &quinn::Connection,
    head: &[u8],
    message: &T,
) -> Result<quinn::RecvStream, FrameError> {
    let (mut send, recv) = connection.open_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
    let bytes = [head, &encode_frame(message)?].concat();
    send.write_all(&bytes).await.map_err(|error| FrameError::Stream(error.into()))?;
    let _ = send.finish();
    Ok(recv)
}

/// The bytes of `message` as one frame.
pub(crate) fn encode_frame<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = postcard::to_extend(message, vec![0; 4]).map_err(FrameError::Invalid)?;
    let bytes =
        u32::try_from(frame.len() - 4).map_err(|_| FrameError::TooLong { bytes: frame.len(), max: FRAME_BYTES_MAX })?;
    frame[..4].copy_from_slice(&bytes.to_le_bytes());
    Ok(frame)
}

/// Reads one frame of at most `max` bytes. Takes room only for bytes that came.
pub async fn read_frame<T: DeserializeOwned>(recv: &mut quinn::RecvStream, max: usize) -> Result<T, FrameError> {
    let failed = |error: quinn::ReadExactError| match error {
        quinn::ReadExactError::FinishedEarly(_) => FrameError::Ended,
        quinn::ReadExactError::ReadError(error) => FrameError::Stream(error.into()),
    };
    let mut length = [0; 4];
    recv.read_exact(&mut length).await.map_err(failed)?;
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > max {
        return Err(FrameError::TooLong { bytes, max });
    }
    let mut frame = Vec::new();
    while frame.len() < bytes {
        match recv.read_chunk(bytes - frame.len(), true).await {
            Ok(Some(chunk)) => frame.extend_from_slice(&chunk.bytes),
            Ok(None) => return Err(FrameError::Ended),
            Err(error) => return Err(FrameError::Stream(error.into())),
        }
    }
    postcard::from_bytes(&frame).map_err(FrameError::Invalid)
}

/// Runs `exchange` for at most `limit`.
pub(crate) async fn within<T>(
    limit: Duration,
    exchange: impl Future<Output = Result<T, FrameError>>,
) -> Result<T, FrameError> {
    timeout(limit, exchange).await.unwrap_or(Err(FrameError::Stalled(limit)))
}

/// The longest frame that anything here reads.
pub(crate) const FRAME_BYTES_MAX: usize = 1 << 20;
/// The longest frame that is read from a peer that has not yet said who it is.
pub(crate) const GREETING_BYTES_MAX: usize = 16 << 10;
/// The longest [`Ask`] that is read.
pub(crate) const ASK_BYTES_MAX: usize = 512 << 10;
/// The longest [`Have`] that is read: one of the most ranges that there may be fits.
pub(crate) const HAVE_BYTES_MAX: usize = 64 << 10;
/// The longest [`Chunks`](crate::wire::Chunks) that is read.
pub(crate) const CHUNKS_BYTES_MAX: usize = 1 << 20;
/// The longest [`Nodes`](crate::wire::Nodes) that is read: 1,024 pairs fit.
pub(crate) const NODES_BYTES_MAX: usize = 65 << 10;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;
    use tree::ByteRange;

    use super::*;

    fn ranges(of: impl IntoIterator<Item = (u64, u64)>) -> RangeSet {
        of.into_iter().filter_map(|(start, end)| ByteRange::new(start, end)).collect()
    }

    #[test]
    fn ask_on_the_wire() {
        let peer = |byte| PeerId::from_bytes([byte; 32]);
        let mark = |epoch, seq, session| Mark { epoch, seq, session };
        let cursors = BTreeMap::from([2, 3].map(|byte| {
            let cursor = Cursor { mark: mark(u64::from(byte) << 32, 300, 128), after: None };
            (peer(byte), cursor)
        }));
        let ask = Ask::new(cursors, BTreeSet::from([peer(3), peer(4)]), mark(1, 2, 3), peer(3));
        let hex = [
            &["02", &"03".repeat(32), "8080808030ac02800100", &"02".repeat(32), "8080808020ac02800100"].concat(),
            &["02", &"03".repeat(32), &"04".repeat(32)].concat(),
            "010203",
        ];
        assert_eq!(HEXLOWER.encode(&postcard::to_stdvec(&ask).unwrap()), hex.concat());
    }

    #[test]
    fn have_on_the_wire() {
        let have = Have::new(70_000, &ranges([(0, 16384), (65536, 70_000)]));
        let hex = "f0a2040200808001808004f0a204ffffffffffffffffff01";
        assert_eq!(HEXLOWER.encode(&postcard::to_stdvec(&have).unwrap()), hex);
        assert_eq!(HEXLOWER.encode(&postcard::to_stdvec(&Have::default()).unwrap()), "000000");
    }

    #[test]
    fn a_have_with_the_most_ranges_is_short_enough_and_says_how_far_it_goes() {
        let far = 1 << 62;
        let all = ranges((0..=REQUEST_RANGES_MAX as u64).map(|n| (far + n * 32768, far + n * 32768 + 16384)));
        let have = Have::new(u64::MAX, &all);
        assert_eq!((have.ranges.iter().len(), have.upto), (REQUEST_RANGES_MAX, have.ranges.end()));
        assert!(postcard::to_stdvec(&have).unwrap().len() <= HAVE_BYTES_MAX);
    }
}
