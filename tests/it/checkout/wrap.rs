//! A pool that its owner built, wrapped: one of deadpool, and one of bb8.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use testbed::{Cluster, Node, Tap, eventually};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::session::SessionClient;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy};

use crate::support::load::{LONG, Load, PROMPT, Write, create_table, generation};
use crate::support::wrapped::{Deadpool, Existing, Kind, Setup, over_each_kind};
use crate::support::{stalls, started};

/// What does not end within this time goes on.
const SHORT: Duration = Duration::from_millis(300);

async fn fails_over<T>(load: Load, cluster: &Cluster, change: impl AsyncFnOnce(&Cluster) -> T) {
    let began = Instant::now();
    change(cluster).await;
    load.all_written_since(Instant::now()).await;
    println!("all writers write again {:?} after the fault", began.elapsed());
    load.stop(cluster).await.assert_flawless();
}

/// S1: a real `deadpool_postgres::Pool`, and a real pool of `bb8_postgres`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_under_load_brings_no_error_no_double_and_no_loss() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let existing = K::over(&cluster, 8);
        let pool: Pool = existing.wrap().build().unwrap();
        let load = Load::warm(&pool, 8, Write::Transaction).await;
        fails_over(load, &cluster, async |cluster| {
            cluster.kill(cluster.primary()).await;
            cluster.promote_timed(cluster.most_advanced_standby().await).await
        })
        .await;
        assert_eq!(generation(&pool), 2);
        assert!(existing.size() <= 8, "{}", existing.size());
        pool.close();
        assert!(matches!(pool.get().await, Err(Error::Closed)));
        // What was wrapped belongs to its owner.
        existing.owned().await.batch_execute("SELECT 1").await.unwrap();
    }
    over_each_kind!(test);
}

/// S2: several in a row, also by `idempotent`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planned_switch_over_with_idempotent_work() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let pool: Pool = K::over(&cluster, 8).wrap().build().unwrap();
        for round in 2..4 {
            let load = Load::warm(&pool, 8, Write::Idempotent).await;
            fails_over(load, &cluster, async |cluster| {
                cluster.switch_over(cluster.most_advanced_standby().await).await;
            })
            .await;
            assert_eq!(generation(&pool), round);
        }
    }
    over_each_kind!(test);
}

/// R3: the wrapped pool alone would keep these sessions for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_demoted_server_is_left_and_its_idle_connections_are_closed() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let existing = K::over(&cluster, 8);
        let pool: Pool = existing.wrap().build().unwrap();
        let load = Load::warm(&pool, 8, Write::Transaction).await;
        fails_over(load, &cluster, async |cluster| {
            cluster.set_read_only(cluster.primary(), true).await;
            cluster.promote_timed(cluster.most_advanced_standby().await).await
        })
        .await;
        eventually("no connection leads to the old primary", LONG, async || {
            let mut clients = Vec::new();
            for _ in 0..8 {
                clients.push(existing.owned().await);
            }
            for client in &clients {
                let row = client.query_one("SELECT current_setting('transaction_read_only')", &[]).await.unwrap();
                if row.get::<_, &str>(0) == "on" {
                    return false;
                }
            }
            true
        })
        .await;
    }
    over_each_kind!(test);
}

/// Nobody but the owner of a detached session can end it, and its server goes on taking writes: the owner is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_detached_sessions_primary_is_told() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let (manager, existing) = K::followed(&cluster, 4);
        let pool: Pool<_> = existing.wrap().patrol_interval(SHORT).build().unwrap();
        let session = pool.get().await.unwrap().detach();
        assert!(timeout(SHORT, session.ended()).await.is_err(), "its primary is well");
        cluster.promote_timed(cluster.most_advanced_standby().await).await;
        manager.lead_to(cluster.socket_addr(cluster.primary()));
        timeout(LONG, session.ended()).await.expect("its primary was replaced");
        session.batch_execute("SELECT 1").await.expect("it is open");

        let session = pool.get().await.unwrap().detach();
        pool.close();
        timeout(LONG, session.ended()).await.expect("the pool was closed");
    }
    over_each_kind!(test);
}

