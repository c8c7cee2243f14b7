//! Bytes between two machines on networks that are slow, or worse; and limits on them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use fastrand::Rng;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tests::{Fate, Link, Machine, Quality, Scratch, Way, random_bytes, skipped, wait_for};

/// Two machines with a network between them: the one that has files, and one that only dials it through the link.
struct Two {
    near: Machine,
    link: Link,
    to: PathBuf,
}

impl Two {
    fn start(scratch: &Scratch, name: &str, far: &Machine, config: &str) -> Self {
        let near = Machine::up_with_config::<&Path>(scratch, name, &[], config);
        near.stop();
        near.restart_deaf();
        let link = Link::start(far.address().parse().unwrap(), Quality::default()).unwrap();
        far.ok(["peer", "add", name, &near.id()]);
        near.ok(["peer", "add", "far", &far.id(), "--address", &link.address().to_string()]);
        near.hears(far);
        assert_eq!(near.peer("far").unwrap()["connected"], link.address().to_string());
        let to = scratch.dir(&format!("{name}.to"));
        Self { near, link, to }
    }

    /// Gets a file, which must be these bytes then. Returns how many bytes came over the link for it, and how long it took.
    fn get(&self, name: &str, bytes: &[u8]) -> (u64, Duration) {
        let ([_, before], began) = (self.link.carried(), Instant::now());
        self.near.ok(["get".as_ref(), Path::new("docs").join(name).as_os_str(), self.to.as_os_str()]);
        let took = began.elapsed();
        assert!(fs::read(self.to.join(name)).unwrap() == bytes, "{name} differs");
        (self.link.carried()[1] - before, took)
    }
}

/// A tree that becomes DEST, interrupted: the same command goes on in DEST, and does not put a second tree into it.
#[test]
fn an_interrupted_get_of_a_tree_goes_on_where_it_was() {
    let scratch = Scratch::new();
    let bytes = random_bytes(8 << 20, &mut Rng::with_seed(2));
    let files = [("one", &bytes[..1 << 20]), ("two", &bytes[1 << 20..4 << 20]), ("three", &bytes[4 << 20..])];
    let far = far(&scratch, &files, "");
    let two = Two::start(&scratch, "near", &far, "");
    two.near.ok(["limit", "--down", "1MiB"]);
    let to = scratch.path("tree");
    let args = ["get".as_ref(), "docs".as_ref(), to.as_os_str()];
    let mut getting = two.near.command(args).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    wait_for("something of it", Duration::from_secs(20), || to.exists().then_some(()));
    kill_process(Pid::from_child(&getting), Signal::INT).unwrap();
    assert_eq!(getting.wait().unwrap().code(), Some(130));
    two.near.ok(["limit", "--down", "none"]);
    // It is known also behind a restart; what was not begun so goes into DEST.
    two.near.kill9();
    two.near.restart_deaf();
    two.near.hears(&far);
    two.near.ok(["get".as_ref(), "docs/one".as_ref(), to.as_os_str()]);
    two.near.ok(args);
    for (name, bytes) in files {
        assert!(fs::read(to.join(name)).unwrap() == bytes, "{name} differs");
    }
    assert_eq!(fs::read_dir(&to).unwrap().count(), 3);
    // That was its end: once more is as with cp -r.
    two.near.ok(args);
    assert_eq!(fs::read_dir(to.join("docs")).unwrap().count(), 3);
}

/// Ctrl-C of a large file stops it, and the next time it goes on with what came.
#[test]
fn an_interrupted_get_stops_and_goes_on() {
    let scratch = Scratch::new();
    let bytes = random_bytes(32 << 20, &mut Rng::with_seed(1));
    let far = far(&scratch, &[("large", &bytes)], "");
    let two = Two::start(&scratch, "near", &far, "");
    two.near.ok(["limit", "--down", "8MiB"]);
    let args = ["get".as_ref(), Path::new("docs/large").as_os_str(), two.to.as_os_str()];
    let mut getting = two.near.command(args).stderr(Stdio::null()).spawn().unwrap();
    // 4 MiB, which is a stream's window, may be on their way.
    wait_for("some of it", Duration::from_secs(20), || (two.link.carried()[1] > 16 << 20).then_some(()));
    kill_process(Pid::from_child(&getting), Signal::INT).unwrap();
    assert_eq!(getting.wait().unwrap().code(), Some(130));
    two.near.ok(["limit", "--down", "none"]);
    let again = two.near.ok(["get".as_ref(), "--json".as_ref(), args[1], args[2]]).summary();
    assert!(again["bytes_received"].as_u64() < Some(28 << 20), "{again}");
    assert!(fs::read(two.to.join("large")).unwrap() == bytes);
}

