//! The rot matrix: damage of every kind in every kind of place, with outboards of every grain. Whatever was injured,
//! verify names exactly what does not prove, nothing wrong is ever read or sent, nothing else is accused, and all of
//! which there is a good copy anywhere is what it was again, byte for byte.
//!
//! `ROT_INJECTIONS` says how many injections are made in all, `ROT_SEED` which. A failure prints both, and the
//! injection. Every injection is undone by the repair it asks for, so that the next one meets a sound store again.

mod cached;
#[path = "../common/mod.rs"]
mod common;
mod damage;
mod dirs;
mod garbage;
mod in_place;
mod lab;
mod oracle;
mod rows;

use std::collections::BTreeMap;

use blobstore::Verdict;
use tree::{Grain, RangeSet};

use crate::{
    damage::Kind,
    lab::{Lab, MANY_BYTES, Subject},
};

#[test]
fn at_the_grain_of_chunk_groups() {
    check(Grain::GROUP);
}

#[test]
fn at_the_grain_of_64_kib() {
    check(Grain::KIB_64);
}

#[test]
fn at_the_grain_of_256_kib() {
    check(Grain::KIB_256);
}

#[test]
fn at_the_grain_of_1_mib() {
    check(Grain::MIB_1);
}

/// What an injection hits.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Target {
    InPlace,
    /// A row, or a file if it is long.
    Outboard,
    /// A file, or a row if it is small.
    Cached,
    CachedOutboard,
    /// What the database says of files and of the cache.
    FileRow,
    /// The two rows of a file's directory.
    DirRows,
    CachedRow,
}

impl Target {
    const ALL: [Self; 7] = [
        Self::InPlace,
        Self::Outboard,
        Self::Cached,
        Self::CachedOutboard,
        Self::FileRow,
        Self::DirRows,
        Self::CachedRow,
    ];

    fn is_of(self, subject: &Subject) -> bool {
        match self {
            Self::InPlace | Self::FileRow | Self::DirRows => !subject.files.is_empty(),
            Self::Outboard => !subject.files.is_empty() && !subject.kept.is_empty(),
            Self::Cached | Self::CachedRow => !subject.proven.is_empty(),
            Self::CachedOutboard => !subject.proven.is_empty() && !subject.is_inline(),
        }
    }
}

/// Says which injection it was, if one fails.
struct Trace(String);

impl Drop for Trace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

fn check(grain: Grain) {
    let number = |name, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let (seed, injections) = (number("ROT_SEED", 1), number("ROT_INJECTIONS", 20_000));
    let mut lab = Lab::new(grain, seed);
    let mut tally: BTreeMap<String, (u32, u32)> = BTreeMap::new();
    for injection in 0..injections / 4 {
        let mut rng = fastrand::Rng::with_seed((seed << 32) ^ (grain.bytes() << 12) ^ injection);
        let (place, kind) = (rng.choice(Target::ALL).expect("a place"), Kind::any(&mut rng));
        let subject = pick(&lab, place, &mut rng);
        let what = format!("{place:?} {kind:?}");
        let _trace = Trace(format!(
            "ROT_SEED={seed} ROT_INJECTIONS={injections}, grain {}: injection {injection}, {what} of {} bytes in {:?}",
            grain.bytes(),
            subject.size(),
            subject.files,
        ));
        let hurt = inject(&lab, subject, place, kind, &mut rng);
        let (all, hurting) = tally.entry(what).or_default();
        (*all, *hurting) = (*all + 1, *hurting + u32::from(hurt));
        lab.check_sound(&lab.subjects[rng.usize(..lab.subjects.len() / 2)]);
    }
    for (what, (all, hurting)) in &tally {
        println!("{what:28} {all:6}, {hurting:6} of which hurt");
        assert!(*hurting > 0 || injections < 10_000, "{what} never hurts");
    }
    lab.reopen();
    lab.subjects.iter().for_each(|subject| lab.check_sound(subject));
}

/// Some blob that is in such a place; seldom a large one, for they take long.
fn pick<'a>(lab: &'a Lab, place: Target, rng: &mut fastrand::Rng) -> &'a Subject {
    loop {
        let subject = rng.choice(&lab.subjects).expect("there are some");
        if place.is_of(subject) && (subject.size() <= MANY_BYTES || rng.u8(..16) == 0) {
            return subject;
        }
    }
}

/// Injures, checks, and heals. Tells whether anything was wrong in between.
fn inject(lab: &Lab, subject: &Subject, place: Target, kind: Kind, rng: &mut fastrand::Rng) -> bool {
    let name = rng.choice(&subject.files).map_or("", String::as_str);
    match place {
        Target::InPlace => in_place::injure_data(lab, subject, name, kind, rng),
        Target::Outboard => in_place::injure_outboard(lab, subject, name, kind, rng),
        Target::Cached => cached::injure_data(lab, subject, kind, rng),
        Target::CachedOutboard => cached::injure_outboard(lab, subject, kind, rng),
        Target::FileRow => rows::injure_file_row(lab, subject, name, kind, rng),
        Target::DirRows => dirs::injure_rows(lab, subject, name, kind, rng),
        Target::CachedRow => rows::injure_cached_row(lab, subject, kind, rng),
    }
}

/// `verdict` says that exactly `data` and `outboard` are damaged; that all is sound, if both are empty.
fn assert_found(verdict: Option<Verdict>, data: &RangeSet, outboard: &RangeSet) {
    let found = match &verdict {
        Some(Verdict::Sound) => Some(Default::default()),
        Some(Verdict::Damaged { data, outboard, unreadable: None }) if !data.union(outboard).is_empty() => {
            Some((data.clone(), outboard.clone()))
        }
        _ => None,
    };
    assert_eq!(found, Some((data.clone(), outboard.clone())), "found and true; the verdict was {verdict:?}");
}
