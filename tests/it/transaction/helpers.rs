//! Helpers that are written once, for every handle that runs statements, and closures in every usual form.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::Duration;

use testbed::{Node, eventually};
use tokio::task::JoinSet;
use tokio_postgres_failover::resolve::BoxFuture;
use tokio_postgres_failover::session::GenericTransaction;
use tokio_postgres_failover::{
    CommitOutcome, Error, GenericClient, Manager, Pool, Transaction, deadpool, deadpool_postgres, tokio_postgres,
};

use crate::support::load::{by_name, by_url, generation};
use crate::support::{CONFLICT, PATIENCE, Runs, server, started, stored};

/// As a program that used deadpool-postgres has it: only its `use` was changed.
async fn put(client: &impl GenericClient, id: i64) -> Result<i64, tokio_postgres::Error> {
    let insert = client.prepare_cached("INSERT INTO entries (id) VALUES ($1)").await?;
    client.execute(&insert, &[&id]).await?;
    Ok(client.query_one("SELECT id FROM entries WHERE id = $1", &[&id]).await?.get(0))
}

/// Keeps one row, and gives up another.
async fn put_one_of_two(client: &mut impl GenericClient, id: i64) -> Result<(), tokio_postgres::Error> {
    let mut kept = client.transaction().await?;
    put(&kept, id).await?;
    let given_up = kept.transaction().await?;
    put(&given_up, -id).await?;
    given_up.rollback().await?;
    kept.commit().await
}

async fn on_the_driver(client: &tokio_postgres::Client) -> Result<i64, tokio_postgres::Error> {
    Ok(client.query_one("SELECT 1::bigint", &[]).await?.get(0))
}

async fn on_deadpools(client: &deadpool_postgres::ClientWrapper) -> Result<i64, tokio_postgres::Error> {
    let one = client.prepare_cached("SELECT 1::bigint").await?;
    Ok(client.query_one(&one, &[]).await?.get(0))
}

/// A type of the program's own.
struct Tenant<C>(C);

impl<C: GenericClient> GenericClient for Tenant<C> {
    fn client(&self) -> &tokio_postgres::Client {
        self.0.client()
    }

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, tokio_postgres::Error>> {
        self.0.transaction()
    }

    fn note_error(&self, error: &tokio_postgres::Error) {
        self.0.note_error(error);
    }
}

#[tokio::test]
async fn one_helper_serves_every_client() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).build().unwrap();

    let mut client = pool.get().await.unwrap();
    assert_eq!(put(&client, 1).await.unwrap(), 1);
    put_one_of_two(&mut client, 2).await.unwrap();
    let mut begun = client.transaction().await.unwrap();
    assert_eq!(put(&begun, 3).await.unwrap(), 3);
    put_one_of_two(&mut begun, 4).await.unwrap();
    begun.commit().await.unwrap();
    assert_eq!((on_the_driver(&client).await.unwrap(), on_deadpools(&client).await.unwrap()), (1, 1));
    let mut tenant = Tenant(client);
    put(&tenant, 5).await.unwrap();
    put_one_of_two(&mut tenant, 6).await.unwrap();
    let mut detached = tenant.0.detach();
    put(&detached, 7).await.unwrap();
    put_one_of_two(&mut detached, 8).await.unwrap();

    pool.transaction(async |mut tx| {
        put(&tx, 11).await?;
        put_one_of_two(&mut tx, 12).await?;
        let mut savepoint = tx.transaction().await?;
        put(&savepoint, 13).await?;
        put_one_of_two(&mut savepoint, 14).await?;
        savepoint.commit().await?;
        let undone = tx.transaction().await?;
        put(&undone, -1).await?;
        undone.rollback().await?;
        let dropped = tx.transaction().await?;
        put(&dropped, -2).await?;
        drop(dropped);
        assert_eq!((on_the_driver(&tx).await?, on_deadpools(&tx).await?), (1, 1));
        Ok(())
    })
    .await
    .unwrap();

    let manager: Manager = Pool::builder(cluster.url_hosts()).unwrap().build_manager().unwrap();
    let by_hand = deadpool::managed::Pool::<Manager>::builder(manager).max_size(1).build().unwrap();
    let mut object = by_hand.get().await.unwrap();
    put(&object, 21).await.unwrap();
    put_one_of_two(&mut object, 22).await.unwrap();
    put(&*object, 23).await.unwrap();

    let mut config = deadpool_postgres::Config::new();
    config.url = Some(cluster.url_hosts());
    let theirs = config.create_pool(None, tokio_postgres::NoTls).unwrap();
    let mut object = theirs.get().await.unwrap();
    put(&object, 31).await.unwrap();
    put_one_of_two(&mut object, 32).await.unwrap();
    let mut begun = object.transaction().await.unwrap();
    put(&begun, 33).await.unwrap();
    put_one_of_two(&mut begun, 34).await.unwrap();
    begun.commit().await.unwrap();
    drop(object);
    let wrapped: Pool = Pool::wrap(theirs).build().unwrap();
    wrapped.transaction(async |tx| Ok(put(&tx, 35).await?)).await.unwrap();

    let mut direct = cluster.direct(Node(0)).await;
    put(&direct, 41).await.unwrap();
    put_one_of_two(&mut direct, 42).await.unwrap();
    let mut begun = direct.transaction().await.unwrap();
    put_one_of_two(&mut begun, 43).await.unwrap();
    begun.commit().await.unwrap();

    let expected = [1..=8, 11..=14, 21..=23, 31..=35, 41..=43].into_iter().flatten().collect::<Vec<i64>>();
    assert_eq!(stored(&cluster).await, expected);
}