/// Words, as many as make so many bytes: they shrink to less than a third.
fn text(bytes: usize) -> Vec<u8> {
    let mut rng = Rng::with_seed(7);
    let mut word = || (0..rng.usize(4..12)).map(|_| rng.lowercase()).collect();
    let words: Vec<String> = (0..500).map(|_| word()).collect();
    let mut text = Vec::new();
    while text.len() < bytes {
        text.extend_from_slice(rng.choice(&words).unwrap().as_bytes());
        text.push(b' ');
    }
    text.truncate(bytes);
    text
}

/// A machine with an arena "docs", of these files.
fn far(scratch: &Scratch, files: &[(&str, &[u8])], config: &str) -> Machine {
    let docs = scratch.dir("docs");
    for (name, bytes) in files {
        fs::write(docs.join(name), bytes).unwrap();
    }
    Machine::up_with_config(scratch, "far", &[docs], config)
}

const SLOW: Quality =
    Quality { delay: Duration::from_millis(5), bytes_per_s: Some(2_000_000), loss: 0.0, late: (0.0, Duration::ZERO) };

#[test]
fn text_arrives_much_sooner_on_a_slow_network_and_noise_no_later() {
    let scratch = Scratch::new();
    let (words, noise) = (text(6 << 20), random_bytes(2 << 20, &mut Rng::with_seed(2)));
    let far = far(&scratch, &[("text", &words), ("noise", &noise)], "");
    let plain = Two::start(&scratch, "plain", &far, "[transfer]\ncompress = \"off\"\n");
    let packed = Two::start(&scratch, "packed", &far, "");
    for two in [&plain, &packed] {
        two.link.set(SLOW);
    }
    let (plain_bytes, plain_took) = plain.get("text", &words);
    let (packed_bytes, packed_took) = packed.get("text", &words);
    println!("text: {plain_bytes} bytes in {plain_took:?}, packed {packed_bytes} in {packed_took:?}");
    assert!(plain_bytes > words.len() as u64 && plain_took > Duration::from_secs(3));
    assert!(packed_bytes * 3 < plain_bytes, "{packed_bytes} bytes came, and {plain_bytes} without packing");
    assert!(packed_took * 2 < plain_took, "{packed_took:?}, and {plain_took:?} without packing");
    let (plain_bytes, _) = plain.get("noise", &noise);
    let (packed_bytes, _) = packed.get("noise", &noise);
    assert!(packed_bytes < plain_bytes * 51 / 50, "{packed_bytes} bytes came, and {plain_bytes} without packing");
}

/// On a fast network nothing is packed, unless a level is set.
#[test]
fn levels_are_for_all_networks() {
    let scratch = Scratch::new();
    let words = text(6 << 20);
    let far = far(&scratch, &[("text", &words)], "[transfer]\ncompress = 3\n");
    let two = Two::start(&scratch, "near", &far, "");
    let (bytes, _) = two.get("text", &words);
    assert!(bytes * 3 < words.len() as u64, "{bytes} bytes came");
}

/// A late datagram is not a lost one: nobody slows down for it.
#[test]
fn datagrams_that_overtake_each_other() {
    let scratch = Scratch::new();
    let noise = random_bytes(8 << 20, &mut Rng::with_seed(6));
    let far = far(&scratch, &[("noise", &noise)], "");
    let two = Two::start(&scratch, "near", &far, "");
    two.link.set(Quality { delay: Duration::from_millis(20), bytes_per_s: Some(6_000_000), ..Quality::default() });
    let (_, in_order) = two.get("noise", &noise);
    two.link
        .interfere(|_, number| if number % 20 == 0 { Fate::Late(Duration::from_millis(10)) } else { Fate::Carried });
    fs::remove_file(two.to.join("noise")).unwrap();
    let (_, overtaking) = two.get("noise", &noise);
    println!("{in_order:?} in order, {overtaking:?} overtaking");
    assert!(overtaking < in_order * 3 / 2, "{in_order:?} in order, {overtaking:?} overtaking");
}

