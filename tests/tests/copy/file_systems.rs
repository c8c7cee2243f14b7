//! Destinations on file systems that cannot do what Linux's own can: no files without a name, no renaming without replacing,
//! no second names, no modes.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use tests::{Mtime, Scratch, indexed, random_bytes, set_mtime, skipped};

use crate::{failures, open, trees::nothing_is_left};

/// A file system that is mounted until this is dropped.
struct Mounted {
    dir: PathBuf,
    device: Option<String>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &["-l".as_ref(), &self.dir]);
        if let Some(device) = &self.device {
            run("losetup", &["-d".as_ref(), device.as_ref()]);
        }
    }
}

/// What a program said, if it could be run and succeeded.
fn run(program: &str, args: &[&Path]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Another directory, by way of FUSE: second names, and nothing else of what is asked for.
fn bindfs(scratch: &Scratch) -> Option<Mounted> {
    let (beneath, dir) = (scratch.dir("beneath"), scratch.dir("bindfs"));
    run("bindfs", &[&beneath, &dir])?;
    Some(Mounted { dir, device: None })
}

/// exFAT by way of FUSE: files have one name and no modes, and times are rounded.
fn exfat(scratch: &Scratch) -> Option<Mounted> {
    let (image, dir) = (scratch.path("image"), scratch.dir("exfat"));
    fs::File::create(&image).ok()?.set_len(64 << 20).ok()?;
    run("mkfs.exfat", &[&image])?;
    let device = run("losetup", &["-f".as_ref(), "--show".as_ref(), &image])?;
    let mounted = Mounted { dir, device: Some(device.clone()) };
    run("mount.exfat-fuse", &[device.as_ref(), &mounted.dir])?;
    Some(mounted)
}

/// A tree is copied, again, in place of others, got and moved to `dir`; a file that is in the way stays.
fn everything_arrives(scratch: &Scratch, dir: &Path, has_modes: bool) {
    let (docs, inbox) = (scratch.dir("docs"), dir.join("inbox"));
    fs::create_dir(&inbox).unwrap();
    let mut rng = fastrand::Rng::with_seed(3);
    for (name, bytes) in
        [("d/small", 9), ("d/e/middle", 300_000), ("large", 2_500_000), ("empty", 0), ("in the way", 7)]
    {
        let path = docs.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, random_bytes(bytes, &mut rng)).unwrap();
        set_mtime(&path, Mtime(1_600_000_000, 0));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    }
    fs::hard_link(docs.join("large"), docs.join("d/large too")).unwrap();
    fs::write(inbox.join("in the way"), b"mine").unwrap();
    let bytes = |root: &Path| -> Vec<_> {
        let files = indexed(root).into_keys().map(|path| root.join(String::from_utf8(path).unwrap()));
        files.filter(|path| path.is_file()).map(|path| (fs::read(&path).unwrap(), path)).collect()
    };
    let original: Vec<_> =
        bytes(&docs).into_iter().map(|(bytes, path)| (bytes, path.strip_prefix(&docs).unwrap().to_owned())).collect();
    let arrived = |root: &Path, but: Option<&str>| {
        for (bytes, path) in original.iter().filter(|(_, path)| but.is_none_or(|but| path != Path::new(but))) {
            assert!(fs::read(root.join(path)).unwrap() == *bytes, "{path:?}");
            assert_eq!(fs::metadata(root.join(path)).unwrap().mtime(), 1_600_000_000, "{path:?}");
        }
    };
    let (a, b) = (open(scratch, "a", &docs), open(scratch, "b", &inbox));
    a.join(&b);
    let output = a.exits(3, ["cp", "--json", "docs", "b:inbox"]);
    assert_eq!(failures(&output).len(), 1, "{}", output.text());
    assert_eq!(fs::read(inbox.join("in the way")).unwrap(), b"mine");
    arrived(&inbox, Some("in the way"));
    let without = output.summary()["files_without_permissions"].as_u64().unwrap();
    assert_eq!(without > 0, !has_modes, "{}", output.text());
    // Where the system remembers a file's times for a while, it may not look like the one that was placed.
    assert!(output.summary()["hard_links"].as_u64().unwrap() <= u64::from(has_modes));
    b.rests();
    let summary = a.exits(3, ["cp", "--json", "docs", "b:inbox"]).summary();
    assert_eq!(summary["bytes_sent"], 0, "{summary}");
    a.ok(["cp", "--overwrite", "docs", "b:inbox"]);
    arrived(&inbox, None);
    let got = dir.join("got");
    a.ok(["get", "docs", got.to_str().unwrap()]);
    arrived(&got, None);
    a.ok(["mv", "docs", "b:inbox"]);
    arrived(&inbox, None);
    assert_eq!(fs::read_dir(&docs).unwrap().count(), 0);
    b.rests();
    assert_eq!(b.ok(["verify", "--json"]).json().len(), 1);
    nothing_is_left(&b, &inbox);
}

#[test]
fn a_file_system_by_way_of_fuse() {
    let scratch = Scratch::new();
    match bindfs(&scratch) {
        Some(mounted) => everything_arrives(&scratch, &mounted.dir, true),
        None => skipped("bindfs cannot be mounted"),
    }
}

#[test]
fn deleted_by_way_of_fuse_and_still_open() {
    let scratch = Scratch::new();
    let Some(mounted) = bindfs(&scratch) else { return skipped("bindfs cannot be mounted") };
    let path = mounted.dir.join("x");
    fs::write(&path, b"soon gone").unwrap();
    let a = open(&scratch, "a", &mounted.dir);
    let skipped = || a.ok(["status", "--skipped", "--json"]).json();
    let file = fs::File::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let hidden = fs::read_dir(&mounted.dir).unwrap().next().unwrap().unwrap().file_name();
    a.ok(["arena", "scan"]);
    assert_eq!(skipped()[0]["path"].as_str(), hidden.to_str());
    assert_eq!(a.ok(["verify", "--json"]).summary()["files"], 0);
    drop(file);
    a.ok(["arena", "scan"]);
    assert!(skipped().is_empty());
}

#[test]
fn a_file_system_whose_files_have_one_name() {
    let scratch = Scratch::new();
    match exfat(&scratch) {
        Some(mounted) => everything_arrives(&scratch, &mounted.dir, false),
        None => skipped("exFAT cannot be mounted"),
    }
}
