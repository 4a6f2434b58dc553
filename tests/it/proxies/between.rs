//! HAProxy and PgBouncer between the pool and the servers: the real programs, set up as their operators do.
//! docs/proxies.md has what they cost. Each test passes with a line that says so where its program is not installed,
//! and fails there under CI.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use testbed::{Cluster, ClusterBuilder, Dns, FlyChecks, HaProxy, Node, PgBouncer, PgBouncerBuilder, eventually};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Config, NoTls};
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, PoolBuilder};

use crate::support::bench::install_ledger;
use crate::support::load::{Load, Write, by_url, create_table, from_env, generation, ms};
use crate::support::{PATIENCE, insert, stored};

/// What a caller sets on Fly, where a failover takes a minute: HAProxy needs some seconds of its own.
const DEADLINE: Duration = Duration::from_secs(90);
const LONG: Duration = Duration::from_secs(30);

/// Eight writers, each in turn with `transaction` and `idempotent`, and two that read.
struct Traffic {
    load: Load,
    stop: Arc<AtomicBool>,
    readers: JoinSet<Vec<String>>,
    reads: Arc<AtomicUsize>,
}

impl Traffic {
    async fn warm(pool: &Pool) -> Self {
        let load = Load::warm(pool, 8, Write::Both).await;
        let (stop, reads) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut readers = JoinSet::new();
        for _ in 0..2 {
            let (pool, stop, reads) = (pool.clone(), Arc::clone(&stop), Arc::clone(&reads));
            readers.spawn(async move {
                let mut errors = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let count = async |tx: tokio_postgres_failover::Transaction| -> Result<i64, Error> {
                        Ok(tx.query_one("SELECT count(*) FROM entries WHERE id < $1", &[&100_i64]).await?.get(0))
                    };
                    match pool.read(count).await {
                        Ok(_) => drop(reads.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => errors.push(error.to_string()),
                    }
                }
                errors
            });
        }
        Self { load, stop, readers, reads }
    }

    /// Waits until everybody writes and somebody reads again.
    async fn flows(&self) {
        let reads = self.reads.load(Ordering::Relaxed);
        self.load.all_written_since(Instant::now()).await;
        eventually("somebody reads again", LONG, async || self.reads.load(Ordering::Relaxed) > reads + 2).await;
    }

    /// Nobody saw an error, and every write is stored once.
    async fn assert_flawless(mut self, cluster: &Cluster) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(errors) = self.readers.join_next().await {
            assert_eq!(errors.unwrap(), Vec::<String>::new(), "errors reached the readers");
        }
        let outcome = self.load.stop(cluster).await;
        println!("{:?}, {} reads", outcome.verdict, self.reads.load(Ordering::Relaxed));
        outcome.assert_flawless();
    }

    fn report(&self, what: &str, accepted: Instant, fault: Instant) {
        let (first, all) = self.load.recovery(accepted);
        println!(
            "{what}: accepts writes {} ms after the fault; from then on: first write {} ms, all writers {} ms",
            ms(accepted - fault),
            ms(first),
            ms(all)
        );
    }
}

/// A plain session by an address, as whoever has no pool opens it: is its server a standby?
async fn leads_to_a_standby(addr: SocketAddr) -> Option<bool> {
    let mut config = Config::new();
    config.hostaddr(addr.ip()).port(addr.port()).user("app").dbname("app").application_name("plain");
    let (client, connection) = timeout(LONG, config.connect(NoTls)).await.ok()?.ok()?;
    let connection = tokio::spawn(connection);
    let row = client.simple_query("SELECT pg_is_in_recovery()").await.ok();
    connection.abort();
    row?.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0) == Some("t")),
        _ => None,
    })
}

/// A cluster as Fly sets one up: a HAProxy on each node, behind one DNS name.
struct Fly {
    // The proxies go before the servers they lead to.
    proxies: Vec<HaProxy>,
    checks: FlyChecks,
    cluster: Cluster,
}

impl Fly {
    async fn start(nodes: usize) -> Self {
        Self::on(Cluster::builder().nodes(nodes)).await
    }

