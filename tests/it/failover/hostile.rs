//! Whatever a server or a name server sends, the pool neither panics nor believes what makes no sense, and it goes on
//! as soon as somebody answers honestly. Nothing here knows how the bytes are read; the scripts only know how to be
//! wrong.

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use testbed::{Answer, Cluster, Dns, Node, Question, RawDns, Reply, Script, Tamper, eventually, record};
use tokio::time::timeout;
use tokio_postgres::NoTls;
use tokio_postgres_failover::error::{FailureKind, UnavailableReason};
use tokio_postgres_failover::resolve::{HickoryResolver, Resolve, ResolveError};
use tokio_postgres_failover::view::{self, Address, State};
use tokio_postgres_failover::{Error, Pool, PoolBuilder};

use crate::support::{PATIENCE, stalls};

/// The default deadline is thirty seconds: what ends before this did not wait for it.
const AT_ONCE: Duration = Duration::from_secs(3);
/// For calls that nobody can serve.
const DEADLINE: Duration = Duration::from_millis(300);
const INTERVAL: Duration = Duration::from_millis(1);
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// A panic in a task of the pool or the driver ends that task alone, and may show nowhere. The tests below run on one
/// thread with all their tasks, so the panics of this thread are theirs.
struct NoPanic;

impl NoPanic {
    fn watch() -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                PANICS.set(PANICS.get() + 1);
                before(info);
            }));
        });
        PANICS.set(0);
        Self
    }
}

impl Drop for NoPanic {
    fn drop(&mut self) {
        assert!(std::thread::panicking() || PANICS.get() == 0, "{} panics in tasks", PANICS.get());
    }
}

