//! Which parts of an arena are out of reach, because the file systems that they are on are not where they were. Decisions
//! only; the table of cases is in spec/namespace.md, "Offline".

use std::collections::BTreeMap;

use namespace::{Anchor, Anchors, RelPath};

/// Why what was known of a directory, and of all below it, must not be taken for gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Away {
    /// Another file system is there, or none is mounted.
    OtherFileSystem,
    /// Another directory of the same file system is there.
    OtherDirectory,
    /// Nothing is mounted where something was.
    NotMounted,
    /// Something is mounted over it.
    Covered,
    /// More is mounted in the arena than can be remembered.
    TooMany,
}

/// What is still there of what was known below a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing was known.
    NothingKnown,
    /// Some of it.
    Some,
    /// None of it.
    None,
}

/// The parts of an arena, below its root, that are out of reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in super::super) struct Offline(BTreeMap<RelPath, Away>);

impl Offline {
    /// Returns why a path is out of reach, if it is: if it is at or below an offline part.
    pub(in super::super) fn covers(&self, path: &RelPath) -> Option<Away> {
        if self.0.is_empty() {
            return None;
        }
        std::iter::successors(Some(path.clone()), RelPath::parent).find_map(|above| self.0.get(&above).copied())
    }

    /// The topmost parts, by path.
    pub(in super::super) fn parts(&self) -> impl Iterator<Item = (&RelPath, Away)> {
        let is_topmost = |path: &RelPath| path.parent().is_none_or(|parent| self.covers(&parent).is_none());
        self.0.iter().filter(move |(path, _)| is_topmost(path)).map(|(path, away)| (path, *away))
    }
}

/// Decides whether the directory that has the anchor `now` is the one that had `known`. Asks what is `left` of what was known
/// there only where the anchors do not tell.
pub(super) fn compare<E>(
    known: &Anchor,
    now: &Anchor,
    left: impl FnOnce() -> Result<Left, E>,
) -> Result<Result<(), Away>, E> {
    Ok(match () {
        () if known.file_system != now.file_system => Err(Away::OtherFileSystem),
        () if known.inode == now.inode => Ok(()),
        () if known.within != now.within => Err(Away::OtherDirectory),
        // Made anew; or a file system whose inode numbers do not last.
        () => match left()? {
            Left::NothingKnown | Left::Some => Ok(()),
            Left::None => Err(Away::OtherDirectory),
        },
    })
}

/// Decides what of an arena is offline, and which anchors its mount points have from now on. `known` are the anchors recorded
/// before, `now` those of the mount points that can be seen now; neither has the root's. `left` tells what is still there of
/// what was known at and below a mount point.
pub(super) fn sort_out<E>(
    known: &Anchors,
    now: &Anchors,
    mut left: impl FnMut(&RelPath) -> Result<Left, E>,
) -> Result<(Anchors, Offline), E> {
    let (mut anchors, mut offline) = (Anchors::new(), BTreeMap::new());
    for (path, was) in known {
        let Some(at) = path else { continue };
        let away = match now.get(path) {
            None => Err(Away::NotMounted),
            Some(is) => compare(was, is, || left(at))?,
        };
        match away {
            Ok(()) => anchors.extend(now.get(path).map(|is| (path.clone(), is.clone()))),
            Err(away) => {
                offline.insert(at.clone(), away);
                anchors.insert(path.clone(), was.clone());
            }
        }
    }
    for (path, is) in now.iter().filter(|(path, _)| !known.contains_key(path)) {
        let Some(at) = path else { continue };
        match left(at)? {
            Left::NothingKnown if anchors.len() < ANCHORS_MAX => {
                anchors.insert(path.clone(), is.clone());
            }
            Left::NothingKnown => {
                offline.insert(at.clone(), Away::TooMany);
            }
            // What was known was not on this file system.
            Left::Some | Left::None => {
                offline.insert(at.clone(), Away::Covered);
            }
        }
    }
    Ok((anchors, Offline(offline)))
}

impl std::fmt::Display for Away {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::OtherFileSystem => "another file system is there than before",
            Self::OtherDirectory => "it is another directory than before, and has nothing of what was in that one",
            Self::NotMounted => "its file system is not mounted",
            Self::Covered => "another file system is mounted over it",
            Self::TooMany => "more than 1,024 file systems are mounted in the arena",
        })
    }
}

