//! What a user meets: exit codes, the text of errors, help, pipes that break, and the daemon's manners.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use tests::{Machine, Output, Scratch, blob, blobd};

/// Runs `blob ARGS` and compares its exit code and standard error. `{dir}` stands for the test's directory.
#[track_caller]
fn check(scratch: &Scratch, machine: &Machine, args: &str, code: i32, expected: &str) {
    let dir = scratch.path("").display().to_string();
    let dir = dir.trim_end_matches('/');
    let args: Vec<String> = args.split(' ').map(|arg| arg.replace("{dir}", dir)).collect();
    let output = machine.run(&args);
    let said = output.stderr.replace(dir, "{dir}");
    assert_eq!((said.trim_end(), output.code), (expected.trim(), code), "blob {args:?}");
}

#[test]
fn errors_without_a_daemon() {
    let scratch = Scratch::new();
    let cold = Machine::cold(&scratch, "a");
    let none = "error: no daemon answers at \"{dir}/a.home/blobd.sock\"\n  because: No such file or directory\nhint: start one with: blob up";
    for args in ["status", "ls", "cat docs/file", "get docs {dir}/x", "arena ls", "peer ls", "invite", "join ticket"] {
        check(&scratch, &cold, args, 10, none);
    }
    assert!(cold.ok(["verify"]).stderr.starts_with("files: 0, in "));
    fs::remove_dir_all(cold.home()).unwrap();
    let homeless = "error: there is no home at \"{dir}/a.home/state\"\nhint: make one with: blob up DIR";
    check(&scratch, &cold, "verify", 7, homeless);
    check(&scratch, &cold, "repair", 7, homeless);
    assert!(!cold.home().exists(), "asking makes no home");
    let id = cold.ok(["id"]).text();
    assert_eq!((id.trim().len(), cold.ok(["id"]).text()), (64, id), "its key is made once");
}

/// What each error says: `errors.rs`.
#[test]
fn errors_for_programs() {
    let scratch = Scratch::new();
    let a = Machine::up(&scratch, "a", &[scratch.dir("docs")]);
    for usage in ["frobnicate", "cat", "get docs", "arena", "--nonsense", "hash"] {
        let output = a.exits(2, usage.split(' '));
        assert!(output.stderr.contains("Usage: "), "{usage}: {}", output.stderr);
    }
    let error = a.exits(7, ["cat", "docs/nothing", "--json"]).of_type("error").remove(0);
    assert_eq!((&error["code"], &error["error"]), (&7.into(), &"there is no docs/nothing".into()));
}

#[test]
fn get_leaves_what_differs_alone() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    fs::write(root.join("file"), "hello").unwrap();
    fs::write(root.join("second"), "there").unwrap();
    let a = Machine::up(&scratch, "a", &[&root]);
    let copies = scratch.dir("copies/docs");
    fs::write(copies.join("file"), "mine").unwrap();
    let get = "get docs {dir}/copies";
    let differs = "failed: docs/file: something else is at \"{dir}/copies/docs/file\" already";
    let scrub =
        |output: &Output| output.stderr.replace(scratch.path("").to_str().unwrap().trim_end_matches('/'), "{dir}");
    let dir = scratch.path("");
    let args: Vec<_> = get.split(' ').map(|arg| arg.replace("{dir}", dir.to_str().unwrap())).collect();
    for _ in 0..2 {
        let output = a.exits(3, &args);
        assert!(scrub(&output).contains(differs), "{}", output.stderr);
        assert_eq!(fs::read_to_string(copies.join("file")).unwrap(), "mine");
        assert_eq!(fs::read_to_string(copies.join("second")).unwrap(), "there");
    }
    // The same where a directory, or a link to just that file, is in the way.
    fs::remove_file(copies.join("file")).unwrap();
    std::os::unix::fs::symlink(root.join("file"), copies.join("file")).unwrap();
    a.exits(3, &args);
    assert!(copies.join("file").is_symlink());
    fs::remove_file(copies.join("file")).unwrap();
    fs::create_dir(copies.join("file")).unwrap();
    a.exits(3, &args);
    assert!(copies.join("file").is_dir());
}

