//! A real DNS server in this process, for the names a test wants answered, with faults.
//!
//! It speaks UDP and TCP on one address and port. What it says about a name is data behind a mutex, so a test changes
//! it at any moment and the very next query sees it. The one thing it decides is how an [`Answer`] looks on the wire.

#![allow(clippy::panic, reason = "a test bed that cannot start has nothing better to do than to say why")]

use std::{
    collections::HashMap,
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use hickory_server::{
    Server,
    net::{runtime::Time, xfer::Protocol},
    proto::{
        op::{Edns, Header, HeaderCounts, Metadata, ResponseCode},
        rr::{
            Name, RData, Record, RecordType,
            rdata::{CNAME, SOA, TXT},
        },
    },
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo},
    zone_handler::MessageResponseBuilder,
};
use tokio::net::{TcpListener, UdpSocket};

use crate::bed::sync::lock;

/// The name that [`Dns::set`] and [`Dns::answer`] speak of.
const NAME: &str = "pg.internal";

/// How long [`Dns::start`] waits for a port that an earlier server is still letting go.
const PORT_PATIENCE: Duration = Duration::from_secs(30);

/// What the server says about one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// These addresses; each family gets its own ones, and a family without any gets an empty answer.
    Addresses(Vec<IpAddr>),
    /// The name exists and has no address of either family (NOERROR, no record, an SOA).
    Empty,
    /// There is no such name.
    NxDomain,
    /// The server failed.
    ServFail,
    /// The server does not want to answer.
    Refused,
    /// No answer at all, neither by UDP nor by TCP.
    Silent,
    /// The families get different answers.
    Split {
        /// For queries of type A.
        a: Box<Answer>,
        /// For queries of type AAAA.
        aaaa: Box<Answer>,
    },
    /// The answer comes after this time.
    Late(Duration, Box<Answer>),
    /// By UDP: truncated, without a record. By TCP: these addresses.
    Truncated(Vec<IpAddr>),
    /// The name is an alias of this one, and that one has these addresses. With no address the answer is the alias
    /// alone, and what the other name has is said by [`Dns::answer_name`].
    Cname(String, Vec<IpAddr>),
    /// One TXT record of these strings, for queries of that type; no addresses.
    Text(Vec<String>),
}

impl Answer {
    /// The answer for one record type: a [`Answer::Split`] is taken apart until none is left.
    fn for_type(&self, asked: RecordType) -> &Self {
        match self {
            Self::Split { a, .. } if asked == RecordType::A => a.for_type(asked),
            Self::Split { aaaa, .. } => aaaa.for_type(asked),
            plain => plain,
        }
    }
}

/// A running server. Dropping it ends its tasks and frees its port.
pub struct Dns {
    addr: SocketAddr,
    book: Arc<Book>,
    /// Held for its drop: it aborts every task of the server, and with them go the sockets.
    _server: Server<Handler>,
}

impl Dns {
    /// Starts a server on `addr`; with port 0 a port is chosen that is free for both UDP and TCP.
    ///
    /// Every name is unknown (NXDOMAIN) until it is given an answer.
    ///
    /// # Panics
    /// When the address cannot be bound.
    pub async fn start(addr: SocketAddr) -> Self {
        crate::bed::limit::begin();
        let (udp, tcp) = bind(addr).await;
        let addr = udp.local_addr().unwrap_or_else(|error| panic!("a bound UDP socket has no address: {error}"));
        let book = Arc::new(Book::default());
        let mut server = Server::new(Handler { book: Arc::clone(&book) });
        server.register_socket(udp);
        // The time-out is the one after which an idle TCP client is cut off; 32 answers may wait to be sent on each.
        server.register_listener(tcp, Duration::from_secs(30), 32);
        Self { addr, book, _server: server }
    }

    /// Where the server listens, by UDP and TCP alike.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on `pg.internal.` has these addresses.
    pub fn set(&self, addresses: &[IpAddr]) {
        self.answer(Answer::Addresses(addresses.to_vec()));
    }

    /// From now on this is said about `pg.internal.`.
    pub fn answer(&self, answer: Answer) {
        self.answer_name(NAME, answer);
    }

    /// From now on this is said about `name`, with or without its trailing dot.
    pub fn answer_name(&self, name: &str, answer: Answer) {
        self.book.lock().answers.insert(key(name), answer);
    }

