use std::{collections::VecDeque, mem};

use bytes::Bytes;
use zstd::{bulk::Decompressor, zstd_safe};

use super::{COMPRESSED, FRAME_BYTES_MAX, HEADER_BYTES};

/// Takes frames apart as their bytes come: [`push`](Self::push) what came, then [`next`](Self::next) until it has no more.
///
/// Holds what was pushed and not taken, one compressed frame and what it unpacks to: 2 MiB if everything is taken.
#[derive(Default)]
pub struct Unpacker {
    /// Not looked at yet. None of it is empty.
    arrived: VecDeque<Bytes>,
    state: State,
    /// What came of a compressed frame.
    packed: Vec<u8>,
    zstd: Option<Decompressor<'static>>,
}

/// The other side sent what is no frame. Nothing that comes behind it can be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    /// A frame without a payload.
    #[error("a frame of no bytes")]
    Empty,
    /// A longer frame was announced than is taken.
    #[error("a frame of {bytes} bytes, where {FRAME_BYTES_MAX} are the most")]
    TooLong {
        /// What was announced.
        bytes: usize,
    },
    /// A compressed frame that says that it has more bytes than are taken.
    #[error("a compressed frame of {bytes} bytes unpacked, where {FRAME_BYTES_MAX} are the most")]
    UnpacksToTooMuch {
        /// What it says.
        bytes: u64,
    },
    /// The payload of a compressed frame is not one zstd frame, from its first byte to its last, that says its size.
    #[error("a compressed frame that is not just one zstd frame of a known size")]
    NotOneFrame,
    /// A compressed frame from which zstd does not get the bytes that it announces.
    #[error("a compressed frame that does not unpack")]
    Damaged,
}

impl Unpacker {
    /// One at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes from the wire.
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() && !matches!(self.state, State::Failed(_)) {
            self.arrived.push_back(bytes);
        }
    }

    /// Returns the next plain bytes, never none; `None` if they have not come yet. Of plain frames it returns what is
    /// there, without a copy; compressed ones once they are whole. After an error it returns that again.
    #[expect(clippy::should_implement_trait, reason = "None is not the end")]
    pub fn next(&mut self) -> Result<Option<Bytes>, UnpackError> {
        let next = self.advance();
        if let Err(error) = next {
            *self = Self { state: State::Failed(error), ..Self::default() };
        }
        next
    }

    /// Whether the stream may end here: no frame has begun, and everything was taken.
    pub fn is_between_frames(&self) -> bool {
        self.arrived.is_empty() && matches!(self.state, State::Header { have: 0, .. })
    }

    fn advance(&mut self) -> Result<Option<Bytes>, UnpackError> {
        loop {
            let wanted = match &self.state {
                State::Header { have, .. } => HEADER_BYTES - have,
                State::Plain { left } | State::Compressed { left } => *left,
                State::Failed(error) => return Err(*error),
            };
            let Some(chunk) = self.take(wanted) else { return Ok(None) };
            let is_whole = chunk.len() == wanted;
            match &mut self.state {
                State::Header { bytes, have } => {
                    bytes[*have..][..chunk.len()].copy_from_slice(&chunk);
                    *have += chunk.len();
                    if is_whole {
                        self.state = State::announced(u32::from_le_bytes(*bytes))?;
                    }
                }
                State::Plain { left } => {
                    *left -= chunk.len();
                    if is_whole {
                        self.state = State::default();
                    }
                    return Ok(Some(chunk));
                }
                State::Compressed { left } => {
                    *left -= chunk.len();
                    if is_whole && self.packed.is_empty() {
                        self.state = State::default();
                        return self.unpack(&chunk).map(Some);
                    }
                    self.packed.extend_from_slice(&chunk);
                    if is_whole {
                        self.state = State::default();
                        let mut packed = mem::take(&mut self.packed);
                        let plain = self.unpack(&packed)?;
                        packed.clear();
                        self.packed = packed;
                        return Ok(Some(plain));
                    }
                }
                State::Failed(error) => return Err(*error),
            }
        }
    }

    /// The next bytes that came, at most `most` of them, which is not 0.
    fn take(&mut self, most: usize) -> Option<Bytes> {
        let front = self.arrived.front_mut()?;
        if front.len() > most { Some(front.split_to(most)) } else { self.arrived.pop_front() }
    }

    fn unpack(&mut self, packed: &[u8]) -> Result<Bytes, UnpackError> {
        if zstd_safe::find_frame_compressed_size(packed) != Ok(packed.len()) {
            return Err(UnpackError::NotOneFrame);
        }
        let bytes = match zstd_safe::get_frame_content_size(packed) {
            // A frame that is to be skipped says 0 too.
            Ok(None | Some(0)) | Err(_) => return Err(UnpackError::NotOneFrame),
            Ok(Some(bytes)) => bytes,
        };
        if bytes > FRAME_BYTES_MAX as u64 {
            return Err(UnpackError::UnpacksToTooMuch { bytes });
        }
        let bytes = bytes as usize;
        let mut plain = Vec::with_capacity(bytes);
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(Decompressor::new().map_err(|_| UnpackError::Damaged)?),
        };
        match zstd.decompress_to_buffer(packed, &mut plain) {
            Ok(got) if got == bytes => Ok(plain.into()),
            _ => Err(UnpackError::Damaged),
        }
    }
}

/// What comes next.
enum State {
    Header {
        bytes: [u8; HEADER_BYTES],
        /// So many of them are there.
        have: usize,
    },
    Plain {
        left: usize,
    },
    Compressed {
        left: usize,
    },
    Failed(UnpackError),
}

impl Default for State {
    fn default() -> Self {
        Self::Header { bytes: [0; HEADER_BYTES], have: 0 }
    }
}

impl State {
    fn announced(header: u32) -> Result<Self, UnpackError> {
        let left = (header & !COMPRESSED) as usize;
        match left {
            0 => Err(UnpackError::Empty),
            bytes if bytes > FRAME_BYTES_MAX => Err(UnpackError::TooLong { bytes }),
            _ if header & COMPRESSED != 0 => Ok(Self::Compressed { left }),
            _ => Ok(Self::Plain { left }),
        }
    }
}
