//! Mending: the one time that the store writes to users' files. Only proven groups go in, only where the damage
//! is; the file stays in every other respect what it was; and whoever edits it meanwhile keeps the edit.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    time::{Duration, SystemTime},
};

use blobstore::{Consent, Mending, Sink, StoreError, Verdict};
use tree::{BlobId, Drift, RangeSet, Verified};

use crate::{
    common::{GROUP, LARGE, NOW, all, check_read, feed, groups, pieces, random, range},
    home::{Home, assert_damaged, let_the_clock_tick},
};

const SIZE: usize = 20 * GROUP as usize + 3;

/// A linked file, `rot` in it under quarantine, and an mtime that no clock gives by chance.
fn damaged_home(bytes: &[u8], rot: &RangeSet) -> Home {
    let home = Home::new();
    home.write("dir/file", bytes);
    let mtime = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    File::options().write(true).open(home.path("dir/file")).unwrap().set_modified(mtime).unwrap();
    home.link(&["dir/file"]);
    home.rot("dir/file", rot);
    assert_damaged(&home.verify("dir/file"), rot, &RangeSet::new());
    home
}

fn mend(home: &Home) -> Result<Mending, StoreError> {
    home.store.mend(&home.file("dir/file"), Consent::Damage, NOW)
}

/// The owner writes to the file, and does not look at the store.
fn edit(home: &Home, offset: u64, bytes: &[u8]) {
    let_the_clock_tick();
    File::options().write(true).open(home.path("dir/file")).unwrap().write_all_at(bytes, offset).unwrap();
}

fn bytes_now(home: &Home) -> Vec<u8> {
    fs::read(home.path("dir/file")).unwrap()
}

#[test]
fn a_mended_file_is_what_it_was_to_the_nanosecond() {
    for (size, rot) in [(SIZE, vec![0, 1, 7, 20]), (1, vec![0]), (LARGE, vec![0, 63, 64, 320]), (LARGE, vec![])] {
        let (bytes, rot) = (random(1, size), groups(size, rot));
        println!("{size} bytes, {rot:?}");
        let home = damaged_home(&bytes, &rot);
        let mtime = home.mtime("dir/file");
        let mut mending = mend(&home).unwrap();
        assert_eq!((mending.size(), mending.damaged()), (size as u64, rot.clone()));
        feed(&mut mending, &bytes, &rot);
        mending.commit().unwrap();
        assert!(mending.damaged().is_empty());
        let (fingerprint, mended) = mending.finish().unwrap();
        assert_eq!(mended, rot);
        assert!(bytes_now(&home) == bytes, "the bytes are not the blob's");
        assert_eq!(home.mtime("dir/file"), mtime);
        assert_eq!((home.row("dir/file").fingerprint, home.damaged("dir/file")), (fingerprint, RangeSet::new()));
        assert_eq!(home.drift("dir/file"), Drift::None);
        let home = home.reopen();
        assert!(matches!(home.verify("dir/file"), Verdict::Sound));
        check_read(&home.store, &bytes, range(0, size as u64), &RangeSet::new());
    }
}

/// Rot that nobody knows of yet stands for every group without quarantine: it must still be there afterwards.
#[test]
fn only_groups_under_quarantine_are_written() {
    let (bytes, rot, unknown) = (random(2, SIZE), groups(SIZE, [3, 9]), groups(SIZE, [2, 4, 20]));
    let home = damaged_home(&bytes, &rot);
    home.rot("dir/file", &unknown);
    let mut mending = mend(&home).unwrap();
    mending.write(&pieces(&bytes, &all(SIZE))).unwrap();
    assert_eq!(mending.finish().unwrap().1, rot);
    assert_damaged(&home.verify("dir/file"), &unknown, &RangeSet::new());
    let mut mending = mend(&home).unwrap();
    feed(&mut mending, &bytes, &unknown);
    mending.finish().unwrap();
    assert!(bytes_now(&home) == bytes);
}

