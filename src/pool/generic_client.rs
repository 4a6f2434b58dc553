//! One trait for every handle that runs statements: those of this crate, of the driver and of deadpool-postgres.
//!
//! Its futures are boxed. The compiler cannot prove that a future without a name is `Send` for every lifetime, so it
//! would not let a task use such futures.

mod foreign;
mod nested;

pub(crate) use nested::Commits;
pub use nested::GenericTransaction;

use std::time::Duration;

use futures_util::TryFutureExt;
use tokio::time::Instant;
use tokio_postgres::types::{BorrowToSql, ToSql, Type};
use tokio_postgres::{CopyInSink, CopyOutStream, Error, RowStream, SimpleQueryMessage, Statement, ToStatement};
use tokio_util::bytes::Buf;

use super::Client;
use crate::resolve::BoxFuture;
use crate::server::SessionClient;

/// Whatever runs statements: a connection, a transaction or a savepoint. Write helpers for `&impl GenericClient`, and
/// call them with any of them.
///
/// This crate's [`Client`](crate::Client), [`Transaction`](crate::Transaction), [`Savepoint`](crate::Savepoint) and
/// [`Detached`](crate::session::Detached) implement it, and so do the clients and transactions of
/// [`tokio_postgres`] and [`deadpool_postgres`], whose traits of the same name have the same methods. Those two traits
/// are sealed, so this crate's handles cannot implement them; replace their `use` by this one. The page
/// [from deadpool](crate::docs::from_deadpool) shows what other signatures become.
///
/// ```no_run
/// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), tokio_postgres_failover::Error> {
/// use tokio_postgres_failover::{GenericClient, tokio_postgres};
///
/// async fn count(client: &impl GenericClient) -> Result<i64, tokio_postgres::Error> {
///     let statement = client.prepare_cached("SELECT count(*) FROM orders").await?;
///     Ok(client.query_one(&statement, &[]).await?.get(0))
/// }
///
/// let client = pool.get().await?;
/// count(&client).await?;
/// pool.read(async |tx| Ok(count(&tx).await?)).await?;
/// # Ok(())
/// # }
/// ```
///
/// Each call allocates its future, as with the traits of the same name.
///
/// # Your own types
/// The trait is not sealed. [`GenericClient::client`] and [`GenericClient::transaction`] are all that a type must have.
/// A type that wraps another handle should pass on the other methods below as well. Then the connection keeps prepared
/// statements, and the pool sees each error. By the errors it recognises a failover or a conflict, even if your code
/// hides them.
///
/// ```no_run
/// use tokio_postgres_failover::resolve::BoxFuture;
/// use tokio_postgres_failover::session::GenericTransaction;
/// use tokio_postgres_failover::tokio_postgres::{Client, Error, Statement};
/// use tokio_postgres_failover::{GenericClient, Pool};
///
/// /// A connection that belongs to one tenant.
/// struct Tenant<C> {
///     within: C,
///     id: i64,
/// }
///
/// impl<C: GenericClient> GenericClient for Tenant<C> {
///     fn client(&self) -> &Client {
///         self.within.client()
///     }
///
///     fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
///         self.within.transaction()
///     }
///
///     fn prepare_cached<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, Error>> {
///         self.within.prepare_cached(query)
///     }
///
///     fn note_error(&self, error: &Error) {
///         self.within.note_error(error);
///     }
///
///     fn note_stream(&self) {
///         self.within.note_stream();
///     }
/// }
///
/// # async fn example(pool: Pool) -> Result<(), Box<dyn std::error::Error>> {
/// let tenant = Tenant { within: pool.get().await?, id: 7 };
/// tenant.execute("SELECT set_config('app.tenant', $1, false)", &[&tenant.id.to_string()]).await?;
/// # Ok(())
/// # }
/// ```
pub trait GenericClient: Send + Sync {
    /// The driver's client behind this handle.
    fn client(&self) -> &tokio_postgres::Client;

    /// Begins a transaction, or sets a savepoint in the one that this handle is.
    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>>;

    /// Receives the error of each statement that fails. A handle of this crate notes it for its pool. Default: does
    /// nothing.
    fn note_error(&self, error: &Error) {
        let _ = error;
    }

    /// Receives how long each statement took, by the name of its method. A handle of this crate reports it as
    /// `db.client.operation.duration`, if there are metrics. Default: does nothing.
    fn took(&self, method: &'static str, time: Duration, error: Option<&Error>) {
        let _ = (method, time, error);
    }

    /// Is called before a stream of rows or a COPY begins. A transaction of this crate notes it, and refuses to commit
    /// while the stream is kept. Default: does nothing.
    fn note_stream(&self) {}

