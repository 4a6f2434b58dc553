//! How recovery grows: with those who wait, with the candidates behind the name, with the pools on one machine.
//!
//! Each point is measured by a process of its own, whose memory is that of one pool and its callers, and of the test
//! bed's DNS server and proxies. The servers stand behind proxies that count what reaches them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use testbed::{Blackhole, Tap};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::console::{command, say};
use crate::error::Error;
use crate::event::{Event, now_micros};
use crate::fault::Timeline;
use crate::figures::{Figures, count};
use crate::floor::detection;
use crate::isolation::Network;
use crate::measurement::Measurement;
use crate::peer::{PAUSE_AFTER_ERROR, Target};
use crate::recorder::Recorder;
use crate::recovery::{PACE, all_wrote, stored};
use crate::results::{PeerInfo, Results};
use crate::rust_peers::{Attempt, Opens, openers};
use crate::settings::Settings;
use crate::stage::{Rotation, Stage, rotate};
use crate::versions::Machine;

/// Connections of the pool that the waiters share.
const POOL: usize = 16;
/// Connections, and workers, of each of many pools.
const SMALL_POOL: usize = 2;
/// The pause of a worker of many pools: together they shall not be what the servers are busy with.
const SLOW_PACE: Duration = Duration::from_millis(100);
/// A point that takes longer has no figure.
const PATIENCE: Duration = Duration::from_secs(30);

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Callers that wait for a primary, on one pool.
    Waiters,
    /// Addresses behind the name, most of them dead.
    Candidates,
    /// Pools in one process.
    Pools,
}

impl Axis {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Waiters, Self::Candidates, Self::Pools];

    /// As it stands in the name of the case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiters => "waiters",
            Self::Candidates => "candidates",
            Self::Pools => "pools",
        }
    }

    fn explained(self) -> &'static str {
        match self {
            Self::Waiters => {
                "kill −9; so many tasks wait with one row each, on a pool of 16. `beyond_work`: until all have \
                 written, less the time that the same number of rows takes without a failure"
            }
            Self::Candidates => {
                "kill −9; 8 workers; so many addresses behind the name: three servers, of the rest every other one \
                 refuses connections and the others let them hang. Peers that do not try all addresses of a name are \
                 left out"
            }
            Self::Pools => "kill −9; so many pools of 2 connections in one process, each with 2 workers",
        }
    }

    fn points(self, quick: bool) -> &'static [usize] {
        match (self, quick) {
            (Self::Waiters, false) => &[10, 100, 1000, 10_000],
            (Self::Waiters, true) => &[10, 1000],
            (Self::Candidates, false) => &[3, 8, 16, 32, 64],
            (Self::Candidates, true) => &[3, 64],
            (Self::Pools, false) => &[1, 4, 16, 64],
            (Self::Pools, true) => &[1, 16],
        }
    }

    /// Those whose growth is worth a look: a variant of each library.
    fn peers(self) -> &'static [&'static str] {
        match self {
            Self::Waiters | Self::Pools => &["failover", "failover-warm", "deadpool-fast", "bb8", "sqlx-hook"],
            Self::Candidates => &["failover", "failover-warm", "deadpool-fast", "bb8"],
        }
    }
}

/// One point, as its process tells it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Point {
    /// Metric, unit and value.
    figures: Vec<(String, String, Option<f64>)>,
    told: BTreeMap<String, usize>,
}

/// Measures all axes.
pub async fn run(settings: &Settings) -> Result<(), Error> {
    let chosen: Vec<String> = settings.choose(crate::peers())?.iter().map(|peer| peer.name()).collect();
    let machine = {
        let network = Arc::new(Network::here().await);
        Machine::this(crate::postgres_version(&network).await?)
    };
    for axis in Axis::ALL {
        let peers: Vec<_> = openers().into_iter().filter(|peer| axis.peers().contains(&peer.name().as_str())).collect();
        let peers: Vec<_> = peers.into_iter().filter(|peer| chosen.contains(&peer.name())).collect();
        measure(settings, axis, &peers, machine.clone()).await?;
    }
    Ok(())
}

