//! The two clusters on which a script is played.

use std::sync::Arc;
use std::time::Duration;

use testbed::{Background, Cluster, Node};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::time::sleep;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::view::Evidence;

use super::plan::Act;
use crate::log::What;
use crate::manager::{follow, promote};
use crate::net::{End, Net, connection};
use crate::node::{Goodbye, backend_start};
use crate::rng::Rng;
use crate::server::serve;
use crate::setup::{Dns, Setup, Shown};
use crate::world::Sim;

/// A cluster on which a script is played.
pub(super) trait Side {
    type Stream: AsyncRead + AsyncWrite + Unpin;

    /// `None`: nobody listens.
    async fn connect(&self, node: usize) -> Option<Self::Stream>;

    /// When this session began, as `pg_stat_activity` shows it.
    async fn backend_start(&self, node: usize, pid: i32) -> String;

    /// Waits until a session has ended whose client has left.
    async fn gone(&self, node: usize, pid: i32);

    async fn act(&mut self, act: Act);
}

pub(super) fn paused() -> Runtime {
    Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

pub(super) fn awake() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(super) struct Simulated {
    sim: Arc<Sim>,
}

impl Simulated {
    pub(super) fn new(servers: usize) -> Self {
        let setup = Setup {
            servers,
            synchronous: false,
            shown: Shown::Function,
            dns: Dns::All,
            max_size: 4,
            sleeps: false,
            wrapped: false,
            archives: false,
            wrong_clock: false,
            pooled: false,
        };
        Self { sim: Sim::with(Rng::new(1), setup, false) }
    }

    /// The standbys receive what is on the primary's disk.
    fn replicate(&self) {
        self.sim.lock().replicate();
    }
}

impl Side for Simulated {
    type Stream = End;

    async fn connect(&self, node: usize) -> Option<End> {
        sleep(Duration::from_millis(1)).await;
        let (net, life): (Arc<Net>, _) = {
            let world = self.sim.lock();
            let node = &world.nodes[node];
            (Arc::clone(&node.net), node.accept()?)
        };
        let (ours, theirs) = connection(&net, 1);
        tokio::spawn(serve(Arc::clone(&self.sim), node, life, theirs));
        Some(ours)
    }

    async fn backend_start(&self, _: usize, pid: i32) -> String {
        backend_start(pid)
    }

    async fn gone(&self, _: usize, _: i32) {
        sleep(Duration::from_secs(1)).await;
    }

    async fn act(&mut self, act: Act) {
        sleep(Duration::from_millis(10)).await;
        if act != Act::Lag && !self.sim.lock().nodes.iter().any(|node| node.troubles.lags) {
            self.replicate();
        }
        match act {
            Act::Kill(on) => {
                let mut world = self.sim.lock();
                world.crash(on, Goodbye::Closed);
                // If it comes back, its standbys connect anew.
                world.nodes.iter_mut().for_each(|node| node.troubles.lags = false);
            }
            Act::Stop(on) => self.sim.lock().shut_down(on),
            Act::BackendCrash(on) => self.sim.lock().backend_crash(on),
            Act::Start { on, leads } => {
                let mut world = self.sim.lock();
                let clean = world.nodes[on].goodbye == Goodbye::Shutdown;
                world.start_primary(on, clean, leads);
            }
            Act::Lag => {
                self.replicate();
                self.sim.lock().nodes.iter_mut().for_each(|node| node.troubles.lags = true);
            }
            Act::Promote(on) => {
                promote(&self.sim, on);
                let mut world = self.sim.lock();
                // The test bed writes twice on a server that it promotes, the first time with the whole page.
                for rows in [8, 1] {
                    let xid = world.assign_xid(on, 0);
                    for _ in 0..rows {
                        world.append(on, What::Message { xid });
                    }
                    let records = world.append(on, What::Commit { xid });
                    world.nodes[on].running.remove(&xid);
                    world.nodes[on].log.flush(records);
                }
            }
            Act::Checkpoint(on) => self.sim.lock().checkpoint(on, false),
            Act::Rejoin(on) => {
                let mut world = self.sim.lock();
                let leader = world.leader;
                // So that pg_rewind knows the new timeline, the test bed asks for a checkpoint.
                world.checkpoint(leader, false);
                follow(&mut world, on, leader);
            }
        }
        if act != Act::Lag {
            self.replicate();
        }
        sleep(Duration::from_millis(10)).await;
    }
}

pub(super) struct Real {
    cluster: Cluster,
    primary: usize,
    lags: bool,
}

impl Real {
    pub(super) async fn start(servers: usize) -> Self {
        let builder = Cluster::builder().nodes(servers).asynchronous();
        let cluster = builder.setting("wal_keep_size", "0").start().await;
        let administrator = cluster.direct(Node(0)).await;
        Evidence::install(&administrator).await.unwrap();
        Ledger::default().install(&administrator).await.unwrap();
        let sql = "GRANT USAGE ON SCHEMA failover TO app; GRANT EXECUTE ON FUNCTION failover.wal_history TO app; \
                   GRANT SELECT, INSERT, UPDATE, DELETE ON failover.ledger TO app; GRANT pg_monitor TO app; \
                   CREATE TABLE public.payments (call bigint, attempt bigint); ALTER TABLE payments OWNER TO app; \
                   CHECKPOINT";
        administrator.batch_execute(sql).await.unwrap();
        let real = Self { cluster, primary: 0, lags: false };
        real.calm(0).await;
        real.replicated().await;
        real
    }

    /// Nothing reaches the disk of a primary but with a COMMIT.
    async fn calm(&self, node: usize) {
        self.cluster.stop_background(Node(node), Background::WalWriter).await;
        self.cluster.stop_background(Node(node), Background::BackgroundWriter).await;
    }

    /// The standbys have what is on the primary's disk.
    async fn replicated(&self) {
        for node in self.cluster.nodes() {
            if node.0 != self.primary && self.cluster.is_running(node) && self.is_standby(node).await {
                self.received(node).await;
            }
        }
    }

    /// Waits until a standby has received what is on the primary's disk, and has replayed it. A record that is only in
    /// part on the disk cannot be replayed, so the standby's position may stay behind the primary's.
    async fn received(&self, standby: Node) {
        let primary = self.cluster.direct(Node(self.primary)).await;
        let target: String = primary.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
        let session = self.cluster.direct(standby).await;
        let mut replayed = None;
        testbed::eventually("the standby has replayed", Duration::from_secs(30), async || {
            let sql = "SELECT greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) >= $1::text::pg_lsn, \
                              pg_last_wal_replay_lsn()::text";
            let Ok(row) = session.query_one(sql, &[&target]).await else { return false };
            let before = std::mem::replace(&mut replayed, row.get::<_, Option<String>>(1));
            sleep(Duration::from_millis(20)).await;
            row.get::<_, Option<bool>>(0) == Some(true) && before == replayed
        })
        .await;
    }

    async fn is_standby(&self, node: Node) -> bool {
        let session = self.cluster.direct(node).await;
        session.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get(0)
    }
}

impl Side for Real {
    type Stream = TcpStream;

    async fn connect(&self, node: usize) -> Option<TcpStream> {
        TcpStream::connect(self.cluster.socket_addr(Node(node))).await.ok()
    }

    async fn backend_start(&self, node: usize, pid: i32) -> String {
        let sql =
            "SELECT round(extract(epoch FROM backend_start)::numeric, 6)::text FROM pg_stat_activity WHERE pid = $1";
        self.cluster.direct(Node(node)).await.query_one(sql, &[&pid]).await.unwrap().get(0)
    }

    async fn gone(&self, node: usize, pid: i32) {
        let session = self.cluster.direct(Node(node)).await;
        testbed::eventually("the session has ended", Duration::from_secs(10), async || {
            let sql = "SELECT FROM pg_stat_activity WHERE pid = $1";
            session.query_opt(sql, &[&pid]).await.is_ok_and(|row| row.is_none())
        })
        .await;
    }

    async fn act(&mut self, act: Act) {
        if self.cluster.is_running(Node(self.primary)) && !self.lags {
            self.replicated().await;
        }
        match act {
            Act::Kill(on) => self.cluster.kill(Node(on)).await,
            Act::Stop(on) => {
                self.cluster.thaw(Node(on));
                self.cluster.stop_fast(Node(on)).await;
            }
            Act::BackendCrash(on) => {
                self.cluster.crash_backend(Node(on), Duration::from_secs(20)).await;
                self.calm(on).await;
            }
            Act::Start { on, .. } => {
                self.cluster.start_node(Node(on)).await;
                self.calm(on).await;
            }
            Act::Lag => {
                for node in self.cluster.nodes() {
                    if node.0 != self.primary && self.cluster.is_running(node) && self.is_standby(node).await {
                        self.cluster.stop_shipping(Node(self.primary), node).await;
                    }
                }
            }
            Act::Promote(on) => {
                for node in self.cluster.nodes() {
                    if node.0 != self.primary && self.cluster.is_running(node) && self.is_standby(node).await {
                        self.cluster.wait_received_all(node).await;
                    }
                }
                // Until it goes on, the control file shows the old timeline.
                self.cluster.stop_background(Node(on), Background::Checkpointer).await;
                self.cluster.promote(Node(on)).await;
                self.primary = on;
                self.calm(on).await;
            }
            Act::Checkpoint(on) => {
                self.cluster.thaw(Node(on));
                self.cluster.direct(Node(on)).await.batch_execute("CHECKPOINT").await.unwrap();
                self.calm(on).await;
            }
            Act::Rejoin(on) => {
                self.cluster.thaw(Node(self.primary));
                if self.cluster.is_running(Node(on)) {
                    self.cluster.thaw(Node(on));
                }
                self.cluster.restart_as_standby(Node(on)).await;
                self.calm(self.primary).await;
            }
        }
        self.lags = act == Act::Lag;
        if self.cluster.is_running(Node(self.primary)) && !self.lags {
            self.replicated().await;
        }
    }
}
