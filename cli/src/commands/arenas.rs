use axum::http::Method;
use serde_json::{Value, json};

use super::{daemon, print, style, text};
use crate::{
    args::{ArenaCommand, Common},
    control::AddArena,
    failure::{Code, Failure, WhileDoing},
    home::Home,
    output::show,
    target::JsonPath,
};

/// `blob arena`
pub(crate) async fn arena(home: &Home, common: &Common, command: ArenaCommand) -> Result<Code, Failure> {
    let client = daemon(home)?;
    match command {
        ArenaCommand::Add { name, dir, public } => {
            let dir = match dir {
                Some(dir) => {
                    let found = dir.canonicalize().while_doing(format!("find {dir:?}"));
                    Some(found.while_doing(format!("add the arena {name}"))?)
                }
                None => None,
            };
            let dir = dir.map(|dir| JsonPath::from(dir.as_os_str().as_encoded_bytes()));
            show(client.events("/v1/arenas", &AddArena { name, dir, public }).await?, style(common)).await
        }
        ArenaCommand::Ls => {
            let arenas = client.value(Method::GET, "/v1/arenas", &()).await?;
            for arena in arenas.as_array().into_iter().flatten() {
                print(common, "arena", arena.clone(), line)?;
            }
            Ok(Code::Ok)
        }
        ArenaCommand::Rm { name } => {
            client.value(Method::DELETE, &format!("/v1/arenas/{}", encoded(&name)), &()).await?;
            print(common, "removed", json!({ "name": name }), |_| String::new())
        }
        ArenaCommand::Scan { accept, names } => {
            let mut names = names;
            if names.is_empty() {
                let arenas = client.value(Method::GET, "/v1/arenas", &()).await?;
                let held = arenas.as_array().into_iter().flatten().filter(|arena| !arena["dir"].is_null());
                names = held.map(|arena| text(arena, "name").to_owned()).collect();
            }
            let mut code = Code::Ok;
            for name in names {
                let call = if accept { "accept" } else { "scan" };
                let path = format!("/v1/arenas/{}/{call}", encoded(&name));
                let this = show(client.events(&path, &()).await?, style(common)).await?;
                code = if this == Code::Ok { code } else { this };
            }
            Ok(code)
        }
    }
}

fn line(arena: &Value) -> String {
    let dir = arena["dir"].as_str().unwrap_or("(followed only)");
    let public = if arena["public"].as_bool() == Some(true) { "  public" } else { "" };
    format!("{}  {dir}{public}", text(arena, "name"))
}

/// A name as one segment of a URL's path (RFC 3986).
pub(super) fn encoded(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    name.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
