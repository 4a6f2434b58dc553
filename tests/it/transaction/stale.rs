//! Prepared statements that a migration, a reset or a type made anew has made useless: the connection is healed, and a
//! transaction runs again, as nothing was committed.

use std::error::Error as StdError;

use testbed::{Cluster, Node};
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{IsNull, Kind, ToSql, Type, to_sql_checked};
use tokio_postgres_failover::{Error, Pool, RetryPolicy, Transaction, deadpool_postgres};

use crate::support::{Runs, sql};

const SELECT: &str = "SELECT * FROM entries";

async fn with_types() -> Cluster {
    let cluster = Cluster::builder().nodes(1).start().await;
    sql(
        &cluster,
        "CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TABLE entries (id bigint); \
         CREATE TABLE moods (mood mood); INSERT INTO entries VALUES (1); GRANT ALL ON entries, moods TO app",
    )
    .await;
    cluster
}

/// A pool of this crate's, and a wrapped one, of one connection each.
fn pools(cluster: &Cluster, size: usize) -> [(&'static str, Pool); 2] {
    let url = format!("postgres://app@{}/app", cluster.socket_addr(Node(0)));
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(url.clone());
    config.pool = Some(deadpool_postgres::PoolConfig::new(size));
    let existing = config.create_pool(Some(deadpool_postgres::Runtime::Tokio1), tokio_postgres::NoTls).unwrap();
    [
        ("own", Pool::builder(url).unwrap().max_size(size).build().unwrap()),
        ("wrapped", Pool::wrap(existing).build().unwrap()),
    ]
}

/// A value of an enum, whatever its OID.
#[derive(Debug)]
struct Mood(&'static str);

impl ToSql for Mood {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(of: &Type) -> bool {
        matches!(of.kind(), Kind::Enum(_))
    }

    to_sql_checked!();
}

async fn select(tx: &Transaction) -> Result<usize, Error> {
    let statement = tx.prepare_cached(SELECT).await?;
    Ok(tx.query(&statement, &[]).await?.len())
}

async fn feel(tx: &Transaction) -> Result<usize, Error> {
    let statement = tx.prepare_cached("INSERT INTO moods VALUES ($1)").await?;
    Ok(usize::try_from(tx.execute(&statement, &[&Mood("glad")]).await?).unwrap())
}

/// What befalls a connection with prepared statements.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// 0A000.
    Column,
    /// 26000.
    Discarded,
    /// 26000, and the driver's own statements are gone, too.
    Deallocated,
    /// XX000 or 42804, as the server will.
    Type,
}

const CHANGES: [Change; 4] = [Change::Column, Change::Discarded, Change::Deallocated, Change::Type];

async fn change(cluster: &Cluster, pool: &Pool, change: Change) {
    match change {
        Change::Column => {
            sql(cluster, "ALTER TABLE entries ADD COLUMN IF NOT EXISTS note text").await;
            sql(cluster, "ALTER TABLE entries ALTER COLUMN note TYPE varchar(10)").await;
        }
        Change::Discarded => pool.get().await.unwrap().batch_execute("DISCARD ALL").await.unwrap(),
        Change::Deallocated => pool.get().await.unwrap().batch_execute("DEALLOCATE ALL").await.unwrap(),
        Change::Type => {
            sql(
                cluster,
                "DROP TYPE mood CASCADE; CREATE TYPE mood AS ENUM ('sad', 'glad'); ALTER TABLE moods ADD COLUMN mood \
                 mood",
            )
            .await;
        }
    }
}

async fn revert(cluster: &Cluster) {
    sql(cluster, "ALTER TABLE entries DROP COLUMN IF EXISTS note").await;
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Transaction,
    Idempotent,
    Read,
    /// The closure hides what it met.
    Opaque,
}

async fn use_it(pool: &Pool, way: Way, change: Change) -> (u32, Result<usize, Error>) {
    let runs = Runs::default();
    let work = async |tx: Transaction| {
        runs.begin();
        match change {
            Change::Type => feel(&tx).await,
            _ => select(&tx).await,
        }
    };
    let result = match way {
        Way::Transaction => pool.transaction(work).await,
        Way::Idempotent => pool.idempotent(work).await,
        Way::Read => {
            pool.read(async |tx| {
                runs.begin();
                select(&tx).await
            })
            .await
        }
        Way::Opaque => pool.transaction(async |tx| work(tx).await.map_err(|_| Error::abort("it failed"))).await,
    };
    (runs.count(), result)
}

/// Each change, each kind of call, in a pool of this crate's and in a wrapped one: one more run, and no error.
#[tokio::test]
async fn a_transaction_with_a_stale_statement_is_run_again() {
    let cluster = with_types().await;
    for (name, pool) in pools(&cluster, 1) {
        for met in CHANGES {
            for way in [Way::Transaction, Way::Idempotent, Way::Read, Way::Opaque] {
                if matches!((met, way), (Change::Type, Way::Read)) {
                    continue;
                }
                let what = format!("{name}, {met:?}, {way:?}");
                let (runs, first) = use_it(&pool, way, met).await;
                assert_eq!((runs, first.unwrap()), (1, 1), "{what}, before");
                change(&cluster, &pool, met).await;
                let (runs, second) = use_it(&pool, way, met).await;
                assert!(second.is_ok(), "{what}: {second:?} after {runs} runs");
                assert_eq!(runs, 2, "{what}");
                let (runs, third) = use_it(&pool, way, met).await;
                assert_eq!((runs, third.unwrap()), (1, 1), "{what}, afterwards");
                revert(&cluster).await;
                let _ = use_it(&pool, way, met).await;
            }
        }
    }
}

/// Whoever has a connection by hand gets the error once: the next call finds the connection healed, kept or not.
#[tokio::test]
async fn the_next_call_by_hand_finds_it_healed() {
    let cluster = with_types().await;
    for (name, pool) in pools(&cluster, 1) {
        for met in [Change::Column, Change::Discarded, Change::Deallocated] {
            let by_hand = async || {
                let client = pool.get().await.unwrap();
                let statement = client.prepare_cached(SELECT).await?;
                Ok::<_, tokio_postgres::Error>(client.query(&statement, &[]).await?.len())
            };
            assert_eq!(by_hand().await.unwrap(), 1, "{name}, {met:?}");
            change(&cluster, &pool, met).await;
            let error = by_hand().await.unwrap_err();
            assert!(["0A000", "26000"].contains(&error.code().unwrap().code()), "{name}, {met:?}: {error:?}");
            assert_eq!(by_hand().await.unwrap(), 1, "{name}, {met:?}, the next");
            revert(&cluster).await;
            let _ = by_hand().await;
        }
        // On the connection that somebody keeps.
        let client = pool.get().await.unwrap();
        let statement = client.prepare_cached(SELECT).await.unwrap();
        client.query(&statement, &[]).await.unwrap();
        change_column(&cluster).await;
        assert!(client.query(&statement, &[]).await.is_err(), "{name}");
        let statement = client.prepare_cached(SELECT).await.unwrap();
        client.query(&statement, &[]).await.unwrap();
        drop(client);
        revert(&cluster).await;
    }
}

async fn change_column(cluster: &Cluster) {
    sql(cluster, "ALTER TABLE entries ADD COLUMN note text").await;
}

/// A call that no fresh statement helps ends: twice, and not until its deadline.
#[tokio::test]
async fn what_comes_again_on_a_healed_connection_is_returned() {
    let cluster = with_types().await;
    for (name, pool) in pools(&cluster, 2) {
        // A statement of another connection's.
        let other = pool.get().await.unwrap();
        let strange = other.prepare("SELECT 1").await.unwrap();
        let runs = Runs::default();
        let error = pool
            .transaction(async |tx| {
                runs.begin();
                Ok(tx.query(&strange, &[]).await?.len())
            })
            .await
            .unwrap_err();
        assert_eq!(error.code().unwrap().code(), "26000", "{name}: {error:?}");
        assert_eq!(runs.count(), 2, "{name}");
        // A closure that makes its own statement stale, each time.
        let runs = Runs::default();
        let error = pool
            .transaction(async |tx| {
                runs.begin();
                tx.batch_execute("CREATE TEMP TABLE t (a int) ON COMMIT DROP").await?;
                let statement = tx.prepare("SELECT * FROM t").await?;
                tx.query(&statement, &[]).await?;
                tx.batch_execute("ALTER TABLE t ADD COLUMN b int").await?;
                Ok(tx.query(&statement, &[]).await?.len())
            })
            .await
            .unwrap_err();
        assert_eq!(error.code().unwrap().code(), "0A000", "{name}: {error:?}");
        assert_eq!(runs.count(), 2, "{name}");
        // A mistake that looks like one, on a connection that has statements.
        pool.transaction(async |tx| select(&tx).await).await.unwrap();
        let runs = Runs::default();
        let error = pool
            .transaction(async |tx| {
                runs.begin();
                Ok(tx.execute("INSERT INTO entries VALUES ('a'::bytea)", &[]).await?)
            })
            .await
            .unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42804", "{name}: {error:?}");
        assert!(runs.count() <= 2, "{name}: {}", runs.count());
        // The policy has the last word.
        let once = pool.build_transaction().retry(RetryPolicy::none());
        assert!(once.run(async |tx| Ok(tx.query(&strange, &[]).await?.len())).await.is_err(), "{name}");
        drop(other);
    }
}

/// A migration that tells the pool: nobody meets an error, on connections that are idle and on those that somebody has.
#[tokio::test]
async fn after_all_caches_were_cleared_nobody_meets_an_error() {
    let cluster = with_types().await;
    for (name, pool) in pools(&cluster, 3) {
        let held = pool.get().await.unwrap();
        {
            let (one, two) = (pool.get().await.unwrap(), pool.get().await.unwrap());
            for client in [&held, &one, &two] {
                let statement = client.prepare_cached(SELECT).await.unwrap();
                client.query(&statement, &[]).await.unwrap();
            }
        }
        change_column(&cluster).await;
        pool.clear_statement_caches();
        let (one, two) = (pool.get().await.unwrap(), pool.get().await.unwrap());
        for client in [&held, &one, &two] {
            assert_eq!(client.statement_cache.size(), 0, "{name}");
            let statement = client.prepare_cached(SELECT).await.unwrap();
            client.query(&statement, &[]).await.unwrap();
        }
        revert(&cluster).await;
    }
}
