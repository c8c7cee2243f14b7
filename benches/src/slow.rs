//! A link that carries little, where compression may help, and one that is long.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
    time::Duration,
};

use tests::{Link, Quality};

use crate::{
    bytes_below, files_below, large_file,
    machine::Machine,
    race::{Race, Run},
    small_files,
    transfer::{QUIET, measured, remove, same},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// `slow`: the size in MiB of the two files, one of source text and one of random bytes.
    #[arg(long, default_value_t = 8)]
    slow_mib: u64,
    /// `slow`: how many bytes the slow link carries a second, each way.
    #[arg(long, default_value_t = 2_000_000)]
    rate: u64,
    /// `slow`: how many ms the long link takes, each way.
    #[arg(long, default_value_t = 50)]
    delay_ms: u64,
    /// `slow`: the size in MiB of the file that the long link carries.
    #[arg(long, default_value_t = 64)]
    far_mib: u64,
    /// `slow`: how many files of 4 KiB the long link carries.
    #[arg(long, default_value_t = 500)]
    far_files: usize,
}

pub(crate) fn slow(work: &Path, rounds: usize, sources: &Path, args: &Args) -> io::Result<()> {
    let tree = work.join("tree");
    fs::create_dir(&tree)?;
    let bytes = args.slow_mib << 20;
    source_text(sources, &tree.join("text"), bytes)?;
    large_file(&tree.join("random"), bytes)?;
    let slow = Quality { delay: Duration::ZERO, bytes_per_s: Some(args.rate), ..Quality::default() };
    let off = Far::start(work, &tree, "[transfer]\ncompress = \"off\"\n", slow)?;
    let auto = Far::start(work, &tree, "[transfer]\ncompress = \"auto\"\n", slow)?;
    for what in ["text", "random"] {
        let mut race = Race::new(format!("{what} over {} kB/s", args.rate / 1000), bytes);
        race.add("blob get, compress = off", || off.get(what));
        race.add("blob get, compress = auto", || auto.get(what));
        race.run(rounds)?;
    }
    drop((off, auto));
    remove(&tree)?;

    fs::create_dir(&tree)?;
    fs::create_dir(tree.join("large"))?;
    large_file(&tree.join("large/large"), args.far_mib << 20)?;
    small_files(&tree.join("small"), args.far_files)?;
    let long = Quality { delay: Duration::from_millis(args.delay_ms), bytes_per_s: None, ..Quality::default() };
    let far = Far::start(work, &tree, "", long)?;
    for what in ["large", "small"] {
        let dir = tree.join(what);
        let title = format!("{} files, {} ms round trip", files_below(&dir)?.len(), args.delay_ms * 2);
        let mut race = Race::new(title, bytes_below(&dir)?);
        race.add("blob get", || far.get(what));
        race.run(rounds)?;
    }
    Ok(())
}

/// A machine that has a tree, and one that gets from it, with a link between them.
struct Far<'a> {
    work: &'a Path,
    tree: &'a Path,
    a: Machine,
    b: Machine,
    link: Link,
}

impl<'a> Far<'a> {
    fn start(work: &'a Path, tree: &'a Path, config: &str, quality: Quality) -> io::Result<Self> {
        let a = Machine::start_with(work, Some(tree), config)?;
        let b = Machine::start_deaf(work, QUIET)?;
        let link = Link::start(a.address()?, quality)?;
        b.pair_at("a", &a, link.address())?;
        b.wait_for_all_of(&a)?;
        Ok(Self { work, tree, a, b, link })
    }

    /// Gets a file, or a directory, over the link and over nothing else.
    fn get(&self, what: &str) -> io::Result<Option<Run>> {
        let (from, to) = (self.tree.join(what), self.work.join("to"));
        fs::create_dir(&to)?;
        let carried = || Ok(self.link.carried().iter().sum());
        let cpu = self.a.cpu()?;
        let mut told = None;
        let run = measured(carried, || {
            let summary = self.b.summary(&["get", &format!("tree/{what}"), &to.to_string_lossy()])?;
            told = summary["bytes_received"].as_u64();
            Ok(())
        })?;
        let cpu = Some(self.a.cpu()? - cpu);
        self.b.is_connected_at(self.link.address())?;
        let (files, bytes) = if from.is_dir() {
            (files_below(&from)?.len() as u64, bytes_below(&from)?)
        } else {
            (1, fs::metadata(&from)?.len())
        };
        same("files", files, files_below(&to)?.len() as u64)?;
        same("bytes", bytes, bytes_below(&to)?)?;
        remove(&to)?;
        Ok(Some(Run { told, cpu, ..run }))
    }
}

/// Writes so many bytes of Rust sources, one behind the other.
fn source_text(sources: &Path, to: &Path, bytes: u64) -> io::Result<()> {
    let mut paths = files_below(sources)?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    paths.sort();
    let (mut file, mut left) = (File::create(to)?, bytes);
    for path in paths {
        left -= io::copy(&mut File::open(sources.join(path))?.take(left), &mut file)?;
    }
    file.flush()?;
    if left > 0 {
        return Err(io::Error::other(format!("{} has no {bytes} bytes of Rust sources", sources.display())));
    }
    file.sync_all()
}
