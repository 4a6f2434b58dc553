//! The proxy cuts where it was told to: what the client sees, and what the server has stored.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use testbed::{Cluster, Cut, Cutter, Done, Node, eventually};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_postgres::{Client, Config, Error, NoTls};

use crate::value;

const LONG: Duration = Duration::from_secs(30);
/// The lock that a slow COMMIT waits for.
const GATE: i64 = 7;
/// As the pool sends it.
const COMMIT: &str = "SELECT 1; COMMIT";
/// How long the answer to it is: RowDescription, DataRow, CommandComplete twice, ReadyForQuery.
const ANSWER: usize = 34 + 12 + 14 + 12 + 6;

async fn connect(addr: SocketAddr) -> Client {
    let mut config = Config::new();
    config.hostaddr(addr.ip()).port(addr.port()).user("app").dbname("app").application_name("cut");
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// One server with a table, a sequence that shows what was executed even if it is rolled back, and the proxy.
async fn bench() -> (Cluster, Client, Cutter) {
    let cluster = Cluster::builder().nodes(1).start().await;
    let direct = cluster.direct(Node(0)).await;
    let sql = "CREATE TABLE entries (id bigint); CREATE SEQUENCE runs; GRANT ALL ON entries, runs TO app";
    direct.batch_execute(sql).await.unwrap();
    let cutter = cutter(&cluster).await;
    (cluster, direct, cutter)
}

async fn cutter(cluster: &Cluster) -> Cutter {
    Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await
}

/// A transaction by simple queries: BEGIN, one row, COMMIT. The step that failed comes with its error.
async fn transaction(client: &Client, id: i64) -> Result<(), (&'static str, Error)> {
    let insert = format!("INSERT INTO entries VALUES ({id})");
    let steps = [("begin", "BEGIN; SELECT nextval('runs')"), ("insert", &insert), ("commit", COMMIT)];
    for (name, sql) in steps {
        client.batch_execute(sql).await.map_err(|error| (name, error))?;
    }
    Ok(())
}

/// A new session's transaction is cut off at this step, and the session has ended.
async fn cut_off(cutter: &Cutter, id: i64, at: &str) {
    let client = connect(cutter.addr()).await;
    let (step, error) = timeout(LONG, transaction(&client, id)).await.expect("an end").unwrap_err();
    assert_eq!(step, at, "{error:?}");
    assert!(error.is_closed(), "{error:?}");
    eventually("the session has ended", LONG, async || client.is_closed()).await;
}

async fn stored(direct: &Client) -> Vec<i64> {
    let rows = direct.query("SELECT id FROM entries ORDER BY id", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// What the servers' sides of the proxy's connections are doing.
async fn backends(direct: &Client) -> Vec<String> {
    let sql = "SELECT state FROM pg_stat_activity WHERE application_name = 'cut' ORDER BY 1";
    direct.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn wait_backends(direct: &Client, states: &[&str]) {
    eventually(&format!("backends {states:?}"), LONG, async || backends(direct).await == states).await;
}

/// A COMMIT waits in the server for as long as the given session holds the lock.
async fn close_gate(direct: &Client) {
    let sql = format!(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION wait();
         SELECT pg_advisory_lock({GATE})"
    );
    direct.batch_execute(&sql).await.unwrap();
}

async fn open_gate(direct: &Client) {
    direct.batch_execute(&format!("SELECT pg_advisory_unlock({GATE})")).await.unwrap();
}

async fn wait_at_gate(direct: &Client) {
    eventually("a COMMIT waits in the server", LONG, async || {
        let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        value::<i64>(direct, sql).await == 1
    })
    .await;
}

fn done(cut: Cut, transaction: u64, committed: impl Into<Option<bool>>) -> Done {
    Done { cut, transaction: Some(transaction), committed: committed.into() }
}

#[tokio::test]
async fn begin_is_withheld_or_its_answer() {
    let (_cluster, direct, cutter) = bench().await;
    let runs = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM runs";

    let armed = cutter.arm(Cut::BeginUndelivered);
    assert!(!armed.has_happened());
    cut_off(&cutter, 1, "begin").await;
    assert_eq!(armed.happened().await, done(Cut::BeginUndelivered, 1, false));
    wait_backends(&direct, &[]).await;
    assert_eq!(value::<i64>(&direct, runs).await, 0, "it did not arrive");

    let armed = cutter.arm(Cut::BeforeBeginAnswer);
    cut_off(&cutter, 2, "begin").await;
    assert_eq!(armed.happened().await, done(Cut::BeforeBeginAnswer, 2, false));
    assert_eq!(value::<i64>(&direct, runs).await, 1, "it was executed");
    wait_backends(&direct, &[]).await;

    assert!(transaction(&connect(cutter.addr()).await, 3).await.is_ok(), "once is once");
    assert_eq!(stored(&direct).await, [3]);
    assert_eq!(cutter.transactions(), 3);
}

#[tokio::test]
async fn statements_are_counted_from_begin() {
    let (_cluster, direct, cutter) = bench().await;
    for n in 0..=3 {
        let armed = cutter.arm(Cut::AfterStatement(n));
        let client = connect(cutter.addr()).await;
        // Round trips outside of a transaction do not count, nor do those of one that was rolled back.
        client.batch_execute("SELECT 0").await.unwrap();
        if n > 0 {
            client.batch_execute("BEGIN").await.unwrap();
            client.batch_execute("ROLLBACK").await.unwrap();
        }
        client.batch_execute("BEGIN").await.unwrap();
        for id in 0..n {
            client.batch_execute(&format!("INSERT INTO entries VALUES ({id})")).await.unwrap();
        }
        assert_eq!(armed.happened().await.committed, Some(false));
        let error = client.batch_execute(COMMIT).await.unwrap_err();
        assert!(error.is_closed(), "{error:?}");
        wait_backends(&direct, &[]).await;
    }
    assert_eq!(stored(&direct).await, [0_i64; 0]);
    assert_eq!(cutter.cuts(), [("AfterStatement", 4)].into());
}

#[tokio::test]
async fn what_is_sent_ahead_does_not_slip_past_a_cut() {
    let (_cluster, direct, cutter) = bench().await;
    let client = connect(cutter.addr()).await;
    let armed = cutter.arm(Cut::AfterStatement(1));
    let sent = async {
        // All are written before the first answer comes.
        tokio::join!(
            client.batch_execute("BEGIN"),
            client.batch_execute("SELECT nextval('runs')"),
            client.batch_execute("SELECT nextval('runs')"),
            client.batch_execute(COMMIT),
        )
    };
    let (begin, first, second, commit) = timeout(LONG, sent).await.unwrap();
    assert!(begin.is_ok() && first.is_ok() && second.is_err() && commit.is_err());
    armed.happened().await;
    wait_backends(&direct, &[]).await;
    assert_eq!(value::<i64>(&direct, "SELECT last_value FROM runs").await, 1);
}

#[tokio::test]
async fn extended_queries_are_round_trips() {
    let (_cluster, direct, cutter) = bench().await;
    for (n, at) in [(1, "prepare"), (2, "execute")] {
        let client = connect(cutter.addr()).await;
        let armed = cutter.arm(Cut::AfterStatement(n));
        client.batch_execute("BEGIN").await.unwrap();
        let prepared = client.prepare("INSERT INTO entries VALUES ($1)").await.unwrap();
        let executed = client.execute(&prepared, &[&1_i64]).await;
        assert_eq!(executed.is_ok(), at == "execute", "{executed:?}");
        armed.happened().await;
        assert!(client.batch_execute(COMMIT).await.is_err());
    }
    wait_backends(&direct, &[]).await;
    assert_eq!(stored(&direct).await, [0_i64; 0]);
}

#[tokio::test]
async fn commit_is_withheld() {
    let (_cluster, direct, cutter) = bench().await;
    let cut = Cut::CommitUndelivered { server_stays: false };
    let armed = cutter.arm(cut);
    cut_off(&cutter, 1, "commit").await;
    assert_eq!(armed.happened().await, done(cut, 1, false));
    wait_backends(&direct, &[]).await;

    let cut = Cut::CommitUndelivered { server_stays: true };
    let armed = cutter.arm(cut);
    cut_off(&cutter, 2, "commit").await;
    assert_eq!(armed.happened().await, done(cut, 2, false));
    assert_eq!(backends(&direct).await, ["idle in transaction"]);
    assert_eq!(cutter.held(), 1);
    cutter.release();
    wait_backends(&direct, &[]).await;
    eventually("nothing is held", LONG, async || cutter.held() == 0).await;
    assert_eq!(stored(&direct).await, [0_i64; 0]);
    assert_eq!(cutter.cuts(), [("CommitUndelivered", 2)].into());
}

/// The row may be there or not, once the server has seen that the connection is closed; before, it may still come.
#[tokio::test]
async fn commit_is_delivered_and_nobody_waits() {
    let (_cluster, direct, cutter) = bench().await;
    for id in 1..=10 {
        let armed = cutter.arm(Cut::CommitDelivered);
        cut_off(&cutter, id, "commit").await;
        assert_eq!(armed.happened().await.committed, None);
    }
    wait_backends(&direct, &[]).await;
    let stored = stored(&direct).await;
    println!("CommitDelivered: {} of 10 were committed", stored.len());
    assert!(stored.windows(2).all(|pair| pair[0] < pair[1]), "{stored:?}");
}

#[tokio::test]
async fn the_answer_to_commit_is_dropped() {
    let (_cluster, direct, cutter) = bench().await;
    let armed = cutter.arm(Cut::CommitAnswerDropped);
    cut_off(&cutter, 1, "commit").await;
    assert_eq!(stored(&direct).await, [1], "committed before the client heard of the cut");
    assert_eq!(armed.happened().await, done(Cut::CommitAnswerDropped, 1, true));

    // A COMMIT that fails was answered, too.
    let client = connect(cutter.addr()).await;
    let armed = cutter.arm(Cut::CommitAnswerDropped);
    client.batch_execute("BEGIN; INSERT INTO entries VALUES (2)").await.unwrap();
    client.batch_execute("SELECT 1 / 0").await.unwrap_err();
    assert!(client.batch_execute(COMMIT).await.unwrap_err().is_closed());
    assert_eq!(armed.happened().await, done(Cut::CommitAnswerDropped, 2, false));
    assert_eq!(stored(&direct).await, [1]);
}

#[tokio::test]
async fn the_answer_to_commit_is_cut_at_any_byte() {
    let (_cluster, direct, cutter) = bench().await;
    // One more than all of it still lacks the last byte.
    let cuts = (0..=ANSWER + 1).map(Cut::CommitAnswerHalf);
    for (id, cut) in (1..).zip(cuts) {
        let armed = cutter.arm(cut);
        cut_off(&cutter, id, "commit").await;
        assert_eq!(armed.happened().await.committed, Some(true));
        assert_eq!(stored(&direct).await.last(), Some(&id), "{cut:?}");
    }
    println!("CommitAnswerHalf: {:?}", cutter.cuts());
}

/// The bytes that arrive are the first ones of the answer, and so many.
#[tokio::test]
async fn half_an_answer_has_the_length_it_shall_have() {
    let (_cluster, _direct, cutter) = bench().await;
    let whole = raw_commit(&cutter).await;
    assert_eq!(whole.len(), ANSWER, "{whole:?}");
    for bytes in [0, 1, 33, 34, 35, 71, ANSWER - 1, ANSWER, 1000] {
        cutter.arm(Cut::CommitAnswerHalf(bytes));
        let part = raw_commit(&cutter).await;
        assert_eq!(part, whole[..bytes.min(ANSWER - 1)]);
    }
}

/// A session that speaks the protocol by hand.
async fn raw_session(cutter: &Cutter) -> TcpStream {
    let mut stream = TcpStream::connect(cutter.addr()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    // SSLRequest: the server has no certificate and says so with a single byte.
    send_in_bytes(&mut stream, &[0, 0, 0, 8, 4, 210, 22, 47]).await;
    assert_eq!(stream.read_u8().await.unwrap(), b'N');
    let body = b"\x00\x03\x00\x00user\0app\0database\0app\0application_name\0cut\0\0";
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    send_in_bytes(&mut stream, &[&length[..], body].concat()).await;
    until_ready(&mut stream).await;
    stream
}

/// Sends all in packets of one byte, and gives all that comes after COMMIT until ReadyForQuery or the end.
async fn raw_commit(cutter: &Cutter) -> Vec<u8> {
    let mut stream = raw_session(cutter).await;
    for sql in ["BEGIN", "INSERT INTO entries VALUES (0)"] {
        send_in_bytes(&mut stream, &simple_query(sql)).await;
        until_ready(&mut stream).await;
    }
    send_in_bytes(&mut stream, &simple_query(COMMIT)).await;
    until_ready(&mut stream).await
}

async fn ask(stream: &mut TcpStream, bytes: &[u8]) -> Vec<u8> {
    stream.write_all(bytes).await.unwrap();
    until_ready(stream).await
}

fn message(letter: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [&[letter], &length[..], body].concat()
}

fn simple_query(sql: &str) -> Vec<u8> {
    message(b'Q', format!("{sql}\0").as_bytes())
}

/// One packet for each byte.
async fn send_in_bytes(stream: &mut TcpStream, bytes: &[u8]) {
    for byte in bytes {
        stream.write_all(&[*byte]).await.unwrap();
        stream.flush().await.unwrap();
        tokio::task::yield_now().await;
    }
}

async fn until_ready(stream: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    let idle = |answer: &[u8]| [b"Z\0\0\0\x05I", b"Z\0\0\0\x05T"].iter().any(|ready| answer.ends_with(*ready));
    while !idle(&answer) {
        let read = timeout(LONG, stream.read_buf(&mut answer)).await.unwrap();
        // Closed, and not reset.
        if read.unwrap() == 0 {
            break;
        }
    }
    answer
}

#[tokio::test]
async fn commit_goes_on_without_its_client() {
    let (_cluster, direct, cutter) = bench().await;
    close_gate(&direct).await;
    for (id, released) in [(1, false), (2, true)] {
        let armed = cutter.arm(Cut::CommitHeld);
        cut_off(&cutter, id, "commit").await;
        assert_eq!(armed.happened().await.committed, None);
        wait_at_gate(&direct).await;
        assert!(!stored(&direct).await.contains(&id));
        assert_eq!(cutter.held(), 1);
        if released {
            cutter.release();
            eventually("nothing is held", LONG, async || cutter.held() == 0).await;
            open_gate(&direct).await;
            wait_backends(&direct, &[]).await;
        } else {
            open_gate(&direct).await;
            wait_backends(&direct, &["idle"]).await;
            cutter.release();
            wait_backends(&direct, &[]).await;
            direct.batch_execute(&format!("SELECT pg_advisory_lock({GATE})")).await.unwrap();
        }
        assert!(stored(&direct).await.contains(&id), "it was under way and nobody stopped it");
    }
}

/// A server that dies with COMMIT under way: the cut is made, and says that nothing is known.
#[tokio::test]
async fn an_answer_that_never_comes_is_dropped_as_well() {
    let (_cluster, direct, cutter) = bench().await;
    close_gate(&direct).await;
    let armed = cutter.arm(Cut::CommitAnswerDropped);
    let end = async {
        wait_at_gate(&direct).await;
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cut'";
        direct.batch_execute(sql).await.unwrap();
    };
    tokio::join!(cut_off(&cutter, 1, "commit"), end);
    assert_eq!(armed.happened().await, done(Cut::CommitAnswerDropped, 1, None));
    assert_eq!(stored(&direct).await, [0_i64; 0]);
}

#[tokio::test]
async fn the_server_dies_between_commit_and_its_answer() {
    let (cluster, direct, cutter) = bench().await;
    drop(direct);
    let cluster = Arc::new(cluster);
    let cuts = [(1, Cut::CommitUndelivered { server_stays: false }), (2, Cut::CommitAnswerDropped)];
    for (id, cut) in cuts {
        let hook = {
            let cluster = Arc::clone(&cluster);
            async move || cluster.kill(Node(0)).await
        };
        let armed = cutter.arm_with(cut, hook);
        cut_off(&cutter, id, "commit").await;
        assert!(!cluster.is_running(Node(0)), "it died before the client was told");
        assert_eq!(armed.happened().await, done(cut, id.unsigned_abs(), id == 2));
        cluster.start_node(Node(0)).await;
    }
    assert_eq!(stored(&cluster.direct(Node(0)).await).await, [2]);
}

/// Between COMMIT and its answer the other node becomes the primary, and the next connection goes there.
#[tokio::test]
async fn a_failover_between_commit_and_its_answer() {
    let cluster = Arc::new(Cluster::builder().nodes(2).start().await);
    let sql = "CREATE TABLE entries (id bigint); CREATE SEQUENCE runs; GRANT ALL ON entries, runs TO app";
    cluster.direct(Node(0)).await.batch_execute(sql).await.unwrap();
    let cutter = cutter(&cluster).await;
    let hook = {
        let cluster = Arc::clone(&cluster);
        async move || {
            cluster.kill(Node(0)).await;
            cluster.promote(Node(1)).await;
        }
    };
    let armed = cutter.arm_with(Cut::CommitAnswerHalf(40), hook);
    cut_off(&cutter, 1, "commit").await;
    assert_eq!(armed.happened().await.committed, Some(true));
    cutter.set_upstream(cluster.socket_addr(Node(1)));
    transaction(&connect(cutter.addr()).await, 2).await.unwrap();
    assert_eq!(stored(&cluster.direct(Node(1)).await).await, [1, 2]);
}

#[tokio::test]
async fn a_plan_decides_for_each_transaction() {
    let (_cluster, direct, cutter) = bench().await;
    let texts = Arc::new(std::sync::Mutex::new(Vec::new()));
    cutter.arm_every({
        let texts = Arc::clone(&texts);
        move |number, text| {
            texts.lock().unwrap().push(text.to_owned());
            match number {
                1 => Some(Cut::CommitAnswerDropped),
                2 => Some(Cut::BeginUndelivered),
                // Does not come about.
                3 => Some(Cut::AfterStatement(99)),
                _ => None,
            }
        }
    });
    let client = connect(cutter.addr()).await;
    client.batch_execute("BEGIN READ ONLY").await.unwrap();
    client.batch_execute(COMMIT).await.unwrap();
    cut_off(&cutter, 1, "commit").await;
    cut_off(&cutter, 2, "begin").await;
    for id in [3, 4] {
        transaction(&client, id).await.unwrap();
    }
    // What is armed is for whoever comes first, and the plan is asked nonetheless.
    let armed = cutter.arm(Cut::AfterStatement(1));
    cut_off(&cutter, 5, "commit").await;
    assert!(armed.has_happened());
    assert_eq!(stored(&direct).await, [1, 3, 4]);
    assert_eq!(texts.lock().unwrap().len(), 5);
    assert!(texts.lock().unwrap().iter().all(|text| text.starts_with("BEGIN; SELECT nextval")));
    cutter.disarm();
    transaction(&client, 6).await.unwrap();
    assert_eq!(texts.lock().unwrap().len(), 5);
    let made = [("AfterStatement", 1), ("BeginUndelivered", 1), ("CommitAnswerDropped", 1)];
    assert_eq!(cutter.cuts(), made.into());
    let committed: Vec<_> = cutter.done().iter().map(|done| (done.transaction, done.committed)).collect();
    assert_eq!(committed, [(Some(1), Some(true)), (Some(2), Some(false)), (Some(5), Some(false))]);
}

/// The first connection at the point is cut, the others are not.
#[tokio::test]
async fn one_of_many_is_cut() {
    let (_cluster, direct, cutter) = bench().await;
    let armed = cutter.arm(Cut::CommitUndelivered { server_stays: false });
    let addr = cutter.addr();
    let all: Vec<_> =
        (1..=8).map(|id| tokio::spawn(async move { transaction(&connect(addr).await, id).await.is_ok() })).collect();
    let mut landed = Vec::new();
    for (id, task) in (1..).zip(all) {
        if task.await.unwrap() {
            landed.push(id);
        }
    }
    armed.happened().await;
    assert_eq!(landed.len(), 7);
    assert_eq!(stored(&direct).await, landed);
}

/// Everything else goes through as it came: large rows, errors, cancel requests.
#[tokio::test]
async fn what_is_not_cut_passes() {
    let (_cluster, direct, cutter) = bench().await;
    let client = connect(cutter.addr()).await;
    let long: String = value(&client, "SELECT repeat('x', 5000000)").await;
    assert_eq!(long.len(), 5_000_000);
    assert!(client.execute("SELECT $1 / 0", &[&1_i32]).await.unwrap_err().as_db_error().is_some());
    let mixed = tokio::join!(client.query_one("SELECT 1", &[]), client.simple_query("SELECT 2"));
    assert!(mixed.0.is_ok() && mixed.1.is_ok());

    let token = client.cancel_token();
    let sleeps = async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
        eventually("it sleeps", LONG, async || value::<i64>(&direct, sql).await == 1).await;
    };
    let (slept, cancelled) = tokio::join!(client.batch_execute("SELECT pg_sleep(60)"), async {
        sleeps().await;
        token.cancel_query(NoTls).await
    });
    cancelled.unwrap();
    assert_eq!(slept.unwrap_err().code().unwrap().code(), "57014");

    // The server's last words arrive. On a session of its own: a cancel request signals its process twice, and the
    // second signal may hit what runs there next (`signal_child` of PostgreSQL's postmaster.c).
    let client = connect(cutter.addr()).await;
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cut'";
    let (slept, ended) = tokio::join!(client.batch_execute("SELECT pg_sleep(60)"), async {
        sleeps().await;
        direct.batch_execute(sql).await
    });
    ended.unwrap();
    assert_eq!(slept.unwrap_err().code().unwrap().code(), "57P01");
    assert!(cutter.done().is_empty());
}

/// Also when the client has sent something that nobody will read, it sees an end and not an error.
#[tokio::test]
async fn the_end_is_no_reset() {
    let (_cluster, _direct, cutter) = bench().await;
    let (sent, wait) = tokio::sync::oneshot::channel();
    let armed = cutter.arm_with(Cut::AfterStatement(0), async move || wait.await.unwrap());
    let mut stream = raw_session(&cutter).await;
    ask(&mut stream, &simple_query("BEGIN")).await;
    stream.write_all(&simple_query("SELECT 1")).await.unwrap();
    assert!(!armed.has_happened(), "the hook comes before the end");
    sent.send(()).unwrap();
    armed.happened().await;
    assert_eq!(until_ready(&mut stream).await, b"");
}

/// As `tokio_postgres` speaks it: the Sync that comes with Execute is ignored by the server, the one after the data is
/// not.
#[tokio::test]
async fn copy_passes_both_ways() {
    let (_cluster, direct, cutter) = bench().await;
    let armed = cutter.arm(Cut::AfterStatement(3));
    let mut stream = raw_session(&cutter).await;
    ask(&mut stream, &simple_query("BEGIN")).await;
    let execute = [
        message(b'P', b"\0COPY entries FROM STDIN\0\0\0"),
        message(b'B', &[0; 8]),
        message(b'E', &[0; 5]),
        message(b'S', b""),
    ];
    stream.write_all(&execute.concat()).await.unwrap();
    let mut answer = Vec::new();
    eventually("CopyInResponse", LONG, async || {
        stream.read_buf(&mut answer).await.unwrap();
        answer.ends_with(b"G\0\0\0\x09\0\0\x01\0\0")
    })
    .await;
    let data: Vec<_> = (0..50_000).map(|id| message(b'd', format!("{id}\n").as_bytes())).collect();
    let end = [message(b'c', b""), message(b'S', b"")].concat();
    let answer = ask(&mut stream, &[data.concat(), end].concat()).await;
    assert!(answer.windows(11).any(|part| part == b"COPY 50000\0"), "{answer:?}");

    // By simple queries, there is no Sync at all.
    let sql = simple_query("COPY entries FROM STDIN");
    let data = [sql, message(b'd', b"-1\n"), message(b'c', b"")].concat();
    let answer = ask(&mut stream, &data).await;
    assert!(answer.windows(7).any(|part| part == b"COPY 1\0"), "{answer:?}");

    assert!(!armed.has_happened());
    let answer = ask(&mut stream, &simple_query("COPY entries TO STDOUT")).await;
    assert!(answer.windows(11).any(|part| part == b"COPY 50001\0"));
    armed.happened().await;
    wait_backends(&direct, &[]).await;
    assert_eq!(stored(&direct).await, [0_i64; 0]);
}

#[tokio::test]
async fn nothing_outlives_the_cutter() {
    let (_cluster, direct, cutter) = bench().await;
    let client = connect(cutter.addr()).await;
    cutter.arm(Cut::CommitUndelivered { server_stays: true });
    cut_off(&cutter, 1, "commit").await;
    wait_backends(&direct, &["idle", "idle in transaction"]).await;
    let armed = cutter.arm_with(Cut::BeginUndelivered, async || std::future::pending().await);
    let stuck = connect(cutter.addr()).await;
    let (begun, ()) = tokio::join!(stuck.batch_execute("BEGIN"), async {
        eventually("the hook is running", LONG, async || cutter.transactions() == 2).await;
        drop(cutter);
    });
    assert!(begun.unwrap_err().is_closed());
    assert!(!armed.has_happened());
    eventually("the client's connection ends", LONG, async || client.is_closed()).await;
    wait_backends(&direct, &[]).await;
}
