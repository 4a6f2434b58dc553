//! What happens to the primary, and when the next one takes over.

use std::time::Duration;

use tokio::time::sleep;

use crate::error::Error;
use crate::event::now_micros;
use crate::isolation::Network;
use crate::stage::Stage;

/// How long after the new primary's first write DNS leads to it, where DNS moves late.
const DNS_LAG: Duration = Duration::from_secs(1);

/// A kind of failure, and how the peers know the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// kill −9 of all of the primary's processes; hosts.
    Kill,
    /// SIGSTOP: connections stay, the kernel accepts new ones, nothing answers; hosts.
    Freeze,
    /// No packet arrives any more, from or to the primary; hosts.
    Vanish,
    /// The primary shuts down, a standby is promoted, the old primary comes back as a standby; hosts.
    Planned,
    /// The primary becomes read-only and keeps its connections; another server is promoted; hosts.
    Demotion,
    /// kill −9; one DNS name that leads to all members, in changing order.
    DnsAll,
    /// kill −9; one DNS name that leads to the primary alone and moves late.
    DnsLate,
}

/// When it happened, in microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// When all workers had written, and the figures begin.
    pub start: u64,
    /// The failure.
    pub struck: u64,
    /// The order to promote.
    pub ordered: u64,
    /// The first write on a session that the harness had open to the new primary; it tries every millisecond.
    pub accepted: u64,
    /// When DNS moved, where it moves.
    pub named: Option<u64>,
    /// When the figures end.
    pub end: u64,
}

impl Failure {
    /// In the order in which they run.
    pub const ALL: [Self; 7] =
        [Self::Kill, Self::DnsAll, Self::DnsLate, Self::Planned, Self::Demotion, Self::Freeze, Self::Vanish];

    /// As `FAILURES=` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Freeze => "freeze",
            Self::Vanish => "vanish",
            Self::Planned => "planned",
            Self::Demotion => "demotion",
            Self::DnsAll => "dns-all",
            Self::DnsLate => "dns-late",
        }
    }

    /// For the report.
    pub fn explained(self) -> &'static str {
        match self {
            Self::Kill => "kill −9 of the primary; the peers know all hosts",
            Self::Freeze => {
                "SIGSTOP of the primary: its kernel still answers, nothing else does; the peers know all hosts"
            }
            Self::Vanish => {
                "the primary's host vanishes: every packet is dropped, nobody is told; the peers know all hosts"
            }
            Self::Planned => {
                "planned switch-over: the primary shuts down, comes back as a standby; the peers know all hosts"
            }
            Self::Demotion => {
                "demotion in place: the primary becomes read-only and keeps its connections; the peers know all hosts"
            }
            Self::DnsAll => "kill −9 of the primary; one DNS name leads to all members, in changing order",
            Self::DnsLate => {
                "kill −9 of the primary; one DNS name leads to the primary alone, and moves 1 s after the new one \
                 takes writes"
            }
        }
    }

    /// Whether the peers are given the name instead of the hosts.
    pub fn by_name(self) -> bool {
        matches!(self, Self::DnsAll | Self::DnsLate)
    }

    /// Time beyond the usual that passes before anybody can write.
    pub fn extra_patience(self) -> Duration {
        if self == Self::DnsLate { DNS_LAG } else { Duration::ZERO }
    }

    /// Why it cannot be done here.
    pub fn missing(self, network: &Network) -> Option<&'static str> {
        (self == Self::Vanish && !network.firewall).then_some("dropping packets needs root, unshare(1) and nft(8)")
    }

    /// Does it, and promotes the most advanced standby so long after. `start` goes into the timeline.
    pub async fn strike(self, stage: &Stage, start: u64, detection: Duration) -> Result<Timeline, Error> {
        let (cluster, old) = (&stage.cluster, stage.cluster.primary());
        let struck = now_micros();
        match self {
            Self::Kill | Self::DnsAll | Self::DnsLate => cluster.kill(old).await,
            Self::Freeze => cluster.freeze(old),
            Self::Vanish => stage.vanish(cluster.addr(old))?,
            Self::Planned => cluster.stop_fast(old).await,
            Self::Demotion => cluster.set_read_only(old, true).await,
        }
        if !matches!(self, Self::Planned | Self::Demotion) {
            // A cluster's manager needs time to notice.
            sleep(detection).await;
        }
        let new = cluster.most_advanced_standby().await;
        if !self.by_name() {
            // Whoever knows one name alone is led to the new primary without any delay.
            stage.name(&[cluster.addr(new)]);
        }
        let promotion = cluster.promote_timed(new).await;
        let accepted = now_micros().saturating_sub(micros(promotion.accepted_at.elapsed()));
        let mut named = None;
        match self {
            Self::Planned => cluster.restart_as_standby(old).await,
            Self::DnsLate => {
                sleep((promotion.accepted_at + DNS_LAG).saturating_duration_since(std::time::Instant::now())).await;
                stage.name(&[cluster.addr(new)]);
                named = Some(now_micros());
            }
            _ => {}
        }
        let ordered = accepted.saturating_sub(micros(promotion.took));
        Ok(Timeline { start, struck, ordered, accepted, named, end: accepted })
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
