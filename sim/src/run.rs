//! One simulation: a seed, a world, a pool, callers, faults, and the judgement at the end.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres_failover::view::{Eviction, State};
use tokio_postgres_failover::{Event, Pool, PoolBuilder};
use tokio_util::sync::CancellationToken;

use crate::faults::all;
use crate::listen::listener;
use crate::load::{CHECKOUT, caller};
use crate::manager::{fail_over, heal, keep_house, pause, rejoin, ship};
use crate::reach::{Reach, address, existing, node_at};
use crate::rng::Rng;
use crate::script::Script;
use crate::setup::Dns;
use crate::trace::Counts;
use crate::world::Sim;

/// How often something goes wrong in one simulation.
pub(crate) const ROUNDS: usize = 24;
/// Once everything is well again, each call must end within this time, and a new caller must be served.
const LIVELY: Duration = Duration::from_secs(90);
const SERVED: Duration = Duration::from_secs(15);
/// If nothing was done to a server for so long, the pool has no reason to leave it.
const QUIET: Duration = Duration::from_secs(20);
/// So long may all faults of one simulation take.
const LONGEST: Duration = Duration::from_secs(3600);
const DEAD_AFTER: Duration = Duration::from_secs(12);
/// A primary is suspended long before it counts as dead: within a heartbeat and its time limits.
const SUSPENDED_FOR: Duration = Duration::from_secs(1);
/// A pool that may sleep does so after so long.
const SLEEP_AFTER: Duration = Duration::from_secs(3);

/// What came of one seed.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) violations: Vec<String>,
    pub(crate) counts: Counts,
    pub(crate) failovers: u64,
    pub(crate) simulated: Duration,
    pub(crate) trace: Vec<String>,
}

/// Runs one seed. `trace`: tell what happens.
pub(crate) fn run(script: &Script, trace: bool) -> std::io::Result<Outcome> {
    let runtime = runtime(script.seed)?;
    let outcome = runtime.block_on(simulate(script, trace));
    drop(runtime);
    #[cfg(failover_sim)]
    let outcome = with_what_was_seen(outcome);
    Ok(outcome)
}

#[cfg(failover_sim)]
fn with_what_was_seen(mut outcome: Outcome) -> Outcome {
    for ((group, name), times) in tokio_postgres_failover::simulation::take_seen() {
        outcome.counts.note_many(group, name, times);
    }
    outcome
}

/// The clock stands still unless every task waits for it. With `tokio_unstable`, tokio's own choices follow the seed,
/// too.
fn runtime(seed: u64) -> std::io::Result<Runtime> {
    let mut builder = Builder::new_current_thread();
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()));
    let _ = seed;
    builder.enable_time().start_paused(true).build()
}

async fn simulate(script: &Script, trace: bool) -> Outcome {
    #[cfg(failover_sim)]
    tokio_postgres_failover::simulation::begin();
    let sim = Sim::new(script.seed, trace);
    let setup = sim.lock().setup;
    sim.lock().say(|| format!("seed {script}: {setup:?}"));
    let pool = match pool(&sim, script.seed) {
        Ok(pool) => pool,
        Err(error) => {
            return Outcome { violations: vec![format!("the pool cannot be built: {error}")], ..Outcome::default() };
        }
    };
    let stop = CancellationToken::new();
    let tasks = [
        tokio::spawn(ship(Arc::clone(&sim))),
        tokio::spawn(keep_house(Arc::clone(&sim))),
        tokio::spawn(watch(Arc::clone(&sim), pool.clone())),
        tokio::spawn(events(Arc::clone(&sim), pool.clone())),
    ];
    if setup.listens() {
        tokio::spawn(listener(Arc::clone(&sim), pool.clone()));
    }
    let calls = Arc::new(AtomicI64::new(1));
    let callers = if setup.sleeps { 2 } else { sim.lock().rng.index(5) + 2 };
    let callers: Vec<JoinHandle<()>> = (0..callers)
        .filter(|caller| script.callers.contains(caller))
        .map(|_| tokio::spawn(caller(Arc::clone(&sim), pool.clone(), Arc::clone(&calls), stop.clone())))
        .collect();
    if timeout(LONGEST, go_wrong(&sim, script)).await.is_err() {
        sim.lock().oracle.violation(format!("the faults did not end within {LONGEST:?}"));
    }
    sim.lock().say(|| "everything is well from now on".to_owned());
    stop.cancel();
    finish(&sim, &pool, callers).await;
    for task in tasks {
        task.abort();
    }
    judge(&sim)
}