    async fn on(cluster: ClusterBuilder) -> Self {
        // Each session and each statement: whether a standby was ever written to can be read there.
        let cluster = cluster.setting("log_connections", "on").setting("log_statement", "all").start().await;
        create_table(&cluster).await;
        let checks = FlyChecks::start(&cluster).await;
        let mut proxies = Vec::new();
        for node in cluster.nodes() {
            proxies.push(HaProxy::start(&cluster, node).await);
        }
        let fly = Self { proxies, checks, cluster };
        fly.found().await;
        fly
    }

    fn builder(&self) -> PoolBuilder {
        let builder = by_url(HaProxy::url(&self.cluster)).dns_servers([self.cluster.dns().addr()]);
        builder.checkout_timeout(DEADLINE).retry(tokio_postgres_failover::RetryPolicy::new().deadline(DEADLINE))
    }

    /// Every proxy knows the primary.
    async fn found(&self) {
        for proxy in &self.proxies {
            proxy.wait_found(&self.cluster, self.cluster.primary()).await;
        }
    }
}

/// The primary's server dies, and the machine lives on: with its HAProxy, which leads to the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_a_crash_is_no_error() {
    if !HaProxy::is_installed() {
        return;
    }
    let fly = Fly::start(3).await;
    let pool = fly.builder().build().unwrap();
    let traffic = Traffic::warm(&pool).await;
    let fault = Instant::now();
    fly.cluster.kill(Node(0)).await;
    let accepted = fly.cluster.promote_timed(fly.cluster.most_advanced_standby().await).await.accepted_at;
    traffic.load.all_written_since(accepted).await;
    traffic.report("HAProxy, crash", accepted, fault);
    fly.found().await;
    fly.cluster.restart_as_standby(Node(0)).await;
    traffic.flows().await;
    assert_eq!(generation(&pool), 2);
    traffic.assert_flawless(&fly.cluster).await;
}

/// The same with its whole machine, HAProxy and role check included; it comes back as a standby.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_a_machine_that_dies_is_no_error() {
    if !HaProxy::is_installed() {
        return;
    }
    let mut fly = Fly::start(3).await;
    let pool = fly.builder().build().unwrap();
    let traffic = Traffic::warm(&pool).await;
    let fault = Instant::now();
    fly.cluster.kill(Node(0)).await;
    fly.checks.down(Node(0));
    fly.proxies[0].stop().await;
    let others: Vec<_> = [Node(1), Node(2)].map(|node| fly.cluster.addr(node)).to_vec();
    fly.cluster.dns().set(&others);
    let accepted = fly.cluster.promote_timed(fly.cluster.most_advanced_standby().await).await.accepted_at;
    traffic.load.all_written_since(accepted).await;
    traffic.report("HAProxy, machine", accepted, fault);
    // Back as a standby: each HAProxy takes it for a primary until it has checked it.
    fly.cluster.restart_as_standby(Node(0)).await;
    fly.proxies[0].launch().await;
    fly.checks.up(Node(0)).await;
    fly.cluster.dns().set(&fly.cluster.nodes().into_iter().map(|node| fly.cluster.addr(node)).collect::<Vec<_>>());
    traffic.flows().await;
    fly.found().await;
    traffic.flows().await;
    assert_eq!(generation(&pool), 2);
    traffic.assert_flawless(&fly.cluster).await;
}

/// A planned change: the primary shuts down, its successor is promoted, and each HAProxy follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_a_planned_change_is_no_error() {
    if !HaProxy::is_installed() {
        return;
    }
    let fly = Fly::start(3).await;
    let pool = fly.builder().build().unwrap();
    let traffic = Traffic::warm(&pool).await;
    for round in 2..=3 {
        let fault = Instant::now();
        let took = fly.cluster.switch_over(fly.cluster.most_advanced_standby().await).await;
        traffic.load.all_written_since(fault + took).await;
        traffic.report("HAProxy, planned", fault + took, fault);
        fly.found().await;
        traffic.flows().await;
        assert_eq!(generation(&pool), round);
    }
    traffic.assert_flawless(&fly.cluster).await;
}

