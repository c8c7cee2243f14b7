use bytes::BytesMut;

use crate::{
    cv::{Cv, parent_cv, split, subtree_cv},
    geometry::{Geometry, Grain, PAIR_BYTES},
    id::BlobId,
    query::Query,
    range::ByteRange,
    verified::{Verified, VerifiedData, VerifiedNode},
    walk::{Step, Walk},
};

/// Why an answer was refused. Everything yielded before it is proven all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The sender sent a pair or bytes whose hash is not the one that the tree above says.
    #[error("wrong hash over bytes {range}")]
    WrongHash {
        /// The bytes that the wrong piece stands for.
        range: ByteRange,
    },
    /// The sender claims another size than the one that is known.
    #[error("a claimed size of {claimed} bytes, where it is {expected}")]
    WrongSize {
        /// What the sender says.
        claimed: u64,
        /// What is known.
        expected: u64,
    },
    /// More bytes came than the query's answer has.
    #[error("bytes behind the end of the answer")]
    TrailingBytes,
}

/// Proves the answer to a query while it arrives: push bytes in, take proven pieces out.
///
/// The answer is the size as 8 little-endian bytes and then bao encoding; see spec/tree.md, "Answer". It is
/// the form that iroh-blobs has on the wire. Calling order: [`push`](Self::push) what has come, then
/// [`next`](Self::next) until it gives `None`, and so on until [`is_finished`](Self::is_finished). An answer
/// may end early where the sender lacks something; what was yielded by then is proven. After an error the
/// decoder yields nothing more but that error.
///
/// The size is only *claimed* until the last chunk has been yielded: see [`Query::and_size`].
#[derive(Debug)]
pub struct Decoder {
    blob: BlobId,
    query: Query,
    expected_size: Option<u64>,
    buffer: BytesMut,
    state: State,
}

#[derive(Debug)]
enum State {
    Size,
    Walking { size: u64, walk: Walk, step: Option<Step>, expected: Vec<Cv> },
    Failed(DecodeError),
}

impl Decoder {
    /// Expects the answer to `query` about `blob`.
    pub fn new(blob: BlobId, query: Query) -> Self {
        Self { blob, query, expected_size: None, buffer: BytesMut::new(), state: State::Size }
    }

    /// The same, where the blob's size is known: another one is refused.
    pub fn expecting(self, size: u64) -> Self {
        Self { expected_size: Some(size), ..self }
    }

    /// Takes the next bytes of the answer. Holds them until [`next`](Self::next) uses them.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The size that the sender claims, once it has come.
    pub fn claimed_size(&self) -> Option<u64> {
        match self.state {
            State::Walking { size, .. } => Some(size),
            _ => None,
        }
    }

    /// Whether the whole answer has come and was proven.
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Walking { step: None, .. }) && self.buffer.is_empty()
    }

    /// The next proven piece; `None` if more bytes are needed for it, or if the answer is complete.
    #[allow(clippy::should_implement_trait, reason = "an end of the items now is no end for good")]
    pub fn next(&mut self) -> Result<Option<Verified>, DecodeError> {
        let outcome = self.advance();
        if let Err(error) = &outcome {
            self.state = State::Failed(error.clone());
        }
        outcome
    }

    fn advance(&mut self) -> Result<Option<Verified>, DecodeError> {
        if let State::Size = self.state {
            let Some((size, _)) = self.buffer.split_first_chunk() else {
                return Ok(None);
            };
            self.state = self.start(u64::from_le_bytes(*size))?;
            let _ = self.buffer.split_to(8);
        }
        let (walk, step, expected) = match &mut self.state {
            State::Walking { walk, step, expected, .. } => (walk, step, expected),
            State::Failed(error) => return Err(error.clone()),
            State::Size => return Ok(None),
        };
        let Some(current) = *step else {
            return if self.buffer.is_empty() { Ok(None) } else { Err(DecodeError::TrailingBytes) };
        };
        let (subtree, len) = match current {
            Step::Node { subtree, .. } => (subtree, PAIR_BYTES),
            Step::Leaf { subtree } => (subtree, subtree.bytes().len()),
        };
        if (self.buffer.len() as u64) < len {
            return Ok(None);
        }
        let range = subtree.bytes();
        let bytes = self.buffer.split_to(len as usize).freeze();
        let wanted = expected.pop().expect("a hash was kept for every subtree that is wanted");
        let verified = match current {
            Step::Node { left, right, .. } => {
                let mut pair = [0; 64];
                pair.copy_from_slice(&bytes);
                if parent_cv(&pair, subtree.is_root()) != wanted {
                    return Err(DecodeError::WrongHash { range });
                }
                let (l, r) = split(&pair);
                expected.extend(right.then_some(r));
                expected.extend(left.then_some(l));
                Verified::Node(VerifiedNode { blob: self.blob, index: subtree.pair_index(Grain::GROUP), pair })
            }
            Step::Leaf { .. } => {
                if subtree_cv(&bytes, subtree.start, subtree.is_root()) != wanted {
                    return Err(DecodeError::WrongHash { range });
                }
                Verified::Data(VerifiedData { blob: self.blob, offset: range.start, bytes })
            }
        };
        *step = walk.next();
        Ok(Some(verified))
    }

    fn start(&self, size: u64) -> Result<State, DecodeError> {
        if let Some(expected) = self.expected_size.filter(|&expected| expected != size) {
            return Err(DecodeError::WrongSize { claimed: size, expected });
        }
        let mut walk = Walk::new(Geometry::new(size), &self.query);
        let step = walk.next();
        Ok(State::Walking { size, walk, step, expected: vec![*self.blob.as_bytes()] })
    }
}
