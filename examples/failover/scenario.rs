//! One failover: a cluster, two loads, a fault, a promotion, and what came of it.

use std::error::Error;
use std::time::{Duration, Instant};

use testbed::Cluster;
use tokio::time::{sleep, sleep_until};
use tokio_postgres_failover::{Pool, deadpool_postgres};

use crate::fault::Fault;
use crate::figures::{Figures, Timeline};
use crate::load::{Load, Side, Writer};
use crate::screen::Screen;
use crate::{Naming, Settings, WRITERS, plain};

/// From the promotion to the change of DNS.
const DNS_LAG: Duration = Duration::from_millis(200);
/// A side that does not write again within this time after the promotion never does.
const GIVE_UP: Duration = Duration::from_secs(10);
/// The bins of the timeline.
pub(crate) const BIN: Duration = Duration::from_millis(50);

/// One side of a run.
pub(crate) struct Outcome {
    pub(crate) figures: Figures,
    /// Acknowledged writes, and errors, per [`BIN`] since the start.
    pub(crate) writes: Vec<u32>,
    pub(crate) errors: Vec<u32>,
    /// The different errors.
    pub(crate) messages: Vec<String>,
}

/// What one failover came to.
pub(crate) struct Run {
    pub(crate) fault: Fault,
    pub(crate) naming: Naming,
    pub(crate) timeline: Timeline,
    pub(crate) pool: Outcome,
    pub(crate) plain: Outcome,
}

pub(crate) async fn run(settings: Settings, fault: Fault, screen: &Screen) -> Result<Run, Box<dyn Error>> {
    // One run has time for a calm look before and after; many runs need only the failover.
    let (before, whole) = match settings.runs {
        1 => (Duration::from_secs(3), Duration::from_secs(10)),
        _ => (Duration::from_millis(1500), Duration::ZERO),
    };
    let cluster = Cluster::start().await;
    let (failover, plain) = contestants(&cluster, settings.naming)?;
    let sides = [Side::Failover(failover.clone()), Side::Plain(plain)];
    create_tables(&cluster, &sides).await?;
    failover.connect().await?;

    let start = Instant::now();
    let loads = sides.each_ref().map(|side| Load::start(side, start));
    let live = screen.follow(start, failover.clone(), loads.each_ref().map(|load| load.progress.clone()));

    let old = cluster.primary();
    sleep_until((start + before).into()).await;
    let struck = Instant::now();
    fault.strike(&cluster, old).await;
    screen.event(start, &format!("{}: {}", fault.name(), cluster.socket_addr(old)));

    sleep_until((struck + settings.detection).into()).await;
    let new = cluster.most_advanced_standby().await;
    let promotion = cluster.promote_timed(new).await;
    screen.event(start, &format!("{} was promoted in {:.0?}", cluster.socket_addr(new), promotion.took));

    let mut named = None;
    if settings.naming == Naming::Moves {
        sleep_until((promotion.accepted_at + DNS_LAG).into()).await;
        cluster.dns().set(&[cluster.addr(new)]);
        named = Some(Instant::now());
        screen.event(start, "DNS names the new primary");
    }

    let recovered = || loads.iter().all(|load| load.progress.all_wrote_since(promotion.accepted_at));
    while !recovered() && promotion.accepted_at.elapsed() < GIVE_UP {
        sleep(Duration::from_millis(10)).await;
    }
    sleep_until((Instant::now() + Duration::from_secs(1)).max(start + whole).into()).await;

    let end = Instant::now();
    let [first, second] = loads;
    first.end();
    second.end();
    fault.over(&cluster, old).await;
    let (lived, lived_plain) = (first.stop().await?, second.stop().await?);
    drop(live);
    let accepted = promotion.accepted_at;
    // The last change of the pool's state: it holds since the new primary was verified.
    let verified = failover.status().view.changed.at.into_std();
    let timeline = Timeline { start, struck, accepted, verified, promotion: promotion.took, named, end };
    let pool = outcome(&cluster, &sides[0], &timeline, &lived).await?;
    let plain = outcome(&cluster, &sides[1], &timeline, &lived_plain).await?;
    Ok(Run { fault, naming: settings.naming, timeline, pool, plain })
}

fn contestants(cluster: &Cluster, naming: Naming) -> Result<(Pool, deadpool_postgres::Pool), Box<dyn Error>> {
    if naming == Naming::Hosts {
        let url = cluster.url_hosts();
        return Ok((Pool::builder(&url)?.max_size(WRITERS).build()?, plain::pool(&url, None)?));
    }
    if naming == Naming::Moves {
        cluster.dns().set(&[cluster.addr(cluster.primary())]);
    }
    let (url, dns) = (cluster.url(), cluster.dns().addr());
    let failover = Pool::builder(&url)?.dns_servers([dns]).max_size(WRITERS).build()?;
    Ok((failover, plain::pool(&url, Some(dns))?))
}

async fn create_tables(cluster: &Cluster, sides: &[Side]) -> Result<(), Box<dyn Error>> {
    let client = cluster.direct(cluster.primary()).await;
    for side in sides {
        let table = side.table();
        // Without a unique key, so that a doubled row shows.
        client
            .batch_execute(&format!("CREATE TABLE {table} (id bigint NOT NULL); GRANT ALL ON {table} TO app"))
            .await?;
    }
    Ok(())
}

/// Reads the table back from the new primary and holds it against what the writers were told.
async fn outcome(
    cluster: &Cluster,
    side: &Side,
    timeline: &Timeline,
    writers: &[Writer],
) -> Result<Outcome, Box<dyn Error>> {
    let client = cluster.direct(cluster.primary()).await;
    let rows = client.query(&format!("SELECT id, count(*) FROM {} GROUP BY id", side.table()), &[]).await?;
    let stored = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let mut messages: Vec<String> = writers
        .iter()
        .flat_map(|writer| writer.errors_until(timeline.end))
        .map(|(_, message)| message.clone())
        .collect();
    messages.sort_unstable();
    messages.dedup();
    Ok(Outcome {
        figures: Figures::new(timeline, writers, &stored),
        writes: bins(timeline, writers.iter().flat_map(|writer| &writer.acknowledged).map(|(_, at)| *at)),
        errors: bins(timeline, writers.iter().flat_map(|writer| &writer.errors).map(|(at, _)| *at)),
        messages,
    })
}

fn bins(timeline: &Timeline, instants: impl Iterator<Item = Instant>) -> Vec<u32> {
    let bin = |at: Instant| usize::try_from((at - timeline.start).as_millis() / BIN.as_millis()).unwrap_or(usize::MAX);
    let mut counts = vec![0; bin(timeline.end)];
    for at in instants {
        if let Some(count) = counts.get_mut(bin(at)) {
            *count += 1;
        }
    }
    counts
}