/// R7: after a restart HAProxy takes every server for the primary until it has checked it, and hands out standbys. The
/// pool meets them, and nothing but the probe's question ever reaches one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_r7_a_standby_handed_out_after_a_restart_is_never_written_to() {
    if !HaProxy::is_installed() {
        return;
    }
    let mut fly = Fly::start(3).await;
    let pool = fly.builder().patrol_interval(Duration::from_millis(200)).build().unwrap();
    let traffic = Traffic::warm(&pool).await;
    let standbys = [Node(1), Node(2)];
    for round in 1..=3 {
        // While the checks wait, the window is as long as this test wants it.
        fly.checks.hold(true);
        for proxy in &mut fly.proxies {
            proxy.restart().await;
        }
        let addr = fly.proxies[0].addr();
        eventually("HAProxy hands out a standby", PATIENCE, async || leads_to_a_standby(addr).await == Some(true))
            .await;
        eventually("the pool has met a standby", PATIENCE, async || {
            let mut met = 0;
            for node in standbys {
                met += sessions_of_the_pool(&fly.cluster, node).await;
            }
            met >= round
        })
        .await;
        // What they think of a standby changes with the third answer: this goes on for some seconds, while everybody
        // writes.
        fly.checks.hold(false);
        traffic.flows().await;
        for _ in 0..50 {
            let client = pool.get().await.unwrap();
            // It may be ended under the question.
            if let Ok(row) = client.query_one("SELECT pg_is_in_recovery()", &[]).await {
                assert!(!row.get::<_, bool>(0), "a standby was handed out");
            }
        }
        fly.found().await;
        traffic.flows().await;
    }
    for node in standbys {
        let log = fly.cluster.log(node).await;
        let written: Vec<_> = log.lines().filter(|line| line.contains("INSERT") || line.contains("BEGIN")).collect();
        assert!(written.is_empty(), "{node:?} was used: {written:#?}");
        println!("{node:?}: {} sessions of the pool", sessions_of_the_pool(&fly.cluster, node).await);
    }
    assert_eq!(generation(&pool), 1, "it was one server all the time: {:?}", pool.status().view);
    traffic.assert_flawless(&fly.cluster).await;
}

/// Sessions of the role `app` that this node has let in, but for those of the test.
async fn sessions_of_the_pool(cluster: &Cluster, node: Node) -> usize {
    let log = cluster.log(node).await;
    let let_in = |line: &&str| line.contains("authorized: user=app") && !line.contains("application_name=plain");
    log.lines().filter(let_in).count()
}

/// R8: HAProxy accepts and hangs up while it has no server. Callers wait, and whoever does not wait that long is told
/// why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_r8_without_a_primary_callers_wait_and_are_told() {
    if !HaProxy::is_installed() {
        return;
    }
    let fly = Fly::start(2).await;
    let pool = fly.builder().build().unwrap();
    let traffic = Traffic::warm(&pool).await;
    fly.cluster.kill(Node(0)).await;
    for proxy in &fly.proxies {
        proxy.wait_none().await;
    }
    let impatient = fly.builder().checkout_timeout(Duration::from_secs(1)).build().unwrap();
    // On a slow machine a second may be over before the pool has asked anybody.
    eventually("the caller is told of the proxy", LONG, async || {
        let error = impatient.get().await.map(drop).unwrap_err().to_string();
        println!("{error}");
        error.contains("a proxy without a server behind it")
    })
    .await;
    fly.cluster.promote(Node(1)).await;
    traffic.flows().await;
    assert_eq!(generation(&pool), 2);
    traffic.assert_flawless(&fly.cluster).await;
}

/// Each HAProxy is restarted, which ends every session at once, and reloaded, which ends none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_restarts_and_reloads_are_no_error() {
    if !HaProxy::is_installed() {
        return;
    }
    let mut fly = Fly::start(2).await;
    let pool = fly.builder().build().unwrap();
    let traffic = Traffic::warm(&pool).await;
    for proxy in &mut fly.proxies {
        proxy.restart().await;
        traffic.flows().await;
    }
    fly.found().await;
    let pid = "SELECT pg_backend_pid()";
    let open = pool.get().await.unwrap();
    let before: i32 = open.query_one(pid, &[]).await.unwrap().get(0);
    for proxy in &mut fly.proxies {
        proxy.reload().await;
        traffic.flows().await;
    }
    assert_eq!(open.query_one(pid, &[]).await.unwrap().get::<_, i32>(0), before, "a reload ends no session");
    drop(open);
    fly.found().await;
    assert_eq!(generation(&pool), 1, "{:?}", pool.status().view);
    traffic.assert_flawless(&fly.cluster).await;
    drop(pool);
    for proxy in &mut fly.proxies {
        proxy.wait_retired().await;
    }
}

