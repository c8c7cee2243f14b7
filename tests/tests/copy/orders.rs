//! Orders as a peer may give them that follows no rule, and what happens to a file between its copy and its removal.

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use namespace::{Content, RelPath};
use peers::{
    Attribute, Attributes, Done, Held, Identity, Link, Lost, News, Order, Outcome, Place, Remove, Task, Why,
    wire::{StreamKind, read_frame, write_frame},
};
use quinn::Connection;
use tests::{Machine, Mtime, QUICK, Scratch, indexed, introduced, set_mtime, wait_for};
use tokio::{runtime::Runtime, time::timeout};
use tree::{BlobId, UnixTime};

use crate::same;

/// A machine that looks at its arena `docs` once and then never again, and a peer of it that gives orders.
struct Lab {
    runtime: Runtime,
    connection: Connection,
    machine: Machine,
    docs: PathBuf,
}

impl Lab {
    fn new(scratch: &Scratch, role: &str) -> Self {
        let docs = scratch.dir("docs");
        fs::write(docs.join("file"), b"bytes").unwrap();
        fs::create_dir(docs.join("dir")).unwrap();
        std::os::unix::fs::symlink("file", docs.join("link")).unwrap();
        set_mtime(&docs.join("file"), Mtime(1_600_000_000, 5));
        let config =
            format!("[watch]\nsettle = \"1h\"\nsettle_max = \"1h\"\n[roles]\nmallory = {{ writer = [{role}] }}\n");
        let machine = Machine::up_with_config(scratch, "a", &[&docs], &config);
        let me = Identity::ephemeral().unwrap();
        machine.ok(["peer", "add", "mallory", &me.peer().to_string()]);
        let runtime = Runtime::new().unwrap();
        let address = machine.address();
        let connection = runtime.block_on(introduced(&me, &machine, &address));
        Self { runtime, connection, machine, docs }
    }

    fn ask(&self, task: Task) -> Done {
        self.ask_at("docs", task)
    }

    fn ask_at(&self, arena: &str, task: Task) -> Done {
        let order = Order { arena: arena.parse().unwrap(), task };
        self.runtime.block_on(async {
            let (mut send, mut recv) = self.connection.open_bi().await.unwrap();
            send.write_all(&[StreamKind::Orders as u8]).await.unwrap();
            write_frame(&mut send, &order).await.unwrap();
            loop {
                let answer = timeout(Duration::from_secs(60), read_frame::<Outcome>(&mut recv, 16 << 10)).await;
                let Outcome { number, news } = answer.expect("it answers in time").unwrap();
                assert_eq!(number, 0);
                if let News::Done(done) = news {
                    return done;
                }
            }
        })
    }

    fn remove(&self, path: &str, content: Content) -> Done {
        let held = Some(Held { inode: 7, size: 5, mtime: TIME, ctime: TIME });
        let held = held.filter(|_| !matches!(content, Content::Directory { .. }));
        self.ask(Task::Remove(Remove { path: path.try_into().unwrap(), content, held, attributes: None }))
    }
}

const TIME: UnixTime = UnixTime { seconds: 1, nanos: 2 };

fn file(bytes: &[u8]) -> Content {
    Content::File { blob: BlobId::of(bytes), size: bytes.len() as u64, mode: 0o644 }
}

#[track_caller]
fn failed(done: Done, expected: Why) {
    assert!(matches!(&done, Done::Failed { why, .. } if *why == expected), "{expected:?}: {done:?}");
}

