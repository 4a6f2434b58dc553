//! One round of a trial: a cluster from nothing, writers, a fault, and what came of it.

use std::io;
use std::time::{Duration, Instant};

use testbed::{Front, Node, Part, Patroni, PatroniBuilder, Repmgr};
use tokio::time::sleep;
use tokio_postgres::Client;
use tokio_postgres_failover::{Pool, PoolBuilder, RetryPolicy};
use tracing_subscriber::EnvFilter;

use crate::entries;
use crate::first_write::{FirstWrite, ended};
use crate::load::{Writers, prepare};
use crate::report::{Round, Times};
use crate::trials::{Bed, Fault, Trial, Way};

/// As docs/operators/patroni.md advises.
const DEADLINE: Duration = Duration::from_secs(60);
/// More than the pool needs to find its way back to an old primary.
const AFTERWARDS: Duration = Duration::from_secs(1);
/// For how long etcd is away, or Patroni paused.
const AWAY: Duration = Duration::from_secs(6);

impl Trial {
    /// Whether all that it needs is here; prints a line for what is not.
    pub(crate) fn is_possible(&self) -> bool {
        let manager = match self.bed {
            Bed::Patroni(..) => Patroni::is_installed(),
            Bed::Repmgr { .. } => Repmgr::is_installed(),
        };
        manager && (!matches!(self.way, Way::HaProxy(_)) || Front::is_installed())
    }

    pub(crate) async fn round(&self) -> Round {
        // Fails for each round but the first: there is one log for all.
        let log = tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).with_writer(io::stderr);
        let _ = log.try_init();
        match &self.bed {
            Bed::Patroni(builder, fault) => self.on_patroni(builder, *fault).await,
            Bed::Repmgr { again } => self.on_repmgr(*again).await,
        }
    }

    async fn on_patroni(&self, builder: &PatroniBuilder, fault: Fault) -> Round {
        let begun = Instant::now();
        let patroni = builder.clone().start().await;
        println!("{}: the cluster was there after {:.1} s", self.name, begun.elapsed().as_secs_f64());
        let old = patroni.leader().await;
        prepare(&patroni.direct(old).await).await;
        let front = match self.way {
            Way::HaProxy(checks) => Some(Front::start(&patroni, checks).await),
            Way::Hosts | Way::HostsNotWarm => None,
        };
        let url = front.as_ref().map_or_else(|| patroni.url_hosts(), Front::url);
        let writers = Writers::warm(&self.pool(&url)).await;
        let (fault_at, accepted) = happen(&patroni, old, fault).await;
        let times = Times { begun, fault: fault_at, accepted };
        let mut broken = Vec::new();
        broken.extend(writers.recovered(accepted).await.err());
        undo(&patroni, old, fault).await;
        afterwards(&writers, &mut broken).await;
        let answers = writers.stop().await;
        let primary = if succeeds(fault) { patroni.successor(old).await } else { patroni.leader().await };
        let stored = entries::stored(&patroni.direct(primary).await).await;
        let mut round = Round::judge(&answers, &stored, times, self.promise);
        round.broken.append(&mut broken);
        round
    }

    async fn on_repmgr(&self, again: bool) -> Round {
        let begun = Instant::now();
        let mut repmgr = Repmgr::start().await;
        println!("{}: the cluster was there after {:.1} s", self.name, begun.elapsed().as_secs_f64());
        let old = Node(0);
        prepare(&repmgr.cluster().direct(old).await).await;
        // All members, by one name, as on Fly.
        let builder = self.builder(&repmgr.cluster().url()).dns_servers([repmgr.cluster().dns().addr()]);
        let writers = Writers::warm(&builder.build().expect("a pool")).await;
        let others = repmgr.cluster().nodes().split_off(1);
        let others: Vec<_> = others.into_iter().map(|node| repmgr.cluster().socket_addr(node)).collect();
        let first_write = FirstWrite::watch(others);
        let fault = Instant::now();
        repmgr.cluster().kill(old).await;
        repmgr.kill_manager(old).await;
        let accepted = first_write.accepted().await;
        let times = Times { begun, fault, accepted };
        let mut broken = Vec::new();
        if again {
            repmgr.cluster().start_node(old).await;
            assert!(is_writable(&repmgr.cluster().direct(old).await).await, "nobody fences it");
        }
        broken.extend(writers.recovered(accepted).await.err());
        afterwards(&writers, &mut broken).await;
        let answers = writers.stop().await;
        let primary = repmgr.successor(old).await;
        if again {
            assert!(is_writable(&repmgr.cluster().direct(old).await).await, "there were two until the end");
        }
        let stored = entries::stored(&repmgr.cluster().direct(primary).await).await;
        let mut round = Round::judge(&answers, &stored, times, self.promise);
        round.broken.append(&mut broken);
        round
    }

    fn pool(&self, url: &str) -> Pool {
        self.builder(url).build().expect("a pool")
    }

    fn builder(&self, url: &str) -> PoolBuilder {
        let builder = Pool::builder(url).expect("a connection string").max_size(8).checkout_timeout(DEADLINE);
        builder.retry(RetryPolicy::new().deadline(DEADLINE)).warm_standbys(self.way != Way::HostsNotWarm)
    }
}

