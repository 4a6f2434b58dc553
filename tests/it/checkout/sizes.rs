//! A pool that grows, shrinks, is emptied of idle connections, and is closed when its work has ended.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use futures_util::poll;
use testbed::{Cluster, Cut, Node, Path, eventually};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres_failover::resolve::BoxFuture;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Client, Error, Guarantee, Pool, deadpool_postgres, tokio_postgres};

use crate::support::bench::{Bench, single};
use crate::support::load::{LONG, by_name, by_url};
use crate::support::{CONFLICT, PATIENCE, Runs, close_gate, committing, insert, open_gate, server, started, stored};

type Boxed = Box<dyn std::error::Error + Send + Sync>;

const SHORT: Duration = Duration::from_millis(300);

async fn take(pool: &Pool, count: usize) -> Vec<Client> {
    let mut taken = Vec::new();
    for _ in 0..count {
        taken.push(pool.get().await.unwrap());
    }
    taken
}

/// The process of the server behind a connection.
async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_larger_pool_serves_those_who_wait() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(1).build().unwrap();
    let held = take(&pool, 1).await;
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { take(&pool, 3).await }
    });
    eventually("a caller waits", PATIENCE, async || pool.status().waiting > 0).await;
    pool.resize(4).unwrap();
    let taken = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!((pool.status().max_size, pool.status().size), (4, 4));
    assert!(pool.get_within(SHORT).await.is_err(), "four are all");
    drop((held, taken));
}

#[tokio::test]
async fn a_smaller_pool_closes_what_comes_back() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(6).build().unwrap();
    let mut taken = take(&pool, 6).await;
    pool.resize(2).unwrap();
    assert_eq!(pool.status().size, 6, "what is in use stays");
    // With and without callers that wait, to whom connections are handed directly.
    let mut waiters = JoinSet::new();
    for _ in 0..4 {
        let pool = pool.clone();
        waiters.spawn(async move { drop(pool.get().await.unwrap()) });
    }
    eventually("callers wait", PATIENCE, async || pool.status().waiting > 0).await;
    drop(taken.split_off(3));
    drop(taken);
    timeout(PATIENCE, waiters.join_all()).await.unwrap();
    eventually("it has shrunk", PATIENCE, async || pool.status().size <= 2).await;
    let held = take(&pool, 2).await;
    assert!(pool.get_within(SHORT).await.is_err(), "two are all");
    drop(held);
}

/// Growing and shrinking by turns, under load: never more than the largest size, and no caller is forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_changes_its_size_forgets_nobody() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(4).build().unwrap();
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        let pool = pool.clone();
        callers.spawn(async move {
            for _ in 0..20 {
                pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
            }
        });
    }
    for size in [1, 8, 2, 6, 1, 3].into_iter().cycle().take(30) {
        pool.resize(size).unwrap();
        assert!(pool.status().size <= 8, "{}", pool.status().size);
        pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
    }
    timeout(PATIENCE, callers.join_all()).await.expect("a caller was forgotten");
    pool.resize(3).unwrap();
    eventually("it has shrunk", PATIENCE, async || pool.status().size <= 3).await;
    let held = take(&pool, 3).await;
    let open = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND backend_type = 'client backend'";
    let direct = cluster.direct(Node(0)).await;
    eventually("three and the heartbeat's are open", PATIENCE, async || {
        direct.query_one(open, &[]).await.unwrap().get::<_, i64>(0) <= 4
    })
    .await;
    drop(held);
}

#[tokio::test]
async fn an_impossible_size_changes_nothing() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(4).min_idle(2).build().unwrap();
    for size in [0, 1, 1_000_000] {
        let error = pool.resize(size).unwrap_err().to_string();
        assert!(error.contains("max_size"), "{error}");
    }
    assert!(pool.resize(1).unwrap_err().to_string().contains("min_idle"), "it names what stands against it");
    assert_eq!(pool.status().max_size, 4);
}

