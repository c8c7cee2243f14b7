//! Moving files: one large one, many small ones, a tree of sources, what has changed, and slow links.
//!
//! `blob cp` syncs what it writes, which counts; no other does. What goes over the loopback device is all that does so
//! meanwhile, also of other programs.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use clap::ValueEnum;

use crate::{
    bytes_below, changed, files_below, large_file, loopback_bytes,
    machine::{Machine, succeed},
    quic::Quic,
    race::{Race, Run},
    rivals, slow, small_files, timed,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to move; everything by default.
    scenario: Option<Scenario>,
    /// `one`: the file's size in MiB.
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// `small`: how many files of 4 KiB.
    #[arg(long, default_value_t = 20_000)]
    files: usize,
    /// `tree`: the tree, and where `slow` takes its sources from; by default those that cargo has unpacked.
    #[arg(long)]
    tree: Option<PathBuf>,
    #[command(flatten)]
    changed: changed::Args,
    #[command(flatten)]
    slow: slow::Args,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// One large file.
    One,
    /// Many small files.
    Small,
    /// A tree of sources.
    Tree,
    /// A large file of which the receiver has an older version.
    Changed,
    /// A slow link, and a long one.
    Slow,
}

pub(crate) fn transfer(work: &Path, rounds: usize, args: &Args) -> io::Result<()> {
    let sources = args.tree.clone().map_or_else(cargo_sources, Ok)?;
    for scenario in Scenario::value_variants() {
        if args.scenario.is_some_and(|only| only != *scenario) {
            continue;
        }
        let name = scenario.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        let work = &work.join(&name);
        let made = &work.join("tree");
        fs::create_dir(work)?;
        match scenario {
            Scenario::One => {
                fs::create_dir(made)?;
                large_file(&made.join("large"), args.mib << 20)?;
                Field { work, name, tree: made, file: Some("large"), copies: true }.race(rounds)
            }
            Scenario::Small => {
                small_files(made, args.files)?;
                Field { work, name, tree: made, file: None, copies: true }.race(rounds)
            }
            Scenario::Tree => Field { work, name, tree: &sources, file: None, copies: false }.race(rounds),
            Scenario::Changed => changed::changed(work, rounds, &args.changed),
            Scenario::Slow => slow::slow(work, rounds, &sources, &args.slow),
        }?;
        fs::remove_dir_all(work)?;
    }
    Ok(())
}

/// Where cargo unpacks the sources of dependencies.
fn cargo_sources() -> io::Result<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")));
    home.map(|home| home.join("registry/src")).ok_or_else(|| io::Error::other("no home directory: say --tree"))
}

/// A tree to be brought from one machine to another, by all rivals.
struct Field<'a> {
    work: &'a Path,
    name: String,
    tree: &'a Path,
    /// The only file in it, which plain QUIC brings too.
    file: Option<&'a str>,
    /// Whether it is also copied into an arena, and by sendme.
    copies: bool,
}

