use serde::{Deserialize, Serialize};

/// What each side says of itself when a connection begins, dialler first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What it calls itself: a hint, never an identity.
    pub name: String,
    /// Where it listens, each `HOST:PORT`; none if it is deaf.
    pub addresses: Vec<String>,
    /// Whether it knows packed answers.
    pub packs: bool,
    /// A number that was drawn at random when its program started.
    pub run: u64,
    /// Whether it has seen two machines run with the key of whom it says this to.
    pub twins: bool,
}

impl Hello {
    /// Whether this stays within the bounds: a name of 1 to 64 bytes, at most 16 addresses of at most 255 bytes.
    pub(crate) fn is_valid(&self) -> bool {
        is_name(&self.name) && are_addresses(&self.addresses)
    }
}

/// Whether `name` can be a peer's name: 1 to 64 bytes without `/`, `:` and control characters, not starting with `-`.
pub(crate) fn is_name(name: &str) -> bool {
    let bad = |c: char| c == '/' || c == ':' || c.is_control();
    (1..=64).contains(&name.len()) && !name.starts_with('-') && !name.contains(bad)
}

/// Whether these can be a peer's addresses.
pub(crate) fn are_addresses(addresses: &[String]) -> bool {
    addresses.len() <= 16 && addresses.iter().all(|address| is_address(address))
}

/// Whether `address` looks like `HOST:PORT`, an IPv6 host in brackets.
pub(crate) fn is_address(address: &str) -> bool {
    is_listen_address(address) && !address.rsplit_once(':').is_some_and(|(_, port)| port.parse() == Ok(0_u16))
}

/// The same, where the port may be 0: one that the system chooses.
pub(crate) fn is_listen_address(address: &str) -> bool {
    address.len() <= 255
        && !address.chars().any(|c| c.is_control() || c.is_whitespace())
        && address.rsplit_once(':').is_some_and(|(host, port)| {
            let bare = !host.contains(':') || (host.starts_with('[') && host.ends_with(']'));
            !host.is_empty() && bare && port.parse::<u16>().is_ok()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for good in ["localhost:7700", "127.0.0.1:1", "[::1]:7700", "nas.example:65535"] {
            assert!(is_address(good), "{good}");
        }
        for bad in ["", "localhost", ":7700", "::1:7700", "host:0", "host:65536", "host:x", "ho st:1", "host:1\n"] {
            assert!(!is_address(bad), "{bad}");
        }
        assert!(is_listen_address("[::]:0") && !is_listen_address("[::]") && !is_address("host:00"));
    }
}
