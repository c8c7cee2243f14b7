//! A network between two machines, for packets of every protocol.

use std::sync::{Arc, atomic::Ordering};

use tappers::Tun;

use super::carry::{Fate, Quality, Shared, Way, carry, lock};
use crate::{Network, skipped};

/// Two networks of their own with a link between them that carries IP packets late, at a limited rate, and not all of them, as
/// it is set. So QUIC and TCP meet the same conditions, and there is no way around it.
pub struct IpLink {
    /// The networks of the machines at [`IpLink::ADDRESSES`].
    pub networks: [Network; 2],
    shared: Arc<Shared>,
}

impl IpLink {
    /// Where the machines are, in the order of the networks.
    pub const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];

    /// Makes both networks, and the link; `None`, and a word on standard error, where that is not possible.
    pub fn start(quality: Quality) -> Option<Self> {
        let networks = [Network::new()?, Network::new()?];
        let shared = Arc::new(Shared::new(quality));
        let mut ends = Vec::new();
        for (network, address) in networks.iter().zip(Self::ADDRESSES) {
            let opened = Tun::new().and_then(|tun| Ok((tun.name()?.name().into_string().unwrap_or_default(), tun)));
            let (name, tun) =
                opened.map_err(|error| skipped(&format!("no TUN device can be made here: {error}"))).ok()?;
            // It is made in this process's network, and then moved.
            let moved = std::process::Command::new("ip")
                .args(["link", "set", "dev", &name, "netns", &network.pid().to_string()])
                .status();
            if !moved.is_ok_and(|status| status.success()) {
                skipped("a TUN device cannot be moved to another network here");
                return None;
            }
            network.run(&format!(
                "ip addr add {address}/24 dev {name} && ip link set dev {name} mtu 1500 txqueuelen 10000 up"
            ));
            ends.push(Arc::new(tun));
        }
        for (way, from, to) in [(Way::There, 0, 1), (Way::Back, 1, 0)] {
            let (from, to) = (ends[from].clone(), ends[to].clone());
            carry(way, shared.clone(), move |buffer| from.recv(buffer), move |packet| to.send(packet).map(drop));
        }
        Some(Self { networks, shared })
    }

    /// Treats what is sent from now on so.
    pub fn set(&self, quality: Quality) {
        *lock(&self.shared.quality) = quality;
    }

    /// Has `fates` decide on each packet from now on, beside the quality.
    pub fn interfere(&self, fates: impl FnMut(Way, u64) -> Fate + Send + 'static) {
        *lock(&self.shared.fates) = Box::new(fates);
    }

    /// How many bytes of packets arrived so far: there and back.
    pub fn carried(&self) -> [u64; 2] {
        self.shared.carried()
    }
}

impl Drop for IpLink {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
    }
}