async fn measure(settings: &Settings, axis: Axis, peers: &[Box<dyn Opens>], machine: Machine) -> Result<(), Error> {
    let rounds = settings.rounds.unwrap_or(if settings.quick { 1 } else { 5 });
    let case = format!("growth/{}", axis.name());
    let mut results = Results {
        case: case.clone(),
        explained: axis.explained().to_owned(),
        command: command(settings, "CASES=growth", rounds),
        at: 0,
        machine,
        rounds: 0,
        seed: settings.seed,
        peers: peers.iter().map(|peer| PeerInfo::of(&**peer, None)).collect(),
        notes: Vec::new(),
        measurements: Vec::new(),
        told: BTreeMap::new(),
    };
    for round in 0..rounds {
        let mut order: Vec<&Box<dyn Opens>> = peers.iter().collect();
        order.rotate_left(round % peers.len().max(1));
        for size in axis.points(settings.quick) {
            for peer in &order {
                let point = in_a_process(settings, axis, *size, &peer.name(), round).await;
                let name = peer.name();
                match point {
                    Ok(point) => {
                        tell(&case, round, &name, *size, &point);
                        add(&mut results, &name, *size, point);
                    }
                    Err(error) => {
                        say(&format!("{case}/{size} round {}: {name}: {error}", round + 1));
                        results.notes.push(format!("{name}, {size}: {error}"));
                    }
                }
            }
        }
        results.rounds = round + 1;
        results.at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        relate(&mut results.measurements, axis, settings.quick);
        results.write(&settings.out)?;
    }
    Ok(())
}

fn add(results: &mut Results, peer: &str, size: usize, point: Point) {
    let case = format!("{}/{size}", results.case);
    for (metric, unit, value) in point.figures {
        let found = results
            .measurements
            .iter_mut()
            .find(|measured| measured.peer == peer && measured.case == case && measured.metric == metric);
        match found {
            Some(measured) => measured.samples.push(value),
            None => results.measurements.push(Measurement::new(peer, &case, metric, unit, vec![value])),
        }
    }
    let told = results.told.entry(peer.to_owned()).or_default();
    point.told.into_iter().for_each(|(text, count)| *told.entry(text).or_default() += count);
}

/// Each peer's figures are relative to its own at the first point.
fn relate(measurements: &mut [Measurement], axis: Axis, quick: bool) {
    let Some(first) = axis.points(quick).first() else {
        return;
    };
    let case = format!("growth/{}/{first}", axis.name());
    let bases: Vec<_> = measurements
        .iter()
        .filter(|measured| measured.case == case)
        .map(|measured| (measured.peer.clone(), measured.metric.clone(), measured.spread().median))
        .collect();
    for measured in measurements {
        let base = bases.iter().find(|(peer, metric, _)| *peer == measured.peer && *metric == measured.metric);
        let related = measured.clone().relative_to(format!("{first} {}", axis.name()), base.and_then(|base| base.2));
        *measured = related;
    }
}

fn tell(case: &str, round: usize, peer: &str, size: usize, point: &Point) {
    let shown: Vec<String> = point
        .figures
        .iter()
        .map(|(metric, unit, value)| match value {
            Some(value) => format!("{metric} {value:.1} {unit}"),
            None => format!("{metric} never"),
        })
        .collect();
    say(&format!("{case}/{size} round {}: {peer}: {}", round + 1, shown.join(", ")));
}