    /// From now on each answer waits so long before it is sent. What it says is settled when it is sent.
    pub fn delay(&self, delay: Duration) {
        self.book.lock().delay = delay;
    }

    /// The time to live that records carry from now on, in seconds; 5 unless told.
    pub fn ttl(&self, seconds: u32) {
        self.book.lock().ttl = seconds;
    }

    /// How many queries came since the start, for any name, repeats of a client that got no answer included.
    #[must_use]
    pub fn queries(&self) -> u64 {
        self.book.lock().queries.values().sum()
    }

    /// How many queries came for this name.
    #[must_use]
    pub fn queries_for(&self, name: &str) -> u64 {
        let book = self.book.lock();
        book.queries.get(&key(name)).copied().unwrap_or_default()
    }
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns").field("addr", &self.addr).finish_non_exhaustive()
    }
}

/// Both sockets on one port. A port that an earlier server has just left is waited for: its tasks end a moment after
/// it was dropped. With port 0 another one is drawn when the first is free for TCP alone.
async fn bind(addr: SocketAddr) -> (UdpSocket, TcpListener) {
    let both = async {
        loop {
            let bound = async {
                let tcp = TcpListener::bind(addr).await?;
                let udp = UdpSocket::bind(tcp.local_addr()?).await?;
                std::io::Result::Ok((udp, tcp))
            };
            match bound.await {
                Ok(sockets) => return sockets,
                Err(error) if error.kind() == ErrorKind::AddrInUse => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => panic!("the DNS server cannot listen on {addr}: {error}"),
            }
        }
    };
    tokio::time::timeout(PORT_PATIENCE, both)
        .await
        .unwrap_or_else(|_| panic!("{addr} is in use; the DNS server waited {PORT_PATIENCE:?}"))
}

/// One spelling for a name: lower case, no trailing dot.
fn key(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// What the test wants said, and what was asked.
#[derive(Default)]
struct Book(Mutex<Pages>);

struct Pages {
    answers: HashMap<String, Answer>,
    queries: HashMap<String, u64>,
    delay: Duration,
    ttl: u32,
}

impl Default for Pages {
    fn default() -> Self {
        Self { answers: HashMap::new(), queries: HashMap::new(), delay: Duration::ZERO, ttl: 5 }
    }
}

impl Book {
    fn lock(&self) -> MutexGuard<'_, Pages> {
        lock(&self.0)
    }

    /// Counts a query and says how long its answer shall wait.
    fn note(&self, name: &str) -> Duration {
        let mut pages = self.lock();
        *pages.queries.entry(name.to_owned()).or_default() += 1;
        pages.delay
    }

    /// What to say now, and for how long it is good.
    fn look_up(&self, name: &str, asked: RecordType) -> (Answer, u32) {
        let pages = self.lock();
        // The addresses given with an alias belong to the name it points at, and are found there too.
        let by_alias = || {
            pages.answers.values().find_map(|answer| match answer {
                Answer::Cname(target, addresses) if key(target) == name && !addresses.is_empty() => {
                    Some(Answer::Addresses(addresses.clone()))
                }
                _ => None,
            })
        };
        let answer = match pages.answers.get(name) {
            Some(answer) => answer.for_type(asked).clone(),
            None => by_alias().unwrap_or(Answer::NxDomain),
        };
        (answer, pages.ttl)
    }
}

struct Handler {
    book: Arc<Book>,
}

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response_handle: R,
    ) -> ResponseInfo {
        let metadata = Metadata::response_from_request(&request.metadata);
        let Ok(asked) = request.request_info() else {
            return unsent(metadata);
        };
        let name = Name::from(asked.query.name());
        let record_type = asked.query.query_type();
        let key = key(&name.to_string());

        let delay = self.book.note(&key);
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let (mut answer, ttl) = self.book.look_up(&key, record_type);
        while let Answer::Late(delay, late) = answer {
            tokio::time::sleep(delay).await;
            answer = *late;
        }
        let Some(reply) = Reply::new(&answer, &name, record_type, ttl, request.protocol()) else {
            return unsent(metadata);
        };

        let mut metadata = metadata;
        metadata.authoritative = true;
        metadata.recursion_available = true;
        metadata.response_code = reply.code;
        metadata.truncation = reply.truncated;
        let edns = request.edns.as_ref().map(|theirs| {
            let mut edns = Edns::new();
            edns.set_max_payload(theirs.max_payload());
            edns
        });
        let mut builder = MessageResponseBuilder::from_message_request(request);
        if let Some(edns) = &edns {
            builder.edns(edns);
        }
        let response = builder.build(metadata, &reply.answers, [], &reply.soa, []);
        // A client that is gone gets no answer; that is its own affair.
        match response_handle.send_response(response).await {
            Ok(info) => info,
            Err(_) => unsent(metadata),
        }
    }
}

