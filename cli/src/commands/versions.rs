use std::ffi::{OsStr, OsString};

use axum::http::Method;
use serde_json::Value;

use super::{daemon, full_path, print, style, text};
use crate::{
    args::Common,
    control::{List, Targets},
    event::Event,
    failure::{Code, Failure},
    home::Home,
    node::HistoryScope,
    output::{Style, printable, show},
    target::Target,
};

/// `blob stat`
pub(crate) async fn stat(home: &Home, common: &Common, target: &OsStr) -> Result<Code, Failure> {
    let stat = daemon(home)?.value(Method::POST, "/v1/stat", &Target::parse(target)?).await?;
    print(common, "entry", stat, |stat| {
        let mut lines = head(stat);
        if let Some(ranges) = stat["ranges_here"].as_array() {
            let shown = |range: &Value| format!("{}..{}", range[0], range[1]);
            let mut text = ranges.iter().take(RANGES_SHOWN).map(shown).collect::<Vec<_>>().join(" ");
            if ranges.len() > RANGES_SHOWN {
                text += &format!(" and {} more ranges", ranges.len() - RANGES_SHOWN);
            }
            lines.push(format!("bytes  {} of {} here: {text}", stat["bytes_here"], stat["size"]));
        }
        lines.extend(stat["pin"].as_str().map(|pin| format!("pinned {}", printable(pin.as_bytes()))));
        for version in stat["versions"].as_array().into_iter().flatten() {
            let (peer, state, mtime) = (text(version, "peer"), text(version, "state"), text(version, "mtime"));
            let blob =
                version["blob"].as_str().map_or(String::new(), |blob| format!("  {}", &blob[..12.min(blob.len())]));
            lines.push(format!("at     {peer}: {state}  {mtime}{blob}"));
        }
        if stat["conflict"].as_bool() == Some(true) {
            lines.push("these are in conflict: none comes from the other; read each with: blob cat --peer NAME".into());
        }
        lines.join("\n")
    })
}

/// `blob whereis`: of a file, or of each file in a directory or arena.
pub(crate) async fn whereis(home: &Home, common: &Common, target: &OsStr) -> Result<Code, Failure> {
    let (client, target) = (daemon(home)?, Target::parse(target)?);
    match client.value(Method::POST, "/v1/whereis", &target).await {
        // It is not a file.
        Err(failure) if failure.code == Code::Usage => {}
        found => return print(common, "whereis", found?, whereis_lines),
    }
    let list = List { target: Some(target.clone()), recursive: true, brief: true };
    let mut listed = client.events("/v1/list", &list).await?;
    let mut files = Vec::new();
    while let Some(event) = listed.next().await? {
        match event {
            Event::Entry(entry) if entry.kind == "file" => files.extend(entry.path.bytes()),
            Event::Error(failure) => return Err(failure),
            _ => {}
        }
    }
    for path in files {
        let file = Target { arena: target.arena.clone(), path: Some(path.try_into()?) };
        match client.value(Method::POST, "/v1/whereis", &file).await {
            // It went meanwhile.
            Err(failure) if failure.code == Code::NotFound => {}
            found => _ = print(common, "whereis", found?, whereis_line)?,
        }
    }
    Ok(Code::Ok)
}

/// All that is known of one file.
fn whereis_lines(found: &Value) -> String {
    let mut lines = head(found);
    let (here, size) = bytes_here(found);
    lines.push(format!("bytes  {here} of {size} here"));
    for file in found["files_here"].as_array().into_iter().flatten() {
        lines.push(format!("file   {}", full_path(file)));
    }
    for peer in found["holders"].as_array().into_iter().flatten() {
        let state = match (peer["connected"].as_bool(), peer["through"].as_str(), peer["last_connected"].as_str()) {
            (Some(true), ..) => "connected".to_owned(),
            (_, Some(through), _) => format!("through {through}"),
            (_, _, Some(time)) => format!("not connected since {time}"),
            _ => "not connected".to_owned(),
        };
        let elsewhere = if peer["same_path"].as_bool() == Some(true) { "" } else { ", at another path" };
        lines.push(format!("at     {}: {state}{elsewhere}", text(peer, "name")));
    }
    lines.join("\n")
}

/// One of many files.
fn whereis_line(found: &Value) -> String {
    let here = match bytes_here(found) {
        (here, size) if here == size => "here".to_owned(),
        (0, _) => "not here".to_owned(),
        (here, size) => format!("{here} of {size} bytes here"),
    };
    let holder = |peer: &Value| {
        let away = if peer["connected"].as_bool() == Some(true) { "" } else { " (not connected)" };
        format!("{}{away}", text(peer, "name"))
    };
    let holders: Vec<_> = found["holders"].as_array().into_iter().flatten().map(holder).collect();
    let at = if holders.is_empty() { String::new() } else { format!("; at {}", holders.join(", ")) };
    format!("{}  {here}{at}", full_path(found))
}

/// How many bytes of a file are here, and how many it has.
fn bytes_here(found: &Value) -> (u64, u64) {
    (found["bytes_here"].as_u64().unwrap_or(0), found["size"].as_u64().unwrap_or(0))
}

/// How many of the ranges that are here a terminal shows.
const RANGES_SHOWN: usize = 16;

/// What `stat` and `whereis` begin with.
fn head(entry: &Value) -> Vec<String> {
    let mut lines = vec![format!("path   {}", full_path(entry))];
    let mut add = |name, value: Option<&str>| lines.extend(value.map(|value| format!("{name:6} {value}")));
    add("kind", entry["kind"].as_str());
    add("size", entry["size"].as_u64().map(|size| size.to_string()).as_deref());
    add("mtime", entry["mtime"].as_str());
    add("blob", entry["blob"].as_str());
    add("link", entry["target"]["path"].as_str().map(|target| printable(target.as_bytes())).as_deref());
    add("here", entry["local"].as_str().map(|local| local.replace('_', " ")).as_deref());
    lines
}

/// `blob conflicts`
pub(crate) async fn conflicts(home: &Home, common: &Common, targets: &[OsString]) -> Result<Code, Failure> {
    let targets = targets.iter().map(|target| Target::parse(target)).collect::<Result<_, _>>()?;
    show(daemon(home)?.events("/v1/conflicts", &Targets { targets }).await?, style(common)).await
}

/// `blob history`
pub(crate) async fn history(home: &Home, common: &Common, scope: HistoryScope) -> Result<Code, Failure> {
    let style = Style { live: scope.follow, ..style(common) };
    show(daemon(home)?.events("/v1/history", &scope).await?, style).await
}
