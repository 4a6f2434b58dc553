//! A session that its caller owns and drives.

use std::pin::pin;
use std::sync::Arc;

use tokio_postgres::Client;

use super::session::{Driver, drive_until_end};
use super::{Notices, Opener, Scope};
use crate::topology::{Endpoint, FailureKind, ProbeFailure, Question, ServerReport};

/// One open session that no task of this crate drives. Dropping `driving` closes the socket.
pub(crate) struct OwnedSession {
    pub(crate) client: Client,
    pub(crate) endpoint: Endpoint,
    /// Ends with the session's scope.
    pub(crate) driving: Driver,
    pub(crate) notices: Arc<Notices>,
}

impl Opener {
    /// Opens a session and asks the question on it. Cancel-safe: dropping this closes the session.
    pub(super) async fn open_owned_session(
        &self,
        endpoint: &Endpoint,
        question: Question,
        scope: Scope,
    ) -> Result<(OwnedSession, ServerReport), ProbeFailure> {
        let notices = Arc::new(Notices::default());
        let (client, driver) = self.dial_guarded(endpoint, &notices).await?;
        let (noted, traffic) = (Arc::clone(&notices), Arc::clone(&self.parts.traffic));
        let mut driving: Driver = Box::pin(async move { drive_until_end(driver, scope, &noted, &traffic).await.0 });
        let report = {
            let mut asking = pin!(self.parts.questions.ask(&endpoint.address, &client, question, &notices.session));
            tokio::select! {
                biased;
                report = asking.as_mut() => report?,
                _ = driving.as_mut() => {
                    let ended = || ProbeFailure::new(FailureKind::Unreachable, "the session ended immediately");
                    return Err(asking.await.err().unwrap_or_else(ended));
                }
            }
        };
        Ok((OwnedSession { client, endpoint: endpoint.clone(), driving, notices }, report))
    }
}
