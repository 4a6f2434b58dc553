//! What is tried: on which cluster, by which way to it, and what happens.

use std::time::Duration;

use testbed::{Checks, Patroni, PatroniBuilder, versions};

use crate::report::Promise;

/// The patrol looks around every five seconds.
const PATROL: Duration = Duration::from_secs(6);
/// Behind one address: until a new session is led to the successor.
const TWO_PATROLS: Duration = Duration::from_secs(12);

/// How the pool finds the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The connection string names all members.
    Hosts,
    /// The same, and no session waits at a standby.
    HostsNotWarm,
    /// HAProxy's one address.
    HaProxy(Checks),
}

/// What happens to a cluster of Patroni's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The leader's machine is gone.
    Kill,
    /// Its PostgreSQL is.
    KillServer,
    Switchover,
    /// The leader's Patroni is frozen, and its PostgreSQL goes on beside its successor.
    Zombie,
    /// The leader is cut off from etcd and its peers; clients see it.
    Cut,
    /// etcd loses its quorum for a while.
    Quorum,
    /// The same under `failsafe_mode`.
    Failsafe,
    /// The leader's machine is gone, and back before its lease is over.
    Lease,
    /// Its PostgreSQL is killed while Patroni is paused, which is resumed later.
    Pause,
    /// An operator restarts the leader's PostgreSQL.
    Restart,
    /// An operator copies a standby anew.
    Reinit,
}

