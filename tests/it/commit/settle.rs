//! Commits whose answer is lost, against real servers: what the pool finds out, how often the work ran, and what is
//! stored.
//!
//! The table has no key, so a work that was applied twice shows.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testbed::{Cluster, ClusterBuilder, Cut, Node, Tap, eventually};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, IsolationLevel};
use tokio_postgres_failover::error::{RolledBack, Unsettled};
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, RetryPolicy, TransactionBuilder};
use tracing_subscriber::EnvFilter;

use crate::sessions::versions::signature;
use crate::support::bench::{Bench, cut_replication, list, settlers, single, standbys};
use crate::support::load::{LONG, by_name, generation};
use crate::support::{PATIENCE, close_gate, committing, insert, open_gate, sql, stored, wait_gone};

/// What the pool gives a settler at least, and time for what comes around it.
const GRANTED: Duration = Duration::from_secs(5);
/// A call's deadline that is over before that, and that leaves a slow machine time to begin.
const SHORT: Duration = Duration::from_secs(4);
/// As a transaction ends, for LIKE.
const COMMIT: &str = "SET LOCAL%; COMMIT";
/// As a settler asks the ledger.
const ASK: &str = "ON CONFLICT (id) DO UPDATE SET fence = entry.fence RETURNING fence";

impl Bench {
    /// The server carries out COMMIT, and its client is gone.
    fn hold_commit(&self) {
        // Not sooner: a session that has not yet read its COMMIT is taken for an abandoned one, and ended.
        self.cut_with(Cut::CommitHeld, async |cluster| {
            until_sessions(&cluster, 1, &format!("state = 'active' AND query LIKE '{COMMIT}'")).await;
        });
    }
}

/// Once with each settler, on a cluster of its own.
async fn with_each_settler(cluster: impl Fn() -> ClusterBuilder, case: impl AsyncFn(Bench)) {
    for guarantee in settlers() {
        println!("{guarantee:?}");
        case(Bench::new(cluster(), guarantee).await).await;
    }
}

/// [`eventually`] so many sessions are like this, for a hook of the cutter: the server waits by itself.
async fn until_sessions(cluster: &Cluster, sessions: usize, are: &str) {
    let sql = format!(
        "SET statement_timeout = '{}s';
         DO $$ BEGIN
             WHILE (SELECT count(*) FROM pg_stat_activity WHERE {are}) < {sessions} LOOP
                 PERFORM pg_stat_clear_snapshot(), pg_sleep(0.003);
             END LOOP;
         END $$",
        PATIENCE.as_secs()
    );
    cluster.direct(cluster.primary()).await.batch_execute(&sql).await.unwrap();
}

/// Waits until a settler was told "in progress": it then looks whether the session was abandoned.
async fn told_in_progress(admin: &Client) {
    let sql = "SELECT FROM pg_stat_activity WHERE query LIKE '%idle in transaction%' AND pid <> pg_backend_pid()";
    eventually("a settler has asked", PATIENCE, async || !admin.query(sql, &[]).await.unwrap().is_empty()).await;
}

/// A session that waits for a synchronous standby, by its statement.
async fn waits_for_standby(admin: &Client, statement: &str) {
    let sql = "SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE $1";
    eventually("a session waits for a standby", PATIENCE, async || {
        !admin.query(sql, &[&statement]).await.unwrap().is_empty()
    })
    .await;
}

/// K2: the server goes on with a COMMIT whose client is gone; the settler waits for the end of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_a_commit_under_way_is_waited_for() {
    with_each_settler(single, async |bench| {
        let gate = close_gate(&bench.cluster).await;
        bench.hold_commit();
        let fault = async {
            let pid = committing(&gate).await;
            told_in_progress(&gate).await;
            assert_eq!(committing(&gate).await, pid, "a session that commits is left alone");
            open_gate(&gate).await;
        };
        bench.settles_during(fault).await;
        bench.assert_once(1).await;
    })
    .await;
}

/// C1, K2: somebody gives a connection back in the midst of a transaction. A settler's COMMIT must not be the end of
/// it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_a_settler_commits_nobody_elses_work() {
    with_each_settler(single, async |bench| {
        sql(&bench.cluster, "CREATE TABLE drafts (); GRANT ALL ON drafts TO app").await;
        let gate = close_gate(&bench.cluster).await;
        let left_open = bench.pool.get().await.unwrap();
        left_open.batch_execute("BEGIN; INSERT INTO drafts DEFAULT VALUES").await.unwrap();
        bench.hold_commit();
        let fault = async {
            committing(&gate).await;
            told_in_progress(&gate).await;
            // Now the pool's next connection is this one.
            drop(left_open);
            open_gate(&gate).await;
        };
        bench.settles_during(fault).await;
        bench.assert_once(1).await;
        assert!(gate.query("SELECT FROM drafts", &[]).await.unwrap().is_empty());
    })
    .await;
}