#[tokio::test]
async fn idle_connections_are_closed_on_demand() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(4).build().unwrap();
    let mut taken = take(&pool, 3).await;
    let held = taken.pop().unwrap();
    let (mut before, kept) = (Vec::new(), pid(&held).await);
    for client in &taken {
        before.push(pid(client).await);
    }
    drop(taken);
    assert_eq!(pool.evict_idle(), 2);
    assert_eq!(pool.status().size, 1);
    assert_eq!(pid(&held).await, kept, "what is in use stays");
    let new = take(&pool, 2).await;
    for client in &new {
        assert!(!before.contains(&pid(client).await), "an old session was handed out");
    }
    drop((held, new));
    let filled = by_url(cluster.url_hosts()).max_size(4).min_idle(2).build().unwrap();
    eventually("two are ready", PATIENCE, async || filled.status().available == 2).await;
    assert_eq!(filled.evict_idle(), 2);
    eventually("two are ready again", PATIENCE, async || filled.status().available == 2).await;
}

#[tokio::test]
async fn a_wrapped_pool_is_resized_and_emptied_too() {
    let cluster = server().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(format!("postgres://app@{}/app", path.addr()));
    let existing = config.create_pool(None, tokio_postgres::NoTls).unwrap();
    let pool: Pool = Pool::wrap(existing.clone()).heartbeat_timeout(PATIENCE).build().unwrap();
    pool.resize(2).unwrap();
    assert_eq!((existing.status().max_size, pool.status().max_size), (2, 2));
    drop(take(&pool, 2).await);
    assert_eq!(pool.evict_idle(), 2);
    assert_eq!(existing.status().size, 0);
    assert!(pool.resize(0).is_err());
    // What was used by others is asked which server it leads to. A caller gives up meanwhile.
    drop(existing.get().await.unwrap());
    let client = existing.get().await.unwrap();
    let before: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    drop(client);
    path.hold(true);
    assert!(pool.get_within(SHORT).await.is_err(), "its question hangs");
    pool.evict_idle();
    path.hold(false);
    let held = take(&pool, 1).await;
    assert_ne!(pid(&held[0]).await, before, "an old session was handed out");
    assert!(!pool.close_within(SHORT).await, "it is in use");
    drop(held);
    assert!(existing.get().await.is_ok(), "the wrapped pool itself stays open");
}

/// A call that has begun goes on, across a failover, while new callers are turned away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closing_pool_lets_work_finish_through_a_failover() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let (tell, told) = oneshot::channel();
    let (go, went) = oneshot::channel::<()>();
    let call = tokio::spawn({
        let pool = pool.clone();
        async move {
            let (mut tell, mut went) = (Some(tell), Some(went));
            pool.transaction(|tx| {
                let (tell, went, inner) = (tell.take(), went.take(), pool.clone());
                async move {
                    insert(&tx, 1).await?;
                    if let (Some(tell), Some(went)) = (tell, went) {
                        tell.send(()).unwrap();
                        went.await.unwrap();
                    }
                    // A call within a call that goes on is no new caller.
                    inner.get().await?.batch_execute("SELECT 1").await?;
                    inner.read(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await?;
                    Ok(())
                }
            })
            .await
        }
    });
    told.await.unwrap();
    let closing = tokio::spawn({
        let pool = pool.clone();
        async move { pool.close_within(PATIENCE * 2).await }
    });
    eventually("new callers are turned away", PATIENCE, async || matches!(pool.get().await, Err(Error::Closed))).await;
    assert!(matches!(pool.transaction(async |_| Ok(())).await, Err(Error::Closed)));
    assert!(matches!(pool.connect().await, Err(Error::Closed)));
    assert!(matches!(pool.listen(["x"]).await, Err(Error::Closed)));
    cluster.kill(cluster.primary()).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    go.send(()).unwrap();
    call.await.unwrap().unwrap();
    assert!(timeout(PATIENCE, closing).await.unwrap().unwrap());
    assert_eq!(stored(&cluster).await, [1]);
}