    /// As [`tokio_postgres::Client::prepare`], but keeps the statement with the connection, and returns the kept one
    /// the next time. The driver's own handles keep no statements, so they prepare it anew each time.
    fn prepare_cached<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, Error>> {
        self.prepare(query)
    }

    /// As [`GenericClient::prepare_cached`], with the types of the parameters.
    fn prepare_typed_cached<'a>(
        &'a self,
        query: &'a str,
        types: &'a [Type],
    ) -> BoxFuture<'a, Result<Statement, Error>> {
        self.prepare_typed(query, types)
    }

    /// As [`tokio_postgres::Client::prepare`].
    fn prepare<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, Error>> {
        noted(self, "prepare", self.client().prepare(query))
    }

    /// As [`tokio_postgres::Client::prepare_typed`].
    fn prepare_typed<'a>(&'a self, query: &'a str, types: &'a [Type]) -> BoxFuture<'a, Result<Statement, Error>> {
        noted(self, "prepare_typed", self.client().prepare_typed(query, types))
    }

    /// As [`tokio_postgres::Client::query`].
    fn query<'a, T>(
        &'a self,
        statement: &'a T,
        params: &'a [&'a (dyn ToSql + Sync)],
    ) -> BoxFuture<'a, Result<Vec<tokio_postgres::Row>, Error>>
    where
        T: ?Sized + ToStatement + Sync + Send,
    {
        noted(self, "query", self.client().query(statement, params))
    }

    /// As [`tokio_postgres::Client::query_one`].
    fn query_one<'a, T>(
        &'a self,
        statement: &'a T,
        params: &'a [&'a (dyn ToSql + Sync)],
    ) -> BoxFuture<'a, Result<tokio_postgres::Row, Error>>
    where
        T: ?Sized + ToStatement + Sync + Send,
    {
        noted(self, "query_one", self.client().query_one(statement, params))
    }

    /// As [`tokio_postgres::Client::query_opt`].
    fn query_opt<'a, T>(
        &'a self,
        statement: &'a T,
        params: &'a [&'a (dyn ToSql + Sync)],
    ) -> BoxFuture<'a, Result<Option<tokio_postgres::Row>, Error>>
    where
        T: ?Sized + ToStatement + Sync + Send,
    {
        noted(self, "query_opt", self.client().query_opt(statement, params))
    }

    /// As [`tokio_postgres::Client::query_raw`]. A stream that is kept beyond a transaction's closure rolls it back.
    fn query_raw<'a, T, P, I>(&'a self, statement: &'a T, params: I) -> BoxFuture<'a, Result<RowStream, Error>>
    where
        T: ?Sized + ToStatement + Sync + Send,
        P: BorrowToSql + 'a,
        I: IntoIterator<Item = P> + Sync + Send + 'a,
        I::IntoIter: ExactSizeIterator,
    {
        self.note_stream();
        noted(self, "query_raw", self.client().query_raw(statement, params))
    }

    /// As [`tokio_postgres::Client::query_typed`].
    fn query_typed<'a>(
        &'a self,
        query: &'a str,
        params: &'a [(&'a (dyn ToSql + Sync), Type)],
    ) -> BoxFuture<'a, Result<Vec<tokio_postgres::Row>, Error>> {
        noted(self, "query_typed", self.client().query_typed(query, params))
    }

    /// As [`tokio_postgres::Client::query_typed_one`].
    fn query_typed_one<'a>(
        &'a self,
        query: &'a str,
        params: &'a [(&'a (dyn ToSql + Sync), Type)],
    ) -> BoxFuture<'a, Result<tokio_postgres::Row, Error>> {
        noted(self, "query_typed_one", self.client().query_typed_one(query, params))
    }

    /// As [`tokio_postgres::Client::query_typed_opt`].
    fn query_typed_opt<'a>(
        &'a self,
        query: &'a str,
        params: &'a [(&'a (dyn ToSql + Sync), Type)],
    ) -> BoxFuture<'a, Result<Option<tokio_postgres::Row>, Error>> {
        noted(self, "query_typed_opt", self.client().query_typed_opt(query, params))
    }

    /// As [`tokio_postgres::Client::query_typed_raw`]. A stream that is kept beyond a transaction's closure rolls it
    /// back.
    fn query_typed_raw<'a, P, I>(&'a self, query: &'a str, params: I) -> BoxFuture<'a, Result<RowStream, Error>>
    where
        P: BorrowToSql + 'a,
        I: IntoIterator<Item = (P, Type)> + Sync + Send + 'a,
    {
        self.note_stream();
        noted(self, "query_typed_raw", self.client().query_typed_raw(query, params))
    }

    /// As [`tokio_postgres::Client::execute`].
    fn execute<'a, T>(
        &'a self,
        statement: &'a T,
        params: &'a [&'a (dyn ToSql + Sync)],
    ) -> BoxFuture<'a, Result<u64, Error>>
    where
        T: ?Sized + ToStatement + Sync + Send,
    {
        noted(self, "execute", self.client().execute(statement, params))
    }

    /// As [`tokio_postgres::Client::execute_raw`].
    fn execute_raw<'a, T, P, I>(&'a self, statement: &'a T, params: I) -> BoxFuture<'a, Result<u64, Error>>
    where
        T: ?Sized + ToStatement + Sync + Send,
        P: BorrowToSql + 'a,
        I: IntoIterator<Item = P> + Sync + Send + 'a,
        I::IntoIter: ExactSizeIterator,
    {
        noted(self, "execute_raw", self.client().execute_raw(statement, params))
    }

    /// As [`tokio_postgres::Client::execute_typed`].
    fn execute_typed<'a>(
        &'a self,
        statement: &'a str,
        params: &'a [(&'a (dyn ToSql + Sync), Type)],
    ) -> BoxFuture<'a, Result<u64, Error>> {
        noted(self, "execute_typed", self.client().execute_typed(statement, params))
    }

    /// As [`tokio_postgres::Client::batch_execute`].
    fn batch_execute<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<(), Error>> {
        noted(self, "batch_execute", self.client().batch_execute(query))
    }

    /// As [`tokio_postgres::Client::simple_query`].
    fn simple_query<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Vec<SimpleQueryMessage>, Error>> {
        noted(self, "simple_query", self.client().simple_query(query))
    }

    /// As [`tokio_postgres::Client::copy_in`]. A sink that is kept beyond a transaction's closure rolls it back.
    fn copy_in<'a, T, U>(&'a self, statement: &'a T) -> BoxFuture<'a, Result<CopyInSink<U>, Error>>
    where
        T: ?Sized + ToStatement + Sync + Send,
        U: Buf + 'static + Send,
    {
        self.note_stream();
        noted(self, "copy_in", self.client().copy_in(statement))
    }

    /// As [`tokio_postgres::Client::copy_out`]. A stream that is kept beyond a transaction's closure rolls it back.
    fn copy_out<'a, T>(&'a self, statement: &'a T) -> BoxFuture<'a, Result<CopyOutStream, Error>>
    where
        T: ?Sized + ToStatement + Sync + Send,
    {
        self.note_stream();
        noted(self, "copy_out", self.client().copy_out(statement))
    }
}