/// A host that is frozen answers nothing and closes nothing: what runs on it ends when its successor is found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_on_a_frozen_server_runs_again_on_its_successor() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let (manager, existing) = K::followed(&cluster, 4);
        let pool: Pool<_> = existing.wrap().heartbeat_interval(Duration::from_millis(200)).build().unwrap();
        write(&pool, 1).await.unwrap();
        let old = cluster.primary();
        cluster.freeze(old);
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { write(&pool, 2).await }
        });
        let promoted = cluster.promote_timed(cluster.most_advanced_standby().await).await;
        manager.lead_to(cluster.socket_addr(cluster.primary()));
        timeout(LONG, waiting).await.expect("the write hangs").unwrap().unwrap();
        println!("written {:?} after the promotion", promoted.accepted_at.elapsed());
        assert_eq!(ids(&cluster).await, [1, 2]);
        cluster.thaw(old);
    }
    over_each_kind!(test);
}

/// COMMIT on a server that was frozen is left without an answer. What only reads was not committed all the same; of the
/// rest nothing is claimed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_was_left_without_an_answer_is_unknown_unless_it_only_reads() {
    async fn test<K: Kind>() {
        let (error, says) = left_in_commit::<K>(true).await;
        assert_eq!(error, CommitOutcome::NotCommitted, "{says}");
        let (error, says) = left_in_commit::<K>(false).await;
        assert_eq!(error, CommitOutcome::Unknown, "{says}");
        assert!(says.contains("may or may not have been committed"), "{says}");
    }
    over_each_kind!(test);
}

async fn left_in_commit<K: Kind>(read_only: bool) -> (CommitOutcome, String) {
    let cluster = Arc::new(started().await);
    let (manager, existing) = K::followed(&cluster, 4);
    let pool: Pool<_> = existing.wrap().heartbeat_interval(Duration::from_millis(200)).build().unwrap();
    let (old, successor) = (cluster.primary(), cluster.most_advanced_standby().await);
    let frozen = Arc::new(Notify::new());
    let left = tokio::spawn({
        let (pool, cluster, frozen) = (pool.clone(), Arc::clone(&cluster), Arc::clone(&frozen));
        async move {
            let call = pool.build_transaction().guarantee(Guarantee::AtMostOnce).retry(RetryPolicy::none());
            call.read_only(read_only)
                .run(async |tx| {
                    tx.batch_execute("SELECT 1").await?;
                    cluster.freeze(old);
                    frozen.notify_one();
                    Ok(())
                })
                .await
        }
    });
    timeout(LONG, frozen.notified()).await.unwrap();
    cluster.promote_timed(successor).await;
    manager.lead_to(cluster.socket_addr(cluster.primary()));
    let error = timeout(LONG, left).await.expect("the call hangs").unwrap().unwrap_err();
    cluster.thaw(old);
    (error.commit_outcome(), error.to_string())
}

/// A settler's session is the manager's, too: nobody else ends what waits on a server that was left. Here COMMIT, and
/// then its settler, wait for a standby that was promoted without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_is_settled_by_the_successor_of_whom_was_asked_first() {
    async fn test<K: Kind>() {
        let cluster = Cluster::builder().nodes(2).start().await;
        create_table(&cluster).await;
        let (manager, existing) = K::followed(&cluster, 4);
        let pool: Pool<_> = existing
            .wrap()
            .heartbeat_interval(Duration::from_millis(200))
            .patrol_interval(Duration::from_millis(200))
            .retry(RetryPolicy::new().deadline(LONG * 2))
            .build()
            .unwrap();
        write(&pool, 1).await.unwrap();
        let (old, successor) = (cluster.direct(Node(0)).await, cluster.direct(Node(1)).await);
        cluster.wait_replayed(Node(1)).await;
        successor.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await.unwrap();
        successor.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        eventually("nothing is replicated", LONG, async || {
            old.query("SELECT FROM pg_stat_replication", &[]).await.unwrap().is_empty()
        })
        .await;
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { write(&pool, 2).await }
        });
        let waits = "wait_event = 'SyncRep' AND query LIKE";
        let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {waits} 'SET LOCAL%; COMMIT'");
        eventually("COMMIT is ended", LONG, async || !old.query(&end, &[]).await.unwrap().is_empty()).await;
        let asked = format!("SELECT FROM pg_stat_activity WHERE {waits} '%emit_message%'");
        eventually("its settler waits", LONG, async || !old.query(&asked, &[]).await.unwrap().is_empty()).await;
        cluster.promote_timed(Node(1)).await;
        manager.lead_to(cluster.socket_addr(cluster.primary()));
        timeout(LONG, waiting).await.expect("the settler waits for a server that was left").unwrap().unwrap();
        assert_eq!(ids(&cluster).await, [1, 2]);
    }
    over_each_kind!(test);
}