/// K2: a COMMIT under way, where every transaction is serializable by default, the ledger's question included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_the_ledger_can_be_asked_in_strict_isolation() {
    let strict = single().setting("default_transaction_isolation", "serializable");
    let bench = Bench::new(strict, Guarantee::Ledger(Ledger::default())).await;
    let gate = close_gate(&bench.cluster).await;
    bench.hold_commit();
    let fault = async {
        committing(&gate).await;
        told_in_progress(&gate).await;
        open_gate(&gate).await;
    };
    bench.settles_during(fault).await;
    bench.assert_once(1).await;
}

/// K2: the server ends the session within COMMIT: rolled back, so the work runs again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_work_whose_session_was_ended_in_commit_runs_again() {
    with_each_settler(single, async |bench| {
        let gate = close_gate(&bench.cluster).await;
        let fault = async {
            let pid = committing(&gate).await;
            gate.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
            wait_gone(&gate, pid).await;
            open_gate(&gate).await;
        };
        bench.settles_during(fault).await;
        bench.assert_once(2).await;
    })
    .await;
}

/// K2: COMMIT did not get through. The server may not know that its client is gone, and keeps the locks: it is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_work_whose_commit_was_not_delivered_runs_again() {
    for server_stays in [false, true] {
        with_each_settler(single, async |bench| {
            sql(&bench.cluster, "INSERT INTO keyed (id) VALUES (1)").await;
            bench.cut(Cut::CommitUndelivered { server_stays });
            let work = bench.call().run(async |tx| {
                bench.runs.begin();
                tx.execute("UPDATE keyed SET at = now() WHERE id = 1", &[]).await?;
                insert(&tx, 1).await
            });
            timeout(LONG, work).await.expect("a lock is held").unwrap();
            bench.assert_once(2).await;
            sql(&bench.cluster, "SELECT FROM keyed FOR UPDATE NOWAIT").await;
            eventually("the server has ended the session", PATIENCE, async || bench.cutter.held() == 0).await;
        })
        .await;
    }
}

/// K2: COMMIT did not get through, and every connection of the pool waits for the locks of its transaction: whoever
/// settles needs none of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_callers_that_all_wait_for_the_lock_of_an_undelivered_commit_all_finish() {
    const CONNECTIONS: usize = 4;
    const WRITERS: i64 = 12;
    with_each_settler(single, async |bench| {
        let pool = by_name(&bench.cluster).max_size(CONNECTIONS).build().unwrap();
        sql(&bench.cluster, "INSERT INTO keyed (id) VALUES (1)").await;
        bench.cut_with(Cut::CommitUndelivered { server_stays: true }, async |cluster| {
            until_sessions(&cluster, CONNECTIONS - 1, "wait_event_type = 'Lock'").await;
        });
        let mut writers = JoinSet::new();
        for id in 0..WRITERS {
            let (pool, guarantee) = (pool.clone(), bench.guarantee.clone());
            writers.spawn(async move {
                let work = pool.build_transaction().guarantee(guarantee).run(async |tx| {
                    tx.execute("UPDATE keyed SET at = now() WHERE id = 1", &[]).await?;
                    insert(&tx, id).await
                });
                timeout(LONG, work).await.expect("a caller waits for ever")
            });
        }
        while let Some(written) = writers.join_next().await {
            written.unwrap().unwrap();
        }
        bench.assert_all_cut().await;
        assert_eq!(stored(&bench.cluster).await, (0..WRITERS).collect::<Vec<_>>());
        eventually("the server has ended the session", PATIENCE, async || bench.cutter.held() == 0).await;
    })
    .await;
}

/// K2: COMMIT is lost in a partition that outlasts `dead_after`. Afterwards the same server, in the same life, is the
/// next generation: the session that it still holds for the lost one is ended, and the work runs again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_work_whose_commit_a_partition_swallowed_runs_again_on_the_same_server() {
    with_each_settler(single, async |bench| {
        let way = SocketAddr::new(bench.cluster.spare_addr(1), bench.cluster.port());
        let way = Arc::new(Tap::start(way, bench.cutter.addr()).await);
        bench.cluster.dns().set(&[way.addr().ip()]);
        let pool = by_name(&bench.cluster).dead_after(Duration::from_millis(1500)).build().unwrap();
        pool.connect().await.unwrap();
        let bench = Bench { pool, ..bench };
        let partition = Arc::clone(&way);
        bench.cut_with(Cut::CommitUndelivered { server_stays: true }, async move |_| partition.stall(true));
        let witness = bench.pool.get().await.unwrap();
        let healing = async {
            // A silent primary is suspended first, and given up after `dead_after`: that ends its connections.
            eventually("the lost generation has ended", LONG, async || witness.is_closed()).await;
            assert_eq!(bench.cutter.held(), 1, "the server does not know");
            way.stall(false);
        };
        bench.settles_during(healing).await;
        bench.assert_once(2).await;
        assert!(generation(&bench.pool) >= 2, "the partition was shorter than `dead_after`");
        eventually("the server has ended the session", PATIENCE, async || bench.cutter.held() == 0).await;
    })
    .await;
}

