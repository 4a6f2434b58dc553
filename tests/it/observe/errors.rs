//! Every mistake is a typed error with a sentence that says what to do, and comes as soon as it can be known.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use testbed::{Answer, Cluster, Dns, Garbage, Node, Tap, eventually};
use tokio_postgres_failover::error::{FailureKind, UnavailableReason};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{BuildError, Error, Pool, PoolBuilder, RetryPolicy};

use crate::support::PATIENCE;
use crate::support::texts::says;

/// The default deadline is thirty seconds: what ends before this did not wait for it. A refused log-in is tried once a
/// second, and a machine may stall.
const AT_ONCE: Duration = Duration::from_secs(12);

/// What is wrong with a configuration, by the option that the error names.
fn invalid(error: &BuildError) -> &'static str {
    match error {
        BuildError::Url(_) => "url",
        BuildError::NoHost => "no host",
        BuildError::Invalid { option, .. } | BuildError::NoTls { option } => option,
        BuildError::Resolver(_) => "resolver",
        BuildError::NoRuntime => "no runtime",
        _ => "?",
    }
}

/// Acceptance 9: connection strings that cannot be used.
#[tokio::test]
async fn bad_connection_strings_are_refused() {
    let table: &[(&str, &str, &[&str])] = &[
        ("", "no host", &["name at least one server"]),
        ("postgres://", "no host", &["postgres://app@my-pg.internal/app"]),
        ("user=app", "no host", &["name at least one server"]),
        ("host='' user=app", "no host", &["name at least one server"]),
        ("host=a,,b user=app", "no host", &["name at least one server"]),
        ("nonsense", "url", &["expected postgres://", "host="]),
        ("mysql://app@db/app", "url", &["expected postgres://"]),
        ("postgres://app@db:notaport/app", "url", &["expected postgres://"]),
        ("postgres://app@db:99999/app", "url", &["expected postgres://"]),
        ("postgres://app@[::1/app", "url", &["expected postgres://"]),
        ("postgres://app@db/app?no_such_option=1", "url", &["tokio-postgres' options", "expected"]),
        ("postgres://app@db/app?connect_timeout=soon", "url", &["connect_timeout", "whole seconds, as in 5"]),
        (
            "postgres://app@db/app?target_session_attrs=master",
            "url",
            &["target_session_attrs", "read-write, primary or any"],
        ),
        ("postgres://app@db/app\n", "connection string", &["ends with a line break", "remove"]),
        ("postgres:///app?host=a,b,c&port=1,2", "port", &["2 ports for 3 hosts", "one port, or one for each"]),
        ("postgres://app@[fe80::1%25eth0]/app", "host", &["interface", "unique local address"]),
        ("host=db hostaddr=fe80::1%2", "hostaddr", &["interface", "unique local address"]),
        ("host=db hostaddr=nowhere", "url", &["hostaddr", "expected"]),
        ("postgres://app@db:0/app", "port", &["0 is not a port", "5432"]),
        ("host=a,b,c port=1,2 user=app", "port", &["2 ports for 3 hosts", "one port, or one for each"]),
        ("host=a,b hostaddr=127.0.0.1 user=app", "hostaddr", &["2 hosts and 1 hostaddrs", "one hostaddr for each"]),
        ("postgres://app@db/app?target_session_attrs=read-only", "target_session_attrs", &["primary", "remove"]),
        ("postgres://app@db/app?target_session_attrs=standby", "target_session_attrs", &["standby", "remove"]),
        ("host=db target_session_attrs=prefer-standby", "target_session_attrs", &["prefer-standby", "remove"]),
        ("postgres://app@db/app?load_balance_hosts=random", "load_balance_hosts", &["primary", "remove"]),
        ("postgres://app@db/app?passfile=/x", "passfile", &["not honoured", "password"]),
        ("postgres://app@db/app?service=x", "service", &["not honoured", "remove"]),
        ("host=db gssencmode=disable", "gssencmode", &["not honoured", "remove"]),
        ("host=db client_encoding=latin1", "client_encoding", &["UTF8"]),
        ("host=db require_auth=scram-sha-256", "require_auth", &["not honoured", "channel_binding"]),
        ("host=/run/pg requirepeer=postgres", "requirepeer", &["not honoured", "remove"]),
        ("host=db keepalives_count=3", "keepalives_count", &["keepalives_retries"]),
        ("host=db fallback_application_name=x", "fallback_application_name", &["application_name"]),
        ("host=db scram_client_key=x", "scram_client_key", &["not honoured"]),
        ("host=db oauth_issuer=x", "oauth_issuer", &["not honoured"]),
        ("host=db min_protocol_version=3.2", "min_protocol_version", &["not honoured"]),
        (
            "postgres://app@db/app?sslmode=disable&channel_binding=require",
            "channel_binding",
            &["needs TLS", "sslmode=disable"],
        ),
        ("postgres://app@db/app?sslnegotiation=direct", "sslnegotiation", &["sslmode", "verify-full"]),
        ("host=db sslnegotiation=direct sslmode=disable", "sslnegotiation", &["sslmode", "verify-full"]),
        ("host=@pg user=app", "host", &["abstract", "folder"]),
        ("postgres:///app?host=/run/pg,%40pg", "host", &["abstract", "folder"]),
        (
            "host=db options='-c default_transaction_read_only=on'",
            "options",
            &["default_transaction_read_only", "primary"],
        ),
        (
            "postgres://app@db/app?options=-cwork_mem%3D8MB%20--default-transaction-read-only%3DTRUE",
            "options",
            &["default_transaction_read_only", "remove"],
        ),
    ];
    refused(table);
    let long = format!("host=/{} user=app", "x".repeat(100));
    refused(&[(long.as_str(), "host", &["too long"])]);
}

