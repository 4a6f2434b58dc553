//! The errors of real situations say what the page of errors says.

use std::time::Duration;

use testbed::{Cluster, Cut, Cutter, Node, eventually};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_postgres::NoTls;
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{Error, Guarantee, Pool, RetryPolicy, Transaction, deadpool_postgres};

use crate::support::texts::says;
use crate::support::{CONFLICT, PATIENCE};

const SHORT: Duration = Duration::from_millis(500);

fn pool(cluster: &Cluster) -> Pool {
    Pool::builder(cluster.url_hosts()).unwrap().build().unwrap()
}

/// The first error with this reason and this word. What a server says may come later than a short limit.
async fn unavailable(pool: &Pool, reason: UnavailableReason, word: &str) -> Error {
    let mut told = None;
    eventually("the reason is told", PATIENCE, async || {
        told = pool.get().await.map(drop).err();
        let unavailable = told.as_ref().filter(|error| error.to_string().contains(word));
        matches!(unavailable, Some(Error::Unavailable(unavailable)) if unavailable.reason() == reason)
    })
    .await;
    told.unwrap()
}

#[tokio::test]
async fn without_a_primary_the_setting_is_named() {
    let cluster = Cluster::builder().nodes(2).start().await;
    let standby = format!("postgres://app@{}/app", cluster.socket_addr(Node(1)));
    let policy = RetryPolicy::new().deadline(SHORT);
    let pool = Pool::builder(standby).unwrap().checkout_timeout(SHORT).retry(policy).build().unwrap();
    let error = unavailable(&pool, UnavailableReason::NoPrimary, ": standby").await;
    says(&error, "UnavailableReason::NoPrimary");
    let error = pool.transaction(async |_| Ok(())).await.unwrap_err();
    assert!(error.to_string().contains("or wait longer (RetryPolicy::deadline); "), "{error}");

    cluster.set_read_only(Node(0), true).await;
    let fenced = format!("postgres://app@{}/app", cluster.socket_addr(Node(0)));
    let pool = Pool::builder(fenced).unwrap().checkout_timeout(SHORT).build().unwrap();
    says(&unavailable(&pool, UnavailableReason::Fenced, "fenced").await, "UnavailableReason::Fenced");
}

#[tokio::test]
async fn a_pool_in_use_and_a_full_server_name_their_sizes() {
    let cluster = Cluster::builder().nodes(1).setting("max_connections", "9").start().await;
    let builder = Pool::builder(cluster.url_hosts()).unwrap().checkout_timeout(SHORT);
    let pool = builder.max_size(1).build().unwrap();
    let held = pool.get_within(PATIENCE).await.unwrap();
    says(&unavailable(&pool, UnavailableReason::PoolExhausted, "all 1").await, "UnavailableReason::PoolExhausted");
    drop(held);

    let builder = Pool::builder(cluster.url_hosts()).unwrap().checkout_timeout(SHORT);
    let pool = builder.max_size(16).build().unwrap();
    let held = pool.get_within(PATIENCE).await.unwrap();
    let mut others = Vec::new();
    while let Ok((client, connection)) = tokio_postgres::connect(&cluster.url_hosts(), NoTls).await {
        tokio::spawn(connection);
        others.push(client);
    }
    says(&unavailable(&pool, UnavailableReason::NoSession, "53300").await, "UnavailableReason::NoSession");
    held.batch_execute("SELECT 1").await.unwrap();
}

async fn first_that(mut call: impl AsyncFnMut() -> Error, wanted: impl Fn(&Error) -> bool) -> Error {
    let mut found = None;
    eventually("the error comes", PATIENCE, async || {
        let error = call().await;
        let wanted = wanted(&error);
        found = Some(error);
        wanted
    })
    .await;
    found.unwrap()
}

async fn fails_inside(tx: Transaction) -> Result<(), Error> {
    let _ = tx.batch_execute("SELECT FROM orders").await;
    Ok(())
}

async fn conflicts(tx: Transaction) -> Result<(), Error> {
    Ok(tx.batch_execute(CONFLICT).await?)
}

async fn sleeps(tx: Transaction) -> Result<(), Error> {
    Ok(tx.batch_execute("SELECT pg_sleep(600)").await?)
}

async fn idles(tx: Transaction) -> Result<(), Error> {
    eventually("the session has ended", PATIENCE, async || tx.is_closed()).await;
    Ok(tx.batch_execute("SELECT 1").await?)
}

#[tokio::test]
async fn what_ends_a_transaction_is_named() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = pool(&cluster);
    let database = pool.transaction(async |tx| Ok(tx.batch_execute("SELECT FROM orders").await?)).await.unwrap_err();
    says(&database, "Error::Database");

    let ledger = Guarantee::Ledger(Ledger::default());
    let error = pool.build_transaction().guarantee(ledger).run(async |_| Ok(())).await.unwrap_err();
    says(&error, "Error::Ledger");

    let error = pool.transaction(async |_| Err::<(), _>(Error::abort("sold out"))).await.unwrap_err();
    says(&error, "Error::Aborted");

    says(&pool.transaction(fails_inside).await.unwrap_err(), "RolledBack::FailedInside");

    let error = pool.transaction(async |tx| Ok(tx.batch_execute("COMMIT").await?)).await.unwrap_err();
    says(&error, "Error::EndedInside");

    // A machine that stalls may spend the whole time of a call before its first attempt.
    let policy = RetryPolicy::new().deadline(SHORT);
    let call = async || pool.build_transaction().retry(policy.clone()).run(conflicts).await.unwrap_err();
    let error = first_that(call, |error| matches!(error, Error::Exhausted(_))).await;
    says(&error, "Error::Exhausted");
    assert!(error.to_string().contains("the policy's deadline of 500ms (deadline); the last error was: ERROR 40001"));

    let policy = RetryPolicy::new().attempt_timeout(SHORT);
    let call = async || pool.build_transaction().retry(policy.clone()).run(sleeps).await.unwrap_err();
    let error = first_that(call, |error| matches!(error, Error::TimedOut { .. })).await;
    says(&error, "Error::TimedOut");
    assert!(error.to_string().contains("longer than 500ms"), "{error}");

    pool.close();
    says(&pool.get().await.map(drop).unwrap_err(), "Error::Closed");
}

