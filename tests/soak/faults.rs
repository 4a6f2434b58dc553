//! What happens to the cluster, and in what order.
//!
//! Whatever acknowledges a write is on a standby before the primary is taken away: each fault begins when both standbys
//! stream and have replayed everything, and the one that received most is promoted. Else a lost write would be the test
//! bed's doing.

use std::time::{Duration, Instant};

use testbed::{Answer, Cluster, Node, eventually};
use tokio::time::sleep;
use tokio_postgres_failover::Pool;

use crate::Until;
use crate::dice::Dice;
use crate::growth::Held;
use crate::load::Load;

/// For what the test bed waits for.
const PATIENCE: Duration = Duration::from_secs(30);
/// From this failover on nothing may grow.
const SETTLED: u32 = 10;
/// Growth is judged in runs of at least so many failovers.
const JUDGED: u32 = 30;

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// One of those that put another server in the primary's place.
    Failover(Loss),
    /// The primary is frozen for less than a heartbeat's time-out.
    Stall,
    /// One backend is killed: the server ends all sessions and recovers.
    CrashBackend,
    /// All sessions of the pool are terminated.
    TerminateBackends,
    /// `ALTER SYSTEM SET default_transaction_read_only`, lifted after a while.
    FenceSystem,
    /// `ALTER DATABASE … SET default_transaction_read_only`, lifted after a while.
    FenceDatabase,
    /// DNS fails for a while, and the pool has to open connections meanwhile.
    DnsAlone,
}

/// How a primary is lost.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Kill,
    StopFast,
    StopImmediate,
    /// It comes back as a zombie for a moment before it follows.
    Freeze,
    /// It stays up, read-only.
    Demote,
}

/// What DNS says during a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    AllMembers,
    /// The primary alone; it moves a while after the promotion.
    MovesLate,
    /// The old primary alone, also when it is a standby again.
    Stale,
    NxDomain,
    ServFail,
    Silent,
    Empty,
}

/// Drawn from until it is empty, and filled again.
const BAG: [Fault; 12] = [
    Fault::Failover(Loss::Kill),
    Fault::Failover(Loss::Kill),
    Fault::Failover(Loss::StopFast),
    Fault::Failover(Loss::StopImmediate),
    Fault::Failover(Loss::Freeze),
    Fault::Failover(Loss::Demote),
    Fault::Stall,
    Fault::CrashBackend,
    Fault::TerminateBackends,
    Fault::FenceSystem,
    Fault::FenceDatabase,
    Fault::DnsAlone,
];
const BROKEN: [Naming; 6] =
    [Naming::MovesLate, Naming::Stale, Naming::NxDomain, Naming::ServFail, Naming::Silent, Naming::Empty];

/// Injects one fault after the other.
pub(crate) struct Director<'a> {
    cluster: &'a Cluster,
    pool: &'a Pool,
    load: &'a Load,
    dice: Dice,
    bag: Vec<Fault>,
    failovers: u32,
}

impl<'a> Director<'a> {
    pub(crate) fn new(cluster: &'a Cluster, pool: &'a Pool, load: &'a Load, seed: u64) -> Self {
        Self { cluster, pool, load, dice: Dice::new(seed), bag: Vec::new(), failovers: 0 }
    }

    /// How many primaries were lost so far.
    pub(crate) fn failovers(&self) -> u32 {
        self.failovers
    }

    /// Returns what grew. It ends early when a worker is stuck.
    pub(crate) async fn run(&mut self, until: Until) -> Vec<String> {
        let begun = Instant::now();
        let mut held = None;
        let mut recovered = self.load.recovered(begun).await;
        while recovered.is_some() {
            if match until {
                Until::Failovers(wanted) => self.failovers >= wanted,
                Until::Elapsed(wanted) => begun.elapsed() >= wanted,
            } {
                break;
            }
            self.settle().await;
            if self.failovers == SETTLED && held.is_none() {
                held = Some(self.look().await);
            }
            recovered = self.next().await;
        }
        let mut faults = Vec::new();
        if recovered.is_some() {
            self.settle().await;
            let last = self.look().await;
            let grown = held.and_then(|held| last.grown_since(&held));
            faults.extend(grown.filter(|_| self.failovers >= JUDGED));
        }
        faults
    }

    async fn look(&self) -> Held {
        let held = Held::look(self.pool).await;
        self.load.say(&format!("after {} failovers: {held}", self.failovers));
        held
    }

    /// Waits until whatever was acknowledged is on both standbys.
    async fn settle(&self) {
        let primary = self.cluster.primary();
        let standbys = self.others(primary);
        self.cluster.wait_streaming(primary, standbys.len()).await;
        for standby in standbys {
            self.cluster.wait_replayed(standby).await;
        }
    }

    async fn next(&mut self) -> Option<Duration> {
        let fault = self.dice.draw(&mut self.bag, &BAG);
        sleep(self.dice.milliseconds(0, 500)).await;
        let naming = if self.dice.one_in(2) { Naming::AllMembers } else { self.dice.pick(&BROKEN) };
        let recovered = match fault {
            Fault::Failover(loss) => self.fail_over(loss, naming).await,
            Fault::DnsAlone => self.dns_alone().await,
            _ => self.disturb(fault).await,
        };
        self.answer(Naming::AllMembers, self.cluster.primary());
        recovered
    }

