//! Limits on what goes to peers and comes from them.

use namespace::PeerId;
use peers::RATE_LEAST;
use serde::{Deserialize, Deserializer, Serialize};
use tracing::warn;

use super::Node;
use crate::{
    config::LimitsConfig,
    failure::{Code, Failure},
};

/// The limits of all peers together, or of one, in bytes a second; `null` is none.
#[derive(Debug, Serialize)]
pub(crate) struct Limit {
    /// The peer's name; none for all together.
    peer: Option<String>,
    up: Option<u64>,
    down: Option<u64>,
}

/// `POST /v1/limits`: what is to change.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct LimitChange {
    /// The peer's name; none for all together.
    #[serde(default)]
    pub peer: Option<String>,
    /// What is left out stays.
    #[serde(default, deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    pub up: Option<Option<u64>>,
    /// What is left out stays.
    #[serde(default, deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    pub down: Option<Option<u64>>,
}

impl Node {
    /// The limits that there are: those of all together first.
    pub(crate) fn limits(&self) -> Vec<Limit> {
        let (up, down) = (self.peers().up(), self.peers().down());
        let own = self.peers().roster().peers().into_iter().map(|peer| Limit {
            up: up.rate_of(peer.id),
            down: down.rate_of(peer.id),
            peer: Some(peer.name),
        });
        let own = own.filter(|limit| limit.up.is_some() || limit.down.is_some());
        std::iter::once(Limit { peer: None, up: up.rate(), down: down.rate() }).chain(own).collect()
    }

    /// Changes limits from now on, also for what is under way. Fails, and changes nothing, if there is no such peer or a
    /// limit is too low.
    pub(crate) fn change_limits(&self, change: &LimitChange) -> Result<(), Failure> {
        let unknown = |name: &String| Failure::new(Code::NotFound, format!("no peer is called {name}"));
        let roster = self.peers().roster();
        let peer = change.peer.as_ref().map(|name| roster.by_name(name).ok_or_else(|| unknown(name))).transpose()?;
        for rate in [change.up, change.down].into_iter().flatten().flatten() {
            check(rate)?;
        }
        self.limit(peer.map(|peer| peer.id), change.up, change.down);
        Ok(())
    }

    /// Sets the limits that the configuration says.
    pub(super) fn configure_limits(&self, config: &LimitsConfig) -> Result<(), Failure> {
        let own = config.peers.iter().map(|(name, limit)| (Some(name), limit.up, limit.down));
        for (name, up, down) in std::iter::once((None, config.up, config.down)).chain(own) {
            let (up, down) = (up.map(|rate| rate.as_u64()), down.map(|rate| rate.as_u64()));
            up.into_iter().chain(down).try_for_each(check)?;
            match name.map(|name| (name, self.peers().roster().by_name(name))) {
                None => self.limit(None, Some(up), Some(down)),
                Some((_, Some(peer))) => self.limit(Some(peer.id), Some(up), Some(down)),
                Some((name, None)) => warn!(peer = name, "limits of a peer that is not known are not set"),
            }
        }
        Ok(())
    }

    fn limit(&self, peer: Option<PeerId>, up: Option<Option<u64>>, down: Option<Option<u64>>) {
        for (limits, rate) in [(self.peers().up(), up), (self.peers().down(), down)] {
            match (peer, rate) {
                (_, None) => {}
                (None, Some(rate)) => limits.set(rate),
                (Some(peer), Some(rate)) => limits.set_peer(peer, rate),
            }
        }
    }
}

fn check(rate: u64) -> Result<(), Failure> {
    if rate >= RATE_LEAST {
        return Ok(());
    }
    Err(Failure::new(Code::Usage, format!("a limit of {rate} bytes a second is too low to live with"))
        .hint(format!("{} KiB a second is the least, or \"none\" for no limit", RATE_LEAST >> 10)))
}

/// A field that is there, `null` or not.
fn named<'de, D: Deserializer<'de>>(field: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(field).map(Some)
}