/// Lets things go wrong, and makes everything well again.
async fn go_wrong(sim: &Arc<Sim>, script: &Script) {
    for round in &script.rounds {
        let fault = {
            let mut world = sim.lock();
            // So that a round is much the same without those before it.
            world.rng = Rng::new((script.seed << 8) ^ *round as u64);
            let chosen = world.rng.weighted(all().map(|fault| fault.weight));
            all().nth(chosen)
        };
        let Some(fault) = fault else { continue };
        pause(sim, 20, 900).await;
        {
            let mut world = sim.lock();
            world.counts.note("faults", fault.name);
            world.say(|| format!("FAULT of round {round}: {}", fault.name));
        }
        (fault.happen)(sim).await;
        fail_over(sim).await;
        rejoin(sim).await;
    }
    heal(sim).await;
}

fn pool(sim: &Arc<Sim>, seed: u64) -> Result<Pool, tokio_postgres_failover::BuildError> {
    let setup = sim.lock().setup;
    if setup.wrapped {
        let wrapped = Pool::wrap(existing(Reach(Arc::clone(sim)), setup.max_size));
        return wrapped.checkout_timeout(CHECKOUT).dead_after(DEAD_AFTER).seed(seed).build();
    }
    let hosts: Vec<String> = (0..setup.servers).map(|node| address(node).to_string()).collect();
    let hosts = if setup.dns == Dns::Hosts { hosts.join(",") } else { "db.internal".to_owned() };
    let builder: PoolBuilder =
        Pool::builder(format!("host={hosts} user=app password=secret dbname=app sslmode=disable"))?;
    let builder = if setup.sleeps { builder.sleep_after(SLEEP_AFTER) } else { builder };
    builder
        .connector(Reach(Arc::clone(sim)))
        .resolver(Reach(Arc::clone(sim)))
        .max_size(setup.max_size)
        .checkout_timeout(CHECKOUT)
        .dead_after(DEAD_AFTER)
        .seed(seed)
        .build()
}

/// Reports what the pool publishes.
async fn watch(sim: Arc<Sim>, pool: Pool) {
    let mut views = pool.watch();
    while views.changed().await.is_ok() {
        let view = views.borrow_and_update().clone();
        sim.lock().published = None;
        if let State::Primary { report, endpoint, .. } = &view.state {
            let mut world = sim.lock();
            world.published = node_at(&endpoint.address);
            if let Some(timeline) = report.timeline {
                world.oracle.published(timeline);
            }
        }
    }
}

