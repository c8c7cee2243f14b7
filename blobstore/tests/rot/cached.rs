//! The cache: files, and small blobs in rows.

use std::fs;

use blobstore::Verdict;
use tree::{Grain, RangeSet};

use crate::{
    assert_found,
    common::GROUP,
    damage::Kind,
    lab::{INLINE, Lab, Subject, overwrite_at},
    oracle::{PAIR_BYTES, below_wrong_pairs, differing},
};

/// The bytes of a cached blob.
pub(crate) fn injure_data(lab: &Lab, subject: &Subject, kind: Kind, rng: &mut fastrand::Rng) -> bool {
    injure(lab, subject, "data", |stored, rng| kind.of(stored, GROUP, rng), rng)
}

/// The outboard of a cached blob.
pub(crate) fn injure_outboard(lab: &Lab, subject: &Subject, kind: Kind, rng: &mut fastrand::Rng) -> bool {
    injure(lab, subject, "obao4", |stored, rng| kind.of(stored, PAIR_BYTES as u64, rng), rng)
}

/// Damages one of the two files of a cached blob, or its row. What does not prove is forgotten, and no more, unless
/// the length tells already that it is not what was written; what was forgotten is fetched again.
fn injure(
    lab: &Lab,
    subject: &Subject,
    part: &str,
    damage: impl Fn(&[u8], &mut fastrand::Rng) -> Vec<u8>,
    rng: &mut fastrand::Rng,
) -> bool {
    let (id, path) = (subject.id(), lab.own_file("cache", subject.id(), part));
    let stored = if subject.is_inline() { lab.row(INLINE, id).unwrap() } else { fs::read(&path).unwrap() };
    let now = (rng.u8(..8) > 0).then(|| damage(&stored, rng));
    match &now {
        _ if subject.is_inline() => lab.set_row(INLINE, id, now.as_deref()),
        Some(now) => overwrite_at(&path, now),
        None => fs::remove_file(&path).unwrap(),
    }
    let is_as_long = now.as_ref().is_some_and(|now| now.len() == stored.len());
    let opens = subject.is_inline() || now.is_some();
    let (data, outboard) = match now.unwrap_or_default() {
        now if part == "data" => (differing(&subject.bytes, &now, GROUP), RangeSet::new()),
        now => {
            let outboard = below_wrong_pairs(subject.size(), Grain::GROUP, &subject.hashed.outboard, &now);
            (RangeSet::new(), outboard)
        }
    };
    let bad = if opens { data.union(&outboard) } else { subject.all() };
    let is_in_place = !subject.files.is_empty();
    let missing = |here: &RangeSet| if is_in_place { RangeSet::new() } else { subject.all().difference(here) };
    let here = || lab.store.cached_ranges(id).unwrap();

    lab.check_sources(subject);
    if rng.bool() {
        lab.check_read(subject, lab.some_range(subject, rng), &missing(&subject.proven.difference(&bad)));
        let forgotten = subject.proven.difference(&here());
        assert!(forgotten.difference(&bad).is_empty(), "{forgotten:?} forgotten, {bad:?} is bad");
    }
    let before = here();
    if is_as_long {
        assert_found(lab.verify_cached(subject), &data.intersection(&before), &outboard.intersection(&before));
        assert_eq!(here(), before.difference(&bad));
    } else {
        assert!(lab.store.take_cached(id).unwrap().is_none(), "given away at a wrong length");
        let verdict = lab.verify_cached(subject);
        assert!(matches!(verdict, Some(Verdict::Missing)), "{verdict:?}");
        assert_eq!(here(), RangeSet::new());
    }
    lab.check_sources(subject);
    lab.check_read(subject, lab.some_range(subject, rng), &missing(&here()));

    check_refetch(lab, subject);
    assert_eq!(here(), subject.proven);
    !is_as_long || !bad.intersection(&subject.proven).is_empty()
}

/// A peer brings what was lost, and the cache has all that it is to have, and right.
pub(crate) fn check_refetch(lab: &Lab, subject: &Subject) {
    lab.fetch(subject);
    let verdict = lab.verify_cached(subject);
    assert!(matches!(verdict, Some(Verdict::Sound)), "{verdict:?} after a fetch");
    let said = lab.check_sources(subject);
    assert!(subject.proven.difference(&said).is_empty(), "of what was fetched, only {said:?} is given");
}
