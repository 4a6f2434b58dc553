//! No error, no `Debug` and no log holds a password. A program of its own: its log takes what all threads say.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod collected;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use collected::Collected;
use testbed::{Cluster, Node};
use tokio_postgres_failover::{Pool, PoolBuilder};
use tracing_subscriber::fmt::format::FmtSpan;

/// What a secret would look like in a text: as it is, and as a URL writes it.
const SECRET: &str = "s3cr3t/w0rd";

fn holds_no_secret(what: &str, text: &str) {
    assert!(!text.contains("s3cr3t") && !text.contains("w0rd"), "{what} holds the password: {text}");
}

fn says_no_secret(what: &str, value: &(impl Debug + ?Sized)) {
    holds_no_secret(what, &format!("{value:?}"));
    holds_no_secret(what, &format!("{value:#?}"));
}

fn error_says_no_secret(error: &(dyn std::error::Error + 'static)) {
    let mut link = Some(error);
    while let Some(error) = link {
        says_no_secret("an error", error);
        holds_no_secret("an error", &error.to_string());
        link = error.source();
    }
}

/// Acceptance 9, over a run with failures of all kinds and a failover.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_text_holds_a_password() {
    let log = Collected::default();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_span_events(FmtSpan::FULL)
        .with_ansi(false)
        .with_writer(log.clone())
        .init();
    a_life_with_a_password().await;
    let text = log.text();
    for said in ["primary found", "primary lost", "search", "transaction", "attempt"] {
        assert!(text.contains(said), "the log is of no use without {said:?}");
    }
    for line in text.lines() {
        holds_no_secret("the log", line);
    }
}

async fn a_life_with_a_password() {
    let cluster = Cluster::builder().password(SECRET).start().await;
    let url = cluster.url_hosts();
    let by_name = Pool::builder(cluster.url()).unwrap().dns_servers([cluster.dns().addr()]);
    says_no_secret("a builder", &by_name);
    let pool = Pool::builder(&url).unwrap().build().unwrap();
    for pool in [by_name.build().unwrap(), pool.clone()] {
        pool.connect().await.unwrap();
        says_no_secret("a pool", &pool);
        says_no_secret("a status", &pool.status());
        says_no_secret("a transaction's builder", &pool.build_transaction());
        let client = pool.get().await.unwrap();
        says_no_secret("a client", &client);
        says_no_secret("a connection", &*client);
        error_says_no_secret(&client.query("SELECT 1 / 0", &[]).await.unwrap_err());
    }
    says_no_secret("a manager", &Pool::builder(&url).unwrap().build_manager().unwrap());
    let error = pool
        .transaction(async |tx| {
            says_no_secret("a transaction", &tx);
            tx.batch_execute("SELECT no_such_function()").await?;
            Ok(())
        })
        .await
        .unwrap_err();
    error_says_no_secret(&error);

    cluster.kill(Node(0)).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
    for node in cluster.nodes() {
        if cluster.is_running(node) {
            cluster.kill(node).await;
        }
    }
    let hasty = Pool::builder(&url).unwrap().checkout_timeout(Duration::from_millis(300)).build().unwrap();
    error_says_no_secret(&hasty.get().await.unwrap_err());

    let other = Cluster::builder().nodes(1).password("another").start().await;
    let encoded = SECRET.replace('/', "%2F");
    let url = format!("postgres://app:{encoded}@{}/app", other.socket_addr(Node(0)));
    error_says_no_secret(&Pool::builder(url).unwrap().build().unwrap().get().await.unwrap_err());
    // The same from a provider: right, then wrong, then with an error of its own.
    let says = Arc::new(Mutex::new(Ok::<_, &str>("another")));
    let provider = {
        let says = Arc::clone(&says);
        move || {
            let says = *says.lock().unwrap();
            async move { Ok(says?) }
        }
    };
    let url = format!("postgres://app@{}/app", other.socket_addr(Node(0)));
    let builder = Pool::builder(url).unwrap().password_provider(provider).checkout_timeout(Duration::from_millis(700));
    says_no_secret("a builder", &builder);
    let pool = builder.build().unwrap();
    let _held = pool.get().await.unwrap();
    for next in [Ok(SECRET), Err("no password today")] {
        *says.lock().unwrap() = next;
        error_says_no_secret(&pool.get().await.unwrap_err());
        says_no_secret("a pool", &(&pool, pool.candidates()));
    }
    // A password whose `/` nobody escaped is misread as something else.
    for url in [
        format!("postgres://app:{SECRET}@127.0.0.1/app"),
        format!("host=127.0.0.1 password='{SECRET} user=app"),
        format!("postgres://app:{encoded}@127.0.0.1/app?nonsense=1"),
        format!("postgres://app:{encoded}@127.0.0.1:0/app"),
        format!("postgres://app:{encoded}@127.0.0.1/app?sslmode=require"),
    ] {
        match Pool::builder(&url).and_then(PoolBuilder::build) {
            Err(error) => error_says_no_secret(&error),
            Ok(pool) => says_no_secret("a pool", &pool),
        }
    }
}
