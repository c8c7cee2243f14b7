//! Packed answers: bytes in frames, each plain or compressed, as the sender finds that it pays.
//!
//! What is unpacked is as unproven as what came. Format and bounds: spec/wire.md, "Packing".

mod unpack;

#[cfg(test)]
mod tests;

use std::{fmt, str::FromStr};

use bytes::Bytes;
use serde::{Deserialize, Deserializer, de::Error as _};
use zstd::bulk::Compressor;

pub use unpack::{UnpackError, Unpacker};

/// When answers are compressed. Its text is `auto`, `off`, or a level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compress {
    /// While the network is slower than this machine, what shrinks, at a level that costs little.
    #[default]
    Auto,
    /// Never.
    Off,
    /// What shrinks, at this level.
    Level(Level),
}

/// A level of zstd, 1 to 19: higher ones take longer and leave less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level(u8);

/// A text says no [`Compress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("compression is \"auto\", \"off\", or a level from 1 to 19")]
pub struct CompressError;

/// Puts bytes into frames, compressed where that pays.
///
/// One for each stream of bytes that belong together, better one for many after one another: it remembers whether the
/// bytes before shrank. Holds up to 2 MiB, and zstd's memory for its level, once it has tried; nothing before.
pub struct Packer {
    compress: Compress,
    zstd: Option<Compressor<'static>>,
    trials: Trials,
    samples: u64,
    plain: Vec<u8>,
    packed: Vec<u8>,
}

impl Packer {
    /// One that compresses when `compress` says.
    pub fn new(compress: Compress) -> Self {
        Self { compress, zstd: None, trials: Trials::default(), samples: 0, plain: Vec::new(), packed: Vec::new() }
    }

    /// Returns `plain` in frames for the wire, in order: one, or one for each MiB, or none for no bytes.
    ///
    /// `wire_is_behind` says that the network takes less than this machine gives, so that there is time to compress.
    /// What is not compressed is passed on without a copy.
    pub fn pack(&mut self, plain: Vec<Bytes>, wire_is_behind: bool) -> Vec<Bytes> {
        // The place of the header of the frame that is being filled, and how many bytes that has.
        let (mut head, mut bytes) = (0, 0);
        let mut wire = Vec::with_capacity(plain.len() + 1);
        wire.push(Bytes::new());
        for mut chunk in plain {
            while bytes + chunk.len() > FRAME_BYTES_MAX {
                wire.push(chunk.split_to(FRAME_BYTES_MAX - bytes));
                self.close(&mut wire, head, FRAME_BYTES_MAX, wire_is_behind);
                (head, bytes) = (wire.len(), 0);
                wire.push(Bytes::new());
            }
            bytes += chunk.len();
            wire.push(chunk);
        }
        self.close(&mut wire, head, bytes, wire_is_behind);
        wire.retain(|chunk| !chunk.is_empty());
        wire
    }

    /// How many samples were compressed so far, to find out whether it pays.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Makes a frame of the `bytes` bytes in `wire` that stand behind the place for its header.
    fn close(&mut self, wire: &mut Vec<Bytes>, head: usize, bytes: usize, wire_is_behind: bool) {
        if bytes == 0 {
            return;
        }
        match self.compressed(&wire[head + 1..], bytes, wire_is_behind) {
            Some(frame) => {
                wire.truncate(head);
                wire.push(frame);
            }
            None => wire[head] = Bytes::copy_from_slice(&header(bytes, false)),
        }
    }

    /// The whole frame, if it is to be compressed and that makes it smaller.
    fn compressed(&mut self, chunks: &[Bytes], bytes: usize, wire_is_behind: bool) -> Option<Bytes> {
        // Zeros cost less to compress than to send, on any network, and need no trial.
        let zeros: usize = chunks.iter().filter(|chunk| tree::is_zero(chunk)).map(Bytes::len).sum();
        let mostly_zeros = zeros > bytes / 2;
        let level = match self.compress {
            Compress::Off => return None,
            Compress::Auto if !wire_is_behind && !mostly_zeros => return None,
            Compress::Auto => AUTO_LEVEL,
            Compress::Level(level) => level,
        };
        if bytes < WORTH_BYTES_MIN || !(mostly_zeros || self.trials.due()) {
            return None;
        }
        if !mostly_zeros && !self.trials.paying && bytes > SAMPLE_BYTES {
            self.samples += 1;
            self.plain.clear();
            for spot in 0..SPOTS {
                let start = (bytes - SPOT_BYTES) / (SPOTS - 1) * spot;
                copy(chunks, start, SPOT_BYTES, &mut self.plain);
            }
            if self.squeeze(level, enough(SAMPLE_BYTES)).is_none() {
                self.trials.note(false);
                return None;
            }
        }
        self.plain.clear();
        copy(chunks, 0, bytes, &mut self.plain);
        let packed = self.squeeze(level, bytes - 1);
        self.trials.note(packed.is_some_and(|packed| packed <= enough(bytes)));
        let packed = packed?;
        let mut frame = Vec::with_capacity(HEADER_BYTES + packed);
        frame.extend_from_slice(&header(packed, true));
        frame.extend_from_slice(&self.packed[..packed]);
        Some(frame.into())
    }

