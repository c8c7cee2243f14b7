//! What the real programs log: lines that programs can read, no secrets, and no floods.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use data_encoding::{BASE32_NOPAD, BASE64, BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER};
use peers::{Identity, Ticket, wire};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::{Machine, Output, Scratch, blob, blobd, connect, introduced, wait_for};

/// A daemon of which nothing but the log is asked for.
struct Daemon<'a> {
    machine: &'a Machine,
    log: PathBuf,
    child: Option<Child>,
}

impl<'a> Daemon<'a> {
    fn start(scratch: &Scratch, machine: &'a Machine, args: &[&str], variables: &[(&str, &str)]) -> Self {
        let log = scratch.path(&format!("{}.daemon.log", machine.name()));
        let mut command = Command::new(blobd());
        command.arg("--home").arg(machine.home()).args(["--listen", "127.0.0.1:0", "--name", machine.name()]);
        command.args(args).env_remove("BLOBD_LOG").envs(variables.iter().copied());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap()).spawn();
        let daemon = Self { machine, log, child: Some(child.unwrap()) };
        wait_for("blobd answers", LIMIT, || (machine.run(["status"]).code == 0).then_some(()));
        daemon
    }

    fn ticket(&self) -> String {
        self.machine.ok(["invite"]).text().trim().to_owned()
    }

    /// Stops it, and gives all that it logged.
    fn stop(mut self) -> String {
        let mut child = self.child.take().unwrap();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        assert!(child.wait().unwrap().success());
        fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The lines of a log, each of which must be such an object as is promised.
#[track_caller]
fn parsed(log: &str) -> Vec<Value> {
    let parse = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        let levels = ["error", "warn", "info", "debug", "trace"];
        assert!(levels.contains(&value["level"].as_str().unwrap_or_default()), "{line}");
        assert!(value["target"].is_string() && value["message"].is_string() && value["fields"].is_object(), "{line}");
        value["time"].as_str().and_then(|time| time.parse::<jiff::Timestamp>().ok()).expect(line);
        value
    };
    log.lines().map(parse).collect()
}

#[test]
fn json_is_all_that_a_daemon_says() {
    let scratch = Scratch::new();
    let docs = scratch.dir("docs");
    fs::write(docs.join("odd \"name\"\n=\u{1b}"), "hello").unwrap();
    let (a, b) = (Machine::cold(&scratch, "a"), Machine::cold(&scratch, "b"));
    let debug = [("BLOBD_LOG", "debug")];
    let on_a = Daemon::start(&scratch, &a, &["--log-format", "json"], &debug);
    let on_b = Daemon::start(&scratch, &b, &[], &[("BLOBD_LOG_FORMAT", "json"), debug[0]]);
    a.ok(["arena".as_ref(), "add".as_ref(), "docs".as_ref(), docs.as_os_str()]);
    b.ok(["join", &on_a.ticket()]);
    wait_for("b sees docs", LIMIT, || (b.run(["ls", "docs"]).code == 0).then_some(()));
    b.ok(["get".as_ref(), "docs".as_ref(), scratch.path("copy").as_os_str()]);
    b.exits(1, ["join", &on_b.ticket()]);
    let (b_said, a_said) = (parsed(&on_b.stop()), parsed(&on_a.stop()));
    for said in [&a_said, &b_said] {
        let at = |message: &str| said.iter().position(|line| line["message"] == message).expect(message);
        assert_eq!((at("started"), at("stopped")), (0, said.len() - 1));
        assert!(at("joined") < at("stopping") && at("connected") < at("disconnected"));
    }
    let of = |said: &[Value], message: &str| said.iter().find(|line| line["message"] == message).unwrap().clone();
    let (started, connected) = (of(&a_said, "started"), of(&a_said, "connected"));
    assert_eq!((&started["level"], &started["target"]), (&"info".into(), &"cli::node".into()));
    assert_eq!((&started["fields"]["name"], &connected["fields"]["peer"]), (&"a".into(), &"b".into()));
    assert_eq!(connected["fields"]["id"], b.id());
    let answered = of(&a_said, "answered");
    assert!(answered["level"] == "debug" && answered["fields"]["duration_ms"].is_u64(), "{answered}");

    // What ends a daemon is an event, too.
    fs::write(a.home().join("config.toml"), "listne = 1").unwrap();
    let mut command = Command::new(blobd());
    command.arg("--home").arg(a.home()).args(["--log-format", "json"]);
    let output = Output::of(command);
    let said = parsed(&output.stderr);
    assert_eq!((output.code, said.len(), &said[0]["level"]), (2, 1, &"error".into()));
    assert!(said[0]["fields"]["reason"].as_str().unwrap().contains("unknown field `listne`"), "{}", said[0]);
}

