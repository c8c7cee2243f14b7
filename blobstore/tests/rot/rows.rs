//! What the database says: rows that are wrong, and look right or do not decode. Whatever they claim, nothing wrong
//! is served, verify tells the truth about the bytes, and the right row can come back.

use blobstore::{Consent, FileRow, Presence, Verdict};
use tree::{BlobId, Grain, RangeSet};

use crate::{
    assert_found,
    cached::check_refetch,
    common::{GROUP, NOW, all, group_count, groups, range},
    damage::Kind,
    lab::{CACHED, Lab, Subject},
    oracle::{below_wrong_pairs, differing},
};

/// What the database says of a file in place.
pub(crate) fn injure_file_row(lab: &Lab, subject: &Subject, name: &str, kind: Kind, rng: &mut fastrand::Rng) -> bool {
    let raw = lab.file_row(name).unwrap();
    let row: FileRow = postcard::from_bytes(&raw).unwrap();
    let set = |row: &FileRow| lab.set_file_row(name, Some(&postcard::to_stdvec(row).unwrap()));
    let is_elsewhere = subject.files.len() > 1 || !subject.proven.is_empty();
    let missing = |here: &RangeSet| if is_elsewhere { RangeSet::new() } else { subject.all().difference(here) };
    let nothing = RangeSet::new();
    match rng.u8(..6) {
        0 => {
            lab.set_file_row(name, Some(&kind.of(&raw, 8, rng)));
            lab.check_sources(subject);
            let verdict = lab.verify(name);
            let now = lab.store.file(&lab.file(name)).unwrap();
            let is_true = now.is_some_and(|now| now.blob == subject.id() && now.damaged.is_empty());
            assert_eq!(matches!(verdict, Some(Verdict::Sound)), is_true && !matches!(verdict, Some(Verdict::Modified)));
            check_some_read(lab, subject);
            // Whatever the row says, nothing is written to the user's file for it.
            for consent in [Consent::Damage, Consent::Suspect] {
                drop(lab.store.mend(&lab.file(name), consent, NOW));
            }
            assert!(std::fs::read(lab.path(name)).unwrap() == subject.bytes);
        }
        1 => injure_blob(lab, subject, name, &row, rng),
        2 => {
            // Size, mtime and inode tell an edit; the others do not, and verify looks at the bytes.
            let (field, mut now) = (rng.u8(..5), row.clone());
            let by = rng.u32(1..1000);
            match field {
                0 => now.fingerprint.size ^= u64::from(by) << rng.u8(..50),
                1 => now.fingerprint.mtime.nanos ^= by,
                2 => now.fingerprint.inode ^= u64::from(by),
                3 => now.fingerprint.ctime.seconds ^= i64::from(by),
                _ => now.fingerprint.device ^= u64::from(by),
            }
            set(&now);
            lab.check_sources(subject);
            if field < 3 {
                assert!(matches!(lab.verify(name), Some(Verdict::Modified)));
                lab.check_read(subject, lab.some_range(subject, rng), &missing(&nothing));
            } else {
                assert!(matches!(lab.verify(name), Some(Verdict::Sound)));
                assert_eq!(lab.file_row(name).unwrap(), raw, "the right fingerprint is back");
            }
        }
        3 => {
            // Sound groups under quarantine are not served until verify has looked at them; some are behind the end.
            let accused =
                groups(subject.size() + GROUP as usize, (0..=group_count(subject.size())).filter(|_| rng.bool()));
            set(&FileRow { damaged: accused.clone(), ..row });
            lab.check_sources(subject);
            lab.check_read(subject, lab.some_range(subject, rng), &missing(&subject.all().difference(&accused)));
            assert!(matches!(lab.verify(name), Some(Verdict::Sound)));
            assert_eq!(lab.file_row(name).unwrap(), raw);
        }
        4 => {
            lab.set_file_row(name, None);
            lab.check_read(subject, lab.some_range(subject, rng), &missing(&nothing));
            assert!(lab.verify(name).is_none(), "a file that is not linked has no verdict");
            lab.link(name);
        }
        _ => {
            // Nobody finds the blob by a holder that is not there, nor by one that is not true.
            let other = lab.subjects[rng.usize(..lab.subjects.len())].id();
            lab.set_holder(subject.id(), name, false);
            lab.set_holder(other, name, true);
            let nobody = format!("{name} is not its name");
            lab.set_holder(subject.id(), &nobody, true);
            lab.check_sources(subject);
            let here = if subject.id() == other { subject.all() } else { nothing };
            lab.check_read(subject, lab.some_range(subject, rng), &missing(&here));
            assert!(matches!(lab.verify(name), Some(Verdict::Sound)), "its bytes are what its row says");
            lab.check_read(subject, lab.some_range(subject, rng), &missing(&subject.all()));
            lab.set_holder(subject.id(), &nobody, false);
            lab.set_holder(other, name, false);
            lab.link(name);
        }
    }
    lab.set_file_row(name, Some(&raw));
    check_healed(lab, subject);
    true
}

