//! What mending leaves as it was: everything of a file but the bytes of its damaged chunk groups.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::Path,
    time::{Duration, SystemTime},
};

use blobstore::{Consent, StoreError, Verdict};
use rustix::{
    fs::{FallocateFlags, SeekFrom, XattrFlags, fallocate, getxattr, seek, setxattr},
    io::Errno,
    process::geteuid,
};
use tree::RangeSet;

use crate::{
    common::{GROUP, NOW, feed, groups, random, range},
    home::Home,
};

const SIZE: usize = 20 * GROUP as usize + 3;
const ATTRIBUTE: &str = "user.note";

/// A file of which only these groups are no holes.
const WRITTEN: [u64; 3] = [0, 10, 20];

/// Makes it, with a mode, an mtime and, where the file system takes one, an attribute of its own.
fn make_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create_new(path).unwrap();
    file.set_len(SIZE as u64).unwrap();
    for part in groups(SIZE, WRITTEN).iter() {
        file.write_all_at(&bytes[part.start() as usize..part.end() as usize], part.start()).unwrap();
    }
    match setxattr(path, ATTRIBUTE, b"kept", XattrFlags::empty()) {
        Ok(()) | Err(Errno::NOTSUP) => {}
        Err(error) => panic!("{error}"),
    }
    file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
    set_old_mtime(&file);
}

fn set_old_mtime(file: &File) {
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789)).unwrap();
}

fn bytes_of_sparse() -> Vec<u8> {
    let mut bytes = random(20, SIZE);
    for hole in groups(SIZE, (0..21).filter(|group| !WRITTEN.contains(group))).iter() {
        bytes[hole.start() as usize..hole.end() as usize].fill(0);
    }
    bytes
}

/// What of a file is no hole.
fn extents(path: &Path) -> RangeSet {
    let file = File::open(path).unwrap();
    let mut found = RangeSet::new();
    let mut at = 0;
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(start)).unwrap();
        found.insert(range(start, at));
    }
    found
}

/// Everything that is said of a file but its ctime, and its attribute.
fn said_of(path: &Path) -> ([u64; 5], (i64, i64), Option<Vec<u8>>) {
    let meta = fs::metadata(path).unwrap();
    let mut value = [0; 16];
    let attribute = getxattr(path, ATTRIBUTE, &mut value[..]).ok().map(|len| value[..len].to_owned());
    let numbers = [meta.ino(), meta.nlink(), meta.mode().into(), meta.uid().into(), meta.gid().into()];
    (numbers, (meta.mtime(), meta.mtime_nsec()), attribute)
}

/// A file full of holes, with two names: a group of it became a hole, and another one stopped being one.
#[test]
fn links_mode_attributes_holes_and_mtime_are_kept() {
    let home = Home::new();
    let (one, two, bytes) = (home.path("one"), home.path("two"), bytes_of_sparse());
    make_sparse(&one, &bytes);
    fs::hard_link(&one, &two).unwrap();
    home.link(&["one", "two"]);
    let (before, extents_before) = (said_of(&one), extents(&one));

    home.rot_with("one", |file| {
        let lost = groups(SIZE, [10]).iter().next().unwrap();
        fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, lost.start(), lost.len()).unwrap();
        file.write_all_at(b"junk", 5 * GROUP).unwrap();
    });

    let damaged = groups(SIZE, [5, 10]);
    for name in ["one", "two"] {
        assert!(matches!(home.verify(name), Verdict::Damaged { data, .. } if data == damaged), "{name}");
    }
    let mut mending = home.store.mend(&home.file("one"), Consent::Damage, NOW).unwrap();
    feed(&mut mending, &bytes, &damaged);
    assert_eq!(mending.finish().unwrap().1, damaged);
    assert_eq!(home.row("two"), home.row("one"), "mended by the other name");
    assert!(fs::read(&two).unwrap() == bytes);
    assert_eq!((said_of(&one), said_of(&two)), (before.clone(), before));
    assert_eq!(extents(&one), extents_before.union(&groups(SIZE, [5])), "only what was written is no hole any more");
    for name in ["one", "two"] {
        assert!(matches!(home.verify(name), Verdict::Sound));
    }
}

/// Nobody's permissions are changed to get at a file: what must not be written is not, unless we are root.
#[test]
fn a_read_only_file_stays_read_only() {
    let home = Home::new();
    let (bytes, damaged) = (random(21, SIZE), groups(SIZE, [3]));
    home.write("file", &bytes);
    fs::set_permissions(home.path("file"), fs::Permissions::from_mode(0o444)).unwrap();
    home.link(&["file"]);
    home.rot("file", &damaged);
    home.verify("file");
    let before = said_of(&home.path("file"));
    match home.store.mend(&home.file("file"), Consent::Damage, NOW) {
        Ok(mut mending) => {
            assert!(geteuid().is_root());
            feed(&mut mending, &bytes, &damaged);
            mending.finish().unwrap();
            assert!(matches!(home.verify("file"), Verdict::Sound));
        }
        Err(error) => {
            assert!(!geteuid().is_root());
            assert!(matches!(&error, StoreError::File { action: "open for writing", .. }), "{error}");
            assert_eq!(home.damaged("file"), damaged);
        }
    }
    assert_eq!(said_of(&home.path("file")), before);
}
