//! Functions, views and settings that the pool asks for, hidden from its role: from the start, or under a pool at work.
//! Each costs what it would tell, and nothing else; and it is used again once it may be.
//!
//! Rights to the functions and views of the catalogue are a database's own, so each case has a database.

use std::sync::Arc;
use std::time::{Duration, Instant};

use testbed::{Cluster, Node, eventually};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, NoTls};
use tokio_postgres_failover::listen::Message;
use tokio_postgres_failover::view::{Answer, Part, Parts, State};
use tokio_postgres_failover::{Event, Pool, Transaction, deadpool_postgres};

use crate::sessions::versions::signature;
use crate::support::load::LONG;

/// What was refused is asked for again after a minute.
const BACK_WITHIN: Duration = Duration::from_secs(150);
const HEARTBEAT: Duration = Duration::from_millis(200);

/// What is hidden from the role.
#[derive(Clone, Copy, Debug)]
enum Hidden {
    Function(&'static str),
    View(&'static str),
}

use Hidden::{Function, View};
use Part::{Checkpoint, Evidence, Fence, Identity, Position, Replay, StartTime, Statistics, Timeline};

/// Each function and view that a statement of the crate's own names, and the parts that it costs.
const EACH: &[(Hidden, &[Part])] = &[
    // The probe's.
    (Function("pg_is_in_recovery()"), &[]),
    (Function("current_setting(text)"), &[Statistics]),
    (Function("pg_control_system()"), &[Identity]),
    (Function("pg_postmaster_start_time()"), &[StartTime]),
    (Function("round(numeric, int)"), &[StartTime]),
    (Function("pg_walfile_name(pg_lsn)"), &[Timeline]),
    (Function("pg_current_wal_insert_lsn()"), &[Timeline, Position]),
    (Function("pg_last_wal_replay_lsn()"), &[Position, Replay]),
    (Function("pg_control_checkpoint()"), &[Checkpoint]),
    (Function("has_schema_privilege(oid, text)"), &[Evidence]),
    (Function("has_function_privilege(oid, text)"), &[Evidence]),
    (Function("has_function_privilege(text, text)"), &[Evidence]),
    (Function("split_part(text, text, int)"), &[Fence]),
    (Function("starts_with(text, text)"), &[Fence]),
    (Function("unnest(anyarray)"), &[Fence]),
    (Function("current_database()"), &[Fence]),
    (Function("pg_stat_get_activity(int)"), &[]),
    (View("pg_stat_bgwriter"), &[Statistics]),
    (View("pg_db_role_setting"), &[Fence]),
    (View("pg_database"), &[Fence]),
    (View("pg_roles"), &[Fence, Evidence]),
    (View("pg_proc"), &[Evidence]),
    (View("pg_namespace"), &[Evidence]),
    // The wait for a promotion.
    (Function("generate_series(int, int)"), &[]),
    (Function("pg_sleep(float8)"), &[]),
    // The mark, and what ends a transaction.
    (Function("pg_current_xact_id()"), &[]),
    (Function("pg_logical_emit_message(boolean, text, text)"), &[]),
    (Function("pg_backend_pid()"), &[]),
    (Function("now()"), &[]),
    (Function("statement_timestamp()"), &[]),
    (Function("pg_current_xact_id_if_assigned()"), &[]),
    (Function("current_setting(text, boolean)"), &[]),
    (Function("pg_xact_status(xid8)"), &[]),
    // The settlers'.
    (Function("pg_last_wal_receive_lsn()"), &[]),
    (Function("pg_last_xact_replay_timestamp()"), &[]),
    (Function("pg_ls_waldir()"), &[]),
    (Function("pg_terminate_backend(int, bigint)"), &[]),
    (View("pg_stat_activity"), &[]),
    // The listener's.
    (Function("pg_listening_channels()"), &[]),
    (Function("set_config(text, text, boolean)"), &[]),
];

impl Hidden {
    /// With the parameters that this server gives it.
    async fn on(self, server: &Client) -> Self {
        match self {
            Function(name) => Function(signature(server, name).await),
            View(name) => View(name),
        }
    }

    fn revoke(self) -> String {
        match self {
            Function(name) => format!("REVOKE EXECUTE ON FUNCTION pg_catalog.{name} FROM PUBLIC, app"),
            View(name) => format!("REVOKE SELECT ON pg_catalog.{name} FROM PUBLIC, app"),
        }
    }

    fn grant(self) -> String {
        match self {
            Function(name) => format!("GRANT EXECUTE ON FUNCTION pg_catalog.{name} TO PUBLIC"),
            View(name) => format!("GRANT SELECT ON pg_catalog.{name} TO PUBLIC"),
        }
    }

    /// As on a server that never had it.
    fn remove(self) -> String {
        let (kind, name) = match self {
            Function(name) => ("FUNCTION", name),
            View(name @ ("pg_stat_bgwriter" | "pg_roles" | "pg_stat_activity")) => ("VIEW", name),
            View(name) => ("TABLE", name),
        };
        format!("SET allow_system_table_mods = on; ALTER {kind} pg_catalog.{name} RENAME TO pg_gone")
    }
}

async fn connect(cluster: &Cluster, user: &str, database: &str) -> Client {
    let mut config = tokio_postgres::Config::new();
    let address = cluster.socket_addr(Node(0));
    config.hostaddr(address.ip()).port(address.port()).user(user).dbname(database);
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// A database of this name, and a superuser's session in it.
async fn database(cluster: &Cluster, name: &str) -> Client {
    let admin = cluster.direct(Node(0)).await;
    admin.batch_execute(&format!("CREATE DATABASE {name} OWNER app")).await.unwrap();
    let session = connect(cluster, "postgres", name).await;
    session.batch_execute("CREATE TABLE work (n int); ALTER TABLE work OWNER TO app").await.unwrap();
    session
}

/// Nothing of it is lost because the machine is slow.
fn pool(cluster: &Cluster, database: &str) -> Pool {
    let url = format!("postgres://app@{}/{database}", cluster.socket_addr(Node(0)));
    let builder = Pool::builder(url).unwrap().heartbeat_interval(HEARTBEAT).patrol_interval(Duration::from_secs(1));
    builder.max_size(2).heartbeat_timeout(LONG).checkout_timeout(LONG).build().unwrap()
}

fn wrapped(cluster: &Cluster, database: &str) -> Pool {
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(format!("postgres://app@{}/{database}", cluster.socket_addr(Node(0))));
    config.pool = Some(deadpool_postgres::PoolConfig::new(2));
    let builder = Pool::wrap(config.create_pool(None, NoTls).unwrap()).heartbeat_interval(HEARTBEAT);
    builder.heartbeat_timeout(LONG).checkout_timeout(LONG).build().unwrap()
}

/// Everything that callers do, once.
async fn work(pool: &Pool, n: i32) -> Result<(), String> {
    let said = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let held = pool.get().await.map_err(|error| said("get", &error))?;
    // A second one: it is opened as often as not.
    let other = pool.get().await.map_err(|error| said("get", &error))?;
    held.batch_execute("SELECT 1").await.map_err(|error| said("get", &error))?;
    drop((held, other));
    let insert = |tx: Transaction| async move {
        tx.execute("INSERT INTO work VALUES ($1)", &[&n]).await?;
        Ok(())
    };
    pool.transaction(insert).await.map_err(|error| said("transaction", &error))?;
    pool.idempotent(insert).await.map_err(|error| said("idempotent", &error))?;
    let read = async |tx: Transaction| Ok(tx.batch_execute("SELECT 1").await?);
    pool.read(read).await.map_err(|error| said("read", &error))?;
    // The caller's error comes back as it is.
    let fails = async |tx: Transaction| Ok(tx.batch_execute("SELECT 1 / 0").await?);
    match pool.transaction(fails).await {
        Err(error) if error.code().is_some_and(|code| code.code() == "22012") => Ok(()),
        other => Err(format!("the caller's error: {other:?}")),
    }
}

/// Works until a moment after several heartbeats and patrols. What failed, and what the pool said of its primary.
async fn watched_work(pool: &Pool, lasts: Duration) -> Vec<String> {
    let mut events = pool.subscribe();
    let mut wrong = Vec::new();
    let began = Instant::now();
    let mut n = 0;
    while began.elapsed() < lasts {
        n += 1;
        if let Err(error) = work(pool, n).await {
            wrong.push(error);
        }
        sleep(Duration::from_millis(100)).await;
    }
    while let Ok(Some(event)) = timeout(Duration::ZERO, events.next()).await {
        if matches!(event, Event::PrimaryLost { .. } | Event::Evicted { .. } | Event::PrimaryFound { .. }) {
            wrong.push(format!("{event:?}"));
        }
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

/// What the primary keeps back, as the pool tells.
fn withheld(pool: &Pool) -> Option<Parts> {
    match pool.status().view.state {
        State::Primary { report, .. } => Some(report.withheld),
        _ => None,
    }
}

/// `None`: it tells that just these are kept back, when it has been asked for all of them.
async fn tells(pool: &Pool, parts: Parts) -> Option<String> {
    let told = timeout(LONG, async {
        while withheld(pool) != Some(parts) {
            sleep(HEARTBEAT).await;
        }
    });
    told.await.is_err().then(|| format!("it tells {:?}", withheld(pool)))
}

/// Hides it under a pool at work, and from a new one. What went wrong, and the new pool.
async fn hidden(pool: impl Fn() -> Pool, admin: &Client, hide: &str, parts: &[Part]) -> (Vec<String>, Pool) {
    let parts: Parts = parts.iter().copied().collect();
    let warm = pool();
    work(&warm, 0).await.unwrap();
    admin.batch_execute(hide).await.unwrap();
    let mut wrong = watched_work(&warm, Duration::from_secs(2)).await;
    wrong.extend(tells(&warm, parts).await);
    for it in &mut wrong {
        it.insert_str(0, "at run time: ");
    }
    drop(warm);
    let cold = pool();
    let first = work(&cold, 0).await;
    let started = first.err().into_iter().chain(watched_work(&cold, Duration::from_secs(1)).await);
    let told = tells(&cold, parts).await;
    wrong.extend(started.chain(told).map(|it| format!("at start: {it}")));
    (wrong, cold)
}

/// At most so many cases are at work at the same time.
const AT_ONCE: usize = 4;

async fn single() -> Arc<Cluster> {
    Arc::new(Cluster::builder().nodes(1).setting("max_connections", "400").start().await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_from_the_role_costs_that_part_alone_until_it_is_given_back() {
    let (cluster, turns) = (single().await, Arc::new(Semaphore::new(AT_ONCE)));
    let mut cases = JoinSet::new();
    for (index, (what, parts)) in EACH.iter().copied().enumerate() {
        let name = format!("case_{index}");
        let admin = database(&cluster, &name).await;
        let what = what.on(&admin).await;
        let (cluster, turns) = (Arc::clone(&cluster), Arc::clone(&turns));
        cases.spawn(async move {
            let turn = turns.acquire().await;
            let (mut wrong, pool) = hidden(|| pool(&cluster, &name), &admin, &what.revoke(), parts).await;
            drop(turn);
            admin.batch_execute(&what.grant()).await.unwrap();
            let granted = Instant::now();
            loop {
                if let Err(error) = work(&pool, 0).await {
                    wrong.push(format!("granted: {error}"));
                }
                let (withheld, fallback) = (withheld(&pool), pool.status().fallback);
                if withheld == Some(Parts::default()) && fallback.is_none() {
                    break;
                }
                if granted.elapsed() > BACK_WITHIN {
                    wrong.push(format!("granted, and not used again: {withheld:?} {fallback:?}"));
                    break;
                }
                sleep(Duration::from_secs(1)).await;
            }
            (!wrong.is_empty()).then(|| format!("{what:?}:\n  {}", wrong.join("\n  ")))
        });
    }
    let wrong: Vec<String> = cases.join_all().await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), EACH.len(), wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_lacks_costs_that_part_alone() {
    let (cluster, turns) = (single().await, Arc::new(Semaphore::new(AT_ONCE)));
    let mut cases = JoinSet::new();
    for (index, (what, parts)) in EACH.iter().copied().enumerate() {
        // Whether it may be called is a part of the question.
        let parts = if matches!(what, Function("pg_ls_waldir()")) { &[Evidence] } else { parts };
        let name = format!("case_{index}");
        let admin = database(&cluster, &name).await;
        let what = what.on(&admin).await;
        let (cluster, turns) = (Arc::clone(&cluster), Arc::clone(&turns));
        cases.spawn(async move {
            let _turn = turns.acquire().await;
            let (wrong, _) = hidden(|| pool(&cluster, &name), &admin, &what.remove(), parts).await;
            (!wrong.is_empty()).then(|| format!("{what:?}:\n  {}", wrong.join("\n  ")))
        });
    }
    let wrong: Vec<String> = cases.join_all().await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), EACH.len(), wrong.join("\n"));
}

/// Also several at the same time, and all: no more is known than the role.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_hidden_parts_and_all_of_them_cost_no_checkout() {
    let cluster = single().await;
    let probed = EACH.iter().take(22);
    let roles = |what: &Hidden| matches!(what, Function("pg_is_in_recovery()" | "current_setting(text)"));
    let all = [Fence, Identity, StartTime, Timeline, Position, Replay, Statistics, Checkpoint, Evidence];
    let sets: [(Vec<Hidden>, &[Part]); 3] = [
        (EACH.iter().map(|(what, _)| *what).filter(roles).collect(), &[Statistics]),
        (vec![Function("pg_control_system()"), Function("pg_postmaster_start_time()")], &[Identity, StartTime]),
        (probed.map(|(what, _)| *what).collect(), &all),
    ];
    for (index, (hidden_ones, parts)) in sets.into_iter().enumerate() {
        let name = format!("set_{index}");
        let admin = database(&cluster, &name).await;
        let revoke: Vec<String> = hidden_ones.iter().map(|what| what.revoke()).collect();
        let (wrong, _) = hidden(|| pool(&cluster, &name), &admin, &revoke.join("; "), parts).await;
        assert!(wrong.is_empty(), "{hidden_ones:?}: {wrong:?}");
        let grant: Vec<String> = hidden_ones.iter().map(|what| what.grant()).collect();
        admin.batch_execute(&grant.join("; ")).await.unwrap();
        let (wrong, _) = hidden(|| wrapped(&cluster, &name), &admin, &revoke.join("; "), parts).await;
        assert!(wrong.is_empty(), "wrapped, {hidden_ones:?}: {wrong:?}");
    }
}

/// The pool goes on to the next primary although none tells its cluster or its timeline any more, and not to an old
/// one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failovers_among_servers_that_have_stopped_telling_who_they_are() {
    let cluster = Cluster::builder().nodes(3).asynchronous().start().await;
    let hosts = Pool::builder(cluster.url_hosts()).unwrap().heartbeat_interval(HEARTBEAT);
    let pool = hosts.patrol_interval(Duration::from_secs(1)).build().unwrap();
    pool.get().await.unwrap();
    eventually("all members have told", LONG, async || {
        let told = |answer: &Answer| matches!(answer, Answer::Primary(_) | Answer::Refused(..));
        pool.candidates().iter().all(|candidate| candidate.answer.as_ref().is_some_and(told))
    })
    .await;
    let admin = cluster.direct(Node(0)).await;
    for function in ["pg_control_system()", "pg_walfile_name(pg_lsn)"] {
        admin.batch_execute(&Function(function).revoke()).await.unwrap();
    }
    eventually("it is noticed", LONG, async || withheld(&pool) == Some([Identity, Timeline].into_iter().collect()))
        .await;
    cluster.wait_replayed(Node(1)).await;
    cluster.wait_replayed(Node(2)).await;
    assert_eq!(pool.status().view.generation.get(), 1);
    // One that was restarted since it told last is known by its address.
    cluster.kill(Node(1)).await;
    cluster.start_node(Node(1)).await;
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    let leads_to = async |node: Node| {
        eventually("the next primary is used", LONG, async || {
            let Ok(client) = pool.get().await else { return false };
            let row = client.query_one("SELECT host(inet_server_addr())", &[]).await;
            row.is_ok_and(|row| row.get::<_, String>(0) == cluster.addr(node).to_string())
        })
        .await;
    };
    leads_to(Node(1)).await;
    // An old primary comes back writable. Its last checkpoint tells its timeline.
    cluster.start_node(Node(0)).await;
    cluster.direct(Node(1)).await.batch_execute("CHECKPOINT").await.unwrap();
    eventually("the old primary was asked", LONG, async || {
        let old = pool
            .candidates()
            .into_iter()
            .find(|it| it.endpoint.address.to_string().contains(&cluster.addr(Node(0)).to_string()));
        old.is_some_and(|old| matches!(old.answer, Some(Answer::Primary(_) | Answer::Refused(..))))
    })
    .await;
    for _ in 0..20 {
        leads_to(Node(1)).await;
        sleep(HEARTBEAT / 2).await;
    }
    assert_eq!(pool.status().view.generation.get(), 2);
}

/// A promoted server hides where its replay ended, and shows it later: its transactions are marked then, and are taken
/// for no other server's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_primary_that_shows_its_replay_later_is_the_same_server() {
    let cluster = Cluster::builder().nodes(2).asynchronous().start().await;
    let hide = Function("pg_last_wal_replay_lsn()");
    cluster.direct(Node(0)).await.batch_execute(&hide.revoke()).await.unwrap();
    cluster.direct(Node(0)).await.batch_execute("CREATE TABLE work (n int); GRANT ALL ON work TO app").await.unwrap();
    cluster.wait_replayed(Node(1)).await;
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    let url = format!("postgres://app@{}/app", cluster.socket_addr(Node(1)));
    let builder = Pool::builder(url).unwrap().heartbeat_interval(HEARTBEAT).patrol_interval(Duration::from_secs(1));
    let pool = builder.heartbeat_timeout(LONG).checkout_timeout(LONG).build().unwrap();
    work(&pool, 1).await.unwrap();
    assert_eq!(tells(&pool, [Position, Replay].into_iter().collect()).await, None);
    cluster.direct(Node(1)).await.batch_execute(&hide.grant()).await.unwrap();
    let granted = Instant::now();
    while withheld(&pool) != Some(Parts::default()) || pool.status().fallback.is_some() {
        assert!(granted.elapsed() < BACK_WITHIN, "{:?} {:?}", withheld(&pool), pool.status().fallback);
        let worked = timeout(LONG, work(&pool, 2)).await.expect("a call hangs");
        worked.unwrap();
        sleep(HEARTBEAT).await;
    }
    timeout(LONG, work(&pool, 3)).await.expect("a call hangs").unwrap();
}

/// A listener loses nothing, and is not told that it may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_that_may_not_read_its_channels_listens() {
    let cluster = single().await;
    let admin = database(&cluster, "listening").await;
    let pool = pool(&cluster, "listening");
    let mut before = pool.listen(["news"]).await.unwrap();
    admin.batch_execute(&Function("pg_listening_channels()").revoke()).await.unwrap();
    let mut after = pool.listen(["news"]).await.unwrap();
    // Longer than the pause between two checks.
    sleep(HEARTBEAT * 12).await;
    admin.batch_execute("NOTIFY news, 'one'").await.unwrap();
    for listener in [&mut before, &mut after] {
        let message = timeout(LONG, listener.recv()).await.unwrap().unwrap().unwrap();
        assert!(matches!(&message, Message::Notification(it) if it.payload() == "one"), "{message:?}");
    }
}
