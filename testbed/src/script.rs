//! A server that says what a test tells it to: PostgreSQL's protocol, and nothing behind it.
//!
//! Speaks just enough of protocol 3 for sessions without a password and for simple queries. What it answers is a
//! closure over the text of the query; what becomes of its bytes on the way is a [`Tamper`] for each session.
//! Statements of the extended protocol are refused with 0A000.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::frames::framed;
use crate::port::{Port, drain};
use crate::sync::lock;

const PROTOCOL_3: i32 = 196_608;
const SSL_REQUEST: i32 = 80_877_103;
const GSS_REQUEST: i32 = 80_877_104;
/// A client's message that says it is longer is no client's message.
const LONGEST: usize = 1 << 24;

/// What is answered to one message of the client.
///
/// ```
/// use testbed::Reply;
///
/// // To "SELECT 1; COMMIT", which is one message:
/// let reply = Reply::Several(vec![Reply::row([Some("1")]), Reply::done("COMMIT")]);
/// # drop(reply);
/// ```
#[derive(Clone, Debug)]
pub enum Reply {
    /// A result. Without columns and rows it is its tag alone, as that of a BEGIN.
    Rows {
        /// How many columns are announced, and their names; a row may have another number of values.
        columns: Vec<String>,
        /// The values, in bytes that need not be text; `None` is NULL.
        rows: Vec<Vec<Option<Vec<u8>>>>,
        /// What the statement came to: `SELECT 1`, `BEGIN`.
        tag: String,
    },
    /// The statement fails; with the severity `FATAL` or `PANIC` the session ends as well.
    Error {
        /// Five characters.
        sqlstate: String,
        /// `ERROR`, `FATAL` or `PANIC`.
        severity: String,
        /// The routine that reports: a server always names one, a proxy never does.
        routine: Option<String>,
        /// The message.
        message: String,
    },
    /// The results of several statements in one message. An error is the last one, as the server skips the rest.
    Several(Vec<Reply>),
    /// These bytes, and nothing after them: not even that the server is ready for the next query.
    Raw(Vec<u8>),
    /// The end of the session, without a word.
    Close,
    /// Nothing; the session stays open.
    Silence,
}

impl Reply {
    /// One row, with a column for each value.
    pub fn row<'a>(values: impl IntoIterator<Item = Option<&'a str>>) -> Self {
        Self::rows([values.into_iter().map(|value| value.map(|text| text.as_bytes().to_vec())).collect::<Vec<_>>()])
    }

    /// These rows, with as many columns as the first one has values.
    pub fn rows(rows: impl IntoIterator<Item = Vec<Option<Vec<u8>>>>) -> Self {
        let rows: Vec<_> = rows.into_iter().collect();
        let columns = (0..rows.first().map_or(0, Vec::len)).map(|n| format!("c{n}")).collect();
        let tag = format!("SELECT {}", rows.len());
        Self::Rows { columns, rows, tag }
    }

    /// A statement that brings no rows: `BEGIN`, `COMMIT`, `INSERT 0 1`.
    pub fn done(tag: &str) -> Self {
        Self::Rows { columns: Vec::new(), rows: Vec::new(), tag: tag.to_owned() }
    }

    /// An error of the server's own, at ERROR.
    pub fn error(sqlstate: &str, message: &str) -> Self {
        Self::Error {
            sqlstate: sqlstate.to_owned(),
            severity: "ERROR".to_owned(),
            routine: Some("exec_simple_query".to_owned()),
            message: message.to_owned(),
        }
    }
}

/// Changes what is about to be sent.
pub type Change = Box<dyn FnMut(&mut Vec<u8>) + Send>;

/// What becomes of a session's bytes between the script and the client.
pub enum Tamper {
    /// They arrive.
    Nothing,
    /// So many arrive, of the whole session, and then it is closed. With 0 it is closed before a byte was read.
    Cut(usize),
    /// Each piece that is sent may be changed first.
    Change(Change),
}

type Answer = Arc<dyn Fn(&str) -> Reply + Send + Sync>;
type Tampering = Arc<dyn Fn(u64) -> Tamper + Send + Sync>;