async fn script(answer: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Script {
    Script::start((LOOPBACK, 0).into(), answer).await
}

/// A pool that asks without pauses, so that many answers are had in a short time.
fn builder(hosts: &str) -> PoolBuilder {
    Pool::builder(format!("postgres://app@{hosts}/app"))
        .unwrap()
        .poll_interval(INTERVAL, INTERVAL)
        .probe_timeout(Duration::from_millis(200))
        .heartbeat_interval(Duration::from_millis(20))
        .heartbeat_timeout(Duration::from_millis(200))
}

async fn works(pool: &Pool) -> Result<(), String> {
    let client = pool.get().await.map_err(|error| error.to_string())?;
    client.batch_execute("SELECT 1").await.map_err(|error| error.to_string())
}

async fn found(pool: &Pool, when: &str) {
    let mut last = String::new();
    let works = timeout(PATIENCE, async {
        while let Err(error) = works(pool).await {
            last = error;
            tokio::task::yield_now().await;
        }
    });
    assert!(works.await.is_ok(), "not found within {PATIENCE:?}: {when} ({last})");
}

/// The probe is answered so, and everything else honestly.
fn probed(reply: Reply) -> impl Fn(&str) -> Reply + Send + Sync {
    move |sql| if sql.contains("pg_is_in_recovery") { reply.clone() } else { Script::honest(sql) }
}

fn values(row: &[Option<&str>]) -> Vec<Option<Vec<u8>>> {
    row.iter().map(|value| value.map(|text| text.as_bytes().to_vec())).collect()
}

/// What a primary says, but for this column.
fn with(column: usize, value: Option<&[u8]>) -> Reply {
    let mut row = values(&Script::PRIMARY);
    row[column] = value.map(<[u8]>::to_vec);
    Reply::rows([row])
}

fn text(column: usize, value: &str) -> Reply {
    with(column, Some(value.as_bytes()))
}

/// Answers that make no sense, with a word that an error about each has to say.
fn nonsense() -> Vec<(&'static str, Reply, &'static str)> {
    let primary = || values(&Script::PRIMARY);
    let standby = || Script::PRIMARY.map(|value| if value == Some("f") { Some("t") } else { value });
    let columns = |count: usize| Reply::rows([primary().into_iter().cycle().take(count).collect::<Vec<_>>()]);
    let megabyte = "x".repeat(1 << 20);
    vec![
        ("NULL everywhere", Reply::row([None; 8]), "on or off"),
        ("NULL for in recovery", with(0, None), "on or off"),
        ("NULL for read-only", with(1, None), "on or off"),
        ("NULL for the default", with(2, None), "on or off"),
        ("a number for a flag", text(0, "0"), "on or off"),
        ("a word for a flag", text(0, "maybe"), "`maybe`"),
        ("another spelling of a flag", text(1, "OFF"), "`OFF`"),
        ("empty flags", text(2, ""), "on or off"),
        ("empty strings", Reply::row([Some(""); 8]), "on or off"),
        ("a word for the fence", text(3, "maybe"), "`maybe`"),
        ("an empty fence", text(3, ""), "on or off"),
        ("a word for the system identifier", text(4, "pg"), "a system identifier"),
        ("a huge system identifier", text(4, "18446744073709551616"), "a system identifier"),
        ("a system identifier with a point", text(4, "1.5"), "a system identifier"),
        ("an empty system identifier", text(4, ""), "a system identifier"),
        ("a date for the start time", text(5, "2025-01-01"), "a start time"),
        ("a huge start time", text(5, "9223372036854775808"), "a start time"),
        ("infinity for the start time", text(5, "-infinity"), "a start time"),
        ("an empty start time", text(5, ""), "a start time"),
        ("timeline 0", text(6, "0000000000000000000000A1"), "a WAL file"),
        ("a short WAL file", text(6, "00000001"), "a WAL file"),
        ("a long WAL file", text(6, "0000000100000000000000A1.partial"), "a WAL file"),
        ("a negative timeline", text(6, "-000000100000000000000A1"), "a WAL file"),
        ("a WAL file in letters of three bytes", text(6, "一二三四五六七八"), "a WAL file"),
        ("an empty WAL file", text(6, ""), "a WAL file"),
        ("an LSN that is too high", text(7, "FFFFFFFFF/1"), "an LSN"),
        ("an LSN that is too low", text(7, "1/FFFFFFFFF"), "an LSN"),
        ("a negative LSN", text(7, "-1/-1"), "an LSN"),
        ("half an LSN", text(7, "16/"), "an LSN"),
        ("an empty LSN", text(7, ""), "an LSN"),
        ("a megabyte for a flag", text(0, &megabyte), "`xxxx"),
        ("a megabyte for the LSN", text(7, &megabyte), "an LSN"),
        ("bytes for in recovery", with(0, Some(b"\xFF\xFE")), "on or off"),
        ("bytes for the fence", with(3, Some(b"\xFF\xFE")), "on or off"),
        ("bytes for the system identifier", with(4, Some(b"\xFF\xFE")), "a system identifier"),
        ("bytes for the start time", with(5, Some(b"\xC3(")), "a start time"),
        ("bytes for the WAL file", with(6, Some(b"\xF0\x9F\x98")), "a WAL file"),
        ("bytes for the LSN", with(7, Some(b"\0\x80")), "an LSN"),
        ("no row", Reply::Rows { columns: vec!["c".into(); 8], rows: vec![], tag: "SELECT 0".into() }, "`0 rows`"),
        ("no result", Reply::done("SELECT 1"), "`0 rows`"),
        ("an empty query", Reply::Raw(b"I\0\0\0\x04Z\0\0\0\x05I".to_vec()), "`0 rows`"),
        ("two rows", Reply::rows([primary(), primary()]), "`2 rows`"),
        ("two rows that differ", Reply::rows([primary(), values(&standby())]), "`2 rows`"),
        ("two results", Reply::Several(vec![Reply::row(Script::PRIMARY), Reply::row(Script::PRIMARY)]), "`2 rows`"),
        ("a thousand rows", Reply::rows(vec![primary(); 1000]), "`1000 rows`"),
        ("no columns", Reply::rows([vec![]]), "on or off"),
        ("one column", columns(1), "on or off"),
        ("two columns", columns(2), "on or off"),
    ]
}

/// Answers that are odd and make sense; a server that is the only one and gives them is believed.
fn odd() -> Vec<(&'static str, Reply)> {
    let primary = values(&Script::PRIMARY);
    vec![
        // What the role may not read is not told: as with three columns.
        ("NULL for the system identifier", with(4, None)),
        ("NULL for the start time", with(5, None)),
        ("NULL for the timeline", with(6, None)),
        ("NULL for the LSN", with(7, None)),
        ("three columns", Reply::rows([primary[..3].to_vec()])),
        // The first ten are the answer.
        ("a hundred columns", Reply::rows([primary.iter().cycle().take(100).cloned().collect::<Vec<_>>()])),
        ("the highest LSN", text(7, "FFFFFFFF/FFFFFFFF")),
        ("the highest timeline", text(6, "FFFFFFFF00000000000000A1")),
        // PostgreSQL shows 64 unsigned bits as a bigint.
        ("a negative system identifier", text(4, "-9223372036854775808")),
        // A clock that was wrong when the server was started.
        ("a start before 1970", text(5, "-1")),
    ]
}

/// Bytes in the place of an answer that no server sends, and whether they leave the client waiting for more.
fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let row = |values: &[u8]| {
        let body = [&1_u16.to_be_bytes()[..], values].concat();
        let length = i32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [
            b"T\0\0\0\x1a\0\x01c\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0D",
            &length[..],
            &body,
            b"C\0\0\0\x05\0Z\0\0\0\x05I",
        ]
        .concat()
    };
    vec![
        ("a row before its columns", b"D\0\0\0\x0b\0\x01\0\0\0\x01tZ\0\0\0\x05I".to_vec()),
        ("a row that is shorter than its value", row(&[0, 0, 0, 9, b't'])),
        ("a value of negative length", row(&[0xFF, 0xFF, 0xFF, 0xFE])),
        ("a value of two gigabytes", row(&[0x7F, 0xFF, 0xFF, 0xFF, b't'])),
        ("a row without its value", row(&[])),
        ("bytes behind the last value", row(&[0, 0, 0, 1, b't', b'f'])),
        ("more columns than bytes", b"T\0\0\0\x06\xff\xffZ\0\0\0\x05I".to_vec()),
        (
            "a name of a column that is no text",
            b"T\0\0\0\x1a\0\x01\xff\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0Z\0\0\0\x05I".to_vec(),
        ),
        ("a name of a column that does not end", b"T\0\0\0\x09\0\x01cccZ\0\0\0\x05I".to_vec()),
        ("a message shorter than its length", b"C\0\0\0\x03Z\0\0\0\x05I".to_vec()),
        ("a message of negative length", b"D\xff\xff\xff\xff".to_vec()),
        ("a message of two gigabytes", b"D\x7f\xff\xff\xff\0".to_vec()),
        ("an unknown message", b"?\0\0\0\x04Z\0\0\0\x05I".to_vec()),
        ("the start-up again", b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I".to_vec()),
        ("a question for a password", b"R\0\0\0\x08\0\0\0\x03Z\0\0\0\x05I".to_vec()),
        ("a copy that begins", b"G\0\0\0\x07\0\0\0".to_vec()),
        ("an error of a megabyte", long_error()),
        ("an error without fields", b"E\0\0\0\x05\0Z\0\0\0\x05I".to_vec()),
        ("an error without an end", b"E\0\0\0\x07SSSZ\0\0\0\x05I".to_vec()),
        (
            "an error that is no text",
            b"E\0\0\0\x18S\xff\xfe\0C\xff\xff\xff\xff\xff\0M\xff\xff\0\0\0\0Z\0\0\0\x05I".to_vec(),
        ),
        ("a notice without fields", b"N\0\0\0\x05\0Z\0\0\0\x05I".to_vec()),
        ("a setting that is no text", b"S\0\0\0\x08\xff\0\xff\0Z\0\0\0\x05I".to_vec()),
        ("ready without a status", b"Z\0\0\0\x04".to_vec()),
        ("ready twice", b"Z\0\0\0\x05IZ\0\0\0\x05I".to_vec()),
        ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("nothing but zeros", vec![0; 4096]),
    ]
}

fn long_error() -> Vec<u8> {
    let body = format!("SERROR\0VERROR\0CXX000\0M{}\0\0", "x".repeat(1 << 20));
    let length = i32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [b"E", &length[..], body.as_bytes(), b"Z\0\0\0\x05I"].concat()
}

fn assert_short(text: &str) {
    assert!(text.len() < 2000, "an answer is copied at length: {} bytes", text.len());
}

/// `get` says at once that the server's answer makes no sense; the same pool works once it does.
#[tokio::test]
async fn nonsense_is_refused_at_once_and_by_name() {
    let _watch = NoPanic::watch();
    for (name, reply, word) in nonsense() {
        let script = script(probed(reply)).await;
        let pool = builder(&script.addr().to_string()).probe_timeout(PATIENCE).build().unwrap();
        let began = stalls::now();
        let error = pool.get().await.map(drop).expect_err(name);
        assert!(began.elapsed() < AT_ONCE + stalls::slack_since(began), "{name}: {:?}", began.elapsed());
        let Error::Refused(refused) = &error else { panic!("{name}: {error:?}") };
        assert_eq!(refused.failure().kind, FailureKind::NotPostgres, "{name}: {error}");
        let said = pool.candidates().iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        assert!(said.contains(&script.addr().to_string()), "{name}: {said}");
        for text in [&error.to_string(), &said] {
            assert!(text.contains("makes no sense: expected") && text.contains(word), "{name}: {text}");
            assert_short(text);
        }
        assert_eq!(pool.status().view.generation.get(), 0, "{name} was believed");

        script.answer(Script::honest);
        found(&pool, name).await;
        assert_eq!(pool.status().view.generation.get(), 1, "{name}");
    }
}

#[tokio::test]
async fn odd_answers_that_make_sense_are_believed() {
    let _watch = NoPanic::watch();
    for (name, reply) in odd() {
        let script = script(probed(reply)).await;
        let pool = builder(&script.addr().to_string()).build().unwrap();
        pool.connect().await.unwrap_or_else(|error| panic!("{name}: {error}"));
        works(&pool).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// Whatever comes instead of an answer: each call ends with an error, by its deadline, and the task lives on.
#[tokio::test]
async fn garbage_for_an_answer_ends_no_pool() {
    let _watch = NoPanic::watch();
    for (name, bytes) in garbage() {
        let script = script(probed(Reply::Raw(bytes))).await;
        let pool = builder(&script.addr().to_string()).checkout_timeout(DEADLINE).build().unwrap();
        let began = stalls::now();
        let error = pool.get().await.map(drop).expect_err(name);
        let slack = stalls::slack_since(began);
        assert!(began.elapsed() < DEADLINE + AT_ONCE + slack, "{name}: {:?}", began.elapsed());
        assert!(matches!(error, Error::Refused(_) | Error::Unavailable(_)), "{name}: {error:?}");
        eventually(name, PATIENCE, async || pool.candidates().iter().any(|candidate| candidate.answer.is_some())).await;
        assert_short(&error.to_string());
        println!("{name}: {error}");
        assert_eq!(pool.status().view.generation.get(), 0, "{name} was believed");

        script.answer(Script::honest);
        found(&pool, name).await;
    }
}

/// The liar is named first and answers first; the primary beside it is found as if it were alone, and kept.
#[tokio::test]
async fn a_liar_beside_the_primary_is_never_used() {
    let _watch = NoPanic::watch();
    let cluster = Cluster::builder().nodes(1).start().await;
    let primary = cluster.socket_addr(Node(0));
    let script = Script::start(SocketAddr::new(cluster.spare_addr(0), cluster.port()), Script::honest).await;
    let answers = nonsense().into_iter().map(|(name, reply, _)| (name, reply));
    for (name, reply) in answers.chain(garbage().into_iter().map(|(name, bytes)| (name, Reply::Raw(bytes)))) {
        script.answer(probed(reply));
        let hosts = format!("{},{primary}", script.addr());
        // The primary may be slow on a loaded machine, where this test is most of the load.
        let patient = builder(&hosts).heartbeat_timeout(PATIENCE).probe_timeout(Duration::from_secs(1));
        let pause = Duration::from_millis(10);
        let pool = patient.poll_interval(pause, pause).patrol_interval(pause).build().unwrap();
        let began = stalls::now();
        let client = pool.get().await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(began.elapsed() < AT_ONCE + stalls::slack_since(began), "{name}: {:?}", began.elapsed());
        let server = client.query_one("SELECT inet_server_addr()", &[]).await.expect(name).get::<_, IpAddr>(0);
        assert_eq!(server, primary.ip(), "{name}");
        // The patrol asks it again, and changes its mind as little.
        let asked = script.accepted();
        eventually(name, PATIENCE, async || script.accepted() >= asked + 2).await;
        let view = pool.status().view;
        let State::Primary { endpoint, .. } = &view.state else { panic!("{name}: {view:?}") };
        assert_eq!(endpoint.address.to_string(), primary.to_string(), "{name}");
        assert_eq!(view.generation.get(), 1, "{name}");
    }
}

/// The primary begins to lie in its heartbeat: nothing more is handed out, what is out lives on, and it is the same
/// generation when it tells the truth again.
#[tokio::test]
async fn a_primary_that_begins_to_lie_is_suspended_until_it_is_honest() {
    let _watch = NoPanic::watch();
    let script = script(Script::honest).await;
    let addr = script.addr().to_string();
    // Each of these comes at once, if the machine is not too busy.
    // What is held keeps this pool, which meets the garbage at the end, too.
    let patient = builder(&addr).heartbeat_timeout(PATIENCE).probe_timeout(PATIENCE).dead_after(PATIENCE * 10);
    let pool = patient.checkout_timeout(DEADLINE).build().unwrap();
    let held = pool.get().await.unwrap();
    // What a new session says is no word of the primary's while `held` is open. The heartbeat's session is new, too,
    // until it has been asked twice.
    eventually("the heart-beat has a session", PATIENCE, async || script.accepted() >= 2).await;
    for beat in ["first", "second"] {
        let sent = script.sent();
        eventually(beat, PATIENCE, async || script.sent() > sent).await;
    }
    for (name, reply, word) in nonsense() {
        script.answer(probed(reply));
        eventually(name, PATIENCE, async || matches!(pool.status().view.state, State::Searching { .. })).await;
        let error = pool.get().await.map(drop).expect_err(name);
        let Error::Unavailable(unavailable) = &error else { panic!("{name}: {error:?}") };
        assert_eq!(unavailable.reason(), UnavailableReason::NoPrimary, "{name}: {error}");
        let text = error.to_string();
        assert!(text.contains(&addr) && text.contains(word), "{name}: {text}");
        assert_short(&text);
        held.batch_execute("SELECT 1").await.expect(name);

        script.answer(Script::honest);
        found(&pool, name).await;
        assert_eq!(pool.status().view.generation.get(), 1, "{name}");
    }
    drop(pool);
    // Some of these leave the pool waiting for more.
    let pool = builder(&addr).build().unwrap();
    pool.connect().await.unwrap();
    for (name, bytes) in garbage() {
        let before = script.accepted();
        script.answer(probed(Reply::Raw(bytes)));
        // The heartbeat's session ends of it or waits for more, and new ones fare no better. The connections that are
        // open are asked for no role, and serve on.
        eventually(name, PATIENCE, async || script.accepted() > before + 2).await;
        script.answer(Script::honest);
        found(&pool, name).await;
        assert_eq!(pool.status().view.generation.get(), 1, "{name}");
    }
    held.batch_execute("SELECT 1").await.unwrap();
}

/// Once the cluster has an identity, a server that does not tell its own is none of it, however writable it is.
#[tokio::test]
async fn a_server_that_does_not_tell_its_identity_is_not_believed_later() {
    let _watch = NoPanic::watch();
    let script = script(Script::honest).await;
    let pool = builder(&script.addr().to_string()).checkout_timeout(DEADLINE).build().unwrap();
    pool.connect().await.unwrap();
    for reply in [with(4, None), Reply::rows([values(&Script::PRIMARY)[..3].to_vec()]), text(4, "1")] {
        script.answer(probed(reply));
        // It may have been suspended for a slow answer before, of which the error would tell.
        eventually("it is left for what it tells", PATIENCE, async || {
            let Err(error) = pool.get().await.map(drop) else { return false };
            let (state, error) = (pool.status().view.state, error.to_string());
            println!("{error}");
            matches!(state, State::Searching { .. })
                && (error.contains("not identified") || error.contains("another cluster"))
        })
        .await;
        script.answer(Script::honest);
        found(&pool, "it tells again").await;
    }
}

/// The sum of the bytes of one honest session up to the end of the probe's answer.
async fn honest_bytes(script: &Script) -> u64 {
    let before = script.sent();
    let (client, connection) =
        tokio_postgres::connect(&format!("postgres://app@{}/app", script.addr()), NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    client.simple_query("SELECT pg_is_in_recovery()").await.unwrap();
    drop(client);
    connection.await.unwrap().unwrap();
    script.sent() - before
}

/// One caller waits through sessions that end after 0 bytes, 1 byte, 2 bytes and so on, and is served by the first that
/// is whole.
#[tokio::test]
async fn a_close_at_every_byte_is_waited_out() {
    let _watch = NoPanic::watch();
    for password in ["", ":secret"] {
        let script = script(Script::honest).await;
        let total = honest_bytes(&script).await;
        let first = script.accepted();
        script.tamper(move |session| match session - first {
            cut if cut < total => Tamper::Cut(usize::try_from(cut).unwrap()),
            _ => Tamper::Nothing,
        });
        let url = format!("postgres://app{password}@{}/app", script.addr());
        let builder = Pool::builder(url).unwrap().poll_interval(INTERVAL, INTERVAL);
        let pool = builder.checkout_timeout(5 * PATIENCE).build().unwrap();
        let began = Instant::now();
        let client = pool.get().await.unwrap();
        client.batch_execute("SELECT 1").await.unwrap();
        println!("{total} bytes, a session cut at each: {:?}", began.elapsed());
        assert!(total > 300, "a handshake and an answer are longer than {total} bytes");
        assert!(script.accepted() - first > total, "{} sessions", script.accepted() - first);
        assert_eq!(pool.status().view.generation.get(), 1, "half an answer was believed");
    }
}

/// The same while there is a primary: its heartbeat and new connections are cut at every byte; the connection in use
/// stays, and so does the generation.
#[tokio::test]
async fn a_primary_whose_new_sessions_are_cut_keeps_its_connections() {
    let _watch = NoPanic::watch();
    let script = script(Script::honest).await;
    let total = honest_bytes(&script).await;
    let pool = builder(&script.addr().to_string()).max_size(2).build().unwrap();
    let held = pool.get().await.unwrap();
    eventually("the heart-beat has its session", PATIENCE, async || script.accepted() >= 3).await;
    let first = script.accepted();
    // Each session meets another byte; all are met in some forty, as the pauses between them grow.
    let stride = total / 40 + 1;
    script.tamper(move |session| match (session - first) * stride {
        cut if cut < total => Tamper::Cut(usize::try_from(cut).unwrap()),
        _ => Tamper::Nothing,
    });
    let began = Instant::now();
    let mut calls = 0;
    while (script.accepted() - first) * stride <= total {
        calls += 1;
        // A caller wants one more than there are, and is served by the first session that is whole.
        let opened = tokio::join!(pool.get_within(Duration::from_millis(200)), held.batch_execute("SELECT 1"));
        opened.1.unwrap();
        assert!(began.elapsed() < 3 * PATIENCE, "{} sessions", script.accepted() - first);
    }
    found(&pool, "whole sessions").await;
    println!("{total} bytes in {calls} calls: {:?}", began.elapsed());
    held.batch_execute("SELECT 1").await.unwrap();
    assert_eq!(pool.status().view.generation.get(), 1);
}

/// An xorshift step; the tests want other numbers in each run, and the same for the same seed.
fn next(state: &mut u64) -> u64 {
    let mut x = *state | 1;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    *state = x;
    x
}

fn below(state: &mut u64, limit: usize) -> usize {
    usize::try_from(next(state) % (limit.max(1) as u64)).unwrap()
}

/// One to four bytes are flipped, inserted, deleted, or a stretch is doubled.
fn mutate(bytes: &mut Vec<u8>, state: &mut u64) {
    for _ in 0..=below(state, 4) {
        let at = below(state, bytes.len());
        let byte = u8::try_from(next(state) >> 56).unwrap();
        match next(state) % 5 {
            _ if bytes.is_empty() => bytes.push(byte),
            0 => bytes[at] ^= 1 << (byte % 8),
            1 => bytes[at] = byte,
            2 => bytes.insert(at, byte),
            3 => drop(bytes.remove(at)),
            _ => {
                let end = (at + below(state, 16)).min(bytes.len());
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
        }
    }
}

fn mutated(seed: u64) -> impl Fn(u64) -> Tamper {
    move |session| {
        let mut state = seed ^ session.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // One of the first three pieces: the handshake, the answer to the probe, one of what comes after. A broken
        // handshake hides all that follows; and a session must become honest, or a pool would keep one that is not.
        let mut before = next(&mut state) % 3;
        Tamper::Change(Box::new(move |bytes| {
            if before == 0 {
                mutate(bytes, &mut state);
            }
            before = before.wrapping_sub(1);
        }))
    }
}

const MUTATED: u64 = 600;

/// Waits until so many sessions more were mutated, by a caller that is never told that the pool is closed. None of them
/// outlives its first use, so that there is always another one.
async fn endure(pool: &Pool, script: &Script, seed: u64, answer: fn(&str) -> Reply) {
    let until = script.accepted() + MUTATED;
    script.tamper(mutated(seed));
    script.answer(move |sql| if sql == "SELECT 1" { Reply::Close } else { answer(sql) });
    let began = Instant::now();
    // A session that is refused is followed by a pause of up to a second.
    while script.accepted() < until {
        assert!(began.elapsed() < 5 * PATIENCE, "seed {seed}: {} sessions are left", until - script.accepted());
        match timeout(PATIENCE, pool.get()).await.unwrap_or_else(|_| panic!("seed {seed}: get hangs")) {
            Ok(client) => drop(timeout(DEADLINE, client.batch_execute("SELECT 1")).await),
            // A refusal comes at once, and this loop must let the pool have its turn.
            Err(Error::Unavailable(_) | Error::Refused(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("seed {seed}: {error:?}"),
        }
    }
    script.tamper(|_| Tamper::Nothing);
    script.answer(answer);
    println!("seed {seed}: {MUTATED} sessions in {:?}", began.elapsed());
}

fn of_garbage(script: &Script) -> Pool {
    let builder = builder(&script.addr().to_string()).checkout_timeout(Duration::from_millis(150));
    // A part that is refused is looked for within this.
    let limit = Duration::from_millis(75);
    builder.probe_timeout(limit).heartbeat_timeout(limit).build().unwrap()
}

/// A server that tells its role alone has no identity that a changed byte could turn into another one: once it is
/// honest it is found.
#[tokio::test]
async fn random_garbage_is_survived() {
    let _watch = NoPanic::watch();
    let seed = RandomState::new().hash_one(0);
    println!("seed {seed}");
    let role_alone = |sql: &str| match sql {
        _ if sql.contains("pg_control_system") => Reply::error("42501", "permission denied"),
        _ if sql.contains("pg_is_in_recovery") => Reply::row([Some("f"), Some("off"), Some("off")]),
        _ => Script::honest(sql),
    };
    let script = script(role_alone).await;
    let pool = of_garbage(&script);
    endure(&pool, &script, seed, role_alone).await;
    found(&pool, &format!("honest again, seed {seed}")).await;
}

/// With an identity a changed digit may make sense: then the pool has believed it, and says which one it holds to. What
/// it says is true, and a new pool finds the server at once.
#[tokio::test]
async fn random_garbage_in_an_identity_is_survived() {
    let _watch = NoPanic::watch();
    let seed = RandomState::new().hash_one(0);
    println!("seed {seed}");
    let script = script(Script::honest).await;
    let pool = of_garbage(&script);
    endure(&pool, &script, seed, Script::honest).await;
    let convinced = |text: &str| {
        text.contains("another cluster") || text.contains("an old primary") || text.contains("not identified")
    };
    eventually(&format!("honest again, seed {seed}"), PATIENCE, async || match works(&pool).await {
        Ok(()) => true,
        Err(error) => convinced(&error),
    })
    .await;
    found(&of_garbage(&script), &format!("a new pool, seed {seed}")).await;
}

const HOST: &str = "pg.internal";
/// Of one attempt of the resolver; a question has two, and each family its own.
const ATTEMPT: Duration = Duration::from_millis(200);
/// The resolver's own limit, and what a loaded machine takes.
const LIMIT: Duration = Duration::from_secs(2);

async fn asked(addr: SocketAddr, name: &str) -> Result<usize, ResolveError> {
    asked_within(ATTEMPT, addr, name).await
}

/// How many addresses come of an answer that makes sense: at once, but for a stall of the machine.
async fn found_addresses(addr: SocketAddr, name: &str) -> usize {
    asked_within(PATIENCE / 4, addr, name).await.unwrap_or_else(|error| panic!("{name}: {error}"))
}

async fn asked_within(attempt: Duration, addr: SocketAddr, name: &str) -> Result<usize, ResolveError> {
    let resolver = HickoryResolver::with_name_servers([addr]).timeout(attempt);
    let began = stalls::now();
    let answer = timeout(PATIENCE, resolver.resolve(HOST)).await.unwrap_or_else(|_| panic!("{name}: no end"));
    assert!(began.elapsed() < LIMIT + stalls::slack_since(began), "{name} took {:?}", began.elapsed());
    if let Err(error) = &answer {
        println!("{name}: {error}");
        assert_eq!(error.name(), HOST, "{name}: {error:?}");
        assert_short(&error.to_string());
    }
    answer.map(|addresses| addresses.len())
}

/// Aliases that go round, lead nowhere, or on and on: an error that names the host, and never an endless question.
#[tokio::test]
async fn aliases_without_an_end_are_given_up() {
    let _watch = NoPanic::watch();
    let dns = Dns::start((LOOPBACK, 0).into()).await;
    let alias = |of: &str| Answer::Cname(of.to_owned(), Vec::new());
    let before = dns.queries();
    dns.answer(alias(HOST));
    asked(dns.addr(), "an alias of itself").await.unwrap_err();
    dns.answer(alias("a.internal"));
    dns.answer_name("a.internal", alias("b.internal"));
    dns.answer_name("b.internal", alias("a.internal"));
    asked(dns.addr(), "two aliases of each other").await.unwrap_err();
    dns.answer(alias("n0.internal"));
    for n in 0..200 {
        dns.answer_name(&format!("n{n}.internal"), alias(&format!("n{}.internal", n + 1)));
    }
    asked(dns.addr(), "two hundred aliases").await.unwrap_err();
    dns.answer(alias("none.internal"));
    asked(dns.addr(), "an alias of a name that does not exist").await.unwrap_err();
    assert!(dns.queries() - before < 100, "{} questions for four look-ups", dns.queries() - before);
    dns.set(&[IpAddr::from(LOOPBACK)]);
    assert_eq!(found_addresses(dns.addr(), "honest").await, 1);
}

/// What is said of a question; `None` is silence.
type Say = fn(&Question) -> Option<Vec<u8>>;

/// Answers that hold no address of the name, as no server should give them.
fn no_answers() -> Vec<(&'static str, Say)> {
    vec![
        ("nothing at all", |_| Some(Vec::new())),
        ("the id alone", |question| Some(question.id().to_vec())),
        ("text behind the id", |question| Some([&question.id()[..], b"HTTP/1.1 400 Bad Request\r\n\r\n"].concat())),
        ("zeros", |_| Some(vec![0; 512])),
        ("ones", |question| Some([&question.id()[..], &[0xFF; 510]].concat())),
        ("another id", |question| {
            let mut answer = question.address(Ipv4Addr::LOCALHOST);
            answer[0] ^= 0xFF;
            Some(answer)
        }),
        ("the question itself", |question| Some(question.bytes.clone())),
        ("a header alone that promises much", |question| {
            Some([&question.id()[..], &[0x84, 0x80, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]].concat())
        }),
        ("an answer cut within its record", |question| {
            let whole = question.answer(1, &record(1, &[127, 0, 0, 1]));
            Some(whole[..whole.len() - 3].to_vec())
        }),
        ("fewer records than it says", |question| Some(question.answer(65_535, &record(1, &[127, 0, 0, 1])))),
        ("an address of three bytes", |question| Some(question.answer(1, &record(1, &[127, 0, 0])))),
        ("an address of five bytes", |question| Some(question.answer(1, &record(1, &[127, 0, 0, 1, 1])))),
        ("a name that points at itself", |question| {
            let at = u8::try_from(12 + question.section().len()).unwrap();
            let record = [&[0xC0, at], &record(1, &[127, 0, 0, 1])[2..]].concat();
            Some(question.answer(1, &record))
        }),
        ("two names that point at each other", |question| {
            let at = u8::try_from(12 + question.section().len()).unwrap();
            let record = [&[0xC0, at + 2, 0xC0, at], &record(1, &[127, 0, 0, 1])[2..]].concat();
            Some(question.answer(1, &record))
        }),
        ("a name that points behind the end", |question| {
            Some(question.answer(1, &[&[0xFF, 0xFF], &record(1, &[127, 0, 0, 1])[2..]].concat()))
        }),
        ("a name that does not end", |question| {
            Some(question.answer(1, &[&b"\x3F".repeat(64)[..], &record(1, &[127, 0, 0, 1])].concat()))
        }),
        ("an address of another name", |question| {
            Some(question.answer(1, &[&b"\x05other\x08internal\0"[..], &record(1, &[127, 0, 0, 1])[2..]].concat()))
        }),
        ("a text for an address", |question| Some(question.answer(1, &record(16, b"\x05hello")))),
        ("an unknown type", |question| Some(question.answer(1, &record(65_280, &[0; 100])))),
        ("the other family's address", |question| match question.record_type() {
            1 => Some(question.answer(1, &record(28, &[0; 16]))),
            _ => Some(question.answer(1, &record(1, &[127, 0, 0, 1]))),
        }),
        ("an empty answer without an authority", |question| Some(question.answer(0, &[]))),
        ("truncated by TCP as well", |question| Some(question.truncated())),
        ("garbage by TCP", |question| Some(if question.tcp { vec![0xFF; 65_535] } else { question.truncated() })),
        ("silence by TCP", |question| (!question.tcp).then(|| question.truncated())),
    ]
}

#[tokio::test]
async fn no_answer_of_a_name_server_is_more_than_a_named_failure() {
    let _watch = NoPanic::watch();
    let dns = RawDns::start((LOOPBACK, 0).into(), |_| None).await;
    for (name, say) in no_answers() {
        dns.answer(say);
        let error = asked(dns.addr(), name).await.expect_err(name);
        assert!(error.to_string().contains(HOST), "{name}: {error}");
        dns.answer(|question| Some(question.address(Ipv4Addr::LOCALHOST)));
        assert_eq!(found_addresses(dns.addr(), "honest").await, 1, "after {name}");
    }
}

/// Random changes of an honest answer: an error, or addresses, and no end of either. What follows is honest and
/// believed.
#[tokio::test]
async fn random_answers_of_a_name_server_are_survived() {
    let _watch = NoPanic::watch();
    let seed = RandomState::new().hash_one(0);
    println!("seed {seed}");
    let count = AtomicU64::new(0);
    let dns = RawDns::start((LOOPBACK, 0).into(), move |question| {
        let mut state = seed ^ count.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut answer = question.address(Ipv4Addr::LOCALHOST);
        mutate(&mut answer, &mut state);
        answer.truncate(65_535);
        // With another id it would be no answer, and the test a test of waiting.
        answer.splice(..answer.len().min(2), question.id());
        Some(answer)
    })
    .await;
    let resolver = HickoryResolver::with_name_servers([dns.addr()]).timeout(Duration::from_millis(20));
    let (mut answers, mut failures) = (0, 0);
    for _ in 0..300 {
        match timeout(PATIENCE, resolver.resolve(HOST)).await.unwrap_or_else(|_| panic!("seed {seed}: no end")) {
            Ok(_) => answers += 1,
            Err(error) => {
                assert_eq!(error.name(), HOST, "seed {seed}: {error:?}");
                failures += 1;
            }
        }
    }
    println!("{answers} answers, {failures} failures");
    assert!(answers > 0 && failures > 0, "seed {seed}: {answers} answers, {failures} failures");
    dns.answer(|question| Some(question.address(Ipv4Addr::LOCALHOST)));
    assert_eq!(found_addresses(dns.addr(), "honest").await, 1, "seed {seed}");
}

/// As many addresses as fit into a message, the first of them this one, and the others of no server.
fn thousands(question: &Question, first: Ipv4Addr) -> Vec<u8> {
    if !question.tcp {
        return question.truncated();
    }
    let others = (1..THOUSANDS).map(|n| Ipv4Addr::from(0x7FFE_0000 | u32::from(n)));
    let addresses = [first].into_iter().chain(others);
    let records: Vec<u8> = addresses.flat_map(|address| record(1, &address.octets())).collect();
    if question.record_type() == 1 { question.answer(THOUSANDS, &records) } else { question.answer(0, &[]) }
}

/// 16 bytes each.
const THOUSANDS: u16 = 4094;

#[tokio::test]
async fn thousands_of_addresses_are_an_answer() {
    let _watch = NoPanic::watch();
    let dns = RawDns::start((LOOPBACK, 0).into(), |question| Some(thousands(question, Ipv4Addr::LOCALHOST))).await;
    assert_eq!(found_addresses(dns.addr(), "by TCP").await, usize::from(THOUSANDS));
}

/// A pool that knows its primary: no answer of the name server changes anything, neither for who is connected nor for
/// who wants a new connection.
#[tokio::test]
async fn a_hostile_name_server_is_nothing_to_a_pool_that_knows_its_members() {
    let _watch = NoPanic::watch();
    let cluster = Cluster::builder().nodes(1).start().await;
    let IpAddr::V4(address) = cluster.addr(Node(0)) else { panic!("a cluster has addresses of IPv4") };
    let honest = move |question: &Question| Some(question.address(address));
    let dns = RawDns::start((LOOPBACK, 0).into(), honest).await;
    let resolver = HickoryResolver::with_name_servers([dns.addr()]).timeout(Duration::from_millis(50));
    let hosts = format!("{HOST}:{}", cluster.port());
    // The primary may be slow on a loaded machine.
    let patient = builder(&hosts).probe_timeout(Duration::from_secs(1)).heartbeat_timeout(Duration::from_secs(1));
    let pool = patient.resolver(resolver).patrol_interval(Duration::from_millis(5)).build().unwrap();
    let held = pool.get().await.unwrap();
    for (name, say) in no_answers() {
        dns.answer(say);
        let before = dns.questions();
        eventually(name, PATIENCE, async || dns.questions() >= before + 6).await;
        assert!(cluster.terminate_backends(Node(0), "tokio-postgres-failover").await > 0, "{name}");
        let began = stalls::now();
        found(&pool, name).await;
        assert!(began.elapsed() < AT_ONCE + stalls::slack_since(began), "{name}: {:?}", began.elapsed());
        assert_eq!(pool.status().view.generation.get(), 1, "{name}");
    }
    drop(held);
}

/// More addresses than can be probed: the primary is found among the first, and stays when it is named no more.
#[tokio::test]
async fn thousands_of_addresses_do_not_crowd_out_the_primary() {
    let _watch = NoPanic::watch();
    let cluster = Cluster::builder().nodes(1).start().await;
    let IpAddr::V4(address) = cluster.addr(Node(0)) else { panic!("a cluster has addresses of IPv4") };
    let dns = RawDns::start((LOOPBACK, 0).into(), move |question| Some(thousands(question, address))).await;
    let hosts = format!("{HOST}:{}", cluster.port());
    let pool = builder(&hosts).dns_servers([dns.addr()]).patrol_interval(Duration::from_millis(20)).build().unwrap();
    found(&pool, "among four thousand").await;

    dns.answer(|question| Some(thousands(question, Ipv4Addr::new(127, 255, 0, 1))));
    let before = dns.questions();
    eventually("the pool asks again", PATIENCE, async || dns.questions() >= before + 12).await;
    assert!(cluster.terminate_backends(Node(0), "tokio-postgres-failover").await > 0);
    found(&pool, "named no more").await;
    assert_eq!(pool.status().view.generation.get(), 1);
    let candidates = pool.candidates();
    assert!(candidates.len() <= 64, "{} candidates", candidates.len());
    let kept =
        candidates.iter().any(|candidate| candidate.endpoint.address == Address::Tcp(cluster.socket_addr(Node(0))));
    assert!(kept, "the primary is not asked any more: {candidates:?}");
}

/// The members of before are the only ones that can be promoted: a mistake in DNS must not push them out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_addresses_do_not_crowd_out_the_standbys() {
    let cluster = Cluster::start().await;
    let members: Vec<IpAddr> = cluster.nodes().into_iter().map(|node| cluster.addr(node)).collect();
    let dns = RawDns::start((LOOPBACK, 0).into(), move |question| {
        let mut records = Vec::new();
        for member in &members {
            let IpAddr::V4(address) = member else { panic!("a cluster has addresses of IPv4") };
            records.extend(record(1, &address.octets()));
        }
        Some(if question.record_type() == 1 { question.answer(3, &records) } else { question.answer(0, &[]) })
    })
    .await;
    let hosts = format!("{HOST}:{}", cluster.port());
    let pool = builder(&hosts).dns_servers([dns.addr()]).patrol_interval(Duration::from_millis(20)).build().unwrap();
    found(&pool, "with three members").await;
    eventually("each member has answered", PATIENCE, async || {
        let candidates = pool.candidates();
        // A probe that was too slow proves nobody to be a member.
        let told = candidates.iter().filter(|candidate| {
            matches!(&candidate.answer, Some(view::Answer::Primary(_) | view::Answer::Refused(..)))
        });
        (candidates.len(), told.count()) == (3, 3)
    })
    .await;
    dns.answer(|question| Some(thousands(question, Ipv4Addr::new(127, 255, 0, 1))));
    let before = dns.questions();
    eventually("the pool asks again", PATIENCE, async || dns.questions() >= before + 12).await;
    cluster.kill(Node(0)).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    found(&pool, "promoted").await;
    assert_eq!(pool.status().view.generation.get(), 2);
}
