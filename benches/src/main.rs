//! Benchmarks of the real programs, with rivals run beside them in the same sitting.
//!
//! Build the programs first: `cargo build --release -p cli`. Rivals that are not installed are left out. Every figure
//! is the median of the rounds; what counts is the ratio, for machines differ.

mod changed;
mod machine;
mod mount;
mod namespace;
mod network;
mod quic;
mod race;
mod rivals;
mod slow;
mod transfer;

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::{Parser, Subcommand};
use machine::Machine;

/// Benchmarks of blobd, with rivals run beside.
#[derive(Parser)]
struct Args {
    /// Where to make data and homes; it needs some 15 GB.
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// How often to run each.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Bench(Bench),
    /// Serve a file over plain QUIC, for `transfer`.
    #[command(name = quic::SERVE, hide = true)]
    QuicServe {
        /// The file.
        file: PathBuf,
    },
    #[command(flatten)]
    MountPart(mount::Part),
}

#[derive(Subcommand)]
enum Bench {
    /// Hash and index one large file, and many small ones; beside b3sum.
    Index {
        /// The large file's size in MiB.
        #[arg(long, default_value_t = 4096)]
        mib: u64,
        /// How many small files of 4 KiB.
        #[arg(long, default_value_t = 20_000)]
        files: usize,
    },
    /// Hash alone: on two threads and on one, many small files, memory, and what outboards take; beside b3sum.
    Tree {
        /// The large file's size in MiB.
        #[arg(long, default_value_t = 4096)]
        mib: u64,
        /// How many small files of 4 KiB.
        #[arg(long, default_value_t = 50_000)]
        files: usize,
        /// The size in GiB of a sparse file of which only the memory it takes is of interest.
        #[arg(long, default_value_t = 1024)]
        sparse_gib: u64,
    },
    /// Verify one large file, and many small ones, in the page cache; beside b3sum, rsync -c and restic.
    Store {
        /// The large file's size in MiB.
        #[arg(long, default_value_t = 4096)]
        mib: u64,
        /// How many small files of 4 KiB.
        #[arg(long, default_value_t = 50_000)]
        files: usize,
    },
    /// Move files between machines over loopback; beside rsync, plain QUIC, sendme and casync.
    Transfer(transfer::Args),
    /// Move files over networks that are slow, far, and lose or reorder packets; beside rsync with CUBIC and with BBR. Needs
    /// root and TUN devices.
    Network(network::Args),
    /// Index many tiny files, look at them again, tell another machine, list them; beside find.
    Namespace {
        /// How many files, 100 in each directory.
        #[arg(long, default_value_t = 1_000_000)]
        files: usize,
    },
    /// Read and list a tree over NFS with the Linux kernel's client; beside nfs-ganesha and nfsserve. Needs root, and
    /// what `.ci/fetch-uml` brings.
    Mount(mount::Args),
    /// Repair one flipped bit in a large file: bytes received, and bytes on the wire.
    Repair {
        /// The file's size in MiB.
        #[arg(long, default_value_t = 1024)]
        mib: u64,
    },
}

fn main() -> io::Result<()> {
    let Args { dir, rounds, command } = Args::parse();
    let bench = match command {
        Command::Bench(bench) => bench,
        Command::QuicServe { file } => return quic::serve(&file),
        Command::MountPart(part) => return part.run(),
    };
    let work = tempfile::Builder::new().prefix("blobd-bench-").tempdir_in(dir)?;
    let work = work.path();
    match bench {
        Bench::Index { mib, files } => index(work, rounds, mib, files),
        Bench::Tree { mib, files, sparse_gib } => tree(work, rounds, mib, files, sparse_gib),
        Bench::Store { mib, files } => store(work, rounds, mib, files),
        Bench::Network(args) => network::network(work, rounds, &args),
        Bench::Transfer(args) => transfer::transfer(work, rounds, &args),
        Bench::Namespace { files } => namespace::namespace(work, rounds, files),
        Bench::Mount(args) => mount::mount(work, rounds, &args),
        Bench::Repair { mib } => repair(work, mib << 20),
    }
}

