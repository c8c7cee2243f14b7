//! The Linux guest that other tests mount with: it boots, runs what it is told, one after the other and at once, keeps
//! shells, and sees what the host has.

use std::{fs, process::Command, time::Duration};

use tests::{BIG, Ganesha, Guest, MOUNT, Network, Output, SERVER, Scratch, TreeSpec, build_tree, wait_for};

#[test]
fn a_guest_runs_what_it_is_told_and_sees_the_host() {
    let Some(network) = Network::new() else { return };
    let scratch = Scratch::new();
    let Some(guest) = Guest::boot(&network, &scratch) else { return };
    // Output, errors and codes are apart, and bytes are bytes.
    let output = guest.run("printf 'a\\0\\377'; printf '%s\\n' \"$((6 * 7))\" >&2; exit 9");
    assert_eq!((output.code, &output.stdout[..], &output.stderr[..]), (9, &b"a\0\xff"[..], "42\n"));
    assert_eq!(guest.run("no such thing (").code, 2);
    let large = guest.run("head -c 3000000 /dev/zero");
    assert!(large.code == 0 && large.stdout.len() == 3_000_000);
    assert_eq!(guest.ok("grep -cw nfs /proc/filesystems").trim(), "1");
    assert_eq!(guest.ok("uname -r"), guest.ok("cat /proc/sys/kernel/osrelease"));

    // The host's files, also such as came after the guest has looked; they are not its own to change.
    let dir = scratch.dir("tree");
    fs::write(dir.join("one"), "1").unwrap();
    let find = format!("find {} -type f -printf '%f %s %m '", dir.display());
    assert_eq!(guest.ok(&find), "one 1 644 ");
    fs::write(dir.join("one"), "eleven").unwrap();
    assert_eq!(guest.ok(&find), "one 6 644 ");
    assert_eq!(guest.ok(&format!("cat {}/one", dir.display())), "eleven");
    let changed = guest.run(&format!("touch {}/two", dir.display()));
    assert!(changed.code == 1 && changed.stderr.contains("Read-only file system"), "{}", changed.stderr);
    assert_eq!(guest.ok("cp -r /etc/apt $TMPDIR && diff -r /etc/apt $TMPDIR/apt && echo same"), "same\n");

    // Each of these ends only because the other runs too.
    guest.ok("mkfifo /mnt/tmp/there /mnt/tmp/back");
    let echo = guest.start("cat /mnt/tmp/there >/mnt/tmp/back");
    assert_eq!(guest.ok("echo round >/mnt/tmp/there & cat /mnt/tmp/back"), "round\n");
    assert_eq!(echo.wait().code, 0);
    let many: Vec<_> = (0..8).map(|number| guest.start(&format!("echo {number}; exit {number}"))).collect();
    for (running, number) in many.into_iter().zip(0..) {
        let output = running.wait();
        assert_eq!((output.text(), output.code), (format!("{number}\n"), number));
    }

    let (one, other) = (guest.shell(), guest.shell());
    one.ok(&format!("exec 5<{}/one; who=one; read -r line <<-end\n$(head -c 2 <&5)\nend\n", dir.display()));
    other.ok("who=other");
    assert_eq!(one.ok("echo $who $line $(cat <&5)"), "one el even\n");
    assert_eq!(other.run("echo $who; false").code, 1);
    assert_eq!(other.ok("echo $who"), "other\n");

    // There is a network, and in it nobody who listens.
    let failed = guest.try_mount("/", "retry=0");
    assert!(failed.code != 0 && failed.stderr.contains("onnection refused"), "{}", failed.stderr);
    assert!(guest.ok(&format!("ls -A {MOUNT}")).is_empty());
    network.run("ip addr show dev tap0 | grep -qw inet");
    assert!(guest.ok("cat /proc/net/route").lines().any(|line| line.starts_with("vec0")), "no route to {SERVER}");
}

