//! Sessions to the primary that belong to no pool, for settlers and listeners.

use std::sync::Arc;

use super::dialer::Dialer;
use super::facts::life_in;
use crate::cluster::{Generation, Wanting};
use crate::commit::Life;
use crate::error::Error;
use crate::server::{Notices, NotificationSink, Session, SessionClient};
use crate::topology::GenerationId;

/// A session to the primary that belongs to no pool. Dropping it closes it, and rolls back its transaction.
pub(crate) struct SideSession<C> {
    session: Session<C>,
    generation: Arc<Generation<C>>,
    _wanting: Wanting,
}

impl<C: SessionClient> SideSession<C> {
    pub(super) async fn open(dialer: &Dialer<C>) -> Result<Self, Error> {
        let wanting = dialer.cluster.want();
        let (session, generation) = dialer.session().await?;
        Ok(Self { session, generation, _wanting: wanting })
    }

    pub(crate) fn client(&self) -> &tokio_postgres::Client {
        &self.session.client
    }

    pub(crate) fn notices(&self) -> &Notices {
        &self.session.notices
    }

    /// Gives each notification of the session to `sink`, and tells it when the session has ended. Call it only once.
    pub(crate) fn deliver_to(&self, sink: Arc<dyn NotificationSink>) {
        self.session.notices.deliver_to(sink);
    }

    pub(crate) fn generation(&self) -> GenerationId {
        self.generation.primary.id
    }

    pub(crate) fn life(&self) -> Option<Life> {
        life_in(&self.generation)
    }

    /// Waits until the session's generation has ended. Cancel-safe.
    pub(crate) async fn evicted(&self) {
        self.generation.scope.cancelled().await;
    }
}