/// What no peer could give stays under quarantine, and the rest is good again.
#[test]
fn a_file_can_be_mended_in_part() {
    let (bytes, rot) = (random(3, SIZE), groups(SIZE, [3, 4, 9]));
    let home = damaged_home(&bytes, &rot);
    let mut mending = mend(&home).unwrap();
    let part = pieces(&bytes, &groups(SIZE, [9])).into_iter().map(|piece| match piece {
        Verified::Data(data) => Verified::Data(data.slice(range(9 * GROUP, 10 * GROUP - 1))),
        node => node,
    });
    mending.write(&part.collect::<Vec<_>>()).unwrap();
    feed(&mut mending, &bytes, &groups(SIZE, [3]));
    assert_eq!(mending.finish().unwrap().1, groups(SIZE, [3]), "part of group 9 is not group 9");
    let left = groups(SIZE, [4, 9]);
    assert_eq!(home.damaged("dir/file"), left);
    check_read(&home.store, &bytes, range(0, SIZE as u64), &left);
    assert_damaged(&home.verify("dir/file"), &left, &RangeSet::new());
}

#[test]
fn pieces_of_another_blob_are_refused() {
    let (bytes, rot) = (random(4, SIZE), groups(SIZE, [3]));
    let home = damaged_home(&bytes, &rot);
    let before = bytes_now(&home);
    let mut mending = mend(&home).unwrap();
    for piece in pieces(&random(5, SIZE), &all(SIZE)) {
        let data = matches!(piece, Verified::Data(_));
        let refused = matches!(mending.write(&[piece]), Err(StoreError::ForeignPiece { .. }));
        assert!(refused || !data);
    }
    assert!(mending.finish().unwrap().1.is_empty());
    assert!(bytes_now(&home) == before);
    assert_damaged(&home.verify("dir/file"), &rot, &RangeSet::new());
}

/// Edited, gone, moved behind a symbolic link or no longer linked: such files are not opened for writing.
#[test]
fn changed_files_are_left_alone() {
    type Change = fn(&Home);
    let changes: [Change; 6] = [
        |home| edit(home, 5, b"edit"),
        |home| edit(home, SIZE as u64, b"more"),
        |home| fs::remove_file(home.path("dir/file")).unwrap(),
        |home| {
            fs::rename(home.path("dir"), home.path("aside")).unwrap();
            std::os::unix::fs::symlink("aside", home.path("dir")).unwrap();
        },
        |home| {
            fs::rename(home.path("dir/file"), home.path("aside")).unwrap();
            std::os::unix::fs::symlink("../aside", home.path("dir/file")).unwrap();
        },
        |home| home.store.unlink(home.root, &[b"dir/file"]).unwrap(),
    ];
    for (number, change) in changes.iter().enumerate() {
        println!("change {number}");
        let home = damaged_home(&random(6, SIZE), &groups(SIZE, [3]));
        change(&home);
        let before = fs::read(home.path("dir/file")).ok();
        assert!(mend(&home).is_err());
        let home = home.reopen();
        assert_eq!(fs::read(home.path("dir/file")).ok(), before);
    }
}

/// The program is killed in the middle: at the next start the file has its mtime again, and no quarantine is lifted
/// but by verify.
#[test]
fn an_interrupted_mending_is_ended_at_the_next_start() {
    let (bytes, rot) = (random(7, SIZE), groups(SIZE, [3, 9]));
    let home = damaged_home(&bytes, &rot);
    let mtime = home.mtime("dir/file");
    let mut mending = mend(&home).unwrap();
    feed(&mut mending, &bytes, &groups(SIZE, [9]));
    std::mem::forget(mending);
    let home = home.kill_and_reopen();
    assert_eq!(home.mtime("dir/file"), mtime);
    assert_eq!((home.drift("dir/file"), home.damaged("dir/file")), (Drift::None, rot));
    check_read(&home.store, &bytes, range(0, 3 * GROUP), &RangeSet::new());
    assert_damaged(&home.verify("dir/file"), &groups(SIZE, [3]), &RangeSet::new());
}