impl Field<'_> {
    fn race(&self, rounds: usize) -> io::Result<()> {
        let Self { work, tree, .. } = *self;
        let bytes = bytes_below(tree)?;
        let arena = tree.file_name().map_or("", |name| name.to_str().unwrap_or_default());
        let (to, inbox) = (&work.join("to"), &work.join("inbox"));
        let (a, b) =
            (Machine::start_with(work, Some(tree), "name = \"a\"\n")?, Machine::start_with(work, None, QUIET)?);
        b.pair(&a)?;
        b.wait_for_all_of(&a)?;
        fs::create_dir(inbox)?;
        b.run(&["arena", "add", "inbox", &inbox.to_string_lossy()])?;
        let rsync = rivals::RsyncDaemon::start(work, tree)?;
        let quic = self.file.map(|file| Quic::start(&tree.join(file))).transpose()?;
        let sendme = if self.copies { rivals::Sendme::start(work, tree)? } else { None };

        let mut race = Race::new(&self.name, bytes);
        let (options, rsync_name) = match self.file {
            Some(_) => ("-aW", "rsync -aW from a daemon"),
            None => ("-a", "rsync -a from a daemon"),
        };
        race.add(rsync_name, || {
            let Some(rsync) = &rsync else { return Ok(None) };
            self.bring(to, to, || rsync.get(&[options], to).map(drop))
        });
        if let (Some(quic), Some(file)) = (&quic, self.file) {
            race.add("plain QUIC, discarded", move || {
                let run = measured(loopback_bytes, || same("bytes", bytes, quic.fetch(None)?))?;
                Ok(Some(run))
            });
            race.add("plain QUIC, written to a file", move || {
                fs::create_dir(to)?;
                self.bring(to, to, || quic.fetch(Some(&to.join(file))).map(drop))
            });
        }
        race.add("blob get", || self.bring(to, to, || b.run(&["get", arena, &to.to_string_lossy()]).map(drop)));
        if self.copies {
            race.add("blob cp into an arena", || {
                let copy = || b.run(&["cp", &format!("a:{arena}"), "inbox/copy"]).map(drop);
                let run = self.bring(&inbox.join("copy"), &inbox.join("copy"), copy)?;
                b.run(&["arena", "scan", "inbox"])?;
                Ok(run)
            });
            race.add("sendme", || {
                let Some(sendme) = &sendme else { return Ok(None) };
                fs::create_dir(to)?;
                self.bring(to, &to.join(arena), || sendme.receive(to).map(drop))
            });
        }
        race.rehearse()?;
        race.run(rounds)
    }

    /// Brings the tree to `at`, and then puts `to` away, where it is, or above it.
    fn bring(&self, to: &Path, at: &Path, work: impl FnOnce() -> io::Result<()>) -> io::Result<Option<Run>> {
        let run = measured(loopback_bytes, work)?;
        let what = at.display();
        same(&format!("files in {what}"), files_below(self.tree)?.len() as u64, files_below(at)?.len() as u64)?;
        let bytes = bytes_below(self.tree)?;
        same(&format!("bytes in {what}"), bytes, bytes_below(at)?)?;
        // Of what is all different, nothing can be had elsewhere.
        if self.copies && run.wire < Some(bytes) {
            return Err(io::Error::other(format!("{:?} bytes on the wire, of {bytes}", run.wire)));
        }
        self.put_away(to)?;
        Ok(Some(run))
    }

    /// One file is removed. Many are only moved aside: ext4 takes no inode again for minutes after it was deleted, and
    /// whoever makes files meanwhile pays for the search.
    fn put_away(&self, tree: &Path) -> io::Result<()> {
        if self.file.is_some() {
            return remove(tree);
        }
        let aside = self.work.join("aside");
        fs::create_dir_all(&aside)?;
        let number = fs::read_dir(&aside)?.count();
        fs::rename(tree, aside.join(number.to_string()))?;
        sync()
    }
}

/// Does it, and tells how long it took, and by how much `wire` went on meanwhile.
pub(crate) fn measured(wire: impl Fn() -> io::Result<u64>, work: impl FnOnce() -> io::Result<()>) -> io::Result<Run> {
    let before = wire()?;
    let time = timed(work)?;
    Ok(Run { time, wire: Some(wire()? - before), ..Run::default() })
}

pub(crate) fn same(what: &str, expected: u64, found: u64) -> io::Result<()> {
    let wrong = || io::Error::other(format!("{what}: {found}, and not {expected}"));
    (found == expected).then_some(()).ok_or_else(wrong)
}

/// Removes a tree. The file system is to be done with that before anything else is measured.
pub(crate) fn remove(tree: &Path) -> io::Result<()> {
    fs::remove_dir_all(tree)?;
    sync()
}

pub(crate) fn sync() -> io::Result<()> {
    succeed(&mut Command::new("sync")).map(drop)
}

/// A receiver whose watcher looks at nothing while others are being measured.
pub(crate) const QUIET: &str = "name = \"b\"\n[watch]\nsettle = \"1h\"\nsettle_max = \"1h\"\n";