/// Datagrams that are lost, late, doubled, cut off or changed cost time and nothing else.
#[test]
fn a_network_that_does_all_it_can() {
    let scratch = Scratch::new();
    let noise = random_bytes(5 << 20, &mut Rng::with_seed(3));
    let far = far(&scratch, &[("noise", &noise)], "");
    let two = Two::start(&scratch, "near", &far, "");
    two.link.interfere(|_: Way, number| match number % 50 {
        7 => Fate::Dropped,
        17 => Fate::Corrupted,
        27 => Fate::Truncated,
        37 => Fate::Doubled,
        47 => Fate::Late(Duration::from_millis(20)),
        _ => Fate::Carried,
    });
    two.get("noise", &noise);
}

#[test]
fn limits_hold_and_change_at_once() {
    let scratch = Scratch::new();
    let noise = random_bytes(12 << 20, &mut Rng::with_seed(4));
    let far = far(&scratch, &[("noise", &noise)], "");
    let two = Two::start(&scratch, "near", &far, "[limits]\ndown = \"8 MiB\"\n[limits.peers.far]\nup = \"1 MiB\"\n");
    // The peer of that name came later.
    assert!(two.near.log().contains("limits of a peer that is not known are not set"), "{}", two.near.log());
    let limits = |machine: &Machine| machine.ok(["limit", "--json"]).of_type("limit");
    assert_eq!(limits(&two.near), [json!({ "type": "limit", "peer": null, "up": null, "down": 8 << 20 })]);
    two.near.ok(["limit", "--down", "none"]);
    far.ok(["limit", "--up", "256KiB", "--peer", "near"]);
    assert_eq!(limits(&far)[1], json!({ "type": "limit", "peer": "near", "up": 256 << 10, "down": null }));
    let low = far.exits(2, ["limit", "--up", "1KiB"]);
    assert!(low.stderr.contains("64 KiB a second is the least"), "{}", low.stderr);
    far.exits(7, ["limit", "--up", "none", "--peer", "nobody"]);

    let to = two.to.join("noise");
    let began = Instant::now();
    let mut getting = two.near.command(["get".as_ref(), "docs/noise".as_ref(), to.as_os_str()]).spawn().unwrap();
    wait_for("a megabyte", Duration::from_secs(60), || (two.link.carried()[1] > 1 << 20).then_some(()));
    assert!(began.elapsed() > Duration::from_secs(3), "a megabyte in {:?}", began.elapsed());
    // With this limit, the rest would take 40 s.
    far.ok(["limit", "--up", "none", "--peer", "near"]);
    let lifted = Instant::now();
    assert!(getting.wait().unwrap().success());
    assert!(lifted.elapsed() < Duration::from_secs(15), "{:?}", lifted.elapsed());
    assert!(fs::read(&to).unwrap() == noise);
}

/// The disk of the destination fills up in the middle of a move: nothing half is left, and the source keeps its file; and
/// when there is room, the same command goes through.
#[test]
fn a_full_disk_ends_a_move_before_anything_is_lost() {
    let scratch = Scratch::new();
    let (docs, small_disk) = (scratch.dir("docs"), scratch.dir("small"));
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(&small_disk).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return skipped("this user may not mount a small disk");
    }
    let _unmount = Unmount(small_disk.clone());
    let noise = random_bytes(20 << 20, &mut Rng::with_seed(5));
    fs::write(docs.join("noise"), &noise).unwrap();
    let a = Machine::up(&scratch, "a", &[&docs]);
    let b = Machine::up(&scratch, "b", &[&small_disk]);
    b.join(&a);
    fs::write(a.home().join("config.toml"), "[roles]\nb = { writer = [\"*\"] }\n").unwrap();
    let moved = b.exits(3, ["mv", "a:docs/noise", "small/noise"]);
    let said = format!("{}{}", moved.text(), moved.stderr);
    assert!(said.contains("No space left on device") && !said.contains("os error"), "{said}");
    assert_eq!(fs::read_dir(&small_disk).unwrap().count(), 0);
    assert!(fs::read(docs.join("noise")).unwrap() == noise);
    assert!(Command::new("mount").args(["-o", "remount,size=64m"]).arg(&small_disk).status().unwrap().success());
    b.ok(["mv", "a:docs/noise", "small/noise"]);
    assert!(fs::read(small_disk.join("noise")).unwrap() == noise);
    assert!(!docs.join("noise").exists());
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
