//! `get()` and what stands around it: statements, options, status, resolvers, a pool built by hand.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use testbed::{Cluster, Node, eventually};
use tokio::time::timeout;
use tokio_postgres_failover::deadpool::managed::{Hook, HookError};
use tokio_postgres_failover::resolve::{Addresses, BoxFuture, FixedResolver, Resolve, ResolveError};
use tokio_postgres_failover::session::Connection;
use tokio_postgres_failover::view::{State, View};
use tokio_postgres_failover::{Client, Manager, Pool, PoolBuilder, deadpool, deadpool_postgres};

use crate::support::PATIENCE;

async fn server() -> Cluster {
    Cluster::builder().nodes(1).start().await
}

fn builder(addr: SocketAddr) -> PoolBuilder {
    Pool::builder(format!("postgres://app@{addr}/app")).unwrap()
}

fn pool(cluster: &Cluster) -> Pool {
    builder(cluster.socket_addr(Node(0))).build().unwrap()
}

async fn shown(client: &Client, setting: &str) -> String {
    client.query_one(&format!("SHOW {setting}"), &[]).await.unwrap().get(0)
}

/// Up to eight connections are distinct sessions, one that is given back is used again, and the ninth caller waits.
#[tokio::test]
async fn connections_are_handed_out_and_used_again() {
    let cluster = server().await;
    let pool = builder(cluster.socket_addr(Node(0))).max_size(8).build().unwrap();
    let mut clients = Vec::new();
    let mut backends = std::collections::HashSet::new();
    for _ in 0..8 {
        let client = pool.get().await.unwrap();
        backends.insert(client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0));
        clients.push(client);
    }
    assert_eq!(backends.len(), 8);
    let own = pool.clone();
    let ninth = tokio::spawn(async move { own.get().await });
    eventually("the ninth caller waits", PATIENCE, async || pool.status().waiting == 1).await;
    let status = pool.status();
    assert_eq!((status.max_size, status.size, status.available), (8, 8, 0));
    clients.pop();
    let ninth = ninth.await.unwrap().unwrap();
    let again: i32 = ninth.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    assert!(backends.contains(&again));
}

/// A statement is prepared once for each connection, on a `Client` and on a `Transaction`.
#[tokio::test]
async fn statements_are_cached() {
    let cluster = server().await;
    let pool = builder(cluster.socket_addr(Node(0))).max_size(1).build().unwrap();
    let sql = "SELECT $1::bigint * 2";
    let prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement = $1";
    for id in 1..=3_i64 {
        let client = pool.get().await.unwrap();
        let statement = client.prepare_cached(sql).await.unwrap();
        assert_eq!(client.query_one(&statement, &[&id]).await.unwrap().get::<_, i64>(0), id * 2);
    }
    let count = pool
        .transaction(async |tx| {
            let statement = tx.prepare_cached(sql).await?;
            assert_eq!(tx.query_one(&statement, &[&4_i64]).await?.get::<_, i64>(0), 8);
            Ok(tx.query_one(prepared, &[&sql]).await?.get::<_, i64>(0))
        })
        .await
        .unwrap();
    assert_eq!(count, 1, "prepared by the client, used by the transaction");
}

async fn three_by_driver(client: &impl tokio_postgres::GenericClient) -> i32 {
    client.query_one("SELECT 3", &[]).await.unwrap().get(0)
}

async fn three_by_deadpool(client: &impl deadpool_postgres::GenericClient) -> i32 {
    let statement = client.prepare_cached("SELECT 3").await.unwrap();
    client.query_one(&statement, &[]).await.unwrap().get(0)
}

/// Code written against the driver's `GenericClient` takes our connections and transactions; what is written against
/// deadpool-postgres' takes the transactions of a connection.
#[tokio::test]
async fn generic_code_takes_our_connections() {
    let cluster = server().await;
    let pool = pool(&cluster);
    let mut client = pool.get().await.unwrap();
    assert_eq!(three_by_driver(&**client).await, 3);
    let transaction = client.transaction().await.unwrap();
    assert_eq!(three_by_deadpool(&transaction).await, 3);
    assert_eq!(three_by_driver(&*transaction).await, 3);
    transaction.rollback().await.unwrap();
    pool.transaction(async |tx| {
        assert_eq!(three_by_driver(&**tx).await, 3);
        Ok(())
    })
    .await
    .unwrap();
}

