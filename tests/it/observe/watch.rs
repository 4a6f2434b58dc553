//! What a pool tells of itself: its events, its figures, its spans. Each is held against what the test did.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use futures_util::StreamExt;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use testbed::{Cluster, Cut, Cutter, Node, eventually};
use tokio::time::timeout;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::view::{Eviction, SettledOutcome, State};
use tokio_postgres_failover::{
    Error, Event, Events, GenericClient, Guarantee, Pool, PoolBuilder, deadpool_postgres, tokio_postgres,
};

use crate::support::load::{LONG, by_name, by_url, create_table};
use crate::support::{CONFLICT, Runs, insert, server};

/// A heart-beat's time-out that no stall of the machine exceeds, where the silence of a primary is not what is counted.
const UNHURRIED: Duration = Duration::from_secs(10);

/// What a pool's figures are read from: Prometheus' text, as a server would scrape it. One recorder for all tests; the
/// pool's name tells their figures apart.
struct Figures {
    pool: &'static str,
    recorder: &'static PrometheusHandle,
}

impl Figures {
    /// Call it before the pool is built.
    fn of(pool: &'static str) -> Self {
        static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
        let recorder = RECORDER.get_or_init(|| {
            let builder = PrometheusBuilder::new().with_recommended_naming(true);
            builder.set_buckets(&[0.001, 0.01, 0.1, 1.0, 10.0]).unwrap().install_recorder().unwrap()
        });
        Self { pool, recorder }
    }

    /// Of the series with these labels, beside the pool's name. What has no sample yet is 0.
    fn get(&self, name: &str, labels: &[(&str, &str)]) -> i64 {
        let mut wanted: HashMap<&str, &str> = labels.iter().copied().collect();
        wanted.insert("db_client_connection_pool_name", self.pool);
        let text = self.recorder.render();
        assert!(text.contains("db_client_connection_max"), "nothing is recorded: {text}");
        let mut values = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, labels) = series.strip_suffix('}')?.split_once('{')?;
            let labels: HashMap<&str, &str> = labels
                .split(',')
                .filter_map(|label| label.split_once('='))
                .map(|(k, v)| (k, v.trim_matches('"')))
                .collect();
            (found == name && labels == wanted).then(|| value.parse().expect(line))
        });
        let value = values.next().unwrap_or_default();
        assert!(values.next().is_none(), "{name} is there twice");
        value
    }

    fn plain(&self, name: &str) -> i64 {
        self.get(name, &[])
    }

    /// Idle, and in use.
    fn connections(&self) -> (i64, i64) {
        let state = |state| self.get("db_client_connection_count", &[("db_client_connection_state", state)]);
        (state("idle"), state("used"))
    }

    fn evictions(&self, cause: &str) -> i64 {
        self.get("db_client_failover_evictions_total", &[("cause", cause)])
    }

    fn reruns(&self, cause: &str) -> i64 {
        self.get("db_client_failover_reruns_total", &[("cause", cause)])
    }

    fn settled(&self, outcome: &str) -> i64 {
        self.get("db_client_failover_commits_settled_total", &[("outcome", outcome)])
    }

    fn refused(&self, cause: &str) -> i64 {
        self.get("db_client_failover_servers_refused_total", &[("cause", cause)])
    }

    /// All of them.
    fn gauges(&self) -> Vec<i64> {
        let (idle, used) = self.connections();
        let others = ["connection_max", "connection_idle_max", "connection_idle_min", "connection_pending_requests"]
            .into_iter()
            .chain(["failover_primary", "failover_generation"]);
        [idle, used].into_iter().chain(others.map(|name| self.plain(&format!("db_client_{name}")))).collect()
    }
}

async fn until(what: &str, condition: impl AsyncFnMut() -> bool) {
    eventually(what, LONG, condition).await;
}

async fn next(events: &mut Events) -> Event {
    timeout(LONG, events.next()).await.expect("no event comes").expect("the events have ended")
}

