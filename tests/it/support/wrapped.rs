//! The pools that can be wrapped, deadpool's and bb8's: one suite runs over both.

use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use testbed::{Cluster, eventually};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_failover::deadpool::managed::{self, Hook, HookError, Metrics, Object, RecycleResult};
use tokio_postgres_failover::session::SessionClient;
use tokio_postgres_failover::{Pool, WrapBuilder, deadpool_postgres};

use super::load::LONG;

/// Runs a test over each kind of pool, one after the other.
macro_rules! over_each_kind {
    ($test:ident $(($($argument:expr),*))?) => {{
        println!("deadpool:");
        $test::<crate::support::wrapped::Deadpool>($($($argument),*)?).await;
        #[cfg(feature = "bb8")]
        {
            println!("bb8:");
            $test::<crate::support::wrapped::Bb8>($($($argument),*)?).await;
        }
    }};
}
pub(crate) use over_each_kind;

/// How a pool is built that gets wrapped.
pub(crate) struct Setup {
    pub(crate) max_size: u32,
    /// The longest wait for a connection that is free.
    pub(crate) wait: Option<Duration>,
    /// What each new session runs first.
    pub(crate) hook: Option<&'static str>,
    /// Each connection is tested before it is lent.
    pub(crate) tested: bool,
}

impl Setup {
    pub(crate) fn of(max_size: u32) -> Self {
        Self { max_size, wait: None, hook: None, tested: false }
    }
}

/// A kind of pool that can be wrapped.
pub(crate) trait Kind: 'static {
    /// With the manager that everybody takes.
    type Usual: Existing<Made = deadpool_postgres::ClientWrapper>;
    /// With a manager of a test's own.
    type Own: Existing;

    fn usual(url: &str, setup: Setup) -> Self::Usual;

    fn own(manager: Follows, max_size: u32) -> Self::Own;

    /// As the documentation has it, with every host in the URL.
    fn over(cluster: &Cluster, max_size: u32) -> Self::Usual {
        let url = format!("{}?target_session_attrs=read-write&connect_timeout=1", cluster.url_hosts());
        Self::usual(&url, Setup::of(max_size))
    }

    /// A pool whose manager leads to the primary.
    fn followed(cluster: &Cluster, max_size: u32) -> (Follows, Self::Own) {
        let manager = Follows::new(cluster);
        (manager.clone(), Self::own(manager, max_size))
    }
}

/// A pool that its owner built.
pub(crate) trait Existing: Clone + Send + Sync + 'static {
    type Made: SessionClient;

    fn wrap(&self) -> WrapBuilder<Self::Made>;

    /// A connection for the owner.
    fn lend(&self) -> impl Future<Output = Option<Owned>> + Send;

    fn size(&self) -> usize;

    /// A connection for the owner, whose configuration may give up after a second.
    async fn owned(&self) -> Owned {
        let mut owned = None;
        eventually("the owner has a connection", LONG, async || {
            owned = self.lend().await;
            owned.is_some()
        })
        .await;
        owned.unwrap()
    }
}

/// What the owner's pool has lent to its owner.
pub(crate) struct Owned(Box<dyn AsClient>);

impl Deref for Owned {
    type Target = Client;

    fn deref(&self) -> &Client {
        self.0.client()
    }
}

trait AsClient: Send + Sync {
    fn client(&self) -> &Client;
}

impl<M> AsClient for Object<M>
where
    M: managed::Manager + 'static,
    M::Type: SessionClient,
{
    fn client(&self) -> &Client {
        let made: &M::Type = self;
        made
    }
}

pub(crate) struct Deadpool;

impl Kind for Deadpool {
    type Usual = deadpool_postgres::Pool;
    type Own = managed::Pool<Follows>;

    fn usual(url: &str, setup: Setup) -> Self::Usual {
        let recycling_method = if setup.tested {
            deadpool_postgres::RecyclingMethod::Verified
        } else {
            deadpool_postgres::RecyclingMethod::Fast
        };
        let config = deadpool_postgres::ManagerConfig { recycling_method };
        let manager = deadpool_postgres::Manager::from_config(url.parse().unwrap(), NoTls, config);
        let mut builder = deadpool_postgres::Pool::builder(manager)
            .max_size(setup.max_size as usize)
            .runtime(deadpool_postgres::Runtime::Tokio1)
            .wait_timeout(setup.wait);
        if let Some(sql) = setup.hook {
            builder = builder.post_create(Hook::async_fn(move |client: &mut deadpool_postgres::ClientWrapper, _| {
                Box::pin(async move { client.batch_execute(sql).await.map_err(HookError::Backend) })
            }));
        }
        builder.build().unwrap()
    }

    fn own(manager: Follows, max_size: u32) -> Self::Own {
        managed::Pool::builder(manager).max_size(max_size as usize).build().unwrap()
    }
}

impl<M> Existing for managed::Pool<M>
where
    M: managed::Manager + 'static,
    M::Type: SessionClient,
    M::Error: std::error::Error + Send + Sync + 'static,
{
    type Made = M::Type;

    fn wrap(&self) -> WrapBuilder<M::Type> {
        Pool::wrap(self.clone())
    }

    async fn lend(&self) -> Option<Owned> {
        self.get().await.ok().map(|object| Owned(Box::new(object)))
    }

    fn size(&self) -> usize {
        self.status().size
    }
}

#[cfg(feature = "bb8")]
pub(crate) use of_bb8::Bb8;

