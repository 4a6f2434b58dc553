//! Primaries killed under load, with commits in all states, and standbys promoted.
//!
//! Each round begins when all standbys have all that was acknowledged before. It has one promotion or several: the new
//! primary is killed in turn, and often the pool could not get to it in between. The standby that received most is
//! promoted, or, where commits do not wait, sometimes one that is behind another: that one cannot follow then.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use testbed::{Cluster, Cutter, Node, eventually};
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

use crate::cuts::Withheld;
use crate::dice::Dice;
use crate::writers::{Outcome, Settler, Unreplicated, Writers, create_tables};

const WRITERS: usize = 12;
/// At most so many commits stand still when the primary is killed.
const WITHHELD: usize = 6;
/// For what the test bed waits for.
const PATIENCE: Duration = Duration::from_secs(30);
/// For a standby that may be ahead of its primary.
const FOLLOW: Duration = Duration::from_secs(1);
/// The number of an address where nobody listens, for [`Cluster::spare_addr`].
const NOWHERE: u8 = 20;
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
    /// Of the transactions that a settler found not to be committed, so many had an id that the new primary had given
    /// to another transaction meanwhile, and had committed.
    pub(crate) reused: i64,
    pub(crate) outcome: Outcome,
}

/// What a round is like, and how many there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) replication: Replication,
    pub(crate) rounds: u64,
    /// In each round.
    pub(crate) promotions: u64,
    /// All nodes share a WAL archive.
    pub(crate) archive: bool,
    /// The pool may read the history of the server's log.
    pub(crate) history: bool,
}

/// What keeps WAL from the standbys just before the kill.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lag {
    Nothing,
    /// The primary does not send: what it commits dies with it.
    Senders,
    /// It does not send to the standby that is promoted, and sends to the others.
    Promoted,
    /// The standbys do not read: what was sent waits in the sockets, and arrives after the kill.
    Standbys,
}

pub(crate) async fn run(settler: Settler, plan: Plan, seed: u64) -> Result<Failovers, String> {
    let Plan { replication, rounds, promotions, archive, history } = plan;
    let nodes = usize::try_from(promotions).expect("few promotions") + 1;
    let builder = Cluster::builder().nodes(nodes.max(3));
    let builder = if replication == Replication::Asynchronous { builder.asynchronous() } else { builder };
    let cluster = if archive { builder.archive() } else { builder }.start().await;
    create_tables(&cluster, history).await;
    let mut cutters = Vec::new();
    for node in cluster.nodes() {
        cutters.push(in_front_of(&cluster, node).await);
    }
    let hosts: Vec<String> = cutters.iter().map(|cutter| cutter.addr().to_string()).collect();
    let url = format!("postgres://app@{}/app", hosts.join(","));
    let writers = Writers::start(&url, settler, WRITERS, seed);
    writers.recovered(Instant::now()).await?;
    let (dice, bag) = (Dice::new(seed), Vec::new());
    let mut director = Director { cluster: &cluster, cutters: &cutters, writers: &writers, plan, dice, bag };
    let (mut unreplicated, mut reused) = (Vec::new(), 0);
    for number in 1..=rounds {
        let span = director.round(number).await?;
        if replication == Replication::Asynchronous {
            unreplicated.push(span);
        }
        reused += director.reused().await;
    }
    Ok(Failovers { reused, outcome: writers.stop(&cluster, &unreplicated).await })
}

/// A cutter at an address of its own, with the cluster's port.
pub(crate) async fn in_front_of(cluster: &Cluster, node: Node) -> Cutter {
    let spare = cluster.spare_addr(u8::try_from(node.0).expect("few nodes"));
    Cutter::start(SocketAddr::new(spare, cluster.port()), cluster.socket_addr(node)).await
}

fn nowhere(cluster: &Cluster) -> SocketAddr {
    SocketAddr::new(cluster.spare_addr(NOWHERE), cluster.port())
}

struct Director<'a> {
    cluster: &'a Cluster,
    cutters: &'a [Cutter],
    writers: &'a Writers,
    plan: Plan,
    dice: Dice,
    bag: Vec<Lag>,
}

