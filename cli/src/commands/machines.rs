use axum::http::Method;
use indicatif::HumanBytes;
use peers::{Identity, Role};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{arenas::encoded, daemon, full_path, print, text};
use crate::{
    args::{Common, PeerCommand},
    config::{Config, parse_duration},
    control::{AddPeer, Dial, Invite, Join},
    event::DeletedMany,
    failure::{Code, Failure},
    home::Home,
    node::LimitChange,
    output::{mass_line, printable},
};

/// `blob init`
pub(crate) fn init(home: &Home, common: &Common) -> Result<Code, Failure> {
    home.create()?;
    Config::write_template(&home.config)?;
    Config::load(&home.config)?;
    id(home, common)
}

/// `blob id`
pub(crate) fn id(home: &Home, common: &Common) -> Result<Code, Failure> {
    home.create()?;
    let peer = Identity::load_or_create(&home.key())?.peer().to_string();
    print(common, "id", json!({ "peer": peer }), |value| text(value, "peer").to_owned())
}

/// `blob invite`
pub(crate) async fn invite(home: &Home, common: &Common, expires: &str, role: Role) -> Result<Code, Failure> {
    let lifetime_s = parse_duration(expires).map_or(0, |lifetime| lifetime.as_secs());
    if lifetime_s == 0 {
        return Err(Failure::new(Code::Usage, format!("a ticket cannot expire in {expires:?}"))
            .hint("name a time such as 10m, 1h or 2d"));
    }
    let ticket = daemon(home)?.value(Method::POST, "/v1/invite", &Invite { lifetime_s, role }).await?;
    print(common, "ticket", ticket, |value| text(value, "ticket").to_owned())
}

/// `blob join`
pub(crate) async fn join(home: &Home, common: &Common, ticket: String) -> Result<Code, Failure> {
    let peer = daemon(home)?.value(Method::POST, "/v1/join", &Join { ticket }).await?;
    print(common, "joined", peer, |peer| {
        let joined = format!("joined {}  {}", text(peer, "name"), text(peer, "id"));
        match peer["catalog_complete"].as_bool() {
            Some(true) => joined,
            _ => format!("{joined}\nwhat it has is still coming in; see blob status"),
        }
    })
}

/// `blob peer`
pub(crate) async fn peer(home: &Home, common: &Common, command: PeerCommand) -> Result<Code, Failure> {
    let client = daemon(home)?;
    match command {
        PeerCommand::Add { name, id, addresses } => {
            let body = AddPeer { name, id, addresses };
            client.value(Method::POST, "/v1/peers", &body).await?;
            print(common, "added", json!({ "name": body.name }), |_| String::new())
        }
        PeerCommand::Ls => {
            let peers = client.value(Method::GET, "/v1/peers", &()).await?;
            for peer in peers.as_array().into_iter().flatten() {
                print(common, "peer", peer.clone(), peer_line)?;
            }
            Ok(Code::Ok)
        }
        PeerCommand::Dial { names } => {
            let peers = client.value(Method::POST, "/v1/dial", &Dial { names }).await?;
            let peers: Vec<&Value> = peers.as_array().into_iter().flatten().collect();
            for &peer in &peers {
                print(common, "peer", peer.clone(), peer_line)?;
            }
            let connected = peers.iter().filter(|peer| peer["connected"].is_string()).count();
            Ok(match connected {
                all if all == peers.len() => Code::Ok,
                0 => Code::Unreachable,
                _ => Code::Some,
            })
        }
        PeerCommand::Rm { name } => {
            client.value(Method::DELETE, &format!("/v1/peers/{}", encoded(&name)), &()).await?;
            print(common, "removed", json!({ "name": name }), |_| String::new())
        }
    }
}