/// K1, K2: wherever the connection is cut, and after each byte of COMMIT's answer, the work is stored once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_wherever_it_is_cut_the_work_is_stored_once() {
    let elsewhere = [Cut::BeginUndelivered, Cut::BeforeBeginAnswer, Cut::AfterStatement(0), Cut::CommitDelivered];
    let cuts: Vec<Cut> = elsewhere.into_iter().chain((0..80).map(Cut::CommitAnswerHalf)).collect();
    with_each_settler(single, async |bench| {
        for (id, cut) in (0..).zip(&cuts) {
            bench.cut(*cut);
            timeout(LONG, bench.call().run(async |tx| insert(&tx, id).await)).await.unwrap().unwrap();
        }
        bench.assert_all_cut().await;
        let all: Vec<i64> = (0..).take(cuts.len()).collect();
        assert_eq!(stored(&bench.cluster).await, all);
    })
    .await;
}

/// K3: the server, or one of its processes, is killed when COMMIT is done, or before it has arrived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k3_a_crash_is_seen_through() {
    for (cut, runs) in [(Cut::CommitAnswerDropped, 1), (Cut::CommitUndelivered { server_stays: false }, 2)] {
        with_each_settler(single, async |bench| {
            bench.cut_with(cut, async |cluster| {
                cluster.kill(Node(0)).await;
                cluster.start_node(Node(0)).await;
            });
            bench.write().await.unwrap();
            bench.assert_once(runs).await;
            assert_eq!(generation(&bench.pool), 2);
        })
        .await;
        with_each_settler(single, async |bench| {
            bench.cut_with(cut, async |cluster| cluster.crash_backend(Node(0), PATIENCE).await);
            bench.write().await.unwrap();
            bench.assert_once(runs).await;
        })
        .await;
    }
}

/// A function that fails, whatever is wrong with it, leaves what is settled without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k3_a_history_function_that_fails_does_no_harm() {
    let function = |body: &str| {
        format!(
            "CREATE SCHEMA IF NOT EXISTS failover; GRANT USAGE ON SCHEMA failover TO app; \
             CREATE FUNCTION failover.wal_history(mark pg_lsn, nonce text, OUT seen text, OUT history text) \
             LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN {body}; END $$"
        )
    };
    for broken in [
        function("RAISE EXCEPTION 'no'"),
        function("seen := 'perhaps'; history := ''"),
        function("seen := 'marker'; history := 'x'"),
        function("PERFORM pg_read_file('/nowhere')"),
    ] {
        let bench = Bench::new(single(), Guarantee::ExactlyOnce).await;
        sql(&bench.cluster, &broken).await;
        bench.cut_with(Cut::CommitAnswerDropped, async |cluster| {
            cluster.kill(Node(0)).await;
            cluster.start_node(Node(0)).await;
        });
        bench.write().await.unwrap_or_else(|error| panic!("{broken}: {error}"));
        bench.assert_once(1).await;
    }
}

/// K3: a clean restart loses nothing. PostgreSQL 14 and older do not show that there was no crash before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k3_a_clean_restart_is_seen_through() {
    for (cut, runs) in [(Cut::CommitAnswerDropped, 1), (Cut::CommitUndelivered { server_stays: false }, 2)] {
        with_each_settler(single, async |bench| {
            let version = bench.cluster.version().await;
            bench.cut_with(cut, async |cluster| {
                cluster.stop_fast(Node(0)).await;
                cluster.start_node(Node(0)).await;
            });
            if version < 15 && bench.guarantee == Guarantee::ExactlyOnce {
                return bench.assert_unknown(bench.call(), Unsettled::Restarted).await;
            }
            bench.write().await.unwrap();
            bench.assert_once(runs).await;
        })
        .await;
    }
}

/// K4: the primary dies before its answer comes; a standby that has the commit is promoted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k4_a_commit_that_a_promoted_standby_has_is_found() {
    with_each_settler(Cluster::builder, async |bench| {
        bench.cut_with(Cut::CommitAnswerDropped, async |cluster| {
            cluster.kill(Node(0)).await;
            cluster.promote(cluster.most_advanced_standby().await).await;
        });
        bench.write().await.unwrap();
        bench.assert_once(1).await;
    })
    .await;
}

/// K5: the trap. The commit was lost with its primary, and its transaction id was given to another one, which
/// committed: the new primary says "committed" of it, and means somebody else's work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k5_a_lost_commit_is_not_taken_for_the_one_that_got_its_id() {
    with_each_settler(
        || Cluster::builder().nodes(2).asynchronous(),
        async |bench| {
            let bench = bench.unaware_of_standbys().await;
            cut_replication(&bench.cluster, &[Node(1)]).await;
            // The promotion takes a few ids, too.
            let old = bench.cluster.direct(Node(0)).await;
            for _ in 0..30 {
                old.query_one("SELECT pg_current_xact_id()::text", &[]).await.unwrap();
            }
            let lost = Arc::new(AtomicI64::new(0));
            let of_closure = Arc::clone(&lost);
            bench.cut_with(Cut::CommitAnswerDropped, async move |cluster| {
                cluster.kill(Node(0)).await;
                cluster.promote(Node(1)).await;
                let writer = cluster.direct(Node(1)).await;
                let lost = lost.load(Ordering::SeqCst);
                let mut used = 0;
                while used < lost {
                    let sql = "INSERT INTO keyed (id) SELECT count(*) FROM keyed RETURNING \
                               pg_current_xact_id()::text::bigint";
                    used = writer.query_one(sql, &[]).await.unwrap().get(0);
                }
                assert_eq!(used, lost, "the id was not free any more");
                let sql = "SELECT pg_xact_status($1::bigint::text::xid8)";
                let says: Option<String> = writer.query_one(sql, &[&lost]).await.unwrap().get(0);
                assert_eq!(says.as_deref(), Some("committed"), "the trap is not set");
                assert!(stored(&cluster).await.is_empty(), "the commit was not lost");
                list(&cluster, &[Node(0), Node(1)]);
            });
            let work = bench.call().run(async |tx| {
                let xid = tx.query_one("SELECT pg_current_xact_id()::text::bigint", &[]).await?.get(0);
                if bench.runs.begin() == 1 {
                    of_closure.store(xid, Ordering::SeqCst);
                }
                insert(&tx, 1).await
            });
            timeout(LONG, work).await.expect("the call hangs").unwrap();
            bench.assert_once(2).await;
        },
    )
    .await;
}

