//! A session that has left its pool.

use std::fmt;
use std::ops::{Deref, DerefMut};

use deadpool_postgres::ClientWrapper;

use super::super::Pool;
use super::super::connection::Connection;
use crate::cluster::Wanting;
use crate::server::SessionClient;

/// A session that has left its pool, from [`Client::detach`](crate::Client::detach). Dropping it closes the
/// session.
pub struct Detached<C: SessionClient = ClientWrapper> {
    /// Always set.
    pub(super) session: Option<Own<C>>,
    pub(super) _wanting: Wanting,
    /// Keeps the cluster's task alive, because the session would end with it.
    pub(super) _pool: Pool<C>,
}

pub(super) enum Own<C> {
    Ours(Connection<C>),
    Theirs(C),
}

impl<C: SessionClient> Deref for Detached<C> {
    type Target = C;

    #[expect(clippy::expect_used, reason = "it is made of a client, which holds its connection")]
    fn deref(&self) -> &C {
        match self.session.as_ref().expect("a session") {
            Own::Ours(connection) => connection,
            Own::Theirs(client) => client,
        }
    }
}

impl<C: SessionClient> DerefMut for Detached<C> {
    #[expect(clippy::expect_used, reason = "it is made of a client, which holds its connection")]
    fn deref_mut(&mut self) -> &mut C {
        match self.session.as_mut().expect("a session") {
            Own::Ours(connection) => connection,
            Own::Theirs(client) => client,
        }
    }
}

impl<C: SessionClient> fmt::Debug for Detached<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detached").finish_non_exhaustive()
    }
}
