//! [`GenericClient`] on a transaction and on a savepoint.

use futures_util::TryFutureExt;
use tokio_postgres::types::Type;
use tokio_postgres::{Error, Statement};

use super::{Savepoint, Transaction};
use crate::pool::{Commits, GenericClient, GenericTransaction, generic_client};
use crate::server::SessionClient;
use futures_util::future::BoxFuture;

impl<C: SessionClient + GenericClient> GenericClient for Transaction<C> {
    generic_client!(this => &*this.client);

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
        Box::pin(Self::transaction(self).map_ok(GenericTransaction::new))
    }
}

impl<C: SessionClient + GenericClient> GenericClient for Savepoint<'_, C> {
    generic_client!(this => this.client);

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
        Box::pin(Savepoint::transaction(self).map_ok(GenericTransaction::new))
    }
}

impl<'n, C: SessionClient> Commits<'n> for Savepoint<'n, C> {
    fn commit(self) -> BoxFuture<'n, Result<(), Error>> {
        Box::pin(self.commit())
    }

    fn rollback(self) -> BoxFuture<'n, Result<(), Error>> {
        Box::pin(self.undone())
    }
}
