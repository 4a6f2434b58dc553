//! [`GenericClient`] for handles that are not a pool's own.

use deadpool::managed::{self, Object};
use deadpool_postgres::ClientWrapper;
use futures_util::TryFutureExt;
use tokio_postgres::types::Type;
use tokio_postgres::{Error, Statement};

use super::{GenericClient, GenericTransaction};
use crate::pool::{Connection, Detached};
use crate::resolve::BoxFuture;
use crate::server::SessionClient;

impl GenericClient for tokio_postgres::Client {
    fn client(&self) -> &tokio_postgres::Client {
        self
    }

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
        Box::pin(self.transaction().map_ok(GenericTransaction::new))
    }
}

impl GenericClient for tokio_postgres::Transaction<'_> {
    fn client(&self) -> &tokio_postgres::Client {
        self.client()
    }

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
        Box::pin(self.transaction().map_ok(GenericTransaction::new))
    }
}

/// The methods of deadpool-postgres' handles, which keep statements.
macro_rules! keeps_statements {
    () => {
        fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
            Box::pin(self.transaction().map_ok(GenericTransaction::new))
        }

        fn prepare_cached<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, Error>> {
            Box::pin(self.prepare_cached(query))
        }

        fn prepare_typed_cached<'a>(
            &'a self,
            query: &'a str,
            types: &'a [Type],
        ) -> BoxFuture<'a, Result<Statement, Error>> {
            Box::pin(self.prepare_typed_cached(query, types))
        }
    };
}

impl GenericClient for ClientWrapper {
    fn client(&self) -> &tokio_postgres::Client {
        self
    }

    keeps_statements!();
}

impl GenericClient for deadpool_postgres::Transaction<'_> {
    fn client(&self) -> &tokio_postgres::Client {
        tokio_postgres::Transaction::client(self)
    }

    keeps_statements!();
}

/// The methods of a handle that passes everything on to what it derefs to.
macro_rules! passes_on {
    () => {
        fn client(&self) -> &tokio_postgres::Client {
            (**self).client()
        }

        fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
            GenericClient::transaction(&mut **self)
        }

        fn note_error(&self, error: &Error) {
            (**self).note_error(error);
        }

        fn note_stream(&self) {
            (**self).note_stream();
        }

        fn prepare_cached<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, Error>> {
            GenericClient::prepare_cached(&**self, query)
        }

        fn prepare_typed_cached<'a>(
            &'a self,
            query: &'a str,
            types: &'a [Type],
        ) -> BoxFuture<'a, Result<Statement, Error>> {
            GenericClient::prepare_typed_cached(&**self, query, types)
        }
    };
}

/// `deadpool_postgres::Client`, and the objects of a deadpool pool around this crate's [`Manager`](crate::Manager).
impl<M> GenericClient for Object<M>
where
    M: managed::Manager,
    M::Type: GenericClient,
    Self: Send + Sync,
{
    passes_on!();
}

impl<C: SessionClient + GenericClient> GenericClient for Connection<C> {
    passes_on!();
}

impl<C: SessionClient + GenericClient> GenericClient for Detached<C> {
    passes_on!();
}
