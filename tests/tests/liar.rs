//! A peer of the household that lies: about bytes, about proofs, about sizes, about what is where, or by saying
//! nothing. Whatever it does, nothing wrong is ever written, the liar is named, and who has another peer to ask
//! gets the right bytes from that one.

use std::{fs, path::Path, time::Duration};

use fastrand::Rng;
use namespace::{Content, PeerId};
use tests::{
    Answer, Liar, Machine, Output, SMALL_ENOUGH, Scratch, Statement, file_statement, indexed, random_bytes, wait_for,
};
use tree::{BlobId, UnixTime};

/// Fetched into memory, and by way of the cache.
const SIZES: [u64; 3] = [20_000, SMALL_ENOUGH, SMALL_ENOUGH + 300_000];

/// Lies, and what is said of them, if the peer is named for just that.
const LIES: [(Answer, &str); 9] = [
    (Answer::FlippedData, "it sent wrong bytes"),
    (Answer::FlippedProof, "it sent wrong bytes"),
    (Answer::WrongSize, "it sent wrong bytes"),
    (Answer::Endless, "it sent wrong bytes"),
    (Answer::Trailing, "it sent wrong bytes"),
    (Answer::EndlessTail, "it sent wrong bytes"),
    (Answer::Truncated, "it no longer has all of it"),
    (Answer::Nothing, "it no longer has all of it"),
    (Answer::Reset, ""),
];

#[test]
fn wrong_bytes_are_refused_and_their_sender_is_named() {
    let scratch = Scratch::new();
    let files = files();
    let liar = Liar::start(statements(&files), &blobs(&files), None);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    befriend(&b, &liar);
    for (lie, why) in LIES {
        liar.answer(lie);
        for (name, data) in &files {
            let to = scratch.path(name);
            let got = b.run([Path::new("get"), "--json".as_ref(), path(name).as_ref(), &to]);
            // A large file that came whole before what was wrong may be in the cache, where it is known to be right.
            if got.code == 0 && matches!(lie, Answer::Trailing | Answer::EndlessTail | Answer::Truncated) {
                assert!(fs::read(&to).unwrap() == *data, "{lie:?} {name}");
                fs::remove_file(&to).unwrap();
                continue;
            }
            names_the_liar(&got, why, &format!("{lie:?} {name}"));
            assert!(!to.exists(), "{lie:?} {name}");
            let range = format!("{}..", data.len() - 10);
            let read = b.run(["cat", &path(name), "--range", &range]);
            assert!(read.stdout.is_empty() || read.stdout == data[data.len() - 10..], "{lie:?} {name}");
        }
    }
    // Nothing wrong is in the cache either, and once it tells the truth, it is believed.
    b.ok(["verify"]);
    liar.answer(Answer::Honest);
    b.ok([Path::new("get"), "docs".as_ref(), &scratch.path("docs")]);
    for (name, data) in &files {
        assert!(fs::read(scratch.path("docs").join(name)).unwrap() == *data, "{name}");
    }
    assert!(b.log().contains("it sent wrong bytes"), "{}", b.log());
    // The tails that lies have in common are counted, and no more than came.
    let answers = b.status()["answers"].clone();
    let [received, wasted] = ["received_bytes", "wasted_bytes"].map(|name| answers[name].as_u64().unwrap());
    assert!(0 < wasted && wasted < received, "{answers}");
    assert!(b.is_running());
}

#[test]
fn a_peer_that_says_nothing_ends_in_a_bounded_time() {
    let scratch = Scratch::new();
    let files = files();
    let liar = Liar::start(statements(&files), &blobs(&files), None);
    liar.answer(Answer::Silence);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    befriend(&b, &liar);
    let started = std::time::Instant::now();
    let got = b.run([Path::new("get"), "--json".as_ref(), "docs".as_ref(), &scratch.path("docs")]);
    names_the_liar(&got, "it stalled", "silence");
    assert!(started.elapsed() < Duration::from_secs(60), "three files side by side took {:?}", started.elapsed());
    assert!(indexed(&scratch.path("docs")).is_empty());
}

/// The liar is asked first, and then an honest peer.
#[test]
fn with_an_honest_peer_the_right_bytes_come() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let files: Vec<_> = LIES.iter().flat_map(|&(lie, _)| numbered(lie)).chain(numbered(Answer::Silence)).collect();
    for (_, name, data) in &files {
        fs::write(root.join(name), data).unwrap();
    }
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let named: Vec<_> = files.iter().map(|(_, name, data)| (name.clone(), data.clone())).collect();
    let liar = Liar::start(statements(&named), &blobs(&named), Some(a.id().parse().unwrap()));
    befriend(&b, &liar);
    let mut asked = 0;
    for (lie, name, data) in &files {
        liar.answer(*lie);
        let to = scratch.path(name);
        let got = b.ok([Path::new("get"), "--json".as_ref(), path(name).as_ref(), &to]);
        assert!(fs::read(&to).unwrap() == *data, "{lie:?} {name}: {}", got.text());
        assert!(liar.times_asked() > asked, "{lie:?} {name}: the liar was asked");
        asked = liar.times_asked();
    }
    b.ok(["verify"]);
}

