//! Transaction blocks: what needs one, what warns without one, and savepoints within one.

use tokio::time::Instant;

use crate::done::Done;
use crate::proto::Answer;
use crate::session::{READ_ONLY, Session, Transaction};
use crate::sql::SqlError;

impl Session {
    /// The open transaction block, which this statement needs.
    pub(crate) fn block(&mut self, statement: &str) -> Result<&mut Transaction, SqlError> {
        let open = self.transaction.as_mut().filter(|it| it.block);
        open.ok_or_else(|| SqlError::new("25P01", format!("{statement} can only be used in transaction blocks")))
    }

    /// Shows others when the transaction began, or that there is none.
    pub(crate) fn show_start(&self, at: Option<Instant>) {
        self.of_node(|node| node.backends.get_mut(&self.pid).map(|backend| backend.xact_start = at));
    }

    /// A transaction that began on a standby may outlive its promotion, so this asks for the present.
    pub(crate) fn not_during_recovery(&self, command: &str) -> Result<(), SqlError> {
        if !self.of_node(|node| node.recovery) {
            return Ok(());
        }
        let message = format!("cannot execute {command} during recovery");
        Err(SqlError::new(READ_ONLY, message).by("PreventCommandDuringRecovery"))
    }

    /// BEGIN, whose block may be open already.
    pub(crate) fn begin_block(&mut self, read_only: Option<bool>, answer: &mut Answer) -> Result<(), SqlError> {
        let was_open = self.transaction.as_ref().is_some_and(|it| it.block);
        match &mut self.transaction {
            Some(_) if was_open => {
                answer.notice(&SqlError::new("25001", "there is already a transaction in progress"));
            }
            Some(open) => open.block = true,
            None => self.begin(true),
        }
        let refused = self.access(read_only);
        // A block that could not begin is none.
        if refused.is_err() && !was_open {
            self.abort();
        }
        refused
    }

    /// Sets whether the open transaction may write (`check_transaction_read_only`). A standby has none that may, and
    /// after the first query it is too late.
    fn access(&mut self, read_only: Option<bool>) -> Result<(), SqlError> {
        let recovery = self.of_node(|node| node.recovery);
        let (Some(transaction), Some(read_only)) = (&mut self.transaction, read_only) else { return Ok(()) };
        if !read_only && (transaction.read_only || transaction.began_in_recovery) {
            if transaction.has_queried {
                return Err(SqlError::new("25001", "transaction read-write mode must be set before any query"));
            }
            if recovery {
                return Err(SqlError::new("0A000", "cannot set transaction read-write mode during recovery"));
            }
            transaction.began_in_recovery = false;
        }
        transaction.read_only = read_only;
        Ok(())
    }

    pub(crate) fn back_to(&mut self, savepoint: &str) -> Result<Done, SqlError> {
        let transaction = self.block("ROLLBACK TO SAVEPOINT")?;
        let Some(at) = transaction.savepoints.iter().rposition(|name| name == savepoint) else {
            return Err(SqlError::new("3B001", format!("savepoint \"{savepoint}\" does not exist")));
        };
        transaction.savepoints.truncate(at + 1);
        transaction.failed = false;
        Ok(Done::tag("ROLLBACK"))
    }

    /// Warns of a COMMIT or ROLLBACK without BEGIN.
    pub(crate) fn warn_of_no_block(&self, answer: &mut Answer) {
        if self.transaction.as_ref().is_none_or(|it| !it.block) {
            answer.notice(&SqlError::new("25P01", "there is no transaction in progress").by("EndTransactionBlock"));
        }
    }
}
