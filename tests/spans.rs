//! The spans of a pool: the fields that OpenTelemetry gives to a database, and what they hold.
//!
//! This test has a process of its own. `tracing` decides once for the whole process whether a span is of interest, and
//! asks only the thread that meets the span first. Beside other tests that thread often has no subscriber, and the span
//! is lost.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod collected;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use collected::Collected;
use testbed::{Cluster, Node};
use tokio_postgres_failover::{Error, Pool};
use tracing_subscriber::fmt::format::FmtSpan;

const PATIENCE: Duration = Duration::from_secs(30);

impl Collected {
    /// What was written at the end of each span of this name.
    fn closed(&self, span: &str) -> Vec<String> {
        let text = self.text();
        let begins = format!("{span}{{");
        text.lines().filter(|line| line.contains(&begins) && line.contains(": close ")).map(str::to_owned).collect()
    }

    /// Waits until so many spans of this name have ended. Work that a call leaves behind may hold on to its span.
    async fn has_closed(&self, span: &str, count: usize) {
        let closed = async {
            while self.closed(span).len() < count {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, closed)
            .await
            .unwrap_or_else(|_| panic!("no span {span} has ended: {}", self.text()));
    }
}

/// On one thread, so that the log of this test is its own.
#[tokio::test]
async fn spans_have_the_fields_of_opentelemetry() {
    let log = Collected::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_span_events(FmtSpan::CLOSE)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
    pool.connect().await.unwrap();
    let address = cluster.socket_addr(Node(0));
    let server = format!("server.address={} server.port={}", address.ip(), address.port());
    let common = r#"db.system.name="postgresql" db.namespace="app""#;
    let assert_holds = |span: &str, parts: &[&str]| {
        let closed = log.closed(span);
        let line = closed.last().unwrap_or_else(|| panic!("no span {span} has ended"));
        for part in [common, &server].iter().chain(parts) {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        line.clone()
    };
    log.has_closed("search", 1).await;
    assert_holds("search", &["generation=1"]);

    let runs = AtomicU32::new(0);
    pool.transaction(async |tx| {
        if runs.fetch_add(1, Ordering::SeqCst) == 0 {
            tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await?;
        }
        Ok(tx.batch_execute("SELECT 1").await?)
    })
    .await
    .unwrap();
    log.has_closed("transaction", 1).await;
    let line = assert_holds("transaction", &[r#"otel.kind="client""#, "attempts=2", "mode=Exactly"]);
    assert!(!line.contains("error.type"), "{line}");

    pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1 / 0").await?)).await.unwrap_err();
    log.has_closed("transaction", 2).await;
    let code = r#"db.response.status_code="22012""#;
    assert_holds("transaction", &[code, r#"error.type="22012""#, r#"otel.status_code="ERROR""#, "attempts=1"]);

    pool.transaction(async |_| Err::<(), _>(Error::abort("no"))).await.unwrap_err();
    log.has_closed("transaction", 3).await;
    let line = assert_holds("transaction", &[r#"error.type="aborted""#]);
    assert!(!line.contains("db.response.status_code"), "{line}");
}
