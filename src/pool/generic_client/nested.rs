//! A transaction or savepoint of any kind.

use std::fmt;

use tokio_postgres::types::Type;
use tokio_postgres::{Error, Statement};

use super::GenericClient;
use crate::resolve::BoxFuture;

/// What [`GenericTransaction`] needs of the handle behind it.
pub(crate) trait Nested<'n>: Send + Sync {
    fn client(&self) -> &tokio_postgres::Client;

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>>;

    fn note_error(&self, error: &Error);

    fn note_stream(&self);

    fn prepare_cached<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, Error>>;

    fn prepare_typed_cached<'a>(&'a self, query: &'a str, types: &'a [Type])
    -> BoxFuture<'a, Result<Statement, Error>>;

    fn commit(self: Box<Self>) -> BoxFuture<'n, Result<(), Error>>;

    fn rollback(self: Box<Self>) -> BoxFuture<'n, Result<(), Error>>;
}

/// A transaction or savepoint that [`GenericClient::transaction`] has begun. Dropping it rolls it back.
///
/// ```no_run
/// use tokio_postgres_failover::{GenericClient, tokio_postgres};
///
/// /// Works on a connection, in a transaction and in a savepoint.
/// async fn rename(client: &mut impl GenericClient, id: i64, name: &str) -> Result<(), tokio_postgres::Error> {
///     let step = client.transaction().await?;
///     step.execute("UPDATE users SET name = $2 WHERE id = $1", &[&id, &name]).await?;
///     step.execute("INSERT INTO renamed (id) VALUES ($1)", &[&id]).await?;
///     step.commit().await
/// }
/// ```
#[must_use = "a transaction that is dropped is rolled back"]
pub struct GenericTransaction<'n> {
    inner: Box<dyn Nested<'n> + 'n>,
}

impl<'n> GenericTransaction<'n> {
    pub(crate) fn new(inner: impl Nested<'n> + 'n) -> Self {
        Self { inner: Box::new(inner) }
    }

    /// Commits the transaction. For a savepoint, keeps what was done since it was set.
    ///
    /// On a connection, this is the driver's COMMIT: if its answer is lost, nobody finds out the outcome. Only
    /// [`Pool::transaction`](crate::Pool::transaction) commits exactly once.
    pub async fn commit(self) -> Result<(), Error> {
        self.inner.commit().await
    }

    /// Undoes what was done since the beginning, or since the savepoint.
    pub async fn rollback(self) -> Result<(), Error> {
        self.inner.rollback().await
    }
}

impl GenericClient for GenericTransaction<'_> {
    fn client(&self) -> &tokio_postgres::Client {
        self.inner.client()
    }

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
        self.inner.transaction()
    }

    fn note_error(&self, error: &Error) {
        self.inner.note_error(error);
    }

    fn note_stream(&self) {
        self.inner.note_stream();
    }

    fn prepare_cached<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, Error>> {
        self.inner.prepare_cached(query)
    }

    fn prepare_typed_cached<'a>(
        &'a self,
        query: &'a str,
        types: &'a [Type],
    ) -> BoxFuture<'a, Result<Statement, Error>> {
        self.inner.prepare_typed_cached(query, types)
    }
}

impl fmt::Debug for GenericTransaction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GenericTransaction").finish_non_exhaustive()
    }
}

/// Every type that is both a [`GenericClient`] and a [`Commits`] can be behind a [`GenericTransaction`].
impl<'n, H: GenericClient + Commits<'n>> Nested<'n> for H {
    fn client(&self) -> &tokio_postgres::Client {
        GenericClient::client(self)
    }

    fn transaction(&mut self) -> BoxFuture<'_, Result<GenericTransaction<'_>, Error>> {
        GenericClient::transaction(self)
    }

    fn note_error(&self, error: &Error) {
        GenericClient::note_error(self, error);
    }

    fn note_stream(&self) {
        GenericClient::note_stream(self);
    }

    fn prepare_cached<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Statement, Error>> {
        GenericClient::prepare_cached(self, query)
    }

    fn prepare_typed_cached<'a>(
        &'a self,
        query: &'a str,
        types: &'a [Type],
    ) -> BoxFuture<'a, Result<Statement, Error>> {
        GenericClient::prepare_typed_cached(self, query, types)
    }

    fn commit(self: Box<Self>) -> BoxFuture<'n, Result<(), Error>> {
        Commits::commit(*self)
    }

    fn rollback(self: Box<Self>) -> BoxFuture<'n, Result<(), Error>> {
        Commits::rollback(*self)
    }
}

/// How a transaction or savepoint ends.
pub(crate) trait Commits<'n> {
    fn commit(self) -> BoxFuture<'n, Result<(), Error>>;

    fn rollback(self) -> BoxFuture<'n, Result<(), Error>>;
}

impl<'n> Commits<'n> for tokio_postgres::Transaction<'n> {
    fn commit(self) -> BoxFuture<'n, Result<(), Error>> {
        Box::pin(self.commit())
    }

    fn rollback(self) -> BoxFuture<'n, Result<(), Error>> {
        Box::pin(self.rollback())
    }
}

impl<'n> Commits<'n> for deadpool_postgres::Transaction<'n> {
    fn commit(self) -> BoxFuture<'n, Result<(), Error>> {
        Box::pin(self.commit())
    }

    fn rollback(self) -> BoxFuture<'n, Result<(), Error>> {
        Box::pin(self.rollback())
    }
}
