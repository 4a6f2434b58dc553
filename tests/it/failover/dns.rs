//! The name server fails, lies, or is late: what is known carries the pool on, and what is not is said.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use testbed::{Answer, Blackhole, Cluster, Node, Silent, Tap, eventually};
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::resolve::HickoryResolver;
use tokio_postgres_failover::view::{Address, State};
use tokio_postgres_failover::{Error, Pool};

use crate::support::load::{LONG, Load, Write, by_name, by_url, create_table, generation};
use crate::support::{split, stalls, started};

async fn fail_over(cluster: &Cluster) -> Instant {
    cluster.kill(cluster.primary()).await;
    cluster.promote_timed(cluster.most_advanced_standby().await).await.accepted_at
}

/// Waits until the pool has asked DNS twice more, and so has the first of these answers.
async fn asked_again(cluster: &Cluster) {
    let before = cluster.dns().queries();
    eventually("the pool asks DNS again", LONG, async || cluster.dns().queries() >= before + 4).await;
}

/// D1: with a primary, a failing name server is noticed by nobody: not by the work, not by the growth of the pool.
/// Without one, the members seen before are the candidates.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_dns_after_the_first_success() {
    let cluster = started().await;
    // A killed server hangs up: only a stall of the machine is silence here, and that is not to be noticed either.
    let builder = by_name(&cluster).heartbeat_timeout(LONG);
    let pool = builder.patrol_interval(Duration::from_millis(100)).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let found = pool.status().view.changed.at;
    let failures = [Answer::NxDomain, Answer::Empty, Answer::ServFail, Answer::Refused];
    for answer in &failures {
        println!("steady: {answer:?}");
        cluster.dns().answer(answer.clone());
        asked_again(&cluster).await;
        assert!(cluster.terminate_backends(cluster.primary(), "tokio-postgres-failover").await > 0);
        load.all_written_since(Instant::now()).await;
    }
    assert_eq!(pool.status().view.changed.at, found, "{:?}", pool.status().view);
    for answer in [Answer::NxDomain, Answer::Empty] {
        println!("failover: {answer:?}");
        let old = cluster.primary();
        cluster.dns().answer(answer);
        asked_again(&cluster).await;
        fail_over(&cluster).await;
        load.all_written_since(Instant::now()).await;
        cluster.restart_as_standby(old).await;
    }
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), 3);
}

/// D1, D3: before the first success, `get` waits until its deadline and its error tells what the name server said; also
/// where one family's failure hides behind the other's "no record".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_dns_before_the_first_success() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let deadline = Duration::from_millis(600);
    for (answer, said) in [
        (Answer::NxDomain, "NXDOMAIN"),
        (Answer::Empty, "neither an A nor an AAAA record"),
        (Answer::ServFail, "SERVFAIL"),
        (Answer::Refused, "REFUSED"),
        (split(Answer::ServFail, Answer::Empty), "SERVFAIL"),
        (split(Answer::Empty, Answer::ServFail), "SERVFAIL"),
    ] {
        cluster.dns().answer(answer.clone());
        let pool = by_name(&cluster).checkout_timeout(deadline).build().unwrap();
        let began = Instant::now();
        let mut told = pool.get().await.map(drop);
        assert!(began.elapsed() >= deadline, "{answer:?} ended after {:?}", began.elapsed());
        // A slow machine may not get to the answer before the deadline.
        while began.elapsed() < LONG && !told.as_ref().is_err_and(|error| error.to_string().contains(said)) {
            told = pool.get().await.map(drop);
        }
        let Err(Error::Unavailable(unavailable)) = told else { panic!("{answer:?}: {told:?}") };
        assert_eq!(unavailable.reason(), UnavailableReason::Dns, "{answer:?}: {unavailable}");
        let text = unavailable.to_string();
        assert!(text.contains(said) && text.contains("pg.internal"), "{answer:?}: {text}");
        assert!(unavailable.dns_failure().is_some_and(|dns| dns.contains(said)), "{answer:?}: {unavailable:?}");

        // It was waiting, not given up: the name comes up, and so does the pool.
        cluster.dns().set(&[cluster.addr(Node(0))]);
        eventually("it connects", LONG, async || pool.connect().await.is_ok()).await;
    }
}

