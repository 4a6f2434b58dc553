//! The shop with this pool.

use bytes::Bytes;
use futures_util::{SinkExt, pin_mut, stream};
use postgres_types::{FromSql, ToSql};
use tokio::sync::mpsc;
use tokio_postgres::Row;
use tokio_postgres_failover::listen::Message;
use tokio_postgres_failover::{BuildError, Error, GenericClient, Pool};

use crate::embedded;

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub enum ShopError {
    /// There is not enough of it.
    #[error("sold out: {0}")]
    SoldOut(String),
    /// The configuration cannot be used.
    #[error("the pool cannot be built")]
    Config(#[from] BuildError),
    /// A statement failed, or there was no connection.
    #[error("the database failed")]
    Database(#[source] Error),
    /// The schema is not the newest.
    #[error("a migration failed")]
    Migration(#[from] refinery::Error),
}

impl From<Error> for ShopError {
    fn from(error: Error) -> Self {
        error.downcast().unwrap_or_else(Self::Database)
    }
}

impl From<tokio_postgres::Error> for ShopError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

impl From<ShopError> for Error {
    fn from(error: ShopError) -> Self {
        match error {
            ShopError::Database(error) => error,
            own => Self::abort(own),
        }
    }
}

/// What became of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ToSql, FromSql)]
#[postgres(name = "order_status", rename_all = "lowercase")]
pub enum Status {
    /// It waits.
    Placed,
    /// It is on its way.
    Shipped,
}

/// A row of the table.
#[derive(Debug)]
pub struct Order {
    /// Its number.
    pub id: i64,
    /// What was ordered.
    pub sku: String,
    /// What became of it.
    pub status: Status,
}

impl TryFrom<Row> for Order {
    type Error = tokio_postgres::Error;

    fn try_from(row: Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self { id: row.try_get("id")?, sku: row.try_get("sku")?, status: row.try_get("status")? })
    }
}

/// The service. Its methods are what requests call.
#[derive(Clone)]
pub struct Shop {
    pool: Pool,
}

impl Shop {
    /// Connects, and brings the schema up to date.
    pub async fn start(url: &str) -> Result<Self, ShopError> {
        let pool = Pool::builder(url)?.max_size(16).build()?;
        let shop = Self { pool };
        shop.migrate().await?;
        Ok(shop)
    }

    async fn migrate(&self) -> Result<(), ShopError> {
        let mut client = self.pool.get().await?;
        embedded::migrations::runner().run_async(&mut **client).await?;
        Ok(())
    }

    /// Fills the shelves, in one COPY.
    pub async fn import(&self, lines: Vec<(String, i32)>) -> Result<u64, ShopError> {
        let imported = self.pool.transaction(async |transaction| {
            transaction.batch_execute("CREATE TEMPORARY TABLE incoming (LIKE stock) ON COMMIT DROP").await?;
            let sink = transaction.copy_in("COPY incoming FROM STDIN").await?;
            pin_mut!(sink);
            let lines = lines.iter().map(|(sku, pieces)| Ok(Bytes::from(format!("{sku}\t{pieces}\n"))));
            sink.send_all(&mut stream::iter(lines)).await?;
            let imported = sink.finish().await?;
            let add = "INSERT INTO stock SELECT * FROM incoming \
                       ON CONFLICT (sku) DO UPDATE SET pieces = stock.pieces + EXCLUDED.pieces";
            transaction.execute(add, &[]).await?;
            Ok(imported)
        });
        Ok(imported.await?)
    }

    /// Places an order, and tells the warehouse.
    pub async fn order(&self, request: i64, sku: &str) -> Result<i64, ShopError> {
        let id = self.pool.transaction(async |transaction| {
            take(&transaction, sku).await?;
            let id = place(&transaction, request, sku).await?;
            announce(&transaction, id).await?;
            Ok(id)
        });
        Ok(id.await?)
    }

    /// Marks an order as shipped.
    pub async fn ship(&self, id: i64) -> Result<bool, ShopError> {
        let changed = self.pool.idempotent(async |client| Ok(mark(&client, id, Status::Shipped).await?)).await?;
        Ok(changed)
    }

    /// Reads one order.
    pub async fn find(&self, id: i64) -> Result<Option<Order>, ShopError> {
        let order = self.pool.read(async |client| Ok(find(&client, id).await?)).await?;
        Ok(order)
    }

    /// The orders as they come.
    pub async fn listen(&self) -> Result<mpsc::UnboundedReceiver<i64>, ShopError> {
        let mut listener = self.pool.listen(["orders"]).await?;
        let (orders, received) = mpsc::unbounded_channel();
        let shop = self.clone();
        tokio::spawn(async move {
            while let Some(message) = listener.recv().await {
                let ids = match message {
                    Ok(Message::Notification(notification)) => notification.payload().parse().into_iter().collect(),
                    // Some may be missing after a failover, and the table has them.
                    Ok(Message::MayHaveGap) => shop.waiting().await.unwrap_or_default(),
                    Err(_) => continue,
                };
                for id in ids {
                    let _ = orders.send(id);
                }
            }
        });
        Ok(received)
    }

    async fn waiting(&self) -> Result<Vec<i64>, ShopError> {
        let sql = "SELECT id FROM orders WHERE status = 'placed'";
        let ids = self.pool.read(async |client| Ok(client.query_scalar(sql, &[]).await?)).await?;
        Ok(ids)
    }
}

async fn take(client: &impl GenericClient, sku: &str) -> Result<(), ShopError> {
    let statement = client.prepare_cached("UPDATE stock SET pieces = pieces - 1 WHERE sku = $1 AND pieces > 0").await?;
    if client.execute(&statement, &[&sku]).await? == 0 {
        return Err(ShopError::SoldOut(sku.to_owned()));
    }
    Ok(())
}

async fn place(client: &impl GenericClient, request: i64, sku: &str) -> Result<i64, tokio_postgres::Error> {
    let sql = "INSERT INTO orders (request, sku, status) VALUES ($1, $2, $3) RETURNING id";
    let statement = client.prepare_cached(sql).await?;
    let row = client.query_one(&statement, &[&request, &sku, &Status::Placed]).await?;
    row.try_get(0)
}

async fn announce(client: &impl GenericClient, id: i64) -> Result<(), tokio_postgres::Error> {
    client.execute("SELECT pg_notify('orders', $1)", &[&id.to_string()]).await?;
    Ok(())
}

async fn mark(client: &impl GenericClient, id: i64, status: Status) -> Result<bool, tokio_postgres::Error> {
    let statement = client.prepare_cached("UPDATE orders SET status = $2 WHERE id = $1").await?;
    Ok(client.execute(&statement, &[&id, &status]).await? == 1)
}

async fn find(client: &impl GenericClient, id: i64) -> Result<Option<Order>, tokio_postgres::Error> {
    let statement = client.prepare_cached("SELECT id, sku, status FROM orders WHERE id = $1").await?;
    client.query_opt(&statement, &[&id]).await?.map(Order::try_from).transpose()
}