/// The next one that is not about the length of a search, which depends on the machine.
async fn next_step(events: &mut Events) -> Event {
    loop {
        match next(events).await {
            Event::SearchSlow { .. } => {}
            event => return event,
        }
    }
}

/// The events after the first primary was found, with so many connections that are idle by then.
async fn warm(pool: &Pool, connections: usize) -> Events {
    let mut events = pool.subscribe();
    let mut held = Vec::new();
    for _ in 0..connections {
        held.push(pool.get().await.unwrap());
    }
    let found = next_step(&mut events).await;
    let Event::PrimaryFound { generation, same_server: false, .. } = found else { panic!("{found:?}") };
    assert_eq!(generation.get(), 1);
    events
}

fn named(builder: PoolBuilder, figures: &Figures) -> PoolBuilder {
    builder.pool_name(figures.pool)
}

/// Acceptance 7: a primary freezes with work under way, another one is promoted, and the old one comes back writable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_in_events_and_figures() {
    let figures = Figures::of("failover");
    let cluster = Cluster::builder().setting("log_connections", "on").start().await;
    create_table(&cluster).await;
    let old = cluster.primary();
    let pool = named(by_name(&cluster), &figures)
        .patrol_interval(Duration::from_millis(200))
        // The successor shows that the frozen one is lost.
        .heartbeat_timeout(UNHURRIED)
        .build()
        .unwrap();
    let mut events = warm(&pool, 0).await;

    let opened = || figures.plain("db_client_connection_create_time_seconds_count");
    // The first was opened by the search, most of the time.
    let first = pool.get().await.unwrap();
    let before = opened();
    let held = [first, pool.get().await.unwrap(), pool.get().await.unwrap()];
    assert_eq!(opened(), before + 2);
    assert_eq!(figures.connections(), (0, 3));
    drop(held);
    assert_eq!(figures.connections(), (3, 0));
    assert_eq!(figures.plain("db_client_connection_wait_time_seconds_count"), 3);
    assert_eq!(figures.plain("db_client_connection_use_time_seconds_count"), 3);
    assert_eq!(figures.plain("db_client_failover_searches_total"), 1);

    let runs = Runs::default();
    let work = async |id: i64| {
        pool.transaction(async |tx| {
            if runs.begin() <= 2 {
                tx.batch_execute("SELECT pg_sleep(600)").await?;
            }
            insert(&tx, id).await
        })
        .await
        .unwrap();
    };
    let fail_over = async {
        until("both have begun", async || runs.count() == 2 && figures.connections() == (1, 2)).await;
        cluster.freeze(old);
        cluster.promote_timed(cluster.most_advanced_standby().await).await;
    };
    tokio::join!(work(1), work(2), fail_over);

    let Event::PrimaryLost { generation, endpoint, .. } = next_step(&mut events).await else { panic!() };
    assert_eq!((generation.get(), endpoint.address.to_string()), (1, cluster.socket_addr(old).to_string()));
    let Event::Evicted { generation, cause, connections, .. } = next_step(&mut events).await else { panic!() };
    assert_eq!((generation.get(), cause, connections), (1, Eviction::Replaced, 3));
    let Event::PrimaryFound { generation, endpoint, same_server: false, .. } = next_step(&mut events).await else {
        panic!()
    };
    let successor = cluster.socket_addr(cluster.primary()).to_string();
    assert_eq!((generation.get(), endpoint.address.to_string()), (2, successor));

    assert_eq!(figures.plain("db_client_failover_searches_total"), 2);
    assert_eq!(figures.plain("db_client_failover_search_duration_seconds_count"), 2);
    assert_eq!(figures.plain("db_client_failover_generation"), 2);
    assert_eq!(figures.plain("db_client_failover_primary"), 1);
    assert_eq!(["replaced", "demoted", "fenced", "silent"].map(|cause| figures.evictions(cause)), [3, 0, 0, 0]);
    assert_eq!(figures.plain("db_client_failover_connections_lost_total"), 0);
    assert_eq!(runs.count(), 4);
    let causes = ["connection_lost", "not_now", "full", "read_only", "conflict", "stale_statement", "outcome_unknown"];
    assert_eq!(causes.map(|cause| figures.reruns(cause)), [2, 0, 0, 0, 0, 0, 0]);
    assert_eq!(figures.plain("db_client_connection_wait_time_seconds_count"), 3 + 4);
    assert_eq!(figures.plain("db_client_connection_use_time_seconds_count"), 3 + 4);
    assert_eq!(figures.plain("db_client_connection_timeouts_total"), 0);
    until("what is open is idle, and counted so", async || {
        let status = pool.status();
        let idle = i64::try_from(status.available).unwrap();
        status.available == status.size && figures.connections() == (idle, 0)
    })
    .await;

    // The zombie is told of once, however often it is asked.
    let asked = async || cluster.log(old).await.matches("connection authorized: user=app").count();
    let before = asked().await;
    cluster.thaw(old);
    let Event::ZombieRefused { address, timeline, newest, .. } = next_step(&mut events).await else { panic!() };
    assert_eq!((address.to_string(), newest), (cluster.socket_addr(old).to_string(), timeline + 1));
    until("the zombie was asked again", async || asked().await > before + 5).await;
    assert_eq!(["zombie", "fenced", "other_cluster"].map(|cause| figures.refused(cause)), [1, 0, 0]);

    pool.close();
    assert!(timeout(LONG, events.next()).await.expect("the events do not end").is_none());
    assert!(pool.subscribe().next().await.is_none(), "nothing happens to a closed pool");
    until("all gauges are at zero", async || figures.gauges().iter().all(|gauge| *gauge == 0)).await;
}