#[tokio::test]
async fn a_closing_pool_waits_for_clients_and_turns_waiting_callers_away() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(1).build().unwrap();
    let held = take(&pool, 1).await;
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await }
    });
    eventually("a caller waits", PATIENCE, async || pool.status().waiting > 0).await;
    let closing = tokio::spawn({
        let pool = pool.clone();
        async move { pool.close_within(PATIENCE).await }
    });
    assert!(matches!(timeout(PATIENCE, waiting).await.unwrap().unwrap(), Err(Error::Closed)));
    held[0].batch_execute("SELECT 1").await.unwrap();
    drop(held);
    assert!(timeout(PATIENCE, closing).await.unwrap().unwrap(), "all had come back");
    let unused = by_url(cluster.url_hosts()).build().unwrap();
    assert!(unused.close_within(PATIENCE).await, "nothing was to be waited for");
    assert!(unused.close_within(PATIENCE).await || unused.get().await.is_err(), "it is closed");
}

/// Without a primary, `connect`, `dial` and `listen` wait. A closing pool does not let them wait to its limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closing_pool_turns_away_everybody_who_waits() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).checkout_timeout(PATIENCE * 3).build().unwrap();
    let held = take(&pool, 1).await;
    cluster.kill(Node(0)).await;
    eventually("the pool searches", PATIENCE, async || {
        matches!(pool.status().view.state, State::Searching { .. }) && pool.get_within(SHORT).await.is_err()
    })
    .await;
    let (mut connecting, mut dialling) = (Box::pin(pool.connect()), Box::pin(pool.dial()));
    let mut listening = Box::pin(pool.listen(["orders"]));
    assert!(poll!(connecting.as_mut()).is_pending());
    assert!(poll!(dialling.as_mut()).is_pending() && poll!(listening.as_mut()).is_pending());
    let closing = tokio::spawn({
        let pool = pool.clone();
        async move { pool.close_within(PATIENCE * 3).await }
    });
    let turned_away = timeout(PATIENCE, async { (connecting.await, dialling.await.err(), listening.await.err()) });
    let turned_away = turned_away.await.expect("nobody waits for the limit");
    assert!(matches!(turned_away, (Err(Error::Closed), Some(Error::Closed), Some(Error::Closed))), "{turned_away:?}");
    assert!(!closing.is_finished(), "a connection is checked out");
    drop(held);
    assert!(timeout(PATIENCE, closing).await.unwrap().unwrap());
}

/// At the limit the pool is closed whatever is under way; a COMMIT that was sent is not cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closing_pool_waits_no_longer_than_its_limit() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(2).build().unwrap();
    let gate = close_gate(&cluster).await;
    let call = tokio::spawn({
        let pool = pool.clone();
        async move { pool.transaction(async |tx| insert(&tx, 1).await).await }
    });
    committing(&gate).await;
    assert!(!pool.close_within(SHORT).await);
    let error = timeout(PATIENCE, call).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, Error::CommitUnknown(_)), "{error:?}");
    open_gate(&gate).await;
    eventually("the COMMIT is carried out", PATIENCE, async || stored(&cluster).await == [1]).await;
}

/// A call that runs again between two connections is waited for.
#[tokio::test]
async fn a_closing_pool_waits_for_a_call_between_two_runs() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(1).build().unwrap();
    let runs = Runs::default();
    let (tell, told) = oneshot::channel();
    let mut tell = Some(tell);
    let call = pool.transaction(|tx| {
        let (run, tell) = (runs.begin(), tell.take());
        async move {
            if let Some(tell) = tell {
                tell.send(()).unwrap();
            }
            if run < 4 {
                tx.batch_execute(CONFLICT).await?;
            }
            Ok(())
        }
    });
    let closing = async {
        told.await.unwrap();
        pool.close_within(PATIENCE).await
    };
    let (called, closed) = tokio::join!(call, closing);
    called.unwrap();
    assert!(closed);
    assert_eq!(runs.count(), 4);
}

