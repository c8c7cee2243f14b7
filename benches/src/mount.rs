//! A tree over NFS: by the Linux kernel's client, in a guest with one processor, and by a client that only calls.
//!
//! Each measurement by the kernel is of a new mount, and timed in the guest. What is served is in the host's page cache.

mod cold;
mod mirror;
mod raw;
mod servers;

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Subcommand, ValueEnum};
use raw::{Calls, What};
use servers::{LARGE, Server};
use tests::{Guest, Hardware, MOUNT, Network, Scratch, Unavailable};

use crate::{
    files_below, large_file,
    race::{Race, Run},
    small_files,
    transfer::same,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure; everything by default.
    scenario: Option<Scenario>,
    /// The large file's size in MiB.
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// `walk`: how many files to list; once with a tenth of them, once with all.
    #[arg(long, default_value_t = 200_000)]
    listed: usize,
    /// `small`: how many files of 4 KiB to read; once a tenth of them, once all.
    #[arg(long, default_value_t = 20_000)]
    files: usize,
    /// `random`: how many reads of 4 KiB.
    #[arg(long, default_value_t = 20_000)]
    reads: u64,
    #[command(flatten)]
    cold: cold::Args,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Read one large file from its start to its end.
    Sequential,
    /// List many files: find, and ls -lR.
    Walk,
    /// Read many small files.
    Small,
    /// Read 4 KiB anywhere in a large file.
    Random,
    /// Calls without the kernel.
    Raw,
    /// What is not here yet, from a peer that is far away.
    Cold,
}

/// What runs in a process, a network, or a guest of its own.
#[derive(Subcommand)]
pub(crate) enum Part {
    /// Serve a directory with nfsserve.
    #[command(name = mirror::SERVE, hide = true)]
    Serve { dir: PathBuf, address: SocketAddr },
    /// Call an NFS server.
    #[command(name = raw::CALL, hide = true)]
    Call(Calls),
    /// Read 4 KiB anywhere in a file, on so many threads.
    #[command(name = READ, hide = true)]
    Read { file: PathBuf, count: u64, threads: u64 },
}

impl Part {
    pub(crate) fn run(&self) -> io::Result<()> {
        match self {
            Self::Serve { dir, address } => mirror::serve(dir, *address),
            Self::Call(calls) => raw::call(calls),
            Self::Read { file, count, threads } => read_anywhere(file, *count, *threads),
        }
    }
}

pub(crate) fn mount(work: &Path, rounds: usize, args: &Args) -> io::Result<()> {
    let wanted = |scenario| args.scenario.is_none_or(|only| only == scenario);
    if wanted(Scenario::Cold) {
        cold::cold(work, rounds, &args.cold)?;
    }
    if args.scenario == Some(Scenario::Cold) {
        return Ok(());
    }
    let (listed, files) = ([args.listed / 10, args.listed], [args.files / 10, args.files]);
    let tree = &work.join("tree");
    fs::create_dir_all(tree.join("large"))?;
    large_file(&tree.join(LARGE), args.mib << 20)?;
    for count in listed.into_iter().filter(|_| wanted(Scenario::Walk)) {
        small_files(&tree.join(format!("listed-{count}")), count)?;
    }
    for count in files.into_iter().filter(|_| wanted(Scenario::Small)) {
        small_files(&tree.join(format!("small-{count}")), count)?;
    }
    let network = Network::new().ok_or_else(|| io::Error::other("no network of its own"))?;
    let scratch = Scratch::new();
    let hardware = Hardware { cpu: Some(1), memory_mib: 768 };
    let guest = Guest::boot_with(&network, &scratch, hardware);
    let guest = guest.map_err(|Unavailable(why)| io::Error::other(why))?;
    let servers = Server::start_all(&network, &scratch, work, tree)?;
    let field = Field { network: &network, guest: &guest, servers: &servers, rounds };

    if wanted(Scenario::Sequential) {
        let script = format!("dd if={MOUNT}/{LARGE} of=/dev/null bs=1M 2>&1 | sed -n 's/ bytes.*//p'");
        field.race(Race::new("sequential read", args.mib << 20), &script, args.mib << 20)?;
    }
    for count in listed.into_iter().filter(|_| wanted(Scenario::Walk)) {
        let dir = format!("listed-{count}");
        let expected = files_below(&tree.join(&dir))?.len() as u64;
        for (name, script) in [
            ("find", format!("find {MOUNT}/{dir} -type f | wc -l")),
            ("ls -lR", format!("ls -lR {MOUNT}/{dir} | grep -c ^-")),
        ] {
            field.race(Race::counting(format!("{name} of {count} files"), expected), &script, expected)?;
        }
    }
    for count in files.into_iter().filter(|_| wanted(Scenario::Small)) {
        let script = format!("find {MOUNT}/small-{count} -type f -print0 | xargs -0 cat | wc -c");
        let race = Race::counting(format!("reading {count} files of 4 KiB"), count as u64);
        field.race(race, &script, count as u64 * 4096)?;
    }
    for threads in [1, 8].into_iter().filter(|_| wanted(Scenario::Random)) {
        let program = std::env::current_exe()?;
        let script = format!("{} {READ} {MOUNT}/{LARGE} {} {threads}", program.display(), args.reads);
        let race = Race::counting(format!("4 KiB anywhere, {threads} at a time"), args.reads);
        field.race(race, &script, args.reads)?;
    }
    if wanted(Scenario::Raw) {
        let calls = |what, count, size, window| {
            move |server: &Server, network: &Network| server.calls(network, LARGE, what, count, size, window)
        };
        let race = Race::new("without a kernel: READ of 1 MiB, 16 on their way", args.mib << 20);
        field.race_raw(race, calls(What::Sequential, args.mib, 1 << 20, 16))?;
        let race = Race::counting("without a kernel: READ of 4 KiB anywhere, 32 on their way", args.reads);
        field.race_raw(race, calls(What::Random, args.reads, 4096, 32))?;
        let race = Race::counting("without a kernel: GETATTR, 64 on their way", args.reads);
        field.race_raw(race, calls(What::Attributes, args.reads, 0, 64))?;
    }
    Ok(())
}

