//! Users' files and their outboards.

use std::fs::{self, File};

use blobstore::{Consent, Sink, StoreError, Verdict};
use tree::{Drift, Grain, RangeSet, Verified, hash_into};

use crate::{
    assert_found,
    common::{GROUP, NOW},
    damage::Kind,
    lab::{Lab, OUTBOARDS, Subject, overwrite_at},
    oracle::{PAIR_BYTES, below_wrong_pairs, differing, grain_of},
};

/// The file's bytes rot. What does not prove is found to the unit of the grain, and mended from another copy here, or
/// else from a peer. Where they are another number, it is an edit that keeps the mtime.
pub(crate) fn injure_data(lab: &Lab, subject: &Subject, name: &str, kind: Kind, rng: &mut fastrand::Rng) -> bool {
    let (file, path) = (lab.file(name), lab.path(name));
    let bytes = kind.of(&subject.bytes, GROUP, rng);
    let mtime = fs::metadata(&path).unwrap().modified().unwrap();
    let edit = |bytes: &[u8]| {
        overwrite_at(&path, bytes);
        File::options().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
    };
    match bytes.len() == subject.size() {
        true => lab.rot(name, &bytes),
        false => edit(&bytes),
    }
    let is_elsewhere = subject.files.len() > 1 || !subject.proven.is_empty();
    let missing = |rot: &RangeSet| if is_elsewhere { RangeSet::new() } else { rot.clone() };
    let damaged = || lab.store.file(&file).unwrap().expect("the file is linked").damaged;
    lab.check_sources(subject);
    if bytes.len() != subject.size() {
        // Another size is an edit: nothing is said of the bytes, nothing taken from them, and nothing written.
        assert!(matches!(lab.verify(name), Some(Verdict::Modified)));
        lab.check_read(subject, lab.some_range(subject, rng), &missing(&subject.all()));
        assert!(matches!(lab.store.mend(&file, Consent::Damage, NOW), Err(StoreError::Modified { .. })));
        assert!(damaged().is_empty() && fs::read(&path).unwrap() == bytes);
        edit(&subject.bytes);
        assert!(matches!(lab.verify(name), Some(Verdict::Sound)));
        return true;
    }
    let rot = differing(&subject.bytes, &bytes, lab.grain.bytes());
    if rng.bool() {
        lab.check_read(subject, lab.some_range(subject, rng), &missing(&rot));
        assert!(damaged().difference(&rot).is_empty(), "{:?} under quarantine, {rot:?} is rotten", damaged());
    }
    assert_found(lab.verify(name), &rot, &RangeSet::new());
    assert_eq!(damaged(), rot);
    let said = lab.check_sources(subject);
    lab.check_read(subject, lab.some_range(subject, rng), &missing(&rot));
    if rot.is_empty() {
        return false;
    }
    assert!(is_elsewhere || said == subject.all().difference(&rot), "{said:?} was said");

    let mut mending = lab.store.mend(&file, Consent::Damage, NOW).unwrap();
    for range in rot.iter() {
        let read = lab.store.read(subject.id(), subject.size() as u64, range).unwrap();
        let pieces: Vec<_> = read.pieces.into_iter().map(Verified::Data).collect();
        mending.write(&pieces).unwrap();
    }
    assert_eq!(mending.damaged(), missing(&rot), "left after other copies here were asked");
    subject.feed(&mut mending, &missing(&rot));
    mending.commit().unwrap();
    assert_eq!(mending.finish().unwrap().1, rot);
    assert!(fs::read(&path).unwrap() == subject.bytes, "mended, and not what it was");
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), mtime);
    let row = lab.store.file(&file).unwrap().unwrap();
    assert_eq!(row.fingerprint.drift(&lab.fingerprint(name)), Drift::None);
    assert!(matches!(lab.verify(name), Some(Verdict::Sound)));
    true
}

/// The outboard of a blob in place, a row or a file, is damaged or gone: the data is not blamed, though what the
/// outboard does not prove is not served; and it is made anew from the data.
pub(crate) fn injure_outboard(lab: &Lab, subject: &Subject, name: &str, kind: Kind, rng: &mut fastrand::Rng) -> bool {
    let (id, size) = (subject.id(), subject.size());
    let is_row = subject.kept.len() <= 16 << 10;
    let path = lab.own_file("outboards", id, &format!("obao{}", lab.grain.log_chunks()));
    let stored = || if is_row { lab.row(OUTBOARDS, id) } else { fs::read(&path).ok() };
    assert!(stored().as_ref() == Some(&subject.kept));
    let now = (rng.u8(..8) > 0).then(|| kind.of(&subject.kept, PAIR_BYTES as u64, rng));
    match &now {
        _ if is_row => lab.set_row(OUTBOARDS, id, now.as_deref()),
        Some(now) => overwrite_at(&path, now),
        None => fs::remove_file(&path).unwrap(),
    }
    // A row may now be as long as one of another grain, and is judged as such: its first pairs may well prove.
    let grain = now.as_ref().filter(|_| is_row).and_then(|now| grain_of(size, now.len())).unwrap_or(lab.grain);
    let (right, now) = (outboard(subject, grain), now.unwrap_or_default());
    let unproven = below_wrong_pairs(size, grain, &right, &now);
    let wrong = if now.len() > right.len() { subject.all() } else { unproven.clone() };
    // Two files have one outboard.
    let missing = if subject.proven.is_empty() { &unproven } else { &RangeSet::new() };
    lab.check_sources(subject);
    lab.check_read(subject, lab.some_range(subject, rng), missing);
    assert_found(lab.verify(name), &RangeSet::new(), &wrong);
    lab.check_read(subject, lab.some_range(subject, rng), missing);
    let row = lab.store.file(&lab.file(name)).unwrap().unwrap();
    assert!(row.damaged.is_empty(), "the data is blamed for its outboard");

    lab.store.rebuild_outboard(&lab.file(name)).unwrap();
    assert!(stored().as_ref() == Some(&subject.kept), "made anew, and not what it was");
    assert!(matches!(lab.verify(name), Some(Verdict::Sound)));
    assert_eq!(lab.check_sources(subject), subject.all());
    !wrong.is_empty()
}

fn outboard(subject: &Subject, grain: Grain) -> Vec<u8> {
    let geometry = tree::Geometry::new(subject.size() as u64);
    let pairs = std::sync::Mutex::new(vec![0; geometry.outboard_bytes_at(grain) as usize]);
    hash_into(&subject.bytes[..], geometry.size(), grain, &pairs).unwrap();
    pairs.into_inner().unwrap()
}
