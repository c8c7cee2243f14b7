//! The control API: HTTP and JSON on the daemon's Unix socket. Format: spec/cli.md, "Control API".

mod keep;
mod report;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::PathBuf,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Request, State, rejection::JsonRejection},
    middleware::{self, Next},
    response::Response,
    routing::{delete, get, post},
};
use blobstore::Consent;
use futures_util::stream;
use namespace::Arena;
use peers::{Peer, PeerStatus, Role, Roles, RosterError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tracing::debug;
use tree::{BlobId, ByteRange, UnixTime};

use crate::{
    event::{Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    node::{CopyScope, HistoryScope, LimitChange, Node, ScanTotals, Scope, in_words, rfc3339},
    target::{BlobPrefix, JsonPath, Target},
};

use self::report::{report, report_under_way, with_type};

/// The API over an open home.
pub(crate) fn router(node: Node) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/arenas", get(arenas).post(add_arena))
        .route("/v1/arenas/{name}", delete(remove_arena))
        .route("/v1/arenas/{name}/scan", post(scan))
        .route("/v1/arenas/{name}/accept", post(accept_file_systems))
        .route("/v1/invite", post(invite))
        .route("/v1/join", post(join))
        .route("/v1/peers", get(peers).post(add_peer))
        .route("/v1/peers/{name}", delete(remove_peer))
        .route("/v1/dial", post(dial))
        .route("/v1/limits", get(limits).post(change_limits))
        .route("/v1/list", post(list))
        .route("/v1/stat", post(stat))
        .route("/v1/whereis", post(whereis))
        .route("/v1/conflicts", post(conflicts))
        .route("/v1/history", post(history))
        .route("/v1/skipped", get(skipped))
        .route("/v1/blob", post(find_blob))
        .route("/v1/read", post(read))
        .route("/v1/get", post(get_trees))
        .route("/v1/copy", post(copy))
        .route("/v1/verify", post(verify))
        .route("/v1/repair", post(repair))
        .route("/v1/accept", post(accept))
        .merge(keep::routes())
        .fallback(async || Failure::new(Code::NotFound, "no such call"))
        .layer(middleware::from_fn(logged))
        .with_state(node)
}

/// `POST /v1/arenas`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct AddArena {
    /// The arena's name.
    pub name: String,
    /// Its directory, absolute; none to follow it only.
    pub dir: Option<JsonPath>,
    /// Whether strangers may read its blobs.
    #[serde(default)]
    pub public: bool,
}

/// `POST /v1/invite`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Invite {
    /// For how long the ticket works.
    pub lifetime_s: u64,
    /// What who joins with it may do here.
    #[serde(default)]
    pub role: Role,
}

/// `POST /v1/join`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Join {
    /// The ticket.
    pub ticket: String,
}

/// `POST /v1/peers`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct AddPeer {
    /// What it is to be called.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Where to dial it.
    #[serde(default)]
    pub addresses: Vec<String>,
}

/// `POST /v1/dial`
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Dial {
    /// What they are called; none for all.
    #[serde(default)]
    pub names: Vec<String>,
}

/// `POST /v1/list`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct List {
    /// What to list; none for the arenas.
    pub target: Option<Target>,
    /// Whether to go all the way down.
    #[serde(default)]
    pub recursive: bool,
    /// Whether to leave out how much of each file is here, which takes longer to find out than all the rest.
    #[serde(default)]
    pub brief: bool,
}

/// `POST /v1/read`: answers with the bytes themselves.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Read {
    /// The blob.
    pub blob: BlobId,
    /// Its size, as `stat` says.
    pub size: u64,
    /// Which bytes.
    pub range: ByteRange,
}

/// `POST /v1/blob`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FindBlob {
    /// How the blob's id begins.
    pub prefix: BlobPrefix,
}

/// `POST /v1/get`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Get {
    /// What to get.
    #[serde(default)]
    pub targets: Vec<Target>,
    /// What to get, by its blob id.
    #[serde(default)]
    pub blobs: Vec<BlobPrefix>,
    /// Where to, absolute.
    pub to: JsonPath,
    /// For how many seconds machines are waited for that went away.
    #[serde(default)]
    pub retry_s: u64,
}

