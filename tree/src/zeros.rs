//! Zeros: whole blocks of them need not be written to a new file, where a hole reads the same.

use std::ops::Range;

/// Returns whether all of `bytes` are zeros. Takes the time of a few bytes where one of the first is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (parts, rest) = bytes.as_chunks::<64>();
    let or = |part: &[u8]| part.iter().fold(0, |or, byte| or | byte);
    parts.iter().all(|part| or(part) == 0) && or(rest) == 0
}

/// Returns the spans of `bytes`, which stand at `offset` in a file, that are not whole [blocks](BLOCK_BYTES) of zeros:
/// indices into `bytes`, half-open, ascending, and not touching. Blocks are aligned in the file.
pub fn data_spans(bytes: &[u8], offset: u64) -> impl Iterator<Item = Range<usize>> {
    let block_end = move |start: usize| {
        let into = (offset.wrapping_add(start as u64) % BLOCK_BYTES) as usize;
        bytes.len().min(start + BLOCK_BYTES as usize - into)
    };
    let is_hole = move |block: Range<usize>| block.len() as u64 == BLOCK_BYTES && is_zero(&bytes[block]);
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() && is_hole(at..block_end(at)) {
            at = block_end(at);
        }
        let start = at;
        while at < bytes.len() && !is_hole(at..block_end(at)) {
            at = block_end(at);
        }
        (start < at).then_some(start..at)
    })
}

/// The block of most file systems: holes are multiples of it.
pub const BLOCK_BYTES: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = BLOCK_BYTES as usize;

    #[test]
    fn one_byte_that_is_not_zero_is_found_wherever_it_is() {
        for len in [0, 1, 63, 64, 65, 200] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "one span is what is expected")]
    fn only_whole_blocks_of_the_file_are_left_out() {
        let check = |offset, len: usize, data: &[usize], expected: &[Range<usize>]| {
            let mut bytes = vec![0; len];
            data.iter().for_each(|&at| bytes[at] = 1);
            assert_eq!(data_spans(&bytes, offset).collect::<Vec<_>>(), expected, "{len} at {offset}");
        };
        check(0, 0, &[], &[]);
        check(0, BLOCK, &[], &[]);
        check(8192, 3 * BLOCK, &[], &[]);
        check(0, BLOCK, &[BLOCK - 1], &[0..BLOCK]);
        check(0, 4 * BLOCK, &[0, 2 * BLOCK], &[0..BLOCK, 2 * BLOCK..3 * BLOCK]);
        check(0, 4 * BLOCK, &[BLOCK, 2 * BLOCK], &[BLOCK..3 * BLOCK]);
        // The end of a file, and pieces that begin or end inside a block.
        check(0, BLOCK + 1, &[], &[BLOCK..BLOCK + 1]);
        check(1, BLOCK, &[], &[0..BLOCK]);
        check(1, 3 * BLOCK, &[], &[0..BLOCK - 1, 3 * BLOCK - 1..3 * BLOCK]);
    }
}
