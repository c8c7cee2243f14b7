use std::{
    fs, thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use tests::{Fate, Machine, Nfs, Quality, Scratch, random_bytes, status, wait_for};

use crate::Two;

const KIB: u64 = 1024;

/// What a client waits for comes before what it does not, and only once; who reads in order waits seldom.
#[test]
fn what_is_not_here_is_fetched_once_and_ahead() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let bytes = random_bytes(16 << 20, &mut Rng::with_seed(1));
    fs::write(docs.join("file"), &bytes).unwrap();
    fs::write(docs.join("other"), &bytes[1..]).unwrap();
    let two = Two::start(&scratch, &docs, "");
    two.link.set(Quality { delay: Duration::from_millis(20), bytes_per_s: None, ..Quality::default() });
    let mut nfs = Nfs::connect(&two.near);
    let file = nfs.find("docs/file").unwrap();
    let (before, began) = (two.came(), Instant::now());
    // Several of the same range at once, as several processes ask.
    let asked: Vec<u32> = (0..20).map(|_| nfs.send(6, &Nfs::read_args(&file, 0, 128 << 10))).collect();
    let mut answered: Vec<u32> = asked.iter().map(|_| nfs.receive().unwrap().0).collect();
    answered.sort();
    assert_eq!(answered, asked);
    assert!(two.came() - before < 1 << 20, "{} bytes came for 128 KiB, and as much ahead", two.came() - before);
    assert!(nfs.read_from(&file, 0, 128 << 10).unwrap() == bytes);
    // 128 requests, one after the other, at 40 ms each would take 5 s.
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    let came = two.came() - before;
    assert!((16 << 20..18 << 20).contains(&came), "{came} bytes came for 16 MiB");
    // It is here now.
    assert!(nfs.read_from(&file, 0, 1 << 20).unwrap() == bytes);
    assert!(two.came() - before - came < 64 * KIB);
    // Who jumps gets what it asked for and little more: chunk groups, and what proves them.
    let other = nfs.find("docs/other").unwrap();
    let (before, mut rng) = (two.came(), Rng::with_seed(2));
    for _ in 0..20 {
        let offset = rng.u64(1..(15 << 20)) / (4 << 20) * (4 << 20) + rng.u64(0..64) * 4 * KIB;
        assert!(nfs.read(&other, offset, 4096).unwrap().0 == bytes[1 + offset as usize..][..4096]);
    }
    assert!(two.came() - before < 20 * 64 * KIB + (4 << 20), "{} bytes came", two.came() - before);
}

/// A pause of the network that is shorter than the limit of a read costs its reader that time, and no error.
#[test]
fn a_reader_outlives_a_pause_of_the_network() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let bytes = random_bytes(12 << 20, &mut Rng::with_seed(1));
    fs::write(docs.join("file"), &bytes).unwrap();
    let two = Two::start(&scratch, &docs, "");
    let line = Quality { bytes_per_s: Some(4 << 20), ..Quality::default() };
    two.link.set(line);
    let mut nfs = Nfs::connect(&two.near);
    let file = nfs.find("docs/file").unwrap();
    let before = two.came();
    let read = thread::scope(|scope| {
        let reader = scope.spawn(|| nfs.read_from(&file, 0, 128 << 10));
        wait_for("some of it", Duration::from_secs(20), || (two.came() > before + (4 << 20)).then_some(()));
        two.link.set(Quality { loss: 1.0, ..line });
        thread::sleep(Duration::from_secs(8));
        assert!(!reader.is_finished());
        two.link.set(line);
        reader.join().unwrap()
    });
    assert!(read.unwrap() == bytes);
}

/// Who reads small files of a directory one after the other waits for few of them; who reads one gets that one.
#[test]
fn small_files_are_fetched_before_they_are_asked_for() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let mut rng = Rng::with_seed(1);
    for dir in ["one", "all"] {
        fs::create_dir(docs.join(dir)).unwrap();
        for number in 0..60 {
            fs::write(docs.join(dir).join(number.to_string()), random_bytes(3000, &mut rng)).unwrap();
        }
        fs::write(docs.join(dir).join("large"), random_bytes(100_000, &mut rng)).unwrap();
    }
    let two = Two::start(&scratch, &docs, "");
    let mut nfs = Nfs::connect(&two.near);
    let cached = || two.near.ok(["cache", "stat", "--json"]).of_type("cache").remove(0)["whole"].clone();
    let one = nfs.find("docs/one/7").unwrap();
    nfs.read(&one, 0, 3000).unwrap();
    nfs.read(&one, 0, 3000).unwrap();
    wait_for("what was read", Duration::from_secs(20), || (cached() == 1).then_some(()));
    for name in ["8", "30"] {
        let file = nfs.find(&format!("docs/all/{name}")).unwrap();
        assert!(nfs.read(&file, 0, 3000).unwrap().0 == fs::read(docs.join("all").join(name)).unwrap());
    }
    wait_for("the others of that directory", Duration::from_secs(20), || (cached() == 61).then_some(()));
    let came = two.came();
    for number in 0..60 {
        let file = nfs.find(&format!("docs/all/{number}")).unwrap();
        assert!(nfs.read(&file, 0, 3000).unwrap().0 == fs::read(docs.join(format!("all/{number}"))).unwrap());
    }
    assert!(two.came() - came < 10_000, "{} bytes came for what was here", two.came() - came);
    assert_eq!(cached(), 61, "neither the large one, nor those of another directory");
}

