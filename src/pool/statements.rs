//! The driver's methods on this crate's handles. Each method does what the driver's method of the same name does, and
//! notes the error on the session (see [`Trail`](super::trail::Trail)). Later errors of a stream are not noted. Errors
//! of the client that a handle derefs to are not noted, either.

/// The methods for one kind of handle. `$client` is an expression for the pool's [`Client`](super::Client) behind it.
macro_rules! statements {
    ($handle:ident => $client:expr) => {
        /// As [`tokio_postgres::Client::prepare`].
        pub async fn prepare(&self, query: &str) -> Result<Statement, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.noted(client.fresh().prepare(query).await)
        }

        /// As [`tokio_postgres::Client::prepare_typed`].
        pub async fn prepare_typed(&self, query: &str, types: &[Type]) -> Result<Statement, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.noted(client.fresh().prepare_typed(query, types).await)
        }

        /// As [`tokio_postgres::Client::query`].
        pub async fn query<T>(
            &self,
            statement: &T,
            params: &[&(dyn ToSql + Sync)],
        ) -> Result<Vec<Row>, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement,
        {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query(statement, params).await)
        }

        /// As [`tokio_postgres::Client::query_scalar`].
        pub async fn query_scalar<R: FromSqlOwned, T>(
            &self,
            statement: &T,
            params: &[&(dyn ToSql + Sync)],
        ) -> Result<Vec<R>, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement + fmt::Debug,
        {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query_scalar(statement, params).await)
        }

        /// As [`tokio_postgres::Client::query_one`].
        pub async fn query_one<T>(
            &self,
            statement: &T,
            params: &[&(dyn ToSql + Sync)],
        ) -> Result<Row, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement,
        {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query_one(statement, params).await)
        }

        /// As [`tokio_postgres::Client::query_one_scalar`].
        pub async fn query_one_scalar<R: FromSqlOwned, T>(
            &self,
            statement: &T,
            params: &[&(dyn ToSql + Sync)],
        ) -> Result<R, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement + fmt::Debug,
        {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query_one_scalar(statement, params).await)
        }

        /// As [`tokio_postgres::Client::query_opt`].
        pub async fn query_opt<T>(
            &self,
            statement: &T,
            params: &[&(dyn ToSql + Sync)],
        ) -> Result<Option<Row>, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement,
        {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query_opt(statement, params).await)
        }

        /// As [`tokio_postgres::Client::query_opt_scalar`].
        pub async fn query_opt_scalar<R: FromSqlOwned, T>(
            &self,
            statement: &T,
            params: &[&(dyn ToSql + Sync)],
        ) -> Result<Option<R>, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement + fmt::Debug,
        {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query_opt_scalar(statement, params).await)
        }

        /// As [`tokio_postgres::Client::query_raw`]. In a transaction, finish or drop the result before the closure
        /// returns, or the call fails with [`RolledBack::StreamKept`](crate::error::RolledBack::StreamKept).
        pub async fn query_raw<T, P, I>(&self, statement: &T, params: I) -> Result<RowStream, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement,
            P: BorrowToSql,
            I: IntoIterator<Item = P>,
            I::IntoIter: ExactSizeIterator,
        {
            let $handle = self;
            let client = $client;
            client.set_streamed();
            client.noted(client.driver().query_raw(statement, params).await)
        }

        /// As [`tokio_postgres::Client::query_typed`].
        pub async fn query_typed(
            &self,
            query: &str,
            params: &[(&(dyn ToSql + Sync), Type)],
        ) -> Result<Vec<Row>, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query_typed(query, params).await)
        }

        /// As [`tokio_postgres::Client::query_typed_one`].
        pub async fn query_typed_one(
            &self,
            query: &str,
            params: &[(&(dyn ToSql + Sync), Type)],
        ) -> Result<Row, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query_typed_one(query, params).await)
        }

        /// As [`tokio_postgres::Client::query_typed_opt`].
        pub async fn query_typed_opt(
            &self,
            query: &str,
            params: &[(&(dyn ToSql + Sync), Type)],
        ) -> Result<Option<Row>, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().query_typed_opt(query, params).await)
        }

        /// As [`tokio_postgres::Client::query_typed_raw`]. In a transaction, finish or drop the result before the
        /// closure returns, or the call fails with [`RolledBack::StreamKept`](crate::error::RolledBack::StreamKept).
        pub async fn query_typed_raw<P, I>(&self, query: &str, params: I) -> Result<RowStream, tokio_postgres::Error>
        where
            P: BorrowToSql,
            I: IntoIterator<Item = (P, Type)>,
        {
            let $handle = self;
            let client = $client;
            client.set_streamed();
            client.noted(client.driver().query_typed_raw(query, params).await)
        }

        /// As [`tokio_postgres::Client::execute`].
        pub async fn execute<T>(
            &self,
            statement: &T,
            params: &[&(dyn ToSql + Sync)],
        ) -> Result<u64, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement,
        {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().execute(statement, params).await)
        }

        /// As [`tokio_postgres::Client::execute_typed`].
        pub async fn execute_typed(
            &self,
            statement: &str,
            params: &[(&(dyn ToSql + Sync), Type)],
        ) -> Result<u64, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().execute_typed(statement, params).await)
        }

        /// As [`tokio_postgres::Client::execute_raw`].
        pub async fn execute_raw<T, P, I>(&self, statement: &T, params: I) -> Result<u64, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement,
            P: BorrowToSql,
            I: IntoIterator<Item = P>,
            I::IntoIter: ExactSizeIterator,
        {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().execute_raw(statement, params).await)
        }

        /// As [`tokio_postgres::Client::copy_in`]. In a transaction, finish or drop the result before the closure
        /// returns, or the call fails with [`RolledBack::StreamKept`](crate::error::RolledBack::StreamKept).
        pub async fn copy_in<T, U>(&self, statement: &T) -> Result<CopyInSink<U>, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement,
            U: Buf + 'static + Send,
        {
            let $handle = self;
            let client = $client;
            client.set_streamed();
            client.noted(client.driver().copy_in(statement).await)
        }

        /// As [`tokio_postgres::Client::copy_out`]. In a transaction, finish or drop the result before the closure
        /// returns, or the call fails with [`RolledBack::StreamKept`](crate::error::RolledBack::StreamKept).
        pub async fn copy_out<T>(&self, statement: &T) -> Result<CopyOutStream, tokio_postgres::Error>
        where
            T: ?Sized + ToStatement,
        {
            let $handle = self;
            let client = $client;
            client.set_streamed();
            client.noted(client.driver().copy_out(statement).await)
        }

        /// As [`tokio_postgres::Client::simple_query`].
        pub async fn simple_query(&self, query: &str) -> Result<Vec<SimpleQueryMessage>, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().simple_query(query).await)
        }

        /// As [`tokio_postgres::Client::simple_query_raw`]. In a transaction, finish or drop the result before the
        /// closure returns, or the call fails with [`RolledBack::StreamKept`](crate::error::RolledBack::StreamKept).
        pub async fn simple_query_raw(&self, query: &str) -> Result<SimpleQueryStream, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.set_streamed();
            client.noted(client.driver().simple_query_raw(query).await)
        }

        /// As [`tokio_postgres::Client::batch_execute`].
        pub async fn batch_execute(&self, query: &str) -> Result<(), tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            client.noted(client.driver().batch_execute(query).await)
        }
    };
}

