//! Responses that stream events, one JSON line each.

use std::convert::Infallible;

use axum::{
    body::{Body, Bytes},
    http::header::CONTENT_TYPE,
    response::Response,
};
use futures_util::stream;

use crate::{
    event::{Event, Reporter},
    failure::{Code, Failure},
    node::Node,
};

/// Like [`report`], but lists `command` in `blob status` while the client reads the response.
pub(super) fn report_under_way<W>(
    node: &Node,
    command: String,
    work: impl FnOnce(Reporter) -> W + Send + 'static,
) -> Response
where
    W: Future<Output = Result<Code, Failure>> + Send + 'static,
{
    let entry = node.under_way().begin(command);
    report_to(work, move |event| {
        if let Event::Progress { done, total, files, .. } = event {
            entry.note(*done, *total, *files);
        }
    })
}

/// Answers with what `work` reports, line by line; the last line is `{"type":"exit","code":N}`. The work runs on
/// its own: if the reader goes away, it stops where it is safe, not where it is.
pub(super) fn report<W>(work: impl FnOnce(Reporter) -> W + Send + 'static) -> Response
where
    W: Future<Output = Result<Code, Failure>> + Send + 'static,
{
    report_to(work, |_| {})
}

/// Like [`report`], but calls `observe` with each event before it is sent.
fn report_to<W>(
    work: impl FnOnce(Reporter) -> W + Send + 'static,
    mut observe: impl FnMut(&Event) + Send + 'static,
) -> Response
where
    W: Future<Output = Result<Code, Failure>> + Send + 'static,
{
    let (reporter, mut events) = Reporter::new();
    let work = work(reporter.clone());
    tokio::spawn(async move {
        let code = match reporter.counted(work).await {
            Ok(code) => code,
            Err(failure) => {
                let code = failure.code;
                let _ = reporter.send(Event::Error(failure)).await;
                code
            }
        };
        let _ = reporter.send(Event::Exit { code }).await;
    });
    let mut waiting = Vec::new();
    let lines = stream::poll_fn(move |context| {
        events.poll_recv_many(context, &mut waiting, EVENTS_AT_ONCE).map(|count| {
            let mut lines = Vec::new();
            for event in waiting.drain(..) {
                observe(&event);
                lines.extend(serde_json::to_vec(&event).unwrap_or_default());
                lines.push(b'\n');
            }
            (count > 0).then(|| Ok::<_, Infallible>(Bytes::from(lines)))
        })
    });
    with_type("application/jsonl", Body::from_stream(lines))
}

/// Builds a response with a content type.
pub(super) fn with_type(content_type: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, axum::http::HeaderValue::from_static(content_type));
    response
}

/// Events sent in one write, if that many are queued.
const EVENTS_AT_ONCE: usize = 256;
