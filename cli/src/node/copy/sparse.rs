//! Writing new files with holes for whole blocks of zeros. Rules: spec/copy.md, "Holes".

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::{fs::SeekFrom, io::Errno};

/// Writes `bytes` to a new file that ends at `offset`, so that it ends behind them. Whole blocks of zeros become holes.
pub(super) fn append(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut end = 0;
    for span in tree::data_spans(bytes, offset) {
        end = span.end;
        file.write_all_at(&bytes[span.clone()], offset + span.start as u64)?;
    }
    if end < bytes.len() { file.set_len(offset + bytes.len() as u64) } else { Ok(()) }
}

/// Copies all of `from` to the new, empty file `to`: only data is read, and holes stay holes.
pub(super) fn copy(from: &File, to: &File) -> io::Result<()> {
    let size = from.metadata()?.len();
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => size,
            // A file system that cannot tell.
            Err(_) => at,
        };
        let part = &mut buffer[..COPY_BYTES.min((size - data) as usize)];
        from.read_exact_at(part, data)?;
        to.set_len(data)?;
        append(to, part, data)?;
        at = data + part.len() as u64;
    }
    Ok(())
}

const COPY_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_copied_has_the_same_bytes_and_no_more_blocks() {
        let file = || tempfile::tempfile().unwrap();
        let size = (5 << 20) + 77;
        for data in [&[][..], &[0], &[3 << 20, size - 1], &[size / 2]] {
            let (from, again, written) = (file(), file(), file());
            from.set_len(size).unwrap();
            data.iter().for_each(|&at| from.write_all_at(b"x", at).unwrap());
            copy(&from, &again).unwrap();
            let mut expected = vec![0; size as usize];
            from.read_exact_at(&mut expected, 0).unwrap();
            for (number, piece) in expected.chunks(24 << 12).enumerate() {
                append(&written, piece, number as u64 * (24 << 12)).unwrap();
            }
            for made in [again, written] {
                let meta = made.metadata().unwrap();
                assert_eq!(meta.len(), size);
                let mut bytes = vec![1; size as usize];
                made.read_exact_at(&mut bytes, 0).unwrap();
                assert!(bytes == expected, "{data:?}");
                // A block for each byte of data, one for the end, and what the file system needs for itself.
                let blocks = from.metadata().unwrap().blocks() + 16;
                assert!(meta.blocks() <= blocks, "{data:?}: {} blocks, and not {blocks}", meta.blocks());
            }
        }
    }
}
