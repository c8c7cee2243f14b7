//! Networks as people have them: far away, slow, losing and reordering packets, and gone for a while.
//!
//! Both machines have a network of their own, with an [`IpLink`] between them, so that blobd and rsync's TCP meet the same
//! conditions. A machine connects before the measurement begins; rsync connects within it.

use std::{
    fs, io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use tests::{IpLink, Quality};

use crate::{
    large_file,
    machine::{Machine, new_home, succeed},
    median, rivals, small_files,
    transfer::{QUIET, sync},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure; everything by default.
    scenario: Option<Scenario>,
    /// `matrix`: the round trips, in ms.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 20, 100, 300])]
    rtt_ms: Vec<u64>,
    /// `matrix`: the shares of packets that are lost, in per cent.
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.1, 1.0, 5.0])]
    loss: Vec<f64>,
    /// `matrix`: the rates in Mbit/s; 0 is no limit.
    #[arg(long, value_delimiter = ',', default_values_t = [20, 100, 0])]
    mbit: Vec<u64>,
    /// `matrix`: the size of the file, as the seconds that it takes at the full rate.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// `outages`: how long they are, in seconds.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 5, 20, 60, 90])]
    outages: Vec<u64>,
    /// Time limit for one run of rsync, in seconds.
    #[arg(long, default_value_t = 30)]
    limit: u64,
    /// The congestion controller of our machines.
    #[arg(long, default_value = "auto")]
    congestion: String,
    /// Leaves rsync out.
    #[arg(long)]
    alone: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Round trips, losses and rates.
    Matrix,
    /// Packets that come late, at 50 Mbit/s and 40 ms.
    Reordering,
    /// Many small files at 300 ms.
    Small,
    /// A file each by blobd and by rsync at the same time, at 50 Mbit/s and 40 ms.
    Fairness,
    /// Networks that are gone for a while, at 50 Mbit/s and 40 ms.
    Outages,
}

pub(crate) fn network(work: &Path, rounds: usize, args: &Args) -> io::Result<()> {
    let Some(site) = Site::start(work, args)? else { return Ok(()) };
    for scenario in Scenario::value_variants() {
        if args.scenario.is_some_and(|only| only != *scenario) {
            continue;
        }
        match scenario {
            Scenario::Matrix => site.matrix(rounds, args),
            Scenario::Reordering => site.reordering(rounds),
            Scenario::Small => site.small(rounds),
            Scenario::Fairness => site.fairness(rounds),
            Scenario::Outages => site.outages(&args.outages),
        }?;
    }
    Ok(())
}

/// Two machines with a link between them: one that has files, and one that gets them.
struct Site<'a> {
    work: &'a Path,
    tree: PathBuf,
    link: IpLink,
    a: Machine,
    /// That of the machine that gets files, while it does not run.
    home: Mutex<Option<tempfile::TempDir>>,
    rsync: Option<Child>,
    limit: Duration,
}

/// One run.
struct Got {
    time: Duration,
    /// Bytes of packets that arrived, headers included.
    wire: u64,
    /// How long the receiver's processors worked.
    cpu: Duration,
}