/// `POST /v1/repair`
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Repair {
    /// What to repair; none for everything.
    #[serde(default)]
    pub targets: Vec<Target>,
    /// Whether suspect files are repaired too.
    #[serde(default)]
    pub suspect: bool,
    /// Whether the latest repair is undone instead.
    #[serde(default)]
    pub undo: bool,
    /// Seconds to wait for machines that disconnect during the command.
    #[serde(default)]
    pub retry_s: u64,
}

/// `POST /v1/accept`
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Targets {
    /// What to look at; none for everything.
    #[serde(default)]
    pub targets: Vec<Target>,
}

/// How long joining waits for what the other machine has.
const CATALOG_LIMIT: Duration = Duration::from_secs(30);

type Body_<T> = Result<Json<T>, JsonRejection>;
type Answer = Result<Json<Value>, Failure>;

async fn status(State(node): State<Node>) -> Answer {
    let cache = node.cache_usage()?;
    let arenas = node.namespace().arenas()?.iter().map(|arena| arena_json(&node, arena)).collect::<Vec<_>>();
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "name": node.name(),
        "peer": node.peers().me().to_string(),
        "home_full": node.home_full().map(|full| full.reason()),
        "waits_for_room": node.waits_for_room(),
        "put_aside": node.put_aside(),
        "twin": node.peers().has_twin(),
        "listens_on": node.peers().listens_on(),
        "listeners": node.peers().listeners(),
        "not_listening": node.peers().not_listening(),
        "addresses": node.peers().addresses(),
        "arenas": arenas,
        "peers": peers_json(&node),
        "cache": {
            "bytes": cache.bytes,
            "pinned": cache.pinned,
            "limit": cache.limit,
            "free": cache.free,
            "keep_free": cache.keep_free,
        },
        "answers": { "received_bytes": node.peers().counts().received(), "wasted_bytes": node.peers().counts().wasted() },
        "pins": node.pins_in_short(),
        "under_way": node.under_way().status(),
        "scrub": node.scrub_status(),
        "nfs": node.mount_address(),
        "seq": node.namespace().mark()?.seq,
    })))
}

async fn arenas(State(node): State<Node>) -> Answer {
    Ok(Json(node.namespace().arenas()?.iter().map(|arena| arena_json(&node, arena)).collect()))
}

async fn add_arena(State(node): State<Node>, body: Body_<AddArena>) -> Result<Response, Failure> {
    let AddArena { name, dir, public } = understood(body)?;
    let dir = dir.map(|dir| path_of(&dir)).transpose()?;
    let arena = Arena { name: name.parse().map_err(usage)?, dir, public, root: None };
    let command = format!("arena add {}", arena.name);
    Ok(report_under_way(&node.clone(), command, async move |reporter| {
        let totals = node.add_arena(arena, &reporter).await?;
        reporter.send(summary(json!(totals))).await?;
        Ok(Code::Ok)
    }))
}

async fn remove_arena(State(node): State<Node>, Path(name): Path<String>) -> Answer {
    node.remove_arena(name.parse().map_err(usage)?).await?;
    Ok(Json(json!({})))
}

async fn scan(State(node): State<Node>, Path(name): Path<String>) -> Result<Response, Failure> {
    let name = name.parse().map_err(usage)?;
    Ok(report_under_way(&node.clone(), format!("arena scan {name}"), async move |reporter| {
        scanned(node.scan(&name, &reporter).await?, &reporter).await
    }))
}

async fn accept_file_systems(State(node): State<Node>, Path(name): Path<String>) -> Result<Response, Failure> {
    let name = name.parse().map_err(usage)?;
    Ok(report_under_way(&node.clone(), format!("arena scan --accept {name}"), async move |reporter| {
        scanned(node.scan_accepting(&name, &reporter).await?, &reporter).await
    }))
}

async fn scanned(totals: ScanTotals, reporter: &Reporter) -> Result<Code, Failure> {
    let code = if totals.suspected > 0 { Code::Damage } else { Code::Ok };
    reporter.send(summary(json!(totals))).await?;
    Ok(code)
}