/// D3: what one family fails to tell, the other one may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_an_answer_is_enough() {
    let cluster = Cluster::builder().nodes(1).start().await;
    for aaaa in [Answer::ServFail, Answer::NxDomain, Answer::Silent] {
        cluster.dns().answer(split(Answer::Addresses(vec![cluster.addr(Node(0))]), aaaa));
        by_name(&cluster).build().unwrap().connect().await.unwrap();
    }
}

/// D2: a silent name server holds up nobody, neither in steady state nor in a search.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_dns_during_a_failover() {
    // Two attempts of this length: whoever waits for the name server is seen.
    let patience = Duration::from_secs(5);
    let cluster = started().await;
    let resolver = HickoryResolver::with_name_servers([cluster.dns().addr()]).timeout(patience);
    let pool = by_url(cluster.url()).resolver(resolver).patrol_interval(Duration::from_millis(100));
    let pool = pool.build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    cluster.dns().answer(Answer::Silent);
    let before = cluster.dns().queries();
    eventually("the pool asks in vain", LONG, async || cluster.dns().queries() > before).await;
    let ended = Instant::now();
    assert!(cluster.terminate_backends(cluster.primary(), "tokio-postgres-failover").await > 0);
    load.all_written_since(ended).await;
    assert!(ended.elapsed() < patience + stalls::slack_since(ended), "the pool grew only after {:?}", ended.elapsed());
    let accepted = fail_over(&cluster).await;
    load.all_written_since(Instant::now()).await;
    let slack = stalls::slack_since(accepted);
    let outcome = load.stop(&cluster).await;
    let (first, all) = outcome.recovery(accepted);
    println!("first write after {first:?}, all writers after {all:?}");
    outcome.assert_flawless();
    assert!(all < patience / 2 + slack, "the last writer wrote only after {all:?}");
}

/// D2: an answer that takes three seconds is one that comes later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_dns_during_a_failover() {
    let slow = Duration::from_secs(3);
    let cluster = started().await;
    let resolver = HickoryResolver::with_name_servers([cluster.dns().addr()]).timeout(2 * slow);
    let pool = by_url(cluster.url()).resolver(resolver).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    cluster.dns().delay(slow);
    let accepted = fail_over(&cluster).await;
    load.all_written_since(Instant::now()).await;
    let slack = stalls::slack_since(accepted);
    let outcome = load.stop(&cluster).await;
    let (first, all) = outcome.recovery(accepted);
    println!("first write after {first:?}, all writers after {all:?}");
    outcome.assert_flawless();
    assert!(all < slow / 3 * 2 + slack, "the last writer wrote only after {all:?}");
}

/// D4: thirty addresses, the dead ones first: some refuse, some swallow what is sent, one never completes a connect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_addresses_the_dead_ones_first() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let spare = |n| SocketAddr::new(cluster.spare_addr(n), cluster.port());
    let mut traps = Vec::new();
    for n in 0..14 {
        traps.push(Silent::start(spare(n)).await);
    }
    let _vanished = Blackhole::start(spare(14)).await;
    let dead: Vec<IpAddr> = (0..29).map(|n| cluster.spare_addr(n)).collect();
    cluster.dns().set(&[dead, vec![cluster.addr(Node(0))]].concat());
    let probe = Duration::from_secs(10);
    let pool = by_name(&cluster).probe_timeout(probe).build().unwrap();
    let began = stalls::now();
    pool.connect().await.unwrap();
    let took = began.elapsed();
    println!("connected after {took:?}");
    assert!(took < probe / 4 + stalls::slack_since(began), "a dead candidate held up the living one: {took:?}");
    assert!(traps.iter().all(|trap| trap.accepted() <= 1), "a silent candidate is asked again before it has answered");
    assert_eq!(pool.get().await.unwrap().generation().get(), 1);
}

/// D4: more addresses than are asked at the same time take turns, and the error says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_addresses_of_which_the_last_is_alive() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let dead: Vec<IpAddr> = (1..100).map(|n| IpAddr::from([127, 251, 0, n])).collect();
    cluster.dns().set(&dead);
    let pool = by_name(&cluster).checkout_timeout(Duration::from_secs(5)).build().unwrap();
    let error = pool.get().await.map(drop).unwrap_err();
    assert!(error.to_string().contains("35 more addresses take turns"), "{error}");
    assert!(error.to_string().len() < 20_000, "{}", error.to_string().len());
    drop(pool);
    cluster.dns().set(&[dead, vec![cluster.addr(Node(0))]].concat());
    by_name(&cluster).build().unwrap().connect().await.unwrap();
}

