//! What the user decided for this home, in a file that people can read, so that a lost database takes no decision along.
//! Format and order: spec/store.md, "The home record".

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, Weak},
};

use namespace::{Anchor, Anchors, Arena, ArenaName, Namespace, PeerId, Place, RelPath};
use peers::{Peer, Role, Roster};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Inner, Node};
use crate::{
    failure::{Code, Failure, WhileDoing},
    home::{Home, is_not_found},
    target::JsonPath,
};

/// The home record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    format: u32,
    /// In bytes, if it is not the one of the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cache_limit: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    arenas: Vec<ArenaRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pins: Vec<PinRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    peers: Vec<PeerRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ArenaRecord {
    name: ArenaName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dir: Option<JsonPath>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    public: bool,
    /// Where its root is, and the mount points in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    anchors: Vec<AnchorRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AnchorRecord {
    /// In the arena; none for its root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<JsonPath>,
    /// In hexadecimal digits: TOML has no numbers of 64 bits without a sign.
    file_system: String,
    within: JsonPath,
    inode: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PinRecord {
    arena: ArenaName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<JsonPath>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeerRecord {
    name: String,
    id: String,
    /// Where the user says to dial it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<String>,
    /// Where it said last that it listens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    told: Vec<String>,
    role: Role,
}

impl Record {
    /// The record of a home that is open.
    fn of(inner: &Inner) -> Result<Self, Failure> {
        let (limit, configured) = (inner.store.cache_usage()?.limit, inner.store.configured_cache_limit());
        let arenas = inner.namespace.arenas()?.into_iter().map(|arena| {
            let anchors = inner.namespace.anchors(&arena.name)?;
            Ok(ArenaRecord {
                dir: arena.dir.map(|dir| dir.as_os_str().as_bytes().into()),
                name: arena.name,
                public: arena.public,
                anchors: anchors.iter().map(AnchorRecord::from).collect(),
            })
        });
        let pins = inner.namespace.pins()?;
        let pin = |place: &Place| PinRecord { arena: place.arena.clone(), at: place.path.as_ref().map(JsonPath::from) };
        let peer =
            |Peer { id, name, addresses, told, role }| PeerRecord { name, id: id.to_string(), addresses, told, role };
        Ok(Self {
            format: FORMAT,
            cache_limit: Some(limit).filter(|limit| *limit != configured),
            arenas: arenas.collect::<Result<_, Failure>>()?,
            pins: pins.iter().map(pin).collect(),
            peers: inner.peers.roster().peers().into_iter().map(peer).collect(),
        })
    }

    /// The record in the file; `None` if there is no file.
    pub(super) fn load(home: &Home) -> Result<Option<Self>, Failure> {
        let reading = || format!("understand {:?}", home.record());
        let text = match fs::read_to_string(home.record()) {
            Err(error) if is_not_found(&error) => return Ok(None),
            text => text.while_doing(reading())?,
        };
        let record: Self = toml::from_str(&text).while_doing(reading()).map_err(|failure| {
            failure.hint("mend it by hand, or delete it, and add arenas, pins and peers again afterwards")
        })?;
        if record.format != FORMAT {
            let strange = format!("its format is {}, and this program knows {FORMAT}", record.format);
            return Err(Failure::new(Code::Error, strange).while_doing(reading()));
        }
        Ok(Some(record))
    }

    /// Puts all that it says into a database that knows nothing yet.
    pub(super) fn apply(self, namespace: &Namespace, roster: &Roster) -> Result<(), Failure> {
        for ArenaRecord { name, dir, public, anchors } in self.arenas {
            let dir = dir.map(|dir| Ok::<_, Failure>(PathBuf::from(OsStr::from_bytes(&bytes(&dir)?)))).transpose()?;
            namespace.set_arena(&Arena { name: name.clone(), dir, public, root: None })?;
            let anchors = anchors.into_iter().map(AnchorRecord::parse).collect::<Result<Anchors, Failure>>()?;
            namespace.set_anchors(&name, &anchors)?;
        }
        let place = |pin: PinRecord| Ok::<_, Failure>(Place { arena: pin.arena, path: rel_path(pin.at)? });
        let places = self.pins.into_iter().map(place).collect::<Result<Vec<_>, _>>()?;
        namespace.change_pins(&places, &[], u64::MAX)?;
        for PeerRecord { name, id, addresses, told, role } in self.peers {
            let id: PeerId = id.parse().map_err(|_| Failure::new(Code::Error, format!("{id:?} is no peer id")))?;
            roster.set(Peer { id, name, addresses, told, role })?;
        }
        Ok(())
    }

    pub(super) fn cache_limit(&self) -> Option<u64> {
        self.cache_limit
    }

    fn text(&self) -> Result<String, Failure> {
        Ok(format!("{HEADER}{}", toml::to_string(self)?))
    }
}

impl From<(&Option<RelPath>, &Anchor)> for AnchorRecord {
    fn from((at, anchor): (&Option<RelPath>, &Anchor)) -> Self {
        Self {
            at: at.as_ref().map(JsonPath::from),
            file_system: format!("{:x}", anchor.file_system),
            within: anchor.within[..].into(),
            inode: format!("{:x}", anchor.inode),
        }
    }
}

impl AnchorRecord {
    fn parse(self) -> Result<(Option<RelPath>, Anchor), Failure> {
        let number = |digits: &str| u64::from_str_radix(digits, 16);
        let (file_system, inode) = (number(&self.file_system)?, number(&self.inode)?);
        Ok((rel_path(self.at)?, Anchor { file_system, within: bytes(&self.within)?, inode }))
    }
}

fn bytes(path: &JsonPath) -> Result<Vec<u8>, Failure> {
    path.bytes().ok_or_else(|| Failure::new(Code::Error, "path_bytes is not base 64"))
}

fn rel_path(path: Option<JsonPath>) -> Result<Option<RelPath>, Failure> {
    path.map(|path| Ok(RelPath::try_from(bytes(&path)?)?)).transpose()
}

impl Node {
    /// Writes the home record anew, if something that it says has changed, durably. To be called after every such change.
    /// Blocks.
    pub(super) fn keep_record(&self) {
        keep(&self.inner);
    }

    /// Has that done soon, where it is no decision of the user that changed. To be called from the runtime.
    pub(super) fn keep_record_later(&self) {
        let node = self.clone();
        tokio::task::spawn_blocking(move || node.keep_record());
    }

    /// Has that done also when peers come and go.
    pub(super) fn keep_record_of_peers(&self) {
        let inner: Weak<Inner> = Arc::downgrade(&self.inner);
        self.inner.peers.roster().on_change(move || inner.upgrade().iter().for_each(|inner| keep(inner)));
    }
}

fn keep(inner: &Inner) {
    let mut written = inner.record.lock().unwrap_or_else(PoisonError::into_inner);
    let mut write = || {
        let text = Record::of(inner)?.text()?;
        if written.as_ref() != Some(&text) {
            inner.database.reserve.spend(|| replace(&inner.home.record(), text.as_bytes()))?;
            *written = Some(text);
        }
        Ok::<_, Failure>(())
    };
    if let Err(failure) = write() {
        let path = inner.home.record();
        warn!(
            ?path,
            reason = failure.reason(),
            "not written; if the database is lost now, the latest decisions are too"
        );
    }
}

/// Replaces a file, durably and in one step.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let staged = path.with_extension("new");
    let mut file = fs::File::create(&staged)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()?;
    fs::rename(&staged, path)?;
    path.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
}

