use std::io;

use crate::{
    geometry::{GROUP_BYTES, Geometry},
    range::{ByteRange, RangeSet},
    read_at::ReadAt,
};

/// Bytes of a source that may be some of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Where they would be in the blob, in bytes.
    pub at: u64,
    /// How many they are.
    pub len: u64,
    /// In which source they are.
    pub source: usize,
    /// Where they are there.
    pub from: u64,
}

/// What a blob may be, put together from bytes of others. Reads zeros where nothing is known, or can be read.
///
/// Nothing of it is proven: it is for comparing, and for a [`Prover`](crate::Prover), of what it has.
#[derive(Debug)]
pub struct Patchwork<R> {
    geometry: Geometry,
    spans: Vec<Span>,
    sources: Vec<R>,
}

impl<R: ReadAt> Patchwork<R> {
    /// A blob of `size` bytes from `spans`, which are ascending and disjoint. What lies beyond the size, or in none of
    /// `sources`, is left out.
    pub fn new(size: u64, spans: impl IntoIterator<Item = Span>, sources: Vec<R>) -> Self {
        let mut end = 0;
        let mut all = Vec::new();
        for mut span in spans {
            span.len = span.len.min(size.saturating_sub(span.at));
            if span.len > 0
                && span.at >= end
                && span.source < sources.len()
                && span.from.checked_add(span.len).is_some()
            {
                end = span.at + span.len;
                all.push(span);
            }
        }
        Self { geometry: Geometry::new(size), spans: all, sources }
    }

    /// The chunk groups of which it has every byte.
    pub fn whole_groups(&self) -> RangeSet {
        let size = self.geometry.size();
        let mut covered = RangeSet::new();
        covered.extend(self.spans.iter().filter_map(|span| ByteRange::new(span.at, span.at + span.len)));
        let round_in = |range: ByteRange| {
            let end = if range.end == size { size } else { range.end / GROUP_BYTES * GROUP_BYTES };
            ByteRange::new(range.start.checked_next_multiple_of(GROUP_BYTES)?, end)
        };
        covered.iter().filter_map(round_in).collect()
    }
}

/// Only those parts of `spans` that are in `ranges`.
pub fn clip_spans(spans: &[Span], ranges: &RangeSet) -> Vec<Span> {
    let mut clipped = Vec::new();
    for span in spans {
        let Some(whole) = span.at.checked_add(span.len).and_then(|end| ByteRange::new(span.at, end)) else { continue };
        let mut from = span.at;
        while let Some(range) = ranges.first_ending_after(from).filter(|range| range.start < whole.end) {
            let part = range.intersection(whole);
            clipped.push(Span { at: part.start, len: part.len(), from: span.from + (part.start - span.at), ..*span });
            from = part.end;
            if from == whole.end {
                break;
            }
        }
    }
    clipped
}

impl<R: ReadAt> ReadAt for Patchwork<R> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= self.geometry.size());
        let wanted = end.and_then(|end| ByteRange::new(offset, end)).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.fill(0);
        let first = self.spans.partition_point(|span| span.at + span.len <= wanted.start);
        for span in self.spans[first..].iter().take_while(|span| span.at < wanted.end) {
            let part = ByteRange { start: span.at, end: span.at + span.len }.intersection(wanted);
            let into = &mut buf[(part.start - offset) as usize..(part.end - offset) as usize];
            if self.sources[span.source].read_exact_at(into, span.from + (part.start - span.at)).is_err() {
                into.fill(0);
            }
        }
        Ok(())
    }
}
