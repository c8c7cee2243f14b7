use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use namespace::PeerId;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use tree::BlobId;

use crate::{
    Role,
    hello::{are_addresses, is_name},
};

/// The peers that this machine trusts, and the invitations that are out. Cheap to clone; the clones are one.
#[derive(Clone)]
pub struct Roster {
    db: Arc<Database>,
    peers: Arc<RwLock<BTreeMap<PeerId, Peer>>>,
    /// Who hears of changes.
    on_change: Arc<OnceLock<Box<dyn Fn() + Send + Sync>>>,
}

/// A trusted peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its key.
    pub id: PeerId,
    /// What it is called here; no two peers are called the same.
    pub name: String,
    /// Where the user says to dial it, each `HOST:PORT`.
    pub addresses: Vec<String>,
    /// Where it said last that it listens; tried after those.
    pub told: Vec<String>,
    /// What it may do here, unless the configuration says otherwise.
    pub role: Role,
}

/// What becomes of a ticket's secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redeemed {
    /// It lets the peer in, in this role.
    As(Role),
    /// It expired, at this second since 1970.
    Expired(i64),
    /// It was used by another peer, forgotten, or never made.
    Unknown,
}

/// Why the roster could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RosterError {
    /// The database failed.
    #[error("{action} in the roster's database")]
    Database {
        /// What was being done.
        action: &'static str,
        /// What redb said.
        #[source]
        source: Box<redb::Error>,
    },
    /// Not a name that a peer can have.
    #[error("{0:?} cannot be the name of a peer: 1 to 64 bytes without '/', ':' or control characters")]
    Name(String),
    /// Another peer has that name.
    #[error("another peer is called {0:?}")]
    NameTaken(String),
    /// Not `HOST:PORT`.
    #[error("a peer has at most 16 addresses, each HOST:PORT")]
    Addresses,
    /// There are as many peers as there can be.
    #[error("there are {PEERS_MAX} peers already")]
    Full,
    /// The system gives no randomness.
    #[error("no randomness to be had for a secret")]
    NoRandomness,
}

#[derive(Serialize, Deserialize)]
struct PeerRow {
    name: String,
    addresses: Vec<String>,
    told: Vec<String>,
    role: Role,
}

#[derive(Serialize, Deserialize)]
struct InviteRow {
    expires: i64,
    used_by: Option<PeerId>,
    role: Role,
}

impl Roster {
    /// Opens the roster whose rows are in `db`, and makes it if it is not there.
    pub fn open(db: Arc<Database>) -> Result<Self, RosterError> {
        let roster = Self { db, peers: Arc::default(), on_change: Arc::default() };
        let peers = roster.write("open the roster", |txn| {
            txn.open_table(INVITES)?;
            let table = txn.open_table(PEERS)?;
            let mut peers = BTreeMap::new();
            for row in table.iter()? {
                let (id, row) = row?;
                let (id, row) = (PeerId::from_bytes(*id.value()), decode::<PeerRow>(row.value())?);
                let PeerRow { name, addresses, told, role } = row;
                peers.insert(id, Peer { id, name, addresses, told, role });
            }
            Ok(peers)
        })?;
        *roster.peers.write().unwrap_or_else(PoisonError::into_inner) = peers;
        Ok(roster)
    }

