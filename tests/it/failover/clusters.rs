//! Several clusters behind one name or in one list of hosts, and the way from one to the next without a restart.

use std::time::{Duration, Instant};

use testbed::{Cluster, Node, eventually};
use tokio::time::timeout;
use tokio_postgres::NoTls;
use tokio_postgres_failover::error::{FailureKind, UnavailableReason};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Error, Event, Pool, PoolBuilder, deadpool_postgres};

use crate::support::load::{LONG, primary_lost};
use crate::support::stalls;
use crate::support::texts::says;

async fn one(foreign: bool) -> Cluster {
    let builder = Cluster::builder().nodes(1);
    if foreign { builder.foreign().start().await } else { builder.start().await }
}

async fn identifier(cluster: &Cluster, node: Node) -> u64 {
    let sql = "SELECT system_identifier FROM pg_control_system()";
    let row = cluster.direct(node).await.query_one(sql, &[]).await.unwrap();
    row.get::<_, i64>(0).cast_unsigned()
}

fn builder(clusters: &[&Cluster]) -> PoolBuilder {
    let hosts: Vec<String> = clusters.iter().map(|cluster| cluster.socket_addr(Node(0)).to_string()).collect();
    Pool::builder(format!("postgres://app@{}/app", hosts.join(","))).unwrap()
}

/// To which cluster do the pool's connections lead?
async fn leads_to(pool: &Pool) -> u64 {
    let client = pool.get_within(LONG).await.unwrap();
    let row = client.query_one("SELECT system_identifier FROM pg_control_system()", &[]).await.unwrap();
    row.get::<_, i64>(0).cast_unsigned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_of_two_clusters_in_the_first_search_none_is_guessed() {
    let (ours, copy) = (one(false).await, one(true).await);
    let (our_id, copy_id) = (identifier(&ours, Node(0)).await, identifier(&copy, Node(0)).await);
    assert_ne!(our_id, copy_id);
    for clusters in [[&ours, &copy], [&copy, &ours]] {
        // The first search gives the other one a moment to answer. A stall of the machine may last longer than that.
        let (pool, error) = stalls::unless_stalled(async || {
            let pool = builder(&clusters).build().unwrap();
            let began = Instant::now();
            let Err(error) = pool.get().await.map(drop) else { return Err("one of them was guessed".to_owned()) };
            assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
            Ok((pool, error))
        })
        .await;
        let Error::Refused(refused) = &error else { panic!("{error:?}") };
        assert_eq!(refused.failure().kind, FailureKind::SeveralClusters);
        assert!(refused.endpoint().is_none(), "{refused:?}");
        let text = error.to_string();
        let addresses = clusters.map(|cluster| cluster.socket_addr(Node(0)).to_string());
        for word in [&our_id.to_string(), &copy_id.to_string(), &addresses[0], &addresses[1]] {
            assert!(text.contains(word.as_str()), "{text} lacks {word}");
        }
        assert!(text.contains("system_identifier") && text.contains("accept_cluster"), "{text}");
        // The application says which one.
        pool.accept_cluster(copy_id);
        eventually("the copy is used", LONG, async || pool.get().await.is_ok()).await;
        assert_eq!(leads_to(&pool).await, copy_id);
    }
    for identifier in [our_id, copy_id] {
        let pool = builder(&[&ours, &copy]).system_identifier(identifier).build().unwrap();
        assert_eq!(leads_to(&pool).await, identifier);
    }
    let pool = builder(&[&ours]).system_identifier(copy_id).build().unwrap();
    let error = pool.get().await.map(drop).unwrap_err();
    assert!(error.to_string().contains(&format!("system identifier {our_id}, expected {copy_id}")), "{error}");
}

/// Blue/green, an upgrade, a restore: the old cluster is gone, and another one answers in its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_the_next_cluster_is_accepted_without_a_restart() {
    let (blue, green) = (one(false).await, one(true).await);
    let (blue_id, green_id) = (identifier(&blue, Node(0)).await, identifier(&green, Node(0)).await);
    for (accepts, patient) in [(false, false), (true, false), (false, true)] {
        let mut builder = builder(&[&blue, &green]).checkout_timeout(Duration::from_secs(1));
        if patient {
            builder = builder.accept_new_cluster_after(Duration::from_secs(4));
        }
        // The green one is hidden until the blue one was found.
        green.freeze(Node(0));
        let pool = builder.build().unwrap();
        assert_eq!(leads_to(&pool).await, blue_id);
        green.thaw(Node(0));
        let mut doubtful = pool.get_within(LONG).await.unwrap();
        let transaction = doubtful.transaction().await.unwrap();
        transaction.batch_execute("CREATE TABLE IF NOT EXISTS doubtful ()").await.unwrap();
        blue.kill(Node(0)).await;
        primary_lost(&pool).await;
        drop(transaction);
        drop(doubtful);
        if !patient {
            eventually("the green one is refused", LONG, async || {
                let error = pool.get().await.map(drop).unwrap_err();
                let Error::Unavailable(unavailable) = &error else { panic!("{error:?}") };
                if unavailable.reason() == UnavailableReason::OtherCluster {
                    says(&error, "UnavailableReason::OtherCluster");
                }
                unavailable.reason() == UnavailableReason::OtherCluster
                    && error.to_string().contains(&format!("accept_cluster({green_id})"))
                    && error.to_string().contains("accept_new_cluster_after")
            })
            .await;
            if accepts { pool.accept_cluster(green_id) } else { pool.forget_cluster() }
        }
        eventually("the green one is used", LONG, async || pool.get().await.is_ok()).await;
        assert_eq!(leads_to(&pool).await, green_id);
        // The blue one is the stranger now.
        blue.start_node(Node(0)).await;
        assert_eq!(leads_to(&pool).await, green_id);
    }
}

