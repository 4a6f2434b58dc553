//! A session that has left its pool.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use deadpool_postgres::ClientWrapper;

use super::super::Pool;
use super::super::cancel_token::CancelToken;
use super::super::connection::Connection;
use super::super::facts::Facts;
use crate::cluster::PrimaryDemand;
use crate::server::{Scope, SessionClient};

/// A session that has left its pool, from [`Client::detach`](crate::Client::detach).
///
/// Dropping it closes the session. If a statement is under way, the server is asked to cancel it, unless it is a
/// COMMIT. On a session of a [wrapped](Pool::wrap) pool nothing is cancelled, because this crate does not see what it
/// runs.
pub struct Detached<C: SessionClient = ClientWrapper> {
    /// Always set.
    pub(super) session: Option<Own<C>>,
    pub(super) _wanting: PrimaryDemand,
    /// Keeps the cluster's task alive, because the session would end with it.
    pub(super) pool: Pool<C>,
}

pub(super) enum Own<C> {
    Ours(Connection<C>),
    /// `scope` ends with the generation. Nothing else tells the caller, because the session then stays open.
    Theirs {
        client: C,
        facts: Arc<Facts>,
        scope: Scope,
    },
}

impl<C: SessionClient> Own<C> {
    fn facts(&self) -> &Facts {
        match self {
            Self::Ours(connection) => connection.facts(),
            Self::Theirs { facts, .. } => facts,
        }
    }
}

impl<C: SessionClient> Detached<C> {
    /// Waits until the session has ended: with its primary's generation, with [`Pool::close`], or for a reason of its
    /// own. Cancel-safe.
    ///
    /// A session of a [wrapped](Pool::wrap) pool stays open, because only its manager could end it. For such a session,
    /// this waits until the generation has ended or the pool is closed. Then stop using the session and drop it: its
    /// server may still take writes that are lost.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let session = pool.get().await?.detach();
    /// tokio::select! {
    ///     done = session.batch_execute("CALL nightly_report()") => done?,
    ///     () = session.ended() => eprintln!("the primary was replaced"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn ended(&self) {
        match self.own() {
            Own::Ours(connection) => connection.facts().notices.end().wait().await,
            Own::Theirs { scope, .. } => scope.cancelled().await,
        }
    }

    /// Returns a token that can cancel what this session runs. It can be sent to any task.
    ///
    /// Use this one: the token of the driver's own `Client`, behind two derefs, does not know the server's address.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let session = pool.get().await?.detach();
    /// let token = session.cancel_token();
    /// tokio::spawn(async move { token.cancel().await });
    /// session.batch_execute("SELECT pg_sleep(60)").await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        let token = tokio_postgres::Client::cancel_token(self);
        CancelToken::new(&self.pool.shared.dialer.opener, self.own().facts().endpoint.clone(), token)
    }

    #[expect(clippy::expect_used, reason = "it is made of a client, which holds its connection")]
    fn own(&self) -> &Own<C> {
        self.session.as_ref().expect("a session")
    }
}

impl<C: SessionClient> Deref for Detached<C> {
    type Target = C;

    fn deref(&self) -> &C {
        match self.own() {
            Own::Ours(connection) => connection,
            Own::Theirs { client, .. } => client,
        }
    }
}

impl<C: SessionClient> DerefMut for Detached<C> {
    #[expect(clippy::expect_used, reason = "it is made of a client, which holds its connection")]
    fn deref_mut(&mut self) -> &mut C {
        match self.session.as_mut().expect("a session") {
            Own::Ours(connection) => connection,
            Own::Theirs { client, .. } => client,
        }
    }
}

impl<C: SessionClient> Drop for Detached<C> {
    fn drop(&mut self) {
        let Some(Own::Ours(connection)) = &self.session else { return };
        // If the pool was closed, the server may still be running something for this session.
        let reachable = !connection.is_closed() || self.pool.cluster().is_closed();
        if reachable && connection.activity().may_be_busy() {
            self.pool.shared.dialer.cancel_running(connection, connection.facts());
        }
    }
}

impl<C: SessionClient> fmt::Debug for Detached<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detached").finish_non_exhaustive()
    }
}