/// With nobody there, names and what is here are as they were, and the rest fails soon; who stalls costs only those who
/// wait for it.
#[test]
fn without_peers_what_is_here_is_read_and_the_rest_fails() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let bytes = random_bytes(4 << 20, &mut Rng::with_seed(1));
    for name in ["here", "away", "stalls"] {
        fs::write(docs.join(name), [name.as_bytes(), &bytes].concat()).unwrap();
    }
    let two = Two::start(&scratch, &docs, "[nfs]\nfetch_timeout = \"2s\"\n");
    let mut nfs = Nfs::connect(&two.near);
    let [here, away, stalls] = ["docs/here", "docs/away", "docs/stalls"].map(|path| nfs.find(path).unwrap());
    let whole = nfs.read_from(&here, 0, 1 << 20).unwrap();
    assert!(whole[4..] == bytes);
    // Nothing comes any more, though the connection is there: many wait, and nobody waits for them.
    two.link.interfere(|_, _| Fate::Dropped);
    let waiting: Vec<u32> = (0..64).map(|at| nfs.send(6, &Nfs::read_args(&stalls, at * 64 * KIB, 4096))).collect();
    let began = Instant::now();
    let reading = nfs.send(6, &Nfs::read_args(&here, 0, 1 << 20));
    let (first, _) = nfs.receive().unwrap();
    assert_eq!(first, reading, "what is here is not behind what is not");
    assert!(began.elapsed() < Duration::from_secs(1));
    let listing = nfs.send(17, &tests::Xdr::default().opaque(&nfs_root(&two.near)).u64(0).u64(0).u32(8192).u32(8192));
    assert_eq!(nfs.receive().unwrap().0, listing);
    let mut failed: Vec<u32> = waiting
        .iter()
        .map(|_| nfs.receive().unwrap())
        .map(|(xid, mut results)| {
            let _ = (results.u32(), results.u32(), results.opaque(), results.u32());
            assert_eq!(results.u32(), status::IO);
            xid
        })
        .collect();
    failed.sort();
    assert_eq!(failed, waiting);
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    // It is gone, and that is known.
    two.link.interfere(|_, _| Fate::Carried);
    two.far.stop();
    wait_for("the peer to be gone", Duration::from_secs(60), || {
        let peer = two.near.peer("far").unwrap();
        (peer["connected"].is_null() && peer["last_error"].is_string()).then_some(())
    });
    assert_eq!(nfs.read(&away, 0, 4096), Err(status::IO));
    let began = Instant::now();
    for at in 0..10 {
        assert_eq!(nfs.read(&away, at * 100 * KIB, 4096), Err(status::IO));
    }
    assert!(began.elapsed() < Duration::from_secs(1), "10 reads failed in {:?}", began.elapsed());
    assert!(nfs.read_from(&here, 0, 1 << 20).unwrap() == whole);
    let root = nfs_root(&two.near);
    let (docs, _) = nfs.lookup(&root, b"docs").unwrap();
    assert_eq!(nfs.list(&docs, 8192).unwrap().len(), 3);
    // And back.
    two.far.restart();
    two.near.ok(["peer", "add", "far", &two.far.id(), "--address", &two.far.address()]);
    wait_for("the peer to be back", Duration::from_secs(20), || {
        (nfs.read(&away, 0, 4) == Ok((b"away".to_vec(), false))).then_some(())
    });
}

/// A link that is slow is no error: as long as anything comes, whoever waits for its turn goes on waiting.
#[test]
fn many_read_over_a_slow_link() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let mut rng = Rng::with_seed(3);
    let files: Vec<Vec<u8>> = (0..12).map(|_| random_bytes(40_000, &mut rng)).collect();
    for (number, bytes) in files.iter().enumerate() {
        fs::write(docs.join(number.to_string()), bytes).unwrap();
    }
    let two = Two::start(&scratch, &docs, "[nfs]\nfetch_timeout = \"1s\"\n");
    two.link.set(Quality { delay: Duration::from_millis(20), bytes_per_s: Some(64 * KIB), ..Quality::default() });
    let began = Instant::now();
    thread::scope(|scope| {
        for (number, bytes) in files.iter().enumerate() {
            let mut nfs = Nfs::connect(&two.near);
            let file = nfs.find(&format!("docs/{number}")).unwrap();
            scope.spawn(move || assert!(nfs.read_from(&file, 0, 1 << 20).as_ref() == Ok(bytes)));
        }
    });
    assert!(began.elapsed() > Duration::from_secs(3), "it was slow: {:?}", began.elapsed());
}

