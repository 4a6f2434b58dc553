//! Passwords and certificates that change while the pool runs: each new session uses what the user's provider gives
//! then.

use std::error::Error as StdError;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testbed::{Cluster, Node, eventually};
use tokio::time::{sleep, timeout};
use tokio_postgres::tls::{MakeTlsConnect, NoTls, NoTlsStream};
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Client, Error, Pool, PoolBuilder, tokio_postgres};

use crate::support::{PATIENCE, stalls};

/// The default deadline is thirty seconds: what ends before this did not wait for it.
const AT_ONCE: Duration = Duration::from_secs(3);

/// What the provider does when it is asked.
#[derive(Clone)]
enum Says {
    Password(&'static str),
    Sealed,
    Nothing,
    /// Answers once it is to say something else.
    Waits,
    Panics,
}

#[derive(Debug, thiserror::Error)]
#[error("the vault is sealed")]
struct Sealed(#[source] io::Error);

/// A store of secrets, as a provider asks one.
#[derive(Clone)]
struct Vault(Arc<Inner>);

struct Inner {
    says: Mutex<Says>,
    asked: AtomicUsize,
    /// Questions whose future was dropped, answered or not, are in `asked` and not in here.
    open: AtomicUsize,
}

impl Vault {
    fn new(says: Says) -> Self {
        Self(Arc::new(Inner { says: Mutex::new(says), asked: AtomicUsize::new(0), open: AtomicUsize::new(0) }))
    }

    fn says(&self, says: Says) {
        *self.0.says.lock().unwrap() = says;
    }

    fn asked(&self) -> usize {
        self.0.asked.load(Ordering::SeqCst)
    }

    fn open(&self) -> usize {
        self.0.open.load(Ordering::SeqCst)
    }

    async fn password(self) -> Result<String, Box<dyn StdError + Send + Sync>> {
        struct Open<'a>(&'a AtomicUsize);
        impl Drop for Open<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        self.0.open.fetch_add(1, Ordering::SeqCst);
        let _open = Open(&self.0.open);
        let mut says = self.0.says.lock().unwrap().clone();
        while matches!(says, Says::Waits) {
            sleep(Duration::from_millis(10)).await;
            says = self.0.says.lock().unwrap().clone();
        }
        match says {
            Says::Password(password) => Ok(password.to_owned()),
            Says::Sealed => Err(Sealed(io::Error::other("no quorum\nof key holders")).into()),
            Says::Nothing | Says::Waits => std::future::pending().await,
            Says::Panics => panic!("the provider has a bug"),
        }
    }

    fn builder(&self, cluster: &Cluster) -> PoolBuilder {
        let hosts: Vec<_> = cluster.nodes().into_iter().map(|node| cluster.socket_addr(node).to_string()).collect();
        let vault = self.clone();
        Pool::builder(format!("postgres://app@{}/app", hosts.join(",")))
            .unwrap()
            .password_provider(move || vault.clone().password())
    }
}

/// Opens no session but those that its callers and the heartbeat need, however slow the machine is.
fn undisturbed(builder: PoolBuilder) -> PoolBuilder {
    let builder = builder.patrol_interval(30 * PATIENCE).test_idle_after(Duration::MAX);
    builder.heartbeat_timeout(PATIENCE).probe_timeout(PATIENCE)
}

async fn one_node() -> Cluster {
    Cluster::builder().nodes(1).password("first").start().await
}

async fn rotate(cluster: &Cluster, password: &str) {
    let owner = cluster.direct(Node(0)).await;
    owner.batch_execute(&format!("ALTER ROLE app PASSWORD '{password}'")).await.unwrap();
}

async fn works(client: &Client) {
    client.batch_execute("SELECT 1").await.unwrap();
}

/// The sessions of the pool on the server: those of its callers, and its own.
async fn sessions(cluster: &Cluster) -> usize {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    let count: i64 = cluster.direct(Node(0)).await.query_one(sql, &[]).await.unwrap().get(0);
    usize::try_from(count).unwrap()
}

fn lacks_nothing(error: &Error, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
}

/// C10: after a rotation new sessions give the new password and old ones live on; each session asks once.
#[tokio::test]
async fn c10_new_sessions_give_the_password_of_the_moment() {
    let cluster = one_node().await;
    let vault = Vault::new(Says::Password("first"));
    let pool = undisturbed(vault.builder(&cluster)).build().unwrap();
    let old = pool.get().await.unwrap();
    eventually("the heart-beat has its session", PATIENCE, async || sessions(&cluster).await == 2).await;
    rotate(&cluster, "second").await;
    vault.says(Says::Password("second"));
    let (one, two) = (pool.get().await.unwrap(), pool.get().await.unwrap());
    for client in [&old, &one, &two] {
        works(client).await;
        assert_eq!(client.generation(), old.generation());
    }
    // Three of ours, and the heartbeat's; none was ever closed.
    assert_eq!((vault.asked(), sessions(&cluster).await), (4, 4));
    // An idle connection needs no password.
    drop(one);
    works(&pool.get().await.unwrap()).await;
    assert_eq!(vault.asked(), 4);
}

/// C10: the provider is behind the server: callers wait instead of failing, and the open connections are used
/// meanwhile.
#[tokio::test]
async fn c10_a_rotation_under_way_is_waited_for() {
    let cluster = one_node().await;
    let vault = Vault::new(Says::Password("first"));
    let pool = undisturbed(vault.builder(&cluster)).build().unwrap();
    let old = pool.get().await.unwrap();
    eventually("the heart-beat has its session", PATIENCE, async || sessions(&cluster).await == 2).await;
    rotate(&cluster, "second").await;
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await }
    });
    let before = vault.asked();
    eventually("the provider is asked again and again", PATIENCE, async || vault.asked() >= before + 3).await;
    works(&old).await;
    let view = pool.status().view;
    assert!(matches!(view.state, State::Primary { .. }), "{view:?}");
    assert!(!waits.is_finished());
    vault.says(Says::Password("second"));
    // It is tried once a second.
    let new = timeout(PATIENCE, waits).await.unwrap().unwrap().unwrap();
    assert_eq!(new.generation(), old.generation());
}