fn index(work: &Path, rounds: usize, mib: u64, files: usize) -> io::Result<()> {
    let (large, small) = (work.join("large"), work.join("small"));
    fs::create_dir(&large)?;
    large_file(&large.join("large"), mib << 20)?;
    small_files(&small, files)?;
    for (name, dir, bytes) in [("one large file", &large, mib << 20), ("many small files", &small, files as u64 * 4096)]
    {
        println!("{name}: {} MiB in {}", bytes >> 20, dir.display());
        let paths = files_below(dir)?;
        let mut times: [Vec<Duration>; 3] = Default::default();
        for _ in 0..rounds {
            times[0].extend(rivals::b3sum(dir, &paths, None)?);
            times[1].push(timed(|| machine::hash(dir, &paths, None))?);
            let machine = Machine::start(work, None)?;
            times[2].push(timed(|| machine.run(&["arena", "add", "bench", &dir.to_string_lossy()]))?);
        }
        table(bytes, &[("b3sum", &times[0]), ("blob hash", &times[1]), ("blob arena add", &times[2])]);
    }
    Ok(())
}

fn tree(work: &Path, rounds: usize, mib: u64, files: usize, sparse_gib: u64) -> io::Result<()> {
    let (large, small) = (work.join("large"), work.join("small"));
    fs::create_dir(&large)?;
    large_file(&large.join("large"), mib << 20)?;
    small_files(&small, files)?;
    let runs = [
        ("one large file, two threads", &large, mib << 20, Some(2)),
        ("one large file, one thread", &large, mib << 20, Some(1)),
        ("many small files", &small, files as u64 * 4096, None),
    ];
    for (name, dir, bytes, threads) in runs {
        let paths = files_below(dir)?;
        let mut times: [Vec<Duration>; 2] = Default::default();
        for _ in 0..rounds {
            times[0].extend(rivals::b3sum(dir, &paths, threads)?);
            times[1].push(timed(|| machine::hash(dir, &paths, threads))?);
        }
        println!("{name}: {} MiB", bytes >> 20);
        table(bytes, &[("b3sum", &times[0]), ("blob hash", &times[1])]);
    }
    for gib in [1, sparse_gib] {
        let dir = work.join(format!("sparse-{gib}"));
        fs::create_dir(&dir)?;
        File::create(dir.join("sparse"))?.set_len(gib << 30)?;
        let start = Instant::now();
        let hashing = machine::hash_peak_bytes(&dir, Path::new("sparse"))? >> 20;
        let seconds = start.elapsed().as_secs();
        let machine = Machine::start(work, None)?;
        let before = machine.peak_bytes() >> 20;
        machine.run(&["arena", "add", "sparse", &dir.to_string_lossy()])?;
        let after = machine.peak_bytes() >> 20;
        println!(
            "{gib} GiB of zeros: blob hash takes {hashing} MiB at most ({seconds} s), blobd {after} MiB to index it ({before} MiB before)"
        );
    }
    println!("outboards, of the size of the file:");
    for grain in ["16 KiB", "64 KiB", "256 KiB", "1 MiB"] {
        let config = format!("[store]\noutboard_grain = \"{grain}\"\n");
        let machine = Machine::start_with(work, None, &config)?;
        machine.run(&["arena", "add", "large", &large.to_string_lossy()])?;
        let outboards = machine.state().join("outboards");
        let bytes = bytes_below(&outboards)?;
        println!("  {grain:8} {bytes:10} bytes {:7.4} %", bytes as f64 / (mib << 20) as f64 * 100.0);
    }
    Ok(())
}

fn store(work: &Path, rounds: usize, mib: u64, files: usize) -> io::Result<()> {
    let (large, small) = (work.join("large"), work.join("small"));
    fs::create_dir(&large)?;
    large_file(&large.join("large"), mib << 20)?;
    small_files(&small, files)?;
    for (name, dir, bytes) in [("one large file", &large, mib << 20), ("many small files", &small, files as u64 * 4096)]
    {
        println!("verify {name}: {} MiB", bytes >> 20);
        let machine = Machine::start(work, None)?;
        machine.run(&["arena", "add", "bench", &dir.to_string_lossy()])?;
        let restic = rivals::Restic::backup(&work.join(name), dir)?;
        let paths = files_below(dir)?;
        let mut times: [Vec<Duration>; 4] = Default::default();
        for _ in 0..rounds {
            times[0].extend(rivals::b3sum(dir, &paths, None)?);
            times[1].push(timed(|| machine.run(&["verify"]))?);
            times[2].extend(rivals::rsync_compare(dir, dir)?);
            times[3].extend(restic.as_ref().map(rivals::Restic::check).transpose()?);
        }
        let rows = [
            ("b3sum", &times[0]),
            ("blob verify", &times[1]),
            ("rsync -anc, reads both sides", &times[2]),
            ("restic check --read-data", &times[3]),
        ];
        table(bytes, &rows);
    }
    Ok(())
}