/// R4: an old primary that comes back writable, and says so: Fly's role check believes it for a moment, and HAProxy
/// leads to both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_r4_a_zombie_in_its_round_robin_is_never_written_to() {
    if !HaProxy::is_installed() {
        return;
    }
    let fly = Fly::start(3).await;
    let pool = fly.builder().patrol_interval(Duration::from_millis(200)).build().unwrap();
    let traffic = Traffic::warm(&pool).await;
    fly.cluster.kill(Node(0)).await;
    fly.cluster.promote(fly.cluster.most_advanced_standby().await).await;
    fly.found().await;
    traffic.flows().await;
    let log = fly.cluster.log(Node(0)).await.len();
    fly.cluster.start_node(Node(0)).await;
    eventually("the pool has met the zombie", PATIENCE, async || {
        fly.cluster.log(Node(0)).await[log..].contains("authorized: user=app")
    })
    .await;
    traffic.flows().await;
    // Screened: Fly writes its lock file.
    fly.checks.set_zombie(Node(0), true);
    fly.found().await;
    traffic.flows().await;
    let used = fly.cluster.log(Node(0)).await[log..].contains("INSERT");
    assert!(!used, "the zombie was written to");
    assert_eq!(generation(&pool), 2);
    traffic.assert_flawless(&fly.cluster).await;
}

/// R4b behind one address: a standby is promoted behind the primary's back, and HAProxy leads to both. The pool's
/// sessions are all on the old primary, which answers as ever; only a new session shows the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_a_zombie_at_the_only_address_is_left_within_two_patrols() {
    if !HaProxy::is_installed() {
        return;
    }
    let fly = Fly::on(Cluster::builder().nodes(2).asynchronous()).await;
    let url = format!("postgres://app@{}/app", fly.proxies[0].addr());
    assert_zombie_is_left(&fly, by_url(url)).await;
}

/// The same, and the pool sees a standby beside the proxy, which goes on following the old primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_a_zombie_beside_a_standby_in_sight_is_left_within_two_patrols() {
    if !HaProxy::is_installed() {
        return;
    }
    let fly = Fly::on(Cluster::builder().nodes(3).asynchronous()).await;
    let standby = fly.cluster.socket_addr(Node(2));
    let url = format!("postgres://app@{},{standby}/app", fly.proxies[0].addr());
    assert_zombie_is_left(&fly, by_url(url).proxied(true)).await;
}