/// Whatever was done to a file since it was hashed, it stays; only what is as it was goes.
#[test]
fn a_file_that_changed_is_not_removed() {
    let scratch = Scratch::new();
    let lab = Lab::new(&scratch, "\"docs\"");
    let path = lab.docs.join("file");
    let again = |change: &dyn Fn(&Path)| {
        // As it was hashed, and then changed.
        fs::write(&path, b"bytes").unwrap();
        set_mtime(&path, Mtime(1_600_000_000, 5));
        lab.machine.ok(["arena", "scan", "docs"]);
        change(&path);
        let before = indexed(&lab.docs);
        failed(lab.remove("file", file(b"bytes")), Why::Changed);
        same(&before, &lab.docs);
    };
    again(&|path| fs::write(path, b"other").unwrap());
    again(&|path| fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"more").unwrap());
    again(&|path| fs::OpenOptions::new().append(true).open(path).unwrap().set_len(3).unwrap());
    // The same bytes, but somebody was at it: mtime, mode, or another file altogether.
    again(&|path| set_mtime(path, Mtime(1_600_000_000, 6)));
    again(&|path| fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap());
    again(&|path| {
        fs::write(path.with_extension("new"), b"bytes").unwrap();
        set_mtime(&path.with_extension("new"), Mtime(1_600_000_000, 5));
        fs::rename(path.with_extension("new"), path).unwrap();
    });
    // Other bytes with the mtime put back.
    again(&|path| {
        fs::write(path, b"BYTES").unwrap();
        set_mtime(path, Mtime(1_600_000_000, 5));
    });
    again(&|path| {
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink("dir", path).unwrap();
    });
    fs::remove_file(&path).unwrap();
    again(&|path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    });
    fs::remove_dir(&path).unwrap();
    // Gone is gone.
    assert_eq!(lab.remove("file", file(b"bytes")), Done::Removed);
    // And what is as it was goes, though it got another name meanwhile.
    fs::write(&path, b"bytes").unwrap();
    lab.machine.ok(["arena", "scan", "docs"]);
    fs::hard_link(&path, scratch.path("another name")).unwrap();
    assert_eq!(lab.remove("file", file(b"bytes")), Done::Removed);
    assert!(!path.exists());
    lab.machine.exits(7, ["stat", "docs/file"]);
}

#[test]
fn what_is_not_known_or_meant_is_not_removed() {
    let scratch = Scratch::new();
    let lab = Lab::new(&scratch, "\"docs\"");
    fs::write(lab.docs.join("new"), b"never hashed").unwrap();
    let before = indexed(&lab.docs);
    failed(lab.remove("new", file(b"never hashed")), Why::Changed);
    failed(lab.remove("file", file(b"BYTES")), Why::Changed);
    failed(lab.remove("link", Content::Symlink { target: b"file2".to_vec() }), Why::Changed);
    failed(lab.remove("link", file(b"bytes")), Why::Changed);
    failed(lab.remove("dir", file(b"bytes")), Why::Changed);
    failed(lab.remove("file", Content::Directory { mode: 0o755 }), Why::Changed);
    failed(lab.remove("file", Content::Deleted), Why::Refused);
    failed(lab.remove("file", Content::File { blob: BlobId::EMPTY, size: 5, mode: 0 }), Why::Refused);
    // The very file that the other one says it has.
    let meta = fs::metadata(lab.docs.join("file")).unwrap();
    let time = |seconds, nanos: i64| UnixTime { seconds, nanos: nanos as u32 };
    let held = Held {
        inode: meta.ino(),
        size: 5,
        mtime: time(meta.mtime(), meta.mtime_nsec()),
        ctime: time(meta.ctime(), meta.ctime_nsec()),
    };
    let remove = |held| Remove { path: "file".try_into().unwrap(), content: file(b"bytes"), held, attributes: None };
    failed(lab.ask(Task::Remove(remove(Some(held)))), Why::Changed);
    failed(lab.ask(Task::Remove(remove(None))), Why::Refused);
    failed(lab.ask_at("other", Task::Remove(remove(Some(held)))), Why::Refused);
    same(&before, &lab.docs);
    fs::write(lab.docs.join("dir/file"), b"x").unwrap();
    assert_eq!(lab.remove("dir", Content::Directory { mode: 0o755 }), Done::NotEmpty);
    fs::remove_file(lab.docs.join("dir/file")).unwrap();
    assert_eq!(lab.remove("dir", Content::Directory { mode: 0o755 }), Done::Removed);
    assert_eq!(lab.remove("link", Content::Symlink { target: b"file".to_vec() }), Done::Removed);
    assert!(!lab.docs.join("dir").exists() && !lab.docs.join("link").exists());
}