/// The row says that the file is another blob: then all of it is damaged, and it is served under neither name.
fn injure_blob(lab: &Lab, subject: &Subject, name: &str, row: &FileRow, rng: &mut fastrand::Rng) {
    let other = &lab.subjects[rng.usize(..lab.subjects.len())];
    let blob = if rng.bool() { other.id() } else { BlobId::of(&rng.u64(..).to_le_bytes()) };
    if blob == subject.id() {
        return;
    }
    lab.set_file_row(name, Some(&postcard::to_stdvec(&FileRow { blob, ..row.clone() }).unwrap()));
    lab.check_sources(subject);
    check_some_read(lab, subject);
    let is_here = subject.files.len() > 1;
    assert_eq!(lab.store.presence(subject.id()).unwrap() == Presence::InPlace, is_here, "in place elsewhere?");
    match lab.verify(name) {
        // Of zeros, other zeros may have some groups.
        Some(Verdict::Damaged { data, .. }) if blob == other.id() => assert!(!data.is_empty()),
        Some(Verdict::Damaged { data, .. }) => assert_eq!(data, subject.all()),
        verdict => panic!("{verdict:?} of another blob"),
    }
    lab.check_sources(other);
    // Hashed anew, it is what it was.
    lab.link(name);
}

/// What the database says of a blob in the cache.
pub(crate) fn injure_cached_row(lab: &Lab, subject: &Subject, kind: Kind, rng: &mut fastrand::Rng) -> bool {
    let (id, size) = (subject.id(), subject.size() as u64);
    let raw = lab.row(CACHED, id).unwrap();
    let set = |size: u64, proven: &RangeSet| {
        lab.set_row(CACHED, id, Some(&postcard::to_stdvec(&(size, proven)).unwrap()));
    };
    let some = groups(subject.size(), (0..group_count(subject.size())).filter(|_| rng.bool()).collect::<Vec<_>>());
    match rng.u8(..5) {
        0 => {
            lab.set_row(CACHED, id, Some(&kind.of(&raw, 8, rng)));
            lab.check_sources(subject);
            let _whatever_is_left = lab.verify_cached(subject);
        }
        1 => {
            let claimed = if rng.bool() { subject.all() } else { some.union(&subject.proven) };
            let (data, outboard) = unproven(lab, subject);
            set(size, &claimed);
            lab.check_sources(subject);
            check_some_read(lab, subject);
            let before = lab.store.cached_ranges(id).unwrap();
            assert!(claimed.difference(&data.union(&outboard)).difference(&before).is_empty());
            let data = data.intersection(&before).difference(&outboard);
            assert_found(lab.verify_cached(subject), &data, &outboard.intersection(&before));
        }
        2 => {
            let other = [0, 1, size - 1, size + 1, size + GROUP, 2 * size, GROUP, GROUP + 1, 1 << 50, u64::MAX];
            let other = other[rng.usize(..other.len())];
            set(other, &subject.proven);
            lab.check_sources(subject);
            check_some_read(lab, subject);
            let verdict = lab.verify_cached(subject).expect("there is a row");
            let is_claim = subject.proven.end() < size;
            assert!(other == size || is_claim || !matches!(verdict, Verdict::Sound), "sound as {other} bytes");
        }
        3 => {
            // What it does not claim it does not give, and a fetch brings it.
            set(size, &some.intersection(&subject.proven));
            lab.check_sources(subject);
            assert!(matches!(lab.verify_cached(subject), Some(Verdict::Sound)));
        }
        _ => {
            lab.set_row(CACHED, id, None);
            lab.check_sources(subject);
            assert!(lab.verify_cached(subject).is_none());
        }
    }
    lab.check_sources(subject);
    check_some_read(lab, subject);
    check_refetch(lab, subject);
    lab.set_row(CACHED, id, Some(&raw));
    check_healed(lab, subject);
    true
}

/// What of a blob's cached data, and below which pairs, would not prove if all of it were claimed.
fn unproven(lab: &Lab, subject: &Subject) -> (RangeSet, RangeSet) {
    if subject.is_inline() {
        return (RangeSet::new(), RangeSet::new());
    }
    let read = |part| std::fs::read(lab.own_file("cache", subject.id(), part)).unwrap();
    let data = differing(&subject.bytes, &read("data"), GROUP);
    (data, below_wrong_pairs(subject.size(), Grain::GROUP, &subject.hashed.outboard, &read("obao4")))
}

/// A read gives what it may, and that is right.
pub(crate) fn check_some_read(lab: &Lab, subject: &Subject) {
    let size = subject.size() as u64;
    let outcome = lab.store.read(subject.id(), size, range(0, size)).unwrap();
    let mut said = outcome.missing;
    for piece in outcome.pieces {
        let at = piece.range();
        assert!(subject.bytes[at.start() as usize..at.end() as usize] == piece.bytes()[..], "wrong bytes at {at}");
        said.insert(at);
    }
    assert_eq!(said, all(subject.size()), "read or missing");
}

pub(crate) fn check_healed(lab: &Lab, subject: &Subject) {
    lab.check_sound(subject);
    let here = if subject.files.is_empty() { subject.proven.clone() } else { subject.all() };
    lab.check_read(subject, range(0, subject.size() as u64), &subject.all().difference(&here));
}
