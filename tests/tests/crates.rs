//! Versions of real packages that are unpacked over each other: all of their files have one mtime, that of 2006, and so
//! sizes and mtimes do not tell what changed.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use tests::{Item, Machine, QUICK, Scratch, indexed, skipped, wait_for};
use tree::BlobId;

/// Files by path below the arena: size, mtime, and blob id of the bytes.
type Files = BTreeMap<PathBuf, (u64, i64, BlobId)>;

/// Unpacks, five times in turn, two versions of each package in the directory `CRATES` over each other while the daemon watches. At
/// the end of each unpacking the daemon publishes what the archives have, and finds no damage.
#[test]
fn versions_are_unpacked_over_each_other() {
    let Some(dir) = env::var_os("CRATES") else {
        return skipped("it is for longer runs: CRATES names a directory with packages");
    };
    let pairs = pairs(Path::new(&dir));
    assert!(!pairs.is_empty(), "{dir:?} has no two versions of one package");
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let versions = [0, 1].map(|version| -> Vec<_> { pairs.values().map(|pair| &pair[version]).collect() });
    // What the archives have, read from where no daemon looks.
    let expected = [0, 1].map(|version| {
        let aside = scratch.dir(&format!("aside {version}"));
        unpack(&versions[version], &aside);
        read(&aside)
    });
    unpack(&versions[0], &root);
    let started = Instant::now();
    let a = Machine::up_with_config(&scratch, "a", &[&root], QUICK);
    let mut known = read(&root);
    let (mut replaced, mut same_looks) = (0, 0);
    for turn in 0..TURNS {
        let version = (turn + 1) % 2;
        unpack(&versions[version], &root);
        let now = read(&root);
        for (path, file) in &expected[version] {
            assert_eq!(now.get(path), Some(file), "{path:?} has the bytes of its archive");
        }
        for (path, (size, mtime, blob)) in &now {
            if let Some(before) = known.get(path).filter(|before| before.2 != *blob) {
                replaced += 1;
                same_looks += u64::from((before.0, before.1) == (*size, *mtime));
            }
        }
        let (mut wrong, began) = (Vec::new(), Instant::now());
        wait_for("all that was unpacked is published", LIMIT, || {
            let listed = listed(&a);
            wrong =
                now.iter().filter(|(path, file)| listed.get(*path) != Some(&file.2)).map(|(path, _)| path).collect();
            wrong.extend(now.keys().filter(|_| listed.len() != now.len()).take(1));
            let is_late = began.elapsed() > LIMIT * 9 / 10;
            if is_late && !wrong.is_empty() {
                eprintln!("not published as they are: {:?}", &wrong[..wrong.len().min(20)]);
            }
            wrong.is_empty().then_some(())
        });
        a.rests();
        let found = a.ok(["verify", "--json"]).summary();
        assert_eq!((&found["damaged_files"], &found["suspect_files"]), (&0.into(), &0.into()), "{found}");
        assert!(read(&root) == now, "what is on the disk is still what was unpacked");
        println!(
            "turn {turn}: {} packages, {} files, {replaced} replaced so far, {same_looks} of them with the same size and mtime, \
             0 wrong, 0 damaged, 0 suspect, {:.1?}",
            pairs.len(),
            now.len(),
            started.elapsed()
        );
        known = now;
    }
    assert!(same_looks > 0, "no file was replaced by one that looks the same");
}

/// Packages of which there are two versions, by name; at most [`PAIRS_MAX`].
fn pairs(dir: &Path) -> BTreeMap<String, [PathBuf; 2]> {
    let mut versions: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let files = fs::read_dir(dir).expect("read the directory of packages").map(|entry| entry.expect("read it").path());
    for path in files.filter(|path| path.extension().is_some_and(|extension| extension == "crate")) {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let at =
            stem.match_indices('-').find(|(at, _)| stem[at + 1..].starts_with(|first: char| first.is_ascii_digit()));
        versions.entry(stem[..at.map_or(stem.len(), |(at, _)| at)].to_owned()).or_default().push(path);
    }
    let pairs = versions.into_iter().filter_map(|(name, mut paths)| {
        paths.sort();
        Some((name, [paths.first()?.clone(), paths.get(1)?.clone()]))
    });
    pairs.take(PAIRS_MAX).collect()
}

/// Unpacks packages below `root`, each into a directory of its name without the version.
fn unpack(packages: &[&PathBuf], root: &Path) {
    for package in packages {
        let stem = package.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name: String = stem
            .split('-')
            .take_while(|part| !part.starts_with(|first: char| first.is_ascii_digit()))
            .collect::<Vec<_>>()
            .join("-");
        let dir = root.join(name);
        fs::create_dir_all(&dir).expect("make a directory");
        let mut tar = Command::new("tar");
        tar.args(["-xz", "--strip-components=1", "--no-same-owner", "-C"]).arg(&dir);
        let status = tar.stdin(File::open(package).expect("open a package")).status().expect("start tar");
        assert!(status.success(), "{package:?}: {status}");
    }
}

fn read(root: &Path) -> Files {
    let files = indexed(root).into_iter().filter(|(_, item)| matches!(item, Item::File { .. }));
    let read = |path: Vec<u8>| {
        let path = PathBuf::from(String::from_utf8(path).expect("packages have names in UTF-8"));
        let meta = fs::metadata(root.join(&path)).expect("look at a file");
        let blob = BlobId::of(&fs::read(root.join(&path)).expect("read a file"));
        (path, (meta.len(), meta.mtime(), blob))
    };
    files.map(|(path, _)| read(path)).collect()
}

fn listed(machine: &Machine) -> BTreeMap<PathBuf, BlobId> {
    let files = machine.listed("docs").into_iter().filter_map(|(path, item)| match item {
        Item::File { blob, .. } => Some((PathBuf::from(String::from_utf8(path).ok()?), blob.to_string())),
        _ => None,
    });
    files.map(|(path, blob)| (path, blob.parse().expect("it is a blob id"))).collect()
}

const TURNS: usize = 5;
const PAIRS_MAX: usize = 100;
const LIMIT: Duration = Duration::from_secs(120);
