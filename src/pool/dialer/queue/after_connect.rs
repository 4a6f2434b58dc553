//! Runs the user's `after_connect` hook on a new session before anybody gets it.

use std::sync::Weak;

use super::Dialer;
use crate::cluster::Generation;
use crate::server::{Session, SessionClient};
use crate::topology::{ProbeFailure, Suspicion};

impl<C: SessionClient> Dialer<C> {
    /// Returns whether `after_connect` is set.
    pub(super) fn has_after_connect(&self) -> bool {
        self.hooks.as_ref().is_some_and(|hooks| hooks.after_connect.is_some())
    }
}

/// Runs `after_connect` on a session that was just opened. Does not keep the pool alive meanwhile.
pub(super) async fn after_connect<C: SessionClient>(
    dialer: &Weak<Dialer<C>>,
    generation: &Generation<C>,
    session: Session<C>,
) -> Result<Session<C>, ProbeFailure> {
    let Some(hooks) = dialer.upgrade().and_then(|dialer| {
        // The log-in itself was not refused.
        dialer.hooks.clone().inspect(|_| dialer.let_in())
    }) else {
        return Ok(session);
    };
    let Err(failure) = hooks.run_after_connect(&session.client, &session.notices.activity).await else {
        return Ok(session);
    };
    if let Some(dialer) = dialer.upgrade() {
        if session.notices.activity.may_be_busy() {
            dialer.cancel_on(&session.client, &session.notices, generation.endpoint());
        }
        // The hook may not be the reason that the session has ended.
        if session.client.is_closed() {
            dialer.cluster.suspect(generation.primary.id, Suspicion::Connection);
        }
    }
    Err(failure)
}
