//! What can happen to a cluster of Patroni's.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::process::Signal;

use super::{ANSWER, PATIENCE, Patroni, rest};
use crate::cluster::Node;
use crate::orphans::postmaster;
use crate::process;
use crate::wait::until_slowly as until;

/// Patroni answers when it is done.
const DONE: Duration = Duration::from_secs(40);

/// What of a node a fault is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Patroni alone; PostgreSQL goes on.
    Patroni,
    /// PostgreSQL alone.
    PostgreSql,
    /// The machine.
    Both,
}

/// Faults of processes.
impl Patroni {
    /// SIGKILL to the processes of this part at once; returns when all are gone. Patroni starts a killed PostgreSQL
    /// again, or leaves it to another node; a killed Patroni stays away until [`Patroni::start_node`].
    pub async fn kill(&self, node: Node, part: Part) {
        let mut patroni = self.manager(node).await;
        if part != Part::PostgreSql {
            // It shall not see the death of its server.
            process::stop(patroni.id().unwrap_or_else(|| panic!("no Patroni runs on {node:?}")));
        }
        if part != Part::Patroni {
            let server = self.postmaster(node);
            let mut killed = process::kill_tree(server);
            killed.push(server);
            self.orphans.expect(killed.iter().copied());
            until(&format!("{node:?} is gone"), PATIENCE, || async {
                if killed.iter().all(|id| process::reap(*id)) { Ok(()) } else { Err(format!("{killed:?}")) }
            })
            .await;
        }
        if part != Part::PostgreSql {
            patroni.end(Signal::KILL).await;
        }
    }

    /// Starts the node's Patroni after [`Patroni::kill`], as its supervisor or a container does. Does not wait for it.
    pub async fn start_node(&self, node: Node) {
        let member = self.member(node);
        let mut patroni = member.patroni.lock().await;
        assert!(patroni.running().is_none(), "Patroni runs on {node:?}");
        member.launch(&mut patroni);
    }

    /// SIGSTOP to the processes of this part. A primary whose Patroni alone is frozen is a zombie: it takes writes
    /// beside its successor until Patroni is thawed.
    pub async fn freeze(&self, node: Node, part: Part) {
        if part != Part::PostgreSql {
            process::stop(self.manager(node).await.id().expect("Patroni runs"));
        }
        if part != Part::Patroni {
            process::stop_tree(self.postmaster(node));
        }
    }

    /// Undoes [`Patroni::freeze`].
    pub async fn thaw(&self, node: Node, part: Part) {
        if part != Part::Patroni {
            process::continue_tree(self.postmaster(node));
        }
        if part != Part::PostgreSql {
            self.manager(node).await.signal(Signal::CONT);
        }
    }

    fn postmaster(&self, node: Node) -> u32 {
        postmaster(&self.data(node)).unwrap_or_else(|| panic!("no PostgreSQL runs on {node:?}"))
    }
}

/// Faults of the network.
impl Patroni {
    /// The node is cut off from etcd, and its peers from it; clients still see it. What it opens towards its peers by
    /// itself passes: a primary opens nothing there, unless it is in `failsafe_mode`.
    pub fn cut(&self, node: Node) {
        self.hold(node, true);
    }

    /// Undoes [`Patroni::cut`].
    pub fn heal(&self, node: Node) {
        self.hold(node, false);
    }

    fn hold(&self, node: Node, held: bool) {
        let member = self.member(node);
        for link in member.to_etcd.iter().chain([&member.to_postgres, &member.to_patroni]) {
            link.hold(held);
        }
    }

    /// Most members of etcd are frozen: nobody can hold the lock.
    pub fn lose_quorum(&self) {
        self.etcd.lose_quorum();
    }

    /// Undoes [`Patroni::lose_quorum`]; returns when etcd has a leader.
    pub async fn restore_quorum(&self) {
        self.etcd.restore_quorum().await;
    }
}

/// What an operator asks of Patroni.
impl Patroni {
    /// Hands over to this node; returns when Patroni says that it has.
    pub async fn switchover(&self, to: Node) {
        let leader = self.leader().await;
        let body = format!(r#"{{"leader":"n{}","candidate":"n{}"}}"#, leader.0, to.0);
        self.order(leader, "POST", "/switchover", &body).await;
    }

    /// Restarts the node's PostgreSQL; returns when it is up.
    pub async fn restart(&self, node: Node) {
        self.order(node, "POST", "/restart", "{}").await;
    }

    /// Copies a standby anew. Returns when that has begun.
    pub async fn reinit(&self, node: Node) {
        self.order(node, "POST", "/reinitialize", r#"{"force":true}"#).await;
    }

    /// Patroni watches and does nothing, on all nodes.
    pub async fn pause(&self) {
        self.set_paused(true).await;
    }

    /// Undoes [`Patroni::pause`].
    pub async fn resume(&self) {
        self.set_paused(false).await;
    }

    /// `synchronous_mode` from now on; returns when PostgreSQL has it.
    pub async fn set_synchronous(&self, synchronous: bool) {
        let body = format!(r#"{{"synchronous_mode":{synchronous}}}"#);
        self.order(self.leader().await, "PATCH", "/config", &body).await;
        self.synchronous.store(synchronous, Ordering::Relaxed);
        self.wait_synchronous(synchronous).await;
    }

    async fn set_paused(&self, paused: bool) {
        let body = format!(r#"{{"pause":{paused}}}"#);
        self.order(self.nodes()[0], "PATCH", "/config", &body).await;
        for node in self.nodes() {
            let addr = self.rest_addr(node);
            until(&format!("{node:?} knows whether it is paused"), PATIENCE, || async move {
                let (_, body) = rest::ask(addr, "GET", "/patroni", "", ANSWER).await?;
                if body.contains(r#""pause": true"#) == paused { Ok(()) } else { Err(body) }
            })
            .await;
        }
    }

    /// Repeated while Patroni is busy with something else.
    async fn order(&self, node: Node, method: &str, path: &str, body: &str) {
        let addr = self.rest_addr(node);
        until(&format!("{node:?}: {method} {path}"), PATIENCE, || async move {
            match rest::ask(addr, method, path, body, DONE).await? {
                (200 | 202, _) => Ok(()),
                refused => Err(format!("{refused:?}")),
            }
        })
        .await;
    }
}