/// Acceptance 9: what asks for TLS, and nothing that could do it.
#[cfg(not(feature = "rustls"))]
#[tokio::test]
async fn tls_without_a_connector_is_refused() {
    let words: &[&str] = &["enable this crate's feature `rustls`", "PoolBuilder::tls"];
    refused(&[
        ("postgres://app@db/app?sslmode=require", "sslmode", words),
        ("postgres://app@db/app?sslmode=verify-ca", "sslmode", words),
        ("host=db sslmode = 'verify-full'", "sslmode", words),
        ("postgres://app@db/app?channel_binding=require", "channel_binding", words),
        ("postgres://app@db/app?sslmode=verify-full&sslrootcert=system", "sslrootcert", words),
        ("host=db sslcert=a.pem sslkey=b.pem", "sslcert", words),
    ]);
}

fn refused(table: &[(&str, &str, &[&str])]) {
    for (url, what, words) in table {
        let error = match Pool::builder(*url) {
            Ok(builder) => builder.build().map(drop).unwrap_err(),
            Err(error) => error,
        };
        let text = error.to_string();
        assert_eq!(invalid(&error), *what, "{url}: {error:?}");
        for word in *words {
            assert!(text.contains(word), "{url}: {text:?} lacks {word:?}");
        }
    }
}

/// Acceptance 9: what the configuration carries and the pool honours in its own way is taken.
#[tokio::test]
async fn harmless_options_are_taken() {
    for url in [
        "postgres://app@127.0.0.1/app?target_session_attrs=read-write",
        "postgres://app@127.0.0.1/app?target_session_attrs=any",
        "host=127.0.0.1 user=app target_session_attrs=primary",
        "postgres:///app?host=/a,/b,/c&port=1,2,3",
        "postgres://app@127.0.0.1,127.0.0.2/app?port=5433",
        "postgres://app@127.0.0.1/app?load_balance_hosts=disable",
        "postgres://app@127.0.0.1/app?sslmode=prefer",
        "postgres://app@127.0.0.1/app?connect_timeout=5&keepalives=0&tcp_user_timeout=7",
        "postgres://app:my-password=1@127.0.0.1/app",
        "postgres://app@127.0.0.1/app?options=-c%20default_transaction_read_only%3Don\
         %20-c%20default_transaction_read_only%3Doff",
        "host=127.0.0.1 options='-c my.default_transaction_read_only=on'",
        "host=/var/run/postgresql user=app",
        "host=127.0.0.1 user=app client_encoding=UTF8",
        "postgres://app@127.0.0.1/app?client_encoding=utf-8",
    ] {
        assert!(Pool::builder(url).unwrap().build().is_ok(), "{url}");
    }
}