/// K6: cut off while COMMIT waits for a synchronous standby. The settler waits with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k6_a_commit_that_waits_for_a_standby_is_waited_for() {
    with_each_settler(
        || Cluster::builder().nodes(2),
        async |bench| {
            let admin = bench.cluster.direct(Node(0)).await;
            bench.cluster.freeze(Node(1));
            bench.hold_commit();
            let fault = async {
                waits_for_standby(&admin, COMMIT).await;
                told_in_progress(&admin).await;
                waits_for_standby(&admin, COMMIT).await;
                bench.cluster.thaw(Node(1));
            };
            bench.settles_during(fault).await;
            bench.assert_once(1).await;
        },
    )
    .await;
}

/// K6: the primary dies with the commit that no standby got: it is lost, and runs again on the survivor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k6_a_commit_that_no_standby_got_runs_again_on_the_survivor() {
    with_each_settler(
        || Cluster::builder().nodes(2),
        async |bench| {
            let admin = bench.cluster.direct(Node(0)).await;
            cut_replication(&bench.cluster, &[Node(1)]).await;
            bench.hold_commit();
            let fault = async {
                waits_for_standby(&admin, COMMIT).await;
                told_in_progress(&admin).await;
                bench.cluster.kill(Node(0)).await;
                bench.cluster.promote(Node(1)).await;
            };
            bench.settles_during(fault).await;
            bench.assert_once(2).await;
        },
    )
    .await;
}

/// K6: the ledger's "not committed" is a row, too, and must hold for a successor: nothing runs again before a standby
/// has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k6_the_ledgers_fence_waits_for_a_standby() {
    let bench = Bench::new(Cluster::builder().nodes(2), Guarantee::Ledger(Ledger::default())).await;
    let admin = bench.cluster.direct(Node(0)).await;
    bench.cluster.freeze(Node(1));
    bench.cut(Cut::CommitUndelivered { server_stays: false });
    let fault = async {
        waits_for_standby(&admin, "SET LOCAL%warning; COMMIT").await;
        assert_eq!(bench.runs.count(), 1);
        bench.cluster.thaw(Node(1));
    };
    bench.settles_during(fault).await;
    bench.assert_once(2).await;
}

/// `InProgress`: the deadline comes while COMMIT waits for its standby. It lands later, and the error had said that it
/// may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_while_it_is_in_progress() {
    with_each_settler(
        || Cluster::builder().nodes(2),
        async |bench| {
            bench.cluster.freeze(Node(1));
            bench.hold_commit();
            let began = Instant::now();
            bench.assert_unknown(bench.call().deadline(SHORT), Unsettled::InProgress).await;
            assert!(began.elapsed() >= GRANTED, "a settler has five seconds: {:?}", began.elapsed());
            bench.cluster.thaw(Node(1));
            eventually("it lands", PATIENCE, async || stored(&bench.cluster).await == [1]).await;
        },
    )
    .await;
}

/// `NoPrimary`: nothing comes back until the deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_without_a_primary() {
    with_each_settler(single, async |bench| {
        bench.cut_with(Cut::CommitAnswerDropped, async |cluster| cluster.kill(Node(0)).await);
        let began = Instant::now();
        bench.assert_unknown(bench.call().deadline(SHORT), Unsettled::NoPrimary).await;
        assert!(began.elapsed() >= GRANTED, "a settler has five seconds: {:?}", began.elapsed());
    })
    .await;
}

/// `NotOffered`: what the settler needs is taken away while the transaction runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_where_the_server_refuses_to_tell() {
    with_each_settler(single, async |bench| {
        bench.cut_with(Cut::CommitAnswerDropped, async |cluster| {
            sql(
                &cluster,
                "REVOKE EXECUTE ON FUNCTION pg_xact_status(xid8) FROM PUBLIC; REVOKE UPDATE ON failover.ledger FROM \
                 app",
            )
            .await;
        });
        bench.assert_unknown(bench.call(), Unsettled::NotOffered).await;
        assert_eq!(stored(&bench.cluster).await, [1]);
    })
    .await;
}