/// A cluster and its manager.
#[derive(Clone, Debug)]
pub(crate) enum Bed {
    Patroni(PatroniBuilder, Fault),
    /// The primary is killed; it is started again by hand when it has a successor.
    Repmgr {
        again: bool,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct Trial {
    pub(crate) name: &'static str,
    pub(crate) bed: Bed,
    pub(crate) way: Way,
    pub(crate) promise: Promise,
}

impl Trial {
    /// The rows of docs/scenarios.md that this is an instance of.
    pub(crate) fn rows(&self) -> &'static [&'static str] {
        let proxied = matches!(self.way, Way::HaProxy(_));
        match &self.bed {
            Bed::Patroni(_, Fault::Zombie) if proxied => &["R4b", "M7"],
            Bed::Patroni(_, Fault::Kill) if proxied => &["S1", "R8"],
            Bed::Patroni(_, Fault::Switchover) if proxied => &["S2", "R8", "R9"],
            Bed::Patroni(_, Fault::Kill) => &["S1", "R1", "M1"],
            Bed::Patroni(_, Fault::KillServer) => &["S1", "R1", "R3"],
            Bed::Patroni(_, Fault::Switchover) => &["S2", "R1", "R3", "R9", "M2"],
            Bed::Patroni(_, Fault::Zombie) => &["R4b", "M3"],
            Bed::Patroni(_, Fault::Cut) => &["S2", "R1", "M4"],
            Bed::Patroni(_, Fault::Lease) => &["S1", "S10", "M5"],
            Bed::Patroni(_, Fault::Pause) => &["S1", "S10"],
            Bed::Patroni(_, Fault::Restart | Fault::Quorum) => &["S2", "S10"],
            Bed::Patroni(_, Fault::Failsafe | Fault::Reinit) => &[],
            Bed::Repmgr { again: false } => &["S1", "R1"],
            Bed::Repmgr { again: true } => &["S1", "R1", "R4", "M6"],
        }
    }

    /// What runs in it, with versions.
    pub(crate) fn managers(&self) -> String {
        let manager = match self.bed {
            Bed::Patroni(..) => versions::patroni(),
            Bed::Repmgr { .. } => versions::repmgr(),
        };
        let proxy = matches!(self.way, Way::HaProxy(_)).then(versions::haproxy).flatten();
        manager.into_iter().chain(proxy).collect::<Vec<_>>().join(", ")
    }

    fn patroni(name: &'static str, fault: Fault) -> Self {
        let builder = Patroni::builder();
        let builder = match fault {
            Fault::Quorum => builder.three_etcd(),
            Fault::Failsafe => builder.failsafe(),
            // Also a slow machine comes back within such a lease.
            Fault::Lease => builder.times(60, 1, 3).primary_start_timeout(300),
            _ => builder,
        };
        let may_lose_before = matches!(fault, Fault::Kill | Fault::KillServer | Fault::Zombie | Fault::Cut);
        let may_lose_for = (fault == Fault::Zombie).then_some(PATROL);
        let promise = Promise { may_lose_before, may_lose_for };
        Self { name, bed: Bed::Patroni(builder, fault), way: Way::Hosts, promise }
    }

    fn synchronous(name: &'static str, fault: Fault) -> Self {
        let trial = Self::patroni(name, fault);
        let Bed::Patroni(builder, fault) = trial.bed else { unreachable!("it is Patroni's") };
        Self { bed: Bed::Patroni(builder.synchronous(), fault), promise: Promise::default(), ..trial }
    }

    fn by(self, way: Way) -> Self {
        let may_lose_for =
            self.promise.may_lose_for.map(|bound| if matches!(way, Way::HaProxy(_)) { TWO_PATROLS } else { bound });
        Self { way, promise: Promise { may_lose_for, ..self.promise }, ..self }
    }
}

pub(crate) fn kill() -> Trial {
    Trial::patroni("Patroni: kill", Fault::Kill)
}

pub(crate) fn switchover() -> Trial {
    Trial::patroni("Patroni: switchover", Fault::Switchover)
}

pub(crate) fn zombie() -> Trial {
    Trial::patroni("Patroni: zombie", Fault::Zombie)
}

pub(crate) fn cut() -> Trial {
    Trial::patroni("Patroni: cut off, clients still see the node", Fault::Cut)
}

pub(crate) fn lease() -> Trial {
    Trial::patroni("Patroni: leader back within its lease", Fault::Lease)
}

pub(crate) fn two_primaries() -> Trial {
    let promise = Promise { may_lose_before: true, may_lose_for: None };
    let bed = Bed::Repmgr { again: true };
    Trial { name: "repmgr: kill, old one started again: two writable", bed, way: Way::Hosts, promise }
}

/// The usual checks leave a zombie alone for 15 s: it is the pool that leaves it.
pub(crate) fn proxied_zombie() -> Trial {
    Trial { name: "HAProxy 3s/3/2: zombie", ..zombie().by(Way::HaProxy(Checks::Usual)) }
}

/// All that `make managers` tries.
pub(crate) fn all() -> Vec<Trial> {
    let (usual, quick) = (Way::HaProxy(Checks::Usual), Way::HaProxy(Checks::Quick));
    let named = |name, trial: Trial| Trial { name, ..trial };
    vec![
        kill(),
        Trial::patroni("Patroni: kill PostgreSQL only, primary_start_timeout 0", Fault::KillServer),
        switchover(),
        zombie(),
        named("Patroni: zombie, standbys not warm", zombie().by(Way::HostsNotWarm)),
        cut(),
        Trial::patroni("Patroni: etcd's quorum lost", Fault::Quorum),
        Trial::patroni("Patroni: etcd lost, failsafe_mode", Fault::Failsafe),
        lease(),
        Trial::synchronous("Patroni, synchronous: leader back within its lease", Fault::Lease),
        Trial::patroni("Patroni: PostgreSQL killed in pause", Fault::Pause),
        Trial::patroni("Patroni: restart of the leader", Fault::Restart),
        Trial::patroni("Patroni: reinit of a standby", Fault::Reinit),
        Trial::synchronous("Patroni, synchronous: kill", Fault::Kill),
        Trial::synchronous("Patroni, synchronous: switchover", Fault::Switchover),
        Trial::synchronous("Patroni, synchronous: zombie", Fault::Zombie),
        Trial::synchronous("Patroni, synchronous: cut off", Fault::Cut),
        named("HAProxy 3s/3/2: kill", kill().by(usual)),
        named("HAProxy 3s/3/2: switchover", switchover().by(usual)),
        proxied_zombie(),
        named("HAProxy 1s/2/1: kill", kill().by(quick)),
        named("HAProxy 1s/2/1: zombie", zombie().by(quick)),
        named("repmgr: kill", Trial { bed: Bed::Repmgr { again: false }, ..two_primaries() }),
        two_primaries(),
    ]
}

#[test]
fn trials_name_rows_that_exist() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/scenarios.md")).unwrap();
    for trial in all() {
        for row in trial.rows() {
            assert!(page.contains(&format!("\n| {row} | ")), "{}: {row}", trial.name);
        }
    }
}