/// Acceptance 9: sizes and durations of nothing, and settings that contradict each other.
#[tokio::test]
async fn bad_settings_are_refused() {
    type Set = fn(PoolBuilder) -> PoolBuilder;
    const ZERO: Duration = Duration::ZERO;
    const SECOND: Duration = Duration::from_secs(1);
    let table: &[(Set, &str, &str)] = &[
        (|b| b.max_size(0), "max_size", "at least 1"),
        (|b| b.max_size(4).min_idle(5), "min_idle", "more than max_size"),
        (|b| b.accept_new_cluster_after(ZERO), "accept_new_cluster_after", "longer than zero"),
        (
            |b| b.accept_new_cluster_after(SECOND).system_identifier(7),
            "accept_new_cluster_after",
            "contradicts `system_identifier`",
        ),
        (|b| b.connection_gate(0), "connection_gate", "at least 1"),
        (|b| b.checkout_timeout(ZERO), "checkout_timeout", "longer than zero"),
        (|b| b.heartbeat_interval(ZERO), "heartbeat_interval", "longer than zero"),
        (|b| b.heartbeat_timeout(ZERO), "heartbeat_timeout", "longer than zero"),
        (|b| b.patrol_interval(ZERO), "patrol_interval", "longer than zero"),
        (|b| b.poll_interval(ZERO, SECOND), "poll_interval", "longer than zero"),
        (|b| b.poll_interval(SECOND, SECOND / 2), "poll_interval", "shortest"),
        (|b| b.probe_timeout(ZERO), "probe_timeout", "longer than zero"),
        (|b| b.dns_servers([]), "dns_servers", "at least one"),
        (|b| b.dead_after(ZERO), "dead_after", "longer than zero"),
        (|b| b.retry(RetryPolicy::new().deadline(ZERO)), "retry", "deadline is zero"),
        (|b| b.retry(RetryPolicy::new().attempts(0)), "retry", "at least 1"),
        (|b| b.retry(RetryPolicy::new().factor(f64::NAN)), "retry", "factor"),
        (|b| b.retry(RetryPolicy::new().max_delay(ZERO)), "retry", "max_delay"),
    ];
    for (set, option, word) in table {
        let builder = set(Pool::builder("postgres://app@127.0.0.1/app").unwrap());
        let error = builder.build().map(drop).unwrap_err();
        assert_eq!(invalid(&error), *option, "{error:?}");
        assert!(error.to_string().contains(word) && error.to_string().contains(option), "{error}");
    }
}

/// Acceptance 9: without a runtime there is no panic, but an error that names it.
#[test]
fn building_outside_a_runtime_is_refused() {
    let error = Pool::builder("postgres://app@127.0.0.1/app").unwrap().build().map(drop).unwrap_err();
    assert!(matches!(error, BuildError::NoRuntime), "{error:?}");
    assert!(error.to_string().contains("#[tokio::main]"), "{error}");
    let error = Pool::builder("postgres://app@127.0.0.1/app").unwrap().build_manager().map(drop).unwrap_err();
    assert!(matches!(error, BuildError::NoRuntime), "{error:?}");
}

/// All three calls fail alike, and at once.
async fn refused_at_once(pool: &Pool, words: &[&str]) {
    let began = Instant::now();
    let errors = [
        pool.get().await.map(drop).unwrap_err(),
        pool.connect().await.unwrap_err(),
        pool.transaction(async |_| Ok(())).await.unwrap_err(),
    ];
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
    for error in errors {
        let Error::Refused(refused) = &error else { panic!("{error:?}") };
        assert!(matches!(refused.failure().kind, FailureKind::Refused | FailureKind::NotPostgres));
        let text = error.to_string();
        assert!(refused.endpoint().is_some_and(|endpoint| text.contains(&endpoint.to_string())), "{refused:?}");
        for word in words {
            assert!(text.contains(word), "{text:?} lacks {word:?}");
        }
    }
}

/// The connection that a caller holds, and the heart-beat's: both outlive a change of the password.
async fn both_sessions_are_open(owner: &tokio_postgres::Client) {
    let open = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    eventually("the heart-beat has its session", PATIENCE, async || {
        owner.query_one(open, &[]).await.unwrap().get::<_, i64>(0) >= 2
    })
    .await;
}