/// `NoMark`: a call that is told not to settle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_without_a_mark() {
    let bench = Bench::new(single(), Guarantee::AtMostOnce).await;
    bench.cut(Cut::CommitAnswerDropped);
    bench.assert_unknown(bench.call(), Unsettled::NoMark).await;
    assert_eq!(stored(&bench.cluster).await, [1]);
}

/// What the write-ahead log cannot tell, and the ledger can: stored once, and `runs` runs.
async fn unknown_but_for_the_ledger<F, Fut>(
    cluster: impl Fn() -> ClusterBuilder,
    reason: Unsettled,
    runs: u32,
    prepare: impl AsyncFn(&Bench),
    fault: F,
) where
    F: Fn(Arc<Cluster>) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    with_each_settler(cluster, async |bench| {
        let bench = bench.unaware_of_standbys().await;
        prepare(&bench).await;
        bench.cut_with(Cut::CommitAnswerDropped, fault);
        if bench.guarantee == Guarantee::ExactlyOnce {
            bench.assert_unknown(bench.call(), reason).await;
        } else {
            bench.write().await.unwrap();
            bench.assert_once(runs).await;
        }
    })
    .await;
}

/// `Restarted`: the successor that has the commit is restarted before it is found, which hides where its history began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_when_the_successor_was_restarted_but_for_the_ledger() {
    let replicated = async |cluster: Arc<Cluster>| {
        cluster.wait_replayed(Node(1)).await;
        cluster.kill(Node(0)).await;
        cluster.promote(Node(1)).await;
        cluster.stop_fast(Node(1)).await;
        cluster.start_node(Node(1)).await;
        list(&cluster, &[Node(0), Node(1)]);
    };
    let cluster = || Cluster::builder().nodes(2).asynchronous();
    unknown_but_for_the_ledger(cluster, Unsettled::Restarted, 1, async |_| {}, replicated).await;
}

/// `SeveralFailovers`: the successor that has the commit dies, too, and its own successor is found. The second time the
/// commit had got to nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_after_two_failovers_but_for_the_ledger() {
    async fn two_failovers(cluster: Arc<Cluster>) {
        cluster.kill(Node(0)).await;
        cluster.promote(Node(1)).await;
        // A standby that has not turned round does not know the second timeline, and would give its own the same
        // number.
        cluster.wait_replayed(Node(2)).await;
        cluster.kill(Node(1)).await;
        cluster.promote(Node(2)).await;
        list(&cluster, &[Node(0), Node(2)]);
    }
    let cluster = || Cluster::builder().asynchronous();
    unknown_but_for_the_ledger(
        cluster,
        Unsettled::SeveralFailovers,
        1,
        async |_| {},
        async |cluster: Arc<Cluster>| {
            for standby in standbys(&cluster) {
                cluster.wait_replayed(standby).await;
            }
            two_failovers(cluster).await;
        },
    )
    .await;
    let lost = async |bench: &Bench| cut_replication(&bench.cluster, &standbys(&bench.cluster)).await;
    unknown_but_for_the_ledger(cluster, Unsettled::SeveralFailovers, 2, lost, two_failovers).await;
}

/// `OtherHistory`: two standbys of one primary are promoted apart, to timelines of the same number. The transaction is
/// committed on one of them; then the other takes over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_on_another_timeline_of_the_same_number_but_for_the_ledger() {
    let apart = async |bench: &Bench| {
        let cluster = &bench.cluster;
        cluster.freeze(Node(2));
        cluster.kill(Node(0)).await;
        cluster.promote(Node(1)).await;
        bench.cutter.set_upstream(cluster.socket_addr(Node(1)));
        cluster.thaw(Node(2));
    };
    let cluster = || Cluster::builder().asynchronous();
    unknown_but_for_the_ledger(cluster, Unsettled::OtherHistory, 2, apart, async |cluster: Arc<Cluster>| {
        cluster.kill(Node(1)).await;
        cluster.promote(Node(2)).await;
        list(&cluster, &[Node(0), Node(2)]);
    })
    .await;
}

