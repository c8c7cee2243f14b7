//! The dictionary of directories: one of its rows is lost or wrong, and with it the holders in a whole directory. No
//! wrong file is taken for a holder, and verifying or linking the files brings all of them back.

use blobstore::Verdict;

use crate::{
    damage::Kind,
    lab::{Lab, Subject},
    rows::{check_healed, check_some_read},
};

/// What the database says of the directory of a file in place.
pub(crate) fn injure_rows(lab: &Lab, subject: &Subject, name: &str, kind: Kind, rng: &mut fastrand::Rng) -> bool {
    let (row, number) = lab.dir_rows(name);
    let (row, number) = (row.unwrap(), number.unwrap());
    let neighbours = || {
        let is_near = |other: &&String| lab.dir_rows(other).1 == Some(number);
        let files = lab.subjects.iter().flat_map(|other| other.files.iter().map(move |name| (other, name)));
        files.filter(|(_, name)| is_near(name)).collect::<Vec<_>>()
    };
    let near = neighbours();
    let other = rng.choice(&lab.subjects).and_then(|other| rng.choice(&other.files)).map_or(name, String::as_str);
    let (other_row, other_number) = lab.dir_rows(other);
    let (now, number_now) = match rng.u8(..6) {
        0 => (Some(kind.of(&row, 8, rng)), Some(number)),
        1 => (None, Some(number)),
        2 => (Some(row.clone()), None),
        3 => (None, None),
        4 => (other_row, Some(number)),
        _ => (Some(row.clone()), if rng.bool() { other_number } else { Some(rng.u32(..)) }),
    };
    lab.set_dir_rows(number, now.as_deref(), name, number_now);
    // Numbers that are in use are passed over.
    let last = [0, 1, u32::MAX, rng.u32(..)];
    lab.set_last_dir(last[rng.usize(..last.len())]);
    for (other, name) in &near {
        lab.check_sources(other);
        for file in lab.store.holders(other.id(), 99).unwrap() {
            let path = String::from_utf8(file.path).unwrap();
            assert!(other.files.contains(&path), "{path} for {name}");
        }
    }
    check_some_read(lab, subject);
    // A scan links what changed; verify finds what is not said of the others.
    if rng.bool() {
        lab.link(name);
    }
    if rng.u8(..4) == 0 {
        lab.store.unlink(lab.file(name).root, &[name.as_bytes()]).unwrap();
        assert!(!lab.store.holders(subject.id(), 99).unwrap().contains(&lab.file(name)), "unlinked, and a holder");
        lab.link(name);
    }
    for (_, name) in &near {
        assert!(matches!(lab.verify(name), Some(Verdict::Sound)));
    }
    for (other, _) in near {
        let holders = lab.store.holders(other.id(), 99).unwrap();
        let right: Vec<_> = other.files.iter().map(|name| lab.file(name)).collect();
        assert_eq!(holders, right, "each once, and all are back");
    }
    let dir = |row: &[u8]| postcard::from_bytes::<(u32, Vec<u8>)>(row).unwrap();
    assert_eq!(lab.dir_rows(name).0.as_deref().map(dir), Some(dir(&row)), "both rows are back");
    check_healed(lab, subject);
    true
}