/// `blob limit`
pub(crate) async fn limit(home: &Home, common: &Common, change: LimitChange) -> Result<Code, Failure> {
    let client = daemon(home)?;
    let limits = match change {
        LimitChange { peer: None, up: None, down: None } => client.value(Method::GET, "/v1/limits", &()).await?,
        change => client.value(Method::POST, "/v1/limits", &change).await?,
    };
    for limit in limits.as_array().into_iter().flatten() {
        print(common, "limit", limit.clone(), |limit| {
            let rate =
                |field: &str| limit[field].as_u64().map_or("none".to_owned(), |rate| format!("{}/s", HumanBytes(rate)));
            format!("{}  up {}  down {}", limit["peer"].as_str().unwrap_or("all"), rate("up"), rate("down"))
        })?;
    }
    Ok(Code::Ok)
}

/// `blob status`
pub(crate) async fn status(home: &Home, common: &Common, skipped: bool, check: bool) -> Result<Code, Failure> {
    if skipped {
        let skipped = daemon(home)?.value(Method::GET, "/v1/skipped", &()).await?;
        for line in skipped.as_array().into_iter().flatten() {
            print(common, "skipped", line.clone(), |line| format!("{}: {}", full_path(line), text(line, "reason")))?;
        }
        return Ok(Code::Ok);
    }
    let status = daemon(home)?.value(Method::GET, "/v1/status", &()).await?;
    let code = if check { health(&status) } else { Code::Ok };
    print(common, "status", status, |status| {
        let mut lines = vec![format!("this machine  {}  {}", text(status, "name"), text(status, "peer"))];
        lines.push(format!("version       {}", text(status, "version")));
        let aside = status["put_aside"].as_array().into_iter().flatten().filter_map(Value::as_str);
        lines.extend(aside.map(|dir| {
            let dir = printable(dir.as_bytes());
            format!("database      was damaged, and was made anew; what it was before is in {dir}: delete it if nothing is missed")
        }));
        if let Some(full) = status["home_full"].as_str() {
            let waits = if status["waits_for_room"] == true { "; a commit waits for free space" } else { "" };
            lines.push(format!("home          {full}{waits}; make room: blob cache trim, or delete files there"));
        }
        if status["twin"] == true {
            lines.push(format!("  twin        another machine runs with this one's key: {TWIN_REMEDY}"));
        }
        let texts = |field: &str| status[field].as_array().into_iter().flatten().filter_map(Value::as_str);
        lines.extend(texts("listeners").map(|address| format!("listens on    {address}")));
        if texts("listeners").next().is_none() {
            lines.push("listens on    nothing".to_owned());
        }
        lines.extend(texts("not_listening").map(|problem| format!("not on        {problem}")));
        for arena in status["arenas"].as_array().into_iter().flatten() {
            lines.push(format!("arena         {}", arena_line(arena)));
            lines.extend(offline_lines(arena).map(|line| format!("  offline     {line}")));
        }
        for peer in status["peers"].as_array().into_iter().flatten() {
            lines.push(format!("peer          {}", peer_line(peer)));
            if peer["twins"] == true {
                lines.push(format!("  twins       two machines run with its key: {TWIN_REMEDY}"));
            }
        }
        let answers = |name| HumanBytes(status["answers"][name].as_u64().unwrap_or_default());
        let (received, wasted) = (answers("received_bytes"), answers("wasted_bytes"));
        lines.push(format!("received      {received} from other machines since the start, {wasted} of it wasted"));
        lines.extend(status["under_way"].as_array().into_iter().flatten().map(command_line));
        lines.push(scrub_line(&status["scrub"]));
        lines.push(match status["nfs"].as_str() {
            Some(address) => format!("mount         {address}; to mount it: blob mount DIR"),
            None => "mount         none".to_owned(),
        });
        let cache = |name| HumanBytes(status["cache"][name].as_u64().unwrap_or_default());
        lines.push(format!(
            "cache         {} of {}, {} pinned; {} free on its disk",
            cache("bytes"),
            cache("limit"),
            cache("pinned"),
            cache("free")
        ));
        lines.extend(pins_line(&status["pins"]));
        let masses = status["pins"]["mass_deletions"].as_array().into_iter().flatten();
        lines
            .extend(masses.filter_map(|mass| {
                Some(format!("  deleted     {}", mass_line(&DeletedMany::deserialize(mass).ok()?)))
            }));
        lines.join("\n")
    })?;
    Ok(code)
}

