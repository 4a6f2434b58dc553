//! The notices for an operator; each is given once.

use tokio::time::Instant;

use super::{Action, Address, Answer, Notice, Phase, Probed, Refusal, Topology};

/// Two notices with the same topic count as the same notice. Numbers are not part of it, because a strange server could
/// send new numbers for ever.
pub(super) type Topic = (&'static str, Option<Address>, Option<std::mem::Discriminant<Refusal>>);

impl Notice {
    pub(super) fn topic(&self) -> Topic {
        match self {
            Self::Refused(address, refusal) => {
                ("refused", Some(address.clone()), Some(std::mem::discriminant(refusal)))
            }
            Self::TwoPrimaries(address) => ("second", Some(address.clone()), None),
            Self::Withheld(address, _) => ("withheld", Some(address.clone()), None),
            Self::TooManyCandidates(_) => ("crowd", None, None),
            Self::ClusterAccepted { .. } => ("accepted", None, None),
            Self::StillSearching(_) => ("slow", None, None),
        }
    }
}

impl Topology {
    pub(super) fn tell_of_a_long_search(&mut self, now: Instant) {
        if let Phase::Searching(search) = &mut self.phase {
            search.told = true;
            self.actions.push(Action::Notice(Notice::StillSearching(now.duration_since(search.since))));
        }
    }

    pub(super) fn notice(&mut self, probed: &Probed, answer: &Answer) {
        match answer {
            Answer::Refused(_, Refusal::Standby | Refusal::Promoting | Refusal::AnotherServer) | Answer::Failed(_) => {}
            Answer::Refused(_, refusal) => self.say(Notice::Refused(probed.address.clone(), *refusal)),
            Answer::Primary(report) => self.notice_withheld(probed, report),
        }
    }

    pub(super) fn say(&mut self, notice: Notice) {
        if self.noticed.insert(notice.topic()) {
            self.actions.push(Action::Notice(notice));
        }
    }

    /// Forgets the notices about servers that are no longer candidates, so that they are given again if a server comes
    /// back.
    pub(super) fn forget_notices(&mut self) {
        let members = &self.members;
        self.noticed.retain(|topic| topic.1.as_ref().is_none_or(|address| members.contains_key(address)));
    }
}