fn name_of(state: &State) -> &'static str {
    match state {
        State::Primary { .. } => "primary",
        State::Searching { .. } => "searching",
        _ => "closed",
    }
}

/// Status and subscription show a failover: generation 1, none, generation 2, and why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_and_subscription_follow_a_failover() {
    let cluster = Cluster::start().await;
    let builder = Pool::builder(cluster.url_hosts()).unwrap().max_size(4);
    // A machine that stands still adds no state of its own.
    let pool = builder.heartbeat_timeout(PATIENCE).build().unwrap();
    let mut views = pool.watch();
    let first = views.borrow_and_update().clone();
    assert_eq!((name_of(&first.state), first.generation.get()), ("searching", 0));
    assert!(!first.changed.why.is_empty());
    let seen = Arc::new(Mutex::new(Vec::<View>::new()));
    let record = Arc::clone(&seen);
    let watcher = tokio::spawn(async move {
        while views.changed().await.is_ok() {
            record.lock().unwrap().push(views.borrow_and_update().clone());
        }
    });
    // A receiver misses a state that lasts for less than its task needs to wake up.
    let recorded = async |name, generation| {
        let is_it = |view: &View| (name_of(&view.state), view.generation.get()) == (name, generation);
        eventually("the state is recorded", PATIENCE, async || seen.lock().unwrap().iter().any(is_it)).await;
    };

    pool.connect().await.unwrap();
    recorded("primary", 1).await;
    let client = pool.get().await.unwrap();
    assert_eq!(client.generation().get(), 1);
    let status = pool.status();
    assert_eq!((status.max_size, status.size, status.available, status.waiting), (4, 1, 0, 0));
    let State::Primary { endpoint, report } = &status.view.state else { panic!("{status:?}") };
    assert_eq!(endpoint.to_string(), cluster.socket_addr(Node(0)).to_string(), "an address is not said twice");
    assert_eq!(report.timeline, Some(1));

    cluster.kill(Node(0)).await;
    recorded("searching", 1).await;
    assert_eq!(name_of(&pool.status().view.state), "searching");
    let successor = cluster.most_advanced_standby().await;
    cluster.promote(successor).await;
    let next = pool.get().await.unwrap();
    assert_eq!(next.generation().get(), 2);
    eventually("the old connection has ended", PATIENCE, async || client.is_closed()).await;
    let view = pool.status().view;
    let State::Primary { endpoint, report } = &view.state else { panic!("{view:?}") };
    assert!(endpoint.to_string().starts_with(&cluster.socket_addr(successor).to_string()), "{endpoint}");
    assert_eq!((report.timeline, view.generation.get()), (Some(2), 2));

    recorded("primary", 2).await;
    pool.close();
    drop((pool, client, next));
    watcher.await.unwrap();
    // A view changes, too, when the server tells more of itself.
    let mut seen = seen.lock().unwrap().clone();
    seen.dedup_by_key(|view| (name_of(&view.state), view.generation.get()));
    let names: Vec<_> = seen.iter().map(|view| (name_of(&view.state), view.generation.get())).collect();
    assert_eq!(names, [("primary", 1), ("searching", 1), ("primary", 2), ("closed", 2)], "{seen:#?}");
    let lost = &seen[1].changed.why;
    assert!(lost.contains(&cluster.socket_addr(Node(0)).to_string()), "it says who was lost: {lost}");
    assert!(seen.windows(2).all(|pair| pair[0].changed.at <= pair[1].changed.at));
}

/// The application's name: ours, that of the connection string, or that of the builder, which goes before.
#[tokio::test]
async fn sessions_carry_an_application_name() {
    let cluster = server().await;
    let url = cluster.url_hosts();
    for (builder, name) in [
        (Pool::builder(&url).unwrap(), "tokio-postgres-failover"),
        (Pool::builder(format!("{url}?application_name=orders")).unwrap(), "orders"),
        (Pool::builder(format!("{url}?application_name=orders")).unwrap().application_name("own"), "own"),
    ] {
        let pool = builder.build().unwrap();
        assert_eq!(shown(&pool.get().await.unwrap(), "application_name").await, name);
        let seen = cluster.direct(Node(0)).await;
        let rows = seen.query("SELECT FROM pg_stat_activity WHERE application_name = $1", &[&name]).await.unwrap();
        assert!(!rows.is_empty());
    }
}

