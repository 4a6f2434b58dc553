//! The end of a runtime, and panics in what a program plugs in: told, contained, and never a hang.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use testbed::{Authority, Cluster, Node, eventually};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_postgres::tls::{MakeTlsConnect, NoTlsStream, TlsConnect};
use tokio_postgres::{NoTls, Socket};
use tokio_postgres_failover::listen::Message;
use tokio_postgres_failover::resolve::{Addresses, BoxFuture, Resolve, ResolveError};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{BuildError, Error, Pool, deadpool, deadpool_postgres};

use crate::support::PATIENCE;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A server, on a runtime of its own that outlives the others.
struct Bench {
    own: Runtime,
    cluster: Cluster,
}

impl Bench {
    fn new() -> Self {
        let own = runtime();
        let cluster = own.block_on(Cluster::builder().nodes(1).start());
        Self { own, cluster }
    }

    fn pool_on(&self, runtime: &Runtime) -> Pool {
        runtime.block_on(async {
            let pool = Pool::builder(self.cluster.url_hosts()).unwrap().build().unwrap();
            pool.connect().await.unwrap();
            pool
        })
    }
}

fn says_so(error: &Error) {
    assert!(matches!(error, Error::RuntimeEnded), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("runtime") && text.contains("#[tokio::test]"), "{text}");
}

/// Polls to the end without any runtime, and within the test's patience.
fn without_a_runtime<T: Send>(future: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let (done, wait) = mpsc::channel();
        scope.spawn(move || drop(done.send(futures_util::FutureExt::now_or_never(future))));
        wait.recv_timeout(PATIENCE).expect("no hang").expect("it does not wait")
    })
}

