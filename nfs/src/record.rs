//! Records on a byte stream (RFC 5531, section 11), with bounds.

use std::{io, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::{Instant, timeout_at},
};

/// Takes records off a stream.
pub(crate) struct Records<R> {
    stream: R,
    /// What came and was not yet taken.
    buffer: BytesMut,
    /// The fragments of the record that is coming, but for the last.
    whole: BytesMut,
    fragments: u32,
    /// When a record that has begun must be there, or the first one.
    until: Option<Instant>,
}

/// Why no more records are taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("a record of more than {RECORD_BYTES_MAX} bytes")]
    TooLong,
    #[error("a record of more than {FRAGMENTS_MAX} fragments")]
    TooManyFragments,
    #[error("a record did not come to its end in time")]
    TooSlow,
}

impl<R: AsyncRead + Unpin> Records<R> {
    pub(crate) fn new(stream: R) -> Self {
        let until = Some(Instant::now() + RECORD_LIMIT);
        Self { stream, buffer: BytesMut::new(), whole: BytesMut::new(), fragments: 0, until }
    }

    /// The next record, `None` if the stream ends between two. Nothing is lost if it is dropped before it is ready.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, RecordError> {
        loop {
            if let Some(record) = self.take()? {
                return Ok(Some(record));
            }
            let has_begun = !self.buffer.is_empty() || self.fragments > 0;
            if has_begun && self.until.is_none() {
                self.until = Some(Instant::now() + RECORD_LIMIT);
            }
            self.buffer.reserve(READ_BYTES);
            let read = self.stream.read_buf(&mut self.buffer);
            let read = match self.until {
                Some(until) => timeout_at(until, read).await.map_err(|_| RecordError::TooSlow)??,
                None => read.await?,
            };
            if read == 0 {
                return if has_begun { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) } else { Ok(None) };
            }
        }
    }

    /// The next record, if all of it has been read from the stream by now.
    pub(crate) fn take(&mut self) -> Result<Option<Bytes>, RecordError> {
        while let Some(header) = self.buffer.first_chunk() {
            let header = u32::from_be_bytes(*header);
            let len = (header & !LAST) as usize;
            if self.whole.len() + len > RECORD_BYTES_MAX {
                return Err(RecordError::TooLong);
            }
            if self.buffer.len() < 4 + len {
                return Ok(None);
            }
            self.buffer.advance(4);
            let fragment = self.buffer.split_to(len);
            self.fragments += 1;
            if header & LAST == 0 {
                if self.fragments == FRAGMENTS_MAX {
                    return Err(RecordError::TooManyFragments);
                }
                self.whole.extend_from_slice(&fragment);
                continue;
            }
            let is_only = self.fragments == 1;
            (self.fragments, self.until) = (0, None);
            let mut whole = std::mem::take(&mut self.whole);
            if is_only {
                return Ok(Some(fragment.freeze()));
            }
            whole.extend_from_slice(&fragment);
            return Ok(Some(whole.freeze()));
        }
        Ok(None)
    }
}

/// What stands before a record of `len` bytes in one fragment.
pub(crate) fn mark(len: usize) -> [u8; 4] {
    (u32::try_from(len).unwrap_or(u32::MAX) | LAST).to_be_bytes()
}

const LAST: u32 = 1 << 31;
/// All fragments of a record together.
const RECORD_BYTES_MAX: usize = 132 << 10;
const FRAGMENTS_MAX: u32 = 64;
/// From a record's first byte to its last.
const RECORD_LIMIT: Duration = Duration::from_secs(30);
const READ_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(bytes: &[u8], is_last: bool) -> Vec<u8> {
        let header = bytes.len() as u32 | if is_last { LAST } else { 0 };
        [&header.to_be_bytes()[..], bytes].concat()
    }

    async fn all(stream: &[u8]) -> (Vec<Bytes>, Result<(), String>) {
        let (mut records, mut found) = (Records::new(stream), Vec::new());
        loop {
            match records.next().await {
                Ok(Some(record)) => found.push(record),
                Ok(None) => return (found, Ok(())),
                Err(error) => return (found, Err(error.to_string())),
            }
        }
    }

    #[tokio::test]
    async fn records_come_whole_and_in_fragments() {
        let stream = [
            fragment(b"one", true),
            fragment(b"", true),
            fragment(b"in ", false),
            fragment(b"", false),
            fragment(b"three", true),
            fragment(b"last", true),
        ];
        let (records, outcome) = all(&stream.concat()).await;
        assert_eq!(records, ["one", "", "in three", "last"]);
        assert_eq!(outcome, Ok(()));
        // Cut anywhere but between two.
        let stream = [fragment(b"one", true), fragment(b"tw", false), fragment(b"o", true)].concat();
        for len in 0..stream.len() {
            let (records, outcome) = all(&stream[..len]).await;
            assert_eq!((records.len(), outcome.is_ok()), (usize::from(len >= 7), len == 0 || len == 7), "{len} bytes");
        }
    }

    #[tokio::test]
    async fn what_is_too_long_is_refused_before_it_comes() {
        for header in [u32::MAX, LAST - 1, RECORD_BYTES_MAX as u32 + 1] {
            assert!(all(&header.to_be_bytes()).await.1.unwrap_err().contains("bytes"), "{header}");
        }
        let half = fragment(&vec![0; RECORD_BYTES_MAX / 2 + 1], false);
        assert!(all(&[half.clone(), half].concat()).await.1.unwrap_err().contains("bytes"));
        let whole = fragment(&vec![0; RECORD_BYTES_MAX], true);
        assert_eq!(all(&whole).await.0[0].len(), RECORD_BYTES_MAX);
        let empty = fragment(b"", false).repeat(FRAGMENTS_MAX as usize);
        assert!(all(&empty).await.1.unwrap_err().contains("fragments"));
    }

    #[tokio::test(start_paused = true)]
    async fn who_begins_and_does_not_go_on_is_not_waited_for() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut records = Records::new(server);
        tokio::io::AsyncWriteExt::write_all(&mut client, &fragment(b"one", true)).await.unwrap();
        assert_eq!(records.next().await.unwrap().unwrap(), "one");
        // Between two records there is time.
        assert!(tokio::time::timeout(Duration::from_secs(3600), records.next()).await.is_err());
        tokio::io::AsyncWriteExt::write_all(&mut client, &[0x80]).await.unwrap();
        let began = Instant::now();
        assert!(matches!(records.next().await, Err(RecordError::TooSlow)));
        assert_eq!(began.elapsed(), RECORD_LIMIT);
        // Nor is one who sends nothing at all.
        let (_client, server) = tokio::io::duplex(64);
        assert!(matches!(Records::new(server).next().await, Err(RecordError::TooSlow)));
    }
}
