use std::{io, sync::Arc, time::Duration};

use namespace::PeerId;
use quinn::ConnectionError;
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::{
    Peer, Peers, Redeemed, Role, RosterError, Ticket,
    connection::plain,
    dial,
    endpoint::{Close, Inner, unix_now},
    frame::{FrameError, GREETING_BYTES_MAX, read_frame, write_frame},
    hello::Hello,
    race::{Flaw, FlawKind, Limits},
    racing::{self, behind_the_key},
    tls::JOIN_ALPN,
};

/// Why pairing failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The ticket's time is over.
    #[error(
        "the ticket has expired, at {}, and this machine's clock says {}; ask for a new one",
        in_words(*.at),
        in_words(*.now)
    )]
    Expired {
        /// When it did, in seconds since 1970.
        at: i64,
        /// What this machine's clock says, in seconds since 1970.
        now: i64,
    },
    /// The ticket is our own.
    #[error("this machine made the ticket; use it on another one")]
    Ourselves,
    /// The inviting peer has no address.
    #[error("the ticket has no address: the machine that made it does not listen")]
    NoAddress,
    /// The inviting peer could not be reached at any of its addresses.
    #[error("reach {peer}")]
    Unreachable {
        /// What it calls itself.
        peer: String,
        /// What came of each address.
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
        let Hello { name, addresses, .. } = self.inner.hello(self.me());
        Ok(Ticket { peer: self.me(), name, addresses, secret, expires })
    }

    /// Pairs with the machine that made `ticket`: afterwards each trusts the other. Returns it as it is called here.
    pub async fn join(&self, ticket: &Ticket) -> Result<Peer, JoinError> {
        let inner = &self.inner;
        if ticket.peer == self.me() {
            return Err(JoinError::Ourselves);
        }
        let now = unix_now();
        if ticket.expires <= now {
            return Err(JoinError::Expired { at: ticket.expires, now });
        }
        if ticket.addresses.is_empty() {
            return Err(JoinError::NoAddress);
        }
        let hand_in = |connection| hand_in(inner.clone(), ticket.peer, ticket.secret, connection);
        match racing::first(inner, ticket.peer, JOIN_ALPN, ticket.addresses.clone(), JOIN, hand_in).await {
            Ok(Answer::Accepted(hello)) => {
                let told = if hello.is_valid() { hello.addresses } else { ticket.addresses.clone() };
                let peer = inner.trust(ticket.peer, &ticket.name, told, None)?;
                info!(peer = peer.name, id = %peer.id, "joined");
                dial::urge(inner, peer.id);
                Ok(peer)
            }
            Ok(Answer::Refused(reason)) => {
                let reason = reason.chars().filter(|c| !c.is_control()).take(200).collect();
                Err(JoinError::Refused { peer: ticket.name.clone(), reason })
            }
            Err(flaw) => Err(JoinError::Unreachable { peer: ticket.name.clone(), source: io::Error::other(flaw.why) }),
        }
    }
}

async fn hand_in(
    inner: Arc<Inner>,
    peer: PeerId,
    secret: [u8; 16],
    connection: quinn::Connection,
) -> Result<Answer, Flaw> {
    let exchange = async {
        let (mut send, mut recv) = connection.open_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        write_frame(&mut send, &Request { secret, hello: inner.hello(peer) }).await?;
        let _ = send.finish();
        read_frame(&mut recv, GREETING_BYTES_MAX).await
    };
    let answer = exchange.await.map_err(|error| match behind_the_key(&connection, &error) {
        // Whoever has tickets out lets everybody hand one in.
        Flaw { kind: FlawKind::Refused, .. } => {
            Flaw::new(FlawKind::Refused, "refused: no ticket of it is good any more; ask for a new one")
        }
        flaw => flaw,
    });
    connection.close(Close::Done.code(), b"");
    answer
}

/// Takes a ticket from a peer that we do not know yet. The caller bounds the time that this takes.
pub(crate) async fn serve(inner: &Arc<Inner>, connection: &quinn::Connection, peer: PeerId) {
    let exchange = async {
        let (mut send, mut recv) = connection.accept_bi().await.map_err(|error| FrameError::Stream(error.into()))?;
        let request: Request = read_frame(&mut recv, GREETING_BYTES_MAX).await?;
        let answer = match admit(inner, peer, &request) {
            Ok(()) => Answer::Accepted(inner.hello(peer)),
            Err(reason) => Answer::Refused(reason),
        };
        write_frame(&mut send, &answer).await?;
        let _ = send.finish();
        // The joiner closes when it has the answer.
        connection.closed().await;
        Ok::<_, FrameError>(())
    };
    if let Err(error) = exchange.await {
        let address = plain(connection.remote_address());
        if was_let_go(connection) {
            return debug!(%peer, %address, "it hands its ticket in elsewhere");
        }
        warn!(%peer, %address, reason = tree::reason(&error), "refused: no ticket came");
        connection.close(Close::Misbehaved.code(), b"no ticket came");
    }
}

/// Whether the other side closed the connection without a word, as it does with all but one that it dialled.
fn was_let_go(connection: &quinn::Connection) -> bool {
    matches!(connection.close_reason(), Some(ConnectionError::ApplicationClosed(close))
        if close.error_code == Close::Done.code())
}

fn admit(inner: &Arc<Inner>, peer: PeerId, request: &Request) -> Result<(), String> {
    let refused = |reason: &str| {
        warn!(%peer, reason, "a ticket was refused");
        Err(reason.to_owned())
    };
    if !request.hello.is_valid() {
        return refused("the name or the addresses are out of bounds");
    }
    let now = unix_now();
    let role = match inner.roster.redeem(&request.secret, peer, now) {
        Ok(Redeemed::As(role)) => role,
        Ok(Redeemed::Expired(at)) => {
            let (at, now) = (in_words(at), in_words(now));
            return refused(&format!("it has expired, at {at}, and the clock there says {now}"));
        }
        Ok(Redeemed::Unknown) => return refused("it was used before, has expired, or was never made"),
        Err(error) => return refused(&tree::reason(&error)),
    };
    match inner.trust(peer, &request.hello.name, request.hello.addresses.clone(), Some(role)) {
        Ok(joined) => info!(peer = joined.name, id = %peer, "joined"),
        Err(error) => return refused(&tree::reason(&error)),
    }
    dial::urge(inner, peer);
    Ok(())
}

/// A time in seconds since 1970, as people read it.
fn in_words(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| format!("second {seconds}"), |time| time.to_string())
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

const JOIN: Limits =
    Limits { resolve: Duration::from_secs(5), attempt: Duration::from_secs(10), all: Duration::from_secs(20) };
