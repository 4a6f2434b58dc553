//! Connections that end around BEGIN and COMMIT.

use std::fmt;
use std::net::SocketAddr;

use crate::bed::cutter as bed;
use crate::{Error, Node};

/// An address that leads to one node, and cuts a connection at a chosen point of its transaction; see
/// [`Cluster::cutter`](crate::Cluster::cutter). Dropping it closes its connections.
///
/// It is also an address that moves, as a load balancer's or a floating one does: [`Cutter::point_to`].
///
/// ```no_run
/// # async fn example() -> Result<(), tokio_postgres_failover_testkit::Error> {
/// use tokio_postgres_failover_testkit::{Cluster, Cut};
///
/// let cluster = Cluster::start().await?;
/// let cutter = cluster.cutter(cluster.primary()).await?;
/// let url = cutter.url(); // for the service under test
/// cutter.cut_next(Cut::CommitAnswer);
/// // … a payment through the service …
/// assert_eq!(cutter.cuts()[0].committed, Some(true)); // so it must be there exactly once
/// # Ok(())
/// # }
/// ```
pub struct Cutter {
    inner: bed::Cutter,
    nodes: Vec<SocketAddr>,
    url: String,
}

/// Where a connection is cut. Then both sides see it closed.
///
/// BEGIN is a simple query that begins with this word or with START TRANSACTION, and COMMIT one that has it as a
/// statement, as drivers send them. What is encrypted passes, and is not cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Cut {
    /// BEGIN does not reach the server.
    Begin,
    /// COMMIT does not reach the server, so the transaction is rolled back.
    Commit,
    /// The server has committed, and its answer does not reach the client.
    CommitAnswer,
}

/// A cut that was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct CutMade {
    /// Where.
    pub cut: Cut,
    /// Whether the server has committed: `None` if its answer was not seen to the end, because it died meanwhile.
    pub committed: Option<bool>,
}

impl Cutter {
    pub(crate) async fn start(listen: SocketAddr, node: Node, nodes: Vec<SocketAddr>, url: String) -> Self {
        let upstream = nodes.get(node.0).copied().unwrap_or(listen);
        Self { inner: bed::Cutter::start(listen, upstream).await, nodes, url }
    }

    /// The connection string of the role `app` at this address.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::Cutter;
    /// # fn example(cutter: &Cutter) {
    /// println!("the service under test gets {}", cutter.url());
    /// # }
    /// ```
    #[must_use]
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Where new connections lead from now on. Open ones stay where they are.
    ///
    /// # Errors
    /// [`Error::NoNode`].
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Cutter, Error};
    /// # async fn example(cluster: &Cluster, cutter: &Cutter) -> Result<(), Error> {
    /// cutter.point_to(cluster.fail_over().await?)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn point_to(&self, node: Node) -> Result<(), Error> {
        self.inner.set_upstream(*self.nodes.get(node.0).ok_or(Error::NoNode(node))?);
        Ok(())
    }

    /// Cuts the next connection whose transaction comes to this point, once. Each call cuts one more.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cut, Cutter};
    /// # fn example(cutter: &Cutter) {
    /// cutter.cut_next(Cut::Commit);
    /// # }
    /// ```
    pub fn cut_next(&self, cut: Cut) {
        let _ = self.inner.arm(match cut {
            Cut::Begin => bed::Cut::BeginUndelivered,
            Cut::Commit => bed::Cut::CommitUndelivered { server_stays: false },
            Cut::CommitAnswer => bed::Cut::CommitAnswerDropped,
        });
    }

    /// The cuts that were made, in their order. A client that sees its connection closed finds the cut here.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cut, Cutter};
    /// # fn example(cutter: &Cutter) {
    /// assert!(cutter.cuts().iter().all(|made| made.cut == Cut::Commit));
    /// # }
    /// ```
    #[must_use]
    pub fn cuts(&self) -> Vec<CutMade> {
        let made = |done: &bed::Done| {
            let cut = match done.cut {
                bed::Cut::BeginUndelivered => Cut::Begin,
                bed::Cut::CommitUndelivered { .. } => Cut::Commit,
                _ => Cut::CommitAnswer,
            };
            CutMade { cut, committed: done.committed }
        };
        self.inner.done().iter().map(made).collect()
    }
}

impl fmt::Debug for Cutter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cutter").field("addr", &self.inner.addr()).field("cuts", &self.cuts()).finish_non_exhaustive()
    }
}