/// What a helper makes of an error does not decide whether the work runs again, as the handle has noted the error.
#[tokio::test]
async fn an_error_that_a_helper_hides_is_seen_all_the_same() {
    async fn hide(client: &impl GenericClient) -> Result<(), String> {
        client.batch_execute(CONFLICT).await.map_err(|_| "hidden".to_owned())
    }
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).build().unwrap();
    let runs = Runs::default();
    let result = pool.transaction(async |tx| {
        // Each of the first runs hides it behind another handle.
        match runs.begin() {
            1 => hide(&tx).await.map_err(Error::abort)?,
            2 => hide(&Tenant(tx)).await.map_err(Error::abort)?,
            _ => return Ok(tx.query_one("SELECT 7", &[]).await?.get(0)),
        }
        Ok(0)
    });
    assert_eq!(result.await.unwrap(), 7);
    assert_eq!(runs.count(), 3);
}

#[derive(Debug, thiserror::Error)]
enum ShopError {
    #[error("sold out: {left} left")]
    SoldOut { left: i32 },
    #[error(transparent)]
    Number(#[from] std::num::ParseIntError),
    #[error("the database failed")]
    Database(#[source] Error),
}

impl From<ShopError> for Error {
    fn from(error: ShopError) -> Self {
        match error {
            ShopError::Database(error) => error,
            own => Self::abort(own),
        }
    }
}

impl From<Error> for ShopError {
    fn from(error: Error) -> Self {
        error.downcast::<Self>().unwrap_or_else(Self::Database)
    }
}

impl From<tokio_postgres::Error> for ShopError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

/// Recipe 6: with the two `From`, `?` is all that a closure and its helpers need.
#[tokio::test]
async fn own_errors_pass_with_a_question_mark() {
    async fn number(client: &impl GenericClient, text: &str) -> Result<i32, ShopError> {
        client.batch_execute("SELECT 1").await?;
        Ok(text.parse()?)
    }
    async fn buy(pool: &Pool, runs: &Runs, wanted: &str) -> Result<i32, ShopError> {
        let left = pool
            .transaction(async |tx| {
                if runs.begin() == 1 {
                    tx.batch_execute(CONFLICT).await?;
                }
                let left = 3 - number(&tx, wanted).await?;
                if left < 0 {
                    return Err(ShopError::SoldOut { left }.into());
                }
                Ok(left)
            })
            .await?;
        Ok(left)
    }
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).build().unwrap();
    let runs = Runs::default();
    assert_eq!(buy(&pool, &runs, "2").await.unwrap(), 1);
    assert_eq!(runs.count(), 2, "the conflict was met, and run again");
    assert!(matches!(buy(&pool, &runs, "5").await, Err(ShopError::SoldOut { left: -2 })));
    assert!(matches!(buy(&pool, &runs, "many").await, Err(ShopError::Number(_))));
    assert_eq!(runs.count(), 4, "what the program itself says is not run again");
    pool.close();
    assert!(matches!(buy(&pool, &runs, "1").await, Err(ShopError::Database(Error::Closed))));
}

/// A wrapper with the two bounds, which converts the error, as the recipes have it.
async fn in_transaction<T, F, Fut>(pool: &Pool, mut work: F) -> anyhow::Result<T>
where
    F: FnMut(Transaction) -> Fut,
    Fut: Future<Output = anyhow::Result<T>>,
{
    let done = pool.transaction(|tx| {
        let work = work(tx);
        async move { work.await.map_err(Error::abort_report) }
    });
    Ok(done.await?)
}

async fn eyre(tx: &Transaction, id: i64) -> eyre::Result<i64> {
    Ok(put(tx, id).await?)
}

/// Helpers, wrappers, `anyhow`, `eyre` and captured state, while the primary is killed: each row once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closures_of_every_form_ride_through_a_failover() {
    const WRITERS: i64 = 6;
    static RUNS: AtomicU32 = AtomicU32::new(0);
    static NEXT: AtomicI64 = AtomicI64::new(0);