struct Stage {
    answer: Mutex<Answer>,
    tamper: Mutex<Tampering>,
    sent: AtomicU64,
}

/// A scripted server. Dropping it ends it and its sessions.
///
/// ```no_run
/// # async fn example() {
/// use testbed::{Reply, Script, Tamper};
///
/// let script = Script::start(([127, 0, 0, 1], 0).into(), |sql| match sql {
///     "BEGIN" => Reply::done("BEGIN"),
///     _ if sql.ends_with("COMMIT") => Reply::Close,
///     _ => Reply::row([Some("1")]),
/// })
/// .await;
/// script.answer(|_| Reply::row([None])); // from now on, also in the sessions that are open
/// script.tamper(|session| Tamper::Cut(usize::try_from(session).unwrap())); // of the sessions to come
/// # }
/// ```
pub struct Script {
    port: Port,
    stage: Arc<Stage>,
}

impl Script {
    /// What a server of its first timeline says to the pool's probe, in the order of its columns.
    pub const PRIMARY: [Option<&'static str>; 10] = [
        Some("f"),
        Some("off"),
        Some("off"),
        None,
        Some("7301827364512345678"),
        Some("1764000000.123456"),
        Some("0000000100000000000000A1"),
        Some("0/A1000060"),
        None,
        Some("1763000000.123456"),
    ];

