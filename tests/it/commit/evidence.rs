//! What a primary lets the pool read about the history of its log, as `Status` tells it.

use testbed::{Cluster, Node};
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::Pool;
use tokio_postgres_failover::view::Evidence;

use crate::support::PATIENCE;
use crate::support::load::by_name;

async fn shows(pool: &Pool, evidence: Evidence) {
    let shown = async || pool.status().evidence == Some(evidence);
    let seen = tokio::time::timeout(PATIENCE, async {
        while !shown().await {
            tokio::task::yield_now().await;
        }
    });
    seen.await.unwrap_or_else(|_| panic!("{evidence:?}, but {:?}", pool.status()));
}

/// The pool notices what is granted and taken away while it runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_what_the_role_may_read() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_name(&cluster).build().unwrap();
    let status = pool.status();
    // A slow machine may have found the primary by now.
    assert!(status.evidence.is_none() || status.view.generation.get() > 0, "nothing was asked yet");
    pool.connect().await.unwrap();
    shows(&pool, Evidence::Checkpoint).await;

    let admin = cluster.direct(Node(0)).await;
    admin.batch_execute("GRANT pg_monitor TO app").await.unwrap();
    // From 17 on, the names of files prove nothing.
    let of_files = if cluster.version().await < 17 { Evidence::Files } else { Evidence::Checkpoint };
    shows(&pool, of_files).await;

    for _ in 0..2 {
        Evidence::install(&admin).await.unwrap();
    }
    admin.batch_execute("GRANT EXECUTE ON FUNCTION failover.wal_history TO app").await.unwrap();
    shows(&pool, of_files).await;
    admin.batch_execute("GRANT USAGE ON SCHEMA failover TO app").await.unwrap();
    shows(&pool, Evidence::Function).await;

    admin.batch_execute("DROP SCHEMA failover CASCADE; REVOKE pg_monitor FROM app").await.unwrap();
    shows(&pool, Evidence::Checkpoint).await;
}

/// The function compares whole marks, so nobody can read the log by it, byte by byte.
#[tokio::test]
async fn the_function_shows_no_byte_of_the_log() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let admin = cluster.direct(Node(0)).await;
    Evidence::install(&admin).await.unwrap();
    let word = "0123456789abcdef0123456789abcdef";
    let mark = format!("SELECT pg_logical_emit_message(true, 'failover', '{word}')::text");
    let mark: String = admin.query_one(&mark, &[]).await.unwrap().get(0);
    let seen = async |nonce: &str| {
        let sql = format!("SELECT seen FROM failover.wal_history('{mark}', '{nonce}')");
        admin.query_one(&sql, &[]).await.map(|row| row.get::<_, String>(0))
    };
    assert_eq!(seen(word).await.unwrap(), "marker");
    assert_eq!(seen("1123456789abcdef0123456789abcdef").await.unwrap(), "other");
    for part in ["f", "ef", &word[1..], "", "0123456789ABCDEF0123456789ABCDEF", "0123456789abcdef0123456789abcdef0"] {
        let error = seen(part).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::INVALID_PARAMETER_VALUE), "{part}: {error:?}");
    }
    let elsewhere = "SELECT failover.wal_history('0/0', '0123456789abcdef0123456789abcdef')";
    assert!(admin.batch_execute(elsewhere).await.is_err());

    admin.batch_execute("SET ROLE app").await.unwrap();
    assert!(seen(word).await.is_err(), "nobody may call it who was not told to");
}

/// A server that has written much has positions beyond 16 TiB, where a page's number is no integer any more.
#[tokio::test]
async fn the_function_knows_a_log_of_any_length() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let word = "0123456789abcdef0123456789abcdef";
    for (file, first) in [("0000000100000FFF000000FF", "FFF/FF"), ("000000010000400000000001", "4000/1")] {
        cluster.stop_fast(Node(0)).await;
        cluster.continue_log_at(Node(0), file).await;
        cluster.start_node(Node(0)).await;
        let admin = cluster.direct(Node(0)).await;
        Evidence::install(&admin).await.unwrap();
        // On two pages at least.
        for size in [0, 3000, 6000, 9000] {
            let mark = format!(
                "SELECT pg_logical_emit_message(true, 'testbed', repeat('x', {size})),
                        pg_logical_emit_message(true, 'failover', '{word}')::text"
            );
            let mark: String = admin.query_one(&mark, &[]).await.unwrap().get(1);
            assert!(mark.starts_with(first), "{mark}");
            for (nonce, seen) in [(word, "marker"), ("1123456789abcdef0123456789abcdef", "other")] {
                let sql = format!("SELECT seen FROM failover.wal_history('{mark}', '{nonce}')");
                assert_eq!(admin.query_one(&sql, &[]).await.unwrap().get::<_, String>(0), seen, "{mark}");
            }
        }
    }
}