#[test]
fn mistakes_in_the_configuration() {
    let scratch = Scratch::new();
    let a = Machine::cold(&scratch, "a");
    for (config, expected) in [
        ("listne = \"x\"", "unknown field `listne`"),
        ("listen = 5", "invalid type"),
        ("[serve]\niroh = \"yes\"", "invalid type"),
        ("listen = ", "TOML parse error at line 1"),
        ("listen = \"nonsense\"", "error: \"nonsense\" is not an address to listen on"),
        ("listen = [\"[::1]:0\", 5]", "invalid type"),
    ] {
        fs::write(a.home().join("config.toml"), config).unwrap();
        let mut command = Command::new(blobd());
        command.arg("--home").arg(a.home());
        let output = Output::of(command);
        assert_eq!(output.code, 2, "{config}: {}", output.stderr);
        assert!(output.stderr.contains(expected), "{config}: {}", output.stderr);
    }
}

/// A socket says that a daemon runs.
#[test]
fn a_daemon_that_does_not_start_leaves_no_socket() {
    let scratch = Scratch::new();
    let a = Machine::cold(&scratch, "a");
    fs::write(a.home().join("config.toml"), "listne = \"x\"").unwrap();
    let mut command = Command::new(blobd());
    command.arg("--home").arg(a.home());
    assert_eq!(Output::of(command).code, 2);
    assert!(!a.home().join("blobd.sock").exists());
}

