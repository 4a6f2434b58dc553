//! The SQL that settles commits by a table of the user's database. Each transaction writes a row at BEGIN. To find out
//! whether it was committed, a settler inserts a row with the same id. `commit` decides what the answer means. The
//! tests are in `tests/it/commit/settle.rs`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error, SimpleQueryMessage};

use super::columns::{Column, Row, columns, field, list, text};
use super::wal::{BEGUN_HERE, Backend, LAST_REPLAYED, MarkStatement, begin_with, completes, is_of};
use crate::classify::not_offered;
use crate::commit::{Ledger, LedgerEntry, Life, SettleVerdict, settle_entry};
use crate::topology::{BadReport, STARTED_AT, UNLIMITED};

/// The documented SQL file; its names are those of [`Ledger::default`].
const DDL: &str = include_str!("../../sql/ledger.sql");

/// The longest time for which a settler waits for a lock. Other settlers queue behind it meanwhile.
const LOCK_TIMEOUT: &str = "250ms";
/// The most rows that one pruning transaction removes. The limit keeps the transaction short.
const PRUNED_AT_ONCE: u32 = 10_000;
/// The current time in microseconds since 1970.
const NOW: &str = "(extract(epoch FROM pg_catalog.now()) OPERATOR(pg_catalog.*) 1000000)::bigint";
/// Precedes the pool's own pruning in the same message, and switches `statement_timeout` off. [`UNLIMITED`] completes
/// it. Several pools may prune at the same time and wait for each other; if a time-out ended each attempt, the ledger
/// would grow for ever.
const UNHURRIED: &str = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 0; ";

// In each answer, `StartedAt` and `Replayed` identify the life of the server that answers. A proxy may connect the
// transaction to another server than the one that was verified.

columns! {
    /// The answer to [`Ledger::enter`].
    enum EntryColumn { Id, Pid, Xid, Begun, BegunHere, StartedAt, Replayed }
}

columns! {
    /// The answer to [`Ledger::enter_directly`].
    enum DirectEntryColumn { Id, Xid, Begun }
}

columns! {
    /// The answer to [`Ledger::ask`].
    enum FoundColumn { Fence, Now, Id, Persistence, StartedAt, Replayed }
}

columns! {
    /// The answer to [`Ledger::has`].
    enum OwnColumn { Exists, StartedAt, Replayed }
}

impl Ledger {
    /// Returns the statements that [`Ledger::install`] runs.
    #[must_use]
    pub fn ddl(&self) -> String {
        // PostgreSQL would cut a longer name, which might then equal the table's name.
        let stem: String = self.table().chars().take(14).collect();
        DDL.replace("\"ledger_until\"", &quoted(&format!("{stem}_until")))
            .replace("\"failover\".\"ledger\"", &self.path())
            .replace("SCHEMA IF NOT EXISTS \"failover\"", &format!("SCHEMA IF NOT EXISTS {}", quoted(self.schema())))
    }

    /// Creates the schema, the table and the index if they are missing: either all of them or none. This needs the
    /// privilege to create them. Several callers may call this at the same time. Cancel-safe.
    ///
    /// `client` must be connected to the primary, like those of [`Pool::get`](crate::Pool::get).
    pub async fn install(&self, client: &Client) -> Result<(), Error> {
        client.batch_execute(&self.ddl()).await
    }

    /// Removes rows that were kept for long enough, ten thousand at most, and returns their number. The pool does this
    /// by itself from time to time, so call it only to catch up. Cancel-safe.
    pub async fn prune(&self, client: &Client) -> Result<u64, Error> {
        self.prune_once(client, "").await
    }

    /// All names are qualified, here and elsewhere. `search_path` is not set, because a trigger of the user's may need
    /// the role's own `search_path`.
    async fn prune_once(&self, client: &Client, first: &str) -> Result<u64, Error> {
        let table = self.path();
        let sql = format!(
            "{first}DELETE FROM {table} WHERE id OPERATOR(pg_catalog.=) ANY (\
                SELECT id FROM {table} WHERE until OPERATOR(pg_catalog.<) pg_catalog.now() \
                 LIMIT {PRUNED_AT_ONCE} FOR UPDATE SKIP LOCKED)"
        );
        let messages = client.simple_query(&sql).await?;
        Ok(messages
            .iter()
            .map(|message| if let SimpleQueryMessage::CommandComplete(rows) = message { *rows } else { 0 })
            .sum())
    }