async fn invite(State(node): State<Node>, body: Body_<Invite>) -> Answer {
    let Invite { lifetime_s, role } = understood(body)?;
    let ticket = node.peers().invite(Duration::from_secs(lifetime_s), role).while_doing("make a ticket")?;
    if ticket.addresses.is_empty() {
        return Err(Failure::new(Code::Error, "this machine does not listen, so nobody can join it")
            .hint("make the ticket on the other machine, or listen: blob up --listen HOST:PORT"));
    }
    Ok(Json(json!({ "ticket": ticket.to_string(), "expires": ticket.expires, "role": role })))
}

async fn join(State(node): State<Node>, body: Body_<Join>) -> Answer {
    let ticket = understood(body)?.ticket.parse().map_err(usage).while_doing("join")?;
    let peer = node.peers().join(&ticket).await.while_doing("join")?;
    let complete = node.peers().wait_for_catalog(peer.id, CATALOG_LIMIT).await;
    let id = peer.id.to_string();
    Ok(Json(json!({ "name": peer.name, "id": id, "addresses": peer.told, "catalog_complete": complete })))
}

async fn peers(State(node): State<Node>) -> Answer {
    Ok(Json(peers_json(&node)))
}

async fn add_peer(State(node): State<Node>, body: Body_<AddPeer>) -> Answer {
    let AddPeer { name, id, addresses } = understood(body)?;
    let what = match &addresses[..] {
        [] => format!("add the peer {name}"),
        addresses => format!("add the peer {name} at {}", addresses.join(", ")),
    };
    let id = id.parse().map_err(usage).while_doing(&*what)?;
    if id == node.peers().me() {
        return Err(Failure::new(Code::Usage, "that is this machine's own id").while_doing(what));
    }
    let role = node.peers().roster().get(id).map_or(Role::default(), |known| known.role);
    let set = node.peers().roster().set(Peer { id, name, addresses, told: Vec::new(), role });
    set.map_err(roster_failure).while_doing(what)?;
    node.peers().dial_now(id);
    Ok(Json(json!({})))
}

async fn dial(State(node): State<Node>, body: Body_<Dial>) -> Answer {
    let names = understood(body)?.names;
    let roster = node.peers().roster();
    let chosen = if names.is_empty() {
        roster.peers()
    } else {
        let known = |name: &String| {
            let unknown = || Failure::new(Code::NotFound, format!("no peer is called {name}"));
            roster.by_name(name).ok_or_else(unknown)
        };
        names.iter().map(known).collect::<Result<Vec<_>, Failure>>()?
    };
    let mut dials = JoinSet::new();
    for peer in chosen {
        let peers = node.peers().clone();
        dials.spawn(async move { (peer.id, peers.dial(peer.id).await) });
    }
    let outcomes: BTreeMap<_, _> = dials.join_all().await.into_iter().collect();
    let statuses = node.peers().status().into_iter();
    let lines = statuses.filter_map(|status| {
        let outcome = outcomes.get(&status.peer.id)?;
        let mut line = peer_json(&node, node.roles().ok().as_ref(), status);
        // As it was when the dial ended, whatever has happened since.
        line["connected"] = json!(outcome.as_ref().ok());
        line["last_error"] = json!(outcome.as_ref().err());
        Some(line)
    });
    Ok(Json(lines.collect()))
}

async fn limits(State(node): State<Node>) -> Answer {
    Ok(Json(json!(node.limits())))
}

async fn change_limits(State(node): State<Node>, body: Body_<LimitChange>) -> Answer {
    node.change_limits(&understood(body)?).while_doing("change the limits")?;
    limits(State(node)).await
}

async fn remove_peer(State(node): State<Node>, Path(name): Path<String>) -> Answer {
    let Some(peer) = node.peers().roster().by_name(&name) else {
        return Err(Failure::new(Code::NotFound, format!("no peer is called {name}")));
    };
    node.peers().roster().remove(peer.id)?;
    let namespace = node.namespace().clone();
    let forgotten = tokio::task::spawn_blocking(move || namespace.forget_peer(peer.id)).await;
    // Behind that, for the others are then asked anew, and shown that it was forgotten.
    node.peers().disconnect(peer.id);
    forgotten.map_err(Failure::from)??;
    Ok(Json(json!({})))
}

