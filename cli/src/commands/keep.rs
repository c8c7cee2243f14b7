use std::ffi::OsString;

use axum::http::Method;
use indicatif::HumanBytes;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::watch;

use super::{blobs::parsed, daemon_or_home, print, style};
use crate::{
    args::{CacheCommand, Common, PinArgs, WarmArgs},
    client::Client,
    control::Targets,
    event::Pin,
    failure::{Code, Failure},
    home::Home,
    node::{CacheLimit, PinScope, Trim, WarmScope},
    output::{pin_lines, show},
};

/// `blob pin`
pub(crate) async fn pin(home: &Home, common: &Common, args: PinArgs) -> Result<Code, Failure> {
    let PinArgs { no_wait, deleted, accept_deletions, retry, targets } = args;
    if deleted || accept_deletions {
        let call = if deleted { "/v1/pins/deleted" } else { "/v1/pins/accept" };
        let targets = Targets { targets: parsed(&targets)? };
        return with_keeper(home, false, async |client| {
            show(client.events(call, &targets).await?, style(common)).await
        })
        .await;
    }
    let scope = PinScope { targets: parsed(&targets)?, wait: !no_wait, retry_s: retry.seconds() };
    with_keeper(home, scope.wait, async |client| {
        if scope.targets.is_empty() {
            for pin in client.value(Method::GET, "/v1/pins", &()).await?.as_array().into_iter().flatten() {
                print(common, "pin", pin.clone(), |pin| {
                    Pin::deserialize(pin).map_or_else(|_| String::new(), |pin| pin_lines(&pin).join("\n"))
                })?;
            }
            return Ok(Code::Ok);
        }
        let shown = show(client.events("/v1/pins", &scope).await?, style(common)).await;
        shown.map_err(|failure| match failure.code {
            Code::Interrupted => {
                failure.hint("the pin stays, and the daemon goes on with it; to take it back: blob unpin")
            }
            _ => failure,
        })
    })
    .await
}

/// `blob unpin`
pub(crate) async fn unpin(home: &Home, common: &Common, targets: &[OsString]) -> Result<Code, Failure> {
    let targets = Targets { targets: parsed(targets)? };
    with_keeper(home, false, async |client| {
        for gone in client.value(Method::POST, "/v1/unpin", &targets).await?.as_array().into_iter().flatten() {
            print(common, "unpinned", gone.clone(), |_| String::new())?;
        }
        Ok(Code::Ok)
    })
    .await
}

/// `blob warm`
pub(crate) async fn warm(home: &Home, common: &Common, args: WarmArgs) -> Result<Code, Failure> {
    let WarmArgs { dry_run, retry, targets } = args;
    let scope = WarmScope { targets: parsed(&targets)?, dry_run, retry_s: retry.seconds() };
    with_keeper(home, false, async |client| show(client.events("/v1/warm", &scope).await?, style(common)).await).await
}

/// `blob cache`
pub(crate) async fn cache(home: &Home, common: &Common, command: CacheCommand) -> Result<Code, Failure> {
    with_keeper(home, false, async |client| match command {
        CacheCommand::Stat => print(common, "cache", client.value(Method::GET, "/v1/cache", &()).await?, stat_lines),
        CacheCommand::Trim { left } => {
            let trimmed = client.value(Method::POST, "/v1/cache/trim", &Trim { bytes: left }).await?;
            print(common, "trimmed", trimmed, |trimmed| {
                let bytes = |field: &str| HumanBytes(trimmed[field].as_u64().unwrap_or(0));
                format!("{} freed; {} left, and {} pinned", bytes("freed"), bytes("bytes"), bytes("pinned"))
            })
        }
        CacheCommand::Limit { limit } => {
            let stat = client.value(Method::POST, "/v1/cache/limit", &CacheLimit { bytes: limit }).await?;
            print(common, "cache", stat, limit_line)
        }
    })
    .await
}

/// Runs `work` against the daemon, or against the home itself, where what is pinned is fetched meanwhile if `keeps`.
async fn with_keeper(
    home: &Home,
    keeps: bool,
    work: impl AsyncFnOnce(Client) -> Result<Code, Failure>,
) -> Result<Code, Failure> {
    let (client, node) = daemon_or_home(home)?;
    let (stop, stopped) = watch::channel(false);
    if let Some(node) = node.clone().filter(|_| keeps) {
        tokio::spawn(node.keep_pins(stopped));
    }
    let outcome = work(client).await;
    stop.send_replace(true);
    if let Some(node) = node {
        node.shutdown().await;
    }
    outcome
}

fn stat_lines(stat: &Value) -> String {
    let bytes = |field: &str| HumanBytes(stat[field].as_u64().unwrap_or(0));
    let count = |field: &str| stat[field].as_u64().unwrap_or(0);
    [
        format!("used    {} of {}", bytes("bytes"), limit_line(stat).trim_start_matches("limit  ")),
        format!("pinned  {} beside that", bytes("pinned")),
        format!("blobs   {} whole, {} in part", count("whole"), count("partial")),
        format!("disk    {} free, of which {} stay free", bytes("free"), bytes("keep_free")),
    ]
    .join("\n")
}

fn limit_line(stat: &Value) -> String {
    let bytes = |field: &str| stat[field].as_u64().unwrap_or(0);
    match (bytes("limit"), bytes("configured_limit")) {
        (limit, configured) if limit == configured => format!("limit  {}", HumanBytes(limit)),
        (limit, configured) => format!("limit  {} (config.toml: {})", HumanBytes(limit), HumanBytes(configured)),
    }
}