/// Groups rot that nobody has read yet, and the program is killed while others are mended: that is no edit, or the
/// rot would be indexed as the file's new version. Mending moved the ctime, so that the user has to decide.
#[test]
fn unknown_rot_under_an_interrupted_mending_stays_rot() {
    let (bytes, rot, unknown) = (random(16, SIZE), groups(SIZE, [3, 9]), groups(SIZE, [4, 20]));
    let home = damaged_home(&bytes, &rot);
    home.rot("dir/file", &unknown);
    let mut mending = mend(&home).unwrap();
    feed(&mut mending, &bytes, &groups(SIZE, [9]));
    std::mem::forget(mending);
    let home = home.kill_and_reopen();
    let verdict = home.verify("dir/file");
    assert!(matches!(&verdict, Verdict::Suspect { data } if *data == groups(SIZE, [3, 4, 20])), "{verdict:?}");
}

/// The program is killed in the middle, and then the owner edited the file: that is an edit, and its time is kept.
#[test]
fn an_edit_after_an_interrupted_mending_stays_an_edit() {
    let (bytes, rot) = (random(8, SIZE), groups(SIZE, [3, 9]));
    for (offset, edited) in [(0, "edit"), (SIZE as u64, "more")] {
        let home = damaged_home(&bytes, &rot);
        let mut mending = mend(&home).unwrap();
        feed(&mut mending, &bytes, &groups(SIZE, [9]));
        std::mem::forget(mending);
        edit(&home, offset, edited.as_bytes());
        let (mtime, content) = (home.mtime("dir/file"), bytes_now(&home));
        let home = home.kill_and_reopen();
        assert_eq!(home.mtime("dir/file"), mtime);
        assert!(bytes_now(&home) == content);
        assert!(matches!(home.verify("dir/file"), Verdict::Modified));
    }
}

/// A fetch may fail and its mending be dropped: the file must not count as edited from then on, or the rot would
/// be indexed as its new version.
#[test]
fn a_dropped_mending_makes_no_edit_of_the_rot() {
    let (bytes, rot) = (random(9, SIZE), groups(SIZE, [3, 9]));
    let home = damaged_home(&bytes, &rot);
    let mut mending = mend(&home).unwrap();
    feed(&mut mending, &bytes, &groups(SIZE, [9]));
    drop(mending);
    assert_damaged(&home.verify("dir/file"), &groups(SIZE, [3]), &RangeSet::new());
    assert!(mend(&home).is_ok());
}

/// Once a file is mended, its times are its owner's again.
#[test]
fn a_touch_after_mending_stays() {
    let (bytes, rot) = (random(17, SIZE), groups(SIZE, [3, 9]));
    let home = damaged_home(&bytes, &rot);
    let mut mending = mend(&home).unwrap();
    feed(&mut mending, &bytes, &rot);
    mending.finish().unwrap();
    File::options().write(true).open(home.path("dir/file")).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(home.reopen().mtime("dir/file"), (0, 0));
}

/// The owner edits the file while it is being mended: the edit must count as one, and not as damage.
fn check_edit_during_mending(offset: u64) {
    let (bytes, rot) = (random(10, SIZE), groups(SIZE, [3, 9]));
    let home = damaged_home(&bytes, &rot);
    let mut mending = mend(&home).unwrap();
    feed(&mut mending, &bytes, &groups(SIZE, [3]));
    edit(&home, offset, b"edit");
    let_the_clock_tick();
    let _refused_or_not = mending.write(&pieces(&bytes, &groups(SIZE, [9])));
    let _refused_or_not = mending.finish();
    let verdict = home.verify("dir/file");
    assert!(matches!(verdict, Verdict::Modified), "{verdict:?}");
}

#[test]
fn an_edit_of_sound_bytes_during_mending_stays_an_edit() {
    check_edit_during_mending(0);
}

#[test]
fn bytes_appended_during_mending_stay_an_edit() {
    check_edit_during_mending(SIZE as u64);
}