/// Has this program measure one point in a new process.
async fn in_a_process(settings: &Settings, axis: Axis, size: usize, peer: &str, round: usize) -> Result<Point, Error> {
    let program =
        std::env::current_exe().map_err(|source| Error::Program { what: "this program".to_owned(), source })?;
    let seed = settings.seed.wrapping_add(round as u64);
    let child = tokio::process::Command::new(program)
        .args(["point", axis.name(), &size.to_string(), peer, &seed.to_string()])
        .kill_on_drop(true)
        .output();
    let output = timeout(PATIENCE * 4, child).await.map_err(|_| Error::Other("no end in two minutes".to_owned()))?;
    let output = output.map_err(|source| Error::Program { what: "this program".to_owned(), source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).map_err(|_| {
        let error = String::from_utf8_lossy(&output.stderr);
        Error::Other(error.lines().last().unwrap_or("it said nothing").to_owned())
    })
}

/// The process of `in_a_process`: its arguments, and its answer as the last line.
pub async fn point(arguments: &[String]) -> Result<(), Error> {
    let wrong = || Error::setting("point", &arguments.join(" "), "AXIS SIZE PEER SEED");
    let [axis, size, peer, seed] = arguments else {
        return Err(wrong());
    };
    let axis = Axis::ALL.into_iter().find(|one| one.name() == axis).ok_or_else(wrong)?;
    let peer = openers().into_iter().find(|one| one.name() == *peer).ok_or_else(wrong)?;
    let size = size.parse().map_err(|_| wrong())?;
    let seed = seed.parse().map_err(|_| wrong())?;
    let network = Arc::new(Network::here().await);
    let scene = Scene::start(&network, axis, size, &*peer, seed).await?;
    let point = match axis {
        Axis::Waiters => scene.waiters(size, &*peer).await?,
        Axis::Candidates => scene.under_load(1, 8, PACE, &*peer).await?,
        Axis::Pools => scene.under_load(size, SMALL_POOL, SLOW_PACE, &*peer).await?,
    };
    let line = serde_json::to_string(&point).map_err(|error| Error::Other(error.to_string()))?;
    println!("{line}");
    Ok(())
}

/// Servers behind proxies that count.
struct Scene {
    stage: Arc<Stage>,
    taps: Vec<Tap>,
    by_name: bool,
    seed: u64,
    rotation: Option<Rotation>,
    _holes: Vec<Blackhole>,
}

impl Scene {
    async fn start(
        network: &Arc<Network>,
        axis: Axis,
        size: usize,
        peer: &dyn Opens,
        seed: u64,
    ) -> Result<Self, Error> {
        let stage = Arc::new(Stage::start(network).await?);
        let cluster = &stage.cluster;
        let mut taps = Vec::new();
        for (spare, node) in (0..).zip(cluster.nodes()) {
            let listen = SocketAddr::new(cluster.spare_addr(spare), cluster.port());
            taps.push(Tap::start(listen, cluster.socket_addr(node)).await);
        }
        let mut holes = Vec::new();
        let mut behind: Vec<IpAddr> = taps.iter().map(|tap| tap.addr().ip()).collect();
        if axis == Axis::Candidates {
            for dead in behind.len()..size {
                let spare = u8::try_from(dead + 50).map_err(|_| Error::Other("too many candidates".to_owned()))?;
                let address = cluster.spare_addr(spare);
                if dead % 2 == 0 {
                    holes.push(Blackhole::start(SocketAddr::new(address, cluster.port())).await);
                }
                behind.push(address);
            }
        }
        let by_name = axis == Axis::Candidates || peer.needs_name();
        let rotation = if axis == Axis::Candidates {
            Some(rotate(Arc::clone(&stage), behind, seed))
        } else {
            // Whoever knows one name alone is led to the primary, and to the new one from the promotion on.
            stage.name(&behind[..1]);
            None
        };
        Ok(Self { stage, taps, by_name, seed, rotation, _holes: holes })
    }

    fn target(&self, peer: &dyn Opens, connections: usize, pace: Duration, prefix: &str) -> Result<Target, Error> {
        let mut target = self.stage.target(self.by_name, connections, pace, prefix);
        target.hosts = self.taps.iter().map(Tap::addr).collect();
        match peer.refuses(&target) {
            Some(why) => Err(Error::Other(why)),
            None => Ok(target),
        }
    }

    fn open(peer: &dyn Opens, target: &Target) -> Result<Arc<dyn Attempt>, Error> {
        peer.open(target).map_err(Error::Other)
    }

    /// Statements, and sessions begun, that reached any server.
    fn seen(&self) -> (u64, u64) {
        let counts: Vec<_> = self.taps.iter().map(Tap::counts).collect();
        (counts.iter().map(|counts| counts.queries).sum(), counts.iter().map(|counts| counts.startups).sum())
    }

    async fn kill(&self) {
        self.stage.cluster.kill(self.stage.cluster.primary()).await;
    }

    /// After the primary was killed: waits as long as a cluster's manager would, and promotes. Returns what the servers
    /// had seen by then, too.
    async fn promote(&self, start: u64, struck: u64) -> (Timeline, (u64, u64)) {
        sleep(detection(self.seed, 0)).await;
        let (seen, cluster) = (self.seen(), &self.stage.cluster);
        let new = cluster.most_advanced_standby().await;
        if self.by_name && self.rotation.is_none() {
            // Whoever knows one name alone is led to the new primary without any delay.
            self.stage.name(&[self.taps[new.0].addr().ip()]);
        }
        let promotion = cluster.promote_timed(new).await;
        let ago = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let accepted = now_micros().saturating_sub(ago(promotion.accepted_at.elapsed()));
        let ordered = accepted.saturating_sub(ago(promotion.took));
        (Timeline { start, struck, ordered, accepted, named: None, end: accepted }, seen)
    }

    /// So many callers with a row each, on one pool.
    async fn waiters(self, waiters: usize, peer: &dyn Opens) -> Result<Point, Error> {
        let target = self.target(peer, POOL, Duration::ZERO, "waiter")?;
        let attempt = Self::open(peer, &target)?;
        let errors = Arc::new(AtomicU64::new(0));
        // The pool is full and warm, as that of a service that runs.
        for nth in 0..3 {
            everyone_writes(&attempt, POOL * 4, &format!("warm{nth}"), &errors, PATIENCE).await;
        }
        errors.store(0, Ordering::Relaxed);
        self.kill().await;
        let (before, empty) = (self.seen(), resident());
        let waiting = {
            let (attempt, errors) = (Arc::clone(&attempt), Arc::clone(&errors));
            tokio::spawn(async move { everyone_writes(&attempt, waiters, "wait", &errors, PATIENCE).await })
        };
        let (timeline, until_promotion) = self.promote(now_micros(), now_micros()).await;
        let full = resident();
        let ended = waiting.await.map_err(|error| Error::Other(error.to_string()))?;
        let after = self.seen();
        let begun = Instant::now();
        let work = everyone_writes(&attempt, waiters, "work", &AtomicU64::new(0).into(), PATIENCE).await;
        let work = (work.len() == waiters).then(|| begun.elapsed().as_secs_f64() * 1000.0);
        let since = |at: &u64| difference(timeline.accepted, *at) / 1000.0;
        let first = ended.iter().min().map(since);
        let all = (ended.len() == waiters).then(|| ended.iter().max().map(since)).flatten();
        let beyond = all.zip(work).map(|(all, work)| (all - work).max(0.0));
        let per_waiter = difference(empty, full) / 1024.0 / count(waiters);
        let figure = |metric: &str, unit: &str, value| (metric.to_owned(), unit.to_owned(), value);
        Ok(Point {
            figures: vec![
                figure("first_write", "ms", first),
                figure("all_waiters", "ms", all),
                figure("work", "ms", work),
                figure("beyond_work", "ms", beyond),
                figure("probes", "count", Some(difference(before.0, until_promotion.0))),
                figure("connection_starts", "count", Some(difference(before.1, after.1))),
                figure("memory_per_waiter", "KiB", Some(per_waiter)),
                figure("errors", "count", Some(difference(0, errors.load(Ordering::Relaxed)))),
            ],
            told: BTreeMap::new(),
        })
    }

    /// So many pools, each with a worker per connection.
    async fn under_load(self, pools: usize, size: usize, pace: Duration, peer: &dyn Opens) -> Result<Point, Error> {
        let empty = resident();
        let workers = pools * size;
        let recorder = Arc::new(Recorder::new(workers));
        let mut tasks = JoinSet::new();
        for pool in 0..pools {
            let target = self.target(peer, size, pace, "load")?;
            let attempt = Self::open(peer, &target)?;
            for worker in pool * size..(pool + 1) * size {
                let (attempt, recorder) = (Arc::clone(&attempt), Arc::clone(&recorder));
                tasks.spawn(async move { keep_writing(&*attempt, worker, pace, &recorder).await });
            }
        }
        if !all_wrote(&recorder, workers, 0, PATIENCE).await {
            return Err(Error::Other("not all workers wrote before the failure".to_owned()));
        }
        let start = now_micros();
        let full = resident();
        sleep(Duration::from_millis(500)).await;
        let struck = now_micros();
        self.kill().await;
        let before = self.seen();
        let (mut timeline, until_promotion) = self.promote(start, struck).await;
        all_wrote(&recorder, workers, timeline.ordered, PATIENCE).await;
        let after = self.seen();
        sleep(Duration::from_millis(200)).await;
        timeline.end = now_micros();
        tasks.shutdown().await;
        let events: Vec<Event> = recorder.events();
        let figures = Figures::new(&timeline, &events, workers, &stored(&self.stage.cluster).await?);
        let mut named: Vec<_> = figures
            .named()
            .into_iter()
            .map(|(metric, unit, value)| (metric.to_owned(), unit.to_owned(), value))
            .collect();
        let figure = |metric: &str, unit: &str, value| (metric.to_owned(), unit.to_owned(), Some(value));
        named.push(figure("probes", "count", difference(before.0, until_promotion.0)));
        named.push(figure("connection_starts", "count", difference(before.1, after.1)));
        named.push(figure("memory_per_pool", "KiB", difference(empty, full) / 1024.0 / count(pools)));
        Ok(Point { figures: named, told: BTreeMap::new() })
    }
}

/// So many tasks write a row each, and try again after errors; returns when each was acknowledged, and those that were
/// not in time are missing.
async fn everyone_writes(
    attempt: &Arc<dyn Attempt>,
    tasks: usize,
    prefix: &str,
    errors: &Arc<AtomicU64>,
    patience: Duration,
) -> Vec<u64> {
    let mut set = JoinSet::new();
    for task in 0..tasks {
        let (attempt, errors, id) = (Arc::clone(attempt), Arc::clone(errors), format!("{prefix}-{task}"));
        set.spawn(async move {
            while attempt.insert(task, &id).await.is_err() {
                errors.fetch_add(1, Ordering::Relaxed);
                sleep(PAUSE_AFTER_ERROR).await;
            }
            now_micros()
        });
    }
    let mut ended = Vec::with_capacity(tasks);
    let all = async {
        while let Some(at) = set.join_next().await {
            ended.extend(at.ok());
        }
    };
    let _ = timeout(patience, all).await;
    ended
}

async fn keep_writing(attempt: &dyn Attempt, worker: usize, pace: Duration, recorder: &Recorder) {
    for counter in 0_u64.. {
        let id = format!("load-{worker}-{counter}");
        loop {
            let outcome = attempt.insert(worker, &id).await;
            let failed = outcome.is_err();
            recorder.record(Event::now(worker, id.clone(), outcome));
            if !failed {
                break;
            }
            sleep(PAUSE_AFTER_ERROR).await;
        }
        sleep(pace).await;
    }
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
fn difference(before: u64, after: u64) -> f64 {
    after.saturating_sub(before) as f64
}

/// This process's resident memory, in bytes. Zero where it cannot be told.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes: Option<u64> = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kilobytes.unwrap_or_default() * 1024
}
