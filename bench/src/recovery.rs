//! Each failure, each peer: how long until its workers write again, and what it cost their callers.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use testbed::Cluster;
use tokio::time::sleep;

use crate::console::{command, say};
use crate::error::Error;
use crate::event::{Event, now_micros};
use crate::fault::{Failure, Timeline};
use crate::figures::Figures;
use crate::floor::{self, NAME_OF_FLOOR, detection};
use crate::isolation::Network;
use crate::measurement::Measurement;
use crate::peer::Peer;
use crate::recorder::Recorder;
use crate::results::{PeerInfo, Results};
use crate::settings::Settings;
use crate::stage::{Stage, rotate};
use crate::versions::Machine;

/// A worker's pause between two rows.
pub const PACE: Duration = Duration::from_millis(5);
/// Writing as usual, before the failure.
const CALM: Duration = Duration::from_millis(700);
/// And after the last worker wrote again.
const AFTER: Duration = Duration::from_millis(300);
/// Until all workers have written for the first time.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// What one failover of one peer came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    figures: Figures,
    promotion: f64,
    told: BTreeMap<String, usize>,
}

/// Samples by peer and metric, in the order of their first appearance.
#[derive(Default)]
struct Samples(Vec<(String, &'static str, &'static str, Vec<Option<f64>>)>);

impl Samples {
    fn add(&mut self, peer: &str, metric: &'static str, unit: &'static str, value: Option<f64>) {
        match self.0.iter_mut().find(|(of, name, ..)| of == peer && *name == metric) {
            Some((.., samples)) => samples.push(value),
            None => self.0.push((peer.to_owned(), metric, unit, vec![value])),
        }
    }

    /// Times are relative to the floor of the same run.
    fn measurements(&self, case: &str) -> Vec<Measurement> {
        let of = |(peer, metric, unit, samples): &(String, &'static str, &'static str, Vec<_>)| {
            Measurement::new(peer, case, *metric, *unit, samples.clone())
        };
        let all: Vec<_> = self.0.iter().map(of).collect();
        let floor = all.iter().find(|measured| measured.peer == NAME_OF_FLOOR && measured.metric == "first_write");
        let floor = floor.and_then(|measured| measured.spread().median);
        let related = |measured: Measurement| match measured.unit.as_str() {
            "ms" => measured.relative_to(NAME_OF_FLOOR, floor),
            _ => measured,
        };
        all.into_iter().map(related).collect()
    }
}

/// Runs one failure with all peers, and writes its results after each round.
pub async fn run(settings: &Settings, network: &Arc<Network>, failure: Failure) -> Result<(), Error> {
    let peers = settings.choose(crate::peers())?;
    let rounds = rounds(settings, failure);
    let mut results = Results {
        case: format!("recovery/{}", failure.name()),
        explained: failure.explained().to_owned(),
        command: command(settings, &format!("CASES=recovery FAILURES={}", failure.name()), rounds),
        at: 0,
        machine: Machine::this(crate::postgres_version(network).await?),
        rounds: 0,
        seed: settings.seed,
        peers: Vec::new(),
        notes: network.notes(),
        measurements: Vec::new(),
        told: BTreeMap::new(),
    };
    if let Some(missing) = failure.missing(network) {
        say(&format!("recovery/{}: left out, {missing}", failure.name()));
        return Ok(());
    }
    let mut able = Vec::new();
    for peer in peers {
        let missing = peer.missing().await;
        results.peers.push(PeerInfo::of(&*peer, missing.clone()));
        match missing {
            Some(missing) => say(&format!("{}: left out, {missing}", peer.name())),
            None => able.push(peer),
        }
    }
    let mut samples = Samples::default();
    for round in 0..rounds {
        measure_floor(&mut samples, network, settings.seed, round).await?;
        let mut order: Vec<usize> = (0..able.len()).collect();
        let step = able.len().div_ceil(rounds);
        order.rotate_left(round * step % able.len().max(1));
        for peer in order.into_iter().filter_map(|index| able.get(index)) {
            let name = peer.name();
            // Who cannot start at all is tried again in each round of a full run only.
            let given_up = results.peers.iter().any(|info| info.name == name && info.missing.is_some());
            if settings.quick && given_up {
                continue;
            }
            match one(settings, network, failure, &**peer, round).await {
                Ok(outcome) => {
                    tell(failure, round, &name, &outcome);
                    for (metric, unit, value) in outcome.figures.named() {
                        samples.add(&name, metric, unit, value);
                    }
                    samples.add(&name, "promotion", "ms", Some(outcome.promotion));
                    let told = results.told.entry(name).or_default();
                    outcome.told.into_iter().for_each(|(text, count)| *told.entry(text).or_default() += count);
                }
                Err(Stopped::Peer(why)) => {
                    say(&format!("recovery/{} round {}: {name}: {why}", failure.name(), round + 1));
                    if let Some(info) = results.peers.iter_mut().find(|info| info.name == name) {
                        info.missing = Some(why);
                    }
                }
                Err(Stopped::Harness(error)) => return Err(error),
            }
        }
        results.rounds = round + 1;
        results.at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        results.measurements = samples.measurements(&results.case);
        results.write(&settings.out)?;
    }
    Ok(())
}