/// What somebody waits for comes before what is read ahead for others.
#[test]
fn who_waits_is_before_what_is_read_ahead() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let mut rng = Rng::with_seed(4);
    for number in 0..4 {
        fs::write(docs.join(number.to_string()), random_bytes(16 << 20, &mut rng)).unwrap();
    }
    let other = random_bytes(512 * KIB, &mut rng);
    fs::write(docs.join("other"), &other).unwrap();
    let two = Two::start(&scratch, &docs, "");
    let mut nfs = Nfs::connect(&two.near);
    let files: Vec<_> = (0..4).map(|number| nfs.find(&format!("docs/{number}")).unwrap()).collect();
    let file = nfs.find("docs/other").unwrap();
    files.iter().for_each(|file| drop(nfs.read(file, 0, 1 << 20).unwrap()));
    wait_for("two more of each are here", Duration::from_secs(20), || {
        (two.near.status()["cache"]["bytes"].as_u64().unwrap() >= 12 << 20).then_some(())
    });
    // What is here is read, and more is read ahead of it: some megabytes of each, while the link has become slow.
    two.link.set(Quality { delay: Duration::from_millis(5), bytes_per_s: Some(256 * KIB), ..Quality::default() });
    files.iter().for_each(|file| drop(nfs.read(file, 1 << 20, 1 << 20).unwrap()));
    // By itself it takes two seconds, and ten with a share like theirs.
    let began = Instant::now();
    assert!(nfs.read_from(&file, 0, 1 << 20).unwrap() == other);
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
}

/// What was pinned or warmed is read with nobody there, and a pin follows a new version; the rest is not.
#[test]
fn what_is_kept_is_read_without_peers() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let mut rng = Rng::with_seed(1);
    for name in ["pinned/a", "pinned/b", "warmed", "other"] {
        fs::create_dir_all(docs.join(name).parent().unwrap()).unwrap();
        fs::write(docs.join(name), random_bytes(300_000, &mut rng)).unwrap();
    }
    let two = Two::start(&scratch, &docs, "");
    two.near.ok(["pin", "docs/pinned"]);
    two.near.ok(["warm", "docs/warmed"]);
    let newer = random_bytes(200_000, &mut rng);
    fs::write(docs.join("pinned/a"), &newer).unwrap();
    two.far.ok(["arena", "scan", "docs"]);
    two.near.hears(&two.far);
    // Waits until all that is pinned is here.
    two.near.ok(["pin", "docs/pinned"]);
    two.far.stop();
    wait_for("the peer to be gone", Duration::from_secs(60), || {
        two.near.peer("far").unwrap()["connected"].is_null().then_some(())
    });
    let mut nfs = Nfs::connect(&two.near);
    for name in ["pinned/a", "pinned/b", "warmed"] {
        let file = nfs.find(&format!("docs/{name}")).unwrap();
        assert!(nfs.read_from(&file, 0, 64 << 10).unwrap() == fs::read(docs.join(name)).unwrap(), "{name}");
    }
    assert!(fs::read(docs.join("pinned/a")).unwrap() == newer);
    let other = nfs.find("docs/other").unwrap();
    assert_eq!(nfs.read(&other, 0, 4096), Err(status::IO));
}

fn nfs_root(machine: &Machine) -> Vec<u8> {
    Nfs::connect(machine).mount(b"/").unwrap()
}

/// Bytes that rotted, in place or in the cache, are fetched before the reader has them, and mended.
#[test]
fn readers_never_see_damage() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let (docs, copies) = (scratch.dir("docs"), scratch.dir("copies"));
    let bytes = random_bytes(2 << 20, &mut Rng::with_seed(1));
    fs::write(docs.join("file"), &bytes).unwrap();
    fs::write(copies.join("copy"), &bytes).unwrap();
    let (a, b) = (Machine::up(&scratch, "a", &[&docs]), Machine::up(&scratch, "b", &[&copies]));
    a.rests();
    b.rests();
    a.join(&b);
    a.hears(&b);
    scratch.rot(&docs.join("file"), &[5, 700_000, 2_000_000]);
    let mut nfs = Nfs::connect(&a);
    let file = nfs.find("docs/file").unwrap();
    assert!(nfs.read_from(&file, 0, 1 << 20).unwrap() == bytes);
    wait_for("the file to be mended", Duration::from_secs(20), || {
        (fs::read(docs.join("file")).unwrap() == bytes).then_some(())
    });
    a.ok(["verify", "docs"]);
    assert!(a.log().contains("mended"), "{}", a.log());
    // With nobody to fetch from, a reader gets an error and no wrong byte.
    b.stop();
    scratch.rot(&docs.join("file"), &[1_000_000]);
    let offset = 1_000_000 / (16 * KIB) * 16 * KIB;
    wait_for("the read to fail", Duration::from_secs(30), || {
        (nfs.read(&file, offset, 4096) == Err(status::IO)).then_some(())
    });
    assert!(nfs.read(&file, 0, 4096).unwrap().0 == bytes[..4096]);
}