#[tokio::test]
async fn the_sizes_of_the_pool_are_figures() {
    let figures = Figures::of("sizes");
    let pool = named(Pool::builder("postgres://app@127.0.0.1:1/app").unwrap(), &figures).min_idle(1).build().unwrap();
    let sizes = ["max", "idle_max", "idle_min"].map(|size| figures.plain(&format!("db_client_connection_{size}")));
    assert_eq!(sizes, [16, 16, 1]);
    drop(pool);
}

/// A server that dies takes its connections along: nothing is left to evict.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_connections_are_told_from_evicted_ones() {
    let figures = Figures::of("lost");
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = named(by_name(&cluster), &figures).heartbeat_timeout(UNHURRIED).build().unwrap();
    let mut events = warm(&pool, 3).await;
    cluster.stop_immediate(Node(0)).await;
    assert!(matches!(next(&mut events).await, Event::PrimaryLost { .. }));
    until("the loss is counted", async || {
        figures.plain("db_client_failover_connections_lost_total") == 3 && figures.connections() == (0, 0)
    })
    .await;
    assert_eq!(figures.plain("db_client_failover_primary"), 0);
    assert!(matches!(next(&mut events).await, Event::SearchSlow { candidates, .. } if candidates.len() == 1));

    cluster.start_node(Node(0)).await;
    let next_two = [next(&mut events).await, next(&mut events).await];
    let [Event::Evicted { connections: 0, cause, .. }, Event::PrimaryFound { generation, same_server, .. }] = next_two
    else {
        panic!("{next_two:?}")
    };
    assert_eq!((cause, generation.get(), same_server), (Eviction::Replaced, 2, false));
    assert_eq!(figures.evictions("replaced"), 0);
    drop(pool);
    assert!(timeout(LONG, events.next()).await.expect("the events keep the pool alive").is_none());
    until("all gauges are at zero", async || figures.gauges().iter().all(|gauge| *gauge == 0)).await;
}

