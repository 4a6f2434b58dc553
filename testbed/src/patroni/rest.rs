//! One question by HTTP, to Patroni or etcd.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The status and the body of the answer.
pub(crate) async fn ask(
    addr: SocketAddr,
    method: &str,
    path: &str,
    body: &str,
    patience: Duration,
) -> Result<(u16, String), String> {
    let asked = async {
        let mut stream = TcpStream::connect(addr).await?;
        let question = format!(
            "{method} {path} HTTP/1.0\r\nHost: {addr}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(question.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = timeout(patience, asked).await.map_err(|_| format!("{addr} does not answer within {patience:?}"))?;
    let answer = answer.map_err(|error| format!("{addr}: {error}"))?;
    parse(&String::from_utf8_lossy(&answer)).ok_or_else(|| format!("{addr}: no HTTP"))
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split_whitespace().nth(1)?.parse().ok()?, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_and_the_body_are_read() {
        assert_eq!(parse("HTTP/1.0 503 Service Unavailable\r\nA: b\r\n\r\n{}"), Some((503, "{}".to_owned())));
        assert_eq!(parse("HTTP/1.0 200 OK\r\n\r\n"), Some((200, String::new())));
        assert_eq!(parse("garbage"), None);
    }
}