/// One of several names is silent, another one unknown: the first connect does not wait for them, and what the third no
/// longer leads to is forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_name_holds_back_no_other() {
    let patience = Duration::from_secs(8);
    let cluster = Cluster::builder().nodes(1).start().await;
    let (dns, port) = (cluster.dns(), cluster.port());
    dns.set(&[cluster.addr(Node(0))]);
    dns.answer_name("silent.internal", Answer::Silent);
    dns.answer_name("unknown.internal", Answer::NxDomain);
    let url = format!("postgres://app@silent.internal:{port},unknown.internal:{port},pg.internal:{port}/app");
    let resolver = HickoryResolver::with_name_servers([dns.addr()]).timeout(patience);
    let patrol = Duration::from_millis(50);
    let pool = Pool::builder(url).unwrap().resolver(resolver).patrol_interval(patrol).build().unwrap();
    let began = stalls::now();
    pool.connect().await.unwrap();
    assert!(began.elapsed() < patience / 2 + stalls::slack_since(began), "{:?}", began.elapsed());
    for n in 1..=40 {
        let asked = dns.queries_for("pg.internal");
        dns.set(&[cluster.addr(Node(0)), IpAddr::from([127, 251, 1, n])]);
        eventually("the name was asked for again", patience, async || dns.queries_for("pg.internal") >= asked + 4)
            .await;
    }
    eventually("the others are forgotten", patience, async || pool.candidates().len() <= 2).await;
}

/// D5: the addresses change and the servers live on. Connections that work are kept, also when the old address takes no
/// new ones any more; new ones go to the new address, in the same generation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_change_while_the_server_lives_on() {
    let cluster = Cluster::builder().nodes(1).start().await;
    create_table(&cluster).await;
    let tap = async |n| {
        Tap::start(SocketAddr::new(cluster.spare_addr(n), cluster.port()), cluster.socket_addr(Node(0))).await
    };
    let (old, new) = (tap(0).await, tap(1).await);
    cluster.dns().set(&[old.addr().ip()]);
    // It is asked on the session that it has: a stall of the machine is no reason to leave that.
    let builder = by_name(&cluster).heartbeat_timeout(LONG);
    let pool = builder.patrol_interval(Duration::from_millis(100)).build().unwrap();
    let held = pool.get().await.unwrap();
    held.batch_execute("BEGIN; INSERT INTO entries (id) VALUES (1)").await.unwrap();

    cluster.dns().set(&[new.addr().ip()]);
    eventually("the server was seen at its new address", LONG, async || new.counts().round_trips > 0).await;
    assert_eq!(generation(&pool), 1);

    // Open connections through the old address stay; nobody gets a new one there.
    old.set_upstream((cluster.spare_addr(9), cluster.port()).into());
    let load = Load::warm(&pool, 7, Write::Transaction).await;
    load.stop(&cluster).await.assert_flawless();
    held.batch_execute("COMMIT").await.expect("a connection that works is kept");
    drop(held);
    assert_eq!(generation(&pool), 1, "{:?}", pool.status().view);
    let State::Primary { endpoint, .. } = pool.status().view.state else { panic!("{:?}", pool.status()) };
    assert_eq!(endpoint.address, Address::Tcp(new.addr()));

    // And now the old address is gone for good.
    drop(old);
    assert_works(&pool).await;
    assert_eq!(generation(&pool), 1, "{:?}", pool.status().view);
}

async fn assert_works(pool: &Pool) {
    let written = pool.idempotent(async |tx| Ok(tx.batch_execute("INSERT INTO entries (id) VALUES (2)").await?));
    written.await.unwrap();
}

/// D8, R2: a record that may be kept for an hour is not kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_time_to_live_is_not_trusted() {
    let cluster = started().await;
    cluster.dns().ttl(3600);
    cluster.dns().set(&[cluster.addr(cluster.primary())]);
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    fail_over(&cluster).await;
    cluster.dns().set(&[cluster.addr(cluster.primary())]);
    let moved = Instant::now();
    load.all_written_since(moved).await;
    println!("all writers {:?} after the record moved", moved.elapsed());
    assert!(moved.elapsed() < Duration::from_secs(10) + stalls::slack_since(moved), "{:?}", moved.elapsed());
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), 2);
}
