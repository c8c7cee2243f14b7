//! A file of which the receiver has an older version: what takes how long, and how much of it is sent.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{
    large_file, loopback_bytes,
    machine::Machine,
    race::{Race, Run},
    rivals,
    transfer::{QUIET, measured, remove, sync},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// `changed`: the file's size in MiB.
    #[arg(long, default_value_t = 1024)]
    changed_mib: u64,
}

#[derive(Clone, Copy)]
enum Change {
    InPlace,
    Appended,
    Inserted,
}

pub(crate) fn changed(work: &Path, rounds: usize, args: &Args) -> io::Result<()> {
    let old = &work.join("old");
    large_file(old, args.changed_mib << 20)?;
    // A quick look, too, tells the two versions apart.
    File::options().write(true).open(old)?.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000))?;
    for (name, change) in [
        ("changed in place, 100 times 16 KiB", Change::InPlace),
        ("changed, 1 MiB appended", Change::Appended),
        ("changed, 100 bytes inserted", Change::Inserted),
    ] {
        let work = &work.join("change");
        let tree = work.join("tree");
        fs::create_dir_all(&tree)?;
        let new = &tree.join("file");
        make_new(old, new, change)?;
        let case = Case { work, old, new };
        let bytes = fs::metadata(new)?.len();
        let rsync = rivals::RsyncDaemon::start(work, &tree)?;
        let casync = rivals::Casync::make(work, old, new)?;
        let mut race = Race::new(name, bytes);
        race.add("rsync -a --no-whole-file", || {
            let Some(rsync) = &rsync else { return Ok(None) };
            case.update(|to, _| measured(loopback_bytes, || rsync.get(&["-a", "--no-whole-file"], to).map(drop)))
        });
        race.add("blob cp --overwrite", || case.update(|to, _| blob(&case, to)));
        race.add("casync extract --seed, from disk", || {
            let Some(casync) = &casync else { return Ok(None) };
            case.update(|to, file| {
                let made = to.join("made");
                let run = measured(
                    || Ok(0),
                    || {
                        casync.extract(file, &made)?;
                        fs::rename(&made, file)
                    },
                )?;
                Ok(Run { wire: None, told: Some(casync.new_bytes), ..run })
            })
        });
        race.run(rounds)?;
        drop((rsync, casync));
        remove(work)?;
    }
    Ok(())
}

/// Both machines are new: neither has looked for chunks in its file before.
fn blob(case: &Case, to: &Path) -> io::Result<Run> {
    let a = Machine::start_with(case.work, case.new.parent(), "name = \"a\"\n")?;
    let b = Machine::start_with(case.work, None, QUIET)?;
    b.run(&["arena", "add", "inbox", &to.to_string_lossy()])?;
    b.join(&a)?;
    b.wait_for_all_of(&a)?;
    a.wait_for_all_of(&b)?;
    sync()?;
    let mut told = None;
    let run = measured(loopback_bytes, || {
        told = b.summary(&["cp", "--overwrite", "a:tree/file", "inbox/file"])?["bytes_sent"].as_u64();
        Ok(())
    })?;
    Ok(Run { told, ..run })
}

/// An older and a newer version.
struct Case<'a> {
    work: &'a Path,
    old: &'a Path,
    new: &'a Path,
}

impl Case<'_> {
    /// Has `bring` make a directory's only file, which is the old version at first, the new one.
    fn update(&self, bring: impl FnOnce(&Path, &PathBuf) -> io::Result<Run>) -> io::Result<Option<Run>> {
        let to = self.work.join("to");
        let file = to.join("file");
        fs::create_dir(&to)?;
        fs::copy(self.old, &file)?;
        let modified = fs::metadata(self.old)?.modified()?;
        File::options().write(true).open(&file)?.set_modified(modified)?;
        sync()?;
        let run = bring(&to, &file)?;
        if !are_same(self.new, &file)? {
            return Err(io::Error::other("what arrived is not the new version"));
        }
        remove(&to)?;
        Ok(Some(run))
    }
}

fn make_new(old: &Path, new: &Path, change: Change) -> io::Result<()> {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut fresh = vec![0; 1 << 20];
    rng.fill(&mut fresh);
    let mut file = File::options().read(true).write(true).create_new(true).open(new)?;
    if let Change::Inserted = change {
        file.write_all(&fresh[..100])?;
    }
    io::copy(&mut File::open(old)?, &mut file)?;
    match change {
        Change::InPlace => {
            let blocks = file.seek(SeekFrom::End(0))? / BLOCK_BYTES as u64;
            for _ in 0..100 {
                rng.fill(&mut fresh[..BLOCK_BYTES]);
                file.write_all_at(&fresh[..BLOCK_BYTES], rng.u64(..blocks) * BLOCK_BYTES as u64)?;
            }
        }
        Change::Appended => file.write_all(&fresh)?,
        Change::Inserted => {}
    }
    file.sync_all()
}

/// Whether two files have the same bytes.
fn are_same(one: &Path, other: &Path) -> io::Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let mut left = one.metadata()?.len();
    if other.metadata()?.len() != left {
        return Ok(false);
    }
    let (mut these, mut those) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    while left > 0 {
        let len = left.min(these.len() as u64) as usize;
        one.read_exact(&mut these[..len])?;
        other.read_exact(&mut those[..len])?;
        if these[..len] != those[..len] {
            return Ok(false);
        }
        left -= len as u64;
    }
    Ok(true)
}

const BLOCK_BYTES: usize = 16 << 10;
