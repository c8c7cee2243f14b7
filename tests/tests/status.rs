//! What `blob status` says while something is under way, and of the machines that are connected.

use std::{fs, process::Stdio, time::Duration};

use fastrand::Rng;
use serde_json::Value;
use tests::{Machine, Scratch, random_bytes, wait_for};

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn what_is_under_way() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    let mut rng = Rng::with_seed(1);
    for name in ["large", "larger"] {
        fs::write(docs.join(name), random_bytes(20 << 20, &mut rng)).unwrap();
    }
    let a = Machine::quick(&scratch, "a", &[&docs]);
    let b = Machine::quick::<&str>(&scratch, "b", &[]);
    b.join(&a);
    let status = b.status();
    assert_eq!(status["under_way"], Value::Array(vec![]));
    let peer = &status["peers"][0];
    let round_trip = peer["round_trip_ms"].as_f64().unwrap();
    assert!(round_trip > 0.0 && round_trip < 1000.0, "{peer}");
    assert!(peer["connected_s"].as_u64().unwrap() < 30 && peer["received_bytes"].as_u64().unwrap() > 500, "{peer}");

    b.ok(["limit", "--down", "2MiB"]);
    let to = scratch.path("copy");
    let mut getting = b.command(["get", "docs", to.to_str().unwrap()]);
    let mut getting = getting.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let command = wait_for("something has come", LIMIT, || {
        let command = b.status()["under_way"][0].clone();
        (command["bytes"].as_u64()? > 3 << 20).then_some(command)
    });
    assert_eq!(command["command"], format!("get docs {}", to.display()));
    assert_eq!(command["total_bytes"], 40 << 20, "{command}");
    let rate = command["bytes_per_s"].as_u64().unwrap();
    assert!((500_000..6_000_000).contains(&rate), "{command}");
    let left = command["seconds_left"].as_u64().unwrap();
    assert!((5..80).contains(&left), "{command}");
    let text = b.ok(["status"]).text();
    let line =
        text.lines().find(|line| line.starts_with("under way     get docs ")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains(" of 40.00 MiB, ") && line.ends_with(" left"), "{line}");
    assert!(text.contains("ms away") && text.contains("mount         127.0.0.1:"), "{text}");

    // Whoever asked for it is gone, and so is it.
    getting.kill().unwrap();
    getting.wait().unwrap();
    wait_for("it to be over", LIMIT, || (b.status()["under_way"] == Value::Array(vec![])).then_some(()));

    // What is pinned comes by itself, at a rate that is told.
    b.ok(["pin", "docs", "--no-wait"]);
    wait_for("what is pinned is coming", LIMIT, || {
        let pins = b.status()["pins"].clone();
        (pins["missing_bytes"].as_u64()? > 0 && pins["bytes_per_s"].as_u64()? > 500_000).then_some(())
    });
    b.ok(["limit", "--down", "none"]);
    b.ok(["pin", "docs"]);
    b.ok(["verify"]);
    wait_for("it is known when what was verified", LIMIT, || {
        let scrub = b.status()["scrub"].clone();
        (scrub["last"].as_u64()? > 0 && scrub["next"].as_u64()? > scrub["last"].as_u64()?).then_some(())
    });
    let text = b.ok(["status"]).text();
    assert!(text.contains("; last 20") && text.contains("; next 20"), "{text}");
    println!("{text}");
}

/// An arena is not up to date as long as something that changed in it is not published; `--check` has no complaint of that.
#[test]
fn what_changed_and_is_not_published_yet() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    fs::write(docs.join("old"), "old").unwrap();
    let a = Machine::up_with_config(&scratch, "a", &[&docs], "[watch]\nsettle = \"2s\"\n");
    let state = || a.status()["arenas"][0]["status"]["state"].as_str().unwrap().to_owned();
    wait_for("it is up to date", LIMIT, || (state() == "up to date").then_some(()));
    fs::write(docs.join("new"), "new").unwrap();
    wait_for("the change is heard of", LIMIT, || (state() == "catching up").then_some(()));
    assert!(!a.ok(["ls", "docs"]).text().contains("docs/new"));
    a.ok(["status", "--check"]);
    wait_for("it is taken in", LIMIT, || (state() == "up to date").then_some(()));
    assert!(a.ok(["ls", "docs"]).text().contains("docs/new"));
}