fn repair(work: &Path, bytes: u64) -> io::Result<()> {
    let (tree, copy) = (work.join("tree"), work.join("copy"));
    fs::create_dir(&tree)?;
    large_file(&tree.join("large"), bytes)?;
    let a = Machine::start(work, Some(&tree))?;
    let b = Machine::start(work, None)?;
    b.join(&a)?;
    b.run(&["get", "tree", &copy.to_string_lossy()])?;
    b.run(&["arena", "add", "copy", &copy.to_string_lossy()])?;
    a.wait_for_peer_with("copy")?;
    flip_bit(&tree.join("large"), bytes / 3)?;
    let before = loopback_bytes()?;
    let lines = a.run(&["repair", "--json"])?;
    let on_wire = loopback_bytes()? - before;
    print!("{lines}");
    println!("bytes on the loopback device meanwhile, both ways, headers and acknowledgements included: {on_wire}");
    Ok(())
}

pub(crate) fn timed<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

pub(crate) fn median(times: &[Duration]) -> Option<Duration> {
    let mut times = times.to_owned();
    times.sort();
    times.get(times.len() / 2).copied()
}

/// Prints medians, rates, and ratios to the first that ran.
fn table(bytes: u64, rows: &[(&str, &Vec<Duration>)]) {
    let first = rows.iter().find_map(|(_, times)| median(times));
    for (name, times) in rows {
        let Some(time) = median(times) else {
            println!("  {name:28} not installed");
            continue;
        };
        let seconds = time.as_secs_f64();
        let rate = bytes as f64 / seconds / 1e6;
        let ratio = first.map_or(1.0, |first| first.as_secs_f64() / seconds);
        println!("  {name:28} {seconds:8.3} s {rate:8.0} MB/s {ratio:6.2} x");
    }
}

pub(crate) fn large_file(path: &Path, bytes: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut rng = fastrand::Rng::with_seed(bytes);
    let mut block = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        rng.fill(&mut block);
        let len = left.min(block.len() as u64);
        file.write_all(&block[..len as usize])?;
        left -= len;
    }
    file.sync_all()
}

pub(crate) fn small_files(dir: &Path, files: usize) -> io::Result<()> {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut bytes = [0; 4096];
    for number in 0..files {
        let sub = dir.join(format!("{:03}", number / 200));
        fs::create_dir_all(&sub)?;
        rng.fill(&mut bytes);
        fs::write(sub.join(format!("{number:06}")), bytes)?;
    }
    Ok(())
}

/// All files below `dir`, by their paths from there: thousands of short ones fit on one command line.
pub(crate) fn files_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = PathBuf::from(entry.file_name());
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?.into_iter().map(|path| name.join(path)));
        } else {
            files.push(name);
        }
    }
    Ok(files)
}

/// How many bytes the files below `dir` have.
pub(crate) fn bytes_below(dir: &Path) -> io::Result<u64> {
    let sizes = files_below(dir)?.into_iter().map(|path| Ok(fs::symlink_metadata(dir.join(path))?.len()));
    sizes.sum()
}

fn flip_bit(path: &Path, offset: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mtime = file.metadata()?.modified()?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 1], offset)?;
    file.set_modified(mtime)
}

/// Bytes that the loopback device has carried.
pub(crate) fn loopback_bytes() -> io::Result<u64> {
    let devices = fs::read_to_string("/proc/net/dev")?;
    let line = devices.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let received = line.and_then(|line| line.split_whitespace().next()).and_then(|bytes| bytes.parse().ok());
    received.ok_or_else(|| io::Error::other("no loopback device in /proc/net/dev"))
}
