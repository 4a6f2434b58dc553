//! The driver's methods on a transaction and on a savepoint. They note each error, so that the pool can judge the
//! attempt by it even if the closure hides it.

use std::fmt;

use deadpool_postgres::ClientWrapper;
use tokio_postgres::types::{BorrowToSql, FromSqlOwned, ToSql, Type};
use tokio_postgres::{
    CopyInSink, CopyOutStream, Row, RowStream, SimpleQueryMessage, SimpleQueryStream, Statement, ToStatement,
};
use tokio_util::bytes::Buf;

use super::{Savepoint, Transaction};
use crate::pool::{cached_statements, statements};
use crate::server::SessionClient;

impl<C: SessionClient> Transaction<C> {
    statements!(this => &this.client);
}

impl Transaction<ClientWrapper> {
    cached_statements!(this => &this.client);
}

impl<C: SessionClient> Savepoint<'_, C> {
    statements!(this => this.client);
}

impl Savepoint<'_, ClientWrapper> {
    cached_statements!(this => this.client);
}