/// Whose word is given while the pool sleeps is heard: the caller that wakes it is led to that cluster.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_a_sleeping_pool_is_told_which_cluster_is_its_own() {
    let (blue, green) = (one(false).await, one(true).await);
    let (blue_id, green_id) = (identifier(&blue, Node(0)).await, identifier(&green, Node(0)).await);
    for accepts in [true, false] {
        // The green one is hidden until the blue one was found.
        green.freeze(Node(0));
        let builder = builder(&[&blue, &green]).checkout_timeout(Duration::from_secs(5));
        let pool = builder.sleep_after(Duration::from_millis(300)).build().unwrap();
        assert_eq!(leads_to(&pool).await, blue_id);
        eventually("it sleeps", LONG, async || matches!(pool.status().view.state, State::Asleep)).await;
        blue.kill(Node(0)).await;
        green.thaw(Node(0));
        let mut events = pool.subscribe();
        if accepts {
            pool.accept_cluster(green_id);
        } else {
            pool.forget_cluster();
        }
        let told = timeout(LONG, events.next()).await.expect("it is told at once");
        assert!(matches!(told, Some(Event::ClusterAccepted { .. })), "{told:?}");
        assert!(matches!(pool.status().view.state, State::Asleep), "the word alone wakes nobody");
        assert_eq!(leads_to(&pool).await, green_id);
        blue.start_node(Node(0)).await;
    }
}

/// A restore leaves the cluster on an older timeline, with the same identifier.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4_an_older_timeline_is_accepted_at_the_users_word() {
    let cluster = Cluster::builder().nodes(2).asynchronous().start().await;
    let identifier = identifier(&cluster, Node(0)).await;
    let pool = Pool::builder(cluster.url_hosts()).unwrap().checkout_timeout(Duration::from_secs(1)).build().unwrap();
    pool.get_within(LONG).await.unwrap();
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    eventually("the promoted one is used", LONG, async || pool.get().await.is_ok()).await;
    cluster.kill(Node(1)).await;
    cluster.start_node(Node(0)).await;
    eventually("the old one is refused", LONG, async || {
        let Err(error) = pool.get().await else { return false };
        let Error::Unavailable(unavailable) = &error else { panic!("{error:?}") };
        if unavailable.reason() == UnavailableReason::OldPrimary {
            says(&error, "UnavailableReason::OldPrimary");
        }
        unavailable.reason() == UnavailableReason::OldPrimary
            && error.to_string().contains("timeline 1, but timeline 2 exists")
            && error.to_string().contains(&format!("accept_cluster({identifier})"))
    })
    .await;
    pool.accept_cluster(identifier);
    eventually("the restored one is used", LONG, async || pool.get().await.is_ok()).await;
    eventually("it is on the older timeline", LONG, async || match pool.status().view.state {
        State::Primary { report, .. } => report.timeline == Some(1),
        _ => false,
    })
    .await;
}

/// Where the connections come from another pool, its manager leads to whichever is writable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r11_a_wrapped_pool_accepts_the_next_cluster_too() {
    let (blue, green) = (one(false).await, one(true).await);
    let green_id = identifier(&green, Node(0)).await;
    let hosts = [&blue, &green].map(|cluster| cluster.socket_addr(Node(0)).to_string()).join(",");
    let existing = || {
        let mut config = deadpool_postgres::Config::new();
        config.url = Some(format!("postgres://app@{hosts}/app?target_session_attrs=read-write&connect_timeout=1"));
        config.create_pool(Some(deadpool_postgres::Runtime::Tokio1), NoTls).unwrap()
    };
    let pool: Pool = Pool::wrap(existing()).checkout_timeout(Duration::from_secs(1)).build().unwrap();
    pool.get_within(LONG).await.unwrap();
    let pinned: Pool = Pool::wrap(existing()).system_identifier(green_id).build().unwrap();
    let error = pinned.get().await.map(drop).unwrap_err();
    assert!(error.to_string().contains("another cluster"), "{error}");
    blue.kill(Node(0)).await;
    eventually("the green one is refused", LONG, async || {
        let Err(error) = pool.get().await else { return false };
        error.to_string().contains(&format!("accept_cluster({green_id})"))
    })
    .await;
    pool.accept_cluster(green_id);
    eventually("the green one is used", LONG, async || pool.get().await.is_ok()).await;
    assert_eq!(leads_to(&pool).await, green_id);
}

/// The promoted server takes the role some time later: nobody is refused meanwhile, neither in the search nor by the
/// growth.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c9_a_role_that_comes_after_the_promotion_is_waited_for() {
    for warm in [false, true] {
        let cluster = Cluster::builder().nodes(2).start().await;
        let pool = Pool::builder(cluster.url_hosts()).unwrap().warm_standbys(warm).build().unwrap();
        let held = pool.get().await.unwrap();
        let owner = cluster.direct(Node(0)).await;
        owner.batch_execute("ALTER ROLE app NOLOGIN").await.unwrap();
        cluster.wait_replayed(Node(1)).await;
        cluster.kill(Node(0)).await;
        cluster.promote(Node(1)).await;
        let calls: Vec<_> = (0..4)
            .map(|_| {
                let pool = pool.clone();
                tokio::spawn(async move {
                    let client = pool.get().await?;
                    client.batch_execute("SELECT pg_sleep(0.1)").await.map_err(Error::from)
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(3)).await;
        let owner = cluster.direct(Node(1)).await;
        owner.batch_execute("SET synchronous_commit = local; ALTER ROLE app LOGIN").await.unwrap();
        for call in calls {
            call.await.unwrap().unwrap_or_else(|error| panic!("warm standbys {warm}: {error}"));
        }
        drop(held);
    }
}