const FORMAT: u32 = 1;

const HEADER: &str = "\
# What was decided for this home: its arenas, pins and peers. The daemon writes this file after every change, and reads it
# only to make a lost database anew. Edits are lost.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_as_people_read_it_and_back() {
        let anchor = AnchorRecord { at: None, file_system: "ff".into(), within: b"/"[..].into(), inode: "2".into() };
        let below = AnchorRecord { at: Some(b"d\xff"[..].into()), ..anchor.clone() };
        let record = Record {
            format: FORMAT,
            cache_limit: Some(5),
            arenas: vec![ArenaRecord {
                name: "docs".parse().unwrap(),
                dir: Some(b"/home/me/docs"[..].into()),
                public: true,
                anchors: vec![anchor, below],
            }],
            pins: vec![PinRecord { arena: "docs".parse().unwrap(), at: Some(b"a/b"[..].into()) }],
            peers: vec![PeerRecord {
                name: "nas".into(),
                id: "00".repeat(32),
                addresses: vec!["nas:7700".into()],
                told: vec![],
                role: Role::Writer,
            }],
        };
        let text = record.text().unwrap();
        assert!(text.contains("name = \"docs\"\n") && text.contains("role = \"writer\"\n"), "{text}");
        assert_eq!(toml::from_str::<Record>(&text).unwrap(), record);
        let anchors = record.arenas[0].anchors.clone().into_iter().map(|anchor| anchor.parse().unwrap());
        let anchors: Anchors = anchors.collect();
        assert_eq!(anchors[&None], Anchor { file_system: 255, within: b"/".to_vec(), inode: 2 });
        assert_eq!(anchors.keys().last().unwrap().as_ref().unwrap().as_bytes(), b"d\xff");
    }
}