/// What is logged on this thread, from the level WARN on.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn times(&self, text: &str) -> usize {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().matches(text).count()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Without the right to leave a mark, a transaction works, and is not settled; the pool tells why, and logs it once.
/// With the next primary it looks again.
#[tokio::test]
async fn without_the_right_to_mark_it_is_at_most_once() {
    for function in ["pg_logical_emit_message(boolean, text, text)", "pg_current_xact_id()"] {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new("tokio_postgres_failover=warn"))
            .with_writer(move || writer.clone())
            .finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let bench = Bench::new(single(), Guarantee::ExactlyOnce).await;
        let function = signature(&bench.cluster.direct(Node(0)).await, function).await;
        sql(&bench.cluster, &format!("REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")).await;
        assert_eq!(bench.pool.status().fallback, None, "it is not known before the first transaction");
        for _ in 0..3 {
            bench.pool.transaction(async |tx| insert(&tx, 2).await).await.unwrap();
        }
        let why = bench.pool.status().fallback.expect("a reason");
        assert!(why.contains("42501") && why.contains(function.split('(').next().unwrap()), "{why}");
        assert_eq!(log.times("cannot be settled here"), 1);

        bench.cut(Cut::CommitAnswerDropped);
        bench.assert_unknown(bench.call(), Unsettled::NoMark).await;
        assert_eq!(stored(&bench.cluster).await, [1, 2, 2, 2]);

        // The ledger needs the id of its transaction, and else nothing that was taken away.
        if function.starts_with("pg_logical") {
            bench.cut(Cut::CommitAnswerDropped);
            let call = bench.pool.build_transaction().guarantee(Guarantee::Ledger(Ledger::default()));
            timeout(LONG, call.run(async |tx| insert(&tx, 3).await)).await.unwrap().unwrap();
            assert_eq!(stored(&bench.cluster).await, [1, 2, 2, 2, 3]);
        }

        sql(&bench.cluster, &format!("GRANT EXECUTE ON FUNCTION {function} TO PUBLIC")).await;
        bench.cluster.kill(Node(0)).await;
        bench.cluster.start_node(Node(0)).await;
        bench.cut(Cut::CommitAnswerDropped);
        bench.pool.transaction(async |tx| insert(&tx, 4).await).await.unwrap();
        assert_eq!((bench.pool.status().fallback, generation(&bench.pool)), (None, 2));
        assert_eq!(log.times("cannot be settled here"), 1);
    }
}

/// A role that may not read which server it is on cannot tell a successor: the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_right_to_read_the_identity_it_is_at_most_once() {
    let bench = Bench::new(single(), Guarantee::ExactlyOnce).await;
    sql(&bench.cluster, "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC").await;
    // A pool that knew the identity would not believe a server that does not tell it.
    let blind = Bench { pool: by_name(&bench.cluster).build().unwrap(), ..bench };
    blind.cut(Cut::CommitAnswerDropped);
    blind.assert_unknown(blind.call(), Unsettled::NoMark).await;
    let why = blind.pool.status().fallback.expect("a reason");
    assert!(why.contains("identity"), "{why}");
    assert_eq!(stored(&blind.cluster).await, [1]);

    sql(&blind.cluster, "GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC").await;
    let seeing = Bench { pool: by_name(&blind.cluster).build().unwrap(), ..blind };
    seeing.cut(Cut::CommitAnswerDropped);
    seeing.pool.transaction(async |tx| insert(&tx, 2).await).await.unwrap();
    assert_eq!(seeing.pool.status().fallback, None);
    assert_eq!(stored(&seeing.cluster).await, [1, 2]);
}

/// What the role may not read any more is known of a server in the life that it was verified in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_away_since_the_server_was_verified_settles_all_the_same() {
    let bench = Bench::new(single(), Guarantee::ExactlyOnce).await;
    bench.pool.transaction(async |tx| insert(&tx, 0).await).await.unwrap();
    let functions = [
        "pg_control_system()",
        "pg_walfile_name(pg_lsn)",
        "pg_last_wal_receive_lsn()",
        "pg_last_xact_replay_timestamp()",
        "pg_control_checkpoint()",
        "has_function_privilege(oid, text)",
        "current_setting(text, boolean)",
        "set_config(text, text, boolean)",
    ];
    let mut number = 0;
    for function in functions {
        sql(&bench.cluster, &format!("REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")).await;
        for by in settlers() {
            bench.cut(Cut::CommitAnswerDropped);
            number += 1;
            let call = bench.pool.build_transaction().guarantee(by);
            call.run(async |tx| insert(&tx, number).await).await.unwrap();
            assert_eq!(stored(&bench.cluster).await, (0..=number).collect::<Vec<_>>(), "{function}");
        }
    }
    assert_eq!((bench.pool.status().fallback, generation(&bench.pool)), (None, 1));
}

/// Without its table, the ledger is an error that says what to do, and nothing is run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_ledgers_table_nothing_runs() {
    let bench = Bench::new(single(), Guarantee::Ledger(Ledger::named("failover", "nowhere"))).await;
    let error = bench.write().await.unwrap_err();
    assert!(matches!(error, Error::Ledger(_)), "{error:?}");
    assert_eq!((error.code(), error.commit_outcome()), (Some(&SqlState::UNDEFINED_TABLE), CommitOutcome::NotCommitted));
    let text = error.to_string();
    assert!(text.contains("Ledger::install") && text.contains("sql/ledger.sql"), "{text}");
    assert_eq!((bench.runs.count(), stored(&bench.cluster).await), (0, vec![]));
    // The connection is as good as before.
    bench.pool.transaction(async |tx| insert(&tx, 1).await).await.unwrap();
    assert_eq!((bench.pool.status().size, generation(&bench.pool)), (1, 1));
}

