//! Sessions to the primary outside the pool, for settlers and listeners.

use std::sync::Arc;
use std::time::Duration;

use super::facts::{cluster_in, life_in};
use super::{Pool, Source};
use crate::cluster::{Generation, PrimaryDemand};
use crate::commit::Life;
use crate::error::Error;
use crate::server::{Notices, NotificationSink, Session, SessionClient};
use crate::topology::GenerationId;

/// A session to the primary outside the pool. Dropping this closes the session, and rolls back its transaction.
pub(crate) struct SideSession<C> {
    session: Session<C>,
    generation: Arc<Generation<C>>,
    _wanting: PrimaryDemand,
}

impl<C: SessionClient> Pool<C> {
    /// Opens a session outside the pool. Waits for a primary without a limit of its own. Cancel-safe.
    pub(crate) async fn side_session(&self) -> Result<SideSession<C>, Error> {
        let wanting = self.cluster().want();
        let (session, generation) = self.shared.dialer.session().await?;
        Ok(SideSession { session, generation, _wanting: wanting })
    }

    /// Returns how long a caller waits for a session outside the pool. Fails immediately if it cannot get one: from a
    /// wrapped pool, whose manager drives its sessions itself, or after the pool's end.
    pub(crate) fn beside_within(&self) -> Result<Duration, Error> {
        if matches!(self.shared.source, Source::Wrapped(_)) {
            return Err(Error::Wrapped);
        }
        self.is_open()?;
        self.not_ended()?;
        Ok(self.checkout_timeout().max(self.opens_within()))
    }
}

impl<C: SessionClient> SideSession<C> {
    pub(crate) fn client(&self) -> &tokio_postgres::Client {
        &self.session.client
    }

    pub(crate) fn notices(&self) -> &Notices {
        &self.session.notices
    }

    /// Gives each notification of the session to `sink`, and tells it when the session has ended. Call this only once.
    pub(crate) fn deliver_to(&self, sink: Arc<dyn NotificationSink>) {
        self.session.notices.deliver_to(sink);
    }

    pub(crate) fn generation(&self) -> GenerationId {
        self.generation.primary.id
    }

    pub(crate) fn cluster(&self) -> Option<u64> {
        cluster_in(&self.generation)
    }

    pub(crate) fn life(&self) -> Option<Life> {
        life_in(&self.generation)
    }

    /// Waits until the session's generation has ended. Cancel-safe.
    pub(crate) async fn evicted(&self) {
        self.generation.scope.cancelled().await;
    }
}