fn rounds(settings: &Settings, failure: Failure) -> usize {
    settings.rounds.unwrap_or(match failure {
        _ if !settings.quick => 7,
        Failure::Kill | Failure::DnsAll => 3,
        _ => 1,
    })
}

async fn measure_floor(samples: &mut Samples, network: &Arc<Network>, seed: u64, round: usize) -> Result<(), Error> {
    let (quiet, promoted) = floor::of_a_failover(network, seed, round as u64).await?;
    samples.add(NAME_OF_FLOOR, "first_write", "ms", Some(quiet.total()));
    samples.add(NAME_OF_FLOOR, "first_write_promoted", "ms", Some(promoted.total()));
    Ok(())
}

/// What ends one failover early.
enum Stopped {
    /// The peer alone is concerned.
    Peer(String),
    /// Nothing can go on.
    Harness(Error),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Harness(error)
    }
}

/// A failover on a cluster of its own.
async fn one(
    settings: &Settings,
    network: &Arc<Network>,
    failure: Failure,
    peer: &dyn Peer,
    round: usize,
) -> Result<Outcome, Stopped> {
    let stage = Arc::new(Stage::start(network).await?);
    let target = stage.target(failure.by_name() || peer.needs_name(), settings.workers, PACE, &format!("r{round}"));
    if let Some(why) = peer.refuses(&target) {
        return Err(Stopped::Peer(why));
    }
    let mut rotation = None;
    if failure == Failure::DnsAll {
        rotation = Some(rotate(Arc::clone(&stage), stage.members(), settings.seed.wrapping_add(round as u64)));
    } else {
        stage.name(&[stage.cluster.addr(stage.cluster.primary())]);
    }
    let recorder = Arc::new(Recorder::new(settings.workers));
    let load = peer.start(&target, Arc::clone(&recorder)).await.map_err(Stopped::Peer)?;
    if !all_wrote(&recorder, settings.workers, 0, START_PATIENCE).await {
        let last = recorder.events().pop().and_then(|event| event.outcome.err()).unwrap_or_default();
        return Err(Stopped::Peer(format!("not all workers wrote before the failure; the last error: {last}")));
    }
    let start = now_micros();
    sleep(CALM).await;
    let mut timeline = failure.strike(&stage, start, detection(settings.seed, round as u64)).await?;
    let waited = settings.stuck_after() + failure.extra_patience();
    all_wrote(&recorder, settings.workers, timeline.ordered, waited).await;
    sleep(AFTER).await;
    timeline.end = now_micros();
    load.stop().await;
    let stored = stored(&stage.cluster).await.map_err(Error::from)?;
    drop(rotation);
    // What a call that was cut off answers after the end is nobody's gap.
    let events: Vec<Event> = recorder.events().into_iter().filter(|event| event.micros <= timeline.end).collect();
    Ok(Outcome {
        figures: Figures::new(&timeline, &events, settings.workers, &stored),
        promotion: promotion(&timeline),
        told: told(&events),
    })
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
fn promotion(timeline: &Timeline) -> f64 {
    (timeline.accepted - timeline.ordered) as f64 / 1000.0
}

/// Waits until every worker was acknowledged after `micros`; false when the time is over first.
pub async fn all_wrote(recorder: &Recorder, workers: usize, micros: u64, patience: Duration) -> bool {
    let begun = Instant::now();
    while recorder.workers_ok_since(micros) < workers {
        if begun.elapsed() > patience {
            return false;
        }
        sleep(Duration::from_millis(10)).await;
    }
    true
}

/// Each id in the table of the new primary, and how often it is there.
pub async fn stored(cluster: &Cluster) -> Result<HashMap<String, i64>, tokio_postgres::Error> {
    let client = cluster.direct(cluster.primary()).await;
    let sql = format!("SELECT id, count(*) FROM {} GROUP BY id", crate::stage::TABLE);
    let rows = client.query(&sql, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// The different errors; addresses and ports differ in each run and are left as they are.
fn told(events: &[Event]) -> BTreeMap<String, usize> {
    let mut told = BTreeMap::new();
    for text in events.iter().filter_map(|event| event.outcome.as_ref().err()) {
        *told.entry(text.clone()).or_default() += 1;
    }
    told
}

fn tell(failure: Failure, round: usize, name: &str, outcome: &Outcome) {
    let Figures { first_write, all_workers, longest_gap, errors, duplicates, lost, stuck, .. } = &outcome.figures;
    let ms = |value: &Option<f64>| value.map_or_else(|| "never".to_owned(), |value| format!("{value:.1} ms"));
    say(&format!(
        "recovery/{} round {}: {name}: first {}, all {}, gap {longest_gap:.0} ms, {errors} errors, {duplicates} twice, \
         {lost} lost, {stuck} stuck",
        failure.name(),
        round + 1,
        ms(first_write),
        ms(all_workers)
    ));
}
