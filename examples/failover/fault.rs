//! The ways in which the primary fails.

use testbed::{Cluster, Node};

/// What happens to the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Its processes end, and the kernel resets every connection.
    Kill,
    /// It stops: connections stay open, and nothing answers.
    Freeze,
    /// It becomes read-only in place: connections stay open, and every write is refused.
    Demotion,
}

impl Fault {
    pub(crate) const ALL: [Self; 3] = [Self::Kill, Self::Freeze, Self::Demotion];

    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Freeze => "freeze",
            Self::Demotion => "demotion",
        }
    }

    /// The heading of its part of the output and of the picture.
    pub(crate) fn explained(self) -> &'static str {
        match self {
            Self::Kill => "The primary is killed: its connections are reset",
            Self::Freeze => "The primary's host freezes: its connections stay open, and nothing answers",
            Self::Demotion => "The primary is demoted in place: its connections stay open, and each write is refused",
        }
    }

    /// The word beside the moment in the picture.
    pub(crate) fn short(self) -> &'static str {
        match self {
            Self::Kill => "kill −9",
            Self::Freeze => "frozen",
            Self::Demotion => "demoted",
        }
    }

    pub(crate) async fn strike(self, cluster: &Cluster, primary: Node) {
        match self {
            Self::Kill => cluster.kill(primary).await,
            Self::Freeze => cluster.freeze(primary),
            Self::Demotion => cluster.set_read_only(primary, true).await,
        }
    }

    /// Ends what still waits for the old primary, which is not needed any more.
    pub(crate) async fn over(self, cluster: &Cluster, primary: Node) {
        if self != Self::Kill {
            cluster.kill(primary).await;
        }
    }
}
