//! What the resolver says about each configured name. The resolver is DNS, or the user's own `Resolve`.
//!
//! Each name is looked up separately. If one look-up fails or has no answer, the addresses of the other names are still
//! added and forgotten as usual.

use std::collections::HashSet;

use super::{
    Action, Address, Duration, Endpoint, Instant, MAX_MEMBERS, Notice, Origin, Phase, REMEMBER, RESOLVE_INTERVAL,
    Topology, shortened,
};

/// The most addresses that are used of one name. More would be a mistake.
const MAX_ADDRESSES: usize = 256;

/// Pause between two look-ups of an unknown name, after callers have been told that it is unknown.
const UNKNOWN_INTERVAL: Duration = Duration::from_secs(1);

/// The result of looking up one name.
#[derive(Clone, Debug)]
pub(crate) enum NameAnswer {
    /// The addresses of the name. `partial`: a part of the look-up failed for this reason, so there may be more.
    Addresses { endpoints: Vec<Endpoint>, partial: Option<String> },
    /// The resolver has answered that the name does not exist, or has no address.
    Unknown(String),
    /// The resolver could not find out. For DNS: no name server gave an answer.
    Failed(String),
}

/// One configured name.
pub(super) struct TrackedName {
    /// When to ask; `None` while a look-up is under way.
    due: Option<Instant>,
    /// When the question was sent whose answer came last. `asked_at` is when the question under way was sent.
    pub(super) told_at: Option<Instant>,
    asked_at: Option<Instant>,
    /// The addresses of the last answer that had any.
    addresses: HashSet<Address>,
    failure: Option<String>,
    /// The last answer said that the name does not exist.
    pub(super) unknown: bool,
}

impl TrackedName {
    pub(super) fn new(now: Instant) -> Self {
        Self { due: Some(now), told_at: None, asked_at: None, addresses: HashSet::new(), failure: None, unknown: false }
    }

    /// Resets the name as if it had never been asked, but keeps its addresses.
    pub(super) fn ask_anew(&mut self, now: Instant) {
        (self.due, self.told_at, self.asked_at) = (Some(now), None, None);
    }

    /// Asks again, because the last answer may be outdated. If a look-up is under way, its answer counts.
    pub(super) fn doubt(&mut self, now: Instant) {
        self.told_at = None;
        self.due = self.due.map(|_| now);
    }

    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Returns whether a look-up has ended, with any result.
    pub(super) fn answered(&self) -> bool {
        self.told_at.is_some()
    }
}

fn is_v4(address: &Address) -> bool {
    matches!(address, Address::Tcp(address) if address.is_ipv4())
}

impl Topology {
    /// Handles the result of looking up one name.
    pub(crate) fn resolved(&mut self, now: Instant, name: usize, answer: NameAnswer) {
        self.notice_pause(now);
        let unknown = matches!(answer, NameAnswer::Unknown(_));
        let pause = self.resolve_pause(now, unknown);
        let Some(asked) = self.names.get_mut(name) else {
            return;
        };
        asked.due = Some(now + pause);
        asked.told_at = asked.asked_at.or(Some(now));
        asked.unknown = unknown;
        let mut endpoints = match answer {
            NameAnswer::Addresses { endpoints, partial } => {
                asked.failure = partial.map(shortened);
                endpoints
            }
            // A failure says nothing about the known members, so they stay.
            NameAnswer::Unknown(why) | NameAnswer::Failed(why) => {
                asked.failure = Some(shortened(why));
                return self.judge_refusals(now);
            }
        };
        endpoints.truncate(MAX_ADDRESSES);
        let mut addresses: HashSet<_> = endpoints.iter().map(|endpoint| endpoint.address.clone()).collect();
        // An answer without one of the address families takes none of its addresses away.
        if asked.failure.is_some() {
            let found = [true, false].map(|v4| addresses.iter().any(|address| is_v4(address) == v4));
            let missing = |address: &&Address| !found[usize::from(!is_v4(address))];
            let kept: Vec<_> = asked.addresses.iter().filter(missing).cloned().collect();
            addresses.extend(kept);
        }
        asked.addresses = addresses;
        // Do this first, so that no server of this answer is forgotten to make room for another server of the same
        // answer.
        for endpoint in &endpoints {
            if let Some(member) = self.members.get_mut(&endpoint.address) {
                member.named_at = now;
            }
        }
        for endpoint in endpoints {
            self.add(endpoint, Origin::Resolved, now);
        }
        self.forget_unnamed(now);
        self.judge_refusals(now);
    }