impl Director<'_> {
    /// Fails over so many times as a round has promotions, and has all that died back as standbys. Tells what they may
    /// have acknowledged and lost.
    async fn round(&mut self, number: u64) -> Result<Unreplicated, String> {
        let cluster = self.cluster;
        let (mut dead, mut lags) = (Vec::new(), Vec::new());
        // What a new primary acknowledged is lost, too, when the next one had not followed it: one span for all.
        let (from, mut until) = (Instant::now(), Instant::now());
        let mut first_write = until;
        for promotion in 1..=self.plan.promotions {
            let is_last = promotion == self.plan.promotions;
            dead.push(cluster.primary());
            let lag = self.lag(is_last);
            lags.push(lag);
            (until, first_write) = self.fail_over(lag, promotion == 1, is_last).await?;
        }
        for node in &dead {
            cluster.restart_as_standby(*node).await;
        }
        self.writers.recovered(first_write.max(until)).await?;
        if number.is_multiple_of(10) {
            let new = cluster.primary();
            self.writers.say(&format!("round {number}: {dead:?} to {new:?}, the last with lags: {lags:?}"));
        }
        Ok(Unreplicated { from, until, skipped: lags.contains(&Lag::Promoted) })
    }

    fn lag(&mut self, is_last: bool) -> Lag {
        let lags: &[Lag] = match (self.plan.replication, self.plan.promotions) {
            (Replication::Synchronous, _) => &[Lag::Nothing, Lag::Nothing, Lag::Senders, Lag::Standbys],
            (Replication::Asynchronous, 1) => &[Lag::Senders, Lag::Senders, Lag::Standbys],
            (Replication::Asynchronous, _) => &[Lag::Senders, Lag::Promoted, Lag::Standbys],
        };
        match self.dice.draw(&mut self.bag, lags) {
            // Those that are ahead of the last one promoted could not follow it, and have to be copied.
            Lag::Promoted if is_last => Lag::Senders,
            lag => lag,
        }
    }

    /// Kills the primary and promotes a standby. Tells when the promotion began, and when the new one took its first
    /// write.
    async fn fail_over(&mut self, lag: Lag, is_first: bool, is_last: bool) -> Result<(Instant, Instant), String> {
        let cluster = self.cluster;
        let old = cluster.primary();
        let mut standbys: Vec<Node> =
            cluster.nodes().into_iter().filter(|node| *node != old && cluster.is_running(*node)).collect();
        self.dice.shuffle(&mut standbys);
        if !self.follow(old, &standbys, is_first).await {
            self.writers.say(&format!("a standby is ahead of {old:?}"));
        }
        let lagging = if lag == Lag::Promoted { &standbys[..1] } else { &standbys[..] };
        for standby in lagging {
            match lag {
                Lag::Nothing => {}
                Lag::Senders | Lag::Promoted => self.stop_shipping(old, *standby).await,
                Lag::Standbys => cluster.freeze(*standby),
            }
            sleep(self.dice.milliseconds(0, 30)).await;
        }
        self.kill(old).await;
        if lag == Lag::Standbys {
            for standby in &standbys {
                cluster.thaw(*standby);
            }
        }
        for standby in &standbys {
            cluster.wait_received_all(*standby).await;
        }

        let new = if lag == Lag::Promoted { standbys[0] } else { cluster.most_advanced_standby().await };
        let session = cluster.direct(new).await;
        let until = Instant::now();
        let hidden = !is_last && self.dice.one_in(2);
        if hidden {
            self.cutters[new.0].set_upstream(nowhere(cluster));
        }
        // Ids are given to others before the settlers can ask about their own.
        let (promotion, burned) = tokio::join!(cluster.promote_timed(new), burn(&session));
        burned?;
        if !is_last {
            self.know_timeline(new, standbys.iter().filter(|standby| **standby != new)).await;
        }
        // Whoever is promoted next: the way to its server is open again.
        self.cutters[old.0].set_upstream(cluster.socket_addr(old));
        Ok((until, promotion.accepted_at))
    }

    /// Kills a server while commits are on their way to it and back.
    async fn kill(&mut self, node: Node) {
        let cutter = &self.cutters[node.0];
        let mut withheld = Withheld::arm(cutter, &mut self.dice, WITHHELD);
        sleep(self.dice.milliseconds(0, 20)).await;
        withheld.first().await;
        self.cluster.kill(node).await;
        cutter.disarm();
        withheld.end();
    }

    /// Waits until the standbys have all that was acknowledged. In vain, and not for long, where one is ahead of its
    /// primary. None is at the begin of a round, however slow the machine: what was acknowledged before the round is
    /// not excused.
    async fn follow(&self, primary: Node, standbys: &[Node], is_first: bool) -> bool {
        let all = async {
            self.cluster.wait_streaming(primary, standbys.len()).await;
            for standby in standbys {
                self.cluster.wait_replayed(*standby).await;
            }
        };
        if self.plan.replication == Replication::Synchronous || is_first {
            all.await;
            return true;
        }
        timeout(FOLLOW, all).await.is_ok()
    }

    /// A standby that is not sent anything has nothing to be stopped.
    async fn stop_shipping(&self, primary: Node, standby: Node) {
        let session = self.cluster.direct(primary).await;
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE application_name = $1";
        let name = format!("n{}", standby.0);
        let senders: i64 = session.query_one(sql, &[&name]).await.expect("pg_stat_replication").get(0);
        if senders > 0 {
            self.cluster.stop_shipping(primary, standby).await;
        }
    }

    /// Waits until the other standbys know that the number of the new primary's timeline is taken, whether they can
    /// follow it or not.
    async fn know_timeline(&self, primary: Node, standbys: impl Iterator<Item = &Node>) {
        let timeline = self.cluster.timeline(primary).await;
        if self.plan.archive {
            return self.cluster.wait_archived(timeline).await;
        }
        for standby in standbys {
            eventually("the standby knows the timeline", PATIENCE, async || {
                self.cluster.history_of(*standby, timeline).is_some()
            })
            .await;
        }
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