impl<'a> Site<'a> {
    /// `None` where there are no such networks.
    fn start(work: &'a Path, args: &Args) -> io::Result<Option<Self>> {
        let Some(link) = IpLink::start(Quality::default()) else { return Ok(None) };
        let tree = work.join("tree");
        fs::create_dir(&tree)?;
        let config = format!("[transfer]\ncongestion = \"{}\"\n", args.congestion);
        let [here, there] = &link.networks;
        let listen = format!("{}:4000", IpLink::ADDRESSES[0]);
        let a = Machine::start_in_network(
            here,
            new_home(work, &(QUIET.replace("\"b\"", "\"a\"") + &config))?,
            Some(&tree),
            &listen,
        )?;
        let b = Machine::start_in_network(there, new_home(work, &(QUIET.to_owned() + &config))?, None, "none")?;
        b.pair_at("a", &a, a.address()?)?;
        let home = Mutex::new(Some(b.stop()));
        let rsync = if args.alone || !rivals::is_installed("rsync", "--version") {
            None
        } else {
            let conf = work.join("rsyncd.conf");
            let tree = tree.display();
            fs::write(&conf, format!("use chroot = no\nuid = 0\ngid = 0\n[tree]\npath = {tree}\nread only = yes\n"))?;
            let mut command = here.command("rsync");
            command.args(["--daemon", "--no-detach", "--port", "873", "--config"]).arg(&conf);
            Some(command.process_group(0).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
        };
        let limit = Duration::from_secs(args.limit);
        Ok(Some(Self { work, tree, link, a, home, rsync, limit }))
    }

    /// Has something in the tree.
    fn make(&self, name: &str, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
        make(&self.tree.join(name))?;
        self.a.run(&["arena", "scan", "tree"]).map(drop)
    }

    fn matrix(&self, rounds: usize, args: &Args) -> io::Result<()> {
        println!(
            "MB/s, medians of {rounds}; \"of the goal\" is of the better of rsync with CUBIC and half of rsync with BBR"
        );
        println!(
            "{:>8} {:>8} {:>6} {:>9} {:>9} {:>9} {:>12}",
            "RTT ms", "Mbit/s", "loss %", "blob get", "cubic", "bbr", "of the goal"
        );
        for &mbit in &args.mbit {
            let bytes = if mbit == 0 { UNLIMITED_BYTES } else { mbit * 125_000 * args.seconds };
            let name = format!("at {mbit}");
            self.make(&name, |path| large_file(path, bytes))?;
            for &rtt in &args.rtt_ms {
                for &loss in &args.loss {
                    let quality = Quality { loss: loss / 100.0, ..quality(rtt, mbit) };
                    let mut rates: [Vec<Duration>; 3] = Default::default();
                    for _ in 0..rounds {
                        rates[0].push(self.get(&name, quality, |_| {})?.time);
                        for (controller, rates) in ["cubic", "bbr"].iter().zip(&mut rates[1..]) {
                            rates.extend(self.rsync(&name, quality, controller, bytes)?);
                        }
                    }
                    let [ours, cubic, bbr] =
                        rates.map(|times| median(&times).map(|time| bytes as f64 / 1e6 / time.as_secs_f64()));
                    let goal = cubic.zip(bbr).map(|(cubic, bbr)| ours.unwrap_or(0.0) / cubic.max(bbr / 2.0));
                    let show = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
                    println!(
                        "{rtt:8} {mbit:8} {loss:6} {:>9} {:>9} {:>9} {:>12}",
                        show(ours),
                        show(cubic),
                        show(bbr),
                        show(goal)
                    );
                }
            }
        }
        Ok(())
    }

    fn reordering(&self, rounds: usize) -> io::Result<()> {
        let bytes = 30_000_000;
        self.make("reordered", |path| large_file(path, bytes))?;
        println!("packets that are 10 ms late, at 40 ms, medians of {rounds}");
        for (mbit, share) in [(100, 0.0), (50, 0.0), (50, 0.01), (50, 0.05)] {
            let quality = Quality { late: (share, Duration::from_millis(10)), ..quality(40, mbit) };
            let (mut times, mut cpu) = (Vec::new(), Duration::ZERO);
            for _ in 0..rounds {
                let got = self.get("reordered", quality, |_| {})?;
                times.push(got.time);
                cpu += got.cpu;
            }
            let time = median(&times).unwrap_or_default().as_secs_f64();
            let cpu = cpu.as_secs_f64() / rounds as f64 / (bytes as f64 / f64::from(64 << 20));
            println!(
                "  {mbit:3} Mbit/s, {:.0} % late: {:6.2} MB/s, {cpu:.2} s of the receiver's processors for 64 MiB",
                share * 100.0,
                bytes as f64 / 1e6 / time
            );
        }
        Ok(())
    }

    fn small(&self, rounds: usize) -> io::Result<()> {
        self.make("small", |path| small_files(path, 1000))?;
        println!("1,000 files of 4 KiB at 300 ms, medians of {rounds}");
        for (mbit, loss) in [(0, 0.0), (50, 0.0), (50, 0.01)] {
            for before in [0, 1] {
                let mut times = Vec::new();
                for _ in 0..rounds {
                    times.push(self.get_after(before, "small", Quality { loss, ..quality(300, mbit) }, |_| {})?.time);
                }
                let time = median(&times).unwrap_or_default().as_secs_f64();
                let (share, which) =
                    (loss * 100.0, ["a new connection", "one that has carried as much before"][before]);
                println!(
                    "  {mbit:3} Mbit/s, {share:.0} % lost, {which:36} {time:6.2} s, {:.1} round trips",
                    time / 0.3
                );
            }
        }
        Ok(())
    }

    fn fairness(&self, rounds: usize) -> io::Result<()> {
        let (bytes, line) = (60_000_000, quality(40, 50));
        self.make("shared", |path| large_file(path, bytes))?;
        println!("60 MB each at the same time, at 50 Mbit/s and 40 ms, medians of {rounds}");
        for (controller, loss) in [("cubic", 0.0), ("bbr", 0.0), ("cubic", 0.001)] {
            let line = Quality { loss, ..line };
            for is_first in [true, false] {
                let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                for _ in 0..rounds {
                    let mut time = Ok(None);
                    if is_first {
                        ours.push(
                            self.get("shared", line, |_| {
                                thread::sleep(HEAD_START);
                                time = self.rsync("shared", line, controller, bytes);
                            })?
                            .time,
                        );
                    } else {
                        thread::scope(|scope| {
                            scope.spawn(|| time = self.rsync("shared", line, controller, bytes));
                            thread::sleep(HEAD_START);
                            self.get("shared", line, |_| {}).map(|got| ours.push(got.time))
                        })?;
                    }
                    theirs.extend(time?);
                }
                let [ours, theirs] = [ours, theirs].map(|times| median(&times).unwrap_or_default().as_secs_f64());
                let first = if is_first { "blob get" } else { "rsync" };
                println!(
                    "  {:.1} % lost, {first} begins: blob get {ours:.1} s, rsync with {controller} {theirs:.1} s",
                    loss * 100.0
                );
            }
        }
        Ok(())
    }

    fn outages(&self, outages: &[u64]) -> io::Result<()> {
        println!("outages at 50 Mbit/s and 40 ms, 1 s after the start");
        let line = quality(40, 50);
        self.make("file of 40 MB", |path| large_file(path, 40_000_000))?;
        self.make("1,000 files of 40 kB", |path| {
            fs::create_dir(path)?;
            // Each length makes another file.
            (0..1000).try_for_each(|number| large_file(&path.join(number.to_string()), 40_000 + number))
        })?;
        for what in ["file of 40 MB", "1,000 files of 40 kB"] {
            let base = self.get(what, line, |_| {})?;
            for &outage in outages {
                let got = self.get(what, line, |link| {
                    thread::sleep(Duration::from_secs(1));
                    link.set(Quality { loss: 1.0, ..line });
                    thread::sleep(Duration::from_secs(outage));
                    link.set(line);
                })?;
                println!(
                    "  {what}, {outage:3} s: {:6.1} s, {:.1} s more than without and the outage, {:.1} MB on the wire more",
                    got.time.as_secs_f64(),
                    got.time.as_secs_f64() - base.time.as_secs_f64() - outage as f64,
                    (got.wire as f64 - base.wire as f64) / 1e6
                );
            }
        }
        Ok(())
    }

    /// Gets a file or directory of the tree over a link of that quality and a new connection. `meanwhile` runs in parallel.
    fn get(&self, what: &str, quality: Quality, meanwhile: impl FnOnce(&IpLink) + Send) -> io::Result<Got> {
        self.get_after(0, what, quality, meanwhile)
    }

    /// The same, after `before` other transfers of it over the connection.
    fn get_after(
        &self,
        before: usize,
        what: &str,
        quality: Quality,
        meanwhile: impl FnOnce(&IpLink) + Send,
    ) -> io::Result<Got> {
        self.link.set(quality);
        let home = lock(&self.home).take().ok_or_else(|| io::Error::other("its home is in use"))?;
        let b = Machine::start_in_network(&self.link.networks[1], home, None, "none")?;
        b.wait_for("a connection", |status| status["peers"][0]["connected"].is_string())?;
        b.wait_for_all_of(&self.a)?;
        let (from, to) = (format!("tree/{what}"), self.work.join("to"));
        let get = || b.summary(&["get", &from, &to.to_string_lossy()]);
        for _ in 0..before {
            get()?;
            put_away(&to)?;
        }
        let (wire, cpu, start) = (self.wire(), b.cpu()?, Instant::now());
        let got = thread::scope(|scope| {
            scope.spawn(|| meanwhile(&self.link));
            get().map(|_| start.elapsed())
        });
        let got = got.and_then(|time| Ok(Got { time, wire: self.wire() - wire, cpu: b.cpu()? - cpu }));
        *lock(&self.home) = Some(b.stop());
        let got = got?;
        succeed(Command::new("diff").arg("-r").arg(self.tree.join(what)).arg(&to))?;
        put_away(&to)?;
        Ok(got)
    }

    /// Brings a file of the tree by rsync. Returns how long it takes, by the rate so far if it takes longer than the limit; `None` if rsync
    /// is not there.
    fn rsync(&self, name: &str, quality: Quality, controller: &str, bytes: u64) -> io::Result<Option<Duration>> {
        if self.rsync.is_none() {
            return Ok(None);
        }
        self.link.set(quality);
        let [here, there] = &self.link.networks;
        // A default cannot be set in a network of one's own.
        let route = format!(
            "dev=$(ip -o route show 10.77.0.0/24 | sed 's/.*dev \\([^ ]*\\).*/\\1/') && ip route replace 10.77.0.0/24 dev $dev congctl {controller}"
        );
        succeed(here.command("sh").args(["-c", &route]))?;
        let to = self.work.join("to by rsync");
        let wire = self.wire();
        let mut command = there.command("rsync");
        command.args(["-aW", &format!("rsync://{}/tree/{name}", IpLink::ADDRESSES[0])]).arg(&to);
        let start = Instant::now();
        // It has a process of its own that receives, which does not end with it.
        let mut rsync = command.process_group(0).stdout(Stdio::null()).spawn()?;
        let status = loop {
            match rsync.try_wait()? {
                Some(status) => break Some(status),
                None if start.elapsed() > self.limit => break None,
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut time = start.elapsed();
        match status {
            Some(status) if status.success() => {
                succeed(Command::new("cmp").arg(self.tree.join(name)).arg(&to))?;
            }
            Some(status) => return Err(io::Error::other(format!("rsync: {status}"))),
            None => {
                kill_group(&mut rsync)?;
                fs::write(&to, "")?;
                // Headers and what was sent twice are counted in its favour.
                time = time.mul_f64(bytes as f64 / (self.wire() - wire).max(1) as f64);
            }
        }
        put_away(&to)?;
        Ok(Some(time))
    }

    fn wire(&self) -> u64 {
        self.link.carried()[0]
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        if let Some(rsync) = &mut self.rsync {
            let _ = kill_group(rsync);
        }
    }
}

/// Kills all processes that a program has started in its group.
fn kill_group(program: &mut Child) -> io::Result<()> {
    succeed(Command::new("kill").args(["-KILL", "--", &format!("-{}", program.id())]))?;
    program.wait().map(drop)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn put_away(to: &Path) -> io::Result<()> {
    if to.is_dir() {
        fs::remove_dir_all(to)?
    } else {
        fs::remove_file(to)?
    }
    sync()
}

fn quality(rtt_ms: u64, mbit: u64) -> Quality {
    let bytes_per_s = (mbit > 0).then_some(mbit * 125_000);
    Quality { delay: Duration::from_micros(rtt_ms * 500), bytes_per_s, ..Quality::default() }
}

const HEAD_START: Duration = Duration::from_secs(3);
const UNLIMITED_BYTES: u64 = 100_000_000;
