use std::{
    collections::BTreeSet,
    ffi::OsStr,
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};

use super::{News, SharedSigns, Signs, Teller, Watch, WatchError, dirs::Dirs, news};

/// Watches directories by inotify, with one thread that hears.
///
/// Opening and reading are no news. A file that is open and unlinked is none either. If the thread fails, which it
/// has no reason to, the news end, and nothing more can be watched. Dropping it ends the thread, which then ends the
/// news; nobody waits for it.
#[derive(Debug)]
pub struct Inotify(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    teller: Teller,
    signs: SharedSigns,
    /// Wakes the thread.
    wake: OwnedFd,
    stop: AtomicBool,
}

/// Invariant: a watch that is removed, or whose path is forgotten, is told as changed, or as lost, afterwards.
#[derive(Debug)]
struct State {
    /// The thread waits on it without the lock.
    fd: Arc<OwnedFd>,
    dirs: Dirs,
    /// Watches with a path no longer, to be removed from `fd`.
    doomed: BTreeSet<i32>,
}

impl Inotify {
    /// Watches nothing yet. At most `news_max` paths wait to be heard.
    ///
    /// Fails if the system gives no inotify instance (fs.inotify.max_user_instances), file or thread.
    pub fn new(news_max: usize) -> io::Result<(Self, News)> {
        let (teller, news) = news(news_max);
        let state = State { fd: Arc::new(instance()?), dirs: Dirs::default(), doomed: BTreeSet::new() };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            teller,
            signs: SharedSigns::default(),
            wake,
            stop: AtomicBool::new(false),
        });
        let hearing = Arc::clone(&shared);
        thread::Builder::new().name("watch".to_owned()).spawn(move || hearing.run())?;
        Ok((Self(shared), news))
    }
}

impl Watch for Inotify {
    fn watch(&mut self, dir: &Path) -> Result<(), WatchError> {
        let failed = |source| WatchError::Io { dir: dir.to_owned(), source };
        if !dir.is_absolute() {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let mut state = self.0.state();
        if self.0.teller.is_ended() {
            return Err(failed(io::Error::other("the thread that hears has ended")));
        }
        // The lock is held from here until the path is known: nothing of this watch is heard before.
        let watch = match inotify::add_watch(&*state.fd, dir, WATCHED) {
            Ok(watch) => watch,
            Err(Errno::NOSPC) => return Err(WatchError::Full { dir: dir.to_owned() }),
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(WatchError::Gone { dir: dir.to_owned() }),
            Err(error) => return Err(failed(error.into())),
        };
        state.doomed.remove(&watch);
        let stale = state.dirs.insert(watch, dir);
        if !stale.is_empty() {
            state.doomed.extend(stale);
            self.0.teller.changed(dir.to_owned());
            self.0.wake();
        }
        Ok(())
    }

    fn signs(&mut self) -> SharedSigns {
        // If the kernel's queue cannot be read now, the thread says so.
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
        while self.0.hear_now(&mut buffer) == Ok(true) {}
        self.0.signs.clone()
    }
}

impl Drop for Inotify {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Release);
        self.0.wake();
    }
}

