//! Patroni's configuration of one node, and the program that runs it.

use std::net::SocketAddr;

use super::PatroniBuilder;
use crate::site::Site;

/// Patroni without its lower limit for `ttl`. Patroni starts PostgreSQL in a new process that loads this file again.
pub(super) const SCRIPT: &str = "\
import patroni.config
patroni.config.Config._validate_and_adjust_timeouts = lambda *args, **kwargs: None
if __name__ == '__main__':
    from patroni.__main__ import main
    main()
";

/// Where everything is.
pub(super) struct Places<'a> {
    pub(super) site: &'a Site,
    pub(super) node: u8,
    /// Where PostgreSQL listens, and Patroni.
    pub(super) postgres: SocketAddr,
    pub(super) rest: SocketAddr,
    /// Where the other nodes find them.
    pub(super) to_postgres: SocketAddr,
    pub(super) to_patroni: SocketAddr,
    pub(super) etcd: Vec<String>,
}

pub(super) fn text(places: &Places<'_>, choices: &PatroniBuilder) -> String {
    let Places { site, node, postgres, rest, to_postgres, to_patroni, etcd } = places;
    let PatroniBuilder { ttl, loop_wait, retry_timeout, primary_start_timeout, synchronous, failsafe, .. } = choices;
    let (scope, folder, programs) = (&site.tag, site.folder.display(), site.server.programs().display());
    // The servers' command lines have the scope for `cluster_name`: the reaper finds them by it.
    format!(
        "scope: {scope}
name: n{node}
restapi: {{listen: '{rest}', connect_address: '{to_patroni}'}}
etcd3: {{hosts: {etcd:?}, use_proxies: true}}
bootstrap:
  dcs:
    ttl: {ttl}
    loop_wait: {loop_wait}
    retry_timeout: {retry_timeout}
    maximum_lag_on_failover: 16777216
    primary_start_timeout: {primary_start_timeout}
    primary_stop_timeout: 5
    synchronous_mode: {synchronous}
    failsafe_mode: {failsafe}
    postgresql:
      use_pg_rewind: true
      use_slots: false
      parameters: {{max_connections: 100, max_wal_senders: 8, wal_log_hints: 'on', wal_level: replica, \
         hot_standby: 'on'}}
postgresql:
  database: app
  listen: '{postgres}'
  connect_address: '{to_postgres}'
  data_dir: '{folder}/n{node}'
  bin_dir: '{programs}'
  pgpass: '{folder}/patroni{node}/pgpass'
  remove_data_directory_on_rewind_failure: true
  remove_data_directory_on_diverged_timelines: true
  basebackup: [{{checkpoint: fast}}, no-sync]
  authentication:
    superuser: {{username: postgres, password: unused}}
    replication: {{username: postgres, password: unused}}
  pg_hba: ['host all all 127.0.0.0/8 trust', 'host replication all 127.0.0.0/8 trust']
"
    )
}