/// The methods of deadpool-postgres' `ClientWrapper` for one kind of handle.
macro_rules! cached_statements {
    ($handle:ident => $client:expr) => {
        /// As [`deadpool_postgres::ClientWrapper::prepare_cached`].
        pub async fn prepare_cached(&self, query: &str) -> Result<Statement, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            let _ = client.fresh();
            client.noted(client.held().prepare_cached(query).await)
        }

        /// As [`deadpool_postgres::ClientWrapper::prepare_typed_cached`].
        pub async fn prepare_typed_cached(
            &self,
            query: &str,
            types: &[Type],
        ) -> Result<Statement, tokio_postgres::Error> {
            let $handle = self;
            let client = $client;
            let _ = client.fresh();
            client.noted(client.held().prepare_typed_cached(query, types).await)
        }
    };
}

use std::fmt;
use std::sync::Arc;

use deadpool_postgres::ClientWrapper;
use tokio_postgres::types::{BorrowToSql, FromSqlOwned, ToSql, Type};
use tokio_postgres::{
    CopyInSink, CopyOutStream, Row, RowStream, SimpleQueryMessage, SimpleQueryStream, Statement, ToStatement,
};
use tokio_util::bytes::Buf;

use super::Client;
use crate::server::SessionClient;

pub(crate) use {cached_statements, statements};

impl<C: SessionClient> Client<C> {
    statements!(this => this);

    /// The driver's client. Its errors are not noted.
    pub(crate) fn driver(&self) -> &tokio_postgres::Client {
        self
    }

    /// Like [`Self::driver`], but makes the client forget outdated types first.
    pub(crate) fn fresh(&self) -> &tokio_postgres::Client {
        self.trail().freshen(self);
        self
    }

    pub(crate) fn held(&self) -> &C {
        self
    }

    /// Remembers the error of a statement.
    pub(crate) fn noted<T>(&self, result: Result<T, tokio_postgres::Error>) -> Result<T, tokio_postgres::Error> {
        if let Err(error) = &result {
            self.trail().note(error);
        }
        result
    }
}

impl Client<ClientWrapper> {
    cached_statements!(this => this);

    /// As [`deadpool_postgres::ClientWrapper::transaction`]. It does not run again, and nobody settles its COMMIT:
    /// [`Pool::transaction`](crate::Pool::transaction) does both.
    pub async fn transaction(&mut self) -> Result<deadpool_postgres::Transaction<'_>, tokio_postgres::Error> {
        let trail = Arc::clone(self.trail());
        ClientWrapper::transaction(self).await.inspect_err(|error| trail.note(error))
    }
}
