//! Cancels what a session runs.

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::server::{Open, SessionClient};
use crate::topology::Endpoint;

/// Cancels what one session runs; from [`Client::cancel_token`](crate::Client::cancel_token) and the methods of that
/// name of this crate's other handles. It connects as the pool does, with the pool's TLS.
#[derive(Clone)]
pub struct CancelToken {
    cancel: Arc<dyn Fn() -> BoxFuture<'static, Result<(), tokio_postgres::Error>> + Send + Sync>,
}

impl CancelToken {
    pub(super) fn new<C: SessionClient>(
        opener: &Arc<dyn Open<C>>,
        endpoint: Endpoint,
        token: tokio_postgres::CancelToken,
    ) -> Self {
        let opener = Arc::clone(opener);
        Self { cancel: Arc::new(move || opener.cancel(&endpoint, token.clone())) }
    }

    /// Asks the server to cancel what the session runs now. The server does not answer whether it has done so: the
    /// statement fails with SQLSTATE 57014, or runs to its end. Fails if the server cannot be reached. Waits without a
    /// limit of its own.
    pub async fn cancel(&self) -> Result<(), tokio_postgres::Error> {
        (self.cancel)().await
    }

    /// Like [`CancelToken::cancel`], for code written for the driver's token. The connector is ignored.
    pub async fn cancel_query<T>(&self, _: T) -> Result<(), tokio_postgres::Error> {
        self.cancel().await
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelToken").finish_non_exhaustive()
    }
}
