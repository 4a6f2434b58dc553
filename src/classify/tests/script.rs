//! A server whose answers are written by hand, over an in-memory stream.

use std::error::Error as StdError;
use std::fmt;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio_postgres::error::DbError;
use tokio_postgres::tls::TlsConnect;
use tokio_postgres::{Client, Config, Error, NoTls};

/// One `ErrorResponse`, as a server would send it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report<'a> {
    /// The field that may be translated.
    pub(super) severity: &'a str,
    /// The field that is not translated. Poolers do not send it.
    pub(super) plain: Option<&'a str>,
    pub(super) code: &'a str,
    pub(super) message: &'a str,
    pub(super) routine: Option<&'a str>,
}

impl<'a> Report<'a> {
    /// From a server itself.
    pub(super) fn server(severity: &'a str, code: &'a str, message: &'a str, routine: &'a str) -> Self {
        Self { severity, plain: Some(severity), code, message, routine: Some(routine) }
    }

    /// From a pooler or a proxy: the three fields that `PgBouncer` sends.
    pub(super) fn proxy(severity: &'a str, code: &'a str, message: &'a str) -> Self {
        Self { severity, plain: None, code, message, routine: None }
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        let mut fields = vec![(b'S', self.severity), (b'C', self.code), (b'M', self.message)];
        fields.extend(self.plain.map(|plain| (b'V', plain)));
        fields.extend(self.routine.map(|routine| (b'R', routine)));
        let mut body = Vec::new();
        for (tag, value) in fields {
            body.push(tag);
            body.extend_from_slice(value.as_bytes());
            body.push(0);
        }
        body.push(0);
        message(b'E', &body)
    }
}

pub(super) fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    out.extend_from_slice(body);
    out
}

/// `AuthenticationOk`, `ReadyForQuery`.
pub(super) fn welcome() -> Vec<u8> {
    [message(b'R', &[0; 4]), message(b'Z', b"I")].concat()
}

pub(super) fn block<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub(super) fn config() -> Config {
    let mut config = Config::new();
    config.user("app");
    config
}

/// The error of opening a session with a peer that answers the start-up message with `reply` and hangs up.
pub(super) fn open_fails_with(config: &Config, reply: &[u8]) -> Error {
    open_fails(config, reply, NoTls)
}

pub(super) fn open_fails<T>(config: &Config, reply: &[u8], tls: T) -> Error
where
    T: TlsConnect<DuplexStream>,
{
    block(async {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let peer = async {
            let _ = far.read(&mut [0; 1024]).await.unwrap();
            far.write_all(reply).await.unwrap();
            drop(far);
        };
        let (opened, ()) = tokio::join!(config.connect_raw(near, tls), peer);
        opened.map(drop).unwrap_err()
    })
}

/// The errors of a statement and of its session's driver, when the server answers with `reply` and hangs up.
pub(super) fn both_fail(reply: &[u8]) -> (Error, Option<Error>) {
    run(reply, async |client| client.simple_query("SELECT 1").await.map(drop).unwrap_err())
}

pub(super) fn fails(reply: &[u8]) -> Error {
    both_fail(reply).0
}

pub(super) fn run<T>(reply: &[u8], work: impl AsyncFnOnce(Client) -> T) -> (T, Option<Error>) {
    block(async {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let server = async {
            let _ = far.read(&mut [0; 1024]).await.unwrap();
            far.write_all(&welcome()).await.unwrap();
            // Read the statement. Nothing comes if the client finds its mistake by itself.
            let _ = far.read(&mut [0; 1024]).await.unwrap();
            far.write_all(reply).await.unwrap();
            drop(far);
        };
        let session = async {
            let config = config();
            let (client, connection) = config.connect_raw(near, NoTls).await.unwrap();
            tokio::join!(work(client), connection)
        };
        let ((out, driver), ()) = tokio::join!(session, server);
        (out, driver.err())
    })
}

pub(super) fn report(report: Report<'_>) -> Error {
    let error = fails(&[report.bytes(), message(b'Z', b"I")].concat());
    assert!(error.as_db_error().is_some(), "{report:?} gave {error:?}");
    error
}

/// The error of a statement that a server refused.
pub(crate) fn refused_statement(code: &str, message: &str) -> Error {
    report(Report::server("ERROR", code, message, "exec_simple_query"))
}

/// A server's report, or a proxy's if there is no routine.
pub(crate) fn reported(severity: &str, code: &str, message: &str, routine: Option<&str>) -> DbError {
    let row = Report { severity, plain: Some(severity), code, message, routine };
    report(row).as_db_error().unwrap().clone()
}

pub(super) fn refusal(report: Report<'_>) -> Error {
    let error = open_fails_with(&config(), &report.bytes());
    assert!(error.as_db_error().is_some(), "{report:?} gave {error:?}");
    error
}

#[derive(Debug)]
pub(super) struct Outer(pub(super) Box<dyn StdError + Send + Sync>);

impl fmt::Display for Outer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the order could not be stored")
    }
}

impl StdError for Outer {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.0)
    }
}