/// Mount points that are remembered of one arena.
const ANCHORS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn anchor(file_system: u64, within: &str, inode: u64) -> Anchor {
        Anchor { file_system, within: within.into(), inode }
    }

    fn path(text: &str) -> RelPath {
        text.as_bytes().to_owned().try_into().unwrap()
    }

    #[test]
    fn which_directory_is_the_same() {
        let known = anchor(1, "/docs", 2);
        for (now, left, expected) in [
            (anchor(1, "/docs", 2), Left::None, Ok(())),
            // Bound to another place, or its file system mounted in another way.
            (anchor(1, "/", 2), Left::None, Ok(())),
            (anchor(9, "/docs", 2), Left::Some, Err(Away::OtherFileSystem)),
            (anchor(9, "/docs", 2), Left::NothingKnown, Err(Away::OtherFileSystem)),
            (anchor(1, "/other", 3), Left::Some, Err(Away::OtherDirectory)),
            (anchor(1, "/docs", 3), Left::NothingKnown, Ok(())),
            (anchor(1, "/docs", 3), Left::Some, Ok(())),
            (anchor(1, "/docs", 3), Left::None, Err(Away::OtherDirectory)),
        ] {
            assert_eq!(compare(&known, &now, || Ok::<_, Infallible>(left)), Ok(expected), "{now:?} {left:?}");
        }
    }

    /// What becomes of the mount point "usb": known before, there now, and what is left of what was known there.
    #[test]
    fn mount_points_come_and_go() {
        let (disk, other) = (anchor(1, "/", 2), anchor(9, "/", 2));
        let anchors = |anchor: Option<&Anchor>| -> Anchors {
            anchor.map(|anchor| (Some(path("usb")), anchor.clone())).into_iter().collect()
        };
        for (known, now, left, away, remembered) in [
            (None, None, Left::Some, None, None),
            (Some(&disk), Some(&disk), Left::None, None, Some(&disk)),
            (Some(&disk), None, Left::Some, Some(Away::NotMounted), Some(&disk)),
            (Some(&disk), None, Left::NothingKnown, Some(Away::NotMounted), Some(&disk)),
            (Some(&disk), Some(&other), Left::Some, Some(Away::OtherFileSystem), Some(&disk)),
            (None, Some(&disk), Left::NothingKnown, None, Some(&disk)),
            (None, Some(&disk), Left::Some, Some(Away::Covered), None),
            (None, Some(&disk), Left::None, Some(Away::Covered), None),
        ] {
            let found = sort_out(&anchors(known), &anchors(now), |_| Ok::<_, Infallible>(left)).unwrap();
            let case = format!("{known:?} {now:?} {left:?}");
            assert_eq!(found.0, anchors(remembered), "{case}");
            assert_eq!(found.1.covers(&path("usb")), away, "{case}");
            assert_eq!(found.1.covers(&path("usb/a/b")), away, "{case}");
            assert_eq!(found.1.covers(&path("usb-2")), None, "{case}");
            assert_eq!(found.1.parts().count(), usize::from(away.is_some()), "{case}");
        }
    }

    #[test]
    fn parts_and_bounds() {
        let known: Anchors =
            ["a", "a/b", "a-b", "c/d"].map(|at| (Some(path(at)), anchor(1, "/", 2))).into_iter().collect();
        let (remembered, offline) =
            sort_out(&known, &Anchors::new(), |_| Ok::<_, Infallible>(Left::NothingKnown)).unwrap();
        assert_eq!(remembered, known);
        assert_eq!(offline.parts().map(|(path, _)| path.to_string()).collect::<Vec<_>>(), ["a", "a-b", "c/d"]);
        assert_eq!(offline.covers(&path("c")), None);
        let many = (0..2 * ANCHORS_MAX).map(|at| (Some(path(&at.to_string())), anchor(1, "/", 2))).collect();
        let (remembered, offline) =
            sort_out(&Anchors::new(), &many, |_| Ok::<_, Infallible>(Left::NothingKnown)).unwrap();
        assert_eq!((remembered.len(), offline.parts().count()), (ANCHORS_MAX, ANCHORS_MAX));
    }
}