    async fn write(pool: &Pool, id: i64) -> anyhow::Result<()> {
        match id % WRITERS {
            0 => {
                in_transaction(pool, async |tx| -> anyhow::Result<()> {
                    put(&tx, id).await?;
                    Ok(())
                })
                .await?;
            }
            1 => {
                let mut runs = 0;
                in_transaction(pool, |tx| {
                    runs += 1;
                    async move { Ok(put(&tx, id).await.map(drop)?) }
                })
                .await?;
                RUNS.fetch_add(runs, Ordering::Relaxed);
            }
            2 => drop(pool.transaction(async |tx| eyre(&tx, id).await.map_err(Error::abort_report)).await?),
            3 => pool.transaction(async |mut tx| Ok(put_one_of_two(&mut tx, id).await?)).await?,
            4 => {
                let name = id.to_string();
                let name = &name;
                pool.transaction(|tx| async move {
                    put(&tx, name.parse().map_err(Error::abort)?).await?;
                    Ok(())
                })
                .await?;
            }
            _ => {
                let bought: Result<_, ShopError> =
                    pool.transaction(async |tx| Ok(put(&Tenant(tx), id).await?)).await.map_err(Into::into);
                bought?;
            }
        }
        Ok(())
    }

    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let mut writers = JoinSet::new();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    for _ in 0..WRITERS {
        let (pool, stopped) = (pool.clone(), stopped.clone());
        writers.spawn(async move {
            let mut written = Vec::new();
            while !*stopped.borrow() {
                let id = NEXT.fetch_add(1, Ordering::Relaxed) + 1;
                write(&pool, id).await.unwrap_or_else(|error| panic!("{id}: {error:?}"));
                written.push(id);
            }
            written
        });
    }
    let written = || NEXT.load(Ordering::Relaxed);
    eventually("all forms have written", PATIENCE, async || written() > 5 * WRITERS).await;
    cluster.kill(cluster.primary()).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    eventually("the pool has followed", PATIENCE, async || generation(&pool) == 2).await;
    let before = written();
    eventually("all forms have written again", PATIENCE, async || written() > before + 5 * WRITERS).await;
    stop.send(true).unwrap();
    let mut acknowledged: Vec<i64> = writers.join_all().await.into_iter().flatten().collect();
    acknowledged.sort_unstable();
    assert_eq!(stored(&cluster).await, acknowledged, "each row that was acknowledged, once, and no other");
    assert!(RUNS.load(Ordering::Relaxed) > 0);
}

/// The pool's own error goes through a program's types and back, and is still what it was.
#[tokio::test]
async fn the_outcome_of_a_commit_survives_a_programs_own_error() {
    let shop: ShopError = Error::TimedOut { after: Duration::from_secs(1) }.into();
    let back: Error = shop.into();
    assert!(matches!(back, Error::TimedOut { .. }));
    assert_eq!(back.commit_outcome(), CommitOutcome::NotCommitted);
}
