//! Anything in any order, with a seed, and a daemon that is killed now and then.

use std::{
    fs::{self, File, Permissions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    thread::{panicking, sleep},
    time::Duration,
};

use fastrand::Rng;
use tests::{Mtime, set_mtime};

use crate::{Watched, shows, write};

/// Names the seed if the test fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if panicking() {
            eprintln!("--- run it again with BLOBD_TEST_SEED={}", self.0);
        }
    }
}

#[test]
fn two_hundred_operations() {
    let seed = std::env::var("BLOBD_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = Seed(seed.unwrap_or_else(|| fastrand::u64(..1_000_000)));
    let mut rng = Rng::with_seed(seed.0);
    let w = Watched::new(|root| {
        for number in 0..60 {
            let path = root.join(format!("{}/{}/{number}", "abc".as_bytes()[number % 3] as char, number % 7));
            write(path.clone(), number.to_string());
            // One that takes another's place, with its mtime, while no daemon watches, would be suspect.
            set_mtime(&path, Mtime(1_000_000_000 + number as i64, 0));
        }
    });
    let b = w.other();
    for step in 0..200 {
        operate(&w.root, &w.scratch.dir("outside"), &mut rng);
        match rng.u32(..100) {
            0..70 => {}
            70..90 => sleep(Duration::from_millis(rng.u64(..50))),
            90..97 => sleep(Duration::from_millis(rng.u64(..600))),
            _ => {
                eprintln!("killed at {step}");
                w.a.kill9();
                (0..rng.u32(..5)).for_each(|_| operate(&w.root, &w.scratch.dir("outside"), &mut rng));
                w.a.restart_in_place();
            }
        }
    }
    w.shows_all();
    w.a.rests();
    w.shows_all();
    shows(&b, &w.root);
    assert_eq!(w.a.ok(["arena", "scan", "--json"]).summary()["suspected"], 0);
    w.a.ok(["verify"]);
}

/// One operation on entries picked by chance; many are refused, and do nothing.
fn operate(root: &Path, outside: &Path, rng: &mut Rng) {
    let all = everything(root);
    let pick = |rng: &mut Rng| rng.choice(&all).cloned().unwrap_or_else(|| root.join("first"));
    let one = pick(rng);
    let dir = if one.is_dir() && !one.is_symlink() { one.clone() } else { one.parent().unwrap_or(root).to_owned() };
    let new = dir.join(format!("n{}", rng.u32(..40)));
    let bytes: Vec<u8> = (0..rng.usize(..2000)).map(|_| rng.u8(..)).collect();
    // Of the other names of what is written to, nobody hears.
    let is_alone = |path: &Path| fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.nlink() == 1);
    let _ = match rng.u32(..18) {
        0..3 if is_alone(&new) || !new.exists() => fs::write(&new, bytes),
        0..3 => Ok(()),
        3 => fs::create_dir(&new),
        4 => symlink("somewhere", &new),
        5 => fs::hard_link(&one, &new),
        6..9 => fs::rename(&one, &new),
        9 => fs::rename(&one, pick(rng)),
        10 => fs::rename(&one, outside.join(rng.u32(..10).to_string())),
        11 => fs::rename(outside.join(rng.u32(..10).to_string()), &new),
        12 if !one.is_dir() => fs::remove_file(&one),
        12 => fs::remove_dir_all(&one),
        13 if new.is_dir() || is_alone(&new) => {
            fs::set_permissions(&new, Permissions::from_mode(if rng.bool() { 0o600 } else { 0o755 }))
        }
        14 if is_alone(&one) && !one.is_symlink() => {
            set_mtime(&one, Mtime(rng.i64(-10..2_000_000_000), rng.i64(0..1_000_000_000)));
            Ok(())
        }
        15 if is_alone(&one) => File::options().append(true).open(&one).and_then(|mut file| file.write_all(b"more")),
        16 if is_alone(&one) => {
            File::options().write(true).open(&one).and_then(|file| file.write_all_at(b"changed", 0))
        }
        _ => fs::write(root.join(".tmp"), &bytes).and_then(|()| fs::rename(root.join(".tmp"), &one)),
    };
}

fn everything(dir: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    let dirs: Vec<_> = entries.iter().filter(|path| path.is_dir() && !path.is_symlink()).cloned().collect();
    entries.extend(dirs.iter().flat_map(|dir| everything(dir)));
    entries
}