const NEVER: Duration = Duration::from_secs(3600);

/// The pool was made smaller, and others hold all of its connections, or will: who settles a COMMIT waits for none of
/// them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_settles_for_a_smaller_pool_waits_for_no_connection() {
    let bench = Bench::new(single(), Guarantee::ExactlyOnce).await;
    let pool = by_name(&bench.cluster).max_size(8).build().unwrap();
    let _held = take(&pool, 1).await;
    pool.resize(2).unwrap();
    // It takes the place of the connection that the call loses, and keeps it.
    let (tell, told) = oneshot::channel();
    let taker = tokio::spawn({
        let pool = pool.clone();
        async move {
            told.await.unwrap();
            let _kept = pool.get().await.unwrap();
            std::future::pending::<()>().await;
        }
    });
    let waits = pool.clone();
    bench.cut_with(Cut::CommitAnswerDropped, move |_| async move {
        while waits.status().waiting == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let mut tell = Some(tell);
    let call = pool.transaction(|tx| {
        let tell = tell.take();
        async move {
            if let Some(tell) = tell {
                tell.send(()).unwrap();
            }
            insert(&tx, 1).await
        }
    });
    timeout(LONG, call).await.expect("it hangs").unwrap();
    bench.assert_all_cut().await;
    assert_eq!(stored(&bench.cluster).await, [1]);
    taker.abort();
}

/// A connection was handed to a caller that gives up when the pool has been made smaller.
#[tokio::test]
async fn a_smaller_pool_closes_what_nobody_took() {
    let cluster = server().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let builder = by_url(format!("postgres://app@{}/app", path.addr())).max_size(3);
    let pool = builder.heartbeat_timeout(PATIENCE).patrol_interval(NEVER).build().unwrap();
    let mut held = take(&pool, 2).await;
    // It waits for a dial, and so for what is given back.
    path.delay_log_ins(NEVER);
    let mut waits = Box::pin(pool.get());
    assert!(poll!(waits.as_mut()).is_pending());
    held.pop();
    pool.resize(1).unwrap();
    drop(waits);
    eventually("it has shrunk", PATIENCE, async || pool.status().size == 1).await;
}

async fn sessions(cluster: &Cluster) -> Vec<i32> {
    let sql = "SELECT pid FROM pg_stat_activity WHERE usename = 'app' AND backend_type = 'client backend'";
    cluster.direct(Node(0)).await.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// A hook that waits, if it is to, and tells on which session.
#[derive(Clone)]
struct Holds {
    waits: Arc<AtomicBool>,
    gate: Arc<Semaphore>,
    running: Arc<AtomicI32>,
}

impl Holds {
    fn new() -> Self {
        Self { waits: Arc::default(), gate: Arc::new(Semaphore::new(0)), running: Arc::default() }
    }

    fn run<'a>(&self, client: &'a deadpool_postgres::ClientWrapper) -> BoxFuture<'a, Result<bool, Boxed>> {
        let hook = self.clone();
        Box::pin(async move {
            if hook.waits.load(Ordering::SeqCst) {
                let pid = client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
                hook.running.store(pid, Ordering::SeqCst);
                hook.gate.acquire_owned().await?.forget();
            }
            Ok(true)
        })
    }
}