#[test]
fn every_command_has_help() {
    let mut seen = 0;
    let mut commands = vec![vec![]];
    while let Some(path) = commands.pop() {
        let mut command = Command::new(blob());
        command.args(&path).arg("--help");
        let output = Output::of(command);
        assert_eq!((output.code, &*output.stderr), (0, ""), "{path:?}");
        let text = output.text();
        let listed = text.split_once("Commands:\n").map_or("", |(_, rest)| rest.split("\n\n").next().unwrap_or(""));
        let names = listed.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        for name in names.filter_map(|line| line.split_whitespace().next()).filter(|&name| name != "help") {
            commands.push([&path[..], &[name.to_owned()]].concat());
        }
        seen += 1;
    }
    assert!(seen > 15, "{seen} commands");
    for program in [blob(), blobd()] {
        for flag in ["--help", "--version"] {
            let mut command = Command::new(&program);
            command.arg(flag);
            assert_eq!(Output::of(command).code, 0, "{program:?} {flag}");
        }
    }
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    for number in 0..5000 {
        fs::write(root.join(format!("a file with a name that is not all that short, number {number}")), "").unwrap();
    }
    fs::write(root.join("large"), vec![7; 20 << 20]).unwrap();
    let a = Machine::up(&scratch, "a", &[&root]);
    for args in ["ls -R", "ls -R --json", "cat docs/large", "verify --json"] {
        let script = "\"$0\" --home \"$1\" $2 | head -c 10 >\"$3\"";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(blob()).arg(a.home()).arg(args).arg(scratch.path("head"));
        let output = Output::of(command);
        assert!(!output.stderr.contains("panic") && !output.stderr.contains("error"), "{args}: {}", output.stderr);
    }
    let mut closed = a.command(["status"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(closed.stdout.take());
    let output = closed.wait_with_output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panic"), "{:?}", output.stderr);
    assert!(a.is_running() && !a.log().contains("panicked"), "{}", a.log());
}

#[test]
fn the_daemon_is_private_answers_http_and_stops_when_told() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    fs::write(root.join("file"), "hello").unwrap();
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    let mode = |path: &str| fs::metadata(a.home().join(path)).unwrap().permissions().mode() & 0o777;
    let socket = a.home().join("blobd.sock");
    assert_eq!([mode("blobd.sock"), mode("state"), mode("cache"), mode("state/key")], [0o600, 0o700, 0o700, 0o600]);
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--unix-socket"]).arg(&socket).arg("http://localhost/v1/status");
    if Command::new("curl").arg("--version").stdout(Stdio::null()).status().is_ok() {
        let status: serde_json::Value = serde_json::from_slice(&Output::of(curl).stdout).unwrap();
        assert_eq!((&status["name"], &status["arenas"][0]["name"]), (&"a".into(), &"docs".into()));
    }
    let (status, took) = a.stop();
    assert_eq!(status.code(), Some(0), "{}", a.log());
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(!socket.exists());
    a.restart();
    let (status, took) = a.stop();
    assert_eq!((status.code(), took < Duration::from_secs(10), socket.exists()), (Some(0), true, false));
    // A socket that a killed daemon left behind is in nobody's way.
    a.restart();
    a.kill9();
    assert!(socket.exists());
    assert_eq!(a.run(["status"]).code, 10);
    a.restart();
    a.ok(["status"]);
}

/// Debian's `fsverity digest` beside `blob hash --fsverity`, around the ends of blocks and of blocks of hashes.
#[test]
fn fsverity_digests_are_those_that_linux_measures() {
    let scratch = Scratch::new();
    let mut rng = fastrand::Rng::with_seed(7);
    let sizes = [0, 1, 4095, 4096, 4097, 128 * 4096, 128 * 4096 + 1, (3 << 20) + 7, 70 << 20];
    let mut files: Vec<_> = sizes.iter().map(|size| scratch.path(&format!("{size} bytes"))).collect();
    for (file, size) in files.iter().zip(sizes) {
        tests::write_random(file, size, &mut rng);
    }
    files.push(scratch.path("").join(OsStr::from_bytes(b"line\nbreak, \\ and \xff")));
    fs::write(&files[sizes.len()], "hello").unwrap();
    let mut rival = Command::new("fsverity");
    rival.arg("digest").args(&files);
    let rival = Output::of(rival);
    assert_eq!(rival.code, 0, "{}", rival.stderr);

    let hash = |args: &[&str], files: &[PathBuf]| {
        let mut command = Command::new(blob());
        command.args(["hash", "--fsverity"]).args(args).args(files);
        Output::of(command)
    };
    let ours = hash(&[], &files);
    assert_eq!((ours.code, ours.text()), (0, rival.text()));
    assert_eq!(ours.stdout, rival.stdout);
    let json = hash(&["--json"], &files).of_type("fsverity");
    for ((line, file), expected) in json.iter().zip(&files).zip(rival.text().lines()) {
        assert_eq!(line["path"], *file.to_string_lossy());
        assert!(expected.starts_with(&format!("{} ", line["digest"].as_str().unwrap())), "{line}");
    }
    assert_eq!(json.len(), files.len());
    assert!(json[sizes.len()]["path_bytes"].is_string() && json[0].get("path_bytes").is_none());
    let mut command = Command::new(blob());
    command.args(["hash", "--json"]).arg(&files[1]).arg(&files[sizes.len()]);
    let ids = Output::of(command).of_type("hash");
    assert_eq!(ids[0]["blob"], blake3::hash(&fs::read(&files[1]).unwrap()).to_string());
    assert_eq!((&ids[0]["path"], ids[1]["path_bytes"].is_string()), (&json[1]["path"], true), "{ids:?}");
    let mixed = hash(&[], &[scratch.path("nowhere"), files[0].clone()]);
    assert_eq!((mixed.code, mixed.text().lines().count()), (3, 1), "{}", mixed.stderr);
    assert_eq!(hash(&[], &[scratch.path("")]).code, 1);
}

/// SIGTERM while much is being done: it ends all the same, and in time.
#[test]
fn the_daemon_stops_in_the_middle_of_work() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    tests::write_random(&root.join("large"), 60 << 20, &mut fastrand::Rng::new());
    let a = Machine::up(&scratch, "a", &[&root]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    b.join(&a);
    for args in [["get", "docs", "copy"], ["verify", "--json", "docs"], ["get", "docs", "copy"]] {
        for machine in [&a, &b] {
            let mut command = machine.command(args);
            let mut work =
                command.current_dir(scratch.path("")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let (status, took) = machine.stop();
            assert_eq!(status.code(), Some(0), "{}", machine.log());
            assert!(took < Duration::from_secs(10), "{took:?}");
            work.wait().unwrap();
            machine.restart();
            machine.ok(["verify"]);
        }
    }
}
