use std::{io, sync::Arc, time::Duration};

use namespace::PeerId;
use serde::{Deserialize, Serialize};
use tokio::{net::lookup_host, time::timeout};
use tracing::{info, warn};

use crate::{
    Peer, Peers, Role, RosterError, Ticket,
    connection::why_closed,
    dial,
    endpoint::{Close, GREETING_LIMIT, Inner, unix_now},
    frame::{FrameError, GREETING_BYTES_MAX, read_frame, write_frame},
    hello::Hello,
    tls::JOIN_ALPN,
};

/// Why pairing failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The ticket's time is over.
    #[error("the ticket has expired; ask for a new one")]
    Expired,
    /// The ticket is our own.
    #[error("this machine made the ticket; use it on another one")]
    Ourselves,
    /// The inviting peer has no address.
    #[error("the ticket has no address: the machine that made it does not listen")]
    NoAddress,
    /// The inviting peer could not be reached at any of its addresses.
    #[error("reach {peer} at {}", .addresses.join(", "))]
    Unreachable {
        /// What it calls itself.
        peer: String,
        /// Where it was looked for.
        addresses: Vec<String>,
        /// Why the last of these failed.
        source: io::Error,
    },
    /// The inviting peer said no.
    #[error("{peer} refused the ticket: {reason}")]
    Refused {
        /// What it calls itself.
        peer: String,
        /// What it said.
        reason: String,
    },
    /// The pairing could not be remembered.
    #[error(transparent)]
    Roster(#[from] RosterError),
}

#[derive(Serialize, Deserialize)]
struct Request {
    secret: [u8; 16],
    hello: Hello,
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Accepted(Hello),
    Refused(String),
}

impl Peers {
    /// Makes a ticket that lets one other machine in, as `role`, for `lifetime`. Durable on return.
    pub fn invite(&self, lifetime: Duration, role: Role) -> Result<Ticket, RosterError> {
        let now = unix_now();
        let expires = now.saturating_add_unsigned(lifetime.as_secs());
        let secret = self.inner.roster.invite(now, expires, role)?;
        let Hello { name, addresses } = self.inner.hello();
        Ok(Ticket { peer: self.me(), name, addresses, secret, expires })
    }

    /// Pairs with the machine that made `ticket`: afterwards each trusts the other. Returns it as it is called here.
    pub async fn join(&self, ticket: &Ticket) -> Result<Peer, JoinError> {
        let inner = &self.inner;
        if ticket.peer == self.me() {
            return Err(JoinError::Ourselves);
        }
        if ticket.expires <= unix_now() {
            return Err(JoinError::Expired);
        }
        let mut last = None;
        for address in &ticket.addresses {
            let attempt = async {
                let mut sockets = lookup_host(address).await?;
                let socket = sockets.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
                hand_in(inner, ticket, socket).await
            };
            let answer = timeout(GREETING_LIMIT, attempt).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            match answer {
                Ok(Answer::Accepted(hello)) => {
                    let told = if hello.is_valid() { hello.addresses } else { ticket.addresses.clone() };
                    let peer = inner.trust(ticket.peer, &ticket.name, told, None)?;
                    dial::start(inner, peer.id);
                    return Ok(peer);
                }
                Ok(Answer::Refused(reason)) => {
                    let reason = reason.chars().filter(|c| !c.is_control()).take(200).collect();
                    return Err(JoinError::Refused { peer: ticket.name.clone(), reason });
                }
                Err(error) => last = Some(error),
            }
        }
        let source = last.ok_or(JoinError::NoAddress)?;
        Err(JoinError::Unreachable { peer: ticket.name.clone(), addresses: ticket.addresses.clone(), source })
    }
}

async fn hand_in(inner: &Inner, ticket: &Ticket, address: std::net::SocketAddr) -> io::Result<Answer> {
    let connection = inner.connect(ticket.peer, address, JOIN_ALPN).await?;
    let exchange = async {
        let (mut send, mut recv) = connection.open_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        write_frame(&mut send, &Request { secret: ticket.secret, hello: inner.hello() }).await?;
        let _ = send.finish();
        read_frame(&mut recv, GREETING_BYTES_MAX).await
    };
    let answer = exchange.await.map_err(|error| why_closed(&connection, error));
    connection.close(Close::Done.code(), b"");
    answer
}

/// Takes a ticket from a peer that we do not know yet. The caller bounds the time that this takes.
pub(crate) async fn serve(inner: &Arc<Inner>, connection: &quinn::Connection, peer: PeerId) {
    let exchange = async {
        let (mut send, mut recv) = connection.accept_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        let request: Request = read_frame(&mut recv, GREETING_BYTES_MAX).await?;
        let answer = match admit(inner, peer, &request) {
            Ok(()) => Answer::Accepted(inner.hello()),
            Err(reason) => Answer::Refused(reason),
        };
        write_frame(&mut send, &answer).await?;
        let _ = send.finish();
        // The joiner closes when it has the answer.
        connection.closed().await;
        Ok::<_, FrameError>(())
    };
    if let Err(error) = exchange.await {
        warn!(%peer, from = %connection.remote_address(), %error, "refused: no ticket came");
        connection.close(Close::Misbehaved.code(), b"no ticket came");
    }
}

fn admit(inner: &Arc<Inner>, peer: PeerId, request: &Request) -> Result<(), String> {
    let refused = |reason: &str| {
        warn!(%peer, reason, "a ticket was refused");
        Err(reason.to_owned())
    };
    if !request.hello.is_valid() {
        return refused("the name or the addresses are out of bounds");
    }
    let role = match inner.roster.redeem(&request.secret, peer, unix_now()) {
        Ok(Some(role)) => role,
        Ok(None) => return refused("it was used before, has expired, or was never made"),
        Err(error) => return refused(&error.to_string()),
    };
    match inner.trust(peer, &request.hello.name, request.hello.addresses.clone(), Some(role)) {
        Ok(joined) => info!(peer = joined.name, id = %peer, "joined"),
        Err(error) => return refused(&error.to_string()),
    }
    dial::start(inner, peer);
    Ok(())
}

impl Inner {
    /// Puts a peer on the roster; one that is on it keeps its name and the addresses that the user gave it, and its role
    /// unless there is a new one.
    fn trust(&self, id: PeerId, name: &str, told: Vec<String>, role: Option<Role>) -> Result<Peer, RosterError> {
        let new = || {
            let name = self.roster.free_name(name, id, &self.name);
            Peer { id, name, addresses: Vec::new(), told: Vec::new(), role: Role::default() }
        };
        let known = self.roster.get(id).unwrap_or_else(new);
        let peer = Peer { told, role: role.unwrap_or(known.role), ..known };
        self.roster.set(peer.clone())?;
        Ok(peer)
    }
}
