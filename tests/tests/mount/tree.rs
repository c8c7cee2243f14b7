use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use fastrand::Rng;
use tests::{
    Attributes, Item, Machine, Mtime, Nfs, Scratch, TreeSpec, Xdr, build_tree, differences, indexed, random_bytes,
    status, wait_for,
};

/// Every name, type, size, time, target and byte of a tree as people have them; modes as the mount gives them.
#[test]
fn everything_is_shown_as_it_is() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    build_tree(&docs, TreeSpec { files: 300, bytes: 3 << 20, big_bytes: 3_000_001 });
    let machine = Machine::up(&scratch, "a", &[&docs]);
    machine.rests();
    let mut expected = indexed(&docs);
    for item in expected.values_mut() {
        if let Item::File { mode, .. } = item {
            *mode = if *mode & 0o111 == 0 { 0o664 } else { 0o775 };
        }
        if let Item::File { mtime, .. } | Item::Symlink { mtime, .. } = item {
            // The times that NFS has.
            *mtime = (*mtime).clamp(Mtime(0, 0), Mtime(u32::MAX.into(), 0));
        }
    }
    let mut nfs = Nfs::connect(&machine);
    let root = nfs.mount(b"/").unwrap();
    let arenas = nfs.list(&root, 4096).unwrap();
    assert_eq!(arenas.iter().map(|arena| &arena.name[..]).collect::<Vec<_>>(), [b"docs"]);
    let docs = nfs.mount(b"/docs").unwrap();
    let found = nfs.snapshot(&docs);
    assert_eq!(differences(&expected, &found), [""; 0]);
    assert_eq!(nfs.attributes(&root).unwrap().mode, 0o775);
    assert_eq!(nfs.mount(b"docs//odd/").unwrap(), nfs.find("docs/odd").unwrap());
    assert_eq!((nfs.mount(b"/nothing"), nfs.mount(b"/docs/nothing")), (Err(status::NOENT), Err(status::NOENT)));
}

/// What a client asks of the wrong kind of object, or of what is not there.
#[test]
fn mistakes_have_their_errors_and_writing_is_refused() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    fs::write(docs.join("file"), b"bytes").unwrap();
    fs::create_dir(docs.join("dir")).unwrap();
    std::os::unix::fs::symlink("file", docs.join("link")).unwrap();
    let machine = Machine::up(&scratch, "a", &[&docs]);
    machine.rests();
    let mut nfs = Nfs::connect(&machine);
    let [dir, file, link] = ["docs/dir", "docs/file", "docs/link"].map(|path| nfs.find(path).unwrap());
    let top = nfs.find("docs").unwrap();
    assert_eq!(nfs.lookup(&top, b"file/"), Err(status::NOENT));
    assert_eq!(nfs.lookup(&top, b"dir/.."), Err(status::NOENT));
    assert_eq!(nfs.lookup(&top, &[b'n'; 256]), Err(status::NAMETOOLONG));
    assert_eq!(nfs.lookup(&file, b"x"), Err(status::NOTDIR));
    assert_eq!(nfs.lookup(&dir, b"..").unwrap().0, top);
    assert_eq!(nfs.lookup(&top, b"..").unwrap().0, nfs.mount(b"/").unwrap());
    assert_eq!((nfs.read(&dir, 0, 1), nfs.read(&link, 0, 1)), (Err(status::ISDIR), Err(status::INVAL)));
    assert_eq!((nfs.target(&file), nfs.target(&link)), (Err(status::INVAL), Ok(b"file".to_vec())));
    assert_eq!(nfs.page(&file, 0, 4096).map(|_| ()), Err(status::NOTDIR));
    assert_eq!(nfs.read(&file, 3, 100), Ok((b"es".to_vec(), true)));
    assert_eq!(nfs.read(&file, 0, 2), Ok((b"by".to_vec(), false)));
    assert_eq!((nfs.read(&file, 5, 1), nfs.read(&file, u64::MAX, u32::MAX)), (Ok((vec![], true)), Ok((vec![], true))));
    assert_eq!(nfs.attributes(b"no handle"), Err(status::BADHANDLE));
    let mut strange = file.clone();
    strange[9] ^= 1;
    assert_eq!(nfs.attributes(&strange), Err(status::STALE));
    // Each writing procedure, whatever its arguments are; the rest of the answer is as long as it must be.
    for (procedure, words) in
        [(2, 2), (7, 2), (8, 2), (9, 2), (10, 2), (11, 2), (12, 2), (13, 2), (14, 4), (15, 3), (21, 2)]
    {
        let mut results = nfs.call([Nfs::PROGRAM, 3, procedure], &Xdr::default().opaque(&file)).unwrap();
        assert_eq!(results.u32(), status::ROFS, "procedure {procedure}");
        assert_eq!((0..words).map(|_| results.u32()).sum::<u32>(), 0);
    }
    // ACCESS, FSSTAT, FSINFO and PATHCONF.
    let mut access = nfs.call([Nfs::PROGRAM, 3, 4], &Xdr::default().opaque(&file).u32(0x3f)).unwrap();
    let words: Vec<u32> = (0..24).map(|_| access.u32()).collect();
    assert_eq!((words[0], words[23]), (0, 0x23));
    for procedure in [18, 19, 20] {
        assert_eq!(nfs.call([Nfs::PROGRAM, 3, procedure], &Xdr::default().opaque(&top)).unwrap().u32(), 0);
    }
}

