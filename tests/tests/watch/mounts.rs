//! Disks come and go: what is on a file system that is not there is out of reach, and not deleted.

use std::fs;

use tests::{FileSystem, FileSystemKind, Machine, Mounted, Scratch, Volume, may_mount, skipped, wait_for};

use crate::{LIMIT, Watched, history, listed, on_disk, seq, shows, write};

/// A disk with these files.
fn disk(scratch: &Scratch, name: &str, files: &[&str]) -> Volume {
    let disk = Volume::new(&scratch.path(name));
    let at = scratch.dir(&format!("{name}.at"));
    let _mounted = disk.mount(&at);
    fs::remove_dir(at.join("lost+found")).unwrap();
    files.iter().for_each(|file| write(at.join(file), format!("{file} of {name}").repeat(2000)));
    disk
}

impl Watched {
    /// Holds `docs`, where a disk is mounted at `usb`.
    fn with_disk_inside(scratch: Scratch) -> (Self, Volume, Mounted) {
        let root = scratch.dir("docs");
        write(root.join("file"), "file");
        fs::create_dir(root.join("usb")).unwrap();
        let disk = disk(&scratch, "disk", &["one", "sub/two"]);
        let mounted = disk.mount(&root.join("usb"));
        let a = Machine::up_with_config(&scratch, "a", &[&root], CONFIG);
        let this = Self { a, root, scratch };
        this.shows_all();
        (this, disk, mounted)
    }

    /// Waits until just these parts of the arena are offline.
    #[track_caller]
    fn is_offline_at(&self, parts: &[(&str, &str)]) {
        let expected = if parts.is_empty() { "up to date" } else { "partly offline" };
        wait_for(&format!("it is {expected}: {parts:?}"), LIMIT, || {
            let status = self.a.status()["arenas"][0]["status"].clone();
            let told = status["offline_parts"].as_array()?.iter();
            let told: Vec<_> =
                told.map(|part| (part["path"].as_str().unwrap(), part["reason"].as_str().unwrap())).collect();
            (told == parts && status["state"] == expected).then_some(())
        });
    }

    /// That nothing was said deleted, and that nothing is shown but `known`.
    #[track_caller]
    fn still_lists(&self, known: &std::collections::BTreeMap<Vec<u8>, String>, since: u64) {
        self.a.rests();
        assert_eq!(listed(&self.a), *known);
        assert!(history(&self.a, since).is_empty(), "{:?}", history(&self.a, since));
    }
}

const CONFIG: &str = "[watch]\nsettle = \"200ms\"\nsettle_max = \"1s\"\n[roles]\nb = { writer = [\"*\"] }\n";
const NOT_MOUNTED: &str = "its file system is not mounted";

#[test]
fn a_disk_inside_goes_and_comes() {
    if !may_mount() {
        return;
    }
    let (w, disk, mounted) = Watched::with_disk_inside(Scratch::new());
    let b = w.other();
    b.ok(["pin", "docs"]);
    let (before, known) = (seq(&w.a), on_disk(&w.root));
    drop(mounted);
    w.is_offline_at(&[("usb", NOT_MOUNTED)]);
    // What is put beneath the mount point is nobody's.
    write(w.path("usb/beneath"), "beneath");
    w.a.ok(["arena", "scan", "docs"]);
    w.still_lists(&known, before);
    w.a.stop();
    w.a.restart();
    w.is_offline_at(&[("usb", NOT_MOUNTED)]);
    w.still_lists(&known, before);
    let text = String::from_utf8(w.a.ok(["status"]).stdout).unwrap();
    assert!(text.contains("docs/usb: its file system is not mounted"), "{text}");
    assert!(text.contains("blob arena scan --accept docs"), "{text}");
    // It cannot be read, and is neither damaged nor edited.
    let verified = w.a.exits(3, ["verify", "--json", "docs"]);
    let found: Vec<_> = verified.of_type("failed").iter().map(|line| line["reason"].clone()).collect();
    assert_eq!(found, ["it is in a part that is offline: its file system is not mounted"; 2], "{}", verified.text());
    assert!(verified.of_type("damage").is_empty() && verified.of_type("modified").is_empty(), "{}", verified.text());
    b.hears(&w.a);
    assert_eq!(b.ok(["pin", "--json"]).of_type("pin")[0]["missing_files"], 0);
    assert_eq!(listed(&b), known);
    fs::remove_file(w.path("usb/beneath")).unwrap();
    // Beside it, all goes on.
    write(w.path("beside"), "beside");
    wait_for("the file beside", LIMIT, || listed(&w.a).contains_key(&b"beside"[..]).then_some(()));
    let log = w.a.log().len();
    let _mounted = disk.mount(&w.path("usb"));
    w.is_offline_at(&[]);
    w.shows_all();
    w.a.rests();
    assert!(!w.a.log()[log..].contains("hashed=1"), "{}", &w.a.log()[log..]);
    fs::remove_file(w.path("usb/one")).unwrap();
    w.shows_all();
    shows(&b, &w.root);
}