async fn list(State(node): State<Node>, body: Body_<List>) -> Result<Response, Failure> {
    let List { target, recursive, brief } = understood(body)?;
    Ok(report(async move |reporter| node.list(target, recursive, brief, &reporter).await.map(|()| Code::Ok)))
}

async fn stat(State(node): State<Node>, body: Body_<Target>) -> Answer {
    Ok(Json(node.stat(understood(body)?).await?))
}

async fn whereis(State(node): State<Node>, body: Body_<Target>) -> Answer {
    Ok(Json(node.whereis(understood(body)?).await?))
}

async fn conflicts(State(node): State<Node>, body: Body_<Targets>) -> Result<Response, Failure> {
    let targets = understood(body)?.targets;
    Ok(report(async move |reporter| node.conflicts(targets, &reporter).await))
}

async fn history(State(node): State<Node>, body: Body_<HistoryScope>) -> Result<Response, Failure> {
    let scope = understood(body)?;
    Ok(report(async move |reporter| node.history(scope, &reporter).await))
}

async fn skipped(State(node): State<Node>) -> Answer {
    let mut lines = Vec::new();
    for arena in node.namespace().arenas()? {
        for (path, reason) in node.skipped(&arena.name) {
            let mut line = json!(path);
            (line["arena"], line["reason"]) = (json!(arena.name), reason.into());
            lines.push(line);
        }
    }
    Ok(Json(lines.into()))
}

async fn read(State(node): State<Node>, body: Body_<Read>) -> Result<Response, Failure> {
    let Read { blob, size, range } = understood(body)?;
    let pieces = node.read(blob, size, range).await?;
    let body = Body::from_stream(stream::iter(pieces.into_iter().map(Ok::<Bytes, Infallible>)));
    Ok(with_type("application/octet-stream", body))
}

async fn find_blob(State(node): State<Node>, body: Body_<FindBlob>) -> Answer {
    let (blob, size) = node.find_blob(understood(body)?.prefix).await?;
    Ok(Json(json!({ "blob": blob, "size": size })))
}

async fn get_trees(State(node): State<Node>, body: Body_<Get>) -> Result<Response, Failure> {
    let Get { targets, blobs, to, retry_s } = understood(body)?;
    let to = path_of(&to)?;
    if targets.len() + blobs.len() > 1 && !to.is_dir() {
        return Err(Failure::new(Code::Usage, format!("{to:?} is not a directory, and there are several sources")));
    }
    let command = format!("{} {}", in_words("get", &targets), to.display());
    Ok(report_under_way(&node.clone(), command, async move |reporter| {
        for prefix in &blobs {
            let got = async {
                let (blob, size) = node.find_blob(prefix.clone()).await?;
                node.get_blob(blob, size, to.clone(), &reporter).await
            };
            got.await.while_doing(format!("get {prefix}"))?;
        }
        if targets.is_empty() {
            Ok(Code::Ok)
        } else {
            node.get(targets, to, Duration::from_secs(retry_s), &reporter).await
        }
    }))
}

async fn copy(State(node): State<Node>, body: Body_<CopyScope>) -> Result<Response, Failure> {
    let scope = understood(body)?;
    if scope.sources.is_empty() {
        return Err(Failure::new(Code::Usage, "nothing to copy"));
    }
    let command = scope.to_string();
    Ok(report_under_way(&node.clone(), command, async move |reporter| node.copy(scope, &reporter).await))
}

async fn verify(State(node): State<Node>, body: Body_<Scope>) -> Result<Response, Failure> {
    let scope = understood(body)?;
    if scope.sample.is_some_and(|sample| !(sample > 0.0 && sample <= 1.0)) {
        return Err(Failure::new(Code::Usage, "a sample is more than nothing, and at most all"));
    }
    let command = in_words("verify", &scope.targets);
    Ok(report_under_way(&node.clone(), command, async move |reporter| node.verify(scope, &reporter).await))
}

