use std::{fmt, str::FromStr};

use data_encoding::BASE32_NOPAD;
use namespace::PeerId;
use serde::{Deserialize, Serialize};
use tree::BlobId;

use crate::hello::{are_addresses, is_name};

/// An invitation to pair, to be carried by people: who invites, where it listens, and a secret that works once.
///
/// Its text is lower-case: `blob`, then in base 32 the version 1, the fields in postcard, and the first 4 bytes of
/// the BLAKE3 hash of these, by which a slip of the pen is told from an invitation that is no good.
/// Format: spec/wire.md, "Tickets".
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The inviting peer; the one that is dialled must be this.
    pub peer: PeerId,
    /// What it calls itself.
    pub name: String,
    /// Where it listens, each `HOST:PORT`.
    pub addresses: Vec<String>,
    /// Known to nobody but who made the ticket and who holds it.
    pub secret: [u8; 16],
    /// When it stops working, in seconds since 1970.
    pub expires: i64,
}

/// Why a text is no ticket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It does not start as tickets do, or has characters that no ticket has.
    #[error("this is no ticket: a ticket starts with \"blob\" and has letters and the digits 2 to 7 only")]
    NoTicket,
    /// A character is missing or wrong.
    #[error("the ticket is damaged: was all of it copied?")]
    Damaged,
    /// A newer program made it.
    #[error("the ticket is of a kind that this program does not know; is it up to date?")]
    UnknownVersion,
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = postcard::to_extend(self, vec![VERSION]).map_err(|_| fmt::Error)?;
        let checksum = BlobId::of(&bytes);
        bytes.extend_from_slice(&checksum.as_bytes()[..CHECKSUM_BYTES]);
        write!(f, "{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_lowercase())
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let text = text.trim().to_ascii_uppercase();
        let digits = text.strip_prefix(&PREFIX.to_uppercase()).ok_or(TicketError::NoTicket)?;
        if digits.len() > TICKET_BYTES_MAX
            || !digits.bytes().all(|b| b.is_ascii_uppercase() || (b'2'..=b'7').contains(&b))
        {
            return Err(TicketError::NoTicket);
        }
        let bytes = BASE32_NOPAD.decode(digits.as_bytes()).map_err(|_| TicketError::Damaged)?;
        let (bytes, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(TicketError::Damaged)?;
        if BlobId::of(bytes).as_bytes()[..CHECKSUM_BYTES] != checksum[..] {
            return Err(TicketError::Damaged);
        }
        let fields = bytes.strip_prefix(&[VERSION]).ok_or(TicketError::UnknownVersion)?;
        let ticket: Ticket = postcard::from_bytes(fields).map_err(|_| TicketError::Damaged)?;
        if !is_name(&ticket.name) || !are_addresses(&ticket.addresses) {
            return Err(TicketError::Damaged);
        }
        Ok(ticket)
    }
}

impl fmt::Debug for Ticket {
    /// Leaves out the secret, so that it gets into no log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("peer", &self.peer).field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

const PREFIX: &str = "blob";
const VERSION: u8 = 1;
const CHECKSUM_BYTES: usize = 4;
const TICKET_BYTES_MAX: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn a_ticket() -> Ticket {
        Ticket {
            peer: PeerId::from_bytes([7; 32]),
            name: "nas".into(),
            addresses: vec!["192.0.2.1:7700".into(), "[2001:db8::1]:7700".into()],
            secret: *b"0123456789abcdef",
            expires: 2_000_000_000,
        }
    }

    #[test]
    fn text_and_back() {
        let text = a_ticket().to_string();
        assert_eq!(
            text,
            "blobaedqobyha4dqobyha4dqobyha4dqobyha4dqobyha4dqobyha4dqoa3omfzqedrrhezc4mbogixdcorxg4ydaes3giydamj2mrrdqor2gfotunzxgaydamjsgm2dknrxha4wcytdmrswnagqvtzq4rorc35q"
        );
        for text in [text.clone(), text.to_uppercase(), format!(" {text}\n")] {
            assert_eq!(text.parse(), Ok(a_ticket()));
        }
        assert!(!format!("{:?}", a_ticket()).contains("0123"));
    }

    #[test]
    fn slips_are_found() {
        let text = a_ticket().to_string();
        for at in 4..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'a' { b'b' } else { b'a' };
            // The last digit has bits to spare, which must be zero.
            assert!(String::from_utf8(bytes).unwrap().parse::<Ticket>().is_err(), "at {at}");
            assert!(text[..at].parse::<Ticket>().is_err(), "cut at {at}");
        }
        assert_eq!("hello".parse::<Ticket>(), Err(TicketError::NoTicket));
        assert_eq!("blob".parse::<Ticket>(), Err(TicketError::Damaged));
    }
}
