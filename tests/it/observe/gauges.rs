//! Gauges of a pool, seen by a recorder that looks at each change, or panics at one.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::FutureExt;
use metrics::{Counter, Gauge, GaugeFn, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use testbed::eventually;
use tokio::time::timeout;

use crate::support::load::by_url;
use crate::support::{PATIENCE, server};

/// Calls a function with each change of one gauge.
struct Watch {
    gauge: &'static str,
    changed: Changed,
}

type Changed = Arc<dyn Fn(f64) + Send + Sync>;

struct Watched(Changed);

impl GaugeFn for Watched {
    fn increment(&self, value: f64) {
        (self.0)(value);
    }

    fn decrement(&self, value: f64) {
        (self.0)(-value);
    }

    fn set(&self, _: f64) {}
}

impl Recorder for Watch {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        if key.name() != self.gauge {
            return Gauge::noop();
        }
        Gauge::from_arc(Arc::new(Watched(Arc::clone(&self.changed))))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// Who changes the size of a pool that is closed changes nothing.
#[tokio::test]
async fn a_closed_pool_has_no_size() {
    let cluster = server().await;
    let total = Arc::new(Mutex::new(0.0));
    let sum = Arc::clone(&total);
    let watch =
        Watch { gauge: "db.client.connection.max", changed: Arc::new(move |value| *sum.lock().unwrap() += value) };
    let pool = metrics::with_local_recorder(&watch, || by_url(cluster.url_hosts()).max_size(4).build().unwrap());
    pool.connect().await.unwrap();
    let shown = || total.lock().unwrap().round();
    assert!(shown() > 3.0);
    pool.close();
    eventually("it is taken back", PATIENCE, async || shown() < 1.0).await;
    pool.resize(8).unwrap();
    assert!(shown() < 1.0, "{}", shown());
}

/// The program's recorder panics when a connection is lent: nobody has it, so a closing pool does not wait for it.
#[tokio::test]
async fn a_panic_in_a_recorder_leaves_no_loan() {
    let cluster = server().await;
    let armed = Arc::new(AtomicBool::new(false));
    let panics = Arc::clone(&armed);
    let changed = move |_: f64| assert!(!panics.load(Ordering::SeqCst), "a bug in the recorder");
    let watch = Watch { gauge: "db.client.connection.count", changed: Arc::new(changed) };
    let pool = metrics::with_local_recorder(&watch, || by_url(cluster.url_hosts()).max_size(2).build().unwrap());
    drop(pool.get().await.unwrap());
    armed.store(true, Ordering::SeqCst);
    assert!(AssertUnwindSafe(pool.get()).catch_unwind().await.is_err(), "it does not panic");
    armed.store(false, Ordering::SeqCst);
    drop(pool.get().await.unwrap());
    assert!(timeout(PATIENCE, pool.close_within(PATIENCE * 2)).await.expect("it waits for nobody"));
}

/// The program's recorder panics with each connection that is opened in advance. That costs the count and no
/// connection, so the pool does not open one after the other.
#[tokio::test]
async fn a_panic_in_a_recorder_costs_no_connection() {
    let cluster = server().await;
    let (armed, panics) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (is_armed, count) = (Arc::clone(&armed), Arc::clone(&panics));
    let changed = move |_: f64| {
        if is_armed.load(Ordering::SeqCst) {
            count.fetch_add(1, Ordering::SeqCst);
            panic!("a bug in the recorder");
        }
    };
    let watch = Watch { gauge: "db.client.connection.count", changed: Arc::new(changed) };
    let pool = || by_url(cluster.url_hosts()).max_size(4).min_idle(2).build().unwrap();
    let pool = metrics::with_local_recorder(&watch, pool);
    eventually("its connections are ready", PATIENCE, async || pool.status().available == 2).await;
    assert_eq!(panics.load(Ordering::SeqCst), 2, "one for each connection");
    armed.store(false, Ordering::SeqCst);
    drop(pool.get().await.unwrap());
}