#[test]
fn the_journal_gets_priorities_and_people_get_times() {
    let scratch = Scratch::new();
    let a = Machine::cold(&scratch, "a");
    // Others may have the port of the mount, which is a warning.
    fs::write(a.home().join("config.toml"), "[nfs]\nlisten = \"none\"\n").unwrap();
    let log = Daemon::start(&scratch, &a, &["--log-format", "systemd"], &[]).stop();
    assert!(log.lines().count() >= 3 && log.lines().all(|line| line.starts_with("<6>")), "{log}");
    assert!(log.starts_with("<6>started ") && log.ends_with("<6>stopped\n"), "{log}");
    // Nobody but systemd knows the journal's inode; any other is not the journal.
    let log = Daemon::start(&scratch, &a, &[], &[("JOURNAL_STREAM", "1:2")]).stop();
    let time = |line: &str| line.split(' ').next().unwrap().parse::<jiff::Timestamp>().is_ok();
    assert!(log.lines().all(|line| time(line) && line.contains("  INFO ")), "{log}");
    let script = "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec \"$0\" --home \"$1\" --listen nonsense";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(blobd()).arg(a.home());
    let output = Output::of(command);
    assert!(output.code == 2 && output.stderr.starts_with("<3>ended by an error reason="), "{}", output.stderr);
}

#[test]
fn secrets_are_in_no_log() {
    let scratch = Scratch::new();
    let (a, b) = (Machine::cold(&scratch, "a"), Machine::cold(&scratch, "b"));
    let trace = [("BLOBD_LOG", "trace")];
    let on_a = Daemon::start(&scratch, &a, &[], &trace);
    let on_b = Daemon::start(&scratch, &b, &[], &trace);
    let (ticket, unused) = (on_a.ticket(), on_a.ticket());
    let mut said = String::new();
    // Once as it should be, once again, once damaged, and once at the one that made it.
    let damaged = format!("{}x", &unused[..unused.len() - 1]);
    for (machine, ticket, code) in [(&b, &ticket, 0), (&a, &unused, 1), (&b, &damaged, 2), (&b, &ticket, 0)] {
        let mut command = Command::new(blob());
        command.arg("--home").arg(machine.home()).args(["join", ticket]).env("BLOBD_LOG", "trace");
        let output = Output::of(command);
        assert_eq!(output.code, code, "{}", output.stderr);
        said += &output.stderr;
        said += &output.text();
    }
    said += &on_b.stop();
    said += &on_a.stop();
    assert!(said.contains("joined") && said.contains("answered") && said.contains(" DEBUG "), "{said}");
    assert!(!said.contains("quinn") && !said.contains("rustls") && !said.contains("Handshake"), "libraries are quiet");
    let said = said.to_lowercase();
    for ticket in [&ticket, &unused] {
        let secret = ticket.parse::<Ticket>().unwrap().secret;
        let listed = format!("{secret:?}");
        for text in [
            ticket["blob".len()..].to_owned(),
            HEXLOWER.encode(&secret),
            BASE32_NOPAD.encode(&secret),
            BASE64.encode(&secret),
            BASE64_NOPAD.encode(&secret),
            BASE64URL_NOPAD.encode(&secret),
            listed.trim_matches(['[', ']']).to_owned(),
            secret.escape_ascii().to_string(),
        ] {
            assert!(!said.contains(&text.to_lowercase()), "{text} is in a log");
        }
    }
}

#[tokio::test]
async fn a_flood_is_a_few_lines() {
    let scratch = Scratch::new();
    let a = Machine::cold(&scratch, "a");
    let on_a = Daemon::start(&scratch, &a, &["--log-format", "json"], &[("BLOBD_LOG_LIMIT", "3")]);
    let (stranger, address) = (Identity::load_or_create(&scratch.path("key")).unwrap(), a.address());
    for _ in 0..10 {
        // In TLS 1.3 the one who dials hears only later that it was refused.
        if let Ok(connection) = connect(&stranger, &a, &address, wire::ALPN).await {
            connection.closed().await;
        }
    }
    let said = parsed(&on_a.stop());
    let refused = said.iter().filter(|line| line["message"] == "refused: an unknown peer").collect::<Vec<_>>();
    let left_out = said.iter().filter(|line| line["message"] == "more like this were left out").collect::<Vec<_>>();
    assert_eq!((refused.len(), left_out.len()), (3, 1), "{said:#?}");
    assert_eq!(refused[0]["fields"]["peer"], stranger.peer().to_string());
    assert_eq!((&left_out[0]["level"], &left_out[0]["target"]), (&refused[0]["level"], &refused[0]["target"]));
    let fields = &left_out[0]["fields"];
    assert_eq!((&fields["what"], &fields["left_out"]), (&"refused: an unknown peer".into(), &7.into()));
}

/// Where one part of the program refuses, and another knows whom.
#[tokio::test]
async fn who_was_refused_is_named() {
    let scratch = Scratch::new();
    let a = Machine::cold(&scratch, "a");
    fs::write(a.home().join("config.toml"), "[nfs]\nlisten = \"none\"\n").unwrap();
    let on_a = Daemon::start(&scratch, &a, &["--log-format", "json"], &[("BLOBD_LOG", "warn")]);
    let mallory = Identity::load_or_create(&scratch.path("key")).unwrap();
    a.ok(["peer", "add", "mallory", &mallory.peer().to_string()]);
    let connection = introduced(&mallory, &a, &a.address()).await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&[wire::StreamKind::Get as u8, 0xff]).await.unwrap();
    send.finish().unwrap();
    assert!(recv.read_to_end(100).await.is_err(), "it is reset");
    let said = parsed(&on_a.stop());
    let fields = [&said[0]["message"], &said[0]["fields"]["peer"], &said[0]["level"]];
    assert_eq!(fields, ["refused: a request that is not for ranges of one blob", "mallory", "warn"]);
}

const LIMIT: Duration = Duration::from_secs(60);