    /// Removes all rows that have been kept for long enough.
    pub(crate) async fn prune_all(&self, client: &Client) -> Result<u64, Error> {
        let (mut all, unlimited) = (0, format!("{UNHURRIED}{UNLIMITED} "));
        loop {
            let rows = match self.prune_once(client, &unlimited).await {
                // The role may not switch the time limit off.
                Err(error) if not_offered(&error) => self.prune_once(client, UNHURRIED).await?,
                rows => rows?,
            };
            all += rows;
            if rows < u64::from(PRUNED_AT_ONCE) {
                return Ok(all);
            }
        }
    }

    /// Returns the statement to send with BEGIN. The server creates the id, from its own strong source of randomness.
    pub(crate) fn enter(&self) -> String {
        let columns = list(|column| match column {
            EntryColumn::Id => "id",
            EntryColumn::Pid => "pg_catalog.pg_backend_pid()",
            EntryColumn::Xid => "pg_catalog.pg_current_xact_id()",
            EntryColumn::Begun => NOW,
            EntryColumn::BegunHere => BEGUN_HERE,
            EntryColumn::StartedAt => STARTED_AT,
            EntryColumn::Replayed => LAST_REPLAYED,
        });
        format!("INSERT INTO {} (until) VALUES ({}) RETURNING {columns}", self.path(), self.until())
    }

    /// As [`Self::enter`], for a session that is one session of the server as long as it lasts, and on which no
    /// transaction was open. So the answer need not say which server has answered.
    pub(crate) fn enter_directly(&self, statement: MarkStatement) -> String {
        let name = self.entry_name();
        let entry = || {
            let columns = list(|column| match column {
                DirectEntryColumn::Id => "id",
                DirectEntryColumn::Xid => "pg_catalog.pg_current_xact_id()",
                DirectEntryColumn::Begun => NOW,
            });
            format!("INSERT INTO {} (until) VALUES ({}) RETURNING {columns}", self.path(), self.until())
        };
        match statement {
            MarkStatement::New => format!("PREPARE {name} AS {}; EXECUTE {name}", entry()),
            MarkStatement::Prepared => format!("EXECUTE {name}"),
            MarkStatement::Plain => entry(),
        }
    }

    /// The name of the statement that a session prepares for this ledger. The number in it changes with the columns:
    /// different versions of this crate may share a session.
    pub(crate) fn entry_name(&self) -> String {
        format!("tokio_postgres_failover_entry_1_{:016x}", self.key())
    }