/// The exit code of `blob status --check`: damage, something else that needs attention, or all well.
fn health(status: &Value) -> Code {
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let (scrub, pins) = (&status["scrub"], &status["pins"]);
    if count(&scrub["damaged_files"]) + count(&scrub["suspect_files"]) > 0 {
        return Code::Damage;
    }
    let is_some = |field: &str| status[field].as_array().is_some_and(|all| !all.is_empty());
    let arenas = status["arenas"].as_array().into_iter().flatten().map(|arena| &arena["status"]);
    let is_current = |state: &Value| state == "up to date" || state == "catching up";
    let is_well = |arena: &Value| arena.is_null() || is_current(&arena["state"]) && count(&arena["skipped"]) == 0;
    let masses = pins["mass_deletions"].as_array().is_some_and(|masses| !masses.is_empty());
    let needs_a_look = status["twin"] == true
        || !status["home_full"].is_null()
        || is_some("put_aside")
        || is_some("not_listening")
        || !arenas.into_iter().all(is_well)
        || count(&pins["missing_files"]) > 0
        || masses;
    if needs_a_look { Code::Some } else { Code::Ok }
}

const TWIN_REMEDY: &str = "a home was cloned; stop one, delete its key and database, and have it join anew";

pub(super) fn arena_line(arena: &Value) -> String {
    let (name, status) = (text(arena, "name"), &arena["status"]);
    let Some(dir) = arena["dir"].as_str() else { return format!("{name}  (followed only)") };
    let mut line = format!("{name}  {dir}  {}", text(status, "state"));
    if status["state"] == "indexing" {
        let count = |field: &str| status[field].as_u64().unwrap_or(0);
        line += &match (count("files_read"), count("files_to_read"), count("files_so_far")) {
            (_, 0, files) => format!(", {files} files so far"),
            (read, of, _) => format!(" {read} of {of} files"),
        };
    }
    if let Some(reason) = status["reason"].as_str() {
        line += &format!(": {reason}");
    }
    match status["skipped"].as_u64() {
        None | Some(0) => line,
        Some(skipped) => format!("{line}; {skipped} skipped, see blob status --skipped"),
    }
}

/// Formats milliseconds with two significant digits or more.
fn shortly(millis: f64) -> String {
    if millis < 10.0 { format!("{millis:.1}") } else { format!("{millis:.0}") }
}

/// The parts of an arena that are offline, and what to type if they are gone for good.
fn offline_lines(arena: &Value) -> impl Iterator<Item = String> {
    let parts = arena["status"]["offline_parts"].as_array().into_iter().flatten();
    let lines = parts.map(|part| {
        format!("{}/{}: {}", text(arena, "name"), printable(text(part, "path").as_bytes()), text(part, "reason"))
    });
    let hint = format!("if that is so for good: blob arena scan --accept {}", text(arena, "name"));
    let mut lines: Vec<_> = lines.collect();
    lines.extend((!lines.is_empty()).then_some(hint));
    lines.into_iter()
}