/// It says that it has all, and gives nothing, or wrong bytes: it is asked a few times in one fetch, or only once.
#[test]
fn a_liar_is_not_asked_for_ever() {
    let scratch = Scratch::new();
    let files = vec![("file".to_owned(), random_bytes(SMALL_ENOUGH, &mut Rng::with_seed(5)))];
    let liar = Liar::start(statements(&files), &blobs(&files), None);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    befriend(&b, &liar);
    for (lie, times) in [(Answer::Nothing, 8), (Answer::Truncated, 1), (Answer::FlippedData, 1), (Answer::Reset, 1)] {
        liar.answer(lie);
        let before = liar.times_asked();
        b.exits(6, [Path::new("get"), path("file").as_ref(), &scratch.path("file")]);
        assert_eq!(liar.times_asked() - before, times, "{lie:?}");
    }
}

/// A size in the catalog that is not the blob's is found out before anything is written.
#[test]
fn a_wrong_size_in_the_catalog_is_found_out() {
    let scratch = Scratch::new();
    let data = random_bytes(2_000_000, &mut Rng::with_seed(3));
    let small = random_bytes(40_000, &mut Rng::with_seed(4));
    let mut lies = Vec::new();
    for (name, data, sizes) in [
        ("large", &data, [1, 1_999_999, 2_000_001, 1 << 50, u64::MAX]),
        ("small", &small, [1, 39_999, 40_001, 1 << 40, u64::MAX]),
    ] {
        for size in sizes {
            let mut statement = file_statement("docs", format!("{name}-{size}").as_bytes(), data);
            statement.version.content = Content::File { blob: BlobId::of(data), size, mode: 0o644 };
            lies.push(statement);
        }
    }
    let liar = Liar::start(lies.clone(), &[&data, &small], None);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    befriend(&b, &liar);
    for lie in lies {
        let name = String::from_utf8(lie.path).unwrap();
        let got = b.run([Path::new("get"), "--json".as_ref(), path(&name).as_ref(), &scratch.path(&name)]);
        assert!([3, 6].contains(&got.code), "{name}: {} {}{}", got.code, got.text(), got.stderr);
        assert!(!scratch.path(&name).exists(), "{name}");
        let read = b.run(["cat", &path(&name)]);
        assert!(read.code != 0 && read.stdout.is_empty(), "{name}: {}", read.stderr);
        assert!(b.is_running(), "{name}: {}", b.log());
    }
    assert!(b.resident_bytes() < 1 << 30);
    b.ok(["verify"]);
}

/// Whatever a catalog says, nothing is put outside the destination.
#[test]
fn hostile_catalogs_write_nothing_outside() {
    let scratch = Scratch::new();
    let outside = scratch.dir("outside");
    let data = b"hostile";
    let link = |path: &[u8], target: &Path| Statement {
        version: namespace::Version {
            content: Content::Symlink { target: target.as_os_str().as_encoded_bytes().to_owned() },
            mtime: UnixTime { seconds: 1_800_000_000, nanos: 0 },
            seq: 0,
            previous: Vec::new(),
        },
        ..file_statement("docs", path, data)
    };
    let evil = |path: &str| file_statement("docs", path.as_bytes(), data);
    let absolute = outside.join("absolute");
    let mut setuid = evil("setuid");
    setuid.version.content = Content::File { blob: BlobId::of(data), size: 7, mode: 0o4755 };
    let mut out_of_order = vec![evil("two"), evil("one")];
    out_of_order[0].version.seq = 5;
    out_of_order[1].version.seq = 4;
    let invalid = [
        vec![evil("fine"), evil("../outside/x")],
        vec![evil("fine"), evil("dir/../../outside/x")],
        vec![evil("fine"), evil(absolute.to_str().unwrap())],
        vec![evil("fine"), evil("a//b")],
        vec![evil("fine"), evil("./a")],
        vec![evil("fine"), evil("")],
        vec![evil("fine"), evil("a\0b")],
        vec![evil("fine"), evil(&"x".repeat(300))],
        vec![evil("fine"), setuid],
        vec![evil("fine"), Statement { arena: "../docs".into(), ..evil("x") }],
        vec![evil("fine"), link(b"empty link", Path::new(""))],
        out_of_order,
    ];
    let b = Machine::up::<&Path>(&scratch, "first", &[]);
    let liars: Vec<_> =
        invalid.into_iter().map(|catalog| (catalog.clone(), Liar::start(catalog, &[data], None))).collect();
    for (number, (_, liar)) in liars.iter().enumerate() {
        let (name, id) = (format!("liar-{number}"), liar.id().to_string());
        b.ok(["peer", "add", &name, &id, "--address", &liar.address()]);
    }
    for (number, (catalog, liar)) in liars.iter().enumerate() {
        // What is invalid is refused as a whole, which shows in that the connection ends, or it is asked for again.
        wait_for(&format!("{catalog:.200?} is refused"), Duration::from_secs(30), || {
            let peer = b.peer(&format!("liar-{number}"))?;
            let told = liar.catalogs_told();
            (told > 1 || told == 1 && peer["connected"].is_null()).then_some(())
        });
    }
    let listed = b.ok(["ls", "-R", "--json"]).of_type("entry");
    assert!(listed.is_empty(), "{listed:?}");
    assert!(b.is_running());
    drop((b, liars));

    // These are valid, each by itself.
    let liar = Liar::start(
        vec![
            link(b"a", &outside),
            evil("a/b"),
            evil("a/c/d"),
            link(b"up", Path::new("..")),
            evil("up/outside/x"),
            evil("z"),
            evil("z/below a file"),
        ],
        &[data],
        None,
    );
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    befriend(&b, &liar);
    let copies = scratch.dir("copies");
    std::os::unix::fs::symlink(&outside, copies.join("elsewhere")).unwrap();
    for _ in 0..3 {
        let got = b.exits(3, [Path::new("get"), "--json".as_ref(), "docs".as_ref(), &copies]);
        assert_ne!(got.of_type("failed").len(), 0);
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{}", got.text());
    }
    let names: Vec<_> = fs::read_dir(scratch.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name == "x"), "{names:?}");
    assert!(b.is_running());
}

