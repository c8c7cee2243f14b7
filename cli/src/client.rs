use std::path::PathBuf;

use axum::{
    Router,
    body::{Body, Bytes},
    http::{Method, Request, Response, header::CONTENT_TYPE},
};
use bytes::BytesMut;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;
use tokio::net::UnixStream;
use tower::ServiceExt;

use crate::{
    event::Event,
    failure::{Code, Failure, WhileDoing},
    home::SocketPath,
};

/// How commands reach the control API.
pub(crate) enum Client {
    /// On the daemon's socket.
    Daemon(PathBuf),
    /// In this very process.
    Local(Router),
}

/// The lines of a report.
pub(crate) struct Events {
    body: Body,
    /// What has come and was not yet read.
    lines: BytesMut,
}

impl Client {
    /// Calls for one value.
    pub(crate) async fn value(&self, method: Method, path: &str, body: &impl Serialize) -> Result<Value, Failure> {
        let bytes = self.bytes(method, path, body).await?;
        serde_json::from_slice(&bytes).while_doing("understand the daemon's answer")
    }

    /// Calls for bytes.
    pub(crate) async fn bytes(&self, method: Method, path: &str, body: &impl Serialize) -> Result<Bytes, Failure> {
        let response = self.call(method, path, body).await?;
        Ok(response.into_body().collect().await.while_doing("hear the daemon's answer")?.to_bytes())
    }

    /// Calls for a report.
    pub(crate) async fn events(&self, path: &str, body: &impl Serialize) -> Result<Events, Failure> {
        let response = self.call(Method::POST, path, body).await?;
        Ok(Events { body: response.into_body(), lines: BytesMut::new() })
    }

    async fn call(&self, method: Method, path: &str, body: &impl Serialize) -> Result<Response<Body>, Failure> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(CONTENT_TYPE, "application/json")
            .header("host", "localhost")
            .body(Body::from(serde_json::to_vec(body)?))?;
        let response = match self {
            Self::Local(router) => match router.clone().oneshot(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            },
            Self::Daemon(socket) => {
                let connect = async { UnixStream::connect(SocketPath::of(socket)?).await };
                let stream = connect.await.map_err(|error| {
                    Failure::from(error).code(Code::NoDaemon).while_doing(format!("reach the daemon at {socket:?}"))
                })?;
                let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
                tokio::spawn(connection);
                sender.send_request(request).await.while_doing("ask the daemon")?.map(Body::new)
            }
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let answer = response.into_body().collect().await.while_doing("hear the daemon's answer")?.to_bytes();
        Err(serde_json::from_slice(&answer)
            .unwrap_or_else(|_| Failure::new(Code::Error, format!("the daemon says {status}"))))
    }
}

impl Events {
    /// The next line; `None` at the end of the report.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(end) = self.lines.iter().position(|&b| b == b'\n') {
                let line = self.lines.split_to(end + 1);
                return serde_json::from_slice(&line).map(Some).while_doing("understand the daemon's report");
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame.while_doing("hear the daemon's report; did it stop?")?;
                    self.lines.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
                }
            }
        }
    }
}