/// Promotes node 1 behind the back of node 0, which goes on. The pool writes all the time, and must leave node 0 within
/// two patrols from when HAProxy leads to both. What it writes from then on must be there.
async fn assert_zombie_is_left(fly: &Fly, builder: PoolBuilder) {
    let patrol = Duration::from_secs(2);
    let pool = builder.max_size(4).patrol_interval(patrol).build().unwrap();
    let stop = Arc::<AtomicBool>::default();
    let since = Arc::new(AtomicUsize::new(0));
    let (writing, stopped, counted) = (pool.clone(), Arc::clone(&stop), Arc::clone(&since));
    let writer = tokio::spawn(async move {
        let mut acknowledged = Vec::new();
        for id in 0_i64.. {
            if stopped.load(Ordering::Relaxed) {
                break;
            }
            let Ok(client) = writing.get().await else { continue };
            if client.execute("INSERT INTO entries (id) VALUES ($1)", &[&id]).await.is_ok() {
                let generation = client.generation().get();
                counted.fetch_add(usize::from(generation >= 2), Ordering::Relaxed);
                acknowledged.push((generation, id));
            }
        }
        acknowledged
    });
    fly.cluster.stop_shipping(Node(0), Node(1)).await;
    // The test bed's own promotion would turn the other standbys to the new primary.
    fly.cluster.direct(Node(1)).await.execute("SELECT pg_promote()", &[]).await.unwrap();
    let new = fly.cluster.addr(Node(1)).to_string();
    eventually("HAProxy leads to the new primary as well", LONG, async || {
        server_behind(fly.proxies[0].addr()).await.as_ref() == Some(&new)
    })
    .await;
    let both = Instant::now();
    eventually("the old primary is left", LONG, async || generation(&pool) == 2).await;
    println!("left {} ms after HAProxy led to both", ms(both.elapsed()));
    // One second for the way, and two for a stall of the machine.
    assert!(both.elapsed() < patrol * 2 + Duration::from_secs(3), "{:?}", both.elapsed());
    eventually("the new primary is written to", LONG, async || since.load(Ordering::Relaxed) > 100).await;
    stop.store(true, Ordering::Relaxed);
    let acknowledged = writer.await.unwrap();
    let stored: Vec<i64> = {
        let rows = fly.cluster.direct(Node(1)).await.query("SELECT id FROM entries", &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    let since: Vec<i64> = acknowledged.iter().filter(|(generation, _)| *generation >= 2).map(|(_, id)| *id).collect();
    let lost = since.iter().filter(|id| !stored.contains(id)).count();
    println!("{} acknowledged since, {lost} lost", since.len());
    assert!(lost == 0, "{} acknowledged since, {lost} lost", since.len());
}

/// The address of the server that a plain session is led to.
async fn server_behind(addr: SocketAddr) -> Option<String> {
    let mut config = Config::new();
    config.hostaddr(addr.ip()).port(addr.port()).user("app").dbname("app").application_name("plain");
    let (client, connection) = timeout(LONG, config.connect(NoTls)).await.ok()?.ok()?;
    let connection = tokio::spawn(connection);
    let row = client.query_one("SELECT host(inet_server_addr())", &[]).await.ok();
    connection.abort();
    row?.get(0)
}

/// Two servers and a PgBouncer that leads to the first.
async fn bouncer(builder: PgBouncerBuilder) -> (PgBouncer, Cluster) {
    let cluster = Cluster::builder().nodes(2).start().await;
    create_table(&cluster).await;
    let target = cluster.addr(Node(0)).to_string();
    let bouncer = builder.start(&cluster, cluster.spare_addr(0), &target, cluster.port()).await;
    (bouncer, cluster)
}

fn through(bouncer: &PgBouncer) -> PoolBuilder {
    by_url(bouncer.url()).max_size(12)
}

/// How an operator lets PgBouncer follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// `kill -9`, promotion, the other server in its configuration, RELOAD.
    Crash,
    /// PAUSE, promotion, RELOAD, RESUME; the old primary lives on. In session mode a PAUSE waits for the end of
    /// sessions that do not end.
    Pause,
    /// The same without a pause.
    Split,
    /// `kill -9`, promotion, and the name in its configuration leads to the new one.
    Dns,
}

/// A DNS server on the port that PgBouncer asks, which not everybody may listen on.
async fn name_server(cluster: &Cluster) -> Option<Dns> {
    let addr = SocketAddr::new(cluster.spare_addr(53), 53);
    if let Err(error) = UdpSocket::bind(addr) {
        eprintln!("SKIPPED: PgBouncer asks DNS on port 53 only, and this user may not listen there: {error}");
        return None;
    }
    Some(Dns::start(addr).await)
}

/// Changes the primary behind it in this way, under load, settled by the log. Then the old primary is a standby again,
/// and back.
async fn follows(mode: &str, change: Change) {
    follows_with(mode, change, Guarantee::ExactlyOnce).await;
}

async fn follows_with(mode: &str, change: Change, guarantee: Guarantee) {
    if !PgBouncer::is_installed() {
        return;
    }
    let cluster = Cluster::builder().nodes(2).start().await;
    create_table(&cluster).await;
    install_ledger(&cluster).await;
    cluster.wait_replayed(Node(1)).await;
    // Without these the old server is tried for 15 s more, and new clients are turned away meanwhile. The last is for
    // session mode, where the sessions of a pool do not end by themselves.
    let mut builder = PgBouncer::builder(mode).setting("server_login_retry", "1").setting("dns_max_ttl", "1");
    builder = builder.setting("server_fast_close", "1");
    let (mut dns, mut target) = (None, cluster.addr(Node(0)).to_string());
    if change == Change::Dns {
        let Some(server) = name_server(&cluster).await else { return };
        server.set(&[cluster.addr(Node(0))]);
        builder = builder.name_server(server.addr().ip());
        (dns, target) = (Some(server), "pg.internal".to_owned());
    }
    let bouncer = builder.start(&cluster, cluster.spare_addr(0), &target, cluster.port()).await;
    let pool = through(&bouncer).guarantee(guarantee).build().unwrap();
    let traffic = Traffic::warm(&pool).await;
    for _ in 0..2 {
        let (old, new) = (cluster.primary(), cluster.most_advanced_standby().await);
        let (fault, before) = (Instant::now(), generation(&pool));
        match change {
            Change::Crash | Change::Dns => cluster.kill(old).await,
            Change::Pause => drop(bouncer.command("PAUSE app").await),
            Change::Split => {}
        }
        let accepted = cluster.promote_timed(new).await.accepted_at;
        match &dns {
            Some(dns) => dns.set(&[cluster.addr(new)]),
            None => bouncer.set_target(&cluster.addr(new).to_string(), cluster.port()).await,
        }
        if change == Change::Pause {
            bouncer.command("RESUME app").await;
        }
        traffic.load.all_written_since(accepted).await;
        traffic.report(&format!("PgBouncer, {mode} mode, {change:?}"), accepted, fault);
        eventually("the pool knows the new primary", PATIENCE, async || generation(&pool) > before).await;
        cluster.restart_as_standby(old).await;
        traffic.flows().await;
    }
    traffic.assert_flawless(&cluster).await;
}

/// C11 and acceptance: session mode.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_session_mode_a_crash_is_no_error() {
    follows("session", Change::Crash).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_session_mode_a_name_that_moves_is_no_error() {
    follows("session", Change::Dns).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_session_mode_a_primary_that_lives_on_is_no_error() {
    follows("session", Change::Split).await;
}

/// C11.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_transaction_mode_a_crash_is_no_error() {
    follows("transaction", Change::Crash).await;
}

/// C11: the same with a ledger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_transaction_mode_a_crash_is_settled_by_the_ledger() {
    follows_with("transaction", Change::Crash, Guarantee::Ledger(Ledger::default())).await;
}