/// C10: whoever never gave the right password is told at once, and let in when it does.
#[tokio::test]
async fn c10_a_password_that_was_never_right_is_refused_at_once() {
    let cluster = one_node().await;
    let vault = Vault::new(Says::Password("wrong"));
    let pool = vault.builder(&cluster).build().unwrap();
    let began = stalls::now();
    let error = pool.get().await.unwrap_err();
    assert!(began.elapsed() < AT_ONCE + stalls::slack_since(began), "{:?}", began.elapsed());
    assert!(matches!(error, Error::Refused(_)), "{error:?}");
    lacks_nothing(&error, &["28P01", "check user, password"]);
    vault.says(Says::Password("first"));
    eventually("the same pool works now", PATIENCE, async || pool.get().await.is_ok()).await;
}

/// C10: a provider that fails is named with its reason; what is open is used meanwhile.
#[tokio::test]
async fn c10_a_failing_provider_is_named() {
    let cluster = one_node().await;
    for (says, words) in [
        (Says::Sealed, "the password provider failed: the vault is sealed: no quorum of key holders"),
        (Says::Panics, "the password provider panicked"),
        (Says::Nothing, "the password provider gave no password within 750ms"),
    ] {
        let vault = Vault::new(says.clone());
        let limit = Duration::from_secs(1);
        let builder = || undisturbed(vault.builder(&cluster)).probe_timeout(limit).checkout_timeout(limit * 2);
        let none_yet = builder().build().unwrap();
        let error = tells(&none_yet, words).await;
        assert!(matches!(&error, Error::Unavailable(u) if u.reason() == UnavailableReason::NoPrimary), "{error:?}");
        lacks_nothing(&error, &[words, &cluster.socket_addr(Node(0)).to_string()]);
        drop(none_yet);

        vault.says(Says::Password("first"));
        let pool = builder().build().unwrap();
        let held = pool.get_within(PATIENCE).await.unwrap();
        eventually("the heart-beat has its session", PATIENCE, async || sessions(&cluster).await == 2).await;
        vault.says(says);
        let error = tells(&pool, words).await;
        let Error::Unavailable(unavailable) = &error else { panic!("{error:?}") };
        assert_eq!(unavailable.reason(), UnavailableReason::NoSession, "{error}");
        lacks_nothing(&error, &[words]);
        let mut link: Option<&(dyn StdError + 'static)> = Some(&error);
        while let Some(error) = link.filter(|error| !error.is::<Sealed>()) {
            link = error.source();
        }
        assert_eq!(link.is_some(), words.contains("sealed"), "{error:?}");
        works(&held).await;
        drop(held);
        works(&pool.get_within(PATIENCE).await.unwrap()).await;
    }
}

/// The error of a call that nobody can serve. A slow machine may not get to the provider's answer within the time of
/// the first call.
async fn tells(pool: &Pool, words: &str) -> Error {
    let mut error = pool.get().await.unwrap_err();
    let began = Instant::now();
    while !error.to_string().contains(words) && began.elapsed() < PATIENCE {
        error = pool.get().await.unwrap_err();
    }
    error
}

/// C10: not to ask a server is not its silence: although the pool cannot ask the primary for longer than `dead_after`,
/// no connection is ended, and the same generation goes on when the provider works again.
#[tokio::test]
async fn c10_a_provider_that_is_away_ends_no_connection() {
    let cluster = one_node().await;
    let vault = Vault::new(Says::Password("first"));
    // Wide limits: on a busy machine an opening that is too slow would be the server's silence.
    let (limit, dead_after) = (Duration::from_secs(2), Duration::from_secs(3));
    let builder = vault.builder(&cluster).heartbeat_interval(Duration::from_millis(100));
    let builder = builder.heartbeat_timeout(limit).probe_timeout(limit).dead_after(dead_after);
    let pool = builder.checkout_timeout(dead_after + limit).build().unwrap();
    let held = pool.get().await.unwrap();
    let mine: i32 = held.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    eventually("the heart-beat has its session", PATIENCE, async || sessions(&cluster).await == 2).await;
    let owner = cluster.direct(Node(0)).await;
    for away in [Says::Sealed, Says::Nothing, Says::Password("wrong")] {
        vault.says(away);
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app' AND pid <> $1";
        eventually("it is searched for", PATIENCE, async || {
            // One that was being opened with the old password may come late.
            owner.execute(sql, &[&mine]).await.unwrap();
            matches!(pool.status().view.state, State::Searching { .. })
        })
        .await;
        let error = pool.get().await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        works(&held).await;
        vault.says(Says::Password("first"));
        // A password that was refused is tried again once a second.
        let another = pool.get_within(PATIENCE).await.unwrap();
        assert_eq!(another.generation(), held.generation());
    }
}

/// C10: a provider that does not answer holds up those alone who need a new session, and no longer than their deadline.
#[tokio::test]
async fn c10_a_slow_provider_stalls_nobody_else() {
    let cluster = one_node().await;
    let vault = Vault::new(Says::Password("first"));
    let deadline = Duration::from_secs(2);
    // The provider has three quarters of this.
    let builder = undisturbed(vault.builder(&cluster)).probe_timeout(Duration::from_secs(2));
    let pool = builder.checkout_timeout(deadline).build().unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(pool.get_within(PATIENCE).await.unwrap());
    }
    eventually("the heart-beat has its session", PATIENCE, async || sessions(&cluster).await == 4).await;
    vault.says(Says::Nothing);
    let began = stalls::now();
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await }
    });
    eventually("the provider is asked", PATIENCE, async || vault.open() > 0).await;
    // Who waits takes one of these, when the provider has been given up; the other is for those who come meanwhile.
    held.truncate(1);
    loop {
        let asked = Instant::now();
        works(&held[0]).await;
        pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(1) + stalls::slack_since(asked), "{took:?}");
        if waits.is_finished() {
            break;
        }
    }
    let waited = waits.await.unwrap();
    let (took, slack) = (began.elapsed(), stalls::slack_since(began));
    assert!(took < deadline + Duration::from_secs(1) + slack, "{took:?}");
    assert!(waited.is_ok() || matches!(waited, Err(Error::Unavailable(_))), "{waited:?}");
}

