//! Messages on streams: a length, then postcard. Format: spec/wire.md, "Frames".

use std::{io, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use tokio::time::timeout;

/// What a stream between peers is for: its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// Both sides say who they are: the first stream of a connection.
    Hello = 1,
    /// The opener hears the other's catalog.
    Catalog = 2,
    /// The opener asks for ranges of a blob: iroh-blobs' request follows.
    Get = 3,
}

impl StreamKind {
    /// The kind that the first byte of a stream says.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Hello, Self::Catalog, Self::Get].into_iter().find(|&kind| kind as u8 == byte)
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
    /// Nothing came, or could be sent, in time.
    #[error("no answer within {} s", .0.as_secs())]
    Stalled(Duration),
    /// The stream or its connection failed.
    #[error("the stream failed")]
    Stream(#[source] io::Error),
}

/// Writes `message` as one frame.
pub async fn write_frame<T: Serialize>(send: &mut quinn::SendStream, message: &T) -> Result<(), FrameError> {
    let mut frame = postcard::to_extend(message, vec![0; 4]).map_err(FrameError::Invalid)?;
    let bytes =
        u32::try_from(frame.len() - 4).map_err(|_| FrameError::TooLong { bytes: frame.len(), max: FRAME_BYTES_MAX })?;
    frame[..4].copy_from_slice(&bytes.to_le_bytes());
    send.write_all(&frame).await.map_err(|error| FrameError::Stream(error.into()))
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
