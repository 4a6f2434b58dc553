//! Speaks the protocol with a server of either side, and keeps what it says.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// What a server has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    Columns(usize),
    Row(Vec<Option<String>>),
    Done(String),
    Error {
        severity: String,
        code: String,
    },
    Notice {
        severity: String,
        code: String,
    },
    Ready(char),
    /// The connection has ended.
    Closed,
    /// It does not answer in time.
    Silent,
    Other(char),
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Talk<S> {
    stream: S,
    buffer: Vec<u8>,
    pub(super) pid: i32,
    pub(super) closed: bool,
    /// The transaction's state, as the server has told it last.
    pub(super) status: char,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Talk<S> {
    /// Logs in as the application's role.
    pub(super) async fn open(stream: S, patience: Duration) -> (Self, Vec<Said>) {
        let mut talk = Self { stream, buffer: Vec::new(), pid: 0, closed: false, status: 'I' };
        let body = b"\x00\x03\x00\x00user\0app\0database\0app\0\0";
        let mut message = length(body.len() + 4).to_vec();
        message.extend(body);
        talk.write(&message).await;
        let said = talk.answer(patience).await;
        (talk, said)
    }

    async fn write(&mut self, bytes: &[u8]) {
        // What a closed connection says is read afterwards.
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    pub(super) async fn query(&mut self, text: &str) {
        let mut message = vec![b'Q'];
        message.extend(length(text.len() + 5));
        message.extend(text.as_bytes());
        message.push(0);
        self.write(&message).await;
    }

    pub(super) async fn terminate(&mut self) {
        self.write(&[b'X', 0, 0, 0, 4]).await;
    }

    /// Reads until the server is ready, or has closed the connection.
    pub(super) async fn answer(&mut self, patience: Duration) -> Vec<Said> {
        let mut all = Vec::new();
        loop {
            let said = self.next(patience).await;
            let ends = matches!(said, Said::Ready(_) | Said::Closed | Said::Silent);
            all.push(said);
            if ends {
                return all;
            }
        }
    }

    /// Reads what the server says unasked within this time.
    pub(super) async fn unasked(&mut self, time: Duration) -> Vec<Said> {
        let mut all = Vec::new();
        while !self.closed {
            match self.next(time).await {
                Said::Silent => break,
                said => all.push(said),
            }
        }
        all
    }

    async fn next(&mut self, patience: Duration) -> Said {
        if self.closed {
            return Said::Closed;
        }
        loop {
            if let Some((tag, body)) = take(&mut self.buffer) {
                if let Some(said) = self.read(tag, &body) {
                    return said;
                }
                continue;
            }
            match timeout(patience, self.stream.read_buf(&mut self.buffer)).await {
                Err(_) => return Said::Silent,
                Ok(Ok(0) | Err(_)) => {
                    self.closed = true;
                    return Said::Closed;
                }
                Ok(Ok(_)) => {}
            }
        }
    }

    /// `None`: it is of no interest.
    fn read(&mut self, tag: u8, body: &[u8]) -> Option<Said> {
        Some(match tag {
            b'R' | b'S' => return None,
            b'K' => {
                self.pid = number(body, 0);
                return None;
            }
            b'T' => Said::Columns(usize::from(short(body, 0))),
            b'D' => Said::Row(row(body)),
            b'C' => Said::Done(texts(body).remove(0)),
            b'E' | b'N' => {
                let field = |wanted: char| texts(body).iter().find_map(|it| it.strip_prefix(wanted).map(str::to_owned));
                let (severity, code) = (field('V').unwrap_or_default(), field('C').unwrap_or_default());
                if tag == b'E' { Said::Error { severity, code } } else { Said::Notice { severity, code } }
            }
            b'Z' => {
                self.status = char::from(body[0]);
                Said::Ready(self.status)
            }
            tag => Said::Other(char::from(tag)),
        })
    }
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap().to_be_bytes()
}

fn number(body: &[u8], at: usize) -> i32 {
    i32::from_be_bytes(body[at..at + 4].try_into().unwrap())
}

fn short(body: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(body[at..at + 2].try_into().unwrap())
}

fn texts(body: &[u8]) -> Vec<String> {
    body.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect()
}

fn row(body: &[u8]) -> Vec<Option<String>> {
    let mut at = 2;
    let mut values = Vec::new();
    for _ in 0..short(body, 0) {
        let length = usize::try_from(number(body, at)).ok();
        at += 4;
        values.push(length.map(|length| String::from_utf8_lossy(&body[at..at + length]).into_owned()));
        at += length.unwrap_or(0);
    }
    values
}

/// Takes a message that is whole.
fn take(buffer: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let length = usize::try_from(number(buffer.get(..5)?, 1)).ok()?;
    let body = buffer.get(5..=length)?.to_vec();
    let tag = buffer[0];
    buffer.drain(..=length);
    Some((tag, body))
}