/// A pool in a static across several `#[tokio::test]`s: every call of the second one says what has happened, on another
/// runtime and on none.
#[test]
fn every_call_tells_that_the_runtime_has_ended() {
    let bench = Bench::new();
    let first = runtime();
    let pool = bench.pool_on(&first);
    let (mut events, mut views) = (pool.subscribe(), pool.watch());
    let held = first.block_on(pool.get()).unwrap();
    drop(first);

    let second = runtime();
    second.block_on(async {
        let bounded = async {
            says_so(&pool.get().await.unwrap_err());
            says_so(&pool.get_within(Duration::from_secs(1)).await.unwrap_err());
            says_so(&pool.connect().await.unwrap_err());
            says_so(&pool.listen(["orders"]).await.unwrap_err());
            says_so(&pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap_err());
            says_so(&pool.read(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap_err());
            assert!(held.query_one("SELECT 1", &[]).await.is_err());
            while events.next().await.is_some() {}
            while views.changed().await.is_ok() {}
        };
        timeout(PATIENCE, bounded).await.expect("no hang");
    });
    let view = pool.status().view;
    assert!(matches!(view.state, State::Closed), "{view:?}");
    assert!(view.changed.why.contains("runtime"), "{}", view.changed.why);
    says_so(&without_a_runtime(pool.get()).unwrap_err());
    says_so(&without_a_runtime(pool.connect()).unwrap_err());
    says_so(&without_a_runtime(pool.listen(["orders"])).unwrap_err());
    drop(held);
    pool.close();
    let _ = (pool.candidates(), pool.dns_failure(), pool.status());
}

/// Callers that wait on one runtime when the pool's own ends are told.
#[test]
fn a_waiting_caller_is_told_that_the_pools_runtime_has_ended() {
    let bench = Bench::new();
    let (first, second) = (runtime(), runtime());
    let pool = first.block_on(async { Pool::builder(bench.cluster.url_hosts()).unwrap().max_size(1).build().unwrap() });
    let held = second.block_on(pool.get()).unwrap();
    bench.own.block_on(async {
        bench.cluster.kill(Node(0)).await;
        eventually("its connection has ended", PATIENCE, async || held.is_closed()).await;
    });
    let waiting = second.spawn({
        let pool = pool.clone();
        async move { pool.get().await.map(drop) }
    });
    bench.own.block_on(eventually("a caller waits", PATIENCE, async || pool.status().waiting == 1));
    drop(held);
    std::thread::sleep(Duration::from_millis(200));
    drop(first);
    let told = second.block_on(async { timeout(PATIENCE, waiting).await });
    says_so(&told.expect("no hang").unwrap().unwrap_err());
}

/// So are those that wait for a slot, because all connections are checked out.
#[test]
fn a_caller_that_waits_for_a_slot_is_told_that_the_pools_runtime_has_ended() {
    let bench = Bench::new();
    let (first, second) = (runtime(), runtime());
    let pool = first.block_on(async { Pool::builder(bench.cluster.url_hosts()).unwrap().max_size(1).build().unwrap() });
    let held = second.block_on(pool.get()).unwrap();
    let waiting = second.spawn({
        let pool = pool.clone();
        async move { pool.get_within(PATIENCE * 2).await.map(drop) }
    });
    while pool.status().waiting == 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(first);
    let told = second.block_on(async { timeout(PATIENCE, waiting).await });
    says_so(&told.expect("no hang").unwrap().unwrap_err());
    drop(held);
}

/// The runtime that called `listen` ends, and the pool's does not: the listener goes on.
#[test]
fn a_listener_outlives_the_runtime_that_called_listen() {
    let bench = Bench::new();
    let (pools, callers) = (runtime(), runtime());
    let pool = bench.pool_on(&pools);
    let mut listener = callers.block_on(pool.listen(["orders"])).unwrap();
    drop(callers);
    pools.block_on(async {
        let heard = async {
            loop {
                pool.get().await.unwrap().batch_execute("NOTIFY orders, '1'").await.unwrap();
                match timeout(Duration::from_millis(200), listener.recv()).await {
                    Ok(Some(Ok(Message::Notification(_)))) => return,
                    Ok(None) => panic!("it has ended"),
                    _ => {}
                }
            }
        };
        timeout(PATIENCE, heard).await.expect("it hears");
        pool.close();
        let ends = async { while listener.recv().await.is_some() {} };
        timeout(PATIENCE, ends).await.expect("it ends with the pool");
    });
}

/// The pool's runtime ends under a listener that somebody else reads.
#[test]
fn a_listener_ends_with_the_runtime_of_its_pool() {
    let bench = Bench::new();
    let first = runtime();
    let pool = bench.pool_on(&first);
    let mut listener = first.block_on(pool.listen(["orders"])).unwrap();
    drop(first);
    pool.close();
    let (told, ended) = bench.own.block_on(async {
        let read = async { (listener.recv().await, listener.recv().await) };
        timeout(PATIENCE, read).await.expect("no hang")
    });
    assert!(told.as_ref().is_none_or(|told| matches!(told, Err(Error::RuntimeEnded))), "{told:?}");
    assert!(ended.is_none(), "{ended:?}");
}

/// Panics while `armed`.
#[derive(Clone)]
struct Panics {
    armed: Arc<AtomicBool>,
    panicked: Arc<AtomicU64>,
}

impl Panics {
    fn new() -> Self {
        Self { armed: Arc::new(AtomicBool::new(true)), panicked: Arc::default() }
    }

    fn maybe(&self) {
        if self.armed.load(Ordering::SeqCst) {
            self.panicked.fetch_add(1, Ordering::SeqCst);
            panic!("planted");
        }
    }
}

impl MakeTlsConnect<Socket> for Panics {
    type Stream = NoTlsStream;
    type TlsConnect = Self;
    type Error = std::io::Error;

    fn make_tls_connect(&mut self, _: &str) -> Result<Self, std::io::Error> {
        self.maybe();
        Ok(self.clone())
    }
}

impl TlsConnect<Socket> for Panics {
    type Stream = NoTlsStream;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, Result<NoTlsStream, std::io::Error>>;

    fn connect(self, _: Socket) -> Self::Future {
        Box::pin(async { Err(std::io::Error::other("not today")) })
    }
}

/// A TLS connector that panics costs the session that asked for it: the pool lives, says so, and recovers.
#[tokio::test]
async fn a_panic_in_the_tls_connector_costs_one_session() {
    let certificate = Authority::new().issue(&["localhost"]);
    let cluster = Cluster::builder().nodes(1).tls(&certificate).start().await;
    let connector = Panics::new();
    let url = format!("{}?sslmode=prefer", cluster.url_hosts());
    let builder = Pool::builder(url).unwrap().tls(connector.clone());
    let pool = builder.checkout_timeout(Duration::from_secs(2)).build().unwrap();
    let error = told(&pool, "the TLS connector panicked: planted").await;
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    connector.armed.store(false, Ordering::SeqCst);
    let error = told(&pool, "not today").await;
    assert!(matches!(error, Error::Unavailable(_) | Error::Refused(_)), "{error:?}");
}

/// The error that tells this. On a busy machine a caller's time may be up before the server was asked.
async fn told(pool: &Pool, words: &str) -> Error {
    let mut told = None;
    eventually(words, PATIENCE, async || {
        let error = pool.get().await.unwrap_err();
        println!("{error}");
        let tells = error.to_string().contains(words);
        told = Some(error);
        tells
    })
    .await;
    told.unwrap()
}

impl Resolve for Panics {
    fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>> {
        self.maybe();
        Box::pin(async { Ok(Addresses::new([])) })
    }
}

/// So does a resolver, and a provider of passwords.
#[tokio::test]
async fn a_panic_in_a_resolver_or_a_password_provider_costs_one_try() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let resolver = Panics::new();
    let url = format!("postgres://app@orders.registry:{},{}/app", cluster.port(), cluster.socket_addr(Node(0)));
    let pool = Pool::builder(url).unwrap().resolver(resolver.clone()).build().unwrap();
    timeout(PATIENCE, pool.get()).await.expect("the address serves").unwrap();
    assert!(resolver.panicked.load(Ordering::SeqCst) > 0);

    let provider = Panics::new();
    let asked = provider.clone();
    let builder = Pool::builder(cluster.url_hosts()).unwrap().password_provider(move || {
        asked.maybe();
        async { Ok("unused") }
    });
    let pool = builder.checkout_timeout(Duration::from_secs(2)).build().unwrap();
    assert!(matches!(pool.get().await, Err(Error::Unavailable(_))));
    provider.armed.store(false, Ordering::SeqCst);
    pool.get_within(PATIENCE).await.expect("it recovers");
}