/// C11.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_transaction_mode_a_pause_is_no_error() {
    follows("transaction", Change::Pause).await;
}

/// C11.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_transaction_mode_a_primary_that_lives_on_is_no_error() {
    follows("transaction", Change::Split).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_transaction_mode_a_name_that_moves_is_no_error() {
    follows("transaction", Change::Dns).await;
}

/// It is restarted by SIGTERM, which ends all sessions, and told to renew its own: by RECONNECT, and by short lives of
/// them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_restarts_and_new_server_sessions_are_no_error() {
    if !PgBouncer::is_installed() {
        return;
    }
    for mode in ["session", "transaction"] {
        let builder = PgBouncer::builder(mode).setting("server_lifetime", "1").setting("server_idle_timeout", "1");
        let builder = builder.setting("server_check_delay", "0").setting("server_check_query", "SELECT 1");
        let (mut bouncer, cluster) = bouncer(builder.setting("server_fast_close", "1")).await;
        let pool = through(&bouncer).build().unwrap();
        let traffic = Traffic::warm(&pool).await;
        for _ in 0..3 {
            bouncer.restart().await;
            traffic.flows().await;
            bouncer.command("RECONNECT app").await;
            traffic.flows().await;
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(4) {
            traffic.flows().await;
        }
        assert_eq!(generation(&pool), 1, "{:?}", pool.status().view);
        traffic.assert_flawless(&cluster).await;
    }
}

