//! The user's hooks on connections: what they are for, and what becomes of a pool whose hooks misbehave.

use std::error::Error as StdError;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use testbed::{Cluster, Node, eventually};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::resolve::BoxFuture;
use tokio_postgres_failover::{Client, Error, Pool, PoolBuilder, deadpool_postgres};

use crate::support::load::{Load, Write, by_name, by_url, generation};
use crate::support::{PATIENCE, insert, server, sql, started, stored};

type Boxed = Box<dyn StdError + Send + Sync>;
type Hooked<'a, T> = BoxFuture<'a, Result<T, Boxed>>;

/// Long enough for a hook that ends, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_millis(300);

/// What a hook does that it should not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Misuse {
    Fails,
    Panics,
    NeverEnds,
    Hangs,
    LeavesATransaction,
    LeavesAFailedTransaction,
    LeavesAStatement,
    EndsTheSession,
}

use Misuse::{
    EndsTheSession, Fails, Hangs, LeavesAFailedTransaction, LeavesAStatement, LeavesATransaction, NeverEnds, Panics,
};

const MISUSES: [Misuse; 8] =
    [Fails, Panics, NeverEnds, Hangs, LeavesATransaction, LeavesAFailedTransaction, LeavesAStatement, EndsTheSession];

impl Misuse {
    /// What the error or the log says about it.
    fn said(self) -> &'static str {
        match self {
            Fails => "failed: not today",
            Panics => "panicked: a bug in the hook",
            NeverEnds | Hangs => "hook_timeout",
            LeavesATransaction | LeavesAFailedTransaction | LeavesAStatement => "transaction open",
            EndsTheSession => "the session had ended",
        }
    }

    async fn act(self, client: &deadpool_postgres::ClientWrapper) -> Result<(), Boxed> {
        match self {
            Fails => return Err("not today".into()),
            Panics => panic!("a bug in the hook"),
            NeverEnds => pending().await,
            Hangs => client.batch_execute("SELECT pg_sleep(600)").await?,
            LeavesATransaction => client.batch_execute("BEGIN").await?,
            LeavesAFailedTransaction => drop(client.batch_execute("BEGIN; SELECT 1/0").await),
            LeavesAStatement => {
                // One poll sends it.
                let _ = client.batch_execute("SELECT pg_sleep(600)").now_or_never();
            }
            EndsTheSession => {
                let _ = client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await;
                while !client.is_closed() {
                    tokio::task::yield_now().await;
                }
            }
        }
        Ok(())
    }
}

fn builder(cluster: &Cluster) -> PoolBuilder {
    by_url(cluster.url_hosts()).max_size(2)
}

async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

async fn shows(client: &Client, name: &str) -> String {
    client.query_one(&format!("SELECT coalesce(current_setting('{name}', true), '')"), &[]).await.unwrap().get(0)
}

/// Nothing that a hook began goes on in the server.
async fn nothing_runs(cluster: &Cluster) {
    let direct = cluster.direct(Node(0)).await;
    eventually("nothing runs on", PATIENCE, async || {
        let sql = "SELECT FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND state <> 'idle' AND pid <> \
                   pg_backend_pid()";
        let open = "SELECT FROM pg_stat_activity WHERE usename = 'app' AND state LIKE 'idle in transaction%'";
        direct.query(sql, &[]).await.unwrap().is_empty() && direct.query(open, &[]).await.unwrap().is_empty()
    })
    .await;
}