/// The ledger's names are taken as they are, and its table may be created by several at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_of_any_name_is_installed_by_eight_at_once() {
    let names = [("failover", "ledger"), ("Upper Case", "a\"quoted\" 'one'"), ("public", "SELECT")];
    for (schema, table) in names {
        let ledger = Ledger::named(schema, table);
        let bench = Bench::new(single(), Guarantee::Ledger(ledger.clone())).await;
        sql(&bench.cluster, "DROP SCHEMA failover CASCADE").await;
        let mut installing = JoinSet::new();
        for _ in 0..8 {
            let (pool, ledger) = (bench.pool.clone(), ledger.clone());
            installing.spawn(async move { ledger.install(&pool.get().await.unwrap()).await });
        }
        while let Some(installed) = installing.join_next().await {
            installed.unwrap().unwrap();
        }
        bench.cut(Cut::CommitAnswerDropped);
        bench.write().await.unwrap();
        bench.assert_once(1).await;
        assert_eq!(ledger.prune(&bench.pool.get().await.unwrap()).await.unwrap(), 0);
    }
}

/// Whoever asks the ledger about a transaction, and whenever: all are told the same, and it is true.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_settlers_of_one_transaction_agree() {
    let bench = Bench::new(single(), Guarantee::Ledger(Ledger::default())).await;
    let transaction = bench.cluster.direct(Node(0)).await;
    for commits in [true, false, true, false] {
        let entered = "BEGIN; INSERT INTO failover.ledger (until) VALUES (now()) RETURNING id::text";
        let id = transaction.simple_query(entered).await.unwrap().into_iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        });
        let id = id.unwrap();
        let mut settlers = JoinSet::new();
        for _ in 0..16 {
            let (client, id) = (bench.cluster.direct(Node(0)).await, id.clone());
            settlers.spawn(async move {
                let sql = format!(
                    "INSERT INTO failover.ledger AS entry (id, until, fence) VALUES ('{id}', now(), true) {ASK}"
                );
                client.batch_execute("SET lock_timeout = '20ms'").await.unwrap();
                loop {
                    match client.query_one(&sql, &[]).await {
                        Ok(row) => return row.get::<_, bool>(0),
                        Err(error) => assert_eq!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE), "{error:?}"),
                    }
                }
            });
        }
        let admin = bench.cluster.direct(Node(0)).await;
        eventually("a settler waits", PATIENCE, async || {
            let sql = "SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted";
            !admin.query(sql, &[]).await.unwrap().is_empty()
        })
        .await;
        transaction.batch_execute(if commits { "COMMIT" } else { "ROLLBACK" }).await.unwrap();
        while let Some(fenced) = settlers.join_next().await {
            assert_eq!(fenced.unwrap(), !commits);
        }
    }
}

/// For how long the rows that are left are kept, in minutes.
async fn left_over(admin: &Client) -> Vec<i64> {
    let sql = "SELECT DISTINCT ceil(extract(epoch FROM until - now()) / 60)::bigint FROM failover.ledger ORDER BY 1";
    admin.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

const DUE_ROWS: &str =
    "INSERT INTO failover.ledger (until) SELECT now() - interval '1 hour' FROM generate_series(1, 3)";

/// Pruning takes the rows whose time is over, and leaves what is to be kept, not committed, or locked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pruning_takes_rows_that_are_due_alone() {
    let bench = Bench::new(single(), Guarantee::Ledger(Ledger::default())).await;
    let (admin, open) = (bench.cluster.direct(Node(0)).await, bench.cluster.direct(Node(0)).await);
    admin.batch_execute("INSERT INTO failover.ledger (until) VALUES (now() + interval '1 minute')").await.unwrap();
    admin.batch_execute(DUE_ROWS).await.unwrap();
    let lock = "SELECT FROM failover.ledger WHERE until < now() LIMIT 1 FOR UPDATE";
    open.batch_execute(&format!("BEGIN; {lock}; {DUE_ROWS}")).await.unwrap();
    let client = bench.pool.get().await.unwrap();
    assert_eq!(Ledger::default().prune(&client).await.unwrap(), 2, "three are due, and one is locked");
    open.batch_execute("COMMIT").await.unwrap();
    assert_eq!(left_over(&admin).await, [-60, 1]);
    assert_eq!(Ledger::default().prune(&client).await.unwrap(), 4);
    assert_eq!(left_over(&admin).await, [1]);
}

/// A row says itself until when it is kept: a pool that keeps its own for ten minutes leaves those that another pool
/// keeps for a day, its fences among them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_that_keep_rows_for_other_times_share_a_table() {
    const DAY: i64 = 24 * 60;
    let ledger = |minutes: u64| Ledger::default().keep(Duration::from_secs(60 * minutes));
    let (briefly, long) = (ledger(10), ledger(DAY.unsigned_abs()));
    let bench = Bench::new(single(), Guarantee::Ledger(long.clone())).await;
    let admin = bench.cluster.direct(Node(0)).await;
    let later = async |minutes: i64| {
        let sql = format!("UPDATE failover.ledger SET until = until - interval '{minutes} minutes'");
        admin.batch_execute(&sql).await.unwrap();
    };
    // A row, a fence and the row of the work's second run.
    bench.cut(Cut::CommitUndelivered { server_stays: false });
    bench.write().await.unwrap();
    bench.assert_once(2).await;
    bench.run(bench.call().guarantee(Guarantee::Ledger(briefly.clone()))).await.unwrap();
    assert_eq!(left_over(&admin).await, [10, DAY]);

    let client = bench.pool.get().await.unwrap();
    let prune_all = async || {
        let (by_brief, by_long) = (briefly.prune(&client).await.unwrap(), long.prune(&client).await.unwrap());
        (by_brief, by_long, left_over(&admin).await)
    };
    assert_eq!(prune_all().await, (0, 0, vec![10, DAY]));
    later(11).await;
    assert_eq!(prune_all().await, (1, 0, vec![DAY - 11]));
    later(DAY - 12).await;
    assert_eq!(prune_all().await, (0, 0, vec![1]), "the last minute of a day");
    later(2).await;
    assert_eq!(prune_all().await, (2, 0, vec![]));
}

