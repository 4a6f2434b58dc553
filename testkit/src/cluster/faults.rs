//! What a test does to servers and to the network.

use super::Cluster;
use crate::{Error, Node, Step};

/// Faults of servers. Each fails with [`Error::NoNode`] or [`Error::NotRunning`] where there is nothing to do it to.
impl Cluster {
    /// The server dies at once, as when its machine loses power. Clients see their connections end.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.kill(cluster.primary()).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn kill(&self, node: Node) -> Step<()> {
        self.step(format!("killing {node:?}"), async move |shared| {
            shared.running(node)?;
            shared.bed.kill(node).await;
            Ok(())
        })
    }

    /// The server shuts down in order: it ends its sessions (57P01), and its standbys have all that was committed.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.stop(Node(2)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn stop(&self, node: Node) -> Step<()> {
        self.step(format!("stopping {node:?}"), async move |shared| {
            shared.running(node)?;
            shared.thawed(node);
            shared.bed.stop_fast(node).await;
            Ok(())
        })
    }

    /// The server stands still, as on a machine that hangs: connections stay open, new ones are accepted by the kernel,
    /// and nothing answers, until [`Cluster::thaw`].
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.freeze(cluster.primary()).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn freeze(&self, node: Node) -> Step<()> {
        self.step(format!("freezing {node:?}"), async move |shared| {
            shared.running(node)?;
            shared.bed.freeze(node);
            Ok(())
        })
    }

    /// Ends [`Cluster::freeze`]. A standby that was frozen during a promotion still follows the old primary:
    /// [`Cluster::rejoin`] turns it.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.freeze(Node(0)).await?;
    /// cluster.thaw(Node(0)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn thaw(&self, node: Node) -> Step<()> {
        self.step(format!("thawing {node:?}"), async move |shared| {
            shared.running(node)?;
            shared.bed.thaw(node);
            Ok(())
        })
    }

    /// Starts a node that was killed or stopped, as it is. An old primary comes back writable, beside the new one:
    /// nothing fences it. In a synchronous cluster its commits wait for ever, because no standby follows it.
    ///
    /// # Errors
    /// [`Error::Running`], [`Error::NoNode`]. [`Error::Failed`], with the end of the server's log, if the server exits
    /// again.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.fail_over().await?;
    /// cluster.start_node(Node(0)).await?; // the service must not write to this one
    /// # Ok(())
    /// # }
    /// ```
    pub fn start_node(&self, node: Node) -> Step<()> {
        self.step(format!("starting {node:?}"), async move |shared| {
            shared.link(node)?;
            if shared.bed.is_running(node) {
                return Err(Error::Running(node));
            }
            shared.bed.start_node(node).await;
            Ok(())
        })
    }

    /// Makes the node refuse to write (`default_transaction_read_only`), as failover managers fence a primary, or
    /// allows it to write again. Open sessions see it, too.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.set_read_only(cluster.primary(), true).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn set_read_only(&self, node: Node, read_only: bool) -> Step<()> {
        self.step(format!("setting {node:?} to read-only: {read_only}"), async move |shared| {
            shared.awake(node)?;
            shared.bed.set_read_only(node, read_only).await;
            Ok(())
        })
    }
}

/// Failover.
impl Cluster {
    /// Makes a standby the primary. It ends when the node accepts writes, and the standbys that are awake follow it.
    ///
    /// Nothing is done to the old primary, and DNS says what it said before. Take [`Cluster::best_standby`]: another
    /// one may lack commits that were acknowledged.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.freeze(cluster.primary()).await?;
    /// cluster.promote(cluster.best_standby().await?).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn promote(&self, node: Node) -> Step<()> {
        self.step(format!("promoting {node:?}"), async move |shared| {
            shared.no_primary(node)?;
            shared.awake(node)?;
            shared.bed.promote(node).await;
            Ok(())
        })
    }

    /// The standby that has received the most.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// let next = cluster.best_standby().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn best_standby(&self) -> Step<Node> {
        self.step("looking for the best standby", async move |shared| {
            shared.has_a_standby()?;
            Ok(shared.bed.most_advanced_standby().await)
        })
    }

    /// Kills the primary, if it still runs, and promotes the best standby. Returns the new primary.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// let primary = cluster.fail_over().await?;
    /// assert_eq!(primary, cluster.primary());
    /// # Ok(())
    /// # }
    /// ```
    pub fn fail_over(&self) -> Step<Node> {
        self.step("a failover", async move |shared| {
            shared.has_a_standby()?;
            let old = shared.bed.primary();
            if shared.bed.is_running(old) {
                shared.bed.kill(old).await;
            }
            let next = shared.bed.most_advanced_standby().await;
            shared.bed.promote(next).await;
            Ok(next)
        })
    }

    /// A planned change: the primary stops in order, this standby is promoted, and the old primary becomes its standby.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.switch_over(Node(1)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn switch_over(&self, node: Node) -> Step<()> {
        self.step(format!("a switch-over to {node:?}"), async move |shared| {
            shared.no_primary(node)?;
            shared.awake(node)?;
            shared.running(shared.bed.primary())?;
            shared.thawed(shared.bed.primary());
            shared.bed.switch_over(node).await;
            Ok(())
        })
    }

    /// Makes a node a standby of the present primary, whatever it was before: what it alone had is gone. It ends when
    /// the node is streaming.
    ///
    /// # Errors
    /// [`Error::Invalid`] for the primary itself, and while the primary is frozen; [`Error::NotRunning`] if the primary
    /// does not run. Nothing is done to the node then.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.fail_over().await?;
    /// cluster.rejoin(Node(0)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn rejoin(&self, node: Node) -> Step<()> {
        self.step(format!("making {node:?} a standby"), async move |shared| {
            shared.no_primary(node)?;
            shared.link(node)?;
            // Nobody could be followed, and the node may be a standby that is well.
            shared.awake(shared.bed.primary())?;
            shared.bed.restart_as_standby(node).await;
            Ok(())
        })
    }
}

/// Faults of the network between clients and nodes. The nodes reach each other all the time.
impl Cluster {
    /// Cuts clients off from this node, until [`Cluster::mend`]: nothing passes on any connection, in either direction,
    /// and neither side is told.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.cut(cluster.primary()).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn cut(&self, node: Node) -> Step<()> {
        self.step(format!("cutting off {node:?}"), async move |shared| {
            shared.link(node)?.hold(true);
            Ok(())
        })
    }

    /// Ends [`Cluster::cut`]. What waited on the way arrives.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error, Node};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.cut(Node(0)).await?;
    /// cluster.mend(Node(0)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn mend(&self, node: Node) -> Step<()> {
        self.step(format!("mending the network to {node:?}"), async move |shared| {
            shared.link(node)?.hold(false);
            Ok(())
        })
    }

    /// Closes the connections that clients have to this node now. New ones are served.
    ///
    /// ```no_run
    /// # use tokio_postgres_failover_testkit::{Cluster, Error};
    /// # async fn example(cluster: &Cluster) -> Result<(), Error> {
    /// cluster.drop_connections(cluster.primary()).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn drop_connections(&self, node: Node) -> Step<()> {
        self.step(format!("closing the connections to {node:?}"), async move |shared| {
            shared.link(node)?.close();
            Ok(())
        })
    }
}
