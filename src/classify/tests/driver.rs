//! Errors that the driver or the operating system finds, and no server reports.

use std::future::{Ready, ready};
use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio_postgres::config::SslMode;
use tokio_postgres::tls::{NoTlsStream, TlsConnect};
use tokio_postgres::{Config, NoTls};

use super::super::*;
use super::script::{Outer, block, both_fail, config, fails, message, open_fails, open_fails_with, run, welcome};

#[test]
fn a_session_that_ends() {
    // FIN, and a FIN in the middle of a message.
    for reply in [&b""[..], &message(b'D', &[0; 64])[..20]] {
        let (statement, driver) = both_fail(reply);
        assert!(statement.is_closed());
        assert_eq!(classify(&statement), Verdict::ConnectionLost);
        assert_eq!(classify(&driver.unwrap()), Verdict::ConnectionLost);
        assert!(!commit_refused(&statement));
    }
    // While a session opens: HAProxy without a server behind it.
    for reply in [&b""[..], &welcome()[..6]] {
        let error = open_fails_with(&config(), reply);
        assert_eq!(verdict_of_open(&error), Verdict::ConnectionLost, "{error:?}");
    }
    assert_eq!(classify(&Error::__private_api_timeout()), Verdict::ConnectionLost);
}

#[test]
fn a_peer_of_another_kind() {
    let lengths_lie = [b'R', 0, 0, 0, 1, 0, 0, 0, 0];
    for reply in [&lengths_lie[..], &message(b'!', b"hello"), &message(b'D', &[0; 8])] {
        let error = open_fails_with(&config(), reply);
        assert_eq!(verdict_of_open(&error), Verdict::NotPostgres, "{error:?}");
    }
    let not_a_query_answer = [message(b'R', &[0; 4]), message(b'Z', b"I")].concat();
    for reply in [not_a_query_answer, [message(b'!', b""), message(b'Z', b"I")].concat()] {
        assert_eq!(classify(&fails(&reply)), Verdict::NotPostgres);
    }
}

#[test]
fn mistakes_of_the_caller() {
    let (error, _) = run(b"", async |client| client.simple_query("SELECT '\0'").await.map(drop).unwrap_err());
    assert_eq!(classify(&error), Verdict::Application, "{error:?}");
    let (error, _) = run(b"", async |client| client.query_typed("SELECT '\0'", &[]).await.map(drop).unwrap_err());
    assert_eq!(classify(&error), Verdict::Application, "{error:?}");
}

#[test]
fn errors_without_a_code_have_a_name_for_telemetry() {
    let (closed, _) = both_fail(b"");
    let (usage, _) = run(b"", async |client| client.simple_query("SELECT '\0'").await.map(drop).unwrap_err());
    let nonsense = fails(&[message(b'!', b""), message(b'Z', b"I")].concat());
    let no_password = open_fails_with(&config(), &message(b'R', &[0, 0, 0, 3]));
    let kerberos = open_fails_with(&config(), &message(b'R', &[0, 0, 0, 2]));
    let text = "host=a target_session_attrs=primary".parse::<Config>().unwrap_err();
    for (error, name) in [
        (closed, "connection_lost"),
        (usage, "usage"),
        (nonsense, "protocol"),
        (no_password, "configuration"),
        (kerberos, "authentication"),
        (text, "configuration"),
        (Error::__private_api_timeout(), "timed_out"),
    ] {
        assert_eq!(without_code(&error), name, "{error:?}");
    }
}

#[test]
fn settings_that_cannot_work() {
    let no_password = open_fails_with(&config(), &message(b'R', &[0, 0, 0, 3]));
    assert_eq!(explain(&no_password), "invalid configuration: password missing");
    let kerberos = open_fails_with(&config(), &message(b'R', &[0, 0, 0, 2]));
    assert_eq!(explain(&kerberos), "authentication error: unsupported authentication method");
    let no_host = block(config().connect(NoTls)).map(drop).unwrap_err();
    let text = "host=a target_session_attrs=primary".parse::<Config>().unwrap_err();
    assert_eq!(explain(&text), "invalid connection string: invalid value for option `target_session_attrs`");
    for error in [no_password, kerberos, no_host, text] {
        assert_eq!(verdict_of_open(&error), Verdict::Refused, "{error:?}");
        assert_eq!(classify(&error), Verdict::Refused, "{error:?}");
    }
}

#[test]
fn a_port_where_nobody_listens() {
    let mut config = config();
    config.host("127.0.0.1").port(1);
    let error = block(config.connect(NoTls)).map(drop).unwrap_err();
    assert_eq!(verdict_of_open(&error), Verdict::ConnectionLost, "{error:?}");
    assert!(explain(&error).starts_with("error connecting to server: "));
}

