//! Many files: what it takes to index them, to look at them again, to tell them to another machine, and to list them.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{loopback_bytes, machine::Machine, median, timed};

pub(crate) fn namespace(work: &Path, rounds: usize, files: usize) -> io::Result<()> {
    let tree = work.join("tree");
    make_tree(&tree, files)?;
    // The same without any file, to tell what a connection costs in itself.
    let (idle_a, idle_b) = (Machine::start(work, None)?, Machine::start(work, None)?);
    idle_b.pair(&idle_a)?;
    let idle = reconnect(idle_b)?;
    drop(idle_a);

    let a = Machine::start(work, None)?;
    let scan = timed(|| a.run(&["arena", "add", "tree", &tree.to_string_lossy()]))?;
    println!("{files} files, first scan      {:9.3} s", scan.as_secs_f64());
    print_size("the daemon that holds them", &a, files)?;
    let mut times: [Vec<Duration>; 2] = Default::default();
    for _ in 0..rounds {
        times[0].push(timed(|| find(&tree))?);
        times[1].push(timed(|| a.run(&["arena", "scan", "tree"]))?);
    }
    let [find, rescan] = times.map(|times| median(&times).unwrap_or_default().as_secs_f64());
    println!(
        "find -printf                {find:9.3} s\nrescan                      {rescan:9.3} s {:6.2} x",
        rescan / find
    );

    let b = Machine::start(work, None)?;
    let (start, before) = (Instant::now(), loopback_bytes()?);
    b.pair(&a)?;
    b.wait_for_all_of(&a)?;
    let (seconds, bytes) = (start.elapsed().as_secs_f64(), loopback_bytes()? - before);
    println!("first exchange              {seconds:9.3} s {:9.1} bytes a file", bytes as f64 / files as f64);
    print_size("the daemon that heard of them", &b, files)?;
    let first = format!("tree/{}", directory(0));
    for (name, args) in [("ls of one directory", vec!["ls", &first]), ("ls -R", vec!["ls", "-R", "tree"])] {
        let times: Vec<_> = (0..rounds).map(|_| timed(|| b.run(&args))).collect::<io::Result<_>>()?;
        println!("{name:27} {:9.3} s", median(&times).unwrap_or_default().as_secs_f64());
    }
    let (b, seconds, bytes) = reconnect(b)?;
    println!("reconnect, nothing changed  {seconds:9.3} s {bytes:9} bytes, of which {} without any file", idle.2);
    for number in 0..10 {
        fs::write(tree.join(directory(number * 7)).join("picture-new.jpg"), number.to_string())?;
    }
    let before = loopback_bytes()?;
    a.run(&["arena", "scan", "tree"])?;
    let start = Instant::now();
    b.wait_for_all_of(&a)?;
    println!(
        "10 new files                {:9.3} s {:9} bytes",
        start.elapsed().as_secs_f64(),
        loopback_bytes()? - before
    );
    let b_home = b.stop();
    for number in 0..10 {
        fs::write(tree.join(directory(number * 7)).join("picture-new.jpg"), "changed")?;
    }
    a.run(&["arena", "scan", "tree"])?;
    let before = loopback_bytes()?;
    let b = Machine::again(b_home)?;
    b.wait_for_all_of(&a)?;
    thread::sleep(QUIET);
    println!("reconnect, 10 changes                   {:9} bytes", loopback_bytes()? - before);

    let start = Instant::now();
    fs::rename(tree.join("shelf-0"), tree.join("renamed"))?;
    a.run(&["arena", "scan", "tree"])?;
    let moved = files.min(1000 * FILES_EACH);
    println!("a directory of {moved} files renamed, settled after {:.3} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Where directory `number` is.
fn directory(number: usize) -> String {
    format!("shelf-{}/project-{:02}/chapter-{:02}", number / 1000, number / 100 % 10, number % 100)
}

fn make_tree(tree: &Path, files: usize) -> io::Result<()> {
    for number in 0..files {
        let dir = tree.join(directory(number / FILES_EACH));
        if number % FILES_EACH == 0 {
            fs::create_dir_all(&dir)?;
        }
        fs::write(dir.join(format!("picture-{number:07}.jpg")), format!("the contents of file {number}\n"))?;
    }
    Ok(())
}

fn print_size(what: &str, machine: &Machine, files: usize) -> io::Result<()> {
    let database = fs::metadata(machine.state().join("blobd.redb"))?;
    let (disk, peak) = (database.blocks() * 512, machine.peak_bytes() >> 20);
    println!(
        "{what}: {:.0} bytes of disk a file in its database, {peak} MiB of memory at most",
        disk as f64 / files as f64
    );
    Ok(())
}

/// Prints what a scan must at least ask of each file, as find does.
fn find(tree: &Path) -> io::Result<()> {
    let mut command = Command::new("find");
    command.arg(tree).args(["-printf", "%p %y %s %m %T@ %C@ %i %D\\n"]).stdout(Stdio::null());
    if command.status()?.success() { Ok(()) } else { Err(io::Error::other("find failed")) }
}

/// Starts a machine again, and tells after how many seconds it was connected, and how many bytes went both ways.
fn reconnect(machine: Machine) -> io::Result<(Machine, f64, u64)> {
    let home = machine.stop();
    thread::sleep(QUIET);
    let (start, before) = (Instant::now(), loopback_bytes()?);
    let machine = Machine::again(home)?;
    machine.wait_for("a connection", |status| status["peers"][0]["connected"].is_string())?;
    let seconds = start.elapsed().as_secs_f64();
    thread::sleep(QUIET);
    Ok((machine, seconds, loopback_bytes()? - before))
}

const FILES_EACH: usize = 100;
/// How long it takes until nothing more is said, keep-alives left aside.
const QUIET: Duration = Duration::from_secs(2);