/// On Fly a PgBouncer of one's own leads to port 5432: to HAProxy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_in_front_of_haproxy_a_crash_is_no_error() {
    if !PgBouncer::is_installed() || !HaProxy::is_installed() {
        return;
    }
    for mode in ["session", "transaction"] {
        let fly = Fly::start(3).await;
        let builder = PgBouncer::builder(mode).setting("server_login_retry", "1");
        let listen = fly.cluster.spare_addr(0);
        let proxies = fly.proxies.iter().map(|proxy| proxy.addr().ip().to_string()).collect::<Vec<_>>().join(",");
        let bouncer = builder.start(&fly.cluster, listen, &proxies, HaProxy::port(&fly.cluster)).await;
        let pool = through(&bouncer).checkout_timeout(DEADLINE).build().unwrap();
        let traffic = Traffic::warm(&pool).await;
        let fault = Instant::now();
        fly.cluster.kill(Node(0)).await;
        let accepted = fly.cluster.promote_timed(fly.cluster.most_advanced_standby().await).await.accepted_at;
        traffic.load.all_written_since(accepted).await;
        traffic.report(&format!("PgBouncer, {mode} mode, HAProxy, crash"), accepted, fault);
        traffic.flows().await;
        assert_eq!(generation(&pool), 2);
        traffic.assert_flawless(&fly.cluster).await;
    }
}

/// Passwords stand in PgBouncer's `auth_file`. A wrong one is told at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_asks_for_the_password_of_its_auth_file() {
    if !PgBouncer::is_installed() {
        return;
    }
    let cluster = Cluster::builder().nodes(1).password("right").start().await;
    create_table(&cluster).await;
    for (spare, mode) in [(0, "session"), (1, "transaction")] {
        let builder = PgBouncer::builder(mode).password("right");
        let target = cluster.addr(Node(0)).to_string();
        let bouncer = builder.start(&cluster, cluster.spare_addr(spare), &target, cluster.port()).await;
        let with =
            |password: &str| by_url(format!("postgres://app:{password}@{}/app", bouncer.addr())).build().unwrap();
        with("right").transaction(async |tx| insert(&tx, 1).await).await.unwrap();
        let begun = Instant::now();
        let error = with("wrong").get().await.map(drop).unwrap_err();
        println!("{mode} mode, after {:?}: {error}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(10), "{error}");
        assert!(!error.to_string().contains("wrong"), "{error}");
    }
    assert_eq!(stored(&cluster).await, [1, 1]);
}

/// Statement mode has no transactions, and PgBouncer says so: callers are told at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_statement_mode_is_refused_at_once() {
    if !PgBouncer::is_installed() {
        return;
    }
    let (bouncer, cluster) = bouncer(PgBouncer::builder("statement")).await;
    let pool = through(&bouncer).build().unwrap();
    let begun = Instant::now();
    let refused = [
        pool.transaction(async |tx| insert(&tx, 1).await).await,
        pool.idempotent(async |tx| insert(&tx, 1).await).await,
        pool.read(async |tx| insert(&tx, 1).await).await,
    ];
    for error in refused.map(Result::unwrap_err) {
        println!("{error}");
        assert!(error.to_string().contains("statement pooling mode"), "{error}");
        assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted, "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "not at once");
    assert_eq!(stored(&cluster).await, Vec::<i64>::new());
}

/// What transaction mode cannot give. Before 1.21 a prepared statement is on one server session, and the next
/// transaction may be on another: its error is the caller's, and the pool works on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbouncer_transaction_mode_keeps_no_session() {
    if !PgBouncer::is_installed() {
        return;
    }
    let (bouncer, cluster) = bouncer(PgBouncer::builder("transaction")).await;
    let pool = through(&bouncer).build().unwrap();
    let (client, mut other) = (pool.get().await.unwrap(), pool.get().await.unwrap());
    let statement = client.prepare("SELECT 1").await.unwrap();
    // Whoever holds a transaction holds the server session.
    let held = other.transaction().await.unwrap();
    held.batch_execute("SELECT 1").await.unwrap();
    let missed = client.query(&statement, &[]).await.map(drop);
    drop(held);
    println!("PgBouncer {:?}: {missed:?}", bouncer.command("SHOW VERSION").await);
    if let Err(error) = missed {
        assert_eq!(error.code(), Some(&SqlState::INVALID_SQL_STATEMENT_NAME), "{error:?}");
    }
    client.batch_execute("SELECT 1").await.unwrap();
    // The mark of a transaction is prepared, where a session lasts, and written out where none does.
    for id in 1..=50 {
        let pool = pool.clone();
        tokio::join!(
            async {
                pool.transaction(async |tx| insert(&tx, id).await).await.unwrap();
            },
            async {
                pool.transaction(async |tx| insert(&tx, -id).await).await.unwrap();
            },
        );
    }
    assert_eq!(stored(&cluster).await.len(), 100);
    assert_eq!(generation(&pool), 1);
}

