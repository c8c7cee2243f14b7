use std::{collections::BTreeMap, fmt, fs, io::Write, path::Path, time::Duration};

use blobstore::Settings;
use bytesize::ByteSize;
use peers::{Compress, Congestion, Roles};
use serde::{
    Deserialize, Deserializer,
    de::{SeqAccess, Visitor},
};
use tree::Grain;

use crate::{
    failure::{Code, Failure, WhileDoing},
    home::{Home, is_not_found},
    node::{KeepAttributes, MountListen, MountSettings, WatchSettings},
};

/// What the user set in `config.toml`. Everything has a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// What this machine calls itself; by default its host name.
    pub name: Option<String>,
    /// Where to listen: one `HOST:PORT` or several; `"none"` makes a deaf peer. By default all addresses at port 7700,
    /// or at another port if that is taken.
    pub listen: Option<Listen>,
    /// Further addresses to tell others, each `HOST:PORT`.
    pub advertise: Vec<String>,
    /// What is kept of the files held here.
    pub store: StoreConfig,
    /// What is kept of the files of others.
    pub cache: CacheConfig,
    /// How bytes travel between machines.
    pub transfer: TransferConfig,
    /// What is kept of files that are copied.
    pub copy: CopyConfig,
    /// How much may go to peers and come from them.
    pub limits: LimitsConfig,
    /// How the daemon looks for damage by itself.
    pub scrub: ScrubConfig,
    /// What is kept of the bytes that repairs replaced.
    pub repair: RepairConfig,
    /// How the daemon follows changes of the files held here.
    pub watch: WatchConfig,
    /// What is kept of what is pinned.
    pub pin: PinConfig,
    /// What is remembered of changes.
    pub history: HistoryConfig,
    /// Who besides peers is served.
    pub serve: Serve,
    /// How everything is offered as a folder.
    pub nfs: NfsConfig,
    /// Which arenas peers may write to, by name or id.
    pub roles: BTreeMap<String, RoleConfig>,
}

/// Where to listen: a string, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listen(pub(crate) Vec<String>);

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;
        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Listen;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("HOST:PORT, or a list of them")
            }

            fn visit_str<E: serde::de::Error>(self, one: &str) -> Result<Listen, E> {
                Ok(Listen(vec![one.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Listen, A::Error> {
                let mut many = Vec::new();
                while let Some(one) = seq.next_element()? {
                    many.push(one);
                }
                Ok(Listen(many))
            }
        }
        deserializer.deserialize_any(OneOrMany)
    }
}

/// `[store]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct StoreConfig {
    /// How far down trees are kept of files indexed from now on: 16, 64, 256 KiB or 1 MiB.
    pub outboard_grain: ByteSize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { outboard_grain: ByteSize(Grain::GROUP.bytes()) }
    }
}

/// `[cache]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CacheConfig {
    /// What the cache may take on the disk.
    pub limit: ByteSize,
    /// What it leaves free there.
    pub keep_free: ByteSize,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { limit: ByteSize::gib(20), keep_free: ByteSize::gib(1) }
    }
}

/// `[transfer]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TransferConfig {
    /// How many bytes of files are on their way at a time.
    pub in_flight: ByteSize,
    /// When what is sent is compressed: `auto`, `off`, or a level from 1 to 19.
    pub compress: Compress,
    /// Which congestion controller what is sent obeys.
    pub congestion: Congestion,
}

impl Default for TransferConfig {
    fn default() -> Self {
        Self { in_flight: ByteSize::mib(64), compress: Compress::Auto, congestion: Congestion::Auto }
    }
}

/// `[copy]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CopyConfig {
    /// Which extended attributes are copied: `true`, `false`, or `all`.
    pub attributes: KeepAttributes,
}

/// `[limits]`: bytes a second.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LimitsConfig {
    /// To all peers together.
    pub up: Option<ByteSize>,
    /// From all peers together.
    pub down: Option<ByteSize>,
    /// Those of single peers, by name, beside these.
    pub peers: BTreeMap<String, LimitConfig>,
}

/// `[limits.peers.NAME]`: bytes a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LimitConfig {
    /// To the peer.
    pub up: Option<ByteSize>,
    /// From it.
    pub down: Option<ByteSize>,
}

