//! Sessions that belong to the caller, for libraries that need a client of their own.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use tokio::time::{Instant, timeout};

use super::{CancelToken, Pool};
use crate::cluster::PrimaryDemand;
use crate::error::Error;

impl Pool {
    /// Opens a session to the verified primary that is yours: the driver's own client, and the future that drives it.
    ///
    /// Use it for libraries that need a [`tokio_postgres::Client`] of their own, such as diesel-async. If a reference
    /// to a client is enough, use [`Pool::get`] or [`Client::detach`](crate::Client::detach).
    ///
    /// The result is that of [`tokio_postgres::connect`], with these differences. No address is needed. The server has
    /// shown on this very session that it is the verified primary. The session ends when another primary is proved,
    /// when its server refuses writes, after `dead_after` of silence, and with [`Pool::close`]. The client's own
    /// `cancel_token` does not know the server's address, so use [`SessionDriver::cancel_token`].
    ///
    /// The session does not count towards [`max_size`](crate::PoolBuilder::max_size), and [`Pool::status`] does not
    /// show it. [`after_connect`](crate::PoolBuilder::after_connect) does not run on it. Nothing is re-run on it and no
    /// COMMIT is settled: if it is lost, dial again. Its [`SessionDriver`] keeps the pool alive and awake.
    /// [`Pool::close_within`] does not wait for it.
    ///
    /// It waits for a primary that takes a session, but no longer than the checkout timeout, or the time limit for
    /// opening a session ([`probe_timeout`](crate::PoolBuilder::probe_timeout)) if that is longer.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there was no primary in time, or it took no new session. [`Error::Refused`] if the
    /// credentials are wrong. [`Error::Closed`] and [`Error::RuntimeEnded`] as for [`Pool::get`]. [`Error::Wrapped`] if
    /// the pool is a [wrapped](Pool::wrap) one.
    ///
    /// # Cancel safety
    /// A dropped future closes the session that it opens.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let (client, driver) = pool.dial().await?;
    /// tokio::spawn(driver);
    /// client.batch_execute("CREATE TEMPORARY TABLE import (line text)").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn dial(&self) -> Result<(tokio_postgres::Client, SessionDriver), Error> {
        let within = self.beside_within()?;
        let began = Instant::now();
        let wanting = self.cluster().want();
        let dialling = async {
            let dialled = timeout(within, self.shared.dialer.owned_session()).await;
            dialled.map_err(|_| self.unavailable_beside(began))?
        };
        let session = self.unless_closing(dialling).await?;
        let cancel = CancelToken::new(&self.shared.dialer.opener, session.endpoint, session.client.cancel_token());
        let driver = SessionDriver { driving: session.driving, cancel, _wanting: wanting, _pool: self.clone() };
        Ok((session.client, driver))
    }
}

/// Drives a session of [`Pool::dial`]: sends what its client asks, and receives the answers. Spawn it, or poll it
/// beside the client. Dropping it closes the session.
///
/// It ends with `Ok` when the client was dropped, and when the pool has ended the session because its server is not the
/// primary any more; statements then fail with `connection closed`. It ends with an error if the connection was lost or
/// the server ended the session, as the driver's own [`tokio_postgres::Connection`] does. Notices are logged at level
/// `debug`, and notifications are dropped: use [`Pool::listen`] for these.
#[must_use = "a session does nothing unless its driver is polled"]
pub struct SessionDriver {
    driving: BoxFuture<'static, Result<(), tokio_postgres::Error>>,
    cancel: CancelToken,
    _wanting: PrimaryDemand,
    /// Keeps the cluster's task alive, because the session would end with it.
    _pool: Pool,
}

impl SessionDriver {
    /// Returns a token that can cancel what the session runs. It can be sent to any task.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let (client, driver) = pool.dial().await?;
    /// let token = driver.cancel_token();
    /// tokio::spawn(driver);
    /// tokio::spawn(async move { token.cancel().await });
    /// client.batch_execute("SELECT pg_sleep(60)").await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }
}

impl Future for SessionDriver {
    type Output = Result<(), tokio_postgres::Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.driving.as_mut().poll(context)
    }
}

impl fmt::Debug for SessionDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionDriver").finish_non_exhaustive()
    }
}
