//! Notices that this machine's network has changed: spec/wire.md, "When".

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use if_addrs::{IfOperStatus, get_if_addrs};
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv, socket_with,
};
use tokio::{
    io::unix::AsyncFd,
    time::{sleep, sleep_until},
};
use tracing::{debug, info};

use crate::{dial, endpoint::Inner};

/// What there is of a network: interfaces, their addresses, and whether they are up.
type Links = BTreeSet<(String, IpAddr, bool)>;

/// Tells changes from noise. Knows no clock and no network.
///
/// Whenever there is news, [`handle_news`](Self::handle_news); once [`due`](Self::due) has come,
/// [`handle_look`](Self::handle_look) with what there is then.
#[derive(Debug)]
struct Changes<T> {
    known: T,
    /// When the first and the last news came that have not been looked into.
    news: Option<(Instant, Instant)>,
}

impl<T: PartialEq> Changes<T> {
    fn new(known: T) -> Self {
        Self { known, news: None }
    }

    fn handle_news(&mut self, now: Instant) {
        let first = self.news.map_or(now, |(first, _)| first);
        self.news = Some((first, now));
    }

    /// When to look; never, if there is no news.
    fn due(&self) -> Option<Instant> {
        self.news.map(|(first, last)| (last + SETTLED).min(first + SETTLED_MAX))
    }

    /// Whether what there is now is something else than before.
    fn handle_look(&mut self, now: T) -> bool {
        self.news = None;
        let is_other = self.known != now;
        self.known = now;
        is_other
    }
}

/// Has all peers dialled when the network changes, until we shut down. Where the system tells nothing of its network,
/// this ends at once.
pub(crate) async fn watch(inner: Arc<Inner>) {
    let socket = match listen() {
        Ok(socket) => socket,
        Err(error) => return debug!(reason = tree::reason(&error), "changes of the network are not noticed here"),
    };
    let mut closing = inner.closing.subscribe();
    let mut changes = Changes::new(links());
    while !*closing.borrow() {
        let due = changes.due();
        tokio::select! {
            () = news(&socket) => changes.handle_news(Instant::now()),
            () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {
                if changes.handle_look(links()) {
                    info!("the network changed: all peers are dialled");
                    inner.find_addresses();
                    dial::start_anew(&inner);
                }
            }
            _ = closing.changed() => {}
        }
    }
}

/// A socket on which the kernel tells of changes of links, addresses and routes.
fn listen() -> io::Result<AsyncFd<rustix::fd::OwnedFd>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    #[expect(deprecated, reason = "unsound for what may change its descriptor; an OwnedFd does not")]
    AsyncFd::new(socket)
}

/// Waits for news, and takes in all that there is. That some were lost is news too.
async fn news(socket: &AsyncFd<rustix::fd::OwnedFd>) {
    let Ok(mut ready) = socket.readable().await else { return sleep(SETTLED).await };
    let mut buffer = [0; 4096];
    loop {
        match ready.try_io(|socket| Ok(recv(socket, &mut buffer, RecvFlags::TRUNC)?)) {
            Ok(Ok(_)) => {}
            // However often it fails, that must cost nothing.
            Ok(Err(_)) => return sleep(SETTLED).await,
            Err(_) => return,
        }
    }
}

fn links() -> Links {
    let interfaces = get_if_addrs().unwrap_or_default().into_iter();
    interfaces.map(|link| (link.name.clone(), link.ip(), link.oper_status == IfOperStatus::Up)).collect()
}

/// RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
/// How long there must be no more news, and how long that is waited for at most.
const SETTLED: Duration = Duration::from_millis(500);
const SETTLED_MAX: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_one_change_and_noise_is_none() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let mut changes = Changes::new("wifi");
        assert_eq!(changes.due(), None);
        changes.handle_news(at(0));
        assert_eq!(changes.due(), Some(at(500)));
        changes.handle_news(at(400));
        assert_eq!(changes.due(), Some(at(900)));
        for ms in (500..3000).step_by(100) {
            changes.handle_news(at(ms));
        }
        assert_eq!(changes.due(), Some(at(2000)), "it is looked at even if it never rests");
        assert!(!changes.handle_look("wifi"), "down and up again is no change");
        assert_eq!(changes.due(), None);
        changes.handle_news(at(4000));
        assert!(changes.handle_look("cable"));
        changes.handle_news(at(5000));
        assert!(!changes.handle_look("cable"));
    }
}
