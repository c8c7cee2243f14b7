//! A file system that stops answering.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tests::{Machine, Scratch, skipped, wait_for};

/// A directory that a program offers through FUSE until this is dropped.
struct Offered {
    program: Child,
    dir: PathBuf,
}

impl Offered {
    fn new(beneath: &Path, dir: &Path) -> Option<Self> {
        let program = Command::new("bindfs").arg("-f").args([beneath, dir]).spawn().ok()?;
        let offered = Self { program, dir: dir.to_owned() };
        let is_there = || fs::read_dir(dir).is_ok_and(|entries| entries.count() > 0).then_some(());
        let can_be = fs::exists("/dev/fuse").unwrap_or(false);
        can_be.then(|| wait_for("bindfs", Duration::from_secs(10), is_there)).map(|()| offered)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.program), signal).unwrap();
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

#[test]
fn a_file_system_that_hangs_stalls_only_itself() {
    let scratch = Scratch::new();
    let [docs, net, beneath] = ["docs", "net", "beneath"].map(|name| scratch.dir(name));
    for (path, text) in [(docs.join("one"), "one"), (docs.join("twin"), "twin"), (beneath.join("twin"), "twin")] {
        fs::write(path, text.repeat(10_000)).unwrap();
    }
    fs::write(beneath.join("other"), "other").unwrap();
    let Some(offered) = Offered::new(&beneath, &net) else { return skipped("bindfs cannot be mounted here") };
    let a = Machine::watching(&scratch, "a", &[&docs, &net]);
    let b = Machine::watching::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let offered = offered;
    let state = || {
        let status = a.status();
        let arenas = status["arenas"].as_array().cloned().unwrap_or_default();
        let net = arenas.into_iter().find(|arena| arena["name"] == "net").expect("it is held");
        net["status"]["state"].as_str().unwrap().to_owned()
    };
    let becomes = |expected: &str| {
        wait_for(expected, Duration::from_secs(30), || (state() == expected).then_some(()));
    };
    becomes("up to date");
    offered.signal(Signal::STOP);
    // A pass that begins before anybody knows.
    fs::write(beneath.join("other"), "changed").unwrap();
    becomes("not responding");
    fs::write(docs.join("two"), "two").unwrap();
    wait_for("what changes elsewhere is published", Duration::from_secs(30), || {
        (b.run(["cat", "docs/two"]).stdout == b"two").then_some(())
    });
    for machine in [&a, &b] {
        for name in ["one", "twin"] {
            assert!(machine.ok(["cat", &format!("docs/{name}")]).stdout == name.repeat(10_000).as_bytes());
        }
    }
    offered.signal(Signal::CONT);
    becomes("up to date");
    wait_for("what changed there is published", Duration::from_secs(30), || {
        (b.run(["cat", "net/other"]).stdout == b"changed").then_some(())
    });
}