/// Another name is made of just the file that is linked as the blob and has that number; else the name becomes a file of
/// its own. Attributes that are the machine's own are not taken.
#[test]
fn a_link_is_made_of_what_was_placed_and_of_nothing_else() {
    let scratch = Scratch::new();
    let lab = Lab::new(&scratch, "\"docs\"");
    let inode = |path: &str| fs::metadata(lab.docs.join(path)).unwrap().ino();
    let first = inode("file");
    fs::write(scratch.path("outside"), b"bytes").unwrap();
    std::os::unix::fs::symlink("..", lab.docs.join("up")).unwrap();
    let place = |path: &str, from: &str, inode: u64, attributes: &[&str]| {
        let list = attributes.iter().map(|name| Attribute { name: name.as_bytes().to_vec(), value: b"x".to_vec() });
        let (path, attributes) = (path.try_into().unwrap(), Attributes::new(list.collect(), false));
        let link = Some(Link { path: from.try_into().unwrap(), inode });
        let content = file(b"bytes");
        let place = Place { path, content, mtime: TIME, overwrite: false, prove: false, from: None, attributes, link };
        match lab.ask(Task::Place(place)) {
            Done::Placed { inode, lost, .. } => (inode, lost),
            done => panic!("{done:?}"),
        }
    };
    assert_eq!(place("second", "file", first, &[]), (first, Lost::default()));
    assert_eq!(place("d/third", "second", first, &[]), (first, Lost::default()));
    // Neither is read again, and the first one is no less sound for its new ctime.
    assert_eq!(lab.machine.ok(["verify", "--json"]).json().len(), 1);
    for (number, (from, inode)) in [("file", first + 1), ("dir", inode("dir")), ("link", first), ("missing", first)]
        .into_iter()
        .chain([("up/outside", fs::metadata(scratch.path("outside")).unwrap().ino()), ("up/docs/file", first)])
        .enumerate()
    {
        let (made, _) = place(&format!("own {number}"), from, inode, &[]);
        assert_ne!(made, first, "{from}");
        assert_eq!(fs::metadata(lab.docs.join(format!("own {number}"))).unwrap().nlink(), 1, "{from}");
    }
    // The first one was edited: its new bytes get no other name.
    fs::write(lab.docs.join("file"), b"bytez").unwrap();
    assert_ne!(place("after", "file", first, &[]).0, first);
    assert_eq!(fs::read(lab.docs.join("after")).unwrap(), b"bytes");
    let (_, lost) = place("attributes", "missing", 0, &["security.capability", "trusted.x", "user.x"]);
    assert!(lost.attributes);
    assert_eq!(lab.machine.run(["verify", "--json"]).of_type("damage").len(), 0);
}