async fn repair(State(node): State<Node>, body: Body_<Repair>) -> Result<Response, Failure> {
    let Repair { targets, suspect, undo, retry_s } = understood(body)?;
    let consent = if suspect { Consent::Suspect } else { Consent::Damage };
    let command = in_words("repair", &targets);
    Ok(report_under_way(&node.clone(), command, async move |reporter| match undo {
        true => node.undo_repair(targets, &reporter).await,
        false => node.repair(targets, consent, Duration::from_secs(retry_s), &reporter).await,
    }))
}

async fn accept(State(node): State<Node>, body: Body_<Targets>) -> Result<Response, Failure> {
    let targets = understood(body)?.targets;
    Ok(report(async move |reporter| node.accept(targets, &reporter).await))
}

/// Takes note of each call. A report may have only begun then.
async fn logged(request: Request, next: Next) -> Response {
    let (method, path, began) = (request.method().clone(), request.uri().path().to_owned(), Instant::now());
    let response = next.run(request).await;
    let (status, duration_ms) = (response.status().as_u16(), began.elapsed().as_millis() as u64);
    debug!(%method, call = path, status, duration_ms, "answered");
    response
}

fn understood<T>(body: Body_<T>) -> Result<T, Failure> {
    match body {
        Ok(Json(body)) => Ok(body),
        Err(rejection) => Err(Failure::new(Code::Usage, rejection.body_text())),
    }
}

fn usage(error: impl std::error::Error + 'static) -> Failure {
    Failure::from(error).code(Code::Usage)
}

/// Most are mistakes of whoever asked.
fn roster_failure(error: RosterError) -> Failure {
    let code = match error {
        RosterError::Database { .. } | RosterError::NoRandomness => Code::Error,
        RosterError::Full => Code::Limit,
        _ => Code::Usage,
    };
    Failure::from(error).code(code)
}

fn path_of(path: &JsonPath) -> Result<PathBuf, Failure> {
    let bytes = path.bytes().ok_or_else(|| Failure::new(Code::Usage, "path_bytes is not base 64"))?;
    let path = PathBuf::from(OsString::from_vec(bytes));
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(Failure::new(Code::Usage, format!("{path:?} is not an absolute path")))
    }
}

fn arena_json(node: &Node, arena: &Arena) -> Value {
    json!({
        "name": arena.name,
        "dir": arena.dir.as_ref().map(|dir| dir.to_string_lossy()),
        "public": arena.public,
        "status": arena.dir.as_ref().map(|_| node.arena_status(&arena.name)),
    })
}

fn peers_json(node: &Node) -> Value {
    // What cannot be read gives nobody anything.
    let roles = node.roles().ok();
    node.peers().status().into_iter().map(|status| peer_json(node, roles.as_ref(), status)).collect()
}

fn peer_json(node: &Node, roles: Option<&Roles>, status: PeerStatus) -> Value {
    let cursor = node.namespace().cursor(status.peer.id).unwrap_or_default();
    json!({
        "name": status.peer.name,
        "id": status.peer.id.to_string(),
        "addresses": status.peer.addresses.iter().chain(&status.peer.told).collect::<Vec<_>>(),
        "connected": status.connected,
        "connected_s": status.connection.map(|connection| connection.age.as_secs()),
        "round_trip_ms": status.connection.map(|connection| connection.round_trip.as_micros() as f64 / 1000.0),
        "received_bytes": status.connection.map(|connection| connection.received_bytes),
        "sent_bytes": status.connection.map(|connection| connection.sent_bytes),
        "sent_packets": status.connection.map(|connection| connection.sent_packets),
        "lost_packets": status.connection.map(|connection| connection.lost_packets),
        "send_rate": status.connection.map(|connection| connection.send_rate),
        "last_connected": status.last_connected.map(|seconds| rfc3339(UnixTime { seconds, nanos: 0 })),
        "last_ended": status.last_ended,
        "last_error": status.last_error,
        "refused": status.refused,
        "twins": status.twins,
        "writer": roles.map_or_else(Vec::new, |roles| roles.writable(&status.peer)),
        "next_dial_s": status.next_dial.map(|wait| wait.as_secs()),
        // While a listing is coming, what was heard before is on its way out.
        "heard_seq": if cursor.after.is_none() { cursor.mark.seq } else { 0 },
    })
}
