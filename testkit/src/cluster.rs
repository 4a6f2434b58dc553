//! The cluster, and where things are.

mod faults;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::bed::path::Path;
use crate::{ClusterBuilder, Cutter, Dns, Error, Node, Step, bed};

/// How long a dropped cluster waits for its steps to stop.
const STOPPING: Duration = Duration::from_secs(10);
/// The spare addresses below this belong to the nodes, those above to cutters.
const FIRST_CUTTER: u8 = 10;

/// A real PostgreSQL primary and its hot standbys, on loopback addresses of their own.
///
/// They have the database `app`, owned by the role `app`, which is no superuser. Clients reach each node through a port
/// of the kit's, where [`Cluster::cut`] cuts the network. The nodes reach each other directly.
///
/// Dropping the cluster ends its servers and removes its files. So does the end of the process, however it comes. When
/// the test that drops it panics, it prints the last lines of the servers' logs.
pub struct Cluster {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) bed: bed::cluster::Cluster,
    /// The port in front of each node.
    links: Vec<Path>,
    cutters: AtomicU8,
}

/// Starting, and where things are.
impl Cluster {
    /// A primary and two hot standbys; a commit waits for any one of them.
    ///
    /// # Errors
    /// As for [`ClusterBuilder::start`].
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// use tokio_postgres_failover_testkit::Cluster;
    ///
    /// let cluster = Cluster::start().await?;
    /// println!("the service under test gets {}", cluster.url());
    /// # Ok(())
    /// # }
    /// ```
    pub fn start() -> Step<Self> {
        Self::builder().start()
    }

    /// Other choices than [`Cluster::start`] makes.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// let cluster = tokio_postgres_failover_testkit::Cluster::builder().standbys(1).start().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder::new()
    }

    pub(crate) async fn launch(builder: bed::cluster::ClusterBuilder) -> Result<Self, Error> {
        let bed = builder.try_start().await?;
        let mut links = Vec::new();
        for (spare, node) in (0..).zip(bed.nodes()) {
            let listen = SocketAddr::new(bed.spare_addr(spare), bed.port());
            links.push(Path::start(listen, bed.socket_addr(node)).await);
        }
        let shared = Arc::new(Shared { bed, links, cutters: AtomicU8::new(FIRST_CUTTER) });
        let cluster = Self { shared };
        cluster.dns().point_to(&cluster.nodes())?;
        Ok(cluster)
    }

    /// All nodes, running or not. `Node(0)` is the first primary.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Node};
    /// # fn example(cluster: &Cluster) {
    /// assert_eq!(cluster.nodes(), [Node(0), Node(1), Node(2)]);
    /// # }
    /// ```
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        self.shared.bed.nodes()
    }

    /// The node that was promoted last.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Node};
    /// # fn example(cluster: &Cluster) {
    /// assert_eq!(cluster.primary(), Node(0));
    /// # }
    /// ```
    #[must_use]
    pub fn primary(&self) -> Node {
        self.shared.bed.primary()
    }

    /// The connection string of the role `app`, with the addresses of all nodes:
    /// `postgres://app@127.1.2.10:15432,127.1.2.11:15432/app`.
    ///
    /// For a driver that takes one address, there are [`Cluster::url_of`] and [`Cutter::url`].
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::Cluster;
    /// # fn example(cluster: &Cluster) {
    /// let url = cluster.url();
    /// # }
    /// ```
    #[must_use]
    pub fn url(&self) -> String {
        let hosts: Vec<_> = self.shared.links.iter().map(|link| link.addr().to_string()).collect();
        self.shared.url_at(&hosts.join(","))
    }

    /// The connection string of the role `app` on one node.
    ///
    /// # Errors
    /// [`Error::NoNode`].
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # fn example(cluster: &Cluster) -> Result<(), Error> {
    /// let url = cluster.url_of(Node(1))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn url_of(&self, node: Node) -> Result<String, Error> {
        Ok(self.shared.url_at(&self.shared.link(node)?.addr().to_string()))
    }

    /// The connection string of the role `app` with the name that [`Cluster::dns`] answers for:
    /// `postgres://app@pg.internal:15432/app`. The service must ask that name server, [`Dns::server`].
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::Cluster;
    /// # fn example(cluster: &Cluster) {
    /// let (url, name_server) = (cluster.url_by_name(), cluster.dns().server());
    /// # }
    /// ```
    #[must_use]
    pub fn url_by_name(&self) -> String {
        self.shared.url_at(&format!("{}:{}", Dns::NAME, self.shared.bed.port()))
    }

    /// The connection string of the superuser `postgres` on one node, for the test's own look at what is stored. It
    /// leads past [`Cluster::cut`].
    ///
    /// # Errors
    /// [`Error::NoNode`].
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # fn example(cluster: &Cluster) -> Result<(), Error> {
    /// let url = cluster.superuser_url(cluster.primary())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn superuser_url(&self, node: Node) -> Result<String, Error> {
        self.shared.link(node)?;
        Ok(format!("postgres://postgres@{}/app", self.shared.bed.socket_addr(node)))
    }

    /// The cluster's own DNS server.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.dns().point_to(&[Node(1)])?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn dns(&self) -> Dns<'_> {
        Dns::of(&self.shared)
    }

    /// Another address of this node, at which a connection can be cut around COMMIT. It can move to another node later.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// # let cluster = tokio_postgres_failover_testkit::Cluster::start().await?;
    /// let cutter = cluster.cutter(cluster.primary()).await?;
    /// println!("the service under test gets {}", cutter.url());
    /// # Ok(())
    /// # }
    /// ```
    pub fn cutter(&self, node: Node) -> Step<Cutter> {
        self.step(format!("a cutter for {node:?}"), async move |shared| {
            shared.link(node)?;
            let listen = SocketAddr::new(shared.cutter_addr()?, shared.bed.port());
            let nodes = shared.bed.nodes().into_iter().map(|node| shared.bed.socket_addr(node)).collect();
            Ok(Cutter::start(listen, node, nodes, shared.url_at(&listen.to_string())).await)
        })
    }

    /// What the node's server wrote to its log so far.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// assert!(!cluster.log(Node(0)).await?.contains("PANIC"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn log(&self, node: Node) -> Step<String> {
        self.step(format!("reading the log of {node:?}"), async move |shared| {
            shared.link(node)?;
            Ok(shared.bed.log(node).await)
        })
    }
}

