//! With the NFS client of Linux itself, in a guest. Left out, and said so, where there can be none.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use fastrand::Rng;
use tests::{
    BIG, Guest, MOUNT, Machine, NFS_PORT, Network, Output, SERVER, Scratch, TreeSpec, build_tree, random_bytes,
    wait_for,
};

/// Beside what the test sets, what `blob mount` sets.
const OPTIONS: &str = "ro,soft,timeo=600,retrans=2,rsize=1048576,acdirmin=1,acdirmax=2";

fn config() -> String {
    format!("[nfs]\nlisten = \"{SERVER}:{NFS_PORT}\"\nallow = [\"10.77.0.0/24\"]\nfetch_timeout = \"3s\"\n")
}

/// What `find` prints of all but directories, whose mtimes and sizes are the mount's own, and of those names and types.
fn list(dir: &str) -> String {
    format!("cd {dir} && find . \\( -type d -printf '%P %y\\0' -o -printf '%P %y %s %T@ %l\\0' \\) | LC_ALL=C sort -z")
}

fn on_host(script: &str) -> String {
    let mut shell = Command::new("sh");
    shell.args(["-c", script]);
    Output::of(shell).text()
}

/// A tree as people have them, for NFS 3 has no times before 1970, and who reads a fifo waits.
fn tree(scratch: &Scratch, spec: TreeSpec) -> std::path::PathBuf {
    let tree = scratch.dir("tree");
    build_tree(&tree, spec);
    for name in ["fifo", "before 1970", "just before 1970"] {
        fs::remove_file(tree.join("odd").join(name)).unwrap();
    }
    tree
}

#[test]
fn linux_reads_what_is_here() {
    let Some(network) = Network::new() else { return };
    let scratch = Scratch::new();
    let Some(guest) = Guest::boot(&network, &scratch) else { return };
    let tree = tree(&scratch, TreeSpec { files: 1000, bytes: 10 << 20, big_bytes: 20_000_003 });
    let machine = Machine::up_in_with_config(&network, &scratch, "a", &[&tree], &config());
    machine.rests();
    guest.mount("/tree", OPTIONS);
    let export = tree.to_str().unwrap();
    guest.ok(&format!("diff -r --no-dereference {export} {MOUNT}"));
    assert_eq!(on_host(&list(export)), guest.ok(&list(MOUNT)));
    let refused = guest.run(&format!("mount -o remount,rw {MOUNT}; touch {MOUNT}/new"));
    assert!(refused.code != 0 && refused.stderr.contains("Read-only file system"), "{}", refused.stderr);

    // Eight at once, each all of it in its own order.
    let digest = guest.ok(&format!("sha256sum <'{export}/{BIG}'"));
    let readers: Vec<_> = (0..8)
        .map(|number| {
            guest.start(&format!(
                "dd if='{MOUNT}/{BIG}' bs=64K skip={} 2>/dev/null | wc -c; sha256sum <'{MOUNT}/{BIG}'",
                number * 30
            ))
        })
        .collect();
    for (reader, number) in readers.into_iter().zip(0..) {
        assert_eq!(reader.ok(), format!("{}\n{digest}", 20_000_003 - number * 30 * 65536));
    }

    // A file that is open while the daemon dies, and comes back.
    guest.unmount();
    guest.mount("/", OPTIONS);
    let shell = guest.shell();
    shell.ok(&format!("exec 5<'{MOUNT}/tree/{BIG}'; head -c 1000003 <&5 >/mnt/tmp/copy; cd {MOUNT}/tree/odd"));
    machine.kill9();
    let reading = shell.start("cat <&5 >>/mnt/tmp/copy && sha256sum </mnt/tmp/copy");
    machine.restart();
    assert_eq!(reading.ok(), digest);
    assert_eq!(shell.ok("ls | wc -l").trim(), on_host(&format!("ls {export}/odd | wc -l")).trim());
    shell.ok("exec 5<&-; cd /");

    // A file that is open while another version takes its place; its bytes are still somewhere.
    let (old, new) = (random_bytes(3_000_001, &mut Rng::with_seed(1)), random_bytes(2_000_001, &mut Rng::with_seed(2)));
    for (name, bytes) in [("file", &old), ("copy", &old), ("next", &new)] {
        fs::write(tree.join(name), bytes).unwrap();
    }
    let digests = ["copy", "next"].map(|name| guest.ok(&format!("sha256sum <'{export}/{name}'")));
    machine.ok(["arena", "scan", "tree"]);
    wait_for("the file to come", Duration::from_secs(30), || {
        (guest.run(&format!("cat {MOUNT}/tree/file | sha256sum")).text() == digests[0]).then_some(())
    });
    shell.ok(&format!("exec 6<{MOUNT}/tree/file; head -c 100 <&6 >/mnt/tmp/old"));
    fs::rename(tree.join("next"), tree.join("file")).unwrap();
    machine.ok(["arena", "scan", "tree"]);
    wait_for("the new version to be opened", Duration::from_secs(30), || {
        (guest.run(&format!("cat {MOUNT}/tree/file | sha256sum")).text() == digests[1]).then_some(())
    });
    guest.ok("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(shell.ok("cat <&6 >>/mnt/tmp/old; sha256sum </mnt/tmp/old"), digests[0]);
    shell.ok("exec 6<&-");
    guest.unmount();
    assert!(!machine.log().contains("panicked"), "{}", machine.log());
}

#[test]
fn linux_reads_what_a_peer_has_and_goes_on_without_it() {
    let Some(network) = Network::new() else { return };
    let scratch = Scratch::new();
    let Some(guest) = Guest::boot(&network, &scratch) else { return };
    let tree = tree(&scratch, TreeSpec { files: 300, bytes: 3 << 20, big_bytes: 20_000_003 });
    fs::write(tree.join("last"), random_bytes(1_000_000, &mut Rng::with_seed(3))).unwrap();
    let far = Machine::up_in_with_config(&network, &scratch, "far", &[&tree], "");
    let near = Machine::up_in_with_config::<&Path>(&network, &scratch, "near", &[], &config());
    near.join(&far);
    near.hears(&far);
    guest.mount("/tree", OPTIONS);
    let export = tree.to_str().unwrap();
    guest.ok(&format!("diff -r --no-dereference -x last {export} {MOUNT}"));
    assert_eq!(on_host(&list(export)), guest.ok(&list(MOUNT)));

    far.kill9();
    guest.unmount();
    guest.mount("/tree", OPTIONS);
    guest.ok(&format!("diff -r --no-dereference -x last {export} {MOUNT}"));
    let failed = |limit: Duration| {
        let began = Instant::now();
        let failed = guest.run(&format!("cat {MOUNT}/last"));
        assert!(failed.code != 0 && failed.stderr.contains("Input/output error"), "{}", failed.stderr);
        assert!(began.elapsed() < limit, "{:?}", began.elapsed());
    };
    // It stalls, for all that is known; once that is known, it fails at once.
    failed(Duration::from_secs(30));
    wait_for("the peer to be gone", Duration::from_secs(60), || near.peer("far")?["connected"].is_null().then_some(()));
    wait_for("that to be known", Duration::from_secs(60), || near.peer("far")?["last_error"].is_string().then_some(()));
    failed(Duration::from_secs(5));
    assert_eq!(on_host(&list(export)), guest.ok(&list(MOUNT)));

    far.restart();
    wait_for("the last file to be read", Duration::from_secs(60), || {
        (guest.run(&format!("cmp {export}/last {MOUNT}/last")).code == 0).then_some(())
    });
    guest.unmount();
}