async fn write<C: SessionClient>(pool: &Pool<C>, id: i64) -> Result<(), Error> {
    pool.transaction(async |tx| Ok(tx.execute("INSERT INTO entries (id) VALUES ($1)", &[&id]).await.map(drop)?)).await
}

async fn ids(cluster: &Cluster) -> Vec<i64> {
    let client = cluster.direct(cluster.primary()).await;
    let rows = client.query("SELECT id FROM entries ORDER BY id", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// R4: the manager leads to an old primary that came back writable; the sessions to the real one are kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_leads_astray_takes_nobody_along() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let (manager, existing) = K::followed(&cluster, 4);
        let pool: Pool<_> = existing.wrap().patrol_interval(Duration::from_millis(100)).build().unwrap();
        write(&pool, 1).await.unwrap();
        let old = cluster.primary();
        cluster.kill(old).await;
        cluster.promote_timed(cluster.most_advanced_standby().await).await;
        manager.lead_to(cluster.socket_addr(cluster.primary()));
        write(&pool, 2).await.unwrap();

        cluster.start_node(old).await;
        manager.lead_to(cluster.socket_addr(old));
        let made = manager.made.load(Ordering::Relaxed);
        eventually("three patrols have seen the zombie", LONG, async || {
            write(&pool, 3).await.unwrap();
            manager.made.load(Ordering::Relaxed) >= made + 3
        })
        .await;
        assert_eq!(pool.status().view.generation.get(), 2);
        let zombie = cluster.direct(old).await;
        let rows = zombie.query("SELECT id FROM entries", &[]).await.unwrap();
        assert_eq!(rows.len(), 1, "the zombie has what it had before it died");
    }
    over_each_kind!(test);
}

/// Sessions that the pool itself opens go back through the manager's `detach`, or its records would grow for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_the_patrol_are_detached() {
    let cluster = started().await;
    let (manager, existing) = Deadpool::followed(&cluster, 4);
    let pool: Pool<_> = existing.wrap().patrol_interval(Duration::from_millis(50)).build().unwrap();
    write(&pool, 1).await.unwrap();
    eventually("ten sessions were opened", LONG, async || manager.made.load(Ordering::Relaxed) >= 10).await;
    drop(pool);
    eventually("every session was detached", LONG, async || {
        manager.made.load(Ordering::Relaxed) == manager.detached.load(Ordering::Relaxed) + 1
    })
    .await;
}

/// The wrapped pool's own hooks run, and a connection is asked who it leads to once only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_run_and_a_connection_is_identified_once() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let url = format!("{}?target_session_attrs=read-write", cluster.url_hosts());
        let hook = Some("SET application_name = 'hooked'");
        let pool: Pool = K::usual(&url, Setup { hook, ..Setup::of(1) }).wrap().build().unwrap();
        let last_query = async |pool: &Pool| {
            let client = pool.get().await.unwrap();
            let sql = "SELECT current_setting('application_name'), pg_backend_pid()";
            let row = client.query_one(sql, &[]).await.unwrap();
            (row.get::<_, String>(0), row.get::<_, i32>(1))
        };
        let (name, pid) = last_query(&pool).await;
        assert_eq!(name, "hooked");
        // A notification queue would be of use here; the server's own account of the session's last statement will do.
        let watcher = cluster.direct(cluster.primary()).await;
        let sql = "SELECT query FROM pg_stat_activity WHERE pid = $1";
        for _ in 0..3 {
            drop(pool.get().await.unwrap());
            let query: String = watcher.query_one(sql, &[&pid]).await.unwrap().get(0);
            assert!(query.contains("application_name"), "asked again: {query}");
        }
        assert_eq!(last_query(&pool).await.1, pid, "one connection serves all");
    }
    over_each_kind!(test);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_told_as_from_any_pool() {
    async fn test<K: Kind>() {
        let cluster = Cluster::builder().password("right").start().await;
        let wrapped = |url: String| K::usual(&url, Setup::of(4)).wrap();
        let began = Instant::now();
        let wrong = cluster.url_hosts().replacen('@', "x@", 1);
        let pool: Pool = wrapped(wrong).build().unwrap();
        let error = pool.get().await.unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error}");
        assert!(error.to_string().contains("password"), "{error}");
        assert!(began.elapsed() < PROMPT * 5, "it waited for {:?}", began.elapsed());

        let nobody = format!("postgres://app@{}:1/app", cluster.spare_addr(9));
        let pool: Pool = wrapped(nobody)
            .checkout_timeout(Duration::from_millis(300))
            .retry(RetryPolicy::new().deadline(Duration::from_millis(300)))
            .build()
            .unwrap();
        let error = write(&pool, 1).await.unwrap_err();
        let Error::Unavailable(unavailable) = &error else { panic!("{error}") };
        assert_eq!(unavailable.reason(), UnavailableReason::NoPrimary);
        assert!(error.to_string().contains("the wrapped pool's server"), "{error}");
    }
    over_each_kind!(test);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_wrapped_pool_sets_the_bounds_of_is_told() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let url = format!("{}?target_session_attrs=read-write", cluster.url_hosts());
        let wait = Some(Duration::from_millis(50));
        let pool: Pool = K::usual(&url, Setup { wait, ..Setup::of(1) }).wrap().build().unwrap();
        assert!(matches!(pool.listen(["orders"]).await, Err(Error::Wrapped)));
        let held = pool.get().await.unwrap();
        let Err(Error::Unavailable(unavailable)) = pool.get().await else { panic!("there was one connection") };
        assert_eq!(unavailable.reason(), UnavailableReason::PoolExhausted);
        assert!(
            unavailable.to_string().ends_with("wait longer (the wait time-out of the wrapped pool)"),
            "{unavailable}"
        );
        drop(held);
        pool.get().await.unwrap();
    }
    over_each_kind!(test);
}

