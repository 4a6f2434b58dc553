//! Decides which server may be the primary, what answers mean while a primary is known, and how a generation begins.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Action, Address, Answer, Change, Eviction, Notice, Phase, Primary, Probed, QUIET, Refusal, ServerReport,
    SuspendCause, Topology,
    generation::{same_start, writable},
    identity,
};

impl Topology {
    /// Checks whether a server with this report can be the cluster's primary. `kept`: the report came on an older
    /// session.
    pub(super) fn admissible(&self, address: &Address, report: &ServerReport, kept: bool) -> Result<(), Refusal> {
        if let (Some(expected), Some(found)) = (self.system_identifier, report.system_identifier)
            && expected != found
        {
            return Err(Refusal::OtherCluster { expected, found });
        }
        writable(report)?;
        if self.system_identifier.is_some() && report.system_identifier.is_none() {
            self.may_be_unidentified(address, report)?;
        }
        match (report.timeline, self.newest_timeline) {
            (Some(timeline), Some(newest)) if timeline < newest && !planted!("takes zombies") => {
                Err(Refusal::Zombie { timeline, newest })
            }
            (None, Some(newest)) => self.may_have_no_timeline((address, kept), report, newest),
            _ => Ok(()),
        }
    }

    /// Returns whether a new session to the primary's address has reached another server, which is not to take the
    /// primary's place. The cluster's task then keeps the session to the primary, and closes this one. `kept_open`:
    /// there is a session to the primary.
    pub(crate) fn strayed(&self, address: &Address, report: &ServerReport, kept_open: bool) -> bool {
        let (primary, is_known) = match &self.phase {
            Phase::Known { primary, .. } => (Some(primary), true),
            Phase::Searching(search) => (search.suspended.as_ref().map(|suspended| &suspended.primary), false),
        };
        let strays = |primary: &&Primary| primary.endpoint.address == *address && !primary.is(address, report);
        primary.filter(strays).is_some_and(|primary| {
            self.admissible(address, report, false).is_err() || (is_known && kept_open && primary.has_rival(report))
        })
    }

    /// Handles an answer from the known primary's address.
    pub(super) fn primary_answered(&mut self, now: Instant, probed: &Probed, answer: &Answer) {
        let Phase::Known { primary, answered_at } = &mut self.phase else {
            return;
        };
        match answer {
            Answer::Primary(report) if primary.is(&probed.address, report) => {
                *answered_at = now;
                self.own_primary_at = now;
                self.beside.alone_since = None;
                // The heartbeat may be waiting on another session. This answer shows that the server is not silent.
                if probed.fresh {
                    self.received_at = Some(now);
                }
                // `ALTER DATABASE … SET default_transaction_read_only` does not affect an open session, so ask on a new
                // one.
                if !probed.fresh && self.must_look_at_fence(now, report) {
                    self.beside.hurry(now, self.settings.poll.0);
                }
                if !probed.fresh && std::mem::take(&mut self.beside.met_rival) {
                    self.say(Notice::TwoPrimaries(probed.address.clone()));
                }
                self.learn(now, probed, report);
            }
            // Behind a proxy there may be a second writable server. Or the server was restarted, and then the session
            // to it has ended. So ask that session.
            Answer::Primary(report) if probed.fresh && probed.still_open && primary.has_rival(report) => {
                self.beside.met_rival = true;
                self.ask_now(now, &probed.address, Duration::ZERO);
            }
            Answer::Primary(report) => {
                self.adopt(now, &probed.address, report.clone(), "the address leads to another primary");
            }
            // A new session may reach another server, or may not show which server it reached. So ask the kept session
            // about the primary.
            Answer::Refused(report, refusal)
                if probed.fresh
                    && (probed.still_open || self.traffic.open > 0)
                    && (refusal.is_untold() || !primary.is(&probed.address, report)) =>
            {
                let pause = if probed.still_open { Duration::ZERO } else { self.settings.heartbeat / QUIET };
                self.ask_now(now, &probed.address, pause);
            }
            Answer::Refused(report, refusal) => {
                // A proxy may have chosen another server behind the same address. That server proves nothing about the
                // primary.
                let proof = refusal.proof().filter(|_| primary.is(&probed.address, report));
                let id = primary.id;
                let why = format!("{}: {refusal}", primary.endpoint);
                self.suspend(now, &why, SuspendCause { silent: false, kept_open: probed.still_open });
                if let Some(cause) = proof {
                    self.end_suspended(id, cause, &why);
                }
            }
            Answer::Failed(failure) => self.primary_failed(now, probed, failure),
        }
    }

