//! Warnings about slow checkouts and connections that are held for long say where they were taken.

use std::time::{Duration, Instant};

use testbed::eventually;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres_failover::{Error, Event, Events, Pool, deadpool_postgres, tokio_postgres};

use crate::support::load::by_url;
use crate::support::{PATIENCE, server};

const SHORT: Duration = Duration::from_millis(50);

/// The next event that is about loans: whether the checkout was slow, how long it took, and the place.
async fn told(events: &mut Events) -> (bool, Duration, String, u32) {
    let next = async {
        loop {
            match events.next().await.expect("the pool is open") {
                Event::SlowCheckout { waited, place, .. } => return (true, waited, place.file().into(), place.line()),
                Event::LongCheckout { held, place, .. } => return (false, held, place.file().into(), place.line()),
                _ => {}
            }
        }
    };
    timeout(PATIENCE, next).await.expect("nothing is told")
}

/// The line that is told while this call holds its connection, which it does until `seen`.
async fn told_during(call: impl Future<Output = Result<(), Error>>, events: &mut Events, seen: &Notify) -> u32 {
    let (called, line) = tokio::join!(call, async {
        let line = told(events).await.3;
        seen.notify_one();
        line
    });
    called.unwrap();
    line
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_held_for_long_is_told_with_its_place() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).leak_after(SHORT).build().unwrap();
    let mut events = pool.subscribe();

    let (held, line) = (pool.get().await.unwrap(), line!());
    let (slow, how_long, file, told_line) = told(&mut events).await;
    assert!(!slow && how_long >= SHORT && file.ends_with("loans.rs"), "{how_long:?} {file}");
    assert_eq!(told_line, line);
    drop(held);

    let (held, line) = (pool.get_within(PATIENCE).await.unwrap(), line!());
    assert_eq!(told(&mut events).await.3, line);
    drop(held);

    let seen = Notify::new();
    let line = line!() + 1;
    let call = pool.transaction(async |_| {
        seen.notified().await;
        Ok(())
    });
    assert_eq!(told_during(call, &mut events, &seen).await, line);
    let line = line!() + 1;
    let call = pool.build_transaction().read_only(true).run(async |_| {
        seen.notified().await;
        Ok(())
    });
    assert_eq!(told_during(call, &mut events, &seen).await, line);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_checkout_is_told_with_its_place() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(1).slow_checkout_after(SHORT).build().unwrap();
    let held = pool.get().await.unwrap();
    let mut events = pool.subscribe();
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { (pool.get().await.unwrap(), line!()).1 }
    });
    eventually("a caller waits", PATIENCE, async || pool.status().waiting > 0).await;
    let began = Instant::now();
    eventually("it has waited for long", PATIENCE, async || began.elapsed() > SHORT * 2).await;
    drop(held);
    let line = timeout(PATIENCE, waits).await.unwrap().unwrap();
    // The first checkout may have been slow, too.
    let (mut slow, mut waited, mut file, mut told_line) = told(&mut events).await;
    if told_line != line {
        (slow, waited, file, told_line) = told(&mut events).await;
    }
    assert!(slow && waited >= SHORT && file.ends_with("loans.rs"), "{waited:?} {file}");
    assert_eq!(told_line, line);
}

/// In an outage, and while others hold all connections, nobody gets one: that is what the report is for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkout_that_fails_after_a_long_wait_is_told_too() {
    let cluster = server().await;
    let builder = by_url(cluster.url_hosts()).max_size(1).checkout_timeout(SHORT * 2).slow_checkout_after(SHORT);
    let pool = builder.build().unwrap();
    pool.connect().await.unwrap();
    let _held = pool.get_within(PATIENCE).await.unwrap();
    let mut events = pool.subscribe();
    let (refused, line) = (pool.get().await, line!());
    assert!(refused.is_err(), "all connections are in use");
    let (slow, waited, file, told_line) = told(&mut events).await;
    assert!(slow && waited >= SHORT && file.ends_with("loans.rs"), "{waited:?} {file}");
    assert_eq!(told_line, line);
}

/// A manager alone does not know who takes its connections.
#[tokio::test]
async fn a_manager_alone_refuses_to_report_checkouts() {
    let builder = || by_url("postgres://app@127.0.0.1:1/app".to_owned());
    for (option, builder) in
        [("slow_checkout_after", builder().slow_checkout_after(SHORT)), ("leak_after", builder().leak_after(SHORT))]
    {
        let error = builder.build_manager().map(drop).unwrap_err().to_string();
        assert!(error.starts_with(option) && error.contains("from a manager alone"), "{error}");
    }
}

/// Nothing is watched unless it is asked for, and a wrapped pool tells the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrapped_pool_tells_of_loans_too() {
    let cluster = server().await;
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(cluster.url_hosts());
    let existing = config.create_pool(None, tokio_postgres::NoTls).unwrap();
    let pool: Pool = Pool::wrap(existing.clone()).leak_after(SHORT).slow_checkout_after(PATIENCE).build().unwrap();
    let mut events = pool.subscribe();
    let (held, line) = (pool.get().await.unwrap(), line!());
    assert_eq!(told(&mut events).await.3, line);
    drop(held);
    for refused in [Pool::wrap(existing.clone()).leak_after(Duration::ZERO).build(), {
        Pool::wrap(existing).slow_checkout_after(Duration::ZERO).build()
    }] {
        let error = refused.map(drop).unwrap_err().to_string();
        assert!(error.contains("must be longer than zero"), "{error}");
    }
}
