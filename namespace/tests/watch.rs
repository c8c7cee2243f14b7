//! What is heard of real directories. Each check is exact: the kernel tells in order, so once a mark written behind
//! an action is heard, all that the action gave was heard. No test here may start a program: between fork and exec it has
//! the files of all others open, and they are closed later than they say.

mod common;

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File, OpenOptions, Permissions},
    io::{Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use namespace::{Heard, Inotify, News, Walk, Watch, WatchError};
use rustix::fs::{AtFlags, CWD, RenameFlags, Timespec, Timestamps};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(10);

/// An arena root that is watched, and a directory beside it that is not.
struct World {
    base: TempDir,
    inotify: Inotify,
    news: News,
    marks: u32,
}

impl World {
    /// `dirs`, ending in `/`, and empty files; all directories watched.
    fn new(entries: &[&str]) -> Self {
        let base = TempDir::new().unwrap();
        let (inotify, news) = Inotify::new(1_000).unwrap();
        let mut world = Self { base, inotify, news, marks: 0 };
        for entry in ["root/", "out/"].into_iter().chain(entries.iter().copied()) {
            let path = world.path(entry);
            fs::create_dir_all(if entry.ends_with('/') { &path } else { path.parent().unwrap() }).unwrap();
            if !entry.ends_with('/') {
                fs::write(path, "").unwrap();
            }
        }
        world.watch("root");
        world
    }

    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.base.path().join(path)
    }

    /// Watches `dir` and all below it, each before it is read.
    fn watch(&mut self, dir: &str) {
        let mut dirs = vec![self.path(dir)];
        while let Some(dir) = dirs.pop() {
            self.inotify.watch(&dir).unwrap();
            let below = fs::read_dir(dir).unwrap().map(Result::unwrap);
            dirs.extend(below.filter(|entry| entry.file_type().unwrap().is_dir()).map(|entry| entry.path()));
        }
    }

    fn recv(&mut self) -> Option<Heard> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let heard = runtime.block_on(async { tokio::time::timeout(DEADLINE, self.news.recv()).await });
        heard.expect("nothing was heard for ten seconds")
    }

    /// The paths heard so far.
    fn heard(&mut self) -> BTreeSet<PathBuf> {
        self.marks += 1;
        let mark = self.path(format!("root/.mark-{}", self.marks));
        File::create(&mark).unwrap();
        let mut heard = BTreeSet::new();
        loop {
            match self.recv() {
                Some(Heard::Changed(path)) if path == mark => return heard,
                Some(Heard::Changed(path)) => {
                    let path = path.strip_prefix(self.base.path()).expect("what is not below").to_owned();
                    // An older mark that was closed.
                    if !path.starts_with("root") || !path.to_string_lossy().contains(".mark-") {
                        heard.insert(path);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// What `action` gives.
    #[track_caller]
    fn check(&mut self, action: impl FnOnce(&dyn Fn(&str) -> PathBuf), expected: &[&str]) {
        let base = self.base.path().to_owned();
        action(&|path| base.join(path));
        let expected: BTreeSet<PathBuf> = expected.iter().map(PathBuf::from).collect();
        assert_eq!(self.heard(), expected);
    }
}

fn chmod(path: PathBuf, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// As `touch -h -d` does.
fn touch(path: PathBuf, seconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[test]
fn files() {
    let mut world = World::new(&["root/a/"]);
    world.check(|at| drop(File::create(at("root/a/f")).unwrap()), &["root/a/f"]);
    world.check(|at| fs::write(at("root/a/f"), "one").unwrap(), &["root/a/f"]);
    let file = File::options().write(true).open(world.path("root/a/f")).unwrap();
    for byte in 0..10 {
        world.check(|_| file.write_all_at(b"x", byte).unwrap(), &["root/a/f"]);
    }
    world.check(|_| drop(file), &["root/a/f"]);
    let append = |path| OpenOptions::new().append(true).open(path).unwrap().write_all(b"more").unwrap();
    world.check(|at| append(at("root/a/f")), &["root/a/f"]);
    let truncate = |path, len| File::options().write(true).open(path).unwrap().set_len(len).unwrap();
    world.check(|at| truncate(at("root/a/f"), 2), &["root/a/f"]);
    world.check(|at| drop(File::create(at("root/a/f")).unwrap()), &["root/a/f"]);
    world.check(|at| chmod(at("root/a/f"), 0o000), &["root/a/f"]);
    world.check(|at| chmod(at("root/a/f"), 0o644), &["root/a/f"]);
    world.check(|at| touch(at("root/a/f"), 981_158_400), &["root/a/f"]);
    world.check(|at| touch(at("root/a/f"), 981_158_400), &["root/a/f"]);
    // Of a file without a name, nothing is told, whoever still writes to it.
    let file = File::create(world.path("root/a/open")).unwrap();
    fs::remove_file(world.path("root/a/open")).unwrap();
    world.heard();
    world.check(|_| file.write_all_at(b"x", 0).unwrap(), &[]);
    world.check(|_| drop(file), &[]);
    let now = std::time::SystemTime::now();
    world.check(|at| File::open(at("root/a/f")).unwrap().set_modified(now).unwrap(), &["root/a/f"]);
    world.check(|at| fs::remove_file(at("root/a/f")).unwrap(), &["root/a/f"]);
    let odd = world.path(OsStr::from_bytes(b"root/a/\xff:\n"));
    fs::write(odd, "x").unwrap();
    let odd = PathBuf::from(OsStr::from_bytes(b"root/a/\xff:\n"));
    assert_eq!(world.heard(), BTreeSet::from([odd]));
}

#[test]
fn reading_is_no_news() {
    let mut world = World::new(&["root/a/b/f", "root/a/g"]);
    fs::write(world.path("root/a/g"), "content").unwrap();
    symlink("g", world.path("root/a/link")).unwrap();
    world.heard();
    world.check(
        |at| {
            assert_eq!(Walk::new(at("root"), Vec::new()).map(Result::unwrap).count(), 6);
            let mut content = String::new();
            File::open(at("root/a/g")).unwrap().read_to_string(&mut content).unwrap();
            File::open(at("root/a")).unwrap().metadata().unwrap();
            assert_eq!(fs::read_to_string(at("root/a/link")).unwrap(), content);
            fs::copy(at("root/a/g"), at("out/copy")).unwrap();
        },
        &[],
    );
    world.watch("root");
    world.check(|_| {}, &[]);
}

#[test]
fn renamed_files() {
    let mut world = World::new(&["root/a/f", "root/b/", "out/x", "out/y"]);
    world.check(|at| fs::rename(at("root/a/f"), at("root/b/g")).unwrap(), &["root/a/f", "root/b/g"]);
    world.check(|at| fs::rename(at("out/x"), at("root/a/x")).unwrap(), &["root/a/x"]);
    world.check(|at| fs::rename(at("root/a/x"), at("out/x")).unwrap(), &["root/a/x"]);
    // "Save": over what was there.
    world.check(|at| fs::rename(at("out/y"), at("root/b/g")).unwrap(), &["root/b/g"]);
}

#[test]
fn links() {
    let mut world = World::new(&["root/a/f", "root/b/", "out/secret"]);
    world.check(|at| fs::hard_link(at("root/a/f"), at("root/b/f")).unwrap(), &["root/b/f"]);
    // A write is told of the name by which the file was opened, alone.
    world.check(|at| fs::write(at("root/b/f"), "x").unwrap(), &["root/b/f"]);
    world.check(|at| symlink("f", at("root/a/link")).unwrap(), &["root/a/link"]);
    world.check(|at| fs::write(at("root/a/link"), "through").unwrap(), &["root/a/f"]);
    world.check(|at| symlink("nothing", at("root/a/new")).unwrap(), &["root/a/new"]);
    let retarget = ["root/a/link", "root/a/new"];
    world.check(|at| fs::rename(at("root/a/new"), at("root/a/link")).unwrap(), &retarget);
    world.check(|at| touch(at("root/a/link"), 981_158_400), &["root/a/link"]);
    world.check(|at| symlink(at("out"), at("root/to-dir")).unwrap(), &["root/to-dir"]);
    world.check(|at| fs::write(at("root/to-dir/secret"), "not ours").unwrap(), &[]);
    world.check(|at| fs::remove_file(at("root/a/link")).unwrap(), &["root/a/link"]);
}

#[test]
fn a_directory_renamed_inside() {
    let mut world = World::new(&["root/a/b/c/f"]);
    world.check(|at| fs::rename(at("root/a/b"), at("root/new")).unwrap(), &["root/a/b", "root/new"]);
    // Where it is now, nobody has watched; and nothing is told of where it was.
    world.check(|at| fs::write(at("root/new/c/f"), "x").unwrap(), &[]);
    world.watch("root/new");
    world.check(|at| fs::write(at("root/new/c/f"), "y").unwrap(), &["root/new/c/f"]);
    world.check(|at| fs::create_dir_all(at("root/a/b/c")).unwrap(), &["root/a/b"]);
    world.watch("root/a");
    world.check(|at| fs::write(at("root/a/b/c/f"), "z").unwrap(), &["root/a/b/c/f"]);
    world.check(|at| fs::write(at("root/new/c/f"), "z").unwrap(), &["root/new/c/f"]);
    // Another name in place, watched before the news are heard.
    fs::rename(world.path("root/new"), world.path("root/newer")).unwrap();
    world.watch("root/newer");
    assert!(world.heard().contains(Path::new("root/newer")));
    world.watch("root/newer");
    world.check(|at| fs::write(at("root/newer/c/g"), "x").unwrap(), &["root/newer/c/g"]);
}

#[test]
fn a_directory_moved_out_and_in() {
    let mut world = World::new(&["root/a/b/f", "out/d/e/g"]);
    world.check(|at| fs::rename(at("root/a"), at("out/a")).unwrap(), &["root/a"]);
    world.check(|at| fs::write(at("out/a/b/f"), "x").unwrap(), &[]);
    world.check(|at| fs::rename(at("out/d"), at("root/a")).unwrap(), &["root/a"]);
    world.watch("root/a");
    world.check(|at| fs::write(at("root/a/e/g"), "x").unwrap(), &["root/a/e/g"]);
    world.check(|at| fs::write(at("out/a/b/f"), "y").unwrap(), &[]);
    world.check(|at| fs::rename(at("root/a"), at("out/d")).unwrap(), &["root/a"]);
    world.check(|at| fs::rename(at("out/a"), at("root/a")).unwrap(), &["root/a"]);
    world.watch("root/a");
    world.check(|at| fs::write(at("root/a/b/f"), "z").unwrap(), &["root/a/b/f"]);
    world.check(|at| fs::write(at("out/d/e/g"), "z").unwrap(), &[]);
}

/// The path is watched already, but by another directory; and that it went was not even heard yet.
#[test]
fn a_directory_replaced_by_another() {
    let mut world = World::new(&["root/a/b/f"]);
    for round in 0..100 {
        if round % 2 == 0 {
            fs::rename(world.path("root/a"), world.path(format!("out/{round}"))).unwrap();
        } else {
            fs::remove_dir_all(world.path("root/a")).unwrap();
        }
        fs::create_dir_all(world.path("root/a/b")).unwrap();
        world.watch("root/a");
        fs::write(world.path("root/a/f"), "x").unwrap();
        fs::write(world.path("root/a/b/f"), "x").unwrap();
        let heard = world.heard();
        for path in ["root/a", "root/a/f", "root/a/b/f"] {
            assert!(heard.contains(Path::new(path)), "{round}: {heard:?}");
        }
        if round % 2 == 0 {
            world.check(|at| fs::write(at(&format!("out/{round}/b/f")), "x").unwrap(), &[]);
        }
    }
}

#[test]
fn deleted_and_made_again() {
    let mut world = World::new(&["root/a/b/f", "root/a/g"]);
    let tree = ["root/a", "root/a/b", "root/a/b/f", "root/a/g"];
    for _ in 0..3 {
        world.check(|at| fs::remove_dir_all(at("root/a")).unwrap(), &tree);
        world.check(|at| fs::create_dir(at("root/a")).unwrap(), &["root/a"]);
        world.watch("root/a");
        world.check(|at| fs::create_dir(at("root/a/b")).unwrap(), &["root/a/b"]);
        world.watch("root/a/b");
        world.check(|at| fs::write(at("root/a/b/f"), "x").unwrap(), &["root/a/b/f"]);
        world.check(|at| fs::write(at("root/a/g"), "x").unwrap(), &["root/a/g"]);
    }
    world.check(|at| chmod(at("root/a"), 0o000), &["root/a"]);
    world.check(|at| chmod(at("root/a"), 0o755), &["root/a"]);
    world.check(|at| fs::write(at("root/a/g"), "y").unwrap(), &["root/a/g"]);
}

#[test]
fn a_file_becomes_a_directory_and_back() {
    let mut world = World::new(&["root/x"]);
    let become_dir = |at: &dyn Fn(&str) -> PathBuf| {
        fs::remove_file(at("root/x")).unwrap();
        fs::create_dir(at("root/x")).unwrap();
    };
    world.check(become_dir, &["root/x"]);
    world.watch("root/x");
    world.check(|at| fs::write(at("root/x/f"), "x").unwrap(), &["root/x/f"]);
    let become_file = |at: &dyn Fn(&str) -> PathBuf| {
        fs::remove_dir_all(at("root/x")).unwrap();
        fs::write(at("root/x"), "x").unwrap();
    };
    world.check(become_file, &["root/x", "root/x/f"]);
    world.check(|at| fs::write(at("root/x"), "y").unwrap(), &["root/x"]);
}

#[test]
fn a_file_and_a_directory_swap_places() {
    let mut world = World::new(&["root/a/b/f", "root/x"]);
    let swap = |at: &dyn Fn(&str) -> PathBuf| {
        rustix::fs::renameat_with(CWD, at("root/a"), CWD, at("root/x"), RenameFlags::EXCHANGE).unwrap();
    };
    for (dir, file) in [("root/x", "root/a"), ("root/a", "root/x")] {
        world.check(swap, &["root/a", "root/x"]);
        world.watch(dir);
        let inside = format!("{dir}/b/f");
        world.check(|at| fs::write(at(&inside), "x").unwrap(), &[&inside]);
        world.check(|at| fs::write(at(file), "x").unwrap(), &[file]);
    }
}

#[test]
fn the_root_itself() {
    let mut world = World::new(&["root/a/"]);
    let other = TempDir::new().unwrap();
    fs::create_dir_all(other.path().join("arena/sub")).unwrap();
    let arena = other.path().join("arena");
    let changed = |world: &mut World, action: &dyn Fn()| {
        action();
        while world.recv().expect("the news go on") != Heard::Changed(arena.clone()) {}
    };
    world.inotify.watch(&arena).unwrap();
    changed(&mut world, &|| chmod(arena.clone(), 0o700));
    changed(&mut world, &|| fs::rename(&arena, other.path().join("moved")).unwrap());
    world.check(|_| fs::write(other.path().join("moved/f"), "x").unwrap(), &[]);
    fs::create_dir(&arena).unwrap();
    world.inotify.watch(&arena).unwrap();
    changed(&mut world, &|| fs::remove_dir(&arena).unwrap());
}

#[test]
fn what_cannot_be_watched() {
    let mut world = World::new(&["root/f"]);
    symlink("root", world.path("link")).unwrap();
    for gone in ["nothing", "root/f", "root/f/below", "link"] {
        let dir = world.path(gone);
        let refused = world.inotify.watch(&dir);
        assert!(matches!(&refused, Err(WatchError::Gone { dir: named }) if *named == dir), "{gone}: {refused:?}");
    }
    for bad in ["relative", "/a\0b"] {
        assert!(matches!(world.inotify.watch(Path::new(bad)), Err(WatchError::Io { .. })), "{bad}");
    }
}

/// Nobody listens until there is more than can wait; then all of it is one `Lost`, and it goes on.
#[test]
fn more_than_can_wait() {
    let mut world = World::new(&[]);
    (world.inotify, world.news) = Inotify::new(2).unwrap();
    world.watch("root");
    let started = Instant::now();
    let mut write = (0..).map(|n| {
        assert!(started.elapsed() < DEADLINE, "not heard");
        let path = world.base.path().join(format!("root/{n}"));
        fs::write(&path, "x").unwrap();
        path
    });
    let lost = |news: &mut News| std::iter::from_fn(|| news.try_recv()).any(|heard| heard == Heard::Lost);
    while !lost(&mut world.news) {
        assert!(write.by_ref().take(100).count() == 100);
    }
    let mut written = BTreeSet::new();
    loop {
        written.extend(write.next());
        match world.news.try_recv() {
            Some(Heard::Changed(path)) if written.contains(&path) => return,
            _ => continue,
        }
    }
}

#[test]
fn dropping_it_ends_the_news() {
    let mut world = World::new(&[]);
    world.heard();
    (world.inotify, _) = Inotify::new(1).unwrap();
    while let Some(heard) = world.recv() {
        assert_ne!(heard, Heard::Lost);
    }
}
