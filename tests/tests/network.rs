//! How machines find each other, as a user sees it: where they listen, what dialling comes to, and that a network which
//! changes has them dial at once.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde_json::json;
use tests::{Machine, Network, Scratch, wait_for};

#[test]
fn several_addresses_from_the_configuration() {
    let scratch = Scratch::new();
    let config = "listen = [\"127.0.0.1:0\", \"[::1]:0\", \"192.0.2.1:7700\"]";
    let a = Machine::up_where_configured(&scratch, "a", config);
    let status = a.status();
    let listeners: Vec<_> = status["listeners"].as_array().unwrap().iter().map(|at| at.as_str().unwrap()).collect();
    assert!(listeners[0].starts_with("127.0.0.1:") && listeners[1].starts_with("[::1]:"), "{listeners:?}");
    assert_eq!((listeners.len(), &status["listens_on"]), (2, &json!(listeners[0])));
    let problem = "192.0.2.1:7700: no interface of this machine has that address";
    assert_eq!(status["not_listening"], json!([problem]));
    let text = a.ok(["status"]).text();
    assert!(
        text.contains(&format!("listens on    {}\n", listeners[1]))
            && text.contains(&format!("not on        {problem}"))
    );
    assert!(a.log().contains(&format!("cannot listen on {problem}")), "{}", a.log());
    for address in listeners {
        let b = Machine::up::<&Path>(&scratch, &format!("b{}", address.len()), &[]);
        a.ok(["peer", "add", b.name(), &b.id()]);
        b.ok(["peer", "add", "a", &a.id(), "--address", address]);
        b.hears(&a);
        assert_eq!(b.peer("a").unwrap()["connected"], address);
    }
    let c = Machine::cold(&scratch, "c");
    let output = c.exits(1, ["up", "--listen", a.status()["listens_on"].as_str().unwrap()]);
    let said = format!("error: listen on {}: address in use\n", status["listens_on"].as_str().unwrap());
    assert!(output.stderr.contains(&said), "{}", output.stderr);
    let output = c.exits(2, ["up", "--listen", "none", "--listen", "127.0.0.1:0"]);
    assert!(output.stderr.contains("error: \"none\" is not an address to listen on"), "{}", output.stderr);
}

#[test]
fn dialling_by_hand() {
    let scratch = Scratch::new();
    let a = Machine::up::<&Path>(&scratch, "a", &[]);
    let b = Machine::up::<&Path>(&scratch, "b", &[]);
    assert_eq!(b.ok(["peer", "dial"]).text(), "");
    let unknown = b.exits(7, ["peer", "dial", "nobody"]);
    assert_eq!(unknown.stderr, "error: no peer is called nobody\n");
    b.ok(["peer", "add", "a", &a.id(), "--address", &a.address()]);
    // It does not know b, and says so.
    let refused = format!("{}: refused: this machine is not on its roster", a.address());
    let line = b.exits(6, ["peer", "dial", "--json"]).of_type("peer").remove(0);
    assert_eq!(
        (&line["last_error"], &line["refused"], &line["connected"]),
        (&json!(refused), &json!(true), &json!(null))
    );
    let text = b.ok(["status"]).text();
    assert!(text.contains(&format!("not connected: {refused}; dialled again in ")), "{text}");
    assert!(text.contains(" min, or with: blob peer dial"), "{text}");
    a.ok(["peer", "add", "b", &b.id()]);
    let line = b.ok(["peer", "dial", "a"]).text();
    assert!(line.contains(&format!("  connected from {} for ", a.address())) && line.ends_with(" ms away\n"), "{line}");
    // One of two.
    let id = Machine::cold(&scratch, "c").id();
    b.ok(["peer", "add", "c", &id]);
    let lines = b.exits(3, ["peer", "dial", "--json"]).of_type("peer");
    let of = |name: &str| lines.iter().find(|line| line["name"] == name).unwrap();
    assert_eq!(of("a")["connected"], a.address());
    assert_eq!(of("c")["last_error"], "no address of it is known: it must dial this machine");
    a.stop();
    let gone = b.exits(6, ["peer", "dial", "a", "--json"]).of_type("peer").remove(0);
    assert!(gone["last_error"].as_str().unwrap().ends_with(": no answer within 5 s"), "{gone}");
}

#[test]
fn when_the_network_changes_all_are_dialled() {
    let Some(network) = Network::new() else { return };
    let scratch = Scratch::new();
    let a = Machine::up_in(&network, &scratch, "a");
    let b = Machine::up_in(&network, &scratch, "b");
    let port = a.address().rsplit_once(':').unwrap().1.to_owned();
    b.ok(["peer", "add", "a", &a.id(), "--address", &format!("127.0.0.1:{port}")]);
    // It is refused; the next dial is far away.
    wait_for("b waits", Duration::from_secs(30), || {
        b.peer("a").filter(|peer| peer["next_dial_s"].as_u64() >= Some(100))
    });
    a.ok(["peer", "add", "b", &b.id()]);
    network.run("ip addr add 10.77.0.1/32 dev lo");
    let since = Instant::now();
    b.hears(&a);
    assert!(since.elapsed() < Duration::from_secs(7), "{:?}", since.elapsed());
    let told = b.status()["addresses"].clone();
    assert!(told.as_array().unwrap().iter().any(|at| at.as_str().unwrap().starts_with("10.77.0.1:")), "{told}");
}

#[test]
fn one_socket_takes_in_both_families_whatever_the_system_says() {
    for setting in ["net/ipv6/bindv6only", "net/ipv6/conf/all/disable_ipv6"] {
        let Some(network) = Network::new() else { return };
        network.run(&format!("echo 1 >/proc/sys/{setting}"));
        let scratch = Scratch::new();
        let a = Machine::up_in(&network, &scratch, "a");
        let b = Machine::up_in(&network, &scratch, "b");
        a.ok(["peer", "add", "b", &b.id()]);
        let port = a.address().rsplit_once(':').unwrap().1.to_owned();
        b.ok(["peer", "add", "a", &a.id(), "--address", &format!("127.0.0.1:{port}")]);
        b.hears(&a);
    }
}