    /// All peers, by id.
    pub fn peers(&self) -> Vec<Peer> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The peer with this id.
    pub fn get(&self, id: PeerId) -> Option<Peer> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// The peer with this name.
    pub fn by_name(&self, name: &str) -> Option<Peer> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).values().find(|peer| peer.name == name).cloned()
    }

    /// Trusts `peer` from now on, or changes its name or addresses. Durable on return.
    pub fn set(&self, peer: Peer) -> Result<(), RosterError> {
        if !is_name(&peer.name) {
            return Err(RosterError::Name(peer.name.chars().take(80).collect()));
        }
        if !are_addresses(&peer.addresses) || !are_addresses(&peer.told) {
            return Err(RosterError::Addresses);
        }
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        if peers.values().any(|other| other.name == peer.name && other.id != peer.id) {
            return Err(RosterError::NameTaken(peer.name));
        }
        if peers.len() >= PEERS_MAX && !peers.contains_key(&peer.id) {
            return Err(RosterError::Full);
        }
        self.put(&mut peers, peer)?;
        drop(peers);
        self.changed();
        Ok(())
    }

    /// Has `hear` called, from now on, after every change of a peer, and before whoever made it goes on. The first one stays.
    pub fn on_change(&self, hear: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_change.set(Box::new(hear));
    }

    fn changed(&self) {
        if let Some(hear) = self.on_change.get() {
            hear();
        }
    }

    /// Remembers where a peer says that it listens, if it is trusted. Durable on return.
    pub(crate) fn learn(&self, id: PeerId, told: Vec<String>) -> Result<(), RosterError> {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        match peers.get(&id).cloned() {
            Some(peer) if peer.told != told && are_addresses(&told) => self.put(&mut peers, Peer { told, ..peer })?,
            _ => return Ok(()),
        }
        drop(peers);
        self.changed();
        Ok(())
    }

    fn put(&self, peers: &mut BTreeMap<PeerId, Peer>, peer: Peer) -> Result<(), RosterError> {
        let Peer { id, name, addresses, told, role } = peer.clone();
        let row = PeerRow { name, addresses, told, role };
        self.write("add a peer", |txn| {
            txn.open_table(PEERS)?.insert(id.as_bytes(), &encode(&row)?[..])?;
            Ok(())
        })?;
        peers.insert(id, peer);
        Ok(())
    }

    /// A name like `wanted` that no peer but `id`, and not this machine, which is called `own`, has.
    pub fn free_name(&self, wanted: &str, id: PeerId, own: &str) -> String {
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        let taken = |name: &str| name == own || peers.values().any(|peer| peer.name == name && peer.id != id);
        let base: String = wanted.chars().take(40).collect();
        let numbered = (2..).map(|number| format!("{base}-{number}"));
        std::iter::once(wanted.to_owned()).chain(numbered).find(|name| !taken(name)).unwrap_or(base)
    }

    /// Trusts a peer no more. Durable on return. Tells whether it was trusted before.
    pub fn remove(&self, id: PeerId) -> Result<bool, RosterError> {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        self.write("remove a peer", |txn| {
            txn.open_table(PEERS)?.remove(id.as_bytes())?;
            Ok(())
        })?;
        let was_trusted = peers.remove(&id).is_some();
        drop(peers);
        self.changed();
        Ok(was_trusted)
    }

    /// A new secret for a ticket, good until `expires` for one peer, which gets `role`. It is kept only as its hash;
    /// those that expired before `now` are forgotten. Times are seconds since 1970.
    pub fn invite(&self, now: i64, expires: i64, role: Role) -> Result<[u8; 16], RosterError> {
        let mut secret = [0; 16];
        SystemRandom::new().fill(&mut secret).map_err(|_| RosterError::NoRandomness)?;
        self.write("make an invitation", |txn| {
            let mut invites = txn.open_table(INVITES)?;
            let mut stale = Vec::new();
            for row in invites.iter()? {
                let (key, row) = row?;
                if decode::<InviteRow>(row.value())?.expires <= now {
                    stale.push(*key.value());
                }
            }
            for key in &stale {
                invites.remove(key)?;
            }
            let row = InviteRow { expires, used_by: None, role };
            invites.insert(BlobId::of(&secret).as_bytes(), &encode(&row)?[..])?;
            Ok(())
        })?;
        Ok(secret)
    }

    /// Whether any invitation can still be used at `now`, seconds since 1970.
    pub fn has_invites(&self, now: i64) -> bool {
        let look = || -> Result<bool, redb::Error> {
            let txn = self.db.begin_read()?;
            for row in txn.open_table(INVITES)?.iter()? {
                if decode::<InviteRow>(row?.1.value())?.expires > now {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        look().unwrap_or(false)
    }

    /// Whether `secret` lets `peer` in at `now`; if so, it lets in nobody else from then on. Durable on return. The same peer
    /// may use it again: its first answer may have been lost.
    pub fn redeem(&self, secret: &[u8; 16], peer: PeerId, now: i64) -> Result<Redeemed, RosterError> {
        // The look-up is by hash, so its time says nothing about the secret.
        let key = BlobId::of(secret);
        self.write("use an invitation", |txn| {
            let mut invites = txn.open_table(INVITES)?;
            let row = invites.get(key.as_bytes())?.map(|row| decode::<InviteRow>(row.value())).transpose()?;
            let Some(mut row) = row.filter(|row| row.used_by.is_none_or(|by| by == peer)) else {
                return Ok(Redeemed::Unknown);
            };
            if row.expires <= now {
                return Ok(Redeemed::Expired(row.expires));
            }
            row.used_by = Some(peer);
            invites.insert(key.as_bytes(), &encode(&row)?[..])?;
            Ok(Redeemed::As(row.role))
        })
    }

    fn write<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, RosterError> {
        let run = || -> Result<T, redb::Error> {
            let mut txn = self.db.begin_write()?;
            txn.set_quick_repair(true);
            let result = body(&txn)?;
            txn.commit()?;
            Ok(result)
        };
        run().map_err(|source| RosterError::Database { action, source: Box::new(source) })
    }
}

fn encode<T: Serialize>(row: &T) -> Result<Vec<u8>, redb::Error> {
    postcard::to_stdvec(row).map_err(|error| redb::Error::Corrupted(format!("encode a row: {error}")))
}

/// Decodes a row. Rows from before there were roles end in front of it: they are of readers, whose number is 0.
fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, redb::Error> {
    let decoded = postcard::from_bytes(bytes).or_else(|_| postcard::from_bytes(&[bytes, &[0]].concat()));
    decoded.map_err(|error| redb::Error::Corrupted(format!("decode a row: {error}")))
}

/// Peer → [`PeerRow`].
const PEERS: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("peers.roster");
/// BLAKE3 hash of a secret → [`InviteRow`].
const INVITES: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("peers.invites");

const PEERS_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn a_roster() -> Roster {
        let db = Database::builder().create_with_backend(redb::backends::InMemoryBackend::new()).unwrap();
        Roster::open(Arc::new(db)).unwrap()
    }

    fn peer(id: u8, name: &str) -> Peer {
        Peer {
            id: PeerId::from_bytes([id; 32]),
            name: name.into(),
            addresses: vec!["localhost:1".into()],
            told: vec![],
            role: Role::Reader,
        }
    }

    #[test]
    fn a_secret_lets_in_one_peer_until_it_expires() {
        let roster = a_roster();
        let (a, b) = (peer(1, "a").id, peer(2, "b").id);
        let secret = roster.invite(100, 200, Role::Writer).unwrap();
        assert!(roster.has_invites(199) && !roster.has_invites(200));
        assert_eq!(roster.redeem(&[0; 16], a, 150).unwrap(), Redeemed::Unknown);
        assert_eq!(roster.redeem(&secret, a, 200).unwrap(), Redeemed::Expired(200));
        assert_eq!(roster.redeem(&secret, a, 150).unwrap(), Redeemed::As(Role::Writer));
        assert_eq!(roster.redeem(&secret, b, 150).unwrap(), Redeemed::Unknown);
        assert_eq!(roster.redeem(&secret, a, 150).unwrap(), Redeemed::As(Role::Writer));
        roster.invite(300, 400, Role::Reader).unwrap();
        assert_eq!(roster.redeem(&secret, a, 150).unwrap(), Redeemed::Unknown, "forgotten once it had expired");
    }

    #[test]
    fn names_are_unique_and_rows_survive() {
        let roster = a_roster();
        roster.set(peer(1, "nas")).unwrap();
        assert!(matches!(roster.set(peer(2, "nas")), Err(RosterError::NameTaken(_))));
        assert!(matches!(roster.set(peer(2, "a/b")), Err(RosterError::Name(_))));
        assert_eq!(roster.free_name("nas", peer(2, "").id, "laptop"), "nas-2");
        assert_eq!(roster.free_name("nas", peer(1, "").id, "laptop"), "nas");
        assert_eq!(roster.free_name("laptop", peer(2, "").id, "laptop"), "laptop-2");
        roster.set(peer(1, "closet")).unwrap();
        let writer = Peer { role: Role::Writer, ..peer(2, "laptop") };
        roster.set(writer.clone()).unwrap();
        let again = Roster::open(roster.db.clone()).unwrap();
        assert_eq!(again.peers(), [peer(1, "closet"), writer]);
        assert_eq!(again.by_name("closet"), Some(peer(1, "closet")));
        assert!(again.remove(peer(1, "").id).unwrap() && !again.remove(peer(1, "").id).unwrap());
    }

    #[test]
    fn rows_from_before_there_were_roles_are_of_readers() {
        let roster = a_roster();
        let old = (1..=2).map(|id| (peer(id, &format!("peer {id}")), PeerId::from_bytes([id; 32])));
        let (expected, ids): (Vec<_>, Vec<_>) = old.unzip();
        let rows = |txn: &WriteTransaction| {
            for Peer { id, name, addresses, told, .. } in &expected {
                txn.open_table(PEERS)?.insert(id.as_bytes(), &encode(&(name, addresses, told))?[..])?;
            }
            let invite = (200_i64, Some(ids[0]));
            txn.open_table(INVITES)?.insert(BlobId::of(&[7; 16]).as_bytes(), &encode(&invite)?[..])?;
            Ok(())
        };
        roster.write("write old rows", rows).unwrap();
        let again = Roster::open(roster.db.clone()).unwrap();
        assert_eq!(again.peers(), expected);
        assert!(again.has_invites(100));
        assert_eq!(again.redeem(&[7; 16], ids[1], 100).unwrap(), Redeemed::Unknown);
        assert_eq!(again.redeem(&[7; 16], ids[0], 100).unwrap(), Redeemed::As(Role::Reader));
    }
}
