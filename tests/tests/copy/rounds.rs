//! Moves and copies to and fro between two machines, while somebody edits, replaces and creates files, and daemons and commands
//! are killed: whatever was complete once, and not replaced by its editor, is whole somewhere, and in the end nothing is left behind.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use fastrand::Rng;
use serde_json::Value;
use tests::{Item, Machine, Scratch, random_bytes, snapshot, wait_for};

use crate::open;

const ROUNDS: u32 = 6;

#[test]
fn what_was_complete_once_is_whole_somewhere() {
    let number = |name: &str| env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seed = number("SEED").unwrap_or_else(|| fastrand::u64(..));
    let rounds = number("MOVE_ROUNDS").map_or(ROUNDS, |rounds| rounds as u32);
    println!("SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let scratch = Scratch::new();
    let ends = [scratch.dir("docs"), scratch.dir("inbox")];
    let machines = [open(&scratch, "a", &ends[0]), open(&scratch, "b", &ends[1])];
    machines[0].join(&machines[1]);
    let editor = Editor { temporary: scratch.dir("temporary"), written: Mutex::default() };
    let mut counts = BTreeMap::new();
    for round in 0..rounds {
        // Mostly from where most of it is.
        let files = ends.each_ref().map(|end| snapshot(end).len());
        let source = usize::from((files[1] > files[0]) == (rng.u8(..4) > 0));
        for _ in 0..15 {
            editor.create(&ends[source], &mut rng);
        }
        let kind = if rng.u8(..4) == 0 { "cp" } else { "mv" };
        let director = &machines[rng.usize(..2)];
        let victim = VICTIMS[rng.usize(..VICTIMS.len())];
        let when = format!("SEED={seed}, round {round}, {kind} from {}, killed: {victim:?}", NAMES[source].0);
        println!("{when}");
        *counts.entry((kind, format!("{victim:?}"))).or_insert(0) += 1;
        let [from, to] = [source, 1 - source].map(|end| target(end, director));
        let mut command = director.command([kind, &from, &to]);
        let mut command = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start the command");
        let stop = AtomicBool::new(false);
        let moment = Duration::from_micros(rng.u64(..400_000));
        let mut editors_rng = rng.fork();
        thread::scope(|scope| {
            scope.spawn(|| editor.works(&ends[source], &mut editors_rng, &stop));
            sleep(moment);
            match victim {
                Victim::Source => machines[source].kill9(),
                Victim::Destination => machines[1 - source].kill9(),
                Victim::Command => drop(command.kill()),
                Victim::Nobody => (),
            }
            stop.store(true, Ordering::Relaxed);
        });
        editor.all_is_somewhere(&ends, &when);
        match victim {
            Victim::Source => machines[source].restart_in_place(),
            Victim::Destination => machines[1 - source].restart_in_place(),
            Victim::Command | Victim::Nobody => (),
        }
        wait_for("the command ends", COMMAND_LIMIT, || command.try_wait().expect("wait for the command"));
        editor.all_is_somewhere(&ends, &when);
        settle(&machines);
        editor.all_is_somewhere(&ends, &when);
        let verified = machines.each_ref().map(|machine| machine.run(["verify", "--json"]));
        for output in verified {
            // A move may go on without its command. What it has set aside or removed this moment is called missing.
            let is_bad =
                |line: &Value| line["type"] == "suspect" || (line["type"] == "damage" && line["what"] != "missing");
            assert!(!output.json().iter().any(is_bad), "{when}: {}{}", output.text(), output.stderr);
        }
        if round % 10 == 9 {
            editor.deletes_most(&ends);
            settle(&machines);
        }
    }
    let when = format!("SEED={seed}, after {rounds} rounds");
    finish(&machines, &ends, &when);
    editor.all_is_somewhere(&ends, &when);
    println!("{counts:?}, {} contents", editor.written.lock().expect("nobody panicked").len());
}

#[derive(Debug, Clone, Copy)]
enum Victim {
    Source,
    Destination,
    Command,
    Nobody,
}

const VICTIMS: [Victim; 7] = {
    use Victim::{Command, Destination, Nobody, Source};
    [Source, Source, Destination, Destination, Command, Command, Nobody]
};

/// The machine and the arena at each end.
const NAMES: [(&str, &str); 2] = [("a", "docs"), ("b", "inbox")];

/// The arena at an end, as a machine calls it.
fn target(end: usize, director: &Machine) -> String {
    let (machine, arena) = NAMES[end];
    if director.name() == machine { arena.to_owned() } else { format!("{machine}:{arena}") }
}

/// Waits until both have scanned, and know all of each other.
fn settle(machines: &[Machine; 2]) {
    for (machine, (_, arena)) in machines.iter().zip(NAMES) {
        machine.ok(["arena", "scan", arena]);
    }
    machines[0].hears(&machines[1]);
    machines[1].hears(&machines[0]);
}

/// Moves all to `docs`, undisturbed, once the moves of before have ended; what is another file there stays where it is. Then
/// nothing is left of any move.
fn finish(machines: &[Machine; 2], ends: &[PathBuf; 2], when: &str) {
    let mut last = None;
    let began = Instant::now();
    while began.elapsed() < FINISH_LIMIT {
        settle(machines);
        let output = machines[1].run(["mv", "--json", "inbox", "a:docs"]);
        let stays = |name: &String| {
            let below = name.trim_start_matches("inbox/");
            let [here, there] = [ends[1].join(below), ends[0].join(below)];
            here.is_dir() || fs::read(here).ok() != fs::read(there).ok()
        };
        let failed = crate::failures(&output);
        let is_done = match output.code {
            0 => true,
            3 => failed.iter().all(|(name, _)| stays(name)),
            _ => false,
        };
        let incoming =
            |machine: &Machine| fs::read_dir(machine.home().join("cache/incoming")).map_or(0, Iterator::count);
        let incoming: usize = machines.iter().map(incoming).sum();
        let left = ends.each_ref().map(|end| temporary(end));
        // The cache may hold parts of what was replaced before all of it had come.
        if is_done && incoming == 0 && left.iter().all(Vec::is_empty) {
            for machine in machines {
                machine.ok(["verify"]);
            }
            return;
        }
        last = Some((output, failed, incoming, left));
    }
    panic!("{when}: it does not end: {last:#?}");
}

/// What a daemon has made below a directory for a while.
fn temporary(root: &Path) -> Vec<String> {
    let paths = snapshot(root).into_keys().map(|path| String::from_utf8_lossy(&path).into_owned());
    paths.filter(|path| path.contains(".blobd-")).collect()
}

/// Writes files, and remembers what each has to be.
struct Editor {
    /// Where files are written before they get their names.
    temporary: PathBuf,
    /// Every content that was complete and that nobody has replaced, with the path below an arena that it was written to.
    written: Mutex<HashMap<blake3::Hash, String>>,
}

impl Editor {
    /// Creates, replaces and edits files in `dir` until it is to stop.
    fn works(&self, dir: &Path, rng: &mut Rng, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            match rng.u8(..4) {
                0 | 1 => self.create(dir, rng),
                2 => self.replace(dir, rng),
                _ => self.edit(dir, rng),
            }
            sleep(Duration::from_millis(rng.u64(1..12)));
        }
    }

    /// Gives a new file a name that was never used.
    fn create(&self, dir: &Path, rng: &mut Rng) {
        let kind = ["created", "dir/created", "edited in place", "dir/deep/created"][rng.usize(..4)];
        let name = format!("{kind} {:016x}", rng.u64(..));
        let (blob, path) = (self.write(rng), dir.join(&name));
        // A move may take the directory away right behind this.
        while fs::rename(self.temporary.join("new"), &path).is_err() {
            fs::create_dir_all(path.parent().expect("it is below the arena")).expect("make a directory");
        }
        self.remember(blob, &name);
    }

    /// Puts a new file in the place of another one. What was there may be replaced, or have left before: so only if the old one
    /// is exchanged, and seen, is it known to be replaced.
    fn replace(&self, dir: &Path, rng: &mut Rng) {
        let Some((name, path)) = some_file(dir, rng, "created") else { return };
        let (blob, new) = (self.write(rng), self.temporary.join("new"));
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        if rustix::fs::renameat_with(rustix::fs::CWD, &new, rustix::fs::CWD, &path, flags).is_ok() {
            self.remember(blob, &name);
            self.forget(&new);
        }
    }

    /// Writes into a file that is there for this alone.
    fn edit(&self, dir: &Path, rng: &mut Rng) {
        let Some((name, path)) = some_file(dir, rng, "edited in place") else { return };
        let Ok(file) = File::options().read(true).write(true).open(&path) else { return };
        // From the first byte on it is neither what it was nor what it will be; what is elsewhere of it may be either.
        self.forget(&path);
        self.forget_name(&name);
        let edit: [u8; 16] = std::array::from_fn(|_| rng.u8(..));
        file.write_all_at(&edit, 100).and_then(|()| file.sync_data()).expect("edit a file");
        let bytes = read(&file);
        drop(file);
        // Without its name nobody reads it any more.
        if bytes.is_some_and(|bytes| fs::read(&path).is_ok_and(|now| now == bytes)) {
            self.remember(blake3::hash(&fs::read(&path).unwrap_or_default()), &name);
        }
    }

    /// Writes a complete file, which has no name in an arena yet.
    fn write(&self, rng: &mut Rng) -> blake3::Hash {
        let sizes = [200, 5_000, 20_000, 100_000, 700_000, 3_000_000];
        let few_are_large = sizes.len() - usize::from(rng.u8(..4) > 0);
        let size = sizes[rng.usize(..few_are_large)];
        let bytes = random_bytes(size, rng);
        let mut file = File::create(self.temporary.join("new")).expect("make a file");
        file.write_all(&bytes).expect("write a file");
        blake3::hash(&bytes)
    }

    fn remember(&self, blob: blake3::Hash, name: &str) {
        self.written.lock().expect("nobody panicked").insert(blob, name.to_owned());
    }

    fn forget(&self, path: &Path) {
        let Ok(bytes) = fs::read(path) else { return };
        self.written.lock().expect("nobody panicked").remove(&blake3::hash(&bytes));
    }

    fn forget_name(&self, name: &str) {
        self.written.lock().expect("nobody panicked").retain(|_, known| known != name);
    }

    /// Deletes files, lest there be more in each round.
    fn deletes_most(&self, ends: &[PathBuf; 2]) {
        for end in ends {
            for path in snapshot(end).into_keys().map(|path| String::from_utf8(path).expect("all of them are text")) {
                if end.join(&path).is_file() && path.contains("created") {
                    // A move that goes on may have been faster.
                    let _ = fs::remove_file(end.join(&path));
                    self.forget_name(&path);
                }
            }
        }
    }

    /// Each content is a file in one of the directories, under its own name or set aside.
    #[track_caller]
    fn all_is_somewhere(&self, ends: &[PathBuf; 2], when: &str) {
        let written = self.written.lock().expect("nobody panicked").clone();
        // What moves between the looks is seen by the next.
        let mut lost = written;
        for _ in 0..LOOKS {
            for item in ends.iter().flat_map(|end| snapshot(end).into_values()) {
                if let Item::File { blob, .. } = item {
                    lost.remove(&blob);
                }
            }
            if lost.is_empty() {
                return;
            }
        }
        panic!("{when}: lost: {lost:?}");
    }
}

fn read(file: &File) -> Option<Vec<u8>> {
    let mut bytes = vec![0; file.metadata().ok()?.len() as usize];
    file.read_exact_at(&mut bytes, 0).ok()?;
    Some(bytes)
}

/// A file below `dir` whose name says that it is of this kind, and that is not set aside.
fn some_file(dir: &Path, rng: &mut Rng, kind: &str) -> Option<(String, PathBuf)> {
    let mut found = Vec::new();
    for sub in ["", "dir", "dir/deep"] {
        for entry in fs::read_dir(dir.join(sub)).into_iter().flatten().flatten() {
            let name = Path::new(sub).join(entry.file_name()).to_string_lossy().into_owned();
            if name.contains(kind) && !name.contains(".blobd-") {
                found.push(name);
            }
        }
    }
    found.sort();
    let name = (!found.is_empty()).then(|| found.swap_remove(rng.usize(..found.len())))?;
    let path = dir.join(&name);
    Some((name, path))
}

const LOOKS: u32 = 3;
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// The source puts back what is set aside within 75 s.
const FINISH_LIMIT: Duration = Duration::from_secs(150);