/// Counts the pool's events, and checks that each server that it leaves has given it a reason.
async fn events(sim: Arc<Sim>, pool: Pool) {
    let mut events = pool.subscribe();
    let (mut generations, mut lost_at) = (Vec::new(), None);
    while let Some(event) = events.next().await {
        let mut world = sim.lock();
        let name = format!("{event:?}");
        let short = name.split([' ', '{']).next().unwrap_or_default().to_owned();
        // The report of a slow search has instants in it, which are not those of the simulation.
        let told = if matches!(event, Event::SearchSlow { .. }) { short.clone() } else { name };
        world.say(|| format!("the pool: {told}"));
        let (left, what) = match &event {
            Event::PrimaryFound { generation, endpoint, .. } => {
                if let Some(node) = node_at(&endpoint.address) {
                    generations.push((*generation, node, world.nodes[node].lives));
                }
                world.counts.note("events", short);
                continue;
            }
            Event::PrimaryLost { generation, why, .. } => {
                lost_at = Some(Instant::now());
                // The load raises such errors, too, and they are a reason to look at the primary.
                (Some(*generation).filter(|_| !why.contains("turned read-only")), short)
            }
            Event::Evicted { generation, cause: Eviction::Silent, .. } => {
                if lost_at.is_none_or(|at: Instant| at.elapsed() < SUSPENDED_FOR) {
                    world.oracle.violation("a silent primary was given up at once");
                }
                (Some(*generation), format!("{short} {}", Eviction::Silent))
            }
            Event::Evicted { cause: Eviction::Asleep, .. } => {
                if world.holding > 0 {
                    world.oracle.violation("the pool fell asleep over its work");
                }
                (None, format!("{short} {}", Eviction::Asleep))
            }
            Event::Evicted { generation, cause, .. } => (Some(*generation), format!("{short} {cause}")),
            Event::CommitSettled { outcome, .. } => (None, format!("{short} {outcome:?}")),
            _ => (None, short),
        };
        world.counts.note("events", what.clone());
        let known = left.and_then(|left| generations.iter().rev().find(|(generation, ..)| *generation == left));
        if let Some((_, node, lives)) = known {
            let server = &world.nodes[*node];
            let well = server.works() && server.is_primary() && *node == world.leader && server.lives == *lives;
            if well && !server.fenced && world.troubled_at[*node].elapsed() > QUIET {
                world.oracle.violation(format!("{what}: server {node} was well for long"));
            }
        }
    }
}

/// Waits for the callers' last calls, and for one more that must be served.
async fn finish(sim: &Arc<Sim>, pool: &Pool, callers: Vec<JoinHandle<()>>) {
    let began = Instant::now();
    for (number, caller) in callers.into_iter().enumerate() {
        match timeout((began + LIVELY).saturating_duration_since(Instant::now()), caller).await {
            Ok(Ok(())) => {}
            Ok(Err(panic)) => sim.lock().oracle.violation(format!("caller {number} panicked: {panic}")),
            Err(_) => sim.lock().oracle.violation(format!("caller {number} has no answer {LIVELY:?} after the faults")),
        }
    }
    let work = pool.transaction(|transaction| async move {
        transaction.batch_execute("INSERT INTO payments VALUES (0, 1)").await?;
        Ok(())
    });
    match timeout(SERVED, work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => sim.lock().oracle.violation(format!("after the faults a call fails: {error}")),
        Err(_) => sim.lock().oracle.violation(format!("after the faults a call is not served within {SERVED:?}")),
    }
    // The last notifications are on their way.
    sleep(Duration::from_secs(1)).await;
    pool.close();
    sleep(Duration::from_secs(10)).await;
}

fn judge(sim: &Sim) -> Outcome {
    let mut world = sim.lock();
    let rows: Vec<_> = world.nodes[world.leader].log.rows().collect();
    let may_lose = !world.setup.synchronous;
    let lost = world.oracle.judge(rows.into_iter(), may_lose);
    for _ in 0..lost {
        world.counts.note("seen", "calls lost by asynchronous replication");
    }
    let missed = world.told.missed();
    if !missed.is_empty() {
        world.oracle.violation(format!("the listener missed calls {missed:?}, and was not told"));
    }
    let most = world.setup.max_size * 2 + 2 + 3 * world.nodes.len();
    if world.oracle.most_open > most && !world.setup.wrapped {
        let open = world.oracle.most_open;
        world.oracle.violation(format!("{open} connections were open at a time, more than {most}"));
    }
    Outcome {
        violations: world.oracle.violations(),
        counts: world.counts.clone(),
        failovers: world.failovers,
        simulated: world.now(),
        trace: world.take_trace(),
    }
}