/// Waits for a statement's answer. Tells the handle of an error, and of the time.
fn noted<'a, H, T>(
    handle: &'a H,
    method: &'static str,
    statement: impl Future<Output = Result<T, Error>> + Send + 'a,
) -> BoxFuture<'a, Result<T, Error>>
where
    H: GenericClient + ?Sized,
{
    Box::pin(async move {
        let began = cfg!(feature = "metrics").then(Instant::now);
        let result = statement.await;
        let error = result.as_ref().err();
        if let Some(error) = error {
            handle.note_error(error);
        }
        if let Some(began) = began {
            handle.took(method, began.elapsed(), error);
        }
        result
    })
}

/// The methods of [`GenericClient`] on a handle of this crate. `$client` is an expression for the pool's [`Client`]
/// behind it.
macro_rules! generic_client {
    ($handle:ident => $client:expr) => {
        fn client(&self) -> &tokio_postgres::Client {
            let $handle = self;
            $client.fresh()
        }

        fn note_error(&self, error: &tokio_postgres::Error) {
            let $handle = self;
            $client.trail().note(error);
        }

        fn took(&self, method: &'static str, time: std::time::Duration, error: Option<&tokio_postgres::Error>) {
            let $handle = self;
            $client.pool().observer().statement_took(method, time, error);
        }

        fn note_stream(&self) {
            let $handle = self;
            $client.set_streamed();
        }

        fn prepare_cached<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, tokio_postgres::Error>> {
            let $handle = self;
            let client = $client;
            let _ = client.fresh();
            let prepared = client.held().prepare_cached(query);
            Box::pin(async move { client.noted(prepared.await) })
        }

        fn prepare_typed_cached<'a>(
            &'a self,
            query: &'a str,
            types: &'a [Type],
        ) -> BoxFuture<'a, Result<Statement, tokio_postgres::Error>> {
            let $handle = self;
            let client = $client;
            let _ = client.fresh();
            let prepared = client.held().prepare_typed_cached(query, types);
            Box::pin(async move { client.noted(prepared.await) })
        }
    };
}

pub(crate) use generic_client;

impl<C: SessionClient + GenericClient> GenericClient for Client<C> {
    generic_client!(this => this);

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
        let trail = std::sync::Arc::clone(self.trail());
        Box::pin(GenericClient::transaction(&mut **self).inspect_err(move |error| trail.note(error)))
    }
}
