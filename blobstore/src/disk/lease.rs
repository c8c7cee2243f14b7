//! Whether some program has a file open for writing.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

/// Returns whether a program, this one included, has `file` open for writing or maps it so; `None` if the file system or
/// our permissions do not let us know. `file` must be open for reading only.
///
/// The kernel grants a read lease only on a file without writers (fcntl(2), "Leases"). It is given back at once.
pub fn is_open_for_writing(file: &File) -> Option<bool> {
    let fd = file.as_raw_fd();
    // A writer that comes while the lease is held makes the kernel send a signal: one that is ignored unless somebody asks
    // for it, for the usual SIGIO ends a program.
    fcntl(fd, F_SETSIG, libc::SIGURG).ok()?;
    match fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK).ok().map(|()| false),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Some(true),
        Err(_) => None,
    }
}

/// linux/fcntl.h; not in libc.
const F_SETSIG: libc::c_int = 10;

#[allow(unsafe_code, reason = "no safe wrapper of fcntl has leases")]
fn fcntl(fd: RawFd, command: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: `fd` is open, for the caller holds the `File`; these commands take an int and touch no memory of ours.
    let result = unsafe { libc::fcntl(fd, command, argument) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn who_writes_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"some bytes").unwrap();
        let file = File::open(&path).unwrap();
        let Some(is_open) = is_open_for_writing(&file) else {
            eprintln!("not tested: this file system has no leases");
            return;
        };
        assert!(!is_open);
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        assert_eq!(is_open_for_writing(&file), Some(true));
        drop(writer);
        assert_eq!(is_open_for_writing(&file), Some(false));
        let _reader = File::open(&path).unwrap();
        assert_eq!(is_open_for_writing(&file), Some(false));
    }
}