/// What a configuration carries reaches each session, and a `tokio_postgres::Config` serves as well as a URL.
#[tokio::test]
async fn the_configuration_is_honoured() {
    let cluster = server().await;
    let addr = cluster.socket_addr(Node(0));
    let url = format!("postgres://app@{addr}/app?options=-c%20statement_timeout%3D1234%20-c%20work_mem%3D5MB");
    let pool = Pool::builder(url).unwrap().build().unwrap();
    let client = pool.get().await.unwrap();
    assert_eq!(shown(&client, "statement_timeout").await, "1234ms");
    assert_eq!(shown(&client, "work_mem").await, "5MB");
    // Not only the session that found the primary.
    assert_eq!(shown(&pool.get().await.unwrap(), "statement_timeout").await, "1234ms");

    let mut config = tokio_postgres::Config::new();
    config.host(addr.ip().to_string()).port(addr.port()).user("app").dbname("app").options("-c work_mem=6MB");
    let pool = Pool::builder(config).unwrap().build().unwrap();
    assert_eq!(shown(&pool.get().await.unwrap(), "work_mem").await, "6MB");

    let words = format!("host={} port={} user=app dbname=app options='-c work_mem=7MB'", addr.ip(), addr.port());
    let pool = Pool::builder(words).unwrap().build().unwrap();
    assert_eq!(shown(&pool.get().await.unwrap(), "work_mem").await, "7MB");
}

/// `hostaddr` names the address, and no name is resolved; with it `host` is only the server's name.
#[tokio::test]
async fn hosts_can_be_named_by_hostaddr() {
    let cluster = server().await;
    let addr = cluster.socket_addr(Node(0));
    let (ip, port) = (addr.ip(), addr.port());
    for words in [
        format!("hostaddr={ip} port={port} user=app dbname=app"),
        format!("host=no-such-name.invalid hostaddr={ip} port={port} user=app dbname=app"),
        format!("host=a.invalid,b.invalid hostaddr={},{ip} port={port} user=app dbname=app", cluster.spare_addr(0)),
    ] {
        let resolver = Counting::new(vec![]);
        let pool = Pool::builder(&words).unwrap().resolver(Arc::clone(&resolver)).build().unwrap();
        shown(&pool.get().await.unwrap(), "work_mem").await;
        assert_eq!(resolver.asked.load(Ordering::SeqCst), 0, "{words}");
    }
}

/// An IPv6 address in brackets is an address, in URLs of one host and of several.
#[tokio::test]
async fn ipv6_literals_are_addresses() {
    let cluster = server().await;
    let addr = cluster.socket_addr(Node(0));
    let resolver = Counting::new(vec![]);
    // Nothing listens on [::1] at this port, or another program does: the other candidate serves.
    let url = format!("postgres://app@[::1]:9,{addr}/app");
    let pool = Pool::builder(url).unwrap().resolver(Arc::clone(&resolver)).build().unwrap();
    pool.connect().await.unwrap();
    assert_eq!(resolver.asked.load(Ordering::SeqCst), 0);

    // Alone, it is the candidate that an error names.
    let builder = Pool::builder("postgres://app@[::1]:9/app").unwrap();
    let pool = builder.checkout_timeout(Duration::from_millis(200)).build().unwrap();
    let error = pool.get().await.unwrap_err().to_string();
    assert!(error.contains("[::1]:9"), "{error}");
}

/// A resolver of the user's own, which counts the questions.
struct Counting {
    addresses: Vec<IpAddr>,
    asked: AtomicU64,
}

impl Counting {
    fn new(addresses: Vec<IpAddr>) -> Arc<Self> {
        Arc::new(Self { addresses, asked: AtomicU64::new(0) })
    }
}

impl Resolve for Counting {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>> {
        Box::pin(async move {
            assert_eq!(host, "orders.registry");
            self.asked.fetch_add(1, Ordering::SeqCst);
            Ok(Addresses::new(self.addresses.iter().copied()))
        })
    }
}