fn files() -> Vec<(String, Vec<u8>)> {
    SIZES.iter().map(|&size| (format!("file-{size}"), random_bytes(size, &mut Rng::new()))).collect()
}

fn numbered(lie: Answer) -> Vec<(Answer, String, Vec<u8>)> {
    // Each lie has files of its own: what has come once is not fetched again. One that stalls is waited for only once.
    let files = files().into_iter().skip(if lie == Answer::Silence { 2 } else { 0 });
    files.map(|(name, data)| (lie, format!("{lie:?}-{name}"), data)).collect()
}

fn statements(files: &[(String, Vec<u8>)]) -> Vec<Statement> {
    files.iter().map(|(name, data)| file_statement("docs", name.as_bytes(), data)).collect()
}

fn blobs(files: &[(String, Vec<u8>)]) -> Vec<&[u8]> {
    files.iter().map(|(_, data)| &data[..]).collect()
}

fn path(name: &str) -> String {
    format!("docs/{name}")
}

/// Has `b` trust the liar, and waits until it has heard its catalog.
#[track_caller]
fn befriend(b: &Machine, liar: &Liar) {
    let id: PeerId = liar.id();
    b.ok(["peer", "add", "liar", &id.to_string(), "--address", &liar.address()]);
    wait_for("the liar's catalog is heard", Duration::from_secs(30), || {
        let peer = b.peer("liar")?;
        (peer["heard_seq"].as_u64() == Some(liar.head())).then_some(())
    });
}

/// It failed for want of a peer, and every line that says so names the liar and why.
#[track_caller]
fn names_the_liar(output: &Output, why: &str, what: &str) {
    assert!([3, 6].contains(&output.code), "{what}: {} {}{}", output.code, output.text(), output.stderr);
    let failed = output.of_type("failed");
    assert_ne!(failed.len(), 0, "{what}: {}", output.text());
    for line in failed {
        let reason = line["reason"].as_str().unwrap();
        assert!(reason.contains("liar: ") && reason.contains(why), "{what}: {reason}");
    }
}

/// What a coarse outboard does not know is believed of nobody: a wrong tree clears no chunk group of suspicion.
#[test]
fn a_wrong_tree_is_refused() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let (root, data) = (scratch.dir("mine"), random_bytes(3_000_000, &mut Rng::new()));
    fs::write(root.join("file"), &data).unwrap();
    let files = [("file".to_owned(), data.clone())];
    let liar = Liar::start(statements(&files), &blobs(&files), None);
    liar.answer(Answer::FlippedProof);
    let a = Machine::up_with_config(&scratch, "a", &[&root], "[store]\noutboard_grain = \"256 KiB\"\n");
    befriend(&a, &liar);
    scratch.rot(&root.join("file"), &[1_000_000]);
    let unrepaired = a.exits(5, ["repair", "--json"]).of_type("unrepaired");
    assert_eq!(tests::ranges_of(&unrepaired[0]), [(3 << 18, 4 << 18)]);
    assert!(a.log().contains("it sent a wrong tree"), "{}", a.log());
    liar.answer(Answer::Honest);
    assert!(fs::read(root.join("file")).unwrap() != data);
    let repaired = a.ok(["repair", "--json"]).of_type("repaired");
    assert_eq!(tests::ranges_of(&repaired[0]), tests::groups_of(3_000_000, &[1_000_000]));
    assert!(fs::read(root.join("file")).unwrap() == data);
}