/// What is told when the time is up, of a candidate or a name that has answered by then, which takes longer on a busy
/// machine.
async fn told_at_a_deadline(pool: &Pool, words: &[&str]) -> Error {
    let mut told = None;
    eventually("the answer is told", PATIENCE, async || {
        let error = pool.get().await.unwrap_err();
        let text = error.to_string();
        println!("{text}");
        let all = words.iter().all(|word| text.contains(word));
        told = Some(error);
        all
    })
    .await;
    told.unwrap()
}

async fn waits_for_success(pool: &Pool) {
    eventually("the same pool works now", PATIENCE, async || pool.get().await.is_ok()).await;
    pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
}

/// Acceptance 9, C9: a wrong password fails at once; the same pool works when it was put right.
#[tokio::test]
async fn c9_a_wrong_password_fails_at_once() {
    let cluster = Cluster::builder().nodes(3).password("the-right-one").start().await;
    let hosts: Vec<_> = cluster.nodes().into_iter().map(|node| cluster.socket_addr(node).to_string()).collect();
    let pool = Pool::builder(format!("postgres://app:the-new-one@{}/app", hosts.join(","))).unwrap().build().unwrap();
    refused_at_once(&pool, &["28P01", "password authentication failed", "check user, password"]).await;
    eventually("the status tells of the refusal", PATIENCE, async || {
        matches!(pool.status().view.state, State::Searching { refused: Some(_) })
    })
    .await;

    let owner = cluster.direct(Node(0)).await;
    owner.batch_execute("ALTER ROLE app PASSWORD 'the-new-one'").await.unwrap();
    waits_for_success(&pool).await;
}

/// Acceptance 9, C9: no password where one is asked for.
#[tokio::test]
async fn c9_a_missing_password_fails_at_once() {
    let cluster = Cluster::builder().nodes(1).password("secret").start().await;
    let pool = Pool::builder(format!("postgres://app@{}/app", cluster.socket_addr(Node(0)))).unwrap().build().unwrap();
    refused_at_once(&pool, &["password", "check user, password"]).await;
}

/// Acceptance 9, C9: a missing database, a missing role, a TLS server that is none: at once, and the first two can be
/// made.
#[tokio::test]
async fn c9_a_missing_database_or_role_fails_at_once() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let addr = cluster.socket_addr(Node(0));
    let no_database = Pool::builder(format!("postgres://app@{addr}/orders")).unwrap().build().unwrap();
    refused_at_once(&no_database, &["3D000", "database \"orders\" does not exist", "check user, password, database"])
        .await;
    let no_role = Pool::builder(format!("postgres://clerk@{addr}/app")).unwrap().build().unwrap();
    refused_at_once(&no_role, &["28000", "role \"clerk\" does not exist", "check user"]).await;

    let owner = cluster.direct(Node(0)).await;
    owner.batch_execute("CREATE DATABASE orders").await.unwrap();
    owner.batch_execute("CREATE ROLE clerk LOGIN").await.unwrap();
    waits_for_success(&no_database).await;
    waits_for_success(&no_role).await;
}

/// Acceptance 9, C9: a role whose rights end while the pool runs: new connections fail at once, the open one goes on.
#[tokio::test]
async fn c9_a_password_changed_meanwhile_refuses_new_connections() {
    let cluster = Cluster::builder().nodes(1).password("old").start().await;
    let pool = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
    let open = pool.get().await.unwrap();
    let owner = cluster.direct(Node(0)).await;
    both_sessions_are_open(&owner).await;
    owner.batch_execute("ALTER ROLE app PASSWORD 'new'").await.unwrap();
    let began = Instant::now();
    let error = pool.get().await.unwrap_err();
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
    assert!(matches!(error, Error::Refused(_)), "{error:?}");
    open.batch_execute("SELECT 1").await.unwrap();
    owner.batch_execute("ALTER ROLE app PASSWORD 'old'").await.unwrap();
    waits_for_success(&pool).await;
}

/// Acceptance 9: what is not PostgreSQL is named as such, at once.
#[tokio::test]
async fn what_is_not_postgresql_fails_at_once() {
    let local = SocketAddr::from(([127, 0, 0, 1], 0));
    for bytes in [&[0; 64][..], b"R\0\0\0\x08\0\0\0\x63", b"Z\0\0\0\x05I"] {
        let garbage = Garbage::start(local, bytes).await;
        let pool = Pool::builder(format!("postgres://app@{}/app", garbage.addr())).unwrap().build().unwrap();
        refused_at_once(&pool, &["not PostgreSQL", "check host and port"]).await;
    }
}