/// A manager of a wrapped pool that panics when it makes a connection, and when it takes one back.
struct Manager {
    inner: deadpool_postgres::Manager,
    create: Panics,
    recycle: Panics,
}

impl deadpool::managed::Manager for Manager {
    type Type = deadpool_postgres::ClientWrapper;
    type Error = tokio_postgres::Error;

    async fn create(&self) -> Result<Self::Type, Self::Error> {
        self.create.maybe();
        self.inner.create().await
    }

    async fn recycle(
        &self,
        client: &mut Self::Type,
        metrics: &deadpool::managed::Metrics,
    ) -> deadpool::managed::RecycleResult<Self::Error> {
        self.recycle.maybe();
        self.inner.recycle(client, metrics).await
    }
}

#[tokio::test]
async fn a_panic_in_a_wrapped_pools_manager_costs_one_connection() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let inner = deadpool_postgres::Manager::new(cluster.url_hosts().parse().unwrap(), NoTls);
    let (create, recycle) = (Panics::new(), Panics::new());
    let manager = Manager { inner, create: create.clone(), recycle: recycle.clone() };
    let existing = deadpool::managed::Pool::builder(manager).max_size(2).build().unwrap();
    let pool = Pool::wrap(existing).checkout_timeout(Duration::from_secs(2)).build().unwrap();
    assert!(matches!(pool.get().await, Err(Error::Unavailable(_))));
    create.armed.store(false, Ordering::SeqCst);
    drop(pool.get_within(PATIENCE).await.expect("it recovers"));
    // The idle one is given up for its panic.
    drop(pool.get_within(PATIENCE).await.expect("another one"));
    assert!(recycle.panicked.load(Ordering::SeqCst) > 0);
    create.armed.store(true, Ordering::SeqCst);
    recycle.armed.store(false, Ordering::SeqCst);
    let held = pool.get_within(PATIENCE).await.unwrap();
    assert!(matches!(pool.get_within(Duration::from_millis(500)).await, Err(Error::Unavailable(_))));
    create.armed.store(false, Ordering::SeqCst);
    pool.get_within(PATIENCE).await.expect("it recovers");
    drop(held);
}

