//! Whoever follows the rule (watch, then read; when told of a path, watch and read it and all below it again) knows in
//! the end what is there, whatever happened meanwhile, and however fast.

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use namespace::{Heard, Inotify, News, Watch, WatchError};
use rustix::fs::{CWD, RenameFlags};
use tempfile::TempDir;

use crate::common::for_seeds;

/// Inode, size and mtime of a file; nothing of a directory.
type Seen = BTreeMap<PathBuf, Option<(u64, u64, i64, i64)>>;

#[test]
fn what_is_followed_is_known() {
    for_seeds(30, |rng| follow(rng, 100_000));
}

/// Most of the news do not fit, and become `Lost`.
#[test]
fn what_is_lost_is_known_too() {
    for_seeds(30, |rng| follow(rng, 3));
}

fn follow(mut rng: fastrand::Rng, news_max: usize) {
    let base = TempDir::new().unwrap();
    let root = base.path().join("root");
    fs::create_dir_all(&root).unwrap();
    fs::create_dir_all(base.path().join("out")).unwrap();
    let (mut inotify, mut news) = Inotify::new(news_max).unwrap();
    let mut known = Seen::new();
    look(&root, &mut known, &mut Some(&mut inotify));
    let mut watcher = Watcher { inotify, root: root.clone() };

    let writer = thread::spawn({
        let base = base.path().to_owned();
        move || (0..400).for_each(|_| change(&mut rng, &base))
    });
    while !writer.is_finished() {
        match news.try_recv() {
            Some(heard) => watcher.take(&heard, &mut known),
            None => thread::yield_now(),
        }
    }
    writer.join().unwrap();
    watcher.until_heard(&mut news, &mut known, &root.join("mark"));

    let mut there = Seen::new();
    look(&root, &mut there, &mut None);
    assert_eq!(known, there);
    // And no directory is watched no longer.
    let dirs: Vec<PathBuf> = known.iter().filter(|(_, file)| file.is_none()).map(|(dir, _)| dir.clone()).collect();
    for dir in dirs {
        watcher.until_heard(&mut news, &mut known, &dir.join("file"));
    }
}

struct Watcher {
    inotify: Inotify,
    root: PathBuf,
}

impl Watcher {
    fn take(&mut self, heard: &Heard, known: &mut Seen) {
        let path = match heard {
            Heard::Changed(path) => path,
            Heard::Lost => &self.root,
        };
        look(path, known, &mut Some(&mut self.inotify));
    }

    /// Writes `file` and takes what is heard until it was heard of, and nothing more is.
    fn until_heard(&mut self, news: &mut News, known: &mut Seen, file: &Path) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        fs::write(file, "mark").unwrap();
        loop {
            let heard = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), news.recv()).await });
            let heard = heard.unwrap_or_else(|_| panic!("not heard of: {file:?}")).unwrap();
            self.take(&heard, known);
            match heard {
                Heard::Changed(path) if path == file => break,
                Heard::Changed(_) => {}
                // That may have been the file, and may have been before it.
                Heard::Lost => fs::write(file, "again").unwrap(),
            }
        }
        // What watching itself tells is behind it; and it comes to an end.
        let started = Instant::now();
        while let Some(heard) = news.try_recv() {
            self.take(&heard, known);
            assert!(started.elapsed() < Duration::from_secs(10), "always more: {heard:?}");
        }
    }
}

/// Learns anew what is at `path` and below it.
fn look(path: &Path, known: &mut Seen, watch: &mut Option<&mut Inotify>) {
    known.retain(|seen, _| !seen.starts_with(path));
    let Ok(metadata) = fs::symlink_metadata(path) else { return };
    if !metadata.is_dir() {
        let file = (metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec());
        known.insert(path.to_owned(), Some(file));
        return;
    }
    if let Some(watch) = watch {
        match watch.watch(path) {
            Ok(()) => {}
            Err(WatchError::Gone { .. }) => return,
            Err(error) => panic!("{error:?}"),
        }
    }
    known.insert(path.to_owned(), None);
    let Ok(below) = fs::read_dir(path) else { return };
    below.map_while(Result::ok).for_each(|entry| look(&entry.path(), known, watch));
}

/// Something that may also fail.
fn change(rng: &mut fastrand::Rng, base: &Path) {
    let mut any = || {
        let depth = rng.usize(1..4);
        let names: PathBuf = (0..depth).map(|_| ["a", "b", "c"][rng.usize(..3)]).collect();
        base.join(if rng.u8(..5) == 0 { "out" } else { "root" }).join(names)
    };
    let (path, other) = (any(), any());
    let _ = match rng.u8(..10) {
        0 | 1 => fs::create_dir_all(path),
        2 | 3 => fs::write(path, "x".repeat(rng.usize(..9))),
        4 | 5 => fs::rename(path, other),
        6 => fs::remove_file(path),
        7 => fs::remove_dir_all(path),
        8 => File::open(path).and_then(|file| file.set_modified(SystemTime::now())),
        _ => rustix::fs::renameat_with(CWD, path, CWD, other, RenameFlags::EXCHANGE).map_err(Into::into),
    };
}
