//! Content-defined chunks: cut where the bytes say so, so that bytes which moved are cut alike again.
//! Format and bounds: spec/tree.md, "Content-defined chunks".

use std::{collections::HashMap, sync::LazyLock};

use serde::{Deserialize, Serialize};

use crate::patchwork::Span;

/// A content-defined chunk: how many bytes it has, and the first half of their BLAKE3 hash. A hint, and no proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Its length in bytes.
    pub len: u64,
    /// The first 16 bytes of the hash of its bytes.
    pub hash: [u8; 16],
}

/// How long the chunks of a blob are. Its size alone decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSizes {
    log_average: u32,
}

impl ChunkSizes {
    /// Of a blob of `size` bytes: 64 KiB on average up to 32 GiB, and with each doubling from there on twice as many.
    pub const fn of(size: u64) -> Self {
        let mut log_average = LOG_AVERAGE_MIN;
        while size >> log_average > CHUNKS_USUAL {
            log_average += 1;
        }
        Self { log_average }
    }

    /// The length in bytes that chunks have on average, about.
    pub const fn average(&self) -> u64 {
        1 << self.log_average
    }

    /// The least length in bytes, but for the last chunk.
    pub const fn min(&self) -> u64 {
        self.average() / 4
    }

    /// The greatest length in bytes.
    pub const fn max(&self) -> u64 {
        self.average() * 4
    }

    /// The most chunks that `size` bytes can have.
    pub const fn count_max(&self, size: u64) -> u64 {
        size.div_ceil(self.min())
    }
}

/// Cuts bytes into chunks while they pass by. Memory is bounded, whatever their number.
#[derive(Debug)]
pub struct Chunker {
    sizes: ChunkSizes,
    /// Of the chunk that is not at its end yet: where it begins, and what came of it.
    start: u64,
    len: u64,
    hasher: blake3::Hasher,
    gear: u64,
}

impl Chunker {
    /// For chunks of these sizes.
    pub fn new(sizes: ChunkSizes) -> Self {
        Self { sizes, start: 0, len: 0, hasher: blake3::Hasher::new(), gear: 0 }
    }

    /// Takes the bytes at `at`, and hands every chunk that ends in them to `found`, with the offset at which it begins. If
    /// they do not follow on those before, a chunk ends there.
    pub fn push(&mut self, at: u64, mut bytes: &[u8], found: &mut dyn FnMut(u64, Chunk)) {
        if at != self.start + self.len {
            self.finish(found);
            self.start = at;
        }
        while !bytes.is_empty() {
            let (taken, is_end) = self.scan(bytes);
            let (chunk, rest) = bytes.split_at(taken);
            self.hasher.update(chunk);
            self.len += taken as u64;
            bytes = rest;
            if is_end {
                self.finish(found);
            }
        }
    }

    /// Says that nothing follows on what was pushed: what is left of it is a chunk.
    pub fn finish(&mut self, found: &mut dyn FnMut(u64, Chunk)) {
        if self.len > 0 {
            let mut hash = [0; 16];
            hash.copy_from_slice(&self.hasher.finalize().as_bytes()[..16]);
            found(self.start, Chunk { len: self.len, hash });
        }
        self.hasher.reset();
        self.start += self.len;
        (self.len, self.gear) = (0, 0);
    }

    /// How many of `bytes` belong to the chunk at hand, and whether it ends behind them.
    fn scan(&mut self, bytes: &[u8]) -> (usize, bool) {
        let upto = |len: u64| usize::try_from(len.saturating_sub(self.len)).unwrap_or(usize::MAX).min(bytes.len());
        let (start, middle, end) = (upto(self.sizes.min()), upto(self.sizes.average()), upto(self.sizes.max()));
        let mut at = start;
        // Harder to end in front of the average length than behind it, so that most chunks are about that long.
        for (end, bits) in [(middle, self.sizes.log_average + 2), (end, self.sizes.log_average - 2)] {
            while at < end {
                self.gear = (self.gear << 1).wrapping_add(GEAR[usize::from(bytes[at])]);
                at += 1;
                if self.gear >> (u64::BITS - bits) == 0 {
                    return (at, true);
                }
            }
        }
        (at, self.len + at as u64 == self.sizes.max())
    }
}

