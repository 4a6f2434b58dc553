//! The floor: what a client needs that knows everything and opens one session for one transaction.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use testbed::Node;
use tokio::net::TcpStream;
use tokio::time::{interval, sleep};
use tokio_postgres::{Config, NoTls};
use tokio_postgres_failover::resolve::{HickoryResolver, Resolve};

use crate::console::{command, say};
use crate::error::Error;
use crate::event::now_micros;
use crate::isolation::Network;
use crate::measurement::Measurement;
use crate::random::Random;
use crate::results::Results;
use crate::settings::Settings;
use crate::stage::{NAME, Stage, TABLE};
use crate::versions::Machine;

/// The subject's name beside those of the peers.
pub const NAME_OF_FLOOR: &str = "floor";

/// The parts of one write on a fresh session, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// A question to the name server and its answer.
    pub dns: f64,
    /// The TCP connection.
    pub tcp: f64,
    /// Start-up message to `ReadyForQuery`.
    pub authentication: f64,
    /// BEGIN, INSERT, COMMIT.
    pub transaction: f64,
}

impl Parts {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.dns + self.tcp + self.authentication + self.transaction
    }

    /// Metric and value.
    pub fn named(&self) -> [(&'static str, f64); 5] {
        [
            ("dns", self.dns),
            ("tcp", self.tcp),
            ("authentication", self.authentication),
            ("transaction", self.transaction),
            ("total", self.total()),
        ]
    }
}

/// One write on a fresh session to `server`.
pub async fn once(resolver: &HickoryResolver, server: SocketAddr, id: &str) -> Result<Parts, Error> {
    let begun = Instant::now();
    resolver.resolve(NAME).await.map_err(|error| Error::Other(format!("the floor's DNS question: {error}")))?;
    let answered = Instant::now();
    let stream = TcpStream::connect(server).await.map_err(Error::file(server.to_string()))?;
    stream.set_nodelay(true).map_err(Error::file(server.to_string()))?;
    let connected = Instant::now();
    let mut config = Config::new();
    config.user("app").dbname("app").application_name(NAME_OF_FLOOR);
    let (client, connection) = config.connect_raw(stream, NoTls).await?;
    let driver = tokio::spawn(connection);
    let authenticated = Instant::now();
    // Three statements in one message: nothing can be sooner.
    client.batch_execute(&format!("BEGIN; INSERT INTO {TABLE} (id) VALUES ('{id}'); COMMIT")).await?;
    let committed = Instant::now();
    drop(client);
    let _ = driver.await;
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1000.0;
    Ok(Parts {
        dns: ms(begun, answered),
        tcp: ms(answered, connected),
        authentication: ms(connected, authenticated),
        transaction: ms(authenticated, committed),
    })
}

/// The same `count` times in a row on a cluster that has nothing else to do.
pub async fn quiet(stage: &Stage, count: usize) -> Result<Vec<Parts>, Error> {
    let resolver = HickoryResolver::with_name_servers([stage.dns().addr()]);
    let server = stage.cluster.socket_addr(stage.cluster.primary());
    let mut all = Vec::new();
    for number in 0..count {
        all.push(once(&resolver, server, &format!("floor-quiet-{number}")).await?);
    }
    Ok(all)
}

/// A primary is killed, nobody writes, and a fresh session is begun the moment the new one takes its first write.
pub async fn promoted(stage: &Stage, detection: Duration) -> Result<Parts, Error> {
    let cluster = &stage.cluster;
    let resolver = HickoryResolver::with_name_servers([stage.dns().addr()]);
    cluster.kill(cluster.primary()).await;
    sleep(detection).await;
    let new = cluster.most_advanced_standby().await;
    let server = cluster.socket_addr(new);
    let first = async {
        accepts(stage, new).await?;
        once(&resolver, server, "floor-promoted").await
    };
    let (parts, _) = tokio::join!(first, cluster.promote_timed(new));
    parts
}

/// Returns when a session that was open before has written.
async fn accepts(stage: &Stage, node: Node) -> Result<(), Error> {
    let session = stage.cluster.direct(node).await;
    let insert = format!("SET synchronous_commit = local; INSERT INTO {TABLE} (id) VALUES ('floor-accepts')");
    let mut tick = interval(Duration::from_millis(1));
    for _ in 0..20_000 {
        tick.tick().await;
        if session.batch_execute(&insert).await.is_ok() {
            return Ok(());
        }
    }
    Err(Error::Other("the promoted server takes no writes".to_owned()))
}

/// The floor of one failover: on the quiet cluster, and on the promoted server.
pub async fn of_a_failover(network: &Arc<Network>, seed: u64, round: u64) -> Result<(Parts, Parts), Error> {
    let stage = Stage::start(network).await?;
    let mut all = quiet(&stage, 11).await?;
    all.sort_unstable_by(|one, other| one.total().total_cmp(&other.total()));
    let quiet = all.get(all.len() / 2).copied().ok_or_else(|| Error::Other("no floor was measured".to_owned()))?;
    let promoted = promoted(&stage, detection(seed, round)).await?;
    Ok((quiet, promoted))
}

/// The case of its own: the parts, on a quiet cluster and on a server that was just promoted.
pub async fn run(settings: &Settings, network: &Arc<Network>) -> Result<(), Error> {
    let rounds = settings.rounds.unwrap_or(if settings.quick { 3 } else { 10 });
    let mut samples: Vec<(&'static str, &'static str, Vec<Option<f64>>)> = Vec::new();
    for round in 0..rounds {
        let (quiet, promoted) = of_a_failover(network, settings.seed, round as u64).await?;
        say(&format!("floor round {}: {:.2} ms quiet, {:.2} ms promoted", round + 1, quiet.total(), promoted.total()));
        for (case, parts) in [("floor/quiet", quiet), ("floor/promoted", promoted)] {
            for (metric, value) in parts.named() {
                match samples.iter_mut().find(|(of, name, _)| *of == case && *name == metric) {
                    Some((.., samples)) => samples.push(Some(value)),
                    None => samples.push((case, metric, vec![Some(value)])),
                }
            }
        }
    }
    let of = |(case, metric, samples): &(&'static str, &'static str, Vec<_>)| {
        Measurement::new(NAME_OF_FLOOR, *case, *metric, "ms", samples.clone())
    };
    let measurements: Vec<_> = samples.iter().map(of).collect();
    let total = measurements.iter().find(|measured| measured.metric == "total");
    let total = total.and_then(|measured| measured.spread().median);
    let results = Results {
        case: "floor".to_owned(),
        explained:
            "A fresh session that writes one row: a DNS question, TCP, authentication, and BEGIN, INSERT, COMMIT in \
                    one message. `quiet`: on a primary that has nothing else to do. `promoted`: begun the moment a new \
                    primary has taken its first write, with nobody else there"
                .to_owned(),
        command: command(settings, "CASES=floor", rounds),
        at: now_micros() / 1_000_000,
        machine: Machine::this(crate::postgres_version(network).await?),
        rounds,
        seed: settings.seed,
        peers: Vec::new(),
        notes: network.notes(),
        measurements: measurements.into_iter().map(|one| one.relative_to("floor/quiet total", total)).collect(),
        told: BTreeMap::new(),
    };
    results.write(&settings.out).map(drop)
}

/// How long the cluster's manager takes to notice, this round: a second, and not in step with anybody's retries.
pub fn detection(seed: u64, round: u64) -> Duration {
    Random::new(seed, round).between(Duration::from_millis(900), Duration::from_millis(1100))
}
