//! `blob cp` and `blob mv`, on the real programs: what arrives, what stays, what is refused, and that nothing is lost,
//! whatever happens meanwhile.

mod file_systems;
mod kept;
mod kills;
mod meanwhile;
mod moves;
mod names;
mod orders;
mod roles;
mod rounds;
mod small;
mod trees;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tests::{Item, Machine, Mtime, Output, QUICK, Scratch, Tree, indexed, random_bytes, set_mtime};

/// What lets machines of these names write anywhere.
const WRITERS: &str = "[roles]\na = { writer = [\"*\"] }\nb = { writer = [\"*\"] }\nc = { writer = [\"*\"] }\n";

/// A machine that lets a, b and c write, and holds an arena named as the last component of `root`.
fn open(scratch: &Scratch, name: &str, root: &Path) -> Machine {
    Machine::up_with_config(scratch, name, &[root], &format!("{QUICK}{WRITERS}"))
}

/// Two that know each other: a with `docs`, b with `inbox`; and the roots of these.
fn two(scratch: &Scratch) -> (Machine, PathBuf, Machine, PathBuf) {
    let (docs, inbox) = (scratch.dir("docs"), scratch.dir("inbox"));
    let (a, b) = (open(scratch, "a", &docs), open(scratch, "b", &inbox));
    a.join(&b);
    (a, docs, b, inbox)
}

/// A tree with everything that a tree may have that is hard to bring over: 3 MB.
fn hard_tree(root: &Path) {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut write = |path: &str, bytes: usize, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, random_bytes(bytes as u64, &mut rng)).unwrap();
        set_mtime(&path, Mtime(1_500_000_000 + bytes as i64, 123_456_789));
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    write("small", 5, 0o644);
    write("empty", 0, 0o600);
    write("d/group", 16384, 0o640);
    write("d/e/just behind", 16385, 0o755);
    write("d-before/d", 1000, 0o444);
    write("large", 2_900_000, 0o664);
    write("a:b\n", 77, 0o604);
    {
        use std::os::unix::ffi::OsStrExt;
        let odd = root.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8"));
        fs::write(odd, b"odd").unwrap();
    }
    fs::create_dir_all(root.join("hollow/inner")).unwrap();
    std::os::unix::fs::symlink("../large", root.join("d/link")).unwrap();
    std::os::unix::fs::symlink("leads nowhere", root.join("broken")).unwrap();
}

/// How many files and links a tree has.
fn leaves(tree: &Tree) -> u64 {
    tree.values().filter(|item| !matches!(item, Item::Directory)).count() as u64
}

#[track_caller]
fn same(expected: &Tree, root: &Path) {
    assert_eq!(tests::differences(expected, &indexed(root)), [""; 0]);
}

/// The `failed` lines, each with its reason.
fn failures(output: &Output) -> Vec<(String, String)> {
    let text = |line: &Value, field: &str| line[field].as_str().unwrap_or_default().to_owned();
    output.of_type("failed").iter().map(|line| (text(line, "source"), text(line, "reason"))).collect()
}
