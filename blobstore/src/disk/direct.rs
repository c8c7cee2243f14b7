//! Writing past the page cache: what is not read soon costs less so, and does not push out what is.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
};

use rustix::{fs::OFlags, io::Errno};

/// A way to a file past the page cache (open(2), `O_DIRECT`).
pub(super) enum Direct {
    Untried,
    /// The file system has none, or none for blocks of [`ALIGN`].
    Unsupported,
    /// With room for what is written at a time.
    Open(File, Vec<u8>),
}

impl Direct {
    /// Writes the first of `parts`, one behind the other, to `file` from `offset` on: whole blocks, as many as there are, or
    /// none if it cannot be done. Returns how many bytes that was. Takes as much memory as the parts, and keeps it.
    pub(super) fn write_blocks_at(&mut self, file: &File, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        if matches!(self, Self::Untried) {
            *self = Self::open(file).unwrap_or(Self::Unsupported);
        }
        let Self::Open(file, room) = self else { return Ok(0) };
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let whole = bytes / ALIGN * ALIGN;
        if whole == 0 || !offset.is_multiple_of(ALIGN as u64) {
            return Ok(0);
        }
        room.resize(room.len().max(bytes + ALIGN), 0);
        let first = room.as_ptr().align_offset(ALIGN);
        let mut filled = first;
        for part in parts {
            room[filled..][..part.len()].copy_from_slice(part);
            filled += part.len();
        }
        match file.write_all_at(&room[first..][..whole], offset) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                *self = Self::Unsupported;
                Ok(0)
            }
            outcome => outcome.map(|()| whole),
        }
    }

    fn open(file: &File) -> io::Result<Self> {
        // Not by its name: that may be another file's by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = OpenOptions::new().write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path)?;
        Ok(Self::Open(file, Vec::new()))
    }
}

/// Memory, offsets and lengths are multiples of so many bytes. Few disks have longer sectors.
const ALIGN: usize = 4096;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn whole_blocks_go_past_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, [9; 3 * ALIGN]).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let mut direct = Direct::Untried;
        let parts: Vec<Vec<u8>> =
            [5000, 0, 1, 2999, 1000].iter().zip(1..).map(|(&len, byte)| vec![byte; len]).collect();
        let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let written = direct.write_blocks_at(&file, &slices, ALIGN as u64).unwrap();
        if matches!(direct, Direct::Unsupported) {
            return assert_eq!(written, 0);
        }
        assert_eq!(written, 2 * ALIGN);
        let expected = [&[9; ALIGN][..], &parts.concat()[..written]].concat();
        assert!(fs::read(&path).unwrap() == expected);
        // What does not begin or end with a block is left to others.
        assert_eq!(direct.write_blocks_at(&file, &slices, 1).unwrap(), 0);
        assert_eq!(direct.write_blocks_at(&file, &slices[1..4], 0).unwrap(), 0);
        assert_eq!(direct.write_blocks_at(&file, &[], 0).unwrap(), 0);
        assert!(fs::read(&path).unwrap() == expected);
    }

    #[test]
    fn where_there_is_no_way_past_it_nothing_is_written() {
        let (mut direct, bytes) = (Direct::Untried, [1; ALIGN]);
        let file = File::options().write(true).open("/proc/self/comm").unwrap();
        assert_eq!(direct.write_blocks_at(&file, &[IoSlice::new(&bytes)], 0).unwrap(), 0);
        assert!(matches!(direct, Direct::Unsupported));
    }
}