impl Shared {
    /// Hears until stopped.
    fn run(&self) {
        /// Also if the thread panics, nobody is to wait for news that do not come.
        struct End<'a>(&'a Teller);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.end();
            }
        }
        let _end = End(&self.teller);
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
        while !self.stop.load(Ordering::Acquire) {
            if let Err(error) = self.hear(&mut buffer) {
                tracing::error!(reason = tree::reason(&error), "watching has ended; changes are found by rescans");
                self.signs.lock().lose();
                self.teller.lost();
                return;
            }
        }
    }

    /// Waits for what the kernel has to say, and tells it.
    fn hear(&self, buffer: &mut [MaybeUninit<u8>]) -> Result<(), Errno> {
        let (fd, idle) = {
            let mut state = self.state();
            state.remove_doomed();
            (Arc::clone(&state.fd), state.doomed.is_empty())
        };
        let mut fds = [PollFd::new(&*fd, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        match poll(&mut fds, (!idle).then_some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        match rustix::io::read(&self.wake, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        self.hear_now(buffer).map(drop)
    }

    /// Tells what the kernel has to say now, as far as it fits into `buffer`. Returns whether there may be more.
    fn hear_now(&self, buffer: &mut [MaybeUninit<u8>]) -> Result<bool, Errno> {
        let mut state = self.state();
        let fd = Arc::clone(&state.fd);
        let mut reader = Reader::new(&*fd, buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
                Err(error) => return Err(error),
            };
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                state.renew();
                self.signs.lock().lose();
                self.teller.lost();
                return Ok(false);
            }
            let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
            state.handle(event.wd(), event.events(), name, &self.teller, &self.signs);
            if reader.is_buffer_empty() {
                return Ok(true);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It fails only if it was woken 2^64 - 2 times, and is awake then.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl State {
    /// Tells of one event. Those of watches without a path came too late: they were told of when the path went.
    fn handle(&mut self, watch: i32, events: ReadFlags, name: Option<&OsStr>, teller: &Teller, signs: &SharedSigns) {
        let Some(dir) = self.dirs.path(watch) else { return };
        let path = name.map_or_else(|| dir.to_owned(), |name| dir.join(name));
        if events.contains(ReadFlags::MOVE_SELF) {
            // Where it is now, nobody says; what is below it moved along.
            self.doomed.extend(self.dirs.forget(&path));
        }
        if events.contains(ReadFlags::IGNORED) {
            // Deleted or unmounted: the kernel has removed the watch.
            self.dirs.remove(watch);
        }
        let seen = Signs {
            wrote: events.intersects(ReadFlags::CREATE | ReadFlags::MODIFY),
            closed: events.contains(ReadFlags::CLOSE_WRITE),
            moved_here: events.contains(ReadFlags::MOVED_TO),
            left: events
                .intersects(ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF | ReadFlags::DELETE | ReadFlags::DELETE_SELF),
            attributes: events.contains(ReadFlags::ATTRIB),
        };
        // Before it is told: whoever hears of it finds the signs.
        signs.lock().note(path.as_os_str().as_bytes(), seen);
        teller.changed(path);
    }

    /// Removes some watches: the kernel says of each that it did, and its queue must be read in between.
    fn remove_doomed(&mut self) {
        for _ in 0..DOOMED_AT_ONCE {
            let Some(watch) = self.doomed.pop_first() else { return };
            // What the kernel removed itself is not there any more.
            let _ = inotify::remove_watch(&*self.fd, watch);
        }
    }

    /// Forgets all watches. What was lost may have been that directories moved: their watches would tell of paths at
    /// which they are not. A new instance removes them without a word on each.
    fn renew(&mut self) {
        match instance() {
            Ok(fd) => {
                self.fd = Arc::new(fd);
                self.dirs = Dirs::default();
                self.doomed.clear();
            }
            Err(error) => {
                tracing::warn!(reason = tree::reason(&error), "watches may be left over of directories that moved")
            }
        }
    }
}

fn instance() -> Result<OwnedFd, Errno> {
    inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
}

/// What is heard of, and what may be watched.
const WATCHED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::EXCL_UNLINK)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW);

/// An event has at most 272 bytes.
const BUFFER_BYTES: usize = 65_536;

/// The kernel's queue takes 16,384 events unless told otherwise.
const DOOMED_AT_ONCE: usize = 1_024;

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsRawFd, path::PathBuf, time::Duration};

    use tempfile::TempDir;

    use super::{super::Heard, *};

    const DEADLINE: Duration = Duration::from_secs(10);

    async fn recv(news: &mut News) -> Option<Heard> {
        tokio::time::timeout(DEADLINE, news.recv()).await.expect("nothing was heard for ten seconds")
    }

    /// Waits until `path` is told; what else is, does not matter.
    async fn told(news: &mut News, path: &Path) {
        while recv(news).await.expect("the news go on") != Heard::Changed(path.to_owned()) {}
    }

    /// How many watches the kernel has for `inotify`.
    fn watches(inotify: &Inotify) -> usize {
        let fd = inotify.0.state().fd.as_raw_fd();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        info.lines().filter(|line| line.starts_with("inotify ")).count()
    }

    fn tree(dirs: usize) -> (TempDir, Vec<PathBuf>) {
        let base = TempDir::new().unwrap();
        let below = (0..dirs - 2).map(|n| base.path().join(format!("root/many/{n}")));
        let dirs: Vec<PathBuf> =
            [base.path().join("root"), base.path().join("root/many")].into_iter().chain(below).collect();
        dirs.iter().for_each(|dir| fs::create_dir_all(dir).unwrap());
        (base, dirs)
    }

    /// No watch is left over, however many there were; and being told so one by one is not too much for the kernel.
    #[tokio::test]
    async fn what_moved_away_is_watched_no_longer() {
        let (base, dirs) = tree(3_000);
        let (mut inotify, mut news) = Inotify::new(100).unwrap();
        for dir in dirs.iter().chain(&dirs) {
            inotify.watch(dir).unwrap();
        }
        assert_eq!(watches(&inotify), dirs.len());
        fs::rename(&dirs[1], base.path().join("away")).unwrap();
        let started = std::time::Instant::now();
        while watches(&inotify) != 1 {
            assert!(started.elapsed() < DEADLINE, "{} watches are left", watches(&inotify));
            tokio::task::yield_now().await;
        }
        fs::write(dirs[0].join("mark"), "").unwrap();
        assert_eq!(recv(&mut news).await, Some(Heard::Changed(dirs[1].clone())));
        told(&mut news, &dirs[0].join("mark")).await;
        assert_eq!(inotify.0.state().dirs.path(1), Some(&*dirs[0]));
        assert!(inotify.0.state().doomed.is_empty());
    }

    /// What was forgotten and waits for its removal stays, if it is watched in time; what was at the path before goes,
    /// and so it is told.
    #[tokio::test]
    async fn watched_again_in_the_middle() {
        let (_base, dirs) = tree(3);
        let (mut inotify, mut news) = Inotify::new(100).unwrap();
        inotify.watch(&dirs[1]).unwrap();
        {
            let mut state = inotify.0.state();
            let moved = state.dirs.forget(&dirs[1]);
            state.doomed.extend(moved);
            state.dirs.insert(1_000, &dirs[0]);
            state.dirs.insert(1_001, &dirs[1]);
        }
        inotify.watch(&dirs[1]).unwrap();
        assert_eq!(recv(&mut news).await, Some(Heard::Changed(dirs[1].clone())));
        inotify.watch(&dirs[0]).unwrap();
        assert_eq!(recv(&mut news).await, Some(Heard::Changed(dirs[0].clone())));
        inotify.watch(&dirs[1]).unwrap();
        assert!(!inotify.0.state().doomed.contains(&1));
        for dir in &dirs[..2] {
            fs::write(dir.join("f"), "").unwrap();
            told(&mut news, &dir.join("f")).await;
        }
        assert_eq!(watches(&inotify), 2);
    }

    /// A thread that gets no turn, and more events than the kernel keeps.
    #[tokio::test]
    async fn the_kernel_loses_events() {
        let kept = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        let kept: usize = kept.trim().parse().unwrap();
        if kept > 1_000_000 {
            eprintln!("not tested: the kernel keeps {kept} events");
            return;
        }
        let (_base, dirs) = tree(10);
        let (mut inotify, mut news) = Inotify::new(usize::MAX).unwrap();
        for dir in &dirs {
            inotify.watch(dir).unwrap();
        }
        {
            let _no_turn = inotify.0.state();
            let files = ["a", "b"].map(|name| fs::File::create(dirs[0].join(name)).unwrap());
            for n in 0..kept + 2_000 {
                files[n % 2].set_modified(std::time::SystemTime::now()).unwrap();
            }
        }
        while recv(&mut news).await.expect("the news go on") != Heard::Lost {}
        // Where directories are, was lost too.
        assert_eq!(watches(&inotify), 0);
        assert_eq!(news.try_recv(), None);
        for dir in &dirs {
            inotify.watch(dir).unwrap();
        }
        assert_eq!(watches(&inotify), dirs.len());
        fs::write(dirs[3].join("f"), "").unwrap();
        told(&mut news, &dirs[3].join("f")).await;
    }
}