#[tokio::test]
async fn a_session_that_idles_names_the_servers_setting() {
    let cluster = Cluster::builder().nodes(1).setting("idle_in_transaction_session_timeout", "100ms").start().await;
    says(&pool(&cluster).transaction(idles).await.unwrap_err(), "Error::SessionEnded");
}

#[tokio::test]
async fn a_commit_in_doubt_says_why_it_stays_so() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let cutter = Cutter::start((cluster.spare_addr(0), 0).into(), cluster.socket_addr(Node(0))).await;
    let pool = Pool::builder(format!("postgres://app@{}/app", cutter.addr())).unwrap().build().unwrap();
    let create = "CREATE TABLE orders (id int)";
    // With its first transaction a pool writes what it recognises the server by.
    pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
    let _armed = cutter.arm(Cut::CommitAnswerDropped);
    let call = pool.build_transaction().guarantee(Guarantee::AtMostOnce);
    let error = call.run(async |tx| Ok(tx.batch_execute(create).await?)).await.unwrap_err();
    says(&error, "Unsettled::NoMark");
}

#[tokio::test]
async fn a_configuration_that_cannot_be_used_says_why() {
    let wrong = |url: &str| Pool::builder(url).map(drop).unwrap_err();
    says(&wrong("nonsense"), "BuildError::Url");
    let builder = Pool::builder("postgres://app@127.0.0.1/app").unwrap();
    says(&builder.max_size(0).build().map(drop).unwrap_err(), "BuildError::Invalid");
    let no_host = Pool::builder("user=app").and_then(|builder| builder.build().map(drop)).unwrap_err();
    says(&no_host, "BuildError::NoHost");

    let mut config = deadpool_postgres::Config::new();
    config.url = Some("postgres://app@127.0.0.1/app".to_owned());
    let wrapped = Pool::wrap(config.create_pool(None, NoTls).unwrap()).build().unwrap();
    says(&wrapped.dial().await.map(drop).unwrap_err(), "Error::Wrapped");
}

#[test]
fn a_pool_needs_a_runtime_with_everything() {
    let build = || Pool::builder("postgres://app@127.0.0.1/app").unwrap().build().map(drop).unwrap_err();
    says(&build(), "BuildError::NoRuntime");
    let bare = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    says(&bare.block_on(async { build() }), "BuildError::Runtime");
    let ended = tokio::runtime::Runtime::new().unwrap();
    let pool = ended.block_on(async { Pool::builder("postgres://app@127.0.0.1/app").unwrap().build().unwrap() });
    drop(ended);
    let other = tokio::runtime::Runtime::new().unwrap();
    says(&other.block_on(pool.get()).map(drop).unwrap_err(), "Error::RuntimeEnded");
}

/// The driver logs in as the user of the process where the connection string names none. The tests may run as any user,
/// so all of them are rejected.
#[tokio::test]
async fn a_url_without_a_user_or_a_database_says_so() {
    let cluster = Cluster::builder().nodes(1).hba("host orders all 127.0.0.0/8 reject").start().await;
    let addr = cluster.socket_addr(Node(0));
    let error = Pool::builder(format!("postgres://{addr}/orders")).unwrap().build().unwrap().get().await.unwrap_err();
    says(&error, "Error::Refused");
    assert!(
        error.to_string().contains("; the URL names no user, so the one of this process is taken; check user"),
        "{error}"
    );

    cluster.direct(Node(0)).await.batch_execute("CREATE ROLE clerk LOGIN").await.unwrap();
    let error = Pool::builder(format!("postgres://clerk@{addr}")).unwrap().build().unwrap().get().await.unwrap_err();
    says(&error, "Error::Refused");
    let expected =
        "database \"clerk\" does not exist; the URL names no database, so one of the user's name is taken; check";
    assert!(error.to_string().contains(expected), "{error}");

    let named = Pool::builder(format!("postgres://app@{addr}/orders")).unwrap().build().unwrap();
    assert!(!named.get().await.unwrap_err().to_string().contains("the URL names no"));
}

/// A web server that hangs up on what is no request of its own is told at once, as those are that answer with an error.
#[tokio::test]
async fn a_web_server_that_hangs_up_is_named_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut first = [0; 4];
                if stream.read_exact(&mut first).await.is_ok() && &first == b"GET " {
                    let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").await;
                }
            });
        }
    });
    let pool = Pool::builder(format!("postgres://app@{addr}/app")).unwrap().build().unwrap();
    // With the usual deadline of thirty seconds this would be `Unavailable`.
    let error = pool.get().await.unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error}");
    let expected = format!(
        "{addr} refuses this pool: what answers there speaks HTTP; that is not PostgreSQL; check host and port"
    );
    assert_eq!(error.to_string(), expected);
}