/// The manager's connecting hangs on a frozen host, without a limit of its own; whoever waits for it is freed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_that_hangs_is_given_up_for_the_successor() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let (manager, existing) = K::followed(&cluster, 4);
        let pool: Pool<_> = existing
            .wrap()
            .heartbeat_interval(Duration::from_millis(200))
            .heartbeat_timeout(Duration::from_millis(500))
            .probe_timeout(Duration::from_millis(500))
            .retry(RetryPolicy::new().deadline(LONG * 2))
            .build()
            .unwrap();
        write(&pool, 1).await.unwrap();
        pool.evict_idle();
        let (old, begun) = (cluster.primary(), manager.begun.load(Ordering::Relaxed));
        cluster.freeze(old);
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { write(&pool, 2).await }
        });
        eventually("the manager connects", LONG, async || manager.begun.load(Ordering::Relaxed) > begun).await;
        cluster.promote_timed(cluster.most_advanced_standby().await).await;
        manager.lead_to(cluster.socket_addr(cluster.primary()));
        timeout(LONG, waiting).await.expect("the write hangs").unwrap().unwrap();
        assert_eq!(ids(&cluster).await, [1, 2]);
        cluster.thaw(old);
    }
    over_each_kind!(test);
}

/// A connection that does not answer is not given back, also where its caller had less time than the answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_asked_in_vain_does_not_go_back() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let (manager, existing) = K::followed(&cluster, 1);
        let pool: Pool<_> =
            existing.wrap().patrol_interval(LONG * 10).checkout_timeout(Duration::from_millis(300)).build().unwrap();
        eventually("there is a primary", LONG, async || pool.connect().await.is_ok()).await;
        let real = cluster.socket_addr(cluster.primary());
        let tap = Tap::start((cluster.spare_addr(9), 0).into(), real).await;
        manager.lead_to(tap.addr());
        drop(existing.owned().await);
        manager.lead_to(real);
        tap.stall(true);
        let error = pool.get().await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error}");
        eventually("the silent connection is closed", LONG, async || existing.size() == 0).await;
        pool.get_within(LONG).await.unwrap().batch_execute("SELECT 1").await.unwrap();
    }
    over_each_kind!(test);
}

