//! The walk over real directories, against a plain recursive look at all of them: nothing is dropped in silence,
//! nothing is followed out of the arena, and the order is that of the paths.

mod common;

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, Metadata},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use namespace::{RelPath, Seen, SeenKind, Walk, WalkError, leaving_name, staging_name};
use tempfile::TempDir;
use tree::{Fingerprint, UnixTime};

use crate::common::{for_seeds, path};

#[test]
fn random_trees() {
    for_seeds(60, |mut rng| {
        let root = TempDir::new().unwrap();
        grow(&mut rng, root.path(), 0);
        check(root.path());
    });
}

/// A file with a name for a moment is passed over, wherever the walk starts; others that look like it are not.
#[test]
fn names_for_a_moment() {
    let root = TempDir::new().unwrap();
    let name = staging_name(0x123);
    assert_eq!(name, ".blobd-0000000000000123.part");
    fs::create_dir_all(root.path().join("d").join(staging_name(7))).unwrap();
    let others =
        [".blobd-123.part", ".blobd-0000000000000123", ".blobd-000000000000012G.part", "x.blobd-0000000000000123.part"];
    for name in others.into_iter().chain([&name[..], "d/.blobd-ffffffffffffffff.part"]) {
        fs::write(root.path().join(name), b"x").unwrap();
    }
    let passed = Arc::new(Mutex::new(Vec::new()));
    let passing = passed.clone();
    let walk = Walk::new(root.path(), Vec::new()).passing(move |path| passing.lock().unwrap().push(path));
    let mut seen: Vec<String> = walk.map(|seen| String::from_utf8(seen.unwrap().path.into()).unwrap()).collect();
    let mut expected = others.map(str::to_owned).to_vec();
    // A directory is a directory.
    expected.extend(["d".to_owned(), format!("d/{}", staging_name(7))]);
    seen.sort();
    expected.sort();
    assert_eq!(seen, expected);
    assert_eq!(*passed.lock().unwrap(), [path(&name), path("d/.blobd-ffffffffffffffff.part")]);
    assert_eq!(Walk::new(root.path(), Vec::new()).within(path(&name)).count(), 0);
}

/// What a move has set aside is neither seen nor gone: the directory is passed over with all that is in it. A file called so is a
/// file.
#[test]
fn directories_of_what_is_set_aside() {
    let root = TempDir::new().unwrap();
    let name = leaving_name(0x123);
    assert_eq!(name, ".blobd-0000000000000123.leaving");
    fs::create_dir_all(root.path().join("d").join(&name)).unwrap();
    fs::write(root.path().join("d").join(&name).join("file"), b"x").unwrap();
    fs::write(root.path().join(&name), b"x").unwrap();
    let passed = Arc::new(Mutex::new(Vec::new()));
    let passing = passed.clone();
    let walk = Walk::new(root.path(), Vec::new()).passing(move |path| passing.lock().unwrap().push(path));
    let seen: Vec<RelPath> = walk.map(|seen| seen.unwrap().path).collect();
    assert_eq!(seen, [path(&name), path("d")]);
    let aside = format!("d/{name}");
    assert_eq!(*passed.lock().unwrap(), [path(&aside)]);
    for below in [aside.clone(), format!("{aside}/file")] {
        assert_eq!(Walk::new(root.path(), Vec::new()).within(path(&below)).count(), 0, "{below}");
    }
}