/// C10: a dropped `get` leaves the question to the provider under way, whose session is the next caller's; the end of
/// the pool drops it.
#[tokio::test]
async fn c10_a_dropped_get_leaves_the_providers_future_to_the_pool() {
    let cluster = one_node().await;
    let vault = Vault::new(Says::Password("first"));
    let pool = undisturbed(vault.builder(&cluster)).build().unwrap();
    let held = pool.get().await.unwrap();
    eventually("the heart-beat has its session", PATIENCE, async || sessions(&cluster).await == 2).await;
    let give_up = async || {
        let (asked, open) = (vault.asked(), vault.open());
        vault.says(Says::Waits);
        let waits = tokio::spawn({
            let pool = pool.clone();
            async move { pool.get().await.map(drop) }
        });
        eventually("the provider is asked", PATIENCE, async || vault.open() == open + 1).await;
        waits.abort();
        assert!(waits.await.unwrap_err().is_cancelled());
        assert_eq!((vault.asked(), vault.open()), (asked + 1, open + 1));
        asked + 1
    };
    let asked = give_up().await;
    vault.says(Says::Password("first"));
    let another = pool.get().await.unwrap();
    assert_eq!(another.generation(), held.generation());
    assert_eq!((vault.asked(), vault.open(), pool.status().size), (asked, 0, 2));

    give_up().await;
    pool.close();
    eventually("the pool drops the provider's future", PATIENCE, async || vault.open() == 0).await;
}