impl Cluster {
    /// A step that keeps the cluster only while it runs.
    fn step<T, F>(&self, name: impl Into<String>, work: impl FnOnce(Arc<Shared>) -> F + Send + 'static) -> Step<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send,
    {
        let (name, shared) = (name.into(), Arc::downgrade(&self.shared));
        Step::new(name.clone(), async move {
            let shared = shared.upgrade().ok_or_else(|| Error::failed(&name, "the cluster was dropped"))?;
            work(shared).await
        })
    }
}

impl Shared {
    pub(crate) fn link(&self, node: Node) -> Result<&Path, Error> {
        self.links.get(node.0).ok_or(Error::NoNode(node))
    }

    fn running(&self, node: Node) -> Result<(), Error> {
        self.link(node)?;
        if self.bed.is_running(node) { Ok(()) } else { Err(Error::NotRunning(node)) }
    }

    /// A frozen server would keep the step waiting.
    fn awake(&self, node: Node) -> Result<(), Error> {
        self.running(node)?;
        if self.bed.is_frozen(node) {
            return Err(Error::Invalid(format!("{node:?} is frozen; thaw it first")));
        }
        Ok(())
    }

    fn has_a_standby(&self) -> Result<(), Error> {
        let primary = self.bed.primary();
        if self.bed.nodes().into_iter().any(|node| node != primary && self.awake(node).is_ok()) {
            return Ok(());
        }
        Err(Error::Invalid("no standby runs; `Cluster::rejoin` makes a node one".to_owned()))
    }

    fn no_primary(&self, node: Node) -> Result<(), Error> {
        if node == self.bed.primary() {
            return Err(Error::Invalid(format!("{node:?} is the primary already")));
        }
        Ok(())
    }

    fn thawed(&self, node: Node) {
        if self.bed.is_frozen(node) {
            self.bed.thaw(node);
        }
    }

    fn url_at(&self, hosts: &str) -> String {
        format!("postgres://{}@{hosts}/app", self.bed.user())
    }

    fn cutter_addr(&self) -> Result<IpAddr, Error> {
        const LAST: u8 = 242;
        let next = |spare: u8| (spare < LAST).then_some(spare + 1);
        let spare = self.cutters.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
        spare
            .map(|spare| self.bed.spare_addr(spare))
            .map_err(|_| Error::Invalid("a cluster has 232 cutters".to_owned()))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A step that was dropped lets go of the cluster a moment later. The servers end on this thread, so that a test
        // that panics shows their logs.
        let begun = Instant::now();
        while Arc::strong_count(&self.shared) > 1 && begun.elapsed() < STOPPING {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (nodes, primary) = (self.nodes().len(), self.primary());
        f.debug_struct("Cluster").field("nodes", &nodes).field("primary", &primary).finish_non_exhaustive()
    }
}
