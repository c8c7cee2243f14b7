//! Rot as the other tests have it: the bytes change, and nothing of the file moves.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    thread,
};

use fastrand::Rng;
use tests::{Disk, Scratch, random_bytes};

/// That no time moves is checked by the disk itself.
#[test]
fn bytes_change_beneath_the_file_system() {
    let Some(disk) = Disk::new() else { return };
    let (path, mut bytes) = (disk.mount_point().join("file"), random_bytes(300_001, &mut Rng::with_seed(1)));
    // With a hole in the middle, and so of several extents.
    let file = File::create(&path).unwrap();
    file.write_all_at(&bytes[..100_000], 0).unwrap();
    file.write_all_at(&bytes[100_000..], 1_000_000).unwrap();
    for (offset, at) in [(0, 0), (99_999, 99_999), (1_000_000, 100_000), (1_200_000, 300_000)] {
        disk.flip(&path, offset, 0x41);
        bytes[at] ^= 0x41;
    }
    disk.write_beneath(&path, 4090, &[7; 20]);
    bytes[4090..4110].fill(7);
    let now = fs::read(&path).unwrap();
    assert!(now[..100_000] == bytes[..100_000] && now[1_000_000..] == bytes[100_000..]);
    // The new bytes stay when others in their page are written, and are written over like any.
    file.write_all_at(&[1], 0).unwrap();
    file.sync_all().unwrap();
    disk.flip(&path, 1, 0x80);
    file.write_all_at(&[2], 4090).unwrap();
    let expected = [&[1, bytes[1] ^ 0x80][..], &bytes[2..4090], &[2], &[7; 19]].concat();
    assert!(fs::read(&path).unwrap()[..4110] == expected);
}

/// Readers keep pages of the file in memory, and each sees a flipped bit once it has flipped.
#[test]
fn whoever_reads_meanwhile_reads_the_new_bytes() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let path = scratch.path("file");
    fs::write(&path, random_bytes(2_000_000, &mut Rng::with_seed(1))).unwrap();
    let bit = |path: &Path| fs::read(path).unwrap()[1_000_000] & 1;
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..1000).for_each(|_| _ = bit(&path)));
        }
        let mut expected = bit(&path);
        for _ in 0..50 {
            scratch.rot(&path, &[1_000_000]);
            expected ^= 1;
            assert_eq!(bit(&path), expected);
        }
    });
}

#[test]
fn a_test_that_panics_leaves_no_mount() {
    let Some(disk) = Disk::new() else { return };
    let mount = disk.mount_point();
    let is_mounted = |mount: &Path| fs::read_to_string("/proc/self/mounts").unwrap().contains(mount.to_str().unwrap());
    assert!(is_mounted(&mount));
    let panicked = thread::spawn(move || {
        let _disk = disk;
        panic!("as a test that fails");
    });
    panicked.join().unwrap_err();
    assert!(!is_mounted(&mount) && !mount.exists());
}
