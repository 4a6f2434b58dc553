//! A DNS server without a library: its answers are bytes, so that they can be wrong in any way.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::{JoinHandle, JoinSet};

use crate::sync::lock;

/// The header of a message.
const HEADER: usize = 12;
/// Set in the third byte of an answer's header: it was truncated.
const TRUNCATED: u8 = 2;
const A: u16 = 1;

/// What was asked, and the parts that an answer is made of.
#[derive(Clone, Debug)]
pub struct Question {
    /// The whole message.
    pub bytes: Vec<u8>,
    /// It came by TCP.
    pub tcp: bool,
}

impl Question {
    /// The message's first two bytes; an answer with others is not taken for one.
    pub fn id(&self) -> [u8; 2] {
        [self.bytes[0], self.bytes[1]]
    }

    /// The name, type and class that were asked for, as the message has them.
    pub fn section(&self) -> &[u8] {
        let labels = self.bytes[HEADER..].iter().position(|byte| *byte == 0).unwrap_or_default();
        &self.bytes[HEADER..HEADER + labels + 5]
    }

    /// The record type that was asked for.
    pub fn record_type(&self) -> u16 {
        let section = self.section();
        u16::from_be_bytes([section[section.len() - 4], section[section.len() - 3]])
    }

    /// An answer without an error that says it has `count` records; `records` need not be so many, nor be records.
    pub fn answer(&self, count: u16, records: &[u8]) -> Vec<u8> {
        let [high, low] = count.to_be_bytes();
        [&self.id()[..], &[0x84, 0x80, 0, 1, high, low, 0, 0, 0, 0], self.section(), records].concat()
    }

    /// What an honest server says of a name with this address.
    pub fn address(&self, ip: Ipv4Addr) -> Vec<u8> {
        if self.record_type() != A {
            return self.answer(0, &[]);
        }
        self.answer(1, &record(A, &ip.octets()))
    }

    /// An answer that tells the client to ask again by TCP.
    pub fn truncated(&self) -> Vec<u8> {
        let mut answer = self.answer(0, &[]);
        answer[2] |= TRUNCATED;
        answer
    }
}

/// A record of the name that was asked for, good for five seconds.
pub fn record(record_type: u16, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).expect("the data of a record are shorter than 64 KiB");
    [&[0xC0, 12], &record_type.to_be_bytes()[..], &[0, 1, 0, 0, 0, 5], &length.to_be_bytes(), data].concat()
}

type Answer = Arc<dyn Fn(&Question) -> Option<Vec<u8>> + Send + Sync>;

struct Stage {
    answer: Mutex<Answer>,
    questions: AtomicU64,
}

impl Stage {
    fn answer(&self, question: &Question) -> Option<Vec<u8>> {
        self.questions.fetch_add(1, Ordering::SeqCst);
        let answer = Arc::clone(&lock(&self.answer));
        // What is shorter has no id, and is no question.
        (question.bytes.len() > HEADER + 4).then(|| answer(question)).flatten()
    }
}

/// A DNS server, by UDP and TCP on one port, that answers each question with the bytes it was told to. By TCP they get
/// their length in front, as they must. Dropping it ends it.
///
/// ```no_run
/// # async fn example() {
/// use testbed::RawDns;
///
/// let dns = RawDns::start(([127, 0, 0, 1], 0).into(), |question| Some(question.address([127, 0, 0, 1].into()))).await;
/// dns.answer(|question| Some([&question.id()[..], b"nonsense"].concat()));
/// dns.answer(|question| Some(if question.tcp { vec![0; 65_535] } else { question.truncated() }));
/// # }
/// ```
pub struct RawDns {
    addr: SocketAddr,
    stage: Arc<Stage>,
    task: JoinHandle<()>,
}

impl RawDns {
    /// Listens on `addr`; `None` from `answer` is silence.
    pub async fn start(
        addr: SocketAddr,
        answer: impl Fn(&Question) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        let tcp = TcpListener::bind(addr).await.unwrap_or_else(|error| panic!("DNS on {addr}: {error}"));
        let addr = tcp.local_addr().expect("a bound socket");
        let udp = UdpSocket::bind(addr).await.unwrap_or_else(|error| panic!("DNS on {addr}: {error}"));
        let stage = Arc::new(Stage { answer: Mutex::new(Arc::new(answer)), questions: AtomicU64::new(0) });
        let task = tokio::spawn(serve(udp, tcp, Arc::clone(&stage)));
        Self { addr, stage, task }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on questions are answered so.
    pub fn answer(&self, answer: impl Fn(&Question) -> Option<Vec<u8>> + Send + Sync + 'static) {
        *lock(&self.stage.answer) = Arc::new(answer);
    }

    /// How many questions came.
    pub fn questions(&self) -> u64 {
        self.stage.questions.load(Ordering::SeqCst)
    }
}

impl Drop for RawDns {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(udp: UdpSocket, tcp: TcpListener, stage: Arc<Stage>) {
    let mut streams = JoinSet::new();
    let mut buffer = [0; 4096];
    loop {
        tokio::select! {
            Ok((length, client)) = udp.recv_from(&mut buffer) => {
                let question = Question { bytes: buffer[..length].to_vec(), tcp: false };
                if let Some(answer) = stage.answer(&question) {
                    // A client that is gone gets no answer.
                    let _ = udp.send_to(&answer, client).await;
                }
            }
            Ok((stream, _)) = tcp.accept() => {
                streams.spawn(converse(stream, Arc::clone(&stage)));
            }
            Some(_) = streams.join_next() => {}
        }
    }
}

async fn converse(mut stream: TcpStream, stage: Arc<Stage>) {
    while let Ok(length) = stream.read_u16().await {
        let mut bytes = vec![0; usize::from(length)];
        if stream.read_exact(&mut bytes).await.is_err() {
            return;
        }
        let Some(answer) = stage.answer(&Question { bytes, tcp: true }) else { continue };
        let length = u16::try_from(answer.len()).expect("a message is shorter than 64 KiB");
        if stream.write_all(&[&length.to_be_bytes(), &answer[..]].concat()).await.is_err() {
            return;
        }
    }
}