/// Nobody goes back to where the primary was, and nobody is stuck.
async fn afterwards(writers: &Writers, broken: &mut Vec<String>) {
    sleep(AFTERWARDS).await;
    broken.extend(writers.recovered(Instant::now()).await.err());
}

/// Whether another node is the primary afterwards, whatever the old one says.
fn succeeds(fault: Fault) -> bool {
    matches!(fault, Fault::Kill | Fault::KillServer | Fault::Switchover | Fault::Zombie | Fault::Cut)
}

/// Makes the fault; returns when there was no primary any more, and when there was one again, as the servers tell it.
/// Where there always was one, both are the same.
async fn happen(patroni: &Patroni, old: Node, fault: Fault) -> (Instant, Instant) {
    if !succeeds(fault) {
        return pass(patroni, old, fault).await;
    }
    let to = patroni.candidate(old).await;
    let successor = FirstWrite::watch(patroni.others(old).into_iter().map(|node| patroni.socket_addr(node)));
    // A zombie takes writes until the end.
    let gone = (fault != Fault::Zombie).then(|| tokio::spawn(ended(patroni.socket_addr(old))));
    match fault {
        Fault::Kill => patroni.kill(old, Part::Both).await,
        Fault::KillServer => patroni.kill(old, Part::PostgreSql).await,
        Fault::Switchover => patroni.switchover(to).await,
        Fault::Zombie => patroni.freeze(old, Part::Patroni).await,
        _ => patroni.cut(old),
    }
    let accepted = successor.accepted().await;
    let gone = match gone {
        Some(gone) => gone.await.expect("no panic"),
        None => accepted,
    };
    (gone.min(accepted), accepted)
}

/// The same for a fault that leaves the primary in its place, or gives it back.
async fn pass(patroni: &Patroni, old: Node, fault: Fault) -> (Instant, Instant) {
    let anybody = || FirstWrite::watch(patroni.nodes().into_iter().map(|node| patroni.socket_addr(node)));
    let begun = Instant::now();
    match fault {
        Fault::Quorum => {
            patroni.lose_quorum();
            let gone = ended(patroni.socket_addr(old)).await;
            sleep(AWAY).await;
            patroni.restore_quorum().await;
            (gone, anybody().accepted().await)
        }
        Fault::Failsafe => {
            patroni.lose_quorum();
            sleep(AWAY * 2).await;
            patroni.restore_quorum().await;
            (begun, begun)
        }
        Fault::Lease => {
            patroni.kill(old, Part::Both).await;
            let gone = Instant::now();
            patroni.start_node(old).await;
            (gone, FirstWrite::watch([patroni.socket_addr(old)]).accepted().await)
        }
        Fault::Pause => {
            patroni.pause().await;
            patroni.kill(old, Part::PostgreSql).await;
            let gone = Instant::now();
            sleep(AWAY).await;
            patroni.resume().await;
            (gone, anybody().accepted().await)
        }
        Fault::Restart => {
            let gone = tokio::spawn(ended(patroni.socket_addr(old)));
            patroni.restart(old).await;
            (gone.await.expect("no panic"), Instant::now())
        }
        _ => {
            patroni.reinit(patroni.others(old)[0]).await;
            (begun, begun)
        }
    }
}

/// The old primary comes back, where it is away.
async fn undo(patroni: &Patroni, old: Node, fault: Fault) {
    match fault {
        Fault::Kill => patroni.start_node(old).await,
        Fault::Zombie => patroni.thaw(old, Part::Patroni).await,
        Fault::Cut => patroni.heal(old),
        Fault::Reinit => patroni.wait_healthy().await,
        _ => {}
    }
}

async fn is_writable(session: &Client) -> bool {
    session.batch_execute("UPDATE testbed.probe SET writes = writes + 1").await.is_ok()
}