struct Field<'a> {
    network: &'a Network,
    guest: &'a Guest,
    servers: &'a [Server],
    rounds: usize,
}

impl<'a> Field<'a> {
    /// Times a script in the guest, each time in a new mount. It must print `expected`.
    fn race(&self, mut race: Race<'a>, script: &'a str, expected: u64) -> io::Result<()> {
        for server in self.servers {
            let guest = self.guest;
            let timed = format!(
                "echo 3 >/proc/sys/vm/drop_caches; start=$(date +%s%N); found=$({script}) || exit\n\
                 echo $found $(($(date +%s%N) - start))"
            );
            race.add(server.name, move || {
                guest.mount(&server.export, &server.options());
                let cpu = server.cpu()?;
                let output = guest.start(&timed).wait_within(LIMIT);
                let cpu = Some(server.cpu()? - cpu);
                guest.unmount();
                let said = output.text();
                let numbers: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
                let [found, nanos] = numbers[..] else {
                    return Err(io::Error::other(format!("{}: {said}{}", server.name, output.stderr)));
                };
                same(server.name, expected, found)?;
                Ok(Some(Run { time: Duration::from_nanos(nanos), cpu, ..Run::default() }))
            });
        }
        race.run(self.rounds)
    }

    /// Times calls without the guest.
    fn race_raw(
        &self,
        mut race: Race<'a>,
        calls: impl Fn(&Server, &Network) -> io::Result<(Duration, u64)> + Copy + 'a,
    ) -> io::Result<()> {
        for server in self.servers {
            let network = self.network;
            race.add(server.name, move || {
                let cpu = server.cpu()?;
                let (time, _) = calls(server, network)?;
                Ok(Some(Run { time, cpu: Some(server.cpu()? - cpu), ..Run::default() }))
            });
        }
        race.run(self.rounds)
    }
}

fn read_anywhere(file: &Path, count: u64, threads: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::open(file)?;
    let blocks = file.metadata()?.len() / 4096;
    std::thread::scope(|scope| {
        let read = |seed| {
            let (mut rng, file) = (fastrand::Rng::with_seed(seed), &file);
            move || (0..count / threads).try_for_each(|_| file.read_exact_at(&mut [0; 4096], rng.u64(..blocks) * 4096))
        };
        let readers: Vec<_> = (0..threads).map(|seed| scope.spawn(read(seed))).collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("readers do not panic"))
    })?;
    println!("{count}");
    Ok(())
}

const READ: &str = "read-anywhere";
/// How long one measurement may take.
const LIMIT: Duration = Duration::from_secs(600);