#[test]
fn the_drivers_own_role_check() {
    use tokio_postgres::config::TargetSessionAttrs::{ReadOnly, ReadWrite};
    for (wanted, read_only, verdict) in
        [(ReadWrite, &b"on"[..], Verdict::ReadOnly), (ReadOnly, &b"off"[..], Verdict::NotNow)]
    {
        // The answer to SHOW transaction_read_only.
        let length = u8::try_from(read_only.len()).unwrap();
        let answer = [
            message(b'T', &[&[0, 1, b'x', 0][..], &[0; 18]].concat()),
            message(b'D', &[&[0, 1, 0, 0, 0, length], read_only].concat()),
            message(b'C', b"SHOW\0"),
            message(b'Z', b"I"),
        ]
        .concat();
        let error = block(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let mut config = config();
            config.host("127.0.0.1").port(port).target_session_attrs(wanted);
            let server = async {
                let (mut peer, _) = listener.accept().await.unwrap();
                let _ = peer.read(&mut [0; 1024]).await.unwrap();
                peer.write_all(&welcome()).await.unwrap();
                let _ = peer.read(&mut [0; 1024]).await.unwrap();
                peer.write_all(&answer).await.unwrap();
                peer
            };
            let (opened, _peer) = tokio::join!(config.connect(NoTls), server);
            opened.map(drop).unwrap_err()
        });
        assert_eq!(verdict_of_open(&error), verdict, "{error:?}");
    }
}

/// A handshake that fails with this error.
struct Handshake<E>(E);

impl<E> TlsConnect<DuplexStream> for Handshake<E>
where
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    type Stream = NoTlsStream;
    type Error = E;
    type Future = Ready<Result<NoTlsStream, E>>;

    fn connect(self, _stream: DuplexStream) -> Self::Future {
        ready(Err(self.0))
    }
}

fn handshake<E>(failure: E) -> Error
where
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    let mut config = config();
    config.ssl_mode(SslMode::Require).host("pg.internal");
    open_fails(&config, b"S", Handshake(failure))
}

#[test]
fn tls() {
    let mut required = config();
    required.ssl_mode(SslMode::Require).host("pg.internal");
    let none = open_fails(&required, b"N", Handshake("not reached"));
    assert_eq!(explain(&none), "error performing TLS handshake: server does not support TLS");
    assert_eq!(verdict_of_open(&none), Verdict::Refused);
    // EOF instead of an answer, as HAProxy sends it.
    let hung_up = open_fails(&required, b"", Handshake("not reached"));
    assert_eq!(verdict_of_open(&hung_up), Verdict::ConnectionLost);

    let bad = io::Error::new(io::ErrorKind::InvalidData, "invalid peer certificate: Expired");
    assert_eq!(verdict_of_open(&handshake(bad)), Verdict::Refused);
    for kind in [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset] {
        let cut = io::Error::new(kind, "tls handshake eof");
        assert_eq!(verdict_of_open(&handshake(cut)), Verdict::ConnectionLost);
        let deep = Outer(Box::new(io::Error::from(kind)));
        assert_eq!(verdict_of_open(&handshake(deep)), Verdict::ConnectionLost);
    }
    assert_eq!(verdict_of_open(&handshake("unexpected EOF")), Verdict::ConnectionLost);
}

#[test]
fn a_certificate_is_rejected_after_the_handshake() {
    for text in [
        "received fatal alert: CertificateRequired",
        "received fatal alert: UnknownCA",
        "error:0A00045C:SSL routines:ssl3_read_bytes:tlsv13 alert certificate required",
        "error:0A000418:SSL routines:ssl3_read_bytes:tlsv1 alert unknown ca",
    ] {
        assert!(certificate_alert(text), "{text}");
    }
    for text in ["received fatal alert: InternalError", "invalid peer certificate: Expired"] {
        assert!(!certificate_alert(text), "{text}");
    }
    let alert = || io::Error::new(io::ErrorKind::InvalidData, "received fatal alert: UnknownCA");
    let error = block(async {
        let stream = Broken(alert());
        config().connect_raw(stream, NoTls).await.map(drop).unwrap_err()
    });
    assert_eq!(verdict_of_open(&error), Verdict::Refused, "{error:?}");
    assert_eq!(classify(&error), Verdict::ConnectionLost, "{error:?}");
}

#[test]
fn io_errors() {
    for kind in [
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::BrokenPipe,
        io::ErrorKind::TimedOut,
        io::ErrorKind::PermissionDenied,
        io::ErrorKind::Other,
    ] {
        let error = block(async {
            let stream = Broken(io::Error::from(kind));
            config().connect_raw(stream, NoTls).await.map(drop).unwrap_err()
        });
        assert_eq!(Kind::of(&error), Kind::Io, "{error:?}");
        assert_eq!(classify(&error), Verdict::ConnectionLost, "{error:?}");
        assert_eq!(verdict_of_open(&error), Verdict::ConnectionLost, "{error:?}");
        assert!(!commit_refused(&error));
    }
}

/// A stream that takes everything and answers with one error.
struct Broken(io::Error);

impl tokio::io::AsyncRead for Broken {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        let copy = io::Error::new(self.0.kind(), self.0.to_string());
        std::task::Poll::Ready(Err(copy))
    }
}

impl tokio::io::AsyncWrite for Broken {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::task::Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: std::pin::Pin<&mut Self>, _: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
}