/// What is in a directory stands behind files whose names only begin as its own.
#[test]
fn the_order_of_paths() {
    let root = TempDir::new().unwrap();
    fs::create_dir_all(root.path().join("a/b")).unwrap();
    for name in ["a/b/c", "a/b-", "a/b0", "a-b", "a.b", "a0", "a\x01", "A", "aa", "a:b", "\u{e4}"] {
        fs::write(root.path().join(name), name).unwrap();
    }
    for name in [b"\xff", b"\x80"] {
        fs::write(root.path().join(OsStr::from_bytes(name)), name).unwrap();
    }
    let walked: Vec<Vec<u8>> = check(root.path()).into_iter().map(Vec::from).collect();
    let expected: [&[u8]; 15] = [
        b"A",
        b"a",
        b"a\x01",
        b"a-b",
        b"a.b",
        b"a/b",
        b"a/b-",
        b"a/b/c",
        b"a/b0",
        b"a0",
        b"a:b",
        b"aa",
        b"\x80",
        b"\xc3\xa4",
        b"\xff",
    ];
    assert_eq!(walked, expected);
}

#[test]
fn links_are_not_followed() {
    let (root, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::create_dir(root.path().join("dir")).unwrap();
    fs::write(root.path().join("dir/file"), "x").unwrap();
    fs::write(outside.path().join("secret"), "x").unwrap();
    let outside = outside.path().to_str().unwrap();
    let links = [("to-file", "dir/file"), ("to-dir", "dir"), ("to-nothing", "no/thing"), ("to-self", "to-self")];
    let links = links.into_iter().chain([("dir/up", ".."), ("dir/root", "../../"), ("out", outside)]);
    let links: BTreeMap<&str, &str> = links.collect();
    for (name, target) in &links {
        symlink(target, root.path().join(name)).unwrap();
    }
    let seen = walk(root.path()).into_iter().map(Result::unwrap).filter_map(|seen| match seen.kind {
        SeenKind::Symlink { target, .. } => Some((seen.path.to_string(), String::from_utf8(target).unwrap())),
        _ => None,
    });
    let expected = links.iter().map(|(name, target)| (name.to_string(), target.to_string()));
    assert_eq!(seen.collect::<BTreeMap<_, _>>(), expected.collect());
    check(root.path());
}

/// The root may be a link: whoever named it meant what it leads to.
#[test]
fn a_root_behind_a_link() {
    let (real, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(real.path().join("a"), "x").unwrap();
    let link = other.path().join("link");
    symlink(real.path(), &link).unwrap();
    assert_eq!(paths(Walk::new(&link, vec![])), ["a"]);
}

/// A directory that becomes a link while the walk is on its way must not lead it out: neither the one whose turn is
/// next, nor one above it.
#[test]
fn a_directory_that_becomes_a_link() {
    for replaced in ["dir/sub", "dir"] {
        let (root, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        for name in ["secret", "sub/secret"] {
            fs::create_dir_all(outside.path().join(name).parent().unwrap()).unwrap();
            fs::write(outside.path().join(name), "x").unwrap();
        }
        fs::create_dir_all(root.path().join("dir/sub")).unwrap();
        for name in ["dir/a", "z"] {
            fs::write(root.path().join(name), "x").unwrap();
        }
        let mut walk = Walk::new(root.path(), vec![]);
        for before in ["dir", "dir/a", "dir/sub"].into_iter().take(if replaced == "dir" { 2 } else { 3 }) {
            assert_eq!(walk.next().unwrap().unwrap().path, path(before));
        }
        fs::remove_dir_all(root.path().join(replaced)).unwrap();
        symlink(outside.path(), root.path().join(replaced)).unwrap();
        let rest: Vec<_> = walk.filter_map(Result::ok).map(|seen| seen.path).collect();
        assert_eq!(rest, [path("z")], "{replaced}");
    }
}

/// What is gone when its turn comes was never there; what took its place is not taken for it, but told of.
#[test]
fn changes_on_the_way() {
    let root = TempDir::new().unwrap();
    let at = |name: &str| root.path().join(name);
    let put = |name: &str| {
        fs::create_dir_all(at(name).parent().unwrap()).unwrap();
        fs::write(at(name), "x").unwrap();
    };
    for name in ["a", "file-gone", "file-to-link", "file-to-dir", "dir-gone/x/y", "dir-to-file/x", "z"] {
        put(name);
    }
    let mut walk = Walk::new(root.path(), vec![]);
    assert_eq!(walk.next().unwrap().unwrap().path, path("a"));
    for name in ["file-gone", "file-to-link", "file-to-dir"] {
        fs::remove_file(at(name)).unwrap();
    }
    for name in ["dir-gone", "dir-to-file"] {
        fs::remove_dir_all(at(name)).unwrap();
    }
    symlink("a", at("file-to-link")).unwrap();
    put("file-to-dir/x");
    put("dir-to-file");

    let told = walk.map(|seen| match seen {
        Ok(Seen { path, kind: SeenKind::File { .. } }) => format!("file {path}"),
        Ok(Seen { path, kind: SeenKind::Symlink { .. } }) => format!("link {path}"),
        Ok(Seen { path, kind: SeenKind::Directory { .. } }) => format!("directory {path}"),
        other => panic!("{other:?}"),
    });
    let expected = ["file dir-to-file", "directory file-to-dir", "link file-to-link", "file z"];
    assert_eq!(told.collect::<Vec<_>>(), expected);
}

#[test]
fn special_files() {
    let root = TempDir::new().unwrap();
    let fifo = root.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let _listener = UnixListener::bind(root.path().join("socket")).unwrap();
    fs::write(root.path().join("x"), "x").unwrap();
    assert_eq!(check(root.path()), ["fifo", "socket", "x"].map(path));
    fs::write(root.path().join(".nfs00000000a1b2c3d40000001f"), "deleted, and open").unwrap();
    let special =
        Walk::new(root.path(), vec![]).filter(|seen| matches!(seen, Ok(Seen { kind: SeenKind::Special, .. })));
    assert_eq!(special.count(), 3);
    assert_eq!(paths(Walk::new("/dev", vec![]).take(3)).len(), 3, "devices are only looked at");
}

#[test]
fn what_is_left_out() {
    let root = TempDir::new().unwrap();
    for name in ["a", "state/db", "state/x/y", "state2", "sub/state/db", "z"] {
        fs::create_dir_all(root.path().join(name).parent().unwrap()).unwrap();
        fs::write(root.path().join(name), "x").unwrap();
    }
    let check = |left_out: &[&str], expected: &[&str]| {
        let left_out: Vec<PathBuf> = left_out.iter().map(|name| root.path().join(name)).collect();
        assert_eq!(paths(Walk::new(root.path(), left_out.clone())), expected, "{left_out:?}");
        // However the root is spelt.
        let slash = [root.path().as_os_str().as_bytes(), b"/"].concat();
        let slash = PathBuf::from(OsStr::from_bytes(&slash));
        assert_eq!(paths(Walk::new(slash, left_out.clone())), expected, "{left_out:?}");
    };
    let within_sub = ["sub", "sub/state", "sub/state/db"];
    let within_state = ["state", "state/db", "state/x", "state/x/y"];
    let all = [&["a"], &within_state[..1], &within_state[1..], &["state2"], &within_sub, &["z"]].concat();
    check(&["state"], &[&["a", "state2"], &within_sub[..], &["z"]].concat());
    check(&["state/"], &[&["a", "state2"], &within_sub[..], &["z"]].concat());
    check(&["state/db", "sub"], &["a", "state", "state/x", "state/x/y", "state2", "z"]);
    check(&["a", "z", "no/such"], &all[1..all.len() - 1]);
    check(&[], &all);
    let within = |left_out: &str, within: &str| {
        paths(Walk::new(root.path(), vec![root.path().join(left_out)]).within(path(within)))
    };
    assert_eq!(within("state/x", "state"), ["state", "state/db"]);
    for inside in ["state", "state/x", "state/x/y", "state/no"] {
        assert_eq!(within("state", inside), [] as [&str; 0], "{inside}");
    }
    assert_eq!(within("state", "state2"), ["state2"]);
}

/// An arena reached by a link still leaves out the program's own database.
#[test]
fn what_is_left_out_of_a_root_behind_a_link() {
    let (real, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(real.path().join("a"), "x").unwrap();
    fs::write(real.path().join("db"), "x").unwrap();
    let link = other.path().join("link");
    symlink(real.path(), &link).unwrap();
    assert_eq!(paths(Walk::new(&link, vec![real.path().join("db")])), ["a"]);
    assert_eq!(paths(Walk::new(real.path(), vec![link.join("db")])), ["a"]);
}

/// Nothing is known then: that is not the same as an arena with nothing in it.
#[test]
fn no_root() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    symlink("nowhere", dir.path().join("dangling")).unwrap();
    for name in ["missing", "file", "dangling", "file/x"] {
        let root = dir.path().join(name);
        let seen = walk(&root);
        assert!(matches!(&seen[..], [Err(WalkError::Root { path, .. })] if *path == root), "{name}: {seen:?}");
    }
    fs::create_dir(dir.path().join("empty")).unwrap();
    assert!(walk(&dir.path().join("empty")).is_empty());
}

#[test]
fn a_directory_without_permission() {
    let root = TempDir::new().unwrap();
    let locked = root.path().join("locked");
    fs::create_dir(&locked).unwrap();
    for name in ["a", "locked/x", "z"] {
        fs::write(root.path().join(name), "x").unwrap();
    }
    fs::set_permissions(&locked, PermissionsExt::from_mode(0o000)).unwrap();
    if fs::read_dir(&locked).is_ok() {
        eprintln!("SKIPPED: this user may read everything; see `paths_the_system_does_not_take` instead");
        return;
    }
    let check = |mode, expected: &[Result<&str, &str>]| {
        fs::set_permissions(&locked, PermissionsExt::from_mode(mode)).unwrap();
        let seen = walk(root.path()).into_iter().map(|seen| match seen {
            Ok(seen) => Ok(seen.path.to_string()),
            Err(WalkError::Unreadable { path, .. }) => Err(path.to_string()),
            Err(error) => panic!("{error:?}"),
        });
        let expected: Vec<_> = expected.iter().map(|seen| seen.map(String::from).map_err(String::from)).collect();
        assert_eq!(seen.collect::<Vec<_>>(), expected, "{mode:o}");
    };
    check(0o000, &[Ok("a"), Ok("locked"), Err("locked"), Ok("z")]);
    check(0o400, &[Ok("a"), Ok("locked"), Err("locked/x"), Ok("z")]);
    check(0o700, &[Ok("a"), Ok("locked"), Ok("locked/x"), Ok("z")]);
}

/// Deeper than an absolute path can reach is seen all the same; deeper than a path in an arena may be is told of.
#[test]
fn paths_the_system_does_not_take() {
    let root = TempDir::new().unwrap();
    // The absolute path of "deep" ends just below the limit of 4,096 with its NUL; what is in it lies behind.
    let len = 4080 - root.path().as_os_str().len();
    // A path that an arena may have, but a system call does not take.
    let longest = "l".repeat(4096 - len - 1);
    let deep = dig(root.path(), len, |deep| {
        fs::write(deep.join("beyond-the-limit-of-the-system"), "x").unwrap();
        fs::create_dir(deep.join("d-beyond-the-limit")).unwrap();
        fs::write(deep.join("d-beyond-the-limit/x"), "x").unwrap();
        fs::write(deep.join("ok"), "x").unwrap();
        fs::create_dir(deep.join(&longest)).unwrap();
        fs::write(deep.join(&longest).join("x"), "x").unwrap();
        fs::write(deep.join("y".repeat(255)), "x").unwrap();
    });
    for name in ["A", "z"] {
        fs::write(root.path().join(name), "x").unwrap();
    }
    let is_way = |seen: &Result<Seen, WalkError>| {
        let bytes = deep.as_bytes();
        matches!(seen, Ok(seen) if bytes.starts_with(seen.path.as_bytes()))
    };
    let told = walk(root.path()).into_iter().filter(|seen| !is_way(seen)).map(|seen| match seen {
        Ok(seen) => format!("seen {}", seen.path),
        Err(WalkError::Unreadable { path, .. }) => format!("unreadable {path}"),
        Err(WalkError::Name { path }) => format!("no name {}", path.display()),
        Err(error) => panic!("{error:?}"),
    });
    let told: Vec<String> = told.collect();
    let short = |told: &String| told.replace(&*root.path().to_string_lossy(), "/").replace(&deep, "DEEP");
    let mut told: Vec<String> = told.iter().map(short).collect();
    told.sort();
    let mut expected = vec![
        "seen A".to_owned(),
        "seen DEEP/ok".to_owned(),
        "seen z".to_owned(),
        "seen DEEP/beyond-the-limit-of-the-system".to_owned(),
        "seen DEEP/d-beyond-the-limit".to_owned(),
        "seen DEEP/d-beyond-the-limit/x".to_owned(),
        format!("seen DEEP/{longest}"),
        format!("unreadable DEEP/{longest}"),
        format!("no name //DEEP/{}", "y".repeat(255)),
    ];
    expected.sort();
    assert_eq!(told, expected);
}

/// Whoever mends the first name has not mended the second.
#[test]
fn every_name_that_is_none_is_told() {
    let root = TempDir::new().unwrap();
    dig(root.path(), 4080 - root.path().as_os_str().len(), |deep| {
        for name in ["x", "y"] {
            fs::write(deep.join(name.repeat(255)), "x").unwrap();
        }
    });
    let told = walk(root.path()).into_iter().filter(|seen| matches!(seen, Err(WalkError::Name { .. })));
    assert_eq!(told.count(), 2);
}

#[test]
fn the_longest_names() {
    let root = TempDir::new().unwrap();
    let long = "n".repeat(255);
    fs::create_dir(root.path().join(&long)).unwrap();
    fs::write(root.path().join(&long).join(&long), "x").unwrap();
    assert_eq!(check(root.path()), [path(&long), path(format!("{long}/{long}"))]);
}

#[test]
fn times_and_modes() {
    let root = TempDir::new().unwrap();
    let epoch = SystemTime::UNIX_EPOCH;
    let check = |name: &str, mtime: SystemTime, mode: u32, expected: (i64, u32)| {
        let at = root.path().join(name);
        let file = File::create(&at).unwrap();
        file.set_permissions(PermissionsExt::from_mode(mode)).unwrap();
        file.set_modified(mtime).unwrap();
        let seen = walk(root.path()).into_iter().map(Result::unwrap).find(|seen| seen.path == path(name)).unwrap();
        let SeenKind::File { fingerprint, mode: seen } = seen.kind else { panic!("{seen:?}") };
        assert_eq!(fingerprint.mtime, UnixTime { seconds: expected.0, nanos: expected.1 }, "{name}");
        assert_eq!(u32::from(seen), mode & 0o777, "{name}");
    };
    check("just before 1970", epoch - Duration::new(0, 1), 0o644, (-1, 999_999_999));
    check("before 1970", epoch - Duration::new(86_400, 250_000_000), 0o600, (-86_401, 750_000_000));
    check("1970", epoch, 0o000, (0, 0));
    check("2033", epoch + Duration::new(2_000_000_000, 123_456_789), 0o777, (2_000_000_000, 123_456_789));
    check("setuid, setgid, sticky", epoch, 0o7755, (0, 0));

    let dir = root.path().join("dir");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o3750)).unwrap();
    File::open(&dir).unwrap().set_modified(epoch + Duration::new(7, 9)).unwrap();
    let seen = Walk::new(root.path(), vec![]).within(path("dir")).next().unwrap().unwrap();
    assert_eq!(seen.kind, SeenKind::Directory { mode: 0o750, mtime: UnixTime { seconds: 7, nanos: 9 } });
}

/// A walk through a part gives just what a walk through all gives of it.
#[test]
fn within() {
    for_seeds(40, |mut rng| {
        let root = TempDir::new().unwrap();
        grow(&mut rng, root.path(), 0);
        let all: Vec<Seen> = walk(root.path()).into_iter().map(Result::unwrap).collect();
        let asked: Vec<RelPath> =
            all.iter().map(|seen| seen.path.clone()).chain([path("no"), path("no/such")]).collect();
        for dir in asked {
            let part = Walk::new(root.path(), vec![]).within(dir.clone());
            let expected = all.iter().filter(|seen| seen.path.is_within(&dir)).cloned();
            assert_eq!(part.map(Result::unwrap).collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "{dir:?}");
        }
    });
}

/// A link on the way to where a walk starts must not lead it out, and one at the start is itself all there is.
#[test]
fn within_what_is_behind_a_link() {
    let (root, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::create_dir(outside.path().join("sub")).unwrap();
    fs::write(outside.path().join("sub/secret"), "x").unwrap();
    symlink(outside.path(), root.path().join("out")).unwrap();
    let within = |at: &str| paths(Walk::new(root.path(), vec![]).within(path(at)));
    assert_eq!(within("out"), ["out"]);
    assert_eq!(within("out/sub"), [] as [&str; 0]);
    assert_eq!(within("out/sub/secret"), [] as [&str; 0]);
}

/// What appears in a directory once it is entered is either seen by the walk or by whoever watches it since then.
#[test]
fn directories_are_entered_before_they_are_read() {
    let root = TempDir::new().unwrap();
    fs::create_dir_all(root.path().join("a/b")).unwrap();
    let walk = Walk::new(root.path(), vec![]).entering(|dir| fs::write(dir.join("made-on-entering"), "x").unwrap());
    let expected = ["a", "a/b", "a/b/made-on-entering", "a/made-on-entering", "made-on-entering"];
    assert_eq!(paths(walk), expected);

    let (entered, told) = std::sync::mpsc::channel();
    let walk = Walk::new(root.path(), vec![root.path().join("a/b")]).within(path("a"));
    assert_eq!(paths(walk.entering(move |dir| entered.send(dir.to_owned()).unwrap())), ["a", "a/made-on-entering"]);
    let real = root.path().canonicalize().unwrap();
    assert_eq!(told.iter().collect::<Vec<_>>(), [real.join("a")]);
}

/// Compares the walk with the plain look; returns the paths.
fn check(root: &Path) -> Vec<RelPath> {
    let seen: Vec<Seen> = walk(root).into_iter().map(|seen| seen.expect("all can be read")).collect();
    let mut expected = BTreeMap::new();
    look(root, Path::new(""), &mut expected);
    assert_eq!(seen.len(), expected.len());
    for (seen, (path, kind)) in seen.iter().zip(expected) {
        assert_eq!((seen.path.as_bytes(), &seen.kind), (&path[..], &kind));
    }
    seen.into_iter().map(|seen| seen.path).collect()
}

fn look(root: &Path, dir: &Path, found: &mut BTreeMap<Vec<u8>, SeenKind>) {
    for entry in fs::read_dir(root.join(dir)).unwrap() {
        let path = dir.join(entry.unwrap().file_name());
        let absolute = root.join(&path);
        let meta = fs::symlink_metadata(&absolute).unwrap();
        let kind = if meta.is_dir() {
            look(root, &path, found);
            SeenKind::Directory { mode: (meta.mode() & 0o777) as u16, mtime: fingerprint(&meta).mtime }
        } else if meta.is_file() {
            SeenKind::File { fingerprint: fingerprint(&meta), mode: (meta.mode() & 0o777) as u16 }
        } else if meta.is_symlink() {
            let target = fs::read_link(&absolute).unwrap().into_os_string().into_vec();
            SeenKind::Symlink { target, mtime: fingerprint(&meta).mtime }
        } else {
            assert!(meta.file_type().is_fifo() || meta.file_type().is_socket());
            SeenKind::Special
        };
        found.insert(path.into_os_string().into_vec(), kind);
    }
}

fn fingerprint(meta: &Metadata) -> Fingerprint {
    let time = |seconds, nanos| UnixTime { seconds, nanos: u32::try_from(nanos).unwrap() };
    Fingerprint {
        device: meta.dev(),
        inode: meta.ino(),
        birth: meta.created().ok().map(UnixTime::from),
        size: meta.size(),
        mtime: time(meta.mtime(), meta.mtime_nsec()),
        ctime: time(meta.ctime(), meta.ctime_nsec()),
    }
}

/// All that a walk yields; it stays at its end once it has come to it.
fn walk(root: &Path) -> Vec<Result<Seen, WalkError>> {
    let mut walk = Walk::new(root, vec![]);
    let seen = walk.by_ref().collect();
    assert!(walk.next().is_none());
    seen
}

fn paths(walk: impl Iterator<Item = Result<Seen, WalkError>>) -> Vec<String> {
    walk.map(|seen| seen.unwrap().path.to_string()).collect()
}

/// Puts all kinds of things into `dir`.
fn grow(rng: &mut fastrand::Rng, dir: &Path, depth: usize) {
    let mut files: Vec<PathBuf> = Vec::new();
    for _ in 0..rng.usize(0..8) {
        let name = match rng.u8(..4) {
            0 => (0..rng.usize(1..4)).map(|_| rng.u8(1..)).filter(|b| *b != b'/').collect(),
            _ => rng.choice(&NAMES).unwrap().to_vec(),
        };
        let at = dir.join(OsStr::from_bytes(&name));
        if matches!(&name[..], b"" | b"." | b"..") || at.symlink_metadata().is_ok() {
            continue;
        }
        match rng.u8(..10) {
            0 => symlink(rng.choice(&["a", "..", "/", "no\nwhere", "a/b"]).unwrap(), at).unwrap(),
            1 => drop(UnixListener::bind(&at)),
            2 if !files.is_empty() => fs::hard_link(rng.choice(&files).unwrap(), at).unwrap(),
            3..6 if depth < 4 => {
                fs::create_dir(&at).unwrap();
                grow(rng, &at, depth + 1);
            }
            _ => {
                fs::write(&at, "x".repeat(rng.usize(..3))).unwrap();
                fs::set_permissions(&at, PermissionsExt::from_mode(rng.u32(..0o1000))).unwrap();
                files.push(at);
            }
        }
    }
}

/// Makes a directory whose path below `root` has `len` bytes, with what `fill` puts into it; returns that path.
fn dig(root: &Path, len: usize, fill: impl Fn(&Path)) -> String {
    // Made high up, where the system reaches everything in it, and then moved down.
    let lower = root.join("d".repeat(200));
    let mut bottom = lower.clone();
    (0..9).for_each(|_| bottom.push("d".repeat(200)));
    fs::create_dir_all(&bottom).unwrap();
    fill(&bottom);
    let mut upper = root.to_owned();
    let mut left = len + 1 - 10 * 201;
    while left > 0 {
        let name = if left > 400 {
            199
        } else if left > 200 {
            left / 2
        } else {
            left - 1
        };
        upper.push("u".repeat(name));
        left -= name + 1;
    }
    fs::create_dir_all(&upper).unwrap();
    fs::rename(&lower, upper.join("d".repeat(200))).unwrap();
    let deep = upper.strip_prefix(root).unwrap().join(bottom.strip_prefix(root).unwrap());
    assert_eq!(deep.as_os_str().len(), len);
    deep.into_os_string().into_string().unwrap()
}

const NAMES: [&[u8]; 12] =
    [b"a", b"a-", b"a-b", b"a.b", b"a:b", b"a0", b"a\x01", b"a\n", b"-", b".x", b"\xff\xfe", b"..."];
