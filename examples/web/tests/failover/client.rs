//! A client over real TCP: one connection, kept open, one request after the other.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{HeaderMap, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A hang is a failure, too, and is told as one.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Client {
    send: SendRequest<Full<Bytes>>,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

impl Client {
    pub(crate) async fn connect(to: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect(to).await.map_err(|error| format!("connect: {error}"))?;
        let (send, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        // Ends with the connection; what went wrong with it is told to whoever sent a request.
        tokio::spawn(connection);
        Ok(Self { send })
    }

    pub(crate) async fn get(&mut self, path: &str) -> Result<Answer, String> {
        self.send(Request::get(path).header("host", "orders").body(Full::default()).unwrap()).await
    }

    pub(crate) async fn order(&mut self, sku: &str, headers: &[(&str, &str)]) -> Result<Answer, String> {
        let mut request = Request::post("/orders").header("host", "orders").header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Full::from(json!({ "sku": sku }).to_string())).unwrap()).await
    }

    /// The head of an answer, and its body as it comes.
    pub(crate) async fn open(&mut self, path: &str) -> Result<(StatusCode, Incoming), String> {
        let request = Request::get(path).header("host", "orders").body(Full::default()).unwrap();
        let answer = timeout(LIMIT, self.send.send_request(request)).await.map_err(|_| format!("{path}: no answer"))?;
        let (parts, body) = answer.map_err(|error| format!("{path}: {error}"))?.into_parts();
        Ok((parts.status, body))
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Answer, String> {
        let line = format!("{} {}", request.method(), request.uri());
        let told = |error: hyper::Error| format!("{line}: {error}");
        let answer = async {
            self.send.ready().await.map_err(told)?;
            let (parts, body) = self.send.send_request(request).await.map_err(told)?.into_parts();
            let body = body.collect().await.map_err(told)?.to_bytes();
            let body = String::from_utf8(body.to_vec()).map_err(|error| error.to_string())?;
            Ok(Answer { status: parts.status, headers: parts.headers, body })
        };
        timeout(LIMIT, answer).await.unwrap_or_else(|_| Err(format!("{line}: no answer within {LIMIT:?}")))
    }
}
