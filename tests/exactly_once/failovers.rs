//! Primaries killed under load, with commits in all states, and standbys promoted.
//!
//! Each failover begins when both standbys have all that was acknowledged before, and the one that received most is
//! promoted. So there is one at a time, and what is lost then was acknowledged within it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use testbed::{Cluster, Cutter, Node, eventually};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

use crate::cuts::commit_cut;
use crate::dice::Dice;
use crate::writers::{Outcome, Settler, Unreplicated, Writers, create_tables};

const WRITERS: usize = 12;
/// At most so many commits stand still when the primary is killed.
const WITHHELD: usize = 6;
/// For what the test bed waits for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Several hundred transactions with ids and nothing else, as quickly as a server can.
const BURN: &str = "DO $$ BEGIN FOR n IN 1..500 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Replication {
    /// Commits wait for a standby: whatever was acknowledged survives.
    Synchronous,
    /// The server acknowledges what is on the primary alone, and may lose it.
    Asynchronous,
}

/// What came of some failovers.
pub(crate) struct Failovers {
    pub(crate) made: u64,
    /// Of the transactions that a settler found not to be committed, so many had an id that the new primary had given to
    /// another transaction meanwhile, and had committed.
    pub(crate) reused: i64,
    pub(crate) outcome: Outcome,
}

/// What keeps WAL from the standbys just before the kill.
#[derive(Clone, Copy, Debug)]
enum Lag {
    Nothing,
    /// The primary does not send: what it commits dies with it.
    Senders,
    /// The standbys do not read: what was sent waits in the sockets, and arrives after the kill.
    Standbys,
}

pub(crate) async fn run(
    settler: Settler,
    replication: Replication,
    wanted: u64,
    seed: u64,
) -> Result<Failovers, String> {
    let builder = Cluster::builder();
    let builder = if replication == Replication::Asynchronous { builder.asynchronous() } else { builder };
    let cluster = builder.start().await;
    create_tables(&cluster).await;
    let mut cutters = Vec::new();
    for node in cluster.nodes() {
        cutters.push(in_front_of(&cluster, node).await);
    }
    let hosts: Vec<String> = cutters.iter().map(|cutter| cutter.addr().to_string()).collect();
    let url = format!("postgres://app@{}/app", hosts.join(","));
    let writers = Writers::start(&url, settler, WRITERS, seed);
    writers.recovered(Instant::now()).await?;
    let mut director =
        Director { cluster: &cluster, cutters: &cutters, writers: &writers, dice: Dice::new(seed), bag: Vec::new() };
    let (mut unreplicated, mut reused) = (Vec::new(), 0);
    for made in 1..=wanted {
        let span = director.fail_over(replication, made).await?;
        if replication == Replication::Asynchronous {
            unreplicated.push(span);
        }
        reused += director.reused().await;
    }
    Ok(Failovers { made: wanted, reused, outcome: writers.stop(&cluster, &unreplicated).await })
}

/// A cutter at an address of its own, with the cluster's port.
pub(crate) async fn in_front_of(cluster: &Cluster, node: Node) -> Cutter {
    let spare = cluster.spare_addr(u8::try_from(node.0).expect("few nodes"));
    Cutter::start(SocketAddr::new(spare, cluster.port()), cluster.socket_addr(node)).await
}

struct Director<'a> {
    cluster: &'a Cluster,
    cutters: &'a [Cutter],
    writers: &'a Writers,
    dice: Dice,
    bag: Vec<Lag>,
}

impl Director<'_> {
    /// Kills the primary and has the old one back as a standby. Tells what it may have acknowledged and lost.
    async fn fail_over(&mut self, replication: Replication, number: u64) -> Result<Unreplicated, String> {
        let (cluster, writers) = (self.cluster, self.writers);
        let old = cluster.primary();
        let cutter = &self.cutters[old.0];
        let mut standbys: Vec<Node> = cluster.nodes().into_iter().filter(|node| *node != old).collect();
        self.dice.shuffle(&mut standbys);
        cluster.wait_streaming(old, standbys.len()).await;
        let from = Instant::now();
        for standby in &standbys {
            cluster.wait_replayed(*standby).await;
        }

        let lags: &[Lag] = match replication {
            Replication::Synchronous => &[Lag::Nothing, Lag::Nothing, Lag::Senders, Lag::Standbys],
            Replication::Asynchronous => &[Lag::Senders, Lag::Senders, Lag::Standbys],
        };
        let lag = self.dice.draw(&mut self.bag, lags);
        for standby in &standbys {
            match lag {
                Lag::Nothing => {}
                Lag::Senders => cluster.stop_shipping(old, *standby).await,
                Lag::Standbys => cluster.freeze(*standby),
            }
            sleep(self.dice.milliseconds(0, 30)).await;
        }
        let (dead, is_dead) = watch::channel(false);
        for _ in 0..self.dice.below(WITHHELD + 1) {
            let mut is_dead = is_dead.clone();
            cutter.arm_with(commit_cut(&mut self.dice), async move || {
                // An error is the end of the run.
                let _ended = is_dead.wait_for(|dead| *dead).await;
            });
        }
        sleep(self.dice.milliseconds(0, 20)).await;
        cluster.kill(old).await;
        cutter.disarm();
        dead.send_replace(true);
        if matches!(lag, Lag::Standbys) {
            for standby in &standbys {
                cluster.thaw(*standby);
            }
        }
        for standby in &standbys {
            self.received_all(*standby).await;
        }

        let new = cluster.most_advanced_standby().await;
        let session = cluster.direct(new).await;
        let until = Instant::now();
        // Ids are given to others before the settlers can ask about their own.
        let (promotion, burned) = tokio::join!(cluster.promote_timed(new), burn(&session));
        burned?;
        cluster.restart_as_standby(old).await;
        writers.recovered(promotion.accepted_at.max(until)).await?;
        if number.is_multiple_of(10) {
            writers.say(&format!("failover {number}: {old:?} to {new:?}, the last with lag: {lag:?}"));
        }
        Ok(Unreplicated { from, until })
    }

    /// Waits until a standby has read all that the dead primary had sent. One that reads on could get ahead of the new
    /// primary, and could not follow it.
    async fn received_all(&self, standby: Node) {
        let session = self.cluster.direct(standby).await;
        let sql = "SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming'";
        eventually("the standby sees its primary gone", PATIENCE, async || {
            session.query_opt(sql, &[]).await.is_ok_and(|streaming| streaming.is_none())
        })
        .await;
    }

    /// See [`Failovers::reused`].
    async fn reused(&self) -> i64 {
        let xids: Vec<i64> = self.writers.take_not_committed().into_iter().map(u64::cast_signed).collect();
        let session = self.cluster.direct(self.cluster.primary()).await;
        // The server refuses to tell of ids to come.
        let sql = "SELECT count(*) FROM unnest($1::bigint[]) xid
                   WHERE CASE WHEN xid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
                              THEN pg_xact_status(xid::text::xid8) = 'committed' END";
        session.query_one(sql, &[&xids]).await.expect("pg_xact_status").get(0)
    }
}

/// Uses up ids from the moment of the promotion.
async fn burn(session: &Client) -> Result<(), String> {
    let burned = timeout(PATIENCE, async {
        while session.batch_execute(BURN).await.is_err() {
            sleep(Duration::from_millis(1)).await;
        }
    });
    burned.await.map_err(|_| "the new primary gives no ids".to_owned())
}