/// Whoever holds a handle goes on with it after the daemon died, at whatever depth.
#[test]
fn handles_and_ids_outlive_the_daemon() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let mut paths = vec![PathBuf::from("top")];
    for depth in [1, 5, 20, 60, 300] {
        let dir: PathBuf = (0..depth).map(|at| format!("{}{at}", ["a", "b"][depth % 2])).collect();
        fs::create_dir_all(docs.join(&dir)).unwrap();
        paths.push(dir.join("file"));
    }
    for path in &paths {
        fs::write(docs.join(path), path.as_os_str().as_encoded_bytes()).unwrap();
    }
    let machine = Machine::up(&scratch, "a", &[&docs]);
    machine.rests();
    let mut nfs = Nfs::connect(&machine);
    let mut handles: Vec<(Vec<u8>, Attributes)> = Vec::new();
    for path in &paths {
        let path = Path::new("docs").join(path);
        for path in path.ancestors().filter(|path| path != &Path::new("")) {
            let handle = nfs.find(path.to_str().unwrap()).unwrap();
            let attributes = nfs.attributes(&handle).unwrap();
            handles.push((handle, attributes));
        }
    }
    let ids: BTreeSet<u64> = handles.iter().map(|(_, attributes)| attributes.id).collect();
    let different: BTreeSet<&Vec<u8>> = handles.iter().map(|(handle, _)| handle).collect();
    assert_eq!(ids.len(), different.len());
    machine.kill9();
    machine.restart();
    let mut nfs = Nfs::connect(&machine);
    Rng::with_seed(4).shuffle(&mut handles);
    for (handle, attributes) in &handles {
        assert_eq!(nfs.attributes(handle).as_ref(), Ok(attributes));
    }
    for path in &paths {
        let name = path.as_os_str().as_encoded_bytes();
        let file = handles.iter().find(|(handle, _)| nfs.read(handle, 0, 10_000) == Ok((name.to_vec(), true)));
        assert!(file.is_some(), "{path:?} is read by its handle");
    }
}

/// A directory that changes while it is listed: what stays is listed once, in whatever pages.
#[test]
fn a_listing_goes_on_while_entries_come_and_go() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    for number in 0..2000 {
        fs::write(docs.join(format!("stays {number}")), b"").unwrap();
        fs::write(docs.join(format!("goes {number}")), b"").unwrap();
    }
    let machine = Machine::up(&scratch, "a", &[&docs]);
    machine.rests();
    let mut nfs = Nfs::connect(&machine);
    let dir = nfs.find("docs").unwrap();
    assert_eq!(nfs.list(&dir, 1 << 20).unwrap().len(), 4000);
    let before = nfs.attributes(&dir).unwrap().mtime;
    let (mut listed, mut cookie) = (Vec::new(), 0);
    for round in 0.. {
        let (page, is_end) = nfs.page(&dir, cookie, 4096).unwrap();
        assert!(page.is_sorted_by_key(|entry| entry.cookie) && page.first().is_none_or(|first| first.cookie > cookie));
        cookie = page.last().map_or(cookie, |last| last.cookie);
        listed.extend(page.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()));
        if is_end {
            break;
        }
        if round % 30 == 0 {
            // Also the one that the cookie is of.
            let last = listed.last().filter(|last| last.starts_with("goes")).cloned();
            for name in last.into_iter().chain((0..20).map(|at| format!("goes {}", round + at))) {
                let _ = fs::remove_file(docs.join(name));
            }
            fs::write(docs.join(format!("comes {round}")), b"").unwrap();
            machine.ok(["arena", "scan", "docs"]);
        }
    }
    let staying: BTreeSet<&String> = listed.iter().filter(|name| name.starts_with("stays")).collect();
    assert_eq!(staying.len(), 2000);
    let different: BTreeSet<&String> = listed.iter().collect();
    assert_eq!(different.len(), listed.len(), "nothing is listed twice");
    let gone =
        |nfs: &mut Nfs| nfs.list(&dir, 1 << 20).unwrap().iter().all(|entry| docs.join(path_of(&entry.name)).exists());
    wait_for("the listing to be as the directory is", Duration::from_secs(10), || gone(&mut nfs).then_some(()));
    assert_ne!(nfs.attributes(&dir).unwrap().mtime, before);
}