/// What each costs: a round trip, and a transaction with one INSERT, as ratios to the same without anything in between.
/// Each round asks all of them, so that a busy machine is busy for all. Prints figures and checks none; `ROUNDS=30` and
/// `--release` for those of docs/proxies.md.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_cost() {
    if !PgBouncer::is_installed() || !HaProxy::is_installed() {
        return;
    }
    let rounds = from_env("ROUNDS", 2);
    let cluster = Cluster::builder().nodes(1).asynchronous().start().await;
    create_table(&cluster).await;
    let _checks = FlyChecks::start(&cluster).await;
    let proxy = HaProxy::start(&cluster, Node(0)).await;
    proxy.wait_found(&cluster, Node(0)).await;
    let target = cluster.addr(Node(0)).to_string();
    let mut bouncers = Vec::new();
    for (spare, mode) in [(0, "session"), (1, "transaction")] {
        let builder = PgBouncer::builder(mode);
        bouncers.push(builder.start(&cluster, cluster.spare_addr(spare), &target, cluster.port()).await);
    }
    let ways = [
        ("direct", cluster.socket_addr(Node(0))),
        ("HAProxy", proxy.addr()),
        ("PgBouncer, session mode", bouncers[0].addr()),
        ("PgBouncer, transaction mode", bouncers[1].addr()),
    ];
    let mut pools = Vec::new();
    for (_, addr) in ways {
        let pool = by_url(format!("postgres://app@{addr}/app")).build().unwrap();
        pool.connect().await.unwrap();
        pools.push(pool);
    }
    let [mut asked, mut written] = [const { Vec::<Vec<Duration>>::new() }; 2];
    for round in 0..rounds {
        let (mut asking, mut writing) = (vec![Duration::ZERO; ways.len()], vec![Duration::ZERO; ways.len()]);
        for n in 0..ways.len() {
            // The first is another one each time.
            let way = (n + usize::try_from(round).unwrap()) % ways.len();
            (asking[way], writing[way]) = (round_trip(&pools[way]).await, transaction(&pools[way]).await);
        }
        asked.push(asking);
        written.push(writing);
    }
    for (what, figures) in [("round trip", asked), ("transaction", written)] {
        let direct: Vec<Duration> = figures.iter().map(|round| round[0]).collect();
        println!("{what}, direct: {:?}", median(direct));
        for (way, (name, _)) in ways.iter().enumerate().skip(1) {
            let mut ratios: Vec<f64> =
                figures.iter().map(|round| round[way].as_secs_f64() / round[0].as_secs_f64()).collect();
            ratios.sort_by(f64::total_cmp);
            let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
            println!("{what}, {name}: {:.2} ({least:.2} – {most:.2})", ratios[ratios.len() / 2]);
        }
    }
}

/// The median time of a question on an open connection.
async fn round_trip(pool: &Pool) -> Duration {
    let client = pool.get().await.unwrap();
    let mut times = Vec::new();
    for _ in 0..500 {
        let begun = Instant::now();
        client.batch_execute("SELECT 1").await.unwrap();
        times.push(begun.elapsed());
    }
    median(times)
}

/// The median time of a transaction: BEGIN and the mark, the statement, COMMIT.
async fn transaction(pool: &Pool) -> Duration {
    let mut times = Vec::new();
    for id in 0..200 {
        let begun = Instant::now();
        let work = async |tx: tokio_postgres_failover::Transaction| {
            let sql = format!("INSERT INTO entries (id) VALUES ({id})");
            Ok(tx.batch_execute(&sql).await?)
        };
        pool.transaction(work).await.unwrap();
        times.push(begun.elapsed());
    }
    median(times)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