/// Acceptance 9: what hangs up without a word looks like a proxy without a server (R8), which is waited for; the error
/// names both.
#[tokio::test]
async fn what_may_not_be_postgresql_is_named_at_the_deadline() {
    let garbage = Garbage::start(([127, 0, 0, 1], 0).into(), b"").await;
    let builder = Pool::builder(format!("postgres://app@{}/app", garbage.addr())).unwrap();
    let pool = builder.checkout_timeout(Duration::from_secs(2)).build().unwrap();
    let error = told_at_a_deadline(&pool, &["not PostgreSQL", &garbage.addr().to_string()]).await;
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
}

/// Whatever else speaks at the port is told early, and by its name: those who close, and those who wait for more.
#[tokio::test]
async fn what_speaks_another_protocol_is_named_early() {
    let local = SocketAddr::from(([127, 0, 0, 1], 0));
    for (bytes, name) in [
        (&b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"[..], "HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (b"-ERR unknown command\r\n", "Redis"),
    ] {
        let closes = Garbage::start(local, bytes).await;
        let waits = talker(bytes).await;
        for addr in [closes.addr(), waits] {
            let pool = Pool::builder(format!("postgres://app@{addr}/app")).unwrap().build().unwrap();
            let began = Instant::now();
            let error = pool.get().await.unwrap_err();
            assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
            let Error::Refused(refused) = &error else { panic!("{error:?}") };
            assert_eq!(refused.failure().kind, FailureKind::NotPostgres);
            for word in [name, "not PostgreSQL", "check host and port", &addr.to_string()] {
                assert!(error.to_string().contains(word), "{error} lacks {word}");
            }
        }
    }
}

/// Answers the first bytes with these, and leaves the connection open.
async fn talker(bytes: &'static [u8]) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(bytes).await;
                std::future::pending::<()>().await;
            });
        }
    });
    addr
}

/// A name that nobody knows is told after a moment, not at the deadline; in a failover it is waited for.
#[tokio::test]
async fn a_name_that_nobody_knows_is_told_early() {
    let dns = Dns::start(([127, 0, 0, 1], 0).into()).await;
    for answer in [Answer::NxDomain, Answer::Empty] {
        dns.answer(answer);
        let builder = Pool::builder("postgres://app@pg.internal,db.internal/app").unwrap().dns_servers([dns.addr()]);
        let pool = builder.build().unwrap();
        let began = Instant::now();
        let errors = [pool.get().await.map(drop).unwrap_err(), pool.transaction(async |_| Ok(())).await.unwrap_err()];
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        for error in errors {
            let Error::Unavailable(unavailable) = &error else { panic!("{error:?}") };
            assert_eq!(unavailable.reason(), UnavailableReason::Dns);
            for word in ["pg.internal", "db.internal", "check the host name"] {
                assert!(error.to_string().contains(word), "{error}");
            }
        }
    }
    // A moment later there is one.
    let cluster = Cluster::builder().nodes(1).start().await;
    cluster.dns().answer(Answer::NxDomain);
    let pool = Pool::builder(cluster.url()).unwrap().dns_servers([cluster.dns().addr()]).build().unwrap();
    let waiting = tokio::spawn(async move { pool.get().await.map(drop) });
    eventually("it was asked for", PATIENCE, async || cluster.dns().queries() >= 2).await;
    cluster.dns().set(&[cluster.addr(Node(0))]);
    waiting.await.unwrap().unwrap();
}

/// What was refused before a call is asked anew for it: the database that was missing may have been made.
#[tokio::test]
async fn a_refusal_from_before_a_call_is_not_its_answer() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let owner = cluster.direct(Node(0)).await;
    let pool =
        Pool::builder(format!("postgres://app@{}/orders", cluster.socket_addr(Node(0)))).unwrap().build().unwrap();
    let error = pool.get().await.map(drop).unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error:?}");
    owner.batch_execute("CREATE DATABASE orders").await.unwrap();
    pool.get().await.unwrap();
}

