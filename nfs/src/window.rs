//! Who reads a blob in order, and how far ahead of each of them it is to be fetched. Rules: spec/nfs.md, "Reading".

use tree::ByteRange;

/// The readers of one blob.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    /// The one that moved last is the last.
    readers: Vec<Window>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Window {
    /// The end of what was read.
    end: u64,
    /// The end of what was asked for ahead; never before `end`.
    ahead: u64,
    /// How far ahead to go; 0 until it is known that this reads in order.
    bytes: u64,
    /// Whether it has met what was not here.
    is_fetching: bool,
}

impl Windows {
    /// Takes note that `range`, which is not empty, is read. Returns what is to be fetched ahead: nothing until that reader
    /// has [missed](Self::miss) something. At most `limit` bytes behind `range`; it may go beyond the blob's end.
    pub(crate) fn note(&mut self, range: ByteRange, limit: u64) -> Option<ByteRange> {
        let mut window = match self.readers.iter().rposition(|window| window.goes_on_with(range)) {
            Some(at) => {
                let mut window = self.readers.remove(at);
                if window.bytes == 0 {
                    window.bytes = (2 * range.len()).min(limit);
                }
                window
            }
            None => Window {
                end: range.end(),
                ahead: range.end(),
                // Who begins at the beginning mostly goes on.
                bytes: if range.start() == 0 { (2 * range.len()).min(limit) } else { 0 },
                is_fetching: false,
            },
        };
        window.end = window.end.max(range.end());
        window.ahead = window.ahead.max(window.end);
        let wanted = (window.is_fetching && window.ahead - window.end <= window.bytes - window.bytes / 4)
            .then(|| window.extend(limit))
            .flatten();
        if self.readers.len() == READERS_MAX {
            self.readers.remove(0);
        }
        self.readers.push(window);
        wanted
    }

    /// Takes note that some of `range`, which was [noted](Self::note), was not here. Returns what is to be fetched ahead.
    pub(crate) fn miss(&mut self, range: ByteRange, limit: u64) -> Option<ByteRange> {
        let window =
            self.readers.iter_mut().rev().find(|window| window.end >= range.end() && window.goes_on_with(range))?;
        if std::mem::replace(&mut window.is_fetching, true) {
            return None;
        }
        window.extend(limit)
    }
}

impl Window {
    /// Whether who reads `range` is this reader: clients send a few requests at once, and these overtake each other.
    fn goes_on_with(&self, range: ByteRange) -> bool {
        range.start() <= self.end.saturating_add(GAP) && range.end().saturating_add(BACK) >= self.end
    }

    /// Goes as far ahead as the window is, and doubles that for the next time.
    fn extend(&mut self, limit: u64) -> Option<ByteRange> {
        let (from, to) = (self.ahead, self.end.saturating_add(self.bytes));
        self.bytes = (2 * self.bytes).min(limit);
        self.ahead = self.ahead.max(to);
        ByteRange::new(from, to).filter(|range| !range.is_empty())
    }
}

/// A request that begins so far behind the end of the one before still goes on with it,
const GAP: u64 = 1 << 20;
/// and so does one that ends so far before it.
const BACK: u64 = 2 << 20;
/// So many readers of one blob are told apart.
const READERS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;
    const LIMIT: u64 = 8 << 20;

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::new(start, start + len).unwrap()
    }

    /// Reads in order: everything is asked for exactly once, the window doubles to its limit, and there are always three
    /// quarters of it ahead.
    #[test]
    fn who_reads_in_order_is_read_ahead_of() {
        let (mut windows, step) = (Windows::default(), 128 * KIB);
        assert_eq!(windows.note(range(0, step), LIMIT), None);
        let first = windows.miss(range(0, step), LIMIT).unwrap();
        assert_eq!(first, range(step, 2 * step));
        let (mut asked, mut largest) = (first.end(), first.len());
        for at in 1..400 {
            let read = range(at * step, step);
            if let Some(ahead) = windows.note(read, LIMIT) {
                assert_eq!(ahead.start(), asked.max(read.end()), "nothing twice, and no gap");
                (asked, largest) = (ahead.end(), largest.max(ahead.len()));
            }
            assert!(asked >= read.end(), "it waits for nothing");
            assert!(asked - read.end() <= LIMIT);
            assert!(at < 64 || asked - read.end() > LIMIT - LIMIT / 4 - step);
        }
        assert_eq!((largest / KIB, asked > 400 * step), (4096 + 128, true));
        // What is here is not read ahead of.
        let mut windows = Windows::default();
        assert!((0..100).all(|at| windows.note(range(at * step, step), LIMIT).is_none()));
    }

    #[test]
    fn who_jumps_is_not_read_ahead_of() {
        let mut windows = Windows::default();
        for at in [50, 3, 90, 7, 20, 70, 30, 10] {
            let read = range(at * 100 * LIMIT, 4 * KIB);
            assert_eq!((windows.note(read, LIMIT), windows.miss(read, LIMIT)), (None, None));
        }
    }

    /// Several readers, and requests that overtake each other, as the Linux client sends them.
    #[test]
    fn readers_are_told_apart_and_may_be_out_of_order() {
        let (mut windows, step) = (Windows::default(), 128 * KIB);
        let starts = [0, 1 << 30, 2 << 30];
        let mut asked = [0; 3];
        for batch in 0..30 {
            for (reader, start) in starts.iter().enumerate() {
                for at in [1, 0, 3, 2] {
                    let read = range(start + (4 * batch + at) * step, step);
                    for ahead in [windows.note(read, LIMIT), windows.miss(read, LIMIT)].into_iter().flatten() {
                        asked[reader] += ahead.len();
                    }
                }
            }
        }
        assert_eq!(windows.readers.len(), 3);
        for asked in asked {
            assert!((100 * step..=120 * step + LIMIT).contains(&asked), "{asked}");
        }
    }

    #[test]
    fn nothing_overflows_and_readers_are_bounded() {
        let mut windows = Windows::default();
        for start in [u64::MAX - 10, u64::MAX - 2] {
            let read = range(start, 2);
            windows.note(read, u64::MAX);
            windows.miss(read, u64::MAX);
        }
        (0..1000).for_each(|at| assert_eq!(windows.note(range(at << 40, 1), LIMIT), None));
        assert_eq!(windows.readers.len(), READERS_MAX);
    }
}