    /// Listens on `addr` and answers each simple query by `answer`, which gets the whole text: also several statements.
    pub async fn start(addr: SocketAddr, answer: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Self {
        crate::limit::begin();
        let stage = Arc::new(Stage {
            answer: Mutex::new(Arc::new(answer)),
            tamper: Mutex::new(Arc::new(|_| Tamper::Nothing)),
            sent: AtomicU64::new(0),
        });
        let (served, mut number) = (Arc::clone(&stage), 0);
        let serve = move |stream| {
            let tampering = Arc::clone(&lock(&served.tamper));
            let tamper = tampering(number);
            number += 1;
            session(Wire { stream, tamper, stage: Arc::clone(&served), open: false })
        };
        Self { port: Port::open("script", addr, serve).await, stage }
    }

    /// A primary that knows the probe, `SELECT 1` and the ends of transactions: the beginning of most scripts.
    pub fn honest(sql: &str) -> Reply {
        if sql.contains("pg_is_in_recovery") {
            return Reply::row(Self::PRIMARY);
        }
        if sql.ends_with("; COMMIT") {
            let none = Reply::Rows { columns: Vec::new(), rows: Vec::new(), tag: "SELECT 0".to_owned() };
            return Reply::Several(vec![Reply::done("SET"), none, Reply::done("COMMIT")]);
        }
        match sql.split_whitespace().next().unwrap_or_default() {
            "SELECT" => Reply::row([Some("1")]),
            word => Reply::done(word.trim_end_matches(';')),
        }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    /// From now on queries are answered so, also in the sessions that are open.
    pub fn answer(&self, answer: impl Fn(&str) -> Reply + Send + Sync + 'static) {
        *lock(&self.stage.answer) = Arc::new(answer);
    }

    /// From now on this is done to the bytes of new sessions; they are counted from 0 since the start of the server.
    pub fn tamper(&self, tamper: impl Fn(u64) -> Tamper + Send + Sync + 'static) {
        *lock(&self.stage.tamper) = Arc::new(tamper);
    }

    /// How many sessions were begun.
    pub fn accepted(&self) -> u64 {
        self.port.accepted()
    }

    /// How many bytes were sent, in all sessions.
    pub fn sent(&self) -> u64 {
        self.stage.sent.load(Ordering::SeqCst)
    }
}

/// One session's socket. Its methods return `None` when the session is over.
struct Wire {
    stream: TcpStream,
    tamper: Tamper,
    stage: Arc<Stage>,
    /// A transaction is open.
    open: bool,
}

impl Wire {
    async fn send(&mut self, mut bytes: Vec<u8>) -> Option<()> {
        let mut over = false;
        match &mut self.tamper {
            Tamper::Nothing => {}
            Tamper::Change(change) => change(&mut bytes),
            Tamper::Cut(left) => {
                over = *left <= bytes.len();
                bytes.truncate(*left);
                *left -= bytes.len();
            }
        }
        self.stream.write_all(&bytes).await.ok()?;
        self.stage.sent.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        (!over).then_some(())
    }

    async fn number(&mut self) -> Option<i32> {
        self.stream.read_i32().await.ok()
    }

    /// What follows a length that counts itself.
    async fn body(&mut self) -> Option<Vec<u8>> {
        let length = usize::try_from(self.number().await?).ok()?.checked_sub(4).filter(|length| *length < LONGEST)?;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await.ok()?;
        Some(body)
    }
}

async fn session(mut wire: Wire) {
    if !matches!(wire.tamper, Tamper::Cut(0)) && start_up(&mut wire).await.is_some() {
        while converse(&mut wire).await.is_some() {}
    }
    if wire.stream.shutdown().await.is_ok() {
        drain(&mut wire.stream).await;
    }
}

async fn start_up(wire: &mut Wire) -> Option<()> {
    loop {
        let body = wire.body().await?;
        match i32::from_be_bytes(body.get(..4)?.try_into().ok()?) {
            SSL_REQUEST | GSS_REQUEST => wire.send(b"N".to_vec()).await?,
            PROTOCOL_3 => break,
            // A cancel request among them: nothing runs that could be stopped.
            _ => return None,
        }
    }
    let mut bytes = framed(b'R', &0_i32.to_be_bytes());
    for (name, value) in [("server_version", "17.0"), ("client_encoding", "UTF8")] {
        bytes.extend(framed(b'S', format!("{name}\0{value}\0").as_bytes()));
    }
    bytes.extend(framed(b'K', &[0, 0, 0, 1, 0, 0, 0, 2]));
    bytes.extend(ready(false));
    wire.send(bytes).await
}

/// One message of the client and its answer.
async fn converse(wire: &mut Wire) -> Option<()> {
    let tag = wire.stream.read_u8().await.ok()?;
    let body = wire.body().await?;
    match tag {
        b'Q' => {
            let sql = String::from_utf8_lossy(body.strip_suffix(b"\0").unwrap_or(&body)).into_owned();
            wire.open = open_after(&sql, wire.open);
            let answer = Arc::clone(&lock(&wire.stage.answer));
            reply(wire, answer(&sql)).await
        }
        // The statements before it were skipped; one error speaks for all of them.
        b'S' => reply(wire, Reply::error("0A000", "the script does not speak the extended protocol")).await,
        b'X' => None,
        _ => Some(()),
    }
}

async fn reply(wire: &mut Wire, reply: Reply) -> Option<()> {
    match reply {
        Reply::Silence => Some(()),
        Reply::Close => None,
        Reply::Raw(bytes) => wire.send(bytes).await,
        reply => {
            let mut bytes = Vec::new();
            let over = encode(&mut bytes, &reply);
            if !over {
                bytes.extend(ready(wire.open));
            }
            wire.send(bytes).await?;
            (!over).then_some(())
        }
    }
}

/// Appends the messages of one answer, and says whether it ends the session.
fn encode(bytes: &mut Vec<u8>, reply: &Reply) -> bool {
    match reply {
        Reply::Rows { columns, rows, tag } => {
            if !columns.is_empty() || !rows.is_empty() {
                bytes.extend(framed(b'T', &description(columns)));
            }
            for row in rows {
                bytes.extend(framed(b'D', &data(row)));
            }
            bytes.extend(framed(b'C', format!("{tag}\0").as_bytes()));
            false
        }
        Reply::Error { sqlstate, severity, routine, message } => {
            let routine = routine.as_ref().map_or_else(String::new, |routine| format!("R{routine}\0"));
            let body = format!("S{severity}\0V{severity}\0C{sqlstate}\0M{message}\0{routine}\0");
            bytes.extend(framed(b'E', body.as_bytes()));
            severity != "ERROR"
        }
        Reply::Several(replies) => replies.iter().any(|reply| encode(bytes, reply)),
        Reply::Raw(raw) => {
            bytes.extend(raw);
            false
        }
        Reply::Close => true,
        Reply::Silence => false,
    }
}

fn description(columns: &[String]) -> Vec<u8> {
    let mut body = count(columns.len());
    for column in columns {
        body.extend(column.as_bytes());
        // The end of the name; no table; text (25) of any length; in text format.
        body.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 25, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]);
    }
    body
}

