//! What rots while it is watched is never taken for an edit, whatever happens to the file next.

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use fastrand::Rng;
use tests::{GROUP_BYTES, Machine, Scratch, path_of, ranges_of, wait_for, write_random};

use crate::{LIMIT, Watched, history, listed, seq, shows};

const SIZE: u64 = 5 * GROUP_BYTES;

/// Watched files that can rot.
fn files(names: &[&str]) -> Option<Watched> {
    let build = |root: &Path| {
        let mut rng = Rng::with_seed(1);
        for name in names {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            write_random(&root.join(name), SIZE, &mut rng);
        }
    };
    Some(Watched::on(Scratch::that_rots()?, build))
}

/// The files that `verify` finds to have other bytes than they should, whether rot is certain or a program may have been
/// at it.
fn unsound(machine: &Machine) -> BTreeSet<String> {
    let found = machine.exits(4, ["verify", "--json"]);
    let lines = ["damage", "suspect"].map(|kind| found.of_type(kind)).concat();
    lines.iter().map(|line| String::from_utf8(path_of(line)).unwrap()).collect()
}

/// Rot is no event: nothing is published, verify finds it, and mending is not published either.
#[test]
fn rotted_and_repaired() {
    let Some(w) = files(&["dir/rots", "sound"]) else { return };
    let b = w.other();
    b.ok(["get", "docs", w.scratch.path("copy").to_str().unwrap()]);
    b.ok(["arena", "add", "copy", w.scratch.path("copy").to_str().unwrap()]);
    w.a.hears(&b);
    let (before, shown) = (seq(&w.a), listed(&w.a));
    w.scratch.rot(&w.path("dir/rots"), &[3 * GROUP_BYTES]);
    w.a.rests();
    assert_eq!(seq(&w.a), before);
    let damage = w.a.exits(4, ["verify", "--json"]).of_type("damage");
    assert_eq!(ranges_of(&damage[0]), [(3 * GROUP_BYTES, 4 * GROUP_BYTES)]);
    assert_eq!(w.a.ok(["repair", "--json"]).summary()["repaired_files"], 1);
    w.a.rests();
    assert_eq!((seq(&w.a), listed(&w.a)), (before, shown), "mending is no news");
    shows(&w.a, &w.root);
    w.a.ok(["verify"]);
}

/// Renamed, touched by chmod and linked anew after it rotted, whether that was known or not.
#[test]
fn and_is_renamed_and_chmodded_and_linked() {
    for known in [false, true] {
        let names = ["renamed", "chmodded", "linked", "dir/moved with its directory", "replaced"];
        let Some(w) = files(&names) else { return };
        let b = w.other();
        let (before, sound) = (seq(&w.a), listed(&w.a));
        let blob = |said: &str| said.split(", ").nth(1).expect("it is a file").to_owned();
        let blobs: Vec<_> = sound.values().filter(|said| said.starts_with("file")).map(|said| blob(said)).collect();
        for name in names {
            w.scratch.rot(&w.path(name), &[3 * GROUP_BYTES]);
        }
        if known {
            assert_eq!(unsound(&w.a), BTreeSet::from(names.map(str::to_owned)));
        }
        fs::rename(w.path("renamed"), w.path("new name")).unwrap();
        fs::set_permissions(w.path("chmodded"), Permissions::from_mode(0o600)).unwrap();
        fs::hard_link(w.path("linked"), w.path("second name")).unwrap();
        fs::rename(w.path("dir"), w.path("new dir")).unwrap();
        fs::write(w.scratch.path("sound"), "replaced by a sound file").unwrap();
        fs::rename(w.scratch.path("sound"), w.path("replaced")).unwrap();
        wait_for("the replacement is known", LIMIT, || {
            (w.a.run(["cat", "docs/replaced"]).stdout == b"replaced by a sound file").then_some(())
        });
        w.a.rests();
        let replaced = blake3::hash(b"replaced by a sound file").to_string();
        for change in history(&w.a, before) {
            if let Some(said) = change["blob"].as_str() {
                let path = String::from_utf8(path_of(&change)).unwrap();
                let is_true = blobs.iter().any(|blob| blob == said) || said == replaced;
                assert!(is_true, "known: {known}; rotten bytes were published: {path}");
            }
        }
        let mut unsound = unsound(&w.a);
        unsound.remove("second name");
        let expected = ["chmodded", "linked", "new dir/moved with its directory", "new name"];
        assert_eq!(unsound, BTreeSet::from(expected.map(str::to_owned)), "known: {known}");
        b.hears(&w.a);
        assert_eq!(b.ok(["cat", "docs/replaced"]).stdout, b"replaced by a sound file");
    }
}