fn path_of(name: &[u8]) -> &str {
    std::str::from_utf8(name).unwrap()
}

/// Clients keep what they know of a directory until its mtime moves.
#[test]
fn the_mtime_of_a_directory_moves_with_all_that_is_shown_in_it() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    fs::create_dir_all(docs.join("dir/below")).unwrap();
    fs::write(docs.join("dir/file"), b"1").unwrap();
    let machine = Machine::up(&scratch, "a", &[&docs]);
    machine.rests();
    let mut nfs = Nfs::connect(&machine);
    let dir = nfs.find("docs/dir").unwrap();
    let mut mtimes = vec![nfs.attributes(&dir).unwrap().mtime];
    let mut moves = |what: &str, change: &dyn Fn()| {
        change();
        machine.ok(["arena", "scan", "docs"]);
        mtimes.push(wait_for(what, Duration::from_secs(10), || {
            let now = nfs.attributes(&dir).unwrap().mtime;
            (!mtimes.contains(&now)).then_some(now)
        }));
    };
    moves("a file comes", &|| fs::write(docs.join("dir/new"), b"2").unwrap());
    moves("a file changes", &|| {
        fs::File::options().append(true).open(docs.join("dir/file")).unwrap().write_all(b"1").unwrap()
    });
    moves("a file goes", &|| fs::remove_file(docs.join("dir/new")).unwrap());
    moves("a directory goes", &|| fs::remove_dir(docs.join("dir/below")).unwrap());
    let last = *mtimes.last().unwrap();
    // What is elsewhere moves nothing.
    fs::write(docs.join("beside"), b"3").unwrap();
    machine.ok(["arena", "scan", "docs"]);
    assert_eq!(nfs.attributes(&dir).unwrap().mtime, last);
}

/// Who has a file open reads it to the end as it was, and who opens it anew gets it as it is: from a peer that has both.
#[test]
fn an_older_version_is_read_to_its_end() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let (old, new) = (random_bytes(3 << 20, &mut Rng::with_seed(1)), random_bytes(2 << 20, &mut Rng::with_seed(2)));
    fs::write(docs.join("file"), &old).unwrap();
    fs::write(docs.join("copy"), &old).unwrap();
    let machine = Machine::up(&scratch, "a", &[&docs]);
    machine.rests();
    let mut nfs = Nfs::connect(&machine);
    let before = nfs.find("docs/file").unwrap();
    let attributes = nfs.attributes(&before).unwrap();
    assert!(nfs.read(&before, 0, 1 << 20).unwrap().0 == old[..1 << 20]);
    fs::write(docs.join("next"), &new).unwrap();
    fs::rename(docs.join("next"), docs.join("file")).unwrap();
    machine.ok(["arena", "scan", "docs"]);
    for restarts in 0..2 {
        let after = nfs.find("docs/file").unwrap();
        assert_ne!(before, after);
        assert_eq!(nfs.attributes(&before).as_ref(), Ok(&attributes), "{restarts} restarts");
        assert!(nfs.read_from(&before, 1 << 20, 1 << 20).unwrap() == old[1 << 20..]);
        let now = nfs.attributes(&after).unwrap();
        assert_eq!((now.size, now.id), (2 << 20, attributes.id));
        assert!(nfs.read_from(&after, 0, 1 << 20).unwrap() == new);
        machine.stop();
        machine.restart();
        nfs = Nfs::connect(&machine);
    }
    // With its last copy the older version is gone; the newer is not.
    fs::remove_file(docs.join("copy")).unwrap();
    machine.ok(["arena", "scan", "docs"]);
    assert_eq!(nfs.read(&before, 0, 1), Err(status::STALE));
    fs::remove_file(docs.join("file")).unwrap();
    machine.ok(["arena", "scan", "docs"]);
    assert_eq!(nfs.find("docs/file"), Err(status::NOENT));
    assert_eq!(nfs.attributes(&before), Err(status::STALE));
}