fn data(row: &[Option<Vec<u8>>]) -> Vec<u8> {
    let mut body = count(row.len());
    for value in row {
        let length = value.as_ref().map_or(-1, |value| i32::try_from(value.len()).expect("less than 2 GiB"));
        body.extend(length.to_be_bytes());
        body.extend(value.iter().flatten());
    }
    body
}

fn count(of: usize) -> Vec<u8> {
    u16::try_from(of).expect("a row has fewer than 65536 columns").to_be_bytes().to_vec()
}

fn ready(open: bool) -> Vec<u8> {
    framed(b'Z', if open { b"T" } else { b"I" })
}

/// Returns whether a transaction is open after this message, as far as its first words tell.
fn open_after(sql: &str, open: bool) -> bool {
    sql.split(';').fold(open, |open, statement| match statement.split_whitespace().next() {
        Some("BEGIN" | "START") => true,
        Some("COMMIT" | "ROLLBACK") => false,
        _ => open,
    })
}

#[cfg(test)]
mod tests {
    use tokio_postgres::{NoTls, SimpleQueryMessage};

    use super::*;

    async fn script() -> Script {
        Script::start(([127, 0, 0, 1], 0).into(), Script::honest).await
    }

    async fn dial(script: &Script) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let (client, connection) =
            tokio_postgres::connect(&format!("postgres://app@{}/app", script.addr()), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    #[tokio::test]
    async fn several_statements_in_one_message_have_several_answers() {
        let script = script().await;
        let client = dial(&script).await.unwrap();
        script.answer(|sql| {
            assert_eq!(sql, "SELECT 1; COMMIT");
            Reply::Several(vec![Reply::row([Some("1"), None]), Reply::done("COMMIT")])
        });
        let messages = client.simple_query("SELECT 1; COMMIT").await.unwrap();
        let rows = messages.iter().filter(|message| matches!(message, SimpleQueryMessage::Row(_))).count();
        let ends = messages.iter().filter(|message| matches!(message, SimpleQueryMessage::CommandComplete(_))).count();
        assert_eq!((rows, ends), (1, 2), "{messages:?}");
    }

    #[tokio::test]
    async fn an_error_is_the_drivers_error_and_the_session_goes_on_unless_it_is_fatal() {
        let script = script().await;
        let client = dial(&script).await.unwrap();
        script.answer(|_| Reply::error("25006", "read-only"));
        for _ in 0..2 {
            let error = client.batch_execute("INSERT").await.unwrap_err();
            let db = error.as_db_error().unwrap();
            assert_eq!((db.code().code(), db.routine(), db.severity()), ("25006", Some("exec_simple_query"), "ERROR"));
        }
        assert_eq!(client.query("SELECT 1", &[]).await.unwrap_err().code().unwrap().code(), "0A000");
        script.answer(|_| Reply::Error {
            sqlstate: "57P01".to_owned(),
            severity: "FATAL".to_owned(),
            routine: None,
            message: "the end".to_owned(),
        });
        assert_eq!(client.batch_execute("SELECT 1").await.unwrap_err().code().unwrap().code(), "57P01");
        assert!(client.batch_execute("SELECT 1").await.unwrap_err().is_closed());
    }

    #[tokio::test]
    async fn a_cut_session_gets_so_many_bytes_and_the_end() {
        let script = script().await;
        script.tamper(|session| Tamper::Cut(usize::try_from(session).unwrap()));
        for cut in 0..40 {
            let before = script.sent();
            assert!(dial(&script).await.is_err());
            assert_eq!(script.sent() - before, cut);
        }
        assert_eq!(script.accepted(), 40);
    }

    #[tokio::test]
    async fn a_request_for_tls_is_answered_with_no() {
        let script = script().await;
        let mut stream = TcpStream::connect(script.addr()).await.unwrap();
        stream.write_all(&[&8_i32.to_be_bytes()[..], &SSL_REQUEST.to_be_bytes()].concat()).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'N');
    }
}
