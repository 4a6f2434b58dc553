//! The name that leads to the cluster, and what is said about it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::bed::dns::Answer;
use crate::cluster::Shared;
use crate::{Error, Node};

/// A cluster's own DNS server, by UDP and TCP; see [`Cluster::dns`](crate::Cluster::dns).
///
/// It answers for [`Dns::NAME`], at first with the addresses of all nodes. What it says changes at once, and only when
/// the test says so: not even a promotion changes it.
#[derive(Clone, Copy)]
pub struct Dns<'a> {
    shared: &'a Shared,
}

/// How DNS fails, until [`Dns::point_to`].
///
/// ```no_run
/// # use tokio_postgres_failover_testkit::{Cluster, DnsFault};
/// # fn example(cluster: &Cluster) {
/// cluster.dns().fail(DnsFault::Silent);
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum DnsFault {
    /// There is no such name (NXDOMAIN).
    Unknown,
    /// The server has failed (SERVFAIL).
    Failing,
    /// No answer comes.
    Silent,
}

impl<'a> Dns<'a> {
    /// The name that it answers for.
    ///
    /// ```
    /// assert_eq!(tokio_postgres_failover_testkit::Dns::NAME, "pg.internal");
    /// ```
    pub const NAME: &'static str = "pg.internal";

    pub(crate) fn of(shared: &'a Shared) -> Self {
        Self { shared }
    }

    /// Where the server listens: what the service under test has to ask.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::Cluster;
    /// # fn example(cluster: &Cluster) {
    /// let name_server = cluster.dns().server(); // as `PoolBuilder::dns_servers` takes it
    /// # }
    /// ```
    #[must_use]
    pub fn server(&self) -> SocketAddr {
        self.shared.bed.dns().addr()
    }

    /// From now on the name leads to these nodes. To none of them: it exists, and has no address.
    ///
    /// # Errors
    /// [`Error::NoNode`].
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// let primary = cluster.fail_over().await?;
    /// cluster.dns().point_to(&[primary])?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn point_to(&self, nodes: &[Node]) -> Result<(), Error> {
        let addr = |node: &Node| self.shared.link(*node).map(|link| link.addr().ip());
        let addresses: Vec<IpAddr> = nodes.iter().map(addr).collect::<Result<_, _>>()?;
        self.shared.bed.dns().set(&addresses);
        Ok(())
    }

    /// From now on DNS fails in this way.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, DnsFault};
    /// # fn example(cluster: &Cluster) {
    /// cluster.dns().fail(DnsFault::Unknown);
    /// # }
    /// ```
    pub fn fail(&self, fault: DnsFault) {
        self.shared.bed.dns().answer(match fault {
            DnsFault::Unknown => Answer::NxDomain,
            DnsFault::Failing => Answer::ServFail,
            DnsFault::Silent => Answer::Silent,
        });
    }

    /// How many questions came so far.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::Cluster;
    /// # fn example(cluster: &Cluster) {
    /// assert_eq!(cluster.dns().queries(), 0);
    /// # }
    /// ```
    #[must_use]
    pub fn queries(&self) -> u64 {
        self.shared.bed.dns().queries()
    }
}

impl fmt::Debug for Dns<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dns").field("server", &self.server()).finish_non_exhaustive()
    }
}
