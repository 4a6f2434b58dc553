//! The table that records committed transactions, and how long it keeps its rows. The SQL is in `settle/ledger.rs`.

use std::sync::Arc;
use std::time::Duration;

const SCHEMA: &str = "failover";
const TABLE: &str = "ledger";
/// The shortest and the longest time for which a row is kept. The upper limit keeps the time within what the server can
/// store.
const KEEP_AT_LEAST: Duration = Duration::from_secs(600);
const KEEP_AT_MOST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// A table that records which transactions were committed, for [`Guarantee::Ledger`](crate::Guarantee::Ledger).
///
/// It settles commits after any number of crashes and failovers. The price is a table, one row per transaction, and the
/// pruning of old rows. `sql/ledger.sql` contains the table and explains it; [`Ledger::install`] creates it.
///
/// ```no_run
/// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres_failover::Guarantee;
/// use tokio_postgres_failover::ledger::Ledger;
///
/// let ledger = Ledger::default();
/// let client = pool.get().await?;
/// ledger.install(&client).await?;
/// pool.build_transaction()
///     .guarantee(Guarantee::Ledger(ledger))
///     .run(async |tx| Ok(tx.execute("INSERT INTO payments DEFAULT VALUES", &[]).await?))
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    schema: Arc<str>,
    table: Arc<str>,
    keep: Duration,
}

impl Default for Ledger {
    /// The table `failover.ledger`; rows are kept for an hour.
    fn default() -> Self {
        Self::named(SCHEMA, TABLE)
    }
}

impl Ledger {
    /// Uses another table. The names are taken literally, without folding their case.
    #[must_use]
    pub fn named(schema: &str, table: &str) -> Self {
        Self { schema: schema.into(), table: table.into(), keep: Duration::from_secs(3600) }
    }

    /// Sets how long the rows of this pool's transactions are kept, by the server's clock. The shortest time is ten
    /// minutes. Default: one hour.
    ///
    /// If a transaction was not committed, the ledger proves that for half of this time after BEGIN. Later the outcome
    /// counts as unknown.
    #[must_use]
    pub fn keep(mut self, keep: Duration) -> Self {
        self.keep = keep.clamp(KEEP_AT_LEAST, KEEP_AT_MOST);
        self
    }

    pub(crate) fn kept_for(&self) -> Duration {
        self.keep
    }

    pub(crate) fn schema(&self) -> &str {
        &self.schema
    }

    pub(crate) fn table(&self) -> &str {
        &self.table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_kept_for_ten_minutes_at_least() {
        assert_eq!(Ledger::default().keep(Duration::ZERO).kept_for(), KEEP_AT_LEAST);
        assert_eq!(Ledger::default().keep(Duration::MAX).kept_for(), KEEP_AT_MOST);
    }
}