    /// The primary is lost, a standby is promoted, the old one comes back as a standby.
    async fn fail_over(&mut self, loss: Loss, naming: Naming) -> Option<Duration> {
        let (cluster, load) = (self.cluster, self.load);
        let old = cluster.primary();
        self.failovers += 1;
        load.say(&format!("failover {}: {loss:?} of {old:?}, DNS {naming:?}", self.failovers));
        self.answer(naming, old);
        match loss {
            Loss::Kill => cluster.kill(old).await,
            Loss::StopFast => cluster.stop_fast(old).await,
            Loss::StopImmediate => cluster.stop_immediate(old).await,
            Loss::Freeze => cluster.freeze(old),
            Loss::Demote => {
                cluster.set_read_only(old, true).await;
                self.drained(old).await;
            }
        }
        // A manager takes its time to notice, and what the old primary had sent arrives at the standbys.
        sleep(self.dice.milliseconds(100, 800)).await;
        let late = self.dice.milliseconds(100, 1500);
        let new = cluster.most_advanced_standby().await;
        let accepted = cluster.promote_timed(new).await.accepted_at;
        let moves_late = async {
            if naming == Naming::MovesLate {
                sleep(late).await;
                self.answer(naming, new);
            }
        };
        // A frozen primary must not wake before everybody has left it: it could still acknowledge what only the standby
        // has that was not promoted.
        let (recovered, ()) = tokio::join!(load.recovered(accepted), moves_late);
        let recovered = recovered?;
        if matches!(loss, Loss::Freeze) {
            cluster.thaw(old);
            sleep(self.dice.milliseconds(0, 500)).await;
        }
        cluster.restart_as_standby(old).await;
        load.recovered(Instant::now()).await?;
        load.say(&format!("  everybody works {recovered:.2?} after {new:?} accepted writes"));
        Some(recovered)
    }

    /// Something passes, and the primary stays what it is.
    async fn disturb(&mut self, fault: Fault) -> Option<Duration> {
        let cluster = self.cluster;
        let primary = cluster.primary();
        self.load.say(&format!("{fault:?} on {primary:?}"));
        match fault {
            Fault::Stall => {
                cluster.freeze(primary);
                sleep(self.dice.milliseconds(1000, 1500)).await;
                cluster.thaw(primary);
            }
            Fault::CrashBackend => cluster.kill_backend(primary).await,
            Fault::TerminateBackends => {
                cluster.terminate_backends(primary, "tokio-postgres-failover").await;
            }
            Fault::FenceSystem => {
                cluster.set_read_only(primary, true).await;
                sleep(self.dice.milliseconds(50, 2000)).await;
                cluster.set_read_only(primary, false).await;
            }
            _ => {
                cluster.set_database_read_only(primary, true).await;
                sleep(self.dice.milliseconds(50, 4000)).await;
                cluster.set_database_read_only(primary, false).await;
                // Else the database says "off" whatever the system says, and no later fence of the system is felt.
                let session = cluster.direct(primary).await;
                let sql = "ALTER DATABASE app RESET default_transaction_read_only";
                session.batch_execute(sql).await.expect("ALTER DATABASE");
            }
        }
        let recovered = self.load.recovered(Instant::now()).await?;
        self.load.say(&format!("  everybody works {recovered:.2?} after it was over"));
        Some(recovered)
    }

    async fn dns_alone(&mut self) -> Option<Duration> {
        let primary = self.cluster.primary();
        let naming = self.dice.pick(&BROKEN);
        let wrong = self.others(primary)[0];
        self.load.say(&format!("DNS {naming:?}"));
        self.answer(naming, wrong);
        sleep(self.dice.milliseconds(0, 1500)).await;
        self.cluster.terminate_backends(primary, "tokio-postgres-failover").await;
        self.load.recovered(Instant::now()).await?;
        sleep(self.dice.milliseconds(0, 1500)).await;
        self.load.recovered(Instant::now()).await
    }

    /// `named`: who stands in an answer that names one server.
    fn answer(&self, naming: Naming, named: Node) {
        let all = || self.cluster.nodes().into_iter().map(|node| self.cluster.addr(node)).collect();
        self.cluster.dns().answer(match naming {
            Naming::AllMembers => Answer::Addresses(all()),
            Naming::MovesLate | Naming::Stale => Answer::Addresses(vec![self.cluster.addr(named)]),
            Naming::NxDomain => Answer::NxDomain,
            Naming::ServFail => Answer::ServFail,
            Naming::Silent => Answer::Silent,
            Naming::Empty => Answer::Empty,
        });
    }

    /// A transaction that had begun before the server turned read-only goes on writing. While a standby is promoted
    /// that would be a split brain, and one that no client can see: the other standby would acknowledge it.
    async fn drained(&self, node: Node) {
        let session = self.cluster.direct(node).await;
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND xact_start IS NOT NULL";
        let mut idle = 0;
        eventually("the demoted primary has no transaction", PATIENCE, async || {
            let open: i64 = session.query_one(sql, &[]).await.expect("pg_stat_activity").get(0);
            idle = if open == 0 { idle + 1 } else { 0 };
            idle > 3
        })
        .await;
    }

    fn others(&self, node: Node) -> Vec<Node> {
        self.cluster.nodes().into_iter().filter(|other| *other != node).collect()
    }
}
