//! Prepared statements that a migration, a reset or a type made anew has made useless: the connection is healed, and a
//! transaction runs again, as nothing was committed.

use std::error::Error as StdError;

use testbed::{Cluster, Node};
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{FromSql, IsNull, Kind, ToSql, Type, to_sql_checked};
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

/// A label that the program knows. As derived code does, it takes only a type that has the label.
#[derive(Debug)]
struct Calm;

impl<'a> FromSql<'a> for Calm {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        if raw == b"calm" { Ok(Self) } else { Err("another label".into()) }
    }

    fn accepts(of: &Type) -> bool {
        matches!(of.kind(), Kind::Enum(labels) if labels.iter().any(|label| label == "calm"))
    }
}

impl ToSql for Calm {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        out.extend_from_slice(b"calm");
        Ok(IsNull::No)
    }

    fn accepts(of: &Type) -> bool {
        <Self as FromSql>::accepts(of)
    }

    to_sql_checked!();
}

/// An error of the program's, whose source is that of the driver's error.
#[derive(Debug, thiserror::Error)]
enum Transparent {
    #[error(transparent)]
    Db(#[from] tokio_postgres::Error),
}

#[derive(Debug, thiserror::Error)]
#[error("the moods cannot be read")]
struct Unreadable(#[source] tokio_postgres::Error);

/// How a closure passes on an error of the driver's.
type PassesOn = fn(tokio_postgres::Error) -> Error;

/// The ways to pass on the error of a value that does not fit its type.
const PASSED_ON: [(&str, PassesOn); 6] = [
    ("plain", Error::Database),
    ("own error", |error| Error::abort(Unreadable(error))),
    ("transparent", |error| Error::abort(Transparent::Db(error))),
    ("anyhow", |error| Error::abort(anyhow::Error::new(error))),
    ("eyre", |error| Error::abort(eyre::Report::new(error))),
    ("report", |error| Error::abort_report(anyhow::Error::new(error))),
];

/// What a closure does with the type.
#[derive(Clone, Copy, Debug)]
enum Uses {
    Prepared,
    Text,
    Parameter,
}

async fn feels_calm(tx: &Transaction, uses: Uses) -> Result<usize, tokio_postgres::Error> {
    const CALM: &str = "SELECT mood FROM moods";
    let rows = match uses {
        Uses::Prepared => tx.query(&tx.prepare_cached(CALM).await?, &[]).await?,
        Uses::Text => tx.query(CALM, &[]).await?,
        Uses::Parameter => {
            let labels = tx.query_one("SELECT count(*) FROM pg_enum WHERE enumlabel = 'calm'", &[]).await?;
            let (known, one) = (labels.get::<_, i64>(0) > 0, "SELECT count(*) FROM moods WHERE mood = $1");
            let moods =
                if known { tx.query_one(one, &[&Calm]).await? } else { tx.query_one(one, &[&Mood("sad")]).await? };
            return Ok(usize::try_from(moods.get::<_, i64>(0)).unwrap());
        }
    };
    let read: Result<Vec<Calm>, _> = rows.iter().map(|row| row.try_get(0)).collect();
    Ok(read?.len())
}

/// `ALTER TYPE … ADD VALUE`: the server has nothing against the old statements, and the driver knows the old labels. No
/// later use of the connection could read the new one.
#[tokio::test]
async fn a_type_that_got_another_label_is_read_again() {
    let cluster = with_types().await;
    for (name, pool) in pools(&cluster, 1) {
        for uses in [Uses::Prepared, Uses::Text, Uses::Parameter] {
            for ((how, passed_on), reads) in PASSED_ON.iter().flat_map(|how| [(how, false), (how, true)]) {
                let what = format!("{name}, {uses:?}, {how}, reads: {reads}");
                sql(&cluster, "TRUNCATE moods").await;
                change(&cluster, &pool, Change::Type).await;
                pool.clear_statement_caches();
                let runs = Runs::default();
                let work = async |tx: Transaction| {
                    runs.begin();
                    feels_calm(&tx, uses).await.map_err(passed_on)
                };
                let call = async || if reads { pool.read(work).await } else { pool.transaction(work).await };
                assert_eq!(call().await.unwrap(), 0, "{what}: there is no row yet");
                sql(&cluster, "ALTER TYPE mood ADD VALUE 'calm'").await;
                sql(&cluster, "INSERT INTO moods VALUES ('calm')").await;
                let result = call().await;
                assert_eq!((result.unwrap(), runs.count()), (1, 3), "{what}");
                assert_eq!((call().await.unwrap(), runs.count()), (1, 4), "{what}, the next");
            }
        }
    }
}

/// The next run may get another connection, which knows the old labels, too.
#[tokio::test]
async fn a_type_is_read_again_on_every_connection() {
    let cluster = with_types().await;
    for (name, pool) in pools(&cluster, 3) {
        for uses in [Uses::Prepared, Uses::Text, Uses::Parameter] {
            sql(&cluster, "TRUNCATE moods").await;
            change(&cluster, &pool, Change::Type).await;
            pool.clear_statement_caches();
            {
                let held = [pool.get().await.unwrap(), pool.get().await.unwrap(), pool.get().await.unwrap()];
                for client in &held {
                    let statement = client.prepare_cached("SELECT mood FROM moods WHERE mood <> $1").await.unwrap();
                    client.query(&statement, &[&Mood("sad")]).await.unwrap();
                }
            }
            sql(&cluster, "ALTER TYPE mood ADD VALUE 'calm'").await;
            sql(&cluster, "INSERT INTO moods VALUES ('calm')").await;
            let runs = Runs::default();
            let read = pool.transaction(async |tx| {
                runs.begin();
                Ok(feels_calm(&tx, uses).await?)
            });
            assert_eq!((read.await.unwrap(), runs.count()), (1, 2), "{name}, {uses:?}");
        }
    }
}

/// A Rust type that fits no type of the column is a mistake, and no connection heals it.
#[tokio::test]
async fn a_value_that_never_fits_is_returned() {
    let cluster = with_types().await;
    for (name, pool) in pools(&cluster, 1) {
        for call in 0..3 {
            let runs = Runs::default();
            let error = pool
                .transaction(async |tx| {
                    runs.begin();
                    Ok(tx.query_one("SELECT 'word'", &[]).await?.try_get::<_, i32>(0)?)
                })
                .await
                .unwrap_err();
            assert!(error.to_string().contains("error deserializing column 0"), "{name}: {error}");
            assert!(runs.count() <= 2, "{name}, call {call}: {} runs", runs.count());
        }
    }
}

/// Whoever has a connection by hand reads the row, so the connection does not see the error of its value.
#[tokio::test]
async fn a_value_that_is_read_by_hand_needs_the_programs_word() {
    let cluster = with_types().await;
    for (name, pool) in pools(&cluster, 1) {
        sql(&cluster, "TRUNCATE moods").await;
        change(&cluster, &pool, Change::Type).await;
        pool.clear_statement_caches();
        let by_hand = async || {
            let client = pool.get().await.unwrap();
            let rows = client.query("SELECT mood FROM moods", &[]).await?;
            let read: Result<Vec<Calm>, _> = rows.iter().map(|row| row.try_get(0)).collect();
            Ok::<_, tokio_postgres::Error>(read?.len())
        };
        assert_eq!(by_hand().await.unwrap(), 0, "{name}");
        sql(&cluster, "ALTER TYPE mood ADD VALUE 'calm'").await;
        sql(&cluster, "INSERT INTO moods VALUES ('calm')").await;
        for _ in 0..2 {
            assert!(by_hand().await.is_err(), "{name}");
        }
        pool.clear_statement_caches();
        assert_eq!(by_hand().await.unwrap(), 1, "{name}");
    }
}