    /// Compresses `self.plain` into `self.packed`. Returns how many bytes that gave; `None` if more than `most`.
    fn squeeze(&mut self, level: Level, most: usize) -> Option<usize> {
        if self.zstd.is_none() {
            self.zstd = Compressor::new(level.0.into()).ok();
        }
        if self.packed.len() < most {
            self.packed.resize(most, 0);
        }
        self.zstd.as_mut()?.compress_to_buffer(&self.plain, &mut self.packed[..most]).ok()
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer")
            .field("compress", &self.compress)
            .field("trials", &self.trials)
            .field("samples", &self.samples)
            .finish_non_exhaustive()
    }
}

/// Which frames are worth a try: while it pays, all; after each one that did not, further and further ones.
#[derive(Debug)]
struct Trials {
    /// The last one paid: the next frame is compressed without a sample.
    paying: bool,
    /// So many frames are not tried now.
    pause: u32,
    /// So many are not tried after the next failure.
    next_pause: u32,
}

impl Default for Trials {
    fn default() -> Self {
        Self { paying: false, pause: 0, next_pause: 1 }
    }
}

impl Trials {
    /// Whether the next frame is to be tried.
    fn due(&mut self) -> bool {
        let due = self.pause == 0;
        self.pause = self.pause.saturating_sub(1);
        due
    }

    fn note(&mut self, paid: bool) {
        if paid {
            *self = Self { paying: true, ..Self::default() };
        } else {
            *self =
                Self { paying: false, pause: self.next_pause, next_pause: (self.next_pause * 2).min(PAUSE_FRAMES_MAX) };
        }
    }
}

impl Level {
    /// The level `n`, if there is one: 1 to 19.
    pub fn new(n: u8) -> Option<Self> {
        (1..=19).contains(&n).then_some(Self(n))
    }
}

impl fmt::Display for Compress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Level(Level(n)) => write!(f, "{n}"),
        }
    }
}

impl FromStr for Compress {
    type Err = CompressError;

    fn from_str(text: &str) -> Result<Self, CompressError> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => text.parse().ok().and_then(Level::new).map(Self::Level).ok_or(CompressError),
        }
    }
}

impl<'de> Deserialize<'de> for Compress {
    /// Takes a level as a number too.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(i64),
            Text(String),
        }
        let text = match Written::deserialize(deserializer).map_err(|_| D::Error::custom(CompressError))? {
            Written::Number(n) => n.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(D::Error::custom)
    }
}

fn header(payload_bytes: usize, compressed: bool) -> [u8; HEADER_BYTES] {
    let bytes = u32::try_from(payload_bytes).unwrap_or_else(|_| unreachable!("a payload is at most 1 MiB"));
    (bytes | if compressed { COMPRESSED } else { 0 }).to_le_bytes()
}

/// The most that `bytes` bytes may become for it to have paid.
fn enough(bytes: usize) -> usize {
    bytes - bytes / 8
}

/// Appends `len` bytes of `chunks` to `to`, from the byte at `start` on.
fn copy(chunks: &[Bytes], mut start: usize, mut len: usize, to: &mut Vec<u8>) {
    for chunk in chunks {
        let from = start.min(chunk.len());
        let upto = (from + len).min(chunk.len());
        to.extend_from_slice(&chunk[from..upto]);
        start -= from;
        len -= upto - from;
    }
}

const HEADER_BYTES: usize = 4;
/// The bit of a header that says that zstd is to unpack the payload.
const COMPRESSED: u32 = 1 << 31;
/// The most bytes of a payload, and of what it unpacks to.
const FRAME_BYTES_MAX: usize = 1 << 20;
/// spec/decisions.md, "Compressed while the wire is behind", has the figures.
const AUTO_LEVEL: Level = Level(1);
/// What is shorter is not worth a try.
const WORTH_BYTES_MIN: usize = 512;
/// A sample is so many spots of a frame, from its first bytes to its last.
const SPOTS: usize = 4;
const SPOT_BYTES: usize = 4 << 10;
const SAMPLE_BYTES: usize = SPOTS * SPOT_BYTES;
const PAUSE_FRAMES_MAX: u32 = 64;
