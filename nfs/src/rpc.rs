//! Remote procedure calls as bytes: RFC 5531 without its authentication, which nobody need believe.

use nfs3_types::{
    rpc::{accept_stat_data, accepted_reply, auth_stat, msg_body, opaque_auth, rejected_reply, reply_body, rpc_msg},
    xdr_codec::Pack,
};

/// A call, its arguments not yet looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call<'a> {
    pub(crate) xid: u32,
    pub(crate) program: u32,
    pub(crate) version: u32,
    pub(crate) procedure: u32,
    pub(crate) args: Args<'a>,
}

/// Why a record is not answered as a call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NoCall {
    /// It is none: its sender is not to be talked to.
    Garbage,
    /// It is one that is denied, with this answer.
    Denied(Vec<u8>),
}

/// What is left of a call's arguments, or of anything in XDR (RFC 4506). Nothing is copied, and no length is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Args<'a>(pub(crate) &'a [u8]);

/// The arguments are not what the procedure takes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Garbage;

impl<'a> Args<'a> {
    pub(crate) fn u32(&mut self) -> Result<u32, Garbage> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Garbage)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*bytes))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Garbage> {
        Ok(u64::from(self.u32()?) << 32 | u64::from(self.u32()?))
    }

    /// Variable-length opaque data of at most `max` bytes.
    pub(crate) fn opaque(&mut self, max: usize) -> Result<&'a [u8], Garbage> {
        let len = usize::try_from(self.u32()?).ok().filter(|&len| len <= max).ok_or(Garbage)?;
        let (bytes, rest) = self.0.split_at_checked(len.next_multiple_of(4)).ok_or(Garbage)?;
        self.0 = rest;
        Ok(&bytes[..len])
    }

    /// Nothing may be left.
    pub(crate) fn end(self) -> Result<(), Garbage> {
        if self.0.is_empty() { Ok(()) } else { Err(Garbage) }
    }
}

impl<'a> Call<'a> {
    pub(crate) fn parse(record: &'a [u8]) -> Result<Self, NoCall> {
        let mut args = Args(record);
        let parse = |args: &mut Args<'a>| {
            let (xid, kind, rpc) = (args.u32()?, args.u32()?, args.u32()?);
            Ok((xid, kind, rpc))
        };
        let (xid, CALL, rpc) = parse(&mut args).map_err(|Garbage| NoCall::Garbage)? else {
            return Err(NoCall::Garbage);
        };
        if rpc != RPC_VERSION {
            let denied = rejected_reply::rpc_mismatch(RPC_VERSION, RPC_VERSION);
            return Err(NoCall::Denied(message(xid, reply_body::MSG_DENIED(denied))));
        }
        let mut parse = || {
            let (program, version, procedure, flavour) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
            args.opaque(AUTH_BYTES_MAX)?;
            args.u32()?;
            args.opaque(AUTH_BYTES_MAX)?;
            Ok((program, version, procedure, flavour))
        };
        let (program, version, procedure, flavour) = parse().map_err(|Garbage| NoCall::Garbage)?;
        if !matches!(flavour, AUTH_NONE | AUTH_SYS) {
            let denied = rejected_reply::auth_error(auth_stat::AUTH_REJECTEDCRED);
            return Err(NoCall::Denied(message(xid, reply_body::MSG_DENIED(denied))));
        }
        Ok(Self { xid, program, version, procedure, args })
    }
}

/// An answer, without what the procedure gives, which comes right behind it.
pub(crate) fn accepted(xid: u32, reply_data: accept_stat_data) -> Vec<u8> {
    message(xid, reply_body::MSG_ACCEPTED(accepted_reply { verf: opaque_auth::default(), reply_data }))
}

/// Appends what `value` is in XDR.
pub(crate) fn pack(value: &impl Pack, out: &mut Vec<u8>) {
    // Nothing that is given here is longer than 2³² - 1 bytes, and a Vec takes everything.
    let _ = value.pack(out);
}

fn message(xid: u32, body: reply_body<'static>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REPLY_BYTES);
    pack(&rpc_msg { xid, body: msg_body::REPLY(body) }, &mut bytes);
    bytes
}

const CALL: u32 = 0;
const RPC_VERSION: u32 = 2;
const AUTH_NONE: u32 = 0;
const AUTH_SYS: u32 = 1;
/// RFC 5531, section 8.2.
const AUTH_BYTES_MAX: usize = 400;
/// What most answers fit into.
const REPLY_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    #[test]
    fn calls_are_understood_or_denied() {
        let whole = words(&[7, 0, 2, 100_003, 3, 1, 1, 8, 1, 2, 0, 0, 42]);
        let call = Call::parse(&whole).unwrap();
        assert_eq!((call.xid, call.program, call.version, call.procedure), (7, 100_003, 3, 1));
        assert_eq!(call.args, Args(&words(&[42])));
        for len in 0..whole.len() - 4 {
            assert_eq!(Call::parse(&whole[..len]), Err(NoCall::Garbage), "{len} bytes");
        }
        let parse = |some: &[u32]| Call::parse(&words(some)).map(|_| ()).unwrap_err();
        assert_eq!(parse(&[7, 1, 0, 0, 0, 0]), NoCall::Garbage, "an answer is no call");
        assert_eq!(parse(&[7, 0, 3, 100_003]), NoCall::Denied(words(&[7, 1, 1, 0, 2, 2])));
        assert_eq!(parse(&[7, 0, 2, 100_003, 3, 1, 6, 0, 0, 0]), NoCall::Denied(words(&[7, 1, 1, 1, 2])));
        // Credentials of 4 GiB, and of one byte more than there may be.
        assert_eq!(parse(&[7, 0, 2, 100_003, 3, 1, 1, u32::MAX, 0, 0]), NoCall::Garbage);
        let mut long = words(&[7, 0, 2, 100_003, 3, 1, 1, 401]);
        long.resize(600, 0);
        assert_eq!(Call::parse(&long), Err(NoCall::Garbage));
        assert_eq!(accepted(9, accept_stat_data::PROC_UNAVAIL), words(&[9, 1, 0, 0, 0, 3]));
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200), max in 0..100usize) {
            let _ = Call::parse(&bytes);
            let mut args = Args(&bytes);
            while let Ok(opaque) = args.opaque(max) {
                prop_assert!(opaque.len() <= max);
            }
        }
    }
}
