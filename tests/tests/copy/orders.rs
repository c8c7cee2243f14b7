//! Orders as a peer may give them that follows no rule, and what happens to a file between its copy and its removal.

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use namespace::{Content, PeerId, RelPath};
use peers::{
    Attribute, Attributes, Confirm, Done, Finish, Identity, Leave, Link, Lost, MoveId, News, Order, Outcome, Place,
    Pledge, Prepare, Task, Why,
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
    me: PeerId,
    identity: Identity,
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
        Self { runtime, connection, me: me.peer(), identity: me, machine, docs }
    }

    /// The same, connected anew.
    fn again(self) -> Self {
        let address = self.machine.address();
        let connection = self.runtime.block_on(introduced(&self.identity, &self.machine, &address));
        Self { connection, ..self }
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

    /// Has something removed as by a move, whatever the destination has.
    fn remove(&self, path: &str, content: Content) -> Done {
        self.ask(Task::Leave(Leave { number: NUMBER, path: None }));
        let done = match self.prepare(path, content) {
            Done::Prepared { aside } => self.finish(path, aside, true),
            done => done,
        };
        self.ask(Task::End(NUMBER));
        done
    }

    fn prepare(&self, path: &str, content: Content) -> Done {
        self.ask(Task::Prepare(Prepare { number: NUMBER, path: path.try_into().unwrap(), content, attributes: None }))
    }

    fn finish(&self, path: &str, aside: u64, remove: bool) -> Done {
        self.ask(Task::Finish(Finish { number: NUMBER, path: path.try_into().unwrap(), aside, remove }))
    }

    fn place(&self, path: &str, content: Content, part_of: Option<u64>) -> Done {
        let (path, attributes) = (path.try_into().unwrap(), Attributes::default());
        let (overwrite, prove, from, link) = (true, true, None, None);
        self.ask(Task::Place(Place { path, content, mtime: TIME, overwrite, prove, from, attributes, link, part_of }))
    }
}

