//! The way of an answer: made on a thread that may block, packed if the asker understands that, and sent at its turn.

use std::{ops::ControlFlow, time::Duration};

use blobstore::StoreError;
use bytes::Bytes;
use namespace::PeerId;
use serde::Serialize;
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};
use tracing::warn;

use crate::{
    endpoint::Inner,
    frame::{FrameError, encode_frame},
    pace::{Class, Limits},
    packing::Packer,
};

/// How an answer is wanted: a byte of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manner {
    /// What it is for.
    pub class: Class,
    /// Whether it is to be packed.
    pub packed: bool,
}

impl Manner {
    /// Not packed.
    pub(crate) fn plain(class: Class) -> Self {
        Self { class, packed: false }
    }

    /// The byte on the wire: the class, and the top bit if packed.
    pub fn byte(self) -> u8 {
        self.class.byte() | if self.packed { PACKED } else { 0 }
    }

    /// What a byte on the wire says.
    pub fn from_byte(byte: u8) -> Self {
        Self { class: Class::from_byte(byte & !PACKED), packed: byte & PACKED != 0 }
    }

    /// Of what comes last, the least urgent.
    fn priority(self) -> i32 {
        -i32::from(self.class.byte())
    }
}

/// The stream on which an answer goes out.
pub(crate) struct Outgoing {
    pub(crate) stream: quinn::SendStream,
    connection: quinn::Connection,
    peer: PeerId,
    manner: Manner,
    limits: Limits,
    packer: Option<Packer>,
}

/// Takes the bytes of an answer in, piece by piece, on the thread that makes them.
pub(crate) struct Filler {
    to: mpsc::Sender<Vec<Bytes>>,
    batch: Vec<Bytes>,
    bytes: usize,
    packer: Option<Packer>,
    connection: quinn::Connection,
    limit: Option<u64>,
}

impl Outgoing {
    /// An answer to `peer`, on a stream of `connection`.
    pub(crate) fn new(
        inner: &Inner,
        connection: &quinn::Connection,
        peer: PeerId,
        manner: Manner,
        stream: quinn::SendStream,
    ) -> Self {
        let _ = stream.set_priority(manner.priority());
        let packer = manner.packed.then(|| Packer::new(inner.compress));
        Self { stream, connection: connection.clone(), peer, manner, limits: inner.up.clone(), packer }
    }

    /// How the answer is wanted.
    pub(crate) fn manner(&self) -> Manner {
        self.manner
    }

    /// Sends what `make` puts into the filler, on a thread for that, while it does; and returns what it returns.
    pub(crate) async fn fill<T: Send + 'static>(
        &mut self,
        make: impl FnOnce(&mut Filler) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, FrameError> {
        let (to, mut ready) = mpsc::channel(BATCHES_AHEAD);
        let limit = [self.limits.rate(), self.limits.rate_of(self.peer)].into_iter().flatten().min();
        let (packer, connection) = (self.packer.take(), self.connection.clone());
        let mut filler = Filler { to, batch: Vec::new(), bytes: 0, packer, connection, limit };
        let making = spawn_blocking(move || {
            let made = make(&mut filler);
            let _ = filler.flush();
            (made, filler.packer)
        });
        while let Some(batch) = ready.recv().await {
            self.send(batch).await?;
        }
        match making.await {
            Ok((made, packer)) => {
                self.packer = packer;
                made.map_err(|error| {
                    warn!(reason = tree::reason(&error), "cannot be read");
                    FrameError::Ended
                })
            }
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    /// Sends a message as one frame, at its turn.
    pub(crate) async fn send_frame<T: Serialize>(&mut self, message: &T) -> Result<(), FrameError> {
        self.send(vec![encode_frame(message)?.into()]).await
    }

    async fn send(&mut self, mut batch: Vec<Bytes>) -> Result<(), FrameError> {
        if !self.limits.is_limited() {
            return in_time(self.stream.write_all_chunks(&mut batch)).await;
        }
        for mut chunk in batch {
            while !chunk.is_empty() {
                let bite = chunk.split_to(chunk.len().min(BITE_BYTES));
                self.limits.take(self.peer, self.manner.class, bite.len() as u64).await;
                in_time(self.stream.write_chunk(bite)).await?;
            }
        }
        Ok(())
    }
}

async fn in_time(writing: impl Future<Output = Result<(), quinn::WriteError>>) -> Result<(), FrameError> {
    match timeout(STALL_LIMIT, writing).await {
        Ok(written) => written.map_err(|error| FrameError::Stream(error.into())),
        Err(_) => Err(FrameError::Stalled(STALL_LIMIT)),
    }
}

impl Filler {
    /// Takes a piece. Breaks if nobody takes the answer any more.
    pub(crate) fn push(&mut self, piece: Bytes) -> ControlFlow<()> {
        self.bytes += piece.len();
        self.batch.push(piece);
        if self.bytes < BATCH_BYTES { ControlFlow::Continue(()) } else { self.flush() }
    }

    fn flush(&mut self) -> ControlFlow<()> {
        self.bytes = 0;
        let mut batch = std::mem::take(&mut self.batch);
        if self.packer.is_some() {
            let wire_is_behind = self.is_wire_slow();
            batch = self.packer.as_mut().map(|packer| packer.pack(batch, wire_is_behind)).unwrap_or_default();
        }
        match self.to.blocking_send(batch) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }

    /// Whether the network carries less than can be compressed meanwhile.
    fn is_wire_slow(&self) -> bool {
        let path = self.connection.stats().path;
        let bytes_per_s = path.cwnd as f64 / path.rtt.as_secs_f64().max(1e-6);
        bytes_per_s < SLOW_BYTES_PER_S || self.limit.is_some_and(|limit| (limit as f64) < SLOW_BYTES_PER_S)
    }
}

const PACKED: u8 = 0x80;
const BATCH_BYTES: usize = 256 << 10;
const BATCHES_AHEAD: usize = 4;
/// How much waits for a limit at a time.
pub(crate) const BITE_BYTES: usize = 16 << 10;
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// What is faster needs no compression: about half of what one thread compresses.
const SLOW_BYTES_PER_S: f64 = 150e6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manners_on_the_wire() {
        for (class, byte) in [(Class::Foreground, 0), (Class::Copy, 1), (Class::Background, 2)] {
            for (packed, byte) in [(false, byte), (true, 0x80 | byte)] {
                let manner = Manner { class, packed };
                assert_eq!((manner.byte(), Manner::from_byte(byte)), (byte, manner));
            }
        }
        assert_eq!(Manner::from_byte(0xff), Manner { class: Class::Background, packed: true });
    }
}