/// `[scrub]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ScrubConfig {
    /// Within what time everything here is verified.
    pub period: String,
    /// How many bytes are read a second for that, at most.
    pub rate: ByteSize,
    /// Whether what is found damaged is mended at once.
    pub repair: bool,
}

impl Default for ScrubConfig {
    fn default() -> Self {
        Self { period: "30d".to_owned(), rate: ByteSize::mib(50), repair: true }
    }
}

/// `[repair]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RepairConfig {
    /// How long the bytes are kept that repairs replaced.
    pub keep: String,
    /// How many of them are kept.
    pub limit: ByteSize,
}

impl Default for RepairConfig {
    fn default() -> Self {
        Self { keep: "30d".to_owned(), limit: ByteSize::gib(1) }
    }
}

/// `[watch]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct WatchConfig {
    /// How long a file must rest before it is read.
    pub settle: String,
    /// After what time it is read even if it never rests.
    pub settle_max: String,
    /// How often everything is looked at, in case something was not heard.
    pub rescan: String,
    /// The same where changes that other machines make are not reported: on network file systems.
    pub poll: String,
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self { settle: "2s".to_owned(), settle_max: "1m".to_owned(), rescan: "1h".to_owned(), poll: "30s".to_owned() }
    }
}

/// `[pin]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PinConfig {
    /// For how long the bytes of pinned files stay here after their owners have deleted them; `0s` for no time.
    pub keep: String,
}

impl Default for PinConfig {
    fn default() -> Self {
        Self { keep: "30d".to_owned() }
    }
}

/// `[history]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HistoryConfig {
    /// How many changes of each machine are remembered.
    pub limit: u64,
}

impl Default for HistoryConfig {
    fn default() -> Self {
        Self { limit: 100_000 }
    }
}

/// `[serve]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Serve {
    /// Whether anyone who knows a blob id may read blobs of public arenas in iroh-blobs' protocol.
    pub iroh: bool,
}

/// `[nfs]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NfsConfig {
    /// `ADDR:PORT`, or `"none"`. By default 127.0.0.1:7701, or another port if that is taken.
    pub listen: Option<String>,
    /// The addresses and networks of clients that are let in.
    pub allow: Vec<String>,
    /// How far ahead of readers is fetched.
    pub read_ahead: ByteSize,
    /// How long a read waits for bytes that are not here.
    pub fetch_timeout: String,
    /// Whether modes are without write permission.
    pub read_only: bool,
}

impl Default for NfsConfig {
    fn default() -> Self {
        Self {
            listen: None,
            allow: vec!["127.0.0.0/8".to_owned(), "::1".to_owned()],
            read_ahead: ByteSize::mib(8),
            fetch_timeout: "15s".to_owned(),
            read_only: false,
        }
    }
}

/// What a peer may do here, in `[roles]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RoleConfig {
    /// Arenas into and out of which it may copy and move; `*` for all.
    pub writer: Vec<String>,
}