/// A connection that is discarded on a thread without a runtime: what the server still runs for it is cancelled.
#[test]
fn what_is_discarded_outside_of_a_runtime_is_cancelled() {
    let bench = Bench::new();
    let first = runtime();
    let pool = bench.pool_on(&first);
    let client = first.block_on(pool.get()).unwrap();
    let sent = first.block_on(async { timeout(PATIENCE / 20, client.batch_execute("SELECT pg_sleep(600)")).await });
    assert!(sent.is_err());
    client.discard();
    bench.own.block_on(async {
        let observer = bench.cluster.direct(Node(0)).await;
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)' AND state = 'active'";
        eventually("it is cancelled", PATIENCE, async || {
            observer.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
    });
}

/// Writes the log, and panics at each line with this word.
#[derive(Clone)]
struct PanicsAt(&'static str);

impl std::io::Write for PanicsAt {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        assert!(!String::from_utf8_lossy(line).contains(self.0), "planted");
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A log that panics costs its line: what the pool was about to do is done, through a failover.
#[tokio::test]
async fn a_panic_in_the_log_costs_one_line() {
    for word in ["primary found", "primary lost", "connections evicted", "idle connections reaped"] {
        let cluster = Cluster::builder().nodes(2).asynchronous().start().await;
        let writer = PanicsAt(word);
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false);
        let subscriber = subscriber.with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let pool = Pool::builder(cluster.url_hosts()).unwrap().max_size(2).min_idle(2).build().unwrap();
        for of in 1..=2 {
            let held = timeout(PATIENCE, pool.get()).await.unwrap_or_else(|_| panic!("{word}: nobody is served"));
            let held = held.unwrap();
            assert_eq!(held.generation().get(), of, "{word}");
            eventually("the other one is opened", PATIENCE, async || pool.status().size == 2).await;
            if of == 1 {
                cluster.freeze(Node(0));
                cluster.promote(Node(1)).await;
                let old = timeout(PATIENCE, held.batch_execute("SELECT 1")).await;
                assert!(old.unwrap_or_else(|_| panic!("{word}: the old one goes on")).is_err());
            }
        }
    }
}

/// A log that panics when a span is copied, as often as it is told to.
struct PanicsAtCopies(AtomicU64);

impl tracing::Subscriber for PanicsAtCopies {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {}

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}

    fn clone_span(&self, id: &tracing::span::Id) -> tracing::span::Id {
        let left = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        assert!(left.is_err(), "planted");
        id.clone()
    }
}

/// A server whose question is about to be asked is asked, and so is a name.
#[tokio::test]
async fn a_panic_in_the_log_costs_no_question() {
    let cluster = Cluster::builder().nodes(2).start().await;
    for url in [cluster.url_hosts(), cluster.url()] {
        let _guard = tracing::subscriber::set_default(PanicsAtCopies(AtomicU64::new(4)));
        let pool = Pool::builder(url).unwrap().dns_servers([cluster.dns().addr()]).build().unwrap();
        drop(timeout(PATIENCE, pool.get()).await.expect("the primary is asked").unwrap());
    }
}

fn logs_to(writer: PanicsAt) -> tracing::subscriber::DefaultGuard {
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false);
    tracing::subscriber::set_default(subscriber.with_writer(move || writer.clone()).finish())
}