/// A pause is no failover: the primary is lost and found, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_is_lost_and_found() {
    let figures = Figures::of("stall");
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = named(by_name(&cluster), &figures)
        .heartbeat_interval(Duration::from_millis(100))
        .heartbeat_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let events = warm(&pool, 2).await;
    let found = || figures.plain("db_client_failover_primary") == 1;
    cluster.freeze(Node(0));
    until("the primary is lost", async || !found()).await;
    cluster.thaw(Node(0));
    until("the primary is found again", async || found()).await;
    assert_eq!((figures.connections(), figures.evictions("replaced")), ((2, 0), 0));

    pool.close();
    let told: Vec<Event> = timeout(LONG, events.collect()).await.expect("the events do not end");
    let steps: Vec<Event> = told.into_iter().filter(|event| !matches!(event, Event::SearchSlow { .. })).collect();
    // A stall of the whole machine is lost and found in the same way, and the pool may have been closed during one.
    let pauses = steps.chunks_exact(2);
    assert!(matches!(pauses.remainder(), [] | [Event::PrimaryLost { .. }]), "{steps:?}");
    let searches = 1 + i64::try_from(pauses.len()).unwrap();
    assert!(searches > 1, "{steps:?}");
    for pause in pauses {
        let [Event::PrimaryLost { .. }, Event::PrimaryFound { generation, same_server: true, took, .. }] = pause else {
            panic!("{steps:?}")
        };
        assert_eq!(generation.get(), 1);
        assert!(*took > Duration::ZERO);
    }
    assert_eq!(figures.plain("db_client_failover_search_duration_seconds_count"), searches);
    assert_eq!(figures.evictions("replaced"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_in_events_and_figures() {
    let figures = Figures::of("fence");
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = named(by_name(&cluster), &figures)
        .heartbeat_interval(Duration::from_millis(100))
        .heartbeat_timeout(UNHURRIED)
        .build()
        .unwrap();
    let mut events = warm(&pool, 2).await;
    cluster.set_read_only(Node(0), true).await;
    let Event::Fenced { address, .. } = next_step(&mut events).await else { panic!() };
    assert_eq!(address.to_string(), cluster.socket_addr(Node(0)).to_string());
    assert!(matches!(next_step(&mut events).await, Event::PrimaryLost { .. }));
    let Event::Evicted { cause: Eviction::Fenced, connections: 2, .. } = next_step(&mut events).await else { panic!() };
    assert_eq!((figures.evictions("fenced"), figures.refused("fenced")), (2, 1));
    until("they are closed", async || figures.connections() == (0, 0)).await;

    cluster.set_read_only(Node(0), false).await;
    let Event::PrimaryFound { generation, .. } = next_step(&mut events).await else { panic!() };
    assert_eq!((generation.get(), figures.refused("fenced")), (2, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_wait_and_give_up_are_counted() {
    let figures = Figures::of("waiting");
    let cluster = Cluster::builder().nodes(1).start().await;
    let deadline = Duration::from_millis(500);
    let pool = named(by_name(&cluster), &figures).max_size(1).checkout_timeout(deadline).build().unwrap();
    let held = pool.get_within(LONG).await.unwrap();
    let pending = || figures.plain("db_client_connection_pending_requests");
    let timeouts = || figures.plain("db_client_connection_timeouts_total");
    assert_eq!(pending(), 0);
    // Three that have the time to be seen waiting, and three whose time passes.
    let patient = || {
        let pool = pool.clone();
        tokio::spawn(async move { pool.get_within(LONG).await.map(drop) })
    };
    let dropped = [patient(), patient(), patient()];
    until("three wait", async || pending() == 3).await;
    for call in dropped {
        call.abort();
    }
    until("they have given up", async || pending() == 0).await;
    assert_eq!(timeouts(), 0, "whoever is not there any more has no deadline");

    let impatient = || {
        let pool = pool.clone();
        tokio::spawn(async move { pool.get().await.map(drop) })
    };
    for call in [impatient(), impatient(), impatient()] {
        assert!(matches!(call.await.unwrap(), Err(Error::Unavailable(_))));
    }
    assert_eq!((pending(), timeouts()), (0, 3));
    assert_eq!(figures.plain("db_client_connection_wait_time_seconds_count"), 1);
    assert_eq!(figures.connections(), (0, 1));

    // What is checked out while the pool is closed is gone at once, and is not counted down again when it comes back.
    pool.close();
    until("all gauges are at zero", async || figures.gauges().iter().all(|gauge| *gauge == 0)).await;
    drop(held);
    assert!(figures.gauges().iter().all(|gauge| *gauge == 0), "{:?}", figures.gauges());
    assert_eq!(figures.plain("db_client_connection_use_time_seconds_count"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settled_commits_and_re_runs_are_told_by_what_became_of_them() {
    let figures = Figures::of("settled");
    let cluster = Cluster::builder().nodes(1).start().await;
    create_table(&cluster).await;
    let listen = SocketAddr::new(cluster.spare_addr(0), cluster.port());
    let cutter = Cutter::start(listen, cluster.socket_addr(Node(0))).await;
    let pool = named(by_url(format!("postgres://app@{}/app", cutter.addr())), &figures)
        .heartbeat_timeout(UNHURRIED)
        .build()
        .unwrap();
    let mut events = warm(&pool, 0).await;
    let undelivered = Cut::CommitUndelivered { server_stays: false };
    let unknown = SettledOutcome::Unknown(Unsettled::NoMark);
    for (cut, guarantee, expected, runs_expected) in [
        (Cut::CommitAnswerDropped, Guarantee::ExactlyOnce, SettledOutcome::Committed, 1),
        (undelivered, Guarantee::ExactlyOnce, SettledOutcome::NotCommitted, 2),
        (Cut::CommitAnswerDropped, Guarantee::AtMostOnce, unknown, 1),
    ] {
        let armed = cutter.arm(cut);
        let runs = Runs::default();
        let call = pool.build_transaction().guarantee(guarantee);
        let ended = call.run(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        });
        let ended = timeout(LONG, ended).await.unwrap();
        armed.happened().await;
        assert_eq!((ended.is_ok(), runs.count()), (expected != unknown, runs_expected), "{ended:?}");
        let told = next(&mut events).await;
        let Event::CommitSettled { generation, outcome, .. } = told else { panic!("{told:?}") };
        assert_eq!((generation.get(), outcome), (1, expected));
    }
    assert_eq!(["committed", "not_committed", "unknown"].map(|outcome| figures.settled(outcome)), [1, 1, 1]);
    assert_eq!(figures.reruns("connection_lost"), 1);
    until("each lost connection is counted", async || figures.plain("db_client_failover_connections_lost_total") == 3)
        .await;

    let runs = Runs::default();
    pool.transaction(async |tx| if runs.begin() < 3 { Ok(tx.batch_execute(CONFLICT).await?) } else { Ok(()) })
        .await
        .unwrap();
    assert_eq!((figures.reruns("conflict"), figures.reruns("connection_lost")), (2, 1));
}

async fn one(client: &impl GenericClient) -> Result<i32, tokio_postgres::Error> {
    Ok(client.query_one("SELECT 1", &[]).await?.get(0))
}

/// As OpenTelemetry's conventions want it: calls and the statements of callers, by what became of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_statements_are_timed() {
    let figures = Figures::of("operations");
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).pool_name("operations").build().unwrap();
    let count = |operation: &str, failure: &[(&str, &str)]| {
        let common = [("db_system_name", "postgresql"), ("db_namespace", "app"), ("db_operation_name", operation)];
        figures.get("db_client_operation_duration_seconds_count", &[&common, failure].concat())
    };
    pool.transaction(async |tx| {
        insert(&tx, 1).await?;
        one(&tx).await?;
        let nested = tx.prepare("SELECT 2").await?;
        Ok(tx.query(&nested, &[]).await.map(drop)?)
    })
    .await
    .unwrap();
    one(&pool.get().await.unwrap()).await.unwrap();
    let operations = ["transaction", "execute", "query", "prepare", "batch_execute"];
    assert_eq!(operations.map(|operation| count(operation, &[])), [1, 1, 3, 1, 0], "the pool's own are not counted");

    let failed = pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1 / 0").await?)).await;
    failed.unwrap_err();
    let divided = [("error_type", "22012"), ("db_response_status_code", "22012")];
    assert_eq!(operations.map(|operation| count(operation, &divided)), [1, 0, 0, 0, 1]);
    let client = pool.get().await.unwrap();
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
    cluster.direct(Node(0)).await.batch_execute(end).await.unwrap();
    until("the session has ended", async || client.is_closed()).await;
    one(&client).await.unwrap_err();
    assert_eq!(count("query", &[("error_type", "connection_closed")]), 1);
}

/// What its manager opened is seen while it is checked out, and its size as it was when it was wrapped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrapped_pool_has_figures() {
    let figures = Figures::of("around");
    let cluster = Cluster::builder().nodes(1).start().await;
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(cluster.url_hosts());
    config.pool = Some(deadpool_postgres::PoolConfig::new(5));
    let existing = config.create_pool(Some(deadpool_postgres::Runtime::Tokio1), tokio_postgres::NoTls).unwrap();
    let pool: Pool = Pool::wrap(existing).pool_name("around").build().unwrap();
    let (one, other) = (pool.get().await.unwrap(), pool.get().await.unwrap());
    let max = || figures.plain("db_client_connection_max");
    assert_eq!((figures.connections(), max()), ((0, 2), 5));
    drop(one);
    assert_eq!(figures.connections(), (0, 1));
    drop(pool.get().await.unwrap());
    assert_eq!(figures.connections(), (0, 1));
    assert_eq!(figures.plain("db_client_connection_use_time_seconds_count"), 2);
    pool.close();
    drop(other);
    until("all gauges are at zero", async || figures.gauges().iter().all(|gauge| *gauge == 0)).await;
}

/// The name is made of what is no secret.
#[tokio::test]
async fn a_pool_without_a_name_is_named_after_its_server() {
    let figures = Figures::of("first.internal:5433/app");
    let _pool = Pool::builder("postgres://me:s3cr3t@first.internal:5433,second.internal:5434/app")
        .unwrap()
        .max_size(3)
        .build()
        .unwrap();
    assert_eq!(figures.plain("db_client_connection_max"), 3);
}

/// As any stream.
#[tokio::test]
async fn events_are_a_stream() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_name(&cluster).build().unwrap();
    let events = pool.subscribe();
    pool.connect().await.unwrap();
    pool.close();
    let all: Vec<Event> = timeout(LONG, events.collect()).await.expect("the stream does not end");
    // The search may have been a long one.
    let found = all.iter().filter(|event| !matches!(event, Event::SearchSlow { .. })).collect::<Vec<_>>();
    assert!(matches!(found[..], [Event::PrimaryFound { .. }]), "{all:?}");
}

/// A session that its holder has taken out of the pool is neither idle nor in use.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detached_session_is_no_idle_connection() {
    let figures = Figures::of("detached");
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_url(cluster.url_hosts()).pool_name("detached").build().unwrap();
    let session = pool.get().await.unwrap().detach();
    assert_eq!(figures.connections(), (0, 0));
    drop(session);
    drop(pool.get().await.unwrap());
    eventually("the next one is idle", LONG, async || figures.connections() == (1, 0)).await;
}

/// A pool that sleeps has no verified primary, although it has lost none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_sleeps_counts_no_primary() {
    let figures = Figures::of("sleeper");
    let cluster = Cluster::builder().nodes(1).start().await;
    let builder = by_url(cluster.url_hosts()).pool_name("sleeper").sleep_after(Duration::from_millis(500));
    let pool = builder.build().unwrap();
    for _ in 0..2 {
        let client = pool.get().await.unwrap();
        assert_eq!(figures.plain("db_client_failover_primary"), 1);
        drop(client);
        eventually("asleep", LONG, async || matches!(pool.status().view.state, State::Asleep)).await;
        eventually("none", Duration::from_secs(5), async || figures.plain("db_client_failover_primary") == 0).await;
    }
}