/// What is pinned, if anything is.
fn pins_line(pins: &Value) -> Option<String> {
    let count = |field: &str| pins[field].as_u64().unwrap_or(0);
    let missing = match count("missing_files") {
        0 => "all here".to_owned(),
        files => {
            let reasons: Vec<_> = pins["reasons"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let reasons = printable(reasons.join("; ").as_bytes());
            let rate = match count("bytes_per_s") {
                0 => String::new(),
                rate => format!(", {}/s, {} left", HumanBytes(rate), span(count("missing_bytes").div_ceil(rate))),
            };
            format!("{files} files, {} not here yet{rate}: {reasons}", HumanBytes(count("missing_bytes")))
        }
    };
    let kept = match count("kept_files") {
        0 => String::new(),
        files => format!("; kept after deletion: {files} files, {}", HumanBytes(count("kept_bytes"))),
    };
    (count("count") > 0).then(|| format!("pins          {}, {missing}{kept}", count("count")))
}

/// Formats a running command with its progress.
fn command_line(command: &Value) -> String {
    let count = |field: &str| command[field].as_u64();
    let bytes = HumanBytes(count("bytes").unwrap_or(0));
    let of = count("total_bytes").map_or_else(String::new, |total| format!(" of {}", HumanBytes(total)));
    let left = count("seconds_left").map_or_else(String::new, |left| format!(", {} left", span(left)));
    let rate = HumanBytes(count("bytes_per_s").unwrap_or(0));
    let files = match count("files").unwrap_or(0) {
        0 => String::new(),
        files => format!("{files} files, "),
    };
    format!("under way     {}: {files}{bytes}{of}, {rate}/s{left}", printable(text(command, "command").as_bytes()))
}

/// Formats a duration in the largest unit of which there are two or more.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn scrub_line(scrub: &Value) -> String {
    // Seconds are precise enough for people.
    let time = |field: &str| Some(jiff::Timestamp::from_second(scrub[field].as_i64()? / 1000).ok()?.to_string());
    let since = time("all_since").map_or("not everything here has been verified yet".to_owned(), |since| {
        format!("everything here was verified since {since}")
    });
    let last = time("last").map_or_else(String::new, |last| format!("; last {last}"));
    let next = match (scrub["due_bytes"].as_u64(), time("next")) {
        (None | Some(0), Some(next)) => format!("; next {next}"),
        (Some(due), Some(_)) => format!("; {} are due", HumanBytes(due)),
        (_, None) => String::new(),
    };
    let since = format!("{since}{last}{next}");
    let count = |name: &str| scrub[name].as_u64().unwrap_or_default();
    let mut found = match (count("damaged_files"), count("found_files"), count("repaired_files")) {
        (0, 0, _) => String::new(),
        (now, found, repaired) => {
            format!("; damaged now: {now} files, found since the start: {found}, mended: {repaired}")
        }
    };
    if count("suspect_files") > 0 {
        found += &format!("; suspect: {} files, listed by: blob verify", count("suspect_files"));
    }
    format!("scrub         {since}{found}")
}

fn peer_line(peer: &Value) -> String {
    let mut state = match (peer["connected"].as_str(), peer["last_connected"].as_str()) {
        (Some(address), _) => {
            let (age, away) = (peer["connected_s"].as_u64(), peer["round_trip_ms"].as_f64());
            let age = age.map_or_else(String::new, |age| format!(" for {}", span(age)));
            let away = away.map_or_else(String::new, |away| format!(", {} ms away", shortly(away)));
            let [sent, lost] = ["sent_packets", "lost_packets"].map(|field| peer[field].as_f64().unwrap_or(0.0));
            let share = if sent > 0.0 { lost / sent * 100.0 } else { 0.0 };
            let loss = if share >= 0.1 { format!(", {share:.1} % of packets lost") } else { String::new() };
            format!("connected from {address}{age}{away}{loss}")
        }
        (None, Some(time)) => {
            let why = peer["last_ended"].as_str().map_or_else(String::new, |why| format!(" ({why})"));
            format!("not connected since {time}{why}")
        }
        (None, None) => "not connected".to_owned(),
    };
    if let Some(error) = peer["last_error"].as_str() {
        state += &format!(": {error}");
        let next = match peer["next_dial_s"].as_u64() {
            None => String::new(),
            Some(0) => "now".to_owned(),
            Some(seconds) => format!("in {}", span(seconds)),
        };
        // Somebody else has to do something first, so it is not tried often.
        let until = if peer["refused"] == true { ", or with: blob peer dial" } else { "" };
        if !next.is_empty() {
            state += &format!("; dialled again {next}{until}");
        }
    }
    let arenas: Vec<&str> = peer["writer"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let role = match arenas[..] {
        [] => "reader".to_owned(),
        _ if arenas.contains(&"*") => "writer".to_owned(),
        _ => format!("writer of {}", printable(arenas.join(", ").as_bytes())),
    };
    format!("{}  {}  {role}  {state}", text(peer, "name"), text(peer, "id"))
}