/// A listener outlives a panic in the log: it subscribes again, and tells of the gap.
#[tokio::test]
async fn a_panic_in_the_log_ends_no_listener() {
    for word in ["a subscription was lost", "subscribed again", "a session could not be opened"] {
        let cluster = Cluster::builder().nodes(1).start().await;
        let _guard = logs_to(PanicsAt(word));
        let pool = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
        let mut listener = pool.listen(["a"]).await.unwrap();
        cluster.kill(Node(0)).await;
        cluster.start_node(Node(0)).await;
        let mut told = timeout(PATIENCE, listener.recv()).await;
        while let Ok(Some(Err(Error::Unavailable(_)))) = told {
            told = timeout(PATIENCE, listener.recv()).await;
        }
        assert!(matches!(told, Ok(Some(Ok(Message::MayHaveGap)))), "{word}: {told:?}");
        pool.get().await.unwrap().batch_execute("NOTIFY a, 'after'").await.unwrap();
        let told = timeout(PATIENCE, listener.recv()).await;
        assert!(matches!(told, Ok(Some(Ok(Message::Notification(_))))), "{word}: {told:?}");
    }
}

/// A notice of the server, or the end of a session, is logged in the task that drives the session: a panic there costs
/// the line.
#[tokio::test]
async fn a_panic_in_the_log_ends_no_session() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let _guard = logs_to(PanicsAt("planted notice"));
    let pool = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
    let client = pool.get().await.unwrap();
    let notice = "DO $$ BEGIN RAISE WARNING 'planted notice'; END $$";
    client.batch_execute(notice).await.unwrap();
    client.batch_execute("SELECT 1").await.unwrap();
    let call = pool.transaction(async |tx| Ok(tx.batch_execute(notice).await?)).await;
    assert!(call.is_ok(), "{call:?}");
    drop(client);

    // What the server said last is known, although the line about the end is lost.
    let _guard = logs_to(PanicsAt("a session ended"));
    let client = pool.get().await.unwrap();
    client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await.unwrap_err();
    let said = client.session_end().await;
    assert!(said.as_ref().is_some_and(|said| said.code().code() == "57P01"), "{said:?}");
    drop(client);
    pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
}

/// A runtime without timers, or without sockets, cannot run a pool, which `build` says.
#[test]
fn a_runtime_that_lacks_a_driver_is_refused() {
    type Set = fn(&mut tokio::runtime::Builder) -> &mut tokio::runtime::Builder;
    let with: [(&str, Set); 3] = [
        ("enable_time", |builder| builder.enable_io()),
        ("enable_io", |builder| builder.enable_time()),
        ("enable_time", |builder| builder),
    ];
    for (lacks, set) in with {
        let runtime = set(&mut tokio::runtime::Builder::new_current_thread()).build().unwrap();
        runtime.block_on(async {
            let pool = Pool::builder("postgres://app@127.0.0.1/app").unwrap();
            let error = pool.build().map(drop).unwrap_err();
            assert!(matches!(error, BuildError::Runtime { .. }), "{error:?}");
            assert!(error.to_string().contains(lacks), "{error}");
            let manager = Pool::builder("postgres://app@127.0.0.1/app").unwrap().build_manager();
            assert!(matches!(manager.map(drop), Err(BuildError::Runtime { .. })));
            let existing = deadpool_postgres::Config {
                host: Some("127.0.0.1".into()),
                dbname: Some("app".into()),
                user: Some("app".into()),
                ..Default::default()
            };
            let wrapped = Pool::wrap(existing.create_pool(None, NoTls).unwrap()).build();
            assert!(matches!(wrapped.map(drop), Err(BuildError::Runtime { .. })));
        });
    }
}