/// On its way back to the idle ones a connection is checked out no more: what the pool does with it meanwhile saves it
/// from nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_in_the_hands_of_hooks_are_closed_on_demand_too() {
    let cluster = server().await;
    for name in ["after_release", "before_acquire", "after_connect"] {
        let hook = Holds::new();
        let (waits, running, runs) = (Arc::clone(&hook.waits), Arc::clone(&hook.running), hook.clone());
        let builder = by_url(cluster.url_hosts()).max_size(2).hook_timeout(PATIENCE);
        let pool = match name {
            "after_release" => builder.after_release(move |client| runs.run(client)),
            "before_acquire" => builder.before_acquire(move |client| runs.run(client)),
            _ => builder.after_connect(move |client| {
                let ran = runs.run(client);
                Box::pin(async move { ran.await.map(drop) })
            }),
        };
        let pool = pool.build().unwrap();
        let is_running = async || running.load(Ordering::SeqCst) != 0;
        if name == "after_release" {
            let client = pool.get().await.unwrap();
            waits.store(true, Ordering::SeqCst);
            drop(client);
            eventually("the hook runs", PATIENCE, is_running).await;
        } else {
            if name == "before_acquire" {
                drop(pool.get().await.unwrap());
            }
            waits.store(true, Ordering::SeqCst);
            // The caller gives up when the hook runs.
            tokio::select! {
                _ = pool.get() => panic!("{name}: it was lent"),
                () = eventually("the hook runs", PATIENCE, is_running) => {}
            }
        }
        pool.evict_idle();
        waits.store(false, Ordering::SeqCst);
        hook.gate.add_permits(1);
        let old = running.load(Ordering::SeqCst);
        let client = timeout(PATIENCE, pool.get()).await.expect("nobody is served").unwrap();
        assert_ne!(pid(&client).await, old, "{name}: an old session was handed out");
        drop(client);
        eventually("it is closed", PATIENCE, async || !sessions(&cluster).await.contains(&old)).await;
    }
}

/// So are those that are being tested for a caller that gave up, and the session that found the primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_not_on_loan_is_closed_on_demand() {
    let cluster = server().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let idle = Duration::from_millis(100);
    let builder = by_url(format!("postgres://app@{}/app", path.addr())).max_size(2).heartbeat_interval(NEVER);
    let pool = builder.test_idle_after(idle).build().unwrap();
    pool.connect().await.unwrap();
    let before = sessions(&cluster).await;
    assert!(!before.is_empty());
    pool.evict_idle();
    let client = pool.get().await.unwrap();
    let first = pid(&client).await;
    assert!(!before.contains(&first), "the session that found the primary was handed out");
    drop(client);
    tokio::time::sleep(idle * 3).await;
    path.hold(true);
    assert!(pool.get_within(idle).await.is_err(), "its test hangs");
    pool.evict_idle();
    path.hold(false);
    let client = pool.get_within(PATIENCE).await.unwrap();
    assert_ne!(pid(&client).await, first, "an old session was handed out after its test");
}

/// A caller is about to get its connection when the pool is closed: it gets none that nobody has waited for.
#[tokio::test]
async fn a_closing_pool_lends_nothing_behind_its_back() {
    let cluster = server().await;
    let (gate, ended) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicBool::new(false)));
    let (opens, ends) = (Arc::clone(&gate), Arc::clone(&ended));
    let builder = by_url(cluster.url_hosts()).max_size(1).hook_timeout(PATIENCE);
    let pool = builder
        .before_acquire(move |_| {
            let (gate, ended) = (Arc::clone(&opens), Arc::clone(&ends));
            Box::pin(async move {
                gate.acquire_owned().await?.forget();
                ended.store(true, Ordering::SeqCst);
                Ok(true)
            })
        })
        .build()
        .unwrap();
    pool.connect().await.unwrap();
    let mut caller = Box::pin(pool.get());
    eventually("the hook runs", PATIENCE, async || {
        assert!(poll!(caller.as_mut()).is_pending());
        pool.status().size == 1
    })
    .await;
    // This runtime has one thread: nobody polls the caller while the hook's task ends.
    gate.add_permits(1);
    while !ended.load(Ordering::SeqCst) {
        tokio::task::yield_now().await;
    }
    assert!(pool.close_within(PATIENCE).await, "nothing is checked out");
    let got = caller.await;
    assert!(matches!(got, Err(Error::Closed)), "{got:?}");
}
