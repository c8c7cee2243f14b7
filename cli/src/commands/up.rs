use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use namespace::ArenaName;
use peers::Role;
use serde_json::json;

use super::{in_words, mount_command, style};
use crate::{
    args::{Common, DaemonArgs},
    client::Client,
    config::Config,
    control::{self, AddArena},
    daemon::Daemon,
    failure::{Code, Failure, WhileDoing},
    home::Home,
    node::NodeOptions,
    output::{WRITING, show},
    target::JsonPath,
};

/// `blobd`
pub(crate) async fn serve(home: &Home, args: DaemonArgs) -> Result<Code, Failure> {
    let daemon = start(home, args).await?;
    let over = daemon.over().await;
    daemon.stop().await;
    over.map(|()| Code::Ok)
}

/// `blob up`
pub(crate) async fn up(home: &Home, common: &Common, dirs: &[PathBuf], args: DaemonArgs) -> Result<Code, Failure> {
    let daemon = start(home, args).await?;
    let outcome = {
        // One listens all the time: a signal between two that listen is lost.
        let mut over = std::pin::pin!(daemon.over());
        tokio::select! {
            outcome = set_up(&daemon, common, dirs) => match outcome {
                Ok(()) => over.as_mut().await,
                Err(failure) => Err(failure),
            },
            over = over.as_mut() => over,
        }
    };
    daemon.stop().await;
    outcome.map(|()| Code::Ok)
}

async fn start(home: &Home, args: DaemonArgs) -> Result<Daemon, Failure> {
    home.create()?;
    Config::write_template(&home.config)?;
    Daemon::start(home, &NodeOptions { name: args.name, listen: args.listen, deaf: false }).await
}

/// Takes in the directories, brings all arenas up to date, and says how to go on.
async fn set_up(daemon: &Daemon, common: &Common, dirs: &[PathBuf]) -> Result<(), Failure> {
    let node = &daemon.node;
    let client = Client::Local(control::router(node.clone()));
    let before = held(daemon)?;
    for dir in dirs {
        let dir = dir.canonicalize().while_doing(format!("find {dir:?}"))?;
        if !before.iter().any(|(_, held)| *held == dir) {
            let name = arena_name(&dir)?;
            let body = AddArena { name, dir: Some(JsonPath::from(dir.as_os_str().as_encoded_bytes())), public: false };
            show(client.events("/v1/arenas", &body).await?, style(common)).await?;
        }
    }
    let peers = node.peers();
    let ticket = match peers.addresses().is_empty() {
        true => None,
        false => Some(peers.invite(TICKET_LIFETIME, Role::Reader)?.to_string()),
    };
    let arenas = held(daemon)?;
    let mut out = io::stdout().lock();
    if common.json {
        let arenas: Vec<_> =
            arenas.iter().map(|(name, dir)| json!({ "name": name, "dir": dir.to_string_lossy() })).collect();
        let ready = json!({
            "type": "ready", "peer": peers.me().to_string(), "name": node.name(),
            "listens_on": peers.listens_on(), "listeners": peers.listeners(), "not_listening": peers.not_listening(),
            "arenas": arenas, "ticket": ticket, "nfs": node.mount_address(),
        });
        writeln!(out, "{ready}").while_doing(WRITING)?;
        return Ok(());
    }
    writeln!(out, "this machine  {}  {}", node.name(), peers.me()).while_doing(WRITING)?;
    match peers.listeners().as_slice() {
        [] => writeln!(out, "listens on    nothing; it dials others"),
        listeners => listeners.iter().try_for_each(|address| writeln!(out, "listens on    {address}")),
    }
    .while_doing(WRITING)?;
    for problem in peers.not_listening() {
        writeln!(out, "not on        {problem}").while_doing(WRITING)?;
    }
    for (name, dir) in arenas {
        writeln!(out, "arena         {name}  {}", dir.display()).while_doing(WRITING)?;
    }
    if let Some(ticket) = ticket {
        writeln!(out, "\nOn another machine, within the hour:\n\n    blob up\n    blob join {ticket}\n")
            .while_doing(WRITING)?;
    }
    if let Some(address) = node.mount_address() {
        writeln!(out, "Everything as a folder:\n\n    sudo {}\n", in_words(&mount_command(address, Path::new("DIR"))))
            .while_doing(WRITING)?;
    }
    writeln!(out, "Ready. Ctrl-C stops the daemon.").while_doing(WRITING)?;
    Ok(())
}

/// The arenas that this machine holds, and where.
fn held(daemon: &Daemon) -> Result<Vec<(ArenaName, PathBuf)>, Failure> {
    let arenas = daemon.node.namespace().arenas()?.into_iter();
    Ok(arenas.filter_map(|arena| Some((arena.name, arena.dir?))).collect())
}

/// What the arena at `dir` is called: the last component of its path.
fn arena_name(dir: &Path) -> Result<String, Failure> {
    let name = dir.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    name.ok_or_else(|| {
        Failure::new(Code::Usage, format!("{dir:?} has no name that an arena can have"))
            .hint("name it yourself: blob arena add NAME DIR")
    })
}

const TICKET_LIFETIME: Duration = Duration::from_secs(3600);
