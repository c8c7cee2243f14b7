//! `kill -9` under everything at once: files rot and are mended, files change and are indexed, an arena comes and goes,
//! trees are brought over and read through the cache, and at a random moment one of the two daemons is gone. It starts
//! again; what it says of its files is what an oracle sees, which compares them with what was written, byte for byte;
//! it damaged nothing, moved no mtime, and left no half file at a destination.
//!
//! `KILLS=200` makes a longer run of it; `SEED=…` repeats one.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    env,
    fs::{self, File},
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    str::FromStr,
    thread::sleep,
    time::{Duration, Instant},
};

use fastrand::Rng;
use tests::{GROUP_BYTES, Machine, Mtime, Output, Scratch, differences, random_bytes, snapshot, wait_for};

const KILLS: u32 = 5;
/// Of the files that rot: in memory and by way of the cache, outboards in rows and in files.
const ROTTING: [u64; 6] = [700, 40_000, 1_500_000, 3_000_001, 5_000_000, 20_000_000];
/// Of the files that change.
const CHANGING: [u64; 8] = [10, 20_000, 60_000, 300_000, 1_200_000, 4_000_000, 15_000_000, 30_000_000];

/// A machine with a copy of the files that rot.
struct Holder {
    machine: Machine,
    root: PathBuf,
    mtimes: BTreeMap<String, Mtime>,
}

/// The files that change, and every content that each of them ever had.
struct Changing {
    root: PathBuf,
    staging: PathBuf,
    ever: BTreeMap<String, HashSet<blake3::Hash>>,
}

#[test]
fn whatever_was_under_way_a_killed_daemon_starts_and_claims_nothing_false() {
    let seed = number("SEED").unwrap_or_else(|| fastrand::u64(..));
    let kills = number("KILLS").unwrap_or(KILLS);
    println!("SEED={seed} KILLS={kills}");
    let mut rng = Rng::with_seed(seed);
    let Some(scratch) = Scratch::that_rots() else { return };
    let originals: BTreeMap<String, Vec<u8>> =
        ROTTING.into_iter().map(|size| (size.to_string(), random_bytes(size, &mut rng))).collect();
    let mut changing = Changing::new(&scratch, &mut rng);
    let extra = scratch.dir("extra");
    for name in 0..1000 {
        fs::write(extra.join(name.to_string()), random_bytes(3000, &mut rng)).unwrap();
    }
    let a = Holder::up(&scratch, "a", &originals, &[&changing.root]);
    let b = Holder::up(&scratch, "b", &originals, &[]);
    b.machine.join(&a.machine);

    let started = Instant::now();
    let mut rotten = [BTreeSet::new(), BTreeSet::new()];
    let mut undisturbed = Duration::ZERO;
    for kill in 0..=kills {
        rot_both(&scratch, &[&a, &b], &originals, &mut rotten, &mut rng);
        changing.change(&mut rng);
        let destination = scratch.dir(&format!("copy {kill}"));
        let began = Instant::now();
        let mut load = start_load(&a.machine, &b.machine, &extra, &destination, &mut rng);
        if kill == 0 {
            let codes = wait_for_all(&mut load, "undisturbed");
            undisturbed = began.elapsed();
            println!("undisturbed: {undisturbed:?}, exit codes {codes:?}");
            forget_extra(&a.machine);
            continue;
        }
        // The first round is the slowest one.
        let moment = undisturbed.mul_f64(rng.f64() * 0.5);
        sleep(moment);
        // Mostly both: the survivor may take its young connection for alive until that times out, after 15 s.
        let victims = match rng.u32(..10) {
            0 => vec![&a],
            1 => vec![&b],
            _ => vec![&a, &b],
        };
        let done = load.iter_mut().filter_map(|command| command.try_wait().unwrap()).count();
        let names: Vec<_> = victims.iter().map(|victim| victim.machine.name()).collect();
        let when = format!("kill {kill} of {names:?} after {moment:.0?}, {done} of {} done, SEED={seed}", load.len());
        println!("{:.0?}: {when}", started.elapsed());
        victims.iter().for_each(|victim| victim.machine.kill9());
        victims.iter().for_each(|victim| victim.machine.restart_in_place());
        wait_for_all(&mut load, &when);
        changing.check(&destination.join("changing"), &when);
        fs::remove_dir_all(&destination).unwrap();
        for holder in [&a, &b] {
            holder.check(&originals, &rotten, &changing, &when);
        }
        forget_extra(&a.machine);
        a.machine.hears(&b.machine);
        b.machine.hears(&a.machine);
    }
    println!("{kills} kills in {:?}", started.elapsed());

    // In the end everything is whole, and everything arrives.
    a.machine.ok(["repair"]);
    b.machine.ok(["repair"]);
    a.machine.ok(["arena", "scan"]);
    b.machine.hears(&a.machine);
    for holder in [&a, &b] {
        holder.machine.ok(["verify"]);
        assert_eq!(holder.damage(&originals), BTreeSet::new());
    }
    let copy = scratch.dir("last copy");
    b.machine.ok([Path::new("get"), "changing".as_ref(), &copy]);
    assert_eq!(differences(&snapshot(&changing.root), &snapshot(&copy.join("changing"))), [""; 0]);
}