#[test]
fn what_hangs_ends_with_the_guest() {
    let Some(network) = Network::new() else { return };
    let scratch = Scratch::new();
    let Some(guest) = Guest::boot(&network, &scratch) else { return };
    let processes = || {
        let dir = scratch.path("guest").display().to_string();
        let commands = fs::read_dir("/proc").unwrap().flatten();
        let commands = commands.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        commands.filter(|line| String::from_utf8_lossy(line).contains(&dir)).count()
    };
    let spinning = guest.start("while :; do :; done");
    assert!(processes() > 1);
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = spinning.wait_within(Duration::from_millis(300));
    }));
    assert!(panic.unwrap_err().downcast_ref::<String>().unwrap().contains("while :; do :; done: timed out"));
    // It is gone, and what comes later is told so at once.
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guest.ok("true")));
    let said = panic.unwrap_err().downcast_ref::<String>().unwrap().clone();
    assert!(said.contains("in the guest: true: ") && !said.contains("timed out"), "{said}");
    drop(guest);
    wait_for("its processes end", Duration::from_secs(10), || (processes() == 0).then_some(()));
}

/// What tests of a mount do, done with a server that others wrote.
#[test]
#[ignore = "needs nfs-ganesha and nfs-ganesha-vfs"]
fn a_mount_is_compared_read_in_parallel_and_kept_over_a_restart() {
    let network = Network::new().expect("a network");
    let scratch = Scratch::new();
    let guest = Guest::boot(&network, &scratch).expect("a guest");
    let tree = scratch.dir("tree");
    build_tree(&tree, TreeSpec { files: 300, bytes: 1 << 20, big_bytes: 20_000_003 });
    // Who reads the first waits for a writer; NFS 3 has no times before 1970.
    for name in ["fifo", "before 1970", "just before 1970"] {
        fs::remove_file(tree.join("odd").join(name)).unwrap();
    }
    let serve = || Ganesha::start(&network, &scratch, &tree).expect("it is installed");
    let server = serve();
    let (export, ports) = (tree.to_str().unwrap(), format!("port={},mountport={}", Ganesha::PORT, Ganesha::MOUNT_PORT));
    wait_for("a mount", Duration::from_secs(30), || (guest.try_mount(export, &ports).code == 0).then_some(()));

    guest.ok(&format!("diff -r --no-dereference {export} {MOUNT}"));
    // Times by the host, for hostfs has whole seconds only.
    let list = |dir: &str| format!("cd {dir} && find . -printf '%P %y %s %m %T@ %l\\0' | LC_ALL=C sort -z");
    let mut listing = Command::new("sh");
    listing.args(["-c", &list(export)]);
    assert_eq!(Output::of(listing).text(), guest.ok(&list(MOUNT)));

    let digest = guest.ok(&format!("sha256sum <'{export}/{BIG}'"));
    let read = |number| format!("dd if='{MOUNT}/{BIG}' bs=64K skip={number} 2>/dev/null | wc -c");
    // Four times what the guest has of memory, which is no reason to hang.
    fs::File::create(tree.join("sparse")).unwrap().set_len(1 << 30).unwrap();
    assert_eq!(guest.ok(&format!("cat {MOUNT}/sparse | wc -c")).trim(), (1 << 30).to_string());

    let readers: Vec<_> = (0..8).map(|number| guest.start(&read(number))).collect();
    for (reader, number) in readers.into_iter().zip(0..) {
        assert_eq!(reader.ok().trim(), (20_000_003 - number * 65536).to_string());
    }

    guest.unmount();
    guest.mount(export, &ports);
    let shell = guest.shell();
    shell.ok(&format!("exec 5<'{MOUNT}/{BIG}'; head -c 1000003 <&5 >/mnt/tmp/copy"));
    drop(server);
    let reading = shell.start("cat <&5 >>/mnt/tmp/copy && sha256sum </mnt/tmp/copy");
    let _server = serve();
    assert_eq!(reading.ok(), digest);
    shell.ok("exec 5<&-");
    guest.unmount();
    assert_eq!(guest.ok(&format!("ls -A {MOUNT}")), "");
}