/// Callers get no connection, and are told what the hook said. There is no storm of log-ins.
async fn told(pool: &Pool, hook: &str, said: &str, runs: &AtomicUsize) {
    let began = Instant::now();
    eventually(&format!("a caller is told: {hook} {said}"), PATIENCE, async || {
        let error = pool.get_within(SHORT).await.map(drop).unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        let text = error.to_string();
        text.contains(hook) && text.contains(said)
    })
    .await;
    let most = 20 + 2 * usize::try_from(began.elapsed().as_secs()).unwrap();
    assert!(runs.load(Ordering::SeqCst) <= most, "a storm of {} log-ins", runs.load(Ordering::SeqCst));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_connection_meets_after_connect_before_it_is_lent() {
    let cluster = started().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let pool = by_name(&cluster)
        .max_size(4)
        .min_idle(2)
        .after_connect(move |client| {
            counted.fetch_add(1, Ordering::SeqCst);
            Box::pin(async move {
                client.batch_execute("SET app.greeted = 'yes'; SET search_path = shop, public").await?;
                client.prepare_cached("SELECT 1").await?;
                Ok(())
            })
        })
        .build()
        .unwrap();
    for round in 1..=2 {
        let mut held = Vec::new();
        for _ in 0..4 {
            let client = pool.get().await.unwrap();
            assert_eq!(shows(&client, "app.greeted").await, "yes");
            assert_eq!(client.statement_cache.size(), 1, "its statement is kept");
            held.push(client);
        }
        assert!(runs.load(Ordering::SeqCst) >= 4 * round, "once for each connection");
        drop(held);
        pool.transaction(async |tx| insert(&tx, 1).await).await.unwrap();
        if round == 1 {
            cluster.kill(cluster.primary()).await;
            cluster.promote(cluster.most_advanced_standby().await).await;
            eventually("the pool has followed", PATIENCE, async || generation(&pool) == 2).await;
        }
    }
}

/// A hook that misbehaves costs its own connection and a pause; callers are told what it said, and nothing is left
/// behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_misused_after_connect_ends_at_the_deadline_and_heals() {
    let cluster = server().await;
    for misuse in MISUSES {
        let (runs, well) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, heals) = (Arc::clone(&runs), Arc::clone(&well));
        let limit = if matches!(misuse, NeverEnds | Hangs) { SHORT } else { LIMIT };
        let pool = builder(&cluster)
            .hook_timeout(limit)
            .after_connect(move |client| {
                counted.fetch_add(1, Ordering::SeqCst);
                let well = heals.load(Ordering::SeqCst);
                Box::pin(async move { if well { Ok(()) } else { misuse.act(client).await } })
            })
            .build()
            .unwrap();
        told(&pool, "after_connect", misuse.said(), &runs).await;
        well.store(true, Ordering::SeqCst);
        pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
        assert_eq!(generation(&pool), 1, "{misuse:?}: it says nothing about the server");
        nothing_runs(&cluster).await;
    }
}