/// However many callers there are, a wrong password is tried about once a second, and no slot is waited for with a
/// pause.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_no_storm_of_log_ins() {
    let cluster = Cluster::builder().nodes(1).password("right").start().await;
    let tap = Tap::start(([127, 0, 0, 1], 0).into(), cluster.socket_addr(Node(0))).await;
    // At first, and once the password is changed under a pool that works.
    for first in ["wrong", "right"] {
        let builder = Pool::builder(format!("postgres://app:{first}@{}/app", tap.addr())).unwrap();
        // A stall of the machine must not end the primary, after which everybody waits, nor a log-in, after which the
        // primary is asked on a new session.
        let builder = builder.heartbeat_timeout(Duration::from_secs(10)).probe_timeout(Duration::from_secs(10));
        let pool = builder.patrol_interval(Duration::from_secs(600)).build().unwrap();
        if first == "right" {
            std::mem::forget(pool.get().await.unwrap());
            let owner = cluster.direct(Node(0)).await;
            both_sessions_are_open(&owner).await;
            owner.batch_execute("ALTER ROLE app PASSWORD 'other'").await.unwrap();
        }
        tap.reset();
        let began = Instant::now();
        let callers = (0..20).map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let mut refused = 0;
                while began.elapsed() < Duration::from_secs(5) {
                    refused += u32::from(matches!(pool.get().await, Err(Error::Refused(_))));
                }
                refused
            })
        });
        let mut refused = 0;
        for caller in callers.collect::<Vec<_>>() {
            refused += caller.await.unwrap();
        }
        let (startups, took) = (tap.counts().startups, began.elapsed());
        println!("{first}: {startups} log-ins, {refused} calls refused in {took:?}");
        assert!(refused >= 20, "everybody is told: {refused}");
        // At first there are those that are under way when one is refused, or begin before everybody knows of it.
        assert!(startups <= 10 + took.as_secs(), "{startups} log-ins in {took:?}");
    }
}

/// Acceptance 9, D1: a name that does not resolve is waited for, and the error says whose fault it is.
#[tokio::test]
async fn a_name_that_does_not_resolve_says_so() {
    let dns = Dns::start(([127, 0, 0, 1], 0).into()).await;
    for (answer, word) in [(Answer::NxDomain, "NXDOMAIN"), (Answer::ServFail, "SERVFAIL"), (Answer::Empty, "address")] {
        dns.answer(answer);
        let builder = Pool::builder("postgres://app@pg.internal/app").unwrap().dns_servers([dns.addr()]);
        let pool = builder.checkout_timeout(Duration::from_millis(300)).build().unwrap();
        let words = [word, "pg.internal", "check the host name and the name servers"];
        let error = told_at_a_deadline(&pool, &words).await;
        let Error::Unavailable(unavailable) = &error else { panic!("{error:?}") };
        assert_eq!(unavailable.reason(), UnavailableReason::Dns);
        says(&error, "UnavailableReason::Dns");
    }
}

/// A server without a slot is asked less and less often, whatever the number of callers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s11_a_full_server_is_no_storm_of_log_ins() {
    let cluster = Cluster::builder().nodes(1).setting("max_connections", "12").start().await;
    let tap = Tap::start(([127, 0, 0, 1], 0).into(), cluster.socket_addr(Node(0))).await;
    let pool = Pool::builder(format!("postgres://app@{}/app", tap.addr())).unwrap().max_size(16).build().unwrap();
    let held = pool.get().await.unwrap();
    let mut others = Vec::new();
    let url = format!("postgres://app@{}/app", cluster.socket_addr(Node(0)));
    while let Ok((client, connection)) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await {
        tokio::spawn(connection);
        others.push(client);
    }
    tap.reset();
    let began = Instant::now();
    let callers: Vec<_> = (0..20)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let mut kept = Vec::new();
                while began.elapsed() < Duration::from_secs(5) {
                    kept.extend(pool.get_within(Duration::from_secs(1)).await.ok());
                }
                kept
            })
        })
        .collect();
    // A session that ended while the slots were taken leaves one, which serves one caller.
    let mut kept = Vec::new();
    for caller in callers {
        kept.extend(caller.await.unwrap());
    }
    assert!(kept.len() <= 2, "{} callers found a slot at a full server", kept.len());
    let (startups, took) = (tap.counts().startups, began.elapsed());
    println!("{startups} log-ins in {took:?}");
    assert!(startups <= 10 * took.as_secs(), "{startups} log-ins in {took:?}");
    drop(others);
    eventually("there are slots again", PATIENCE, async || pool.get().await.is_ok()).await;
    held.batch_execute("SELECT 1").await.unwrap();
}