    /// Forgets the addresses that no name leads to any more, unless they are needed or have recently proved to be
    /// members.
    fn forget_unnamed(&mut self, now: Instant) {
        let (needed, names, unasked) = (self.needed(), &self.names, &self.unasked);
        let leads_to = |address: &Address| names.iter().any(|name| name.addresses.contains(address));
        self.spare.retain(|(endpoint, origin)| *origin == Origin::Configured || leads_to(&endpoint.address));
        self.members.retain(|address, member| {
            if member.origin == Origin::Configured || leads_to(address) {
                return true;
            }
            member.origin = Origin::Remembered;
            let seen_at = member.heard_at.map_or(member.named_at, |at| at.max(member.named_at));
            let young = now.duration_since(unasked.counts_from(seen_at)) < REMEMBER;
            needed.contains(address) || (member.verified && young)
        });
        self.forget_notices();
    }

    pub(super) fn look_up_due_names(&mut self, now: Instant) {
        for (index, name) in self.names.iter_mut().enumerate() {
            if name.due.is_some_and(|due| due <= now) {
                name.due = None;
                name.asked_at = Some(now);
                self.actions.push(Action::Resolve(index));
            }
        }
    }

    pub(super) fn names_due(&self) -> Option<Instant> {
        self.names.iter().filter_map(|name| name.due).min()
    }

    /// Asks for each name at `by` at the latest, unless a look-up is under way.
    pub(super) fn hurry_names(&mut self, by: Instant) {
        for name in &mut self.names {
            name.due = name.due.map(|due| due.min(by));
        }
    }

    /// Handles a caller that asks although waiting does not help: looks the names up again soon. However many callers
    /// ask, there is a pause between two look-ups of a name.
    pub(super) fn demand_names(&mut self, now: Instant) {
        let known = self.settings.poll.1;
        for name in &mut self.names {
            let pause = if name.unknown { UNKNOWN_INTERVAL } else { known };
            let earliest = name.asked_at.map_or(now, |asked| now.max(asked + pause));
            name.due = name.due.map(|due| due.min(earliest));
        }
    }

    pub(super) fn pace_names(&mut self, next: Instant) {
        for name in &mut self.names {
            name.due = name.due.map(|_| next);
        }
    }

    fn resolve_pause(&self, now: Instant, unknown: bool) -> Duration {
        match &self.phase {
            Phase::Known { .. } => self.settings.patrol,
            // Callers have been told that the name is unknown, so it is most likely a mistake.
            Phase::Searching(search) if unknown && search.refused_as_of.is_some() => UNKNOWN_INTERVAL,
            Phase::Searching(search) => self.poll_pause(now.duration_since(search.since)).max(RESOLVE_INTERVAL),
        }
    }

    pub(crate) fn dns_failure(&self) -> Option<String> {
        let failures: Vec<&str> = self.names.iter().filter_map(|name| name.failure.as_deref()).collect();
        (!failures.is_empty()).then(|| failures.join("; "))
    }

    /// Returns whether a search must wait for the answer for a name, which could still lead to another primary. Only a
    /// search that knows no timeline waits: the first one, the first one after a sleep, and the one for another
    /// cluster.
    pub(super) fn names_outstanding(&self) -> bool {
        self.newest_if_current().is_none() && self.names.iter().any(|name| !name.answered())
    }

    /// Queues a server for which there is no room now.
    pub(super) fn wait_for_room(&mut self, endpoint: Endpoint, origin: Origin) {
        self.say(Notice::TooManyCandidates(MAX_MEMBERS));
        let waits = self.spare.iter().any(|(other, _)| other.address == endpoint.address);
        if !waits && self.spare.len() < MAX_ADDRESSES * 4 {
            self.spare.push_back((endpoint, origin));
        }
    }

    /// Lets queued servers take the place of members that have answered and would only be asked again. Members that
    /// have proved to belong to the cluster stay, because one of them is probably the next primary.
    pub(super) fn take_turns(&mut self, now: Instant) {
        if self.spare.is_empty() {
            return;
        }
        let needed = self.needed();
        let due = self.members.iter().filter(|(address, member)| {
            !member.asking
                && member.due <= now
                && member.answer.is_some()
                && !member.verified
                && !needed.contains(address)
        });
        let due: Vec<Address> = due.map(|(address, _)| address.clone()).take(self.spare.len()).collect();
        for address in due {
            let Some((next, origin)) = self.spare.pop_front() else {
                break;
            };
            if let Some(member) = self.members.remove(&address)
                && member.origin != Origin::Remembered
            {
                self.spare.push_back((member.endpoint, member.origin));
            }
            self.add(next, origin, now);
        }
        self.forget_notices();
    }

    /// The number of addresses that wait for their turn.
    pub(crate) fn waiting(&self) -> usize {
        self.spare.len()
    }
}
