//! Rows that do not decode, or claim what cannot be. They count as none: the store opens, everything else in it goes on,
//! and what they were about comes back as anything does that was never there.

use blobstore::{Consent, Verdict};
use tree::{ByteRange, Grain, RangeSet};

use crate::{
    common::{DIR_NUMBERS, DIRS, FILES, HOLDERS, NOW, range},
    lab::{CACHED, INLINE, Lab, MENDING, OUTBOARDS, REPAIRS, ROOT, Subject, USED, VANISHED, VANISHED_ORDER},
};

/// Bytes that are no row: a length that never ends, and then noise.
fn garbage(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0xff; 40];
    fastrand::Rng::with_seed(seed).fill(&mut bytes[12..]);
    bytes
}

/// One such row in each table, of one blob each, and a start: all other blobs are sound.
#[test]
fn one_bad_row_takes_no_other_along() {
    let mut lab = Lab::new(Grain::GROUP, 2);
    let in_place = lab.subjects.iter().position(|s| s.files.len() == 2 && s.size() > 100_000).unwrap();
    let cached = lab.subjects.iter().position(|s| s.files.is_empty() && s.size() > 100_000).unwrap();
    let inline = lab.subjects.iter().position(|s| s.files.is_empty() && s.is_inline()).unwrap();
    let name = lab.subjects[in_place].files[0].clone();
    lab.set_file_row(&name, Some(&garbage(1)));
    let txn = lab.db.begin_write().unwrap();
    txn.open_table(MENDING).unwrap().insert((ROOT, name.as_bytes()), &garbage(2)[..]).unwrap();
    txn.open_table(FILES).unwrap().insert((ROOT, &b"never linked"[..]), &garbage(3)[..]).unwrap();
    txn.open_table(HOLDERS).unwrap().insert((&[7; 6], 99, &b"no such directory"[..]), ()).unwrap();
    txn.open_table(DIRS).unwrap().insert(u32::MAX, &garbage(8)[..]).unwrap();
    txn.open_table(DIR_NUMBERS).unwrap().insert((99, &b"no such root/"[..]), u32::MAX).unwrap();
    txn.open_table(VANISHED).unwrap().insert(&b"/no such file"[..], &garbage(9)[..]).unwrap();
    txn.open_table(VANISHED_ORDER).unwrap().insert(u64::MAX, &b"/no such file"[..]).unwrap();
    txn.open_table(REPAIRS).unwrap().insert(u64::MAX, &garbage(10)[..]).unwrap();
    txn.open_table(USED).unwrap().insert(&[7; 32], u64::MAX).unwrap();
    txn.commit().unwrap();
    lab.set_row(OUTBOARDS, lab.subjects[cached].id(), Some(&garbage(4)));
    lab.set_row(CACHED, lab.subjects[cached].id(), Some(&garbage(5)));
    lab.set_row(CACHED, lab.subjects[inline].id(), Some(&garbage(6)));
    lab.set_row(INLINE, lab.subjects[inline].id(), Some(&garbage(7)));
    lab.reopen();

    for (number, subject) in lab.subjects.iter().enumerate() {
        lab.check_sources(subject);
        if ![in_place, cached, inline].contains(&number) {
            lab.check_sound(subject);
        }
    }
    assert!(lab.verify("never linked").is_none() && lab.verify(&name).is_none());
    let linked: Vec<_> = lab.store.files(lab.file(&name).root).map(Result::unwrap).collect();
    assert!(!linked.is_empty() && linked.iter().all(|(path, _)| path != name.as_bytes()));

    // The other copy, a scan, and a fetch.
    let subject = &lab.subjects[in_place];
    lab.check_read(subject, range(0, subject.size() as u64), &RangeSet::new());
    lab.link(&name);
    lab.store.unlink(lab.file(&name).root, &[b"never linked"]).unwrap();
    assert!(lab.file_row("never linked").is_none());
    for number in [cached, inline] {
        assert!(lab.verify_cached(&lab.subjects[number]).is_none());
        lab.fetch(&lab.subjects[number]);
    }
    lab.subjects.iter().for_each(|subject| lab.check_sound(subject));
    for consent in [Consent::Damage, Consent::Suspect, Consent::Damage] {
        check_vanish_and_mend(&lab, &name, &lab.subjects[in_place], consent);
    }
    let usage = lab.store.cache_usage().unwrap();
    assert_eq!(lab.store.trim(0).unwrap(), 0, "{usage:?}: everything can be evicted");
}

/// Files vanish, and are mended, beside rows that rotted into the last numbers that there are.
fn check_vanish_and_mend(lab: &Lab, name: &str, subject: &Subject, consent: Consent) {
    let file = lab.file(name);
    let row = lab.store.file(&file).unwrap();
    lab.store.unlink(file.root, &[name.as_bytes()]).unwrap();
    assert_eq!(lab.store.vanished(file.root, &[name.as_bytes()]).unwrap(), [row]);
    lab.link(name);
    let mut rotten = subject.bytes.clone();
    rotten[70_000] ^= 1;
    lab.rot(name, &rotten);
    lab.verify(name);
    let before = lab.store.repairs().unwrap().len();
    let mut mending = lab.store.mend(&file, consent, NOW).unwrap();
    let damaged = mending.damaged();
    subject.feed(&mut mending, &damaged);
    mending.finish().unwrap();
    assert_eq!(lab.store.repairs().unwrap().len(), before + 1);
    lab.check_sound(subject);
}

/// A row of the cache may decode and claim more than there are bytes anywhere: the start does not count them all.
#[test]
fn a_claim_without_end_does_not_stop_the_start() {
    let mut lab = Lab::new(Grain::GROUP, 3);
    let cached = lab.subjects.iter().position(|s| s.files.is_empty() && s.size() > 100_000).unwrap();
    let endless = RangeSet::from(ByteRange::new(0, u64::MAX).unwrap());
    let size = lab.subjects[cached].size() as u64;
    for claimed in [size, u64::MAX] {
        let row = postcard::to_stdvec(&(claimed, &endless)).unwrap();
        lab.set_row(CACHED, lab.subjects[cached].id(), Some(&row));
        lab.reopen();
        let subject = &lab.subjects[cached];
        lab.check_sources(subject);
        let verdict = lab.verify_cached(subject);
        if claimed == size {
            assert!(matches!(verdict, Some(Verdict::Sound)), "all that there is, is sound: {verdict:?}");
        } else {
            assert!(matches!(verdict, Some(Verdict::Missing)), "{verdict:?}");
        }
        // The row is right again once all of it was forgotten or evicted.
        lab.set_row(CACHED, subject.id(), None);
        lab.fetch(subject);
        lab.check_sound(subject);
    }
}