/// A peer that may write to one arena gets nowhere else: not above it, not through links, not to the daemon's own files.
#[test]
fn a_writer_gets_nowhere_but_into_its_arena() {
    let scratch = Scratch::new();
    // The home is inside the arena.
    let docs = scratch.dir("docs");
    let home = docs.join("home");
    let outside = scratch.dir("outside");
    std::os::unix::fs::symlink(&outside, docs.join("out")).unwrap();
    fs::create_dir_all(&home).unwrap();
    let me = Identity::ephemeral().unwrap();
    fs::write(home.join("config.toml"), format!("{QUICK}[roles]\nmallory = {{ writer = [\"docs\"] }}\n")).unwrap();
    let machine = Machine::up_again_at(&home, &scratch, "a", &[&docs]);
    machine.ok(["peer", "add", "mallory", &me.peer().to_string()]);
    let runtime = Runtime::new().unwrap();
    let address = machine.address();
    let connection = runtime.block_on(introduced(&me, &machine, &address));
    let lab = Lab { runtime, connection, machine, docs };
    let place = |path: &str, content: Content| {
        let path = RelPath::try_from(path).unwrap();
        let (attributes, link) = (Attributes::default(), None);
        lab.ask(Task::Place(Place {
            path,
            content,
            mtime: TIME,
            overwrite: true,
            prove: false,
            from: None,
            attributes,
            link,
        }))
    };
    let config = fs::read(home.join("config.toml")).unwrap();
    let link = || Content::Symlink { target: b"x".to_vec() };
    for path in
        ["home", "home/config.toml", "home/state", "home/cache/incoming/x", "home/new", ".blobd-0123456789abcdef.part"]
    {
        failed(place(path, link()), Why::Refused);
        failed(place(path, file(b"")), Why::Refused);
    }
    failed(lab.remove("home/config.toml", file(&config)), Why::Refused);
    failed(lab.remove("home/cache/incoming", Content::Directory { mode: 0o755 }), Why::Refused);
    for path in ["out/file", "out/a/b"] {
        failed(place(path, file(b"")), Why::InTheWay);
        failed(place(path, link()), Why::InTheWay);
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(fs::read(home.join("config.toml")).unwrap(), config);
    for bad in [Content::Deleted, Content::Withdrawn, Content::Symlink { target: vec![] }] {
        failed(place("new", bad), Why::Refused);
    }
    // Bytes that nobody has, said to be had by who asks, who does not answer: an end, in time, and nothing there.
    let done = place("nobody has it", file(b"of no use"));
    failed(done, Why::Unreachable);
    assert!(!lab.docs.join("nobody has it").exists());
    assert!(matches!(place("d/empty", file(b"")), Done::Placed { .. }));
    assert_eq!(fs::metadata(lab.docs.join("d/empty")).unwrap().len(), 0);
    wait_for("it lists it", Duration::from_secs(30), || {
        (lab.machine.run(["stat", "docs/d/empty"]).code == 0).then_some(())
    });
}

#[test]
fn garbage_and_readers() {
    let scratch = Scratch::new();
    let lab = Lab::new(&scratch, "");
    let before = indexed(&lab.docs);
    failed(lab.ask(Task::Check), Why::Refused);
    failed(lab.remove("file", file(b"bytes")), Why::Refused);
    let path = RelPath::try_from("new").unwrap();
    let content = Content::Directory { mode: 0o777 };
    let (attributes, link) = (Attributes::default(), None);
    let place = Place { path, content, mtime: TIME, overwrite: true, prove: true, from: None, attributes, link };
    failed(lab.ask(Task::Place(place)), Why::Refused);
    same(&before, &lab.docs);
    lab.runtime.block_on(async {
        for sent in [&[8, 0xff, 0xff, 0xff, 0xff][..], &[8, 3, 0, 0, 0, 0xff, 0xff, 0xff], &[8], &[8, 1]] {
            let (mut send, mut recv) = lab.connection.open_bi().await.unwrap();
            send.write_all(sent).await.unwrap();
            send.finish().unwrap();
            let heard = timeout(Duration::from_secs(20), recv.read_to_end(1 << 16)).await.expect("it ends in time");
            assert_eq!(heard.unwrap_or_default(), b"");
        }
        // More streams at once than there may be: those that are too many end, the others serve.
        let mut streams = Vec::new();
        for _ in 0..12 {
            let (mut send, recv) = lab.connection.open_bi().await.unwrap();
            send.write_all(&[8]).await.unwrap();
            streams.push((send, recv));
        }
        let mut ended = 0;
        for (_, recv) in &mut streams {
            ended += u32::from(timeout(Duration::from_millis(500), recv.read_to_end(10)).await.is_ok());
        }
        assert_eq!(ended, 4);
    });
    assert!(lab.machine.is_running());
    assert!(!lab.machine.log().contains("panicked"), "{}", lab.machine.log());
}