/// The user's own resolver is asked for the name of the configuration, and its answer is used; so is a fixed one.
#[tokio::test]
async fn names_are_resolved_by_the_users_own_resolver() {
    let cluster = server().await;
    let url = format!("postgres://app@orders.registry:{}/app", cluster.port());
    let resolver = Counting::new(vec![cluster.spare_addr(0), cluster.addr(Node(0))]);
    let pool = Pool::builder(&url).unwrap().resolver(Arc::clone(&resolver)).build().unwrap();
    pool.connect().await.unwrap();
    assert!(resolver.asked.load(Ordering::SeqCst) >= 1);

    let fixed = FixedResolver::new([("orders.registry", [cluster.addr(Node(0))])]);
    let pool = Pool::builder(&url).unwrap().resolver(fixed).build().unwrap();
    pool.connect().await.unwrap();
}

/// The manager serves in a pool that the user builds, with his own limits, and follows the primary there, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_manager_serves_in_a_pool_built_by_hand() {
    let cluster = Cluster::start().await;
    let manager = Pool::builder(cluster.url_hosts()).unwrap().build_manager().unwrap();
    let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(2).build().unwrap();
    let one = pool.get().await.unwrap();
    let two = pool.get().await.unwrap();
    one.batch_execute("SELECT 1").await.unwrap();
    drop(one);
    assert_eq!(pool.status().size, 2);

    cluster.kill(Node(0)).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    eventually("the connection in use has ended", PATIENCE, async || two.is_closed()).await;
    drop(two);
    let next = pool.get().await.unwrap();
    let timeline: String =
        next.query_one("SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)", &[]).await.unwrap().get(0);
    assert_eq!(timeline, "00000002");
}

/// Callers that have begun to wait at the dead primary are served by the next one, however their first dial ended.
#[tokio::test]
async fn a_pool_built_by_hand_dials_the_next_primary_after_a_dial_in_vain() {
    for silent in [true, false] {
        let cluster = Cluster::builder().nodes(2).asynchronous().start().await;
        let manager = Pool::builder(cluster.url_hosts()).unwrap().build_manager().unwrap();
        let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(3).build().unwrap();
        let _held = pool.get().await.unwrap();
        if silent {
            cluster.freeze(Node(0));
        } else {
            cluster.kill(Node(0)).await;
        }
        let wait = || {
            let pool = pool.clone();
            tokio::spawn(async move { pool.get().await })
        };
        let waiting = [wait(), wait()];
        cluster.promote(Node(1)).await;
        for waits in waiting {
            let next = timeout(PATIENCE, waits).await.expect("nobody dials for it").unwrap().unwrap();
            next.batch_execute("SELECT 1").await.unwrap();
        }
    }
}

/// With hooks of the user's own: one for each new connection, one for each that is handed out again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_built_by_hand_runs_its_own_hooks_across_a_failover() {
    let cluster = Cluster::start().await;
    let manager = Pool::builder(cluster.url_hosts()).unwrap().build_manager().unwrap();
    let reused = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&reused);
    let pool = deadpool::managed::Pool::<Manager>::builder(manager)
        .max_size(2)
        .runtime(deadpool::Runtime::Tokio1)
        .wait_timeout(Some(PATIENCE))
        .create_timeout(Some(PATIENCE))
        .post_create(Hook::async_fn(|connection: &mut Connection, _| {
            Box::pin(async move {
                let set = connection.batch_execute("SET search_path = shop").await;
                set.map_err(|error| HookError::Backend(error.into()))
            })
        }))
        .pre_recycle(Hook::sync_fn(move |connection: &mut Connection, _| {
            counter.fetch_add(1, Ordering::SeqCst);
            if connection.is_closed() { Err(HookError::message("ended")) } else { Ok(()) }
        }))
        .build()
        .unwrap();
    let search_path = async || {
        let connection = pool.get().await.unwrap();
        connection.query_one("SHOW search_path", &[]).await.unwrap().get::<_, String>(0)
    };
    assert_eq!(search_path().await, "shop");
    assert_eq!(search_path().await, "shop");
    assert_eq!(reused.load(Ordering::SeqCst), 1, "the second checkout was of the first one's connection");

    cluster.kill(Node(0)).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    assert_eq!(search_path().await, "shop", "the hook has run on the new primary");
    assert!(pool.status().size <= 2);
}
