//! The ways in which bytes go bad.

use std::ops::Range;

/// What happens to some bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    FlippedBit,
    ZeroedPage,
    /// Up to 1 MiB, and sometimes the same as what was there.
    Noise,
    Truncated,
    Extended,
    /// Two units, chunk groups or pairs, in each other's place.
    Swapped,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::FlippedBit, Self::ZeroedPage, Self::Noise, Self::Truncated, Self::Extended, Self::Swapped];

    pub(crate) fn any(rng: &mut fastrand::Rng) -> Self {
        rng.choice(Self::ALL).expect("there are some")
    }

    /// What `bytes` become. They may stay what they are: zeros are zeroed, equals are swapped.
    pub(crate) fn of(self, bytes: &[u8], unit: u64, rng: &mut fastrand::Rng) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        match self {
            Self::Extended => {
                let mut more = vec![0; rng.usize(1..2 * unit as usize)];
                if rng.bool() {
                    rng.fill(&mut more);
                }
                bytes.append(&mut more);
            }
            _ if bytes.is_empty() => {}
            Self::FlippedBit => {
                let at = rng.usize(..bytes.len());
                bytes[at] ^= 1 << rng.u8(..8);
            }
            Self::ZeroedPage => {
                let page = part(&bytes, PAGE_BYTES, rng.usize(..bytes.len()) / PAGE_BYTES * PAGE_BYTES);
                bytes[page].fill(0);
            }
            Self::Noise => {
                let at = part(&bytes, NOISE_BYTES, rng.usize(..bytes.len()));
                if rng.u8(..8) > 0 {
                    rng.fill(&mut bytes[at]);
                }
            }
            Self::Truncated => bytes.truncate(rng.usize(..bytes.len())),
            Self::Swapped => swap(&mut bytes, unit as usize, rng),
        }
        bytes
    }
}

fn swap(bytes: &mut [u8], unit: usize, rng: &mut fastrand::Rng) {
    let whole = bytes.len() / unit;
    if whole < 2 {
        return;
    }
    let first = rng.usize(..whole - 1);
    let second = rng.usize(first + 1..whole);
    let (left, right) = bytes.split_at_mut(second * unit);
    left[first * unit..][..unit].swap_with_slice(&mut right[..unit]);
}

/// `len` bytes from `start` on, cut off at the end.
fn part(bytes: &[u8], len: usize, start: usize) -> Range<usize> {
    start..bytes.len().min(start + len)
}

const PAGE_BYTES: usize = 4096;
const NOISE_BYTES: usize = 1 << 20;