/// The number of the one move that is made.
const NUMBER: u64 = 300;
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
    failed(lab.ask_at("other", Task::Leave(Leave { number: NUMBER, path: None })), Why::Refused);
    failed(lab.finish("file", 7, true), Why::Over);
    failed(lab.finish("file", 7, false), Why::Over);
    // Of a tree that does not leave, nothing is set aside.
    lab.ask(Task::End(NUMBER));
    failed(lab.prepare("file", file(b"bytes")), Why::Over);
    lab.ask(Task::Leave(Leave { number: NUMBER, path: Some("dir".try_into().unwrap()) }));
    failed(lab.prepare("file", file(b"bytes")), Why::Over);
    lab.ask(Task::End(NUMBER));
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
        let place = Place {
            path,
            content,
            mtime: TIME,
            overwrite: false,
            prove: false,
            from: None,
            attributes,
            link,
            part_of: None,
        };
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
    let lab = Lab { runtime, connection, me: me.peer(), identity: me, machine, docs };
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
            part_of: None,
        }))
    };
    let config = fs::read(home.join("config.toml")).unwrap();
    let link = || Content::Symlink { target: b"x".to_vec() };
    let of_a_move = [".blobd-0123456789abcdef.leaving", "d/.blobd-0123456789abcdef.leaving/x"];
    let own = ["home", "home/config.toml", "home/state", "home/cache/incoming/x", "home/new"];
    for path in own.into_iter().chain(of_a_move).chain([".blobd-0123456789abcdef.part"]) {
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
    let (attributes, link, part_of) = (Attributes::default(), None, None);
    let place =
        Place { path, content, mtime: TIME, overwrite: true, prove: true, from: None, attributes, link, part_of };
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

/// A tree that leaves takes nothing in, and one that is kept is neither moved away nor replaced, until the move has ended.
#[test]
fn what_leaves_is_no_destination_and_what_is_kept_stays() {
    let scratch = Scratch::new();
    let lab = Lab::new(&scratch, "\"docs\"");
    let before = indexed(&lab.docs);
    let leave = |path: Option<&str>| {
        lab.ask(Task::Leave(Leave { number: NUMBER, path: path.map(|path| path.try_into().unwrap()) }))
    };
    let pledge = |number, path: Option<&str>| {
        let path = path.map(|path| path.try_into().unwrap());
        lab.ask(Task::Pledge(Pledge { number, path, source: None, source_arena: "theirs".parse().unwrap() }))
    };
    assert_eq!(leave(Some("dir")), Done::Ready);
    assert_eq!(leave(Some("dir")), Done::Ready, "the same again comes to the same");
    failed(lab.place("dir/new", file(b""), None), Why::Busy);
    failed(lab.place("dir", Content::Directory { mode: 0o755 }, Some(NUMBER)), Why::Busy);
    failed(pledge(1, Some("dir/new")), Why::Busy);
    failed(pledge(1, None), Why::Busy);
    same(&before, &lab.docs);
    lab.ask(Task::End(NUMBER));

    assert_eq!(pledge(NUMBER, Some("file")), Done::Ready);
    let confirm = |path: &str, content, number, aside| {
        lab.ask(Task::Confirm(Confirm { number, path: path.try_into().unwrap(), content, aside }))
    };
    assert_eq!(confirm("file", file(b"bytes"), NUMBER, 7), Done::Confirmed);
    failed(confirm("file", file(b"other"), NUMBER, 7), Why::Changed);
    failed(confirm("file", file(b"bytes"), 1, 7), Why::Over);
    failed(confirm("link", Content::Symlink { target: b"file".to_vec() }, NUMBER, 7), Why::Over);
    // Its source is somebody who takes no orders: nobody can say that the move is over.
    failed(leave(None), Why::Busy);
    failed(lab.place("file", file(b""), None), Why::Busy);
    same(&before, &lab.docs);
    // Durably.
    lab.machine.kill9();
    lab.machine.restart_in_place();
    let lab = lab.again();
    let leave = |path: Option<&str>| {
        lab.ask(Task::Leave(Leave { number: NUMBER, path: path.map(|path| path.try_into().unwrap()) }))
    };
    failed(leave(None), Why::Busy);
    assert_eq!(leave(Some("dir")), Done::Ready);
    // The move ends where who directs it says so.
    assert_eq!(lab.ask(Task::End(NUMBER)), Done::Ready);
    assert_eq!(leave(None), Done::Ready);
    same(&before, &lab.docs);
}

/// What is set aside is no more lost than what was never touched: it comes back when the move ends, when the daemon is killed, and
/// when another program has taken its name.
#[test]
fn what_is_set_aside_comes_back() {
    let scratch = Scratch::new();
    let lab = Lab::new(&scratch, "\"docs\"");
    fs::write(lab.docs.join("dir/deep"), b"deep").unwrap();
    lab.machine.ok(["arena", "scan", "docs"]);
    let before = indexed(&lab.docs);
    let entries = [
        ("file", file(b"bytes")),
        ("dir/deep", file(b"deep")),
        ("link", Content::Symlink { target: b"file".to_vec() }),
    ];
    let is_aside = |lab: &Lab, path: &str| !lab.docs.join(path).is_symlink() && !lab.docs.join(path).exists();
    let all_aside = |lab: &Lab| {
        assert_eq!(lab.ask(Task::Leave(Leave { number: NUMBER, path: None })), Done::Ready);
        let asides = entries.clone().map(|(path, content)| {
            let done = lab.prepare(path, content.clone());
            assert_eq!(lab.prepare(path, content), done, "the same again comes to the same");
            assert!(is_aside(lab, path), "{path}");
            let Done::Prepared { aside } = done else { panic!("{done:?}") };
            aside
        });
        // Nothing of it counts as deleted.
        lab.machine.ok(["arena", "scan", "docs"]);
        entries.iter().for_each(|(path, _)| drop(lab.machine.ok(["stat", &format!("docs/{path}")])));
        asides
    };
    let me = |lab: &Lab| MoveId { director: lab.me, number: NUMBER };
    all_aside(&lab);
    failed(lab.ask(Task::IsOver(me(&lab))), Why::Busy);
    assert_eq!(lab.ask(Task::End(NUMBER)), Done::Ready);
    assert_eq!(lab.ask(Task::IsOver(me(&lab))), Done::Ready);
    same(&before, &lab.docs);
    let asides = all_aside(&lab);
    failed(lab.finish("file", asides[0] ^ 1, true), Why::Over);
    assert!(is_aside(&lab, "file"));
    assert_eq!(lab.finish("file", asides[0], false), Done::PutBack);
    assert_eq!(lab.finish("link", asides[2], true), Done::Removed);
    assert_eq!(lab.finish("link", asides[2], true), Done::Removed, "the same again comes to the same");
    assert!(is_aside(&lab, "link"));
    std::os::unix::fs::symlink("file", lab.docs.join("link")).unwrap();
    lab.ask(Task::End(NUMBER));
    lab.machine.ok(["arena", "scan", "docs"]);
    let now = indexed(&lab.docs);
    assert_eq!((now.len(), tests::differences(&before, &now).len()), (before.len(), 1), "all but the new link");
    let before = now;

    all_aside(&lab);
    lab.machine.kill9();
    assert!(is_aside(&lab, "file"));
    lab.machine.restart_in_place();
    wait_for("it is back", Duration::from_secs(30), || lab.docs.join("dir/deep").exists().then_some(()));
    let lab = lab.again();
    same(&before, &lab.docs);
    failed(lab.prepare("file", file(b"bytes")), Why::Over);

    let asides = all_aside(&lab);
    fs::write(lab.docs.join("file"), b"newer").unwrap();
    failed(lab.finish("file", asides[0], false), Why::Changed);
    assert_eq!(fs::read(lab.docs.join("file")).unwrap(), b"newer");
    assert_eq!(fs::read(lab.docs.join("file.put-back-1")).unwrap(), b"bytes");
    lab.ask(Task::End(NUMBER));
    let names = fs::read_dir(&lab.docs).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!names.into_iter().any(|name| name.starts_with(".blobd-")));
}
