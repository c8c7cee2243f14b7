//! What the fuzz targets share: blobs made from their input, and what befalls bytes.

use arbitrary::{Arbitrary, Unstructured};
use tree::{BlobId, ByteRange, Hashed, Query, RangeSet, Verified};

/// A blob, and all that is true of it.
#[derive(Debug)]
pub struct Blob {
    /// Its bytes.
    pub data: Vec<u8>,
    /// Its id and outboard.
    pub hashed: Hashed,
}

impl<'a> Arbitrary<'a> for Blob {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        // Now and then more than one task of `find_damage` takes at once, which is 64 groups.
        let groups = if u.ratio(1, 32)? { u.int_in_range(60..=80)? } else { u.int_in_range(0..=12)? };
        let around = u.int_in_range(0..=2 * NEAR)?;
        let size = if u.arbitrary()? { groups * GROUP + around } else { groups * GROUP + around * CHUNK };
        let mut data = vec![0; size.saturating_sub(NEAR)];
        fastrand::Rng::with_seed(u.arbitrary::<u8>()?.into()).fill(&mut data);
        let hashed = tree::hash(&data[..], data.len() as u64).expect("memory can be read");
        Ok(Self { data, hashed })
    }
}

impl Blob {
    /// Its id.
    pub fn id(&self) -> BlobId {
        self.hashed.id
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// Makes sure that a piece which counts as proven is true. Pairs are only as true as the size that was claimed.
    pub fn check(&self, piece: &Verified, claimed: u64) {
        match piece {
            Verified::Data(piece) => {
                assert_eq!(piece.blob(), self.id());
                assert!(piece.bytes()[..] == *self.at(piece.range()), "wrong bytes at {}", piece.range());
            }
            Verified::Node(node) if claimed == self.size() => {
                if let Some(offset) = node.outboard_offset() {
                    assert_eq!(node.pair()[..], self.hashed.outboard[offset as usize..][..64], "at {offset}");
                }
            }
            Verified::Node(_) => {}
        }
    }

    /// The bytes of each chunk group.
    pub fn groups(&self) -> impl Iterator<Item = ByteRange> {
        let (size, group) = (self.size(), GROUP as u64);
        (0..size.div_ceil(group)).filter_map(move |i| ByteRange::new(i * group, size.min((i + 1) * group)))
    }

    /// The chunk groups whose bytes in `stored` are not what they should be.
    pub fn damaged(&self, stored: &[u8]) -> RangeSet {
        let is_sound = |&at: &ByteRange| stored.get(at.start() as usize..at.end() as usize) == Some(self.at(at));
        self.groups().filter(|at| !is_sound(at)).collect()
    }

    fn at(&self, range: ByteRange) -> &[u8] {
        &self.data[range.start() as usize..range.end() as usize]
    }
}

/// Ranges of chunks near those that a blob has, and some far from them.
#[derive(Debug, Arbitrary)]
pub struct Ranges(Vec<(u16, u16)>, Option<(u64, u64)>);

impl Ranges {
    /// The query for them.
    pub fn query(&self) -> Query {
        let near = self.0.iter().map(|&(start, len)| (start % CHUNKS, start % CHUNKS + len % CHUNKS));
        Query::chunks(near.map(|(start, end)| (start.into(), end.into())).chain(self.1))
    }
}

/// What befalls bytes on a disk or a wire. Places count from the start, and wrap.
#[derive(Debug, Arbitrary)]
pub enum Harm {
    Flip { at: u32, bits: u8 },
    Cut { at: u32 },
    Remove { at: u32, len: u16 },
    Insert { at: u32, bytes: Vec<u8> },
    Copy { from: u32, to: u32, len: u16 },
}

impl Harm {
    /// Does it.
    pub fn befall(&self, bytes: &mut Vec<u8>) {
        let len = bytes.len();
        let place = |at: u32| at as usize % (len + 1);
        match self {
            Harm::Flip { at, bits } => bytes.iter_mut().skip(place(*at)).take(1).for_each(|byte| *byte ^= bits),
            Harm::Cut { at } => bytes.truncate(place(*at)),
            Harm::Remove { at, len: n } => drop(bytes.drain(place(*at)..len.min(place(*at) + usize::from(*n)))),
            Harm::Insert { at, bytes: new } => drop(bytes.splice(place(*at)..place(*at), new.iter().copied())),
            Harm::Copy { from, to, len: n } => {
                let (from, to) = (place(*from), place(*to));
                let n = usize::from(*n).min(len - from.max(to));
                bytes.copy_within(from..from + n, to);
            }
        }
    }
}

const CHUNK: usize = tree::CHUNK_BYTES as usize;
const GROUP: usize = tree::GROUP_BYTES as usize;
/// A size is at most so many bytes or chunks away from a whole number of groups.
const NEAR: usize = 8;
/// More than the largest blob has.
const CHUNKS: u16 = 90 * (GROUP / CHUNK) as u16;