/// The indexer finds a new version of the file while the old one is being mended: the new row is not touched.
#[test]
fn a_file_linked_anew_during_mending_keeps_its_new_row() {
    let (bytes, rot, new) = (random(11, SIZE), groups(SIZE, [3]), random(12, SIZE / 2));
    let home = damaged_home(&bytes, &rot);
    let mut mending = mend(&home).unwrap();
    fs::write(home.path("staged"), &new).unwrap();
    fs::rename(home.path("staged"), home.path("dir/file")).unwrap();
    home.link(&["dir/file"]);
    let row = home.row("dir/file");
    let _refused_or_not = mending.write(&pieces(&bytes, &rot));
    let _refused_or_not = mending.finish();
    assert_eq!(home.row("dir/file"), row);
    assert!(matches!(home.verify("dir/file"), Verdict::Sound));
    check_read(&home.store, &new, range(0, new.len() as u64), &RangeSet::new());
    assert_eq!(home.store.holders(BlobId::of(&bytes), 1).unwrap(), []);
}

/// The owner writes the file anew while it is being mended, that is indexed, and the program is killed: the next
/// start must not give the new bytes the old time.
#[test]
fn a_file_linked_anew_during_a_mending_cut_off_keeps_its_new_time() {
    let (bytes, rot, new) = (random(13, SIZE), groups(SIZE, [3]), random(14, SIZE));
    let home = damaged_home(&bytes, &rot);
    std::mem::forget(mend(&home).unwrap());
    edit(&home, 0, &new);
    home.link(&["dir/file"]);
    let mtime = home.mtime("dir/file");
    let home = home.kill_and_reopen();
    assert_eq!(home.mtime("dir/file"), mtime);
    assert!(matches!(home.verify("dir/file"), Verdict::Sound));
}

/// The daemon goes on working while a file is mended: a scan begins, which ends mendings that were cut off, and the
/// file is verified. Neither takes it away from the mending that is under way.
#[test]
fn a_scan_and_a_verify_during_mending_do_no_harm() {
    type Meanwhile = fn(&Home);
    let meanwhile: [Meanwhile; 2] = [|home| home.store.finish_mending().unwrap(), |home| _ = home.verify("dir/file")];
    let (bytes, rot) = (random(18, SIZE), groups(SIZE, [3, 9]));
    for (written, act) in [(vec![], 0), (vec![3], 0), (vec![3, 9], 0), (vec![3], 1), (vec![3, 9], 1)] {
        println!("{written:?} of {rot:?} are written, then act {act}");
        let home = damaged_home(&bytes, &rot);
        let mut mending = mend(&home).unwrap();
        let written = groups(SIZE, written);
        feed(&mut mending, &bytes, &written);
        let_the_clock_tick();
        meanwhile[act](&home);
        feed(&mut mending, &bytes, &rot.difference(&written));
        mending.finish().unwrap();
        assert_eq!((home.drift("dir/file"), home.damaged("dir/file")), (Drift::None, RangeSet::new()));
        assert!(matches!(home.verify("dir/file"), Verdict::Sound));
    }
}

/// Readers meet every state of the file while it is mended again and again: they never see a wrong byte, and
/// never put sound groups under quarantine.
#[test]
fn reads_during_mending_are_right() {
    let (bytes, rot) = (random(15, SIZE), groups(SIZE, [3, 9]));
    let home = damaged_home(&bytes, &rot);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let outcome = home.store.read(BlobId::of(&bytes), SIZE as u64, range(0, SIZE as u64)).unwrap();
                for piece in outcome.pieces {
                    let at = piece.range();
                    assert!(bytes[at.start() as usize..at.end() as usize] == piece.bytes()[..], "wrong bytes at {at}");
                }
            }
        });
        for _ in 0..20 {
            let mut mending = mend(&home).unwrap();
            feed(&mut mending, &bytes, &rot);
            mending.finish().unwrap();
            assert_eq!(home.damaged("dir/file"), RangeSet::new());
            home.rot("dir/file", &rot);
            assert_damaged(&home.verify("dir/file"), &rot, &RangeSet::new());
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
