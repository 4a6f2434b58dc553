//! What a cluster shall be like.

use crate::bed::certificate::Certificate;
use crate::{Cluster, Error, Step, bed};

/// The most standbys that a cluster can have.
const MOST: usize = 4;

/// A cluster with other choices than [`Cluster::start`] makes; see [`Cluster::builder`].
///
/// ```no_run
/// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
/// use tokio_postgres_failover_testkit::Cluster;
///
/// let cluster = Cluster::builder().standbys(1).synchronous(false).setting("max_connections", "20").start().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "`start` starts the cluster"]
pub struct ClusterBuilder {
    bed: bed::cluster::ClusterBuilder,
    standbys: usize,
}

impl ClusterBuilder {
    pub(crate) fn new() -> Self {
        Self { bed: bed::cluster::Cluster::builder(), standbys: 2 }
    }

    /// How many hot standbys, beside the primary: 0 to 4, and 2 unless told.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// let cluster = tokio_postgres_failover_testkit::Cluster::builder().standbys(1).start().await?;
    /// assert_eq!(cluster.nodes().len(), 2);
    /// # Ok(())
    /// # }
    /// ```
    pub fn standbys(mut self, standbys: usize) -> Self {
        self.standbys = standbys;
        self
    }

    /// Whether a commit waits for any one standby, as it does unless told otherwise. Without it a failover may lose
    /// what was committed in its last moments.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// let cluster = tokio_postgres_failover_testkit::Cluster::builder().synchronous(false).start().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn synchronous(mut self, synchronous: bool) -> Self {
        self.bed = self.bed.synchronous(synchronous);
        self
    }

    /// A line of `postgresql.conf`, on every node. The value is quoted by the kit. Where the servers do not start with
    /// it, [`ClusterBuilder::start`] fails with their words.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// let builder = tokio_postgres_failover_testkit::Cluster::builder();
    /// let cluster = builder.setting("idle_in_transaction_session_timeout", "2s").start().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.bed = self.bed.setting(name, value);
        self
    }

    /// The role `app` must give this password (SCRAM). [`Cluster::url`] and its siblings contain it.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// let cluster = tokio_postgres_failover_testkit::Cluster::builder().password("secret").start().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn password(mut self, password: &str) -> Self {
        self.bed = self.bed.password(password);
        self
    }

    /// Every node offers TLS, with this certificate and its private key, both in PEM.
    ///
    /// ```no_run
    /// # async fn example(certificate: &str, key: &str) -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// let cluster = tokio_postgres_failover_testkit::Cluster::builder().tls(certificate, key).start().await?;
    /// let url = format!("{}?sslmode=require", cluster.url());
    /// # Ok(())
    /// # }
    /// ```
    pub fn tls(mut self, certificate: &str, key: &str) -> Self {
        self.bed = self.bed.tls(&Certificate { certificate: certificate.to_owned(), key: key.to_owned() });
        self
    }

    /// Starts the servers. It ends when all standbys are streaming, some seconds later; the first start on a machine
    /// also prepares the files that later ones copy.
    ///
    /// # Errors
    /// [`Error::NoPostgres`], [`Error::NoUser`] and [`Error::NoAddress`] say what the machine lacks, [`Error::Invalid`]
    /// what no cluster can have, and [`Error::Failed`] what a server said that did not start.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
    /// let cluster = tokio_postgres_failover_testkit::Cluster::builder().start().wait()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn start(self) -> Step<Cluster> {
        Step::new("starting a cluster", async move {
            if self.standbys > MOST {
                let asked = self.standbys;
                return Err(Error::Invalid(format!("standbys: a cluster has at most {MOST}, and not {asked}")));
            }
            Cluster::launch(self.bed.nodes(1 + self.standbys)).await
        })
    }
}