impl Config {
    /// Reads the file; without one, all defaults.
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if is_not_found(&error) => return Ok(Self::default()),
            Err(error) => return Err(error).while_doing(format!("read {path:?}")),
        };
        toml::from_str(&text).map_err(|error| {
            let lines = error.to_string();
            Failure::new(Code::Usage, lines.trim_end().replace('\n', "\n    "))
                .while_doing(format!("understand {path:?}"))
        })
    }

    /// How the store is to be opened.
    pub(crate) fn store_settings(&self, home: &Home) -> Result<Settings, Failure> {
        let grain = self.store.outboard_grain;
        let grain = Grain::from_bytes(grain.as_u64()).ok_or_else(|| {
            Failure::new(Code::Usage, format!("store.outboard_grain is {grain}"))
                .hint("it can be 16 KiB, 64 KiB, 256 KiB or 1 MiB")
        })?;
        Ok(Settings {
            outboards: home.outboards(),
            cache: home.cache.clone(),
            grain,
            cache_limit: self.cache.limit.as_u64(),
            cache_keep_free: self.cache.keep_free.as_u64(),
            saved: home.saved(),
            saved_keep: positive("repair.keep", &self.repair.keep)?,
            saved_bytes_max: self.repair.limit.as_u64(),
            vanished_max: self.history.limit,
        })
    }

    /// Within what time everything here is to be verified.
    pub(crate) fn scrub_period(&self) -> Result<Duration, Failure> {
        positive("scrub.period", &self.scrub.period)
    }

    /// How everything is offered as a folder.
    pub(crate) fn mount_settings(&self) -> Result<MountSettings, Failure> {
        let NfsConfig { listen, allow, read_ahead, fetch_timeout, read_only } = &self.nfs;
        let listen = match listen.as_deref() {
            None => MountListen::Default,
            Some("none") => MountListen::Nowhere,
            Some(address) => MountListen::At(address.parse().map_err(|_| {
                Failure::new(Code::Usage, format!("nfs.listen is {address:?}"))
                    .hint("such as 127.0.0.1:7701 or [::1]:7701, or none")
            })?),
        };
        let allowed = |network: &String| {
            network.parse().map_err(|error: nfs::ParseNetworkError| {
                Failure::new(Code::Usage, error.to_string()).while_doing("understand nfs.allow")
            })
        };
        Ok(MountSettings {
            listen,
            allow: allow.iter().map(allowed).collect::<Result<_, _>>()?,
            read_ahead: read_ahead.as_u64(),
            fetch_timeout: positive("nfs.fetch_timeout", fetch_timeout)?,
            read_only: *read_only,
        })
    }

    /// Who may write here.
    pub(crate) fn roles(self) -> Roles {
        Roles { writers: self.roles.into_iter().map(|(peer, role)| (peer, role.writer)).collect() }
    }

    /// How changes are waited for.
    pub(crate) fn watch_settings(&self) -> Result<WatchSettings, Failure> {
        let WatchConfig { settle, settle_max, rescan, poll } = &self.watch;
        let settle = positive("watch.settle", settle)?;
        let settle_max = positive("watch.settle_max", settle_max)?.max(settle);
        let (rescan, poll) = (positive("watch.rescan", rescan)?, positive("watch.poll", poll)?);
        Ok(WatchSettings { settle, settle_max, rescan, poll })
    }

    /// For how long the bytes of pinned files are kept after a deletion.
    pub(crate) fn pin_keep(&self) -> Result<Duration, Failure> {
        let keep = &self.pin.keep;
        parse_duration(keep).ok_or_else(|| {
            Failure::new(Code::Usage, format!("pin.keep is {keep:?}")).hint("such as 30d or 12h, or 0s for no time")
        })
    }

    /// Writes a file that says what can be set, if there is none.
    pub(crate) fn write_template(path: &Path) -> Result<(), Failure> {
        match fs::File::create_new(path) {
            Ok(mut file) => file.write_all(TEMPLATE.as_bytes()).while_doing(format!("write {path:?}")),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error).while_doing(format!("create {path:?}")),
        }
    }
}

fn positive(key: &str, value: &str) -> Result<Duration, Failure> {
    let duration = parse_duration(value).filter(|duration| !duration.is_zero());
    duration.ok_or_else(|| Failure::new(Code::Usage, format!("{key} is {value:?}")).hint("such as 30d, 1h 30m or 2s"))
}

/// A time as people write it: `30d`, `1h 30m`, `90s`. Days have 24 hours. `None` if it is none, or below zero.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let span: jiff::Span = text.parse().ok()?;
    span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).ok()?.try_into().ok()
}

const TEMPLATE: &str = r#"# blobd's settings. Everything has a default, shown here behind '#'.

# What this machine calls itself.
#name = "its host name"

# Where to listen: HOST:PORT, or a list of them, or "none" if this machine shall only dial others.
#listen = "[::]:7700"

# Further addresses under which others can reach this machine, such as a router's.
#advertise = ["home.example.org:7700"]

[store]
# How far down the tree of each file is kept: 16 KiB, 64 KiB, 256 KiB or 1 MiB. Coarser takes less disk space (0.39 % of
# the files, 0.1 %, 0.02 %, 0.006 %), and finds damage here in pieces of that size. For files indexed from now on.
#outboard_grain = "16 KiB"

