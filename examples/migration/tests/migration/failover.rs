//! Both shops under load while the primary is killed, and a standby is promoted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use failover_migration::{after, before};
use testbed::{Cluster, eventually};
use tokio::task::JoinSet;

/// For what comes within milliseconds on an idle machine.
const LONG: Duration = Duration::from_secs(60);
const BUYERS: usize = 8;
const PIECES: i32 = 1_000_000;

/// What the buyers were told.
#[derive(Default)]
struct Told {
    /// The number of each order, by its request.
    orders: Mutex<BTreeMap<i64, i64>>,
    shipped: Mutex<BTreeSet<i64>>,
    bad: Mutex<Vec<String>>,
    /// When each buyer last got an order.
    last: Mutex<[Option<Instant>; BUYERS]>,
}

/// Runs a shop of this module through a failover. Returns what the buyers were told, and the orders that it has heard
/// of.
macro_rules! through_a_failover {
    ($shop:ident, $cluster:expr, $url:expr) => {{
        let (cluster, url): (&Cluster, String) = ($cluster, $url);
        let shop = $shop::Shop::start(&url).await.unwrap();
        assert_eq!(shop.import(vec![("tea".to_owned(), PIECES), ("mud".to_owned(), 0)]).await.unwrap(), 2);
        let sold_out = shop.order(0, "mud").await.unwrap_err();
        assert!(matches!(sold_out, $shop::ShopError::SoldOut(ref sku) if sku == "mud"), "{sold_out:?}");
        let mut received = shop.listen().await.unwrap();
        let (told, next) = (Arc::new(Told::default()), Arc::new(AtomicI64::new(1)));
        let stop = Arc::new(AtomicBool::new(false));
        let mut buyers = JoinSet::new();
        for buyer in 0..BUYERS {
            let (shop, told, next, stop) = (shop.clone(), Arc::clone(&told), Arc::clone(&next), Arc::clone(&stop));
            buyers.spawn(async move {
                let failed = |what: &str, error: $shop::ShopError| {
                    told.bad.lock().unwrap().push(format!("{what}: {error:?}"));
                };
                while !stop.load(Ordering::Relaxed) {
                    let request = next.fetch_add(1, Ordering::Relaxed);
                    let id = match shop.order(request, "tea").await {
                        Ok(id) => id,
                        Err(error) => {
                            failed("order", error);
                            continue;
                        }
                    };
                    told.orders.lock().unwrap().insert(request, id);
                    told.last.lock().unwrap()[buyer] = Some(Instant::now());
                    if request % 4 == 0 {
                        told.shipped.lock().unwrap().insert(id);
                        let _ = shop.ship(id).await.map_err(|error| failed("ship", error));
                    }
                    match shop.find(id).await {
                        Ok(found) => assert_eq!(found.map(|order| (order.id, order.sku)), Some((id, "tea".to_owned()))),
                        Err(error) => failed("find", error),
                    }
                }
            });
        }
        all_served_since(&told, Instant::now()).await;
        cluster.kill(cluster.primary()).await;
        cluster.promote_timed(cluster.most_advanced_standby().await).await;
        let promoted = Instant::now();
        all_served_since(&told, promoted).await;
        println!("{}: all buyers are served {:?} after the promotion", stringify!($shop), promoted.elapsed());
        stop.store(true, Ordering::Relaxed);
        while let Some(buyer) = buyers.join_next().await {
            buyer.unwrap();
        }
        let mut heard = BTreeSet::new();
        let _ = tokio::time::timeout(Duration::from_secs(2), async {
            while let Some(id) = received.recv().await {
                heard.insert(id);
            }
        })
        .await;
        (Arc::try_unwrap(told).unwrap_or_else(|_| panic!("all buyers have ended")), heard)
    }};
}

async fn all_served_since(told: &Told, since: Instant) {
    eventually("every buyer is served", LONG, async || {
        told.last.lock().unwrap().iter().all(|last| last.is_some_and(|last| last > since))
    })
    .await;
}

/// How many orders the table has of each request.
async fn stored(cluster: &Cluster) -> BTreeMap<i64, i64> {
    let client = cluster.direct(cluster.primary()).await;
    let rows = client.query("SELECT request, count(*) FROM orders GROUP BY request", &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_migration_a_failover_costs_no_request() {
    let cluster = Cluster::start().await;
    cluster.direct(cluster.primary()).await.batch_execute("GRANT CREATE ON SCHEMA public TO app").await.unwrap();
    let (told, heard) = through_a_failover!(after, &cluster, cluster.url_hosts());
    let (stored, orders) = (stored(&cluster).await, told.orders.into_inner().unwrap());
    let bad = told.bad.into_inner().unwrap();
    println!("{} orders, {} bad requests", orders.len(), bad.len());
    assert_eq!(bad, [""; 0]);
    assert!(stored.values().all(|count| *count == 1), "an order is there twice");
    assert!(stored.keys().eq(orders.keys()), "what buyers were told is what is stored");
    let shipped = told.shipped.into_inner().unwrap();
    let unheard: Vec<_> = orders.values().filter(|id| !heard.contains(id) && !shipped.contains(id)).collect();
    assert!(unheard.is_empty(), "the warehouse has not heard of {unheard:?}");
}

/// So it is worth it, and the test above sees bad requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_it_a_failover_costs_requests() {
    let cluster = Cluster::start().await;
    cluster.direct(cluster.primary()).await.batch_execute("GRANT CREATE ON SCHEMA public TO app").await.unwrap();
    let url = format!("{}?target_session_attrs=read-write&connect_timeout=1", cluster.url_hosts());
    let (told, _) = through_a_failover!(before, &cluster, url);
    let bad = told.bad.into_inner().unwrap();
    println!(
        "{} orders, {} bad requests, such as {:?}",
        told.orders.into_inner().unwrap().len(),
        bad.len(),
        bad.first()
    );
    assert!(!bad.is_empty(), "nobody noticed the failover");
}
