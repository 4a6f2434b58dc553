//! etcd, as Patroni's store: one member, or three for tests of its quorum.

use std::net::SocketAddr;
use std::time::Duration;

use rustix::process::Signal;

use crate::patroni::rest;
use crate::process;
use crate::program::{Program, find};
use crate::site::Site;
use crate::wait::until_slowly as until;

const NAME: &str = "etcd";
/// Distances to the cluster's port.
const CLIENTS: u16 = 200;
const PEERS: u16 = 300;
/// Which of the spare addresses the first member has.
const FIRST: u8 = 60;
/// For an election among members that start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Running members. They end when this is dropped.
pub(crate) struct Etcd {
    members: Vec<Program>,
    clients: Vec<SocketAddr>,
}

impl Etcd {
    pub(crate) fn is_installed() -> bool {
        find(NAME).is_some()
    }

    /// Starts the members; returns when they have a leader.
    pub(crate) async fn start(site: &Site, members: u8) -> Self {
        let addr = |member, distance| SocketAddr::new(site.block.spare(FIRST + member), site.block.port + distance);
        let url = |member, distance| format!("http://{}", addr(member, distance));
        let all: Vec<_> = (0..members).map(|member| format!("e{member}={}", url(member, PEERS))).collect();
        let all = all.join(",");
        let mut programs = Vec::new();
        for member in 0..members {
            let mut program = Program::new(NAME, &format!("etcd{member}"), site.server, &site.folder);
            let data = program.folder().join("data").display().to_string();
            let (name, clients, peers) = (format!("e{member}"), url(member, CLIENTS), url(member, PEERS));
            program.spawn(&[
                "--name",
                &name,
                "--data-dir",
                &data,
                "--listen-client-urls",
                &clients,
                "--advertise-client-urls",
                &clients,
                "--listen-peer-urls",
                &peers,
                "--initial-advertise-peer-urls",
                &peers,
                "--initial-cluster",
                &all,
                "--heartbeat-interval",
                "100",
                "--election-timeout",
                "1000",
                "--log-level",
                "error",
                "--logger",
                "zap",
            ]);
            programs.push(program);
        }
        let clients: Vec<_> = (0..members).map(|member| addr(member, CLIENTS)).collect();
        let etcd = Self { members: programs, clients };
        etcd.wait_leader().await;
        etcd
    }

    /// Where the members' clients connect.
    pub(crate) fn clients(&self) -> &[SocketAddr] {
        &self.clients
    }

    /// SIGSTOP to the majority: the others have no leader.
    pub(crate) fn lose_quorum(&self) {
        for member in self.majority() {
            process::stop(member);
        }
    }

    /// Undoes [`Etcd::lose_quorum`]; returns when there is a leader.
    pub(crate) async fn restore_quorum(&self) {
        for member in self.majority() {
            process::signal(member, Signal::CONT);
        }
        self.wait_leader().await;
    }

    fn majority(&self) -> impl Iterator<Item = u32> {
        let ids = self.members.iter().map(|member| member.id().expect("etcd runs"));
        ids.take(self.members.len() / 2 + 1)
    }

    async fn wait_leader(&self) {
        let (first, log) = (self.clients[0], || self.members[0].log());
        until("etcd has a leader", PATIENCE, || async move {
            match rest::ask(first, "GET", "/health", "", Duration::from_secs(2)).await? {
                (200, body) if body.contains("true") => Ok(()),
                answer => Err(format!("{answer:?}; {}", log())),
            }
        })
        .await;
    }
}