[cache]
# What the files of others that were read here may take on the disk, and what is always left free there. What was
# used longest ago makes room.
#limit = "20 GiB"
#keep_free = "1 GiB"

[transfer]
# How many bytes of files are on their way at a time: many small files at once, and large ones alone.
#in_flight = "64 MiB"
# Whether what is sent is compressed: "auto" does it for what shrinks, on networks slower than compressing is; or "off", or
# always at a level from 1 to 19.
#compress = "auto"
# Congestion control: "auto" keeps its speed when a network loses packets at random, as Wi-Fi does; or "cubic", or "bbr".
#congestion = "auto"

[copy]
# Whether get, cp and mv copy extended attributes (user.*) and POSIX ACLs; "all" also copies security.* and trusted.*, between
# machines that are all set so and run as root. mv removes no file whose attributes were not kept.
#attributes = true

[limits]
# How many bytes a second may go to all peers together, and come from them, 64 KiB at the least; and of a single peer, in
# a section [limits.peers.NAME]. They can be changed at any time: blob limit.
#up = "2 MiB"
#down = "2 MiB"

[scrub]
# The daemon reads and verifies everything it holds once in this time, by itself, at this many bytes a second at most;
# and mends what it finds damaged with bytes from peers, unless it shall not.
#period = "30d"
#rate = "50 MiB"
#repair = true

[repair]
# How long, and how much, is kept of the bytes that repairs replaced: blob repair --undo puts them back.
#keep = "30d"
#limit = "1 GiB"

[watch]
# A file that changes is read once it has rested so long, or after settle_max if it never does; and everything is looked
# at again now and then, in case an event was missed; every `poll` on network file systems, which do not report changes
# that other machines make.
#settle = "2s"
#settle_max = "1m"
#rescan = "1h"
#poll = "30s"

[pin]
# For how long the bytes of what is pinned stay here after their owners have deleted the files: blob pin lists them.
#keep = "30d"

[history]
# How many changes of each machine are remembered: for `blob history`, and for machines that were away.
#limit = 100000

[serve]
# Whether anyone who knows a blob id may read the blobs of public arenas in iroh-blobs' protocol.
#iroh = false

[nfs]
# Everything as a folder. `listen`: the address for `blob mount`, or "none"; another port if this one is taken. `allow`: networks whose
# clients may read everything. `read_ahead`: bytes fetched ahead of sequential readers. `fetch_timeout`: time without a received byte
# after which a read fails. `read_only`: whether files look read-only.
#listen = "127.0.0.1:7701"
#allow = ["127.0.0.0/8", "::1"]
#read_ahead = "8 MiB"
#fetch_timeout = "15s"
#read_only = false

[roles]
# Other machines read what is here, and no more. Those that may also copy and move files into and out of arenas, by
# name or id, and which arenas: "*" for all. A line here takes the place of what `blob invite --role` gave.
#laptop = { writer = ["inbox", "photos"] }
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_says_the_defaults_and_mistakes_are_told() {
        assert_eq!(toml::from_str::<Config>(TEMPLATE).unwrap(), Config::default());
        for (text, listen) in [("'a:1'", vec!["a:1"]), ("['a:1', '[::]:2']", vec!["a:1", "[::]:2"]), ("[]", vec![])] {
            let config: Config = toml::from_str(&format!("listen = {text}")).unwrap();
            assert_eq!(config.listen, Some(Listen(listen.iter().map(|at| at.to_string()).collect())));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        assert_eq!(Config::load(&path).unwrap(), Config::default());
        fs::write(&path, "[roles]\nlaptop = { writer = [\"inbox\"] }\n\"no one\" = {}").unwrap();
        let writers = [("laptop", vec!["inbox".to_owned()]), ("no one", vec![])];
        let writers = writers.map(|(peer, arenas)| (peer.to_owned(), arenas)).into();
        assert_eq!(Config::load(&path).unwrap().roles(), Roles { writers });
        fs::write(&path, "listne = \"x\"").unwrap();
        let failure = Config::load(&path).unwrap_err();
        assert_eq!(failure.code, Code::Usage);
        assert!(failure.to_string().contains("listne"), "{failure}");
    }
}
