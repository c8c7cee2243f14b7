//! Who may change what is in this machine's arenas. Reading is not restricted.

use std::collections::BTreeMap;

use namespace::ArenaName;
use serde::{Deserialize, Serialize};

use crate::Peer;

/// What a peer may do in every arena of this machine, unless [`Roles`] say otherwise. On disk it is its number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// List and read.
    #[default]
    Reader,
    /// Also put files into arenas, replace them, and remove them.
    Writer,
}

/// What the user's configuration says of peers, by name or id; it takes the place of the [`Role`] on the roster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// The arenas that a peer may write to; `*` stands for all.
    pub writers: BTreeMap<String, Vec<String>>,
}

impl Roles {
    /// The arenas that `peer` may write to, `*` standing for all. What is said of its id counts before what is said of
    /// its name.
    pub fn writable(&self, peer: &Peer) -> Vec<String> {
        match self.writers.get(&peer.id.to_string()).or_else(|| self.writers.get(&peer.name)) {
            Some(arenas) => arenas.clone(),
            None if peer.role == Role::Writer => vec![ALL.to_owned()],
            None => Vec::new(),
        }
    }

    /// Whether `peer` may change what is in `arena`.
    pub fn may_write(&self, peer: &Peer, arena: &ArenaName) -> bool {
        self.writable(peer).iter().any(|named| named == ALL || named == arena.as_str())
    }
}

const ALL: &str = "*";

#[cfg(test)]
mod tests {
    use namespace::PeerId;

    use super::*;

    #[test]
    fn nobody_writes_unless_somebody_said_so() {
        let peer = |role| Peer {
            id: PeerId::from_bytes([7; 32]),
            name: "laptop".into(),
            addresses: Vec::new(),
            told: Vec::new(),
            role,
        };
        let id = peer(Role::Reader).id.to_string();
        let check = |role, said: &[(&str, &[&str])], expected: [bool; 2]| {
            let owned = |arenas: &[&str]| arenas.iter().map(|&arena| arena.to_owned()).collect();
            let writers = said.iter().map(|&(who, arenas)| (who.to_owned(), owned(arenas))).collect();
            let roles = Roles { writers };
            let may = ["inbox", "*x"].map(|arena| roles.may_write(&peer(role), &arena.parse().unwrap()));
            assert_eq!(may, expected, "{role:?} {said:?}");
        };
        check(Role::Reader, &[], [false, false]);
        check(Role::Writer, &[], [true, true]);
        check(Role::Reader, &[("laptop", &["inbox"])], [true, false]);
        check(Role::Reader, &[("laptop", &["*"])], [true, true]);
        check(Role::Reader, &[("laptops", &["*"]), ("lapto", &["*"])], [false, false]);
        check(Role::Reader, &[(&id, &["inbox"])], [true, false]);
        // The configuration beats the roster, and an id a name.
        check(Role::Writer, &[("laptop", &[])], [false, false]);
        check(Role::Reader, &[(&id, &[]), ("laptop", &["*"])], [false, false]);
    }
}
