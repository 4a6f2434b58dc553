//! The driver's methods on this crate's handles. Each method does what the driver's method of the same name does, and
//! notes the error on the session (see [`Trail`](super::trail::Trail)). Later errors of a stream are not noted. Errors
//! of the client that a handle derefs to are not noted, either.

/// The methods for one kind of handle. `$client` is an expression for the pool's [`Client`](super::Client) behind it.
macro_rules! statements {
    ($handle:ident => $client:expr) => {
        $crate::pool::statement_methods! { $handle, $client, tokio_postgres::Client;
            fresh prepare[](query: &str) -> Statement, {};
            fresh prepare_typed[](query: &str, types: &[Type]) -> Statement, {};
            driver query[T](statement: &T, params: &[&(dyn ToSql + Sync)]) -> Vec<Row>, {T: ?Sized + ToStatement};
            driver query_scalar[R, T](statement: &T, params: &[&(dyn ToSql + Sync)]) -> Vec<R>,
                {R: FromSqlOwned, T: ?Sized + ToStatement + fmt::Debug};
            driver query_one[T](statement: &T, params: &[&(dyn ToSql + Sync)]) -> Row, {T: ?Sized + ToStatement};
            driver query_one_scalar[R, T](statement: &T, params: &[&(dyn ToSql + Sync)]) -> R,
                {R: FromSqlOwned, T: ?Sized + ToStatement + fmt::Debug};
            driver query_opt[T](statement: &T, params: &[&(dyn ToSql + Sync)]) -> Option<Row>,
                {T: ?Sized + ToStatement};
            driver query_opt_scalar[R, T](statement: &T, params: &[&(dyn ToSql + Sync)]) -> Option<R>,
                {R: FromSqlOwned, T: ?Sized + ToStatement + fmt::Debug};
            streamed query_raw[T, P, I](statement: &T, params: I) -> RowStream, {
                T: ?Sized + ToStatement, P: BorrowToSql, I: IntoIterator<Item = P>, I::IntoIter: ExactSizeIterator
            };
            driver query_typed[](query: &str, params: &[(&(dyn ToSql + Sync), Type)]) -> Vec<Row>, {};
            driver query_typed_one[](query: &str, params: &[(&(dyn ToSql + Sync), Type)]) -> Row, {};
            driver query_typed_opt[](query: &str, params: &[(&(dyn ToSql + Sync), Type)]) -> Option<Row>, {};
            streamed query_typed_raw[P, I](query: &str, params: I) -> RowStream,
                {P: BorrowToSql, I: IntoIterator<Item = (P, Type)>};
            driver execute[T](statement: &T, params: &[&(dyn ToSql + Sync)]) -> u64, {T: ?Sized + ToStatement};
            driver execute_typed[](statement: &str, params: &[(&(dyn ToSql + Sync), Type)]) -> u64, {};
            driver execute_raw[T, P, I](statement: &T, params: I) -> u64, {
                T: ?Sized + ToStatement, P: BorrowToSql, I: IntoIterator<Item = P>, I::IntoIter: ExactSizeIterator
            };
            streamed copy_in[T, U](statement: &T) -> CopyInSink<U>, {T: ?Sized + ToStatement, U: Buf + 'static + Send};
            streamed copy_out[T](statement: &T) -> CopyOutStream, {T: ?Sized + ToStatement};
            driver simple_query[](query: &str) -> Vec<SimpleQueryMessage>, {};
            streamed simple_query_raw[](query: &str) -> SimpleQueryStream, {};
            driver batch_execute[](query: &str) -> (), {};
        }
    };
}

/// The methods of deadpool-postgres' `ClientWrapper` for one kind of handle.
macro_rules! cached_statements {
    ($handle:ident => $client:expr) => {
        $crate::pool::statement_methods! { $handle, $client, deadpool_postgres::ClientWrapper;
            cached prepare_cached[](query: &str) -> Statement, {};
            cached prepare_typed_cached[](query: &str, types: &[Type]) -> Statement, {};
        }
    };
}

/// Makes a method of each row. The word before its name says on which client the method runs: on the driver's, on the
/// driver's after it has forgotten outdated types (`fresh`), or on deadpool-postgres' (`cached`). A method that is
/// `streamed` returns before its answer has ended.
macro_rules! statement_methods {
    ($handle:ident, $client:expr, $origin:path; $(
        $kind:ident $name:ident[$($generic:ident),*]($($argument:ident: $type:ty),*) -> $returned:ty, {$($bounds:tt)*};
    )+) => {$(
        #[doc = concat!("As [`", stringify!($origin), "::", stringify!($name), "`].")]
        #[doc = $crate::pool::statement_methods!(@about $kind)]
        pub async fn $name<$($generic),*>(&self, $($argument: $type),*) -> Result<$returned, tokio_postgres::Error>
        where
            $($bounds)*
        {
            let $handle = self;
            let client = $client;
            let timed = client.times(stringify!($name));
            let result = $crate::pool::statement_methods!(@run $kind client).$name($($argument),*).await;
            if let Some(timed) = timed {
                timed.statement_ended(&result);
            }
            client.noted(result)
        }
    )+};
    (@about streamed) => {
        "In a transaction, finish or drop the result before the closure returns, or the call fails with \
         [`RolledBack::StreamKept`](crate::error::RolledBack::StreamKept)."
    };
    (@about $kind:ident) => { "" };
    (@run driver $client:ident) => { $client.driver() };
    (@run fresh $client:ident) => { $client.fresh() };
    (@run cached $client:ident) => {{
        let _ = $client.fresh();
        $client.held()
    }};
    (@run streamed $client:ident) => {{
        $client.set_streamed();
        $client.driver()
    }};
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
use crate::observe::{Operation, Timed};
use crate::server::SessionClient;

pub(crate) use {cached_statements, statement_methods, statements};

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

    /// Begins to measure a method of the driver's. `None`: its end is not seen.
    pub(crate) fn times(&self, method: &str) -> Option<Timed<'_>> {
        Operation::of(method).map(|operation| self.pool().observer().times(operation))
    }

    /// Runs a statement of the pool's own. Only those of callers are measured.
    pub(crate) async fn run_own(&self, sql: &str) -> Result<(), tokio_postgres::Error> {
        self.noted(self.driver().batch_execute(sql).await)
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