    /// A number that tells the statement of this ledger from those of others.
    pub(crate) fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.schema(), self.table(), self.kept_for()).hash(&mut hasher);
        hasher.finish()
    }

    /// Begins a settler's transaction, and tries to insert the id. If the id's transaction is in progress, this waits
    /// for a while and returns [`SettleVerdict::InProgress`]. The server has then aborted the settler's transaction.
    /// `Ok(None)`: the server is not the `verified` one.
    pub(crate) async fn ask(
        &self,
        client: &Client,
        verified: Option<Life>,
        entered: &Entered,
    ) -> Result<Option<SettleVerdict>, Option<Error>> {
        // On a conflict, an update that changes nothing writes WAL. So COMMIT waits until a synchronous standby has the
        // row that was found.
        let columns = list(|column| match column {
            FoundColumn::Fence => "fence",
            FoundColumn::Now => NOW,
            FoundColumn::Id => "id",
            FoundColumn::Persistence => {
                "(SELECT c.relpersistence FROM pg_catalog.pg_class c \
                   WHERE c.oid OPERATOR(pg_catalog.=) entry.tableoid)"
            }
            FoundColumn::StartedAt => STARTED_AT,
            FoundColumn::Replayed => LAST_REPLAYED,
        });
        let sql = format!(
            "SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; \
             INSERT INTO {} AS entry (id, until, fence) VALUES ('{}', {}, true) \
                 ON CONFLICT (id) DO UPDATE SET fence = entry.fence RETURNING {columns}",
            self.path(),
            entered.id,
            self.until(),
        );
        let row = match begin_with(client, &sql).await {
            Err(error) if waited_for_row(&error) => {
                if planted!("takes a locked row for none") {
                    client.batch_execute("ROLLBACK").await?;
                    return Ok(Some(SettleVerdict::NotCommitted));
                }
                return Ok(Some(SettleVerdict::InProgress));
            }
            row => row?,
        };
        if !is_verified(verified.as_ref(), &row, FoundColumn::StartedAt, FoundColumn::Replayed).map_err(|_| None)? {
            return Ok(None);
        }
        // The row proves nothing if a trigger has given it another id, or if the table is not permanent (`p`), because
        // a crash empties such a table.
        if text(&row, FoundColumn::Id) != Some(&entered.id) || text(&row, FoundColumn::Persistence) != Some("p") {
            return Err(None);
        }
        let entry = match text(&row, FoundColumn::Fence) {
            Some("t") => LedgerEntry::Fence,
            Some("f") => LedgerEntry::Own,
            _ => return Err(None),
        };
        let now: i64 = field(&row, FoundColumn::Now, "a time").map_err(|_| None)?;
        // If the clock was set back, the age would be negative. It counts as zero.
        let age = u64::try_from(now.saturating_sub(entered.begun)).unwrap_or(0);
        Ok(Some(settle_entry(entry, Duration::from_micros(age), self.kept_for())))
    }

    /// Returns whether the transaction's own row is there. Changes nothing. `None`: the server is not the `verified`
    /// one.
    pub(crate) async fn has(
        &self,
        client: &Client,
        verified: Option<Life>,
        entered: &Entered,
    ) -> Result<Option<bool>, Error> {
        let exists = format!(
            "EXISTS (SELECT FROM {} WHERE id OPERATOR(pg_catalog.=) '{}' AND NOT fence)",
            self.path(),
            entered.id
        );
        let columns = list(|column| match column {
            OwnColumn::Exists => exists.as_str(),
            OwnColumn::StartedAt => STARTED_AT,
            OwnColumn::Replayed => LAST_REPLAYED,
        });
        let row = begin_with(client, &format!("SELECT {columns}")).await?;
        let known = is_verified(verified.as_ref(), &row, OwnColumn::StartedAt, OwnColumn::Replayed).unwrap_or(false);
        Ok(known.then(|| text(&row, OwnColumn::Exists) == Some("t")))
    }

    /// Ends a settler's transaction. It has written, so its COMMIT waits for the synchronous standbys. If an
    /// administrator cancels that wait, the server sends a notice. Returns whether the transaction was committed.
    pub(crate) async fn confirm(&self, client: &Client) -> Result<bool, Error> {
        completes(client, "SET LOCAL client_min_messages = warning; COMMIT", 2).await
    }

    fn until(&self) -> String {
        // The fields of an interval that is written as a text end at 2^31 before PostgreSQL 15.
        let kept = format!("pg_catalog.make_interval(secs => {})", self.kept_for().as_secs());
        format!("pg_catalog.now() OPERATOR(pg_catalog.+) {kept}")
    }

    pub(crate) fn path(&self) -> String {
        format!("{}.{}", quoted(self.schema()), quoted(self.table()))
    }
}

/// A transaction's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entered {
    id: String,
    /// Microseconds since 1970, by the server's clock.
    begun: i64,
}

/// Returns whether the lock of a row was not available. The table itself is locked before the statement is planned, and
/// an error of that has a position in the statement (`parserOpenTable` in `parse_relation.c`). An administrator's LOCK
/// TABLE says nothing about the transaction.
fn waited_for_row(error: &Error) -> bool {
    let report = error.as_db_error().filter(|report| *report.code() == SqlState::LOCK_NOT_AVAILABLE);
    report.is_some_and(|report| report.position().is_none())
}

/// Returns whether the server that answered is in its verified life, if that is known.
fn is_verified<C: Column>(verified: Option<&Life>, row: &Row, started_at: C, replayed: C) -> Result<bool, BadReport> {
    verified.map_or(Ok(true), |life| is_of(life, row, started_at, replayed))
}

/// The answer to [`Ledger::enter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entering {
    As(Entered, Backend),
    /// Another server answered than the verified one, or it has restarted or crashed since.
    Elsewhere,
    /// The transaction was open already, so COMMIT would also commit work that is not this call's.
    Joined,
}