fn number<T: FromStr>(variable: &str) -> Option<T> {
    env::var(variable).ok()?.parse().ok()
}

/// Starts everything that may be under way when a daemon is killed.
fn start_load(a: &Machine, b: &Machine, extra: &Path, destination: &Path, rng: &mut Rng) -> Vec<Child> {
    let spawn = |machine: &Machine, args: &[&Path]| {
        machine.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let path = |text: &'static str| Path::new(text);
    let file = PathBuf::from(format!("changing/{}", rng.usize(..CHANGING.len())));
    let range = PathBuf::from(format!("{}..", rng.u64(..10_000)));
    let mut load = vec![
        spawn(a, &[path("repair")]),
        spawn(b, &[path("repair")]),
        spawn(a, &[path("arena"), path("scan"), path("changing")]),
        spawn(a, &[path("arena"), path("add"), path("extra"), extra]),
        spawn(b, &[path("get"), path("changing"), destination]),
        spawn(b, &[path("cat"), &file, path("--range"), &range]),
    ];
    rng.shuffle(&mut load);
    load
}

/// Each command ends: its own daemon is gone, or the one that it gets from, or all is done.
fn wait_for_all(load: &mut [Child], when: &str) -> Vec<Option<i32>> {
    let ended = |command: &mut Child| {
        wait_for(&format!("a command ends: {when}"), Duration::from_secs(60), || command.try_wait().unwrap()).code()
    };
    load.iter_mut().map(ended).collect()
}

/// The arena that came may have been cut off anywhere, and can be given up all the same.
fn forget_extra(a: &Machine) {
    let gone = a.run(["arena", "rm", "extra"]);
    assert!([0, 7].contains(&gone.code), "{}", gone.stderr);
}

/// Lets groups rot in either copy, but none that is damaged in the other one.
fn rot_both(
    scratch: &Scratch,
    holders: &[&Holder; 2],
    originals: &BTreeMap<String, Vec<u8>>,
    rotten: &mut [BTreeSet<(String, u64)>; 2],
    rng: &mut Rng,
) {
    for (number, holder) in holders.iter().enumerate() {
        let elsewhere = holders[1 - number].damage(originals);
        rotten[number] = holder.damage(originals);
        for (name, data) in originals {
            let groups = (data.len() as u64).div_ceil(GROUP_BYTES);
            for group in (0..rng.u64(..8)).map(|_| rng.u64(..groups)) {
                let place = (name.clone(), group);
                if !elsewhere.contains(&place) && rotten[number].insert(place) {
                    scratch.rot(&holder.root.join(name), &[group * GROUP_BYTES]);
                }
            }
        }
    }
}

impl Holder {
    fn up(scratch: &Scratch, name: &str, originals: &BTreeMap<String, Vec<u8>>, more: &[&Path]) -> Self {
        let root = scratch.dir(&format!("{name} rotting"));
        originals.iter().for_each(|(name, data)| fs::write(root.join(name), data).unwrap());
        let dirs: Vec<&Path> = [&*root].into_iter().chain(more.iter().copied()).collect();
        let machine = Machine::up(scratch, name, &dirs);
        let mut holder = Self { machine, root, mtimes: BTreeMap::new() };
        holder.mtimes = originals.keys().map(|name| (name.clone(), holder.mtime(name))).collect();
        holder
    }

    fn mtime(&self, name: &str) -> Mtime {
        let meta = fs::metadata(self.root.join(name)).unwrap();
        Mtime(meta.mtime(), meta.mtime_nsec())
    }

    /// The chunk groups that differ from what was written.
    fn damage(&self, originals: &BTreeMap<String, Vec<u8>>) -> BTreeSet<(String, u64)> {
        let mut found = BTreeSet::new();
        for (name, original) in originals {
            let now = fs::read(self.root.join(name)).unwrap();
            assert_eq!(now.len(), original.len(), "{name}");
            let groups = now.chunks(GROUP_BYTES as usize).zip(original.chunks(GROUP_BYTES as usize));
            found.extend(
                (0..).zip(groups).filter(|(_, (now, then))| now != then).map(|(group, _)| (name.clone(), group)),
            );
        }
        found
    }

    /// What it says is what there is, and nothing is damaged but what rotted here.
    fn check(
        &self,
        originals: &BTreeMap<String, Vec<u8>>,
        rotten: &[BTreeSet<(String, u64)>; 2],
        changing: &Changing,
        when: &str,
    ) {
        let verified = self.machine.run(["verify", "--json"]);
        let what = || format!("{} at {when}: {}{}", self.machine.name(), verified.text(), verified.stderr);
        assert!([0, 4].contains(&verified.code), "{}", what());
        let damage = self.damage(originals);
        assert_eq!(self.said_damaged(&verified, changing, &what()), damage, "{}", what());
        let here = &rotten[usize::from(self.machine.name() == "b")];
        assert!(damage.is_subset(here), "new damage: {:?}, {}", damage.difference(here), what());
        for (name, mtime) in &self.mtimes {
            assert_eq!(self.mtime(name), *mtime, "{name}: {}", what());
        }
    }

    /// The damaged groups of the files that rot. Files that change may be gone or modified, and nothing else; the cache is
    /// sound.
    fn said_damaged(&self, verified: &Output, changing: &Changing, what: &str) -> BTreeSet<(String, u64)> {
        let mut said = BTreeSet::new();
        for line in verified.json() {
            let (arena, path) = (line["arena"].as_str(), line["path"].as_str().unwrap_or_default());
            let changes = arena == Some("changing");
            match line["type"].as_str().unwrap() {
                "summary" => {}
                "modified" => assert!(changes, "{line}: {what}"),
                "damage" if line["what"] == "data" => {
                    assert!(arena.is_some_and(|arena| arena.ends_with("rotting")), "{line}: {what}");
                    let groups = tests::ranges_of(&line).into_iter();
                    let groups = groups.flat_map(|(start, end)| start / GROUP_BYTES..end.div_ceil(GROUP_BYTES));
                    said.extend(groups.map(|group| (path.to_owned(), group)));
                }
                "damage" if line["what"] == "missing" => {
                    assert!(changes && !changing.root.join(path).exists(), "{line}: {what}");
                }
                _ => panic!("{line}: {what}"),
            }
        }
        said
    }
}

impl Changing {
    fn new(scratch: &Scratch, rng: &mut Rng) -> Self {
        let (root, staging) = (scratch.dir("changing"), scratch.dir("staging"));
        let mut changing = Self { root, staging, ever: BTreeMap::new() };
        (0..CHANGING.len()).for_each(|number| changing.replace(number, rng));
        changing
    }

    /// Changes some files as programs do that never show half of what they write.
    fn change(&mut self, rng: &mut Rng) {
        for number in 0..CHANGING.len() {
            let path = self.root.join(number.to_string());
            match rng.u32(..6) {
                0 => self.replace(number, rng),
                1 if path.exists() => fs::remove_file(&path).unwrap(),
                2 if path.exists() => {
                    let mut file = File::options().append(true).open(&path).unwrap();
                    file.write_all(&random_bytes(100, rng)).unwrap();
                    self.note(number);
                }
                _ if path.exists() => {}
                _ => self.replace(number, rng),
            }
        }
    }

    fn replace(&mut self, number: usize, rng: &mut Rng) {
        let staged = self.staging.join(number.to_string());
        fs::write(&staged, random_bytes(CHANGING[number], rng)).unwrap();
        fs::rename(staged, self.root.join(number.to_string())).unwrap();
        self.note(number);
    }

    fn note(&mut self, number: usize) {
        let data = fs::read(self.root.join(number.to_string())).unwrap();
        self.ever.entry(number.to_string()).or_default().insert(blake3::hash(&data));
    }

    /// Every file of a copy is what that file once was, and no other name is there.
    fn check(&self, copy: &Path, when: &str) {
        for entry in fs::read_dir(copy).into_iter().flatten() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let blob = blake3::hash(&fs::read(entry.path()).unwrap());
            assert!(self.ever.get(&name).is_some_and(|ever| ever.contains(&blob)), "half of {name}: {when}");
        }
    }
}