/// Why a list of chunks cannot be that of a blob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkListError {
    /// A chunk is shorter or longer than chunks of that blob can be.
    #[error("a chunk of {len} bytes at {at}")]
    Length {
        /// Where it should begin, in bytes.
        at: u64,
        /// How long it is said to be.
        len: u64,
    },
    /// The chunks together have fewer bytes than the blob, or more.
    #[error("chunks of {bytes} bytes together")]
    Total {
        /// How many they have, so far as they were looked at.
        bytes: u64,
    },
}

/// Finds bytes that are here for the chunks of a blob that is not.
///
/// Nothing of it is trusted: wrong hashes give bytes that do not prove. Calling order: [`list`](Self::list) with the
/// blob's chunks, in order, in as many parts as one likes; [`is_complete`](Self::is_complete); then
/// [`offer`](Self::offer) for the chunks that are here; then [`into_spans`](Self::into_spans). Memory is some 60 bytes
/// for each chunk listed, and the blob's size bounds their number.
#[derive(Debug)]
pub struct Assembly {
    size: u64,
    sizes: ChunkSizes,
    listed: Vec<Listed>,
    bytes: u64,
    /// The last of the chunks listed with a hash.
    by_hash: HashMap<[u8; 16], u32>,
    spans: Vec<Span>,
}

#[derive(Debug)]
struct Listed {
    at: u64,
    len: u64,
    /// The one before with the same hash.
    before: Option<u32>,
}

impl Assembly {
    /// Of a blob of `size` bytes.
    pub fn new(size: u64) -> Self {
        let sizes = ChunkSizes::of(size);
        Self { size, sizes, listed: Vec::new(), bytes: 0, by_hash: HashMap::new(), spans: Vec::new() }
    }

    /// Takes the blob's next chunks. After an error the list is of no use.
    pub fn list(&mut self, chunks: &[Chunk]) -> Result<(), ChunkListError> {
        for &Chunk { len, hash } in chunks {
            let at = self.bytes;
            let bytes = at.checked_add(len).filter(|&bytes| bytes <= self.size);
            let bytes = bytes.ok_or(ChunkListError::Total { bytes: at.saturating_add(len) })?;
            if len == 0 || len > self.sizes.max() || (len < self.sizes.min() && bytes < self.size) {
                return Err(ChunkListError::Length { at, len });
            }
            let number = u32::try_from(self.listed.len()).map_err(|_| ChunkListError::Total { bytes })?;
            let before = self.by_hash.insert(hash, number);
            self.listed.push(Listed { at, len, before });
            self.bytes = bytes;
        }
        Ok(())
    }

    /// Whether the chunks that were listed are all of the blob.
    pub fn is_complete(&self) -> bool {
        self.bytes == self.size
    }

    /// There is such a chunk in `source`, at the byte `from`.
    pub fn offer(&mut self, source: usize, from: u64, chunk: Chunk) {
        // Each is looked for once, so that a list of equal chunks costs no more than any other.
        let mut next = self.by_hash.remove(&chunk.hash);
        while let Some(listed) = next.and_then(|number| self.listed.get(number as usize)) {
            if listed.len == chunk.len {
                self.spans.push(Span { at: listed.at, len: listed.len, source, from });
            }
            next = listed.before;
        }
    }

    /// What was found, by where it belongs in the blob: disjoint.
    pub fn into_spans(self) -> Vec<Span> {
        let mut spans = self.spans;
        spans.sort_unstable_by_key(|span| span.at);
        spans.dedup_by(|next, last| {
            let follows = last.source == next.source
                && last.at + last.len == next.at
                && last.from.checked_add(last.len) == Some(next.from);
            if follows {
                last.len += next.len;
            }
            follows
        });
        spans
    }
}

/// A random number for each byte, the same everywhere.
static GEAR: LazyLock<[u64; 256]> = LazyLock::new(|| {
    let mut gear = [0; 256];
    let mut bytes = blake3::Hasher::new().update(b"blobd chunks 1").finalize_xof();
    for number in &mut gear {
        let mut eight = [0; 8];
        bytes.fill(&mut eight);
        *number = u64::from_le_bytes(eight);
    }
    gear
});

const LOG_AVERAGE_MIN: u32 = 16;
/// So many chunks of average length a blob has at most.
const CHUNKS_USUAL: u64 = 1 << 19;
