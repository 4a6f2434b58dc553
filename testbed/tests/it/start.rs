//! A cluster comes up as it was ordered.

use std::net::IpAddr;
use std::time::Duration;

use testbed::{Cluster, Node};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Config, NoTls};

use crate::value;

#[tokio::test]
async fn a_primary_and_streaming_standbys() {
    let cluster = Cluster::start().await;
    for node in cluster.nodes() {
        let session = cluster.direct(node).await;
        let recovering: bool = value(&session, "SELECT pg_is_in_recovery()").await;
        assert_eq!(recovering, node != cluster.primary());
    }
    let primary = cluster.direct(Node(0)).await;
    let quorum: i64 = value(&primary, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'").await;
    assert_eq!(quorum, 2);
    primary.batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)").await.unwrap();
}

#[tokio::test]
async fn the_role_app_is_an_ordinary_owner() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let (client, connection) = cluster.url_hosts().parse::<Config>().unwrap().connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)").await.unwrap();
    let superuser: bool = value(&client, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user").await;
    assert!(!superuser);
    let config: Config = cluster.url().parse().unwrap();
    assert_eq!((config.get_user(), config.get_dbname()), (Some("app"), Some("app")));
    assert_eq!(config.get_ports(), [cluster.port()]);
}

#[tokio::test]
async fn settings_passwords_and_rules_hold_on_every_node() {
    let cluster = Cluster::builder()
        .nodes(2)
        .setting("max_connections", "17")
        .hba("host app postgres 127.0.0.1/32 trust\nhost all nobody 127.0.0.0/8 reject")
        .password("p'w @:/")
        .start()
        .await;
    for node in cluster.nodes() {
        let session = cluster.direct(node).await;
        assert_eq!(value::<String>(&session, "SHOW max_connections").await, "17");
        let rules: i64 = value(&session, "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'reject'").await;
        assert_eq!(rules, 1);

        let mut config: Config = cluster.url_hosts().parse().unwrap();
        let addresses: Vec<IpAddr> = vec![cluster.addr(node); 2];
        for address in addresses {
            config.hostaddr(address);
        }
        drop(config.connect(NoTls).await.unwrap());
        config.password("wrong");
        let refused = config.connect(NoTls).await.err().unwrap();
        assert_eq!(refused.code(), Some(&SqlState::INVALID_PASSWORD));
    }
}

#[tokio::test]
async fn clusters_live_side_by_side() {
    let foreign = Cluster::builder().nodes(1).foreign();
    let (one, two, foreign) =
        tokio::join!(Cluster::builder().nodes(1).start(), Cluster::builder().nodes(1).start(), foreign.start());
    let mut identifiers = Vec::new();
    for cluster in [&one, &two, &foreign] {
        let session = cluster.direct(Node(0)).await;
        identifiers.push(value::<i64>(&session, "SELECT system_identifier FROM pg_control_system()").await);
    }
    assert_eq!(identifiers[0], identifiers[1]);
    assert_ne!(identifiers[0], identifiers[2]);
    assert_ne!(one.addr(Node(0)), two.addr(Node(0)));
}

#[tokio::test]
#[should_panic(expected = "not seen within")]
async fn waiting_ends() {
    testbed::eventually("pigs fly", Duration::from_millis(20), async || std::future::pending().await).await;
}

/// Faults are injected from spawned tasks while clients run.
#[test]
fn futures_are_send() {
    fn send<T: Send>(_: impl FnOnce(&'static Cluster) -> T) {}
    send(|_| Cluster::start());
    send(|cluster| cluster.kill(Node(0)));
    send(|cluster| cluster.promote(Node(0)));
    send(|cluster| cluster.restart_as_standby(Node(0)));
    send(|cluster| cluster.switch_over(Node(0)));
    send(Cluster::most_advanced_standby);
    send(|cluster| cluster.set_read_only(Node(0), true));
    send(|cluster| cluster.kill_backend(Node(0)));
    send(|cluster| cluster.wait_streaming(Node(0), 2));
    send(|cluster| cluster.wait_replayed(Node(0)));
    send(|cluster| cluster.start_node(Node(0)));
}
