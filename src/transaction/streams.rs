//! The driver's calls that return before their answer has come: COPY, and rows one by one.
//!
//! What they return borrows nothing, so it can be kept beyond the closure, and COMMIT then waits behind it for as long as
//! it is kept. So a transaction that has called one of these asks the session, before COMMIT, whether it is free. The
//! methods hide those of the driver, which the handles dereference to.

use std::pin::pin;
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::types::{BorrowToSql, Type};
use tokio_postgres::{CopyInSink, CopyOutStream, Error, RowStream, SimpleQueryStream, ToStatement};
use tokio_util::bytes::Buf;

use super::{Savepoint, Transaction};
use crate::pool::Client;
use crate::server::SessionClient;

/// So long a session may be silent while it is waited for: longer than a server pauses within an answer.
const SILENT: Duration = Duration::from_secs(2);
/// The same in all, where the session's driver is not this crate's and nobody sees what comes.
const UNSEEN: Duration = Duration::from_secs(5);

macro_rules! streams {
    ($handle:ident $(<$life:lifetime>)?) => {
        impl<C: SessionClient> $handle<$($life,)? C> {
            /// [`tokio_postgres::Client::copy_in`]. Finish or drop the sink before the closure returns, or the call fails
            /// with [`RolledBack::StreamKept`](crate::RolledBack::StreamKept).
            ///
            /// ```no_run
            /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
            /// use std::io::Cursor;
            /// use std::pin::pin;
            ///
            /// use futures_util::SinkExt;
            ///
            /// pool.transaction(async |tx| {
            ///     let mut sink = pin!(tx.copy_in("COPY tags (name) FROM STDIN").await?);
            ///     sink.send(Cursor::new(b"new\n".to_vec())).await?;
            ///     Ok(sink.finish().await?)
            /// })
            /// .await?;
            /// # Ok(())
            /// # }
            /// ```
            pub async fn copy_in<T, U>(&self, statement: &T) -> Result<CopyInSink<U>, Error>
            where
                T: ?Sized + ToStatement,
                U: Buf + Send + 'static,
            {
                self.client.set_streamed();
                self.client.copy_in(statement).await
            }

            /// [`tokio_postgres::Client::copy_out`]. Read the stream to its end or drop it before the closure returns, or
            /// the call fails with [`RolledBack::StreamKept`](crate::RolledBack::StreamKept).
            ///
            /// ```no_run
            /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
            /// use futures_util::TryStreamExt;
            ///
            /// let copied: Vec<_> = pool
            ///     .read(async |tx| Ok(tx.copy_out("COPY tags TO STDOUT").await?.try_collect().await?))
            ///     .await?;
            /// # let _ = copied;
            /// # Ok(())
            /// # }
            /// ```
            pub async fn copy_out<T>(&self, statement: &T) -> Result<CopyOutStream, Error>
            where
                T: ?Sized + ToStatement,
            {
                self.client.set_streamed();
                self.client.copy_out(statement).await
            }

            /// [`tokio_postgres::Client::query_raw`]. Read the stream to its end or drop it before the closure returns, or
            /// the call fails with [`RolledBack::StreamKept`](crate::RolledBack::StreamKept).
            ///
            /// ```no_run
            /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
            /// use futures_util::TryStreamExt;
            ///
            /// let rows: Vec<_> = pool
            ///     .read(async |tx| Ok(tx.query_raw("SELECT $1::int", [1_i32]).await?.try_collect().await?))
            ///     .await?;
            /// # let _ = rows;
            /// # Ok(())
            /// # }
            /// ```
            pub async fn query_raw<T, P, I>(&self, statement: &T, params: I) -> Result<RowStream, Error>
            where
                T: ?Sized + ToStatement,
                P: BorrowToSql,
                I: IntoIterator<Item = P>,
                I::IntoIter: ExactSizeIterator,
            {
                self.client.set_streamed();
                self.client.query_raw(statement, params).await
            }

            /// [`tokio_postgres::Client::query_typed_raw`]. Read the stream to its end or drop it before the closure
            /// returns, or the call fails with [`RolledBack::StreamKept`](crate::RolledBack::StreamKept).
            ///
            /// ```no_run
            /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
            /// use futures_util::TryStreamExt;
            /// use tokio_postgres::types::Type;
            ///
            /// let rows: Vec<_> = pool
            ///     .read(async |tx| Ok(tx.query_typed_raw("SELECT $1", [(1_i32, Type::INT4)]).await?.try_collect().await?))
            ///     .await?;
            /// # let _ = rows;
            /// # Ok(())
            /// # }
            /// ```
            pub async fn query_typed_raw<P, I>(&self, query: &str, params: I) -> Result<RowStream, Error>
            where
                P: BorrowToSql,
                I: IntoIterator<Item = (P, Type)>,
            {
                self.client.set_streamed();
                self.client.query_typed_raw(query, params).await
            }

            /// [`tokio_postgres::Client::simple_query_raw`]. Read the stream to its end or drop it before the closure
            /// returns, or the call fails with [`RolledBack::StreamKept`](crate::RolledBack::StreamKept).
            ///
            /// ```no_run
            /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
            /// use futures_util::TryStreamExt;
            ///
            /// let messages: Vec<_> = pool
            ///     .read(async |tx| Ok(tx.simple_query_raw("SELECT 1; SELECT 2").await?.try_collect().await?))
            ///     .await?;
            /// # let _ = messages;
            /// # Ok(())
            /// # }
            /// ```
            pub async fn simple_query_raw(&self, query: &str) -> Result<SimpleQueryStream, Error> {
                self.client.set_streamed();
                self.client.simple_query_raw(query).await
            }
        }
    };
}

streams!(Transaction);
streams!(Savepoint<'_>);

/// Waits until the session has answered all that it was asked. `false`: somebody keeps it from that. The answer itself is
/// COMMIT's to find out about, also where the session has ended.
pub(super) async fn is_free<C: SessionClient>(client: &Client<C>) -> bool {
    let mut answer = pin!(client.batch_execute(""));
    let silent = if client.notices().are_driven() { SILENT } else { UNSEEN };
    loop {
        let before = client.notices().stirs();
        let waited = tokio::select! {
            biased;
            waited = timeout(silent, answer.as_mut()) => waited,
            () = client.evicted() => return true,
        };
        if waited.is_ok() {
            return true;
        }
        if client.notices().stirs() == before {
            return false;
        }
    }
}
