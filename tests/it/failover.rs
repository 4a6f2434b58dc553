//! The main job: the primary dies or moves, and no caller notices more than a pause.

use std::time::{Duration, Instant};

use testbed::{Cluster, eventually};
use tokio_postgres_failover::Pool;

use crate::load::{Load, Write, create_table};

fn pool_by_name(cluster: &Cluster) -> Pool {
    Pool::builder(cluster.url()).unwrap().dns_servers([cluster.dns().addr()]).max_size(8).build().unwrap()
}

async fn warm_up(load: &Load) {
    eventually("the writers have warmed up", Duration::from_secs(20), async || load.acknowledged() > 50).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_with_all_members_in_dns() {
    let cluster = Cluster::start().await;
    create_table(&cluster).await;
    let pool = pool_by_name(&cluster);
    let load = Load::start(&pool, 8, Write::Idempotent);
    warm_up(&load).await;
    cluster.kill(cluster.primary()).await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    load.all_written_since(Instant::now()).await;
    let outcome = load.stop(&cluster).await;
    let (first, all) = outcome.recovery(promotion.accepted_at);
    println!("first write after {first:?}, all writers after {all:?}");
    outcome.assert_flawless();
}