/// Reads the answer to [`Ledger::enter`]: the row, and the session that wrote it.
pub(crate) fn entered(verified: Option<&Life>, row: &Row) -> Result<Entering, BadReport> {
    if text(row, EntryColumn::BegunHere) == Some("f") {
        return Ok(Entering::Joined);
    }
    if !is_verified(verified, row, EntryColumn::StartedAt, EntryColumn::Replayed)? {
        return Ok(Entering::Elsewhere);
    }
    let id = id(row, EntryColumn::Id)?;
    let pid = field(row, EntryColumn::Pid, "a process id")?;
    let xid = field(row, EntryColumn::Xid, "a transaction id")?;
    let begun = field(row, EntryColumn::Begun, "a time")?;
    Ok(Entering::As(Entered { id, begun }, Backend { pid, xid }))
}

/// Reads the answer to [`Ledger::enter_directly`]. `pid`: the server process of the session.
pub(crate) fn entered_directly(pid: i32, row: &Row) -> Result<Entering, BadReport> {
    let id = id(row, DirectEntryColumn::Id)?;
    let xid = field(row, DirectEntryColumn::Xid, "a transaction id")?;
    let begun = field(row, DirectEntryColumn::Begun, "a time")?;
    Ok(Entering::As(Entered { id, begun }, Backend { pid, xid }))
}

fn id(row: &Row, column: impl Column) -> Result<String, BadReport> {
    let id = text(row, column).unwrap_or("NULL");
    // The id is put into a statement as text, so nothing else is accepted.
    if id.len() != 36 || !id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
        return Err(BadReport::new("a UUID", id));
    }
    Ok(id.to_owned())
}

/// Quotes a name as an SQL identifier.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::Server;

    #[test]
    fn the_shipped_file_is_what_is_installed() {
        assert_eq!(Ledger::default().ddl(), DDL);
    }

    #[test]
    fn other_names_replace_each_name() {
        let ddl = Ledger::named("my schema", "a\"b").ddl();
        let code: Vec<&str> = ddl.lines().filter(|line| !line.starts_with("--")).collect();
        let code = code.join("\n");
        assert!(code.contains(r#"CREATE SCHEMA IF NOT EXISTS "my schema""#), "{code}");
        let long = Ledger::named("failover", &"t".repeat(63)).ddl();
        assert!(long.contains(r#""tttttttttttttt_until" ON"#), "{long}");
        assert!(code.contains(r#"CREATE TABLE IF NOT EXISTS "my schema"."a""b""#), "{code}");
        assert!(code.contains(r#""a""b_until" ON "my schema"."a""b""#), "{code}");
        assert!(!code.contains("\"failover\"") && !code.contains("\"ledger"), "{code}");
    }

    #[test]
    fn only_a_uuid_is_an_id() {
        let server = Server { system_identifier: 1, timeline: 1, started_at: 5_000_000 };
        let life = Life { server, replayed: None, stats_reset: None, ancestor: None };
        let of = |columns: [&str; 6]| {
            columns.map(|text| Some(text.to_owned())).into_iter().chain([None]).collect::<Vec<Option<String>>>()
        };
        let row = |id: &str| of([id, "1", "2", "3", "t", "5"]);
        let entered = |row: &Row| entered(Some(&life), row);
        let id = "0b8a2b44-5c36-4d0a-9d5e-2f4f6f0a5e11";
        let expected = Entered { id: id.to_owned(), begun: 3 };
        assert_eq!(entered(&row(id)).unwrap(), Entering::As(expected, Backend { pid: 1, xid: 2 }));
        assert_eq!(entered(&of([id, "1", "2", "3", "f", "5"])).unwrap(), Entering::Joined);
        assert_eq!(entered(&of([id, "1", "2", "3", "t", "6"])).unwrap(), Entering::Elsewhere, "it was started again");
        assert!(
            super::entered(None, &of([id, "1", "2", "3", "t", "6"])).is_ok(),
            "nobody knows which life it should be"
        );
        for bad in ["", "x", "0b8a2b44-5c36-4d0a-9d5e-2f4f6f0a5e1'", "0b8a2b44-5c36-4d0a-9d5e-2f4f6f0a5e111"] {
            assert!(entered(&row(bad)).is_err(), "{bad}");
            assert!(entered_directly(1, &[bad, "2", "3"].map(|text| Some(text.to_owned())).to_vec()).is_err(), "{bad}");
        }
    }
}