/// The pool prunes by itself, after a transaction, several times while a row is kept.
#[tokio::test]
async fn the_pool_prunes_by_itself() {
    let keep = Duration::from_secs(600);
    let bench = Bench::new(single(), Guarantee::Ledger(Ledger::default().keep(keep))).await;
    let admin = bench.cluster.direct(Node(0)).await;
    admin.batch_execute(DUE_ROWS).await.unwrap();
    bench.write().await.unwrap();
    for _ in 0..2 {
        tokio::time::pause();
        tokio::time::advance(keep / 8).await;
        tokio::time::resume();
        bench.write().await.unwrap();
        eventually("the rows that are due are gone", PATIENCE, async || left_over(&admin).await == [10]).await;
        admin.batch_execute(DUE_ROWS).await.unwrap();
    }
    bench.write().await.unwrap();
    assert_eq!(left_over(&admin).await, [-60, 10], "it is not done at each transaction");
}

/// Each guarantee: a transaction that writes nothing is fine, and one that swallows an error is no success.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_guarantee_changes_what_a_transaction_is() {
    let bench = Bench::new(single(), Guarantee::default()).await;
    for guarantee in settlers().into_iter().chain([Guarantee::AtMostOnce, Guarantee::AtLeastOnce]) {
        let call = || bench.pool.build_transaction().guarantee(guarantee.clone());
        let one: i32 = call().run(async |tx| Ok(tx.query_one("SELECT 1", &[]).await?.get(0))).await.unwrap();
        call().run(async |_| Ok(())).await.unwrap();
        assert_eq!(one, 1);
        let error = call()
            .run(async |tx| {
                insert(&tx, 1).await?;
                let _ = tx.batch_execute("SELECT 1 / 0").await;
                Ok(())
            })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::RolledBack(RolledBack::FailedInside)), "{guarantee:?}: {error:?}");
    }
    assert_eq!(stored(&bench.cluster).await, [0_i64; 0]);
}

/// A mark makes a transaction one that writes; what is declared to read only is spared it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_leaves_no_mark() {
    let bench = Bench::new(single(), Guarantee::default()).await;
    for guarantee in settlers() {
        let id = async |call: TransactionBuilder<'_>| -> Option<String> {
            let sql = "SELECT pg_current_xact_id_if_assigned()::text";
            call.run(async |tx| Ok(tx.query_one(sql, &[]).await?.get(0))).await.unwrap()
        };
        let call = || bench.pool.build_transaction().guarantee(guarantee.clone());
        assert!(id(call()).await.is_some());
        assert_eq!(id(call().read_only(true)).await, None);
    }
}

/// Savepoints and strict isolation: a commit without an answer is settled all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn savepoints_and_isolation_levels_are_settled() {
    with_each_settler(single, async |bench| {
        bench.cut(Cut::CommitAnswerDropped);
        let call = bench.call().isolation_level(IsolationLevel::Serializable);
        call.run(async |mut tx| {
            bench.runs.begin();
            let undone = tx.savepoint().await?;
            undone.execute("INSERT INTO entries VALUES (2)", &[]).await?;
            undone.rollback().await?;
            let failed = tx.savepoint().await?;
            assert!(failed.batch_execute("SELECT 1 / 0").await.is_err());
            failed.rollback().await?;
            let kept = tx.savepoint().await?;
            kept.execute("INSERT INTO entries VALUES (1)", &[]).await?;
            kept.release().await
        })
        .await
        .unwrap();
        bench.assert_once(1).await;
    })
    .await;
}

/// Serializable transactions with marks conflict where their work does, and are run again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serializable_transactions_count_right() {
    with_each_settler(single, async |bench| {
        let mut writers = JoinSet::new();
        for _ in 0..4 {
            let (pool, guarantee) = (bench.pool.clone(), bench.guarantee.clone());
            writers.spawn(async move {
                for _ in 0..10 {
                    let call = pool.build_transaction().guarantee(guarantee.clone()).retry(RetryPolicy::new());
                    call.isolation_level(IsolationLevel::Serializable)
                        .run(async |tx| {
                            let seen: i64 = tx.query_one("SELECT count(*) FROM entries", &[]).await?.get(0);
                            insert(&tx, seen).await
                        })
                        .await
                        .unwrap();
                }
            });
        }
        while let Some(writer) = writers.join_next().await {
            writer.unwrap();
        }
        assert_eq!(stored(&bench.cluster).await, (0..40).collect::<Vec<_>>());
    })
    .await;
}
