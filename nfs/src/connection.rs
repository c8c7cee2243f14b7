//! One client's connection: calls in, answers out as they finish. Bounds: spec/nfs.md, "Answering".

use std::{
    io::{self, IoSlice},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use nfs3_types::{mount, nfs3, rpc::accept_stat_data};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::Semaphore,
    time::timeout,
};

use crate::{
    export::Export,
    mountd,
    procedures::{self, Reply},
    record::{RecordError, Records, mark},
    rpc::{Call, NoCall, accepted},
};

/// Why a connection ended, other than that the client ended it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("it sent what is no call")]
    Garbage,
    #[error("it took nothing of an answer for {TAKE_LIMIT:?}")]
    Stuck,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Answers what comes until the client goes.
pub(crate) async fn serve(
    export: &Export,
    reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
) -> Result<(), ConnectionError> {
    let mut records = Records::new(reader);
    let room = Arc::new(Semaphore::new(ROOM_BYTES));
    let mut answers = FuturesUnordered::new();
    let mut is_over = false;
    while !is_over || !answers.is_empty() {
        let first = tokio::select! {
            biased;
            Some(reply) = answers.next(), if !answers.is_empty() => reply?,
            record = records.next(), if !is_over && answers.len() < ANSWERS_MAX => {
                match record? {
                    Some(record) => answers.push(answer(export, record, room.clone())),
                    None => is_over = true,
                }
                continue;
            }
        };
        // With what is answered by now, and what can be at once of what has come by now.
        let mut replies = vec![first];
        while replies.len() < REPLIES_AT_ONCE {
            if let Some(Some(reply)) = answers.next().now_or_never() {
                replies.push(reply?);
            } else if answers.len() < ANSWERS_MAX
                && let Some(record) = records.take()?
            {
                answers.push(answer(export, record, room.clone()));
            } else {
                break;
            }
        }
        send(&mut writer, &replies).await?;
    }
    Ok(())
}

async fn answer(export: &Export, record: Bytes, room: Arc<Semaphore>) -> Result<Reply, ConnectionError> {
    let call = match Call::parse(&record) {
        Ok(call) => call,
        Err(NoCall::Denied(denied)) => return Ok(denied.into()),
        Err(NoCall::Garbage) => return Err(ConnectionError::Garbage),
    };
    let mismatch = accept_stat_data::PROG_MISMATCH { low: 3, high: 3 };
    Ok(match (call.program, call.version) {
        (nfs3::PROGRAM, nfs3::VERSION) => procedures::answer(export, call, &room).await,
        (mount::PROGRAM, mount::VERSION) => mountd::answer(export, call).await.into(),
        (nfs3::PROGRAM | mount::PROGRAM, _) => accepted(call.xid, mismatch).into(),
        _ => accepted(call.xid, accept_stat_data::PROG_UNAVAIL).into(),
    })
}

/// Writes answers, each a record.
async fn send(writer: &mut (impl AsyncWrite + Unpin), replies: &[Reply]) -> Result<(), ConnectionError> {
    let mut marks = Vec::with_capacity(replies.len());
    for Reply { head, data, .. } in replies {
        let bytes: usize = data.iter().map(Bytes::len).sum();
        let padding = bytes.next_multiple_of(4) - bytes;
        marks.push((mark(head.len() + bytes + padding), padding));
    }
    let mut slices = Vec::with_capacity(4 * replies.len());
    for (Reply { head, data, .. }, (mark, padding)) in replies.iter().zip(&marks) {
        slices.extend([IoSlice::new(mark), IoSlice::new(head)]);
        slices.extend(data.iter().map(|piece| IoSlice::new(piece)));
        slices.push(IoSlice::new(&PADDING[..*padding]));
    }
    let mut left = &mut slices[..];
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        let written = timeout(TAKE_LIMIT, writer.write_vectored(left)).await.map_err(|_| ConnectionError::Stuck)??;
        if written == 0 {
            return Err(io::Error::from(io::ErrorKind::WriteZero).into());
        }
        IoSlice::advance_slices(&mut left, written);
    }
    Ok(())
}

const PADDING: [u8; 3] = [0; 3];
/// So many requests of a connection are answered at a time.
const ANSWERS_MAX: usize = 4_096;
/// So much is in memory for answers that are not yet sent.
const ROOM_BYTES: usize = 16 << 20;
const REPLIES_AT_ONCE: usize = 64;
/// Within this time the client takes something of an answer.
const TAKE_LIMIT: Duration = Duration::from_secs(60);
