//! Reading what is not here yet, from a peer behind a link, through the mount and by `blob get`.

use std::{fs, io, net::SocketAddr, path::Path, time::Duration};

use tests::{Link, Quality};

use super::raw::{self, Calls, What};
use crate::{
    large_file,
    machine::Machine,
    median,
    race::{Race, Run},
    timed,
    transfer::{QUIET, remove, same},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// `cold`: how many ms the link takes, each way.
    #[arg(long, default_value_t = 25)]
    cold_delay_ms: u64,
    /// `cold`: the size in MiB of the file that is read in order.
    #[arg(long, default_value_t = 256)]
    cold_mib: u64,
}

pub(crate) fn cold(work: &Path, rounds: usize, args: &Args) -> io::Result<()> {
    let tree = &work.join(ARENA);
    fs::create_dir(tree)?;
    let bytes = args.cold_mib << 20;
    // Different sizes, for different bytes: each is read once.
    for number in 0..rounds {
        large_file(&tree.join(format!("first-{number}")), FIRST_BYTES + number as u64)?;
        large_file(&tree.join(format!("large-{number}")), bytes + number as u64)?;
    }
    let long = Duration::from_millis(args.cold_delay_ms);
    first_bytes(&Far::start(work, tree, long)?, rounds, 2 * long)?;
    for delay in [Duration::ZERO, long] {
        let far = Far::start(work, tree, delay)?;
        let (far, to) = (&far, &work.join("to"));
        let mut race = Race::new(format!("in order, {} ms round trip", 2 * delay.as_millis()), bytes);
        let mut names = (0..rounds).map(|number| format!("large-{number}"));
        let mut names_to_read = names.clone();
        race.add("blob get", move || {
            let Some(name) = names.next() else { return Ok(None) };
            fs::create_dir(to)?;
            let get = || far.b.run(&["get", &format!("{ARENA}/{name}"), &to.to_string_lossy()]).map(drop);
            let run = Run { time: timed(get)?, ..Run::default() };
            remove(to)?;
            Ok(Some(run))
        });
        race.add("READ of 128 KiB, 2 on their way", move || {
            let Some(name) = names_to_read.next() else { return Ok(None) };
            let (time, came) = far.read(&name, bytes / READ_BYTES, READ_BYTES, 2)?;
            same("bytes", bytes, came)?;
            Ok(Some(Run { time, ..Run::default() }))
        });
        race.run(rounds)?;
    }
    remove(tree)
}

/// The first 4 KiB of files of which nothing is here.
fn first_bytes(far: &Far, rounds: usize, round_trip: Duration) -> io::Result<()> {
    let times: io::Result<Vec<_>> =
        (0..rounds).map(|number| far.read(&format!("first-{number}"), 1, 4096, 1).map(|(time, _)| time)).collect();
    let time = median(&times?).unwrap_or_default().as_secs_f64();
    println!("first 4 KiB: {:.1} ms, {:.2} round trips", time * 1e3, time / round_trip.as_secs_f64());
    Ok(())
}

/// A machine that mounts, and one behind a link that has a tree.
struct Far {
    _a: Machine,
    b: Machine,
    nfs: SocketAddr,
    _link: Link,
}

impl Far {
    fn start(work: &Path, tree: &Path, delay: Duration) -> io::Result<Self> {
        let a = Machine::start_with(work, Some(tree), "")?;
        let b = Machine::start_deaf(work, &format!("{QUIET}[nfs]\nlisten = \"127.0.0.1:0\"\n"))?;
        let link = Link::start(a.address()?, Quality { delay, bytes_per_s: None, ..Quality::default() })?;
        b.pair_at("a", &a, link.address())?;
        b.wait_for_all_of(&a)?;
        Ok(Self { nfs: b.nfs_address()?, _a: a, b, _link: link })
    }

    /// Has `count` READs of `size` bytes answered, in order. Returns how long that took, and how many bytes came.
    fn read(&self, file: &str, count: u64, size: u64, window: u64) -> io::Result<(Duration, u64)> {
        raw::run(&Calls {
            server: self.nfs,
            mount_port: self.nfs.port(),
            export: format!("/{ARENA}"),
            file: file.to_owned(),
            what: What::Sequential,
            count,
            size: size as u32,
            window,
        })
    }
}

const ARENA: &str = "far";
const FIRST_BYTES: u64 = 1 << 20;
/// What Linux reads ahead unless it is told otherwise.
const READ_BYTES: u64 = 128 << 10;