    /// Handles an answer from another address than the known primary's.
    pub(super) fn member_answered(&mut self, now: Instant, address: &Address, answer: &Answer, took: Duration) {
        match &self.phase {
            Phase::Known { primary, .. } => {
                let Answer::Primary(report) = answer else {
                    return;
                };
                if primary.is(address, report) {
                    return self.reach_at(now, address);
                }
                if same_start(report, &primary.report) {
                    // This is the same server at a second address, or an answer that it gave before a promotion or a
                    // crash.
                    return;
                }
                let newer = report.timeline > primary.report.timeline && primary.report.timeline.is_some();
                if newer && identity::comparable(report, &primary.report) {
                    self.adopt(now, address, report.clone(), "a server on a newer timeline is writable");
                } else if self.is_better_known(primary, report) {
                    self.adopt(now, address, report.clone(), "a server that tells its cluster is writable");
                } else {
                    self.say(Notice::TwoPrimaries(address.clone()));
                }
            }
            Phase::Searching(_) => self.candidate_answered(now, address, answer, took),
        }
    }

    /// Begins a generation with this server as its primary. The previous generation ends.
    pub(super) fn adopt(&mut self, now: Instant, address: &Address, report: ServerReport, why: &str) {
        let Some(endpoint) = self.members.get(address).map(|member| member.endpoint.clone()) else {
            // This does not happen, because a needed member is never forgotten. But if it did, the search would never
            // end without this line.
            if let Phase::Searching(search) = &mut self.phase {
                search.pick = None;
            }
            return;
        };
        let (lost_for, old) = match &self.phase {
            Phase::Searching(search) => {
                let old = search.suspended.as_ref().map(|suspended| (suspended.primary.id, false));
                ((self.generation.0 > 0).then(|| now.duration_since(search.since)), old)
            }
            Phase::Known { primary, .. } => (None, Some((primary.id, true))),
        };
        if let Some((id, lost)) = old {
            let why = format!("{endpoint} is the primary now");
            seen!("transitions", "{} to another primary", if lost { "known" } else { "suspended" });
            self.actions.push(Action::End { id, cause: Eviction::Replaced, why, lost });
        }
        seen!("adopted because", "{why}");
        self.generation.0 += 1 + std::mem::take(&mut self.crossings);
        self.new_sessions_succeed();
        self.note_told(now, &report);
        self.unasked.note_up_to_date();
        // Until the first primary was found, the pool's cluster was unknown, so no member could be verified. Verify
        // them now.
        for member in self.members.values_mut() {
            let Some(Answer::Primary(said) | Answer::Refused(said, _)) = &member.answer else { continue };
            member.verified |= said.system_identifier.is_some() && said.system_identifier == self.system_identifier;
        }
        // A server that was refused as an old primary may be refused again on a later timeline. The operator is then
        // told again.
        self.noticed.retain(|topic| !matches!(topic.0, "refused" | "second"));
        let primary = Primary { id: self.generation, endpoint, report };
        let rivals = self.members.iter().filter_map(|(other, member)| match &member.answer {
            Some(Answer::Primary(said))
                if said.timeline == primary.report.timeline
                    && !primary.is(other, said)
                    && !same_start(said, &primary.report) =>
            {
                Some(Notice::TwoPrimaries(other.clone()))
            }
            _ => None,
        });
        for notice in rivals.collect::<Vec<_>>() {
            self.say(notice);
        }
        self.actions.push(Action::Begin { primary: primary.clone(), lost_for });
        self.known(now, primary, why);
    }

    /// Ends the search: from now on this primary is known.
    pub(super) fn known(&mut self, now: Instant, primary: Primary, why: &str) {
        let current = primary.endpoint.address.clone();
        self.changed = Change { at: now, why: why.to_owned() };
        self.revision += 1;
        self.phase = Phase::Known { primary, answered_at: now };
        self.own_primary_at = now;
        (self.beside.due, self.beside.alone_since, self.beside.met_rival) = (None, None, false);
        self.quiet_pause = self.settings.heartbeat / QUIET;
        if let Some(member) = self.members.get_mut(&current) {
            member.verified = true;
            member.fresh = false;
        }
        let addresses: Vec<Address> = self.members.keys().cloned().collect();
        for address in addresses {
            self.schedule(now, &address);
        }
        self.pace_names(now + self.settings.patrol);
    }
}