#[tokio::test]
async fn a_slow_after_connect_is_waited_for() {
    let cluster = server().await;
    let pool = builder(&cluster)
        .after_connect(|client| Box::pin(async move { Ok(client.batch_execute("SELECT pg_sleep(0.5)").await?) }))
        .build()
        .unwrap();
    // The caller gives up, and the next one gets its connection.
    assert!(pool.get_within(Duration::from_millis(10)).await.is_err());
    pool.get().await.unwrap();
    assert_eq!(pool.status().size, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_acquire_refuses_a_connection_and_the_next_one_serves() {
    let cluster = server().await;
    let pool = builder(&cluster)
        .before_acquire(|client| {
            Box::pin(async move {
                let row = client.query_one("SELECT coalesce(current_setting('app.spoilt', true), '')", &[]).await?;
                Ok(row.get::<_, &str>(0) != "yes")
            })
        })
        .build()
        .unwrap();
    let client = pool.get().await.unwrap();
    let (first, good) = (pid(&client).await, pid(&pool.get().await.unwrap()).await);
    client.batch_execute("SET app.spoilt = 'yes'").await.unwrap();
    drop(client);
    for _ in 0..4 {
        let served = pool.get().await.unwrap();
        assert_ne!(pid(&served).await, first);
    }
    eventually("the spoilt one is closed", PATIENCE, async || pool.status().size == 1).await;
    assert_eq!(pid(&pool.get().await.unwrap()).await, good, "the good one is kept");
    let spoilt = pool.transaction(async |tx| Ok(shows_in(&tx).await)).await.unwrap();
    assert_eq!(spoilt, "");
}

async fn shows_in(tx: &tokio_postgres_failover::Transaction) -> String {
    tx.query_one("SELECT coalesce(current_setting('app.spoilt', true), '')", &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_misused_before_acquire_ends_at_the_deadline_and_heals() {
    let cluster = server().await;
    // `None`: it refuses every connection.
    for misuse in MISUSES.into_iter().map(Some).chain([None]) {
        let (runs, well) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, heals) = (Arc::clone(&runs), Arc::clone(&well));
        let limit = if matches!(misuse, Some(NeverEnds | Hangs)) { SHORT } else { LIMIT };
        let pool = builder(&cluster)
            .hook_timeout(limit)
            .before_acquire(move |client| {
                counted.fetch_add(1, Ordering::SeqCst);
                let well = heals.load(Ordering::SeqCst);
                Box::pin(async move {
                    match misuse {
                        _ if well => Ok(true),
                        Some(misuse) => misuse.act(client).await.map(|()| true),
                        None => Ok(false),
                    }
                })
            })
            .build()
            .unwrap();
        let said = misuse.map_or("refused the connection", Misuse::said);
        told(&pool, "before_acquire", said, &runs).await;
        well.store(true, Ordering::SeqCst);
        pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
        nothing_runs(&cluster).await;
        eventually("no slot is lost", PATIENCE, async || {
            let (one, two) = (pool.get_within(LIMIT).await, pool.get_within(LIMIT).await);
            one.is_ok() && two.is_ok()
        })
        .await;
    }
}

/// A caller that gives up while the hook runs closes no connection: the next one gets it.
#[tokio::test]
async fn an_impatient_caller_costs_no_connection_while_before_acquire_runs() {
    let cluster = server().await;
    let gate = Arc::new(Semaphore::new(1));
    let opens = Arc::clone(&gate);
    let pool = builder(&cluster)
        .max_size(1)
        .hook_timeout(PATIENCE)
        .before_acquire(move |_| {
            let gate = Arc::clone(&opens);
            Box::pin(async move {
                gate.acquire_owned().await?.forget();
                Ok(true)
            })
        })
        .build()
        .unwrap();
    let first = pid(&pool.get().await.unwrap()).await;
    for _ in 0..3 {
        assert!(pool.get_within(Duration::from_millis(20)).await.is_err());
    }
    gate.add_permits(100);
    assert_eq!(pid(&pool.get().await.unwrap()).await, first);
    assert_eq!(pool.status().size, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_release_sees_what_comes_back_before_the_next_caller() {
    let cluster = server().await;
    let pool = builder(&cluster)
        .max_size(1)
        .after_release(|client| {
            Box::pin(async move {
                client.batch_execute("SET app.returns = 'seen'").await?;
                let row = client.query_one("SELECT coalesce(current_setting('app.spoilt', true), '')", &[]).await?;
                Ok(row.get::<_, &str>(0) != "yes")
            })
        })
        .build()
        .unwrap();
    let client = pool.get().await.unwrap();
    let first = pid(&client).await;
    assert_eq!(shows(&client, "app.returns").await, "");
    drop(client);
    let client = pool.get().await.unwrap();
    assert_eq!((pid(&client).await, shows(&client, "app.returns").await), (first, "seen".to_owned()));
    client.batch_execute("SET app.spoilt = 'yes'").await.unwrap();
    drop(client);
    let client = pool.get().await.unwrap();
    assert_ne!(pid(&client).await, first, "it was refused");
    drop(client);
    let second = pool.transaction(async |tx| Ok(tx.query_one("SELECT pg_backend_pid()", &[]).await?.get::<_, i32>(0)));
    let second = second.await.unwrap();
    let client = pool.get().await.unwrap();
    assert_eq!((pid(&client).await, shows(&client, "app.returns").await), (second, "seen".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_misused_after_release_costs_its_connection_alone() {
    let cluster = server().await;
    for misuse in MISUSES {
        let limit = if matches!(misuse, NeverEnds | Hangs) { SHORT } else { LIMIT };
        let pool = builder(&cluster)
            .max_size(1)
            .hook_timeout(limit)
            .after_release(move |client| Box::pin(async move { misuse.act(client).await.map(|()| true) }))
            .build()
            .unwrap();
        let mut seen = Vec::new();
        for id in 0..3 {
            let client = pool.get().await.unwrap_or_else(|error| panic!("{misuse:?}: {error}"));
            let pid = pid(&client).await;
            assert!(!seen.contains(&pid), "{misuse:?}: a spoilt session was handed on");
            seen.push(pid);
            drop(client);
            pool.transaction(async |tx| insert(&tx, id).await).await.unwrap();
        }
        nothing_runs(&cluster).await;
        sql(&cluster, "TRUNCATE entries").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_reset_when_it_comes_back() {
    let cluster = server().await;
    let pool = builder(&cluster)
        .max_size(1)
        .reset_on_return(true)
        .after_connect(|client| Box::pin(async move { Ok(client.batch_execute("SET app.greeted = 'yes'").await?) }))
        .build()
        .unwrap();
    let client = pool.get().await.unwrap();
    let first = pid(&client).await;
    let statement = client.prepare_cached("SELECT 7").await.unwrap();
    client
        .batch_execute(
            "SET app.mine = 'left'; SET app.greeted = 'no'; SET work_mem = '77MB'; CREATE TEMPORARY TABLE mine (id int);
             SELECT pg_advisory_lock(7); LISTEN mine; DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
        )
        .await
        .unwrap();
    drop(client);
    pool.transaction(async |tx| insert(&tx, 1).await).await.unwrap();
    let client = pool.get().await.unwrap();
    assert_eq!(pid(&client).await, first, "it is the same session");
    assert_eq!((shows(&client, "app.mine").await, shows(&client, "app.greeted").await), (String::new(), "yes".into()));
    assert_ne!(shows(&client, "work_mem").await, "77MB");
    let left = "SELECT (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())
                     + (SELECT count(*) FROM pg_cursors WHERE name <> '')
                     + (SELECT count(*) FROM pg_listening_channels())
                     + coalesce((SELECT 1 WHERE to_regclass('mine') IS NOT NULL), 0)";
    assert_eq!(client.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
    assert_eq!(client.query_one(&statement, &[]).await.unwrap().get::<_, i32>(0), 7, "prepared statements stay");
    assert_eq!(stored(&cluster).await, [1]);
}

fn acts(misuse: Option<Misuse>, client: &deadpool_postgres::ClientWrapper) -> Hooked<'_, ()> {
    Box::pin(async move {
        match misuse {
            Some(misuse) => misuse.act(client).await,
            None => Ok(client.batch_execute("SET app.hook = 'ran'").await?),
        }
    })
}

/// All hooks at once, some of which misbehave, under writers and through a failover: each row once, whatever they do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_that_misbehave_double_and_lose_nothing() {
    let cluster = started().await;
    let turn = Arc::new(AtomicUsize::new(0));
    let misuse = move |of: usize| {
        let turn = turn.fetch_add(1, Ordering::Relaxed);
        (turn % of == of - 1).then(|| MISUSES[(turn / of) % MISUSES.len()])
    };
    let (connects, acquires, releases) = (misuse.clone(), misuse.clone(), misuse);
    let pool = by_name(&cluster)
        .hook_timeout(SHORT)
        .reset_on_return(true)
        .after_connect(move |client| acts(connects(5), client))
        .before_acquire(move |client| {
            let acted = acts(acquires(29), client);
            Box::pin(async move { acted.await.map(|()| true) })
        })
        .after_release(move |client| {
            let acted = acts(releases(31), client);
            Box::pin(async move { acted.await.map(|()| true) })
        })
        .build()
        .unwrap();
    let load = Load::warm(&pool, 4, Write::Transaction).await;
    cluster.kill(cluster.primary()).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    eventually("the pool has followed", PATIENCE, async || generation(&pool) == 2).await;
    load.all_written_since(Instant::now()).await;
    load.stop(&cluster).await.assert_flawless();
}

/// A hook that asks its own pool for the connection that it holds up waits until its time limit, and no longer.
#[tokio::test]
async fn a_hook_that_waits_for_its_own_pool_ends() {
    let cluster = server().await;
    let cell = Arc::new(std::sync::OnceLock::<Pool>::new());
    let own = Arc::clone(&cell);
    let first = AtomicBool::new(true);
    let pool = builder(&cluster)
        .max_size(1)
        .hook_timeout(SHORT)
        .after_connect(move |_| {
            let pool = own.get().cloned().filter(|_| first.swap(false, Ordering::SeqCst));
            Box::pin(async move {
                if let Some(pool) = pool {
                    drop(pool.get().await?);
                }
                Ok(())
            })
        })
        .build()
        .unwrap();
    cell.set(pool.clone()).unwrap();
    timeout(PATIENCE, pool.get()).await.expect("it hangs").unwrap();
}

#[tokio::test]
async fn a_closed_pool_ends_its_hooks() {
    let cluster = server().await;
    let pool = builder(&cluster)
        .hook_timeout(PATIENCE * 10)
        .after_release(|client| Box::pin(async move { Hangs.act(client).await.map(|()| true) }))
        .build()
        .unwrap();
    drop(pool.get().await.unwrap());
    assert!(pool.close_within(PATIENCE).await, "a hook is no work of a caller's");
    assert!(matches!(pool.get().await, Err(Error::Closed)));
    let direct = cluster.direct(Node(0)).await;
    eventually("all sessions have ended", PATIENCE, async || {
        direct.query("SELECT FROM pg_stat_activity WHERE usename = 'app'", &[]).await.unwrap().is_empty()
    })
    .await;
}

#[tokio::test]
async fn what_a_manager_alone_cannot_have_is_refused() {
    let url = "postgres://app@127.0.0.1:1/app";
    let builder = || Pool::builder(url).unwrap();
    for (option, builder) in [
        ("before_acquire", builder().before_acquire(|_| Box::pin(async { Ok(true) }))),
        ("after_release", builder().after_release(|_| Box::pin(async { Ok(true) }))),
        ("reset_on_return", builder().reset_on_return(true)),
    ] {
        let error = builder.build_manager().map(drop).unwrap_err().to_string();
        assert!(error.starts_with(option) && error.contains("pre_recycle"), "{error}");
    }
    assert!(builder().after_connect(|_| Box::pin(async { Ok(()) })).build_manager().is_ok());
    let error = builder().hook_timeout(Duration::ZERO).build().map(drop).unwrap_err().to_string();
    assert!(error.starts_with("hook_timeout"), "{error}");
}

/// As many callers wait as there are connections, and hooks hold those: nobody is told that they are in use.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_wait_for_a_hook_are_told_so() {
    let cluster = server().await;
    let builder = || builder(&cluster).max_size(1).hook_timeout(PATIENCE * 10);
    let releases =
        builder().after_release(|client| Box::pin(async move { NeverEnds.act(client).await.map(|()| true) }));
    let releases = releases.build().unwrap();
    drop(releases.get().await.unwrap());
    let acquires =
        builder().before_acquire(|client| Box::pin(async move { NeverEnds.act(client).await.map(|()| true) }));
    let acquires = acquires.build().unwrap();
    let refuses = builder().before_acquire(|_| Box::pin(async { Ok(false) })).build().unwrap();
    eventually("it refuses again and again", PATIENCE, async || {
        refuses.get_within(SHORT).await.is_err_and(|error| error.to_string().contains("refused the connection"))
    })
    .await;
    for (hook, pool) in [("after_release", releases), ("before_acquire", acquires), ("refuses", refuses)] {
        pool.connect().await.unwrap();
        let callers: Vec<_> = (0..3)
            .map(|_| {
                let pool = pool.clone();
                tokio::spawn(async move { pool.get_within(SHORT * 2).await.map(drop).unwrap_err() })
            })
            .collect();
        for caller in callers {
            let error = caller.await.unwrap();
            let Error::Unavailable(why) = &error else { panic!("{error}") };
            assert_eq!(why.reason(), UnavailableReason::NoSession, "{hook}: {error}");
            // One that refuses may have ended, and let the next session be opened, at that moment.
            assert!(hook == "refuses" || error.to_string().contains("a hook of the pool"), "{hook}: {error}");
        }
    }
}

/// A hook that asks no server, and so sees no session end, ends with its pool all the same.
#[tokio::test]
async fn a_closed_pool_ends_hooks_that_only_wait() {
    let cluster = server().await;
    let alive = Arc::new(());
    let held = Arc::clone(&alive);
    let pool = builder(&cluster)
        .hook_timeout(PATIENCE * 10)
        .before_acquire(move |_| {
            let held = Arc::clone(&held);
            Box::pin(async move {
                pending::<()>().await;
                drop(held);
                Ok(true)
            })
        })
        .build()
        .unwrap();
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await.map(drop) }
    });
    eventually("the hook runs", PATIENCE, async || Arc::strong_count(&alive) == 3).await;
    pool.close();
    assert!(matches!(waits.await.unwrap(), Err(Error::Closed)));
    eventually("the hook has ended", PATIENCE, async || Arc::strong_count(&alive) == 2).await;
}

/// `after_connect` takes long, and no more dials may log in meanwhile. A listener has a session of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_after_connect_holds_up_no_listener() {
    let cluster = server().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let pool = builder(&cluster)
        .connection_gate(1)
        .hook_timeout(PATIENCE * 10)
        .after_connect(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
            Box::pin(pending())
        })
        .build()
        .unwrap();
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await.map(drop) }
    });
    eventually("the hook runs", PATIENCE, async || runs.load(Ordering::SeqCst) == 1).await;
    let listener = timeout(PATIENCE, pool.listen(["x"])).await.expect("it waits for the hook").unwrap();
    drop(listener);
    waits.abort();
    pool.close();
}