/// C10: the recipe of docs/tuning.md for a file: it is replaced as an orchestrator does it, and read for the next
/// session.
#[tokio::test]
async fn c10_a_password_file_is_read_anew() {
    let cluster = one_node().await;
    let file = cluster.folder().join("password");
    let write = |password: &str| {
        let new = file.with_extension("new");
        std::fs::write(&new, password).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    write("first\n");
    let path = file.clone();
    let pool = Pool::builder(format!("postgres://app@{}/app", cluster.socket_addr(Node(0))))
        .unwrap()
        .password_provider(move || {
            let path = path.clone();
            async move { Ok(tokio::fs::read_to_string(path).await?.trim_end().to_owned()) }
        })
        .build()
        .unwrap();
    let old = pool.get().await.unwrap();
    rotate(&cluster, "second").await;
    write("second\n");
    works(&pool.get().await.unwrap()).await;
    works(&old).await;
    assert_eq!(pool.status().size, 2);
}

/// What a cloud gives: a password that is good for a while, and how long that is.
#[derive(Clone)]
struct Token {
    secret: String,
    good_until: tokio::time::Instant,
}

/// C10: the recipe of docs/tuning.md for tokens: one is kept while it is good, whatever the number of sessions.
#[tokio::test]
async fn c10_a_token_is_kept_while_it_is_good() {
    let cluster = one_node().await;
    let (issued, lifetime) = (Arc::new(AtomicUsize::new(0)), Duration::from_secs(900));
    let kept: Arc<tokio::sync::Mutex<Option<Token>>> = Arc::default();
    let (count, cache) = (Arc::clone(&issued), Arc::clone(&kept));
    let pool = Pool::builder(format!("postgres://app@{}/app", cluster.socket_addr(Node(0))))
        .unwrap()
        .password_provider(move || {
            let (count, cache) = (Arc::clone(&count), Arc::clone(&cache));
            async move {
                let mut kept = cache.lock().await;
                let margin = tokio::time::Instant::now() + Duration::from_secs(60);
                if let Some(token) = kept.as_ref().filter(|token| token.good_until > margin) {
                    return Ok(token.secret.clone());
                }
                let secret = ["first", "second"][count.fetch_add(1, Ordering::SeqCst)].to_owned();
                *kept = Some(Token { secret: secret.clone(), good_until: tokio::time::Instant::now() + lifetime });
                Ok(secret)
            }
        })
        .build()
        .unwrap();
    let held = [pool.get().await.unwrap(), pool.get().await.unwrap(), pool.get().await.unwrap()];
    assert_eq!(issued.load(Ordering::SeqCst), 1);
    rotate(&cluster, "second").await;
    if let Some(token) = kept.lock().await.as_mut() {
        token.good_until = tokio::time::Instant::now();
    }
    works(&pool.get().await.unwrap()).await;
    works(&held[0]).await;
    assert_eq!(issued.load(Ordering::SeqCst), 2);
}

/// C10: a password in both places: which one is meant cannot be known.
#[tokio::test]
async fn c10_a_provider_beside_a_password_is_refused() {
    let builder = Pool::builder("postgres://app:secret@localhost/app").unwrap();
    let error = builder.password_provider(|| async { Ok("other") }).build().unwrap_err().to_string();
    assert!(error.contains("password_provider") && error.contains("remove one of them"), "{error}");
    assert!(!error.contains("secret"), "{error}");
}

/// Counts how often it was asked for a connection, as one that reloads its certificates is.
#[derive(Clone)]
struct Reloads(Arc<AtomicUsize>);

impl<S> MakeTlsConnect<S> for Reloads {
    type Stream = NoTlsStream;
    type TlsConnect = NoTls;
    type Error = tokio_postgres::Error;

    fn make_tls_connect(&mut self, _: &str) -> Result<NoTls, tokio_postgres::Error> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(NoTls)
    }
}

/// C10: the connector is asked for each new session, so that it may take a new certificate.
#[tokio::test]
async fn c10_a_connector_is_asked_for_each_session() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let builder = undisturbed(Pool::builder(cluster.url_hosts()).unwrap());
    let pool = builder.tls(Reloads(Arc::clone(&asked))).build().unwrap();
    let _held = [pool.get().await.unwrap(), pool.get().await.unwrap(), pool.get().await.unwrap()];
    eventually("the heart-beat has its session", PATIENCE, async || sessions(&cluster).await == 4).await;
    assert_eq!(asked.load(Ordering::SeqCst), 4);
}

/// A connector without a certificate to give.
#[derive(Clone)]
struct Expired;

impl<S> MakeTlsConnect<S> for Expired {
    type Stream = NoTlsStream;
    type TlsConnect = NoTls;
    type Error = io::Error;

    fn make_tls_connect(&mut self, _: &str) -> Result<NoTls, io::Error> {
        Err(io::Error::other("the certificate has expired"))
    }
}

/// C10: a connector that fails is named, also where the server would not have encrypted.
#[tokio::test]
async fn c10_a_failing_connector_is_named() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = Pool::builder(cluster.url_hosts()).unwrap().tls(Expired).build().unwrap();
    let error = pool.get_within(AT_ONCE).await.unwrap_err();
    lacks_nothing(&error, &["the certificate has expired"]);
}
