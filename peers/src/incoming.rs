use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use namespace::PeerId;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use crate::{
    connection::packs,
    counting::{self, Counts},
    endpoint::Inner,
    frame::FrameError,
    outgoing::{BITE_BYTES, Manner},
    pace::{Class, Limits},
    packing::{Compress, Unpacker},
    transfer::{STALL_LIMIT, TRICKLE_BYTES},
};

/// On what terms a peer is asked for bytes.
#[derive(Clone)]
pub(crate) struct Terms {
    pub(crate) manner: Manner,
    peer: PeerId,
    limits: Limits,
    /// Those of this machine, and of the command for which it is asked.
    counts: [Option<Arc<Counts>>; 2],
}

/// An answer, taken apart as it comes, by its lengths.
pub(crate) struct Incoming {
    terms: Terms,
    recv: quinn::RecvStream,
    unpacker: Option<Unpacker>,
    /// Came, and not taken yet.
    plain: Bytes,
    /// What has been read, and how much of that up to the last use.
    read_bytes: u64,
    used_bytes: u64,
    /// What came since when, so far as it was waited for.
    came: usize,
    since: Instant,
    /// How long nothing may come.
    silence: Duration,
}

impl Terms {
    /// Packed, if both sides can.
    pub(crate) fn new(inner: &Inner, peer: PeerId, class: Class) -> Self {
        let packed = inner.compress != Compress::Off && packs(inner, peer);
        Self { manner: Manner { class, packed }, ..Self::plain(inner, peer, class) }
    }

    /// Not packed.
    pub(crate) fn plain(inner: &Inner, peer: PeerId, class: Class) -> Self {
        let counts = [Some(inner.counts.clone()), counting::of_the_command()];
        Self { manner: Manner::plain(class), peer, limits: inner.down.clone(), counts }
    }

    /// Counts bytes that were read.
    pub(crate) fn count(&self, bytes: usize) {
        self.counts.iter().flatten().for_each(|counts| counts.receive(bytes as u64));
    }

    /// Counts bytes that were read and brought nothing.
    pub(crate) fn waste(&self, bytes: u64) {
        self.counts.iter().flatten().for_each(|counts| counts.waste(bytes));
    }

    /// Waits until the limits allow to read more than these bytes.
    pub(crate) async fn pace(&self, bytes: usize) {
        if self.limits.is_limited() {
            for start in (0..bytes).step_by(BITE_BYTES) {
                let bite = BITE_BYTES.min(bytes - start) as u64;
                self.limits.take(self.peer, self.manner.class, bite).await;
            }
        }
    }

    /// What takes frames apart, if there are any.
    pub(crate) fn unpacker(&self) -> Option<Unpacker> {
        self.manner.packed.then(Unpacker::new)
    }
}

impl Incoming {
    /// One that is given up when nothing comes for so long.
    pub(crate) fn new(terms: Terms, recv: quinn::RecvStream, silence: Duration) -> Self {
        let (unpacker, plain, since) = (terms.unpacker(), Bytes::new(), Instant::now());
        Self { unpacker, terms, recv, plain, read_bytes: 0, used_bytes: 0, came: 0, since, silence }
    }

    /// Marks all that was read so far as used. What is read later counts as wasted when this is dropped.
    pub(crate) fn used(&mut self) {
        self.used_bytes = self.read_bytes;
    }

    /// Reads a frame of at most `max` bytes, for which it takes the room at once. Fails as [`read_exact`](Self::read_exact) does.
    pub(crate) async fn read_frame<T: DeserializeOwned>(&mut self, max: usize) -> Result<T, String> {
        let mut length = [0; 4];
        self.read_exact(&mut length).await?;
        let bytes = u32::from_le_bytes(length) as usize;
        if bytes > max {
            return Err(tree::reason(&FrameError::TooLong { bytes, max }));
        }
        let mut frame = vec![0; bytes];
        self.read_exact(&mut frame).await?;
        self.used();
        postcard::from_bytes(&frame).map_err(|error| tree::reason(&FrameError::Invalid(error)))
    }

    /// Fills `buffer`. Fails if the answer ends before, is no answer, or stalls: if nothing comes for the silence given, or hardly
    /// anything for 15 s. What a limit here takes does not count.
    pub(crate) async fn read_exact(&mut self, mut buffer: &mut [u8]) -> Result<(), String> {
        while !buffer.is_empty() {
            if self.plain.is_empty() {
                self.plain = self.next().await?;
            }
            let taken = self.plain.split_to(self.plain.len().min(buffer.len()));
            let (filled, rest) = buffer.split_at_mut(taken.len());
            filled.copy_from_slice(&taken);
            buffer = rest;
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Bytes, String> {
        loop {
            if let Some(unpacker) = &mut self.unpacker
                && let Some(plain) = unpacker.next().map_err(|error| tree::reason(&error))?
            {
                return Ok(plain);
            }
            let stalled = |limit: Duration| format!("it stalled: nothing came for {} s", limit.as_secs());
            let chunk = timeout(self.silence, self.recv.read_chunk(CHUNK_BYTES, true)).await;
            let chunk = chunk.map_err(|_| stalled(self.silence))?.map_err(|error| tree::reason(&error))?;
            let bytes = chunk.ok_or("the answer ended early")?.bytes;
            self.came += bytes.len();
            if self.since.elapsed() >= STALL_LIMIT {
                if self.came < TRICKLE_BYTES {
                    return Err(stalled(STALL_LIMIT));
                }
                (self.came, self.since) = (0, Instant::now());
            }
            let began = Instant::now();
            self.terms.count(bytes.len());
            self.read_bytes += bytes.len() as u64;
            self.terms.pace(bytes.len()).await;
            self.since += began.elapsed();
            match &mut self.unpacker {
                Some(unpacker) => unpacker.push(bytes),
                None => return Ok(bytes),
            }
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.terms.waste(self.read_bytes - self.used_bytes);
    }
}

const CHUNK_BYTES: usize = 64 << 10;