/// What its owner gives back after a failover leads to the old server: such connections are of no interest to the new
/// one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_come_back_late_cast_no_doubt() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let (manager, existing) = K::followed(&cluster, 8);
        let builder = existing.wrap().patrol_interval(LONG * 10);
        let pool: Pool<_> = builder.heartbeat_timeout(LONG).build().unwrap();
        write(&pool, 1).await.unwrap();
        let mut owned = Vec::new();
        for _ in 0..7 {
            owned.push(existing.owned().await);
        }
        cluster.set_read_only(cluster.primary(), true).await;
        cluster.promote_timed(cluster.most_advanced_standby().await).await;
        manager.lead_to(cluster.socket_addr(cluster.primary()));
        write(&pool, 2).await.unwrap();
        let watcher = cluster.direct(cluster.primary()).await;
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND pid <> pg_backend_pid() \
                       AND backend_type = 'client backend'";
        eventually("the pool's session and the heart-beat's are open", LONG, async || {
            watcher.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) == 2
        })
        .await;
        let held = pool.get().await.unwrap();
        drop(owned);
        let (began, before) = (stalls::now(), manager.begun.load(Ordering::Relaxed));
        write(&pool, 3).await.unwrap();
        println!("seven stale connections cost {:?}", began.elapsed());
        drop(held);
        // Whoever is not served within a second, as the machine stands still, tries another one.
        let asked = manager.begun.load(Ordering::Relaxed) - before;
        assert!(asked == 1 || stalls::any_since(began), "the primary was doubted, and asked on {asked} new sessions");
        assert_eq!(ids(&cluster).await, [1, 2, 3]);
    }
    over_each_kind!(test);
}

/// A panic in the manager costs the session that was asked for, and not the pool.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_panics_ends_nothing() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let (manager, existing) = K::followed(&cluster, 4);
        let pool: Pool<_> = existing.wrap().patrol_interval(Duration::from_millis(50)).build().unwrap();
        write(&pool, 1).await.unwrap();
        manager.panics.store(true, Ordering::Relaxed);
        let begun = manager.begun.load(Ordering::Relaxed);
        eventually("two patrols", LONG, async || {
            drop(pool.get().await.unwrap());
            manager.begun.load(Ordering::Relaxed) >= begun + 2
        })
        .await;
        manager.panics.store(false, Ordering::Relaxed);
        assert_eq!(pool.status().view.generation.get(), 1);
    }
    over_each_kind!(test);
}

/// What its owner left open on a connection is not committed along with a transaction that comes after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_left_open_by_the_owner_is_not_joined() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let existing = K::over(&cluster, 1);
        let pool: Pool = existing.wrap().build().unwrap();
        write(&pool, 1).await.unwrap();
        existing.owned().await.batch_execute("BEGIN; INSERT INTO entries (id) VALUES (-1)").await.unwrap();
        write(&pool, 2).await.unwrap();
        assert_eq!(ids(&cluster).await, [1, 2]);
    }
    over_each_kind!(test);
}

/// Nor by the signature of a timeline, which the first transaction on it writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_left_open_by_the_owner_is_not_committed_by_a_signature() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        cluster.kill(cluster.primary()).await;
        cluster.promote(cluster.most_advanced_standby().await).await;
        for seed in 0..8 {
            let existing = K::over(&cluster, 1);
            existing.owned().await.batch_execute("BEGIN; INSERT INTO entries (id) VALUES (-1)").await.unwrap();
            let pool: Pool = existing.wrap().seed(seed).build().unwrap();
            write(&pool, 1).await.unwrap();
        }
        assert_eq!(ids(&cluster).await, [1; 8]);
    }
    over_each_kind!(test);
}

/// A session whose prepared statements are gone marks its transactions all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_who_discards_all_costs_no_transaction() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let existing = K::over(&cluster, 1);
        let pool: Pool = existing.wrap().build().unwrap();
        for id in 1..=4 {
            write(&pool, id).await.unwrap();
            existing.owned().await.batch_execute("DISCARD ALL").await.unwrap();
        }
        assert_eq!(ids(&cluster).await, [1, 2, 3, 4]);
        assert_eq!(pool.status().fallback, None);
    }
    over_each_kind!(test);
}

/// A manager need not look at what it recycles.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_has_ended_is_not_handed_out() {
    async fn test<K: Kind>() {
        let cluster = started().await;
        let (manager, existing) = K::followed(&cluster, 1);
        manager.lets_all_pass.store(true, Ordering::Relaxed);
        let pool: Pool<_> = existing.wrap().build().unwrap();
        write(&pool, 1).await.unwrap();
        let owned = existing.owned().await;
        owned.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await.unwrap_err();
        eventually("the driver has noticed", LONG, async || owned.is_closed()).await;
        drop(owned);
        pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
    }
    over_each_kind!(test);
}