#[test]
fn orders_for_an_offline_part_are_refused() {
    if !may_mount() {
        return;
    }
    let (w, disk, mounted) = Watched::with_disk_inside(Scratch::new());
    let from = w.scratch.dir("from");
    write(from.join("small"), "small");
    write(from.join("large"), vec![7; 300_000]);
    let b = Machine::watching(&w.scratch, "b", &[&from]);
    b.join(&w.a);
    drop(mounted);
    w.is_offline_at(&[("usb", NOT_MOUNTED)]);
    for args in [["mv", "from", "a:docs/usb/"], ["cp", "from/small", "a:docs/usb/new"], ["cp", "from", "a:docs/usb"]] {
        let refused = b.run(args);
        assert_ne!(refused.code, 0, "{refused:?}");
        let said = refused.stderr.clone() + &String::from_utf8(refused.stdout).unwrap();
        assert!(said.contains("offline: its file system is not mounted"), "{said}");
    }
    // Nothing is removed there either: what is beneath is another file, whatever it is called.
    write(w.path("usb/one"), "beneath");
    let refused = b.run(["mv", "a:docs/usb/one", "from/"]);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert_eq!(fs::read(w.path("usb/one")).unwrap(), b"beneath");
    assert_eq!(fs::read_dir(w.path("usb")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(&from).unwrap().count(), 2);
    fs::remove_file(w.path("usb/one")).unwrap();
    let _mounted = disk.mount(&w.path("usb"));
    w.is_offline_at(&[]);
    b.ok(["cp", "from/small", "a:docs/usb/new"]);
    w.shows_all();
}

/// The whole arena is a disk, and nothing was on it: nothing tells it from the mount point but the file system.
#[test]
fn an_empty_disk_goes_and_comes() {
    if !may_mount() {
        return;
    }
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let disk = disk(&scratch, "disk", &[]);
    let mounted = disk.mount(&root);
    let a = Machine::up_with_config(&scratch, "a", &[&root], CONFIG);
    let w = Watched { a, root, scratch };
    write(w.scratch.path("from/file"), "file");
    let b = Machine::watching(&w.scratch, "b", &[w.scratch.path("from")]);
    b.join(&w.a);
    drop(mounted);
    w.becomes("offline");
    let refused = b.run(["mv", "from/file", "a:docs/"]);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert!(w.scratch.path("from/file").exists());
    assert_eq!(fs::read_dir(&w.root).unwrap().count(), 0);
    w.a.stop();
    w.a.restart();
    w.becomes("offline");
    let _mounted = disk.mount(&w.root);
    w.becomes("up to date");
    b.hears(&w.a);
    b.ok(["mv", "from/file", "a:docs/"]);
    w.shows_all();
}

/// What hides the root, whatever it is, is not the arena; and its going is noticed at once.
#[test]
fn something_is_mounted_over_the_root() {
    if !may_mount() {
        return;
    }
    let w = Watched::new(|root| {
        write(root.join("one"), "one");
        write(root.join("dir/two"), "two");
    });
    let (before, known) = (seq(&w.a), on_disk(&w.root));
    let other = w.scratch.dir("other");
    write(other.join("one"), "another one");
    let shelf = disk(&w.scratch, "disk", &["one"]);
    let mounts: [&dyn Fn() -> Mounted; 3] =
        [&|| Mounted::memory(&w.root), &|| Mounted::bind(&other, &w.root), &|| shelf.mount(&w.root)];
    for mount in mounts {
        let mounted = mount();
        w.becomes("offline");
        w.still_lists(&known, before);
        // Told in one line, and no file of it is called damaged.
        let verified = w.a.exits(3, ["verify", "--json"]);
        assert_eq!(
            (verified.of_type("offline").len(), verified.summary()["files"].as_u64()),
            (1, Some(0)),
            "{verified:?}"
        );
        w.a.exits(3, ["status", "--check"]);
        drop(mounted);
        w.becomes("up to date");
        w.a.ok(["status", "--check"]);
    }
    write(w.path("three"), "three");
    w.shows_all();
}

#[test]
fn something_is_mounted_over_known_files_inside() {
    if !may_mount() {
        return;
    }
    let w = Watched::new(|root| {
        write(root.join("dir/one"), "one");
        write(root.join("dir/sub/two"), "two");
        write(root.join("dir-2"), "beside");
    });
    let (before, known) = (seq(&w.a), on_disk(&w.root));
    let over = Mounted::memory(&w.path("dir"));
    w.is_offline_at(&[("dir", "another file system is mounted over it")]);
    write(w.path("dir/hides"), "hides");
    w.a.ok(["arena", "scan", "docs"]);
    w.still_lists(&known, before);
    drop(over);
    w.is_offline_at(&[]);
    w.still_lists(&known, before);
    write(w.path("dir/three"), "three");
    w.shows_all();
}

/// What others change on a file system that is only shown here is not reported, and found by looking.
#[test]
fn what_is_changed_beneath_is_found_by_looking() {
    let scratch = Scratch::new();
    let shown = match FileSystem::new(FileSystemKind::Bindfs, &scratch) {
        Ok(shown) => shown,
        Err(why) => return skipped(&why),
    };
    let a = Machine::up_with_config(&scratch, "a", &[shown.root()], "[watch]\npoll = \"500ms\"\n");
    assert!(a.run(["status"]).text().contains("is found every 0.5 s only"), "{}", a.run(["status"]).text());
    fs::write(scratch.path("beneath/second"), "second").unwrap();
    wait_for("it is found", LIMIT, || listed(&a).contains_key(&b"second"[..]).then_some(()));
    fs::remove_file(scratch.path("beneath/first")).unwrap();
    wait_for("its deletion is found", LIMIT, || (!listed(&a).contains_key(&b"first"[..])).then_some(()));
}

/// A disk is replaced by another one: that is for the user to say.
#[test]
fn another_disk_in_its_place() {
    if !may_mount() {
        return;
    }
    let (w, old, mounted) = Watched::with_disk_inside(Scratch::new());
    let (before, known) = (seq(&w.a), on_disk(&w.root));
    let new = disk(&w.scratch, "new", &["one", "three"]);
    drop(mounted);
    let mounted = new.mount(&w.path("usb"));
    w.is_offline_at(&[("usb", "another file system is there than before")]);
    w.still_lists(&known, before);
    w.a.ok(["arena", "scan", "--accept", "docs"]);
    w.is_offline_at(&[]);
    w.shows_all();
    drop(mounted);
    let mounted = old.mount(&w.path("usb"));
    w.is_offline_at(&[("usb", "another file system is there than before")]);
    drop(mounted);
    w.is_offline_at(&[("usb", NOT_MOUNTED)]);
    // None any more: the mount point is a directory as all others are.
    w.a.ok(["arena", "scan", "--accept", "docs"]);
    w.is_offline_at(&[]);
    w.shows_all();
    write(w.path("usb/beneath"), "beneath");
    w.shows_all();
}

#[test]
fn a_disk_that_has_another_device_number_is_not_read_again() {
    if !may_mount() {
        return;
    }
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let mut disk = disk(&scratch, "disk", &["one", "sub/two"]);
    let mounted = disk.mount(&root);
    let a = Machine::watching(&scratch, "a", &[&root]);
    let w = Watched { a, root, scratch };
    w.shows_all();
    let known = on_disk(&w.root);
    let device = disk.device().to_owned();
    drop(mounted);
    w.becomes("offline");
    disk.move_to_another_device();
    assert_ne!(disk.device(), device);
    let log = w.a.log().len();
    let _mounted = disk.mount(&w.root);
    w.becomes("up to date");
    w.a.stop();
    w.a.restart();
    w.becomes("up to date");
    let log = &w.a.log()[log..];
    assert!(!log.contains("hashed=2") && !log.contains("hashed=1"), "{log}");
    assert_eq!(listed(&w.a), known);
}