/// What the server keeps in mind about a query that was not answered.
fn unsent(metadata: Metadata) -> ResponseInfo {
    ResponseInfo::from(Header { metadata, counts: HeaderCounts::default() })
}

/// An [`Answer`] in the terms of the protocol.
struct Reply {
    code: ResponseCode,
    truncated: bool,
    answers: Vec<Record>,
    soa: Option<Record>,
}

impl Reply {
    /// `None` when nothing shall be sent.
    fn new(answer: &Answer, name: &Name, asked: RecordType, ttl: u32, by: Protocol) -> Option<Self> {
        let code = |code, soa| Self { code, truncated: false, answers: Vec::new(), soa };
        let soa = || Some(soa(name, ttl));
        let found = |answers: Vec<Record>| {
            let soa = if answers.is_empty() { soa() } else { None };
            Self { answers, ..code(ResponseCode::NoError, soa) }
        };
        Some(match answer {
            Answer::Silent | Answer::Split { .. } | Answer::Late(..) => return None,
            Answer::NxDomain => code(ResponseCode::NXDomain, soa()),
            Answer::ServFail => code(ResponseCode::ServFail, None),
            Answer::Refused => code(ResponseCode::Refused, None),
            Answer::Truncated(_) if by == Protocol::Udp => {
                Self { truncated: true, ..code(ResponseCode::NoError, None) }
            }
            Answer::Text(strings) if asked == RecordType::TXT => {
                let text = RData::TXT(TXT::new(strings.clone()));
                found(vec![Record::from_rdata(name.clone(), ttl, text)])
            }
            Answer::Text(_) | Answer::Empty => found(Vec::new()),
            Answer::Addresses(addresses) | Answer::Truncated(addresses) => found(records(name, asked, addresses, ttl)),
            Answer::Cname(target, addresses) => {
                let target = absolute(target);
                let mut answers = records(&target, asked, addresses, ttl);
                let alias = RData::CNAME(CNAME(target));
                answers.insert(0, Record::from_rdata(name.clone(), ttl, alias));
                found(answers)
            }
        })
    }
}

/// The addresses of the family that was asked for.
fn records(name: &Name, asked: RecordType, addresses: &[IpAddr], ttl: u32) -> Vec<Record> {
    addresses
        .iter()
        .map(|address| Record::from_rdata(name.clone(), ttl, RData::from(*address)))
        .filter(|record| record.record_type() == asked)
        .collect()
}

/// The SOA that goes with a negative answer: of the zone right above the name.
fn soa(name: &Name, ttl: u32) -> Record {
    let zone = name.base_name();
    let soa = SOA::new(zone.clone(), zone.clone(), 1, 3600, 600, 86_400, ttl);
    Record::from_rdata(zone, ttl, RData::SOA(soa))
}

fn absolute(name: &str) -> Name {
    let mut absolute =
        Name::from_str_relaxed(name).unwrap_or_else(|error| panic!("{name:?} is not a DNS name: {error}"));
    absolute.set_fqdn(true);
    absolute
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dropped_server_frees_its_port() {
        let mut addr = SocketAddr::from(([127, 0, 0, 1], 0));
        for _ in 0..5 {
            let dns = Dns::start(addr).await;
            assert!(addr.port() == 0 || addr == dns.addr());
            addr = dns.addr();
        }
    }

    #[test]
    fn a_split_answer_may_be_split_again() {
        let leaf = |a, aaaa| Answer::Split { a: Box::new(a), aaaa: Box::new(aaaa) };
        let answer = leaf(leaf(Answer::Empty, Answer::Silent), leaf(Answer::Refused, Answer::ServFail));
        assert_eq!(answer.for_type(RecordType::A), &Answer::Empty);
        assert_eq!(answer.for_type(RecordType::AAAA), &Answer::ServFail);
    }
}
