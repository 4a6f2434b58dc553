//! Guards that hold when they compile: the futures are `Send` and `'static`, and not so deep that a user's program,
//! which wraps them in its own, meets the compiler's recursion limit (128).

#![recursion_limit = "96"]
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::time::Duration;

use tokio_postgres::IsolationLevel;
use tokio_postgres_failover::listen::Listener;
use tokio_postgres_failover::session::{CancelToken, Connection, Detached, GenericTransaction};
use tokio_postgres_failover::view::{Status, View};
use tokio_postgres_failover::{
    BuildError, Client, Error, Event, Events, GenericClient, Manager, Pool, PoolBuilder, RetryPolicy, Savepoint,
    Transaction, deadpool,
};

fn movable<T: Send + Sync + 'static>() {}
fn sendable<T: Send + 'static>() {}
fn spawnable<F: Future + Send + 'static>(future: F) {
    drop(future);
}

#[test]
fn the_types_go_to_other_threads() {
    movable::<Pool>();
    movable::<Client>();
    movable::<Connection>();
    movable::<Transaction>();
    movable::<Savepoint<'static>>();
    movable::<GenericTransaction<'static>>();
    movable::<Manager>();
    movable::<Error>();
    movable::<BuildError>();
    movable::<Status>();
    movable::<View>();
    movable::<RetryPolicy>();
    movable::<Event>();
    movable::<CancelToken>();
    movable::<deadpool::managed::Pool<Manager>>();
    sendable::<PoolBuilder>();
    sendable::<Detached>();
    sendable::<Events>();
    sendable::<Listener>();
}

/// A result is passed through every caller's hands: it stays small.
#[test]
fn errors_are_small() {
    assert!(size_of::<Error>() <= 24, "{}", size_of::<Error>());
}

/// A transaction within a service's layers: each adds to the depth of the type.
async fn handler(pool: Pool, sku: String) -> Result<i64, Error> {
    let prices = vec![1_i64, 2];
    service(&pool, &sku, &prices).await
}

async fn service(pool: &Pool, sku: &str, prices: &[i64]) -> Result<i64, Error> {
    pool.transaction(async |tx| repository(tx, sku, prices).await).await
}

async fn repository(mut tx: Transaction, sku: &str, prices: &[i64]) -> Result<i64, Error> {
    let mut outer = tx.savepoint().await?;
    let inner = outer.savepoint().await?;
    let statement = inner.prepare_cached("SELECT 1").await?;
    inner.query(&statement, &[&sku, &prices]).await?;
    inner.release().await?;
    outer.release().await?;
    Ok(tx.query_one("SELECT 1", &[]).await?.get(0))
}

/// A helper for any client, which calls another one.
async fn generic(client: &impl GenericClient, sku: &str) -> Result<i64, tokio_postgres::Error> {
    let statement = client.prepare_cached("SELECT 1").await?;
    client.execute(&statement, &[&sku]).await?;
    single(client, sku.to_owned()).await
}

async fn single<C: GenericClient>(client: &C, sku: String) -> Result<i64, tokio_postgres::Error> {
    let rows = client.query("SELECT $1", &[&sku]).await?;
    client.query_raw("SELECT $1", [&sku]).await.map(drop)?;
    client.copy_out("COPY orders TO STDOUT").await.map(drop)?;
    Ok(rows.len().try_into().unwrap_or_default())
}

async fn nested(client: &mut impl GenericClient) -> Result<(), tokio_postgres::Error> {
    let mut outer = client.transaction().await?;
    let inner = outer.transaction().await?;
    generic(&inner, "sku").await?;
    inner.commit().await?;
    outer.rollback().await
}

#[tokio::test]
async fn helpers_for_any_client_can_be_spawned() {
    let pool = Pool::builder("postgres://app@127.0.0.1:1/app").unwrap().build().unwrap();
    let (own, sku) = (pool.clone(), String::from("sku"));
    spawnable(async move {
        own.transaction(async |mut tx| {
            generic(&tx, &sku).await?;
            Ok(nested(&mut tx).await?)
        })
        .await
    });
    let own = pool.clone();
    spawnable(async move {
        own.transaction(|mut tx| async move {
            generic(&tx, "sku").await?;
            let mut savepoint = tx.transaction().await?;
            nested(&mut savepoint).await?;
            Ok(savepoint.commit().await?)
        })
        .await
    });
    spawnable(async move {
        let mut client = pool.get().await?;
        generic(&client, "sku").await?;
        nested(&mut client).await?;
        generic(&client.detach(), "sku").await?;
        Ok::<_, Error>(())
    });
}

#[tokio::test]
async fn the_futures_can_be_spawned() {
    let pool = Pool::builder("postgres://app@127.0.0.1:1/app").unwrap().build().unwrap();
    let sku = String::from("sku");

    let own = pool.clone();
    spawnable(async move { own.get().await });
    let own = pool.clone();
    spawnable(async move { own.connect().await });
    let (own, captured) = (pool.clone(), sku.clone());
    spawnable(async move {
        own.transaction(async |tx| {
            tx.execute("SELECT $1", &[&captured]).await?;
            Ok(())
        })
        .await
    });
    let (own, captured) = (pool.clone(), sku.clone());
    spawnable(async move {
        own.idempotent(async |tx| {
            tx.execute("SELECT $1", &[&captured]).await?;
            Ok(())
        })
        .await
    });
    let own = pool.clone();
    spawnable(async move {
        own.read(async |tx| {
            let rows = tx.query("SELECT 1", &[]).await?;
            Ok(rows.len())
        })
        .await
    });
    let own = pool.clone();
    spawnable(async move {
        let builder = own.build_transaction().isolation_level(IsolationLevel::Serializable);
        builder.deadline(Duration::from_secs(1)).run(async |_| Ok(())).await
    });
    spawnable(async move { tokio::join!(handler(pool.clone(), sku.clone()), handler(pool.clone(), sku.clone())) });
}