#[cfg(feature = "bb8")]
mod of_bb8 {
    use bb8_postgres::PostgresConnectionManager;
    use tokio_postgres_failover::bb8::{self, CustomizeConnection, ManageConnection, PooledConnection};

    use super::*;

    pub(crate) struct Bb8;

    impl Kind for Bb8 {
        type Usual = Wrappable<PostgresConnectionManager<NoTls>>;
        type Own = Wrappable<Follows>;

        fn usual(url: &str, setup: Setup) -> Self::Usual {
            let manager = PostgresConnectionManager::new(url.parse().unwrap(), NoTls);
            let mut builder = builder(setup.max_size).test_on_check_out(setup.tested);
            if let Some(wait) = setup.wait {
                builder = builder.connection_timeout(wait);
            }
            if let Some(sql) = setup.hook {
                builder = builder.connection_customizer(Box::new(Runs(sql)));
            }
            Wrappable(builder.build_unchecked(manager))
        }

        fn own(manager: Follows, max_size: u32) -> Self::Own {
            Wrappable(builder(max_size).build_unchecked(manager))
        }
    }

    /// As the documentation has it.
    fn builder<M: ManageConnection>(max_size: u32) -> bb8::Builder<M> {
        bb8::Pool::builder().max_size(max_size).test_on_check_out(false).retry_connection(false)
    }

    pub(crate) struct Wrappable<M: ManageConnection>(bb8::Pool<M>);

    impl<M: ManageConnection> Clone for Wrappable<M> {
        fn clone(&self) -> Self {
            Self(self.0.clone())
        }
    }

    impl<M> Existing for Wrappable<M>
    where
        M: ManageConnection<Connection = Client>,
        M::Error: std::error::Error + Send + Sync + 'static,
    {
        type Made = deadpool_postgres::ClientWrapper;

        fn wrap(&self) -> WrapBuilder {
            Pool::wrap_bb8(self.0.clone())
        }

        async fn lend(&self) -> Option<Owned> {
            self.0.get_owned().await.ok().map(|connection| Owned(Box::new(connection)))
        }

        fn size(&self) -> usize {
            self.0.state().connections as usize
        }
    }

    impl<M: ManageConnection<Connection = Client>> AsClient for PooledConnection<'static, M> {
        fn client(&self) -> &Client {
            self
        }
    }

    #[derive(Debug)]
    struct Runs(&'static str);

    impl CustomizeConnection<Client, tokio_postgres::Error> for Runs {
        fn on_acquire<'a>(
            &'a self,
            client: &'a mut Client,
        ) -> std::pin::Pin<Box<dyn Future<Output = Result<(), tokio_postgres::Error>> + Send + 'a>> {
            Box::pin(client.batch_execute(self.0))
        }
    }

    impl ManageConnection for Follows {
        type Connection = Client;
        type Error = tokio_postgres::Error;

        async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
            // Its driver goes on when the client is dropped, as that of `bb8_postgres` does.
            self.dial().await.map(|(client, _)| client)
        }

        async fn is_valid(&self, client: &mut Client) -> Result<(), tokio_postgres::Error> {
            client.simple_query("").await.map(drop)
        }

        fn has_broken(&self, client: &mut Client) -> bool {
            client.is_closed()
        }
    }
}

/// What a manager of the user's own makes; it is no `ClientWrapper`.
pub(crate) struct Plain {
    client: Client,
    driver: JoinHandle<()>,
}

impl Deref for Plain {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Plain {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Connects to where it is told to, as a service's registry would.
#[derive(Clone)]
pub(crate) struct Follows {
    to: Arc<Mutex<SocketAddr>>,
    pub(crate) panics: Arc<AtomicBool>,
    pub(crate) lets_all_pass: Arc<AtomicBool>,
    pub(crate) begun: Arc<AtomicUsize>,
    pub(crate) made: Arc<AtomicUsize>,
    pub(crate) detached: Arc<AtomicUsize>,
}

impl Follows {
    fn new(cluster: &Cluster) -> Self {
        Self {
            to: Arc::new(Mutex::new(cluster.socket_addr(cluster.primary()))),
            panics: Arc::default(),
            lets_all_pass: Arc::default(),
            begun: Arc::default(),
            made: Arc::default(),
            detached: Arc::default(),
        }
    }

    pub(crate) fn lead_to(&self, address: SocketAddr) {
        *self.to.lock().unwrap() = address;
    }

    async fn dial(&self) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        let to = *self.to.lock().unwrap();
        self.begun.fetch_add(1, Ordering::Relaxed);
        assert!(!self.panics.load(Ordering::Relaxed), "as the test wants it");
        let mut config = Config::new();
        config.user("app").dbname("app").hostaddr(to.ip()).port(to.port());
        let (client, connection) = config.connect(NoTls).await?;
        self.made.fetch_add(1, Ordering::Relaxed);
        Ok((client, tokio::spawn(async move { drop(connection.await) })))
    }
}

impl managed::Manager for Follows {
    type Type = Plain;
    type Error = tokio_postgres::Error;

    async fn create(&self) -> Result<Plain, tokio_postgres::Error> {
        self.dial().await.map(|(client, driver)| Plain { client, driver })
    }

    async fn recycle(&self, client: &mut Plain, _: &Metrics) -> RecycleResult<tokio_postgres::Error> {
        if client.is_closed() && !self.lets_all_pass.load(Ordering::Relaxed) {
            Err(managed::RecycleError::message("closed"))
        } else {
            Ok(())
        }
    }

    fn detach(&self, _: &mut Plain) {
        self.detached.fetch_add(1, Ordering::Relaxed);
    }
}
